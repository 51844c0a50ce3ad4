"""Places text beside points so that no two labels overlap, nor a label and a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GAP = 7.0  # pixels between a point and its label: half a marker and some air
STEP = 9.0  # pixels by which the search widens: under a line's height, so that no free lane is jumped
RINGS = 18  # the search ends 160 pixels away: further, a leader line no longer tells what it belongs to
MISLEADING = 1.0  # square pixels of overlap that a label nearer to another point than to its own is worth
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 340, 200, 70, 110, 250, 290)  # degrees, the readable first


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def distance(self, point: tuple[float, float]) -> float:
        """From a point to the nearest edge, 0 inside."""
        x, y = point
        return math.hypot(max(self.left - x, 0.0, x - self.right), max(self.bottom - y, 0.0, y - self.top))

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, taken: Sequence[Box] = ()
) -> list[Box]:
    """Boxes for labels of the given sizes near their points, all in pixels.

    Greedy: each label takes the nearest position inside `frame` that meets no point, no `taken` box and no label
    before it; where there is none, the position with the least overlap. Crowded points come first, so that those
    with room around them yield.
    """
    occupied = [Box(x - GAP, y - GAP, x + GAP, y + GAP) for x, y in points] + list(taken)
    boxes: dict[int, Box] = {}
    for index in sorted(range(len(points)), key=lambda index: _nearest(points, index)):
        best, least = None, math.inf
        for candidate in _positions(points[index], sizes[index]):
            outside = candidate.area - candidate.overlap(frame)
            clash = outside + sum(candidate.overlap(other) for other in occupied)
            clash += MISLEADING * _nearer_to_another(candidate, points, index)
            if clash < least:
                best, least = candidate, clash
            if clash < 1e-6:  # rounding of pixel coordinates
                break
        assert best is not None
        boxes[index] = best
        occupied.append(best)
    return [boxes[index] for index in range(len(points))]


def _nearer_to_another(box: Box, points: Sequence[tuple[float, float]], index: int) -> bool:
    """Whether a reader would take the label for another point's."""
    return any(
        box.distance(other) < box.distance(points[index]) - 1 for other in points
    )  # 1 pixel: no visible difference


def _nearest(points: Sequence[tuple[float, float]], index: int) -> float:
    return min((math.dist(points[index], other) for place, other in enumerate(points) if place != index), default=0.0)


def _positions(point: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    """Boxes of `size` around a point, nearest first; the box's near edge lies on the ring."""
    (x, y), (width, height) = point, size
    for ring in range(RINGS):
        for angle in ANGLES:
            cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            radius = GAP + 1 + ring * STEP
            centre_x = x + cosine * (radius + width / 2)
            centre_y = y + sine * (radius + height / 2)
            yield Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
