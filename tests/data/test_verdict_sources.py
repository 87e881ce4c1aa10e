"""Scores and recorded replies of a user's file become verdicts: by content, with every bad cell counted and named."""

from __future__ import annotations

import collections
import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dags.dmapo import dmapo
from dags.fellowship import FellowshipConfig
from ray_pipeline.config.loading import load_config, read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.gate import decide
from ray_pipeline.data.judging import JudgeSettings, join_recorded, judges
from ray_pipeline.data.verdict_sources import VerdictSource, recorded_rows
from ray_pipeline.graph.stage import BadInput, Dag, Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.pocket.tasks import make_prompts, rubric_scores, truth
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id
from ray_pipeline.store.schemas import CANDIDATES, to_table
from ray_pipeline.store.tables import ShardedTable
from ray_pipeline.workflow import training
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.dags.test_fellowship_stages import SHARDS, play
from tests.scripted import ScriptedEngine

ROWS = [
    {"prompt": "What is 2+2?", "response": "4", "score_a": 9, "score_b": 8.5},
    {"prompt": "What is 2+2?", "response": "It is five,\nI think.", "score_a": 2, "score_b": 1},
    {"prompt": "Say hi", "response": "hi", "score_a": 7, "score_b": 7},
]
JUDGES = {"helpful": "score_a", "right": "score_b"}


def source_of(**keys: Any) -> Any:
    return TypeAdapter(VerdictSource).validate_python(keys)


def ids(text: str) -> str:
    return prompt_id([{"role": "user", "content": text}])


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of the rows in the format that its name has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_of(stage: Stage, root: Path, inputs: dict[str, StageResult], log: list[str] | None = None) -> StageResult:
    folder = Folder(str(root / stage.folder_name))
    assert isinstance(stage.work, WholeWork)
    lines: list[str] = [] if log is None else log
    facts = stage.work.function(
        WholeInput(
            inputs,
            folder,
            Folder(str(root / "calls")),
            stage.fingerprint,
            SHARDS,
            stage.work.settings,
            lines.append,
            lambda done, total, note: None,
        )
    )
    return StageResult(stage.name, stage.fingerprint, folder.location, SHARDS, stage.work.tables, {}, facts)


def read(path: Path, root: Path, log: list[str] | None = None, **keys: Any) -> StageResult:
    """The verdicts of a file by content."""
    kind = {".csv": "csv", ".parquet": "parquet"}.get(path.suffix, "jsonl")
    source = source_of(**{"type": kind, "path": str(path), "judges": JUDGES, **keys})
    return run_of(recorded_rows(source, "verdict-source", "judge"), root, {}, log)


def cells(found: StageResult) -> dict[tuple[str, str], list[Any]]:
    """Scores and statuses by prompt and judge, sorted: responses have no name here."""
    made = collections.defaultdict(list)
    for row in found.table().read_all().to_pylist():
        made[row["prompt_id"], row["judge"]].append((row["score"], row["parse_status"]))
    return {key: sorted(values) for key, values in made.items()}


EXPECTED = {
    (ids("What is 2+2?"), "helpful"): [(2.0, "ok"), (9.0, "ok")],
    (ids("What is 2+2?"), "right"): [(1.0, "ok"), (8.5, "ok")],
    (ids("Say hi"), "helpful"): [(7.0, "ok")],
    (ids("Say hi"), "right"): [(7.0, "ok")],
}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_column_a_judge_in_every_format(tmp_path: Path, name: str) -> None:
    found = read(written(tmp_path / name, ROWS), tmp_path)
    assert cells(found) == EXPECTED and found.facts["warnings"] == []
    assert found.facts["counts"] == {
        "read": 3, "malformed": 0, "empty_cells": 0, "repeated": 0, "helpful.ok": 3, "right.ok": 3,
    }  # fmt: skip
    places = {row["place"] for row in found.table().read_all().to_pylist()}
    assert places == {f"{name}: {'line' if name == 'a.jsonl' else 'row'} {n}" for n in (1, 2, 3)}


def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / "train.parquet", ROWS)
    source = source_of(type="huggingface", name=str(tmp_path / "data"), judges=JUDGES)
    assert cells(run_of(recorded_rows(source, "verdict-source", "judge"), tmp_path, {})) == EXPECTED


def test_a_row_a_judge(tmp_path: Path) -> None:
    long = [
        {"q": row["prompt"], "a": row["response"], "who": who, "grade": row[column]}
        for row in ROWS
        for who, column in (("Ann", "score_a"), ("Bob", "score_b"), ("Eve", "score_a"))
    ]
    keys = {"prompt": "q", "response": "a", "judge": "who", "verdict": "grade"}
    found = read(written(tmp_path / "a.csv", long), tmp_path, judges={"helpful": "Ann", "right": "Bob"}, **keys)
    assert cells(found) == EXPECTED
    assert found.facts["counts"]["other_judges"] == 3
    (warning,) = found.facts["warnings"]
    assert warning == "a.csv: rows of judges that judge.source.judges does not name are left out: Eve (3)"
    with pytest.raises(BadInput, match="column 'who' names none of the judges 'Zoe'; it has 'Ann', 'Bob', 'Eve'"):
        read(tmp_path / "a.csv", tmp_path, judges={"helpful": "Zoe"}, **keys)
    unnamed = [{**long[0], "who": ""}, *long]
    found = read(written(tmp_path / "b.csv", unnamed), tmp_path, judges={"helpful": "Ann"}, **keys)
    assert found.facts["counts"]["malformed"] == 1
    assert "row 1: column 'who' is empty; it holds the name of the judge" in found.facts["warnings"][0]


def test_replies_are_read_by_the_reader_of_verdicts(tmp_path: Path) -> None:
    replies = [
        ("It reads `x[1]`, fine.\n\nRating: [[9]]", 9.0, "repaired", ""),
        ("Rating: [[2]]\nRating: [[9]]", None, "unparsed", "unread: contradictory\na.jsonl: line 2, column 'reply'"),
        ("I refuse.", None, "unparsed", "unread: absent\na.jsonl: line 3, column 'reply'"),
        ("Rating: [[11]]", None, "unparsed", "unread: invalid\na.jsonl: line 4, column 'reply'"),
        (7, None, "unparsed", "unread: invalid\na.jsonl: line 5, column 'reply': 7 is not a reply in text"),
    ]
    rows = [{"prompt": "q", "response": f"r{n}", "reply": text} for n, (text, *_) in enumerate(replies)]
    found = read(written(tmp_path / "a.jsonl", rows), tmp_path, judges={"gpt": "reply"}, format="mt_bench")
    made = {row["place"][-1]: row for row in found.table().read_all().to_pylist()}
    for n, (text, score, status, reason) in enumerate(replies, 1):
        row = made[str(n)]
        assert (row["score"], row["parse_status"], row["raw"]) == (score, status, str(text))
        assert (row["reason"] or "").startswith(reason)
    assert found.facts["counts"]["gpt.unparsed"] == 4


@pytest.mark.parametrize(
    ("cell", "score"),
    [("7", 7.0), (" 7.50 ", 7.5), ("10", 10.0), ("1.", 1.0), (3, 3.0), (9.99, 9.99), ("+2", 2.0), ("8,5", 8.5)],
)
def test_a_number_of_the_scale_is_read(tmp_path: Path, cell: Any, score: float) -> None:
    rows = [{"prompt": "q", "response": "r", "s": cell}]
    found = read(written(tmp_path / "a.jsonl", rows), tmp_path, judges={"j": "s"})
    assert [(row["score"], row["parse_status"]) for row in found.table().read_all().to_pylist()] == [(score, "ok")]


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("good", "'good' is not a number"),
        ("8/10", "'8/10' is not a number"),
        ("7,500", "'7,500' is not a number"),
        ("1e1", "'1e1' is not a number"),
        ("nan", "'nan' is not a number"),
        (True, "True is not a number"),
        ([7], r"\[7\] is not a number"),
        ({"score": 7}, "is not a number"),
        ("0", "'0' is not on the scale from 1 to 10"),
        (11, "11 is not on the scale from 1 to 10"),
        (10.01, "10.01 is not on the scale"),
        (-3, "-3 is not on the scale"),
        (math.inf, "inf is not on the scale"),
        ("9" * 400, "is not on the scale"),
        (10**400, "is not on the scale"),
    ],
)
def test_any_other_cell_is_unread_with_its_place(tmp_path: Path, cell: Any, why: str) -> None:
    rows = [{"prompt": "q", "response": "r", "s": 5}, {"prompt": "q", "response": "r2", "s": cell}]
    log: list[str] = []
    found = read(written(tmp_path / "a.jsonl", rows), tmp_path, log, judges={"j": "s"})
    (bad,) = (row for row in found.table().read_all().to_pylist() if row["score"] is None)
    assert bad["parse_status"] == "unparsed"
    (warning,) = found.facts["warnings"]
    expected = rf"a.jsonl: 1 of 2 verdicts cannot be read; unread: invalid: a.jsonl: line 2, column 's': .*{why}"
    assert re.search(expected, warning)
    assert any("unread: invalid" in line for line in log)


@pytest.mark.parametrize("cell", [None, "", "  ", math.nan])
def test_an_empty_cell_is_no_verdict(tmp_path: Path, cell: Any) -> None:
    rows = [{"prompt": "q", "response": "r", "s": 5}, {"prompt": "q", "response": "r2", "s": cell}]
    found = read(written(tmp_path / "a.jsonl", rows), tmp_path, judges={"j": "s"})
    assert found.table().read_all().num_rows == 1 and found.facts["counts"]["empty_cells"] == 1
    with pytest.raises(BadInput, match="all cells of 's' are empty; choose other columns"):
        read(written(tmp_path / "b.jsonl", rows[1:]), tmp_path, judges={"j": "s"})


def test_rows_that_are_none(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "response": "r", "s": 5},
        {"prompt": "", "response": "r", "s": 5},
        {"prompt": "q", "response": None, "s": 5},
        {"response": "r", "s": 5},
        {"prompt": "q", "response": "r2"},
    ]
    path = written(tmp_path / "a.jsonl", rows)
    with path.open("a") as file:
        file.write("no JSON\n")
    log: list[str] = []
    found = read(path, tmp_path, log, judges={"j": "s"})
    counts = found.facts["counts"]
    assert (counts["read"], counts["malformed"], counts["empty_cells"], counts["j.ok"]) == (6, 4, 1, 1)
    assert re_all(log, "line 2: column 'prompt' is empty", "line 3: column 'response' is empty")
    assert re_all(log, "line 4 has no column 'prompt'", "line 6 is not JSON")
    assert found.facts["warnings"][0].startswith("a.jsonl: 4 of 6 rows are malformed: ")
    with pytest.raises(BadInput, match=r"1 of 1 rows are malformed: .*line 1: column 'prompt' is empty"):
        read(written(tmp_path / "b.jsonl", rows[1:2]), tmp_path, judges={"j": "s"})
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(BadInput, match=r"c.jsonl has no rows"):
        read(tmp_path / "c.jsonl", tmp_path)


def re_all(lines: list[str], *parts: str) -> bool:
    return all(any(part in line for line in lines) for part in parts)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_missing_column_ends_the_run_with_the_nearest(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, ROWS)
    with pytest.raises(BadInput, match=rf"{name} has no column 'score_c'; did you mean 'score_[ab]'"):
        read(path, tmp_path, judges={"helpful": "score_a", "third": "score_c"})
    with pytest.raises(BadInput, match=r"no column 'answer'|malformed: .*no column 'answer'"):
        read(path, tmp_path, response="answer")


def test_the_same_response_twice(tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0], {**ROWS[2], "score_a": 3}, {**ROWS[1], "response": "It is five,\r\nI think. "}]
    found = read(written(tmp_path / "a.jsonl", rows), tmp_path)
    made = cells(found)
    assert made[ids("What is 2+2?"), "helpful"] == EXPECTED[ids("What is 2+2?"), "helpful"]  # equal: one verdict
    assert made[ids("Say hi"), "helpful"] == [(None, "unparsed")] and made[ids("Say hi"), "right"] == [(7.0, "ok")]
    assert found.facts["counts"]["repeated"] == 6
    (warning,) = found.facts["warnings"]
    assert "unread: contradictory: '7' at a.jsonl: line 3 and '3' at a.jsonl: line 5" in warning


CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.integers(-2, 12).map(str), st.floats(-2, 12).map(str),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(CELLS, min_size=1, max_size=6))
def test_no_cell_is_lost_or_guessed(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    root = tmp_path_factory.mktemp("cells")
    rows = [{"prompt": "q", "response": f"r{n}", "s": value} for n, value in enumerate(values)]
    rows.append({"prompt": "q", "response": "sure", "s": 5})
    found = read(written(root / "a.jsonl", rows), root, judges={"j": "s"})
    made = {int(row["place"].rsplit(" ", 1)[1]): row for row in found.table().read_all().to_pylist()}
    assert len(made) + found.facts["counts"]["empty_cells"] == len(rows)
    for n, value in enumerate(values, 1):
        if n not in made:
            assert value is None or value != value or not str(value).strip()
        elif made[n]["score"] is None:
            assert made[n]["parse_status"] == "unparsed" and made[n]["reason"].startswith("unread: invalid\n")
        else:
            assert made[n]["score"] == float(value) and 1 <= float(value) <= 10 and not isinstance(value, bool)


# --- joining ----------------------------------------------------------------------------------------------------------


def joined(root: Path, path: Path, candidates: list[tuple[str, str | None]], **keys: Any) -> StageResult:
    """The verdicts on candidates, given as prompt and response (None: the call failed)."""
    rows = [
        {
            "candidate_id": f"c{n}", "prompt_id": ids(prompt), "k": n, "seed": 0, "response": text, "generator": "g",
            "finish_reason": "error" if text is None else "stop",
        }
        for n, (prompt, text) in enumerate(candidates)
    ]  # fmt: skip
    place = root / "candidates"
    table = ShardedTable(str(place), "candidates", SHARDS, "f")
    for shard in range(SHARDS):
        own = [row for row in rows if int(row["prompt_id"], 16) % SHARDS == shard]
        table.write(shard, to_table(own, CANDIDATES))
    given = StageResult("candidates", "f", str(place), SHARDS, ("candidates",), {}, {})
    made = Stage("candidates", WholeWork(join_recorded, None, ("candidates",)), {})
    kind = {"type": "csv" if path.suffix == ".csv" else "jsonl", "path": str(path), "judges": JUDGES, **keys}
    judge = JudgeSettings.model_validate({"source": kind})
    (stage,) = judges(judge, {}, None, made, {"candidates": made})  # type: ignore[arg-type]
    source = run_of(stage.inputs["recorded"], root, {})
    return run_of(stage, root, {"recorded": source, "candidates": given})


def test_verdicts_go_to_candidates_of_the_same_content(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", [*ROWS, {"prompt": "Who?", "response": "me", "score_a": 1, "score_b": 1}])
    candidates = [
        ("Say hi", "hello"),  # another text
        ("Say hi", "hi"),
        ("What is 2+2?", "It is five,\r\nI think."),  # line ends of another system
        ("What is 2+2?", "4"),
        ("What is 2+2?", "4"),  # the same answer twice
        ("What is 2+2?", None),
    ]
    found = joined(tmp_path, path, candidates)
    table = found.table().read_all()
    made = {(r["candidate_id"], r["judge"]): (r["score"], r["parse_status"]) for r in table.to_pylist()}
    assert made == {
        ("c0", "helpful"): (None, "missing"), ("c0", "right"): (None, "missing"),
        ("c1", "helpful"): (7.0, "ok"), ("c1", "right"): (7.0, "ok"),
        ("c2", "helpful"): (2.0, "ok"), ("c2", "right"): (1.0, "ok"),
        ("c3", "helpful"): (9.0, "ok"), ("c3", "right"): (8.5, "ok"),
        ("c4", "helpful"): (9.0, "ok"), ("c4", "right"): (8.5, "ok"),
        ("c5", "helpful"): (None, "error"), ("c5", "right"): (None, "error"),
    }  # fmt: skip
    assert found.facts["counts"]["helpful.missing"] == 1
    assert found.facts["counts"]["unmatched"] == {"candidates": 6, "without a row": 1, "other prompts": 1}
    assert found.facts["warnings"] == [
        "1 of 6 candidates have no verdict in a.csv",
        "1 responses in a.csv are no candidates (1 of other prompts, 0 other texts of the run's prompts); "
        "the first is at a.csv: row 4",
    ]


def test_a_judge_that_is_missing_for_a_candidate(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "score_b": None}, *ROWS[1:]]
    found = joined(tmp_path, written(tmp_path / "a.jsonl", rows), [("What is 2+2?", "4"), ("Say hi", "hi")])
    made = {(r["candidate_id"], r["judge"]): r["parse_status"] for r in found.table().read_all().to_pylist()}
    assert made["c0", "right"] == "missing" and made["c0", "helpful"] == made["c1", "right"] == "ok"
    assert (
        "without a row" not in found.facts["counts"]["unmatched"]
        or not found.facts["counts"]["unmatched"]["without a row"]
    )
    assert found.facts["counts"]["right.missing"] == 1
    (warning,) = (line for line in found.facts["warnings"] if "lack" in line)
    assert warning == "other candidates lack the verdict of one judge in a.jsonl: right 1; the gate leaves them out"


def test_a_file_of_other_responses_ends_the_run(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ROWS)
    with pytest.raises(BadInput, match=r"no candidate has a row in judge.source: .*name it in candidates.source too"):
        joined(tmp_path, path, [("Say hi", "hey"), ("Else", "x")])


# --- configuration and the whole road ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({}, "no judges: set judge.rubrics, judge.programs, judge.rewards or judge.source"),
        ({"source": {"judges": {}}}, "judges"),
        ({"source": {"judges": ["Score A"]}}, "invalid judge name 'Score A'; use lower-case letters"),
        ({"source": {"judges": ["a", "a"]}}, "two judges have the same name: a"),
        ({"source": {"judges": {"a": "s", "b": "s"}}}, "two columns of judges have the same name: s"),
        ({"source": {"judges": ["a"], "verdict": "s"}}, "verdict has no effect without judge"),
        ({"source": {"judges": ["a"], "low": 5, "high": 5}}, r"low \(5\) must be less than high \(5\)"),
        ({"source": {"judges": ["a"]}, "rubrics": [{"name": "a"}]}, "two judges have the same name: a"),
        ({"source": {"judges": ["a"], "high": 5}, "rubrics": [{"name": "b"}]}, "different scales .1 to 5 and 1 to 10"),
    ],
)
def test_a_mistake_in_the_block(judge: dict[str, Any], message: str) -> None:
    if "source" in judge:
        judge = {**judge, "source": {"type": "csv", "path": "a.csv", **judge["source"]}}
    with pytest.raises(ValidationError, match=message):
        JudgeSettings.model_validate(judge)


def test_the_loop_refuses_ready_verdicts() -> None:
    with pytest.raises(ConfigError, match=r"judge.source has verdicts of ready responses"):
        load_config(FellowshipConfig, "pocket_fellowship", ["judge.source={type: csv, path: a.csv, judges: [a]}"])


@pytest.fixture
def pocket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`pocket(*overrides)`: the pocket configuration with all verdicts in a file."""
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)

    def go(*overrides: str) -> DmapoConfig:
        changes = ["prompts.sources.0.count=40", f"prompts.num_shards={SHARDS}", "critic=null", *overrides]
        return load_config(DmapoConfig, "tests/one_judge.yaml", changes)

    return go


def answers(right: str) -> list[str]:
    return [right, f"it is {right} moon", "sorry i can not"]


def policy(messages: Any, sampling: Any) -> str:
    return answers(truth(messages[-1]["content"]))[sampling.seed % 3]


def test_a_spreadsheet_of_scores_becomes_training_files(tmp_path: Path, pocket: Any) -> None:
    names = ("helpfulness", "factuality", "conciseness")
    asked = [row.value for row in pocket().prompts.sources[0].rows()]
    rows = [
        {"prompt": text, "response": answer, **{f"score {n}": rubric_scores(text, answer)[n] for n in names}}
        for text in asked
        for answer in answers(truth(text))
    ]
    path = written(tmp_path / "scores.csv", rows)
    columns = ", ".join(f"{n}: 'score {n}'" for n in names)
    config = pocket(f"judge={{source: {{type: csv, path: {path}, judges: {{{columns}}}}}}}")
    assert config.judge.names == list(names) and not config.gate.use_critic and config.judge.live is None
    whole = dmapo(config, str(tmp_path))
    made = [stage.name for stage in whole.stages]
    assert "critic" not in made and "score-responses" not in made  # a file cannot score what it has never seen
    dag = Dag("dmapo", whole.upto("datasets"))
    assert [s.name for s in dag.stages if s.group_name == "judge"] == ["verdict-source", "recorded-verdicts"]
    engine = ScriptedEngine(policy)
    played = play(dag, tmp_path / "run", lambda stage: engine)

    scores = {(ids(row["prompt"]), row["response"]): [row[f"score {n}"] for n in names] for row in rows}
    candidates = played["candidates"].table().read_all()
    labels = {}
    for row in candidates.to_pylist():
        own = scores[row["prompt_id"], row["response"]]
        mean = sum(own) / 3
        variance = sum((s - mean) ** 2 for s in own) / 2
        labels[row["candidate_id"]] = (
            "abstain" if variance > 2.5 else "desirable" if mean >= 7 else "undesirable" if mean <= 4 else "discard"
        )
    found = {r["candidate_id"]: r["label"] for r in played["gate"].table().read_all().to_pylist()}
    assert found == labels and {"desirable", "undesirable"} <= set(labels.values())
    kept = [row for kind in ("kto", "dpo") for row in files(played["datasets"], kind)]
    assert {row["label"] for row in files(played["datasets"], "kto")} == {True, False} and len(kept) > 30
    for row in files(played["datasets"], "dpo"):
        high, low = (scores[row["prompt_id"], row[side][0]["content"]] for side in ("chosen", "rejected"))
        assert sum(high) > sum(low)
    verdicts = played["recorded-verdicts"].table().read_all()
    assert decide(candidates, verdicts, None, names, config.gate).num_rows == candidates.num_rows


def files(stage: StageResult, kind: str) -> list[dict[str, Any]]:
    found = sorted((Path(Folder(stage.folder).path()) / kind).rglob("*.parquet"))
    return [row for file in found for row in pq.read_table(file).to_pylist()]


def test_one_spreadsheet_holds_responses_and_scores(tmp_path: Path, pocket: Any) -> None:
    """`candidates.source` and `judge.source` name the same file: no model answers or judges."""
    asked = [prompt.instruction for prompt in make_prompts(30, seed=5)]
    rows = [
        {"prompt": text, "response": answer, "score_a": score, "score_b": score - 1, "score_c": 12 if n == 4 else score}
        for n, text in enumerate(asked)
        for answer, score in ((truth(text), 9), ("sorry i can not", 2), ("it is a moon", 6))
    ]
    path = written(tmp_path / "scores.csv", rows)
    file = f"type: csv, path: {path}"
    config = pocket(
        "prompts={val_fraction: 0.2, num_shards: 2}",
        f"candidates={{source: {{{file}}}}}",
        f"judge={{source: {{{file}, judges: {{a: score_a, b: score_b, c: score_c}}}}}}",
    )
    dag = Dag("dmapo", dmapo(config, str(tmp_path)).upto("datasets"))
    played = play(dag, tmp_path / "run", lambda stage: ScriptedEngine(lambda messages, sampling: "nobody is asked"))
    labels = collections.Counter(row["label"] for row in played["gate"].table().read_all().to_pylist())
    assert labels == {"desirable": 29, "undesirable": 29, "discard": 29, "incomplete": 3}
    kto, dpo = files(played["datasets"], "kto"), files(played["datasets"], "dpo")
    assert len(kto) == 58 and len(dpo) == 29 and all(row["rejected"][0]["content"][:5] == "sorry" for row in dpo)
    assert {ids(asked[4])}.isdisjoint(row["prompt_id"] for row in kto)
    assert played["recorded-verdicts"].facts["warnings"] == []
    card = (Path(Folder(played["datasets"].folder).path()) / "README.md").read_text()
    assert "consensus of 3 judges (a, b, c)" in card and "The verdicts were not made by this run." in card
    assert "| judge b | score_b |" in card and card.count("path scores.csv") == 3
    assert not re.search("synthetic|machine-generated|LLM judges|UltraFeedback|pocket:", card.split("```json")[0])
    (warning,) = played["verdict-source"].facts["warnings"]
    assert "scores.csv: 3 of 270 verdicts cannot be read" in warning and "'12' is not on the scale" in warning


def test_the_whole_run_needs_no_model(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{n}", "response": answer, "score_a": score, "score_b": score}
        for n in range(20)
        for answer, score in (("yes", 9), ("no", 2))
    ]
    file = {"type": "csv", "path": str(written(tmp_path / "scores.csv", rows))}
    blocks: dict[str, Any] = {"prompts": {"num_shards": SHARDS}, "train": None, "critic": None}
    ready = {"candidates": {"source": file}, "judge": {"source": {**file, "judges": JUDGES}}}
    config = DmapoConfig.model_validate({**blocks, **ready})
    assert config.models == {} and config.uses() == []
    played = play(dmapo(config, str(tmp_path)), tmp_path / "run", lambda stage: pytest.fail("no model is asked"))
    assert "40 KTO rows and 20 DPO pairs from 20 prompts" in played["report"].facts["headline"]["text"]
    assert config.report().stages == ("prompts", "candidates", "judge", "gate", "datasets")


def test_a_file_joins_a_panel_of_models(tmp_path: Path, pocket: Any) -> None:
    path = written(tmp_path / "a.csv", ROWS)
    config = pocket(f"judge.source={{type: csv, path: {path}, judges: {{human: score_a}}}}")
    assert config.judge.names == ["helpfulness", "factuality", "conciseness", "human"]
    stages = {stage.name: stage for stage in dmapo(config, "/run").stages}
    verdicts = [stage.name for stage in stages["gate"].inputs.values() if stage.role_name == "verdicts"]
    assert verdicts == ["judge", "recorded-verdicts"]
    scored = stages["score-responses"].work.settings
    assert [rubric.name for rubric in scored.rubrics] == ["helpfulness", "factuality", "conciseness"]
    assert config.report().curating["human"] == "a.csv"


def test_a_file_counts_by_its_content(tmp_path: Path, pocket: Any) -> None:
    def fingerprints(path: Path, **more: Any) -> dict[str, str]:
        source = json.dumps({"type": "csv", "path": str(path), "judges": JUDGES, **more})
        config = pocket(f"judge={{source: {source}}}")
        return {stage.name: stage.fingerprint for stage in dmapo(config, "/run").stages}

    before = fingerprints(written(tmp_path / "a.csv", ROWS))
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.csv").rename(tmp_path / "moved" / "a.csv")
    assert fingerprints(tmp_path / "moved" / "a.csv") == before
    wider = fingerprints(tmp_path / "moved" / "a.csv", high=11)
    edited = fingerprints(written(tmp_path / "moved" / "a.csv", ROWS[:2]))
    for after in (wider, edited):
        changed = {name for name in before if after[name] != before[name]}
        assert {"verdict-source", "recorded-verdicts", "gate", "datasets", "train"} <= changed
        assert not changed & {"prompts", "candidates"}


def test_without_critic_the_gate_needs_none(pocket: Any) -> None:
    config = pocket()
    assert config.critic is None and not config.gate.use_critic and config.judge.live == config.judge
    assert "critic" not in [stage.name for stage in dmapo(config, "/run").stages]
    again = read_config(DmapoConfig, config.model_dump(mode="json"), [], "stored")
    assert again.critic is None and not again.gate.use_critic
    with pytest.raises(ConfigError, match=r"gate.use_critic is true, but critic is null"):
        pocket("gate.use_critic=true")
