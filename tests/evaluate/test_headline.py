import pyarrow as pa
import pytest

from ray_pipeline.evaluate.cautions import cautions
from ray_pipeline.evaluate.data import RunIdentity
from ray_pipeline.evaluate.headline import data_headline, headline
from ray_pipeline.evaluate.metrics import collect_metrics
from tests.evaluate.example_run import comparisons, whole_run

PROMPTS = [f"p{i}" for i in range(60)]


def judged(choices: str, **changes: object) -> object:
    """A run whose 60 pairs the pairwise judge decided by repeating `choices`; no other measure."""
    votes = (choices * 60)[:60]
    table = comparisons(votes, PROMPTS)
    agreeing = [
        v if order == "ab" else {"A": "B", "B": "A", "C": "C"}[v]
        for v, order in zip([v for v in votes for _ in "ab"], table.column("order").to_pylist(), strict=True)
    ]
    table = table.set_column(table.schema.get_field_index("choice"), "choice", pa.array(agreeing))
    return whole_run(**({"comparisons": table, "responses": None, "response_verdicts": None} | changes))


def answers(base: float, policy: float) -> pa.Table:
    """Greedy responses of which the given shares are right."""
    return pa.table(
        {
            "prompt_id": PROMPTS * 2,
            "model": ["base"] * 60 + ["policy"] * 60,
            "mode": ["greedy"] * 120,
            "response": ["x"] * 120,
            "finish_reason": ["stop"] * 120,
            "completion_tokens": [1] * 120,
            "correct": [i < 60 * base for i in range(60)] + [i < 60 * policy for i in range(60)],
        }
    )


def verdict_and_text(data: object) -> tuple[str, str]:
    found = headline(collect_metrics(data).evaluation, data.missing_stages())  # type: ignore[arg-type, attr-defined]
    return found.verdict, found.text


@pytest.mark.parametrize(
    ("choices", "verdict", "opening"),
    [
        ("AAB", "better", "The policy got better."),
        ("BBA", "worse", "The policy got worse."),
        ("AB", "unclear", "Inconclusive: no significant difference between policy and base."),
        ("C", "unclear", "Inconclusive: no significant difference between policy and base."),
    ],
)
def test_by_the_judge_alone(choices: str, verdict: str, opening: str) -> None:
    found, text = verdict_and_text(judged(choices))
    assert found == verdict and text.startswith(opening) and "95 % interval" in text


def test_truth_against_the_judge_is_a_disagreement() -> None:
    found, text = verdict_and_text(judged("AAB", responses=answers(0.8, 0.3)))
    assert found == "mixed" and "from 80.0 % to 30.0 %" in text


def test_a_gain_that_only_the_judge_sees_is_a_disagreement() -> None:
    found, text = verdict_and_text(judged("AAB", responses=answers(0.5, 0.5)))
    assert found == "mixed" and "from 50.0 % to 50.0 %" in text


def test_truth_decides_where_the_judge_cannot_tell() -> None:
    assert verdict_and_text(judged("AB", responses=answers(0.4, 0.8)))[0] == "better"


def test_unread_pairs_that_could_turn_it_make_it_unclear() -> None:
    data = judged("A")
    statuses = ["truncated" if i < 70 else "ok" for i in range(120)]
    table = data.comparisons.set_column(5, "parse_status", pa.array(statuses))  # type: ignore[attr-defined]
    found, text = verdict_and_text(judged("A", comparisons=table))
    assert found == "unclear" and "35 unread pairs could have turned that" in text


def warned(data: object) -> str:
    return "\n".join(cautions(data, collect_metrics(data)))  # type: ignore[arg-type]


def test_warnings_appear_when_they_should() -> None:
    data = whole_run()
    labels = pa.array(["desirable"] * 200 + ["undesirable"] * 10 + ["incomplete"] * 30)
    noisy = data.verdicts.column("score").to_pylist()  # type: ignore[union-attr]
    noisy[:240] = [float(1 + (i * 7) % 10) for i in range(240)]
    text = warned(
        whole_run(
            decisions=data.decisions.set_column(1, "label", labels),  # type: ignore[union-attr]
            verdicts=data.verdicts.set_column(2, "score", pa.array(noisy)),  # type: ignore[union-attr]
            comparisons=comparisons("ABC" * 4, PROMPTS[:12]),
        )
    )
    for part in (
        "Class imbalance: 200 desirable to 10",
        "12.5 % of the candidates are incomplete",
        "barely agree",
        "KTO weights leave desirable : undesirable",
        "also curated the data",
        "contains 50 %",
        "12 prompts only",
        "never hit the prefix cache",
    ):
        assert part in text, part


def test_a_clean_run_has_no_warnings() -> None:
    data = whole_run()
    labels = pa.array(["desirable"] * 60 + ["undesirable"] * 60 + ["discard"] * 120)
    score = pa.array([float(1 + (i + 5 * (i % 12 == judge)) % 10) for judge in range(3) for i in range(240)])
    clean = judged(
        "AAB",
        decisions=data.decisions.set_column(1, "label", labels),  # type: ignore[union-attr]
        verdicts=data.verdicts.set_column(2, "score", score),  # type: ignore[union-attr]
        critiques=pa.table({"flawed": [False], "failure_type": ["none"], "parse_status": ["ok"]}),
        kto_weights={"desirable_weight": 1.0, "undesirable_weight": 1.0},
        evaluating_models={"pairwise": "another/model"},
        stage_use=None,
    )
    assert warned(clean) == ""


def test_unread_verdicts_are_warned_of() -> None:
    data = whole_run()
    scores = [None if i % 4 == 0 else s for i, s in enumerate(data.verdicts.column("score").to_pylist())]  # type: ignore[union-attr]
    text = warned(whole_run(verdicts=data.verdicts.set_column(2, "score", pa.array(scores))))  # type: ignore[union-attr]
    assert "Judge helpfulness: 25.0 % of 240 verdicts could not be read." in text


DATA_ONLY = ("prompts", "candidates", "judge", "critic", "gate", "datasets")


def test_a_run_without_a_policy_is_about_its_data() -> None:
    policy = {"train_metrics": None, "comparisons": None, "responses": None, "response_verdicts": None}
    data = whole_run(run=RunIdentity(name="data", stages=DATA_ONLY), **policy, perplexity=None, evaluating_models={})
    metrics = collect_metrics(data)
    found = data_headline(data, metrics)
    assert found.verdict == "data" and "policy" not in found.text and data.missing_stages() == []
    assert found.text.startswith("126 KTO rows and 33 DPO pairs from 60 prompts. ")
    assert "of 240 candidates were kept. Agreement of the 3 judges: Krippendorff's alpha" in found.text
    assert "policy" not in "\n".join(cautions(data, metrics)).lower()
    nothing = whole_run(run=RunIdentity(name="data", stages=DATA_ONLY), dataset_counts=None, dataset_guards=None)
    assert "The run has no datasets yet." in data_headline(nothing, metrics, ["One class is empty."]).text
