"""Which judges `judge.escalate` had to ask, written again for the audit, independently of `data/escalation.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_pipeline.audit.findings import Row, RunTables
from ray_pipeline.audit.formulas import close, gate_label, gate_numbers, is_skipped, read_score
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.store.keys import unit_hash


def judges_asked(
    run: RunTables, candidate: Row, barred: bool, verdicts: Mapping[tuple[str, str], Row]
) -> tuple[list[str], list[str]]:
    """The judges whose scores decide on a candidate, and what is wrong with the calls that were made.

    Args:
        barred: its text was cut off, and is left out whatever the judges say.
        verdicts: by candidate and judge.
    """
    if not run.levels:
        return list(run.judges), []
    name, asked = candidate["candidate_id"], list[str]()
    rows = {judge: verdicts.get((name, judge)) for level in run.levels for judge in level}
    in_slice = unit_hash("audit slice", name) < 0.05
    for number, level in enumerate(run.levels):
        if number and not in_slice:
            unsettled = not barred and _is_open([read_score(rows[judge], "score") for judge in asked], run.gate)
            if unsettled is None:  # by rounding, either is right
                unsettled = not all(is_skipped(rows[judge]) for judge in level)
            if not unsettled:
                break
        asked += level
    why = "it is in the audit slice" if in_slice else "its label was open"
    wrong = [f"{judge} was skipped, but {why}" for judge in asked if is_skipped(rows[judge])]
    if candidate["response"] is not None:
        late = [judge for judge in rows if judge not in asked and not is_skipped(rows[judge])]
        wrong += [f"{judge} was asked, but the label was settled without" for judge in late]
    return asked, wrong


def _is_open(scores: Sequence[float | None], gate: GateConfig) -> bool | None:
    """Whether the judges so far leave the label open; None where rounding decides."""
    if None in scores:
        return False
    numbers = gate_numbers(scores, False, gate)
    ends = [(numbers["mean_score"], gate.undesirable_at), (numbers["mean_score"], gate.desirable_at)]
    if any(close(*end) for end in [*ends, (numbers["score_variance"], gate.tau)]):
        return None
    return gate_label(True, True, numbers, gate) in ("abstain", "discard")
