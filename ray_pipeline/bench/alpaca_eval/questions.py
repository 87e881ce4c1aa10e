"""AlpacaEval's instructions with their reference outputs, and their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ray_pipeline.bench.benchmark import question_row
from ray_pipeline.bench.files import need

#: Where the model's output is shown: by the published coin of each instruction, or once in each place.
OrderRule = Literal["seeded", "both"]

#: Who wrote the published reference outputs.
REFERENCE = "gpt4_1106_preview"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction with the reference's output; `index` is its place in the published file."""

    index: int
    instruction: str
    reference: str
    dataset: str = ""


def instructions_of(rows: Sequence[Mapping[str, Any]], source: str = "reference outputs") -> list[Instruction]:
    """Instructions from rows of a reference file: instruction, output, dataset (which may be missing).

    Raises:
        BenchmarkFileError: an instruction or output is missing.
    """
    return [
        Instruction(n - 1, need(r, "instruction", source, n), need(r, "output", source, n), r.get("dataset") or "")
        for n, r in enumerate(rows, 1)
    ]


def instruction_of(row: Mapping[str, Any]) -> Instruction:
    """AlpacaEval's instruction in a row of the table."""
    return Instruction(row["position"], row["turns"][0], row["references"][0], row["category"])


def instruction_row_of(i: Instruction) -> dict[str, Any]:
    """The row of an instruction."""
    return question_row(i.index, i.index, [i.instruction], category=i.dataset, references=[i.reference])
