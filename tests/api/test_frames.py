"""The public functions on pandas DataFrames and Arrow tables, with engines that answer from a script."""

import asyncio
import json
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

import ray_pipeline as quorum
from ray_pipeline.api.frames import ColumnError, rows_of_prompts
from ray_pipeline.data.rows import KeyMismatch
from tests.scripted import ScriptedEngine, failing

ANSWERS = {"good": 9, "bad": 2, "fair": 5}


def reply(messages: Any, sampling: Any) -> str:
    """A judge, a critic and a comparer: what is good is good, and flawed is what is bad."""
    text = messages[-1]["content"]
    properties = json.loads(sampling.grammar.value)["properties"]
    if "score" in properties:
        return json.dumps({"reason": "so", "score": next(score for word, score in ANSWERS.items() if word in text)})
    if "flawed" in properties:
        bad = "bad" in text
        return json.dumps({"reason": "so", "flawed": bad, "failure_type": "contradictory" if bad else "none"})
    return json.dumps({"reason": "so", "choice": "A" if text.index("good") < text.index("bad") else "B"})


def frame(**more: Any) -> pd.DataFrame:
    values = {"prompt": ["p", "p", "q"], "response": ["good", "bad", "fair"], **more}
    return pd.DataFrame(values, index=[10, 20, 30])


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(reply)


def test_judge_critique_gate_and_rows_of_a_dataframe(engine):
    verdicts = quorum.judge(frame(), engine)
    critiques = quorum.critique(frame(), engine)
    decisions = quorum.gate(frame(), verdicts, critiques)
    assert verdicts["judge"].tolist() == ["helpfulness", "factuality", "conciseness"] * 3
    assert verdicts["score"].tolist() == [9.0] * 3 + [2.0] * 3 + [5.0] * 3
    assert critiques.index.tolist() == decisions.index.tolist() == [10, 20, 30]
    assert critiques["flawed"].tolist() == [False, True, False]
    joined = frame().join(decisions[["label", "final_score"]])
    assert joined["label"].tolist() == ["desirable", "undesirable", "discard"]
    assert joined["final_score"].tolist() == pytest.approx([9.0, 1.7, 5.0])

    kto = quorum.to_kto(frame(split=["train", "train", "val"]), verdicts, decisions)
    assert kto["label"].tolist() == [True, False] and kto["split"].tolist() == ["train", "train"]
    assert kto["prompt"][0][0] == {"role": "user", "content": "p"}
    assert [s["score"] for s in kto["scores"][0]] == [9.0] * 3
    dpo = quorum.to_dpo(frame(), verdicts, decisions)
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for _, r in dpo.iterrows()] == [("good", "bad")]
    assert dpo["score_gap"].tolist() == pytest.approx([7.3])
    assert quorum.to_dpo(frame(), verdicts, decisions, min_gap=8).empty


def test_arrow_tables_come_back_as_arrow_tables_of_the_same_rows(engine):
    table = pa.Table.from_pandas(frame(), preserve_index=False)
    verdicts, critiques = quorum.judge(table, engine), quorum.critique(table, engine)
    decisions = quorum.gate(table, verdicts, critiques)
    assert all(isinstance(t, pa.Table) for t in (verdicts, critiques, decisions))
    as_pandas = quorum.gate(frame(), verdicts.to_pandas(), critiques.to_pandas())
    assert decisions.to_pandas().equals(as_pandas.reset_index(drop=True))
    kto = quorum.to_kto(table, verdicts, decisions)
    assert isinstance(kto, pa.Table) and kto["label"].to_pylist() == [True, False]


def test_rubrics_by_name_by_text_and_by_key(engine):
    for rubrics in ({"safety": "Is it safe?"}, ["safety"], [{"name": "safety", "low": 0, "high": 9}]):
        assert set(quorum.judge(frame(), engine, rubrics)["judge"]) == {"safety"}
    quorum.judge(frame(), engine, ["helpfulness"])
    assert "Does the response do what the instruction asks" in str(engine.asked[-1][0])
    with pytest.raises(ValueError, match="rubrics with the same name"):
        quorum.judge(frame(), engine, ["safety", "safety"])
    with pytest.raises(ValueError, match="must be a non-empty list"):
        quorum.judge(frame(), engine, [])


def test_rows_of_ones_own_ids_and_messages_are_kept(engine):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    own = pd.DataFrame({"messages": [chat], "response": ["good"], "candidate_id": ["mine"], "prompt_id": ["theirs"]})
    verdicts = quorum.judge(own, engine, ["safety"])
    assert verdicts[["candidate_id", "prompt_id"]].values.tolist() == [["mine", "theirs"]]
    assert "[system]" in engine.asked[0][0][-1]["content"]


def test_repeated_rows_are_rows_of_their_own(engine):
    twice = pd.DataFrame({"prompt": ["p", "p"], "response": ["good", "good"]})
    verdicts, critiques = quorum.judge(twice, engine), quorum.critique(twice, engine)
    assert len(set(verdicts["candidate_id"])) == 2
    assert quorum.gate(twice, verdicts, critiques)["label"].tolist() == ["desirable"] * 2


def test_what_cannot_be_read_or_answered_has_a_status(engine):
    broken = ScriptedEngine(failing())
    verdicts = quorum.judge(frame(), broken, ["safety"])
    assert verdicts["parse_status"].tolist() == ["error"] * 3 and verdicts["score"].isna().all()
    decisions = quorum.gate(frame(), verdicts, quorum.critique(frame(), engine))
    assert decisions["label"].tolist() == ["incomplete"] * 3
    missing = quorum.judge(frame(response=["good", None, "bad"]), engine, ["safety"])
    assert missing["parse_status"].tolist() == ["ok", "error", "ok"]


@pytest.mark.parametrize("ids", [{}, {"candidate_id": ["1", "2", "3"], "prompt_id": ["p", "p", "q"]}])
def test_a_text_that_was_cut_off_is_never_desirable_unless_the_caller_wants_it(engine, ids):
    """K4.1"""
    cut = frame(finish_reason=["length", "stop", None], **ids)
    for rows in (cut, pa.Table.from_pandas(cut, preserve_index=False)):
        verdicts, critiques = quorum.judge(rows, engine), quorum.critique(rows, engine)
        assert list(quorum.gate(rows, verdicts, critiques)["label"])[:2] == as_type(rows, ["incomplete", "undesirable"])
        kept = quorum.gate(rows, verdicts, critiques, cut="keep")
        assert list(kept["label"])[:2] == as_type(rows, ["desirable", "undesirable"])
    unknown = quorum.gate(frame(finish_reason=None, **ids), verdicts, critiques)
    assert unknown["label"].tolist() == ["desirable", "undesirable", "discard"]


def as_type(rows: Any, labels: list[str]) -> list[Any]:
    return [pa.scalar(label) for label in labels] if isinstance(rows, pa.Table) else labels


def test_thoughts_are_neither_judged_nor_in_rows_unless_the_caller_wants_them(engine):
    """K4.2"""
    thought = frame(response=["<think>bad?</think>\ngood", "bad", "<think>good"])
    verdicts, critiques = quorum.judge(thought, engine), quorum.critique(thought, engine)
    assert not any("think" in call[0][-1]["content"] for call in engine.asked)
    assert verdicts["score"].tolist()[:6] == [9.0] * 3 + [2.0] * 3
    assert verdicts["parse_status"].tolist()[6:] == ["error"] * 3  # the third response ends within its thoughts
    decisions = quorum.gate(thought, verdicts, critiques)
    assert decisions["label"].tolist() == ["desirable", "undesirable", "incomplete"]
    asked = (thought, verdicts, decisions)
    assert [row[0]["content"] for row in quorum.to_kto(*asked)["completion"]] == ["good", "bad"]
    assert quorum.to_dpo(*asked)["chosen"][0][0]["content"] == "good"
    kept = quorum.to_kto(*asked, thoughts="keep")["completion"][0][0]["content"]
    assert kept == thought["response"].iloc[0]
    quorum.judge(thought, engine, ["safety"], thoughts="keep")
    assert "<think>bad?</think>\ngood" in engine.asked[-3][0][-1]["content"]
    pairs = PAIRS.assign(response_a="<think>bad or good?</think>" + PAIRS["response_a"])
    assert quorum.compare(pairs, engine)["vote"].tolist() == ["A", "B"]
    with pytest.raises(ValueError, match="row 1: response_b is null, or ends within its thoughts; drop the row"):
        quorum.compare(PAIRS.assign(response_b=["bad", "<think>so"]), engine)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: quorum.judge(frame().rename(columns={"prompt": "promt"}), e),
         "frame has no column 'prompt'; it has promt, response; did you mean 'promt'"),
        (lambda e: quorum.critique(frame()[["prompt"]], e), "frame has no column 'response'; it has prompt"),
        (lambda e: quorum.compare(frame(), e), "frame has no column 'response_a'; it has prompt, response"),
        (lambda e: quorum.gate(frame(), frame(), use_critic=False), "verdicts has no column 'candidate_id'"),
        (lambda e: quorum.to_kto(frame(), quorum.judge(frame(), e), frame()), "decisions has no column 'candidate_id'"),
        (lambda e: quorum.jury({"one": frame()}), "judgements of one has no column 'pair_id'"),
        (lambda e: quorum.feedback_loop(frame()[["response"]], e), "frame has no column 'prompt'; it has response"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_with_those_that_are_there(engine, call, message):
    with pytest.raises((ColumnError, ValueError), match=message):
        call(engine)


def test_other_mistakes(engine):
    verdicts = quorum.judge(frame(), engine)
    with pytest.raises(TypeError, match="frame must be a pandas DataFrame or a pyarrow Table, not list"):
        quorum.judge([{"prompt": "p"}], engine)
    with pytest.raises(ValueError, match="critiques are missing"):
        quorum.gate(frame(), verdicts)
    with pytest.raises(ValueError, match="tua"):
        quorum.gate(frame(), verdicts, use_critic=False, tua=1)
    with pytest.raises(KeyMismatch):
        quorum.gate(frame()[:1], verdicts, use_critic=False)
    with pytest.raises(ValueError, match="max_length is in tokens; pass the policy's tokenizer"):
        quorum.to_kto(frame(), verdicts, quorum.gate(frame(), verdicts, use_critic=False), max_length=10)
    with pytest.raises(ValueError, match="row 1: invalid prompt None; use text or a list of messages"):
        quorum.judge(pd.DataFrame({"prompt": ["p", None], "response": ["good", "good"]}), engine)


def test_a_tokenizer_sets_limits(engine, tokenizer):
    long = frame(prompt=["p" * 40, "p" * 40, "q"], response=["good", "bad", "good"])
    verdicts = quorum.judge(long, engine)
    decisions = quorum.gate(long, verdicts, quorum.critique(long, engine))
    kto = quorum.to_kto(long, verdicts, decisions, tokenizer=tokenizer, max_prompt_length=20, max_length=60)
    assert kto["prompt"].map(lambda messages: messages[0]["content"]).tolist() == ["q"]


PAIRS = pd.DataFrame({"prompt": ["p", "q"], "response_a": ["good", "bad"], "response_b": ["bad", "good"]})


def test_compare_in_both_orders(engine):
    found = quorum.compare(PAIRS, engine)
    assert found["vote"].tolist() == ["A", "B"] and not found["flipped"].any()
    first = quorum.compare(PAIRS, ScriptedEngine('{"reason": "", "choice": "A"}'))
    assert first["vote"].tolist() == ["tie", "tie"] and first["flipped"].all()


def test_scores_and_juries():
    by_score = ScriptedEngine(lambda m, s: json.dumps({"reason": "", "score_a": 3, "score_b": 8}))
    combined = quorum.compare(PAIRS, by_score, {"kind": "combined", "high": 10})
    assert combined["score_a"].tolist() == [3.0, 3.0] and combined["vote"].tolist() == ["B", "B"]
    direct = quorum.compare(PAIRS, ScriptedEngine(reply))
    pooled = quorum.jury({"one": combined, "two": direct, "three": direct})
    assert pooled["vote"].tolist() == ["A", "B"] and pooled["pair_id"].tolist() == direct["pair_id"].tolist()
    assert quorum.jury({"one": combined, "two": combined}, "mean")["score_b"].tolist() == [8.0, 8.0]
    weighted = quorum.jury({"one": combined, "two": direct}, "weighted", {"one": 2.0, "two": 1.0})
    assert weighted["vote"].tolist() == ["B", "B"]
    with pytest.raises(ValueError, match="pool weighted needs weights; set one for each of one"):
        quorum.jury({"one": combined}, "weighted")
    with pytest.raises(ValueError, match="at least one judge"):
        quorum.jury({})


def test_a_strategy_of_a_users_file():
    judge = ScriptedEngine(lambda m, s: json.dumps({"reason": "", "score_a": 3, "score_b": 8}))
    found = quorum.compare(PAIRS, judge, {"kind": "examples/my_judge.py", "orders": "both", "low": 1})
    assert found["vote"].tolist() == ["tie", "tie"] and found["flipped"].all()
    asked = judge.asked[0][0][0]["content"]
    assert "Answer A:\ngood" in asked and "from 1 (meets" in asked
    with pytest.raises(ValueError, match="unknown strategy 'combine'; did you mean 'combined'"):
        quorum.compare(PAIRS, judge, "combine")


def test_debate():
    def speak(messages: Any, sampling: Any) -> str:
        return "I prefer A." if sampling.grammar is None else json.dumps({"reason": "", "score_a": 8, "score_b": 4})

    found = quorum.debate(PAIRS[:1], ScriptedEngine(speak), settings={"rounds": 1})
    assert found["vote"].tolist() == ["A"] and len(found["speeches"][0]) == 3
    assert found["speeches"][0][0]["text"] == "I prefer A."


def test_feedback_loop_gives_candidates():
    def answer(messages: Any, sampling: Any) -> str:
        if sampling.grammar is None:
            return "good" if len(messages) > 1 else "bad"
        better = "good" in messages[-1]["content"]
        return json.dumps({"reason": "", "feedback": "" if better else "improve it"})

    looped = quorum.feedback_loop(pd.DataFrame({"prompt": ["p", "q"]}), ScriptedEngine(answer))
    assert looped["response"].tolist() == ["bad", "good"] * 2 and looped["k"].tolist() == [0, 1] * 2
    assert looped["stop"].fillna("goes on").tolist() == ["goes on", "empty"] * 2
    assert looped["reviews"][0][0]["feedback"] == "improve it"
    judge = ScriptedEngine(reply)
    verdicts, critiques = quorum.judge(looped, judge), quorum.critique(looped, judge)
    decisions = quorum.gate(looped, verdicts, critiques)
    assert decisions["label"].tolist() == ["undesirable", "desirable"] * 2
    assert len(quorum.to_dpo(looped, verdicts, decisions)) == 2


def test_functions_work_where_a_loop_is_running(engine):
    async def cell() -> pd.DataFrame:
        return quorum.judge(frame(), engine)  # as a notebook's cell does it

    assert len(asyncio.run(cell())) == 9


def test_calls_run_together_up_to_the_limit():
    slow = ScriptedEngine(reply, delay=0.01)
    many = pd.DataFrame({"prompt": [str(i) for i in range(40)], "response": ["good"] * 40})
    quorum.judge(many, slow, ["safety"], concurrency=8)
    assert slow.most_in_flight == 8


def test_an_engine_must_not_call_the_functions_itself():
    inner = ScriptedEngine(lambda m, s: str(quorum.judge(frame(), ScriptedEngine(reply))))
    with pytest.raises(RuntimeError, match=r"must not call ray_pipeline's functions"):
        quorum.judge(frame(), inner)


@pytest.mark.parametrize(
    "prompt",
    [
        [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}, {"from": "human", "value": "and  three"}],
        "one<extra_id_1>Assistant\ntwo<extra_id_1>User\nand  three",
    ],
)
def test_prompts_are_read_as_a_source_reads_them(prompt):
    (row,) = rows_of_prompts(pd.DataFrame({"prompt": [prompt]}), [], "frame")
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("user", "one"), ("assistant", "two"), ("user", "and  three")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="frame, row 0: message 0 has role 'cook', not one of system"):
        rows_of_prompts(pd.DataFrame({"prompt": [[{"role": "cook", "content": "x"}]]}), [], "frame")
