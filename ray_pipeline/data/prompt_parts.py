"""Parts of the prompts, one for each round of a run."""

from __future__ import annotations

import pyarrow as pa

from ray_pipeline.config.settings import Settings
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import unit_hash


class _Part(Settings):
    part: int
    parts: int


def prompt_part(prompts: Stage, part: int, parts: int, name: str) -> Stage:
    """The prompts of one of several parts of about equal size, from 0; a prompt's part is a hash of its id, of both
    splits alike."""
    settings = _Part(part=part, parts=parts)
    return Stage(
        name=name,
        role="part of prompts",
        work=ShardWork(function=take_part, tables=("prompts",), settings=settings),
        config=settings.decisive(),
        inputs={"prompts": prompts},
    )


def take_part(given: ShardInput) -> ShardOutput:
    settings: _Part = given.settings
    prompts = given.tables["prompts"]
    own = [int(unit_hash("round", name) * settings.parts) == settings.part for name in prompts["prompt_id"].to_pylist()]
    given.tick(prompts.num_rows)
    return ShardOutput({"prompts": prompts.filter(pa.array(own, pa.bool_()))})
