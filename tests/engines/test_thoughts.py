"""Thoughts and answers: every form of thoughts, tags that are text, and replies without an answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.engines.base import Completion
from ray_pipeline.engines.thoughts import answered, opens_thought, split_thoughts
from tests.agents.readers import read_score

FORMS = [
    ("<think>", "</think>"),
    ("<Thinking>", "</Thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]
#: Texts without tags.
WORDS = st.text(st.characters(exclude_characters="<>[]◁▷|`", exclude_categories=["Cs"]), max_size=60).filter(
    lambda text: not text.lstrip().lower().startswith("analysis")
)


@pytest.mark.parametrize(("opening", "closing"), FORMS)
@pytest.mark.parametrize("between", ["", "\n", "\n\n", " "])
def test_every_form(opening: str, closing: str, between: str) -> None:
    found = split_thoughts(f"\n{opening}{between}Score: 9?{between}{closing}{between}The answer")
    assert found is not None and found.closed
    assert (found.thoughts, found.answer) == ("Score: 9?", "The answer")
    unclosed = split_thoughts(f"{opening}{between}Score: 9? The answer")
    assert unclosed is not None and not unclosed.closed and unclosed.answer == ""


@given(st.sampled_from(FORMS[:9]), WORDS, WORDS)
@settings(max_examples=150, deadline=None)
def test_thought_and_answer_come_back(form: tuple[str, str], thought: str, answer: str) -> None:
    found = split_thoughts(f"{form[0]}{thought}{form[1]}\n{answer}")
    assert found is not None and found.closed
    assert (found.thoughts, found.answer) == (thought.strip(), answer.lstrip())


@given(WORDS, WORDS)
@settings(max_examples=100, deadline=None)
def test_a_reply_that_starts_inside_a_thought(thought: str, answer: str) -> None:
    for inside in (True, False):
        found = split_thoughts(f"{thought}\n</think>\n\n{answer}", inside)
        assert found is not None and (found.thoughts, found.answer) == (thought.strip(), answer.lstrip())
    assert split_thoughts(thought) is None
    unclosed = split_thoughts(thought, inside=True)
    assert unclosed is None if not thought else unclosed is not None and not unclosed.closed


@given(WORDS)
@settings(max_examples=100, deadline=None)
def test_a_reply_without_tags_is_left_as_it_is(text: str) -> None:
    reply = Completion(text, "stop", 1, 1, 0)
    assert answered(reply) is reply


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", "`", "```\n", " "]), max_size=12), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_mixture_of_tags_is_read_and_read_alike_again(parts: list[str], inside: bool) -> None:
    text = "".join(parts)
    reply = Completion(text, "stop", 1, 1, 0, inside=inside)
    found = answered(reply)
    assert answered(found) == found and (found.raw or found).text == text
    assert found.text in text and (found.thoughts or "") in text
    assert not found.text.lstrip().startswith("<think>")


@pytest.mark.parametrize(
    "text",
    [
        "The tag `<think>` opens a thought and `</think>` ends it.",
        "Write:\n```\nx\n</think>\n```\nThen stop.",
        'It says "</think>" at the end.',
        "Use <think>…</think> around it.",
        "close it with </think> and go on",
        "Analysis of the text shows that assistants are final.",
    ],
)
def test_tags_that_are_text(text: str) -> None:
    assert split_thoughts(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><think>b</think>\nanswer", "answer"),
        ('<think>it says\n</think>\n{"score": 10}, a trick\n</think>\n{"score": 2}', '{"score": 2}'),
        ("<think>I use <think> here</think>answer", "answer"),
        ("<think>plan</think>Write `</think>` at the end.", "Write `</think>` at the end."),
        ("<think>plan</think>\n```\n<think>\nx\n</think>\n```", "```\n<think>\nx\n</think>\n```"),
        ("<|START_THINKING|>t<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>", "yes"),
        ("analysisThe user wants four.assistantfinalIt is four.", "It is four."),
        ("Score: 9?</think>3", "3"),
    ],
)
def test_tags_inside_thoughts_and_answers(text: str, answer: str) -> None:
    found = split_thoughts(text)
    assert found is not None and found.answer == answer


def test_a_thought_without_an_end_is_no_answer() -> None:
    for reply in (
        Completion("<think>The answer is", "stop", 1, 1, 0),
        Completion("The answer is", "stop", 1, 1, 0, inside=True),
        Completion("", "stop", 1, 1, 0, reasoning="The answer is"),
    ):
        found = answered(reply)
        assert (found.text, found.finish_reason, found.thoughts) == ("", "length", "The answer is")
    assert answered(Completion("", "content_filter", 1, 1, 0, reasoning="x")).finish_reason == "content_filter"


def test_thoughts_apart_and_in_tags_are_both_split_off_or_kept() -> None:
    reply = Completion("<think>b</think>\nanswer", "stop", 1, 1, 0, reasoning="a\n")
    found = answered(reply)
    assert (found.text, found.thoughts, found.raw) == ("answer", "a\n\nb", reply)
    assert answered(reply, keep=True).text == "<think>\na\n</think>\n\n<think>b</think>\nanswer"
    assert answered(Completion("<think>b</think>c", "stop", 1, 1, 0), keep=True).text == "<think>b</think>c"


def test_a_judge_that_thinks_is_read_by_its_answer() -> None:
    """K4.2"""
    thinking = '<think>Score: 9? Or {"score": 10}?</think>\n{"reason": "r", "score": 3}'
    for text, expected in ((thinking, 3), ("Score: 9\n</think>\nScore: 4", 4), ("<think>Score: 9", None)):
        read = read_score(Completion(text, "stop", 1, 1, 0), 1, 10)
        assert (read.fields["score"] if read else None) == expected


def test_prompts_that_open_a_thought() -> None:
    assert opens_thought("<|im_start|>assistant\n<think>\n") and opens_thought("<｜Assistant｜><think>\n")
    assert not opens_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") and not opens_thought("<think> a")
