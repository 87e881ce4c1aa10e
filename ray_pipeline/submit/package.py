"""The files of a working directory that go to the cluster: code and configs, never runs, environments or weights.

In a git checkout these are the files that git tracks or would track; elsewhere all files. The rules below then leave
out what no job needs, whatever its name: a run folder is recognised by its manifest, a virtual environment by its
`pyvenv.cfg`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Ray stores packages in the head's memory and refuses more than 512 MiB. Code is much smaller, data much larger.
MAX_BYTES = 100 * 1024 * 1024

#: Names of folders that are left out anywhere.
LEFT_OUT_FOLDERS = (
    "runs",
    ".git",
    ".venv",
    "__pycache__",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    "node_modules",
    "*.egg-info",
    "checkpoint-[0-9]*",
)
#: Names of files that are left out: weights, and files that may contain keys.
LEFT_OUT_FILES = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pyc", ".env", ".env.*")
#: Weights that belong to the code: the pocket models, a few MB, which the pocket configs need.
KEPT_WEIGHTS = "ray_pipeline/pocket/weights"


class PackageError(ValueError):
    """The working directory cannot be packaged; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Package:
    """The files of a package, as sorted paths relative to `root`, with their sizes in bytes."""

    root: Path
    sizes: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def check(self, limit: int = MAX_BYTES) -> None:
        """Raises PackageError if the package is empty, or over the limit (naming its largest parts)."""
        if not self.sizes:
            raise PackageError(f"{self.root} has no files to submit; set --working-dir")
        if self.bytes <= limit:
            return
        parts: dict[str, int] = {}
        for name, size in self.sizes.items():
            part = "/".join(Path(name).parts[:2])
            parts[part] = parts.get(part, 0) + size
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        parts_text = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in largest)
        raise PackageError(
            f"the package of {self.root} has {self.bytes / 2**20:.0f} MiB, over the limit of {limit / 2**20:.0f}; the "
            f"largest parts are {parts_text}. Leave them out with --exclude, or put data where every node can read it"
        )

    def copy_to(self, folder: Path) -> None:
        """Copy the files into a folder, with their modes."""
        for name in self.sizes:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / name, target)


def package(root: Path, exclude: Iterable[str] = ()) -> Package:
    """Choose the files of a working directory.

    Args:
        exclude: further shell patterns (`*`, `?`, `[…]`), each matched with a path relative to the root, the folders
            on it, and their bare names.

    Raises:
        PackageError: the folder does not exist.
    """
    if not root.is_dir():
        raise PackageError(f"no folder {root}; set --working-dir to the folder to submit")
    patterns = [pattern.rstrip("/") for pattern in exclude]
    left_out = _RunsAndEnvironments(root)
    sizes = {}
    for name in sorted(_listed_by_git(root) or _walk(root)):
        path = root / name
        if left_out.holds(name) or _excluded(name, patterns) or not path.is_file():
            continue
        sizes[name] = path.stat().st_size
    return Package(root, sizes)


def _listed_by_git(root: Path) -> list[str]:
    """Paths that git tracks or would track below a folder; nothing outside a checkout."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    if listed.returncode:
        return []
    return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]


def _walk(root: Path) -> Iterator[str]:
    for folder, names, files in os.walk(root):
        here = Path(folder).relative_to(root)
        # Not entered: a virtual environment has tens of thousands of files.
        names[:] = [n for n in names if not _matches(n, LEFT_OUT_FOLDERS)]
        yield from ((here / file).as_posix() for file in files)


class _RunsAndEnvironments:
    """The built-in rules on what is left out; each folder is inspected once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, bool] = {}

    def holds(self, name: str) -> bool:
        *folders, file = name.split("/")
        if _matches(file, LEFT_OUT_FILES) and not name.startswith(KEPT_WEIGHTS + "/"):
            return True
        return any(self._left_out("/".join(folders[: i + 1])) for i in range(len(folders)))

    def _left_out(self, folder: str) -> bool:
        if folder not in self._known:
            path = self._root / folder
            is_run = (path / "manifest.json").is_file() and (path / "config.yaml").is_file()
            is_environment = (path / "pyvenv.cfg").is_file() or (path / "conda-meta").is_dir()
            self._known[folder] = is_run or is_environment or _matches(path.name, LEFT_OUT_FOLDERS)
        return self._known[folder]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _excluded(name: str, patterns: list[str]) -> bool:
    parts = name.split("/")
    places = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(_matches(place, patterns) for place in places) or any(_matches(part, patterns) for part in parts)
