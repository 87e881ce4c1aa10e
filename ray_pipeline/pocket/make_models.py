"""Makes the pocket models from a seed: `python -m ray_pipeline.pocket.make_models --out DIR --seed 0`.

1. solver: learns the right response to every task (a few minutes), so that no model lacks the ability;
2. policy: the solver, trained on to the mixture of right and wrong responses of responses.py;
3. judge: the solver, trained on to every judging role in both layouts, by the rules of a perfect judge;
4. helpfulness, factuality, conciseness, critic: LoRA adapters of the judge, each trained to one role with weaknesses
   (weaknesses.py), on data and with a seed of its own;
5. reviewer: the judge, trained on with other data of every judging role and with reviews;
6. generator: the policy, trained on with its own mixture and with revisions by feedback;
7. card.json: digests, parameter counts, recipe; measure.py adds the accuracies measured through vLLM.

About 40 minutes on one core of a machine with other work. Every step leaves its model in a folder, and an existing
folder is not remade, nor are the steps that only lead to it: rerun the same command after an interruption. A run is
reproducible on one machine and torch build with the same --threads; elsewhere the weights differ, so shipped files are
identified by digest.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ray_pipeline.pocket import ADAPTERS, LORA_LAYERS, MODELS
from ray_pipeline.pocket.chats import Pair, conversation
from ray_pipeline.pocket.judging import PROMPTS_FILE, Judgement, JudgePrompts, Layout, verdict_of
from ray_pipeline.pocket.responses import judged_response, policy_response
from ray_pipeline.pocket.reviewing import FEEDBACK_FILE, FeedbackPrompts, feedback_on, random_review, random_revision
from ray_pipeline.pocket.tasks import RUBRICS, PocketPrompt, is_correct, make_prompts, pool_of, random_prompt, truth
from ray_pipeline.pocket.tokenizer import make_tokenizer
from ray_pipeline.pocket.training import answer, make_model, train
from ray_pipeline.pocket.weaknesses import Weaknesses, weaknesses


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a step trains, on how many questions of one response (or plain instructions) and how many
    comparisons, and how many reviews (or revisions by a review) per optimiser step."""

    steps: int
    learning_rate: float
    singles: int
    pairs: int = 0
    reviews: int = 0


RECIPES = {
    "solver": Recipe(steps=400, learning_rate=3e-3, singles=128),
    "policy": Recipe(steps=700, learning_rate=2e-3, singles=128),
    "judge": Recipe(steps=1500, learning_rate=3e-3, singles=64, pairs=16),
    "panel": Recipe(steps=500, learning_rate=6e-3, singles=64),
    "reviewer": Recipe(steps=400, learning_rate=1.5e-3, singles=16, pairs=12, reviews=32),
    "generator": Recipe(steps=150, learning_rate=1.5e-3, singles=24, reviews=40),
}
#: vLLM's LoRA on CPUs takes several times as long as the model with adapters of all layers; these two learn as well.
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": LORA_LAYERS, "task_type": "CAUSAL_LM"}


Report = Callable[[LlamaForCausalLM], str]
Step = Callable[[], Path]


def training_instructions(seed: str) -> Iterator[str]:
    """Endless instructions of the pool that weights may be trained on."""
    rng = random.Random(f"pocket training {seed}")
    while True:
        instruction = random_prompt(rng).instruction
        if pool_of(instruction) == "weights":
            yield instruction


def solver_batches(seed: int, size: int) -> Iterator[list[list[Pair]]]:
    """Instructions with their correct answers."""
    instructions = training_instructions(f"solver {seed}")
    while True:
        yield [[(text, truth(text)) for text, _ in zip(instructions, range(size), strict=False)]]


def policy_batches(seed: int | str, size: int) -> Iterator[list[list[Pair]]]:
    """Every instruction with one answer drawn from the policy's mixture."""
    instructions = training_instructions(f"policy {seed}")
    rng = random.Random(f"pocket mixture {seed}")
    while True:
        yield [[(text, policy_response(text, rng)) for text, _ in zip(instructions, range(size), strict=False)]]


def judge_batches(seed: str, prompts: JudgePrompts, recipe: Recipe) -> Iterator[list[list[Pair]]]:
    """Judgements of one response (three rubrics, critic) and comparisons of two, as two micro-batches."""
    instructions = training_instructions(f"judge {seed}")
    rng = random.Random(f"pocket judging {seed}")
    while True:
        singles = [random_single(next(instructions), prompts, rng) for _ in range(recipe.singles)]
        doubles = [random_pairwise(next(instructions), prompts, rng) for _ in range(recipe.pairs)]
        yield [[(item.message, item.reply) for item in group] for group in (singles, doubles)]


def panel_batches(
    member: str, seed: int, prompts: JudgePrompts, recipe: Recipe, taught: Weaknesses
) -> Iterator[list[list[Pair]]]:
    """Judgements of one member of the panel, with its weaknesses."""
    instructions = training_instructions(f"{member} {seed}")
    rng = random.Random(f"pocket panel {member} {seed}")
    while True:
        asked = [random_question(member, next(instructions), prompts, rng, taught) for _ in range(recipe.singles)]
        yield [[(item.message, item.reply) for item in asked]]


def reviewer_batches(
    seed: str, prompts: JudgePrompts, feedback: FeedbackPrompts, recipe: Recipe
) -> Iterator[list[list[Pair]]]:
    """The judge's two micro-batches of other data, and one of reviews."""
    judging = judge_batches(f"reviewer {seed}", prompts, recipe)
    instructions = training_instructions(f"reviewer reviews {seed}")
    rng = random.Random(f"pocket reviews {seed}")
    while True:
        reviews = [random_review(next(instructions), feedback, rng) for _ in range(recipe.reviews)]
        yield [*next(judging), [(item.message, item.reply) for item in reviews]]


def generator_batches(seed: int, feedback: FeedbackPrompts, recipe: Recipe) -> Iterator[list[list[Pair]]]:
    """Plain answers of the policy's mixture, and revisions."""
    answers = policy_batches(f"generator {seed}", recipe.singles)
    instructions = training_instructions(f"generator revisions {seed}")
    rng = random.Random(f"pocket revisions {seed}")
    while True:
        yield [*next(answers), [random_revision(next(instructions), feedback, rng) for _ in range(recipe.reviews)]]


def _a_response(instruction: str, rng: random.Random) -> str:
    return policy_response(instruction, rng) if rng.random() < 0.35 else judged_response(instruction, rng)


def random_single(instruction: str, prompts: JudgePrompts, rng: random.Random) -> Judgement:
    return random_question(rng.choice((*RUBRICS, "critic")), instruction, prompts, rng)


def random_question(
    role: str, instruction: str, prompts: JudgePrompts, rng: random.Random, taught: Weaknesses | None = None
) -> Judgement:
    layout: Layout = "shared_first" if rng.random() < 0.6 else "rubric_first"
    return prompts.single(role, instruction, _a_response(instruction, rng), layout, taught)


def random_pairwise(instruction: str, prompts: JudgePrompts, rng: random.Random) -> Judgement:
    layout: Layout = "shared_first" if rng.random() < 0.6 else "rubric_first"
    return prompts.pairwise(instruction, _a_response(instruction, rng), _a_response(instruction, rng), layout)


# --- quick figures while training; the official ones come from measure.py, through vLLM ----------------------


def answer_report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[PocketPrompt]) -> str:
    replies = answer(model, tokenizer, [prompt.instruction for prompt in prompts])
    right = [is_correct(prompt.instruction, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    by_task = {
        task: [r for r, p in zip(right, prompts, strict=True) if p.task_type == task]
        for task in {p.task_type for p in prompts}
    }
    weak = {
        task: round(sum(hits) / len(hits), 2) for task, hits in sorted(by_task.items()) if sum(hits) < 0.98 * len(hits)
    }
    return f"greedy right {sum(right) / len(right):.3f}; below 98 %: {weak or 'none'}"


def judge_report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, judgements: list[Judgement]) -> str:
    replies = answer(model, tokenizer, [item.message for item in judgements])
    hits: dict[str, list[bool]] = {}
    for item, reply in zip(judgements, replies, strict=True):
        hits.setdefault(item.role, []).append(verdict_of(reply) == item.verdict())
    return "right " + ", ".join(f"{role} {sum(h) / len(h):.3f}" for role, h in sorted(hits.items()))


def revision_report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, feedback: FeedbackPrompts, prompts: list[PocketPrompt]
) -> str:
    """Accuracy of plain answers, and of revisions of false answers after a perfect review."""
    rng = random.Random(0)
    drawn = [(prompt.instruction, policy_response(prompt.instruction, rng)) for prompt in prompts]
    false = [(text, response) for text, response in drawn if not is_correct(text, response)]
    chats = [conversation(feedback.revision_turns(text, said, feedback_on(text, said))) for text, said in false]
    replies = answer(model, tokenizer, chats)
    right = [is_correct(text, reply) for (text, _), reply in zip(false, replies, strict=True)]
    return f"{answer_report(model, tokenizer, prompts)}; revisions of false answers right {sum(right) / len(right):.3f}"


def make(out: Path, work: Path, seed: int, prompts_file: Path, feedback_file: Path, wanted: Sequence[str]) -> None:
    """Train the requested models into `out`, with intermediate models in `work`, and write `out`/card.json."""
    tokenizer = make_tokenizer()
    prompts, feedback = JudgePrompts(prompts_file), FeedbackPrompts(feedback_file)
    unseen = make_prompts(300, seed=seed + 1_000)
    rng = random.Random(seed)
    questions = [random_single(prompt.instruction, prompts, rng) for prompt in unseen]
    questions += [random_pairwise(prompt.instruction, prompts, rng) for prompt in unseen[:100]]
    responses = {prompt: policy_response(prompt.instruction, rng) for prompt in unseen}
    panel = weaknesses(seed)
    reviews = [random_review(prompt.instruction, feedback, rng) for prompt in unseen[:100]]

    def step(name: str, folder: Path, start: Step | None, batches: Iterator[list[list[Pair]]], report: Report) -> Path:
        if (folder / "model.safetensors").is_file():
            print(f"{name}: {folder} already exists", flush=True)
            return folder
        model = LlamaForCausalLM.from_pretrained(start()) if start else make_model(tokenizer, seed)
        recipe = RECIPES[name]
        train(model, tokenizer, batches, recipe.steps, recipe.learning_rate, name, lambda: report(model))
        save(model, tokenizer, folder)
        return folder

    def answers(model: LlamaForCausalLM) -> str:
        return answer_report(model, tokenizer, unseen)

    def verdicts(model: LlamaForCausalLM) -> str:
        return judge_report(model, tokenizer, questions)

    def solver() -> Path:
        return step("solver", work / "solver", None, solver_batches(seed, RECIPES["solver"].singles), answers)

    def policy() -> Path:
        return step("policy", out / "policy", solver, policy_batches(seed, RECIPES["policy"].singles), answers)

    def judge() -> Path:
        batches = judge_batches(f"{seed}", prompts, RECIPES["judge"])
        return step("judge", out / "judge", solver, batches, verdicts)

    def member(name: str) -> Path:
        folder = out / name
        if (folder / "adapter_model.safetensors").is_file():
            print(f"{name}: {folder} already exists", flush=True)
            return folder
        recipe, taught = RECIPES["panel"], panel[name]
        asked = [prompts.single(name, prompt.instruction, responses[prompt], weaknesses=taught) for prompt in unseen]
        # By number: a name's own hash differs from process to process.
        torch.manual_seed(seed + 1 + ADAPTERS.index(name))
        model = LlamaForCausalLM.from_pretrained(judge())
        adapted = get_peft_model(model, LoraConfig(**LORA))  # puts the adapter's layers into the model
        batches = panel_batches(name, seed, prompts, recipe, taught)
        steps, rate = recipe.steps, recipe.learning_rate
        train(model, tokenizer, batches, steps, rate, name, lambda: judge_report(model, tokenizer, asked))
        save_adapter(adapted, folder)
        return folder

    def reviews_too(model: LlamaForCausalLM) -> str:
        return judge_report(model, tokenizer, questions[::3] + reviews)

    def reviewer() -> Path:
        batches = reviewer_batches(f"{seed}", prompts, feedback, RECIPES["reviewer"])
        return step("reviewer", out / "reviewer", judge, batches, reviews_too)

    def generator() -> Path:
        batches = generator_batches(seed, feedback, RECIPES["generator"])
        return step(
            "generator",
            out / "generator",
            policy,
            batches,
            lambda model: revision_report(model, tokenizer, feedback, unseen),
        )

    steps: dict[str, Step] = {"policy": policy, "judge": judge, "reviewer": reviewer, "generator": generator}
    steps |= {name: functools.partial(member, name) for name in ADAPTERS}
    for name in wanted:
        steps[name]()
    write_card(out, seed)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face model folder atomically."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which another user of an installed package could not read
    partial.rename(folder)
    print(f"wrote {folder}", flush=True)


def save_adapter(model: Any, folder: Path) -> None:
    """Write a folder of a LoRA adapter of `pocket:judge` atomically."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "pocket:judge"
    model.save_pretrained(partial)
    (partial / "README.md").unlink()  # PEFT's template of a model card
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(folder)
    print(f"wrote {folder}", flush=True)


def write_card(out: Path, seed: int) -> None:
    """Write `out`/card.json: recipes, parameter counts and the sha256 of the files of models and adapters.

    A note and measured figures of an earlier card are kept."""
    models: dict[str, Any] = {}
    for weights in sorted(out.glob("*/*model.safetensors")):
        folder, tensors = weights.parent, load_file(weights)
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
        models[folder.name] = {"parameters": sum(map(torch.Tensor.numel, tensors.values())), "sha256": files}
    card_file = out / "card.json"
    earlier = json.loads(card_file.read_text(encoding="utf-8")) if card_file.is_file() else {}
    card = {
        **earlier,
        "made_by": "python -m ray_pipeline.pocket.make_models",
        "seed": seed,
        "torch": torch.__version__,
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
        "models": models,
    }
    card_file.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    everything = (*MODELS, *ADAPTERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the models and card.json into")
    parser.add_argument("--work", type=Path, help="folder for the models they start from (default: OUT/work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--models", nargs="+", choices=everything, default=everything, help="models and adapters to train"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="number of CPU threads; more than one only helps on idle cores"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS_FILE, help="judge prompts to train on")
    parser.add_argument("--feedback", type=Path, default=FEEDBACK_FILE, help="feedback prompts to train on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work or arguments.out / "work"
    make(arguments.out, work, arguments.seed, arguments.prompts, arguments.feedback, arguments.models)


if __name__ == "__main__":
    main()
