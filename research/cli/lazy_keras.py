"""Parts of Keras that a command loads only once it uses them.

Keras imports scikit-learn for `keras.wrappers` and matplotlib for `keras.visualization`, about half of the time that
`import keras` takes. In a process of the `research` command their names stay, and the first use of an attribute loads them.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# The last is private: Keras itself imports it there, and tests/cli/test_startup.py guards that this list is enough.
MODULES = (
    "keras.wrappers",
    "keras._tf_keras.keras.wrappers",
    "keras.visualization",
    "keras._tf_keras.keras.visualization",
    "keras.src.visualization",
)


class LazyFinder:
    """Finds `MODULES` as Python does, with a loader that waits for the first use of an attribute.

    >>> LazyFinder.find_spec("keras.losses") is None
    True
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of one of the modules; None for any other."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in MODULES else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def import_lazily() -> None:
    """Makes what is imported from now on wait for its first use, for this process."""
    sys.meta_path.insert(0, LazyFinder)
