"""Public datasets of human preferences between two answers, as items of the agreement format.

A pair that several people judged is one item: `human_votes` keeps each of them, and `human_label` is their unique
mode, a tie where there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ray_pipeline.agents.jury import pooled_vote
from ray_pipeline.agreement.recorded import read_item
from ray_pipeline.data.sources import File, InputError, find_files, jsonl_records, open_parquet, parquet_batches
from ray_pipeline.data.sources.files import arrow_records
from ray_pipeline.data.sources.huggingface import hub_errors
from ray_pipeline.store.keys import digest, prompt_id


@dataclasses.dataclass(frozen=True)
class HumanData:
    """Location of a dataset.

    Attributes:
        hub_name: on the Hugging Face hub; None where its authors publish it elsewhere.
        elsewhere: what to fetch by hand then, and what `data.path` must name.
        items: makes items of raw rows, each with the place that errors name.
        load: raw rows from the hub at a commit.
    """

    hub_name: str | None
    elsewhere: str
    items: Callable[[Iterable[tuple[str, Mapping[str, Any]]]], list[dict[str, Any]]]
    load: Callable[[str | None], Iterator[tuple[str, Mapping[str, Any]]]] | None = None


def read_human_labels(kind: str, path: str | None, commit: str | None = None) -> list[dict[str, Any]]:
    """Items of a dataset (rows of the table `items`), in its order.

    Args:
        kind: alpaca_eval, fair_eval, pandalm or mt_bench.
        path: a local copy (or a URI) in the shape that the authors publish; None for the hub.
        commit: of the hub to read.

    Raises:
        InputError: it cannot be found or read, or a row is not of its published shape; names file and row.
    """
    data = HUMAN_DATA[kind]
    if kind == "fair_eval":
        if path is None:
            raise InputError(where_to_find(kind))
        rows: Iterable[tuple[str, Mapping[str, Any]]] = _fair_eval_rows(path)
    elif path is not None:
        rows = file_rows(path)
    elif data.load is None:
        raise InputError(where_to_find(kind))
    else:
        rows = data.load(commit)
    items = data.items(rows)
    if not items:
        raise InputError(f"{path or data.hub_name} holds no pair that a person judged; check data.type and the file")
    return items


def where_to_find(kind: str) -> str:
    """Remedy for a dataset that is not on the Hub."""
    return f"data.type {kind}: its authors do not publish it on the hub. Fetch {HUMAN_DATA[kind].elsewhere}"


# --- raw rows ---------------------------------------------------------------------------------------------------------


def file_rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of JSON (one object a line, or one array; .gz too) or .parquet files."""
    for file in find_files(path):
        if file.name.endswith(".parquet"):
            with open_parquet(file) as table:
                batches = parquet_batches(file, table, table.schema_arrow.names)
                records = list(arrow_records(batches, file.uri))
            if fault := next((f"{record.where} {record.fault}" for record in records if record.fault), None):
                raise InputError(fault)
            rows = [record.row for record in records]
        else:
            rows = [row for _, row in jsonl_records(file)]
        for number, row in enumerate(rows, 1):
            yield f"{file.uri}: row {number}", row


def _text(file: File) -> str:
    with file.open() as stream:
        try:
            return stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{file.uri} is not UTF-8 text ({error})") from error


def _alpaca_eval_hub(commit: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The file itself: the dataset comes with a loading script, which `datasets` no longer runs."""
    from huggingface_hub import hf_hub_download

    name, file = "tatsu-lab/alpaca_eval", "alpaca_farm_human_crossannotations.json"
    try:
        path = hf_hub_download(name, file, repo_type="dataset", revision=commit)
    except hub_errors(ValueError) as error:
        raise InputError(
            f"{file} of dataset {name} cannot be loaded ({str(error).splitlines()[0]}); check the network, or "
            "download it and set data.path to the file"
        ) from error
    yield from file_rows(path)


def _mt_bench_hub(commit: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets  # takes seconds to import

    name = "lmsys/mt_bench_human_judgments"
    try:
        data = datasets.load_dataset(name, split="human", revision=commit)
    except hub_errors(ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"dataset {name} cannot be loaded ({str(error).strip().splitlines()[0]}); check the network, or download "
            "it and set data.path to its Parquet file of the split `human`"
        ) from error
    for number, row in enumerate(data, 1):
        yield f"dataset {name}: row {number}", row


def _fair_eval_rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The files of FairEval's folder as rows: a question, both answers by question_id, and the line of the review."""
    if os.path.isfile(path):
        raise InputError(f"{path} is a file; data.type fair_eval needs {HUMAN_DATA['fair_eval'].elsewhere}")
    folder = path.rstrip("/")
    questions, ours, theirs = (
        list(file_rows(f"{folder}/{name}"))
        for name in ("question.jsonl", "answer/answer_vicuna-13b.jsonl", "answer/answer_gpt35.jsonl")
    )
    (review,) = find_files(f"{folder}/review/review_gpt35_vicuna-13b_human.txt")
    labels = [line.strip() for line in io.StringIO(_text(review)) if line.strip()]
    if len(labels) != len(questions):
        raise InputError(f"{review.uri} has {len(labels)} labels for {len(questions)} questions; there must be as many")
    # Answers are joined by id; the labels have none, and are in the order of the questions.
    vicuna, chatgpt = (
        {need(where, row, "question_id", int): (where, row) for where, row in rows} for rows in (ours, theirs)
    )
    for (where, question), label in zip(questions, labels, strict=True):
        number = need(where, question, "question_id", int)
        for name, answers in (("answer_vicuna-13b.jsonl", vicuna), ("answer_gpt35.jsonl", chatgpt)):
            if number not in answers:
                raise InputError(f"{where}: question_id {number} has no answer in {folder}/answer/{name}")
        yield (
            where,
            {
                "question_id": number,
                "text": need(where, question, "text", str),
                "vicuna": need(vicuna[number][0], vicuna[number][1], "text", str),
                "chatgpt": need(chatgpt[number][0], chatgpt[number][1], "text", str),
                "label": label,
            },
        )


# --- items ------------------------------------------------------------------------------------------------------------


class _Pairs:
    """Items that grow by one annotation at a time, in the order in which their pairs first came."""

    def __init__(self) -> None:
        self._pairs: dict[str, dict[str, Any]] = {}
        self._votes: dict[str, dict[str, str]] = {}

    def add(self, where: str, item: Mapping[str, Any], annotator: str, vote: str) -> None:
        known = self._pairs.setdefault(item["item_id"], {**item, "where": where})
        if any(known[field] != item[field] for field in ("question", "response_a", "response_b")):
            raise InputError(f"{where}: {item['item_id']} has other texts here than in {known['where']}")
        votes = self._votes.setdefault(item["item_id"], {})
        # The same person may have judged a pair twice; both count.
        name, again = annotator, 1
        while name in votes:
            again += 1
            name = f"{annotator} #{again}"
        votes[name] = vote

    def items(self) -> list[dict[str, Any]]:
        return [
            read_item(
                pair["where"],
                {
                    **{k: v for k, v in pair.items() if k != "where"},
                    "human_votes": votes,
                    "human_label": pooled_vote(list(votes.values())),
                },
            )
            for pair, votes in ((pair, self._votes[item_id]) for item_id, pair in self._pairs.items())
        ]


def _alpaca_eval_items(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Pairs of instruction and two outputs; `preference` is 1 or 2 (0 or 1.5 in some versions for a tie)."""
    pairs = _Pairs()
    for where, row in rows:
        instruction, one, other = (need(where, row, f, str) for f in ("instruction", "output_1", "output_2"))
        more = row.get("input")
        question = f"{instruction}\n\n{more}" if isinstance(more, str) and more.strip() else instruction
        vote = {1.0: "A", 2.0: "B", 0.0: "tie", 1.5: "tie"}.get(_number(where, row, "preference"))
        if vote is None:
            raise InputError(f"{where}: preference must be 1, 2, 1.5 or 0, not {row['preference']!r}")
        annotator = row.get("annotator_index", row.get("annotator"))
        item = {
            "item_id": f"alpaca-eval/{digest([question, one, other], size=8)}",
            "question": question,
            "response_a": one,
            "response_b": other,
        }
        pairs.add(where, item, f"annotator {annotator}" if annotator is not None else "annotator", vote)
    return pairs.items()


def _pandalm_items(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """`annotator1` to `annotator3` hold 1, 2 or 0 for a tie; `cmp_key` names the models as one_other."""
    pairs = _Pairs()
    for where, row in rows:
        instruction = need(where, row, "instruction", str)
        one, other = (_answer(where, row, f) for f in ("response1", "response2"))
        more = row.get("input")  # NaN where there is none
        question = f"{instruction}\n\n{more}" if isinstance(more, str) and more.strip() else instruction
        model_a, _, model_b = str(row.get("cmp_key") or "").partition("_")
        item = {
            "item_id": f"pandalm/{need(where, row, 'idx', int)}",
            "question": question,
            "response_a": one,
            "response_b": other,
            "model_a": model_a or None,
            "model_b": model_b or None,
        }
        annotators = sorted(key for key in row if re.fullmatch(r"annotator[0-9]+", key))
        if not annotators:
            raise InputError(f"{where}: there is no annotator1; this is not PandaLM's test set")
        for annotator in annotators:
            vote = {1.0: "A", 2.0: "B", 0.0: "tie"}.get(_number(where, row, annotator))
            if vote is None:
                raise InputError(f"{where}: {annotator} must be 1, 2 or 0, not {row[annotator]!r}")
            pairs.add(where, item, annotator, vote)
    return pairs.items()


def _answer(where: str, row: Mapping[str, Any], field: str) -> str:
    """A response as text: some answers of PandaLM's file are JSON's `true`, for the word True, or numbers."""
    value = row.get(field)
    if isinstance(value, bool) or (isinstance(value, (int, float)) and math.isfinite(value)):
        return str(value)
    text: str = need(where, row, field, str)
    return text


def _fair_eval_items(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A is Vicuna's answer, B is ChatGPT's."""
    found = []
    for where, row in rows:
        label = {"VICUNA13B": "A", "CHATGPT": "B", "TIE": "tie"}.get(row["label"].upper())
        if label is None:
            raise InputError(f"{where}: the human label must be CHATGPT, VICUNA13B or TIE, not {row['label']!r}")
        item = {
            "item_id": f"fair-eval/{row['question_id']}",
            "question": row["text"],
            "response_a": row["vicuna"],
            "response_b": row["chatgpt"],
            "model_a": "vicuna-13b",
            "model_b": "gpt-3.5-turbo",
            "human_label": label,
        }
        found.append(read_item(where, item))
    return found


def _mt_bench_items(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A pair of models at one turn of one question; a pair that was shown in either order is one item.

    The question of turn 2 is the conversation up to it, which differs between the models: it is identified by
    the user turns, and each answer is the model's whole part of the conversation.
    """
    pairs = _Pairs()
    for where, row in rows:
        model_a, model_b, winner, judge = (need(where, row, f, str) for f in ("model_a", "model_b", "winner", "judge"))
        number, turn = (need(where, row, f, int) for f in ("question_id", "turn"))
        if turn < 1:
            raise InputError(f"{where}: turn must be 1 or more, not {turn}")
        vote = {"model_a": "A", "model_b": "B"}.get(winner, "tie" if winner.startswith("tie") else None)
        if vote is None:
            raise InputError(f"{where}: winner must be model_a, model_b or tie, not {winner!r}")
        said = [_turns(where, row, f"conversation_{side}", turn) for side in "ab"]
        answers = [said[0][1], said[1][1]]
        if model_b < model_a:
            model_a, model_b = model_b, model_a
            answers, vote = answers[::-1], {"A": "B", "B": "A"}.get(vote, vote)
        item = {
            "item_id": f"mt-bench/{number}/turn-{turn}/{model_a}-vs-{model_b}",
            "question": said[0][0],
            "response_a": answers[0],
            "response_b": answers[1],
            "model_a": model_a,
            "model_b": model_b,
        }
        pairs.add(where, item, judge, vote)
    return pairs.items()


def _turns(where: str, row: Mapping[str, Any], field: str, turn: int) -> tuple[str, str]:
    """User turns and model turns up to a turn."""
    conversation = row.get(field)
    if not isinstance(conversation, list):
        raise InputError(f"{where}: {field} must be a list of messages")
    said: dict[str, list[str]] = {"user": [], "assistant": []}
    for message in conversation[: 2 * turn]:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or role not in said or not isinstance(content, str):
            raise InputError(f"{where}: {field} has a message that is not text of a user or an assistant")
        said[role].append(content)
    if any(len(texts) != turn for texts in said.values()):
        raise InputError(f"{where}: {field} has fewer than {turn} turns")
    return _joined(said["user"]), _joined(said["assistant"])


def _joined(texts: list[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[turn {number}]\n{text}" for number, text in enumerate(texts, 1))


_FIRST_TURN = re.compile(r"\[turn 1\]\n(.*?)\n\n\[turn 2\]\n", re.DOTALL)


def question_id(item: Mapping[str, Any]) -> str:
    """The prompt_id of an item's first turn, which is its own unless several turns are in its question (`_joined`)."""
    first = _FIRST_TURN.match(item.get("question") or "")
    return prompt_id([{"role": "user", "content": first[1]}]) if first else item["prompt_id"]


def need(where: str, row: Mapping[str, Any], field: str, kind: type) -> Any:
    """The text or whole number of a field. Raises InputError, naming place and field."""
    value = row.get(field)
    if kind is int and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {str: "text", int: "a whole number"}[kind]
        raise InputError(f"{where}: {field} must be {words}, not {value!r}")
    return value


def _number(where: str, row: Mapping[str, Any], field: str) -> float:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {field} must be a number, not {value!r}")
    return float(value)


HUMAN_DATA: dict[str, HumanData] = {
    "alpaca_eval": HumanData(
        "tatsu-lab/alpaca_eval", "alpaca_farm_human_crossannotations.json", _alpaca_eval_items, _alpaca_eval_hub
    ),
    "fair_eval": HumanData(
        None,
        "the repository i-Eval/FairEval from GitHub and set data.path to its folder (question.jsonl, answer/, review/)",
        _fair_eval_items,
    ),
    "pandalm": HumanData(
        None,
        "data/testset-v1.json of the repository WeOpenML/PandaLM from GitHub and set data.path to it",
        _pandalm_items,
    ),
    "mt_bench": HumanData(
        "lmsys/mt_bench_human_judgments", "the Parquet file of the split `human`", _mt_bench_items, _mt_bench_hub
    ),
}
