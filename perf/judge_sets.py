"""Readers and rules of public sets against verdicts that their authors published: the same figures must come out.

    python perf/judge_sets.py JUDGEBENCH LLMBAR

JUDGEBENCH is a clone of ScalerLab/JudgeBench, LLMBAR one of princeton-nlp/LLMBar. Their items go through
`judge_card.sets`, their recorded verdicts through `judge_card.measure`; no model is called. JudgeBench's figures are
beside those of its own counting, LLMBar's beside the `statistics.json` of the same verdicts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.engines.usage import Usage
from ray_pipeline.judge_card.measure import JudgeFacts, Score, judge_card
from ray_pipeline.judge_card.sets import PublicSet, read_set
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import CARD_ITEMS, CARD_VERDICTS, to_table

_SUBSETS = ("Natural", "Adversarial/Neighbor", "Adversarial/GPTInst", "Adversarial/GPTOut", "Adversarial/Manual")
_FIRST, _SWAPPED = {"A>B": "A", "B>A": "B", "A=B": "AB"}, {"A>B": "B", "B>A": "A", "A=B": "AB"}

Verdicts = dict[str, dict[str, str | None]]
"""Item → order → best answers."""


def measured(items: list[dict[str, Any]], verdicts: Mapping[str, Mapping[str, str | None]]) -> Score:
    """The score of recorded verdicts."""
    empty = {"judge": "recorded", "strategy": "recorded", "reason": None, "parse_status": "ok", "raw": None}
    rows = [
        {**{name: item[name] for name in ("item_id", "prompt_id", "source")}, **empty, "order": order, "best": best}
        for item in items
        for order, best in verdicts[item["item_id"]].items()
    ]
    facts = JudgeFacts("recorded", "recorded", {"model": ""}, "", "")
    tables = to_table(items, CARD_ITEMS), to_table(rows, CARD_VERDICTS)
    return judge_card(facts, *tables, Usage(), Usage()).scores[0]


def judgebench(folder: Path, pairs: str, judge: str) -> tuple[Score, float]:
    """The score of a judge's recorded verdicts, and the accuracy by the authors' `compute_final_metrics`."""
    name = f"dataset=judgebench,response_model={pairs}"
    verdicts: Verdicts = {}
    right = []
    for line in (folder / "outputs" / f"{name},judge_name=arena_hard,judge_model={judge}.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        said = [None if judgment is None else judgment["decision"] for judgment in row["judgments"]]
        turned = [said[0], {"A>B": "B>A", "B>A": "A>B"}.get(said[1], said[1])]
        other = {"A>B": "B>A", "B>A": "A>B"}[row["label"]]
        right.append(sum((one == row["label"]) - (one == other) for one in turned) > 0)
        key = f"judgebench/{digest([row['question'], row['response_A'], row['response_B']], 8)}"
        verdicts[key] = {"AB": _FIRST.get(said[0]), "BA": _SWAPPED.get(said[1])}
    items = read_set(PublicSet(type="judgebench", path=str(folder / "data" / f"{name}.jsonl")))
    return measured(items, verdicts), sum(right) / len(right)


def llmbar(folder: Path, evaluator: str) -> tuple[Score, dict[str, float]]:
    """The score of recorded verdicts, and the accuracy of each subset in the authors' files."""
    root = folder / "Dataset" / "LLMBar"
    verdicts: Verdicts = {}
    published = {}
    for subset in _SUBSETS:
        results = root / subset / "evaluators" / evaluator
        statistics = json.loads((results / "statistics.json").read_text(encoding="utf-8"))
        published[Path(subset).name] = float(statistics["correct_average"].rstrip("%")) / 100
        for row in json.loads((results / "result.json").read_text(encoding="utf-8")):
            winners = [row["results"][-1][f"swap = {swap}"]["winner"] for swap in (False, True)]
            best = [{"1": "A", "2": "B"}.get(winner) for winner in winners]
            key = f"llmbar/{digest([row['input'], row['output_1'], row['output_2']], 8)}"
            verdicts[key] = dict(zip(("AB", "BA"), best, strict=True))
    return measured(read_set(PublicSet(type="llmbar", path=str(root))), verdicts), published


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("judgebench", type=Path, help="clone of ScalerLab/JudgeBench")
    parser.add_argument("llmbar", type=Path, help="clone of princeton-nlp/LLMBar")
    given = parser.parse_args()
    print("| set | verdicts of | part | items | here | theirs |\n|---|---|---|---:|---:|---:|")
    for pairs, judge in (
        ("gpt-4o-2024-05-13", "o1-mini-2024-09-12"),
        ("claude-3-5-sonnet-20240620", "claude-3-haiku-20240307"),
    ):
        score, theirs = judgebench(given.judgebench, pairs, judge)
        print(f"| JudgeBench, {pairs} | {judge} | all | {score.share.rows} | {score.share.mean:.2%} | {theirs:.2%} |")
        for subset, share in score.subsets.items():
            print(f"| | | {subset} | | {share:.2%} | |")
    for evaluator in ("GPT-4/Vanilla", "GPT-4/Swap"):
        score, published = llmbar(given.llmbar, evaluator)
        for subset, theirs in published.items():
            print(f"| LLMBar | {evaluator} | {subset} | | {score.subsets[subset]:.2%} | {theirs:.2%} |")
        print(f"| LLMBar | {evaluator} | all | {score.share.rows} | {score.share.mean:.2%} | |")


if __name__ == "__main__":
    main()
