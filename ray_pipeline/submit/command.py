"""The command line of `quorum submit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ray_pipeline.submit.job import CONFIG_FOLDER, ClusterLost, Ended, Job, SubmitError, run_job
from ray_pipeline.submit.package import MAX_BYTES, PackageError, package

#: What `quorum submit` returns beside the exit code of the job itself.
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_err = Console(stderr=True, soft_wrap=True)


def _say(text: str) -> None:
    _err.print(f"quorum: {text}", markup=False, highlight=False)


def submit(
    dag: Annotated[str, typer.Argument(help="workflow, as of `quorum run`")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, handed on to `quorum run`")] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="YAML file here, or the name of one that comes with Quorum")
    ] = "pocket",
    run_dir: Annotated[
        str | None, typer.Option(help="run folder on the cluster: an absolute path that all nodes share, or a URI")
    ] = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="make this stage and what follows anew")] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="stop after this stage")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="stop in good order when the run has cost so much, all its sessions together")
    ] = None,
    device_hour: Annotated[float | None, typer.Option(help="price of one GPU for an hour, for --max-cost")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="log as JSON lines, for log collectors")] = False,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[str, typer.Option(help="what is packed: code, configs, prompt files")] = ".",
    exclude: Annotated[list[str] | None, typer.Option(help="leave these out as well (*, ?, [] as in a shell)")] = None,
    max_mib: Annotated[int, typer.Option(min=1, help="refuse a package that is larger")] = MAX_BYTES // 2**20,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=value for every process of the job; never a key (cluster/README.md)")
    ] = None,
    driver_label: Annotated[list[str] | None, typer.Option(help="label=value that the driver's node must have")] = None,
    driver_resource: Annotated[list[str] | None, typer.Option(help="name=amount that the driver reserves")] = None,
    resubmit: Annotated[int, typer.Option(min=0, help="submit again so often when the driver is lost")] = 0,
    wait: Annotated[bool, typer.Option(help="follow the log to the end and return the job's exit code")] = True,
) -> None:
    """Run a workflow as a job of a Ray cluster. The same command again goes on where the run stopped.

    Packs the working directory without runs, environments, caches and weights; what git ignores stays here too.
    """
    from ray_pipeline.graph.reach import UnreachableFolder, check_location
    from ray_pipeline.store.files import base_name

    try:
        if run_dir is not None:
            check_location(run_dir, "--run-dir")
        packed = package(Path(working_dir).resolve(), exclude or ())
        packed.check(max_mib * 2**20)
        named, extra = _config(config, packed.root, packed.sizes)
        command = ["run", dag, "--config", named, *(overrides or [])]
        given: dict[str, str | float | None] = {"--run-dir": run_dir, "--from": from_stage, "--to": to_stage}
        given |= {"--max-cost": max_cost, "--device-hour": device_hour}
        for option, value in given.items():
            if value is not None:
                command += [option, str(value)]
        command += ["--log-json"] if log_json else []
        job = Job(
            command,
            name=base_name(run_dir) if run_dir else Path(named).stem,
            env=_pairs(env, "--env"),
            resources={k: _amount(k, v) for k, v in _pairs(driver_resource, "--driver-resource").items()},
            labels=_pairs(driver_label, "--driver-label"),
        )
        _say(f"packing {len(packed.sizes)} files, {packed.bytes / 2**20:.1f} MiB, of {packed.root}")
        ended = run_job(address, job, packed, extra_files=extra, resubmits=resubmit, wait=wait, say=_say, write=_write)
    except (PackageError, SubmitError, UnreachableFolder) as error:
        _say(str(error))
        raise typer.Exit(BAD_INPUT) from error
    except ClusterLost as error:
        _say(f"{error}. What is done is kept; the same command goes on from there")
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        _say("not waiting any more; the job goes on. `ray job stop` ends it, the dashboard has its log")
        raise typer.Exit(INTERRUPTED) from None
    if wait:
        raise typer.Exit(exit_code(ended))


def exit_code(ended: Ended) -> int:
    """The job's own exit code, and for a job without one what its end means."""
    if ended.status == "SUCCEEDED":
        return DONE
    if ended.status == "STOPPED":
        _say("the job was stopped; the same command goes on from there")
        return INTERRUPTED
    if ended.exit_code is None or ended.was_cut_off:
        last = ended.message.splitlines()[-1] if ended.message else "no reason given"
        _say(f"the job was cut off: {last}. The same command goes on from there")
    return ended.exit_code if ended.exit_code is not None and ended.exit_code > 0 else FAILED


def _config(config: str, root: Path, packed: dict[str, int]) -> tuple[str, dict[str, bytes]]:
    """The config as the job will name it, and the file if it has to be put into the package."""
    path = Path(config).expanduser()
    if not path.is_file():
        if path.suffix and path.parent != Path("."):
            raise SubmitError(f"there is no config file {config}")
        return config, {}  # one that comes with Quorum; the job says so when it does not
    inside = path.resolve()
    if inside.is_relative_to(root) and inside.relative_to(root).as_posix() in packed:
        return inside.relative_to(root).as_posix(), {}
    named = f"{CONFIG_FOLDER}/{path.name}"
    return named, {named: path.read_bytes()}


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise SubmitError(f"{option} is NAME=value, not {text!r}")
        pairs[name] = value
    return pairs


def _amount(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SubmitError(f"--driver-resource {name} is a number, not {value!r}") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
