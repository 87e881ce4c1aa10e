"""The audit of rows that were imported: every training row is found again among the rows of the user's source.

The source is read again. Prompts and answers are told apart by content, so a row that was changed, mislabelled or
joined to another prompt on its way is in no row of the source.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from ray_pipeline.audit.findings import AuditReport, Problems, Row, row_id
from ray_pipeline.data.dataset_rows import SPLITS, DatasetsConfig
from ray_pipeline.data.preference_sources import PreferenceSource, source_records
from ray_pipeline.data.prompts import split_of
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.sources.answers import Drop, chat_in_text, split_answer
from ray_pipeline.data.sources.chats import BadRow
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest, prompt_id

#: What a row of the source shows, and of which kind of training row: the prompt's id and the texts.
_PAIR, _GOOD, _BAD, _SHOWN = "pair", "good", "bad", "shown"


def audit_imported(
    source: PreferenceSource,
    datasets: str,
    config: DatasetsConfig,
    seed: int,
    val_fraction: float,
    digests: Mapping[str, str] | None = None,
    max_problems: int = 100,
) -> AuditReport:
    """Check the training rows of a source; they are in memory, of the source only digests are.

    Args:
        datasets: location of the datasets stage's folder.
        seed, val_fraction: of the prompts, for the split.
        digests: of the source; a Hub dataset is read at exactly that commit.
        max_problems: how many problems are described; all are counted.

    Raises:
        InputError: the source cannot be read any more, or is another than it was.
        FileNotFoundError: the folder has no stats.json: the datasets stage has not finished.
    """
    stats = Folder(datasets).read_json("stats.json", set_aside=True)
    if digests is not None and source.moves - {"name"} and dict(digests) != source.digests():
        raise InputError(f"{source.place} has changed since the run read it, so its rows cannot be compared")
    rows: collections.Counter[str] = collections.Counter(dict.fromkeys(config.kinds, 0))
    shown: set[str] = set()
    for record in source_records(source, None if digests is None else dict(digests)):
        rows["source"] += 1
        if not record.fault:
            shown.update(_shown(source, record.row))
    audit = Problems(max_problems)
    report = audit.problem
    prompts: set[str] = set()
    for kind in config.kinds:
        seen: set[str] = set()
        for split in SPLITS:
            count = 0
            files = audit.files(datasets, kind, split, stats["fingerprint"])
            for row in (row for table in files for row in table.to_pylist()):
                count += 1
                name = row_id(kind, row)
                prompts.add(row["prompt_id"])
                if (asked := prompt_id(row["prompt"])) != row["prompt_id"]:
                    report("prompt_id", kind, name, f"its prompt hashes to {asked}")
                if not row["split"] == split == split_of(asked, seed, val_fraction):
                    report("split", kind, name, f"in {split}, marked {row['split']}")
                if name in seen:
                    report("duplicate", kind, name, "the row occurs twice")
                seen.add(name)
                if not shown & set(_expected(kind, row)):
                    report("orphan", kind, name, f"no row of {source.place} has this prompt and answer")
            rows[kind] += count
            if count != stats["rows"][kind][split]:
                report("count", kind, split, f"stats.json says {stats['rows'][kind][split]}, the files hold {count}")
    rows["prompts"] = len(prompts)
    return AuditReport(dict(rows), dict(audit.found), audit.problems)


def _shown(source: PreferenceSource, row: Mapping[str, Any]) -> Iterator[str]:
    """Digests of what a row of the source shows; nothing where it shows no prompt and answer."""

    def answer(column: str, value: Any) -> tuple[str, str]:
        found = split_answer(row.get(source.prompt), value, (source.prompt, column), source.thoughts)
        return prompt_id(found.prompt), found.text

    try:
        if source.format == "paired":
            sides = {column: row[column] for column in (source.chosen, source.rejected)}
            chats = {column: chat_in_text(value) for column, value in sides.items()}
            values = chats if all(chats.values()) else sides
            (asked, chosen), (_, rejected) = (answer(column, value) for column, value in values.items())
            yield digest([_PAIR, asked, chosen, rejected])
            yield digest([_GOOD, asked, chosen])
            yield digest([_BAD, asked, rejected])
        elif source.format == "unpaired":
            yield digest([_GOOD if row[source.label] else _BAD, *answer(source.completion, row[source.completion])])
        else:
            column = source.messages if source.messages in row else source.completion
            yield digest([_SHOWN, *answer(column, row[column])])
    except (BadRow, Drop):
        return


def _expected(kind: str, row: Row) -> Iterator[str]:
    """Digests of what a row of the source must show for this training row, any of them."""
    if kind == "dpo":
        yield digest([_PAIR, row["prompt_id"], row["chosen"][-1]["content"], row["rejected"][-1]["content"]])
        return
    asked, text = row["prompt_id"], row["completion"][-1]["content"]
    good = kind == "sft" or row["label"]
    yield digest([_GOOD if good else _BAD, asked, text])
    if kind == "sft":
        yield digest([_SHOWN, asked, text])
