"""What no hardware and no right protocol reaches: the bounds that refute a figure, with their reasons."""

from __future__ import annotations

from decimal import Decimal

# Generous on purpose: A100 2.0, H100 3.35, H200 4.8, B200 8, and the HBM4 cards announced for 2026 up to 22 TB/s.
BYTES_PER_SECOND = Decimal(25 * 10**12)
BANDWIDTH_SOURCE = "an H200 has 4.8, a B200 8, cards announced with HBM4 22"

# Public figures of one model on English differ by protocol and text by a factor under 5 (GPT-2: 25 to 80).
IMPLAUSIBLE = 100
