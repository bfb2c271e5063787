"""Measure the converter against the disk, the memory, and what else does its work.

    python tests/benchmark.py [--size BYTES] [--shards N] [--runs N] [--folder FOLDER] [--plot FILE]
    python tests/benchmark.py MODE, one of those below or "kernel"

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
dequantization itself, on one core and on all, for codes of several distributions, beside torch's
float8 cast and beside a copy in memory of as many bytes; on a GPU, if there is one, beside a copy
there. Prints medians with their spread and ends with one line of JSON; --plot draws the seconds of
the contenders.

- tuning: ours with other windows and other numbers of workers.
- scaling: ours and floor for 1, 2, 4 and 8 GB of experts, for 8 GB in one tensor, and for 50,000
  weights of 4 KB.
- plan: --dry-run and a run that finds nothing to do on the real layout of DeepSeek-V3, in sparse
  files and with what they hold cached.
- fingerprints: those of --shards of DeepSeek-V3's 163 shards, which hold data, on a cold cache.
- tensors: bf16_tensors beside ours and beside safetensors' safe_open on the input and the output.
- space: what ours takes of the disk, with and without --delete-source, beside what it predicts.
- ranks: one and two ranks of torchrun on one machine, and how evenly DeepSeek-V3's shards fall on
  more of them.
"""

import argparse
import collections
import contextlib
import functools
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def run_ours(source: str, out: str, device: str = "cpu", workers: int | None = None,
             window: int = 16 << 20) -> None:
    import fp8_cast_bf16

    fp8_cast_bf16.WINDOW = window
    fp8_cast_bf16.main(source, out, device=device, workers=workers)


def run_floor(source: str, out: str) -> None:
    import fp8_cast_bf16

    nothing = fp8_cast_bf16.torch.zeros(2, dtype=fp8_cast_bf16.torch.int64)
    fp8_cast_bf16.kernel.dequantize = lambda *operands: nothing
    fp8_cast_bf16.find_implausible = lambda plan: []  # There are no values to look at.
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


def run_tensors(source: str, out: str) -> None:
    import fp8_cast_bf16

    for _ in fp8_cast_bf16.bf16_tensors(source):
        pass


def run_safe_open(source: str, out: str) -> None:
    from safetensors import safe_open

    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                shard.get_tensor(name).clone()


def run_import(source: str, out: str) -> None:
    import fp8_cast_bf16  # noqa: F401


def run_verify(source: str, out: str) -> None:
    import fp8_cast_bf16

    fp8_cast_bf16.main(source, out, verify=True)


def run_reading(source: str, out: str) -> None:
    import fp8_cast_bf16

    def read(step, tensor, row, col, M, N, worker):
        for name, where in (("got", tensor), ("codes", step.source)):
            worker.elements(name, where, row * fp8_cast_bf16.cols_of(step) + col, M * N)

    fp8_cast_bf16.compare_piece = read
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
    plan = fp8_cast_bf16.make_plan(Path(source))
    worker = fp8_cast_bf16.Worker(fp8_cast_bf16.torch.device("cpu"), 0)
    os.makedirs(out)
    for shard in plan.shards:
        with open(Path(out, shard.name), "wb") as file:
            file.write(shard.sealed(fp8_cast_bf16.fingerprint_of(shard, worker)))
            file.truncate(shard.size)
    for name, text in fp8_cast_bf16.find_side_files(plan).texts.items():
        Path(out, name).write_text(text)


OURS, FLOOR = {"ours": run_ours}, {"floor": run_floor}
OTHERS = {"compressed-tensors": run_compressed_tensors, "ancestor": run_ancestor}
if not importlib.util.find_spec("compressed_tensors"):
    del OTHERS["compressed-tensors"]
GPU_COPIES = 32  # of the weight that the CPU gets, or launching would take longer than the work
GPU_RUNS = {"ours on GPU": functools.partial(run_ours, device="cuda")}
LATER_RUNS = {"verify": run_verify, "reading": run_reading, "again": run_again}
IMPORT = {"import": run_import}
TENSOR_RUNS = {
    "tensors": run_tensors,
    "safe_open, FP8": run_safe_open,
    "safe_open, BF16": lambda source, out: run_safe_open(out, out),
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
WRITING = {**OURS, **FLOOR, **OTHERS, **GPU_RUNS, **RANK_RUNS, **TUNING}
ALL_RUNS = {**WRITING, **LATER_RUNS, **TENSOR_RUNS, **PLAN_RUNS, "layout": run_layout}


def processor_name() -> str:
    """Return what the processor calls itself, on Linux, or what it is."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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

    from make_checkpoint import byte_count

    source, out = folder / "fp8", folder / "bf16"
    make_source(source, options)
    gpu, others = GPU_RUNS if torch.cuda.is_available() else {}, dict(OTHERS)
    if byte_count(options.size) < 10**9 and others.pop("compressed-tensors", None):
        print("Without compressed-tensors, which cannot save the ragged weights of small models")
    runs = take_turns([*OURS, *FLOOR, *gpu, *others, *IMPORT], source, out, options.runs)
    timed("ours", source, out)
    runs |= take_turns([*LATER_RUNS], source, out, options.runs)
    read, written = bytes_of(source), bytes_of(out)
    figures = {contender: summarize(results) for contender, results in runs.items()}
    startup = figures["import"]["wall"]
    cold = "cold" if drop_caches() else "as it comes (dropping it is not permitted)"
    title = f"{read / 1e9:.2f} GB in, {written / 1e9:.2f} GB out, {os.cpu_count()} cores"
    print(f"{processor_name()}, {title}, {options.shards} shards; ", end="")
    print(f"{options.runs} runs, cache {cold}")
    print_table(figures, written)
    ratios = {f"{name}_over_floor": ratio(runs, name, "floor", startup) for name in ("ours", *gpu)}
    ratios |= {f"{name}_over_ours": ratio(runs, name, "ours") for name in others}
    ratios |= {f"{name}_over_ours_net": ratio(runs, name, "ours", startup) for name in others}
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


class Case(NamedTuple):
    """A weight to dequantize: how its codes are spread, their format, rows and columns of a block.

    codes: "usual", of a weight whose largest value in 4 sigma is 400; "cast", of a plain cast of
    weights of 0.02, half of them subnormal; "uniform", each of the 254 finite codes as often.
    """

    codes: str
    number_format: str
    block_rows: int
    block_cols: int


KERNEL_ROWS, KERNEL_COLS = 4096, 7168
KERNEL_CASES = {
    "128x128": Case("usual", "E4M3", 128, 128),
    "per row": Case("usual", "E4M3", 1, KERNEL_COLS),
    "per tensor": Case("usual", "E4M3", KERNEL_ROWS, KERNEL_COLS),
    "1x32": Case("usual", "E4M3", 1, 32),
    "plain cast": Case("cast", "E4M3", KERNEL_ROWS, KERNEL_COLS),
    "uniform codes": Case("uniform", "E4M3", 128, 128),
    "FP4 1x32": Case("uniform", "E2M1", 1, 32),
    "INT4 1x128": Case("uniform", "INT4", 1, 128),
}


def make_codes() -> dict:
    """Return codes of each distribution that Case names, as flat uint8."""
    import torch

    n, e4m3 = KERNEL_ROWS * KERNEL_COLS, torch.float8_e4m3fn
    uniform = torch.randint(0, 254, (n,), dtype=torch.uint8)
    return {
        "usual": torch.randn(n).clamp(-4, 4).mul_(100).to(e4m3).view(torch.uint8),
        "cast": torch.randn(n).mul_(0.02).to(e4m3).view(torch.uint8),
        "uniform": uniform + (uniform >= 0x7F),  # 0x7F and 0xFF are NaN
    }


def dequantization(case: Case, codes, device: str = "cpu", copies: int = 1) -> Callable[[], None]:
    """Return what dequantizes a case: by the converter's pieces, on a GPU all at once."""
    import torch

    import kernel

    rows, cols = KERNEL_ROWS * copies, KERNEL_COLS
    grid = kernel.Grid(rows, cols, case.block_rows, case.block_cols, rows)
    plain = case.codes == "cast"
    scales = torch.ones(grid.scale_shape) if plain else torch.rand(grid.scale_shape).add_(0.1)
    width = cols // kernel.FORMATS[case.number_format].codes_per_byte
    codes = codes[: KERNEL_ROWS * width].view(-1, width).to(device).repeat(copies, 1)
    scales, out = scales.to(device), torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    limit = kernel.MAX_PIECE if device == "cpu" else rows * cols
    calls = []
    for row, col, M, N in kernel.pieces(0, rows * cols, cols, limit):
        top, bottom, _, _ = grid.scale_region(row, col, M, N)
        operands = codes[row : row + M], scales[top:bottom], out[row : row + M]
        calls.append((*operands, case.number_format, grid, row, col))

    def act() -> None:
        for call in calls:
            kernel.dequantize(*call)

    return act


def measure_kernel(folder: Path, options: argparse.Namespace) -> dict:
    """Time the dequantization alone beside a memory copy and torch's float8 cast.

    It runs on one thread that has all cores for each operation, as the converter's decoder does.
    """
    import torch

    n, codes = KERNEL_ROWS * KERNEL_COLS, make_codes()
    actions = {name: dequantization(case, codes[case.codes])
               for name, case in KERNEL_CASES.items()}
    out = torch.zeros(n, dtype=torch.bfloat16)
    for name, distribution in (("torch's cast", "usual"), ("the same, plain", "cast")):
        actions[name] = functools.partial(out.copy_, codes[distribution].view(torch.float8_e4m3fn))
    place, source = (torch.zeros(n * 3 // 2, dtype=torch.uint8) for _ in range(2))
    actions["memory copy"] = functools.partial(place.copy_, source)
    cores = len(os.sched_getaffinity(0))
    rates = {name: [] for name in actions}
    for threads in (1, cores):
        torch.set_num_threads(threads)
        for name, seconds in median_seconds(actions, options.runs).items():
            rates[name].append(n / seconds / 1e9)
    print(f"{processor_name()}: G elements/s, medians of {options.runs}; the copy moves as many ",
          end="")
    print("bytes as E4M3 to BF16")
    print(f"{'':18}{'1 core':>9}{f'{cores} cores':>9}")
    for name, (single, many) in rates.items():
        print(f"{name:18}{single:9.2f}{many:9.2f}")
    record = {"processor": processor_name(), **rates}
    if torch.cuda.is_available():
        record["GPU"] = measure_gpu(codes, options)
    return record


def measure_gpu(codes: dict, options: argparse.Namespace) -> dict:
    """Time the Triton kernel beside a copy on the GPU of as many bytes: shares of its rate."""
    import torch

    n, shares = GPU_COPIES * KERNEL_ROWS * KERNEL_COLS, {}

    def repeated(action):
        def run():
            for _ in range(20):
                action()
            torch.cuda.synchronize()

        return run

    print(torch.cuda.get_device_name())
    for name, case in KERNEL_CASES.items():
        size = 3 * n if case.number_format == "E4M3" else 5 * n // 2  # read and written
        source = torch.zeros(size // 2, dtype=torch.uint8, device="cuda")
        place = torch.empty_like(source)
        ours = dequantization(case, codes[case.codes], "cuda", GPU_COPIES)
        actions = {"ours": repeated(ours), "copy": repeated(lambda: place.copy_(source))}  # noqa: B023
        seconds = median_seconds(actions, options.runs)
        shares[name] = seconds["copy"] / seconds["ours"]
        rate = 20 * size / seconds["ours"] / 1e12
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
    """Time ours as it is beside ours with other windows and other numbers of workers."""
    source, out = folder / "fp8", folder / "bf16"
    make_source(source, options)
    runs = take_turns([*OURS, *FLOOR, *TUNING, *IMPORT], source, out, options.runs)
    figures = {contender: summarize(results) for contender, results in runs.items()}
    print_table(figures, bytes_of(out))
    startup = figures["import"]["wall"]
    ratios = {name: ratio(runs, name, "ours", startup) for name in (*FLOOR, *TUNING)}
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} x ours, net of import (median of pairs)")
    return {**figures, "over_ours": ratios}


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


def measure_tensors(folder: Path, options: argparse.Namespace) -> dict:
    """Time bf16_tensors beside the conversion and beside safe_open on either checkpoint."""
    source, out = folder / "fp8", folder / "bf16"
    make_source(source, options)
    runs = take_turns([*OURS, *TENSOR_RUNS, *IMPORT], source, out, options.runs)
    figures = {contender: summarize(results) for contender, results in runs.items()}
    print_table(figures, bytes_of(out))
    startup, read, made = figures["import"]["wall"], bytes_of(source), bytes_of(out)
    sizes = {"ours": made, "tensors": made, "safe_open, FP8": read, "safe_open, BF16": made}
    rates = {name: size / (figures[name]["wall"] - startup) / 1e9 for name, size in sizes.items()}
    print(f"{read / 1e9:.2f} GB of FP8, {made / 1e9:.2f} GB of BF16; GB/s, net of import: ", end="")
    print(", ".join(f"{name}: {rate:.2f}" for name, rate in rates.items()))
    return {**figures, "rates": rates}


def bytes_on_disk(folder: Path) -> int:
    """Return how much of the disk the files below a folder take, which may come and go."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def measure_space(folder: Path, options: argparse.Namespace) -> dict:
    """Take how much of the disk a conversion needs, with and without --delete-source."""
    source, out, record = folder / "fp8", folder / "bf16", {}
    for more in ([], ["--delete-source"]):
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        make_source(source, options)
        command = [sys.executable, ROOT / "fp8_cast_bf16.py", "--input-fp8-hf-path", source,
                   "--output-bf16-hf-path", out, "--device", "cpu", *more]
        said = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True)
        (predicted,) = (line for line in said.stdout.splitlines() if line.startswith("Space"))
        before, peak, began = bytes_on_disk(folder), 0, time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, bytes_on_disk(folder))
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        assert process.returncode == 0
        after = bytes_on_disk(folder)
        print(f"{' '.join(more) or 'without it'}: {before / 1e9:.2f} GB before, at most "
              f"{(peak - before) / 1e9:.2f} more, {after / 1e9:.2f} after; {seconds:.1f} s")
        print(f"  {predicted.partition(';')[0]}")
        record[" ".join(more)] = {"before": before, "peak": peak, "after": after,
                                  "seconds": seconds}
    return record


def measure_fingerprints(folder: Path, options: argparse.Namespace) -> dict:
    """Time the fingerprints of some of DeepSeek-V3's shards, which hold data, on a cold cache."""
    import fp8_cast_bf16
    from make_checkpoint import deepseek_v3_tensors

    tensors, each = [*deepseek_v3_tensors()], -(-91_991 // 163)
    assert len(tensors) == 91_991
    some = tensors[80 * each : (80 + options.shards) * each]  # of layers in the middle
    maker = multiprocessing.get_context("spawn").Process(
        target=make_layout_with_data, args=(folder / "fp8", some, options.shards))
    maker.start()
    maker.join()
    plan = fp8_cast_bf16.make_plan(folder / "fp8")
    seconds = []
    for _ in range(options.runs):
        cold = drop_caches()
        pool = [fp8_cast_bf16.Worker() for _ in range(4)]
        began = time.perf_counter()
        fp8_cast_bf16.run_workers(
            "", pool, ((shard,) for shard in plan.shards),
            lambda worker, shard: len(fp8_cast_bf16.fingerprint_of(shard, worker)), 0, quiet=True)
        seconds.append(time.perf_counter() - began)
    taken = statistics.median(seconds)
    whole = taken * 163 / options.shards
    print(f"{options.shards} of 163 shards, {bytes_of(folder / 'fp8') / 1e9:.1f} GB, 4 workers: ",
          f"{taken:.2f} s, {'cold' if cold else 'cache as it comes'}; ",
          f"{whole:.0f} s for all, calculated", sep="")
    return {"seconds": seconds, "all_shards": whole}


def imbalance(shards: list, ranks: int) -> float:
    """Return the bytes of the rank that writes most over the mean."""
    from fp8_cast_bf16 import shards_of_rank

    loads = [sum(shard.size for shard in shards_of_rank(shards, rank, ranks))
             for rank in range(ranks)]
    total = sum(shard.size for shard in shards)
    assert sum(loads) == total, "a shard is written twice, or by nobody"
    return max(loads) * ranks / total


def measure_ranks(folder: Path, options: argparse.Namespace) -> dict:
    """Time one and two ranks in turn on one machine, then calculate what falls on more of them."""
    import fp8_cast_bf16
    from make_checkpoint import deepseek_v3_tensors, make_layout

    source, out, layout = folder / "fp8", folder / "bf16", folder / "layout"
    make_source(source, options)
    runs = take_turns([*RANK_RUNS], source, out, options.runs)
    figures = {contender: summarize(results) for contender, results in runs.items()}
    print_table(figures, bytes_of(out))
    two_over_one = ratio(runs, *RANK_RUNS)
    print(f"two ranks are {two_over_one:.2f} x as fast as one (median of pairs, whole processes)")
    make_layout(layout, list(deepseek_v3_tensors()), 163)
    plan = fp8_cast_bf16.make_plan(layout)
    shares = {ranks: imbalance(plan.shards, ranks) for ranks in (8, 32, 64)}
    print("DeepSeek-V3, the bytes of the rank that writes most over the mean, calculated: ", end="")
    print(", ".join(f"{share:.3f} on {ranks} ranks" for ranks, share in shares.items()))
    return {"two_over_one": two_over_one, **figures, "imbalance": shares}


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
    "fingerprints": measure_fingerprints,
    "tensors": measure_tensors,
    "space": measure_space,
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
