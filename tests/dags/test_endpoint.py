"""Judges behind a real OpenAI-compatible server: vLLM's own, on the pocket judge, with a proxy that breaks things.

One server for the module. The proxy passes requests on, or answers with a fault instead.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings, Verdict, judge
from ray_pipeline.agents.replies import critique_grammar, score_grammar
from ray_pipeline.agents.templates import load_templates, render
from ray_pipeline.engines.base import EngineStartError, Grammar, Message, PromptTooLong, Sampling
from ray_pipeline.engines.endpoint_settings import EndpointSettings, OpenAISpec
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.pocket import model_path
from ray_pipeline.pocket.responses import make_response
from ray_pipeline.pocket.tasks import make_prompts, rubric_scores, truth
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id
from tests.dags.conftest import CONFIG, manifest
from tests.dags.in_process import here
from tests.endpoint import KEY, Answer, Endpoint, refused, said, using
from tests.interpreter import interpreter
from tests.models import needs_vllm
from tests.scripted import user

pytestmark = [pytest.mark.e2e, needs_vllm]

MODEL = "pocket-judge"
RUBRICS = tuple(Rubric(name=name) for name in ("helpfulness", "factuality", "conciseness"))


#: vLLM's server, whose core is forked as those of this package's engines are.
SERVER = """
import os, runpy, sys
from ray_pipeline.engines.core_server import CoreServer
with open(sys.argv.pop(1), "w") as file:
    file.write(str(os.getpid()))
with CoreServer().starts_cores():
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of vLLM's server; its processes are gone afterwards."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [interpreter(), "-c", SERVER, str(folder / "pid"), "--model", model_path("pocket:judge")]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--max-num-seqs", "64", "--enforce-eager", "--no-enable-chunked-prefill"]
    command += ["--max-num-batched-tokens", "4096", "--enable-prompt-tokens-details"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/models", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(f"the server does not answer\n{log.read_text()[-3000:]}")
        yield url
    finally:
        own = psutil.Process(int((folder / "pid").read_text()))
        family = [own, *own.children(recursive=True)]
        own.terminate()
        _, alive = psutil.wait_procs(family, timeout=30)
        for left in alive:
            left.kill()
        psutil.wait_procs(alive, timeout=10)
        process.wait(10)


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[Endpoint]:
    with Endpoint(lambda body, n: None, behind=server) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _calm(proxy: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    proxy.script = lambda body, n: None
    proxy.asked.clear()


def engine_at(url: str, model: str = MODEL, **settings: Any) -> OpenAIEngine:
    endpoint = EndpointSettings(**{"base_url": url, "api_key_env": "LOOPBACK_KEY", "concurrency": 16, **settings})
    return OpenAIEngine(OpenAISpec(model, endpoint))


def test_forms_seeds_and_limits_of_a_real_server(proxy: Endpoint) -> None:
    texts, task = load_templates("pocket"), make_prompts(1, seed=3)[0].instruction
    about: dict[str, Any] = {"instruction": task, "response": truth(task), "name": "helpfulness", "rubric": ""}
    scored = render(texts.judge, "shared_first", low=1, high=10, **about)
    criticised = render(texts.critic, "shared_first", **about)

    async def work(engine: OpenAIEngine) -> None:
        async def forced(asked: list[Message], grammar: Grammar, **sampling: Any) -> str:
            reply = await engine.chat(asked, Sampling(max_tokens=80, grammar=grammar, **sampling))
            assert reply.finish_reason == "stop" and reply.prompt_tokens > 10 and reply.completion_tokens > 0
            return reply.text

        right = rubric_scores(task, truth(task))["helpfulness"]
        assert right > 5 and json.loads(await forced(scored, score_grammar(1, 10, 200)))["score"] == right
        assert json.loads(await forced(scored, score_grammar(3, 5, 200)))["score"] in (3, 4, 5)
        # The fields come in the order of the schema, which is not that of the alphabet.
        value = json.loads(await forced(criticised, critique_grammar(200)))
        assert list(value) == ["reason", "failure_type", "flawed"] and value["flawed"] is False
        warm: dict[str, Any] = {"temperature": 1.0}
        options = ["yes", "no", "I do not know"]
        for seed in range(4):
            assert await forced(scored, Grammar.choice(options), seed=seed, **warm) in options
            assert len(await forced(scored, Grammar.regex("[0-7]{5}"), seed=seed, **warm)) == 5
        free = Sampling(temperature=1.0, seed=7, max_tokens=24, logprobs=3)
        first, second = [await engine.chat(scored, free) for _ in range(2)]
        assert first.text == second.text and first.logprobs is not None
        assert len(first.logprobs) == first.completion_tokens
        assert all(len(step) >= 3 and step[0][1] <= 0 for step in first.logprobs)
        cut = await engine.chat(scored, Sampling(max_tokens=3))
        assert (cut.finish_reason, cut.completion_tokens) == ("length", 3)
        with pytest.raises(PromptTooLong) as caught:
            await engine.chat(user("nine " * 250), Sampling(max_tokens=20))
        assert caught.value.limit == 256 and caught.value.prompt_tokens >= 237

    using(engine_at(proxy.url), work, seconds=300)
    with pytest.raises(EngineStartError, match=f"does not serve 'pocket-jugde'.*{MODEL}"):
        using(engine_at(proxy.url, "pocket-jugde"), lambda e: e.start(), seconds=300)


def faults() -> Callable[[dict[str, Any], int], Answer | None]:
    """Every second request goes wrong, in every way in turn."""
    wrong: Iterator[Answer] = itertools.cycle(
        [
            refused(429, "slow down", Retry_After="0.2"),
            refused(500, "out of memory"),
            Answer(503, b"<html>bad gateway</html>"),
            Answer(**{**vars(said()), "delay": 2.0}),
            Answer(**{**vars(said('{"score": 1}' * 50)), "cut": True}),
            Answer(body=b'{"choices": [{"message": {"content": "{\\"score\\": 1'),
            Answer(body={"choices": []}),
        ]
    )
    return lambda body, n: next(wrong) if n % 2 else None


async def judged(engine: OpenAIEngine, root: Path) -> tuple[list[Verdict], Any]:
    """Verdicts of three rubrics on right and wrong answers, through the call log."""
    template = load_templates("pocket").judge
    rng, tasks = random.Random(0), [prompt.instruction for prompt in make_prompts(12, seed=5)]
    pairs = [(task, answer) for task in tasks for answer in (truth(task), make_response(task, "wrong", rng))]
    async with LoggedEngine(engine, Folder(str(root)), 0, 1) as log:
        calls = [
            judge(
                log.bound(prompt_id(user(task)), f"judge/{rubric.name}"),
                user(task),
                answer,
                rubric,
                template,
                SamplingSettings(max_tokens=64),
                JudgeAsking(reason_chars=200),
            )
            for task, answer in pairs
            for rubric in RUBRICS
        ]
        verdicts = await asyncio.gather(*calls)
    right = [
        verdict.score == rubric_scores(task, answer)[rubric.name]
        for verdict, ((task, answer), rubric) in zip(verdicts, itertools.product(pairs, RUBRICS), strict=True)
    ]
    assert sum(right) > 0.8 * len(right)  # it is the judge that answers, and it is asked as it was taught
    return verdicts, log.stats


def test_faults_change_no_verdict_and_a_second_pass_asks_nobody(proxy: Endpoint, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"timeout_s": 1.5, "retries": 12}
    clean, stats = using(engine_at(proxy.url), lambda e: judged(e, tmp_path / "clean"), seconds=300)
    assert {v.parse_status for v in clean} == {"ok"}
    undisturbed, calls = len(proxy.asked), stats.calls_engine
    assert undisturbed == calls + 1  # and the canary

    proxy.script, before = faults(), len(proxy.asked)
    broken, stats = using(engine_at(proxy.url, **settings), lambda e: judged(e, tmp_path / "broken"), seconds=300)
    assert broken == clean and stats.errors == 0
    assert len(proxy.asked) - before > 1.5 * undisturbed

    before = len(proxy.asked)
    again, stats = using(engine_at(proxy.url, **settings), lambda e: judged(e, tmp_path / "broken"), seconds=300)
    assert again == clean and len(proxy.asked) == before
    assert (stats.calls_engine, stats.calls_log) == (0, calls)


def test_a_run_stops_at_its_budget_and_goes_on_with_a_bigger_one(proxy: Endpoint, tmp_path: Path) -> None:
    """Candidates and verdicts of one endpoint: no engine is started here."""
    folder = tmp_path / "run"
    small = ["prompts.sources.0.count=16", "prompts.num_shards=2", "candidates.model=judge"]

    def command(budget: float) -> list[str]:
        money = f"prices: {{input: 1000, output: 1000}}, budget: {budget}"
        endpoint = f"{{base_url: '{proxy.url}', api_key_env: LOOPBACK_KEY, concurrency: 16, {money}}}"
        judge = f"models.judge={{engine: openai, model: {MODEL}, endpoint: {endpoint}}}"
        return ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "judge", *small, judge]

    def calls() -> list[dict[str, Any]]:
        return [row for part in (folder / "calls").rglob("*.parquet") for row in pq.read_table(part).to_pylist()]

    stopped = here(*command(1.3), expect=1)
    assert f"quorum: candidates failed: the budget for {MODEL} at {proxy.url} is spent" in stopped.output
    assert "raise endpoint.budget" in stopped.output and "not run as a result: judge" in stopped.output
    # All that was paid for is in the log, but for the short call of the start and the three of the check before it.
    assert len(calls()) == len(proxy.asked) - 4 > 10
    spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in calls()) / 1000
    assert 0.4 < spent <= 1.3

    done = here(*command(1000.0))
    assert not stopped.engines and not done.engines
    stages = manifest(folder)["stages"]
    assert stages["candidates"]["rows"] == {"candidates": 64} and stages["judge"]["rows"] == {"verdicts": 192}
    # No call twice: two stages of the second run have asked for their start, and so has its check.
    assert len({row["call_key"] for row in calls()}) == len(calls()) == len(proxy.asked) - 9
    tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in calls())
    assert sum(stages[name]["usage"]["cost"] for name in ("candidates", "judge")) <= tokens / 1000 + 1e-9
    assert stages["judge"]["usage"]["cost"] > 0 and "cost" in done.output
    for text in (stopped.output, done.output, (folder / "manifest.json").read_text(), repr(calls())):
        assert KEY not in text
