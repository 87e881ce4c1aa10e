"""Judge and gate a DataFrame in a notebook or a script, with a small real model on the CPU."""

import pandas as pd

import ray_pipeline as quorum

answers = ["9 then 4 9 gives 4 9", "9 then 4 9 gives 9 4", "cat then dog cat gives dog cat"]
frame = pd.DataFrame({"prompt": ["sort 9 4", "sort 9 4", "reverse cat dog"], "response": answers})
with quorum.open_engine("pocket:judge") as engine:
    verdicts = quorum.judge(frame, engine)
    critiques = quorum.critique(frame, engine)
decisions = quorum.gate(frame, verdicts, critiques, tau=2.5)
print(frame.join(decisions[["final_score", "label", "why"]]).to_string())
print(quorum.to_kto(frame, verdicts, decisions)[["prompt", "completion", "label"]])
