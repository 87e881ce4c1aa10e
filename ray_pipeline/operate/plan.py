"""What a run would cost: calls and tokens from the real prompts, time and money from rates that have a source.

Prompt tokens are counted with the models' own tokenizers on the prompts of the configuration, through the same
templates as in the run. Replies cannot be known before: their mean length comes from a probe, from the user, or is the
stage's max_tokens, which is an upper bound and called so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ray_pipeline.agents.templates import ANY_FENCE, RoleTemplate, render, transcript
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.prompts import load_prompts
from ray_pipeline.data.tokens import TokenCounter
from ray_pipeline.engines.base import Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.progress import duration
from ray_pipeline.operate.prices import DevicePrice, Rates

#: Prompts whose tokens are counted; more change a mean by less than rates are off.
_SAMPLE = 1000

Count = Callable[[Sequence[Message]], int]


@dataclasses.dataclass
class StagePlan:
    """One line of a plan. Times in seconds; `low` and `high` bound `device_seconds`; money in the plan's currency.

    `bound` says that completion tokens are an upper bound. None: no rate or price was given for it.
    """

    stage: str
    model: str
    calls: int
    prompt_tokens: float
    completion_tokens: float
    bound: bool = False
    devices: float = 1.0
    device_seconds: float | None = None
    low: float | None = None
    high: float | None = None
    money: float | None = None

    @property
    def wall_seconds(self) -> float | None:
        return None if self.device_seconds is None else self.device_seconds / self.devices


@dataclasses.dataclass
class Plan:
    """Stages in order, where rates come from, and what could not be planned."""

    stages: list[StagePlan]
    currency: str
    assumed: list[str]
    notes: list[str]

    def total(self, field: str) -> float | None:
        """Sum over stages, or None where one is not known."""
        values = [getattr(stage, field) for stage in self.stages]
        return None if any(value is None for value in values) else sum(values)

    def plain(self) -> dict[str, Any]:
        """What plan.json holds and the report compares with."""
        return dataclasses.asdict(self)


def plan(config: Any, rates: Rates, count: Callable[[str, ModelSettings], Count] | None = None) -> Plan:
    """Plan a DMAPO run.

    Args:
        count: (key of `models`, its settings) → a counter of tokens; default: its own tokenizer.

    Raises:
        ConfigError: rates of a model that the configuration has not.
        InputError: the prompts cannot be read.
    """
    strangers = sorted(set(rates.models) - set(config.models))
    if strangers:
        raise ConfigError(f"rates: models.{strangers[0]} is no key of models; there are {', '.join(config.models)}")
    notes: list[str] = []
    stages = work(config, rates, count or _tokenizer_of(config, notes), notes)
    currency = rates.device_hour.currency if rates.device_hour else "USD"
    assumed = []
    for key in dict.fromkeys(stage.model for stage in stages):
        if key in rates.models:
            of = rates.models[key]
            assumed.append(
                f"{key}: {of.prompt_tokens_per_s:g} prompt and {of.completion_tokens_per_s:g} completion tokens/s "
                f"a device ± {of.spread:.0%}; {of.source}, {of.date}"
            )
    for name, took in rates.stages.items():
        assumed.append(
            f"{name}: {1000 * took.seconds_per_call:.3g} device ms a call ({1000 * took.low:.3g} to "
            f"{1000 * took.high:.3g}); {took.source}, {took.date}"
        )
    for stage in stages:
        _price(stage, config, rates)
    if rates.reply_tokens is not None:
        told = ", ".join(f"{name} {tokens:g}" for name, tokens in rates.reply_tokens.tokens.items())
        assumed.append(f"tokens of a reply: {told}; {rates.reply_tokens.source}, {rates.reply_tokens.date}")
    train = _training(config, rates, stages, notes)
    if train is not None:
        stages.append(train)
        assert rates.train is not None and rates.kept_share is not None
        kept = rates.kept_share
        assumed.append(f"kept share of candidates: {kept.share:.1%}; {kept.source}, {kept.date}")
        assumed.append(
            f"train: {rates.train.tokens_per_s:g} tokens/s a worker; {rates.train.source}, {rates.train.date}"
        )
    if rates.device_hour:
        price = rates.device_hour
        assumed.append(f"a device hour: {price.price:g} {price.currency}; {price.source}, {price.date}")
    for key, model in config.models.items():
        if model.endpoint is not None and model.endpoint.prices is not None:
            prices = model.endpoint.prices
            source = prices.source or "no source given"
            assumed.append(
                f"{key}: {prices.input:g} and {prices.output:g} {prices.currency} a million tokens; {source}"
            )
            currency = prices.currency
    unrated = sorted({s.model for s in stages if s.device_seconds is None and config.models[s.model].is_here})
    if unrated:
        notes.append(f"no rates for {', '.join(unrated)}: no time and no money; give --rates, or --probe the engine")
    return Plan(stages, currency, assumed, notes)


# --- work -------------------------------------------------------------------------------------------------------------


def work(config: Any, rates: Rates, count: Callable[[str, ModelSettings], Count], notes: list[str]) -> list[StagePlan]:
    """Calls and tokens by stage; retries of unreadable replies are not in it."""
    table = load_prompts(config.prompts).table
    n, held_out = table.num_rows, table["split"].to_pylist().count("val")
    sample: list[list[Message]] = table["messages"].slice(0, _SAMPLE).to_pylist()  # by id, a hash: a fair sample
    texts, base = config.templates(), config.train.model
    policy, judge = config.candidates.model, config.evaluate.judge

    known = {} if rates.reply_tokens is None else rates.reply_tokens.tokens

    def reply(stage: str, most: int) -> tuple[float, bool]:
        for name in (stage, _LIKE.get(stage.split("-")[0], "")):
            if name in known:
                return min(known[name], float(most)), False
        return float(most), True

    def mean(model: str, chats: Sequence[Sequence[Message]]) -> float:
        counter = count(model, config.models[model])
        return sum(counter(chat) for chat in chats) / max(len(chats), 1)

    def asked(model: str, template: RoleTemplate, layout: Any, **variables: Any) -> float:
        """Mean tokens of a question around empty answers."""
        variables["fence"] = ANY_FENCE
        return mean(model, [render(template, layout, instruction=transcript(m), **variables) for m in sample])

    def line(stage: str, model: str, calls: int, prompt: float, tokens: float, bound: bool) -> StagePlan:
        return StagePlan(stage, model, calls, calls * prompt, calls * tokens, bound, _devices(config.models[model]))

    answer, bound = reply("candidates", config.candidates.sampling.max_tokens)
    k = config.candidates.k
    stages = [line("candidates", policy, n * k, mean(policy, sample), answer, bound)]
    layout = "shared_first" if config.judge.layout == "auto" else config.judge.layout
    many = len(config.judge.models) > 1

    def judged(name: str, answers: int, length: float, unsure: bool) -> None:
        for key in config.judge.models:
            own = 0.0
            for r in config.judge.on_model(key):
                own += asked(key, texts.judge, layout, response="", name=r.name, rubric=r.text, low=r.low, high=r.high)
            rubrics = len(config.judge.on_model(key))
            tokens, most = reply("judge", config.judge.sampling.max_tokens)
            stage = f"{name}-{key}" if many else name
            stages.append(line(stage, key, answers * rubrics, own / rubrics + length, tokens, most or unsure))

    judged("judge", n * k, answer, bound)
    if config.gate.use_critic:
        tokens, most = reply("critic", config.critic.sampling.max_tokens)
        prompt = asked(config.critic.model, texts.critic, config.critic.layout, response="") + answer
        stages.append(line("critic", config.critic.model, n * k, prompt, tokens, most or bound))
    if held_out and not config.evaluate.skip_generation:
        modes = config.evaluate.modes
        lengths = [reply(f"responses-{m.name}", m.sampling.max_tokens) for m in modes]
        length, unsure = sum(x for x, _ in lengths) / len(modes), any(u for _, u in lengths)
        for label in ("base", "policy"):
            stages.append(line(f"responses-{label}", base, held_out * len(modes), mean(base, sample), length, unsure))
        tokens, most = reply("comparisons", config.evaluate.sampling.max_tokens)
        prompt = asked(judge, texts.pairwise, config.evaluate.layout, response_a="", response_b="") + 2 * lengths[0][0]
        stages.append(line("comparisons", judge, 2 * held_out, prompt, tokens, most or lengths[0][1]))
        judged("score-responses", 2 * held_out * len(modes), length, unsure)
    if any(stage.bound for stage in stages):
        notes.append(
            "tokens marked ≤ are upper bounds: replies as long as max_tokens allows (reply_tokens, or --probe)"
        )
    return stages


def _devices(model: ModelSettings) -> float:
    """Devices that the actors of a stage hold when all of them are there."""
    each = model.placement.num_gpus if model.placement.num_gpus else model.tensor_parallel_size
    return model.placement.max_actors * float(each)


def _tokenizer_of(config: Any, notes: list[str]) -> Callable[[str, ModelSettings], Count]:
    """Counters with the models' own tokenizers; the policy's stands in for a model at an endpoint."""
    made: dict[str, TokenCounter] = {}

    def counter(key: str, model: ModelSettings) -> Count:
        if not model.is_here:
            note = f"{key} is at an endpoint: its tokens are counted with the tokenizer of {config.train.model}"
            if note not in notes:
                notes.append(note)
            key, model = config.train.model, config.models[config.train.model]
        if key not in made:
            made[key] = TokenCounter.load(model.tokenizer)
        return lambda messages: len(made[key](messages))

    return counter


# --- time and money ---------------------------------------------------------------------------------------------------


#: Stages that a probe does not reach → the stage of the probe whose calls are like theirs.
_LIKE = {"responses": "candidates", "score": "judge", "comparisons": "judge"}


def _price(stage: StagePlan, config: Any, rates: Rates) -> None:
    model = config.models[stage.model]
    if model.endpoint is not None:
        if model.endpoint.prices is not None:
            stage.money = model.endpoint.prices.of(int(stage.prompt_tokens), 0, int(stage.completion_tokens))
        limit = model.endpoint.requests_per_minute
        stage.device_seconds = 60 * stage.calls / limit if limit else None
        stage.low = stage.high = stage.device_seconds
        stage.devices = 1.0
        return
    took = rates.stages.get(stage.stage) or rates.stages.get(_LIKE.get(stage.stage.split("-")[0], ""))
    if took is not None:
        price = rates.device_hour
        stage.device_seconds = stage.calls * took.seconds_per_call
        stage.low, stage.high = stage.calls * took.low, stage.calls * took.high
        stage.money = None if price is None else stage.device_seconds / 3600 * price.price
        return
    rate = rates.models.get(stage.model)
    if rate is None:
        return
    seconds = stage.prompt_tokens / rate.prompt_tokens_per_s + stage.completion_tokens / rate.completion_tokens_per_s
    _time(stage, seconds, rate.spread, rates.device_hour)


def _time(stage: StagePlan, seconds: float, spread: float, price: DevicePrice | None) -> None:
    stage.device_seconds, stage.low, stage.high = seconds, seconds / (1 + spread), seconds / (1 - spread)
    stage.money = None if price is None else seconds / 3600 * price.price


def _training(config: Any, rates: Rates, stages: Sequence[StagePlan], notes: list[str]) -> StagePlan | None:
    """Tokens of the kept rows over all epochs; KTO's own reference pass is part of the rate."""
    if rates.train is None or rates.kept_share is None:
        notes.append("training is not planned: rates need train.tokens_per_s and kept_share")
        return None
    drawn = stages[0]
    tokens = (drawn.prompt_tokens + drawn.completion_tokens) * rates.kept_share.share * config.train.epochs
    found = StagePlan("train", config.train.model, 0, tokens, 0.0, drawn.bound, float(config.train.num_workers))
    _time(found, tokens / rates.train.tokens_per_s, rates.train.spread, rates.device_hour)
    return found


# --- for readers ------------------------------------------------------------------------------------------------------

#: Width of a wall time with its interval: three times hours and minutes.
_WALL = 42


def plan_lines(found: Plan) -> list[str]:
    """A plan for a terminal."""
    head = f"{'stage':<18}{'model':<10}{'calls':>10}{'prompt tok.':>14}{'reply tok.':>14}{'GPU-h':>9}"
    lines = [head + f"{'wall time (interval)':>{_WALL}}{found.currency:>10}"]
    for stage in found.stages:
        lines.append(_line(stage.stage, stage.model, stage, stage.money))
    money = found.total("money")
    total = StagePlan(
        "all",
        "",
        int(found.total("calls") or 0),
        found.total("prompt_tokens") or 0,
        found.total("completion_tokens") or 0,
        device_seconds=found.total("device_seconds"),
    )
    row = _line("all, one by one", "", total, money)
    walls = [(s.wall_seconds, s.low, s.high, s.devices) for s in found.stages]
    if all(wall is not None for wall, *_ in walls):
        low, high = (sum((w[i] or 0) / w[3] for w in walls) for i in (1, 2))
        shown = f"{duration(sum(w[0] or 0 for w in walls))} ({duration(low)} to {duration(high)})"
        row = f"{row[: len(head)]}{shown:>{_WALL}}{row[len(head) + _WALL :]}"
    lines += [row, *_interval(found), ""]
    lines += [f"assumed: {text}" for text in found.assumed]
    return lines + [f"note: {text}" for text in found.notes]


def _interval(found: Plan) -> list[str]:
    """How far the total may be off, by the intervals of the rates; nothing where a stage has no time."""
    if any(stage.device_seconds is None or stage.low is None or stage.high is None for stage in found.stages):
        return []
    hours = [sum(getattr(stage, end) for stage in found.stages) / 3600 for end in ("low", "high")]
    told = f"interval: {hours[0]:.2f} to {hours[1]:.2f} GPU-hours"
    if found.total("money") is not None:
        money = [
            sum((s.money or 0) * (getattr(s, end) / s.device_seconds if s.device_seconds else 1) for s in found.stages)
            for end in ("low", "high")
        ]
        told += f", {money[0]:.2f} to {money[1]:.2f} {found.currency}"
    return [told]


def _line(name: str, model: str, stage: StagePlan, money: float | None) -> str:
    sign = "≤" if stage.bound else ""
    hours = "–" if stage.device_seconds is None else f"{stage.device_seconds / 3600:.2f}"
    wall = "–"
    if stage.wall_seconds is not None and stage.low is not None and stage.high is not None:
        low, high = stage.low / stage.devices, stage.high / stage.devices
        wall = f"{duration(stage.wall_seconds)} ({duration(low)} to {duration(high)})"
    return (
        f"{name:<18}{model:<10}{stage.calls:>10,}{stage.prompt_tokens:>14,.0f}"
        f"{sign + format(stage.completion_tokens, ',.0f'):>14}{hours:>9}{wall:>{_WALL}}"
        f"{'–' if money is None else format(money, '.2f'):>10}"
    )
