"""A page as Markdown: GitHub's tables, charts as links to their files, everything from outside escaped."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from ray_pipeline.report.charts import Chart
from ray_pipeline.report.escaping import fenced, inline, paragraph
from ray_pipeline.report.page import (
    Block,
    Browser,
    Cell,
    Folded,
    Funnel,
    HeatMap,
    Page,
    Panels,
    Section,
    Table,
    Text,
    charts_of,
)

#: Characters of an excerpt; the HTML page and the run's tables have the whole text.
EXCERPT = 600


def render_markdown(page: Page) -> str:
    """The page as Markdown; its charts are expected under the names that `charts_of` gives them."""
    parts = [f"# {inline(page.title)}", paragraph(page.subtitle)]
    if page.headline:
        parts.append(f"**{inline(page.headline)}**")
    if page.about:
        parts.append(_bullets([f"{question}: {answer}" for question, answer in page.about]))
    if page.tiles:
        parts.append(_bullets([f"{name}: {figure}" for figure, name in page.tiles]))
    if page.warnings:
        parts += ["## Warnings", _bullets(page.warnings)]
    for section in page.sections:
        parts += [f"## {inline(section.title)}", *_section(section)]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], text_columns: int = 1) -> str:
    """A table alone; columns after the first `text_columns` are aligned right."""
    rules = ["---" if place < text_columns else "---:" for place in range(len(columns))]
    lines = [_row([inline(column) for column in columns]), f"|{'|'.join(rules)}|"]
    lines += [_row([inline(cell.text if isinstance(cell, Cell) else cell) for cell in row]) for row in rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {paragraph(line)}" for line in lines)


def _section(section: Section) -> list[str]:
    return [
        part
        for block, charts in zip(section.blocks, charts_of(section), strict=True)
        for part in _block(block, [_image(name, chart) for name, chart in charts])
    ]


def _image(name: str, chart: Chart) -> str:
    return f"![{inline(chart.title)}]({name})"


def _block(block: Block, images: list[str]) -> list[str]:
    match block:
        case Text():
            return [paragraph(block.text)]
        case Table():
            title = [f"### {inline(block.title)}"] if block.title else []
            return [*title, markdown_table(block.columns, block.rows, block.text_columns)]
        case Panels():
            return ["\n".join(images)]
        case HeatMap():
            cells = [
                [
                    name,
                    *("" if cell is None else f"{cell.text} {f'({cell.below})' if cell.below else ''}" for cell in row),
                ]
                for name, row in block.rows
            ]
            return [f"### {inline(block.title)}", *images, markdown_table(["", *block.columns], cells)]
        case Folded():
            return [f"{paragraph(block.summary)}:", fenced(block.text)]
        case Funnel():
            rows = [[step.name, step.note, step.figure] for step in block.steps]
            return [markdown_table(["step", "", block.unit], rows, text_columns=2)]
        case Browser():
            return _excerpts(block)


def _excerpts(block: Browser) -> list[str]:
    parts = [f"Beside this page, report.html has a browser of examples. {paragraph(block.packed.scope)}"]
    if block.excerpts:
        parts.append("Here are the first kept rows by candidate id, both labels in turn: not chosen for their looks.")
    for excerpt in block.excerpts:
        parts += [f"### {inline(excerpt.title)}", paragraph(excerpt.note)]
        if excerpt.id:
            parts.append(f"[Open it in report.html](report.html#{quote(excerpt.id)})")
        for name, text in excerpt.texts:
            parts += [f"{inline(name)}:", fenced(text, EXCERPT)]
    return parts
