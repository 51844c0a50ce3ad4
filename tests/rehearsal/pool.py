"""How torch's caching allocator hands out a card's memory: as much of it as decides what is allocated and reserved.

One stream and default settings of `CUDACachingAllocator.cpp`. Sizes are bytes. A request is rounded up to ROUNDING.
Requests up to SMALL are cut out of segments of their own kind, larger ones out of segments of at least LARGE_SEGMENT;
the smallest free block that holds a request is taken and split, and what is freed joins its free neighbours.
`allocated` counts the blocks in use, rounding too, `requested` what was asked for; `reserved` the segments, which only
`empty_cache` gives back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 2**20
ROUNDING = 512
SMALL = MIB  # a request up to here is small
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
MEDIUM = 10 * MIB  # from here on a segment is as large as its request, rounded up to SEGMENT_ROUNDING
SEGMENT_ROUNDING = 2 * MIB


class NoRoom(Exception):
    """The card holds no further segment of the size asked for."""


@dataclass(eq=False)
class Block:
    """A stretch of a segment, in use or free."""

    size: int
    used: bool = False


@dataclass(eq=False)
class Segment:
    """What was taken from the card in one call: its blocks in the order of their addresses."""

    small: bool
    blocks: list[Block]


@dataclass
class Pool:
    """The allocator; `peak_allocated` and its like are the highest since `reset_peaks`."""

    total: int = 80 * 2**30
    allocated: int = 0
    requested: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_requested: int = 0
    peak_reserved: int = 0
    segments: list[Segment] = field(default_factory=list)
    places: dict[int, tuple[Segment, Block, int]] = field(default_factory=dict)

    def allocate(self, key: int, size: int) -> None:
        """Give `size` bytes, above zero, to `key`; NoRoom where the card is full."""
        asked, size = size, -(-size // ROUNDING) * ROUNDING
        small = size <= SMALL
        free = [
            (block.size, index, segment, block)
            for index, segment in enumerate(self.segments)
            if segment.small == small
            for block in segment.blocks
            if not block.used and block.size >= size
        ]
        _, _, segment, block = min(free, key=lambda one: one[:2]) if free else (0, 0, *self._grow(size, small))
        rest = block.size - size
        if rest >= ROUNDING if small else rest > SMALL:
            block.size = size
            segment.blocks.insert(segment.blocks.index(block) + 1, Block(rest))
        block.used = True
        self.places[key] = segment, block, asked
        self.allocated += block.size
        self.requested += asked
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _grow(self, size: int, small: bool) -> tuple[Segment, Block]:
        """A segment for a request; where the card is full, once more after giving back what is unused."""
        if small:
            room = SMALL_SEGMENT
        else:
            room = LARGE_SEGMENT if size < MEDIUM else -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
        if self.reserved + room > self.total:
            self.empty_cache()
        if self.reserved + room > self.total:
            raise NoRoom(f"{room} bytes asked for, {self.total - self.reserved} of {self.total} free")
        block = Block(room)
        segment = Segment(small, [block])
        self.segments.append(segment)
        self.reserved += room
        return segment, block

    def free(self, key: int) -> None:
        """Take back what `key` was given; nothing where it was given nothing."""
        if key not in self.places:
            return
        segment, block, asked = self.places.pop(key)
        block.used = False
        self.allocated -= block.size
        self.requested -= asked
        joined: list[Block] = []
        for one in segment.blocks:
            if joined and not joined[-1].used and not one.used:
                joined[-1].size += one.size
            else:
                joined.append(one)
        segment.blocks = joined

    def empty_cache(self) -> None:
        """Give back every segment of which nothing is used."""
        kept = [segment for segment in self.segments if any(block.used for block in segment.blocks)]
        self.reserved = sum(block.size for segment in kept for block in segment.blocks)
        self.segments = kept

    def reset_peaks(self) -> None:
        """Begin again from what is held now."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved
        self.peak_requested = self.requested
