"""Several real processes train as one: the same numbers, one run directory, and whoever is missing or different is named."""

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

from research import Refused, processes, rollcall

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
LAUNCH = [sys.executable, str(ROOT / "scripts" / "processes.py")]


def environment(devices: int) -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}


def joined(tmp_path: Path, count: int, *arguments: Any, devices: int | None = None) -> dict[str, Any]:
    """What tests/joined.py tells of a training by so many processes, on eight devices in all."""
    output = tmp_path / "told.json"
    command = [sys.executable, str(ROOT / "tests" / "joined.py"), str(output), *map(str, arguments)]
    if count == 1:
        done = subprocess.run(command, env=environment(devices or 8), capture_output=True, text=True, timeout=300)
    else:
        launcher = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import processes; "
        launcher += f"sys.exit(processes.watched([{command!r}] * {count}, {devices or 8 // count}))"
        done = subprocess.run([sys.executable, "-c", launcher], env=environment(1), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(output.read_text()))


def losses(told: dict[str, Any]) -> np.ndarray:
    return np.array([[step[name] for name in sorted(step) if "loss" in name] for step in told["losses"]])


def run(*arguments: Any, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAUNCH, *map(str, arguments)], env=environment(1), capture_output=True, text=True, timeout=timeout)


def test_a_manager_is_found_where_there_are_several_processes() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
    assert processes.manager(slurm) == "SLURM"
    assert processes.manager({**slurm, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert processes.manager({"OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    assert processes.manager({"TPU_WORKER_HOSTNAMES": "a,b"}) == "Cloud TPU"
    assert processes.manager({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert processes.manager({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"
    assert processes.manager({}) is None


def test_half_of_the_options_are_refused() -> None:
    with pytest.raises(Refused, match="coordinator is missing"):
        processes.join(processes=2, process=0)
    with pytest.raises(Refused, match="number 2 of 2; expected a number from 0 to 1"):
        processes.join("localhost:1", 2, 2)


@pytest.mark.slow
def test_processes_train_like_one(tmp_path: Path) -> None:
    alone = joined(tmp_path, 1, "digits", "one", "sgd", 20, devices=1)
    several = joined(tmp_path, 4, "digits", "data=2,fsdp=2,tensor=2", "sgd", 20)
    np.testing.assert_allclose(losses(several), losses(alone), rtol=1e-6)
    assert several["val"] == pytest.approx(alone["val"], rel=1e-5)
    assert several["kept"]
    assert several["programs"] == 1


@pytest.mark.slow
def test_what_two_processes_saved_goes_on_anywhere(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints"
    wanted = joined(tmp_path, 1, "digits", "one", "sgd", 20, devices=1)["losses"][10:]
    joined(tmp_path, 2, "digits", "fsdp=8", "sgd", 10, "--save", saved)
    for count, mesh, devices in ((1, "one", 1), (4, "data=4,fsdp=2", 2)):
        found = joined(tmp_path, count, "digits", mesh, "sgd", 10, "--restore", saved, devices=devices)
        np.testing.assert_allclose([e["loss"] for e in found["losses"]], [e["loss"] for e in wanted], rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_and_killed_and_ends_like_one_left_alone(tmp_path: Path) -> None:
    options = [
        "--devices",
        "1",
        "run",
        "digits",
        "--mesh",
        "fsdp=-1",
        "--epochs",
        "4",
        "--log-every",
        "1",
        "--checkpoint-every",
        "20",
    ]
    directory, hurt = tmp_path / "whole", tmp_path / "hurt"
    done = run(2, *options, "--run-dir", directory)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html", "model.keras"} <= {p.name for p in directory.iterdir()}
    assert not list(directory.glob("error*"))
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(50) == 1  # told once, not by each
    assert done.stdout.count("trainable parameters") == 1

    def begun(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*LAUNCH, "2", *arguments], env=environment(1), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def reached(step: int) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not any(int(p.name) >= step for p in (hurt / "checkpoints").glob("0*")):
            time.sleep(0.01)

    first = begun(*options, "--run-dir", str(hurt))
    reached(20)
    first.send_signal(signal.SIGTERM)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 75, told.decode()[-2000:]
    stopped = json.loads((hurt / "summary.json").read_text())
    assert stopped["status"] == "preempted"
    assert 20 <= stopped["steps"] < 180

    again = begun("--devices", "1", "resume", str(hurt))
    reached(stopped["steps"] + 1)
    second = [pid for pid in _children(again.pid) if "--process 1" in _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")]
    os.kill(second[0], signal.SIGKILL)
    _, told = again.communicate(timeout=60)
    assert again.returncode == 75
    assert "process 1 of 2 was ended by SIGKILL" in told.decode().splitlines()[-1]

    gone_on = run(2, "--devices", 1, "resume", hurt)
    assert gone_on.returncode == 0, gone_on.stderr[-2000:]
    summaries = [json.loads((d / "summary.json").read_text()) for d in (directory, hurt)]
    assert stopped["steps"] < summaries[1]["resumed_from"] < summaries[1]["steps"] == 180
    assert summaries[1]["metrics"] == pytest.approx(summaries[0]["metrics"], rel=1e-4)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in _text(found).split()]


@pytest.mark.slow
def test_processes_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    run_py = [sys.executable, str(ROOT / "scripts" / "run.py"), "digits", "--run-dir", str(tmp_path / "run"), "--batch-size"]
    launcher = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import processes; "
    launcher += f"sys.exit(processes.watched([{[*run_py, '32']!r}, {[*run_py, '64']!r}], 2))"
    done = subprocess.run([sys.executable, "-c", launcher], env=environment(1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "process 1 is not like process 0: batch_size is 64 there, 32 here" in done.stderr
    assert not (tmp_path / "run").exists()


def called(*numbers: int, processes: int = 3, timeout: int = 1) -> list[str]:
    """What the roll call tells each of these processes; "" is all."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"

    def one(number: int) -> str:
        try:
            rollcall.call(address, processes, number, timeout)
        except Refused as refusal:
            return f"{type(refusal).__name__}: {refusal}"
        return ""

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


@pytest.mark.slow
def test_who_does_not_come_is_named_to_all_who_did() -> None:
    assert called(0, 1, 2, timeout=20) == ["", "", ""]
    told = called(0, 2)
    assert all(each.startswith("Left: processes: within 1 s process 1 of 3 did not come; ") for each in told)
    assert "process 1, 2 of 3 did not come" in called(0)[0]
    assert "process 0 of 3 did not answer at 127.0.0.1:" in called(1)[0]
    assert called(0, 1, 1, timeout=20)[0].startswith("Refused: processes: process 1 came twice; ")


@pytest.mark.slow
def test_a_run_that_waits_in_vain_says_so_and_may_be_run_again(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), "digits", "--run-dir", str(tmp_path / "run")]
    joining = ["--coordinator", "127.0.0.1:29871", "--processes", "3", "--process", "0", "--join-timeout", "2"]
    done = subprocess.run([*command, *joining], env=environment(2), capture_output=True, text=True, timeout=100)
    assert done.returncode == 75
    assert done.stderr.startswith("error: processes: within 2 s process 1, 2 of 3 did not come; ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_process_reads_only_its_part(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import argparse, json
import research
import jax, keras, numpy as np
from research import parallel, processes
parser = argparse.ArgumentParser()
for name in ("--coordinator", "--processes", "--process"):
    parser.add_argument(name)
asked = parser.parse_args()
processes.join(asked.coordinator, int(asked.processes), int(asked.process), 60)
seen = []
class Source:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        seen.append(i)
        return np.full(4, i, "float32"), np.float32(i)
keras.utils.set_random_seed(0)
learner = research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), loss="mse", optimizer="sgd")
mesh = parallel.mesh(data=-1)
data = parallel.spread(research.picked(Source(), batch_size=8), mesh)
seen.clear()
batch = data.batch(0)
values = processes.whole(batch)
print(json.dumps({{"seen": len(seen), "whole": np.asarray(values.y).tolist()}}), file=sys.stderr)
research.train(parallel.shard(learner, mesh), data, epochs=1)
assert len(seen) <= 20 + 4, len(seen)
""")
    launcher = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import processes; "
    launcher += f"sys.exit(processes.watched([[sys.executable, {str(worker)!r}]] * 2, 4))"
    done = subprocess.run([sys.executable, "-c", launcher], env=environment(1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line[line.index("{") :]) for line in done.stderr.splitlines() if '"seen"' in line]
    assert [each["seen"] for each in told] == [4, 4]
    assert told[0]["whole"] == told[1]["whole"]
    assert len(set(told[0]["whole"])) == 8


def test_wrong_usage_is_told_in_a_line() -> None:
    for arguments in (["2", "fly", "digits"], ["0", "run", "digits"], []):
        done = run(*arguments, timeout=60)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
