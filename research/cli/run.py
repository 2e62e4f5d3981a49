"""Runs an experiment: `run.py NAME --option value ...`; without a name, lists what there is.

An experiment is a module of `experiments/` with `Config`, `build(config)` and `data(config)`. It may have more, of which each is
called where it is there; `parts` stands for `config, learner, state, splits`:

    models(config, state) -> {name: keras.Model}     written as NAME.keras, drawn as plots/NAME.png
    pictures(*parts) -> {name: Figure}               drawn at the end as plots/NAME.png
    each_epoch(*parts) -> {name: Figure}             drawn at each epoch's end as plots/epochs/NAME-0001.png
    results(*parts) -> {name: float}                 measured at the end, added to the summary's metrics
    summaries(*parts, writer, step)                  writes whatever else TensorBoard is to show, at the end
"""

import time

STARTED = time.time()  # before the slow imports: what a user waits for counts from here

import argparse
import ast
import contextlib
import dataclasses
import difflib
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change the numbers."""

    run_dir: Path | None = None
    """Where the run is kept; by default a new directory under runs/NAME/."""
    log_every: int = 50
    """Steps between two logs within an epoch."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; 0 for one at the end alone."""
    profile: tuple[int, int] | None = None
    """The first and last step of a trace by JAX's profiler, kept in the run's profile/."""
    mesh: str | None = None
    """Devices as a grid: data=8, or data=2,fsdp=-1; data splits batches, fsdp weights too, tensor layers; -1 is the rest."""
    layout: Literal["data", "fsdp", "tensor"] | None = None
    """Where weights lie on the mesh; by default as its axes suggest."""
    compiler_flags: bool = True
    """Whether compilers are told what is advised for their chips (research/flags.py)."""
    coordinator: str | None = None
    """host:port where the first of several processes listens; on TPU pods, SLURM, Open MPI and GKE it is found by itself."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this one is, from 0."""
    join_timeout: int = 300
    """Seconds to wait for the others."""


SAID_ANEW = ("run_dir", "profile", "coordinator", "processes", "process", "join_timeout")  # what a resumed run does not repeat


class Wrong(Exception):
    """Options that there are not."""


class Parser(argparse.ArgumentParser):
    """Raises `Wrong` with one line, which every command here says in its own words."""

    def __init__(self, command: str, doc: str | None) -> None:
        super().__init__(prog=command, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Wrong usage."""
        raise Wrong(message)


class Recorded(NamedTuple):
    """A run that was begun: where it is, and what it is a run of."""

    directory: Path
    experiment: str
    module: Any
    config: Any
    options: dict[str, Any]


def recorded(run: str) -> Recorded:
    """The run of a directory, or the latest of an experiment's name. Raises `Refused` where there is none to go on with."""
    from research import Refused, record

    directory = record.find(run, Path("runs"))
    found = json.loads((directory / "config.json").read_text())
    if found["experiment"] not in experiments():
        raise Refused(f"{directory}: it is a run of {found['experiment']!r}, and there is no such experiment here.")
    module = importlib.import_module(f"experiments.{found['experiment']}")
    return Recorded(directory, found["experiment"], module, module.Config(**found["config"]), found.get("options", {}))


def experiments() -> dict[str, str]:
    """Every experiment's name and the first line of its docstring."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = doc.partition("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    known = experiments()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("just run NAME [--option value ...]; `just run NAME --help` lists the options\n")
        width = max(map(len, known))
        print("\n".join(f"  {name:{width}}  {line}" for name, line in known.items()))
        return 0
    name, *rest = arguments
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
        return refuse(f"no experiment {name!r}: {hint}", 2)
    import tyro

    from research.state import Refused

    module = importlib.import_module(f"experiments.{name}")
    unknown = misspelt(rest, [*dataclasses.fields(module.Config), *dataclasses.fields(Options)])
    if unknown is not None:
        return refuse(f"{unknown}; `just run {name} --help` lists the options.", 2)
    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    parsed = tyro.cli(flat(arguments_of(module.Config)), args=rest, prog=f"just run {name}", description=module.__doc__)
    try:
        return run(name, module, parsed.config, parsed.options)
    except Refused as refusal:
        return failed(refusal)


def failed(refusal: Exception) -> int:
    """Says what was refused, and gives the exit code: may be run again where it was the other processes that failed."""
    import jax

    from research import rollcall

    code = refuse(str(refusal), 75 if isinstance(refusal, rollcall.Left) else 1)
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)  # the usual way out waits for the other processes, which wait for this one
    return code


def misspelt(arguments: list[str], fields: list[dataclasses.Field[Any]]) -> str | None:
    """The first option that there is not, with the nearest that there is."""
    known = [f"--{field.name.replace('_', '-')}" for field in fields]
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for option in given:
        if option not in [*known, *(f"--no-{k[2:]}" for k in known), "--help"]:
            near = difflib.get_close_matches(option, known, n=1)
            return f"no option {option!r}" + (f": did you mean {near[0]!r}?" if near else "")
    return None


def arguments_of(config: type) -> type:
    """One flat set of options: the experiment's own, then those that every run has."""
    return dataclasses.make_dataclass(
        "Arguments",
        [("config", config), ("options", Options, dataclasses.field(default_factory=Options))],
        frozen=True,
    )


def run(name: str, module: Any, config: Any, options: Options) -> int:
    """Trains an experiment into its run directory, from where it stopped, and draws and reports what came of it."""
    import jax

    from research import checkpoint, compiled, flags, processes, record

    gc.freeze()  # what was imported stays: going over it takes the collector a tenth of a second each time
    if options.compiler_flags:
        flags.advise(os.environ)
    compilation_cache()
    processes.join(options.coordinator, options.processes, options.process, options.join_timeout)
    kept = {key: value for key, value in dataclasses.asdict(options).items() if key not in SAID_ANEW}
    with contextlib.ExitStack() as stack:
        if jax.process_count() > 1:
            let_go_when_asked()  # joining took the signals for itself
            stack.enter_context(speaking(processes.is_first()))
            processes.alike({**dataclasses.asdict(config), **kept, **record.code()})
        directory = Path(processes.shared(lambda: str(options.run_dir or record.new_directory(name, Path("runs")))))
        if processes.shared(lambda: record.open_run(directory, name, dataclasses.asdict(config))[1] is not None):
            print(f"{directory}: this run is finished; open {directory / 'report.html'}")
            return 0
        splits = module.data(config)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(splits["train"].batch, 0)  # while the network is built and compiled
            learner, start, splits = placed(module, config, options, splits)
            compiled.ahead(learner, splits["train"], start)
            loading.result()  # what is wrong with the data is said before anything is written
        mine = stack.enter_context(processes.own(directory))
        run, _ = record.open_run(mine, name, dataclasses.asdict(config))
        run = run._replace(home=directory)
        stack.enter_context(record.held(run))
        at = checkpoint.Checkpoint(0, start, None)
        newest = processes.shared(lambda: text(checkpoint.newest(run.checkpoints, lambda line: print(line, file=sys.stderr))))
        if newest is not None:
            at = checkpoint.restore(Path(newest), at.state, learner.names)
        record.begin(run, kept, at.step)
        return go_on(run, module, learner, splits, config, options, at)


@contextlib.contextmanager
def speaking(first: bool) -> Iterator[None]:
    """Leaves the standard output to one of several processes, and in it to Python: Gloo, in C++, tells it of each connection."""
    terminal = os.fdopen(os.dup(1) if first else os.open(os.devnull, os.O_WRONLY), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    with contextlib.redirect_stdout(terminal):
        yield


def text(path: Path | None) -> str | None:
    """A path as what can be told to other processes."""
    return None if path is None else str(path)


def placed(module: Any, config: Any, options: Options, splits: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """An experiment's learner, its first state and its data, on one device or on the mesh that is asked for."""
    import jax

    from research import Refused, parallel

    if options.mesh is None and jax.process_count() == 1:
        if options.layout is not None:
            raise Refused(f"--layout {options.layout} without --mesh; expected both, as in --mesh fsdp=-1.")
        learner = module.build(config)
        return learner, learner.init(), splits
    mesh = parallel.mesh(**axes(options.mesh or "data=-1"))
    layout = None if options.layout is None else getattr(parallel, options.layout)
    learner, start = parallel.born(lambda: module.build(config), mesh, layout)
    return learner, start, {name: parallel.spread(held, mesh, divides=name == "train") for name, held in splits.items()}


def axes(text: str) -> dict[str, int]:
    """The sizes of a mesh, as the command line gives them.

    >>> axes("data=2,fsdp=-1")
    {'data': 2, 'fsdp': -1}
    """
    from research import Refused

    try:
        return {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise Refused(f"--mesh {text}: expected axes and sizes, such as data=8 or data=2,fsdp=-1.") from None


def go_on(run: Any, module: Any, learner: Any, splits: Any, config: Any, options: Options, at: Any) -> int:
    """Trains from a checkpoint, and leaves the directory as its end, a failure or a signal wants it."""
    import jax

    from research import Refused, loop, processes, record, rollcall, signals

    directory = run.home
    told_apart = "" if jax.process_count() == 1 else f"-{jax.process_index()}"
    summary = {"status": "failed", "steps": at.step, "epochs": 0, "metrics": {}, "resumed_from": at.step or None}

    def stopped(number: int) -> int:
        summary["status"] = "stopped" if number == signal.SIGINT else "preempted"
        record.summarise(run, summary)
        told = f"stopped by {signal.Signals(number).name} after step {summary['steps']}; to go on: just resume {directory}"
        if processes.is_first():
            print(told, file=sys.stderr, flush=True)
        return signals.RESUMABLE

    with signals.stopping(stopped) as asked:
        try:
            state = train(run, module, learner, splits, config, options, at, summary, processes.agreed(asked))
            results = finish(run, module, learner, splits, config, processes.whole(state), summary)
        except loop.Stopped as stop:
            summary["steps"] = stop.step or summary["steps"]
            return stopped(asked.signal or signal.SIGTERM)  # it may have been another process that was asked
        except Exception as error:
            traced = directory / f"error{told_apart}.txt"
            with contextlib.suppress(OSError):  # the disk may be what failed
                record.summarise(run, summary)
                if not isinstance(error, Refused):
                    traced.write_text(traceback.format_exc())
            if isinstance(error, Refused):
                raise
            if processes.lost(error):
                raise rollcall.Left(
                    f"another process is gone; the traceback is in {traced}, to go on: just resume {directory}"
                ) from error
            raise Refused(f"{type(error).__name__}: {error}; the traceback is in {traced}") from error
        from research import report

        record.summarise(run, {**summary, "status": "finished"})
        page = report.page(run)
    values = {name: value for name, value in summary["metrics"].items() if name.endswith("accuracy") or name in results}
    print(f"{'  '.join(f'{name} {value:.4g}' for name, value in values.items())}\n{page}")
    return 0


def train(
    run: Any, module: Any, learner: Any, splits: Any, config: Any, options: Options, at: Any, summary: dict[str, Any], asked: Any
) -> Any:
    """Trains from a checkpoint to the end, keeping `summary` true at every log and a checkpoint of what was done."""
    import jax

    from research import checkpoint, console, loop, processes, record, state, tensorboard

    data = splits["train"]
    total = config.epochs * data.steps_per_epoch
    total = total if config.steps is None else min(config.steps, total)
    summary["parameters"] = state.parameters(at.state)
    first: list[tuple[int, float]] = []
    # Histograms of the weights, at each epoch or some ten times: more would slow a short run down.
    looks = data.steps_per_epoch * max(1, -(-total // data.steps_per_epoch) // 10)
    known = record.entries(run)
    todo = f"{total - at.step:,} steps to go, {data.steps_per_epoch:,} in an epoch of {data.examples:,} examples"
    print(f"{summary['parameters']:,} trainable parameters; {todo}", flush=True)

    with (
        console.watching(total, data.steps_per_epoch, at.step) as (show, progress),
        tensorboard.recording(run.directory / "tensorboard", learner.names, known, at.step) as (point, weights, waited),
        checkpoint.saving(run.checkpoints, learner.names) as save,
        traces(run.directory / "profile", options.profile) as traced,
    ):

        def log(entry: loop.Entry) -> None:
            first.append((entry.step, time.time()))
            summary.setdefault("seconds_to_first_step", first[0][1] - STARTED)
            passed, seconds = entry.step - first[0][0], first[-1][1] - first[0][1]
            prefix = "" if entry.split == "train" else f"{entry.split}_"
            summary["metrics"].update({prefix + name: value for name, value in entry.values.items()})
            summary.update(steps=entry.step, epochs=entry.step / data.steps_per_epoch)
            summary["steps_per_second"] = passed / seconds if passed and seconds else None
            record.append(run, entry)
            point(entry)
            show(entry)

        def told(step: int, waited: float) -> None:
            summary["seconds_waiting_for_data"] = waited
            progress(step, waited)

        def draw(step: int, state: Any, logs: Any) -> None:
            epoch = -(-step // data.steps_per_epoch)
            try:
                record.draw(run, module.each_epoch(config, learner, processes.whole(state), splits), epoch=epoch)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"no pictures of epoch {epoch}: a device has no room for them beside the training", file=sys.stderr)

        drawing = [(data.steps_per_epoch, draw)] if hasattr(module, "each_epoch") else []
        every = options.checkpoint_every or total + 1
        if at.step and (at.step % looks == 0 or at.step == total):
            weights(at.step, at.state, {})

        try:
            trained, _ = loop.train(
                learner,
                data,
                steps=total,
                start=at.step,
                state=at.state,
                logs=at.logs,
                log_every=options.log_every,
                log=log,
                evaluations={"val": splits["val"]} if "val" in splits else {},
                # A checkpoint comes last: what it has behind it is on the disk.
                hooks=[*traced, *drawing, (looks, weights), (every, waited), (every, save)],
                stop=asked,
                progress=told,
            )
        except loop.Stopped as stop:
            save(stop.step, stop.state, stop.logs)
            raise
        if "test" in splits:
            values = loop.evaluate(learner, splits["test"], trained, asked)
            log(loop.Entry(total, max(0, total - 1) // data.steps_per_epoch, "test", values))
    return trained


def traces(directory: Path, steps: tuple[int, int] | None) -> Any:
    """Hooks that trace these steps, where there are any."""
    from research import profiling

    return contextlib.nullcontext([]) if steps is None else profiling.tracing(directory, *steps)


def finish(
    run: Any, module: Any, learner: Any, splits: Any, config: Any, state: Any, summary: dict[str, Any]
) -> dict[str, float]:
    """What is made of a trained state: results, plain Keras files and pictures, TensorBoard's too. Returns the results."""
    from research import picture, record, tensorboard

    parts = config, learner, state, splits
    results = {name: float(value) for name, value in module.results(*parts).items()} if hasattr(module, "results") else {}
    summary["metrics"].update(results)
    models = networks(module, config, state)
    write(run.directory, models)
    drawn = {name: picture.model(model) for name, model in models.items()}
    drawn |= module.pictures(*parts) if hasattr(module, "pictures") else {}
    drawn["curves"] = picture.curves(record.entries(run))
    files = record.draw(run, drawn)
    with tensorboard.writing(run.directory / "tensorboard" / "train") as writer:
        tensorboard.structure(writer, models)
        tensorboard.images(writer, summary["steps"], {f"pictures/{name}": path for name, path in files.items()})
        if hasattr(module, "summaries"):
            module.summaries(*parts, writer, summary["steps"])
    return results


def networks(module: Any, config: Any, state: Any) -> dict[str, Any]:
    """An experiment's Keras models with a state's weights, where it has any. They lie on the host: a device may lack the room."""
    import jax

    host = None
    if jax.default_backend() != "cpu":
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the host out
            host = jax.local_devices(backend="cpu")[0]
    with jax.default_device(host):
        return dict(module.models(config, state)) if hasattr(module, "models") else {}


def write(directory: Path, models: dict[str, Any]) -> list[Path]:
    """Writes networks as plain Keras files, `NAME.keras` and `NAME.weights.h5`."""
    written = []
    for name, model in models.items():
        written += [directory / f"{name}.keras", directory / f"{name}.weights.h5"]
        model.save(written[-2])
        model.save_weights(written[-1])
    return written


def export(directory: Path, module: Any, config: Any, state: Any) -> list[Path]:
    """Writes the networks of a state into a run's directory."""
    return write(directory, networks(module, config, state))


def compilation_cache() -> None:
    """Keeps compiled programs from one start to the next, unless the environment says where or otherwise."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "research" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def refuse(message: str, code: int) -> int:
    """Says in one line why nothing goes on, and gives the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def let_go_when_asked() -> None:
    """Makes a signal end the process at once, resumable: what holds where no training is under way."""

    def let_go(number: int, _: Any) -> None:
        print(f"stopped by {signal.Signals(number).name}; run the same command again", file=sys.stderr, flush=True)
        os._exit(75)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, let_go)


def as_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command line as the process, which a signal can stop before and after the run too."""
    let_go_when_asked()
    code = main(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # all is done, and the interpreter takes a while to end
    sys.exit(code)


if __name__ == "__main__":
    as_program(main)
