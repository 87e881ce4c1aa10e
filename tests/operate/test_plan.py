"""What a run would cost, against counts by hand; limits; what a probe's receipts say."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.graph.results import read_run
from ray_pipeline.graph.spending import Budget, Spending
from ray_pipeline.graph.stage import StageStop
from ray_pipeline.operate import estimate
from ray_pipeline.operate.plan import Plan, StagePlan, plan, plan_lines
from ray_pipeline.operate.prices import Rates, budget_of, given_price, listed_prices, read_rates
from ray_pipeline.operate.probe import measured
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from ray_pipeline.workflow.registry import find_workflow
from tests.operate.planted_run import plant
from tests.prompt_sets import load_prompts

SAID = {"source": "a bench of ours", "date": "2026-11-01"}


def pocket(*overrides: str) -> Any:
    values = yaml.safe_load(Path("tests/one_judge.yaml").read_text())
    return read_config(DmapoConfig, values, ["prompts.sources.0.count=60", *overrides])


def letters(key: str, model: Any) -> Any:
    """A tokenizer that counts characters."""
    return lambda messages: sum(len(m["content"]) for m in messages)


def rates(**changes: Any) -> Rates:
    model = {"prompt_tokens_per_s": 1000, "completion_tokens_per_s": 100, "spread": 0.5, **SAID}
    lengths = {"tokens": {"candidates": 20, "judge": 10, "critic": 5}, **SAID}
    given = {"models": {"policy": model, "judge": model}, "reply_tokens": lengths}
    return Rates.model_validate({**given, **changes})


def planned(config: Any, given: Rates, workflow: str = "dmapo") -> Plan:
    return plan(config, find_workflow(workflow).wire(config, "run"), given, letters)


def by_name(stages: list[StagePlan]) -> dict[str, StagePlan]:
    return {stage.stage: stage for stage in stages}


def test_calls_and_tokens_are_those_of_the_real_prompts() -> None:
    config = pocket()
    table = load_prompts(config.prompts).table
    n, held = table.num_rows, table["split"].to_pylist().count("val")
    found = by_name(planned(config, rates()).stages)
    assert {name: s.calls for name, s in found.items()} == {
        "candidates": 4 * n, "judge": 12 * n, "critic": 4 * n, "responses-base": 2 * held,
        "responses-policy": 2 * held, "comparisons": 2 * held, "score-responses": 3 * 4 * held,
    }  # fmt: skip
    asked = sum(len(m[-1]["content"]) for m in table["messages"].to_pylist())
    assert found["candidates"].prompt_tokens == pytest.approx(4 * asked)
    assert found["candidates"].completion_tokens == 4 * n * 20 and not found["candidates"].bound
    assert found["judge"].completion_tokens == 12 * n * 10
    # A judge reads the instruction, the answer, and the words around them.
    assert found["judge"].prompt_tokens > 12 * asked / 4 + 12 * n * 20
    assert found["responses-base"].completion_tokens == 2 * held * 20  # as long as candidates are


def test_calls_that_may_be_skipped_are_counted_and_named_as_upper_bounds() -> None:
    by_level = "judge.escalate=[[helpfulness, factuality], [conciseness]]"
    levels, exits = (planned(pocket(key), rates()) for key in (by_level, "judge.early_exit=scores"))
    n = load_prompts(pocket().prompts).table.num_rows
    found = by_name(levels.stages)
    calls = [found["judge-level-1"].calls, found["judge-level-2"].calls, found["critic"].calls]
    assert calls == [8 * n, 4 * n, 4 * n]
    assert found["judge-level-2"].device_seconds is not None and found["judge-level-2"].device_seconds > 0
    assert levels.notes[0].startswith("calls of judge-level-2 are upper bounds: judge.escalate asks them")
    found = by_name(exits.stages)
    assert [found["judge"].calls, found["critic"].calls] == [12 * n, 4 * n]
    assert exits.notes[0].startswith("calls of judge, critic are upper bounds: judge.early_exit")


def test_without_reply_tokens_a_plan_is_an_upper_bound_and_says_so() -> None:
    found = planned(pocket(), rates(reply_tokens=None))
    assert all(stage.bound for stage in found.stages)
    assert by_name(found.stages)["candidates"].completion_tokens == by_name(found.stages)["candidates"].calls * 48
    assert any("upper bound" in note for note in found.notes) and "≤" in "\n".join(plan_lines(found))


def test_time_and_money_come_from_the_rates_and_name_them() -> None:
    config = pocket("models.judge.placement.max_actors=4")
    given = rates(device_hour={"price": 3.6, **SAID})
    found = planned(config, given)
    judge = by_name(found.stages)["judge"]
    seconds = judge.prompt_tokens / 1000 + judge.completion_tokens / 100
    assert judge.device_seconds == pytest.approx(seconds) and judge.wall_seconds == pytest.approx(seconds / 4)
    assert (judge.low, judge.high) == (pytest.approx(seconds / 1.5), pytest.approx(seconds / 0.5))
    assert judge.money == pytest.approx(seconds * 0.001)
    total = sum(s.money or 0 for s in found.stages)
    lines = plan_lines(found)
    assert f"{total:.2f}" in next(line for line in lines if line.startswith("all"))
    assert "assumed: device hour: 3.6 USD; a bench of ours, 2026-11-01" in lines
    assert "assumed: tokens per reply: candidates 20, judge 10, critic 5; a bench of ours, 2026-11-01" in lines
    low, high = (sum(getattr(s, name) or 0 for s in found.stages) for name in ("low", "high"))
    interval = f"interval: {low / 3600:.2f} to {high / 3600:.2f} GPU-hours, {low / 1000:.2f} to {high / 1000:.2f} USD"
    assert interval in lines
    assert any("training is not planned" in note for note in found.notes)


def test_training_is_planned_where_it_can_be() -> None:
    found = planned(pocket(), rates(train={"tokens_per_s": 50, **SAID}, kept_share={"share": 0.5, **SAID}))
    drawn, train = by_name(found.stages)["candidates"], by_name(found.stages)["train"]
    tokens = (drawn.prompt_tokens + drawn.completion_tokens) * 0.5 * 2
    assert "kept share of candidates: 50.0%; a bench of ours, 2026-11-01" in found.assumed
    assert train.device_seconds == pytest.approx(tokens / 50) and train.devices == 2


def test_an_equal_training_of_a_comparison_is_planned_once() -> None:
    """The reference takes its own steps in the reading of equal steps, too."""
    values = yaml.safe_load(Path("configs/pocket_baselines.yaml").read_text())
    few = ["prompts.sources.0.count=60", "baselines.methods={kto: {}}", "baselines.seeds=[0]"]
    data = [
        "baselines.data={gated: {}, all: {gated: false}}",
        "baselines.reference=gated",
        "baselines.readings=[epochs, steps]",
    ]
    config = read_config(find_workflow("baselines").config, values, [*few, *data])
    found = planned(config, rates(train={"tokens_per_s": 50, **SAID}, kept_share={"share": 0.5, **SAID}), "baselines")
    tokens = {stage.stage: stage.prompt_tokens for stage in found.stages if stage.stage.startswith("train-")}
    assert {name for name, count in tokens.items() if not count} == {"train-kto-gated-steps-s0"} and len(tokens) == 4


def test_without_rates_there_is_no_time_and_no_money() -> None:
    found = planned(pocket(), Rates())
    assert found.total("device_seconds") is None and found.total("money") is None and found.assumed == []
    assert any(note.startswith("no rates for judge, policy") for note in found.notes)


def test_an_endpoint_has_prices_and_a_pace() -> None:
    endpoint = {
        "base_url": "https://example.org/v1",
        "requests_per_minute": 60,
        "prices": {"input": 1.0, "output": 10.0, "currency": "EUR", "source": "price list, 2026-11-01"},
    }
    values = yaml.safe_load(Path("tests/one_judge.yaml").read_text())
    values["models"]["judge"] = {"engine": "openai", "model": "big", "endpoint": endpoint}
    config = read_config(DmapoConfig, values, ["prompts.sources.0.count=60"])
    found = planned(config, rates(models={}))
    judge = by_name(found.stages)["judge"]
    assert judge.money == pytest.approx((int(judge.prompt_tokens) + 10 * int(judge.completion_tokens)) / 1e6)
    assert judge.wall_seconds == judge.calls and found.currency == "EUR"
    assert any("price list, 2026-11-01" in line for line in found.assumed)
    budget = budget_of(config, 5.0, None)
    assert (budget.max_cost, budget.currency, budget.workers) == (5.0, "EUR", {"train": 2})


def at_endpoint(model: str = "big", **endpoint: Any) -> Any:
    values = yaml.safe_load(Path("tests/one_judge.yaml").read_text())
    where = {"base_url": "https://api.openai.com/v1", **endpoint}
    values["models"]["judge"] = {"engine": "openai", "model": model, "endpoint": where}
    return read_config(DmapoConfig, values, ["prompts.sources.0.count=60"])


def test_an_endpoint_without_prices_is_named_with_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = planned(at_endpoint(), rates(models={}))
    assert by_name(found.stages)["judge"].money is None
    (note,) = [note for note in found.notes if note.startswith("no prices")]
    assert "no prices for judge; set endpoint.prices of judge, or pip install '" in note and "[prices]' for" in note


class ListedPrices(types.ModuleType):
    """The part of genai-prices that a plan uses, with prices of one model."""

    def __init__(self) -> None:
        super().__init__("genai_prices")
        self.__spec__ = importlib.machinery.ModuleSpec("genai_prices", None)
        self.asked: list[tuple[str, str]] = []

    @staticmethod
    def Usage(input_tokens: int = 0, output_tokens: int = 0) -> tuple[int, int]:
        return input_tokens, output_tokens

    def calc_price(self, usage: tuple[int, int], *, model_ref: str, provider_api_url: str) -> Any:
        self.asked.append((model_ref, provider_api_url))
        if model_ref != "big":
            raise LookupError(f"no model {model_ref}")
        about = types.SimpleNamespace(provenance=types.SimpleNamespace(last_verified="2026-10-01"))
        return types.SimpleNamespace(total_price=Decimal(usage[0] * 2 + usage[1] * 8) / 10**6, model=about)


def test_listed_prices_price_a_plan_with_their_date_and_never_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ListedPrices()
    monkeypatch.setitem(sys.modules, "genai_prices", listed)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "9.9" if n == "genai-prices" else version(n))
    config = at_endpoint()
    found = planned(config, rates(models={}))
    judge = by_name(found.stages)["judge"]
    assert judge.money == pytest.approx((2 * int(judge.prompt_tokens) + 8 * int(judge.completion_tokens)) / 1e6)
    line = "judge: 2 and 8 USD per million tokens; list price of genai-prices 9.9, 2026-10-01"
    assert line in found.assumed and ("big", "https://api.openai.com/v1") in listed.asked
    with pytest.raises(ConfigError, match="--max-cost needs a price"):
        budget_of(config, 5.0, None)
    own = at_endpoint(prices={"input": 1.0, "output": 1.0, "source": "our contract"})
    assert any("our contract" in line for line in planned(own, rates(models={})).assumed)  # the user's go before
    assert by_name(planned(at_endpoint("unheard-of"), rates(models={})).stages)["judge"].money is None


def test_the_real_list_has_a_price_of_a_well_known_model() -> None:
    pytest.importorskip("genai_prices", reason="genai-prices is not installed: pip install -e '.[prices]'")
    prices = listed_prices(at_endpoint("gpt-4o-2024-05-13").models["judge"])
    assert prices is not None and (prices.input, prices.output) == (5.0, 15.0)


def test_prompts_of_judges_show_replies_of_the_expected_length() -> None:
    """Without reply_tokens a reply costs at most max_tokens; prompts that show it are not planned from that length."""
    short, unknown, long = (
        by_name(planned(pocket(), rates(reply_tokens=lengths)).stages)
        for lengths in ({"tokens": {"candidates": 24}, **SAID}, None, {"tokens": {"candidates": 48}, **SAID})
    )
    most = 48  # max_tokens of candidates
    assert unknown["candidates"].completion_tokens == unknown["candidates"].calls * most
    assert unknown["judge"].prompt_tokens == pytest.approx(short["judge"].prompt_tokens, rel=0.01)
    assert unknown["judge"].prompt_tokens < long["judge"].prompt_tokens


def test_rates_without_a_source_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text("device_hour: {price: 2}")
    with pytest.raises(ConfigError, match=r"rates\.yaml: device_hour\.source.*source and a date"):
        read_rates(str(file))
    file.write_text("device_hour: {price: 2, source: contract, date: 2026-01-02, prise: 1}")
    with pytest.raises(ConfigError, match="prise"):
        read_rates(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rates(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"unknown model models\.jugde; choose from"):
        planned(pocket(), Rates.model_validate({"models": {"jugde": rates().models["judge"].model_dump()}}))
    assert given_price(2, "USD").source == "given by the user"


def test_the_command_counts_with_the_real_tokenizer_and_keeps_the_plan(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["plan", "dmapo", "-c", "tests/one_judge.yaml", "--run-dir", str(run), "prompts.sources.0.count=40"]
    done = CliRunner().invoke(app, [*arguments, "--device-hour", "2"])
    assert done.exit_code == 0 and "given by the user" in done.output, done.output
    stages = json.loads((run / "plan.json").read_text())["stages"]
    assert stages[0]["stage"] == "candidates" and stages[0]["calls"] == 160 and stages[0]["prompt_tokens"] > 500
    assert CliRunner().invoke(app, ["plan", "winrate", "-c", "tests/one_judge.yaml"]).exit_code == 2


def test_a_plan_without_a_local_model_counts_with_the_named_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", "sk-0123456789abcdef0123")
    model = {
        "engine": "openai",
        "model": "m",
        "endpoint": {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "LOOPBACK_KEY"},
    }
    values = yaml.safe_load(Path("tests/one_judge.yaml").read_text()) | {
        "models": {"policy": model, "judge": {**model, "model": "j"}}
    }
    values["prompts"]["sources"][0]["count"] = 20

    def notes(*overrides: str) -> tuple[list[str], float]:
        config = read_config(DmapoConfig, values, ["train=null", *overrides])
        found = plan(config, find_workflow("dmapo").wire(config, "run"), Rates())
        return found.notes, found.stages[0].prompt_tokens

    estimated, by_characters = notes()
    assert any("counted as a quarter of their characters" in note for note in estimated)
    counted, by_tokens = notes("tokenizer=pocket:judge")
    assert any("counted with the tokenizer of " in note and note.endswith("judge") for note in counted)
    assert by_tokens != by_characters
    # Keys of a policy that there is not are named; those that other pages read are not.
    (idle,) = [note for note in counted if "no effect" in note]
    assert idle.startswith("no effect where train is null") and "evaluate.asking, evaluate.modes" in idle
    values["evaluate"] = {"seed": 1}
    assert not any("no effect" in note for note in notes()[0])


# --- limits -----------------------------------------------------------------------------------------------------------


def session(name: str, device_seconds: float, cost: float = 0.0, seconds: float = 0.0) -> dict[str, Any]:
    return {"name": name, "device_seconds": device_seconds, "cost": cost, "seconds": seconds}


def test_a_limit_holds_over_sessions(tmp_path: Path) -> None:
    folder, budget = Folder(str(tmp_path)), Budget(max_cost=3.0, device_hour=2.0, workers={"train": 4})
    first = Spending(folder, budget)
    assert first.look([session("judge", 1800, cost=0.5)]) is None  # 1 + 0.5
    assert first.look([session("judge", 2700, cost=0.5)], write=True) is None  # 1.5 + 0.5
    second = Spending(folder, budget)
    assert second.money == pytest.approx(2.0) and second.over() is None
    assert second.look([session("critic", 900)]) is None  # 2.5
    reason = second.look([session("critic", 900), session("train", 0, seconds=225)], write=True)  # 4 workers: 3.0
    assert reason is not None and "cost 3 USD (1.25 device hours), and --max-cost is 3" in reason
    assert Spending(folder, Budget(3.5, 2.0)).over() is None and Spending(folder, budget).over() is not None
    (tmp_path / "spent.json").write_text("[")
    assert Spending(folder, budget).money == 0


def test_a_limit_needs_a_price() -> None:
    with pytest.raises(ConfigError, match="--max-cost needs a price"):
        budget_of(pocket(), 5.0, None)
    with pytest.raises(ConfigError, match="negative"):
        budget_of(pocket(), -1.0, 1.0)
    assert budget_of(pocket(), None, None).max_cost is None


def test_the_rates_of_the_cluster_guide_plan_every_stage_of_the_published_run() -> None:
    values = yaml.safe_load(Path("configs/dmapo.yaml").read_text())
    values["prompts"]["sources"] = [{"type": "pocket", "count": 60, "seed": 0}]  # without the hub
    for key in values["models"]:
        values["models"][key]["model"] = f"pocket:{key}"
    config = read_config(DmapoConfig, values, [])
    for gpu in ("8xa100", "8xh100"):
        found = planned(config, read_rates(f"cluster/rates/{gpu}.yaml"))
        assert found.stages[-1].stage == "train" and all(stage.money for stage in found.stages)
        assert not any(stage.bound for stage in found.stages) and not found.notes
        assert found.disk.startswith("policies of 2 MB (train.save)")  # 722,176 weights in bfloat16, and the adapter
        assert f"disk: {found.disk}" in plan_lines(found)


# --- probes -----------------------------------------------------------------------------------------------------------


def test_what_receipts_say_becomes_rates(tmp_path: Path) -> None:
    folder = plant(tmp_path / "run")
    run = read_run(str(folder))
    receipts = Path(run.results["judge"].folder) / "_receipts"
    for shard, (calls, tokens, busy, start) in enumerate(
        [(10, 50, 1.0, 0.0), (30, 70, 9.0, 5.0), (0, 0, 0, 0), (10, 30, 3, 0)]
    ):
        file = receipts / f"shard-{shard:05d}.json"
        usage = {"calls_engine": calls, "completion_tokens": tokens, "device_seconds": busy, "start_seconds": start}
        file.write_text(json.dumps({**json.loads(file.read_text()), "usage": usage}))
    results = {"judge": run.results["judge"], "gate": run.results["gate"]}
    found = measured(results, Rates(), "a probe")
    took = found.stages["judge"]
    assert took.seconds_per_call == pytest.approx(8 / 50) and took.low < 8 / 50 < took.high
    assert found.reply_tokens is not None and found.reply_tokens.tokens == {"judge": 3.0}
    counts = run.results["gate"].facts["counts"]
    assert found.kept_share is not None and found.kept_share.source == "a probe"
    assert found.kept_share.share == (counts["desirable"] + counts["undesirable"]) / 160
    priced = by_name(planned(pocket(), found).stages)
    for name in ("judge", "comparisons", "score-responses"):
        assert priced[name].device_seconds == pytest.approx(priced[name].calls * 8 / 50)
    assert priced["candidates"].device_seconds is None
    for file in receipts.glob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "usage": {}}))
    with pytest.raises(StageStop, match="in the call log already"):
        measured(results, Rates(), "a probe")


# --- other workflows --------------------------------------------------------------------------------------------------


def planned_calls(workflow: str, file: str, *overrides: str) -> dict[str, int]:
    values = yaml.safe_load(Path(f"configs/{file}.yaml").read_text())
    config = read_config(find_workflow(workflow).config, values, list(overrides))
    return {stage.stage: stage.calls for stage in planned(config, Rates(), workflow).stages}


def test_a_feedback_loop_is_planned_to_its_last_response() -> None:
    calls = planned_calls("fellowship", "pocket_fellowship", "prompts.sources.0.count=20", "prompts.val_fraction=0.2")
    n = calls["generate-1"]
    loop = ("generate-1", "review-1", "generate-2", "review-2", "generate-3")
    assert n > 0 and [calls[name] for name in loop] == [n] * 5
    # Three rubrics on three responses; the first responses of the branches are those of the loop.
    assert calls["judge"] == 9 * n and calls["improve-generate"] == 0
    assert (calls["improve-review"], calls["improve-revise"]) == (2 * n, 4 * n)


def test_a_comparison_of_methods_answers_once_for_every_policy() -> None:
    calls = planned_calls(
        "baselines", "pocket_baselines", "prompts.sources.0.count=20", "baselines.seeds=[0]", "baselines.methods=[kto]"
    )
    panel = {calls[f"judge-{name}"] for name in ("helpfulness", "factuality", "conciseness")}
    assert panel == {calls["candidates"]} == {calls["critic"]} != {0}
    answers = [n for name, n in calls.items() if name.startswith("responses-")]
    assert len(answers) == 1 + 2 and len(set(answers)) == 1
    assert calls["score-responses-factuality"] == sum(answers)


def test_live_judges_and_debates_are_planned_from_the_items() -> None:
    calls = planned_calls("agreement", "pocket_agreement", "data.limit=10")
    assert calls and all(n > 0 and n % 10 == 0 for n in calls.values())


def test_win_rates_are_planned_from_the_prompts() -> None:
    calls = planned_calls("winrate", "pocket_winrate")
    n = calls["policy-generate-1"]
    assert calls["generator-generate-1"] == n and calls["versus"] % n == 0 and calls["versus"] > 0


def test_benchmarks_are_planned_from_their_questions() -> None:
    calls = planned_calls("benchmarks", "pocket_benchmarks", "benchmarks.ifeval=null")
    assert calls and all(calls.values())


def test_a_sample_stands_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(pocket(), rates()).stages
    monkeypatch.setattr(estimate, "_SAMPLE", 10)
    assert [(s.stage, s.calls) for s in planned(pocket(), rates()).stages] == [(s.stage, s.calls) for s in whole]
    for sampled, exact in zip(planned(pocket(), rates()).stages, whole, strict=True):
        assert sampled.prompt_tokens == pytest.approx(exact.prompt_tokens, rel=0.05)
