"""The simulation of large runs: which runs it makes, how it follows them to larger ones, and its engine."""

from __future__ import annotations

import asyncio

import pytest

from perf.scale import SimulatedEngine, plan, predicted, table
from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings, critique, judge
from ray_pipeline.agents.templates import load_templates
from ray_pipeline.engines.base import Sampling

SIZES = {"candidates": [4000, 16000], "shards": [64, 256], "actors": [8, 200]}


def test_each_number_varies_alone_and_the_two_of_storage_together() -> None:
    runs = [tuple(sizes.values()) for sizes in plan(SIZES)]
    assert runs == [(4000, 64, 8), (16000, 64, 8), (4000, 256, 8), (4000, 64, 200), (16000, 256, 8)]
    assert list(plan({name: values[:1] for name, values in SIZES.items()})) == [
        {"candidates": 4000, "shards": 64, "actors": 8}
    ]


def test_a_linear_figure_is_followed_exactly_and_what_did_not_vary_has_no_slope() -> None:
    at = {"candidates": 10_000_000, "shards": 16384, "actors": 200}
    runs = [(s, 5 + 0.25 * s["candidates"] + 3 * s["shards"] + 2 * s["actors"]) for s in plan(SIZES)]
    assert predicted(runs, at) == pytest.approx(5 + 2_500_000 + 49_152 + 400)
    one = [(sizes, 7.0) for sizes in plan({name: values[:1] for name, values in SIZES.items()})]
    assert predicted(one, at) == pytest.approx(7)
    assert list(table([(sizes, {"files": value}) for sizes, value in one], [at]))[-1].split() == ["files", "7.0", "7.0"]


def test_simulated_replies_are_read_and_take_the_time_of_their_tokens() -> None:
    templates, prompt = load_templates("default"), [{"role": "user", "content": "Question 1"}]

    async def ask(pace: float) -> float:
        engine, loop = SimulatedEngine("model", pace), asyncio.get_running_loop()
        begin = loop.time()
        answer = (await engine.chat(prompt, Sampling(seed=1))).text
        took = loop.time() - begin
        for name in ("helpfulness", "factuality"):
            verdict = await judge(
                engine, prompt, answer, Rubric(name=name, text=name), templates.judge, SamplingSettings(), JudgeAsking()
            )
            assert verdict.parse_status == "ok" and verdict.score is not None
        flawed = set()
        for text in (answer, *(f"{word} {number}" for number in range(8) for word in ("sound", "wrong"))):
            opinion = await critique(engine, prompt, text, templates.critic, SamplingSettings(), JudgeAsking(retries=0))
            assert opinion.parse_status == "ok"
            flawed.add(opinion.flawed)
        assert flawed == {False, True}
        return took

    assert asyncio.run(ask(1e6)) < 0.2 < asyncio.run(ask(300.0))  # some 100 tokens
