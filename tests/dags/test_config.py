"""One YAML file a run: every mistake in it is told by its key, with the nearest right one, before a stage starts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from dags.baselines import BaselinesConfig
from dags.dmapo import dmapo
from ray_pipeline.config.loading import UniqueKeys, load_config, read_config
from ray_pipeline.config.messages import ConfigError, explain
from ray_pipeline.engines import models
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder
from ray_pipeline.operate.run_settings import run_settings
from ray_pipeline.store.files import Folder
from ray_pipeline.training.methods import TrainingInputError
from ray_pipeline.workflow import training
from ray_pipeline.workflow.config import RunConfig
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from ray_pipeline.workflow.registry import find_workflow
from ray_pipeline.workflow.stored import stored
from tests.golden.test_goldens import SHIPPED as WORKFLOWS
from tests.models import needs_vllm

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes many seconds to import, and its names are tested beside its trainers."""
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)


def model_folder(path: Path) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"name": path.name}))
    (path / "tokenizer.json").write_text("{}")
    return str(path)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """The smallest configuration that says everything it must."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    return {
        "models": {
            "policy": {"model": model_folder(tmp_path / "policy")},
            "judge": {"model": model_folder(tmp_path / "judge")},
        },
        "prompts": {"sources": [{"type": "jsonl", "path": str(tmp_path / "prompts.jsonl"), "column": "prompt"}]},
        "judge": {"rubrics": [{"name": "helpfulness", "text": "Does it help?"}, {"name": "factuality"}]},
    }


@pytest.fixture
def load(tmp_path: Path, values: dict[str, Any]) -> Any:
    """`load(*overrides, **blocks)`: the smallest configuration with some blocks changed, from a file."""

    def go(*overrides: str, **blocks: Any) -> DmapoConfig:
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump({**values, **blocks}))
        return load_config(DmapoConfig, str(path), overrides)

    return go


def test_the_smallest_configuration(load: Any) -> None:
    found = load()
    assert (found.candidates.k, found.gate.tau, found.prompts.num_shards, found.train.method) == (4, 2.5, 64, "kto")
    assert found.candidates.sampling.temperature == 0.8 and found.judge.sampling.temperature == 0.0


# --- the files that come with Quorum ----------------------------------------------------------------------------------


#: Their gates are for judges that give most answers the highest score.
OTHER_GATES = ("smol", "smol_quick", "smol_checklist")
SHIPPED = sorted(
    CONFIGS / f"{name}.yaml"
    for name, workflow in WORKFLOWS.items()
    if workflow in ("dmapo", "baselines") and name not in OTHER_GATES
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_say_what_they_should(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    found = (BaselinesConfig if "baselines" in written else DmapoConfig).model_validate(written)
    assert found.run.name == path.stem
    assert [r.name for r in found.judge.rubrics] == ["helpfulness", "factuality", "conciseness"]
    assert found.templates()
    assert (found.candidates.k, found.candidates.sampling.temperature, found.gate.alpha, found.gate.tau) == (
        4,
        0.8,
        0.15,
        2.5,
    )
    assert (found.gate.desirable_at, found.gate.undesirable_at, found.datasets.min_gap) == (7.0, 4.0, 1.5)
    # Published as policy and judge; a model that thinks gives no score.
    assert all(m.chat_template_args == {"enable_thinking": False} for m in found.models.values())
    if path.stem in ("dmapo", "baselines", "ablations"):
        train = found.training("kto", 0) if isinstance(found, BaselinesConfig) else found.train
        lora = train.lora
        assert (train.beta, train.learning_rate, train.lr_scheduler, train.warmup_ratio) == (0.1, 5e-5, "cosine", 0.05)
        assert (train.epochs, train.global_batch, train.batch_size, train.num_workers) == (2, 16, 2, 8)
        assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (16, 32, 0.05, "all-linear")
        assert found.candidates.sampling.top_p == 0.95 and found.candidates.sampling.max_tokens == 512
        assert (found.datasets.max_length, found.datasets.max_prompt_length) == (1024, 512)
        assert train.disable_dropout is False
        assert [s.limit for s in found.prompts.sources] == [10_000, 5_000]  # type: ignore[union-attr]


def test_a_shipped_file_goes_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(models, "model_path", lambda name: folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()  # a folder of that name is no file
    for name in ("pocket", "pocket.yaml", "configs/pocket.yaml"):
        assert load_config(DmapoConfig, name).models["judge"].model == folder
    for name in ("pokcet", "my/pocket.yaml", "/nowhere/pocket.yaml", "configs/other.yaml"):
        with pytest.raises(ConfigError, match=rf"no config file {name}; Quorum comes with .*dmapo.yaml.*pocket.yaml"):
            load_config(DmapoConfig, name)


@pytest.mark.parametrize("error", [FileNotFoundError("no weights; make them with"), ValueError("no pocket model 'x'")])
def test_pocket_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> str:
        raise error

    monkeypatch.setattr(models, "model_path", fail)
    with pytest.raises(ConfigError, match=str(error)):
        load_config(DmapoConfig, "pocket")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gat.tau=2", r"gat: unknown key; did you mean 'gate'\?"),
        ("gate.tua=2", r"gate\.tua: unknown key; did you mean 'tau'\?"),
        ("candidates.sampling.temprature=1", r"candidates\.sampling\.temprature: .* 'temperature'\?"),
        ("judge.asking.retry=1", r"judge\.asking\.retry: .* 'retries'\?"),
        ("judge.rubrics.1.txt=x", r"judge\.rubrics\.1\.txt: .* 'text'\?"),
        ("models.judge.dtpye=float32", r"models\.judge\.dtpye: .* 'dtype'\?"),
        ("models.judge.placement.max_actor=2", r"models\.judge\.placement\.max_actor: .* 'max_actors'\?"),
        ("prompts.sources.0.colum=x", r"prompts\.sources\.0\.(jsonl\.)?colum: .* 'column'\?"),
        ("train.lora.rank=8", r"train\.lora\.rank: unknown key; choose from alpha, dropout, r, target_modules"),
        ("evaluate.modes=[{name: a, smapling: {}}]", r"evaluate\.modes\.0\.smapling: .* 'sampling'\?"),
        ("run.Name=x", r"run\.Name: .* 'name'\?"),
        ("candidates.k=four", r"candidates\.k: .*integer.*\(it is 'four'\)"),
        ("candidates.k=0", r"candidates\.k: .*greater than or equal to 1 \(it is 0\)"),
        ("candidates.k=2.5", r"candidates\.k: .*integer"),
        ("gate.use_critic=perhaps", r"gate\.use_critic: .*boolean.*'perhaps'"),
        ("gate=2", r"gate: .*dictionary"),
        ("judge.rubrics={}", r"judge\.rubrics: "),
        ("models.judge.dtype=float8", r"models\.judge\.dtype: .*'float32'.*\(it is 'float8'\)"),
        ("prompts.num_shards=48", r"prompts\.num_shards: num_shards must divide 1024.*32 and 64"),
        ("train.method=ppo", r"train\.method: unknown method 'ppo'.*sft, dpo"),
        ("train.batch_size=1", r"train\.batch_size must be 2 or more for kto"),
        (
            "train.global_batch=15",
            r"train\.global_batch is 15, .*= 2; set global_batch to 14 or 16, or batch_size to 3",
        ),
        ("train.gradient_accumulation=4", r"follows from train\.global_batch, .*remove it and .* = 8 for the same"),
        ("gate.undesirable_at=8", r"gate: undesirable_at \(8\) must be below desirable_at"),
        ("run.name=a/b", r"run\.name: "),
        ("prompts.sources.0.type=tsv", r"prompts\.sources\.0: "),
        ("prompts.sources=[]", r"prompts\.sources: "),
        (
            "judge.model=jugde",
            r"judge\.rubrics\.helpfulness\.model is 'jugde', which is not defined under models; .*'judge'\?",
        ),
        ("judge.rubrics.1.model=big", r"judge\.rubrics\.factuality\.model is 'big'"),
        ("critic.model=crtic", r"critic\.model is 'crtic', which is not defined under models"),
        ("evaluate.judge=jude", r"evaluate\.judge is 'jude'.*'judge'\?"),
        ("train.model=polcy", r"train\.model is 'polcy'.*'policy'\?"),
        ("train.method=dpo datasets.kinds=[kto]", r"train\.method is dpo, but datasets\.kinds does not include dpo"),
        ("datasets.kinds=[dpo] train.method=dpo", r"evaluate\.perplexity reads the held-out kto rows"),
        ("critic.asking.expected_score=true", r"critic: critic\.asking\.expected_score has no effect"),
        ("prompt_templates=pokcet", r"no built-in prompt templates 'pokcet'; choose from .*pocket"),
        ("prompt_templates=./mine.yaml", r"prompt template file \./mine\.yaml does not exist"),
        ("models.judge.model=/no/such/model", r"models\.judge: model '/no/such/model': no such folder"),
        ("models.judge.adapter=/no/lora", r"models\.judge: adapter '/no/lora': no such folder"),
        (
            "models.judge.model=pocket:critic",
            r"unknown pocket model 'pocket:critic'; choose from pocket:policy, pocket:judge",
        ),
        ("models.judge.chat_template=/no/x.jinja", r"models\.judge\.chat_template: no such file /no/x\.jinja"),
        (
            "models.judge.args.seed=1",
            r"models\.judge: vLLM argument 'seed' under args: set the engine's own key 'seed'",
        ),
        ("judge.sampling.extra.seed=1", r"judge\.sampling\.extra: sampling parameter 'seed'"),
        ("judge.rubrics.0.sampling.extra.n=2", r"judge\.rubrics\.helpfulness\.sampling\.extra: .*'n' cannot be set"),
    ],
)
def test_a_mistake_is_told_by_its_key(load: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*override.split(" ") if " datasets" in override or " train" in override else [override])


@needs_vllm
def test_names_of_vllm_are_checked_where_it_is_installed(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\.judge: vLLM has no engine argument 'max_num_seq'.*'max_num_seqs'"):
        load("models.judge.args.max_num_seq=8")
    with pytest.raises(
        ConfigError, match=r"candidates\.sampling\.extra: vLLM has no sampling parameter 'topk'.*'top_k'"
    ):
        load("candidates.sampling.extra.topk=8")


def test_names_of_trl_are_errors_of_the_configuration(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(method: str, args: Mapping[str, Any]) -> None:
        raise TrainingInputError(f"trainer_args.{next(iter(args))}: TRL's {method} has no such setting")

    monkeypatch.setattr(training, "validate_trainer_args", refuse)
    with pytest.raises(ConfigError, match=r"trainer_args\.max_step: TRL's kto has no such setting"):
        load("train.trainer_args.max_step=5")


def test_a_model_that_nothing_reads(load: Any, values: dict[str, Any]) -> None:
    spare = {**values["models"], "spare": values["models"]["judge"]}
    with pytest.raises(ConfigError, match=r"models\.spare is not used by any stage"):
        load(models=spare)
    assert "spare" in load("judge.rubrics.1.model=spare", models=spare).models


@pytest.mark.parametrize("key", ["a/b", "..", "", "[red]", "a b"])
def test_keys_of_models_are_plain_because_folders_are_named_after_them(load: Any, values: Any, key: str) -> None:
    with pytest.raises(ConfigError, match="models"):
        load("candidates.model=" + key, models={**values["models"], key: values["models"]["judge"]})


def test_a_missing_block(load: Any, values: dict[str, Any]) -> None:
    del values["judge"]
    with pytest.raises(ConfigError, match=r"my\.yaml: judge: missing"):
        load()


def test_all_mistakes_are_told_at_once(load: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load("gate.tua=1", "candidates.k=x")
    assert "gate.tua" in str(caught.value) and "candidates.k" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate: [", "is not valid YAML"),
        ("", "must be a mapping of blocks, not NoneType"),
        ("- a", "must be a mapping of blocks, not list"),
        ("gate: {tau: 1}\njudge: {}\ngate: {alpha: 0.1}", "duplicate key 'gate'"),
        ("gate:\n  tau: 1\n  tau: 2", r"duplicate key 'tau'.*\n?.*line 3"),
        ("\x00", "is not valid YAML"),
        ("gate: {tau: 2024-13-45}", "is not valid YAML: month must be in"),
        ("gate: {tau: !!bool x}", "is not valid YAML"),
        ("? [gate]\n: 1", "is not valid YAML"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(DmapoConfig, str(tmp_path / "x.yaml"))
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(DmapoConfig, str(tmp_path / "x.yaml"))


def test_anchors_and_merges_of_yaml_still_work(tmp_path: Path) -> None:
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: [*a, *b]\n  x: 3\nd: *a"
    assert yaml.load(text, UniqueKeys) == yaml.safe_load(text)


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides(load: Any) -> None:
    found = load(
        "gate.tau=2",
        "run.name=other",
        "train.learning_rate=1e-3",
        "judge.rubrics.1.text='Is it true: yes or no'",
        "candidates.sampling.max_tokens=48",
        "evaluate.modes=[{name: one, sampling: {temperature: 0.5}}]",
        "calls.root=null",
        "judge.sampling.extra={top_k: 5}",
        "datasets.kinds=[kto]",
        "models.judge.args.max_num_seqs=4",
    )
    assert (found.gate.tau, found.run.name, found.train.learning_rate) == (2.0, "other", 0.001)
    assert found.judge.rubrics[1].text == "Is it true: yes or no" and found.judge.rubrics[0].text == "Does it help?"
    assert (found.candidates.sampling.max_tokens, found.candidates.sampling.temperature) == (48, 0.8)
    assert [m.name for m in found.evaluate.modes] == ["one"] and found.calls.root is None
    assert found.judge.sampling.extra == {"top_k": 5} and found.models["judge"].args == {"max_num_seqs": 4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate.tau", "is not an override; write key=value"),
        ("=2", "is not an override; write key=value"),
        ("gate.tau=[", r"gate\.tau: '\[' is not a YAML value"),
        ("gate.tau=2024-13-45", r"gate\.tau: '2024-13-45' is not a YAML value"),
        (f"gate.tau={'9' * 5000}", r"gate\.tau: '9+' is not a YAML value"),
        ("judge.rubrics.7.text=x", r"judge\.rubrics\.7\.text: '7' is not an item of a list of 2 \(the first is 0\)"),
        ("judge.rubrics.first.text=x", r"'first' is not an item of a list of 2"),
        ("judge.rubrics.-1.text=x", "'-1' is not an item"),
        ("judge.rubrics.2={}", "'2' is not an item"),
        ("models.judge.model.path=x", r"models\.judge\.model\.path: model is a value, not a block"),
        ("gate.tau=", r"gate\.tau: .*number"),
        ("nothing.at.all=1", "nothing: unknown key"),
        ("gate..tau=1", r"gate\.: unknown key"),
    ],
)
def test_overrides_that_are_none(load: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_overrides_of_an_empty_block(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"gate\.tau: gate is empty in the file"):
        load("gate.tau=1", gate=None)


def test_paths_of_models_are_absolute_because_actors_have_another_folder(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder(tmp_path / "lora")
    (tmp_path / "t.jinja").write_text("x")
    judge = load("models.judge={model: judge, adapter: ./lora, chat_template: t.jinja}").models["judge"]
    assert (judge.model, judge.adapter, judge.chat_template) == tuple(
        str(tmp_path / n) for n in ("judge", "lora", "t.jinja")
    )
    assert load("models.judge.model=~/judge").models["judge"].model == str(tmp_path / "judge")


def test_a_hub_name_stays_one(values: dict[str, Any]) -> None:
    resolved = RunConfig.resolve({**values, "models": {"a": {"model": "Qwen/Qwen3-8B"}, "b": "odd"}})
    assert resolved["models"] == {"a": {"model": "Qwen/Qwen3-8B"}, "b": "odd"}


def test_folders_of_a_run(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = load("run.name=x")
    assert found.run_folder() == str(tmp_path / "runs" / "x") and found.run_folder("y") == str(tmp_path / "y")
    assert (
        found.calls_root("/runs/x") == "/runs/x/calls"
        and load("calls.root=s3://b/calls/").calls_root("/r") == "s3://b/calls"
    )
    assert load("run.root=s3://b/runs/").run_folder() == "s3://b/runs/run"


def test_a_report_names_models_and_never_their_folders(load: Any, values: dict[str, Any]) -> None:
    report = load().report()
    assert report.models == {"policy": "policy", "judge": "judge"}
    assert report.curating == {"helpfulness": "judge", "factuality": "judge"} and report.evaluating == {
        "judge": "judge"
    }


# --- every key counts -------------------------------------------------------------------------------------------------

#: Keys that decide how to run and never what comes out.
OPERATIONAL = (
    "run.",
    "calls.",
    "ray.",
    "failure.",
    "models.*.placement.",
    "models.*.canary",
    "models.*.card",  # the page of the run shows it: tests/judge_card/test_card.py
    "models.*.engine",
    "models.*.endpoint",  # of engine openai alone; its own test is in tests/engines/test_openai_settings.py
    "models.*.revision",  # of a hub model it is in the commit; a folder has none
    "train.use_gpu",
    "train.cpus_per_worker",
    "train.label_selector",
    "train.resources",
    "train.autoscaling",
    "train.max_failures",
    "train.report_to",
    "train.save_steps",
)

#: Values for keys that have no obvious other one.
OTHER: dict[str, Any] = {
    "train.global_batch": 32,
    "train.batch_size": 4,
    "train.method": "dpo",
    "train.quantization": "nf4",
    "evaluate.checker": "examples/my_checker.py",
    "prompt_templates": "pocket",
    "candidates.model": "judge",
    "candidates.generators": {"policy": 3},
    "judge.model": "policy",
    "critic.model": "policy",
    "train.model": "judge",
    "evaluate.judge": "policy",
    "prompts.num_shards": 32,
    "prompts.max_prompts": 5,
    "prompts.decontaminate": {"against": [{"type": "text", "path": "LICENSE"}]},
    "judge.rubrics": [{"name": "helpfulness"}],
    "rounds": {"n": 2},
    "judge.early_exit": "scores",  # labels makes no dpo rows
    "judge.escalate": [["helpfulness"], ["factuality"]],
    "judge.programs": [{"name": "program", "checker": "pocket"}],
    "judge.rewards": [{"name": "pairs", "model": "judge"}],
    "datasets.kinds": ["kto"],
    "train.lora.target_modules": ["q_proj"],
    "evaluate.modes": [{"name": "greedy", "sampling": {"max_tokens": 9}}],
    "models.*.engine": "vllm",  # openai needs other keys as well
    "models.*.quantization": "fp8",
    "models.*.placement.min_actors": 1,  # more need more max_actors
    "models.*.max_model_len": 512,
    "models.*.chat_template": "template.jinja",
    "models.*.adapter": "adapter",
    "train.report_to": ["x"],
    "train.desirable_weight": 1.1,
    "train.undesirable_weight": 1.1,
}


def leaves(block: BaseModel, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, annotation, value) of everything that can be set."""
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{at}{name}.")
        elif name == "models":
            for key, model in value.items():
                yield from leaves(model, f"{at}{name}.{key}.")
        else:
            yield f"{at}{name}", field.annotation, value


def another(key: str, annotation: Any, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if get_origin(annotation) is Literal:
        return next((a for a in get_args(annotation) if a != value), value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.9 or 0.1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {**value, "max_length": "1"}
    raise AssertionError(f"say in OTHER what else {key} can be (it is {value!r})")


def starred(key: str) -> str:
    first, _, rest = key.partition(".")
    return f"models.*.{rest.partition('.')[2]}" if first == "models" else key


def changed(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The configuration with one key set."""
    values = copy.deepcopy(dict(values))
    place = values
    *path, last = key.split(".")
    for step in path:
        place = place.setdefault(step, {})
    place[last] = value
    return values


#: Keys of the gate that go with its kind, with a file, or with more judges.
WITH_OTHERS = ("kind", "agree_with_humans", "confidence", "labels", "pool", "posterior_at")


def fingerprints(values: Mapping[str, Any]) -> set[str]:
    return {s.folder_name for s in dmapo(DmapoConfig.model_validate(values), "/run").stages}


def test_every_key_changes_a_fingerprint_or_is_operational(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    model_folder(tmp_path / "adapter")
    before = fingerprints(values)
    keys = {key: (annotation, value) for key, annotation, value in leaves(DmapoConfig.model_validate(values))}
    assert len(keys) > 100
    silent, loud = [], []
    for key, (annotation, value) in keys.items():
        general = starred(key)
        operational = general.startswith(tuple(o for o in OPERATIONAL if o.endswith("."))) or general in OPERATIONAL
        if operational and value is None:
            continue
        if key.startswith("prompts.sources") or general == "models.*.model":
            continue  # by content: the next test
        if key == "tokenizer":
            continue  # refused beside a policy; tests/dags/test_endpoint_only.py looks at it without one
        if key == "candidates.source":
            continue  # in place of prompts.sources: tests/data/test_own_candidates.py
        if key == "benchmarks":
            continue  # it adds stages, which tests/bench/test_stages.py looks at
        if key == "judge.source":
            continue  # it adds stages, which tests/data/test_verdict_sources.py looks at
        if key.startswith("gate.") and key.removeprefix("gate.") in WITH_OTHERS:
            continue  # tests/data/test_certified_gate.py and test_posterior_gate.py
        if key == "human_labels":
            continue  # by the content of its file: tests/operate/test_review.py
        if key in ("critic.asking.expected_score", "evaluate.asking.expected_score"):
            continue  # nothing reads it, so it is refused
        if key in ("models.policy.adapter", "models.policy.chat_template"):
            continue  # of the model that is trained: refused
        other = another(general, annotation, value)
        if general in ("models.*.chat_template", "models.*.adapter"):
            other = str(tmp_path / other)
        after = fingerprints(changed(values, key, other))
        (silent if after == before else loud).append((key, operational))
    assert [key for key, operational in loud if operational] == []
    # The template file is in every call key, but in no fingerprint yet (ModelSettings.semantics leaves it out).
    assert {starred(key) for key, operational in silent if not operational} <= {"models.*.chat_template"}


def test_an_earlier_run_is_read_with_the_rows_per_step_that_it_had(values: dict[str, Any]) -> None:
    for train, rows in (
        ({"num_workers": 4, "gradient_accumulation": 8}, 64),
        ({"batch_size": 8, "num_workers": 2, "gradient_accumulation": 1}, 16),
        ({"num_workers": 2, "global_batch": 8}, 8),
        ({}, 16),
    ):
        given = {**values, "train": dict(train)}
        run = Run(Folder("/run"), "dmapo", "dmapo", {}, {}, 64, given=given)
        assert stored(run).config.train.global_batch == rows
        assert given["train"] == train


def test_models_and_prompts_count_by_content_and_not_by_name(values: dict[str, Any], tmp_path: Path) -> None:
    before = fingerprints(values)
    (tmp_path / "moved").mkdir()
    (tmp_path / "policy").rename(tmp_path / "moved" / "policy")
    moved = changed(values, "models.policy.model", str(tmp_path / "moved" / "policy"))
    assert fingerprints(moved) == before
    # A policy that is retrained in the same folder is another one.
    (tmp_path / "moved" / "policy" / "tokenizer.json").write_text('{"retrained": true}')
    assert {name.rsplit("-", 1)[0] for name in fingerprints(moved) - before} >= {
        "candidates",
        "gate",
        "train",
        "evaluate",
    }
    assert not {n for n in fingerprints(moved) - before if n.startswith("prompts-")}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    assert not fingerprints(moved) & before


def test_what_is_made_again_after_a_change(values: dict[str, Any]) -> None:
    def made(key: str, value: Any) -> set[str]:
        before = fingerprints(values)
        return {name.rsplit("-", 1)[0] for name in fingerprints(changed(values, key, value)) - before}

    after_gate = {"gate", "dataset-rows", "datasets", "train", "evaluate"}
    assert made("gate.tau", 1.0) >= after_gate and not made("gate.tau", 1.0) & {
        "prompts",
        "candidates",
        "judge",
        "critic",
    }
    assert "judge" not in made("critic.asking", {"retries": 5}) and "critic" in made("critic.asking", {"retries": 5})
    assert "critic" not in made("judge.asking", {"retries": 5}) and "judge" in made("judge.asking", {"retries": 5})
    assert "train" not in made("evaluate.seed", 9) and "evaluate" in made("evaluate.seed", 9)
    assert made("evaluate.bootstrap_draws", 500) == {"evaluate"}


def test_a_dag_has_the_stages_of_the_method(values: dict[str, Any]) -> None:
    dag = dmapo(DmapoConfig.model_validate(values), "/run")
    assert dag.groups == ["prompts", "candidates", "judge", "critic", "gate", "datasets", "train", "evaluate"]
    names = {s.name for s in dag.stages}
    assert "critic" not in {
        s.name for s in dmapo(DmapoConfig.model_validate(changed(values, "gate.use_critic", False)), "/run").stages
    }
    assert {"judge", "judge-layout", "responses-base", "responses-policy", "comparisons"} <= names
    policy = next(s for s in dag.stages if s.name == "responses-policy")
    train = next(s for s in dag.stages if s.name == "train")
    assert policy.work.engine.args[0].model == f"{stage_folder('/run', train).location}/merged"  # type: ignore[union-attr]


def test_wrong_values_never_raise_anything_but_a_validation_error(values: dict[str, Any]) -> None:
    for key, _, _ in leaves(DmapoConfig.model_validate(values)):
        for odd in (None, [], {}, "x", -1, object()):
            try:
                DmapoConfig.model_validate(changed(values, key, odd))
            except ValidationError as error:
                assert explain(error, DmapoConfig, "f").startswith("f: ")


@pytest.mark.parametrize(
    ("dag", "name"),
    [
        ("dmapo", "pocket"),
        ("baselines", "pocket_baselines"),
        ("fellowship", "pocket_fellowship"),
        ("agreement", "pocket_agreement"),
        ("winrate", "winrate"),
        ("winrate", "pocket_winrate"),
    ],
)
def test_what_a_run_folder_keeps_of_its_configuration_can_be_read_back(dag: str, name: str, tmp_path: Path) -> None:
    """`quorum retry` reads it from the manifest."""
    recorded = tmp_path / "recorded.jsonl.gz"
    recorded.touch()
    changes = [f"data.path={recorded}"] if name == "winrate" else []
    config = load_config(find_workflow(dag).config, name, changes)
    kept = json.loads(json.dumps(run_settings(config, str(tmp_path)).given))
    assert read_config(find_workflow(dag).config, kept, [], "manifest.json") == config


@pytest.mark.parametrize("key", ["adapter", "chat_template", "args.tokenizer"])
def test_what_is_trained_is_the_model_that_answers(load: Any, key: str) -> None:
    """Training would start from the bare model, and with its own tokenizer and template."""
    with pytest.raises(ConfigError, match=rf"models\.policy\.{key}: training would start from the model without it"):
        load(f"models.policy.{key}=x")
