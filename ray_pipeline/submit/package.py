"""The files that go to the cluster: an allow list of code, configs and what the configuration names.

In a git checkout these are the files that git tracks, submodules included; elsewhere the files whose suffix is that of
code, configuration or small data. Files that the configuration names join them, also if git ignores them. The rules
below then leave out what no job needs (a run folder is recognised by its manifest, a virtual environment by its
`pyvenv.cfg`) and what must never leave the machine: credentials, and whatever a link reaches outside the folder.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
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
#: Names of files that are left out: weights and compiled code. Ray itself would apply a `.rayignore` silently.
LEFT_OUT_FILES = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pyc", ".rayignore")
#: Weights that belong to the code: the pocket models, a few MB, which the pocket configs need.
KEPT_WEIGHTS = "ray_pipeline/pocket/weights"
#: Suffixes of the files that are packaged outside a git checkout.
CODE_SUFFIXES = frozenset(
    (
        *(".py", ".pyi", ".sh", ".ipynb", ".js", ".html", ".css", ".sql", ".md", ".rst", ".txt", ".jinja", ".j2"),
        *(".yaml", ".yml", ".toml", ".cfg", ".ini", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz"),
    )
)

#: Folders of credentials; in lower case, as the names of files below.
_SECRET_FOLDERS = (
    ".ssh",
    ".aws",
    ".azure",
    ".gcloud",
    "gcloud",
    ".kube",
    ".docker",
    ".gnupg",
    ".huggingface",
    ".ray",
    ".kaggle",
)
#: Folders of which only code is packaged.
_PRIVATE_FOLDERS = ("secret", "secrets", ".secret", ".secrets", "credentials", ".credentials")
_SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", "*.envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".npmrc", ".pypirc"),
    *(".git-credentials", ".boto", ".s3cfg", ".dockercfg", ".vault-token", ".htpasswd", "kubeconfig", "*.kubeconfig"),
    *("credentials", "credentials.*", "*credentials.json", "*credentials.y*ml", "*credentials.ini", "*credentials.csv"),
    *("client_secret*.json", "service[-_]account*.json", "secret", "secrets", "secret.*", "secrets.*", "auth.json"),
    *(
        "kaggle.json",
        "rclone.conf",
        "pip.conf",
        ".databrickscfg",
        ".terraformrc",
        "*.tfvars",
        "*.tfstate",
        ".vault_pass*",
    ),
    *("key.txt", "keys.txt", "*[-_]key.txt", "*[-_]keys.txt", "*[-_]key", "gha-creds-*.json"),
    *("token", "*[-_.]token", "token.txt", "*[-_.]token.txt", "*token.json", "*apikey*.txt", "*api[-_]key*"),
    *("password", "passwords", "password*.txt", "*[-_.]password", "*[-_.]secret", "*[-_.]secret.txt"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.kdbx", "*.asc", "*.gpg"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "authorized_keys", "known_hosts"),
)
_BY_LINK = (
    "leads out of the working directory by a link; copy it into the directory, or name an absolute path that every "
    "node can read"
)
#: Modules of code with such a name are code.
_CODE = frozenset({".py", ".pyi", ".md"})


class PackageError(ValueError):
    """The working directory cannot be packaged; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Package:
    """The files of a package, as sorted paths relative to `root`, with their sizes in bytes.

    Attributes:
        tracked: whether git's list was used.
        named: what the configuration names and git does not track: path → bytes.
        notes: what was left out although a user may expect it, one line each.
    """

    root: Path
    sizes: dict[str, int]
    tracked: bool = False
    named: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

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

    def contents(self) -> Iterator[str]:
        """What is packaged and what is not, one line each."""
        source = "tracked by git" if self.tracked else "of code, configuration and data"
        yield f"packaging {len(self.sizes)} files ({_size(self.bytes)}) of {self.root}: files {source}"
        for name, size in self.named.items():
            yield f"packaging {name} ({_size(size)}), named by the configuration or the command"
        yield from self.notes

    def copy_to(self, folder: Path) -> None:
        """Copy the files into a folder, with their modes."""
        for name in self.sizes:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / name, target)


def package(root: Path, exclude: Iterable[str] = (), named: Sequence[str] = ()) -> Package:
    """Choose the files of a working directory.

    Args:
        exclude: further shell patterns (`*`, `?`, `[…]`), each matched with a path relative to the root, the folders
            on it, and their bare names.
        named: files and folders that the configuration names, relative to the root.

    Raises:
        PackageError: the folder does not exist; git tracks nothing in it; or the configuration names a credential, an
            excluded file, or one outside the folder.
    """
    if not root.is_dir():
        raise PackageError(f"no folder {root}; set --working-dir to the folder to submit")
    root = root.resolve()
    listed = _git(root, "ls-files", "-z", "--cached", "--recurse-submodules")
    if listed is not None and not listed and not named:
        raise PackageError(
            f"git tracks no file in {root}, and only tracked files are packaged; `git add` the code and configs, or "
            "set --working-dir"
        )
    names = sorted(_walk(root) if listed is None else listed)
    choice = _Choice(root, names, [pattern.rstrip("/") for pattern in exclude])
    for name in names:
        choice.add(name)
    others: dict[str, int] = {}
    for name in named:
        for file, size in choice.add_named(name):
            others[file] = size
    notes = choice.notes()
    if listed is not None:
        untracked = _git(root, "ls-files", "-z", "--others", "--exclude-standard") or []
        left = [n for n in untracked if n not in choice.sizes and not choice.left_out(n)]
        if left:
            notes.append(f"not packaged: {_some(left)}, untracked by git; `git add` what the job needs")
    return Package(root, dict(sorted(choice.sizes.items())), listed is not None, others, tuple(notes))


class _Choice:
    """The files chosen so far; each folder is inspected once.

    Args:
        listed: all files that may be chosen; a linked folder gets those below its target.
    """

    def __init__(self, root: Path, listed: list[str], exclude: list[str]) -> None:
        self.sizes: dict[str, int] = {}
        self._root, self._listed, self._exclude = root, listed, exclude
        self._known: dict[str, bool] = {}
        self._secret: list[str] = []
        self._outside: list[str] = []
        self._empty: list[str] = []

    def add(self, name: str) -> None:
        """Add a listed file, or the files of a linked folder inside the root."""
        if self.left_out(name):
            return
        path = self._root / name
        if self._is_secret(name):
            self._secret.append(name)
        elif path.is_symlink() and not (path.exists() and self._is_inside(path)):
            self._outside.append(name)
        elif path.is_file():
            if self._is_inside(path):
                self.sizes[name] = path.stat().st_size
            else:
                self._outside.append(name)
        elif path.is_symlink():
            self._add_linked(name)
        elif path.is_dir():  # git lists a submodule that is not checked out as a folder
            self._empty.append(name)

    def _add_linked(self, name: str) -> None:
        """Add the files of a linked folder inside the root; links in it are not followed."""
        target = self._relative(self._root / name)
        below = "" if target == "." else f"{target}/"
        for file in self._listed:
            inner = f"{name}/{file.removeprefix(below)}"
            if file.startswith(below) and not (self._root / file).is_symlink() and (self._root / file).is_file():
                self.add(inner)

    def add_named(self, name: str) -> Iterator[tuple[str, int]]:
        """Add a file or folder that the configuration names; gives the files that git does not track. The rules on
        weights and runs do not apply to it, those on credentials and links do."""
        path = self._root / name
        if path.is_file():
            self._refuse(name)
            files = [name]
        else:
            if not self._is_inside(path):
                raise PackageError(f"the configuration names {name}, which {_BY_LINK}")
            files = [f"{name}/{inner}" for inner in _walk(path, named=True)]
        for file in files:
            if _excluded(file, self._exclude):
                continue
            if self._is_secret(file):
                self._secret.append(file)
            elif not self._is_inside(self._root / file) or not (self._root / file).is_file():
                self._outside.append(file)
            elif file not in self.sizes:
                self.sizes[file] = (self._root / file).stat().st_size
                yield file, self.sizes[file]

    def _refuse(self, name: str) -> None:
        """Raises PackageError for a named file that must not be packaged."""
        why = None
        if self._is_secret(name):
            why = "may hold credentials; pass them in the environment of the nodes"
        elif _excluded(name, self._exclude):
            why = "is left out by --exclude; remove the pattern or the key"
        elif not self._is_inside(self._root / name):
            why = _BY_LINK
        if why:
            raise PackageError(f"the configuration names {name}, which {why}")

    def notes(self) -> list[str]:
        found = []
        if self._secret:
            found.append(f"not packaged: {_some(self._secret)}, which may hold credentials")
        if self._outside:
            found.append(
                f"not packaged: {_some(self._outside)}, a link out of the working directory; copy what the job needs"
            )
        if self._empty:
            found.append(
                f"not packaged: {_some(self._empty)}, a submodule that is not checked out; run `git submodule update "
                "--init` if the job needs it"
            )
        return found

    def left_out(self, name: str) -> bool:
        """Whether the built-in rules or the user's patterns leave a file out."""
        *folders, file = name.split("/")
        if _matches(file, LEFT_OUT_FILES) and not name.startswith(KEPT_WEIGHTS + "/"):
            return True
        if _excluded(name, self._exclude):
            return True
        return any(self._folder_left_out("/".join(folders[: i + 1])) for i in range(len(folders)))

    def _folder_left_out(self, folder: str) -> bool:
        if folder not in self._known:
            path = self._root / folder
            is_run = (path / "manifest.json").is_file() and (path / "config.yaml").is_file()
            is_environment = (path / "pyvenv.cfg").is_file() or (path / "conda-meta").is_dir()
            self._known[folder] = is_run or is_environment or _matches(path.name, LEFT_OUT_FOLDERS)
        return self._known[folder]

    def _is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._root)

    def _relative(self, path: Path) -> str:
        return path.resolve().relative_to(self._root).as_posix()

    def _is_secret(self, name: str) -> bool:
        """Whether a file, or the file that it links to, may hold credentials or is git's own."""
        if is_secret(name):
            return True
        path = self._root / name
        if not self._is_inside(path):
            return False
        target = self._relative(path)
        return is_secret(target) or target.split("/")[0] == ".git"


def is_secret(name: str) -> bool:
    """Whether a file may hold credentials, by its name or that of a folder on its path."""
    *folders, file = name.lower().split("/")
    if any(_matches(folder, _SECRET_FOLDERS) for folder in folders):
        return True
    named = _matches(file, _SECRET_FILES) or any(_matches(folder, _PRIVATE_FOLDERS) for folder in folders)
    return named and (Path(file).suffix not in _CODE or file.startswith("id_"))


def _git(root: Path, *arguments: str) -> list[str] | None:
    """The paths that a command of git lists below a folder; None outside a checkout."""
    try:
        listed = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    if listed.returncode:
        return None
    return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]


def _walk(root: Path, named: bool = False) -> Iterator[str]:
    """Files below a folder: of the allowed suffixes and without hidden ones; all of them if the user names the folder.
    Linked folders are listed as one name."""
    for folder, names, files in os.walk(root):
        here = Path(folder).relative_to(root)
        links = [n for n in names if Path(folder, n).is_symlink()]
        # Not entered: a virtual environment has tens of thousands of files.
        names[:] = [n for n in names if not _matches(n, LEFT_OUT_FOLDERS) and n not in links]
        if not named:
            names[:] = [n for n in names if not n.startswith(".")]
        for file in sorted([*files, *links]):
            allowed = file in links or is_secret(file) or (not file.startswith(".") and _is_code(here / file))
            if named or allowed:
                yield (here / file).as_posix()


def _is_code(path: Path) -> bool:
    return (
        path.suffix.lower() in CODE_SUFFIXES or KEPT_WEIGHTS in path.as_posix() or path.name in ("LICENSE", "Makefile")
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _excluded(name: str, patterns: list[str]) -> bool:
    parts = name.split("/")
    places = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(_matches(place, patterns) for place in places) or any(_matches(part, patterns) for part in parts)


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 1024:.1f} KiB"


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
