"""CPU time of commands that call no model: before they do anything, and on a finished run.

    python perf/start_up.py [--runs 5] [--run runs/pocket]

Prints the median over some runs of user and system seconds of the process, and its ratio to an interpreter that
imports pydantic, typer and rich, which no command can do without. The ratio is the figure: it depends less on the
machine and on what else runs there. The targets are 3 times and one second. Every command runs once untimed, and
PYTHONDONTWRITEBYTECODE is unset, because an installed package does not compile its modules at every start.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ray_pipeline.config.loading import load_config
from ray_pipeline.graph.manifest import Manifest
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.registry import find_workflow

ROOT = Path(__file__).parents[1]
CONFIG = "configs/pocket.yaml"
YARDSTICK = "import pydantic, typer, rich"


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one Python process and its children."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def plant_run(folder: str) -> None:
    """Write the manifest of a run that has not done anything yet."""
    workflow = find_workflow("dmapo")
    config = load_config(workflow.config, str(ROOT / CONFIG))
    head = {"num_shards": config.num_shards, "calls_root": config.calls_root(folder)}
    Manifest(Folder(folder), workflow.wire(config, folder), config.model_dump(mode="json"), head).write({}, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--run", help="finished run of configs/pocket.yaml")
    given = parser.parse_args()
    quorum = ["-m", "ray_pipeline.cli"]
    with tempfile.TemporaryDirectory() as folder:
        plant_run(folder)
        dry = ["run", "dmapo", "--config", CONFIG, "--run-dir", folder, "--dry-run"]
        commands = {
            YARDSTICK: ["-c", YARDSTICK],
            "import ray_pipeline": ["-c", "import ray_pipeline"],
            "import ray_pipeline.config.loading": ["-c", "import ray_pipeline.config.loading"],
            "import ray_pipeline.workflow.config": ["-c", "import ray_pipeline.workflow.config"],
            "quorum --help": [*quorum, "--help"],
            "quorum status": [*quorum, "status", folder],
            "quorum run dmapo --dry-run": [*quorum, *dry],
            "quorum plan dmapo": [*quorum, "plan", "dmapo", "--config", CONFIG, "--no-write"],
        }
        if given.run is not None:
            copy = os.path.join(folder, "copy")
            shutil.copytree(given.run, copy, symlinks=True)
            commands |= {
                "quorum run dmapo, all stages done": [*quorum, "run", "dmapo", "--config", CONFIG, "--run-dir", copy],
                "quorum regate gate.tau=1.5": [*quorum, "regate", copy, "gate.tau=1.5"],
                "quorum report": [*quorum, "report", copy],
                "quorum audit": [*quorum, "audit", copy],
            }
        for arguments in commands.values():
            cpu_seconds(arguments)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(given.runs):
            for name, arguments in commands.items():  # in turns: a machine whose speed drifts slows all of them
                seconds[name].append(cpu_seconds(arguments))
    least = statistics.median(seconds[YARDSTICK])
    print(f"{'':<40} {'CPU s':>6} {'ratio':>6}")
    for name, taken in seconds.items():
        print(f"{name:<40} {statistics.median(taken):>6.2f} {statistics.median(taken) / least:>6.1f}")


if __name__ == "__main__":
    main()
