"""`judge.early_exit` through whole runs against a scripted endpoint: fewer calls, the same labels and training rows."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dags.baselines import BaselinesConfig
from dags.fellowship import FellowshipConfig
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.early_exit import in_audit_slice
from ray_pipeline.graph.results import read_run
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.endpoint import KEY, Answer, Endpoint, opinion, said
from tests.operate.at_an_endpoint import quorum

#: Two judges of one model and one of another, which waits for them.
RUBRICS = [
    {"name": "helpfulness", "text": "Does it help?"},
    {"name": "factuality", "text": "Is it true?"},
    {"name": "conciseness", "text": "Is it short?", "model": "second"},
]
COUNT, K = 32, 4


def script(body: dict[str, Any], number: int) -> Answer:
    """Scores around a level of each response, often apart; a few replies are unreadable, a few texts cut off."""
    text = "\n".join(str(message["content"]) for message in body["messages"])
    if "response_format" not in body:
        answer = json.loads(opinion(body, number).bytes())["choices"][0]["message"]["content"]
        return said(answer, "length" if zlib.crc32(answer.encode()) % 11 == 0 else "stop")
    response = re.search(r"<response [^>]*>\n(.*?)\n</response", text, re.DOTALL)
    if response is None:  # a test call
        return opinion(body, number)
    level = zlib.crc32(response[1].encode())
    asked = re.search("Does it help|Is it true|Is it short", text)
    if asked is None:
        flawed = level % 4 == 0
        return said(json.dumps({"reason": "", "failure_type": "circular" if flawed else "none", "flawed": flawed}))
    own = zlib.crc32(f"{response[1]}{asked[0]}".encode())
    if own % 29 == 0 and asked[0] == "Does it help":
        return said("no comment")
    score = min(10, max(1, (2, 4, 6, 7, 9)[level % 5] + (0, 0, 1, -1, 3)[own % 5]))
    return said(json.dumps({"reason": "", "score": score}))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    with Endpoint(script) as endpoint:
        yield endpoint


def config(url: str, early_exit: Any, **changes: Any) -> dict[str, Any]:
    endpoint = {"base_url": url, "api_key_env": "LOOPBACK_KEY", "retries": 1}
    models = {name: {"engine": "openai", "model": name, "endpoint": endpoint} for name in ("writer", "judge", "second")}
    return {
        "models": models,
        "prompts": {"sources": [{"type": "pocket", "count": COUNT, "seed": 0}], "num_shards": 2},
        "candidates": {"model": "writer", "k": K},
        "judge": {"rubrics": RUBRICS, "early_exit": early_exit, "asking": {"retries": 1}},
        "failure": {"max_error_rate": 0.9},
        "train": None,
        **changes,
    }


class Made:
    """A finished run, and the requests about responses that it took."""

    def __init__(self, server: Endpoint, folder: Path, early_exit: Any, *overrides: str, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.file, before = folder / "run", folder / "config.yaml", len(server.asked)
        self.file.write_text(yaml.safe_dump(config(server.url, early_exit, **changes)))
        self.arguments = ["dmapo", "-c", str(self.file), "--run-dir", str(self.folder)]
        self.output = quorum("run", *self.arguments, *overrides, "--executor", "inprocess")
        made = [json.dumps(body) for body in server.asked[before:] if "<response" in json.dumps(body)]
        self.calls, self.asked = len(made), set(made)
        self.page = (self.folder / "report" / "report.md").read_text()

    def table(self, role: str) -> pa.Table:
        results = read_run(str(self.folder)).results
        return pa.concat_tables(
            part.table().read_all() for part in results.values() if len(part.tables) == 1 and part.role == role
        )

    def rows(self, *kinds: str) -> dict[str, pa.Table]:
        """Training files by name, without the fingerprint in their footers."""
        found = {}
        for kind in kinds:
            for file in sorted((self.folder / "datasets" / kind).glob("*/*.parquet")):
                found[f"{kind}/{file.parent.name}/{file.name}"] = pq.read_table(file).replace_schema_metadata()
        return found

    def labels(self) -> list[tuple[str, str]]:
        table = self.table("decisions")
        return sorted(zip(table["candidate_id"].to_pylist(), table["label"].to_pylist(), strict=True))

    def without_calls(self) -> set[tuple[str, str]]:
        """Candidate and judge of each skipped verdict."""
        rows = [row for role in ("verdicts", "critiques") for row in self.table(role).to_pylist()]
        return {(row["candidate_id"], row.get("judge", "critic")) for row in rows if row["parse_status"] == "skipped"}

    def skipped(self) -> int:
        return len(self.without_calls())


def test_fewer_calls_make_the_same_labels_and_rows(server: Endpoint, tmp_path: Path) -> None:
    off = Made(server, tmp_path / "off", False)  # as YAML reads `off`
    scores = Made(server, tmp_path / "scores", "scores")
    labels = Made(server, tmp_path / "labels", "labels", datasets={"kinds": ["kto"]})
    assert off.skipped() == 0 and "skipped:" not in off.output and "early_exit" not in off.page.split("## Conf")[0]
    assert labels.calls < scores.calls < off.calls and 0 < scores.skipped() < labels.skipped()
    assert scores.labels() == off.labels() == labels.labels()
    assert len({label for _, label in off.labels()}) == 5
    assert off.rows("kto", "dpo") and scores.rows("kto", "dpo") == off.rows("kto", "dpo")
    kept = [row.drop_columns(["final_score", "scores"]) for row in off.rows("kto").values()]
    assert [row.drop_columns(["final_score", "scores"]) for row in labels.rows("kto").values()] == kept

    for run in (scores, labels):
        assert "no problem" in quorum("audit", str(run.folder))
        (line,) = (line for line in run.output.splitlines() if line.startswith("skipped: "))
        assert sum(map(int, re.findall(r"(\d+) of", line))) == run.skipped()
        assert "of the audit slice" in run.page and "skipped (judge.early_exit" in run.page
        numbers = json.loads((run.folder / "report" / "metrics.json").read_text())
        judging = numbers["judging"]
        assert 0 < judging["agreement_rows"] < COUNT * K / 5
        assert sum(judge["skipped"] for judge in judging["judges"].values()) > 0
        assert "upper bounds: judge.early_exit" in quorum("plan", *run.arguments)
        quorum("review", str(run.folder), "-n", "20", "-o", str(tmp_path / "review"))
        drawn = [json.loads(row) for row in (tmp_path / "review" / "rows.jsonl").read_text().splitlines()]
        chance = [row["candidate_id"] for row in drawn if row["chosen_as"] == "chance"]
        assert chance and all(map(in_audit_slice, chance))
        assert "alpha" in quorum("compare", str(off.folder), str(run.folder))

    # Another threshold may need what was skipped: regate says how many, and a run makes these calls alone.
    given = ["gate.tau=30"]
    shown = quorum("regate", str(scores.folder), *given)
    told = re.search(r"(\d+) candidates need calls that judge.early_exit skipped", shown)
    assert told is not None
    refused = quorum("regate", str(scores.folder), *given, "--write", code=2)
    assert "other thresholds may need them" in " ".join(refused.split())
    quorum("regate", str(scores.folder), "datasets.min_gap=3", "--write")
    skipped = scores.without_calls()
    wide = Made(server, tmp_path / "scores", "scores", *given)
    assert wide.calls > 0 and not wide.asked & scores.asked
    needed = {name for name, _ in skipped - wide.without_calls()}
    assert int(told[1]) == len(needed) > 0
    full = Made(server, tmp_path / "off", False, *given)
    assert wide.labels() == full.labels() and wide.rows("kto", "dpo") == full.rows("kto", "dpo")


def test_later_judges_are_asked_only_where_the_label_is_open(server: Endpoint, tmp_path: Path) -> None:
    levels = [["helpfulness", "factuality"], ["conciseness"]]
    judge = {"rubrics": RUBRICS, "escalate": levels, "asking": {"retries": 1}}
    run = Made(server, tmp_path / "levels", False, judge=judge)
    late = {name for name, judge in run.without_calls()}
    assert {judge for _, judge in run.without_calls()} == {"conciseness"} and 0 < len(late) < COUNT * K
    assert not any(map(in_audit_slice, late))
    labels = dict(run.labels())
    assert {labels[name] for name in late} <= {"desirable", "undesirable", "discard", "incomplete"}
    assert f"skipped: {len(late)} of {COUNT * K} rows of judge-level-2 (judge.escalate: " in run.output
    assert "no problem" in quorum("audit", str(run.folder))
    numbers = json.loads((run.folder / "report" / "metrics.json").read_text())
    first, second = numbers["escalation"]["levels"]
    assert (first["asked"], second["asked"]) == (COUNT * K, COUNT * K - len(late))
    assert "Levels of judges" in run.page and numbers["judging"]["agreement_rows"] < COUNT * K / 5
    plan = quorum("plan", *run.arguments)
    assert "calls of judge-level-2 are upper bounds: judge.escalate" in plan
    shown = quorum("regate", str(run.folder), "gate.desirable_at=9")
    assert re.search(r"\d+ candidates need calls that judge.escalate skipped", shown)
    assert "judge.escalate skipped calls by the thresholds" in quorum(
        "regate", str(run.folder), "gate.desirable_at=9", "--write", code=2
    )
    asked = run.calls
    higher = Made(server, tmp_path / "levels", False, "gate.desirable_at=9", judge=judge)
    assert 0 < higher.calls < asked and not higher.asked & run.asked
    assert "no problem" in quorum("audit", str(run.folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "judge.early_exit: labels leaves final scores open, but rows of dpo"),
        (
            {"datasets": {"kinds": ["kto"]}, "human_labels": {"path": "labels.jsonl", "use": "gate"}},
            "human_labels.use may put them into a dataset",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(DmapoConfig, config("http://127.0.0.1:9/v1", "labels", **changes))


@pytest.mark.parametrize("key", ["early_exit", "escalate"])
@pytest.mark.parametrize(
    ("block", "shipped", "message"),
    [(BaselinesConfig, "pocket_baselines", "baselines.data makes datasets by several rules"),
     (FellowshipConfig, "pocket_fellowship", "this workflow has none")],
)  # fmt: skip
def test_workflows_without_one_gate_refuse_it(block: Any, shipped: str, message: str, key: str) -> None:
    values = yaml.safe_load(Path(f"configs/{shipped}.yaml").read_text())
    judge = {"rubrics": RUBRICS[:2], **(values.get("judge") or {})}
    first, *others = [rubric["name"] for rubric in judge["rubrics"]]
    values["judge"] = {**judge, key: "scores" if key == "early_exit" else [[first], others]}
    with pytest.raises(ConfigError, match=f"judge.{key} .*{message}"):
        read_config(block, values)
