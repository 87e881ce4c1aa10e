"""Prediction-powered means: the published closed form, and the coverage of their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from ray_pipeline.stats.prediction_powered import powered_mean


def draw(rng: np.random.Generator, labels: int, others: int, noise: float) -> tuple[np.ndarray, ...]:
    """Labels 0 or 1 with mean 0.6, and predictions that are biased and as noisy as asked."""
    truth = (rng.random(labels + others) < 0.6).astype(float)
    wrong = rng.random(len(truth)) < noise
    f = np.clip(np.where(wrong, 1 - truth, truth) * 0.8 + 0.15, 0, 1)
    return truth[:labels], f[:labels], f[labels:]


def test_it_is_the_published_closed_form() -> None:
    y, f, rest = draw(np.random.default_rng(0), 4000, 40_000, 0.15)

    def published(weight: float) -> tuple[float, float]:
        """Point estimate and standard error of PPI++, as in ppi_py.ppi_mean_ci."""
        point = (weight * rest).mean() + (y - weight * f).mean()
        return point, float(np.hypot((weight * rest).std() / len(rest) ** 0.5, (y - weight * f).std() / len(y) ** 0.5))

    found = powered_mean(y, f, rest)
    assert found is not None and found.powered.low is not None and found.powered.high is not None
    best = minimize_scalar(lambda weight: published(weight)[1], bounds=(0, 1), method="bounded").x
    assert found.weight == pytest.approx(best, abs=0.01)
    point, error = published(found.weight)
    assert found.powered.value == pytest.approx(point)
    expected = point + norm.ppf([0.025, 0.975]) * error
    assert [found.powered.low, found.powered.high] == pytest.approx(expected.tolist(), abs=1e-4)
    assert found.worth is not None and found.worth == pytest.approx(
        len(y) * (y.std() / len(y) ** 0.5 / error) ** 2, rel=0.01
    )


@pytest.mark.filterwarnings("ignore")
def test_it_is_what_ppi_python_gives() -> None:
    ppi = pytest.importorskip("ppi_py", reason="ppi-python is in the extra `dev`")
    rng = np.random.default_rng(3)
    y, f, rest = draw(rng, 2000, 10_000, 0.2)
    found = powered_mean(y, f, rest)
    assert found is not None
    low, high = ppi.ppi_mean_ci(y, f, rest, alpha=0.05)
    assert [found.powered.low, found.powered.high] == pytest.approx([low[0], high[0]], abs=3e-4)
    # With unequal probabilities it has the predictions of all items as those of the unlabelled ones.
    p = np.clip(np.where(y == 1, 0.3, 0.1) + rng.random(2000) / 10, 0, 1)
    found = powered_mean(y, f, rest, probabilities=p)
    assert found is not None
    own = found.weight * 12_000 / 10_000
    point = ppi.ppi_mean_pointestimate(y, f, np.concatenate([f, rest]), lam=own, w=1 / p)
    assert found.powered.value == pytest.approx(float(np.squeeze(point)), abs=1e-9) and 0 < own < 1.2


@pytest.mark.parametrize(("noise", "narrower"), [(0.1, 0.8), (0.5, 1.02)])
def test_intervals_cover_in_95_percent_and_good_predictions_make_them_narrower(noise: float, narrower: float) -> None:
    rng = np.random.default_rng(1)
    covered = alone = 0
    widths = []
    for _ in range(4000):
        found = powered_mean(*draw(rng, 100, 2000, noise))
        assert found is not None
        own, plain = found.powered, found.alone
        assert own.low is not None and own.high is not None and plain.low is not None and plain.high is not None
        covered += own.low <= 0.6 <= own.high
        alone += plain.low <= 0.6 <= plain.high
        widths.append((own.high - own.low) / (plain.high - plain.low))
    assert covered / 4000 == pytest.approx(0.95, abs=0.015) and alone / 4000 == pytest.approx(0.95, abs=0.015)
    assert np.mean(widths) < narrower


def test_items_of_one_group_count_as_one() -> None:
    rng = np.random.default_rng(2)
    y, f, rest = draw(rng, 200, 1000, 0.2)
    single = powered_mean(y, f, rest)
    ten = powered_mean(
        np.repeat(y, 10),
        np.repeat(f, 10),
        np.repeat(rest, 10),
        np.repeat(np.arange(200), 10),
        np.repeat(np.arange(200, 1200), 10),
    )
    assert single is not None and ten is not None
    assert [ten.powered.value, ten.powered.low, ten.powered.high] == pytest.approx(
        [single.powered.value, single.powered.low, single.powered.high], rel=2e-3
    )


def test_nothing_is_made_of_little() -> None:
    assert powered_mean([], [], [0.5]) is None
    few = powered_mean([1.0, 0.0], [1.0, 0.0], np.linspace(0, 1, 50))
    assert few is not None and few.powered.low is None and few.worth is None
    alone = powered_mean(np.arange(40) % 2, np.arange(40) % 2, [])
    assert alone is not None and alone.weight == 0 and alone.powered == alone.alone and alone.worth == pytest.approx(40)
    useless = powered_mean(np.arange(40) % 2, np.full(40, 0.3), np.full(900, 0.3))
    assert useless is not None and useless.weight == 0 and useless.powered.value == 0.5
