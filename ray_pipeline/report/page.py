"""A page of one HTML file: sections made of tables, charts and facts, laid out by one template.

The file needs no network. Everything that is printed is escaped by jinja2 (autoescape); only SVG of `charts.py` and
base64 of `examples_data.py` pass as they are. A content security policy lets no script run but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ray_pipeline.report.charts import Chart
from ray_pipeline.report.examples_data import Examples
from ray_pipeline.report.markdown import visible


@dataclass(frozen=True)
class Cell:
    """A cell with more than its text: `bar` (0 to 1) is drawn behind it, `tone` is good, bad or changed."""

    text: str
    bar: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """`text_columns` of the columns, from the left, hold words; the others hold numbers and are set right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    text_columns: int = 1
    title: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Panels:
    """Charts side by side, as many as the width allows."""

    charts: Sequence[Chart]
    kind: str = "panels"


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map: a value from −1 to 1 (None: undefined), and what stands below it."""

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
    """`share` (0 to 1) is the length of its bar."""

    name: str
    note: str
    figure: str
    share: float
    colour: str


@dataclass(frozen=True)
class Funnel:
    steps: Sequence[FunnelStep]
    kind: str = "funnel"


@dataclass(frozen=True)
class Browser:
    """The browser of examples."""

    examples: Examples
    kind: str = "browser"


Block = Text | Table | Panels | HeatMap | Folded | Funnel | Browser


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """`headline` is a sentence or two, `tone` its colour (good, bad, unsure), `tiles` are (figure, what it is)."""

    title: str
    subtitle: str
    headline: str
    sections: Sequence[Section]
    tone: str = "unsure"
    tiles: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = field(default_factory=tuple)


def panels(*charts: Chart | None) -> list[Block]:
    """The charts that there are as one block, or none."""
    found = [chart for chart in charts if chart is not None]
    return [Panels(found)] if found else []


def render_page(page: Page) -> str:
    """The page as HTML. Equal pages give equal text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    )
    examples = next((b.examples for s in page.sections for b in s.blocks if isinstance(b, Browser)), None)
    script = "" if examples is None else _part("examples.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    values = {
        "page": page,
        "style": Markup(_part("page.css")),
        "script": Markup(script),
        "policy": f"{policy}; script-src 'sha256-{digest}'" if script else policy,
        "examples": examples,
        "meta": None if examples is None else script_json(examples.about),
    }
    return environment.from_string(_part("page.html.j2")).render(values)


def script_json(value: Mapping[str, Any]) -> Markup:
    """JSON that may stand in a script tag: without `<`, no text in it can end the tag or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _part(name: str) -> str:
    return files("ray_pipeline.report").joinpath(name).read_text(encoding="utf-8")
