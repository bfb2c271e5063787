"""Let every single call to the operating system fail, or the process die there, and see what stays.

    python tests/faults.py FOLDER [--every N] [--kills N]

In the manner of SQLite's I/O error tests: calls that the writing and publishing of a small
conversion makes are counted, and then, for every k, one run each meets an error, a short count or
its death at the k-th. After each the output must hold no file that is not whole, and the next run
must end with the bytes of an undisturbed one. Then runs are killed at random times.

A run is a forked child of this process, which has torch imported and no thread running. Prints the
number of faults of each kind; raises AssertionError for the first that has bad consequences.
"""

import argparse
import contextlib
import errno
import functools
import io
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import fp8_cast_bf16  # noqa: E402
from checkpoints import (  # noqa: E402
    CONFIG,
    INDEX,
    arguments,
    contents,
    several_kinds,
    write_checkpoint,
)

KINDS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "short": None, "death": None}
FUNCTIONS = ["open", "fsync", "replace", "unlink", "mkdir", "rmdir", "rename", "link"]
WINDOW = 16 << 12


class Layer:
    """Stand between the converter and the system: count calls, and spoil the one numbered k."""

    def __init__(self, kind: str | None = None, k: int = 0, spoiled: Path | None = None):
        self.kind, self.k, self.spoiled, self.calls = kind, k, spoiled, []

    def call(self, name, function, *operands, short=None, **options):
        """Make a call, unless it is the one; `short` makes it with less to read or write."""
        self.calls.append(name)
        if len(self.calls) != self.k:
            return function(*operands, **options)
        self.spoiled.write_text(name)
        if self.kind == "death":
            os._exit(137)
        if self.kind == "short":
            return short() if short else function(*operands, **options)
        named = [operand for operand in operands[:1] if isinstance(operand, str | os.PathLike)]
        raise OSError(KINDS[self.kind], os.strerror(KINDS[self.kind]), *named)

    def install(self) -> None:
        layer = self

        class File(io.FileIO):
            def write(self, data):
                data = memoryview(data).cast("B")
                half = data[: len(data) // 8192 * 4096] or data  # what direct I/O could give
                write = super().write
                return layer.call("write", write, data, short=lambda: write(half))

            def readinto(self, data):
                data = memoryview(data).cast("B")
                half, read = data[: len(data) // 2 + 1], super().readinto
                return layer.call("read", read, data, short=lambda: read(half))

            def truncate(self, size=None):
                return layer.call("truncate", super().truncate, size)

        def open_file(path, mode="r", buffering=-1, encoding=None, opener=None):
            raw = layer.call("open", File, path, mode.replace("b", ""), opener=opener)
            if buffering == 0:
                return raw
            return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)

        fp8_cast_bf16.open = open_file
        for name in FUNCTIONS:
            setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, function):
        return lambda *operands, **options: self.call(name, function, *operands, **options)


def run(source: Path, out: Path, log: Path, layer: Layer | None = None, workers: int = 1) -> int:
    """Convert in a forked child; return its process number."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        fp8_cast_bf16.WINDOW = WINDOW
        if layer:
            layer.install()
        options = ["--device", "cpu", "--workers", str(workers)]
        status = fp8_cast_bf16.cli(arguments(source, *options, out=out))
        if layer and layer.kind is None:
            os.write(1, f"\ncalls {len(layer.calls)}".encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(out: Path, expected: dict[str, bytes], where: str, temporary_allowed: bool) -> None:
    """Hold what a failed run left against what a whole one makes."""
    left = contents(out) if out.exists() else {}
    for name, data in left.items():
        if name.endswith(".tmp"):
            assert temporary_allowed, f"{where}: {name} is left"
        else:
            assert data == expected.get(name), f"{where}: {name} is not whole"
    if {INDEX, "config.json"} & {*left}:  # The config comes last.
        absent = [name for name in expected if name not in left
                  and (name != "config.json" or INDEX not in left)]
        assert not absent, f"{where}: looks complete without {absent}"


def inject(folder: Path, workers: int, stale: Path | None, every: int) -> dict[str, int]:
    """Spoil every call of a conversion into an empty folder, or one with a stale output."""
    source, out, log, spoiled = (folder / name for name in ("in", "out", "log", "spoiled"))
    expected = contents(folder / "expected")

    def reset():
        shutil.rmtree(out, ignore_errors=True)
        if stale:
            shutil.copytree(stale, out)

    reset()
    assert exit_status(run(source, out, log, Layer(), workers)) == 0
    assert contents(out) == expected
    calls = int(log.read_text().rpartition("calls ")[2])
    assert calls > 60, calls
    for kind in KINDS:
        for k in range(1 + (len(kind) + workers) % every, calls + 1, every):
            reset()
            where = f"{kind} at call {k} of {calls}, {workers} workers, stale: {bool(stale)}"
            spoiled.write_text("")
            status = exit_status(run(source, out, log, Layer(kind, k, spoiled), workers))
            said, call = log.read_text(), spoiled.read_text()
            where += f" ({call})"
            # A folder that is to be made may exist, and with 3 workers a run may take fewer calls.
            if kind in ("EIO", "ENOSPC") and (status or call not in ("mkdir", "")):
                assert status == 1, f"{where}: exit {status}: {said}"
                assert said.count("\nerror: ") == 1, f"{where}: {said}"
                assert str(folder) in said.rpartition("error: ")[2], f"{where}: {said}"
                assert "Traceback" not in said, f"{where}: {said}"
            if kind == "short":
                assert status == 0, f"{where}: exit {status}: {said}"
            if status == 0:
                assert contents(out) == expected, where
            elif stale is None:
                check(out, expected, where, temporary_allowed=kind == "death" or call == "unlink")
            again = exit_status(run(source, out, log, None, workers))
            assert again == 0, f"after {where}: exit {again}: {log.read_text()}"
            assert contents(out) == expected, f"after {where}"
    return dict.fromkeys(KINDS, calls)


def kill(folder: Path, times: int) -> int:
    """Kill runs at random times, each going on with what the last one left."""
    source, out, log = folder / "in", folder / "out", folder / "log"
    expected, randomly, killed = contents(folder / "expected"), random.Random(0), 0
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    assert exit_status(run(source, out, log, None, 3)) == 0
    whole = time.perf_counter() - began
    for k in range(times):
        if k % 3 == 0:
            shutil.rmtree(out, ignore_errors=True)
        child = run(source, out, log, None, 3)
        time.sleep(randomly.random() * whole * 0.7)
        os.kill(child, signal.SIGKILL)
        killed += exit_status(child) == -signal.SIGKILL
        check(out, expected, f"kill {k}", temporary_allowed=True)
    assert exit_status(run(source, out, log, None, 3)) == 0
    assert contents(out) == expected
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description="Let every call of a conversion fail.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, help="spoil only every N-th call")
    parser.add_argument("--kills", type=int, default=40, help="how many runs to kill (default 40)")
    options = parser.parse_args()
    folder = options.folder
    torch.set_num_threads(1)  # A forked child would wait for OpenMP's threads, which it lacks.
    for name, seed in (("in", 0), ("other", 1)):
        write_checkpoint(folder / name, several_kinds(seed)[0], CONFIG)
        (folder / name / "sub").mkdir()
        (folder / name / "sub/tokenizer.json").write_text("{}" * 3000)
    fp8_cast_bf16.WINDOW = WINDOW
    for name, out in (("in", "expected"), ("other", "stale")):
        assert exit_status(run(folder / name, folder / out, folder / "log")) == 0
    # The children need not import, nor look up the versions of packages, what this process has.
    metadata.version = functools.cache(metadata.version)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fp8_cast_bf16.main(folder / "in", folder / "out", dry_run=True)
    assert threading.active_count() == 1
    for workers, stale in ((1, None), (3, folder / "stale")):
        counts = inject(folder, workers, stale, options.every)
        print(f"{workers} workers, {'stale' if stale else 'no'} output: {counts}", flush=True)
    print(f"{kill(folder, options.kills)} of {options.kills} runs killed before their end")


if __name__ == "__main__":
    main()
