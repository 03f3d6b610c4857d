"""Where labels stand so that they cover nothing. Geometry alone; any unit, y upwards.

Boxes are rows (x0, y0, x1, y1), segments rows (x0, y0, x1, y1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GAPS = (3, 6, 10, 16, 24, 34, 46, 60, 76, 94, 114, 136, 160, 190)  # between a point and its label
DIRECTIONS = 24
LEADER_GAP = 12  # labels farther away get a leader
CONFLICT = 1e4  # outweighs any distance
CROSSED = 30.0  # what it costs, in distance, to stand on the other side of a line or point
NEARER = 15.0  # or nearer to another point
CANDIDATES = 3200  # of all labels together: every pair is looked at
SWEEPS = 4


@dataclass(frozen=True)
class Choices:
    """The places a label may take."""

    boxes: np.ndarray  # (k, 4)
    costs: np.ndarray  # (k,) of distance and direction
    paths: np.ndarray  # (k, 4) from point to label; NaN for labels without a point
    gaps: np.ndarray  # (k,) the length of the path


@dataclass(frozen=True)
class Scene:
    """What labels must not cover."""

    bounds: tuple[float, float, float, float]
    points: np.ndarray  # (n, 2)
    radius: float  # of a point
    lines: np.ndarray  # (m, 4)

    @property
    def marks(self) -> np.ndarray:
        """The points' boxes."""
        return np.hstack([self.points - self.radius, self.points + self.radius])


@dataclass(frozen=True)
class Place:
    """Where a label stands."""

    box: np.ndarray  # (4,)
    leader: np.ndarray | None  # (4,) where the eye needs one
    conflict: bool  # it covers something: there was no free place


def around(point: Sequence[float], size: Sequence[float], radius: float) -> Choices:
    """Places around a point; the nearest, and those to its upper right, cost least."""
    angles = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
    unit = np.tile(np.stack([np.cos(angles), np.sin(angles)], -1), (len(GAPS), 1))
    away = np.repeat(GAPS, DIRECTIONS).astype(float)
    half = np.asarray(size) / 2
    # Steeper than the direction: a side of the box faces the point, seldom a corner.
    centers = point + half * np.clip(1.5 * unit, -1, 1) + unit * (radius + away[:, None])
    boxes = np.hstack([centers - half, centers + half])
    # From a little outside the point's own box to the label's nearest spot.
    starts = point + unit / np.abs(unit).max(1, keepdims=True) * radius * 1.1
    ends = np.clip(point, boxes[:, :2], boxes[:, 2:])
    gaps = np.linalg.norm(ends - point, axis=1) - radius
    askew = 1 - unit @ (np.sqrt(0.5), np.sqrt(0.5))
    return Choices(boxes, away + 4 * askew, np.hstack([starts, ends]), gaps)


def along(y: float, x0: float, x1: float, size: Sequence[float], gap: float) -> Choices:
    """Places below and above a horizontal line; the right end costs least."""
    width, height = size
    rights = np.tile(np.linspace(x1, x0 + width, 40), 2)
    bottoms = np.repeat([y + gap, y - gap - height], 40)
    boxes = np.stack([rights - width, bottoms, rights, bottoms + height], -1)
    costs = (x1 - rights) / 4 + np.where(bottoms > y, 4, 0)
    return Choices(boxes, costs, np.full_like(boxes, np.nan), np.zeros(len(boxes)))


def place(labels: Sequence[Choices], scene: Scene) -> list[Place]:
    """A place for every label; the same every time.

    Labels with the fewest free places choose first. Then each tries what would suit it better, at
    the price of one or two others that choose again.
    """
    if not labels:
        return []
    fixed = [_fixed_costs(label, scene) for label in labels]
    keep = min(max(CANDIDATES // len(labels), 40), 100)
    kept = [np.argsort(cost, kind="stable")[:keep] for cost in fixed]
    table = _Table(
        [cost[best] for cost, best in zip(fixed, kept, strict=True)],
        [_subset(label, best) for label, best in zip(labels, kept, strict=True)],
    )
    order = sorted(range(len(labels)), key=lambda i: (int((fixed[i] < CONFLICT).sum()), i))
    chosen = table.improved(table.first(order))
    return [
        _placed(label, kept[i][k - table.starts[i]], scene, bool(cost >= CONFLICT))
        for i, (label, k, cost) in enumerate(
            zip(labels, chosen, table.costs_beside(chosen)[chosen], strict=True)
        )
    ]


class _Table:
    """What places of several labels cost together. All places are numbered through."""

    def __init__(self, costs: Sequence[np.ndarray], labels: Sequence[Choices]) -> None:
        self.costs = np.concatenate(costs)
        self.starts = np.cumsum([0, *map(len, costs)])
        everything = Choices(*map(np.concatenate, zip(*map(_fields, labels), strict=True)))
        self.clash = np.concatenate([_clash(label, everything) for label in labels])
        for i in range(len(labels)):
            self.clash[self.own(i), self.own(i)] = False

    def own(self, i: int) -> slice:
        """The places of label i."""
        return slice(self.starts[i], self.starts[i + 1])

    def costs_beside(self, chosen: np.ndarray, places: slice = slice(None)) -> np.ndarray:
        """What places cost while labels stand where they are."""
        return self.costs[places] + CONFLICT * self.clash[places][:, chosen].sum(1)

    def best(self, i: int, chosen: np.ndarray) -> int:
        """The cheapest place of label i."""
        return self.starts[i] + int(np.argmin(self.costs_beside(chosen, self.own(i))))

    def total(self, chosen: np.ndarray) -> float:
        return self.costs[chosen].sum() + CONFLICT * self.clash[np.ix_(chosen, chosen)].sum()

    def first(self, order: Sequence[int]) -> np.ndarray:
        """One label after the other takes the best place that is left."""
        chosen: dict[int, int] = {}
        for i in order:
            chosen[i] = self.best(i, np.array(list(chosen.values()), int))
        return np.array([chosen[i] for i in range(len(order))])

    def improved(self, chosen: np.ndarray) -> np.ndarray:
        """Places that cost no more, found by small changes."""
        for _ in range(SWEEPS):
            before = chosen
            for i in range(len(chosen)):
                chosen = self._better(chosen, i)
            if (chosen == before).all():
                break
        return chosen

    def _better(self, chosen: np.ndarray, i: int) -> np.ndarray:
        """Label i in the first place that makes all cheaper, or as it was."""
        total = self.total(chosen)
        own = np.arange(self.starts[i], self.starts[i + 1])
        limit = self.costs_beside(chosen)[chosen[i]]
        for k in own[self.costs[own] < limit]:  # cheapest first
            in_way = np.flatnonzero(self.clash[k, chosen])
            if len(in_way) > 2:
                continue
            moved = chosen.copy()
            moved[i] = k
            for j in in_way:
                moved[j] = self.best(j, moved)
            if self.total(moved) < total - 1e-6:
                return moved
        return chosen


def _fields(label: Choices) -> tuple[np.ndarray, ...]:
    return (label.boxes, label.costs, label.paths, label.gaps)


def _subset(label: Choices, kept: np.ndarray) -> Choices:
    return Choices(*(values[kept] for values in _fields(label)))


def _placed(label: Choices, k: int, scene: Scene, conflict: bool) -> Place:
    wanted = label.gaps[k] > LEADER_GAP or _strayed(label, scene)[k]
    leader = label.paths[k] if wanted and not np.isnan(label.paths[k]).any() else None
    return Place(label.boxes[k], leader, conflict)


def _fixed_costs(label: Choices, scene: Scene) -> np.ndarray:
    """Costs of distance, and of what never moves: bounds, points and lines."""
    boxes = label.boxes
    x0, y0, x1, y1 = scene.bounds
    outside = (boxes[:, 0] < x0) | (boxes[:, 1] < y0) | (boxes[:, 2] > x1) | (boxes[:, 3] > y1)
    conflicts = outside + boxes_overlap(boxes, scene.marks).sum(1)
    conflicts = conflicts + segments_hit_boxes(scene.lines, boxes).sum(0)
    crossed = segments_cross(label.paths, scene.lines).sum(1)
    crossed = crossed + segments_hit_boxes(label.paths, scene.marks).sum(1)
    return label.costs + CONFLICT * conflicts + CROSSED * crossed + NEARER * _strayed(label, scene)


def _strayed(label: Choices, scene: Scene) -> np.ndarray:
    """Which places are as near to another point as to the label's own."""
    points = scene.points[None]
    nearest = np.clip(points, label.boxes[:, None, :2], label.boxes[:, None, 2:])
    away = np.linalg.norm(points - nearest, axis=-1) - scene.radius
    return ((away < label.gaps[:, None] + 2).sum(1) > 1) & ~np.isnan(label.paths[:, 0])


def _clash(a: Choices, b: Choices) -> np.ndarray:
    """Which places of one label cover those of another, or cross the way to them."""
    clash = boxes_overlap(a.boxes, b.boxes)
    clash |= segments_hit_boxes(a.paths, b.boxes)
    clash |= segments_hit_boxes(b.paths, a.boxes).T
    return clash | segments_cross(a.paths, b.paths)


def boxes_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which of boxes a (n, 4) overlap which of b (m, 4): (n, m)."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.T[:, :, None], b.T[:, None]
    return (ax0 < bx1) & (bx0 < ax1) & (ay0 < by1) & (by0 < ay1)


def segments_hit_boxes(segments: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which segments (n, 4) touch which boxes (m, 4): (n, m). NaN segments touch nothing."""
    (ax, ay, bx, by), (x0, y0, x1, y1) = segments.T[:, :, None], boxes.T[:, None]
    enter_x, leave_x = _between(ax, bx, x0, x1)
    enter_y, leave_y = _between(ay, by, y0, y1)
    enter, leave = np.maximum(enter_x, enter_y), np.minimum(leave_x, leave_y)
    return np.maximum(enter, 0) < np.minimum(leave, 1)


def _between(
    start: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where on its way, start 0 and end 1, a coordinate comes between low and high, and leaves."""
    # What stands still is given a step so small that it is there always, or never.
    step = np.where(end == start, 1e-9, end - start)
    first, second = (low - start) / step, (high - start) / step
    return np.minimum(first, second), np.maximum(first, second)


def segments_cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which of segments a (n, 4) cross which of b (m, 4): (n, m). NaN segments cross nothing."""
    (px, py, qx, qy), (rx, ry, sx, sy) = a.T[:, :, None], b.T[:, None]
    ux, uy, vx, vy = qx - px, qy - py, sx - rx, sy - ry
    # On opposite sides of each other: r and s of the first, p and q of the second.
    apart = (ux * (ry - py) - uy * (rx - px)) * (ux * (sy - py) - uy * (sx - px)) < 0
    return apart & ((vx * (py - ry) - vy * (px - rx)) * (vx * (qy - ry) - vy * (qx - rx)) < 0)
