"""The examples of the HTML page: all kept candidates and a seeded sample of the others, packed to be small.

Texts lie in gzip-compressed parts of some hundred rows, in base64. The page unpacks the index when it opens, and a part
only when one of its rows is opened or searched: a page of 20,000 candidates opens as fast as one of 20. When even the
compressed texts are too large, long texts are cut, and the page states the limit.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from ray_pipeline.evaluate.calls_shown import Call, Calls, calls_about
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.excerpts import as_text
from ray_pipeline.report.page import Packed
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.store.outside import visible
from ray_pipeline.store.schemas import LABELS

#: Number of candidates shown although they are not kept (smallest seeded hashes).
OTHERS = 2_500
#: Maximum size of index and texts in bytes of base64; with charts and tables the page stays under 15 MB.
BUDGET = 14_400_000
#: Limits in characters of prompts and answers; the first one with which everything fits the budget is used.
LIMITS = (20_000, 8_000, 4_000, 2_500, 2_000, 1_600, 1_300, 1_000, 800, 700, 600, 500, 400, 300, 200, 100)
#: Number of candidates with the calls about them (smallest seeded hashes).
WITH_CALLS = 2_000
#: Reasons are cut at a fifth of that limit, but not below this number of characters.
_REASON = 80
#: Characters of a prompt in the list.
SNIPPET = 90
_ROWS_PER_CHUNK = 400
#: Places of the row's own prompt and answer in a message; shorter ones are repeated in it.
_PROMPT, _ANSWER, _SHORT = -1, -2, 20
_KEPT = ("desirable", "undesirable")


def collect_examples(data: ReportData, *, others: int = OTHERS, budget: int = BUDGET) -> Packed | None:
    """None without decisions or without the texts of the candidates."""
    if data.decisions is None or data.candidates is None or "response" not in data.candidates.column_names:
        return None
    rows = _chosen(data, others)
    calls = _calls(data, rows)
    texts = _texts(data, rows, calls)
    judges = sorted(data.verdicts.column("judge").unique().to_pylist()) if data.verdicts is not None else []
    failures = sorted({row["failure"] for row in rows if row["failure"] is not None})
    limit, rows, index, packed = _fit(rows, texts, budget, lambda rows: _packed(_index(rows, judges, failures)))
    return Packed(
        about={
            "judges": [visible(judge) for judge in judges],
            "labels": list(LABELS),
            "failures": [visible(failure) for failure in failures],
            "chunk_rows": _ROWS_PER_CHUNK,
            "rows": len(rows),
        },
        index=index,
        chunks=packed,
        scope=_scope(data, rows, limit, texts.longest, calls),
        rows=len(rows),
    )


@dataclass(frozen=True)
class _Texts:
    """Texts by id, not cut yet; `of` a candidate gives its answer and all reasons, `calls` the calls about it."""

    prompts: Mapping[str, str]
    of: Callable[[dict[str, Any]], list[Any]]
    longest: int
    calls: Mapping[str, Sequence[Call]]


def _chosen(data: ReportData, others: int) -> list[dict[str, Any]]:
    """Index rows of all kept candidates and of `others` seeded ones, by prompt, in the order of the prompts."""
    assert data.decisions is not None and data.candidates is not None
    columns = ["candidate_id", "label", "final_score", "score_variance", "mean_score", "penalty", "why"]
    decisions = data.decisions.select([c for c in columns if c in data.decisions.column_names])
    labels = decisions.column("label")
    kept = pc.is_in(labels, value_set=pa.array(_KEPT))
    rest = decisions.filter(pc.invert(kept)).column("candidate_id").to_pylist()
    seed = data.bootstrap_seed
    sampled = sorted(rest, key=lambda name: (unit_hash("report examples", seed, name), name))[:others]
    shown = pc.or_(kept, pc.is_in(decisions.column("candidate_id"), value_set=pa.array(sampled, pa.string())))
    rows: list[dict[str, Any]] = decisions.filter(shown).to_pylist()
    candidates = _by_id(data.candidates, rows, [c for c in ("prompt_id", "k") if c in data.candidates.column_names])
    lengths = dict(
        zip(
            data.candidates.column("candidate_id").to_pylist(),
            pc.utf8_length(data.candidates.column("response")).to_pylist(),
            strict=True,
        )
    )
    order = _prompt_order(data)
    failures = _critiques(data, rows)
    for row in rows:
        found = candidates.get(row["candidate_id"], {})
        row["prompt_id"], row["k"] = found.get("prompt_id"), found.get("k")
        row["chars"] = lengths.get(row["candidate_id"]) or 0
        row["critique"] = failures.get(row["candidate_id"])
        row["failure"] = (row["critique"] or {}).get("failure_type")
    rows.sort(key=lambda row: (order.get(row["prompt_id"], len(order)), row["k"] or 0, row["candidate_id"]))
    return rows


def _calls(data: ReportData, rows: list[dict[str, Any]]) -> Calls | None:
    """The logged calls about WITH_CALLS of the rows; None where no call log is known."""
    if not data.calls or data.candidates is None:
        return None
    seed = data.bootstrap_seed
    some = sorted(rows, key=lambda row: (unit_hash("report calls", seed, row["candidate_id"]), row["candidate_id"]))
    shown = {row["candidate_id"]: row["prompt_id"] for row in some[:WITH_CALLS]}
    columns = data.candidates.select(["candidate_id", "prompt_id", "response"])
    of_prompts = pc.is_in(columns["prompt_id"], value_set=pa.array(set(shown.values()), pa.string()))
    responses: dict[str, dict[str, str]] = {}
    for row in columns.filter(pc.and_(of_prompts, pc.is_valid(columns["response"]))).to_pylist():
        responses.setdefault(row["prompt_id"], {})[row["candidate_id"]] = row["response"]
    raw: dict[tuple[str, str], str] = {}
    for table, role in ((data.verdicts, "judge/"), (data.critiques, "critic")):
        if table is not None and {"candidate_id", "raw"} <= set(table.column_names):
            columns = ["candidate_id", "raw", *(["judge"] if role == "judge/" else [])]
            for row in _only(table, [{"candidate_id": name} for name in shown], columns).to_pylist():
                if row["raw"] is not None:
                    raw[row["candidate_id"], role + row.get("judge", "")] = row["raw"]
    return calls_about(Folder(data.calls), responses, shown, raw)


def _texts(data: ReportData, rows: list[dict[str, Any]], calls: Calls | None) -> _Texts:
    """Adds `scores` and `snippet`, which the index needs, to the rows."""
    responses = _by_id(data.candidates, rows, ["response"])
    verdicts: dict[str, dict[str, dict[str, Any]]] = {}
    if data.verdicts is not None:
        columns = [c for c in ("reason", "parse_status", "score", "raw") if c in data.verdicts.column_names]
        for row in _only(data.verdicts, rows, ["candidate_id", "judge", *columns]).to_pylist():
            verdicts.setdefault(row["candidate_id"], {})[row["judge"]] = row
    prompts: dict[str, str] = {}
    if data.prompts is not None:
        wanted = pa.array({row["prompt_id"] for row in rows}, pa.string())
        named = data.prompts.filter(pc.is_in(data.prompts.column("prompt_id"), value_set=wanted))
        for row in named.select(["prompt_id", "messages"]).to_pylist():
            prompts[row["prompt_id"]] = visible(as_text(row["messages"]))

    def texts_of(row: dict[str, Any]) -> list[Any]:
        """[answer, why, critique's reason, status, flawed, [[judge, score, reason, status, raw] …], critique's raw]"""
        name = row["candidate_id"]
        critique = row["critique"] or {}
        scores = [
            [visible(judge), v.get("score"), _shown(v.get("reason")), v.get("parse_status"), _shown(v.get("raw"))]
            for judge, v in sorted(verdicts.get(name, {}).items())
        ]
        flawed = critique.get("flawed")
        return [
            _shown(responses.get(name, {}).get("response")),
            _shown(row.get("why")),
            _shown(critique.get("reason")),
            critique.get("parse_status"),
            flawed,
            scores,
            _shown(critique.get("raw")),
        ]

    for row in rows:
        row["scores"] = {judge: found.get("score") for judge, found in verdicts.get(row["candidate_id"], {}).items()}
        row["snippet"] = " ".join(prompts.get(row["prompt_id"], "").split())[:SNIPPET]
    longest = max((row["chars"] for row in rows), default=0)
    longest = max(longest, max(map(len, prompts.values()), default=0))
    return _Texts(prompts, texts_of, longest, calls.of if calls else {})


def _fit(
    rows: list[dict[str, Any]],
    texts: _Texts,
    budget: int,
    index_of: Callable[[list[dict[str, Any]]], Markup],
) -> tuple[int | None, list[dict[str, Any]], Markup, list[Markup]]:
    """The largest limit whose packed texts fit, judged on every eighth chunk first; then, if none does, fewer rows.

    Returns (limit, or None where nothing was cut; rows; index; chunks).
    """
    while True:
        index = index_of(rows)
        left = budget - len(index)
        starts = range(0, len(rows), _ROWS_PER_CHUNK)
        for limit in LIMITS:
            if LIMITS[0] > limit > 5 * texts.longest:
                continue
            if len(starts) > 16:
                some = [_chunk(rows, texts, start, limit) for start in starts[::8]]
                if sum(map(len, some)) * len(starts) / len(some) > left * 1.02:
                    continue
            packed = [_chunk(rows, texts, start, limit) for start in starts]
            if sum(map(len, packed)) <= left:
                return (limit if texts.longest > limit or limit < LIMITS[0] else None), rows, index, packed
        # Millions of kept rows: those of the smallest hash stay.
        half = sorted(rows, key=lambda row: unit_hash("report rows", 0, row["candidate_id"]))[: len(rows) // 2]
        chosen = {row["candidate_id"] for row in half}
        rows = [row for row in rows if row["candidate_id"] in chosen]


def _chunk(rows: Sequence[dict[str, Any]], texts: _Texts, start: int, limit: int) -> Markup:
    """Rows from `start` on, their prompts and the texts of messages once:
    {"p": [prompts], "t": [texts], "r": [[prompt's place, answer, why, …, calls]]}."""
    prompts: dict[str, int] = {}
    sent: dict[str, int] = {}
    listed = []
    for row in rows[start : start + _ROWS_PER_CHUNK]:
        place = prompts.setdefault(row["prompt_id"], len(prompts))
        answer, *reasons = texts.of(row)
        told = (_PROMPT, texts.prompts.get(row["prompt_id"], "")), (_ANSWER, answer or "")
        calls = [_packed_call(call, told, sent, limit) for call in texts.calls.get(row["candidate_id"], ())]
        listed.append([place, _cut(answer, limit), *_cut(reasons, max(_REASON, limit // 5)), calls])
    shown = [_cut(texts.prompts.get(name, "(not given)"), limit) for name in prompts]
    return _packed({"p": shown, "t": [_cut(text, limit) for text in sent], "r": listed})


def _packed_call(call: Call, told: Sequence[tuple[int, str]], sent: dict[str, int], limit: int) -> list[Any]:
    """[role, [[role of the message, [places]] …], [[reply, finish reason, reasoning] …]].

    A place is one of `sent`, which grows, or the number of a text that is `told` with the row anyway.
    """
    messages = [[role, [*_places(visible(content), told, sent)]] for role, content in call.messages]
    replies = [[_cut(_shown(text), limit) for text in reply[:3]] for reply in call.replies]
    return [visible(call.role), messages, replies]


def _places(text: str, told: Sequence[tuple[int, str]], sent: dict[str, int]) -> Iterator[int]:
    if not told:
        if text:
            yield sent.setdefault(text, len(sent))
        return
    (number, known), *others = told
    before, found, after = text.partition(known) if len(known) > _SHORT else (text, "", "")
    yield from _places(before, others, sent)
    if found:
        yield number
        yield from _places(after, others, sent)


def _index(rows: Sequence[Mapping[str, Any]], judges: Sequence[str], failures: Sequence[str]) -> dict[str, Any]:
    """A column a property; the list, its filters and its order need no more."""
    prompts: dict[Any, int] = {}
    snippets: list[str] = []
    places = []
    for row in rows:
        if row["prompt_id"] not in prompts:
            prompts[row["prompt_id"]] = len(prompts)
            snippets.append(row["snippet"])
        places.append(prompts[row["prompt_id"]])
    failure_places = {name: i for i, name in enumerate(failures)}
    return {
        "id": [visible(row["candidate_id"]) for row in rows],
        "prompt": places,
        "prompts": [visible(str(prompt)) for prompt in prompts],
        "snippets": snippets,
        "label": [LABELS.index(row["label"]) for row in rows],
        "final": [_rounded(row["final_score"]) for row in rows],
        "mean": [_rounded(row.get("mean_score")) for row in rows],
        "penalty": [row.get("penalty") for row in rows],
        "variance": [_rounded(row.get("score_variance")) for row in rows],
        "failure": [failure_places.get(row["failure"], -1) for row in rows],
        "chars": [row["chars"] for row in rows],
        "scores": [[row["scores"].get(judge) for row in rows] for judge in judges],
    }


def _scope(
    data: ReportData, rows: Sequence[Mapping[str, Any]], limit: int | None, longest: int, calls: Calls | None
) -> str:
    assert data.decisions is not None
    here = sum(row["label"] in _KEPT for row in rows)
    kept = pc.sum(pc.is_in(data.decisions.column("label"), value_set=pa.array(_KEPT))).as_py() or 0
    other, all_others = len(rows) - here, len(data.decisions) - kept
    scope = f"{'All ' if here == kept else f'{here:,} of '}{kept:,} kept candidates"
    if other == all_others:
        scope += f" and all {all_others:,} others are here."
    else:
        scope += f" and {other:,} of {all_others:,} others, chosen by a seeded hash and not by their looks, are here."
    if here < kept:
        scope += " More would make this page too large."
    if limit is not None:
        scope += (
            f" Prompts and answers are cut at {limit:,} characters (the longest has {longest:,}), reasons at "
            f"{max(_REASON, limit // 5):,}; the run's tables hold them whole."
        )
    if calls is not None and calls.of:
        sent = sum(row["candidate_id"] in calls.of for row in rows)
        scope += f" {sent:,} of them have the calls about them: the messages that were sent, and the raw replies."
    return f"{scope} {calls.missing}" if calls is not None and calls.missing else scope


def _by_id(table: pa.Table | None, rows: Sequence[Mapping[str, Any]], columns: list[str]) -> dict[str, dict[str, Any]]:
    if table is None:
        return {}
    found = _only(table, rows, ["candidate_id", *columns]).to_pylist()
    return {row["candidate_id"]: row for row in found}


def _only(table: pa.Table, rows: Sequence[Mapping[str, Any]], columns: list[str]) -> pa.Table:
    wanted = pa.array([row["candidate_id"] for row in rows], pa.string())
    return table.select(columns).filter(pc.is_in(table.column("candidate_id"), value_set=wanted))


def _critiques(data: ReportData, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if data.critiques is None or "candidate_id" not in data.critiques.column_names:
        return {}
    wanted = ("flawed", "failure_type", "reason", "parse_status", "raw")
    return _by_id(data.critiques, rows, [c for c in wanted if c in data.critiques.column_names])


def _prompt_order(data: ReportData) -> dict[str, int]:
    source = data.prompts if data.prompts is not None else data.candidates
    assert source is not None
    return {name: i for i, name in enumerate(source.column("prompt_id").unique().to_pylist())}


def _cut(value: Any, limit: int) -> Any:
    """Every text within `value` of at most `limit` characters, with how many are missing."""
    if isinstance(value, str):
        return value if len(value) <= limit else f"{value[:limit]}… [{len(value) - limit:,} more characters]"
    if isinstance(value, list):
        return [_cut(item, limit) for item in value]
    return value


def _shown(text: str | None) -> str | None:
    return None if text is None else visible(text)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _packed(value: Any) -> Markup:
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode("ascii"))


def _finite(value: Any) -> Any:
    """NaN (a score of a foreign table) has no JSON: null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
