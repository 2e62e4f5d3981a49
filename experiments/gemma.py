"""Train KerasHub's Gemma from scratch: tiny here, with 2 and 7 billion parameters on many chips.

    just hub                                      # installs KerasHub, once
    just run gemma                                # 0.9 M parameters
    just run gemma --mesh data=2,fsdp=2,tensor=2
    just plan gemma --preset 2b --batch-size 256 --topology v5e:16x16 --mesh fsdp=256

The network is KerasHub's own, with random weights; the text is that of the `gpt` experiment, byte by byte. Any model that
somebody else wrote in Keras is trained, sharded and planned in the same way.

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
from experiments._config import Count, CountOrZero, Positive, Seed, TrainingOptions
from research.core.state import scope_mapping
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Layers, heads, widths and vocabulary of 2b and 7b are from the Gemma report (arXiv:2403.08295, table 1).
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


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """All options that change the numbers."""

    preset: Literal["tiny", "2b", "7b"] = "tiny"
    """The size of the network; also the defaults of the next three options."""
    context: Count | None = None
    """Tokens in a window: 128 for tiny, otherwise 1024."""
    dtype_policy: Literal["float32", "mixed_bfloat16"] | None = None
    """Keras dtype policy of the layers: float32 for tiny, otherwise mixed_bfloat16."""
    remat: bool | None = None
    """Whether the backward pass recomputes the activations of each block instead of storing them; not for tiny."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW, after `warmup` steps; it decays to a tenth along half a cosine."""
    warmup: CountOrZero = 100
    """Steps in which the learning rate rises, but at most a tenth of all."""
    accumulate: Count = 1
    """Micro-batches per update, computed one after the other."""
    windows: Count = 4096
    """Windows in an epoch."""
    epochs: CountOrZero = 2
    """Epochs of so many windows, with an evaluation after each."""
    batch_size: Count = 8
    """Windows per step."""
    seed: Seed = 0
    """Seed of initial weights and windows. The held-out files are always the same."""


def gpt_config(config: Config) -> gpt.Config:
    """Returns the config of the `gpt` experiment with the same windows and the same optimizer."""
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


def import_keras_hub() -> Any:
    """Returns the KerasHub package. Raises `InvalidArgument` if it is not installed."""
    try:
        import keras_hub
    except ImportError as error:
        raise research.InvalidArgument(f"gemma: KerasHub can't be imported ({error}); `just hub` installs it.") from error
    return keras_hub


def network(config: Config) -> keras.Model:
    """Returns the network: tokens int32 [batch, context] to logits float32 [batch, context, vocabulary] of the next token."""
    options = gpt.resolve_preset(gpt_config(config))
    backbone = import_keras_hub().models.GemmaBackbone(**PRESETS[config.preset], dtype=options.dtype_policy)
    tokens = keras.Input((options.context,), dtype="int32", name="tokens")
    features = backbone({"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)})
    logits = backbone.token_embedding(features, reverse=True)
    return keras.Model(tokens, keras.layers.Activation("linear", dtype="float32", name="logits")(logits), name="gemma")


def build(config: Config) -> research.Learner:
    """Cross-entropy of each byte, predicted from those before it in its window."""
    keras.utils.set_random_seed(config.seed)
    parts = config.accumulate
    return research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=gpt.optimizer(gpt_config(config)),
        objective_transform=gpt.remat_blocks(gpt_config(config)),
        gradient_transform=lambda gradient: research.accumulate(gradient, parts) if parts > 1 else gradient,
    )


def data(config: Config) -> dict[str, Batches]:
    """Windows of Python's standard library: `train` and `val`."""
    return gpt.data(gpt_config(config))


@functools.partial(jax.jit, static_argnames=("config", "length"))
def generate(
    config: Config,
    state: research.State,
    prompt: Int[Array, "batch prompt"],
    key: Array,
    length: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> Int[Array, "batch {length}"]:
    """Returns `length` tokens after a prompt, sampled one by one with KerasHub's cache of keys and values."""
    built = network(config)  # nothing uses its initial weights, so they are never computed
    (backbone,) = (layer for layer in built.layers if isinstance(layer, import_keras_hub().models.GemmaBackbone))
    model = import_keras_hub().models.GemmaCausalLM(backbone, preprocessor=None)
    size, (batch_size, prompt_length) = PRESETS[config.preset], prompt.shape
    shape = (batch_size, size["num_layers"], 2, prompt_length + length, size["num_key_value_heads"], size["head_dim"])
    weights = [(built.trainable_variables, state.trainable), (built.non_trainable_variables, state.non_trainable)]

    def decode(cache: Array, tokens: Array, position: Array) -> tuple[Array, Array]:
        with keras.StatelessScope(scope_mapping(weights)):
            logits, _, cache = model.call_with_cache(tokens, cache, position)
        return cache, logits[:, -1].astype(jnp.float32)

    return _text.sample_tokens(decode, jnp.zeros(shape, backbone.compute_dtype), prompt, key, length, temperature)


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the network with the weights of a state."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the loss on held-out files in bits per byte."""
    return {"val_bits_per_byte": _text.bits_per_byte(learner, state, splits["val"])}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws a held-out passage, and two texts that the network generates from its beginning."""

    def continuation(prompt: Array, key: Array, length: int) -> Array:
        return generate(config, state, prompt, key, length, _text.TEMPERATURE)

    return {"text": _text.continuation_figure(continuation, gpt.resolve_preset(gpt_config(config)).context)}
