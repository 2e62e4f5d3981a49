"""Each program imports another backend of Keras, and a process can have only one: doctest must not collect them."""

collect_ignore_glob = ["with_*.py"]
