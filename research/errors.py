"""Finds the line of the user's own code that an error comes from."""

import functools
import os
import re
import sys
import sysconfig
import traceback

import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)

LIBRARIES = ("research", "jax", "jaxlib", "keras", "numpy", "optax", "jaxtyping", "beartype")


def user_frame(error: BaseException) -> tuple[str, int] | None:
    """Returns file and line of the innermost frame of an error's traceback that is the user's own code, or None.

    The user's code is a loss, a layer's `call`, a learner, an experiment: everything but `LIBRARIES`, `site-packages`, Python's
    standard library and code without a file.

    >>> loss = eval(compile("lambda x: x + jnp.zeros(3)", "/home/me/losses.py", "eval"))
    >>> try:
    ...     loss(jnp.zeros(2))
    ... except TypeError as error:
    ...     user_frame(error)
    ('/home/me/losses.py', 1)
    >>> try:
    ...     jnp.zeros(2) + jnp.zeros(3)
    ... except TypeError as error:
    ...     print(user_frame(error))
    None
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = frame.f_code.co_filename
        if not path.startswith("<") and not _is_library(os.path.realpath(path)):
            return path, line
    return None


def one_line(error: BaseException, limit: int = 500) -> str:
    """Returns an error's message on one line, without terminal colours, cut after `limit` characters.

    >>> one_line(ValueError("shapes differ:   (2,) and (3,)"), limit=13)
    'shapes differ ...'
    """
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return text if len(text) <= limit else text[:limit].rstrip() + " ..."


def printable(text: str) -> str:
    r"""Returns a text with each character that a terminal may obey, or that ends a line, as Python writes it: `\x1b`.

    >>> print(printable("a name\x1b[2J of\ntwo lines"))
    a name\x1b[2J of\ntwo lines
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_library(path: str) -> bool:
    return path.startswith(_library_directories()) or not {"site-packages", "dist-packages"}.isdisjoint(path.split(os.sep))


@functools.cache
def _library_directories() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    # A library that is installed in development mode lies outside of site-packages.
    files = [sys.modules[name].__file__ for name in LIBRARIES if name in sys.modules]
    directories = [paths["stdlib"], paths["platstdlib"], *(os.path.dirname(file) for file in files if file is not None)]
    return tuple(os.path.realpath(directory) + os.sep for directory in directories)
