"""The section of a page about how often judges err, and how far together."""

from __future__ import annotations

from ray_pipeline.data.judge_votes import ErrorsOfJudges
from ray_pipeline.report.figures import number, percent, percent_interval, span
from ray_pipeline.report.page import Block, Heat, HeatMap, Rows, Section, Table, Text
from ray_pipeline.stats.judge_errors import PanelErrors

_ASSUMED = (
    "Agreement alone does not show who is right: judges who share their errors agree as well. The next table has the "
    "correlation of errors that explains the agreement of these judges at an assumed accuracy (– where they disagree "
    "too often to be that accurate). A few labels by people show which row applies."
)


def errors_section(
    found: ErrorsOfJudges | None, thresholds: tuple[float, float], *, audit_slice: bool = False
) -> Section | None:
    """How often each judge is right, how far the judges err together, and how many independent ones they are worth.

    Args:
        thresholds: desirable from, undesirable to.
        audit_slice: errors are those on the audit slice only, as calls were skipped.
    """
    if found is None or found.best is None:
        return None
    text = (
        f"A judge votes for a response with a score ≥ {thresholds[0]:g}, against it with one ≤ {thresholds[1]:g}; a "
        "score between is a class of its own."
    )
    if audit_slice:
        text += " Only the audit slice counts, which was judged in full."
    return Section("errors", "Judges' errors", errors_blocks(found, text))


def errors_blocks(found: ErrorsOfJudges, votes: str) -> list[Block]:
    """The blocks of a section on errors; `votes` says what a judge's vote is."""
    best = found.best
    assert best is not None
    texts = [_errors_text(best, found.checked), votes]
    if found.truth is not None and found.estimate is not None:
        texts.append(f"Without the truth: {effective_text(found.estimate)}, as an estimate by a latent class model.")
    blocks: list[Block] = [Text(" ".join(texts))]
    guess = {} if found.estimate is None else {j.judge: j.accuracy.mean for j in found.estimate.judges}
    if found.truth is not None:
        rows: Rows = [
            [
                j.judge,
                percent(j.accuracy.mean),
                percent_interval(j.accuracy),
                number(j.accuracy.rows),
                percent(guess.get(j.judge)),
            ]
            for j in found.truth.judges
        ]
        blocks.append(Table(["judge", "right", "95 %", "candidates", "right by the estimate"], rows))
    elif best.judges:
        rows = [[j.judge, percent(j.accuracy.mean), number(j.accuracy.rows)] for j in best.judges]
        blocks.append(Table(["judge", "right (estimate)", "votes"], rows))
    if best.pairs:
        blocks.append(_correlations(best))
    if found.truth is None and best.assumed:
        rows = [[percent(a.accuracy, 0), number(a.correlation), number(a.effective)] for a in best.assumed]
        columns = ["if each judge were right on", "correlation of errors", "effective judges"]
        blocks += [Text(_ASSUMED), Table(columns, rows)]
    return blocks


def effective_text(found: PanelErrors) -> str:
    """The mean correlation and the effective number, without a full stop."""
    if found.correlation.mean is None:
        return f"the correlation of errors is unknown ({found.reason})"
    low, high = found.correlation.low, found.correlation.high
    bounds = "" if low is None else f" ({span(low, high)})"
    text = f"mean correlation of errors {found.correlation.mean:.2f}{bounds}, effective number of judges "
    if found.effective.mean is None:
        return f"{text}unknown"
    low, high = found.effective.low, found.effective.high
    return f"{text}{found.effective.mean:.1f}{'' if low is None or high is None else f' ({span(low, high, 1)})'}"


def _errors_text(found: PanelErrors, checked: float) -> str:
    formula = "The effective number of n judges is n / (1 + (n − 1) · mean correlation), Kish's design effect."
    summary = effective_text(found)
    summary = summary[0].upper() + summary[1:]
    if found.basis == "truth":
        part = "" if checked >= 1 else f", a sample of {percent(checked)}"
        return (
            f"{summary}, for {len(found.judges)} judge{'s' * (len(found.judges) != 1)}, against the truth of "
            f"{number(found.rows)} candidates{part}; 95 % intervals by a jackknife over groups of prompts. {formula}"
        )
    return (
        f"Estimate, because no truth is known: {summary}, over {number(found.rows)} candidates. The latent class model "
        "(Dawid and Skene 1979) takes what most judges share for the truth, so the correlation can be higher and the "
        f"effective number lower. {formula}"
    )


def _correlations(found: PanelErrors) -> Block:
    cells: dict[tuple[str, str], Heat] = {}
    for pair in found.pairs:
        value = pair.correlation
        bounds = span(value.low, value.high)
        below = pair.reason or (f"{value.rows:,} rows" if bounds == "–" else bounds)
        heat = Heat(value.mean, "undefined" if value.mean is None else f"{value.mean:.2f}", below)
        cells[pair.judge_a, pair.judge_b] = cells[pair.judge_b, pair.judge_a] = heat
    names = [judge.judge for judge in found.judges]
    title = "Correlation of the judges' errors" + (" (estimate)" if found.basis == "estimate" else "")
    return HeatMap(title, names, [(a, [cells.get((a, b)) for b in names]) for a in names])
