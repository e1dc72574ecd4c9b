"""Which device computes, and in which type: chosen by what is there and what is measured, never assumed."""

from __future__ import annotations

import os
import statistics
import time
from functools import cache

import torch

from lightsft.errors import ConfigurationError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SPEEDUP_NEEDED = 1.3


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is the first of CUDA, XPU, MPS that is there, else the CPU; any other name must exist here.

    Of several processes that torchrun or accelerate started, each gets its own.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind = name.split(":")[0]
    if not available.get(kind, False):
        present = ", ".join(kind for kind, there in available.items() if there)
        raise ConfigurationError(
            f"device {name!r} is not available here",
            expected=f"auto, or one of {present}",
            todo="leave the device at auto, or install a torch build for that device",
        )
    if name in ("cuda", "xpu") and "LOCAL_RANK" in os.environ:  # several processes: a device for each
        return torch.device(name, int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The compute type: a named one, or with `auto` the fastest that is safe on `device`.

    bfloat16 has float32's range, so no loss scaling is needed; float16 has not and is never chosen by `auto`.
    CUDA and XPU are asked whether they support bfloat16, a CPU is measured, MPS stays at float32.
    """
    if isinstance(name, torch.dtype):
        return name
    name = _SHORT.get(name, name)
    if name == "auto":
        return torch.bfloat16 if _bfloat16_is_fast(device.type) else torch.float32
    if name not in DTYPES:
        raise ConfigurationError(
            f"no dtype named {name!r}",
            expected=f"auto, {', '.join(DTYPES)} (or {', '.join(_SHORT)})",
            todo="use auto unless you need one in particular",
        )
    return DTYPES[name]


@cache
def _bfloat16_is_fast(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "xpu":
        return True
    if kind == "cpu":
        return bfloat16_speedup() >= SPEEDUP_NEEDED
    return False


@cache
def bfloat16_speedup() -> float:
    """How many times faster this CPU multiplies (256 x 384) by (384 x 384) in bfloat16 than in float32.

    CPUs with AVX512-BF16 or AMX gain 2 to 8 times, others lose. Median of 7 alternating runs, about 20 ms.
    """
    operands = {
        dtype: (torch.ones(256, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    with torch.no_grad():
        for _ in range(8):
            for dtype, (left, right) in operands.items():
                start = time.perf_counter()
                torch.mm(left, right)
                seconds[dtype].append(time.perf_counter() - start)
    fp32, bf16 = (statistics.median(times[1:]) for times in seconds.values())
    return fp32 / bf16


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")
