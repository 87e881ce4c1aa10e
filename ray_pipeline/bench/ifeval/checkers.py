"""IFEval's official checkers, which the extra `ifeval` brings (lm-eval), and their versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.bench.files import BenchmarkFileError

#: Package versions that decide verdicts beside lm-eval's own.
_PACKAGES = ("lm_eval", "nltk", "langdetect")


class CheckersMissing(BenchmarkFileError):
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


_INSTALL = (
    "IFEval needs the official checkers, which are not installed: pip install 'quorum-align[ifeval]' "
    "(or lm-eval[ifeval])"
)


@dataclasses.dataclass(frozen=True)
class Checkers:
    """lm-eval's registry of checkers and its two ways to call them, loaded by `load_checkers`."""

    registry: Mapping[str, Any]
    example: Callable[..., Any]
    strict: Callable[[Any, str], Any]
    loose: Callable[[Any, str], Any]


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
