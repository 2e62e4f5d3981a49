"""A failing step on disk: what is to blame, its batch and its seeds; and as a table on the screen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from research.data.arrays import named_leaves
from research.debugging.blame import Blame
from research.reporting import record


def write_failure(directory: Path, found: Blame, batch: PyTree, seeds: Mapping[str, Any]) -> None:
    """Writes `blame.json`, `batch.npz` (an array per leaf of the batch, by its path) and `seeds.json` into a directory.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> write_failure(directory, Blame("dense", "output", [1], [], {}, {}), {"x": np.ones(2)}, {"seed": [0, 7]})
    >>> sorted(path.name for path in directory.iterdir())
    ['batch.npz', 'blame.json', 'seeds.json']
    """
    directory.mkdir(parents=True, exist_ok=True)
    record.write_json(directory / "blame.json", {"summary": found.describe(), **found._asdict()})
    record.write_json(directory / "seeds.json", dict(seeds))
    arrays = {path.lstrip(".") or "batch": np.asarray(leaf) for path, leaf in named_leaves("", batch)}
    with (directory / "batch.npz").open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def seeds_of(state: PyTree, names: PyTree) -> dict[str, Any]:
    """Returns the unsigned integers of a state, which is how Keras and JAX hold the state of random numbers, by their names.

    >>> seeds_of([np.ones(2), np.array([0, 7], np.uint32)], ["kernel", "dropout/seed"])
    {'dropout/seed': [0, 7]}
    """
    pairs = zip(jax.tree.leaves(names), jax.tree.leaves(state), strict=True)
    data = ((name, leaf) for name, leaf in pairs if hasattr(leaf, "dtype"))
    plain = (
        (n, jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf) for n, leaf in data
    )
    return {name: np.asarray(leaf).tolist() for name, leaf in plain if leaf.dtype == np.uint32}


def norm_table(found: Blame, limit: int = 20) -> Any:
    """Returns the norms of each variable as a table of rich, those that are not finite first.

    >>> norm_table(Blame(None, None, [], [], {"kernel": {"weights": 1.0, "gradient": 0.5, "update": 0.1}}, {})).row_count
    1
    """
    from rich.table import Table

    table = Table("variable", "weights", "gradient", "update", box=None, pad_edge=False, title_justify="left")
    rows = sorted(found.norms.items(), key=lambda item: bool(np.isfinite(list(item[1].values())).all()))
    for name, values in rows[:limit]:
        cells = [f"{value:.4g}" if np.isfinite(value) else f"[bold red]{value}[/]" for value in values.values()]
        table.add_row(name, *cells)
    if len(rows) > limit:
        table.add_row(f"and {len(rows) - limit} more")
    return table
