"""Checkers decide whether a response is right. They measure a run; no stage that makes data reads one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Protocol

import pyarrow as pa
from pydantic import Field

from ray_pipeline.extensions import find, register

#: The key by which a configuration chooses a checker. It is left out of stored settings where it is not set.
CheckerKey = Annotated[
    str | None,
    Field(
        description="what decides whether a response is right: a name, or a file that registers a checker "
        "(my_checker.py); default: the pocket world's, for runs on its prompts alone",
        exclude_if=lambda reference: reference is None,
    ),
]


class Checker(Protocol):
    """Register a function of this form under the kind `checker`."""

    def __call__(self, prompt: Sequence[Mapping[str, str]], response: str, /) -> bool | None:
        """Whether a response to chat messages is right; None where that cannot be decided."""
        ...


@register("checker", "pocket")
def pocket(prompt: Sequence[Mapping[str, str]], response: str) -> bool | None:
    """The pocket world's: whether the content is the truth."""
    from ray_pipeline.pocket.tasks import is_correct

    return is_correct(prompt[-1]["content"], response)


def checker_of(reference: str | None, sources: Iterable[str]) -> Checker | None:
    """The checker that a configuration chooses; without a choice the pocket world's where all prompts are from it.

    Args:
        sources: column `source` of the prompts.

    Raises:
        ExtensionError: no such checker.
    """
    if reference is None and any(source != "pocket" for source in sources):
        return None
    found: Checker = find("checker", reference or "pocket").value
    return found


def with_truth(answers: pa.Table, prompts: pa.Table, reference: str | None = None) -> pa.Table:
    """`answers` with a column `correct` (bool; null without a response or a decision), where there is a checker.

    Args:
        answers: columns prompt_id and response.
        prompts: columns prompt_id, messages and source.
    """
    checker = checker_of(reference, prompts["source"].to_pylist())
    if checker is None:
        return answers
    messages = dict(zip(prompts["prompt_id"].to_pylist(), prompts["messages"].to_pylist(), strict=True))
    correct = [
        None if text is None else checker(messages[prompt], text)
        for prompt, text in zip(answers["prompt_id"].to_pylist(), answers["response"].to_pylist(), strict=True)
    ]
    return answers.append_column("correct", pa.array(correct, pa.bool_()))
