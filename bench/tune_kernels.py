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

from fastdora import kernels
from finlora.core.files import replacing

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


def candidates(name: str) -> list[dict[str, int]]:
    """The present tiles of a kernel, then all others of its grid."""
    grid, present = GRID[name], kernels.TILES[name][RANK]
    every = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return [present, *(tiles for tiles in every if tiles != present)]


def calls(name: str) -> list:
    """The launches of a kernel for one layer, as functions without arguments."""
    torch.manual_seed(0)
    make = dict(device="cuda", dtype=torch.bfloat16)
    x, dx, a, t = (torch.randn(*shape, **make) for shape in ((T, K), (T, K), (R, K), (T, R)))
    launches = []
    for width in WIDTHS:
        base, dy, b = (torch.randn(*shape, **make) for shape in ((T, width), (T, width), (width, R)))
        mag_scale, norm = torch.rand(2, width, device="cuda").add_(0.5)
        if name == "low_rank":
            launches.append(lambda: kernels.low_rank(x, a, 1.0, 0.05, SEED))
            launches.append(lambda dy=dy, b=b: kernels.low_rank(dy, b.t(), 0.5, 0.0, SEED))
        elif name == "low_rank_backward":
            launches.append(lambda: kernels.low_rank_backward(t, x, a, dx, 0.05, SEED))
        elif name == "epilogue":
            launches.append(
                lambda base=base, b=b, mag_scale=mag_scale: kernels.epilogue(base, t, b, 0.5, mag_scale, None)
            )
        else:
            launches.append(
                lambda dy=dy, base=base, b=b, g=mag_scale, n=norm: kernels.epilogue_backward(dy, base, t, b, 0.5, g, n)
            )
    return launches


def compile_one(job: tuple[str, dict[str, int]]) -> None:
    name, tiles = job
    kernels.TILES[name][RANK] = tiles
    try:
        for call in calls(name):
            call()
        torch.cuda.synchronize()
    except Exception:  # too large for the card: time_all reports it
        pass


def time_all(name: str) -> list[tuple[float, dict[str, int]]]:
    """(milliseconds, tiles) of each candidate that the card can run, the present tiles first."""
    launches, timed = calls(name), []
    for tiles in candidates(name):
        kernels.TILES[name][RANK] = tiles
        try:
            ms = sum(do_bench(launch, warmup=3, rep=15, return_mode="median") for launch in launches)
        except Exception as error:
            print(name, tiles, type(error).__name__)
        else:
            timed.append((ms, tiles))
    return timed


def table(tiles: dict[str, dict[int, dict[str, int]]]) -> str:
    """The text of fastdora/tiles.json: a line for each kernel and rank."""
    entries = {
        kernel: ",\n".join(f'  "{rank}": {json.dumps(sizes)}' for rank, sizes in by_rank.items())
        for kernel, by_rank in tiles.items()
    }
    return "{\n" + ",\n".join(f' "{kernel}": {{\n{lines}\n }}' for kernel, lines in entries.items()) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the best into fastdora/tiles.json")
    options = parser.parse_args()
    jobs = [(name, tiles) for name in GRID for tiles in candidates(name)]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        for _ in pool.imap_unordered(compile_one, jobs, chunksize=4):
            pass
    for name in GRID:
        timed = time_all(name)
        print(name, "now", round(timed[0][0], 4), json.dumps(timed[0][1]), flush=True)
        best = sorted(timed, key=lambda pair: pair[0])[:3]
        for ms, tiles in best:
            print(name, round(ms, 4), json.dumps(tiles), flush=True)
        kernels.TILES[name][RANK] = best[0][1]
    if options.write:
        with replacing(kernels.TILES_FILE) as file:
            file.write(table(kernels.TILES))


if __name__ == "__main__":
    main()
