"""Configurations against baselines, live: generators with and without reviewers answer the same prompts, and a judge
compares every configuration's answer with every baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.strategies import (
    Orders,
    Strategy,
    StrategyAsking,
    StrategyTemplates,
    decide,
    load_strategy_templates,
    shown_orders,
)
from ray_pipeline.agents.templates import Layout, transcript
from ray_pipeline.agreement.ask import ballot_of, skipped_ballot
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.feedback.loop import LoopRules, LoopSettings, ReviewerSettings, feedback_stages
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage
from ray_pipeline.stats.protocol import Protocol, settings_text, win_rate_by
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table
from ray_pipeline.store.settings import Settings

#: Between the two names of a run, as recorded files have it.
AGAINST = "-vs-"


class Configuration(Settings):
    """A generator, alone or with reviewers; what it answers is the last response of their feedback loop."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    generator: str = Field(description="a key of `models`")
    reviewers: tuple[ReviewerSettings, ...] = ()

    @property
    def models(self) -> list[str]:
        return [self.generator, *(reviewer.model for reviewer in self.reviewers)]


class VersusJudge(Settings):
    """Who compares two answers, and how it is asked."""

    model: str = Field("judge", description="a key of `models`")
    rubric: str | None = Field(None, description="what it looks at; default: the template file's")
    orders: Orders = "both"
    templates: str = Field("default", description="built-in name or YAML file of what judges are asked")
    layout: Layout = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @property
    def strategy(self) -> Strategy:
        return Strategy(kind="direct", orders=self.orders, rubric=self.rubric)

    def texts(self) -> StrategyTemplates:
        return load_strategy_templates(self.templates)


class LiveWinrate(Settings):
    """The `live` block of a win-rate run.

    Attributes:
        pair: keys of two models, for the published eight configurations: each alone, reviewed by itself, by the other,
            and by both.
        configurations: instead of a pair.
        prompts: all of them are answered, so nothing is held out.
        baselines: keys of models whose single answers are compared with; default: every generator.
        loop: how configurations with reviewers answer.
    """

    prompts: PromptsConfig
    pair: tuple[str, str] | None = None
    configurations: tuple[Configuration, ...] = ()
    baselines: tuple[str, ...] | None = Field(None, min_length=1)
    loop: LoopRules = LoopRules()
    judge: VersusJudge = VersusJudge()

    @model_validator(mode="after")
    def _consistent(self) -> LiveWinrate:
        if (self.pair is None) == (not self.configurations):
            raise ValueError("name either `pair`, two models of which the eight configurations are made, or them")
        if self.pair is not None and self.pair[0] == self.pair[1]:
            raise ValueError(f"pair names {self.pair[0]} twice; the eight configurations are of two models")
        if "val_fraction" in self.prompts.model_fields_set:
            raise ValueError("prompts.val_fraction is read by nothing: every prompt is answered; remove it")
        if twice := sorted({name for name in self.against if self.against.count(name) > 1}):
            raise ValueError(f"baselines names {', '.join(twice)} twice")
        names = [configuration.name for configuration in self.compared]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two configurations are called {', '.join(twice)}")
        if cut := sorted(name for name in [*names, *self.against] if AGAINST in name):
            raise ValueError(f"{cut[0]}: {AGAINST} stands between the names of a run and cannot be in one")
        for configuration in self.compared:
            if configuration.reviewers:
                self.loop_of(configuration)  # says what reviewers cannot be
        if any(c.reviewers for c in self.compared) and self.loop.responses < 2:
            raise ValueError("loop.responses is 1, and no response but the last but one is reviewed; give it 2 or more")
        if not self.runs:
            raise ValueError("every configuration is its only baseline, so there is nothing to compare")
        return self

    @property
    def compared(self) -> tuple[Configuration, ...]:
        return self.configurations if self.pair is None else eight(*self.pair)

    @property
    def against(self) -> tuple[str, ...]:
        """Keys of the models that answer alone and are compared with."""
        return self.baselines or tuple(dict.fromkeys(c.generator for c in self.compared))

    @property
    def runs(self) -> list[tuple[Configuration, str]]:
        """What is compared with what. A model alone is not compared with itself."""
        return [(c, b) for c in self.compared for b in self.against if c.reviewers or c.generator != b]

    @property
    def models(self) -> list[str]:
        """Keys of all models that take part."""
        answering = [model for configuration in self.compared for model in configuration.models]
        return list(dict.fromkeys([*answering, *self.against, self.judge.model]))

    @property
    def label(self) -> str:
        """How the page calls the prompts."""
        names = [getattr(s, "name", None) or getattr(s, "path", None) or s.type for s in self.prompts.sources]
        return ", ".join(dict.fromkeys(str(name) for name in names))

    def protocol(self, models: Mapping[str, ModelSettings]) -> Protocol:
        """How the verdicts are asked for. Raises ModelNotFound."""
        judge, model = self.judge, models[self.judge.model]
        texts, strategy = judge.texts(), judge.strategy
        template = texts.of(strategy).model_dump(mode="json")
        return win_rate_by(
            model.weights(),
            model.semantics(),
            {**judge.sampling.model_dump(), **judge.asking.model_dump()},
            judge_prompts=digest([template, judge.layout, judge.rubric or texts.rubric]),
            reading="forced form" if judge.asking.grammar else f"{judge.asking.form}, anchored",
            answers=settings_text(responses=self.loop.responses, **self.loop.sampling.model_dump()),
        )

    def loop_of(self, configuration: Configuration) -> LoopSettings:
        return LoopSettings(**dict(self.loop), generator=configuration.generator, reviewers=configuration.reviewers)


def eight(one: str, other: str) -> tuple[Configuration, ...]:
    """The published configurations of two models (Fellowship of the LLMs): alone, with the same model as reviewer, with
    the other, and with both."""
    found = []
    for own, its_other in ((one, other), (other, one)):
        same, another = (ReviewerSettings(name=f"by-{i}", model=m) for i, m in enumerate((own, its_other), 1))
        for name, reviewers in (
            (own, ()),
            (f"{own}-by-{own}", (same,)),
            (f"{own}-by-{its_other}", (another,)),
            (f"{own}-by-both", (same, another)),
        ):
            found.append(Configuration(name=name, generator=own, reviewers=reviewers))
    return tuple(found)


class _Given(Settings):
    runs: tuple[tuple[str, str], ...]
    strategy: Strategy
    templates: StrategyTemplates
    layout: Layout
    sampling: SamplingSettings
    asking: StrategyAsking


def versus_stages(
    settings: LiveWinrate, failure: FailureSettings, models: Mapping[str, ModelSettings], prompts: Stage
) -> tuple[list[Stage], Stage]:
    """The stages that answer, and the one whose tables `items` and `ballots` hold every comparison."""
    made: list[Stage] = []
    alone: dict[str, Stage] = {}
    for key in dict.fromkeys([*(c.generator for c in settings.compared), *settings.against]):
        once = LoopSettings(**{**dict(settings.loop), "responses": 1}, generator=key)
        _, (alone[key],), _ = feedback_stages(once, failure, models, prompts, prefix=f"{key}-")
        made.append(alone[key])
    answers = {f"configuration/{c.name}": alone[c.generator] for c in settings.compared if not c.reviewers}
    for c in settings.compared:
        if c.reviewers:
            joined, stages, reviews = feedback_stages(
                settings.loop_of(c), failure, models, prompts, prefix=f"{c.name}-", first=alone[c.generator]
            )
            made += [*stages[1:], *reviews, joined]
            answers[f"configuration/{c.name}"] = joined
    answers |= {f"baseline/{key}": alone[key] for key in settings.against}
    judge = settings.judge
    given = _Given(
        runs=tuple((c.name, b) for c, b in settings.runs),
        strategy=judge.strategy,
        templates=judge.texts(),
        layout=judge.layout,
        sampling=judge.sampling,
        asking=judge.asking,
    )
    inputs = {"prompts": prompts, **answers}
    compared = llm_stage(
        "versus", versus_shard, ("items", "ballots"), given, models[judge.model], failure, inputs, group="versus"
    )
    return made, compared


async def versus_shard(given: ShardInput) -> ShardOutput:
    """The comparisons of one shard, ordered by prompt, run and order; an item is a prompt."""
    settings: _Given = given.settings
    prompts = given.tables["prompts"].to_pylist()
    said = {role: newest(table) for role, table in given.tables.items() if role != "prompts"}
    groups = await all_of(
        _compare(given, settings, prompt, f"{own}{AGAINST}{baseline}", said[f"configuration/{own}"],
                 said[f"baseline/{baseline}"])
        for prompt in prompts
        for own, baseline in settings.runs
    )  # fmt: skip
    counts: dict[str, int] = {}
    for row in (row for group in groups for row in group):
        counts[row["parse_status"]] = counts.get(row["parse_status"], 0) + 1
    items = [_item(prompt) for prompt in prompts]
    rows = [row for group in groups for row in group]
    return ShardOutput({"items": to_table(items, ITEMS), "ballots": to_table(rows, BALLOTS)}, counts)


def newest(candidates: pa.Table) -> dict[str, str | None]:
    """Prompt → the last response that its loop gave; a revision that failed leaves the response before it."""
    found: dict[str, tuple[int, str | None]] = {}
    for row in candidates.select(["prompt_id", "k", "response"]).to_pylist():
        k, response = found.get(row["prompt_id"], (-1, None))
        if row["response"] is not None and row["k"] > k:
            k, response = row["k"], row["response"]
        found[row["prompt_id"]] = (k, response)
    return {prompt: response for prompt, (_, response) in found.items()}


async def _compare(
    given: ShardInput,
    settings: _Given,
    prompt: Mapping[str, Any],
    run: str,
    own: Mapping[str, str | None],
    baseline: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    assert given.engine is not None
    pid = prompt["prompt_id"]
    key = {"item_id": pid, "prompt_id": pid, "strategy": "versus", "judge": run, "voice": ""}
    given.tick(1)
    answers, orders = (own.get(pid), baseline.get(pid)), shown_orders(settings.strategy.orders, 2)
    if answers[0] is None or answers[1] is None:
        return [{**key, **skipped_ballot(order)} for order in orders]
    if answers[0] == answers[1]:
        return [{**key, **_tie(order)} for order in orders]
    found = await decide(
        given.engine.bound(pid, "versus"),
        prompt["messages"],
        (answers[0], answers[1]),
        settings.strategy,
        settings.templates,
        settings.sampling,
        settings.asking,
        settings.layout,
    )
    if found.parse_status != "too_long":
        given.watch("the judge", found.read)
    return [{**key, **ballot_of(look)} for look in found.looks]


def _tie(order: tuple[int, ...]) -> dict[str, Any]:
    """Equal answers need no judge."""
    return {**skipped_ballot(order), "vote": "tie", "parse_status": "ok"}


def _item(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Its answers differ from run to run, so an item holds none."""
    nothing = dict.fromkeys(("response_a", "response_b", "model_a", "model_b", "human_label"))
    pid = prompt["prompt_id"]
    return {"item_id": pid, "prompt_id": pid, "question": transcript(prompt["messages"]), **nothing, "human_votes": []}
