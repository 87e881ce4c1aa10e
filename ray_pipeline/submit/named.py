"""The files and folders that a configuration names, so that they are packaged or their absence is reported."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.submit.package import PackageError

#: Blocks that name output, which is never packaged.
_OUTPUT = ("run", "calls")
#: Keys whose value is a path even if it is a single word that a folder of that name exists for.
_PATH_KEYS = ("path", "file", "folder", "dir", "root", "adapter", "template", "prompts_file")


@dataclasses.dataclass(frozen=True)
class Named:
    """What a configuration names.

    Attributes:
        inside: paths relative to the working directory.
        elsewhere: key → absolute path outside it, which every node must have.
    """

    inside: tuple[str, ...]
    elsewhere: dict[str, str]


def named_files(values: Mapping[str, Any], root: Path, workflow: str = "") -> Named:
    """The files and folders that the values of a configuration name.

    A value names a file if it is the path of one that exists, seen from `root`; `FILE.py:NAME` refers to an extension.
    A single word names a folder only under a key that takes a path.

    Args:
        workflow: the first argument of `quorum run`, which may be a file as well.

    Raises:
        PackageError: a relative path leaves the folder, so that it cannot be right on the cluster.
    """
    inside: dict[str, None] = {}
    elsewhere: dict[str, str] = {}
    for key, text in [("WORKFLOW", workflow), *_texts(values, "")]:
        for path in _paths(key, text, root):
            where = Path(os.path.normpath(root / path))
            if os.path.isabs(path):
                elsewhere[key] = path
            elif not where.is_relative_to(root):
                raise PackageError(
                    f"{key} names {text}, which is outside the working directory {root}; copy it into the directory, "
                    "set --working-dir, or name an absolute path that every node can read"
                )
            elif where != root:
                inside[where.relative_to(root).as_posix()] = None
    return Named(tuple(inside), elsewhere)


def _paths(key: str, text: str, root: Path) -> list[str]:
    """The existing paths that a value names, by a path, a pattern or a reference to an extension."""
    if "://" in text or "\n" in text or "\0" in text or len(text) > 1000 or not text.strip():
        return []
    for candidate in (text, text.rpartition(":")[0]):
        path = os.path.expanduser(candidate)
        try:
            if candidate and _is_there(root / path, folder=_may_be_folder(key, path)):
                return [path]
        except (OSError, ValueError):
            return []
    if glob.has_magic(text) and ("/" in text or text.startswith("*.")):
        return [path for path in glob.glob(os.path.expanduser(text), root_dir=root) if os.path.isfile(root / path)]
    return []


def _is_there(path: Path, folder: bool) -> bool:
    return path.is_file() or (folder and path.is_dir())


def _may_be_folder(key: str, text: str) -> bool:
    steps = key.split(".")
    return "/" in text or steps[-1] in _PATH_KEYS or (steps[0] == "models" and steps[-1] == "model")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if key or name not in _OUTPUT:
                yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{i}")
    elif isinstance(value, str):
        yield key, value
