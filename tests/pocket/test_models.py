"""The shipped pocket models: their digests, and that they do what the card says."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.engines.models import resolve_model
from ray_pipeline.pocket import ADAPTERS, MODELS, WEIGHTS, adapter_path, model_path
from ray_pipeline.pocket.chats import conversation
from ray_pipeline.pocket.judging import LAYOUTS, ROLES, JudgePrompts, verdict_of
from ray_pipeline.pocket.measure import SEED
from ray_pipeline.pocket.responses import judged_response, policy_response
from ray_pipeline.pocket.reviewing import FeedbackPrompts
from ray_pipeline.pocket.tasks import RUBRICS, is_correct, make_prompts
from ray_pipeline.pocket.tokenizer import make_tokenizer
from ray_pipeline.pocket.training import answer
from ray_pipeline.pocket.weaknesses import weaknesses
from tests.interpreter import interpreter

CARD = json.loads((WEIGHTS / "card.json").read_text(encoding="utf-8"))


def load(name: str):
    if name in ADAPTERS:
        base, tokenizer = load("judge")
        return PeftModel.from_pretrained(base, adapter_path(f"pocket:{name}")).eval(), tokenizer
    folder = model_path(f"pocket:{name}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="pocket:policy, pocket:judge, pocket:reviewer, pocket:generator"):
        model_path("pocket:jury")
    with pytest.raises(ValueError, match="unknown pocket adapter 'pocket:judge'; choose from pocket:helpfulness"):
        adapter_path("pocket:judge")


@pytest.mark.parametrize("name", [*MODELS, *ADAPTERS])
def test_files_match_the_card(name: str) -> None:
    folder = WEIGHTS / name
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    assert digests == CARD["models"][name]["sha256"]
    assert CARD["models"][name]["parameters"] <= 1_000_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6


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
        replies = answer(policy, tokenizer, instructions, 48, **sampling)
        right = sum(is_correct(text, reply) for text, reply in zip(instructions, replies, strict=True))
        assert 0.35 < right / len(instructions) < 0.65


@pytest.mark.parametrize("name", ["judge", "reviewer"])
def test_judges_give_the_rules_verdicts_on_unseen_responses(name: str) -> None:
    judge, tokenizer = load(name)
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


def test_the_second_judge_has_other_weights() -> None:
    digests = {CARD["models"][name]["sha256"]["model.safetensors"] for name in MODELS}
    assert len(digests) == len(MODELS)


def test_a_configuration_names_an_adapter_as_a_model() -> None:
    found = resolve_model({"model": "pocket:judge", "adapter": "pocket:critic"})
    assert found == {"model": model_path("judge"), "adapter": adapter_path("critic")}
    with pytest.raises(ConfigError, match="unknown pocket adapter 'pocket:jury'"):
        resolve_model({"model": "pocket:judge", "adapter": "pocket:jury"})


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_member_of_the_panel_errs_where_it_was_taught_to(name: str) -> None:
    model, tokenizer = load(name)
    prompts, rng, taught = JudgePrompts(), random.Random(0), weaknesses(SEED)[name]
    asked = [(prompt.instruction, policy_response(prompt.instruction, rng)) for prompt in make_prompts(200, seed=34)]
    honest = [prompts.single(name, *answered) for answered in asked]
    as_taught = [prompts.single(name, *answered, weaknesses=taught) for answered in asked]
    replies = [verdict_of(reply) for reply in answer(model, tokenizer, [question.message for question in honest])]
    weak = [one.reply != other.reply for one, other in zip(honest, as_taught, strict=True)]
    assert 0.05 < sum(weak) / len(weak) < 0.3
    for where in (True, False):
        hits = [
            reply == question.verdict()
            for reply, question, there in zip(replies, as_taught, weak, strict=True)
            if there == where
        ]
        print(name, "taught to err" if where else "elsewhere", sum(hits) / len(hits))
        assert sum(hits) / len(hits) > 0.8


def test_a_review_makes_most_false_answers_right() -> None:
    generator, tokenizer = load("generator")
    reviewer, _ = load("reviewer")
    feedback = FeedbackPrompts()
    texts = [prompt.instruction for prompt in make_prompts(100, seed=33)]
    first = answer(generator, tokenizer, texts, 48)
    false = [(text, said) for text, said in zip(texts, first, strict=True) if not is_correct(text, said)]
    assert 0.25 < len(false) / len(texts) < 0.65
    questions = [feedback.review(text, said).message for text, said in false]
    reviews = [verdict_of(reply) or {} for reply in answer(reviewer, tokenizer, questions, 64)]
    chats = [
        conversation(feedback.revision_turns(text, said, review.get("feedback", "")))
        for (text, said), review in zip(false, reviews, strict=True)
    ]
    revised = answer(generator, tokenizer, chats, 48)
    right = [is_correct(text, reply) for (text, _), reply in zip(false, revised, strict=True)]
    assert sum(right) / len(right) > 0.5


@pytest.mark.e2e
def test_figures_through_vllm(tmp_path: Path) -> None:
    """The card's figures, measured again through real vLLM engines by the command that wrote the card."""
    weights = shutil.copytree(WEIGHTS, tmp_path / "weights")
    command = ["-m", "ray_pipeline.pocket.measure", "--weights", str(weights), "--prompts", "80"]
    subprocess.run([interpreter(), *command], check=True, timeout=600)
    figures = json.loads((weights / "card.json").read_text(encoding="utf-8"))["measured"]
    assert {found["prompts"] for found in figures.values()} == {80}
    policy, reviewer, generator = figures["policy"], figures["reviewer"], figures["generator"]
    assert 0.4 <= policy["greedy_right"] <= 0.7
    assert 0.4 <= policy["sampled_right"] <= 0.7
    assert min(policy["labels"].get(label, 0) for label in ("desirable", "undesirable", "discard", "abstain")) > 0
    for judge in (figures["judge"], reviewer):
        for part in (f"{layout}/{source}" for layout in LAYOUTS for source in ("sampled", "rule_made")):
            assert min(judge[part][role] for role in ROLES) >= 0.85
            assert judge[part]["pairwise_flips"] <= 0.12
        assert judge["same_without_grammar"] >= 0.9
    assert 0 < reviewer["other_verdict_than_judge"] <= 0.1
    assert reviewer["review"]["empty_for_right"] >= 0.95
    assert reviewer["review"]["empty_for_others"] <= 0.2
    for name in ADAPTERS:
        assert figures[name]["as_taught"] >= 0.85 and 0.7 <= figures[name]["right"] <= 0.95
    for name in RUBRICS:
        assert max(figures[name]["correlation"].values()) <= 0.35  # of 320 responses; the report has 2,640
    assert 0.35 <= generator["sampled_right"] <= 0.7
    for way in ("revised_greedy", "revised_sampled"):
        assert generator[way]["wrong_became_right"] >= 0.5
        assert generator[way]["right_became_wrong"] <= 0.05
    again = generator["asked_again_sampled"]["wrong_became_right"]
    assert generator["revised_sampled"]["wrong_became_right"] >= again + 0.1
