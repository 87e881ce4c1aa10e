"""The first sentences of the report: whether the policy got better, by which measure, and how certain that is; of a run
without a policy, what data it made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.metrics import RunMetrics, dataset_rows
from ray_pipeline.policy.evaluation import Evaluation
from ray_pipeline.report.figures import number, percent, percent_interval
from ray_pipeline.stats.bootstrap import Interval
from ray_pipeline.stats.winrate import WinRate

Direction = Literal["better", "worse", "unclear"]
Verdict = Literal["better", "worse", "unclear", "mixed", "unknown", "data"]

#: Kinds of dataset and what their rows are called.
ROWS = {"kto": "KTO rows", "dpo": "DPO pairs", "sft": "SFT rows"}
_OPENINGS: dict[Verdict, str] = {
    "better": "The policy got better.",
    "worse": "The policy got worse.",
    "unclear": "Inconclusive: no significant difference between policy and base.",
    "mixed": "The measures disagree on whether the policy got better.",
    "unknown": "Whether the policy got better is not known:",
}


@dataclass(frozen=True)
class Headline:
    """`verdict` in one word (`data` for a run without a policy), `text` in a few sentences of plain text."""

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class _Evidence:
    direction: Direction
    text: str
    true: bool = False  # measured against known answers, not by a judge


def headline(evaluation: Evaluation | None, missing_stages: list[str], on_data: Sequence[str] = ()) -> Headline:
    """Weigh win rates and true accuracy, or rubric scores where there is neither.

    A measure counts only when its interval excludes "no change". It decides when no other measure contradicts it, and
    true accuracy, where it is known, contradicts a judge also by showing no change: a judge can be pleased by what is
    not right. Without any measure, what is wrong with the data (`on_data`, full sentences) comes first.
    """
    evidence = [] if evaluation is None else _evidence(evaluation)
    if not evidence:
        why = f"the run has no {', '.join(missing_stages)} yet." if missing_stages else "nothing could be measured."
        return Headline("unknown", " ".join([*on_data, f"{_OPENINGS['unknown']} {why}"]))
    directions = {e.direction for e in evidence} - {"unclear"}
    denied = {e.direction for e in evidence if e.true} == {"unclear"}
    verdict: Verdict = "unclear"
    if directions:
        verdict = "mixed" if denied or len(directions) > 1 else directions.pop()
    text = "; ".join(e.text for e in evidence)
    return Headline(verdict, f"{_OPENINGS[verdict]} {text[0].upper()}{text[1:]}.")


def data_headline(data: ReportData, metrics: RunMetrics, on_data: Sequence[str] = ()) -> Headline:
    """What data a run without a policy made: rows, how many candidates were kept, how far the judges agree, and how
    well a reward model learned the pairs.

    Args:
        on_data: what is wrong with the data, in full sentences; comes first.
    """
    said = list(on_data)
    if data.dataset_counts is None:
        said.append(f"The run has no {', '.join(data.missing_stages()) or 'datasets'} yet.")
    else:
        sizes = {kind: dataset_rows(rows) for kind, rows in data.dataset_counts.items()}
        made = " and ".join(f"{number(rows)} {ROWS.get(kind, f'{kind} rows')}" for kind, rows in sizes.items())
        kept = data.prompt_counts and data.prompt_counts.get("kept")
        said.append(f"{made}{f' from {number(kept)} prompts' if kept else ''}.")
    if metrics.gate is not None and metrics.gate.acceptance is not None:
        said.append(f"{percent(metrics.gate.acceptance)} of {number(metrics.gate.rows)} candidates were kept.")
    if (judging := metrics.judging) is not None and judging.alpha is not None:
        said.append(
            f"Agreement of the {len(judging.judges)} judges: Krippendorff's alpha {judging.alpha:.2f} (1: perfect, "
            "0: by chance)."
        )
    reward = None if metrics.training is None else metrics.training.trends.get("rewards_accuracies")
    if reward is not None and reward.validation is not None:
        said.append(
            f"The reward model scores the chosen response higher in {percent(reward.validation)} of held-out pairs."
        )
    return Headline("data", " ".join(said))


def direction(interval: Interval, no_change: float) -> Direction:
    """The side of `no_change` that contains the whole interval."""
    if interval.low is None or interval.high is None or interval.low <= no_change <= interval.high:
        return "unclear"
    return "better" if interval.low > no_change else "worse"


def _evidence(evaluation: Evaluation) -> list[_Evidence]:
    found = [_accuracy(evaluation, mode, gain) for mode, gain in sorted(evaluation.accuracy_gains.items())]
    found += [_win_rate(rate) for rate in evaluation.win_rates if rate.decided]
    if not found:
        found = [_rubric(r.judge, r.gain) for r in evaluation.rubrics if r.gain.mean is not None]
    return found


def _accuracy(evaluation: Evaluation, mode: str, gain: Interval) -> _Evidence:
    by_model = {r.model: r.accuracy.mean for r in evaluation.responses if r.mode == mode and r.accuracy}
    base, policy = by_model.get("base"), by_model.get("policy")
    points = _signed_points(gain)
    return _Evidence(
        direction(gain, 0.0),
        f"true accuracy with {mode or 'its'} decoding went from {percent(base)} to {percent(policy)} ({points}, "
        f"{gain.groups} prompts)",
        true=True,
    )


def _win_rate(rate: WinRate) -> _Evidence:
    text = (
        f"judge {rate.judge} scored it {percent(rate.score.mean)} against its base (50 % is no change; 95 % interval "
        f"{percent_interval(rate.score)}, {rate.score.groups} prompts, wins only where both orders agree)"
    )
    found = direction(rate.score, 0.5)
    worst, best = rate.score_worst, rate.score_best
    if found != "unclear" and worst is not None and best is not None and worst <= 0.5 <= best:
        return _Evidence("unclear", f"{text}, but the {rate.unread} unread pairs could have turned that")
    return _Evidence(found, text)


def _rubric(judge: str, gain: Interval) -> _Evidence:
    bounds = "no interval" if gain.low is None else f"95 % interval {gain.low:+.2f} to {gain.high:+.2f}"
    return _Evidence(
        direction(gain, 0.0), f"mean {judge} score changed by {gain.mean:+.2f} ({bounds}, {gain.groups} prompts)"
    )


def _signed_points(gain: Interval) -> str:
    mean = 0.0 if gain.mean is None else gain.mean
    if gain.low is None or gain.high is None:
        return f"{100 * mean:+.1f} points, no interval"
    return f"{100 * mean:+.1f} points, 95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
