"""Pairs as KTO and SFT rows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ray_pipeline.data.convert import pairs_to_kto, pairs_to_sft
from ray_pipeline.store.schemas import DPO, KTO, SFT, to_table


def pairs(*ids: tuple[str, str], scored: bool = True) -> pa.Table:
    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows: list[dict[str, Any]] = [
        {
            "prompt_id": "p",
            "chosen_id": chosen,
            "rejected_id": rejected,
            "split": "train",
            "prompt": [{"role": "user", "content": "question"}],
            "chosen": turn(f"text of {chosen}"),
            "rejected": turn(f"text of {rejected}"),
            "score_chosen": 9.0 if scored else None,
            "score_rejected": 2.0 if scored else None,
            "score_gap": 7.0 if scored else None,
        }
        for chosen, rejected in ids
    ]
    return to_table(rows, DPO)


def test_a_pair_gives_one_desirable_and_one_undesirable_row() -> None:
    table, counts = pairs_to_kto(pairs(("a", "b"), ("c", "d")))
    assert table.schema.equals(KTO)
    assert [(r["candidate_id"], r["label"], r["final_score"]) for r in table.to_pylist()] == [
        ("a", True, 9.0), ("b", False, 2.0), ("c", True, 9.0), ("d", False, 2.0),
    ]  # fmt: skip
    assert table.to_pylist()[1]["completion"] == [{"role": "assistant", "content": "text of b"}]
    assert counts == {"answers": 4, "kept": 4, "dropped": {"repeated": 0, "contradictory": 0}}


def test_an_answer_of_several_pairs_gives_one_row_and_a_contradiction_none() -> None:
    table, counts = pairs_to_kto(pairs(("a", "b"), ("a", "c"), ("c", "d"), scored=False))
    assert {r["candidate_id"]: (r["label"], r["copies"]) for r in table.to_pylist()} == {
        "a": (True, 2), "b": (False, 1), "d": (False, 1),
    }  # fmt: skip
    assert counts == {"answers": 6, "kept": 3, "dropped": {"repeated": 1, "contradictory": 2}}


def test_answers_that_differ_in_blanks_alone_are_equal() -> None:
    two = pairs(("a", "b"), (" a", "b  ")).set_column(9, DPO.field("score_gap"), pa.array([None, None], pa.float64()))
    two = two.set_column(10, DPO.field("copies"), pa.array([3, 1], pa.int32()))
    rows = pairs_to_kto(two)[0].to_pylist()
    assert [(r["candidate_id"], r["label"], r["copies"]) for r in rows] == [("a", True, 4), ("b", False, 4)]
    assert [(r["candidate_id"], r["copies"]) for r in pairs_to_sft(two)[0].to_pylist()] == [("a", 4)]


def test_chosen_answers_are_shown_once() -> None:
    table, counts = pairs_to_sft(pairs(("a", "b"), ("a", "c"), ("d", "b")))
    assert table.schema.equals(SFT)
    assert table["candidate_id"].to_pylist() == ["a", "d"] and table["copies"].to_pylist() == [2, 1]
    assert counts == {"pairs": 3, "kept": 2, "dropped": {"repeated": 1}}
    assert pairs_to_sft(pairs())[0].schema.equals(SFT)
