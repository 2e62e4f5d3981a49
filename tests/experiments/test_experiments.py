"""Every experiment keeps the contract on which run, plan and report rely: see experiments/README.md."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import research

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("[!_]*.py"))
SLOW = ("gemma", "lora")  # KerasHub mixes dtypes and is slow to build
SMALLER: dict[str, dict[str, Any]] = {"double_descent": {"widths": (2, 4), "seeds": 1}}  # by default 64 networks are built
PACKAGES = {"series": "aeon"}  # with data, and not among those that a checkout installs
pytestmark = pytest.mark.parametrize(
    "name",
    [pytest.param(path.stem, marks=[pytest.mark.promotes, pytest.mark.slow] if path.stem in SLOW else []) for path in FILES],
)


def module(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}")


def test_its_docstring_gives_the_command_and_a_number_to_expect(name: str) -> None:
    doc = module(name).__doc__
    assert doc.partition("\n")[0].endswith(".")
    assert f"just run {name}" in doc
    assert re.search(r"[Ee]xpect .*\d", doc)


def documented_fields(cls: type) -> set[str]:
    """The annotated names in the class' own body that a docstring follows."""
    if not dataclasses.is_dataclass(cls):
        return set()
    (body,) = (node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    pairs = itertools.pairwise(body)
    return {node.target.id for node, after in pairs if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)}


def test_its_config_is_frozen_and_documented_and_has_the_options_of_every_run(name: str) -> None:
    config = module(name).Config
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen
    assert {"epochs", "steps", "batch_size", "seed"} <= {field.name for field in dataclasses.fields(config)}
    # An inherited option keeps the docstring of the class that defines it.
    documented = set().union(*map(documented_fields, config.__mro__))
    assert {field.name for field in dataclasses.fields(config)} <= documented


@pytest.mark.sample(2, 1)
@pytest.mark.slow
def test_it_builds_from_shapes_and_lowers_on_eight_devices(name: str) -> None:
    experiment = module(name)
    config = experiment.Config(**SMALLER.get(name, {}))
    learner, shapes = research.init_abstract(lambda: experiment.build(config))
    assert jax.tree.structure(learner.names) == jax.tree.structure(shapes)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def placed(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    splits = experiment.data(config)
    state = jax.tree.map(lambda leaf: placed(leaf, P()), shapes)
    for step, split in ((learner.train, "train"), (learner.evaluate, "val")):
        batch = jax.tree.map(lambda leaf: placed(leaf, P("data" if leaf.shape[0] % 8 == 0 else None)), splits[split].shapes)
        after, _ = jax.jit(step).lower(state, batch).out_info
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


@pytest.mark.sample(2)
@pytest.mark.slow
def test_it_takes_two_steps(name: str) -> None:
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"no {PACKAGES[name]}, which has the data: pip install --no-deps {PACKAGES[name]}")
    experiment = module(name)
    config = experiment.Config(steps=2, batch_size=8, **SMALLER.get(name, {}))
    splits, learner = experiment.data(config), experiment.build(config)
    before = [np.array(leaf) for leaf in jax.tree.leaves(learner.init())]
    state, logs = research.train(learner, splits["train"], steps=2)
    assert all(np.isfinite(log).all() for log in logs.values())
    assert any((a != b).any() for a, b in zip(before, jax.tree.leaves(state), strict=True))
    evaluated = research.evaluate(learner, splits["val"], state)
    assert all(np.isfinite(log).all() for log in evaluated.values())
