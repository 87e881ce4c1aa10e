"""Values as plain JSON types, and documents as JSON text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(document: Any) -> str:
    """A document as JSON in ASCII, its keys sorted."""
    return json.dumps(as_json(document), indent=2, sort_keys=True, allow_nan=False) + "\n"


def as_json(value: Any) -> Any:
    """`value` as plain JSON types: dataclasses become objects, NaN and infinities null, keys strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
