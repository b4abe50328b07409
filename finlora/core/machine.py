"""The GPUs of this machine, and whether their driver runs the installed torch."""

import importlib.util
import os
import re
from pathlib import Path

import pynvml

GIB = 2**30
# The oldest driver that runs programs of a CUDA version (table 2 of the CUDA 13.0 toolkit's release notes).
DRIVERS = {12: 525, 13: 580}

POINTS_PER_GPU = "FINLORA_POINTS_PER_GPU"  # set by `finlora sweep` for its points: how many share this one's GPU


def gpus() -> list[tuple[str, float, float]]:
    """(name, total GiB, free GiB) of each visible GPU; an empty list without one."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        numbers = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        if all(number.isdigit() for number in numbers):
            handles = [handles[int(number)] for number in numbers if int(number) < len(handles)]
    memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    return [(name, one.total / GIB, one.free / GIB) for name, one in zip(names, memory, strict=True)]


def driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read without its import, which takes seconds; None for the CPU."""
    folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    found = re.search(r"^cuda\b.*= '([\d.]+)'", (folder / "version.py").read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1]


def driver_fault() -> str | None:
    """Why torch cannot use this machine's GPUs, and what to do; None where it can, or there is no driver."""
    installed, cuda = driver(), torch_cuda()
    if not installed:
        return None
    anew = "run `make setup TORCH=2.11.0`, which takes a build that the driver runs"
    if not cuda:
        return f"NVIDIA's driver {installed} is here, and torch is a build without CUDA; {anew}"
    needed = DRIVERS[int(cuda.split(".")[0])]
    if int(installed.split(".")[0]) >= needed:
        return None
    if int(installed.split(".")[0]) < min(DRIVERS.values()):
        anew = "no torch that axolotl takes runs on it"
    return f"NVIDIA's driver {installed} is too old: CUDA {cuda} of torch needs {needed}; update the driver, or {anew}"
