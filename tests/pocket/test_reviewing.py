"""Reviews and revisions of the pocket world: the rules, and what reviewer and generator are trained on."""

from __future__ import annotations

import json
import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.pocket import tasks
from ray_pipeline.pocket.chats import conversation
from ray_pipeline.pocket.judging import JudgePrompts
from ray_pipeline.pocket.make_models import RECIPES, generator_batches, judge_batches, reviewer_batches
from ray_pipeline.pocket.measure import REVIEW_TOKENS
from ray_pipeline.pocket.responses import judged_response
from ray_pipeline.pocket.reviewing import (
    BETWEEN_REVIEWS,
    FEEDBACK_FILE,
    STUBBORN_SHARE,
    FeedbackPrompts,
    feedback_on,
    random_review,
    random_revision,
    review_score,
    second_opinion,
)
from ray_pipeline.pocket.tasks import grade, pool_of, truth
from ray_pipeline.pocket.tokenizer import make_tokenizer

PROMPTS = FeedbackPrompts()
TOKENIZER = make_tokenizer()

seeds = st.integers(0, 2**32)
instructions = seeds.map(lambda seed: tasks.random_prompt(random.Random(seed)).instruction)


WAY = "9 then 4 gives"


@pytest.mark.parametrize(
    ("response", "feedback", "score"),
    [
        (f"{WAY} 5", "", 8),
        ("5", "lucky it must be 9 then 4", 8),
        (f"the answer is {WAY} 5", "padded it must be 9 then 4", 7),
        (f"{WAY} 6", "partial it must be 9 then 4", 4),
        (f"{WAY} 8", "wrong it must be 9 then 4", 2),
        ("span of 9 7 4", "circular it must be 9 then 4", 5),
        ("", "refused it must be 9 then 4", 2),
    ],
)
def test_the_review_of_every_kind_of_answer(response: str, feedback: str, score: int) -> None:
    instruction = "please span of 9 7 4"
    assert feedback_on(instruction, response) == feedback
    assert review_score(instruction, response) == score
    asked = PROMPTS.review(instruction, response, scored=True)
    assert asked.message == f"task : {instruction} answer : {response}\nhelp judge"
    assert list(json.loads(asked.reply).items()) == [
        ("reason", f"9 then 4 gives 5 {grade(instruction, response)}"),
        ("feedback", feedback),
        ("score", score),
    ]
    plain = PROMPTS.review(instruction, response)
    assert plain.message.endswith("\nhelp")
    assert list(json.loads(plain.reply)) == ["reason", "feedback"]
    assert plain.verdict() == {"feedback": feedback}


@given(instructions, seeds)
def test_only_a_right_answer_gets_no_feedback_and_feedback_never_misleads(instruction: str, seed: int) -> None:
    response = judged_response(instruction, random.Random(seed))
    feedback = feedback_on(instruction, response)
    assert (feedback == "") == (grade(instruction, response) == "right")
    if feedback:
        fault, hint = feedback.split(" it must be ")
        answer = truth(instruction).split()
        assert fault == grade(instruction, response)
        assert hint.split() == answer[: len(hint.split())]
        assert len(answer) / 2 <= len(hint.split()) < len(answer) / 2 + 1
    assert feedback_on(instruction, truth(instruction)) == ""


@given(instructions, seeds)
def test_a_review_is_in_the_models_words_and_fits_its_budget(instruction: str, seed: int) -> None:
    asked = random_review(instruction, PROMPTS, random.Random(seed))
    assert asked.role == "review"
    assert len(TOKENIZER(asked.reply)["input_ids"]) < REVIEW_TOKENS
    spelled = TOKENIZER.tokenize(asked.message)
    assert [token for token in spelled if len(token) == 1 and token.isalpha() and token not in "abĠ"] == ["Ċ"]


@given(instructions, seeds, st.text(max_size=20))
def test_a_conversation_is_what_the_chat_template_makes_of_it(instruction: str, seed: int, feedback: str) -> None:
    turns = PROMPTS.revision_turns(instruction, judged_response(instruction, random.Random(seed)), feedback)
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), turns, strict=True)]
    made = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if "<|" not in "".join(turns):
        assert f"<|user|>{conversation(turns)}<|end|><|assistant|>" == made
    assert turns == [instruction, turns[1], feedback]


def test_revisions_start_from_answers_with_a_fault_and_nearly_always_reach_the_truth() -> None:
    rng = random.Random(0)
    drawn = [tasks.random_prompt(rng).instruction for _ in range(2000)]
    reached, doubled = 0, 0
    for instruction in drawn:
        message, revised = random_revision(instruction, PROMPTS, rng)
        asked, said, feedback = (turn.removesuffix("<|end|>") for turn in _turns(message))
        assert asked == instruction
        assert grade(instruction, said) != "right"
        assert feedback_on(instruction, said) in feedback.split(BETWEEN_REVIEWS)
        reached += revised == truth(instruction)
        doubled += BETWEEN_REVIEWS in feedback
    assert 1 - STUBBORN_SHARE < reached / len(drawn) < 1
    assert 0.1 < doubled / len(drawn) < 0.2


def _turns(message: str) -> list[str]:
    first, rest = message.split("<|assistant|>")
    return [first, *rest.split("<|user|>")]


def test_two_reviewers_come_in_any_order_and_the_other_one_may_err() -> None:
    instruction, response = "please span of 9 7 4", "12"
    own = feedback_on(instruction, response)
    rng = random.Random(0)
    pairs = [second_opinion(instruction, response, own, rng).split(BETWEEN_REVIEWS) for _ in range(200)]
    assert {pair.index(own) for pair in pairs} == {0, 1}
    others = [next(said for said in pair if said != own).split(" it must be ")[1] for pair in pairs]
    assert 0.3 < sum(hint == "9 then 4" for hint in others) / len(others) < 0.9


def test_batches_repeat_and_never_show_held_out_instructions_nor_the_judges_data() -> None:
    judging, recipe = JudgePrompts(), RECIPES["reviewer"]
    first, again = (next(reviewer_batches("0", judging, PROMPTS, recipe)) for _ in range(2))
    assert first == again
    assert [len(group) for group in first] == [recipe.singles, recipe.pairs, recipe.reviews]
    assert first != next(reviewer_batches("1", judging, PROMPTS, recipe))
    assert first[:2] != next(judge_batches("0", judging, recipe))
    for message, _ in first[2]:
        assert pool_of(message.split(" : ")[1].removesuffix(" answer")) == "weights"

    plain, revisions = next(generator_batches(0, PROMPTS, RECIPES["generator"]))
    assert (len(plain), len(revisions)) == (RECIPES["generator"].singles, RECIPES["generator"].reviews)
    assert {pool_of(message.split("<|end|>")[0]) for message, _ in plain + revisions} == {"weights"}


def test_the_feedback_file_has_the_keys_that_the_loop_reads() -> None:
    texts = yaml.safe_load(FEEDBACK_FILE.read_text(encoding="utf-8"))
    assert {"review", "revise"} == set(texts)
    assert {"system", "shared", "rubric"} == set(texts["review"])
