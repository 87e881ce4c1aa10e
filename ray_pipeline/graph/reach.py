"""Whether every node of a cluster can work in the run folder and has the keys that it will need.

A path names a place on one machine. The driver writes a probe file, every node reads it back and leaves a file of its
own, and the driver reads those: a folder that is not shared, or is read-only somewhere, is found before anything
starts and not when the first shard of that node is lost.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.node_labels import may_run

#: Seconds that a node has for its answer: it may have to unpack the job's package first.
ANSWER_S = 120.0

#: Ray tells the driver of a submitted job so, in this variable of its environment.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class UnreachableFolder(StoreError):
    """Not every node can work in a folder of the run; the message says which and what to do."""


class KeyMissing(StoreError):
    """A node on which engines may run lacks the environment variable of their key."""


@dataclasses.dataclass(frozen=True)
class WantedKey:
    """An environment variable that the actors of a model read, and the labels of the nodes that may hold them."""

    variable: str
    model: str
    label_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)


def wanted_keys(models: Mapping[str, Any]) -> tuple[WantedKey, ...]:
    """The environment variables that a configuration's models read, by the model's key in the configuration."""
    return tuple(
        WantedKey(model.endpoint.api_key_env, name, model.placement.label_selector)
        for name, model in models.items()
        if model.endpoint is not None and model.endpoint.api_key_env
    )


@dataclasses.dataclass(frozen=True)
class _Node:
    id: str
    address: str
    labels: Mapping[str, str]


def in_a_job() -> bool:
    """Whether this process is the driver of a submitted Ray job."""
    return _JOB_VARIABLE in os.environ


def is_whole(location: str) -> bool:
    """Whether a location says the same from every working folder: an absolute path or a URI."""
    return "://" in location or os.path.isabs(os.path.expanduser(location))


def check_location(location: str, key: str) -> None:
    """Refuse a relative folder for a job: its working folder is a copy that vanishes with the job.

    Raises:
        UnreachableFolder: naming the option or key.
    """
    if not is_whole(location):
        raise UnreachableFolder(
            f"{key} is {location!r}: a job's run folder must be an absolute path that all nodes share (NFS, FSx, a "
            f"volume), or a URI such as s3://bucket/{location.rstrip('/')}; a relative one would vanish with the job"
        )


def check_nodes(folders: Iterable[str], keys: Iterable[WantedKey] = (), answer_s: float = ANSWER_S) -> int:
    """Let every living node read and write in the folders and look for the keys. Needs a connected Ray.

    A cluster of one node, this one, is not asked. Returns how many nodes were.

    Raises:
        UnreachableFolder: a node does not see what the driver wrote, or cannot write there.
        KeyMissing: a node that an engine may run on has no such environment variable.
    """
    # Not at the top: `quorum submit` reads this file for its checks and must start without Ray's weight.
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [
        _Node(node["NodeID"], node["NodeManagerAddress"], node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]
    here = ray.get_runtime_context().get_node_id()
    if [node.id for node in nodes] == [here]:
        return 0
    folders = list(dict.fromkeys(folders))
    wanted = list(keys)
    probe = f"_probe-{uuid.uuid4().hex[:12]}"
    try:
        for location in folders:
            _write_probe(location, probe)
        variables = sorted({key.variable for key in wanted})
        task: Any = ray.remote(num_cpus=0, max_retries=1)(_ask_node)
        answers = {
            task.options(
                name="probe", scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
            ).remote(folders, probe, node.id, variables): node
            for node in nodes
        }
        done, late = ray.wait(list(answers), num_returns=len(answers), timeout=answer_s)
        for ref in late:
            ray.cancel(ref, force=True)
        silent = [answers[ref].address for ref in late]
        for ref in done:
            try:
                trouble, missing = ray.get(ref)
            except ray.exceptions.RayError:  # It left while it was asked: nothing will run there.
                continue
            _refuse(answers[ref], trouble, missing, wanted)
        for location in folders:
            _look_for_answers(location, probe, [answers[ref] for ref in done])
    finally:
        for location in folders:
            _remove_probes(location, probe)
    if silent:
        raise UnreachableFolder(
            f"{len(silent)} of {len(nodes)} nodes ({', '.join(sorted(silent)[:4])}) did not say within "
            f"{answer_s:.0f} s whether they see the run folder; look at their raylets, or take them out of the cluster"
        )
    return len(nodes)


def _write_probe(location: str, probe: str) -> None:
    try:
        Folder(location).write_bytes(probe, probe.encode())
    except OSError as error:
        raise UnreachableFolder(f"{location} cannot be written to from the driver ({error})") from error


def _ask_node(folders: list[str], probe: str, node_id: str, variables: list[str]) -> tuple[dict[str, str], list[str]]:
    """On a node: what is wrong by folder, and the environment variables that are not there."""
    trouble = {}
    for location in folders:
        folder = Folder(location)
        try:
            if folder.read_bytes(probe) != probe.encode():
                trouble[location] = "holds another file of the name that the driver has just written"
                continue
        except FileNotFoundError:
            trouble[location] = "does not show what the driver has just written there: it is not shared"
            continue
        except OSError as error:
            trouble[location] = f"cannot be read ({error})"
            continue
        try:
            folder.write_bytes(f"{probe}-{node_id}", node_id.encode())
        except OSError as error:
            trouble[location] = f"can be read but not written to ({error})"
    return trouble, [name for name in variables if not os.environ.get(name)]


def _refuse(node: _Node, trouble: Mapping[str, str], missing: list[str], wanted: list[WantedKey]) -> None:
    for location, problem in trouble.items():
        raise UnreachableFolder(
            f"on node {node.address} the folder {location} {problem}. Mount one shared folder at the same path on "
            "every node, or give a URI such as s3://bucket/run as --run-dir"
            + ("; if Ray runs there as another user, set run.shared: true" if "ermission" in problem else "")
        )
    for key in wanted:
        if key.variable in missing and may_run(key.label_selector, node.labels):
            raise KeyMissing(
                f"node {node.address} has no environment variable {key.variable}, which {key.model} reads its "
                "key from. Set it for `ray start` there (a secret of the pod or container), or keep the model off "
                f"that node with {key.model}.placement.label_selector"
            )


def _look_for_answers(location: str, probe: str, nodes: list[_Node]) -> None:
    folder = Folder(location)
    for node in nodes:
        if not folder.exists(f"{probe}-{node.id}"):
            raise UnreachableFolder(
                f"what node {node.address} wrote to {location} does not appear on the driver's node: the folder is "
                "not shared both ways. Mount one shared folder on every node, or give a URI as --run-dir"
            )


def _remove_probes(location: str, probe: str) -> None:
    folder = Folder(location)
    try:
        for name in folder.names():
            if name.startswith(probe):
                folder.delete(name)
    except OSError:  # It could not be written to either, and that is what is being told.
        return
