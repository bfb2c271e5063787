"""Measure the converter against the disk, the memory, and what else does its work.

    python tests/benchmark.py [--size BYTES] [--shards N] [--runs N] [--folder FOLDER] [--plot FILE]
    python tests/benchmark.py kernel | tuning | scaling | plan | ranks

Contenders, each a process of its own, take turns on one synthetic checkpoint:

- ours: the converter as it is.
- floor: the same reads and the same writes in the same windows by the same workers, no arithmetic.
- compressed-tensors: its convert_checkpoint with FP8BlockDequantizer, on the CPU.
- ancestor: load_file, torch's float8 cast, save_file, on the CPU, one shard at a time.
- ours on GPU: where there is one.

Then, on the output of ours:

- verify: ours with --verify.
- reading: what verify reads, without looking at it.
- again: ours once more, which finds nothing to do.

Before each run the page cache is dropped where that is permitted. Then, as with "kernel" alone, the
dequantization itself, on one core and on all, beside torch's float8 cast and beside a copy in
memory of as many bytes; on a GPU, if there is one, beside a copy there. Prints medians with their
spread and ends with one line of JSON; --plot draws the seconds of the contenders.

- tuning: ours with other windows, other numbers of workers, and always or never past the page
  cache, cold and with the input cached.
- scaling: ours and floor for 1, 2, 4 and 8 GB of experts, for 8 GB in one tensor, and for 50,000
  weights of 4 KB.
- plan: --dry-run and a run that finds nothing to do on the real layout of DeepSeek-V3, in sparse
  files and with what they hold cached.
- ranks: one and two ranks of torchrun on one machine, and a rehearsal of more: how evenly
  DeepSeek-V3's bytes fall on them if all are equally fast, and what their store has to bear.
"""

import argparse
import collections
import functools
import heapq
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def run_ours(source: str, out: str, device: str = "cpu", workers: int | None = None,
             window: int = 16 << 20, cached: bool | None = None) -> None:
    import fp8_cast_bf16

    fp8_cast_bf16.WINDOW = window
    if cached is not None:
        fp8_cast_bf16.is_cached = lambda file: cached
    fp8_cast_bf16.main(source, out, device=device, workers=workers)


def run_floor(source: str, out: str) -> None:
    import torch

    import fp8_cast_bf16

    fp8_cast_bf16.kernel.dequantize = lambda *operands: torch.zeros(2)
    fp8_cast_bf16.main(source, out, device="cpu")


def run_compressed_tensors(source: str, out: str) -> None:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint

    targets = [r"re:.*_proj(_with_mqa)?$"]
    convert_checkpoint(source, out, FP8BlockDequantizer(targets=targets), device="cpu")
    os.sync()


def run_ancestor(source: str, out: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    os.makedirs(out)
    scales = {}
    for path in sorted(Path(source).glob("*.safetensors")):
        tensors = load_file(path)
        scales |= {name: t for name, t in tensors.items() if name.endswith("_scale_inv")}
        converted = {}
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float8_e4m3fn:
                wide = scales[name + "_scale_inv"].repeat_interleave(128, 0)
                wide = wide.repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
                converted[name] = (tensor.float() * wide).bfloat16()
            elif name not in scales:
                converted[name] = tensor
        save_file(converted, Path(out) / path.name, metadata={"format": "pt"})
    os.sync()


def run_import(source: str, out: str) -> None:
    import fp8_cast_bf16  # noqa: F401


def run_verify(source: str, out: str) -> None:
    import fp8_cast_bf16

    fp8_cast_bf16.main(source, out, verify=True)


def run_reading(source: str, out: str) -> None:
    import torch

    import fp8_cast_bf16

    def read(step, tensor, rectangle, worker):
        row, col, M, N = rectangle
        if step.quantization is None:
            worker.read(step.source.path, step.source.start + col, N)
            worker.read(tensor.path, tensor.start + col, N)
        else:
            start = row * step.quantization.grid.cols + col
            worker.read(step.source.path, step.source.start + start, M * N)
            worker.read(tensor.path, tensor.start + 2 * start, 2 * M * N)

    torch.set_num_threads(1)
    fp8_cast_bf16.compare_chunk = read
    fp8_cast_bf16.main(source, out, verify=True)


def run_dry(source: str, out: str) -> None:
    import fp8_cast_bf16

    sparse = collections.namedtuple("usage", "total used free")(0, 0, 1 << 62)
    fp8_cast_bf16.shutil.disk_usage = lambda folder: sparse  # sparse files need no space
    fp8_cast_bf16.gc.set_threshold(200_000)  # as the script does
    fp8_cast_bf16.main(source, out, device="cpu", dry_run=True)


def run_again(source: str, out: str) -> None:
    import fp8_cast_bf16

    fp8_cast_bf16.gc.set_threshold(200_000)
    fp8_cast_bf16.main(source, out, device="cpu")


def run_ranks(source: str, out: str, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    folders = ["--input-fp8-hf-path", source, "--output-bf16-hf-path", out]
    command += [ROOT / "fp8_cast_bf16.py", *folders, "--device", "cpu"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def run_layout(source: str, out: str) -> None:
    """Make DeepSeek-V3's shards and what they are converted to, both of zeros, in sparse files."""
    import fp8_cast_bf16
    from make_checkpoint import deepseek_v3_tensors, make_layout

    make_layout(Path(source), list(deepseek_v3_tensors()), 163)
    plan = fp8_cast_bf16.make_plan(fp8_cast_bf16.load_checkpoint(Path(source)))
    os.makedirs(out)
    for shard in plan.shards:
        with open(Path(out, shard.name), "wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    for name, text in fp8_cast_bf16.bf16_texts(plan).items():
        Path(out, name).write_text(text)


OURS, FLOOR = {"ours": run_ours}, {"floor": run_floor}
OTHERS = {"compressed-tensors": run_compressed_tensors, "ancestor": run_ancestor}
if not importlib.util.find_spec("compressed_tensors"):
    del OTHERS["compressed-tensors"]
GPU_COPIES = 32  # of the weight that the CPU gets, or launching would take longer than the work
GPU_RUNS = {"ours on GPU": functools.partial(run_ours, device="cuda")}
LATER_RUNS = {"verify": run_verify, "reading": run_reading, "again": run_again}
IMPORT = {"import": run_import}
READS = {
    f"{name} reads": functools.partial(run_ours, cached=cached)
    for name, cached in (("direct", False), ("buffered", True))
}
TUNING = {
    f"windows {size} MiB": functools.partial(run_ours, window=size << 20) for size in (4, 8, 32, 64)
}
TUNING |= {f"{n} workers": functools.partial(run_ours, workers=n) for n in (1, 2, 3, 6, 8)}
PLAN_RUNS = {"import": run_import, "dry": run_dry, "again": run_again}
RANK_RUNS = {
    "1 rank": functools.partial(run_ranks, ranks=1),
    "2 ranks": functools.partial(run_ranks, ranks=2),
}
WRITING = {**OURS, **FLOOR, **OTHERS, **GPU_RUNS, **RANK_RUNS, **READS, **TUNING}
ALL_RUNS = {**WRITING, **LATER_RUNS, **PLAN_RUNS, "layout": run_layout}


def drop_caches() -> bool:
    """Write back and forget all cached file pages; return whether that was permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def timed(contender: str, source: Path, out: Path, cold: bool = True) -> dict[str, float]:
    """Run one contender in a process of its own: seconds of wall and processor, peak bytes."""
    if contender in WRITING:
        shutil.rmtree(out, ignore_errors=True)
    if cold:
        drop_caches()
    command = [sys.executable, __file__, "--run", contender, str(source), str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{contender} failed with status {process.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"wall": wall, "user": usage.ru_utime, "system": usage.ru_stime, "peak": peak}


def take_turns(
    contenders: list[str], source: Path, out: Path, times: int, cold: bool = True
) -> dict[str, list[dict[str, float]]]:
    """Time contenders in turn: their runs by name."""
    runs = {contender: [] for contender in contenders}
    for contender in contenders * times:
        runs[contender].append(timed(contender, source, out, cold))
    return runs


def summarize(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the medians of each figure and the least and most wall seconds."""
    walls = [run["wall"] for run in runs]
    medians = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
    return {**medians, "least": min(walls), "most": max(walls)}


def ratio(runs: dict[str, list], one: str, other: str, startup: float = 0.0) -> float:
    """Return the median over pairs of runs of one's seconds over the other's, less a startup."""
    pairs = zip(runs[one], runs[other], strict=True)
    return statistics.median((a["wall"] - startup) / (b["wall"] - startup) for a, b in pairs)


def print_table(figures: dict[str, dict[str, float]], written: int) -> None:
    heads = ["wall s", "least", "most", "user s", "sys s", "peak MB", "GB/s out", "cpu s/GB"]
    print(f"{'':18}" + "".join(f"{head:>9}" for head in heads))
    for contender, row in figures.items():
        figure = [row[key] for key in ("wall", "least", "most", "user", "system")]
        print(f"{contender:18}" + "".join(f"{seconds:9.2f}" for seconds in figure), end="")
        print(f"{row['peak'] / 1e6:9.0f}", end="")
        if contender in WRITING:
            processor = row["user"] + row["system"]
            print(f"{written / row['wall'] / 1e9:9.2f}{processor / written * 1e9:9.2f}", end="")
        print()


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def plot(figures: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Draw the seconds of whole processes, a bar with the spread for each."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    names = [name for name in figures if name in WRITING]
    walls = [figures[name]["wall"] for name in names]
    spread = [[figures[name]["wall"] - figures[name]["least"] for name in names],
              [figures[name]["most"] - figures[name]["wall"] for name in names]]
    labels = {"floor": "the disk alone", "ours": "fp8_cast_bf16.py", "ancestor": "load, cast, save"}
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(names) + 1), layout="constrained")
    bars = axes.barh([labels.get(name, name) for name in names], walls, xerr=spread,
                     color=["#2a78b5" if name.startswith("ours") else "#b8b8b8" for name in names])
    axes.bar_label(bars, fmt=" %.1f s", padding=4)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="seconds, whole process", xlim=(0, max(walls) * 1.2))
    figure.savefig(path, metadata={"Date": None})


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """Time whole conversions, then the dequantization alone."""
    import torch

    source, out = folder / "fp8", folder / "bf16"
    make_source(source, options)
    gpu = GPU_RUNS if torch.cuda.is_available() else {}
    runs = take_turns([*OURS, *FLOOR, *gpu, *OTHERS, *IMPORT], source, out, options.runs)
    timed("ours", source, out)
    runs |= take_turns([*LATER_RUNS], source, out, options.runs)
    read, written = bytes_of(source), bytes_of(out)
    figures = {contender: summarize(results) for contender, results in runs.items()}
    startup = figures["import"]["wall"]
    cold = "cold" if drop_caches() else "as it comes (dropping it is not permitted)"
    title = f"{read / 1e9:.2f} GB in, {written / 1e9:.2f} GB out, {os.cpu_count()} cores"
    print(f"{platform.machine()}, {title}, {options.shards} shards; ", end="")
    print(f"{options.runs} runs, cache {cold}")
    print_table(figures, written)
    ratios = {f"{name}_over_floor": ratio(runs, name, "floor", startup) for name in ("ours", *gpu)}
    ratios |= {f"{name}_over_ours": ratio(runs, name, "ours") for name in OTHERS}
    ratios |= {f"{name}_over_ours_net": ratio(runs, name, "ours", startup) for name in OTHERS}
    ratios["verify_over_reading"] = ratio(runs, "verify", "reading", startup)
    for name, value in ratios.items():
        net = "whole process" if name.endswith("_ours") else "net of import"
        print(f"{name.replace('_', ' ')}: {value:.2f} x, {net} (median of pairs)")
    if options.plot:
        plot(figures, title, options.plot)
    totals = {"bytes_in": read, "bytes_out": written}
    return {**totals, **ratios, **figures, "kernel": measure_kernel(folder, options)}


def median_seconds(actions: dict[str, Callable], times: int) -> dict[str, float]:
    """Do some things in turn, after once without a look at the clock: their median seconds."""
    seconds = {name: [] for name in actions}
    for name, action in list(actions.items()) * (times + 1):
        began = time.perf_counter()
        action()
        seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(all_of[1:]) for name, all_of in seconds.items()}


def measure_kernel(folder: Path, options: argparse.Namespace) -> dict:
    """Time the dequantization alone beside a memory copy and torch's float8 cast."""
    import torch

    import kernel

    rows, cols, cores = 4096, 7168, len(os.sched_getaffinity(0))
    rows -= rows % (cores * 128)
    n = rows * cols
    codes = torch.randn(n).clamp(-4, 4).mul_(100).to(torch.float8_e4m3fn).view(torch.uint8)
    out = torch.empty(n, dtype=torch.bfloat16)
    place, source = (torch.zeros(n * 3 // 2, dtype=torch.uint8) for _ in range(2))
    grids = {"128x128": (128, 128), "per row": (1, cols), "per tensor": (rows, cols)}
    grids |= {"1x32": (1, 32), "FP4 1x32": (1, 32)}
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=[1])

    def dequantize(name, device="cpu", copies=1):
        grid = kernel.Grid(copies * rows, cols, *grids[name], copies * rows)
        number_format = "E2M1" if "FP4" in name else "E4M3"
        scales = torch.rand(grid.scale_shape).add_(0.1).to(device)
        data, values = (t.to(device).expand(copies, n).flatten() for t in (codes, out))
        per_byte = kernel.FORMATS[number_format].codes_per_byte

        def part(start, stop):
            row, row_end, _, _ = grid.scale_region(start, stop)
            some, into = data[start // per_byte : stop // per_byte], values[start:stop]
            kernel.dequantize(some, scales[row:row_end], into, number_format, grid, start)

        return part

    def on_all(action):
        edges = [n // cores * i for i in range(cores + 1)]
        return lambda: [*pool.map(action, edges[:-1], edges[1:])]

    parts = {name: dequantize(name) for name in grids}

    def cast(start, stop):
        out[start:stop].copy_(codes[start:stop].view(torch.float8_e4m3fn))

    def copy(start, stop):
        start, stop = start * 3 // 2, stop * 3 // 2
        place[start:stop].copy_(source[start:stop])

    parts |= {"torch's cast": cast, "memory copy": copy}
    torch.set_num_threads(1)
    alone = {name: functools.partial(part, 0, n) for name, part in parts.items()}
    one = median_seconds(alone, options.runs)
    all_cores = median_seconds({name: on_all(part) for name, part in parts.items()}, options.runs)
    print(f"G elements/s, medians of {options.runs}; the copy moves as many bytes as E4M3 to BF16")
    print(f"{'':18}{'1 core':>9}{f'{cores} cores':>9}")
    rates = {name: [n / one[name] / 1e9, n / all_cores[name] / 1e9] for name in one}
    for name, (single, many) in rates.items():
        print(f"{name:18}{single:9.2f}{many:9.2f}")
    if torch.cuda.is_available():
        parts = {name: dequantize(name, "cuda", GPU_COPIES) for name in grids}
        rates["GPU"] = measure_gpu(parts, GPU_COPIES * n, options)
    return rates


def measure_gpu(parts: dict[str, Callable], n: int, options: argparse.Namespace) -> dict:
    """Time the Triton kernel beside a copy on the GPU of as many bytes: shares of its rate."""
    import torch

    def repeated(action):
        def run():
            for _ in range(20):
                action()
            torch.cuda.synchronize()

        return run

    copies = {}
    for size in {3 * n, 5 * n // 2}:  # read and written for FP8 and for FP4
        source = torch.zeros(size // 2, dtype=torch.uint8, device="cuda")
        copies[size] = functools.partial(torch.empty_like(source).copy_, source)
    actions = {name: repeated(functools.partial(part, 0, n)) for name, part in parts.items()}
    actions |= {size: repeated(copy) for size, copy in copies.items()}
    seconds = median_seconds(actions, options.runs)
    shares = {}
    for name in parts:
        size = 5 * n // 2 if "FP4" in name else 3 * n
        shares[name] = seconds[size] / seconds[name]
        rate = 20 * size / seconds[name] / 1e12
        print(f"GPU, {name}: {rate:.2f} TB/s, {shares[name]:.0%} of a copy's rate")
    return shares


def make_layout_with_data(folder: Path, tensors: list, shards: int) -> None:
    """Write a layout with random codes, the same 64 MB again and again, and scales of 0.01."""
    import torch

    from make_checkpoint import make_layout

    make_layout(folder, tensors, shards)
    codes = torch.randn(1 << 26).clamp(-4, 4).mul_(100).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.numpy().tobytes()
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            begin = file.tell()
            for tensor in header.values():
                start, stop = (begin + offset for offset in tensor["data_offsets"])
                file.seek(start)
                if tensor["dtype"] == "F32":
                    file.write(torch.full(((stop - start) // 4,), 0.01).numpy().tobytes())
                else:
                    for at in range(start, stop, len(codes)):
                        file.write(codes[: stop - at])
    os.sync()


def measure_scaling(folder: Path, options: argparse.Namespace) -> dict:
    """Time ours and the floor on growing checkpoints, one huge tensor, and very many tiny ones."""

    def weight(name, rows, cols):
        scales = [-(-rows // 128), -(-cols // 128)]
        return [(name, "F8_E4M3", [rows, cols]), (name + "_scale_inv", "F32", scales)]

    each, cols = 2048 * 7168, 7168
    cases = {
        f"{size} GB of experts": [
            tensor
            for i in range(round(size * 1e9 / each))
            for tensor in weight(f"model.layers.0.mlp.experts.{i}.up_proj.weight", 2048, cols)
        ]
        for size in (1, 2, 4, 8)
    }
    cases["one tensor of 8 GB"] = weight("model.embed.weight", round(8e9 / cols), cols)
    cases["50,000 of 4 KB"] = [
        tensor for i in range(50_000) for tensor in weight(f"m.{i}.weight", 32, 128)
    ]
    record, spawn = {}, multiprocessing.get_context("spawn")
    for case, tensors in cases.items():
        source, out = folder / "fp8", folder / "bf16"
        # In a process of its own: what this one has held would count as its children's peak.
        shards = 1 if "one" in case else 4
        maker = spawn.Process(target=make_layout_with_data, args=(source, tensors, shards))
        maker.start()
        maker.join()
        runs = take_turns([*OURS, *FLOOR, *IMPORT], source, out, options.runs)
        figures = {contender: summarize(results) for contender, results in runs.items()}
        startup, written = figures["import"]["wall"], bytes_of(out)
        print(f"{case}: {bytes_of(source) / 1e9:.2f} GB in, {written / 1e9:.2f} GB out")
        print_table(figures, written)
        each_gb = (figures["ours"]["wall"] - startup) / written * 1e9
        figures["over_floor"] = ratio(runs, "ours", "floor", startup)
        print(f"net of import: {each_gb:.2f} s/GB out, {figures['over_floor']:.2f} x floor")
        record[case] = figures
        shutil.rmtree(source)
        shutil.rmtree(out)
    return record


def measure_tuning(folder: Path, options: argparse.Namespace) -> dict:
    """Time ours as it is beside ours with other constants."""
    source, out = folder / "fp8", folder / "bf16"
    make_source(source, options)
    record = {}
    for cold, contenders in ((True, {**READS, **TUNING}), (False, READS)):
        for path in source.glob("*.safetensors"):
            shutil.copyfile(path, os.devnull)
        case = "cold" if cold else "cached"
        runs = take_turns([*OURS, *FLOOR, *contenders, *IMPORT], source, out, options.runs, cold)
        figures = {contender: summarize(results) for contender, results in runs.items()}
        print(f"{case}, {options.runs} runs")
        print_table(figures, bytes_of(out))
        startup = figures["import"]["wall"]
        ratios = {name: ratio(runs, name, "ours", startup) for name in (*FLOOR, *contenders)}
        for name, value in ratios.items():
            print(f"{name}: {value:.2f} x ours, net of import (median of pairs)")
        record[case] = {**figures, "over_ours": ratios}
    return record


def measure_plan(folder: Path, options: argparse.Namespace) -> dict:
    """Time what needs no data on DeepSeek-V3's 163 shards, of zeros, and their whole output."""
    source, out = folder / "fp8", folder / "bf16"
    timed("layout", source, out)
    runs = {contender: [] for contender in PLAN_RUNS}
    for contender in [*PLAN_RUNS] * (options.runs + 1):  # the first time is for the cache
        target = out if contender == "again" else folder / "none"
        runs[contender].append(timed(contender, source, target, cold=False))
    figures = {contender: summarize(results[1:]) for contender, results in runs.items()}
    print(f"DeepSeek-V3, 91,991 tensors, {options.runs} runs, cached")
    print_table(figures, 0)
    beyond = {name: figures[name]["wall"] - figures["import"]["wall"] for name in ("dry", "again")}
    print(", ".join(f"{name}: {seconds:.2f} s" for name, seconds in beyond.items()), end="")
    print(" beyond import")
    return {"beyond_import": beyond, **figures}


def imbalance(sizes: list[int], ranks: int) -> float:
    """Return the longest rank's share over the mean, if each takes the next when it is free."""
    loads = [0] * ranks
    for size in sizes:
        heapq.heappush(loads, heapq.heappop(loads) + size)
    return max(loads) * ranks / sum(loads)


def store_rate(clients: int = 64, each: int = 500) -> float:
    """Return how many counts a second torch's store takes from clients in threads of a process."""
    import torch.distributed as distributed

    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [distributed.TCPStore("127.0.0.1", server.port) for _ in range(clients)]

    def work(store):
        for _ in range(each):
            store.add("counter", 1)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    assert server.add("counter", 0) == clients * each, "counts were lost"
    return clients * each / seconds


def rehearse_ranks(folder: Path) -> dict[str, float]:
    """Plan DeepSeek-V3 as ranks of their own do, and share it out among 8, 64 and 256 of them."""
    import fp8_cast_bf16
    from make_checkpoint import deepseek_v3_tensors, make_layout

    make_layout(folder, list(deepseek_v3_tensors()), 163)
    code = (
        "import sys, fp8_cast_bf16 as f; from pathlib import Path; job = f.Job(); job.size = 2; "
        "job.gather = lambda key, value: [value, value]; "
        "job.share = lambda key, value: (print(value[0]), value)[1]; "
        "job.agree(f.make_plan(f.load_checkpoint(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, folder]
    plans = {
        subprocess.check_output(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": str(seed)})
        for seed in range(4)
    }
    assert len(plans) == 1, f"plans differ: {plans}"
    plan = fp8_cast_bf16.make_plan(fp8_cast_bf16.load_checkpoint(folder))
    jobs = [fp8_cast_bf16.Job() for _ in range(64)]
    for job in jobs:
        job.counts, job.lock = jobs[0].counts, jobs[0].lock
    span = fp8_cast_bf16.SPAN * fp8_cast_bf16.WINDOW
    shards = sorted(plan.shards, key=lambda shard: -shard.size)
    spans = [min(span, shard.size - start) for shard in shards
             for start in range(0, shard.size, span)]
    rows = [job.claimed("span", range(len(spans))) for job in jobs]
    claims = collections.Counter(number for row in zip_longest(*rows) for number in row)
    claims.pop(None, None)
    assert claims == dict.fromkeys(range(len(spans)), 1), "a span was taken twice, or by nobody"
    figures = {"spans": len(spans), "store_counts_per_second": store_rate()}
    print(f"DeepSeek-V3: 4 processes plan the same; 64 ranks take {len(spans)} spans once each")
    print("longest rank over mean, calculated for ranks of equal speed:")
    for ranks in (8, 64, 256):
        shared, whole = imbalance(spans, ranks), imbalance([s.size for s in shards], ranks)
        print(f"{ranks:5} ranks: {shared:.3f} sharing spans, {whole:.3f} taking whole shards")
        figures |= {f"imbalance_{ranks}": shared, f"imbalance_{ranks}_whole": whole}
    traffic = 256 * (2 * 1e9 / span + 1 / fp8_cast_bf16.POLL)
    print(f"256 ranks at 1 GB/s each count {traffic:.0f} times a second (calculated); ", end="")
    print(f"the store took {figures['store_counts_per_second']:.0f} from 64 threads (measured)")
    return figures


def measure_ranks(folder: Path, options: argparse.Namespace) -> dict:
    """Time one and two ranks in turn on one machine, then rehearse many."""
    source, out = folder / "fp8", folder / "bf16"
    make_source(source, options)
    runs = take_turns([*RANK_RUNS], source, out, options.runs)
    figures = {contender: summarize(results) for contender, results in runs.items()}
    print_table(figures, bytes_of(out))
    two_over_one = ratio(runs, *RANK_RUNS)
    print(f"two ranks are {two_over_one:.2f} x as fast as one (median of pairs, whole processes)")
    shutil.rmtree(source)
    return {"two_over_one": two_over_one, **figures, **rehearse_ranks(folder / "layout")}


def make_source(source: Path, options: argparse.Namespace) -> None:
    maker = [sys.executable, ROOT / "tests/make_checkpoint.py", source]
    arguments = ["--size", options.size, "--shards", str(options.shards)]
    subprocess.run([*maker, *arguments], check=True)


MODES = {
    "conversion": measure,
    "kernel": measure_kernel,
    "tuning": measure_tuning,
    "scaling": measure_scaling,
    "plan": measure_plan,
    "ranks": measure_ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the converter.")
    parser.add_argument("mode", nargs="?", choices=MODES, default="conversion")
    parser.add_argument("--size", default="2.8G", help="bytes of the checkpoint (default 2.8G)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5, help="of each contender (default 5)")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="on which disk")
    parser.add_argument("--plot", type=Path, help="draw the conversions' seconds, as SVG")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(json.dumps(MODES[options.mode](Path(folder), options)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        ALL_RUNS[sys.argv[2]](sys.argv[3], sys.argv[4])
    else:
        main()
