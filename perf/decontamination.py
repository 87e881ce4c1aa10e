"""CPU time and memory that `prompts.decontaminate` adds to the prompts stage.

python perf/decontamination.py [--sizes 50000,200000] [--seconds 500]

Prompts of 10 to 290 words, 150 on average, are held against three benchmarks of the sizes of IFEval, MT-Bench and
AlpacaEval (541, 160 and 805 questions of 10 to 90 words). Words are drawn by Zipf's law from 30,000. One prompt in 200
quotes a question. Each size is read in a process of its own, with and without the comparison. Seconds are CPU time, all
of it on one core, so that other processes make no difference. Memory is the peak of the process; the ids of all prompts
are part of it, with the comparison and without. The last line is for 1,000,000 prompts, extrapolated from the two
largest sizes unless one of them is that many.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from ray_pipeline.data.prompts import PromptsConfig, read_prompts

WHOLE = 1_000_000
BENCHMARKS = {"ifeval": 541, "mt_bench": 160, "alpaca_eval": 805}
VOCABULARY = [f"w{number}" for number in range(30_000)]
WEIGHTS = list(accumulate(1 / rank for rank in range(1, len(VOCABULARY) + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="50000,200000", help="prompts")
    parser.add_argument("--seconds", type=float, default=500.0, help="for one call of this command")
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "AGAINST"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(Path(given.read[0]), json.loads(given.read[1]))))
        return
    start, found = time.monotonic(), dict[int, tuple[float, float]]()
    print("prompts | without: CPU s | MiB | with: CPU s | MiB | left out")
    for size in sorted(int(size) for size in given.sizes.split(",")):
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), size)
            plain, compared = (own_process(place, against) for against in ([], list(BENCHMARKS)))
        found[size] = plain["seconds"], compared["seconds"]
        figures = (f"{one['seconds']:.1f} | {one['memory']:.0f}" for one in (plain, compared))
        print(f"{size:,} | {' | '.join(figures)} | {compared['left_out']:,}", flush=True)
        if time.monotonic() - start > given.seconds / 2:
            break
    if len(found) > 1 and WHOLE not in found:
        (a, low), (b, high) = sorted(found.items())[-2:]
        more = [y + (y - x) / (b - a) * (WHOLE - b) for x, y in zip(low, high, strict=True)]
        print(f"{WHOLE:,} (extrapolated) | {more[0]:.0f} | | {more[1]:.0f} | |")


def write(folder: Path, size: int) -> None:
    """The prompts and the benchmarks as JSON lines."""
    draw = random.Random(0)
    questions = {name: list(texts(draw, count, 10, 90)) for name, count in BENCHMARKS.items()}
    for name, own in questions.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in own))
    every = [text for own in questions.values() for text in own]
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for number, text in enumerate(texts(draw, size, 10, 290)):
            quoted = f"{text} {draw.choice(every)}" if number % 200 == 0 else text
            file.write(json.dumps({"prompt": quoted}) + "\n")


def texts(draw: random.Random, count: int, shortest: int, longest: int) -> Iterator[str]:
    for _ in range(count):
        words = draw.choices(VOCABULARY, cum_weights=WEIGHTS, k=draw.randint(shortest, longest))
        yield " ".join(words).capitalize() + "."


def own_process(folder: str, against: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--read", folder, json.dumps(against)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def read(folder: Path, against: list[str]) -> dict[str, float]:
    """Seconds and peak memory (MiB) of reading the prompts, and how many were left out."""

    def source(name: str) -> dict[str, str]:
        return {"type": "jsonl", "path": str(folder / f"{name}.jsonl"), "column": "prompt"}

    block = {"decontaminate": {"against": [source(name) for name in against]}} if against else {}
    config = PromptsConfig.model_validate({"sources": [source("prompts")], **block})
    start = time.process_time()
    counts = read_prompts(config, lambda *_: None, config.num_shards).counts
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "memory": memory, "left_out": counts["dropped"].get("contaminated", 0)}


if __name__ == "__main__":
    main()
