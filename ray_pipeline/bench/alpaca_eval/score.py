"""AlpacaEval 2: win rate over a reference from weighted preferences, raw and length-controlled.

A preference is the judge's probability, between 0 and 1, that the model's output is better than the reference's; the
published files hold it as 1 + that number. One half is a draw. Rates are percentages, as the leaderboard prints them.

Sources: Li et al. 2023 (AlpacaEval) and Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475), §3, with
the choices of its published code: preferences of identical outputs are one half, unread ones are left out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from ray_pipeline.bench.alpaca_eval.judge import PairPreference, PreferenceAsking, prefer
from ray_pipeline.bench.alpaca_eval.length_controlled import LengthControlled, checked_preferences
from ray_pipeline.bench.alpaca_eval.questions import REFERENCE, Instruction, OrderRule
from ray_pipeline.bench.judge_prompts import PreferencePrompt, prompts_digest
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.stats.bootstrap import Floats, Interval, bootstrap_mean
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol, settings_text
from ray_pipeline.store.keys import digest

#: The model's output is the one shown first, or the second one.
Place = Literal["first", "second"]

# --- annotations ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A judge's preferences on one model's output to one instruction, by the place where that output was shown.

    A place that was not asked is absent; without an output (None) nothing was asked and nothing is read.
    """

    instruction: Instruction
    output: str | None
    asked: Mapping[Place, PairPreference]

    @property
    def preference(self) -> float | None:
        """For the model, the mean over the places asked; None when one of them could not be read."""
        found = [self._of(place) for place in self.asked]
        known = [p for p in found if p is not None]
        return float(np.mean(known)) if known and len(known) == len(found) else None

    @property
    def flipped(self) -> bool | None:
        """Whether each order prefers another output; None unless both were asked and read."""
        first, second = self._of("first"), self._of("second")
        return None if first is None or second is None else (first - 0.5) * (second - 0.5) < 0

    def _of(self, place: Place) -> float | None:
        if place not in self.asked or (said := self.asked[place].first) is None:
            return None
        return model_preference(said, place)


#: One row an instruction. Preferences are the model's, by where its output was shown; predicted: at equal length.
INSTRUCTION_TABLE = pa.schema(
    [
        pa.field("instruction_index", pa.int32(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("length_reference", pa.int32(), nullable=False),
        pa.field("length_model", pa.int32()),
        pa.field("preference", pa.float64()),
        pa.field("preference_first", pa.float64()),
        pa.field("preference_second", pa.float64()),
        pa.field("flipped", pa.bool_()),
        pa.field("preference_predicted", pa.float64()),
        pa.field("method", pa.string()),
        pa.field("label_mass", pa.float64()),
        pa.field("parse_status", pa.string(), nullable=False),
    ]
)


def instruction_table(annotations: Sequence[Annotation], controlled: LengthControlled | None = None) -> pa.Table:
    """The per-instruction table, in the order given; `controlled` has the same rows. See `INSTRUCTION_TABLE`."""
    if controlled is not None and len(controlled.preferences) != len(annotations):
        raise ValueError(f"{len(annotations)} annotations, but {len(controlled.preferences)} predicted preferences")
    rows = []
    for i, a in enumerate(annotations):
        said = list(a.asked.values())
        unread = [s.parse_status for s in said if s.first is None]
        masses = [s.label_mass for s in said if s.label_mass is not None]
        rows.append(
            {
                "instruction_index": a.instruction.index,
                "dataset": a.instruction.dataset,
                "instruction": a.instruction.instruction,
                "length_reference": len(a.instruction.reference),
                "length_model": None if a.output is None else len(a.output),
                "preference": a.preference,
                "preference_first": a._of("first"),
                "preference_second": a._of("second"),
                "flipped": a.flipped,
                "preference_predicted": None if controlled is None else float(controlled.preferences[i]),
                "method": said[0].method if said else None,
                "label_mass": min(masses) if masses else None,
                # A tie between two identical texts needs no call and counts as read.
                "parse_status": unread[0] if unread else ("ok" if said else "unanswered"),
            }
        )
    return pa.Table.from_pylist(rows, schema=INSTRUCTION_TABLE)


def flip_rate(annotations: Sequence[Annotation]) -> float | None:
    """Share of the instructions read in both orders on which each order prefers another output."""
    flips = [a.flipped for a in annotations if a.flipped is not None]
    return sum(flips) / len(flips) if flips else None


def preferences_of(annotations: Sequence[Annotation]) -> Floats:
    """Preferences of shape (rows,), NaN where unread."""
    return np.array([np.nan if a.preference is None else a.preference for a in annotations], dtype=np.float64)


# --- order ------------------------------------------------------------------------------------------------------------


def published_place(instruction: str, seed: int = 0) -> Place:
    """Where the published annotator shows the model's output: a fair coin that the instruction's text seeds.

    The reference is output 1 and the model's output 2; the coin toss decides whether the two are swapped.
    """
    coin = random.Random(f"is_switched_outputs{instruction}{seed}")
    return "first" if coin.choices([False, True], k=1)[0] else "second"


def places(instruction: str, rule: OrderRule, seed: int = 0) -> tuple[Place, ...]:
    """The places of the model's output in which an instruction is judged."""
    return ("first", "second") if rule == "both" else (published_place(instruction, seed),)


def model_preference(first_is_better: float, place: Place) -> float:
    """The preference for the model's output from the judge's probability that the first one is better."""
    return first_is_better if place == "first" else 1.0 - first_is_better


async def annotate(
    engine: ChatEngine,
    instruction: Instruction,
    output: str | None,
    prompt: PreferencePrompt,
    asking: PreferenceAsking,
    order: OrderRule = "seeded",
    seed: int = 0,
) -> Annotation:
    """Have one output judged against the reference's, in the places that the order rule names."""
    if output is None:
        return Annotation(instruction, None, {})
    asked = places(instruction.instruction, order, seed)
    shown = [
        (output, instruction.reference) if place == "first" else (instruction.reference, output) for place in asked
    ]
    said = await asyncio.gather(*(prefer(engine, instruction.instruction, *two, prompt, asking) for two in shown))
    return Annotation(instruction, output, dict(zip(asked, said, strict=True)))


# --- raw win rate -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RawWinRate:
    """Percentages over the rows whose preference was read; None where there is no such row (or one, for an error).

    Attributes:
        standard_error: of the mean preference, from the sample standard deviation (n − 1).
        wins, losses, draws: rows with a preference above, below and at one half.
        discrete_win_rate: wins and half of the draws.
        unread: rows without a preference; `worst` and `best` are the win rate had all of them been lost or won.
    """

    win_rate: float | None
    standard_error: float | None
    discrete_win_rate: float | None
    rows: int
    wins: int
    losses: int
    draws: int
    unread: int
    worst: float | None
    best: float | None
    interval: Interval


def raw_win_rate(preferences: ArrayLike, *, draws: int = 2000, seed: int = 0) -> RawWinRate:
    """The raw win rate from preferences of shape (rows,), NaN where the judge was not read.

    `interval` resamples rows (percentages); the published figure beside a win rate is the standard error.
    """
    values = checked_preferences(preferences)
    read = values[~np.isnan(values)]
    rows, unread = len(read), len(values) - len(read)
    wins, losses = int((read > 0.5).sum()), int((read < 0.5).sum())
    even = rows - wins - losses
    total = float(read.sum())
    return RawWinRate(
        win_rate=100 * float(read.mean()) if rows else None,
        standard_error=100 * float(read.std(ddof=1)) / rows**0.5 if rows > 1 else None,
        discrete_win_rate=100 * (wins + even / 2) / rows if rows else None,
        rows=rows,
        wins=wins,
        losses=losses,
        draws=even,
        unread=unread,
        worst=100 * total / len(values) if len(values) else None,
        best=100 * (total + unread) / len(values) if len(values) else None,
        interval=bootstrap_mean(100 * read, np.arange(rows), draws, seed, bounds=(0, 100)),
    )


# --- protocol ---------------------------------------------------------------------------------------------------------

Metric = Literal["LC", "WR"]


def reference_digest(lengths: Sequence[int]) -> str:
    """Digest of the reference's outputs by their lengths in characters, in the order of the published file.

    Their texts may not be shipped, so the 805 lengths identify the file.
    """
    return digest(["lengths", [int(n) for n in lengths]])


def alpaca_eval_protocol(
    metric: Metric,
    judge: str,
    prompt: PreferencePrompt,
    asking: PreferenceAsking,
    order: OrderRule,
    reference: str,
    reference_lengths: Sequence[int],
    methods: Sequence[str | None],
    *,
    instructions: str,
    seed: int = 0,
    estimator: str | None = None,
) -> Protocol:
    """What a score was measured with.

    Args:
        judge: identity of the judging model.
        reference_lengths: characters of the reference's outputs of all rows behind the score, in order.
        instructions: digest of them (`instructions_digest`).
        methods: how each row was read (`PairPreference.method`).
        estimator: `LengthControlled.estimator`, for the metric LC.
    """
    written = "reply" in methods
    s = asking.sampling
    return Protocol(
        benchmark="AlpacaEval 2",
        metric=metric,
        questions=instructions,
        judge=judge,
        judge_prompts=prompts_digest(prompt),
        judge_sampling=settings_text(
            temperature=s.temperature,
            top_p=s.top_p,
            max_tokens=s.max_tokens,
            top_logprobs=asking.top_logprobs,
            grammar=asking.grammar,
            extra=dict(s.extra),
        ),
        reading="written label" if written else "label probabilities",
        order=f"seeded coin, seed {seed}" if order == "seeded" else "both orders",
        reference=reference,
        reference_answers=reference_digest(reference_lengths),
        estimator=estimator if metric == "LC" else "mean preference",
    )


def instructions_digest(instructions: Sequence[Instruction]) -> str:
    """Digest of the instructions in the order of the file, without the reference outputs."""
    return digest(["instructions", [one.instruction for one in instructions]])


def published_alpaca_eval(metric: Metric, instructions: str | None) -> PublishedProtocol:
    """The protocol of the leaderboard (annotator weighted_alpaca_eval_gpt4_turbo, reference GPT-4 Turbo).

    How a model draws its outputs is left open.

    Args:
        instructions: digest of the published instructions. Their texts are not ours to ship and no digest of them is
            known here, so it is that of a file that its origin vouches for (the benchmark's own on the hub); None:
            the instructions are unverified, and a score on them is not the published one.
    """
    asking = PreferenceAsking()
    return PublishedProtocol(
        Protocol(
            benchmark="AlpacaEval 2",
            metric=metric,
            questions=instructions or "the published ones",
            judge="endpoint:gpt-4-1106-preview@https://api.openai.com/v1",
            judge_prompts="56f824639d32a6f687e068df4b057e91",
            judge_sampling=settings_text(
                temperature=1, top_p=1, max_tokens=1, top_logprobs=asking.top_logprobs, grammar=False, extra={}
            ),
            reading="label probabilities",
            order="seeded coin, seed 0",
            reference=REFERENCE,
            reference_answers=_REFERENCE_LENGTHS,
            estimator="re-fit" if metric == "LC" else "mean preference",
        ),
        frozenset({"answers"}),
    )


# Recomputed by the tests where the published lengths are at hand, and so is the digest of the prompt.
_REFERENCE_LENGTHS = "60f57441ffcf8bcc8674e7a9db312272"
