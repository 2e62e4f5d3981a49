"""Compiles an experiment's step for TPU chips that are not here: `plan.py NAME --topology v5e:16x16 --mesh fsdp=256`.

just plan NAME --topology v5e:16x16 --mesh fsdp=256 [NAME's own options]    memory, collectives, time at best; plan.json
just plan NAME --topology v5e:16x16 --search --minutes 30                   the fastest mesh that fits, of all there are
just plan NAME --topology v5e:16x16 --mesh fsdp=256 --max-batch             the largest batch that fits
just plan --builder module:function --topology v5e:16x16 --mesh fsdp=256    any function that returns a Keras model
just plan --budget                                                          writes tests/budgets.json anew

The batch size is that of all chips together. Nothing runs: what is said of time is a bound that no step beats.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import run as runner

ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}
BUDGETS = runner.ROOT / "tests" / "budgets.json"
BUDGET = ("v5e:2x4", ("data=2,fsdp=4",))  # small, and every kind of collective shows


@dataclasses.dataclass(frozen=True)
class Options:
    """Chips, and what is asked of them."""

    topology: str = ""
    """The chips and how they are wired: v5e:16x16."""
    mesh: str = "fsdp=-1"
    """They as a grid: data=8, or data=2,fsdp=-1; data splits batches, fsdp weights too, tensor layers; -1 is the rest."""
    layout: Literal["data", "fsdp", "tensor"] | None = None
    """Where weights lie on the mesh; by default as its axes suggest."""
    run_dir: Path | None = None
    """Where plan.json is written; by default a new directory under runs/plan-NAME/."""
    search: bool = False
    """Tries every mesh, twice and four times the batch, and remat on and off where the experiment has it."""
    max_batch: bool = False
    """Looks for the largest batch that fits."""
    minutes: float = 30.0
    """How long a search may take."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A Keras model of one's own."""

    builder: str = ""
    """module:function, which returns a Keras model, compiled or not; modules are looked for where you stand."""
    batch_size: int = 256
    """Examples in a step, on all chips together."""
    length: int | None = None
    """The size of inputs' axes that the model leaves open."""
    loss: str | None = None
    """Of a model that is not compiled, by Keras' name for it."""
    optimizer: str = "adamw"
    """Of a model that is not compiled, by Keras' name for it."""


class Subject(NamedTuple):
    """What is planned: its name, its settings, and how it is made: a learner, its state's shapes, a batch's, and a remark."""

    name: str
    config: Any
    make: Callable[[], tuple[Any, Any, Any, str]]


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nTopologies: {', '.join(ACCELERATORS)}, as in v5e:16x16; NAME is one of:\n")
        print("\n".join(f"  {name:14}  {line}" for name, line in runner.experiments().items()))
        return 0
    asked = value(arguments, "--topology") or BUDGET[0]
    prepare(asked)
    import searching

    from research import record
    from research.state import Refused

    try:
        if "--budget" in arguments:
            return budget(value(arguments, "--run-dir"))
        subject, options = parsed(arguments)
    except Refused as refusal:
        return runner.refuse(str(refusal), 2)
    try:
        directory = writable(options.run_dir or new_directory(subject.name))
        if options.search or options.max_batch:
            (searching.search if options.search else searching.max_batch)(subject, options, arguments, directory)
            return 0
        found = planned(subject, options)
        record.write_json(directory / "plan.json", found)
    except Refused as refusal:
        return runner.refuse(str(refusal), 1)
    show(table(found), directory / "plan.json")
    return 0


def prepare(topology: str) -> None:
    """Tells libtpu, before JAX is imported, where it is and that it is on no TPU."""
    sys.path.append(str(Path(sys.prefix) / "libtpu"))
    sys.path.append(str(Path.cwd()))
    os.environ["JAX_PLATFORMS"] = "cpu"
    told = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": ACCELERATORS.get(topology.partition(":")[0], "v5litepod-8"),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    os.environ.update(told)
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # a program for chips that are not here can't be read back


def parsed(arguments: list[str]) -> tuple[Subject, Options]:
    """What is asked for. Raises `Refused` where that is not to be understood."""
    import tyro

    from research import Refused, chips

    built = any(each.partition("=")[0] == "--builder" for each in arguments)
    known = runner.experiments()
    if built:
        name, rest, kind, doc = "--builder", arguments, Built, __doc__
    else:
        name, *rest = arguments
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}; or give --builder module:function."
            raise Refused(f"no experiment {name!r}: {hint}")
        module = importlib.import_module(f"experiments.{name}")
        kind, doc = module.Config, module.__doc__
    unknown = runner.misspelt(rest, [*dataclasses.fields(kind), *dataclasses.fields(Options)])
    if unknown is not None:
        raise Refused(f"{unknown}; `just plan {name} --help` lists the options.")
    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    fields = [("config", kind), ("options", Options, dataclasses.field(default_factory=Options))]
    found = tyro.cli(
        flat(dataclasses.make_dataclass("Arguments", fields, frozen=True)), args=rest, prog=f"just plan {name}", description=doc
    )
    if not found.options.topology:
        raise Refused("--topology is missing; expected chips and how they are wired, as in --topology v5e:16x16.")
    chips.slice_of(found.options.topology)
    if built:
        return Subject(found.config.builder.replace(":", "."), found.config, lambda: from_builder(found.config)), found.options
    return Subject(name, found.config, lambda: from_experiment(module, found.config)), found.options


def from_experiment(module: Any, config: Any) -> tuple[Any, Any, Any, str]:
    """An experiment's learner and state, from shapes alone, and the shapes of a training batch."""
    import research

    learner, shapes = research.abstract(lambda: module.build(config))
    return learner, shapes, module.data(config)["train"].shapes, ""


def from_builder(config: Built) -> tuple[Any, Any, Any, str]:
    """The learner of somebody's Keras model. Raises `Refused` where there is none, or what it takes is not known."""
    import jax

    import research
    from research import Refused
    from research.measures import output_shapes, targets

    where, held = f"--builder {config.builder}", []
    name, _, attribute = config.builder.partition(":")
    if not name or not attribute:
        raise Refused(f"{where}: expected a module and a function in it, as in --builder models:gpt.")
    try:
        function = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise Refused(f"{where}: {error}; expected a module that is found from here, and a function in it.") from error

    import keras  # after research: it chooses the backend

    def sized(tensor: Any) -> jax.ShapeDtypeStruct:
        open_axes = [axis for axis in tensor.shape[1:] if axis is None]
        if open_axes and config.length is None:
            raise Refused(
                f"{where}: the input {tensor.name!r} is {tensor.shape}; expected all sizes but the first: give --length."
            )
        return jax.ShapeDtypeStruct((config.batch_size, *(axis or config.length for axis in tensor.shape[1:])), tensor.dtype)

    def build() -> research.Learner:
        try:
            model = function()
        except Exception as error:
            line = " ".join(str(error).split())
            raise Refused(f"{where}: it fails ({type(error).__name__}: {line}); expected it to take nothing.") from error
        if not isinstance(model, keras.Model):
            raise Refused(f"{where}: it returned {type(model).__name__}; expected a keras.Model.")
        if not getattr(model, "inputs", None):
            raise Refused(f"{where}: model {model.name!r} does not tell its inputs' shapes; expected a keras.Input in it.")
        if not model.compiled and config.loss is None:
            raise Refused(f"{where}: model {model.name!r} is not compiled; give --loss, or call model.compile(...) in it.")
        x = keras.tree.map_structure(sized, model.inputs[0] if isinstance(model, keras.Sequential) else model.input)
        loss = model.loss if model.compiled else config.loss
        held.append(research.Batch(x, targets(output_shapes(model, x), loss)))
        if model.compiled:
            held.append(f"as compiled: {model.optimizer.name}")
            return research.from_keras(model, example=held[0])
        held.append(f"not compiled: --loss {config.loss}, --optimizer {config.optimizer}")
        return research.supervised(model, loss=config.loss, optimizer=config.optimizer, example=held[0])

    learner, shapes = research.abstract(build)
    return learner, shapes, held[0], held[1]


def planned(subject: Subject, options: Options, quiet: bool = False) -> dict[str, Any]:
    """The plan, as plan.json holds it."""
    from research import parallel
    from research import plan as planning

    with contextlib.nullcontext(lambda phase: None) if quiet else phases() as say:
        say(f"building {subject.name} from shapes")
        learner, shapes, batch, remark = subject.make()
        layout = None if options.layout is None else getattr(parallel, options.layout)
        found = planning.plan(learner, shapes, batch, options.topology, runner.axes(options.mesh), layout, say)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "keras", "libtpu")}
    told = {"experiment": subject.name, "config": dataclasses.asdict(subject.config), "remark": remark}
    return {**told, **found._asdict(), "versions": versions}


@contextlib.contextmanager
def phases() -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done, and since when."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, began = Console(stderr=True), time.monotonic()
    if not console.is_terminal:
        yield lambda phase: print(f"{time.monotonic() - began:7.1f} s  {phase}", file=sys.stderr, flush=True)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda phase: bar.update(task, description=phase)


def table(found: dict[str, Any]) -> Any:
    """A plan for a person to read."""
    from rich.table import Table

    shown = Table(title=f"{found['experiment']} on {found['topology']}", show_header=False, title_justify="left", min_width=76)
    shown.add_column(style="bold")
    shown.add_column()
    tokens = "" if found["tokens_per_chip"] is None else f", {found['tokens_per_chip']:,.0f} tokens a chip"
    grid = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    shown.add_row("chips", f"{found['chips']:,} as {grid}; layout {found['layout']}")
    shown.add_row("batch", f"{found['batch']:,} examples on all chips{tokens}")
    shown.add_row("parameters", f"{found['parameters']:,}" + (f" ({found['remark']})" if found["remark"] else ""))
    shown.add_section()
    memory = {part: size * (1 << 30) for part, size in found["hbm_gib"].items()}
    rest = memory["total"] - memory["arguments"] - memory["temporaries"]
    parts = f"{binary(memory['arguments'])} of arguments, {binary(memory['temporaries'])} of temporaries"
    parts += f", {binary(rest)} of code and results" if rest >= 0.01 * memory["total"] else ""
    verdict = "fits" if found["fits"] else f"does not fit: {binary(memory['total'] - memory['limit'])} too much"
    shown.add_row("memory", f"{binary(memory['total'])} of {binary(memory['limit'])} a chip: {verdict}\n{parts}")
    for each in found["largest"][:5]:
        shown.add_row("", f"{each['gib']:.2f} GiB  {each['shape']}  {each['what']}")
    if not found["fits"]:
        shown.add_row("what helps", "more fsdp, a smaller batch a chip, remat, or accumulate (a batch in parts)")
    for title, key, why in (
        ("held twice", "donation_misses", "not donated: kept beside what replaces it"),
        ("whole everywhere", "replicated", "not split by this layout"),
    ):
        held = sorted(found[key].items(), key=lambda item: -item[1])
        sizes = ", ".join(f"{name} ({decimal(size, 'B')})" for name, size in held[:3])
        if held:
            shown.add_row(title, f"{sizes}{f', and {len(held) - 3} more' if len(held) > 3 else ''}: {why}")
    if not found["fits"]:
        return shown
    shown.add_section()
    roofline = found["roofline"]
    shown.add_row("model", f"{decimal(found['model_flops'], 'FLOP')} on all chips: what the mathematics needs")
    received = sum(each["bytes"] for each in found["collectives"].values())
    for title, part, what in (
        ("compute", "compute", f"{decimal(found['flops'], 'FLOP')} a chip"),
        ("memory traffic", "memory", f"{decimal(found['memory_bytes'], 'B')} a chip"),
        ("network", "network", f"{decimal(received, 'B')} received by a chip"),
    ):
        shown.add_row(title, f"{seconds(roofline[part]):>10}  {what}")
    for kind, each in found["collectives"].items():
        shown.add_row("", f"{'':10}  {decimal(each['bytes'], 'B')} by {each['count']:,} {kind}")
    shown.add_section()
    speed = f"{found['batch'] / roofline['step']:,.0f} examples/s" if roofline["step"] else "nothing to do"
    shown.add_row("a step at best", f"{seconds(roofline['step']):>10}  {speed}; bound by {found['bound_by']}")
    shown.add_row("utilisation", f"{roofline['utilisation']:.1%} of the chips' peak, at best")
    shown.add_row("compiled in", f"{found['compile_seconds']:.1f} s")
    shown.caption = (
        "At best: all links at full rate, computing, memory and network at once.\n"
        "Products of float32 count as one pass of bfloat16, unless they ask for more."
    )
    shown.caption_justify = "left"
    return shown


def decimal(number: float, unit: str) -> str:
    """A number with its unit.

    >>> decimal(1234567, "B"), decimal(12, "FLOP")
    ('1.23 MB', '12 FLOP')
    """
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def binary(size: float) -> str:
    """Bytes of memory.

    >>> binary(3 * 2**29), binary(1000)
    ('1.50 GiB', '0.00 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:.2f} MiB"


def seconds(number: float) -> str:
    """A time.

    >>> seconds(0.0123), seconds(2e-7)
    ('12.3 ms', '0.2 us')
    """
    return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms" if number >= 1e-3 else f"{number * 1e6:.3g} us"


def show(what: Any, path: Path) -> None:
    """Prints a table, and where it is written."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(what)
    console.print(str(path), soft_wrap=True)


def budget(run_dir: str | None) -> int:
    """Writes what every experiment's step takes on a small mesh, so that a change that makes it dearer is noticed."""
    from research import Refused, record

    topology, meshes = BUDGET
    known: dict[str, Any] = {}
    for name in runner.experiments():
        module = importlib.import_module(f"experiments.{name}")
        config = module.Config()
        subject = Subject(name, config, lambda module=module, config=config: from_experiment(module, config))
        for mesh in meshes:
            print(f"{name} on {topology}, {mesh}", file=sys.stderr, flush=True)
            try:
                found = planned(subject, Options(topology=topology, mesh=mesh), quiet=True)
            except Refused as refusal:
                return runner.refuse(f"{name}: {refusal}", 1)
            known.setdefault(name, {})[mesh] = {
                "collectives": found["collectives"],
                "temporaries": round(found["hbm_gib"]["temporaries"] * (1 << 30)),
                "flops": found["flops"],
            }
    record.write_json(
        BUDGETS if run_dir is None else writable(Path(run_dir)) / "budgets.json", {"topology": topology, "experiments": known}
    )
    return 0


def value(arguments: list[str], name: str) -> str | None:
    """What an option is given.

    >>> value(["digits", "--topology=v5e:2x4"], "--topology"), value(["--run-dir", "here"], "--run-dir")
    ('v5e:2x4', 'here')
    """
    for i, each in enumerate(arguments):
        option, equals, given = each.partition("=")
        if option.replace("_", "-") == name:
            return given if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def new_directory(name: str) -> Path:
    """Where a plan is kept, if nobody says."""
    from research import record

    return record.new_directory(f"plan-{name}", Path("runs"))


def writable(directory: Path) -> Path:
    """A directory to write into, made where there is none. Raises `Refused` where that can't be."""
    from research import Refused

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        raise Refused(f"--run-dir {directory}: it can't be written ({error.strerror}); choose a directory of yours.") from error


if __name__ == "__main__":
    runner.as_program(main)
