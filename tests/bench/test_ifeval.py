"""IFEval: the official checkers' verdicts on GPT-4's responses, and what happens around them."""

from __future__ import annotations

import functools
import importlib.metadata
import random
from typing import Any

import pytest

from ray_pipeline.bench.floors import FLOORS
from ray_pipeline.bench.ifeval import score as ifeval
from ray_pipeline.bench.ifeval.questions import IfevalPrompt, prompts_of
from ray_pipeline.bench.ifeval.score import (
    IfevalScores,
    IfevalVerdict,
    UnknownInstruction,
    check,
    published_ifeval,
    scores,
)
from ray_pipeline.constraints.official import (
    Checkers,
    CheckersMissing,
    checker_version,
    load_checkers,
)
from ray_pipeline.stats.protocol import score_name
from tests.published import DATA, NUMBERS, json_lines, match_responses, needs

FOLDER = DATA / "ifeval"
NAMES = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
#: Prompts and responses of our own with the verdicts of lm_eval 0.4.13's checkers, called directly.
OWN = json_lines(NUMBERS.parent / "ifeval_own.jsonl")


@functools.cache
def published_prompts() -> tuple[IfevalPrompt, ...]:
    return tuple(prompts_of(json_lines(FOLDER / "input_data.jsonl")))


def own_prompts() -> tuple[IfevalPrompt, ...]:
    return tuple(prompts_of(OWN))


def expected(row: dict[str, Any]) -> IfevalVerdict:
    return IfevalVerdict(row["key"], tuple(row["strict"]), tuple(row["loose"]))


def assert_gpt4(found: IfevalScores) -> None:
    """The published accuracies of GPT-4 over 541 prompts."""
    for name, percent in zip(NAMES, (77.08, 83.69, 79.48, 85.49), strict=True):
        accuracy = getattr(found, name)
        assert 100 * accuracy.interval.mean == pytest.approx(percent, abs=0.2), name
        assert accuracy.interval.low < accuracy.interval.mean < accuracy.interval.high
    assert sum(t.total for t in found.types) == sum(f.total for f in found.families) == 834
    assert sum(t.strict for t in found.types) == found.instruction_strict.count
    assert len(found.types) == 25


def test_published_accuracies_from_published_verdicts() -> None:
    rows = json_lines(NUMBERS / "ifeval_gpt4.jsonl.gz")
    prompts = prompts_of([{**row, "prompt": "", "kwargs": [{}] * len(row["strict"])} for row in rows])
    assert_gpt4(scores(prompts, [expected(row) for row in rows], draws=100))


@needs("ifeval")
def test_verdicts_on_gpt4_are_the_published_ones(official: Checkers) -> None:
    rows = json_lines(FOLDER / "input_response_data_gpt4_20231107_145030.jsonl")
    responses, by_nearness = match_responses(published_prompts(), [(r["prompt"], r["response"]) for r in rows])
    assert by_nearness == [2785] and len(responses) == 541
    gpt4 = check(published_prompts(), responses, official)
    published = {row["key"]: expected(row) for row in json_lines(NUMBERS / "ifeval_gpt4.jsonl.gz")}
    equal = sum((v.strict, v.loose) == (published[v.key].strict, published[v.key].loose) for v in gpt4)
    assert equal >= 539
    found = scores(published_prompts(), gpt4, draws=100)
    assert_gpt4(found)
    # The official letter counter draws a letter where the prompt asks for # or !.
    assert [v.key for v in gpt4 if v.chance] == [1122, 1129] and found.chance == 2


def test_verdicts_on_items_of_our_own_are_the_official_ones(official: Checkers) -> None:
    assert {i for row in OWN for i in row["instruction_id_list"]} == set(official.registry)
    found = check(own_prompts(), {row["key"]: row["response"] for row in OWN}, official)
    assert found == [expected(row) for row in OWN]
    # One verdict of each kind: followed, not followed, followed once politeness or markup is taken off.
    assert {(all(v.strict), all(v.loose)) for v in found} == {(True, True), (False, False), (False, True)}


def test_a_sign_in_place_of_a_letter_is_judged_by_chance(official: Checkers) -> None:
    def chance(letter: str) -> bool:
        arguments = {"let_relation": "at least", "letter": letter, "let_frequency": 1}
        prompt = IfevalPrompt(1, "p", ("keywords:letter_frequency",), (arguments,))
        return check([prompt], {1: "a # b"}, official)[0].chance

    assert chance("#") and not chance("a")


def test_verdicts_repeat_and_leave_the_generator_alone(official: Checkers) -> None:
    prompts = [p for p in own_prompts() if any("language" in i or "letter" in i for i in p.instructions)]
    if FOLDER.exists():
        prompts = [p for p in published_prompts() if any("language" in i or "letter" in i for i in p.instructions)][:40]
    responses = dict.fromkeys((p.key for p in prompts), "Hello world, c'est la vie! " * 3)
    random.seed(11)
    state = random.getstate()
    once = check(prompts, responses, official)
    assert random.getstate() == state
    random.seed(12)
    # In another order too: a verdict depends on its own prompt and response.
    assert sorted(check(prompts[::-1], responses, official), key=lambda v: v.key) == sorted(once, key=lambda v: v.key)


def test_language_detection_is_seeded(official: Checkers) -> None:
    # Unseeded, the detector calls this text English on some calls and not on others.
    prompt = IfevalPrompt(0, "p", ("language:response_language",), ({"language": "en"},))
    found = {check([prompt], {0: "Hello world"}, official)[0].strict for _ in range(25)}
    assert len(found) == 1


@needs("ifeval")
@pytest.mark.parametrize(
    ("floor", "prompt_strict", "instruction_strict"), [("x", 11.46, 22.9), ("echo", 24.77, 36.09), ("empty", 0, 0)]
)
def test_floors(floor: str, prompt_strict: float, instruction_strict: float, official: Checkers) -> None:
    answers = {p.key: FLOORS[floor]([{"role": "user", "content": p.prompt}]) for p in published_prompts()}
    found = scores(published_prompts(), check(published_prompts(), answers, official), draws=2)
    assert 100 * found.prompt_strict.interval.mean == pytest.approx(prompt_strict, abs=0.01)  # type: ignore[operator]
    # One of the 834 verdicts on the echo hangs on the letter that the official checker draws.
    assert 100 * found.instruction_strict.interval.mean == pytest.approx(instruction_strict, abs=0.13)  # type: ignore[operator]


@needs("ifeval")
def test_the_name_goes_with_the_published_prompts_and_checkers(
    official: Checkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = score_name(ifeval.ifeval_protocol(published_prompts()), published_ifeval())
    assert exact.text == "IFEval", exact.departures
    part = score_name(ifeval.ifeval_protocol(published_prompts()[:-1]), published_ifeval())
    assert part.text == "IFEval-style" and part.departures == ("questions",)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    newer = score_name(ifeval.ifeval_protocol(published_prompts()), published_ifeval())
    assert newer.text == "IFEval-style, checker lm_eval 9.9, nltk 9.9, langdetect 9.9, seed 0"


def test_missing_tokenizer_data_is_said_before_any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk", reason="nltk is not installed: pip install -e '.[ifeval]'")

    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr(nltk.data, "path", ["/nowhere/nltk_data"])
    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("went to the network"))
    with pytest.raises(CheckersMissing, match=r"punkt_tab.*/nowhere/nltk_data.*nltk.downloader.*NLTK_DATA"):
        load_checkers()


def test_a_missing_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nltk", None)
    with pytest.raises(CheckersMissing, match=r"pip install '.*\[ifeval\]'"):
        load_checkers()

    def no_package(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_package)
    with pytest.raises(CheckersMissing, match=r"pip install '.*\[ifeval\]'"):
        checker_version()


class Followed:
    def __init__(self, flags: list[bool]) -> None:
        self.follow_instruction_list = flags


#: Checkers of a closed world: an instruction is followed when its type is a word of the response.
PLAIN = Checkers(
    registry={"say:yes": None, "say:no": None, "luck:coin": None},
    example=lambda **fields: fields,
    strict=lambda example, response: Followed([_follows(i, response) for i in example["instruction_id_list"]]),
    loose=lambda example, response: Followed([_follows(i, response.lower()) for i in example["instruction_id_list"]]),
)


def _follows(instruction: str, response: str) -> bool:
    kind = instruction.split(":")[1]
    return random.random() < 2 if kind == "coin" else kind in response.split()


def rows(*instructions: list[str]) -> list[dict[str, Any]]:
    return [
        {"key": k, "prompt": f"prompt {k}", "instruction_id_list": ids, "kwargs": [{"n": None, "word": "w"}] * len(ids)}
        for k, ids in enumerate(instructions)
    ]


def test_scores_of_a_closed_world() -> None:
    prompts = prompts_of(rows(["say:yes", "say:no"], ["say:yes"], ["luck:coin"], ["say:no"]))
    assert prompts[0].arguments == ({"word": "w"}, {"word": "w"})
    verdicts = check(prompts, {0: "yes NO", 1: "yes", 2: ""}, PLAIN)
    assert [v.strict for v in verdicts] == [(True, False), (True,), (True,), (False,)]
    assert [v.chance for v in verdicts] == [False, False, True, False]
    assert verdicts[3] == IfevalVerdict(3, (False,), (False,), answered=False)
    found = scores(prompts, verdicts[::-1], draws=20)
    assert [(getattr(found, n).count, getattr(found, n).total) for n in NAMES] == [(2, 4), (3, 5), (3, 4), (4, 5)]
    assert found.unanswered == 1 and found.prompt_strict.best == 0.75  # it may have been followed
    assert [(t.name, t.total, t.strict, t.loose) for t in found.families] == [("luck", 1, 1, 1), ("say", 4, 2, 3)]


def test_what_does_not_fit_is_an_error() -> None:
    prompts = prompts_of(rows(["say:yes"], ["say:perhaps"]))
    with pytest.raises(UnknownInstruction, match="prompt 1: no checker for say:perhaps; there are luck:coin"):
        check(prompts, {}, PLAIN)
    with pytest.raises(ValueError, match=r"keys \[7\]"):
        check(prompts[:1], {7: "x"}, PLAIN)
    with pytest.raises(ValueError, match="by key"):
        scores(prompts, [IfevalVerdict(0, (True,), (True,))])
    with pytest.raises(ValueError, match="one flag an instruction"):
        scores(prompts[:1], [IfevalVerdict(0, (True, True), (True,))])
    with pytest.raises(ValueError, match="row 1: kwargs is missing"):
        prompts_of([{"key": 1, "prompt": "p", "instruction_id_list": []}])
    with pytest.raises(ValueError, match="key 1: 1 instructions, but 0"):
        prompts_of([{"key": 1, "prompt": "p", "instruction_id_list": ["a:b"], "kwargs": []}])
    with pytest.raises(ValueError, match="key 0 comes twice"):
        prompts_of(rows(["say:yes"]) * 2)


def test_responses_without_keys_find_their_prompts() -> None:
    prompts = prompts_of(rows(["say:yes"], ["say:no"]))
    long = "Write a letter to your landlord and ask for a new {}, politely, in two paragraphs."
    near = [*prompts, IfevalPrompt(9, long.format("boiler"), (), ())]
    assert match_responses(near, [("prompt 1", "b"), (long.format("boilers"), "c"), ("prompt 0", "a")]) == (
        {1: "b", 0: "a", 9: "c"},
        [9],
    )
    with pytest.raises(ValueError, match="none of the prompts"):
        match_responses(prompts, [("something else altogether", "x")])
    with pytest.raises(ValueError, match="two responses"):
        match_responses(prompts, [("prompt 0", "x"), ("prompt 0", "y")])
