"""Preference data made elsewhere, as training rows.

Dropped rows are counted by reason. A prompt gets the split that the prompts stage would give it, so that a held-out
prompt is held out here too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.convert import pairs_to_kto
from ray_pipeline.data.dataset_rows import DatasetsConfig, Kind, pair_guard
from ray_pipeline.data.decontamination import NOTHING, Decontaminate, Screen
from ray_pipeline.data.preference_sources import Format, PreferenceSource, source_records
from ray_pipeline.data.prompts import FAULTS_SHOWN, kept_line, malformed_rows, split_of
from ray_pipeline.data.rows import add_counts, flat_counts
from ray_pipeline.data.sources import InputError, Record
from ray_pipeline.data.sources.answers import Answered, Drop, chat_in_text, finish_reason_of, split_answer
from ray_pipeline.data.sources.chats import BadRow
from ray_pipeline.data.spill import Spill
from ray_pipeline.data.tokens import Encode, TokenCounter
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.store.keys import digest, normalise_messages, normalise_text, prompt_id
from ray_pipeline.store.outside import is_number
from ray_pipeline.store.schemas import DPO, KTO, SFT, is_cut_off, to_table
from ray_pipeline.store.tables import ShardedTable

#: Kinds of dataset that each format can provide.
GIVES: dict[Format, tuple[Kind, ...]] = {
    "paired": ("kto", "dpo", "sft"),
    "unpaired": ("kto", "sft"),
    "demonstrations": ("sft",),
}

#: Schema that the rows of each format have first.
_SCHEMAS: dict[Format, pa.Schema] = {"paired": DPO, "unpaired": KTO, "demonstrations": SFT}

#: Whether the trainer will truncate a row, beside its columns until equal rows are one.
_TRUNCATED = pa.field("truncated", pa.bool_(), nullable=False)

#: Reasons for which a row of each format gives no training row, in the order of the checks. Where an answer ends within
#: its thoughts, `unfinished_thought` is counted too, and so are `cut_off` (by its finish reason) and `contaminated`.
DROPPED: dict[Format, tuple[str, ...]] = {
    "paired": (
        "malformed", "empty", "not_an_answer", "prompts_differ", "gap_not_positive", "equal_text", "prompt_too_long",
        "equal_after_truncation", "repeated",
    ),
    "unpaired": ("malformed", "empty", "not_an_answer", "no_label", "prompt_too_long", "repeated", "contradictory"),
    "demonstrations": ("malformed", "empty", "not_an_answer", "prompt_too_long", "repeated"),
}  # fmt: skip


class _Given(Settings):
    source: PreferenceSource
    digests: dict[str, str]
    datasets: DatasetsConfig
    seed: int
    val_fraction: float
    tokenizer: TokenizerSettings
    decontaminate: Decontaminate | None
    against: dict[str, str]


def preferences(
    source: PreferenceSource,
    settings: DatasetsConfig,
    policy: ModelSettings,
    *,
    seed: int,
    val_fraction: float,
    decontaminate: Decontaminate | None = None,
    name: str = "preferences",
) -> Stage:
    """The tables that `datasets.dataset_files` writes training files from.

    Args:
        seed, val_fraction: of the prompts stage, for the split.
        decontaminate: of the prompts; the answers are held against the same benchmarks.

    Raises:
        InputError: source or benchmark cannot be found, or the format cannot provide a configured kind of dataset.
    """
    digests, against = source.digests(), decontaminate.digests() if decontaminate else {}
    given = _Given(
        source=source,
        digests=digests,
        datasets=settings,
        seed=seed,
        val_fraction=val_fraction,
        tokenizer=policy.tokenizer,
        decontaminate=decontaminate,
        against=against,
    )
    return Stage(
        name=name,
        version=2,  # 2: equal rows are one row with their number in `copies`, whatever their blanks
        group="datasets",
        role="rows",
        work=WholeWork(function=import_preferences, settings=given, tables=tables_of(source.format, settings)),
        config={
            "source": source.decisive(exclude={"path"}),
            "datasets": settings.decisive(exclude={"seed", "rows_per_file", "min_gap"}),
            "seed": seed,
            "val_fraction": val_fraction,
            "chat_template_args": policy.chat_template_args,
            **({"decontaminate": decontaminate.decisive()} if decontaminate else {}),
        },
        external={**digests, **against, **policy.weights()},
    )


def tables_of(format: Format, settings: DatasetsConfig) -> tuple[Kind, ...]:
    """Tables that a source of this format is read into. Raises InputError for a kind or weights that it cannot
    provide."""
    if settings.weights:
        raise InputError("datasets.weights come from judges' scores, which imported rows do not have; set it to false")
    for kind in settings.kinds:
        if kind not in GIVES[format]:
            raise InputError(
                f"{format} rows cannot provide {kind} data, which needs {'pairs' if kind == 'dpo' else 'labels'}; "
                f"they provide {' and '.join(GIVES[format])}: choose another method or another source"
            )
    return settings.row_kinds if format == "paired" else tuple(settings.kinds)


def import_preferences(given: WholeInput) -> dict[str, Any]:
    settings: _Given = given.settings
    kinds = tables_of(settings.source.format, settings.datasets)
    encode = TokenCounter.load(settings.tokenizer)
    folders = {kind: given.folder if len(kinds) == 1 else given.folder / kind for kind in kinds}
    out = {kind: ShardedTable(folders[kind].location, kind, given.num_shards, given.fingerprint) for kind in kinds}

    def write(shard: int, tables: Mapping[Kind, pa.Table]) -> None:
        for kind in kinds:
            out[kind].write(shard, tables[kind])

    try:
        screen = Screen(settings.decontaminate, "rows", settings.against)
        options = settings.source, settings.datasets, encode, settings.seed, settings.val_fraction
        counts = read_preferences(*options, write, given.num_shards, settings.digests, screen)
    except InputError as error:
        raise BadInput(str(error)) from error
    for kind in kinds:
        if not counts[kind]["kept"]:
            why = ", ".join(f"{name} {n:,}" for name, n in flat_counts(counts[kind]).items() if n)
            raise BadInput(f"no row of the source is left as {kind} data: {why}")
    found, rows = counts["source"], ", ".join(f"{kind} {counts[kind]['kept']}" for kind in kinds)
    thoughts = f"; thoughts split off from {found['thoughts']:,} answers" if found.get("thoughts") else ""
    given.log(f"{rows}; {kept_line(found)}{thoughts}")
    return {
        "counts": flat_counts({kind: counts[kind] for kind in kinds}),
        "source": found,
        "digests": settings.digests,
        "warnings": malformed_rows(given.log, found, found.get("faults", ())) + screen.warnings(),
        **screen.facts(),
    }


def read_preferences(
    source: PreferenceSource,
    config: DatasetsConfig,
    encode: Encode,
    seed: int,
    val_fraction: float,
    write: Callable[[int, Mapping[Kind, pa.Table]], None],
    num_shards: int = 1,
    digests: dict[str, str] | None = None,
    screen: Screen = NOTHING,
) -> dict[str, dict[str, Any]]:
    """All rows of a source as tables of the schemas KTO, DPO and SFT, as far as its format provides them.

    Of equal rows, those with the same prompt, answers and label, the first is kept, and `copies` is their number. One
    shard is in memory.

    Args:
        encode: token counter of the policy, for the length limits of `config`.
        write: is called with each shard and its tables, in order.
        digests: what `source.digests` returned: a Hub dataset is read at exactly that commit.
        screen: rows whose prompt or answers it drops are `contaminated`.

    Returns:
        Counts: under `source` rows `read`, `kept` and `dropped` by reason (read = kept + the sum of
        dropped), with the `faults` of the first malformed ones if there are any; and for each kind what
        `datasets.kto_rows` and `convert` count.

    Raises:
        InputError: a file or column does not match the format, or no row does; the message names it.
    """
    split = functools.partial(split_of, seed=seed, val_fraction=val_fraction)
    reader = _Reader(source, config, encode, split, screen)
    with Spill(_SCHEMAS[source.format].append(_TRUNCATED), num_shards) as spill:
        for record in source_records(source, digests):
            made = reader.take(record)
            if made is not None:
                spill.add(made)
        if not reader.counts["read"]:
            raise InputError(f"{source.place} has no rows; check that it was written")
        if reader.counts["dropped"]["malformed"] == reader.counts["read"]:
            raise InputError(f"all {reader.counts['read']} rows are malformed: {reader.counts['faults'][0]}")
        for shard in range(num_shards):
            write(shard, reader.settle(spill.read(shard)))
    return reader.counted()


# --- rows -------------------------------------------------------------------------------------------------------------


class _Reader:
    """Turns rows of a source into training rows, with counts."""

    def __init__(
        self, source: PreferenceSource, config: DatasetsConfig, encode: Encode, split: Any, screen: Screen
    ) -> None:
        self._source, self._config, self._encode, self._split, self._screen = source, config, encode, split, screen
        self._rows: dict[Kind, int] = {}
        self._converted: dict[str, Any] = {}
        self._truncated = 0
        self.counts: dict[str, Any] = {
            "read": 0,
            "kept": 0,
            "dropped": dict.fromkeys(DROPPED[source.format], 0),
        }

    def take(self, record: Record) -> dict[str, Any] | None:
        """The training row, with `truncated` beside its columns, or None when the row was dropped (and counted)."""
        self.counts["read"] += 1
        make = {"paired": self._pair, "unpaired": self._labelled, "demonstrations": self._shown}[self._source.format]
        fault = record.fault and f"{record.where} {record.fault}"
        try:
            if not fault:
                made = make(record.row)
                chats = (made[name] for name in ("prompt", "chosen", "rejected", "completion") if name in made)
                if self._screen.drops(*(message["content"] for chat in chats for message in chat)):
                    raise Drop("contaminated")
                return made
        except BadRow as bad:
            fault = f"{record.where}: {bad}"
        except Drop as drop:
            dropped = self.counts["dropped"]
            dropped[str(drop)] = dropped.get(str(drop), 0) + 1
            return None
        self.counts["dropped"]["malformed"] += 1
        faults = self.counts.setdefault("faults", [])
        faults += [fault] if len(faults) < FAULTS_SHOWN else []
        return None

    def settle(self, table: pa.Table) -> dict[Kind, pa.Table]:
        """The tables of a shard, from all its rows: equal ones as one, and none where labels of an answer differ."""
        form, dropped = self._source.format, self.counts["dropped"]
        texts = ("chosen", "rejected") if form == "paired" else ("completion",)
        equal: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        names: dict[tuple[str, str], str] = {}  # of answers that differ in blanks alone, the first one's id
        for row in table.to_pylist():
            key = (row["prompt_id"], *(normalise_text(row[name][-1]["content"]) for name in texts))
            if form == "paired":
                for name, text in zip(texts, key[1:], strict=True):
                    row[f"{name}_id"] = names.setdefault((key[0], text), row[f"{name}_id"])
            equal.setdefault(key, []).append(row)
        kept = []
        for same in equal.values():
            if len({row.get("label") for row in same}) > 1:
                dropped["contradictory"] += len(same)
                continue
            dropped["repeated"] += len(same) - 1
            self._truncated += same[0]["truncated"]
            kept.append({**same[0], "copies": len(same)})
        made = to_table(kept, _SCHEMAS[form])
        self.counts["kept"] += made.num_rows
        tables: dict[Kind, pa.Table] = {"sft": made}
        if form == "paired":
            kto, found = pairs_to_kto(made)
            self._converted = add_counts([self._converted, found])
            tables = {"dpo": made, "kto": kto}
        elif form == "unpaired":
            tables = {"kto": made, "sft": made.filter(made["label"]).select(SFT.names).cast(SFT)}
        for kind, rows in tables.items():
            self._rows[kind] = self._rows.get(kind, 0) + rows.num_rows
        return tables

    def counted(self) -> dict[str, dict[str, Any]]:
        """Counts of the source and of each kind of rows, after all shards."""
        own = {"dropped": self.counts["dropped"], "truncated": self._truncated}
        counts: dict[str, dict[str, Any]] = {"source": self.counts}
        for kind, rows in self._rows.items():
            counts[kind] = {"kept": rows, **own}
        if self._source.format == "paired":
            counts |= {"dpo": {"prompts": self.counts["read"], **counts["dpo"]}, "kto": self._converted}
        return counts

    def _pair(self, row: Mapping[str, Any]) -> dict[str, Any]:
        source = self._source
        values = {name: row[column] for name, column in (("chosen", source.chosen), ("rejected", source.rejected))}
        if any(not value for value in values.values()):
            raise Drop("empty")
        chats = {name: chat_in_text(value) for name, value in values.items()}
        if all(chats.values()):  # one answer may be a chat as JSON text; two are columns of chats
            values = chats
        sides = {
            name: split_answer(row.get(source.prompt), value, (source.prompt, getattr(source, name)), source.thoughts)
            for name, value in values.items()
        }
        for name in sides:
            _check_whole(values[name])
        (prompt, chosen, _), (other, rejected, _) = sides["chosen"], sides["rejected"]
        if normalise_messages(prompt) != normalise_messages(other):
            raise Drop("prompts_differ")
        high, low = (
            None if name is None or row[name] is None else _number(row[name])
            for name in (source.chosen_score, source.rejected_score)
        )
        gap = None if high is None or low is None else high - low
        if gap is not None and gap <= 0:
            raise Drop("gap_not_positive")
        reason, cut = pair_guard(prompt, chosen, rejected, self._config, self._encode)
        if reason:
            raise Drop(reason)
        asked = prompt_id(prompt)
        self._split_off(*sides.values())
        return {
            "prompt_id": asked,
            "chosen_id": _answer_id(asked, chosen),
            "rejected_id": _answer_id(asked, rejected),
            "split": self._split(asked),
            "prompt": prompt,
            "chosen": _answer(chosen),
            "rejected": _answer(rejected),
            "score_chosen": high,
            "score_rejected": low,
            "score_gap": gap,
            "truncated": cut,
        }

    def _labelled(self, row: Mapping[str, Any]) -> dict[str, Any]:
        label = row[self._source.label]
        shown = self._answered(row, self._source.completion)
        if label is None:
            raise Drop("no_label")
        if not isinstance(label, bool) and label not in (0, 1):
            raise BadRow(f"column {self._source.label!r} must be true or false, not {label!r}")
        return {**shown, "label": bool(label), "scores": None}

    def _shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        column = self._source.messages if self._source.messages in row else self._source.completion
        return self._answered(row, column)

    def _answered(self, row: Mapping[str, Any], column: str) -> dict[str, Any]:
        if not row[column]:
            raise Drop("empty")
        own, value = self._source.prompt, row[column]
        if row.get(own) is None:
            value = chat_in_text(value) or value
        answered = split_answer(row.get(own), value, (own, column), self._source.thoughts)
        _check_whole(value, row.get(self._source.finish_column))
        messages, text, _ = answered
        self._check_prompt(messages)
        asked = prompt_id(messages)
        self._split_off(answered)
        return {
            "candidate_id": _answer_id(asked, text),
            "prompt_id": asked,
            "split": self._split(asked),
            "prompt": messages,
            "completion": _answer(text),
            "final_score": None,
            "truncated": len(self._encode(messages, _answer(text))) > self._config.max_length,
        }

    def _check_prompt(self, prompt: list[dict[str, str]]) -> None:
        if len(self._encode(prompt, None)) > self._config.max_prompt_length:
            raise Drop("prompt_too_long")

    def _split_off(self, *answers: Answered) -> None:
        if found := sum(answer.thoughts is not None for answer in answers):
            self.counts["thoughts"] = self.counts.get("thoughts", 0) + found


def _check_whole(value: Any, finish_reason: Any = None) -> None:
    if is_cut_off(finish_reason_of(value, finish_reason)):
        raise Drop("cut_off")


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _answer_id(prompt: str, text: str) -> str:
    return digest(["answer", prompt, text])


def _number(value: Any) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise BadRow(f"a score must be a number, not {value!r}")
    return float(value)
