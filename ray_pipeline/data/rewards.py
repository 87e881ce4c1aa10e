"""Judges that are reward models (`judge.rewards`): one number a response, put on the judges' scale by its place among
the prompt's responses or by a calibrated map. The number itself never meets a threshold: it has no unit, and another
reward model, or the same one trained again, has another zero and spread.

A reward is a call like any other: keyed, logged under its prompt, and not made twice. It is kept in `raw`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.answers import Answer, answers_of
from ray_pipeline.engines.base import REWARD, ChatEngine, EngineError, PromptTooLong
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, ShardTables, count_by, reply_status
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.stage import Stage
from ray_pipeline.store.schemas import VERDICTS

Point = tuple[FiniteFloat, FiniteFloat]


class RewardJudge(Settings):
    """A judge that is a reward model: a model for sequence classification with one output."""

    name: str = Field(description="name of the judge in the tables")
    model: str = Field(
        description="a key of `models`: a model for sequence classification with one output, such as `train.method: "
        "reward` writes; local, and served by vLLM's pooling"
    )
    scale: Literal["rank"] | Annotated[tuple[Point, ...], Field(min_length=2)] = Field(
        "rank",
        description="rank: by place among the responses to the prompt, the best gets `high` and the worst `low` "
        "(responses alone have no score). Or a calibrated map: points [reward, score] with rising rewards, linear "
        "between them and constant outside",
    )
    low: int = Field(1, description="lowest score")
    high: int = Field(10, description="highest score")

    @model_validator(mode="after")
    def _valid(self) -> RewardJudge:
        _ = self.rubric  # name and scale
        if not isinstance(self.scale, str):
            rewards, scores = zip(*self.scale, strict=True)
            if any(b <= a for a, b in itertools.pairwise(rewards)):
                raise ValueError(f"judge {self.name}: the rewards of scale must rise from point to point")
            if any(b < a for a, b in itertools.pairwise(scores)):
                raise ValueError(f"judge {self.name}: a higher reward cannot give a lower score; correct scale")
            if scores[0] < self.low or scores[-1] > self.high:
                raise ValueError(
                    f"judge {self.name}: scores of scale must be from low ({self.low}) to high ({self.high})"
                )
        return self

    @property
    def rubric(self) -> Rubric:
        """Name and scale."""
        return Rubric(name=self.name, low=self.low, high=self.high, model=self.model)

    def scores(self, rewards: Sequence[float | None]) -> list[float | None]:
        """Scores of the responses to one prompt; equal rewards share the mean of their places.

        Args:
            rewards: one a response; None where there is none, which takes no place.
        """
        from scipy.stats import rankdata  # importing it takes a second

        known = [reward for reward in rewards if reward is not None]
        if not isinstance(self.scale, str):
            xs, ys = zip(*self.scale, strict=True)
            mapped = [float(score) for score in np.interp(known, xs, ys)]
        elif len(known) < 2:
            return [None] * len(rewards)
        else:
            step = (self.high - self.low) / (len(known) - 1)
            mapped = [float(self.low + step * (place - 1)) for place in rankdata(known)]
        found = iter(mapped)
        return [None if reward is None else next(found) for reward in rewards]


class _Judging(Settings):
    answers: tuple[str, ...]
    judge: RewardJudge

    @property
    def rubrics(self) -> tuple[Rubric, ...]:
        """The judge, as the checks before a run look for it."""
        return (self.judge.rubric,)


class _Prompt(NamedTuple):
    """All answers to one prompt."""

    prompt_id: str
    answers: list[Answer]


class _Reward(NamedTuple):
    value: float | None
    status: str
    raw: str | None


def _prompts(shard: ShardTables, settings: _Judging) -> Iterator[_Prompt]:
    of: dict[str, list[Answer]] = {}
    for answer in answers_of(shard.tables["prompts"], *(shard.tables[role] for role in settings.answers)):
        of.setdefault(answer.prompt_id, []).append(answer)
    return (_Prompt(*item) for item in of.items())


async def _reward(engine: ChatEngine, answer: Answer) -> _Reward:
    if answer.missing is not None:
        return _Reward(None, answer.missing, None)
    reply = {"role": "assistant", "content": answer.response}
    try:
        text = (await engine.chat([*answer.messages, reply], REWARD)).text
    except PromptTooLong:
        return _Reward(None, "too_long", None)
    except EngineError as error:
        return _Reward(None, "error", f"{type(error).__name__}: {error}")
    try:
        return _Reward(float(text), "ok", text)
    except ValueError:
        return _Reward(None, "unparsed", text)


async def _judge(engine: ChatEngine, settings: _Judging, item: _Prompt) -> Outcome:
    judge = settings.judge
    rewards = await all_of(_reward(engine, answer) for answer in item.answers)
    rows: list[dict[str, Any]] = []
    for answer, reward, score in zip(item.answers, rewards, judge.scores([r.value for r in rewards]), strict=True):
        # The only response to a prompt has a reward, but no place.
        status = "missing" if score is None and reward.status == "ok" else reward.status
        ids = {"candidate_id": answer.id, "prompt_id": answer.prompt_id, "judge": judge.name}
        rows.append({**ids, "score": score, "parse_status": status, "raw": reward.raw})
    called = [r.status for r, answer in zip(rewards, item.answers, strict=True) if answer.missing is None]
    return Outcome({"verdicts": rows}, reply_status(f"judge {judge.name}", *called))


REWARDS = Asking(
    tables={"verdicts": VERDICTS},
    items=_prompts,
    ask=_judge,
    role=lambda settings, item: f"judge/{settings.judge.name}",
    counts=count_by("verdicts", "judge", "parse_status"),
)


def rewards(
    judges: Sequence[RewardJudge],
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    answers: Mapping[str, Stage],
    name: str,
    group: str,
    holds: str,
) -> list[Stage]:
    """One stage a reward model, with its verdicts ordered by prompt; arguments as of `judging.judges`."""
    return [
        REWARDS.stage(
            f"{name}-{judge.name}",
            _Judging(answers=tuple(answers), judge=judge),
            models[judge.model],
            {"prompts": prompts, **answers},
            group=group,
            holds=holds,
        )
        for judge in judges
    ]
