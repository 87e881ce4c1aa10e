"""All juries of ten judges over 1,000 items with 2,000 bootstrap draws: seconds for votes, kappas and intervals.

python perf/juries.py [--judges 10] [--items 1000] [--draws 2000]
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

from ray_pipeline.agents.jury import MISSING, pool_votes, subsets
from ray_pipeline.agreement.vote_agreement import agreement
from ray_pipeline.stats.bootstrap import resample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("judges", 10), ("items", 1000), ("draws", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, given.items).astype(np.int8)
    agrees = rng.random((given.judges, given.items)) < 0.5
    codes = np.where(agrees, labels, rng.integers(0, 3, agrees.shape)).astype(np.int8)
    codes[rng.random(codes.shape) < 0.01] = MISSING

    begin = time.monotonic()
    members = subsets(given.judges, range(1, given.judges + 1))
    votes = pool_votes(codes, members)
    pooled = time.monotonic()
    samples = resample(np.arange(given.items), given.draws, 0)
    drawn = time.monotonic()
    agreement(votes, labels, samples, names=("kappa",))
    kappas = time.monotonic()
    agreement(votes, labels, samples)
    end = time.monotonic()
    print(
        f"{given.judges} judges, {given.items} items, {given.draws} draws, {len(members)} juries, {os.cpu_count()} CPUs"
    )
    print("| step | seconds |\n|---|---|")
    for step, seconds in {
        "pool the votes of all juries": pooled - begin,
        "draw the bootstrap samples": drawn - pooled,
        "kappa with interval": kappas - drawn,
        "all six statistics with intervals": end - kappas,
        "votes, samples and all six statistics": (drawn - begin) + (end - kappas),
    }.items():
        print(f"| {step} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
