"""Sections of a run's page about its data: labels, judges, critic, and the datasets that were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.data.checklist_stats import ChecklistStats
from ray_pipeline.data.critic_stats import CriticStats
from ray_pipeline.data.decontamination import contamination_lines
from ray_pipeline.data.distributions import Histogram, length_histogram, score_histogram
from ray_pipeline.data.gate_stats import GateStats, GeneratorStats, SourceAgreement
from ray_pipeline.data.judge_stats import JudgeStats, JudgingStats
from ray_pipeline.report.charts import Bins, Chart, bars, histogram
from ray_pipeline.report.figures import number, percent, span
from ray_pipeline.report.page import Block, Cell, Heat, HeatMap, Rows, Section, Table, Text, panels
from ray_pipeline.stats.columns import Spread
from ray_pipeline.stats.kappa import KappaInterval

LABEL_COLOURS = {
    "desirable": "blue",
    "undesirable": "vermilion",
    "discard": "grey",
    "abstain": "purple",
    "incomplete": "orange",
}
_KEPT = {label: LABEL_COLOURS[label] for label in ("desirable", "undesirable")}


def labels_section(gate: GateStats, decisions: pa.Table, candidates: pa.Table) -> Section:
    """What the gate decided, with final scores and lengths by label."""
    summary = f"{percent(gate.acceptance)} of {number(gate.rows)} candidates were kept (desirable or undesirable)."
    if gate.gap is not None:
        summary += (
            f" The two classes are {number(gate.gap)} points apart: desirable {_spread(gate.desirable)}, undesirable "
            f"{_spread(gate.undesirable)} (final score, mean ± sd)."
        )
    summary += f" The judges' scores of one candidate have a variance of {number(gate.score_variance.mean)} on average."
    rows: Rows = [
        [
            label,
            Cell(number(stats.count), bar=stats.share or 0.0),
            percent(stats.share),
            _spread(stats.chars, 0),
            _spread(stats.tokens, 1),
        ]
        for label, stats in gate.labels.items()
    ]
    measure = "tokens" if candidates.column("completion_tokens").null_count < len(candidates) else "characters"
    scores = score_histogram(decisions)
    lengths = length_histogram(decisions, candidates, measure)
    charts = panels(
        _by_label("Final score by label", scores, "final score", LABEL_COLOURS, shares=False),
        _by_label("Final score, desirable and undesirable", scores, "final score", _KEPT, shares=True),
        _by_label(f"Length, desirable and undesirable ({measure})", lengths, measure, _KEPT, shares=True),
    )
    table = Table(["label", "candidates", "share", "characters", "tokens"], rows)
    return Section("labels", "Labels", [Text(summary), table, *charts])


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


def _spread(spread: Spread, digits: int = 2) -> str:
    return f"{number(spread.mean, digits)} ± {number(spread.sd, digits)}"


def generators_section(generators: Sequence[GeneratorStats], source: SourceAgreement | None) -> Section | None:
    """What the gate kept of each generator, and whether the judges agree with the source of the user's completions."""
    blocks: list[Block] = []
    if generators:
        rows: Rows = [
            [
                one.name,
                number(one.candidates),
                number(one.desirable),
                number(one.undesirable),
                percent((one.desirable + one.undesirable) / one.candidates),
                _spread(one.score),
            ]
            for one in generators
        ]
        columns = ["generator", "candidates", "desirable", "undesirable", "kept", "mean score ± sd"]
        blocks.append(Table(columns, rows))
    if source is not None:
        known = source.agree + source.equal + source.disagree
        share = f" ({percent(source.agree / known)})" if known else ""
        blocks.append(
            Text(
                f"The judges score the source's chosen answer higher than its rejected one for {number(source.agree)} "
                f"of {number(known)} prompts{share}, and equally for {number(source.equal)}; for "
                f"{number(source.unread)} others a score was not read."
            )
        )
    return Section("generators", "Generators", blocks) if blocks else None


def judges_section(
    judging: JudgingStats, intervals: Sequence[KappaInterval], thresholds: tuple[float, float], *, audit_slice: bool
) -> Section:
    """How each judge scored, and how far the judges agree.

    Args:
        intervals: of the kappas in `judging`.
        thresholds: desirable from, undesirable to; they are the bounds of kappa's three classes.
        audit_slice: agreement is over the audit slice only, as calls were skipped.
    """
    rows: Rows = [
        [
            judge,
            _by_status(stats),
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
    of_slice = " of the audit slice" if audit_slice else ""
    if judging.kappas:
        blocks += _agreement(judging, intervals)
        text = (
            f"Cohen's kappa over three classes (score ≥ {thresholds[0]:g}, ≤ {thresholds[1]:g}, between), on the rows"
            f"{of_slice} that both judged, with 95 % intervals by a bootstrap over prompts."
        )
    else:
        text = "There is only one judge."
    undefined = " (undefined: no two judges read one candidate, or all scores are equal)"
    text += (
        f" Krippendorff's alpha (interval): {number(judging.alpha, 3)} over {number(judging.agreement_rows)} candidates"
        f"{of_slice}{undefined if judging.alpha is None else ''}."
    )
    if audit_slice:
        text += (
            " Calls that were not needed were skipped (judge.early_exit, judge.escalate). Means and variances of this "
            "page are of the verdicts that were made, a selected sample; the audit slice was judged in full."
        )
    return Section("judges", "Judges", [*blocks, Text(text)])


def checklists_section(checklists: Sequence[ChecklistStats]) -> Section | None:
    """How often the items of checklists are met; None without any."""
    rows: Rows = []
    shown: Rows = []
    for one in checklists:
        share = percent(one.met / one.ticks) if one.ticks else "–"
        rows.append([one.judge, number(one.items), number(one.ticks), share, number(one.always), number(one.never)])
        for item in one.shown:
            all_met = item.met == item.ticked
            note = "met by every candidate" if all_met else "" if item.met else "met by none"
            met = percent(item.met / item.ticked)
            shown.append([one.judge, item.text, item.prompt_id[:8] or "all", number(item.ticked), met, note])
    if not rows:
        return None
    text = (
        "An item that every candidate of its prompts meets, or none, tells no candidates apart: it only moves all "
        "scores. Reword or remove it. Items that only one candidate was ticked against are left out."
    )
    columns = ["judge", "items", "ticks", "met", "met by every candidate", "met by none"]
    blocks: list[Block] = [Text(text), Table(columns, rows)]
    if shown:
        blocks.append(Table(["judge", "item", "prompt", "candidates", "met", ""], shown, text_columns=3))
    return Section("checklists", "Checklists", blocks)


def _by_status(stats: JudgeStats) -> str:
    """`ok 90, unparsed 10 (contradictory 4, absent 6)`."""
    why = ", ".join(f"{reason} {count:,}" for reason, count in stats.unread_by.items())
    found = {status: f"{status} {count:,}" for status, count in stats.parse_status.items()}
    if why and "unparsed" in found:
        found["unparsed"] += f" ({why})"
    return ", ".join(found.values())


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


def _agreement(judging: JudgingStats, intervals: Sequence[KappaInterval]) -> list[Block]:
    """The kappas as a heat map and as a table."""
    bounds = {(i.judge_a, i.judge_b): span(i.low, i.high) for i in intervals}
    cells: dict[tuple[str, str], Heat] = {}
    rows: Rows = []
    for pair in judging.kappas:
        between = "–" if pair.value is None else bounds.get((pair.judge_a, pair.judge_b), "–")
        below = f"{pair.rows:,} rows" if between == "–" else between
        heat = Heat(pair.value, "undefined" if pair.value is None else f"{pair.value:.2f}", pair.reason or below)
        cells[pair.judge_a, pair.judge_b] = cells[pair.judge_b, pair.judge_a] = heat
        kappa = f"undefined: {pair.reason}" if pair.value is None else number(pair.value, 3)
        rows.append([pair.judge_a, pair.judge_b, kappa, between, number(pair.rows)])
    names = list(judging.judges)
    return [
        HeatMap("Agreement of the judges", names, [(a, [cells.get((a, b)) for b in names]) for a in names]),
        Table(["judge", "and judge", "kappa", "95 %", "rows"], rows, text_columns=2),
    ]


def critic_section(critic: CriticStats) -> Section:
    """How often the critic found a flaw, and of which type."""
    read = critic.flawed + critic.sound
    summary = (
        f"{number(critic.flawed)} of {number(read)} read critiques found a flaw ({percent(critic.flawed_share)}); "
        f"{number(critic.unread)} could not be read, {number(critic.skipped)} were skipped."
    )
    rows: Rows = [
        [failure, Cell(number(count), bar=count / read if read else 0.0)]
        for failure, count in critic.failure_types.items()
    ]
    return Section("critic", "Critic", [Text(summary), Table(["failure type", "critiques"], rows)])


def contamination_section(found: Sequence[Mapping[str, Any]]) -> Section | None:
    """What overlaps with benchmarks (`prompts.decontaminate`); None where nothing was held against any."""
    rows: Rows = [
        [
            one["what"],
            name,
            number(counts["texts"]),
            number(one["checked"]),
            number(counts["overlapping"]),
            number(counts["exact"]),
        ]
        for one in found
        for name, counts in one["benchmarks"].items()
    ]
    columns = ["what", "benchmark", "its texts", "compared", "overlapping", "of them equal"]
    blocks = [Text(f"{what}: {line}.") for what, line in contamination_lines(found, by_benchmark=False).items()]
    if not rows:
        return None
    return Section("contamination", "Overlap with benchmarks", [*blocks, Table(columns, rows, text_columns=2)])


def datasets_section(
    counts: Mapping[str, Mapping[str, int]],
    guards: Mapping[str, int],
    weights: Mapping[str, float],
    lengths: str | None = None,
) -> Section | None:
    """Rows by dataset and part, what the guards kept out, KTO's weights, and how tokens were counted; None without any
    of them."""
    rows: Rows = [
        [name, part, number(count)] for name, parts in sorted(counts.items()) for part, count in parts.items()
    ]
    blocks: list[Block] = [Table(["dataset", "part", "rows"], rows, text_columns=2)] if rows else []
    if guards:
        out: Rows = [[reason, number(count)] for reason, count in sorted(guards.items())]
        blocks.append(Table(["kept out by", "rows or pairs"], out))
    if weights:
        listed = ", ".join(f"{name} {weight:.3f}" for name, weight in sorted(weights.items()))
        blocks.append(Text(f"KTO weights: {listed}."))
    if lengths:
        blocks.append(Text(f"The limits of rows are in tokens, counted with {lengths}."))
    return Section("datasets", "Datasets", blocks) if blocks else None
