"""The contract of experiments/README.md is checked before training: each mistake gives one line that tells what to do."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest
from command_line import ROOT
from experiment_file import write_experiment

from research.cli import contract, experiment, run


@pytest.fixture(autouse=True)
def _fresh_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)  # other tests count the programs in the process' own
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    importlib.invalidate_caches()


LAYER = """

class Scaled(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)
"""
SCALED = ("*(keras", "Scaled(lambda x: 2 * x), *(keras")
DATA = 'return {"train": sibling.batches(config)}'
EPOCHS = "    epochs: int = 2\n"


@pytest.mark.parametrize(
    ("changes", "append", "reason"),
    [
        ([("class Config", "class Settings")], "", "mine.py: there is no Config; define a frozen dataclass with epochs, steps, "),
        (
            [("@dataclass(frozen=True)\n", "")],
            "",
            "mine.py: Config is not a dataclass; decorate it with @dataclass(frozen=True).",
        ),
        ([(EPOCHS, "")], "", "mine.py: Config has no field 'epochs'; add `epochs: int = 10`."),
        ([("    steps: int | None = None\n", "")], "", "mine.py: Config has no field 'steps'; add `steps: int | None = None`."),
        ([("def build", "def make")], "", "mine.py: there is no build; define build(config)."),
        ([("def data", "def load")], "", "mine.py: there is no data; define data(config)."),
        (
            [("def build(config)", "def build()")],
            "",
            "mine.py:23: build takes 0 arguments, expected 1; define it as build(config).",
        ),
        ([("def models(config, state)", "def models(state)")], "", "mine.py:33: models takes 1 argument (state), expected 2; "),
        (
            [],
            "\n\ndef pictures(config, state): return {}\n",
            "pictures takes 2 arguments (config, state), expected 4; define it as ",
        ),
        ([], "\n\ndef each_epoch(state): return {}\n", "expected 4; define it as each_epoch(config, learner, state, splits)."),
        (
            [],
            "\n\ndef results(a, b, c, d, e): return {}\n",
            "results takes 5 arguments (a, b, c, d, e), expected 4; define it as ",
        ),
        ([], "\n\ndef summaries(a, b, c, d): pass\n", "as summaries(config, learner, state, splits, writer, step)."),
        ([], "\n\nresults = 3\n", "mine.py: results is int; expected a function results(config, learner, state, splits)."),
        (
            [(DATA, 'return {"training": sibling.batches(config)}')],
            "",
            "mine.py: data(config) returned 'training' splits; expected ",
        ),
        (
            [(DATA, 'return {"train": sibling.batches(config), "a/b": sibling.batches(config)}')],
            "",
            "mine.py: data(config) returned a split named 'a/b'; expected letters, numbers, - and _, since logs and folders are ",
        ),
        (
            [(DATA, "return sibling.batches(config)")],
            "",
            "mine.py: data(config) returned Batches; expected a dict of splits, such ",
        ),
        ([(DATA, 'return {"train": [1, 2]}')], "", "mine.py: data(config) returned list as 'train'; expected Batches, as from "),
        (
            [("return research.supervised(", "return dict(model=")],
            "",
            "mine.py: build(config) returned dict; expected a research.",
        ),
        (
            [(EPOCHS, EPOCHS + "    x: complex = 1j\n")],
            "",
            "mine.py: Config.x is 1j, which is complex; expected finite numbers, ",
        ),
        (
            [(EPOCHS, EPOCHS + "    x: float = float('nan')\n")],
            "",
            "mine.py: Config.x is nan, which is float; expected finite numbers, ",
        ),
        ([SCALED], LAYER, "mine.py: models: 'line' can't be saved as a .keras file (NotImplementedError: "),
    ],
)
def test_a_mistake_gives_one_line_and_nothing_is_trained(
    changes: list[tuple[str, str]], append: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_experiment(tmp_path, *changes, append=append)
    assert run.main([str(file), "--run-dir", "new"]) == 1
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert output.out == ""
    assert not (tmp_path / "new").exists()


def test_models_of_a_large_state_are_not_built_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = experiment.load_experiment(str(write_experiment(tmp_path)))
    state = mine.module.build(mine.module.Config()).init()
    built: list[int] = []

    def build() -> dict[str, keras.Model]:
        built.append(1)
        return {}

    contract.check_models(mine, state, build)
    monkeypatch.setattr(contract, "MAX_PARAMETERS", 4)
    contract.check_models(mine, state, build)
    assert len(built) == 1


def test_functions_with_defaults_and_any_number_of_arguments_keep_the_contract(tmp_path: Path) -> None:
    append = "\n\ndef results(*parts): return {}\n\n\ndef pictures(config, learner, state, splits, size=3): return {}\n"
    contract.check_module(experiment.load_experiment(str(write_experiment(tmp_path, append=append))))


def test_every_experiment_keeps_the_contract() -> None:
    for name in experiment.list_experiments():
        loaded = experiment.load_experiment(name)
        contract.check_module(loaded)
        contract.check_config(loaded, loaded.module.Config())


def test_the_page_lists_every_function_with_its_arguments() -> None:
    page = (ROOT / "experiments" / "README.md").read_text()
    for name, parameters in {**contract.REQUIRED, **contract.OPTIONAL}.items():
        (signature,) = re.findall(rf"^def {name}\((.*?)\)", page, re.MULTILINE)
        assert [parameter.partition(":")[0].strip() for parameter in signature.split(",")] == list(parameters)
