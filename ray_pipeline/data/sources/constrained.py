"""English instructions with verifiable constraints, composed by code (`constraints/compose.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ray_pipeline.constraints.compose import KINDS, Composed, Kind, compose
from ray_pipeline.data.sources.source import InputError, PromptSource, SourceRow
from ray_pipeline.extensions import register
from ray_pipeline.store.keys import digest


@register("source", "constrained")
class ConstrainedSource(PromptSource):
    """English instructions with constraints of IFEval's kinds, in the project's own words; nothing is downloaded.

    `meta` of a prompt has its constraints under IFEval's published names, instruction_id_list and kwargs, for the
    checkers `ifeval` and `ifeval_loose`.
    """

    type: Literal["constrained"] = Field("constrained", description="where the rows are: the name of the source")
    count: int = Field(ge=1, description="number of distinct prompts; more of them keep the earlier ones")
    seed: int = Field(0, description="seed of the prompts")
    kinds: tuple[Kind, ...] | None = Field(None, min_length=1, description="constraints to choose from; default: all")
    most: int = Field(3, ge=1, le=3, description="largest number of constraints in a prompt")

    def rows(self) -> Iterator[SourceRow]:
        for number, prompt in enumerate(self._prompts()):
            meta = {
                "constrained": number,
                "seed": self.seed,
                "instruction_id_list": [one.id for one in prompt.constraints],
                "kwargs": [one.arguments for one in prompt.constraints],
            }
            yield SourceRow(meta, prompt.text, prompt.task)

    def digest(self) -> dict[str, str]:
        # The prompts themselves, so that another wording is a change of content without a version to keep.
        prompts = [[p.text, p.task, [[c.id, c.arguments] for c in p.constraints]] for p in self._prompts()]
        return {"constrained": digest(["constrained", prompts])}

    def _prompts(self) -> list[Composed]:
        found = list(itertools.islice(compose(self.seed, self.kinds or KINDS, self.most), self.count))
        if len(found) < self.count:
            raise InputError(
                f"constrained source: only {len(found):,} distinct prompts of these kinds; lower count "
                f"({self.count:,}), or allow more kinds"
            )
        return found
