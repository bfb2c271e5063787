"""torchrun, and single ranks, in processes that are forked from one that has imported torch, which
takes most of the time that a small job needs; and what disturbs ranks.
"""

import itertools
import multiprocessing
import os
import shutil  # noqa: F401 -- for what disturbs
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.run", "safetensors", "tqdm", "triton.language"])
SCRIPT = f"""import os, subprocess, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]}
import agent
agent.convert({{disturb!r}}, sys.argv[1:])
"""


class Job:
    """A call of torchrun, or a rank of a job without it, with the methods of subprocess.Popen that
    the tests need.
    """

    def __init__(self, target: Callable, *arguments):
        self.streams = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        names = [stream.name for stream in self.streams]
        self.process = SERVER.Process(target=begin, args=(names, target, *arguments))
        self.process.start()
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> "Job":
        """Wait for its end, at most five minutes."""
        self.process.join(300)
        if self.poll() is None:
            self.terminate()  # An agent ends its ranks, too.
            raise TimeoutError(f"the job has not ended: {self.err}")
        return self

    @property
    def out(self) -> str:
        return Path(self.streams[0].name).read_text()

    @property
    def err(self) -> str:
        return Path(self.streams[1].name).read_text()


def begin(streams: list[str], target: Callable, *arguments) -> None:
    for number, name in enumerate(streams, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    target(*arguments)


def torchrun(*arguments: str) -> None:
    from torch.distributed.run import main

    main(arguments)


def rank(number: int, count: int, disturb: str, arguments: list[str]) -> None:
    """Convert as torchrun would let this rank do."""
    values = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": count,
              "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ |= {name: str(value) for name, value in values.items()}
    convert(disturb, arguments)


def convert(disturb: str, arguments: list[str]) -> None:
    """Run the command line in this process, with tiny windows, after what disturbs it."""
    import fp8_cast_bf16

    fp8_cast_bf16.WINDOW = 1 << 12
    numbers = {name.lower(): int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE")}
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    exec(disturb, globals() | numbers | {"attempt": attempt, "arguments": arguments})
    sys.exit(fp8_cast_bf16.cli(arguments))


# --- what disturbs a rank ---


def each_window(act: Callable[[int], object]) -> None:
    """Call a function with the number of each window of a shard that is about to be written."""
    real, numbers = os.open, itertools.count(1)

    def opened(path, flags, *more, **options):
        if flags & os.O_RDWR and str(path).endswith(".tmp"):
            act(next(numbers))
        return real(path, flags, *more, **options)

    os.open = opened


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def await_files(folder: str, pattern: str, count: int = 1) -> None:
    while len([*Path(folder).glob(pattern)]) < count:
        time.sleep(0.01)


def hurry(times: int = 600) -> None:
    """Let the clock run faster."""
    clock, sleep = time.monotonic, time.sleep
    time.monotonic = lambda: times * clock()
    time.sleep = lambda seconds: sleep(seconds / times)
