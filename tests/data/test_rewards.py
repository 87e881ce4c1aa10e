"""Judges that are reward models, on a scripted engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dags.baselines import BaselinesConfig
from dags.dmapo import dmapo
from dags.fellowship import FellowshipConfig
from dags.train import TrainConfig, train
from ray_pipeline.audit.findings import RunTables
from ray_pipeline.audit.rows import audit_run
from ray_pipeline.config.loading import load_config, read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.rewards import RewardJudge
from ray_pipeline.engines.base import REWARD, PromptTooLong
from ray_pipeline.graph.stage import Dag, StageResult
from ray_pipeline.operate.estimate import calls_model
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import VERDICTS, to_table
from ray_pipeline.workflow import training
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.dags.test_fellowship_stages import SHARDS, play
from tests.scripted import ScriptedEngine, logged_calls

POINTS = [[-1.0, 1.0], [0.0, 4.0], [2.0, 10.0]]


def judge(**keys: Any) -> RewardJudge:
    return RewardJudge.model_validate({"name": "pairs", "model": "reward", **keys})


@pytest.mark.parametrize(
    ("rewards", "scores"),
    [
        ([0.3, -2.0, 7.5, 0.31], [4.0, 1.0, 10.0, 7.0]),
        ([5.0, 5.0, 5.0], [5.5, 5.5, 5.5]),
        ([1.0, None, 0.5, 1.0], [7.75, None, 1.0, 7.75]),
        ([3.0], [None]),
        ([None, 3.0], [None, None]),
        ([], []),
    ],
)
def test_a_rank_is_the_place_among_the_responses(rewards: list[float | None], scores: list[float | None]) -> None:
    assert judge().scores(rewards) == scores
    shifted = [None if r is None else 100 * r - 7 for r in rewards]  # zero and spread of a reward mean nothing
    assert judge().scores(shifted) == scores


def test_a_calibrated_map_needs_no_other_response() -> None:
    assert judge(scale=POINTS).scores([-3.0, -0.5, 1.0, None, 9.0]) == [1.0, 2.5, 7.0, None, 10.0]
    assert judge(scale=POINTS).scores([1.0]) == [7.0]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ([[0, 1]], "at least 2 items"),
        ([[0, 1], [0, 10]], "must rise from point to point"),
        ([[0, 10], [1, 1]], "a higher reward cannot give a lower score"),
        ([[0, 0], [1, 10]], r"must be from low \(1\) to high \(10\)"),
        ([[0, 1], [float("nan"), 10]], "finite number"),
        ("raw", "'rank'"),
    ],
)
def test_a_map_that_cannot_be_one_is_refused(scale: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        judge(scale=scale)


# --- on a panel -------------------------------------------------------------------------------------------------------


def panel(**rewards: Any) -> DmapoConfig:
    models = {name: {"model": f"pocket:{name}"} for name in ("policy", "judge", "generator")}
    values = {
        "run": {"name": "panel"},
        "models": {"policy": models["policy"], "judge": models["judge"], "reward": models["generator"]},
        "prompts": {"sources": [{"type": "pocket", "count": 24}], "num_shards": SHARDS},
        "candidates": {"k": 3},
        "judge": {
            "rubrics": [{"name": "a", "text": "kind?"}],
            "rewards": [{"name": "pairs", "model": "reward", **rewards}],
        },
        "critic": None,
        "gate": {"tau": 100, "desirable_at": 5, "undesirable_at": 4.5},
    }
    return read_config(DmapoConfig, values)


def reward_of(text: str) -> float:
    return len(text) / 8 - 1


def replies(messages: Any, sampling: Any) -> Any:
    text = messages[-1]["content"]
    if sampling == REWARD:
        assert [m["role"] for m in messages] == ["user", "assistant"]
        return PromptTooLong(300, 0, 256) if "long" in text else f"{reward_of(text):.6g}"
    if sampling.grammar is None:
        return "x" * (sampling.seed % 5) + ("long" if sampling.seed % 11 == 0 else "k")
    return json.dumps({"reason": "", "score": 9 if "xx" in text else 2})


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DmapoConfig, dict[str, StageResult]]:
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)
    config = panel()
    dag = Dag("dmapo", dmapo(config, str(tmp_path)).upto("datasets"))
    assert [s.name for s in dag.stages if calls_model(s) and s.group_name == "judge"] == ["judge", "judge-pairs"]
    return config, play(dag, tmp_path / "run", lambda stage: ScriptedEngine(replies))


def tables(config: DmapoConfig, made: dict[str, StageResult]) -> RunTables:
    return RunTables(
        made["prompts"].table(),
        made["candidates"].table(),
        [made["judge"].table(), made["judge-pairs"].table()],
        None,
        made["gate"].table(),
        made["datasets"].folder,
        config.judge.names,
        config.gate,
        config.datasets,
        rewards=config.judge.rewards,
    )


def test_a_reward_model_sits_on_a_panel(made: Any, tmp_path: Path) -> None:
    config, results = made
    assert config.judge.names == ["a", "pairs"] and config.judge.live == config.judge
    candidates = results["candidates"].table().read_all().to_pylist()
    verdicts = {row["candidate_id"]: row for row in results["judge-pairs"].table().read_all().to_pylist()}
    assert len(candidates) == len(verdicts) == 72
    for candidate in candidates:
        row = verdicts[candidate["candidate_id"]]
        others = [c["response"] for c in candidates if c["prompt_id"] == row["prompt_id"] and c is not candidate]
        if "long" in candidate["response"]:
            assert (row["score"], row["parse_status"], row["raw"]) == (None, "too_long", None)
            continue
        own, rewards = reward_of(candidate["response"]), [reward_of(text) for text in others if "long" not in text]
        assert row["raw"] == f"{own:.6g}" and row["judge"] == "pairs"
        worse = [1.0 if r < own else 0.5 if r == own else 0.0 for r in rewards]
        assert row["score"] == (pytest.approx(1 + 9 * sum(worse) / len(worse)) if worse else None)
        assert row["parse_status"] == ("ok" if worse else "missing")
    assert {"pairs.ok", "pairs.too_long"} <= set(results["judge-pairs"].facts["counts"])
    calls = logged_calls(Folder(str(tmp_path / "run" / "calls"))).to_pylist()
    logged = [row for row in calls if row["role"] == "judge/pairs" and row["finish_reason"] == "stop"]
    answered = {(c["prompt_id"], c["response"]) for c in candidates if "long" not in c["response"]}
    assert len(logged) == len(answered)  # equal answers are one call
    card = (Path(results["datasets"].folder) / "README.md").read_text()
    assert "judge.rewards.pairs.model" in card and "models wrote and judged them" in card


def test_another_scale_makes_no_call(made: Any, tmp_path: Path) -> None:
    dag = Dag("dmapo", dmapo(panel(scale=POINTS), str(tmp_path)).upto("datasets"))

    def asked(messages: Any, sampling: Any) -> Any:
        assert "long" in messages[-1]["content"], "the other rewards are in the call log"
        return replies(messages, sampling)

    again = play(dag, tmp_path / "run", lambda stage: ScriptedEngine(asked if stage.name == "judge-pairs" else replies))
    for row in again["judge-pairs"].table().read_all().to_pylist():
        if row["parse_status"] == "ok":
            assert row["score"] == pytest.approx(judge(scale=POINTS).scores([float(row["raw"])])[0])
    config, _ = made
    run = tables(config, again)
    assert audit_run(run).found["reward"] > 0  # of the rank
    assert "reward" not in audit_run(dataclasses.replace(run, rewards=panel(scale=POINTS).judge.rewards)).found


def test_the_audit_computes_scores_from_the_rewards_again(made: Any) -> None:
    config, results = made
    run = tables(config, results)
    assert audit_run(run).ok
    table = results["judge-pairs"].table()
    shards = {number: table.read(number).to_pylist() for number in range(SHARDS)}
    shard, rows = next((number, rows) for number, rows in shards.items() if any(row["score"] for row in rows))
    row = next(row for row in rows if row["score"])
    row["score"] = 5.25
    table.write(shard, to_table(rows, VERDICTS))
    problems = [p for p in audit_run(run).problems if p.kind == "reward"]
    assert [p.id for p in problems] == [row["candidate_id"]] and "pairs scores 5.25, but by" in problems[0].message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a"}, "two judges have the same name: a"),
        ({"high": 5}, r"different scales \(1 to 5 and 1 to 10\)"),
        ({"model": "nobody"}, "judge.rewards.pairs.model is 'nobody', which is not defined under models"),
    ],
)
def test_impossible_panels_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        panel(**changes)


# --- training one -----------------------------------------------------------------------------------------------------


def test_a_reward_model_has_no_answers_to_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)
    shipped = ["train.method=reward"]
    config = load_config(TrainConfig, "pocket_train", shipped)
    assert [s.name for s in train(config, str(tmp_path)).stages][-2:] == ["train", "report"]
    remarks = " ".join(config.remarks())
    assert "no effect where train.method is reward (there is no policy to evaluate): evaluate.asking" in remarks
    whole = dmapo(load_config(DmapoConfig, "pocket", shipped), str(tmp_path))
    assert not {"base", "policy"} & {stage.name for stage in whole.stages}
    with pytest.raises(ConfigError, match=r"baselines\.methods\.reward: method reward trains a reward model"):
        load_config(BaselinesConfig, "pocket_baselines", ["baselines.methods={reward: {}}"])
    with pytest.raises(ConfigError, match=r"train: method reward trains a reward model, which has no answers"):
        load_config(FellowshipConfig, "pocket_fellowship", shipped)
    with pytest.raises(ConfigError, match=r"a reward model of reward is served as a whole"):
        load_config(TrainConfig, "pocket_train", [*shipped, "train.save=adapter"])
