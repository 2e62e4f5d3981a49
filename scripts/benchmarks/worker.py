"""Runs one system on one workload in a process of its own: `worker.py SYSTEM WORKLOAD DIRECTORY START_TIME`.

Trains one epoch and reports it. Then reads a number of epochs from each line of standard input, trains them and reports again. A
report is a line of JSON on standard output. Whatever else a library prints goes to standard error. A system's module has
`build(system, workload, data) -> train`, where `train(epochs)` continues the training, waits for the device and returns the last
epoch's logs.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import workloads
from systems import SYSTEMS


def main(system: str, workload: str, directory: Path, start_time: float) -> None:
    """Trains and reports until standard input ends; `start_time` is when the process was started, by `time.time()`."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if SYSTEMS[system].keras_backend:
        os.environ["KERAS_BACKEND"] = SYSTEMS[system].keras_backend
    build = importlib.import_module(SYSTEMS[system].module).build
    memory_after_imports = _memory_mb("VmRSS")
    train = build(system, workload, workloads.read(workload, directory))
    logs = train(1)
    print(json.dumps({"seconds": time.time() - start_time, "logs": logs}), file=reports, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        logs = train(int(line))
        seconds = time.perf_counter() - start
        report = {"seconds": seconds, "logs": logs, "peak_mb_over_imports": _memory_mb("VmHWM") - memory_after_imports}
        print(json.dumps(report), file=reports, flush=True)


def _memory_mb(field: str) -> float:
    """Returns a field of Linux' memory statistics of this process, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
