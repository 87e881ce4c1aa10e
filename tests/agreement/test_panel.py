"""Votes of a panel out of ballots: both orders, debates, and preferences that have nothing to do with quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import beta

from ray_pipeline.agents.jury import MISSING, VOTES
from ray_pipeline.agreement.document import as_document, choosing_half, measure
from ray_pipeline.agreement.measure_settings import JurySettings, MeasureSettings
from ray_pipeline.agreement.panel import family, flips, longer_side, make_panel, own_side
from ray_pipeline.agreement.preference import first_place, preference
from ray_pipeline.agreement.recorded_winrate import versus_rates
from ray_pipeline.stats.bootstrap import Estimate, resample
from ray_pipeline.store.keys import prompt_id, unit_hash
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table


def items(*labels: str | None, **columns: list[Any]) -> pa.Table:
    rows = []
    for n, label in enumerate(labels):
        row = {"item_id": f"i{n}", "prompt_id": f"{n:02x}", "human_label": label, "human_votes": []}
        rows.append({**row, **{name: values[n] for name, values in columns.items()}})
    return to_table(rows, ITEMS)


def ballot(
    item: int, vote: Any, judge: str = "j", strategy: str = "direct", order: str = "ab", voice: str = ""
) -> dict:
    """A ballot by vote ("A"), by scores ((8, 3)) or unread (None)."""
    scores = vote if isinstance(vote, tuple) else (None, None)
    if isinstance(vote, tuple):
        vote = "A" if vote[0] > vote[1] else "B" if vote[1] > vote[0] else "tie"
    return {
        "item_id": f"i{item}", "prompt_id": f"{item:02x}", "strategy": strategy, "judge": judge, "voice": voice,
        "order": order, "score_a": scores[0], "score_b": scores[1], "vote": vote, "reason": None,
        "parse_status": "ok" if vote else "unparsed", "raw": None,
    }  # fmt: skip


def ballots(*rows: dict[str, Any]) -> pa.Table:
    return to_table(list(rows), BALLOTS)


def named(codes: Any) -> list[str | None]:
    return [None if code == MISSING else VOTES[code] for code in codes]


def test_items_and_ballots_meet_by_id_in_any_order() -> None:
    rows = [ballot(2, "B"), ballot(0, "A"), ballot(1, None)]
    for shuffled in (rows, rows[::-1]):
        panel = make_panel(items("A", "B", "tie", "A"), ballots(*shuffled))
        (judge,) = panel.evaluators
        assert named(judge.votes) == ["A", None, "B", None]
        assert judge.statuses == {"absent": 1, "ok": 2, "unparsed": 1}
    with pytest.raises(ValueError, match="two rows of i0 / direct / j / ab"):
        make_panel(items("A"), ballots(ballot(0, "A"), ballot(0, "B")))
    with pytest.raises(ValueError, match="unknown item 'i1'"):
        make_panel(items("A"), ballots(ballot(1, "A")))


@pytest.mark.parametrize(
    ("conflict", "expected"),
    [("tie", ["A", "tie", "tie", None]), ("given", ["A", "A", "A", None]), ("mean", ["A", "B", "A", None])],
)
def test_both_orders_become_one_vote(conflict: Any, expected: list[str | None]) -> None:
    given = [(8, 3), (8, 7), (8, 7), (8, 3)]
    swapped: list[Any] = [(7, 3), (2, 9), (5, 5), None]
    rows = [ballot(n, v, strategy="combined_10") for n, v in enumerate(given)]
    rows += [ballot(n, v, strategy="combined_10", order="ba") for n, v in enumerate(swapped)]
    (judge,) = make_panel(items("A", "A", "A", "A"), ballots(*rows), conflict).evaluators
    assert named(judge.votes) == expected
    flipped = flips(judge)
    assert flipped is not None
    assert flipped[0].tolist() == [False, True, False, False] and flipped[1].tolist() == [True, True, True, False]
    assert flips(make_panel(items("A"), ballots(ballot(0, "A"))).evaluators[0]) is None


def test_debates_by_mean_and_by_vote() -> None:
    voices = {"critic": [(1, 9), (8, 3)], "public": [(7, 6), (8, 3)], "psychologist": [(7, 6), None]}
    rows = [ballot(n, v, strategy="debate", voice=role) for role, votes in voices.items() for n, v in enumerate(votes)]
    table = items("A", "A")
    assert named(make_panel(table, ballots(*rows)).evaluators[0].votes) == ["B", None]
    panel = make_panel(table, ballots(*rows), debate_rule="vote")
    assert named(panel.evaluators[0].votes) == ["A", None] and set(panel.voices["j"]) == set(voices)
    document = measure(table, ballots(*rows), MeasureSettings(draws=100))
    (debate,) = document.debates
    assert document.judges == [] and debate.rule == "mean" and set(debate.voices) == set(voices)
    assert debate.judged.agreement.missing == 1


def two_orders(*given: tuple[tuple[int, int], tuple[int, int]]) -> list[dict[str, Any]]:
    """Ballots of a debate on one item: each voice's scores in the given and in the swapped order."""
    return [
        ballot(0, scores, strategy="debate", voice=f"voice-{n}", order=order)
        for n, both in enumerate(given)
        for order, scores in zip(("ab", "ba"), both, strict=True)
    ]


def test_each_order_of_a_debate_is_pooled_by_the_rule_and_then_both_by_the_rule_for_conflict() -> None:
    # By means A wins the given order (9 to 1) and B the swapped one (4 to 5); over both orders A would win.
    rows, table = two_orders(((9, 1), (4, 5)), ((9, 1), (4, 5)), ((9, 1), (4, 5))), items("A")
    for conflict, expected in (("tie", "tie"), ("given", "A"), ("mean", "A")):
        (debate,) = make_panel(table, ballots(*rows), conflict).evaluators  # type: ignore[arg-type]
        assert named(debate.votes) == [expected]
        flipped = flips(debate)
        assert flipped is not None and flipped[0].tolist() == [True]


def test_the_flip_of_a_debate_is_by_the_rule_that_pools_it() -> None:
    # Two of three voices always hold A best; by means the third turns the swapped order.
    rows, table = two_orders(((6, 5), (6, 5)), ((6, 5), (6, 5)), ((9, 2), (0, 9))), items("A")
    for rule, votes, flipped in (("vote", ["A"], False), ("mean", ["tie"], True)):
        (debate,) = make_panel(table, ballots(*rows), debate_rule=rule).evaluators  # type: ignore[arg-type]
        found = flips(debate)
        assert named(debate.votes) == votes and found is not None and found[0].tolist() == [flipped]
    document = measure(table, ballots(*rows), MeasureSettings(draws=100))
    (debate_,) = document.debates
    assert debate_.judged.flip_rate.value == 1 and debate_.judged.agreement.vote_counts["tie"] == 1
    # The other rule is applied in the same way.
    by_vote = measure(table, ballots(*rows), MeasureSettings(draws=100, debate="vote"))
    assert by_vote.debates[0].judged.flip_rate.value == 0
    without = [row for row in rows if (row["voice"], row["order"]) != ("voice-1", "ba")]
    assert named(make_panel(table, ballots(*without)).evaluators[0].votes) == [None]


def test_families() -> None:
    assert [family(n) for n in ("GPT-4o", "gpt-3.5-turbo", "meta-llama/Llama-3.1-8B", "7b", None, "")] == [
        "gpt", "gpt", "llama", "7b", None, None,
    ]  # fmt: skip
    kin = {"llama": ["vicuna", "llama"], "gpt": ["gpt", "chatgpt"]}
    assert [family(n, kin) for n in ("vicuna-13b", "ChatGPT", "gemma-2")] == ["llama", "gpt", "gemma"]


def test_preference_for_the_longer_and_for_the_own_family() -> None:
    table = items(
        "A", "B", "A", "tie",
        response_a=["long long", "x", "same", "long long"], response_b=["x", "long long", "sane", "x"],
        model_a=["gpt-3.5", "gpt-3.5", "vicuna", "gpt-4"], model_b=["vicuna", "vicuna", "gpt-3.5", "gpt-3.5"],
    )  # fmt: skip
    rows = [ballot(0, "A", "GPT-4o"), ballot(1, "B", "GPT-4o"), ballot(2, "A", "GPT-4o"), ballot(3, "A", "GPT-4o")]
    panel = make_panel(table, ballots(*rows))
    (judge,) = panel.evaluators
    draws = resample(range(4), 200, 0)
    assert named(longer_side(panel)) == ["A", "B", None, "A"]
    longer = preference(judge.votes, panel.labels, longer_side(panel), draws)
    assert longer is not None and (longer.items, longer.share.value, longer.human.value) == (3, 1.0, 1.0)
    assert longer.bias.value == 0.0
    assert named(own_side(panel, "gpt")) == ["A", "A", "B", None]  # two of the family are no side
    own = preference(judge.votes, panel.labels, own_side(panel, "gpt"), draws)
    assert own is not None and (own.items, own.share.value) == (3, pytest.approx(1 / 3))
    unlabelled = preference(judge.votes, np.full(4, MISSING, dtype=np.int8), longer_side(panel), draws)
    assert unlabelled is not None and unlabelled.bias.value is None
    assert preference(judge.votes, panel.labels, own_side(panel, "gemma"), draws) is None


def test_preference_for_the_first_place() -> None:
    labels = np.array([0, 2, 0, 2], dtype=np.int8)
    always_first = np.zeros(4, dtype=np.int8)  # A in the given order
    draws = resample(range(4), 200, 0)
    one = first_place(always_first, None, labels, draws)
    assert one is not None and (one.share.value, one.human.value, one.bias.value) == (1.0, 0.5, 0.5)
    both = first_place(always_first, np.full(4, 2, dtype=np.int8), labels, draws)  # and B in the swapped one
    assert both is not None and (both.share.value, both.bias.value, both.items) == (1.0, 0.5, 4)
    fair = first_place(labels, labels, labels, draws)
    assert fair is not None and fair.bias.value == 0.0
    swapped_only = first_place(None, labels, labels, draws)
    assert swapped_only is not None and swapped_only.share.value == 0.5


# --- the whole document -----------------------------------------------------------------------------------------------


def small(judges: int = 3) -> tuple[pa.Table, pa.Table]:
    truth = ["A", "B", "tie", "A", "B", "A", "B", "A"]
    rows = []
    for j in range(judges):
        for n, label in enumerate(truth):
            said = label if (n + j) % 3 else "A"
            score = {"A": (8, 3), "B": (3, 8), "tie": (5, 5)}[said]
            rows.append(ballot(n, score, f"judge-{j}", "combined_10"))
    return items(*truth), ballots(*rows)


def test_the_document_of_a_panel() -> None:
    table, votes = small()
    found = as_document(measure(table, votes, MeasureSettings(draws=100)), MeasureSettings(draws=100), {"data": "x"})
    assert (found["items"], found["labelled"], found["label_counts"]) == (8, 8, {"A": 4, "tie": 1, "B": 3})
    assert [j["jury"] for j in found["juries"]] == [
        ["judge-0", "judge-1"], ["judge-0", "judge-2"], ["judge-1", "judge-2"], ["judge-0", "judge-1", "judge-2"],
    ]  # fmt: skip
    assert {"n", "kappa", "kappa_interval", "vote_counts", "missing"} <= set(found["judges"][0])
    # Three judges with each other, and the jury of all with each of them.
    assert len(found["paired"]) == 6 and len(found["held_out"]) == 1 and found["humans"] is None
    among = found["among_judges"][0]
    assert among["kappas"][0][0] == 1.0 and among["kappas"][0][1] == pytest.approx(among["kappas"][1][0])
    low, high = among["intervals"][0][1]
    assert low <= among["kappas"][0][1] <= high
    again = as_document(measure(table, votes, MeasureSettings(draws=100)), MeasureSettings(draws=100), {"data": "x"})
    assert again == found


def test_judges_of_a_strategy_and_strategies_of_a_judge_are_paired() -> None:
    table, votes = small(2)
    rows = [*votes.to_pylist(), *({**row, "strategy": "combined_5"} for row in votes.to_pylist())]
    found = measure(table, ballots(*rows), MeasureSettings(draws=100)).paired
    assert {(p.first, p.second) for p in found} == {
        ("combined_10: judge-0 + judge-1", "combined_10: judge-0"),
        ("combined_10: judge-0 + judge-1", "combined_10: judge-1"),
        ("combined_10: judge-0", "combined_10: judge-1"),
        ("combined_5: judge-0 + judge-1", "combined_5: judge-0"),
        ("combined_5: judge-0 + judge-1", "combined_5: judge-1"),
        ("combined_5: judge-0", "combined_10: judge-0"),
        ("combined_5: judge-0", "combined_5: judge-1"),
        ("combined_5: judge-1", "combined_10: judge-1"),
    }


def test_rules_of_juries() -> None:
    table, votes = small()
    for rules in (
        {"pool": "mean"},
        {"pool": "median", "sizes": [3]},
        {"pool": "weighted_mean", "weights": {"judge-0": 1, "judge-1": 2, "judge-2": 3}},
        {"pool": "weighted", "weights": {"judge-0": 1, "judge-1": 1, "judge-2": 9}},
    ):
        document = measure(table, votes, MeasureSettings(draws=100, juries=JurySettings(**rules)))  # type: ignore[arg-type]
        assert len(document.juries) == (1 if "sizes" in rules else 4)
        if rules["pool"] == "weighted":
            third = next(j for j in document.judges if j.judge == "judge-2")
            assert document.juries[-1].agreement.kappa == third.agreement.kappa
    with pytest.raises(ValueError, match=r"juries\.most is 3"):
        measure(table, votes, MeasureSettings(draws=100, juries=JurySettings(most=3)))
    with pytest.raises(ValueError, match="no weight for judge-1, judge-2"):
        rules = JurySettings(pool="weighted", weights={"judge-0": 1})
        measure(table, votes, MeasureSettings(draws=100, juries=rules))
    with pytest.raises(ValueError, match="pools scores, and direct has none"):
        direct = ballots(ballot(0, "A", "x"), ballot(0, "A", "y"))
        measure(items("A"), direct, MeasureSettings(draws=100, juries=JurySettings(pool="mean")))
    for wrong in (
        {"pool": "weighted"},
        {"weights": {"a": 1}},
        {"sizes": [0]},
        {"pool": "weighted", "weights": {"a": -1}},
    ):
        with pytest.raises(ValueError, match="juries"):
            JurySettings(**wrong)  # type: ignore[arg-type]


def test_win_rates_count_strict_wins_over_everything() -> None:
    votes = ["A", "A", "B", "tie", None]
    rows = [ballot(n, v, "x-y-vs-gpt", "versus") for n, v in enumerate(votes)]
    rows += [ballot(0, "A", "solo", "versus")]
    table = items(*[None] * 6)
    whole, solo = sorted(versus_rates(table, ballots(*rows), draws=100), key=lambda r: -r.n)
    assert (whole.configuration, whole.baseline) == ("x-y", "gpt")
    assert (whole.n, whole.wins, whole.ties, whole.losses, whole.missing) == (5, 2, 1, 1, 1)
    assert whole.win_rate.value == 40.0 and whole.half_tie_rate == 50.0 and whole.bounds == (40.0, 60.0)
    assert (solo.n, solo.win_rate.value, solo.baseline) == (1, 100.0, None)


def test_the_own_family_is_that_of_the_model_and_not_of_a_name_that_says_nothing() -> None:
    table = items("A", "B", "A", "B", model_a=["qwen-7b"] * 4, model_b=["llama-2"] * 4)
    votes = ballots(*(ballot(n, "A", judge="judge-1") for n in range(4)))
    settings = MeasureSettings(draws=100)
    (unknown,) = measure(table, votes, settings).bias
    assert unknown.own_family is None and unknown.model is None
    (known,) = measure(table, votes, settings, {"judge-1": "Qwen/Qwen3-8B"}).bias
    assert known.own_family is not None and known.own_family.items == 4
    assert known.own_family.share.value == 1.0 and known.own_family.bias.value == 0.5
    (own,) = as_document(measure(table, votes, settings, {"judge-1": "Qwen/Qwen3-8B"}), settings, {})["bias"]
    assert own["model"] == "Qwen/Qwen3-8B"


def test_a_debates_voices_and_its_other_rule_have_intervals() -> None:
    labels = ["A", "B", "A", "tie", "B", "A", "B", "A"]
    scores = {"A": (8, 3), "B": (3, 8), "tie": (5, 5)}
    rows = [
        ballot(n, scores["A" if n % 4 == 1 or (n + shift) % 5 == 0 else label], "j", "debate", voice=voice)
        for n, label in enumerate(labels)
        for shift, voice in enumerate(("critic", "public", "third"))
    ]
    settings = MeasureSettings(draws=200)
    (debate,) = as_document(measure(items(*labels), ballots(*rows), settings), settings, {})["debates"]
    spans = [(debate["other_rule_kappa"], debate["other_rule_kappa_interval"])]
    spans += [(voice["kappa"], voice["kappa_interval"]) for voice in debate["voices"].values()]
    for value, (low, high) in spans:
        assert low <= value <= high and low < high


def test_every_interval_is_of_the_confidence_that_is_asked_for() -> None:
    table, votes = small()
    narrow, wide = (
        measure(table, votes, MeasureSettings(draws=400, confidence=confidence)) for confidence in (0.5, 0.99)
    )
    for of in (
        lambda d: d.paired[0].difference,
        lambda d: d.bias[0].first.share,
        lambda d: d.among_judges[0].alpha,
        lambda d: d.judges[0].agreement.estimates["kappa"],
    ):
        inner, outer = of(narrow), of(wide)
        assert inner.value == outer.value and outer.low <= inner.low <= inner.high <= outer.high
        assert outer.high - outer.low > inner.high - inner.low


def test_items_of_a_question_are_resampled_together() -> None:
    """Twelve questions with two turns and two pairs of models each: four equal items say no more than one."""
    labels = ["A" if n % 3 else "tie" for n in range(12)]
    said = ["B" if n % 4 == 0 else label for n, label in enumerate(labels)]

    def kappa_and_accuracy(times: int) -> list[Estimate]:
        texts = [text for n in range(12) for text in (f"q{n}", f"[turn 1]\nq{n}\n\n[turn 2]\nGo on.") * 2][
            :: 4 // times
        ]
        ids = [f"i{n:02}" for n in range(12 * times)]
        table = items(
            *np.repeat(labels, times).tolist(),
            item_id=ids,
            question=texts,
            prompt_id=[prompt_id([{"role": "user", "content": text}]) for text in texts],
        )
        votes = [
            {**ballot(0, vote), "item_id": i} for i, vote in zip(ids, np.repeat(said, times).tolist(), strict=True)
        ]
        found = measure(table, ballots(*votes), MeasureSettings(draws=300)).judges[0].agreement
        assert found.n == 12 * times
        return [found.estimates[name] for name in ("kappa", "accuracy")]

    for one, four in zip(kappa_and_accuracy(1), kappa_and_accuracy(4), strict=True):
        assert one.low is not None and one.low < one.value  # type: ignore[operator]
        assert (four.value, four.low, four.high) == pytest.approx((one.value, one.low, one.high))


def test_a_question_is_on_one_side_of_the_held_out_choice() -> None:
    """K7.3: an item tells about the others of its question, so none of them may be held out from the choice alone."""
    texts = [f"q{n // 4}" for n in range(80)]
    ids = [prompt_id([{"role": "user", "content": text}]) for text in texts]
    table = items(*["A"] * 80, item_id=[f"i{n:02}" for n in range(80)], question=texts, prompt_id=ids)
    rules = MeasureSettings()
    sides = choosing_half(make_panel(table, ballots()), rules)
    assert all(len(set(sides[n : n + 4])) == 1 for n in range(0, 80, 4)) and 20 <= sides.sum() <= 60
    # With one item a question the halves are those of the items.
    alone = items(*["A"] * 40, prompt_id=[f"{n:032x}" for n in range(40)], question=[f"q{n}" for n in range(40)])
    panel = make_panel(alone, ballots())
    hashes = [unit_hash("held-out", rules.seed, item) for item in panel.item_ids]
    assert choosing_half(panel, rules).tolist() == [each < rules.held_out for each in hashes]


def test_win_rates_resample_prompts_and_are_exact_where_all_are_won() -> None:
    runs = [ballot(n, vote, "x-vs-y", "versus") for n, vote in enumerate(["A"] * 6)]
    mixed = [ballot(n, "A" if n < 4 else "B", "x-vs-z", "versus") for n in range(6)]
    table = items(*[None] * 6, prompt_id=["p", "p", "q", "q", "r", "r"])
    won, part = versus_rates(table, ballots(*runs, *mixed), draws=500)
    assert (won.win_rate.value, won.win_rate.high) == (100, 100)
    assert won.win_rate.low == pytest.approx(100 * beta.ppf(0.025, 3, 1))  # three prompts, all won
    # Of three prompts, each won or lost as a whole, one in 3.4 samples has none or only the lost one.
    assert part.win_rate.value == pytest.approx(200 / 3) and (part.win_rate.low, part.win_rate.high) == (0, 100)
