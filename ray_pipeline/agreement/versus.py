"""Live win rates: generators with and without reviewers answer the same prompts, and a judge compares every
configuration's answer with every baseline's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.ranking import rank
from ray_pipeline.agents.strategies import (
    Orders,
    Strategy,
    StrategyAsking,
    StrategyTemplates,
    decide,
    load_strategy_templates,
    shown_orders,
)
from ray_pipeline.agents.templates import Layout, LayoutKey, transcript
from ray_pipeline.agreement.ask import ballot_of, judged, skipped_ballot
from ray_pipeline.config.settings import Name, Settings, refuse_repeated
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.feedback.loop import LoopRules, LoopSettings, ReviewerSettings, feedback_stages
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by, reply_status
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.stage import Stage, StageResult
from ray_pipeline.stats.protocol import Protocol, settings_text, win_rate_by
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import BALLOTS, ITEMS, cut_off

#: Which response of a loop is compared.
Answer = Literal["picked", "last"]

#: Between the two names of a run, as recorded files have it.
AGAINST = "-vs-"


class Configuration(Settings):
    """A generator, alone or with reviewers; its answer is the last response of their feedback loop."""

    name: Name = Field(description="name in the tables")
    generator: str = Field(description="a key of `models`")
    reviewers: tuple[ReviewerSettings, ...] = ()

    @property
    def models(self) -> list[str]:
        return [self.generator, *(reviewer.model for reviewer in self.reviewers)]


class VersusJudge(Settings):
    """The judge that compares two answers, and picks among those of a loop. The defaults are the published ones."""

    model: str = Field("judge", description="a key of `models`")
    kind: Literal["combined", "direct", "independent"] = Field(
        "combined", description="combined or independent scores of both answers, or a direct choice"
    )
    high: int = Field(10, ge=1, description="highest score; a direct choice has none")
    rubric: str | None = Field(None, description="aspect to judge; default: the template file's")
    orders: Orders = Field("both", description="orders in which the answers are shown")
    templates: str = Field("default", description="built-in name or YAML file of the judge's texts")
    layout: LayoutKey = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @property
    def strategy(self) -> Strategy:
        orders = "given" if self.kind == "independent" else self.orders  # it shows one answer at a time
        scale = {} if self.kind == "direct" else {"high": self.high}
        return Strategy.model_validate({"kind": self.kind, "orders": orders, "rubric": self.rubric, **scale})

    def texts(self) -> StrategyTemplates:
        return load_strategy_templates(self.templates)


class LiveWinrate(Settings):
    """The `live` block of a win-rate run."""

    prompts: PromptsConfig = Field(description="where prompts come from")
    pair: tuple[str, str] | None = Field(
        None,
        description="keys of two models for the eight published configurations: each alone, reviewed by "
        "itself, by the other, and by both",
    )
    configurations: tuple[Configuration, ...] = Field((), description="instead of a pair")
    baselines: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="keys of the models whose single answers are the baselines; default: every generator",
    )
    loop: LoopRules = Field(LoopRules(), description="rules of the feedback loop")
    judge: VersusJudge = Field(VersusJudge(), description="the judge that compares")
    answer: Answer = Field(
        "picked", description="which response of a loop is compared: the one that the judge picks, or the last"
    )

    @model_validator(mode="after")
    def _consistent(self) -> LiveWinrate:
        if (self.pair is None) == (not self.configurations):
            raise ValueError("set either pair (two models, for the eight published configurations) or configurations")
        if self.pair is not None and self.pair[0] == self.pair[1]:
            raise ValueError(f"pair names {self.pair[0]} twice; the eight configurations need two models")
        if "val_fraction" in self.prompts.model_fields_set:
            raise ValueError("prompts.val_fraction has no effect: every prompt is answered; remove it")
        refuse_repeated(self.against, "baselines")
        names = [configuration.name for configuration in self.compared]
        refuse_repeated(names, "configurations")
        if cut := sorted(name for name in [*names, *self.against] if AGAINST in name):
            raise ValueError(f"{cut[0]}: a name cannot contain {AGAINST}, which separates the names of a run")
        for configuration in self.compared:
            if configuration.reviewers:
                self.loop_of(configuration)  # raises for invalid reviewers
        if any(c.reviewers for c in self.compared) and self.loop.responses < 2:
            raise ValueError("loop.responses is 1, so no response would be reviewed; set it to 2 or more")
        if not self.runs:
            raise ValueError("every configuration is its only baseline, so there is nothing to compare")
        return self

    @property
    def compared(self) -> tuple[Configuration, ...]:
        return self.configurations if self.pair is None else eight(*self.pair)

    @property
    def against(self) -> tuple[str, ...]:
        """Keys of the models whose single answers are the baselines."""
        return self.baselines or tuple(dict.fromkeys(c.generator for c in self.compared))

    @property
    def runs(self) -> list[tuple[Configuration, str]]:
        """Configurations with their baselines. A model alone is not compared with itself."""
        return [(c, b) for c in self.compared for b in self.against if c.reviewers or c.generator != b]

    @property
    def models(self) -> list[str]:
        """Keys of all models that take part."""
        answering = [model for configuration in self.compared for model in configuration.models]
        return list(dict.fromkeys([*answering, *self.against, self.judge.model]))

    @property
    def label(self) -> str:
        """Name of the prompts on the page."""
        names = [getattr(s, "name", None) or getattr(s, "path", None) or s.type for s in self.prompts.sources]
        return ", ".join(dict.fromkeys(str(name) for name in names))

    def protocol(self, models: Mapping[str, ModelSettings]) -> Protocol:
        """How the verdicts are requested. Raises ModelNotFound."""
        judge, model = self.judge, models[self.judge.model]
        texts, strategy = judge.texts(), judge.strategy
        template = texts.of(strategy).model_dump(mode="json")
        return win_rate_by(
            model.weights(),
            model.semantics(),
            {**judge.sampling.model_dump(), **judge.asking.model_dump()},
            judge_prompts=digest([template, judge.layout, judge.rubric or texts.rubric]),
            reading="forced form" if judge.asking.grammar else f"{judge.asking.form}, anchored",
            answers=settings_text(
                responses=self.loop.responses,
                **self.loop.sampling.model_dump(),
                **({"answer": self.answer} if self.answer != "last" else {}),
            ),
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


class _Versus(Settings):
    runs: tuple[tuple[str, str], ...]
    strategy: Strategy
    templates: StrategyTemplates
    layout: Layout
    sampling: SamplingSettings
    asking: StrategyAsking
    answer: Answer = "last"


def versus_stages(
    settings: LiveWinrate, models: Mapping[str, ModelSettings], prompts: Stage
) -> tuple[list[Stage], Stage]:
    """The stages that answer, and the one whose tables `items` and `ballots` hold every comparison."""
    answering: list[Stage] = []
    alone: dict[str, Stage] = {}
    for key in dict.fromkeys([*(c.generator for c in settings.compared), *settings.against]):
        once = LoopSettings(**{**dict(settings.loop), "responses": 1}, generator=key)
        _, (alone[key],), _ = feedback_stages(once, models, prompts, prefix=f"{key}-")
        answering.append(alone[key])
    answers = {f"configuration/{c.name}": alone[c.generator] for c in settings.compared if not c.reviewers}
    for c in settings.compared:
        if c.reviewers:
            joined, stages, reviews = feedback_stages(
                settings.loop_of(c), models, prompts, prefix=f"{c.name}-", first=alone[c.generator]
            )
            answering += [*stages[1:], *reviews, joined]
            answers[f"configuration/{c.name}"] = joined
    answers |= {f"baseline/{key}": alone[key] for key in settings.against}
    judge = settings.judge
    given = _Versus.part_of(
        judge,
        runs=tuple((c.name, b) for c, b in settings.runs),
        strategy=judge.strategy,
        templates=judge.texts(),
        answer=settings.answer,
    )
    return answering, VERSUS.stage("versus", given, models[judge.model], {"prompts": prompts, **answers})


class _Prompt(NamedTuple):
    """A prompt and its responses by input role, first to last; failed ones are left out."""

    prompt_id: str
    messages: list[Message]
    answers: dict[str, list[str]]


def _prompts(shard: ShardTables, settings: _Versus) -> list[_Prompt]:
    answers = {role: responses(table) for role, table in shard.tables.items() if role != "prompts"}
    return [
        _Prompt(prompt, messages, {role: texts.get(prompt, []) for role, texts in answers.items()})
        for prompt, messages in shard.messages().items()
    ]


async def _versus(engine: ChatEngine, settings: _Versus, item: _Prompt) -> Outcome:
    """The item and its ballots, ordered by run and order."""
    names = list(dict.fromkeys(own for own, _ in settings.runs))
    chosen = await all_of(_choose(engine, settings, item, f"configuration/{own}") for own in names)
    answers = {own: answer for own, (answer, _) in zip(names, chosen, strict=True)}
    compared = await all_of(_compare(engine, settings, item, own, base, answers[own]) for own, base in settings.runs)
    return Outcome(
        {"items": [_item(item)], "ballots": [row for rows, _ in compared for row in rows]},
        [reply for _, replies in (*chosen, *compared) for reply in replies],
    )


async def _choose(
    engine: ChatEngine, settings: _Versus, item: _Prompt, role: str
) -> tuple[str | None, list[tuple[str, bool]]]:
    """The response of a loop that is compared, and the judge's replies. Of several with the highest score it is the
    first; None where there is none, or where the judge's scores could not be read."""
    texts = item.answers[role]
    if not texts or settings.answer == "last":
        return (texts[-1] if texts else None), []
    ranking = await rank(
        engine, item.messages, texts, settings.strategy, settings.templates, settings.sampling, settings.asking,
        settings.layout,
    )  # fmt: skip
    replies = reply_status("the judge", ranking.parse_status)
    if ranking.scores is None:
        return (texts[0] if ranking.parse_status == "skipped" else None), replies
    return texts[ranking.scores.index(max(ranking.scores))], replies


async def _compare(
    engine: ChatEngine, settings: _Versus, item: _Prompt, own: str, baseline: str, one: str | None
) -> tuple[list[Row], list[tuple[str, bool]]]:
    """Ballots of one run on one prompt, and the judge's replies."""
    run, orders = f"{own}{AGAINST}{baseline}", shown_orders(settings.strategy.orders, 2)
    ids = {"item_id": item.prompt_id, "prompt_id": item.prompt_id, "strategy": "versus", "judge": run, "voice": ""}
    other = next(iter(item.answers[f"baseline/{baseline}"][-1:]), None)
    if one is None or other is None:
        return [{**ids, **skipped_ballot(order)} for order in orders], []
    if one == other:
        return [{**ids, **_tie(order)} for order in orders], []
    judgement = await decide(
        engine,
        item.messages,
        (one, other),
        settings.strategy,
        settings.templates,
        settings.sampling,
        settings.asking,
        settings.layout,
    )
    return [{**ids, **ballot_of(look)} for look in judgement.looks], judged("the judge", judgement)


VERSUS = Asking(
    tables={"items": ITEMS, "ballots": BALLOTS},
    items=_prompts,
    ask=_versus,
    role="versus",
    counts=count_by("ballots", "parse_status"),
    version=2,  # 2: responses that were cut off are compared only where there is no other
)


def responses(candidates: pa.Table) -> dict[str, list[str]]:
    """By prompt_id, the responses of its loop, first to last; a failed revision leaves those before it, and one that
    was cut off is left out unless all were."""
    found: dict[str, dict[bool, list[str]]] = {}
    rows = candidates.select(["prompt_id", "k", "response"]).to_pylist()
    cut = cut_off(candidates["finish_reason"]).to_pylist()
    for row, is_cut in sorted(zip(rows, cut, strict=True), key=lambda pair: pair[0]["k"]):
        if row["response"] is not None:
            found.setdefault(row["prompt_id"], {False: [], True: []})[is_cut].append(row["response"])
    return {prompt: texts[False] or texts[True] for prompt, texts in found.items()}


def cut_responses(results: Iterable[StageResult]) -> int | None:
    """How many of the responses behind a page were cut off; None if there are none."""
    ended: dict[str, bool] = {}
    for table in (result.table("candidates").read_all() for result in results if "candidates" in result.tables):
        ended.update(zip(table["candidate_id"].to_pylist(), cut_off(table["finish_reason"]).to_pylist(), strict=True))
    return sum(ended.values()) if ended else None


def _tie(order: tuple[int, ...]) -> Row:
    """Equal answers need no judge."""
    return {**skipped_ballot(order), "vote": "tie", "parse_status": "ok"}


def _item(prompt: _Prompt) -> Row:
    """Answers differ from run to run, so an item holds none."""
    nothing = dict.fromkeys(("response_a", "response_b", "model_a", "model_b", "human_label"))
    ids = {"item_id": prompt.prompt_id, "prompt_id": prompt.prompt_id}
    return {**ids, "question": transcript(prompt.messages), **nothing, "human_votes": []}
