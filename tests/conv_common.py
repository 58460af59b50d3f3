"""Convolutions that the tests of masked and of packed weights share."""

from __future__ import annotations

from typing import Any

# image, weight, block, geometry
CASES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], dict[str, Any]]] = [
    ((2, 8, 9, 7), (16, 8, 3, 3), (8, 4), {"padding": 1}),
    ((3, 5, 8, 8), (7, 5, 3, 3), (4, 4), {"padding": 1, "stride": 2}),
    ((1, 6, 11, 10), (9, 6, 3, 2), (2, 4), {"padding": (2, 0), "stride": (1, 3), "dilation": (2, 1)}),
    ((2, 33, 5, 6), (17, 33, 1, 1), (16, 32), {}),
    ((2, 4, 7, 7), (6, 4, 1, 1), (4, 4), {"stride": 2, "padding": 1}),
    ((2, 3, 12, 13), (5, 3, 7, 5), (4, 2), {"stride": 2, "padding": 3}),
    ((2, 3, 6, 5), (5, 3, 2, 2), (8, 8), {"stride": 4}),
    ((1, 3, 4, 4), (4, 3, 3, 3), (2, 2), {"padding": 4, "dilation": 3}),
    ((0, 3, 4, 4), (4, 3, 3, 3), (2, 2), {"padding": 1}),
    ((1, 512, 3, 3), (32, 512, 3, 3), (32, 32), {"padding": 1}),
]
