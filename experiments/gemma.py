"""Train KerasHub's Gemma from nothing: tiny here, with 2 and 7 billion parameters on many chips.

    just hub                                      # brings KerasHub, once
    just run gemma                                # 0.9 M parameters
    just run gemma --mesh data=2,fsdp=2,tensor=2
    just plan gemma --preset 2b --batch-size 256 --topology v5e:16x16 --mesh fsdp=256

The network is KerasHub's own, with random weights; the text is that of the `gpt` experiment, byte by byte. Whatever model
somebody else wrote in Keras is trained, split over chips and planned in the same way.

Expect val_bits_per_byte <= 2.3 by default, after some two minutes on two cores.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import research
from experiments import _text, gpt
from research.data import Batches
from research.state import mapped

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Layers, heads, widths and vocabulary of 2b and 7b are those of the Gemma report (arXiv:2403.08295, table 1).
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {
        "num_layers": 4,
        "num_query_heads": 4,
        "num_key_value_heads": 1,
        "hidden_dim": 128,
        "intermediate_dim": 768,
        "head_dim": 32,
        "vocabulary_size": 256,
    },
    "2b": {
        "num_layers": 18,
        "num_query_heads": 8,
        "num_key_value_heads": 1,
        "hidden_dim": 2048,
        "intermediate_dim": 32768,
        "head_dim": 256,
        "vocabulary_size": 256000,
    },
    "7b": {
        "num_layers": 28,
        "num_query_heads": 16,
        "num_key_value_heads": 16,
        "hidden_dim": 3072,
        "intermediate_dim": 49152,
        "head_dim": 256,
        "vocabulary_size": 256000,
    },
}


@dataclass(frozen=True)
class Config:
    """Everything that changes the numbers."""

    preset: Literal["tiny", "2b", "7b"] = "tiny"
    """The size of the network; where nothing else is said, also the next three."""
    context: int | None = None
    """Tokens that are read at once: 128, or 1024."""
    dtype_policy: Literal["float32", "mixed_bfloat16"] | None = None
    """What layers compute in: float32 for tiny, else mixed_bfloat16."""
    remat: bool | None = None
    """Compute the activations of each block again on the way back instead of keeping them: not for tiny."""
    learning_rate: float = 2e-3
    """Of AdamW, after `warmup` steps; it decays to a tenth along half a cosine."""
    warmup: int = 100
    """Steps in which the learning rate rises, or a tenth of all if that is less."""
    accumulate: int = 1
    """Parts of a batch that go through the network one after the other, for one update."""
    windows: int = 4096
    """Pieces of text in an epoch, each `context` tokens and the one after."""
    epochs: int = 2
    """How often so many are drawn, with an evaluation after each."""
    steps: int | None = None
    """Training steps, where they are to be fewer than the epochs' own."""
    batch_size: int = 8
    """Windows in a step."""
    seed: int = 0
    """Of weights and windows. The files held out are always the same."""


def text(config: Config) -> gpt.Config:
    """The `gpt` experiment that reads the same windows of the same text."""
    tiny = config.preset == "tiny"
    return gpt.Config(
        context=config.context or (128 if tiny else 1024),
        dtype_policy=config.dtype_policy or ("float32" if tiny else "mixed_bfloat16"),
        remat=(not tiny) if config.remat is None else config.remat,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        accumulate=config.accumulate,
        windows=config.windows,
        epochs=config.epochs,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def hub() -> Any:
    """KerasHub. Raises `Refused` where it is not installed."""
    try:
        import keras_hub
    except ImportError as error:
        raise research.Refused(f"gemma: KerasHub can't be imported ({error}); `just hub` installs it.") from error
    return keras_hub


def network(config: Config) -> keras.Model:
    """The network: tokens int32 [batch, context] in, logits float32 [batch, context, vocabulary] of each one's next out."""
    chosen = gpt.chosen(text(config))
    blocks = [f"decoder_block_{i}" for i in range(PRESETS[config.preset]["num_layers"])] if chosen.remat else []
    with keras.RematScope(mode="list_of_layers", layer_names=blocks):
        backbone = hub().models.GemmaBackbone(**PRESETS[config.preset], dtype=chosen.dtype_policy)
    tokens = keras.Input((chosen.context,), dtype="int32", name="tokens")
    features = backbone({"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)})
    logits = backbone.token_embedding(features, reverse=True)
    return keras.Model(tokens, keras.layers.Activation("linear", dtype="float32", name="logits")(logits), name="gemma")


def build(config: Config) -> research.Learner:
    """Cross-entropy of each byte given those before it in its window."""
    keras.utils.set_random_seed(config.seed)
    parts = config.accumulate
    return research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=gpt.optimizer(text(config)),
        example=data(config)["train"].shapes,
        gradient_transform=lambda gradient: gradient if parts == 1 else research.accumulate(gradient, parts),
    )


def data(config: Config) -> dict[str, Batches]:
    """Windows of Python's standard library, `train` and `val`, a context long."""
    return _text.windows(gpt.chosen(text(config)).context, config.windows, config.batch_size, config.seed)


@functools.partial(jax.jit, static_argnames=("config", "length"))
def generate(
    config: Config,
    state: research.State,
    prompt: Int[Array, "batch given"],
    key: Array,
    length: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> Int[Array, "batch {length}"]:
    """So many tokens after a prompt, drawn one after the other; each is computed alone, by what KerasHub keeps of the others."""
    built = network(config)  # its first values are needed by nothing, so they are never computed
    (backbone,) = (layer for layer in built.layers if isinstance(layer, hub().models.GemmaBackbone))
    model = hub().models.GemmaCausalLM(backbone, preprocessor=None)
    size, (batch, given) = PRESETS[config.preset], prompt.shape
    shape = (batch, size["num_layers"], 2, given + length, size["num_key_value_heads"], size["head_dim"])
    weights = [(built.trainable_variables, state.trainable), (built.non_trainable_variables, state.non_trainable)]

    def extend(cache: Array, tokens: Array, start: Array) -> tuple[Array, Array]:
        with keras.StatelessScope(mapped(weights)):
            logits, _, cache = model.call_with_cache(tokens, cache, start)
        return cache, logits[:, -1].astype(jnp.float32)

    return _text.one_by_one(extend, jnp.zeros(shape, backbone.compute_dtype), prompt, key, length, temperature)


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """The network with the weights that a state holds."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """The loss on held-out files in bits a byte."""
    return {"val_bits_per_byte": _text.bits_per_byte(learner, state, splits["val"])}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """How a held-out file goes on, and how the network does from the same beginning, twice."""

    def go_on(prompt: Array, key: Array, length: int) -> Array:
        return generate(config, state, prompt, key, length, _text.TEMPERATURE)

    return {"text": _text.compared(go_on, gpt.chosen(text(config)).context)}
