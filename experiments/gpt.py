"""Write Python: a transformer that reads Python's own standard library byte by byte and goes on writing it.

    just run gpt                                  # a million parameters
    just run gpt --preset 124m                    # GPT-2's layers, for a GPU or TPU
    just run gpt --mesh data=2,fsdp=2,tensor=2    # on eight devices: windows, weights and heads split over them
    just plan gpt --preset 1b --batch-size 256 --topology v5e:16x16 --mesh fsdp=256

A decoder (Radford et al. 2019: layers normalized first, learned positions, one matrix for what goes in and what comes out) of
Keras layers, from a million parameters to 7 billion; the larger ones are for many chips. Whole files are held out. Text is
written with the keys and values of what went before kept, so that a token costs the same wherever it stands.

Expect val_bits_per_byte <= 2.1 by default (2.02 with the library of Python 3.11), after some five minutes on two cores; each
window begins without a past, so its first bytes are the hardest. The text looks like Python and means nothing.
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
from research.data import Batches, steps_in
from research.reordering import reordered
from research.state import mapped

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Preset(NamedTuple):
    """A size, and what goes with it unless something else is asked for."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    dtype_policy: str
    remat: bool
    learning_rate: float


# From 124m on layers, width and learning rate are those of GPT-2 and GPT-3 (Brown et al., arXiv:2005.14165, table 2.1).
PRESETS = {
    "1m": Preset(5, 128, 4, 128, 256, "float32", False, 3e-3),
    "10m": Preset(6, 384, 6, 256, 256, "float32", False, 1e-3),
    "124m": Preset(12, 768, 12, 1024, 50304, "mixed_bfloat16", True, 6e-4),
    "350m": Preset(24, 1024, 16, 1024, 50304, "mixed_bfloat16", True, 3e-4),
    "1b": Preset(24, 2048, 16, 2048, 50304, "mixed_bfloat16", True, 2e-4),
    "7b": Preset(32, 4096, 32, 2048, 50304, "mixed_bfloat16", True, 1.2e-4),
}


@dataclass(frozen=True)
class Config:
    """Everything that changes the numbers."""

    preset: Literal["1m", "10m", "124m", "350m", "1b", "7b"] = "1m"
    """Layers, width and heads, by the number of parameters; where nothing else is said, also the next five."""
    context: int | None = None
    """Tokens that are read at once."""
    vocabulary: int | None = None
    """Tokens there are; bytes are the first 256."""
    dtype_policy: Literal["float32", "mixed_bfloat16"] | None = None
    """What layers compute in; weights and logits are float32 in any case."""
    remat: bool | None = None
    """Compute the activations of each block again on the way back instead of keeping them."""
    learning_rate: float | None = None
    """Of AdamW, after `warmup` steps; it decays to a tenth along half a cosine."""
    warmup: int = 100
    """Steps in which the learning rate rises, or a tenth of all if that is less."""
    weight_decay: float = 0.1
    """Of matrices and vectors of tokens and positions, none of biases and norms."""
    dropout: float = 0.0
    """Share of numbers left out in training: of the first layer's input and of what each layer adds."""
    accumulate: int = 1
    """Parts of a batch that go through the network one after the other, for one update."""
    sums: Literal["keras", "reordered"] = "reordered"
    """The order of sums in gradients: as Keras' layers have it, or equal to rounding and on the CPU faster."""
    windows: int = 4096
    """Pieces of text in an epoch, each `context` tokens and the one after."""
    epochs: int = 6
    """How often so many are drawn, with an evaluation after each."""
    steps: int | None = None
    """Training steps, where they are to be fewer than the epochs' own."""
    batch_size: int = 8
    """Windows in a step."""
    seed: int = 0
    """Of weights, dropout and windows. The files held out are always the same."""


def chosen(config: Config) -> Preset:
    """The preset with what a config says otherwise. Raises `Refused` for what can't be built or trained."""
    names = ("context", "vocabulary", "dtype_policy", "remat", "learning_rate")
    said = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    found = PRESETS[config.preset]._replace(**said)
    if found.context < 2:
        raise research.Refused(f"--context {found.context}: expected 2 tokens at least.")
    if found.vocabulary < 256:
        raise research.Refused(f"--vocabulary {found.vocabulary}: the text is bytes, expected 256 at least: leave it out.")
    if not 0 <= config.dropout < 1:
        raise research.Refused(f"--dropout {config.dropout}: expected a share from 0 to less than 1.")
    if config.windows < 1 or config.batch_size < 1:
        raise research.Refused(f"--windows {config.windows} --batch-size {config.batch_size}: expected 1 at least of both.")
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise research.Refused(
            f"--accumulate {config.accumulate}: a batch of {config.batch_size} windows can't be cut into so many equal parts: "
            "choose a divisor."
        )
    return found


def normal(width: int, scale: float = 1.0) -> keras.Initializer:
    """Of matrices: as GPT-2's at its width, and for other widths as in Nguyen and Salazar (arXiv:1910.05895)."""
    return keras.initializers.RandomNormal(stddev=scale * math.sqrt(2 / (5 * width)))


@keras.saving.register_keras_serializable("gpt")
class Vocabulary(keras.layers.ReversibleEmbedding):
    """Vectors of tokens; with `reverse=True`, by the same vectors, the logits of tokens, in float32 whatever is computed in."""

    def call(self, inputs: Array, reverse: bool = False) -> Array:
        """From [batch, tokens] to [batch, tokens, width], or from there to [batch, tokens, vocabulary]."""
        if not reverse:
            return super().call(inputs)
        vectors = keras.ops.cast(self.embeddings, self.compute_dtype)
        return jnp.einsum("btd,vd->btv", inputs, vectors, preferred_element_type=jnp.float32)

    def compute_output_spec(self, inputs: keras.KerasTensor, reverse: bool = False) -> keras.KerasTensor:
        """The same of shapes."""
        shape = (*inputs.shape[:-1], self.input_dim) if reverse else (*inputs.shape, self.output_dim)
        return keras.KerasTensor(shape, "float32" if reverse else self.compute_dtype)


@keras.saving.register_keras_serializable("gpt")
class Positions(keras.Layer):
    """Adds to the vector of each token one of its position, counted from `start`."""

    def __init__(self, context: int, **options: Any) -> None:
        super().__init__(**options)
        self.context = context

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Makes the vectors."""
        self.vectors = self.add_weight(name="vectors", shape=(self.context, shape[-1]), initializer=normal(shape[-1]))

    def call(self, x: Array, start: int | Array = 0) -> Array:
        """Of the same shape, [batch, tokens, width]."""
        return x + jax.lax.dynamic_slice_in_dim(self.vectors.value, start, x.shape[1])

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The same shape."""
        return shape

    def get_config(self) -> dict[str, Any]:
        """What `keras.saving` needs to make it again."""
        return {**super().get_config(), "context": self.context}


@keras.saving.register_keras_serializable("gpt")
class Block(keras.Layer):
    """Attention to what came before, then two dense layers, each added to what came in.

    `residual` scales the weights whose result is added. With `remat` none of what is computed inside is kept for the way back.
    """

    def __init__(
        self, width: int, heads: int, residual: float = 1.0, dropout: float = 0.0, remat: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.settings = {"width": width, "heads": heads, "residual": residual, "dropout": dropout, "remat": remat}
        layers, same = keras.layers, {"dtype": self.dtype_policy}
        split = {"equation": "btd,dhk->bthk", "output_shape": (None, heads, width // heads), "bias_axes": "hk", **same}
        joined = {"equation": "bthk,hkd->btd", "output_shape": (None, width), "bias_axes": "d", **same}
        self.attention_norm = layers.LayerNormalization(epsilon=1e-5, name="attention_norm", **same)
        self.query = layers.EinsumDense(kernel_initializer=normal(width), name="query", **split)
        self.key = layers.EinsumDense(kernel_initializer=normal(width), name="key", **split)
        self.value = layers.EinsumDense(kernel_initializer=normal(width), name="value", **split)
        self.attention_output = layers.EinsumDense(kernel_initializer=normal(width, residual), name="attention_output", **joined)
        self.dense_norm = layers.LayerNormalization(epsilon=1e-5, name="dense_norm", **same)
        self.widen = layers.Dense(4 * width, kernel_initializer=normal(width), name="widen", **same)
        self.narrow = layers.Dense(width, kernel_initializer=normal(width, residual), name="narrow", **same)
        self.seeds = keras.random.SeedGenerator() if dropout else None

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Makes the layers' weights."""
        width, heads = self.settings["width"], self.settings["heads"]
        for layer in (self.attention_norm, self.query, self.key, self.value, self.dense_norm, self.widen):
            layer.build((None, None, width))
        self.attention_output.build((None, None, heads, width // heads))
        self.narrow.build((None, None, 4 * width))

    def call(self, x: Float[Array, "batch tokens width"], training: bool = False) -> Float[Array, "batch tokens width"]:
        """Features of every token, by it and those before it."""
        rate, keys = self.settings["dropout"] if training else 0.0, None
        if rate:
            # Drawn here: a seed that moved on inside `jax.checkpoint` could not be read outside.
            keys = jax.random.split(jax.random.wrap_key_data(self.seeds.next(), impl="threefry2x32"))

        def features(x: Array, keys: Array | None) -> Array:
            h = self.attention_norm(x)
            found = attended(self.query(h), self.key(h), self.value(h), jnp.tri(x.shape[1], dtype=bool))
            x = x + dropped(self.attention_output(found), rate, keys, 0)
            return x + dropped(self._dense(x), rate, keys, 1)

        return (jax.checkpoint(features) if self.settings["remat"] else features)(x, keys)

    def extended(
        self, x: Float[Array, "batch new width"], cache: "Cache", layer: int, start: Int[Array, ""]
    ) -> tuple[Float[Array, "batch new width"], "Cache"]:
        """Features of tokens that stand at `start` and on, by those before, whose keys and values are kept; theirs are added."""
        h = self.attention_norm(x)
        place = (layer, 0, start, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache.keys, self.key(h)[None], place)
        values = jax.lax.dynamic_update_slice(cache.values, self.value(h)[None], place)
        seen = jnp.arange(keys.shape[2]) <= start + jnp.arange(x.shape[1])[:, None]
        found = attended(self.query(h), keys[layer], values[layer], seen)
        x = x + self.attention_output(found)
        return x + self._dense(x), Cache(keys, values)

    def _dense(self, x: Array) -> Array:
        return self.narrow(jax.nn.gelu(self.widen(self.dense_norm(x))))

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The same shape."""
        return shape

    def get_config(self) -> dict[str, Any]:
        """What `keras.saving` needs to make it again."""
        return {**super().get_config(), **self.settings}


def attended(query: Array, keys: Array, values: Array, seen: Array) -> Array:
    """What each token finds among those that it may see, bool [new, tokens]; the others are [batch, tokens, heads, head].

    Scores and their softmax are float32.
    """
    scores = jnp.einsum("bthk,bshk->bhts", query, keys, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bhts,bshk->bthk", shares.astype(values.dtype), values)


def dropped(x: Array, rate: float, keys: Array | None, which: int) -> Array:
    """With a share of the numbers left out, drawn by one of the keys; as they are where there are none."""
    return x if keys is None else jnp.where(jax.random.bernoulli(keys[which], 1 - rate, x.shape), x / (1 - rate), 0)


def network(config: Config) -> keras.Model:
    """The network: tokens int32 [batch, context] in, logits float32 [batch, context, vocabulary] of each one's next out."""
    size = chosen(config)
    policy: dict[str, Any] = {"dtype": size.dtype_policy}
    tokens = keras.Input((size.context,), dtype="int32", name="tokens")
    vocabulary = Vocabulary(size.vocabulary, size.width, embeddings_initializer=normal(size.width), name="vocabulary", **policy)
    x = Positions(size.context, name="positions", **policy)(vocabulary(tokens))
    if config.dropout:
        x = keras.layers.Dropout(config.dropout, name="dropout", **policy)(x)
    settings = {"residual": (2 * size.layers) ** -0.5, "dropout": config.dropout, "remat": size.remat}
    for i in range(size.layers):
        x = Block(size.width, size.heads, name=f"block_{i}", **settings, **policy)(x)
    x = keras.layers.LayerNormalization(epsilon=1e-5, name="norm", **policy)(x)
    return keras.Model(tokens, vocabulary(x, reverse=True), name="gpt")


def steps(config: Config) -> int:
    """How many there will be."""
    total = config.epochs * steps_in(config.windows, config.batch_size)
    return total if config.steps is None else min(total, config.steps)


def optimizer(config: Config) -> keras.Optimizer:
    """AdamW, its rate rising, then falling; gradients clipped at a norm of 1 over all weights."""
    rate, total = chosen(config).learning_rate, steps(config)
    rising = max(1, min(config.warmup, total // 10))
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / rising, max(1, total - rising), alpha=0.1, warmup_target=rate, warmup_steps=rising
    )
    adam = keras.optimizers.AdamW(schedule, weight_decay=config.weight_decay, beta_2=0.99, global_clipnorm=1.0)
    adam.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return adam


def build(config: Config) -> research.Learner:
    """Cross-entropy of each byte given those before it in its window."""
    keras.utils.set_random_seed(config.seed)
    parts = config.accumulate
    learner = research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer(config),
        example=data(config)["train"].shapes,
        gradient_transform=lambda gradient: gradient if parts == 1 else research.accumulate(gradient, parts),
    )
    return learner._replace(train=reordered(learner.train)) if config.sums == "reordered" else learner


def data(config: Config) -> dict[str, Batches]:
    """Windows of Python's standard library, a context long: `train` and `val`."""
    return _text.windows(chosen(config).context, config.windows, config.batch_size, config.seed)


class Cache(NamedTuple):
    """What attention needs of the tokens so far, of every block, zeros from there on: [layers, batch, context, heads, head]."""

    keys: Array
    values: Array


def empty(config: Config, batch: int) -> Cache:
    """Room for a whole context of so many texts."""
    size = chosen(config)
    shape = (size.layers, batch, size.context, size.heads, size.width // size.heads)
    dtype = keras.DTypePolicy(size.dtype_policy).compute_dtype
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def hollow(config: Config) -> keras.Model:
    """The network without values: for functions that bring a state's."""
    made: list[keras.Model] = []
    jax.eval_shape(lambda: made.append(network(config)))
    return made[0]


def extended(
    model: keras.Model, state: research.State, cache: Cache, tokens: Int[Array, "batch new"], start: Int[Array, ""]
) -> tuple[Float[Array, "batch new vocabulary"], Cache]:
    """The logits after each of `tokens`, which stand at `start` and on, and the cache with them in it."""
    weights = [(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)]
    with keras.StatelessScope(mapped(weights)):
        vocabulary = model.get_layer("vocabulary")
        x = model.get_layer("positions")(vocabulary(tokens), start=start)
        for i in range(len(cache.keys)):
            x, cache = model.get_layer(f"block_{i}").extended(x, cache, i, start)
        return vocabulary(model.get_layer("norm")(x), reverse=True), cache


@functools.partial(jax.jit, static_argnames=("config", "length"))
def generate(
    config: Config,
    state: research.State,
    prompt: Int[Array, "batch given"],
    key: Array,
    length: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> Int[Array, "batch {length}"]:
    """So many tokens after a prompt, drawn one after the other from the network's probabilities, sharpened below temperature 1.

    At temperature 0 the likeliest each time. The prompt is read at once, then each token by itself, by keys and values kept.
    Raises `Refused` where both together are longer than the context.
    """
    batch, given = prompt.shape
    if not given or given + length > chosen(config).context:
        raise research.Refused(
            f"generate: {length} tokens after {given}; expected one at least in front, and no more than the context of "
            f"{chosen(config).context} in all: cut the prompt, or go on from the end of what was written."
        )
    model = hollow(config)

    def extend(cache: Cache, tokens: Array, start: Array) -> tuple[Cache, Array]:
        logits, cache = extended(model, state, cache, tokens, start)
        return cache, logits[:, -1]

    return _text.one_by_one(extend, empty(config, batch), prompt, key, length, temperature)


def writer(config: Config, state: research.State) -> Callable[[Array, Array, int], Array]:
    """What writes on after a prompt."""
    return lambda prompt, key, length: generate(config, state, prompt, key, length, _text.TEMPERATURE)


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """The network with the weights that a state holds."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """The loss on held-out files in bits a byte."""
    return {"val_bits_per_byte": _text.bits_per_byte(learner, state, splits["val"])}


def each_epoch(
    config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]
) -> dict[str, "Figure"]:
    """What the network writes so far, after the same beginning each time."""
    context = chosen(config).context
    given = _text.passage(context // 2, 0)
    text = _text.written(writer(config, state), given[None], context, 400)
    return {"text": _text.pages({"written so far": text[0]}, len(given))}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """How a held-out file goes on, and how the network does from the same beginning, twice."""
    return {"text": _text.compared(writer(config, state), chosen(config).context)}
