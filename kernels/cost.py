"""What a mask costs on a GPU by the model of `machine`: the visits of each loop times its cycles, and each tile's own.

The order in which tiles end is left out, so is what the cycles leave out; costs are for comparison with each other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kronmask.kernels.compiled import PRODUCTS, CompiledKernel
from kronmask.kernels.machine import GPUS
from kronmask.kernels.tiles import Blocks, choose_tiling, make_tiling, transposed
from kronmask.mask import KronMask

__all__ = ["MaskCost", "mask_cost"]


@dataclass(frozen=True)
class MaskCost:
    """Cycles of an SM for one head under a mask.

    Attributes:
        ideal: for the products of the mask's own pairs, at the full rate.
        loops: in the loops over blocks, all pipes overlapped in each.
        tiles: besides, once a tile: diagonals, loading queries, storing results.
        estimated: both, with the overlap that the blocks on an SM allow.
    """

    ideal: float
    loops: float
    tiles: float
    estimated: float


def mask_cost(kernel: CompiledKernel, mask: KronMask) -> MaskCost:
    """The cost of one head under a mask (of a clip, not transposed) in a kernel that was compiled for such masks."""
    walked = transposed(mask) if kernel.step == "backward_key" else mask
    blocks = Blocks(kernel.rows, kernel.columns)
    kind, _ = choose_tiling(walked, (blocks,))
    tiling = make_tiling(walked, blocks, kind)
    visited: Counter[str] = Counter()
    for tile in tiling.tiles:
        visited.update(tile.visits_by_loop(blocks.columns))
    visited = +visited  # a kernel may have no loop that is never entered
    once = [work for work in (kernel.diagonal, kernel.tile) if work is not None]
    pairs = mask.num_pairs * 2 * PRODUCTS[kernel.step] * kernel.head_dim / GPUS[kernel.arch].flop
    return MaskCost(
        ideal=pairs,
        loops=sum(visits * kernel.loops[loop].overlapped for loop, visits in visited.items()),
        tiles=len(tiling.tiles) * sum(work.overlapped for work in once),
        estimated=sum(visits * kernel.loops[loop].estimated(kernel.streams(loop)) for loop, visits in visited.items())
        + len(tiling.tiles) * sum(work.estimated(kernel.blocks) for work in once),
    )
