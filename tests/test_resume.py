"""Preflight and resume: what an earlier run left is kept if it is right, and only then."""

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    FP8_CONFIG,
    INDEX,
    ONE,
    TWO,
    contents,
    finite_codes,
    several_kinds,
    write_checkpoint,
)
from fp8_cast_bf16 import CheckpointError, UsageError, cli, main
from make_checkpoint import make_checkpoint

KEY = "fp8_cast_bf16"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path):
    folder = write_checkpoint(tmp_path / "in", several_kinds()[0], CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def out(source, tmp_path):
    """The output of a whole conversion."""
    main(source, tmp_path / "out")
    return tmp_path / "out"


def arguments(source, *more):
    out = source.parent / "out"
    return ["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(out), *more]


def stamps(folder):
    """Return what changes when a file is written anew."""
    stats = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_complete_output_is_left_as_it_is(source, out, capsys):
    before = stamps(out)
    assert cli(arguments(source)) == 0
    assert capsys.readouterr().out.endswith("Nothing to do: the output is complete\n")
    assert stamps(out) == before


def test_shards_that_are_there_are_kept_and_others_made(source, out, capsys):
    expected, before = contents(out), stamps(out)
    (out / TWO).unlink()
    (out / INDEX).unlink()
    capsys.readouterr()
    main(source, out)
    assert "Already there: 1 of 2 shards" in capsys.readouterr().out
    assert contents(out) == expected
    assert stamps(out)[ONE] == before[ONE]


def test_shards_of_another_checkpoint_with_the_same_headers_are_replaced(source, out, tmp_path):
    write_checkpoint(tmp_path / "other", several_kinds(seed=1)[0], CONFIG)
    shutil.copy(source / "tokenizer.json", tmp_path / "other")
    main(tmp_path / "other", tmp_path / "expected")
    assert (out / ONE).stat().st_size == (tmp_path / "expected" / ONE).stat().st_size
    main(tmp_path / "other", out)
    assert contents(out) == contents(tmp_path / "expected")


def data_place(tensor, where):
    """Return a byte of a tensor on disk that lies in its first, middle or last page."""
    return {"first": tensor.start, "middle": (tensor.start + tensor.stop) // 2 + 7,
            "last": tensor.stop - 1}[where]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_an_input_of_which_any_one_tensor_was_retrained_differs(source, out, capsys, where):
    plan = fp8_cast_bf16.make_plan(fp8_cast_bf16.load_checkpoint(source))
    tensors = {t.name: (shard.name, t) for shard in plan.shards for step in shard.steps
               for t in (step.source, step.quantization and step.quantization.scale) if t}
    assert len(tensors) == 9
    for shard, tensor in tensors.values():
        place = min(data_place(tensor, where), tensor.stop - 1)
        with open(tensor.path, "r+b") as file:
            file.seek(place)
            old = file.read(1)[0]
            file.seek(place)
            file.write(bytes([old ^ 1]))
        before = stamps(out)
        capsys.readouterr()
        main(source, out)
        assert f"To be replaced, of another input or another reading: {shard}\n" in (
            capsys.readouterr().out)
        main(source, out, verify=True)
        other = ({ONE, TWO} - {shard}).pop()
        assert stamps(out)[other] == before[other]
        assert stamps(out)[shard] != before[shard]


def test_the_fingerprint_takes_three_whole_pages_of_a_tensor(tmp_path):
    """A fine-tune may leave 98% of the codes as they were."""
    codes = finite_codes(400, 400)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.ones(4, 4)}
    write_checkpoint(tmp_path / "in", {ONE: tensors}, CONFIG)

    def fingerprint():
        (shard,) = fp8_cast_bf16.make_plan(fp8_cast_bf16.load_checkpoint(tmp_path / "in")).shards
        worker = fp8_cast_bf16.Worker(torch.device("cpu"), 0)
        found = fp8_cast_bf16.fingerprint_of(shard, worker)
        worker.close()
        return found

    whole, size = fingerprint(), 160_000
    for place in (0, 4095, size // 2, size // 2 + 4095, size - 4096, size - 1):
        changed = codes.view(torch.uint8).clone()
        changed.view(-1)[place] ^= 1
        write_checkpoint(tmp_path / "in", {ONE: tensors | {"a.weight": changed.view(codes.dtype)}},
                         CONFIG)
        assert fingerprint() != whole, place
    write_checkpoint(tmp_path / "in", {ONE: tensors}, CONFIG)
    assert fingerprint() == whole


def test_a_shards_metadata_is_the_inputs_and_format_and_the_fingerprint(source, out):
    header = safe_metadata(out / ONE)
    assert {*header} == {"format", KEY}
    assert header["format"] == "pt"
    assert re.fullmatch("[0-9a-f]{16}", header[KEY])
    assert header[KEY] != safe_metadata(out / TWO)[KEY]
    assert header[KEY] != "0" * 16


def safe_metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def reading_change(config, change):
    config = json.loads(json.dumps(config))
    config["quantization_config"] |= change
    return config


@pytest.mark.parametrize(
    ("change", "affected"),
    [
        ({"weight_block_size": [128, 64]}, ["a", "b"]),
        ({"weight_scale_semantics": "inverse"}, ["a", "b"]),
        ({"ignored_layers": ["lm_head"]}, []),
    ],
)
def test_another_reading_of_the_same_data_rewrites_every_affected_shard(
    tmp_path, capsys, change, affected
):
    """Only config.json is edited. Two scales for 100 columns fit blocks of 64 and of 96."""
    shards = {}
    for shard, name in ((ONE, "a"), (TWO, "b")):
        shards[shard] = {f"{name}.weight": finite_codes(100, 100),
                         f"{name}.weight_scale_inv": torch.rand(1, 2) + 0.5}
    three = "model-00003.safetensors"
    shards[three] = {"norm.weight": torch.ones(9)}
    config = {"quantization_config": {**FP8_CONFIG, "weight_block_size": [128, 96]}}
    write_checkpoint(tmp_path / "in", shards, config)
    main(tmp_path / "in", tmp_path / "out")
    before = stamps(tmp_path / "out")
    write_checkpoint(tmp_path / "in", shards, reading_change(config, change))
    main(tmp_path / "in", tmp_path / "out")
    names = {"a": ONE, "b": TWO}
    after = stamps(tmp_path / "out")
    assert {shard for shard in shards if before[shard] != after[shard]} == {
        names[name] for name in affected
    }
    main(tmp_path / "in", tmp_path / "out", verify=True)
    main(tmp_path / "in", tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_another_treatment_of_missing_scales_rewrites_the_shard(tmp_path):
    shards = {ONE: {"a.weight": finite_codes(9, 9)}, TWO: {"norm.weight": torch.ones(9)}}
    write_checkpoint(tmp_path / "in", shards, CONFIG)
    for choice in ("keep", "cast", "keep"):
        main(tmp_path / "in", tmp_path / "out", missing_scale=choice)
        main(tmp_path / "in", tmp_path / choice, missing_scale=choice)
        assert contents(tmp_path / "out") == contents(tmp_path / choice)


@pytest.mark.parametrize("newer", [ONE, TWO])
def test_an_input_newer_than_an_accepted_output_is_named_with_verify(source, out, capsys, newer):
    main(source, out)
    assert "Newer" not in capsys.readouterr().out
    later = (out / newer).stat().st_mtime + 10
    os.utime(source / newer, (later, later))
    before = stamps(out)
    main(source, out)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("Newer")]
    assert line == f"Newer than the output made of it: {newer}; run --verify to be sure"
    assert stamps(out) == before


def test_a_newer_shard_of_scales_only_is_named(tmp_path, capsys):
    shards = {ONE: {"a.weight": finite_codes(9, 9)}, TWO: {"a.weight_scale_inv": torch.ones(1, 1)}}
    source, out = write_checkpoint(tmp_path / "in", shards, CONFIG), tmp_path / "out"
    main(source, out)
    later = (out / ONE).stat().st_mtime + 10
    os.utime(source / TWO, (later, later))
    main(source, out)
    assert f"Newer than the output made of it: {TWO}; run --verify" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["cut", "longer", "header"])
def test_a_shard_of_ours_that_is_not_as_planned_is_replaced_and_named(source, out, change, capsys):
    expected = contents(out)
    path, whole = out / ONE, expected[ONE]
    changed = {"cut": whole[:-1], "longer": whole + b"x", "header": whole.replace(b'"pt"', b'"np"')}
    path.write_bytes(changed[change])
    assert path.read_bytes() != whole
    capsys.readouterr()
    main(source, out)
    printed = capsys.readouterr().out
    assert f"To be replaced, of another input or another reading: {ONE}\n" in printed
    assert contents(out) == expected


@pytest.mark.parametrize(
    "kind", ["no fingerprint", "link", "link to nothing", "empty", "text", "huge header", "folder"]
)
def test_a_file_in_the_place_of_a_shard_that_is_not_ours_is_refused(
    source, out, kind, tmp_path, capsys
):
    path, whole = out / ONE, (out / ONE).read_bytes()
    elsewhere = tmp_path / "elsewhere"
    path.unlink()
    if kind == "no fingerprint":
        save_file(load_file(out / TWO), path, metadata={"format": "pt"})
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("link"):
        if kind == "link":
            elsewhere.write_bytes(whole)
        path.symlink_to(elsewhere)
    else:
        path.write_bytes({"empty": b"", "text": b"mine", "huge header": b"\xff" * 99}[kind])
    before, old = contents(out), stamps(out)
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert cli(arguments(source, *more)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {path}: was not written by this version of this program")
        assert "--verify" in error
    assert (contents(out), stamps(out)) == (before, old)


def test_a_folder_with_somebodys_own_model_is_refused_and_untouched(tmp_path, capsys):
    codes = {"a.weight": finite_codes(9, 9), "a.weight_scale_inv": torch.ones(1, 1)}
    name = "model.safetensors"
    write_checkpoint(tmp_path / "in", {name: codes}, CONFIG, index=False)
    main(tmp_path / "in", tmp_path / "ours")
    theirs = load_file(tmp_path / "ours" / name)
    write_checkpoint(tmp_path / "out", {name: theirs}, {"mine": 1}, index=False)
    (tmp_path / "out/notes.txt").write_text("mine")
    before, old = contents(tmp_path / "out"), stamps(tmp_path / "out")
    capsys.readouterr()
    assert cli(arguments(tmp_path / "in")) == 1
    assert f"{tmp_path / 'out' / name}: was not written by" in capsys.readouterr().err
    assert (contents(tmp_path / "out"), stamps(tmp_path / "out")) == (before, old)


@pytest.mark.parametrize(
    "blocked", ["tokenizer.json", "config.json", INDEX, "sub", "sub/deep", "link", "deep link",
                "link to nothing", "link into itself"]
)
def test_what_blocks_a_file_beside_the_shards_is_found_before_anything_is_written(
    source, tmp_path, capsys, blocked
):
    (source / "sub/deep").mkdir(parents=True)
    (source / "sub/deep/notes.txt").write_text("notes")
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    named = out / blocked
    if blocked.endswith("link"):
        named = out / ("sub" if blocked == "link" else "sub/deep")
        named.parent.mkdir(exist_ok=True)
        named.symlink_to(elsewhere)
    elif blocked.startswith("link"):
        named = out / "sub"
        named.symlink_to(elsewhere / "gone" if blocked == "link to nothing" else named)
    elif blocked.startswith("sub"):
        named.parent.mkdir(exist_ok=True)
        named.write_text("mine")
    else:
        named.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--dry-run"]):
        assert cli(arguments(source, *more)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert str(out / named.relative_to(out).parts[0]) in error
        assert "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before


def test_temporary_names_contain_the_fingerprint(source, monkeypatch):
    out, seen = source.parent / "out", set()
    real = fp8_cast_bf16.render

    def look(*operands):
        seen.update(path.name for path in out.glob("*.tmp"))
        return real(*operands)

    monkeypatch.setattr(fp8_cast_bf16, "render", look)
    main(source, out)
    assert {f"{name}.{safe_metadata(out / name)[KEY]}.tmp" for name in (ONE, TWO)} <= seen
    assert not list(out.glob("*.tmp"))


def test_leftovers_of_a_killed_run_are_removed(source, out):
    expected = contents(out)
    for name in (ONE, f"{ONE}.{'0' * 16}", INDEX, "config.json", "tokenizer.json",
                 "fp8_cast_bf16123"):
        (out / f"{name}.tmp").write_text("half")
    main(source, out)
    assert contents(out) == expected


def test_files_beside_the_shards_are_made_right_again(source, out):
    expected = contents(out)
    (out / "config.json").write_text('{"quantization_config": {}}')
    (out / "tokenizer.json").write_text("[]")
    (out / "hf_quant_config.json").write_text("{}")
    main(source, out)
    assert contents(out) == expected


def test_a_folder_in_the_place_of_a_shard_is_an_error_with_its_name(source, capsys):
    (source.parent / "out" / ONE).mkdir(parents=True)
    assert cli(arguments(source)) == 1
    assert ONE in capsys.readouterr().err


def test_a_second_run_on_the_same_output_is_refused(source, capsys):
    out = source.parent / "out"
    out.mkdir()
    number = os.open(out, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    try:
        assert cli(arguments(source)) == 1
        assert "another run is writing there" in capsys.readouterr().err
        assert contents(out) == {}
    finally:
        os.close(number)
    assert cli(arguments(source)) == 0


def test_too_little_space_is_said_before_anything_is_written(source, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**5))
    for more in ([], ["--dry-run"]):
        assert cli(arguments(source, *more)) == 1
        assert "too little space" in capsys.readouterr().err
        assert not (source.parent / "out").exists()


def test_what_is_there_already_needs_no_space(source, out, monkeypatch):
    expected = contents(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**5))
    main(source, out)
    (out / TWO).rename(out / f"{TWO}.tmp")  # its space is free again with the leftover gone
    main(source, out)
    assert contents(out) == expected
    (out / TWO).unlink()
    with pytest.raises(CheckpointError, match=r"too little space"):
        main(source, out)


def test_a_folder_that_may_not_be_written_to_is_refused(source, monkeypatch, capsys):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and real(path, mode))
    assert cli(arguments(source, "--dry-run")) == 1
    assert f"{source.parent}: is not a writable directory" in capsys.readouterr().err


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


def test_a_dry_run_prints_the_plan_and_creates_nothing(source, capsys):
    before = contents(source.parent)
    assert cli(arguments(source, "--dry-run", "--device", "cpu", "--workers", "3")) == 0
    assert not (source.parent / "out").exists()
    assert contents(source.parent) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "Device: cpu (as asked), 3 workers",
        "Input: 2 shards, 9 tensors, 162kB",
        "Output: 2 shards, 6 tensors, 325kB",
        "  3 weights to dequantize: E4M3, F32 scale per 128x128 block",
        "  3 tensors to copy, 3 scales to drop",
        lines[5],
    ]
    assert lines[5].startswith("Space: 344kB to write, ")
    assert lines[5].endswith(" free; memory: 3 workers, at most 33.6MB each")
    assert len(lines) == 6


def test_formats_are_named_in_the_plan(tmp_path, capsys):
    names = ["a.weight", "b.weight", "c.weight", "d.weight", "kept.weight"]
    tensors = {name: finite_codes(256, 256) for name in names}
    scales = {"a": (1,), "b": (256, 1), "c": (1, 256), "d": (256, 8)}
    tensors |= {f"{name}.weight_scale": torch.ones(shape) for name, shape in scales.items()}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {})
    main(tmp_path / "in", tmp_path / "out", dry_run=True)
    printed = capsys.readouterr().out
    for block in ("tensor", "row", "column", "1x32 block"):
        assert f"1 weight to dequantize: E4M3, F32 scale per {block}\n" in printed
    assert "Warning: Missing scale_inv tensor for kept.weight" in printed


def test_the_report_holds_what_was_done(tmp_path):
    shards, _ = several_kinds()
    nan = torch.full((4, 4), 0x7F, dtype=torch.uint8)
    mixed = nan.clone()
    mixed[0] = 0x81
    nan, mixed, kept = (codes.view(torch.float8_e4m3fn) for codes in (nan, mixed, nan.clone()))
    shards[ONE] |= {"n.weight": nan, "n.weight_scale_inv": torch.ones(1, 1), "kept": kept}
    shards[TWO] |= {"i.weight": mixed, "i.weight_scale_inv": torch.full((1, 1), torch.inf)}
    write_checkpoint(tmp_path / "in", shards, CONFIG)
    main(tmp_path / "in", tmp_path / "out", report=tmp_path / "r.json", device="cpu", workers=2)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["options"] == {
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "workers": 2,
        "missing_scale": "keep",
        "dry_run": False,
        "verify": False,
    }
    assert report["versions"]["torch"] == torch.__version__
    assert {"python", "safetensors", "tqdm"} < {*report["versions"]}
    assert report["NaN"] == {"n.weight": 16, "i.weight": 12}
    assert report["infinite"] == {"i.weight": 4}
    assert report["kept_in_fp8"] == {"kept": "no scale"}
    assert report["input"]["tensors"] == 14
    assert report["output"]["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    )
    assert report["bytes_written"] == report["output"]["bytes"]
    assert sum(report["dequantized"].values()) == 5
    assert (report["copied"], report["dropped"]) == (4, 5)
    assert {*report["seconds"]} == {"reading", "decoding", "writing", "syncing", "total"}
    assert all(seconds > 0 for seconds in report["seconds"].values())


@pytest.mark.parametrize("place", ["in/r.json", "out/r.json", "gone/r.json", "in"])
def test_a_report_that_cannot_be_written_is_wrong_usage(source, place):
    with pytest.raises(UsageError, match="--report"):
        main(source, source.parent / "out", report=source.parent / place)
    assert not (source.parent / "out").exists()


def test_a_resumed_run_of_many_shards_makes_what_is_missing(tmp_path):
    make_checkpoint(tmp_path / "in", 10**6, 5)
    main(tmp_path / "in", tmp_path / "out")
    expected = contents(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    for shard in shards[1::2]:
        shard.unlink()
    main(tmp_path / "in", tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == expected
