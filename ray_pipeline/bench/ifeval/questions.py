"""IFEval's prompts with their verifiable instructions, and their rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.bench.benchmark import question_row
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.store.keys import canonical_json


@dataclasses.dataclass(frozen=True)
class IfevalPrompt:
    """One prompt with its instructions: ids (`family:type`) and, for each, the arguments of its checker."""

    key: int
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]


def prompts_of(rows: Sequence[Mapping[str, Any]], source: str = "IFEval prompts") -> list[IfevalPrompt]:
    """Prompts from rows of the published file (key, prompt, instruction_id_list, kwargs); null arguments are left out.

    Raises:
        BenchmarkFileError: a column is missing, a key comes twice, or a prompt has other than one argument set
            per instruction.
    """
    found: dict[int, IfevalPrompt] = {}
    for number, row in enumerate(rows, 1):
        if lacking := {"key", "prompt", "instruction_id_list", "kwargs"} - set(row):
            raise BenchmarkFileError(f"{source}, row {number}: {', '.join(sorted(lacking))} is missing")
        ids, arguments = tuple(row["instruction_id_list"]), row["kwargs"]
        if len(ids) != len(arguments):
            raise BenchmarkFileError(
                f"{source}, key {row['key']}: {len(ids)} instructions, but {len(arguments)} argument sets"
            )
        if row["key"] in found:
            raise BenchmarkFileError(f"{source}: key {row['key']} comes twice")
        known = tuple({k: v for k, v in (a or {}).items() if v is not None} for a in arguments)
        found[row["key"]] = IfevalPrompt(row["key"], row["prompt"], ids, known)
    return list(found.values())


def prompt_of(row: Mapping[str, Any]) -> IfevalPrompt:
    """IFEval's prompt in a row of the table."""
    checks = json.loads(row["checks"])
    return IfevalPrompt(
        int(row["question_id"]), row["turns"][0], tuple(checks["instructions"]), tuple(checks["arguments"])
    )


def prompt_row_of(prompt: IfevalPrompt, place: int) -> dict[str, Any]:
    """The row of a prompt."""
    checks = {"instructions": list(prompt.instructions), "arguments": [dict(a) for a in prompt.arguments]}
    return question_row(prompt.key, place, [prompt.prompt], checks=canonical_json(checks))
