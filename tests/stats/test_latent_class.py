"""The latent class models against crowd-kit, and the one-coin model against known accuracies."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ray_pipeline.agents.jury import MISSING, pool_votes
from ray_pipeline.agreement.pools import latent_votes
from ray_pipeline.stats.latent_class import fit


def panel(items: int, accuracies: list[float], missing: float = 0.1, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Votes (judges, items) of judges who err independently and evenly, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, items, p=[0.45, 0.15, 0.4])
    right = rng.random((len(accuracies), items)) < np.array(accuracies)[:, None]
    votes = np.where(right, truth, (truth + rng.integers(1, 3, right.shape)) % 3)
    votes[rng.random(votes.shape) < missing] = MISSING
    return votes.astype(np.int8), truth.astype(np.int8)


@pytest.mark.parametrize("one_coin", [False, True])
def test_posteriors_are_those_of_crowd_kit(one_coin: bool) -> None:
    aggregation = pytest.importorskip("crowdkit.aggregation", reason="crowd-kit is in the extra `dev`")
    import pandas as pd

    votes, _ = panel(300, [0.9, 0.8, 0.55, 0.5])
    votes = votes[:, (votes != MISSING).any(axis=0)]
    judges, items = np.nonzero(votes != MISSING)
    frame = pd.DataFrame({"task": items, "worker": judges, "label": votes[judges, items]})
    model = (aggregation.OneCoinDawidSkene if one_coin else aggregation.DawidSkene)(n_iter=40, tol=-1.0)
    expected = model.fit_predict_proba(frame).sort_index()[[0, 1, 2]].to_numpy()
    rows, place, counts = np.unique(votes.T, axis=0, return_inverse=True, return_counts=True)
    found = fit(rows, counts.astype(float), 3, iterations=40, tolerance=0, one_coin=one_coin).posterior(rows)
    assert found[place.reshape(-1)] == pytest.approx(expected, abs=1e-6)


def test_one_coin_needs_fewer_items_than_a_table_of_errors() -> None:
    right = {"one_coin": 0.0, "dawid_skene": 0.0, "majority": 0.0}
    for seed in range(30):
        votes, truth = panel(60, [0.85, 0.75, 0.6, 0.55, 0.5, 0.5], seed=seed)
        right["majority"] += (pool_votes(votes, np.ones((1, 6), bool))[0] == truth).mean() / 30
        for model in ("one_coin", "dawid_skene"):
            right[model] += (latent_votes(votes, model)[0] == truth).mean() / 30  # type: ignore[arg-type]
    assert right["one_coin"] > right["dawid_skene"] + 0.02 and right["one_coin"] > right["majority"] + 0.02


def test_a_hundred_thousand_items_of_ten_judges_are_pooled_in_seconds() -> None:
    votes, truth = panel(100_000, list(np.linspace(0.6, 0.9, 10)), missing=0.02)
    began = time.process_time()
    found, _ = latent_votes(votes, "one_coin")
    assert time.process_time() - began < 20
    assert (found == truth).mean() > 0.98
