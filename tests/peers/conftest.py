"""Tests that compare with other libraries, run where those are: `just test` has an environment for them."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
