"""The gate and training rows on frames, computed by the same functions as in a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.api.frames import Frame, column_names, give, id_table, need, rows_with_ids, table_of
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.sources.records import Thoughts
from ray_pipeline.data.tokens import Encode, TokenCounter
from ray_pipeline.engines.models import TokenizerSettings
from ray_pipeline.pocket import model_path
from ray_pipeline.store.schemas import CANDIDATES, CRITIQUES, DECISIONS, PROMPTS, VERDICTS


def gate(
    candidates: Frame,
    verdicts: Frame,
    critiques: Frame | None = None,
    *,
    judges: Sequence[str] | None = None,
    **settings: Any,
) -> Frame:
    """Decide for every candidate whether it becomes a training row, from the judges' scores and the critic's verdict.

    Args:
        candidates: the frame that was judged, or columns candidate_id and prompt_id. A column finish_reason says which
            texts are not whole.
        verdicts: from `judge`: candidate_id, judge, score, parse_status. Combine several with `pandas.concat` or
            `pyarrow.concat_tables`.
        critiques: from `critique`: candidate_id, flawed, parse_status. Required unless `use_critic=False`.
        judges: names of the judges whose scores count; default: all in `verdicts`.
        settings: keys of the `gate` block: alpha, tau, desirable_at, undesirable_at, use_variance, use_critic, cut.

    Returns:
        One decision for each candidate, in the frame's order and with its index: candidate_id, prompt_id, mean_score,
        score_variance, penalty, final_score (null where a score or critique is unread), label (desirable, undesirable,
        discard, abstain, incomplete) and why.

    Raises:
        ColumnError: a column is missing.
        ValueError: an invalid setting, missing critiques, or rows of different candidates (`KeyMismatch`).
    """
    config = GateConfig.model_validate(settings)
    if critiques is None and config.use_critic:
        raise ValueError("critiques are missing; pass the result of critique(), or use_critic=False")
    read = table_of(verdicts, ["candidate_id", "judge", "score", "parse_status"], "verdicts", VERDICTS)
    flaws = None
    if critiques is not None and config.use_critic:
        flaws = table_of(critiques, ["candidate_id", "flawed", "parse_status"], "critiques", CRITIQUES)
    names = list(judges) if judges is not None else list(dict.fromkeys(read["judge"].to_pylist()))
    return give(decide(id_table(candidates), read, flaws, names, config), candidates, same_rows=True)


def to_kto(
    candidates: Frame,
    verdicts: Frame,
    decisions: Frame,
    *,
    tokenizer: Any = None,
    thoughts: Thoughts = "split",
    **settings: Any,
) -> Frame:
    """Make rows for TRL's `KTOTrainer`: one for each desirable or undesirable candidate.

    Args:
        candidates: the frame that was judged: `prompt` (or `messages`) and `response`. A column `split` ("train",
            "val") is kept; default: train. So is a column `model`.
        verdicts: from `judge`; the rows include its scores.
        decisions: from `gate`.
        tokenizer: of the policy: folder, name on the Hub, `pocket:policy`, or a Hugging Face tokenizer. With one,
            prompts of more than `max_prompt_length` tokens are left out; without one, no length limit applies.
        thoughts: split: thoughts at the start of a response (`<think>…</think>`) are in no row; keep: they are.
        settings: `max_length` and `max_prompt_length` in tokens, which need a tokenizer; `min_gap` for `to_dpo`.

    Returns:
        candidate_id, prompt_id, split, prompt and completion (chat messages), label (bool), final_score, scores (list
        of judge and score), copies (number of equal answers that the row stands for), model.

    Raises:
        ColumnError: a column is missing.
        ValueError: an invalid setting, or rows of different candidates (`KeyMismatch`).
    """
    return _rows(candidates, verdicts, decisions, tokenizer, thoughts, settings, kto_rows)


def to_dpo(
    candidates: Frame,
    verdicts: Frame,
    decisions: Frame,
    *,
    tokenizer: Any = None,
    thoughts: Thoughts = "split",
    **settings: Any,
) -> Frame:
    """Make rows for TRL's `DPOTrainer`: for each prompt, its best desirable and its worst undesirable candidate.

    Pairs with equal texts, or with final scores closer than `min_gap` (default 1.5), are left out.

    Args, Raises: as `to_kto`.

    Returns:
        prompt_id, chosen_id, rejected_id, split, prompt, chosen and rejected (chat messages), score_chosen,
        score_rejected, score_gap, copies, chosen_model, rejected_model.
    """
    return _rows(candidates, verdicts, decisions, tokenizer, thoughts, settings, dpo_rows)


def _rows(
    candidates: Frame,
    verdicts: Frame,
    decisions: Frame,
    tokenizer: Any,
    thoughts: Thoughts,
    settings: dict[str, Any],
    make: Any,
) -> Frame:
    if tokenizer is None:
        if limits := [name for name in ("max_length", "max_prompt_length") if name in settings]:
            raise ValueError(f"{limits[0]} is in tokens; pass the policy's tokenizer as well")
        settings = {**settings, "max_length": sys.maxsize, "max_prompt_length": sys.maxsize - 1}
    config = DatasetsConfig.model_validate(settings)
    more = [name for name in ("split", "model") if name in column_names(candidates, "candidates")]
    rows = rows_with_ids(candidates, "candidate_id", ["response"], "candidates", more, thoughts)
    by_prompt = {
        row["prompt_id"]: {
            "prompt_id": row["prompt_id"],
            "messages": row["messages"],
            "split": row.get("split") or "train",
        }
        for row in rows
    }
    prompts = _table(list(by_prompt.values()), PROMPTS, ["prompt_id", "messages", "split"])
    answers = _table(rows, CANDIDATES, ["candidate_id", "prompt_id", "response", "model"])
    read = table_of(verdicts, ["candidate_id", "judge", "score", "parse_status"], "verdicts", VERDICTS)
    need(decisions, ["candidate_id", "prompt_id", "final_score", "label"], "decisions")
    decided = table_of(decisions, ["candidate_id", "prompt_id", "final_score", "label"], "decisions", DECISIONS)
    made, _ = make(prompts, answers, read, decided, config, _encode(tokenizer))
    return give(made, candidates)


def _table(rows: list[dict[str, Any]], schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    picked = pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema=picked)


def _encode(tokenizer: Any) -> Encode:
    if tokenizer is None:  # characters stand in for tokens: no limit applies, and different texts stay different
        return lambda messages, completion: [ord(c) for m in (*messages, *(completion or ())) for c in m["content"]]
    if isinstance(tokenizer, (str, os.PathLike)):
        name = os.fspath(tokenizer)
        return TokenCounter.load(TokenizerSettings(model=model_path(name) if name.startswith("pocket:") else name))
    return TokenCounter(tokenizer)
