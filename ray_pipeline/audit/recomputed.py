"""Verdicts that the audit computes again without a model: those of programs, of checklists from their
replies, and of reward models from their numbers."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping

from ray_pipeline.agents.checklists import stored_ticks
from ray_pipeline.agents.judges import Rubric
from ray_pipeline.audit.findings import Row, RunTables
from ray_pipeline.audit.formulas import close, read_score, reward_score
from ray_pipeline.data.checkers import load_checker
from ray_pipeline.data.checklists import read_checklists


class Recomputed:
    """One shard's verdicts by the judges whose verdicts can be computed.

    Args:
        checklists: rows of the tables of written items.
    """

    def __init__(self, run: RunTables, checklists: Iterable[Row]) -> None:
        self._programs, self._ticked, self._rewards = run.programs, run.ticked, run.rewards
        self._checks = {judge.name: load_checker(judge.checker, judge.options) for judge in run.programs}
        self._checklists = read_checklists(checklists)

    def problems(
        self, prompt: Row | None, candidate: Row, verdicts: Mapping[tuple[str, str], Row]
    ) -> Iterator[tuple[str, str]]:
        """Kind and message for each stored score of a candidate that differs."""
        name = candidate["candidate_id"]
        for program in self._programs if prompt is not None and candidate["response"] is not None else ():
            assert prompt is not None
            checked = self._checks[program.name](prompt["messages"], candidate["response"], prompt["meta"])
            expected = None if checked is None else program.low + (program.high - program.low) * checked.share
            found = read_score(verdicts.get((name, program.name)), "score")
            if not close(found, expected):
                message = f"{program.name} scores {found}, but its checker {program.checker} gives {expected}"
                yield "program", message
        for judge in self._ticked:
            row = verdicts.get((name, judge.name))
            found = read_score(row, "score")
            if row is not None and found is not None and not close(found, expected := self._of_ticks(judge, row)):
                yield "checklist", f"{judge.name} scores {found}, but the ticks of its reply give {expected}"

    def rewards(
        self, candidates: Mapping[str, Row], verdicts: Mapping[tuple[str, str], Row]
    ) -> Iterator[tuple[str, str]]:
        """Candidate and message for each score of a reward model that differs from the map of its scale or, by rank,
        from the share of the prompt's other candidates in the same round that are worse (ties: half), on the judge's
        scale."""
        of_prompt: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
        for name, candidate in candidates.items():
            of_prompt[candidate["prompt_id"], candidate["_round"]].append(name)
        for judge in self._rewards:
            for names in of_prompt.values():
                rows = {name: verdicts.get((name, judge.name)) for name in names}
                numbers = {n: float(v["raw"]) for n, v in rows.items() if v and v["parse_status"] in ("ok", "missing")}
                for name, number in numbers.items():
                    expected = reward_score(judge, number, [r for n, r in numbers.items() if n != name])
                    found = read_score(rows[name], "score")
                    if not close(found, expected):
                        yield name, f"{judge.name} scores {found}, but by the rewards of the prompt it is {expected}"

    def _of_ticks(self, judge: Rubric, row: Row) -> float | None:
        """Weight of the items that the reply ticks, as a share of all, on the judge's scale."""
        written = self._checklists.get((row["prompt_id"], judge.name))
        items = judge.items or (written.items if written else ())
        ticks = stored_ticks(row["raw"], len(items)) if items else None
        if ticks is None:
            return None
        met = [item.weight if tick.met else 0.0 for item, tick in zip(items, ticks, strict=True)]
        return judge.low + (judge.high - judge.low) * sum(met) / sum(item.weight for item in items)
