"""Let strace spoil the system calls of a conversion, one a run, and see what stays.

    python tests/strace.py FOLDER [--every N] [--keep-going] [--calls read,write] [--faults EIO]
                            [--delete-source]

faults.py stands between the converter and Python's functions; here the kernel itself returns the
error or delivers the signal, in whatever call Python makes. Calls count that are about a file of
the input or the output. Faults are met in the main thread, in the first worker, or at the N-th call
of each of several threads that go on with the output of a stopped run. Prints a table of how runs
ended, and ends with the first that has bad consequences. Exit status 77: strace may not trace here.
With --delete-source, the conversions empty their input, and no tensor may be lost, as in faults.py.
"""

import argparse
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from importlib import metadata
from pathlib import Path

import faults  # Which makes the path to the converter known.
import torch

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    INDEX,
    KEY,
    ONE,
    SHARD,
    TWO,
    assert_holds,
    assert_recoverable,
    contents,
    is_emptied,
    metadata_of,
    several_kinds,
    write_checkpoint,
    write_independent,
)

CALLS = """openat read pread64 preadv2 getdents64 newfstatat write pwrite64 ftruncate fsync close
    rename renameat renameat2 unlink unlinkat mkdir mkdirat flock fadvise64""".split()
FAULTS = "EIO ENOSPC EDQUOT EINTR EAGAIN SIGKILL SIGTERM".split()
ENDS = {"SIGKILL": [-signal.SIGKILL], "SIGTERM": [0, 143]}  # Exit statuses; of others 0 and 1.
WAYS = {"main": 1, "worker": 1, "all": 3}  # Which threads meet faults, and how many workers.
SIDE = ["tokenizer.json", "sub/vocab.json"]
LIMIT = 60  # Seconds for a run.


class Attaching:
    """Make a forked child wait, in one of its threads, until strace is attached to that."""

    def __init__(self, way: str):
        self.kind, self.way, self.pipes = "strace", way, [*os.pipe(), *os.pipe()]

    def install(self) -> None:
        signal.signal(signal.SIGTERM, fp8_cast_bf16.end)
        signal.alarm(LIMIT)
        if self.way != "worker":
            return self.wait()
        real = threading.Thread.run

        def run_first(thread: threading.Thread) -> None:
            threading.Thread.run = real
            self.wait()
            real(thread)

        threading.Thread.run = run_first

    def wait(self) -> None:
        os.write(self.pipes[1], b"%d" % threading.get_native_id())
        os.read(self.pipes[2], 1)

    def attach(self, *options) -> subprocess.Popen:
        thread = os.read(self.pipes[0], 99).decode()
        strace = subprocess.Popen(["strace", *options, *["-f"] * (self.way == "all"), "-p", thread],
                                  stderr=subprocess.PIPE, text=True)
        said = strace.stderr.readline()
        os.write(self.pipes[3], b".")
        if "attached" not in said:
            print(f"strace may not trace here: {said}", file=sys.stderr)
            sys.exit(77)
        return strace


class Lab:
    """A checkpoint, what must come of it, and runs with strace attached."""

    def __init__(self, folder: Path, emptying: bool):
        self.given, self.source, self.out, self.log, self.trace = (
            folder / name for name in ("given", "in", "out", "log", "trace"))
        if emptying:
            self.tensors = write_independent(self.given)
        else:
            given, self.tensors = several_kinds()
            write_checkpoint(self.given, given, CONFIG)
            self.tensors[f"sub/{SHARD}"] = {"draft": torch.ones(3)}
            write_checkpoint(self.given / "sub", {SHARD: {"draft": torch.ones(3)}}, index=False)
        for name in SIDE:
            (self.given / name).parent.mkdir(exist_ok=True)
            (self.given / name).write_text("{}" * 3000)
        shutil.copytree(self.given, self.source)
        self.more = []
        assert self.run() == 0, self.log.read_text()
        self.more = ["--delete-source"] if emptying else []
        self.expected = contents(self.out)
        configs = ["draft/config.json"] if emptying else []
        assert {*self.expected} == {*self.tensors, *SIDE, INDEX, "config.json", *configs}
        for shard, values in self.tensors.items():
            assert_holds(self.out / shard, values)
        self.names = [*self.expected, *(f"{name}.tmp" for name in self.expected), "sub", "."]
        self.names += ["draft"] if emptying else []
        self.names += [f"{name}.{metadata_of(self.out / name)[KEY]}.tmp" for name in self.tensors]

    def run(self, way: str | None = None, *options: str) -> int:
        """Convert, in one of the ways under strace with these options; return the exit status."""
        if way:
            for folder in (self.out, self.source):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.given, self.source)
        if way == "all":
            self.out.mkdir()
            (self.out / ONE).write_bytes(self.expected[ONE])
            [name] = (name for name in self.names if re.fullmatch(rf"{TWO}\..{{16}}\.tmp", name))
            (self.out / name).write_bytes(self.expected[TWO][:5000])
        layer = Attaching(way) if way else None
        child = faults.run(self.source, self.out, self.log, layer, WAYS.get(way, 1), *self.more)
        if way:
            paths = [folder / name for folder in (self.source, self.out) for name in self.names]
            paths.append(self.out / f"fp8_cast_bf16{child}.tmp")
            options += ("-o", self.trace, *(f"--trace-path={path}" for path in paths))
            strace = layer.attach(*options)
        status = faults.exit_status(child)
        if way:
            strace.communicate()
            for end in layer.pipes:
                os.close(end)
        return status

    def count(self, way: str) -> dict[str, int]:
        """Return how often each call is made in an undisturbed run, at most by one thread."""
        assert self.run(way, f"--trace={','.join(CALLS)}") == 0, self.log.read_text()
        found = Counter(re.findall(r"(?m)^((?:\d+ +)?)(\w+)\(", self.trace.read_text()))
        return {call: max(n for (_, name), n in found.items() if name == call)
                for call in CALLS if call in [name for _, name in found]}

    def inject(self, way: str, call: str, fault: str, when: str) -> str:
        """Spoil a call, the N-th, or all from there on (N+). Returns how the run ended."""
        kind = "signal" if fault.startswith("SIG") else "error"
        option = f"--inject={call}:{kind}={fault}:when={when}"
        status = self.run(way, f"--trace={call}", option)
        said, left = self.log.read_text(), contents(self.out) if self.out.exists() else {}
        met = re.findall(r".*INJECTED.*|.*SIGKILL.*|.*SIGTERM.*", self.trace.read_text())
        where = "\n".join([f"{way}, strace {option}: exit {status}", *met, said, ""])
        assert status in (ENDS.get(fault, [0, 1]) if met else [0]), where
        assert "Traceback" not in said, where
        whole = {name: data for name, data in left.items() if not name.endswith(".tmp")}
        for name, data in whole.items():
            assert data == self.expected.get(name), f"{where}{name} is not whole"
        if status == 0 or "config.json" in whole:
            absent = sorted({*self.expected} - {*whole})
            assert not absent, f"{where}looks complete without {absent}"
        assert left == whole or status, f"{where}temporary files are left: {sorted(left)}"
        assert_recoverable(self.source, [self.out], self.tensors, where)
        again = self.run()
        assert again == 0, f"{where}exit {again} of the next run: {self.log.read_text()}"
        assert contents(self.out) == self.expected, f"{where}the next run gives other bytes"
        emptied = [*map(is_emptied, self.source.rglob("*.safetensors"))]
        assert all(emptied) or not self.more, f"{where}the next run leaves input"
        return ("error" if status else "exit 0") if met else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description="Let strace spoil calls of a conversion.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=4, help="spoil every N-th call (default 4)")
    parser.add_argument("--on", action="store_true", help="spoil all calls from the N-th on")
    parser.add_argument("--keep-going", action="store_true", help="go on after what ends badly")
    parser.add_argument("--delete-source", action="store_true", help="of runs that empty the input")
    for option, names in {"calls": CALLS, "faults": FAULTS, "ways": WAYS}.items():
        parser.add_argument(f"--{option}", default=",".join(names), help="default: %(default)s")
    options = parser.parse_args()
    if not shutil.which("strace"):
        print("strace is not there", file=sys.stderr)
        sys.exit(77)
    torch.set_num_threads(1)  # A forked child would wait for OpenMP's threads, which it lacks.
    metadata.version = functools.cache(metadata.version)
    lab, bad = Lab(options.folder.resolve(), options.delete_source), 0
    kinds = options.faults.split(",")
    print("runs that met a fault: ended with an error/with exit 0/badly")
    print(f"{'':18}", *(f"{kind:>9}" for kind in kinds))
    for way in options.ways.split(","):
        for call, count in lab.count(way).items():
            if call not in options.calls.split(","):
                continue
            print(f"{way:6} {call:11}", end="")
            for number, kind in enumerate(kinds):
                ends = Counter()
                # Of the most frequent call, any error means the same.
                few = call == "newfstatat" and kind != "EIO"
                for k in range(1 + number % options.every, 0 if few else count + 1, options.every):
                    try:
                        ends[lab.inject(way, call, kind, f"{k}{'+' * options.on}")] += 1
                    except AssertionError as error:
                        print(f"\nBAD: {error}\n", file=sys.stderr, flush=True)
                        if not options.keep_going:
                            sys.exit(1)
                        ends["bad"] += 1
                bad += ends["bad"]
                cell = f"{ends['error']}/{ends['exit 0']}/{ends['bad']}"
                print(f"{cell:>10}", end="", flush=True)
            print()
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
