"""Outputs found again by the content that they were made from.

A fingerprint follows from those of the inputs, so a setting far upstream changes it even where no input row changes. A
stage that costs as much as a training also leaves a digest of its input's content beside its output: a finished output
of the same settings from the same content, in the same run folder, is taken over instead of made again. It may be an
output of another stage. Two such stages that run at the same time do not wait for each other: both make their output.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from ray_pipeline.graph.stage import WholeInput
from ray_pipeline.store.files import RESULT, Folder
from ray_pipeline.store.keys import digest

_CONTENT = "_content.json"
_FINGERPRINT = re.compile("[0-9a-f]{16}")


def record(given: WholeInput, content: str) -> None:
    """Note what the output in `given.folder` is made from. It counts once the stage is done."""
    given.folder.write_json(_CONTENT, {"key": _key(given.settings_key, content)})


def find_same(given: WholeInput, content: str, alike: Mapping[str, str]) -> tuple[Folder, dict[str, Any]] | None:
    """Folder and stored result of a finished output with these settings and this content; None if there is none, or if
    the stage is to be made again whatever is there.

    Args:
        alike: stages that have the same settings → their `Stage.settings_key`, which differs by their name.
    """
    if given.again or not given.settings_key:
        return None
    run, own = given.folder.parent, os.path.basename(given.folder.location)
    settings = {**alike, own.removesuffix(f"-{given.fingerprint}"): given.settings_key}
    for name in run.folders():
        folder, (stage, _, fingerprint) = run / name, name.rpartition("-")
        if name == own or stage not in settings or not _FINGERPRINT.fullmatch(fingerprint):
            continue
        if folder.load(_CONTENT, _read_key, None) != _key(settings[stage], content):
            continue
        result: dict[str, Any] | None = folder.load(RESULT, dict, None)
        if result is not None and result.get("fingerprint") == fingerprint:
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


def _key(settings_key: str, content: str) -> str:
    return digest(["content", settings_key, content])


def _read_key(value: Any) -> str:
    key: str = value["key"]
    return key
