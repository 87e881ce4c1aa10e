"""Floors: trivial baselines. Their scores are what a benchmark gives without any skill.

A judged benchmark on which one of them does well measures its judge's weakness (Zheng et al. 2024, "Cheating Automatic
LLM Benchmarks", arXiv 2410.07137: a constant text won 86 % of AlpacaEval 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Message = Mapping[str, str]

#: The constant answer, where no other is given: polite, and about nothing.
CONSTANT = "Thank you for your question. Here is a complete, accurate and helpful answer to it."


def empty(messages: Sequence[Message]) -> str:
    """No text at all."""
    return ""


def x(messages: Sequence[Message]) -> str:
    """The letter x."""
    return "x"


def echo(messages: Sequence[Message]) -> str:
    """The last user message, word for word. Raises ValueError where there is none."""
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    raise ValueError("echo needs a user message to repeat")


def constant(text: str = CONSTANT) -> Callable[[Sequence[Message]], str]:
    """A baseline that always answers `text`."""
    return lambda messages: text


#: name → (messages of the conversation so far) -> answer.
FLOORS: Mapping[str, Callable[[Sequence[Message]], str]] = {
    "empty": empty,
    "x": x,
    "echo": echo,
    "constant": constant(),
}
