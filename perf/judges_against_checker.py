"""How judges of a finished run score, against a checker: spread of scores, and whether right responses score higher.

    python perf/judges_against_checker.py RUN [CHECKER] [--kinds]

One line a judge, and a second one (`… mean`) where it was asked for `expected_score`, the mean score under its
log-probabilities:

    verdicts     that were read
    mean, sd, lowest, highest   of the scores; shares of the lowest and of the highest score
    pairs ok     of pairs of a right and a wrong response to *any* prompts, those in which the right one scores higher
                 (ties count half, 0.5 is chance)
    same prompt  the same among responses to one prompt, which is what preference data is made from
    correl       correlation with the share of constraints that a response follows
    accuracy     of the vote "right" at the middle of the scale or above, "wrong" below
    ECE          expected calibration error, with the score's place on the scale as the probability of being right

Then the correlation (phi) of the errors of each two judges. With --kinds, `pairs ok` for each kind of constraint, over
responses to prompts with that one alone. CHECKER is `ifeval` unless named.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import pandas as pd

from ray_pipeline.data.checkers import load_checker
from ray_pipeline.data.judge_votes import judge_errors
from ray_pipeline.graph.results import of_role, read_run
from ray_pipeline.stats.bootstrap import resample
from ray_pipeline.stats.calibration import calibration
from ray_pipeline.workflow.stored import stored

HEAD = "verdicts   mean    sd   lowest  highest  pairs ok  same prompt  pairs  correl  accuracy    ECE"


def order(scores: pd.Series, right: pd.Series) -> tuple[float, int]:
    """Over pairs of a right and a wrong response: how often the right one scores higher (1/2 for a tie); pairs."""
    high, low = scores[right].to_numpy()[:, None], scores[~right].to_numpy()[None, :]
    return float((high > low).sum() + (high == low).sum() / 2), high.size * low.size


def judge_line(name: str, rows: pd.DataFrame, width: int) -> str:
    scores, right = rows["score"], rows["share"] == 1
    won, pairs = order(scores, right)
    within = [order(group["score"], group["share"] == 1) for _, group in rows.groupby("prompt_id")]
    own, own_pairs = (sum(part) for part in zip(*within, strict=True))
    together = np.corrcoef(scores, rows["share"])[0, 1] if scores.std() > 0 and rows["share"].std() > 0 else np.nan
    sure = rows["place"].to_numpy()
    by_prompt = resample(rows["prompt_id"], 2, 0)
    found = calibration(np.column_stack([1 - sure, sure]), right.to_numpy().astype(np.int8), by_prompt)
    return (
        f"{name:<{width}} {len(rows):>8} {scores.mean():>6.2f} {scores.std():>5.2f} "
        f"{(scores == scores.min()).mean():>8.1%} {(scores == scores.max()).mean():>8.1%} "
        f"{won / pairs if pairs else np.nan:>9.3f} {own / own_pairs if own_pairs else np.nan:>12.3f} "
        f"{own_pairs:>6} {together:>7.2f} "
        f"{((sure >= 0.5) == right).mean():>9.3f} {found.ece.value if found else np.nan:>6.3f}"
    )


def main(folder: str, checker: str = "ifeval", kinds: bool = False) -> None:
    """Print the tables of a run."""
    run, check = read_run(folder), load_checker(checker)
    results = run.results
    prompts = results["prompts"].table().read_all().to_pandas().set_index("prompt_id")
    candidates = results["candidates"].table().read_all().to_pandas().dropna(subset="response")
    found = [
        check(list(prompts.messages[prompt]), text, prompts.meta[prompt])
        for prompt, text in zip(candidates.prompt_id, candidates.response, strict=True)
    ]
    candidates["share"] = [np.nan if one is None else one.share for one in found]
    known = candidates.dropna(subset="share")[["candidate_id", "share"]]
    verdicts = pd.concat([result.table().read_all().to_pandas() for result in of_role(results, "verdicts")])
    means = verdicts.assign(score=verdicts.expected_score, judge=verdicts.judge + " mean")
    rows = pd.concat([verdicts, means]).dropna(subset="score").merge(known, on="candidate_id")
    low, high = stored(run).config.judge.scale
    rows["place"] = (rows.score - low) / (high - low)
    print(
        f"{len(known):,} responses; {(known.share == 1).mean():.1%} meet every constraint; "
        f"mean share met {known.share.mean():.1%}"
    )
    width = max(14, rows.judge.str.len().max())
    print(f"{'judge':<{width}} {HEAD}")
    for name, group in rows.groupby("judge", sort=False):
        print(judge_line(str(name), group, width))
    middle = (low + high) / 2
    errors = judge_errors(results, checker, desirable_from=middle, undesirable_to=np.nextafter(middle, low))
    for pair in errors.truth.pairs if errors is not None and errors.truth is not None else []:
        together = pair.reason if pair.correlation.mean is None else f"correlation {pair.correlation.mean:.2f}"
        print(f"errors of {pair.judge_a} and {pair.judge_b}: {together}")
    if kinds:
        asked = rows.prompt_id.map(lambda prompt: json.loads(prompts.meta[prompt])["instruction_id_list"])
        single = rows.assign(kind=asked.str.get(0))[asked.str.len() == 1]
        for (kind, judge), group in single.groupby(["kind", "judge"]):
            won, pairs = order(group.score, group.share == 1)
            print(f"{kind}, {judge}: " + (f"{won / pairs:.3f} of {pairs:,} pairs" if pairs else "no pairs"))
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
    parser.add_argument("--kinds", action="store_true", help="also by kind of constraint")
    arguments = parser.parse_args()
    main(arguments.run, arguments.checker, arguments.kinds)
