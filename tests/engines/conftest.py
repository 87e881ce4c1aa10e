"""Models and adapters for the engine tests: tiny, random, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import make_llama, make_lora, make_qwen3


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, qwen3: Path) -> Path:
    return make_lora(tmp_path_factory.mktemp("models") / "lora", qwen3)
