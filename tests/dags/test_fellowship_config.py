"""The feedback loop's workflow: what its configuration says, the stages that follow, and its published sources."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dags.fellowship import FellowshipConfig, fellowship
from ray_pipeline.config.loading import load_config, read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.workflow import training
from tests.prompt_sets import load_prompts


@pytest.fixture(autouse=True)
def _no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes many seconds to import, and its names are tested beside its trainers."""
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)


ENDPOINT = {"engine": "openai", "model": "big", "endpoint": {"base_url": "http://127.0.0.1:1/v1"}}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """`load(**blocks)`: a small configuration with these blocks; `models` adds to its own."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    for name in ("generator", "reviewer", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "tokenizer.json").write_text("{}")

    def go(models: dict[str, Any] | None = None, **blocks: Any) -> FellowshipConfig:
        own = {name: {"model": str(tmp_path / name)} for name in ("generator", "reviewer", "judge")}
        source = {"type": "jsonl", "path": str(tmp_path / "prompts.jsonl"), "column": "prompt"}
        values = {
            "models": {**own, **(models or {})},
            "prompts": {"sources": [source]},
            "judge": {"rubrics": [{"name": "a", "text": "?"}, {"name": "b", "text": "?"}], "layout": "shared_first"},
            **blocks,
        }
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return load_config(FellowshipConfig, str(file))

    return go


def names(config: FellowshipConfig) -> list[str]:
    return [stage.name for stage in fellowship(config, "/nowhere").stages]


LOOP = ["generate-1", "review-1", "generate-2", "review-2", "generate-3"]
AFTER = ["train", "responses-base", "responses-policy", "comparisons", "score-responses", "evaluate"]


def test_the_stages_take_turns(load: Any) -> None:
    found = names(load())
    assert found == ["prompts", *LOOP, "candidates", "judge", "select", "dataset-rows", "datasets", "loop", *AFTER]
    dag = fellowship(load(), "/nowhere")
    assert [s.name for s in dag.upto("datasets")] == found[:11] and "improve" not in dag.groups
    assert [s.name for s in dag.upto("review-1")] == ["prompts", "generate-1", "review-1"]
    assert names(load(evaluate={"skip_generation": True}))[-2:] == ["loop", "evaluate"]


def test_the_second_kind_is_a_branch_of_its_own(load: Any, tmp_path: Path) -> None:
    config = load(improve={})
    dag = fellowship(config, "/nowhere")
    needed = [s.name for s in dag.upto("improve")]
    assert needed == [
        "prompts", "improve-generate", "improve-review", "improve-revise", "improve-judge", "rows-revisions",
        "datasets-revisions", "rows-reviews", "datasets-reviews",
    ]  # fmt: skip
    own = {"sources": [{"type": "jsonl", "path": str(tmp_path / "prompts.jsonl"), "column": "prompt"}]}
    assert "improve-prompts" in names(load(improve={"prompts": own}))
    with pytest.raises(ConfigError, match=r"improve\.prompts\.num_shards is 8, but prompts\.num_shards is 64"):
        load(improve={"prompts": {**own, "num_shards": 8}})


def test_a_policy_can_be_trained_on_each_kind_of_data(load: Any) -> None:
    config = load(improve={"train": ["revisions", "reviews"]})
    stages = {stage.name: stage for stage in fellowship(config, "/nowhere").stages}
    trained = {name: stage for name, stage in stages.items() if name.startswith("train")}
    assert {name: stage.inputs["datasets"].name for name, stage in trained.items()} == {
        "train": "datasets", "train-revisions": "datasets-revisions", "train-reviews": "datasets-reviews",
    }  # fmt: skip
    bases = {name: Path(stage.work.settings.model.model).name for name, stage in trained.items()}
    assert bases == {"train": "generator", "train-revisions": "generator", "train-reviews": "reviewer"}
    assert len({stage.view for stage in trained.values()}) == 3 and len({s.fingerprint for s in trained.values()}) == 3
    assert config.workers() == dict.fromkeys(trained, config.train.num_workers)
    # The page is about the policy of the run's own data.
    assert [stage.role_name for stage in trained.values()].count("policy") == 1
    assert not {"train-revisions", "train-reviews"} & {s.name for s in stages["evaluate"].inputs.values()}
    assert "train-reviews" not in names(load(improve={"train": ["revisions"]}))


def test_a_strategy_judges_instead_of_the_rubrics(load: Any) -> None:
    select = {
        "strategy": {"kind": "combined", "high": 10},
        "judges": [{"name": "x", "model": "judge"}, {"name": "y", "model": "big"}],
    }
    config = load({"big": ENDPOINT}, judge=None, select=select)
    found = names(config)
    assert ("judge-judge" in found, "judge-big" in found, "score-responses" in found) == (True, True, False)
    assert config.judges == ["x", "y"] and "x, y by combined_10" in config.origin().text
    with pytest.raises(ConfigError, match="no judge for the responses"):
        load(judge=None)


def test_a_debate_or_a_jury_judges(load: Any) -> None:
    select = {
        "debate": {"rounds": 1, "schedule": [["critic"]]},
        "judges": [{"name": "x", "model": "judge"}, {"name": "y", "model": "big"}],
        "jury": {"pool": "weighted", "weights": {"x": 1, "y": 2}},
    }
    config = load({"big": ENDPOINT}, judge=None, select=select)
    assert {"judge-judge", "judge-big"} <= set(names(config))
    assert "x, y by a debate (a jury: weighted)" in config.origin().text
    before = fingerprints(config)
    pooled = fingerprints(load({"big": ENDPOINT}, judge=None, select={**select, "jury": {"pool": "median"}}))
    longer = {"rounds": 2, "schedule": [["critic"], ["psychologist"]]}
    talked = fingerprints(load({"big": ENDPOINT}, judge=None, select={**select, "debate": longer}))
    assert next(name for name in before if before[name] != pooled[name]) == "select"
    assert next(name for name in before if before[name] != talked[name]).startswith("judge-")
    improved = fingerprints(load(improve={})), fingerprints(load(improve={}, select={"jury": {"pool": "median"}}))
    assert {"select", "rows-revisions", "rows-reviews"} <= {n for n in improved[0] if improved[0][n] != improved[1][n]}


def test_the_report_knows_whose_family_the_policy_is(load: Any) -> None:
    told = load().report()
    assert told.candidate == told.models["generator"] == "generator"


def fingerprints(config: FellowshipConfig) -> dict[str, str]:
    return {s.name: s.fingerprint for s in fellowship(config, "/nowhere").stages}


@pytest.mark.parametrize(
    ("blocks", "first"),
    [
        ({"loop": {"reviewers": [{"name": "reviewer", "focus": "facts"}]}}, "review-1"),
        ({"loop": {"sampling": {"max_tokens": 9}}}, "generate-1"),
        ({"select": {"pairs": "best_worst"}}, "dataset-rows"),
        ({"datasets": {"min_gap": 2}}, "dataset-rows"),
        ({"train": {"method": "kto", "model": "generator"}}, "train"),
    ],
)
def test_what_changes_what(load: Any, blocks: dict[str, Any], first: str) -> None:
    before, after = fingerprints(load()), fingerprints(load(**blocks))
    changed = [name for name in before if before[name] != after[name]]
    assert changed[0] == first and "prompts" not in changed


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"loop": {"generator": "nobody"}}, "loop.generator is 'nobody'"),
        ({"loop": {"responses": 1}}, "loop.responses must be 2 or more"),
        ({"models": {"more": ENDPOINT}}, "models.more is not used by any stage"),
        ({"models": {"generator": ENDPOINT}}, "train.model is 'generator', a model at an endpoint"),
        ({"models": {"reviewer": ENDPOINT}, "improve": {}}, "loop.reviewers.0.model is 'reviewer', a model at an"),
        ({"datasets": {"kinds": ["kto"]}}, "train.method is dpo, but datasets.kinds does not include dpo"),
        ({"loop": {"templates": "nope"}}, "no built-in prompt templates 'nope'"),
        ({"loop": {"respones": 3}}, "loop.respones: unknown key; did you mean 'responses'"),
        ({"select": {"strategy": {"kind": "direct"}}}, "set strategy and judges together"),
        ({"select": {"jury": {"pool": "weighted", "weights": {"a": 1}}}}, "select.jury.weights has no entry for b"),
        ({"select": {"jury": {"pool": "mode"}, "pairs": "best_worst"}}, "picks the best response but not the worst"),
        (
            {"judge": None, "select": {"debate": {"rounds": 1, "schedule": [["nobody"]]}, "judges": [{"name": "x"}]}},
            "select.debate.schedule: unknown role nobody",
        ),
        (
            {"judge": None, "select": {"debate": {}, "judges": [{"name": "x"}], "debate_templates": "pocket"}},
            "select.debate_templates pocket does not show all responses",
        ),
    ],
)
def test_mistakes_are_one_clear_line(load: Any, blocks: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(**blocks)


# --- the published set-up ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2] / "configs"


def shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_published_file_says_what_was_published() -> None:
    config = FellowshipConfig.model_validate(shipped("fellowship.yaml"))
    models = {key: model.model for key, model in config.models.items()}
    assert models["generator"] == "meta-llama/Llama-3.1-8B-Instruct" and models["reviewer"] == "google/gemma-2-9b-it"
    assert models["judge"].startswith("gpt-4o") and not config.models["judge"].is_here
    assert config.loop.responses == 3 and config.loop.sampling.temperature == config.loop.reviewing.temperature == 0
    assert config.select.names == ["gpt-4o"] and config.select.pairs == "every_rejected"
    assert config.loop.texts().review.system == ""  # Gemma 2 takes no system message
    assert config.select.strategy is not None and config.select.texts().of(config.select.strategy)


def test_the_documented_levels_fit_the_published_file() -> None:
    text = (ROOT.parent / "docs" / "feedback_loop.md").read_text()
    overrides = [f"select.{key}={value}" for key, value in re.findall(r"select\.(judges|escalate)='(.*?)'", text)]
    config = read_config(FellowshipConfig, shipped("fellowship.yaml"), ["improve=null", *overrides])
    assert config.select.levels == (("llama",), ("gpt-4o",)) and config.report().levels == config.select.levels
    with pytest.raises(ConfigError, match="but improve compares reviews by what all judges"):
        read_config(FellowshipConfig, shipped("fellowship.yaml"), overrides)


def test_the_pocket_file_names_its_own_models() -> None:
    config = FellowshipConfig.model_validate(shipped("pocket_fellowship.yaml"))
    assert {key: m.model for key, m in config.models.items()} == {
        "generator": "pocket:generator", "reviewer": "pocket:reviewer", "judge": "pocket:judge",
    }  # fmt: skip
    assert config.train.model == "generator" and config.improve is not None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`hub(name, rows)`: a folder of the shape that the hub serves, opened by the real `datasets` library."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def go(name: str, rows: list[dict[str, Any]]) -> str:
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
        return str(folder)

    return go


def turn(role: str, content: str) -> dict[str, str]:
    return {"content": content, "role": role}


def test_capybara_prompts_are_the_conversations_before_the_last_answer(hub: Any) -> None:
    def row(source: str, chosen: list[dict[str, str]]) -> dict[str, Any]:
        spoken = [m["content"] for m in chosen]
        return {
            "source": source,
            "conversation": [{"input": a, "output": b} for a, b in zip(spoken[::2], spoken[1::2], strict=True)],
            "original_response": spoken[-1],
            "generation_prompt": ["You are a helpful assistant."],
            "raw_generation_responses": ["raw"],
            "new_generations": ["new"],
            "prompt": "a rendering of it all",
            "chosen": chosen,
            "rejected": [*chosen[:-1], turn("assistant", "worse")],
            "rating_chosen": 5,
            "rating_rejected": 4,
            "chosen_model": "x",
            "rejected_model": "y",
        }

    two = [turn("user", "one"), turn("assistant", "1"), turn("user", "two"), turn("assistant", "2")]
    rows = [row("Dove", two), row("Airoboros", [turn("user", "alone"), turn("assistant", "!")])]
    block = shipped("fellowship.yaml")["prompts"]
    (source,) = block["sources"]
    assert source["name"] == "argilla/distilabel-capybara-dpo-7k-binarized"
    found = load_prompts(
        PromptsConfig.model_validate({**block, "sources": [{**source, "name": hub("capybara", rows)}]})
    )
    asked = {r["task_type"]: [(m["role"], m["content"]) for m in r["messages"]] for r in found.table.to_pylist()}
    assert asked == {
        "Dove": [("user", "one"), ("assistant", "1"), ("user", "two")],
        "Airoboros": [("user", "alone")],
    }


def test_no_robots_prompts_keep_their_system_message_and_lose_the_last_answer(hub: Any) -> None:
    def row(category: str, *messages: dict[str, str]) -> dict[str, Any]:
        asked = next(m["content"] for m in messages if m["role"] == "user")
        return {"prompt": asked, "prompt_id": "0" * 64, "messages": list(messages), "category": category}

    rows = [
        row("Chat", turn("system", "be curt"), turn("user", "hi"), turn("assistant", "yo"), turn("user", "well?"),
            turn("assistant", "no")),
        row("Coding", turn("user", "sort a list"), turn("assistant", "sorted(x)")),
    ]  # fmt: skip
    block = shipped("fellowship.yaml")["improve"]["prompts"]
    (source,) = block["sources"]
    assert source["name"] == "HuggingFaceH4/no_robots"
    found = load_prompts(PromptsConfig.model_validate({**block, "sources": [{**source, "name": hub("robots", rows)}]}))
    asked = {r["task_type"]: [m["content"] for m in r["messages"]] for r in found.table.to_pylist()}
    assert asked == {"Chat": ["be curt", "hi", "yo", "well?"], "Coding": ["sort a list"]}
