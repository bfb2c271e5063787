"""Measure the converter against the disk and against the algorithm that it replaces.

    python tests/benchmark.py [--size BYTES] [--shards N] [--runs N] [--folder FOLDER]
    python tests/benchmark.py --plan

Contenders, each a process of its own, take turns on one synthetic checkpoint:

- ours: the converter as it is.
- floor: the same reads and the same writes in the same windows by the same workers, no arithmetic.
- ancestor: load_file, torch's float8 cast, save_file, on the CPU, one shard at a time.

Before each run the page cache is dropped where that is permitted. Prints medians with their spread
and ends with one line of JSON. With --plan, it times what comes before the first byte is written,
on the real layout of DeepSeek-V3 in sparse files.
"""

import argparse
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


RUNS = {"ours": run_ours, "floor": run_floor, "ancestor": run_ancestor, "import": run_import}


def drop_caches() -> bool:
    """Write back and forget all cached file pages; return whether that was permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def timed(contender: str, source: Path, out: Path) -> dict[str, float]:
    """Run one contender in a process of its own: seconds of wall and processor, peak bytes."""
    shutil.rmtree(out, ignore_errors=True)
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


def plan_seconds(folder: str) -> None:
    """Time reading the headers of DeepSeek-V3's 163 shards, and planning, in this process."""
    import fp8_cast_bf16
    from make_checkpoint import deepseek_v3_tensors, make_layout

    make_layout(Path(folder), list(deepseek_v3_tensors()), 163)
    figures = {"load": [], "plan": []}
    for _ in range(5):
        began = time.perf_counter()
        checkpoint = fp8_cast_bf16.load_checkpoint(Path(folder))
        loaded = time.perf_counter()
        fp8_cast_bf16.make_plan(checkpoint)
        figures["load"].append(loaded - began)
        figures["plan"].append(time.perf_counter() - loaded)
    medians = {name: statistics.median(seconds) for name, seconds in figures.items()}
    print(f"{len(checkpoint.tensors)} tensors: headers {medians['load']:.2f} s, ", end="")
    print(f"plan {medians['plan']:.2f} s (medians of 5)")
    print(json.dumps(medians))


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
            return plan_seconds(folder)
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
    heads = ["wall s", "least", "most", "user s", "sys s", "peak MB", "GB/s out"]
    print(f"{'':12}" + "".join(f"{head:>9}" for head in heads))
    for contender, row in figures.items():
        figure = [row[key] for key in ("wall", "least", "most", "user", "system")]
        print(f"{contender:12}" + "".join(f"{seconds:9.2f}" for seconds in figure), end="")
        rate = "" if contender == "import" else f"{written / row['wall'] / 1e9:9.2f}"
        print(f"{row['peak'] / 1e6:9.0f}{rate}")
    print(f"net of import, ours takes {against_floor:.2f} x the floor's time (median of pairs)")
    print(f"whole process, the ancestor takes {against_ancestor:.1f} x ours (median of pairs)")
    totals = {"bytes_in": read, "bytes_out": written, "ours_over_floor": against_floor}
    print(json.dumps({**totals, "ancestor_over_ours": against_ancestor, **figures}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        RUNS[sys.argv[2]](sys.argv[3], sys.argv[4])
    else:
        main()
