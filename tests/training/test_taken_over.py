"""Policies that are used again: of an earlier fingerprint of a training stage, and of another stage with equal rows."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.driver import RunSettings, execute
from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.policy import train as stage
from ray_pipeline.policy.train import train, train_policy
from ray_pipeline.store.files import RESULT, Folder
from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.training.spec import TrainResult, TrainSettings, TrainSpec

from .conftest import MakeSpec
from .shapes import make_model


class PolicyWorld:
    """Runs of datasets and train in one folder, where training only writes down that it took place."""

    def __init__(self, folder: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.trainings = folder, ModelSettings(model=tiny_model), 0
        self.starts: list[str | None] = []
        monkeypatch.setattr(stage, "fit", self._fit)
        monkeypatch.setattr("ray_pipeline.graph.cluster.connected", lambda **_: contextlib.nullcontext())
        monkeypatch.setattr("ray_pipeline.graph.in_process.warm_python", lambda **_: contextlib.nullcontext())
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})

    def _fit(self, spec: TrainSpec, warn: Callable[[str], None]) -> TrainResult:
        self.trainings += 1
        self.starts.append(spec.adapter)
        for part in ("adapter", "merged"):
            (Folder(spec.output_dir) / part).write_bytes("model.safetensors", f"{part} {self.trainings}".encode())
        row = {name: None for name in TRAIN_METRICS.names} | {"step": self.trainings, "split": "train"}
        metrics = pa.Table.from_pylist([row], TRAIN_METRICS)
        return TrainResult(1, 1.0, 0.5, None, f"{spec.output_dir}/merged", {}, {}, None, None, metrics, 1.0, 1.0)

    def run(
        self,
        tau: float,
        rows: Sequence[str] = ("a", "b"),
        *,
        score: float = 8.0,
        per_file: int = 10,
        from_group: str | None = None,
        **more: Any,
    ) -> StageResult:
        dag = Dag("d", [train(TrainSettings(**more), self.model, 64, data_of("datasets", tau, rows, score, per_file))])
        return self._execute(dag, from_group)["train"]

    def compare(
        self, *rows: str, seeds: Sequence[int] = (0,), steps_of: str = "", from_group: str | None = None
    ) -> dict[str, StageResult]:
        """Policies of one comparison, called by their rows' place and seed (`0-s0`); a letter is a row.

        Args:
            steps_of: rows whose number of steps all policies take; "": each those of its own.
        """
        names = [f"train-{i}-s{seed}" for i in range(len(rows)) for seed in seeds]
        counted = data_of("datasets-counted", 0, steps_of) if steps_of else None
        made = [
            train(
                TrainSettings(seed=seed, save="adapter"),
                self.model,
                64,
                data_of(f"datasets-{i}-s{seed}", i, letters),
                name=f"train-{i}-s{seed}",
                view="",
                steps_of=counted,
                alike=names,
            )
            for i, letters in enumerate(rows)
            for seed in seeds
        ]
        results = self._execute(Dag("d", made), from_group)
        return {name.removeprefix("train-"): results[name] for name in names}

    def follow(self, tau: float, first: Sequence[str], second: Sequence[str]) -> StageResult:
        """The policy that is trained on the second rows, from that of the first."""
        before, after = data_of("datasets", ord(first[0]), first), data_of("datasets-2", tau, second)
        start = train(TrainSettings(), self.model, 64, before)
        policy = train(TrainSettings(), self.model, 64, after, name="train-2", start=start)
        return self._execute(Dag("d", [start, policy]), None)["train-2"]

    def _execute(self, dag: Dag, from_group: str | None) -> dict[str, StageResult]:
        session = Session(str(self.folder), str(self.folder / "calls"), 1)
        settings = RunSettings(session, {}, beat_seconds=0.1)
        outcome = execute(dag, settings, InProcessExecutor(), from_group=from_group, console=Console(quiet=True))
        assert not outcome.failures, outcome.failures
        return outcome.results


def data_of(name: str, tau: float, rows: Sequence[str], score: float = 8.0, per_file: int = 10) -> Stage:
    """A datasets stage with these KTO rows."""

    def write(given: WholeInput) -> dict[str, Any]:
        table = pa.table(
            {
                "prompt": [[{"role": "user", "content": row}] for row in rows],
                "completion": [[{"role": "assistant", "content": row}] for row in rows],
                "label": [i % 2 == 0 for i in range(len(rows))],
                "final_score": [score] * len(rows),
            }
        )
        for start in range(0, len(rows), per_file):
            part = table.slice(start, per_file)
            (given.folder / "kto/train").write_table(f"part-{start:05d}.parquet", part, fingerprint="d" * 16)
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        return {"rows": {"kto": {"train": len(rows), "val": 0}}, "kto_weights": weights}

    return Stage(name, WholeWork(write), {"tau": tau})


@pytest.fixture
def policies(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> PolicyWorld:
    return PolicyWorld(tmp_path / "run", tiny_model, monkeypatch)


def test_a_threshold_that_changes_no_row_trains_nothing(policies: PolicyWorld) -> None:
    first = policies.run(2.5)
    again = policies.run(1.5, score=9.0, per_file=1)  # what no trainer reads is no content
    assert policies.trainings == 1 and again.fingerprint != first.fingerprint
    assert again.facts == {**first.facts, "taken_from": f"train-{first.fingerprint}"}
    shutil.rmtree(first.folder)  # `quorum clean` may do so
    assert (policies.folder / "policy").resolve() == Path(again.folder)
    for part in ("adapter", "merged"):
        assert (Path(again.folder) / part / "model.safetensors").read_text() == f"{part} 1"
    metrics = Folder(again.folder).read_table(stage.METRICS, fingerprint=again.fingerprint, schema=TRAIN_METRICS)
    assert metrics["step"].to_pylist() == [1]
    assert policies.run(1.5).cached and policies.run(0.5).facts["taken_from"] == f"train-{again.fingerprint}"
    assert policies.trainings == 1


def test_other_rows_or_settings_train_another_policy(policies: PolicyWorld) -> None:
    policies.run(2.5)
    policies.run(1.5, ["a", "c"])
    policies.run(1.4, ["b", "a"])  # the order is content: TRL reads KTO rows in it
    policies.run(1.3, seed=7)
    policies.run(1.2, desirable_weight=2.0)
    assert policies.trainings == 5
    policies.run(1.1, from_group="datasets")  # the user asks for a new policy
    policies.run(1.1, from_group="train")
    assert policies.trainings == 7


def test_an_unfinished_policy_is_not_taken_over(policies: PolicyWorld) -> None:
    first = policies.run(2.5)
    Folder(first.folder).delete(RESULT)
    policies.run(1.5)
    assert policies.trainings == 2


def test_a_policy_goes_by_the_one_that_it_starts_from(policies: PolicyWorld) -> None:
    first = policies.follow(2.5, "ab", "cd")
    start = next(policies.folder.glob("train-????????????????"))
    assert policies.starts == [None, str(start / "adapter")]
    again = policies.follow(1.5, "ab", "cd")  # the same rows under another fingerprint
    assert policies.trainings == 2 and again.fingerprint != first.fingerprint
    assert again.facts["taken_from"] == Path(first.folder).name
    policies.follow(1.4, "ba", "cd")  # from another policy
    assert policies.trainings == 4


def weights_of(policy: StageResult) -> str:
    return (Path(policy.folder) / "adapter" / "model.safetensors").read_text()


def test_equal_rows_and_settings_are_trained_once_in_a_comparison(policies: PolicyWorld) -> None:
    found = policies.compare("abcd", "abcd", "abdc", "abcd", seeds=(0, 1))
    assert policies.trainings == 4  # of two contents and two seeds
    for seed in (0, 1):
        first = found[f"0-s{seed}"]
        for equal in (found[f"1-s{seed}"], found[f"3-s{seed}"]):
            assert weights_of(equal) == weights_of(first) and equal.facts["taken_from"] == Path(first.folder).name
            assert equal.facts["learnt_from"] == first.facts["learnt_from"] != found[f"2-s{seed}"].facts["learnt_from"]
            assert (Folder(equal.folder)).read_table(stage.METRICS, fingerprint=equal.fingerprint).num_rows == 1
    assert len({weights_of(policy) for policy in found.values()}) == 4
    # Each is whole by itself, and done: a rerun makes none of them again.
    shutil.rmtree(found["0-s0"].folder)
    assert policies.compare("abcd", "abcd", "abdc", "abcd", seeds=(0, 1))["3-s0"].cached
    assert policies.trainings == 4
    policies.compare("abcd", "abcd", from_group="train")  # the user asks for new policies
    assert policies.trainings == 6


@pytest.mark.parametrize(("counted", "trainings"), [("wxyz", 1), ("w" * 64, 2)])
def test_the_steps_of_as_many_rows_are_those_of_the_epochs(policies: PolicyWorld, counted: str, trainings: int) -> None:
    policies.compare("abcd")
    policies.compare("abcd", steps_of=counted)
    assert policies.trainings == trainings


def test_equal_trainings_at_the_same_time_both_train(policies: PolicyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    both, counted, fit = threading.Barrier(2, timeout=30), threading.Lock(), policies._fit

    def meet(spec: TrainSpec, warn: Callable[[str], None]) -> TrainResult:
        both.wait()
        with counted:
            return fit(spec, warn)

    monkeypatch.setattr(stage, "fit", meet)
    run, names = Folder(str(policies.folder)), ("train-a", "train-b")
    found: dict[str, Mapping[str, Any]] = {}

    def make(name: str) -> None:
        data = data_of(f"datasets-{name}", 0, "abcd")
        made = train(TrainSettings(), policies.model, 64, data, name=name, view="", alike=names)
        rows = StageResult(data.name, data.fingerprint, f"{run.location}/{data.folder_name}", 1, (), {}, {
            "rows": {"kto": {"train": 4, "val": 0}}, "kto_weights": {},
        })  # fmt: skip
        folder = run / made.folder_name
        found[name] = train_policy(
            WholeInput(
                {"datasets": rows}, folder, folder, made.fingerprint, 1, made.work.settings, lambda line: None,
                lambda *step: None, settings_key=made.settings_key,
            )
        )  # fmt: skip

    threads = [threading.Thread(target=make, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert policies.trainings == 2 and not any("taken_from" in facts for facts in found.values())
    assert found["train-a"]["learnt_from"] == found["train-b"]["learnt_from"]


@pytest.mark.e2e
def test_the_steps_of_the_epochs_train_the_same_policy(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Why a policy with the reference's steps may be that of its epochs, where it has as many rows."""
    import torch
    from safetensors.torch import load_file

    from ray_pipeline.training.save import write_model
    from ray_pipeline.training.trainer import build_trainer

    torch.set_num_threads(1)  # matrices this small only wait for each other
    by_epochs = make_spec("kto", model=make_model(tmp_path / "base", "llama"), num_workers=1, learning_rate=0.02)
    policies, steps = [], None
    for name in ("epochs", "steps"):
        spec = dataclasses.replace(by_epochs, output_dir=str(tmp_path / name), steps=steps)
        trainer = build_trainer(spec, str(tmp_path / name / "scratch"))
        trainer.train()
        steps = trainer.state.global_step
        write_model(spec, trainer, lambda kind: kind)
        policies.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    one, other = policies
    assert steps == by_epochs.steps_for(48) and one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
