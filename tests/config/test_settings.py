"""What a fingerprint reads of a block: the settings that differ from their defaults, and never the same for two."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field, ValidationError

from ray_pipeline.config.settings import Settings
from ray_pipeline.workflow.registry import find_workflow, workflow_names


class One(Settings):
    type: Literal["one"] = "one"
    size: float = 1


class Other(Settings):
    type: Literal["other"] = "other"
    size: float = 1


class Inner(Settings):
    low: int = 1
    names: tuple[str, ...] = ()


class Block(Settings):
    name: str
    inner: Inner = Inner(low=5)
    maybe: Inner | None = None
    either: Annotated[One | Other, Field(discriminator="type")] = One()
    many: tuple[Annotated[One | Other, Field(discriminator="type")], ...] = ()
    by_name: dict[str, Inner] = Field(default_factory=dict)
    ratio: float = 2
    flag: bool | int = False
    options: dict[str, Any] = Field(default_factory=lambda: {"think": False})


def test_only_what_differs_from_its_default() -> None:
    assert Block(name="x").decisive() == {"name": "x"}
    assert Block.model_validate(
        {"name": "x", "ratio": 2.0, "inner": {"low": 5}, "either": {"type": "one"}}
    ).decisive() == {"name": "x"}
    given = Block(name="x", inner=Inner(low=2), many=(One(), Other(size=3)), by_name={"a": Inner(names=("b",))})
    assert given.decisive() == {
        "name": "x",
        "inner": {"low": 2},
        "many": [{"type": "one"}, {"type": "other", "size": 3.0}],
        "by_name": {"a": {"names": ["b"]}},
    }
    assert given.decisive(exclude={"name", "many"}) == {"inner": {"low": 2}, "by_name": {"a": {"names": ["b"]}}}


def test_different_blocks_give_different_dumps() -> None:
    blocks: list[dict[str, Any]] = [
        {},
        {"inner": {}},
        {"inner": {"low": 2}},
        {"maybe": {}},
        {"maybe": {"low": 5}},
        {"either": {"type": "other"}},
        {"either": {"type": "one", "size": 2}},
        {"many": [{"type": "one"}]},
        {"many": [{"type": "other"}]},
        {"many": [{"type": "other"}, {"type": "other"}]},
        {"by_name": {"a": {}}},
        {"by_name": {"b": {}}},
        {"ratio": 1},
        {"flag": 0},
        {"flag": 1},
        {"flag": True},
        {"options": {}},
        {"options": {"think": 0}},
        {"options": {"think": False, "more": None}},
    ]
    dumps = [json.dumps(Block.model_validate({"name": "x", **block}).decisive(), sort_keys=True) for block in blocks]
    assert len(set(dumps)) == len(blocks)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_no_file_can_hold_are_refused_with_their_place(number: float) -> None:
    blocks: list[tuple[dict[str, Any], str]] = [
        ({"ratio": number}, "ratio\n  Input should be a finite number"),
        ({"either": {"type": "other", "size": number}}, "either.other.size\n  Input should be a finite number"),
        ({"options": {"a": [1, {"b": number}]}}, "options.a.1.b must be a finite number"),
    ]
    for block, message in blocks:
        with pytest.raises(ValidationError, match=message):
            Block.model_validate({"name": "x", **block})


def _below(kind: type[Settings]) -> Iterator[type[Settings]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _below(inner)


def _blocks_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _blocks_in(part)


def _all_blocks() -> list[type[Settings]]:
    for name in workflow_names():
        find_workflow(name)  # imports its blocks
    return sorted({k for k in _below(Settings) if k.__module__.startswith("ray_pipeline")}, key=lambda k: k.__name__)


def _told_apart(one: type[Settings], other: type[Settings]) -> bool:
    """By a tag that is always in the dump, or by a required key that the other does not have."""
    if all("type" in kind.model_fields for kind in (one, other)):
        return set(_tags(one)).isdisjoint(_tags(other))
    required = [{name for name, field in k.model_fields.items() if field.is_required()} for k in (one, other)]
    return not (required[0] <= other.model_fields.keys() and required[1] <= one.model_fields.keys())


def _tags(kind: type[Settings]) -> tuple[str, ...]:
    field = kind.model_fields["type"]
    tags = get_args(field.annotation)
    assert field.is_required() or len(tags) == 1, f"{kind.__name__} leaves its tag out of its dump"
    return tags


@pytest.mark.parametrize("kind", _all_blocks())
def test_members_of_a_union_are_told_apart(kind: type[Settings]) -> None:
    """Two members at their defaults would otherwise give the same dump."""
    for field in kind.model_fields.values():
        blocks = sorted(set(_blocks_in(field.annotation)), key=lambda block: block.__name__)
        for one, other in itertools.combinations(blocks, 2):
            assert _told_apart(one, other), f"{one.__name__} and {other.__name__}"
