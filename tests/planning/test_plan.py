"""Plans: what the mathematics needs, what the compiler for absent chips says, and that no experiment grows unnoticed."""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import research
from research import Refused, chips, flops, parallel
from research import plan as planning
from research.flops import model_flops
from research.transforms import accumulate, equations

ROOT = Path(__file__).parent.parent
LIBTPU = Path(sys.prefix) / "libtpu"
installed = pytest.mark.skipif(
    not LIBTPU.is_dir() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: `just test` and `just plan` bring it",
)


def shaped(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# What the mathematics needs.


def mlp(remat: bool) -> keras.Model:
    with keras.RematScope("full") if remat else contextlib.nullcontext():
        hidden = [layers.Dense(64, "relu"), layers.Dense(48, "gelu")]
    return keras.Sequential([keras.Input((16,)), *hidden, layers.Dense(8)])


def build(**options: Any) -> research.Learner:
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(48, "gelu"), layers.Dense(8)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return research.supervised(model, loss=loss, optimizer="adamw", metrics=["accuracy"], **options)


BATCH = research.Batch(shaped(24, 16), shaped(24, dtype=np.int32))
WEIGHTS = 16 * 64 + 64 * 48 + 48 * 8


def needed(learner: research.Learner, batch: Any = BATCH) -> int:
    return model_flops(learner.train, jax.eval_shape(learner.init), batch)


def test_a_step_of_dense_layers_needs_six_times_its_weights_but_no_gradient_of_its_inputs() -> None:
    assert needed(build()) == 6 * WEIGHTS * 24 - 2 * 16 * 64 * 24


def test_a_gradient_in_parts_needs_the_same() -> None:
    assert needed(build(gradient_transform=lambda gradient: accumulate(gradient, 4))) == needed(build())


def naive(function: Callable[..., Any], *args: Any) -> int:
    """Every product of a program, loops once: what counting without thinking gives."""
    found = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return sum(flops._cost(each) for each in found if each.primitive.name in ("dot_general", "conv_general_dilated"))


def dense(x: Any, w: Any) -> Any:
    return jnp.tanh(jnp.sin(x @ w) @ w.T)


def block(x: Any, ws: Any) -> Any:
    for w in ws:
        x = dense(x, w)
    return x


def scanned(layer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, ws: jax.lax.scan(lambda x, w: (layer(x, w), x.sum()), x, ws)


def loss(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ws, x: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(function(x, ws)))


def attended(x: Any, w: Any) -> Any:
    scores = jax.nn.softmax(jnp.einsum("qd,kd->qk", x @ w, x))
    return x + dense(scores @ x, w)


CHECKPOINTED = {
    "layers": (block, lambda: jax.checkpoint(block)),
    "one layer of several": (block, lambda: lambda x, ws: block(jax.checkpoint(dense)(x, ws[0]), ws[1:])),
    "each layer of a loop": (scanned(dense), lambda: scanned(jax.checkpoint(dense))),
    "a whole loop": (scanned(dense), lambda: jax.checkpoint(scanned(dense))),
    "both": (scanned(dense), lambda: jax.checkpoint(scanned(jax.checkpoint(dense)))),
    "attention in a loop": (scanned(attended), lambda: scanned(jax.checkpoint(attended))),
    "a policy": (
        scanned(attended),
        lambda: scanned(jax.checkpoint(attended, policy=jax.checkpoint_policies.dots_saveable)),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_what_is_computed_again_counts_once(name: str) -> None:
    plain, again = CHECKPOINTED[name]
    args = shaped(5, 32, 32), shaped(8, 32)
    wanted = model_flops(jax.grad(loss(plain)), *args)
    assert model_flops(jax.grad(loss(again())), *args) == wanted
    if name != "a policy":
        assert naive(jax.grad(loss(again())), *args) > naive(jax.grad(loss(plain)), *args)  # there is something to leave out


def test_layers_in_a_loop_need_what_they_need_one_by_one() -> None:
    args = shaped(5, 32, 32), shaped(8, 32)
    looped = model_flops(jax.grad(loss(scanned(dense))), *args)
    assert looped == model_flops(jax.grad(loss(lambda x, ws: block(x, [ws[i] for i in range(5)]))), *args) + _input_gradient(args)


def _input_gradient(args: Any) -> int:
    """A loop does not know that nobody asks for the gradient of its first input: one product of the first layer more."""
    ws, x = args
    return 2 * x.shape[0] * ws.shape[1] * ws.shape[2]


def test_a_keras_network_that_rematerializes_needs_the_same() -> None:
    def learner(remat: bool) -> research.Learner:
        return research.supervised(mlp(remat), loss="mse", optimizer="sgd")

    batch = research.Batch(shaped(24, 16), shaped(24, 8))
    assert needed(learner(False), batch) == 6 * WEIGHTS * 24 - 2 * 16 * 64 * 24
    assert needed(learner(True), batch) == needed(learner(False), batch)
    program = jax.make_jaxpr(learner(True).train)(jax.eval_shape(learner(True).init), batch)
    assert {"checkpoint", "remat2"} & {each.primitive.name for each in equations(program.jaxpr)}  # it does rematerialize


def test_convolutions_need_what_meets_an_input() -> None:
    x, w = shaped(2, 8, 8, 3), shaped(3, 3, 3, 5)

    def apply(w: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    once = 2 * 2 * 3 * 5 * 22 * 22
    assert model_flops(apply, w, x) == once
    assert model_flops(jax.grad(lambda w, x: jnp.sum(apply(w, x) ** 2)), w, x) == 2 * once


def test_of_branches_the_dearest_counts_and_what_nothing_needs_does_not() -> None:
    def either(x: Any) -> Any:
        _ = x @ x
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert model_flops(either, shaped(16, 16)) == 2 * 2 * 16**3


def test_two_products_that_only_look_alike_are_two() -> None:
    def twice(x: Any, a: Any, b: Any) -> Any:
        return jax.lax.scan(lambda c, w: (dense(c, w), None), x, a)[0] + jax.lax.scan(lambda c, w: (dense(c, w), None), x, b)[0]

    x, w = shaped(8, 32), shaped(5, 32, 32)
    once = model_flops(lambda x, a: scanned(dense)(x, a), x, w)
    assert model_flops(twice, x, w, w) == 2 * once

    def apart(x: Any, a: Any) -> Any:  # from the same start, but not to the same numbers
        return (
            jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, a)[0]
            + jax.lax.scan(lambda c, w: (jnp.cos(c @ w), None), x, a)[0]
        )

    assert model_flops(apart, x, w) == 2 * 5 * 2 * 8 * 32 * 32
    swapped = lambda x, a: jax.lax.scan(lambda c, w: ((c[1] @ w, c[0] @ w.T), None), (x, x), a)[0]  # noqa: E731
    assert model_flops(swapped, x, w) == 5 * 2 * 2 * 8 * 32 * 32


# What is not to be had.


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: chips.slice_of("v5e:16x15"), "did you mean 'v5e:16x16'? There are v4:2x2x1"),
        (lambda: chips.slice_of("h100"), "There are v4:2x2x1"),
        (lambda: planning.topology("v5e:3x3"), "v5e:2x2"),
    ],
)
def test_an_unknown_topology_lists_those_that_there_are(wrong: Any, said: str) -> None:
    with pytest.raises(Refused) as refusal:
        wrong()
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_without_the_compiler_one_line_says_where_to_get_it() -> None:
    asked = "import research\nfrom research import plan\ntry: plan.topology('v5e:2x4')\nexcept research.Refused as e: print(e)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment, check=True)
    (line,) = done.stdout.splitlines()
    assert "libtpu, the compiler for TPUs, is not installed" in line
    assert "`just plan`" in line


MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.

Total hbm usage >= 20.51G:
    reserved        258.00M
    program          16.25G
    arguments         4.00G

  Largest program allocations in hbm:

  1. Size: 16.00G
     Operator: op_name="jit(call)/dot_general" source_file="a.py" source_line=3
     Shape: f32[65536,65536]{1,0:T(8,128)}
     Unpadded size: 16.00G
     XLA label: fusion.1 = fusion(param.1), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Shape: bf16[4096,65536]{1,0}
     XLA label: all-gather.3 = all-gather(param.2), channel_id=1
     Allocation type: HLO temp
     ==========================
"""


def test_too_little_memory_is_read_from_the_compilers_words() -> None:
    found = planning.shortage(MESSAGE)
    assert (found.used, found.limit, found.arguments) == (20.25, 15.75, True)
    assert found.largest == [
        {"gib": 16.0, "shape": "f32[65536,65536]", "what": "jit(call)/dot_general"},
        {"gib": 0.5, "shape": "bf16[4096,65536]", "what": "all-gather.3"},
    ]
    found = planning.shortage("the total memory required for HLO temporaries (298.12G) exceeds available HBM (15.75G).")
    assert found == planning.Shortage(298.12, 15.75, False, [])
    assert planning.shortage("INTERNAL: something else") is None


# The compiler itself.


@pytest.fixture(scope="module")
def compiler() -> None:
    """libtpu, told that it is on no TPU, as scripts/plan.py does."""
    sys.path.append(str(LIBTPU))
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.update({**told, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"})


def networks(units: int, depth: int = 3) -> Callable[[], research.Learner]:
    def build() -> research.Learner:
        keras.utils.set_random_seed(0)
        stack = [layers.Dense(units, "relu", use_bias=False) for _ in range(depth)]
        model = keras.Sequential([keras.Input((units,)), *stack, layers.Dense(8)])
        return research.supervised(model, loss="mse", optimizer=keras.optimizers.AdamW(1e-3))

    return build


def plan(units: int, batch: int, *, depth: int = 3, **axes: int) -> planning.Plan:
    learner, shapes = research.abstract(networks(units, depth))
    return planning.plan(learner, shapes, research.Batch(shaped(batch, units), shaped(batch, 8)), "v5e:2x4", axes)


@installed
@pytest.mark.slow
def test_a_plan_counts_what_a_chip_does(compiler: None) -> None:
    units, batch, depth = 512, 1024, 3
    weights = units * (depth * units + 8)
    found = {name: plan(units, batch, depth=depth, **{name: 8}) for name in ("data", "fsdp")}
    for each in found.values():
        assert each.chips == 8
        assert each.fits
        assert each.parameters == weights + 8
        assert each.model_flops == 6 * weights * batch - 2 * units * units * batch
        assert each.flops == pytest.approx(each.model_flops / 8, rel=0.02)
        assert each.donation_misses == {}
        assert each.roofline["step"] == max(each.roofline[name] for name in ("compute", "memory", "network"))
        assert 0 < each.roofline["utilisation"] <= 1
        assert each.hbm_gib["total"] < each.hbm_gib["limit"]
        json.dumps(each._asdict(), allow_nan=False)
    again = plan(units, batch, depth=depth, fsdp=8)  # though programs are kept: this one can't be read back
    assert again._replace(compile_seconds=0.0) == found["fsdp"]._replace(compile_seconds=0.0)
    data, fsdp = found["data"], found["fsdp"]
    assert set(data.collectives) == {"all-reduce"}
    gradients = 2 * 4 * (weights + 8) * 7 / 8
    assert data.collectives["all-reduce"]["bytes"] == pytest.approx(gradients, rel=0.01)
    # Split eight ways, the state is an eighth: weights and two moments.
    assert data.hbm_gib["arguments"] - fsdp.hbm_gib["arguments"] == pytest.approx(
        7 / 8 * 3 * 4 * units * units * depth / planning.GIB, rel=0.05
    )
    assert sum(each["bytes"] for each in fsdp.collectives.values()) > 0
    assert data.replicated == {}  # nothing was to be split


@installed
@pytest.mark.slow
def test_too_large_a_model_is_an_answer_with_what_takes_the_room(compiler: None) -> None:
    found = plan(32768, 8, depth=2, data=8)
    assert not found.fits
    assert found.hbm_gib["total"] > found.hbm_gib["limit"] == 15.75
    assert found.largest
    assert found.hbm_gib["arguments"] == pytest.approx(3 * 2 * 4, rel=0.01)  # two matrices of 4 GiB, and their moments
    assert found.hbm_gib["temporaries"] >= 2 * 4 + 1  # their gradients, and more
    assert found.largest[0]["gib"] >= 1
    assert "32768" in found.largest[0]["shape"]
    assert found.roofline is None
    json.dumps(found._asdict(), allow_nan=False)


@installed
@pytest.mark.slow
def test_a_program_whose_code_has_no_room_does_not_fit(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(256, 8, data=8)
    chip, count = planning.chips.slice_of("v5e:2x4")
    tight = chip._replace(memory=int(found.hbm_gib["total"] * planning.GIB) - 1)
    assert tight.memory > (found.hbm_gib["arguments"] + found.hbm_gib["temporaries"]) * planning.GIB
    monkeypatch.setattr(planning.chips, "slice_of", lambda name: (tight, count))
    short = plan(256, 8, data=8)
    assert (found.fits, short.fits) == (True, False)
    assert short.largest
    assert short.roofline == found.roofline


@installed
@pytest.mark.slow
def test_what_can_be_counted_otherwise_agrees(compiler: None) -> None:
    """Against XLA's own count where there is no loop, against the number of layers where there is one."""
    from research import hlo

    mesh = parallel.mesh(planning.topology("v5e:2x4"), data=8)
    where = jax.sharding.NamedSharding(mesh, jax.P())

    def compiled(function: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
        given = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=where) for each in shapes]
        return jax.jit(function).lower(*given).compile()

    x, ws = shaped(512, 512), shaped(8, 512, 512)
    plain = compiled(lambda x, ws: jax.nn.relu(x @ ws[0]) @ ws[1], x, ws)
    program = hlo.read(plain.as_text())
    assert hlo.matrix_flops(program) == 2 * 2 * 512**3
    assert plain.cost_analysis()["flops"] == pytest.approx(2 * 2 * 512**3, rel=0.01)

    def looped(x: Any, ws: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, ws)[0]

    counted = [hlo.matrix_flops(hlo.read(compiled(looped, x, shaped(n, 512, 512)).as_text())) for n in (40, 80)]
    assert counted == [40 * 2 * 512**3, 80 * 2 * 512**3]


# The command.


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "TPU_", "JAX_"))}
    asked = [sys.executable, str(ROOT / "scripts" / "plan.py"), *arguments]
    return subprocess.run(asked, capture_output=True, text=True, cwd=cwd, env=kept, check=False)


@installed
@pytest.mark.slow
def test_the_command_writes_a_plan_and_shows_it(tmp_path: Path) -> None:
    done = command("digits", "--topology", "v5e:2x4", "--mesh", "data=2,fsdp=-1", "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "here" / "plan.json").read_text())
    assert (found["experiment"], found["topology"], found["chips"]) == ("digits", "v5e:2x4", 8)
    assert found["mesh"] == {"data": 2, "fsdp": 4}
    assert sorted(found["hbm_gib"]) == ["arguments", "limit", "temporaries", "total"]
    assert sorted(found["roofline"]) == ["compute", "memory", "network", "step", "utilisation"]
    assert found["model_flops"] == 32 * 2 * (2 * 64 * 512 + 3 * 512 * 10)
    assert "utilisation" in done.stdout
    assert "compiling" in done.stderr
    assert done.stdout.splitlines()[-1] == "here/plan.json"


def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/plan.py as a module, which leaves this process' environment alone."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("planning_script", ROOT / "scripts" / "plan.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    script.prepare = lambda topology: None
    return script


BUILDER = """
import research, keras
def compiled():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(8)])
    model.compile(optimizer="adam", loss="mse")
    return model
def plain():
    x = keras.Input((None,), dtype="int32")
    return keras.Model(x, keras.layers.Dense(50)(keras.layers.Embedding(50, 64)(x)))
def number():
    return 3
def broken():
    raise RuntimeError("out of luck")
"""


@installed
@pytest.mark.slow
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
    (tmp_path / "models.py").write_text(BUILDER)
    done = command(*options, "--topology", "v5e:2x4", "--mesh", "fsdp=8", "--run-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "here" / "plan.json").read_text())
    assert found["remark"] == remark
    assert found["fits"]
    assert found["tokens_per_chip"] == (256 * 128 / 8 if "--length" in options else None)


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("digits --topology v5e:2x4 --mesh data=4", 1, "mesh: data=4 on 8 devices; expected sizes that multiply to 8"),
        ("digits --topology v5p:8x16x16 --mesh data=64,fsdp=32", 1, "data=64,fsdp=32 can't be laid over v5p:8x16x16"),
        ("digits --topology v5e:2x4 --mesh data=8 --batch-size 30", 1, "choose 24 or 32"),
        ("digits --topology v5e:2x5 --mesh data=8", 2, "topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'?"),
        ("digits --mesh data=8", 2, "--topology is missing"),
        ("digit --topology v5e:2x4", 2, "no experiment 'digit': did you mean 'digits'?"),
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
def test_what_does_not_fit_gets_one_line(
    arguments: str, code: int, said: str, compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "models.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    script = scripted(monkeypatch)
    assert script.main(arguments.split()) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not list(tmp_path.rglob("plan.json"))


PAGES = [ROOT / "README.md", ROOT / "PODS.md", ROOT / "scripts" / "scaling.py", *sorted((ROOT / "experiments").glob("*.py"))]
TOLD = [
    found
    for page in PAGES
    for found in re.findall(r"just plan ([a-z]+ .*--topology .*?)(?:  |`|$)", page.read_text(), re.MULTILINE)
]


@installed
@pytest.mark.slow
@pytest.mark.promotes  # KerasHub mixes dtypes in gemma
@pytest.mark.parametrize("told", TOLD)
def test_what_the_pages_tell_to_plan_comes_as_far_as_the_compiler(
    told: str, compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def reached(*_: Any) -> Any:
        raise Refused("all that comes before compiling is well")

    script = scripted(monkeypatch)
    monkeypatch.setattr(planning, "model_flops", reached)
    monkeypatch.setattr(importlib.import_module("searching"), "tried", reached)
    asked = [word for word in told.replace("#", " ").split() if not word.startswith("runs/") and word != "--run-dir"]
    assert script.main([*asked, "--run-dir", str(tmp_path)]) == 1
    assert "all that comes before compiling is well" in capsys.readouterr().err


@installed
@pytest.mark.slow
def test_a_search_ranks_what_fits_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(BUILDER)
    asked = [
        "--builder",
        "models:compiled",
        "--topology",
        "v5e:2x2",
        "--batch-size",
        "6",
        "--search",
        "--minutes",
        "0.2",
        "--run-dir",
        "here",
    ]
    done = command(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "here" / "search.json").read_text())["tried"]
    assert len(found) == 6 * 3
    fast = [each["examples_per_second"] for each in found if each.get("fits")]
    assert fast == sorted(fast, reverse=True)
    assert fast
    assert {each["skipped"] for each in found if each["batch"] == 6 and "tensor" not in each["mesh"]} == {
        "6 examples do not divide into 4 parts"
    }


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("largest", "said"), [(37, "296 examples fit; 304 do not"), (1 << 21, "more were not tried")])
def test_the_largest_batch_is_found(
    largest: int, said: str, compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    script, tries = scripted(monkeypatch), []

    def tried(subject: Any, options: Any, arguments: Any, trial: Any, left: float) -> dict[str, Any]:
        tries.append(trial.batch)
        return {"fits": trial.batch <= 8 * largest, "gib": 1.0, "limit": 2.0}

    monkeypatch.setattr(importlib.import_module("searching"), "tried", tried)
    asked = f"digits --topology v5e:2x4 --mesh data=2,fsdp=4 --max-batch --run-dir {tmp_path}"
    assert script.main(asked.split()) == 0
    assert said in capsys.readouterr().out
    assert len(tries) < 25
    assert len(json.loads((tmp_path / "search.json").read_text())["tried"]) == len(tries)


@installed
@pytest.mark.slow
def test_a_search_leaves_out_what_can_not_be_faster_or_fit(
    compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """All ways but two do not fit, of which one is as fast as the chips are: what remains is not compiled."""
    script, asked = scripted(monkeypatch), []

    def tried(subject: Any, options: Any, arguments: Any, trial: Any, left: float) -> dict[str, Any]:
        asked.append(trial)
        slow = trial.axes == {"data": 2, "fsdp": 4}
        fits = slow or (trial.axes == {"data": 8} and trial.batch == 32 and trial.remat)
        found = {
            "fits": fits,
            "gib": 1.0,
            "limit": 2.0,
            "compile_seconds": 0.0,
            "refused": not fits and trial.axes != {"fsdp": 8},
        }
        fast = {"examples_per_second": 1.0 if slow else 1e15, "step": 1.0, "utilisation": 1.0, "bound_by": "compute"}
        return {**found, **fast} if found["fits"] else found

    monkeypatch.setattr(importlib.import_module("searching"), "tried", tried)
    assert script.main(f"gpt --topology v5e:2x4 --batch-size 32 --search --run-dir {tmp_path}".split()) == 0
    found = json.loads((tmp_path / "search.json").read_text())["tried"]
    assert (found[0]["mesh"], found[0]["batch"], found[0]["remat"]) == ("data=8", 32, True)
    reasons = [each.get("skipped", "") for each in found]
    assert any(reason.startswith("at most ") for reason in reasons)
    assert "less did not fit" in reasons
    others = [trial for trial in asked if trial.axes not in ({"fsdp": 8}, {"data": 2, "fsdp": 4})]
    assert {(trial.batch, trial.remat) for trial in others} == {(32, False), (32, True)}  # with more there is less room
    assert {trial.batch for trial in asked if trial.axes == {"fsdp": 8}} == {32, 64, 128}  # there might be
    assert {trial.remat for trial in asked if trial.axes == {"data": 2, "fsdp": 4}} == {False}
    assert "fits without remat" in reasons
    assert len(asked) + sum(map(bool, reasons)) == len(found) == len(importlib.import_module("searching").grids(8)) * 3 * 2
    assert "a step at best, by mesh" in capsys.readouterr().out


# Budgets.


@installed
@pytest.mark.slow
def test_no_experiment_takes_more_than_it_did(tmp_path: Path) -> None:
    done = command("--budget", "--run-dir", "now", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    now = json.loads((tmp_path / "now" / "budgets.json").read_text())["experiments"]
    kept = json.loads((ROOT / "tests" / "budgets.json").read_text())["experiments"]
    grown = over(kept, now)
    assert not grown, "\n".join(grown)


def over(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each thing that grew by more than 2%."""
    accept = "if that is meant: just plan --budget"
    lines = [f"{name} has no budget; {accept}" for name in now if name not in kept]
    both = [(name, mesh) for name, meshes in now.items() if name in kept for mesh in meshes]
    for name, mesh in both:
        before, after = numbers(kept[name].get(mesh, {})), numbers(now[name][mesh])
        for what, number in after.items():
            if number > 1.02 * before.get(what, 0):
                lines.append(f"{name} on {mesh}: {what} grew from {before.get(what, 0):,} to {number:,}; {accept}")
    return lines


def numbers(budget: dict[str, Any]) -> dict[str, int]:
    kinds = {f"{kind} ({part})": n for kind, each in budget.get("collectives", {}).items() for part, n in each.items()}
    return {**kinds, **{name: budget[name] for name in ("temporaries", "flops") if name in budget}}


def test_what_grew_is_named_with_how_to_accept_it() -> None:
    kept = {"digits": {"data=8": {"collectives": {"all-reduce": {"count": 2, "bytes": 1000}}, "temporaries": 100, "flops": 10}}}
    now = {
        "digits": {"data=8": {"collectives": {"all-reduce": {"count": 2, "bytes": 1021}}, "temporaries": 102, "flops": 9}},
        "new": {},
    }
    assert over(kept, now) == [
        "new has no budget; if that is meant: just plan --budget",
        "digits on data=8: all-reduce (bytes) grew from 1,000 to 1,021; if that is meant: just plan --budget",
    ]
    assert over(kept, kept) == []
