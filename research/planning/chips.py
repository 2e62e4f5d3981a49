"""What chips can do, as those who make them publish it; in one place, with the pages."""

import difflib
import math
from typing import NamedTuple

from research.state import Refused


class Chip(NamedTuple):
    """One chip: operations a second in bfloat16, bytes of memory that programs may use, and bytes a second.

    `network` is what all its links carry in one direction. `slices` are the shapes in which chips are wired together, `config` is
    what libtpu calls the way in which a chip is one device.
    """

    flops: float
    memory: float
    bandwidth: float
    network: float
    slices: tuple[str, ...]
    config: str
    page: str


GIB = 1 << 30
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

# Published: the bandwidth of v5e's, v5p's and v6e's links is given for both directions together, so half of it goes one way; v4's
# is six links of 50 GB/s each way (Jouppi et al. 2023, arXiv:2304.01433, table 4). Of the memory the compiler keeps some: what it
# says that programs may use is here.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 300e9, _CUBES, "megacore", "https://cloud.google.com/tpu/docs/v4"),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 400e9 / 2, _FLAT, "default", "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 1200e9 / 2, _CUBES, "default", "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 800e9 / 2, _FLAT, "default", "https://cloud.google.com/tpu/docs/v6e"),
}


def slice_of(topology: str) -> tuple[Chip, int]:
    """The kind of chip that a topology such as `v5e:16x16` is made of, and their number. Raises `Refused` for an unknown one.

    >>> slice_of("v5e:16x16")[1]
    256
    >>> slice_of("v5e:16x15")
    Traceback (most recent call last):
    research.state.Refused: topology 'v5e:16x15': unknown, did you mean 'v5e:16x16'? There are v4:2x2x1, ...
    """
    known = [f"{name}:{shape}" for name, chip in CHIPS.items() for shape in chip.slices]
    if topology not in known:
        near = difflib.get_close_matches(topology, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "expected a kind of chip and a shape."
        raise Refused(f"topology {topology!r}: unknown, {hint} There are {', '.join(known)}.")
    kind, _, shape = topology.partition(":")
    return CHIPS[kind], math.prod(map(int, shape.split("x")))
