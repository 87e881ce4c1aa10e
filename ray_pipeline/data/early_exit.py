"""Exact early exit: a call to a judge or the critic that cannot change what the gate decides is not made.

The judges of a candidate are asked one after another, then the critic. Before each call, the labels that are still
possible are found by trying the gate's own formulas on every combination of replies that could follow. Once a single
label is left, the remaining verdicts get the status `skipped`:

    labels    whatever that label is
    scores    unless the label is one of a training row: its final score and its judges' scores are in the row

A reply that cannot be read makes its candidate incomplete. As it is not known which replies those are, `labels` takes
replies that are not asked for as readable. With `scores`, training rows do not depend on that.

A share of the candidates, the audit slice, is always judged in full: what judges say of the others is a selected
sample.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.gate import GateConfig, cut_reasons, label_cases
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.store.schemas import LABELS, READ_STATUSES

#: The key `judge.early_exit`. YAML reads `off` as false.
EarlyExit = Annotated[
    Literal["off", "labels", "scores"], BeforeValidator(lambda value: "off" if value is False else value)
]

SKIPPED = "skipped"
#: Labels of training rows.
_KEPT = ("desirable", "undesirable")
#: Share of candidates that are judged in full.
SLICE = 0.05
#: Combinations of replies that are tried; with more, the next call is made.
_MOST = 20_000

Scale = tuple[int, int]
"""Lowest and highest score of all judges. Judges that are models give whole numbers."""


@dataclasses.dataclass
class Known:
    """What is known of a candidate: NaN where a verdict was not read, nothing where it was not asked for.

    Attributes:
        cut: whether its text is not whole.
        scores: by judge.
        flawed: 1.0, 0.0 or NaN; None where the critic was not asked.
    """

    cut: bool = False
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    flawed: float | None = None


class ExitRule(Settings):
    """When the remaining calls of a candidate cannot matter.

    Attributes:
        exact: what stays as it would be without early exit.
        judges: whose scores count, as the gate orders them.
    """

    key: ClassVar[str] = "judge.early_exit"
    why: ClassVar[str] = "their calls could not matter"

    exact: Literal["labels", "scores"]
    gate: GateConfig
    judges: tuple[str, ...]
    scale: Scale

    def settled(self, known: Known) -> bool:
        """Whether no further reply about the candidate matters."""
        labels = possible_labels(known, self.judges, self.gate, self.scale)
        return len(labels) == 1 and (self.exact == "labels" or labels.isdisjoint(_KEPT))


class Panel:
    """A candidate whose judges take turns: `async with panel` waits for those that came before."""

    def __init__(self, rule: ExitRule, known: Known) -> None:
        self._rule, self._known, self._turn = rule, known, asyncio.Lock()

    async def __aenter__(self) -> Panel:
        await self._turn.acquire()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._turn.release()

    @property
    def settled(self) -> bool:
        return self._rule.settled(self._known)

    def add(self, judge: str, score: float | None) -> None:
        """Take a verdict; None: it was not read."""
        self._known.scores[judge] = math.nan if score is None else score


def in_audit_slice(candidate_id: str) -> bool:
    """Whether a candidate is judged in full: a share of them is, by hash."""
    return unit_hash("audit slice", candidate_id) < SLICE


def outside_slice(candidates: pa.Table, verdicts: Iterable[pa.Table]) -> dict[str, Known]:
    """Candidates with the verdicts that there are, by id; without those of the audit slice."""
    outside = [not in_audit_slice(name) for name in candidates["candidate_id"].to_pylist()]
    return known_of(candidates.filter(pa.array(outside, pa.bool_())), verdicts, None)


def possible_labels(known: Known, judges: Sequence[str], gate: GateConfig, scale: Scale) -> frozenset[str]:
    """Labels that the gate can give once all verdicts are there, if those that are open will be read."""
    scores = tuple(known.scores.get(judge) for judge in judges)
    if (known.cut and gate.cut == "exclude") or any(score is not None and math.isnan(score) for score in scores):
        return frozenset({"incomplete"})
    return _possible(scores, known.flawed if gate.use_critic else 0.0, known.cut, gate, scale)


@functools.lru_cache(maxsize=1 << 16)
def _possible(
    scores: tuple[float | None, ...], flawed: float | None, cut: bool, gate: GateConfig, scale: Scale
) -> frozenset[str]:
    levels = [float(score) for score in range(scale[0], scale[1] + 1)]
    replies = [[score] if score is not None else levels for score in scores]
    replies.append([0.0, 1.0] if flawed is None else [flawed])
    if math.prod(map(len, replies)) > _MOST:
        return frozenset(LABELS)
    rows = np.array(list(itertools.product(*replies)))
    found = label_cases(rows[:, :-1], rows[:, -1], np.full(len(rows), cut), gate)
    return frozenset(found.labels.unique().to_pylist())


def known_of(candidates: pa.Table, verdicts: Iterable[pa.Table], critiques: pa.Table | None) -> dict[str, Known]:
    """What the tables say of each of these candidates."""
    found = {
        name: Known(cut=bool(reason))
        for name, reason in zip(candidates["candidate_id"].to_pylist(), cut_reasons(candidates), strict=True)
    }
    for table in verdicts:
        for row in table.select(["candidate_id", "judge", "score", "parse_status"]).to_pylist():
            if row["candidate_id"] in found and row["parse_status"] != SKIPPED:
                found[row["candidate_id"]].scores[row["judge"]] = _number(row["score"], row["parse_status"])
    for row in [] if critiques is None else critiques.to_pylist():
        if row["candidate_id"] in found and row["parse_status"] != SKIPPED:
            found[row["candidate_id"]].flawed = _number(row["flawed"], row["parse_status"])
    return found


def _number(value: float | None, status: str) -> float:
    return math.nan if value is None or status not in READ_STATUSES else float(value)


def settle(
    decisions: pa.Table,
    candidates: pa.Table,
    verdicts: pa.Table,
    critiques: pa.Table | None,
    judges: Sequence[str],
    gate: GateConfig,
    scale: Scale,
) -> tuple[pa.Table, int]:
    """Decisions in which candidates with skipped verdicts have the only label that was possible without them.

    Args:
        decisions: of the gate, to which a skipped verdict is an unread one; tables as of `gate.decide`.

    Returns:
        The decisions, and the number of candidates with more than one possible label. These stay incomplete: their
        calls were skipped under other thresholds.
    """
    critiques = critiques if gate.use_critic else None
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    without = verdicts.filter(pc.field("parse_status") == SKIPPED)
    for name, judge in zip(without["candidate_id"].to_pylist(), without["judge"].to_pylist(), strict=True):
        if judge in judges:
            skipped[name].append(judge)
    uncriticised = set[str]()
    if critiques is not None:
        uncriticised |= set(critiques.filter(pc.field("parse_status") == SKIPPED)["candidate_id"].to_pylist())
    touched = pa.array(sorted(uncriticised | skipped.keys()), pa.string())
    if not len(touched):
        return decisions, 0
    of_them = pc.is_in(pc.field("candidate_id"), value_set=touched)
    known = known_of(
        candidates.filter(of_them),
        [verdicts.filter(of_them)],
        None if critiques is None else critiques.filter(of_them),
    )
    label, why, open_labels = decisions["label"].to_pylist(), decisions["why"].to_pylist(), 0
    for place, name in enumerate(decisions["candidate_id"].to_pylist()):
        if name not in known or (known[name].cut and gate.cut == "exclude"):
            continue
        own = known[name]
        for judge in set(judges) - own.scores.keys() - set(skipped[name]):
            own.scores[judge] = math.nan
        if own.flawed is None and name not in uncriticised:
            own.flawed = math.nan
        possible = possible_labels(own, judges, gate, scale)
        unread = [judge for judge in judges if math.isnan(own.scores.get(judge, 0.0))]
        missing = [judge for judge in judges if judge in skipped[name]]
        missing += ["critic"] if name in uncriticised else []
        label[place] = next(iter(possible)) if len(possible) == 1 else "incomplete"
        if unread:
            why[place] = f"unread: {', '.join(unread)}"
        elif len(possible) == 1:
            why[place] = f"{label[place]} whatever the reply: {', '.join(missing)} skipped"
        else:
            open_labels += 1
            why[place] = f"skipped, but the label depends on it: {', '.join(missing)}"
    for column, values in (("label", label), ("why", why)):
        number = decisions.column_names.index(column)
        decisions = decisions.set_column(number, decisions.schema.field(number), pa.array(values, pa.string()))
    return decisions, open_labels
