"""Base of every block of the configuration: typed, frozen, and without unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A block of the YAML file. Unknown keys are errors, and errors do not show blocks: one may hold a pasted key."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), hide_input_in_errors=True
    )
