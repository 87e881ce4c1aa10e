"""The shipped pocket models: their digests, and that they do what the card says."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_pipeline.pocket import MODELS, WEIGHTS, model_path
from ray_pipeline.pocket.judging import ROLES, JudgePrompts, verdict_of
from ray_pipeline.pocket.measure import measure
from ray_pipeline.pocket.responses import judged_response
from ray_pipeline.pocket.tasks import is_correct, make_prompts
from ray_pipeline.pocket.tokenizer import make_tokenizer
from ray_pipeline.pocket.training import answer

CARD = json.loads((WEIGHTS / "card.json").read_text(encoding="utf-8"))


def load(name: str):
    folder = model_path(f"pocket:{name}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="pocket:policy, pocket:judge"):
        model_path("pocket:jury")


@pytest.mark.parametrize("name", MODELS)
def test_files_match_the_card(name: str) -> None:
    folder = WEIGHTS / name
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    assert digests == CARD["models"][name]["sha256"]
    assert CARD["models"][name]["parameters"] <= 1_000_000
    assert (folder / "model.safetensors").stat().st_size < 5e6


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_tokenizer_is_the_made_one(name: str) -> None:
    shipped = AutoTokenizer.from_pretrained(model_path(name))
    made = make_tokenizer()
    assert shipped.get_vocab() == made.get_vocab()
    assert shipped.chat_template == made.chat_template
    assert shipped.eos_token == "<|end|>"


def test_policy_is_right_on_about_half_of_unseen_prompts() -> None:
    policy, tokenizer = load("policy")
    instructions = [prompt.instruction for prompt in make_prompts(128, seed=31)]
    torch.manual_seed(0)
    for sampling in ({}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}):
        replies = answer(policy, tokenizer, instructions, 24, **sampling)
        right = sum(is_correct(text, reply) for text, reply in zip(instructions, replies, strict=True))
        assert 0.35 < right / len(instructions) < 0.65


def test_judge_gives_the_rules_verdicts_on_unseen_responses() -> None:
    judge, tokenizer = load("judge")
    prompts, rng = JudgePrompts(), random.Random(0)
    questions = []
    for index, prompt in enumerate(make_prompts(150, seed=32)):
        role = ROLES[index % len(ROLES)]
        if role == "pairwise":
            responses = [judged_response(prompt.instruction, rng) for _ in range(2)]
            questions.append(prompts.pairwise(prompt.instruction, *responses))
        else:
            questions.append(prompts.single(role, prompt.instruction, judged_response(prompt.instruction, rng)))
    replies = answer(judge, tokenizer, [question.message for question in questions])
    right = sum(verdict_of(reply) == question.verdict() for question, reply in zip(questions, replies, strict=True))
    assert right / len(questions) > 0.93


@pytest.mark.e2e
def test_figures_through_vllm() -> None:
    """The card's figures, measured again through a real vLLM engine: two engine starts, about a minute and a half."""
    figures = measure(WEIGHTS, 120)
    policy, judge = figures["policy"], figures["judge"]
    assert 0.4 <= policy["greedy_right"] <= 0.6
    assert 0.4 <= policy["sampled_right"] <= 0.6
    assert min(policy["labels"].get(label, 0) for label in ("desirable", "undesirable", "discard", "abstain")) >= 0.03
    for part in ("shared_first/sampled", "shared_first/rule_made", "rubric_first/sampled", "rubric_first/rule_made"):
        assert min(judge[part][role] for role in ROLES if role != "pairwise") >= 0.95
        assert judge[part]["pairwise"] >= 0.9
        assert judge[part]["pairwise_flips"] <= 0.05
    assert judge["same_without_grammar"] >= 0.95
