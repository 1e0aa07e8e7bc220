"""Timing on a GPU: calls in CUDA graphs, the device's own peaks, rows of what was measured against them."""

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[[], Any]
# What users would run over a full cache; `sdpa` leaves the choice to torch.
SDPA_BACKENDS = {"sdpa": None, "sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION"}
# Inputs that are rotated hold this many times what fits into the L2 cache.
L2_SHARE = 4
MOST_SETS = 256
# Calls between two events, so that neither their resolution nor the launch of a graph shows.
LEAST_CALLS = 24
PEAK_COPY_BYTES = 2 << 30
PEAK_MATMUL_SIZE = 8192


class Timing(NamedTuple):
    """Microseconds per call: the median and the 20th and 80th percentile over the repetitions.

    first_call: seconds that the first call took, with all that had to be compiled.
    """

    median: float
    p20: float
    p80: float
    first_call: float | None = None

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> "Timing":
        """The percentiles of some measurements, interpolated."""
        import numpy

        return cls(*(float(value) for value in numpy.percentile(microseconds, (50, 20, 80))))


class Peaks(NamedTuple):
    """What a device reaches: a copy (bytes read and written) and a large fp16 matrix product."""

    bytes_per_second: float
    flops_per_second: float


class Cost(NamedTuple):
    """Bytes that a call cannot do without, and FLOPs of computing it by its definition."""

    bytes: int
    flops: int


def select_gpu(name: str) -> str:
    """The CUDA device of that name, or the first for `auto`, made the current one.

    Raises:
        PaluError: if it is none.
    """
    import torch

    from palu.core.errors import PaluError
    from utils.cli import resolve_device

    device = resolve_device(name)
    if not device.startswith("cuda"):
        raise PaluError(f"latency is measured on a CUDA GPU, and --device {name} gives none")
    torch.cuda.set_device(device)
    return device


def l2_bytes(device: str) -> int:
    """Size of a GPU's L2 cache."""
    import torch

    return torch.cuda.get_device_properties(device).L2_cache_size


def sets_needed(set_bytes: int, l2: int) -> int:
    """Input sets to rotate over, so that none is still in the L2 cache when it is read again."""
    return max(2, min(MOST_SETS, math.ceil(L2_SHARE * l2 / set_bytes)))


def rotating_calls(make: Callable[[], Call], set_bytes: int, device: str) -> list[Call]:
    """Calls that rotate over as many input sets as are needed, each set made by one `make()`."""
    sets = [make() for _ in range(sets_needed(set_bytes, l2_bytes(device)))]
    return sets * math.ceil(LEAST_CALLS / len(sets))


def time_calls(
    calls: Sequence[Call], repeats: int, graph: bool = True, before: Call | None = None, rest: float = 0.0
) -> Timing:
    """Time per call.

    Args:
        graph: replay the calls as one CUDA graph; otherwise launch them one by one, as a user's Python would.
        before: run ahead of the calls each time, and not timed (resets counters).
        rest: ahead of each measurement, how many times as long as it works the device rests; 0: back to back, in which
            a power limit may come to lower the clock.
    """
    import torch

    before = before or (lambda: None)
    before()
    first_call = _seconds(calls[0])
    run = captured(calls, before) if graph else (lambda: [call() for call in calls])
    # Everything is queued behind a first run, so that the GPU never waits for the host between two events.

    def once() -> None:
        before()
        run()

    once()
    # Not of the first run, which uploads a graph; every measurement is of the second run after a rest.
    resting = 2 * rest * _seconds(once) if rest > 0 else 0.0
    pairs = []
    for _ in range(repeats):
        if rest > 0:
            torch.cuda.synchronize()
            time.sleep(resting)
            # The clock is up again by what is timed.
            once()
        before()
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        run()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    timing = Timing.of([start.elapsed_time(stop) * 1000 / len(calls) for start, stop in pairs])
    return timing._replace(first_call=first_call)


def _seconds(call: Call) -> float:
    """That the host waits for a call and all that it does on the GPU."""
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def captured(calls: Sequence[Call], before: Call) -> Call:
    """The replay of a CUDA graph that holds the calls; they run once before, which compiles and warms up."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            before()
            call()
    torch.cuda.synchronize()
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def measure_peaks(device: str, rest: float) -> Peaks:
    """Peaks of this very device, from random data; rest: as of `time_calls`."""
    import torch

    size = PEAK_MATMUL_SIZE
    source = torch.randn(PEAK_COPY_BYTES // 2, device=device, dtype=torch.float16)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], 20, graph=False, rest=rest)
    left, right = source[: 2 * size * size].view(2, size, size)
    product = target[: size * size].view(size, size)
    matmul = time_calls([lambda: torch.mm(left, right, out=product)], 20, graph=False, rest=rest)
    return Peaks(2 * source.nbytes / copy.median * 1e6, 2 * size**3 / matmul.median * 1e6)


def floors(cost: Cost, peaks: Peaks) -> tuple[float, float]:
    """Microseconds that the memory and the matrix units need at least."""
    return cost.bytes / peaks.bytes_per_second * 1e6, cost.flops / peaks.flops_per_second * 1e6


def full_attention(name: str, query: "Tensor", keys: "Tensor", values: "Tensor", scaling: float) -> "Tensor":
    """A decoding step's attention over full keys and values, as users run it: [batch, heads, 1, head_dim].

    Args:
        name: `eager` or one of `SDPA_BACKENDS`.
        query: [batch, heads, 1, head_dim]; keys, values: [batch, kv heads, length, head_dim].
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, _, width = query.shape
    if name == "eager":
        grouped = query.reshape(batch, keys.shape[1], -1, width) * scaling
        return (torch.softmax(grouped @ keys.mT, dim=-1) @ values).view(batch, heads, 1, -1)
    backend = SDPA_BACKENDS[name]
    with nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend)):
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=scaling, enable_gqa=heads != keys.shape[1]
        )


def attempt(measure: Callable[[], Any], optional: bool = False) -> tuple[Any, str | None]:
    """What `measure` returns, or None and a note where memory does not suffice.

    Args:
        optional: also note, and do not raise, what else keeps it from running (a backend that the device lacks).
    """
    import torch

    note = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure(), None
    except torch.OutOfMemoryError:
        note = "out of memory"
    except RuntimeError as error:
        if not optional:
            raise
        note = f"not available here: {str(error).strip().splitlines()[0].split('. ')[0].rstrip('.')}"
    # Out of the handler, where the failed call's frames are gone.
    free_memory()
    return None, note


def free_memory() -> None:
    """Give back what nobody refers to."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timing_columns(timing: Timing | None, note: str | None) -> dict[str, Any]:
    """The entries of a row that a clock gives; None where nothing could be measured, and why."""
    median, p20, p80, first_call = timing or (None, None, None, None)
    return {"microseconds": median, "p20": p20, "p80": p80, "first_call_seconds": first_call, "note": note}


def cost_columns(timing: Timing | None, cost: Cost, peaks: Peaks) -> dict[str, Any]:
    """Bytes, FLOPs, the two floors, and what was achieved of them."""
    memory, compute = floors(cost, peaks)
    seconds = timing and timing.median / 1e6
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "memory_floor_microseconds": memory,
        "compute_floor_microseconds": compute,
        "floor_microseconds": max(memory, compute),
        "fraction_of_floor": timing and max(memory, compute) / timing.median,
        "terabytes_per_second": seconds and cost.bytes / seconds / 1e12,
        "teraflops_per_second": seconds and cost.flops / seconds / 1e12,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Time of the fastest baseline of the same length and batch over each row's: above 1 is faster than that."""
    for row in rows:
        same = [other for other in rows if all(other[name] == row[name] for name in ("prompt_len", "batch_size"))]
        times = [other["microseconds"] for other in same if other["baseline"] and other["microseconds"]]
        fastest = min(times, default=None)
        row["ratio_to_fastest_baseline"] = fastest and row["microseconds"] and fastest / row["microseconds"]


def profile(calls: Sequence[Call], path: Path) -> list[dict[str, Any]]:
    """Rows of the GPU time of every kernel in a few eager calls; the whole trace goes to `path`, for chrome://tracing."""
    import torch
    from torch.profiler import ProfilerActivity

    calls[0]()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(activities=activities) as record:
        for call in calls:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(path))
    events = [event for event in record.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    rows = [
        {
            "kind": "profile",
            "kernel": event.key,
            "calls_per_step": event.count / len(calls),
            "microseconds_per_step": event.self_device_time_total / len(calls),
        }
        for event in events
    ]
    return sorted(rows, key=lambda row: -row["microseconds_per_step"])
