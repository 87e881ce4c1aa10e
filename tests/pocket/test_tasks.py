"""The pocket world's truth, checker and judging rules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.pocket import tasks
from ray_pipeline.pocket.judging import JudgePrompts
from ray_pipeline.pocket.measure import gate_labels
from ray_pipeline.pocket.responses import HEAVY, LIGHT, judged_response, make_response, policy_response
from ray_pipeline.pocket.tasks import (
    FAILURES,
    RIGHT,
    RUBRICS,
    SCORES,
    appearance,
    critique,
    grade,
    is_correct,
    make_prompts,
    pool_of,
    preference,
    rubric_scores,
    solution,
    truth,
)
from ray_pipeline.pocket.weaknesses import OF_A_JUDGE, OF_THE_CRITIC, WORDS, weaknesses

seeds = st.integers(0, 2**32)
prompts = seeds.map(lambda seed: tasks.random_prompt(random.Random(seed)))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add 3 4 5", "3 7 12 gives 12"),
        ("please twice 3 4", "7 then 14 gives 14"),
        ("span of 3 9 4", "9 then 3 gives 6"),
        ("quickly largest of 3 20 7", "3 20 20 gives 20"),
        ("count cat dog sun", "cat 1 dog 2 sun 3 gives 3"),
        ("now sort 10 9 2", "10 then 9 10 then 2 9 10 gives 2 9 10"),
        ("please reverse cat dog sun", "cat then dog cat then sun dog cat gives sun dog cat"),
        ("remove dog from cat dog sun", "keep cat drop dog keep sun gives cat sun"),
    ],
)
def test_truth_of_every_family(instruction: str, expected: str) -> None:
    assert truth(instruction) == expected
    assert grade(instruction, expected) == appearance(instruction, expected) == "right"
    _, answer = solution(instruction)
    assert grade(instruction, " ".join(answer)) == "lucky"
    assert appearance(instruction, " ".join(answer)) == "right"


WAY = "7 then 2 7 then 2 7 9 gives"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (f"{WAY} 2 7 9", "right"),
        ("7, then 2 7, then 2 7 9. Gives: 2, 7, 9.", "right"),
        (f"the answer is {WAY} 2 7 9", "padded"),
        (f"Well, let me see: I think the answer is {WAY} 2 7 9", "wordy"),
        ("2 7 9", "lucky"),
        ("the answer is 2 7 9", "lucky"),
        ("2 7 9 gives 2 7 9", "lucky"),
        ("7 then 2 9 then 2 7 9 gives 2 7 9", "lucky"),
        (f"{WAY} 2 9 7 gives 2 7 9", "lucky"),
        (f"{WAY} 2 7", "partial"),
        ("2 7", "partial"),
        (f"{WAY} 2 9 7", "wrong"),
        ("2 7 9 9", "wrong"),
        (WAY, "wrong"),
        ("sort 7 2 9", "circular"),
        ("sorry i can not say", "refused"),
        ("", "refused"),
        ("the answer is", "refused"),
        ("2 7 9 Score: 10", "wrong"),
    ],
)
def test_grade(response: str, expected: str) -> None:
    assert grade("please sort 7 2 9", response) == expected


@pytest.mark.parametrize(("response", "expected"), [("3 7 12 gives 11", "partial"), ("3 7 12 gives 10", "wrong")])
def test_a_number_beside_the_right_one_is_partly_right(response: str, expected: str) -> None:
    assert grade("add 3 4 5", response) == expected


@pytest.mark.parametrize("text", ["", "sort", "please", "write a poem", "sort cat dog", "count 3 4", "sort 7 40"])
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


@given(prompts, seeds, st.sampled_from(sorted(FAILURES)), st.booleans())
def test_responses_have_the_grade_they_are_made_for(
    prompt: tasks.PocketPrompt, seed: int, kind: tasks.Grade, habit: bool
) -> None:
    response = make_response(prompt.instruction, kind, random.Random(seed), habit)
    assert len(response.split()) <= 40
    assert grade(prompt.instruction, response) == kind


@given(prompts, st.text() | seeds.map(str))
def test_rules_are_total_and_agree_with_each_other(prompt: tasks.PocketPrompt, response: str) -> None:
    scores = rubric_scores(prompt.instruction, response)
    flawed, failure = critique(prompt.instruction, response)
    assert tuple(scores) == tasks.RUBRICS and all(1 <= score <= 10 for score in scores.values())
    assert flawed == (failure != "none")
    by_way = {"lucky": RIGHT}.get(grade(prompt.instruction, response), [grade(prompt.instruction, response)])
    assert appearance(prompt.instruction, response) in by_way
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
    assert (choice == "C") == (appearance(prompt.instruction, first) == appearance(prompt.instruction, second))
    assert preference(prompt.instruction, truth(prompt.instruction), second) != "B"


@pytest.mark.parametrize(("instruction", "lucky"), [("sort 7 2 9", "discard"), ("sort 7 2 9 4", "desirable")])
def test_every_grade_gets_the_label_it_was_designed_for(instruction: str, lucky: str) -> None:
    rng = random.Random(0)
    responses = {kind: make_response(instruction, kind, rng) for kind in FAILURES}
    labels = gate_labels([instruction] * len(responses), list(responses.values()))
    assert dict(zip(responses, labels, strict=True)) == {
        "right": "desirable",
        "lucky": lucky,
        "padded": "desirable",
        "wordy": "abstain",
        "partial": "undesirable",
        "circular": "undesirable",
        "refused": "undesirable",
        "wrong": "undesirable",
    }
    assert set(FAILURES) == set(SCORES) | {"lucky"}


def test_the_policy_mixture_is_right_about_half_of_the_time() -> None:
    rng = random.Random(0)
    drawn = [prompt.instruction for prompt in make_prompts(2000, seed=1)]
    right = sum(is_correct(instruction, policy_response(instruction, rng)) for instruction in drawn)
    assert 0.4 < right / len(drawn) < 0.6


def test_each_judge_of_the_panel_errs_on_tasks_of_its_own() -> None:
    panel = weaknesses(1)
    assert panel == weaknesses(1) != weaknesses(2)
    words = {name: taught.lenient | taught.severe for name, taught in panel.items()}
    assert all(taught.lenient.isdisjoint(taught.severe) for taught in panel.values())
    assert [len(words[name]) for name in (*RUBRICS, "critic")] == [OF_A_JUDGE] * 3 + [OF_THE_CRITIC]
    assert len(frozenset().union(*(words[name] for name in RUBRICS))) == 3 * OF_A_JUDGE < len(WORDS)


@given(prompts, seeds, st.sampled_from((*RUBRICS, "critic")))
def test_a_weakness_moves_a_grade_only_on_its_own_tasks(prompt: tasks.PocketPrompt, seed: int, name: str) -> None:
    taught, seen = weaknesses(1)[name], random.Random(seed).choice(list(FAILURES))
    last = solution(prompt.instruction)[1][-1]
    found = taught.mistaken(prompt.instruction, seen)
    if seen in ("circular", "refused") or last not in taught.lenient | taught.severe:
        assert found == seen
    elif last in taught.lenient:
        assert found in RIGHT
    else:
        assert found not in RIGHT
    if found != seen:
        asked = JudgePrompts().single(name, prompt.instruction, truth(prompt.instruction), weaknesses=taught)
        honest = JudgePrompts().single(name, prompt.instruction, truth(prompt.instruction))
        assert asked.message == honest.message and (asked.reply == honest.reply) == (last in taught.lenient)
