"""Every experiment keeps the contract that run, plan, populations and reports rest on."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import research

FILES = sorted((Path(__file__).parent.parent / "experiments").glob("[!_]*.py"))
MIXED = ("gemma",)  # KerasHub mixes dtypes in it, and is slow to build
pytestmark = pytest.mark.parametrize(
    "name",
    [pytest.param(path.stem, marks=[pytest.mark.promotes, pytest.mark.slow] if path.stem in MIXED else []) for path in FILES],
)


def module(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}")


def test_its_page_tells_the_command_and_a_number_to_expect(name: str) -> None:
    doc = module(name).__doc__
    assert doc.partition("\n")[0].endswith(".")
    assert f"just run {name}" in doc
    assert re.search(r"[Ee]xpect .*\d", doc)


def test_its_config_is_frozen_typed_told_and_holds_what_every_run_has(name: str) -> None:
    config = module(name).Config
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen
    assert {"epochs", "steps", "batch_size", "seed"} <= {field.name for field in dataclasses.fields(config)}
    body = next(
        n for n in ast.walk(ast.parse(Path(module(name).__file__).read_text())) if getattr(n, "name", "") == "Config"
    ).body
    told = [
        isinstance(after, ast.Expr)
        for node, after in zip(body, [*body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign)
    ]
    assert all(told)


def test_it_builds_from_shapes_and_lowers_on_eight_devices(name: str) -> None:
    experiment = module(name)
    config = experiment.Config()
    learner, shapes = research.abstract(lambda: experiment.build(config))
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


@pytest.mark.slow
def test_it_takes_two_steps(name: str) -> None:
    experiment = module(name)
    config = experiment.Config(steps=2, batch_size=8)
    splits, learner = experiment.data(config), experiment.build(config)
    before = [np.array(leaf) for leaf in jax.tree.leaves(learner.init())]
    state, logs = research.train(learner, splits["train"], steps=2)
    assert np.isfinite(list(logs.values())).all()
    assert any((a != b).any() for a, b in zip(before, jax.tree.leaves(state), strict=True))
    evaluated = research.evaluate(learner, splits["val"], state)
    assert np.isfinite(list(evaluated.values())).all()
