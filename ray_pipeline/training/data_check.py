"""The check of the training files before workers start: columns, rows, labels and lengths as TRL sees them."""

from __future__ import annotations

import contextlib
import functools
import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_pipeline.engines.chat_template import folding
from ray_pipeline.store.local import local_copy
from ray_pipeline.training.methods import Method, TrainingInputError, method_of
from ray_pipeline.training.spec import TrainSpec
from ray_pipeline.training.tokenizer import load_tokenizer

_BATCH_ROWS = 512
#: Largest share of the rows that may be left out, for want of a whole step, without a warning.
_FEW_UNUSED = 0.05


@dataclass(frozen=True)
class DataReport:
    """Rows of the training files, counted with the policy's tokenizer as TRL sees them.

    Attributes:
        rows: rows in the files.
        truncated: rows with a completion truncated at `max_length` (of a reward model: left out for it).
        desirable, undesirable: labels (KTO; 0 for other methods).
        identical_pairs: pairs whose chosen and rejected tokens are equal after truncation.
        sequences: elements of the batches: the rows, or the longer sequences into which TRL packs them.
        unused: sequences per epoch that do not fill a whole step and are not trained on (rows: those at the end).
        steps_per_epoch: optimiser steps.
        val_rows: rows in the evaluation files.
        val_rows_used: rows used for evaluation, in whole batches.
        warnings: sentences for the user.
    """

    rows: int
    truncated: int
    desirable: int
    undesirable: int
    identical_pairs: int
    sequences: int
    unused: int
    steps_per_epoch: int
    val_rows: int
    val_rows_used: int
    warnings: tuple[str, ...]


@dataclass
class _Counts:
    rows: int = 0
    filled: int = 0  # by the prompt alone
    truncated: int = 0
    desirable: int = 0
    undesirable: int = 0
    identical_pairs: int = 0
    ends_added: int = 0
    lengths: list[int] = field(default_factory=list)  # of whole rows, if they are to be packed


def parquet_files(pattern: str, setting: str) -> list[str]:
    """Files of a path or glob in training order; files of a URI are copied to this machine.

    Raises:
        TrainingInputError: there are none; the message names the setting.
    """
    shown = pattern
    if "://" in pattern:
        path, mark, query = pattern.partition("?")
        folder, _, names = path.rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            pattern = f"{local_copy(folder + mark + query)}/{names}"
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise TrainingInputError(f"{setting}: no file matches {shown}; run the datasets stage first or fix the path")
    return files


def check_data(spec: TrainSpec) -> DataReport:
    """Read the dataset once and refuse rows that cannot be trained on.

    Loads the tokenizer, not the model. Memory is bounded by a batch of rows.

    Raises:
        TrainingInputError: no file, no row, a column that is missing, empty or of another type, KTO rows of one
            class, only identical pairs, or too few rows for one batch; the message names file, column and fix.
    """
    method = method_of(spec.settings.method)
    tokenizer = load_tokenizer(spec)
    train = _count(spec, method, tokenizer, "train_files", spec.train_files)
    if train.rows == 0:
        raise TrainingInputError(f"train_files: {spec.train_files} has no rows; check whether any row passed the gate")
    if "label" in method.columns and not (train.desirable and train.undesirable):
        raise TrainingInputError(
            f"train_files: {train.desirable} desirable and {train.undesirable} undesirable rows; "
            f"{spec.settings.method} needs both classes; loosen the gate's thresholds or generate more candidates"
        )
    if "rejected" in method.columns and train.identical_pairs == train.rows:
        raise TrainingInputError(
            f"train_files: chosen and rejected are equal after truncation to max_length={spec.max_length} in all "
            f"{train.rows} pairs; raise max_length or check the pairs"
        )
    sequences = _sequences(spec, train)
    micro_batch = spec.settings.micro_batch
    if sequences < micro_batch:
        packed = f" (packed into {sequences} sequences)" if spec.packs else ""
        raise TrainingInputError(
            f"train_files: {train.rows} rows{packed} do not fill one batch of {spec.settings.batch_size} (batch_size) "
            f"× {spec.settings.num_workers} (num_workers) = {micro_batch}; add rows, or lower batch_size or "
            "num_workers"
        )

    val = _Counts()
    if spec.val_files is not None:
        val = _count(spec, method, tokenizer, "val_files", spec.val_files)
    val_sequences = _sequences(spec, val, spec.settings.trainer_args.get("eval_packing"))
    val_used = val_sequences - val_sequences % micro_batch
    used = spec.rows_per_epoch(sequences)
    return DataReport(
        rows=train.rows,
        truncated=train.truncated,
        desirable=train.desirable,
        undesirable=train.undesirable,
        identical_pairs=train.identical_pairs,
        sequences=sequences,
        unused=sequences - used,
        steps_per_epoch=math.ceil(used / spec.settings.global_batch),
        val_rows=val.rows,
        val_rows_used=val_used,
        warnings=tuple(_warnings(spec, method, tokenizer, train, sequences, val, val_used)),
    )


def _count(spec: TrainSpec, method: Method, tokenizer: Any, setting: str, pattern: str) -> _Counts:
    counts = _Counts()
    render = functools.partial(_token_ids, tokenizer, spec.chat_template_args)
    completions = [c for c, kind in method.columns.items() if kind == "messages" and c != "prompt"]
    fold = folding(tokenizer, spec.chat_template_args)
    for batch in _batches(parquet_files(pattern, setting), method):
        rows = batch.to_pylist()
        if fold is not None:
            rows = [{**row, "prompt": fold(row["prompt"])} for row in rows]
        prompts = render([row["prompt"] for row in rows], add_generation_prompt=True)
        answers = [
            render([row["prompt"] + row[column] for row in rows], add_generation_prompt=False) for column in completions
        ]
        for i, row in enumerate(rows):
            prompt, whole = prompts[i], [ids[i] for ids in answers]
            if method.adds_ends:
                ended = [_with_ends(tokenizer, ids) for ids in whole]
                counts.ends_added += ended != whole
                prompt, whole = _with_ends(tokenizer, prompt, end=False), ended
            counts.rows += 1
            # TRL starts the completion where prompt and prompt + completion part, which may be inside the prompt.
            counts.filled += min(_common_prefix(prompt, ids) for ids in whole) >= spec.max_length
            counts.truncated += any(len(ids) > spec.max_length for ids in whole)
            if "label" in row:
                counts.desirable += row["label"]
                counts.undesirable += not row["label"]
            if len(whole) == 2:
                chosen, rejected = (ids[: spec.max_length] for ids in whole)
                counts.identical_pairs += chosen == rejected
            if spec.packs or spec.settings.trainer_args.get("eval_packing"):
                counts.lengths.append(len(whole[0]))
    if counts.filled:
        raise TrainingInputError(
            f"{setting}: in {counts.filled} of {counts.rows} rows the prompt alone fills max_length={spec.max_length} "
            "tokens, so that nothing of the answer is left to learn from; raise max_length, or leave such rows out "
            "(datasets.max_prompt_length does)"
        )
    return counts


def _with_ends(tokenizer: Any, ids: list[int], end: bool = True) -> list[int]:
    """What TRL's ORPO and CPO trainers make of a rendered chat: BOS in front and EOS at the end, if it has none."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    front = [first] if first is not None and ids[:1] != [first] else []
    return front + ids + ([last] if end and ids[-1:] != [last] else [])


def _sequences(spec: TrainSpec, counts: _Counts, packing: bool | None = None) -> int:
    """How many sequences the batches are dealt from. Packing is done by TRL's own function, on rows of zeros."""
    if not method_of(spec.settings.method).trains_policy:
        return counts.rows - counts.truncated
    if not (spec.packs if packing is None else packing) or not counts.rows:
        return counts.rows
    from datasets import Dataset, disable_progress_bars, enable_progress_bars
    from trl import pack_dataset

    ends = np.cumsum([0, *counts.lengths])
    zeros = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.zeros(ends[-1], np.int8)))
    disable_progress_bars()
    try:
        rows = Dataset(pa.table({"input_ids": zeros}))
        return len(pack_dataset(rows, spec.max_length, spec.settings.trainer_args.get("packing_strategy", "bfd")))
    finally:
        enable_progress_bars()


def _batches(files: Sequence[str], method: Method) -> Iterator[pa.RecordBatch]:
    for name in files:
        start = 0
        for batch in _read(name, method):
            for column, kind in method.columns.items():
                _check_values(name, batch.column(column), column, kind, start)
            yield batch
            start += batch.num_rows


def _read(name: str, method: Method) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(name, page_checksum_verification=True) as file:
            for column, kind in method.columns.items():
                _check_type(name, file.schema_arrow, column, kind)
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=list(method.columns))
    except (pa.ArrowException, OSError) as error:
        raise TrainingInputError(f"{name} is no readable Parquet file ({error})") from error


def _check_type(name: str, schema: pa.Schema, column: str, kind: str) -> None:
    if column not in schema.names:
        remedy = "; set datasets.weights to true" if kind == "weight" else ""
        raise TrainingInputError(f"{name} has no column {column!r}; it has {', '.join(schema.names) or 'none'}{remedy}")
    actual = schema.field(column).type
    if kind == "bool":
        good, expected = pa.types.is_boolean(actual), "bool"
    elif kind == "weight":
        good, expected = pa.types.is_floating(actual), "double"
    else:
        good, expected = _is_messages(actual), "list of {role: string, content: string}"
    if not good:
        raise TrainingInputError(f"{name}: column {column!r} must be {expected}, not {actual}")


def _is_messages(actual: pa.DataType) -> bool:
    if not (pa.types.is_list(actual) or pa.types.is_large_list(actual)) or not pa.types.is_struct(actual.value_type):
        return False
    fields = {f.name: f.type for f in actual.value_type}
    return all(
        n in fields and (pa.types.is_string(fields[n]) or pa.types.is_large_string(fields[n]))
        for n in ("role", "content")
    )


def _check_values(name: str, values: pa.Array, column: str, kind: str, start: int) -> None:
    missing = values.is_null()
    if kind == "messages":
        missing = pc.or_kleene(missing, pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0))
    row = pc.index(missing, True).as_py()
    if row >= 0:
        raise TrainingInputError(f"{name}: column {column!r} is empty in row {start + row}; regenerate the dataset")
    if kind == "weight":
        usable = pc.and_(pc.is_finite(values), pc.greater_equal(values, 0.0))
        if (row := pc.index(usable, False).as_py()) >= 0:
            raise TrainingInputError(
                f"{name}: column {column!r} is {values[row].as_py()} in row {start + row}; it must be a finite number, "
                "0 or more"
            )
    if kind == "messages":
        flat = pc.list_flatten(values)
        end = start + len(values) - 1
        for part in ("role", "content"):
            if pc.struct_field(flat, part).null_count:
                raise TrainingInputError(
                    f"{name}: column {column!r} has a message without {part} within rows {start}–{end}"
                )


def _token_ids(
    tokenizer: Any,
    template_args: Mapping[str, Any],
    chats: list[list[dict[str, str]]],
    add_generation_prompt: bool,
) -> list[list[int]]:
    """Token ids of chats: the same as TRL's row by row, but in batches, which fast tokenizers parallelise."""
    texts = tokenizer.apply_chat_template(
        chats, tokenize=False, add_generation_prompt=add_generation_prompt, **template_args
    )
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def _common_prefix(left: list[int], right: list[int]) -> int:
    if left == right[: len(left)]:  # nearly always
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _warnings(
    spec: TrainSpec, method: Method, tokenizer: Any, train: _Counts, sequences: int, val: _Counts, val_used: int
) -> Iterator[str]:
    if train.identical_pairs:
        yield f"{train.identical_pairs} of {train.rows} pairs are equal after truncation and have no effect"
    if train.truncated and not method.trains_policy:
        yield f"{train.truncated} of {train.rows} pairs are longer than max_length={spec.max_length} and left out"
    what, step = "packed sequences" if spec.packs else "rows", spec.settings.global_batch
    unused = sequences - spec.rows_per_epoch(sequences)
    if sequences < step:
        yield f"{sequences} {what} are fewer than train.global_batch ({step}): one step per epoch"
    elif unused > _FEW_UNUSED * sequences:
        yield (
            f"{unused} of {sequences} {what} do not fill a step of {step} (train.global_batch) and are not trained on; "
            "a smaller global_batch leaves fewer"
        )
    if train.ends_added:
        yield (
            f"{spec.settings.method} trains on {train.ends_added} of {train.rows} rows with the tokenizer's "
            f"{tokenizer.bos_token or 'no BOS'} in front and {tokenizer.eos_token} at the end: TRL adds them where "
            "the chat template has none"
        )
    if "label" in method.columns:
        yield from _imbalance(spec, train)
    if spec.val_files is not None and not val_used:
        yield f"val_files: {val.rows} rows do not fill one batch of {spec.settings.micro_batch}: no evaluation"


def _imbalance(spec: TrainSpec, train: _Counts) -> Iterator[str]:
    """A warning about classes that the weights do not balance: λ_D·n_D / (λ_U·n_U) in [1, 4/3] (KTO paper, eq. 8)."""
    low, high = 0.99, 4 / 3 + 0.01
    rows = train.desirable / train.undesirable
    lambda_d, lambda_u = spec.settings.desirable_weight or 1.0, spec.settings.undesirable_weight or 1.0
    weighed = lambda_d * train.desirable / max(lambda_u * train.undesirable, 1e-9)
    if low <= rows <= high and low <= weighed <= high:
        return
    best = lambda_u * train.undesirable / train.desirable
    advice = (
        ""
        if low <= weighed <= high
        else (f"; the KTO paper recommends 1 to 1.33: set desirable_weight between {best:.2f} and {best * 4 / 3:.2f}")
    )
    yield (
        f"class imbalance: {train.desirable} desirable, {train.undesirable} undesirable rows; with desirable_weight "
        f"{lambda_d:.4g} and undesirable_weight {lambda_u:.4g} they weigh "
        f"{weighed:.2f} : 1{advice}"
    )
