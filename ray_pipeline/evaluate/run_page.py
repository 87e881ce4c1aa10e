"""report.html of a run: everything that report.md says, with charts and a browser of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ray_pipeline.bench.page import benchmark_blocks
from ray_pipeline.data.gate_stats import GateStats
from ray_pipeline.data.judge_stats import JudgingStats
from ray_pipeline.evaluate.data import ReportData, StageUse
from ray_pipeline.evaluate.distributions import Histogram, length_histogram, score_histogram
from ray_pipeline.evaluate.headline import Headline, percent, percent_interval
from ray_pipeline.evaluate.metrics import Evaluation, RunMetrics, Step, as_json, prefix_hit_rate, total_use
from ray_pipeline.evaluate.training_curve import curve
from ray_pipeline.report.charts import Bins, Chart, Dot, Series, bars, dots, histogram, lines, stacked
from ray_pipeline.report.examples_data import Examples, collect_examples
from ray_pipeline.report.markdown import number, signed
from ray_pipeline.report.page import (
    Block,
    Browser,
    Cell,
    Folded,
    Funnel,
    FunnelStep,
    Heat,
    HeatMap,
    Page,
    Section,
    Table,
    Text,
    panels,
    render_page,
)
from ray_pipeline.stats.bootstrap import Interval
from ray_pipeline.stats.protocol import fixed_fields

LABEL_COLOURS = {
    "desirable": "blue",
    "undesirable": "vermilion",
    "discard": "grey",
    "abstain": "purple",
    "incomplete": "orange",
}
_TONES = {"better": "good", "worse": "bad"}
_CURVES = {
    "loss": "loss",
    "rewards_margins": "reward margin (chosen − rejected)",
    "kl": "KL to the reference",
    "rewards_accuracies": "reward accuracy",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}


def run_page(data: ReportData, metrics: RunMetrics, first_line: Headline, warnings: Sequence[str]) -> str:
    """The page as HTML; a part that the run does not have is left out."""
    sections = [
        _funnel(data, metrics),
        _labels(data, metrics.gate),
        _judges(data, metrics),
        _critic(metrics),
        _training(data, metrics),
        _evaluation(metrics.evaluation),
        _benchmarks(data),
        _use(data.stage_use or ()),
        _examples(collect_examples(data)),
        _identity(data),
    ]
    page = Page(
        title=f"Run {data.run.name}",
        subtitle=f"Quorum, workflow {data.run.workflow}"
        + (f", configuration {data.run.config_digest[:12]}" if data.run.config_digest else ""),
        headline=first_line.text,
        tone=_TONES.get(first_line.verdict, "unsure"),
        tiles=_tiles(data, metrics),
        warnings=warnings,
        sections=[section for section in sections if section is not None],
    )
    return render_page(page)


def _tiles(data: ReportData, metrics: RunMetrics) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if data.prompt_counts is not None:
        found.append((number(data.prompt_counts.get("kept", 0)), "prompts"))
    if data.candidates is not None:
        found.append((number(len(data.candidates)), "candidates"))
    if metrics.gate is not None:
        found.append((percent(metrics.gate.acceptance), "kept by the gate"))
    if metrics.judging is not None and metrics.judging.alpha is not None:
        found.append((number(metrics.judging.alpha), "Krippendorff's alpha"))
    if metrics.evaluation is not None:
        for rate in metrics.evaluation.win_rates[:1]:
            found.append((percent(rate.score.mean), f"score against base, judge {rate.judge}"))
        for mode, gain in metrics.evaluation.accuracy_gains.items():
            found.append((f"{signed(100 * (gain.mean or 0), 1)} pts", f"true accuracy, {mode}"))
    use = total_use(data.stage_use or ())
    if use.calls is not None:
        found.append((number(use.calls), "LLM calls made"))
    if use.cost:
        found.append((f"{use.cost:.4g}", "cost, in the unit of the prices"))
    return found


def _funnel(data: ReportData, metrics: RunMetrics) -> Section | None:
    if not metrics.funnel:
        return None
    most = max(step.rows for step in metrics.funnel)
    steps = [
        FunnelStep(step.name, step.note, number(step.rows), step.rows / most if most else 0.0, _funnel_colour(step))
        for step in metrics.funnel
    ]
    blocks: list[Block] = [Funnel(steps)]
    guards = {reason: kept_out for reason, kept_out in (data.dataset_guards or {}).items() if kept_out}
    if guards:
        out: list[list[str | Cell]] = [[reason, number(count)] for reason, count in sorted(guards.items())]
        blocks.append(Table(["kept out of the data sets by", "rows or pairs"], out))
    if data.dataset_counts:
        parts: list[list[str | Cell]] = [
            [name, part, number(count)]
            for name, counts in sorted(data.dataset_counts.items())
            for part, count in counts.items()
        ]
        blocks.append(Table(["data set", "part", "rows"], parts, text_columns=2))
    return Section("funnel", "Funnel", blocks)


def _funnel_colour(step: Step) -> str:
    if step.name == "labelled":
        return LABEL_COLOURS.get(step.note, "grey")
    return "grey" if "dropped" in step.name else "green" if step.note == "train and val" else "blue"


def _labels(data: ReportData, gate: GateStats | None) -> Section | None:
    if gate is None or data.decisions is None or data.candidates is None:
        return None
    said = f"{percent(gate.acceptance)} of {number(gate.rows)} candidates were kept (desirable or undesirable)."
    if gate.gap is not None:
        said += (
            f" The two classes are {number(gate.gap)} points apart: desirable {_spread(gate.desirable)}, undesirable "
            f"{_spread(gate.undesirable)} (final score, mean ± sd)."
        )
    rows: list[list[str | Cell]] = [
        [
            label,
            Cell(number(stats.count), bar=stats.share or 0.0),
            percent(stats.share),
            f"{number(stats.chars.mean, 0)} ± {number(stats.chars.sd, 0)}",
            f"{number(stats.tokens.mean, 1)} ± {number(stats.tokens.sd, 1)}",
        ]
        for label, stats in gate.labels.items()
    ]
    measure = (
        "tokens" if data.candidates.column("completion_tokens").null_count < len(data.candidates) else "characters"
    )
    scores = score_histogram(data.decisions)
    lengths = length_histogram(data.decisions, data.candidates, measure)
    drawn = panels(
        _by_label("Final score by label", scores, "final score", LABEL_COLOURS, shares=False),
        _by_label("Final score, desirable and undesirable", scores, "final score", _kept(), shares=True),
        _by_label(f"Length, desirable and undesirable ({measure})", lengths, measure, _kept(), shares=True),
    )
    return Section(
        "labels",
        "Labels",
        [Text(said), Table(["label", "candidates", "share", "characters", "tokens"], rows), *drawn],
    )


def _kept() -> dict[str, str]:
    return {label: LABEL_COLOURS[label] for label in ("desirable", "undesirable")}


def _by_label(
    title: str, found: Histogram | None, x_title: str, colours: Mapping[str, str], *, shares: bool
) -> Chart | None:
    if found is None:
        return None
    bins = [
        Bins(label, colour, found.edges, found.counts[label])
        for label, colour in colours.items()
        if label in found.counts
    ]
    return histogram(title, bins, x_title, shares=shares, note="as shares of each label" if shares else "")


def _spread(spread: Any) -> str:
    return f"{number(spread.mean)} ± {number(spread.sd)}"


def _judges(data: ReportData, metrics: RunMetrics) -> Section | None:
    judging = metrics.judging
    if judging is None:
        return None
    rows: list[list[str | Cell]] = [
        [
            judge,
            ", ".join(f"{status} {count:,}" for status, count in stats.parse_status.items()),
            number(stats.read),
            number(stats.unread),
            number(stats.skipped),
            number(stats.score.mean),
            number(stats.score.sd),
        ]
        for judge, stats in judging.judges.items()
    ]
    columns = ["judge", "replies by status", "read", "unread", "skipped", "mean", "sd"]
    blocks: list[Block] = [Table(columns, rows, text_columns=2), *panels(*_score_charts(judging))]
    if judging.kappas:
        blocks.append(_kappa_map(metrics))
        blocks.append(
            Text(
                f"Cohen's kappa over three classes (score ≥ {data.desirable_from:g}, ≤ {data.undesirable_to:g}, "
                f"between), with 95 % intervals by a bootstrap over prompts. Krippendorff's alpha (interval): "
                f"{number(judging.alpha, 3)} over {number(judging.agreement_rows)} candidates"
                + (" of the audit slice." if data.agreement_on is not None else ".")
            )
        )
    return Section("judges", "Judges", blocks)


def _score_charts(judging: JudgingStats) -> list[Chart]:
    read = {name: stats for name, stats in judging.judges.items() if stats.read}
    if not read:
        return []
    ends = (
        min([1, *(min(stats.histogram) for stats in read.values())]),
        max([10, *(max(stats.histogram) for stats in read.values())]),
    )
    top = max(max(stats.histogram.values()) for stats in read.values())
    return [
        bars(f"{name}: mean {stats.score.mean:.2f}", stats.histogram, ends, top, "score")
        for name, stats in read.items()
    ]


def _kappa_map(metrics: RunMetrics) -> HeatMap:
    assert metrics.judging is not None
    bounds = {(i.judge_a, i.judge_b): i for i in metrics.kappa_intervals}
    cells: dict[tuple[str, str], Heat] = {}
    for pair in metrics.judging.kappas:
        found = bounds.get((pair.judge_a, pair.judge_b))
        below = f"{pair.rows:,} rows"
        if found is not None and found.low is not None and found.high is not None:
            below = f"{found.low:.2f} to {found.high:.2f}"
        heat = Heat(pair.value, "undefined" if pair.value is None else f"{pair.value:.2f}", pair.reason or below)
        cells[pair.judge_a, pair.judge_b] = cells[pair.judge_b, pair.judge_a] = heat
    names = list(metrics.judging.judges)
    return HeatMap("Agreement of the judges", names, [(a, [cells.get((a, b)) for b in names]) for a in names])


def _critic(metrics: RunMetrics) -> Section | None:
    critic = metrics.critic
    if critic is None:
        return None
    read = critic.flawed + critic.sound
    said = (
        f"{number(critic.flawed)} of {number(read)} read critiques found a flaw ({percent(critic.flawed_share)}); "
        f"{number(critic.unread)} could not be read, {number(critic.skipped)} were skipped."
    )
    rows: list[list[str | Cell]] = [
        [failure, Cell(number(count), bar=count / read if read else 0.0)]
        for failure, count in critic.failure_types.items()
    ]
    return Section("critic", "Critic", [Text(said), Table(["failure type", "critiques"], rows)])


def _training(data: ReportData, metrics: RunMetrics) -> Section | None:
    if metrics.training is None or data.train_metrics is None:
        return None
    charts = []
    for measure, title in _CURVES.items():
        series = [
            Series(name, colour, xs.tolist(), ys.tolist(), dashed)
            for name, colour, dashed, (xs, ys) in (
                ("train", "blue", False, curve(data.train_metrics, measure, train=True)),
                ("validation", "vermilion", True, curve(data.train_metrics, measure, train=False)),
            )
            if len(xs)
        ]
        charts.append(lines(title, series, "optimiser step"))
    rows: list[list[str | Cell]] = [
        [measure, number(trend.first, 4), number(trend.last, 4), number(trend.validation, 4)]
        for measure, trend in metrics.training.trends.items()
    ]
    blocks: list[Block] = [
        Text(
            f"{number(metrics.training.steps)} optimiser steps. First and last are means over the first and last tenth "
            "of the logged steps."
        ),
        *panels(*charts),
        Table(["measure", "first", "last", "validation"], rows),
    ]
    if data.kto_weights:
        weights = ", ".join(f"{name} {weight:.3f}" for name, weight in sorted(data.kto_weights.items()))
        blocks.append(Text(f"KTO weights: {weights}."))
    if data.train_settings:
        blocks.append(Folded("Training settings, as they took effect", _as_yaml(data.train_settings)))
    return Section("training", "Training", blocks)


def _evaluation(evaluation: Evaluation | None) -> Section | None:
    if evaluation is None:
        return None
    blocks: list[Block] = [*panels(*_evaluation_charts(evaluation))]
    if evaluation.win_rates:
        blocks.append(
            Text(
                "A win counts only if both orders of the answers agree; score = wins + half the ties. Intervals: 95 %, "
                "bootstrap over prompts. A flip is a pair on which the two orders name different models."
            )
        )
        blocks.append(_win_table(evaluation))
    if evaluation.length_controlled:
        blocks += _length_controlled(evaluation)
    if evaluation.protocols:
        blocks.append(_protocols(evaluation))
    if evaluation.responses:
        rows: list[list[str | Cell]] = [
            [
                r.model,
                r.mode,
                number(r.rows),
                number(r.chars.mean, 0),
                number(r.tokens.mean, 1),
                number(r.truncated),
                percent(r.accuracy.mean) if r.accuracy else "not known",
                percent_interval(r.accuracy) if r.accuracy else "–",
            ]
            for r in evaluation.responses
        ]
        columns = ["model", "decoding", "responses", "characters", "tokens", "cut off", "true accuracy", "interval"]
        blocks.append(Table(columns, rows, text_columns=2, title="Answers"))
    for mode, gain in evaluation.accuracy_gains.items():
        blocks.append(Text(f"True accuracy, {mode}: changed by {_points(gain)} over {gain.groups:,} prompts."))
    if evaluation.rubrics:
        rows = [
            [r.judge, r.mode, number(r.base.mean), number(r.policy.mean), signed(r.gain.mean), _bounds(r.gain)]
            for r in evaluation.rubrics
        ]
        columns = ["rubric judge", "decoding", "base", "policy", "change", "interval"]
        blocks.append(Table(columns, rows, text_columns=2, title="Rubric scores"))
    if evaluation.perplexity:
        rows = [
            [model, number(p.ppl, 3), number(p.tokens), number(p.rows)]
            for model, p in sorted(evaluation.perplexity.items())
        ]
        blocks.append(Table(["model", "perplexity", "tokens", "rows"], rows, title="Perplexity of held-out answers"))
        blocks.append(
            Text("Perplexity says how likely the held-out answers are to a model, not which model is better.")
        )
    return Section("evaluation", "Policy against base", blocks)


def _benchmarks(data: ReportData) -> Section | None:
    return Section("benchmarks", "Benchmarks", benchmark_blocks(data.benchmarks)) if data.benchmarks else None


def _win_table(evaluation: Evaluation) -> Table:
    rows: list[list[str | Cell]] = [
        [
            rate.judge,
            f"{rate.wins:,} ({percent(rate.win_rate)})",
            f"{rate.ties:,} ({percent(rate.tie_rate)})",
            f"{rate.losses:,} ({percent(rate.loss_rate)})",
            percent(rate.score.mean),
            percent_interval(rate.score),
            percent(rate.flip_rate),
            f"{rate.unread:,} of {rate.pairs:,}",
            f"{percent(rate.score_worst)} to {percent(rate.score_best)}",
            evaluation.fingerprint(rate.judge),
        ]
        for rate in evaluation.win_rates
    ]
    columns = ["judge", "wins", "ties", "losses", "score", "95 %", "flips", "unread", "whatever the unread say"]
    columns += ["protocol"]
    return Table(columns, rows, title="Win rates")


def _protocols(evaluation: Evaluation) -> Table:
    rows: list[list[str | Cell]] = [
        [
            measured.fingerprint,
            measured.name,
            ", ".join(f"{field} {value}" for field, value in fixed_fields(measured.protocol).items()),
        ]
        for of_judge in evaluation.protocols.values()
        for measured in of_judge.values()
    ]
    return Table(["protocol", "what it is", "what it fixes"], rows, text_columns=3, title="Protocols of the win rates")


def _length_controlled(evaluation: Evaluation) -> list[Block]:
    """The win rates once more, at equal length; a judge without a pair of known lengths is not in the table."""
    rows: list[list[str | Cell]] = [
        [
            judge,
            percent(found.score.mean),
            percent_interval(found.score),
            percent(found.raw.mean),
            signed(found.mean_difference, 0),
            signed(found.length_weight),
            number(found.pairs),
            number(found.unread + found.unmeasured),
            evaluation.fingerprint(judge, "length_controlled"),
        ]
        for judge, found in evaluation.length_controlled.items()
    ]
    columns = ["judge", "score at equal length", "95 %", "score as it was", "policy longer by, characters"]
    columns += ["weight of length", "pairs", "left out", "protocol"]
    return [
        Table(columns, rows, title="Win rates, length-controlled"),
        Text(
            "At equal length: a logistic model of the verdicts on the difference in length, read where that is zero. A "
            "negative weight says that longer answers win. Left out are pairs without both verdicts or both lengths."
        ),
    ]


def _evaluation_charts(evaluation: Evaluation) -> list[Chart | None]:
    rates = [
        (
            rate.judge,
            [("blue", rate.win_rate or 0.0), ("tie", rate.tie_rate or 0.0), ("vermilion", rate.loss_rate or 0.0)],
            rate.score,
        )
        for rate in evaluation.win_rates
        if rate.decided
    ]
    names = [
        ("blue", "policy wins"),
        ("tie", "tie"),
        ("vermilion", "base wins"),
        ("ink", "score, 95 %"),
        ("mark", "no change"),
    ]
    by_mode: dict[str, list[Dot]] = {}
    for r in evaluation.responses:
        if r.accuracy is not None:
            by_mode.setdefault(r.mode or "decoding not named", []).append(Dot(r.model, _model(r.model), r.accuracy))
    several = len({r.mode for r in evaluation.rubrics}) > 1
    rubrics = [
        (
            f"{r.judge}, {r.mode}" if several else r.judge,
            [Dot("base", _model("base"), r.base), Dot("policy", _model("policy"), r.policy)],
        )
        for r in evaluation.rubrics
    ]
    means = [d.estimate.mean for _, found in rubrics for d in found if d.estimate.mean is not None]
    return [
        stacked("Pairwise, both orders", rates, names),
        dots("True accuracy", list(by_mode.items()), (0.0, 1.0)),
        dots("Mean rubric score", rubrics, (0.0, max([10.0, *means])), shares=False),
    ]


def _model(name: str) -> str:
    return {"base": "grey", "policy": "blue"}.get(name, "green")


def _points(gain: Interval) -> str:
    mean = f"{signed(100 * (gain.mean or 0.0), 1)} points"
    if gain.low is None or gain.high is None:
        return f"{mean} (no interval)"
    return f"{mean} (95 % interval {signed(100 * gain.low, 1)} to {signed(100 * gain.high, 1)})"


def _bounds(gain: Interval) -> str:
    return "–" if gain.low is None or gain.high is None else f"{signed(gain.low)} to {signed(gain.high)}"


def use_table(stages: Sequence[StageUse]) -> Table:
    """What each stage took, its seconds as bars, and the sum. The column of costs is there when anything cost."""
    total = total_use(stages)
    slowest = max((use.seconds or 0.0 for use in stages), default=0.0)
    columns = ["stage", "rows", "calls", "log hits", "prompt tokens", "new tokens", "prefix hits", "seconds"]
    priced = bool(total.cost)
    rows: list[list[str | Cell]] = []
    for use in [*stages, total]:
        share = (use.seconds or 0.0) / slowest if slowest and use is not total else None
        row: list[str | Cell] = [
            use.stage,
            "" if use is total else number(use.rows),
            number(use.calls),
            number(use.log_hits),
            number(use.prompt_tokens),
            number(use.completion_tokens),
            percent(prefix_hit_rate(use)),
            Cell(number(use.seconds, 1), bar=share),
        ]
        rows.append([*row, *([number(use.cost, 4)] if priced else [])])
    return Table([*columns, *(["cost"] if priced else [])], rows)


def _use(stages: Sequence[StageUse]) -> Section | None:
    if not stages:
        return None
    said = "Log hits are calls that the call log could answer. Prefix hits are the share of prompt tokens in the cache."
    return Section("use", "What it took", [use_table(stages), Text(said)])


def _examples(examples: Examples | None) -> Section | None:
    if examples is None or not examples.rows:
        return None
    return Section("examples", "Examples", [Browser(examples)])


def _identity(data: ReportData) -> Section:
    blocks: list[Block] = []
    if data.run.models:
        rows: list[list[str | Cell]] = [[role, model] for role, model in sorted(data.run.models.items())]
        blocks.append(Table(["role", "model"], rows, text_columns=2))
    if data.run.fingerprints:
        rows = [[stage, found] for stage, found in data.run.fingerprints.items()]
        blocks.append(Table(["stage", "fingerprint"], rows, text_columns=2))
    blocks.append(Text(f"Configuration digest: {data.run.config_digest or 'unknown'}."))
    if data.config:
        blocks.append(Folded("Configuration, as resolved", _as_yaml(data.config)))
    return Section("identity", "Configuration and fingerprints", blocks)


def _as_yaml(value: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(as_json(value), sort_keys=False, allow_unicode=True, width=100)
    return text.rstrip()
