"""Prints the fingerprints of the shipped configurations as JSON, with a further key in every class of settings.

Run as a program of its own: the key, `unused_key: int = 7`, goes into each class while it is made.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ray_pipeline.config.settings import Settings

_META: Any = type(Settings)
_make = _META.__new__


def _with_key(meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
    if any(issubclass(base, Settings) for base in bases):
        namespace.setdefault("__annotations__", {})["unused_key"] = "int"
        namespace["unused_key"] = 7
    return _make(meta, name, bases, namespace, **options)


_META.__new__ = _with_key

if __name__ == "__main__":
    from tests.golden.test_goldens import fingerprint_values, outside_world

    with tempfile.TemporaryDirectory() as folder, outside_world(Path(folder)):
        found = fingerprint_values()
    from ray_pipeline.policy.train import TrainSettings

    assert TrainSettings.model_fields["unused_key"].default == 7
    json.dump(found, sys.stdout)
