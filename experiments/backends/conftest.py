"""These pages import one backend of Keras each, and a process has only one: doctest must not collect them together."""

collect_ignore_glob = ["with_*.py"]
