"""The datasets stage: decisions become rows that TRL's KTO and DPO trainers take as they are.

`kto_rows` and `dpo_rows` make the rows of one shard. `write_dataset_files` is the one global step of a run: it brings
the kept rows of all shards into training order and writes them as numbered files, a data set card and `stats.json`.

TRL 1.16 has no limit for prompts any more, drops prompts that fill `max_length` without a word, cuts completions at
`max_length`, and feeds KTO rows in the order of the file. So lengths are enforced and counted here, with the policy's
own tokenizer, and the order is made here.
"""

from __future__ import annotations

import collections
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.rows import KeyMismatch, Rows, gather, one_array, refuse_repeats, rows_of
from ray_pipeline.engines.models import TokenizerSettings
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import normalise_text, unit_hash
from ray_pipeline.store.schemas import DPO, KTO, READ_STATUSES, TABLES, to_table

Messages = Sequence[Mapping[str, str]]
Kind = Literal["kto", "dpo", "sft"]
SPLITS = ("train", "val")

#: Why a desirable or undesirable candidate gives no KTO row, in the order in which it is asked.
KTO_DROPPED = ("empty_response", "prompt_too_long")
#: Why a prompt gives no DPO pair, in the order in which it is asked.
DPO_DROPPED = (
    "no_desirable_or_undesirable", "no_desirable", "no_undesirable", "gap_too_small", "equal_text", "prompt_too_long",
    "equal_after_truncation",
)  # fmt: skip


class DatasetsConfig(Settings):
    """Which datasets are made, and the limits that their rows keep."""

    kinds: list[Kind] = Field(
        ["kto", "dpo"],
        min_length=1,
        description='"kto", "dpo" and "sft" (the chosen answers of the pairs), one or more of them',
    )
    min_gap: float = Field(
        1.5, ge=0, allow_inf_nan=False, description="smallest difference of final scores of a DPO pair"
    )
    max_length: int = Field(
        1024, ge=2, description="tokens of prompt and completion at which the trainer cuts; must equal the trainer's"
    )
    max_prompt_length: int = Field(
        512, ge=1, description="prompts of more tokens (with the generation prompt) are left out"
    )
    seed: int = Field(0, description="of the training order")
    rows_per_file: int = Field(10_000, ge=1, description="rows of one Parquet file")

    @model_validator(mode="after")
    def _fits(self) -> DatasetsConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "or prompts leave no room for an answer"
            )
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds names a data set twice: {self.kinds}")
        return self

    @property
    def row_kinds(self) -> tuple[Kind, ...]:
        """The tables that the kinds are made from: SFT rows are the chosen halves of pairs."""
        wanted: dict[Kind, None] = dict.fromkeys("dpo" if kind == "sft" else kind for kind in self.kinds)
        return tuple(wanted)


# --- lengths ----------------------------------------------------------------------------------------------------------


class Encode(Protocol):
    """Token ids of a chat under the policy's template: of the prompt, ready for an answer, or of prompt and answer."""

    def __call__(self, messages: Messages, completion: Messages | None, /) -> list[int]: ...


class TokenCounter:
    """`Encode` with a Hugging Face tokenizer, as TRL tokenises chats. Remembers the last `cache_size` chats.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Any, cache_size: int = 4096, chat_template_args: Mapping[str, Any] | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "of the policy"
            raise ValueError(f"the tokenizer {name} has no chat template; use an instruct model or add a template")
        self._tokenizer, self._args = tokenizer, dict(chat_template_args or {})
        self._size = cache_size
        self._cache: collections.OrderedDict[tuple[Any, ...], array[int]] = collections.OrderedDict()

    @classmethod
    def load(cls, given: TokenizerSettings) -> TokenCounter:
        """From a local folder or a model of the hub."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            given.model, revision=given.revision, trust_remote_code=given.trust_remote_code
        )
        return cls(tokenizer, chat_template_args=given.chat_template_args)

    def __call__(self, messages: Messages, completion: Messages | None = None) -> list[int]:
        chat = [*messages, *(completion or ())]
        key = (completion is None, *((m["role"], m["content"]) for m in chat))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key].tolist()
        text = self._tokenizer.apply_chat_template(
            [dict(m) for m in chat], tokenize=False, add_generation_prompt=completion is None, **self._args
        )
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self._cache[key] = array("i", ids)
        if len(self._cache) > self._size:
            self._cache.popitem(last=False)
        return ids


# --- rows of one shard ------------------------------------------------------------------------------------------------


def kto_rows(
    prompts: pa.Table,
    candidates: pa.Table,
    verdicts: pa.Table,
    decisions: pa.Table,
    config: DatasetsConfig,
    encode: Encode,
    judges: Sequence[str] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """One row for each desirable or undesirable candidate of a shard, in the order of `decisions`.

    Args:
        judges: whose scores the rows carry, in this order; by default all of `verdicts`, by name.

    Returns:
        A table of schema KTO, and counts: `candidates` (rows of `decisions`), `kept`, `dropped` by reason
        (`KTO_DROPPED`) and `truncated` (kept rows of more than `max_length` tokens, which the trainer cuts).

    Raises:
        KeyMismatch: a decision's candidate or prompt is missing or belongs to another, or an id occurs twice.
    """
    dropped = dict.fromkeys(KTO_DROPPED, 0)
    truncated = 0
    scores = _scores(verdicts, judges)
    rows = []
    for kept in _kept_candidates(prompts, candidates, decisions):
        completion = _answer(kept["response"])
        if _is_empty(kept["response"]):
            dropped["empty_response"] += 1
            continue
        if len(encode(kept["messages"], None)) > config.max_prompt_length:
            dropped["prompt_too_long"] += 1
            continue
        truncated += len(encode(kept["messages"], completion)) > config.max_length
        rows.append(
            {
                "candidate_id": kept["candidate_id"],
                "prompt_id": kept["prompt_id"],
                "split": kept["split"],
                "prompt": kept["messages"],
                "completion": completion,
                "label": kept["label"] == "desirable",
                "final_score": kept["final_score"],
                "scores": scores.get(kept["candidate_id"], []),
            }
        )
    counts = {"candidates": decisions.num_rows, "kept": len(rows), "dropped": dropped, "truncated": truncated}
    return to_table(rows, KTO), counts


def dpo_rows(
    prompts: pa.Table,
    candidates: pa.Table,
    verdicts: pa.Table,
    decisions: pa.Table,
    config: DatasetsConfig,
    encode: Encode,
    every_rejected: bool = False,
) -> tuple[pa.Table, dict[str, Any]]:
    """At most one pair for each prompt of a shard, sorted by prompt_id.

    Chosen is the desirable candidate of the highest final score, rejected the undesirable one of the lowest; of equal
    scores the smaller candidate_id. A pair that fails a guard is dropped, not replaced by the next best.

    Args:
        verdicts: not read; here so that all data sets are made by the same call.
        every_rejected: a pair with each undesirable candidate, the lowest first, not with the lowest alone. A prompt
            without a pair then counts once, one with several counts them all.

    Returns:
        A table of schema DPO, and counts: `prompts` (with decisions), `kept`, `dropped` by reason (`DPO_DROPPED`),
        `truncated` (kept pairs with a side of more than `max_length` tokens) and `empty_responses` (candidates that
        were left out of pairing). prompts = kept + the sum of dropped.

    Raises:
        KeyMismatch: as `kto_rows`.
    """
    sides: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
        p: ([], []) for p in decisions["prompt_id"].to_pylist()
    }
    empty = 0
    for kept in _kept_candidates(prompts, candidates, decisions):
        if _is_empty(kept["response"]):
            empty += 1
            continue
        sides[kept["prompt_id"]][kept["label"] == "undesirable"].append(kept)

    dropped = dict.fromkeys(DPO_DROPPED, 0)
    truncated = 0
    rows = []
    for prompt, (desirable, undesirable) in sorted(sides.items()):
        if reason := _no_pair(desirable, undesirable):
            dropped[reason] += 1
            continue
        chosen, worst = best_pair(desirable, undesirable)
        others = sorted(undesirable, key=lambda c: (c["final_score"], c["candidate_id"]))
        for rejected in others if every_rejected else [worst]:
            reason, cut = _guard(chosen, rejected, config, encode)
            if reason:
                dropped[reason] += 1
                continue
            truncated += cut
            rows.append(_pair(prompt, chosen, rejected))
    counts = {"prompts": len(sides), "kept": len(rows), "dropped": dropped}
    return to_table(rows, DPO), {**counts, "truncated": truncated, "empty_responses": empty}


def _pair(prompt: str, chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt_id": prompt,
        "chosen_id": chosen["candidate_id"],
        "rejected_id": rejected["candidate_id"],
        "split": chosen["split"],
        "prompt": chosen["messages"],
        "chosen": _answer(chosen["response"]),
        "rejected": _answer(rejected["response"]),
        "chosen_score": chosen["final_score"],
        "rejected_score": rejected["final_score"],
        "score_gap": chosen["final_score"] - rejected["final_score"],
    }


def best_pair(
    desirable: Sequence[Mapping[str, Any]], undesirable: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The candidate of the highest and the one of the lowest final_score; of equals the smaller candidate_id."""
    chosen = min(desirable, key=lambda c: (-c["final_score"], c["candidate_id"]))
    rejected = min(undesirable, key=lambda c: (c["final_score"], c["candidate_id"]))
    return chosen, rejected


def _no_pair(desirable: Sequence[Mapping[str, Any]], undesirable: Sequence[Mapping[str, Any]]) -> str | None:
    if desirable and undesirable:
        return None
    if not desirable and not undesirable:
        return "no_desirable_or_undesirable"
    return "no_undesirable" if desirable else "no_desirable"


def _guard(
    chosen: Mapping[str, Any], rejected: Mapping[str, Any], config: DatasetsConfig, encode: Encode
) -> tuple[str | None, bool]:
    """Why the pair teaches nothing (None if it does), and whether the trainer will cut a side of it."""
    if chosen["final_score"] - rejected["final_score"] < config.min_gap:
        return "gap_too_small", False
    if normalise_text(chosen["response"]) == normalise_text(rejected["response"]):
        return "equal_text", False
    if len(encode(chosen["messages"], None)) > config.max_prompt_length:
        return "prompt_too_long", False
    left, right = (encode(chosen["messages"], _answer(side["response"])) for side in (chosen, rejected))
    if left[: config.max_length] == right[: config.max_length]:
        return "equal_after_truncation", False
    return None, max(len(left), len(right)) > config.max_length


def _kept_candidates(prompts: pa.Table, candidates: pa.Table, decisions: pa.Table) -> list[dict[str, Any]]:
    """Desirable and undesirable candidates in the order of `decisions`, with prompt, split and response, by id."""
    refuse_repeats(one_array(decisions["candidate_id"]), "decisions: candidate_id")
    kept = decisions.filter(pc.is_in(decisions["label"], value_set=pa.array(["desirable", "undesirable"])))
    place = rows_of(kept["candidate_id"], candidates["candidate_id"], "decisions: candidate", "candidates")
    own = gather(candidates.select(["prompt_id", "response"]), place)
    prompt = gather(prompts, rows_of(kept["prompt_id"], prompts["prompt_id"], "decisions: prompt", "prompts"))
    strangers = kept.filter(pc.not_equal(one_array(kept["prompt_id"]), one_array(own["prompt_id"])))
    if strangers.num_rows:
        stranger = strangers["candidate_id"][0].as_py()
        raise KeyMismatch(f"decisions: candidate {stranger!r} has another prompt_id in candidates")
    joined = kept.select(["candidate_id", "prompt_id", "final_score", "label"])
    joined = joined.append_column("response", own["response"])
    for name in ("split", "messages"):
        joined = joined.append_column(name, prompt[name])
    rows: list[dict[str, Any]] = joined.to_pylist()
    return rows


def _scores(verdicts: pa.Table, judges: Sequence[str] | None) -> dict[str, list[dict[str, Any]]]:
    """Scores that were read, by candidate, in the order of `judges`."""
    read = pc.is_in(verdicts["parse_status"], value_set=pa.array(READ_STATUSES))
    rows = verdicts.filter(read).select(["candidate_id", "judge", "score"]).to_pylist()
    place = {judge: i for i, judge in enumerate(judges if judges is not None else sorted({r["judge"] for r in rows}))}
    scores: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in sorted((r for r in rows if r["judge"] in place), key=lambda r: place[r["judge"]]):
        scores[row["candidate_id"]].append({"judge": row["judge"], "score": row["score"]})
    return scores


def _answer(response: str | None) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": response or ""}]


def _is_empty(response: str | None) -> bool:
    return response is None or not response.strip()


#: What makes a row of each kind one of its own.
_KEYS: dict[Kind, tuple[str, ...]] = {
    "kto": ("candidate_id",),
    "dpo": ("prompt_id", "chosen_id", "rejected_id"),
    "sft": ("candidate_id",),
}


# --- training order ---------------------------------------------------------------------------------------------------


def order_kto(table: pa.Table, seed: int) -> pa.Table:
    """KTO rows in training order; depends on the rows and the seed alone, not on their order here.

    Each class is shuffled by hash(seed, candidate_id), then the two are interleaved so that any w consecutive rows
    hold w·n_desirable/n desirable ones, rounded up or down: every batch has about the ratio of the whole.
    """
    return gather(table, _kto_order(table, seed))


def order_dpo(table: pa.Table, seed: int) -> pa.Table:
    """DPO rows shuffled by hash(seed, ids); depends on the rows and the seed alone."""
    return gather(table, _hashed_order(table, seed, "dpo"))


def order_sft(table: pa.Table, seed: int) -> pa.Table:
    """SFT rows, likewise."""
    return gather(table, _hashed_order(table, seed, "sft"))


def kto_weights(n_desirable: int, n_undesirable: int) -> tuple[float, float] | None:
    """(desirable_weight, undesirable_weight) for classes of these sizes; None if one is empty.

    Eq. (8) of the KTO paper (arXiv 2402.01306) wants w_d·n_d / (w_u·n_u) in [1, 4/3]; TRL 1.16 warns outside
    [1, 1.33]. (1, 1) where that holds already; else the smaller class gets the weight that makes the ratio 7/6,
    the middle, where TRL's rounding to two digits cannot matter.
    """
    if n_desirable < 1 or n_undesirable < 1:
        return None
    ratio = n_desirable / n_undesirable
    if 1 <= ratio <= 1.33:
        return 1.0, 1.0
    middle = 7 / 6
    if ratio < 1:
        return round(middle / ratio, 4), 1.0
    return 1.0, round(ratio / middle, 4)


def _kto_order(table: pa.Table, seed: int) -> Rows:
    label = np.asarray(one_array(table["label"]).to_numpy(zero_copy_only=False), dtype=bool)
    keys = [(unit_hash(seed, c), c) for c in table["candidate_id"].to_pylist()]
    shuffled = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    n, desirable = len(label), int(label.sum())
    # Place t takes a desirable row where the running sum of t·n_d/n passes a whole number (Bresenham's line).
    steps = np.arange(n + 1, dtype=np.int64) * desirable // max(n, 1)
    takes = np.diff(steps).astype(bool)
    order = np.empty(n, dtype=np.int64)
    order[takes] = shuffled[label[shuffled]]
    order[~takes] = shuffled[~label[shuffled]]
    return order


def _hashed_order(table: pa.Table, seed: int, kind: Kind) -> Rows:
    ids = zip(*(table[name].to_pylist() for name in _KEYS[kind]), strict=True)
    keys = [(unit_hash(seed, *row), row) for row in ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


# --- files ------------------------------------------------------------------------------------------------------------


def write_dataset_files(
    folder: str | Folder,
    tables: Mapping[str, Iterable[pa.Table]],
    config: DatasetsConfig,
    *,
    fingerprint: str,
    counts: Mapping[str, Mapping[str, Any]],
    gate: GateConfig | None,
    judges: Sequence[str],
    lineage: Mapping[str, str] | None = None,
    license: str = "other",
    origin: str | None = None,
) -> dict[str, Any]:
    """Write `<folder>/<kind>/{train,val}/part-00000.parquet …`, a README.md for each kind, and stats.json last.

    Args:
        tables: kind → tables of the shards, in any order; only these kept rows are held in memory.
        fingerprint: of the stage; goes into the footer of every file.
        counts: kind → sum of the shards' counts (`rows.add_counts`).
        gate: thresholds that made the labels, for the card; None where no gate did.
        lineage: stage → fingerprint of what the rows were made from, for the card.
        license: of the card, as the hub spells it ("apache-2.0", "cc-by-4.0" …).
        origin: how the preferences came about, for the card; by default the consensus of the judges.

    Returns:
        What stats.json holds: `rows` (kind → rows of each split, for KTO of each class too), `counts`,
        `kto_weights` ({desirable_weight, undesirable_weight}, of the train split; None if a class is empty),
        `gate`, `judges`, `lineage`, `settings` and `fingerprint`. It holds no paths and no times.

    Raises:
        ValueError: a table has not the schema of its kind, or a kind of `config.kinds` has no tables.
        KeyMismatch: a row is there twice.
    """
    folder = Folder(folder) if isinstance(folder, str) else folder
    stats: dict[str, Any] = {
        "fingerprint": fingerprint,
        "rows": {},
        "counts": {kind: dict(counts[kind]) for kind in config.kinds},
        "kto_weights": None,
        "gate": None if gate is None else gate.model_dump(mode="json"),
        "judges": list(judges),
        "lineage": dict(lineage or {}),
        "settings": config.model_dump(mode="json"),
    }
    for kind in config.kinds:
        if kind not in tables:
            raise ValueError(f"datasets.kinds asks for {kind}, but no {kind} tables were made")
        table = _all_rows(kind, tables[kind])
        rows: dict[str, int] = {}
        for split in SPLITS:
            part = gather(table, np.flatnonzero(np.asarray(pc.equal(one_array(table["split"]), split))))
            _write_split(folder / kind / split, kind, part, config, fingerprint)
            rows[split] = part.num_rows
            if kind == "kto":
                rows[f"{split}_desirable"] = pc.sum(part["label"]).as_py() or 0
                rows[f"{split}_undesirable"] = rows[split] - rows[f"{split}_desirable"]
        stats["rows"][kind] = rows
        if kind == "kto" and (weights := kto_weights(rows["train_desirable"], rows["train_undesirable"])):
            stats["kto_weights"] = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
        (folder / kind).write_bytes("README.md", _card(kind, stats, license, origin).encode())
    folder.write_json("stats.json", stats)
    return stats


def _all_rows(kind: str, tables: Iterable[pa.Table]) -> pa.Table:
    schema = TABLES[kind]
    parts = [schema.empty_table()]
    for table in tables:
        if not table.schema.equals(schema):
            raise ValueError(f"a {kind} table must have the schema\n{schema}\nnot\n{table.schema}")
        parts.append(table)
    table = pa.concat_tables(parts)
    if kind == "dpo":
        pairs = pc.binary_join_element_wise(one_array(table["chosen_id"]), one_array(table["rejected_id"]), " over ")
        refuse_repeats(pairs, "dpo: pair")
    else:
        refuse_repeats(one_array(table["candidate_id"]), f"{kind}: candidate_id")
    return table


def _write_split(folder: Folder, kind: Kind, table: pa.Table, config: DatasetsConfig, fingerprint: str) -> None:
    """Numbered files in training order. A split without rows gets one file too, so that readers find its columns."""
    order = _kto_order(table, config.seed) if kind == "kto" else _hashed_order(table, config.seed, kind)
    written = []
    for number, start in enumerate(range(0, max(len(order), 1), config.rows_per_file)):
        name = f"part-{number:05d}.parquet"
        part = gather(table, order[start : start + config.rows_per_file]).combine_chunks()
        folder.write_table(name, part, fingerprint=fingerprint, kind=kind)
        written.append(name)
    for name in folder.names(".parquet"):
        if name not in written:  # of an earlier attempt; a loader would read it
            folder.delete(name)


# --- data set card ----------------------------------------------------------------------------------------------------

_COLUMNS = {
    "kto": {
        "prompt": "chat messages up to the user's last turn",
        "completion": "the answer, as one assistant message",
        "label": "true: desirable, false: undesirable",
        "final_score": "f, mean of the judges' scores after the critic's penalty",
        "scores": "each judge and its score",
        "candidate_id, prompt_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
    "dpo": {
        "prompt": "chat messages up to the user's last turn",
        "chosen": "the desirable answer of the highest final score, as one assistant message",
        "rejected": "the undesirable answer of the lowest final score, likewise",
        "chosen_score, rejected_score": "their final scores",
        "score_gap": "chosen_score - rejected_score",
        "prompt_id, chosen_id, rejected_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
    "sft": {
        "prompt": "chat messages up to the user's last turn",
        "completion": "the chosen answer of the prompt's pair, as one assistant message",
        "final_score": "its final score",
        "candidate_id, prompt_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
}


def _card(kind: str, stats: Mapping[str, Any], license: str, origin: str | None) -> str:
    """README.md with the front matter by which `datasets.load_dataset(folder)` finds the splits."""
    rows, counts, gate = stats["rows"][kind], stats["counts"][kind], stats["gate"]
    front: dict[str, Any] = {
        "pretty_name": f"Quorum {kind.upper()} data",
        "license": license,
        "task_categories": ["text-generation"],
        "tags": ["quorum", "preference", "rlaif", "trl", kind],
        "size_categories": [_size_category(rows["train"] + rows["val"])],
    }
    # `datasets` 5.2 fails on a split without rows, so the card names only those that have some.
    named = {"train": "train", "val": "validation"}
    files = [{"split": named[split], "path": f"{split}/*.parquet"} for split in SPLITS if rows[split]]
    if files:
        # `datasets` 5.2 caches a local folder by its own name and that of the configuration, whatever is in its files:
        # under a fixed name it would give the rows of another run that has the same folder name.
        front["configs"] = [{"config_name": stats["fingerprint"], "data_files": files}]
    columns = _COLUMNS[kind]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# Quorum {kind.upper()} data",
        "",
        f"{origin or _consensus(stats['judges'])}, ready for TRL's `{kind.upper()}Trainer`. "
        "Rows are in training order.",
        "",
        "```python",
        "from datasets import load_dataset",
        f'data = load_dataset("path/to/{kind}")  # splits: {", ".join(f["split"] for f in files) or "none, no row"}',
        "```",
        "",
        *_markdown("Columns", columns),
        *_markdown("Rows", rows),
        *_markdown("Kept and left out", _flat(counts)),
        *(_markdown("Gate", gate) if gate else ()),
        *_markdown("Limits and order", stats["settings"]),
    ]
    if kind == "kto":
        weights = stats["kto_weights"] or {"none": "a class is empty, KTO cannot be trained"}
        lines += _markdown("Class weights for KTO", weights)
    lines += _markdown("Made from", {**stats["lineage"], "datasets": stats["fingerprint"]})
    return "\n".join(lines)


def _consensus(judges: Sequence[str]) -> str:
    return f"Preference data by consensus of {len(judges)} LLM judges ({', '.join(judges)})"


def _markdown(title: str, values: Mapping[str, Any]) -> list[str]:
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in values.items()), ""]


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _flat(counts: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in counts.items():
        flat.update(_flat(value, f"{name}: ") if isinstance(value, Mapping) else {before + name: value})
    return flat


def _size_category(rows: int) -> str:
    """The hub's word for a number of rows."""
    bounds = [("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7)]
    return next((name for name, bound in bounds if rows < bound), "10M<n<100M")
