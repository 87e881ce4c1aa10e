"""Reading a configuration: one YAML file, and overrides as `key=value`."""

from __future__ import annotations

import copy
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ray_pipeline.config.messages import ConfigError, explain
from ray_pipeline.config.settings import ConfigFile
from ray_pipeline.store.secrets import redact, secret_in

C = TypeVar("C", bound=ConfigFile)


def load_config(kind: type[C], name_or_path: str, overrides: Sequence[str] = ()) -> C:
    """Read a configuration and check everything that can be checked before a stage starts.

    Args:
        kind: class of the configuration, such as a workflow's (`find_workflow("dmapo").config`).
        name_or_path: a YAML file, or the name of one that comes with Quorum (`pocket`, `configs/pocket.yaml`).
        overrides: `key=value`, with dots for nesting (`gate.tau=2`) and YAML values; list items by number.

    Raises:
        ConfigError: no such file, not YAML, an unknown or unused key, a wrong type, a model that does not exist.
    """
    config = read_config(kind, read_yaml(name_or_path), overrides, name_or_path)
    try:
        config.check()
    except ValueError as error:  # a file of prompt templates raises other errors
        raise ConfigError(str(error)) from error
    return config


def read_config(kind: type[C], values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config") -> C:
    """A configuration from plain data. Only types and keys are checked, so neither weights nor trainers are needed.

    Args:
        values: content of a YAML file or of a run's manifest.
        source: named in errors.

    Raises:
        ConfigError: as `load_config`, and for a key or password in any value.
    """
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        apply_override(changed, override)
    try:
        config = kind.model_validate(kind.resolve(changed))
    except ValidationError as error:
        raise ConfigError(explain(error, kind, source)) from error
    if problem := secret_in(changed):
        raise ConfigError(f"{source}: {problem}")
    return config


def read_yaml(name_or_path: str) -> dict[str, Any]:
    """The blocks of a YAML file, or of one that comes with Quorum. Raises ConfigError."""
    text = read_text(name_or_path)
    try:
        values = yaml.load(text, UniqueKeys)
    except NOT_YAML as error:
        raise ConfigError(f"{name_or_path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path} must be a mapping of blocks, not {type(values).__name__}")
    return values


def read_text(name_or_path: str) -> str:
    """The text of a file, or of a configuration that comes with Quorum. Raises ConfigError."""
    if os.path.isfile(name_or_path):
        try:
            with open(name_or_path, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {name_or_path}: {error}") from error
    folder = importlib.resources.files("configs")
    name = os.path.basename(name_or_path).removesuffix(".yaml") + ".yaml"
    # A path to a missing file is an error, even if its last part is the name of a shipped file.
    if os.path.dirname(name_or_path) not in ("", "configs") or not (folder / name).is_file():
        known = sorted(f.name for f in folder.iterdir() if f.name.endswith(".yaml"))
        raise ConfigError(f"no config file {name_or_path}; Quorum comes with {', '.join(known)}")
    return (folder / name).read_text("utf-8")


#: What PyYAML raises: its own errors, and those of Python for a value that it cannot construct, such as the day
#: 2024-13-45, a number of 5,000 digits, `!!bool x` or a list as a key.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError)


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses duplicate keys: PyYAML would silently drop the first block."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the key of `key=value` in place. Raises ConfigError."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{redact(override)!r} is not an override; write key=value, for example gate.tau=2")
    try:
        value = yaml.safe_load(text)
    except NOT_YAML as error:
        raise ConfigError(f"{key}: {redact(text)!r} is not a YAML value") from error
    place: Any = values
    *path, last = key.split(".")
    for step in path:
        if isinstance(place, list):
            place = place[_index(place, step, key)]
        else:
            place = place.setdefault(step, {})
            if place is None:
                raise ConfigError(f"{key}: {step} is empty in the file; write the block there")
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"{key}: {step} is a value, not a block")
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _index(place: list[Any], step: str, key: str) -> int:
    if not step.isdigit() or int(step) >= len(place):
        raise ConfigError(f"{key}: {step!r} is not an item of a list of {len(place)} (the first is 0)")
    return int(step)
