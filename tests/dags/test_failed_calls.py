"""Calls that fail are made again by the same command: a run against an endpoint that is not well all the time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.operate.status import Watch
from tests.dags.conftest import CONFIG, manifest
from tests.dags.in_process import here
from tests.endpoint import KEY, Answer, Endpoint, refused, said

SHARDS = 2


class Moody(Endpoint):
    """Answers HTTP 500 to a quarter of the judges' prompts while it is not `well`, and rejects one candidate."""

    def __init__(self) -> None:
        super().__init__(self._reply)
        self.well = False
        self.failed: set[str] = set()  # prompts that were answered with 500
        self.bad = False  # whether some answers get low scores
        self.unread = 0.0  # share of the critiques that cannot be read

    def _reply(self, body: dict[str, Any], number: int) -> Answer:
        text = body["messages"][-1]["content"]
        if "response_format" not in body:
            return refused(400, "flagged by the content policy") if len(self.asked) == 7 else said(f"answer {number}")
        if body["response_format"]["json_schema"]["schema"]["properties"].get("verdict"):  # the short call of the start
            return said('{"verdict": "green"}')
        chance = zlib.crc32(body["messages"][0]["content"].encode()) / 2**32
        if "flawed" in body["response_format"]["json_schema"]["schema"]["properties"]:
            flawless = '{"reason": "none", "failure_type": "none", "flawed": false}'
            return said(flawless if chance > self.unread else "I cannot say")
        if not self.well and zlib.crc32(text.encode()) % 4 == 0:
            self.failed.add(text)
            return refused(500, "the model is overloaded")
        return said(f'{{"reason": "nice \\ud83d", "score": {2 if self.bad and "answer 1" in text else 8}}}')

    def asked_again(self, before: int) -> int:
        """How many of the requests that followed so many others were for prompts that have failed; the rest must be the
        short calls of checks and starts."""
        texts = [body["messages"][-1]["content"] for body in self.asked[before:]]
        again = sum(text in self.failed for text in texts)
        assert len(texts) - again <= 8
        return again


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr("ray_pipeline.engines.endpoint_retry._BACKOFF_SECONDS", 0.01)
    with Moody() as server:
        yield server


def command(endpoint: Endpoint, folder: Path, *more: str) -> list[str]:
    at = f"{{base_url: '{endpoint.url}', api_key_env: LOOPBACK_KEY, retries: 1, structured: schema}}"
    return [
        "run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "judge", "prompts.sources.0.count=16",
        f"prompts.num_shards={SHARDS}", "candidates.model=judge", "candidates.k=2", "failure.backoff_s=0",
        f"models.judge={{engine: openai, model: m, endpoint: {at}}}", *more,
    ]  # fmt: skip


def table(folder: Path, stage: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob(f"{stage}-*/shard-*.parquet")))


def test_the_same_command_asks_exactly_the_calls_that_failed(endpoint: Moody, tmp_path: Path) -> None:
    first = here(*command(endpoint, tmp_path), expect=1)
    failed = sum(shard["calls"] for shard in manifest(tmp_path)["stages"]["judge"]["failed_shards"])
    assert 0 < failed < 96 and f"{failed} calls failed, in {SHARDS} of {SHARDS} shards" in first.output
    assert "HTTP 500: the model is overloaded" in first.output and "Traceback" not in first.output
    (judge,) = [stage for stage in Watch(str(tmp_path)).look(0).stages if stage.name == "judge"]
    assert (judge.calls_failed, judge.shards_failed, judge.shards_quarantined) == (failed, SHARDS, 0)

    endpoint.well, before = True, len(endpoint.asked)
    here(*command(endpoint, tmp_path))
    assert endpoint.asked_again(before) == failed
    verdicts = table(tmp_path, "judge").to_pylist()
    assert {row["parse_status"] for row in verdicts} <= {"ok", "error"} and len(verdicts) == 96
    rejected = [row for row in table(tmp_path, "candidates").to_pylist() if row["response"] is None]
    assert [row["error"] for row in rejected] == ["EngineError: HTTP 400: flagged by the content policy"]
    assert sum(row["parse_status"] == "error" for row in verdicts) == 3 * len(rejected)
    assert {row["reason"] for row in verdicts if row["parse_status"] == "ok"} == {"nice \ufffd"}


def test_retry_counts_the_calls_and_a_limit_gives_them_up(
    endpoint: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(*command(endpoint, tmp_path), expect=1)
    failed = sum(shard["calls"] for shard in manifest(tmp_path)["stages"]["judge"]["failed_shards"])
    monkeypatch.setattr("ray_pipeline.operate.retry.executor_of", lambda settings: InProcessExecutor())
    again = here("retry", str(tmp_path), expect=1)
    assert f"judge: {SHARDS} shards to retry ({failed} calls that failed): 0, 1" in again.output

    before = len(endpoint.asked)
    given_up = here(*command(endpoint, tmp_path, "failure.give_up_calls_after=1", "failure.retries=0"))
    assert "calls are given up after" in given_up.output and endpoint.asked_again(before) == 2 * failed
    rows = [row for row in table(tmp_path, "judge").to_pylist() if row["parse_status"] == "error" and row["raw"]]
    assert len(rows) >= failed
    assert all(row["raw"].startswith("CallFailed: given up after 2 attempts: HTTP 500: the model is") for row in rows)
    before = len(endpoint.asked)
    here(*command(endpoint, tmp_path))
    assert len(endpoint.asked) == before


@pytest.mark.parametrize("bad", [False, True])
def test_data_that_cannot_be_trained_on_or_was_not_read_is_said_at_the_end(
    endpoint: Moody, tmp_path: Path, bad: bool
) -> None:
    endpoint.well, endpoint.bad, endpoint.unread = True, bad, 0.4
    run = [*command(endpoint, tmp_path, "failure.max_error_rate=1.0", "candidates.k=4"), "--to", "datasets"]
    ended = here(*run, expect=0 if bad else 1)
    critiques = table(tmp_path, "critic").to_pylist()
    unread = sum(row["parse_status"] == "unparsed" for row in critiques)
    assert 0.1 < unread / len(critiques) < 0.9
    if bad:
        rejected = sum(row["parse_status"] == "error" for row in critiques)
        share = f"{(unread + rejected) / len(critiques):.0%} of {len(critiques)} rows have no value"
        assert f"warning: critic: {share} (error {rejected}, unparsed {unread})" in ended.output
    else:
        nothing = "nothing to train on: kto has no undesirable rows; dpo has no training rows"
        assert f"quorum: datasets failed: {nothing}" in ended.output
