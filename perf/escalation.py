"""Escalation against the whole panel on equal candidates: verdicts made, candidates kept, and the truth of kept labels.

    RUN="quorum run dmapo -c configs/pocket_escalate.yaml --to gate calls.root=runs/calls"
    $RUN --run-dir runs/levels && $RUN --run-dir runs/panel judge.escalate='[]'
    python perf/escalation.py runs/panel runs/levels

Beside the two runs, the table has every choice of two judges for the first level, alone and with the third where the
label is open, from the verdicts of the whole panel. Intervals: 95 %, by a bootstrap over prompts. The checker of the
pocket world knows the truth: a kept label is right if a desirable answer is right, or an undesirable one is wrong.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.checkers import load_checker
from ray_pipeline.data.early_exit import SKIPPED, in_audit_slice
from ray_pipeline.data.escalation import Escalation, decide_by_level
from ray_pipeline.data.gate import cut_reasons, decide, read_scores
from ray_pipeline.data.rows import one_array
from ray_pipeline.graph.results import Run, read_run, table_of
from ray_pipeline.report.figures import percent, percent_interval
from ray_pipeline.report.markdown import markdown_table
from ray_pipeline.stats.bootstrap import bootstrap_mean
from ray_pipeline.workflow.stored import stored

COLUMNS = ["judges", "verdicts", "kept", "desirable", "of them right", "undesirable", "of them wrong"]
COLUMNS += ["kept labels right", "label of all judges"]


def main() -> None:
    panel, levels = (read_run(folder) for folder in sys.argv[1:])
    truth, whole = _truth(panel), _table(panel, "decisions")
    of_all = dict(zip(whole["candidate_id"].to_pylist(), whole["label"].to_pylist(), strict=True))
    asked = _table(levels, "verdicts").filter(pc.field("parse_status") != SKIPPED)
    shown = "; then ".join(map(", ".join, stored(levels).config.judge.escalate))
    rows = [("all", len(_table(panel, "verdicts")), whole), (f"{shown} (run)", len(asked), _table(levels, "decisions"))]
    rows += _choices(panel)
    print(markdown_table(COLUMNS, [[name, f"{made:,}", *_cells(table, truth, of_all)] for name, made, table in rows]))


def _choices(panel: Run) -> Iterator[tuple[str, int, pa.Table]]:
    """Judges, number of verdicts and decisions, for every choice of two judges for the first level."""
    config = stored(panel).config
    candidates, verdicts, critiques = (_table(panel, role) for role in ("candidates", "verdicts", "critiques"))
    ids = one_array(candidates["candidate_id"])
    for first in itertools.combinations(config.judge.names, 2):
        last = tuple(judge for judge in config.judge.names if judge not in first)
        rule = Escalation(gate=config.gate, levels=(first, last))
        scores, _ = read_scores(verdicts, ids, rule.judges)
        depth = rule.depths(scores, cut_reasons(candidates) != "")
        depth[[in_audit_slice(name) for name in ids.to_pylist()]] = len(rule.levels)
        alone = decide(candidates, verdicts, critiques, first, config.gate)
        yield ", ".join(first), len(first) * len(ids), alone
        table, _ = decide_by_level(candidates, verdicts, critiques, rule)
        yield f"{', '.join(first)}; then {', '.join(last)}", int(np.take(rule.widths, depth - 1).sum()), table


def _cells(decisions: pa.Table, truth: Mapping[str, bool], of_all: Mapping[str, str]) -> Iterator[str]:
    rows: list[dict[str, Any]] = decisions.to_pylist()
    kept = [row for row in rows if row["label"] in ("desirable", "undesirable")]
    yield f"{len(kept):,}"
    for label, right in (("desirable", True), ("undesirable", False)):
        of_label = [row for row in kept if row["label"] == label]
        yield f"{len(of_label):,}"
        yield percent(np.mean([truth[row["candidate_id"]] == right for row in of_label]).item())
    yield _share([float(truth[row["candidate_id"]] == (row["label"] == "desirable")) for row in kept], kept)
    yield _share([float(row["label"] == of_all[row["candidate_id"]]) for row in rows], rows)


def _share(values: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> str:
    found = bootstrap_mean(values, [row["prompt_id"] for row in rows])
    return percent(found.mean) + (f" ({percent_interval(found)})" if found.low is not None else "")


def _truth(run: Run) -> dict[str, bool]:
    """Candidate → whether its answer is right."""
    check = load_checker("pocket")
    prompts = {row["prompt_id"]: row for row in _table(run, "prompts").to_pylist()}
    found = {}
    for row in _table(run, "candidates").to_pylist():
        prompt = prompts[row["prompt_id"]]
        checked = check(prompt["messages"], row["response"] or "", prompt["meta"])
        found[row["candidate_id"]] = checked is not None and checked.share == 1
    return found


def _table(run: Run, role: str) -> pa.Table:
    table = table_of(run.results, role)
    assert table is not None, f"{run.folder.location}: {role} is not done"
    return table


if __name__ == "__main__":
    main()
