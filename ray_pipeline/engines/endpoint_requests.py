"""The body of a request for a reply, adapted to what the server rejects.

Chat templates: a server of open models renders messages into its template as text and tokenises the result (vLLM: its
renderers), so that a ``<|im_end|>`` in a candidate ends the judge's message there, unless the template prevents it. The
in-process engine can split such strings by token (`chat_template`), but an endpoint accepts only text:
``break_control_strings`` inserts an invisible space into every string that looks like one.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_pipeline.engines.base import EngineStop, Grammar, Message, Sampling
from ray_pipeline.engines.endpoint_errors import SYSTEM_ROLE, Refused
from ray_pipeline.engines.endpoint_settings import OpenAISpec
from ray_pipeline.engines.system_role import without_system

#: Ends a warning about structured output that a server does not support.
AS_TEXT = "such replies are requested as text and read by the parsers"

#: Ends a warning about system messages that a server does not take.
AS_USER = "their text is put at the head of the user turn"

#: Control strings in the templates of common open models (ChatML, Llama, Gemma, Mistral, Phi, DeepSeek).
_CONTROL_STRINGS = re.compile(
    r"<(?=[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|/?s>|(?:start|end)_of_turn>|(?:bos|eos|pad|unk)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\])"
)
_INVISIBLE = "\u200b"  # zero-width space

#: JSON Schema keywords that some servers reject; without them the format of a reply is still right.
_BOUNDS = frozenset({"minLength", "maxLength", "minimum", "maximum", "pattern", "minItems", "maxItems"})


class Requests:
    """Builds the requests to one endpoint and remembers which forms it rejects.

    Args:
        warn: called with each message for the user.
    """

    def __init__(self, spec: OpenAISpec, warn: Callable[[str], None]) -> None:
        self._settings = settings = spec.endpoint
        self._at = f"{spec.model!r} at {settings.address}"
        self._warn = warn
        self.is_vllm_server = False
        self.text_only = settings.structured == "text"  # request no structured output
        self._relaxed: dict[Grammar, int] = {}  # grammar -> number of its forms that the server rejected
        name = settings.max_tokens_name
        openai_itself = urllib.parse.urlsplit(settings.base_url).hostname == "api.openai.com"
        self._max_tokens = name if name != "auto" else "max_completion_tokens" if openai_itself else "max_tokens"
        self._renamed = False
        self.no_system = False  # put system messages into the user turn

    @property
    def uses_vllm_fields(self) -> bool:
        mode = self._settings.structured
        return mode == "vllm" or (mode == "auto" and self.is_vllm_server)

    def body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        """The request's body, without the model."""
        body: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._max_tokens: sampling.max_tokens,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        if sampling.grammar is not None:
            forms, step = self._forms(sampling.grammar), self._relaxed.get(sampling.grammar, 0)
            body |= forms[step] if step < len(forms) else {}
        body |= self._settings.extra_body
        body |= dict(sampling.extra)
        body = {name: value for name, value in body.items() if name not in self._settings.omit}
        return {"messages": self._sent(messages), **body}

    def gave_up(self, grammar: Grammar) -> bool:
        """Whether the server rejected every form of the grammar."""
        return self._relaxed.get(grammar, 0) >= len(self._forms(grammar))

    def _sent(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        if self.no_system:
            messages = without_system(messages)
        if not self._settings.break_control_strings:
            return [dict(m) for m in messages]
        return [{**m, "content": broken_control_strings(m["content"])} for m in messages]

    def _forms(self, grammar: Grammar) -> list[dict[str, Any]]:
        """Forms of requesting a grammar from this server, strictest first; plain text follows the last."""
        if self.text_only:
            return []
        if grammar.kind != "json":
            if self.uses_vllm_fields:
                return [{"structured_outputs": {grammar.kind: grammar.decoded()}}]
            self._warn(
                f"{self._settings.address} is not a vLLM server and supports no {grammar.kind} grammar; {AS_TEXT}"
            )
            return []
        schema = grammar.decoded()
        loose = _without_bounds(schema)
        return [
            {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": s, "strict": True}}}
            for s in ([schema] if loose == schema else [schema, loose])
        ]

    def adapt(self, refused: Refused, body: Mapping[str, Any], sampling: Sampling) -> None:
        """Adapt later requests to a rejection of `body`.

        Raises:
            EngineStop: nothing is left to change.
        """
        name = refused.parameter
        if name == "response_format":
            self._loosen(refused, body, sampling)
            return
        if name == SYSTEM_ROLE:
            if not self.no_system:  # otherwise another call has adapted it meanwhile
                self.no_system = True
                self._warn(f"{self._at} rejects system messages ({refused}); {AS_USER}")
            return
        if name in ("max_tokens", "max_completion_tokens") and self._settings.max_tokens_name == "auto":
            if name != self._max_tokens:  # another call has adapted it meanwhile
                return
            if not self._renamed:
                self._renamed = True
                self._max_tokens = "max_tokens" if name == "max_completion_tokens" else "max_completion_tokens"
                return
        raise EngineStop(
            f"{self._at} rejects the parameter {name!r} ({refused}); change the sampling, or add it to endpoint.omit "
            "so that it is never sent"
        )

    def _loosen(self, refused: Refused, body: Mapping[str, Any], sampling: Sampling) -> None:
        grammar = sampling.grammar
        assert grammar is not None  # otherwise no structured output was requested
        forms, step = self._forms(grammar), self._relaxed.get(grammar, 0)
        if step >= len(forms) or any(body.get(key) != value for key, value in forms[step].items()):
            return  # another call has adapted it meanwhile
        last = step + 1 == len(forms)
        if last and self._settings.structured != "auto":
            raise EngineStop(
                f"{self._at} rejects structured output ({refused}); set endpoint.structured: text to read replies "
                "without it (auto falls back to that)"
            )
        self._relaxed[grammar] = step + 1
        fallback = AS_TEXT if last else "retrying without the schema's bounds"
        self._warn(f"{self._at} rejects structured output ({refused}); {fallback}")


def broken_control_strings(text: str) -> str:
    """The text with a zero-width space after the first character of everything that looks like a control token."""
    return _CONTROL_STRINGS.sub(lambda match: match.group() + _INVISIBLE, text)


def prompt_token_estimate(messages: Sequence[Message]) -> int:
    """A high estimate of the prompt's tokens: most tokenizers make less than one token of three bytes."""
    return sum(len(m["content"].encode("utf-8", "replace")) // 3 + 8 for m in messages) + 8


def _without_bounds(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        properties = schema.get("properties")
        kept = {name: _without_bounds(value) for name, value in schema.items() if name not in _BOUNDS}
        if isinstance(properties, Mapping):  # its keys are names, not keywords
            kept["properties"] = {name: _without_bounds(value) for name, value in properties.items()}
        return kept
    return [_without_bounds(item) for item in schema] if isinstance(schema, list) else schema
