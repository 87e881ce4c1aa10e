"""Quorum: preference data by consensus of LLM judges, and a policy aligned with it, on Ray.

The functions below take and give pandas DataFrames or Arrow tables (what comes in goes out), are synchronous, and work
in a script and in a notebook. `quorum run` makes the same calls at scale, resumable and on a cluster.

    import pandas as pd
    import ray_pipeline as quorum

    frame = pd.DataFrame({"prompt": ["sort 3 1 2"], "response": ["so 1 2 3"]})
    with quorum.open_engine("pocket:judge") as engine:
        verdicts = quorum.judge(frame, engine)
        critiques = quorum.critique(frame, engine)
    decisions = quorum.gate(frame, verdicts, critiques)

Importing this module imports neither Ray nor torch; a function imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "__version__",
    "compare",
    "critique",
    "debate",
    "feedback_loop",
    "gate",
    "judge",
    "jury",
    "load_config",
    "open_engine",
    "read_run",
    "register",
    "run",
    "to_dpo",
    "to_kto",
]

if TYPE_CHECKING:
    from ray_pipeline.api.agents import critique, feedback_loop, judge
    from ray_pipeline.api.engines import Engine, open_engine
    from ray_pipeline.api.pairs import compare, debate, jury
    from ray_pipeline.api.rows import gate, to_dpo, to_kto
    from ray_pipeline.api.runs import load_config, read_run, run
    from ray_pipeline.extensions import register

_MODULES = {
    "api.agents": ("critique", "feedback_loop", "judge"),
    "api.engines": ("Engine", "open_engine"),
    "api.pairs": ("compare", "debate", "jury"),
    "api.rows": ("gate", "to_dpo", "to_kto"),
    "api.runs": ("load_config", "read_run", "run"),
    "extensions": ("register",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
