"""Where actors run and how many there are, and what of a node must be right before anything starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from pydantic import ValidationError

from ray_pipeline.engines.models import ModelSettings, Placement
from ray_pipeline.graph import reach
from ray_pipeline.graph.ray_shards import GROW_AT, SHRINK_AT, _engine_room, _free_threads, _pool
from ray_pipeline.graph.reach import KeyMissing, UnreachableFolder, WantedKey, _ask_node, _Node, _refuse, wanted_keys
from ray_pipeline.graph.stage import ShardWork
from ray_pipeline.policy.train import _NOT_LEARNT
from ray_pipeline.store.node_labels import may_run
from ray_pipeline.training.spec import TrainSettings

JUDGING = {"quorum-role": "judging", "zone": "a"}


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True),
        ({"quorum-role": "judging"}, True),
        ({"quorum-role": "training"}, False),
        ({"quorum-role": "!training"}, True),
        ({"quorum-role": "!judging"}, False),
        ({"quorum-role": "in(judging, training)"}, True),
        ({"quorum-role": "!in(judging,training)"}, False),
        ({"quorum-role": "in(training)"}, False),
        ({"gpu": "h100"}, False),
        ({"gpu": "!h100"}, True),
        ({"quorum-role": "judging", "zone": "b"}, False),
    ],
)
def test_a_label_selector_means_what_ray_reads_in_it(selector: dict[str, str], fits: bool) -> None:
    assert may_run(selector, JUDGING) is fits


def work(**placement: Any) -> ShardWork:
    return ShardWork(function=lambda given: None, tables=("x",), placement=Placement(**placement))  # type: ignore


def test_an_actor_takes_what_its_placement_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 8.0})
    found = _engine_room(
        work(num_gpus=0.5, num_cpus=1, label_selector=JUDGING, resources={"judge": 1}),
        Placement(num_gpus=0.5, num_cpus=1, label_selector=JUDGING, resources={"judge": 1}),
    )
    assert found == {"num_gpus": 0.5, "num_cpus": 1, "label_selector": JUDGING, "resources": {"judge": 1}}
    ray.data.Dataset.map_batches  # noqa: B018  the four are its arguments by name
    assert set(found) <= set(ray.data.Dataset.map_batches.__annotations__)


@pytest.mark.parametrize(
    ("reserved", "threads", "left"),
    [({}, "1", None), ({"CPU": 1.0}, "1", "1"), ({"CPU": 4.0}, "4", "4"), ({}, "3", "3"), ({}, None, None)],
    ids=["ray's own", "one reserved", "four reserved", "the user's", "unset"],
)
def test_an_engine_has_more_than_one_thread_where_no_cpu_is_reserved(
    monkeypatch: pytest.MonkeyPatch, reserved: dict[str, float], threads: str | None, left: str | None
) -> None:
    class Context:
        get_assigned_resources = staticmethod(lambda: reserved)

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    _free_threads()
    assert os.environ.get("OMP_NUM_THREADS") == left


def test_a_pool_asks_for_all_its_actors_and_grows_again_when_it_can_be_busy() -> None:
    pool = _pool(Placement(min_actors=2, max_actors=8, shards_in_flight=3), batches=100)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (2, 8, 8)
    few = _pool(Placement(min_actors=2, max_actors=8), batches=1)
    assert (few.min_size, few.initial_size, few.max_size) == (1, 1, 1)
    # The most that a pool can be busy is 1: with Ray Data's own threshold it would never grow.
    busiest = pool.max_tasks_in_flight_per_actor / 3
    assert SHRINK_AT < GROW_AT <= busiest


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"resources": {"GPU": 1}}, "set num_gpus"),
        ({"resources": {"CPU": 1}}, "set num_cpus"),
        ({"resources": {"judge": 0}}, "greater than 0"),
        ({"min_actors": 3, "max_actors": 2}, "exceeds max_actors"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(block: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Placement(**block)


def test_tensor_parallelism_stays_inside_one_actor() -> None:
    with pytest.raises(ValidationError, match="tensor_parallel_size 4 needs as many GPUs in one actor"):
        ModelSettings(model="m", tensor_parallel_size=4, placement=Placement(num_gpus=1))
    ModelSettings(model="m", tensor_parallel_size=4, placement=Placement(num_gpus=4))


def test_engines_that_share_a_gpu_share_its_memory() -> None:
    half, whole = Placement(num_gpus=0.5), Placement(num_gpus=1)
    assert ModelSettings(model="m", placement=half).spec().args == {"gpu_memory_utilization": 0.45}
    own = {"gpu_memory_utilization": 0.3, "max_num_seqs": 8}
    assert ModelSettings(model="m", placement=half, args=own).spec().args == own
    assert ModelSettings(model="m", placement=whole).spec().args == {}
    ModelSettings(model="m", tensor_parallel_size=4)


def test_placement_of_training_is_nothing_that_is_learnt() -> None:
    one, other = TrainSettings(), TrainSettings(label_selector=JUDGING, resources={"slot": 1}, autoscaling=True)
    assert one.model_dump(exclude=_NOT_LEARNT) == other.model_dump(exclude=_NOT_LEARNT)


# --- nodes ----------------------------------------------------------------------------------------------------------


def test_the_keys_that_a_configuration_reads() -> None:
    endpoint = {"base_url": "http://x/v1", "api_key_env": "A_KEY"}
    models = {
        "here": ModelSettings(model="m"),
        "there": ModelSettings.model_validate(
            {"engine": "openai", "model": "m", "endpoint": endpoint, "placement": {"label_selector": JUDGING}}
        ),
        "open": ModelSettings.model_validate(
            {"engine": "openai", "model": "m", "endpoint": {"base_url": "http://x/v1", "api_key_env": None}}
        ),
    }
    assert wanted_keys(models) == (WantedKey("A_KEY", "there", JUDGING),)


def test_a_node_that_sees_another_disk_or_lacks_a_key_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "x")
    monkeypatch.delenv("NOT_THERE", raising=False)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/_probe-1").write_bytes(b"_probe-1")
    (tmp_path / "stale").mkdir()
    (tmp_path / "stale/_probe-1").write_bytes(b"of yesterday")
    folders = [str(tmp_path / name) for name in ("shared", "stale", "local")]
    trouble, missing = _ask_node(folders, "_probe-1", "node", ["THERE", "NOT_THERE"])
    assert missing == ["NOT_THERE"]
    assert set(trouble) == set(folders[1:])
    assert "not shared" in trouble[folders[2]] and "another file" in trouble[folders[1]]
    assert (tmp_path / "shared/_probe-1-node").read_bytes() == b"node"


def test_a_node_with_a_read_only_mount_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_probe-1").write_bytes(b"_probe-1")

    def read_only(self: Any, name: str, data: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(reach.Folder, "write_bytes", read_only)
    trouble, _ = _ask_node([str(tmp_path)], "_probe-1", "node", [])
    assert "can be read but not written to" in trouble[str(tmp_path)] and "Read-only" in trouble[str(tmp_path)]
    with pytest.raises(UnreachableFolder, match=r"on node 10\.0\.0\.7 the folder .*Mount one shared folder"):
        _refuse(_Node("id", "10.0.0.7", {}), trouble, [], [])


def test_a_key_is_asked_for_only_where_its_engine_may_run() -> None:
    wanted = [WantedKey("A_KEY", "models.judge", {"quorum-role": "judging"})]
    _refuse(_Node("id", "10.0.0.1", {"quorum-role": "training"}), {}, ["A_KEY"], wanted)
    with pytest.raises(KeyMissing, match=r"node 10\.0\.0\.2 has no environment variable A_KEY, which models\.judge"):
        _refuse(_Node("id", "10.0.0.2", JUDGING), {}, ["A_KEY"], wanted)


def test_what_a_node_wrote_must_reach_the_driver(tmp_path: Path) -> None:
    (tmp_path / "_probe-1-here").write_bytes(b"")
    nodes = [_Node("here", "10.0.0.1", {}), _Node("there", "10.0.0.2", {})]
    with pytest.raises(UnreachableFolder, match=r"10\.0\.0\.2 .*not shared both ways"):
        reach._look_for_answers(str(tmp_path), "_probe-1", nodes)
    (tmp_path / "_probe-1").write_bytes(b"")
    reach._remove_probes(str(tmp_path), "_probe-1")
    assert os.listdir(tmp_path) == []


def test_a_run_folder_that_the_driver_cannot_write_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnreachableFolder, match="cannot be written to from the driver"):
        reach._write_probe(str(tmp_path / "file" / "run"), "_probe-1")
