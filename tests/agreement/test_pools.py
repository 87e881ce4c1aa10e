"""Pools of a whole panel: latent class models against known truth, missing votes, what labels may decide, cascades."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from sklearn.metrics import cohen_kappa_score

from ray_pipeline.agents.jurors import JuryRule, pool_judgements
from ray_pipeline.agents.jury import MISSING, TIE, Codes, pool_votes
from ray_pipeline.agents.strategies import Judgement
from ray_pipeline.agreement.calibrated import UNFITTED
from ray_pipeline.agreement.document import measure
from ray_pipeline.agreement.measure_settings import CalibrationSettings, CascadeSettings, JurySettings, MeasureSettings
from ray_pipeline.agreement.pools import LEVEL, latent_votes, threshold
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table

NAMES = ("A", "tie", "B")
ACCURACIES = (0.92, 0.85, 0.5, 0.5, 0.5)


def panel(items: int, accuracies: tuple[float, ...] = ACCURACIES, missing: float = 0.1) -> tuple[Codes, Codes]:
    """Votes (judges, items) of judges who err independently, and the truth."""
    rng = np.random.default_rng(3)
    truth = rng.choice(3, items, p=[0.45, 0.15, 0.4])
    right = rng.random((len(accuracies), items)) < np.array(accuracies)[:, None]
    votes = np.where(right, truth, (truth + rng.integers(1, 3, right.shape)) % 3)
    votes[rng.random(votes.shape) < missing] = MISSING
    return votes.astype(np.int8), truth.astype(np.int8)


def em(codes: Codes, steps: int = 500) -> Any:
    """Dawid and Skene's EM on single items, with products of probabilities; shape (items, 3)."""
    given = (codes.T[:, :, None] == np.arange(3)).astype(float)
    truth = given.sum(axis=1) / given.sum(axis=(1, 2))[:, None]
    for _ in range(steps):
        confusion = np.einsum("iz,ijl->jzl", truth, given)
        confusion /= confusion.sum(axis=2, keepdims=True)
        truth = truth.mean(axis=0) * np.prod(confusion[None] ** given[:, :, None, :], axis=(1, 3))
        truth /= truth.sum(axis=1, keepdims=True)
    return truth


def tables(codes: Codes, labels: Codes) -> tuple[Any, Any]:
    items: list[dict[str, Any]] = [
        {
            "item_id": f"i{n:04}", "prompt_id": f"{n:04x}", "question": f"q{n}", "response_a": "a", "response_b": "b",
            "model_a": None, "model_b": None, "human_label": None if label == MISSING else NAMES[label],
            "human_votes": [],
        }
        for n, label in enumerate(labels)
    ]  # fmt: skip
    ballots = [
        {
            "item_id": f"i{n:04}", "prompt_id": f"{n:04x}", "judge": f"judge-{j}", "reason": None, "raw": None,
            "score_a": None, "score_b": None, "vote": None if vote == MISSING else NAMES[vote], "strategy": "direct",
            "voice": "", "order": "ab", "parse_status": "unparsed" if vote == MISSING else "ok",
        }
        for j, own in enumerate(codes)
        for n, vote in enumerate(own)
    ]  # fmt: skip
    return to_table(items, ITEMS), to_table(ballots, BALLOTS)


def test_votes_are_those_of_an_independent_em_and_beat_the_majority() -> None:
    codes, truth = panel(800)
    votes, probabilities = latent_votes(codes)
    read = (codes != MISSING).any(axis=0)
    expected = em(codes[:, read])
    assert probabilities[read] == pytest.approx(expected, abs=1e-4)
    sure = np.sort(expected, axis=1)[:, -1] - np.sort(expected, axis=1)[:, -2] > 1e-3
    assert np.array_equal(votes[read][sure], expected.argmax(axis=1)[sure])
    (majority,) = pool_votes(codes, np.ones((1, len(codes)), dtype=bool))
    assert (votes == truth).mean() > (majority == truth).mean() + 0.1


def test_missing_votes_are_no_votes_and_order_does_not_matter() -> None:
    codes, _ = panel(300)
    codes[:, 5] = MISSING
    votes, probabilities = latent_votes(codes)
    assert votes[5] == MISSING and np.isnan(probabilities[5]).all() and (np.delete(votes, 5) != MISSING).all()
    assert np.delete(probabilities, 5, axis=0).sum(axis=1) == pytest.approx(1)
    turned, same = latent_votes(codes[:, ::-1])
    assert np.array_equal(turned[::-1], votes) and np.array_equal(same[::-1], probabilities, equal_nan=True)
    silent, of_nobody = latent_votes(np.full((3, 4), MISSING, np.int8))
    assert (silent == MISSING).all() and np.isnan(of_nobody).all()
    alone, _ = latent_votes(codes[:1])
    assert np.array_equal(alone, codes[0])
    split, halves = latent_votes(np.array([[0, 2], [2, 0]], np.int8))  # nothing shows who is right
    assert split.tolist() == [TIE, TIE] and halves[:, [0, 2]] == pytest.approx(np.full((2, 2), 0.5))


def test_every_jury_is_pooled_and_no_verdict_sees_its_own_label() -> None:
    codes, truth = panel(200)
    pool = MeasureSettings(draws=100, juries=JurySettings(pool="dawid_skene"))
    found = measure(*tables(codes, truth), pool)
    assert len(found.juries) == 2**5 - 1 - 5 and all(j.agreement.n == 200 for j in found.juries)
    lines = {line.pool: line for line in found.pools}
    names = ["majority", "one-coin", "Dawid–Skene", "best judge", "calibrated", "chosen in each fold"]
    assert list(lines) == names  # no mean: these judges give no scores
    assert found.juries[-1].agreement.estimates["kappa"] == lines["Dawid–Skene"].kappa
    kappas = {name: line.kappa.value or 0.0 for name, line in lines.items()}
    assert kappas["one-coin"] > kappas["majority"] + 0.1 and kappas["calibrated"] > kappas["majority"] + 0.1
    assert lines["best judge"].chosen == {"judge-0": 5} and lines["best judge"].over_best is None
    (majority,), over = pool_votes(codes, np.ones((1, 5), dtype=bool)), lines["majority"].over_best
    read = (codes[0] != MISSING) & (majority != MISSING)
    expected = [cohen_kappa_score(truth[read], votes[read]) for votes in (majority, codes[0])]
    assert over is not None and over.value == pytest.approx(expected[0] - expected[1])
    (posteriors,) = found.posteriors
    assert posteriors.column_names == ["strategy", "pool", "item_id", "vote", *NAMES] and len(posteriors) == 600
    default = measure(*tables(codes, truth), MeasureSettings(draws=100))
    assert default.pools == found.pools and default.juries[-1].agreement.estimates["kappa"] == lines["majority"].kappa

    # Without labels nothing is calibrated, and the other probabilities are the same.
    no_labels = measure(*tables(codes, np.full_like(truth, MISSING)), pool)
    assert no_labels.pools == [] and no_labels.posteriors[0].equals(posteriors.slice(0, 400))
    # Labels that say nothing are worth nothing: a model that saw them would agree with them.
    shuffled = np.random.default_rng(0).permutation(truth).astype(np.int8)
    noise = {line.pool: line.kappa.value for line in measure(*tables(codes, shuffled), pool).pools}
    assert all(abs(noise[name] or 0.0) < 0.2 for name in ("calibrated", "best judge", "chosen in each fold"))


def test_few_labels_leave_the_posterior_as_it_is() -> None:
    codes, truth = panel(200)
    few = np.where(np.arange(200) < 55, truth, MISSING).astype(np.int8)  # 44 to fit to in each fold
    lines = {line.pool: line for line in measure(*tables(codes, few), MeasureSettings(draws=100)).pools}
    assert lines["calibrated"].chosen == {UNFITTED: 5} and lines["calibrated"].kappa == lines["one-coin"].kappa
    rules = CalibrationSettings(least=40)
    fitted = measure(*tables(codes, few), MeasureSettings(draws=100, calibration=rules)).pools
    assert UNFITTED not in next(line for line in fitted if line.pool == "calibrated").chosen


def test_both_sides_are_treated_alike() -> None:
    """With A and B exchanged everywhere, the calibrated probabilities are exchanged too."""
    codes, truth = panel(150)

    def calibrated(votes: Codes, labels: Codes) -> Any:
        table = measure(*tables(votes, labels), MeasureSettings(draws=100)).posteriors[0]
        own = table.filter(pc.equal(table["pool"], "calibrated"))
        return np.stack([own[name].to_numpy() for name in NAMES], axis=1)

    mirrored = [np.where(x == MISSING, MISSING, 2 - x).astype(np.int8) for x in (codes, truth)]
    assert calibrated(*mirrored)[:, ::-1] == pytest.approx(calibrated(codes, truth), abs=1e-4, nan_ok=True)


OWN = "posterior, votes, scores, length and own family"


def own_family(mixed: bool) -> dict[str, Any]:
    """Pools of three judges, of which the first votes for its own family's answer in half of the cases where it is one
    of the two. With `mixed` that answer is A as often as B."""
    codes, truth = panel(600, (0.75, 0.6, 0.6), missing=0.0)
    rng = np.random.default_rng(1)
    side = np.where(rng.random(600) < 0.5, 0, 2) if mixed else np.zeros(600, dtype=int)
    biased = codes.copy()
    biased[0] = np.where(rng.random(600) < 0.5, side, codes[0])
    items, ballots = tables(biased, truth)
    names = [("alpha-7b", "beta-7b") if one == 0 else ("beta-7b", "alpha-7b") for one in side]
    rows = [{**row, "model_a": a, "model_b": b} for row, (a, b) in zip(items.to_pylist(), names, strict=True)]
    found = measure(to_table(rows, ITEMS), ballots, MeasureSettings(draws=100), {"judge-0": "alpha-70b"})
    blind = measure(items, ballots, MeasureSettings(draws=100), {"judge-0": "alpha-70b"})
    return {
        "bias": found.bias[0].own_family,
        "line": next(line for line in found.pools if line.pool == "calibrated"),
        "blind": next(line for line in blind.pools if line.pool == "calibrated"),
    }


def test_a_preference_for_the_own_family_is_measured_and_is_a_covariate() -> None:
    found = own_family(mixed=True)
    assert found["bias"].bias.low > 0.1
    assert set(found["line"].chosen) == {OWN} and OWN not in found["blind"].chosen
    briers = [found[name].calibration.brier.value for name in ("line", "blind")]
    assert briers[0] < briers[1] - 0.005
    # Where its family always answered as A, nothing tells a preference from the merits of that model.
    assert OWN not in own_family(mixed=False)["line"].chosen


def test_the_threshold_is_the_lowest_with_enough_right_verdicts() -> None:
    sure = np.repeat([0.9, 0.6, np.nan], 10)
    right = np.ones(30, dtype=bool)
    right[[0, 10, 11]] = False  # 9 of 10 right at 0.9, 17 of 20 at 0.6
    assert LEVEL == 0.9 and threshold(sure, right) == 0.9
    right[1] = False
    assert threshold(sure, right) == np.inf
    right[:] = True
    assert threshold(sure, right) == 0.6


def test_a_cascade_asks_the_expensive_judge_where_the_cheap_ones_are_open() -> None:
    cheap = np.array([[0, 0, 2, 1, 0, -1], [0, 2, 2, 1, 0, -1], [0, 2, 0, 1, 1, 2]], np.int8)
    expensive = np.array([2, 0, 0, 2, 2, 0], np.int8)
    truth = np.array([0, 0, 0, 2, 2, 2], np.int8)
    settings = MeasureSettings(draws=100, cascade=CascadeSettings(expensive="judge-3"))
    (found,) = measure(*tables(np.vstack([cheap, expensive]), truth), settings).cascades
    assert (found.expensive, found.cheap, found.items) == ("judge-3", ["judge-0", "judge-1", "judge-2"], 6)
    # A tie first, then two of three, then all of those who voted.
    assert [round(step.asked * 6) for step in found.steps] == [0, 1, 4, 6] and round(found.open.asked * 6) == 4
    kept = [0, 0, 0, 2, 2, 2]  # the expensive judge on items 1 to 4, the cheap ones on the others
    assert found.open.kappa.value == pytest.approx(cohen_kappa_score(truth, kept))
    assert found.steps[-1].kappa.value == pytest.approx(cohen_kappa_score(truth, expensive))
    with pytest.raises(ValueError, match=r"measure\.cascade: unknown judge 'x'; choose from judge-0"):
        measure(*tables(cheap, truth), MeasureSettings(cascade=CascadeSettings(expensive="x")))
    with pytest.raises(ValueError, match="both the expensive judge and among the cheap"):
        CascadeSettings(expensive="x", cheap=("x", "y"))


def test_the_loops_jury_refuses_a_pool_of_many_items() -> None:
    with pytest.raises(ValueError, match=r"dawid_skene is fitted to the votes on many items.*measure\.juries\.pool"):
        JuryRule.model_validate({"pool": "dawid_skene"})
    with pytest.raises(ValueError, match="unknown pool 'dawid_skene'; choose from mode"):
        pool_judgements({"x": Judgement((1.0, 2.0), (1,), "ok", ())}, "dawid_skene")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"juries\.weights"):
        JurySettings(pool="dawid_skene", weights={"x": 1.0})
