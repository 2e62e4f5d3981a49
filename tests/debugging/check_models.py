"""Models of many kinds, unlike those of `cases.py`: name -> a function that returns (model, compile arguments, batch)."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import research

RNG = np.random.default_rng(0)
SIZE = 4
Built = tuple[keras.Model, dict[str, Any], research.Batch]


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=(SIZE, *shape)).astype("float32")


def labels(*shape: int, classes: int = 3) -> np.ndarray:
    return RNG.integers(0, classes, (SIZE, *shape)).astype("int32")


def tokens(length: int = 5, words: int = 9) -> np.ndarray:
    found = RNG.integers(1, words, (SIZE, length)).astype("int32")
    found[1:, 3:] = 0
    return found


LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BINARY = keras.losses.BinaryCrossentropy(from_logits=True)


def stack(shape: tuple[int, ...], *rest: Any, dtype: str | None = None) -> keras.Model:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *rest])


def conv_lstm() -> Built:
    model = stack((2, 3, 3, 1), layers.ConvLSTM2D(1, 2), layers.Flatten(), layers.Dense(1))
    return model, {"loss": "mse", "optimizer": "sgd"}, research.Batch(numbers(2, 3, 3, 1), numbers(1))


def separable() -> Built:
    model = stack((6, 6, 2), layers.SeparableConv2D(3, 3, activation="gelu"), layers.GlobalAveragePooling2D(), layers.Dense(3))
    return model, {"loss": LOGITS, "optimizer": "nadam", "metrics": ["accuracy"]}, research.Batch(numbers(6, 6, 2), labels())


def depthwise_pooled() -> Built:
    rest = [layers.DepthwiseConv2D(3, padding="same"), layers.MaxPooling2D(), layers.Flatten(), layers.Dense(3, "softmax")]
    args = {"loss": "categorical_crossentropy", "optimizer": keras.optimizers.SGD(0.1, momentum=0.9), "metrics": ["accuracy"]}
    return stack((4, 4, 2), *rest), args, research.Batch(numbers(4, 4, 2), np.eye(3, dtype="float32")[labels()])


def transposed() -> Built:
    rest = [
        layers.Conv1D(3, 3, dilation_rate=2, padding="causal"),
        layers.Conv1DTranspose(2, 2, strides=2),
        layers.UpSampling1D(2),
    ]
    return stack((6, 2), *rest), {"loss": "huber", "optimizer": "adamax"}, research.Batch(numbers(6, 2), numbers(24, 2))


def attention() -> Built:
    words = keras.Input((5,), dtype="int32")
    embedded = layers.Embedding(9, 4, mask_zero=True)(words)
    mixed = layers.MultiHeadAttention(1, 4, dropout=0.1)(embedded, embedded)
    pooled = layers.GlobalAveragePooling1D()(layers.Add()([embedded, mixed]))
    args = {"loss": LOGITS, "optimizer": "sgd", "metrics": ["accuracy"]}
    return keras.Model(words, layers.Dense(3)(pooled)), args, research.Batch(tokens(), labels())


def bidirectional() -> Built:
    rest = [layers.Embedding(9, 4, mask_zero=True), layers.Bidirectional(layers.GRU(3)), layers.Dense(1)]
    args = {"loss": BINARY, "optimizer": "sgd", "metrics": [keras.metrics.AUC(num_thresholds=9, from_logits=True)]}
    return stack((5,), *rest, dtype="int32"), args, research.Batch(tokens(), labels(1, classes=2).astype("float32"))


def tagging() -> Built:
    rest = [layers.Embedding(9, 4, mask_zero=True), layers.SimpleRNN(3, return_sequences=True), layers.Dense(3)]
    args = {"loss": LOGITS, "optimizer": "sgd", "metrics": ["accuracy"]}
    return stack((5,), *rest, dtype="int32"), args, research.Batch(tokens(), labels(5))


def several_inputs() -> Built:
    user, item = keras.Input((1,), dtype="int32", name="user"), keras.Input((1,), dtype="int32", name="item")
    vectors = [layers.Flatten()(layers.Embedding(9, 4, name=f"{x.name}_vectors")(x)) for x in (user, item)]
    outputs = layers.Dense(1, "sigmoid")(layers.Dot(1)(vectors))
    args = {"loss": "binary_crossentropy", "optimizer": "adagrad", "metrics": ["accuracy"]}
    x = {"user": labels(1, classes=9), "item": labels(1, classes=9)}
    return keras.Model({"user": user, "item": item}, outputs), args, research.Batch(x, labels(1, classes=2).astype("float32"))


def outputs_by_name() -> Built:
    x = keras.Input((4,))
    h = layers.Dense(5, "relu", kernel_regularizer=keras.regularizers.L1L2(1e-3, 1e-3))(x)
    model = keras.Model(x, {"price": layers.Dense(1, name="price")(h), "kind": layers.Dense(3, name="kind")(h)})
    args = {
        "loss": {"price": "mae", "kind": LOGITS},
        "loss_weights": {"price": 0.3, "kind": 2.0},
        "metrics": {"price": ["mse"], "kind": ["accuracy"]},
        "optimizer": keras.optimizers.Adam(clipnorm=0.5),
    }
    return model, args, research.Batch(numbers(4), {"price": numbers(1), "kind": labels()})


def layer_norm() -> Built:
    rest = [layers.Dense(6), layers.LayerNormalization(), layers.RMSNormalization(), layers.AlphaDropout(0.2), layers.Dense(2)]
    return stack((4,), *rest), {"loss": "log_cosh", "optimizer": "lion"}, research.Batch(numbers(4), numbers(2))


def spectral() -> Built:
    rest = [layers.SpectralNormalization(layers.Dense(5)), layers.LeakyReLU(), layers.Dense(1)]
    return stack((4,), *rest), {"loss": "hinge", "optimizer": "adam"}, research.Batch(numbers(4), np.sign(numbers(1)))


def group_norm() -> Built:
    rest = [layers.Conv2D(4, 3), layers.GroupNormalization(2), layers.PReLU(), layers.GlobalMaxPooling2D(), layers.Dense(1)]
    args = {"loss": "mse", "optimizer": keras.optimizers.Adam(amsgrad=True), "metrics": [keras.metrics.RootMeanSquaredError()]}
    return stack((5, 5, 1), *rest), args, research.Batch(numbers(5, 5, 1), numbers(1))


def over_time() -> Built:
    rest = [layers.TimeDistributed(layers.Dense(3, "relu")), layers.GaussianNoise(0.1), layers.SimpleRNN(3), layers.Dense(1)]
    return stack((4, 2), *rest), {"loss": "mse", "optimizer": "sgd"}, research.Batch(numbers(4, 2), numbers(1))


class Sparse(layers.Layer):
    """Adds the size of its input to the loss, and scales it by a weight that it regularizes."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", regularizer="l2")

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * ops.mean(ops.abs(x)))
        return x * self.scale


def added_losses() -> Built:
    rest = [
        layers.Dense(5, activity_regularizer=keras.regularizers.L2(1e-2)),
        Sparse(),
        layers.BatchNormalization(),
        layers.Dense(1),
    ]
    return stack((4,), *rest), {"loss": "mse", "optimizer": "adadelta"}, research.Batch(numbers(4), numbers(1))


def shared_layer() -> Built:
    a, b, shared = keras.Input((4,)), keras.Input((4,)), layers.Dense(3, "tanh")
    distance = layers.Subtract()([shared(a), shared(b)])
    args = {"loss": "mse", "optimizer": "ftrl"}
    return keras.Model([a, b], layers.Dense(1)(distance)), args, research.Batch([numbers(4), numbers(4)], numbers(1))


def nested() -> Built:
    inner = stack((4,), layers.Dense(4, "elu"), layers.BatchNormalization(momentum=0.5), layers.Dropout(0.3))
    frozen = stack((4,), layers.Dense(4), layers.BatchNormalization())
    frozen.trainable = False
    x = keras.Input((4,))
    outputs = layers.Dense(1)(inner(frozen(inner(x))))
    return keras.Model(x, outputs), {"loss": "mse", "optimizer": "adam"}, research.Batch(numbers(4), numbers(1))


def class_weights() -> Built:
    args = {"loss": LOGITS, "optimizer": "adam", "weighted_metrics": ["accuracy"]}
    data = research.from_arrays(numbers(4), labels(), batch_size=SIZE, class_weight={0: 0.5, 2: 4.0})
    return stack((4,), layers.Dense(5, "relu"), layers.Dense(3)), args, data.batch(0)


def half_precision() -> Built:
    policy = keras.DTypePolicy("mixed_bfloat16")
    rest = [layers.Dense(6, "relu", dtype=policy), layers.Dropout(0.2, dtype=policy), layers.Dense(1, dtype="float32")]
    return stack((4,), *rest), {"loss": "mse", "optimizer": "adam"}, research.Batch(numbers(4), numbers(1))


def loss_scaled() -> Built:
    rest = [layers.Dense(6, "relu", dtype="mixed_float16"), layers.Dense(1, dtype="float32")]
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=64.0)
    return stack((4,), *rest), {"loss": "mse", "optimizer": optimizer}, research.Batch(numbers(4), numbers(1))


def decay_but_not_of_biases() -> Built:
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
    rest = [layers.Dense(5), layers.BatchNormalization(), layers.Dense(1)]
    return stack((4,), *rest), {"loss": "mse", "optimizer": optimizer}, research.Batch(numbers(4), numbers(1))


def averaged_weights() -> Built:
    optimizer = keras.optimizers.RMSprop(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    model = stack((4,), layers.Dense(3, "relu"), layers.Dense(1))
    return model, {"loss": "mse", "optimizer": optimizer}, research.Batch(numbers(4), numbers(1))


def warm_up() -> Built:
    rate = keras.optimizers.schedules.CosineDecay(0.0, 9, warmup_target=0.1, warmup_steps=2)
    args = {
        "loss": "poisson",
        "optimizer": keras.optimizers.Lamb(rate),
        "metrics": [keras.metrics.MeanAbsoluteError(name="error")],
    }
    model = stack((4,), layers.Dense(1, "softplus", kernel_constraint="non_neg"))
    return model, args, research.Batch(numbers(4), np.abs(numbers(1)))


def accumulated() -> Built:
    args = {"loss": "mse", "optimizer": keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)}
    return stack((4,), layers.UnitNormalization(), layers.Dense(1)), args, research.Batch(numbers(4), numbers(1))


class Residual(keras.Model):
    """A subclassed model with a list of blocks and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [layers.Dense(4, "swish", kernel_regularizer="l2") for _ in range(2)]
        self.drop, self.head = layers.Dropout(0.3), layers.Dense(3)

    def call(self, x: Any, training: bool = False) -> Any:
        for block in self.blocks:
            x = x + self.drop(block(x), training=training)
        self.add_loss(1e-2 * ops.sum(x**2))
        return self.head(x)


def subclassed() -> Built:
    args = {"loss": keras.losses.CategoricalFocalCrossentropy(from_logits=True), "optimizer": "adam", "metrics": ["accuracy"]}
    return Residual(), args, research.Batch(numbers(4), np.eye(3, dtype="float32")[labels()], np.arange(1.0, 5, dtype="float32"))


class Bare(keras.Model):
    """Owns its weights, computes in half precision, and has no argument for training."""

    def __init__(self) -> None:
        super().__init__(dtype="mixed_bfloat16")
        self.kernel = self.add_weight(shape=(4, 1), initializer="glorot_uniform")
        self.built = True

    def call(self, x: Any) -> Any:
        return ops.matmul(x, self.kernel)


def outer_call() -> Built:
    return Bare(), {"loss": "mse", "optimizer": "sgd"}, research.Batch(numbers(4), numbers(1))


def augmented() -> Built:
    rest = [layers.RandomRotation(0.2), layers.RandomFlip(), layers.Flatten(), layers.Dense(1)]
    return stack((4, 4, 1), *rest), {"loss": "mse", "optimizer": "sgd"}, research.Batch(numbers(4, 4, 1), numbers(1))


class Watched(layers.Layer):
    """Logs the mean of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = keras.metrics.Mean(name="input_mean")

    def call(self, x: Any) -> Any:
        self.mean.update_state(x)
        return x


def watched() -> Built:
    return stack((4,), Watched(), layers.Dense(1)), {"loss": "mse", "optimizer": "sgd"}, research.Batch(numbers(4), numbers(1))


def padded() -> Built:
    batch = research.Batch(numbers(4), numbers(1), None, np.array([True, True, True, False]))
    model = stack((4,), layers.Dense(3, "relu"), layers.BatchNormalization(), layers.Dense(1))
    return model, {"loss": "mse", "optimizer": "sgd", "metrics": ["mae"]}, batch


EQUAL: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        *(added_losses, conv_lstm, separable, depthwise_pooled, transposed, attention, bidirectional, several_inputs),
        *(outputs_by_name, layer_norm, spectral, group_norm, over_time, shared_layer, nested, class_weights, half_precision),
        *(loss_scaled, decay_but_not_of_biases, averaged_weights, warm_up, accumulated, subclassed),
    )
}
DEVIATING: dict[str, tuple[Callable[[], Built], str]] = {
    "tagging": (tagging, "Training metrics use masks"),
    "outer_call": (outer_call, "The outermost model's `__call__` runs, not only its `call`"),
    "augmented": (augmented, "Models that Keras does not compile"),
    "padded": (padded, "Batches with padding"),
}
