"""Many policies of one base side by side: each training method on each dataset, over several seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.policy.response_stats import name_models, response_means, response_stats, rubric_means
from ray_pipeline.stats.bootstrap import Interval, bootstrap_gain, bootstrap_mean
from ray_pipeline.stats.length_control import length_controlled_score, pair_lengths
from ray_pipeline.stats.winrate import decide_pairs, judges_of, win_rate

T = TypeVar("T")

BASE = "base"
WIN_RATE = "win rate"
MEAN_SCORE = "mean score"
_ACCURACY = "accuracy "


@dataclasses.dataclass(frozen=True)
class PolicyRun:
    """How one policy was trained. `label` is its name in the tables, `rows` the number of its training rows, `reading`
    what is equal for the policies of all datasets (`method_table.Reading`), `learnt_from` a digest of the rows and what
    follows from them (steps, class weights); "" in results of earlier versions."""

    label: str
    method: str
    data: str
    seed: int
    rows: int
    steps: int
    train_seconds: float
    reading: str = "epochs"
    learnt_from: str = ""

    @property
    def training(self) -> tuple[str, int, str] | None:
        """Equal for trainings with the same rows and settings, as the settings follow from method and seed; None where
        it is unknown."""
        return (self.method, self.seed, self.learnt_from) if self.learnt_from else None


@dataclasses.dataclass(frozen=True)
class PolicyStats:
    """One policy (or the base, with `run` None) on the held-out prompts.

    Attributes:
        win_rate, tie_rate, loss_rate, flip_rate: against the base, over decided pairs; None for the base.
        unread: pairs with an order that was not read.
        equal_length: score against the base at equal length (wins + ties / 2, see ``length_control``).
        scores: judge → mean score of the responses of the first mode, over those that were read.
        mean_score: mean over prompts of the judges' mean, over responses that all judges read.
        accuracy: mode → share of right answers, where there is a checker; else empty.
        tokens: mean completion tokens in the first mode.
        benchmarks: benchmark and metric → value in its own unit, where the run has public benchmarks; else empty.
    """

    run: PolicyRun | None
    win_rate: float | None
    tie_rate: float | None
    loss_rate: float | None
    flip_rate: float | None
    unread: int
    equal_length: float | None
    scores: dict[str, float | None]
    mean_score: float | None
    accuracy: dict[str, float]
    tokens: float | None
    benchmarks: dict[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """Mean and standard error of the mean (sample deviation / √seeds); no error from a single seed."""

    mean: float
    error: float | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class MethodStats:
    """One method on one dataset in one reading, over its seeds.

    Attributes:
        win_interval: 95 % bootstrap interval of the win rate, resampling prompts with all seeds of each.
    """

    method: str
    data: str
    reading: str
    rows: int
    steps: int
    train_seconds: OverSeeds
    win_rate: OverSeeds | None
    win_interval: Interval
    tie_rate: OverSeeds | None
    flip_rate: OverSeeds | None
    unread: int
    equal_length: OverSeeds | None
    scores: dict[str, OverSeeds]
    mean_score: OverSeeds | None
    accuracy: dict[str, OverSeeds]
    tokens: OverSeeds | None
    benchmarks: dict[str, OverSeeds] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The gain of one dataset over another with one method in one reading.

    Attributes:
        gain: mean ± standard error of the differences, seed by seed.
        interval: 95 % bootstrap interval of it, resampling prompts with the differences of all their seeds.
        same_rows: number of seeds whose two policies were trained on the same rows with the same settings, so that
            there is no difference to measure.
    """

    method: str
    data: str
    over: str
    reading: str
    measure: str
    gain: OverSeeds
    interval: Interval
    same_rows: int = 0


def policy_stats(
    runs: Sequence[PolicyRun],
    responses: pa.Table,
    comparisons: pa.Table,
    verdicts: pa.Table,
    first_mode: str,
    *,
    benchmarks: Mapping[str, dict[str, float | None]] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> list[PolicyStats]:
    """The base, then every policy in the order of `runs`.

    Args:
        responses: of all models; `correct` (bool) where there is a checker.
        comparisons: of every policy with the base, by one judge; `model_a` and `model_b` name the two.
        verdicts: of the rubric judges on the responses (candidate_id holds a response_id).
        benchmarks: model → its scores.

    Raises:
        ValueError: comparisons of several judges, a pair of two policies, or a verdict on no response.
    """
    judges = judges_of(comparisons)
    if len(judges) > 1:
        raise ValueError(f"comparisons of one judge are needed, not of {', '.join(judges)}")
    named = name_models(verdicts, responses)
    lengths = pair_lengths(responses)
    found = []
    for run in [None, *runs]:
        label = BASE if run is None else run.label
        own = response_stats(responses.filter(pc.field("model") == label), models=(label,), draws=draws, seed=seed)
        by_mode = {stats.mode: stats for stats in own}
        scored = named.filter((pc.field("model") == label) & (pc.field("mode") == first_mode))
        scores, mean_score = rubric_means(scored)
        won = at_equal_length = None
        if run is not None:
            pairs = _pairs_of(comparisons, label)
            won = win_rate(pairs, *judges, draws=draws, seed=seed)
            # One draw: only the mean is used; the error shown is over seeds.
            controlled = length_controlled_score(decide_pairs(pairs, *judges), *lengths, draws=1)
            at_equal_length = controlled.score.mean
        found.append(
            PolicyStats(
                run=run,
                win_rate=None if won is None else won.win_rate,
                tie_rate=None if won is None else won.tie_rate,
                loss_rate=None if won is None else won.loss_rate,
                flip_rate=None if won is None else won.flip_rate,
                unread=0 if won is None else won.unread,
                equal_length=at_equal_length,
                scores=scores,
                mean_score=mean_score,
                accuracy={
                    mode: stats.accuracy.mean
                    for mode, stats in by_mode.items()
                    if stats.accuracy is not None and stats.accuracy.mean is not None
                },
                tokens=by_mode[first_mode].tokens.mean if first_mode in by_mode else None,
                benchmarks=(benchmarks or {}).get(label, {}),
            )
        )
    return found


def method_stats(
    policies: Sequence[PolicyStats], comparisons: pa.Table, *, draws: int = 2000, seed: int = 0
) -> list[MethodStats]:
    """Each method on each dataset in each reading, in the order of their first policy; the base is left out."""
    found = []
    for (method, data, reading), members in _groups(policies).items():
        runs = [policy.run for policy in members if policy.run is not None]
        found.append(
            MethodStats(
                method=method,
                data=data,
                reading=reading,
                rows=runs[0].rows,
                steps=runs[0].steps,
                train_seconds=_present(over_seeds(run.train_seconds for run in runs)),
                win_rate=over_seeds(policy.win_rate for policy in members),
                win_interval=_win_interval(comparisons, [run.label for run in runs], draws, seed),
                tie_rate=over_seeds(policy.tie_rate for policy in members),
                flip_rate=over_seeds(policy.flip_rate for policy in members),
                unread=sum(policy.unread for policy in members),
                equal_length=over_seeds(policy.equal_length for policy in members),
                scores={judge: s for judge in members[0].scores if (s := over_seeds(p.scores[judge] for p in members))},
                mean_score=over_seeds(policy.mean_score for policy in members),
                accuracy={
                    mode: _present(over_seeds(p.accuracy[mode] for p in members)) for mode in members[0].accuracy
                },
                tokens=over_seeds(policy.tokens for policy in members),
                benchmarks={
                    score: value
                    for score in members[0].benchmarks
                    if (value := over_seeds(p.benchmarks.get(score) for p in members))
                },
            )
        )
    return found


def differences(
    policies: Sequence[PolicyStats],
    over: str,
    responses: pa.Table,
    comparisons: pa.Table,
    verdicts: pa.Table,
    first_mode: str,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> list[Difference]:
    """Every dataset against the dataset `over`, method by method and reading by reading, of policies of the same seed:
    true accuracies, win rate, mean score. The tables are those of `policy_stats`."""
    groups = _groups(policies)
    named = name_models(verdicts, responses).filter(pc.field("mode") == first_mode)
    found = []
    for (method, data, reading), members in groups.items():
        others = {policy.run.seed: policy for policy in groups.get((method, over, reading), []) if policy.run}
        pairs = [(policy, others[policy.run.seed]) for policy in members if policy.run and policy.run.seed in others]
        if data == over or not pairs:
            continue
        sides = [
            _of_prompts([policy.run.label for policy in side if policy.run], responses, comparisons, named)
            for side in zip(*pairs, strict=True)
        ]
        for measure in sides[0]:
            known = [(a, b) for a, b in pairs if _value(a, measure) is not None and _value(b, measure) is not None]
            gain = over_seeds(_present(_value(a, measure)) - _present(_value(b, measure)) for a, b in known)
            trainings = [(a.run.training, b.run.training) for a, b in known if a.run and b.run]
            same = sum(one is not None and one == other for one, other in trainings)
            if gain is not None:
                bounds = None if measure == MEAN_SCORE else (-1.0, 1.0)
                drawn = bootstrap_gain(*sides[1][measure], *sides[0][measure], draws, seed, bounds=bounds)
                interval = _holding(drawn, gain.mean)
                found.append(Difference(method, data, over, reading, measure, gain, interval, same))
    return found


def equal_policies(policies: Iterable[PolicyStats]) -> dict[str, str]:
    """Label of each policy whose training has the rows and settings of an earlier one → label of the first of them."""
    first: dict[tuple[str, int, str], str] = {}
    found: dict[str, str] = {}
    for run in (policy.run for policy in policies if policy.run is not None):
        if run.training is not None and first.setdefault(run.training, run.label) != run.label:
            found[run.label] = first[run.training]
    return found


def over_seeds(values: Iterable[float | None]) -> OverSeeds | None:
    """Mean and standard error; None when there is no value. Seeds without a value are left out."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return OverSeeds(statistics.fmean(known), error, len(known))


def _groups(policies: Sequence[PolicyStats]) -> dict[tuple[str, str, str], list[PolicyStats]]:
    """Policies that differ in the seed alone, by method, dataset and reading."""
    groups: dict[tuple[str, str, str], list[PolicyStats]] = {}
    for policy in policies:
        if policy.run is not None:
            groups.setdefault((policy.run.method, policy.run.data, policy.run.reading), []).append(policy)
    return groups


def _value(policy: PolicyStats, measure: str) -> float | None:
    named = {WIN_RATE: policy.win_rate, MEAN_SCORE: policy.mean_score}
    return named[measure] if measure in named else policy.accuracy.get(measure.removeprefix(_ACCURACY))


def _of_prompts(
    labels: Sequence[str], responses: pa.Table, comparisons: pa.Table, named: pa.Table
) -> dict[str, tuple[list[float], list[str]]]:
    """Measure → its value for each prompt and policy, and the prompts; what is not known is left out."""
    own = responses.filter(pc.is_in(responses["model"], value_set=pa.array(labels)))
    found: dict[str, tuple[list[float], list[str]]] = {}
    if "correct" in own.column_names:
        for mode in sorted(own["mode"].unique().to_pylist()):
            known = own.filter((pc.field("mode") == mode) & pc.field("correct").is_valid())
            found[_ACCURACY + mode] = [float(c) for c in known["correct"].to_pylist()], known["prompt_id"].to_pylist()
    found[WIN_RATE] = _wins(comparisons, labels)
    scored = named.filter(pc.is_in(named["model"], value_set=pa.array(labels)))
    means = response_means(scored)
    prompts = dict(zip(scored["candidate_id"].to_pylist(), scored["prompt_id"].to_pylist(), strict=True))
    found[MEAN_SCORE] = list(means.values()), [prompts[response] for response in means]
    return found


def _holding(interval: Interval, mean: float) -> Interval:
    """The interval about this mean, widened to hold it: prompts that lack a seed weigh differently in the two."""
    if interval.low is None or interval.high is None:
        return dataclasses.replace(interval, mean=mean)
    return dataclasses.replace(interval, mean=mean, low=min(interval.low, mean), high=max(interval.high, mean))


def _present(value: T | None) -> T:
    assert value is not None
    return value


def _pairs_of(comparisons: pa.Table, label: str) -> pa.Table:
    """The comparisons of one policy with the base."""
    a, b = pc.field("model_a"), pc.field("model_b")
    return comparisons.filter(((a == label) & (b == BASE)) | ((a == BASE) & (b == label)))


def _win_interval(comparisons: pa.Table, labels: Sequence[str], draws: int, seed: int) -> Interval:
    return bootstrap_mean(*_wins(comparisons, labels), draws, seed, bounds=(0, 1))


def _wins(comparisons: pa.Table, labels: Sequence[str]) -> tuple[list[float], list[str]]:
    """1 for a win against the base and 0 otherwise, of each decided pair, and its prompt."""
    won: list[float] = []
    prompts: list[str] = []
    for label in labels:
        pairs = _pairs_of(comparisons, label)
        for judge in judges_of(pairs):
            decided = [d for d in decide_pairs(pairs, judge) if d.outcome != "unread"]
            won += [float(d.outcome == "win") for d in decided]
            prompts += [d.prompt_id for d in decided]
    return won, prompts
