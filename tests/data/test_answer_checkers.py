"""Checkers with options: a regular expression, a JSON schema, a reference answer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import ray_pipeline.data.programs  # noqa: F401 (registers the checkers)
from ray_pipeline.data.checkers import Checked, load_checker
from ray_pipeline.data.programs import ProgramJudge, _Judging
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.sources import InputError
from tests.prompt_sets import load_prompts


def share(checker: str, response: str, meta: Any = None, **options: Any) -> float | None:
    found = load_checker(checker, options)([{"role": "user", "content": "?"}], response, json.dumps(meta or {}))
    return None if found is None else found.share


# --- regex and JSON schema --------------------------------------------------------------------------------------------


def test_a_regular_expression_matches_or_does_not() -> None:
    assert share("regex", "It is 42.", pattern=r"\b42\b") == 1 and share("regex", "It is 420.", pattern=r"\b42\b") == 0
    no_sorry = r"(?is)^(?!.*\bsorry\b)"
    assert share("regex", "Fine.\nDone.", pattern=no_sorry) == 1
    assert share("regex", "Well,\nSorry.", pattern=no_sorry) == 0


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        ('\n```json\n{"name": "Ada"}\n```\n', 1),
        ('{"name": "Ada", "age": -1}', 0),
        ('{"age": 36}', 0),
        ('Here it is: {"name": "Ada"}', 0),
        ('```\n{"name": "Ada"}\n``` and ```\n{}\n```', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_a_response_fits_the_schema_or_does_not(response: str, right: int) -> None:
    assert share("json_schema", response, schema=PERSON) == right


def test_the_reason_is_the_place_that_does_not_fit() -> None:
    check = load_checker("json_schema", {"schema": PERSON})
    assert check([], '{"name": 3}', "{}") == Checked(0.0, "$.name: 3 is not of type 'string'")


def test_a_reference_to_another_document_is_never_fetched() -> None:
    check = load_checker("json_schema", {"schema": {"$ref": "http://127.0.0.1:9/schema.json"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"checker json_schema: .*put what \$ref names into the schema"):
            check([], "{}", "{}")


# --- reference answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer", "options", "right"),
    [
        ("Paris", "paris", {}, 1),
        (" **Paris**.\n", "Paris", {}, 1),
        ("It is Paris", "Paris", {}, 0),
        ("I say: answer: Rome\nAnswer: Paris", "Paris", {"pattern": r"(?im)^answer: (.*)$"}, 1),
        ("Paris, surely", "Paris", {"pattern": r"(?im)^answer: (.*)$"}, 0),
        (r"So \boxed{7} or rather \boxed{8}", "8", {"pattern": r"\\boxed\{(.*?)\}"}, 1),
        ("She pays 12 + 60 = 72 dollars.", "12 and 60 make #### 72", {"compare": "number"}, 1),
        ("That makes $1,234.50", 1234.5, {"compare": "number"}, 1),
        ("minus: −3", -3, {"compare": "number"}, 1),
        ("7.0", 7, {"compare": "number"}, 1),
        ("3.1416", 3.14, {"compare": "number"}, 0),
        ("3.1416", 3.14, {"compare": "number", "tolerance": 0.01}, 1),
        ("None of them.", 3, {"compare": "number"}, 0),
        ("range 3-4", 4, {"compare": "number"}, 1),
        ("yes", True, {}, 0),
        ("true", True, {}, 1),
    ],
)
def test_a_response_gives_the_reference_answer_or_does_not(
    response: str, answer: Any, options: dict[str, Any], right: int
) -> None:
    assert share("answer", response, {"answer": answer}, **options) == right
    assert share("answer", response, {"gold": answer}, reference="gold", **options) == right


@pytest.mark.parametrize("meta", [{}, {"answer": None}, {"answer": ["a"]}, {"answer": "no number"}])
def test_without_a_reference_answer_nothing_is_decided(meta: Any) -> None:
    assert share("answer", "3", meta, compare="number") is None


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checker", "options", "message"),
    [
        ("regex", {}, "checker regex: options: pattern: Field required"),
        ("regex", {"pattern": "("}, r"pattern: '\(' is no regular expression of Python's re: missing \)"),
        ("regex", {"pattern": "a", "flags": 1}, "options: flags: unknown key"),
        ("json_schema", {"schema": {"type": "strin"}}, r"options: schema: not a JSON schema: 'strin' is not valid"),
        ("answer", {"compare": "near"}, "options: compare: Input should be 'exact' or 'number'"),
        ("ifeval", {"pattern": "a"}, "checker ifeval takes no options; remove pattern"),
    ],
)
def test_options_that_do_not_fit_are_refused(checker: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checker(checker, options)


def test_options_are_decisive_and_a_program_without_any_is_as_before() -> None:
    def decisive(**keys: Any) -> Any:
        program = ProgramJudge.model_validate({"name": "p", **keys})
        return _Judging(answers=("candidates",), programs=(program,)).decisive()["programs"]

    assert decisive(checker="ifeval") == [{"name": "p", "checker": "ifeval"}]
    assert decisive(checker="regex", options={"pattern": "a"}) != decisive(checker="regex", options={"pattern": "b"})


def test_a_class_of_a_user_has_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("""
from ray_pipeline.config.settings import Settings
from ray_pipeline.extensions import register

@register("checker")
class AtMost(Settings):
    words: int

    def __call__(self, prompt, response):
        return len(response.split()) <= self.words
""")
    assert share(str(path), "one two", words=2) == 1 and share(str(path), "one two three", words=2) == 0


# --- meta of prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_columns_for_checkers_are_in_the_meta_of_prompts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p.{suffix}"
    rows = [{"question": "1 + 1?", "gold": "2", "other": "x"}, {"question": "2 + 2?", "gold": "4", "other": "y"}]
    if suffix == "csv":
        path.write_text("question,gold,other\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": suffix, "path": str(path), "column": "question", "meta_columns": ["gold"]}
    found = load_prompts(PromptsConfig.model_validate({"sources": [source]})).table.to_pylist()
    metas = {row["messages"][-1]["content"]: json.loads(row["meta"]) for row in found}
    assert {text: meta["gold"] for text, meta in metas.items()} == {"1 + 1?": "2", "2 + 2?": "4"}
    assert all(set(meta) == {"gold", "file", "row"} for meta in metas.values())
    with pytest.raises(InputError, match="has no column 'glod'; did you mean 'gold'"):
        load_prompts(PromptsConfig.model_validate({"sources": [{**source, "meta_columns": ["glod"]}]}))
