"""The block of a model at an endpoint: its mistakes, what of it is identity, what the rest of a run makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError

from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.engines.endpoint_settings import EndpointSettings
from ray_pipeline.engines.models import ModelSettings, Placement
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.graph.ray_shards import _engine_room
from ray_pipeline.graph.stage import ShardWork
from ray_pipeline.store.keys import digest
from ray_pipeline.workflow import training
from ray_pipeline.workflow.dmapo_config import DmapoConfig

URL = "https://example.org/v1"
SECRET = "sk-very-secret-0123456789"


def model(**endpoint: Any) -> ModelSettings:
    return ModelSettings.model_validate(
        {
            "engine": "openai",
            "model": "judge-1",
            "endpoint": {"base_url": URL, **endpoint},
            "placement": {"max_actors": 2},
        }
    )


def test_identity_is_address_name_and_what_changes_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    engine = model().factory()()
    assert isinstance(engine, OpenAIEngine) and engine.spec.share == 2
    assert dict(engine.identity) == {
        "engine": "openai",
        "model": f"endpoint:judge-1@{URL}",
        "structured": "auto",
        "omit": [],
        "extra_body": {},
    }
    assert model().weights() == {"model": engine.identity["model"]}
    assert model(base_url=URL + "/").weights() == model().weights()
    assert SECRET not in repr(engine.identity) + repr(engine.spec) + json.dumps(model().model_dump(mode="json"))


#: Other values of every key, and whether they may change what comes out.
KEYS: dict[str, tuple[Any, bool]] = {
    "base_url": ("https://example.org/v2", True),
    "structured": ("text", True),
    "omit": (["seed"], True),
    "extra_body": ({"reasoning_effort": "low"}, True),
    "break_control_strings": (True, True),
    "identity": ("a name", True),
    "api_key_env": ("OTHER_KEY", False),
    "concurrency": (3, False),
    "timeout_s": (3.0, False),
    "retries": (3, False),
    "patience_s": (3.0, False),
    "requests_per_minute": (3, False),
    "tokens_per_minute": (3, False),
    "max_tokens_name": ("max_tokens", False),
    "transport": ("httpx", False),
    "batch": ({"quiet_s": 3.0}, False),  # with engine openai_batch, whose identity is that of openai
    "prices": ({"input": 1, "output": 2}, False),
    "budget": (3.0, False),
}


def test_every_key_is_identity_or_operational() -> None:
    assert set(KEYS) == set(EndpointSettings.model_fields)

    def made(settings: ModelSettings) -> list[str]:
        return [digest([settings.weights(), settings.semantics()]), digest(dict(settings.factory()().identity))]

    before = made(model(prices={"input": 9, "output": 9}))
    for key, (value, loud) in KEYS.items():
        settings = model(**{"prices": {"input": 9, "output": 9}} | ({} if key == "batch" else {key: value}))
        if key == "batch":
            values = settings.model_dump(exclude_unset=True)
            endpoint = {**values["endpoint"], key: value}
            settings = ModelSettings.model_validate({**values, "engine": "openai_batch", "endpoint": endpoint})
        after = made(settings)
        assert [a != b for a, b in zip(before, after, strict=True)] == [loud, loud], key


def test_the_other_engine_is_as_it_was() -> None:
    settings = ModelSettings(model="x")
    assert settings.spec().model == "x" and "endpoint" not in settings.semantics() and settings.is_here
    assert settings.factory().func is VllmEngine  # type: ignore[attr-defined]


def test_an_endpoint_takes_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8, "CPU": 8})
    rooms = [
        _engine_room(ShardWork(lambda given: None, ("x",), engine=m.factory()), Placement())  # type: ignore[arg-type, return-value]
        for m in (model(), ModelSettings(model="x"), ModelSettings(model="x", tensor_parallel_size=4))
    ]
    assert [room["num_gpus"] for room in rooms] == [0, 1, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": None}, "needs the endpoint block; add it with at least base_url"),
        ({"engine": "vllm"}, "endpoint is only for engines openai and openai_batch"),
        ({"engine": "open"}, "'vllm', 'openai' or 'openai_batch'"),
        ({"dtype": "float32"}, "dtype is only for engine vllm.*extra_body"),
        ({"args": {"max_num_seqs": 3}}, "args is only for engine vllm"),
        ({"adapter": "/lora"}, "adapter is only for engine vllm"),
        ({"placement": {"num_gpus": 1}}, "uses no local GPU"),
        ({"endpoint": {}}, "base_url"),
        ({"endpoint": {"base_url": "example.org"}}, "base_url must be an address like"),
        ({"endpoint": {"base_url": "ftp://example.org"}}, "base_url must be an address like"),
        ({"endpoint": {"base_url": f"https://me:{SECRET}@example.org/v1"}}, "no password"),
        ({"endpoint": {"base_url": f"{URL}?key={SECRET}"}}, "no password and no query"),
        ({"endpoint": {"base_url": URL + "/chat/completions"}}, "end before the name of the call"),
        ({"endpoint": {"base_url": URL, "api_key_env": SECRET}}, "NAME of an environment variable"),
        ({"endpoint": {"base_url": URL, "api_key": SECRET}}, "[Ee]xtra"),
        ({"endpoint": {"base_url": URL, "budget": 5}}, "budget needs prices"),
        ({"endpoint": {"base_url": URL, "budget": 0, "prices": {"input": 1, "output": 1}}}, "greater than 0"),
        ({"endpoint": {"base_url": URL, "prices": {"input": -1, "output": 1}}}, "greater than or equal to 0"),
        ({"endpoint": {"base_url": URL, "extra_body": {"seed": 1}}}, "'seed' under extra_body: .* own key 'seed'"),
        (
            {"endpoint": {"base_url": URL, "extra_body": {"response_format": 1}}},
            "agents set structured output",
        ),
        ({"endpoint": {"base_url": URL, "extra_body": {"n": 2}}}, "'n' under extra_body cannot be set"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    values = {"engine": "openai", "model": "judge-1", "endpoint": {"base_url": URL}, **changes}
    with pytest.raises(ValidationError, match=message) as caught:
        ModelSettings.model_validate(values)
    assert SECRET not in str(caught.value)


# --- in a whole configuration -----------------------------------------------------------------------------------------


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`load(*overrides)` of a configuration whose judge is at an endpoint."""
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "judge-1"):  # the second has the name of the endpoint's model, and is not meant
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    values = {
        "models": {
            "policy": {"model": str(tmp_path / "policy")},
            "judge": {"engine": "openai", "model": "judge-1", "endpoint": {"base_url": URL}},
        },
        "prompts": {"sources": [{"type": "jsonl", "path": str(tmp_path / "prompts.jsonl"), "column": "prompt"}]},
        "judge": {"rubrics": [{"name": "helpfulness", "text": "Does it help?"}]},
    }

    def go(*overrides: str) -> Any:
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
        return load_config(DmapoConfig, str(tmp_path / "my.yaml"), overrides)

    return go


def test_a_configuration_with_a_judge_at_an_endpoint(load: Any) -> None:
    found = load("judge.sampling.extra={top_k: 5, whatever_the_server_knows: 1}")
    assert found.models["judge"].model == "judge-1" and found.report().models["judge"] == "judge-1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.judge.endpoint.base_ur=x", r"models\.judge\.endpoint\.base_ur: unknown key; .*'base_url'\?"),
        ("models.judge.endpoint.prices={input: 1}", r"models\.judge\.endpoint\.prices\.output: missing"),
        ("models.judge.dtype=float32", r"models\.judge: dtype is only for engine vllm"),
        (f"models.judge.endpoint.api_key_env={SECRET}", r"models\.judge\.endpoint: api_key_env must be the NAME"),
        (f"models.judge.endpoint.base_url=https://x:{SECRET}@y/v1", r"models\.judge\.endpoint: base_url must have no"),
        (f"models.judge.endpoint.api_key={SECRET}", r"endpoint\.api_key: unknown key; .*'api_key_env'\?"),
        ("train.model=judge", r"train\.model is 'judge', a model at an endpoint"),
        ("judge.sampling.extra.seed=1", r"judge\.sampling\.extra: parameter 'seed' under extra"),
        ("critic.sampling.extra.n=2", r"critic\.sampling\.extra: parameter 'n'"),
        ("evaluate.sampling.extra.stream=true", r"evaluate\.sampling\.extra: parameter 'stream'"),
        ("candidates.sampling.extra.seed=1", r"candidates\.sampling\.extra: sampling parameter 'seed'"),
    ],
)
def test_mistakes_by_their_keys(load: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(override)
    assert SECRET not in str(caught.value)


def test_the_file_that_comes_with_quorum_needs_no_network_for_its_endpoint(tmp_path: Path, load: Any) -> None:
    found = load_config(DmapoConfig, "endpoint", [f"models.policy={{model: {tmp_path / 'policy'}}}"])
    endpoint = found.models["judge"].endpoint
    assert endpoint is not None and endpoint.prices is not None and endpoint.budget
    assert found.critic.model == found.evaluate.judge == "judge"
