"""Compose instructions with verifiable constraints: topics × tasks × constraints of IFEval's kinds, in own words.

A prompt is decided by the seed and its number alone, so a higher count adds prompts and keeps the earlier ones. No
composed combination of two or three kinds is one of IFEval's 541 prompts (a test on its file).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from ray_pipeline.constraints.wording import TASKS, TOPICS

Kind = Literal[
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:json_format",
    "detectable_format:multiple_sections",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:title",
    "keywords:existence",
    "keywords:forbidden_words",
    "keywords:frequency",
    "keywords:letter_frequency",
    "length_constraints:number_paragraphs",
    "length_constraints:number_sentences",
    "length_constraints:number_words",
    "punctuation:no_comma",
    "startend:end_checker",
    "startend:quotation",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

#: Kinds (without their family) that may be asked for together: they do not contradict each other, and IFEval has no
#: prompt with exactly these two.
_TOGETHER = {
    "capital_word_frequency": "number_placeholders postscript json_format multiple_sections number_bullet_lists "
    "number_highlighted_sections existence frequency letter_frequency number_words end_checker quotation",
    "english_capital": "number_placeholders number_bullet_lists frequency number_paragraphs number_sentences quotation",
    "english_lowercase": "json_format title number_paragraphs no_comma end_checker",
    "number_placeholders": "multiple_sections number_bullet_lists title existence frequency letter_frequency "
    "number_paragraphs number_words end_checker quotation",
    "postscript": "multiple_sections number_highlighted_sections existence forbidden_words frequency letter_frequency "
    "number_sentences number_words no_comma",
    "json_format": "frequency letter_frequency number_words",
    "multiple_sections": "number_highlighted_sections title existence forbidden_words frequency letter_frequency "
    "number_words no_comma",
    "number_bullet_lists": "number_highlighted_sections title existence frequency end_checker",
    "number_highlighted_sections": "title forbidden_words letter_frequency end_checker",
    "title": "existence forbidden_words frequency number_paragraphs no_comma end_checker",
    "existence": "end_checker",
    "forbidden_words": "number_words end_checker",
    "frequency": "letter_frequency number_sentences quotation",
    "letter_frequency": "end_checker",
    "number_paragraphs": "number_sentences number_words no_comma",
    "number_words": "end_checker",
    "no_comma": "quotation",
}
_PAIRS = frozenset(frozenset((one, other)) for one, others in _TOGETHER.items() for other in others.split())
#: IFEval has this one, though none of its pairs.
_NOT_TOGETHER = frozenset(("forbidden_words", "number_words", "end_checker"))

#: Share of prompts with one, two and three constraints.
_SIZES = (0.5, 0.35, 0.15)
_TRIES = 200
_RELATIONS = ("at least", "less than")


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A constraint: published name, the arguments of its checker, and the sentence that asks for it."""

    id: Kind
    arguments: dict[str, Any]
    sentence: str


@dataclasses.dataclass(frozen=True)
class Composed:
    """A composed prompt; `task` is a key of TASKS."""

    text: str
    task: str
    constraints: tuple[Constraint, ...]


def combinations(kinds: Sequence[Kind], most: int) -> list[tuple[Kind, ...]]:
    """Kinds that one prompt may ask for together, of one to `most` kinds; sorted."""
    found = []
    for size in range(1, most + 1):
        for some in itertools.combinations(sorted(kinds), size):
            short = [kind.split(":")[1] for kind in some]
            pairs = itertools.combinations(short, 2)
            if all(frozenset(pair) in _PAIRS for pair in pairs) and frozenset(short) != _NOT_TOGETHER:
                found.append(some)
    return found


def compose(seed: int, kinds: Sequence[Kind] = KINDS, most: int = 3) -> Iterator[Composed]:
    """Distinct prompts, until no new one is found.

    Args:
        kinds: constraints to choose from.
        most: largest number of constraints in a prompt.
    """
    by_size = [[some for some in combinations(kinds, most) if len(some) == size] for size in range(1, most + 1)]
    weights = [share if some else 0.0 for share, some in zip(_SIZES, by_size, strict=False)]
    seen: set[str] = set()
    for number in itertools.count():
        for attempt in range(_TRIES):
            # A text as seed: its hash does not depend on the process.
            draw = random.Random(f"{seed} {number} {attempt}")
            made = _compose(draw, draw.choice(draw.choices(by_size, weights)[0]))
            if made.text not in seen:
                break
        else:
            return
        seen.add(made.text)
        yield made


def _compose(draw: random.Random, kinds: Sequence[Kind]) -> Composed:
    topic, task = draw.choice(list(TOPICS)), draw.choice(list(TASKS))
    words = list(TOPICS[topic])
    draw.shuffle(words)
    # In a random order, so that no kind always comes first. Each takes its words, so that two never ask for the same.
    constraints = [_KINDS[kind](draw, words) for kind in draw.sample(kinds, len(kinds))]
    sentences = [draw.choice(TASKS[task]).format(topic), *(one.sentence for one in constraints)]
    return Composed(" ".join(sentences), task, tuple(constraints))


# --- one function a kind: a drawn constraint of it --------------------------------------------------------------------


def _capital_words(draw: random.Random, words: list[str]) -> Constraint:
    count = draw.randint(1, 4)
    relation, sentence = _bound(
        draw,
        f"Put {count} or more words entirely in capitals.",
        f"Fewer than {count + 1} words may stand entirely in capitals.",
    )
    arguments = {"capital_relation": relation, "capital_frequency": count + (relation == "less than")}
    return Constraint("change_case:capital_word_frequency", arguments, sentence)


def _upper(draw: random.Random, words: list[str]) -> Constraint:
    sentence = draw.choice(("Use capital letters only, in English.", "Reply in English, ALL IN UPPER CASE."))
    return Constraint("change_case:english_capital", {}, sentence)


def _lower(draw: random.Random, words: list[str]) -> Constraint:
    sentence = draw.choice(
        ("Keep the whole English text in small letters.", "Reply in English, without a single capital letter.")
    )
    return Constraint("change_case:english_lowercase", {}, sentence)


def _placeholders(draw: random.Random, words: list[str]) -> Constraint:
    count = draw.randint(1, 3)
    sentence = f"Leave {count} or more blanks to be filled in, each written in square brackets like [name]."
    return Constraint("detectable_content:number_placeholders", {"num_placeholders": count}, sentence)


def _postscript(draw: random.Random, words: list[str]) -> Constraint:
    marker = draw.choice(("P.S.", "P.P.S"))
    sentence = f"Add a postscript at the very end (open it with {marker})."
    return Constraint("detectable_content:postscript", {"postscript_marker": marker}, sentence)


def _json(draw: random.Random, words: list[str]) -> Constraint:
    sentence = draw.choice(("Reply with one JSON object and nothing else.", "The reply as a whole must be valid JSON."))
    return Constraint("detectable_format:json_format", {}, sentence)


def _sections(draw: random.Random, words: list[str]) -> Constraint:
    count, mark = draw.randint(2, 3), draw.choice(("Part", "Section"))
    sentence = f"Divide the reply into {count} parts headed {mark} 1 to {mark} {count}."
    return Constraint("detectable_format:multiple_sections", {"section_spliter": mark, "num_sections": count}, sentence)


def _bullets(draw: random.Random, words: list[str]) -> Constraint:
    count = draw.randint(2, 5)
    sentence = f"Use exactly {count} bullet points, each on a line that begins with an asterisk and a space."
    return Constraint("detectable_format:number_bullet_lists", {"num_bullets": count}, sentence)


def _highlights(draw: random.Random, words: list[str]) -> Constraint:
    count = draw.randint(1, 3)
    sentence = f"Mark {count} or more important phrases with asterisks, *like this*."
    return Constraint("detectable_format:number_highlighted_sections", {"num_highlights": count}, sentence)


def _title(draw: random.Random, words: list[str]) -> Constraint:
    sentence = "Give it a title between double angle brackets, <<like this>>."
    return Constraint("detectable_format:title", {}, sentence)


def _existence(draw: random.Random, words: list[str]) -> Constraint:
    chosen = [words.pop() for _ in range(draw.randint(1, 2))]
    sentence = f"Work in {_listed(chosen, 'and')}."
    return Constraint("keywords:existence", {"keywords": chosen}, sentence)


def _forbidden(draw: random.Random, words: list[str]) -> Constraint:
    chosen = [words.pop() for _ in range(draw.randint(1, 2))]
    sentence = f"Do without {_listed(chosen, 'and')}."
    return Constraint("keywords:forbidden_words", {"forbidden_words": chosen}, sentence)


def _frequency(draw: random.Random, words: list[str]) -> Constraint:
    word, count = words.pop(), draw.randint(2, 3)
    relation, sentence = _bound(
        draw,
        f'Let the word "{word}" occur {count} times or more.',
        f'Let the word "{word}" occur fewer than {count} times.',
    )
    arguments = {"keyword": word, "frequency": count, "relation": relation}
    return Constraint("keywords:frequency", arguments, sentence)


def _letters(draw: random.Random, words: list[str]) -> Constraint:
    letter, count = draw.choice("bcdfghlmpuw"), draw.randint(4, 12)
    relation, sentence = _bound(
        draw,
        f"The letter {letter} has to turn up {count} times or more.",
        f"The letter {letter} has to turn up fewer than {count} times.",
    )
    arguments = {"letter": letter, "let_frequency": count, "let_relation": relation}
    return Constraint("keywords:letter_frequency", arguments, sentence)


def _paragraphs(draw: random.Random, words: list[str]) -> Constraint:
    count = draw.randint(2, 3)
    sentence = f"Make it {count} paragraphs with a line of three asterisks, ***, between neighbours."
    return Constraint("length_constraints:number_paragraphs", {"num_paragraphs": count}, sentence)


def _sentences(draw: random.Random, words: list[str]) -> Constraint:
    relation = draw.choice(_RELATIONS)
    count = draw.randint(3, 6)
    sentence = (
        f"Take {count} sentences or more." if relation == "at least" else f"Stay below {count} sentences altogether."
    )
    return Constraint("length_constraints:number_sentences", {"num_sentences": count, "relation": relation}, sentence)


def _words(draw: random.Random, words: list[str]) -> Constraint:
    relation = draw.choice(_RELATIONS)
    count = draw.choice(range(40, 100, 10))
    sentence = f"Use {count} words or more." if relation == "at least" else f"Stay under {count} words."
    return Constraint("length_constraints:number_words", {"num_words": count, "relation": relation}, sentence)


def _no_comma(draw: random.Random, words: list[str]) -> Constraint:
    sentence = draw.choice(("Get by without commas.", "There must be no comma anywhere in the reply."))
    return Constraint("punctuation:no_comma", {}, sentence)


def _ending(draw: random.Random, words: list[str]) -> Constraint:
    phrase = draw.choice(
        ("That is all I know.", "Now it is your turn.", "What would you do?", "So much for today.", "Try it yourself.")
    )
    sentence = f'The very last words must be "{phrase}"'
    return Constraint("startend:end_checker", {"end_phrase": phrase}, sentence)


def _quoted(draw: random.Random, words: list[str]) -> Constraint:
    sentence = "Put the complete reply between double quotation marks."
    return Constraint("startend:quotation", {}, sentence)


def _bound(draw: random.Random, least: str, less: str) -> tuple[str, str]:
    """One of IFEval's two relations to a number, and the sentence that asks for it."""
    relation = draw.choice(_RELATIONS)
    return relation, least if relation == "at least" else less


def _listed(words: Sequence[str], joined: str) -> str:
    shown = [f'"{word}"' for word in words]
    return f"the word {shown[0]}" if len(shown) == 1 else f"the words {f' {joined} '.join(shown)}"


_KINDS: dict[Kind, Callable[[random.Random, list[str]], Constraint]] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _ending,
    "startend:quotation": _quoted,
}
