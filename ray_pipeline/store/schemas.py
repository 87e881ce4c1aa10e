"""The Arrow schema of every table that a run writes.

A row keeps the ids of the rows that it was made from, so that a training row can be traced back to its prompt.
No table holds a time, a latency or a host: equal inputs give equal bytes. (The call log and the per-stage
receipts, which are about *how* a run went, are not tables of the run.)

All tables are in this one list, so that columns with one meaning keep one name; it is longer than 400 lines.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.store.outside import storable_value

#: One chat message; conversations are lists of these, as TRL and `datasets` expect them.
MESSAGE = pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)])
MESSAGES = pa.list_(pa.field("element", MESSAGE, nullable=False))

#: Outcomes of parsing a reply. Only `ok` and `repaired` have a value; no other is ever turned into a number.
#: `missing`: the user's file has no verdict of this judge. `skipped`: no call was made, as nothing depended on it
#: (`judge.early_exit`) or something that the judge must see is missing.
PARSE_STATUSES = ("ok", "repaired", "unparsed", "truncated", "too_long", "skipped", "error", "missing")
READ_STATUSES = ("ok", "repaired")

#: The gate's labels of candidates.
LABELS = ("desirable", "undesirable", "discard", "abstain", "incomplete")

#: Finish reasons of a reply whose text is whole, as far as the server says, and of a call without a reply. Every other
#: one (`length`, `content_filter`, `tool_calls`, …) says that text is missing.
WHOLE = ("stop", "refusal", "unknown")
NO_REPLY = ("too_long", "error")
_NOT_CUT = (*WHOLE, *NO_REPLY)

FAILURE_TYPES = ("circular", "unsupported", "contradictory", "unspecified", "none")


def _schema(*fields: tuple[str, pa.DataType] | tuple[str, pa.DataType, bool]) -> pa.Schema:
    """Fields are (name, type) for required columns and (name, type, True) for columns that may be null."""
    return pa.schema([pa.field(f[0], f[1], nullable=len(f) == 3) for f in fields])


_S, _F, _I, _B = pa.string(), pa.float64(), pa.int32(), pa.bool_()

PROMPTS = _schema(
    ("prompt_id", _S), ("messages", MESSAGES), ("source", _S), ("task_type", _S), ("split", _S), ("meta", _S)
)

#: `error` of this and other tables: why a call gave no reply, in the engine's or the server's words.
#: `thoughts`: what the model wrote before its answer; without an answer, `response` is null. `prompt_cut` of this and
#: other tables: true where a server left out a part of a prompt behind the row, else null.
#: `generator` is the model's identity, `model` its name: the key under `models`, or for completions of the user's own
#: what their source says, as `source_label` is its own `chosen` or `rejected`. Of these, `seed` is -1 and
#: `finish_reason` `unknown` where their source has none.
CANDIDATES = _schema(
    ("candidate_id", _S),
    ("prompt_id", _S),
    ("k", _I),
    ("seed", pa.int64()),
    ("response", _S, True),
    ("finish_reason", _S),
    ("generator", _S),
    ("prompt_tokens", _I, True),
    ("completion_tokens", _I, True),
    ("error", _S, True),
    ("thoughts", _S, True),
    ("prompt_cut", _B, True),
    ("model", _S, True),
    ("source_label", _S, True),
)

VERDICTS = _schema(
    ("candidate_id", _S),
    ("prompt_id", _S),
    ("judge", _S),
    ("score", _F, True),
    ("expected_score", _F, True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("prompt_cut", _B, True),
)

#: The checklist of a prompt, one row for each judge that has one written. `items` is null exactly if `parse_status` is
#: not a read one.
CHECKLISTS = _schema(
    ("prompt_id", _S),
    ("judge", _S),
    ("items", pa.list_(pa.field("element", pa.struct([("text", _S), ("weight", _F)]))), True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("prompt_cut", _B, True),
)

#: Ready verdicts of a user's file, by content of the response; `place` is where one stands.
RECORDED = _schema(
    ("response_key", _S),
    ("prompt_id", _S),
    ("judge", _S),
    ("score", _F, True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("place", _S),
)

CRITIQUES = _schema(
    ("candidate_id", _S),
    ("prompt_id", _S),
    ("flawed", _B, True),
    ("failure_type", _S, True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("prompt_cut", _B, True),
)

DECISIONS = _schema(
    ("candidate_id", _S),
    ("prompt_id", _S),
    ("mean_score", _F, True),
    ("score_variance", _F, True),
    ("penalty", _F, True),
    ("final_score", _F, True),
    ("label", _S),
    ("why", _S),
)

#: The panel's posterior, null where no judge's verdict was read.
POSTERIOR = _schema(
    ("posterior_undesirable", _F, True), ("posterior_discard", _F, True), ("posterior_desirable", _F, True)
)

#: Decisions of a gate with a pool (`gate.pool`).
POOLED_DECISIONS = pa.schema([*DECISIONS, *POSTERIOR])

#: Candidates after a level of judges (`judge.escalate`), where the gate decides by posteriors: whether the label is
#: open, and the posterior under the judges so far.
LEVELS = pa.schema([*_schema(("candidate_id", _S), ("prompt_id", _S), ("level", _I), ("open", _B)), *POSTERIOR])

#: Scores of a dataset row: a judge's name and its score.
SCORES = pa.list_(pa.field("element", pa.struct([("judge", _S), ("score", _F)])))

# Training rows. Scores are null in rows of imported datasets without scores, and in part missing where calls were
# skipped (`judge.early_exit: labels`). `copies` is the number of equal answers or pairs of a prompt that the row stands
# for; null in rows of earlier versions. Models are those of the candidates.
KTO = _schema(
    ("candidate_id", _S),
    ("prompt_id", _S),
    ("split", _S),
    ("prompt", MESSAGES),
    ("completion", MESSAGES),
    ("label", _B),
    ("final_score", _F, True),
    ("scores", SCORES, True),
    ("copies", _I, True),
    ("model", _S, True),
)

# The scores have the names that UltraFeedback and TRL give them.
DPO = _schema(
    ("prompt_id", _S),
    ("chosen_id", _S),
    ("rejected_id", _S),
    ("split", _S),
    ("prompt", MESSAGES),
    ("chosen", MESSAGES),
    ("rejected", MESSAGES),
    ("score_chosen", _F, True),
    ("score_rejected", _F, True),
    ("score_gap", _F, True),
    ("copies", _I, True),
    ("chosen_model", _S, True),
    ("rejected_model", _S, True),
)

#: Where a run asks for weights of rows: P that a candidate is desirable, by its scores.
CONFIDENCE = _schema(("candidate_id", _S), ("prompt_id", _S), ("desirable", _F))
#: Column with the weight of a row in the loss, after the others of KTO and DPO where a run asks for it.
WEIGHT = pa.field("weight", _F, nullable=False)

SFT = _schema(
    ("candidate_id", _S),
    ("prompt_id", _S),
    ("split", _S),
    ("prompt", MESSAGES),
    ("completion", MESSAGES),
    ("final_score", _F, True),
    ("copies", _I, True),
    ("model", _S, True),
)

RESPONSES = _schema(
    ("response_id", _S),
    ("prompt_id", _S),
    ("model", _S),
    ("mode", _S),
    ("response", _S, True),
    ("finish_reason", _S),
    ("prompt_tokens", _I, True),
    ("completion_tokens", _I, True),
    ("error", _S, True),
    ("thoughts", _S, True),
    ("prompt_cut", _B, True),
)

COMPARISONS = _schema(
    ("pair_id", _S),
    ("prompt_id", _S),
    ("judge", _S),
    ("order", _S),
    ("model_a", _S),
    ("model_b", _S),
    ("choice", _S, True),
    ("vote", _S, True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("prompt_cut", _B, True),
)

#: Two answers to one question, with human labels: "A", "B" or "tie".
ITEMS = _schema(
    ("item_id", _S),
    ("prompt_id", _S),
    ("question", _S, True),
    ("response_a", _S, True),
    ("response_b", _S, True),
    ("model_a", _S, True),
    ("model_b", _S, True),
    ("human_label", _S, True),
    ("human_votes", pa.list_(pa.field("element", pa.struct([("annotator", _S), ("label", _S)])))),
)

#: A judge's verdict on an item in one order (`ab` as given, `ba` swapped; A and B are always the item's answers, not
#: the positions in which they were shown). `voice` is a debater's role, else empty.
BALLOTS = _schema(
    ("item_id", _S),
    ("prompt_id", _S),
    ("strategy", _S),
    ("judge", _S),
    ("voice", _S),
    ("order", _S),
    ("score_a", _F, True),
    ("score_b", _F, True),
    ("vote", _S, True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("prompt_cut", _B, True),
)

#: A question for a judge card with its answers, A first. `votes` are labels by people, or the one right label; `tie` is
#: none of two. `base` names the pair that a probe (`subset`) was made from; with a `family`, only judges of that model
#: family are asked.
CARD_ITEMS = _schema(
    ("item_id", _S),
    ("prompt_id", _S),
    ("source", _S),
    ("subset", _S, True),
    ("base", _S, True),
    ("family", _S, True),
    ("question", _S),
    ("answers", pa.list_(pa.field("element", _S, nullable=False))),
    ("votes", pa.list_(pa.field("element", _S, nullable=False))),
)

#: A judge's verdict on such a question in one order: `order` and `best` are labels of the item's answers (`BA`: B was
#: shown first), several in `best` are tied, and it is null where the reply could not be read.
CARD_VERDICTS = _schema(
    ("item_id", _S),
    ("prompt_id", _S),
    ("source", _S),
    ("judge", _S),
    ("strategy", _S),
    ("order", _S),
    ("best", _S, True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("prompt_cut", _B, True),
)

#: The speeches of a debate, in order.
SPEECHES = _schema(
    ("item_id", _S),
    ("prompt_id", _S),
    ("judge", _S),
    ("order", _S),
    ("round", _I),
    ("position", _I),
    ("role", _S),
    ("text", _S, True),
    ("finish_reason", _S),
    ("error", _S, True),
)

#: A reviewer's review of one response of a feedback loop; `iteration` is the response's k. Feedback is null if and
#: only if it was unreadable, and empty if there is nothing to improve.
REVIEWS = _schema(
    ("review_id", _S),
    ("candidate_id", _S),
    ("prompt_id", _S),
    ("reviewer", _S),
    ("iteration", _I),
    ("feedback", _S, True),
    ("score", _F, True),
    ("reason", _S, True),
    ("parse_status", _S),
    ("raw", _S, True),
    ("prompt_cut", _B, True),
)

#: Candidates that are revisions, each by the feedback of one review.
REVISIONS = CANDIDATES.append(pa.field("review_id", _S, nullable=False))

#: One row per optimiser step (`split` = train) or evaluation (`split` = eval).
TRAIN_METRICS = _schema(
    ("step", pa.int64()),
    ("split", _S),
    ("epoch", _F, True),
    ("loss", _F, True),
    ("learning_rate", _F, True),
    ("grad_norm", _F, True),
    ("kl", _F, True),
    ("rewards_chosen", _F, True),
    ("rewards_rejected", _F, True),
    ("rewards_margins", _F, True),
    ("rewards_accuracies", _F, True),
    ("logps_chosen", _F, True),
    ("logps_rejected", _F, True),
)

#: The call log, which is the audit trail. `bucket` is prompt_id mod 1,024; rows of a part file are sorted by it. `text`
#: is the reply as it came, with its thoughts, which are split off when it is read; `reasoning`, `inside`, `answered_by`
#: and `reasoning_tokens` are those of a `Completion`, null in logs of older versions.
CALLS = _schema(
    ("call_key", _S),
    ("bucket", pa.int16()),
    ("prompt_id", _S),
    ("model", _S),
    ("role", _S),
    ("messages", MESSAGES),
    ("sampling", _S),
    ("text", _S),
    ("finish_reason", _S),
    ("logprobs", _S, True),
    ("prompt_tokens", _I),
    ("completion_tokens", _I),
    ("cached_tokens", _I),
    ("latency_s", pa.float32()),
    ("reasoning", _S, True),
    ("inside", _B, True),
    ("answered_by", _S, True),
    ("reasoning_tokens", _I, True),
)

# Public benchmarks. The key of a row is benchmark, question_id and model (models and floors); `prompt_id` of a question
# is that of its first turn, and it decides the shard.

_TEXTS = pa.list_(pa.field("element", _S, nullable=False))
_FLAGS = pa.list_(pa.field("element", _B, nullable=False))

#: `position` is the place in the published file, from 0; `category` is MT-Bench's category or AlpacaEval's dataset;
#: `references` are MT-Bench's two reference answers or AlpacaEval's one reference output; `checks` is IFEval's
#: instructions and their arguments as JSON text.
BENCH_QUESTIONS = _schema(
    ("benchmark", _S),
    ("question_id", _S),
    ("prompt_id", _S),
    ("position", _I),
    ("category", _S),
    ("turns", _TEXTS),
    ("references", _TEXTS, True),
    ("checks", _S, True),
)

_BENCH_KEY = (("benchmark", _S), ("question_id", _S), ("prompt_id", _S), ("model", _S))

#: One row per turn; `answer` is null where there is none, with the finish reason.
BENCH_ANSWERS = _schema(*_BENCH_KEY, ("turn", _I), ("answer", _S, True), ("finish_reason", _S), ("error", _S, True))

#: MT-Bench, single grading: one row per turn.
BENCH_RATINGS = _schema(
    *_BENCH_KEY,
    ("category", _S),
    ("turn", _I),
    ("score", _F, True),
    ("parse_status", _S),
    ("contradictory", _B),
    ("raw", _S, True),
)

#: MT-Bench, pairwise: one row per turn and order; in order `ab` the model's answer is first, in `ba` the opponent's.
BENCH_COMPARISONS = _schema(
    *_BENCH_KEY,
    ("against", _S),
    ("category", _S),
    ("turn", _I),
    ("order", _S),
    ("choice", _S, True),
    ("parse_status", _S),
    ("contradictory", _B),
    ("raw", _S, True),
)

#: AlpacaEval: one row per place of the model's output. `first`: probability that the output shown first is better.
BENCH_PREFERENCES = _schema(
    *_BENCH_KEY,
    ("place", _S),
    ("first", _F, True),
    ("method", _S, True),
    ("label_mass", _F, True),
    ("parse_status", _S),
    ("raw", _S, True),
)

#: IFEval: one flag per instruction, in the question's order.
BENCH_CHECKS = _schema(*_BENCH_KEY, ("strict", _FLAGS), ("loose", _FLAGS), ("answered", _B), ("chance", _B))

#: A benchmark without a table of its own: one row per question, or several that `part` names. `score` is between 0 and
#: 1, null exactly if `parse_status` is not a read one.
BENCH_VERDICTS = _schema(*_BENCH_KEY, ("part", _S), ("score", _F, True), ("parse_status", _S), ("raw", _S, True))

TABLES: dict[str, pa.Schema] = {
    "prompts": PROMPTS,
    "candidates": CANDIDATES,
    "verdicts": VERDICTS,
    "checklists": CHECKLISTS,
    "recorded": RECORDED,
    "critiques": CRITIQUES,
    "decisions": DECISIONS,
    "pooled_decisions": POOLED_DECISIONS,
    "levels": LEVELS,
    "kto": KTO,
    "dpo": DPO,
    "sft": SFT,
    "confidence": CONFIDENCE,
    "responses": RESPONSES,
    "comparisons": COMPARISONS,
    "items": ITEMS,
    "ballots": BALLOTS,
    "speeches": SPEECHES,
    "card_items": CARD_ITEMS,
    "card_verdicts": CARD_VERDICTS,
    "reviews": REVIEWS,
    "revisions": REVISIONS,
    "train_metrics": TRAIN_METRICS,
    "calls": CALLS,
    "bench_questions": BENCH_QUESTIONS,
    "bench_answers": BENCH_ANSWERS,
    "bench_ratings": BENCH_RATINGS,
    "bench_comparisons": BENCH_COMPARISONS,
    "bench_preferences": BENCH_PREFERENCES,
    "bench_checks": BENCH_CHECKS,
    "bench_verdicts": BENCH_VERDICTS,
}


def row_schema(kind: str, weighted: bool) -> pa.Schema:
    """The schema of training files of a kind."""
    return TABLES[kind].append(WEIGHT) if weighted and kind in ("kto", "dpo") else TABLES[kind]


def cut_off(finish_reasons: pa.Array | pa.ChunkedArray) -> pa.BooleanArray | pa.ChunkedArray:
    """Whether each finish reason is that of a reply whose text is not whole; an unknown reason (null) is not."""
    known = pc.is_in(finish_reasons, value_set=pa.array(_NOT_CUT))
    return pc.and_(pc.is_valid(finish_reasons), pc.invert(known))


def is_cut_off(finish_reason: str) -> bool:
    """As `cut_off`, of one finish reason."""
    return finish_reason not in _NOT_CUT


def to_table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Build a table of exactly `schema` from row dicts; a missing required value is an error, not a null.

    Unpaired surrogates and NULs, which a reply's JSON can contain, are replaced with U+FFFD.

    Raises:
        ValueError: a required column is null; the message names the column and the row.
    """
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except UnicodeEncodeError:
        rows = storable_value(rows)
        table = pa.Table.from_pylist(rows, schema=schema)
    for i, field in enumerate(schema):
        if field.type == pa.string() and pc.any(pc.match_substring(table.column(i), "\0")).as_py():
            table = table.set_column(i, field, pc.replace_substring(table.column(i), "\0", "\ufffd"))
    for field in schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().index(True).as_py()
            raise ValueError(f"column {field.name!r} is empty in row {row}: {rows[row]!r}")
    return table


# --- files of earlier versions ----------------------------------------------------------------------------------------

#: Former name of a column → its present one.
RENAMED = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}


def renamed(found: pa.Schema, schema: pa.Schema) -> pa.Schema:
    """The schema of a stored file, with the column names that `schema` has today."""
    return pa.schema([f.with_name(new) if (new := RENAMED.get(f.name)) in schema.names else f for f in found])


def conformed(table: pa.Table, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """A stored table as `schema` is today: with the present names, and nulls in columns that were added since."""
    table = table.rename_columns(renamed(table.schema, schema).names)
    wanted = pa.schema([schema.field(name) for name in columns or schema.names])
    for field in wanted:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(wanted.names).cast(wanted)
