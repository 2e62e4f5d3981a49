"""Experiments of many members: `--population 16`, `--vary seed,learning_rate=log:1e-4:1e-1`.

`as_population` makes of an experiment one whose learner trains all members as one program, each with a config and with data of
its own, as alone. Its config is the experiment's with the fields `population` and `vary`, so that a run of it is recorded and
resumed as any other. `take` goes back: to the experiment, config and state of one member.
"""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from research.cli.checkpoints import parse_best
from research.cli.contract import OPTIONAL, check_learner, check_splits
from research.cli.experiment import Experiment
from research.cli.fields import annotations, check_fields
from research.cli.vary import Varied, is_range, listed, number_type, parse_vary, read_range, read_values
from research.core.learner import Learner
from research.core.state import InvalidArgument
from research.data import Batches, side_by_side
from research.reporting import record
from research.reporting.members import Ranking, members_summary, rank_members
from research.training.bad_steps import Watch
from research.training.logs import LogEntry
from research.transforms import member, population
from research.transforms.population import MEMBERS_SUFFIX

LENGTH = ("epochs", "steps")  # all members train for as many steps
MAX_MEMBERS = 10_000
FORMS = "seed, FIELD=log:LOW:HIGH, FIELD=linear:LOW:HIGH or FIELD=A:B:C"


def as_population(experiment: Experiment) -> Experiment:
    """Returns the experiment that trains members of another; its `Config` has the fields `population` and `vary` too.

    `build` and `data` are those of all members together. The optional functions stay what they are: they take a member's parts.
    """
    module = experiment.module
    parts = {name: getattr(module, name) for name in OPTIONAL if hasattr(module, name)}

    def build(config: Any) -> Learner:
        configs = member_configs(experiment, config)
        values = member_values(config, annotations(module.Config))

        def of_member(**values: Any) -> Learner:
            return check_learner(experiment, module.build(dataclasses.replace(configs[0], **values)))

        return population(of_member, values, example=module.data(configs[0])["train"].shapes, own_batches=True)

    def data(config: Any) -> dict[str, Batches]:
        splits = [check_splits(experiment, module.data(each)) for each in member_configs(experiment, config)]
        return {name: side_by_side([each[name] for each in splits]) for name in splits[0]}

    members = SimpleNamespace(**parts, Config=_config_class(experiment), build=build, data=data, __doc__=module.__doc__)
    return experiment._replace(module=members, member=experiment)


def population_config(experiment: Experiment, config: Any, size: int | None, vary: str | None) -> Any:
    """Returns the config of a population: of `size` members, or as many as `vary` lists values, around a member's config.

    Without `vary` they have other seeds. Raises `InvalidArgument` for what can't vary so.
    """
    vary = vary or "seed"
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    return experiment.module.Config(**values, population=size or _listed(vary), vary=vary)


def member_configs(experiment: Experiment, config: Any) -> list[Any]:
    """Returns the config of each member of a population of an experiment. Raises `InvalidArgument` if one of them can't be."""
    config_class = experiment.module.Config
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config_class) if field.init}
    configs = []
    for i, values in enumerate(member_values(config, annotations(config_class))):
        try:
            configs.append(config_class(**{**own, **values}))
            check_fields(configs[-1])
        except Exception as error:  # __post_init__ raises what it likes
            raise InvalidArgument(f"--vary {config.vary}: member {i}: {str(error).rstrip('.')}.") from error
    return configs


def member_values(config: Any, types_of: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the values that each member of a population has of the fields that vary.

    Members are spaced evenly from the first value of a range to the last, by equal factors or by equal differences; those of a
    whole-number field are rounded. A name alone counts up from the field's value. Raises `InvalidArgument` for a field that the
    config does not have, values that it can't have, and another number of values than members.

    >>> config = SimpleNamespace(population=3, vary="seed,rate=log:1e-4:1e-2,units=linear:1:4", seed=5)
    >>> for values in member_values(config, {"seed": int, "rate": float, "units": int}):
    ...     print(values)
    {'seed': 5, 'rate': 0.0001, 'units': 1}
    {'seed': 6, 'rate': 0.001, 'units': 2}
    {'seed': 7, 'rate': 0.01, 'units': 4}
    """
    parts = parse_vary(
        config.vary,
        types_of,
        dict.fromkeys(LENGTH, "all members train for as many steps; vary another field, or run them apart."),
    )
    columns = {each.field: _column(each, config.population, getattr(config, each.field, None)) for each in parts}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def take(experiment: Experiment, config: Any, state: Any, index: int) -> tuple[Experiment, Any, Any]:
    """Returns the experiment, the config and the state, on one device, of a member of a population."""
    assert experiment.member is not None
    device = jax.local_devices()[0]
    return (
        experiment.member,
        member_configs(experiment.member, config)[index],
        jax.tree.map(lambda leaf: jax.device_put(leaf, device), member(state, index)),
    )


def recorded_entries(run: record.Run, size: int, step: int | None = None) -> list[LogEntry]:
    """Returns the logs of a run up to a step, without lists that are not of `size` members: the file may be damaged."""
    entries = [entry for entry in record.read_entries(run) if step is None or entry.step <= step]
    return [entry._replace(members={k: each for k, each in entry.members.items() if len(each) == size}) for entry in entries]


def rank(entries: Sequence[LogEntry], keep_best: str | None) -> Ranking | None:
    """Returns the ranking of members by their logs, by the metric of `--keep-best`, or else by the default one."""
    best = parse_best(keep_best)
    return rank_members(entries) if best is None else rank_members(entries, *best)


def best(run: record.Run, keep_best: str | None, size: int, step: int | None = None) -> int:
    """Returns the number of the best member by the logs of a run up to a step; 0 if there are none."""
    ranking = rank(recorded_entries(run, size, step), keep_best)
    return 0 if ranking is None else ranking.order[0]


def describe_best(run: record.Run, keep_best: str | None, size: int) -> str:
    """Returns one line about the best member of a finished run."""
    ranking = rank(recorded_entries(run, size), keep_best)
    if ranking is None:
        return "no member has logs; models, pictures and results are those of member 0"
    return f"models, pictures and results are those of member {ranking.order[0]}, the best by {ranking.describe()}"


def summary(
    experiment: Experiment, config: Any, run: record.Run, keep_best: str | None, results: dict[str, float]
) -> dict[str, Any]:
    """Returns what summary.json holds of the members of a population; `results` are those of the best one."""
    assert experiment.member is not None
    entries = recorded_entries(run, config.population)
    ranking = rank(entries, keep_best)
    values = member_values(config, annotations(experiment.member.module.Config))
    members = members_summary(values, entries, ranking)
    members[0 if ranking is None else ranking.order[0]]["metrics"].update(results)
    return {"ranked_by": None if ranking is None else ranking.describe(), "members": members}


def watch_finite(watch: Watch) -> Watch:
    """Returns a watch of the mean over the members whose value is finite: one that diverges does not stop the others.

    >>> watch = watch_finite(lambda first, steps, logs, all_logs: print(logs["loss"]))
    >>> watch(1, 1, {"loss": np.float32(np.nan), "loss_of_members": np.float32([1.0, np.nan])}, None)
    1.0
    """

    def means(logs: dict[str, Any]) -> dict[str, Any]:
        of_members = {name: logs.get(f"{name}{MEMBERS_SUFFIX}") for name in logs}
        return {name: value if of_members[name] is None else _finite_mean(of_members[name]) for name, value in logs.items()}

    return lambda first, steps, logs, all_logs: watch(first, steps, means(logs), all_logs and means(all_logs))


def _finite_mean(values: Any) -> Any:
    """Returns the mean of the finite values along the last axis; NaN where none is."""
    values = np.asarray(values)
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(finite, values, 0).sum(-1) / finite.sum(-1)


def _config_class(experiment: Experiment) -> type:
    """Returns the class of a population's configs. Its constructor raises `InvalidArgument` if a member's config can't be."""
    config_class = experiment.module.Config
    fields: list[Any] = []
    for field in dataclasses.fields(config_class):
        default = {"default": field.default, "default_factory": field.default_factory}
        given: Any = {name: value for name, value in default.items() if value is not dataclasses.MISSING}
        if field.init:
            fields.append((field.name, annotations(config_class)[field.name], dataclasses.field(**given)))
    fields += [("population", int), ("vary", str)]

    def post_init(config: Any) -> None:
        if not 1 <= config.population <= MAX_MEMBERS:
            raise InvalidArgument(f"--population {config.population}: expected a value in [1, {MAX_MEMBERS}].")
        member_configs(experiment, config)

    return dataclasses.make_dataclass(
        "PopulationConfig", fields, frozen=True, kw_only=True, namespace={"__post_init__": post_init}
    )


def _listed(vary: str) -> int:
    """Returns the number of values in the first list of values."""
    for part in vary.split(","):
        text = part.partition("=")[2].strip()
        if text and not is_range(text):
            return len(listed(text))
    raise InvalidArgument(f"--vary {vary}: the number of members is missing; add it: --population 16.")


def _column(varied: Varied, count: int, start: Any) -> list[Any]:
    """Returns the values of a field in each member."""
    number = number_type(varied.annotation)
    if not varied.text:
        if number is not int or not isinstance(start, int):
            raise InvalidArgument(f"--vary {varied.part}: it does not count up from {start!r}; expected {FORMS}.")
        return [start + i for i in range(count)]
    if not is_range(varied.text):
        texts = listed(varied.text)
        if len(texts) != count:
            raise InvalidArgument(
                f"--vary {varied.part}: {len(texts)} values for {count} members; expected as many, or --population {len(texts)}."
            )
        return read_values(varied, texts)
    log, low, high = read_range(varied)
    column = (np.geomspace if log else np.linspace)(low, high, count).tolist()
    column[:1], column[count - 1 :] = [low], [high if count > 1 else low]  # without rounding
    return [round(value) if number is int else value for value in column]
