"""Token ids of chats under a policy's own tokenizer and chat template, as TRL computes them."""

from __future__ import annotations

import collections
import functools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray_pipeline.engines.models import TokenizerSettings
from ray_pipeline.engines.system_role import renders_system, without_system

Messages = Sequence[Mapping[str, str]]


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
        self._has_system = renders_system(lambda chat: self._text(chat, True))
        self._cache: collections.OrderedDict[tuple[Any, ...], array[int]] = collections.OrderedDict()

    @classmethod
    def load(cls, given: TokenizerSettings) -> TokenCounter:
        """From a local folder or a model of the hub."""
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
        text = self._text(chat if self._has_system else without_system(chat), completion is None)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self._cache[key] = array("i", ids)
        if len(self._cache) > self._size:
            self._cache.popitem(last=False)
        return ids

    def _text(self, chat: Messages, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(m) for m in chat], tokenize=False, add_generation_prompt=prompt, **self._args
        )
        return text


def token_counter(tokenizer: TokenizerSettings) -> TokenCounter:
    """The counter of this tokenizer, loaded once per process."""
    return _token_counter(tokenizer.model_dump_json())


@functools.cache
def _token_counter(tokenizer: str) -> TokenCounter:
    return TokenCounter.load(TokenizerSettings.model_validate_json(tokenizer))
