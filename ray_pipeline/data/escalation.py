"""Escalation: the judges of a later level are asked about a candidate only while its label is open.

`judge.escalate` puts the judges into levels. Those of the first are asked about every candidate. With the gate's
formulas over the judges asked so far, and without the critic, who comes last, a label is

    open      where they disagree (v > τ: abstain), or their mean is between the thresholds (discard); with `gate.kind:
              posterior`, where no label is probable enough (abstain)
    settled   otherwise; also where a score was not read or the text was cut off: no further score changes `incomplete`

What is open after a level goes on to the next. The gate decides by the judges asked, so that a judge whose turn did not
come is not missing; the others have the status `skipped`. Unlike early exit this is not exact: all judges together may
have decided otherwise.

The thresholds of the published gate say of each candidate alone whether it is open. A posterior comes from a model of
all candidates, so that a stage between two levels fits it and writes what is open (`data/open_labels.py`).

The audit slice of early exit goes through all levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.config.settings import Settings, repeated
from ray_pipeline.data.early_exit import SKIPPED, SLICE, ExitRule, Panel, slice_of
from ray_pipeline.data.gate import Floats, GateConfig, Mask, cut_reasons, decide, label_cases, read_scores
from ray_pipeline.data.rows import one_array
from ray_pipeline.graph.asking import ShardTables
from ray_pipeline.graph.stage import Stage

#: The key `judge.escalate`: names of judges by level.
Levels = tuple[tuple[str, ...], ...]


class Escalation(Settings):
    """Which candidates go on to the next level.

    Attributes:
        levels: the judges, level by level; to the judges of a level, those before it.
    """

    key: ClassVar[str] = "judge.escalate"
    why: ClassVar[str] = "their labels were settled before"
    upper_bound: ClassVar[str] = (
        "judge.escalate asks them about candidates whose label is open after the levels before, and about "
        f"{SLICE:.0%} of all (the audit slice) in any case"
    )
    for_critic: ClassVar[None] = None
    needs_scores: ClassVar[bool] = False

    gate: GateConfig
    levels: Levels

    def check(self) -> None:
        """Raises ValueError for a gate that the rule does not know."""
        if self.gate.kind == "certified":
            raise ValueError(
                f"{self.key}: labels by people for gate.kind certified are drawn from the audit slice, and would "
                "certify all judges; leave it out, or set gate.kind to published or posterior"
            )
        if self.over_all and len(self.levels[0]) == 1:
            raise ValueError(
                f"{self.key}: to gate.kind posterior, one judge alone is always right, so that no label would be open; "
                "put two judges or more into the first level"
            )

    @property
    def over_all(self) -> bool:
        """Whether what is open depends on the verdicts on all candidates."""
        return self.gate.kind == "posterior"

    @property
    def of_gate(self) -> dict[str, Any]:
        """Arguments of the gate's stage (`decisions.gate`)."""
        return {"escalation": self}

    @property
    def judges(self) -> list[str]:
        return [judge for level in self.levels for judge in level]

    @property
    def widths(self) -> list[int]:
        """Number of judges up to each level."""
        return list(itertools.accumulate(map(len, self.levels)))

    def is_open(self, labels: pa.Array) -> Mask:
        """Which labels another level may settle."""
        names = ["abstain"] if self.over_all else ["abstain", "discard"]
        return np.asarray(pc.is_in(labels, value_set=pa.array(names)))

    def settled_in(self, candidates: pa.Table, shard: ShardTables) -> set[str]:
        """Ids of the candidates of a shard whose remaining calls are skipped."""
        outside = candidates.filter(pc.invert(slice_of(candidates)))
        ids = one_array(outside["candidate_id"])
        if self.over_all:
            opened = shard.tables["opened"]
            going = pc.is_in(ids, value_set=one_array(opened.filter(opened["open"])["candidate_id"]))
        else:
            verdicts = pa.concat_tables(shard.under("verdicts/"))
            verdicts = verdicts.filter(pc.is_in(verdicts["candidate_id"], value_set=ids))
            scores, _ = read_scores(verdicts, ids, self.judges)
            going = pa.array(self._open(scores, cut_reasons(outside) != ""))
        return set(ids.filter(pc.invert(going)).to_pylist())

    def panels(self, candidates: pa.Table, shard: ShardTables) -> dict[str, Panel]:
        """Candidates whose judges take turns: none, as those of a level are asked together."""
        return {}

    def depths(self, scores: Floats, cut: Mask) -> NDArray[np.int64]:
        """The level, from 1, at which each candidate is settled or the levels end, by the thresholds of the published
        gate; shape (rows,).

        Args:
            scores: shape (rows, judges), NaN where unread.
            cut: whether the text is not whole.
        """
        return first_settled([self._open(scores[:, :width], cut) for width in self.widths[:-1]])

    def _open(self, scores: Floats, cut: Mask) -> Mask:
        return self.is_open(label_cases(scores, np.zeros(len(scores)), cut, self.gate).labels)


def first_settled(opened: Sequence[Mask]) -> NDArray[np.int64]:
    """The level, from 1, at which each candidate is settled or the levels end, shape (rows,).

    Args:
        opened: of each level but the last, which candidates it leaves open, shape (rows,).
    """
    passed: NDArray[np.int64] = np.logical_and.accumulate(np.stack(opened), axis=0).sum(axis=0)
    return passed + 1


CallRule = ExitRule | Escalation
"""By which a call to a judge or the critic is skipped."""


class Skips(Protocol):
    """A rule by which a stage skips calls: its key, why calls were skipped, and why fewer are made than planned."""

    key: ClassVar[str]
    why: ClassVar[str]
    upper_bound: ClassVar[str]


def rule_of(stage: Stage) -> Skips | None:
    """By which a stage of judges or the critic skips calls; None: it makes all."""
    rule: Skips | None = getattr(stage.work.settings, "exit_rule", None)
    return rule


def check_levels(levels: Levels, judges: list[str], free: list[str]) -> None:
    """Raises ValueError if the levels do not hold each judge once, or only one level has any.

    Args:
        free: judges about whom nothing can be saved.
    """
    named = [judge for level in levels for judge in level]
    if len(levels) < 2 or not all(levels):
        raise ValueError("escalate needs two levels or more, each with one judge or more")
    if unknown := [judge for judge in named if judge not in judges]:
        raise ValueError(f"escalate: unknown judge {unknown[0]!r}; choose from {', '.join(judges)}")
    if twice := repeated(named):
        raise ValueError(f"escalate: judge {twice[0]!r} is named twice; a judge is in one level")
    if absent := [judge for judge in judges if judge not in named]:
        raise ValueError(f"escalate: judge {absent[0]!r} is in no level; add it to one, or remove the judge")
    if late := [judge for judge in free if judge not in levels[0]]:
        raise ValueError(
            f"escalate: {late[0]!r} is a program, a reward model or a file, which judges all candidates at once; put "
            "it into the first level"
        )


def decide_by_level(
    candidates: pa.Table, verdicts: pa.Table, critiques: pa.Table | None, rule: Escalation
) -> tuple[pa.Table, int]:
    """The gate's decision on each candidate by the judges of the levels that its label needed.

    Args:
        candidates, verdicts, critiques: as of `gate.decide`; so are the errors raised.

    Returns:
        A table of schema DECISIONS, whose `why` ends with the level, and the number of candidates that need a skipped
        verdict. These are incomplete: their calls were skipped under other thresholds.
    """
    ids, judges, widths = one_array(candidates["candidate_id"]), rule.judges, rule.widths
    scores, _ = read_scores(verdicts, ids, judges)
    in_slice = np.asarray(slice_of(candidates))
    skipped = _skipped(verdicts, ids, judges)
    if rule.over_all:
        depth = first_settled([~skipped[:, width] for width in widths[:-1]])
    else:
        depth = rule.depths(scores, cut_reasons(candidates) != "")
    depth[in_slice] = len(widths)
    tables = [decide(candidates, verdicts, critiques, judges[:width], rule.gate.numbers) for width in widths]
    lacking = {
        place: [judges[at] for at in np.flatnonzero(skipped[place, : widths[depth[place] - 1]])]
        for place in np.flatnonzero(skipped.any(axis=1)).tolist()
    }
    lacking = {place: names for place, names in lacking.items() if names}
    why = {place: f"skipped, but the label depends on it: {', '.join(names)}" for place, names in lacking.items()}
    return at_depth(tables, depth, in_slice, why), len(lacking)


def at_depth(
    tables: Sequence[pa.Table], depth: NDArray[np.int64], in_slice: Mask, instead: Mapping[int, str]
) -> pa.Table:
    """Decisions by the levels that each candidate went through; `why` ends with the level.

    Args:
        tables: of schema DECISIONS, one after each level.
        depth: the level, from 1, whose decision a candidate has, and `in_slice`, whether that is the last one because
            of the audit slice; shape (candidates,).
        instead: row → its `why`.
    """
    table = pa.concat_tables(tables).take(pa.array((depth - 1) * len(depth) + np.arange(len(depth))))
    why = [
        f"{text} (audit slice: all levels)" if whole else f"{text} (level {level} of {len(tables)})"
        for text, level, whole in zip(table["why"].to_pylist(), depth.tolist(), in_slice.tolist(), strict=True)
    ]
    for place, text in instead.items():
        why[place] = text
    column = table.schema.get_field_index("why")
    return table.set_column(column, table.schema.field(column), pa.array(why, pa.string()))


def _skipped(verdicts: pa.Table, ids: pa.Array, judges: list[str]) -> Mask:
    """Which judges were not asked about which candidates, shape (candidates, judges)."""
    without = verdicts.filter(pc.field("parse_status") == SKIPPED)
    without = without.filter(pc.is_in(without["judge"], value_set=pa.array(judges, pa.string())))
    found: Mask = np.full((len(ids), len(judges)), False)
    rows = pc.index_in(one_array(without["candidate_id"]), value_set=ids)
    found[np.asarray(rows), np.asarray(pc.index_in(one_array(without["judge"]), value_set=pa.array(judges)))] = True
    return found
