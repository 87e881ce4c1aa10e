"""Text and numbers from models, servers, files and users, before they are stored or shown.

Arrow and UTF-8 take no unpaired surrogate, which JSON from an endpoint can contain, and for many readers a NUL ends a
text; terminals and logs act on control characters. Each kind is replaced here and nowhere else.
"""

from __future__ import annotations

import decimal
import json
import re
import unicodedata
from typing import Any, TypeGuard

from ray_pipeline.store.secrets import map_texts, redact

_UNSTORABLE = re.compile("[\ud800-\udfff\0]")
# Cc: control, Cf: format (bidirectional overrides, zero width), Cs: lone surrogates, which UTF-8 cannot hold.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_MOST = 2**31  # token counts are 32-bit integers in every table
_MOST_DIGITS = 40  # no figure has more; Python reads at most 4,300, and arithmetic with floats takes 308


def storable(text: str) -> str:
    """`text` with U+FFFD for every unpaired surrogate and NUL."""
    return text if text.isascii() and "\0" not in text else _UNSTORABLE.sub("\ufffd", text)


def storable_value(value: Any) -> Any:
    """A JSON value with every text in it storable, the names of its members included."""
    return map_texts(storable, value)


def json_value(text: str) -> Any:
    """The value of a JSON text, with every text in it storable. Raises ValueError if it is not JSON."""
    try:
        value = json.loads(text, parse_int=json_integer)
        return storable_value(value) if "\\u" in text else value  # only an escape can hold what UTF-8 cannot
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_integer(digits: str) -> int | float:
    """The value of an integer in JSON, for `parse_int`; of too many digits a float, whose range is checked like any."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def is_number(value: Any) -> TypeGuard[int | float | decimal.Decimal]:
    """Whether a value of a file or reply is a number, decimals of Parquet included; true and false are none."""
    return isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool)


def token_count(value: Any, otherwise: int = 0) -> int:
    """A number of tokens that a table can hold; `otherwise` for what is no such number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < _MOST else otherwise


def visible(text: str) -> str:
    """`text` with every control, format and surrogate character but newline and tab as a backslash escape."""
    text = text.replace("\r\n", "\n")
    if text.replace("\n", "").replace("\t", "").isprintable():  # most texts are, and looking at each character is slow
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE else _code(c) for c in text)


def shown(text: str) -> str:
    """`text` for a terminal or a log: without keys, its control characters visible."""
    return visible(redact(text))


def _code(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
