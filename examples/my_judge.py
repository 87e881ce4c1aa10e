"""A judge strategy of your own: the judge counts unmet requirements, and fewer are better.

Set `ask.strategies: [{kind: examples/my_judge.py}]` for `quorum run agreement`, or use it in Python:

    quorum.compare(frame, engine, "examples/my_judge.py")
"""

from ray_pipeline.agents.strategies import LABELS, Asker, Look
from ray_pipeline.extensions import register


@register("strategy")
async def checklist(asker: Asker, order: tuple[int, ...]) -> Look:
    answers = "\n\n".join(f"Answer {LABELS[place]}:\n{asker.answers[n]}" for place, n in enumerate(order))
    question = (
        f"Request:\n{asker.instruction}\n\n{answers}\n\nList what the request requires. Then give every answer a score "
        f"from {asker.strategy.low} (meets no requirement) to {asker.strategy.high} (meets them all)."
    )
    return await asker.scores(order, [{"role": "user", "content": question}])
