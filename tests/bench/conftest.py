"""The official IFEval checkers, where they can run."""

from __future__ import annotations

import pytest

from ray_pipeline.bench.ifeval.checkers import Checkers, load_checkers
from tests.published import nltk_data


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Checkers:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[ifeval]'")
    folder = nltk_data()
    if folder is None:
        pytest.skip("no punkt_tab here: python -m nltk.downloader -d tests/.cache/nltk_data punkt_tab")
    if folder:
        monkeypatch.setenv("NLTK_DATA", folder)
    return load_checkers()
