"""Which judges `judge.escalate` had to ask, written again for the audit, independently of `data/escalation.py`; and the
posteriors by which it asks and the gate decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ray_pipeline.audit.findings import PanelModels, Row, RunTables
from ray_pipeline.audit.formulas import close, gate_label, gate_numbers, is_skipped, read_score
from ray_pipeline.audit.posterior import PosteriorCheck, in_slice


class PanelCheck:
    """The judges that each candidate of a round needs, its posterior, and at the end the models behind both."""

    def __init__(self, run: RunTables, models: PanelModels) -> None:
        self.stage, self._run = models.stage, run
        self._models, self._final = dict[int, PosteriorCheck](), None
        if models.posterior is not None:
            self._final = PosteriorCheck(models.posterior, run.judges, run.gate, skipped=bool(run.levels))
        for level, facts in sorted(models.opened.items()):
            judges = [judge for names in run.levels[:level] for judge in names]
            self._models[level] = PosteriorCheck(facts, judges, run.gate, skipped=level > 1)

    def asked(
        self, candidate: Row, barred: bool, verdicts: Mapping[tuple[str, str], Row]
    ) -> tuple[list[str], list[str]]:
        """The judges whose scores decide on a candidate, and what is wrong with the calls that were made. The candidate
        counts for the models.

        Args:
            barred: its text was cut off, and is left out whatever the judges say.
            verdicts: by candidate and judge.
        """
        run, name, before = self._run, candidate["candidate_id"], list[str]()
        if not run.levels:
            return list(run.judges), []
        rows = {judge: verdicts.get((name, judge)) for level in run.levels for judge in level}
        asked, sliced = list(run.levels[0]), in_slice(name)
        for number, level in enumerate(run.levels[1:], start=1):
            before += run.levels[number - 1]
            unsettled = self._is_open(name, number, [read_score(rows[judge], "score") for judge in before])
            if unsettled is None:  # by rounding, either is right
                unsettled = not all(is_skipped(rows[judge]) for judge in level)
            if sliced or (unsettled and not barred and len(asked) == len(before)):
                asked += level
        why = "it is in the audit slice" if sliced else "its label was open"
        wrong = [f"{judge} was skipped, but {why}" for judge in asked if is_skipped(rows[judge])]
        if candidate["response"] is not None:
            late = [judge for judge in rows if judge not in asked and not is_skipped(rows[judge])]
            wrong += [f"{judge} was asked, but the label was settled without" for judge in late]
        return asked, wrong

    def _is_open(self, name: str, level: int, scores: Sequence[float | None]) -> bool | None:
        """Whether the judges up to a level leave the label open; None where rounding decides."""
        gate, model = self._run.gate, self._models.get(level)
        found = None if model is None else model.expected(name, scores)
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            return False
        if model is not None and found is not None:
            most = max(p for p in found.values() if p is not None)
            if model.one:
                return True
            return None if close(most, gate.posterior_at) else most < gate.posterior_at
        numbers = gate_numbers(scores, False, gate)
        ends = [(numbers["mean_score"], gate.undesirable_at), (numbers["mean_score"], gate.desirable_at)]
        if any(close(*end) for end in [*ends, (numbers["score_variance"], gate.tau)]):
            return None
        return gate_label(True, True, numbers, gate) in ("abstain", "discard")

    def posterior(self, name: str, verdicts: Mapping[tuple[str, str], Row]) -> dict[str, float | None]:
        """Column of the decisions → posterior of a candidate; nothing without a model."""
        if self._final is None:
            return {}
        return self._final.expected(
            name, [read_score(verdicts.get((name, judge)), "score") for judge in self._run.judges]
        )

    def problems(self) -> Iterator[str]:
        """What of the stored models does not follow from the votes of all candidates of the round."""
        yield from () if self._final is None else self._final.problems()
        for level, model in self._models.items():
            yield from (f"after level {level}, {message}" for message in model.problems())
