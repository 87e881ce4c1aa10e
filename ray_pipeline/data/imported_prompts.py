"""The prompts of imported rows, each once, for the evaluation of a policy that was trained on them."""

from __future__ import annotations

import collections
from typing import Any

from ray_pipeline.config.settings import Settings
from ray_pipeline.graph.stage import Stage, WholeInput, WholeWork
from ray_pipeline.store.schemas import PROMPTS, to_table
from ray_pipeline.store.tables import ShardedTable


class _Given(Settings):
    source: str


def imported_prompts(rows: Stage, source: str) -> Stage:
    """The table of distinct prompts of the rows that `imported.preferences` keeps, with their ids and splits.

    Args:
        source: name of their origin in the tables.
    """
    settings = _Given(source=source)
    return Stage(
        name="prompts",
        work=WholeWork(function=make_prompts, settings=settings, tables=("prompts",)),
        config=settings.decisive(),
        inputs={"rows": rows},
    )


def make_prompts(given: WholeInput) -> dict[str, Any]:
    rows, settings = given.inputs["rows"], given.settings
    out = ShardedTable(given.folder.location, "prompts", given.num_shards, given.fingerprint)
    counts: collections.Counter[str] = collections.Counter()
    for shard in range(given.num_shards):
        found: dict[str, dict[str, Any]] = {}
        for kind in rows.tables:
            for row in rows.table(kind).read(shard, columns=["prompt_id", "prompt", "split"]).to_pylist():
                found[row["prompt_id"]] = {
                    "prompt_id": row["prompt_id"],
                    "messages": row["prompt"],
                    "source": settings.source,
                    "task_type": "general",
                    "split": row["split"],
                    "meta": "{}",
                }
        counts.update(prompt["split"] for prompt in found.values())
        out.write(shard, to_table([found[name] for name in sorted(found)], PROMPTS))
        given.tick(shard + 1, given.num_shards, "")
    kept = counts["train"] + counts["val"]
    given.log(f"{kept:,} prompts, {counts['val']:,} of them held out")
    untested = "no prompt is held out, so nothing is measured; raise prompts.val_fraction, or bring more rows"
    return {
        "counts": {"read": kept, "kept": kept, "train": counts["train"], "val": counts["val"], "dropped": {}},
        "warnings": [] if counts["val"] else [untested],
    }
