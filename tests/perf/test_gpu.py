"""The benchmark of one GPU: its models, its roofline, the calls that both sides make, and all of it on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from perf.bare import logged_calls
from perf.gpu import SHAPES, Cost, Figure, Peak, configuration, main, model_config, table, write_model
from ray_pipeline.engines.base import Completion, Grammar, Sampling
from ray_pipeline.engines.log_rows import call_row
from ray_pipeline.engines.usage import Usage
from tests.models import needs_vllm


@pytest.mark.parametrize(("role", "parameters"), [("policy", 7_241_732_096), ("judge", 8_190_735_360)])
def test_the_models_have_the_published_sizes(role: str, parameters: int) -> None:
    config = model_config(SHAPES["published"], role)
    cost = Cost.of(config, "bfloat16")
    assert cost.multiplied + config.vocab_size * config.hidden_size == parameters
    assert cost.weight_bytes == 2 * cost.multiplied
    assert cost.cache_bytes == 2 * 2 * config.num_hidden_layers * 8 * 128  # keys and values of 8 heads


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    cost = Cost(multiplied=1000, weight_bytes=2000, cache_bytes=10)
    used = Usage(calls_engine=10, prompt_tokens=1000, cached_tokens=400, completion_tokens=200)
    # 2 · 1000 · (600 + 200) FLOPs; 200 / 4 steps that read the weights, 200 tokens that read 110 tokens of cache.
    assert cost.serving_seconds(used, 4, Peak("", 1e6, 1e9)) == pytest.approx(1.6)
    assert cost.serving_seconds(used, 4, Peak("", 1e9, 1e5)) == pytest.approx(3.2)
    assert cost.serving_seconds(used, 64, Peak("", 1e9, 1e5)) == pytest.approx(2.6)  # 10 calls make batches of 10
    assert cost.training_seconds(50, Peak("", 1e6, 1e9)) == pytest.approx(0.6)


def test_the_bare_side_makes_the_calls_of_the_log() -> None:
    schema = Grammar.json({"type": "object", "properties": {"score": {"type": "integer"}}})
    made = [
        ([{"role": "user", "content": text}], Sampling(0.5, 0.9, 7, 3, ("end",), None, grammar, extra))
        for text, grammar, extra in (("b", schema, ()), ("a", None, (("ignore_eos", True),)))
    ]
    reply = Completion("", "stop", 1, 1, 0)
    rows = [call_row("key", "0" * 32, {}, "judge", m, sampling.key(), reply) for m, sampling in made]
    assert logged_calls(rows) == [made[1], made[0]]


def test_what_is_measured_is_the_published_method(tmp_path: Path) -> None:
    for role in ("policy", "judge"):
        write_model(SHAPES["tiny"], role, tmp_path / role)
    config = configuration(SHAPES["tiny"], tmp_path)
    assert [r.name for r in config.judge.rubrics] == ["helpfulness", "factuality", "conciseness"]
    assert config.gate.use_critic and config.judge.early_exit == "off" and config.candidates.k == 4
    assert config.candidates.sampling.max_tokens == SHAPES["tiny"].new_tokens
    assert config.critic is not None
    for asking in (config.judge, config.critic):
        assert asking.sampling.max_tokens == SHAPES["tiny"].reply_tokens and asking.sampling.temperature == 0
        assert asking.asking.retries == 0 and asking.asking.reason_chars == 400


def test_the_table() -> None:
    lines = table([Figure("computed tokens/s", 31234.5, 33000, 60000, 30_000), Figure("candidates/s", 4.321)])
    assert [line.split()[-6:] for line in lines.splitlines()[1:]] == [
        ["31,234", "33,000", "0.947", "60,000", "0.521", "30,000"],
        ["4.32", "–", "–", "–", "–", "–"],
    ]


@pytest.mark.e2e
@needs_vllm
def test_all_parts_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--shape", "tiny", "--executor", "inprocess"])
    printed = capsys.readouterr().out
    assert "16 candidates of 16 tokens, 64 calls of judges and critic" in printed
    assert "16 generated (alone: 16)" in printed
    rows = {m[1].strip(): m[0].split() for m in re.finditer(r"(?m)^([a-z/,% ]+?) {2,}.*$", printed)}
    for name in ("judged candidates/s", "computed tokens/s", "train tokens/s"):
        ours, alone, ratio = (float(cell.replace(",", "")) for cell in rows[name][2:5])
        assert ours > 0 and alone > 0 and ratio == pytest.approx(ours / alone, rel=0.05), printed
    assert float(rows["prefix hit rate, %"][4]) > 0, printed
