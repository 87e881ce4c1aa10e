"""From which confidence on verdicts agree with people often enough, with a guarantee for finite samples.

Verdicts of a run are tested from the most to the least confident ones, along a sequence of thresholds that is fixed
before a label is looked at (fixed-sequence testing; Jung, Brahman and Choi 2024, "Trust or Escalate",
arXiv:2407.18370, §2). At each threshold the null hypothesis is that people agree with less than `level` of the verdicts
from it on; its p-value is that of the exact binomial test over the labelled ones. The first threshold whose null
hypothesis is not rejected at 1 − `confidence` ends the sequence, and the threshold before it is certified. No
correction for the number of tests is needed, as a test is made only if all before it were rejected.

If the labelled verdicts are a random sample of the run's, the certified threshold has at least the agreement `level`
with a probability of at least `confidence`, whatever the judges and whatever the confidence means. (Without replacement
the count is hypergeometric, which is less spread than the binomial distribution: Hoeffding 1963, §6.)
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.stats.bootstrap import Floats

#: Largest number of thresholds.
_STEPS = 40
#: The first threshold is set so that this many times the least number of labels that can show anything are expected.
_START = 1.5


@dataclasses.dataclass(frozen=True)
class Tested:
    """One threshold.

    Attributes:
        coverage: share of all verdicts from it on.
        labelled, agreeing: labelled verdicts from it on, and those that people agree with.
        least_agreement: lower bound of the agreement at the confidence of the test (Clopper and Pearson 1934).
    """

    threshold: float
    coverage: float
    labelled: int
    agreeing: int
    least_agreement: float


@dataclasses.dataclass(frozen=True)
class Certified:
    """The outcome of a sequence of tests.

    Attributes:
        threshold: infinite where nothing is certified.
        tested: in order; the last one is not rejected, unless all are.
        needed: labels without which nothing can be certified, all of them agreeing.
    """

    level: float
    confidence: float
    labels: int
    threshold: float
    tested: list[Tested]
    needed: int

    @property
    def certified(self) -> Tested | None:
        return next((one for one in reversed(self.tested) if one.threshold == self.threshold), None)


def certify(sure: Floats, labelled: Floats, right: NDArray[np.bool_], level: float, confidence: float) -> Certified:
    """Test thresholds from the highest on.

    Args:
        sure: confidence of every verdict of the run, shape (verdicts,); NaN where there is no verdict.
        labelled: confidence of a random sample of them, shape (labels,), NaN likewise.
        right: whether people agree with it, shape (labels,).
        level: agreement to hold, between 0 and 1.
        confidence: of the statement, between 0 and 1.
    """
    from scipy.stats import beta

    needed = math.ceil(math.log(1 - confidence) / math.log(level) - 1e-9)
    found = Certified(level, confidence, len(labelled), math.inf, [], needed)
    with np.errstate(invalid="ignore"):
        for threshold in _sequence(sure, len(labelled), needed):
            own = labelled >= threshold
            n, k = int(own.sum()), int((own & right).sum())
            least = float(beta.ppf(1 - confidence, k, n - k + 1)) if k else 0.0
            found.tested.append(Tested(threshold, float((sure >= threshold).mean()), n, k, least))
            if least < level:
                break
            found = dataclasses.replace(found, threshold=threshold)
    return found


def _sequence(sure: Floats, labels: int, needed: int) -> list[float]:
    """Distinct thresholds from high to low; they depend on the confidences and on the number of labels alone."""
    ordered = np.sort(sure[~np.isnan(sure)])[::-1]
    first = _START * needed / labels if labels else np.inf
    if not len(ordered) or first * len(sure) > len(ordered):
        first = len(ordered) / max(len(sure), 1)  # fewer labels than that: everything is tested at once
    counts = np.unique(np.ceil(np.linspace(first * len(sure), len(ordered), _STEPS)).astype(int))
    return list(dict.fromkeys(float(ordered[count - 1]) for count in counts if count))
