"""The command line of `quorum submit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ray_pipeline.submit.job import CONFIG_FOLDER, ClusterLost, Ended, Job, SubmitError, run_job
from ray_pipeline.submit.package import MAX_BYTES, PackageError, package

#: Exit codes of `quorum submit`, beside those of the job itself.
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_err = Console(stderr=True, soft_wrap=True)


def _say(text: str) -> None:
    _err.print(f"quorum: {text}", markup=False, highlight=False)


def submit(
    dag: Annotated[str, typer.Argument(help="workflow, as for `quorum run`")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, passed on to `quorum run`")] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="local YAML file, or the name of one that comes with Quorum")
    ] = "pocket",
    run_dir: Annotated[
        str | None, typer.Option(help="run folder on the cluster: an absolute path that all nodes share, or a URI")
    ] = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="rerun this stage and everything downstream")] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="stop after this stage")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="stop gracefully once total spend across sessions reaches this amount")
    ] = None,
    device_hour: Annotated[float | None, typer.Option(help="price of one GPU for an hour, for --max-cost")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="log as JSON lines, for log collectors")] = False,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[str, typer.Option(help="folder to package: code, configs, prompt files")] = ".",
    exclude: Annotated[
        list[str] | None, typer.Option(help="further files to leave out (shell patterns: *, ?, [])")
    ] = None,
    max_mib: Annotated[int, typer.Option(min=1, help="refuse a larger package")] = MAX_BYTES // 2**20,
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME=value for every process of the job; never an API key (cluster/README.md)"),
    ] = None,
    driver_label: Annotated[list[str] | None, typer.Option(help="required label=value of the driver's node")] = None,
    driver_resource: Annotated[list[str] | None, typer.Option(help="name=amount to reserve for the driver")] = None,
    resubmit: Annotated[int, typer.Option(min=0, help="maximum number of resubmissions after a lost driver")] = 0,
    wait: Annotated[bool, typer.Option(help="follow the log to the end and return the job's exit code")] = True,
) -> None:
    """Run a workflow as a job of a Ray cluster, or resume it: the same command does both.

    Packages the working directory without runs, environments, caches, weights and files that git ignores.
    """
    from ray_pipeline.graph.reach import UnreachableFolder, check_location
    from ray_pipeline.store.files import base_name

    try:
        if run_dir is not None:
            check_location(run_dir, "--run-dir")
        packed = package(Path(working_dir).resolve(), exclude or ())
        packed.check(max_mib * 2**20)
        config_name, extra = _config(config, packed.root, packed.sizes)
        command = ["run", dag, "--config", config_name, *(overrides or [])]
        options: dict[str, str | float | None] = {"--run-dir": run_dir, "--from": from_stage, "--to": to_stage}
        options |= {"--max-cost": max_cost, "--device-hour": device_hour}
        for option, value in options.items():
            if value is not None:
                command += [option, str(value)]
        command += ["--log-json"] if log_json else []
        job = Job(
            command,
            name=base_name(run_dir) if run_dir else Path(config_name).stem,
            env=_pairs(env, "--env"),
            resources={k: _amount(k, v) for k, v in _pairs(driver_resource, "--driver-resource").items()},
            labels=_pairs(driver_label, "--driver-label"),
        )
        _say(f"packaging {len(packed.sizes)} files ({packed.bytes / 2**20:.1f} MiB) of {packed.root}")
        ended = run_job(address, job, packed, extra_files=extra, resubmits=resubmit, wait=wait, say=_say, write=_write)
    except (PackageError, SubmitError, UnreachableFolder) as error:
        _say(str(error))
        raise typer.Exit(BAD_INPUT) from error
    except ClusterLost as error:
        _say(f"{error}. Finished work is kept; rerun the same command to resume")
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        _say("stopped following; the job continues. Use `ray job stop` to stop it; its log is in the dashboard")
        raise typer.Exit(INTERRUPTED) from None
    if wait:
        raise typer.Exit(exit_code(ended))


def exit_code(ended: Ended) -> int:
    """The job's own exit code, or the one for its final status."""
    if ended.status == "SUCCEEDED":
        return DONE
    if ended.status == "STOPPED":
        _say("the job was stopped; rerun the same command to resume")
        return INTERRUPTED
    if ended.exit_code is None or ended.was_cut_off:
        last = ended.message.splitlines()[-1] if ended.message else "no reason given"
        _say(f"the job was interrupted: {last}. Rerun the same command to resume")
    return ended.exit_code if ended.exit_code is not None and ended.exit_code > 0 else FAILED


def _config(config: str, root: Path, packed: dict[str, int]) -> tuple[str, dict[str, bytes]]:
    """The config's name in the package, and the file's content if it has to be added to the package."""
    path = Path(config).expanduser()
    if not path.is_file():
        if path.suffix and path.parent != Path("."):
            raise SubmitError(f"no config file {config}; check --config")
        return config, {}  # a shipped one; if it does not exist, the job reports it
    inside = path.resolve()
    if inside.is_relative_to(root) and inside.relative_to(root).as_posix() in packed:
        return inside.relative_to(root).as_posix(), {}
    name = f"{CONFIG_FOLDER}/{path.name}"
    return name, {name: path.read_bytes()}


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise SubmitError(f"{option} must be NAME=value, not {text!r}")
        pairs[name] = value
    return pairs


def _amount(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SubmitError(f"--driver-resource {name} must be a number, not {value!r}") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
