"""Judge strategies over two or more answers: direct comparison, best of k, independent scoring, combined scoring.

A strategy shows the answers in one or both orders and returns one `Judgement`. Results are by answer, never by label,
whatever the order. A judgement with any unreadable part is unread as a whole: it has no scores and no best answer.

A strategy, its settings and its texts change together, so this file is longer than 400 lines.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import re
import string
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import JudgeReply, SamplingSettings, ask_until_read, refuse_grammar
from ray_pipeline.agents.labelled_replies import (
    Form,
    Scale,
    pick_grammar,
    pick_verdict,
    rating_verdict,
    scores_grammar,
    scores_verdict,
)
from ray_pipeline.agents.replies import Read, object_grammar
from ray_pipeline.agents.templates import (
    Layout,
    RoleTemplate,
    TemplateError,
    check_role,
    fence,
    read_template_file,
    render,
    render_text,
    transcript,
)
from ray_pipeline.agents.verdict_styles import Format
from ray_pipeline.agents.verdicts import Unread
from ray_pipeline.config.settings import Settings, Temperature
from ray_pipeline.engines.base import ChatEngine, Completion, Grammar, Message
from ray_pipeline.extensions import find, register

Orders = Literal["given", "swapped", "both"]
#: Verdict when two orders disagree. tie: the best answers of either order are tied. mean: the answer with
#: the highest mean score over the orders is best. given: the given order decides; the other one only
#: serves the flip rate.
Conflict = Literal["tie", "mean", "given"]

#: Labels under which answers are shown. In a direct comparison C means a tie, so it takes two answers.
LABELS = string.ascii_uppercase
TIE_LABEL = "C"

#: Parse statuses from the worst on; a judgement of several replies gets the worst of theirs.
WORST_FIRST = ("error", "too_long", "truncated", "unparsed", "repaired", "ok")


class Strategy(Settings):
    """One way to have a judge compare several answers."""

    kind: str = Field(description="direct, best, independent, combined, or a file that registers one (my_judge.py)")
    low: int = Field(0, description="lowest score")
    high: int = Field(10, description="highest score")
    decimals: bool = Field(False, description="whether scores may have decimals")
    orders: Orders = Field("given", description="orders in which the answers are shown")
    conflict: Conflict = Field("tie", description="verdict when the two orders disagree")
    rubric: str | None = Field(None, description="what to judge by; default: the template file's `rubric`")
    name: str = Field("", description="name in the tables; default: direct, best, KIND_HIGH, or the name of the file")

    @model_validator(mode="after")
    def _consistent(self) -> Strategy:
        form = self.form
        if form.pairwise and self.conflict == "mean":
            raise ValueError(f"kind {self.kind} has no scores to average; set conflict to tie or given")
        if not form.ordered and self.orders != "given":
            raise ValueError(f"kind {self.kind} shows one answer at a time, so orders must be given; remove orders")
        _ = self.scale
        if not self.name:
            stem = os.path.basename(self.kind).split(".py")[0]
            # Settings are frozen values; this fills in a default that depends on the others.
            object.__setattr__(self, "name", stem if not form.scored or stem != self.kind else f"{stem}_{self.high}")
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", self.name):
            raise ValueError(
                f"invalid strategy name {self.name!r}; use lower-case letters, digits, - and _, starting with a letter"
            )
        return self

    @property
    def scale(self) -> Scale:
        return Scale(low=self.low, high=self.high, decimals=self.decimals)

    @property
    def form(self) -> StrategyForm:
        """The form registered under the kind. Raises ExtensionError when there is none."""
        found = find("strategy", self.kind).value
        return found if isinstance(found, StrategyForm) else StrategyForm(found)


def shown_orders(orders: Orders, answers: int) -> list[tuple[int, ...]]:
    """The orders in which answers are shown, as answer numbers from first to last; swapped is reversed."""
    given = tuple(range(answers))
    return {"given": [given], "swapped": [given[::-1]], "both": [given, given[::-1]]}[orders]


class StrategyAsking(Settings):
    """Settings of a judging call, whatever the strategy."""

    form: Form = Field("json", description="json: one object; text: prose that ends with anchored lines")
    format: Format = Field("quorum", description="house style in which replies are read; auto: any of them")
    grammar: bool = Field(True, description="constrain the reply to its form while sampling; json only")
    reason_chars: int = Field(
        1000, ge=0, description="maximum length of the reason under a grammar, in characters; 0 for the verdict alone"
    )
    retries: int = Field(2, ge=0, description="maximum number of retries of an unreadable reply")
    retry_temperature: Temperature = Field(0.7, description="temperature of a retry")
    follow_up: bool = Field(False, description="include the unreadable reply in a retry and request the verdict again")

    @model_validator(mode="after")
    def _form(self) -> StrategyAsking:
        if self.form == "text" and self.grammar:
            raise ValueError("form text has no grammar; set grammar: false or form: json")
        refuse_grammar(self.grammar, self.format)
        return self


class StrategyTemplate(RoleTemplate):
    """The texts of one strategy. `retry` is sent after an unreadable reply when `follow_up` is on."""

    retry: str = ""


class StrategyTemplates(Settings):
    """All texts of a strategies file. `rubric` is the criterion unless a strategy has its own.

    A file may leave out a kind of strategy, which then cannot be used. A user's strategy has its own texts.
    """

    rubric: str
    direct: StrategyTemplate | None = None
    best: StrategyTemplate | None = None
    independent: StrategyTemplate | None = None
    combined: StrategyTemplate | None = None

    def of(self, strategy: Strategy) -> StrategyTemplate:
        """The texts of one of Quorum's strategies. Raises TemplateError when the file has none of its kind."""
        found: StrategyTemplate | None = getattr(self, strategy.kind)
        if found is None:
            raise TemplateError(f"strategy {strategy.name}: the template file has no block {strategy.kind}")
        return found


_ANSWERS = [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]
_COMMON = {"instruction": "x", "rubric": "x", "form": "json", "reason": True, "fence": "0"}
#: Variables available to each strategy's texts. `fence` is a word that occurs in none of the quoted texts.
STRATEGY_VARIABLES: dict[str, dict[str, Any]] = {
    "direct": {**_COMMON, "answers": _ANSWERS, "labels": ["A", "B"]},
    "best": {**_COMMON, "answers": _ANSWERS, "labels": ["A", "B"]},
    "independent": {**_COMMON, "response": "x", "low": 0, "high": 10},
    "combined": {**_COMMON, "answers": _ANSWERS, "labels": ["A", "B"], "low": 0, "high": 10},
}


def load_strategy_templates(name_or_path: str) -> StrategyTemplates:
    """Strategy texts by built-in name or from a YAML file. Raises TemplateError with file and block."""
    templates = read_template_file(name_or_path, StrategyTemplates, "strategies")
    for role, variables in STRATEGY_VARIABLES.items():
        block: StrategyTemplate | None = getattr(templates, role)
        for form in ("json", "text") if block is not None else ():
            assert block is not None
            check_role(name_or_path, role, block, {**variables, "form": form})
    return templates


@dataclasses.dataclass(frozen=True)
class Look:
    """A judge's verdict on the answers in one order.

    Attributes:
        order: numbers of the answers, from the one shown first.
        scores: by answer; None for a direct comparison and for an unread reply. Best of k gives the best answer 1 and
            the others 0.
        best: numbers of the best answers: one wins, several are tied, none when unread.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...] | None
    best: tuple[int, ...]
    reason: str | None
    parse_status: str
    raw: str | None


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A judge's verdict on several answers. `scores` and `best` are as in `Look`; `looks` hold the reasons."""

    scores: tuple[float, ...] | None
    best: tuple[int, ...]
    parse_status: str
    looks: tuple[Look, ...]

    @property
    def read(self) -> bool:
        return bool(self.best)

    @property
    def flipped(self) -> bool:
        """Whether every order has a winner, and not all the same one."""
        winners = {look.best for look in self.looks}
        return all(len(best) == 1 for best in winners) and len(winners) > 1


@dataclasses.dataclass(frozen=True)
class StrategyForm:
    """A registered strategy; a bare function is short for `StrategyForm(function)`.

    Attributes:
        look: judges the answers once, shown in the given order.
        pairwise: whether it takes two answers and picks the better one without scores.
        ordered: whether the order in which answers are shown can matter.
        scored: whether its scores are on the strategy's scale.
    """

    look: Callable[[Asker, tuple[int, ...]], Awaitable[Look]]
    pairwise: bool = False
    ordered: bool = True
    scored: bool = True


async def decide(
    engine: ChatEngine,
    prompt: Sequence[Message],
    answers: Sequence[str],
    strategy: Strategy,
    templates: StrategyTemplates,
    sampling: SamplingSettings,
    asking: StrategyAsking,
    layout: Layout = "shared_first",
) -> Judgement:
    """Judge answers to one prompt by a strategy.

    Raises:
        ValueError: fewer than two answers, more than two for a direct comparison, or more than there are labels.
    """
    form = strategy.form
    most = 2 if form.pairwise else len(LABELS)
    if not 2 <= len(answers) <= most:
        raise ValueError(f"{strategy.name} judges 2 to {most} answers, got {len(answers)}")
    asker = Asker(engine, transcript(prompt), answers, strategy, templates, sampling, asking, layout)
    orders = shown_orders(strategy.orders, len(answers))
    looks = list(await asyncio.gather(*(form.look(asker, order) for order in orders)))
    return settle(looks, strategy.conflict)


def settle(looks: Sequence[Look], conflict: Conflict) -> Judgement:
    """One judgement from all orders, by the conflict rule. Scores are means over the orders."""
    status = min((look.parse_status for look in looks), key=WORST_FIRST.index)
    if not all(look.best for look in looks):
        return Judgement(None, (), status, tuple(looks))
    scores = None
    if all(look.scores is not None for look in looks):
        columns = zip(*(look.scores for look in looks if look.scores is not None), strict=True)
        scores = tuple(sum(column) / len(looks) for column in columns)
    if conflict == "mean" and scores is not None:
        best = best_scores(scores)
    elif conflict == "given":
        best = looks[0].best
        scores = looks[0].scores
    else:
        best = tuple(sorted({answer for look in looks for answer in look.best}))
    return Judgement(scores, best, status, tuple(looks))


def best_scores(scores: Sequence[float]) -> tuple[int, ...]:
    """Numbers of the highest scores."""
    return tuple(i for i, score in enumerate(scores) if score >= max(scores) - 1e-9)


def vote(best: Sequence[int]) -> str | None:
    """A judgement of two answers as a vote: "A", "B", "tie", or None when unread."""
    return None if not best else "tie" if len(best) > 1 else LABELS[best[0]]


@dataclasses.dataclass(frozen=True)
class Asker:
    """One set of answers before one judge, with everything a strategy needs.

    Attributes:
        instruction: the prompt as text.
        answers: their texts; `order` and scores refer to them by number.
        strategy: its settings, such as `low`, `high` and `rubric`.
    """

    engine: ChatEngine
    instruction: str
    answers: Sequence[str]
    strategy: Strategy
    templates: StrategyTemplates
    sampling: SamplingSettings
    asking: StrategyAsking
    layout: Layout

    async def direct(self, order: tuple[int, ...]) -> Look:
        options = (*LABELS[:2], TIE_LABEL)
        return await self._pick(order, options, TIE_LABEL)

    async def best(self, order: tuple[int, ...]) -> Look:
        look = await self._pick(order, LABELS[: len(order)], None)
        scores = tuple(float(answer in look.best) for answer in range(len(order))) if look.best else None
        return dataclasses.replace(look, scores=scores)

    async def _pick(self, order: tuple[int, ...], options: Sequence[str], tie: str | None) -> Look:
        messages, retry = self._texts(self.templates.of(self.strategy), self._shown(order))
        reader = functools.partial(pick_verdict, options=options, tie=tie, **self._reading)
        reply = await self.ask(messages, pick_grammar(options, self.asking.reason_chars), reader, retry)
        best: tuple[int, ...] = ()
        if reply.fields is not None:
            choice = reply.fields["choice"]
            best = tuple(sorted(order)) if choice == tie else (order[LABELS.index(choice)],)
        return Look(order, None, best, reply.reason, reply.status, reply.raw)

    async def combined(self, order: tuple[int, ...]) -> Look:
        scale = self.strategy.scale
        shown = {**self._shown(order), "low": scale.low, "high": scale.high}
        template = self.templates.of(self.strategy)
        return await self.scores(order, *self._texts(template, shown))

    async def scores(self, order: tuple[int, ...], messages: list[Message], retry: str | None = None) -> Look:
        """Ask for a score of every answer under its label (A, B, … in `order`), until the reply can be read.

        Args:
            messages: the question; where grammars are off it must describe the reply's form.
            retry: user message sent after an unreadable reply; None repeats the question.
        """
        return await ask_scores(self.engine, messages, order, self.strategy.scale, self.sampling, self.asking, retry)

    async def independent(self, order: tuple[int, ...]) -> Look:
        replies = await asyncio.gather(*(self._rate(answer) for answer in self.answers))
        status = min((reply.status for reply in replies), key=WORST_FIRST.index)
        raw = "\n\n".join(reply.raw for reply in replies if reply.raw is not None) or None
        scores = [reply.fields["score"] for reply in replies if reply.fields is not None]
        if len(scores) < len(order):
            unread = [reply.unread for reply in replies if reply.unread]
            return Look(order, None, (), "\n\n".join(unread) or None, status, raw)
        reasons = [reply.reason for reply in replies if reply.reason]
        return Look(order, tuple(scores), best_scores(scores), "\n\n".join(reasons) or None, status, raw)

    async def _rate(self, answer: str) -> JudgeReply:
        scale = self.strategy.scale
        shown = {"response": answer, "low": scale.low, "high": scale.high, "fence": self._fence([answer])}
        messages, retry = self._texts(self.templates.of(self.strategy), shown)
        grammar = object_grammar(self.asking.reason_chars, score=scale.score_schema)
        return await self.ask(messages, grammar, functools.partial(rating_verdict, scale=scale, **self._reading), retry)

    @property
    def _reading(self) -> dict[str, Any]:
        return {"form": self.asking.form, "format": self.asking.format}

    def _shown(self, order: tuple[int, ...]) -> dict[str, Any]:
        labels = LABELS[: len(order)]
        answers = [{"label": label, "text": self.answers[n]} for label, n in zip(labels, order, strict=True)]
        # The fence does not depend on the order, so that both orders share a prefix.
        return {"answers": answers, "labels": list(labels), "fence": self._fence(sorted(self.answers))}

    def _fence(self, texts: Sequence[str]) -> str:
        return fence([self.instruction, list(texts)], [self.instruction, *texts])

    def _texts(self, template: StrategyTemplate, shown: dict[str, Any]) -> tuple[list[Message], str | None]:
        """The question, and the message sent after an unreadable reply if `follow_up` is on."""
        variables = {
            "instruction": self.instruction,
            "rubric": self.templates.rubric if self.strategy.rubric is None else self.strategy.rubric,
            "form": self.asking.form,
            "reason": self.asking.reason_chars > 0,
            **shown,
        }
        retry = render_text(template.retry, variables) if self.asking.follow_up else None
        return render(template, self.layout, **variables), retry

    async def ask(
        self,
        messages: list[Message],
        grammar: Grammar,
        reader: Callable[[Completion], Read | Unread | None],
        retry: str | None = None,
    ) -> JudgeReply:
        """Call until `reader` can parse the reply."""
        used = grammar if self.asking.grammar else None
        return await ask_until_read(self.engine, messages, self.sampling, self.asking, used, reader, follow_up=retry)


async def ask_scores(
    engine: ChatEngine,
    messages: list[Message],
    order: tuple[int, ...],
    scale: Scale,
    sampling: SamplingSettings,
    asking: StrategyAsking,
    retry: str | None = None,
) -> Look:
    """Ask for a score of every answer under its label (see `Asker.scores`)."""
    labels = LABELS[: len(order)]
    reader = functools.partial(scores_verdict, labels=labels, scale=scale, form=asking.form, format=asking.format)
    grammar = scores_grammar(labels, scale, asking.reason_chars) if asking.grammar else None
    reply = await ask_until_read(engine, messages, sampling, asking, grammar, reader, follow_up=retry)
    if reply.fields is None:
        return Look(order, None, (), reply.unread, reply.status, reply.raw)
    by_answer = {answer: reply.fields["scores"][label] for answer, label in zip(order, labels, strict=True)}
    scores = tuple(by_answer[answer] for answer in range(len(order)))
    return Look(order, scores, best_scores(scores), reply.reason, reply.status, reply.raw)


register("strategy", "direct")(StrategyForm(Asker.direct, pairwise=True, scored=False))
register("strategy", "best")(StrategyForm(Asker.best, scored=False))
register("strategy", "independent")(StrategyForm(Asker.independent, ordered=False))
register("strategy", "combined")(StrategyForm(Asker.combined))
