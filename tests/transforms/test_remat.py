"""The laws of `remat` and `remat_loops`: no number changes, and the compiled step keeps less."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import CASES, slow_after_first
from keras import layers

import research
from research.transforms import remat, remat_loops
from research.transforms.jaxpr import equations, is_checkpoint

RNG = np.random.default_rng(0)


def trained(model: keras.Model, batch: research.Batch, transform: Any, steps: int = 2, **options: Any) -> tuple[Any, Any]:
    """Returns the state and the logs after some steps, with the gradient of a transformed objective."""
    options = {"optimizer": keras.optimizers.SGD(0.1), **options}
    learner = research.supervised(model, objective_transform=transform, example=batch, **options)
    state, train = learner.init(), jax.jit(learner.train)
    for _ in range(steps):
        state, logs = train(state, batch)
    return state, logs


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", slow_after_first(["norm-adam", "two-outputs", "subclassed-add-loss", "sequence-masked"]))
def test_no_number_changes(name: str) -> None:
    case = CASES[name]
    batch = research.Batch(*case.batch(RNG))
    weights, results = None, []
    for transform in (lambda objective: objective, remat):
        keras.utils.set_random_seed(0)
        model = case.model()
        if weights is not None:
            model.set_weights(weights)
        weights = model.get_weights()
        results.append(trained(model, batch, transform, **case.compile_args()))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def recurrent(layer: Callable[..., Any], **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    embedding = [keras.Input((40,), dtype="int32"), layers.Embedding(20, 8, mask_zero=True)]
    return keras.Sequential([*embedding, layer(32, dropout=0.2, **options), layers.Dense(3)])


TOKENS = research.Batch(
    RNG.integers(1, 20, (64, 40)).astype("int32") * (np.arange(40) < RNG.integers(9, 40, (64, 1))), RNG.integers(0, 3, 64)
)
LOSS = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"]}


@pytest.mark.sample(3)
@pytest.mark.parametrize("layer", slow_after_first([layers.LSTM, layers.GRU, layers.SimpleRNN]))
def test_recurrent_layers_compute_their_gates_again_bit_for_bit(layer: Callable[..., Any]) -> None:
    stored = trained(recurrent(layer), TOKENS, lambda objective: objective, **LOSS)
    again = trained(recurrent(layer), TOKENS, remat_loops, **LOSS)
    jax.tree.map(np.testing.assert_array_equal, stored, again)


def temporaries(model: keras.Model, batch: research.Batch, transform: Any, **options: Any) -> int:
    learner = research.supervised(model, optimizer="sgd", objective_transform=transform, **options)
    compiled = jax.jit(learner.train).lower(learner.init(), batch).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def test_an_lstm_keeps_its_states_alone() -> None:
    stored, again = (temporaries(recurrent(layers.LSTM), TOKENS, t, **LOSS) for t in (lambda objective: objective, remat_loops))
    assert again < 0.5 * stored


def blocks() -> keras.Model:
    """Eight blocks that are wide inside: what is kept without remat."""
    keras.utils.set_random_seed(0)

    @keras.saving.register_keras_serializable("remat")
    class Block(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.widen, self.narrow = layers.Dense(16 * shape[-1], "gelu"), layers.Dense(shape[-1])
            self.widen.build(shape)
            self.narrow.build((*shape[:-1], 16 * shape[-1]))

        def call(self, x: Any) -> Any:
            return x + self.narrow(self.widen(x))

    return keras.Sequential([keras.Input((16,)), *(Block(name=f"block_{i}") for i in range(8)), layers.Dense(1, name="head")])


POINTS = research.Batch(RNG.normal(size=(512, 16)).astype("float32"), RNG.normal(size=(512, 1)).astype("float32"))


def residual_bytes(transform: Any) -> int:
    """Returns the size of what the forward pass of the blocks keeps for the backward pass."""
    objective, _ = research.keras_objective(blocks(), loss="mse")
    state = research.supervised(blocks(), loss="mse").init()

    def loss(trainable: Any) -> Any:
        return transform(objective)(state._replace(trainable=trainable), POINTS, training=True)

    _, backward, _ = jax.vjp(loss, state.trainable, has_aux=True)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))


def test_blocks_keep_their_inputs_alone_or_what_the_policy_names() -> None:
    everything = jax.checkpoint_policies.everything_saveable
    stored = residual_bytes(lambda objective: objective)
    assert residual_bytes(partial(remat, layers=r"block_\d+")) < 0.1 * stored
    assert residual_bytes(partial(remat, layers=r"block_\d+", policy=everything)) > 0.9 * stored


def parts(transform: Any, model: keras.Model, batch: research.Batch, **options: Any) -> int:
    """Returns the number of parts of the forward pass that are computed again."""
    objective, _ = research.keras_objective(model, **options)
    learner = research.supervised(model, optimizer="sgd", **options)
    program = jax.make_jaxpr(partial(transform(objective), training=True))(learner.init(), batch)
    return sum(map(is_checkpoint, equations(program)))


def test_parts_are_the_layers_that_match_or_those_of_the_model() -> None:
    assert parts(remat, blocks(), POINTS, loss="mse") == 8 + 1 + 1  # the head and the loss
    assert parts(partial(remat, layers=r"block_[0-3]"), blocks(), POINTS, loss="mse") == 4
    assert parts(partial(remat, layers="sequential.*"), blocks(), POINTS, loss="mse") == 1


def test_both_in_one_step_as_a_loss_of_ones_own() -> None:
    def build(transform: Any) -> research.Learner:
        model = recurrent(layers.LSTM, return_sequences=False)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def objective(batch: research.Batch, training: bool) -> Any:
            return loss(batch.y, model(batch.x, training=training)), {}

        return research.learner(objective, model, "sgd", example=TOKENS, objective_transform=transform)

    def train(learner: research.Learner) -> Any:
        return jax.jit(learner.train)(learner.init(), TOKENS)

    stored, again = train(build(lambda objective: objective)), train(build(lambda objective: remat(remat_loops(objective))))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), stored, again)


def test_half_precision_weights_are_cast_again() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), *(layers.Dense(16, "gelu", dtype="mixed_bfloat16") for _ in range(4))])
    batch = research.Batch(POINTS.x, POINTS.x)
    results = [trained(model, batch, transform, loss="mse") for transform in (lambda objective: objective, remat)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4), *results)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (partial(remat, layers="blok_.*"), "remat: the forward pass has no layer in a model whose name matches 'blok_.*'; the "),
        (remat_loops, "remat_loops: the forward pass has no lax.scan in a layer; the layers with one are none."),
        (partial(remat, layers="block_["), "remat: layers is 'block_[', expected a regular expression (unterminated "),
    ],
)
def test_what_can_not_be_is_one_line(transform: Any, message: str) -> None:
    with pytest.raises(research.InvalidArgument) as error:
        trained(blocks(), POINTS, transform, loss="mse")
    (line,) = str(error.value).splitlines()
    assert line.startswith(message)


def test_evaluation_is_that_of_the_objective() -> None:
    model = blocks()
    learners = [research.supervised(model, loss="mse", objective_transform=t) for t in (lambda objective: objective, remat)]
    first, second = (jax.jit(each.evaluate)(each.init(), jax.tree.map(jnp.asarray, POINTS)) for each in learners)
    jax.tree.map(np.testing.assert_array_equal, first, second)
