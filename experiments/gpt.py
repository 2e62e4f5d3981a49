"""Write Python: a transformer that reads Python's own standard library byte by byte and generates more of it.

    just run gpt                                  # a million parameters
    just run gpt --preset 124m                    # GPT-2's layers, for a GPU or TPU
    just run gpt --mesh data=2,fsdp=2,tensor=2    # on eight devices: windows, weights and heads split over them
    just plan gpt --preset 1b --batch-size 256 --topology v5e:16x16 --mesh fsdp=256

A decoder (Radford et al. 2019: layer normalization before each layer, learned positions, tied input and output embeddings) of
Keras layers, from a million parameters to 7 billion; the larger ones are for many chips. Whole files are held out. Generation
caches keys and values, so the cost of a token does not depend on its position.

Expect val_bits_per_byte <= 2.1 by default (2.02 with the library of Python 3.11), after some five minutes on two cores; each
window starts without context, so its first bytes are the hardest. The text looks like Python and means nothing.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import research
from experiments import _text
from experiments._config import Count, CountOrZero, Fraction, NonNegative, Positive, Seed, TrainingOptions
from research.core.objective import Objective
from research.core.state import scope_mapping
from research.cpu.sums import fast_sums
from research.data import Batches, num_batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Preset(NamedTuple):
    """A size of the network, and defaults that depend on it."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    dtype_policy: str
    remat: bool
    learning_rate: float


# From 124m on, layers, width and learning rate are those of GPT-2 and GPT-3 (Brown et al., arXiv:2005.14165, table 2.1).
PRESETS = {
    "1m": Preset(5, 128, 4, 128, 256, "float32", False, 3e-3),
    "10m": Preset(6, 384, 6, 256, 256, "float32", False, 1e-3),
    "124m": Preset(12, 768, 12, 1024, 50304, "mixed_bfloat16", True, 6e-4),
    "350m": Preset(24, 1024, 16, 1024, 50304, "mixed_bfloat16", True, 3e-4),
    "1b": Preset(24, 2048, 16, 2048, 50304, "mixed_bfloat16", True, 2e-4),
    "7b": Preset(32, 4096, 32, 2048, 50304, "mixed_bfloat16", True, 1.2e-4),
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """All options that change the numbers."""

    preset: Literal["1m", "10m", "124m", "350m", "1b", "7b"] = "1m"
    """Layers, width and heads, by the number of parameters; also the defaults of the next five options."""
    context: Count | None = None
    """Tokens in a window."""
    vocabulary: Count | None = None
    """Number of token ids; bytes are the first 256."""
    dtype_policy: Literal["float32", "mixed_bfloat16"] | None = None
    """Keras dtype policy of the layers; weights and logits are always float32."""
    remat: bool | None = None
    """Whether the backward pass recomputes the activations of each block instead of storing them."""
    learning_rate: Positive | None = None
    """Peak learning rate of AdamW, after `warmup` steps; it decays to a tenth along half a cosine."""
    warmup: CountOrZero = 100
    """Steps in which the learning rate rises, but at most a tenth of all."""
    weight_decay: NonNegative = 0.1
    """Weight decay of matrices and embeddings; biases and norms have none."""
    dropout: Fraction = 0.0
    """Dropout rate of the embeddings and of what each layer adds."""
    accumulate: Count = 1
    """Micro-batches per update, computed one after the other."""
    sums: Literal["exact", "fast"] = "fast"
    """How gradients are summed: as Keras' layers do, or equal to rounding and faster on the CPU."""
    windows: Count = 4096
    """Windows in an epoch."""
    epochs: CountOrZero = 6
    """Epochs of so many windows, with an evaluation after each."""
    batch_size: Count = 8
    """Windows per step."""
    seed: Seed = 0
    """Seed of initial weights, dropout and windows. The held-out files are always the same."""


def resolve_preset(config: Config) -> Preset:
    """Returns the preset with the options of a config. Raises `InvalidArgument` if they can't be built or trained."""
    names = ("context", "vocabulary", "dtype_policy", "remat", "learning_rate")
    options = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    preset = PRESETS[config.preset]._replace(**options)
    if preset.context < 2:
        raise research.InvalidArgument(f"--context {preset.context}: expected at least 2 tokens.")
    if preset.vocabulary < 256:
        raise research.InvalidArgument(f"--vocabulary {preset.vocabulary}: expected at least 256, one per byte: leave it out.")
    if not 0 <= config.dropout < 1:
        raise research.InvalidArgument(f"--dropout {config.dropout}: expected a rate from 0 to less than 1.")
    if config.windows < 1 or config.batch_size < 1:
        raise research.InvalidArgument(f"--windows {config.windows} --batch-size {config.batch_size}: expected at least 1 each.")
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise research.InvalidArgument(
            f"--accumulate {config.accumulate}: a batch of {config.batch_size} windows can't be split into so many equal parts: "
            "choose a divisor of the batch size."
        )
    return preset


def matrix_initializer(width: int, scale: float = 1.0) -> keras.Initializer:
    """Returns the initializer of matrices: GPT-2's at its width, for other widths as in Nguyen and Salazar (arXiv:1910.05895)."""
    return keras.initializers.RandomNormal(stddev=scale * math.sqrt(2 / (5 * width)))


@keras.saving.register_keras_serializable("gpt")
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """Token embeddings; `reverse=True` computes logits with the same embeddings, in float32 under every dtype policy."""

    def call(self, inputs: Array, reverse: bool = False) -> Array:
        """Maps [batch, tokens] to [batch, tokens, width], or that to [batch, tokens, vocabulary]."""
        if not reverse:
            return super().call(inputs)
        embeddings = keras.ops.cast(self.embeddings, self.compute_dtype)
        return jnp.einsum("btd,vd->btv", inputs, embeddings, preferred_element_type=jnp.float32)

    def compute_output_spec(self, inputs: keras.KerasTensor, reverse: bool = False) -> keras.KerasTensor:
        """Returns the shape and dtype of the result of `call`."""
        shape = (*inputs.shape[:-1], self.input_dim) if reverse else (*inputs.shape, self.output_dim)
        return keras.KerasTensor(shape, "float32" if reverse else self.compute_dtype)


@keras.saving.register_keras_serializable("gpt")
class PositionEmbedding(keras.Layer):
    """Adds an embedding of its position to each token; positions count from `start`."""

    def __init__(self, context: int, **options: Any) -> None:
        super().__init__(**options)
        self.context = context

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Creates the vector of each position."""
        self.vectors = self.add_weight(name="vectors", shape=(self.context, shape[-1]), initializer=matrix_initializer(shape[-1]))

    def call(self, x: Array, start: int | Array = 0) -> Array:
        """Maps [batch, tokens, width] to the same shape."""
        return x + jax.lax.dynamic_slice_in_dim(self.vectors.value, start, x.shape[1])

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the same shape."""
        return shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "context": self.context}


@keras.saving.register_keras_serializable("gpt")
class Block(keras.Layer):
    """Causal attention, then two dense layers, each with a residual connection.

    `residual` scales the initial weights before each residual sum.
    """

    def __init__(self, width: int, heads: int, residual: float = 1.0, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.settings = {"width": width, "heads": heads, "residual": residual, "dropout": dropout}
        layers, dtype = keras.layers, {"dtype": self.dtype_policy}
        to_heads = {"equation": "btd,dhk->bthk", "output_shape": (None, heads, width // heads), "bias_axes": "hk", **dtype}
        from_heads = {"equation": "bthk,hkd->btd", "output_shape": (None, width), "bias_axes": "d", **dtype}
        self.attention_norm = layers.LayerNormalization(epsilon=1e-5, name="attention_norm", **dtype)
        self.query = layers.EinsumDense(kernel_initializer=matrix_initializer(width), name="query", **to_heads)
        self.key = layers.EinsumDense(kernel_initializer=matrix_initializer(width), name="key", **to_heads)
        self.value = layers.EinsumDense(kernel_initializer=matrix_initializer(width), name="value", **to_heads)
        self.attention_output = layers.EinsumDense(
            kernel_initializer=matrix_initializer(width, residual), name="attention_output", **from_heads
        )
        self.dense_norm = layers.LayerNormalization(epsilon=1e-5, name="dense_norm", **dtype)
        self.widen = layers.Dense(4 * width, kernel_initializer=matrix_initializer(width), name="widen", **dtype)
        self.narrow = layers.Dense(width, kernel_initializer=matrix_initializer(width, residual), name="narrow", **dtype)
        self.seed_generator = keras.random.SeedGenerator() if dropout else None

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Creates the layers' weights."""
        width, heads = self.settings["width"], self.settings["heads"]
        for layer in (self.attention_norm, self.query, self.key, self.value, self.dense_norm, self.widen):
            layer.build((None, None, width))
        self.attention_output.build((None, None, heads, width // heads))
        self.narrow.build((None, None, 4 * width))

    def call(self, x: Float[Array, "batch tokens width"], training: bool = False) -> Float[Array, "batch tokens width"]:
        """Returns features of every token, computed from it and those before it."""
        rate, dropout_keys = self.settings["dropout"] if training else 0.0, None
        if rate:
            dropout_keys = jax.random.split(jax.random.wrap_key_data(self.seed_generator.next(), impl="threefry2x32"))
        h = self.attention_norm(x)
        heads = attention(self.query(h), self.key(h), self.value(h), jnp.tri(x.shape[1], dtype=bool))
        x = x + dropout(self.attention_output(heads), rate, dropout_keys, 0)
        return x + dropout(self._dense(x), rate, dropout_keys, 1)

    def call_with_cache(
        self, x: Float[Array, "batch new width"], cache: "Cache", layer: int, start: Int[Array, ""]
    ) -> tuple[Float[Array, "batch new width"], "Cache"]:
        """Returns features of tokens from position `start` on, and the cache with their keys and values in this layer."""
        h = self.attention_norm(x)
        index = (layer, 0, start, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache.keys, self.key(h)[None], index)
        values = jax.lax.dynamic_update_slice(cache.values, self.value(h)[None], index)
        mask = jnp.arange(keys.shape[2]) <= start + jnp.arange(x.shape[1])[:, None]
        heads = attention(self.query(h), keys[layer], values[layer], mask)
        x = x + self.attention_output(heads)
        return x + self._dense(x), Cache(keys, values)

    def _dense(self, x: Array) -> Array:
        return self.narrow(jax.nn.gelu(self.widen(self.dense_norm(x))))

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the same shape."""
        return shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), **self.settings}


def attention(query: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Returns attention of each query to the tokens that `mask`, bool [new, tokens], allows.

    The other arrays are [batch, tokens, heads, head]. Scores and their softmax are float32.
    """
    scores = jnp.einsum("bthk,bshk->bhts", query, keys, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bhts,bshk->bthk", weights.astype(values.dtype), values)


def dropout(x: Array, rate: float, keys: Array | None, index: int) -> Array:
    """Returns `x` with dropout by `keys[index]`, or unchanged without keys."""
    return x if keys is None else jnp.where(jax.random.bernoulli(keys[index], 1 - rate, x.shape), x / (1 - rate), 0)


def network(config: Config) -> keras.Model:
    """Returns the network: tokens int32 [batch, context] to logits float32 [batch, context, vocabulary] of the next token."""
    preset = resolve_preset(config)
    policy: dict[str, Any] = {"dtype": preset.dtype_policy}
    tokens = keras.Input((preset.context,), dtype="int32", name="tokens")
    initializer = matrix_initializer(preset.width)
    embedding = TokenEmbedding(preset.vocabulary, preset.width, embeddings_initializer=initializer, name="vocabulary", **policy)
    x = PositionEmbedding(preset.context, name="positions", **policy)(embedding(tokens))
    if config.dropout:
        x = keras.layers.Dropout(config.dropout, name="dropout", **policy)(x)
    settings = {"residual": (2 * preset.layers) ** -0.5, "dropout": config.dropout}
    for i in range(preset.layers):
        x = Block(preset.width, preset.heads, name=f"block_{i}", **settings, **policy)(x)
    x = keras.layers.LayerNormalization(epsilon=1e-5, name="norm", **policy)(x)
    return keras.Model(tokens, embedding(x, reverse=True), name="gpt")


def optimizer(config: Config) -> keras.Optimizer:
    """Returns AdamW with warmup and cosine decay; gradients are clipped at a global norm of 1."""
    peak = resolve_preset(config).learning_rate
    total = config.num_steps(num_batches(config.windows, config.batch_size))
    warmup = max(1, min(config.warmup, total // 10))
    schedule = keras.optimizers.schedules.CosineDecay(
        peak / warmup, max(1, total - warmup), alpha=0.1, warmup_target=peak, warmup_steps=warmup
    )
    adam = keras.optimizers.AdamW(schedule, weight_decay=config.weight_decay, beta_2=0.99, global_clipnorm=1.0)
    adam.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return adam


def remat_blocks(config: Config) -> Callable[[Objective], Objective]:
    """Returns what makes the backward pass of an objective compute each block's activations again, where the preset says so."""
    if not resolve_preset(config).remat:
        return lambda objective: objective
    return functools.partial(research.transforms.remat, layers=r"(decoder_)?block_\d+")


def build(config: Config) -> research.Learner:
    """Cross-entropy of each byte, predicted from those before it in its window."""
    keras.utils.set_random_seed(config.seed)
    parts = config.accumulate
    learner = research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer(config),
        objective_transform=remat_blocks(config),
        gradient_transform=lambda gradient: research.accumulate(gradient, parts) if parts > 1 else gradient,
    )
    return learner._replace(train=fast_sums(learner.train)) if config.sums == "fast" else learner


def data(config: Config) -> dict[str, Batches]:
    """Windows of Python's standard library: `train` and `val`."""
    return _text.window_batches(resolve_preset(config).context, config.windows, config.batch_size, config.seed)


class Cache(NamedTuple):
    """Keys and values of the tokens so far in every block: [layers, batch, context, heads, head], 0 for later positions."""

    keys: Array
    values: Array


def empty_cache(config: Config, batch_size: int) -> Cache:
    """Returns a cache for a full context of so many texts."""
    preset = resolve_preset(config)
    shape = (preset.layers, batch_size, preset.context, preset.heads, preset.width // preset.heads)
    dtype = keras.DTypePolicy(preset.dtype_policy).compute_dtype
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def abstract_network(config: Config) -> keras.Model:
    """Returns the network without values of its weights, for functions that take them from a state."""
    models: list[keras.Model] = []
    jax.eval_shape(lambda: models.append(network(config)))
    return models[0]


def call_with_cache(
    model: keras.Model, state: research.State, cache: Cache, tokens: Int[Array, "batch new"], start: Int[Array, ""]
) -> tuple[Float[Array, "batch new vocabulary"], Cache]:
    """Returns the logits after each of `tokens`, the first of them at position `start`, and the cache with these tokens added."""
    weights = [(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)]
    with keras.StatelessScope(scope_mapping(weights)):
        embedding = model.get_layer("vocabulary")
        x = model.get_layer("positions")(embedding(tokens), start=start)
        for i in range(len(cache.keys)):
            x, cache = model.get_layer(f"block_{i}").call_with_cache(x, cache, i, start)
        return embedding(model.get_layer("norm")(x), reverse=True), cache


@functools.partial(jax.jit, static_argnames=("config", "length"))
def generate(
    config: Config,
    state: research.State,
    prompt: Int[Array, "batch prompt"],
    key: Array,
    length: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> Int[Array, "batch {length}"]:
    """Returns `length` tokens after a prompt, sampled one by one with cached keys and values; at temperature 0 the most likely.

    Raises `InvalidArgument` if prompt and tokens are longer than the context.
    """
    batch_size, prompt_length = prompt.shape
    if not prompt_length or prompt_length + length > resolve_preset(config).context:
        raise research.InvalidArgument(
            f"generate: {length} tokens after a prompt of {prompt_length}; expected a prompt of at least 1, and no more than the "
            f"context of {resolve_preset(config).context} in all: shorten the prompt, or continue from the end of the result."
        )
    model = abstract_network(config)

    def decode(cache: Cache, tokens: Array, position: Array) -> tuple[Cache, Array]:
        logits, cache = call_with_cache(model, state, cache, tokens, position)
        return cache, logits[:, -1]

    return _text.sample_tokens(decode, empty_cache(config, batch_size), prompt, key, length, temperature)


def continuation(config: Config, state: research.State) -> _text.Continuation:
    """Returns a function that continues a prompt."""
    return lambda prompt, key, length: generate(config, state, prompt, key, length, _text.TEMPERATURE)


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the network with the weights of a state."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the loss on held-out files in bits per byte."""
    return {"val_bits_per_byte": _text.bits_per_byte(learner, state, splits["val"])}


def each_epoch(
    config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]
) -> dict[str, "Figure"]:
    """Draws what the network generates so far, from the same prompt in each epoch."""
    context = resolve_preset(config).context
    prompt = _text.held_out_passage(context // 2)
    text = _text.continue_texts(continuation(config, state), prompt[None], context, 400)
    return {"text": _text.text_figure({"generated so far": text[0]}, len(prompt))}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws a held-out passage, and two texts that the network generates from its beginning."""
    return {"text": _text.continuation_figure(continuation(config, state), resolve_preset(config).context)}
