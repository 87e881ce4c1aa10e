"""Escalation: the judges of a later level are asked about a candidate only while its label is open.

`judge.escalate` puts the judges into levels. Those of the first are asked about every candidate. With the gate's
formulas over the judges asked so far, and without the critic, who comes last, a label is

    open      where they disagree (v > τ: abstain), or their mean is between the thresholds (discard)
    settled   otherwise; also where a score was not read or the text was cut off: no further score changes `incomplete`

What is open after a level goes on to the next. The gate decides by the judges asked, so that a judge whose turn did not
come is not missing; the others have the status `skipped`. Unlike early exit this is not exact: all judges together may
have decided otherwise.

The audit slice of early exit goes through all levels.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.config.settings import Settings, repeated
from ray_pipeline.data.early_exit import SKIPPED, ExitRule, Known, in_audit_slice, possible_labels
from ray_pipeline.data.gate import Floats, GateConfig, Mask, cut_reasons, decide, label_cases, read_scores
from ray_pipeline.data.rows import one_array
from ray_pipeline.graph.stage import Stage

#: The key `judge.escalate`: names of judges by level.
Levels = tuple[tuple[str, ...], ...]

#: Labels that another level may settle.
_OPEN = frozenset({"abstain", "discard"})


class Escalation(Settings):
    """Which candidates go on to the next level.

    Attributes:
        levels: the judges, level by level; to the judges of a level, those before it.
    """

    key: ClassVar[str] = "judge.escalate"
    why: ClassVar[str] = "their labels were settled before"

    gate: GateConfig
    levels: Levels

    @property
    def judges(self) -> list[str]:
        return [judge for level in self.levels for judge in level]

    @property
    def widths(self) -> list[int]:
        """Number of judges up to each level."""
        return list(itertools.accumulate(map(len, self.levels)))

    def settled(self, known: Known) -> bool:
        """Whether the judges asked so far leave nothing open."""
        asked = [judge for judge in self.judges if judge in known.scores]
        return not possible_labels(dataclasses.replace(known, flawed=0.0), asked, self.gate, (0, 0)) <= _OPEN

    def depths(self, scores: Floats, cut: Mask) -> NDArray[np.int64]:
        """The level, from 1, at which each candidate is settled or the levels end; shape (rows,).

        Args:
            scores: shape (rows, judges), NaN where unread.
            cut: whether the text is not whole.
        """
        depth = np.full(len(scores), len(self.levels), dtype=np.int64)
        going: Mask = np.full(len(scores), True)
        for level, width in enumerate(self.widths[:-1], start=1):
            labels = label_cases(scores[:, :width], np.zeros(len(scores)), cut, self.gate).labels
            settled = going & ~np.asarray(pc.is_in(labels, value_set=pa.array(sorted(_OPEN))))
            depth[settled] = level
            going &= ~settled
        return depth


CallRule = ExitRule | Escalation
"""By which a call to a judge or the critic is skipped."""


def rule_of(stage: Stage) -> CallRule | None:
    """By which a stage of judges or the critic skips calls; None: it makes all."""
    rule: CallRule | None = getattr(stage.work.settings, "exit_rule", None)
    return rule


def check_levels(levels: Levels, judges: list[str], free: list[str]) -> None:
    """Raises ValueError if the levels do not hold each judge once, or only one level has any.

    Args:
        free: judges about whom nothing can be saved.
    """
    named = [judge for level in levels for judge in level]
    if len(levels) < 2 or not all(levels):
        raise ValueError("escalate needs two levels or more, each a list of judges: [[first, second], [third]]")
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
    in_slice = np.array([in_audit_slice(name) for name in ids.to_pylist()], dtype=bool)
    depth = rule.depths(scores, cut_reasons(candidates) != "")
    depth[in_slice] = len(widths)
    tables = [decide(candidates, verdicts, critiques, judges[:width], rule.gate) for width in widths]
    table = pa.concat_tables(tables).take(pa.array((depth - 1) * len(ids) + np.arange(len(ids))))
    without = verdicts.filter(pc.field("parse_status") == SKIPPED)
    without = without.filter(pc.is_in(without["judge"], value_set=pa.array(judges, pa.string())))
    lacking: dict[int, list[str]] = {}
    places = pc.index_in(one_array(without["candidate_id"]), value_set=ids).to_pylist()
    for place, judge in zip(places, without["judge"].to_pylist(), strict=True):
        if judges.index(judge) < widths[depth[place] - 1]:
            lacking.setdefault(place, []).append(judge)
    why = [
        f"{text} (audit slice: all levels)" if whole else f"{text} (level {level} of {len(widths)})"
        for text, level, whole in zip(table["why"].to_pylist(), depth.tolist(), in_slice.tolist(), strict=True)
    ]
    for place, names in lacking.items():
        why[place] = f"skipped, but the label depends on it: {', '.join(names)}"
    column = table.schema.get_field_index("why")
    return table.set_column(column, table.schema.field(column), pa.array(why, pa.string())), len(lacking)
