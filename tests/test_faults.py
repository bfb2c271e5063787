"""Errors and death in the middle of a conversion, and the order that outlives a power cut."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fp8_cast_bf16
from checkpoints import CONFIG, INDEX, ONE, TWO, contents, several_kinds, write_checkpoint
from fp8_cast_bf16 import cli, main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    folder = write_checkpoint(tmp_path / "in", several_kinds()[0], CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def arguments(source):
    return ["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(source.parent / "out")]


def test_every_other_failing_call_and_sudden_death_leaves_what_a_next_run_completes(tmp_path):
    command = [sys.executable, ROOT / "tests/faults.py", tmp_path, "--every", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [int(count) for count in re.findall(r"'\w+': (\d+)", done.stdout)]
    assert len(counts) == 8
    assert min(counts) > 60
    assert int(re.search(r"(\d+) of 40 runs killed", done.stdout)[1]) > 10


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
        error = f"the memory does not suffice: {error}; try --workers 1"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error}"
    assert contents(source.parent / "out") == {}


def test_names_are_given_only_to_synced_files_and_index_and_config_come_last(source, monkeypatch):
    out, events = source.parent / "out", []
    fsync, replace = os.fsync, os.replace

    def log_fsync(number):
        events.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def log_replace(old, new):
        events.append(("name", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    main(source, out)
    named = [name for event, name in events if event == "name"]
    assert {*named[:2]} == {str(out / ONE), str(out / TWO)}
    assert named[2:] == [str(out / name) for name in ("tokenizer.json", "config.json", INDEX)]
    for name in named:
        synced = [place for place, (event, path) in enumerate(events) if event == "sync"
                  and path.startswith(name + ".") and path.endswith(".tmp")]
        assert synced
        assert synced[0] < events.index(("name", name))
    first_claim = events.index(("name", str(out / "config.json")))
    assert ("sync", str(out)) in events[events.index(("name", named[2])) : first_claim]
    assert events[-1] == ("sync", str(out))


def test_signs_of_completeness_go_before_any_shard_does(source, monkeypatch):
    out = source.parent / "out"
    main(source, out)
    write_checkpoint(source, several_kinds(seed=1)[0], CONFIG)
    events, unlink, replace = [], os.unlink, os.replace

    def log_unlink(path, *more, **options):
        if os.path.lexists(path):
            events.append(("removed", Path(path).name))
        unlink(path, *more, **options)

    def log_replace(old, new):
        events.append(("replaced", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "unlink", log_unlink)
    monkeypatch.setattr(os, "replace", log_replace)
    main(source, out)
    events = [(what, name) for what, name in events if name != "tokenizer.json"
              and not name.endswith(".tmp")]
    assert {*events[:2]} == {("removed", INDEX), ("removed", "config.json")}
    assert {*events[2:4]} == {("replaced", ONE), ("replaced", TWO)}
    assert events[4:] == [("replaced", "config.json"), ("replaced", INDEX)]


def test_side_files_that_cannot_be_read_are_named(source, monkeypatch, capsys):
    real = shutil.copyfileobj

    def fail(original, file):
        real(original, file)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    assert cli(arguments(source)) == 1
    assert f"{source / 'tokenizer.json'}: Input/output error" in capsys.readouterr().err
    assert {*contents(source.parent / "out")} == {ONE, TWO}
