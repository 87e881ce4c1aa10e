"""Checkers decide whether a response is right. They measure a run; a stage that makes data reads one only as a judge
that the configuration names (`judge.programs`)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import pyarrow as pa
from pydantic import Field, ValidationError

from ray_pipeline.config.messages import first_problem
from ray_pipeline.constraints.official import CheckersMissing, checker_version, checkers
from ray_pipeline.extensions import find, register

#: The key by which a configuration chooses a checker. It is left out of stored settings where it is not set.
CheckerKey = Annotated[
    str | None,
    Field(
        description="what decides whether a response is right: `ifeval` or `ifeval_loose` (the official checkers, for "
        "prompts with constraints), or a file that registers a checker (my_checker.py); default: the prompts' own, "
        "where all are from the pocket world or all from `constrained`",
        exclude_if=lambda reference: reference is None,
    ),
]

#: Label of a prompt source → the checker of its prompts.
_OF_SOURCE = {"pocket": "pocket", "constrained": "ifeval"}
CHECKED_SOURCES = tuple(_OF_SOURCE)
_OFFICIAL = ("ifeval", "ifeval_loose")


class Checked(NamedTuple):
    """What a checker finds.

    Attributes:
        share: of its requirements that the response meets, from 0 to 1; the response is right at 1.
        reason: for a reader, such as the requirements that it does not meet.
    """

    share: float
    reason: str = ""


class Checker(Protocol):
    """Register a function of this form under the kind `checker`, or a class of `Settings` whose instances are called
    like it and whose keys are the options; a method `ready` of it raises CheckersMissing where it cannot run. A third
    parameter named `meta` gets the prompt's."""

    def __call__(self, prompt: Sequence[Mapping[str, str]], response: str, /) -> bool | float | Checked | None:
        """Whether a response to chat messages is right, or the share of its requirements that it meets; None where
        that cannot be decided."""
        ...


#: A resolved checker: messages, response and meta (JSON text) → what it finds.
Check = Callable[[Sequence[Mapping[str, str]], str, str], Checked | None]


@register("checker", "pocket")
def pocket(prompt: Sequence[Mapping[str, str]], response: str) -> bool | None:
    """The pocket world's: whether the content is the truth."""
    from ray_pipeline.pocket.tasks import is_correct

    return is_correct(prompt[-1]["content"], response)


@register("checker", "ifeval")
def ifeval(prompt: Sequence[Mapping[str, str]], response: str, meta: Mapping[str, Any]) -> Checked | None:
    """IFEval's official checkers, strict, on the constraints in `meta`; None for a prompt without any."""
    return _official(prompt, response, meta, loose=False)


@register("checker", "ifeval_loose")
def ifeval_loose(prompt: Sequence[Mapping[str, str]], response: str, meta: Mapping[str, Any]) -> Checked | None:
    """The same, loose: also without first line, last line or asterisks."""
    return _official(prompt, response, meta, loose=True)


def _official(
    prompt: Sequence[Mapping[str, str]], response: str, meta: Mapping[str, Any], *, loose: bool
) -> Checked | None:
    ids = meta.get("instruction_id_list")
    if not ids:
        return None
    if unknown := [name for name in ids if name not in checkers().registry]:
        raise ValueError(f"no official checker for {', '.join(unknown)}, which a prompt's instruction_id_list has")
    kwargs = meta.get("kwargs") or [{}] * len(ids)
    flags, _ = checkers().followed(prompt[-1]["content"], ids, kwargs, response, loose=loose)
    broken = [name for name, followed in zip(ids, flags, strict=True) if not followed]
    return Checked(1 - len(broken) / len(flags), f"not followed: {', '.join(broken)}" if broken else "all followed")


def checker_digests(reference: str) -> dict[str, str]:
    """What decides a checker's verdicts beside its own file, for the fingerprint of a stage.

    Raises:
        CheckersMissing: the packages of the official checkers are not installed.
    """
    return {"checkers": checker_version()} if reference in _OFFICIAL else {}


def check_checker(reference: str, options: Mapping[str, Any] | None = None) -> Check:
    """The checker of this name or file, which can run here; arguments and errors as of `load_checker`.

    Raises:
        CheckersMissing: the checker cannot run here.
    """
    function = _resolved(reference, options)
    if reference in _OFFICIAL:
        checkers()
    elif (ready := getattr(function, "ready", None)) is not None:
        ready()
    return _check_of(reference, function)


def load_checker(reference: str, options: Mapping[str, Any] | None = None) -> Check:
    """The checker of this name or file.

    Args:
        options: the keys of a checker that is a class of settings; a function takes none.

    Raises:
        ExtensionError: no such checker.
        ValueError: the options do not fit it.
    """
    return _check_of(reference, _resolved(reference, options))


def _resolved(reference: str, options: Mapping[str, Any] | None) -> Callable[..., bool | float | Checked | None]:
    found: Any = find("checker", reference).value
    if isinstance(found, type):
        try:
            found = found(**(options or {}))
        except ValidationError as error:
            raise ValueError(f"checker {reference}: options: {first_problem(error)}") from error
    elif options:
        raise ValueError(f"checker {reference} takes no options; remove {', '.join(options)}")
    function: Callable[..., bool | float | Checked | None] = found
    return function


def _check_of(reference: str, function: Callable[..., bool | float | Checked | None]) -> Check:
    takes_meta = "meta" in inspect.signature(function).parameters

    def check(prompt: Sequence[Mapping[str, str]], response: str, meta: str) -> Checked | None:
        found = function(prompt, response, json.loads(meta)) if takes_meta else function(prompt, response)
        if found is None or isinstance(found, Checked):
            return found
        if not 0 <= found <= 1:
            raise ValueError(f"checker {reference} returned {found!r}; a share is between 0 and 1")
        return Checked(float(found))

    return check


def default_checker(sources: Iterable[str]) -> str | None:
    """Name of the checker of these prompts, where they have one.

    Args:
        sources: column `source` of the prompts, or labels of the sources.
    """
    labels = set(sources)
    return _OF_SOURCE.get(labels.pop()) if len(labels) == 1 else None


def checker_of(reference: str | None, sources: Iterable[str]) -> Check | None:
    """The checker that a configuration chooses; without a choice that of the prompts (see `default_checker`), if it can
    run here.

    Raises:
        ExtensionError: no such checker.
    """
    if reference is not None:
        return load_checker(reference)
    default = default_checker(sources)
    try:
        return None if default is None else check_checker(default)
    except CheckersMissing:
        return None


def with_truth(answers: pa.Table, prompts: pa.Table, reference: str | None = None) -> pa.Table:
    """`answers` with columns `correct` (bool) and `followed` (share of the requirements that are met), where there is
    a checker; both are null without a response or a decision.

    Args:
        answers: columns prompt_id and response.
        prompts: columns prompt_id, messages, source and meta.
    """
    check = checker_of(reference, prompts["source"].to_pylist())
    if check is None:
        return answers
    known = {row["prompt_id"]: row for row in prompts.select(["prompt_id", "messages", "meta"]).to_pylist()}
    found = [
        None if text is None else check(known[prompt]["messages"], text, known[prompt]["meta"])
        for prompt, text in zip(answers["prompt_id"].to_pylist(), answers["response"].to_pylist(), strict=True)
    ]
    correct = pa.array([None if one is None else one.share == 1 for one in found], pa.bool_())
    followed = pa.array([None if one is None else one.share for one in found], pa.float64())
    return answers.append_column("correct", correct).append_column("followed", followed)
