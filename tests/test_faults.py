"""Errors and death in the middle of a conversion."""

import re
import shutil
import subprocess
import sys

import pytest

import fp8_cast_bf16
from checkpoints import INDEX, ONE, ROOT, TWO, Usage, arguments, contents
from fp8_cast_bf16 import cli, main


def test_every_third_failing_call_and_sudden_death_leaves_what_a_next_run_completes(tmp_path):
    command = [sys.executable, ROOT / "tests/faults.py", tmp_path, "--every", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [int(count) for count in re.findall(r"'\w+': (\d+)", done.stdout)]
    assert len(counts) == 8
    assert min(counts) > 40
    assert int(re.search(r"(\d+) of 40 runs killed", done.stdout)[1]) > 10


def test_some_calls_that_strace_lets_fail_leave_what_a_next_run_completes(tmp_path):
    command = [sys.executable, ROOT / "tests/strace.py", tmp_path, "--every", "40"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    cells = re.findall(r"(\d+)/(\d+)/0\b", done.stdout)
    assert sum(int(count) for cell in cells for count in cell) > 50


@pytest.mark.parametrize("problem", [RuntimeError("GPU\nis gone"), MemoryError("no memory")])
def test_a_worker_that_raises_ends_the_run(source, monkeypatch, capsys, problem):
    real, calls = fp8_cast_bf16.render_weight, []

    def fail(*operands):
        calls.append(operands)
        if len(calls) == 3:
            raise problem
        return real(*operands)

    monkeypatch.setattr(fp8_cast_bf16, "render_weight", fail)
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    assert cli(arguments(source)) == 1
    error = str(problem).splitlines()[0]
    if isinstance(problem, MemoryError):
        error = f"out of memory: {error}; try --workers 1"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error}"
    assert contents(source.parent / "out") == {}


def test_a_disk_that_fills_up_ends_the_run_and_space_lets_it_go_on(source, monkeypatch, capsys):
    out = source.parent / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", out]).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
            assert cli(arguments(source)) == 1
        error = capsys.readouterr().err
        assert "No space left on device" in error
        assert re.search(rf"({TWO}|{ONE})\.[0-9a-f]{{16}}\.tmp", error)
        assert not {INDEX, "config.json"} & {*contents(out)}
        assert not [name for name in contents(out) if name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=3m", out], check=True)
        main(source, out)
        main(source, source.parent / "expected")
        assert contents(out) == contents(source.parent / "expected")
    finally:
        subprocess.run(["umount", out], check=True)
