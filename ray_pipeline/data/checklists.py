"""Checklists that a model writes: one list for each prompt and judge, which all answers to the prompt share.

The lists are a table of the run. A user can stop after it, edit lists, and name the file of the edited ones
(`checklist.edited`); they replace those of the same prompts in a stage of their own, so that nothing is written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from ray_pipeline.agents.checklists import ChecklistItem, ChecklistSettings, Item
from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings
from ray_pipeline.agents.templates import RoleTemplate, Templates
from ray_pipeline.agents.ticking import write_items
from ray_pipeline.config.messages import first_problem
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.answers import answers_of
from ray_pipeline.data.sources.files import find_files, jsonl_records, sha256
from ray_pipeline.data.sources.source import InputError
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, ShardTables, count_by, reply_status
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.store.schemas import CHECKLISTS, READ_STATUSES, to_table
from ray_pipeline.store.tables import ShardedTable


class Checklist(NamedTuple):
    """The items that answers to a prompt are ticked against. Without any, `status` and `reason` are why."""

    items: tuple[ChecklistItem, ...]
    status: str = "ok"
    reason: str | None = None


def read_checklists(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Checklist]:
    """By prompt and judge, from rows of the table `checklists`."""
    return {
        (row["prompt_id"], row["judge"]): Checklist(
            tuple(ChecklistItem(**item) for item in row["items"] or ()), row["parse_status"], row["reason"]
        )
        for row in rows
    }


# --- written lists ----------------------------------------------------------------------------------------------------


class _List(Settings):
    """The list that one judge has for each prompt: its name and text, and how the list is written."""

    name: str
    text: str
    most: int
    sampling: SamplingSettings

    @classmethod
    def of(cls, rubric: Rubric, writer: ChecklistSettings) -> _List:
        sampling = SamplingSettings(temperature=writer.temperature, max_tokens=writer.max_tokens)
        return cls(name=rubric.name, text=rubric.text, most=writer.most, sampling=sampling)


class _Writing(Settings):
    answers: tuple[str, ...]
    lists: tuple[_List, ...]
    template: RoleTemplate
    asking: JudgeAsking


class _Item(NamedTuple):
    prompt_id: str
    messages: list[Message]
    list: _List


def _prompts(shard: ShardTables, settings: _Writing) -> Iterator[_Item]:
    """The prompts that have an answer to judge."""
    answers = answers_of(shard.tables["prompts"], *(shard.tables[role] for role in settings.answers))
    for prompt, messages in {a.prompt_id: a.messages for a in answers if a.missing is None}.items():
        for one in settings.lists:
            yield _Item(prompt, messages, one)


async def _write(engine: ChatEngine, settings: _Writing, item: _Item) -> Outcome:
    one = item.list
    reply = await write_items(
        engine, item.messages, one.name, one.text, one.most, settings.template, one.sampling, settings.asking
    )
    texts = None if reply.fields is None else reply.fields["items"]
    row = {
        "prompt_id": item.prompt_id,
        "judge": one.name,
        "items": None if texts is None else [{"text": text, "weight": 1.0} for text in texts],
        "reason": reply.reason,
        "parse_status": reply.status,
        "raw": reply.raw,
    }
    return Outcome({"checklists": [row]}, reply_status(f"the writer of {one.name}", reply.status))


WRITE = Asking(
    tables={"checklists": CHECKLISTS},
    items=_prompts,
    ask=_write,
    role=lambda settings, item: f"checklist/{item.list.name}",
    counts=count_by("checklists", "judge", "parse_status"),
)


def checklists(
    rubrics: Sequence[Rubric],
    models: Mapping[str, ModelSettings],
    texts: Templates,
    asking: JudgeAsking,
    inputs: Mapping[str, Stage],
    name: str,
    group: str,
    holds: str,
) -> dict[str, Stage]:
    """By judge, the stage with its lists: one stage for each model that writes any, and one more where some are edited.

    Args:
        inputs: prompts, and the answers by role.
        holds: role of the verdicts, see `Stage.role`.

    Raises:
        InputError: a file of edited lists cannot be read.
    """
    found: dict[str, Stage] = {}
    role = f"{holds.removesuffix('verdicts')}checklists"
    written = [(rubric, rubric.checklist) for rubric in rubrics if rubric.checklist is not None]
    writers = list(dict.fromkeys(writer.model for _, writer in written))
    for model in writers:
        own = [(rubric, writer) for rubric, writer in written if writer.model == model]
        settings = _Writing(
            answers=tuple(name for name in inputs if name != "prompts"),
            lists=tuple(_List.of(rubric, writer) for rubric, writer in own),
            template=texts.items,
            asking=asking,
        )
        own_name = name if len(writers) == 1 else f"{name}-{model}"
        edits = {rubric.name: writer.edited for rubric, writer in own if writer.edited is not None}
        holding = f"written {role}" if edits else role
        stage = WRITE.stage(own_name, settings, models[model], inputs, group=group, holds=holding)
        if edits:
            stage = _edited(stage, edits, f"{own_name}-edited", group, role)
        found |= dict.fromkeys((rubric.name for rubric, _ in own), stage)
    return found


# --- edited lists -----------------------------------------------------------------------------------------------------


class _Edits(Settings):
    """By judge and prompt, the items that replace the written ones.

    Attributes:
        strict: a file without any list of this run is refused. The lists of answers for the evaluation are of a part
            of the prompts only.
    """

    items: dict[str, dict[str, tuple[ChecklistItem, ...]]]
    strict: bool


class _Row(Settings):
    prompt_id: str
    items: tuple[Item, ...]


def read_edits(judge: str, path: str) -> dict[str, tuple[ChecklistItem, ...]]:
    """Items by prompt_id; rows of other judges (column `judge`) are left out.

    Raises:
        InputError: the file cannot be read, or a row is none; names file and line.
    """
    found: dict[str, tuple[ChecklistItem, ...]] = {}
    for file in find_files(path):
        for number, row in jsonl_records(file):
            where = f"{file.uri}: line {number}"
            if row.get("judge", judge) != judge or row.get("items") is None:  # a list that was not read, as exported
                continue
            try:
                read = _Row.model_validate({key: row.get(key) for key in ("prompt_id", "items")})
            except ValidationError as error:
                raise InputError(f"{where}: {first_problem(error)}") from error
            if not read.items:
                raise InputError(f"{where} has no items; write some, or remove the row to keep the written ones")
            if read.prompt_id in found:
                raise InputError(f"{where}: a second list of prompt {read.prompt_id}; remove one")
            found[read.prompt_id] = read.items
    return found


def _edited(written: Stage, paths: Mapping[str, str], name: str, group: str, role: str) -> Stage:
    digests = {f"{judge}: {file.name}": sha256(file) for judge, path in paths.items() for file in find_files(path)}
    return Stage(
        name=name,
        group=group,
        role=role,
        work=WholeWork(
            function=edit_checklists,
            settings=_Edits(
                items={judge: read_edits(judge, path) for judge, path in paths.items()}, strict=role == "checklists"
            ),
            tables=("checklists",),
        ),
        config={"judges": sorted(paths)},
        inputs={"checklists": written},
        external=digests,
    )


def edit_checklists(given: WholeInput) -> dict[str, Any]:
    """The written lists, with those of the file in place of the ones of the same prompts.

    Raises:
        BadInput: no prompt of a file is in the run.
    """
    settings: _Edits = given.settings
    out = ShardedTable(given.folder.location, "checklists", given.num_shards, given.fingerprint)
    used: dict[str, set[str]] = {judge: set() for judge in settings.items}
    for shard in range(given.num_shards):
        rows = given.inputs["checklists"].table().read(shard).to_pylist()
        for row in rows:
            items = settings.items.get(row["judge"], {}).get(row["prompt_id"])
            if items is not None:
                used[row["judge"]].add(row["prompt_id"])
                listed = [item.model_dump() for item in items]
                if row["parse_status"] not in READ_STATUSES or listed != row["items"]:
                    row |= {"items": listed, "reason": "edited", "parse_status": "ok", "raw": None}
        out.write(shard, to_table(rows, CHECKLISTS))
        given.tick(shard + 1, given.num_shards, "")
    warnings = []
    for judge, edits in settings.items.items():
        lost = edits.keys() - used[judge]
        what = f"{len(lost):,} of {len(edits):,} edited lists of {judge} are of no prompt with a written one"
        if lost and settings.strict:
            if len(lost) == len(edits):
                raise BadInput(f"{what}; use the prompt_id of this run's table checklists")
            warnings.append(f"{what}, such as {min(lost)}")
    return {"counts": {judge: len(prompts) for judge, prompts in used.items()}, "warnings": warnings}
