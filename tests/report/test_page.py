"""report.html without a browser: what is in it, what is escaped, what is cut, and that equal runs give equal pages."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.bench.page import benchmarks_page
from ray_pipeline.data.distributions import length_histogram, score_histogram
from ray_pipeline.engines.base import Completion
from ray_pipeline.engines.log_rows import call_row
from ray_pipeline.engines.usage import Usage
from ray_pipeline.evaluate import examples as examples_data
from ray_pipeline.evaluate.calls_shown import _fits, _place, calls_about
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.examples import collect_examples
from ray_pipeline.evaluate.first_screen import first_screen
from ray_pipeline.evaluate.headline import headline
from ray_pipeline.evaluate.metrics import collect_metrics
from ray_pipeline.evaluate.run_page import run_page
from ray_pipeline.report import charts
from ray_pipeline.report.charts import Bins
from ray_pipeline.report.html import render_html, script_json
from ray_pipeline.report.page import Funnel, Packed
from ray_pipeline.stats.kappa import kappa_intervals, pairwise_kappas
from ray_pipeline.store.calls import CallWriter, model_folder
from ray_pipeline.store.files import Folder
from tests.evaluate.example_run import JUDGES, whole_run

NASTY = (
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "\x1b[31mred\x1b[0m",
    "\u202eright to left\u202c",
    "{{ 7 * 7 }} ${1+1} `x` &amp; \" ' \\u003c",
    "line\n\ttab\r\nline",
    "long " * 200_000,
)


def nasty_run() -> ReportData:
    """Hostile texts as prompts, answers, reasons, names of judges and the name of the run; the first answers are the
    texts of NASTY in their order."""
    data = whole_run(40)
    assert data.prompts and data.candidates and data.verdicts and data.critiques and data.decisions
    count = len(data.candidates)
    texts = [NASTY[i % len(NASTY)] if i < 16 else NASTY[i % 7] for i in range(count)]
    ids = data.candidates.column("candidate_id")
    prompts = [[{"role": "user", "content": NASTY[i % 7]}] for i in range(len(data.prompts))]
    judges = [f"{NASTY[0]} {name}" for name in data.verdicts.column("judge").to_pylist()]
    reasons = pa.array([NASTY[i % 7] for i in range(len(data.verdicts))])
    verdicts = data.verdicts.set_column(1, "judge", pa.array(judges)).append_column("reason", reasons)
    return whole_run(
        40,
        run=type(data.run)(NASTY[1], models={NASTY[0]: NASTY[1]}),
        prompts=data.prompts.set_column(1, "messages", pa.array(prompts)),
        candidates=data.candidates.set_column(2, "response", pa.array(texts)),
        verdicts=verdicts,
        critiques=data.critiques.append_column("candidate_id", ids).append_column("reason", pa.array(texts)),
        decisions=data.decisions.set_column(4, "why", pa.array([NASTY[i % 7] for i in range(count)])),
    )


def page(data: ReportData) -> str:
    metrics = collect_metrics(data)
    warnings = ["Mind <b>this</b>."]
    return render_html(run_page(data, metrics, headline(metrics.evaluation, data.missing_stages()), warnings))


def unpacked(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def rows_of(examples: Packed) -> list[tuple[str, str]]:
    """(prompt, answer) of every row."""
    found = []
    for chunk in map(unpacked, examples.chunks):
        found += [(chunk["p"][row[0]], row[1]) for row in chunk["r"]]
    return found


def test_every_part_of_a_run_is_on_its_page() -> None:
    html = page(whole_run(config={"gate": {"tau": 2.5}}))
    for section in ("funnel", "labels", "judges", "critic", "training", "evaluation", "use", "examples", "identity"):
        assert f'<section id="{section}"' in html, section
    for text in ("Agreement of the judges", "Final score by label", "Pairwise, both orders", "tau: 2.5", "KTO rows"):
        assert text in html, text
    assert html.count("<svg") >= 12 and "None" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
    # One file: nothing is loaded from elsewhere, and the policy forbids it.
    assert not re.search(r"(src|href)=\"(?!#|data:,)", html) and "default-src 'none'" in unescape(html)
    assert "@import" not in html and "url(" not in html


def test_the_first_screen_answers_what_a_reader_asks() -> None:
    data = whole_run()
    metrics = collect_metrics(data)
    about = dict(run_page(data, metrics, headline(metrics.evaluation, []), []).about)
    kept = sum(label in ("desirable", "undesirable") for label in data.decisions.column("label").to_pylist())  # type: ignore[union-attr]
    assert about == {
        "What": "workflow dmapo, training with kto",
        "Models": "judge: pocket/judge@1, policy: pocket/policy@1",
        "Judges": "of the data: helpfulness, factuality, conciseness (pocket/judge@1); of the policy: pairwise "
        "(pocket/judge@1)",
        "How many": f"60 prompts, 240 candidates, 720 verdicts, {kept} candidates kept, 126 KTO rows, 33 DPO pairs",
        "How long": "53 s, summed over stages",
        "How much": "940 LLM calls made and 20 from the call log, 114,000 tokens",
    }
    html = page(data)
    assert html.index("How much") < html.index("<nav") < html.index('<section id="funnel"')
    assert dict(run_page(ReportData(data.run), collect_metrics(ReportData(data.run)), headline(None, []), []).about)


def test_a_first_screen_leaves_out_what_is_not_known() -> None:
    answers = first_screen(
        "x",
        models={"a": "b", "c": "c", "d": ""},
        judges={"": {"j": "m", "k": "m", "z": "z"}, "of the policy": "one, two", "of nothing": {}},
        amounts=[(1, "p"), (None, "q"), (12_345, "r")],
        usage=Usage(cut_prompts=2),
    )
    assert answers == [
        ("What", "x"), ("Models", "a: b, c, d"), ("Judges", "j, k (m), z; of the policy: one, two"),
        ("How many", "1 p, 12,345 r"),
        ("Cut prompts", "the server read only a part of the prompt in 2 calls"),
    ]  # fmt: skip


def test_no_bars_of_the_funnel_count_different_things() -> None:
    data = whole_run()
    section = run_page(data, collect_metrics(data), headline(None, []), []).sections[0]
    funnels = [block for block in section.blocks if isinstance(block, Funnel)]
    assert [funnel.unit for funnel in funnels] == ["prompts", "candidates", "KTO rows", "DPO pairs"]
    for funnel in funnels:
        assert max(step.share for step in funnel.steps) == 1.0
    assert [(step.note, step.figure) for step in funnels[2].steps] == [("for training", "120"), ("for validation", "6")]
    assert all("labelled" not in step.name for step in funnels[0].steps)


def test_equal_runs_give_equal_pages_of_any_part() -> None:
    assert page(whole_run()) == page(whole_run())
    bare = page(ReportData(whole_run().run))
    assert "<section" in bare and "<script" not in bare and "not known" in bare


def test_no_text_of_a_model_becomes_markup() -> None:
    html = page(nasty_run())
    scripts = re.findall(r"<script[^>]*>", html)
    chunks = sum('class="chunk"' in tag for tag in scripts)
    assert len(scripts) == 3 + chunks and "<img" not in html and "\x1b" not in html and "\u202e" not in html
    assert "Mind &lt;b&gt;this&lt;/b&gt;." in html
    about = re.search(r'id="about">(.*?)</script>', html, re.S)
    assert about and "<" not in about[1] and json.loads(about[1])["judges"][0].startswith("<script>")
    assert json.loads(script_json({"a": "</script>&<!--"})) == {"a": "</script>&<!--"}


def test_texts_arrive_whole_or_cut_with_a_note() -> None:
    data = nasty_run()
    examples = collect_examples(data)
    assert examples is not None and examples.rows == 160 and "answers are cut at 20,000 characters" in examples.scope
    answers = [answer for _, answer in rows_of(examples)]
    shown = {0: NASTY[0], 1: NASTY[1], 2: NASTY[2], 3: "\\x1b[31mred\\x1b[0m", 4: "\\u202eright to left\\u202c"}
    for place, text in shown.items():
        assert answers[place] == text
    assert answers[6] == "line\n\ttab\nline"
    assert len(answers[7]) < 20_100 and answers[7].endswith("… [980,000 more characters]")
    index = unpacked(examples.index)
    assert index["chars"][7] == 1_000_000 and len(index["scores"]) == 3 and len(index["id"]) == 160
    assert max(map(len, index["snippets"])) <= examples_data.SNIPPET


def test_kept_rows_are_all_there_and_others_a_seeded_sample() -> None:
    data = whole_run(400)
    assert data.decisions is not None
    labels = dict(zip(*(data.decisions.column(c).to_pylist() for c in ("candidate_id", "label")), strict=True))
    kept = {name for name, label in labels.items() if label in ("desirable", "undesirable")}
    examples = collect_examples(data, others=300)
    assert examples is not None
    index = unpacked(examples.index)
    assert kept < set(index["id"]) and len(index["id"]) == len(kept) + 300
    assert f"All {len(kept):,} kept candidates and 300 of {len(labels) - len(kept):,} others" in examples.scope
    assert collect_examples(data, others=300) == examples
    more = collect_examples(data, others=400)
    assert more is not None and set(index["id"]) < set(unpacked(more.index)["id"])
    # Every row stands with its own prompt, answer, label and scores.
    assert data.candidates is not None and data.verdicts is not None
    columns = ("candidate_id", "prompt_id", "response")
    answers = {r["candidate_id"]: r for r in data.candidates.select(columns).to_pylist()}
    scores = {(r["candidate_id"], r["judge"]): r["score"] for r in data.verdicts.to_pylist()}
    for place, (name, (prompt, answer)) in enumerate(zip(index["id"], rows_of(examples), strict=True)):
        assert prompt == f"say {answers[name]['prompt_id']}" and answer == answers[name]["response"]
        assert examples.about["labels"][index["label"][place]] == labels[name]
        for judge, column in zip(examples.about["judges"], index["scores"], strict=True):
            assert column[place] == scores[name, judge]


def logged(
    folder: Path, data: ReportData, template: str = "task {prompt} answer {response} rate it", note: str = ""
) -> Folder:
    """A call log of a judge's and the generator's calls about every candidate of a run; the first is asked again."""
    assert data.candidates is not None and data.prompts is not None
    prompts = {row["prompt_id"]: row["messages"] for row in data.prompts.to_pylist()}
    rows = []
    for place, row in enumerate(data.candidates.to_pylist()):
        asked = template.format(prompt=prompts[row["prompt_id"]][0]["content"], response=row["response"])
        own = {"prompt_id": row["prompt_id"]}
        call = partial(call_row, prompt_id="0", identity={"m": 1}, sampling={})
        for again in range(2 if place == 0 else 1):
            reply = Completion(
                f"<think>hm</think><b>{place}</b> {again}{note}", "stop", 1, 1, 0, reasoning="x" if again else None
            )
            sent = [{"role": "user", "content": asked}]
            rows.append(
                call(f"j{note}{place}-{again}", role="judge/helpfulness", messages=sent, completion=reply) | own
            )
        drawn = Completion(f"<think>t</think>{row['response']}", "stop", 1, 1, 0)
        rows.append(call(f"g{place}", role="candidate", messages=prompts[row["prompt_id"]], completion=drawn) | own)
    root = Folder(str(folder))
    CallWriter(model_folder(root, {"m": 1}), 0, 1).flush(rows)
    return root


def calls_of(examples: Packed) -> list[list[tuple[str, list[str], list[Any]]]]:
    """Role, contents of the messages and replies of the calls of every row."""
    found = []
    for chunk in map(unpacked, examples.chunks):
        for row in chunk["r"]:
            known = {-1: chunk["p"][row[0]], -2: row[1]}
            told = [
                (
                    role,
                    ["".join(known[n] if n < 0 else chunk["t"][n] for n in places) for _, places in messages],
                    replies,
                )
                for role, messages, replies in row[8]
            ]
            found.append(told)
    return found


def test_a_candidate_has_the_calls_about_it(tmp_path: Path) -> None:
    data = nasty_run()
    log = logged(tmp_path, data)
    examples = collect_examples(replace(data, calls=log.location))
    assert examples is not None and "160 of them have the calls about them" in examples.scope
    answers, calls = rows_of(examples), calls_of(examples)
    assert data.candidates is not None
    for place, ((prompt, answer), told) in enumerate(zip(answers, calls, strict=True)):
        asked = {role: messages for role, messages, _ in told}
        cut = answer.endswith("characters]")
        assert cut or asked["judge/helpfulness"] == [f"task {prompt} answer {answer} rate it"]
        assert asked["candidate"] == [prompt]
        replies = next(replies for role, _, replies in told if role == "judge/helpfulness")
        assert any(text == f"<think>hm</think><b>{place}</b> 0" for text, _, _ in replies)
    again = next(replies for role, _, replies in calls[0] if role == "judge/helpfulness")
    assert again == [["<think>hm</think><b>0</b> 0", "stop", None], ["<think>hm</think><b>0</b> 1", "stop", "x"]]
    assert "\x1b" not in json.dumps(calls, ensure_ascii=False)
    # Texts that the row has anyway are not repeated: the calls of 400 rows are a fraction of their answers.
    long = whole_run(100, candidates=_long(whole_run(100).candidates))
    size = sum(map(len, collect_examples(long).chunks))  # type: ignore[union-attr]
    with_calls = collect_examples(replace(long, calls=logged(tmp_path / "long", long).location))
    assert with_calls is not None and sum(map(len, with_calls.chunks)) < 1.1 * size


def test_calls_of_an_earlier_rubric_are_left_out(tmp_path: Path) -> None:
    data = whole_run(10)
    logged(tmp_path, data, note=" old")
    root = logged(tmp_path, data, "{prompt} with another rubric {response}", " new")
    assert data.candidates is not None
    rows = [row for row in data.candidates.to_pylist() if len(row["response"]) > 60]
    row = max(rows, key=lambda row: len(row["response"]))
    responses = {row["prompt_id"]: {row["candidate_id"]: row["response"]}}
    key, place = (row["candidate_id"], "judge/helpfulness"), int(row["candidate_id"][1:])

    def asked(raw: dict[tuple[str, str], str]) -> list[str]:
        calls = calls_about(root, responses, {row["candidate_id"]}, raw).of[row["candidate_id"]]
        return sorted(call.messages[0][1].split(" ")[0] for call in calls if call.role == "judge/helpfulness")

    assert asked({key: f"<b>{place}</b> 0 new"}) == ["say"] and asked({key: f"<b>{place}</b> 0 old"}) == ["task"]
    assert asked({}) == asked({key: "of no call"}) == ["say", "task"]


def test_a_call_log_that_is_gone_is_one_line(tmp_path: Path) -> None:
    data, there = whole_run(10), logged(tmp_path / "log", whole_run(20))
    gone = collect_examples(replace(data, calls=str(tmp_path / "gone")))
    assert gone is not None and "The call log is gone, so the messages" in gone.scope and calls_of(gone)[0] == []
    others = replace(data, prompts=None, candidates=data.candidates.set_column(1, "prompt_id", pa.array(["z"] * 40)))  # type: ignore[union-attr]
    none = collect_examples(replace(others, calls=there.location))
    assert none is not None and "has no calls of these candidates" in none.scope
    assert calls_about(there, {"p000": {"c0000": "x"}}, {"c0000"}, most_rows=0).missing.startswith(
        "The call log has no"
    )
    assert collect_examples(data).scope in gone.scope  # type: ignore[union-attr]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_call_is_about_the_response_that_it_shows(data: st.DataObject) -> None:
    """Short responses that occur in each other, in the prompt and in the rubric."""
    text = st.text("ab 1", max_size=6)
    responses = data.draw(st.lists(text.filter(bool), min_size=2, max_size=4, unique=True))
    before, after = data.draw(text), data.draw(text)
    sent = {f"{before}{response}{after}": [{"n": n}] for n, response in enumerate(responses)}
    place = _place(sent, dict(enumerate(responses)))  # type: ignore[arg-type]
    assert place is not None
    for shown in sent:
        named = [response for response in responses if _fits(shown, response, *place)]
        assert len(named) == 1, place
    if not set(before + after) & set("".join(responses)):
        assert place == (len(before), len(after))


def test_a_small_budget_cuts_texts_first_and_rows_last() -> None:
    data = whole_run(100, candidates=_long(whole_run(100).candidates))
    whole = collect_examples(data)
    assert whole is not None and "are cut" not in whole.scope and whole.rows == 400
    size = sum(map(len, whole.chunks))
    cut = collect_examples(data, budget=size // 3)
    assert cut is not None and cut.rows == 400 and "answers are cut at" in cut.scope
    assert sum(map(len, cut.chunks)) <= size // 3
    fewer = collect_examples(data, budget=8_000)
    assert fewer is not None and 0 < fewer.rows < 400 and "would make this page too large" in fewer.scope
    assert sum(map(len, fewer.chunks)) <= 8_000


def _long(candidates: pa.Table | None) -> pa.Table:
    assert candidates is not None
    rng = np.random.default_rng(0)
    texts = [rng.bytes(1500).hex() for _ in range(len(candidates))]
    return candidates.set_column(2, "response", pa.array(texts))


def test_kappa_intervals_hold_kappa_and_follow_prompts() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat([f"p{i}" for i in range(150)], 4)
    true = rng.uniform(1, 10, 600)
    scores = {name: np.clip(np.round(true + rng.normal(0, 2, 600)), 1, 10) for name in "abc"}
    scores["b"][::7] = np.nan
    intervals = kappa_intervals(scores, prompts, draws=400)
    for found, kappa in zip(intervals, pairwise_kappas(scores), strict=True):
        assert (found.judge_a, found.judge_b) == (kappa.judge_a, kappa.judge_b) and found.prompts == 150
        assert found.low is not None and found.high is not None and kappa.value is not None
        assert found.low < kappa.value < found.high and 0.02 < found.high - found.low < 0.3
    order = rng.permutation(600)
    assert kappa_intervals({k: v[order] for k, v in scores.items()}, prompts[order], draws=400) == intervals
    # Four equal rows a prompt say no more than one: the interval is as wide as that of the 150 rows.
    one = {name: values[::4] for name, values in scores.items() if name != "b"}
    again = {name: np.repeat(values, 4) for name, values in one.items()}
    assert kappa_intervals(again, prompts, draws=400) == kappa_intervals(one, prompts[::4], draws=400)


def test_kappa_intervals_where_there_are_none() -> None:
    same = {"a": np.full(8, 8.0), "b": np.full(8, 9.0)}
    (none,) = kappa_intervals(same, np.array([f"p{i}" for i in range(8)]), draws=100)
    assert none.low is None and none.high is None
    (single,) = kappa_intervals({"a": np.array([1.0, 8]), "b": np.array([1.0, 8])}, np.array(["p", "p"]), draws=100)
    assert single.low is None and single.prompts == 1


def test_histograms_count_every_row_once() -> None:
    data = whole_run(200)
    assert data.decisions is not None and data.candidates is not None
    labels = data.decisions.column("label").to_pylist()
    scores = score_histogram(data.decisions)
    assert scores is not None and sum(scores.counts["desirable"]) == labels.count("desirable")
    assert "incomplete" not in scores.counts  # it has no final score
    shuffled = data.candidates.take(pa.array(np.random.default_rng(0).permutation(len(data.candidates))))
    for measure in ("tokens", "characters"):
        lengths = length_histogram(data.decisions, shuffled, measure)
        assert lengths is not None and {k: sum(v) for k, v in lengths.counts.items()} == {
            label: labels.count(label) for label in lengths.counts
        }
        assert lengths == length_histogram(data.decisions, data.candidates, measure)


@pytest.mark.parametrize(("low", "high", "most"), [(0, 1, 4), (-0.3, 7.2, 5), (1, 10, 9), (0, 12345, 4), (3, 3, 5)])
def test_ticks_are_round_and_within(low: float, high: float, most: int) -> None:
    ticks = charts._ticks(low, high, most)
    assert 1 <= len(ticks) <= most + 1 and low <= min(ticks) and max(ticks) <= high + 1e-9


def test_charts_without_numbers_are_none() -> None:
    assert charts.histogram("t", [Bins("a", "blue", [0, 1], [0])], "x") is None
    assert charts.lines("t", [], "x") is None and charts.dots("t", [], (0, 1)) is None
    drawn = charts.histogram("<b>", [Bins("a", "blue", [0, 1, 2], [3, 1])], "<x>")
    assert drawn is not None and "<b>" not in drawn.svg and "&lt;x&gt;" in drawn.svg


SCORES = [
    {
        "model": model, "benchmark": "mt_bench", "metric": "turn 1", "name": "MT-Bench-style, judge <b>x</b>",
        "value": value, "low": 6.0, "high": 8.0, "unit": "1–10", "rows": 80, "unread": 2, "worst": 5.9, "best": 8.1,
        "protocol": "ab12", "note": "",
    }
    for model, value in (("base", 7.0), ("policy", None))
]  # fmt: skip

BENCHMARKS: dict[str, Any] = {
    "name": "bench", "models": ["base", "policy"], "scores": SCORES, "warnings": ["Careful."], "facts": {"seed": 0},
    "readings": [{"model": "base", "benchmark": "mt_bench", "statuses": {"ok": 78, "unparsed": 2}}],
    "protocols": {"ab12": {"judge": "x", "reference": None}}, "mt_bench_categories": [], "ifeval_types": [],
}  # fmt: skip


def test_benchmarks_have_a_page_and_a_section() -> None:
    html = render_html(benchmarks_page(BENCHMARKS, [("How many", "<b>2</b> models")]))
    assert "&lt;b&gt;2&lt;/b&gt; models" in html and "Highest" not in html  # one model has a score
    assert "<b>" not in html and "judge &lt;b&gt;x&lt;/b&gt;" in html and "ok 78, unparsed 2" in html
    assert "6.00 to 8.00" in html and "5.90 to 8.10" in html and html.count("<figure>") == 1
    assert '<section id="benchmarks"' in page(whole_run(benchmarks=SCORES))
    assert '<section id="benchmarks"' not in page(whole_run())


def test_judges_are_in_the_page_in_the_order_of_their_names() -> None:
    assert [j for j in sorted(JUDGES)] == collect_examples(whole_run()).about["judges"]  # type: ignore[union-attr]
