"""What a reader of any page asks first, beside the headline: what, models, judges, how many, how long, how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.progress import duration


def first_screen(
    what: str,
    *,
    models: Mapping[str, str] | None = None,
    judges: Mapping[str, Mapping[str, str] | str] | None = None,
    amounts: Iterable[tuple[int | None, str]] = (),
    usage: Usage | None = None,
) -> list[tuple[str, str]]:
    """(question, answer) for `Page.about`; what is not known is left out.

    Args:
        models: role → model.
        judges: what they judge ("" where there is only one such thing) → judge → model, or their names as text.
        amounts: numbers of things and what they are; None is left out.
        usage: of all stages behind the page.
    """
    used = usage or Usage()
    answers = {
        "What": what,
        "Models": ", ".join(_named(role, model) for role, model in (models or {}).items()),
        "Judges": "; ".join(_judges(use, of_use) for use, of_use in (judges or {}).items() if of_use),
        "How many": ", ".join(f"{count:,} {unit}" for count, unit in amounts if count is not None),
        "How long": f"{duration(used.wall_seconds)}, summed over stages" if used.wall_seconds else "",
        "How much": _cost(used) if used.calls else "",
        "Cut prompts": _cut_prompts(used) if used.cut_prompts else "",
    }
    return [(question, answer) for question, answer in answers.items() if answer]


def _named(role: str, model: str) -> str:
    return f"{role}: {model}" if model and role != model else role


def _judges(use: str, judges: Mapping[str, str] | str) -> str:
    if not isinstance(judges, str):
        by_model: dict[str, list[str]] = {}
        for judge, model in judges.items():
            by_model.setdefault(model if model != judge else "", []).append(judge)
        judges = ", ".join(f"{', '.join(names)}{f' ({model})' if model else ''}" for model, names in by_model.items())
    return f"{use}: {judges}" if use else judges


def _cut_prompts(usage: Usage) -> str:
    return f"the server read only a part of the prompt in {int(usage.cut_prompts):,} calls"


def _cost(usage: Usage) -> str:
    cost = f", cost {usage.cost:.4g} in the currency of the prices" if usage.cost else ""
    log = f" and {int(usage.calls_log):,} from the call log" if usage.calls_log else ""
    return f"{int(usage.calls_engine):,} LLM calls made{log}, {int(usage.tokens):,} tokens{cost}"
