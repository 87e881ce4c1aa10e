"""The stage that makes the table of all questions of the chosen benchmarks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ray_pipeline.bench.files import BenchmarkFileError, read_text, source_rows
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.engines.identity import text_digest
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.pocket.bench_files import is_pocket
from ray_pipeline.store.keys import canonical_json
from ray_pipeline.store.tables import ShardedTable


@functools.cache
def _content(source: str) -> str:
    return text_digest(canonical_json(source_rows(source)) if is_pocket(source) else read_text(source))


def content_digests(sources: Mapping[str, str]) -> dict[str, str]:
    """Content digest of each file. Raises BenchmarkFileError, naming the key's file."""
    return {key: _content(source) for key, source in sources.items()}


@dataclasses.dataclass(frozen=True)
class _Given:
    settings: BenchmarksSettings
    digests: dict[str, str]


def questions_stage(settings: BenchmarksSettings) -> Stage:
    """The table of all questions of the chosen benchmarks. Raises BenchmarkFileError for a missing file."""
    digests = content_digests(settings.sources())
    limits = {name: block.limit for name, block in settings.chosen.items()}
    own = {name: block.decisive() for name, block in settings.own.items()}
    return Stage(
        name="bench-questions",
        group="bench-questions",
        work=WholeWork(function=make_questions, settings=_Given(settings, digests), tables=("bench_questions",)),
        config={"limits": limits, "seed": settings.seed, **({"own": own} if own else {})},
        external=digests,
    )


def make_questions(given: WholeInput) -> dict[str, Any]:
    """Write the sharded table. Raises BadInput for a file that cannot be used, or that changed since the start."""
    known: _Given = given.settings
    try:
        if content_digests(known.settings.sources()) != known.digests:
            raise BadInput("a question file has changed since the run began; run the same command again")
        rows = known.settings.rows()
    except BenchmarkFileError as error:
        raise BadInput(str(error)) from error
    ShardedTable(given.folder.location, "bench_questions", given.num_shards, given.fingerprint).write_rows(rows)
    counts = {name: sum(row["benchmark"] == name for row in rows) for name in known.settings.chosen}
    given.log(", ".join(f"{name} {n}" for name, n in counts.items()))
    return {"counts": counts}
