"""What the token ids of a judge's prompt cost, from its messages, and how much of that the event loop waits for.

    python perf/prompt_tokens.py [--model smol:135m-instruct] [--candidates 200] [--words 60 200] [--rounds 3]

The prompts are those of three judges and a critic about candidates of a given length (words of the instruction and of
the response, drawn from this repository's README), in the order in which a run asks them. Both sides render the chat
template. One side tokenises each prompt as a whole, on the event loop; the other is what the engine does: pieces that
prompts share are tokenised once, in a thread. The sides take turns, and figures are medians of the rounds: CPU time of
the process a call, and CPU time of the event loop's thread a call. The ids of both are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings, critique, judge
from ray_pipeline.agents.templates import load_templates
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.chat_template import ChatTemplate
from ray_pipeline.engines.models import resolve_model

ROOT = Path(__file__).parents[1]
RUBRICS = (
    Rubric(name="helpfulness", text="Does the response do what the instruction asks, completely and usefully?"),
    Rubric(name="factuality", text="Is everything that the response states true and free of contradiction?"),
    Rubric(name="conciseness", text="Does the response say what is needed without repetition, padding or digression?"),
)
SIDES = ("as a whole", "in pieces")


class Recorder:
    """Keeps the messages that it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []

    @property
    def identity(self) -> Mapping[str, Any]:
        return {}

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        self.asked.append([dict(message) for message in messages])
        return Completion('{"reason": "x", "failure_type": "none", "flawed": false, "score": 5}', "stop", 1, 1, 0)


async def prompts(candidates: int, words: Sequence[int], seed: int) -> list[list[Message]]:
    """Four prompts a candidate; a response has a blank line after every 60 words."""
    text = [word for word in (ROOT / "README.md").read_text().split() if "<|" not in word]  # control strings are text
    rng, recorder = random.Random(seed), Recorder()
    templates = load_templates("default")
    sampling, asking = SamplingSettings(), JudgeAsking(retries=0)

    def passage(length: int) -> str:
        begin = rng.randrange(len(text) - length)
        parts = [text[n : n + 60] for n in range(begin, begin + length, 60)]
        return "\n\n".join(" ".join(part[: begin + length - 60 * n]) for n, part in enumerate(parts))

    for _ in range(candidates):
        instruction, response = [{"role": "user", "content": passage(words[0])}], passage(words[1])
        for rubric in RUBRICS:
            await judge(recorder, instruction, response, rubric, templates.judge, sampling, asking)
        await critique(recorder, instruction, response, templates.critic, sampling, asking)
    return recorder.asked


async def measured(
    tokenizer: Any, template: ChatTemplate, asked: Sequence[list[Message]], side: str
) -> tuple[float, float, int]:
    """CPU milliseconds a call of the process and of the loop's thread, and a check value of the ids."""
    ids: list[list[int]] = []
    process, loop = time.process_time(), time.thread_time()
    if side == SIDES[0]:
        ids = [tokenizer.encode(template.text(messages), add_special_tokens=False) for messages in asked]
    else:
        ids = [await template.prompt(messages) for messages in asked]
    used = [
        1e3 * (end - begin) / len(asked) for begin, end in ((process, time.process_time()), (loop, time.thread_time()))
    ]
    return used[0], used[1], hash(tuple(map(tuple, ids)))


async def compare(folder: str, candidates: int, words: Sequence[int], rounds: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for round in range(rounds):
        asked = await prompts(candidates, words, seed=round)
        template, checks = ChatTemplate(tokenizer), set()
        for side in SIDES if round % 2 else SIDES[::-1]:
            process, loop, check = await measured(tokenizer, template, asked, side)
            figures[side].append((process, loop))
            checks.add(check)
        if len(checks) > 1:
            raise SystemExit("the token ids differ")
    tokens = statistics.mean(len(template.token_ids(messages)) for messages in asked)
    print(f"{len(asked)} calls a round, {tokens:.0f} tokens a prompt, {rounds} rounds")
    print(f"{'':12} {'CPU ms a call':>14} {'on the loop':>12}")
    for side, found in figures.items():
        process, loop = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{side:12} {process:14.2f} {loop:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol:135m-instruct")
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--words", type=int, nargs=2, default=(60, 200), help="of an instruction and of a response")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    folder = resolve_model({"model": given.model})["model"]
    asyncio.run(compare(folder, given.candidates, given.words, given.rounds))


if __name__ == "__main__":
    main()
