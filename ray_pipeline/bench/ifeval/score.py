"""IFEval: are verifiable instructions followed? By the official checkers, which the extra `ifeval` brings (lm-eval).

Source: Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models" (arXiv 2311.07911): strict and
loose accuracy over prompts (all instructions of a prompt) and over instructions. The checkers are called as lm-eval's
own `process_results` calls them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.ifeval.questions import IfevalPrompt
from ray_pipeline.constraints.official import Checkers, checker_version, load_checkers
from ray_pipeline.stats.bootstrap import Interval, bootstrap_mean
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol
from ray_pipeline.store.keys import digest


class UnknownInstruction(BenchmarkFileError):
    """A prompt has an instruction that no checker supports. The message names both."""


@dataclasses.dataclass(frozen=True)
class IfevalVerdict:
    """Which instructions were followed: one flag per instruction, in the prompt's order.

    Attributes:
        answered: False for a missing response, whose flags are all False.
        chance: a checker drew what it looks for at random (the official one of letter frequency does so where the
            prompt asks for a sign such as # or !), so that another seed may give another verdict.
    """

    key: int
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]
    answered: bool = True
    chance: bool = False


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share with its interval (bootstrap over prompts), both between 0 and 1; `count` of `total` were right.

    `best` is the share had every unanswered prompt been followed; the share itself takes them as not followed.
    """

    count: int
    total: int
    interval: Interval
    best: float | None


@dataclasses.dataclass(frozen=True)
class TypeAccuracy:
    """One instruction type, or one family of types: how many instructions, and how many were followed."""

    name: str
    total: int
    strict: int
    loose: int


@dataclasses.dataclass(frozen=True)
class IfevalScores:
    """The four published accuracies, and instructions by type and by family.

    `unanswered` counts prompts without a response, `chance` those whose verdict depends on a checker's random draw.
    """

    prompt_strict: Accuracy
    instruction_strict: Accuracy
    prompt_loose: Accuracy
    instruction_loose: Accuracy
    types: tuple[TypeAccuracy, ...]
    families: tuple[TypeAccuracy, ...]
    unanswered: int
    chance: int


def questions_digest(prompts: Sequence[IfevalPrompt]) -> str:
    """Digest of a set of prompts, independent of their order."""
    return digest(sorted([p.key, p.prompt, list(p.instructions), [dict(a) for a in p.arguments]] for p in prompts))


def check(
    prompts: Sequence[IfevalPrompt], responses: Mapping[int, str | None], checkers: Checkers | None = None
) -> list[IfevalVerdict]:
    """Verdicts on the responses by key, in the order of the prompts; a prompt without a response is unanswered.

    A verdict depends on the prompt and its response alone (see `Checkers.followed`).

    Raises:
        CheckersMissing: see `load_checkers`.
        UnknownInstruction: before anything is checked.
        ValueError: a response belongs to no prompt.
    """
    checkers = checkers or load_checkers()
    for prompt in prompts:
        if unknown := [i for i in prompt.instructions if i not in checkers.registry]:
            raise UnknownInstruction(
                f"prompt {prompt.key}: no checker for {', '.join(unknown)}; there are "
                f"{', '.join(sorted(checkers.registry))}"
            )
    if strangers := sorted(set(responses) - {p.key for p in prompts}):
        raise ValueError(f"responses to prompts that there are not: keys {strangers[:5]}")
    verdicts = []
    for prompt in prompts:
        response = responses.get(prompt.key)
        if response is None:
            nothing = (False,) * len(prompt.instructions)
            verdicts.append(IfevalVerdict(prompt.key, nothing, nothing, answered=False))
            continue
        whole = (prompt.prompt, prompt.instructions, prompt.arguments, response)
        strict, drew_strict = checkers.followed(*whole, loose=False)
        loose, drew_loose = checkers.followed(*whole, loose=True)
        verdicts.append(IfevalVerdict(prompt.key, strict, loose, chance=drew_strict or drew_loose))
    return verdicts


def scores(
    prompts: Sequence[IfevalPrompt], verdicts: Sequence[IfevalVerdict], *, draws: int = 2000, seed: int = 0
) -> IfevalScores:
    """The accuracies of one model; prompts and verdicts are joined by key.

    Raises:
        ValueError: keys differ, or a verdict has other than one flag an instruction.
    """
    by_key = {v.key: v for v in verdicts}
    if len(by_key) < len(verdicts) or by_key.keys() != {p.key for p in prompts}:
        raise ValueError("one verdict for each prompt is needed, by key")
    rows = [(p, by_key[p.key]) for p in prompts]
    for prompt, verdict in rows:
        if not len(prompt.instructions) == len(verdict.strict) == len(verdict.loose):
            raise ValueError(f"prompt {prompt.key}: one flag an instruction is needed")
    answered = [v.answered for _, v in rows]

    def whole(flags: Sequence[tuple[bool, ...]]) -> Accuracy:
        return _accuracy([(all(f),) for f in flags], answered, draws, seed)

    def single(flags: Sequence[tuple[bool, ...]]) -> Accuracy:
        return _accuracy(flags, answered, draws, seed)

    strict, loose = [v.strict for _, v in rows], [v.loose for _, v in rows]
    return IfevalScores(
        prompt_strict=whole(strict),
        instruction_strict=single(strict),
        prompt_loose=whole(loose),
        instruction_loose=single(loose),
        types=_by(rows, lambda name: name),
        families=_by(rows, lambda name: name.split(":")[0]),
        unanswered=answered.count(False),
        chance=sum(v.chance for _, v in rows),
    )


def _accuracy(flags: Sequence[tuple[bool, ...]], answered: Sequence[bool], draws: int, seed: int) -> Accuracy:
    groups = np.repeat(np.arange(len(flags)), [len(f) for f in flags])
    flat = np.array([float(x) for f in flags for x in f])
    possible = np.array([float(x or not a) for f, a in zip(flags, answered, strict=True) for x in f])
    return Accuracy(
        count=int(flat.sum()),
        total=len(flat),
        interval=bootstrap_mean(flat, groups, draws, seed, bounds=(0, 1)),
        best=float(possible.mean()) if len(possible) else None,
    )


def _by(rows: Sequence[tuple[IfevalPrompt, IfevalVerdict]], name: Callable[[str], str]) -> tuple[TypeAccuracy, ...]:
    counts: dict[str, list[int]] = {}
    for prompt, verdict in rows:
        for instruction, strict, loose in zip(prompt.instructions, verdict.strict, verdict.loose, strict=True):
            count = counts.setdefault(name(instruction), [0, 0, 0])
            for i, more in enumerate((1, strict, loose)):
                count[i] += more
    return tuple(TypeAccuracy(n, *counts[n]) for n in sorted(counts))


def ifeval_protocol(prompts: Sequence[IfevalPrompt], metric: str = "", answers: str | None = None) -> Protocol:
    """What a score was measured with; `metric` is one of the four accuracies by name, empty for all of them."""
    return Protocol(
        benchmark="IFEval",
        metric=metric,
        questions=questions_digest(prompts),
        checker=checker_version(),
        answers=answers,
    )


def published_ifeval(metric: str = "") -> PublishedProtocol:
    """The paper's prompts under the official checkers of the pinned lm-eval; how answers are drawn is left open."""
    return PublishedProtocol(
        Protocol(benchmark="IFEval", metric=metric, questions=_QUESTIONS, checker=_CHECKER), frozenset({"answers"})
    )


# The digest of the published file, recomputed by the tests where it is at hand, and the versions that were checked
# against the published verdicts.
_QUESTIONS = "63c72c02bc5d1334947ca168ceb43c55"
_CHECKER = "lm_eval 0.4.13, nltk 3.10.4, langdetect 1.0.9, seed 0"
