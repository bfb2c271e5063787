"""Writing a shard: direct I/O, temporary names, and the sync before the final name."""

import errno
import os
import re
from pathlib import Path

import pytest

import checkpoints as c
import fp8_cast_bf16
from checkpoints import KEY, ONE, TWO
from fp8_cast_bf16 import main


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP])
def test_plain_writes_give_the_same_bytes_where_direct_ones_are_refused(
    source, out, monkeypatch, number
):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 16 << 12)  # Only whole pages are written so.
    refused = []

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            refused.append(Path(path))
            raise OSError(number, os.strerror(number))

    c.watch(monkeypatch, "open", refuse)
    main(source, source.parent / "plain")
    assert {path.parent.name for path in refused} == {"plain"}
    assert c.contents(source.parent / "plain") == c.contents(out)


def test_files_are_synced_under_temporary_names_and_those_of_shards_hold_the_fingerprint(
        source, monkeypatch):
    out, synced, renamed = source.parent / "out", set(), {}

    def note(old, new):
        renamed[Path(new).name] = Path(old).name, Path(old) in synced

    c.watch(monkeypatch, "fsync", lambda number: synced.add(c.file_of(number)), after=True)
    c.watch(monkeypatch, "rename", note)
    main(source, out)
    assert {*renamed} == {*c.contents(out)}
    for name, (temporary, was_synced) in renamed.items():
        fingerprint = c.metadata_of(out / name)[KEY] if name in (ONE, TWO) else "0" * 16
        assert re.fullmatch(rf"{name}\.{fingerprint}\.[0-9a-f]{{8}}\.tmp", temporary)
        assert was_synced, name
