"""--delete-source: an input shard is emptied once all that it gives is proven, and only then."""

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    EXTRA,
    INDEX,
    ONE,
    ROOT,
    SHARD,
    TWO,
    Usage,
    arguments,
    assert_holds,
    assert_recoverable,
    contents,
    ct_config,
    dequantized,
    finite_codes,
    is_emptied,
    method,
    one_weight,
    packed,
    several_kinds,
    stamps,
    write_checkpoint,
    write_independent,
)
from fp8_cast_bf16 import CheckpointError, cli, main

SHARDS = [f"draft/{SHARD}", EXTRA, ONE, TWO]  # Of write_independent, as they are emptied.
PLANNING = "has to be read to plan a conversion, and an emptied shard lacks it"


@pytest.fixture
def independent(tmp_path):
    """A checkpoint of which two shards need each other and two need none; one is in a folder."""
    write_independent(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An emptied checkpoint, its output, and the whole input."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("in", "whole"):
        write_checkpoint(folder / name, several_kinds()[0], CONFIG)
        (folder / name / "tokenizer.json").write_text("{}")
    main(folder / "in", folder / "out", delete_source=True)
    return folder


@pytest.fixture
def emptied(made, tmp_path):
    """The emptied checkpoint; its output is beside it in `out`, and the whole input in `whole`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "in"


def header_of(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def sizes(source: Path) -> dict[str, int]:
    return {name: len(data) for name, data in contents(source).items()}


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        place = file.tell()
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ 1]))


def assert_stops(source: Path, *complaints: str, out: Path | None = None, **options) -> None:
    """See that a run with --delete-source ends with an error and empties nothing."""
    before = contents(source)
    with pytest.raises(CheckpointError) as caught:
        main(source, out or source.parent / "out", delete_source=True, **options)
    for complaint in complaints:
        assert complaint in str(caught.value)
    assert contents(source) == before


def assert_refused(source: Path, *complaints: str, **options) -> None:
    """See that it ends so before anything is made."""
    assert_stops(source, "--delete-source: ", *complaints, **options)
    assert not (source.parent / "out").exists()


# --- what is emptied, and what is made of it ---


def test_every_input_shard_is_emptied_and_the_output_is_bit_exact(source, tmp_path):
    """Each of the two shards holds a scale of a weight in the other."""
    headers = {name: header_of(source / name) for name in (ONE, TWO)}
    main(source, tmp_path / "out", delete_source=True)
    for name, expected in several_kinds()[1].items():
        assert_holds(tmp_path / "out" / name, expected)
        assert (source / name).stat().st_size == headers[name]


def test_the_output_has_the_bytes_of_a_run_that_keeps_its_input(independent, tmp_path):
    main(independent, tmp_path / "expected")
    main(independent, tmp_path / "out", delete_source=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_shards_in_folders_are_emptied_too(independent, tmp_path):
    before = contents(independent)
    main(independent, tmp_path / "out", delete_source=True)
    for name in SHARDS:
        assert is_emptied(independent / name), name
    after = contents(independent)
    assert {name: data for name, data in after.items() if name not in SHARDS} == {
        name: data for name, data in before.items() if name not in SHARDS}
    assert all(before[name].startswith(after[name]) for name in SHARDS)


def test_safetensors_refuses_an_emptied_shard(emptied):
    for name in (ONE, TWO):
        with pytest.raises(SafetensorError):
            load_file(emptied / name)


def test_a_shard_that_holds_only_scales_is_emptied(tmp_path):
    tensors, expected = one_weight()
    scale = {"w.weight_scale_inv": tensors.pop("w.weight_scale_inv")}
    source = write_checkpoint(tmp_path / "in", {ONE: tensors, TWO: scale}, CONFIG)
    main(source, tmp_path / "out", delete_source=True)
    assert is_emptied(source / ONE)
    assert is_emptied(source / TWO)
    assert_holds(tmp_path / "out" / ONE, expected)


@pytest.mark.parametrize("shape", [(0, 4), (0,)])
def test_a_shard_without_data_bytes_is_never_emptied(tmp_path, shape):
    shards = {ONE: one_weight()[0], TWO: {"nothing": torch.empty(shape)}}
    source = write_checkpoint(tmp_path / "in", shards, CONFIG)
    before = stamps(source)[TWO]
    for _ in range(2):
        main(source, tmp_path / "out", delete_source=True)
        assert stamps(source)[TWO] == before
    assert_holds(tmp_path / "out" / TWO, shards[TWO])


def test_a_shard_of_which_nothing_reaches_the_output_is_left(tmp_path):
    shards = {ONE: one_weight()[0], TWO: {"w.input_scale": torch.ones(1)}}
    source = write_checkpoint(tmp_path / "in", shards, CONFIG)
    before = stamps(source)[TWO]
    main(source, tmp_path / "out", delete_source=True)
    assert is_emptied(source / ONE)
    assert stamps(source)[TWO] == before


def test_a_copied_checkpoint_is_emptied_too(tmp_path):
    given = {"w.weight": torch.rand(9, 9).bfloat16()}
    source = write_checkpoint(tmp_path / "in", {SHARD: given}, {})
    main(source, tmp_path / "out", delete_source=True)
    assert is_emptied(source / SHARD)
    assert_holds(tmp_path / "out" / SHARD, given)


def test_an_output_made_earlier_is_proven_and_then_the_input_emptied(source, out, monkeypatch):
    before, there, real = contents(out), stamps(out), fp8_cast_bf16.empty

    def empty(path, stamp):
        assert {INDEX, "config.json"} < {*contents(out)}
        real(path, stamp)

    monkeypatch.setattr(fp8_cast_bf16, "empty", empty)
    main(source, out, delete_source=True)
    assert is_emptied(source / ONE)
    assert is_emptied(source / TWO)
    assert contents(out) == before
    assert stamps(out) == there


# --- the order of things ---


def test_a_shard_is_emptied_after_all_that_take_from_it_are_proven(independent, monkeypatch):
    takers = {EXTRA: {EXTRA}, SHARD: {f"draft/{SHARD}"}, ONE: {ONE, TWO}, TWO: {ONE, TWO}}
    proven, emptied, prove, empty = set(), [], fp8_cast_bf16.prove, fp8_cast_bf16.empty

    def log_prove(shard, *more):
        prove(shard, *more)
        proven.add(shard.name)

    def log_empty(path, stamp):
        assert takers[path.name] <= proven
        assert is_emptied(path) is False
        empty(path, stamp)
        emptied.append(path.name)

    monkeypatch.setattr(fp8_cast_bf16, "prove", log_prove)
    monkeypatch.setattr(fp8_cast_bf16, "empty", log_empty)
    main(independent, independent.parent / "out", delete_source=True)
    assert sorted(emptied) == sorted(takers)


def test_a_shard_is_emptied_before_what_does_not_need_it_is_written(independent, monkeypatch):
    """Otherwise the disk would have to hold both checkpoints."""
    events, write, empty = [], fp8_cast_bf16.write_shards, fp8_cast_bf16.empty
    monkeypatch.setattr(fp8_cast_bf16, "write_shards", lambda shards, *more: (
        events.extend(shard.name for shard in shards), write(shards, *more)))
    monkeypatch.setattr(fp8_cast_bf16, "empty", lambda path, stamp: (
        events.append("emptied"), empty(path, stamp)))
    main(independent, independent.parent / "out", delete_source=True)
    assert events == [f"draft/{SHARD}", "emptied", EXTRA, "emptied", ONE, TWO, "emptied", "emptied"]


def test_what_the_disk_holds_is_synced_and_read_back_before_it_is_emptied(source, monkeypatch):
    """The page cache, which would give back what was written to it, must not answer."""
    out, events, fsync = source.parent / "out", [], os.fsync

    def name_of(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        return path.relative_to(source.parent).as_posix() if path != source.parent else "."

    def log(function):
        return lambda number, *more: (events.append((function.__name__, name_of(number))),
                                      function(number, *more))[1]

    compare = fp8_cast_bf16.compare_values

    def log_compare(steps, out, pool, quiet):
        events.append(("compare", steps[0][0].name))
        assert all(worker.direct == direct for worker in pool)
        return compare(steps, out, pool, quiet)

    out.mkdir()
    direct = fp8_cast_bf16.direct_flag(out)
    monkeypatch.setattr(os, "fsync", log(fsync))
    monkeypatch.setattr(os, "posix_fadvise", log(os.posix_fadvise))
    monkeypatch.setattr(fp8_cast_bf16, "compare_values", log_compare)
    main(source, out, delete_source=True)
    first = events.index(("fsync", f"in/{ONE}"))
    for name in (ONE, TWO):
        at = events.index(("compare", name))
        dropped = events.index(("posix_fadvise", f"out/{name}"))
        for synced in (f"out/{name}", "out", "."):
            assert ("fsync", synced) in events[:dropped], synced
        assert dropped < at < first


def test_the_shards_of_small_outputs_come_first(tmp_path):
    shards = {}
    for rows, name in ((300, "a"), (100, "b"), (200, "c")):
        shards[f"{name}.safetensors"] = {f"{name}.weight": torch.rand(rows, 9).bfloat16()}
    source = write_checkpoint(tmp_path / "in", shards, {})
    plan = fp8_cast_bf16.make_plan(source)
    order = fp8_cast_bf16.emptying_order(plan, set())
    assert [shard.name for shard, _ in order] == [
        f"{name}.safetensors" for name in ("b", "c", "a")]
    assert all(paths == [source / shard.name] for shard, paths in order)


def test_what_is_there_already_comes_before_what_must_be_written(tmp_path):
    shards = {}
    for rows, name in ((300, "a"), (100, "b"), (200, "c")):
        shards[f"{name}.safetensors"] = {f"{name}.weight": torch.rand(rows, 9).bfloat16()}
    plan = fp8_cast_bf16.make_plan(write_checkpoint(tmp_path / "in", shards, {}))
    order = fp8_cast_bf16.emptying_order(plan, {"a.safetensors"})
    assert [shard.name[0] for shard, _ in order] == ["a", "b", "c"]


def test_a_small_shard_that_holds_the_scales_of_a_large_one_waits_for_it(tmp_path):
    large, _ = one_weight()
    small = {"w.weight_scale_inv": large.pop("w.weight_scale_inv"), "norm": torch.ones(3)}
    shards = {"a.safetensors": small, "b.safetensors": {"middle": torch.rand(900)},
              "c.safetensors": large}
    source = write_checkpoint(tmp_path / "in", shards, CONFIG)
    order = fp8_cast_bf16.emptying_order(fp8_cast_bf16.make_plan(source), set())
    assert [(shard.name[0], [path.name[0] for path in paths]) for shard, paths in order] == [
        ("b", ["b"]), ("c", ["c"]), ("a", ["a"])]


# --- a second run, and other commands on what is emptied ---


def test_the_same_command_again_finds_nothing_to_do(emptied, tmp_path, capsys):
    before = stamps(emptied), stamps(tmp_path / "out")
    capsys.readouterr()
    main(emptied, tmp_path / "out", delete_source=True)
    assert "Nothing to do: the output is complete\n" in capsys.readouterr().out
    assert (stamps(emptied), stamps(tmp_path / "out")) == before


def test_a_run_without_the_option_accepts_the_output_of_an_emptied_input(emptied, tmp_path, capsys):
    before = stamps(tmp_path / "out")
    capsys.readouterr()
    main(emptied, tmp_path / "out")
    assert capsys.readouterr().out.endswith("Nothing to do: the output is complete\n")
    assert stamps(tmp_path / "out") == before


def test_an_emptied_shard_is_not_called_newer_than_its_output(emptied, tmp_path, capsys):
    later = (tmp_path / "out" / ONE).stat().st_mtime + 10
    os.utime(emptied / ONE, (later, later))
    main(emptied, tmp_path / "out")
    assert "newer" not in capsys.readouterr().out


def test_a_dry_run_on_an_emptied_input_plans_and_writes_nothing(emptied, tmp_path, capsys):
    before = contents(tmp_path)
    for delete_source in (False, True):
        capsys.readouterr()
        main(emptied, tmp_path / "out", dry_run=True, delete_source=delete_source)
        assert "Already there: 2 of 2 shards" in capsys.readouterr().out
        assert contents(tmp_path) == before


def test_a_dry_run_of_emptying_changes_nothing(source, tmp_path, capsys):
    before = contents(tmp_path)
    main(source, tmp_path / "out", dry_run=True, delete_source=True)
    assert " more than now at any time, " in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_verify_says_what_it_did_not_compare(emptied, tmp_path, capsys):
    main(emptied, tmp_path / "out", verify=True, report=tmp_path / "r.json")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "Verified 0 of 6 tensors: no differences; the input of the others has been emptied")
    assert json.loads((tmp_path / "r.json").read_text())["not_compared"] == 6


def test_verify_compares_what_the_input_still_gives(emptied, tmp_path, capsys):
    shutil.copy(tmp_path / "whole" / TWO, emptied)
    capsys.readouterr()
    main(emptied, tmp_path / "out", verify=True)
    assert "Verified 2 of 6 tensors" in capsys.readouterr().out
    flip(tmp_path / "out" / TWO, -1)
    with pytest.raises(CheckpointError, match="differs from what the input gives in 1 place"):
        main(emptied, tmp_path / "out", verify=True)


def test_what_is_missing_beside_the_shards_is_made_though_the_input_is_emptied(emptied, tmp_path):
    before = contents(tmp_path / "out")
    for name in ("config.json", INDEX, "tokenizer.json"):
        (tmp_path / "out" / name).unlink()
    main(emptied, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_input_that_is_downloaded_again_is_emptied_again(emptied, tmp_path):
    for name in (ONE, TWO):
        shutil.copy(tmp_path / "whole" / name, emptied)
    before = stamps(tmp_path / "out")
    main(emptied, tmp_path / "out", delete_source=True)
    assert is_emptied(emptied / ONE)
    assert is_emptied(emptied / TWO)
    assert stamps(tmp_path / "out") == before


def test_the_tensors_of_an_emptied_input_cannot_be_read(emptied):
    with pytest.raises(CheckpointError, match="has been emptied by --delete-source"):
        next(fp8_cast_bf16.bf16_tensors(emptied))


# --- interruptions ---


@pytest.mark.parametrize("function, number", [
    *itertools.product(["prove", "empty"], range(4)), ("publish", 0)])
def test_an_interrupted_run_is_continued(independent, monkeypatch, tmp_path, function, number):
    expected = write_independent(tmp_path / "whole")
    main(tmp_path / "whole", tmp_path / "expected")
    real, calls = getattr(fp8_cast_bf16, function), []

    def interrupt(*operands):
        calls.append(operands)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return real(*operands)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fp8_cast_bf16, function, interrupt)
        main(independent, tmp_path / "out", delete_source=True)
    done = sum(is_emptied(independent / name) for name in SHARDS)
    assert done == {"prove": min(number, 2), "empty": number, "publish": 4}[function]
    assert_recoverable(independent, [tmp_path / "out"], expected)
    assert not {"config.json", INDEX} & {*contents(tmp_path / "out")}
    main(independent, tmp_path / "out", delete_source=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert all(is_emptied(independent / name) for name in SHARDS)


def test_a_run_without_the_option_continues_one_that_emptied_some(independent, monkeypatch):
    out, real = independent.parent / "out", fp8_cast_bf16.empty
    main(independent, independent.parent / "expected")

    def once(path, stamp):
        real(path, stamp)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fp8_cast_bf16, "empty", once)
        main(independent, out, delete_source=True)
    before = contents(independent)
    main(independent, out)
    assert contents(out) == contents(independent.parent / "expected")
    assert contents(independent) == before


# --- what is printed ---


def test_the_first_and_the_last_line_say_what_becomes_of_the_input(source, capsys):
    assert cli(arguments(source, "--delete-source")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Input shards will be emptied as their output is verified"
    assert lines[-1] == f"{source} now holds headers and side files only"


def test_each_emptied_shard_is_printed_and_reported(independent, tmp_path, capsys):
    main(independent, tmp_path / "out", delete_source=True, report=tmp_path / "r.json")
    said = capsys.readouterr().out
    lines = re.findall(r"Emptied (\S+) \(\S+B\); (\d) of 4 output shards proven", said)
    assert lines == [(f"draft/{SHARD}", "1"), (EXTRA, "2"), (ONE, "4"), (TWO, "4")]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["emptied_shards"] == SHARDS
    assert report["status"] == "converted"


def test_the_space_line_says_what_is_taken_at_most(source, capsys):
    main(source, source.parent / "out", delete_source=True)
    (line,) = re.findall("Space: .*", capsys.readouterr().out)
    assert re.match(r"Space: \S+ to write, at most \S+ more than now at any time, \S+ free", line)


def test_a_run_that_keeps_its_input_says_nothing_of_emptying(source, capsys):
    main(source, source.parent / "out")
    assert "empti" not in capsys.readouterr().out


# --- proof ---


@pytest.mark.parametrize("place", [-1, 3000, "header"])
def test_a_shard_that_does_not_read_back_is_named_and_its_input_left(source, monkeypatch, place):
    out, real = source.parent / "out", fp8_cast_bf16.write_shards

    def write(shards, *more):
        real(shards, *more)
        if shards[0].name == ONE:
            content = (out / ONE).read_bytes()
            flip(out / ONE, content.index(b"norm") if place == "header" else place)

    with monkeypatch.context() as patch:
        patch.setattr(fp8_cast_bf16, "write_shards", write)
        assert_stops(source, f"{out / ONE}: does not read back as what the input gives; its input "
                             "has been left as it is")
    assert "config.json" not in contents(out)
    (out / ONE).unlink()  # As the message says.
    main(source, out, delete_source=True)
    assert_holds(out / ONE, several_kinds()[1][ONE])


def test_an_output_made_earlier_that_has_another_bit_is_not_trusted(source, out):
    flip(out / TWO, -1)
    assert_stops(source, f"{out / TWO}: does not read back")
    assert {"config.json", INDEX} < {*contents(out)}


@pytest.mark.parametrize("dtype, code", [(torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0x7C),
                                         (torch.float8_e5m2, 0x7E)])
def test_an_output_with_nan_or_infinite_values_stops_the_run(tmp_path, dtype, code):
    """They lie where no sample is taken."""
    codes = finite_codes(512, 256, dtype=dtype)
    codes.view(torch.uint8)[0, 0] = code
    scale = torch.full((4, 2), 1e-6 if dtype == torch.float8_e5m2 else 1e-3)
    shards = {SHARD: {"a.weight": codes, "a.weight_scale_inv": scale}}
    source = write_checkpoint(tmp_path / "in", shards, CONFIG)
    assert_stops(source, "model.safetensors: a.weight has NaN or infinite values, so its input has "
                         "been left as it is")
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out" / SHARD, {"a.weight": dequantized(codes, scale)})


@pytest.mark.parametrize("change", ["touched", "written", "replaced", "linked", "longer"])
def test_an_input_shard_that_changed_in_between_is_left(source, monkeypatch, tmp_path, change):
    path, real = source / ONE, fp8_cast_bf16.prove
    before = contents(source)

    def prove(shard, *more):
        real(shard, *more)
        if shard.name != TWO:
            return
        if change == "touched":
            os.utime(path)
        elif change == "written":
            flip(path, -1)
        elif change == "replaced":
            stat = path.stat()
            shutil.copy(path, tmp_path / "copy")
            os.utime(tmp_path / "copy", ns=(stat.st_atime_ns, stat.st_mtime_ns))
            os.replace(tmp_path / "copy", path)
        elif change == "linked":
            os.link(path, tmp_path / "second")
        else:
            with open(path, "ab") as file:
                file.write(b"x")

    monkeypatch.setattr(fp8_cast_bf16, "prove", prove)
    with pytest.raises(CheckpointError, match=f"{ONE}: has been changed since the run began; it is "
                                              "left as it is"):
        main(source, tmp_path / "out", delete_source=True)
    assert sizes(source)[ONE] == len(before[ONE]) + (change == "longer")


def half_emptied(source: Path, out: Path, monkeypatch) -> None:
    """Empty the first of two shards that need each other."""
    real = fp8_cast_bf16.empty

    def once(path, stamp):
        real(path, stamp)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fp8_cast_bf16, "empty", once)
        main(source, out, delete_source=True)
    assert is_emptied(source / ONE)
    assert not is_emptied(source / TWO)


def test_what_can_still_be_compared_with_a_partly_emptied_input_is(source, tmp_path, monkeypatch):
    """The output of a fine-tune has the same table."""
    half_emptied(source, tmp_path / "out", monkeypatch)
    write_checkpoint(tmp_path / "tune", several_kinds(seed=1)[0], CONFIG)
    main(tmp_path / "tune", tmp_path / "tuned")
    assert_stops(source, f"{TWO}: does not read back", f"Keep it until {source / ONE}, which is "
                 "emptied, is downloaded again", out=tmp_path / "tuned")


# --- refusals ---


def refused_checkpoint(tmp_path: Path, kind: str) -> tuple[Path, str]:
    """Write a checkpoint that must not be emptied; return it, and why not."""
    tensors, config = one_weight()[0], CONFIG
    small = (torch.rand(9, 9) / 9).to(torch.float8_e4m3fn)
    int8 = (torch.arange(16) - 8).view(4, 4).to(torch.int8)
    rows = torch.full((4, 1), 0.001)
    if kind == "implausible":
        tensors["w.weight_scale_inv"], why = torch.full((2, 1), 9.0), "have a root mean square of"
    elif kind == "no scale":
        tensors["v.weight"], why = small, "v.weight is FP8 and has no scale"
    elif kind == "no weight":
        tensors["v.weight_scale_inv"], why = torch.ones(1, 1), "v.weight_scale_inv is a scale of no"
    elif kind == "note of ComfyUI":
        note = torch.tensor([*json.dumps({"format": "float8_e4m3fn"}).encode()], dtype=torch.uint8)
        tensors["l.weight"], tensors["l.weight_scale"] = packed(9, 8) % 120, torch.full((1,), 0.001)
        tensors["l.comfy_quant"], why = note, f"l.comfy_quant {PLANNING}"
    elif kind == "zero points":
        tensors = {"w.weight": int8, "w.weight_scale": rows,
                   "w.weight_zero_point": torch.zeros(4, dtype=torch.int8)}
        config, why = method("w8a8_int8"), f"w.weight_zero_point {PLANNING}"
    elif kind == "order of groups":
        tensors = {"w.weight": finite_codes(5, 8), "w.weight_scale": torch.full((5, 2), 0.001),
                   "w.weight_g_idx": torch.tensor([0] * 4 + [1] * 4)}
        config = ct_config(strategy="group", group_size=4)
        why = f"w.weight_g_idx {PLANNING}"
    elif kind == "shape of INT4":
        tensors = {"m.weight_packed": packed(30, 32).view(torch.int32),
                   "m.weight_scale": torch.full((30, 2), 0.01), "m.weight_shape": torch.tensor(
                       [30, 64])}
        config = ct_config(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
        config["quantization_config"]["format"] = "pack-quantized"
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
        why = f"m.weight_shape {PLANNING}"
    return write_checkpoint(tmp_path / "in", {SHARD: tensors}, config), why


@pytest.mark.parametrize("kind", ["implausible", "no scale", "no weight", "note of ComfyUI",
                                  "zero points", "order of groups", "shape of INT4"])
def test_what_may_not_be_read_rightly_or_planned_again_is_refused(tmp_path, kind):
    source, why = refused_checkpoint(tmp_path, kind)
    assert_refused(source, why, "nothing has been emptied by this run")
    main(source, tmp_path / "without")


@pytest.mark.parametrize("dry_run", [False, True])
def test_weights_without_a_scale_are_refused_though_they_would_be_cast(tmp_path, dry_run):
    source, why = refused_checkpoint(tmp_path, "no scale")
    assert_refused(source, why, missing_scale="cast", dry_run=dry_run)
    main(source, tmp_path / "without", missing_scale="cast")


def test_a_link_is_refused(source, tmp_path):
    (source / TWO).rename(tmp_path / "blob")
    (source / TWO).symlink_to(tmp_path / "blob")
    assert_refused(source, f"{source / TWO} is a link or has a second name")


def test_a_shard_in_a_linked_folder_is_refused(independent, tmp_path):
    (independent / "draft").rename(tmp_path / "draft")
    (independent / "draft").symlink_to(tmp_path / "draft")
    index = json.loads((independent / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(["d.weight", "d.weight_scale_inv", "norm.d"],
                                         f"draft/{SHARD}")
    (independent / INDEX).write_text(json.dumps(index))
    assert_refused(independent, f"{SHARD} is a link or has a second name")


def test_an_input_that_is_itself_named_by_a_link_is_emptied(source, tmp_path):
    (tmp_path / "name").symlink_to(source)
    main(tmp_path / "name", tmp_path / "out", delete_source=True)
    assert is_emptied(source / ONE)


def test_a_shard_with_a_second_name_is_refused(source, tmp_path):
    os.link(source / ONE, tmp_path / "second")
    assert_refused(source, f"{source / ONE} is a link or has a second name")


def test_an_output_that_leads_back_into_the_input_is_refused(source, out, tmp_path):
    """The draft has been converted before, so it is as planned, and it would prove itself."""
    draft = {SHARD: {"n.weight": torch.rand(30, 30).bfloat16()}}
    write_checkpoint(source / "draft", draft, {"model_type": "x"}, index=False)
    main(source, tmp_path / "first")
    shutil.rmtree(source / "draft")
    shutil.copytree(tmp_path / "first/draft", source / "draft")
    main(source, out)
    shutil.rmtree(out / "draft")
    (out / "draft").symlink_to(source / "draft")
    assert_stops(source, f"{source / 'draft' / SHARD} is reached through a link in {out}, too")


def test_a_shard_with_a_tensor_that_the_index_finds_elsewhere_is_refused(tmp_path):
    shards = {ONE: {"x": torch.ones(9, 9), "y": torch.ones(3)}, TWO: {"z": torch.ones(9)}}
    source = write_checkpoint(tmp_path / "in", shards, CONFIG)
    save_file({"z": torch.ones(9), "x": torch.zeros(9, 9)}, source / TWO)
    assert_refused(source, f"{source / TWO} has changed since it was planned, or has a tensor th")


def test_a_shard_that_changes_between_the_plan_and_its_stamp_is_refused(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(9, 9)}}, CONFIG)
    real = fp8_cast_bf16.report_plan

    def change(*arguments):
        save_file({"x": torch.zeros(9, 9), "y": torch.ones(99)}, source / SHARD)
        return real(*arguments)

    monkeypatch.setattr(fp8_cast_bf16, "report_plan", change)
    with pytest.raises(CheckpointError, match=f"{SHARD} has changed since it was planned"):
        main(source, tmp_path / "out", delete_source=True)
    assert not is_emptied(source / SHARD)


def test_a_shard_that_may_not_be_written_to_is_refused(source, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: (
        real(path, mode) and not (Path(path).name == ONE and mode & os.W_OK)))
    assert_refused(source, f"{source / ONE} is not writable")


def test_an_output_on_another_file_system_is_refused(source, monkeypatch):
    real = fp8_cast_bf16.stamp
    monkeypatch.setattr(fp8_cast_bf16, "stamp", lambda stat: (0, *real(stat)[1:]))
    assert_refused(source, f"{source.parent / 'out'} are on different file systems")


def test_an_output_on_a_tmpfs_is_refused(source):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == source.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    out = shm / f"fp8_cast_bf16.{os.getpid()}" / "out"
    assert_refused(source, f"{out} are on different file systems", out=out)
    assert not out.parent.exists()


def test_a_file_system_that_does_not_say_what_is_free_is_refused(source, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16.shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert_refused(source, "does not say how much space is free")


@pytest.mark.parametrize("options", [
    {"verify": True}, {"ranks": fp8_cast_bf16.Ranks(0, 2, 0, 2)},
    {"ranks": fp8_cast_bf16.Ranks(1, 2, 1, 2)}])
def test_verify_and_several_ranks_are_refused(source, tmp_path, options):
    before = contents(tmp_path)
    with pytest.raises(fp8_cast_bf16.UsageError, match="--delete-source: not with --verify"):
        main(source, tmp_path / "out", delete_source=True, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("folder", [".", "draft"])
def test_an_input_that_another_run_empties_is_refused(independent, folder):
    number = os.open(independent / folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        assert_stops(independent, f"{independent / folder}: another run is writing there")
        assert not (independent.parent / "out").exists()
    finally:
        os.close(number)


@pytest.mark.parametrize("folder", [".", "draft"])
def test_an_input_that_cannot_be_locked_is_refused(independent, monkeypatch, folder):
    real = fcntl.flock

    def refuse(number, operation):
        if os.fstat(number).st_ino == (independent / folder).stat().st_ino:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(number, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert_refused(independent, f"{independent / folder}: cannot be locked")


def test_a_system_without_locks_is_refused(source, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "fcntl", None)
    assert_refused(source, f"{source}: cannot be locked")


def test_the_input_is_locked_while_it_is_emptied(independent, monkeypatch):
    real, locked = fp8_cast_bf16.write_shards, []

    def write(*operands):
        for folder in (independent, independent / "draft"):
            number = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(number)
            locked.append(folder)
        real(*operands)

    monkeypatch.setattr(fp8_cast_bf16, "write_shards", write)
    main(independent, independent.parent / "out", delete_source=True)
    assert len(locked) == 8


# --- outputs whose input has been emptied ---


def damage(path: Path, how: str) -> None:
    path.chmod(0o644)
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"x")
    elif how == "no shard":
        path.write_bytes(b"x")
    elif how == "linked":
        path.rename(path.parent.parent / "elsewhere")
        path.symlink_to(path.parent.parent / "elsewhere")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        tensors = load_file(path)
        name = next(iter(tensors))
        tensor = tensors.pop(name)
        tensors |= {"names": {f"{name}s": tensor}, "dtypes": {name: tensor.view(torch.int16)},
                    "shapes": {name: tensor[None]}, "fewer": {}}[how]
        save_file(tensors, path, metadata={"format": "pt"})


DAMAGES = ["missing", "cut", "longer", "no shard", "linked", "folder", "names", "dtypes", "shapes",
           "fewer"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("options", [{}, {"delete_source": True}, {"dry_run": True}])
def test_a_missing_or_wrong_output_of_an_emptied_shard_is_an_error_and_left(
    emptied, tmp_path, how, options
):
    path = tmp_path / "out" / TWO
    damage(path, how)
    before, there = contents(tmp_path), stamps(tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        main(emptied, tmp_path / "out", **options)
    assert str(caught.value) == (
        f"{path}: is missing or not whole, and its input has been emptied by --delete-source; "
        f"download {emptied / ONE} again, and whatever else this program then names")
    assert contents(tmp_path) == before
    assert stamps(tmp_path / "out") == there


def test_an_output_of_an_emptied_input_cannot_be_made_elsewhere(emptied, tmp_path):
    before = contents(emptied)
    with pytest.raises(CheckpointError, match="has been emptied by --delete-source; download"):
        main(emptied, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert contents(emptied) == before


def test_a_missing_output_is_made_when_all_that_is_named_has_been_downloaded(emptied, tmp_path):
    expected = contents(tmp_path / "out")
    (tmp_path / "out" / TWO).unlink()
    for name in (ONE, TWO):
        with pytest.raises(CheckpointError, match=f"download {emptied / name} again"):
            main(emptied, tmp_path / "out", delete_source=True)
        shutil.copy(tmp_path / "whole" / name, emptied)
    main(emptied, tmp_path / "out", delete_source=True)
    assert contents(tmp_path / "out") == expected
    assert is_emptied(emptied / ONE)
    assert is_emptied(emptied / TWO)


def test_verify_advises_no_deletion_of_what_needs_an_emptied_shard_too(emptied, tmp_path, capsys):
    """The rest of the output shard could not be made again."""
    shutil.copy(tmp_path / "whole" / ONE, emptied / ONE)
    (tmp_path / "out" / ONE).chmod(0o644)
    flip(tmp_path / "out" / ONE, header_of(tmp_path / "out" / ONE))  # of `bias`, which is copied
    with pytest.raises(CheckpointError, match="keep it, and download the emptied input shards"):
        main(emptied, tmp_path / "out", verify=True)
    assert f"keep the file until {emptied / TWO} is downloaded again" in capsys.readouterr().out


def test_a_shard_that_is_downloaded_again_is_left_while_its_output_cannot_be_proven(
    emptied, tmp_path
):
    """a.weight has its scale in the other shard, so that it cannot be compared yet."""
    shutil.copyfile(tmp_path / "whole" / ONE, emptied / ONE)
    assert_stops(emptied, f"{ONE}: is newer than", f"{emptied / TWO} is emptied; download that")
    shutil.copyfile(tmp_path / "whole" / TWO, emptied / TWO)
    main(emptied, tmp_path / "out", delete_source=True)
    assert is_emptied(emptied / ONE) and is_emptied(emptied / TWO)


def test_verify_advises_no_deletion_of_what_cannot_be_made_again(emptied, tmp_path, capsys):
    damage(tmp_path / "out" / TWO, "fewer")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        main(emptied, tmp_path / "out", verify=True)
    assert "differs from what the input gives" in str(caught.value)
    assert "delete" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("delete_source", [False, True])
def test_an_output_that_another_version_wrote_is_accepted(emptied, tmp_path, capsys, delete_source):
    """Its header has neither this version's metadata nor its padding."""
    path = tmp_path / "out" / TWO
    path.chmod(0o644)
    save_file(load_file(path), path, metadata={"format": "pt", "other": "1"})
    before = stamps(tmp_path / "out")
    main(emptied, tmp_path / "out", delete_source=delete_source)
    assert stamps(tmp_path / "out") == before
    assert_holds(path, several_kinds()[1][TWO])


def test_no_other_checkpoint_replaces_the_output_of_an_emptied_input(emptied, tmp_path):
    """Of the same headers: its shards would be taken for those of an earlier run."""
    half = tmp_path / "half"
    shutil.copytree(emptied, half)
    write_checkpoint(tmp_path / "tune", several_kinds(seed=1)[0], CONFIG)
    shutil.copy(tmp_path / "tune" / ONE, half)
    before = stamps(tmp_path / "out")
    main(half, tmp_path / "out")
    assert stamps(tmp_path / "out") == before


def test_a_whole_checkpoint_of_the_same_names_does_not_replace_it_either(emptied, tmp_path):
    write_checkpoint(tmp_path / "tune", several_kinds(seed=1)[0], CONFIG)
    before, there = contents(tmp_path), stamps(tmp_path / "out")
    for options in ({}, {"dry_run": True}, {"delete_source": True}):
        with pytest.raises(CheckpointError, match="read-only: it may be the only copy of an input"):
            main(tmp_path / "tune", tmp_path / "out", **options)
        assert contents(tmp_path) == before
        assert stamps(tmp_path / "out") == there


# --- the watch on the free space ---


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "WATCHED", 4096)
    monkeypatch.setattr(fp8_cast_bf16, "PATIENCE", 0.05)
    monkeypatch.setattr(fp8_cast_bf16, "POLL", 0.01)


def test_space_that_does_not_rise_ends_the_run_after_one_shard(
    independent, monkeypatch, impatient, tmp_path
):
    monkeypatch.setattr(fp8_cast_bf16.shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    main(independent, tmp_path / "expected")
    with pytest.raises(CheckpointError, match=r"draft/model.safetensors: emptying it has not freed "
                                              r"its space .*no more shards will be emptied"):
        main(independent, tmp_path / "out", delete_source=True)
    assert [name for name in SHARDS if is_emptied(independent / name)] == SHARDS[:1]
    main(independent, tmp_path / "out")  # As the message says.
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_space_that_rises_late_lets_the_run_go_on(independent, monkeypatch, tmp_path):
    monkeypatch.setattr(fp8_cast_bf16, "WATCHED", 4096)
    monkeypatch.setattr(fp8_cast_bf16, "POLL", 0.01)
    looks = []

    def usage(path):
        looks.append(is_emptied(independent / SHARDS[0]))
        return Usage(10**9, 0, 10**8 + 10**7 * (sum(looks) > 3))

    monkeypatch.setattr(fp8_cast_bf16.shutil, "disk_usage", usage)
    main(independent, tmp_path / "out", delete_source=True)
    assert sum(looks) > 3
    assert all(is_emptied(independent / name) for name in SHARDS)


def test_small_shards_are_not_watched(independent, monkeypatch, tmp_path):
    """They tell nothing about a disk on which others write."""
    monkeypatch.setattr(fp8_cast_bf16, "PATIENCE", 0)
    monkeypatch.setattr(fp8_cast_bf16.shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    main(independent, tmp_path / "out", delete_source=True)
    assert all(is_emptied(independent / name) for name in SHARDS)


# --- whether the disk suffices ---

BYTES = 512 * 512  # Of the one weight in each of four shards, which has twice as many in BF16.


@pytest.fixture
def four(tmp_path):
    """Four shards of the same size, none of which needs another."""
    shards = {}
    for name in "abcd":
        shards[f"{name}.safetensors"] = {
            f"{name}.weight": finite_codes(512, 512),
            f"{name}.weight_scale_inv": torch.full((4, 4), 0.001)}
    return write_checkpoint(tmp_path / "in", shards, CONFIG)


def free(monkeypatch, size: float) -> None:
    monkeypatch.setattr(fp8_cast_bf16.shutil, "disk_usage",
                        lambda path: Usage(10**9, 0, int(size)))


def test_a_disk_that_holds_the_peak_but_not_both_suffices(four, monkeypatch):
    """Four outputs of two units, while three inputs of one have gone: five, and not eight."""
    free(monkeypatch, 5.5 * BYTES)
    with pytest.raises(CheckpointError, match="not enough space"):
        main(four, four.parent / "without")
    main(four, four.parent / "out", delete_source=True)
    assert len(contents(four.parent / "out")) == 6


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_disk_that_does_not_hold_the_peak_is_refused_with_the_figure(
    four, monkeypatch, capsys, dry_run
):
    free(monkeypatch, 4.5 * BYTES)
    with pytest.raises(CheckpointError, match=r"not enough space: \S+ short") as caught:
        main(four, four.parent / "out", delete_source=True, dry_run=dry_run)
    short = int(re.search(r"space: (\d+)kB short", str(caught.value))[1])
    assert short * 1000 == pytest.approx(BYTES / 2, abs=0.3 * BYTES)
    assert "at most 1.3" in capsys.readouterr().out
    assert not (four.parent / "out").exists()
    assert not any(is_emptied(path) for path in four.glob("*.safetensors"))


def test_outputs_that_are_there_take_no_more_space(four, monkeypatch):
    """Their inputs go first, so that the peak is three outputs less three inputs, or less."""
    out = four.parent / "out"
    main(four, out)
    (out / "d.safetensors").unlink()
    free(monkeypatch, 0.5 * BYTES)
    with pytest.raises(CheckpointError, match="not enough space"):
        main(four, out)
    main(four, out, delete_source=True)
    assert len(contents(out)) == 6


def test_the_disk_never_holds_more_than_was_predicted(four, monkeypatch):
    out, predicted, taken, real = four.parent / "out", [], [], fp8_cast_bf16.write_shards

    def used():
        files = [path for folder in (four, out) for path in folder.rglob("*") if path.is_file()]
        for path in files:
            fp8_cast_bf16.sync(path)
        return sum(path.stat().st_blocks * 512 for path in files)

    def write(*operands):
        real(*operands)
        taken.append(used())

    peak = fp8_cast_bf16.peak_space
    monkeypatch.setattr(fp8_cast_bf16, "peak_space", lambda *operands: (
        predicted.append(peak(*operands)), predicted[-1])[1])
    monkeypatch.setattr(fp8_cast_bf16, "write_shards", write)
    before = used()
    main(four, out, delete_source=True)
    (most,) = predicted
    assert max(*taken, used()) <= before + most <= max(taken) + 0.2 * BYTES


# --- faults ---


def test_some_faults_while_an_input_is_emptied_lose_nothing(tmp_path):
    command = [sys.executable, ROOT / "tests/faults.py", tmp_path, "--delete-source"]
    done = subprocess.run([*command, "--every", "250", "--kills", "3"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    counts = [int(count) for count in re.findall(r"'\w+': (\d+)", done.stdout)]
    assert len(counts) == 12
    assert sum(counts) > 20
