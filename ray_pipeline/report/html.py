"""A page as one HTML file that needs no network.

Everything that is printed is escaped; only the SVG of charts and the base64 of packed examples pass as they are. A
content security policy allows no script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ray_pipeline.report.escaping import markup
from ray_pipeline.report.page import Browser, Page


def render_html(page: Page) -> str:
    """The page as HTML. Equal pages give equal text."""
    packed = next((b.packed for s in page.sections for b in s.blocks if isinstance(b, Browser)), None)
    script = "" if packed is None else part("examples.js")
    return rendered(
        "page.html.j2",
        script,
        page=page,
        style=Markup(part("charts.css") + part("page.css")),
        examples=packed,
        meta=None if packed is None else script_json(packed.about),
    )


def render_review(title: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page on which a person labels rows; it saves them as a download.

    Args:
        about: `key`, under which the browser keeps labels until they are saved, and `file`, the name of the download.
        rows: as `operate.review` writes them.
    """
    return rendered(
        "review.html.j2",
        part("review.js"),
        title=title,
        style=Markup(part("charts.css") + part("page.css") + part("review.css")),
        data=script_json({**about, "rows": list(rows)}),
        count=len(rows),
    )


def rendered(template: str, script: str, **values: Any) -> str:
    """A template of this package with one script, the only one that the page may run."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=markup
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return environment.from_string(part(template)).render(script=Markup(script), policy=policy, **values)


def script_json(value: Mapping[str, Any]) -> Markup:
    """JSON that may stand in a script tag: without `<`, no text in it can end the tag or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def part(name: str) -> str:
    """A file of this package as text."""
    return files("ray_pipeline.report").joinpath(name).read_text(encoding="utf-8")
