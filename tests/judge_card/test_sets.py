"""Public sets for judges in the form in which they are published."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_pipeline.data.sources import InputError
from ray_pipeline.judge_card.sets import PublicSet, read_set

SETS = Path(__file__).parents[1] / "data" / "public_sets"


def read(kind: str, name: str | Path, **more: Any) -> list[dict[str, Any]]:
    items = read_set(PublicSet(type=kind, path=str(SETS / name), **more))
    return sorted(items, key=lambda item: item["question"])


def test_judgebench() -> None:
    ages, product = read("judgebench", "judgebench.jsonl")
    assert (ages["answers"], ages["votes"], ages["subset"]) == (
        ["Anna is younger.", "Ben is younger."],
        ["B"],
        "livebench-reasoning",
    )
    assert (product["votes"], product["source"], product["subset"]) == (["A"], "judgebench", "mmlu-pro")


def test_llmbar_has_a_subset_for_each_folder() -> None:
    colour, sentence = read("llmbar", "llmbar")
    assert (colour["subset"], colour["votes"]) == ("Natural", ["A"])
    assert (sentence["subset"], sentence["votes"]) == ("Neighbor", ["B"])
    assert read("llmbar", "llmbar/Natural/dataset.json")[0]["item_id"] == colour["item_id"]


def test_rewardbench_shuffles_answers_and_leaves_ties_out(tmp_path: Path) -> None:
    legs, minus = read("reward_bench_2", "reward_bench_2.jsonl")
    for item, right in ((legs, "Four."), (minus, "7")):
        assert len(item["answers"]) == 4 and item["answers"]["ABCD".index(item["votes"][0])] == right
    rows = [json.loads(line) for line in (SETS / "reward_bench_2.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    assert read("reward_bench_2", tmp_path / "test.parquet") == [legs, minus]  # the Hub's form, the same order
    many = [{**rows[0], "id": str(n), "prompt": f"{n}?"} for n in range(200)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, many)))
    places = Counter(item["votes"][0] for item in read("reward_bench_2", tmp_path / "many.jsonl"))
    assert set(places) == set("ABCD") and min(places.values()) > 25


def test_sets_with_votes_of_people(tmp_path: Path) -> None:
    voted = read("mt_bench", "mt_bench_human_judgments.jsonl")
    assert voted and all(set(item["votes"]) <= {"A", "B", "tie"} and item["votes"] for item in voted)
    labelled = read("pandalm", "pandalm_testset.json")
    assert labelled and all(len(item["votes"]) == 1 for item in labelled)


def test_a_limit_keeps_the_same_items_in_any_order_of_the_file(tmp_path: Path) -> None:
    rows = (SETS / "judgebench.jsonl").read_text().splitlines()
    with gzip.open(tmp_path / "turned.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[::-1]))
    assert read("judgebench", tmp_path / "turned.jsonl.gz", limit=1) == read("judgebench", "judgebench.jsonl", limit=1)


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        (
            "judgebench",
            {"question": "q", "response_A": "a", "response_B": "b", "label": "A=B"},
            "row 1: label must be A>B",
        ),
        (
            "judgebench",
            {"question": "q", "response_A": "a", "label": "A>B"},
            "row 1: response_B must be text, not None",
        ),
        ("llmbar", {"input": "q", "output_1": "a", "output_2": "b", "label": 3}, "row 1: label must be 1 or 2, not 3"),
        (
            "reward_bench_2",
            {"id": "1", "prompt": "q", "subset": "Math", "chosen": ["a", "b"], "rejected": ["c"]},
            "row 1: chosen must hold one answer",
        ),
        (
            "reward_bench_2",
            {"id": "1", "prompt": "q", "subset": "Math", "chosen": "a", "rejected": ["c"]},
            "row 1: chosen must be a list of texts",
        ),
    ],
)
def test_a_row_of_another_form_is_named(kind: str, row: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=rf"bad\.jsonl: {told}"):
        read(kind, tmp_path / "bad.jsonl")


def test_a_set_that_is_not_on_the_hub_names_where_it_is() -> None:
    for kind, place in (("llmbar", "princeton-nlp/LLMBar"), ("fair_eval", "i-Eval/FairEval")):
        with pytest.raises(InputError, match=f"set {kind}: it is not on the Hub in a readable form. Fetch .*{place}"):
            PublicSet(type=kind).digest()
