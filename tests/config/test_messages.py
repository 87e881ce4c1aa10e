"""Ends of error messages that name a remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ray_pipeline.config import messages
from ray_pipeline.config.blocks import RayBlock
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.messages import ConfigError, installing
from ray_pipeline.workflow.dmapo_config import DmapoConfig

EXTRAS = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_in_a_checkout_an_extra_is_installed_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Path.cwd()
    assert installing("ifeval") == "pip install '.[ifeval]'"
    monkeypatch.chdir(tmp_path)
    assert installing("ifeval") == f"pip install '{checkout}[ifeval]'"


@pytest.mark.parametrize("extra", ["ifeval", "qlora", "deepspeed", "liger", "tensorboard", "wandb", "mlflow"])
def test_elsewhere_its_requirements_are_named(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quorum-align` is on no index."""
    monkeypatch.setattr(messages, "__file__", str(tmp_path / "site-packages/ray_pipeline/config/messages.py"))
    command = installing(extra)
    assert "quorum-align" not in command and command.startswith("pip install '")
    named = [Requirement(word.strip("'")) for word in command.split()[2:]]
    assert named == [Requirement(text) for text in EXTRAS[extra]]


def test_every_extra_that_a_message_names_exists() -> None:
    told = {
        extra
        for file in Path("ray_pipeline").rglob("*.py")
        for extra in EXTRAS
        if f'installing("{extra}")' in file.read_text() or f"installing('{extra}')" in file.read_text()
    }
    assert {"gpu", "ifeval"} <= told <= set(EXTRAS)
    for file in (*Path("ray_pipeline").rglob("*.py"), *Path("configs").rglob("*.yaml"), *Path("docs").glob("*.md")):
        assert "install quorum-align" not in file.read_text() and "install 'quorum-align" not in file.read_text(), file


def test_the_dashboard_is_a_key() -> None:
    assert RayBlock().arguments() == {}
    assert RayBlock(dashboard=True, num_cpus=2).arguments() == {"include_dashboard": True, "num_cpus": 2}


def test_a_wrong_type_of_a_source_is_one_key_with_the_nearest_name() -> None:
    values = {"run": {"name": "x"}, "candidates": {"source": {"path": "a.csv"}}, "judge": {"source": {"type": "csb"}}}
    with pytest.raises(ConfigError) as raised:
        read_config(DmapoConfig, values, [])
    told = str(raised.value)
    assert "candidates.source.type: missing" in told
    assert "judge.source.type: unknown value 'csb'; did you mean 'csv'?" in told
