"""The interface of all engines of chat models.

Agents depend only on this module: a message list and a :class:`Sampling` go in, one :class:`Completion`
comes out. Engines are exchangeable behind :class:`ChatEngine`, and so is the call log in front of them.
It imports nothing heavy, so that config, agents and tests load in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ray_pipeline.store.files import Folder

Message = dict[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""

TokenLogprobs = list[list[tuple[str, float]]]
"""Per generated token its alternatives as (decoded token text, natural log of the probability);
the sampled token comes first, the others follow in falling order."""


def _canonical(value: Any) -> str:
    """JSON text that is equal for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Grammar:
    """A format that the reply is forced into during sampling (structured output).

    ``value`` is always text, so that a grammar can be compared, hashed and put into a call key:
    for ``choice`` a JSON list of strings, for ``regex`` the pattern, for ``json`` the schema as
    canonical JSON text. Use the three constructors rather than the fields.
    """

    kind: Literal["choice", "regex", "json"]
    value: str

    @classmethod
    def choice(cls, options: Sequence[str]) -> Grammar:
        """The reply is exactly one of ``options``. Raises ValueError if there are none."""
        if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
            raise ValueError(f"Grammar.choice needs a list of non-empty strings, got {options!r}")
        return cls("choice", _canonical(list(options)))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """The whole reply matches ``pattern``. Raises ValueError if it is empty."""
        if not pattern:
            raise ValueError("Grammar.regex needs a pattern, got an empty string")
        return cls("regex", pattern)

    @classmethod
    def json(cls, schema: Mapping[str, Any]) -> Grammar:
        """The reply is a JSON document of ``schema`` (JSON Schema).

        Keys are written in the order given: engines generate the fields of an object in the order of
        the schema, and a reason before a score is another question than a score before a reason.
        """
        return cls("json", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))

    def decoded(self) -> Any:
        """The Python value: a list of strings, a pattern, or a schema."""
        return self.value if self.kind == "regex" else json.loads(self.value)


@dataclass(frozen=True)
class Sampling:
    """How one reply is drawn. Equal values mean the same call.

    ``max_tokens`` counts new tokens (0 only in ``REWARD``); ``temperature`` 0 is greedy; ``logprobs`` asks for the top
    n of every generated token; ``extra`` goes to the engine as it is, by the engine's own names
    (``top_k``, ``min_p``, ``repetition_penalty``, …).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    extra: tuple[tuple[str, Any], ...] = ()

    def key(self) -> dict[str, Any]:
        """The sampling's part of the call key, as JSON values.

        Numbers are converted to one type (a YAML ``1`` and ``1.0`` are the same temperature) and
        ``extra`` is sorted by name.
        """
        return {
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "max_tokens": int(self.max_tokens),
            "seed": None if self.seed is None else int(self.seed),
            "stop": list(self.stop),
            "logprobs": self.logprobs,
            "grammar": None if self.grammar is None else [self.grammar.kind, self.grammar.value],
            "extra": [[name, value] for name, value in sorted(self.extra, key=lambda pair: pair[0])],
        }


#: Asks a reward model for the score of a whole chat, whose last message is the reply; the completion's text is the
#: number. A chat model writes at least one token.
REWARD = Sampling(max_tokens=0)

#: Finish reasons of several servers -> the common ones.
_FINISHES = {
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "done", "completed"), "stop"),
    **dict.fromkeys(("max_tokens", "max_output_tokens", "max_new_tokens", "model_length", "truncated"), "length"),
    **dict.fromkeys(("content-filter", "safety", "blocklist", "prohibited_content"), "content_filter"),
}


def common_finish(reason: str) -> str:
    """A finish reason in lower case, and in the common word where it is a known one."""
    name = reason.strip().lower()
    return _FINISHES.get(name, name)


@dataclass(frozen=True)
class Completion:
    """One reply and what it cost.

    ``finish_reason`` is ``"stop"``, ``"length"`` or another word of the engine; only ``"stop"`` is a
    finished reply. ``cached_tokens`` of the ``prompt_tokens`` came from the prefix cache.
    ``latency_s`` is wall time in seconds from call to reply, queueing included. ``unread_cost`` is the price of
    earlier replies to the same call that could not be read.

    ``thoughts`` are what the model wrote before its answer, which ``text`` is; ``raw`` is then the reply as it came
    (see ``thoughts.answered``). Of that, ``reasoning`` are thoughts in a field of their own, and ``inside`` is whether
    it starts inside a thought, because its prompt ends with an opening tag. ``answered_by`` is the model that
    the server says it used, ``reasoning_tokens`` are those of the ``completion_tokens`` that were thoughts, and
    ``prompt_cut`` is whether the server left out a part of the prompt (see ``usage.prompt_was_cut``).
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    logprobs: TokenLogprobs | None = None
    latency_s: float = 0.0
    from_log: bool = False
    unread_cost: float = 0.0
    thoughts: str | None = None
    reasoning: str | None = None
    inside: bool = False
    answered_by: str = ""
    reasoning_tokens: int | None = None
    prompt_cut: bool = False
    raw: Completion | None = None


class EngineError(RuntimeError):
    """One call failed. Its row gets a status and the shard continues.

    Attributes:
        rejection: words of the server or the chat template that rejected the call, which may concern every call; "" if
            the call failed otherwise, or was rejected for its text.
        unread_cost: as of a :class:`Completion`.
        final: whether the call would fail again; if not, its shard is not finished, and the call is made again.
    """

    rejection: str = ""
    final: bool = True
    unread_cost: float = 0.0


class CallFailed(EngineError):
    """One call failed for now, and may be answered when it is made again."""

    final = False


def rejected(words: str) -> EngineError:
    """The error for a call that was rejected in these words, which may concern every call."""
    error = EngineError(words)
    error.rejection = words
    return error


class PromptTooLong(EngineError):
    """Prompt and new tokens do not fit the model's context. Engines raise this and never truncate.

    All three figures are tokens; the limit is 0 if the server does not report it. `reason` has the server's own words.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, limit: int, reason: str = "") -> None:
        context = f"context of {limit} tokens" if limit else "server's context"
        super().__init__(
            f"prompt of {prompt_tokens} tokens + max_tokens {max_tokens} does not fit the {context}; "
            "raise max_model_len (if the model allows it), lower max_tokens, or drop the prompt"
            + (f" ({reason})" if reason else "")
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.limit = limit
        self.reason = reason

    def __reduce__(self) -> tuple[type[PromptTooLong], tuple[int, int, int, str]]:
        # Exceptions pickle by their args (the message); this one is built from its figures and the reason.
        return type(self), (self.prompt_tokens, self.max_tokens, self.limit, self.reason)


class EngineDead(RuntimeError):
    """The engine's process is gone: no later call can succeed.

    Not an :class:`EngineError`, because no row is at fault: the engine's actor must end itself and be
    replaced.
    """


class EngineStop(RuntimeError):
    """No further call makes sense until the user acts; the message says what to do.

    Not an :class:`EngineError`, because no row is at fault, and not :class:`EngineDead`, because another actor would
    fail as well: the stage ends with this message, and the call log keeps all replies.
    """


class EngineStartError(EngineStop):
    """The engine cannot serve this model as configured. The message says what to change."""


class BudgetSpent(EngineStop):
    """The next call could exceed the budget. Raised only when no call of the engine is in progress, so that no paid
    reply is lost."""


@runtime_checkable
class ChatEngine(Protocol):
    """Answers chats. Calls may be awaited concurrently; the engine batches all waiting ones."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the model and everything else that changes replies, as JSON values; never a path.

        Part of every call key.
        """
        ...

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """Draw one reply.

        Raises:
            PromptTooLong: prompt + ``max_tokens`` exceeds the context.
            CallFailed: this call failed for now.
            EngineError: this call was rejected, and would be rejected again; others may still succeed.
            EngineDead: no later call can succeed.
            EngineStop: no further call should be made; the message is for the user.
        """
        ...


@runtime_checkable
class Metered(Protocol):
    """Further methods of a :class:`ChatEngine` whose replies cost money."""

    def cost(self, completion: Completion) -> float:
        """Price of one reply, in the currency of the engine's prices; 0 without prices."""
        ...

    async def settle(self, root: Folder) -> None:
        """Write the engine's spending under `root`, the call log's folder, and read that of other engines."""
        ...


def causes(error: BaseException) -> str:
    """The text of an error and of its causes: some libraries wrap errors in an exception without a message."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 4:
        text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
        if text not in texts:
            texts.append(text)
        cause = cause.__cause__
    return " <- ".join(texts)
