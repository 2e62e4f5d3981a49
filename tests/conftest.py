"""Strict mode: eight simulated devices, type annotations checked at run time, strict dtype promotion, warnings as errors."""

import atexit
import collections
import gc
import os
import shutil
import tempfile

# JAX reads both once, when it is first imported.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests, and the processes that they start, compile the same small programs: they share a compilation cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="research-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" not in os.environ:  # commands record there which experiments the user has run
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="research-state-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jaxtyping

jaxtyping.install_import_hook("research", "beartype.beartype")

import research  # noqa: E402, F401, I001  (before keras: it selects the backend)

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import keras  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--complete", action="store_true", help="run tests that are marked `complete`, and every case of samples")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each N-th of the tests that are left")


@pytest.hookimpl(trylast=True)  # after `-m` and `-k`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked `complete`, all but each n-th case of those marked `sample(n)`, then all but each `--every`-th.

    `sample(n, i)` begins with case i.
    """
    complete, every = config.getoption("--complete"), config.getoption("--every")
    selected, left_out, counts = [], [], collections.Counter[str]()
    for item in items:
        marker, test = item.get_closest_marker("sample"), item.nodeid.partition("[")[0]
        n, first = (*marker.args, 0)[:2] if marker else (1, 0)
        skipped = counts[test] % n != first or item.get_closest_marker("complete")
        (left_out if skipped and not complete else selected).append(item)
        counts[test] += 1
    left_out += [item for i, item in enumerate(selected) if i % every]
    config.hook.pytest_deselected(items=left_out)
    items[:] = selected[::every]


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from going through everything that was imported, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest) -> Iterator[None]:
    keras.utils.set_random_seed(0)
    with jax.numpy_dtype_promotion("standard" if request.node.get_closest_marker("promotes") else "strict"):
        yield


@pytest.fixture(params=["primitives of today", "primitives to come"])
def primitives(request: pytest.FixtureRequest) -> Iterator[None]:
    """JAX is to represent `jax.checkpoint` and custom derivatives as `call_hi_primitive`: these flags turn that on ahead."""
    flags = ("jax_remat3", "jax_custom_vjp3") if request.param == "primitives to come" else ()
    for flag in flags:
        jax.config.update(flag, True)
    yield
    for flag in flags:
        jax.config.update(flag, False)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Type annotations are not checked at run time, so that wrong types get as far as they do for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
