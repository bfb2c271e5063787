"""Measure the converter against the disk, the memory, and what else does its work.

    python tests/benchmark.py [MODE] [--size BYTES] [--shards N] [--runs N] [--folder FOLDER]

- conversion (the default): whole conversions beside the disk alone (the same reads and writes in
  the same windows by as many threads, no arithmetic), compressed-tensors' convert_checkpoint, and
  load_file, torch's float8 cast, save_file; then --verify beside reading both checkpoints, a run
  that finds nothing to do, and the dequantization alone. --plot FILE draws the conversions.
- kernel: the dequantization alone, on a CPU and a GPU, beside torch's float8 cast and a copy.
- space: what a conversion takes of the disk, with and without --delete-source.
- plan: --dry-run and a run on a complete output for DeepSeek-V3's layout: all of its 91,991 tensors
  in 163 shards, each axis a sixteenth, with everything cached.
- pairs OLD_SCRIPT: another fp8_cast_bf16.py, with the kernel.py beside it, against today's.

Each contender is a process of its own; they take turns on one synthetic checkpoint, and before each
run the page cache is dropped where that is permitted. Prints medians as tables in Markdown, and a
line of JSON at the end.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "fp8_cast_bf16.py"
WINDOW = 16 << 20  # What the converter reads and writes at a time, in bytes.
WORKERS = min(16, max(4, 2 * len(os.sched_getaffinity(0))))  # As many as it has by default.
NOWHERE = subprocess.DEVNULL
DIRECT = getattr(os, "O_DIRECT", 0)

# --- what runs in a process of its own, by name: python benchmark.py --run NAME SCRIPT IN OUT ---


def run_tensors(script: Path, source: Path, out: Path) -> None:
    import fp8_cast_bf16

    deque(fp8_cast_bf16.bf16_tensors(source), maxlen=0)


def run_compressed_tensors(script: Path, source: Path, out: Path) -> None:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint

    targets = [r"re:.*_proj(_with_mqa)?$"]
    convert_checkpoint(source, out, FP8BlockDequantizer(targets=targets), device="cpu")
    os.sync()


def run_ancestor(script: Path, source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir()
    scales = {}
    for path in shards_of(source):
        tensors = load_file(path)
        scales |= {name: t for name, t in tensors.items() if name.endswith("_scale_inv")}
        for name, codes in tensors.items():
            if codes.dtype == torch.float8_e4m3fn:
                wide = scales[name + "_scale_inv"].repeat_interleave(128, 0)
                wide = wide.repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
                tensors[name] = (codes.float() * wide).bfloat16()
        tensors = {name: tensor for name, tensor in tensors.items() if name not in scales}
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    os.sync()


def in_threads(action: Callable, sizes: dict[Path, int]) -> None:
    """Do something with each window of files, given their sizes."""
    windows = [(path, start, min(start + WINDOW, size))
               for path, size in sizes.items() for start in range(0, size, WINDOW)]
    with ThreadPoolExecutor(WORKERS) as pool:
        deque(pool.map(action, *zip(*windows, strict=True)), maxlen=0)


@functools.cache
def buffer(thread: int) -> memoryview:
    """Return a thread's own memory, aligned for direct I/O, in which each page has been touched."""
    memory = mmap.mmap(-1, WINDOW)
    memory.write(b"\1" * WINDOW)
    return memoryview(memory)


def read(path: Path, start: int, stop: int) -> None:
    with open(path, "rb", 0) as file:
        file.seek(start)
        file.readinto(buffer(threading.get_ident())[: stop - start])


def run_floor(script: Path, source: Path, out: Path) -> None:
    """Read the input and write as much as is in the output, in the same windows."""
    sizes = {path: (out / path.name).stat().st_size for path in shards_of(source)}
    (folder := out.with_name("other")).mkdir()
    files = {path: os.open(folder / path.name, os.O_WRONLY | os.O_CREAT | DIRECT) for path in sizes}

    def fill(path: Path, start: int, stop: int) -> None:
        ratio, length = path.stat().st_size / sizes[path], -(-(stop - start) // 4096) * 4096
        read(path, int(start * ratio), int(stop * ratio))
        os.pwrite(files[path], buffer(threading.get_ident())[:length], start)

    for path, size in sizes.items():
        os.ftruncate(files[path], size)
    in_threads(fill, sizes)
    for path, size in sizes.items():  # Direct writes end at a whole block.
        os.ftruncate(files[path], size)
        os.fsync(files[path])


def run_reading(script: Path, source: Path, out: Path) -> None:
    in_threads(read, {path: path.stat().st_size for path in shards_of(source) + shards_of(out)})


RUNS = {
    "import": lambda script, source, out: importlib.import_module("fp8_cast_bf16"),
    "the disk alone": run_floor,
    "reading": run_reading,
    "compressed-tensors": run_compressed_tensors,
    "load, cast, save": run_ancestor,
    "bf16_tensors": run_tensors,
}
OURS, FLOOR = "fp8_cast_bf16.py", "the disk alone"
THEIRS = ["compressed-tensors"] * bool(importlib.util.find_spec("compressed_tensors"))
OTHERS = [*THEIRS, "load, cast, save"]

# --- timing and printing ---

FIGURES = ["seconds", "processor seconds", "peak GB"]


class Place(NamedTuple):
    """A script, and the folders that it is to work with."""

    script: Path
    source: Path
    out: Path

    def convert(self, *more: str) -> list:
        """Return the command line of a conversion."""
        folders = ["--input-fp8-hf-path", self.source, "--output-bf16-hf-path", self.out]
        return [sys.executable, self.script, *folders, "--device", "cpu", *more]

    def run(self, name: str) -> list:
        """Return the command line of one of RUNS."""
        return [sys.executable, __file__, "--run", name, *self]


def drop_caches() -> bool:
    """Write back and forget all cached file pages; return whether that was permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def timed(command: list, cold: bool = True) -> tuple[float, float, float]:
    """Return seconds of a process, on the wall and of processors, and its peak memory in GB."""
    if cold:
        drop_caches()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=NOWHERE)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    unit = 1e-9 if sys.platform == "darwin" else 1024e-9
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit


def take_turns(commands: dict[str, list], times: int, prepare: Callable | None = None,
               cold: bool = True) -> dict[str, dict[str, list[float]]]:
    """Time commands in turn, in the opposite order each second time; prepare(name) comes before."""
    runs = {name: {figure: [] for figure in FIGURES} for name in commands}
    for turn in range(times):
        for name in [*commands][:: -1 if turn % 2 else 1]:
            if prepare:
                prepare(name)
            for figure, value in zip(FIGURES, timed(commands[name], cold), strict=True):
                runs[name][figure].append(value)
    return runs


def ratio(one: list[float], other: list[float], less: float = 0.0) -> float:
    """Return the median over pairs of one figure, less what is not to count, over the other."""
    return median((a - less) / b for a, b in zip(one, other, strict=True))


def print_table(rows: dict[str, dict[str, float | str]]) -> None:
    """Print rows in Markdown; numbers with two digits."""
    heads = [*next(iter(rows.values()))]
    lines = [["", *heads], ["---"] * (1 + len(heads))]
    for name, row in rows.items():
        cells = [row.get(head, "") for head in heads]
        lines.append([name, *(cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells)])
    print(*(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")


def print_runs(runs: dict[str, dict], moved: dict[str, float] | None = None) -> None:
    """Print medians, and the rate of contenders that write so many GB."""
    rows = {}
    for name, figures in runs.items():
        seconds, *others = (figures[figure] for figure in FIGURES)
        rows[name] = {"seconds": median(seconds),
                      "least to most": f"{min(seconds):.2f} to {max(seconds):.2f}"}
        if moved:
            rows[name]["GB/s"] = moved[name] / median(seconds) if name in moved else ""
        rows[name] |= zip(FIGURES[1:], map(median, others), strict=True)
    print_table(rows)


def processor_name() -> str:
    with contextlib.suppress(OSError):
        return re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def plot(seconds: dict[str, list[float]], title: str, path: Path) -> None:
    """Draw the seconds of whole processes, a bar with the spread for each."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"
    walls = {name: median(of) for name, of in seconds.items()}
    spread = [[abs(end(of) - median(of)) for of in seconds.values()] for end in (min, max)]
    colors = ["#2a78b5" if name.startswith("fp8") else "#b8b8b8" for name in walls]
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(walls) + 1), layout="constrained")
    bars = axes.barh([*walls], [*walls.values()], xerr=spread, color=colors)
    axes.bar_label(bars, fmt=" %.1f s", padding=4)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="seconds, whole process", xlim=(0, max(walls.values()) * 1.2))
    figure.savefig(path, format="svg", metadata={"Date": None})


# --- the modes ---


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in shards_of(folder)) / 1e9  # GB.


remove = functools.partial(shutil.rmtree, ignore_errors=True)


def make_place(folder: Path, options: argparse.Namespace) -> Place:
    """Make a checkpoint, and say where it is and where its conversion is to be."""
    subprocess.run([sys.executable, TESTS / "make_checkpoint.py", folder / "fp8", "--size",
                    options.size, "--shards", str(options.shards)], check=True, stdout=NOWHERE)
    return Place(SCRIPT, folder / "fp8", folder / "bf16")


def has_gpu() -> bool:  # In another process: what this one holds counts as its children's peak.
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return not subprocess.call([sys.executable, "-c", code])


def measure_conversion(folder: Path, options: argparse.Namespace) -> dict:
    """Time whole conversions, verifying, and the dequantization alone."""
    place = make_place(folder, options)
    timed(place.convert())
    other = place._replace(out=folder / "other")
    writing = {OURS: other.convert(), FLOOR: place.run(FLOOR)}
    writing |= {f"{OURS}, CUDA": other.convert("--device", "cuda")} if has_gpu() else {}
    writing |= {name: other.run(name) for name in OTHERS}
    if size_of(place.source) < 1:  # It cannot save the ragged weights of small models.
        writing.pop("compressed-tensors", None)
    runs = take_turns(writing | {"import": place.run("import")}, options.runs,
                      lambda name: remove(other.out))
    runs |= take_turns({"--verify": place.convert("--verify"), "reading": place.run("reading"),
                        "nothing to do": place.convert()}, options.runs)
    made = size_of(place.out)
    title = f"{size_of(place.source):.2f} GB in, {made:.2f} GB out, {options.shards} shards"
    cold = "cold" if drop_caches() else "as it comes (dropping it is not permitted)"
    print(f"{title}; {options.runs} runs, cache {cold}\n")
    print_runs(runs, dict.fromkeys(writing, made))
    seconds = {name: figures["seconds"] for name, figures in runs.items()}
    pairs = {(name, OURS): 0.0 for name in writing if name in OTHERS}
    net = [(name, FLOOR) for name in writing if name.startswith(OURS)] + [("--verify", "reading")]
    pairs |= dict.fromkeys(net, median(seconds["import"]))
    ratios = {f"{one} over {other}{', net of import' * bool(less)}":
              ratio(seconds[one], seconds[other], less) for (one, other), less in pairs.items()}
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} (median of pairs)")
    if options.plot:
        plot({name: seconds[name] for name in writing}, title, options.plot)
    return {**ratios, **runs, "kernel": measure_kernel(folder, options)}


ROWS, COLS, PIECE_ROWS, GPU_COPIES = 4096, 7168, 16, 32
CASES = {  # The number format, and the rows and columns of a block.
    "128x128": ("E4M3", 128, 128), "per row": ("E4M3", 1, COLS),
    "per tensor": ("E4M3", ROWS * GPU_COPIES, COLS), "1x32": ("E4M3", 1, 32),
    "FP4 1x32": ("E2M1", 1, 32), "INT4 1x128": ("INT4", 1, 128)}


def dequantization(case: tuple, codes, out, step: int) -> Callable[[], None]:
    """Return what dequantizes a weight, so many rows at a time, by kernel.py's one entry point for
    all formats."""
    import torch

    import kernel

    number_format, block_rows, block_cols = case
    grid = kernel.Grid(*out.shape, block_rows, block_cols, len(out))
    codes = codes[:, : COLS // kernel.FORMATS[number_format].codes_per_byte].contiguous()
    scales = torch.rand(grid.scale_shape, device=out.device) + 0.1

    def act() -> None:
        for row in range(0, len(out), step):
            piece = scales[row // block_rows : -(-(row + step) // block_rows)]
            at = slice(row, row + step)
            kernel.dequantize(codes[at], piece, out[at], number_format, grid, row)

    return act


def rates(device: str, rows: int, step: int, times: int, repeats: int = 1) -> dict[str, float]:
    """Return G elements/s of each case, of torch's cast, and of a copy of 3 bytes an element."""
    import torch

    codes = torch.randn(rows, COLS, device=device).clamp(-4, 4).mul_(100).to(torch.float8_e4m3fn)
    out = torch.zeros(rows, COLS, dtype=torch.bfloat16, device=device)
    place, source = torch.zeros(2, rows * COLS * 3 // 2, dtype=torch.uint8, device=device)
    actions = {name: dequantization(case, codes.view(torch.uint8), out, step)
               for name, case in CASES.items()}
    actions["torch's cast"] = functools.partial(out.copy_, codes)
    actions["memory copy"] = functools.partial(place.copy_, source)
    seconds = {name: [] for name in actions}
    for name, action in [*actions.items()] * (times + 1):  # The first time warms up.
        began = time.perf_counter()
        for _ in range(repeats):
            action()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - began)
    return {name: repeats * rows * COLS / median(of[1:]) / 1e9 for name, of in seconds.items()}


def measure_kernel(folder: Path, options: argparse.Namespace) -> dict:
    """Time the dequantization alone: on one core, on all, and on a GPU also by shares of a copy."""
    import torch

    rows, cores = {}, len(os.sched_getaffinity(0))
    for threads in (1, cores):
        torch.set_num_threads(threads)
        rows[f"{threads} of {cores} cores"] = rates("cpu", ROWS, PIECE_ROWS, options.runs)
    if torch.cuda.is_available():
        name, size = torch.cuda.get_device_name(), ROWS * GPU_COPIES
        rows[name] = row = rates("cuda", size, size, options.runs, repeats=20)
        rows[f"{name}, share of a copy"] = {
            case: row[case] / row["memory copy"] * (1 if kind == "E4M3" else 2.5 / 3)
            for case, (kind, *_) in CASES.items()}
    print(f"Dequantization, G elements/s, medians of {options.runs}\n")
    print_table(rows)
    return rows


def bytes_on_disk(folder: Path) -> int:
    """Return how much of the disk the files below a folder take, which may come and go."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def measure_space(folder: Path, options: argparse.Namespace) -> dict:
    """Take how much of the disk a conversion needs, with and without --delete-source."""
    rows = {}
    for more in ([], ["--delete-source"]):
        remove(folder / "bf16")
        place = make_place(folder, options)  # Which puts back what was emptied.
        said = subprocess.run(place.convert(*more, "--dry-run"), check=True, capture_output=True)
        print(*(line for line in said.stdout.decode().splitlines() if "space" in line.lower()))
        before, peak, began = bytes_on_disk(folder), 0, time.perf_counter()
        process = subprocess.Popen(place.convert(*more), stdout=NOWHERE)
        while process.poll() is None:
            peak = max(peak, bytes_on_disk(folder))
            time.sleep(0.01)
        assert process.returncode == 0
        rows[" ".join(more) or "without it"] = {
            "GB before": before / 1e9, "at most more": (peak - before) / 1e9,
            "after": bytes_on_disk(folder) / 1e9, "seconds": time.perf_counter() - began}
    print_table(rows)
    return rows


def measure_plan(folder: Path, options: argparse.Namespace) -> dict:
    """Time what reads headers only, on as many tensors and shards as DeepSeek-V3 has."""
    place = Place(SCRIPT, folder / "fp8", folder / "bf16")
    code = ("import sys, pathlib, make_checkpoint as m; m.make_layout(pathlib.Path(sys.argv[1]), "
            "[(name, dtype, [-(-size // 16) for size in shape])"
            " for name, dtype, shape in m.deepseek_v3_tensors()], 163)")
    subprocess.run([sys.executable, "-c", code, place.source], check=True, cwd=TESTS)
    timed(place.convert())
    commands = {"import": place.run("import"), "complete output": place.convert(),
                "--dry-run": place._replace(out=folder / "none").convert("--dry-run")}
    take_turns(commands, 1, cold=False)  # For the cache.
    runs = take_turns(commands, options.runs, cold=False)
    print_runs(runs)
    beyond = {name: median(runs[name]["seconds"]) - median(runs["import"]["seconds"])
              for name in ("--dry-run", "complete output")}
    print(", ".join(f"{name}: {seconds:.2f} s beyond import" for name, seconds in beyond.items()))
    return {"beyond_import": beyond, **runs}


def measure_pairs(folder: Path, options: argparse.Namespace) -> dict:
    """Time all that two programs do, by turns, on the same input and each on its own output."""
    place = make_place(folder, options)
    places = {"old": place._replace(script=options.script.resolve(), out=folder / "old"),
              "new": place._replace(out=folder / "new")}

    def refill(name: str) -> None:
        remove(folder / name)
        remove(folder / "in")
        shutil.copytree(folder / "fp8", folder / "in")

    parts = {  # In this order: a conversion is there when the next three begin.
        "conversion": Place.convert,
        "--verify": lambda place: place.convert("--verify"),
        "complete output": Place.convert,
        "--dry-run": lambda place: place._replace(out=folder / "no").convert("--dry-run"),
        "bf16_tensors": lambda place: place.run("bf16_tensors"),
        "--delete-source": lambda place: place._replace(source=folder / "in").convert(
            "--delete-source")}
    prepare = {"conversion": lambda name: remove(folder / name), "--delete-source": refill}
    rows, record = {}, {}
    for part, command in parts.items():
        commands = {name: command(place) for name, place in places.items()}
        rows[part], record[part] = {}, take_turns(commands, options.runs, prepare.get(part))
        for figure in FIGURES:
            old, new = (record[part][name][figure] for name in places)
            rows[part][f"{figure}: old, new, ratio"] = (
                f"{median(old):.2f}, {median(new):.2f}, {ratio(new, old):.2f}")
    print_table(rows)
    return record


MODES = {"conversion": measure_conversion, "kernel": measure_kernel, "space": measure_space,
         "plan": measure_plan, "pairs": measure_pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the converter.")
    add = parser.add_argument
    add("mode", nargs="?", choices=MODES, default="conversion")
    add("script", nargs="?", type=Path, help="of pairs: the old fp8_cast_bf16.py")
    add("--size", default="2.8G", help="bytes of the checkpoint (default 2.8G)")
    add("--shards", type=int, default=4)
    add("--runs", type=int, default=5, help="of each contender (default 5)")
    add("--folder", type=Path, default=tempfile.gettempdir(), help="on which disk")
    add("--plot", type=Path, help="draw the conversions' seconds, as SVG")
    options = parser.parse_args()
    if (options.mode == "pairs") != bool(options.script):
        parser.error("pairs, and no other mode, takes the path of an old script")
    sys.path.insert(0, str(SCRIPT.parent))
    print(f"{processor_name()}, {len(os.sched_getaffinity(0))} cores\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(json.dumps(MODES[options.mode](Path(folder), options)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        script, source, out = map(Path, sys.argv[3:6])
        sys.path.insert(0, str(script.parent))
        RUNS[sys.argv[2]](script, source, out)
    else:
        main()
