"""Judge and gate a DataFrame in a notebook or a script, with a small real model on the CPU."""

import pandas as pd

import ray_pipeline as quorum

frame = pd.DataFrame(
    {"prompt": ["sort 3 1 2", "sort 3 1 2", "reverse cat dog"], "response": ["1 2 3", "3 2 1", "dog cat"]}
)
with quorum.open_engine("pocket:judge") as engine:
    verdicts = quorum.judge(frame, engine)
    critiques = quorum.critique(frame, engine)
decisions = quorum.gate(frame, verdicts, critiques, tau=2.5)
print(frame.join(decisions[["mean_score", "final_score", "label", "why"]]))
print(quorum.to_kto(frame, verdicts, decisions)[["prompt", "completion", "label"]])
