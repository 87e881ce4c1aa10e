"""Escalation against the whole panel on equal candidates: verdicts made, candidates kept, and the truth of kept labels.

    RUN="quorum run dmapo -c configs/pocket_escalate.yaml --to gate calls.root=runs/calls"
    $RUN --run-dir runs/levels && $RUN --run-dir runs/panel judge.escalate='[]'
    python perf/escalation.py runs/levels runs/panel

The first line of the table is the first level alone, decided here from its stored verdicts. Intervals: 95 %, by a
bootstrap over prompts. The checker of the pocket world knows the truth: a kept label is right if a desirable answer is
right, or an undesirable one is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.checkers import load_checker
from ray_pipeline.data.early_exit import SKIPPED
from ray_pipeline.data.gate import decide
from ray_pipeline.graph.results import Run, read_run, table_of
from ray_pipeline.report.figures import percent, percent_interval
from ray_pipeline.report.markdown import markdown_table
from ray_pipeline.stats.bootstrap import bootstrap_mean
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from ray_pipeline.workflow.stored import stored


def main() -> None:
    levels, panel = (read_run(folder) for folder in sys.argv[1:])
    truth, config = _truth(levels), stored(levels).config
    assert isinstance(config, DmapoConfig)
    first = list(config.judge.escalate[0])
    candidates, verdicts, critiques = (_table(levels, role) for role in ("candidates", "verdicts", "critiques"))
    alone = decide(candidates, verdicts, critiques, first, config.gate)
    asked = verdicts.filter(pc.field("parse_status") != SKIPPED)
    of_first = pc.is_in(verdicts["judge"], value_set=pa.array(first))
    whole = _table(panel, "decisions")
    of_all = dict(zip(whole["candidate_id"].to_pylist(), whole["label"].to_pylist(), strict=True))
    columns = ["decided by", "verdicts", "kept", "desirable", "of them right", "undesirable", "of them wrong"]
    columns += ["kept labels right", "label of all judges"]
    rows = [
        [name, f"{made:,}", *_cells(decisions, truth, of_all)]
        for name, made, decisions in (
            ("first level alone", len(verdicts.filter(of_first)), alone),
            ("levels", len(asked), _table(levels, "decisions")),
            ("all judges", len(_table(panel, "verdicts")), whole),
        )
    ]
    print(markdown_table(columns, rows))


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
    return f"{percent(found.mean)} ({percent_interval(found)})"


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
