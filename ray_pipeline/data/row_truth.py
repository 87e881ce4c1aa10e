"""How right training rows are in the pocket world, whose checker knows the truth: for the page of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from ray_pipeline.pocket.tasks import is_correct


@dataclasses.dataclass(frozen=True)
class RowTruth:
    """Shares in [0, 1] over the training split of one data set; None where it has no such rows.

    Attributes:
        labelled: rows with a label (kto).
        repeated: share of them whose prompt, answer and label an earlier row has too.
        desirable_right, undesirable_wrong: share of the two classes whose label the checker shares.
        pairs: rows with two answers (dpo).
        chosen_right, rejected_wrong: the same of their two sides.
    """

    labelled: int
    repeated: float | None
    desirable_right: float | None
    undesirable_wrong: float | None
    pairs: int
    chosen_right: float | None
    rejected_wrong: float | None


def row_truth(tables: Mapping[str, pa.Table], pocket: frozenset[str]) -> RowTruth | None:
    """Check the rows of a data set.

    Args:
        tables: kind (`kto`, `dpo`) → rows, as the stage dataset-rows leaves them; other kinds are passed over.
        pocket: prompt_ids of the pocket world.

    Returns:
        None when a row is of somewhere else, or when there is none.
    """
    labelled, pairs = (_train(tables.get(kind)) for kind in ("kto", "dpo"))
    if not labelled + pairs or any(row["prompt_id"] not in pocket for row in labelled + pairs):
        return None
    seen = {(row["prompt_id"], row["completion"][-1]["content"], row["label"]) for row in labelled}
    return RowTruth(
        labelled=len(labelled),
        repeated=1 - len(seen) / len(labelled) if labelled else None,
        desirable_right=_share(_right(row, "completion") for row in labelled if row["label"]),
        undesirable_wrong=_share(not _right(row, "completion") for row in labelled if not row["label"]),
        pairs=len(pairs),
        chosen_right=_share(_right(row, "chosen") for row in pairs),
        rejected_wrong=_share(not _right(row, "rejected") for row in pairs),
    )


def _train(table: pa.Table | None) -> list[dict[str, Any]]:
    return [] if table is None else [row for row in table.to_pylist() if row["split"] == "train"]


def _right(row: Mapping[str, Any], answer: str) -> bool:
    return is_correct(row["prompt"][-1]["content"], row[answer][-1]["content"])


def _share(flags: Iterable[bool]) -> float | None:
    found = list(flags)
    return sum(found) / len(found) if found else None
