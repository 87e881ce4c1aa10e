"""The picture of a report in README.md: headline, amounts, accuracy and labels of one run, as one SVG.

    python perf/report_picture.py runs/pocket docs/report.svg

Every figure is read from the report's metrics.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from ray_pipeline.data.page import LABEL_COLOURS
from ray_pipeline.report.charts import Chart, Dot, dots, standalone
from ray_pipeline.report.figures import number, percent
from ray_pipeline.stats.bootstrap import Interval
from ray_pipeline.store.outside import visible

WIDTH = 760
_LINE = 110  # characters of the headline on a line


def picture(metrics: Mapping[str, Any]) -> str:
    """The picture of metrics.json as SVG."""
    text = textwrap.wrap(metrics["headline"]["text"], _LINE)
    top = 20 + 17 * len(text)
    colour = {"better": "green", "worse": "vermilion"}.get(metrics["headline"]["verdict"], "orange")
    drawn = [f'<rect class="fill {colour}" x="0" y="2" width="4" height="{top - 22}"/>']
    drawn += [_text(14, 15 + 17 * i, line, "name") for i, line in enumerate(text)]
    drawn += [_text(14, top, _amounts(metrics), "")]
    accuracy = _accuracy(metrics)
    if accuracy is not None:
        drawn.append(str(accuracy.svg).replace("<svg ", f'<svg x="0" y="{top + 34}" width="340" height="134" ', 1))
        drawn.append(_text(2, top + 28, "True accuracy: base (grey) and policy (blue)", "title"))
    drawn += [_text(390, top + 28, "What the gate decided", "title"), *_labels(metrics, top + 44)]
    height = top + 176
    svg = Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg>')
    title = f"Report of run {metrics['run']['name']}, workflow {metrics['run']['workflow']}"
    return standalone(Chart(title, svg, height, width=WIDTH))


def _amounts(metrics: Mapping[str, Any]) -> str:
    amounts: collections.Counter[str] = collections.Counter()
    for step in metrics["funnel"]:
        amounts[step["name"]] += step["rows"]
    named = {"prompts kept": "prompts", "candidates": "candidates", "KTO rows": "KTO rows", "DPO pairs": "DPO pairs"}
    return ", ".join(f"{number(amounts[name])} {unit}" for name, unit in named.items() if name in amounts)


def _accuracy(metrics: Mapping[str, Any]) -> Chart | None:
    by_mode: dict[str, list[Dot]] = {}
    for found in metrics["evaluation"]["responses"]:
        if found["accuracy"]:
            colour = {"base": "grey", "policy": "blue"}[found["model"]]
            interval = Interval(*(found["accuracy"][name] for name in ("mean", "low", "high")))
            by_mode.setdefault(f"{found['mode']} decoding", []).append(Dot(found["model"], colour, interval))
    return dots("", list(by_mode.items()), (0.0, 1.0))


def _labels(metrics: Mapping[str, Any], top: int) -> Iterator[str]:
    labels = metrics["gate"]["labels"]
    most = max(found["count"] for found in labels.values()) or 1
    for place, (label, colour) in enumerate(LABEL_COLOURS.items()):
        y, count = top + 24 * place, labels[label]["count"]
        yield _text(390, y + 11, label, "name")
        yield f'<rect class="fill {colour}" x="475" y="{y}" width="{180 * count / most:.1f}" height="14" rx="2"/>'
        yield _text(660, y + 11, f"{number(count)} ({percent(labels[label]['share'])})", "")


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(visible(text))}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    metrics = json.loads((given.run / "report" / "metrics.json").read_text(encoding="utf-8"))
    given.file.write_text(picture(metrics), encoding="utf-8")
    print(f"{given.file}: {given.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
