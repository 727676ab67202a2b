"""Time, memory, and the share of the device's possible speed, for bench.py."""
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Row(NamedTuple):
    """A line of the table. It times ours() and theirs(), or each step of ours(steps, callback=…)."""
    key: str
    what: str
    ours: Callable
    theirs: Callable | None = None
    flops: bool = False
    steps: int = 0


def matmul_rate(device, dtype):
    """FLOP/s of the product of two large matrices of this dtype."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side ** 3 / min(timed(lambda: a @ a, device) for _ in range(10))


def timed(work, device):
    """The seconds that work() takes, including all work on the GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else bool
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def ticks(work, steps):
    """The seconds of each step of work(steps, callback=…), without five that record a GPU's graph."""
    times = []
    work(steps=steps, callback=lambda step, loss: times.append(time.perf_counter()))
    seconds = [after - before for before, after in zip(times, times[1:])]
    return seconds[5:] or seconds


def measured(row, repeats, rate, device):
    """A row's measurements, as a dict."""
    def seconds(work):
        if work is None:
            return []
        return ticks(work, row.steps) if row.steps else [timed(work, device)]
    memory = peak(lambda: seconds(row.ours), device)
    seconds(row.theirs)
    ours, theirs = [], []
    for _ in range(repeats):
        ours += seconds(row.ours)
        theirs += seconds(row.theirs)
    found = {"key": row.key, "what": row.what, "seconds": ours, "against": theirs,
             "peak GB": memory and memory / 1e9}
    if row.flops:
        # operations that the counter does not know
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        known = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
                     lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            row.ours(1) if row.steps else row.ours()
        found |= {"FLOP": counter.get_total_flops()}
        found["possible"] = found["FLOP"] / rate / statistics.median(ours)
    return found


def peak(work, device):
    """The most GPU memory in bytes that work() adds to what is in use; None on other devices."""
    if device.type != "cuda":
        work()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def table(lines):
    """These rows as Markdown."""
    def span(seconds):
        if not seconds:
            return "–"
        return f"{statistics.median(seconds):.4g} ({min(seconds):.3g}–{max(seconds):.3g})"
    text = ["| | | seconds | against | ratio | possible | peak, GB |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        ours, theirs = line["seconds"], line["against"]
        ratio = f"{statistics.median(theirs) / statistics.median(ours):.2f}" if theirs else "–"
        share = f"{line['possible']:.0%}" if "possible" in line else "–"
        memory = "–" if line["peak GB"] is None else f"{line['peak GB']:.2f}"
        text.append(f"| {line['key']} | {line['what']} | {span(ours)} | {span(theirs)} | {ratio} | {share} | "
                    f"{memory} |")
    return "\n".join(text)
