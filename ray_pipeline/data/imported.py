"""Preference data made elsewhere, as training rows.

Dropped rows are counted by reason. A prompt gets the split that the prompts stage would give it, so that a held-out
prompt is held out here too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.convert import pairs_to_kto
from ray_pipeline.data.dataset_rows import DatasetsConfig, Kind
from ray_pipeline.data.preference_sources import (
    Format,
    HubPreferences,
    PreferenceSource,
    source_digests,
    source_place,
    source_records,
)
from ray_pipeline.data.prompts import split_of
from ray_pipeline.data.rows import add_counts, flat_counts, gather, shard_rows
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.tokens import Encode, TokenCounter
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.store.keys import digest, normalise_messages, normalise_text, prompt_id
from ray_pipeline.store.schemas import DPO, KTO, SFT, to_table
from ray_pipeline.store.tables import ShardedTable

_BATCH_ROWS = 1024

#: Kinds of dataset that each format can provide.
GIVES: dict[Format, tuple[Kind, ...]] = {
    "paired": ("kto", "dpo", "sft"),
    "unpaired": ("kto", "sft"),
    "demonstrations": ("sft",),
}

#: Reasons for which a row of each format gives no training row, in the order of the checks.
DROPPED: dict[Format, tuple[str, ...]] = {
    "paired": (
        "empty", "not_an_answer", "prompts_differ", "gap_not_positive", "equal_text", "prompt_too_long",
        "equal_after_truncation", "repeated",
    ),
    "unpaired": ("empty", "not_an_answer", "no_label", "prompt_too_long", "repeated", "contradictory"),
    "demonstrations": ("empty", "not_an_answer", "prompt_too_long", "repeated"),
}  # fmt: skip


class _Given(Settings):
    source: PreferenceSource
    digests: dict[str, str]
    datasets: DatasetsConfig
    seed: int
    val_fraction: float
    tokenizer: TokenizerSettings


def preferences(
    source: PreferenceSource,
    settings: DatasetsConfig,
    policy: ModelSettings,
    *,
    seed: int,
    val_fraction: float,
    name: str = "preferences",
) -> Stage:
    """The tables that `datasets.dataset_files` writes training files from.

    Args:
        seed, val_fraction: of the prompts stage, for the split.

    Raises:
        InputError: the source cannot be found, or its format cannot provide a configured kind of dataset.
    """
    digests = source_digests(source)
    given = _Given(
        source=source,
        digests=digests,
        datasets=settings,
        seed=seed,
        val_fraction=val_fraction,
        tokenizer=policy.tokenizer,
    )
    return Stage(
        name=name,
        group="datasets",
        role="rows",
        work=WholeWork(function=import_preferences, settings=given, tables=tables_of(source.format, settings)),
        config={
            "source": source.decisive(exclude={"path"}),
            "datasets": settings.decisive(exclude={"seed", "rows_per_file", "min_gap"}),
            "seed": seed,
            "val_fraction": val_fraction,
            "chat_template_args": policy.chat_template_args,
        },
        external={**digests, **policy.weights()},
    )


def tables_of(format: Format, settings: DatasetsConfig) -> tuple[Kind, ...]:
    """Tables that a source of this format is read into. Raises InputError for a kind that it cannot provide."""
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
    try:
        tables, counts = read_preferences(
            settings.source, settings.datasets, encode, settings.seed, settings.val_fraction, settings.digests
        )
    except InputError as error:
        raise BadInput(str(error)) from error
    for kind in kinds:
        table = tables[kind]
        where = given.folder if len(kinds) == 1 else given.folder / kind
        out = ShardedTable(where.location, kind, given.num_shards, given.fingerprint)
        for shard, part in enumerate(shard_rows(table, given.num_shards)):
            out.write(shard, part)
    for kind in kinds:
        if not tables[kind].num_rows:
            raise BadInput(f"no row of the source is left as {kind} data: {counts[kind]}")
    given.log(", ".join(f"{kind} {tables[kind].num_rows}" for kind in kinds) + f"; {counts['source']}")
    return {"counts": flat_counts({kind: counts[kind] for kind in kinds}), "source": counts["source"]}


def read_preferences(
    source: PreferenceSource,
    config: DatasetsConfig,
    encode: Encode,
    seed: int,
    val_fraction: float,
    digests: Mapping[str, str] | None = None,
) -> tuple[dict[Kind, pa.Table], dict[str, dict[str, Any]]]:
    """All rows of a source as tables of the schemas KTO, DPO and SFT, as far as its format provides them.

    Args:
        encode: token counter of the policy, for the length limits of `config`.
        digests: what `source_digests` returned: a Hub dataset is read at exactly that commit.

    Returns:
        The tables, and counts: under `source` rows `read`, `kept` and `dropped` by reason (read = kept + the sum of
        dropped), and for each kind what `datasets.kto_rows` and `convert` count.

    Raises:
        InputError: a file, column or value does not match the format; the message names it and the row.
    """
    reader = _Reader(source, config, encode, functools.partial(split_of, seed=seed, val_fraction=val_fraction))
    commit = (digests or {}).get(source.name) if isinstance(source, HubPreferences) else None
    schema = {"paired": DPO, "unpaired": KTO, "demonstrations": SFT}[source.format]
    parts, batch = [schema.empty_table()], []
    for where, row in source_records(source, commit):
        made = reader.take(where, row)
        if made is not None:
            batch.append(made)
        if len(batch) == _BATCH_ROWS:
            parts.append(to_table(batch, schema))
            batch = []
    table = pa.concat_tables([*parts, to_table(batch, schema)])
    if not reader.counts["read"]:
        raise InputError(f"{source_place(source)} has no rows; check that it was written")
    if source.format == "unpaired":
        table = reader.without_contradictions(table)
    reader.counts["kept"] = table.num_rows
    counts: dict[str, dict[str, Any]] = {"source": reader.counts}
    own = {"kept": table.num_rows, "dropped": reader.counts["dropped"], "truncated": reader.truncated}
    if source.format == "paired":
        kto, found = _by_prompt(table)
        return {"dpo": table, "kto": kto}, {**counts, "dpo": {"prompts": reader.counts["read"], **own}, "kto": found}
    if source.format == "unpaired":
        wanted = table.filter(table["label"])
        sft = wanted.select(SFT.names).cast(SFT)
        return {"kto": table, "sft": sft}, {**counts, "kto": own, "sft": {**own, "kept": sft.num_rows}}
    return {"sft": table}, {**counts, "sft": own}


def _by_prompt(pairs: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """`pairs_to_kto`, piece by piece; all pairs of a prompt are in the same piece."""
    made = [pairs_to_kto(piece) for piece in shard_rows(pairs, 64)]
    return pa.concat_tables([table for table, _ in made]), add_counts([found for _, found in made])


# --- rows -------------------------------------------------------------------------------------------------------------


class _Drop(Exception):
    """A row gives no training row; the argument is the reason."""


class _Reader:
    """Turns rows of a source into training rows, with counts."""

    def __init__(self, source: PreferenceSource, config: DatasetsConfig, encode: Encode, split: Any) -> None:
        self._source, self._config, self._encode, self._split = source, config, encode, split
        self._seen: set[str] = set()
        self._labels: dict[str, set[bool]] = {}
        self.truncated = 0
        self.counts: dict[str, Any] = {"read": 0, "kept": 0, "dropped": dict.fromkeys(DROPPED[source.format], 0)}

    def take(self, where: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The training row, or None when the row was dropped (and counted)."""
        self.counts["read"] += 1
        make = {"paired": self._pair, "unpaired": self._labelled, "demonstrations": self._shown}[self._source.format]
        try:
            return make(where, row)
        except _Drop as drop:
            self.counts["dropped"][str(drop)] += 1
            return None

    def without_contradictions(self, table: pa.Table) -> pa.Table:
        """The table without the answers that have both labels."""
        torn = {name for name, labels in self._labels.items() if len(labels) > 1}
        keep = np.flatnonzero([name not in torn for name in table["candidate_id"].to_pylist()])
        self.counts["dropped"]["contradictory"] += table.num_rows - len(keep)
        return gather(table, keep)

    def _pair(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        source = self._source
        values = {name: row[column] for name, column in (("chosen", source.chosen), ("rejected", source.rejected))}
        if any(not value for value in values.values()):
            raise _Drop("empty")
        sides = {
            name: _split_answer(row.get(source.prompt), value, f"{where}: column {name!r}")
            for name, value in values.items()
        }
        (prompt, chosen), (other, rejected) = sides["chosen"], sides["rejected"]
        if prompt != other:
            raise _Drop("prompts_differ")
        high, low = (
            None if name is None or row[name] is None else _number(row[name], where)
            for name in (source.chosen_score, source.rejected_score)
        )
        gap = None if high is None or low is None else high - low
        if gap is not None and gap <= 0:
            raise _Drop("gap_not_positive")
        if normalise_text(chosen) == normalise_text(rejected):
            raise _Drop("equal_text")
        self._check_prompt(prompt)
        left, right = (self._encode(prompt, _answer(text)) for text in (chosen, rejected))
        limit = self._config.max_length
        if left[:limit] == right[:limit]:
            raise _Drop("equal_after_truncation")
        asked = prompt_id(prompt)
        ids = [_answer_id(asked, text) for text in (chosen, rejected)]
        self._once(digest(["pair", *ids]))
        self.truncated += max(len(left), len(right)) > limit
        return {
            "prompt_id": asked,
            "chosen_id": ids[0],
            "rejected_id": ids[1],
            "split": self._split(asked),
            "prompt": prompt,
            "chosen": _answer(chosen),
            "rejected": _answer(rejected),
            "chosen_score": high,
            "rejected_score": low,
            "score_gap": gap,
        }

    def _labelled(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        label = row[self._source.label]
        shown = self._answered(where, row[self._source.prompt], row[self._source.completion])
        if label is None:
            raise _Drop("no_label")
        if not isinstance(label, bool) and label not in (0, 1):
            raise InputError(f"{where}: column {self._source.label!r} must be true or false, not {label!r}")
        labels = self._labels.setdefault(shown["candidate_id"], set())
        labels.add(bool(label))
        self._once(shown["candidate_id"])
        return {**shown, "label": bool(label), "scores": None}

    def _shown(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        if self._source.messages in row:
            shown = self._answered(where, None, row[self._source.messages])
        else:
            shown = self._answered(where, row[self._source.prompt], row[self._source.completion])
        self._once(shown["candidate_id"])
        return shown

    def _answered(self, where: str, prompt: Any, completion: Any) -> dict[str, Any]:
        if not completion:
            raise _Drop("empty")
        messages, text = _split_answer(prompt, completion, where)
        self._check_prompt(messages)
        self.truncated += len(self._encode(messages, _answer(text))) > self._config.max_length
        asked = prompt_id(messages)
        return {
            "candidate_id": _answer_id(asked, text),
            "prompt_id": asked,
            "split": self._split(asked),
            "prompt": messages,
            "completion": _answer(text),
            "final_score": None,
        }

    def _check_prompt(self, prompt: list[dict[str, str]]) -> None:
        if len(self._encode(prompt, None)) > self._config.max_prompt_length:
            raise _Drop("prompt_too_long")

    def _once(self, name: str) -> None:
        if name in self._seen:
            raise _Drop("repeated")
        self._seen.add(name)


def _split_answer(prompt: Any, value: Any, where: str) -> tuple[list[dict[str, str]], str]:
    """Prompt messages and the text of the answer, from strings, messages, or a whole conversation.

    Raises:
        InputError: a value is neither text nor messages, or a text comes without a prompt.
        _Drop: the last message is not an answer, or one of the two is empty.
    """
    if isinstance(value, str):
        if prompt is None:
            raise InputError(
                f"{where} is plain text without a prompt; put the prompt into its own column (TRL's "
                "`extract_prompt` does it for conversations written as one text)"
            )
        asked, text = _prompt(prompt, where), value
    else:
        turns = _turns(value, where)
        if not turns or turns[-1]["role"] != "assistant":
            raise _Drop("not_an_answer")
        text, before = turns[-1]["content"], turns[:-1]
        # The prompt is in its own column, at the start of the conversation, or in both (ultrafeedback_binarized).
        asked = before if before or prompt is None else _prompt(prompt, where)
        if before and isinstance(prompt, list):
            own = _prompt(prompt, where)
            asked = before if before[: len(own)] == own else [*own, *before]
    if not text.strip() or not asked or not asked[-1]["content"]:
        raise _Drop("empty")
    if asked[-1]["role"] == "assistant":
        raise _Drop("not_an_answer")
    return asked, text


def _prompt(value: Any, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return normalise_messages([{"role": "user", "content": value}])
    return normalise_messages(_turns(value, where))


def _turns(value: Any, where: str) -> list[dict[str, str]]:
    """Messages with normalised roles; contents of all but the last are normalised as prompts are."""
    if not isinstance(value, list):
        raise InputError(f"{where} holds a {type(value).__name__}, not a text or a list of chat messages")
    for place, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"{where}: message {place} has no role and content as text; rename its keys to these two")
    *before, last = value or [{"role": "user", "content": ""}]
    return [*normalise_messages(before), {"role": last["role"].strip().lower(), "content": last["content"]}]


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _answer_id(prompt: str, text: str) -> str:
    return digest(["answer", prompt, text])


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise InputError(f"{where}: a score must be a number, not {value!r}")
    return float(value)
