"""What comes first in a process: when it was started, where compiled programs are cached, who writes to the terminal."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import keras

from research.core.state import InvalidArgument
from research.errors import one_line

_IMPORTED = time.time()  # on systems without /proc the start of the process is not known better than this


def process_start_time() -> float:
    """Returns the time at which this process was started, in seconds since the epoch: before all imports.

    >>> process_start_time() <= _IMPORTED <= time.time()
    True
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, in clock ticks; the name, field 2, may hold spaces
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (AttributeError, IndexError, OSError, ValueError):
        return _IMPORTED
    return min(time.time() - age, _IMPORTED) if age >= 0 else _IMPORTED


def check_devices() -> None:
    """Raises `InvalidArgument` if JAX finds none of the devices that it is to use.

    >>> check_devices()
    """
    try:
        jax.devices()
    except Exception as error:  # JAX raises RuntimeError and, for some platforms that are missing, AssertionError
        chosen = os.environ.get("JAX_PLATFORMS")
        reason = f" ({one_line(error, 200)})" if str(error) else ""
        raise InvalidArgument(
            f"JAX_PLATFORMS={chosen}: there is no such device here, or no support for it is installed{reason}; set another one, "
            "such as JAX_PLATFORMS=cpu, or unset it."
            if chosen
            else f"JAX finds no device{reason}; set JAX_PLATFORMS=cpu to run on the CPU."
        ) from error


def check_keras_settings() -> None:
    """Raises `InvalidArgument` if Keras' settings, as keras.json or the environment has them, are not Keras' defaults.

    They change a run's numbers, and config.json does not record them. An experiment sets what it needs in its own file.

    >>> check_keras_settings()
    """
    settings = {
        "floatx": (keras.config.floatx(), "float32"),
        "epsilon": (keras.config.epsilon(), 1e-7),
        "image_data_format": (keras.config.image_data_format(), "channels_last"),
        "nnx_enabled": (keras.config.is_nnx_enabled(), False),
    }
    for name, (value, default) in settings.items():
        if value != default:
            file = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
            own = "" if name == "nnx_enabled" else ", or set it in the experiment's own file"
            raise InvalidArgument(
                f"Keras' setting {name} is {value!r}, expected {default!r}, since config.json does not record it; "
                f"change it in {file}{own}."
            )


def enable_compilation_cache() -> None:
    """Caches compiled programs on disk from one start to the next, unless the environment says where or otherwise."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "research" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def only_first_prints(first: bool) -> Iterator[None]:
    """Silences stdout in all processes but the first, and of the first passes on what Python prints only.

    Gloo, in C++, prints a line for each connection.
    """
    terminal = os.fdopen(os.dup(1) if first else os.open(os.devnull, os.O_WRONLY), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    with contextlib.redirect_stdout(terminal):
        yield
