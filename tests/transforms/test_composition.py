"""Every pair of transforms composes, in both orders, or is an error that says why; docs/transforms.md has the table.

A composition is trained one step at a time, by one fused program, on eight devices, and from a checkpoint on: all the same.
"""

import itertools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import research
from research import transforms
from research.distributed import layouts, mesh, shard
from research.training import checkpoint
from research.transforms.population import PopulationState

RNG = np.random.default_rng(0)
BATCHES = [research.Batch(*(jnp.asarray(RNG.normal(size=(16, n)).astype("float32")) for n in (4, 1))) for _ in range(3)]
BATCH = BATCHES[0]
Make = Callable[[int], research.Learner]


def net(units: int, name: str) -> keras.Model:
    stack = [keras.Input((4,)), layers.Dense(8, "tanh", kernel_regularizer="l2", name="first"), layers.Dropout(0.2)]
    return keras.Sequential([*stack, layers.Dense(units, name="last")], name=name)


def supervised(seed: int, options: dict[str, Any]) -> research.Learner:
    keras.utils.set_random_seed(seed)
    return research.supervised(net(1, "net"), loss="mse", metrics=["mae"], **options)


def from_loss(seed: int, options: dict[str, Any]) -> research.Learner:
    keras.utils.set_random_seed(seed)
    model, noise = net(1, "net"), keras.random.SeedGenerator(seed)

    def loss(batch: research.Batch, training: bool) -> Any:
        x = batch.x + 0.1 * keras.random.normal(batch.x.shape, seed=noise)
        return keras.ops.mean((model(x, training=training) - batch.y) ** 2), {}

    return research.learner(loss, [model, noise], example=BATCH, predict=lambda batch: model(batch.x), **options)


def joint(seed: int, options: dict[str, Any], wrap: Callable[[Any], Any] = lambda learner: learner) -> research.Learner:
    keras.utils.set_random_seed(seed)
    code, head = net(4, "code"), net(1, "head")

    def of_code(batch: research.Batch, training: bool) -> Any:
        return keras.ops.mean((head(code(batch.x, training=training)) - batch.y) ** 2), {}

    def of_head(batch: research.Batch, training: bool) -> Any:
        return keras.ops.mean((head(code(batch.x), training=training) - batch.y) ** 2), {}

    first, second = (fresh_optimizer(options) for _ in range(2))
    return research.joint(
        {
            "code": wrap(research.learner(of_code, code, example=BATCH, **first)),
            "head": research.learner(of_head, head, example=BATCH, **second),
        },
        predict=lambda functions, state, batch: functions["code"](state, batch),
    )


def fresh_optimizer(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "optimizer": options["optimizer"]()}


BASES = {
    "supervised": lambda seed, options: supervised(seed, fresh_optimizer(options)),
    "from a loss": lambda seed, options: from_loss(seed, fresh_optimizer(options)),
    "joint": joint,
}


def add_noise(learner: research.Learner, seed: int) -> research.Learner:
    noise = keras.random.SeedGenerator(seed)

    def augmentation(batch: research.Batch, training: bool) -> research.Batch:
        return batch._replace(x=batch.x + 0.1 * keras.random.normal(batch.x.shape, seed=noise)) if training else batch

    return transforms.augment(learner, augmentation, noise, example=BATCH)


OF_OBJECTIVES = {"remat": transforms.remat}
OF_GRADIENTS = {
    "accumulate": partial(transforms.accumulate, parts=2),
    "clip": partial(transforms.clip, max_norm=0.1),
    "clip_per_example": partial(transforms.clip_per_example, max_norm=0.5),
}
OF_LEARNERS = {
    "augment": add_noise,
    "ema": lambda learner, seed: transforms.ema(learner, 0.9),
    "skip_nonfinite": lambda learner, seed: transforms.skip_nonfinite(learner, BATCH),
}
NAMES = ["by_path", *OF_OBJECTIVES, *OF_GRADIENTS, "private", *OF_LEARNERS, "population", "evolve"]
LEVELS = [["by_path"], [*OF_OBJECTIVES], [*OF_GRADIENTS, "private"], [*OF_LEARNERS, "population", "evolve"]]


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


def compose(base: str, names: tuple[str, ...]) -> research.Learner:
    """Returns a base with transforms, the first name innermost among those that take the same."""

    def rules() -> Any:
        return transforms.by_path({"last/": keras.optimizers.SGD(0.02), "": keras.optimizers.SGD(0.05, momentum=0.9)})

    def private(seed: int = 0) -> dict[str, Any]:
        return transforms.private(optimizer(), max_norm=0.3, noise=0.1, batch_size=16, seed=seed)

    optimizer: Any = rules if "by_path" in names else partial(keras.optimizers.SGD, 0.05)
    options: dict[str, Any] = {"optimizer": (lambda: private()["optimizer"]) if "private" in names else optimizer}
    of_gradients = {**OF_GRADIENTS, "private": private()["gradient_transform"]}
    for kind, table in (("objective_transform", OF_OBJECTIVES), ("gradient_transform", of_gradients)):
        chosen = [table[name] for name in names if name in table]
        if chosen:
            options[kind] = partial(apply_all, chosen)
    make: Make = partial(BASES[base], options=options)
    for name in names:
        if name in OF_LEARNERS:
            make = partial(wrapped, make, OF_LEARNERS[name])
        elif name == "population":
            make = partial(populated, make)
        elif name == "evolve":
            make = partial(evolving, make)
    return make(0)


def apply_all(functions: list[Any], value: Any) -> Any:
    for function in functions:
        value = function(value)
    return value


def wrapped(make: Make, wrap: Any, seed: int) -> research.Learner:
    return wrap(make(seed), seed)


def populated(make: Make, seed: int) -> research.Learner:
    return transforms.population(make, 2, example=BATCH)


def evolving(make: Make, seed: int) -> research.Learner:
    learner = make(seed)
    if not isinstance(learner.names, PopulationState):
        learner = transforms.population(make, 3, example=BATCH)  # so that one stays as it is
    _, logs = jax.eval_shape(learner.train, jax.eval_shape(learner.init), BATCH)
    metric = next(name for name in sorted(logs) if name.endswith("loss"))  # joined learners log one each
    return transforms.evolve(learner, every=2, metric=metric, mode="min", seed=seed)


def run(learner: research.Learner, state: Any, batches: Any) -> Any:
    train = jax.jit(learner.train)
    for batch in batches:
        state, logs = train(state, batch)
    return state, logs


def assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def assert_composes(learner: research.Learner, directory: Path) -> None:
    state, logs = run(learner, learner.init(), BATCHES)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *BATCHES)
    fused, _ = jax.jit(transforms.fuse(learner.train))(learner.init(), stacked, 3)
    assert_close(fused, state)
    on_mesh = shard(learner, mesh(jax.devices()[:8], data=8), layouts.data)
    sharded, sharded_logs = run(on_mesh, on_mesh.init(), BATCHES)
    assert_close((sharded, sharded_logs), (state, logs))
    before, _ = run(learner, learner.init(), BATCHES[:1])
    path = checkpoint.save(directory, 1, before, learner.names)
    resumed = checkpoint.restore(path, jax.eval_shape(learner.init), learner.names).state
    jax.tree.map(np.testing.assert_array_equal, run(learner, resumed, BATCHES[1:]), (state, logs))


PAIRS = [pair for pair in itertools.permutations(NAMES, 2) if level(pair[0]) <= level(pair[1])]
CASES = [(base, pair) for pair in PAIRS for base in BASES]
# The inner one, then the outer one.
ERRORS = dict.fromkeys(
    [("accumulate", "clip_per_example"), ("accumulate", "private")],
    "a batch of 1 examples cannot be split into 2 equal micro-batches",
)
COMMUTING = {
    ("clip_per_example", "private"),
    ("augment", "ema"),
    ("augment", "skip_nonfinite"),
    ("ema", "skip_nonfinite"),
    ("ema", "population"),
    ("skip_nonfinite", "population"),
    ("skip_nonfinite", "evolve"),
}


@pytest.mark.sample(31)
@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize(("base", "pair"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_each_pair_composes(base: str, pair: tuple[str, str], tmp_path: Path) -> None:
    if pair not in ERRORS:
        return assert_composes(compose(base, pair), tmp_path)
    learner = compose(base, pair)
    with pytest.raises(research.InvalidArgument, match=ERRORS[pair]):
        learner.train(learner.init(), BATCH)


SAME_LEVEL = [pair for pair in itertools.combinations(NAMES, 2) if level(pair[0]) == level(pair[1])]


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.promotes
@pytest.mark.parametrize("pair", [pair for pair in SAME_LEVEL if pair not in ERRORS], ids="-".join)
def test_which_orders_give_the_same(pair: tuple[str, str]) -> None:
    results = []
    for names in (pair, pair[::-1]):
        learner = compose("supervised", names)
        state, logs = run(learner, learner.init(), BATCHES)
        results.append((logs["loss"], learner.predict(state, BATCH)))
    pairs = zip(*results, strict=True)
    same = all(a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    assert same == (pair in COMMUTING)


@pytest.mark.slow
@pytest.mark.sample(7)
@pytest.mark.promotes
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_unroll_of_a_learner_with_any_transform_has_its_values_and_derivatives(base: str, name: str) -> None:
    learner = compose(base, (name,))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *BATCHES)
    unrolled = jax.jit(transforms.unroll(learner, 3))
    state, logs = unrolled(learner.init(), stacked)
    expected, last = run(learner, learner.init(), BATCHES)
    assert_close((state, jax.tree.map(lambda log: log[-1], logs)), (expected, last))

    def total(x: Any) -> Any:
        logs = unrolled(learner.init(), stacked._replace(x=x))[1]
        return sum(log.sum() for name, log in logs.items() if name.endswith("loss"))

    gradient, direction = jax.grad(total)(stacked.x), jnp.asarray(RNG.normal(size=stacked.x.shape).astype("float32"))
    step = 3e-3
    difference = (total(stacked.x + step * direction) - total(stacked.x - step * direction)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=2e-3, atol=5e-4)


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("name", ["augment", "ema"])
def test_learners_that_are_joined_may_have_transforms(name: str, tmp_path: Path) -> None:
    assert_composes(
        joint(0, {"optimizer": partial(keras.optimizers.SGD, 0.05)}, lambda each: OF_LEARNERS[name](each, 0)), tmp_path
    )


def test_the_page_about_transforms_has_the_table_that_is_tested() -> None:
    text = (Path(__file__).parents[2] / "docs" / "transforms.md").read_text()
    rows = [re.findall(r"[^|]+", line) for line in text.splitlines() if line.startswith("| ") and len(line.split("|")) > 5]
    (_, *columns), *lines = [[cell.strip().strip("`") for cell in row] for row in rows]
    table = {(line[0], column): cell for line in lines for column, cell in zip(columns, line[1:], strict=True)}
    commuting = COMMUTING | {pair[::-1] for pair in COMMUTING}

    def expected(pair: tuple[str, str]) -> str:
        if pair[0] == pair[1] or level(pair[0]) > level(pair[1]):
            return ""
        if level(pair[0]) < level(pair[1]):
            return "yes"
        return "error" if pair in ERRORS else "either order" if pair in commuting else "yes"

    assert table == {pair: expected(pair) for pair in itertools.product(NAMES, NAMES)}
