"""A prompt source of your own: every sum of two numbers below a limit.

quorum run dmapo --config configs/pocket.yaml 'prompts.sources=[{type: examples/my_source.py, below: 20}]' --to prompts
"""

from collections.abc import Iterator

from pydantic import Field

from ray_pipeline.data.sources import PromptSource, SourceRow
from ray_pipeline.extensions import register


@register("source")
class Sums(PromptSource):
    below: int = Field(10, ge=2, description="both numbers are below this")

    def rows(self) -> Iterator[SourceRow]:
        for a in range(self.below):
            for b in range(a, self.below):
                yield SourceRow({"a": a, "b": b}, f"What is {a} + {b}?", task_type="arithmetic")

    def digest(self) -> dict[str, str]:
        # The rows depend only on this file and the keys, which are part of the fingerprint already.
        return {}
