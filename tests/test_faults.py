"""Errors and death in the middle of a conversion."""

import errno
import os
import re
import shutil
import subprocess

import pytest

import checkpoints
from checkpoints import INDEX, ONE, TWO, Usage, contents
from fp8_cast_bf16 import main


@pytest.mark.parametrize("more", ["--every 3", "--every 50 --kills 6 --delete-source"])
def test_after_a_failing_call_sudden_death_or_a_kill_the_next_run_completes_the_output(
        tmp_path, more):
    said = checkpoints.python("tests/faults.py", tmp_path, *more.split()).stdout
    cases = re.findall(r"{'EIO': (\d+), 'ENOSPC': (\d+), 'short': (\d+), 'death': (\d+)}", said)
    assert len(cases) == (3 if "source" in more else 2)
    assert min(int(count) for case in cases for count in case) > 0
    assert sum(int(count) for case in cases for count in case) > 50
    assert re.search(r"[1-9]\d* of \d+ runs killed", said)


def test_a_config_that_cannot_be_looked_up_is_not_taken_for_absent(source, monkeypatch, capsys):
    """The first look at the name itself fails; those at what it leads to do not count."""
    config, stat, failed = str(source / "config.json"), os.stat, []

    def look(path, *more, follow_symlinks=False, **options):
        if str(path) == config and not follow_symlinks and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), config)
        return stat(path, *more, follow_symlinks=follow_symlinks, **options)

    monkeypatch.setattr(os, "lstat", look)
    monkeypatch.setattr(os, "stat", lambda path, *more, follow_symlinks=True, **options: look(
        path, *more, follow_symlinks=follow_symlinks, **options))
    assert checkpoints.fails(capsys, source) == f"error: {config}: Input/output error"
    assert failed
    assert not (source.parent / "out").exists()


def test_a_disk_that_fills_up_ends_the_run_and_space_lets_it_go_on(source, monkeypatch, capsys):
    out = source.parent / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", out]).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
            error = checkpoints.fails(capsys, source)
        temporary = rf"({TWO}|{ONE})\.[0-9a-f]{{16}}\.[0-9a-f]{{8}}\.tmp"
        assert re.search(f"{temporary}: No space left on device", error)
        assert not {INDEX, "config.json"} & {*contents(out)}
        assert not [name for name in contents(out) if name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=3m", out], check=True)
        main(source, out)
        main(source, source.parent / "expected")
        assert contents(out) == contents(source.parent / "expected")
    finally:
        subprocess.run(["umount", out], check=True)
