"""Keys: what makes two prompts, calls or stages the same one, and what does not."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.engines.base import Grammar, Sampling
from ray_pipeline.store import keys

POWERS = [2**i for i in range(11)]
TEXT = st.text(alphabet=st.one_of(st.sampled_from(" \t\n\r\x00\u00a0e\u0301é{}a\u2028"), st.characters()), max_size=40)
IDS = st.integers(0, 2**128 - 1).map(lambda n: f"{n:032x}")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


#: Lines of prose: no code, table or quote in them.
PROSE = st.lists(
    st.lists(st.text(alphabet="abéÉzñ한ß.,?!1’-", min_size=1, max_size=6), min_size=1, max_size=5).map(" ".join),
    max_size=5,
).map("\n".join)
BLANKS = re.compile(r"[^\S\n]+")


def first_form(text: str) -> str:
    """The form that was sent before: runs of blanks as one everywhere but in indentation."""
    text = text.replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    lines = []
    for line in unicodedata.normalize("NFC", text).split("\n"):
        body = line.lstrip(" \t")
        lines.append((line[: len(line) - len(body)] + BLANKS.sub(" ", body)).rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


@given(TEXT)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = keys.normalise_text(text)
    assert keys.normalise_text(once) == once


@given(TEXT)
def test_what_the_first_form_did_not_change_keeps_its_id(text: str) -> None:
    kept = first_form(text)
    assert keys.normalise_text(kept) == kept
    # Two texts that are now one were one before, too.
    assert first_form(keys.normalise_text(text)) == kept


@given(PROSE, st.sampled_from(["\r\n", "\r", "\n"]))
def test_prose_is_the_same_prompt_whatever_a_reader_cannot_see(text: str, line_end: str) -> None:
    same = keys.prompt_id(ask(text))
    assert unicodedata.is_normalized("NFC", keys.normalise_text(text))
    assert keys.prompt_id(ask(text.replace("\n", line_end))) == same
    assert keys.prompt_id(ask("\n \t" + text + " \n\n")) == same
    assert keys.prompt_id(ask(unicodedata.normalize("NFD", text))) == same
    assert keys.prompt_id(ask(text.replace("\n", " \t\n"))) == same
    assert keys.prompt_id(ask(text.replace(" ", "  ", 1))) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is 'a  b' the same as 'a b'?", "Is 'a b' the same as 'a b'?"),
        ('Is "a  b" the same as "a b"?', 'Is "a b" the same as "a b"?'),
        ("Is «e\u0301» one character?", "Is «é» one character?"),
        ("Is “a\n\n\n\nb” two paragraphs?", "Is “a\n\nb” two paragraphs?"),
        ("What does `a  b` print?", "What does `a b` print?"),
        ("Fix:\n```\nx = 1 \\  \n```", "Fix:\n```\nx = 1 \\\n```"),
        ("Why?\n  a  = 1", "Why?\n  a = 1"),
        ("Name\tCity\nBob\t\tRome", "Name\tCity\nBob\tRome"),
        ("Name | City\nBob |  | Rome", "Name | City\nBob | | Rome"),
        ("Name  Town\nBob  New York", "Name  Town\nBob New  York"),
        ("How wide is <b>a  b</b>?", "How wide is <b>a b</b>?"),
        ("Is 'a\r\nb' the same as 'a\nb'?", "Is 'a\nb' the same as 'a\nb'?"),
    ],
)
def test_blanks_in_code_tables_and_quotes_make_another_prompt(one: str, other: str) -> None:
    assert keys.prompt_id(ask(one)) != keys.prompt_id(ask(other))
    assert keys.prompt_id(ask(f" \n{one}\n ")) == keys.prompt_id(ask(one))
    assert "\r" in one or keys.prompt_id(ask(one.replace("\n", "\r\n"))) == keys.prompt_id(ask(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a  b\u00a0c", "a b c"),
        ("a\n   \nb", "a\n\nb"),
        ("a\n \n \n\nb", "a\n\nb"),
        ("e\x00\u0301", "é"),
        ("a\r\x00\nb", "a\nb"),
    ],
)
def test_spellings_of_one_prompt(one: str, other: str) -> None:
    assert keys.normalise_text(one) == other
    assert keys.prompt_id(ask(one)) == keys.prompt_id(ask(other))


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("x\n    y", "x\ny"), ("a\n\nb", "a\nb"), ("A", "a")])
def test_what_a_reader_can_see_makes_another_prompt(one: str, other: str) -> None:
    assert keys.prompt_id(ask(one)) != keys.prompt_id(ask(other))


def test_a_prompt_depends_neither_on_the_order_of_keys_nor_on_other_keys() -> None:
    same = keys.prompt_id([{"role": "user", "content": "hello"}])
    assert keys.prompt_id([{"content": "hello", "role": "User ", "name": "x"}]) == same
    assert keys.prompt_id([{"role": "system", "content": "hello"}]) != same
    assert len(same) == 32


@given(IDS)
def test_a_shard_is_a_set_of_buckets(prompt: str) -> None:
    for n in POWERS:
        assert keys.shard_of(prompt, n) == keys.bucket_of(prompt) % n


BASE = Sampling(temperature=0.0, seed=1, grammar=Grammar.choice(["a", "b"]), extra=(("top_k", 5),))
IDENTITY = {"model": "m", "dtype": "float32", "quantization": None, "args": {}}


def key(identity: dict[str, Any] = IDENTITY, text: str = "hi", **changes: Any) -> str:
    return keys.call_key(identity, ask(text), replace(BASE, **changes).key())


def test_a_call_key_changes_with_every_component() -> None:
    found = [
        key(),
        key({**IDENTITY, "model": "other"}),
        key({**IDENTITY, "dtype": "bfloat16"}),
        key({**IDENTITY, "quantization": "fp8"}),
        key(text="hi "),
        key(temperature=0.7),
        key(top_p=0.9),
        key(max_tokens=8),
        key(seed=2),
        key(seed=None),
        key(stop=("x",)),
        key(logprobs=5),
        key(grammar=None),
        key(grammar=Grammar.choice(["b", "a"])),
        key(grammar=Grammar.regex("a|b")),
        key(extra=()),
        key(extra=(("top_k", 6),)),
        key(extra=(("top_p", 5),)),
        keys.call_key(IDENTITY, [{"role": "system", "content": "hi"}], BASE.key()),
        keys.call_key(IDENTITY, [*ask("hi"), *ask("hi")], BASE.key()),
    ]
    assert len(set(found)) == len(found)


def test_a_call_key_does_not_change_with_spelling() -> None:
    assert key(dict(reversed(IDENTITY.items()))) == key()
    assert key(temperature=0, extra=(("top_k", 5),)) == key()
    two = (("a", 1), ("b", 2))
    assert key(extra=two) == key(extra=two[::-1])


def test_the_order_of_a_schema_is_another_question() -> None:
    # Engines generate the fields in the order of the schema: a reason before the score, or after it.
    first, second = ({"properties": {a: {}, b: {}}} for a, b in (("reason", "score"), ("score", "reason")))
    assert key(grammar=Grammar.json(first)) != key(grammar=Grammar.json(second))


@pytest.mark.parametrize(
    ("number", "near"), [(3, "2 and 4"), (0, "1 and 2"), (-4, "1 and 2"), (48, "32 and 64"), (2000, "512 and 1024")]
)
def test_a_bad_number_of_shards_is_told_with_the_nearest_good_ones(number: int, near: str) -> None:
    with pytest.raises(ValueError, match=rf"must divide 1024.*not {number}; the nearest are {near}"):
        keys.check_num_shards(number)


def test_good_numbers_of_shards() -> None:
    assert [keys.check_num_shards(n) for n in POWERS] == POWERS


@settings(max_examples=200)
@given(st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4))
def test_ranges_of_derived_numbers(parts: list[Any]) -> None:
    assert 0 <= keys.derived_seed(*parts) < 2**31 - 1
    assert 0.0 <= keys.unit_hash(*parts) < 1.0
    assert keys.derived_seed(*parts) == keys.derived_seed(*parts)


def test_derived_numbers_are_spread() -> None:
    assert len({keys.derived_seed("p", k) for k in range(1000)}) == 1000
    mean = sum(keys.unit_hash("x", i) for i in range(2000)) / 2000
    assert abs(mean - 0.5) < 0.03


def test_a_value_that_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        keys.digest(float("nan"))
    with pytest.raises(TypeError):
        keys.digest(object())


def test_half_a_character_has_a_digest_all_the_same() -> None:
    assert keys.prompt_id(ask("\ud83d")) == keys.prompt_id(ask("\ufffd"))  # as it is stored
