"""Public datasets of human preferences, on small files of the shape in which their authors publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_pipeline.agreement import human_labels
from ray_pipeline.agreement.human_labels import question_id, read_human_labels
from ray_pipeline.agreement.stages import AgreementData, data_digests, read_data
from ray_pipeline.data.sources import InputError
from ray_pipeline.store.schemas import ITEMS, to_table


def votes(item: dict[str, Any]) -> dict[str, str]:
    return {v["annotator"]: v["label"] for v in item["human_votes"]}


def as_json(path: Path, rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return str(path)


def as_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def annotation(annotator: int, preference: float, **changes: Any) -> dict[str, Any]:
    return {
        "instruction": "Say hi.", "output_1": "hi", "output_2": "no", "preference": preference,
        "annotator_index": annotator, "dataset": "helpful_base", "datasplit": "eval", **changes,
    }  # fmt: skip


def test_alpaca_eval_gathers_the_annotations_of_a_pair(tmp_path: Path) -> None:
    rows = [annotation(3, 1), annotation(5, 2), annotation(7, 1), annotation(3, 2, output_1="hello"), annotation(3, 1)]
    items = read_human_labels("alpaca_eval", as_json(tmp_path / "crossannotations.json", rows))
    assert [i["human_label"] for i in items] == ["A", "B"] and len({i["item_id"] for i in items}) == 2
    assert votes(items[0]) == {"annotator 3": "A", "annotator 5": "B", "annotator 7": "A", "annotator 3 #2": "A"}
    assert (items[0]["question"], items[0]["response_a"], items[0]["response_b"]) == ("Say hi.", "hi", "no")
    to_table(items, ITEMS)
    with pytest.raises(InputError, match=r"row 1: preference must be a number, not inf"):
        read_human_labels("alpaca_eval", as_json(tmp_path / "x.json", [annotation(1, 10**400)]))
    with pytest.raises(InputError, match=r"row 1: preference must be 1, 2, 1\.5 or 0, not 3"):
        read_human_labels("alpaca_eval", as_json(tmp_path / "x.json", [annotation(1, 3)]))
    with pytest.raises(InputError, match=r"row 1: output_2 must be text, not None"):
        read_human_labels("alpaca_eval", as_json(tmp_path / "x.json", [annotation(1, 1, output_2=None)]))


def test_pandalm_has_three_annotators_and_nan_for_no_input(tmp_path: Path) -> None:
    base = {"motivation_app": "x", "cmp_key": "bloom-7b_llama-7b", "instruction": "Sum up.",
            "response1": "r1", "response2": "r2"}  # fmt: skip
    rows = [
        {**base, "idx": 0, "input": "text", "annotator1": 2, "annotator2": 2, "annotator3": 1},
        {**base, "idx": 1, "input": float("nan"), "annotator1": 0, "annotator2": 1, "annotator3": 2},
    ]
    path = as_json(tmp_path / "testset-v1.json", rows)
    assert "NaN" in Path(path).read_text()
    items = read_human_labels("pandalm", path)
    assert [(i["item_id"], i["human_label"], i["question"]) for i in items] == [
        ("pandalm/0", "B", "Sum up.\n\ntext"), ("pandalm/1", "tie", "Sum up."),
    ]  # fmt: skip
    assert (items[0]["model_a"], items[0]["model_b"]) == ("bloom-7b", "llama-7b")
    assert votes(items[1]) == {"annotator1": "tie", "annotator2": "A", "annotator3": "B"}
    as_words = as_json(
        tmp_path / "words.json", [{**base, "idx": 0, "response1": True, "response2": 7, "annotator1": 1}]
    )
    (item,) = read_human_labels("pandalm", as_words)
    assert (item["response_a"], item["response_b"]) == ("True", "7")  # the published file holds JSON's true
    with pytest.raises(InputError, match="there is no annotator1"):
        read_human_labels("pandalm", as_json(tmp_path / "x.json", [{**base, "idx": 0}]))
    with pytest.raises(InputError, match=r"Fetch data/testset-v1\.json"):
        read_human_labels("pandalm", None)


def fair_eval(folder: Path, labels: str = "CHATGPT\nVICUNA13B\nTIE\n") -> str:
    as_lines(folder / "question.jsonl", [{"question_id": n, "text": f"Q{n}", "category": "x"} for n in (1, 2, 3)])
    for name, order in (("vicuna-13b", (3, 1, 2)), ("gpt35", (1, 2, 3))):  # joined by id, not by line
        answers = [{"question_id": n, "text": f"{name} {n}", "answer_id": str(n)} for n in order]
        as_lines(folder / "answer" / f"answer_{name}.jsonl", answers)
    (folder / "review").mkdir()
    (folder / "review" / "review_gpt35_vicuna-13b_human.txt").write_text(labels)
    return str(folder)


def test_fair_eval_is_a_folder(tmp_path: Path) -> None:
    items = read_human_labels("fair_eval", fair_eval(tmp_path / "FairEval"))
    assert [(i["item_id"], i["response_a"], i["response_b"], i["human_label"]) for i in items] == [
        ("fair-eval/1", "vicuna-13b 1", "gpt35 1", "B"),
        ("fair-eval/2", "vicuna-13b 2", "gpt35 2", "A"),
        ("fair-eval/3", "vicuna-13b 3", "gpt35 3", "tie"),
    ]
    assert {(i["model_a"], i["model_b"]) for i in items} == {("vicuna-13b", "gpt-3.5-turbo")}
    with pytest.raises(InputError, match="has 2 labels for 3 questions"):
        read_human_labels("fair_eval", fair_eval(tmp_path / "short", "TIE\nTIE\n"))
    with pytest.raises(InputError, match="must be CHATGPT, VICUNA13B or TIE, not 'GPT4'"):
        read_human_labels("fair_eval", fair_eval(tmp_path / "other", "GPT4\nTIE\nTIE\n"))
    with pytest.raises(InputError, match="i-Eval/FairEval"):
        read_human_labels("fair_eval", None)


def judged(model_a: str, model_b: str, winner: str, judge: str, turn: int = 1, question: int = 81) -> dict[str, Any]:
    def talk(model: str) -> list[dict[str, str]]:
        turns = [(f"u{n}", f"{model} says {n}") for n in (1, 2)]
        return [m for u, a in turns for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})]

    return {
        "question_id": question, "model_a": model_a, "model_b": model_b, "winner": winner, "judge": judge,
        "conversation_a": talk(model_a), "conversation_b": talk(model_b), "turn": turn,
    }  # fmt: skip


def test_mt_bench_counts_a_pair_once_whoever_came_first(tmp_path: Path) -> None:
    rows = [
        judged("gpt-4", "alpaca", "model_a", "author_2"),
        judged("alpaca", "gpt-4", "model_b", "expert_1"),
        judged("gpt-4", "alpaca", "tie (inconsistent)", "expert_2"),
        judged("gpt-4", "alpaca", "model_b", "author_2", turn=2),
    ]
    path = tmp_path / "human.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    items = read_human_labels("mt_bench", str(path))
    assert [(i["item_id"], i["human_label"]) for i in items] == [
        ("mt-bench/81/turn-1/alpaca-vs-gpt-4", "B"), ("mt-bench/81/turn-2/alpaca-vs-gpt-4", "A"),
    ]  # fmt: skip
    assert votes(items[0]) == {"author_2": "B", "expert_1": "B", "expert_2": "tie"}
    assert (items[0]["question"], items[0]["response_a"], items[0]["response_b"]) == (
        "u1",
        "alpaca says 1",
        "gpt-4 says 1",
    )
    # Both turns of a question are resampled together; another question is not.
    assert question_id(items[0]) == question_id(items[1]) == items[0]["prompt_id"] != items[1]["prompt_id"]
    other = items[1] | {"question": items[1]["question"].replace("u1", "v1")}
    assert (
        question_id(other) != question_id(items[1]) and question_id({**other, "question": None}) == other["prompt_id"]
    )
    assert "u2" in items[1]["question"] and "[turn 2]\nalpaca says 2" in items[1]["response_a"]
    with pytest.raises(InputError, match="winner must be model_a, model_b or tie, not 'both'"):
        read_human_labels("mt_bench", as_json(tmp_path / "x.json", [judged("a", "b", "both", "j")]))
    for message in ("text", None, ["user", "u1"], {"role": ["user"], "content": "u1"}):
        broken = {**judged("a", "b", "tie", "j"), "conversation_a": [message]}
        with pytest.raises(InputError, match="row 1: conversation_a has a message that is not text of a user"):
            read_human_labels("mt_bench", as_json(tmp_path / "x.json", [broken]))
    with pytest.raises(InputError, match="fewer than 3 turns"):
        read_human_labels("mt_bench", as_json(tmp_path / "x.json", [judged("a", "b", "tie", "j", turn=3)]))


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(name: str, file: str, **options: Any) -> str:
        asked.append((name, file, options))
        return as_json(tmp_path / file, [annotation(1, 1)])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(read_human_labels("alpaca_eval", None, "c0ffee")) == 1
    assert asked == [
        (
            "tatsu-lab/alpaca_eval",
            "alpaca_farm_human_crossannotations.json",
            {"repo_type": "dataset", "revision": "c0ffee"},
        )
    ]

    def load(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, options))
        return [judged("a", "b", "tie", "j")]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_human_labels("mt_bench", None, "c0ffee")[0]["human_label"] == "tie"
    assert asked[-1] == ("lmsys/mt_bench_human_judgments", {"split": "human", "revision": "c0ffee"})

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match=r"lmsys/mt_bench_human_judgments cannot be loaded \(no network\)"):
        read_human_labels("mt_bench", None)


def test_the_data_block(tmp_path: Path) -> None:
    path = as_json(tmp_path / "cross.json", [annotation(1, 1, instruction=f"Say {n}.") for n in range(20)])
    whole = read_data(AgreementData(type="alpaca_eval", path=path))
    some = read_data(AgreementData(type="alpaca_eval", path=path, limit=5))
    more = read_data(AgreementData(type="alpaca_eval", path=path, limit=9))
    ids = [[i["item_id"] for i in found.items] for found in (some, more, whole)]
    assert [len(i) for i in ids] == [5, 9, 20] and ids[0] == ids[1][:5] == ids[2][:5]
    assert list(data_digests(AgreementData(type="alpaca_eval", path=path))) == ["cross.json"]
    assert data_digests(AgreementData(type="fair_eval", path=fair_eval(tmp_path / "fe")))
    with pytest.raises(InputError, match="do not publish it on the hub"):
        data_digests(AgreementData(type="pandalm"))
    assert set(human_labels.HUMAN_DATA) == {"alpaca_eval", "fair_eval", "pandalm", "mt_bench"}


def test_judges_do_not_see_the_thoughts_of_answers_unless_the_user_wants_it(tmp_path: Path) -> None:
    """K4.2"""
    texts = {"response_a": "<think>It is nine.</think>\nNine.", "response_b": "<think>It is"}
    path = tmp_path / "items.jsonl"
    as_lines(path, [{"item_id": "1", "question": "q", "human_label": "A", **texts}])
    (item,) = read_data(AgreementData(path=str(path))).items
    assert (item["response_a"], item["response_b"]) == ("Nine.", None)
    (item,) = read_data(AgreementData(path=str(path), thoughts="keep")).items
    assert {field: item[field] for field in texts} == texts
