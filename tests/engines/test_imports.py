"""Heavy imports leave the collection of garbage as it was."""

from __future__ import annotations

import gc

import pytest

from ray_pipeline.engines.imports import heavy_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with heavy_imports():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(ImportError), heavy_imports():
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
