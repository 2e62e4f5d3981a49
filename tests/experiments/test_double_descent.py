"""Networks of many widths in one program: each is the network of its own width, and its other weights never change."""

import jax
import numpy as np

import research
from experiments import double_descent
from research.transforms import member

CONFIG = double_descent.Config(widths=(3, 7), seeds=1, examples=20, batch_size=20)


def test_a_network_is_one_of_its_own_width_and_no_weight_beyond_that_is_trained() -> None:
    learner, batch = double_descent.build(CONFIG), double_descent.data(CONFIG)["train"].batch(0)
    before = learner.init()
    state = jax.tree.map(np.copy, before)
    for _ in range(3):
        state, _ = jax.jit(learner.train)(state, batch)
    outputs = learner.predict(state, batch)
    for index, width in enumerate(CONFIG.widths):
        kernel, bias, out_kernel, out_bias = (np.float64(leaf) for leaf in member(state, index).trainable)
        hidden = np.maximum(np.float64(batch.x) @ kernel[:, :width] + bias[:width], 0)
        np.testing.assert_allclose(outputs[:, index], hidden @ out_kernel[:width] + out_bias, atol=1e-5)
        first = np.asarray(member(before, index).trainable[0])
        np.testing.assert_array_equal(np.float32(kernel)[:, width:], first[:, width:])
        assert (np.float32(kernel)[:, :width] != first[:, :width]).any(0).all()


def test_a_share_of_the_training_labels_is_wrong_and_the_same_for_all() -> None:
    right, wrong = (
        double_descent.data(double_descent.Config(examples=100, wrong=share))["train"].batch(0) for share in (0.0, 0.5)
    )
    np.testing.assert_array_equal(right.x, wrong.x)
    differing = (np.argmax(right.y, -1) != np.argmax(wrong.y, -1)).sum()
    assert 30 <= differing <= 60  # some of the labels of other examples are the same
    assert isinstance(right, research.Batch)
