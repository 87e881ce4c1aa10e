"""One document, two renderers: the same texts in report.md and report.html, and charts that stand alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

import ray_pipeline.report
from perf.report_picture import picture
from ray_pipeline.evaluate.headline import headline
from ray_pipeline.evaluate.metrics import collect_metrics
from ray_pipeline.evaluate.run_page import run_page
from ray_pipeline.report.charts import Bins, Dot, Series, dots, heat_map, histogram, lines, stacked, standalone
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.escaping import inline
from ray_pipeline.report.figures import number
from ray_pipeline.report.html import render_html
from ray_pipeline.report.markdown import render_markdown
from ray_pipeline.report.page import (
    Browser,
    Cell,
    Folded,
    Funnel,
    HeatMap,
    Page,
    Panels,
    Table,
    Text,
    charts_of,
)
from ray_pipeline.report.write import write_page
from ray_pipeline.stats.bootstrap import Interval
from ray_pipeline.store.outside import visible
from tests.evaluate.example_run import whole_run
from tests.evaluate.test_length_controlled import compared
from tests.evaluate.test_planned import planned_run
from tests.report.test_page import NASTY, SCORES

HOSTILE = "".join(NASTY[:6])


def pages() -> Iterator[Page]:
    for data in (
        whole_run(config={"gate": {"tau": 2.5}}, benchmarks=SCORES, planned=planned_run()),
        whole_run(12, **compared()),
    ):
        metrics = collect_metrics(data)
        yield run_page(data, metrics, headline(metrics.evaluation, data.missing_stages()), ["Mind <b>this</b>."])


def texts_of(page: Page) -> Iterator[str]:
    """Every text of a page but those of its charts and examples."""
    yield from (page.title, page.subtitle, page.headline, *page.warnings)
    for pair in (*page.about, *page.tiles):
        yield from pair
    for section in page.sections:
        yield section.title
        for block in section.blocks:
            match block:
                case Text():
                    yield block.text
                case Table():
                    yield from (block.title, *block.columns)
                    yield from (c.text if isinstance(c, Cell) else c for row in block.rows for c in row)
                case HeatMap():
                    yield from (block.title, *block.columns)
                    for name, cells in block.rows:
                        yield name
                        for cell in cells:
                            yield from () if cell is None else (cell.text, cell.below)
                case Funnel():
                    yield block.unit
                    for step in block.steps:
                        yield from (step.name, step.note, step.figure)
                case Folded():
                    yield from (block.summary, *block.text.splitlines())
                case Panels():
                    yield from (chart.title for chart in block.charts)
                case Browser():
                    yield block.packed.scope


def test_both_renderers_show_every_text() -> None:
    for page in pages():
        markdown, html = render_markdown(page), unescape(render_html(page))
        for text in texts_of(page):
            assert inline(text) in markdown or text in markdown, text
            assert visible(text) in html, text


def test_markdown_links_the_charts_that_are_written(tmp_path: Path) -> None:
    for place, page in enumerate(pages()):
        folder = tmp_path / str(place)
        written = write_page(page, {"numbers.json": {"a": float("nan")}, "table.csv": "a,b\n"}, folder)
        linked = re.findall(r"\]\((charts/[^)]+)\)", (folder / "report.md").read_text())
        assert len(linked) == len(set(linked)) and {folder / name for name in linked} == set(
            (folder / "charts").iterdir()
        )
        assert sum(len(charts) for s in page.sections for charts in charts_of(s)) == len(linked) > 10
        assert {p.relative_to(folder).as_posix() for p in written} == {
            "report.md", "report.html", "numbers.json", "table.csv", *linked,
        }  # fmt: skip
        assert (folder / "numbers.json").read_text() == '{\n  "a": null\n}\n'


def test_a_chart_stands_alone_with_any_text_on_it() -> None:
    name, half = HOSTILE, Interval(0.5, 0.4, 0.6)
    charts = [
        histogram(name, [Bins(name, "blue", [0, 1, 2], [3, 1]), Bins("b", "grey", [0, 1], [1])], name, note=name),
        lines(name, [Series(name, "blue", [1, 2], [3.0, 4.0], marks=[(1, 3.0)]), Series("b", "grey", [1], [2])], name),
        dots(name, [(name, [Dot(name, "blue", half), Dot("b", "grey", half)])], (0, 1), line=(0.5, name), note=name),
        stacked(name, [(name, [("blue", 0.5), ("tie", 0.5)], half)], [("blue", name), ("ink", "b"), ("mark", "c")]),
        heat_map(name, [name, "b"], [(name, [(0.5, name, name), None]), ("b", [(-0.5, "x", ""), (None, "x", "")])]),
    ]
    for chart in charts:
        assert chart is not None
        text = standalone(chart)
        root = ElementTree.fromstring(text)
        tags = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
        assert tags <= {"svg", "style", "rect", "text", "line", "path", "polyline", "circle"}
        assert "prefers-color-scheme: dark" in text and "url(" not in text and "\x1b" not in text
        width, height = (float(root.attrib[side]) for side in ("width", "height"))
        assert root.attrib["viewBox"] == f"0 0 {width:g} {height:g}" and 300 < width < 600 and 80 < height < 700
        for element in root:  # title, legend and note lie within
            if "x" in element.attrib and element.tag.endswith("text"):
                assert 0 <= float(element.attrib["x"]) <= width and 0 < float(element.attrib["y"]) <= height
    assert "var(--" in standalone(charts[0]) and charts[0] is not None  # type: ignore[arg-type]


def test_the_picture_of_the_readme_has_the_figures_of_its_run() -> None:
    text = Path("docs/report.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    readme = Path("README.md").read_text(encoding="utf-8")
    for figure in ("60.6 % to 83.8 %", "56.4 % to 77.6 %"):
        assert figure in text and figure.replace(" to ", " → ") in readme
    labels = ["937", "636", "135", "932"]
    assert all(f">{count} (" in text for count in labels) and ", ".join(labels) in readme
    assert len(text) < 30_000
    data = whole_run()
    metrics = collect_metrics(data)
    numbers = as_json(metrics) | {"run": vars(data.run), "headline": {"verdict": "better", "text": HOSTILE}}
    drawn = picture(numbers)
    ElementTree.fromstring(drawn)
    assert f">{number(metrics.gate.labels['desirable'].count)} (" in drawn  # type: ignore[union-attr]


@pytest.mark.parametrize("module", sorted(Path(ray_pipeline.report.__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_the_report_room_imports_only_what_lies_below_it(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray_pipeline"):
            assert (node.module or "").split(".")[1] in ("report", "stats", "store"), node.module
