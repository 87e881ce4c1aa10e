"""The comparison of methods: what its configuration says, and the stages that follow from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dags.baselines import BaselinesConfig, baselines
from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.engines import models
from ray_pipeline.graph.stage import Stage
from ray_pipeline.workflow import training


@pytest.fixture(autouse=True)
def _no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes many seconds to import, and its names are tested beside its trainers."""
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """`load(**baselines)`: the smallest configuration with this `baselines` block; other blocks by `blocks`."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    for name in ("policy", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "tokenizer.json").write_text("{}")

    def go(blocks: dict[str, Any] | None = None, **block: Any) -> BaselinesConfig:
        block = {"data": {"raw": {"gated": False, "judges": ["a"]}, "gated": {}}, "seeds": [0, 1], **block}
        values = {
            "models": {name: {"model": str(tmp_path / name)} for name in ("policy", "judge")},
            "prompts": {"sources": [{"type": "jsonl", "path": str(tmp_path / "prompts.jsonl"), "column": "prompt"}]},
            "judge": {"rubrics": [{"name": "a", "text": "?"}, {"name": "b", "text": "?"}], "layout": "shared_first"},
            "baselines": json.loads(json.dumps(block).replace("PAIRS", str(tmp_path / "pairs.jsonl"))),
            **(blocks or {}),
        }
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(values))
        found = load_config(BaselinesConfig, str(path))
        assert isinstance(found, BaselinesConfig)
        return found

    return go


def stages(config: BaselinesConfig) -> dict[str, Stage]:
    return {stage.name: stage for stage in baselines(config, "/run").stages}


def reads(stage: Stage) -> set[str]:
    return {parent.name for parent in stage.inputs.values()}


def test_every_method_on_every_data_set_with_every_seed(load: Any) -> None:
    config = load()
    made = stages(config)
    trained = {name for name in made if name.startswith("train-")}
    assert trained == {
        f"train-{m}-{d}-s{s}"
        for m in ("sft", "dpo", "kto", "orpo", "simpo")
        for d in ("raw", "gated")
        for s in (0, 1)
    }  # fmt: skip
    assert reads(made["train-dpo-raw-s1"]) == {"datasets-raw-s1"}
    assert reads(made["datasets-raw-s0"]) == reads(made["datasets-raw-s1"]) == {"rows-raw"}
    assert reads(made["rows-raw"]) == {"prompts", "candidates", "judge", "ranks-raw"}
    assert reads(made["gate-gated"]) == {"candidates", "judge", "critic"}
    assert reads(made["ranks-raw"]) == {"candidates", "judge"}
    assert len(reads(made["comparisons"])) == 1 + 1 + 20
    assert reads(made["score-responses"]) == reads(made["comparisons"])
    assert trained < reads(made["evaluate"])
    # All policies are judged by one stage: an engine starts once for all of them.
    assert [name for name in made if name.startswith("score-")] == ["score-responses"]


def test_settings_of_a_method_come_over_the_shared_ones(load: Any) -> None:
    config = load(
        blocks={"train": {"learning_rate": 1e-4, "epochs": 3}},
        methods={"dpo": {"learning_rate": 2e-5, "beta": 0.3}, "simpo": {}, "sft": {}},
    )
    dpo, simpo, sft = (config.training(name, 7) for name in ("dpo", "simpo", "sft"))
    assert (dpo.method, dpo.learning_rate, dpo.beta, dpo.epochs, dpo.seed) == ("dpo", 2e-5, 0.3, 3, 7)
    assert (simpo.learning_rate, simpo.beta) == (1e-4, 2.0)
    assert sft.beta is None
    assert config.rows_of(config.baselines.data["gated"], 4).model_dump(include={"kinds", "seed", "min_gap"}) == {
        "kinds": ["dpo", "sft"], "seed": 4, "min_gap": 1.5,
    }  # fmt: skip
    assert config.rows_of(config.baselines.data["raw"]).min_gap == 0


def test_ablations_change_one_rule_each(load: Any) -> None:
    data = {
        "no_gate": {"gated": False},
        "no_variance": {"gate": {"use_variance": False}},
        "no_critic": {"gate": {"use_critic": False}},
        "k2": {"k": 2},
        "one": {"judges": ["b"]},
        "sign": {"fault": "critic_sign"},
        "flipped": {"fault": "labels_flipped"},
        "whole": {},
    }
    config = load(data=data, methods=["kto"], seeds=[0])
    made = stages(config)
    assert reads(made["gate-no_critic"]) == {"candidates", "judge"}
    assert made["gate-no_variance"].config["gate"]["use_variance"] is False
    assert made["gate-k2"].config["first"] == 2 and made["gate-one"].config["judges"] == ["b"]
    assert made["ranks-no_gate"].config["judges"] == ["a", "b"]
    assert (made["gate-sign"].config["fault"], made["gate-flipped"].config["fault"]) == (
        "critic_sign",
        "labels_flipped",
    )
    assert "fault" not in made["gate-whole"].config
    assert config.page().data["sign"].endswith("tau 2.5, alpha 0.15, planted fault: critic sign")
    # Candidates, verdicts and critiques are made once for all.
    assert sum(stage.group_name in ("candidates", "judge", "critic") for stage in made.values()) == 3


def test_weights_and_choices_of_prompts_reach_their_stages(load: Any) -> None:
    data = {
        "half": {"fault": "labels_flipped", "fault_share": 0.5},
        "sure": {"gated": False, "rejected": "random", "max_prompts": 9, "keep": "confidence"},
        "any": {"gated": False, "max_prompts": 9},
    }
    config = load(
        data=data, methods=["dpo_weighted", "kto_weighted"], seeds=[0], blocks={"datasets": {"weights": True}}
    )
    made = stages(config)
    assert (made["gate-half"].config["fault"], made["gate-half"].config["fault_share"]) == ("labels_flipped", 0.5)
    assert made["ranks-sure"].config["rejected"] == "random" and "rejected" not in made["ranks-any"].config
    assert made["datasets-sure-s0"].config["keep"] == "confidence" and "keep" not in made["datasets-any-s0"].config
    for name in ("half", "sure", "any"):
        assert made[f"rows-{name}"].work.tables == ("dpo", "kto", "confidence")
        assert made[f"rows-{name}"].config["scale"] == [1, 10]
    shown = config.page().data
    assert shown["half"].endswith("planted fault: labels flipped in 50 % of the prompts")
    assert shown["sure"] == "best and a random other of 4 by a, b; no gate; the 9 prompts of the largest confidence"


def test_rows_of_others_alone_need_no_candidates(load: Any) -> None:
    data = {"others": {"source": {"type": "jsonl", "path": "PAIRS"}}}
    config = load(data=data, methods=["dpo", "kto"], seeds=[0])
    made = stages(config)
    assert "candidates" not in made and "judge" not in made
    assert reads(made["datasets-others-s0"]) == {"rows-others"} and not reads(made["rows-others"])
    assert config.page().curating == {}
    assert "paired rows of" in config.page().data["others"]


def test_the_shipped_comparisons_wire(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(models, "model_path", lambda name: str(tmp_path / "m"))
    counts = {"pocket_baselines": 30, "pocket_ablations": 300, "pocket_posterior": 40, "pocket_noise": 240}
    for name, policies in counts.items():
        config = load_config(BaselinesConfig, name)
        assert isinstance(config, BaselinesConfig)
        assert len(config.policies()) == policies == sum(n.startswith("train-") for n in stages(config))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"methods": ["kto", "ppo"]}, r"baselines\.methods\.ppo"),
        ({"methods": {"kto": {"learning_rat": 1}}}, r"baselines\.methods\.kto: learning_rat: unknown key"),
        ({"methods": {"kto": {"batch_size": 1}}}, r"baselines\.methods\.kto: .*must be 2 or more for kto"),
        ({"data": {"x": {"judges": ["c"]}}}, r"baselines\.data\.x\.judges: unknown rubric 'c'"),
        ({"data": {"x": {"k": 9}}}, r"baselines\.data\.x\.k is 9, but there are only 4 candidates"),
        ({"data": {"x": {"gate": {"tauu": 1}}}}, r"baselines\.data\.x: tauu: unknown key"),
        ({"data": {"x": {"gated": False, "gate": {"tau": 1}}}}, r"gate has no effect when gated is false"),
        ({"data": {"x": {"gate": {"pool": "one_coin"}}}}, r"data\.x: gate\.pool needs 3 judges or more.*there are 2"),
        (
            {"data": {"x": {"gate": {"use_critic": False}, "fault": "critic_sign"}}},
            r"data\.x: fault critic_sign has no",
        ),
        (
            {"data": {"x": {"k": 2, "source": {"type": "jsonl", "path": "PAIRS"}}}},
            r"k has no effect on rows",
        ),
        (
            {"data": {"x": {"source": {"type": "jsonl", "path": "PAIRS", "format": "unpaired"}}}, "methods": ["dpo"]},
            r"baselines\.data\.x: unpaired rows cannot provide dpo data",
        ),
        ({"data": {}}, r"baselines\.data"),
        (
            {"methods": ["kto_weighted"]},
            r"baselines\.methods\.kto_weighted reads weights .*set datasets\.weights to true",
        ),
        ({"methods": {"dpo": {"desirable_weight": 1.1}}}, r"baselines\.methods\.dpo: .*are of kto; dpo has no such"),
        (
            {"data": {"x": {"max_prompts": 9, "keep": "confidence"}}, "methods": ["dpo"]},
            r"baselines\.data\.x\.keep: confidence needs datasets\.weights",
        ),
        (
            {"data": {"x": {"max_prompts": 9, "keep": "margin"}}},
            r"baselines\.data\.x\.keep: margin orders kto and dpo rows; remove sft",
        ),
        (
            {
                "data": {"x": {"source": {"type": "jsonl", "path": "PAIRS"}}},
                "methods": ["dpo"],
                "blocks": {"datasets": {"weights": True}},
            },
            r"baselines\.data\.x: datasets\.weights come from judges' scores, which imported rows do not have",
        ),
        ({"readings": ["rows", "rows"]}, r"duplicate reading in baselines\.readings"),
        (
            {"readings": ["epochs", "steps"], "methods": {"sft": {"trainer_args": {"packing": True}}}},
            r"equal steps are counted in rows, but those of sft are packed",
        ),
        ({"reference": "raw2"}, r"baselines\.reference: no dataset 'raw2'.*raw"),
        ({"data": {"x": {"size_of": "x"}, "y": {}}}, r"x\.size_of is 'x'; name another dataset without size_of.*y"),
        ({"data": {"x": {"size_of": "y"}, "y": {"size_of": "z"}, "z": {}}}, r"x\.size_of is 'y'; name another"),
        ({"seeds": [1, 1]}, r"duplicate seed in baselines\.seeds"),
        ({"blocks": {"train": {"method": "dpo"}}}, r"train\.method has no effect in a comparison"),
        ({"blocks": {"train": {"seed": 3}}}, r"train\.seed has no effect in a comparison"),
        ({"blocks": {"datasets": {"kinds": ["kto"]}}}, r"datasets\.kinds has no effect in a comparison"),
        ({"blocks": {"evaluate": {"skip_generation": True}}}, r"evaluate\.skip_generation has no effect"),
    ],
)
def test_a_mistake_is_told_by_its_key(load: Any, block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**block)


def test_readings_give_policies_of_equal_rows_and_of_equal_steps(load: Any) -> None:
    data = {"raw": {"gated": False}, "gated": {}, "random": {"gated": False, "size_of": "gated"}}
    config = load(data=data, methods=["kto"], seeds=[0, 1], readings=["epochs", "steps", "rows"], reference="gated")
    made = stages(config)
    assert [policy.label for policy in config.policies() if policy.data == "raw"] == [
        "kto-raw-s0", "kto-raw-s1", "kto-raw-steps-s0", "kto-raw-steps-s1", "kto-raw-rows-s0", "kto-raw-rows-s1",
    ]  # fmt: skip
    assert reads(made["train-kto-raw-steps-s1"]) == {"datasets-raw-s1", "datasets-gated-s1"}
    assert reads(made["train-kto-random-s0"]) == {"datasets-random-cut-s0"}
    assert reads(made["datasets-random-cut-s0"]) == {"rows-random", "datasets-gated-s0"}
    own = {"datasets-raw-s1", "datasets-gated-s1", "datasets-random-cut-s1"}
    assert reads(made["datasets-random-rows-s1"]) == {"rows-random", *own}
    assert reads(made["train-kto-gated-rows-s1"]) == {"datasets-gated-rows-s1"}
    assert config.page().over == "gated" and config.page().facts["readings"] == "epochs, steps, rows"
    assert config.page().data["random"] == "best and worst of 4 by a, b; no gate; cut at random to the size of gated"
    # What is there without readings stays as it is.
    plain = stages(load(data=data, methods=["kto"], seeds=[0, 1]))
    assert all(made[name].fingerprint == stage.fingerprint for name, stage in plain.items() if name[:5] == "train")
