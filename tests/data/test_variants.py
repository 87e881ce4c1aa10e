"""Faults planted in the gate: what each makes of decisions that are known; and datasets cut to one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.datasets import dataset_files, of_size
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.imported import preferences
from ray_pipeline.data.variants import DataVariant, Fault, decide_with_fault
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.driver import RunSettings, execute
from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.pocket import model_path
from ray_pipeline.store.schemas import DECISIONS
from tests.data.test_imported import source, ultrafeedback, write
from tests.planted import JUDGES, Planted, World, count_words, make_world

#: Text, scores, flawed: one response of each kind that the critic and the scores can make.
RESPONSES: list[Planted] = [
    ("sound", (8, 8, 8), False),
    ("good but flawed", (8, 8, 8), True),
    ("poor", (4, 4, 4), False),
    ("poor and flawed", (4, 5, 4), True),
    ("disputed", (10, 10, 1), True),
    ("uncriticised", (9, 9, 9), None),
    ("unread", (None, 9, 9), False),
]


def decided(fault: Fault | None, world: World, gate: GateConfig | None = None) -> pa.Table:
    arguments = (world.candidates, world.verdicts, world.critiques, JUDGES, gate or GateConfig())
    table = decide_with_fault(fault, *arguments)
    assert table.schema.equals(DECISIONS)
    assert table["candidate_id"].equals(world.candidates["candidate_id"])
    return table


@pytest.mark.parametrize(
    ("fault", "labels"),
    [
        (None, ["desirable", "discard", "undesirable", "undesirable", "abstain", "incomplete", "incomplete"]),
        ("critic_inverted", ["discard", "desirable", "undesirable", "discard", "abstain", "incomplete", "incomplete"]),
        ("critic_sign", ["desirable", "desirable", "undesirable", "discard", "abstain", "incomplete", "incomplete"]),
        ("labels_flipped", ["undesirable", "discard", "desirable", "desirable", "abstain", "incomplete", "incomplete"]),
    ],
)
def test_what_a_fault_makes_of_each_response(fault: Fault | None, labels: list[str]) -> None:
    world = make_world({"q": RESPONSES})
    assert decided(fault, world)["label"].to_pylist() == labels
    assert decided(fault, world).equals(decided(fault, world))
    if fault is None:
        arguments = (world.candidates, world.verdicts, world.critiques, JUDGES, GateConfig())
        assert decided(fault, world).equals(decide(*arguments))


def test_the_sign_of_the_penalty_alone_is_flipped() -> None:
    world = make_world({"q": RESPONSES[:2]})
    sound, flawed = decided("critic_sign", world, GateConfig(alpha=0.3)).to_pylist()
    assert (sound["penalty"], sound["final_score"]) == (0.0, 8.0)
    assert flawed["penalty"] == -0.3 and flawed["final_score"] == pytest.approx(8 * 1.3)


SCORES = st.lists(st.integers(1, 10), min_size=3, max_size=3)


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_flipped_labels_exchange_the_sides_of_every_row(responses: list[tuple[list[int], bool]]) -> None:
    world = make_world({"q": [(f"answer {i}", scores, flawed) for i, (scores, flawed) in enumerate(responses)]})

    def rows(fault: Fault | None) -> tuple[list[Any], list[Any]]:
        config = DatasetsConfig(max_length=60, max_prompt_length=20)
        arguments = (world.prompts, world.candidates, world.verdicts, decided(fault, world), config, count_words)
        return kto_rows(*arguments)[0].to_pylist(), dpo_rows(*arguments)[0].to_pylist()

    (kto, dpo), (flipped_kto, flipped_dpo) = rows(None), rows("labels_flipped")
    assert {row["candidate_id"]: not row["label"] for row in kto} == {
        r["candidate_id"]: r["label"] for r in flipped_kto
    }
    sides = [(pair["chosen_id"], pair["rejected_id"], pair["score_gap"]) for pair in dpo]
    assert sides == [(pair["rejected_id"], pair["chosen_id"], pair["score_gap"]) for pair in flipped_dpo]


def test_a_fault_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="fault critic_sign breaks the gate, so it has no effect when gated is false"):
        DataVariant(gated=False, fault="critic_sign")
    with pytest.raises(ValueError, match="fault_share is read by fault labels_flipped alone"):
        DataVariant(fault="critic_sign", fault_share=0.5)
    with pytest.raises(ValueError, match="rejected: random has no effect with a gate"):
        DataVariant(rejected="random")
    with pytest.raises(ValueError, match="keep: margin has no effect without max_prompts"):
        DataVariant(keep="margin")
    variant = DataVariant(fault="critic_sign")
    for gate in (GateConfig(use_critic=False), GateConfig(alpha=0)):
        with pytest.raises(ValueError, match="fault critic_sign has no effect where the gate uses no critic"):
            variant.check_fault(gate)
    variant.check_fault(GateConfig())
    DataVariant(fault="labels_flipped").check_fault(GateConfig(use_critic=False))


def test_a_dataset_is_cut_to_the_size_of_the_smallest_other(tmp_path: Path) -> None:
    """The stages of a run, on imported pairs of three sizes."""
    config, policy = DatasetsConfig(), ModelSettings(model=model_path("policy"))

    def files(name: str, size: int) -> Stage:
        rows = [ultrafeedback(i) for i in range(size)]
        pairs = source(write(tmp_path / f"{name}.jsonl", rows), chosen_score="score_chosen")
        table = preferences(pairs, config, policy, seed=0, val_fraction=0.0, name=f"rows-{name}")
        return dataset_files(config, None, [], table, policy, name=f"datasets-{name}", view="")

    one, two, three = files("one", 30), files("two", 12), files("three", 20)
    stages = [of_size(one, [one, two, three], "datasets-cut"), of_size(two, [one, three], "datasets-whole"), three]
    session = Session(str(tmp_path / "run"), str(tmp_path / "calls"), 1)
    outcome = execute(Dag("d", stages), RunSettings(session, {}), InProcessExecutor(), console=Console(quiet=True))
    assert not outcome.failures, outcome.failures
    sizes = {name: result.facts["rows"] for name, result in outcome.results.items() if name.startswith("datasets-")}
    assert {name: rows["dpo"]["train"] for name, rows in sizes.items()} == {
        "datasets-one": 30, "datasets-two": 12, "datasets-three": 20, "datasets-cut": 12, "datasets-whole": 12,
    }  # fmt: skip
    cut = sizes["datasets-cut"]["kto"]
    assert (cut["train_desirable"], cut["train_undesirable"], cut["train"]) == (12, 12, 24)
