"""AlpacaEval 2: the leaderboard's numbers from the published preferences, and the rules behind them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from ray_pipeline.bench.alpaca_eval.judge import PairPreference, PreferenceAsking
from ray_pipeline.bench.alpaca_eval.length_controlled import (
    GamedRows,
    GlmWeights,
    LengthControlled,
    at_equal_length,
    difficulties_of,
    fit_length_controlled,
    gamed_rows_of,
)
from ray_pipeline.bench.alpaca_eval.questions import REFERENCE, Instruction, instructions_of
from ray_pipeline.bench.alpaca_eval.score import (
    INSTRUCTION_TABLE,
    Annotation,
    alpaca_eval_protocol,
    annotate,
    flip_rate,
    instruction_table,
    instructions_digest,
    places,
    preferences_of,
    published_alpaca_eval,
    published_place,
    raw_win_rate,
)
from ray_pipeline.bench.alpaca_eval.scores import AlpacaEvalRules, alpaca_eval_rates
from ray_pipeline.bench.benchmark import Judge
from ray_pipeline.bench.files import BenchmarkFileError, read_csv
from ray_pipeline.bench.judge_prompts import own_preference_prompt, preference_prompt
from ray_pipeline.stats.protocol import score_name
from tests.published import DATA, NUMBERS, needs, table
from tests.scripted import ScriptedEngine, said

#: Published with a value that its published weights do not give (a difference of 0.13).
OTHER_WEIGHTS = "NullModel"


@functools.cache
def leaderboard() -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in table("alpaca_eval_leaderboard.csv")}


@functools.cache
def weights() -> dict[str, GlmWeights]:
    names = ("weight_length", "weight_difficulty", "weight_model")
    return {model: GlmWeights(*(float(row[name]) for name in names)) for model, row in leaderboard().items()}


@functools.cache
def preferences() -> dict[str, list[dict[str, str]]]:
    found = defaultdict(list)
    for row in table("alpaca_eval_preferences.csv.gz"):
        found[row["model"]].append(row)
    return dict(found)


@functools.cache
def difficulty() -> Any:
    return difficulties_of(read_csv(str(NUMBERS / "alpaca_eval_difficulty.csv")))


def column(model: str, name: str) -> Any:
    return np.array([float(row[name]) for row in preferences()[model]])


def test_raw_win_rates_of_the_leaderboard() -> None:
    assert len(preferences()) == 15
    for model in preferences():
        rate, published = raw_win_rate(column(model, "preference") - 1, draws=10), leaderboard()[model]
        for mine, name in (
            (rate.win_rate, "win_rate"),
            (rate.standard_error, "standard_error"),
            (rate.discrete_win_rate, "discrete_win_rate"),
        ):
            assert mine == pytest.approx(float(published[name]), abs=1e-9), (model, name)
        counts = (rate.wins, rate.losses, rate.draws, rate.rows)
        assert counts == tuple(int(published[n]) for n in ("n_wins", "n_wins_base", "n_draws", "n_total")), model


def test_closed_form_length_controlled_win_rates() -> None:
    close = 0
    for model, rows in preferences().items():
        published = float(leaderboard()[model]["length_controlled_winrate"])
        # Models with fewer rows were published with the difficulties of the first rows.
        found = 100 * at_equal_length(weights()[model], difficulty()[: len(rows)]).mean()
        if model == OTHER_WEIGHTS:
            assert 0.1 < abs(found - published) < 0.15
        else:
            assert found == pytest.approx(published, abs=1e-6), model
            close += len(rows) == 805
    assert close == 10


def test_refit_meets_the_leaderboard() -> None:
    gamed = gamed_rows_of(table("alpaca_eval_gamed_surrogate.csv.gz"))
    assert gamed.surrogate and len(gamed.preference) == 1610
    errors, weight_errors = {}, []
    for model, rows in preferences().items():
        fit = fit_length_controlled(
            column(model, "preference") - 1,
            column(model, "len_baseline"),
            column(model, "len_model"),
            difficulty()[: len(rows)],
            gamed,
        )
        published = leaderboard()[model]
        if model == REFERENCE:
            assert fit.win_rate == pytest.approx(50, abs=0.2)
            continue
        errors[model] = abs(fit.win_rate - float(published["length_controlled_winrate"]))
        weight_errors.append(abs(fit.weights.length - weights()[model].length))
        assert fit.estimator == "re-fit, surrogate of the gamed rows"
        if published["lc_standard_error"]:
            assert fit.standard_error == pytest.approx(float(published["lc_standard_error"]), abs=1e-3)
    assert max(errors.values()) < 0.2, errors
    assert float(np.median(list(errors.values()))) < 0.005, errors
    assert float(np.median(weight_errors)) < 2.5e-4, weight_errors


@needs("alpaca_eval")
def test_only_the_published_protocol_has_the_name() -> None:
    text = (DATA / "alpaca_eval" / "prompts" / "alpaca_eval_clf.txt").read_text()
    lengths = [int(row["len_baseline"]) for row in preferences()[OTHER_WEIGHTS]]
    measured = {
        "metric": "LC",
        "judge": "endpoint:gpt-4-1106-preview@https://api.openai.com/v1",
        "prompt": preference_prompt(text, "published"),
        "asking": PreferenceAsking(),
        "order": "seeded",
        "reference": REFERENCE,
        "reference_lengths": lengths,
        "methods": ["logprobs", "same", None],
        "estimator": "re-fit",
        "instructions": "those of the hub",
    }

    def name(**other: Any) -> Any:
        return score_name(
            alpaca_eval_protocol(**{**measured, **other}),
            published_alpaca_eval(other.get("metric", "LC"), "those of the hub"),
        )

    assert name().exact and name().text == "AlpacaEval 2 LC"
    assert name(metric="WR").text == "AlpacaEval 2 WR"
    style = name(judge="hub:Qwen/Qwen3-8B@0123456789abcdef0123", reference="our-base")
    assert style.text == "AlpacaEval-2-style LC, judge Qwen/Qwen3-8B@0123456, reference our-base"
    assert set(style.departures) == {"judge", "reference"}
    for other, field in (
        ({"prompt": own_preference_prompt()}, "judge_prompts"),
        ({"asking": PreferenceAsking(top_logprobs=20)}, "judge_sampling"),
        ({"order": "both"}, "order"),
        ({"seed": 1}, "order"),
        ({"instructions": "edited, with the same reference outputs"}, "questions"),
        ({"reference_lengths": lengths[:-1]}, "reference_answers"),
        ({"methods": ["logprobs", "reply"]}, "reading"),
        ({"estimator": "re-fit, surrogate of the gamed rows"}, "estimator"),
    ):
        assert name(**other).departures == (field,), other
        assert name(**other).fingerprint != name().fingerprint
    # Where nothing vouches for the instructions they are not known to be the published ones, and that is said.
    unknown = score_name(alpaca_eval_protocol(**measured), published_alpaca_eval("LC", None))
    assert unknown.departures == ("questions",) and unknown.text.startswith("AlpacaEval-2-style LC, ")


def test_an_edited_instruction_is_another_protocol() -> None:
    asked = instructions_of([{"instruction": text, "output": "abc"} for text in ("Sing.", "Dance.")])
    edited = instructions_of([{"instruction": text, "output": "abc"} for text in ("Sing.", "Dance!")])
    outputs = instructions_of([{"instruction": text, "output": "xyz"} for text in ("Sing.", "Dance.")])
    assert instructions_digest(asked) == instructions_digest(outputs) != instructions_digest(edited)
    rules = AlpacaEvalRules(
        own_preference_prompt(), PreferenceAsking(), Judge("j"), "seeded", 0, REFERENCE, "", published_instructions=True
    )
    names = {}
    for vouched in (True, False):
        annotations = [Annotation(one, None, {}) for one in asked]
        scores, _, _ = alpaca_eval_rates("m", annotations, dataclasses.replace(rules, published_instructions=vouched))
        names[vouched] = scores[0].name
        assert scores[0].protocol.questions == instructions_digest(asked)
    assert set(names[False].departures) - set(names[True].departures) == {"questions"}


def test_only_the_published_fit_controls_for_lengths_that_do_not_overlap() -> None:
    asked = instructions_of([{"instruction": f"ask {i}", "output": "r" * 10} for i in range(40)])
    rules = AlpacaEvalRules(own_preference_prompt(), PreferenceAsking(), Judge("j"), "seeded", 0, REFERENCE, "")

    def controlled(shorter: int, rules: AlpacaEvalRules) -> Any:
        said = {"first": PairPreference(0.8, "logprobs", 1.0, "ok", "m")}
        annotations = [Annotation(one, "o" * (5 if i < shorter else 20 + i), said) for i, one in enumerate(asked)]
        return alpaca_eval_rates("m", annotations, rules)[0][1]

    for shorter, figure in ((0, False), (7, False), (8, True), (33, False)):
        score = controlled(shorter, rules)
        assert (score.value is not None) == (score.low is not None) == figure, shorter
        assert ("gamed rows" if figure else "only the fit with `gamed` allows that") in score.note
    published = dataclasses.replace(rules, length_data=(gamed(), np.linspace(-1, 1, 40)))
    assert controlled(0, published).value is not None


def test_the_published_coin() -> None:
    # Written out once more, from the published annotator's description: output 1 is the reference's.
    for text in ("Tell a joke.", "", "日本語", "Tell a joke. "):
        switched = random.Random("is_switched_outputs" + text + "0").choices([False, True], k=1)[0]
        assert published_place(text) == ("first" if switched else "second")
    drawn = [published_place(f"instruction {i}") for i in range(2000)]
    assert 900 < drawn.count("first") < 1100
    assert drawn != [published_place(f"instruction {i}", seed=1) for i in range(2000)]
    assert places("x", "both") == ("first", "second") and places("x", "seeded") == (published_place("x"),)


def test_unread_preferences_are_counted_and_bounded() -> None:
    rate = raw_win_rate([1.0, 0.0, 0.5, math.nan, 0.9])
    assert (rate.rows, rate.wins, rate.losses, rate.draws, rate.unread) == (4, 2, 1, 1, 1)
    assert rate.win_rate == pytest.approx(60) and rate.discrete_win_rate == pytest.approx(62.5)
    assert (rate.worst, rate.best) == pytest.approx((48, 68))
    nothing = raw_win_rate([math.nan, math.nan])
    assert (nothing.win_rate, nothing.standard_error, nothing.worst, nothing.best) == (None, None, 0, 100)
    assert raw_win_rate([]).worst is None
    with pytest.raises(ValueError, match=r"1\.5 of row 1"):
        raw_win_rate([0.5, 1.5])


def gamed(rows: int = 40) -> GamedRows:
    rng = np.random.default_rng(5)
    return GamedRows(rng.normal(size=rows), rng.normal(size=rows), np.full(rows, 0.1), False)


def test_refit_takes_length_out_of_planted_verdicts() -> None:
    rng = np.random.default_rng(0)
    n = 400
    reference, d = rng.integers(200, 3000, n).astype(float), rng.normal(size=n)
    longer = rng.integers(0, 2000, n)
    x = -longer / np.std(longer, ddof=1)
    truth = 1 / (1 + np.exp(-(-2.0 * np.tanh(x) + 0.5 * d - 0.8)))
    fit = fit_length_controlled(truth, reference, reference + longer, d, gamed())
    assert 100 * truth.mean() > 60 > 40 > fit.win_rate  # long answers won; at equal length they would have lost
    assert fit.win_rate == pytest.approx(100 * at_equal_length(fit.weights, d).mean())
    assert fit.weights.length < -1 and fit.penalty is not None and len(fit.preferences) == n
    # A row that was not read is predicted all the same, and its missing length harms nobody.
    truth[3], longer = math.nan, longer.astype(float)
    longer[3] = math.nan
    again = fit_length_controlled(truth, reference, reference + longer, d, gamed())
    assert len(again.preferences) == n and abs(again.win_rate - fit.win_rate) < 2


def test_refit_refuses_what_it_cannot_fit() -> None:
    y, d = np.full(6, 0.5), np.zeros(6)
    assert fit_length_controlled(y, np.full(6, 10.0), np.full(6, 10.0), d, gamed()).win_rate == pytest.approx(50, abs=5)
    with pytest.raises(ValueError, match="one each is needed"):
        fit_length_controlled(y, np.ones(6), np.ones(6), d[:5], gamed())
    with pytest.raises(ValueError, match="4 preferences were read"):
        fit_length_controlled([0.5] * 4 + [math.nan] * 2, np.ones(6), np.ones(6), d, gamed())
    with pytest.raises(ValueError, match="is NaN"):
        fit_length_controlled(y, np.ones(6), np.array([math.nan] + [1.0] * 5), d, gamed())


def likes(word: str) -> ScriptedEngine:
    """A judge that prefers the output with `word` in it at 9 to 1, and says so in its log-probabilities."""

    def reply(messages: Any, sampling: Any) -> Any:
        asked = messages[-1]["content"]
        first = asked.index(word) < asked.index("<output_of_M ")
        good, bad = ("m", "M") if first else ("M", "m")
        return said(good, "length", logprobs=[[(good, math.log(0.81)), (bad, math.log(0.09)), ("The", -3.0)]])

    return ScriptedEngine(reply)


def test_annotations_and_the_table() -> None:
    rows = instructions_of([{"instruction": f"ask {i}", "output": "reference", "dataset": "d"} for i in range(3)])
    prompt, asking = own_preference_prompt(), PreferenceAsking()
    engine = likes("GOOD")

    async def run() -> list[Annotation]:
        outputs = ["a GOOD one", None, "reference"]
        return [await annotate(engine, r, o, prompt, asking, "both") for r, o in zip(rows, outputs, strict=True)]

    won, unanswered, same = asyncio.run(run())
    assert engine.calls == 2  # nobody is asked about a missing output or about one text twice
    assert won.preference == pytest.approx(0.9) and won.flipped is False
    assert unanswered.preference is None and same.preference == 0.5
    assert {a.asked["first"].method for a in (won, same)} == {"logprobs", "same"}
    assert won.asked["first"].label_mass == pytest.approx(0.9)
    assert flip_rate([won, unanswered, same]) == 0
    assert preferences_of([won, unanswered, same])[[0, 2]] == pytest.approx([0.9, 0.5])
    predicted = at_equal_length(GlmWeights(0, 0, 1.0), np.zeros(3))
    controlled = LengthControlled(0, None, GlmWeights(0, 0, 1.0), predicted, None, "")
    table = instruction_table([won, unanswered, same], controlled)
    assert table.schema == INSTRUCTION_TABLE
    assert table["parse_status"].to_pylist() == ["ok", "unanswered", "ok"]
    assert table["length_model"].to_pylist() == [10, None, 9]
    assert table["preference_predicted"].to_pylist() == pytest.approx([1 / (1 + math.exp(-1))] * 3)


def test_a_judge_of_places_flips_and_one_order_unread_leaves_none() -> None:
    first = PairPreference(0.9, "logprobs", 1.0, "ok", "m")
    lost = PairPreference(None, None, None, "unparsed", "The")
    row = Instruction(0, "i", "r")
    always_first = Annotation(row, "o", {"first": first, "second": first})
    assert always_first.flipped is True and always_first.preference == pytest.approx(0.5)
    half = Annotation(row, "o", {"first": first, "second": lost})
    assert half.preference is None and half.flipped is None
    table = instruction_table([half]).to_pylist()[0]
    assert (table["parse_status"], table["preference_first"], table["preference"]) == ("unparsed", 0.9, None)
    assert Annotation(row, "o", {"second": first}).preference == pytest.approx(0.1)


def test_files_are_checked() -> None:
    with pytest.raises(BenchmarkFileError, match="row 2: output is missing"):
        instructions_of([{"instruction": "a", "output": "b"}, {"instruction": "a"}], "refs.json")
    with pytest.raises(BenchmarkFileError, match="every number from 0 to 1"):
        difficulties_of([{"index": "0", "instruction_difficulty": "1"}, {"index": "2", "instruction_difficulty": "1"}])
    twice = [{"index": str(i), "instruction_difficulty": str(i / 2)} for i in (0, 1, 0, 1)]
    assert difficulties_of(twice).tolist() == [0, 0.5]
    with pytest.raises(BenchmarkFileError, match="column std_delta_len"):
        gamed_rows_of([{"std_delta_len": "x", "instruction_difficulty": "1", "preference": "1"}])
    with pytest.raises(BenchmarkFileError, match="no rows"):
        gamed_rows_of([])
