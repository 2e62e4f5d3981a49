"""Tests that compare with other libraries. They run only if these are installed: `just test` has an environment with them."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
