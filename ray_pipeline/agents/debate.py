"""Debate (Chan et al. 2023, "ChatEval"): roles discuss the same answers in rounds, then each of them scores.

The settings fix the order of speakers and what each of them sees; a template file has the roles and their prompts. The
history lives in memory only: an interrupted debate is run again, and calls that were answered come from the call log.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import most_held
from ray_pipeline.agents.labelled_replies import Scale
from ray_pipeline.agents.strategies import (
    LABELS,
    WORST_FIRST,
    Conflict,
    Judgement,
    Look,
    Orders,
    StrategyAsking,
    ask_scores,
    best_scores,
    settle,
    shown_orders,
)
from ray_pipeline.agents.templates import (
    RoleTemplate,
    TemplateError,
    check_text,
    fence,
    read_template_file,
    render,
    render_text,
    transcript,
)
from ray_pipeline.config.settings import Settings, repeated
from ray_pipeline.engines.base import ChatEngine, EngineError, Message, PromptTooLong
from ray_pipeline.store.keys import derived_seed

#: How the roles' scores become one verdict: their means are compared, or each role votes (unique mode, else tie).
Pool = Literal["mean", "vote"]


class Role(Settings):
    """One debater: its key, the name shown to the others, and its persona."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    title: str
    persona: str


class DebateTemplates(Settings):
    """All texts of a debate file."""

    roles: tuple[Role, ...] = Field(min_length=1)
    system: str = ""
    shared: str
    speak: str
    score: str
    retry: str = ""

    def shows(self, answers: int) -> bool:
        """Whether the question includes this number of answers; texts written for two answers show only two."""
        marked = [{"label": LABELS[n], "text": f"<<{n}>>"} for n in range(answers)]
        labels = [answer["label"] for answer in marked]
        text = render_text(self.shared, {**DEBATE_VARIABLES, "answers": marked, "labels": labels, "speeches": []})
        return all(answer["text"] in text for answer in marked)


#: Variables available to the texts of a debate.
DEBATE_VARIABLES: dict[str, Any] = {
    "instruction": "x",
    "answers": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}],
    "labels": ["A", "B"],
    "speeches": [{"round": 1, "title": "x", "text": "x"}],
    "title": "x",
    "persona": "x",
    "low": 0,
    "high": 10,
    "form": "json",
    "reason": True,
    "fence": "0",
}


def load_debate_templates(name_or_path: str) -> DebateTemplates:
    """Debate texts by built-in name or from a YAML file.

    Raises:
        TemplateError: the file is unusable, or two roles have the same name; the message gives file and block.
    """
    templates = read_template_file(name_or_path, DebateTemplates, "debate")
    if twice := repeated(role.name for role in templates.roles):
        raise TemplateError(f"prompt template file {name_or_path}, roles: duplicate name {', '.join(twice)}")
    texts = ("system", "shared", "speak", "score", "retry")
    for form in ("json", "text"):
        for speeches in (0, 1):  # before and after the first speech
            said = DEBATE_VARIABLES["speeches"][:speeches]
            variables = {**DEBATE_VARIABLES, "form": form, "speeches": said}
            for key in texts:
                check_text(name_or_path, key, getattr(templates, key), variables)
    return templates


class DebateSettings(Settings):
    """The rules of a debate."""

    rounds: int = Field(2, ge=0, description="rounds of speeches before the scores")
    turns: Literal["in_turn", "at_once"] = Field(
        "in_turn",
        description="in_turn: a speaker sees the earlier speeches of the same round; at_once: the speakers of "
        "a round do not see each other's speeches",
    )
    sees: Literal["all", "last_round", "own"] = Field(
        "all",
        description="speeches of earlier rounds shown to a speaker: all, those of the last round, or only its own",
    )
    schedule: tuple[tuple[str, ...], ...] | None = Field(
        None, description="names of the speakers of each round, in order; default: all roles in the order of the file"
    )
    pool: Pool = Field("mean", description="how the final scores become one verdict")
    low: int = Field(0, description="lowest score")
    high: int = Field(10, description="highest score")
    decimals: bool = Field(False, description="whether scores may have decimals")
    orders: Orders = Field("given", description="orders in which the answers are shown")
    conflict: Conflict = Field(
        "tie",
        description="verdict when the two orders disagree: a tie, the better mean score, or that of the given order",
    )
    speech: SamplingSettings = Field(
        SamplingSettings(temperature=0.0, max_tokens=512), description="sampling of the speeches"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DebateSettings:
        _ = self.scale
        if self.schedule is not None and len(self.schedule) != self.rounds:
            raise ValueError(
                f"debate.schedule has {len(self.schedule)} rounds but debate.rounds is {self.rounds}; make them equal"
            )
        return self

    @property
    def scale(self) -> Scale:
        return Scale(low=self.low, high=self.high, decimals=self.decimals)

    def speakers(self, roles: Sequence[Role]) -> list[list[Role]]:
        """Speakers of each round. Raises ValueError for a name that is not a role."""
        if self.schedule is None:
            return [list(roles) for _ in range(self.rounds)]
        known = {role.name: role for role in roles}
        if unknown := sorted({n for names in self.schedule for n in names} - set(known)):
            raise ValueError(f"debate.schedule: unknown role {', '.join(unknown)}; choose from {', '.join(known)}")
        return [[known[name] for name in names] for names in self.schedule]


@dataclasses.dataclass(frozen=True)
class Speech:
    """One role's speech. `text` is None when the call failed; `finish_reason` is then `too_long` or `error`, and
    `error` the reason."""

    order: tuple[int, ...]
    round: int
    position: int
    role: str
    text: str | None
    finish_reason: str
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Debated:
    """A debate's verdict, each role's final verdict (over all orders), and all speeches."""

    judgement: Judgement
    voices: dict[str, Judgement]
    speeches: tuple[Speech, ...]


async def debate(
    engines: ChatEngine | Mapping[str, ChatEngine],
    prompt: Sequence[Message],
    answers: Sequence[str],
    templates: DebateTemplates,
    settings: DebateSettings,
    sampling: SamplingSettings,
    asking: StrategyAsking,
) -> Debated:
    """Let the roles debate answers to one prompt.

    Args:
        engines: one for all roles, or one by role name.
        sampling: of the final scores; that of the speeches is `settings.speech`.

    Raises:
        ValueError: fewer than two answers, a role without an engine, or a schedule with an unknown role.
    """
    if not 2 <= len(answers) <= len(LABELS):
        raise ValueError(f"a debate is about 2 to {len(LABELS)} answers, got {len(answers)}")
    by_role = engines if isinstance(engines, Mapping) else {role.name: engines for role in templates.roles}
    if without := [role.name for role in templates.roles if role.name not in by_role]:
        raise ValueError(f"no engine for {', '.join(without)}")
    table = _Table(by_role, transcript(prompt), answers, templates, settings, sampling, asking)
    held = await asyncio.gather(*(table.hold(order) for order in shown_orders(settings.orders, len(answers))))
    pooled = [_pool(finals, settings.pool) for _, finals in held]
    voices = {
        role.name: settle([finals[role.name] for _, finals in held], settings.conflict) for role in templates.roles
    }
    speeches = tuple(speech for said, _ in held for speech in said)
    return Debated(settle(pooled, settings.conflict), voices, speeches)


def _pool(finals: Mapping[str, Look], pool: Pool) -> Look:
    """One look from all roles; it is unread if any role's scores are."""
    looks = list(finals.values())
    status = min((look.parse_status for look in looks), key=WORST_FIRST.index)
    reasons = [f"{role}: {look.reason}" for role, look in finals.items() if look.reason]
    scores = [look.scores for look in looks if look.scores is not None]
    if len(scores) < len(looks):
        return Look(looks[0].order, None, (), None, status, None)
    means = tuple(sum(column) / len(scores) for column in zip(*scores, strict=True))
    best = best_scores(means) if pool == "mean" else most_held([look.best for look in looks])
    return Look(looks[0].order, means, best, "\n\n".join(reasons) or None, status, None)


@dataclasses.dataclass(frozen=True)
class _Table:
    """One debate about one set of answers, in any order."""

    engines: Mapping[str, ChatEngine]
    instruction: str
    answers: Sequence[str]
    templates: DebateTemplates
    settings: DebateSettings
    sampling: SamplingSettings
    asking: StrategyAsking

    async def hold(self, order: tuple[int, ...]) -> tuple[list[Speech], dict[str, Look]]:
        """All rounds, then the scores of all roles."""
        said: list[Speech] = []
        for number, speakers in enumerate(self.settings.speakers(self.templates.roles), 1):
            before = list(said)
            if self.settings.turns == "at_once":
                said += await asyncio.gather(
                    *(self._speak(order, number, place, role, before) for place, role in enumerate(speakers))
                )
            else:
                for place, role in enumerate(speakers):
                    said.append(await self._speak(order, number, place, role, said))
        finals = await asyncio.gather(*(self._score(order, role, said) for role in self.templates.roles))
        return said, {role.name: look for role, look in zip(self.templates.roles, finals, strict=True)}

    async def _speak(
        self, order: tuple[int, ...], number: int, place: int, role: Role, said: Sequence[Speech]
    ) -> Speech:
        variables = self._variables(order, role, said, number)
        messages = self._messages(self.templates.speak, variables)
        sampling = self.settings.speech.sampling()
        if sampling.temperature > 0:
            seed = derived_seed("speech", [m["content"] for m in messages], number, place)
            sampling = dataclasses.replace(sampling, seed=seed)
        try:
            reply = await self.engines[role.name].chat(messages, sampling)
        except PromptTooLong as error:
            return Speech(order, number, place, role.name, None, "too_long", str(error))
        except EngineError as error:
            return Speech(order, number, place, role.name, None, "error", f"{type(error).__name__}: {error}")
        return Speech(order, number, place, role.name, reply.text, reply.finish_reason)

    async def _score(self, order: tuple[int, ...], role: Role, said: Sequence[Speech]) -> Look:
        variables = self._variables(order, role, said, self.settings.rounds + 1)
        messages = self._messages(self.templates.score, variables)
        retry = render_text(self.templates.retry, variables) if self.asking.follow_up else None
        engine, scale = self.engines[role.name], self.settings.scale
        return await ask_scores(engine, messages, order, scale, self.sampling, self.asking, retry)

    def _variables(self, order: tuple[int, ...], role: Role, said: Sequence[Speech], now: int) -> dict[str, Any]:
        labels = LABELS[: len(order)]
        titles = {r.name: r.title for r in self.templates.roles}
        return {
            "instruction": self.instruction,
            "answers": [{"label": a, "text": self.answers[n]} for a, n in zip(labels, order, strict=True)],
            "labels": list(labels),
            "speeches": [
                {"round": s.round, "title": titles[s.role], "text": s.text}
                for s in said
                if s.text is not None and self._may_see(role, s, now)
            ],
            "title": role.title,
            "persona": role.persona,
            "low": self.settings.low,
            "high": self.settings.high,
            "form": self.asking.form,
            "reason": self.asking.reason_chars > 0,
            "fence": fence([self.instruction, sorted(self.answers)], [self.instruction, *self.answers]),
        }

    def _may_see(self, role: Role, speech: Speech, now: int) -> bool:
        """Whether a role may see a speech in round `now` (the scores are one round more)."""
        if speech.role == role.name:
            return True
        if self.settings.sees == "own":
            return False
        return self.settings.sees == "all" or speech.round >= now - 1

    def _messages(self, task: str, variables: Mapping[str, Any]) -> list[Message]:
        # Question, answers and history come first: speakers of one debate share that prefix.
        block = RoleTemplate(system=self.templates.system, shared=self.templates.shared, rubric=task)
        return render(block, "shared_first", **variables)
