"""torchrun in a process that is forked from one that has imported torch, which takes most of the
time that a small job needs. Jobs are torchrun's own main() all the same.
"""

import multiprocessing
import os
import tempfile

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.run"])


class Job:
    """A call of torchrun, with the methods of subprocess.Popen that the tests need."""

    def __init__(self, arguments: list[str]):
        self.streams = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        names = [stream.name for stream in self.streams]
        self.process = SERVER.Process(target=run, args=(arguments, names))
        self.process.start()
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError("torchrun has not ended")

    @property
    def output(self) -> tuple[str, str]:
        """What has been written to stdout and stderr so far."""
        for stream in self.streams:
            stream.seek(0)
        return self.streams[0].read(), self.streams[1].read()


def run(arguments: list[str], streams: list[str]) -> None:
    for number, name in enumerate(streams, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    from torch.distributed.run import main

    main(arguments)
