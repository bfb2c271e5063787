"""--delete-source: an input shard is emptied once all that it gives is proven, and only then."""

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoints as c
from checkpoints import CONFIG, EXTRA, INDEX, KEY, ONE, SHARD, TWO
from fp8_cast_bf16 import CheckpointError, cli, main

DRAFT = f"draft/{SHARD}"
SHARDS = [DRAFT, ONE, TWO, EXTRA]  # Of write_independent, in the order in which they are emptied.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An emptied checkpoint, its output, and the whole input."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("in", "whole"):
        source = c.write_checkpoint(folder / name, c.several_kinds()[0], CONFIG)
        (source / "tokenizer.json").write_text("{}")
    main(folder / "in", folder / "out", delete_source=True)
    return folder


@pytest.fixture
def emptied(made, tmp_path):
    """The emptied checkpoint; its output is beside it in `out`, and the whole input in `whole`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "in"


def emptied_of(source: Path, names=SHARDS) -> list[str]:
    """Return which of these shards are emptied."""
    return [name for name in names if c.is_emptied(source / name)]


def empty_some(source: Path, out: Path, count: int, monkeypatch) -> None:
    """Interrupt a run with --delete-source as soon as it has emptied so many shards."""
    names = []

    def stop(old, new):
        names.append(new)
        if len(names) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        c.watch(patch, "replace", stop, after=True)
        main(source, out, delete_source=True)
    assert sum(map(c.is_emptied, source.rglob("*.safetensors"))) == count


def when_proving(monkeypatch, name: str, act) -> None:
    """Act when an output shard is about to be read back, for which the page cache is dropped."""
    c.watch(monkeypatch, "posix_fadvise", lambda number, *_: (
        act() if str(c.file_of(number)).endswith(f"out/{name}") else None))


def assert_stops(source: Path, *complaints: str, out: Path | None = None, **options) -> str:
    """See that a run ends with an error and changes neither input nor output."""
    out = out or source.parent / "out"
    before = c.contents(source), c.contents(out)
    with pytest.raises(CheckpointError) as caught:
        main(source, out, **options)
    assert [complaint for complaint in complaints if complaint not in str(caught.value)] == []
    assert (c.contents(source), c.contents(out)) == before
    return str(caught.value)


def assert_verified(source: Path, count: int, digested: int, capsys) -> None:
    capsys.readouterr()
    main(source, source.parent / "out", verify=True)
    by_digest = f", {digested} of them by the digest of the conversion" if digested else ""
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Verified {count} tensors{by_digest}: no differences"


# --- what is emptied, and what is left ---


def test_an_emptied_shard_is_its_header_and_names_its_takers(source, tmp_path):
    headers = {name: c.header_of(source / name) for name in (ONE, TWO)}
    (source / ONE).chmod(0o640)
    (tmp_path / "link").symlink_to(source)  # By which the input may be named.
    main(tmp_path / "link", tmp_path / "out", delete_source=True)
    assert (source / ONE).stat().st_mode & 0o777 == 0o640
    for name, header in headers.items():
        now = c.header_of(source / name)
        takers = json.loads(now["__metadata__"].pop(KEY))["takers"]
        assert now == header
        assert {*takers} == {ONE, TWO}
        for taker, (fingerprint, digest, *_) in takers.items():
            assert fingerprint == c.metadata_of(tmp_path / "out" / taker)[KEY]
            assert re.fullmatch("[0-9a-f]{64}", digest)
        with pytest.raises(SafetensorError):
            load_file(source / name)


@pytest.mark.parametrize("moved, more, goes", [
    (["w.weight_scale_inv"], {}, True),  # only scales
    ([], {"v": torch.rand(9, 9).bfloat16()}, True),  # only copied tensors
    ([], {"v": torch.empty(0, 4), "u": torch.empty(0)}, False),  # no data bytes
    ([], {"w.input_scale": torch.ones(1)}, False),  # nothing that reaches the output
    (["w.weight_scale_inv"], {"v": torch.empty(0, 4)}, True),  # an output without data
    ([], {"z.weight_scale_inv": torch.empty(0, 1), "v": torch.ones(3)}, True),  # for no data
])
def test_a_shard_is_emptied_if_any_data_is_taken_from_it(tmp_path, moved, more, goes):
    one, expected = c.one_weight()
    if "z.weight_scale_inv" in more:
        one["z.weight"] = torch.empty(0, 128).to(torch.float8_e4m3fn)
        expected["z.weight"] = torch.empty(0, 128).bfloat16()
    two = {name: one.pop(name) for name in moved} | more
    source = c.write_checkpoint(tmp_path / "in", {ONE: one, TWO: two}, CONFIG)
    before = c.stamps(source)[TWO]
    for _ in range(2):
        main(source, tmp_path / "out", delete_source=True)
    assert emptied_of(source, [ONE, TWO]) == ([ONE, TWO] if goes else [ONE])
    assert goes or c.stamps(source)[TWO] == before
    c.assert_holds(tmp_path / "out" / ONE, expected)
    copied = {name: tensor for name, tensor in more.items() if "scale" not in name}
    if copied:
        c.assert_holds(tmp_path / "out" / TWO, copied)
    main(source, tmp_path / "out", verify=True)


def test_parts_with_equal_names_are_told_apart(tmp_path, capsys):
    """Both folders have a shard of the same name, with tensors of the same names."""
    source, outs = tmp_path / "in", [tmp_path / "out" / part / SHARD for part in "ab"]
    for seed, part in enumerate("ab"):
        shards = {SHARD: c.one_weight(seed=seed)[0]}
        c.write_checkpoint(source / part, shards, CONFIG, index=False)
    main(source, tmp_path / "out", delete_source=True)
    assert emptied_of(source, [f"a/{SHARD}", f"b/{SHARD}"]) == [f"a/{SHARD}", f"b/{SHARD}"]
    for seed, out in enumerate(outs):
        c.assert_holds(out, c.one_weight(seed=seed)[1])
    assert_verified(source, 4, 4, capsys)
    first, second = (out.read_bytes() for out in outs)
    outs[0].write_bytes(second)
    outs[1].write_bytes(first)
    assert_stops(source, *map(str, outs))


def test_what_is_to_be_emptied_and_what_was_is_printed_and_reported(independent, tmp_path, capsys):
    before, out, report = c.contents(tmp_path), tmp_path / "out", tmp_path / "r.json"
    main(independent, out, dry_run=True, delete_source=True)
    assert c.contents(tmp_path) == before
    space = r"Space: \S+ to write, at most \S+ more than now at any time, \S+ free"
    assert re.search(space, capsys.readouterr().out)
    main(independent, out, delete_source=True, report=report)
    said, found = capsys.readouterr().out, c.read_json(report)
    assert re.search(space, said)
    assert said.endswith(f"4 input shards emptied: {out} is the only copy now\n")
    assert (found["status"], found["emptied_shards"]) == (
        "complete", [str(independent / name) for name in SHARDS])
    after = c.contents(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"in/{name}" for name in SHARDS}


# --- the order of things, and interruptions ---


@pytest.mark.parametrize("delete_source", [False, True])
@pytest.mark.parametrize("count, there", [(1, 1), (2, 3), (3, 3), (4, 4)])
def test_a_shard_goes_as_soon_as_its_takers_are_proven_and_a_run_continues_the_last(
        tmp_path, monkeypatch, count, there, delete_source):
    """Otherwise the disk would have to hold both checkpoints. ONE and TWO need each other."""
    source, out = tmp_path / "in", tmp_path / "out"
    expected = c.write_independent(source)
    main(source, tmp_path / "expected")
    empty_some(source, out, count, monkeypatch)
    assert emptied_of(source) == SHARDS[:count]
    assert {*c.contents(out)} == {*SHARDS[:there]}
    c.assert_recoverable(source, [out], expected)
    before = c.contents(source)
    main(source, out, delete_source=delete_source)
    assert c.contents(out) == c.contents(tmp_path / "expected")
    assert emptied_of(source) == SHARDS if delete_source else c.contents(source) == before
    main(source, out, verify=True)


def test_what_the_disk_holds_is_synced_and_read_back_before_a_shard_goes(source, monkeypatch):
    """The page cache, which would give back what was written to it, must not answer."""
    events, root = [], source.parent

    def note(name, path):
        events.append((name, re.sub(r"\.[0-9a-f]{16}.*", "", os.path.relpath(path, root))))

    for name in ("fsync", "posix_fadvise"):
        c.watch(monkeypatch, name, lambda number, *_, name=name: note(name, c.file_of(number)))
    c.watch(monkeypatch, "replace", lambda old, new: note("replace", new))
    main(source, root / "out", delete_source=True)
    for name in (ONE, TWO):
        gone = events.index(("replace", f"in/{name}"))
        assert ("fsync", f"in/{name}") in events[:gone]  # The new header.
        assert ("fsync", "in") in events[gone:]
        for taker in (ONE, TWO):
            read = events.index(("posix_fadvise", f"out/{taker}"))
            assert read < gone
            assert {("fsync", f"out/{taker}"), ("fsync", "out"), ("fsync", ".")} < {*events[:read]}


# --- a second run, and other commands on what is emptied ---


@pytest.mark.parametrize("options", [{}, {"delete_source": True}, {"dry_run": True},
                                     {"dry_run": True, "delete_source": True}])
def test_any_command_accepts_the_output_of_an_emptied_input(emptied, tmp_path, capsys, options):
    later = (tmp_path / "out" / ONE).stat().st_mtime + 10
    os.utime(emptied / ONE, (later, later))
    before = c.contents(tmp_path), c.stamps(emptied), c.stamps(tmp_path / "out")
    capsys.readouterr()
    main(emptied, tmp_path / "out", **options)
    said = capsys.readouterr()
    assert "Already there: 2 of 2 shards" in said.out
    assert "Warning" not in said.err
    assert "dry_run" in options or said.out.endswith(c.NOTHING)
    assert before == (c.contents(tmp_path), c.stamps(emptied), c.stamps(tmp_path / "out"))


def test_an_input_that_is_downloaded_again_is_emptied_again(emptied, tmp_path, capsys):
    before = c.stamps(tmp_path / "out")
    shutil.copy(tmp_path / "whole" / ONE, emptied)
    main(emptied, tmp_path / "out", delete_source=True)
    assert not c.is_emptied(emptied / ONE)  # TWO has the scale of a.weight: it cannot be compared.
    assert f"{emptied / ONE} has been left as it is" in capsys.readouterr().err
    assert_verified(emptied, 6, 4, capsys)  # All but `bias` and `norm.weight`.
    shutil.copy(tmp_path / "whole" / TWO, emptied)
    assert_verified(emptied, 6, 0, capsys)
    main(emptied, tmp_path / "out", delete_source=True)
    assert emptied_of(emptied, [ONE, TWO]) == [ONE, TWO]
    assert c.stamps(tmp_path / "out") == before
    assert_verified(emptied, 6, 6, capsys)


# --- only copies ---


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("delete_source", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_nothing_gets_into_the_output_of_another_checkpoint_of_the_same_architecture(
        tmp_path, monkeypatch, count, delete_source, finished):
    c.write_independent(tmp_path / "in")
    c.write_independent(tmp_path / "other", seed=1)
    main(tmp_path / "other", tmp_path / "others")
    for name in [] if finished else [EXTRA, INDEX, "config.json"]:
        (tmp_path / "others" / name).unlink()
    empty_some(tmp_path / "in", tmp_path / "out", count, monkeypatch)
    said = assert_stops(tmp_path / "in", out=tmp_path / "others", delete_source=delete_source)
    for name in SHARDS[:count]:  # Each that cannot be made again, and what it would take.
        assert f"{tmp_path / 'others' / name} (to make it, download " in said
        assert str(tmp_path / "in" / name) in said
    assert "If you have moved a file, moving it back is enough" in said
    main(tmp_path / "in", tmp_path / "out", delete_source=delete_source)
    main(tmp_path / "in", tmp_path / "out", verify=True)


def test_no_emptied_shard_of_another_checkpoint_is_taken_for_this_ones(emptied, tmp_path):
    c.write_checkpoint(tmp_path / "tune", c.several_kinds(seed=1)[0], CONFIG)
    main(tmp_path / "tune", tmp_path / "tuned")
    shutil.copy(emptied / ONE, tmp_path / "tune")
    for out in ("tuned", "new"):
        assert_stops(tmp_path / "tune", "before it was emptied", out=tmp_path / out)
    assert_stops(tmp_path / "tune", f"keep {tmp_path / 'out' / TWO} until", verify=True)


@pytest.mark.parametrize("at", [-1, -4000, "bias"])
def test_a_rotten_byte_of_an_only_copy_is_found_by_verify(emptied, tmp_path, capsys, at):
    path = tmp_path / "out" / ONE
    c.flip(path, len(c.split(path)[0]) if at == "bias" else at)  # `bias` comes first.
    assert cli(c.arguments(emptied, "--verify")) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    for source in (ONE, TWO):
        assert f"{path}: is not as it was proven when {emptied / source} was emptied" in lines
    assert f"keep {path} until {emptied / ONE}, {emptied / TWO} has been downloaded again" in last
    assert "delete" not in last


@pytest.mark.parametrize("how", [
    "missing", "cut", "longer", "text", "link", "folder", "names", "dtypes", "shapes",
    "fewer", "no fingerprint"])
def test_a_missing_or_wrong_only_copy_is_an_error_and_left(emptied, tmp_path, how):
    path = tmp_path / "out" / ONE
    c.spoil(path, how)
    before = c.stamps(tmp_path / "out")
    for option in ("workers", "delete_source", "dry_run"):
        assert_stops(emptied, f"{path} (to make it, download {emptied / ONE}, {emptied / TWO}). If "
                     "you have moved a file, moving it back is enough", **{option: True})
    what = f"move {path} back, or download" if how == "missing" else f"keep {path} until"
    if how not in ("folder", "link"):
        assert f"delete {path}" not in assert_stops(emptied, what, verify=True)
    assert c.stamps(tmp_path / "out") == before


def test_all_missing_only_copies_are_named_at_once_and_moving_them_back_is_enough(
        independent, tmp_path, capsys):
    """What else is missing is made, although the input is emptied."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    main(independent, out, delete_source=True)
    before = c.contents(independent), c.contents(out)
    out.rename(moved)
    named = [f"{out / name} (to make it, download " for name in SHARDS]
    assert_stops(independent, *named, delete_source=True)
    assert not out.exists()
    for name in ("config.json", INDEX, "tokenizer.json"):
        (moved / name).unlink()
    moved.rename(out)
    main(independent, out)
    assert (c.contents(independent), c.contents(out)) == before
    assert_verified(independent, 10, 10, capsys)


def test_a_later_version_may_lay_out_the_header_of_an_only_copy_differently(emptied, tmp_path):
    path = tmp_path / "out" / TWO
    save_file(load_file(path), path, {KEY: c.metadata_of(path)[KEY], "other": "1"})
    before = c.stamps(tmp_path / "out")
    main(emptied, tmp_path / "out")
    assert c.stamps(tmp_path / "out") == before
    assert_stops(emptied, f"{path} until", verify=True)  # Its bytes are not those of the digest.


def test_a_digest_that_does_not_match_stops_the_run_before_more_is_emptied(
        source, tmp_path, monkeypatch):
    """The bit is one of a.weight, of which the emptied shard had the codes."""
    empty_some(source, tmp_path / "out", 1, monkeypatch)
    c.flip(tmp_path / "out" / ONE, -1000)
    assert_stops(source, f"{tmp_path / 'out' / ONE}: is not as it was written", f"keep it until "
                 f"{source / ONE}, which is emptied, has been downloaded again", delete_source=True)


@pytest.mark.parametrize("change", ["touched", "another's"])
def test_a_source_that_changed_between_two_runs_is_left(
        source, tmp_path, monkeypatch, capsys, change):
    empty_some(source, tmp_path / "out", 1, monkeypatch)
    if change == "touched":
        os.utime(source / TWO)
        assert cli(c.arguments(source, "--delete-source")) == 0
        assert f"Warning: {source / TWO} has been left as it is: it is not known to be what " in (
            capsys.readouterr().err)
    else:
        save_file(c.several_kinds(1)[0][TWO], source / TWO, {"format": "pt"})
        assert_stops(source, f"{tmp_path / 'out' / TWO}: ", delete_source=True)
    assert not c.is_emptied(source / TWO)
    for name, expected in c.several_kinds()[1].items():
        c.assert_holds(tmp_path / "out" / name, expected)


def test_what_may_have_been_mixed_with_a_source_of_another_revision_is_left_too(
        tmp_path, monkeypatch, capsys):
    """The third output takes codes from a source that has changed, and scales from the first."""
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]

    def shards(seed):
        given = {}
        for stem in "abc":
            given |= c.one_weight(stem, seed)[0]
        held = zip(names, "abc", "cab", strict=True)
        return {name: {key: given[key] for key in (f"{one}.weight", f"{other}.weight_scale_inv")}
                for name, one, other in held}

    source = c.write_checkpoint(tmp_path / "in", shards(0), CONFIG)
    empty_some(source, tmp_path / "out", 1, monkeypatch)
    assert emptied_of(source, names) == names[1:2]
    save_file(shards(5)[names[2]], source / names[2], {"format": "pt"})
    assert cli(c.arguments(source, "--delete-source")) == 0
    assert emptied_of(source, names) == names[1:2]
    said = capsys.readouterr().err
    for at, why in ((0, f"{source / names[2]}, which it goes with, is"), (2, "it is")):
        assert f"Warning: {source / names[at]} has been left as it is: {why} not known" in said


def test_the_stamps_of_shards_with_one_name_in_two_folders_are_told_apart(tmp_path, monkeypatch):
    """The codes are in `a`, the scales in `b`; later `b` becomes as old as `a`, and another."""
    tensors, _ = c.one_weight()
    scale = {"w.weight_scale_inv": tensors.pop("w.weight_scale_inv"), "pad": torch.ones(1284)}
    for part, held in (("a", tensors), ("b", scale)):
        c.write_checkpoint(tmp_path / "in" / part, {SHARD: held}, index=False)
    c.write_json(tmp_path / "in/config.json", CONFIG)
    c.write_json(tmp_path / "in" / INDEX, {"weight_map": {
        **dict.fromkeys(tensors, f"a/{SHARD}"), **dict.fromkeys(scale, f"b/{SHARD}")}})
    empty_some(tmp_path / "in", tmp_path / "out", 1, monkeypatch)
    left = next(path for path in (tmp_path / "in").rglob("*.safetensors") if not c.is_emptied(path))
    os.utime(left, ns=(0, 0))
    main(tmp_path / "in", tmp_path / "out", delete_source=True)
    assert not c.is_emptied(left)


def test_an_only_copy_that_was_packed_otherwise_is_never_called_verified(emptied, tmp_path, capsys):
    out, tensors = tmp_path / "out", {}
    for path in out.glob("*.safetensors"):
        tensors |= {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
        path.unlink()
    save_file(tensors, out / SHARD, {"format": "pt"})
    index = c.read_json(out / INDEX)
    c.write_json(out / INDEX, index | {"weight_map": dict.fromkeys(tensors, SHARD)})
    assert cli(c.arguments(emptied, "--verify")) == 1
    said = capsys.readouterr().err
    for name in (ONE, TWO):
        assert f"{out / name}: is missing, and its input was emptied, so its values cannot" in said


# --- shards that version 2.0 emptied: only the old header, which names no takers ---


@pytest.mark.parametrize("names", [[ONE], [ONE, TWO]])
@pytest.mark.parametrize("delete_source", [False, True])
def test_what_2_0_emptied_is_accepted_with_a_warning_and_verify_ends_with_1(
        source, out, capsys, names, delete_source):
    for name in names:
        (source / name).write_bytes(c.split(source / name)[0])
        save_file(load_file(out / name), out / name)  # Of an output, any header will do.
    before = c.contents(source), c.contents(out)
    capsys.readouterr()
    main(source, out, delete_source=delete_source)
    said, emptied = capsys.readouterr().err, f"because {source / ONE} was "
    for name in (ONE, TWO):  # Each takes from both.
        assert f"Warning: {out / name}: cannot be checked further, {emptied}" in said
    left = [str(source / name) for name in (ONE, TWO) if name not in names and delete_source]
    assert re.findall(r"Warning: (\S+) has been left as it is: it is not known to", said) == left
    assert (c.contents(source), c.contents(out)) == before
    assert cli(c.arguments(source, "--verify")) == 1
    said = capsys.readouterr().err
    assert f"{out / ONE}: cannot be checked, {emptied}emptied by a version" in said


@pytest.mark.parametrize("how", ["missing", "cut", "names", "dtypes", "shapes", "fewer"])
def test_what_2_0_emptied_needs_an_output_of_the_same_tensors(source, out, how):
    (source / ONE).write_bytes(c.split(source / ONE)[0])
    c.spoil(out / ONE, how)
    assert_stops(source, f"{out / ONE} (to make it, download {source / ONE})")


# --- records that lie ---

GOOD = ["0" * 16, "0" * 64, 1 << 24, {}]


@pytest.mark.parametrize("record", [
    "{", "[]", "null", "no record", "0" * 15, "{}", '{"takers": 1}', '{"takers": [1]}',
    '{"takers": null}', '{"takers": ' + "[" * 200_000, {ONE: 1}, {ONE: "abcd"}, {ONE: GOOD[:3]},
    {ONE: [*GOOD, 1]}, {ONE: None}, {ONE: {}}, {ONE: {"a": 1, "b": 2, "c": 3, "d": 4}},
    *({ONE: [*GOOD[:at], value, *GOOD[at + 1 :]]} for at, values in enumerate([
        [[], {}, None, 1], [[], None], ["", 0, -4096, 8, 4096.0, 1 << 40, True, float("nan")],
        [[], "", None]])
      for value in values),
    {ONE: GOOD}, {}, {TWO: GOOD},
], ids=lambda record: json.dumps(record)[:40])
def test_any_garbage_in_the_record_of_an_emptied_shard_is_an_error_and_loses_nothing(
        emptied, tmp_path, record):
    header = c.header_of(emptied / ONE)
    text = record if isinstance(record, str) else json.dumps({"takers": record})
    header["__metadata__"][KEY] = text
    (emptied / ONE).write_bytes(c.shard_of(json.dumps(header).encode()))
    for option in ("delete_source", "verify"):
        assert_stops(emptied, str(emptied / ONE), "download", **{option: True})
    shutil.copy(tmp_path / "whole" / TWO, emptied)
    assert_stops(emptied, delete_source=True)


# --- NaN, times, and inputs or outputs that change ---


@pytest.mark.parametrize("dtype, code", [(torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0x7C)])
def test_nan_and_infinite_values_leave_all_that_they_come_from(tmp_path, capsys, dtype, code):
    """Their codes are in TWO, their scale is in ONE; they lie where no sample is taken."""
    codes = c.finite_codes(512, 256, dtype=dtype)
    codes.view(torch.uint8)[0, 0] = code
    scale = torch.full((4, 2), 1e-6 if dtype == torch.float8_e5m2 else 1e-3)
    (one, expected), extra = c.one_weight(), c.one_weight("c")
    shards = {ONE: one | {"a.weight_scale_inv": scale}, TWO: {"a.weight": codes}, EXTRA: extra[0]}
    source, out = c.write_checkpoint(tmp_path / "in", shards, CONFIG), tmp_path / "out"
    before = c.contents(source)
    for again in (False, True):
        assert cli(c.arguments(source, "--delete-source")) == 0
        said = capsys.readouterr().err
        assert "Warning: NaN or infinite values in a.weight\n" in said or again
        for name in (ONE, TWO):
            assert f"{source / name} has been left as it is: a.weight has NaN or infinite " in said
            assert c.contents(source)[name] == before[name]
        assert c.is_emptied(source / EXTRA)
    for name, tensors in (ONE, expected), (TWO, {"a.weight": c.dequantized(codes, scale)}), (
            EXTRA, extra[1]):
        c.assert_holds(out / name, tensors)
    assert_verified(source, 5, 2, capsys)


def test_times_in_the_future_end_no_run(independent, tmp_path, monkeypatch, capsys):
    for path in [*independent.rglob("*"), independent]:
        os.utime(path, (4e9, 4e9))
    empty_some(independent, tmp_path / "out", 2, monkeypatch)
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (4e9, 4e9))
    main(independent, tmp_path / "out", delete_source=True)
    assert emptied_of(independent) == SHARDS
    assert_verified(independent, 10, 10, capsys)


CHANGES = {"touched": lambda path: os.utime(path, ns=(0, 0)),
           "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
           "removed": lambda path: path.rename(path.parent.parent / "removed"),
           "written": lambda path: c.flip(path, -1)}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("what", ["in", "out"])
def test_nothing_is_emptied_if_a_file_of_either_side_changes_after_the_proof(
        source, tmp_path, monkeypatch, what, how):
    """ONE is proven before TWO, and both are needed by both."""
    before, path = c.contents(source), tmp_path / what / ONE
    when_proving(monkeypatch, TWO, lambda: CHANGES[how](path))
    with pytest.raises((CheckpointError, OSError), match=str(path)):
        main(source, tmp_path / "out", delete_source=True)
    after = c.contents(source)
    assert {name for name in before if after.get(name) != before[name]} <= {ONE} & {path.name}
    assert (source / TWO).stat().st_size == len(before[TWO])
    assert what == "in" or after == before
    assert not {INDEX, "config.json"} & {*c.contents(tmp_path / "out")}


def test_an_output_whose_input_is_removed_meanwhile_is_kept(independent, tmp_path, monkeypatch):
    """Somebody makes room by hand: the output may be the only copy then."""
    when_proving(monkeypatch, EXTRA, (independent / EXTRA).unlink)
    with pytest.raises((CheckpointError, OSError), match=EXTRA):
        main(independent, tmp_path / "out", delete_source=True)
    c.assert_holds(tmp_path / "out" / EXTRA, c.one_weight("c")[1])


@pytest.mark.parametrize("at", [-1, 3000, "header"])
def test_a_shard_that_does_not_read_back_is_named_and_its_input_left(
        source, tmp_path, monkeypatch, at):
    path, before = tmp_path / "out" / ONE, c.contents(source)
    place = {"header": lambda: path.read_bytes().index(b"norm")}.get(at, lambda: at)
    with monkeypatch.context() as patch:
        when_proving(patch, ONE, lambda: c.flip(path, place()))
        with pytest.raises(CheckpointError, match=str(path)) as caught:
            main(source, tmp_path / "out", delete_source=True)
    assert "delete it" in str(caught.value)
    assert c.contents(source) == before
    assert "config.json" not in c.contents(tmp_path / "out")
    path.unlink()  # As the message says.
    main(source, tmp_path / "out", delete_source=True)
    c.assert_holds(path, c.several_kinds()[1][ONE])


def test_an_output_made_earlier_that_has_another_bit_is_not_trusted(source, out):
    c.flip(out / TWO, -1)
    assert_stops(source, f"{out / TWO}: experts.up_proj: element [2, 139, 199] is ", "its input "
                 "has been left as it is; delete it", delete_source=True)


# --- refusals: nothing is emptied, and nothing written ---


def arrange(path: Path, how: str, patch) -> Path:
    """Write a checkpoint of two shards, and make what --delete-source refuses."""
    source = c.write_checkpoint(path / "in", c.several_kinds()[0], CONFIG)
    draft = {SHARD: {"n.weight": torch.rand(30, 30).bfloat16()}}
    if how == "a link":
        (source / TWO).rename(path / "blob")
        (source / TWO).symlink_to(path / "blob")
    elif how == "a second name":
        os.link(source / ONE, path / "second")
    elif how == "in a linked folder":
        c.write_checkpoint(source / "parts", draft, index=False)
        (source / "draft").symlink_to("parts")
        c.edit_json(source / INDEX, lambda index: index["weight_map"].update({"n.weight": DRAFT}))
    elif how == "a tensor that stands twice":
        c.write_checkpoint(source, {ONE: {"x": torch.ones(9)}, TWO: {"z": torch.ones(9)}})
        save_file({"z": torch.ones(9), "x": torch.zeros(9)}, source / TWO)
    elif how == "reached through the output":  # As planned, it would prove itself.
        c.write_checkpoint(source / "draft", draft, {}, index=False)
        main(source, path / "first")
        shutil.rmtree(source / "draft")
        (path / "first/draft").rename(source / "draft")
        main(source, path / "out")
        shutil.rmtree(path / "out/draft")
        (path / "out/draft").symlink_to(source / "draft")
    elif how == "read-only":
        patch.setattr(os, "access", lambda path, mode: not (
            mode & os.W_OK and str(path).endswith(ONE)))
    elif how == "space unknown":
        patch.setattr(shutil, "disk_usage", lambda path: c.Usage(0, 0, 0))
    else:
        patch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    return source


FP8 = {"v.weight": (torch.rand(9, 9) / 9).to(torch.float8_e4m3fn)}
CODES, SCALE = c.finite_codes(50, 60), torch.full((50, 1), 0.001)
ONE_SCALE = c.at("l", weight=CODES, weight_scale=SCALE)
INT4 = c.ct_config(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
INT4["quantization_config"]["format"] = "pack-quantized"
READ_TO_PLAN = [  # A tensor without whose data a conversion cannot be planned, all, and a config.
    ("l.comfy_quant", ONE_SCALE | {"l.weight": CODES.view(torch.uint8),
                                   "l.comfy_quant": c.note(format="float8_e4m3fn")}, CONFIG),
    ("l.weight_zero_point", ONE_SCALE | {
        "l.weight": CODES.view(torch.int8),
        "l.weight_zero_point": torch.zeros(50, dtype=torch.int8)}, c.method("w8a8_int8")),
    ("l.weight_g_idx", ONE_SCALE | {"l.weight_scale": torch.full((50, 2), 0.001),
                                    "l.weight_g_idx": (torch.arange(60) // 30).int()},
     c.ct_config(strategy="group", group_size=30)),
    ("l.weight_shape", c.at("l", weight_packed=c.int4(30, 64)[0],
                            weight_scale=torch.full((30, 2), 0.01),
                            weight_shape=torch.tensor([30, 64])), INT4),
    ("a.q_zero_point", ONE_SCALE | {f"a.{kind}_scale": torch.ones(1) for kind in "qkv"} | {
        "a.q_zero_point": torch.zeros(1, dtype=torch.int8)}, CONFIG),
    # ComfyUI's dummy scale of a weight that is plain
    ("b.scale_weight", c.at("l", weight=CODES, scale_weight=SCALE[0]) | c.at(
        "b", weight=torch.rand(4, 4).bfloat16(), scale_weight=torch.ones(())), None),
]
TWICE = ONE_SCALE | {"l.input_scale": torch.ones(()), "a.k_scale": torch.ones(())}
REFUSALS = [  # A situation, or tensors (or shards), a config and an option; and the complaint.
    ((c.one_weight()[0] | {"w.weight_scale_inv": torch.full((2, 1), 9.0)}, CONFIG),
     "root mean square of"),
    *(((c.one_weight()[0] | FP8, CONFIG, *more), "v.weight is FP8 and has no scale")
      for more in ([], [("missing_scale", "cast")])),
    ((c.one_weight()[0] | {"v.weight_scale_inv": torch.ones(1, 1)}, CONFIG),
     "v.weight_scale_inv is a scale of no weight"),
    *(((tensors, config), f"{name} has to be read to plan a conversion")
      for name, tensors, config in READ_TO_PLAN),
    *((({ONE: TWICE, TWO: {"x": torch.ones(3), name: TWICE[name]}}, CONFIG),
       f"{name} stands in two shards")
      for name in ("l.weight_scale", "l.input_scale", "a.k_scale")),
    ("a link", f"{TWO} is a link or has a second name"),
    ("a second name", f"{ONE} is a link or has a second name"),
    ("in a linked folder", f"{DRAFT} is a link or has a second name"),
    ("a tensor that stands twice", "x stands in two shards"),
    ("reached through the output", f"{DRAFT} is a file of"),
    ("read-only", f"{ONE} is not writable"),
    ("space unknown", "does not tell its free space"),
    ("no locks", "in: cannot be locked"),
]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("made, why", REFUSALS, ids=[why[:40] for _, why in REFUSALS])
def test_a_refusal_empties_nothing_and_writes_nothing(tmp_path, monkeypatch, made, why, dry_run):
    out, options = tmp_path / "out", {}
    if isinstance(made, str):
        source = arrange(tmp_path, made, monkeypatch)
    else:
        shards = made[0] if ONE in made[0] else {SHARD: made[0]}
        source = c.write_checkpoint(tmp_path / "in", shards, made[1], index=False)
        options = dict(made[2:])
    there = out.exists()
    if dry_run and made == "no locks":  # It needs none.
        main(source, out, delete_source=True, dry_run=True)
    else:
        said = assert_stops(source, why, delete_source=True, dry_run=dry_run, **options)
        assert said.startswith("--delete-source: ")
    assert out.exists() == there
    main(source, out, **options)  # Without the option, it is converted.
    assert ".fp8_cast_bf16.lock" not in c.contents(out)


def test_an_output_on_another_file_system_is_refused(source):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == source.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    out = shm / f"fp8_cast_bf16.{os.getpid()}" / "out"
    assert_stops(source, f"{out} are on different file systems", out=out, delete_source=True)
    assert not out.parent.exists()


def test_the_input_is_locked_until_all_is_emptied(source, tmp_path, monkeypatch):
    lock, tries = source / ".fp8_cast_bf16.lock", []
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_stops(source, f"{source}: another run is writing there", delete_source=True)
        assert not (tmp_path / "out").exists()

    def try_lock(*paths):
        with open(lock, "a") as file, pytest.raises(BlockingIOError):
            tries.append(file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    c.watch(monkeypatch, "replace", try_lock)
    main(source, tmp_path / "out", delete_source=True)
    assert len(tries) == 2
    assert not lock.exists()


@pytest.mark.parametrize("made, free, suffices", [
    ("", 5.5, True),  # Four outputs of two units, while three inputs of one have gone: five.
    ("", 4.5, False), ("abc", 0.5, True), ("bcd", 1.5, False)])
def test_the_disk_must_hold_the_peak_and_not_both(tmp_path, monkeypatch, made, free, suffices):
    """Of four shards of the same size, none of which needs another."""
    source, out, unit = tmp_path / "in", tmp_path / "out", 512 * 512  # Twice as many are written.
    c.write_checkpoint(source, {f"{name}.safetensors": {
        f"{name}.weight": c.finite_codes(512, 512),
        f"{name}.weight_scale_inv": torch.full((4, 4), 0.001)} for name in "abcd"}, CONFIG)
    main(source, tmp_path / "expected")
    out.mkdir()
    for name in made:
        shutil.copy(tmp_path / "expected" / f"{name}.safetensors", out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: c.Usage(10**9, 0, int(free * unit)))
    assert_stops(source, "of space are missing")
    if suffices:
        main(source, out, delete_source=True)
        assert c.contents(out) == c.contents(tmp_path / "expected")
    for dry_run in [] if suffices else [False, True]:
        said = assert_stops(source, delete_source=True, dry_run=dry_run)
        short = int(re.search(r"out: (\d+)kB of space are missing", said)[1])
        assert short * 1000 == pytest.approx(unit / 2, abs=0.3 * unit)
