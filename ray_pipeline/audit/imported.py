"""The audit of rows that were imported: every training row is found again among the rows of the user's source.

The source is read again. Prompts and answers are told apart by content, so a row that was changed, mislabelled or
joined to another prompt on its way is in no row of the source. Rows that are equal but for blanks are counted.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_pipeline.audit.findings import AuditReport, Problems, Row, row_id
from ray_pipeline.data.dataset_rows import SPLITS, DatasetsConfig
from ray_pipeline.data.preference_sources import PreferenceSource, source_records
from ray_pipeline.data.prompts import split_of
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.sources.answers import Answered, Drop, chat_in_text, finish_reason_of, split_answer
from ray_pipeline.data.sources.chats import BadRow
from ray_pipeline.data.tokens import Encode
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest, normalise_text, prompt_id
from ray_pipeline.store.outside import is_number
from ray_pipeline.store.schemas import is_cut_off

#: What a row of the source shows, and of which kind of training row: the prompt's id and the texts.
_PAIR, _GOOD, _BAD, _SHOWN = "pair", "good", "bad", "shown"


def audit_imported(
    source: PreferenceSource,
    datasets: str,
    config: DatasetsConfig,
    seed: int,
    val_fraction: float,
    digests: Mapping[str, str] | None = None,
    encode: Encode | None = None,
    max_problems: int = 100,
) -> AuditReport:
    """Check the training rows of a source; they are in memory, of the source only digests are.

    Args:
        datasets: location of the datasets stage's folder.
        seed, val_fraction: of the prompts, for the split.
        digests: of the source; a Hub dataset is read at exactly that commit.
        encode: token counter of the policy; without it, no row is taken to be left out for its length.
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
    copies: collections.Counter[str] = collections.Counter()
    for record in source_records(source, None if digests is None else dict(digests)):
        rows["source"] += 1
        for content in () if record.fault else _shown(source, record.row, config, encode):
            shown.add(digest(content))
            copies[_equal(content)] += 1
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
                if not any(digest(content) in shown for content in _expected(kind, row)):
                    report("orphan", kind, name, f"no row of {source.place} has this prompt and answer, whole")
                elif stats.get("rules", 1) > 2:
                    same = sum(copies[_equal(content)] for content in _expected(kind, row))
                    if row["copies"] != same:
                        report(
                            "repeated", kind, name, f"copies is {row['copies']}, {same} rows of the source are equal"
                        )
                    if kind == "kto" and copies[_equal(next(_expected(kind, {**row, "label": not row["label"]})))]:
                        report(
                            "repeated", kind, name, "the answer has the other label too and should have been left out"
                        )
            rows[kind] += count
            if count != stats["rows"][kind][split]:
                report("count", kind, split, f"stats.json says {stats['rows'][kind][split]}, the files hold {count}")
    rows["prompts"] = len(prompts)
    return AuditReport(dict(rows), dict(audit.found), audit.problems)


def _shown(
    source: PreferenceSource, row: Mapping[str, Any], config: DatasetsConfig, encode: Encode | None
) -> Iterator[list[str]]:
    """Contents that a row of the source shows; none where it gives no training row."""

    def answer(column: str, value: Any) -> Answered:
        if not value:
            raise Drop("empty")
        if row.get(source.prompt) is None:
            value = chat_in_text(value) or value
        if is_cut_off(finish_reason_of(value, row.get(source.finish_column))):
            raise Drop("cut_off")
        return split_answer(row.get(source.prompt), value, (source.prompt, column), source.thoughts)

    def fits(*answers: Answered) -> bool:
        if encode is None:
            return True
        ids = [encode(one.prompt, [{"role": "assistant", "content": one.text}]) for one in answers]
        cut = {tuple(one[: config.max_length]) for one in ids}
        return len(encode(answers[0].prompt, None)) <= config.max_prompt_length and len(cut) == len(ids)

    try:
        if source.format == "paired":
            sides = {column: row[column] for column in (source.chosen, source.rejected)}
            chats = {column: chat_in_text(value) for column, value in sides.items()}
            values = chats if all(chats.values()) else sides
            good, bad = (answer(column, value) for column, value in values.items())
            asked = prompt_id(good.prompt)
            same = asked != prompt_id(bad.prompt) or normalise_text(good.text) == normalise_text(bad.text)
            if not same and _in_order(source, row) and fits(good, bad):
                yield [_PAIR, asked, good.text, bad.text]
                yield [_GOOD, asked, good.text]
                yield [_BAD, asked, bad.text]
            return
        column = source.completion
        if source.format == "demonstrations" and source.messages in row:
            column = source.messages
        shown = answer(column, row[column])
        label = None if source.format == "demonstrations" else row[source.label]
        if (source.format == "demonstrations" or label in (0, 1)) and fits(shown):
            mark = _SHOWN if label is None else _GOOD if label else _BAD
            yield [mark, prompt_id(shown.prompt), shown.text]
    except (BadRow, Drop):
        return


def _in_order(source: PreferenceSource, row: Mapping[str, Any]) -> bool:
    """Whether the scores of a pair, as far as it has some, are numbers that do not contradict it."""
    scores = [row[name] for name in (source.chosen_score, source.rejected_score) if name and row[name] is not None]
    numbers = all(is_number(n) and math.isfinite(n) for n in scores)
    return numbers and (len(scores) < 2 or scores[0] > scores[1])


def _equal(content: Sequence[str]) -> str:
    """Digest of a content; equal for texts that `normalise_text` does not tell apart."""
    mark, asked, *texts = content
    return digest([mark, asked, *map(normalise_text, texts)])


def _expected(kind: str, row: Row) -> Iterator[list[str]]:
    """Contents of which a row of the source must show one for this training row."""
    if kind == "dpo":
        yield [_PAIR, row["prompt_id"], row["chosen"][-1]["content"], row["rejected"][-1]["content"]]
        return
    asked, text = row["prompt_id"], row["completion"][-1]["content"]
    yield [_GOOD if kind == "sft" or row["label"] else _BAD, asked, text]
    if kind == "sft":
        yield [_SHOWN, asked, text]
