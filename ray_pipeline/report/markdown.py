"""Text that no data can break: everything a run brings along is escaped before it enters the page.

Prompts, responses, judge names and reasons come from models and users. Inline they lose every character that Markdown
or HTML could act on; longer texts go into a fenced block whose fence is longer than any inside. Control characters
(terminal colours, bidirectional overrides) are shown as escapes instead of acting.
"""

import re
import unicodedata
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ray_pipeline.evaluate.headline import percent, percent_interval

# An underscore inside a word is no emphasis, and `lora_dropout` should stay readable in the raw page.
_MARKDOWN = re.compile(r"([\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_]))")
# Cc: control, Cf: format (bidirectional overrides, zero width), Cs: lone surrogates, which UTF-8 cannot hold.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class Safe(str):
    """Text that is Markdown already; everything else is escaped where the template prints it."""


def visible(text: str) -> str:
    """`text` with every control, format and surrogate character but newline and tab as a backslash escape."""
    text = text.replace("\r\n", "\n")
    if text.replace("\n", "").replace("\t", "").isprintable():  # most texts are, and looking at each character is slow
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE else _escape(c) for c in text)


def inline(text: str) -> Safe:
    """One line of literal text, safe in a sentence, a heading and a table cell."""
    flat = " ".join(visible(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Safe(_MARKDOWN.sub(r"\\\1", flat))


def fenced(text: str, limit: int = 600) -> Safe:
    """A code block of the first `limit` characters of `text`, its fence longer than any run of backticks inside."""
    shown = visible(text)
    if len(shown) > limit:
        shown = f"{shown[:limit]}\n… ({len(shown) - limit} more characters)"
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return Safe(f"{fence}text\n{shown}\n{fence}")


def number(value: Any, digits: int = 2) -> Safe:
    """A count with commas, a float with `digits` decimals, "–" for nothing."""
    if value is None:
        return Safe("–")
    if isinstance(value, int):
        return Safe(f"{value:,}")
    return Safe(f"{value:.{digits}f}")


def signed(value: float | None, digits: int = 2) -> Safe:
    """A difference with its sign, "–" for nothing."""
    return Safe("–" if value is None else f"{value:+.{digits}f}")


def render(template: str, values: Mapping[str, Any]) -> str:
    """Render a template of this package; whatever it prints that is not Safe is escaped."""
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Safe) else inline(str(value)),
        autoescape=False,  # HTML escaping alone would not stop Markdown; `finalize` does both
    )
    environment.filters.update(
        num=number,
        signed=signed,
        fence=fenced,
        pct=lambda share, digits=1: Safe(percent(share, digits)),
        pct_interval=lambda interval: Safe(percent_interval(interval)),
    )
    source = files("ray_pipeline.report").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(dict(values))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
