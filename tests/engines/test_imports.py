"""Heavy imports leave the collection of garbage as it was, and are no part of it afterwards."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from ray_pipeline.engines.imports import heavy_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, enabled: bool) -> None:
    (tmp_path / "heavy_for_a_test.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    if not enabled:
        gc.disable()
    try:
        with heavy_imports():
            assert not gc.isenabled()
            import heavy_for_a_test  # noqa: F401
        assert gc.isenabled() is enabled
        assert (gc.get_freeze_count() > 1000) is enabled
        gc.unfreeze()
        with heavy_imports():  # nothing new
            pass
        assert gc.get_freeze_count() == 0
        with pytest.raises(ImportError), heavy_imports():
            import no_such_module  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
        del sys.modules["heavy_for_a_test"]
