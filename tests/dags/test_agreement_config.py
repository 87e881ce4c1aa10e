"""Configurations of agreement and win rates: the shipped files, and mistakes told by their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dags.agreement import AgreementConfig, agreement
from dags.winrate import winrate
from ray_pipeline.agreement.stages import AgreementData, read_data
from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.workflow.registry import find_workflow

ITEM = {"item_id": "x/1", "question": "Q?", "response_a": "one", "response_b": "two", "human_label": "A"}
LIVE = {
    "judges": [{"name": "one", "model": "m"}],
    "strategies": [{"kind": "direct", "orders": "both"}],
    "debaters": [{"name": "one", "model": "m"}],
}


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ITEM) + "\n")
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def load(name: str, *overrides: str, dag: str = "") -> Any:
    return load_config(find_workflow(dag or Path(name).stem).config, name, overrides)


def test_shipped_files_replay_the_file_that_is_named(data: str) -> None:
    for dag, make in (("agreement", agreement), ("winrate", winrate)):
        found = load(f"configs/{dag}.yaml", f"data.path={data}")
        assert found.run.name == dag and found.data.replay == "text" and found.num_shards == 8
        stages = make(found, "/tmp/run").stages
        assert [s.name for s in stages] == ["items", dag]
        reseeded = make(load(f"configs/{dag}.yaml", f"data.path={data}", "measure.seed=1"), "/tmp/run").stages
        assert reseeded[0].fingerprint == stages[0].fingerprint and reseeded[1].fingerprint != stages[1].fingerprint
        stored = make(load(f"configs/{dag}.yaml", f"data.path={data}", "data.replay=stored"), "/tmp/run").stages
        assert stored[0].fingerprint != stages[0].fingerprint
        with pytest.raises(ConfigError, match=r"data\.path is missing"):
            load(f"configs/{dag}.yaml")
    assert load("configs/agreement.yaml", f"data.path={data}").measure.juries.pool == "mode"


def test_the_pocket_file_asks_two_models_and_lets_one_debate() -> None:
    found = load("configs/pocket_agreement.yaml", dag="agreement")
    found.check()
    stages = {s.name: s for s in agreement(found, "/tmp/run").stages}
    assert list(stages) == ["items", "ask-judge", "debate-judge", "ask-reviewer", "agreement"]
    other = load("configs/pocket_agreement.yaml", "data.limit=101", dag="agreement")
    assert agreement(other, "/tmp/run").stages[0].fingerprint != stages["items"].fingerprint
    for wrong in ("data.limit=null", "data.path=x.jsonl"):
        with pytest.raises(ConfigError, match=r"set their number with data\.limit and remove path"):
            load("configs/pocket_agreement.yaml", wrong, dag="agreement")


def test_live_win_rates_ask_each_model_once_and_tell_mistakes_by_their_key() -> None:
    found = load("configs/pocket_winrate.yaml", dag="winrate")
    found.check()
    stages = [s.name for s in winrate(found, "/tmp/run").stages]
    assert stages[:3] == ["prompts", "policy-generate-1", "generator-generate-1"] and stages[-2:] == [
        "versus",
        "winrate",
    ]
    more = load("configs/pocket_winrate.yaml", "live.baselines=[generator]", "measure.seed=1", dag="winrate")
    before, after = (
        {s.name: s.fingerprint for s in winrate(c, "/tmp/run").stages if s.name not in ("versus", "winrate")}
        for c in (found, more)
    )
    assert before == after
    for wrong, told in (
        ("live.judge.model=nobody", "live.judge.model is 'nobody', which is not defined under models"),
        ("models.idle={model: 'pocket:judge'}", r"models\.idle is not used by any stage"),
        ("measure.conflict=mean", "needs scores"),
        ("data={type: pocket, limit: 3}", "set either `data`"),
        ("live.loop.respnses=2", r"live\.loop\.respnses.*responses"),
    ):
        with pytest.raises(ConfigError, match=told):
            load("configs/pocket_winrate.yaml", wrong, dag="winrate")


def test_pocket_pairs_are_labelled_by_the_truth() -> None:
    from ray_pipeline.pocket.tasks import is_correct

    items = read_data(AgreementData(type="pocket", limit=40)).items
    assert len({item["prompt_id"] for item in items}) == 40
    for item in items:
        right = "A" if is_correct(item["question"], item["response_a"]) else "B"
        assert item["human_label"] == right
        assert is_correct(item["question"], item["response_a"]) != is_correct(item["question"], item["response_b"])
    assert {item["human_label"] for item in items} == {"A", "B"}


def test_moved_data_is_the_same_data(data: str, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "data.jsonl"
    moved.parent.mkdir()
    moved.write_text(Path(data).read_text())
    one, other = (agreement(load("agreement", f"data.path={p}", dag="agreement"), "") for p in (data, str(moved)))
    assert [s.fingerprint for s in one.stages] == [s.fingerprint for s in other.stages]


def written(tmp_path: Path, data: str, **blocks: Any) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"data": {"path": data}, **blocks}))
    return str(path)


def test_the_live_block_of_the_shipped_file_is_a_whole_one(data: str, model: str, tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[2] / "configs" / "agreement.yaml").read_text()
    live = "\n".join(line[2:] for line in shipped[shipped.index("# ask:") :].splitlines())
    blocks = yaml.safe_load(live)
    blocks["models"]["judge"]["model"] = model
    found = load(written(tmp_path, data, **blocks), dag="agreement")
    assert isinstance(found, AgreementConfig)
    assert [s.name for s in found.ask.strategies] == [
        "direct", "independent_10", "combined_5", "combined_10", "combined_100",
    ]  # fmt: skip
    dag = agreement(found, "/tmp/run")
    assert [s.name for s in dag.stages] == ["items", "ask-judge", "debate-judge", "agreement"]
    assert dag.groups == ["items", "ask", "debate", "agreement"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"measures": {}}, r"measures: unknown key; did you mean 'measure'\?"),
        ({"measure": {"conflit": "tie"}}, r"measure\.conflit: unknown key; did you mean 'conflict'"),
        ({"ask": LIVE}, r"ask\.judges\.one\.model is 'm', which is not defined under models"),
        ({"models": {"m": {"model": "MODEL"}}}, r"models\.m is not used by any stage"),
        ({"ask": {**LIVE, "strategy_templates": "nope"}, "models": {"m": {"model": "MODEL"}}}, "no built-in prompt"),
        ({"ask": {**LIVE, "strategies": [{"kind": "combined"}], "strategy_templates": "pocket"},
          "models": {"m": {"model": "MODEL"}}}, "strategy combined_10: the template file has no block combined"),
        ({"ask": {**LIVE, "debate": {"rounds": 1, "schedule": [["judge"]]}}, "models": {"m": {"model": "MODEL"}}},
         r"debate\.schedule: unknown role judge"),
        ({"ask": {**LIVE, "sampling": {"extra": {"top_q": 1}}}, "models": {"m": {"model": "MODEL"}}},
         r"ask\.sampling\.extra"),
        ({"ask": LIVE, "models": {"m": {"model": "/no/such/model"}}}, r"models\.m: .*no/such/model"),
        ({"measure": {"juries": {"pool": "weighted"}}}, r"measure\.juries: .*needs juries\.weights"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_key(
    blocks: dict[str, Any], message: str, data: str, model: str, tmp_path: Path
) -> None:
    whole = json.loads(json.dumps(blocks).replace("MODEL", model))
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, data, **whole), dag="agreement")
