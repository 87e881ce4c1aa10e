"""Read a stored run into pandas: which judge is furthest from the mean on candidates that the gate abstained from?

python examples/read_a_run.py runs/pocket
"""

import sys

import ray_pipeline as quorum

run = quorum.read_run(sys.argv[1] if len(sys.argv) > 1 else "runs/pocket")
decisions, verdicts = run.decisions.to_pandas(), run.verdicts.to_pandas()
print(run)
print(decisions["label"].value_counts().to_string())
scores = verdicts.merge(decisions[decisions["label"] == "abstain"], on=["candidate_id", "prompt_id"])
scores["distance"] = (scores["score"] - scores["mean_score"]).abs()
print(scores.groupby("judge")["distance"].mean().sort_values(ascending=False).to_string())
