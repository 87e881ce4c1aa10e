"""The pages of agreement and win-rate runs: the figures of agreement.json and winrate.json, heat maps and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.agreement.debates_page import PLOTTED, VOTES, debates_section
from ray_pipeline.agreement.pools_page import cascades_section, pools_section
from ray_pipeline.agreement.powered import powered_section
from ray_pipeline.report.charts import Dot, Series, dots, lines
from ray_pipeline.report.figures import estimate_text, number, percent, span
from ray_pipeline.report.page import Block, Cell, Heat, HeatMap, Page, Rows, Section, Table, Text, panels
from ray_pipeline.stats.bootstrap import Interval

#: Juries shown of each strategy; agreement.json has all.
SHOWN_JURIES = 15
_LINES = ("blue", "orange", "green", "purple", "vermilion", "grey")

#: How the paired tests were chosen.
CHOSEN_PAIRS = (
    "Chosen before anything was measured: all judges of a strategy with each other, each judge's strategies with each "
    "other, and of each strategy the largest jury with its members. The p values are of single tests, not corrected "
    "for their number."
)


def agreement_page(document: Mapping[str, Any], answers: Sequence[tuple[str, str]] = ()) -> Page:
    """The page of agreement.json; `answers` are its `about`."""
    sections = [
        _kappas(document),
        _judges(document),
        pools_section(document),
        cascades_section(document),
        powered_section(document),
        debates_section(document),
        *(
            _juries(strategy, best, document["settings"]["juries"]["pool"], place)
            for place, (strategy, best) in enumerate(_best_juries(document["juries"]).items())
        ),
        _held_out(document),
        _bias(document),
        _paired(document),
        _gate(document),
        _humans(document),
    ]
    labels = ", ".join(f"{label} {count:,}" for label, count in document["label_counts"].items())
    labelled = f"{document['labelled']:,} with a human label" + (f" ({labels})" if labels else "")
    known = [j for j in document["judges"] if j["kappa"] is not None]
    best = max(known, key=lambda j: j["kappa"], default=None)
    headline = f"{document['items']:,} items, {labelled}."
    if best is not None:
        headline += (
            f" Highest kappa with humans of one judge: {best['kappa']:.3f} ({best['judge']}, {best['strategy']}; "
            f"{span(*best['kappa_interval'])})."
        )
    return Page(
        title="How far the judges agree with humans" if document["labelled"] else "How far the judges agree",
        subtitle=f"Quorum, agreement. Data: {document['data']}; verdicts: {document['replay']}",
        headline=headline,
        about=answers,
        tiles=[
            (number(document["items"]), "items"),
            (number(document["labelled"]), "with a human label"),
            (number(len({j["judge"] for j in document["judges"]})), "judges"),
            (number(len(document["juries"])), "juries"),
            (number(len(document["debates"])), "debates"),
        ],
        sections=[section for section in sections if section is not None],
    )


def winrate_page(
    about: Mapping[str, Any], rates: Sequence[Mapping[str, Any]], answers: Sequence[tuple[str, str]] = ()
) -> Page:
    """The page of winrate.json; `answers` are its `about`."""
    baselines = sorted({r["baseline"] for r in rates if r["baseline"]})
    shown = [(r["run"], [Dot("win rate", "blue", _share(r["win_rate"]))]) for r in rates[:PLOTTED]]
    blocks: list[Block] = [*panels(dots("Win rates with intervals", shown, (0.0, 1.0)))]
    if baselines:
        cells = {(r["configuration"], r["baseline"]): estimate_text(r["win_rate"], 1) for r in rates}
        names = dict.fromkeys(r["configuration"] for r in rates if r["baseline"])
        grid: Rows = [[name, *(cells.get((name, b), "–") for b in baselines)] for name in names]
        blocks.append(Table(["configuration", *(f"against {b}" for b in baselines)], grid))
    rows: Rows = [
        [
            r["run"],
            number(r["n"]),
            number(r["wins"]),
            number(r["ties"]),
            number(r["losses"]),
            number(r["missing"]),
            estimate_text(r["win_rate"], 1),
            number(r["half_tie_rate"], 1),
            number(r["flip_rate"]["value"], 3),
            r["fingerprint"],
        ]
        for r in rates
    ]
    columns = ["run", "n", "wins", "ties", "losses", "missing", "win rate", "ties as half", "flips"]
    columns += ["protocol"]
    protocols: Rows = [
        [name, "; ".join(f"{field} {value}" for field, value in fixed.items() if value)]
        for name, fixed in {r["fingerprint"]: r["protocol"] for r in rates}.items()
    ]
    text = (
        "A win rate is strict wins over all items of a run, in per cent: ties and missing verdicts are not wins. "
        f"Intervals are 95 % percentile intervals over {about['draws']:,} bootstrap samples of the prompts; "
        "a rate that is the same on every prompt has an exact one (Clopper–Pearson)."
    )
    headline = f"{len(rates)} runs over {max((r['n'] for r in rates), default=0):,} items."
    known = [r for r in rates if r["n"] and r["win_rate"]["value"] is not None]
    if known:
        best = max(known, key=lambda r: r["win_rate"]["value"])
        headline += f" Highest win rate: {best['run']}, {estimate_text(best['win_rate'], 1)} %."
    return Page(
        title="Win rates",
        subtitle=f"Quorum, pairwise verdicts. Data: {about['data']}; verdicts: {about['replay']}",
        headline=headline,
        about=answers,
        sections=[
            Section("rates", "Win rates", [*blocks, Table(columns, rows, title="Every run"), Text(text)]),
            Section("protocols", "Protocols", [_protocol_table(protocols)]),
        ],
    )


def _protocol_table(rows: Rows) -> Table:
    title = "What each protocol fixes"
    return Table(["protocol", "what it fixes"], rows, text_columns=2, title=title, folded=True)


def _kappas(document: Mapping[str, Any]) -> Section | None:
    judged = [*document["judges"], *({**d, "judge": d["debater"]} for d in document["debates"])]
    settings = document["settings"]
    text = (
        "Kappa is Cohen's, unweighted, over A, B and tie; intervals are "
        f"{100 * settings['confidence']:g} % percentile intervals over {settings['draws']:,} bootstrap samples of "
        f"the questions, all items of a question together (seed {settings['seed']}). A kappa that is the same in "
        "all of them has no interval. A verdict that could not be read is missing: it is in no kappa, and the bounds "
        "show what it could have made of it."
    )
    if document["labelled"]:
        names = list(dict.fromkeys(j["judge"] for j in judged))
        strategies = list(dict.fromkeys(j["strategy"] for j in judged))
        found = {(j["judge"], j["strategy"]): j for j in judged}
        rows = [(name, [_judge_heat(found.get((name, s))) for s in strategies]) for name in names]
        blocks: list[Block] = [HeatMap("Kappa with the human labels", strategies, rows)] if rows else []
    else:
        blocks = [Text("There are no labels, so the judges are shown against each other.")]
    for among in document["among_judges"]:
        names = list(among["judges"])
        heat = [
            (name, [None if i == k else _heat(*cell) for k, cell in enumerate(zip(*cells, strict=True))])
            for i, (name, *cells) in enumerate(zip(names, among["kappas"], among["intervals"], strict=True))
        ]
        blocks.append(HeatMap(f"Judges with each other ({among['strategy']})", names, heat))
    return Section("kappas", "Kappas", [*blocks, Text(text)]) if blocks else None


def _judge_heat(judge: Mapping[str, Any] | None) -> Heat | None:
    if judge is None:
        return None
    return _heat(judge["kappa"], judge["kappa_interval"])


def _heat(value: float | None, interval: Sequence[float | None]) -> Heat:
    low, high = interval
    return Heat(value, number(value, 3), "" if low is None or high is None else span(low, high))


def _judges(document: Mapping[str, Any]) -> Section | None:
    if not document["judges"]:
        return None
    rows: Rows = [
        [
            j["strategy"],
            j["judge"],
            *(number(j["vote_counts"][vote]) for vote in VOTES),
            number(j["missing"]),
            f"{number(j['kappa'], 3)} ({span(*j['kappa_interval'])})",
            _bounds(j["kappa_bounds"]) if j["missing"] else "–",
            number(j["kappa_linear"]["value"], 3),
            number(j["kappa_quadratic"]["value"], 3),
            number(j["alpha"]["value"], 3),
            number(j["accuracy"]["value"], 3),
            number(j["accuracy_no_ties"]["value"], 3),
            number(j["flip_rate"]["value"], 3),
        ]
        for j in document["judges"]
    ]
    columns = ["strategy", "judge", *VOTES, "missing", "kappa", "bounds with missing", "linear", "quadratic", "alpha"]
    columns += ["accuracy", "accuracy without ties", "flips"]
    plotted = [
        (f"{j['judge']} ({j['strategy']})", [Dot("kappa", "blue", Interval(j["kappa"], *j["kappa_interval"]))])
        for j in sorted(document["judges"], key=lambda j: -(j["kappa"] if j["kappa"] is not None else -9))[:PLOTTED]
    ]
    lows = [dot.estimate.low for _, found in plotted for dot in found if dot.estimate.low is not None]
    kappas = [dot.estimate.mean for _, found in plotted for dot in found if dot.estimate.mean is not None]
    start = min([0.0, *lows, *kappas])
    chart = dots("Kappa with the human labels", plotted, (start, 1.0), shares=False)
    return Section("judges", "Judges", [*panels(chart), Table(columns, rows, text_columns=2)])


def _bounds(pair: Sequence[float | None]) -> str:
    low, high = pair
    return span(low, high, 3)


def _best_juries(juries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Those of the highest kappas, by strategy."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for jury in sorted((j for j in juries if j["kappa"] is not None), key=lambda j: -j["kappa"]):
        of_strategy = found.setdefault(jury["strategy"], [])
        if len(of_strategy) < SHOWN_JURIES:
            of_strategy.append(jury)
    return found


def _juries(strategy: str, best: Sequence[Mapping[str, Any]], pool: str, place: int) -> Section:
    rows: Rows = [
        [
            " + ".join(j["jury"]),
            *(number(j["vote_counts"][vote]) for vote in VOTES),
            number(j["missing"]),
            f"{number(j['kappa'], 3)} ({span(*j['kappa_interval'])})",
            number(j["accuracy"]["value"], 3),
        ]
        for j in best
    ]
    text = (
        f"The {len(best)} with the highest kappa, pooled by {pool}. The highest of many kappas is biased upwards by "
        "the choice; the section on held-out choice shows by how much."
    )
    table = Table(["jury", *VOTES, "missing", "kappa", "accuracy"], rows)
    return Section(f"juries-{place}", f"Juries, {strategy}", [Text(text), table])


def _held_out(document: Mapping[str, Any]) -> Section | None:
    if not document["held_out"]:
        return None
    rows: Rows = [
        [
            str(h["chosen"]),
            number(h["of"]),
            f"{number(h['kappa_chosen_on'], 3)} ({h['items_chosen_on']:,} items)",
            f"{estimate_text(h['kappa'], 3)}, {h['items_reported_on']:,} items",
        ]
        for h in document["held_out"]
    ]
    columns = ["chosen on one part of the items", "among", "kappa there", "kappa on the others"]
    return Section("held-out", "Held-out choice", [Table(columns, rows)])


def _bias(document: Mapping[str, Any]) -> Section | None:
    if not document["bias"]:
        return None
    rows: Rows = []
    for b in document["bias"]:
        row: list[str | Cell] = [b["strategy"], _with_model(b)]
        for kind in ("longer", "first", "own_family"):
            found = b[kind]
            row += [number(found["share"]["value"] if found else None), estimate_text(found["bias"] if found else None)]
        rows.append(row)
    text = (
        "Share of decided votes for an answer, and how much that is over the humans' share on the same items (interval "
        "by item). With both orders the reference of the first place is one half."
    )
    columns = ["strategy", "judge", "longer answer", "over humans", "shown first", "over reference"]
    columns += ["own family", "over humans"]
    return Section("bias", "Bias", [Text(text), Table(columns, rows, text_columns=2)])


def _with_model(bias: Mapping[str, Any]) -> str:
    """A judge with the model that it sits on, where that is known and named otherwise."""
    model = bias["model"]
    return f"{bias['judge']} ({model})" if model and model != bias["judge"] else str(bias["judge"])


def _paired(document: Mapping[str, Any]) -> Section | None:
    if not document["paired"]:
        return None
    rows: Rows = [
        [
            str(p["first"]),
            str(p["second"]),
            number(p["items"]),
            estimate_text(p["difference"]),
            number(p["p_bootstrap"], 3),
            number(p["only_first_right"]),
            number(p["only_second_right"]),
            number(p["p_mcnemar"], 3),
        ]
        for p in document["paired"]
    ]
    columns = ["first", "second", "items", "difference of kappas", "p (bootstrap)", "only first right"]
    columns += ["only second right", "p (McNemar)"]
    return Section("paired", "Pairs of judges", [Text(CHOSEN_PAIRS), Table(columns, rows, text_columns=2)])


def _gate(document: Mapping[str, Any]) -> Section | None:
    rows: Rows = [
        [
            g["strategy"],
            number(g["judges"]),
            number(g["tau"], 2),
            number(g["desirable_at"], 1),
            number(g["undesirable_at"], 1),
            f"{number(g['kept'])} ({percent(g['coverage'])})",
            number(g["pairs"]),
            percent(g["agreement"]),
            f"{percent(g['agreement_low'])} to {percent(g['agreement_high'])}",
            number(g["area"], 3),
        ]
        for g in document.get("gate_curves", ())
    ]
    if not rows:
        return None
    columns = ["strategy", "judges", "τ", "desirable from", "undesirable to", "kept", "of pairs", "agreement"]
    columns += [_level(document), "area"]
    text = (
        "Judges of a strategy together, at the gate's τ (2.5 where scores end at 10, and by its square elsewhere). "
        "A pair is kept where no answer's scores vary by more and, with thresholds, where the higher mean is desirable "
        "and the lower undesirable. Area: mean risk over the pairs from the least to the greatest variance, 0 is best. "
        "The curves go over every τ; their numbers with intervals: risk_coverage.csv."
    )
    blocks: list[Block] = [*_gate_charts(document), Table(columns, rows), Text(text)]
    return Section("gate", "The confidence gate as a classifier", blocks)


def _gate_charts(document: Mapping[str, Any]) -> list[Block]:
    """Agreement with humans over the share kept, one chart per strategy and one line per pair of thresholds."""
    gates = {g["strategy"]: g for g in document["gate_curves"]}
    by_strategy: dict[str, list[Series]] = {}
    for line in document.get("gate_points", ()):
        drawn = by_strategy.setdefault(line["strategy"], [])
        name = "variance alone"
        if line["desirable_at"] is not None:
            name = f"≥ {line['desirable_at']:g} and ≤ {line['undesirable_at']:g}"
        colour = _LINES[len(drawn) % len(_LINES)]
        points = list(zip(line["tau"], line["coverage"], line["agreement"], strict=True))
        marks = [(x, y) for tau, x, y in points if tau == gates[line["strategy"]]["tau"]]
        drawn.append(Series(name, colour, line["coverage"], line["agreement"], dashed=bool(drawn), marks=marks))
    charts = [
        lines(
            f"Agreement with humans over the share kept, {strategy}",
            series,
            "share kept",
            note=f"{gates[strategy]['judges']} judges; the dots are at the gate's τ",
        )
        for strategy, series in by_strategy.items()
    ]
    return panels(*charts)


def _level(document: Mapping[str, Any]) -> str:
    """The heading of a column of intervals."""
    return f"{100 * document['settings']['confidence']:g} % interval"


def _humans(document: Mapping[str, Any]) -> Section | None:
    humans = document["humans"]
    if not humans:
        return None
    text = (
        f"{humans['annotators']:,} annotators, {humans['items']:,} items with at least two of them. Kappa pooled over "
        f"{humans['pairs']:,} pairs of them: {estimate_text(humans['kappa'], 3)}; alpha "
        f"{estimate_text(humans['alpha'], 3)}; one annotator against the mode of the others: "
        f"{estimate_text(humans['one_against_rest'], 3)}."
    )
    return Section("humans", "Humans among themselves", [Text(text)])


def _share(found: Mapping[str, Any]) -> Interval:
    """A percentage with its interval as shares."""
    mean, low, high = (None if found[key] is None else found[key] / 100 for key in ("value", "low", "high"))
    return Interval(mean, low, high)
