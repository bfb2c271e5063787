"""Publishing: the files beside the shards, in which order all get their names, and what stands in
the way in OUT, where nothing under a final name is ever replaced.
"""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import checkpoints as c
from checkpoints import CONFIG, FP8_CONFIG, INDEX, ONE, SHARD, TENSORS, TWO
from fp8_cast_bf16 import cli, main

LOCK = ".fp8_cast_bf16.lock"
LEFTOVER = f"{SHARD}.{'0' * 16}.{'1' * 8}.tmp"


def plain_checkpoint(folder, **beside):
    """Write a checkpoint of one copied tensor and files beside it, by name."""
    c.write_checkpoint(folder, {SHARD: {"x": torch.ones(1)}}, {}, index=False)
    for name, text in beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def several(tmp_path):
    """A checkpoint with an index and a file beside it, and a draft model in a folder."""
    for folder, stem in ((tmp_path / "in", "a"), (tmp_path / "in/draft", "b")):
        c.write_checkpoint(folder, {SHARD: c.one_weight(stem)[0]}, CONFIG, index=stem == "a")
    c.write_json(tmp_path / "in/tokenizer.json", {})
    return tmp_path / "in"


def assert_refused(capsys, source, *complaints):
    """See that a conversion and a dry run are refused, and that neither touches anything."""
    before = c.snapshot(source.parent)
    for more in ([], ["--dry-run"]):
        error = c.fails(capsys, source, *more)
        assert [complaint for complaint in complaints if complaint not in error] == []
        assert c.snapshot(source.parent) == before


# --- index and configs ---


# huggingface/diffusers utils/constants.py, SAFE_WEIGHTS_INDEX_NAME
DIFFUSERS = [name.replace("model", "diffusion_pytorch_model") for name in (ONE, TWO)]


@pytest.mark.parametrize("given_index", [True, False])
@pytest.mark.parametrize("names", [(ONE, TWO), ("a.safetensors", "b.safetensors"), DIFFUSERS])
def test_several_shards_have_an_index_of_their_name_with_the_exact_size(
        tmp_path, names, given_index):
    """Whether or not it is given. What else it says of the checkpoint is kept."""
    given, expected = (dict(zip(names, those.values(), strict=True)) for those in c.several_kinds())
    codes, scale = c.packed(10, 32, dtype=torch.int8), c.exponents(10, 2, dtype=c.E8M0)
    given[names[0]] |= {"e.weight": codes, "e.scale": scale}  # Two elements in a byte.
    expected[names[0]]["e.weight"] = c.fp4(codes, c.powers(scale), 32)
    source = c.write_checkpoint(tmp_path / "in", given, CONFIG, given_index)
    index = "diffusion_pytorch_model.safetensors.index.json" if names is DIFFUSERS else INDEX
    metadata = {"mtp": "yes"} if given_index else {}
    if given_index:
        c.edit_json(source / INDEX, lambda value: value["metadata"].update(metadata))
        (source / INDEX).rename(source / index)
    main(source, tmp_path / "out")
    assert {*c.contents(tmp_path / "out")} == {*names, index, "config.json"}
    text = (tmp_path / "out" / index).read_text()
    metadata["total_size"] = sum(
        tensor.nbytes for shard in expected.values() for tensor in shard.values())
    assert json.loads(text) == {
        "metadata": metadata,
        "weight_map": {name: shard for shard in names for name in expected[shard]}}
    assert text.startswith('{\n  "metadata": {\n    "') or not given_index


@pytest.mark.parametrize("given_index", [True, False])
def test_a_shard_of_scales_only_is_not_written_and_the_one_that_is_left_has_an_index(
        tmp_path, given_index):
    """transformers finds a file of a name with numbers through an index only."""
    given, expected = c.one_weight()
    shards = {TWO: {"w.weight_scale_inv": given.pop("w.weight_scale_inv")}, ONE: given}
    main(c.write_checkpoint(tmp_path / "in", shards, CONFIG, given_index), tmp_path / "out")
    c.assert_holds(tmp_path / "out" / ONE, expected)
    assert {*c.contents(tmp_path / "out")} == {ONE, INDEX, "config.json"}
    index = c.read_json(tmp_path / "out" / INDEX)
    assert index["weight_map"] == dict.fromkeys(sorted(expected), ONE)


@pytest.mark.parametrize("tensors, given, expected", [
    (TENSORS,
     {"torch_dtype": "float8_e4m3fn", "quantization_config": FP8_CONFIG, "hidden_size": 3,
      "text_config": {"dtype": "float16", "compression_config": {"format": "x"}, "n": [{"k": 1}]},
      "vision_config": {"dtype": "float32"}, "sub": [{"quantization_config": {}, "name": "é"}]},
     {"torch_dtype": "bfloat16", "hidden_size": 3,
      "text_config": {"dtype": "bfloat16", "n": [{"k": 1}]},
      "vision_config": {"dtype": "float32"}, "sub": [{"name": "é"}]}),
    (TENSORS, {"dtype": None, "hidden_size": 3}, {"dtype": "bfloat16", "hidden_size": 3}),
    (TENSORS, {"torch_dtype": None}, {"torch_dtype": "bfloat16"}),
    ({"w.weight": torch.ones(3, 3).bfloat16()},  # A config that outlived its quantization.
     {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": None},
     {"torch_dtype": "bfloat16"}),
])
def test_configs_describe_plain_bf16_weights(tmp_path, tensors, given, expected):
    source = c.write_checkpoint(tmp_path / "in", {SHARD: tensors}, given)
    c.write_json(source / "config_1m.json", given)  # for another length of context
    main(source, tmp_path / "out")
    for name in ("config.json", "config_1m.json"):
        assert c.read_json(tmp_path / "out" / name) == expected


# --- what is copied ---


def test_all_but_weights_and_hidden_unfinished_and_special_files_is_copied(folder, capsys):
    """A draft model is in a folder of its own, with hidden files, of which macOS leaves most."""
    source, out = folder / "in", folder / "out"
    copied = ["tokenizer.json", "chat template.jinja", "modeling.py", "inference/deep/run.py",
              ".gitattributes", "draft/.gitattributes", "my_quant_notes.json", "x.json~"]
    hidden = [".x", ".git/config", f".git/{SHARD}", ".cache/huggingface/download/x.lock",
              f".{ONE}.Ab3xYz"]
    hidden += [f"{place}{name}" for place in ("", "draft/") for name in (
        ".DS_Store", "._config.json", f"._{SHARD}", f"._{INDEX}", ".x.safetensors")]
    left = ["pytorch_model.bin", "optimizer.pt", "a.pth", "b.ckpt", "q4.gguf", "tf_model.h5",
            "flax_model.msgpack", "model.onnx", "model.onnx_data", "consolidated.safetensors",
            "original/consolidated.00.pth", "pytorch_model.bin.index.json", "x.tmp",
            "old.json.aria2", "hf_quant_config.json", "quantization_config.json",
            "quant_cfg.json", "quanto_qmap.json", "quant_model_description_w8a8.json"]
    plain_checkpoint(source / "draft")
    plain_checkpoint(source, **dict.fromkeys(copied + hidden + left, "{}"))
    for kind in ("pipe", "socket"):
        c.special_file(source / f"draft/{kind}", kind)
    (source / "linked.json").symlink_to("inference/deep/run.py")
    main(source, out)
    found = c.contents(out)
    made = {f"{place}{name}" for place in ("", "draft/") for name in (SHARD, "config.json")}
    assert {*found} == {*copied, "linked.json", *made}
    assert all(found[name] == b"{}" for name in (*copied, "linked.json"))
    assert not (out / "linked.json").is_symlink()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Not copied: " in line]
    # A folder that is left out is one name.
    shown = {*(name.partition("/")[0] for name in left), "draft/pipe", "draft/socket"}
    assert {*line.removeprefix("Not copied: ").split(", ")} == shown


@pytest.mark.parametrize("name", ["config.json.tmp", "quantize_config.json", f"{SHARD}.tmp",
                                  "x.safetensors", INDEX])
def test_folders_with_names_that_mean_something_are_no_files(tmp_path, name):
    source = plain_checkpoint(tmp_path / "in")
    (source / "sub" / name).mkdir(parents=True)
    if name not in (INDEX, "x.safetensors"):
        (source / name).mkdir()
    for _ in range(2):
        main(source, tmp_path / "out")
        assert {*c.contents(tmp_path / "out")} == {SHARD, "config.json"}


def test_a_folder_that_cannot_be_listed_is_an_error_with_its_name(source, monkeypatch, capsys):
    (source / "private").mkdir()

    def refuse(path):
        if Path(path).name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    c.watch(monkeypatch, "scandir", refuse)
    assert f"{source / 'private'}: Permission denied" in c.fails(capsys, source)
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize("problem, said", [
    (None, "was read only in part; try again"),  # A read that would block looks like the end.
    (OSError(errno.EIO, "Input/output error"), "Input/output error")])
def test_a_copy_that_fails_is_no_output(source, monkeypatch, capsys, problem, said):
    def fail(original, file):
        file.write(original.read(1))
        if problem:
            raise problem

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    assert f"{source / 'tokenizer.json'}: {said}" in c.fails(capsys, source)
    assert {*c.contents(source.parent / "out")} == {ONE, TWO}


def test_a_config_of_the_output_that_cannot_be_read_is_named(source, monkeypatch, capsys):
    def fail(file, size=-1):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    broken, config = type("Broken", (io.FileIO,), {"read": fail, "readall": fail}), "config.json"

    def spoil(path, *more, real=open, **options):
        spoiled = str(path) == str(source.parent / "out" / config)
        return broken(path) if spoiled else real(path, *more, **options)

    main(source, source.parent / "out")
    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", spoil)
    said = f"{source.parent / 'out' / config}: Input/output error"
    assert said in c.fails(capsys, source)


# --- the order ---


def log_calls(monkeypatch, out):
    """Return a list that will hold which files below OUT are removed, synced and named."""
    events = []

    def note(what, path):
        if Path(path).is_relative_to(out) and Path(path).name != LOCK:
            events.append((what, Path(path).relative_to(out).as_posix()))

    c.watch(monkeypatch, "unlink", lambda path: note("removed", path), after=True)
    c.watch(monkeypatch, "fsync", lambda number: note("synced", c.file_of(number)), after=True)
    c.watch(monkeypatch, "rename", lambda old, new: note("named", new), after=True)
    return events


def test_what_says_that_all_is_there_goes_first_and_comes_last_and_all_is_synced(
        several, monkeypatch):
    c.write_json(several / "config_1m.json", CONFIG)
    out, shards = several.parent / "out", [SHARD, f"draft/{SHARD}"]
    main(several, out)
    for name in (*shards, "tokenizer.json", "config_1m.json"):
        (out / name).unlink()
    events = log_calls(monkeypatch, out)
    main(several, out)
    made = [event for event in events if event[0] != "synced"]
    removed = {("removed", name) for name in (INDEX, "config.json", "draft/config.json")}
    assert {*made[:3]} == removed
    assert {*made[3:5]} == {("named", name) for name in shards}
    assert made[5] == ("named", "draft/config.json")
    assert {*made[6:8]} == {("named", name) for name in ("tokenizer.json", "config_1m.json")}
    assert made[8:] == [("named", INDEX), ("named", "config.json")]
    at = {event: events.index(event) for event in made}
    last, claim = max(at[event] for event in removed), at["named", "draft/config.json"]
    for name in shards:  # A crash must not bring back a sign of completeness.
        named = at["named", name]
        assert {("synced", "."), ("synced", "draft")} <= {*events[last:named]}
        assert ("synced", Path(name).parent.as_posix()) in events[named:claim]
    assert ("synced", "draft") in events[claim : at["named", "config.json"]]
    for earlier, sign in itertools.pairwise(made[7:]):
        assert ("synced", ".") in events[at[earlier] : at[sign]]
    assert events[-1] == ("synced", ".")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("of_folders", [True, False])
def test_only_folders_of_a_file_system_without_that_need_not_be_synced(
        source, monkeypatch, capsys, number, of_folders):
    out = source.parent / "out"

    def refuse(file):
        if c.file_of(file).is_dir() == of_folders:
            raise OSError(number, os.strerror(number))

    c.watch(monkeypatch, "fsync", refuse)
    if of_folders and number != errno.EIO:
        main(source, out)
        main(source, out, verify=True)
    else:
        assert os.strerror(number) in c.fails(capsys, source)
        assert c.contents(out) == {}


# --- what stands in OUT under a planned name ---


@pytest.mark.parametrize("others", ["complete", "incomplete", "absent"])
@pytest.mark.parametrize("name, kind", [
    *itertools.product([SHARD, "tokenizer.json", "config.json", INDEX],
                       ["empty", "text", "folder", "link", "link to nothing"]),
    *itertools.product([SHARD], ["cut", "longer", "huge header", "header", "no fingerprint"]),
    *itertools.product(["tokenizer.json", "config.json", INDEX, "params.json", "draft/config.json"],
                       ["other values"])])
def test_what_is_not_the_planned_file_is_refused_by_name_and_untouched(
        several, name, kind, others, capsys):
    """It is somebody else's, even if it holds the very same tensors."""
    out = several.parent / "out"
    c.write_json(several / "params.json", {"dim": 1})
    main(several, out)
    c.spoil(out / name, kind)
    gone = {"complete": [], "incomplete": [f"draft/{SHARD}"], "absent": {*c.contents(out)} - {name}}
    for path in gone[others]:
        (out / path).unlink()
    assert_refused(capsys, several, f"{out / name}{c.NOT_PLANNED}")


def test_a_config_of_the_same_values_in_other_words_is_kept(source, out, capsys):
    for name in (INDEX, "config.json"):
        value = c.read_json(out / name)
        (out / name).write_text(json.dumps(dict(reversed(value.items()))))
    assert c.is_kept(source, out, capsys)


@pytest.mark.parametrize("place, target", [  # A file, or a link.
    ("out", ""), ("out/deep", ""), ("out/deep/sub", ""), ("out/deep/sub/deep", ""),
    ("out/deep/sub", "gone"), ("out/deep/sub", "sub")])
def test_what_is_in_the_place_of_a_folder_is_found_before_anything_is_written(
        tmp_path, capsys, place, target):
    source = plain_checkpoint(tmp_path / "in", **{"sub/deep/notes.txt": "notes"})
    out, path = tmp_path / "out/deep", tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target) if target else path.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert str(out / "sub" if "sub" in place else out) in c.fails(capsys, source, out=out)
    assert sorted(tmp_path.rglob("*")) == before


# --- strangers in OUT ---

STRANGERS = ["notes.txt", "draft.tmp", "core", "x.safetensors", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", [*STRANGERS, "draft/mine.safetensors"])
def test_a_folder_with_something_else_and_no_part_of_the_output_is_refused(several, capsys, name):
    path = several.parent / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert_refused(capsys, several, f"{path}: ", "give another folder",
                   c.NOT_PLANNED if "draft/" in name else "")


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_beside_a_part_of_the_output_is_left_alone_unless_loaders_would_take_it(
        source, out, capsys, name):
    (out / name).write_text("mine")
    (out / TWO).unlink()
    if name.endswith(".safetensors"):
        assert_refused(capsys, source, f"{out / name}{c.NOT_PLANNED}")
    else:
        main(source, out)
        assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("name", [*STRANGERS, "draft/x.safetensors"])
def test_beside_a_complete_output_a_stranger_is_no_business_of_ours(several, capsys, name):
    out = several.parent / "out"
    main(several, out)
    (out / name).write_text("mine")
    assert c.is_kept(several, out, capsys)


@pytest.mark.parametrize("missing", [None, TWO, INDEX, "config.json"])
@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_quantization_config_in_the_output_is_refused_because_loaders_obey_it(
        source, out, capsys, name, missing):
    (out / name).write_text("{}")
    if missing:
        (out / missing).unlink()
    assert_refused(capsys, source, f"{out / name}{c.NOT_PLANNED}")


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "notes/draft.tmp", "runs/x",
                                  f"old/{LEFTOVER}", "._config.json", f"._{ONE}", ".DS_Store"])
def test_hidden_files_and_folders_into_which_nothing_is_written_are_left_alone(
        source, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    main(source, tmp_path / "out")
    (tmp_path / "out" / TWO).unlink()
    main(source, tmp_path / "out")
    main(source, tmp_path / "out", verify=True)
    assert path.read_text() == "mine"
    assert (tmp_path / "out/config.json").exists()


def test_a_report_in_the_output_is_no_stranger_however_it_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("out", tmp_path / "out"):
        main(source, out, report="out/report.json")
        assert c.read_json(tmp_path / "out/report.json")["status"] == "complete"


# --- the lock ---


def test_while_another_run_holds_the_lock_nothing_is_written(source, capsys):
    out = source.parent / "out"
    out.mkdir()
    with open(out / LOCK, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert c.fails(capsys, source).startswith(
            f"error: {out}: another run is writing there; let it end")
        assert {*c.contents(out)} == {LOCK}
    assert cli(c.arguments(source)) == 0  # The lock of a run that was killed holds up nobody.
    assert LOCK not in c.contents(out)


def test_a_second_run_on_the_same_output_is_refused_to_the_last_and_does_not_disturb(
        source, monkeypatch):
    """Another begins whenever the first is about to give a file its name."""
    out, statuses = source.parent / "out", []
    main(source, source.parent / "expected")
    c.watch(monkeypatch, "rename", lambda *paths: statuses.append(cli(c.arguments(source))))
    main(source, out, workers=1)
    assert statuses == [1] * 5
    assert c.contents(out) == c.contents(source.parent / "expected")


# --- permission and space ---


@contextlib.contextmanager
def nobody(folder):
    """Be a user who owns nothing but the folder itself, and may read all that is in it."""
    if os.geteuid():
        pytest.skip("needs root")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    os.chown(folder, 65534, 65534)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--verify"]])
def test_a_complete_output_of_another_user_needs_nothing(folder, capsys, more):
    source = plain_checkpoint(folder / "in")
    main(source, folder / "out")
    with nobody(folder):
        before = c.snapshot(folder)
        assert cli(c.arguments(source, *more)) == 0
    assert more or capsys.readouterr().out.endswith(c.NOTHING)
    assert c.snapshot(folder) == before


@pytest.mark.parametrize("place", ["out", "."])
def test_a_folder_that_may_not_be_written_to_is_refused(folder, capsys, place):
    source = plain_checkpoint(folder / "in")
    if place == "out":
        main(source, folder / "out")
        (folder / "out/config.json").unlink()
    with nobody(folder):
        os.chmod(folder, 0o555)
        before = c.snapshot(folder)
        assert re.search(f"{folder / 'out'}.*: Permission denied", c.fails(capsys, source))
    assert c.snapshot(folder) == before


def test_what_is_there_already_needs_no_space_and_leftovers_give_theirs_back(
        source, out, monkeypatch, capsys):
    expected = c.contents(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: c.Usage(10**6, 0, 10**5))
    main(source, out)
    (out / TWO).rename(out / LEFTOVER)
    main(source, out)
    assert c.contents(out) == expected
    (out / TWO).unlink()
    assert_refused(capsys, source, f"{out}: ", "of space are missing")


def test_a_file_system_that_does_not_know_its_size_is_used(source, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: c.Usage(0, 0, 0))
    main(source, source.parent / "out")
    assert "an unknown number of bytes free" in capsys.readouterr().out
