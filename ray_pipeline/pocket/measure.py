"""Measures the pocket models through a real vLLM engine on unseen prompts and writes the figures into card.json.

`python -m ray_pipeline.pocket.measure [--weights DIR] [--prompts 400]`, about four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.pocket import ADAPTERS, LORA_LAYERS, MODELS, WEIGHTS
from ray_pipeline.pocket.judging import LAYOUTS, ROLES, SCHEMAS, Judgement, JudgePrompts, Layout, verdict_of
from ray_pipeline.pocket.responses import judged_response
from ray_pipeline.pocket.reviewing import REVIEW_SCHEMA, FeedbackPrompts
from ray_pipeline.pocket.tasks import RUBRICS, PocketPrompt, critique, grade, is_correct, make_prompts, rubric_scores
from ray_pipeline.pocket.weaknesses import weaknesses

if TYPE_CHECKING:
    from vllm import LLM

CANDIDATES = 4
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
ANSWER_TOKENS = 48
VERDICT_TOKENS = 64
REVIEW_TOKENS = 64
SEED = 0  # with which the shipped weights were made
REPORT_SEED = 77  # no other module draws prompts with this seed


def start_engine(folder: Path, **arguments: Any) -> LLM:
    """A vLLM engine on the CPU (or GPU, if vLLM finds one) in this process; all but the first start in a second."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    shared: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    # In chunks, the prompt of a call with a seed ends vLLM on a CPU (see engines/vllm_arguments.py).
    shared |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096}
    return LLM(str(folder), disable_log_stats=True, **shared, **arguments)


def generate(
    engine: LLM,
    messages: Sequence[str | list[str]],
    schemas: list[dict[str, Any]] | None = None,
    adapter: Any = None,
    **sampling: Any,
) -> tuple[list[str], float]:
    """One reply per user message (or conversation of turns, the user's first), and calls per second; with `schemas`,
    xgrammar constrains each reply to its own schema. `adapter` is vLLM's `LoRARequest`."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def parameters(index: int) -> SamplingParams:
        grammar = StructuredOutputsParams(json=schemas[index]) if schemas else None
        return SamplingParams(structured_outputs=grammar, seed=index, **sampling)

    turns = [[message] if isinstance(message, str) else message for message in messages]
    chats: list[Any] = [
        [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(chat)] for chat in turns
    ]
    started = time.monotonic()
    sampled = [parameters(index) for index in range(len(messages))]
    outputs = engine.chat(chats, sampled, use_tqdm=False, lora_request=adapter)
    return [output.outputs[0].text for output in outputs], len(messages) / (time.monotonic() - started)


# --- policy --------------------------------------------------------------------------------------------------


def measure_policy(engine: LLM, prompts: list[PocketPrompt]) -> tuple[dict[str, Any], list[list[str]]]:
    """Greedy and sampled accuracy, the labels of the samples under the default gate, and the samples of each prompt."""
    instructions = [prompt.instruction for prompt in prompts]
    greedy, _ = generate(engine, instructions, temperature=0.0, max_tokens=ANSWER_TOKENS)
    repeated = [text for text in instructions for _ in range(CANDIDATES)]
    samples, speed = generate(engine, repeated, max_tokens=ANSWER_TOKENS, **SAMPLING)
    right = [is_correct(text, reply) for text, reply in zip(repeated, samples, strict=True)]
    figures = {
        "greedy_right": share(is_correct(text, reply) for text, reply in zip(instructions, greedy, strict=True)),
        "sampled_right": share(right),
        "prompts_with_right_and_wrong_samples": share(
            0 < sum(right[start : start + CANDIDATES]) < CANDIDATES for start in range(0, len(right), CANDIDATES)
        ),
        "labels": shares(gate_labels(repeated, samples)),
        "grades": shares(grade(text, reply) for text, reply in zip(repeated, samples, strict=True)),
        "calls_per_second": round(speed, 1),
    }
    return figures, [samples[start : start + CANDIDATES] for start in range(0, len(samples), CANDIDATES)]


def gate_labels(instructions: Sequence[str], responses: Sequence[str]) -> list[str]:
    """The labels by the default gate with a perfect judge and critic."""
    import numpy as np

    # The only import up the table of rooms: this script applies the gate's rule and does not have its own.
    from ray_pipeline.data.gate import GateConfig, label_cases

    pairs = list(zip(instructions, responses, strict=True))
    scores = np.array([list(rubric_scores(*pair).values()) for pair in pairs], dtype=np.float64)
    flawed = np.array([critique(*pair)[0] for pair in pairs], dtype=np.float64)
    labels: list[str] = label_cases(scores, flawed, np.zeros(len(pairs), dtype=bool), GateConfig()).labels.to_pylist()
    return labels


# --- judge ---------------------------------------------------------------------------------------------------


def measure_judge(
    engine: LLM, prompts: list[PocketPrompt], samples: list[list[str]], judge_prompts: JudgePrompts
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Share of exactly right verdicts by role, layout and source of the responses; pairwise also in both orders.

    Also the verdicts themselves, in the same order for every judge of the same samples."""
    rng = random.Random(REPORT_SEED)
    made = [[judged_response(prompt.instruction, rng) for _ in range(CANDIDATES)] for prompt in prompts]
    figures: dict[str, Any] = {"calls_per_second": []}
    verdicts: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        for source, responses in (("sampled", samples), ("rule_made", made)):
            questions = _questions(prompts, responses, judge_prompts, layout)
            found, given = _judge_figures(engine, questions, figures["calls_per_second"])
            figures[f"{layout}/{source}"] = found
            verdicts += given
    questions = _questions(prompts, samples, judge_prompts, "shared_first")
    replies, speed = generate(engine, [q.message for q in questions], temperature=0.0, max_tokens=VERDICT_TOKENS)
    figures["same_without_grammar"] = share(
        verdict_of(r) == q.verdict() for q, r in zip(questions, replies, strict=True)
    )
    figures["calls_per_second_without_grammar"] = round(speed, 1)
    figures["calls_per_second"] = round(statistics.median(figures["calls_per_second"]), 1)
    return figures, verdicts


def _questions(
    prompts: list[PocketPrompt], responses: list[list[str]], judge_prompts: JudgePrompts, layout: Layout
) -> list[Judgement]:
    """Three rubrics and the critic for each response, then each prompt's first two responses in both orders."""
    questions = [
        judge_prompts.single(role, prompt.instruction, response, layout)
        for prompt, candidates in zip(prompts, responses, strict=True)
        for response in candidates
        for role in ROLES
        if role != "pairwise"
    ]
    for prompt, (first, second, *_) in zip(prompts, responses, strict=True):
        questions.append(judge_prompts.pairwise(prompt.instruction, first, second, layout))
        questions.append(judge_prompts.pairwise(prompt.instruction, second, first, layout))
    return questions


def _judge_figures(
    engine: LLM, questions: list[Judgement], speeds: list[float]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    replies, speed = generate(
        engine,
        [question.message for question in questions],
        [SCHEMAS[question.role] for question in questions],
        temperature=0.0,
        max_tokens=VERDICT_TOKENS,
    )
    speeds.append(speed)
    hits: dict[str, list[bool]] = {role: [] for role in ROLES}
    flawed_hits, choices = [], []
    verdicts = [verdict_of(reply) or {} for reply in replies]
    for question, verdict in zip(questions, verdicts, strict=True):
        expected = question.verdict()
        hits[question.role].append(verdict == expected)
        if question.role == "critic":
            flawed_hits.append(verdict.get("flawed") == expected["flawed"])
        if question.role == "pairwise":
            choices.append(verdict.get("choice"))
    swapped = {"A": "B", "B": "A", "C": "C"}
    flips = [swapped.get(str(ab)) != ba for ab, ba in zip(choices[::2], choices[1::2], strict=True)]
    figures = {
        **{role: share(found) for role, found in hits.items()},
        "critic_flawed_bit": share(flawed_hits),
        "pairwise_flips": share(flips),
    }
    return figures, verdicts


# --- panel ---------------------------------------------------------------------------------------------------


def measure_panel(
    weights: Path, prompts: list[PocketPrompt], samples: list[list[str]], judge_prompts: JudgePrompts
) -> dict[str, dict[str, Any]]:
    """Figures of each adapter on samples of the policy.

    `right` is what the report of a run calls so: a score from 7 for a response that is right by a right way, one up to
    4 for any other; of the critic, the bit. `as_taught` is the share of verdicts as the adapter was trained to give
    them, its weaknesses included. `correlation` is that of a judge's errors with another's (phi).
    """
    from vllm.lora.request import LoRARequest

    room = {"max_loras": len(ADAPTERS) + 1, "max_lora_rank": 16, "lora_target_modules": LORA_LAYERS}
    engine = start_engine(weights / "judge", enable_lora=True, **room)
    asked = [(prompt.instruction, text) for prompt, drawn in zip(prompts, samples, strict=True) for text in drawn]
    truth, taught = [is_correct(*answered) for answered in asked], weaknesses(SEED)
    figures: dict[str, dict[str, Any]] = {}
    errors: dict[str, list[float]] = {}
    for number, name in enumerate(ADAPTERS, 1):
        questions = [judge_prompts.single(name, *answered, weaknesses=taught[name]) for answered in asked]
        replies, speed = generate(
            engine,
            [question.message for question in questions],
            [SCHEMAS[name]] * len(questions),
            LoRARequest(name, number, str(weights / name)),
            temperature=0.0,
            max_tokens=VERDICT_TOKENS,
        )
        verdicts = [verdict_of(reply) or {} for reply in replies]
        votes = [_vote(verdict) for verdict in verdicts]
        errors[name] = [float(vote != right) for vote, right in zip(votes, truth, strict=True)]
        figures[name] = {
            "right": share(vote == right for vote, right in zip(votes, truth, strict=True)),
            "as_taught": share(v == q.verdict() for v, q in zip(verdicts, questions, strict=True)),
            "calls_per_second": round(speed, 1),
        }
    for one, other in itertools.permutations(RUBRICS, 2):
        phi = round(statistics.correlation(errors[one], errors[other]), 3)
        figures[one].setdefault("correlation", {})[other] = phi
    engine.llm_engine.engine_core.shutdown()
    return figures


def _vote(verdict: dict[str, Any]) -> bool | None:
    """Whether a verdict takes a response for right; None for neither."""
    if "flawed" in verdict:
        return not verdict["flawed"]
    score = verdict.get("score", 5)
    return True if score >= 7 else False if score <= 4 else None


# --- reviewer and generator ----------------------------------------------------------------------------------


def measure_reviews(
    generator: LLM, reviewer: LLM, prompts: list[PocketPrompt], feedback: FeedbackPrompts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reviewer's and the generator's figures over one round of the feedback loop.

    First answers are one greedy and one sampled answer per prompt. An answer with empty feedback stays as it is.
    """
    texts = [prompt.instruction for prompt in prompts] * 2
    greedy, _ = generate(generator, texts[: len(prompts)], temperature=0.0, max_tokens=ANSWER_TOKENS)
    sampled, _ = generate(generator, texts[len(prompts) :], max_tokens=ANSWER_TOKENS, **SAMPLING)
    first = greedy + sampled
    right = [is_correct(text, response) for text, response in zip(texts, first, strict=True)]

    questions = [feedback.review(text, response) for text, response in zip(texts, first, strict=True)]
    asked = [question.message for question in questions]
    replies, speed = generate(reviewer, asked, [REVIEW_SCHEMA] * len(asked), temperature=0.0, max_tokens=REVIEW_TOKENS)
    reviews = [verdict_of(reply) or {} for reply in replies]
    said = [str(review.get("feedback", "")) for review in reviews]
    perfect = [grade(text, response) == "right" for text, response in zip(texts, first, strict=True)]
    reviewer_figures = {
        "exact": share(review == question.verdict() for review, question in zip(reviews, questions, strict=True)),
        "empty_for_right": share(text == "" for text, is_perfect in zip(said, perfect, strict=True) if is_perfect),
        "empty_for_others": share(text == "" for text, is_perfect in zip(said, perfect, strict=True) if not is_perfect),
        "calls_per_second": round(speed, 1),
    }

    generator_figures: dict[str, Any] = {
        "greedy_right": share(right[: len(prompts)]),
        "sampled_right": share(right[len(prompts) :]),
        "grades": shares(grade(text, response) for text, response in zip(texts, first, strict=True)),
    }
    chats = [feedback.revision_turns(*turn) for turn in zip(texts, first, said, strict=True)]
    ways: dict[str, tuple[Sequence[str | list[str]], dict[str, Any]]] = {
        "revised_greedy": (chats, {"temperature": 0.0}),
        "revised_sampled": (chats, SAMPLING),
        "asked_again_sampled": (texts, SAMPLING),  # the effect of a second draw without any review
    }
    for way, (messages, sampling) in ways.items():
        answers, _ = generate(generator, messages, max_tokens=ANSWER_TOKENS, **sampling)
        after = [
            is_correct(text, new if feedback_text else old)
            for text, old, new, feedback_text in zip(texts, first, answers, said, strict=True)
        ]
        generator_figures[way] = {
            "right": share(after),
            "wrong_became_right": share(now for now, before in zip(after, right, strict=True) if not before),
            "right_became_wrong": share(not now for now, before in zip(after, right, strict=True) if before),
        }
    return reviewer_figures, generator_figures


# --- all -----------------------------------------------------------------------------------------------------


def share(flags: Any) -> float:
    """The share of true flags, to four digits."""
    listed = list(flags)
    return float(round(sum(listed) / len(listed), 4))


def shares(names: Any) -> dict[str, float]:
    """The share of each name, most frequent first."""
    counts = Counter(names)
    return {name: round(count / counts.total(), 4) for name, count in counts.most_common()}


def measure(weights: Path, count: int) -> dict[str, Any]:
    """All models' figures on `count` unseen prompts; each is printed as soon as it is measured."""
    prompts = make_prompts(count, seed=REPORT_SEED)
    figures: dict[str, Any] = {}

    def note(name: str, found: dict[str, Any]) -> None:
        figures[name] = {"prompts": count, "sampling": {"k": CANDIDATES, **SAMPLING}, **found}
        print(json.dumps({name: figures[name]}, indent=2), flush=True)

    engine = start_engine(weights / "policy")
    found, samples = measure_policy(engine, prompts)
    engine.llm_engine.engine_core.shutdown()
    note("policy", found)

    engine = start_engine(weights / "judge")
    found, judge_verdicts = measure_judge(engine, prompts, samples, JudgePrompts())
    engine.llm_engine.engine_core.shutdown()
    note("judge", found)

    for name, found in measure_panel(weights, prompts, samples, JudgePrompts()).items():
        note(name, found)

    reviewer = start_engine(weights / "reviewer")
    found, reviewer_verdicts = measure_judge(reviewer, prompts, samples, JudgePrompts())
    found["other_verdict_than_judge"] = share(a != b for a, b in zip(reviewer_verdicts, judge_verdicts, strict=True))
    note("reviewer", found)

    generator = start_engine(weights / "generator")
    review, found = measure_reviews(generator, reviewer, prompts, FeedbackPrompts())
    for engine in (reviewer, generator):
        engine.llm_engine.engine_core.shutdown()
    note("reviewer", {**figures["reviewer"], "review": review})
    note("generator", found)
    return figures


def main() -> None:
    everything = (*MODELS, *ADAPTERS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument(
        "--models", nargs="+", choices=everything, default=everything, help="whose figures are written into the card"
    )
    arguments = parser.parse_args()
    figures = measure(arguments.weights, arguments.prompts)
    card_file = arguments.weights / "card.json"
    card = json.loads(card_file.read_text(encoding="utf-8"))
    card.setdefault("measured", {}).update({name: figures[name] for name in arguments.models})
    card_file.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
