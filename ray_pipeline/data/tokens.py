"""Token ids of chats under a policy's own tokenizer and chat template, as TRL computes them; or an estimate."""

from __future__ import annotations

import collections
import functools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray_pipeline.engines.chat_template import folding, render
from ray_pipeline.engines.imports import heavy_imports, without_torch
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings

Messages = Sequence[Mapping[str, str]]

#: Bytes of UTF-8 that an estimate takes for one token: about right for English, high for other scripts.
BYTES_PER_TOKEN = 4


class Encode(Protocol):
    """Token ids of a chat under the policy's template: of the prompt, ready for an answer, or of prompt and answer."""

    def __call__(self, messages: Messages, completion: Messages | None, /) -> list[int]: ...


class TokenCounter:
    """`Encode` with a Hugging Face tokenizer, as TRL tokenises chats. Remembers the last `cache_size` chats.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Any, cache_size: int = 4096, chat_template_args: Mapping[str, Any] | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "of the policy"
            raise ValueError(f"the tokenizer {name} has no chat template; use an instruct model or add a template")
        self._tokenizer, self._args = tokenizer, dict(chat_template_args or {})
        self._size = cache_size
        self._fold = folding(tokenizer, self._args)
        self._cache: collections.OrderedDict[tuple[Any, ...], array[int]] = collections.OrderedDict()

    @classmethod
    def load(cls, given: TokenizerSettings) -> TokenCounter:
        """From a local folder or a model of the hub."""
        # The code of a repository may import what it likes.
        with heavy_imports() if given.trust_remote_code else without_torch():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                given.model, revision=given.revision, trust_remote_code=given.trust_remote_code
            )
            return cls(tokenizer, chat_template_args=given.chat_template_args)

    def __call__(self, messages: Messages, completion: Messages | None = None) -> list[int]:
        chat = [dict(m) for m in (*messages, *(completion or ()))]
        key = (completion is None, *((m["role"], m["content"]) for m in chat))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key].tolist()
        folded = chat if self._fold is None else self._fold(chat)
        text = render(self._tokenizer, folded, self._args, generation_prompt=completion is None)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self._cache[key] = array("i", ids)
        if len(self._cache) > self._size:
            self._cache.popitem(last=False)
        return ids


class TokenEstimate:
    """`Encode` without a tokenizer: every `BYTES_PER_TOKEN` bytes of a chat's UTF-8 text are one token."""

    def __call__(self, messages: Messages, completion: Messages | None = None) -> list[int]:
        text = "\n".join(m["content"] for m in (*messages, *(completion or ()))).encode("utf-8", "surrogatepass")
        return array("I", text + bytes(-len(text) % BYTES_PER_TOKEN)).tolist()


def counted_with(model: ModelSettings | None) -> str:
    """How the tokens of training rows are counted, for the report and the cards."""
    if model is None:
        return f"an estimate of one token per {BYTES_PER_TOKEN} bytes of UTF-8 text, without a tokenizer"
    return f"the tokenizer of {model.shown}"


def counter_identity(model: ModelSettings | None) -> dict[str, str]:
    """Part of a stage's fingerprint that says how it counts tokens."""
    return {"tokens": f"{BYTES_PER_TOKEN} bytes each"} if model is None else model.weights()


def token_counter(tokenizer: TokenizerSettings | None) -> Encode:
    """The counter of this tokenizer, loaded once per process; without a tokenizer an estimate."""
    return TokenEstimate() if tokenizer is None else _token_counter(tokenizer.model_dump_json())


@functools.cache
def _token_counter(tokenizer: str) -> TokenCounter:
    return TokenCounter.load(TokenizerSettings.model_validate_json(tokenizer))
