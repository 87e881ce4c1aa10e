"""Prompt templates: files a user can edit, mistakes told by file and block, values that are never templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ray_pipeline.agents.templates import (
    ANY_FENCE,
    VARIABLES,
    RoleTemplate,
    TemplateError,
    best_layout,
    builtin_templates,
    fence,
    load_templates,
    part_lengths,
    render,
    transcript,
)

ROLE = RoleTemplate(system="", shared="S {{ instruction }}", rubric="R {{ name }}")
BLOCKS = {
    role: {"system": "s", "shared": "x" + "".join(f"{{{{ {v} }}}}" for v in names if "response" in v), "rubric": "y"}
    for role, names in VARIABLES.items()
}


def written(path: Path, **changes: object) -> str:
    path.write_text(yaml.safe_dump({**BLOCKS, **changes}))
    return str(path)


def test_every_built_in_file_loads_and_shows_what_is_judged() -> None:
    assert {"default", "pocket"} <= set(builtin_templates())
    for name in builtin_templates():
        templates = load_templates(name)
        for role, variables in VARIABLES.items():
            block: RoleTemplate = getattr(templates, role)
            marked = {key: f"<<{key}>>" for key in variables}
            shown = "\n".join(m["content"] for m in render(block, "shared_first", **marked))
            for needed in ("instruction", *(v for v in variables if v.startswith("response"))):
                assert f"<<{needed}>>" in shown, (name, role)
            # The part that judges share must hold the texts; a rubric in it would be no shared prefix.
            assert (
                "<<rubric>>"
                not in render(block.model_copy(update={"rubric": ""}), "shared_first", **marked)[-1]["content"]
            )


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    assert load_templates(written(tmp_path / "mine.yaml")).judge.shared == "x{{ response }}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"judge": {"shared": "{{ instructoin }}", "rubric": ""}},
            r"judge\.shared: .*instructoin.* it may use .*instruction",
        ),
        ({"critic": {"shared": "x", "rubric": "{{ rubric }}"}}, r"critic\.rubric: .*rubric.* it may use instruction"),
        (
            {"judge": {"shared": "x", "rubric": "{% if low > 5 %}{{ typo }}{% endif %}"}},
            r"judge\.rubric: typo is undefined",
        ),
        ({"judge": {"shared": "{{ instruction", "rubric": ""}}, r"judge\.shared: "),
        ({"judge": {"shared": "{{ low / 0 }}", "rubric": ""}}, r"judge\.shared: .*division"),
        ({"judge": {"shared": "{{ ''.__class__.__mro__ }}", "rubric": ""}}, r"judge\.shared: .*unsafe"),
        ({"pairwise": None}, "pairwise: input should be a valid dictionary"),
        ({"judge": {"shared": "x"}}, r"judge\.rubric: field required"),
        ({"critic": {"shared": "x", "rubric": "y"}}, r"critic: no text shows \{\{ response \}\}"),
        ({"critic": {"shared": "{{ response }}", "rubric": " "}}, r"critic: shared and rubric have no text"),
        ({"judge": {"shared": "x", "rubric": "y", "sytem": "z"}}, r"judge\.sytem: extra inputs"),
        ({"jury": {}}, "jury: extra inputs"),
    ],
)
def test_a_mistake_is_told_by_file_and_block(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = written(tmp_path / "mine.yaml", **changes)
    with pytest.raises(TemplateError, match=message) as caught:
        load_templates(path)
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_block(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in BLOCKS.items() if k != "pairwise"}))
    with pytest.raises(TemplateError, match="pairwise: field required"):
        load_templates(str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"prompt template file .*none\.yaml does not exist"):
        load_templates(str(tmp_path / "none.yaml"))
    with pytest.raises(TemplateError, match=r"prompt template file .* does not exist"):
        load_templates(str(tmp_path))
    with pytest.raises(TemplateError, match="built-in prompt templates 'pokcet'; choose from default, pocket"):
        load_templates("pokcet")
    (tmp_path / "bad.yaml").write_text("judge: [")
    with pytest.raises(TemplateError, match=r"bad\.yaml is not valid YAML"):
        load_templates(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- judge")
    with pytest.raises(TemplateError, match=r"list\.yaml: the file: "):
        load_templates(str(tmp_path / "list.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TemplateError, match=r"binary\.yaml cannot be read"):
        load_templates(str(tmp_path / "binary.yaml"))


def test_values_are_text_and_never_templates() -> None:
    hostile = "{{ name }} {% raw %} {# x #} </response> <b>&amp;</b>"
    (message,) = render(ROLE, "shared_first", instruction=hostile, name="n")
    assert message["content"] == f"S {hostile}\nR n"


def test_a_fence_stands_in_none_of_the_texts() -> None:
    word = fence(["question"], ["question", "answer"])
    assert word == fence(["question"], ["question", "another answer"])  # one prefix for all answers to a question
    other = fence(["question"], ["question", f"</response {word}>"])
    assert other != word and other == fence(["question"], [word]) and len(other) == len(word) == len(ANY_FENCE)
    third = fence(["question"], [word, other])
    assert len({word, other, third}) == 3


def test_layouts() -> None:
    shared, rubric = (
        render(ROLE, x, instruction="i", name="n")[0]["content"] for x in ("shared_first", "rubric_first")
    )
    assert (shared, rubric) == ("S i\nR n", "R n\nS i")
    with_system = render(ROLE.model_copy(update={"system": "sys"}), "shared_first", instruction="i", name="n")
    assert [m["role"] for m in with_system] == ["system", "user"]


def test_the_shared_part_is_one_prefix_for_all_judges() -> None:
    template = load_templates("default").judge
    own = {"instruction": "i", "response": "r", "low": 1, "high": 10, "fence": "0"}
    prompts = [
        render(template, "shared_first", **own, name=name, rubric=name * 3)[-1]["content"]
        for name in ("helpfulness", "factuality")
    ]
    shared, _ = part_lengths(template, **own, name="x", rubric="x")
    assert prompts[0][:shared] == prompts[1][:shared] and prompts[0] != prompts[1]


@pytest.mark.parametrize(
    ("shared", "rubric", "judges", "expected"),
    [
        (100, 66, 3, "shared_first"),  # 200 > 198
        (100, 67, 3, "rubric_first"),
        (1000, 1, 1, "rubric_first"),  # one judge shares nothing
        (0, 0, 3, "rubric_first"),
    ],
)
def test_the_layout_that_saves_more(shared: float, rubric: float, judges: int, expected: str) -> None:
    assert best_layout(shared, rubric, judges) == expected


def test_transcripts() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert transcript(turns[:1]) == "a"
    assert transcript(turns) == "[user]\na\n\n[assistant]\nb\n\n[user]\nc"
