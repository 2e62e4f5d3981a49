"""Layered graph drawing (Sugiyama et al. 1981): ranks by longest path, few crossings, straight edges. Lengths in inches."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

Edge = tuple[str, str]
Point = tuple[float, float]

COLUMN_GAP, ROW_GAP = 0.25, 0.32
MARGIN, HEADING = 0.16, 0.24  # of a frame: its inner margin, and the height of its name


class Box(NamedTuple):
    """A rectangle, given by its upper left corner; y grows downwards.

    >>> Box(0.0, 0.0, 2.0, 1.0).bottom
    (1.0, 1.0)
    """

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> Point:
        """The centre of the upper side."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        """The centre of the lower side."""
        return self.x + self.width / 2, self.y + self.height

    def right(self, fraction: float) -> Point:
        """Returns the point of the right side at a fraction of the height from the top."""
        return self.x + self.width, self.y + fraction * self.height


class Layout(NamedTuple):
    """The size of a drawing, its boxes, the frames around boxes with a common path, and the points of each edge.

    >>> compute_layout({"a": (1.0, 1.0)}, [], {}).boxes
    {'a': Box(x=0.0, y=0.0, width=1.0, height=1.0)}
    """

    width: float
    height: float
    boxes: dict[str, Box]
    frames: dict[str, Box]
    routes: dict[Edge, list[Point]]


def compute_layout(sizes: Mapping[str, Point], edges: Sequence[Edge], headings: Mapping[str, float]) -> Layout:
    """Returns positions for boxes of given (width, height) such that edges run downwards.

    Names are paths. `headings` maps the path of a frame to the width of its heading; the frame surrounds all boxes under the
    path. Boxes without edges between them are stacked in their order. An edge that closes a cycle runs upwards on the right.

    >>> layout = compute_layout(dict.fromkeys("abc", (1.0, 1.0)), [("a", "b"), ("a", "c")], {})
    >>> [(name, round(box.x, 2), round(box.y, 2)) for name, box in layout.boxes.items()]
    [('a', 0.62, 0.0), ('b', 0.0, 1.32), ('c', 1.25, 1.32)]
    """
    return _layout_frame("", sizes, edges, headings)


def _layout_frame(path: str, sizes: Mapping[str, Point], edges: Sequence[Edge], headings: Mapping[str, float]) -> Layout:
    """Returns the layout of the boxes under a path, relative to the frame's upper left corner."""
    depth = path.count("/")

    def item(name: str) -> str:
        """Returns the direct child of the path that a box is, or is in: a box, or a frame with a trailing slash."""
        inner = "/".join(name.split("/")[: depth + 1])
        return f"{inner}/" if inner in headings else inner

    inside = [(a, b) for a, b in edges if a.startswith(path) and b.startswith(path)]
    items = list(dict.fromkeys(item(name) for name in sizes if name.startswith(path)))
    frames = {name: _layout_frame(name, sizes, inside, headings) for name in items if name.endswith("/")}
    extents = {name: sizes[name] for name in items if name not in frames}
    for name, frame in frames.items():
        width = max(frame.width, headings[name.removesuffix("/")]) + 2 * MARGIN
        extents[name] = (width, frame.height + 2 * MARGIN + HEADING)
    item_edges = {(a, b): (item(a), item(b)) for a, b in inside if item(a) != item(b)}
    downward = _remove_cycles(items, list(dict.fromkeys(item_edges.values())))
    rows, chains = _assign_rows(items, downward)
    centres, width = _assign_centres(rows, {name: size[0] for name, size in extents.items()}, list(chains.values()))
    layout = Layout(width, -ROW_GAP, {}, {}, {})
    waypoints: dict[str, list[Point]] = {}
    for row in rows:
        y, height = layout.height + ROW_GAP, max(extents[name][1] for name in row if name in extents)
        for name in row:
            if name not in extents:
                waypoints[name] = [(centres[name], y), (centres[name], y + height)]
                continue
            box = Box(centres[name] - extents[name][0] / 2, y + (height - extents[name][1]) / 2, *extents[name])
            if name in frames:
                _insert_frame(layout, name.removesuffix("/"), box, frames[name])
            else:
                layout.boxes[name] = box
        layout = layout._replace(height=y + height)
    for a, b in inside:
        if (a, b) in item_edges and item_edges[a, b] in chains:
            middle = [point for name in chains[item_edges[a, b]][1:-1] for point in waypoints[name]]
            layout.routes[a, b] = [layout.boxes[a].bottom, *middle, layout.boxes[b].top]
        elif (a, b) in item_edges or a == b == item(a):
            x, start, end = layout.width + COLUMN_GAP / 2, layout.boxes[a].right(0.7), layout.boxes[b].right(0.3)
            layout.routes[a, b] = [start, (x, start[1]), (x, end[1]), end]
            layout = layout._replace(width=x)
    return layout._replace(boxes={name: layout.boxes[name] for name in sizes if name in layout.boxes})


def _insert_frame(layout: Layout, path: str, box: Box, frame: Layout) -> None:
    """Adds a frame and its contents to a layout, moved to the frame's position."""
    dx, dy = box.x + (box.width - frame.width) / 2, box.y + MARGIN + HEADING
    layout.frames[path] = box
    for boxes, inner in ((layout.boxes, frame.boxes), (layout.frames, frame.frames)):
        boxes.update({name: b._replace(x=b.x + dx, y=b.y + dy) for name, b in inner.items()})
    layout.routes.update({edge: [(x + dx, y + dy) for x, y in route] for edge, route in frame.routes.items()})


def _assign_rows(items: Sequence[str], edges: Sequence[Edge]) -> tuple[list[list[str]], dict[Edge, list[str]]]:
    """Returns the rows of items, each from left to right, and for each edge its chain of items.

    An edge that spans several rows gets a placeholder item, `*NUMBER.ROW`, in each row between.
    """
    if not edges:
        return [[name] for name in items], {}
    rank = dict.fromkeys(items, 0)
    for _ in items:
        for a, b in edges:
            rank[b] = max(rank[b], rank[a] + 1)
    for name in items:  # an item without incoming edges is right above the first item that it has an edge to
        if not any(b == name for _, b in edges):
            rank[name] = min((rank[b] for a, b in edges if a == name), default=1) - 1
    rows: list[list[str]] = [[] for _ in range(max(rank.values()) + 1)]
    for name in items:
        rows[rank[name]].append(name)
    chains: dict[Edge, list[str]] = {}
    for a, b in edges:
        placeholders = [f"*{len(chains)}.{r}" for r in range(rank[a] + 1, rank[b])]
        for r, placeholder in enumerate(placeholders, rank[a] + 1):
            rows[r].append(placeholder)
        chains[a, b] = [a, *placeholders, b]
    return _reduce_crossings(rows, list(chains.values())), chains


def _remove_cycles(items: Sequence[str], edges: Sequence[Edge]) -> list[Edge]:
    """Returns the edges without those that close a cycle in a depth-first search from the first items."""
    successors: dict[str, list[str]] = defaultdict(list)
    for a, b in edges:
        successors[a].append(b)
    closing: set[Edge] = set()
    done: set[str] = set()
    for start in items:
        path, pending = [start], [iter(successors[start])]
        while path and start not in done:
            successor = next(pending[-1], None)
            if successor is None:
                done.add(path.pop())
                pending.pop()
            elif successor in path:
                closing.add((path[-1], successor))
            elif successor not in done:
                path.append(successor)
                pending.append(iter(successors[successor]))
    return [edge for edge in edges if edge not in closing]


def _reduce_crossings(rows: list[list[str]], chains: Sequence[Sequence[str]]) -> list[list[str]]:
    """Orders each row by the mean position of neighbours, sweeping down and up; returns the order with the fewest crossings."""
    segments = [pair for chain in chains for pair in pairwise(chain)]
    row_of = {name: r for r, row in enumerate(rows) for name in row}
    neighbours: dict[int, dict[str, list[str]]] = {1: defaultdict(list), -1: defaultdict(list)}  # above, below
    for a, b in segments:
        neighbours[1][b].append(a)
        neighbours[-1][a].append(b)

    def count_crossings(rows: list[list[str]]) -> int:
        position = {name: i for row in rows for i, name in enumerate(row)}
        by_row = defaultdict(list)
        for a, b in segments:
            by_row[row_of[a]].append((position[a], position[b]))
        return sum((p[0] - q[0]) * (p[1] - q[1]) < 0 for row in by_row.values() for i, p in enumerate(row) for q in row[:i])

    best = rows
    for sweep in range(8):
        direction = 1 if sweep % 2 == 0 else -1
        rows = [list(row) for row in rows]
        for r in range(1, len(rows)) if direction == 1 else range(len(rows) - 2, -1, -1):
            position = {name: i for i, name in enumerate(rows[r - direction])}
            mean_position = {}
            for i, name in enumerate(rows[r]):
                positions = [position[n] for n in neighbours[direction][name] if n in position]
                mean_position[name] = sum(positions) / len(positions) if positions else i
            rows[r].sort(key=mean_position.__getitem__)
        if count_crossings(rows) < count_crossings(best):
            best = rows
    return best


def _assign_centres(
    rows: Sequence[Sequence[str]], widths: Mapping[str, float], chains: Sequence[Sequence[str]]
) -> tuple[dict[str, float], float]:
    """Returns each item's centre, near its neighbours' centres and without overlaps, and the total width."""
    neighbours: dict[str, list[str]] = defaultdict(list)
    for chain in chains:
        for a, b in pairwise(chain):
            neighbours[a].append(b)
            neighbours[b].append(a)
    centres: dict[str, float] = dict.fromkeys((name for row in rows for name in row), 0.0)
    for sweep in range(24):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            targets = []
            for name in row:
                adjacent = [centres[n] for n in neighbours[name]]
                targets.append(sum(adjacent) / len(adjacent) if adjacent else centres[name])
            centres.update(zip(row, _separate(targets, [widths.get(name, 0.1) for name in row]), strict=True))
    left = min(centres[name] - widths.get(name, 0.1) / 2 for name in centres)
    right = max(centres[name] + widths.get(name, 0.1) / 2 for name in centres)
    return {name: centre - left for name, centre in centres.items()}, right - left


def _separate(targets: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Returns centres in order, a gap apart, closest to the targets in least squares (pool adjacent violators)."""
    offsets = [0.0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2 + COLUMN_GAP)
    pools: list[tuple[float, int]] = []  # mean of target minus offset, and number of items
    for value, offset in zip(targets, offsets, strict=True):
        mean, count = value - offset, 1
        while pools and pools[-1][0] > mean:
            last_mean, last_count = pools.pop()
            mean = (last_mean * last_count + mean * count) / (last_count + count)
            count += last_count
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
