"""Outputs found again by the content that they were made from.

A fingerprint follows from those of the inputs, so a setting far upstream changes it even where no input row changes. A
stage that costs as much as a training also leaves a digest of its input's content beside its output: a finished output
of the same settings from the same content, in the same run folder, is taken over instead of made again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from typing import Any

from ray_pipeline.graph.stage import WholeInput
from ray_pipeline.store.files import RESULT, Folder
from ray_pipeline.store.keys import digest

_CONTENT = "_content.json"


def record(given: WholeInput, content: str) -> None:
    """Note what the output in `given.folder` is made from. It counts once the stage is done."""
    given.folder.write_json(_CONTENT, {"key": _key(given, content)})


def find_same(given: WholeInput, content: str) -> tuple[Folder, dict[str, Any]] | None:
    """Folder and stored result of a finished output with these settings and this content; None if there is none, or if
    the stage is to be made again whatever is there."""
    if given.again or not given.settings_key:
        return None
    run, own = given.folder.parent, os.path.basename(given.folder.location)
    alike = re.compile(re.escape(own.removesuffix(given.fingerprint)) + "[0-9a-f]{16}")
    for name in run.folders():
        folder = run / name
        if name == own or not alike.fullmatch(name) or folder.load(_CONTENT, _read_key, None) != _key(given, content):
            continue
        result: dict[str, Any] | None = folder.load(RESULT, dict, None)
        if result is not None and name.endswith(str(result.get("fingerprint"))):
            return folder, result
    return None


def take_over(source: Folder, target: Folder, names: Iterable[str]) -> None:
    """Make these subfolders of `source`, as far as they exist, subfolders of `target`, too.

    On a local disk files are linked, so that they need no space and either folder can be deleted.
    """
    for name in sorted(set(names) & set(source.folders())):
        target.delete_folder(name)
        if target.is_local:
            target.make()
            shutil.copytree(source.path(name), target.path(name), copy_function=_link)
        else:
            import pyarrow.fs as pafs

            pafs.copy_files(
                source.path(name), target.path(name), source_filesystem=source.fs, destination_filesystem=target.fs
            )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without hard links
        shutil.copy2(source, target)


def _key(given: WholeInput, content: str) -> str:
    return digest(["content", given.settings_key, content])


def _read_key(value: Any) -> str:
    key: str = value["key"]
    return key
