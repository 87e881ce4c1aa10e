"""summary.csv: one row of key figures, its columns the same for every run."""

from typing import Any

from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.headline import Headline
from ray_pipeline.evaluate.metrics import RunMetrics, dataset_rows, prefix_hit_rate, total_use
from ray_pipeline.store.schemas import LABELS


def summary_row(data: ReportData, metrics: RunMetrics, headline: Headline, warnings: int) -> dict[str, Any]:
    """Column → figure, None where the run has none. With several evaluating judges the win rate is the first one's."""
    row: dict[str, Any] = {
        "run": data.run.name,
        "workflow": data.run.workflow,
        "config_digest": data.run.config_digest,
        "verdict": headline.verdict,
        "missing_stages": " ".join(data.missing_stages()),
        "warnings": warnings,
        "prompts_read": (data.prompt_counts or {}).get("read"),
        "prompts_kept": (data.prompt_counts or {}).get("kept"),
        "candidates": None if data.candidates is None else len(data.candidates),
    }
    row |= _curation(data, metrics) | _training(metrics) | _evaluation(metrics)
    use = total_use(data.stage_use or ())
    for column in ("calls", "log_hits", "prompt_tokens", "completion_tokens", "seconds"):
        row[column] = getattr(use, column)
    return row | {"prefix_hit_rate": prefix_hit_rate(use)}


def _curation(data: ReportData, metrics: RunMetrics) -> dict[str, Any]:
    gate, judging, critic = metrics.gate, metrics.judging, metrics.critic
    kappas = [pair.value for pair in judging.kappas if pair.value is not None] if judging else []
    counts = data.dataset_counts or {}
    return {
        "judged": judging and judging.judged,
        **{label: gate and gate.labels[label].count for label in LABELS},
        "acceptance": gate and gate.acceptance,
        "desirable_mean": gate and gate.desirable.mean,
        "undesirable_mean": gate and gate.undesirable.mean,
        "score_gap": gate and gate.gap,
        "alpha": judging and judging.alpha,
        "kappa_min": min(kappas, default=None),
        "kappa_mean": sum(kappas) / len(kappas) if kappas else None,
        "flawed_share": critic and critic.flawed_share,
        "kto_rows": dataset_rows(counts["kto"]) if "kto" in counts else None,
        "dpo_pairs": dataset_rows(counts["dpo"]) if "dpo" in counts else None,
    }


def _training(metrics: RunMetrics) -> dict[str, Any]:
    trends = metrics.training.trends if metrics.training else {}
    last = {m: trends[m].last if m in trends else None for m in ("loss", "rewards_margins", "kl")}
    return {
        "train_steps": metrics.training and metrics.training.steps,
        "train_loss_last": last["loss"],
        "reward_margin_last": last["rewards_margins"],
        "kl_last": last["kl"],
    }


def _evaluation(metrics: RunMetrics) -> dict[str, Any]:
    evaluation = metrics.evaluation
    rate = evaluation.win_rates[0] if evaluation and evaluation.win_rates else None
    row: dict[str, Any] = {
        "win_judge": rate and rate.judge,
        "win_pairs": rate and rate.pairs,
        "win_unread": rate and rate.unread,
        "win_rate": rate and rate.win_rate,
        "tie_rate": rate and rate.tie_rate,
        "loss_rate": rate and rate.loss_rate,
        "win_score": rate and rate.score.mean,
        "win_score_low": rate and rate.score.low,
        "win_score_high": rate and rate.score.high,
        "flip_rate": rate and rate.flip_rate,
    }
    responses = {(r.model, r.mode): r for r in evaluation.responses} if evaluation else {}
    for model in ("base", "policy"):
        for mode in ("greedy", "sampled"):
            stats = responses.get((model, mode))
            row[f"accuracy_{mode}_{model}"] = stats.accuracy.mean if stats and stats.accuracy else None
        found = evaluation.perplexity.get(model) if evaluation else None
        row[f"perplexity_{model}"] = found.ppl if found else None
    return row
