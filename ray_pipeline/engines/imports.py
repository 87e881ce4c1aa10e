"""Imports of vLLM, torch and transformers, which take seconds."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

#: Variable that stops transformers from advising to install torch.
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
#: Modules of transformers that were imported as if torch were not installed.
_torchless: dict[str, ModuleType] = {}


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without looking for garbage: imports leave hardly any, and looking for it takes a fifth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Import transformers for its tokenizers alone, as if torch were not installed: where it is, transformers imports
    it with all that builds models, which takes several times as long.

    At the end `sys.modules` forgets these imports, so that a later import of transformers sees torch; what was loaded
    by them stays usable. Where transformers or torch is imported already, nothing is different.
    """
    if {"transformers", "torch"} & sys.modules.keys():
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python is told that a package is not there
    sys.modules.update(_torchless)
    advises = _NO_ADVICE not in os.environ
    os.environ.setdefault(_NO_ADVICE, "1")
    try:
        with heavy_imports():
            yield
    finally:
        if advises:
            del os.environ[_NO_ADVICE]
        del sys.modules["torch"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            _torchless[name] = sys.modules.pop(name)
        logging.getLogger("transformers").handlers.clear()  # a later import adds its own
