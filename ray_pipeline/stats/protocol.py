"""What a score was measured with, and what it may therefore be called.

Only a benchmark's score whose protocol equals the published one in everything that the benchmark fixes carries the
benchmark's own name; any other one says what it is: "AlpacaEval-2-style LC, judge X, reference Y".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ray_pipeline.store.keys import canonical_json, digest


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that two scores must share to be comparable. None: the benchmark has no such part.

    Attributes:
        benchmark: "AlpacaEval 2", "MT-Bench", "IFEval"; of the project's own measures "win rate".
        metric: which of its figures, by the published word ("LC", "WR", …); "" where there is one.
        questions: digest of the questions that were asked, all of them.
        judge: identity of the judging model.
        judge_prompts: digest of the texts that it was sent.
        judge_sampling: how its replies were drawn; canonical JSON.
        reading: how its replies became verdicts.
        order: in which order two answers were shown.
        reference: name of the model or of the answers compared with.
        reference_answers: digest of those answers.
        estimator: how verdicts became the figure.
        checker: program and versions that judged without a model.
        answers: how the answers were drawn; canonical JSON. Benchmarks that leave it to the model do not compare it.
    """

    benchmark: str
    metric: str = ""
    questions: str | None = None
    judge: str | None = None
    judge_prompts: str | None = None
    judge_sampling: str | None = None
    reading: str | None = None
    order: str | None = None
    reference: str | None = None
    reference_answers: str | None = None
    estimator: str | None = None
    checker: str | None = None
    answers: str | None = None

    def fingerprint(self) -> str:
        """16 hex digits; equal means measured alike in every field."""
        return digest(["protocol", dataclasses.asdict(self)], size=8)


@dataclasses.dataclass(frozen=True)
class PublishedProtocol:
    """The protocol that a benchmark's published scores have, and the fields that it leaves open."""

    protocol: Protocol
    open_fields: frozenset[str] = frozenset()

    def departures(self, measured: Protocol) -> tuple[str, ...]:
        """Names of the fields in which a measurement is not the published one."""
        return tuple(
            field.name
            for field in dataclasses.fields(Protocol)
            if field.name not in self.open_fields
            and getattr(measured, field.name) != getattr(self.protocol, field.name)
        )


@dataclasses.dataclass(frozen=True)
class ScoreName:
    """What a score is called, why not by the benchmark's name (fields that differ), and its fingerprint."""

    text: str
    departures: tuple[str, ...]
    fingerprint: str

    @property
    def exact(self) -> bool:
        return not self.departures


def score_name(measured: Protocol, published: PublishedProtocol | None) -> ScoreName:
    """The name that a score may carry; without a published protocol it is never the benchmark's own."""
    departures = ("published protocol",) if published is None else published.departures(measured)
    metric = f" {measured.metric}" if measured.metric else ""
    if not departures:
        text = f"{measured.benchmark}{metric}"
    else:
        parts = [f"{measured.benchmark.replace(' ', '-')}-style{metric}"]
        parts += [f"judge {short_name(measured.judge)}"] if measured.judge else []
        if measured.reference:
            parts += [f"reference {short_name(measured.reference)}"]
        elif "reference" in departures:
            parts += ["no reference"]
        parts += [f"checker {measured.checker}"] if measured.checker and "checker" in departures else []
        text = ", ".join(parts)
    return ScoreName(text, departures, measured.fingerprint())


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a figure of the project's own was measured with; there is no published protocol that it could meet."""

    name: str
    fingerprint: str
    protocol: Protocol


def measured_by(protocol: Protocol) -> Measured:
    """A protocol with its fingerprint, and its name for reading: "win rate, judge X, reference Y"."""
    parts = [" ".join(part for part in (protocol.benchmark, protocol.metric) if part)]
    parts += [f"judge {short_name(protocol.judge)}"] if protocol.judge else []
    parts += [f"reference {short_name(protocol.reference)}"] if protocol.reference else []
    return Measured(", ".join(parts), protocol.fingerprint(), protocol)


def fixed_fields(protocol: Protocol) -> dict[str, str]:
    """What a protocol fixes, in the order of its fields; parts that it does not have are left out."""
    return {name: str(value) for name, value in dataclasses.asdict(protocol).items() if value}


def short_name(identity: str) -> str:
    """A model's identity for reading: an endpoint without its address, a hub model with seven digits of its commit."""
    if match := re.fullmatch(r"endpoint:(.+?)@https?://.*", identity):
        return match[1]
    if match := re.fullmatch(r"hub:(.+)@([0-9a-f]{7})[0-9a-f]*", identity):
        return f"{match[1]}@{match[2]}"
    if match := re.fullmatch(r"sha256:([0-9a-f]{12})[0-9a-f]*", identity):
        return f"weights {match[1]}"
    return identity


def win_rate_by(
    weights: Mapping[str, str], engine: Mapping[str, Any], settings: Mapping[str, Any], **other: Any
) -> Protocol:
    """A win rate's protocol, as far as it is known before anything is asked.

    Args:
        weights, engine: what the judging model is (`ModelSettings.weights`, `.semantics`).
        settings: how its replies are drawn.
        other: further fields of Protocol.
    """
    # What else decides the judge's replies (adapter, chat template, engine) has no field of its own.
    setup = {name: value for name, value in weights.items() if name != "model"} | {"engine": engine}
    drawn = f"{settings_text(**settings)} {canonical_json(setup)}"
    return Protocol("win rate", judge=weights.get("model"), judge_sampling=drawn, **other)


def settings_text(**settings: Any) -> str:
    """Settings as the text that a protocol holds; equal settings give equal text."""
    return canonical_json({k: float(v) if type(v) is int else v for k, v in settings.items()})
