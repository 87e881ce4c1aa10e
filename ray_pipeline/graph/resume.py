"""What is there already: results of finished stages, and those that no longer count.

A stage is done when its folder holds `_result.json` with its fingerprint and every shard file with the same
fingerprint in its footer. Anything else is made again, shard by shard. Names with an underscore are no data: readers
of Parquet folders pass over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_pipeline.graph.results import is_skipped
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, Stage, StageRef, StageResult
from ray_pipeline.store.files import RESULT, Folder
from ray_pipeline.store.tables import shard_name


def stage_folder(run: str, stage: Stage) -> Folder:
    return Folder(run) / stage.folder_name


def load_result(ref: StageRef, say: Callable[[str], None] | None = None) -> StageResult | None:
    """The result of a stage if it is whole, else None.

    Args:
        say: called with a line for each file that cannot be used, which is then set aside; None: nothing is renamed.
    """
    whole, rows = True, dict[str, int]()
    for kind in ref.tables:
        table = ref.table(kind)
        state = table.state()
        if say is not None:
            for shard, reason in state.bad.items():
                say(Folder(table.folder).set_aside(shard_name(shard), reason))
        whole = whole and state.done
        rows[kind] = sum(state.rows.values())

    def read(value: Any) -> StageResult:
        if value["fingerprint"] != ref.fingerprint:
            raise ValueError(f"it has the fingerprint {value['fingerprint']}")
        result = StageResult.read(ref, value)
        if whole and result.rows != rows:
            raise ValueError(f"it counts {result.rows} rows, the shards hold {rows}")
        return result

    result = Folder(ref.folder).load(RESULT, read, say)
    return result if whole else None


def stored(stages: Sequence[Stage], run: str, num_shards: int) -> list[Stage]:
    """Those of some stages, parents first, that are done in a run folder, and whatever they read of them too."""
    kept: list[Stage] = []
    for stage in stages:
        whole = all(parent in kept or parent not in stages for parent in stage.inputs.values())
        if whole and load_result(StageRef.of(stage, run, num_shards)) is not None:
            kept.append(stage)
    return kept


def finished(
    dag: Dag, wanted: Sequence[Stage], session: Session, from_group: str | None, say: Callable[[str], None]
) -> dict[str, StageResult]:
    """Results of the stages that need not be made, by name.

    Args:
        from_group: rerun these stages and everything downstream.

    Raises:
        ValueError: a stage before `from_group` is not complete.
    """
    again = dag.downstream(from_group) if from_group else []
    results: dict[str, StageResult] = {}
    for stage in wanted:
        if stage in again or is_skipped(stage, results):
            continue
        result = load_result(session.ref(stage), say)
        if result is not None:
            results[stage.name] = result
        elif from_group and dag.is_before(stage, from_group):
            raise ValueError(
                f"--from {from_group} needs {stage.name}, which is not complete; run without --from to make it"
            )
    return results


def to_do(wanted: Sequence[Stage], results: Mapping[str, StageResult]) -> list[Stage]:
    """The stages that are not done, and not skipped by a decision that is."""
    return [stage for stage in wanted if stage.name not in results and not is_skipped(stage, results)]


def drop_skipped(wanted: Sequence[Stage], results: dict[str, StageResult]) -> list[Stage]:
    """Take out of `results`, and return, the stages that are skipped: they may be there of a run that went on."""
    skipped = [stage for stage in wanted if is_skipped(stage, results)]
    for stage in skipped:
        results.pop(stage.name, None)
    return skipped


def drop_undone(wanted: Sequence[Stage], run: Folder, results: dict[str, StageResult]) -> list[Stage]:
    """Take out of `results`, and return, the stages that are not done any more: a file of theirs was set aside."""
    undone = [s for s in wanted if s.name in results and not (run / s.folder_name).exists(RESULT)]
    for stage in undone:
        del results[stage.name]
    return undone


def drop_stale(wanted: Sequence[Stage], results: dict[str, StageResult]) -> list[Stage]:
    """Take out of `results` what was made from an output that is gone and would not come out the same again."""
    stale: list[Stage] = []

    def is_gone(parent: Stage) -> bool:
        return parent.name not in results and not parent.repeatable and not is_skipped(parent, results)

    for stage in wanted:
        if any(parent in stale or is_gone(parent) for parent in stage.inputs.values()):
            results.pop(stage.name, None)
            stale.append(stage)
    return stale
