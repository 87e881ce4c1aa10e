"""A run on completions of the user's own, and one with several generators, from file to datasets at a real endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_pipeline.engines import endpoint_retry
from ray_pipeline.graph.results import read_run
from tests.endpoint import KEY, Answer, Endpoint, said
from tests.operate.at_an_endpoint import COUNT, command, config, quorum, reply

#: Candidates of each prompt, as many as its number says.
NUMBERS = [1, 2, 4, 3, 4, 2, 4, 4, 4, 3]


def judged(body: dict[str, Any], number: int) -> Answer:
    """Judges find an answer good if it says so; the critic finds no flaw. Generators say who they are."""
    if "response_format" not in body:
        return said(f"a {'good' if body['model'] == 'writer' else 'bad'} answer by {body['model']}")
    text = json.dumps(body["messages"])
    given = json.loads(reply(body, number).body["choices"][0]["message"]["content"])
    if "score" in given:
        given["score"] = 9 if "a good answer" in text else 2
    return said(json.dumps(given | ({"failure_type": "none"} if "flawed" in given else {})))


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr(endpoint_retry, "_BACKOFF_SECONDS", 0.01)
    with Endpoint(judged) as endpoint:
        yield endpoint


def own(url: str, path: Path, **source: Any) -> dict[str, Any]:
    values = config(url, candidates={"source": {"type": "jsonl", "path": str(path), **source}})
    del values["models"]["writer"], values["prompts"]["sources"]
    return {**values, "prompts": {**values["prompts"], "val_fraction": 0.3}}


def ultrafeedback(path: Path) -> Path:
    rows = [
        {"instruction": f"question {i}",
         "completions": [{"model": f"m{k}", "response": f"a {'good' if k % 2 else 'bad'} answer, {k} of {i}"}
                         for k in range(count)]}
        for i, count in enumerate(NUMBERS)
    ]  # fmt: skip
    path.write_text("\n".join(["{", *map(json.dumps, rows)]))
    return path


def rows_of(run: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for part in sorted(run.glob(pattern)) for row in pq.read_table(part).to_pylist()]


def test_own_completions_are_judged_gated_and_made_into_data(judging: Endpoint, tmp_path: Path) -> None:
    values, run = own(judging.url, ultrafeedback(tmp_path / "uf.jsonl")), tmp_path / "run"
    assert "rows of prompts: 10 can be read" in quorum(*command("check", tmp_path, values))
    planned = quorum(*command("plan", tmp_path, values))
    assert sum(NUMBERS) * 2 == int(next(line for line in planned.splitlines() if line.startswith("judge ")).split()[2])
    asked = len(judging.asked)
    quorum(*command("run", tmp_path, values, "--executor", "inprocess", "--to", "datasets"))
    assert len(judging.asked) - asked >= sum(NUMBERS) * 3
    assert all("response_format" in request for request in judging.asked[asked:])  # nothing was generated
    candidates = rows_of(run, "candidates-*/*.parquet")
    assert len(candidates) == sum(NUMBERS) and {row["generator"] for row in candidates} == {"m0", "m1", "m2", "m3"}
    kto = rows_of(run, "datasets/kto/*/*.parquet")
    assert len(kto) == sum(NUMBERS) and {(row["model"], row["label"]) for row in kto} == {
        ("m0", False), ("m1", True), ("m2", False), ("m3", True),
    }  # fmt: skip
    pairs = rows_of(run, "datasets/dpo/*/*.parquet")
    assert len(pairs) == sum(count > 1 for count in NUMBERS)
    assert {(row["chosen_model"][0], row["rejected_model"][0]) for row in pairs} == {("m", "m")}
    quorum("audit", str(run))
    card = (run / "datasets" / "README.md").read_text()
    assert "path uf.jsonl" in card and "UltraFeedback" not in card and "synthetic: models judged them" in card
    assert "candidates.model" not in card and "candidates.sampling" not in card
    quorum("report", str(run))
    page = json.loads((run / "report" / "metrics.json").read_text())
    assert [(one["name"], one["candidates"]) for one in page["generators"]] == [
        (f"m{k}", sum(count > k for count in NUMBERS)) for k in range(4)
    ]
    assert (
        page["generators"][1]["desirable"] == page["generators"][1]["candidates"] and page["source_agreement"] is None
    )
    assert "<h2" in (run / "report" / "report.html").read_text()


def test_pairs_are_two_candidates_and_the_report_says_how_far_the_judges_agree(
    judging: Endpoint, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"q {i}", "chosen": f"a {'bad' if i % 4 == 0 else 'good'} answer", "rejected": f"a bad answer {i}"}
        for i in range(12)
    ]
    path, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {**own(judging.url, path), "train": None}  # all that there is: the file, and an endpoint
    del values["models"]["policy"]
    quorum(*command("run", tmp_path, values, "--executor", "inprocess"))
    pairs = rows_of(run, "datasets/dpo/*/*.parquet")
    assert len(pairs) == 9 and {row["chosen"][0]["content"] for row in pairs} == {"a good answer"}
    quorum("report", str(run))
    agreement = json.loads((run / "report" / "metrics.json").read_text())["source_agreement"]
    assert agreement == {"agree": 9, "equal": 3, "disagree": 0, "unread": 0}
    assert "higher than its rejected one for 9 of 12 prompts (75.0 %)" in (run / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "candidates.source: .* has no rows; check that it was written"),
        ('{"prompt": "q", "answers": ["a"]}', "no column of answers; it has prompt, answers. Set candidates.source"),
    ],
)
def test_what_is_wrong_with_a_source_is_found_before_anything_is_paid(
    text: str | None, message: str, judging: Endpoint, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    if text is not None:
        path.write_text(text)
    out = quorum(*command("run", tmp_path, own(judging.url, path), "--executor", "inprocess"), code=2)
    assert re.search(message, " ".join(out.split())) and not list((tmp_path / "run").glob("*/_result.json"))
    assert all("Name a colour" in json.dumps(body["messages"]) for body in judging.asked)  # checks of the endpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompts": {"sources": [{"type": "pocket", "count": 2}]}},
            "prompts.sources has no effect with candidates.source",
        ),
        (
            {"candidates": {"generators": ["writer", "nobody"]}},
            "candidates.generators is 'nobody', which is not defined",
        ),
        ({"candidates": {"generators": ["writer"], "k": 2, "source": None}}, "models.judge2 is not used"),
    ],
)
def test_keys_that_do_not_go_together(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = own("http://127.0.0.1:9/v1", tmp_path / "a.jsonl")
    if "candidates" in change:
        values = config()
        values["models"]["judge2"] = values["models"]["judge"]
    assert message in " ".join(quorum(*command("run", tmp_path, {**values, **change}), code=2).split())


def test_several_generators_take_turns_and_keep_their_names(judging: Endpoint, tmp_path: Path) -> None:
    values, run = config(judging.url), tmp_path / "run"
    quorum(*command("run", tmp_path, values, "--executor", "inprocess", "--to", "candidates"))
    alone = candidates_of(run)
    assert {row["model"] for row in alone} == {"writer"} and len(alone) == 2 * COUNT
    before = len(judging.asked)
    values["candidates"] = {"generators": ["writer", "second"], "k": 2}
    values["models"]["second"] = {**values["models"]["writer"], "model": "second"}
    quorum(*command("run", tmp_path, values, "--executor", "inprocess", "--to", "datasets"))
    generated = [body["model"] for body in judging.asked[before:] if "response_format" not in body]
    assert generated.count("second") >= 2 * COUNT > generated.count("writer")  # its replies are in the call log
    both = candidates_of(run)
    assert {row["candidate_id"] for row in alone} < {row["candidate_id"] for row in both} and len(both) == 4 * COUNT
    assert [row["k"] for row in both] == [0, 1, 2, 3] * COUNT
    assert [row["model"] for row in both] == ["writer", "second"] * 2 * COUNT
    assert {(row["model"], row["label"]) for row in rows_of(run, "datasets/kto/*/*.parquet")} == {
        ("writer", True), ("second", False),
    }  # fmt: skip
    pairs = rows_of(run, "datasets/dpo/*/*.parquet")
    assert {(row["chosen_model"], row["rejected_model"]) for row in pairs} == {("writer", "second")}
    values["candidates"] = {"generators": {"writer": 1, "second": 3}}
    planned = quorum(*command("plan", tmp_path, values)).splitlines()
    assert sorted(line.split()[:3] for line in planned if line.startswith("candidates-")) == [
        ["candidates-second", "second", str(3 * COUNT)], ["candidates-writer", "writer", str(COUNT)],
    ]  # fmt: skip
    values["models"]["second"]["model"] = "writer"
    out = quorum(*command("run", tmp_path, values, "--executor", "inprocess"), code=2)
    assert "candidates.generators: 2 models, two of which are the same" in " ".join(out.split())


def candidates_of(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_run(str(run)).results["candidates"].table().read_all().to_pylist()
    return rows
