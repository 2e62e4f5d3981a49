"""The same steps on JAX, TensorFlow and PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
OTHERS = ("tensorflow", "tensorflow-function", "torch")
pytestmark = pytest.mark.slow


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "backends.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of SGD at a rate that learns: at the documents' 1e-3 the weights hardly move, and differ less still."""
    directory = tmp_path_factory.mktemp("here") / "run"
    options = ("--optimizer", "sgd", "--learning-rate", "0.1", "--epochs", "2", "--rounds", "1")
    done = command(*options, "--run-dir", directory.name, cwd=directory.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(directory / f"{name}.npz"))


@pytest.mark.parametrize("name", OTHERS)
def test_losses_equal_those_of_other_backends_to_5e_6_at_every_step(compared: Path, name: str) -> None:
    ours, theirs = arrays(compared, "jax"), arrays(compared, name)
    assert ours["loss"].shape == (2 * 23,)
    assert np.mean(ours["loss"][-5:]) < 0.7 * ours["loss"][0]  # there was something to agree about
    np.testing.assert_allclose(theirs["loss"], ours["loss"], rtol=5e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_weights_equal_those_of_other_backends_to_5e_6(compared: Path, name: str) -> None:
    ours, theirs, start = (arrays(compared, each) for each in ("jax", name, "start"))
    for weight in (f"weight_{i}" for i in range(6)):
        assert np.abs(ours[weight] - start[weight]).max() > 0.01
        np.testing.assert_allclose(theirs[weight], ours[weight], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_accuracies_are_those_of_other_backends(compared: Path, name: str) -> None:
    ours, theirs = arrays(compared, "jax"), arrays(compared, name)
    assert theirs["accuracy"].tolist() == ours["accuracy"].tolist()
    assert theirs["val_accuracy"].tolist() == ours["val_accuracy"].tolist()


def test_a_comparison_leaves_numbers_and_a_picture_and_is_shown_again(compared: Path) -> None:
    found = json.loads((compared / "backends.json").read_text())
    assert set(found["backends"]) == {"jax", *OTHERS}
    assert all(row["time_over_ours"]["median"] > 0 for row in found["backends"].values())
    assert (compared / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in compared.iterdir()}
    options = ("--optimizer", "sgd", "--learning-rate", "0.1", "--epochs", "2", "--rounds", "1", "--run-dir", compared.name)
    again = command(*options, cwd=compared.parent)
    assert (again.returncode, again.stderr) == (0, "")
    assert "PyTorch" in again.stdout
    other = command(*options, "--seed", "1", cwd=compared.parent)
    assert other.returncode == 1
    assert other.stderr.startswith("error: --run-dir run: it holds a comparison with other options")
    assert before == {path: path.stat().st_mtime_ns for path in compared.iterdir()}


@pytest.mark.parametrize(
    "options", [("--epochs", "0"), ("--optimizer", "nadam"), ("--epoch-count", "3"), ("--learning-rate", "nan")]
)
def test_wrong_usage_exits_2_and_writes_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = command(*options, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert options[0] in done.stderr


def test_without_the_other_backends_one_line_says_how_to_get_them(tmp_path: Path) -> None:
    hidden = "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1])"
    program = f"{hidden}; runpy.run_path(sys.argv.pop(1) + '/backends.py', run_name='__main__')"
    call = [sys.executable, "-c", program, str(ROOT / "scripts")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert done.stderr == "error: no torch in this environment: `just backends` installs them into one of its own.\n"
