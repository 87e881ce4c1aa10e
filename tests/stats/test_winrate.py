from itertools import product

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.stats.protocol import Protocol, fixed_fields, measured_by
from ray_pipeline.stats.winrate import choice_to_vote, completed_protocol, decide_pairs, win_rate, win_rates

CHOICES = ("A", "B", "C", None)
PAIRS = st.lists(st.tuples(st.sampled_from(CHOICES), st.sampled_from(CHOICES)), min_size=1, max_size=25)


def table(pairs: list, judge: str = "j") -> pa.Table:
    """One pair per (choice in order ab, choice in order ba), two pairs per prompt."""
    return pa.Table.from_pylist(
        [
            {
                "pair_id": f"x{i:02d}",
                "prompt_id": f"p{i // 2}",
                "judge": judge,
                "order": order,
                "choice": choice,
                "parse_status": "unparsed" if choice is None else "ok",
            }
            for i, pair in enumerate(pairs)
            for order, choice in zip(("ab", "ba"), pair, strict=True)
        ],
        schema=pa.schema(
            [(c, pa.string()) for c in ("pair_id", "prompt_id", "judge", "order", "choice", "parse_status")]
        ),
    )


def swap_models(comparisons: pa.Table) -> pa.Table:
    """The same verdicts with policy and base exchanged: what stood first for one is order "ba" for the other."""
    orders = ["ba" if order == "ab" else "ab" for order in comparisons.column("order").to_pylist()]
    return comparisons.set_column(comparisons.schema.get_field_index("order"), "order", pa.array(orders))


def test_choices_name_models() -> None:
    assert [choice_to_vote(c, "ab") for c in "ABC"] == ["policy", "base", "tie"]
    assert [choice_to_vote(c, "ba") for c in "ABC"] == ["base", "policy", "tie"]
    with pytest.raises(ValueError, match="choice"):
        choice_to_vote("a", "ab")
    with pytest.raises(ValueError, match="order"):
        choice_to_vote("A", "AB")


def test_every_pair_of_choices() -> None:
    outcomes = {p: decide_pairs(table([p]), "j")[0] for p in product(CHOICES, CHOICES)}
    assert {p for p, d in outcomes.items() if d.outcome == "win"} == {("A", "B")}
    assert {p for p, d in outcomes.items() if d.outcome == "loss"} == {("B", "A")}
    assert {p for p, d in outcomes.items() if d.outcome == "unread"} == {p for p in outcomes if None in p}
    assert {p for p, d in outcomes.items() if d.flipped} == {("A", "A"), ("B", "B")}


def test_a_judge_that_always_takes_the_first_answer_finds_only_ties() -> None:
    rate = win_rate(table([("A", "A")] * 10))
    assert (rate.win_rate, rate.tie_rate, rate.loss_rate, rate.flip_rate) == (0, 1, 0, 1)
    assert rate.score.mean == 0.5


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_counts_rates_and_bounds(pairs: list) -> None:
    rate = win_rate(table(pairs), draws=40)
    wins, losses = pairs.count(("A", "B")), pairs.count(("B", "A"))
    unread = sum(None in p for p in pairs)
    ties = len(pairs) - wins - losses - unread
    assert (rate.wins, rate.losses, rate.ties, rate.unread) == (wins, losses, ties, unread)
    assert rate.decided == len(pairs) - unread
    if rate.decided:
        assert rate.score.mean == pytest.approx((wins + ties / 2) / rate.decided)
        assert rate.win_rate == pytest.approx(wins / rate.decided)
    else:
        assert rate.win_rate is None and rate.score.mean is None
    # Try every way to fill the unread choices: the bounds are the extremes of the score.
    worst, best = 0.0, 0.0
    for pair in pairs:
        filled = product(*(CHOICES[:3] if choice is None else (choice,) for choice in pair))
        points = [{("A", "B"): 1.0, ("B", "A"): 0.0}.get(f, 0.5) for f in filled]
        worst, best = worst + min(points) / len(pairs), best + max(points) / len(pairs)
    assert (rate.score_worst, rate.score_best) == pytest.approx((worst, best))


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_swapping_the_models_mirrors_everything(pairs: list) -> None:
    one = win_rate(table(pairs), draws=60, seed=3)
    other = win_rate(swap_models(table(pairs)), draws=60, seed=3)
    assert (one.wins, one.ties, one.losses, one.unread) == (other.losses, other.ties, other.wins, other.unread)
    assert one.flips == other.flips
    assert one.score_worst == pytest.approx(1 - other.score_best)  # type: ignore[operator]
    if one.score.mean is not None:
        assert one.score.mean == pytest.approx(1 - other.score.mean)  # type: ignore[operator]
    if one.score.low is not None:
        assert one.score.low == pytest.approx(1 - other.score.high)  # type: ignore[operator]


def test_row_order_does_not_matter() -> None:
    comparisons = table([("A", "B"), ("B", "A"), ("C", "A"), (None, "B"), ("A", "B")])
    backwards = comparisons.take(list(range(len(comparisons)))[::-1])
    assert win_rate(backwards) == win_rate(comparisons)


def test_a_status_that_is_not_read_outweighs_a_choice() -> None:
    rows = table([("A", "B")]).to_pylist()
    rows[0]["parse_status"] = "truncated"
    assert win_rate(pa.Table.from_pylist(rows)).unread == 1


def test_a_missing_order_is_unread() -> None:
    rate = win_rate(table([("A", "B"), ("A", "B")]).slice(0, 3))
    assert (rate.pairs, rate.wins, rate.unread) == (2, 1, 1)
    assert (rate.score_worst, rate.score_best) == (0.75, 1.0)  # the read half says policy: at worst a tie


def test_judges_are_not_pooled() -> None:
    both = pa.concat_tables([table([("A", "B")], "strict"), table([("B", "A")], "kind")])
    assert [(r.judge, r.wins, r.losses) for r in win_rates(both)] == [("kind", 0, 1), ("strict", 1, 0)]
    with pytest.raises(ValueError, match="not pooled; pass judge="):
        win_rate(both)


def test_repeated_rows_are_refused() -> None:
    doubled = pa.concat_tables([table([("A", "B")])] * 2)
    with pytest.raises(ValueError, match="two rows"):
        win_rate(doubled)
    rows = table([("A", "B")]).to_pylist()
    rows[1]["prompt_id"] = "other"
    with pytest.raises(ValueError, match="two different prompt_ids"):
        win_rate(pa.Table.from_pylist(rows))


def test_a_protocol_names_the_prompts_and_the_reference_answers() -> None:
    asked = Protocol("win rate", judge="hub:Qwen/Qwen3-8B@0123456789abcdef", reference="base", answers="greedy")
    compared = table([("A", "B")] * 4)

    def answers(text: str) -> pa.Table:
        rows = [{"prompt_id": f"p{n}", "model": m, "response": f"{m} {text}"} for n in (1, 0) for m in ("base", "x")]
        return pa.Table.from_pylist([*rows, {"prompt_id": "p9", "model": "base", "response": "of no pair"}])

    plain = completed_protocol(asked, compared, "j", answers("one"))
    backwards = compared.take(list(range(7, -1, -1))), "j", answers("one").take([4, 3, 2, 1, 0])
    assert plain == completed_protocol(asked, *backwards)
    prints = {
        plain.fingerprint(),
        completed_protocol(asked, compared, "j", answers("other")).fingerprint(),
        completed_protocol(asked, table([("A", "B")] * 2), "j", answers("one")).fingerprint(),
        completed_protocol(asked, compared, "j").fingerprint(),
        completed_protocol(asked, compared, "j", answers("one"), controlled=True).fingerprint(),
    }
    assert len(prints) == 5
    found = measured_by(plain)
    assert found.name == "win rate, judge Qwen/Qwen3-8B@0123456, reference base"
    assert fixed_fields(found.protocol)["estimator"] == "wins and half the ties"
    assert not {"checker", "metric"} & fixed_fields(found.protocol).keys()
