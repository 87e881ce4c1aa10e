"""Warnings: what a reader should know before trusting the numbers."""

from collections.abc import Iterator

from ray_pipeline.agreement.panel import FAMILIES, family
from ray_pipeline.data.posterior_gate import warnings
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.metrics import RunMetrics, prefix_hit_rate
from ray_pipeline.policy.evaluation import Evaluation
from ray_pipeline.policy.response_stats import ResponseStats
from ray_pipeline.report.figures import percent, percent_interval
from ray_pipeline.stats.posterior import NEARLY_ONE
from ray_pipeline.stats.winrate import WinRate

MAX_CLASS_RATIO = 3.0
MIN_KAPPA = 0.2  # up to here Landis & Koch (1977) call agreement "slight"
MAX_ERROR_CORRELATION = 0.9
MAX_UNREAD = 0.05
MIN_ACCEPTANCE = 0.05
MAX_FLIP_RATE = 0.3
MIN_PROMPTS = 50
MAX_LENGTH_RATIO = 1.5
MAX_TRUNCATED = 0.1
# KTO (Ethayarajh et al. 2024, §4.2): λ_D·n_D / (λ_U·n_U) should lie in [1, 4/3]; a little slack for rounded weights.
KTO_BALANCE = (0.98, 4 / 3 + 0.02)


def cautions(data: ReportData, metrics: RunMetrics) -> list[str]:
    """All warnings in the order of the pipeline, as plain text."""
    found = [
        f"Nothing to report for stage {stage}: it has not run, or it left no output." for stage in data.missing_stages()
    ]
    found += _on_judging(metrics)
    found += [] if data.posterior is None else warnings(data.posterior)
    found += _on_labels(data, metrics)
    found += _on_training(metrics)
    if metrics.evaluation is not None:
        found += _on_evaluation(data, metrics.evaluation)
    found += _on_use(data, metrics)
    return found


def unusable(metrics: RunMetrics) -> list[str]:
    """Warnings about replies that could not be read, and about an empty class."""
    classes = (
        None if metrics.gate is None else [metrics.gate.labels[label].count for label in ("desirable", "undesirable")]
    )
    found = [line for line in _on_judging(metrics) if "could not be read" in line]
    return found if classes is None or all(classes) else [_empty_class(*classes), *found]


def _empty_class(desirable: int, undesirable: int) -> str:
    return f"One class is empty: {desirable} desirable and {undesirable} undesirable rows."


def _on_judging(metrics: RunMetrics) -> Iterator[str]:
    if metrics.judging is not None:
        for judge, stats in metrics.judging.judges.items():
            judged = stats.read + stats.unread
            if judged and stats.unread / judged > MAX_UNREAD:
                yield f"Judge {judge}: {percent(stats.unread / judged)} of {judged} verdicts could not be read."
            if stats.missing:
                yield f"Judge {judge}: {stats.missing} candidates have no verdict row at all."
        for pair in metrics.judging.kappas:
            if pair.value is not None and pair.value < MIN_KAPPA:
                yield (
                    f"Judges {pair.judge_a} and {pair.judge_b} barely agree on score classes "
                    f"(kappa {pair.value:.2f} over {pair.rows} rows)."
                )
        yield from _on_judges_that_are_one(metrics)
    if metrics.critic is not None:
        judged = metrics.critic.rows - metrics.critic.skipped
        if judged and metrics.critic.unread / judged > MAX_UNREAD:
            yield f"Critic: {percent(metrics.critic.unread / judged)} of {judged} critiques could not be read."


def _on_judges_that_are_one(metrics: RunMetrics) -> Iterator[str]:
    """Where the truth is known the errors decide: two judges who are nearly always right agree, and are still two."""
    assert metrics.judging is not None
    panel = metrics.judge_errors and metrics.judge_errors.best
    errors = {(p.judge_a, p.judge_b): p.correlation.mean for p in panel.pairs} if panel else {}
    for pair in metrics.judging.kappas:
        correlation = errors.get((pair.judge_a, pair.judge_b))
        who = f"Judges {pair.judge_a} and {pair.judge_b} are nearly interchangeable"
        advice = "the second adds calls and hardly any evidence"
        if correlation is not None and correlation > MAX_ERROR_CORRELATION:
            basis = "" if panel and panel.basis == "truth" else ", an estimate"
            yield f"{who} (correlation of errors {correlation:.2f}{basis}): {advice}."
        elif pair.value is not None and pair.value > NEARLY_ONE and not (panel and panel.basis == "truth"):
            found = f"kappa {pair.value:.3f} over {pair.rows} rows"
            yield f"{who} ({found}): {advice}, unless both are almost always right."


def _on_labels(data: ReportData, metrics: RunMetrics) -> Iterator[str]:
    if metrics.gate is None:
        return
    counts = {label: stats.count for label, stats in metrics.gate.labels.items()}
    desirable, undesirable = counts["desirable"], counts["undesirable"]
    if not desirable or not undesirable:
        yield _empty_class(desirable, undesirable)
    elif max(desirable, undesirable) / min(desirable, undesirable) > MAX_CLASS_RATIO:
        yield f"Class imbalance: {desirable} desirable to {undesirable} undesirable rows."
    if metrics.gate.acceptance is not None and metrics.gate.acceptance < MIN_ACCEPTANCE:
        yield f"The gate kept only {percent(metrics.gate.acceptance)} of {metrics.gate.rows} candidates."
    incomplete = metrics.gate.labels["incomplete"]
    if incomplete.share is not None and incomplete.share > MAX_UNREAD:
        yield f"{percent(incomplete.share)} of the candidates are incomplete: a score or critique was not read."
    if metrics.people is not None and metrics.people.unknown:
        yield f"Labels by people: {metrics.people.unknown} are of candidates of another run, and are not counted."
    weights = data.kto_weights or {}
    if desirable and undesirable and {"desirable_weight", "undesirable_weight"} <= weights.keys():
        kto = (data.dataset_counts or {}).get("kto", {})
        rows = kto.get("desirable", desirable), kto.get("undesirable", undesirable)
        weighted = weights["undesirable_weight"] * rows[1]
        balance = weights["desirable_weight"] * rows[0] / weighted if weighted else float("inf")
        if not KTO_BALANCE[0] <= balance <= KTO_BALANCE[1]:
            yield (
                f"KTO weights leave desirable : undesirable at {balance:.2f}; the method's authors advise 1 to 1.33."
            )


def _on_training(metrics: RunMetrics) -> Iterator[str]:
    if metrics.training is None:
        return
    if not metrics.training.steps:
        yield "Training made no optimiser step."
    if metrics.training.not_finite:
        yield f"Training logged {metrics.training.not_finite} losses that are not finite."
    margin = metrics.training.trends.get("rewards_margins")
    if margin is not None and margin.last is not None and margin.last <= 0:
        yield f"The reward margin ended at {margin.last:.3f}: the trained policy does not prefer the chosen answers."


def _on_evaluation(data: ReportData, evaluation: Evaluation) -> Iterator[str]:
    curators = set(data.curating_models.values())
    for judge, model in sorted(data.evaluating_models.items()):
        if model in curators:
            yield f"Evaluating judge {judge} ({model}) also curated the data: it may prefer what it taught."
        if data.candidate_model and family(model, FAMILIES) == family(data.candidate_model, FAMILIES):
            yield (
                f"Evaluating judge {judge} ({model}) is of the same family as the policy ({data.candidate_model}): "
                "judges prefer answers like their own."
            )
    for rate in evaluation.win_rates:
        yield from _on_win_rate(rate)
    for judge, controlled in evaluation.length_controlled.items():
        if controlled.score.mean is None:
            yield (
                f"Judge {judge}: no score at equal length, because the policy's responses are "
                f"{'longer' if (controlled.mean_difference or 0) > 0 else 'shorter'} than the base's in almost all of "
                f"{controlled.pairs} pairs; the win rate may be an effect of length."
            )
    by_mode: dict[str, dict[str, ResponseStats]] = {}
    for stats in evaluation.responses:
        by_mode.setdefault(stats.mode, {})[stats.model] = stats
        if stats.rows and stats.truncated / stats.rows > MAX_TRUNCATED:
            yield f"{stats.model} ({stats.mode}): {percent(stats.truncated / stats.rows)} of responses were cut off."
    for mode, models in by_mode.items():
        base, policy = models.get("base"), models.get("policy")
        if base and policy and base.chars.mean and (policy.chars.mean or 0) / base.chars.mean > MAX_LENGTH_RATIO:
            yield (
                f"The policy's {mode} responses are {(policy.chars.mean or 0) / base.chars.mean:.1f} times as long "
                "as the base's: judges often prefer length."
            )


def _on_win_rate(rate: WinRate) -> Iterator[str]:
    low, high = rate.score.low, rate.score.high
    if low is not None and high is not None and low <= 0.5 <= high:
        yield f"The win-rate interval of judge {rate.judge} ({percent_interval(rate.score)}) contains 50 %."
    if rate.pairs and rate.unread / rate.pairs > MAX_UNREAD:
        yield (
            f"Judge {rate.judge} left {rate.unread} of {rate.pairs} pairs unread: had all gone one way, the score "
            f"would be {percent(rate.score_worst)} or {percent(rate.score_best)}."
        )
    if rate.flip_rate is not None and rate.flip_rate > MAX_FLIP_RATE:
        yield f"Judge {rate.judge} picks another model in {percent(rate.flip_rate)} of pairs when the order is swapped."
    if rate.score.groups < MIN_PROMPTS:
        yield f"Judge {rate.judge} compared answers to {rate.score.groups} prompts only; intervals are rough."


def _on_use(data: ReportData, metrics: RunMetrics) -> Iterator[str]:
    for use in data.stage_use or ():
        several = metrics.judging is not None and len(metrics.judging.judges) > 1
        if use.stage == "judge" and use.calls and several and prefix_hit_rate(use) == 0:
            yield (
                "Stage judge never hit the prefix cache, as far as its engine reports: judges process the shared text "
                "again on every call."
            )
        if use.errors:
            yield f"Stage {use.stage}: {use.errors} errors."
        if use.cut_prompts:
            yield (
                f"Stage {use.stage}: the server read only a part of the prompt in {use.cut_prompts} calls (prompt_cut)."
            )
