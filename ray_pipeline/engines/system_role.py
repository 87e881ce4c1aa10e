"""System messages for models without a system role: their text goes to the head of the user turn, as Gemma 3 has it.

A chat template shows by rendering whether it has the role. An endpoint shows it by the words of a refusal: those of the
templates of Gemma and Mistral (vLLM, TGI, llama.cpp, LM Studio), and of OpenAI, Anthropic, Gemini, Vertex, Bedrock and
ERNIE. The call key is of the messages as asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ray_pipeline.engines.base import Message

_SYSTEM, _USER = "quorumsystem", "quorumuser"

_REFUSED = (
    r"(?:not|n['\u2019]t)\s+(?:be\s+|currently\s+)?(?:supported|enabled|allowed|permitted|accepted|available)"
    r"|unsupported"
)
_NO_SYSTEM = re.compile(
    rf"\b(?:system|developer)[ _-]?(?:role|message|prompt|instruction)s?\b[^.]{{0,30}}\b(?:{_REFUSED})"
    rf"|\brole\b[^.]{{0,12}}\bsystem\b[^.]{{0,30}}\b(?:{_REFUSED})"
    r"|(?:n['\u2019]t|\bnot)\s+(?:support|accept|allow|have)\b[^.]{0,20}"
    r"(?:\b(?:system|developer)[ _-](?:role|message|prompt|instruction)|['\"`]system['\"`])"
    r"|\b(?:unsupported|unexpected|invalid|unknown|unrecognized)\s+(?:message\s+)?(?:role|value)s?[\s:='\"`]*system\b"
    r"|only\s+['\"`]?user['\"`]?,?\s+(?:and|or)\s+['\"`]?(?:assistant|model)['\"`]?\s+roles?\b"
    r"|\brole\b[^.]{0,12}\bsystem\b['\"`]?\s+is\s+(?:an?\s+)?(?:invalid|unknown|unexpected|unrecognized|not\s+valid)"
    r"|\b(?:(?:should|must|may|can)\s+(?:only\s+)?be|permitted|allowed|valid|supported)\b(?:\s+(?:one\s+of|either|roles?|"
    r"values?(?:\s+are)?))?[\s:=\[('\"`]{1,4}user['\"`]?(?:,|,?\s+(?:or|and))\s*['\"`]?(?:assistant|model)\b"
    r"(?![^.]{0,40}\bsystem\b)"
    r"|(?:\u4e0d\u652f\u6301|\u4e0d\u80fd\u4e3a|\u4e0d\u80fd\u662f)[^\u3002]{0,6}(?:system|\u7cfb\u7edf)"
    r"|(?:system|\u7cfb\u7edf)[^\u3002]{0,8}\u4e0d\u652f\u6301",
    re.IGNORECASE,
)
#: Refusals of an order of turns; a system message breaks it if the template takes it for a turn.
_ORDER = re.compile(
    r"roles?\b.{0,20}\bmust alternate|\b(?:first|start)\b.{0,40}\buser\b|must be at the beginning", re.IGNORECASE
)


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with every system text at the head of the next user turn."""
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting += [message["content"]] if message["content"] else []
        elif message["role"] == "user" and waiting:
            folded.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(dict(message))
    if waiting and folded and folded[-1]["role"] == "user":
        waiting = [folded.pop()["content"], *waiting]
    return [*folded, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else folded


def renders_system(render: Callable[[Sequence[Message]], str]) -> bool:
    """Whether a template has a system role: neither it nor the user turn after it is refused or left out."""
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}

    def shows(messages: Sequence[Message]) -> bool:
        try:
            text = render(messages).casefold()
        except Exception:  # templates raise their own errors
            return False
        return all(message["content"] in text for message in messages)

    # A template that cannot render a user turn alone fails for another reason.
    return shows([system, user]) or not shows([user])


def refuses_system(message: str, roles: Sequence[str]) -> bool:
    """Whether a server's words refuse the system messages among those of the roles."""
    if "system" not in roles:
        return False
    if _NO_SYSTEM.search(message):
        return True
    turns = [role for role in roles if role != "system"]
    in_order = turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]
    return in_order and _ORDER.search(message) is not None and "optional system" not in message.lower()
