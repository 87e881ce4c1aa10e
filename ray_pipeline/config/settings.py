"""Base of every block of the configuration: typed, frozen, and without unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A block of the YAML file. Unknown keys are errors, and errors do not show blocks: one may hold a pasted key."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), hide_input_in_errors=True
    )

    @classmethod
    def part_of(cls, whole: Settings, **more: Any) -> Self:
        """The slice of `whole` that this class has fields for; `more` adds to it and wins."""
        shared = cls.model_fields.keys() & type(whole).model_fields.keys() - more.keys()
        return cls(**{name: getattr(whole, name) for name in shared}, **more)


class ConfigFile(Settings):
    """A whole YAML file."""

    @classmethod
    def resolve(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn what a user writes into plain values (model names into folders). Raises ConfigError."""
        return dict(values)

    def check(self) -> None:
        """Check files, models and names of other libraries. Raises ConfigError, or ValueError for a file of texts."""
