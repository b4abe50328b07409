"""The GPUs of this machine."""

import os

import pynvml

GIB = 2**30


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
