"""Tune the tile sizes of the Triton kernels: the fastest of a grid at the sentiment recipe's sizes, for ranks up to 16.

    python -m bench.tune_kernels [--write]

Prints each kernel's present tiles and the best three, in milliseconds over the calls of one layer's q, k and v. --write
puts the best into fastdora/tiles.json. All candidates are compiled first, on all cores.
"""

import argparse
import itertools
import json
import multiprocessing
import os

import torch
from triton.testing import do_bench

from fastdora import triton_kernels
from fastdora.triton_kernels import TILES, TILES_FILE, Tiles
from finlora.core.files import write_json

T, K, R = 5120, 4096, 8  # tokens of a pack, Llama-3.1-8B's hidden size, the recipe's rank
RANK = 16  # R padded: the table's entry that is tuned
SEED = (2**30 + 1, 4242)
WIDTHS = (4096, 1024, 1024)  # of q, k and v
GRID = {
    "low_rank": dict(BLOCK_T=(16, 32, 64), BLOCK_K=(64, 128, 256), num_warps=(2, 4, 8), num_stages=(2, 4)),
    "low_rank_backward": dict(
        SPLITS=(8, 16, 32), BLOCK_T=(32, 64), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(2, 4)
    ),
    "epilogue": dict(BLOCK_T=(32, 64, 128), BLOCK_N=(64, 128, 256), num_warps=(4, 8), num_stages=(3,)),
    "epilogue_backward": dict(
        SPLITS=(8, 16, 32), BLOCK_T=(32, 64), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 4)
    ),
}


def candidates(name: str) -> list[Tiles]:
    """The present tiles of a kernel, then all others of its grid."""
    grid, present = GRID[name], TILES[name][RANK]
    every = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return [present, *(tiles for tiles in every if tiles != present)]


def calls(name: str) -> list[tuple]:
    """The arguments of a kernel's calls for one layer, forward or backward."""
    torch.manual_seed(0)
    make = dict(device="cuda", dtype=torch.bfloat16)
    x, dx, a, t = (torch.randn(*shape, **make) for shape in ((T, K), (T, K), (R, K), (T, R)))
    arguments = []
    for width in WIDTHS:
        base, dy, b = (torch.randn(*shape, **make) for shape in ((T, width), (T, width), (width, R)))
        mag_scale, norm = torch.rand(2, width, device="cuda").add_(0.5)
        arguments += {
            "low_rank": [(x, a, 1.0, 0.05, SEED), (dy, b.t(), 0.5, 0.0, SEED)],  # t, and dt in the backward pass
            "low_rank_backward": [(t, x, a, dx, 0.05, SEED)],
            "epilogue": [(base, t, b, 0.5, mag_scale, None)],
            "epilogue_backward": [(dy, base, t, b, 0.5, mag_scale, norm)],
        }[name]
    return arguments


def compile_one(job: tuple[str, Tiles]) -> None:
    name, tiles = job
    try:
        for arguments in calls(name):
            getattr(triton_kernels, name)(*arguments, tiles=tiles)
        torch.cuda.synchronize()
    except Exception:  # too large for the card: time_all reports it
        pass


def time_all(name: str) -> list[tuple[float, Tiles]]:
    """(milliseconds, tiles) of each candidate that the card can run, the present tiles first."""
    kernel, arguments, timed = getattr(triton_kernels, name), calls(name), []
    for tiles in candidates(name):
        try:
            ms = sum(do_bench(lambda: kernel(*each, tiles=tiles), 3, 15, return_mode="median") for each in arguments)  # noqa: B023
        except Exception as error:
            print(name, tiles, type(error).__name__)
        else:
            timed.append((ms, tiles))
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the best into fastdora/tiles.json")
    options = parser.parse_args()
    jobs = [(name, tiles) for name in GRID for tiles in candidates(name)]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        for _ in pool.imap_unordered(compile_one, jobs, chunksize=4):
            pass
    table = json.loads(TILES_FILE.read_text(encoding="utf-8"))
    for name in GRID:
        timed = time_all(name)
        print(name, "now", round(timed[0][0], 4), json.dumps(timed[0][1]), flush=True)
        best = sorted(timed, key=lambda pair: pair[0])[:3]
        for ms, tiles in best:
            print(name, round(ms, 4), json.dumps(tiles), flush=True)
        table[name][str(RANK)] = best[0][1]
    if options.write:
        write_json(TILES_FILE, table)


if __name__ == "__main__":
    main()
