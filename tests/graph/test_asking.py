"""An agent stage as a function of one row, and modules of stages that load without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage, StageStop, WholeWork
from ray_pipeline.store.calls import read_calls
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import CANDIDATES
from tests.data.test_llm_stages import Shard, candidates
from tests.graph import tone
from tests.scripted import ScriptedEngine

ANSWERS = candidates(("one", "Hello!", "stop"), ("one", None, "error"), ("two", "Go away", "stop"))


def says(messages: Any, sampling: Any) -> str:
    return "rude" if "Go away" in messages[-1]["content"] else "friendly"


def tone_stage() -> Stage:
    model = ModelSettings(engine="openai", model="m", endpoint={"base_url": "http://127.0.0.1:1/v1"})
    start = Stage(name="candidates", work=WholeWork(lambda given: {}, tables=("candidates",)), config=None)
    return tone.tones(tone.ToneSettings(), model, start)


def run(asking: Asking[Any, Any], root: Path, engine: ScriptedEngine | None = None) -> tuple[ShardOutput, Shard]:
    shard = Shard({"candidates": ANSWERS}, tone.ToneSettings())
    return shard.run(asking, engine or ScriptedEngine(says), root), shard


def test_a_whole_agent_stage_is_one_short_file(tmp_path: Path) -> None:
    lines = [line for line in Path(tone.__file__).read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
    stage = tone_stage()
    assert isinstance(stage.work, ShardWork) and stage.work.tables == ("tones",)
    output, shard = run(pickle.loads(pickle.dumps(stage.work.function)), tmp_path)  # as a worker gets it
    ids = ANSWERS["candidate_id"].to_pylist()
    assert output.tables["tones"].select(["candidate_id", "tone"]).to_pylist() == [
        {"candidate_id": ids[0], "tone": "friendly"}, {"candidate_id": ids[2], "tone": "rude"},
    ]  # fmt: skip
    assert output.counts == {"empty": 1, "friendly": 1, "rude": 1}
    assert shard.watched == [("the tone judge", True)] * 2 and shard.ticks == 2
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    calls = read_calls(Folder(str(folder)), 0, 1)
    assert calls["role"].to_pylist() == ["tone"] * 2
    assert set(calls["prompt_id"].to_pylist()) == set(ANSWERS["prompt_id"].to_pylist())
    again, _ = run(tone.TONE, tmp_path, never := ScriptedEngine("never"))
    assert never.calls == 0 and again.tables["tones"].equals(output.tables["tones"])


def test_settings_and_model_decide_the_output_of_a_stage() -> None:
    stage = tone_stage()
    assert stage.config == {"engine": stage.config["engine"]}  # defaults decide nothing
    model = ModelSettings(engine="openai", model="n", endpoint={"base_url": "http://127.0.0.1:1/v1"})
    (start,) = stage.inputs.values()
    assert tone.tones(tone.ToneSettings(), model, start).fingerprint != stage.fingerprint
    other = tone.tones(tone.ToneSettings(words=("a",)), model, start)
    assert other.config["words"] == ["a"]
    assert len({stage.fingerprint, other.fingerprint, tone.tones(tone.ToneSettings(), model, start).fingerprint}) == 3
    trained = tone.TONE.stage("tones", tone.ToneSettings(), model, {"candidates": start}, train=start)
    assert list(trained.inputs) == ["candidates", "train"] and trained.external == {}


def test_no_items_make_empty_tables_of_the_full_schema(tmp_path: Path) -> None:
    shard = Shard({"candidates": CANDIDATES.empty_table()}, tone.ToneSettings())
    output = shard.run(tone.TONE, ScriptedEngine(says), tmp_path)
    assert output.tables["tones"].schema.equals(tone.TONES) and output.tables["tones"].num_rows == 0
    assert output.counts == {} and shard.ticks == 0


def test_unreadable_replies_can_stop_the_stage(tmp_path: Path) -> None:
    shard = Shard({"candidates": ANSWERS}, tone.ToneSettings())
    shard.stop_after = 1
    with pytest.raises(StageStop, match="enough"):
        shard.run(tone.TONE, ScriptedEngine("hm"), tmp_path)
    assert shard.watched[0] == ("the tone judge", False)


def test_rows_of_an_unknown_table_and_a_missing_engine_are_errors(tmp_path: Path) -> None:
    async def stray(engine: Any, settings: Any, item: Any) -> Outcome:
        return Outcome({"moods": [{}]})

    with pytest.raises(ValueError, match="rows of moods, but the stage writes tones"):
        run(dataclasses.replace(tone.TONE, ask=stray), tmp_path)
    given = ShardInput(0, 1, {}, {}, None, tone.ToneSettings(), lambda rows: None, lambda name, read: None)
    with pytest.raises(ValueError, match="needs an engine"):
        asyncio.run(tone.TONE(given))


def test_the_first_failure_cancels_the_others() -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        asyncio.run(all_of([wait(), fail()]))
    assert ended == ["cancelled"]


_LOAD = """
import importlib, pkgutil, sys
for room in ("agents", "agreement", "bench", "data", "evaluate", "feedback", "policy"):
    package = importlib.import_module(f"ray_pipeline.{room}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        assert "ray" not in sys.modules, module.name
        assert "torch" not in sys.modules, module.name
"""


def test_modules_of_stages_load_without_ray() -> None:
    done = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
