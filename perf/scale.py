"""How the work around the engines grows with candidates, shards and actors, and where it would stop a larger run.

    python perf/scale.py [--candidates 4000 16000] [--shards 64 256] [--actors 8 200] [--minutes 30] [--folder DIR]

Each run goes through candidates, judges and critic, gate and datasets on a real Ray cluster, with real actors, stages,
storage and call log. Only the engine is simulated: it holds no CPU, and a reply takes its tokens times the pace of one
sequence in a full batch (`--tokens-per-second`). The runs are one with the smallest numbers, one more for each number
that is larger, and one with many candidates and many shards. What they take is a constant and a slope for each number,
by least squares; the last columns follow them to `--target` candidates, and say nothing that the runs did not show.
They are left out where candidates or shards have one value. An actor is a process: mind the memory of 200.

CPU seconds and peak memory are sampled every second and told apart by process: the driver, the tasks that steer a stage
(Ray Data's loop), the progress board, the actors with engines, tasks without, and Ray itself. Messages to the board and
listings of folders are counted in every process. *Resume* is the same command again, with nothing left to do.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dags.dmapo import dmapo
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.driver import execute
from ray_pipeline.graph.progress import ProgressBoard
from ray_pipeline.graph.ray_executor import RayExecutor
from ray_pipeline.operate.run_settings import run_settings
from ray_pipeline.pocket import model_path
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.dmapo_config import DmapoConfig

NUMBERS = ("candidates", "shards", "actors")
K = 4  # candidates of a prompt
COUNTS = "QUORUM_SCALE_COUNTS"  # environment variable: the folder of the counters
RUBRICS = ("helpfulness", "factuality", "conciseness")


class SimulatedEngine:
    """Replies in the form that a call asks for, after the time that its tokens take. Judges mostly agree."""

    def __init__(self, model: str, tokens_per_second: float) -> None:
        self.identity = {"engine": "simulated", "model": Path(model).name}
        self._pace = tokens_per_second

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        asked = messages[-1]["content"]
        number = int(hashlib.blake2b(f"{sampling.seed} {asked}".encode(), digest_size=4).hexdigest(), 16)
        text = f"{'sound' if number % 2 else 'wrong'} {number} " + "and so it is " * 30
        if sampling.grammar is not None:
            fields = sampling.grammar.decoded()["properties"]
            sound = "sound" in asked if number % 8 else number % 16 == 0
            text = json.dumps({name: _value(field, sound, number) for name, field in fields.items()})
        tokens = len(text) // 4
        await asyncio.sleep(tokens / self._pace)
        return Completion(text, "stop", len(asked) // 4, tokens, 0)


def _value(field: Mapping[str, Any], sound: bool, number: int) -> Any:
    if "enum" in field:  # the critic's type of failure
        return next(option for option in field["enum"] if (option == "none") == sound)
    if field["type"] == "string":
        return f"because {number}"
    if field["type"] == "boolean":
        return not sound
    return (8 if sound else 2) + number % 2


# --- what is counted and sampled --------------------------------------------------------------------------------------


def count_calls() -> None:
    """Count listings of folders and messages to the board in this process: a byte each in a file of its own."""
    Folder._members = _counted(Folder._members, "listings")  # type: ignore[method-assign]
    for name, method in list(vars(ProgressBoard).items()):
        if callable(method) and not name.startswith("_"):
            setattr(ProgressBoard, name, _counted(method, "messages"))


def _counted(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    path = os.path.join(os.environ[COUNTS], f"{what}-{os.getpid()}")

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        with open(path, "ab") as file:
            file.write(b".")
        return function(*arguments, **named)

    return wrapper


class Sampler:
    """CPU seconds and peak memory (resident, shared pages left out) of this process and its children, by what they are
    at the time."""

    def __init__(self) -> None:
        self.cpu: collections.Counter[str] = collections.Counter()
        self.peak: collections.Counter[str] = collections.Counter()
        self._seen: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            memory: collections.Counter[str] = collections.Counter()
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    kind, times, held = _kind(process), process.cpu_times(), process.memory_info()
                except psutil.Error:
                    continue
                used = times.user + times.system
                self.cpu[kind] += used - self._seen.get(process.pid, 0.0)
                self._seen[process.pid] = used
                memory[kind] += held.rss - held.shared
            self.peak |= memory


def _kind(process: psutil.Process) -> str:
    title = (process.cmdline() or [""])[0]
    if process.pid == os.getpid():
        return "driver"
    for start, kind in (("ray::MapWorker", "engines"), ("ray::ProgressBoard", "board"), ("ray::MapBatches", "tasks"),
                        ("ray::IDLE", "idle"), ("ray::", "steering")):  # fmt: skip
        if title.startswith(start):
            return kind
    return "Ray"


# --- one run ----------------------------------------------------------------------------------------------------------


def configuration(folder: Path, sizes: Mapping[str, int]) -> DmapoConfig:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {n}"}) + "\n" for n in range(sizes["candidates"] // K)))
    placement = {"min_actors": sizes["actors"], "max_actors": sizes["actors"], "concurrency": 256}
    models = {name: {"model": model_path(f"pocket:{name}"), "placement": placement} for name in ("policy", "judge")}
    return DmapoConfig.model_validate(
        {
            "run": {"name": "scale"},
            "models": models,
            "prompts": {
                "sources": [{"type": "jsonl", "path": str(prompts), "column": "prompt"}],
                "num_shards": sizes["shards"],
            },
            "candidates": {"k": K},
            "judge": {"rubrics": [{"name": name, "text": name} for name in RUBRICS], "layout": "shared_first"},
            "train": None,
        }
    )


def one_run(folder: Path, sizes: Mapping[str, int], pace: float) -> dict[str, float]:
    """What a run of these numbers takes, by name."""
    counts = folder / "counts"
    counts.mkdir(parents=True)
    os.environ[COUNTS] = str(counts)
    count_calls()
    ModelSettings.factory = lambda self: functools.partial(SimulatedEngine, self.model, pace)  # type: ignore[method-assign]
    config, run = configuration(folder, sizes), folder / "run"
    hook = {"worker_process_setup_hook": count_calls, "env_vars": {COUNTS: str(counts)}}
    executor = RayExecutor({"runtime_env": hook})

    def seconds() -> float:
        begin = time.monotonic()
        outcome = execute(dmapo(config, str(run)), run_settings(config, str(run)), executor, to_group="datasets")
        if outcome.failures:
            sys.exit("; ".join(f"{name}: {failure.reason}" for name, failure in outcome.failures.items()))
        return time.monotonic() - begin

    with Sampler() as sampler:
        took = seconds()
    files = [path for path in run.rglob("*") if path.is_file()]
    found: dict[str, float] = {"seconds": took}
    for kind in ("driver", "steering", "board", "engines", "tasks", "Ray"):
        found[f"{kind}, CPU s"] = sampler.cpu[kind]
        found[f"{kind}, MiB"] = sampler.peak[kind] / 2**20
    for what in ("messages", "listings"):
        found[what] = sum(path.stat().st_size for path in counts.glob(f"{what}-*"))
    found["files"] = len(files)
    found["files of the call log"] = sum("calls" in path.relative_to(run).parts for path in files)
    found["manifest, KiB"] = (run / "manifest.json").stat().st_size / 1024
    return found | {"resume, s": seconds()}


# --- several runs -----------------------------------------------------------------------------------------------------


def plan(numbers: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Sizes of the runs; see above."""
    base = {name: min(values) for name, values in numbers.items()}
    yield base
    for name, values in numbers.items():
        yield from (base | {name: value} for value in sorted(values)[1:])
    larger = {name: max(numbers[name]) for name in ("candidates", "shards")}
    if all(larger[name] > base[name] for name in larger):
        yield base | larger


def predicted(runs: Sequence[tuple[Mapping[str, int], float]], at: Mapping[str, int]) -> float:
    """A figure at other numbers, from a constant and a slope for each number that differed (least squares)."""
    varied = [name for name in NUMBERS if len({sizes[name] for sizes, _ in runs}) > 1]
    rows = np.array([[1.0, *(sizes[name] for name in varied)] for sizes, _ in runs])
    scale = rows.max(axis=0)
    solved = np.linalg.lstsq(rows / scale, np.array([value for _, value in runs]), rcond=None)[0]
    return float(np.array([1.0, *(at[name] for name in varied)]) / scale @ solved)


def table(
    runs: Sequence[tuple[Mapping[str, int], Mapping[str, float]]], targets: Sequence[Mapping[str, int]]
) -> Iterator[str]:
    """Figures by row; runs, then predictions by column."""
    for name in NUMBERS:
        yield f"{name:<24}" + "".join(f"{sizes[name]:>12,}" for sizes in [*(s for s, _ in runs), *targets])
    for figure in runs[0][1]:
        values = [found[figure] for _, found in runs]
        values += [predicted([(sizes, found[figure]) for sizes, found in runs], at) for at in targets]
        yield f"{figure:<24}" + "".join(f"{value:>12,.{0 if abs(value) >= 100 else 1}f}" for value in values)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="how the work around the engines grows, with simulated engines")
    for name, values in zip(NUMBERS, ([4000, 16000], [64, 256], [8, 200]), strict=True):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values)
    parser.add_argument("--minutes", type=float, default=30, help="after which no further run is started")
    parser.add_argument("--target", type=int, default=10_000_000, help="candidates to extrapolate to")
    parser.add_argument("--tokens-per-second", type=float, default=30.0, help="of one sequence in a full batch")
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        found = one_run(given.folder, given.one, given.tokens_per_second)
        (given.folder / "found.json").write_text(json.dumps(found))
        return
    begin, runs = time.monotonic(), []
    for sizes in plan({name: getattr(given, name) for name in NUMBERS}):
        folder = (given.folder / "-".join(str(sizes[name]) for name in NUMBERS)).resolve()
        if not (folder / "found.json").exists():
            if time.monotonic() - begin > 60 * given.minutes:
                print(f"{sizes} is left out: {given.minutes:g} minutes are over")
                continue
            own = ["--one", json.dumps(sizes), "--folder", str(folder)]
            pace = ["--tokens-per-second", str(given.tokens_per_second)]
            subprocess.run([sys.executable, __file__, *own, *pace], check=True, stdout=sys.stderr)
        runs.append((sizes, json.loads((folder / "found.json").read_text())))
    targets = [{"candidates": given.target, "shards": n, "actors": max(given.actors)} for n in (1024, 16384)]
    if any(len({sizes[name] for sizes, _ in runs}) < 2 for name in ("candidates", "shards")):
        targets = []
    print("\n".join(table(runs, targets)))


if __name__ == "__main__":
    main()
