"""IFEval's prompts with their verifiable instructions, the settings that choose them, and their rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.files import BenchmarkFileError, question_row, source_rows
from ray_pipeline.bench.ifeval.checkers import CheckersMissing, load_checkers
from ray_pipeline.config.settings import Settings
from ray_pipeline.store.keys import canonical_json

if TYPE_CHECKING:
    from ray_pipeline.bench.scores import Measurement, Scored
    from ray_pipeline.graph.stage import Stage


@dataclasses.dataclass(frozen=True)
class IfevalPrompt:
    """One prompt with its instructions: ids (`family:type`) and, for each, the arguments of its checker."""

    key: int
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]


class IfevalSettings(Settings):
    """The `ifeval` block: prompts in the published form. The checkers come with `quorum-align[ifeval]`."""

    prompts: str = Field(
        "hf://datasets/google/IFEval/ifeval_input_data.jsonl", description="prompt file in the published form"
    )
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1280)
    limit: int | None = Field(None, ge=1, description="maximum number of prompts (smallest hashes kept); default: all")

    def load(self) -> list[IfevalPrompt]:
        """Raises BenchmarkFileError."""
        return prompts_of(source_rows(self.prompts), self.prompts)

    def sources(self) -> dict[str, str]:
        """Place of every question file by its key."""
        return {"prompts": self.prompts}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the questions table. Raises BenchmarkFileError."""
        return [
            question_row(
                "ifeval",
                p.key,
                place,
                [p.prompt],
                checks=canonical_json(
                    {"instructions": list(p.instructions), "arguments": [dict(a) for a in p.arguments]}
                ),
            )
            for place, p in enumerate(self.load())
        ]

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises BenchmarkFileError if the checkers are missing or an instruction is unknown to them."""
        try:
            known = load_checkers().registry
        except CheckersMissing as error:
            raise BenchmarkFileError(f"ifeval: {error}") from error
        for row in rows:
            for name in json.loads(row["checks"])["instructions"]:
                if name not in known:
                    raise BenchmarkFileError(
                        f"ifeval.prompts: prompt {row['question_id']} of {self.prompts} has the instruction {name}, "
                        "which no checker supports"
                    )

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        """No model judges."""
        return {}

    def answered(self) -> dict[str, SamplingSettings]:
        """Key of every sampling of the measured models."""
        return {"sampling": self.sampling}

    def judging(self) -> None:
        """No model judges."""

    def checks(self, inputs: Mapping[str, Stage]) -> list[Stage]:
        """The stage of the checkers. Raises CheckersMissing if they are not installed."""
        from ray_pipeline.bench.ifeval.checks import checks

        return [checks(inputs)]

    def scores(self, run: Measurement) -> Scored:
        """Scores of all models from the stored tables."""
        from ray_pipeline.bench.ifeval.scores import scored

        return scored(self, run)


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
