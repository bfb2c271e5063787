"""Writing a shard: direct I/O, temporary names, and the sync before the final name."""

import errno
import os
from pathlib import Path

import pytest

import fp8_cast_bf16
from checkpoints import INDEX, KEY, ONE, TWO, contents, convert, metadata_of, several_kinds
from fp8_cast_bf16 import main


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP])
def test_plain_writes_give_the_same_bytes_where_direct_ones_are_refused(
    tmp_path, monkeypatch, number
):
    shards, _ = several_kinds()
    convert(tmp_path, shards)
    real, refused = os.open, []

    def without_direct(path, flags, *mode, **where):
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(number, os.strerror(number))
        return real(path, flags, *mode, **where)

    monkeypatch.setattr(os, "open", without_direct)
    main(tmp_path / "in", tmp_path / "plain")
    assert {Path(path).parent.name for path in refused} == {"plain"}
    assert contents(tmp_path / "plain") == contents(tmp_path / "out")


def test_temporary_names_contain_the_fingerprint(source, monkeypatch):
    out, seen = source.parent / "out", set()
    real = fp8_cast_bf16.render

    def look(*operands):
        seen.update(path.name for path in out.glob("*.tmp"))
        return real(*operands)

    monkeypatch.setattr(fp8_cast_bf16, "render", look)
    main(source, out)
    assert {f"{name}.{metadata_of(out / name)[KEY]}.tmp" for name in (ONE, TWO)} <= seen
    assert not list(out.glob("*.tmp"))


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
    assert named[2:] == [str(out / name) for name in ("tokenizer.json", INDEX, "config.json")]
    for name in named:
        synced = [place for place, (event, path) in enumerate(events) if event == "sync"
                  and path.startswith(name + ".") and path.endswith(".tmp")]
        assert synced
        assert synced[0] < events.index(("name", name))
    first_claim = events.index(("name", str(out / INDEX)))
    assert ("sync", str(out)) in events[events.index(("name", named[2])) : first_claim]
    assert events[-1] == ("sync", str(out))
