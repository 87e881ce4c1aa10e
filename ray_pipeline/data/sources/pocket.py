"""Prompts of the pocket world."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ray_pipeline.data.sources.source import InputError, PromptSource, SourceRow
from ray_pipeline.extensions import register
from ray_pipeline.store.keys import digest

if TYPE_CHECKING:
    from ray_pipeline.pocket.tasks import PocketPrompt


@register("source", "pocket")
class PocketSource(PromptSource):
    """Instructions of the pocket world."""

    type: Literal["pocket"] = Field("pocket", description="where the rows are: the name of the source")
    count: int = Field(ge=1, description="number of distinct prompts")
    seed: int = Field(0, description="seed of the prompts")

    def rows(self) -> Iterator[SourceRow]:
        for index, prompt in enumerate(self._prompts()):
            yield SourceRow({"pocket": index, "seed": self.seed}, prompt.instruction, prompt.task_type)

    def digest(self) -> dict[str, str]:
        # The prompts themselves, so that a change of the pocket world is a change of content without a version to keep.
        prompts = [[p.instruction, p.task_type] for p in self._prompts()]
        return {"pocket": digest(["pocket", self.count, self.seed, prompts])}

    def _prompts(self) -> list[PocketPrompt]:
        from ray_pipeline.pocket.tasks import make_prompts

        try:
            return make_prompts(self.count, self.seed)
        except ValueError as error:
            raise InputError(f"pocket source: {error}") from error
