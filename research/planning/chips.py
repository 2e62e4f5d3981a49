"""Published peak rates of TPU chips, with the page that each was taken from."""

import difflib
import math
from typing import NamedTuple

from research.core.state import InvalidArgument


class Chip(NamedTuple):
    """The rates of one chip, in units per second and bytes.

    Fields:
        flops: FLOPs per second in bfloat16.
        memory: bytes of HBM that programs may use.
        bandwidth: HBM bytes per second.
        network: bytes per second that all inter-chip links together receive.
        slices: the shapes in which chips are wired together.
        accelerator: what libtpu calls a small slice of these chips.
        config: what libtpu calls the configuration in which one chip is one device.
        page: where the numbers are published.

    >>> v5e = CHIPS["v5e"]
    >>> v5e.flops, v5e.memory / GIB, v5e.slices[0]
    (197000000000000.0, 15.75, '2x2')
    """

    flops: float
    memory: float
    bandwidth: float
    network: float
    slices: tuple[str, ...]
    accelerator: str
    config: str
    page: str


GIB = 1 << 30
_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_PAGE = "https://cloud.google.com/tpu/docs/"

# The published link bandwidth of v5e, v5p and v6e is bidirectional, so half of it is received. v4 has six links of 50 GB/s in
# each direction (Jouppi et al. 2023, arXiv:2304.01433, table 4). The compiler reserves part of the HBM: the sizes here exclude
# that part.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 300e9, _3D, "v4-8", "megacore", f"{_PAGE}v4"),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 400e9 / 2, _2D, "v5litepod-8", "default", f"{_PAGE}v5e"),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 1200e9 / 2, _3D, "v5p-8", "default", f"{_PAGE}v5p"),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 800e9 / 2, _2D, "v6e-8", "default", f"{_PAGE}v6e"),
}


def parse_topology(topology: str) -> tuple[Chip, int]:
    """Returns the chip and the number of chips of a topology such as `v5e:16x16`. Raises `InvalidArgument` for an unknown one.

    >>> parse_topology("v5e:16x16")[1]
    256
    >>> parse_topology("v5e:16x15")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: topology 'v5e:16x15': unknown, did you mean 'v5e:16x16'? There are v4:2x2x1, ...
    """
    known = [f"{name}:{shape}" for name, chip in CHIPS.items() for shape in chip.slices]
    if topology not in known:
        nearest = difflib.get_close_matches(topology, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "expected a chip and a shape."
        raise InvalidArgument(f"topology {topology!r}: unknown, {hint} There are {', '.join(known)}.")
    name, _, shape = topology.partition(":")
    return CHIPS[name], math.prod(map(int, shape.split("x")))
