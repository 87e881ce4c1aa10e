"""Error messages of a configuration: the key as written in the file, the problem, and the nearest known key."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ray_pipeline.store.secrets import redact

#: Names in pydantic's lists of them.
_QUOTED = re.compile("'([^']*)'")


class ConfigError(ValueError):
    """The configuration cannot be used. Each line of the message names a key and a remedy."""


def explain(error: ValidationError, kind: type[BaseModel], source: str) -> str:
    """All problems of a configuration on one line.

    Args:
        kind: class that refused the values; its keys are the suggestions.
        source: file or command that the values come from.
    """
    return redact(f"{source}: " + "; ".join(_line(problem, kind) for problem in error.errors()))


def first_problem(error: ValidationError) -> str:
    """The first problem of a block that is validated separately."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
    return redact(f"{where}: {message}" if where else message)


def nearest(name: str, known: Iterable[Any]) -> str:
    """End of a message: the closest known name, else all of them, else nothing."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(names)}" if names else ""


def installing(extra: str) -> str:
    """The command that installs an extra here. No index has Quorum itself, so without a checkout its requirements are
    named."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        place = "." if checkout == Path.cwd() else str(checkout)
        return f"pip install '{place}[{extra}]'"
    wanted = re.compile(rf"""extra\s*==\s*["']{extra}["']""")
    found = [r.partition(";") for r in importlib.metadata.requires("quorum-align") or []]
    return " ".join(["pip install", *(f"'{name.strip()}'" for name, _, marker in found if wanted.search(marker))])


def _line(problem: Any, kind: type[BaseModel]) -> str:
    where = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in where)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(str(where[-1]), _fields_at(kind, where[:-1]))}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"].startswith("union_tag_"):
        union = problem["ctx"]
        key = ".".join([*([key] if key else []), union["discriminator"].strip("'")])
        if "tag" not in union:
            return f"{key}: missing"
        return f"{key}: unknown value {union['tag']!r}{nearest(union['tag'], _QUOTED.findall(union['expected_tags']))}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = f" (it is {value!r})" if isinstance(value, (str, int, float, bool)) else ""
    return f"{key}: {message}{shown}" if key else message


def _fields_at(kind: Any, where: Sequence[Any]) -> list[str]:
    """Names of the keys at a place of the configuration, derived from its types."""
    types = [kind]
    for part in where:
        inner: list[Any] = []
        for one in types:
            for model in _models_in(one):
                if isinstance(part, str) and part in model.model_fields:
                    inner.append(model.model_fields[part].annotation)
                elif isinstance(part, str) and part == getattr(model.model_fields.get("type"), "default", None):
                    inner.append(model)
            if get_origin(one) in (list, tuple, dict):
                inner += [a for a in get_args(one) if isinstance(part, int) or a is not str]
        types = inner or types
    return sorted({name for one in types for model in _models_in(one) for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Model classes inside an annotation such as `tuple[Rubric, ...]` or `A | B`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
