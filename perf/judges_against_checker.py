"""How judges of a finished run score, against a checker: spread of scores, and whether right responses score higher.

    python perf/judges_against_checker.py RUN [CHECKER]

One line a judge: verdicts that were read; mean and standard deviation; share of the lowest and of the highest score;
the share of pairs of a right and a wrong response to *any* prompts in which the right one scores higher (ties count
half, 0.5 is chance), and the same among responses to one prompt, which is what preference data is made from;
correlation with the share of constraints that a response follows. CHECKER is `ifeval` unless named.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from ray_pipeline.data.checkers import load_checker
from ray_pipeline.graph.results import of_role, read_run


def order(scores: pd.Series, right: pd.Series) -> tuple[float, int]:
    """Over pairs of a right and a wrong response: how often the right one scores higher (1/2 for a tie); pairs."""
    high, low = scores[right].to_numpy()[:, None], scores[~right].to_numpy()[None, :]
    return float((high > low).sum() + (high == low).sum() / 2), high.size * low.size


def judge_line(name: str, rows: pd.DataFrame) -> str:
    scores, right = rows["score"], rows["share"] == 1
    won, pairs = order(scores, right)
    within = [order(group["score"], group["share"] == 1) for _, group in rows.groupby("prompt_id")]
    own, own_pairs = (sum(part) for part in zip(*within, strict=True))
    together = np.corrcoef(scores, rows["share"])[0, 1] if scores.std() > 0 and rows["share"].std() > 0 else np.nan
    return (
        f"{name:<14} {len(rows):>8} {scores.mean():>6.2f} {scores.std():>5.2f} {(scores == scores.min()).mean():>8.1%} "
        f"{(scores == scores.max()).mean():>8.1%} {won / pairs if pairs else np.nan:>9.3f} "
        f"{own / own_pairs if own_pairs else np.nan:>11.3f} {own_pairs:>6} {together:>7.2f}"
    )


def main(folder: str, checker: str = "ifeval") -> None:
    """Print the table of a run."""
    results, check = read_run(folder).results, load_checker(checker)
    prompts = results["prompts"].table().read_all().to_pandas().set_index("prompt_id")
    candidates = results["candidates"].table().read_all().to_pandas().dropna(subset="response")
    found = [
        check(list(prompts.messages[prompt]), text, prompts.meta[prompt])
        for prompt, text in zip(candidates.prompt_id, candidates.response, strict=True)
    ]
    candidates["share"] = [np.nan if one is None else one.share for one in found]
    known = candidates.dropna(subset="share")[["candidate_id", "share"]]
    verdicts = pd.concat([result.table().read_all().to_pandas() for result in of_role(results, "verdicts")])
    rows = verdicts.dropna(subset="score").merge(known, on="candidate_id")
    print(
        f"{len(known):,} responses; {(known.share == 1).mean():.1%} meet every constraint; "
        f"mean share met {known.share.mean():.1%}"
    )
    print("judge          verdicts   mean    sd   lowest  highest  pairs ok  same prompt  pairs  correl")
    for name, group in rows.groupby("judge", sort=False):
        print(judge_line(str(name), group))
    if "critic" in results:
        critiques = results["critic"].table().read_all().to_pandas().dropna(subset="flawed").merge(known)
        wrong = critiques.share < 1
        flawed = critiques.flawed.astype(bool)
        print(
            f"critic: {flawed.mean():.1%} called flawed; of those that follow everything {flawed[~wrong].mean():.1%}, "
            f"of the others {flawed[wrong].mean():.1%}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("checker", nargs="?", default="ifeval")
    arguments = parser.parse_args()
    main(arguments.run, arguments.checker)
