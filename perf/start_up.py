"""CPU time that commands take before they do anything.

    python perf/start_up.py [--runs 5]

Prints the median over some runs of user and system seconds of the process, and its ratio to an interpreter that
imports pydantic, typer and rich, which no command can do without. The ratio is the figure: it depends less on the
machine and on what else runs there. The targets are 3 times and one second.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
YARDSTICK = "import pydantic, typer, rich"


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one Python process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--run-folder", help="run to show the status of; default: status is not measured")
    given = parser.parse_args()
    quorum = ["-m", "ray_pipeline.cli"]
    with tempfile.TemporaryDirectory() as folder:
        dry = ["run", "dmapo", "--config", "configs/pocket.yaml", "--run-dir", folder, "--dry-run"]
        commands = {
            YARDSTICK: ["-c", YARDSTICK],
            "import ray_pipeline": ["-c", "import ray_pipeline"],
            "import ray_pipeline.config.loading": ["-c", "import ray_pipeline.config.loading"],
            "import ray_pipeline.workflow.config": ["-c", "import ray_pipeline.workflow.config"],
            "quorum --help": [*quorum, "--help"],
            "quorum run dmapo --dry-run": [*quorum, *dry],
        }
        if given.run_folder:
            commands["quorum status"] = [*quorum, "status", given.run_folder]
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
