"""The gate against the formulas of docs/architecture.md, written out row by row."""

import random
import statistics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_pipeline.data.gate import GateConfig, decide, label_counts, mean_and_variance
from ray_pipeline.data.rows import KeyMismatch
from ray_pipeline.store.schemas import CANDIDATES, CRITIQUES, DECISIONS, PARSE_STATUSES, VERDICTS
from tests.planted import JUDGES, Planted, ended, make_world, random_world


def gate_of(*answers: Planted, config: GateConfig | None = None, judges: list[str] = JUDGES) -> list[dict]:
    world = make_world({"question": list(answers)}, judges)
    table = decide(world.candidates, world.verdicts, world.critiques, judges, config or GateConfig())
    assert table.schema.equals(DECISIONS)
    assert table["candidate_id"].to_pylist() == world.candidates["candidate_id"].to_pylist()
    return table.to_pylist()


@pytest.mark.parametrize(
    ("scores", "flawed", "label", "why"),
    [
        ((8, 7, 7), False, "desirable", "final 7.33 ≥ 7"),
        ((7, 7, 7), False, "desirable", "final 7.00 ≥ 7"),
        ((7, 7, 7), True, "discard", "final 5.95 between 4 and 7"),
        ((4, 4, 4), False, "undesirable", "final 4.00 ≤ 4"),
        ((4, 5, 4), False, "discard", "final 4.33 between 4 and 7"),
        ((4, 5, 4), True, "undesirable", "final 3.68 ≤ 4"),
        ((10, 10, 1), False, "abstain", "variance 27.00 > 2.5"),
        ((9, 6, 9), False, "abstain", "variance 3.00 > 2.5"),
        ((9, 7, 9), False, "desirable", "final 8.33 ≥ 7"),
        ((9, None, 9), False, "incomplete", "unread: factuality"),
        ((None, 9, None), None, "incomplete", "unread: helpfulness, conciseness"),
        ((9, 9, 9), None, "incomplete", "critique unread"),
        ((10, 10, 1), None, "abstain", "variance 27.00 > 2.5"),  # disagreement is asked before the critique
    ],
)
def test_label_and_reason(scores, flawed, label, why):
    row = gate_of(("answer", scores, flawed))[0]
    assert (row["label"], row["why"]) == (label, why)


CUT = ("length", "content_filter", "tool_calls", "abort", "max_output_tokens")


@pytest.mark.parametrize("reason", CUT)
@pytest.mark.parametrize(
    ("cut", "labels"),
    [
        ("exclude", ["incomplete"] * 5),
        ("undesirable", ["incomplete", "undesirable", "discard", "abstain", "incomplete"]),
        ("keep", ["desirable", "undesirable", "discard", "abstain", "incomplete"]),
    ],
)
def test_a_text_that_was_cut_off_is_never_desirable_unless_the_user_wants_it(reason, cut, labels):
    """K4.1"""
    scores = [(9, 9, 9), (2, 2, 2), (5, 6, 5), (1, 10, 10), (None, 2, 2)]
    world = ended(make_world({"q": [(f"answer {i}", own, False) for i, own in enumerate(scores)]}), reason)
    table = decide(world.candidates, world.verdicts, world.critiques, JUDGES, GateConfig(cut=cut))
    assert table["label"].to_pylist() == labels
    first = table["why"][0].as_py()
    assert first == ("final 9.00 ≥ 7" if cut == "keep" else f"cut off: {reason}")
    assert table["final_score"].to_pylist()[:2] == [9.0, 2.0]


def test_a_whole_text_and_a_table_without_finish_reasons_are_as_before():
    world = make_world({"q": [("a", (9, 9, 9), False), ("b", (2, 2, 2), False), ("c", (9, 9, 9), False)]})
    for candidates in (ended(world, "stop", "unknown", "refusal").candidates, world.candidates.drop(["finish_reason"])):
        table = decide(candidates, world.verdicts, world.critiques, JUDGES, GateConfig())
        assert table["label"].to_pylist() == ["desirable", "undesirable", "desirable"]


def test_numbers_are_null_when_they_cannot_be_computed():
    unread, uncriticised, whole = gate_of(("a", (9, None, 9), True), ("b", (9, 8, 7), None), ("c", (9, 8, 7), True))
    numbers = ("mean_score", "score_variance", "penalty", "final_score")
    assert [unread[n] for n in numbers] == [None, None, 0.15, None]
    assert [uncriticised[n] for n in numbers] == [8.0, 1.0, None, None]
    assert [whole[n] for n in numbers] == [8.0, 1.0, 0.15, 8 * (1 - 0.15)]


def test_a_variance_of_exactly_tau_does_not_abstain():
    judges = ["a", "b"]
    row = gate_of(("x", (5, 8), False), judges=judges, config=GateConfig(tau=4.5))[0]
    assert (row["score_variance"], row["label"]) == (4.5, "discard")


def test_every_integer_triple_has_the_exact_variance():
    triples = np.array([[a, b, c] for a in range(1, 11) for b in range(1, 11) for c in range(1, 11)], dtype=float)
    means, variances = mean_and_variance(triples)
    assert means.tolist() == [statistics.mean(t) for t in triples.tolist()]
    assert variances.tolist() == [statistics.variance(t) for t in triples.tolist()]


def test_a_single_judge_has_no_variance():
    row = gate_of(("x", (9,), False), judges=["only"])[0]
    assert (row["score_variance"], row["label"]) == (0.0, "desirable")


def test_ablations():
    answer: Planted = ("x", (10, 10, 4), None)
    assert gate_of(answer)[0]["label"] == "abstain"
    assert gate_of(answer, config=GateConfig(use_variance=False))[0]["why"] == "critique unread"
    row = gate_of(answer, config=GateConfig(use_variance=False, use_critic=False))[0]
    assert (row["label"], row["penalty"], row["final_score"]) == ("desirable", 0.0, 8.0)

    world = make_world({"q": [("x", (9, 9, 9), True)]})
    table = decide(world.candidates, world.verdicts, None, JUDGES, GateConfig(use_critic=False))
    assert table["label"].to_pylist() == ["desirable"]


def test_the_reason_never_contradicts_the_label():
    row = gate_of(("x", (6.998,), False), judges=["only"])[0]
    assert (row["label"], row["why"]) == ("discard", "final 6.998 between 4 and 7")


@pytest.mark.parametrize("status", [s for s in PARSE_STATUSES if s not in ("ok", "repaired")])
def test_an_unread_status_is_unread_even_beside_a_number(status):
    """Design §6.1: −1, 0 or 5.0 beside a status that says `unparsed` is not a score."""
    world = make_world({"q": [("x", (9, 9, 9), False)]})
    rows = world.verdicts.to_pylist()
    rows[1].update(parse_status=status, score=5.0)
    verdicts = pa.Table.from_pylist(rows, schema=VERDICTS)
    assert decide(world.candidates, verdicts, world.critiques, JUDGES, GateConfig())["why"].to_pylist() == [
        "unread: factuality"
    ]


def test_a_repaired_score_is_read_and_a_missing_verdict_is_not():
    world = make_world({"q": [("x", (9, 9, 9), False)]})
    rows = world.verdicts.to_pylist()
    rows[0]["parse_status"] = "repaired"
    verdicts = pa.Table.from_pylist(rows, schema=VERDICTS)
    read = decide(world.candidates, verdicts, world.critiques, JUDGES, GateConfig())
    assert read["label"].to_pylist() == ["desirable"]
    lost = decide(world.candidates, verdicts.slice(0, 2), world.critiques, JUDGES, GateConfig())
    assert lost["why"].to_pylist() == ["unread: conciseness"]


def test_other_judges_are_left_out():
    world = make_world({"q": [("x", (9, 9, 1), False)]})
    table = decide(world.candidates, world.verdicts, world.critiques, JUDGES[:2], GateConfig())
    assert table["final_score"].to_pylist() == [9.0]


def test_one_bad_row_does_not_move_the_others():
    """Design §6.14: one lost verdict used to shift every label after it."""
    world = random_world(20, seed=1)
    before = decide(world.candidates, world.verdicts, world.critiques, JUDGES, GateConfig()).to_pylist()
    verdicts = pa.concat_tables([world.verdicts.slice(0, 7), world.verdicts.slice(8)])
    hit = world.verdicts["candidate_id"][7].as_py()
    after = decide(world.candidates, verdicts, world.critiques.slice(1), JUDGES, GateConfig()).to_pylist()
    first = world.critiques["candidate_id"][0].as_py()
    changed = [a["candidate_id"] for a, b in zip(after, before, strict=True) if a != b]
    assert set(changed) <= {hit, first}
    assert next(a for a in after if a["candidate_id"] == hit)["label"] == "incomplete"


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_joins_survive_any_order_of_rows(seed):
    world = random_world(6, seed=5)
    mixed = world.shuffled(seed)
    expected = decide(world.candidates, world.verdicts, world.critiques, JUDGES, GateConfig()).to_pylist()
    found = decide(mixed.candidates, mixed.verdicts, mixed.critiques, JUDGES, GateConfig()).to_pylist()
    assert [r["candidate_id"] for r in found] == mixed.candidates["candidate_id"].to_pylist()
    assert sorted(found, key=lambda r: r["candidate_id"]) == sorted(expected, key=lambda r: r["candidate_id"])


SCORE = st.one_of(st.none(), st.integers(1, 10), st.floats(1, 10, allow_nan=False).map(lambda x: round(x, 3)))


def reference(scores, flawed, config):
    """Design §5, one row at a time."""
    mean = variance = final = None
    if None not in scores:
        mean = sum(scores) / len(scores)
        variance = statistics.variance(scores) if len(scores) > 1 else 0.0
    penalty = 0.0 if not config.use_critic else None if flawed is None else config.alpha * flawed
    if mean is not None and penalty is not None:
        final = mean * (1 - penalty)
    if mean is None:
        label = "incomplete"
    elif config.use_variance and variance > config.tau:
        label = "abstain"
    elif penalty is None:
        label = "incomplete"
    elif final >= config.desirable_at:
        label = "desirable"
    elif final <= config.undesirable_at:
        label = "undesirable"
    else:
        label = "discard"
    return mean, variance, penalty, final, label


@given(
    data=st.data(),
    judges=st.integers(1, 5),
    rows=st.integers(0, 12),
    config=st.builds(
        GateConfig, alpha=st.floats(0, 1), tau=st.sampled_from([0.0, 1.0, 2.5, 4.5, 20.0]),
        use_variance=st.booleans(), use_critic=st.booleans(),
    ),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_gate_is_the_formula(data, judges, rows, config, seed):
    names = [f"judge {j}" for j in range(judges)]
    answers: list[Planted] = [
        (
            "answer",
            data.draw(st.lists(SCORE, min_size=judges, max_size=judges)),
            data.draw(st.sampled_from([None, True, False])),
        )
        for _ in range(rows)
    ]
    world = make_world({"question": answers}, names)
    mixed = world.shuffled(seed)
    found = decide(world.candidates, mixed.verdicts, mixed.critiques, names, config).to_pylist()
    for row, (_, scores, flawed) in zip(found, answers, strict=True):
        mean, variance, penalty, final, label = reference(scores, flawed, config)
        for name, value in (
            ("mean_score", mean), ("score_variance", variance), ("penalty", penalty), ("final_score", final)
        ):  # fmt: skip
            assert (row[name] is None) == (value is None)
            assert value is None or row[name] == pytest.approx(value, abs=1e-9)
        near_tau = variance is not None and 0 < abs(variance - config.tau) < 1e-9
        near_edge = final is not None and any(0 < abs(final - t) < 1e-9 for t in (4.0, 7.0))
        assert row["label"] == label or near_tau or near_edge


@pytest.mark.parametrize("table", ["candidates", "verdicts", "critiques"])
def test_a_row_that_is_there_twice_is_named(table):
    world = random_world(3, seed=2)
    setattr(world, table, pa.concat_tables([getattr(world, table), getattr(world, table).slice(4, 1)]))
    twice = getattr(world, table)["candidate_id"][4].as_py()
    with pytest.raises(KeyMismatch, match=f"(?s){table}.*{twice}"):
        decide(world.candidates, world.verdicts, world.critiques, JUDGES, GateConfig())


@pytest.mark.parametrize("table", ["verdicts", "critiques"])
def test_a_row_of_no_candidate_is_named(table):
    world = random_world(3, seed=2)
    lost = world.candidates["candidate_id"][0].as_py()
    with pytest.raises(KeyMismatch, match=lost):
        decide(world.candidates.slice(1), world.verdicts, world.critiques, JUDGES, GateConfig())


def test_wrong_calls():
    world = random_world(1, seed=0)
    with pytest.raises(ValueError, match="no critiques"):
        decide(world.candidates, world.verdicts, None, JUDGES, GateConfig())
    for judges in ([], ["helpfulness", "helpfulness"]):
        with pytest.raises(ValueError, match="judges"):
            decide(world.candidates, world.verdicts, world.critiques, judges, GateConfig())


@pytest.mark.parametrize(
    "values",
    [{"alpha": 1.1}, {"alpha": -0.1}, {"tau": -1}, {"tau": float("inf")}, {"undesirable_at": 7.0}, {"thau": 2.5}],
)
def test_bad_settings_are_refused(values):
    with pytest.raises(ValidationError):
        GateConfig(**values)


def test_empty_shard():
    table = decide(CANDIDATES.empty_table(), VERDICTS.empty_table(), CRITIQUES.empty_table(), JUDGES, GateConfig())
    assert table.num_rows == 0 and table.schema.equals(DECISIONS)
    assert label_counts(table) == dict.fromkeys(("desirable", "undesirable", "discard", "abstain", "incomplete"), 0)


def test_many_rows():
    """50,000 candidates at once, checked against the counts of a plain loop."""
    rng = random.Random(0)
    n = 50_000
    ids = [f"{i:032x}" for i in range(n)]
    scores = [[rng.randint(1, 10) for _ in JUDGES] for _ in range(n)]
    flawed = [rng.random() < 0.3 for _ in range(n)]
    order = rng.sample(range(3 * n), 3 * n)
    candidates = pa.table({"candidate_id": ids, "prompt_id": ids})
    verdicts = pa.table(
        {
            "candidate_id": [ids[i // 3] for i in order],
            "judge": [JUDGES[i % 3] for i in order],
            "score": [float(scores[i // 3][i % 3]) for i in order],
            "parse_status": ["ok"] * (3 * n),
        }
    )
    critiques = pa.table({"candidate_id": ids, "flawed": flawed, "parse_status": ["ok"] * n})
    found = decide(candidates, verdicts, critiques, JUDGES, GateConfig())
    sample = range(0, n, 97)
    expected = [reference(scores[i], flawed[i], GateConfig())[4] for i in sample]
    assert [found["label"][i].as_py() for i in sample] == expected
    assert sum(label_counts(found).values()) == n
