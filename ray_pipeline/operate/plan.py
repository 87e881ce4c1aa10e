"""What a run would cost: calls and tokens from the real prompts, time and money from rates that have a source.

Calls and prompt tokens are those of the workflow's own stages (`operate.estimate`), counted with the models' own
tokenizers. The mean length of replies comes from a probe or from the user; otherwise the stage's max_tokens is used,
which is marked as an upper bound; prompts that show such replies are counted with their expected length.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray_pipeline.config.messages import ConfigError, installing
from ray_pipeline.data.early_exit import SLICE, ExitRule
from ray_pipeline.data.escalation import Escalation, rule_of
from ray_pipeline.data.tokens import token_counter
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.progress import duration
from ray_pipeline.graph.stage import Dag, ShardWork, Stage
from ray_pipeline.operate.check_files import bytes_text, written_weights
from ray_pipeline.operate.estimate import EXPECTED_SHARE, Count, Estimates, calls_model, estimate
from ray_pipeline.operate.prices import CallTime, DevicePrice, Rates, listed_prices
from ray_pipeline.training.spec import POLICIES
from ray_pipeline.workflow.config import RunConfig


@dataclasses.dataclass
class StagePlan:
    """One line of a plan. Times in seconds; `low` and `high` bound `device_seconds`; money in the plan's currency.

    `bound`: completion tokens are an upper bound. None where a rate or price is missing.
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
    """Stages in order, the sources of rates, notes on what could not be planned, and what training writes to disk."""

    stages: list[StagePlan]
    currency: str
    assumed: list[str]
    notes: list[str]
    disk: str = ""

    def total(self, field: str) -> float | None:
        """Sum over stages, or None if one is unknown."""
        values = [getattr(stage, field) for stage in self.stages]
        return None if any(value is None for value in values) else sum(values)

    def plain(self) -> dict[str, Any]:
        """The content of plan.json, which the report compares with."""
        return dataclasses.asdict(self)


def plan(config: RunConfig, dag: Dag, rates: Rates, count: Callable[[str, ModelSettings], Count] | None = None) -> Plan:
    """Plan a run of any workflow.

    Args:
        dag: as the configuration wires it.
        count: (key of a model, its settings) → a counter of tokens; default: its own tokenizer.

    Raises:
        ConfigError: rates of an unknown model, or unreadable prompts.
    """
    models = _models(config)
    strangers = sorted(set(rates.models) - set(models))
    if strangers:
        raise ConfigError(f"rates: unknown model models.{strangers[0]}; choose from {', '.join(models)}")
    notes = config.remarks()
    calling = [stage for stage in dag.stages if calls_model(stage)]
    keys = {stage.name: _key_of(stage, models, rates) for stage in calling}
    named = getattr(config, "counting", None)  # of a workflow with training rows
    counter = count or _tokenizer_of(models, [keys[stage.name] for stage in calling], named, notes)
    lengths = {} if rates.reply_tokens is None else rates.reply_tokens.tokens
    found = estimate(
        dag, lambda stage: counter(keys[stage.name], models[keys[stage.name]]), lambda stage: _rate_of(stage, lengths)
    )
    stages: list[StagePlan] = []
    for stage in calling:
        of, key = found.stages[stage.name], keys[stage.name]
        devices = _devices(models[key])
        planned = StagePlan(stage.name, key, round(of.calls), of.prompt_tokens, of.completion_tokens, of.bound, devices)
        _price(planned, models[key], _rate_of(stage, rates.stages), rates)
        stages.append(planned)
    if not stages:
        notes.append(f"no stage of {dag.name} calls a model in this configuration")
    if exits := [stage.name for stage in calling if isinstance(rule_of(stage), ExitRule)]:
        notes.append(f"calls of {', '.join(exits)} are upper bounds: judge.early_exit skips those that cannot matter")
    if later := [stage.name for stage in calling if isinstance(rule_of(stage), Escalation)]:
        notes.append(
            f"calls of {', '.join(later)} are upper bounds: judge.escalate asks them about candidates whose label is "
            f"open after the levels before, and about {SLICE:.0%} of all (the audit slice) in any case"
        )
    if any(stage.bound for stage in stages):
        notes.append(
            "tokens marked ≤ are upper bounds: replies of max_tokens, which later prompts show at "
            f"{EXPECTED_SHARE:.0%} of that length; set reply_tokens or use --probe for an estimate"
        )
    training = _training(dag, models, rates, found, notes)
    unrated = sorted({s.model for s in stages if s.device_seconds is None and models[s.model].is_here})
    if unrated:
        notes.append(f"no rates for {', '.join(unrated)}, so neither time nor cost; pass --rates or --probe")
    unpriced = sorted(
        {s.model for s in stages if not models[s.model].is_here and listed_prices(models[s.model]) is None}
    )
    if unpriced:
        listed = "" if importlib.util.find_spec("genai_prices") else f", or {installing('prices')} for list prices"
        notes.append(f"no prices for {', '.join(unpriced)}; set endpoint.prices of {unpriced[0]}{listed}")
    currency = rates.device_hour.currency if rates.device_hour else "USD"
    return Plan(
        [*stages, *training],
        next((prices.currency for prices in config.prices().values()), currency),
        _assumed(config, rates, [stage.model for stage in stages], bool(training)),
        notes,
        _disk(dag),
    )


def _assumed(config: RunConfig, rates: Rates, models: Sequence[str], trained: bool) -> list[str]:
    """A line for each rate and price used, with its source and date."""
    assumed = []
    for key in dict.fromkeys(models):
        if key in rates.models:
            of = rates.models[key]
            assumed.append(
                f"{key}: {of.prompt_tokens_per_s:g} prompt and {of.completion_tokens_per_s:g} completion tokens/s "
                f"per device ± {of.spread:.0%}; {of.source}, {of.date}"
            )
    for name, took in rates.stages.items():
        assumed.append(
            f"{name}: {1000 * took.seconds_per_call:.3g} device ms per call ({1000 * took.low:.3g} to "
            f"{1000 * took.high:.3g}); {took.source}, {took.date}"
        )
    if rates.reply_tokens is not None:
        means = ", ".join(f"{name} {tokens:g}" for name, tokens in rates.reply_tokens.tokens.items())
        assumed.append(f"tokens per reply: {means}; {rates.reply_tokens.source}, {rates.reply_tokens.date}")
    if trained and rates.train is not None and rates.kept_share is not None:
        kept, train = rates.kept_share, rates.train
        assumed.append(f"kept share of candidates: {kept.share:.1%}; {kept.source}, {kept.date}")
        assumed.append(f"train: {train.tokens_per_s:g} tokens/s per worker; {train.source}, {train.date}")
    if rates.device_hour:
        price = rates.device_hour
        assumed.append(f"device hour: {price.price:g} {price.currency}; {price.source}, {price.date}")
    for key, model in config.served().items():
        if (prices := listed_prices(model)) is not None:
            assumed.append(
                f"{key.split('.', 1)[1]}: {prices.input:g} and {prices.output:g} {prices.currency} per million tokens; "
                f"{prices.source or 'no source given'}"
            )
    return assumed


# --- models and rates of a stage --------------------------------------------------------------------------------------


def _models(config: RunConfig) -> dict[str, ModelSettings]:
    """Models by key, prefixed with the block where two blocks have the same key."""
    found: dict[str, ModelSettings] = {}
    for block, models in config.blocks().items():
        for key, model in models.items():
            found[f"{block}.{key}" if key in found else key] = model
    return found


def _key_of(stage: Stage, models: Mapping[str, ModelSettings], rates: Rates) -> str:
    """Key of the model that a stage calls (for a trained policy, its base); among equal models, one with rates."""
    policy, work = stage.inputs.get("train"), stage.work
    if policy is not None:
        keys = [key for key, model in models.items() if model == policy.work.settings.model]
    else:
        assert isinstance(work, ShardWork) and work.engine is not None
        keys = [key for key, model in models.items() if _same_engine(work, model)]
    if not keys:
        raise ConfigError(f"{stage.name} cannot be planned: its model is not in the configuration")
    return next((key for key in keys if key in rates.models), keys[0])


def _same_engine(work: ShardWork, model: ModelSettings) -> bool:
    made: Any = model.factory()
    given: Any = work.engine
    return model.placement == work.placement and made.args == getattr(given, "args", None)


#: Stages that a probe does not reach → stages of the probe with similar calls.
_LIKE = {"responses": ("candidates", "generate-1"), "score": ("judge",), "comparisons": ("judge",)}

T = TypeVar("T")


def _rate_of(stage: Stage, rates: Mapping[str, T]) -> T | None:
    """The rate of a stage, by its name, its group, the first word of its name, or a stage with similar calls."""
    first = stage.name.split("-")[0]
    alike = stage.name.replace("score-responses", "judge")
    alike = alike.replace(f"-{stage.round}", "", 1) if stage.round > 1 else alike
    names = (stage.name, stage.group_name, first, alike, *_LIKE.get(first, ()))
    return next((rates[name] for name in names if name in rates), None)


def _devices(model: ModelSettings) -> float:
    """Devices held by all actors of a stage together."""
    each = model.placement.num_gpus if model.placement.num_gpus else model.tensor_parallel_size
    return model.placement.max_actors * float(each)


def _tokenizer_of(
    models: Mapping[str, ModelSettings], used: Sequence[str], named: ModelSettings | None, notes: list[str]
) -> Callable[[str, ModelSettings], Count]:
    """Counters with the models' own tokenizers; for a model at an endpoint, that of a local model, or the `named` one
    that counts the lengths of training rows."""
    local = next((key for key in [*used, *models] if models[key].is_here), None)
    if local is None and named is not None:
        local, models = named.model, {named.model: named}

    def counter(key: str, model: ModelSettings) -> Count:
        if not model.is_here:
            how = "as a quarter of their characters" if local is None else f"with the tokenizer of {local}"
            note = f"{key} is at an endpoint, so its tokens are counted {how}"
            if note not in notes:
                notes.append(note)
            if local is None:
                return lambda messages: sum(len(message["content"]) for message in messages) // 4
            model = models[local]
        encode = token_counter(model.tokenizer)
        return lambda messages: len(encode(messages, None))

    return counter


# --- time and money ---------------------------------------------------------------------------------------------------


def _price(stage: StagePlan, model: ModelSettings, took: CallTime | None, rates: Rates) -> None:
    if model.endpoint is not None:
        if (prices := listed_prices(model)) is not None:
            stage.money = prices.of(int(stage.prompt_tokens), 0, int(stage.completion_tokens))
        limit = model.endpoint.requests_per_minute
        stage.device_seconds = 60 * stage.calls / limit if limit else None
        stage.low = stage.high = stage.device_seconds
        stage.devices = 1.0
        return
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


def _disk(dag: Dag) -> str:
    """What the training stages write; a part of it may be there already."""
    sizes = [written_weights(stage) for stage in dag.stages if stage.role_name in POLICIES]
    known = [size for size in sizes if size is not None]
    if not sizes:
        return ""
    size = bytes_text(sum(known)) if len(known) == len(sizes) else "an unknown size (a base is not here)"
    return f"policies of {size} (train.save), and checkpoints while they are trained"


def _training(
    dag: Dag, models: Mapping[str, ModelSettings], rates: Rates, found: Estimates, notes: list[str]
) -> list[StagePlan]:
    """Tokens of the kept rows over all epochs; KTO's own reference pass is part of the rate. A policy that is
    taken over from an equal training has none."""
    policies = [stage for stage in dag.stages if stage.role_name in POLICIES]
    if policies and (rates.train is None or rates.kept_share is None):
        notes.append("training is not planned; add train.tokens_per_s and kept_share to the rates")
    if rates.train is None or rates.kept_share is None:
        return []
    planned, trained = [], set[tuple[str, ...]]()
    for stage in policies:
        drawn = next((name for name in _ancestors(stage) if name in found.candidates), None)
        if drawn is None:
            notes.append(f"{stage.name} is not planned: its rows are imported, not made from candidates")
            continue
        settings, model = stage.work.settings.train, stage.work.settings.model
        key = next((key for key, one in models.items() if one == model), "")
        rows = stage.inputs["datasets"]
        same = (
            *(of.model_dump_json() for of in (settings, model)),
            *(of.fingerprint for of in (rows, stage.inputs.get("steps of", rows))),
        )
        share = 0.0 if same in trained else rates.kept_share.share
        trained.add(same)
        tokens = found.candidates[drawn] * share * settings.epochs
        bound = any(of.bound for name, of in found.stages.items() if name in _ancestors(stage))
        one = StagePlan(stage.name, key, 0, tokens, 0.0, bound, float(settings.num_workers))
        _time(one, tokens / rates.train.tokens_per_s, rates.train.spread, rates.device_hour)
        planned.append(one)
    return planned


def _ancestors(stage: Stage) -> list[str]:
    """Names of all stages that a stage reads, nearest first."""
    names: dict[str, None] = {}
    todo = list(stage.inputs.values())
    while todo:
        parent = todo.pop(0)
        if parent.name not in names:
            names[parent.name] = None
            todo += parent.inputs.values()
    return list(names)


# --- as text ---------------------------------------------------------------------------------------------------------

#: Width of a wall time with its interval: three times hours and minutes.
_WALL = 42


def plan_lines(found: Plan) -> list[str]:
    """A plan for a terminal."""
    wide = max([18, *(len(stage.stage) + 1 for stage in found.stages)])
    head = f"{'stage':<{wide}}{'model':<10}{'calls':>10}{'prompt tok.':>14}{'reply tok.':>14}{'GPU-h':>9}"
    lines = [head + f"{'wall time (interval)':>{_WALL}}{found.currency:>10}"]
    for stage in found.stages:
        lines.append(_line(f"{stage.stage:<{wide}}", stage, stage.money))
    money = found.total("money")
    total = StagePlan(
        "all",
        "",
        int(found.total("calls") or 0),
        found.total("prompt_tokens") or 0,
        found.total("completion_tokens") or 0,
        device_seconds=found.total("device_seconds"),
    )
    row = _line(f"{'all, one by one':<{wide}}", total, money)
    walls = [(s.wall_seconds, s.low, s.high, s.devices) for s in found.stages]
    if all(wall is not None for wall, *_ in walls):
        low, high = (sum((w[i] or 0) / w[3] for w in walls) for i in (1, 2))
        shown = f"{duration(sum(w[0] or 0 for w in walls))} ({duration(low)} to {duration(high)})"
        row = f"{row[: len(head)]}{shown:>{_WALL}}{row[len(head) + _WALL :]}"
    lines += [row, *_interval(found), ""]
    lines += [f"assumed: {text}" for text in found.assumed]
    lines += [f"disk: {found.disk}"] if found.disk else []
    return lines + [f"note: {text}" for text in found.notes]


def _interval(found: Plan) -> list[str]:
    """The interval of the total, from those of the rates; empty if a stage has no time."""
    if any(stage.device_seconds is None or stage.low is None or stage.high is None for stage in found.stages):
        return []
    hours = [sum(getattr(stage, end) for stage in found.stages) / 3600 for end in ("low", "high")]
    text = f"interval: {hours[0]:.2f} to {hours[1]:.2f} GPU-hours"
    if found.total("money") is not None:
        money = [
            sum((s.money or 0) * (getattr(s, end) / s.device_seconds if s.device_seconds else 1) for s in found.stages)
            for end in ("low", "high")
        ]
        text += f", {money[0]:.2f} to {money[1]:.2f} {found.currency}"
    return [text]


def _line(name: str, stage: StagePlan, money: float | None) -> str:
    sign = "≤" if stage.bound else ""
    hours = "–" if stage.device_seconds is None else f"{stage.device_seconds / 3600:.2f}"
    wall = "–"
    if stage.wall_seconds is not None and stage.low is not None and stage.high is not None:
        low, high = stage.low / stage.devices, stage.high / stage.devices
        wall = f"{duration(stage.wall_seconds)} ({duration(low)} to {duration(high)})"
    return (
        f"{name}{stage.model:<10}{stage.calls:>10,}{stage.prompt_tokens:>14,.0f}"
        f"{sign + format(stage.completion_tokens, ',.0f'):>14}{hours:>9}{wall:>{_WALL}}"
        f"{'–' if money is None else format(money, '.2f'):>10}"
    )
