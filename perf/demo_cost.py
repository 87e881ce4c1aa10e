"""What the demo takes on this machine: wall time of the pipeline and peak memory of its process tree.

    python perf/demo_cost.py [key=value …]

Memory is PSS (shared pages counted once, split over the processes that share them), summed over the tree and sampled
every second; Linux only. The environment must be installed already. Prints one table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from ray_pipeline.graph.results import read_run


def pss_of_tree(pid: int) -> int:
    """Bytes; processes that end while we look count for nothing."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_pipeline.cli", "run", "dmapo", "-c", "pocket", "--run-dir", run, *sys.argv[1:]],
            cwd=Path(__file__).parents[1],
        )
        peak = 0

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, pss_of_tree(process.pid))
                time.sleep(1.0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        wall = time.monotonic() - begin
        watcher.join()
        if code:
            sys.exit(f"the run failed with exit code {code}")
        print(f"\n{'stage':<20} {'rows':>7} {'engine calls':>13} {'seconds':>8}")
        for name, stage in read_run(str(run)).stages.items():
            rows, calls = sum(stage.rows.values()), int(stage.usage.calls_engine)
            print(f"{name:<20} {rows or '':>7} {calls or '':>13} {stage.usage.wall_seconds:>8.1f}")
        print(f"\npipeline {wall:.0f} s wall, peak memory {peak / 2**30:.1f} GiB (PSS of the process tree)")
        print(json.loads((run / "report" / "metrics.json").read_text())["headline"]["text"])


if __name__ == "__main__":
    main()
