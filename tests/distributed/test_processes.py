"""Several real processes train as one: the same results, one run directory, and missing or different processes are named."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research import InvalidArgument
from research.distributed import processes, rendezvous

ROOT = Path(__file__).parents[2]
RESEARCH = [sys.executable, "-P", "-m", "research"]


def environment(devices: int) -> dict[str, str]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    return {**os.environ, **flags, "PYTHONPATH": str(ROOT)}


def run_together(commands: list[list[str]], devices: int, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """Runs commands as the processes of one training."""
    code = f"import sys; from research.cli.processes import run_together; sys.exit(run_together({commands!r}, {devices}))"
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=timeout)


def train_on_mesh(tmp_path: Path, count: int, *arguments: Any, devices: int | None = None) -> dict[str, Any]:
    """Returns the output of tests/train_on_mesh.py from `count` processes, with eight devices in all by default."""
    output = tmp_path / "output.json"
    command = [sys.executable, str(ROOT / "tests" / "train_on_mesh.py"), str(output), *map(str, arguments)]
    if count == 1:
        result = subprocess.run(command, env=environment(devices or 8), capture_output=True, text=True, timeout=300)
    else:
        result = run_together([command] * count, devices or 8 // count, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(json.loads(output.read_text()))


def losses(output: dict[str, Any]) -> np.ndarray:
    return np.array([[step[name] for name in sorted(step) if "loss" in name] for step in output["losses"]])


def run(*arguments: Any, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    command = [*RESEARCH, "processes", *map(str, arguments)]
    return subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=timeout)


def test_a_cluster_manager_is_recognised_only_for_several_processes() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
    assert processes.cluster_manager(slurm) == "SLURM"
    assert processes.cluster_manager({**slurm, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert processes.cluster_manager({"OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    assert processes.cluster_manager({"TPU_WORKER_HOSTNAMES": "a,b"}) == "Cloud TPU"
    assert processes.cluster_manager({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert processes.cluster_manager({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"
    assert processes.cluster_manager({}) is None


def test_incomplete_options_raise() -> None:
    with pytest.raises(InvalidArgument, match="coordinator is missing"):
        processes.join(processes=2, process=0)
    with pytest.raises(InvalidArgument, match="process is 2 of 2; expected a number from 0 to 1"):
        processes.join("localhost:1", 2, 2)


@pytest.mark.slow
def test_several_processes_train_like_one(tmp_path: Path) -> None:
    single = train_on_mesh(tmp_path, 1, "digits", "none", "sgd", 20, devices=1)
    several = train_on_mesh(tmp_path, 4, "digits", "data=2,fsdp=2,tensor=2", "sgd", 20)
    np.testing.assert_allclose(losses(several), losses(single), rtol=1e-6)
    assert several["val"] == pytest.approx(single["val"], rel=1e-5)
    assert several["same_shardings"]
    assert several["programs"] == 1


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_resumes_on_any_number(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints"
    expected = train_on_mesh(tmp_path, 1, "digits", "none", "sgd", 20, devices=1)["losses"][10:]
    train_on_mesh(tmp_path, 2, "digits", "fsdp=8", "sgd", 10, "--save", saved)
    for count, mesh, devices in ((1, "none", 1), (4, "data=4,fsdp=2", 2)):
        resumed = train_on_mesh(tmp_path, count, "digits", mesh, "sgd", 10, "--restore", saved, devices=devices)
        np.testing.assert_allclose([logs["loss"] for logs in resumed["losses"]], [logs["loss"] for logs in expected], rtol=1e-5)


@pytest.mark.complete
@pytest.mark.slow
def test_a_run_of_two_processes_ends_like_an_undisturbed_one_after_a_stop_and_a_kill(tmp_path: Path) -> None:
    lengths = ["--epochs", "4", "--log-every", "1", "--checkpoint-every", "20"]
    options = ["--devices", "1", "run", "digits", "--mesh", "fsdp=-1", *lengths]
    by_the_clock = [*options[:-1], "0.5s"]  # at steps on which the processes have to agree
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    result = run(2, *options, "--run-dir", undisturbed)
    assert result.returncode == 0, result.stderr[-2000:]
    files = {path.name for path in undisturbed.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html", "model.keras"} <= files
    assert not list(undisturbed.glob("error*"))
    steps = [json.loads(line)["step"] for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(50) == 1  # logged by one process, not by each
    assert result.stdout.count("trainable parameters") == 1

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [*RESEARCH, "processes", "2", *arguments]
        return subprocess.Popen(command, env=environment(1), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def wait_for_checkpoint(step: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(int(p.name) >= step for p in (disturbed / "checkpoints").glob("0*")):
            time.sleep(0.01)

    first = start(*by_the_clock, "--run-dir", str(disturbed))
    wait_for_checkpoint(20)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75, errors.decode()[-2000:]
    stopped = json.loads((disturbed / "summary.json").read_text())
    assert stopped["status"] == "preempted"
    assert 20 <= stopped["steps"] < 180

    resumed = start("--devices", "1", "resume", str(disturbed))
    wait_for_checkpoint(stopped["steps"] + 1)
    second = [pid for pid in _children(resumed.pid) if "--process 1" in _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")]
    os.kill(second[0], signal.SIGKILL)
    _, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 75
    assert "process 1 of 2 was ended by SIGKILL" in errors.decode().splitlines()[-1]

    result = run(2, "--devices", 1, "resume", disturbed)
    assert result.returncode == 0, result.stderr[-2000:]
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (undisturbed, disturbed)]
    assert stopped["steps"] < summaries[1]["resumed_from"] < summaries[1]["steps"] == 180
    assert summaries[1]["metrics"] == pytest.approx(summaries[0]["metrics"], rel=1e-4)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _children(pid: int) -> list[int]:
    return [int(child) for child in _text(Path(f"/proc/{pid}/task/{pid}/children")).split()]


@pytest.mark.slow
def test_processes_with_different_options_are_named_before_the_run_starts(tmp_path: Path) -> None:
    command = [*RESEARCH, "run", "digits", "--run-dir", str(tmp_path / "run"), "--batch-size"]
    result = run_together([[*command, "32"], [*command, "64"]], 2)
    assert result.returncode == 1
    assert "process 1 differs from process 0: batch_size is 64, not 32" in result.stderr
    assert not (tmp_path / "run").exists()


def rendezvous_errors(*numbers: int, processes: int = 3, timeout: int = 1) -> list[str]:
    """Returns what `wait_for_peers` raises in each of these processes, "" where it returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    def error_of(number: int) -> str:
        try:
            rendezvous.wait_for_peers(address, processes, number, timeout)
        except InvalidArgument as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(error_of, numbers))


@pytest.mark.slow
def test_missing_processes_are_named_in_all_that_are_present() -> None:
    assert rendezvous_errors(0, 1, 2, timeout=20) == ["", "", ""]
    errors = rendezvous_errors(0, 2)
    assert all(error.startswith("PeerLost: processes: within 1 s process 1 of 3 did not connect; ") for error in errors)
    assert "process 1, 2 of 3 did not connect" in rendezvous_errors(0)[0]
    assert "process 0 of 3 did not answer at 127.0.0.1:" in rendezvous_errors(1)[0]
    twice = rendezvous_errors(0, 1, 1, timeout=20)[0]
    assert twice.startswith("InvalidArgument: processes: process 1 connected twice; ")


@pytest.mark.slow
def test_a_run_without_its_peers_ends_with_a_line_and_may_be_run_again(tmp_path: Path) -> None:
    command = [*RESEARCH, "run", "digits", "--run-dir", str(tmp_path / "run")]
    joining = ["--coordinator", "127.0.0.1:29871", "--processes", "3", "--process", "0", "--join-timeout", "2"]
    result = subprocess.run([*command, *joining], env=environment(2), capture_output=True, text=True, timeout=100)
    assert result.returncode == 75
    assert result.stderr.startswith("error: processes: within 2 s process 1, 2 of 3 did not connect; ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_process_reads_only_its_part_of_a_batch(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("""
import argparse, json, sys
import research
import jax, keras, numpy as np
from research import distributed
from research.distributed import processes

parser = argparse.ArgumentParser()
for name in ("--coordinator", "--processes", "--process"):
    parser.add_argument(name)
options = parser.parse_args()
processes.join(options.coordinator, int(options.processes), int(options.process), 60)
reads = []

class Source:
    def __len__(self):
        return 40

    def __getitem__(self, i):
        reads.append(i)
        return np.full(4, i, "float32"), np.float32(i)

keras.utils.set_random_seed(0)
learner = research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), loss="mse", optimizer="sgd")
mesh = distributed.mesh(data=-1)
data = distributed.shard_batches(research.from_examples(Source(), batch_size=8), mesh)
reads.clear()
batch = data.batch(0)
complete = processes.to_host(batch)
print(json.dumps({"reads": len(reads), "complete": np.asarray(complete.y).tolist()}), file=sys.stderr)
research.train(distributed.shard(learner, mesh), data, epochs=1)
assert len(reads) <= 20 + 4, len(reads)
""")
    result = run_together([[sys.executable, str(worker)]] * 2, 4)
    assert result.returncode == 0, result.stderr[-2000:]
    outputs = [json.loads(line[line.index("{") :]) for line in result.stderr.splitlines() if '"reads"' in line]
    assert [output["reads"] for output in outputs] == [4, 4]
    assert outputs[0]["complete"] == outputs[1]["complete"]
    assert len(set(outputs[0]["complete"])) == 8


EXPERIMENT = '''
"""An experiment whose functions read all that they are given."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import research
import keras


@dataclass(frozen=True)
class Config:
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 16
    seed: int = 0


def build(config):
    keras.utils.set_random_seed(config.seed)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])
    learner = research.supervised(model, loss="mse", optimizer="sgd", metrics=["mae"])
    names = {"state": learner.names, "key": "key"}
    return learner._replace(
        init=lambda: {"state": learner.init(), "key": jax.random.key(3)},
        reset=lambda state: {**state, "state": learner.reset(state["state"])},
        train=lambda state, batch: inside(learner.train, state, batch),
        evaluate=lambda state, batch: inside(learner.evaluate, state, batch),
        predict=lambda state, batch: learner.predict(state["state"], batch),
        names=names,
    )


def inside(function, state, batch):
    after, logs = function(state["state"], batch)
    return {**state, "state": after}, logs


def data(config):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 4)).astype("float32"), rng.normal(size=(90, 3)).astype("float32")
    parts = {"train": (slice(48), 16), "val": (slice(48, 70), 11), "test": (slice(70, 90), 8)}  # 4 devices: 8 divides, 11 not
    return {name: research.from_arrays(x[rows], y[rows], batch_size=size) for name, (rows, size) in parts.items()}


def numbers(learner, state, splits):
    found = {"draw": float(jax.random.uniform(state["key"]))}
    for name in ("val", "test"):
        batch = splits[name].batch(0)
        predictions = learner.predict(state, batch)
        found[f"{name}_error"] = float(jnp.mean(jnp.abs(predictions - jnp.asarray(batch.y))))
        found[f"{name}_first"] = float(np.asarray(jax.jit(learner.predict)(state, batch))[0, 0])
        found[f"{name}_target"] = float(np.asarray(batch.y)[-1, -1])
        found[f"{name}_sum"] = float(research.predict(learner, splits[name], state).sum())
        found[f"{name}_evaluated"] = research.evaluate(learner, splits[name], state)["mae"]
    found["weights"] = float(sum(jnp.sum(leaf) for leaf in state["state"].trainable))
    return found


def each_epoch(config, learner, state, splits):
    numbers(learner, state, splits)
    return pictures(config, learner, state, splits)


def results(config, learner, state, splits):
    return numbers(learner, state, splits)


def pictures(config, learner, state, splits):
    figure, axes = plt.subplots()
    batch = splits["train"].batch(0)
    axes.scatter(batch.y[:, 0], learner.predict(state, batch)[:, 0])
    return {"scatter": figure}


def summaries(config, learner, state, splits, writer, step):
    assert numbers(learner, state, splits)["weights"]
'''


@pytest.mark.slow
def test_the_functions_of_an_experiment_work_in_several_processes(tmp_path: Path) -> None:
    file = tmp_path / "reads_everything.py"
    file.write_text(EXPERIMENT)
    command = [*RESEARCH, "run", str(file), "--run-dir"]
    single = subprocess.run([*command, tmp_path / "1"], env=environment(1), capture_output=True, text=True, timeout=240)
    assert single.returncode == 0, single.stderr
    several = run(2, "--devices", 2, "run", file, "--mesh", "data=4", "--run-dir", tmp_path / "2")
    assert several.returncode == 0, several.stderr
    expected, values = (json.loads((tmp_path / name / "summary.json").read_text())["metrics"] for name in "12")
    assert {"val_first", "test_sum", "draw"} <= set(expected)
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (tmp_path / "2" / "plots" / "scatter.png").is_file()


@pytest.mark.complete
@pytest.mark.slow
def test_a_shipped_experiment_measures_and_draws_in_several_processes(tmp_path: Path) -> None:
    options = ["losses", "--variation", "metrics", "--steps", 3, "--mesh", "data=4", "--run-dir", tmp_path / "run"]
    done = run(2, "--devices", 2, "run", *options)
    assert done.returncode == 0, done.stderr
    assert "active_units" in json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]


IN_A_HOOK = """
import sys

import research
import keras
import numpy as np
from research import distributed
from research.distributed import processes

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
processes.join(arguments["--coordinator"], int(arguments["--processes"]), int(arguments["--process"]), 60)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(48, 4)).astype("float32"), rng.normal(size=(48, 3)).astype("float32")


def build():
    keras.utils.set_random_seed(0)
    return research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), loss="mse", optimizer="sgd")


def trained(learner, data, state):
    seen = []

    def hook(step, state, logs):
        for rows in (slice(8), slice(7), slice(1)):  # on four devices the first divides
            seen.append(np.asarray(learner.predict(state, research.Batch(x[rows]))))

    research.train(learner, data, steps=2, state=state, hooks=[(1, hook)])
    return seen


data, mesh = research.from_arrays(x, y, batch_size=16), distributed.mesh(data=2, fsdp=2)
learner, state = distributed.build_sharded(build, mesh)
single = build()
expected = trained(single, data, single.init())
for values, reference in zip(trained(learner, distributed.shard_batches(data, mesh), state), expected, strict=True):
    np.testing.assert_allclose(values, reference, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.complete
@pytest.mark.slow
def test_a_hook_predicts_in_several_processes() -> None:
    done = run_together([[sys.executable, "-P", "-c", IN_A_HOOK]] * 2, 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wrong_usage_is_reported_in_one_line() -> None:
    for arguments in (["2", "fly", "digits"], ["0", "run", "digits"], []):
        result = run(*arguments, timeout=60)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
