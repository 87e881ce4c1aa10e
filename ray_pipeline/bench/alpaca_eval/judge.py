"""AlpacaEval's judge: which of two outputs is better, as a probability from the logarithms of the judge's own."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.judge_prompts import PreferencePrompt
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine, Completion, EngineError, Grammar, PromptTooLong
from ray_pipeline.store.keys import derived_seed

#: logprobs: p(first) / (p(first) + p(second)) at the first token; reply: the label that was written, 1 or 0;
#: same: both outputs are identical, so the preference is one half without a call.
Method = Literal["logprobs", "reply", "same"]


class PreferenceAsking(Settings):
    """Calls of AlpacaEval's judge. The defaults are the published ones."""

    sampling: SamplingSettings = Field(
        SamplingSettings(temperature=1.0, max_tokens=1),
        description="one token at temperature 1; what was sampled does not matter where there are log-probabilities",
    )
    top_logprobs: int = Field(
        5, ge=0, description="alternatives of the first token that are looked at; 0: the written label is read"
    )
    grammar: bool = Field(
        False, description="force the reply to be a label. Log-probabilities stay those of the unforced model"
    )


@dataclasses.dataclass(frozen=True)
class PairPreference:
    """The judge's probability that the output shown first is better; None exactly when nothing could be read.

    Attributes:
        label_mass: probability of both labels together, before they are set in proportion; None without logprobs.
            If it is small, the judge would rather have replied something else.
    """

    first: float | None
    method: Method | None
    label_mass: float | None
    parse_status: str
    raw: str | None


async def prefer(
    engine: ChatEngine, instruction: str, first: str, second: str, prompt: PreferencePrompt, asking: PreferenceAsking
) -> PairPreference:
    """Ask once which output is better; identical outputs are a draw, as published. Callers choose the order."""
    if first == second:
        return PairPreference(0.5, "same", None, "ok", None)
    messages = prompt.filled(instruction, first, second)
    sampling = asking.sampling.sampling(
        logprobs=asking.top_logprobs or None,
        grammar=Grammar.choice(prompt.labels) if asking.grammar else None,
        # A warm draw has a seed, or it could not be repeated.
        seed=derived_seed("judge", [m["content"] for m in messages]) if asking.sampling.temperature > 0 else None,
    )
    try:
        reply = await engine.chat(messages, sampling)
    except PromptTooLong:
        return PairPreference(None, None, None, "too_long", None)
    except EngineError as error:
        return PairPreference(None, None, None, "error", f"{type(error).__name__}: {error}")
    return read_preference(reply, prompt.labels)


def read_preference(reply: Completion, labels: tuple[str, str]) -> PairPreference:
    """The preference from the first token's alternatives, else from a reply that is nothing but a label.

    A reply of one token ends by its length, so the finish reason is not looked at. A label that is among the
    alternatives only with blanks around it counts where none is there without (other tokenizers than the published
    judge's write it so). A label that is not among them has probability 0, as published; without both, nothing is read.
    """
    if reply.logprobs:
        exact = {token: value for token, value in reply.logprobs[0]}
        mass = [math.exp(exact[label]) if label in exact else 0.0 for label in labels]
        if not any(mass):
            mass = [sum(math.exp(v) for t, v in exact.items() if t.strip() == label) for label in labels]
        if any(mass):
            return PairPreference(mass[0] / sum(mass), "logprobs", sum(mass), "ok", reply.text)
    if (text := reply.text.strip()) in labels:
        return PairPreference(1.0 if text == labels[0] else 0.0, "reply", None, "ok", reply.text)
    return PairPreference(None, None, None, "unparsed", reply.text)
