"""How long things take, how much memory, and how near that is to what the device could do: for bench.py."""
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from program.console import status


class Row(NamedTuple):
    """A line of the table. ours() and theirs() -> a list of seconds; flops() does once what `ours` times."""
    key: str
    what: str
    ours: Callable
    theirs: Callable | None = None
    flops: Callable | None = None


def matmul_rate(device, dtype):
    """FLOP/s of the product of two large matrices of this dtype."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side ** 3 / min(timed(lambda: a @ a, device) for _ in range(10))


def timed(work, device):
    """Seconds that work() takes, on a GPU to its end."""
    wait = torch.cuda.synchronize if device.type == "cuda" else bool
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def ticks(work, steps):
    """Seconds of each of the last steps of work(steps, callback=…), after as many as a GPU's graph takes."""
    times = []
    work(steps=steps, callback=lambda step, loss: times.append(time.perf_counter()))
    seconds = [after - before for before, after in zip(times, times[1:])]
    return seconds[5:] or seconds


def measured(row, repeats, rate, device):
    """What a row says, as a dict."""
    memory = peak(row.ours, device)  # of the first time: a CPU's memory stays with the process
    if row.theirs:
        row.theirs()
    ours, theirs = [], []
    for _ in range(repeats):
        ours += row.ours()
        theirs += row.theirs() if row.theirs else []
    found = {"key": row.key, "what": row.what, "seconds": ours, "against": theirs,
             "peak GB": memory and memory / 1e9}
    if row.flops:
        # what the counter doesn't know
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        known = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
                     lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            row.flops()
        found |= {"FLOP": counter.get_total_flops()}
        found["possible"] = found["FLOP"] / rate / statistics.median(ours)
    return found


def peak(work, device):
    """Bytes that work() takes at most, beside what is held before; None where nobody knows."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what rows before have left would be used without being counted
        before, _ = status("VmRSS"), status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return None
    work()
    return status("VmHWM") - before


def table(lines):
    """Markdown of these rows."""
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


def plot(lines, title, file):
    """Write a PNG of the costs by steps and by batch, rows s and t, if there are any and matplotlib is."""
    if not {"s", "t"} <= {line["key"] for line in lines}:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no plot: {error}")
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for panel, key, what in zip(figure.subplots(1, 2), "st", ("steps", "noises a step")):
        points = [(int(line["what"].split()[-1]), statistics.median(line["seconds"]))
                  for line in lines if line["key"] == key]
        panel.plot(*zip(*points), "o-", label="measured")
        # a line through the origin and the last point: what is linear
        panel.plot([0, points[-1][0]], [0, points[-1][1]], "--", color="grey", label="proportional")
        panel.set(xlabel=what, ylabel="seconds", title=title if key == "s" else "a step", xlim=0, ylim=0)
        panel.legend()
    figure.savefig(file, dpi=100)
    print(file)
