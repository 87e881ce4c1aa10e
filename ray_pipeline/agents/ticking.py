"""The calls of checklists: a model writes the items for a prompt, and a judge ticks them for an answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ray_pipeline.agents.checklists import (
    ChecklistItem,
    items_grammar,
    items_verdict,
    ticks_form,
    ticks_grammar,
    ticks_reason,
    ticks_verdict,
    weighted_share,
)
from ray_pipeline.agents.judges import JudgeAsking, JudgeReply, Rubric, SamplingSettings, Verdict, ask_until_read
from ray_pipeline.agents.templates import Layout, RoleTemplate, fence, render, transcript
from ray_pipeline.engines.base import ChatEngine, Message


async def tick(
    engine: ChatEngine,
    prompt: Sequence[Message],
    response: str,
    rubric: Rubric,
    items: Sequence[ChecklistItem],
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: JudgeAsking,
    layout: Layout = "shared_first",
) -> Verdict:
    """Tick all items of a checklist for one answer; the score is the weighted share that is met, on the scale."""
    instruction, count = transcript(prompt), len(items)
    listed = "\n".join(f"{number}. {item.text}" for number, item in enumerate(items, 1))
    messages = render(
        template,
        layout,
        instruction=instruction,
        response=response,
        fence=fence([instruction], [instruction, response, listed]),
        name=rubric.name,
        items=listed,
        form=ticks_form(count, asking.reason_chars),
    )
    grammar = ticks_grammar(count, asking.reason_chars) if asking.grammar else None
    reader = functools.partial(ticks_verdict, count=count)
    reply = await ask_until_read(engine, messages, rubric.sampling or sampling, asking, grammar, reader)
    if reply.fields is None:
        return Verdict(None, None, None, reply.status, reply.raw, reply.unread)
    ticks = reply.fields["ticks"]
    score = rubric.scaled(weighted_share(items, ticks))
    return Verdict(score, None, ticks_reason(items, ticks), reply.status, reply.raw)


async def write_items(
    engine: ChatEngine,
    prompt: Sequence[Message],
    name: str,
    text: str,
    most: int,
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: JudgeAsking,
) -> JudgeReply:
    """Write the checklist of a prompt: the field `items` has 1 to `most` texts. `name` and `text` are the judge's."""
    instruction = transcript(prompt)
    variables = {
        "instruction": instruction,
        "name": name,
        "rubric": text,
        "most": most,
        "fence": fence([instruction], [instruction]),
    }
    messages = render(template, "shared_first", **variables)
    grammar = items_grammar(most) if asking.grammar else None
    reader = functools.partial(items_verdict, most=most)
    return await ask_until_read(engine, messages, sampling, asking, grammar, reader)
