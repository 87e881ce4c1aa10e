"""A run whose prompts are held against a benchmark: log, report and card have the counts, and later commands work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_pipeline.graph.results import read_run
from tests.endpoint import KEY, Endpoint, opinion
from tests.operate.at_an_endpoint import RUBRICS, quorum


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    with Endpoint(opinion) as endpoint:
        yield endpoint


def command(folder: Path, url: str, action: str) -> list[str]:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n} words."}) + "\n" for n in range(16)))
    (folder / "test_set.txt").write_text("say 3 words\nSay 5 words!\nSing a song.\n")
    endpoint = {"base_url": url, "api_key_env": "LOOPBACK_KEY", "retries": 1}
    values: dict[str, Any] = {
        "models": {name: {"engine": "openai", "model": name, "endpoint": endpoint} for name in ("writer", "judge")},
        "prompts": {
            "sources": [{"type": "jsonl", "path": str(folder / "prompts.jsonl"), "column": "prompt"}],
            "decontaminate": {
                "against": [{"type": "text", "path": str(folder / "test_set.txt"), "label": "songs"}],
                "action": action,
            },
            "num_shards": 2,
        },
        "candidates": {"model": "writer", "k": 3},
        "judge": {"rubrics": RUBRICS},
        "train": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return ["dmapo", "-c", str(folder / "config.yaml"), "--run-dir", str(folder / "run"), "--executor", "inprocess"]


@pytest.mark.parametrize(("action", "kept", "done"), [("drop", 14, "left out"), ("warn", 16, "kept (action: warn)")])
def test_report_and_card_have_the_counts(server: Endpoint, tmp_path: Path, action: str, kept: int, done: str) -> None:
    told = quorum("run", *command(tmp_path, server.url, action))
    warning = "2 of 16 prompts overlap with songs (2); set prompts.decontaminate.action to drop"
    assert (warning in " ".join(told.split())) == (action == "warn")
    run = str(tmp_path / "run")
    assert read_run(run).results["prompts"].facts["counts"]["kept"] == kept
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "Overlap with benchmarks" in page and f"2 of 16 overlap with a benchmark; {done}" in page
    assert ("contaminated" in page.split("## Overlap")[0]) == (action == "drop")
    (found,) = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())["contamination"]
    assert found["benchmarks"] == {"songs": {"texts": 3, "exact": 2, "overlapping": 2}}

    for _ in range(2):
        card = (tmp_path / "run" / "datasets" / "README.md").read_text()
        assert f"2 of 16 overlap with a benchmark; {done}" in card and "2 overlap, 2 of them equal" in card
        quorum("regate", run, "gate.desirable_at=9", "--write")
    assert "no problem" in quorum("audit", run)
