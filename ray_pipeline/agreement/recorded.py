"""Recorded judgements: JSON lines of items with human labels and the texts of judges, read by the live parsers.

One line is one item: `item_id`, `question`, `response_a`, `response_b`, `human_label` ("A", "B", "tie" or null), and
optionally `model_a`, `model_b`, `human_votes` ({annotator: label}) and recordings, by judge:

    direct           {"text", "stored_pick", "turns"}
    independent_MAX  {"text_a", "text_b", "stored_a", "stored_b", "turns_a", "turns_b"}; scores from 0 to MAX
    independent_MIN-MAX, combined_MIN-MAX: the same on a scale whose lower end is not 0
    combined_MAX     {"text", "stored_a", "stored_b", "turns"}
    debate           {"final": {role: text}, "turns" (of all roles, or {role: turns}), "stored_mean_1", "stored_mean_2"}
    versus           {"text", "winner"}, by run: answer A is the run's own, winner "agent", "tie" or an opponent's name

`text` is the first reply; after a retry (`turns` over 1) the later reply follows behind a blank line. Its verdict is
read in the house style that `format` names. A recording may hold one of the swapped order under `swapped`, whose A is
the answer that was shown first, the item's B. `stored_*` is what the original run made of the reply (null: unread); it
is read only in `stored` replays. The reason of an unread reply says why (`unread: contradictory`).

Thoughts at the start of the two answers are split off when the items are read (`data.thoughts`), and so are not judged.
Labels may have other names (`label_of`): `model_a`, `a` or 1 is A; `tie (bothbad)` or `draw` is a tie. `C` and 0 are
refused, because they mean a tie in some files and an answer in others.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ray_pipeline.agents.jury import MISSING, VOTES, compare_scores
from ray_pipeline.agents.labelled_replies import Scale, last_reply, pick_verdict, rating_verdict, scores_verdict
from ray_pipeline.agents.replies import Read
from ray_pipeline.agents.verdict_styles import Format
from ray_pipeline.agents.verdicts import Unread
from ray_pipeline.data.sources import InputError, find_files, jsonl_records
from ray_pipeline.engines.base import Completion
from ray_pipeline.store.keys import digest, prompt_id

#: stored: use what the original run recorded. text: read the replies again.
Replay = Literal["text", "stored"]

LABELS = ("A", "B", "tie")
#: Fields of the item itself; objects under other names must be recordings.
ITEM_FIELDS = ("item_id", "question", "response_a", "response_b", "model_a", "model_b", "human_label", "human_votes")

_STRATEGY = re.compile(r"direct|debate|versus|(?:independent|combined)_(?:([0-9]{1,5})-)?([1-9][0-9]{0,5})")
#: A choice of a reply as a vote on two answers.
CHOICE_VOTES = {"A": "A", "B": "B", "C": "tie"}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Rows of the tables `items` and `ballots`, in the order of the file."""

    items: list[dict[str, Any]]
    ballots: list[dict[str, Any]]


def read_recorded(path: str, replay: Replay = "text", format: Format = "auto") -> Recorded:
    """All items and judgements of a JSONL file (or of all files of a pattern), plain or `.gz`.

    Args:
        format: house style in which the judges wrote their verdicts.

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
                ballots += _ballots(place, item, strategy, judge, recording, replay, format)
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
    if more := sorted(field for field in row if re.fullmatch(r"(?:response|model)_[c-z]", field)):
        raise InputError(f"{where}: {more[0]}: an item has two responses; for best of k, judge with strategy kind best")
    if "human_label" not in row and "versus" not in row:
        raise InputError(f"{where}: human_label is missing; it is one of {', '.join(LABELS)}, or null")
    label = label_of(where, "human_label", row.get("human_label"))
    votes = row.get("human_votes") or {}
    if not isinstance(votes, dict):
        raise InputError(f"{where}: human_votes must be an object of annotator: label, not {type(votes).__name__}")
    votes = {annotator: label_of(where, f"human_votes.{annotator}", vote) for annotator, vote in votes.items()}
    question = row.get("question")
    # Items without their question still need a shard; nothing is asked about them.
    prompt = prompt_id([{"role": "user", "content": question}]) if question else digest(["item", item_id])
    return {
        **{field: row.get(field) for field in ITEM_FIELDS},
        "human_label": label,
        "prompt_id": prompt,
        "human_votes": [{"annotator": a, "label": v} for a, v in sorted(votes.items()) if v is not None],
    }


_LABEL_NAMES = {
    **dict.fromkeys(("a", "model_a", "response_a", "answer_a", "assistant_a", "1"), "A"),
    **dict.fromkeys(("b", "model_b", "response_b", "answer_b", "assistant_b", "2"), "B"),
    **dict.fromkeys(("tie", "draw", "equal", "tie (bothbad)", "tie (both good)", "both_good", "both_bad"), "tie"),
}


def label_of(where: str, field: str, label: Any) -> str | None:
    """A label under one of its names, or None for null.

    Raises:
        InputError: naming place and field, for a label that is none, or that may mean two things.
    """
    if label is None:
        return None
    text = isinstance(label, (str, int, float)) and not isinstance(label, bool)
    name = f"{label:g}" if isinstance(label, float) else str(label)
    found = _LABEL_NAMES.get(re.sub(r"[ _]+(?=[ab]\Z)", "_", name.strip().lower())) if text else None
    if found is None:
        doubt = "; a tie in some files and an answer in others" if name in ("C", "c", "0") and text else ""
        raise InputError(f"{where}: {field} must be one of {', '.join(LABELS)}, or null, not {label!r}{doubt}")
    return found


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
            low, dash, high = name.rpartition("_")[2].partition("-")
            if dash and int(low) >= int(high):
                raise InputError(f"{where}: {name} names a scale from {low} to {high}; its lower end comes first")
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
    where: str,
    item: Mapping[str, Any],
    strategy: str,
    judge: str,
    recording: Mapping[str, Any],
    replay: Replay,
    format: Format,
) -> list[dict[str, Any]]:
    base = {"item_id": item["item_id"], "prompt_id": item["prompt_id"], "strategy": strategy, "judge": judge}
    if strategy == "debate":
        return [{**base, **ballot} for ballot in _debate(where, recording, replay, format)]
    reader = _Reader(item, format)
    read = _stored if replay == "stored" else functools.partial(_text, reader)
    found = [{**base, "voice": "", "order": "ab", **read(where, strategy, recording)}]
    swapped = recording.get("swapped")
    if swapped is not None:
        if not isinstance(swapped, dict):
            raise InputError(f"{where}.swapped must be an object, not {type(swapped).__name__}")
        read = _stored if replay == "stored" else functools.partial(_text, reader.swapped())
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
        pick = _field(where, recording, "stored_pick", "replay: stored needs it; use replay: text")
        vote = label_of(where.rpartition(": ")[0], f"{where.rpartition(': ')[2]}.stored_pick", pick)
        return _ballot(recording, "unparsed" if vote is None else "ok", vote=vote)
    if strategy == "versus":
        winner = _field(where, recording, "winner", "replay: stored needs it; use replay: text")
        if winner is None:
            return _ballot(recording, "unparsed")
        if not isinstance(winner, str):
            raise InputError(f"{where}.winner must be text or null, not {type(winner).__name__}; use replay: text")
        # Some runs use another word for the opponent; anything but the agent or a tie is the opponent.
        return _ballot(recording, "ok", vote={"agent": "A", "tie": "tie"}.get(winner, "B"))
    scores = [_number(where, recording, f"stored_{side}") for side in "ab"]
    return _ballot(recording, "unparsed" if None in scores else "ok", scores)


# --- the replies themselves -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Reader:
    """The readers of an item's replies. The item's models are names of its answers."""

    item: Mapping[str, Any]
    format: Format

    def swapped(self) -> _Reader:
        models = {"model_a": self.item["model_b"], "model_b": self.item["model_a"]}
        return _Reader({**self.item, **models}, self.format)

    def pick(self, reply: Completion) -> Read | Unread:
        models = [re.sub(r"[\s_]+", " ", (self.item[f"model_{side}"] or "").strip().lower()) for side in "ab"]
        names = (
            {} if models[0] == models[1] else {name: label for name, label in zip(models, "AB", strict=True) if name}
        )
        return pick_verdict(reply, tuple(CHOICE_VOTES), "text", self.format, "C", names)

    def rating(self, scale: Scale, reply: Completion) -> Read | Unread:
        return rating_verdict(reply, scale, "text", self.format)

    def scores(self, scale: Scale, labels: Sequence[str], reply: Completion) -> Read | Unread:
        return scores_verdict(reply, labels, scale, "text", self.format)


def _text(reader: _Reader, where: str, strategy: str, recording: Mapping[str, Any]) -> dict[str, Any]:
    kind, _, span = strategy.partition("_")
    if kind == "direct":
        return _of_pick(recording, _read(where, recording, "text", "turns", reader.pick))
    low, _, high = span.rpartition("-")
    scale = recorded_scale(int(high or 10), int(low or 0))
    scores = functools.partial(reader.scores, scale, ("A", "B"))
    if kind == "independent":
        rating = functools.partial(reader.rating, scale)
        both = [_read(where, recording, f"text_{side}", f"turns_{side}", rating) for side in "ab"]
        values = [None if one.fields is None else one.fields["score"] for one in both]
        reasons = [one.reason for one in both if one.reason and (one.fields is not None or None in values)]
        status = _worse(*(one.status for one in both))
        return _ballot(recording, status, values, reason="\n\n".join(reasons) or None)
    found = _read(where, recording, "text", "turns", scores)
    if found.fields is None and kind == "versus":  # by scores or by choice
        return _of_pick(recording, _read(where, recording, "text", "turns", reader.pick))
    return _of_scores(recording, found, ("A", "B"))


def _of_pick(recording: Mapping[str, Any], found: _Recorded) -> dict[str, Any]:
    vote = None if found.fields is None else CHOICE_VOTES[found.fields["choice"]]
    return _ballot(recording, found.status, vote=vote, reason=found.reason)


def _of_scores(recording: Mapping[str, Any], found: _Recorded, labels: Sequence[str]) -> dict[str, Any]:
    scores = [None if found.fields is None else found.fields["scores"][label] for label in labels]
    return _ballot(recording, found.status, scores, reason=found.reason)


@functools.cache
def recorded_scale(maximum: int, minimum: int = 0) -> Scale:
    """Scores in recordings may have decimals, and may be 0 unless the recording's name has another lower end."""
    return Scale(low=minimum, high=maximum, decimals=True)


class _Recorded(NamedTuple):
    """What was read from a text. `reason` is the judge's, or why the text is unread."""

    fields: dict[str, Any] | None
    status: str
    reason: str | None


def _read(
    where: str,
    recording: Mapping[str, Any],
    field: str,
    turns_field: str,
    reader: Callable[[Completion], Read | Unread],
) -> _Recorded:
    """The verdict of a text. The text is null for a call without a reply."""
    if field not in recording:
        raise InputError(f"{where}.{field} is missing")
    text, turns = recording[field], recording.get(turns_field, 1)
    if text is None:
        return _Recorded(None, "error", None)
    if not isinstance(text, str):
        raise InputError(f"{where}.{field} must be text or null, not {type(text).__name__}")
    if not isinstance(turns, int) or isinstance(turns, bool) or turns < 1:
        raise InputError(f"{where}.{turns_field} must be a whole number from 1 on, not {turns!r}")
    found = last_reply(text, turns, reader)
    if isinstance(found, Unread):
        return _Recorded(None, "unparsed", found.reason)
    return _Recorded(found.fields, "repaired" if turns > 1 else found.status, found.fields["reason"])


def _worse(*statuses: str) -> str:
    order = ("error", "unparsed", "repaired", "ok")
    return min(statuses, key=order.index)


def _debate(where: str, recording: Mapping[str, Any], replay: Replay, format: Format) -> Iterator[dict[str, Any]]:
    """One ballot a voice; in a stored replay one of the stored means, where the run kept them."""
    if replay == "stored" and ("stored_mean_1" in recording or "stored_mean_2" in recording):
        means = [_number(where, recording, f"stored_mean_{side}") for side in "12"]
        yield {"voice": "", "order": "ab", **_ballot({}, "unparsed" if None in means else "ok", means)}
        return
    final = _field(where, recording, "final", "it holds the scoring text of each role")
    if not isinstance(final, dict):
        raise InputError(f"{where}.final must be dict, not {type(final).__name__}; it holds each role's scoring text")
    if not final:
        raise InputError(f"{where}.final is empty; it holds the scoring text of each role")
    turns = recording.get("turns", 1)
    for role in final:
        own = {role: final[role], "turns": turns.get(role, 1) if isinstance(turns, dict) else turns}
        for labels in (("1", "2"), ("A", "B")):  # what the answers are called
            found = _debater(f"{where}.final", own, role, labels, format)
            if found.fields is not None:
                break
        ballot = _of_scores({"text": final[role]}, found, labels)
        if replay == "stored" and found.fields is None:
            ballot = _ballot({"text": final[role]}, "ok", [0.0, 0.0])  # the original counted an unread agent so
        yield {"voice": role, "order": "ab", **ballot}


def _debater(where: str, own: Mapping[str, Any], role: str, labels: Sequence[str], format: Format) -> _Recorded:
    """A debater's last words; `own` holds them and their turns."""
    scores = functools.partial(scores_verdict, labels=labels, scale=recorded_scale(10), form="text", format=format)
    return _read(where, own, role, "turns", scores)


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


def _field(where: str, recording: Mapping[str, Any], field: str, hint: str) -> Any:
    if field not in recording:
        raise InputError(f"{where}.{field} is missing; {hint}")
    return recording[field]


def _number(where: str, recording: Mapping[str, Any], field: str) -> float | None:
    """A stored score; null for a reply that the original run could not read."""
    value = recording.get(field)
    if field in recording and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}.{field} must be a number, not {value!r}; replay: stored needs it, replay: text not")
    return float(value)
