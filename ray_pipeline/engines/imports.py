"""Imports of vLLM, torch and transformers, which take seconds."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without looking for garbage: imports leave hardly any, and looking for it takes a fifth of their time.

    What they made is not looked at later either, and not at the end of the process, which would take another second.
    """
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if len(sys.modules) > before:
                gc.freeze()
            gc.enable()
