"""Fine-tune the Gemma of a file with low-rank adapters: the base stays as it is, a tenth of the parameters are trained.

    just hub                          # installs KerasHub, once
    just run gemma                    # the base: a model of Python source
    just run lora --from gemma        # of the latest run; also a run directory, model.keras, or a file of its weights
    just run lora                     # on random weights that nobody trained, to compare: what adapters learn by themselves
    just export lora                  # a plain Gemma: adapters are merged into the weights

LoRA (Hu et al., arXiv:2106.09685): each dense layer computes x @ (W + A @ B) with a frozen W. B starts at zero, so training
starts at the base. The optimizer has moments of A and B alone. The new text is Python's tables of encodings, which the base never
saw; whole files of it are held out, but neighbouring code pages share many lines. Losses on it (`val`) and on the text of the
base (`source`) show what is won and what is forgotten.

Expect val_bits_per_byte <= 0.85 from the default `gemma` (0.78; the base has 3.36), with half of its steps. The base's own text
gets worse: source_bits_per_byte rises from 2.19 to 3.0. 84,992 of 872,576 parameters are trained.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import research
from experiments import _text, gemma, gpt
from experiments._config import Count, CountOrZero, Positive
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADAPTED = ["query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"]  # all dense layers


@dataclass(frozen=True, kw_only=True)
class Config(gemma.Config):
    """All options that change the numbers; those of the network are as for the base."""

    rank: Count = 8
    """Columns of A and rows of B in each adapter."""
    learning_rate: Positive = 1e-2
    """Peak learning rate of AdamW, after `warmup` steps; it decays to a tenth along half a cosine."""
    windows: Count = 2048
    """Windows in an epoch."""
    epochs: CountOrZero = 2
    """Epochs of so many windows, with an evaluation after each."""


def network(config: Config) -> keras.Model:
    """Returns the base with an adapter on every dense layer; all else is frozen."""
    model = gemma.network(config)
    (backbone,) = (layer for layer in model.layers if isinstance(layer, gemma.import_keras_hub().models.GemmaBackbone))
    backbone.enable_lora(config.rank, target_layer_names=ADAPTED)
    return model


def build(config: Config) -> research.Learner:
    """Cross-entropy of each byte, of which only the adapters are trained."""
    keras.utils.set_random_seed(config.seed)
    parts = config.accumulate
    return research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=gpt.optimizer(gemma.gpt_config(config)),
        gradient_transform=lambda gradient: research.accumulate(gradient, parts) if parts > 1 else gradient,
    )


def data(config: Config) -> dict[str, Batches]:
    """Windows of the tables of encodings, `train` and `val`, and of the held-out source, `source`."""
    options = gpt.resolve_preset(gemma.gpt_config(config)).context, config.windows, config.batch_size, config.seed
    return {**_text.window_batches(*options, "encodings"), "source": _text.window_batches(*options)["val"]}


def without_adapters(state: research.State) -> research.State:
    """Returns the state of the base: with A and B zero."""
    return state._replace(trainable=[jnp.zeros_like(leaf) for leaf in state.trainable])


def merge(config: Config, state: research.State) -> research.State:
    """Returns the weights of a plain network that computes the same: each kernel is W + A @ B."""
    names, plain = (research.init_abstract(lambda b=b: b(config))[0].names for b in (build, gemma.build))
    weights = dict(zip(names.trainable + names.non_trainable, [*state.trainable, *state.non_trainable], strict=True))

    def merged(name: str) -> Any:
        layer, _, own = name.rpartition("/")
        a, b = (weights.get(f"{layer}/lora_{own}_{part}") for part in "ab")
        return weights[name] if a is None or b is None else weights[name] + a @ b

    return research.State([merged(name) for name in plain.trainable], [merged(name) for name in plain.non_trainable], [], {})


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns a network without adapters with the merged weights of a state."""
    return gemma.models(config, merge(config, state))


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the loss on both texts in bits per byte, of the base and with adapters, and the numbers of parameters."""
    bits = {}
    for name in ("val", "source"):
        bits[f"base_{name}_bits_per_byte"] = _text.bits_per_byte(learner, without_adapters(state), splits[name])
        bits[f"{name}_bits_per_byte"] = _text.bits_per_byte(learner, state, splits[name])
    trained, frozen = (float(sum(leaf.size for leaf in leaves)) for leaves in (state.trainable, state.non_trainable))
    return {**bits, "trained_parameters": trained, "all_parameters": trained + frozen}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws a held-out table beside what the base and the fine-tuned network make of its beginning."""
    context = gpt.resolve_preset(gemma.gpt_config(config)).context
    passage = _text.held_out_passage(context // 2 + 800, "encodings")
    fresh = np.array_equal(state.non_trainable[0], build(config).init().non_trainable[0])
    texts = {"held out": passage}
    for name, each in {"random base" if fresh else "base": without_adapters(state), "fine-tuned": state}.items():
        merged = merge(config, each)

        def continuation(prompt: Array, key: Array, length: int, merged: research.State = merged) -> Array:
            return gemma.generate(config, merged, prompt, key, length, _text.TEMPERATURE)

        title = f"{name}: {_text.bits_per_byte(learner, each, splits['val']):.2f} bits per byte"
        texts[title] = _text.continue_texts(continuation, passage[None, : context // 2], context, 800)[0]
    return {"text": _text.text_figure(texts, context // 2)}
