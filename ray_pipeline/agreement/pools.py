"""Votes of a whole panel pooled into one verdict for each item, and what each pool is worth on items held out from it.

Majority, mean, one-coin and Dawid–Skene use no human label. Labels choose the best judge, the calibrated model, the
best pool, and the confidence from which verdicts agree with humans often enough. All of these are chosen for each fold
of the questions from the labels of the other folds, and measured on that fold.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, VOTES, Codes, compare_scores, pool_scores, pool_votes
from ray_pipeline.agreement.calibrated import UNFITTED, calibrate, features_of, most_probable, without_zeros
from ray_pipeline.agreement.measure_settings import CalibrationSettings, MeasureSettings
from ray_pipeline.agreement.panel import Evaluator, Panel
from ray_pipeline.agreement.vote_agreement import agreement, paired, statistics, tables
from ray_pipeline.stats.bootstrap import Estimate, Floats, Samples, ratio
from ray_pipeline.stats.calibration import Calibration, calibration
from ray_pipeline.stats.certified import certify
from ray_pipeline.stats.latent_class import fit
from ray_pipeline.store.keys import unit_hash

#: Agreement with humans at which the share of covered items is given.
LEVEL = 0.9
#: Confidence of the certified threshold.
CERTAINTY = 0.9
#: Probabilities and shares are compared to so many digits: sums differ in the last ones.
_DIGITS = 9

LATENT_NAMES: dict[str, Literal["one_coin", "dawid_skene"]] = {"one-coin": "one_coin", "Dawid–Skene": "dawid_skene"}
BEST, CALIBRATED, CHOSEN = "best judge", "calibrated", "chosen in each fold"


@dataclasses.dataclass(frozen=True)
class Pool:
    """A verdict for each item.

    Attributes:
        votes: shape (items,).
        sure: confidence in them, shape (items,), NaN where there is none; None for votes without any.
        probabilities: of each of `VOTES`, shape (items, 3); None where the pool has none.
    """

    votes: Codes
    sure: Floats | None
    probabilities: Floats | None


@dataclasses.dataclass(frozen=True)
class Covered:
    """The items from a confidence on that was chosen on the other folds; both as shares of labelled items."""

    coverage: Estimate
    agreement: Estimate


@dataclasses.dataclass(frozen=True)
class PoolLine:
    """One way to make a verdict for each item of a strategy.

    Attributes:
        chosen: judge, features or pool → number of folds that chose it; empty for a pool without labels.
        kappa: over all labelled items, each by what the labels of other folds chose.
        over_best: kappa minus that of the best judge, on the same items; None for that judge itself.
        covered: from the lowest confidence at which `LEVEL` of the verdicts agree; None without a confidence.
        certified: the same with a threshold certified at `CERTAINTY` (`stats.certified`).
        calibration: None for a pool without probabilities.
    """

    strategy: str
    pool: str
    chosen: dict[str, int]
    items: int
    kappa: Estimate
    over_best: Estimate | None
    covered: Covered | None
    certified: Covered | None
    calibration: Calibration | None


def latent_votes(codes: Codes, model: Literal["dawid_skene", "one_coin"] = "dawid_skene") -> tuple[Codes, Floats]:
    """The most probable class of each item by a latent class model (`stats.latent_class`).

    It is fitted to the votes on all items, labelled or not; missing votes are left out. Items with equal votes are
    counted once, so time and memory go with the number of distinct rows of votes. With two judges nothing shows which
    of them errs, and where they differ the result is hardly more than a convention.

    Args:
        codes: shape (judges, items).

    Returns:
        Votes, shape (items,), a tie where several classes lead; and the probability of each of `VOTES`, shape
        (items, 3). Items without a vote have a missing one, and NaN.
    """
    probabilities = np.full((codes.shape[1], len(VOTES)), np.nan)
    voted = np.flatnonzero((codes != MISSING).any(axis=0))
    if len(voted):
        rows, place = _distinct(codes[:, voted].T)
        counts = np.bincount(place).astype(np.float64)
        fitted = fit(rows, counts, classes=len(VOTES), one_coin=model == "one_coin")
        found = fitted.posterior(rows).round(_DIGITS)
        probabilities[voted] = found[place]
    return most_probable(probabilities), probabilities


def _distinct(rows: Codes) -> tuple[Codes, NDArray[np.int64]]:
    """Distinct rows in order, and the place of each row among them. They are hashed, since sorting all takes longer."""
    data = pa.py_buffer(np.ascontiguousarray(rows).tobytes())
    hashed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, data]).dictionary_encode()
    words = np.frombuffer(b"".join(hashed.dictionary.to_pylist()), np.int8).reshape(-1, rows.shape[1])
    found, place = np.unique(words, axis=0, return_inverse=True)
    return found, place.reshape(-1)[hashed.indices.to_numpy()]


def unsupervised(judges: Sequence[Evaluator]) -> dict[str, Pool]:
    """The pools without human labels, by name; the mean needs scores of all judges."""
    codes = np.stack([e.votes for e in judges])
    everybody = np.ones((1, len(codes)), dtype=bool)
    (majority,) = pool_votes(codes, everybody)
    with np.errstate(invalid="ignore"):
        shares = np.stack([(codes == code).sum(axis=0) for code in range(len(VOTES))], axis=1)
        shares = (shares / (codes != MISSING).sum(axis=0)[:, None]).round(_DIGITS)
    found = {"majority": Pool(majority, shares.max(axis=1), shares)}
    scored = [e.scores for e in judges if e.scores is not None]
    if len(scored) == len(judges):
        ((a,), (b,)) = pool_scores(np.stack(scored, axis=1), everybody, "mean")
        found["mean"] = Pool(compare_scores(a, b), np.abs(a - b).round(_DIGITS), None)
    for name, model in LATENT_NAMES.items():
        votes, probabilities = latent_votes(codes, model)
        found[name] = Pool(votes, probabilities.max(axis=1), probabilities)
    return found


def _alone(judge: Evaluator) -> Pool:
    """A single judge; its confidence is the gap of its scores."""
    gap = None if judge.scores is None else np.abs(judge.scores[0] - judge.scores[1])
    return Pool(judge.votes, gap, None)


def folds_of(panel: Panel, settings: CalibrationSettings, seed: int) -> NDArray[np.int64]:
    """The fold of each item, shape (items,): labelled questions in the order of a hash are dealt out in turn."""
    first: dict[str, str] = {}
    labelled: set[str] = set()
    for item, question, label in sorted(zip(panel.item_ids, panel.questions, panel.labels.tolist(), strict=True)):
        first.setdefault(question, item)
        labelled |= set() if label == MISSING else {question}
    ordered = sorted(first, key=lambda name: (name not in labelled, unit_hash("folds", seed, first[name]), name))
    place = {question: number % settings.folds for number, question in enumerate(ordered)}
    return np.array([place[question] for question in panel.questions], dtype=np.int64)


class _HeldOut:
    """One line of the table, filled fold by fold."""

    def __init__(self, items: int) -> None:
        self.chosen: collections.Counter[str] = collections.Counter()
        self.votes = np.full(items, MISSING, np.int8)
        self.sure = np.full(items, np.nan)
        self.probabilities = np.full((items, len(VOTES)), np.nan)
        self.covered = np.zeros(items, dtype=bool)
        self.certified = np.zeros(items, dtype=bool)

    def take(self, pool: Pool, labels: Codes, on: NDArray[np.bool_], test: NDArray[np.bool_], chosen: str = "") -> None:
        self.chosen.update([chosen] if chosen else [])
        self.votes[test] = pool.votes[test]
        if pool.probabilities is not None:
            self.probabilities[test] = pool.probabilities[test]
        if pool.sure is None:
            return
        self.sure[test] = pool.sure[test]
        right = (pool.votes == labels) & (pool.votes != MISSING)
        sure = np.where(pool.votes != MISSING, pool.sure, np.nan)
        with np.errstate(invalid="ignore"):
            self.covered[test] = (sure >= threshold(sure[on], right[on]))[test]
            self.certified[test] = (sure >= certify(sure, sure[on], right[on], LEVEL, CERTAINTY).threshold)[test]


def threshold(sure: Floats, right: NDArray[np.bool_]) -> float:
    """The lowest confidence from which a share of `LEVEL` is right, infinite where none is; both of shape (items,)."""
    known = ~np.isnan(sure)
    levels, place = np.unique(-sure[known], return_inverse=True)
    items, agreeing = (np.cumsum(np.bincount(place, weights=w)) for w in (np.ones(len(place)), right[known]))
    enough = np.flatnonzero(agreeing >= LEVEL * items - 1e-9)
    return -float(levels[enough[-1]]) if len(enough) else np.inf


def compare_pools(
    strategy: str,
    judges: Sequence[Evaluator],
    panel: Panel,
    settings: MeasureSettings,
    samples: Samples,
    families: Mapping[str, str | None],
) -> tuple[list[PoolLine], pa.Table]:
    """All pools of a strategy's judges, and the probabilities of those that have some.

    Args:
        families: model family of each judge, for the calibrated model.

    Returns:
        No lines without labels in three folds; and a table with rows for each item by pool: strategy, pool, item_id,
        vote, and the probabilities A, tie, B. Those of `calibrated` are from labels of other items alone.
    """
    rules, labels = settings.calibration, panel.labels
    free, alone = unsupervised(judges), {e.judge: _alone(e) for e in judges}
    posterior = free["one-coin"].probabilities
    assert posterior is not None
    labelled, fold = labels != MISSING, folds_of(panel, rules, settings.seed)
    sets = features_of(judges, panel, without_zeros(posterior), families)

    def calibrated(on: NDArray[np.bool_]) -> tuple[Pool, str]:
        model = calibrate(sets, posterior, labels, fold, on, rules.least)
        p = model.probabilities.round(_DIGITS)
        return Pool(most_probable(p), p.max(axis=1), p), model.features

    whole, fitted = calibrated(labelled)
    shown = {name: free[name] for name in LATENT_NAMES}
    table = pa.concat_tables(
        _posteriors(strategy, name, pool, panel.item_ids)
        for name, pool in (shown if fitted == UNFITTED else {**shown, CALIBRATED: whole}).items()
    )
    numbers = np.unique(fold[labelled])
    if len(numbers) < 3:
        return [], table
    lines = {name: _HeldOut(len(labels)) for name in (*free, BEST, CALIBRATED, CHOSEN)}
    for number in numbers:
        on, test = labelled & (fold != number), fold == number
        judge = _highest(alone, labels, on)
        model, features = calibrated(on)
        pools = {**free, BEST: alone[judge], CALIBRATED: model}
        for name, pool in pools.items():
            lines[name].take(pool, labels, on, test, {BEST: judge, CALIBRATED: features}.get(name, ""))
        best = _highest(pools, labels, on)
        lines[CHOSEN].take(pools[best], labels, on, test, best)
    reference = lines[BEST]
    kappas = agreement(np.stack([line.votes for line in lines.values()]), labels, samples, ("kappa",))
    return [
        PoolLine(
            strategy=strategy,
            pool=name,
            chosen=dict(line.chosen.most_common()),
            items=found.labelled,
            kappa=found.estimates["kappa"],
            over_best=None
            if name == BEST
            else paired((name, line.votes), (BEST, reference.votes), labels, samples).difference,
            covered=None if np.isnan(line.sure).all() else _covered(line.covered, line.votes, labels, samples),
            certified=None if np.isnan(line.sure).all() else _covered(line.certified, line.votes, labels, samples),
            calibration=calibration(line.probabilities, labels, samples),
        )
        for (name, line), found in zip(lines.items(), kappas, strict=True)
    ], table


def _highest(pools: Mapping[str, Pool], labels: Codes, on: NDArray[np.bool_]) -> str:
    """The pool of the highest kappa on some items, the first of equal ones."""
    votes = np.stack([pool.votes for pool in pools.values()])
    kappas = statistics(tables(votes, np.where(on, labels, MISSING).astype(np.int8)), ("kappa",))["kappa"]
    return list(pools)[int(np.argmax(np.nan_to_num(kappas, nan=-np.inf)))]


def _covered(kept: NDArray[np.bool_], votes: Codes, labels: Codes, samples: Samples) -> Covered:
    labelled = labels != MISSING
    kept = kept & labelled
    return Covered(
        ratio(kept.astype(float), labelled.astype(float), samples),
        ratio((kept & (votes == labels)).astype(float), kept.astype(float), samples),
    )


def _posteriors(strategy: str, name: str, pool: Pool, item_ids: Sequence[str]) -> pa.Table:
    assert pool.probabilities is not None
    return pa.table(
        {
            "strategy": pa.array([strategy] * len(item_ids), pa.string()),
            "pool": pa.array([name] * len(item_ids), pa.string()),
            "item_id": pa.array(item_ids, pa.string()),
            "vote": pa.array([None if code == MISSING else VOTES[code] for code in pool.votes.tolist()], pa.string()),
            **{
                vote: pa.array(p, pa.float64(), from_pandas=True)
                for vote, p in zip(VOTES, pool.probabilities.T, strict=True)
            },
        }
    )
