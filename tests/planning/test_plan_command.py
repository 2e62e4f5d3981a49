"""`research plan`: what it writes and prints, for experiments, files and functions, and one line for what can't be planned."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from plan_cases import MODELS, ROOT, needs_libtpu, run_main, run_process

from research import InvalidArgument
from research.planning import plan as planning
from research.planning import search

pytestmark = [needs_libtpu, pytest.mark.slow]

EXPERIMENT = '''
"""A regression.

A second paragraph.
"""
import dataclasses
import research, keras, numpy as np
from sizes import INPUTS
@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    units: int = 32
    """Units of the hidden layer."""
def build(config):
    layers = [keras.layers.Dense(config.units), keras.layers.Dense(1)]
    return research.supervised(keras.Sequential([keras.Input((INPUTS,)), *layers]), loss="mse", optimizer="adam")
def data(config):
    return {"train": research.from_arrays(np.ones((256, INPUTS)), np.ones((256, 1)), batch_size=config.batch_size)}
'''


def test_the_command_writes_plan_json_and_prints_a_table(tmp_path: Path) -> None:
    done = run_process("digits", "--topology", "v5e:2x4", "--mesh", "data=2,fsdp=-1", "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "here" / "plan.json").read_text())
    assert (plan["experiment"], plan["topology"], plan["chips"]) == ("digits", "v5e:2x4", 8)
    assert plan["mesh"] == {"data": 2, "fsdp": 4}
    assert sorted(plan["hbm_gib"]) == ["arguments", "limit", "temporaries", "total"]
    assert sorted(plan["roofline"]) == ["compute", "memory", "network", "step", "utilisation"]
    assert plan["model_flops"] == 32 * 2 * (2 * 64 * 512 + 3 * 512 * 10)
    assert "utilisation" in done.stdout
    assert "compiling" in done.stderr
    assert done.stdout.splitlines()[-1] == "here/plan.json"


def test_a_file_of_ones_own_project_is_planned(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "mine.py").write_text(EXPERIMENT)
    (project / "sizes.py").write_text("INPUTS = 16")
    done = run_process("project/mine.py", "--topology", "v5e:2x4", "--mesh", "fsdp=8", "--units", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs" / "plan-mine").rglob("plan.json")
    plan = json.loads(path.read_text())
    assert (plan["experiment"], plan["config"]["units"], plan["batch"]) == ("mine", 64, 64)


def test_an_error_in_ones_own_file_is_one_line_with_the_place(
    libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(EXPERIMENT.replace("def build(config):", "def build(config):\n    raise KeyError('units')"))
    (tmp_path / "sizes.py").write_text("INPUTS = 16")
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "mine.py", "--topology", "v5e:2x4", "--mesh", "fsdp=8", "--run-dir", "here") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "mine.py:17: KeyError: 'units'" in line
    assert "KeyError" in (tmp_path / "here" / "error.txt").read_text()


def test_a_search_needs_a_config_with_a_batch_size(
    libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "mine.py").write_text(EXPERIMENT.replace("    batch_size: int = 64\n", ""))
    (tmp_path / "sizes.py").write_text("INPUTS = 16")
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "mine.py", "--topology", "v5e:2x4", "--search") == 1
    assert "error: mine: Config has no field 'batch_size'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("options", "remark"),
    [
        (["--builder", "models:compiled"], "as compiled: adam"),
        (
            ["--builder", "models:plain", "--length", "128", "--loss", "sparse_categorical_crossentropy"],
            "not compiled: --loss sparse_categorical_crossentropy, --optimizer adamw",
        ),
    ],
)
def test_any_function_that_returns_a_model_is_planned(options: list[str], remark: str, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    done = run_process(*options, "--topology", "v5e:2x4", "--mesh", "fsdp=8", "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "here" / "plan.json").read_text())
    assert plan["remark"] == remark
    assert plan["fits"]
    assert plan["tokens_per_chip"] == (256 * 128 / 8 if "--length" in options else None)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("digits --topology v5e:2x4 --mesh data=4", 1, "mesh: data=4 on 8 devices; expected sizes"),
        ("digits --topology v5p:8x16x16 --mesh data=64,fsdp=32", 1, "data=64,fsdp=32 can't be laid over v5p:8x16x16"),
        ("digits --topology v5e:2x4 --mesh data=8 --batch-size 30", 1, "choose 24 or 32"),
        ("digits --topology v5e:2x5 --mesh data=8", 2, "topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'?"),
        ("digits --mesh data=8", 2, "--topology is missing"),
        ("digit --topology v5e:2x4", 2, "no experiment 'digit': did you mean 'digits'?"),
        ("nowhere.py --topology v5e:2x4", 2, "no file 'nowhere.py'"),
        ("models.py --topology v5e:2x4", 1, "models.py: there is no Config"),
        ("digits --topology v5e:2x4 --mush data=8", 2, "no option '--mush': did you mean '--mesh'?"),
        ("--builder nothing:here --topology v5e:2x4", 1, "No module named 'nothing'"),
        ("--builder models --topology v5e:2x4", 1, "expected a module and a function in it"),
        ("--builder models:gpt --topology v5e:2x4", 1, "has no attribute 'gpt'"),
        ("--builder models:number --topology v5e:2x4", 1, "it returned int; expected a keras.Model"),
        ("--builder models:broken --topology v5e:2x4", 1, "it fails (RuntimeError: out of luck)"),
        ("--builder models:plain --topology v5e:2x4 --length 8", 1, "is not compiled; give --loss"),
        ("--builder models:plain --topology v5e:2x4 --loss mse", 1, "give --length"),
    ],
)
def test_what_can_not_be_planned_is_reported_in_one_line(
    arguments: str, code: int, expected: str, libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    assert run_main(monkeypatch, *arguments.split()) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not list(tmp_path.rglob("plan.json"))


PAGES = [
    ROOT / "README.md",
    ROOT / "PODS.md",
    ROOT / "scripts" / "scaling.py",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").glob("*.py")),
]
COMMANDS = [
    command
    for page in PAGES
    for command in re.findall(r"just plan ([a-z]+ .*--topology .*?)(?:  |`|$)", page.read_text(), re.MULTILINE)
]


@pytest.mark.sample(3)
@pytest.mark.promotes  # KerasHub mixes dtypes in gemma
@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_command_reaches_the_compiler(
    command: str, libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def stop(*_: Any) -> Any:
        raise InvalidArgument("the compiler is reached")

    monkeypatch.setattr(planning, "model_flops", stop)
    monkeypatch.setattr(search, "run_trial", stop)
    arguments = [word for word in command.replace("#", " ").split() if not word.startswith("runs/") and word != "--run-dir"]
    assert run_main(monkeypatch, *arguments, "--run-dir", str(tmp_path)) == 1
    assert "the compiler is reached" in capsys.readouterr().err
