"""What a run ends with: made from roles, so the same for every workflow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.operate.last_lines import last_lines, warnings
from ray_pipeline.store.files import Folder
from tests.operate.planted_run import planted_dag


def results(folder: Path) -> dict[str, StageResult]:
    """A run under names that no workflow has."""

    def result(name: str, role: str, rows: dict[str, int], facts: dict[str, object], **usage: float) -> StageResult:
        place = str(folder / name)
        return StageResult(name, "f", place, 4, tuple(rows), role=role, rows=rows, facts=facts, usage=Usage(**usage))

    labels = {"desirable": 30, "undesirable": 20, "abstain": 50}
    sizes = {"kto": {"train": 40, "val": 10}, "dpo": {"train": 1500, "val": 0}}
    said = {"tone.ok": 260, "tone.unparsed": 30, "tone.skipped": 10}  # skipped without an early exit: nothing to judge
    found = [
        result("panel", "verdicts", {"verdicts": 300}, {"counts": said}, cost=1.5),
        result("filter", "decisions", {"decisions": 100}, {"counts": labels}, calls_engine=3000, calls_log=400),
        result("files", "datasets", {}, {"rows": sizes, "warnings": ["kto has no undesirable rows"]}),
        result("sheet", "page", {}, {"headline": {"text": "The policy got better."}}, prompt_tokens=1e6),
    ]
    return {one.name: one for one in found}


def test_the_last_lines_say_what_came_of_a_run(tmp_path: Path) -> None:
    dag, _ = planted_dag(tmp_path)
    (page,) = [stage for stage in dag.stages if stage.view == "report"]
    stages = [dataclasses.replace(page, name="sheet", inputs={})]
    page_folder, found = Folder(str(tmp_path / "sheet")), results(tmp_path)
    page_folder.write_json("metrics.json", {"warnings": ["Class imbalance: 30 to 2.", "Another."]})
    page_folder.write_bytes("report.html", b"<html>")
    assert list(last_lines(type(dag)("own", stages), found, str(tmp_path), "EUR")) == [
        "result: The policy got better.",
        "kept: 50 of 100 candidates (50.0 %), 30 desirable and 20 undesirable",
        "files: 40 kto rows to train on and 10 for validation, 1,500 dpo pairs to train on",
        "unread: 30 of 300 rows of panel (unparsed 30)",
        "used: 3,400 calls (3,000 made, others from the call log), 1,000,000 tokens, cost 1.5 EUR",
        "warnings: 2 on the page, the first: Class imbalance: 30 to 2.",
        f"report: {tmp_path}/report/report.html",
        f"run folder: {tmp_path}",
    ]
    assert list(warnings(found)) == [
        "panel: 10% of 300 rows have no value (unparsed 30)",
        "files: kto has no undesirable rows",
    ]


@pytest.mark.parametrize("damaged", [b"{", b"[]", b'{"warnings": null}'])
def test_a_page_that_cannot_be_read_ends_no_run(tmp_path: Path, damaged: bytes) -> None:
    dag, _ = planted_dag(tmp_path)
    (page,) = [stage for stage in dag.stages if stage.view == "report"]
    only = {"sheet": results(tmp_path)["sheet"]}
    Folder(str(tmp_path / "sheet")).write_bytes("metrics.json", damaged)
    dag = type(dag)("own", [dataclasses.replace(page, name="sheet", inputs={})])
    assert list(last_lines(dag, only, str(tmp_path), "USD"))[-1] == f"run folder: {tmp_path}"
