"""What Prometheus and log collectors are told of a run."""

from __future__ import annotations

import collections
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph import progress
from ray_pipeline.graph.json_log import JsonLines, stage_of
from ray_pipeline.graph.log import RunLog
from ray_pipeline.graph.meters import METERS, Meters
from ray_pipeline.graph.progress import ProgressBoard, StageProgress
from ray_pipeline.store.files import Folder


class Recorder:
    """Meters that keep what they are told."""

    def __init__(self) -> None:
        self.told: collections.defaultdict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    def __call__(self, name: str) -> Any:
        told = self.told[name]

        class Meter:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert METERS[name][0] == "counter" and set(tags) == {"run", "stage", *METERS[name][2]}
                told[tuple(sorted(tags.items()))] += value

            def set(self, value: float, tags: dict[str, str]) -> None:
                assert METERS[name][0] == "gauge" and set(tags) == {"run", "stage", *METERS[name][2]}
                told[tuple(sorted(tags.items()))] = value

        return Meter()


def test_a_board_feeds_the_meters(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(progress, "Meters", lambda run: Meters(run, recorder))
    board = ProgressBoard()
    board.meter("pocket")
    board.begin("judge", 8, 2)
    for _ in range(2):
        board.add("judge", Usage(calls_engine=3, prompt_tokens=100, cached_tokens=50), rows=5, shards_done=1)
    board.replies("judge", {("judge helpfulness", True): 9, ("judge helpfulness", False): 1})
    board.look()

    def of(name: str, **tags: str) -> float:
        return recorder.told[name][tuple(sorted({"run": "pocket", "stage": "judge", **tags}.items()))]

    assert of("quorum_rows_total") == 10 and of("quorum_calls_total", source="engine") == 6
    assert of("quorum_tokens_total", kind="prompt") == 200 and of("quorum_tokens_total", kind="cached") == 100
    assert of("quorum_replies_total", judge="judge helpfulness", read="false") == 1
    assert [of("quorum_shards", state=s) for s in ("all", "done", "failed")] == [8, 4, 0]


def test_the_dashboard_asks_for_meters_that_there_are() -> None:
    dashboard = json.loads(Path("cluster/grafana_quorum.json").read_text())
    asked: dict[str, set[str]] = collections.defaultdict(set)
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name, labels in re.findall(r"ray_(quorum_\w+)\{([^}]*)\}", target["expr"]):
                asked[name] |= {label for label in re.findall(r"(\w+)=", labels)}
    assert set(asked) == set(METERS)
    for name, labels in asked.items():
        assert labels <= {"run", "stage", *METERS[name][2]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_json_log_names_run_stage_and_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(Folder(str(tmp_path / "my-run")), Console(quiet=True), as_json=True) as log:
        log.stages = ["judge"]
        log.say("judge: shard 3 failed: OSError: full", 3)
        log.say("no stage: at all")
        log.progress([StageProgress("judge", "running", shards=4), StageProgress("gate")])
    (file,) = (tmp_path / "my-run" / "logs").glob("*.jsonl")
    failed, other, running = (json.loads(line) for line in file.read_text().splitlines())
    assert (failed["run"], failed["stage"], failed["shard"], failed["level"]) == ("my-run", "judge", 3, "INFO")
    assert failed["message"].endswith("full") and "stage" not in other and "shard" not in other
    assert running["data"]["shards"] == 4 and running["message"] == "judge: running, shards 0/4"
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["message"] for line in shown] == [failed["message"], other["message"], running["message"]]


def test_text_logs_are_as_before(tmp_path: Path) -> None:
    with RunLog(Folder(str(tmp_path)), Console(quiet=True)) as log:
        log.say("hello")
    (file,) = (tmp_path / "logs").glob("*.log")
    assert file.read_text().rstrip().endswith("quorum INFO hello")


def test_errors_keep_their_trace() -> None:
    try:
        raise OSError("full")
    except OSError:
        import sys

        record = logging.LogRecord("quorum", logging.ERROR, "", 0, "went %s", ("wrong",), sys.exc_info())
    line = json.loads(JsonLines("r").format(record))
    assert line["message"] == "went wrong" and "OSError: full" in line["trace"]
    assert stage_of("judge: x", ["judge"]) == "judge" and stage_of("judge x", ["judge"]) is None
