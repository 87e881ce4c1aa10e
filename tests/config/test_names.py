"""Names that users give are parts of file names, tables and pages: one rule for all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_pipeline.agents.debate import Role
from ray_pipeline.agents.judges import Rubric
from ray_pipeline.agents.strategies import Strategy
from ray_pipeline.agreement.ask import LiveJudge
from ray_pipeline.agreement.versus import Configuration
from ray_pipeline.config.blocks import RunBlock
from ray_pipeline.config.settings import Settings
from ray_pipeline.extensions import ExtensionError, register
from ray_pipeline.feedback.loop import ReviewerSettings
from ray_pipeline.policy.comparisons import Mode

NAMED: list[tuple[type[Settings], dict[str, Any]]] = [
    (Mode, {"sampling": {}}),
    (Rubric, {}),
    (Strategy, {"kind": "direct"}),
    (LiveJudge, {}),
    (Configuration, {}),
    (ReviewerSettings, {}),
    (Role, {}),
    (RunBlock, {}),
]
_WRONG = st.one_of(
    st.sampled_from(["..", ".", "a/b", "../a", "a\\b", "a\x1b[31m", "a\n", "a\0", " a", "=1+1", "-a", "@a", "a b"]),
    st.tuples(st.text(max_size=5), st.characters(categories=["Cc", "Cf", "Zl", "Zs"]), st.text(max_size=5)).map(
        "".join
    ),
    st.tuples(st.text(max_size=5), st.sampled_from("/\\"), st.text(max_size=5)).map("".join),
)


@pytest.mark.parametrize(("kind", "others"), NAMED)
@given(name=_WRONG)
def test_no_name_has_a_path_or_a_control_character(kind: type[Settings], others: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        kind(name=name, **others)
    assert any("name" in error["loc"] or "name" in error["msg"] for error in refused.value.errors())


@pytest.mark.parametrize("name", ["greedy", "sampled", "T-0.8", "Best_of_4"])
def test_a_mode_has_a_plain_name(name: str) -> None:
    assert Mode(name=name, sampling={}).name == name


@pytest.mark.parametrize("name", ["a/b", "../a", "a\x1b[31m", "a\n", "=1"])
def test_an_extension_has_a_plain_name(name: str) -> None:
    with pytest.raises(ExtensionError, match="a name is up to 64 letters"):
        register("checker", name)(lambda prompt, response: None)
