"""Composed prompts: distinct, checkable, and clear of IFEval's."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_pipeline.constraints.compose import KINDS, Kind, combinations, compose
from ray_pipeline.constraints.official import Checkers
from ray_pipeline.data.decontamination import Overlaps
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.sources import ConstrainedSource, InputError
from tests.prompt_sets import load_prompts
from tests.published import DATA, json_lines, needs


@pytest.fixture(scope="module")
def thousand() -> list:
    return list(itertools.islice(compose(0), 1000))


def test_prompts_are_distinct_and_cover_all_kinds(thousand: list) -> None:
    assert len({prompt.text for prompt in thousand}) == 1000
    assert {one.id for prompt in thousand for one in prompt.constraints} == set(KINDS)
    sizes = [len(prompt.constraints) for prompt in thousand]
    assert min(sizes) == 1 and max(sizes) == 3 and 0.4 < sizes.count(1) / 1000 < 0.6
    for prompt in thousand:
        ids = [one.id for one in prompt.constraints]
        assert tuple(sorted(ids)) in combinations(KINDS, 3)
        assert all(one.sentence in prompt.text for one in prompt.constraints)


@given(st.integers(0, 2**40), st.sets(st.sampled_from(KINDS), min_size=1), st.integers(1, 3), st.integers(1, 15))
def test_more_prompts_keep_the_earlier_ones(seed: int, kinds: set[Kind], most: int, count: int) -> None:
    chosen = sorted(kinds)
    some, more = (list(itertools.islice(compose(seed, chosen, most), n)) for n in (count, count + 10))
    assert more[:count] == some and len({prompt.text for prompt in more}) == len(more)
    for prompt in some:
        ids = [one.id for one in prompt.constraints]
        assert set(ids) <= kinds and len(set(ids)) == len(ids) <= most


def test_the_official_checkers_decide_every_prompt_without_drawing_anything(thousand: list, official: Checkers) -> None:
    shares: dict[str, list[bool]] = {}
    for prompt, response in itertools.product(
        thousand[:300], ("", "A short reply.", '"<<B>> *c* [d] Section 1, P.S."')
    ):
        ids, arguments = zip(*((one.id, one.arguments) for one in prompt.constraints), strict=True)
        flags, drawn = official.followed(prompt.text, ids, arguments, response, loose=False)
        assert not drawn
        for name, followed in zip(ids, flags, strict=True):
            shares.setdefault(name, []).append(followed)
    assert not any(all(found) for found in shares.values())


#: A response that follows a constraint, from its arguments; what its sentence asks for is what the checker looks for.
FOLLOWING = {
    "change_case:capital_word_frequency": lambda a: (
        "NO " * a["capital_frequency"] if a["capital_relation"] == "at least" else "no"
    ),
    "change_case:english_capital": lambda a: "THE WEATHER IS FINE TODAY AND WE WALK.",
    "change_case:english_lowercase": lambda a: "the weather is fine today and we walk.",
    "detectable_content:number_placeholders": lambda a: "[name] " * a["num_placeholders"],
    "detectable_content:postscript": lambda a: f"Well.\n{a['postscript_marker']} more",
    "detectable_format:json_format": lambda a: '{"a": 1}',
    "detectable_format:multiple_sections": lambda a: "\n".join(
        f"{a['section_spliter']} {n}\ntext" for n in range(1, a["num_sections"] + 1)
    ),
    "detectable_format:number_bullet_lists": lambda a: "\n".join(["* point"] * a["num_bullets"]),
    "detectable_format:number_highlighted_sections": lambda a: "*this* and " * a["num_highlights"],
    "detectable_format:title": lambda a: "<<A day>>\ntext",
    "keywords:existence": lambda a: " ".join(a["keywords"]),
    "keywords:forbidden_words": lambda a: "nothing",
    "keywords:frequency": lambda a: f"{a['keyword']} " * a["frequency"] if a["relation"] == "at least" else "no",
    "keywords:letter_frequency": lambda a: a["letter"] * a["let_frequency"] if a["let_relation"] == "at least" else "a",
    "length_constraints:number_paragraphs": lambda a: "\n***\n".join(["text"] * a["num_paragraphs"]),
    "length_constraints:number_sentences": lambda a: (
        "We walk. " * a["num_sentences"] if a["relation"] == "at least" else "We walk."
    ),
    "length_constraints:number_words": lambda a: "word " * a["num_words"] if a["relation"] == "at least" else "word",
    "punctuation:no_comma": lambda a: "none here",
    "startend:end_checker": lambda a: f"Well. {a['end_phrase']}",
    "startend:quotation": lambda a: '"all of it"',
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_sentence_asks_for_is_what_the_checker_looks_for(kind: Kind, official: Checkers) -> None:
    for prompt in itertools.islice(compose(3, [kind]), 12):
        (one,) = prompt.constraints
        flags, _ = official.followed(prompt.text, [kind], [one.arguments], FOLLOWING[kind](one.arguments), loose=False)
        assert flags == (True,), (prompt.text, one.arguments)
        for value in one.arguments.values():  # numbers and words of the arguments are in the prompt
            for part in value if isinstance(value, list) else [value]:
                shown = {str(part), *([str(part - 1)] if isinstance(part, int) else [])}
                assert part in ("at least", "less than") or any(text in one.sentence for text in shown)


# --- decontamination --------------------------------------------------------------------------------------------------


@needs("ifeval")
def test_composed_prompts_are_clear_of_ifeval(thousand: list) -> None:
    rows = json_lines(DATA / "ifeval" / "input_data.jsonl")
    ifeval = Overlaps({"ifeval": [row["prompt"] for row in rows]})
    assert ifeval.of(rows[0]["prompt"]) == {"ifeval": True}
    assert [prompt.text for prompt in thousand if ifeval.of(prompt.text)] == []
    # One constraint is a kind, which IFEval is meant to measure; its combinations of several are its own.
    theirs = {tuple(sorted(row["instruction_id_list"])) for row in rows if len(row["instruction_id_list"]) > 1}
    assert theirs and not theirs & {tuple(sorted(some)) for some in combinations(KINDS, 3)}


# --- source -----------------------------------------------------------------------------------------------------------


def test_the_source_keeps_constraints_in_meta() -> None:
    source = {"type": "constrained", "count": 40, "seed": 5, "kinds": ["punctuation:no_comma", "startend:quotation"]}
    found = load_prompts(PromptsConfig.model_validate({"sources": [source], "num_shards": 4}))
    rows = found.table.to_pylist()
    assert len(rows) == 40 and {row["source"] for row in rows} == {"constrained"}
    for row in rows:
        meta = json.loads(row["meta"])
        assert set(meta["instruction_id_list"]) <= {"punctuation:no_comma", "startend:quotation"}
        assert meta["kwargs"] == [{}] * len(meta["instruction_id_list"])
    first = ConstrainedSource.model_validate(source)
    assert first.digest() != first.model_copy(update={"seed": 6}).digest() and first.digest() == first.digest()


def test_a_count_that_cannot_be_met_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(InputError, match=r"only [\d,]+ distinct prompts.*lower count \(9,999\)"):
        list(ConstrainedSource(count=9999, kinds=("punctuation:no_comma",)).rows())
    with pytest.raises(ValidationError, match="punctuation:no_comma"):
        ConstrainedSource.model_validate({"count": 1, "kinds": ["punctuation:none"]})
