"""libtpu for the tests that compile for TPUs."""

import os
import sys

import pytest
from plan_cases import LIBTPU


@pytest.fixture(scope="module")
def libtpu() -> None:
    """Configures this process as `compiler.configure_libtpu` does, but leaves JAX's own options alone."""
    sys.path.append(str(LIBTPU))
    variables = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.update({**variables, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"})
