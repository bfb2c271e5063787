"""Writing a shard: direct I/O, temporary names, and the sync before the final name."""

import errno
import os
import re
from pathlib import Path

import pytest

import fp8_cast_bf16
from checkpoints import INDEX, KEY, ONE, TWO, contents, metadata_of
from fp8_cast_bf16 import main


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP])
def test_plain_writes_give_the_same_bytes_where_direct_ones_are_refused(
    source, out, monkeypatch, number
):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 16 << 12)  # Only whole pages are written so.
    real, refused = os.open, []

    def without_direct(path, flags, *mode, **where):
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(number, os.strerror(number))
        return real(path, flags, *mode, **where)

    monkeypatch.setattr(os, "open", without_direct)
    main(source, source.parent / "plain")
    assert {Path(path).parent.name for path in refused} == {"plain"}
    assert contents(source.parent / "plain") == contents(out)


@pytest.fixture
def events(source, monkeypatch):
    """Convert; return what was synced and renamed, in order, as pairs of a file and its name."""
    found, fsync, rename = [], os.fsync, os.rename

    def log_fsync(number):
        found.append((os.readlink(f"/proc/self/fd/{number}"), None))
        fsync(number)

    def log_rename(old, new):
        found.append((str(old), str(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    main(source, source.parent / "out")
    return found


def test_names_are_given_to_synced_files_and_index_and_config_come_last(source, events):
    out = source.parent / "out"
    named = [new for _, new in events if new]
    assert {*named[:2]} == {str(out / ONE), str(out / TWO)}
    assert named[2:] == [str(out / name) for name in ("tokenizer.json", INDEX, "config.json")]
    for old, new in events:
        assert not new or (old, None) in events[: events.index((old, new))]


def test_names_are_safe_on_disk_before_an_index_or_config_says_that_all_is_there(source, events):
    out = source.parent / "out"
    names = [Path(new).name if new else None for _, new in events]
    for claim in (INDEX, "config.json"):
        before = events[: names.index(claim)]
        last = max(place for place, (_, new) in enumerate(before) if new)
        assert (str(out), None) in before[last:]
    assert events[-1] == (str(out), None)


def test_temporary_names_hold_the_fingerprint_and_none_of_them_stays(source, events):
    out = source.parent / "out"
    names = {Path(new).name: Path(old).name for old, new in events if new}
    for shard in (ONE, TWO):
        fingerprint = metadata_of(out / shard)[KEY]
        assert re.fullmatch(rf"{shard}\.{fingerprint}\.[0-9a-f]{{8}}\.tmp", names[shard])
    assert {*contents(out)} == {ONE, TWO, INDEX, "config.json", "tokenizer.json"}
