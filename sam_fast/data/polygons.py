"""Polygons to masks by COCO's rule, bit for bit what pycocotools makes of them (`rleFrPoly` in `common/maskApi.c`).

The rule: vertices are rounded to a grid of a fifth of a pixel; each edge is walked on that grid, one step along its
longer side at a time and rounded along the other; where the walk passes the centre line of a column of pixels, the
mask changes between inside and outside at that height, for all that follows in column-major order.

Here the walk is not made: an edge passes the centre line of a column at one step, which is computed. Work and memory
grow with the columns that an edge spans inside of the image, not with its length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sam_fast.ops.packed_masks import row_bytes, unpack_masks
from sam_fast.ops.rle import decode_rle

_GRID = 5  # grid steps per pixel; the centre line of column c lies between the steps 5c + 2 and 5c + 3
_FARTHEST = 1e6  # pixels; up to here the doubles below place every step exactly


def rasterise_polygons(polygons: Sequence[Sequence[float] | np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The union of polygons as a mask.

    Args:
        polygons: each is x0, y0, x1, y1, ... in pixels, the origin at the upper left corner of the image; vertices may
            lie outside of it. The inside is by the even-odd rule. Fewer than three vertices enclose nothing.
        size: (H, W) of the mask.

    Returns:
        bool [H, W].

    Raises:
        ValueError: an odd number of coordinates, or one that is not finite or more than a million pixels away.
    """
    return unpack_masks(pack_polygons(polygons, size), size[1]).numpy()


def pack_polygons(polygons: Sequence[Sequence[float] | np.ndarray], size: tuple[int, int]) -> torch.Tensor:
    """Like `rasterise_polygons`, as packed bits: uint8 [H, row_bytes(W)]."""
    bits = torch.zeros((size[0], row_bytes(size[1])), dtype=torch.uint8)
    for polygon in polygons:
        bits |= decode_rle([{"size": size, "counts": polygon_runs(polygon, size).tolist()}])[0]
    return bits


def polygon_runs(polygon: Sequence[float] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The run lengths of one polygon's mask, column-major, zeros first; runs may be 0 long.

    Args and raises as of `rasterise_polygons`.

    Returns:
        int64 [R], adding up to H * W.
    """
    height, width = size
    changes = np.sort(_changes(_grid_vertices(polygon), height, width))
    return np.diff(changes, prepend=0, append=height * width)


def _grid_vertices(polygon: Sequence[float] | np.ndarray) -> np.ndarray:
    """Vertices on the grid, int64 [K, 2] as (x, y)."""
    try:
        coordinates = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a polygon is a list of numbers x0, y0, x1, y1, ...: {error}") from error
    if coordinates.ndim != 1 or len(coordinates) % 2:
        raise ValueError(f"a polygon is a list of numbers x0, y0, x1, y1, ..., got the shape {coordinates.shape}")
    if not (np.abs(coordinates) <= _FARTHEST).all():
        raise ValueError(f"coordinates of a polygon must be finite and at most {_FARTHEST:.0f} pixels away")
    return _towards_zero(_GRID * coordinates.reshape(-1, 2) + 0.5)


def _changes(vertices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where the mask changes, as positions in column-major order, int64 [R], not sorted."""
    start, end = vertices, np.roll(vertices, -1, axis=0)
    along_x = np.abs(end[:, 0] - start[:, 0]) >= np.abs(end[:, 1] - start[:, 1])
    axis = np.where(along_x, 0, 1)  # the longer side of each edge, walked upwards
    rows = np.arange(len(vertices))
    backwards = start[rows, axis] > end[rows, axis]
    start, end = np.where(backwards[:, None], end, start), np.where(backwards[:, None], start, end)

    first = np.maximum((np.minimum(start[:, 0], end[:, 0]) + 2) // _GRID, 0)
    last = np.minimum((np.maximum(start[:, 0], end[:, 0]) - 3) // _GRID, width - 1)
    columns = np.maximum(last - first + 1, 0)  # whose centre line the edge passes
    edge = np.repeat(rows, columns)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(columns) - columns, columns) + first[edge]

    y = np.empty(len(edge), np.int64)
    for flat, upper_step in ((True, _upper_step_of_flat_edges), (False, _upper_step_of_steep_edges)):
        chosen = along_x[edge] == flat
        y[chosen] = upper_step(start[edge[chosen]], end[edge[chosen]], _GRID * column[chosen] + 2)
    # The first row whose centre does not lie above the boundary.
    row = np.ceil(np.clip((y + 0.5) / _GRID - 0.5, 0, height)).astype(np.int64)
    return column * height + row


def _upper_step_of_flat_edges(start: np.ndarray, end: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The smaller y of the two steps at `x` and `x` + 1, for edges that are wider than high, walked to the right."""
    slope = (end[:, 1] - start[:, 1]) / (end[:, 0] - start[:, 0])
    at, after = (_towards_zero(start[:, 1] + slope * (x + step - start[:, 0]) + 0.5) for step in (0, 1))
    return np.minimum(at, after)


def _upper_step_of_steep_edges(start: np.ndarray, end: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The y of the last step before the one from `x` to `x` + 1 (or back), for edges higher than wide, walked down."""
    slope = (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])

    def before(step: np.ndarray) -> np.ndarray:
        return (_towards_zero(start[:, 0] + slope * step + 0.5) > x) == (slope < 0)

    # The estimate is at most one step off; the expression that the rule rounds decides.
    step = np.floor((x + 0.5 - start[:, 0]) / slope).astype(np.int64) - 2
    for _ in range(3):
        step += before(step + 1)
    return start[:, 1] + step


def _towards_zero(values: np.ndarray) -> np.ndarray:
    return np.trunc(values).astype(np.int64)
