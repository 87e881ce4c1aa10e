"""A run as a Ray job: submit the package, follow its log, hand back its exit code, submit again what was cut off."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.submit.package import Package

#: Seconds to wait for an answer of the job server before a lost connection is believed, and between two questions.
PATIENCE_S = 60.0
#: Seconds that a lost head has to come back before what was cut off is given up.
AGAIN_S = 10 * PATIENCE_S
POLL_S = 0.5

#: Folder of the package for a config file that lies outside the working directory.
CONFIG_FOLDER = "submitted-config"

#: What a run on a cluster wants to find in the environment of every process.
JOB_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class SubmitError(ValueError):
    """The job cannot be submitted as it is asked for; the message names what is wrong and the remedy."""


class ClusterLost(RuntimeError):
    """The job server does not answer, or does not know the job any more: the head is gone or was started anew."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run on the cluster.

    Attributes:
        command: arguments of `quorum`, for example ["run", "dmapo", "--config", "configs/dmapo.yaml", …].
        name: for the submission id, which people read in the dashboard.
        env: environment variables of every process of the job. Never keys: they would lie in the cluster's records.
        num_cpus: CPUs that the driver reserves.
        resources, labels: custom resources and node labels that the driver's node must have.
    """

    command: Sequence[str]
    name: str
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_cpus: float = 0.0
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "ray_pipeline.cli", *self.command])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended. `exit_code` is its command's own; None: it was ended from outside and had no last word."""

    status: str
    exit_code: int | None
    message: str

    @property
    def was_cut_off(self) -> bool:
        """Whether the driver went down with its node, or was killed: the same command goes on from there."""
        return self.status == "FAILED" and (self.exit_code is None or self.exit_code < 0 or self.exit_code >= 128)


def run_job(
    address: str,
    job: Job,
    package: Package,
    *,
    extra_files: Mapping[str, bytes] | None = None,
    resubmits: int = 0,
    wait: bool = True,
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> Ended:
    """Submit a job and follow it to its end; what was cut off is submitted again, at most `resubmits` times.

    Args:
        address: of the job server, for example http://127.0.0.1:8265.
        extra_files: content by path in the package, beside the working directory.
        wait: False: come back as soon as the job is accepted.
        say: gets sentences about the job; `write` its log as it comes.

    Raises:
        SubmitError: no job server answers at the address, or it refuses the job.
        ClusterLost: the connection broke off and stayed away.
    """
    tries = 0
    while True:
        client, id_ = _accepted(address, job, package, extra_files or {}, patience_s=AGAIN_S if tries else 0.0)
        say(f"submitted {id_}: {job.entrypoint}")
        if not wait:
            return Ended("PENDING", None, "")
        try:
            ended = follow(client, id_, write)
        except ClusterLost as error:
            if tries >= resubmits:
                raise
            why = str(error)
        else:
            if not ended.was_cut_off or tries >= resubmits:
                return ended
            why = (ended.message or ended.status).splitlines()[-1]
        tries += 1
        say(f"{id_} was cut off ({why}); submitting it again, {tries} of {resubmits}")


def _accepted(
    address: str, job: Job, package: Package, extra_files: Mapping[str, bytes], patience_s: float
) -> tuple[Any, str]:
    """A client, and the id under which the cluster took the job.

    Args:
        patience_s: a head that went down has so long to come back, and its agents to be there again.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            client, id_ = connect(address), submission_id(job.name)
            _submit(client, job, package, extra_files, id_)
            return client, id_
        except SubmitError:
            if time.monotonic() >= end:
                raise
            time.sleep(10 * POLL_S)


def connect(address: str) -> Any:
    """A client of the job server. Raises SubmitError when nobody answers there."""
    from ray.job_submission import JobSubmissionClient

    if not re.match(r"https?://", address):
        raise SubmitError(f"--address is the URL of the dashboard, for example http://HEAD:8265, not {address}")
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, OSError) as error:
        raise SubmitError(
            f"no job server answers at {address} ({str(error).splitlines()[0]}). Is the cluster up, with "
            "`ray[default]` on the head? From outside, make a tunnel first (`ray dashboard`, `kubectl port-forward`)"
        ) from error


def submission_id(name: str) -> str:
    """A new id that starts with the run's name. A job server takes each id once."""
    return f"quorum-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}-{uuid.uuid4().hex[:8]}"


def _submit(client: Any, job: Job, package: Package, extra_files: Mapping[str, bytes], id_: str) -> None:
    # The files that were chosen are laid out in a folder of their own, so that what was checked is what goes.
    # Ray would look for a .gitignore there once more, which does not know what git tracks in spite of it.
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="quorum-submit-") as folder:
        package.copy_to(Path(folder))
        for name, content in extra_files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=id_,
                runtime_env={"working_dir": folder, "env_vars": {**JOB_ENV, **job.env}},
                metadata={"quorum": job.name},
                entrypoint_num_cpus=job.num_cpus,
                entrypoint_resources=dict(job.resources) or None,
                entrypoint_label_selector=dict(job.labels) or None,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise SubmitError(f"the cluster refuses the job: {error}") from error


def follow(client: Any, id_: str, write: Callable[[str], None], patience_s: float = PATIENCE_S) -> Ended:
    """Write a job's log as it comes and wait for its end.

    A log stream that breaks off is taken up where it was; the job's state decides, not the stream.

    Raises:
        ClusterLost: the job server was silent for `patience_s`, or does not know the job any more.
    """
    written = 0
    silent_since: float | None = None

    async def tail() -> None:
        nonlocal written
        skip = written
        async for text in client.tail_job_logs(id_):
            new, skip = text[skip:], max(0, skip - len(text))
            if new:
                written += len(new)
                write(new)

    while True:
        try:
            asyncio.run(tail())
        except Exception:  # The state, asked next, tells a hiccup from an end.
            time.sleep(POLL_S)
        try:
            info = client.get_job_info(id_)
            silent_since = None
        except Exception as error:
            if "does not exist" in str(error) or "404" in str(error):
                raise ClusterLost(f"the cluster does not know {id_} any more: its head was started anew") from error
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > patience_s:
                raise ClusterLost(f"the cluster has not answered for {patience_s:.0f} s about the job {id_}") from error
            time.sleep(POLL_S)
            continue
        if info.status.is_terminal():
            rest = _whole_log(client, id_)[written:]
            if rest:
                write(rest)
            return Ended(str(info.status.value), info.driver_exit_code, (info.message or "").strip())
        time.sleep(POLL_S)


def _whole_log(client: Any, id_: str) -> str:
    try:
        return str(client.get_job_logs(id_))
    except Exception:  # The job's end is the news; the last lines of its log are in the dashboard.
        return ""
