"""Let every single call to the operating system fail, or the process die there, and see what stays.

    python tests/faults.py FOLDER [--every N] [--kills N] [--delete-source]

In the manner of SQLite's I/O error tests: calls that the writing and publishing of a small
conversion makes are counted, and then, for every k, one run each meets an error, a short count or
its death at the k-th. After each the output must hold no file that is not whole, and the next run
must end with the bytes of an undisturbed one. Then runs are killed at random times.

With --delete-source, the conversions empty their input. Then each tensor must at any time stand in
the output or be what the input still gives, which checkpoints.py computes without the converter;
and of two runs at once, into two outputs, one must be refused.

A run is a forked child of this process, which has torch imported and no thread running. Prints the
number of faults of each kind; raises AssertionError for the first that has bad consequences.
"""

import argparse
import contextlib
import errno
import fcntl
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
from collections import Counter
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
    assert_recoverable,
    contents,
    is_emptied,
    several_kinds,
    write_checkpoint,
    write_independent,
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
                if fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & fp8_cast_bf16.DIRECT:
                    half = data[: len(data) // 8192 * 4096] or data
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


def run(source: Path, out: Path, log: Path, layer: Layer | None = None, workers: int = 1,
        *more: str) -> int:
    """Convert in a forked child, with more options; return its process number."""
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
        options = ["--device", "cpu", "--workers", str(workers), *more]
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


class Lab:
    """A checkpoint, what must come of it, and the place where runs convert it."""

    def __init__(self, folder: Path, emptying: bool):
        self.folder, self.emptying = folder, emptying
        self.given, self.source, self.out, self.other, self.log, self.spoiled = (
            folder / name for name in ("given", "in", "out", "other", "log", "spoiled"))
        self.tensors = several_kinds()[1]
        if emptying:
            self.tensors = write_independent(self.given)
            write_independent(folder / "unlike", seed=1)
        for name, seed in (("given", 0), ("unlike", 1)):
            if not emptying:
                write_checkpoint(folder / name, several_kinds(seed)[0], CONFIG)
            (folder / name / "sub").mkdir()
            (folder / name / "sub/tokenizer.json").write_text("{}" * 3000)
        for name, out in (("given", "expected"), ("unlike", "stale")):
            assert exit_status(run(folder / name, folder / out, self.log)) == 0
        self.expected = contents(folder / "expected")
        shutil.copytree(self.given, self.source)

    def reset(self, earlier: str | None = None) -> None:
        """Begin anew, with an output that was made earlier or with none."""
        for folder in (self.out, self.other):
            shutil.rmtree(folder, ignore_errors=True)
        if earlier:
            shutil.copytree(self.folder / earlier, self.out)
        if self.emptying:
            shutil.rmtree(self.source)
            shutil.copytree(self.given, self.source)

    def run(self, layer: Layer | None = None, workers: int = 1, out: Path | None = None) -> int:
        """Start a conversion; return its process number."""
        more = ["--delete-source"] if self.emptying else []
        log = self.log if out is None else out.with_suffix(".log")
        return run(self.source, out or self.out, log, layer, workers, *more)

    def check_done(self, where: str) -> None:
        """See that a run which ended well has made all that it was to make."""
        assert contents(self.out) == self.expected, where
        for path in self.source.rglob("*.safetensors") if self.emptying else ():
            assert is_emptied(path), f"{where}: {path.name} is not emptied"

    def check_recoverable(self, where: str) -> None:
        if self.emptying:
            assert_recoverable(self.source, [self.out, self.other], self.tensors, where)

    def inject(self, workers: int, earlier: str | None, every: int) -> dict[str, int]:
        """Spoil every call of a conversion into an empty folder, or one with an earlier output."""
        self.reset(earlier)
        assert exit_status(self.run(Layer(), workers)) == 0
        self.check_done("no fault")
        calls = int(self.log.read_text().rpartition("calls ")[2])
        assert calls > 60, calls
        runs = Counter()
        for kind in KINDS:
            for k in range(1 + (len(kind) + workers) % every, calls + 1, every):
                where = f"{kind} at call {k} of {calls}, {workers} workers, earlier: {earlier}"
                self.meet(kind, k, workers, earlier, where)
                runs[kind] += 1
        return dict(runs)

    def meet(self, kind: str, k: int, workers: int, earlier: str | None, where: str) -> None:
        """Spoil one call, and see what stays and that the next run completes it."""
        self.reset(earlier)
        self.spoiled.write_text("")
        status = exit_status(self.run(Layer(kind, k, self.spoiled), workers))
        said, call = self.log.read_text(), self.spoiled.read_text()
        where += f" ({call})"
        # A folder that is to be made may exist, and with 3 workers a run may take fewer calls.
        if kind in ("EIO", "ENOSPC") and (status or call not in ("mkdir", "")):
            assert status == 1, f"{where}: exit {status}: {said}"
            assert said.count("\nerror: ") == 1, f"{where}: {said}"
            assert str(self.folder) in said.rpartition("error: ")[2], f"{where}: {said}"
            assert "Traceback" not in said, f"{where}: {said}"
        if kind == "short":
            assert status == 0, f"{where}: exit {status}: {said}"
        self.check_recoverable(where)
        if status == 0:
            self.check_done(where)
        elif earlier != "stale":
            temporary_allowed = kind == "death" or call == "unlink"
            check(self.out, self.expected, where, temporary_allowed)
        again = exit_status(self.run(None, workers))
        assert again == 0, f"after {where}: exit {again}: {self.log.read_text()}"
        self.check_done(f"after {where}")

    def kill(self, times: int) -> int:
        """Kill runs at random times, each going on with what the last one left."""
        randomly, killed = random.Random(0), 0
        self.reset()
        began = time.perf_counter()
        assert exit_status(self.run(None, 3)) == 0
        whole = time.perf_counter() - began
        for k in range(times):
            if k % 3 == 0:
                self.reset()
            child = self.run(None, 3)
            time.sleep(randomly.random() * whole * 0.7)
            os.kill(child, signal.SIGKILL)
            killed += exit_status(child) == -signal.SIGKILL
            check(self.out, self.expected, f"kill {k}", temporary_allowed=True)
            self.check_recoverable(f"kill {k}")
        assert exit_status(self.run(None, 3)) == 0
        self.check_done("after kills")
        return killed

    def race(self, times: int) -> int:
        """Start two runs at once that empty one input, and kill one of them; return how many."""
        randomly, killed, outs = random.Random(0), 0, [self.out, self.other]
        self.reset()
        began = time.perf_counter()
        assert exit_status(self.run()) == 0
        whole = time.perf_counter() - began
        for k in range(times):
            where = f"two runs at once, {k}"
            if k % 3 == 0:
                self.reset()
            children = [self.run(None, 1, out) for out in outs]
            time.sleep(randomly.random() * whole)
            if k % 2:
                os.kill(randomly.choice(children), signal.SIGKILL)
            ends = [*map(exit_status, children)]
            killed += -signal.SIGKILL in ends
            said = "".join(out.with_suffix(".log").read_text() for out in outs)
            assert {*ends} <= {0, 1, -signal.SIGKILL}, f"{where}: exits {ends}: {said}"
            assert ends != [0, 0], f"{where}: both emptied the input"
            self.check_recoverable(where)
            if k % 3 == 2:
                ends = [exit_status(self.run(None, 1, out)) for out in outs]
                assert sorted(ends) == [0, 1], f"after {where}: exits {ends}"
                assert contents(outs[ends.index(0)]) == self.expected, f"after {where}"
        return killed


def main() -> None:
    parser = argparse.ArgumentParser(description="Let every call of a conversion fail.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, help="spoil only every N-th call")
    parser.add_argument("--kills", type=int, default=40, help="how many runs to kill (default 40)")
    parser.add_argument("--delete-source", action="store_true", help="of runs that empty the input")
    options = parser.parse_args()
    torch.set_num_threads(1)  # A forked child would wait for OpenMP's threads, which it lacks.
    fp8_cast_bf16.WINDOW = WINDOW
    lab = Lab(options.folder, options.delete_source)
    # The children need not import, nor look up the versions of packages, what this process has.
    metadata.version = functools.cache(metadata.version)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fp8_cast_bf16.main(lab.given, lab.out, dry_run=True)
    assert threading.active_count() == 1
    cases = [(1, None), (3, "stale")] + [(1, "expected")] * options.delete_source
    for workers, earlier in cases:
        counts = lab.inject(workers, earlier, options.every)
        print(f"{workers} workers, {earlier or 'no'} output: {counts}", flush=True)
    print(f"{lab.kill(options.kills)} of {options.kills} runs killed before their end", flush=True)
    if options.delete_source:
        print(f"{lab.race(options.kills)} of {options.kills} pairs of runs met a kill")


if __name__ == "__main__":
    main()
