"""Base of every block of the configuration: typed, frozen, and without unknown keys."""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from ray_pipeline.store.keys import canonical_json
from ray_pipeline.store.secrets import secret_in

#: A name that the user gives to something in tables, pages and files.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

#: Sampling that an engine can be asked for: far above what is of use, and far below what overflows in it or in a table.
Temperature = Annotated[float, Field(ge=0, le=100)]
NewTokens = Annotated[int, Field(ge=1, le=10_000_000)]


class Settings(BaseModel):
    """A block of the YAML file. Unknown keys and numbers that are not finite are errors, and so is a key or password in
    a free-form mapping."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        allow_inf_nan=False,  # JSON has neither, so no fingerprint, no manifest and no request could hold them
    )

    @model_validator(mode="after")
    def _plain_mappings(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Mapping) and (problem := secret_in({name: value})):
                raise ValueError(problem)
            for place in _not_finite(value, name):
                raise ValueError(f"{place} must be a finite number")
        return self

    @classmethod
    def part_of(cls, whole: Settings, **more: Any) -> Self:
        """The slice of `whole` that this class has fields for; `more` adds to it and wins."""
        shared = cls.model_fields.keys() & type(whole).model_fields.keys() - more.keys()
        return cls(**{name: getattr(whole, name) for name in shared}, **more)

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """This block's part of a stage's fingerprint: the settings that differ from their defaults, as JSON.

        A new key with a default must not change the fingerprints of stored runs, which would rerun their stages and
        retrain their policies. A changed default must rerun them but does not change the dump, so
        tests/golden/defaults.json fails until the `version` of the stages that read it is raised.

        Two blocks that differ in a setting give different dumps. The tag of a union's member is therefore always kept.

        Args:
            exclude: keys of this block that do not affect the stage's output.
        """
        plain = self.model_dump(mode="json", exclude=set(exclude))
        return {
            name: _decisive(getattr(self, name), plain[name])
            for name, field in type(self).model_fields.items()
            if name in plain and (_is_tag(field) or not _is_default(getattr(self, name), field))
        }


def _not_finite(value: Any, place: str) -> Iterator[str]:
    """Places of NaN and infinities in a free-form mapping."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _not_finite(one, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _not_finite(one, f"{place}.{i}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place


def _decisive(value: Any, plain: Any) -> Any:
    """The dump of a value without the defaults of its blocks."""
    if isinstance(value, Settings):
        return value.decisive()
    if isinstance(value, tuple | list):
        return [_decisive(*both) for both in zip(value, plain, strict=True)]
    if isinstance(value, Mapping):
        return {key: _decisive(one, plain[key]) for key, one in zip(plain, value.values(), strict=True)}
    return plain


def _is_tag(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _is_default(value: Any, field: FieldInfo) -> bool:
    default = field.get_default(call_default_factory=True)  # of a required key: a value that equals no other
    if isinstance(value, int | float) and isinstance(default, int | float):
        return value == default and isinstance(value, bool) == isinstance(default, bool)
    if value is None or isinstance(value, str):
        return bool(value == default)
    # As text, because `{"think": 0} == {"think": False}`.
    return not field.is_required() and canonical_json(to_jsonable_python(value)) == canonical_json(
        to_jsonable_python(default)
    )


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, sorted."""
    return sorted(name for name, count in collections.Counter(names).items() if count > 1)


def refuse_repeated(names: Iterable[str], what: str) -> None:
    """Raise ValueError if a name occurs more than once, for instance for "judges" as `what`."""
    if twice := repeated(names):
        raise ValueError(f"two {what} have the same name: {', '.join(twice)}")


def over(defaults: Settings) -> BeforeValidator:
    """Annotation of a block with defaults of its own: setting one key keeps the others."""
    return BeforeValidator(lambda block: {**defaults.model_dump(), **block} if isinstance(block, Mapping) else block)


class ConfigFile(Settings):
    """A whole YAML file."""

    @classmethod
    def resolve(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Resolve the user's values into plain ones (model names into folders). Raises ConfigError."""
        return dict(values)

    def check(self) -> None:
        """Check files, models and names of other libraries. Raises ConfigError, or ValueError for a template file."""
