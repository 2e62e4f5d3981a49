"""libtpu: unknown topologies, a missing installation, and its out-of-memory messages."""

import os
import subprocess
import sys
from typing import Any

import pytest
from plan_cases import ROOT

from research import InvalidArgument
from research.planning import chips, compiler


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: chips.parse_topology("v5e:16x15"), "did you mean 'v5e:16x16'? There are v4:2x2x1"),
        (lambda: chips.parse_topology("h100"), "There are v4:2x2x1"),
        (lambda: compiler.topology_devices("v5e:3x3"), "v5e:2x2"),
    ],
)
def test_an_unknown_topology_lists_the_known_ones(call: Any, expected: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        call()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_missing_libtpu_is_reported_in_one_line_with_how_to_install_it() -> None:
    program = """
from research.planning import compiler
try:
    compiler.topology_devices("v5e:2x4")
except compiler.InvalidArgument as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    (line,) = done.stdout.splitlines()
    assert "libtpu, the compiler for TPUs, is not installed" in line
    assert "`just plan`" in line


MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.

Total hbm usage >= 20.51G:
    reserved        258.00M
    program          16.25G
    arguments         4.00G

  Largest program allocations in hbm:

  1. Size: 16.00G
     Operator: op_name="jit(call)/dot_general" source_file="a.py" source_line=3
     Shape: f32[65536,65536]{1,0:T(8,128)}
     Unpadded size: 16.00G
     XLA label: fusion.1 = fusion(param.1), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Shape: bf16[4096,65536]{1,0}
     XLA label: all-gather.3 = all-gather(param.2), channel_id=1
     Allocation type: HLO temp
     ==========================
"""


def test_sizes_are_parsed_from_out_of_memory_messages() -> None:
    failure = compiler.parse_out_of_memory(MESSAGE)
    assert (failure.used, failure.limit, failure.includes_arguments) == (20.25, 15.75, True)
    assert failure.largest == [
        {"gib": 16.0, "shape": "f32[65536,65536]", "what": "jit(call)/dot_general"},
        {"gib": 0.5, "shape": "bf16[4096,65536]", "what": "all-gather.3"},
    ]
    message = "the total memory required for HLO temporaries (298.12G) exceeds available HBM (15.75G)."
    assert compiler.parse_out_of_memory(message) == compiler.OutOfMemory(298.12, 15.75, False, [])
    assert compiler.parse_out_of_memory("INTERNAL: something else") is None
