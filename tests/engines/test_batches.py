"""Calls in batches: one file, one batch, every call's own reply, and nothing paid twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines.base import BudgetSpent, EngineError, Sampling
from ray_pipeline.engines.batch_records import batches_of
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.store.files import Folder
from tests.batch_endpoint import BatchEndpoint
from tests.endpoint import KEY, Answer, refused, said, using

PRICES = {"input": 1000.0, "output": 2000.0}


def echo(body: dict[str, Any], number: int) -> Answer:
    return said(f"re: {body['messages'][-1]['content']}", prompt=10, new=5)


@pytest.fixture(params=["openai", "together"])
def server(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[BatchEndpoint]:
    """A server of OpenAI's form, and one of Together's."""
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    endpoint = BatchEndpoint(echo)
    endpoint.together = request.param == "together"
    with endpoint:
        yield endpoint


def model(server: BatchEndpoint, engine: str = "openai_batch", batch: Any = None, **endpoint: Any) -> ModelSettings:
    block = {"base_url": server.url, "api_key_env": "LOOPBACK_KEY", "retries": 2, "patience_s": 5.0, **endpoint}
    if engine == "openai_batch":
        form = "together" if server.together else "openai"
        block["batch"] = {"quiet_s": 0.1, "poll_s": 0.02, "form": form, **(batch or {})}
    return ModelSettings.model_validate({"engine": engine, "model": "m", "endpoint": block, "canary": False})


def engine(server: BatchEndpoint, **options: Any) -> OpenAIEngine:
    made = model(server, **options).factory()()
    assert isinstance(made, OpenAIEngine)
    return made


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def ask(own: OpenAIEngine, texts: list[str], root: Path | None = None) -> list[Any]:
    if root is not None:
        await own.settle(Folder(str(root)))
    replies = await asyncio.gather(
        *(own.chat(user(text), Sampling(max_tokens=20)) for text in texts), return_exceptions=True
    )
    return [reply if isinstance(reply, BaseException) else reply.text for reply in replies]


def answers(texts: list[str]) -> list[str]:
    return [f"re: {text}" for text in texts]


TEXTS = [f"question {n}, “ü”\n" for n in range(7)]


def test_calls_are_one_batch_and_each_gets_its_own_reply(server: BatchEndpoint) -> None:
    assert using(engine(server), lambda own: ask(own, TEXTS)) == answers(TEXTS)
    (made,) = server.batches
    assert [body["messages"][0]["content"] for _, body in made.calls] == TEXTS and server.asked == []
    assert {body["model"] for _, body in made.calls} == {"m"}


def test_httpx_uploads_and_downloads_as_well(server: BatchEndpoint) -> None:
    assert using(engine(server, transport="httpx"), lambda own: ask(own, TEXTS)) == answers(TEXTS)


def test_a_full_batch_is_sent_at_once(server: BatchEndpoint) -> None:
    own = engine(server, batch={"requests": 3, "quiet_s": 0.3})
    assert using(own, lambda own: ask(own, TEXTS)) == answers(TEXTS)
    assert [len(made.calls) for made in server.batches] == [3, 3, 1] and own.useful_concurrency == 3


def test_the_short_call_at_the_start_is_made_directly(server: BatchEndpoint) -> None:
    server.script = lambda body, number: (
        said('{"verdict": "green"}') if "response_format" in body else echo(body, number)
    )
    settings = model(server).model_copy(update={"canary": True})
    assert using(settings.factory()(), lambda own: ask(own, ["a"])) == ["re: a"]  # type: ignore[arg-type]
    assert len(server.asked) == 1 and len(server.batches) == 1


# --- what a batch does not answer -------------------------------------------------------------------------------------


def test_what_an_expired_batch_left_out_is_asked_again_and_the_rest_is_kept(server: BatchEndpoint) -> None:
    server.skip = {1, 4}
    assert using(engine(server), lambda own: ask(own, TEXTS)) == answers(TEXTS)
    first, *later = server.batches
    assert first.status == "expired" and len(server.paid) == len(TEXTS)
    assert sorted(body["messages"][0]["content"] for made in later for _, body in made.calls) == [TEXTS[1], TEXTS[4]]


def test_lines_with_errors_are_retried_or_refused_as_requests_are(server: BatchEndpoint) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        text = body["messages"][-1]["content"]
        if text == "busy" and len(server.batches) == 1:
            return refused(500, "try later")
        return refused(400, "unsafe content", code="content_filter") if text == "bad" else echo(body, number)

    server.script = script
    busy, bad, good = using(engine(server), lambda own: ask(own, ["busy", "bad", "good"]))
    assert (busy, good) == ("re: busy", "re: good")
    assert isinstance(bad, EngineError) and "unsafe content" in str(bad)


def test_a_batch_that_is_refused_as_a_whole_names_the_reason(server: BatchEndpoint) -> None:
    server.ends = {0: "failed"}
    server.fault = {"code": "invalid_request", "message": "this model takes no batches", "line": None}
    found = using(engine(server), lambda own: ask(own, ["a", "b"]))
    assert all("this model takes no batches" in str(error) for error in found) and server.paid == []


# --- killed processes -------------------------------------------------------------------------------------------------


async def killed(own: OpenAIEngine, texts: list[str], root: Path, server: BatchEndpoint) -> None:
    """Ask, and leave without a farewell once the batch is made."""
    await own.settle(Folder(str(root)))
    calls = [asyncio.create_task(own.chat(user(text), Sampling(max_tokens=20))) for text in texts]
    while not server.batches:
        await asyncio.sleep(0.01)
    if not server.hide:
        while not all(batch.id for batch in batches_of(Folder(str(root)))):
            await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()


@pytest.mark.parametrize("hidden", [False, True], ids=["number recorded", "number unknown"])
def test_after_a_kill_between_upload_and_download_nothing_is_paid_twice(
    server: BatchEndpoint, tmp_path: Path, hidden: bool
) -> None:
    server.looks, server.hide = 10**9, {0} if hidden else set()
    using(engine(server, retries=0), lambda own: killed(own, TEXTS, tmp_path, server))
    (record,) = batches_of(Folder(str(tmp_path)))
    assert record.open and bool(record.id) != hidden and len(record.ids) == len(TEXTS)

    server.looks, server.hide = 0, set()
    more = [*TEXTS, "another"]
    assert using(engine(server), lambda own: ask(own, more, tmp_path)) == answers(more)
    assert [len(made.calls) for made in server.batches] == [len(TEXTS), 1] and len(server.paid) == len(more)
    assert not any(batch.open for batch in batches_of(Folder(str(tmp_path))))


def test_a_batch_whose_making_was_answered_by_a_broken_connection_is_found(server: BatchEndpoint) -> None:
    server.hide = {0}
    assert using(engine(server), lambda own: ask(own, TEXTS)) == answers(TEXTS)
    assert len(server.batches) == 1 and len(server.paid) == len(TEXTS)


def test_a_batch_that_the_server_forgot_is_asked_again(server: BatchEndpoint, tmp_path: Path) -> None:
    server.looks = 10**9
    using(engine(server), lambda own: killed(own, TEXTS, tmp_path, server))
    server.batches.clear()
    server.looks = 0
    assert using(engine(server), lambda own: ask(own, TEXTS, tmp_path)) == answers(TEXTS)
    assert len(server.paid) == len(TEXTS)


def test_without_a_list_of_batches_a_warning_says_that_calls_may_be_sent_twice(
    server: BatchEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.looks, server.hide = 10**9, {0}
    using(engine(server, retries=0), lambda own: killed(own, TEXTS, tmp_path, server))
    server.looks, server.hide, server.lists = 0, set(), False
    assert using(engine(server), lambda own: ask(own, TEXTS, tmp_path)) == answers(TEXTS)
    assert "lists no batches" in caplog.text


def test_calls_are_stored_under_the_keys_of_single_requests(server: BatchEndpoint, tmp_path: Path) -> None:
    async def through_the_log(own: OpenAIEngine) -> Any:
        async with LoggedEngine(own, Folder(str(tmp_path)), 0, 1) as log:
            bound = [log.bound(f"{n:032x}", "judge") for n in range(3)]
            found = await asyncio.gather(*(one.chat(user("hi"), Sampling(seed=n)) for n, one in enumerate(bound)))
            return [reply.text for reply in found], log.stats.calls_engine, log.stats.calls_log, log.stats.cost

    priced: dict[str, Any] = {"prices": PRICES}
    texts, made, stored, cost = using(engine(server, **priced), through_the_log)
    assert (texts, made, stored) == (["re: hi"] * 3, 3, 0) and cost == pytest.approx(
        3 * 0.5 * (10 * 1000 + 5 * 2000) / 1e6
    )
    direct = model(server, "openai", **priced)
    assert direct.semantics() == model(server, **priced).semantics()
    assert using(direct.factory()(), through_the_log)[1:3] == (0, 3)  # type: ignore[arg-type]
    assert server.asked == []


# --- money and settings -----------------------------------------------------------------------------------------------


def test_the_budget_holds_for_batches(server: BatchEndpoint) -> None:
    one = 0.5 * (10 * 1000 + 5 * 2000) / 1e6  # what a reply costs; 20 new tokens are reserved
    own = engine(server, prices=PRICES, budget=4 * one, batch={"quiet_s": 0.05})
    found = using(own, lambda own: ask(own, [f"q{n}" for n in range(12)]))
    spent = [reply for reply in found if isinstance(reply, BudgetSpent)]
    assert spent and len(server.paid) == len(found) - len(spent) <= 4
    assert own.stats().cost == pytest.approx(len(server.paid) * one)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "openai_batch"}, "engine openai_batch needs the endpoint block"),
        (
            {"engine": "openai", "endpoint": {"base_url": "http://a/v1", "batch": {}}},
            "endpoint.batch is only for engine openai_batch",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSettings.model_validate({"model": "m", **values})


def test_many_shards_are_in_flight_unless_set(server: BatchEndpoint) -> None:
    assert model(server).placement.shards_in_flight == 256 and model(server, "openai").placement.shards_in_flight == 3
    values = {**model(server).model_dump(exclude_unset=True), "placement": {"shards_in_flight": 7}}
    assert ModelSettings.model_validate(values).placement.shards_in_flight == 7
    assert json.loads(json.dumps(model(server).model_dump(mode="json")))["endpoint"]["batch"]["price"] == 0.5
