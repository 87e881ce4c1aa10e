"""A model is what it holds, not where it lies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ray_pipeline.engines import identity
from ray_pipeline.engines.identity import ModelNotFound, model_identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What matters of a model folder."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"hidden_size": 8, "_name_or_path": "/somewhere"}))
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "generation_config.json").write_text("{}")
    return path


def test_a_copy_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "renamed")
    assert model_identity(str(folder)) == model_identity(str(copy))
    assert model_identity(str(folder))["model"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(model_identity(str(folder)))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_whatever_decides_answers_is_in_the_digest(folder: Path, name: str) -> None:
    before = model_identity(str(folder))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(b'{"hidden_size": 9}' if name == "config.json" else content + b" ")
    assert model_identity(str(folder)) != before


def test_a_model_retrained_in_place_is_another_one_even_at_the_same_size(folder: Path) -> None:
    before = model_identity(str(folder))
    weights = folder / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # file systems with coarse clocks included
    assert model_identity(str(folder)) != before


def test_what_lies_beside_a_model_is_not_the_model(folder: Path) -> None:
    before = model_identity(str(folder))
    for name in ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "pytorch_model.bin"):
        (folder / name).write_text("x")  # the last one is not read where there are safetensors
    (folder / "config.json").write_text(
        json.dumps({"_name_or_path": "/other", "transformers_version": "9", "hidden_size": 8})
    )
    assert model_identity(str(folder)) == before


def test_old_weight_files_count_where_there_are_no_others(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    before = model_identity(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"others")
    assert model_identity(str(folder)) != before


def test_an_adapter_is_named_by_its_weights_and_not_by_its_base(folder: Path, tmp_path: Path) -> None:
    adapters = []
    for place in ("/a", "/b"):
        adapter = tmp_path / f"adapter{place[1:]}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": place}))
        (adapter / "adapter_model.safetensors").write_bytes(b"lora")
        adapters.append(model_identity(str(folder), adapter=str(adapter)))
    assert adapters[0] == adapters[1]
    assert set(adapters[0]) == {"model", "adapter"}
    assert adapters[0]["model"] == model_identity(str(folder))["model"]


def test_weights_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_identity(str(folder))
    monkeypatch.setattr(identity, "_read_digest", lambda file: pytest.fail(f"{file} was read again"))
    model_identity(str(folder))


def test_a_path_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder") as caught:
        model_identity(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="contains no model"):
        model_identity(str(tmp_path / "empty"))


class Hub:
    """Stands in for the hub: answers with a commit or raises."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer

    def model_info(self, name: str, *, revision: str, timeout: float) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(sha=self.answer)


def with_hub(monkeypatch: pytest.MonkeyPatch, answer: str | Exception, cache: Path, offline: bool = False) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(answer))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def fill_cache(cache: Path) -> None:
    folder = cache / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)


def test_a_hub_name_becomes_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_hub(monkeypatch, COMMIT, tmp_path)
    assert model_identity("org/name") == {"model": f"hub:org/name@{COMMIT}"}


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_cache_answers_when_the_hub_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    fill_cache(tmp_path)
    with_hub(monkeypatch, ConnectionError("no route"), tmp_path, offline)
    assert model_identity("org/name") == {"model": f"hub:org/name@{COMMIT}"}
    assert model_identity("org/name", revision=COMMIT) == {"model": f"hub:org/name@{COMMIT}"}
    with pytest.raises(ModelNotFound, match="no revision 'v2'"):
        model_identity("org/name", revision="v2")


def test_a_model_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    missing = RepositoryNotFoundError("404", response=response)  # type: ignore[arg-type]
    with_hub(monkeypatch, missing, tmp_path)
    with pytest.raises(ModelNotFound, match=r"'org/name' was not found.*HF_TOKEN.*Correct the name"):
        model_identity("org/name")
    unknown = RevisionNotFoundError("404", response=response)  # type: ignore[arg-type]
    with_hub(monkeypatch, unknown, tmp_path)
    with pytest.raises(ModelNotFound, match="no revision 'v9'"):
        model_identity("org/name", revision="v9")
