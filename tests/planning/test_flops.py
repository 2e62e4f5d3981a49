"""Model FLOPs: against counts by hand, with and without recomputation, in loops and branches."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers
from plan_cases import shape

import research
from research.planning import flops
from research.planning.flops import model_flops
from research.transforms.accumulate import accumulate
from research.transforms.jaxpr import equations

BATCH = research.Batch(shape(24, 16), shape(24, dtype=np.int32))
WEIGHTS = 16 * 64 + 64 * 48 + 48 * 8


def classifier(**options: Any) -> research.Learner:
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(48, "gelu"), layers.Dense(8)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return research.supervised(model, loss=loss, optimizer="adamw", metrics=["accuracy"], **options)


def regressor(remat: bool) -> research.Learner:
    with keras.RematScope("full") if remat else contextlib.nullcontext():
        hidden = [layers.Dense(64, "relu"), layers.Dense(48, "gelu")]
    model = keras.Sequential([keras.Input((16,)), *hidden, layers.Dense(8)])
    return research.supervised(model, loss="mse", optimizer="sgd")


def step_flops(learner: research.Learner, batch: Any = BATCH) -> int:
    return model_flops(learner.train, jax.eval_shape(learner.init), batch)


def test_dense_layers_need_six_flops_per_weight_and_example_without_the_gradient_of_the_inputs() -> None:
    assert step_flops(classifier()) == 6 * WEIGHTS * 24 - 2 * 16 * 64 * 24


def test_an_accumulated_gradient_needs_the_same_flops() -> None:
    accumulated = classifier(gradient_transform=lambda gradient: accumulate(gradient, 4))
    assert step_flops(accumulated) == step_flops(classifier())


def flops_of_all_products(function: Callable[..., Any], *args: Any) -> int:
    """The FLOPs of every product in a program, recomputed ones too; the body of a loop counts once."""
    program = jax.make_jaxpr(function)(*args)
    products = [e for e in equations(program) if e.primitive.name in ("dot_general", "conv_general_dilated")]
    return sum(flops._equation_flops(product) for product in products)


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


def attention(x: Any, w: Any) -> Any:
    scores = jax.nn.softmax(jnp.einsum("qd,kd->qk", x @ w, x))
    return x + dense(scores @ x, w)


CHECKPOINTED = {
    "layers": (block, lambda: jax.checkpoint(block)),
    "one layer of several": (block, lambda: lambda x, ws: block(jax.checkpoint(dense)(x, ws[0]), ws[1:])),
    "each layer of a scan": (scanned(dense), lambda: scanned(jax.checkpoint(dense))),
    "a complete scan": (scanned(dense), lambda: jax.checkpoint(scanned(dense))),
    "both": (scanned(dense), lambda: jax.checkpoint(scanned(jax.checkpoint(dense)))),
    "attention in a scan": (scanned(attention), lambda: scanned(jax.checkpoint(attention))),
    "a policy": (
        scanned(attention),
        lambda: scanned(jax.checkpoint(attention, policy=jax.checkpoint_policies.dots_saveable)),
    ),
}


@pytest.mark.usefixtures("primitives")
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_recomputed_values_count_once(name: str) -> None:
    plain, checkpointed = CHECKPOINTED[name]
    args = shape(5, 32, 32), shape(8, 32)
    expected = model_flops(jax.grad(loss(plain)), *args)
    assert model_flops(jax.grad(loss(checkpointed())), *args) == expected
    if name != "a policy":  # something is recomputed
        assert flops_of_all_products(jax.grad(loss(checkpointed())), *args) > flops_of_all_products(jax.grad(loss(plain)), *args)


def test_scanned_layers_need_the_flops_of_unrolled_layers() -> None:
    ws, x = shape(5, 32, 32), shape(8, 32)
    unrolled = model_flops(jax.grad(loss(lambda x, ws: block(x, [ws[i] for i in range(5)]))), ws, x)
    # A scan computes the gradient of its first input too, though nothing uses it: one more product in the first layer.
    input_gradient = 2 * x.shape[0] * ws.shape[1] * ws.shape[2]
    assert model_flops(jax.grad(loss(scanned(dense))), ws, x) == unrolled + input_gradient


@pytest.mark.usefixtures("primitives")
def test_a_keras_model_under_remat_scope_needs_the_same_flops() -> None:
    batch = research.Batch(shape(24, 16), shape(24, 8))
    assert step_flops(regressor(remat=False), batch) == 6 * WEIGHTS * 24 - 2 * 16 * 64 * 24
    assert step_flops(regressor(remat=True), batch) == step_flops(regressor(remat=False), batch)
    learner = regressor(remat=True)
    products = flops_of_all_products(learner.train, jax.eval_shape(learner.init), batch)
    assert products > step_flops(learner, batch)  # it does recompute


def test_convolution_taps_on_padding_do_not_count() -> None:
    x, w = shape(2, 8, 8, 3), shape(3, 3, 3, 5)

    def apply(w: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forward = 2 * 2 * 3 * 5 * 22 * 22
    assert model_flops(apply, w, x) == forward
    assert model_flops(jax.grad(lambda w, x: jnp.sum(apply(w, x) ** 2)), w, x) == 2 * forward


def test_the_most_expensive_branch_counts_and_unused_values_do_not() -> None:
    def branches(x: Any) -> Any:
        _ = x @ x
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert model_flops(branches, shape(16, 16)) == 2 * 2 * 16**3


def test_scans_that_differ_in_weights_or_body_count_separately() -> None:
    x, w = shape(8, 32), shape(5, 32, 32)

    def scan(layer: Callable[..., Any], x: Any, ws: Any) -> Any:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]

    once = model_flops(lambda x, ws: scan(dense, x, ws), x, w)
    assert model_flops(lambda x, a, b: scan(dense, x, a) + scan(dense, x, b), x, w, w) == 2 * once

    def two_bodies(x: Any, ws: Any) -> Any:  # the same initial carry, different next carries
        return scan(lambda x, w: jnp.sin(x @ w), x, ws) + scan(lambda x, w: jnp.cos(x @ w), x, ws)

    assert model_flops(two_bodies, x, w) == 2 * 5 * 2 * 8 * 32 * 32
    swapped = lambda x, ws: scan(lambda x, w: (x[1] @ w, x[0] @ w.T), (x, x), ws)  # noqa: E731
    assert model_flops(swapped, x, w) == 5 * 2 * 2 * 8 * 32 * 32
