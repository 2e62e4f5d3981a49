"""Hostile mode: eight fake devices, annotations checked at run time, strict dtypes, warnings are errors (see pyproject.toml)."""

import atexit
import os
import shutil
import tempfile

# Before JAX is first imported, which reads both once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# The same small programs are compiled by many tests: what one has compiled serves the others, and the processes they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="research-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jaxtyping

jaxtyping.install_import_hook("research", "beartype.beartype")

import research  # noqa: E402, F401, I001  (before keras: it chooses the backend)

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import keras  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _hostile(request: pytest.FixtureRequest) -> Iterator[None]:
    keras.utils.set_random_seed(0)
    with jax.numpy_dtype_promotion("standard" if request.node.get_closest_marker("promotes") else "strict"):
        yield
