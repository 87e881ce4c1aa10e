"""A checklist against three global rubrics, on instructions with three verifiable constraints each.

    python perf/checklists.py FOLDER [--prompts 40] [--config configs/smol_checklist.yaml]

Runs `quorum run dmapo` to the verdicts of CONFIG (its model, candidates and judges), with prompts of exactly three
constraints, and one judge more: `constraints`, a checklist whose edited lists are the prompts' own constraints. So what
the writer of lists costs shows apart from what the ticks are worth. IFEval's official checkers are the truth. A killed
command is repeated; calls that were made are kept.

For each judge, and for the mean of the global rubrics: the share of pairs of a response that follows more constraints
and one that follows fewer in which the first scores higher (ties count half, 50 % is chance), among all responses and
among those to one prompt, with a 95 % interval by a bootstrap over prompts; and the tokens of its calls, prompt and
reply, those that write the lists of `requirements` included. Last, how often a tick of `constraints` is right.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ray_pipeline.agents.checklists import stored_ticks
from ray_pipeline.constraints.compose import compose
from ray_pipeline.data.checkers import load_checker
from ray_pipeline.graph.results import of_role, read_run
from ray_pipeline.store.calls import read_calls
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id

_DRAWS = 500


def write_inputs(folder: Path, count: int, config: str) -> Path:
    """Prompts, the lists of their constraints, and the configuration of the run; returns the latter's path."""
    prompts = list(itertools.islice((p for p in compose(0) if len(p.constraints) == 3), count))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "prompts.jsonl", "w") as rows, open(folder / "lists.jsonl", "w") as lists:
        for prompt in prompts:
            ids, kwargs = [one.id for one in prompt.constraints], [one.arguments for one in prompt.constraints]
            whole = {"instruction_id_list": ids, "kwargs": kwargs}
            rows.write(json.dumps({"prompt": prompt.text, **whole}) + "\n")
            name = prompt_id([{"role": "user", "content": prompt.text}])
            items = [one.sentence for one in prompt.constraints]
            lists.write(json.dumps({"prompt_id": name, "items": items}) + "\n")
    values = yaml.safe_load(Path(config).read_text())
    source = {
        "type": "jsonl",
        "path": str(folder / "prompts.jsonl"),
        "column": "prompt",
        "meta_columns": ["instruction_id_list", "kwargs"],
    }
    values["prompts"]["sources"] = [source]
    (writer,) = (one["checklist"] for one in values["judge"]["rubrics"] if "checklist" in one)
    edited = {**writer, "edited": str(folder / "lists.jsonl")}
    values["judge"]["rubrics"].append({"name": "constraints", "checklist": edited})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def order(scores: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """Of the pairs whose truths differ: how many the scores order alike (a tie is half), and how many there are."""
    first, second = np.triu_indices(len(scores), 1)
    sign = np.sign(truth[first] - truth[second])
    said = np.sign(scores[first] - scores[second]) * sign
    pairs = sign != 0
    return float((said[pairs] > 0).sum() + (said[pairs] == 0).sum() / 2), int(pairs.sum())


def line(name: str, rows: pd.DataFrame, tokens: float | None) -> str:
    everywhere, pairs = order(rows.score.to_numpy(), rows.truth.to_numpy())
    within = np.array([order(g.score.to_numpy(), g.truth.to_numpy()) for _, g in rows.groupby("prompt_id")])
    shares = np.full(len(within), 1 / len(within))
    drawn = np.random.default_rng(0).multinomial(len(within), shares, _DRAWS) @ within
    low, high = np.nanpercentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    won, own = within.sum(axis=0)
    return (
        f"{name:<13} {len(rows):>8} {rows.score.mean():>6.2f} {rows.score.std():>5.2f} "
        f"{100 * everywhere / pairs:>9.1f} {100 * won / own:>11.1f} {100 * low:>6.1f} to {100 * high:<5.1f} {own:>6.0f}"
        f"{'' if tokens is None else f' {tokens:>11,.0f}'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for inputs, run and call log")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--config", default="configs/smol_checklist.yaml")
    given = parser.parse_args()
    config, run_folder = write_inputs(given.folder.absolute(), given.prompts, given.config), given.folder / "run"
    command = ["run", "dmapo", "-c", str(config), "--run-dir", str(run_folder), "--to", "judge"]
    subprocess.run([sys.executable, "-m", "ray_pipeline.cli", *command, "--executor", "inprocess"], check=True)

    results, check = read_run(str(run_folder)).results, load_checker("ifeval")
    prompts = results["prompts"].table().read_all().to_pandas().set_index("prompt_id")
    candidates = results["candidates"].table().read_all().to_pandas().dropna(subset="response")
    checks = [
        check(list(prompts.messages[prompt]), text, prompts.meta[prompt])
        for prompt, text in zip(candidates.prompt_id, candidates.response, strict=True)
    ]
    candidates["truth"] = [np.nan if found is None else found.share for found in checks]
    verdicts = pd.concat([result.table().read_all().to_pandas() for result in of_role(results, "verdicts")])
    rows = verdicts.merge(candidates[["candidate_id", "truth", "response"]], on="candidate_id")

    tokens: collections.Counter[str] = collections.Counter()
    calls = Folder(str(run_folder / "calls"))
    for model in calls.folders():
        for row in read_calls(calls / model, 0, 1).select(["role", "prompt_tokens", "completion_tokens"]).to_pylist():
            kind, _, name = row["role"].partition("/")
            # The lists of both checklists are the same calls, made once; those of `constraints` are replaced.
            tokens["requirements" if kind == "checklist" else name] += row["prompt_tokens"] + row["completion_tokens"]

    count, share = candidates.prompt_id.nunique(), candidates.truth.mean()
    print(f"\n{len(candidates):,} responses to {count} prompts with three constraints; mean share that is followed")
    print(f"{share:.1%}; {(candidates.truth == 1).mean():.1%} follow all three\n")
    print("judge         verdicts   mean    sd  pairs ok  same prompt     95 %        pairs      tokens")
    whole = yaml.safe_load(config.read_text())["judge"]["rubrics"]
    for rubric in whole:
        own = rows[rows.judge == rubric["name"]].dropna(subset="score")
        print(line(rubric["name"], own, tokens[rubric["name"]]))
    names = [rubric["name"] for rubric in whole if "checklist" not in rubric]
    scores = rows[rows.judge.isin(names)].pivot(index="candidate_id", columns="judge", values="score").dropna()
    panel = candidates.set_index("candidate_id").loc[scores.index].assign(score=scores.mean(axis=1)).reset_index()
    print(line("global mean", panel, sum(tokens[name] for name in names)))

    right = said = 0
    both: collections.Counter[tuple[bool, bool]] = collections.Counter()
    for row in rows[rows.judge == "constraints"].dropna(subset="score").to_dict("records"):
        meta = json.loads(prompts.meta[row["prompt_id"]])
        ticks = stored_ticks(row["raw"], 3) or []
        for tick, name, kwargs in zip(ticks, meta["instruction_id_list"], meta["kwargs"], strict=True):
            one = json.dumps({"instruction_id_list": [name], "kwargs": [kwargs]})
            found = check(list(prompts.messages[row["prompt_id"]]), row["response"], one)
            assert found is not None
            both[tick.met, found.share == 1] += 1
            right, said = right + (tick.met == (found.share == 1)), said + 1
    met = both[True, True] + both[True, False]
    followed, broken = both[True, True] + both[False, True], both[True, False] + both[False, False]
    print(
        f"\n{said:,} ticks of constraints: {right / said:.1%} right, {met / said:.1%} say that it is followed: ", end=""
    )
    print(f"{both[True, True] / followed:.1%} of those that are, and {both[True, False] / broken:.1%} of the others")


if __name__ == "__main__":
    main()
