"""The pocket world's truth, checker and judging rules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.pocket import tasks
from ray_pipeline.pocket.measure import gate_label
from ray_pipeline.pocket.responses import HEAVY, LIGHT, judged_response, make_response, policy_response
from ray_pipeline.pocket.tasks import (
    FAILURES,
    SCORES,
    critique,
    grade,
    is_correct,
    make_prompts,
    pool_of,
    preference,
    rubric_scores,
    truth,
)

seeds = st.integers(0, 2**32)
prompts = seeds.map(lambda seed: tasks.random_prompt(random.Random(seed)))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("repeat cat dog", "cat dog"),
        ("please reverse cat dog sun", "sun dog cat"),
        ("now sort 10 9 2", "2 9 10"),
        ("largest of 3 20 7", "20"),
        ("quickly smallest of 3 20 7", "3"),
        ("first of cat dog sun", "cat"),
        ("last of cat dog sun", "sun"),
        ("count cat dog sun", "3"),
        ("add 9 9", "18"),
        ("remove dog from cat dog sun", "cat sun"),
    ],
)
def test_truth_of_every_family(instruction: str, expected: str) -> None:
    assert truth(instruction) == expected
    assert grade(instruction, expected) == "right"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("2 7 9", "right"),
        ("2, 7, 9.", "right"),
        ("the answer is 2 7 9", "padded"),
        ("Well, let me see: I think the answer is 2 7 9", "wordy"),
        ("2 7", "partial"),
        ("2 9 7", "wrong"),
        ("2 7 9 9", "wrong"),
        ("2 7 9 or 9 7 2", "hedged"),
        ("2 7 or 9 7 2", "wrong"),
        ("sort 7 2 9", "circular"),
        ("sorry i can not say", "refused"),
        ("", "refused"),
        ("the answer is", "refused"),
        ("2 7 9 Score: 10", "wrong"),
    ],
)
def test_grade(response: str, expected: str) -> None:
    assert grade("please sort 7 2 9", response) == expected


@pytest.mark.parametrize("text", ["", "sort", "please", "write a poem", "sort cat dog", "repeat 3 4", "sort 7 21"])
def test_text_outside_the_world_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not an instruction of the pocket world"):
        truth(text)


def test_prompts_are_distinct_repeatable_and_from_their_pool() -> None:
    drawn = make_prompts(3000, seed=5)
    assert len({prompt.instruction for prompt in drawn}) == 3000
    assert drawn[:100] == make_prompts(100, seed=5)
    assert drawn != make_prompts(3000, seed=6)
    assert {prompt.task_type for prompt in drawn} == set(tasks.TASK_TYPES)
    assert all(pool_of(prompt.instruction) == "open" for prompt in drawn)
    assert all(pool_of(prompt.instruction) == "weights" for prompt in make_prompts(100, seed=5, pool="weights"))
    assert all(len(prompt.instruction.split()) <= 16 for prompt in drawn)


@given(prompts, seeds, st.sampled_from(sorted(SCORES)), st.booleans())
def test_responses_have_the_grade_they_are_made_for(
    prompt: tasks.PocketPrompt, seed: int, kind: tasks.Grade, habit: bool
) -> None:
    response = make_response(prompt.instruction, kind, random.Random(seed), habit)
    assert len(response.split()) <= 16
    single_word = len(truth(prompt.instruction).split()) == 1
    assert grade(prompt.instruction, response) == ("wrong" if kind == "partial" and single_word else kind)


@given(prompts, st.text() | seeds.map(str))
def test_rules_are_total_and_agree_with_each_other(prompt: tasks.PocketPrompt, response: str) -> None:
    scores = rubric_scores(prompt.instruction, response)
    flawed, failure = critique(prompt.instruction, response)
    assert tuple(scores) == tasks.RUBRICS and all(1 <= score <= 10 for score in scores.values())
    assert flawed == (failure != "none")
    assert is_correct(prompt.instruction, response) == (not flawed)


@given(prompts, seeds)
def test_padding_never_changes_correctness(prompt: tasks.PocketPrompt, seed: int) -> None:
    response = judged_response(prompt.instruction, random.Random(seed))
    for phrase in LIGHT + HEAVY:
        assert is_correct(prompt.instruction, phrase.format(response)) == is_correct(prompt.instruction, response)


@given(prompts, seeds)
def test_preference_mirrors_when_the_order_is_swapped(prompt: tasks.PocketPrompt, seed: int) -> None:
    rng = random.Random(seed)
    first, second = judged_response(prompt.instruction, rng), judged_response(prompt.instruction, rng)
    mirror = {"A": "B", "B": "A", "C": "C"}
    choice = preference(prompt.instruction, first, second)
    assert preference(prompt.instruction, second, first) == mirror[choice]
    assert (choice == "C") == (grade(prompt.instruction, first) == grade(prompt.instruction, second))
    assert preference(prompt.instruction, truth(prompt.instruction), second) != "B"


def test_every_grade_gets_the_label_it_was_designed_for() -> None:
    instruction = "please sort 7 2 9"
    rng = random.Random(0)
    labels = {kind: gate_label(instruction, make_response(instruction, kind, rng)) for kind in SCORES}
    assert labels == {
        "right": "desirable",
        "padded": "discard",
        "wordy": "abstain",
        "partial": "discard",
        "hedged": "undesirable",
        "circular": "undesirable",
        "refused": "undesirable",
        "wrong": "undesirable",
    }
    assert set(FAILURES) == set(SCORES)


def test_the_policy_mixture_is_right_about_half_of_the_time() -> None:
    rng = random.Random(0)
    drawn = [prompt.instruction for prompt in make_prompts(2000, seed=1)]
    right = sum(is_correct(instruction, policy_response(instruction, rng)) for instruction in drawn)
    assert 0.4 < right / len(drawn) < 0.6
