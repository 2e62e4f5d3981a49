"""The same training steps on JAX, TensorFlow and PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
OTHER_BACKENDS = ("tensorflow", "tensorflow-function", "torch")
pytestmark = pytest.mark.slow


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "backends.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of SGD with a learning rate large enough for weights to differ: at the default 1e-3 they hardly change."""
    directory = tmp_path_factory.mktemp("comparison") / "run"
    options = ("--optimizer", "sgd", "--learning-rate", "0.1", "--epochs", "2", "--rounds", "1")
    done = command(*options, "--run-dir", directory.name, cwd=directory.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(directory / f"{name}.npz"))


@pytest.mark.parametrize("name", OTHER_BACKENDS)
def test_losses_of_all_backends_agree_to_5e_6_at_every_step(comparison: Path, name: str) -> None:
    expected, results = arrays(comparison, "jax"), arrays(comparison, name)
    assert expected["loss"].shape == (2 * 23,)
    assert np.mean(expected["loss"][-5:]) < 0.7 * expected["loss"][0]  # the weights learned something
    np.testing.assert_allclose(results["loss"], expected["loss"], rtol=5e-6)


@pytest.mark.parametrize("name", OTHER_BACKENDS)
def test_weights_of_all_backends_agree_to_5e_6(comparison: Path, name: str) -> None:
    expected, weights, start = (arrays(comparison, part) for part in ("jax", name, "start"))
    for name in (f"weight_{i}" for i in range(6)):
        assert np.abs(expected[name] - start[name]).max() > 0.01
        np.testing.assert_allclose(weights[name], expected[name], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", OTHER_BACKENDS)
def test_accuracies_of_all_backends_are_equal(comparison: Path, name: str) -> None:
    expected, results = arrays(comparison, "jax"), arrays(comparison, name)
    assert results["accuracy"].tolist() == expected["accuracy"].tolist()
    assert results["val_accuracy"].tolist() == expected["val_accuracy"].tolist()


def test_a_comparison_writes_numbers_and_a_figure_and_running_it_again_only_prints_them(comparison: Path) -> None:
    summary = json.loads((comparison / "backends.json").read_text())
    assert set(summary["backends"]) == {"jax", *OTHER_BACKENDS}
    assert all(row["time_over_ours"]["median"] > 0 for row in summary["backends"].values())
    assert (comparison / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in comparison.iterdir()}
    options = ("--optimizer", "sgd", "--learning-rate", "0.1", "--epochs", "2", "--rounds", "1", "--run-dir", comparison.name)
    repeated = command(*options, cwd=comparison.parent)
    assert (repeated.returncode, repeated.stderr) == (0, "")
    assert "PyTorch" in repeated.stdout
    different = command(*options, "--seed", "1", cwd=comparison.parent)
    assert different.returncode == 1
    assert different.stderr.startswith("error: --run-dir run: contains a comparison with other options")
    assert before == {path: path.stat().st_mtime_ns for path in comparison.iterdir()}


@pytest.mark.parametrize(
    "options", [("--epochs", "0"), ("--optimizer", "nadam"), ("--epoch-count", "3"), ("--learning-rate", "nan")]
)
def test_wrong_usage_exits_2_and_writes_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = command(*options, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert options[0] in done.stderr


def test_missing_backends_are_an_error_of_one_line_that_names_the_command_to_install_them(tmp_path: Path) -> None:
    without_torch = "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1])"
    program = f"{without_torch}; runpy.run_path(sys.argv.pop(1) + '/backends.py', run_name='__main__')"
    call = [sys.executable, "-c", program, str(ROOT / "scripts")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert done.stderr == "error: this environment lacks torch: `just backends` installs what it needs.\n"
