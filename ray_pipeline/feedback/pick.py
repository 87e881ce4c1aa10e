"""The pick: which response to a prompt is accepted by the scores of a jury, and which judges the pick needs.

`select.escalate` puts the judges that compare responses into levels, each with its own strategy or debate. By the
judges asked so far, the pick of a prompt is

    settled   where all of them hold the same single text best, which every rule of a jury then picks; also where none
              of the responses has all scores: no further score changes that
    open      otherwise: the best are tied, the judges disagree on the best, or it was cut off and cannot be accepted

What is open after a level goes on to the next, and after the last one the jury's rule decides over all judges asked. A
judge whose turn did not come has the status `skipped` and is not missing. As with `judge.escalate`, all judges together
may have picked otherwise, and the audit slice, here of prompts, goes through all levels.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.agents.jurors import MEAN, JuryRule, jury_scores
from ray_pipeline.agents.strategies import best_scores
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.early_exit import SLICE, slice_of
from ray_pipeline.data.escalation import Levels, at_depth, first_settled
from ray_pipeline.data.gate import Cut, cut_text
from ray_pipeline.data.mean_rank import MeanRank, mean_rank
from ray_pipeline.data.rows import one_array
from ray_pipeline.store.keys import normalise_text


def accept_best(
    candidates: pa.Table, verdicts: pa.Table, judges: Sequence[str], jury: JuryRule = MEAN, cut: Cut = "exclude"
) -> pa.Table:
    """The response that the jury scores highest is accepted, those of a lower score are rejected.

    Args:
        candidates: columns candidate_id, prompt_id, k and, if it is there, finish_reason are read; all candidates of
            each prompt.
        verdicts: columns candidate_id, judge, score, parse_status; rows of other judges are left out.
        judges: who sits on the jury.
        jury: how their scores become one. Under a rule of votes a judge votes among the candidates that all could
            score.
        cut: rule for candidates whose text is not whole: they are `incomplete`, never accepted, or like others.

    Returns:
        A table of schema DECISIONS, in the order of `candidates`; the final score is the jury's. The accepted one is
        `desirable`, the rejected ones are `undesirable`. Of several with the highest score the first response is
        accepted and the others are discarded, since no judge called them worse; where all scores of a prompt are equal,
        or only one was read, all are discarded. A candidate with an unread score is `incomplete`.

    Raises:
        KeyMismatch: as `gate.decide`.
        ValueError: there are no judges, one occurs twice, or one has no weight where the rule weighs.
    """
    ranked = mean_rank(candidates, verdicts, judges, "a selection needs", cut)
    final, names, turn = _final(ranked, judges, jury), ranked.ids.to_pylist(), candidates["k"].to_pylist()
    label = ranked.texts("discard", "incomplete")
    why = ranked.why("the only response with a score")
    for scored in ranked.of_prompt.values():
        whole = ranked.whole(scored)
        top = max((final[row] for row in whole), default=-np.inf)
        barred = [row for row in scored if ranked.cut[row] and final[row] >= top]
        for row in barred:
            label[row], why[row] = "incomplete", cut_text(ranked.cut[row])
        rows = [row for row in scored if row not in barred]
        if len(rows) < 2:
            continue
        best = min((row for row in rows if final[row] == top), key=lambda row: (turn[row], names[row]))
        lower = [row for row in rows if final[row] < top]
        for row in rows:
            why[row] = f"as good as the best: {final[row]:g}" if lower else f"all {len(rows)} have the score {top:g}"
        if lower:
            label[best], why[best] = "desirable", f"best of {len(rows)}: {top:g}"
        for row in lower:
            label[row], why[row] = "undesirable", f"{final[row]:g} is below {top:g}, the best of {len(rows)}"
    return ranked.decisions(label, why, final)


def _final(ranked: MeanRank, judges: Sequence[str], jury: JuryRule) -> NDArray[np.float64]:
    """The jury's score of every candidate; NaN where one of its scores was not read."""
    if jury.pool == "mean":
        return ranked.mean
    final = np.full(len(ranked.mean), np.nan)
    for rows in ranked.of_prompt.values():
        final[rows] = jury_scores(dict(zip(judges, ranked.scores[rows].T.tolist(), strict=True)), jury)
    return final


# --- levels -----------------------------------------------------------------------------------------------------------


class PanelRule(Settings):
    """Which prompts go on to the next level.

    Attributes:
        levels: the judges, level by level; to the judges of a level, those before it.
        cut: rule for responses whose text is not whole.
    """

    key: ClassVar[str] = "select.escalate"
    why: ClassVar[str] = "their picks were settled before"
    upper_bound: ClassVar[str] = (
        "select.escalate asks them about prompts whose pick is open after the levels before, and about "
        f"{SLICE:.0%} of all (the audit slice) in any case"
    )

    levels: Levels
    cut: Cut = "exclude"

    def judges(self, level: int) -> list[str]:
        """The judges up to a level."""
        return [judge for names in self.levels[:level] for judge in names]

    def settled_in(self, candidates: pa.Table, verdicts: pa.Table) -> set[str]:
        """Ids of the prompts whose remaining calls are skipped; arguments as of `depths`."""
        outside = candidates.filter(pc.invert(slice_of(candidates, "prompt_id")))
        own = verdicts.filter(pc.is_in(verdicts["candidate_id"], value_set=one_array(outside["candidate_id"])))
        return set(outside["prompt_id"].to_pylist()) - self._open(outside, own, len(self.levels))

    def depths(self, candidates: pa.Table, verdicts: pa.Table) -> NDArray[np.int64]:
        """The level, from 1, at which the pick among each candidate's prompt is settled or the levels end, whether the
        prompt is in the audit slice or not; shape (candidates,).

        Args:
            candidates: columns candidate_id, prompt_id, response, finish_reason; all candidates of each prompt.
            verdicts: on them, as of `pick.accept_best`.
        """
        prompts = candidates["prompt_id"].to_pylist()
        opened = [self._open(candidates, verdicts, level) for level in range(1, len(self.levels))]
        return first_settled([np.array([prompt in going for prompt in prompts], dtype=bool) for going in opened])

    def _open(self, candidates: pa.Table, verdicts: pa.Table, level: int) -> set[str]:
        """Ids of the prompts whose pick the judges up to a level leave open."""
        ranked = mean_rank(candidates, verdicts, self.judges(level), "a selection needs", self.cut)
        texts = [normalise_text(text or "") for text in candidates["response"].to_pylist()]
        found = set[str]()
        for prompt, rows in ranked.of_prompt.items():
            best = {rows[place] for scores in ranked.scores[rows].T.tolist() for place in best_scores(scores)}
            if len({texts[row] for row in best}) > 1 or any(ranked.cut[row] for row in best):
                found.add(prompt)
        return found


def accept_by_level(
    candidates: pa.Table, verdicts: pa.Table, rule: PanelRule, jury: JuryRule = MEAN
) -> tuple[pa.Table, dict[str, int]]:
    """`accept_best` by the judges of the levels that the pick of each prompt needed; `why` ends with the level.

    Args:
        candidates, verdicts, jury: as of `accept_best`, with column response; so are the errors raised.

    Returns:
        The decisions, and the number of prompts of the audit slice by the level that settles their pick and by whether
        all judges pick the same. Prompts about which no judge was asked are not counted.
    """
    panels = [rule.judges(level) for level in range(1, len(rule.levels) + 1)]
    tables = [accept_best(candidates, verdicts, judges, jury.among(judges), rule.cut) for judges in panels]
    depth, in_slice = rule.depths(candidates, verdicts), np.asarray(slice_of(candidates, "prompt_id"))
    accepted = np.stack([np.asarray(pc.equal(table["label"], "desirable")) for table in tables])
    same = accepted[depth - 1, np.arange(len(depth))] == accepted[-1]
    of_slice: dict[str, tuple[int, bool]] = {}
    for row in np.flatnonzero(in_slice & np.asarray(pc.is_valid(tables[0]["final_score"]))).tolist():
        prompt = candidates["prompt_id"][row].as_py()
        of_slice[prompt] = int(depth[row]), bool(same[row]) and of_slice.get(prompt, (0, True))[1]
    counts = collections.Counter(f"slice_level_{at}_{'same' if alike else 'other'}" for at, alike in of_slice.values())
    depth[in_slice] = len(rule.levels)
    return at_depth(tables, depth, in_slice, {}), dict(counts)
