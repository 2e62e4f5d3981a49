"""The workloads in plain PyTorch, without Keras."""

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import workloads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torch.optim.swa_utils import get_ema_multi_avg_fn

Step = Callable[..., dict[str, Tensor]]  # takes a batch, returns its logs

# Compiling the step helps here. In the others, matrix products or an LSTM's kernels take the time.
COMPILED = ("digits-mlp-32", "gan-64")


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """Returns a function that trains some epochs and returns the last one's logs."""
    torch.set_flush_denormal(True)  # before threads start, which inherit it
    torch.set_num_threads(1 if workload == "digits-mlp-32" else 2)  # its layers are too small for two threads
    torch.manual_seed(0)
    keep_memory()
    step = STEPS[workload]()
    if workload in COMPILED:
        torch._dynamo.config.trace_autograd_ops = True
        step = torch.compile(step, fullgraph=True)
    batches = (from_file if workload == "stream" else from_memory)(data, workloads.WORKLOADS[workload].batch_size)

    def train(epochs: int) -> dict[str, float]:
        for _ in range(epochs):
            logs = [step(**batch) for batch in batches()]
        return {name: torch.stack([log[name] for log in logs]).float().mean().item() for name in logs[0]}

    return train


def keep_memory() -> None:
    """Makes the C library reuse freed memory, as other allocators do: else large tensors get new pages at every step."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**25)


def from_memory(data: dict[str, np.ndarray], batch_size: int) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """Returns a function that yields an epoch's batches from memory."""
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    tensors = {name: tensor.long() if tensor.dtype == torch.int32 else tensor for name, tensor in tensors.items()}

    def batches() -> Iterator[dict[str, Tensor]]:
        for indices in torch.randperm(len(next(iter(tensors.values())))).split(batch_size):
            yield {name: tensor.index_select(0, indices) for name, tensor in tensors.items()}

    return batches


def from_file(data: dict[str, np.ndarray], batch_size: int) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """Returns a function that yields an epoch's batches from a file, each augmented when it is needed."""
    x, y = data["x"], torch.from_numpy(data["y"]).long()
    rng = np.random.default_rng(0)

    def batches() -> Iterator[dict[str, Tensor]]:
        for indices in torch.randperm(len(x)).split(batch_size):
            yield {"x": augment(x[indices.numpy()], rng), "y": y[indices]}

    return batches


def augment(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Returns images as float32 rows from 0 to 1, each padded, cropped at random and mirrored with probability 0.5."""
    n = len(images)
    padded = np.zeros((n, 40, 40, 3), np.uint8)
    padded[:, 4:-4, 4:-4] = images
    pixels = padded.view("V3")[..., 0]  # the three bytes of a pixel are copied together
    crops = np.lib.stride_tricks.sliding_window_view(pixels, (32, 32), (1, 2))[np.arange(n), *rng.integers(0, 9, (2, n))]
    mirrored = rng.random(n) < 0.5
    crops[mirrored] = crops[mirrored, :, ::-1]
    return torch.from_numpy(np.divide(crops.view(np.uint8).reshape(n, -1), 255, dtype=np.float32))


class Adam:
    """PyTorch's functional Adam, compiled or fused: the same as `torch.optim.Adam` with less overhead."""

    def __init__(self, model: nn.Module, learning_rate: float = workloads.LEARNING_RATE, beta_1: float = 0.9):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.means, self.squares = ([torch.zeros_like(weight) for weight in self.weights] for _ in range(2))
        self.counts = [torch.zeros(()) for _ in self.weights]
        self.constants = {"lr": learning_rate, "beta1": beta_1, "beta2": 0.999, "eps": 1e-7, "weight_decay": 0}

    def minimize(self, loss: Tensor) -> None:
        """Computes the gradient of the loss and updates the weights."""
        gradients = torch.autograd.grad(loss, self.weights)
        implementation = {"foreach": True, "capturable": True} if torch.compiler.is_compiling() else {"fused": True}
        with torch.no_grad():
            lists = self.weights, gradients, self.means, self.squares, [], self.counts
            adam(*lists, amsgrad=False, maximize=False, **self.constants, **implementation)


def glorot(module: nn.Module) -> None:
    """Initialises a dense or convolution layer: kernel Glorot uniform, bias zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def classifier(model: nn.Module) -> Step:
    """Returns the step of a network that computes logits of classes."""
    model.apply(glorot)
    optimizer = Adam(model)

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.minimize(loss)
        return {"loss": loss.detach(), "accuracy": logits.argmax(1) == y}

    return step


def mlp(inputs: int, hidden: int, classes: int) -> Step:
    """Returns the step of a network with one hidden layer."""
    return classifier(nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes)))


class ConvNet(nn.Sequential):
    """A network with two convolutions; the channels are last, as in the data."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(5 * 5 * 64, 10),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images."""
        return super().forward(x.permute(0, 3, 1, 2))


def gan() -> Step:
    """Returns the step of the GAN, which also averages the generator's weights."""
    generator = nn.Sequential(
        nn.Linear(16, 512),
        nn.LeakyReLU(0.2),
        nn.Linear(512, 512),
        nn.LeakyReLU(0.2),
        nn.Linear(512, 64),
        nn.Tanh(),
    ).apply(glorot)
    discriminator = nn.Sequential(
        nn.Linear(64, 512),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(512, 256),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(256, 1),
    ).apply(glorot)
    move_average = get_ema_multi_avg_fn(1 - 0.005)
    g_optimizer, d_optimizer = (Adam(model, workloads.GAN_LEARNING_RATE, beta_1=0.5) for model in (generator, discriminator))
    average = [weight.detach().clone() for weight in g_optimizer.weights]

    def step(x: Tensor) -> dict[str, Tensor]:
        n = len(x)
        with torch.no_grad():
            images = torch.cat([generator(torch.randn(n, 16)), x])
        targets = 0.05 * torch.rand(2 * n, 1)
        targets[:n] += 1
        d_loss = F.binary_cross_entropy_with_logits(discriminator(images), targets)
        d_optimizer.minimize(d_loss)

        g_loss = F.binary_cross_entropy_with_logits(discriminator(generator(torch.randn(n, 16))), torch.zeros(n, 1))
        g_optimizer.minimize(g_loss)
        move_average(average, g_optimizer.weights, None)
        return {"d_loss": d_loss.detach(), "g_loss": g_loss.detach()}

    return step


class SequenceEncoder(nn.Module):
    """An embedding and an LSTM, whose output at the last word is returned."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4000, 64)
        self.lstm = nn.LSTM(64, 64)
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        nn.init.xavier_uniform_(self.lstm.weight_ih_l0)
        nn.init.orthogonal_(self.lstm.weight_hh_l0)
        nn.init.zeros_(self.lstm.bias_hh_l0).requires_grad_(False)  # one bias is enough
        nn.init.zeros_(self.lstm.bias_ih_l0)
        nn.init.ones_(self.lstm.bias_ih_l0[64:128])  # of the forget gate

    def forward(self, words: Tensor) -> Tensor:
        """Returns the features of rows of word ids."""
        features, _ = self.lstm(self.embedding(words.T))
        return features[words.count_nonzero(1) - 1, torch.arange(len(words))]


class Tickets(nn.Module):
    """The network from a ticket to the logits of its priority and department."""

    def __init__(self):
        super().__init__()
        self.title, self.body = SequenceEncoder(), SequenceEncoder()
        self.priority, self.department = nn.Linear(135, 1), nn.Linear(135, 6)
        self.apply(glorot)

    def forward(self, title: Tensor, body: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both logits of a batch of tickets."""
        features = torch.cat([self.title(title), self.body(body), tags], 1)
        return self.priority(features), self.department(features)


def tickets() -> Step:
    """Returns the step of the ticket network."""
    model = Tickets()
    optimizer = Adam(model)

    def step(title: Tensor, body: Tensor, tags: Tensor, priority: Tensor, department: Tensor) -> dict[str, Tensor]:
        priority_logit, department_logits = model(title, body, tags)
        loss = 0.5 * F.binary_cross_entropy_with_logits(priority_logit, priority.float())
        loss = loss + F.cross_entropy(department_logits, department)
        optimizer.minimize(loss)
        return {
            "loss": loss.detach(),
            "priority_accuracy": (priority_logit > 0) == priority,
            "department_accuracy": department_logits.argmax(1) == department,
        }

    return step


class Block(nn.Module):
    """A transformer block: causal attention and an MLP, each with a residual connection."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(128, eps=1e-5), nn.LayerNorm(128, eps=1e-5)
        self.query_key_value, self.out = nn.Linear(128, 3 * 128), nn.Linear(128, 128)
        self.mlp = nn.Sequential(nn.Linear(128, 512), nn.GELU(approximate="tanh"), nn.Linear(512, 128))
        self.apply(glorot)
        for matrix in self.query_key_value.weight.chunk(3):
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Returns features of the same shape."""
        heads = self.query_key_value(self.norm_1(x)).unflatten(-1, (3, 4, 32)).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """The network from bytes to the logits of each next byte."""

    def __init__(self):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, 128), nn.Parameter(torch.empty(128, 128))
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm, self.logits = nn.LayerNorm(128, eps=1e-5), nn.Linear(128, 256)
        glorot(self.logits)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of each position."""
        return self.logits(self.norm(self.blocks(self.bytes(x) + self.positions)))


def gpt() -> Step:
    """Returns the step of the GPT."""
    model = GPT()
    optimizer = Adam(model, workloads.GPT_LEARNING_RATE)

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.minimize(loss)
        return {"loss": loss.detach()}

    return step


STEPS: dict[str, Callable[[], Step]] = {
    **{name: partial(mlp, *widths) for name, widths in workloads.WIDTHS.items()},
    "convnet-64": lambda: classifier(ConvNet()),
    "gan-64": gan,
    "tickets-128": tickets,
    "gpt-16": gpt,
}
