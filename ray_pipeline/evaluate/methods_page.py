"""The page of a comparison of training methods: its table, its charts and what was used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ray_pipeline.data.row_truth import RowTruth
from ray_pipeline.evaluate.comparison import Comparison
from ray_pipeline.evaluate.first_screen import first_screen
from ray_pipeline.evaluate.method_stats import (
    Difference,
    MethodStats,
    OverSeeds,
    PolicyRun,
    PolicyStats,
    equal_policies,
)
from ray_pipeline.evaluate.use_page import identity_section, usage_of, use_section
from ray_pipeline.report.charts import Chart, Dot, dots
from ray_pipeline.report.figures import number, percent
from ray_pipeline.report.page import Block, Cell, Page, Rows, Section, Table, Text, facts, panels
from ray_pipeline.stats.bootstrap import Interval

#: Of the datasets, in their order; of the methods, where there are more datasets than colours.
_COLOURS = ("grey", "blue", "orange", "green", "purple", "vermilion")


def methods_page(page: Comparison) -> Page:
    """The page; a part without rows is left out."""
    base = next(policy for policy in page.policies if policy.run is None)
    protocols = {name: text for name, text in page.facts.items() if name.startswith("protocol ")}
    other = {name: text for name, text in page.facts.items() if name not in protocols}
    measurement = [*facts(page.data, ("data", "how it was made")), *facts(other, ("how it was measured", ""))]
    if protocols:
        columns, title = ("protocol", "what it fixes"), "Protocols of the win rates"
        rows = [[name.removeprefix("protocol "), text] for name, text in protocols.items()]
        measurement.append(Table(columns, rows, text_columns=2, title=title, folded=True))
    sections = [
        Section("methods", "Methods", [*panels(*_charts(page, base)), *_table(page, base)]),
        Section("policies", "Policies", _policies(page)),
        Section("gains", "What the data changes", _gains(page)) if page.differences else None,
        Section("truth", "Training rows against the truth", [_truth(page.truth)]) if page.truth else None,
        Section("data", "Data and measurement", measurement) if measurement else None,
        use_section(page.stage_use),
        identity_section(page.fingerprints, page.config),
    ]
    return Page(
        title=page.name,
        subtitle="Quorum, training methods side by side",
        headline=_headline(page),
        about=_about(page),
        warnings=page.warnings,
        sections=[section for section in sections if section is not None],
    )


def _about(page: Comparison) -> list[tuple[str, str]]:
    methods, policies = {method.method for method in page.methods}, [p for p in page.policies if p.run is not None]
    same, prompts = equal_policies(page.policies), page.facts.get("held-out prompts", "")
    return first_screen(
        f"{len(methods)} methods on {len(page.data)} datasets",
        models={"base": page.facts["base"]} if "base" in page.facts else {},
        judges={name: page.facts.get(name, "") for name in ("comparing judge", "rubric judges")},
        amounts=[
            (len(policies), "policies"),
            (len(policies) - len(same) if same else None, "different trainings"),
            (int(prompts) if prompts.isdecimal() else None, "held-out prompts"),
        ],
        usage=usage_of(page.stage_use),
    )


def _headline(page: Comparison) -> str:
    """The highest win rate, with a reminder to look at its interval."""
    known = [method for method in page.methods if method.win_rate is not None]
    if not known:
        return "No win rate is known yet."
    best = max(known, key=lambda method: method.win_rate.mean if method.win_rate else 0.0)
    interval = best.win_interval
    return (
        f"Highest win rate against the base: {_named(best)} on {best.data}, {_share(best.win_rate)} "
        f"(95 % {percent(interval.low)} to {percent(interval.high)}). Overlapping intervals give no order."
    )


def _charts(page: Comparison, base: PolicyStats) -> list[Chart | None]:
    # (row, dot) of each method: dots of one row have colours of their own.
    placed = [(_named(m), m.data) for m in page.methods]
    if len({data for _, data in placed}) > len(_COLOURS):
        placed = [(data, name) for name, data in placed]
    names = list(dict.fromkeys(name for name, _ in placed))
    colours = {dot: _COLOURS[i % len(_COLOURS)] for i, dot in enumerate(dict.fromkeys(dot for _, dot in placed))}

    def rows(value_of: Callable[[MethodStats], Interval | None]) -> list[tuple[str, list[Dot]]]:
        found: dict[str, list[Dot]] = {name: [] for name in names}
        for (name, dot), method in zip(placed, page.methods, strict=True):
            if (value := value_of(method)) is not None:
                found[name].append(Dot(dot, colours[dot], value))
        return list(found.items())

    charts = [dots("Wins against the base", rows(_wins), (0.0, 1.0), note="95 % bootstrap over prompts")]
    scores = rows(lambda m: _over_seeds(m.mean_score))
    line = None if base.mean_score is None else (base.mean_score, "base")
    charts.append(dots("Mean score", scores, (0.0, 10.0), shares=False, line=line, note="± standard error over seeds"))
    for mode, share in base.accuracy.items():
        right = rows(lambda m, mode=mode: _over_seeds(m.accuracy.get(mode)))  # type: ignore[misc]
        charts.append(
            dots(f"Right answers, {mode}", right, (0.0, 1.0), line=(share, "base"), note="± standard error over seeds")
        )
    return charts


def _wins(method: MethodStats) -> Interval | None:
    if method.win_rate is None:
        return None
    return Interval(method.win_rate.mean, method.win_interval.low, method.win_interval.high)


def _over_seeds(value: OverSeeds | None) -> Interval | None:
    if value is None:
        return None
    if value.error is None:
        return Interval(value.mean, None, None)
    return Interval(value.mean, value.mean - value.error, value.mean + value.error)


def _table(page: Comparison, base: PolicyStats) -> list[Block]:
    judges = list(page.methods[0].scores) if page.methods else list(base.scores)
    modes = list(base.accuracy)
    # What decides comes first: on a narrow window the table scrolls.
    against = ["data", "rows", "steps", "wins", "95 %", "at equal length"]
    trained = ["ties", "flips", "unread", "seconds"]
    benchmarks = list(base.benchmarks)
    columns = ["method", *against, "mean score", *(f"right, {mode}" for mode in modes), *benchmarks, *judges, *trained]
    rows: Rows = [
        [
            "base",
            *("–" for _ in against),
            number(base.mean_score),
            *(percent(base.accuracy[mode]) for mode in modes),
            *(number(base.benchmarks[score]) for score in benchmarks),
            *(number(base.scores.get(judge)) for judge in judges),
            *("–" for _ in trained),
        ]
    ]
    for m in page.methods:
        rows.append(
            [
                _named(m),
                m.data,
                number(m.rows),
                number(m.steps),
                Cell(_share(m.win_rate), bar=m.win_rate.mean if m.win_rate else None),
                f"{percent(m.win_interval.low)} to {percent(m.win_interval.high)}",
                _share(m.equal_length),
                _points(m.mean_score),
                *(_share(m.accuracy.get(mode)) for mode in modes),
                *(_points(m.benchmarks.get(score)) for score in benchmarks),
                *(_points(m.scores.get(judge)) for judge in judges),
                _share(m.tie_rate),
                _share(m.flip_rate),
                number(m.unread),
                _points(m.train_seconds, 1),
            ]
        )
    text = (
        "± is the standard error of the mean over seeds (sample deviation / √seeds). Wins are against the base on the "
        "held-out prompts, counted only where the judge prefers the policy in both orders; their interval is a "
        "bootstrap over prompts, all seeds of a prompt together. Flips are pairs on which the two orders name "
        "different models. At equal length is (wins + ties / 2) at equal length of both answers, by a fit of the "
        "verdicts to the difference in length; there is none where one model's answers are almost always longer. Mean "
        "scores are means of the rubric judges."
    )
    if benchmarks:
        text += (
            " Public benchmarks are in their own units (MT-Bench 1 to 10, others in %); the page `benchmarks` has "
            "their intervals and protocols."
        )
    return [Table(columns, rows, text_columns=2), Text(text)]


def _policies(page: Comparison) -> list[Block]:
    same = equal_policies(page.policies)
    modes = list(next(iter(page.policies)).accuracy)
    columns = ["policy", "method", "data", "seed", "wins", "ties", "losses", "flips", "at equal length", "mean score"]
    columns += [f"right, {mode}" for mode in modes] + (["same rows as"] if same else [])
    rows: Rows = []
    for p in page.policies:
        run = p.run
        named = ["base", "–", "–", "–"] if run is None else [run.label, _named(run), run.data, str(run.seed)]
        shares = [percent(share) for share in (p.win_rate, p.tie_rate, p.loss_rate, p.flip_rate, p.equal_length)]
        known = [number(p.mean_score), *(percent(p.accuracy.get(mode)) for mode in modes)]
        other = [same.get(run.label, "–") if run else "–"] if same else []
        rows.append([*named, *shares, *known, *other])
    table = Table(columns, rows, text_columns=4)
    if not same:
        return [table]
    trained = sum(policy.run is not None for policy in page.policies)
    text = (
        f"{len(same):,} of {trained:,} policies have the same training rows, in the same order, and the same settings "
        f"as another, so the number of different trainings is {trained - len(same):,}. Such a policy is the other one, "
        "not trained again, unless both were trained at the same time."
    )
    return [table, Text(text)]


def _gains(page: Comparison) -> list[Block]:
    rows: Rows = []
    for d in page.differences:
        scale, digits, unit = (1.0, 2, "") if d.measure == "mean score" else (100.0, 1, " points")
        error = "" if d.gain.error is None else f" ± {scale * d.gain.error:.{digits}f}"
        gain = f"{scale * d.gain.mean:+.{digits}f}{error}{unit}"
        if d.same_rows:
            gain += f" (same rows in {d.same_rows} of {d.gain.seeds} seeds)"
        low, high = (None if end is None else scale * end for end in (d.interval.low, d.interval.high))
        bounds = "–" if low is None or high is None else f"{low:+.{digits}f} to {high:+.{digits}f}"
        if d.same_rows == d.gain.seeds:
            gain, bounds = "same rows", "–"
        rows.append([_named(d), f"{d.data} − {d.over}", d.measure, gain, bounds])
    text = (
        "Differences of policies of the same seed on the same prompts: mean ± standard error over seeds, and a 95 % "
        "bootstrap interval over prompts, all seeds of a prompt together. The first shows what another training would "
        "change, the second what other prompts would."
    )
    if any(d.same_rows for d in page.differences):
        text += (
            " Where it says same rows, the policies of both datasets were trained on the same rows, in the same order, "
            "with the same settings: there is no difference to measure."
        )
    return [Table(["method", "data", "measure", "gain", "95 %"], rows, text_columns=3), Text(text)]


def _truth(truth: Mapping[str, RowTruth]) -> Table:
    columns = ["data", "labelled rows", "repeated", "desirable and right", "undesirable and wrong", "pairs"]
    columns += ["chosen is right", "rejected is wrong"]
    rows: Rows = [
        [
            name,
            number(found.labelled),
            *map(percent, (found.repeated, found.desirable_right, found.undesirable_wrong)),
            number(found.pairs),
            *map(percent, (found.chosen_right, found.rejected_wrong)),
        ]
        for name, found in truth.items()
    ]
    return Table(columns, rows)


def _named(one: MethodStats | PolicyRun | Difference) -> str:
    """The method, and what is equal for all datasets if that is not the number of epochs."""
    return one.method if one.reading == "epochs" else f"{one.method}, equal {one.reading}"


def _share(value: OverSeeds | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value.mean:.1f}" + ("" if value.error is None else f" ± {100 * value.error:.1f}") + " %"


def _points(value: OverSeeds | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.{digits}f}" + ("" if value.error is None else f" ± {value.error:.{digits}f}")
