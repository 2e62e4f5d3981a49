"""Where the boxes of a layered drawing go: ranks by the longest path, few crossings, straight edges. Lengths in inches."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

Edge = tuple[str, str]
Point = tuple[float, float]

ACROSS, DOWN, MARGIN, HEADING = 0.25, 0.32, 0.16, 0.24  # gaps beside and below a box; a frame's rim and the room for its name


class Box(NamedTuple):
    """A rectangle by its upper left corner; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> Point:
        """The middle of its upper side."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        """The middle of its lower side."""
        return self.x + self.width / 2, self.y + self.height

    def right(self, share: float) -> Point:
        """A point of its right side, so far down."""
        return self.x + self.width, self.y + share * self.height


class Layout(NamedTuple):
    """The drawing's size, the boxes, the frames around those of a path in common, and the points that each edge passes."""

    width: float
    height: float
    boxes: dict[str, Box]
    frames: dict[str, Box]
    routes: dict[Edge, list[Point]]


def layout(sizes: Mapping[str, Point], edges: Sequence[Edge], headings: Mapping[str, float]) -> Layout:
    """Lays out boxes of given widths and heights so that edges run downwards.

    Names are paths. The boxes below each path of `headings`, which tells the room its frame's name needs, stand together in a
    frame. Boxes of a frame that no edge joins are stacked in their order. An edge that closes a cycle runs back on the right.

    >>> placed = layout(dict.fromkeys("abc", (1.0, 1.0)), [("a", "b"), ("a", "c")], {})
    >>> [(name, round(box.x, 2), round(box.y, 2)) for name, box in placed.boxes.items()]
    [('a', 0.62, 0.0), ('b', 0.0, 1.32), ('c', 1.25, 1.32)]
    """
    return _frame("", sizes, edges, headings)


def _frame(path: str, sizes: Mapping[str, Point], edges: Sequence[Edge], headings: Mapping[str, float]) -> Layout:
    """What lies below a path, seen from its own upper left corner."""
    depth = path.count("/")

    def item(name: str) -> str:
        """The box or frame, directly below the path, that a box is or is in."""
        inner = "/".join(name.split("/")[: depth + 1])
        return f"{inner}/" if inner in headings else inner

    inside = [(a, b) for a, b in edges if a.startswith(path) and b.startswith(path)]
    items = list(dict.fromkeys(item(name) for name in sizes if name.startswith(path)))
    frames = {name: _frame(name, sizes, inside, headings) for name in items if name.endswith("/")}
    extents = {name: sizes[name] for name in items if name not in frames}
    for name, frame in frames.items():
        width = max(frame.width, headings[name.removesuffix("/")]) + 2 * MARGIN
        extents[name] = (width, frame.height + 2 * MARGIN + HEADING)
    between = {(a, b): (item(a), item(b)) for a, b in inside if item(a) != item(b)}
    down = _acyclic(items, list(dict.fromkeys(between.values())))
    rows, chains = _rows(items, down)
    centres, width = _across(rows, {name: size[0] for name, size in extents.items()}, list(chains.values()))
    found = Layout(width, -DOWN, {}, {}, {})
    passed: dict[str, list[Point]] = {}
    for row in rows:
        y, height = found.height + DOWN, max(extents[name][1] for name in row if name in extents)
        for name in row:
            if name not in extents:
                passed[name] = [(centres[name], y), (centres[name], y + height)]
                continue
            box = Box(centres[name] - extents[name][0] / 2, y + (height - extents[name][1]) / 2, *extents[name])
            if name in frames:
                _put(found, name.removesuffix("/"), box, frames[name])
            else:
                found.boxes[name] = box
        found = found._replace(height=y + height)
    for a, b in inside:
        if (a, b) in between and between[a, b] in chains:
            way = [point for name in chains[between[a, b]][1:-1] for point in passed[name]]
            found.routes[a, b] = [found.boxes[a].bottom, *way, found.boxes[b].top]
        elif (a, b) in between or a == b == item(a):
            right, back, to = found.width + ACROSS / 2, found.boxes[a].right(0.7), found.boxes[b].right(0.3)
            found.routes[a, b] = [back, (right, back[1]), (right, to[1]), to]
            found = found._replace(width=right)
    return found._replace(boxes={name: found.boxes[name] for name in sizes if name in found.boxes})


def _put(found: Layout, path: str, box: Box, frame: Layout) -> None:
    """Puts what is laid out in a frame where the frame is."""
    dx, dy = box.x + (box.width - frame.width) / 2, box.y + MARGIN + HEADING
    found.frames[path] = box
    for boxes, inner in ((found.boxes, frame.boxes), (found.frames, frame.frames)):
        boxes.update({name: b._replace(x=b.x + dx, y=b.y + dy) for name, b in inner.items()})
    found.routes.update({edge: [(x + dx, y + dy) for x, y in route] for edge, route in frame.routes.items()})


def _rows(items: Sequence[str], edges: Sequence[Edge]) -> tuple[list[list[str]], dict[Edge, list[str]]]:
    """The items row by row, each row from left to right, and for each edge the items that it runs along.

    An edge over several rows has a place of its own in each row between, `*NUMBER`.
    """
    if not edges:
        return [[name] for name in items], {}
    rank = dict.fromkeys(items, 0)
    for _ in items:
        for a, b in edges:
            rank[b] = max(rank[b], rank[a] + 1)
    for name in items:  # what takes nothing stands right above the first that takes it
        if not any(b == name for _, b in edges):
            rank[name] = min((rank[b] for a, b in edges if a == name), default=1) - 1
    rows: list[list[str]] = [[] for _ in range(max(rank.values()) + 1)]
    for name in items:
        rows[rank[name]].append(name)
    chains: dict[Edge, list[str]] = {}
    for a, b in edges:
        between = [f"*{len(chains)}.{r}" for r in range(rank[a] + 1, rank[b])]
        for r, place in enumerate(between, rank[a] + 1):
            rows[r].append(place)
        chains[a, b] = [a, *between, b]
    return _uncrossed(rows, list(chains.values())), chains


def _acyclic(items: Sequence[str], edges: Sequence[Edge]) -> list[Edge]:
    """The edges without those that lead back to where a path from the first items came from."""
    after: dict[str, list[str]] = defaultdict(list)
    for a, b in edges:
        after[a].append(b)
    back: set[Edge] = set()
    done: set[str] = set()
    for start in items:
        path, pending = [start], [iter(after[start])]
        while path and start not in done:
            step = next(pending[-1], None)
            if step is None:
                done.add(path.pop())
                pending.pop()
            elif step in path:
                back.add((path[-1], step))
            elif step not in done:
                path.append(step)
                pending.append(iter(after[step]))
    return [edge for edge in edges if edge not in back]


def _uncrossed(rows: list[list[str]], chains: Sequence[Sequence[str]]) -> list[list[str]]:
    """Reorders each row by where its items' neighbours stand, in the row before, then after; keeps what crosses least."""
    segments = [pair for chain in chains for pair in pairwise(chain)]
    row_of = {name: r for r, row in enumerate(rows) for name in row}
    beside: dict[int, dict[str, list[str]]] = {1: defaultdict(list), -1: defaultdict(list)}
    for a, b in segments:
        beside[1][b].append(a)
        beside[-1][a].append(b)

    def crossings(rows: list[list[str]]) -> int:
        place = {name: i for row in rows for i, name in enumerate(row)}
        by_row = defaultdict(list)
        for a, b in segments:
            by_row[row_of[a]].append((place[a], place[b]))
        return sum((p[0] - q[0]) * (p[1] - q[1]) < 0 for each in by_row.values() for i, p in enumerate(each) for q in each[:i])

    best = rows
    for sweep in range(8):
        direction = 1 if sweep % 2 == 0 else -1
        rows = [list(row) for row in rows]
        for r in range(1, len(rows)) if direction == 1 else range(len(rows) - 2, -1, -1):
            place = {name: i for i, name in enumerate(rows[r - direction])}
            centre = {}
            for i, name in enumerate(rows[r]):
                near = [place[n] for n in beside[direction][name] if n in place]
                centre[name] = sum(near) / len(near) if near else i
            rows[r].sort(key=centre.__getitem__)
        if crossings(rows) < crossings(best):
            best = rows
    return best


def _across(
    rows: Sequence[Sequence[str]], widths: Mapping[str, float], chains: Sequence[Sequence[str]]
) -> tuple[dict[str, float], float]:
    """Each item's centre, near its neighbours' centres, without overlaps; and the width that all need."""
    beside: dict[str, list[str]] = defaultdict(list)
    for chain in chains:
        for a, b in pairwise(chain):
            beside[a].append(b)
            beside[b].append(a)
    centres: dict[str, float] = dict.fromkeys((name for row in rows for name in row), 0.0)
    for sweep in range(24):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = []
            for name in row:
                near = [centres[n] for n in beside[name]]
                wanted.append(sum(near) / len(near) if near else centres[name])
            centres.update(zip(row, _apart(wanted, [widths.get(name, 0.1) for name in row]), strict=True))
    left = min(centres[name] - widths.get(name, 0.1) / 2 for name in centres)
    right = max(centres[name] + widths.get(name, 0.1) / 2 for name in centres)
    return {name: centre - left for name, centre in centres.items()}, right - left


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The centres, in order and a gap apart, with the least squared distance from those wanted (pooled where they collide)."""
    offsets = [0.0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2 + ACROSS)
    pools: list[tuple[float, int]] = []  # mean of what is wanted less the offset, and of how many
    for value, offset in zip(wanted, offsets, strict=True):
        mean, count = value - offset, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
