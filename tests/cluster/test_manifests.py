"""What lies in cluster/ against the schemas of those who read it: KubeRay, `ray up`, the shell."""

from __future__ import annotations

import copy
import gzip
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

import ray_pipeline
from ray_pipeline.config.loading import apply_override, read_yaml
from ray_pipeline.store.node_labels import may_run
from ray_pipeline.store.secrets import looks_like_key, names_secret_variable
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.published import DATA, needs

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = DATA / "kuberay"
RAY_UP = CLUSTER / "ray-up/aws.yaml"
MANIFESTS = {"raycluster.yaml": "rayclusters", "rayjob.yaml": "rayjobs"}


def schema(kind: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((KUBERAY / f"ray.io_{kind}.v1.openapi.json.gz").read_bytes()))


def problems(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """What a Kubernetes API server would refuse or drop without a word: wrong types, and keys that nobody reads."""
    found = [
        f"{where}/{'/'.join(map(str, e.path))}: {e.message}"
        for e in jsonschema.Draft7Validator(schema).iter_errors(value)
    ]
    return found + _unread(value, schema, where)


def _unread(value: Any, schema: dict[str, Any], where: str) -> list[str]:
    found: list[str] = []
    if isinstance(value, dict) and "properties" in schema:
        for key, inner in value.items():
            if key not in schema["properties"]:
                found.append(f"{where}/{key}: there is no such key")
            else:
                found += _unread(inner, schema["properties"][key], f"{where}/{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, inner in enumerate(value):
            found += _unread(inner, schema["items"], f"{where}/{i}")
    return found


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "kuberay" / name).read_text())


def spec(name: str) -> dict[str, Any]:
    found = manifest(name)["spec"]
    return found.get("rayClusterSpec", found)


@needs("kuberay")
@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_reads_every_key(name: str) -> None:
    assert problems(manifest(name), schema(MANIFESTS[name])) == []


@needs("kuberay")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("enableInTreeAutoscaling",), "yes"),
        (("workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("workerGroupSpecs", 0, "maxReplica"), 8),
        (("headGroupSpec", "template", "spec", "containers", 0, "imagee"), "x"),
    ],
)
def test_the_check_finds_mistakes(path: tuple[Any, ...], value: Any) -> None:
    wrong = copy.deepcopy(manifest("raycluster.yaml"))
    place = wrong["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert len(problems(wrong, schema("rayclusters"))) == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_generation_judging_and_training_have_groups_of_their_own(name: str) -> None:
    found = spec(name)
    assert found["rayVersion"] == importlib.metadata.version("ray")
    assert found["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in found["workerGroupSpecs"]}
    assert set(groups) == {"endpoints", "generation", "judging", "training"}
    pods = [found["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in groups.values())]
    for pod in pods:
        (container,) = pod["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == manifest("storage.yaml")["metadata"]["name"]
        assert "envFrom" not in container  # which would give every key to the pod
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for name_, group in groups.items():
        assert group["labels"] == {"quorum-role": name_}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert gpus == 0 if name_ == "endpoints" else gpus >= 1
    assert "nvidia.com/gpu" not in pods[0]["containers"][0]["resources"]["limits"]


def pod_templates(name: str) -> dict[str, dict[str, Any]]:
    """Group → template of its pods, the submitter of a RayJob included."""
    found = spec(name)
    templates = {group["groupName"]: group["template"] for group in found["workerGroupSpecs"]}
    templates["head"] = found["headGroupSpec"]["template"]
    submitter = manifest(name)["spec"].get("submitterPodTemplate")
    return templates | ({"submitter": submitter} if submitter else {})


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_cluster_requires_a_token(name: str) -> None:
    assert spec(name)["authOptions"] == {"mode": "token"}
    host = spec(name)["headGroupSpec"]["rayStartParams"]["dashboard-host"]
    # KubeRay follows a RayJob over the network; the dashboard of a cluster is for `kubectl port-forward` alone.
    assert host == ("0.0.0.0" if name == "rayjob.yaml" else "127.0.0.1")


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_api_key_is_in_the_pods_that_call_endpoints_alone(name: str) -> None:
    for group, template in pod_templates(name).items():
        (container,) = template["spec"]["containers"]
        keys = {
            variable["name"]: variable["valueFrom"]["secretKeyRef"]
            for variable in container.get("env", [])
            if "valueFrom" in variable
        }
        expected = {"endpoints": {"OPENAI_API_KEY"}, "submitter": set()}.get(group, {"HF_TOKEN"})
        assert set(keys) == expected, group
        assert all(key == {"name": "quorum-keys", "key": n, "optional": True} for n, key in keys.items())
        assert not any(looks_like_key(str(v.get("value"))) or names_secret_variable(v["name"]) for v in
                       container.get("env", []) if "value" in v)  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_run_without_rights(name: str) -> None:
    for group, template in pod_templates(name).items():
        pod = template["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 1001, group
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
        assert (pod.get("automountServiceAccountToken") is False) == (group != "head")  # the head starts workers
    assert spec(name)["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_network_policy_selects_every_pod_and_opens_no_port_to_others(name: str) -> None:
    policy = manifest("network.yaml")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    for group, template in pod_templates(name).items():
        assert selected.items() <= template["metadata"]["labels"].items(), group
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for rule in policy["ingress"]:
        for peer in rule["from"]:
            labels = peer["podSelector"]["matchLabels"]
            own = labels == selected and "namespaceSelector" not in peer
            assert own or (labels == {"app.kubernetes.io/name": "kuberay-operator"} and rule["ports"] == [
                {"protocol": "TCP", "port": 8265}])  # fmt: skip
    assert all(rule.get("to") for rule in policy["egress"])


def test_images_are_pinned_by_version_or_digest() -> None:
    files = [path for path in CLUSTER.rglob("*") if path.suffix in (".yaml", "", ".cpu") and path.is_file()]
    text = "\n".join(path.read_text() for path in files)
    images = re.findall(r"^(?: +(?:- )?image: |ARG \w+_IMAGE=)(\S+)", text, re.MULTILINE)
    assert len(images) > 8
    for image in images:
        assert re.search(r"@sha256:|:\d+\.\d+\.\d+", image), image
        if image.startswith("REGISTRY/quorum:"):
            assert image.removeprefix("REGISTRY/quorum:").startswith(f"{ray_pipeline.__version__}-")
    assert not re.findall(r"^FROM (?!\$\{)", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "ray-up/aws.yaml"])
def test_one_command_pins_every_image_by_digest(name: str, tmp_path: Path) -> None:
    def pin(gpu: str, cpu: str, path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CLUSTER / "pin.sh", gpu, cpu, path], capture_output=True, text=True)

    gpu, cpu = f"localhost:5000/quorum@sha256:{'a' * 64}", f"registry.example/quorum@sha256:{'b' * 64}"
    pinned = pin(gpu, cpu, CLUSTER / name)
    assert pinned.returncode == 0, pinned.stderr
    before, after = (re.findall(r"image: (\S+)", text) for text in ((CLUSTER / name).read_text(), pinned.stdout))
    assert after == [gpu if image.endswith("-gpu") else cpu for image in before] and after
    assert yaml.safe_load(pinned.stdout).keys() == yaml.safe_load((CLUSTER / name).read_text()).keys()
    refused = pin("REGISTRY/quorum:0.1.0-gpu", cpu, CLUSTER / name)
    assert refused.returncode == 2 and "not pinned by digest" in refused.stderr and not refused.stdout
    (tmp_path / "own.yaml").write_text((CLUSTER / name).read_text() + "# \nx: {}\ny:\n  - image: other:1.0.0\n")
    own = pin(gpu, cpu, tmp_path / "own.yaml")
    assert own.returncode == 2 and "other:1.0.0" in own.stderr and not own.stdout


def test_ray_up_hands_the_token_to_every_node_and_keeps_the_dashboard_on_the_head() -> None:
    found = yaml.safe_load(RAY_UP.read_text())
    assert found["file_mounts"] == {"/home/quorum/.ray/auth_token": "~/.ray/auth_token"}
    assert "-e RAY_AUTH_MODE=token" in found["docker"]["run_options"]
    assert not any("env-file" in option for option in found["docker"]["run_options"])
    head = " ".join(found["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head


def test_the_readme_says_how_the_token_reaches_the_user() -> None:
    text = (CLUSTER / "README.md").read_text()
    assert "kubectl get secret quorum -o jsonpath='{.data.auth_token}'" in text
    assert "ray get-auth-token --generate" in text and "RAY_AUTH_MODE=token" in text
    assert manifest("raycluster.yaml")["metadata"]["name"] == "quorum"


def test_the_job_places_each_model_on_a_group_that_is_there() -> None:
    job = manifest("rayjob.yaml")["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:5] == ["quorum", "run", "dmapo", "--config", "dmapo"]
    assert words[words.index("--run-dir") + 1].startswith("/shared/")
    values = read_yaml(words[4])
    for word in words:
        if "=" in word:
            apply_override(values, word)
    config = DmapoConfig.model_validate(values)  # an override that is no key of the configuration ends here
    labels = [group["labels"] for group in spec("rayjob.yaml")["workerGroupSpecs"]]
    selectors = [model.placement.label_selector for model in config.models.values()] + [config.train.label_selector]
    for selector in selectors:
        assert selector and any(may_run(selector, label) for label in labels), selector
    # Before the first GPU pod has come the cluster has none, and a default would be none.
    assert all(model.placement.num_gpus for model in config.models.values())
    assert config.train.use_gpu is True and config.train.autoscaling is True


def test_ray_up_reads_its_file() -> None:
    rules = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    found = yaml.safe_load(RAY_UP.read_text())
    jsonschema.validate(found, rules)
    assert found["head_node_type"] in found["available_node_types"]
    roles = {name: node["labels"]["quorum-role"] for name, node in found["available_node_types"].items()}
    assert set(roles.values()) == {"head", "endpoints", "generation", "judging", "training"}
    assert found["max_workers"] >= sum(node.get("max_workers", 0) for node in found["available_node_types"].values())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "idle_timeout": 5}, rules)


SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in CLUSTER.rglob("*")
    if path.is_file() and path.read_text().startswith("#!/usr/bin/env bash")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_are_read_whole_and_can_be_started(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK)
    assert "set -euo pipefail" in (ROOT / script).read_text()


def test_the_slurm_script_says_what_is_missing(tmp_path: Path) -> None:
    script = str(CLUSTER / "slurm/quorum.sbatch")
    bare = subprocess.run(["bash", script], capture_output=True, text=True)
    assert bare.returncode == 2 and "usage: sbatch" in bare.stderr
    env = {**os.environ, "QUORUM_CHECKOUT": str(tmp_path)}
    without = subprocess.run(["bash", script, "dmapo"], capture_output=True, text=True, env=env)
    assert without.returncode == 2 and "make venv" in without.stderr


def test_the_slurm_script_starts_ray_on_every_node_and_hands_the_arguments_on(tmp_path: Path) -> None:
    for name, body in {
        "scontrol": 'echo "node1"; echo "node2"',
        "srun": 'case "$*" in *hostname*) echo "10.0.0.1 fe80::1";; *) printf "%s|" "$@" > "$SEEN"; '
        'printf "%s %s" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" > "$SEEN.token"; exit 7;; esac',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/quorum").write_text("")
    (tmp_path / ".venv/bin/quorum").chmod(0o755)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")},
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "QUORUM_CHECKOUT": str(tmp_path),
        "SEEN": str(tmp_path / "seen"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "40001",
        "SLURM_GPUS_ON_NODE": "4",
    }
    script = str(CLUSTER / "slurm/quorum.sbatch")
    done = subprocess.run(["bash", script, "dmapo", "gate.tau=2 ; x"], capture_output=True, text=True, env=env)
    assert done.returncode == 7, done.stderr  # the run's exit code is the job's
    seen = (tmp_path / "seen").read_text().split("|")
    assert "10.0.0.1:20001" in seen and "--num-gpus=4" in seen
    mode, token = (tmp_path / "seen.token").read_text().split()
    assert mode == "token" and re.fullmatch("[0-9a-f]{64}", token)
    assert token not in " ".join(seen) + done.stdout + done.stderr
    mine = {**env, "RAY_AUTH_TOKEN": "mine"}  # what the user has set wins
    subprocess.run(["bash", script, "dmapo"], capture_output=True, text=True, env=mine)
    assert (tmp_path / "seen.token").read_text() == "token mine"
    assert seen[seen.index("--") :] == ["--", "quorum", "run", "dmapo", "gate.tau=2 ; x", ""]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_images_have_the_extras_that_shipped_files_need(name: str) -> None:
    text = (CLUSTER / "docker" / name).read_text()
    (installed,) = re.findall(r'pip install "\.\[([a-z,]+)\]"', text)
    needed = set()
    for file in (ROOT / "configs").glob("*.yaml"):
        values = read_yaml(str(file))
        needed |= {"ifeval"} if "ifeval" in (values.get("benchmarks") or {}) else set()
        needed |= {*(values.get("train") or {}).get("report_to", [])}
    assert "ifeval" in needed and needed <= set(installed.split(","))
    assert ("gpu" in installed) == (name == "Dockerfile")
    assert "nltk.downloader" in text and "NLTK_DATA" in text  # the sentence data of the checkers


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_images_copy_what_is_there_and_nothing_else_reaches_the_build(name: str) -> None:
    lines = (CLUSTER / "docker" / name).read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    ignore = (CLUSTER / "docker" / f"{name}.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path in kept, path
    pinned = next(d for d in importlib.metadata.requires("quorum-align") or [] if d.startswith("torch=="))
    assert any(pinned in line for line in lines)
