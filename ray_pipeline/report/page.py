"""The document model: a page is sections made of text, tables, charts and examples.

`markdown.py` and `html.py` render it, `write.py` writes both with the charts as files. Blocks hold plain text; the
renderers escape it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from markupsafe import Markup

from ray_pipeline.report.charts import Chart, heat_map
from ray_pipeline.report.documents import as_json

#: Folder of the charts, beside report.md.
CHARTS = "charts"


@dataclass(frozen=True)
class Cell:
    """A cell with more than its text: `bar` (0 to 1) is drawn behind it, `tone` is good, bad or changed."""

    text: str
    bar: float | None = None
    tone: str = ""


Rows = list[list[str | Cell]]


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """The first `text_columns` columns hold words; the others hold numbers and are aligned right. A `folded` table is
    behind its title, which opens it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    text_columns: int = 1
    title: str = ""
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Panels:
    """Charts side by side, as many as the width allows."""

    charts: Sequence[Chart]
    kind: str = "panels"


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map: a value from −1 to 1 (None: undefined), its text, and a smaller text below."""

    value: float | None
    text: str
    below: str = ""


@dataclass(frozen=True)
class HeatMap:
    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Heat | None]]]
    kind: str = "heat"


@dataclass(frozen=True)
class Folded:
    """A long text behind a line that opens it."""

    summary: str
    text: str
    kind: str = "folded"


@dataclass(frozen=True)
class FunnelStep:
    """`share` (0 to 1) of the largest step is the length of its bar."""

    name: str
    note: str
    figure: str
    share: float
    colour: str


@dataclass(frozen=True)
class Funnel:
    """Steps that count the same thing, named by `unit`."""

    unit: str
    steps: Sequence[FunnelStep]
    kind: str = "funnel"


@dataclass(frozen=True)
class Excerpt:
    """One example to read: `texts` are (name, text), `id` is its address in the browser of the HTML page."""

    title: str
    note: str
    texts: Sequence[tuple[str, str]]
    id: str = ""


@dataclass(frozen=True)
class Packed:
    """All examples, for the script of the HTML page.

    `about` is JSON that the script needs first; `index` and `chunks` are gzip in base64; `scope` says which of the
    run's candidates are included; `rows` counts them.
    """

    about: Mapping[str, Any]
    index: Markup
    chunks: Sequence[Markup]
    scope: str
    rows: int


@dataclass(frozen=True)
class Browser:
    """Examples: HTML has a browser of all that are `packed`, Markdown the `excerpts`."""

    packed: Packed
    excerpts: Sequence[Excerpt] = ()
    kind: str = "browser"


Block = Text | Table | Panels | HeatMap | Folded | Funnel | Browser


@dataclass(frozen=True)
class Section:
    """`id` is unique on the page; anchors and names of chart files are made of it."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """`headline` is a sentence or two, `tone` its colour (good, bad, unsure); `about` answers what a reader asks first,
    as (question, answer); `tiles` are (figure, what it is)."""

    title: str
    subtitle: str
    headline: str
    sections: Sequence[Section]
    tone: str = "unsure"
    about: Sequence[tuple[str, str]] = ()
    tiles: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = field(default_factory=tuple)


def panels(*charts: Chart | None) -> list[Block]:
    """The charts that there are as one block, or none."""
    found = [chart for chart in charts if chart is not None]
    return [Panels(found)] if found else []


def facts(values: Mapping[str, str], columns: tuple[str, str] = ("", "")) -> list[Block]:
    """A table of two columns of words, or nothing where there are no values."""
    return [Table(columns, [[name, text] for name, text in values.items()], text_columns=2)] if values else []


def folded(summary: str, value: Mapping[str, Any] | None) -> list[Block]:
    """A mapping as folded YAML, or nothing where it is empty or None."""
    if not value:
        return []
    text: str = yaml.safe_dump(as_json(value), sort_keys=False, allow_unicode=True, width=100)
    return [Folded(summary, text.rstrip())]


def charts_of(section: Section) -> list[list[tuple[str, Chart]]]:
    """The charts of each block with their file names, relative to the page and unique on it."""
    place = itertools.count(1)
    return [[(f"{CHARTS}/{section.id}-{next(place)}.svg", c) for c in _charts(block)] for block in section.blocks]


def _charts(block: Block) -> Sequence[Chart]:
    if isinstance(block, HeatMap):
        rows = [
            (name, [None if c is None else (c.value, c.text, c.below) for c in cells]) for name, cells in block.rows
        ]
        return [heat_map(block.title, block.columns, rows)]
    return block.charts if isinstance(block, Panels) else ()
