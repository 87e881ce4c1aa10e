"""What is checked before anything is paid: each check by what it refuses, endpoints against a real server."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import yaml

from ray_pipeline.api.runs import run
from ray_pipeline.config.loading import load_config
from ray_pipeline.engines.account import Used
from ray_pipeline.engines.base import Completion, EngineDead, EngineError, EngineStartError, Sampling
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.operate import canary
from ray_pipeline.operate.check import findings, training
from ray_pipeline.operate.check_files import written_weights
from ray_pipeline.operate.pending import Finding, Pending
from ray_pipeline.operate.run_settings import run_settings
from ray_pipeline.pocket import WEIGHTS, model_path
from ray_pipeline.store.errors import StoreError
from ray_pipeline.training.methods import TrainingInputError
from ray_pipeline.training.spec import TrainSpec
from ray_pipeline.workflow.registry import find_workflow
from tests.endpoint import KEY, Answer, Endpoint, refused, said
from tests.operate.at_an_endpoint import COUNT, RUBRICS, K, command, config, quorum, reply


def checked(values: dict[str, Any], folder: Path, to: str | None = None, **how: Any) -> list[Finding]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    workflow = find_workflow("dmapo")
    settings = load_config(workflow.config, str(file), [])
    place = str(folder / "run")
    dag, session = workflow.wire(settings, place), run_settings(settings, place).session
    pending = Pending.of(settings, dag, session, None, to, **how)
    return list(findings(pending))


def problems(found: list[Finding]) -> list[str]:
    return [finding.detail for finding in found if finding.state == "problem"]


def of(found: list[Finding], start: str) -> Finding:
    """The only finding about something."""
    (finding,) = (finding for finding in found if finding.what.startswith(start))
    return finding


# --- files, folders, settings -----------------------------------------------------------------------------------------


def test_offline_everything_but_the_endpoints_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    found = checked(config(), tmp_path, scope="offline")
    assert problems(found) == []
    assert of(found, "rows of prompts").detail == f"{COUNT} can be read"
    assert of(found, "thresholds of gate").detail.endswith("final scores range from 0.85 to 10")
    assert of(found, "models.policy").detail.startswith("files can be read; whether it answers is checked when")
    assert of(found, "training train").state == "ok"
    for key in ("models.writer", "models.judge"):
        assert (of(found, key).state, of(found, key).detail) == ("not checked", "needs the network")
    assert not (tmp_path / "run").exists()


def test_only_what_the_stages_up_to_the_last_one_need_is_checked(tmp_path: Path) -> None:
    found = checked(config(), tmp_path, to="prompts")
    assert problems(found) == [] and {finding.what.split()[0] for finding in found} == {"run", "call", "rows", "disk"}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"type": "jsonl", "column": "question"}, "no column 'question'"),
        ({"type": "jsonl", "column": "number"}, "line 1"),
    ],
)
def test_rows_that_cannot_be_prompts_are_found(source: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello", "number": 3}\n')
    prompts = {"sources": [{**source, "path": str(file)}], "num_shards": 2}
    found = of(checked(config(prompts=prompts), tmp_path, scope="offline", to="prompts"), "rows of prompts")
    assert found.state == "problem" and told in found.detail and str(file) in found.detail


def test_a_place_that_cannot_be_written_to_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != str(tmp_path))
    found = checked(config(calls={"root": str(tmp_path / "a file/calls")}), tmp_path, scope="light")
    for what in ("run folder", "call log"):
        assert f"{tmp_path} cannot be written to" in of(found, what).detail
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StoreError, match="run is a file; choose another run folder"):
        checked(config(), tmp_path, scope="light")


@pytest.mark.parametrize(
    ("gate", "scale", "told"),
    [
        ({}, (1, 5), ["desirable_at is 7, which no candidate can reach; set it to at most 5"]),
        ({}, (5, 10), ["undesirable_at is 4, which none can fall to; set it to at least 4.25"]),
        ({}, (8, 9), ["undesirable_at is 4"]),
        ({"alpha": 0.0, "undesirable_at": 0.9}, (1, 10), ["set it to at least 1"]),
        ({"use_critic": False, "undesirable_at": 0.9}, (1, 10), ["set it to at least 1"]),
        ({"desirable_at": 4, "undesirable_at": 2}, (1, 5), []),
        ({"desirable_at": 5, "undesirable_at": 1}, (1, 5), []),
        ({"desirable_at": 0.5, "undesirable_at": -1}, (-1, 1), []),
    ],
)
def test_thresholds_off_the_judges_scale_are_found(
    gate: dict[str, Any], scale: tuple[int, int], told: list[str], tmp_path: Path
) -> None:
    rubrics = [{**rubric, "low": scale[0], "high": scale[1]} for rubric in RUBRICS]
    values = config(judge={"rubrics": rubrics}, gate=gate, datasets={"min_gap": 0.1})
    found = problems(checked(values, tmp_path, scope="light", to="datasets"))
    found = [detail for detail in found if "LOOPBACK_KEY" not in detail]
    assert len(found) == len(told) and all(part in detail for part, detail in zip(told, found, strict=True))


@pytest.mark.parametrize("kind", ["source", "programs"])
def test_ready_scores_and_programs_off_the_gates_scale_are_found_too(kind: str, tmp_path: Path) -> None:
    """K5.5"""
    (tmp_path / "scores.csv").write_text("prompt,response,anna,ben\nq,good,5,4\nq,bad,1,2\n")
    own = {"type": "csv", "path": str(tmp_path / "scores.csv")}
    scale = {"low": 1, "high": 5}
    judges: dict[str, Any] = {
        "source": {**own, **scale, "judges": {"anna": "anna", "ben": "ben"}},
        "programs": [{"name": name, "checker": "pocket", **scale} for name in ("one", "two")],
    }
    values = {"candidates": {"source": own}, "judge": {kind: judges[kind]}, "critic": None, "train": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    told = " ".join(quorum("check", "dmapo", "-c", str(tmp_path / "config.yaml"), "--offline", code=2).split())
    assert "judges score from 1 to 5" in told and "desirable_at is 7, which no candidate can reach; set it" in told


def test_a_gap_that_no_pair_can_have_is_found(tmp_path: Path) -> None:
    rubrics = [{**rubric, "low": 1, "high": 3} for rubric in RUBRICS]
    gate = {"desirable_at": 3, "undesirable_at": 1}
    found = checked(config(judge={"rubrics": rubrics}, gate=gate, datasets={"min_gap": 2.5}), tmp_path, scope="light")
    assert of(found, "gap of dataset-rows").detail.startswith("min_gap is 2.5, but final scores range from 0.85 to 3")


def test_a_rubric_without_text_is_found_unless_its_template_shows_none(tmp_path: Path) -> None:
    values = config(judge={"rubrics": [RUBRICS[0], {"name": "truth"}, {"name": "style", "text": " "}]})
    found = checked(values, tmp_path, scope="light")
    assert of(found, "rubric truth").state == of(found, "rubric style").state == "problem"
    assert "without a criterion; set its `text`" in of(found, "rubric truth").detail
    found = checked({**values, "prompt_templates": "pocket"}, tmp_path, scope="light")
    assert of(found, "rubrics helpfulness, truth, style").state == "ok"


def test_one_opinion_under_two_names_is_found(tmp_path: Path) -> None:
    """K5.5"""
    twice = [RUBRICS[0], {**RUBRICS[0], "name": "again", "text": RUBRICS[0]["text"] + " "}]
    found = checked(config(judge={"rubrics": twice}), tmp_path, scope="light")
    finding = of(found, f"rubrics {RUBRICS[0]['name']} and again")
    assert finding.state == "problem" and "count several times" in finding.detail
    warm = config(judge={"rubrics": twice, "sampling": {"temperature": 0.7}})
    assert all("count several times" not in detail for detail in problems(checked(warm, tmp_path, scope="light")))


def test_two_models_of_one_name_at_two_addresses_are_found(tmp_path: Path) -> None:
    """K5.6"""
    values = config()
    key = next(name for name, model in values["models"].items() if "endpoint" in model)
    model = values["models"][key]
    for own, is_refused in ({}, True), ({"identity": "other weights"}, False):
        other = {**model, "endpoint": {**model["endpoint"], "base_url": "http://elsewhere/v1", **own}}
        both = {**values, "models": {**values["models"], "other": other}}
        both["critic"] = {**both.get("critic", {}), "model": "other"}
        found = problems(checked(both, tmp_path, scope="light"))
        assert any(".endpoint.identity: writer@" in detail for detail in found) == is_refused


def test_a_logger_that_is_not_installed_is_found(tmp_path: Path) -> None:
    values = config(train={"dtype": "float32", "report_to": ["wandbb"]})
    assert "report_to: 'wandbb' is not installed" in of(checked(values, tmp_path, scope="offline"), "training").detail
    light = of(checked(values, tmp_path, scope="light"), "training train")
    assert light.state == "not checked" and "run `quorum check`" in light.detail


@pytest.mark.parametrize(
    ("missing", "told"), [("tokenizer*", "has no tokenizer file"), ("model.safetensors", "has no weights file")]
)
def test_an_incomplete_model_folder_is_found(missing: str, told: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_path("pocket:judge"), model)
    for file in model.glob(missing):
        file.unlink()
    values = config()
    values["models"]["judge"] = {"model": str(model)}
    assert told in of(checked(values, tmp_path, scope="light"), "models.judge").detail


@pytest.mark.parametrize(("free", "state"), [(10**15, "ok"), (50_000_000, "warning"), (1000, "problem")])
def test_disk_space_is_compared_with_what_will_be_written(
    free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, free))
    prompts = {"sources": [{"type": "pocket", "count": 2000, "seed": 0}], "num_shards": 2}
    found = of(checked(config(prompts=prompts), tmp_path, scope="offline"), "disk space")
    assert found.state == state and " of weights, up to " in found.detail


def test_an_adapter_alone_needs_a_fraction_of_the_disk() -> None:
    sizes = {}
    for save in ("both", "merged", "adapter"):
        settings = load_config(find_workflow("dmapo").config, "configs/pocket.yaml", [f"train.save={save}"])
        dag = find_workflow("dmapo").wire(settings, "/runs/x")
        (training,) = (stage for stage in dag.stages if stage.role_name == "policy")
        sizes[save] = written_weights(training)
        (served,) = (s.work.engine.args[0] for s in dag.stages if s.name == "responses-policy")
        if save == "adapter":
            assert served.model == settings.base.model
            assert served.adapter == f"/runs/x/{training.folder_name}/adapter"
        else:
            assert (served.model, served.adapter) == (f"/runs/x/{training.folder_name}/merged", None)
    assert sizes["merged"] == pytest.approx(os.path.getsize(WEIGHTS / "policy" / "model.safetensors"), rel=0.01)
    assert sizes["both"] == sizes["merged"] + sizes["adapter"]
    # PEFT counts 139,264 trained weights of this model at rank 16; they are stored in 4 bytes each.
    assert sizes["adapter"] == 4 * 139264


@pytest.mark.parametrize(
    ("name", "file", "changes"),
    [
        ("dmapo", "pocket", []),
        ("fellowship", "pocket_fellowship", []),
        ("baselines", "pocket_baselines", []),
        ("agreement", "pocket_agreement", []),
        ("winrate", "pocket_winrate", []),
        ("judge_check", "pocket_judge_check", []),
        ("benchmarks", "pocket_benchmarks", ["benchmarks.ifeval=null"]),  # its data is not everywhere
    ],
)
def test_every_workflow_can_be_checked(name: str, file: str, changes: list[str], tmp_path: Path) -> None:
    workflow = find_workflow(name)
    settings = load_config(workflow.config, f"configs/{file}.yaml", changes)
    dag, session = workflow.wire(settings, str(tmp_path)), run_settings(settings, str(tmp_path)).session
    pending = Pending.of(settings, dag, session, scope="offline", scratch=str(tmp_path / "scratch"))
    found = list(findings(pending))
    assert [finding for finding in found if finding.state in ("problem", "not checked")] == []
    assert pending.roots and all(of(found, f"rows of {stage.name}") for stage in pending.roots)
    for stage in pending.roots:
        pending.stand_ins.make(stage)
    assert pending.tried == ""


def test_equal_trainings_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow, seeds = find_workflow("baselines"), (0, 1)
    settings = load_config(workflow.config, "configs/pocket_baselines.yaml", [f"baselines.seeds={list(seeds)}"])
    dag, session = workflow.wire(settings, str(tmp_path)), run_settings(settings, str(tmp_path)).session
    built = []

    def check_model(spec: TrainSpec) -> None:
        built.append((spec.settings.method, spec.settings.seed))
        if built[-1] == ("dpo", 1):
            raise TrainingInputError("refused")

    monkeypatch.setattr("ray_pipeline.training.preflight.check_model", check_model)
    pending = Pending.of(settings, dag, session, scope="offline", scratch=str(tmp_path / "scratch"))
    found = {finding.what.removeprefix("training "): finding.state for finding in training(pending)}
    assert built == [(method, seed) for seed in seeds for method in settings.baselines.methods]
    assert found == {
        f"train-{label}": "problem" if label.startswith("dpo-") and label.endswith("-s1") else "ok"
        for label in settings.policy_labels()
    }
    assert len(found) > len(built)


# --- local engines ----------------------------------------------------------------------------------------------------


class StandInEngine:
    """An engine that notes its calls; `refusal` is raised by the calls with a system message."""

    alive = 0
    asked: ClassVar[list[tuple[str, list[str], Sampling]]] = []
    refusal: Exception | None = None
    start_seconds = 2.5
    notes = ("the template has no system role",)

    def __init__(self, spec: VllmSpec) -> None:
        self.spec, self._used = spec, Used()

    async def start(self) -> None:
        type(self).alive += 1
        assert type(self).alive == 1, "one after the other"

    async def chat(self, messages: list[dict[str, str]], sampling: Sampling) -> Completion:
        roles = [message["role"] for message in messages]
        if self.refusal is not None and "system" in roles:
            raise self.refusal
        self.asked.append((Path(self.spec.model).name, roles, sampling))
        completion = Completion("7", "stop", 10, 5, 0)
        self._used.count(completion)
        return completion

    def stats(self) -> Used:
        return self._used

    async def close(self) -> None:
        type(self).alive -= 1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandInEngine]:
    fresh = type("Fresh", (StandInEngine,), {"asked": [], "alive": 0})
    monkeypatch.setattr(canary, "VllmEngine", fresh)
    return fresh


LOCAL = {
    "policy": {"model": "pocket:policy", "dtype": "float32"},
    "judge": {"model": "pocket:judge", "dtype": "float32"},
}


def test_every_local_engine_is_started_on_request(stand_in: type[StandInEngine], tmp_path: Path) -> None:
    values = config(models=LOCAL, candidates={"model": "policy", "k": K})
    found = checked(values, tmp_path, to="gate", engines=True, scope="offline")
    assert problems(found) == [] and stand_in.alive == 0
    assert [name for name, *_ in stand_in.asked] == ["judge", "judge", "policy"]
    (_, score, _), _, (_, candidate, drawn) = stand_in.asked
    assert candidate == ["user"] and score == ["system", "user"] and drawn.grammar is None
    assert all(sampling.grammar is not None for _, _, sampling in stand_in.asked[:2])
    warning, line = (f for f in found if f.what.startswith("local engine of models.judge"))
    assert warning.state == "warning" and warning.detail == "the template has no system role"
    assert line.detail.startswith("started in 2.5 s; 2 test calls answered in 0.0 s (30 tokens")


@pytest.mark.parametrize(
    "refusal", [EngineStartError("no such quantization"), EngineError("a grammar is refused"), EngineDead("it died")]
)
def test_what_a_local_engine_refuses_is_a_problem(
    refusal: Exception, stand_in: type[StandInEngine], tmp_path: Path
) -> None:
    stand_in.refusal = refusal
    values = config(models=LOCAL, candidates={"model": "policy", "k": K})
    assert problems(checked(values, tmp_path, to="gate", engines=True)) == [str(refusal)] and stand_in.alive == 0


def test_local_engines_that_are_not_started_are_told(stand_in: type[StandInEngine], tmp_path: Path) -> None:
    values = config(models=LOCAL, candidates={"model": "policy", "k": K})
    told = "not checked  local engines of models.judge, models.policy: not started; run `quorum check --engines`"
    for name, *how in (("check",), ("run", "--dry-run")):
        assert told in quorum(*command(name, tmp_path, values, "--to", "judge", *how))
    assert "ok           local engine of models.judge" in quorum(*command("check", tmp_path, values, "--engines"))
    count = len(stand_in.asked)
    elsewhere = of(checked(values, tmp_path, to="candidates", engines=True, on_cluster=True), "local engine")
    assert elsewhere.state == "not checked" and "on such a node" in elsewhere.detail
    replayed = checked({**values, "calls": {"replay_only": True}}, tmp_path, to="candidates", engines=True)
    assert of(replayed, "local engine").state == "not checked" and len(stand_in.asked) == count


# --- endpoints --------------------------------------------------------------------------------------------------------


def test_an_endpoint_is_asked_as_its_stages_will_ask(server: Endpoint, tmp_path: Path) -> None:
    critic = {"model": "judge", "asking": {"grammar": False}, "sampling": {"max_tokens": 77, "temperature": 0.5}}
    found = checked(config(server.url, critic=critic), tmp_path, to="gate")
    assert problems(found) == []
    judge, writer = of(found, "models.judge"), of(found, "models.writer")
    assert judge.detail == "3 test calls answered (45 tokens, cost 0.045 USD)"
    assert writer.detail == "2 test calls answered (30 tokens, cost 0.03 USD)"

    bodies: dict[str, list[dict[str, Any]]] = {"judge": [], "writer": []}
    for body in server.asked:
        bodies[body["model"]].append(body)
    _, score, critique = bodies["judge"]
    assert [m["role"] for m in score["messages"]] == [m["role"] for m in critique["messages"]] == ["system", "user"]
    assert list(score["response_format"]["json_schema"]["schema"]["properties"]) == ["reason", "score"]
    assert "response_format" not in critique and (critique["max_tokens"], critique["temperature"]) == (77, 0.5)
    _, candidate = bodies["writer"]
    assert [m["role"] for m in candidate["messages"]] == ["user"] and candidate["temperature"] == 0.8
    # The calls are in the account of their model, and no data.
    accounts = [json.loads(file.read_text()) for file in (tmp_path / "run/calls").glob("spent-*/*.json")]
    assert {account["model"]: account["calls"] for account in accounts} == {"judge": 3, "writer": 2}
    assert list(tmp_path.rglob("*.parquet")) == []


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (refused(401, "bad key"), "the endpoint rejected the API key"),
        (refused(404, "The model `judge` does not exist", code="model_not_found"), "does not exist"),
        (refused(402, "You have no credit"), "You have no credit"),
    ],
)
def test_what_an_endpoint_refuses_comes_in_its_own_words(
    answer: Answer, told: str, server: Endpoint, tmp_path: Path
) -> None:
    server.script = lambda body, n: answer if body["model"] == "judge" else reply(body, n)
    found = checked(config(server.url), tmp_path, to="judge")
    (problem,) = problems(found)
    assert told in problem and of(found, "models.judge").state == "problem" and KEY not in problem


def test_what_only_the_stages_own_calls_have_is_tried(server: Endpoint, tmp_path: Path) -> None:
    limit = refused(400, "max_tokens is too large: 512, this model supports at most 500")
    server.script = lambda body, n: limit if body["max_tokens"] > 500 else reply(body, n)
    (problem,) = problems(checked(config(server.url), tmp_path, to="candidates"))
    assert "this model supports at most 500" in problem


def test_a_dead_address_and_a_missing_key_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOOPBACK_KEY", raising=False)
    found = checked(config(), tmp_path, to="judge", scope="light")
    assert all("the environment variable LOOPBACK_KEY is not set" in problem for problem in problems(found))
    assert len(problems(found)) == 2 and "models.judge.endpoint.api_key_env: null" in of(found, "models.judge").detail
    # On a cluster, the keys are where the engines run.
    found = checked(config(), tmp_path, to="judge", on_cluster=True)
    assert problems(found) == [] and "is not set here; the nodes are" in of(found, "models.judge").detail

    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        values = config(f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        assert all("did not answer" in p or "not respond" in p for p in problems(checked(values, tmp_path, to="judge")))


def test_a_note_of_the_engine_is_a_warning(server: Endpoint, tmp_path: Path) -> None:
    server.script = lambda body, n: said("no JSON at all")
    found = checked(config(server.url), tmp_path, to="candidates")
    states = [(finding.state, finding.detail) for finding in found if finding.what.startswith("models.writer")]
    assert [state for state, _ in states] == ["warning", "ok"] and "does not obey structured output" in states[0][1]


def test_models_whose_calls_cost_nothing_or_are_not_to_be_tried_are_left_alone(
    server: Endpoint, tmp_path: Path
) -> None:
    values = config(server.url, calls={"replay_only": True})
    assert "calls.replay_only" in of(checked(values, tmp_path, to="judge"), "models.judge").detail
    values = config(server.url)
    values["models"]["judge"]["canary"] = False
    found = checked(values, tmp_path, to="judge")
    assert of(found, "models.judge").detail == "models.judge.canary is false"
    assert {body["model"] for body in server.asked} == {"writer"}


def test_a_spent_budget_is_found(server: Endpoint, tmp_path: Path) -> None:
    values = config(server.url)
    for key in ("writer", "judge"):
        values["models"][key]["endpoint"] = {**values["models"][key]["endpoint"], "budget": 0.0001}
    assert all("the budget for" in problem for problem in problems(checked(values, tmp_path, to="judge")))
    assert server.asked == []


def test_stages_that_stand_in_replies_do_not_suit_are_told(
    server: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confused(*_: Any) -> Any:
        raise RuntimeError("what is this?")

    monkeypatch.setattr("ray_pipeline.operate.estimate._StandInEngine.call", confused)
    found = checked(config(server.url), tmp_path, to="candidates")
    assert problems(found) == [] and of(found, "models.writer").state == "ok"  # the engine's own first call
    assert "what is this?" in of(found, "forms of the calls of candidates").detail


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_run_checks_first_and_a_finished_one_contacts_nobody(server: Endpoint, tmp_path: Path) -> None:
    values, to = config(server.url), ("--to", "judge")
    told = quorum(*command("check", tmp_path, values, *to))
    assert "ok           models.judge (judge at" in told and "no problem found" in told
    tested = len(server.asked)
    assert tested == 4
    how = (*to, "--executor", "inprocess")
    assert "checked before the first stage: " in quorum(*command("run", tmp_path, values, *how))
    calls = COUNT * K * (1 + len(RUBRICS))
    logged = [row for file in (tmp_path / "run/calls").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    # The run's own check, and the first calls of its two engines.
    assert len(server.asked) == tested + tested + 2 + len(logged) and len(logged) <= calls
    before = len(server.asked)
    assert "checked" not in quorum(*command("run", tmp_path, values, *how))
    assert "all stages are done: a run starts nothing" in quorum(*command("check", tmp_path, values, *to))
    assert len(server.asked) == before


def test_a_run_with_a_problem_starts_nothing(server: Endpoint, tmp_path: Path) -> None:
    server.script = lambda body, n: refused(401) if body["model"] == "judge" else reply(body, n)
    values, how = config(server.url), ("--to", "judge", "--executor", "inprocess")
    told = " ".join(quorum(*command("run", tmp_path, values, *how), code=2).split())
    assert "quorum: nothing was started: models.judge (judge at" in told and "rejected the API key" in told
    assert not list((tmp_path / "run").rglob("*.parquet")) and not (tmp_path / "run/manifest.json").exists()
    told = quorum(*command("check", tmp_path, values, "--to", "judge"), code=2)
    assert "problem      models.judge (judge at" in told and "quorum: 1 problem found" in told
    server.script = reply
    quorum(*command("run", tmp_path, values, *how))


def test_from_deletes_nothing_if_there_is_a_problem(server: Endpoint, tmp_path: Path) -> None:
    values, how = config(server.url), ("--to", "judge", "--executor", "inprocess")
    quorum(*command("run", tmp_path, values, *how))
    kept = sorted(file for file in (tmp_path / "run").rglob("*.parquet"))
    server.script = lambda body, n: refused(401)
    quorum(*command("run", tmp_path, values, "--from", "judge", *how), code=2)
    assert sorted(file for file in (tmp_path / "run").rglob("*.parquet")) == kept


def test_a_dry_run_says_what_it_could_not_check(server: Endpoint, tmp_path: Path) -> None:
    told = quorum(*command("run", tmp_path, config(server.url), "--dry-run"))
    assert "candidates                   to do" in told and "not checked  rows of prompts: " in told
    assert "ok           thresholds of gate: " in told
    assert "not checked  training train: needs the training packages; run `quorum check`" in told
    assert "not checked  models.judge" in told and server.asked == [] and not (tmp_path / "run").exists()
    values = config(server.url, judge={"rubrics": [{**rubric, "high": 5} for rubric in RUBRICS]})
    assert "desirable_at is 7" in quorum(*command("run", tmp_path, values, "--dry-run"), code=2)


def test_the_programming_interface_checks_too(tmp_path: Path) -> None:
    values = config(judge={"rubrics": [{**rubric, "high": 5} for rubric in RUBRICS]})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"nothing was started: thresholds of gate: .*desirable_at is 7"):
        run("dmapo", str(tmp_path / "config.yaml"), run_dir=str(tmp_path / "run"))
