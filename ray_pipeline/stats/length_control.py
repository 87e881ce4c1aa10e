"""The internal win rate at equal length: a judge's preference for longer or shorter answers is factored out.

The idea of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475) for any two models: with the outcome y
of a pair (1 won, 1/2 tied, 0 lost) and Δ, the base's length minus the policy's,

    logit P(policy is better) = w_m + w_l · tanh(Δ / sd(Δ)),

and the length-controlled win rate is P at Δ = 0. There is no term for the difficulty of instructions, which is only
known for those of AlpacaEval, and no gamed baseline; two Gaussian priors keep the weights finite where all pairs are
won, or where length separates wins from losses perfectly. It is a model of the verdicts and cannot separate length
from what correlates with it.

Δ = 0 must lie among the lengths that were judged. Where one model's answers are almost always longer, the fit
extrapolates: on the models in AlpacaEval's published data with an overlap below `MIN_OVERLAP` it misses the published
length-controlled win rate by up to 22 points. There is no figure for those. AlpacaEval's own benchmark does not
depend on this: its published fit has gamed baselines and difficulties (`bench.alpaca_eval.length_controlled`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from ray_pipeline.stats.bootstrap import Floats, Interval, bootstrap_mean, number, percentiles, sample_counts
from ray_pipeline.stats.winrate import POINTS, PairDecision
from ray_pipeline.store.keys import digest

#: Standard deviations of the priors on w_m and w_l (weakly informative: Gelman et al. 2008, §2).
PRIOR_MODEL, PRIOR_LENGTH = 10.0, 2.5

#: Least share of pairs on either side of equal length.
MIN_OVERLAP = 0.2

_NEWTON_STEPS = 50


@dataclasses.dataclass(frozen=True)
class LengthControlledScore:
    """Scores between 0 and 1, 0.5 being "no better, no worse", over the decided pairs.

    Attributes:
        score: at equal length, with the percentile interval of the bootstrap over prompts (refitted for each sample);
            no figure where `overlap` is below `MIN_OVERLAP`.
        raw: (wins + ties/2) / decided, for comparison.
        length_weight: w_l; negative where longer answers win, None without a pair.
        mean_difference: mean of policy's length minus base's, in characters.
        overlap: share of pairs on the rarer side of equal length (`length_overlap`); None without a pair.
        pairs: decided pairs with both lengths, which the fit uses.
        unread, unmeasured: pairs left out because a verdict is unread, or a length is missing.
    """

    score: Interval
    raw: Interval
    length_weight: float | None
    mean_difference: float | None
    overlap: float | None
    pairs: int
    unread: int
    unmeasured: int


def length_controlled_score(
    decisions: Sequence[PairDecision],
    policy_chars: Mapping[str, int],
    base_chars: Mapping[str, int],
    *,
    draws: int = 500,
    seed: int = 0,
    confidence: float = 0.95,
) -> LengthControlledScore:
    """The length-controlled score of the policy over the base by one judge.

    Args:
        decisions: from `winrate.decide_pairs`.
        policy_chars, base_chars: characters of each answer by pair_id.
    """
    decided = [d for d in decisions if d.outcome != "unread"]
    known = [d for d in decided if d.pair_id in policy_chars and d.pair_id in base_chars]
    y = [POINTS[d.outcome] for d in known]
    delta = [base_chars[d.pair_id] - policy_chars[d.pair_id] for d in known]
    prompts = [d.prompt_id for d in known]
    raw = bootstrap_mean(y, prompts, draws, seed, confidence=confidence, bounds=(0, 1))
    score, length = at_equal_length(y, delta, prompts, draws=draws, seed=seed, confidence=confidence)
    return LengthControlledScore(
        score,
        raw,
        length,
        -float(np.mean(delta)) if known else None,
        length_overlap(delta) if known else None,
        pairs=len(known),
        unread=len(decisions) - len(decided),
        unmeasured=len(decided) - len(known),
    )


def pair_lengths(responses: pa.Table) -> tuple[dict[str, int], dict[str, int]]:
    """Characters of the policy's and the base's answer by pair_id, from a table of responses.

    A pair consists of two responses to one prompt in one mode; its id is a digest of theirs.
    """
    base: dict[tuple[str, str], tuple[str, int]] = {}
    others: list[tuple[tuple[str, str], str, int]] = []
    columns = ["response_id", "prompt_id", "model", "mode", "response"]
    for row in responses.select(columns).to_pylist():
        if row["response"] is None:
            continue
        place, length = (row["prompt_id"], row["mode"]), len(row["response"])
        if row["model"] == "base":
            base[place] = (row["response_id"], length)
        else:
            others.append((place, row["response_id"], length))
    policy_chars: dict[str, int] = {}
    base_chars: dict[str, int] = {}
    for place, response_id, length in others:
        if place in base:
            pair = digest(["pair", response_id, base[place][0]])
            policy_chars[pair], base_chars[pair] = length, base[place][1]
    return policy_chars, base_chars


def length_overlap(length_difference: ArrayLike) -> float:
    """Share of pairs whose difference in length has the rarer sign, pairs of equal length counted on both sides."""
    delta = np.asarray(length_difference, dtype=np.float64)
    return float(min((delta <= 0).mean(), (delta >= 0).mean()))


def at_equal_length(
    outcomes: ArrayLike,
    length_difference: ArrayLike,
    prompts: Sequence[str],
    *,
    draws: int = 500,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[Interval, float | None]:
    """The mean outcome at equal length with its bootstrap interval over prompts, and the weight of length.

    The mean is None where equal length is outside the data (`length_overlap` below `MIN_OVERLAP`).

    Args:
        outcomes: between 0 and 1, shape (pairs,); graded preferences are not rounded.
        length_difference: the other answer's characters minus this one's, shape (pairs,).
        prompts: prompt of each pair.
    """
    y, delta = np.asarray(outcomes, dtype=np.float64), np.asarray(length_difference, dtype=np.float64)
    if len(y) == 0:
        return Interval(None, None, None), None
    sd = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    x = np.tanh(delta / sd) if sd > 0 else np.zeros(len(delta))
    model, length = fit_two_weights(x, y, np.ones((1, len(y))))[0]
    names, group = np.unique(np.array(prompts, dtype=np.str_), return_inverse=True)
    if length_overlap(delta) < MIN_OVERLAP:
        return Interval(None, None, None, len(y), len(names)), float(length)
    mean = float(sigmoid(np.array(model)))
    low = high = None
    if len(names) > 1:
        models = fit_two_weights(x, y, sample_counts(len(names), draws, seed)[:, group])[:, 0]
        low, high = (number(end) for end in percentiles(sigmoid(models), mean, confidence))
    return Interval(mean, low, high, len(y), len(names)), float(length)


def fit_two_weights(x: ArrayLike, y: ArrayLike, weights: ArrayLike) -> Floats:
    """(w_m, w_l) for each row of `weights`, shape (fits, 2): maximum a posteriori by Newton's method.

    Args:
        x: tanh of the standardised length difference, shape (pairs,).
        y: outcomes between 0 and 1, shape (pairs,).
        weights: how often each pair counts, shape (fits, pairs).
    """
    design = np.stack([np.ones_like(np.asarray(x, dtype=np.float64)), np.asarray(x, dtype=np.float64)], axis=1)
    outcomes, times = np.asarray(y, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    precision = np.array([PRIOR_MODEL**-2, PRIOR_LENGTH**-2])
    found = np.zeros((len(times), 2))
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(found @ design.T)
        gradient = (times * (outcomes - p)) @ design - precision * found
        curvature = np.einsum("fp,pi,pj->fij", times * p * (1 - p), design, design) + np.diag(precision)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # Far from the optimum the log-likelihood is nearly flat, and a full step would overshoot.
        found = found + np.clip(step, -1.0, 1.0)
        if float(np.abs(step).max()) < 1e-10:
            break
    return found


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(−x)) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))
