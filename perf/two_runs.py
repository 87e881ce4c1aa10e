"""How many calls two runs at the same time on one call log pay for twice.

    python perf/two_runs.py [--prompts 100] [--seconds 0.2]

Two processes run the same configuration in run folders of their own, with one `calls.root`, against an HTTP server that
answers after some time and counts equal requests. They start together, or the second when half of the first one's
calls are made, or after its end. Requests of the checks and starts, whose texts are always the same, are left out.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.dags.test_endpoint_only import config
from tests.endpoint import KEY, Answer, Endpoint, opinion

_TESTS = ("Reply as briefly as you can.", "verdict")


def started(folder: Path, url: str, prompts: int, name: str) -> subprocess.Popen[bytes]:
    """A run of this name under way."""
    sources = {"sources": [{"type": "pocket", "count": prompts, "seed": 0}], "num_shards": 16}
    values = config(url, prompts=sources, candidates={"model": "writer", "k": 2}, calls={"root": str(folder / "calls")})
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    run = ["-m", "ray_pipeline.cli", "run", "dmapo", "-c", str(folder / "config.yaml"), "--executor", "inprocess"]
    with open(folder / f"{name}.txt", "wb") as output:
        return subprocess.Popen(
            [sys.executable, *run, "--run-dir", str(folder / name)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LOOPBACK_KEY": KEY},
        )


def paid(asked: list[dict[str, Any]]) -> collections.Counter[str]:
    """Requests for replies that a run keeps, by their content."""
    texts = (json.dumps(body, sort_keys=True) for body in list(asked))
    return collections.Counter(text for text in texts if not any(test in text for test in _TESTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.2, help="until a reply")
    given = parser.parse_args()

    def reply(body: dict[str, Any], number: int) -> Answer:
        answer = opinion(body, number)
        answer.delay = given.seconds
        return answer

    print("| the second run starts | calls of a run | paid twice | says so |\n|---|---:|---:|---|")
    for when, share in (("with the first", 0.0), ("when half of the calls are made", 0.5), ("after the end", 1.0)):
        with tempfile.TemporaryDirectory() as place, Endpoint(reply) as server:
            folder = Path(place)
            first = started(folder, server.url, given.prompts, "first")
            calls = 8 * given.prompts  # two candidates, each for two judges and the critic
            while first.poll() is None and (share == 1 or sum(paid(server.asked).values()) < share * calls):
                time.sleep(0.1)
            second = started(folder, server.url, given.prompts, "second")
            if first.wait() or second.wait():
                sys.exit(f"a run failed:\n{(folder / 'first.txt').read_text()}\n{(folder / 'second.txt').read_text()}")
            told = sum("is paid for twice" in (folder / f"{name}.txt").read_text() for name in ("first", "second"))
            found = paid(server.asked)
            twice = sum(found.values()) - len(found)
            print(f"| {when} | {len(found)} | {twice} | {'yes' if told else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
