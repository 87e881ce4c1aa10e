"""Training rows against the pocket world's checker."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ray_pipeline.data.checkers import load_checker
from ray_pipeline.data.row_truth import row_truth
from ray_pipeline.pocket.tasks import is_correct, truth

ASKED = "add 7 9"
RIGHT = truth(ASKED)
WRONG = "no idea"


def chat(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def kto(text: str, label: bool, split: str = "train", prompt_id: str = "p") -> dict[str, object]:
    return {
        "prompt_id": prompt_id,
        "split": split,
        "prompt": chat("user", ASKED),
        "completion": chat("assistant", text),
        "label": label,
    }


def test_each_class_is_counted_and_repeats_and_held_out_rows_are_told_apart() -> None:
    assert is_correct(ASKED, RIGHT) and not is_correct(ASKED, WRONG)
    rows = [kto(RIGHT, True), kto(RIGHT, True), kto(WRONG, True), kto(WRONG, False), kto(WRONG, True, "val")]
    pair = {"prompt_id": "p", "split": "train", "prompt": chat("user", ASKED)}
    pair |= {"chosen": chat("assistant", RIGHT), "rejected": chat("assistant", RIGHT)}
    found = row_truth(
        {"kto": pa.Table.from_pylist(rows), "dpo": pa.Table.from_pylist([pair])}, {"p": "{}"}, load_checker("pocket")
    )
    assert found is not None
    assert (found.labelled, found.repeated, found.undesirable_wrong) == (4, 0.25, 1.0)
    assert found.desirable_right == pytest.approx(2 / 3)
    assert (found.pairs, found.chosen_right, found.rejected_wrong) == (1, 1.0, 0.0)


def test_rows_of_elsewhere_have_no_truth() -> None:
    rows = pa.Table.from_pylist([kto(RIGHT, True, prompt_id="elsewhere")])
    assert row_truth({"kto": rows}, {"p": "{}"}, load_checker("pocket")) is None
    assert row_truth({}, {"p": "{}"}, load_checker("pocket")) is None
