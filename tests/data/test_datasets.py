"""KTO rows and DPO pairs on planted scores, lengths, training order, class weights."""

import itertools
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_pipeline.data.dataset_files import kto_weights, training_order
from ray_pipeline.data.dataset_rows import DPO_DROPPED, KTO_DROPPED, DatasetsConfig, Kind, dpo_rows, kto_rows
from ray_pipeline.data.datasets import dataset_rows
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.rows import KeyMismatch, gather
from ray_pipeline.data.tokens import BYTES_PER_TOKEN, TokenCounter, TokenEstimate, counted_with
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings
from ray_pipeline.graph.stage import Stage, WholeWork
from ray_pipeline.pocket import model_path
from ray_pipeline.policy.perplexity import encode_row
from ray_pipeline.store.schemas import DPO, KTO
from tests.planted import JUDGES, Planted, World, candidate_name, count_words, ended, make_world, random_world

CONFIG = DatasetsConfig(max_length=60, max_prompt_length=20)
GOOD: Planted = ("a good answer", (9, 9, 9), False)
BAD: Planted = ("a bad answer", (2, 2, 2), False)
FAIR: Planted = ("a fair answer", (5, 6, 5), False)


def decisions_of(world: World, gate: GateConfig | None = None) -> pa.Table:
    return decide(world.candidates, world.verdicts, world.critiques, JUDGES, gate or GateConfig())


def made(maker, world: World, config=CONFIG, encode=count_words, gate=None):
    table, counts = maker(world.prompts, world.candidates, world.verdicts, decisions_of(world, gate), config, encode)
    return table.to_pylist(), counts


def kto(world, **options):
    return made(kto_rows, world, **options)


def dpo(world, **options):
    return made(dpo_rows, world, **options)


# --- KTO --------------------------------------------------------------------------------------------------------------


def test_kto_rows():
    world = make_world({"q one": [GOOD, FAIR], "q two": [BAD]}, val=["q two"])
    rows, counts = kto(world)
    none = dict.fromkeys(KTO_DROPPED, 0)
    assert counts == {"candidates": 3, "cut_off": 0, "kept": 2, "dropped": none, "truncated": 0}
    good, bad = rows
    prompt = world.prompts["prompt_id"][0].as_py()
    assert good == {
        "candidate_id": candidate_name(prompt, 0),
        "prompt_id": prompt,
        "split": "train",
        "prompt": [{"role": "user", "content": "q one"}],
        "completion": [{"role": "assistant", "content": "a good answer"}],
        "label": True,
        "final_score": 9.0,
        "scores": [{"judge": j, "score": 9.0} for j in sorted(JUDGES)],
        "copies": 1,
        "model": None,
    }
    assert (bad["label"], bad["split"], bad["final_score"]) == (False, "val", 2.0)


def test_kto_scores_are_those_of_the_named_judges():
    world = make_world({"q": [("x", (9, 8, 7), False)]})
    arguments = (world.prompts, world.candidates, world.verdicts, decisions_of(world), CONFIG, count_words)
    table, _ = kto_rows(*arguments, judges=["factuality", "helpfulness"])
    assert table["scores"].to_pylist() == [
        [{"judge": "factuality", "score": 8.0}, {"judge": "helpfulness", "score": 9.0}]
    ]


def test_kto_lengths():
    long_prompt = " ".join(["word"] * 30)
    world = make_world(
        {
            long_prompt: [GOOD, BAD],
            "q": [(" \n", (9, 9, 9), False), (None, (2, 2, 2), False), (" ".join(["w"] * 70), (9, 9, 9), False), BAD],
        }
    )
    rows, counts = kto(world)
    assert counts["dropped"] == {"empty_response": 2, "contradictory": 0, "repeated": 0, "prompt_too_long": 2}
    assert (counts["kept"], counts["truncated"]) == (2, 1)
    assert len(rows[0]["completion"][0]["content"].split()) == 70  # the trainer cuts, the dataset does not


def test_the_prompt_limit_counts_the_generation_prompt():
    text = " ".join(["w"] * 17)
    world = make_world({text: [GOOD]})
    assert len(count_words([{"role": "user", "content": text}])) == 20
    assert kto(world)[1]["kept"] == 1
    assert kto(world, config=CONFIG.model_copy(update={"max_prompt_length": 19}))[1]["kept"] == 0


# --- DPO --------------------------------------------------------------------------------------------------------------

#: final scores 9, 8, 7.33, 5.33, 4, 3, 2 and one that abstains
LADDER = [
    ("nine", (9, 9, 9)), ("eight", (8, 8, 8)), ("seven", (7, 7, 8)), ("five", (5, 6, 5)), ("four", (4, 4, 4)),
    ("three", (3, 3, 3)), ("two", (2, 2, 2)), ("odd", (1, 10, 10)),
]  # fmt: skip


def test_the_pair_is_the_best_with_the_worst_in_every_order():
    """Design §6.3: an earlier pick took the lower of two good answers, in one order only."""
    for order in itertools.permutations(["nine", "eight", "five", "three", "two"]):
        scores = dict(LADDER)
        rows, counts = dpo(make_world({"q": [(name, scores[name], False) for name in order]}))
        assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [("nine", "two")]
        assert (rows[0]["score_chosen"], rows[0]["score_rejected"], rows[0]["score_gap"]) == (9.0, 2.0, 7.0)
        assert counts["kept"] == 1


@given(st.permutations(LADDER), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_pairs_of_any_subset(order, size):
    """Against a rule written out again, whatever is there and in whatever order."""
    taken = order[:size]
    rows, counts = dpo(make_world({"q": [(name, scores, False) for name, scores in taken]}))
    good = [name for name in ("nine", "eight", "seven") if name in dict(taken)]
    bad = [name for name in ("two", "three", "four") if name in dict(taken)]
    if good and bad:
        assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [(good[0], bad[0])]
    else:
        reason = "no_undesirable" if good else "no_desirable" if bad else "no_desirable_or_undesirable"
        assert not rows and counts["dropped"][reason] == 1


def test_equal_scores_are_decided_by_candidate_id():
    answers: list[Planted] = [(f"good {i}", (9, 9, 9), False) for i in range(5)]
    answers += [(f"bad {i}", (2, 2, 2), False) for i in range(5)]
    world = make_world({"q": answers})
    ids = world.candidates["candidate_id"].to_pylist()
    for seed in range(5):
        (row,), _ = dpo(world.shuffled(seed))
        assert (row["chosen_id"], row["rejected_id"]) == (min(ids[:5]), min(ids[5:]))


def test_guards_and_their_counts():
    """Design §6.13. The gate is loosened so that a gap can be small at all."""
    near: list[Planted] = [("a", (7, 7, 7), False), ("b", (6, 6, 6), False)]
    world = make_world(
        {
            "fine": [GOOD, BAD],
            "neither": [FAIR, FAIR],
            "good only": [GOOD, FAIR],
            "bad only": [BAD],
            "near": near,
            "same": [("Same  words \n", (9, 9, 9), False), ("Same words", (2, 2, 2), False)],
            " ".join(["long"] * 30): [GOOD, BAD],
            "cut": [(" ".join(["w"] * 70), (9, 9, 9), False), (" ".join(["w"] * 90), (2, 2, 2), False)],
            "cut but unequal": [(" ".join(["w"] * 70), (9, 9, 9), False), (" ".join(["v"] * 70), (2, 2, 2), False)],
            "empty": [("", (9, 9, 9), False), GOOD, BAD],
        }
    )
    rows, counts = dpo(world, gate=GateConfig(undesirable_at=6.0, desirable_at=7.0))
    # With the looser gate the fair answers are undesirable.
    assert counts["dropped"] == {
        "no_desirable_or_undesirable": 0, "no_desirable": 2, "no_undesirable": 0, "gap_too_small": 1, "equal_text": 1,
        "prompt_too_long": 1, "equal_after_truncation": 1,
    }  # fmt: skip
    assert {r["prompt"][0]["content"] for r in rows} == {"fine", "good only", "cut but unequal", "empty"}
    assert (counts["prompts"], counts["kept"], counts["truncated"], counts["empty_responses"]) == (10, 4, 1, 1)
    assert counts["prompts"] == counts["kept"] + sum(counts["dropped"].values())
    strict = dpo(world)[1]["dropped"]
    assert (strict["no_desirable_or_undesirable"], strict["no_undesirable"]) == (1, 2)
    assert tuple(strict) == DPO_DROPPED


def test_a_gap_of_exactly_the_minimum_is_enough():
    world = make_world({"q": [("a", (7, 7, 7), False), ("b", (4, 4, 4), False)]})
    assert dpo(world, config=CONFIG.model_copy(update={"min_gap": 3.0}))[1]["kept"] == 1
    assert dpo(world, config=CONFIG.model_copy(update={"min_gap": 3.0001}))[1]["kept"] == 0


# --- joins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [kto_rows, dpo_rows])
def test_joins_survive_any_order_of_rows(maker):
    world = random_world(15, seed=3)
    decisions = decisions_of(world)
    expected, counts = maker(world.prompts, world.candidates, world.verdicts, decisions, CONFIG, count_words)
    key = "candidate_id" if maker is kto_rows else "prompt_id"
    for seed in range(3):
        mixed = world.shuffled(seed)
        found, other = maker(
            mixed.prompts, mixed.candidates, mixed.verdicts, decisions_of(mixed.shuffled(9)), CONFIG, count_words
        )
        assert other == counts
        assert found.sort_by(key).to_pylist() == expected.sort_by(key).to_pylist()


@pytest.mark.parametrize("maker", [kto_rows, dpo_rows])
def test_tables_that_do_not_fit(maker):
    world = make_world({"q one": [GOOD, BAD], "q two": [GOOD, BAD]})
    decisions = decisions_of(world)
    own = candidate_name(world.prompts["prompt_id"][0].as_py(), 0)
    cases = [
        (world.prompts.slice(1), world.candidates, "prompt .* is not in prompts"),
        (world.prompts, world.candidates.slice(1), f"candidate '{own}' is not in candidates"),
        (world.prompts, pa.concat_tables([world.candidates, world.candidates.slice(0, 1)]), f"{own}.*more than once"),
    ]
    for prompts, candidates, message in cases:
        with pytest.raises(KeyMismatch, match=message):
            maker(prompts, candidates, world.verdicts, decisions, CONFIG, count_words)
    swapped = decisions.set_column(1, decisions.schema.field(1), pa.array(decisions["prompt_id"].to_pylist()[::-1]))
    with pytest.raises(KeyMismatch, match="has another prompt_id"):
        maker(world.prompts, world.candidates, world.verdicts, swapped, CONFIG, count_words)


def test_empty_shard():
    world = random_world(1, seed=0)
    empty = World(*(getattr(world, f).slice(0, 0) for f in ("prompts", "candidates", "verdicts", "critiques")))
    decisions = decisions_of(empty)
    arguments = (empty.prompts, empty.candidates, empty.verdicts, decisions, CONFIG, count_words)
    assert kto_rows(*arguments)[0].schema.equals(KTO)
    assert dpo_rows(*arguments)[0].schema.equals(DPO)
    assert kto_rows(*arguments)[0].num_rows == dpo_rows(*arguments)[0].num_rows == 0


@given(st.lists(st.integers(0, 40), max_size=60), st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_gather_over_chunks(rows, sizes):
    """`gather` is `take`, whatever the chunks (some are empty)."""
    starts = [0, *itertools.accumulate(sizes)]
    table = pa.concat_tables([pa.table({"x": pa.array(range(a, a + n), pa.int64())}) for a, n in zip(starts, sizes)])  # noqa: B905
    wanted = [r % table.num_rows for r in rows] if table.num_rows else []
    import numpy as np

    assert gather(table, np.array(wanted, dtype=np.int64))["x"].to_pylist() == wanted


# --- order ------------------------------------------------------------------------------------------------------------


def kto_table(desirable: int, undesirable: int) -> pa.Table:
    row = {"split": "train", "prompt": [], "completion": [], "final_score": 0.0, "scores": []}
    labels = [True] * desirable + [False] * undesirable
    rows = [{**row, "candidate_id": f"c{i}", "prompt_id": f"p{i}", "label": label} for i, label in enumerate(labels)]
    return pa.Table.from_pylist(rows, schema=KTO)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_window_holds_the_ratio(desirable, undesirable, seed):
    table = kto_table(desirable, undesirable)
    ordered = in_order(table, "kto", seed)
    assert sorted(ordered["candidate_id"].to_pylist()) == sorted(table["candidate_id"].to_pylist())
    labels = ordered["label"].to_pylist()
    n = len(labels)
    for width in (2, 4, 16):
        for start in range(n - width + 1):
            assert abs(sum(labels[start : start + width]) - width * desirable / n) < 1


def in_order(table: pa.Table, kind: Kind, seed: int) -> pa.Table:
    return gather(table, training_order(table, kind, seed))


def test_order_depends_on_rows_and_seed_alone():
    table = kto_table(30, 20)
    mixed = table.take(pa.array(random.Random(0).sample(range(50), 50)))
    assert in_order(mixed, "kto", 1).to_pylist() == in_order(table, "kto", 1).to_pylist()
    first, second = (in_order(table, "kto", seed)["candidate_id"].to_pylist() for seed in (1, 2))
    assert second != first
    assert first[:5] != [f"c{i}" for i in range(5)]

    world = random_world(30, seed=1)
    pairs, _ = dpo_rows(world.prompts, world.candidates, world.verdicts, decisions_of(world), CONFIG, count_words)
    back = pairs.take(pa.array(range(pairs.num_rows - 1, -1, -1)))
    assert in_order(back, "dpo", 1).to_pylist() == in_order(pairs, "dpo", 1).to_pylist()
    assert in_order(pairs, "dpo", 1)["prompt_id"].to_pylist() != pairs["prompt_id"].to_pylist()


# --- class weights ----------------------------------------------------------------------------------------------------


def trl_is_content(desirable: int, undesirable: int, w_d: float, w_u: float) -> bool:
    """The condition of `KTOTrainer._prepare_dataset` in TRL 1.16, with its rounding."""
    if desirable == undesirable:
        return True
    low_d = round(undesirable * w_u / desirable * 1, 2)
    high_d = round(undesirable * w_u / desirable * 1.33, 2)
    low_u = round(desirable * w_d / undesirable / 1.33, 2)
    high_u = round(desirable * w_d / undesirable / 1, 2)
    return low_d <= w_d <= high_d or low_u <= w_u <= high_u


@given(st.integers(1, 100_000), st.integers(1, 100_000))
@settings(max_examples=300, deadline=None)
def test_weights_are_inside(desirable, undesirable):
    w_d, w_u = kto_weights(desirable, undesirable)
    assert 1.0 in (w_d, w_u) and min(w_d, w_u) >= 1.0
    assert 1 <= w_d * desirable / (w_u * undesirable) <= 4 / 3
    assert trl_is_content(desirable, undesirable, w_d, w_u)
    if 1 <= desirable / undesirable <= 1.33:
        assert (w_d, w_u) == (1.0, 1.0)


@given(st.integers(2, 100_000), st.integers(1, 100_000), st.sampled_from([-1, 1]))
@settings(max_examples=300, deadline=None)
@example(745, 744, -1)
def test_weights_do_not_jump(desirable, undesirable, step):
    """Equal classes and the edges of the range are no special places."""
    before, after = kto_weights(desirable, undesirable), kto_weights(desirable + step, undesirable)
    share = 1 / min(desirable, desirable + step, undesirable)
    for weight, next_weight in zip(before, after, strict=True):
        assert abs(weight - next_weight) <= 0.01 + 1.01 * share * max(weight, next_weight)


def test_weights_of_swapped_classes_are_alike():
    assert kto_weights(753, 736) == (1.0, 1.0)
    assert kto_weights(736, 753) == (1.03, 1.0)
    assert kto_weights(1000, 1000) == (1.0, 1.0) and kto_weights(999, 1000) == (1.01, 1.0)
    assert kto_weights(1330, 1000) == (1.0, 1.0) and kto_weights(1331, 1000) == (1.0, 1.01)
    assert kto_weights(500, 1000) == (2.01, 1.0)  # beyond the range, the rarer class makes up for its number
    assert kto_weights(2000, 1000) == (1.0, 1.51)  # 2 / 1.33


def test_weights_of_the_published_run_and_of_one_class():
    assert kto_weights(951, 920) == (1.0, 1.0)
    assert kto_weights(1081, 25)[0] == 1.0
    assert kto_weights(0, 5) is None and kto_weights(5, 0) is None


# --- token counts -----------------------------------------------------------------------------------------------------


def test_token_counter_counts_as_trl_does(tokenizer):
    counter = TokenCounter(tokenizer, cache_size=2)
    prompt = [{"role": "user", "content": "sort 7 2 9"}]
    answer = [{"role": "assistant", "content": "2 7 9"}]
    expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    for _ in range(2):  # the second time from the cache
        assert counter(prompt, None) == list(expected)
        assert counter(prompt, answer) == list(whole)
    assert counter(prompt, answer)[: len(expected)] == list(expected)
    counter([{"role": "user", "content": "another"}], None)
    assert len(counter._cache) == 2


def test_system_text_without_a_system_role_is_counted_in_the_user_turn(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    system, user = {"role": "system", "content": "sort"}, {"role": "user", "content": "7 2 9"}
    answer = {"role": "assistant", "content": "2 7 9"}
    folded = [{"role": "user", "content": "sort\n\n7 2 9"}]
    assert TokenCounter(tokenizer)([system, user], None) == TokenCounter(tokenizer)(folded, None)
    assert encode_row(tokenizer, [system, user], "2 7 9").ids == encode_row(tokenizer, folded, "2 7 9").ids
    assert TokenCounter(tokenizer)([system, user], [answer]) == TokenCounter(tokenizer)(folded, [answer])


def test_token_counter_loads_and_refuses(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "policy")
    prompt = [{"role": "user", "content": "sort"}]
    loaded = TokenCounter.load(TokenizerSettings(model=str(tmp_path / "policy")))
    assert loaded(prompt, None) == TokenCounter(tokenizer)(prompt, None)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        TokenCounter(tokenizer)


@given(prompt=st.text(), answer=st.text(), longer=st.text())
def test_an_estimate_counts_bytes_and_tells_texts_apart(prompt: str, answer: str, longer: str) -> None:
    """Its ids stand for the text, so that answers which differ after the limit alone are found as equal."""
    count = TokenEstimate()
    asked, said = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    assert len(count(asked)) == -(-len(prompt.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)
    whole, more = count(asked, said), count(asked, [{"role": "assistant", "content": answer + longer}])
    same = len(f"{prompt}\n{answer}".encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN
    assert whole[:same] == more[:same]
    assert whole != more or not longer.strip("\0")


def test_how_lengths_are_counted_is_said_without_a_path(tmp_path: Path) -> None:
    assert counted_with(None) == "an estimate of one token per 4 bytes of UTF-8 text, without a tokenizer"
    assert counted_with(ModelSettings(model=str(tmp_path / "policy"))) == "the tokenizer of policy"


@pytest.mark.parametrize(
    "values",
    [
        {"max_prompt_length": 1024},
        {"kinds": []},
        {"kinds": ["kto", "kto"]},
        {"kinds": ["orpo"]},
        {"min_gap": -1},
        {"rows_per_file": 0},
        {"gap": 1},
    ],
)
def test_bad_settings_are_refused(values):
    with pytest.raises(ValidationError):
        DatasetsConfig(**values)


# --- the stage --------------------------------------------------------------------------------------------------------


def test_other_template_arguments_make_other_rows():
    """Lengths are counted under the policy's template with its arguments, and limits leave rows out by them."""

    def rows_of(**model) -> Stage:
        read = [Stage(name, WholeWork(lambda given: {}), {}) for name in ("prompts", "candidates", "judge", "gate")]
        asked, answers, verdicts, decisions = read
        policy = ModelSettings(model=model_path("pocket:policy"), **model)
        return dataset_rows(CONFIG, JUDGES, policy, asked, answers, [verdicts], decisions)

    marks = [
        rows_of(**model).fingerprint
        for model in ({}, {"chat_template_args": {}}, {"chat_template_args": {"enable_thinking": True}})
    ]
    assert len(set(marks)) == 3
    # How the model is served changes no length.
    assert rows_of(dtype="float32", seed=7, max_model_len=64).fingerprint == marks[0]


def test_texts_that_were_cut_off_are_counted():
    """K4.1"""
    world = ended(make_world({"q": [GOOD, BAD, FAIR], "r": [GOOD]}), "length", "stop", "content_filter", "stop")
    rows, counts = kto(world)
    assert [(r["label"], counts["cut_off"]) for r in rows] == [(False, 2), (True, 2)]
    pairs, counts = dpo(world)
    assert (pairs, counts["cut_off"], counts["dropped"]["no_desirable"]) == ([], 2, 1)


# --- equal answers ----------------------------------------------------------------------------------------------------


def test_the_same_answer_twice_is_one_row_with_a_count():
    """K5.4"""
    again: Planted = ("a  good\nanswer", (9, 9, 9), False)
    world = make_world({"q": [("a  good\nanswer", (9, 9, 9), False), again, again, BAD, BAD], "other": [GOOD, GOOD]})
    rows, counts = kto(world)
    assert [(r["label"], r["copies"]) for r in rows] == [(True, 3), (False, 2), (True, 2)]
    assert counts["dropped"] == {"empty_response": 0, "contradictory": 0, "repeated": 4, "prompt_too_long": 0}
    assert counts["kept"] + sum(counts["dropped"].values()) == 7
    ids = world.candidates.filter(pc.equal(world.candidates["response"], again[0]))["candidate_id"].to_pylist()
    assert rows[0]["candidate_id"] == min(ids)
    arguments = (world.prompts, world.candidates, world.verdicts, decisions_of(world), CONFIG, count_words)
    for every, left_out in ((False, 0), (True, 1)):
        table, found = dpo_rows(*arguments, every)
        assert (table.num_rows, found["repeated_responses"]) == (1, left_out)
        assert table["copies"].to_pylist() == [1 + left_out]
    times = {name: 5 for name in world.candidates["candidate_id"].to_pylist()}
    assert dpo_rows(*arguments, True, times)[0]["copies"].to_pylist() == [10]
    assert kto_rows(*arguments, times=times)[0]["copies"].to_pylist() == [15, 10, 10]


def test_an_answer_with_both_labels_is_in_no_row_and_never_paired_with_itself():
    torn: list[Planted] = [("x", (9, 9, 9), False), ("x ", (2, 2, 2), False)]
    rows, counts = kto(make_world({"q": [*torn, BAD]}))
    assert [r["completion"][0]["content"] for r in rows] == [BAD[0]] and counts["dropped"]["contradictory"] == 2
    assert dpo(make_world({"q": torn}))[1]["dropped"]["equal_text"] == 1


@given(st.lists(st.sampled_from([GOOD, FAIR, BAD, ("b", (9, 9, 9), False), ("b", (1, 1, 1), False)]), min_size=1))
@settings(max_examples=25, deadline=None)
def test_no_two_rows_of_a_prompt_are_equal(answers):
    world = make_world({"q": answers})
    rows, counts = kto(world)
    texts = [r["completion"][0]["content"] for r in rows]
    assert len(texts) == len(set(texts))
    kept = sum(r["copies"] for r in rows)
    assert kept == counts["kept"] + counts["dropped"]["repeated"]
    for every in (False, True):
        arguments = (world.prompts, world.candidates, world.verdicts, decisions_of(world), CONFIG, count_words, every)
        pairs = dpo_rows(*arguments)[0].to_pylist()
        both = [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs]
        assert len(set(both)) == len(both) and all(a != b for a, b in both)
