"""How often the items of checklists are met: an item that every answer meets, or none, tells no answers apart."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.agents.checklists import stored_ticks
from ray_pipeline.data.checklists import read_checklists
from ray_pipeline.store.schemas import READ_STATUSES

#: Items of written checklists that are kept for the page: those with most ticks.
_SHOWN = 20


@dataclass(frozen=True)
class ItemStats:
    """One item: the answers that were ticked, and how many of them meet it; `prompt_id` is "" where it is given."""

    text: str
    prompt_id: str
    ticked: int
    met: int


@dataclass(frozen=True)
class ChecklistStats:
    """The items of one judge that at least two answers were ticked against.

    Attributes:
        items: their number.
        ticks, met: over all answers.
        always, never: items that every answer meets, and that none meets.
        shown: all items of a given checklist; of written ones, some of those that every answer meets.
    """

    judge: str
    items: int
    ticks: int
    met: int
    always: int
    never: int
    shown: list[ItemStats]


def checklist_stats(
    verdicts: pa.Table, given: Mapping[str, Sequence[str]], written: pa.Table | None
) -> list[ChecklistStats]:
    """Statistics by judge, in the order of their names.

    Args:
        verdicts: prompt_id, judge, parse_status and raw.
        given: judge → texts of its items.
        written: rows of the table `checklists`.
    """
    lists = {} if written is None else read_checklists(written.to_pylist())
    judges = sorted({*given, *(judge for _, judge in lists)})
    counts: dict[str, dict[tuple[str, str], list[int]]] = {
        judge: collections.defaultdict(lambda: [0, 0]) for judge in judges
    }
    ticked = verdicts.filter(pc.is_in(verdicts["judge"], value_set=pa.array(judges, pa.string())))
    for row in ticked.select(["prompt_id", "judge", "parse_status", "raw"]).to_pylist() if judges else ():
        judge, prompt = row["judge"], row["prompt_id"]
        if row["parse_status"] not in READ_STATUSES:
            continue
        checklist = lists.get((prompt, judge))
        texts = given[judge] if judge in given else [item.text for item in checklist.items] if checklist else []
        ticks = stored_ticks(row["raw"], len(texts)) if texts else None
        for text, tick in zip(texts, ticks or [], strict=False):
            count = counts[judge]["" if judge in given else prompt, text]
            count[0] += 1
            count[1] += tick.met
    return [_of_judge(judge, counts[judge], judge in given) for judge in judges]


def _of_judge(judge: str, counts: Mapping[tuple[str, str], Sequence[int]], given: bool) -> ChecklistStats:
    items = [
        ItemStats(text, prompt, ticked, met) for (prompt, text), (ticked, met) in counts.items() if given or ticked > 1
    ]
    always = [item for item in items if item.met == item.ticked]
    return ChecklistStats(
        judge=judge,
        items=len(items),
        ticks=sum(item.ticked for item in items),
        met=sum(item.met for item in items),
        always=len(always),
        never=sum(not item.met for item in items),
        shown=items if given else sorted(always, key=lambda item: (-item.ticked, item.prompt_id, item.text))[:_SHOWN],
    )
