"""What can be said about a vLLM engine before it starts."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_pipeline.engines import reaper
from ray_pipeline.engines.base import EngineStartError
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_adapters import lora_rank
from ray_pipeline.engines.vllm_arguments import engine_args
from ray_pipeline.engines.vllm_processes import Reaper, child_environment
from ray_pipeline.engines.vllm_spec import SPECIFIED, VllmSpec, validate_engine_args, validate_sampling_extra
from tests.models import make_qwen3

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@needs_vllm
def test_engine_arguments_are_checked_by_name() -> None:
    validate_engine_args({"max_num_seqs": 8, "gpu_memory_utilization": 0.5, "enable_log_requests": True})
    with pytest.raises(EngineStartError, match="did you mean 'gpu_memory_utilization'"):
        validate_engine_args({"gpu-memory-utilisation": 0.5})
    with pytest.raises(EngineStartError, match="own key 'adapter'"):
        validate_engine_args({"lora_modules": []})
    for field in ("model", "dtype", "max_model_len", "quantization", "seed"):
        with pytest.raises(EngineStartError, match=f"own key '{field}'"):
            validate_engine_args({field: 1})


@needs_vllm
def test_sampling_parameters_are_checked_by_name() -> None:
    validate_sampling_extra((("top_k", 5), ("repetition_penalty", 1.1)))
    with pytest.raises(EngineStartError, match="did you mean 'top_k'"):
        validate_sampling_extra({"topk": 5})
    with pytest.raises(EngineStartError, match="own key"):
        validate_sampling_extra({"temperature": 0.5})
    with pytest.raises(EngineStartError, match="one call is one reply"):
        validate_sampling_extra({"n": 4})


def test_a_specification_travels() -> None:
    spec = VllmSpec("/m", args={"max_num_seqs": 8})
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert VllmSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


def test_identity_is_about_answers(qwen3: Path, lora: Path, tmp_path: Path) -> None:
    spec = VllmSpec(str(qwen3))
    plain = VllmEngine(spec).identity
    assert plain == json.loads(json.dumps(plain))
    assert str(qwen3) not in json.dumps(plain)
    fast = dataclasses.replace(spec, args={"max_num_seqs": 8}, max_model_len=512, seed=3, canary=False)
    assert VllmEngine(fast).identity == plain
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    others = [
        dataclasses.replace(spec, adapter=str(lora)),
        dataclasses.replace(spec, dtype="float32"),
        dataclasses.replace(spec, quantization="fp8"),
        dataclasses.replace(spec, chat_template=str(template)),
        dataclasses.replace(spec, chat_template_args={}),
        dataclasses.replace(spec, args={"hf_overrides": {"rope_theta": 1}}),
    ]
    texts = {json.dumps(VllmEngine(other).identity, sort_keys=True) for other in [spec, *others]}
    assert len(texts) == 1 + len(others)
    before = VllmEngine(others[3]).identity
    template.write_text("other")
    assert VllmEngine(others[3]).identity != before


def test_identity_may_be_given() -> None:
    assert VllmEngine(VllmSpec("/nowhere"), model={"model": "sha256:0"}).identity["model"] == "sha256:0"
    with pytest.raises(EngineStartError, match="no such folder"):
        _ = VllmEngine(VllmSpec("/nowhere")).identity


def test_hopeless_starts_fail_before_anything_is_loaded(tmp_path: Path, qwen3: Path) -> None:
    def start(spec: VllmSpec) -> None:
        asyncio.run(VllmEngine(spec).start())

    begin = time.monotonic()
    with pytest.raises(EngineStartError, match="no such folder"):
        start(VllmSpec(str(tmp_path / "nowhere")))
    with pytest.raises(EngineStartError, match=r"no chat template.*chat_template"):
        start(VllmSpec(str(make_qwen3(tmp_path / "base", chat_template=None))))
    with pytest.raises(EngineStartError, match="cannot read chat_template"):
        start(VllmSpec(str(qwen3), chat_template=str(tmp_path / "none.jinja")))
    if importlib.util.find_spec("vllm"):
        with pytest.raises(EngineStartError, match="did you mean 'max_num_seqs'"):
            start(VllmSpec(str(qwen3), args={"max_num_seq": 3}))
    assert time.monotonic() - begin < 60


def test_a_failed_start_is_remembered(tmp_path: Path) -> None:
    async def twice() -> None:
        engine = VllmEngine(VllmSpec(str(tmp_path / "nowhere")))
        first = await asyncio.gather(engine.start(), engine.start(), return_exceptions=True)
        assert all(isinstance(error, EngineStartError) for error in first)
        (tmp_path / "nowhere").mkdir()
        with pytest.raises(EngineStartError, match="no such folder"):
            await engine.start()
        await engine.close()

    asyncio.run(twice())


@needs_vllm
@pytest.mark.parametrize("cpu", [False, True])
def test_the_engine_starts_with_arguments_of_vllm(cpu: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    spec = VllmSpec("/m", adapter=str(tmp_path), max_model_len=64, quantization="fp8", args={"max_num_seqs": 8})
    args = engine_args(spec, "c0ffee", cpu=cpu)
    validate_engine_args({name: value for name, value in args.items() if name not in SPECIFIED})
    assert (args["revision"], args["max_model_len"], args["max_num_seqs"]) == ("c0ffee", 64, 8)


def test_room_for_several_adapters(tmp_path: Path) -> None:
    adapters = []
    for number, rank in enumerate((4, 40, 8, 8, 16, 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
        adapters.append(str(folder))
    # The last slot of the CPU kernels is that of calls without an adapter, whatever the user sets.
    for cpu, wanted, slots, kept in ((False, 2, 2, 6), (False, 8, 8, 8), (True, 2, 7, 7)):
        args = engine_args(VllmSpec("/m", args={"max_loras": wanted}), None, cpu=cpu, adapters=adapters)
        assert (args["enable_lora"], args["max_loras"], args["max_cpu_loras"]) == (True, slots, kept)
        assert args["max_lora_rank"] == 64
    assert engine_args(VllmSpec("/m"), None, cpu=False, adapters=adapters)["max_loras"] == 4
    assert engine_args(VllmSpec("/m"), None, cpu=False, adapters=["/nowhere"])["max_lora_rank"] == 8
    assert "enable_lora" not in engine_args(VllmSpec("/m"), None, cpu=True)


def test_lora_ranks(tmp_path: Path) -> None:
    def rank(config: dict[str, object]) -> int:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return lora_rank(str(tmp_path))

    assert rank({"r": 4}) == 8
    assert rank({"r": 16}) == 16
    assert rank({"r": 8, "rank_pattern": {"q_proj": 40}}) == 64
    with pytest.raises(EngineStartError, match="merge it"):
        rank({"r": 1000})
    with pytest.raises(EngineStartError, match="not the config of a LoRA adapter"):
        rank({})


SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("end", ["killed", "released"])
def test_the_reaper_ends_what_its_owner_left(end: str) -> None:
    owner = (
        "import subprocess, sys, time\n"
        "from ray_pipeline.engines.vllm_processes import Reaper, child_environment\n"
        "mine = Reaper()\n"
        "with child_environment(mine, cpu=False):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import subprocess, sys; "
        'subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])\'])\n'
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(mine.value, other.pid, flush=True)\n"
        "sys.stdin.readline()\n"
        "mine.release()\n"
        "print('released', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", owner], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    value, other = process.stdout.readline().split()
    entry = f"QUORUM_ENGINE={value}".encode()
    try:
        deadline = time.monotonic() + 30
        while len(reaper.marked(entry)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(reaper.marked(entry)) == 2  # the child and the grandchild, not the reaper
        if end == "killed":
            process.kill()
        else:
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == "released"
        deadline = time.monotonic() + 15
        while reaper.marked(entry) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not reaper.marked(entry)
        assert Path(f"/proc/{other}").exists()  # started outside: none of the engine's
    finally:
        process.kill()
        process.wait()
        os.kill(int(other), 9)


def test_nothing_of_an_engine_start_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD_TEST", "mine")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    before = dict(os.environ)
    mark = Reaper()
    try:
        with child_environment(mark, cpu=True):
            assert os.environ["QUORUM_ENGINE"] == mark.value
            assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
            os.environ["LD_PRELOAD_TEST"] = "changed"
            os.environ["LOCAL_WORLD_SIZE"] = "1"
        assert dict(os.environ) == before
    finally:
        mark.release()
