"""The votes of all judges on all items, out of the tables `items` and `ballots`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, TIE, A, B, Codes, compare_scores, pool_votes, vote_codes
from ray_pipeline.agents.strategies import Conflict
from ray_pipeline.agreement.human_labels import question_id

Floats = NDArray[np.float64]

#: How the voices of a debate become one vote: by the means of their scores, or as a jury of their votes.
DebateRule = Literal["mean", "vote"]

#: How names of models begin, by family, for warnings; other models: the first word of their name.
FAMILIES: Mapping[str, Sequence[str]] = {
    "gpt": ("gpt", "chatgpt", "text-davinci", "o1", "o3", "o4"),
    "llama": ("llama", "meta-llama", "vicuna", "alpaca"),
    "mistral": ("mistral", "mixtral", "ministral"),
    "gemma": ("gemma", "gemini"),
    "qwen": ("qwen", "qwq"),
}


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One judge under one strategy.

    Attributes:
        votes: shape (items,); from both orders where both were asked.
        scores: of both answers, shape (2, items), NaN where unread; None for votes without scores.
        ab, ba: votes by order, in terms of the answers; None where that order was not asked.
        statuses: ballots by parse status; `absent` counts items without any ballot.
    """

    strategy: str
    judge: str
    votes: Codes
    scores: Floats | None
    ab: Codes | None
    ba: Codes | None
    statuses: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Items in the order of their ids, and everybody who judged them.

    Attributes:
        questions: id of each item's question; items of one question, also of its later turns, are not independent.
        labels: of humans, shape (items,).
        human_votes: by annotator, shape (annotators, items).
        lengths: characters of both answers, shape (2, items), NaN where there is no answer.
        families: of the models that answered, by answer and item; None where no model is named.
        evaluators: strategies in the order of their names, judges in the order of theirs.
        voices: of debates, by debater and role.
    """

    item_ids: list[str]
    questions: list[str]
    labels: Codes
    human_votes: Codes
    lengths: Floats
    families: tuple[list[str | None], list[str | None]]
    evaluators: list[Evaluator]
    voices: dict[str, dict[str, Evaluator]]

    @property
    def strategies(self) -> list[str]:
        return list(dict.fromkeys(e.strategy for e in self.evaluators))

    def of(self, strategy: str) -> list[Evaluator]:
        return [e for e in self.evaluators if e.strategy == strategy]


def make_panel(
    items: pa.Table,
    ballots: pa.Table,
    conflict: Conflict = "tie",
    debate_rule: DebateRule = "mean",
    families: Mapping[str, Sequence[str]] | None = None,
) -> Panel:
    """Join ballots to items by item_id, pool the voices of debates in each order, and bring both orders together.

    Raises:
        ValueError: an item or a ballot occurs twice, or a ballot has no item.
    """
    rows = sorted(items.to_pylist(), key=lambda row: row["item_id"])
    ids = [row["item_id"] for row in rows]
    place = {item: number for number, item in enumerate(ids)}
    if len(place) < len(ids):
        raise ValueError("items: an item_id occurs twice")
    annotators = sorted({v["annotator"] for row in rows for v in row["human_votes"]})
    human = np.full((len(annotators), len(ids)), MISSING, dtype=np.int8)
    for number, row in enumerate(rows):
        for vote in row["human_votes"]:
            human[annotators.index(vote["annotator"]), number] = vote_codes([vote["label"]])[0]
    grouped = _grouped(ballots, place)
    evaluators, voices = [], {}
    for strategy, judge in sorted({(s, j) for s, j, _ in grouped}, key=_natural):
        parts = {voice: orders for (s, j, voice), orders in grouped.items() if (s, j) == (strategy, judge)}
        said = {voice: _votes(orders, len(ids)) for voice, orders in sorted(parts.items())}
        whole = said[""] if list(said) == [""] else _pool_voices(list(said.values()), debate_rule)
        evaluators.append(_evaluator(strategy, judge, whole, conflict))
        if list(said) != [""]:
            voices[judge] = {voice: _evaluator(strategy, judge, own, conflict) for voice, own in said.items()}
    return Panel(
        item_ids=ids,
        questions=[question_id(row) for row in rows],
        labels=vote_codes([row["human_label"] for row in rows]),
        human_votes=human,
        lengths=np.array(
            [[np.nan if row[f] is None else len(row[f]) for row in rows] for f in ("response_a", "response_b")],
            dtype=np.float64,
        ),
        families=(
            [family(row["model_a"], families) for row in rows],
            [family(row["model_b"], families) for row in rows],
        ),
        evaluators=evaluators,
        voices=voices,
    )


def family(model: str | None, families: Mapping[str, Sequence[str]] | None = None) -> str | None:
    """The family of a model: the first one of `families` with a word that begins its name, else its first word."""
    if not model:
        return None
    name = model.rsplit("/", 1)[-1].lower()
    for kind, words in (families or {}).items():
        if any(name.startswith(word.lower()) for word in words):
            return kind
    first = re.match(r"[a-z]+", name)
    return first.group() if first else name


def _natural(key: Sequence[str]) -> list[Any]:
    """Names in the order in which people count: combined_5 before combined_10."""
    return [[int(p) if p.isdigit() else p.lower() for p in re.split(r"(\d+)", part)] for part in key]


_Orders = dict[str, list[tuple[int, dict[str, Any]]]]


def _grouped(ballots: pa.Table, place: Mapping[str, int]) -> dict[tuple[str, str, str], _Orders]:
    """(strategy, judge, voice) → order → (item number, ballot)."""
    columns = ["item_id", "strategy", "judge", "voice", "order", "score_a", "score_b", "vote", "parse_status"]
    grouped: dict[tuple[str, str, str], _Orders] = {}
    seen: set[tuple[str, ...]] = set()
    for row in ballots.select(columns).to_pylist():
        key = (row["item_id"], row["strategy"], row["judge"], row["voice"], row["order"])
        if key in seen:
            raise ValueError(f"ballots: two rows of {' / '.join(part for part in key if part)}")
        if row["item_id"] not in place:
            raise ValueError(f"ballots: unknown item {row['item_id']!r}")
        seen.add(key)
        orders = grouped.setdefault((row["strategy"], row["judge"], row["voice"]), {})
        orders.setdefault(row["order"], []).append((place[row["item_id"]], row))
    return grouped


@dataclasses.dataclass(frozen=True)
class _Votes:
    """Verdicts of one judge or one voice: votes, shape (items,), and scores, shape (2, items), by order."""

    votes: dict[str, Codes]
    scores: dict[str, Floats]
    statuses: dict[str, int]

    @property
    def scored(self) -> bool:
        return any(not np.isnan(scores).all() for scores in self.scores.values())


def _votes(orders: _Orders, items: int) -> _Votes:
    found = _Votes({}, {}, {})
    for order, ballots in sorted(orders.items()):
        found.votes[order] = np.full(items, MISSING, dtype=np.int8)
        found.scores[order] = np.full((2, items), np.nan)
        for number, row in ballots:
            found.votes[order][number] = vote_codes([row["vote"]])[0]
            if row["score_a"] is not None and row["score_b"] is not None:
                found.scores[order][:, number] = row["score_a"], row["score_b"]
            found.statuses[row["parse_status"]] = found.statuses.get(row["parse_status"], 0) + 1
        if len(ballots) < items:
            found.statuses["absent"] = found.statuses.get("absent", 0) + items - len(ballots)
    return found


def _evaluator(strategy: str, judge: str, said: _Votes, conflict: Conflict) -> Evaluator:
    pooled, merged = _both(said.votes, said.scores, conflict)
    return Evaluator(
        strategy,
        judge,
        pooled,
        None if np.isnan(merged).all() else merged,
        said.votes.get("ab"),
        said.votes.get("ba"),
        dict(sorted(said.statuses.items())),
    )


def _both(votes: Mapping[str, Codes], scores: Mapping[str, Floats], conflict: Conflict) -> tuple[Codes, Floats]:
    """One vote an item from the orders that were asked; an item that one of them lacks has none."""
    if len(votes) == 1:
        return next(iter(votes.values())), next(iter(scores.values()))
    ab, ba = votes["ab"], votes["ba"]
    merged = (scores["ab"] + scores["ba"]) / 2
    unread = (ab == MISSING) | (ba == MISSING)
    if conflict == "given":
        return np.where(unread, MISSING, ab).astype(np.int8), scores["ab"]
    pooled = np.where(ab == ba, ab, TIE)
    if conflict == "mean":
        by_mean = compare_scores(*merged)
        pooled = np.where(by_mean == MISSING, pooled, by_mean)
    return np.where(unread, MISSING, pooled).astype(np.int8), merged


def _pool_voices(voices: Sequence[_Votes], rule: DebateRule) -> _Votes:
    """A debate's votes in each order, by the rule; one voice that could not be read leaves it without one there.

    Where a voice gives no scores, the voices vote, whatever the rule.
    """
    found = _Votes({}, {}, {})
    for voice in voices:
        for status, count in voice.statuses.items():
            found.statuses[status] = found.statuses.get(status, 0) + count
    by_mean = rule == "mean" and all(voice.scored for voice in voices)
    for order in sorted({order for voice in voices for order in voice.votes}):
        items = next(votes.size for voice in voices for votes in voice.votes.values())
        votes = np.stack([voice.votes.get(order, np.full(items, MISSING, dtype=np.int8)) for voice in voices])
        means = np.mean([voice.scores.get(order, np.full((2, items), np.nan)) for voice in voices], axis=0)
        pooled = compare_scores(*means) if by_mean else pool_votes(votes, np.ones((1, len(votes)), dtype=bool))[0]
        found.votes[order] = np.where((votes == MISSING).any(axis=0), MISSING, pooled).astype(np.int8)
        found.scores[order] = means
    return found


def flips(evaluator: Evaluator) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Per item: whether the orders name different winners, and whether both were read. None with one order."""
    if evaluator.ab is None or evaluator.ba is None:
        return None
    both = (evaluator.ab != MISSING) & (evaluator.ba != MISSING)
    named = both & (evaluator.ab != TIE) & (evaluator.ba != TIE)
    return named & (evaluator.ab != evaluator.ba), both


# --- preferences that have nothing to do with quality -----------------------------------------------------------------


def longer_side(panel: Panel) -> Codes:
    """The longer answer of each item, in characters; missing where they are equal or absent."""
    a, b = panel.lengths
    with np.errstate(invalid="ignore"):
        return np.where(a > b, A, np.where(b > a, B, MISSING)).astype(np.int8)


def own_side(panel: Panel, own: str | None) -> Codes:
    """The answer of the judge's own family; missing where neither or both are."""
    sides = [
        A if (a == own) and (b != own) else B if (b == own) and (a != own) else MISSING
        for a, b in zip(*panel.families, strict=True)
    ]
    return np.array(sides, dtype=np.int8) if own else np.full(len(sides), MISSING, dtype=np.int8)
