"""The workloads in plain PyTorch."""

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

# Where compiling the whole step pays: in others, matrix products or an LSTM's kernels take the time.
COMPILED = ("digits-mlp-32", "gan-64")


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """A function that trains for so many epochs and returns the last one's logs."""
    torch.set_flush_denormal(True)  # before there are threads, which take it over
    torch.set_num_threads(1 if workload == "digits-mlp-32" else 2)  # its layers are too small to be shared
    torch.manual_seed(0)
    keep_memory()
    step = STEPS[workload]()
    if workload in COMPILED:
        torch._dynamo.config.trace_autograd_ops = True
        step = torch.compile(step, fullgraph=True)
    batches = (streamed if workload == "stream" else shuffled)(data, workloads.WORKLOADS[workload].batch_size)

    def train(epochs: int) -> dict[str, float]:
        for _ in range(epochs):
            logs = [step(**batch) for batch in batches()]
        return {name: torch.stack([log[name] for log in logs]).float().mean().item() for name in logs[0]}

    return train


def keep_memory() -> None:
    """Has the C library keep what is freed, as other allocators do: else large tensors are new pages at every step."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**25)


def shuffled(data: dict[str, np.ndarray], batch_size: int) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """Epochs of batches from memory."""
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    tensors = {name: tensor.long() if tensor.dtype == torch.int32 else tensor for name, tensor in tensors.items()}

    def batches() -> Iterator[dict[str, Tensor]]:
        for indices in torch.randperm(len(next(iter(tensors.values())))).split(batch_size):
            yield {name: tensor.index_select(0, indices) for name, tensor in tensors.items()}

    return batches


def streamed(data: dict[str, np.ndarray], batch_size: int) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """Epochs of batches from a file, each prepared when it is its turn."""
    x, y = data["x"], torch.from_numpy(data["y"]).long()
    rng = np.random.default_rng(0)

    def batches() -> Iterator[dict[str, Tensor]]:
        for indices in torch.randperm(len(x)).split(batch_size):
            yield {"x": augmented(x[indices.numpy()], rng), "y": y[indices]}

    return batches


def augmented(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Images moved by up to 4 pixels, half of them mirrored, flat and from 0 to 1."""
    n = len(images)
    padded = np.zeros((n, 40, 40, 3), np.uint8)
    padded[:, 4:-4, 4:-4] = images
    pixels = padded.view("V3")[..., 0]  # three bytes that are moved as one
    cut = np.lib.stride_tricks.sliding_window_view(pixels, (32, 32), (1, 2))[np.arange(n), *rng.integers(0, 9, (2, n))]
    mirrored = rng.random(n) < 0.5
    cut[mirrored] = cut[mirrored, :, ::-1]
    return torch.from_numpy(np.divide(cut.view(np.uint8).reshape(n, -1), 255, dtype=np.float32))


class Adam:
    """The optimizer's function, compiled or fused; `torch.optim.Adam` does the same and costs more around it."""

    def __init__(self, model: nn.Module, rate: float = workloads.RATE, beta_1: float = 0.9):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.means, self.squares = ([torch.zeros_like(weight) for weight in self.weights] for _ in range(2))
        self.counts = [torch.zeros(()) for _ in self.weights]
        self.constants = {"lr": rate, "beta1": beta_1, "beta2": 0.999, "eps": 1e-7, "weight_decay": 0}

    def minimize(self, loss: Tensor) -> None:
        """A step down the loss."""
        gradients = torch.autograd.grad(loss, self.weights)
        how = {"foreach": True, "capturable": True} if torch.compiler.is_compiling() else {"fused": True}
        with torch.no_grad():
            lists = self.weights, gradients, self.means, self.squares, [], self.counts
            adam(*lists, amsgrad=False, maximize=False, **self.constants, **how)


def glorot(module: nn.Module) -> None:
    """Initializes a dense or convolution layer."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def classifier(model: nn.Module) -> Step:
    """How a network with logits learns classes."""
    model.apply(glorot)
    optimizer = Adam(model)

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.minimize(loss)
        return {"loss": loss.detach(), "accuracy": logits.argmax(1) == y}

    return step


def mlp(inputs: int, hidden: int, classes: int) -> Step:
    """One hidden layer."""
    return classifier(nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes)))


class ConvNet(nn.Sequential):
    """Two convolutions; the channels are last, as in the data."""

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
        """Logits of images."""
        return super().forward(x.permute(0, 3, 1, 2))


def gan() -> Step:
    """A generator, a discriminator, and the average of the generator's weights."""
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
    g_optimizer, d_optimizer = (Adam(model, workloads.GAN_RATE, beta_1=0.5) for model in (generator, discriminator))
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


class LastOfLSTM(nn.Module):
    """An embedding and an LSTM: its features after the last word."""

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
        """Features of sequences."""
        features, _ = self.lstm(self.embedding(words.T))
        return features[words.count_nonzero(1) - 1, torch.arange(len(words))]


class Tickets(nn.Module):
    """Title, body and tags in, priority and department out."""

    def __init__(self):
        super().__init__()
        self.title, self.body = LastOfLSTM(), LastOfLSTM()
        self.priority, self.department = nn.Linear(135, 1), nn.Linear(135, 6)
        self.apply(glorot)

    def forward(self, title: Tensor, body: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """A logit of the priority and the departments' logits."""
        features = torch.cat([self.title(title), self.body(body), tags], 1)
        return self.priority(features), self.department(features)


def tickets() -> Step:
    """How two outputs are learned at once."""
    model = Tickets()
    optimizer = Adam(model)

    def step(title: Tensor, body: Tensor, tags: Tensor, priority: Tensor, department: Tensor) -> dict[str, Tensor]:
        logit, logits = model(title, body, tags)
        loss = 0.5 * F.binary_cross_entropy_with_logits(logit, priority.float()) + F.cross_entropy(logits, department)
        optimizer.minimize(loss)
        return {
            "loss": loss.detach(),
            "priority_accuracy": (logit > 0) == priority,
            "department_accuracy": logits.argmax(1) == department,
        }

    return step


class Block(nn.Module):
    """Causal attention and two dense layers, each added to its input."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(128, eps=1e-5), nn.LayerNorm(128, eps=1e-5)
        self.query_key_value, self.out = nn.Linear(128, 3 * 128), nn.Linear(128, 128)
        self.mlp = nn.Sequential(nn.Linear(128, 512), nn.GELU(approximate="tanh"), nn.Linear(512, 128))
        self.apply(glorot)
        for matrix in self.query_key_value.weight.chunk(3):
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """What the next block takes."""
        heads = self.query_key_value(self.norm_1(x)).unflatten(-1, (3, 4, 32)).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Embeddings, four blocks, logits."""

    def __init__(self):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, 128), nn.Parameter(torch.empty(128, 128))
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm, self.logits = nn.LayerNorm(128, eps=1e-5), nn.Linear(128, 256)
        glorot(self.logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each next byte."""
        return self.logits(self.norm(self.blocks(self.bytes(x) + self.positions)))


def gpt() -> Step:
    """How the next byte is learned."""
    model = GPT()
    optimizer = Adam(model, workloads.GPT_RATE)

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
