"""The Python for a test's own processes."""

import os
import sys

from ray_pipeline.engines.core_server import WARM_PYTHON


def interpreter() -> str:
    """One that has imported torch, TRL and vLLM, where the tests' warm server runs; it hands no signal on."""
    return os.environ.get(WARM_PYTHON, sys.executable)
