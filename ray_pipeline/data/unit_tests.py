"""The checker `unit_tests`: whether code in a response passes its prompt's tests, which are run (`data/sandbox.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.answer_checkers import Prompt
from ray_pipeline.data.checkers import Checked
from ray_pipeline.data.sandbox import failure, sandbox
from ray_pipeline.extensions import register

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.I)


@register("checker", "unit_tests")
class UnitTests(Settings):
    """Share of the prompt's tests that the Python code of a response passes; undecided for a prompt without tests."""

    execute: bool = Field(
        False,
        description="run the code that models wrote; required. It runs without a network and with limits, but with the "
        "files of your account",
    )
    tests: str = Field(
        "tests", description="name of the tests in the prompt's `meta`: a text of Python, or a list of such texts"
    )
    cpu_s: int = Field(10, ge=1, le=600, description="longest CPU time of a test, in seconds")
    memory_mb: int = Field(512, ge=64, description="largest memory of a test, in MiB")

    @model_validator(mode="after")
    def _asked(self) -> UnitTests:
        if not self.execute:
            raise ValueError(
                "it runs code that models wrote; read docs/roads.md (Unit tests) about what its sandbox does not "
                "protect, then set execute: true"
            )
        return self

    def ready(self) -> None:
        """Raises SandboxMissing where no sandbox can be made."""
        sandbox()

    def __call__(self, prompt: Prompt, response: str, meta: Mapping[str, Any]) -> Checked | None:
        tests = meta.get(self.tests)
        tests = [tests] if isinstance(tests, str) else tests
        if not tests:
            return None
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise ValueError(f"{self.tests} of a prompt must be Python code, or a list of such texts")
        fenced = _BLOCK.search(response)
        code = fenced[1] if fenced else response
        found = [failure(code, test, self.cpu_s, self.memory_mb) for test in tests]
        failed = [f"test {number}: {why}" for number, why in enumerate(found, 1) if why is not None]
        passed = f"{len(found) - len(failed)} of {len(found)} tests pass"
        return Checked(1 - len(failed) / len(found), f"{passed}; {'; '.join(failed[:3])}" if failed else passed)
