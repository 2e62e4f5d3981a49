"""Runs of one config with several seeds: their mean with an interval, and whether two configs differ by more than chance."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from research.reporting import record
from research.training.logs import LogEntry

OF_A_SEED = ("seed", "population", "vary")  # fields of a config that say which seeds were run


class Group(NamedTuple):
    """Runs that differ in their seed only, by their labels, and the final metrics of each seed."""

    config: Mapping[str, Any]
    runs: Mapping[str, record.Run]
    metrics: Sequence[Mapping[str, float]]

    def values(self, metric: str) -> list[float]:
        """Returns the finite values of a metric, one of each seed that has it."""
        found = [each[metric] for each in self.metrics if isinstance(each.get(metric), int | float)]
        return [float(value) for value in found if abs(value) < 1e300]


class Difference(NamedTuple):
    """The difference of two means, half of its 95% interval, and the probability of one as large without a difference."""

    mean: float
    half_width: float
    p: float


def group_runs(runs: Mapping[str, record.Run], summaries: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """Returns the runs by their config but for the seed, in their order. The members of a population of seeds count as runs.

    `runs` and `summaries` are by label. A run that repeats another, with the same seed, is a group of its own.

    >>> from pathlib import Path
    >>> runs = {f"r{i}": record.Run(Path("r"), "digits", {"rate": rate, "seed": i}) for i, rate in enumerate((0.1, 0.1, 0.2))}
    >>> summaries = {name: {"metrics": {"loss": 0.5}} for name in runs}
    >>> [(list(group.runs), group.config) for group in group_runs(runs, summaries)]
    [(['r0', 'r1'], {'experiment': 'digits', 'rate': 0.1}), (['r2'], {'experiment': 'digits', 'rate': 0.2})]
    """
    groups: dict[str, Group] = {}
    seeds: set[str] = set()
    for label, run in runs.items():
        of_seeds = run.config.get("vary", "seed") == "seed"
        left_out = OF_A_SEED if of_seeds else ()
        config = {"experiment": run.experiment, **{name: value for name, value in run.config.items() if name not in left_out}}
        members = summaries[label].get("members")
        metrics = [summaries[label].get("metrics", {})]
        if of_seeds and isinstance(members, list) and all(isinstance(each, dict) for each in members):
            metrics = [each["metrics"] for each in members if isinstance(each.get("metrics"), dict)]
        key, with_seed = (json.dumps(each, sort_keys=True, default=str) for each in (config, [config, run.config.get("seed")]))
        key += label if with_seed in seeds else ""
        seeds.add(with_seed)
        group = groups.get(key, Group(config, {}, []))
        groups[key] = Group(config, {**group.runs, label: run}, [*group.metrics, *metrics])
    return list(groups.values())


def names_of(groups: Sequence[Group]) -> list[str]:
    """Returns a name for each group: the options by which it differs from others, and its runs where none does.

    >>> names_of([Group({"rate": 0.1, "units": 64}, {}, []), Group({"rate": 0.2, "units": 64}, {}, [])])
    ['rate=0.1', 'rate=0.2']
    """
    fields = list(dict.fromkeys(name for group in groups for name in group.config))
    differing = [name for name in fields if len({json.dumps(group.config.get(name), default=str) for group in groups}) > 1]
    names = [" ".join(f"{name}={group.config.get(name)}" for name in differing) for group in groups]
    names = names if differing else [str(group.config.get("experiment", "")) for group in groups]
    return [
        f"{name} ({', '.join(group.runs)})" if names.count(name) > 1 else name for name, group in zip(names, groups, strict=True)
    ]


def merge_entries(logs: Iterable[Sequence[LogEntry]]) -> list[LogEntry]:
    """Returns the logs of several runs as one: at each step that all have, the mean, and the values of all as members.

    >>> first, second = ([LogEntry(10, 0, "val", {"loss": loss})] for loss in (1.0, 2.0))
    >>> merge_entries([first, second])
    [LogEntry(step=10, epoch=0, split='val', values={'loss': 1.5}, members={'loss': [1.0, 2.0]})]
    """
    by_run = [{(entry.step, entry.split): entry for entry in entries} for entries in logs]
    merged = []
    for key, entry in by_run[0].items():
        entries = [of_run[key] for of_run in by_run if key in of_run]
        if len(entries) < len(by_run):
            continue
        names = [name for name in entry.values if all(name in each.values for each in entries)]
        members = {name: [v for each in entries for v in each.members.get(name, [each.values[name]])] for name in names}
        means = {name: sum(values) / len(values) for name, values in members.items()}
        merged.append(LogEntry(entry.step, entry.epoch, entry.split, means, members))
    return merged


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of values, and half of its 95% interval by Student's t; NaN for a single value.

    >>> mean, half_width = interval([1.0, 2.0, 3.0])
    >>> mean, round(half_width, 3)  # 4.303 / sqrt(3)
    (2.0, 2.484)
    """
    from scipy.stats import t  # slow to import

    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, float(t.ppf(0.975, count - 1)) * math.sqrt(variance / count)


def difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Returns by how much the mean of `second` is above that of `first`, by Welch's t-test; None for fewer than two values.

    >>> found = difference([1.0, 2.0, 3.0], [4.0, 5.0, 6.5])
    >>> round(found.mean, 3), round(found.p, 4)
    (3.167, 0.0291)
    """
    from scipy.stats import ttest_ind  # slow to import

    if min(len(first), len(second)) < 2:
        return None
    mean = sum(second) / len(second) - sum(first) / len(first)
    if len({*first}) == len({*second}) == 1:  # no variance to compare with
        return Difference(mean, 0.0, 0.0 if mean else 1.0)
    test = ttest_ind(second, first, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, float(high - low) / 2, float(test.pvalue))
