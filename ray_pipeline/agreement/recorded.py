"""Recorded judgements: JSON lines of items with human labels and the texts of judges, read by the live parsers.

One line is one item: `item_id`, `question`, `response_a`, `response_b`, `human_label` ("A", "B", "tie" or null), and
optionally `model_a`, `model_b`, `human_votes` ({annotator: label}) and recordings, by judge:

    direct           {"text", "stored_pick", "turns"}
    independent_MAX  {"text_a", "text_b", "stored_a", "stored_b", "turns_a", "turns_b"}
    combined_MAX     {"text", "stored_a", "stored_b", "turns"}
    debate           {"final": {role: text}, "stored_mean_1", "stored_mean_2"}
    versus           {"text", "winner"}, by run: answer A is the run's own, winner "agent", "tie" or an opponent's name

`text` is the first reply; after a retry (`turns` over 1) the later reply follows behind a blank line. A recording may
hold one of the swapped order under `swapped`, whose A is the answer that was shown first, the item's B. `stored_*` is
what the original run made of the reply; it is read only in `stored` replays.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ray_pipeline.agents.jury import MISSING, VOTES, compare_scores
from ray_pipeline.agents.labelled_replies import Scale, last_reply, read_pick, read_rating, read_scores
from ray_pipeline.agents.replies import Read
from ray_pipeline.data.sources import InputError, find_files, jsonl_records
from ray_pipeline.engines.base import Completion
from ray_pipeline.store.keys import digest, prompt_id

#: stored: use what the original run recorded. text: read the replies again.
Replay = Literal["text", "stored"]

LABELS = ("A", "B", "tie")
#: Fields of the item itself; objects under other names must be recordings.
ITEM_FIELDS = ("item_id", "question", "response_a", "response_b", "model_a", "model_b", "human_label", "human_votes")

_STRATEGY = re.compile(r"direct|debate|versus|(?:independent|combined)_([1-9][0-9]{0,5})")
#: A choice of a reply as a vote on two answers.
CHOICE_VOTES = {"A": "A", "B": "B", "C": "tie"}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Rows of the tables `items` and `ballots`, in the order of the file."""

    items: list[dict[str, Any]]
    ballots: list[dict[str, Any]]


def read_recorded(path: str, replay: Replay = "text") -> Recorded:
    """All items and judgements of a JSONL file (or of all files of a pattern), plain or `.gz`.

    Raises:
        InputError: naming file, line and field, for anything that is not as the module describes.
    """
    items: list[dict[str, Any]] = []
    ballots: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for where, row in _lines(path):
        item = read_item(where, row)
        if item["item_id"] in seen:
            raise InputError(f"{where}: item_id {item['item_id']!r} is on {seen[item['item_id']]} too; ids must differ")
        seen[item["item_id"]] = where
        items.append(item)
        for strategy, recordings in _recordings(where, row):
            for judge, recording in recordings.items():
                place = f"{where}: {strategy}.{judge}"
                if not isinstance(recording, dict):
                    raise InputError(f"{place} must be an object, not {type(recording).__name__}")
                ballots += _ballots(place, item, strategy, judge, recording, replay)
    if not items:
        raise InputError(f"{path} holds no item; check that it was written")
    return Recorded(items, ballots)


def read_item(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The `items` row of a line. `where` names file and line in errors."""
    item_id = row.get("item_id")
    if not isinstance(item_id, str) or not item_id:
        raise InputError(f"{where}: item_id must be text and not empty, not {item_id!r}")
    for field in ("question", "response_a", "response_b", "model_a", "model_b"):
        if not isinstance(row.get(field), (str, type(None))):
            raise InputError(f"{where}: {field} must be text or null, not {type(row[field]).__name__}")
    if "human_label" not in row and "versus" not in row:
        raise InputError(f"{where}: human_label is missing; it is one of {', '.join(LABELS)}, or null")
    _check_label(where, "human_label", row.get("human_label"))
    votes = row.get("human_votes") or {}
    if not isinstance(votes, dict):
        raise InputError(f"{where}: human_votes must be an object of annotator: label, not {type(votes).__name__}")
    for annotator, label in votes.items():
        _check_label(where, f"human_votes.{annotator}", label)
    question = row.get("question")
    # Items without their question still need a shard; nothing is asked about them.
    prompt = prompt_id([{"role": "user", "content": question}]) if question else digest(["item", item_id])
    return {
        **{field: row.get(field) for field in ITEM_FIELDS},
        "prompt_id": prompt,
        "human_votes": [{"annotator": a, "label": v} for a, v in sorted(votes.items()) if v is not None],
    }


def _check_label(where: str, field: str, label: Any) -> None:
    if label is not None and label not in LABELS:
        raise InputError(f"{where}: {field} must be one of {', '.join(LABELS)}, or null, not {label!r}")


def _lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in find_files(path):
        for number, row in jsonl_records(file):
            yield f"{file.uri}: line {number}", row


def _recordings(where: str, row: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recordings of a line by strategy; other objects are passed over unless they look like one."""
    for name, value in row.items():
        if name in ITEM_FIELDS or not isinstance(value, dict):
            continue
        if _STRATEGY.fullmatch(name):
            yield name, value
        elif _looks_recorded(name, value):
            near = difflib.get_close_matches(name, _EXAMPLES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_EXAMPLES)} (with any maximum)"
            raise InputError(f"{where}: unknown kind of recording {name}; {hint}")


_EXAMPLES = ("direct", "independent_10", "combined_5", "combined_10", "combined_100", "debate", "versus")
_RECORDED = {"text", "text_a", "text_b", "stored_a", "stored_pick", "final", "winner"}


def _looks_recorded(name: str, value: Mapping[str, Any]) -> bool:
    by_name = difflib.get_close_matches(name, _EXAMPLES, n=1, cutoff=0.75)
    return bool(by_name) or any(isinstance(part, dict) and _RECORDED & part.keys() for part in value.values())


def _ballots(
    where: str, item: Mapping[str, Any], strategy: str, judge: str, recording: Mapping[str, Any], replay: Replay
) -> list[dict[str, Any]]:
    base = {"item_id": item["item_id"], "prompt_id": item["prompt_id"], "strategy": strategy, "judge": judge}
    if strategy == "debate":
        return [{**base, **ballot} for ballot in _debate(where, recording, replay)]
    read = _stored if replay == "stored" else _text
    found = [{**base, "voice": "", "order": "ab", **read(where, strategy, recording)}]
    swapped = recording.get("swapped")
    if swapped is not None:
        if not isinstance(swapped, dict):
            raise InputError(f"{where}.swapped must be an object, not {type(swapped).__name__}")
        found.append({**base, "voice": "", "order": "ba", **unswapped(read(f"{where}.swapped", strategy, swapped))})
    return found


def unswapped(ballot: Mapping[str, Any]) -> dict[str, Any]:
    """A ballot on (B, A) as one on (A, B)."""
    vote = {"A": "B", "B": "A"}.get(ballot["vote"], ballot["vote"])
    return {**ballot, "score_a": ballot["score_b"], "score_b": ballot["score_a"], "vote": vote}


def vote_of(score_a: float | None, score_b: float | None) -> str | None:
    """The vote that two scores are; None unless both were read."""
    if score_a is None or score_b is None:
        return None
    code = int(compare_scores(score_a, score_b))
    return None if code == MISSING else VOTES[code]


# --- what the original run made of the replies ------------------------------------------------------------------------


def _stored(where: str, strategy: str, recording: Mapping[str, Any]) -> dict[str, Any]:
    if strategy == "direct":
        pick = _field(where, recording, "stored_pick", str, "replay: stored needs it; use replay: text")
        if pick not in LABELS:
            raise InputError(f"{where}.stored_pick must be one of {', '.join(LABELS)}, not {pick!r}")
        return _ballot(recording, "ok", vote=pick)
    if strategy == "versus":
        winner = _field(where, recording, "winner", str, "replay: stored needs it; use replay: text")
        # Some runs use another word for the opponent; anything but the agent or a tie is the opponent.
        return _ballot(recording, "ok", vote={"agent": "A", "tie": "tie"}.get(winner, "B"))
    scores = [_number(where, recording, f"stored_{side}") for side in "ab"]
    return _ballot(recording, "ok", scores)


# --- the replies themselves -------------------------------------------------------------------------------------------


def _text(where: str, strategy: str, recording: Mapping[str, Any]) -> dict[str, Any]:
    kind, _, maximum = strategy.partition("_")
    if kind == "direct":
        found, status = _read(where, recording, "text", "turns", lambda r: read_pick(r, tuple(CHOICE_VOTES), "text"))
        if found is None:
            return _ballot(recording, status)
        return _ballot(recording, status, vote=CHOICE_VOTES[found["choice"]], reason=found["reason"])
    scale = recorded_scale(int(maximum or 10))
    if kind == "versus":
        return _versus(where, recording, scale)
    if kind == "independent":
        one, other = (
            _read(where, recording, f"text_{side}", f"turns_{side}", lambda r: read_rating(r, scale, "text"))
            for side in "ab"
        )
        scores = [None if found is None else found["score"] for found, _ in (one, other)]
        reasons = [found["reason"] for found, _ in (one, other) if found and found["reason"]]
        return _ballot(recording, _worse(one[1], other[1]), scores, reason="\n\n".join(reasons) or None)
    found, status = _read(where, recording, "text", "turns", lambda r: read_scores(r, ("A", "B"), scale, "text"))
    if found is None:
        return _ballot(recording, status)
    scores = [found["scores"][label] for label in ("A", "B")]
    return _ballot(recording, status, scores, reason=found["reason"])


def _versus(where: str, recording: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """A pairwise verdict, by scores or by choice."""
    found, status = _read(where, recording, "text", "turns", lambda r: read_scores(r, ("A", "B"), scale, "text"))
    if found is not None:
        scores = [found["scores"][label] for label in ("A", "B")]
        return _ballot(recording, status, scores, reason=found["reason"])
    found, status = _read(where, recording, "text", "turns", lambda r: read_pick(r, tuple(CHOICE_VOTES), "text"))
    if found is None:
        return _ballot(recording, status)
    return _ballot(recording, status, vote=CHOICE_VOTES[found["choice"]], reason=found["reason"])


@functools.cache
def recorded_scale(maximum: int) -> Scale:
    """Scores in recordings may be 0 and may have decimals."""
    return Scale(low=0, high=maximum, decimals=True)


def _read(
    where: str, recording: Mapping[str, Any], field: str, turns_field: str, reader: Callable[[Completion], Read | None]
) -> tuple[dict[str, Any] | None, str]:
    """Fields read from a text, and its parse status. The text is null for a call without a reply."""
    if field not in recording:
        raise InputError(f"{where}.{field} is missing")
    text, turns = recording[field], recording.get(turns_field, 1)
    if text is None:
        return None, "error"
    if not isinstance(text, str):
        raise InputError(f"{where}.{field} must be text or null, not {type(text).__name__}")
    if not isinstance(turns, int) or isinstance(turns, bool) or turns < 1:
        raise InputError(f"{where}.{turns_field} must be a whole number from 1 on, not {turns!r}")
    found = last_reply(text, turns, reader)
    if found is None:
        return None, "unparsed"
    return found.fields, "repaired" if turns > 1 else found.status


def _worse(*statuses: str) -> str:
    order = ("error", "unparsed", "repaired", "ok")
    return min(statuses, key=order.index)


def _debate(where: str, recording: Mapping[str, Any], replay: Replay) -> Iterator[dict[str, Any]]:
    """One ballot a voice; in a stored replay one of the stored means, where the run kept them."""
    if replay == "stored" and ("stored_mean_1" in recording or "stored_mean_2" in recording):
        means = [_number(where, recording, f"stored_mean_{side}") for side in "12"]
        yield {"voice": "", "order": "ab", **_ballot({}, "ok", means)}
        return
    final = _field(where, recording, "final", dict, "it holds the scoring text of each role")
    if not final:
        raise InputError(f"{where}.final is empty; it holds the scoring text of each role")
    for role in final:
        scores: list[float | None] = [None, None]
        reason: str | None = None
        for labels in (("1", "2"), ("A", "B")):
            found, status = _debater(f"{where}.final", final, role, labels)
            if found is not None:
                scores, reason = [found["scores"][label] for label in labels], found["reason"]
                break
        if replay == "stored" and found is None:
            scores, status = [0.0, 0.0], "ok"  # the original counted an unread agent so
        yield {"voice": role, "order": "ab", **_ballot({"text": final[role]}, status, scores, reason=reason)}


def _debater(
    where: str, final: Mapping[str, Any], role: str, labels: tuple[str, str]
) -> tuple[dict[str, Any] | None, str]:
    """A debater's last words; the answers are called 1 and 2, or A and B."""
    scale = recorded_scale(10)
    return _read(where, {role: final[role]}, role, "turns", lambda r: read_scores(r, labels, scale, "text"))


def _ballot(
    recording: Mapping[str, Any],
    status: str,
    scores: Sequence[float | None] = (None, None),
    vote: str | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    texts = [t for t in (recording.get(f) for f in ("text", "text_a", "text_b")) if isinstance(t, str)]
    return {
        "score_a": scores[0],
        "score_b": scores[1],
        "vote": vote_of(*scores) if vote is None else vote,
        "reason": reason,
        "parse_status": status,
        "raw": "\n\n".join(texts) or None,
    }


def _field(where: str, recording: Mapping[str, Any], field: str, kind: type, hint: str) -> Any:
    if field not in recording:
        raise InputError(f"{where}.{field} is missing; {hint}")
    value = recording[field]
    if not isinstance(value, kind):
        raise InputError(f"{where}.{field} must be {kind.__name__}, not {type(value).__name__}; {hint}")
    return value


def _number(where: str, recording: Mapping[str, Any], field: str) -> float:
    value = recording.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise InputError(f"{where}.{field} must be a number, not {value!r}; replay: stored needs it, replay: text not")
    return float(value)
