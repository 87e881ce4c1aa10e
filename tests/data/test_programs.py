"""Judges that are programs, and the checkers behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dags.dmapo import dmapo
from ray_pipeline.audit.findings import RunTables
from ray_pipeline.audit.rows import audit_run
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.constraints.official import Checkers, CheckersMissing
from ray_pipeline.data.checkers import Checked, checker_of, load_checker
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.graph.stage import Dag, StageResult
from ray_pipeline.operate.estimate import calls_model
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.store.schemas import VERDICTS, to_table
from ray_pipeline.workflow import training
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.dags.test_fellowship_stages import SHARDS, play
from tests.published import DATA, NUMBERS, json_lines, match_responses, needs
from tests.scripted import ScriptedEngine

OWN = json_lines(NUMBERS.parent / "ifeval_own.jsonl")
CHECKS = {"strict": "ifeval", "loose": "ifeval_loose"}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def meta_of(row: Any) -> str:
    return json.dumps({key: row[key] for key in ("instruction_id_list", "kwargs")})


# --- official verdicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", CHECKS)
def test_shares_are_those_of_the_official_verdicts(flags: str, official: Checkers) -> None:
    check = load_checker(CHECKS[flags])
    for row in OWN:
        found = check(user(row["prompt"]), row["response"], meta_of(row))
        assert found is not None and found.share == pytest.approx(sum(row[flags]) / len(row[flags]))
        broken = [name for name, kept in zip(row["instruction_id_list"], row[flags], strict=True) if not kept]
        assert found.reason == (f"not followed: {', '.join(broken)}" if broken else "all followed")


@needs("ifeval")
@pytest.mark.parametrize("flags", CHECKS)
def test_shares_on_published_responses_are_the_published_ones(flags: str, official: Checkers) -> None:
    from ray_pipeline.bench.ifeval.questions import prompts_of

    rows = json_lines(DATA / "ifeval" / "input_data.jsonl")
    answers = json_lines(DATA / "ifeval" / "input_response_data_gpt4_20231107_145030.jsonl")
    responses, _ = match_responses(prompts_of(rows), [(r["prompt"], r["response"]) for r in answers])
    published = {row["key"]: row[flags] for row in json_lines(NUMBERS / "ifeval_gpt4.jsonl.gz")}
    check, equal = load_checker(CHECKS[flags]), 0
    for row in rows:
        kwargs = [{k: v for k, v in one.items() if v is not None} for one in row["kwargs"]]
        found = check(user(row["prompt"]), responses[row["key"]], meta_of({**row, "kwargs": kwargs}))
        own = published[row["key"]]
        equal += found is not None and found.share == pytest.approx(sum(own) / len(own))
    assert equal >= 0.995 * len(rows)


def test_a_prompt_without_constraints_is_not_decided_and_an_unknown_one_is_named(official: Checkers) -> None:
    check = load_checker("ifeval")
    assert check(user("Hi"), "hello", "{}") is None
    with pytest.raises(ValueError, match="no official checker for say:yes"):
        check(user("Hi"), "hello", '{"instruction_id_list": ["say:yes"], "kwargs": [{}]}')


# --- checkers of a user -----------------------------------------------------------------------------------------------

OF_A_USER = """
from ray_pipeline.data.checkers import Checked
from ray_pipeline.extensions import register

@register("checker")
def short(prompt, response):
    return len(response) < 4 if response else None

@register("checker")
def part(prompt, response, meta):
    return response.count("x") / meta["most"]

@register("checker")
def told(prompt, response):
    return Checked(0.5, "half of it")
"""


def test_a_checker_returns_a_bool_a_share_or_both_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OF_A_USER)
    short, part, told = (load_checker(f"{path}:{name}") for name in ("short", "part", "told"))
    assert short([], "abc", "{}") == (1.0, "") and short([], "abcd", "{}") == (0.0, "") and short([], "", "{}") is None
    assert part([], "axx", '{"most": 4}') == (0.5, "") and told([], "", "{}") == Checked(0.5, "half of it")
    with pytest.raises(ValueError, match=r"part returned 1\.5; a share is between 0 and 1"):
        part([], "xxx", '{"most": 2}')


def test_prompts_of_one_source_have_its_checker() -> None:
    assert checker_of(None, ["pocket", "pocket"]) is not None and checker_of(None, ["constrained"]) is not None
    assert checker_of(None, ["pocket", "constrained"]) is None and checker_of(None, ["own"]) is None
    assert checker_of("pocket", ["own"]) is not None


# --- on a panel -------------------------------------------------------------------------------------------------------


def panel(**judge: Any) -> DmapoConfig:
    values = {
        "run": {"name": "panel"},
        "models": {name: {"model": f"pocket:{name}"} for name in ("policy", "judge")},
        "prompts": {
            "sources": [{"type": "constrained", "count": 40, "kinds": ["punctuation:no_comma"]}],
            "num_shards": SHARDS,
        },
        "candidates": {"k": 2},
        "judge": {
            "rubrics": [{"name": "a", "text": "kind?"}, {"name": "b", "text": "true?"}],
            "programs": [{"name": "constraints", "checker": "ifeval"}],
            **judge,
        },
    }
    return read_config(DmapoConfig, values)


def replies(messages: Any, sampling: Any) -> str:
    text = messages[-1]["content"]
    if "flawed" in str(sampling.grammar):
        return '{"reason": "", "flawed": false, "failure_type": "none"}'
    if sampling.grammar is None:
        return "One, two." if sampling.seed % 2 else "One and two."
    return json.dumps({"reason": "", "score": 3 if "One, two." in text else 9})


@pytest.fixture
def made(tmp_path: Path, official: Checkers, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, StageResult]]:
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)
    config = panel()
    dag = Dag("dmapo", dmapo(config, str(tmp_path)).upto("datasets"))
    assert [s.name for s in dag.stages if calls_model(s) and s.group_name == "judge"] == ["judge"]
    return config, play(dag, tmp_path / "run", lambda stage: ScriptedEngine(replies))


def tables(config: Any, made: dict[str, StageResult]) -> RunTables:
    return RunTables(
        made["prompts"].table(),
        made["candidates"].table(),
        [made["judge"].table(), made["judge-programs"].table()],
        made["critic"].table(),
        made["gate"].table(),
        made["datasets"].folder,
        config.judge.names,
        config.gate,
        config.datasets,
        programs=config.judge.programs,
    )


def test_a_program_sits_on_a_panel_with_models(made: Any) -> None:
    config, results = made
    assert config.judge.names == ["a", "b", "constraints"] and config.judge.live == config.judge
    text = {r["candidate_id"]: r["response"] for r in results["candidates"].table().read_all().to_pylist()}
    rows = results["judge-programs"].table().read_all().to_pylist()
    assert {row["candidate_id"] for row in rows} == set(text) and len(rows) == 80
    for row in rows:
        broken = "," in text[row["candidate_id"]]
        why = "not followed: punctuation:no_comma" if broken else "all followed"
        assert (row["score"], row["reason"], row["parse_status"]) == (1.0 if broken else 10.0, why, "ok")
        assert row["judge"] == "constraints" and row["raw"] is None and row["expected_score"] is None
    for row in results["gate"].table().read_all().to_pylist():
        assert row["mean_score"] == pytest.approx((3 + 3 + 1) / 3 if "," in text[row["candidate_id"]] else 28 / 3)
    labels = {row["label"] for row in results["gate"].table().read_all().to_pylist()}
    assert labels == {"desirable", "undesirable"}
    card = (Path(results["datasets"].folder) / "README.md").read_text()
    assert "by consensus of 3 judges (a, b, constraints)" in card
    assert "labels are synthetic: models and programs judged them" in card and "constraints, 1 to 10" in card
    assert results["judge-programs"].facts["counts"] == {"constraints.ok": 80}


def test_the_audit_computes_a_programs_verdicts_again(made: Any) -> None:
    config, results = made
    run = tables(config, results)
    assert audit_run(run).ok
    table = results["judge-programs"].table()
    shard = next(s for s in range(SHARDS) if table.read(s).num_rows)
    rows = table.read(shard).to_pylist()
    rows[0]["score"] = 5.5
    table.write(shard, to_table(rows, VERDICTS))
    report = audit_run(run)
    assert report.found["program"] == 1
    (problem,) = [p for p in report.problems if p.kind == "program"]
    assert "constraints scores 5.5, but its checker ifeval gives" in problem.message
    assert problem.id == rows[0]["candidate_id"]


def test_programs_may_be_the_whole_panel(official: Checkers) -> None:
    config = panel(rubrics=[])
    assert config.judge.names == ["constraints"] and config.judge.models == []
    assert config.judge.live is not None


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"programs": [{"name": "a", "checker": "ifeval"}]}, "two judges have the same name: a"),
        ({"programs": [{"name": "c", "checker": "ifeval", "high": 5}]}, r"different scales \(1 to 5 and 1 to 10\)"),
        ({"programs": [{"name": "C", "checker": "ifeval"}]}, "invalid judge name 'C'"),
        ({"programs": [{"name": "c", "checker": "ifeval", "low": 10}]}, r"low \(10\) must be less than high"),
    ],
)
def test_impossible_panels_are_refused(judge: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JudgeSettings.model_validate({"rubrics": [{"name": "a"}], **judge})


def test_a_checker_that_cannot_run_is_named_before_the_run(official: Checkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)
    with pytest.raises(
        ConfigError, match=r"judge\.programs\.c\.checker: unknown checker 'ifeva'; did you mean 'ifeval'"
    ):
        panel(programs=[{"name": "c", "checker": "ifeva"}]).check()

    def missing() -> None:
        raise CheckersMissing("IFEval needs the official checkers")

    monkeypatch.setattr("ray_pipeline.data.checkers.checkers", missing)
    config = panel(programs=[])
    config.check()  # where nobody asks for the truth, a run does without
    assert "responses will not be compared with the truth: IFEval needs the official checkers" in config.remarks()
    asked = config.model_copy(update={"evaluate": EvaluateSettings(checker="ifeval")})
    with pytest.raises(ConfigError, match=r"evaluate\.checker: IFEval needs the official checkers"):
        asked.check()
