"""Probes: pairs of a right and a wrong answer, plain and dressed so that a biased judge prefers the wrong one.

A probe changes the texts of all pairs alike. Its effect is the judge's accuracy on the dressed pairs minus that on the
same pairs plain, or in the probe's `control`, where it has one. The order in which answers are shown is probed by the
plain pairs themselves: both orders must name the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field, field_validator

from ray_pipeline.agents.templates import TemplateError, check_text, read_template_file, render_text
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.judge_card.sets import card_item
from ray_pipeline.store.keys import digest

#: Source of the probes' items, and the subset of the pairs as they stand.
PROBES, PLAIN = "probes", "plain"
#: Follows a probe's name in the subset of its control.
CONTROL = "/control"
#: The probe that needs no texts of its own.
ORDER = "order"

_VARIABLES = {"right": "x", "wrong": "x", "family": "x", "other": "x"}


class Pair(Settings):
    """A question with a right and a wrong answer of about the same length and tone."""

    question: str
    right: str
    wrong: str


class Dressing(Settings):
    """Templates of both answers; the variables are `right`, `wrong`, the judge's `family` and an `other` one."""

    right: str = "{{ right }}"
    wrong: str = "{{ wrong }}"


class Probe(Dressing):
    """A dressing with its name for people, and what it is compared with; default: the plain pairs."""

    about: str
    control: Dressing | None = None


class ProbeTexts(Settings):
    """A file of probes. `other` is the first of `families` that is not the judge's."""

    pairs: tuple[Pair, ...] = Field(min_length=2)
    probes: dict[str, Probe]
    families: tuple[str, ...] = ("GPT", "Llama")

    @field_validator("pairs")
    @classmethod
    def _distinct_questions(cls, pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
        refuse_repeated((pair.question for pair in pairs), "questions")
        return pairs

    def check(self, file: str) -> None:
        """Render every text. Raises TemplateError, naming file and probe."""
        for name, probe in self.probes.items():
            if name in (PLAIN, ORDER) or "/" in name:
                raise TemplateError(f"prompt template file {file}: {name} is a reserved name; rename the probe")
            for where, dressing in ((name, probe), (f"{name}.control", probe.control)):
                if dressing is not None:
                    check_text(file, f"probes.{where}.right", dressing.right, _VARIABLES)
                    check_text(file, f"probes.{where}.wrong", dressing.wrong, _VARIABLES)


class ProbeSettings(Settings):
    """The `probes` block: pairs with a known answer, dressed to mislead a biased judge."""

    texts: str = Field("default", description="built-in name or YAML file of the pairs and of how they are dressed")
    only: tuple[str, ...] | None = Field(None, description="names of probes; default: all of the file")
    limit: int | None = Field(None, ge=2, description="maximum number of pairs; default: all of the file")

    def load(self) -> ProbeTexts:
        """The pairs and probes that are asked about. Raises TemplateError."""
        texts = read_template_file(self.texts, ProbeTexts, "probes")
        texts.check(self.texts)
        if unknown := sorted(set(self.only or ()) - {ORDER, *texts.probes}):
            known = ", ".join([ORDER, *texts.probes])
            raise TemplateError(f"probes.only: {self.texts} has no probe {unknown[0]!r}; choose from {known}")
        probes = {name: probe for name, probe in texts.probes.items() if self.only is None or name in self.only}
        return texts.model_copy(update={"pairs": texts.pairs[: self.limit], "probes": probes})


def probe_items(texts: ProbeTexts, families: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of the table `card_items`: every pair plain, and by probe. The right answer is A.

    Args:
        families: of the judges; texts that name the family are made once for each.
    """
    dressings: list[tuple[str, Dressing]] = [(PLAIN, Dressing())]
    for name, probe in texts.probes.items():
        dressings += [(name, probe), *([(name + CONTROL, probe.control)] if probe.control is not None else [])]
    for pair in texts.pairs:
        base = digest(["pair", pair.question, pair.right, pair.wrong], size=8)
        for subset, dressing in dressings:
            of_all = len({tuple(_dressed(pair, dressing, name, texts.families)) for name in ("one", "two")}) == 1
            for family in [None] if of_all else dict.fromkeys(families):
                answers = _dressed(pair, dressing, family, texts.families)
                item = card_item(f"probes/{digest([base, subset, *answers], 8)}", pair.question, answers, "A", subset)
                yield {**item, "source": PROBES, "base": base, "family": family}


def _dressed(pair: Pair, dressing: Dressing, family: str | None, families: Sequence[str]) -> list[str]:
    other = next(name for name in (*families, "another model") if name.lower() != family)
    names = {"right": pair.right, "wrong": pair.wrong, "family": family, "other": other}
    return [render_text(text, names) for text in (dressing.right, dressing.wrong)]
