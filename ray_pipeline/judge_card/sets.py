"""Public sets for judges as items with two or more answers, read in the form in which their authors publish them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ray_pipeline.agents.strategies import LABELS
from ray_pipeline.agreement.human_labels import HUMAN_DATA, file_rows, need, read_human_labels
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import HuggingFaceSource, InputError, JsonlSource
from ray_pipeline.data.sources.huggingface import hub_place, load_hub
from ray_pipeline.judge_card.rules import BEST_OF_MANY, BOTH_ORDERS, EACH_ORDER, HUMAN_LABEL, HUMAN_VOTES, Rule
from ray_pipeline.store.keys import digest, prompt_id, unit_hash

SetName = Literal["judgebench", "llmbar", "reward_bench_2", "mt_bench", "pandalm", "fair_eval"]
Rows = Iterator[tuple[str, Mapping[str, Any]]]


class PublicSet(Settings):
    """A public set: its texts are read from its place on the Hub, or from a copy of your own."""

    type: SetName = Field(description="name of the set")
    path: str | None = Field(
        None, description="a local copy or URI in the published form, `*` and `**` allowed; default: the Hub"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the Hub; default: the newest commit")
    limit: int | None = Field(None, ge=1, description="maximum number of items (smallest hashes kept)")
    seed: int = Field(0, description="seed of the items that `limit` keeps, and of the order of their answers")

    def digest(self) -> str:
        """Digest of the files, or commit on the Hub. Raises InputError if there is neither."""
        form = SETS[self.type]
        if self.path is not None and not os.path.isdir(self.path):
            found = JsonlSource(path=self.path, column="id").digest()
        elif (name := self.path or form.hub_name) is not None:
            found = HuggingFaceSource(name=name, column="id", revision=self.revision).digest()
        else:
            raise InputError(f"set {self.type}: it is not on the Hub in a readable form. Fetch {form.elsewhere}")
        return "+".join(found.values())


@dataclasses.dataclass(frozen=True)
class PublicForm:
    """The published form of a set.

    Attributes:
        title: its name on pages.
        hub_name: on the Hugging Face Hub; None where its authors publish it elsewhere.
        elsewhere: what to fetch by hand then, and what `path` must name.
        rule: how its authors count.
        by_subset: whether accuracy is the mean over subsets, as its authors report it, rather than over items.
        many: whether an item has more than two answers.
        read: path, revision → its items.
    """

    title: str
    hub_name: str | None
    rule: Rule
    read: Callable[[str | None, str | None], list[dict[str, Any]]]
    elsewhere: str = ""
    by_subset: bool = False
    many: bool = False


def read_set(settings: PublicSet, commit: str | None = None) -> list[dict[str, Any]]:
    """Items of a set (rows of the table `card_items`), as many as `limit`, ordered by hash.

    Args:
        commit: of the Hub to read instead of the newest of `revision`.

    Raises:
        InputError: it cannot be found or read, or a row is not of its published form; names file and row.
    """
    form = SETS[settings.type]
    items = form.read(settings.path, commit or settings.revision)
    if not items:
        raise InputError(f"{settings.path or form.hub_name} holds no item of {form.title}; check type and path")
    items.sort(key=lambda item: (unit_hash("card", settings.seed, item["item_id"]), item["item_id"]))
    return [
        _shuffled(item, settings.seed) if form.many else item
        for item in ({**item, "source": settings.type} for item in items[: settings.limit])
    ]


def card_item(
    item_id: str, question: str, answers: Sequence[str], votes: Sequence[str], subset: str | None = None
) -> dict[str, Any]:
    """A row of the table `card_items`, without its source."""
    return {
        "item_id": item_id,
        "prompt_id": prompt_id([{"role": "user", "content": question}]),
        "subset": subset,
        "base": None,
        "family": None,
        "question": question,
        "answers": list(answers),
        "votes": list(votes),
    }


def _shuffled(item: dict[str, Any], seed: int) -> dict[str, Any]:
    """Answers in an order that follows from the item: the published form has the right one first."""
    answers, (label,) = item["answers"], item["votes"]
    order = sorted(range(len(answers)), key=lambda n: unit_hash("answer", seed, item["item_id"], n))
    place = order.index(LABELS.index(label))
    return {**item, "answers": [answers[n] for n in order], "votes": [LABELS[place]]}


def _hub_rows(name: str, split: str, revision: str | None) -> Rows:
    for number, row in enumerate(load_hub(name, None, split, revision), 1):
        yield f"{hub_place(name, None, split)}: row {number}", row


def _judgebench(path: str | None, revision: str | None) -> list[dict[str, Any]]:
    """`question`, `response_A`, `response_B` and `label` (`A>B` or `B>A`); `source` is the question's origin. From
    the Hub the split gpt is read, the pairs of the paper's tables; `mmlu-pro-law` and its like are one subset there."""
    rows = _hub_rows("ScalerLab/JudgeBench", "gpt", revision) if path is None else file_rows(path)
    items = []
    for where, row in rows:
        question, one, other, label = (
            need(where, row, field, str) for field in ("question", "response_A", "response_B", "label")
        )
        vote = {"A>B": "A", "B>A": "B"}.get(label)
        if vote is None:
            raise InputError(f"{where}: label must be A>B or B>A, not {label!r}")
        source = row.get("source")
        subset = re.sub(r"^(mmlu-pro)-.*", r"\1", source) if isinstance(source, str) else None
        items.append(card_item(f"judgebench/{digest([question, one, other], 8)}", question, (one, other), vote, subset))
    return _distinct(items)


def _llmbar(path: str | None, revision: str | None) -> list[dict[str, Any]]:
    """`input`, `output_1`, `output_2` and `label` (1 or 2); the folder of a `dataset.json` names the subset."""
    if path is None:
        raise InputError(f"set llmbar: it is not on the Hub in a readable form. Fetch {SETS['llmbar'].elsewhere}")
    items = []
    for where, row in file_rows(f"{path.rstrip('/')}/**/dataset.json" if os.path.isdir(path) else path):
        question, one, other = (need(where, row, field, str) for field in ("input", "output_1", "output_2"))
        label = need(where, row, "label", int)
        if label not in (1, 2):
            raise InputError(f"{where}: label must be 1 or 2, not {label!r}")
        subset = os.path.basename(os.path.dirname(where.rpartition(": row ")[0])) or None
        item_id = f"llmbar/{digest([question, one, other], 8)}"
        items.append(card_item(item_id, question, (one, other), LABELS[label - 1], subset))
    return _distinct(items)


def _reward_bench_2(path: str | None, revision: str | None) -> list[dict[str, Any]]:
    """`id`, `prompt`, `chosen` (one answer), `rejected` (three) and `subset`. The subset Ties, with several right
    answers and a score of its own, is left out."""
    rows = _hub_rows("allenai/reward-bench-2", "test", revision) if path is None else file_rows(path)
    items = []
    for where, row in rows:
        subset = need(where, row, "subset", str)
        if subset.lower() == "ties":
            continue
        name, question = need(where, row, "id", str), need(where, row, "prompt", str)
        chosen, rejected = (_texts(where, row, field) for field in ("chosen", "rejected"))
        if len(chosen) != 1 or not rejected:
            raise InputError(f"{where}: chosen must hold one answer and rejected at least one, outside the subset Ties")
        items.append(card_item(f"reward-bench-2/{subset}/{name}", question, (*chosen, *rejected), "A", subset))
    return _distinct(items)


def _texts(where: str, row: Mapping[str, Any], field: str) -> list[str]:
    value = row.get(field)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: {field} must be a list of texts")
    return list(value)


def _with_people(kind: str) -> Callable[[str | None, str | None], list[dict[str, Any]]]:
    """Sets that the agreement workflow reads too: all votes of MT-Bench, the label of the others."""

    def read(path: str | None, revision: str | None) -> list[dict[str, Any]]:
        items = []
        for row in read_human_labels(kind, path, revision):
            votes = [vote["label"] for vote in row["human_votes"]] if kind == "mt_bench" else [row["human_label"]]
            answers = row["response_a"], row["response_b"]
            items.append({**card_item(row["item_id"], row["question"], answers, votes), "prompt_id": row["prompt_id"]})
        return items

    return read


def _distinct(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A pair that occurs twice is judged once."""
    return list({item["item_id"]: item for item in items}.values())


SETS: dict[str, PublicForm] = {
    "judgebench": PublicForm("JudgeBench", "ScalerLab/JudgeBench", BOTH_ORDERS, _judgebench),
    "llmbar": PublicForm(
        "LLMBar",
        None,
        EACH_ORDER,
        _llmbar,
        elsewhere="the repository princeton-nlp/LLMBar from GitHub and set `path` to its folder Dataset/LLMBar",
    ),
    "reward_bench_2": PublicForm(
        "RewardBench 2", "allenai/reward-bench-2", BEST_OF_MANY, _reward_bench_2, by_subset=True, many=True
    ),
    **{
        kind: PublicForm(
            title,
            HUMAN_DATA[kind].hub_name,
            rule,
            _with_people(kind),
            elsewhere=HUMAN_DATA[kind].elsewhere.replace("data.path", "`path`"),
        )
        for kind, title, rule in (
            ("mt_bench", "MT-Bench human votes", HUMAN_VOTES),
            ("pandalm", "PandaLM", HUMAN_LABEL),
            ("fair_eval", "FairEval", HUMAN_LABEL),
        )
    },
}
