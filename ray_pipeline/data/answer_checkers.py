"""Checkers with options (`judge.programs[].options`): a regular expression, a JSON schema, a reference answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from jsonschema import SchemaError
from jsonschema.exceptions import best_match
from jsonschema.validators import Draft202012Validator, validator_for
from pydantic import Field, field_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.checkers import Checked
from ray_pipeline.extensions import register
from ray_pipeline.store.keys import normalise_text
from ray_pipeline.store.outside import json_value

Prompt = Sequence[Mapping[str, str]]

_FENCED = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|\.\d)|(?<![\w.])[-+−]?\.\d+")


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression of Python's re: {error}") from error
    return pattern


@register("checker", "regex")
class RegexChecker(Settings):
    """Whether a regular expression matches somewhere in the response."""

    pattern: str = Field(
        description="of Python's re; `(?i)` at its start ignores case, `^(?!.*sorry)` with `(?s)` forbids a word"
    )

    _check = field_validator("pattern")(_compiled)

    def __call__(self, prompt: Prompt, response: str) -> Checked:
        found = re.search(self.pattern, response) is not None
        return Checked(float(found), f"{'matches' if found else 'does not match'} {self.pattern}")


@register("checker", "json_schema")
class JsonSchemaChecker(Settings):
    """Whether the response is JSON, alone or in one code fence, that fits a schema."""

    document: dict[str, Any] = Field(
        alias="schema", description="JSON schema, draft 2020-12 unless its `$schema` names another one"
    )

    @field_validator("document")
    @classmethod
    def _is_schema(cls, document: dict[str, Any]) -> dict[str, Any]:
        try:
            validator_for(document, default=Draft202012Validator).check_schema(document)
        except SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message} (at {error.json_path})") from error
        return document

    def __call__(self, prompt: Prompt, response: str) -> Checked:
        fenced = _FENCED.fullmatch(response)
        try:
            value = json_value(fenced[1] if fenced else response)
        except ValueError as error:
            return Checked(0.0, f"not JSON: {error}")
        # An empty registry: a reference to another document is an error, never a download.
        validator = validator_for(self.document, default=Draft202012Validator)(self.document, registry=Registry())
        try:
            fault = best_match(validator.iter_errors(value))
        except Unresolvable as error:
            raise ValueError(f"checker json_schema: {error}; put what $ref names into the schema") from error
        return Checked(1.0, "fits the schema") if fault is None else Checked(0.0, f"{fault.json_path}: {fault.message}")


@register("checker", "answer")
class AnswerChecker(Settings):
    """Whether the response gives the reference answer of its prompt; undecided for a prompt without one."""

    reference: str = Field(
        "answer", description="name of the reference answer in the prompt's `meta` (see `meta_columns` of a source)"
    )
    compare: Literal["exact", "number"] = Field(
        "exact",
        description="exact: equal but for case, blanks and punctuation at the ends; number: the last numbers are equal",
    )
    pattern: str | None = Field(
        None,
        description="regular expression whose last match in the response (its first group, if it has one) is the "
        "answer; default: the whole response",
    )
    tolerance: float = Field(0.0, ge=0, description="of numbers: largest difference from the reference")

    @field_validator("pattern")
    @classmethod
    def _check(cls, pattern: str | None) -> str | None:
        return None if pattern is None else _compiled(pattern)

    def __call__(self, prompt: Prompt, response: str, meta: Mapping[str, Any]) -> Checked | None:
        value = meta.get(self.reference)
        if value is None or isinstance(value, list | dict):
            return None
        reference = value if isinstance(value, str) else json.dumps(value)
        given = self._answer(response)
        if given is None:
            return Checked(0.0, "gives no answer in the form asked for")
        if self.compare == "exact":
            right = _plain(given) == _plain(reference)
        else:
            expected, found = _last_number(reference), _last_number(given)
            if expected is None:
                return None
            right = found is not None and abs(found - expected) <= Decimal(str(self.tolerance))
        return Checked(float(right), "the reference answer" if right else f"not the reference answer: {given[-80:]}")

    def _answer(self, response: str) -> str | None:
        if self.pattern is None:
            return response
        matches = list(re.finditer(self.pattern, response))
        if not matches:
            return None
        last = matches[-1]
        return last[1] if last.re.groups else last[0]


def _plain(text: str) -> str:
    return " ".join(normalise_text(text).casefold().split()).strip(" .,;:!?\"'`*")


def _last_number(text: str) -> Decimal | None:
    """Value of the last decimal number of a text; commas between groups of three digits are ignored."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None
