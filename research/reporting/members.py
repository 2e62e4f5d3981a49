"""The members of a population, ranked by a metric that is logged for each of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from research.reporting.report import metric_direction
from research.training.logs import LogEntry


class Ranking(NamedTuple):
    """The metric that members are ranked by, whether a higher value is better, and the members, the best first.

    >>> Ranking("val_accuracy", True, [1, 0]).describe()
    'val_accuracy:max'
    """

    metric: str
    highest: bool
    order: list[int]

    def describe(self) -> str:
        """Returns the metric and the direction, as `--keep-best` takes them."""
        return f"{self.metric}:{'max' if self.highest else 'min'}"


def latest_of_members(entries: Iterable[LogEntry]) -> dict[str, list[float]]:
    """Returns the last values of each metric in a population's members, named as by `latest_metrics`.

    >>> latest_of_members([LogEntry(1, 0, "val", {"loss": 2.0}, {"loss": [1.0, 3.0]})])
    {'val_loss': [1.0, 3.0]}
    """
    return {
        ("" if entry.split == "train" else f"{entry.split}_") + name: each
        for entry in entries
        for name, each in entry.members.items()
    }


def rank_members(entries: Sequence[LogEntry], metric: str | None = None, highest: bool = False) -> Ranking | None:
    """Returns the ranking by the last values of a metric; None if no member has logs.

    Without a metric it is the first to maximise of the validation data, by its name, or its loss; without validation data one of
    another evaluation but "test", or else of training. Equal members are ranked by the loss on the same data, then by their
    number; members whose value is not finite come last.

    >>> logs = {"loss": [0.5, 0.4, math.nan], "accuracy": [0.8, 0.8, 0.1]}
    >>> rank_members([LogEntry(10, 0, "val", {}, logs)])
    Ranking(metric='val_accuracy', highest=True, order=[1, 0, 2])
    >>> rank_members([LogEntry(10, 0, "val", {}, logs)], "val_loss").order
    [1, 0, 2]
    """
    values = latest_of_members(entries)
    if metric is None:
        metric, highest = _default(entries)
    if metric not in values:
        return None
    scores = [-value if highest else value for value in values[metric]]
    prefixes = {f"{entry.split}_" for entry in entries if metric.startswith(f"{entry.split}_")}
    losses = values.get(f"{max(prefixes, key=len, default='')}loss", scores)

    def key(member: int) -> tuple[Any, ...]:
        score, loss = scores[member], losses[member]
        finite = math.isfinite(score)
        return not finite, score if finite else 0.0, not math.isfinite(loss), loss if math.isfinite(loss) else 0.0, member

    return Ranking(metric, highest, sorted(range(len(scores)), key=key))


def _default(entries: Sequence[LogEntry]) -> tuple[str, bool]:
    """Returns the name of the metric to rank by, and whether a higher value is better."""
    names: dict[str, dict[str, None]] = {}
    for entry in entries:
        names.setdefault(entry.split, {}).update(dict.fromkeys(entry.members))
    order = {"val": 0, "train": 2}
    for split in sorted((split for split in names if split != "test" and names[split]), key=lambda split: order.get(split, 1)):
        prefix = "" if split == "train" else f"{split}_"
        highest = [name for name in names[split] if metric_direction(name) == 1]
        lowest = [name for name in ("loss", *names[split]) if name in names[split] and metric_direction(name) == -1]
        return prefix + (highest or lowest or list(names[split]))[0], bool(highest)
    return "", False


def members_summary(
    values: Sequence[Mapping[str, Any]], entries: Sequence[LogEntry], ranking: Ranking | None
) -> list[dict[str, Any]]:
    """Returns what summary.json holds of each member: number, rank from 1, values of the config that vary, and last metrics.

    >>> entries = [LogEntry(10, 0, "val", {}, {"loss": [0.5, 0.4]})]
    >>> members_summary([{"seed": 0}, {"seed": 1}], entries, rank_members(entries))[1]
    {'member': 1, 'rank': 1, 'values': {'seed': 1}, 'metrics': {'val_loss': 0.4}}
    """
    metrics = latest_of_members(entries)
    return [
        {
            "member": i,
            "rank": None if ranking is None else ranking.order.index(i) + 1,
            "values": dict(each),
            "metrics": {name: column[i] for name, column in metrics.items()},
        }
        for i, each in enumerate(values)
    ]
