"""The registry of user extensions: sources, strategies, checkers and the like.

A file registers its extensions, and a configuration refers to them by name or by file::

    @register("checker")
    def even(prompt, response): ...

    evaluate: {checker: my_checker.py}          # the only checker that the file registers
    evaluate: {checker: "my_checker.py:even"}   # one of several
    evaluate: {checker: even}                   # from an installed package, by its entry point

Entry points are in the groups of `GROUPS`, such as `quorum.checkers`; the entry point has the extension's name.

A reference is resolved again in every process that needs it, so the file must have the same path on every node: put it
on shared storage, ship it with the job (`quorum submit` packages the working folder, and a relative path is then
right everywhere), or install it as a package with an entry point. Functions and classes of a file that is loaded by
path are pickled by value, so stages of a user's workflow reach workers as they are.
"""

from __future__ import annotations

import contextvars
import dataclasses
import difflib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, Literal, TypeVar, get_args

Kind = Literal["source", "strategy", "checker", "method", "benchmark", "workflow"]

#: Kind → group of the entry points of installed packages.
GROUPS: dict[Kind, str] = {
    "source": "quorum.sources",
    "strategy": "quorum.strategies",
    "checker": "quorum.checkers",
    "method": "quorum.methods",
    "benchmark": "quorum.benchmarks",
    "workflow": "quorum.workflows",
}

V = TypeVar("V")


class ExtensionError(ValueError):
    """An extension cannot be found or loaded; the message names it and the fix."""


@dataclasses.dataclass(frozen=True)
class Extension:
    """A registered extension.

    Attributes:
        file: the file that registered it.
    """

    kind: Kind
    name: str
    value: Any
    file: str


_Table = dict[tuple[Kind, str], Extension]

#: Extensions of imported modules, of installed packages (by entry point), and of files loaded by path:
#: file and content → table.
_registered: _Table = {}
_installed: _Table = {}
_files: dict[tuple[str, str], _Table] = {}

#: The file that is being loaded by path, and its table. Modules that it imports register in `_registered`.
_loading: contextvars.ContextVar[tuple[str, _Table] | None] = contextvars.ContextVar("loading", default=None)


def register(kind: Kind, name: str | None = None) -> Callable[[V], V]:
    """Register the decorated function or class; `register(kind, name)(value)` registers any value.

    Args:
        name: default: the `__name__` of the value.

    Raises:
        ExtensionError: unknown kind, or another module has registered this name.
    """
    if kind not in get_args(Kind):
        raise ExtensionError(f"unknown kind of extension {kind!r}; choose from {', '.join(GROUPS)}")
    file = str(sys._getframe(1).f_globals.get("__file__", "<interactive>"))

    def add(value: V) -> V:
        extension, loading = Extension(kind, name or str(getattr(value, "__name__", "")), value, file), _loading.get()
        table = loading[1] if loading is not None and loading[0] == file else _registered
        other = table.get((kind, extension.name))
        if other is not None and os.path.abspath(other.file) != os.path.abspath(file):
            raise ExtensionError(f"{kind} {extension.name!r} is registered by {other.file} and by {file}; rename one")
        table[kind, extension.name] = extension
        return value

    return add


def find(kind: Kind, reference: str) -> Extension:
    """The extension that a reference (a name, `FILE.py` or `FILE.py:NAME`) refers to.

    Raises:
        ExtensionError: nothing of that kind and name is registered, or the file cannot be loaded.
    """
    path, name = _split(reference)
    if path is not None:
        return _in_file(kind, path, name)
    extension = _registered.get((kind, name)) or _entry_point(kind, name)
    if extension is None:
        known = names(kind)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ExtensionError(
            f"unknown {kind} {name!r}; {hint}choose from {', '.join(known)}, or name a file that registers one "
            f"(my_{kind}.py)"
        )
    return extension


def names(kind: Kind) -> list[str]:
    """All names of a kind: registered in this process, or entry points of installed packages."""
    registered = [name for known, name in _registered if known == kind]
    return list(dict.fromkeys([*registered, *(point.name for point in _entry_points(kind))]))


def digests_in(config: Any) -> dict[str, str]:
    """Content digests of the users' files that a stage's configuration refers to, for its fingerprint.

    Args:
        config: plain data. A string in it counts if it refers to a file, or is the name of an extension that this
            process has loaded from an installed package. Quorum's own extensions are covered by the versions of their
            stages, and a workflow by those of the stages that it wires.
    """
    return {f"extension {name}": _file_digest(file) for name, file in sorted(_files_in(config))}


def _files_in(config: Any) -> Iterator[tuple[str, str]]:
    """Name and file of every extension that plain data refers to."""
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from _files_in(part)
    elif isinstance(config, str):
        path, name = _split(config)
        if path is not None and os.path.isfile(path):
            yield os.path.basename(config), path
        for (kind, known), extension in _installed.items():
            if path is None and known == name and kind != "workflow":
                yield name, extension.file


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def load_file(path: str) -> list[Extension]:
    """The extensions of a user's file. The file runs once per process, and again after its content changes.

    Raises:
        ExtensionError: no such file, or running it raises.
    """
    place = _locate(path)
    try:
        content = _file_digest(place)
    except OSError as error:
        raise ExtensionError(
            f"cannot read {path} ({error.strerror}; looked for {place}); check the path, and on a cluster make the "
            "file available under it on every node"
        ) from error
    if (place, content) not in _files:
        _files[place, content] = _run(place, content)
    return list(_files[place, content].values())


def _locate(path: str) -> str:
    """Absolute path of a file. A training worker has another working directory, but Ray keeps the driver's (or the
    job's) on the import path of all workers."""
    path = os.path.expanduser(path)
    places = [os.path.abspath(os.path.join(folder, path)) for folder in (os.curdir, *sys.path)]
    return next((place for place in places if os.path.isfile(place)), places[0])


def _run(place: str, content: str) -> _Table:
    stem = os.path.splitext(os.path.basename(place))[0]
    name = f"quorum_extension_{stem}_{content[:8]}"
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module while their class is created. It is removed afterwards, so that cloudpickle
    # sends its functions and classes by value and workers need not import it.
    sys.modules[name] = module
    table: _Table = {}
    token = _loading.set((place, table))
    try:
        spec.loader.exec_module(module)
    except ExtensionError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise ExtensionError(f"{place} raised {type(error).__name__}: {error}; fix the file") from error
    finally:
        _loading.reset(token)
        del sys.modules[name]
    return table


def _in_file(kind: Kind, path: str, name: str) -> Extension:
    own = [extension for extension in load_file(path) if extension.kind == kind]
    matching = [e for e in own if not name or e.name == name]
    if len(matching) == 1:
        return matching[0]
    if not own:
        raise ExtensionError(f'{path} registers no {kind}; decorate one with @register("{kind}")')
    listed = ", ".join(e.name for e in own)
    if name:
        raise ExtensionError(f"{path} registers no {kind} {name!r}; choose from {listed}")
    raise ExtensionError(f"{path} registers several: {listed}; name one, for example {path}:{own[0].name}")


def _split(reference: str) -> tuple[str | None, str]:
    """File and name of a reference; the file is None if the reference is a name."""
    path, sign, name = reference.rpartition(":")
    if sign and path.endswith(".py"):
        return path, name
    return (reference, "") if reference.endswith(".py") else (None, reference)


def _entry_points(kind: Kind) -> Iterator[metadata.EntryPoint]:
    yield from metadata.entry_points(group=GROUPS[kind])


def _entry_point(kind: Kind, name: str) -> Extension | None:
    for point in _entry_points(kind):
        if point.name == name and (kind, name) not in _installed:
            try:
                value = point.load()
            except Exception as error:  # an installed package may raise anything
                raise ExtensionError(
                    f"cannot load entry point {name} of {GROUPS[kind]}: {error}; fix or reinstall its package"
                ) from error
            file = getattr(sys.modules[point.module], "__file__", None) or point.module
            _installed[kind, name] = Extension(kind, name, value, file)
    return _installed.get((kind, name))
