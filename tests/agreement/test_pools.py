"""Pools of a whole panel: the latent class model against known truth, missing votes, and what labels may decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_pipeline.agents.jurors import JuryRule, pool_judgements
from ray_pipeline.agents.jury import MISSING, TIE, Codes, pool_votes
from ray_pipeline.agents.strategies import Judgement
from ray_pipeline.agreement.document import measure
from ray_pipeline.agreement.measure_settings import JurySettings, MeasureSettings
from ray_pipeline.agreement.pools import LEVEL, _covered, latent_votes
from ray_pipeline.stats.bootstrap import resample
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


def test_every_jury_is_pooled_and_labels_fit_nothing() -> None:
    codes, truth = panel(200)
    pool = MeasureSettings(draws=100, juries=JurySettings(pool="dawid_skene"))
    found = measure(*tables(codes, truth), pool)
    assert len(found.juries) == 2**5 - 1 - 5 and all(j.agreement.n == 200 for j in found.juries)
    majority, latent, best = found.pools
    assert [line.pool for line in found.pools] == ["majority", "Dawid–Skene", "best judge"]
    assert found.juries[-1].agreement.estimates["kappa"] == latent.kappa and latent.kappa.low is not None
    assert latent.held_out.value is not None and majority.held_out.value is not None
    assert latent.held_out.value > majority.held_out.value + 0.1 and best.judge == "judge-0" and best.covered is None
    (posteriors,) = found.posteriors
    assert posteriors.column_names == ["strategy", "item_id", "vote", *NAMES] and len(posteriors) == 200

    # Other labels on the choosing part change neither votes nor probabilities, and no kappa of a pool on the others.
    no_labels = measure(*tables(codes, np.full_like(truth, MISSING)), pool)
    assert no_labels.pools == [] and no_labels.posteriors[0].equals(posteriors)
    assert [j.agreement.vote_counts for j in no_labels.juries] == [j.agreement.vote_counts for j in found.juries]
    # The default pool has the same line, and its juries are the majority's.
    default = measure(*tables(codes, truth), MeasureSettings(draws=100))
    assert default.pools == found.pools and default.juries[-1].agreement.estimates["kappa"] == majority.kappa


def test_coverage_is_chosen_on_one_part_and_reported_on_the_other() -> None:
    labels = np.zeros(40, np.int8)
    choose_on = np.arange(40) < 20
    sure = np.tile(np.repeat([0.9, 0.6], 10), 2)
    votes = np.zeros(40, np.int8)
    votes[[0, 10, 11, 20, 21]] = TIE  # choosing part: 9 of 10 right at 0.9, 17 of 20 at 0.6; the other: 8 of 10 at 0.9
    samples = resample(np.arange(40), 100, 0)
    found = _covered(votes, sure, labels, choose_on, samples)
    assert LEVEL == 0.9 and found.threshold == 0.9
    assert (found.coverage.value, found.agreement.value) == (0.5, 0.8)
    votes[1] = TIE
    never = _covered(votes, sure, labels, choose_on, samples)
    assert (never.threshold, never.coverage.value, never.agreement.value) == (None, 0.0, None)


def test_the_loops_jury_refuses_a_pool_of_many_items() -> None:
    with pytest.raises(ValueError, match=r"dawid_skene is fitted to the votes on many items.*measure\.juries\.pool"):
        JuryRule.model_validate({"pool": "dawid_skene"})
    with pytest.raises(ValueError, match="unknown pool 'dawid_skene'; choose from mode"):
        pool_judgements({"x": Judgement((1.0, 2.0), (1,), "ok", ())}, "dawid_skene")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"juries\.weights"):
        JurySettings(pool="dawid_skene", weights={"x": 1.0})
