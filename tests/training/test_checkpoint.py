"""No run is lost, and stopping is invisible in the result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import first_quick
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from keras import layers
from test_run import ROOT, command, strict

import research
from research import checkpoint, signals
from research.loop import Entry, Stopped

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 8)).astype("float32")
Y = RNG.integers(0, 3, 40).astype("int32")


def learner(units: int = 16, optimizer: Any = "adam") -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(units, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return research.supervised(model, loss=loss, optimizer=optimizer, metrics=["accuracy"])


def data() -> research.Batches:
    return research.arrays(X, Y, batch_size=8, seed=1)


def equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class Environment(NamedTuple):
    """A learner's state of its own kind."""

    agent: research.State
    key: Any
    seen: Any


@pytest.mark.promotes
@pytest.mark.parametrize("optimizer", first_quick(["adam", "sgd", optax.adam(1e-3)]))
def test_what_is_saved_is_restored_to_the_last_bit(optimizer: Any, tmp_path: Path) -> None:
    made = learner(optimizer=optimizer)
    state, logs = research.train(made, data(), steps=7)
    path = checkpoint.save(tmp_path / "checkpoints", 7, state, made.names, logs)
    found = checkpoint.restore(path, made.init(), made.names)
    equal(found.state, state)
    assert (found.step, {name: float(value) for name, value in found.logs.items()}) == (7, logs)


def test_any_learners_state_is_saved_by_its_names(tmp_path: Path) -> None:
    made = learner()
    state = Environment(made.init(), jax.random.key(3), jnp.arange(4, dtype=jnp.bfloat16))
    names = Environment(made.names, "key", "seen")
    path = checkpoint.save(tmp_path / "checkpoints", 1, state, names, {"loss": jnp.nan, "each": jnp.arange(2.0)})
    found = checkpoint.restore(path, state._replace(key=jax.random.key(0)), names)
    equal(found.state._replace(key=0 * jnp.ones(1)), state._replace(key=0 * jnp.ones(1)))
    assert jax.random.key_data(found.state.key).tolist() == jax.random.key_data(state.key).tolist()
    assert np.isnan(found.logs["loss"])
    assert found.logs["each"].tolist() == [0.0, 1.0]
    held = {name: (shape, dtype) for name, shape, dtype in strict((path / "manifest.json").read_text())["leaves"]}
    assert held["sequential/dense/kernel"] == ([8, 16], "float32")


def test_the_newest_are_kept_and_nothing_partial_stays(tmp_path: Path) -> None:
    made = learner()
    with checkpoint.saving(tmp_path / "checkpoints", made.names, keep=2) as save:
        research.train(made, data(), steps=9, hooks=[(2, save)])
    assert checkpoint.steps(tmp_path / "checkpoints") == [8, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_save_that_fails_is_told_though_training_was_stopped(tmp_path: Path) -> None:
    made = learner()
    (tmp_path / "checkpoints").write_text("a file where the directory should be")

    def stopped() -> None:
        with checkpoint.saving(tmp_path / "checkpoints", made.names) as save:
            save(1, made.init(), {})
            raise Stopped

    with pytest.raises(research.Refused, match="checkpoint of step 1 can't be written"):
        stopped()


@pytest.mark.slow
def test_a_save_holds_the_state_of_its_step_though_training_went_on(tmp_path: Path) -> None:
    made = learner()
    with checkpoint.saving(tmp_path / "checkpoints", made.names, keep=100) as save:
        research.train(made, data(), steps=20, hooks=[(1, save)])
    for step in (1, 7, 20):
        alone = learner()
        state, _ = research.train(alone, data(), steps=step)
        found = checkpoint.restore(tmp_path / "checkpoints" / f"{step:09d}", alone.init(), alone.names)
        equal(found.state, state)


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]


def flip(path: Path) -> None:
    file = max(files(path / "state"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(path: Path) -> None:
    file = max(files(path / "state"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "flipped bit": flip,
    "truncated": truncate,
    "file removed": lambda path: files(path / "state")[0].unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"step": 6, "fil'),
    "emptied": lambda path: [file.unlink() for file in files(path)],
}


@pytest.mark.parametrize("damage", first_quick(DAMAGES))
def test_a_damaged_newest_checkpoint_is_said_and_passed_over(damage: str, tmp_path: Path) -> None:
    made, directory = learner(), tmp_path / "checkpoints"
    with checkpoint.saving(directory, made.names) as save:
        research.train(made, data(), steps=6, hooks=[(3, save)])
    DAMAGES[damage](directory / "000000006")
    said: list[str] = []
    assert checkpoint.newest(directory, said.append) == directory / "000000003"
    (line,) = said
    assert line.startswith(f"checkpoint {directory / '000000006'} is damaged (")
    checkpoint.save(directory, 4, made.init(), made.names, keep=1)
    assert checkpoint.newest(directory, said.append) == directory / "000000004"
    DAMAGES[damage](directory / "000000004")
    with pytest.raises(research.Refused, match=r"no whole checkpoint is left in it \(2 damaged\)"):
        checkpoint.newest(directory, said.append)


def test_a_directory_that_was_emptied_or_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(research.Refused, match="no whole checkpoint is left"):
        checkpoint.newest(tmp_path / "checkpoints", print)
    (tmp_path / "file").write_text("")
    with pytest.raises(research.Refused, match="it can't be read"):
        checkpoint.newest(tmp_path / "file", print)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: learner(units=8), r"'sequential/dense/kernel' is float32\[8, 16\] in it, here float32\[8, 8\]"),
        (lambda: learner(optimizer="sgd"), "it has 'momentum/sequential/dense/kernel' besides"),
        (lambda: learner(optimizer=keras.optimizers.Adam(amsgrad=True)), "it has no 'velocity_hat/sequential/dense/kernel'"),
    ],
)
def test_a_checkpoint_of_another_learner_is_refused_by_the_leaf_that_differs(other: Any, said: str, tmp_path: Path) -> None:
    made = learner()
    path = checkpoint.save(tmp_path / "checkpoints", 1, made.init(), made.names)
    with pytest.raises(research.Refused, match=said) as refused:
        checkpoint.restore(path, other().init(), other().names)
    assert "\n" not in str(refused.value)


def sharded(shapes: Any, devices: int) -> Any:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = P("data") if leaf.ndim and leaf.shape[0] % 8 == 0 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 1])
def test_written_on_eight_devices_it_is_restored_on_fewer_each_reading_its_part(devices: int, tmp_path: Path) -> None:
    def build() -> research.Learner:
        return learner(optimizer=keras.optimizers.SGD(0.05))

    made, shapes = research.abstract(build)
    _, state = research.born(build, jax.tree.map(lambda leaf: leaf.sharding, sharded(shapes, 8)))
    state, logs = research.train(made, data(), steps=7, state=state)
    path = checkpoint.save(tmp_path / "checkpoints", 7, state, made.names, logs)
    held = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    found = checkpoint.restore(path, sharded(shapes, devices), made.names)
    for leaf, value in zip(jax.tree.leaves(found.state), held, strict=True):
        np.testing.assert_array_equal(leaf, value)
    kernel = found.state.trainable[0]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8 // devices, 16)}
    _, there = research.train(made, data(), steps=15, start=7, state=found.state)
    _, here = research.train(made, data(), steps=15, start=7, state=state)
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-6)


@pytest.mark.slow
def test_stopping_after_any_step_and_going_on_gives_the_same_state_and_the_same_logs(tmp_path: Path) -> None:
    def run(at: checkpoint.Checkpoint, made: research.Learner, entries: list[Entry], stop: Any) -> Any:
        return research.train(
            made,
            data(),
            steps=12,
            start=at.step,
            state=at.state,
            logs=at.logs,
            log_every=3,
            log=entries.append,
            evaluations={"val": data()},
            stop=stop,
        )

    wanted: list[Entry] = []
    made = learner()
    state, last = run(checkpoint.Checkpoint(0, made.init(), None), made, wanted, lambda: False)
    asked = 0
    for moment in range(30):  # asked after each dispatch, and between the batches of each evaluation
        entries: list[Entry] = []
        count = iter(range(1000))
        try:
            run(
                checkpoint.Checkpoint(0, made.init(), None),
                made,
                entries,
                lambda count=count, moment=moment: next(count) >= moment,
            )
        except Stopped as stopped:
            asked += 1
            path = checkpoint.save(tmp_path / f"{moment}", stopped.step, stopped.state, made.names, stopped.logs)
            at = checkpoint.restore(path, made.init(), made.names)
            entries = [entry for entry in entries if entry.step < at.step]
            resumed, resumed_last = run(at, made, entries, lambda: False)
            equal(resumed, state)
            assert resumed_last == last
        assert entries == wanted
    assert asked >= 10


@pytest.fixture
def run_arguments(tmp_path: Path) -> list[str]:
    return ["digits", "--epochs", "12", "--checkpoint-every", "40", "--run-dir", str(tmp_path / "run")]


def started(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "run.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.split("/")[0].split() == ["epoch", "3"]:
            break
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_go_on_and_exits_with_75(
    number: signal.Signals, run_arguments: list[str], tmp_path: Path
) -> None:
    process = started(run_arguments, tmp_path)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 75
    summary = strict((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == {signal.SIGTERM: "preempted", signal.SIGINT: "stopped"}[number]
    line = f"stopped by {number.name} after step {summary['steps']}; to go on: just resume {tmp_path / 'run'}"
    assert said.splitlines()[-1] == line
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == summary["steps"]
    elsewhere = ["--mesh", "data=4,fsdp=2"] if number == signal.SIGINT else []  # on one device, or on the eight that there are
    command = [sys.executable, str(ROOT / "scripts" / "resume.py"), str(tmp_path / "run"), *elsewhere]
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert strict((tmp_path / "run" / "summary.json").read_text())["resumed_from"] == summary["steps"]


@pytest.mark.slow
def test_two_processes_do_not_run_in_one_directory(run_arguments: list[str], tmp_path: Path) -> None:
    run_arguments[2] = "400"
    process = started(run_arguments, tmp_path)
    other = command(*run_arguments, cwd=tmp_path)
    process.kill()
    process.communicate()
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].endswith("another process is running in it; wait for it, or choose another.")


@pytest.mark.slow
def test_killed_and_resumed_at_random_moments_runs_end_equal_to_the_last_bit() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "torture.py"), *f"--kills 2 --terms 2 --seed {time.time():.0f}".split()]
        + ["--", "digits", "--epochs", "20", "--checkpoint-every", "50"],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 equal to the last bit" in done.stdout


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line_and_loses_nothing(run_arguments: list[str], tmp_path: Path) -> None:
    process = started(run_arguments, tmp_path)
    process.terminate()
    process.communicate()
    kept = checkpoint.newest(tmp_path / "run" / "checkpoints", print)
    assert kept is not None
    script = str(ROOT / "scripts" / "run.py")
    limited = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        f"sys.argv[0] = {script!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", limited, *run_arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=environment,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: checkpoint of step ")
    assert last.endswith("make room or rights, then the same command goes on from the checkpoint before.")
    assert strict((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert checkpoint.damage(kept) is None
    assert command(*run_arguments, cwd=tmp_path).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("style", ["sequential", "subclassed"])
def test_the_trained_network_is_left_as_plain_keras_files(style: str, tmp_path: Path) -> None:
    done = command("digits", "--steps", "20", "--style", style, "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = "import sys, keras, numpy as np\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\nimport experiments.digits\n" if style == "subclassed" else ""
    code += "model = keras.models.load_model('run/model.keras')\n"
    code += "x = np.arange(2 * 64).reshape(2, 8, 8) % 16\nfirst = model.predict(x, verbose=0)\n"
    code += "model.load_weights('run/model.weights.h5')\nassert (first == model.predict(x, verbose=0)).all()\n"
    code += "print(sum(float(np.abs(w).sum()) for w in model.get_weights()))"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, env=environment
    )
    assert loaded.returncode == 0, loaded.stderr
    exported = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "export.py"), "run"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert exported.stdout.startswith("step 20: run/model.keras, run/model.weights.h5"), exported.stderr
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, env=environment
    )
    assert again.stdout == loaded.stdout


@pytest.mark.slow
def test_a_signal_before_anything_was_asked_ends_the_process_at_once(tmp_path: Path) -> None:
    code = (
        "import signal, time; from research import signals\n"
        "with signals.stopping(lambda number: print('told', number, flush=True)):\n"
        "    signal.raise_signal(signal.SIGTERM); time.sleep(5); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (signals.RESUMABLE, f"told {int(signal.SIGTERM)}\n")


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once_but_an_echo_of_the_first_does_not() -> None:
    code = (
        "import signal, time; from research import signals\n"
        "with signals.stopping(lambda number: None) as asked:\n"
        "    asked(); signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)\n"
        "    print('echo', asked(), flush=True); time.sleep(1.1)\n"
        "    signal.raise_signal(signal.SIGINT); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (signals.RESUMABLE, "echo True\n")


def test_the_manifest_is_strict_json(tmp_path: Path) -> None:
    made = learner()
    path = checkpoint.save(tmp_path / "checkpoints", 1, made.init(), made.names, {"loss": jnp.inf})
    assert strict((path / "manifest.json").read_text())["logs"] == {"loss": None}
    assert json.loads((path / "manifest.json").read_text())["step"] == 1


@pytest.mark.slow
def test_a_run_is_gone_on_with_by_its_experiments_name_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    def script(name: str, *arguments: str) -> tuple[int, str]:
        called = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
        done = subprocess.run(called, capture_output=True, text=True, cwd=tmp_path, check=False)
        return done.returncode, (done.stdout + done.stderr).splitlines()[-1]

    for name in ("resume", "export"):
        assert script(name) == (2, f"error: just {name} RUN: one run directory, or an experiment's name for its latest run.")
        code, said = script(name, "digits")
        assert (code, said[:24]) == (1, "error: no run 'digits': ")
    assert command("digits", "--steps", "3", cwd=tmp_path).returncode == 0
    (run,) = (tmp_path / "runs" / "digits").iterdir()
    assert script("resume", "digits") == (
        0,
        f"runs/digits/{run.name}: this run is finished; open runs/digits/{run.name}/report.html",
    )
    assert script("export", "digits")[1].startswith("step 3: ")
