"""Live win rates on real engines: a generator alone and reviewed, against itself alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dags.conftest import engine_calls
from tests.dags.in_process import here

pytestmark = pytest.mark.e2e


def test_a_reviewed_generator_wins_against_itself_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["run", "winrate", "-c", "configs/pocket_winrate.yaml", "--run-dir", str(folder)]
    command += ["live.prompts.sources.0.count=40", "live.prompts.num_shards=2"]
    command += ["live.configurations=[{name: reviewed, generator: generator, reviewers: [{name: r, model: reviewer}]}]"]
    command += ["live.baselines=[generator]", f"models={{{', '.join(MODELS)}}}"]
    here(*command)
    (rate,) = json.loads((folder / "report" / "winrate.json").read_text())["runs"]
    assert (rate["configuration"], rate["baseline"], rate["n"]) == ("reviewed", "generator", 40)
    assert rate["wins"] >= 8 and rate["losses"] <= 2 and rate["missing"] == 0
    protocol = rate["protocol"]
    assert protocol["judge"].startswith("sha256:") and protocol["reference"] == "generator" and rate["fingerprint"]
    assert protocol["order"] == "both orders, conflict: tie" and protocol["judge_prompts"]
    page = (folder / "report" / "report.md").read_text()
    assert f"| reviewed | {rate['win_rate']['value']:.1f} (" in page
    before = engine_calls(folder)
    assert before["versus"] > 0
    again = here(*command)
    assert "running" not in again.output and not again.engines and engine_calls(folder) == before


MODELS = [
    f"{name}: {{model: 'pocket:{name}', dtype: float32, max_model_len: {length}}}"
    for name, length in (("generator", 256), ("reviewer", 256), ("judge", 512))
]
