"""Measure the converter against the disk and against the algorithm that it replaces.

    python tests/benchmark.py [--size BYTES] [--shards N] [--runs N] [--folder FOLDER]
    python tests/benchmark.py --plan

Contenders, each a process of its own, take turns on one synthetic checkpoint:

- ours: the converter as it is.
- floor: the same reads and the same writes in the same windows by the same workers, no arithmetic.
- ancestor: load_file, torch's float8 cast, save_file, on the CPU, one shard at a time.

Then, on the output of ours:

- verify: ours with --verify.
- again: ours once more, which finds nothing to do.

Before each run the page cache is dropped where that is permitted. Prints medians with their spread
and ends with one line of JSON. With --plan, it times --dry-run and a run that finds nothing to do
on the real layout of DeepSeek-V3, in sparse files and with what they hold cached.
"""

import argparse
import collections
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def run_ours(source: str, out: str) -> None:
    import fp8_cast_bf16

    fp8_cast_bf16.main(source, out, device="cpu")


def run_floor(source: str, out: str) -> None:
    import torch

    import fp8_cast_bf16

    fp8_cast_bf16.kernel.dequantize = lambda *operands: torch.zeros(2)
    fp8_cast_bf16.main(source, out, device="cpu")


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


RUNS = {"ours": run_ours, "floor": run_floor, "ancestor": run_ancestor, "import": run_import}
LATER_RUNS = {"verify": run_verify, "again": run_again}
PLAN_RUNS = {"import": run_import, "dry": run_dry, "again": run_again}
ALL_RUNS = {**RUNS, **LATER_RUNS, **PLAN_RUNS, "layout": run_layout}


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
    if contender in RUNS:
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


def summarize(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the medians of each figure and the least and most wall seconds."""
    walls = [run["wall"] for run in runs]
    medians = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
    return {**medians, "least": min(walls), "most": max(walls)}


def print_table(figures: dict[str, dict[str, float]], written: int) -> None:
    heads = ["wall s", "least", "most", "user s", "sys s", "peak MB", "GB/s out"]
    print(f"{'':12}" + "".join(f"{head:>9}" for head in heads))
    for contender, row in figures.items():
        figure = [row[key] for key in ("wall", "least", "most", "user", "system")]
        print(f"{contender:12}" + "".join(f"{seconds:9.2f}" for seconds in figure), end="")
        rate = f"{written / row['wall'] / 1e9:9.2f}" if written and contender != "import" else ""
        print(f"{row['peak'] / 1e6:9.0f}{rate}")


def measure_plan(folder: Path, times: int) -> None:
    """Time what needs no data on DeepSeek-V3's 163 shards, of zeros, and their whole output."""
    source, out = folder / "fp8", folder / "bf16"
    timed("layout", source, out)
    runs = {contender: [] for contender in PLAN_RUNS}
    for contender in [*PLAN_RUNS] * (times + 1):  # the first time is for the cache
        target = out if contender == "again" else folder / "none"
        runs[contender].append(timed(contender, source, target, cold=False))
    figures = {contender: summarize(results[1:]) for contender, results in runs.items()}
    print(f"DeepSeek-V3, 91,991 tensors, {times} runs, cached")
    print_table(figures, 0)
    beyond = {name: figures[name]["wall"] - figures["import"]["wall"] for name in ("dry", "again")}
    print(", ".join(f"{name}: {seconds:.2f} s" for name, seconds in beyond.items()), end="")
    print(" beyond import")
    print(json.dumps({"beyond_import": beyond, **figures}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the converter.")
    parser.add_argument("--size", default="2.8G", help="bytes of the checkpoint (default 2.8G)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5, help="of each contender (default 5)")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="on which disk")
    parser.add_argument("--plan", action="store_true", help="time planning DeepSeek-V3 instead")
    options = parser.parse_args()
    if options.plan:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            return measure_plan(Path(folder), options.runs)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder, "fp8"), Path(folder, "bf16")
        maker = [sys.executable, ROOT / "tests/make_checkpoint.py", source]
        arguments = ["--size", options.size, "--shards", str(options.shards)]
        subprocess.run([*maker, *arguments], check=True)
        runs = {contender: [] for contender in RUNS}
        for _ in range(options.runs):
            for contender, results in runs.items():
                results.append(timed(contender, source, out))
        timed("ours", source, out)
        for contender in [*LATER_RUNS] * options.runs:
            runs.setdefault(contender, []).append(timed(contender, source, out))
        read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    figures = {contender: summarize(results) for contender, results in runs.items()}
    startup = figures["import"]["wall"]
    pairs = zip(runs["ours"], runs["floor"], strict=True)
    against_floor = statistics.median(
        (ours["wall"] - startup) / (floor["wall"] - startup) for ours, floor in pairs
    )
    pairs = zip(runs["ancestor"], runs["ours"], strict=True)
    against_ancestor = statistics.median(a["wall"] / ours["wall"] for a, ours in pairs)

    cold = "cold" if drop_caches() else "as it comes (dropping it is not permitted)"
    print(f"{platform.machine()}, {os.cpu_count()} cores; {read / 1e9:.2f} GB in, ", end="")
    print(f"{written / 1e9:.2f} GB out, {options.shards} shards; {options.runs} runs, cache {cold}")
    print_table(figures, written)
    print(f"net of import, ours takes {against_floor:.2f} x the floor's time (median of pairs)")
    print(f"whole process, the ancestor takes {against_ancestor:.1f} x ours (median of pairs)")
    seconds = figures["verify"]["wall"] - startup
    print(f"net of import, verify reads {(read + written) / seconds / 1e9:.2f} GB/s")
    totals = {"bytes_in": read, "bytes_out": written, "ours_over_floor": against_floor}
    print(json.dumps({**totals, "ancestor_over_ours": against_ancestor, **figures}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        ALL_RUNS[sys.argv[2]](sys.argv[3], sys.argv[4])
    else:
        main()
