"""Values of options: each that can't be is reported in one line, with exit code 2, before anything is built or written."""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest
from command_line import research

from research.cli import experiment, fields, options, plan, report, resume, run
from research.cli.arguments import UsageError, parse
from research.cli.fields import Interval
from research.core.state import InvalidArgument

EXPERIMENTS = sorted(name for name in experiment.list_experiments() if name not in ("gemma", "lora"))  # they need KerasHub


def numeric(config_class: type) -> dict[str, Any]:
    """The annotations of all options that are numbers, or None or tuples of numbers."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {name: hint for name, hint in hints.items() if {int, float} & set(leaves(hint))}


def leaves(annotation: Any) -> list[Any]:
    arguments = typing.get_args(annotation)
    return [annotation] if not arguments else [leaf for argument in arguments for leaf in leaves(argument)]


def outside(interval: Interval) -> list[str]:
    """Numbers just outside of an interval, and far away."""
    low, high = (float(bound) for bound in interval.text[1:-1].split(","))
    integers = low.is_integer() and high > 2**30 and high < 2**40
    below = [low] if interval.text[0] == "(" else [low - 1]
    above = [high] if interval.text[-1] == ")" else [high + 1 if integers else high * 10]
    values = [*below, *above, -1e9]
    return [str(int(value)) for value in values] if integers else [*map(str, values), "nan", "inf", "-inf"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_of_every_experiment_has_an_interval_and_values_outside_of_it_are_wrong_usage(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for field, annotation in numeric(experiment.load_experiment(name).module.Config).items():
        intervals = [leaf for leaf in leaves(annotation) if isinstance(leaf, Interval)]
        assert intervals, f"{name}: {field}"
        option = f"--{field.replace('_', '-')}"
        for value in outside(intervals[0]):
            assert run.main([name, option, value]) == 2, (option, value)
            (line,) = capsys.readouterr().err.splitlines()
            shown = float(value) if float in leaves(annotation) else value
            assert line == (
                f"error: {option} {shown}: expected a value in {intervals[0].text}; `just run {name} --help` lists the options."
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "many"], "--epochs: expected a whole number, got 'many'"),
        (["--epochs", "1.5"], "--epochs: expected a whole number, got '1.5'"),
        (["--epochs", "1e3"], "--epochs: expected a whole number, got '1e3'"),
        (["--epochs", ""], "--epochs: expected a whole number, got ''"),
        (["--epochs", "None"], "--epochs: expected a whole number, got 'None'"),
        (["--learning-rate", "fast"], "--learning-rate: expected a number, got 'fast'"),
        (["--learning-rate", "1,5"], "--learning-rate: expected a number, got '1,5'"),
        (["--epochs"], "Missing value for argument '--epochs'. Expected 1 values"),
        (["--epochs", "3", "4"], "Unrecognized options: 4"),
        (["3"], "Unrecognized options: 3"),
        (["--no-compiler-flags", "3"], "Unrecognized options: 3"),
        (["--layout", "rows"], "invalid choice 'rows' for argument '--layout'. Expected one of ("),
        (["--data", "cifar"], "invalid choice 'cifar' for argument '--data'. Expected one of ('sklearn', 'mnist', "),
        (["--log-every", "0"], "--log-every 0: expected a value in [1, 2147483647]"),
        (["--log-every", "-3"], "--log-every -3: expected a value in [1, 2147483647]"),
        (
            ["--checkpoint-every", "-1"],
            "--checkpoint-every -1: expected steps (500; 0 for the end only), 2epochs, 30s, 5min, 1h or auto",
        ),
        (["--profile", "0", "3"], "--profile 0 3: expected a value in [1, 2147483647]"),
        (["--profile", "5", "2"], "--profile 5 2: expected the first and last step, with the last not before the first"),
        (["--profile", "5"], "--profile: no type matching {None}|{INT INT} could be instantiated from ['5']"),
        (["--processes", "0"], "--processes 0: expected a value in [1, 2147483647]"),
        (["--process", "-1"], "--process -1: expected a value in [0, 2147483647]"),
        (["--join-timeout", "0"], "--join-timeout 0: expected a value in [1, 1000000]"),
        (["--coordinator", "host:99999"], "--coordinator host:99999: expected host:port, with a port from 1 to 65535"),
        (["--coordinator", "host:0"], "--coordinator host:0: expected host:port, with a port from 1 to 65535"),
        (["--coordinator", "host:-1"], "--coordinator host:-1: expected host:port, with a port from 1 to 65535"),
        (["--coordinator", "host:²"], "--coordinator host:²: expected host:port, with a port from 1 to 65535"),
        (["--coordinator", "host"], "--coordinator host: expected host:port, with a port from 1 to 65535"),
        (["--coordinator", ":80"], "--coordinator :80: expected host:port, with a port from 1 to 65535"),
        (["--epoch", "3"], "no option '--epoch': did you mean '--epochs'?"),
    ],
)
def test_a_value_that_can_not_be_is_wrong_usage_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["digits", *arguments]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith("; `just run digits --help` lists the options.")
    assert output.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 300, "it can't be used (File name too long); choose a directory of yours."),
        ("/".join(["x" * 200] * 30), "it can't be used (File name too long); choose a directory of yours."),
        ("a\0b", "it can't be used (invalid characters); choose a directory of yours."),
        ("loop/run", "it can't be used (Too many levels of symbolic links); choose a directory of yours."),
        ("nothing/run", "it can't be used (it is a link to nothing); choose a directory of yours."),
        ("file", "file can't be written to; choose a directory of yours."),
        ("file/run", "/file can't be written to; choose a directory of yours."),
        ("/dev/null", "/dev/null can't be written to; choose a directory of yours."),
    ],
)
def test_a_run_directory_that_can_not_be_is_reported_in_one_line(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("nothing is built"))
    Path("loop").symlink_to("loop")
    Path("nothing").symlink_to("nowhere")
    Path("file").write_text("mine")
    assert run.main(["digits", "--run-dir", name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --run-dir " + name[:200].replace("\0", "\\x00"))
    assert line.endswith(reason)
    assert len(line) < 400


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "", "/dev/null", "\udcff", "*", "..", "digits/"])
def test_a_run_that_is_none_is_reported_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for main in (report.main, resume.main):
        assert main([name]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: no run {name[:200]!r}"[:100])


def test_a_config_may_reject_values_itself(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        low: int = 0
        high: int = 1
        kind: str = ""

        def __post_init__(self) -> None:
            if self.low >= self.high:
                raise ValueError(f"--low {self.low} --high {self.high}: expected low < high.")
            if self.kind:
                raise InvalidArgument("--kind: expected nothing.")
            if self.high == 10:
                raise RuntimeError("--high 10: expected anything else.")

    for arguments, message in (
        (["--low", "3"], "--low 3 --high 1: expected low < high"),
        (["--kind", "a"], "--kind: expected nothing"),
        (["--high", "10"], "--high 10: expected anything else"),
    ):
        with pytest.raises(UsageError) as error:
            parse(Config, options.Options, arguments, "just run mine", None)
        assert str(error.value) == f"{message}; `just run mine --help` lists the options."
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("annotation", "value", "restored"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float | int, 3, 3),
        (int | float, 2.5, 2.5),
        (str | Path, "a", Path("a")),
        (Path | None, None, None),
        (tuple[int, ...], [], ()),
        (tuple[int, str], [3, "a"], (3, "a")),
        (tuple[tuple[float, ...], ...], [[1, 2.5]], ((1.0, 2.5),)),
        (list[Path], ["a"], [Path("a")]),
        (dict[str, tuple[int, ...]], {"a": [1]}, {"a": (1,)}),
        (typing.Literal["a", 1], 1, 1),
        (Annotated[int, Interval("[1, 3]")] | None, 3, 3),
        (Any, {"a": [1]}, {"a": [1]}),
        (bool, False, False),
    ],
)
def test_values_of_config_json_become_those_of_the_annotations(annotation: Any, value: Any, restored: Any) -> None:
    config_class = dataclasses.make_dataclass("Config", [("value", annotation)])
    config = fields.restore_config(config_class, json.loads(json.dumps({"value": value})))
    assert config.value == restored
    assert type(config.value) is type(restored)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (int, True, "value is True; expected a whole number"),
        (int, 3.0, "value is 3.0; expected a whole number"),
        (float, "3", "value is '3'; expected a number"),
        (float, None, "value is null; expected a number"),
        (bool, 1, "value is 1; expected true or false"),
        (str, [], "value is []; expected a string"),
        (Path, 3, "value is 3; expected a path"),
        (typing.Literal["a", 1], True, "value is True; expected 'a' or 1"),
        (tuple[int, str], [3], "value is [3]; expected a list of 2"),
        (tuple[int, ...], "12", "value is '12'; expected a list"),
        (dict[str, int], {"a": "b"}, "value is {'a': 'b'}; expected a whole number"),
        (list[int], {}, "value is {}; expected a list"),
        (Annotated[int, Interval("[1, 3]")] | None, 4, "value is 4; expected a value in [1, 3]"),
        (tuple[Annotated[int, Interval("[1, 3]")], ...], [1, 4], "value is [1, 4]; expected a value in [1, 3]"),
    ],
)
def test_other_values_of_config_json_are_reported(annotation: Any, value: Any, expected: str) -> None:
    config_class = dataclasses.make_dataclass("Config", [("value", annotation)])
    with pytest.raises(InvalidArgument) as error:
        fields.restore_config(config_class, {"value": value})
    assert str(error.value) == expected


def test_every_number_among_the_options_of_the_commands_has_an_interval() -> None:
    for options_class in (options.Options, plan.Options):
        for name, annotation in numeric(options_class).items():
            assert any(isinstance(leaf, Interval) for leaf in leaves(annotation)), name
    assert math.nan not in Interval("[-inf, inf]")


@pytest.mark.slow
def test_the_help_has_a_title_for_the_options_of_the_experiment_and_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for main, name in ((run.main, "run"), (lambda arguments: plan.run(arguments), "plan")):
        with pytest.raises(SystemExit) as exit:
            main(["digits", "--help"])
        assert exit.value.code == 0
        page = capsys.readouterr().out
        titles = [title for line in page.splitlines() if (title := line.strip("╭─╮- ")).endswith("options")]
        assert titles == ["options", "experiment options", f"{name} options"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        (None, {"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: there is no such device here, or no support for it is installed"),
        (None, {"JAX_PLATFORMS": "gpuu"}, "JAX_PLATFORMS=gpuu: there is no such device here, or no support for it is installed"),
        (
            {"image_data_format": "channels_first"},
            {},
            "Keras' setting image_data_format is 'channels_first', expected 'channels_",
        ),
        (
            {"floatx": "float16"},
            {},
            "Keras' setting floatx is 'float16', expected 'float32', since config.json does not record it; ",
        ),
        ({"nnx_enabled": True}, {}, "keras.json"),
        ({"floatx": "float8"}, {}, "Keras can't be imported (ValueError: Invalid `floatx` configuration. "),
        ([1], {}, "Keras can't be imported (AttributeError: "),
    ],
)
def test_devices_and_settings_that_are_not_usable_are_reported_in_one_line(
    settings: Any, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "keras").mkdir()
    if settings is not None:
        (tmp_path / "keras" / "keras.json").write_text(json.dumps(settings))
    done = research("run", "digits", "--run-dir", "run", cwd=tmp_path, KERAS_HOME=str(tmp_path / "keras"), **environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line
    assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_full_stdout_is_reported_in_one_line(tmp_path: Path) -> None:
    import subprocess
    import sys

    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "research", "run"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: OSError: [Errno 28] No space left on device")
