"""The Arrow schema of the tables of public benchmarks: questions, answers, and verdicts.

The key of a row is benchmark, question_id and model; `prompt_id` of a question is that of its first turn, and it
decides the shard. `model` contains models and floors.
"""

from __future__ import annotations

import pyarrow as pa

_S, _F, _I, _B = pa.string(), pa.float64(), pa.int32(), pa.bool_()
_TEXTS = pa.list_(pa.field("element", _S, nullable=False))
_FLAGS = pa.list_(pa.field("element", _B, nullable=False))


def _schema(*fields: tuple[str, pa.DataType] | tuple[str, pa.DataType, bool]) -> pa.Schema:
    """Fields are (name, type) for required columns and (name, type, True) for columns that may be null."""
    return pa.schema([pa.field(f[0], f[1], nullable=len(f) == 3) for f in fields])


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

_KEY = (("benchmark", _S), ("question_id", _S), ("prompt_id", _S), ("model", _S))

#: One row per turn; `answer` is null where there is none, with the finish reason.
BENCH_ANSWERS = _schema(*_KEY, ("turn", _I), ("answer", _S, True), ("finish_reason", _S))

#: MT-Bench, single grading: one row per turn.
BENCH_RATINGS = _schema(
    *_KEY,
    ("category", _S),
    ("turn", _I),
    ("score", _F, True),
    ("parse_status", _S),
    ("contradictory", _B),
    ("raw", _S, True),
)

#: MT-Bench, pairwise: one row per turn and order; in order `ab` the model's answer is first, in `ba` the opponent's.
BENCH_COMPARISONS = _schema(
    *_KEY,
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
    *_KEY,
    ("place", _S),
    ("first", _F, True),
    ("method", _S, True),
    ("label_mass", _F, True),
    ("parse_status", _S),
    ("raw", _S, True),
)

#: IFEval: one flag per instruction, in the question's order.
BENCH_CHECKS = _schema(*_KEY, ("strict", _FLAGS), ("loose", _FLAGS), ("answered", _B), ("chance", _B))

BENCHMARK_TABLES: dict[str, pa.Schema] = {
    "bench_questions": BENCH_QUESTIONS,
    "bench_answers": BENCH_ANSWERS,
    "bench_ratings": BENCH_RATINGS,
    "bench_comparisons": BENCH_COMPARISONS,
    "bench_preferences": BENCH_PREFERENCES,
    "bench_checks": BENCH_CHECKS,
}
