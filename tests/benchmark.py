"""Measure the converter against the disk and against the algorithm that it replaces.

    python tests/benchmark.py [--size BYTES] [--shards N] [--runs N] [--folder FOLDER]
    python tests/benchmark.py --plan
    python tests/benchmark.py --ranks

Contenders, each a process of its own, take turns on one synthetic checkpoint:

- ours: the converter as it is.
- floor: the same reads and the same writes in the same windows by the same workers, no arithmetic.
- ancestor: load_file, torch's float8 cast, save_file, on the CPU, one shard at a time.

Then, on the output of ours:

- verify: ours with --verify.
- again: ours once more, which finds nothing to do.

Before each run the page cache is dropped where that is permitted. Prints medians with their spread
and ends with one line of JSON. With --plan, it times --dry-run and a run that finds nothing to do
on the real layout of DeepSeek-V3, in sparse files and with what they hold cached. With --ranks, it
times one and two ranks of torchrun on one machine, and rehearses more: how evenly DeepSeek-V3's
bytes fall on them if all are equally fast, and what their store has to bear and can.
"""

import argparse
import collections
import functools
import heapq
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import zip_longest
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


RUNS = {"ours": run_ours, "floor": run_floor, "ancestor": run_ancestor, "import": run_import}
LATER_RUNS = {"verify": run_verify, "again": run_again}
PLAN_RUNS = {"import": run_import, "dry": run_dry, "again": run_again}
RANK_RUNS = {
    "1 rank": functools.partial(run_ranks, ranks=1),
    "2 ranks": functools.partial(run_ranks, ranks=2),
}
ALL_RUNS = {**RUNS, **LATER_RUNS, **PLAN_RUNS, **RANK_RUNS, "layout": run_layout}


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


def measure_ranks(folder: Path, options: argparse.Namespace) -> None:
    """Time one and two ranks in turn on one machine, then rehearse many."""
    source, out = folder / "fp8", folder / "bf16"
    make_source(source, options)
    runs = {contender: [] for contender in RANK_RUNS}
    for contender in [*RANK_RUNS] * options.runs:
        shutil.rmtree(out, ignore_errors=True)
        runs[contender].append(timed(contender, source, out))
    figures = {contender: summarize(results) for contender, results in runs.items()}
    print_table(figures, sum(path.stat().st_size for path in out.glob("*.safetensors")))
    pairs = zip(*runs.values(), strict=True)
    ratio = statistics.median(one["wall"] / two["wall"] for one, two in pairs)
    print(f"two ranks are {ratio:.2f} x as fast as one (median of pairs, whole processes)")
    shutil.rmtree(folder / "fp8")
    print(json.dumps({"two_over_one": ratio, **figures, **rehearse_ranks(folder / "layout")}))


def make_source(source: Path, options: argparse.Namespace) -> None:
    maker = [sys.executable, ROOT / "tests/make_checkpoint.py", source]
    arguments = ["--size", options.size, "--shards", str(options.shards)]
    subprocess.run([*maker, *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the converter.")
    parser.add_argument("--size", default="2.8G", help="bytes of the checkpoint (default 2.8G)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5, help="of each contender (default 5)")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="on which disk")
    parser.add_argument("--plan", action="store_true", help="time planning DeepSeek-V3 instead")
    parser.add_argument("--ranks", action="store_true", help="time ranks of torchrun instead")
    options = parser.parse_args()
    if options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            return measure_ranks(Path(folder), options)
    if options.plan:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            return measure_plan(Path(folder), options.runs)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder, "fp8"), Path(folder, "bf16")
        make_source(source, options)
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
