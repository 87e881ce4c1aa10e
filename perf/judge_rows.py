"""Rows that teach a judge to score as a checker does, from the candidates of a run.

    python perf/judge_rows.py RUN FILE [--judge NAME] [--checker ifeval]

For each candidate, the question that the run's judge NAME is asked (default: its first) and the reply of a judge who
knows the truth: the share of the constraints that are met, on the judge's scale. As many right ones as wrong ones are
kept, chosen by hash. FILE has one demonstration a line, for

    quorum run train -c configs/smol_judge.yaml preferences.path=FILE

The prompts of RUN must not be those that the judge is to judge afterwards: give the source another seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from ray_pipeline.agents.judges import judge_messages
from ray_pipeline.data.checkers import load_checker
from ray_pipeline.graph.results import read_run
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.workflow.stored import stored


def main(folder: str, file: str, name: str | None, checker: str) -> None:
    """Write the rows, and print how many there are of each score."""
    run, check = read_run(folder), load_checker(checker)
    config = stored(run).config
    rubric = next(one for one in config.judge.rubrics if name in (None, one.name))
    template, layout = config.templates().judge, config.judge.layout
    if layout == "auto":
        raise SystemExit("the rows need the order in which the judge will read: set judge.layout in the run")
    prompts = run.results["prompts"].table().read_all().to_pandas().set_index("prompt_id")
    candidates = run.results["candidates"].table().read_all().to_pandas().dropna(subset="response")

    rows = []
    for one in candidates.itertuples():
        prompt = list(prompts.messages[one.prompt_id])
        found = check(prompt, one.response, prompts.meta[one.prompt_id])
        if found is not None:
            messages = judge_messages(prompt, one.response, rubric, template, layout)
            reply = json.dumps({"score": round(rubric.scaled(found.share))})
            whole = [*messages, {"role": "assistant", "content": reply}]
            rows.append((unit_hash("judge rows", one.candidate_id), found.share == 1, reply, whole))
    made = pd.DataFrame(rows, columns=["hash", "right", "reply", "messages"]).sort_values("hash")
    each = int(min(made.right.sum(), (~made.right).sum()))
    if not each:
        raise SystemExit(f"{len(made):,} candidates, all right or all wrong: they teach nothing")
    kept = made.groupby("right").head(each)
    Path(file).write_text("".join(json.dumps({"messages": one}) + "\n" for one in kept.messages))
    print(f"{len(kept):,} of {len(made):,} candidates; replies: {kept.reply.value_counts().to_dict()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run with prompts and candidates")
    parser.add_argument("file", help="JSON lines to write")
    parser.add_argument("--judge", help="a judge of the run; default: the first")
    parser.add_argument("--checker", default="ifeval")
    arguments = parser.parse_args()
    main(arguments.run, arguments.file, arguments.judge, arguments.checker)
