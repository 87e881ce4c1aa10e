"""The one place where text from outside a page is made safe for Markdown, HTML and SVG.

Prompts, responses, judge names and reasons come from models and users. In a line of Markdown they lose every character
that Markdown or HTML could act on; longer texts go into a fenced block whose fence is longer than any inside. HTML and
SVG escape the markup characters. Control characters (terminal colours, bidirectional overrides) are shown as escapes.
"""

import re
from typing import Any

from markupsafe import Markup, escape

from ray_pipeline.store.outside import visible

# An underscore inside a word is no emphasis, and `lora_dropout` should stay readable in the raw page.
_MARKDOWN = re.compile(r"([\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_]))")
# What starts a list or a rule at the beginning of a line.
_LINE_START = re.compile(r"^(\d{1,9})?([-+](?=[-+ ]|$)|(?<=\d)[.)](?= |$))")


def one_line(text: str) -> str:
    """`text` with its control characters visible and every run of white space as one space."""
    return " ".join(visible(text).split())


def short(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters."""
    flat = one_line(text)
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def markup(value: Any) -> Markup:
    """HTML or SVG that shows `value` as it is; what is Markup already passes."""
    return value if isinstance(value, Markup) else escape(visible(str(value)))


def inline(text: str) -> str:
    """One line of literal text for Markdown, safe in a sentence, a heading and a table cell."""
    flat = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", flat)


def paragraph(text: str) -> str:
    """One line of literal text for Markdown that may stand at the beginning of a line."""
    return _LINE_START.sub(r"\1\\\2", inline(text))


def fenced(text: str, limit: int | None = None) -> str:
    """A code block of the first `limit` characters of `text`, its fence longer than any run of backticks inside."""
    shown = visible(text)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[:limit]}\n… ({len(shown) - limit} more characters)"
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"
