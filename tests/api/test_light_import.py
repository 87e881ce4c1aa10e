"""`import ray_pipeline` costs nothing, and every public name is there when it is used."""

import subprocess
import sys

import ray_pipeline


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, ray_pipeline; dir(ray_pipeline); heavy = {'ray', 'torch', 'pandas', 'transformers', 'pyarrow', "
        "'vllm', 'numpy', 'pydantic'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    for name in ray_pipeline.__all__:
        value = getattr(ray_pipeline, name)
        assert name == "__version__" or (value.__doc__ and len(value.__doc__) > 40), name
    assert set(ray_pipeline.__all__) <= set(dir(ray_pipeline))


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(ray_pipeline, "judje")
