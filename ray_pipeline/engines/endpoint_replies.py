"""Reading an endpoint's replies: the list of its models, and completions."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.engines.account import Used
from ray_pipeline.engines.base import Completion, Sampling, TokenLogprobs
from ray_pipeline.engines.endpoint_errors import Again
from ray_pipeline.engines.usage import reply_token_estimate

logger = logging.getLogger("quorum.openai")

Charge = Callable[[Used], None]
"""Counts a reply that cannot be used and that the server charges."""

Note = Callable[[str], None]
"""Receives a message for the user about the endpoint."""

_MOST_TOKENS = 10_000_000  # of a prompt or a reply; more is no figure of a server
_LEAST_LOGPROB = -9999.0  # what OpenAI and vLLM send for probability 0
_ROUNDING = 0.01
_SHOWN_MODELS = 12  # names of an endpoint's models that a message lists

#: Finish reasons of several servers -> the common ones.
_FINISHES = {"eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}


@dataclasses.dataclass(frozen=True)
class ServedModels:
    """An endpoint's list of models and what it shows about one of them.

    Attributes:
        names: empty if the endpoint has no such list.
        is_vllm_server: whether vLLM serves the model.
        context: of the model, in tokens; 0: unknown.
    """

    names: tuple[str, ...] = ()
    is_vllm_server: bool = False
    context: int = 0

    def unknown(self, model: str, address: str, reason: str) -> str:
        """A message for the user: the endpoint does not serve the model."""
        names = difflib.get_close_matches(model, self.names, n=3, cutoff=0.5)
        names += [name for name in sorted(self.names) if name not in names]
        offers = f"; it serves {', '.join(names[:_SHOWN_MODELS])}" if names else ""
        more = f" and {len(names) - _SHOWN_MODELS} more" if len(names) > _SHOWN_MODELS else ""
        hint = "" if names else ". Check the model's name, and the end of base_url (often /v1)"
        return f"{address} does not serve {model!r} ({reason}){offers}{more}{hint}"


def served_models(reply: Any, model: str) -> ServedModels:
    """The list of models in a server's reply; empty if it has another form."""
    listed = reply.get("data") if isinstance(reply, Mapping) else reply
    entries = [e for e in listed if isinstance(e, Mapping)] if isinstance(listed, list) else []
    names, is_vllm, context = [], False, 0
    for entry in entries:
        if not isinstance(entry.get("id"), str):
            continue
        names.append(entry["id"])
        if entry["id"] == model:
            is_vllm = entry.get("owned_by") == "vllm"
            limit = entry.get("max_model_len")
            context = limit if isinstance(limit, int) else 0
    return ServedModels(tuple(names), is_vllm, context)


def read_completion(value: Any, sampling: Sampling, prompt_tokens: int, charge: Charge, note: Note) -> Completion:
    """The completion in a server's reply. Raises Again if it has another form; it is charged all the same.

    Args:
        prompt_tokens: the estimate that replaces a missing or impossible figure of the server.
    """
    try:
        choice = value["choices"][0]
        message = choice["message"]
        finish = str(choice.get("finish_reason") or "unknown")
        text, said = message.get("content"), message.get("refusal")
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        if text is None and said:
            text, finish = said, "refusal"
        if not isinstance(text, str | None) or finish == "error":
            raise TypeError("no text")
        text = text or ""
        estimate = reply_token_estimate(text)
        used = reported_usage(value, prompt_tokens, estimate, note)
        return Completion(
            text=text,
            finish_reason=_FINISHES.get(finish, finish),
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens or (estimate if text else 0),
            cached_tokens=used.cached_tokens,
            logprobs=_token_logprobs(choice.get("logprobs"), sampling.logprobs, note),
        )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        charge(reported_usage(value, prompt_tokens, sampling.max_tokens, note))
        holds = ", ".join(sorted(map(str, value))[:8]) if isinstance(value, Mapping) else type(value).__name__
        raise Again(f"the reply is not a chat completion (it contains {holds})", "call") from None


def reported_usage(value: Any, prompt_tokens: int, new_tokens: int, note: Note) -> Used:
    """The tokens of one reply, with the estimates for what the server does not report, or reports impossibly."""
    usage = value.get("usage") if isinstance(value, Mapping) else None
    if not isinstance(usage, Mapping):
        if usage is not None:
            note("reports usage that is no object; estimates replace it in counts and costs")
        return Used(1, prompt_tokens, 0, new_tokens)

    def figure(holder: Mapping[str, Any], name: str, estimate: int) -> int:
        if name not in holder:
            return estimate
        tokens = holder[name]
        if isinstance(tokens, int | float) and not isinstance(tokens, bool) and 0 <= tokens <= _MOST_TOKENS:
            return int(tokens)
        note(f"reports {name} that are no number of tokens; estimates replace them in counts and costs")
        logger.debug("%s is %.80r", name, tokens)
        return estimate

    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, Mapping) else {}
    # Some servers send both fields, one of them null.
    caches = [(details, "cached_tokens"), (usage, "prompt_cache_hit_tokens")]
    cached = next((figure(holder, name, 0) for holder, name in caches if holder.get(name) is not None), 0)
    prompt = figure(usage, "prompt_tokens", prompt_tokens) or prompt_tokens
    return Used(1, prompt, min(cached, prompt), figure(usage, "completion_tokens", new_tokens))


def _token_logprobs(logprobs: Any, most: int | None, note: Note) -> TokenLogprobs | None:
    """Per generated token the sampled one first, then up to `most` others by falling probability. None if they were not
    requested, are missing or cannot be read: that is no reason to pay for another reply."""
    if most is None or not logprobs:
        return None
    try:
        if logprobs.get("content") is None:
            return None
        tokens: TokenLogprobs = []
        for step in logprobs["content"]:
            others = [
                (str(other["token"]), _log_probability(other["logprob"]))
                for other in step.get("top_logprobs") or []
                if other["token"] != step["token"] or other["logprob"] != step["logprob"]
            ]
            others.sort(key=lambda pair: -pair[1])
            tokens.append([(str(step["token"]), _log_probability(step["logprob"])), *others[:most]])
        return tokens
    except (TypeError, ValueError, LookupError, AttributeError):
        note("reports log-probabilities that cannot be read; they are left out")
        return None


def _log_probability(value: Any) -> float:
    """A finite figure of at most 0, also for probability 0 and for a 1 that rounding made larger."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value < _ROUNDING:
        raise ValueError(f"{value!r} is no log-probability")
    return max(_LEAST_LOGPROB, min(0.0, float(value)))
