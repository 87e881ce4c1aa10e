"""Training rows of one shard: decisions become rows that TRL's KTO and DPO trainers take as they are.

TRL 1.16 has no limit on prompts, silently drops prompts that fill `max_length`, and truncates completions at
`max_length`. So both limits are enforced and counted here, with the policy's own tokenizer.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.gate import cut_text
from ray_pipeline.data.rows import KeyMismatch, gather, one_array, refuse_repeats, rows_of
from ray_pipeline.data.tokens import Encode
from ray_pipeline.store.keys import normalise_text
from ray_pipeline.store.schemas import DPO, KTO, READ_STATUSES, to_table

Kind = Literal["kto", "dpo", "sft"]
SPLITS = ("train", "val")

#: Version of the rules by which rows are made: under version 1, equal answers to a prompt were rows of their own, and
#: texts that were cut off were like any other; under version 2, only KTO rows of candidates had `copies`.
RULES = 3

#: Reasons for which a desirable or undesirable candidate gives no KTO row, in the order of the checks. Of equal answers
#: to a prompt one is kept (`repeated`), and none if some are desirable and some undesirable (`contradictory`).
KTO_DROPPED = ("empty_response", "contradictory", "repeated", "prompt_too_long")
#: Reasons for which a prompt gives no DPO pair, in the order of the checks.
DPO_DROPPED = (
    "no_desirable_or_undesirable", "no_desirable", "no_undesirable", "gap_too_small", "equal_text", "prompt_too_long",
    "equal_after_truncation",
)  # fmt: skip


class DatasetsConfig(Settings):
    """Which datasets are made, and the limits of their rows."""

    kinds: list[Kind] = Field(
        ["kto", "dpo"],
        min_length=1,
        description='"kto", "dpo" and "sft" (the chosen answers of the pairs), one or more of them',
    )
    min_gap: float = Field(1.5, ge=0, description="smallest difference of final scores of a DPO pair")
    max_length: int = Field(
        1024, ge=2, description="tokens of prompt and completion at which the trainer cuts; must equal the trainer's"
    )
    max_prompt_length: int = Field(
        512, ge=1, description="prompts of more tokens (with the generation prompt) are left out"
    )
    seed: int = Field(0, description="of the training order")
    rows_per_file: int = Field(10_000, ge=1, description="rows of one Parquet file")
    weights: bool = Field(
        False,
        description="a column `weight` in kto and dpo rows: the probability that the label is right, by the judges' "
        "scores; for dpo_weighted and kto_weighted",
    )

    @model_validator(mode="after")
    def _fits(self) -> DatasetsConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "or prompts would leave no room for a response"
            )
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds contains a dataset twice: {self.kinds}")
        return self

    @property
    def row_kinds(self) -> tuple[Kind, ...]:
        """The tables that the kinds are made from: SFT rows are the chosen halves of pairs."""
        wanted: dict[Kind, None] = dict.fromkeys("dpo" if kind == "sft" else kind for kind in self.kinds)
        return tuple(wanted)


def kto_rows(
    prompts: pa.Table,
    candidates: pa.Table,
    verdicts: pa.Table,
    decisions: pa.Table,
    config: DatasetsConfig,
    encode: Encode,
    judges: Sequence[str] | None = None,
    times: Mapping[str, int] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """One row for each distinct desirable or undesirable answer of a shard, in the order of `decisions`.

    Of equal answers the one with the smallest candidate_id is kept, and `copies` is their number. Answers are equal if
    `keys.normalise_text` does not tell them apart.

    Args:
        judges: whose scores the rows carry, in this order; by default all of `verdicts`, by name.
        times: candidate_id → how many equal answers this candidate stands for; default: 1 each.

    Returns:
        A table of schema KTO, and counts: `candidates` (rows of `decisions`), `cut_off` (those of them that were left
        out because their text is not whole), `kept`, `dropped` by reason (`KTO_DROPPED`) and `truncated` (kept rows of
        more than `max_length` tokens, which the trainer truncates).

    Raises:
        KeyMismatch: a decision's candidate or prompt is missing or belongs to another, or an id occurs twice.
    """
    dropped = dict.fromkeys(KTO_DROPPED, 0)
    truncated = 0
    scores = _scores(verdicts, judges)
    rows = []
    labelled = _kept_candidates(prompts, candidates, decisions)
    answers = _answers(labelled, times or {})
    for kept in labelled:
        completion = _answer(kept["response"])
        if _is_empty(kept["response"]):
            dropped["empty_response"] += 1
            continue
        same = answers[_told_apart(kept)]
        if same.contradictory or kept["candidate_id"] != same.first:
            dropped["contradictory" if same.contradictory else "repeated"] += 1
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
                "copies": same.copies,
                "model": kept["model"],
            }
        )
    counts = {"candidates": decisions.num_rows, "cut_off": _cut_off(decisions), "kept": len(rows)}
    return to_table(rows, KTO), {**counts, "dropped": dropped, "truncated": truncated}


def dpo_rows(
    prompts: pa.Table,
    candidates: pa.Table,
    verdicts: pa.Table,
    decisions: pa.Table,
    config: DatasetsConfig,
    encode: Encode,
    every_rejected: bool = False,
    times: Mapping[str, int] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """At most one pair for each prompt of a shard, sorted by prompt_id.

    Chosen is the desirable candidate of the highest final score, rejected the undesirable one of the lowest; of equal
    scores the smaller candidate_id. A pair that fails a guard is dropped, not replaced by the next best. Of pairs with
    equal rejected texts one is kept, and `copies` is their number.

    Args:
        verdicts: unused; present so that all datasets are made by the same call.
        every_rejected: a pair with each undesirable candidate, the lowest first, not with the lowest alone. A prompt
            without a pair then counts once, one with several counts them all.
        times: as `kto_rows`.

    Returns:
        A table of schema DPO, and counts: `prompts` (with decisions), `cut_off` (as `kto_rows`), `kept`, `dropped` by
        reason (`DPO_DROPPED`), `truncated` (kept pairs with a side of more than `max_length` tokens), and candidates
        that were left out of pairing: `empty_responses`, and `repeated_responses` that equal another rejected one.
        prompts = kept + the sum of dropped.

    Raises:
        KeyMismatch: as `kto_rows`.
    """
    sides: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
        p: ([], []) for p in decisions["prompt_id"].to_pylist()
    }
    empty = repeated = 0
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
        pairs: dict[tuple[str, str], tuple[Mapping[str, Any], int]] = {}
        for one in others if every_rejected else [worst]:
            rejected, copies = pairs.get(_told_apart(one), (one, 0))
            repeated += rejected is not one
            pairs[_told_apart(one)] = rejected, copies + (times or {}).get(one["candidate_id"], 1)
        for rejected, copies in pairs.values():
            reason, cut = _guard(chosen, rejected, config, encode)
            if reason:
                dropped[reason] += 1
                continue
            truncated += cut
            rows.append(_pair(prompt, chosen, rejected, copies))
    counts = {"prompts": len(sides), "cut_off": _cut_off(decisions), "kept": len(rows), "dropped": dropped}
    return to_table(rows, DPO), {
        **counts,
        "truncated": truncated,
        "empty_responses": empty,
        "repeated_responses": repeated,
    }


def _pair(prompt: str, chosen: Mapping[str, Any], rejected: Mapping[str, Any], copies: int) -> dict[str, Any]:
    return {
        "prompt_id": prompt,
        "chosen_id": chosen["candidate_id"],
        "rejected_id": rejected["candidate_id"],
        "split": chosen["split"],
        "prompt": chosen["messages"],
        "chosen": _answer(chosen["response"]),
        "rejected": _answer(rejected["response"]),
        "score_chosen": chosen["final_score"],
        "score_rejected": rejected["final_score"],
        "score_gap": chosen["final_score"] - rejected["final_score"],
        "copies": copies,
        "chosen_model": chosen["model"],
        "rejected_model": rejected["model"],
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
    """Why the pair is dropped (None if it is kept), and whether the trainer will truncate a side of it."""
    if chosen["final_score"] - rejected["final_score"] < config.min_gap:
        return "gap_too_small", False
    return pair_guard(chosen["messages"], chosen["response"], rejected["response"], config, encode)


def pair_guard(
    prompt: Sequence[Mapping[str, str]], chosen: str, rejected: str, config: DatasetsConfig, encode: Encode
) -> tuple[str | None, bool]:
    """Why a pair of texts, own or imported, is dropped (None if it is kept), and whether the trainer will truncate a
    side of it."""
    if normalise_text(chosen) == normalise_text(rejected):
        return "equal_text", False
    if len(encode(prompt, None)) > config.max_prompt_length:
        return "prompt_too_long", False
    left, right = (encode(prompt, _answer(text)) for text in (chosen, rejected))
    if left[: config.max_length] == right[: config.max_length]:
        return "equal_after_truncation", False
    return None, max(len(left), len(right)) > config.max_length


@dataclasses.dataclass
class _SameAnswer:
    """Labelled candidates of a prompt with one text: the smallest id, their number, and whether labels differ."""

    first: str
    label: str
    copies: int
    contradictory: bool = False


def _told_apart(kept: Mapping[str, Any]) -> tuple[str, str]:
    return kept["prompt_id"], normalise_text(kept["response"])


def _answers(labelled: Sequence[Mapping[str, Any]], times: Mapping[str, int]) -> dict[tuple[str, str], _SameAnswer]:
    found: dict[tuple[str, str], _SameAnswer] = {}
    for kept in labelled:
        if _is_empty(kept["response"]):
            continue
        same = found.setdefault(_told_apart(kept), _SameAnswer(kept["candidate_id"], kept["label"], 0))
        same.first = min(same.first, kept["candidate_id"])
        same.copies += times.get(kept["candidate_id"], 1)
        same.contradictory |= kept["label"] != same.label
    return found


def _kept_candidates(prompts: pa.Table, candidates: pa.Table, decisions: pa.Table) -> list[dict[str, Any]]:
    """Desirable and undesirable candidates in the order of `decisions`, with prompt, split and response, by id."""
    refuse_repeats(one_array(decisions["candidate_id"]), "decisions: candidate_id")
    kept = decisions.filter(pc.is_in(decisions["label"], value_set=pa.array(["desirable", "undesirable"])))
    place = rows_of(kept["candidate_id"], candidates["candidate_id"], "decisions: candidate", "candidates")
    own = gather(candidates.select(["prompt_id", "response", "model"]), place)
    prompt = gather(prompts, rows_of(kept["prompt_id"], prompts["prompt_id"], "decisions: prompt", "prompts"))
    strangers = kept.filter(pc.not_equal(one_array(kept["prompt_id"]), one_array(own["prompt_id"])))
    if strangers.num_rows:
        stranger = strangers["candidate_id"][0].as_py()
        raise KeyMismatch(f"decisions: candidate {stranger!r} has another prompt_id in candidates")
    joined = kept.select(["candidate_id", "prompt_id", "final_score", "label"])
    for name in ("response", "model"):
        joined = joined.append_column(name, own[name])
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


def _cut_off(decisions: pa.Table) -> int:
    if "why" not in decisions.column_names:
        return 0
    return pc.sum(pc.starts_with(one_array(decisions["why"]), cut_text(""))).as_py() or 0


def _answer(response: str | None) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": response or ""}]


def _is_empty(response: str | None) -> bool:
    return response is None or not response.strip()
