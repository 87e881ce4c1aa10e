"""Runs with `train: null` and every model at one endpoint: only data is made, and no command loads a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.workflow.registry import find_workflow
from tests.dags.conftest import ROOT, manifest
from tests.endpoint import KEY, Endpoint, opinion
from tests.operate.at_an_endpoint import RUBRICS, quorum

#: Commands one after the other, and which packages for local models they have imported at the end.
_COMMANDS = """
import json, sys
from typer.testing import CliRunner
from ray_pipeline.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    print(result.output, result.exception or "")
    if result.exit_code:
        sys.exit(result.exit_code)
print(sorted(set(sys.modules) & {"torch", "transformers", "vllm", "trl", "tokenizers"}))
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    with Endpoint(opinion) as endpoint:
        yield endpoint


def config(url: str, **changes: Any) -> dict[str, Any]:
    endpoint = {"base_url": url, "api_key_env": "LOOPBACK_KEY", "retries": 1}
    return {
        "models": {name: {"engine": "openai", "model": name, "endpoint": endpoint} for name in ("writer", "judge")},
        "prompts": {"sources": [{"type": "pocket", "count": 24, "seed": 0}], "num_shards": 2},
        "judge": {"rubrics": RUBRICS},
        "train": None,
        **changes,
    }


def dmapo(url: str, **changes: Any) -> dict[str, Any]:
    return config(url, candidates={"model": "writer", "k": 3}, **changes)


def fellowship(url: str, **changes: Any) -> dict[str, Any]:
    loop = {"generator": "writer", "reviewers": [{"name": "reviewer", "model": "judge"}], "responses": 2}
    return config(url, loop=loop, improve={"reviews": 2, "revisions": 2}, **changes)


def written(folder: Path, values: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "config.yaml")


def commands(workflow: str, folder: Path, values: dict[str, Any]) -> tuple[list[str], str]:
    """Arguments of `run`, `check` and `plan`, and the run folder."""
    run = str(folder / "run")
    return [workflow, "-c", written(folder, values), "--run-dir", run], run


def test_dmapo_makes_data_and_a_report_about_it(server: Endpoint, tmp_path: Path) -> None:
    arguments, run = commands("dmapo", tmp_path, dmapo(server.url))
    each = [
        ["check", *arguments],
        ["plan", *arguments],
        ["run", *arguments, "--executor", "inprocess"],
        ["status", run],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps(each)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert "no problem found" in done.stdout and "its tokens are counted as a quarter" in done.stdout
    stages = manifest(tmp_path / "run")["stages"]
    made = {"prompts", "candidates", "judge-layout", "judge", "critic", "gate", "dataset-rows", "datasets", "report"}
    assert set(stages) == made

    assert rows(tmp_path / "run", "kto") > 0 and rows(tmp_path / "run", "dpo") > 0
    assert "an estimate of one token per 4 bytes" in (tmp_path / "run" / "datasets" / "README.md").read_text()
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "KTO rows and" in page and "DPO pairs from 24 prompts." in page and "alpha" in page
    assert "an estimate of one token per 4 bytes of UTF-8 text, without a tokenizer" in page
    assert "policy" not in page.split("## Configuration")[0].lower() and "has not run" not in page
    numbers = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert numbers["headline"]["verdict"] == "data" and numbers["missing_stages"] == []

    assert "no problem" in quorum("audit", run)
    assert run in quorum("report", run)
    assert "gate.desirable_at" in quorum("compare", run, other(server, tmp_path))
    pairs = rows(tmp_path / "run", "dpo")
    quorum("regate", run, "gate.desirable_at=9", "--write")
    assert rows(tmp_path / "run", "dpo") < pairs


def rows(run: Path, kind: str) -> int:
    return sum(pq.read_table(part).num_rows for part in (run / "datasets" / kind).glob("*/*.parquet"))


def other(server: Endpoint, tmp_path: Path) -> str:
    """A second run of the same calls, with another threshold."""
    folder, calls = tmp_path / "other", tmp_path / "run" / "calls"
    folder.mkdir()
    values = dmapo(server.url, gate={"desirable_at": 8.0}, calls={"root": str(calls), "replay_only": True})
    arguments, run = commands("dmapo", folder, values)
    quorum("run", *arguments, "--executor", "inprocess")
    return run


def test_fellowship_makes_data_and_a_report_about_it(server: Endpoint, tmp_path: Path) -> None:
    arguments, run = commands("fellowship", tmp_path, fellowship(server.url))
    assert "no problem found" in quorum("check", *arguments)
    quorum("plan", *arguments)
    quorum("run", *arguments, "--executor", "inprocess")
    stages = manifest(tmp_path / "run")["stages"]
    assert (
        not set(stages) & {"train", "evaluate", "comparisons", "responses-base"}
        and stages["report"]["status"] == "done"
    )
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "DPO pairs from 24 prompts." in page and "policy" not in page.split("## Configuration")[0].lower()
    for command in ("status", "audit", "report"):
        quorum(command, run)


def test_a_named_tokenizer_counts_lengths(server: Endpoint, tmp_path: Path) -> None:
    values = dmapo(server.url, tokenizer="pocket:policy", datasets={"max_length": 60, "max_prompt_length": 40})
    arguments, run = commands("dmapo", tmp_path, values)
    quorum("run", *arguments, "--executor", "inprocess")
    assert "counted with the tokenizer of policy" in (tmp_path / "run" / "report" / "report.md").read_text()
    assert "no problem" in quorum("audit", run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {}, "candidates": {"model": "writer"}, "tokenizer": "pocket:judge"}, "train.model is 'policy'"),
        ({"tokenizer": "pocket:nobody"}, "unknown pocket model"),
        ({"tokenizer": "./no-such-folder"}, "tokenizer: .*no such folder"),
        (
            {"benchmarks": {"ifeval": {"prompts": "prompts.jsonl"}}},
            "benchmarks measures the policy, but none is trained",
        ),
    ],
)
def test_keys_that_need_a_policy_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(find_workflow("dmapo").config, written(tmp_path, dmapo("http://127.0.0.1:9/v1") | changes))


def test_a_tokenizer_beside_a_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer has no effect where a policy is trained"):
        load_config(find_workflow("dmapo").config, "pocket", ["tokenizer=pocket:judge"])


def test_a_shipped_file_makes_only_data_where_train_is_null(tmp_path: Path) -> None:
    arguments = ["train=null", "tokenizer=pocket:judge", "--run-dir", str(tmp_path)]
    shown = quorum("run", "dmapo", "-c", "pocket", *arguments, "--dry-run")
    assert "datasets " in shown and "report " in shown and "train " not in shown and "evaluate " not in shown


def test_what_counts_lengths_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    def rows(*changes: str) -> str:
        config = load_config(find_workflow("dmapo").config, "pocket", ["train=null", *changes])
        return next(
            s.fingerprint for s in find_workflow("dmapo").wire(config, "/run").stages if s.name == "dataset-rows"
        )

    counted = {rows(), rows("tokenizer=pocket:judge"), rows("tokenizer=pocket:generator")}
    assert len(counted) == 3
    shutil.copytree(ROOT / "ray_pipeline/pocket/weights/judge", tmp_path / "elsewhere")
    assert rows(f"tokenizer={tmp_path / 'elsewhere'}") in counted
