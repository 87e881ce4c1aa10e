"""Weights of rows and the order of prompts, against formulas and properties."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.data.confidence import panel_confidence, row_weights
from ray_pipeline.data.dataset_files import Keep, of_prompts
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.ungated import best_and_worst
from ray_pipeline.data.variants import labels_flipped
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.store.schemas import CONFIDENCE, TABLES, row_schema
from tests.planted import JUDGES, World, count_words, make_world, random_world, write_run

SCORE = st.one_of(st.none(), st.integers(1, 10))
PANEL = st.tuples(SCORE, SCORE, SCORE)
CONFIG = DatasetsConfig(max_length=60, max_prompt_length=20, min_gap=0)


def desirable(world: World) -> dict[str, float]:
    table = panel_confidence(world.candidates, world.verdicts, JUDGES, (1, 10))
    assert table.schema.equals(CONFIDENCE)
    return dict(zip(table["candidate_id"].to_pylist(), table["desirable"].to_pylist(), strict=True))


@given(st.lists(PANEL, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_judges_are_joined_by_bayes_rule(panels: list[tuple[int | None, ...]]) -> None:
    world = make_world({"q": [(f"answer {i}", panel, None) for i, panel in enumerate(panels)]})
    for found, panel in zip(
        desirable(world.shuffled(1)).items(), world.shuffled(1).candidates.to_pylist(), strict=True
    ):
        assert found[0] == panel["candidate_id"]
    for p, panel in zip(desirable(world).values(), panels, strict=True):
        own = [min(max((score - 1) / 9, 0.05), 0.95) for score in panel if score is not None]
        right, wrong = math.prod(own), math.prod(1 - one for one in own)
        assert p == pytest.approx(right / (right + wrong)) and 0 < p < 1


def rows_of(world: World, share: float | None = None) -> dict[str, pa.Table]:
    decisions = best_and_worst(world.candidates, world.verdicts, JUDGES)
    decisions = decisions if share is None else labels_flipped(decisions, share)
    arguments = (world.prompts, world.candidates, world.verdicts, decisions, CONFIG, count_words)
    return {"kto": kto_rows(*arguments)[0], "dpo": dpo_rows(*arguments)[0]}


def weights_of(rows: pa.Table, world: World) -> list[float]:
    return row_weights(rows, desirable(world)).tolist()


@given(st.integers(0, 1000), st.sampled_from(["kto", "dpo"]))
@settings(max_examples=20, deadline=None)
def test_the_weight_of_a_flipped_row_is_what_is_left_of_one(seed: int, kind: str) -> None:
    world = random_world(12, seed=seed)
    whole, flipped = rows_of(world)[kind], rows_of(world, 1.0)[kind]
    by_id = {frozenset(_ids(row)): w for row, w in zip(whole.to_pylist(), weights_of(whole, world), strict=True)}
    for row, weight in zip(flipped.to_pylist(), weights_of(flipped, world), strict=True):
        assert weight == pytest.approx(1 - by_id[frozenset(_ids(row))])


def test_a_pair_is_as_sure_as_its_two_sides() -> None:
    rows = pa.table({"chosen_id": ["a", "b", "a"], "rejected_id": ["b", "a", "a"]})
    assert row_weights(rows, {"a": 0.8, "b": 0.3}).tolist() == pytest.approx([56 / 62, 6 / 62, 0.5])


def _ids(row: dict[str, Any]) -> list[str]:
    return [row["candidate_id"]] if "candidate_id" in row else [row["chosen_id"], row["rejected_id"]]


def written(folder: Path, kind: str, split: str = "train") -> pa.Table:
    return pa.concat_tables([pq.read_table(f) for f in sorted((folder / "datasets" / kind / split).iterdir())])


def test_weighted_files_have_one_more_column_and_others_do_not(tmp_path: Path) -> None:
    world, limits = random_world(60, seed=3), {"max_length": 60, "max_prompt_length": 20}
    write_run(tmp_path / "plain", world, config=DatasetsConfig(**limits))
    write_run(tmp_path / "weighted", world, config=DatasetsConfig(**limits, weights=True))
    for kind in ("kto", "dpo"):
        for split in ("train", "val"):
            plain, weighted = (written(tmp_path / name, kind, split) for name in ("plain", "weighted"))
            assert plain.schema.remove_metadata().equals(TABLES[kind])
            assert weighted.schema.remove_metadata().equals(row_schema(kind, weighted=True))
            assert weighted.drop_columns("weight").equals(plain)
            assert weighted["weight"].to_pylist() == pytest.approx(weights_of(plain, world))
    cards = [(tmp_path / name / "datasets" / "README.md").read_text() for name in ("plain", "weighted")]
    assert ["| weight |" in card for card in cards] == [False, True]


@pytest.mark.parametrize("keep", ["margin", "confidence"])
@pytest.mark.parametrize("kind", ["kto", "dpo"])
@given(seed=st.integers(0, 1000), most=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_prompts_that_are_kept_are_worth_no_less_than_others(keep: Keep, kind: str, seed: int, most: int) -> None:
    world = random_world(12, seed=seed)
    rows = rows_of(world)[kind]
    rows = rows.append_column("weight", pa.array(weights_of(rows, world), pa.float64()))
    train = [row for row in rows.to_pylist() if row["split"] == "train"]

    def worth(prompt: str) -> float:
        own = [row for row in train if row["prompt_id"] == prompt]
        if keep == "confidence":
            return float(min(row["weight"] for row in own))
        if kind == "dpo":
            return float(max(row["score_gap"] for row in own))
        return float(max(row["final_score"] for row in own) - min(row["final_score"] for row in own))

    found = of_prompts(rows, most, keep)
    kept = {row["prompt_id"] for row in found.to_pylist() if row["split"] == "train"}
    left_out = {row["prompt_id"] for row in train} - kept
    assert len(kept) == min(most, len(kept | left_out))
    assert not left_out or min(map(worth, kept)) >= max(map(worth, left_out))
    assert [r for r in found.to_pylist() if r["split"] == "val"] == [r for r in rows.to_pylist() if r["split"] == "val"]
    assert kept <= {row["prompt_id"] for row in of_prompts(rows, most + 1, keep).to_pylist()}


@given(st.integers(0, 1000), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_a_share_of_the_prompts_is_flipped_by_hash(seed: int, one: float, other: float) -> None:
    world = random_world(12, seed=seed)
    decisions = best_and_worst(world.candidates, world.verdicts, JUDGES)
    low, high = (labels_flipped(decisions, share).to_pylist() for share in sorted((one, other)))
    whole = labels_flipped(decisions).to_pylist()
    for row, less, more, every in zip(decisions.to_pylist(), low, high, whole, strict=True):
        assert less == (every if unit_hash("flipped", row["prompt_id"]) < min(one, other) else row)
        assert less == row or less == more  # a larger share contains a smaller one
    assert rows_of(world, max(one, other))["dpo"].num_rows == rows_of(world)["dpo"].num_rows
