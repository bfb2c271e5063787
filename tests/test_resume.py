"""Later runs: what an earlier one left is kept if it is what the input gives, and only then; and
what becomes of a run whose input changes under it.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoints as c
import fp8_cast_bf16
from checkpoints import CONFIG, EXTRA, INDEX, KEY, ONE, SHARD, TWO
from fp8_cast_bf16 import CheckpointError, cli, main

LEFTOVERS = [f"{name}.{'0' * 16}.{'1' * 8}.tmp" for name in (ONE, INDEX, "config.json")]


# --- what is kept ---


@pytest.mark.parametrize("gone", [
    [ONE], [TWO, INDEX], ["config.json"], ["tokenizer.json"], [EXTRA, "draft"], [f"draft/{SHARD}"],
    ["draft/config.json"]])
def test_what_is_missing_is_made_and_the_rest_kept(independent, tmp_path, capsys, gone):
    out = tmp_path / "out"
    main(independent, out)
    expected, before = c.contents(out), c.snapshot(out)
    for path in (out / name for name in gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in (out, out / "draft") if "draft" not in gone else (out,):
        for name in LEFTOVERS:  # of a run that was killed
            (folder / name).write_text("half")
    shards = [path for path in out.rglob("*.safetensors") if path.exists()]
    capsys.readouterr()
    main(independent, out)
    assert c.contents(out) == expected
    after = c.snapshot(out)
    assert [path for path in shards if after[path] != before[path]] == []
    assert f"Already there: {len(shards)} of 4 shards\n" in capsys.readouterr().out
    assert c.is_kept(independent, out, capsys)


@pytest.mark.parametrize("names", range(8))
def test_whenever_a_run_is_interrupted_nothing_half_done_looks_done(
        independent, tmp_path, monkeypatch, names):
    """It is when one more name is about to be given; four shards come first, then four files."""
    main(independent, tmp_path / "expected")
    expected, out, left = c.contents(tmp_path / "expected"), tmp_path / "out", [*range(names)]

    def interrupt(*paths):
        if not left:
            raise KeyboardInterrupt
        left.pop()

    with monkeypatch.context() as patch:
        c.watch(patch, "rename", interrupt)
        assert cli(c.arguments(independent, "--workers", "1")) == 130
    found = c.contents(out)
    assert len(found) == names  # No lock and no unfinished file is among them.
    assert found.items() <= expected.items()
    assert "config.json" not in found
    main(independent, out)
    assert c.contents(out) == expected


# --- fingerprints: which change of the input makes a shard another one ---


def test_a_version_with_more_families_takes_the_shards_of_an_earlier_one(source, out):
    code = ("import sys, fp8_cast_bf16 as f\n"
            "f.VERSION = '99'\n"
            "f.FORMATS[:] = [row._replace(title=row.title + ', Newcomer') for row in f.FORMATS]\n"
            "sys.exit(f.cli(sys.argv[1:]))")
    assert c.python("-c", code, *c.arguments(source)).stdout.endswith(c.NOTHING)


def test_another_checkpoint_with_the_same_headers_never_replaces_an_output(
        source, out, tmp_path, capsys):
    other = c.write_checkpoint(tmp_path / "other", c.several_kinds(seed=1)[0], CONFIG)
    shutil.copy(source / "tokenizer.json", other)
    main(other, tmp_path / "expected")
    assert (out / ONE).stat().st_size == (tmp_path / "expected" / ONE).stat().st_size
    keys = {c.metadata_of(folder / name)[KEY]
            for folder in (out, tmp_path / "expected") for name in (ONE, TWO)}
    assert len(keys - {"0" * 16}) == 4
    assert not c.is_kept(other, out, capsys)
    for name in (ONE, TWO):
        (out / name).unlink()  # as the message says
    main(other, out)
    assert c.contents(out) == c.contents(tmp_path / "expected")


LARGE = {"w.weight": c.finite_codes(400, 400),
         "w.weight_scale_inv": torch.rand(4, 4) / 1000, "norm": torch.ones(9000)}


@pytest.mark.parametrize("name, where, noticed", [
    ("w.weight", "first", False), *(("w.weight", offset, True) for offset in (0, 2047, -2048)),
    *(("w.weight_scale_inv", where, True) for where in ("first", "last")),
    *(("norm", where, True) for where in ("first", 0, "last"))])
def test_a_tensor_that_was_retrained_makes_the_shard_another_one(
        tmp_path, capsys, name, where, noticed):
    """One page, in the middle, of a large weight is looked at; --verify looks at all of it."""
    given = {ONE: LARGE, TWO: {"x": torch.ones(3)}}
    source = c.write_checkpoint(tmp_path / "in", given, CONFIG)
    main(source, tmp_path / "out")
    length, offsets = len(c.split(source / ONE)[0]), c.header_of(source / ONE)[name]["data_offsets"]
    begin, end = (length + at for at in offsets)
    c.flip(source / ONE, {"first": begin + 3, "last": end - 1}.get(where) or (
        begin + end) // 2 + where)
    assert c.is_kept(source, tmp_path / "out", capsys) != noticed
    with pytest.raises(CheckpointError, match=f"delete {tmp_path / 'out' / ONE} and run"):
        main(source, tmp_path / "out", verify=True)
    c.write_checkpoint(source, given, CONFIG)
    assert c.is_kept(source, tmp_path / "out", capsys)


@pytest.mark.parametrize("change, same", [
    ({"weight_block_size": [128, 64]}, False), ({"weight_scale_semantics": "inverse"}, False),
    ({"ignored_layers": ["lm_head"]}, True)])
def test_a_config_that_gives_the_same_data_another_meaning_makes_other_shards(
        tmp_path, capsys, change, same):
    """Two scales for 100 columns fit blocks of 64 and of 96."""
    given = {ONE: {"a.weight": c.finite_codes(100, 100),
                   "a.weight_scale_inv": torch.rand(1, 2) + 0.5}, TWO: {"norm": torch.ones(9)}}
    config = {"quantization_config": {**c.FP8_CONFIG, "weight_block_size": [128, 96]}}
    source = c.write_checkpoint(tmp_path / "in", given, config)
    main(source, tmp_path / "out")
    c.edit_json(source / "config.json", lambda config: config["quantization_config"].update(change))
    assert c.is_kept(source, tmp_path / "out", capsys) == same
    (tmp_path / "out" / ONE).unlink()
    main(source, tmp_path / "out")
    main(source, tmp_path / "out", verify=True)


def test_a_forgotten_option_replaces_nothing(tmp_path, capsys):
    given = {ONE: {"a.weight": c.finite_codes(9, 9)}, TWO: {"norm": torch.ones(9)}}
    source = c.write_checkpoint(tmp_path / "in", given, CONFIG)
    main(source, tmp_path / "out", missing_scale="cast")
    assert not c.is_kept(source, tmp_path / "out", capsys)
    main(source, tmp_path / "out", missing_scale="cast")


# --- an input that changes while it is read ---


def change(path, kind):
    """Let a shard become another of the same names, by one of the ways of downloads."""
    old, fresh = path.stat(), path.with_name(".fresh")
    save_file(c.one_weight("c" if path.name == EXTRA else "d", seed=7)[0], fresh, {"format": "pt"})
    if kind == "replaced":
        return os.replace(fresh, path)
    content = fresh.read_bytes()
    fresh.unlink()
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate(len(content) - 5000 * (kind == "truncated"))
    return os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))


def when(monkeypatch, moment, name, act):
    """Act once, at a moment in the life of an output shard; return a list that is empty then."""
    left = [act]

    def once(at, path):
        if left and moment == at and Path(path).name.startswith(name):
            left.pop()()

    c.watch(monkeypatch, "open", lambda path, flags, *_: flags & os.O_RDWR and once("begun", path))
    c.watch(monkeypatch, "fsync", lambda number: once("written", c.file_of(number)))
    c.watch(monkeypatch, "rename", lambda old, new: once("named", new), after=True)
    return left


@pytest.mark.parametrize("moment", [
    "another is named", "begun", "written", "named", "the last is named"])
@pytest.mark.parametrize("kind", ["rewritten", "replaced", "truncated"])
def test_an_input_that_changes_ends_the_run_and_what_was_made_of_it_goes(
        independent, tmp_path, monkeypatch, capsys, kind, moment):
    out, path, made = tmp_path / "out", independent / EXTRA, {ONE, TWO, f"draft/{SHARD}"}
    old, named = path.read_bytes(), []
    with monkeypatch.context() as patch:
        patch.setattr(fp8_cast_bf16, "WINDOW", 4096)
        c.watch(patch, "rename", lambda old, new: named.append(Path(new).name))
        last = moment == "the last is named"  # The largest shard is the first, the least the last.
        name = ONE if moment == "another is named" else SHARD if last else EXTRA
        left = when(patch, moment.split()[-1], name, lambda: change(path, kind))
        error = c.fails(capsys, independent, "--workers", "1")
    assert not left
    assert error.startswith(f"error: {path}: has changed while it was read; run the command again")
    assert (EXTRA in named) == (moment == "named")
    found = c.contents(out)
    assert {*found} == made if last else {*found} <= made
    for name in found:
        c.assert_holds(out / name, c.write_independent(tmp_path / "x")[name])
    if kind == "truncated":
        path.write_bytes(old)
    kept = c.snapshot(out)
    main(independent, out)
    main(independent, out, verify=True)
    assert all(c.snapshot(out)[out / name] == kept[out / name] for name in found)
    c.assert_holds(out / EXTRA, c.one_weight("c", 0 if kind == "truncated" else 7)[1])


def test_of_two_inputs_that_change_nothing_stays(independent, tmp_path, monkeypatch):
    when(monkeypatch, "named", SHARD, lambda: (change(independent / EXTRA, "rewritten"),
                                               change(independent / "draft" / SHARD, "replaced")))
    assert cli(c.arguments(independent, "--workers", "1")) == 1
    assert {*c.contents(tmp_path / "out")} == {ONE, TWO}


def test_an_input_of_scales_that_changes_takes_the_shard_of_their_weight_with_it(
        source, tmp_path, monkeypatch, capsys):
    when(monkeypatch, "named", ONE, lambda: os.utime(source / TWO))
    assert f"{source / TWO}: has changed" in c.fails(capsys, source, "--workers", "1")
    assert c.contents(tmp_path / "out") == {}
