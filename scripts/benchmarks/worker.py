"""One system on one workload, in a process of its own: `worker.py SYSTEM WORKLOAD DIRECTORY STARTED`.

Trains an epoch, tells what the first one cost, then takes numbers of epochs from its standard input, a line each, and answers
each with a line of JSON. Whatever else a library prints goes to standard error. A system's module gives
`build(system, workload, data) -> train`, where `train(epochs)` goes on training, waits for the device and returns the last
epoch's logs.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import workloads

# The module that builds a system, and what has to be in the environment before its libraries are imported.
SYSTEMS = {
    "research": ("with_research", {}),
    "research-unfused": ("with_research", {}),
    "research-reordered": ("with_research", {}),
    "research-fit": ("with_research", {}),
    "jax-scan": ("with_jax", {}),
    "jax-loop": ("with_jax", {}),
    "keras-jax": ("with_keras", {"KERAS_BACKEND": "jax"}),
    "keras-jax-32": ("with_keras", {"KERAS_BACKEND": "jax"}),
    "keras-tensorflow": ("with_keras", {"KERAS_BACKEND": "tensorflow"}),
    "keras-torch": ("with_keras", {"KERAS_BACKEND": "torch"}),
    "torch": ("with_torch", {}),
    "flax-nnx": ("with_flax", {}),
}


def main(system: str, workload: str, directory: Path, started: float) -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, environment = SYSTEMS[system]
    os.environ.update(environment)
    build = importlib.import_module(module).build
    imported = _memory("VmRSS")
    train = build(system, workload, workloads.read(workload, directory))
    logs = train(1)
    print(json.dumps({"seconds": time.time() - started, "logs": logs}), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        logs = train(int(line))
        seconds = time.perf_counter() - began
        told = {"seconds": seconds, "logs": logs, "peak_mb_over_imports": _memory("VmHWM") - imported}
        print(json.dumps(told), file=answers, flush=True)


def _memory(field: str) -> float:
    """What Linux says of this process' memory, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
