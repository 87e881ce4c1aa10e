"""How right training rows are, where there is a checker: for the page of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.data.checkers import Check


@dataclasses.dataclass(frozen=True)
class RowTruth:
    """Shares in [0, 1] over the training split of one dataset; None where it has no such rows.

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


def row_truth(tables: Mapping[str, pa.Table], meta: Mapping[str, str], check: Check) -> RowTruth | None:
    """Check the rows of a dataset.

    Args:
        tables: kind (`kto`, `dpo`) → rows, as the stage dataset-rows leaves them; other kinds are passed over.
        meta: prompt_id → meta of the prompts that the checker is for.

    Returns:
        None when a row belongs to another prompt, or when there is none.
    """
    labelled, pairs = (_train(tables.get(kind)) for kind in ("kto", "dpo"))
    if not labelled + pairs or any(row["prompt_id"] not in meta for row in labelled + pairs):
        return None
    seen = {(row["prompt_id"], row["completion"][-1]["content"], row["label"]) for row in labelled}
    return RowTruth(
        labelled=len(labelled),
        repeated=1 - len(seen) / len(labelled) if labelled else None,
        desirable_right=_share(True, check, meta, [row for row in labelled if row["label"]], "completion"),
        undesirable_wrong=_share(False, check, meta, [row for row in labelled if not row["label"]], "completion"),
        pairs=len(pairs),
        chosen_right=_share(True, check, meta, pairs, "chosen"),
        rejected_wrong=_share(False, check, meta, pairs, "rejected"),
    )


def _train(table: pa.Table | None) -> list[dict[str, Any]]:
    return [] if table is None else [row for row in table.to_pylist() if row["split"] == "train"]


def _share(
    right: bool, check: Check, meta: Mapping[str, str], rows: Sequence[Mapping[str, Any]], answer: str
) -> float | None:
    """Share of the rows whose answer is right (or wrong), of those that the checker decides."""
    found = [check(row["prompt"], row[answer][-1]["content"], meta[row["prompt_id"]]) for row in rows]
    decided = [one.share == 1 for one in found if one is not None]
    return sum(one == right for one in decided) / len(decided) if decided else None
