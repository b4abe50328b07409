"""The GPUs of this machine."""

import os

GIB = 2**30


def gpus() -> list[tuple[str, float, float]]:
    """(name, total GiB, free GiB) of each visible GPU; an empty list without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        if all(part.isdigit() for part in wanted):
            handles = [handles[int(part)] for part in wanted if int(part) < len(handles)]
    found = []
    for handle in handles:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        found.append((name if isinstance(name, str) else name.decode(), memory.total / GIB, memory.free / GIB))
    return found
