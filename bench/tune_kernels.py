"""How the tiles of fastdora/kernels.py were chosen: the fastest of a grid at the sentiment recipe's sizes, ranks to 16.

    python -m bench.tune_kernels [--write]

Prints the best three of each kernel and what it has now, in milliseconds over the calls of one layer (q, k and v).
--write puts the best into fastdora/kernels.py. All are compiled first, on all cores.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
from pathlib import Path

import torch

from fastdora import kernels

T, K, R = 5120, 4096, 8
SEED = (2**30 + 1, 4242)
WIDTHS = (4096, 1024, 1024)  # of q, k and v
GRID = {
    "low_rank": dict(BLOCK_T=(16, 32, 64), BLOCK_K=(64, 128, 256), num_warps=(2, 4, 8), num_stages=(2, 4)),
    "low_rank_backward": dict(
        SPLITS=(8, 16, 32), BLOCK_T=(32, 64), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(2, 4)
    ),
    "combine": dict(BLOCK_T=(32, 64, 128), BLOCK_N=(64, 128, 256), num_warps=(4, 8), num_stages=(3,)),
    "combine_backward": dict(
        SPLITS=(8, 16, 32), BLOCK_T=(32, 64), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 4)
    ),
}


def candidates(name: str) -> list[dict[str, int]]:
    grid = GRID[name]
    found = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [kernels.TILES[name][16], *(tiles for tiles in found if tiles != kernels.TILES[name][16])]


def calls(name: str) -> list:
    """What one layer asks of a kernel: functions without arguments."""
    torch.manual_seed(0)
    make = dict(device="cuda", dtype=torch.bfloat16)
    x, dx, a, t = (torch.randn(*shape, **make) for shape in ((T, K), (T, K), (R, K), (T, R)))
    found = []
    for width in WIDTHS:
        base, dy, b = (torch.randn(*shape, **make) for shape in ((T, width), (T, width), (width, R)))
        gain, norm = torch.rand(2, width, device="cuda").add_(0.5)
        if name == "low_rank":
            found.append(lambda: kernels.low_rank(x, a, 1.0, 0.05, SEED))
            found.append(lambda dy=dy, b=b: kernels.low_rank(dy, b.t(), 0.5, 0.0, SEED))
        elif name == "low_rank_backward":
            found.append(lambda: kernels.low_rank_backward(t, x, a, dx, 0.05, SEED))
        elif name == "combine":
            found.append(lambda base=base, b=b, gain=gain: kernels.combine(base, t, b, 0.5, gain, None))
        else:
            found.append(
                lambda dy=dy, base=base, b=b, g=gain, n=norm: kernels.combine_backward(dy, base, t, b, 0.5, g, n)
            )
    return found


def compile_one(job: tuple[str, dict[str, int]]) -> None:
    name, tiles = job
    kernels.TILES[name][16] = tiles
    try:
        for call in calls(name):
            call()
        torch.cuda.synchronize()
    except Exception:  # too large for the card; the timing names it again
        pass


def time_all(name: str) -> list[tuple[float, dict[str, int]]]:
    from triton.testing import do_bench

    jobs, found = calls(name), []
    for tiles in candidates(name):
        kernels.TILES[name][16] = tiles
        try:
            found.append((sum(do_bench(job, warmup=3, rep=15, return_mode="median") for job in jobs), tiles))
        except Exception as error:
            print(name, tiles, type(error).__name__)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the best into fastdora/kernels.py")
    given = parser.parse_args()
    jobs = [(name, tiles) for name in GRID for tiles in candidates(name)]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        for _ in pool.imap_unordered(compile_one, jobs, chunksize=4):
            pass
    source = Path(kernels.__file__)
    text = source.read_text(encoding="utf-8")
    for name in GRID:
        found = time_all(name)
        print(name, "now", round(found[0][0], 4), json.dumps(found[0][1]), flush=True)
        for ms, tiles in sorted(found, key=lambda pair: pair[0])[:3]:
            print(name, round(ms, 4), json.dumps(tiles), flush=True)
        best = min(found, key=lambda pair: pair[0])[1]
        line = "dict(" + ", ".join(f"{key}={value}" for key, value in best.items()) + ")"
        text = re.sub(rf'("{name}": {{\s+16: )dict\([^)]*\)', lambda match, line=line: match[1] + line, text)
    if given.write:
        source.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
