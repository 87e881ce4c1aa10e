"""IFEval's official checkers, which the extra `ifeval` brings (lm-eval), their versions, and how they are called."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_pipeline.config.messages import installing

#: Package versions that decide verdicts beside lm-eval's own.
_PACKAGES = ("lm_eval", "nltk", "langdetect")


class CheckersMissing(ValueError):
    """The official checkers cannot run here; the message names what to install."""


def checker_version() -> str:
    """Which checkers judge: versions of the packages that decide verdicts, for the protocol.

    Raises:
        CheckersMissing: the extra is not installed.
    """
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckersMissing(_INSTALL) from error
    return ", ".join(versions) + ", seed 0"


_INSTALL = f"IFEval needs the official checkers, which are not installed: {installing('ifeval')}"


@dataclasses.dataclass(frozen=True)
class Checkers:
    """lm-eval's registry of checkers and its two ways to call them, loaded by `load_checkers`."""

    registry: Mapping[str, Any]
    example: Callable[..., Any]
    strict: Callable[[Any, str], Any]
    loose: Callable[[Any, str], Any]

    def followed(
        self, prompt: str, ids: Sequence[str], arguments: Sequence[Mapping[str, Any]], response: str, *, loose: bool
    ) -> tuple[tuple[bool, ...], bool]:
        """Which constraints a response follows, and whether a checker drew what it looks for at random.

        Language detection and random draws of checkers are reseeded for each call, so that the flags depend on the
        arguments alone; the state of Python's generator is restored.

        Args:
            ids: published names of the constraints (`family:type`).
            arguments: of the checker of each.
            loose: whether the response is also read without its first and last line and without asterisks.

        Returns:
            One flag a constraint; whether Python's generator was used.
        """
        example = self.example(
            key=0, instruction_id_list=list(ids), prompt=prompt, kwargs=[dict(one) for one in arguments]
        )
        with contextlib.suppress(ImportError):
            from langdetect import DetectorFactory

            DetectorFactory.seed = 0
        before = random.getstate()
        random.seed(0)
        start = random.getstate()
        try:
            flags = (self.loose if loose else self.strict)(example, response).follow_instruction_list
            return tuple(map(bool, flags)), random.getstate() != start
        finally:
            random.setstate(before)


def load_checkers() -> Checkers:
    """The official checkers.

    The sentence data that they need is looked for first, because lm-eval would go to the network for it.

    Raises:
        CheckersMissing: the extra, or the tokenizer data `punkt_tab` of nltk, is missing.
    """
    try:
        import nltk
    except ImportError as error:
        raise CheckersMissing(_INSTALL) from error
    # nltk reads NLTK_DATA once, when it is imported; it may have been set since.
    for folder in reversed([f for f in os.environ.get("NLTK_DATA", "").split(os.pathsep) if f]):
        if folder not in nltk.data.path:
            nltk.data.path.insert(0, folder)
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError as error:
        raise CheckersMissing(
            "IFEval needs nltk's tokenizer data punkt_tab (English), and it is in none of "
            f"{', '.join(nltk.data.path)}. With network: python -m nltk.downloader punkt_tab. Without: copy the folder "
            "tokenizers/punkt_tab from another machine and point NLTK_DATA at the folder that holds tokenizers/"
        ) from error
    try:
        from lm_eval.tasks.ifeval import instructions_registry, utils
    except ImportError as error:
        raise CheckersMissing(f"{_INSTALL} [{error}]") from error
    return Checkers(
        instructions_registry.INSTRUCTION_DICT,
        utils.InputExample,
        utils.test_instruction_following_strict,
        utils.test_instruction_following_loose,
    )


#: The official checkers, loaded once a process. Raises CheckersMissing.
checkers = functools.cache(load_checkers)
