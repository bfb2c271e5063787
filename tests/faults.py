"""Let every single call to the operating system fail, or the process die there, and see what stays.

    python tests/faults.py FOLDER [--every N] [--kills N] [--delete-source] [--two]

In the manner of SQLite's I/O error tests: the calls that a small conversion makes about files of
its folders are counted, and then, for every k, one run each meets an error, a short count or its
death at the k-th. After each the output must hold no file that is not whole, and the next run must
end with the bytes of an undisturbed one. Then runs are killed at random times.

With --delete-source, the conversions empty their input. Then each tensor must at any time stand in
the output or be what the input still gives, which checkpoints.py computes without the converter;
and of two runs at once, into two outputs, one must be refused. With --two, each spoiled run of this
kind is followed by one into another checkpoint's output, finished or not, which must refuse it.

A run is a forked child of this process, which has torch imported and no thread running. Prints the
number of faults of each kind; raises AssertionError for the first that has bad consequences.
"""

import argparse
import builtins
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
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

import checkpoints
import fp8_cast_bf16
from checkpoints import CONFIG, INDEX, ONE, TWO

HOLDING = "open mkdir truncate ftruncate write pwrite pwritev fsync replace rename".split()
ACTING = {*HOLDING, *"read readside pread preadv fdatasync unlink remove rmdir link".split()}
LOOKING = "stat lstat scandir listdir posix_fadvise flock".split()  # May fail without harm.
LOG = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
KINDS = {  # The calls that they happen to.
    "EIO": ACTING, "ENOSPC": HOLDING, "short": ["read", "readside", "write"], "death": ACTING}


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds, but for a lock that stayed behind: it harms nothing."""
    held = checkpoints.contents(folder)
    return {name: data for name, data in held.items() if name != ".fp8_cast_bf16.lock"}


class Layer:
    """Stand between the converter and the system: count calls, and spoil the one numbered k."""

    def __init__(self, folder: Path, kind: str = "", k: int = 0):
        self.folder, self.kind, self.k, self.calls = str(folder), kind, k, []

    def call(self, name, function, *operands, short=None, **options):
        """Make a call, unless it is the one; `short` makes it with less to read or write."""
        self.calls.append(name)
        if len(self.calls) != self.k:
            return function(*operands, **options)
        Path(self.folder, "spoiled").write_text(name)
        if self.kind == "death":
            os._exit(137)
        if self.kind == "short":
            return (short or functools.partial(function, *operands, **options))()
        number = getattr(errno, self.kind)
        named = [operand for operand in operands[:1] if isinstance(operand, str | os.PathLike)]
        raise OSError(number, os.strerror(number), *named)

    def covers(self, place) -> bool:
        """Return whether a path or a file's number is about a file of the input or the output."""
        place = place.fileno() if hasattr(place, "fileno") else place
        with contextlib.suppress(OSError):
            place = f"/proc/self/fd/{place}" if isinstance(place, int) else os.fsdecode(place)
            place = os.readlink(place) if place.startswith("/proc") else place
        return str(place).startswith((f"{self.folder}/in", f"{self.folder}/out"))

    def install(self) -> None:
        layer, real_open = self, io.open

        class File(io.FileIO):
            def through(self, name, *operands):
                function, half = getattr(super(), name), None
                if name in ("write", "readinto"):
                    data = memoryview(operands[0]).cast("B")
                    direct = fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
                    size = len(data) // 8192 * 4096 if direct else len(data) // 2
                    half = functools.partial(function, data[:size] or data)
                if name.startswith("read"):
                    name = "read" if ".safetensors" in str(self.name) else "readside"
                return layer.call(name, function, *operands, short=half)

            write = functools.partialmethod(through, "write")
            readinto = functools.partialmethod(through, "readinto")
            readall = functools.partialmethod(through, "readall")
            truncate = functools.partialmethod(through, "truncate")

        def open_file(path, mode="r", buffering=-1, *more, opener=None, **options):
            if not layer.covers(path):
                return real_open(path, mode, buffering, *more, opener=opener, **options)
            file = layer.call("open", File, path, mode.replace("b", ""), opener=opener)
            if buffering:
                kind = io.BufferedReader if mode.startswith("r") else io.BufferedWriter
                file = (io.BufferedRandom if "+" in mode else kind)(file)
            return file if "b" in mode else io.TextIOWrapper(file, *more, **options)

        builtins.open = io.open = open_file
        fcntl.flock = self.wrapped("flock", fcntl.flock)
        for name in {*ACTING, *LOOKING} - {"read", "readside", "write", "flock"}:
            setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, function):
        def call(place=".", *operands, **options):
            if self.covers(place):
                return self.call(name, function, place, *operands, **options)
            return function(place, *operands, **options)

        return call


def run(source: Path, out: Path, layer: Layer | None = None, workers: int = 1, *more: str) -> int:
    """Convert in a forked child; return its process number. What it says is in OUT.log."""
    if child := os.fork():
        return child
    status = 99
    try:
        for number in (1, 2):
            os.dup2(os.open(out.with_suffix(".log"), LOG), number)
        if layer:
            layer.install()
        options = ["--device", "cpu", "--workers", str(workers), *more]
        status = fp8_cast_bf16.cli(checkpoints.arguments(source, *options, out=out))
        if layer and not layer.kind:
            print(f"\ncalls: {' '.join(layer.calls)}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Lab:
    """A checkpoint, what must come of it, and the place where runs convert it."""

    def __init__(self, folder: Path, emptying: bool, wide: bool = False):
        """wide: with a weight whose output takes two windows."""
        folder.mkdir(parents=True)
        self.folder, self.emptying = folder, emptying
        self.given, self.source, self.out, self.other = (
            folder / name for name in ("given", "in", "out", "out2"))
        self.tensors = self.make_checkpoint(self.given, 0, wide)
        self.make_checkpoint(folder / "unlike", 1, wide)
        for name, out in (("given", "expected"), ("unlike", "finished")):
            assert exit_status(run(folder / name, folder / out)) == 0
        self.expected = contents(folder / "expected")
        for whole, part in (("expected", "partial"), ("finished", "unfinished")):
            shutil.copytree(folder / whole, folder / part)
            for name in (TWO, INDEX, "config.json"):
                (folder / part / name).unlink()

    def make_checkpoint(self, folder: Path, seed: int, wide: bool) -> dict[str, dict]:
        if self.emptying:
            expected = checkpoints.write_independent(folder, seed)
        else:
            given, expected = checkpoints.several_kinds(seed)
            checkpoints.write_checkpoint(folder, given, CONFIG)
        if wide:
            codes = checkpoints.finite_codes(2100, 4100, seed=seed)
            scale = torch.full((17, 33), 0.001)
            paths = [*folder.glob("*.safetensors")]
            given = {path.name: checkpoints.load_file(path) for path in paths}
            given[ONE] |= {"wide.weight": codes, "wide.weight_scale_inv": scale}
            checkpoints.write_checkpoint(folder, given)
            expected[ONE]["wide.weight"] = checkpoints.dequantized(codes, scale)
        (folder / "sub").mkdir()
        (folder / "sub/tokenizer.json").write_text("{}" * 3000)
        return expected

    def reset(self, earlier: str | None = None) -> None:
        """Begin anew, with an output that was made earlier or with none."""
        for folder in (self.out, self.other, self.source):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.given, self.source)
        if earlier:
            shutil.copytree(self.folder / earlier, self.out)

    def start(self, layer: Layer | None = None, workers: int = 1, out: Path | None = None) -> int:
        """Start a conversion; return its process number."""
        more = ["--delete-source"] * self.emptying
        return run(self.source, out or self.out, layer, workers, *more)

    def run(self, *operands) -> tuple[int, str]:
        """Convert; return the exit status and what was said."""
        status = exit_status(self.start(*operands))
        return status, self.out.with_suffix(".log").read_text()

    def check(self, where: str, temporary_allowed: bool) -> None:
        """Hold what a failed run left against what a whole one makes."""
        left = contents(self.out) if self.out.exists() else {}
        for name, data in left.items():
            if name.endswith(".tmp"):
                assert temporary_allowed, f"{where}: {name} is left"
            else:
                assert data == self.expected.get(name), f"{where}: {name} is not whole"
        if {INDEX, "config.json"} & {*left}:  # The config comes last.
            absent = {*self.expected} - {*left} - ({"config.json"} if INDEX in left else set())
            assert not absent, f"{where}: looks complete without {absent}"

    def check_done(self, where: str) -> None:
        """See that a run which ended well has made all that it was to make."""
        assert contents(self.out) == self.expected, where
        assert not [*self.source.rglob("*.tmp")], f"{where}: a temporary file is left in the input"
        for path in self.source.rglob("*.safetensors") if self.emptying else ():
            assert checkpoints.is_emptied(path), f"{where}: {path.name} is not emptied"

    def check_recoverable(self, where: str) -> None:
        checkpoints.assert_recoverable(
            self.source, [self.out, self.other], self.tensors if self.emptying else {}, where)

    def inject(self, workers: int, earlier: str | None, every: int, two: bool) -> dict[str, int]:
        """Spoil every call of a conversion into an empty folder, or one with an earlier output."""
        self.reset(earlier)
        status, said = self.run(Layer(self.folder), workers)
        assert status == 0, said
        self.check_done("no fault")
        calls, runs = said.rpartition("calls: ")[2].split(), Counter()
        assert len(calls) > 60 and {*"open read write fsync".split()} <= {*calls}, calls
        for kind, names in KINDS.items():
            some = [k for k, name in enumerate(calls, 1) if name in names]
            some = some[(len(kind) + workers) % every :: every]
            looks = [k for k, name in enumerate(calls, 1) if name in LOOKING and kind == "EIO"]
            for k in some + looks[workers % (4 * every) :: 4 * every]:
                where = f"{kind} at call {k} of {len(calls)}, {workers} workers, {earlier}"
                self.reset(earlier)
                where = self.spoil(Layer(self.folder, kind, k), workers, where)
                if two:
                    self.refuse("finished" if k % 2 else "unfinished", where)
                status, said = self.run(None, workers)
                assert status == 0, f"after {where}exit {status}: {said}"
                self.check_done(f"after {where}")
                runs[kind] += 1
        return dict(runs)

    def spoil(self, layer: Layer, workers: int, where: str) -> str:
        """Spoil one call, see what stays, and return what happened."""
        kind, spoiled = layer.kind, self.folder / "spoiled"
        spoiled.write_text("")
        status, said = self.run(layer, workers)
        call = spoiled.read_text()
        where += f" ({call}): exit {status}: {said}\n"
        # A folder that is to be made may exist, and with 3 workers a run may take fewer calls.
        if status == 1 or (kind in ("EIO", "ENOSPC") and call not in ("", "mkdir", *LOOKING)):
            assert status == 1 and f"\n{said}".count("\nerror: ") == 1, where
            assert "Traceback" not in said, where
            assert str(self.folder) in said.rpartition("error: ")[2], where
        assert status == 0 or kind != "short", where
        self.check_recoverable(where)
        if status == 0:
            self.check_done(where)
        else:
            self.check(where, temporary_allowed=kind == "death" or call == "unlink")
        return where

    def refuse(self, earlier: str, where: str) -> None:
        """See that this checkpoint does not get into an output of the other."""
        shutil.copytree(self.folder / earlier, self.other)
        status = exit_status(self.start(None, 1, self.other))
        assert contents(self.other) == contents(self.folder / earlier), f"{where}mixed up"
        assert status == 1, f"{where}exit {status} with the {earlier} output of another checkpoint"
        self.check_recoverable(where)

    def moments(self, times: int, share: float) -> Iterator[tuple[int, float]]:
        """Number runs, and say after how many seconds each is to be killed; begin anew each third
        time. share: of the time that a whole run takes.
        """
        randomly, began = random.Random(0), time.perf_counter()
        self.reset()
        assert self.run(None, 3)[0] == 0
        whole = time.perf_counter() - began
        for k in range(times):
            if k % 3 == 0:
                self.reset()
            yield k, randomly.random() * whole * share

    def kill(self, times: int) -> int:
        """Kill runs at random times, each going on with what the last one left."""
        killed = 0
        for k, seconds in self.moments(times, 0.7):
            child = self.start(None, 3)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            killed += exit_status(child) == -signal.SIGKILL
            self.check(f"kill {k}", temporary_allowed=True)
            self.check_recoverable(f"kill {k}")
        assert self.run(None, 3)[0] == 0
        self.check_done("after kills")
        return killed

    def race(self, times: int) -> int:
        """Start two runs at once that empty one input, and kill one of them; return how many."""
        killed, outs = 0, [self.out, self.other]
        for k, seconds in self.moments(times, 1):
            where = f"two runs at once, {k}"
            children = [self.start(None, 1, out) for out in outs]
            time.sleep(seconds)
            if k % 2:
                os.kill(children[k // 2 % 2], signal.SIGKILL)
            ends = [*map(exit_status, children)]
            killed += -signal.SIGKILL in ends
            said = "".join(out.with_suffix(".log").read_text() for out in outs)
            assert {*ends} <= {0, 1, -signal.SIGKILL} and ends != [0, 0], f"{where}: {ends}: {said}"
            self.check_recoverable(where)
            if k % 3 == 2:
                ends = [exit_status(self.start(None, 1, out)) for out in outs]
                assert sorted(ends) == [0, 1], f"after {where}: exits {ends}"
                assert contents(outs[ends.index(0)]) == self.expected, f"after {where}"
        return killed


def main() -> None:
    parser = argparse.ArgumentParser(description="Let every call of a conversion fail.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, help="spoil only every N-th call")
    parser.add_argument("--kills", type=int, default=40, help="how many runs to kill (default 40)")
    parser.add_argument("--delete-source", action="store_true", help="of runs that empty the input")
    parser.add_argument("--two", action="store_true", help="also into another checkpoint's output")
    options = parser.parse_args()
    emptying = options.delete_source or options.two
    torch.set_num_threads(1)  # A forked child would wait for OpenMP's threads, which it lacks.
    tqdm.monitor_interval = 0  # It would watch the bars in a thread.
    # The children need not import, nor look up the versions of packages, what this process has.
    metadata.version = functools.cache(metadata.version)
    folder = options.folder.resolve()
    lab, wide = Lab(folder / "small", emptying), Lab(folder / "wide", emptying, wide=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fp8_cast_bf16.main(lab.given, lab.out, dry_run=True)
    assert threading.active_count() == 1
    cases = [(lab, 1, None), (wide, 3, "partial")] + [(lab, 1, "expected")] * emptying
    for place, workers, earlier in cases:
        counts = place.inject(workers, earlier, options.every, options.two)
        print(f"{workers} workers, {earlier or 'no'} output: {counts}", flush=True)
    print(f"{wide.kill(options.kills)} of {options.kills} runs killed before their end", flush=True)
    if emptying:
        print(f"{lab.race(options.kills)} of {options.kills} pairs of runs met a kill")


if __name__ == "__main__":
    main()
