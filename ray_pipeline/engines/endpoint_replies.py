"""Reading an endpoint's replies: the list of its models, and completions."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.engines.account import Used
from ray_pipeline.engines.base import Completion, Sampling, TokenLogprobs, common_finish
from ray_pipeline.engines.endpoint_errors import Again
from ray_pipeline.engines.usage import reply_token_estimate
from ray_pipeline.store.outside import token_count

logger = logging.getLogger("quorum.openai")

Charge = Callable[[Used], None]
"""Counts a reply that cannot be used and that the server charges."""

Note = Callable[[str], None]
"""Receives a message for the user about the endpoint."""

_MOST_TOKENS = 10_000_000  # of a prompt or a reply; more is no figure of a server
_LEAST_LOGPROB = -9999.0  # what OpenAI and vLLM send for probability 0
_ROUNDING = 0.01
_SHOWN_MODELS = 12  # names of an endpoint's models that a message lists

#: Fields of a message with the thoughts that a server splits off.
_REASONING = ("reasoning_content", "reasoning", "thinking")


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
            context = token_count(entry.get("max_model_len"))
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
        reasoning = _reasoning(message)
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text if part.get("type") not in ("thinking", "reasoning"))
        if text is None and said:
            text, finish = said, "refusal"
        finish = common_finish(finish)
        if not isinstance(text, str | None) or finish == "error":
            raise TypeError("no text")
        text = text or ""
        estimate = reply_token_estimate(text)
        used = reported_usage(value, prompt_tokens, estimate, note)
        return Completion(
            text=text,
            finish_reason=finish,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens or (estimate if text else 0),
            cached_tokens=used.cached_tokens,
            logprobs=_token_logprobs(choice.get("logprobs"), sampling.logprobs, note),
            reasoning=reasoning,
            answered_by=value["model"] if isinstance(value.get("model"), str) else "",
            reasoning_tokens=_reasoning_tokens(value.get("usage"), used.completion_tokens),
        )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        charge(reported_usage(value, prompt_tokens, sampling.max_tokens, note))
        holds = ", ".join(sorted(map(str, value))[:8]) if isinstance(value, Mapping) else type(value).__name__
        raise Again(f"the reply is not a chat completion (it contains {holds})", "call") from None


def _reasoning(message: Mapping[str, Any]) -> str | None:
    """The thoughts that a server gives apart from the answer: in a field, or in parts of the content."""
    found = [message[name] for name in _REASONING if isinstance(message.get(name), str) and message[name]][:1]
    content = message.get("content")
    for part in content if isinstance(content, list) and not found else ():
        if part.get("type") in ("thinking", "reasoning"):
            inner = part.get("thinking") or part.get("reasoning") or part.get("text") or ""
            found += [inner] if isinstance(inner, str) else [piece.get("text") or "" for piece in inner]
    return "".join(found) or None


def _reasoning_tokens(usage: Any, most: int) -> int | None:
    """Tokens of the reply that were thoughts, as far as the server reports them."""
    details = usage.get("completion_tokens_details") if isinstance(usage, Mapping) else None
    tokens = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not 0 <= tokens <= most:
        return None
    return int(tokens)


def other_model(asked: str, answered_by: str) -> bool:
    """Whether the name of the model that answered is another one than was asked for.

    A server may answer by the dated version of a name (`gpt-4o-2024-08-06` for `gpt-4o`), or leave out or add the owner
    of a model or the path to its folder.
    """
    names = [re.sub(r"[\s_.:]+", "-", name.strip().lower().rstrip("/")) for name in (asked, answered_by)]
    if not all(names):
        return False
    asked, answered_by = (name.rsplit("/", 1)[-1] for name in names)
    # Possessive: one group of digits can be read in two ways, and a name of many groups would take for ever.
    version = r"(?:-(?:\d{3,}(?:-\d++)*+|v\d+|latest|preview|free))*+"
    pairs = (asked, answered_by), (answered_by, asked)
    return not any(re.fullmatch(re.escape(name) + version, longer) for name, longer in pairs)


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
