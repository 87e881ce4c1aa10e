"""IFEval's part of the page: the four accuracies of all models from the stored tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ray_pipeline.bench.ifeval.questions import IfevalPrompt, IfevalSettings, prompt_of
from ray_pipeline.bench.ifeval.score import Accuracy, IfevalVerdict, ifeval_protocol, published_ifeval
from ray_pipeline.bench.ifeval.score import scores as accuracies
from ray_pipeline.bench.scores import Measurement, Reading, Score, Scored, make_score, percent
from ray_pipeline.stats.protocol import settings_text

_ACCURACIES = {
    "prompt_strict": "prompt, strict",
    "instruction_strict": "instruction, strict",
    "prompt_loose": "prompt, loose",
    "instruction_loose": "instruction, loose",
}


def scored(settings: IfevalSettings, run: Measurement) -> Scored:
    """Scores of all models, once the checkers' verdicts are stored."""
    result = Scored()
    if (checked := run.tables.rows("bench_checks")) is None:
        return result
    prompts = [prompt_of(q) for q in run.tables.of("ifeval")]
    answers = settings_text(**settings.sampling.model_dump())
    for name in run.names:
        verdicts = [
            IfevalVerdict(int(r["question_id"]), tuple(r["strict"]), tuple(r["loose"]), r["answered"], r["chance"])
            for r in checked
            if r["model"] == name
        ]
        scores, rows, reading = ifeval_accuracies(name, prompts, verdicts, answers, draws=run.draws, seed=run.seed)
        result.add(scores, reading, "ifeval_types", rows)
    return result


def ifeval_accuracies(
    model: str,
    prompts: Sequence[IfevalPrompt],
    verdicts: Sequence[IfevalVerdict],
    answers: str,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """The four accuracies; rows of the table of types; and how many prompts have no response."""
    found = accuracies(prompts, verdicts, draws=draws, seed=seed)
    scores = []
    for field, words in _ACCURACIES.items():
        accuracy: Accuracy = getattr(found, field)
        scores.append(
            make_score(
                model,
                "ifeval",
                words,
                ifeval_protocol(prompts, words, answers),
                published_ifeval(words),
                percent(accuracy.interval.mean),
                low=percent(accuracy.interval.low),
                high=percent(accuracy.interval.high),
                unit="%",
                rows=accuracy.total,
                unread=found.unanswered,
                worst=percent(accuracy.interval.mean),
                best=percent(accuracy.best),
            )
        )
    rows = [{"model": model, **dataclasses.asdict(one)} for one in (*found.families, *found.types)]
    statuses = {"answered": len(verdicts) - found.unanswered, "unanswered": found.unanswered}
    return scores, rows, Reading(model, "ifeval", statuses, chance=found.chance)
