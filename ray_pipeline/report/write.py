"""A page and its numbers as files, the same way for every workflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.report.charts import standalone
from ray_pipeline.report.documents import json_text
from ray_pipeline.report.html import render_html
from ray_pipeline.report.markdown import render_markdown
from ray_pipeline.report.page import Page, charts_of
from ray_pipeline.store.locations import make_folder, set_mode


def write_page(page: Page, numbers: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.md, report.html, the charts as charts/*.svg, and the numbers; return their paths.

    Equal pages and numbers give equal bytes: nothing here reads a clock, a host name or the order of a hash table.

    Args:
        numbers: name of a file → its text (CSV, LaTeX), or a document that is written as JSON.
        folder: made if absent.
    """
    texts = {
        "report.md": render_markdown(page),
        "report.html": render_html(page),
        **{
            name: standalone(chart)
            for section in page.sections
            for charts in charts_of(section)
            for name, chart in charts
        },
        **{name: value if isinstance(value, str) else json_text(value) for name, value in numbers.items()},
    }
    for name, text in texts.items():
        path = folder / name
        make_folder(str(path.parent))
        path.write_text(text, encoding="utf-8", newline="\n")
        set_mode(str(path))
    return [folder / name for name in texts]
