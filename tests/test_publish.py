"""The files beside the shards: config, index, what is copied; and the folder they go to."""

import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    FP8_CONFIG,
    INDEX,
    ONE,
    ROOT,
    SHARD,
    SPECIAL,
    TENSORS,
    TWO,
    Usage,
    arguments,
    assert_holds,
    assert_same_bits,
    contents,
    convert,
    dequantized,
    edit_json,
    finite_codes,
    load_checkpoint,
    one_weight,
    rand,
    several_kinds,
    special_file,
    stamps,
    write_checkpoint,
    write_json,
)
from fp8_cast_bf16 import CheckpointError, cli, main

AS_NOBODY = """
import os, sys, fp8_cast_bf16 as f
f.versions()  # While the packages can be seen; they may be root's own.
with f.torch.device("cpu"):  # which torch imports more for
    pass
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(f.cli(sys.argv[1:]))
"""


def as_nobody(folder: Path, options: list[str]) -> subprocess.CompletedProcess:
    """Convert as a user who owns nothing but the folder, as root can see to."""
    if os.geteuid():
        pytest.skip("needs root")
    for path in (folder, *folder.rglob("*")):
        if path.name != "private":
            path.chmod(0o755 if path.is_dir() else 0o644)
    os.chown(folder, 65534, 65534)
    command = [sys.executable, "-c", AS_NOBODY, *options, "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


# --- index and config ---


def test_index_is_rebuilt_with_exact_size(tmp_path):
    shards, expected = several_kinds()
    write_checkpoint(tmp_path / "in", shards)
    metadata = {"total_size": 5, "mtp": "yes"}
    edit_json(tmp_path / "in" / INDEX, lambda index: index.update(metadata=metadata))
    main(tmp_path / "in", tmp_path / "out")
    text = (tmp_path / "out" / INDEX).read_text()
    rebuilt = json.loads(text)
    sizes = [t.numel() * t.element_size() for ts in expected.values() for t in ts.values()]
    assert rebuilt["metadata"] == {"total_size": sum(sizes), "mtp": "yes"}
    assert rebuilt["weight_map"] == {name: shard for shard in expected for name in expected[shard]}
    assert text.startswith('{\n  "metadata": {\n    "')


def test_index_of_a_diffusers_model_is_rebuilt(tmp_path):
    # huggingface/diffusers utils/constants.py, SAFE_WEIGHTS_INDEX_NAME
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    codes, scale = finite_codes(16, 20), rand(1)
    shards = {names[0]: {"a.weight": codes, "b.weight_scale": scale}}
    shards[names[1]] = {"b.weight": codes.clone(), "a.weight_scale": scale.clone()}
    write_checkpoint(tmp_path / "in", shards, index=False)
    weight_map = {tensor: name for name in names for tensor in shards[name]}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(tmp_path / f"in/{stem}.safetensors.index.json", index)
    main(tmp_path / "in", tmp_path / "out")
    value = dequantized(codes, scale.view(1, 1), (16, 20))
    for name, tensor in load_checkpoint(tmp_path / "out").items():
        assert name in ("a.weight", "b.weight")
        assert_same_bits(tensor, value)
    after = json.loads((tmp_path / f"out/{stem}.safetensors.index.json").read_text())
    assert after["weight_map"] == {"a.weight": names[0], "b.weight": names[1]}
    assert after["metadata"]["total_size"] == 2 * 2 * 16 * 20
    assert set(contents(tmp_path / "out")) == {*names, f"{stem}.safetensors.index.json"}


@pytest.mark.parametrize("names", [(ONE, TWO), ("a.safetensors", "b.safetensors")])
def test_several_shards_without_an_index_get_one(tmp_path, names):
    shards, expected = several_kinds()
    given = dict(zip(names, shards.values(), strict=True))
    main(write_checkpoint(tmp_path / "in", given, CONFIG, index=False), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {
        tensor: name for name, shard in zip(names, expected, strict=True)
        for tensor in expected[shard]}
    sizes = [tensor.nbytes for shard in expected.values() for tensor in shard.values()]
    assert index["metadata"] == {"total_size": sum(sizes)}


def test_several_shards_of_a_diffusers_model_without_an_index_get_one_of_its_name(tmp_path):
    shards, _ = several_kinds()
    stem = "diffusion_pytorch_model"
    given = {name.replace("model", stem): shard for name, shard in shards.items()}
    main(write_checkpoint(tmp_path / "in", given, CONFIG, index=False), tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {*given, f"{stem}.safetensors.index.json",
                                             "config.json"}


def test_a_numbered_shard_that_is_left_alone_gets_an_index(tmp_path):
    """transformers finds a file of this name through an index only."""
    given, expected = one_weight()
    scale = given.pop("w.weight_scale_inv")
    shards = {ONE: given, TWO: {"w.weight_scale_inv": scale}}
    main(write_checkpoint(tmp_path / "in", shards, CONFIG, index=False), tmp_path / "out")
    assert_holds(tmp_path / "out" / ONE, expected)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(expected), ONE)


def test_a_config_of_another_context_length_loses_its_quantization(tmp_path):
    config = {"quantization_config": FP8_CONFIG, "torch_dtype": "float16", "length": 10**6}
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    write_json(source / "config_1m.json", config)
    main(source, tmp_path / "out")
    edited = json.loads((tmp_path / "out/config_1m.json").read_text())
    assert edited == {"torch_dtype": "bfloat16", "length": 10**6}


def test_the_config_comes_after_that_of_another_context_length(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    write_json(source / "config_1m.json", CONFIG)
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace",
                        lambda old, new: (names.append(Path(new).name), replace(old, new)))
    main(source, tmp_path / "out")
    assert names == [SHARD, "config_1m.json", "config.json"]


def test_config_describes_plain_bf16_weights(tmp_path):
    config = {
        "torch_dtype": "float8_e4m3fn",
        "quantization_config": FP8_CONFIG,
        "hidden_size": 3,
        "text_config": {"dtype": "float16", "compression_config": {"format": "x"}, "n": [{"k": 1}]},
        "sub": [{"quantization_config": {}, "name": "é"}],
    }
    convert(tmp_path, {SHARD: {"x": torch.ones(1)}}, config=config)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "torch_dtype": "bfloat16",
        "hidden_size": 3,
        "text_config": {"dtype": "bfloat16", "n": [{"k": 1}]},
        "sub": [{"name": "é"}],
    }


def test_config_without_a_dtype_gets_none(tmp_path):
    convert(tmp_path, {SHARD: {"x": torch.ones(1)}}, config={"hidden_size": 3})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"hidden_size": 3}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_with_an_empty_dtype_says_bfloat16(tmp_path, key):
    convert(tmp_path, {SHARD: TENSORS}, config={key: None, "hidden_size": 3})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {key: "bfloat16", "hidden_size": 3}


def test_config_that_outlived_its_quantization_is_cleaned(tmp_path):
    config = {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": None}
    tensors = {"w.weight": rand(3, 3, dtype=torch.bfloat16)}
    convert(tmp_path, tensors, tensors, config)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"torch_dtype": "bfloat16"}


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
    assert events[4:] == [("replaced", INDEX), ("replaced", "config.json")]


# --- what is copied ---


def test_other_files_are_copied_and_weight_files_are_not(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}})
    copied = ["tokenizer.json", "chat template.jinja", "modeling.py", "inference/deep/run.py", ".x"]
    left = ["pytorch_model.bin", "original/consolidated.pth", "q4.gguf", "quant_cfg.json"]
    left += [".git/config", ".cache/huggingface/download/x.lock", "._config.json", ".DS_Store"]
    left += ["optimizer.pt", "global_step7/x", "model.onnx_data", "core.123", "x.json~", "x.part"]
    left += ["quanto_qmap.json", "quant_model_description_w8a8.json"]
    for name in copied + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    for name in ("hf_quant_config.json", "quantization_config.json"):
        (source / name).write_text("{}")
    main(source, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert set(found) == {*copied, "model.safetensors", INDEX}
    assert all(found[name].decode() == name for name in copied)


def test_files_that_only_describe_the_quantization_are_not_copied(tmp_path):
    left = ["hf_quant_config.json", "quant_cfg.json", "quanto_qmap.json"]
    left += ["quant_model_description.json", "quant_model_description_w8a8.json"]
    for name in [*left, "tokenizer.json", "my_quant_notes.json"]:
        write_json(tmp_path / "in" / name, {})
    tensors = {"norm.weight": rand(4)}
    convert(tmp_path, tensors, tensors)
    names = {"model.safetensors", "tokenizer.json", "my_quant_notes.json"}
    index = "model.safetensors.index.json"
    assert set(contents(tmp_path / "out")) - {index} == names


@pytest.mark.parametrize(
    "name", ["config.json.tmp", "quantization_config.json", f"{SHARD}.tmp", "x.safetensors", INDEX]
)
def test_folders_with_names_that_mean_something_are_left_out(folder, capsys, name):
    write_checkpoint(folder / "in", {SHARD: TENSORS}, CONFIG, index=False)
    (folder / "in/sub" / name).mkdir(parents=True)
    if name not in (INDEX, "x.safetensors"):
        (folder / "in" / name).mkdir()
        (folder / "in" / name / "x").write_text("x")
    for _ in range(2):
        assert cli(arguments(folder / "in")) == 0
        assert {*contents(folder / "out")} == {SHARD, "config.json"}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_of_the_checkpoint_is_left_out(folder, secret, capsys, kind):
    write_checkpoint(folder / "in", {SHARD: TENSORS})
    (folder / "in/sub").mkdir()
    (folder / "in/sub/fine.txt").write_text("fine")
    (folder / "in/linked").symlink_to(folder)
    special_file(folder / "in/sub/n.json", kind, secret)
    if "link" in kind or kind == "device":  # which the tests make as a link
        assert cli(arguments(folder / "in")) == 1
        assert "n.json: is a link to" in capsys.readouterr().err
        assert not (folder / "out").exists()
    else:
        assert cli(arguments(folder / "in")) == 0
        assert {*contents(folder / "out")} == {SHARD, INDEX, "sub/fine.txt"}
        assert "Not copied: linked, sub/n.json\n" in capsys.readouterr().out


def test_links_out_of_the_checkpoint_are_refused_and_those_inside_followed(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}})
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("secret")
    (source / "folder").symlink_to(tmp_path / "private")
    (source / "inside.json").symlink_to(INDEX)
    os.mkfifo(source / "pipe")
    main(source, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"model.safetensors", INDEX, "inside.json"}
    assert "Not copied: folder, pipe\n" in capsys.readouterr().out
    for target in (tmp_path / "private/key", tmp_path / "gone"):
        (source / "link.txt").symlink_to(target)
        with pytest.raises(CheckpointError, match=rf"link.txt: is a link to {target}.*cp -L"):
            main(source, tmp_path / "other")
        (source / "link.txt").unlink()
    assert not (tmp_path / "other").exists()


def test_links_are_followed_into_the_blobs_of_a_hub_cache_only(folder, secret, capsys):
    (folder / "blobs").mkdir()
    secret.rename(folder / "blobs/secret")
    source = write_checkpoint(folder / "snapshots/1/in", {SHARD: TENSORS})
    (source / ".git").mkdir()
    (source / ".git/config").write_text("token abc")
    for name, target in (("notes.txt", folder / "blobs/secret"), ("README.md", ".git/config")):
        (source / name).symlink_to(target)
        assert cli(arguments(source, out=folder / "out")) == 1
        assert f"{name}: is a link to {target}" in capsys.readouterr().err
        assert not (folder / "out").exists()
        (source / name).unlink()


def test_files_of_a_folder_inside_a_snapshot_are_copied(tmp_path):
    blobs, folder = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0/fp8"
    write_checkpoint(folder, {SHARD: {"x": torch.ones(1)}})
    blobs.mkdir()
    (blobs / "1").write_text("t")
    (folder / "tokenizer.json").symlink_to("../../../blobs/1")
    main(folder, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "t"


def test_what_is_not_copied_is_named_with_its_size(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}}, {})
    (source / "optimizer.pt").write_bytes(bytes(2500))
    (source / "global_step7").mkdir()
    (source / "global_step7/state.json").write_bytes(bytes(1500))
    main(source, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "optimizer.pt (2.50kB)" in printed
    assert "global_step7" in printed


@pytest.mark.parametrize("name", [
    f".{ONE}.Ab3xYz",  # rsync, while it works
    f"{ONE}.incomplete", "tokenizer.json.aria2", "notes.txt~", ".notes.txt.swp", "core.77",
    "#notes.txt#",
])
def test_what_downloads_editors_and_crashes_leave_is_not_copied(tmp_path, capsys, name):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}}, {})
    (source / name).write_text("half")
    main(source, tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {SHARD, INDEX, "config.json"}
    assert name in capsys.readouterr().out


def test_the_lock_that_emacs_leaves_does_not_end_the_run(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}}, {})
    (source / ".#config.json").symlink_to("user@host.123:456")
    main(source, tmp_path / "out")
    assert ".#config.json" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_named_and_skipped(folder):
    source = write_checkpoint(folder / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    (source / "private").mkdir(mode=0)
    done = as_nobody(folder, arguments(source))
    assert done.returncode == 0, done.stderr
    assert "Not copied: private\n" in done.stdout
    assert {*contents(folder / "out")} == {SHARD, "config.json"}


def test_a_folder_of_which_the_listing_fails_is_named_and_skipped(source, monkeypatch, capsys):
    real = os.scandir
    (source / "private").mkdir()

    def refuse(path):
        if Path(path).name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    main(source, source.parent / "out")
    assert "Not copied: private\n" in capsys.readouterr().out


def test_a_copy_that_was_cut_short_is_no_output(source, monkeypatch, capsys):
    """As when a read would block, which shutil takes for the end."""
    monkeypatch.setattr(shutil, "copyfileobj",
                        lambda original, file: file.write(original.read(1)))
    assert cli(arguments(source)) == 1
    error = capsys.readouterr().err
    assert error.endswith(
        f"error: {source / 'tokenizer.json'}: was read only in part; try again\n")
    assert {*contents(source.parent / "out")} == {ONE, TWO}


class Blocking(io.FileIO):
    """A file of which the reads would block."""

    def readinto(self, buffer):
        return None


def test_a_side_file_whose_reads_would_block_is_no_output(source, monkeypatch, capsys):
    def block(path, mode="r", *more, **options):
        if Path(path) == source / "tokenizer.json":
            return io.BufferedReader(Blocking(path))
        return open(path, mode, *more, **options)

    monkeypatch.setattr(fp8_cast_bf16, "open", block, raising=False)
    assert cli(arguments(source)) == 1
    assert f"error: {source / 'tokenizer.json'}: " in capsys.readouterr().err
    assert "config.json" not in contents(source.parent / "out")


def test_a_shard_whose_reads_would_block_is_no_output(source, monkeypatch, capsys):
    real = fp8_cast_bf16.open_raw
    monkeypatch.setattr(
        fp8_cast_bf16, "open_raw",
        lambda path, mode, *more: Blocking(path) if mode == "rb" else real(path, mode, *more))
    assert cli(arguments(source)) == 1
    assert "the file system has no data yet" in capsys.readouterr().err
    assert not [name for name in contents(source.parent / "out") if name.endswith("tensors")]


@pytest.mark.parametrize("times", [1, 3])
def test_a_shard_whose_reads_block_once_in_a_while_is_read_or_reported(
    source, out, monkeypatch, capsys, times
):
    expected, left = contents(out), [times]
    shutil.rmtree(out)

    class Slow(io.FileIO):
        def readinto(self, buffer):
            left[0] -= 1
            return super().readinto(buffer) if left[0] < 0 else None

    real = fp8_cast_bf16.open_raw
    monkeypatch.setattr(
        fp8_cast_bf16, "open_raw",
        lambda path, mode, *more: Slow(path) if mode == "rb" else real(path, mode, *more))
    capsys.readouterr()
    if cli(arguments(source)):
        assert "the file system has no data yet" in capsys.readouterr().err
        monkeypatch.undo()
        assert cli(arguments(source)) == 0
    assert contents(out) == expected


def test_side_files_that_cannot_be_read_are_named(source, monkeypatch, capsys):
    real = shutil.copyfileobj

    def fail(original, file):
        real(original, file)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    assert cli(arguments(source)) == 1
    assert f"{source / 'tokenizer.json'}: Input/output error" in capsys.readouterr().err
    assert {*contents(source.parent / "out")} == {ONE, TWO}


def test_files_beside_the_shards_are_made_right_again(source, out):
    expected = contents(out)
    (out / "config.json").write_text('{"quantization_config": {}}')
    (out / "tokenizer.json").write_text("[]")
    (out / "hf_quant_config.json").write_text("{}")
    main(source, out)
    assert contents(out) == expected


# --- what is in the output already ---


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, "params.json",
                                  "hf_quant_config.json", "draft/config.json"])
def test_somebody_elses_file_in_the_output_is_refused_by_name_and_untouched(
    source, tmp_path, capsys, name
):
    write_checkpoint(source / "draft", {SHARD: one_weight()[0]}, CONFIG, index=False)
    write_json(tmp_path / "out" / name, {"mine": 1})
    before = contents(tmp_path)
    for more in ([], ["--dry-run"]):
        assert cli(arguments(source, *more)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {tmp_path / 'out'}: holds ")
        assert name in error
        assert contents(tmp_path) == before


def test_files_in_the_output_that_are_as_they_should_be_are_no_obstacle(source, out):
    expected = contents(out)
    for shard in (ONE, TWO):
        (out / shard).unlink()
    main(source, out)
    assert contents(out) == expected


def test_side_files_that_someone_has_edited_are_named_when_they_are_replaced(source, out, capsys):
    expected = contents(out)
    (out / "tokenizer.json").write_text("[]")
    (out / "config.json").write_text("{\"mine\": 1}")
    capsys.readouterr()
    main(source, out)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("To be replaced")]
    assert "tokenizer.json" in line and "config.json" in line
    assert contents(out) == expected


@pytest.mark.parametrize("more", [[], ["--verify"], ["--dry-run"]])
def test_what_macos_leaves_in_the_output_is_ignored(source, out, capsys, more):
    names = ["._config.json", f"._{ONE}", f"._{INDEX}", ".DS_Store"]
    for name in names:
        (out / name).write_bytes(b"\0\5\26\7")
    before = contents(out)
    assert cli(arguments(source, *more)) == 0
    assert contents(out) == before
    (out / TWO).unlink()
    if more != ["--verify"]:
        assert cli(arguments(source, *more)) == 0
        assert {*contents(out)} >= {*names}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_temporary_files_of_others_below_the_output_are_left_alone(source, tmp_path, kind):
    mine = tmp_path / "out/notes/draft.tmp"
    if kind == "file":
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
    else:
        mine.mkdir(parents=True)
    main(source, tmp_path / "out")
    assert mine.exists()
    assert (tmp_path / "out/config.json").exists()


# --- folders ---


@pytest.fixture
def several(tmp_path):
    """A checkpoint with another one in a folder, which has no file beside shards and config."""
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight("a")[0]}, CONFIG, index=False)
    write_checkpoint(source / "draft", {SHARD: one_weight("b", 1)[0]}, CONFIG, index=False)
    return source


def test_the_config_of_the_root_is_removed_before_any_shard_and_comes_last(several, monkeypatch):
    out, events = several.parent / "out", []
    main(several, out)
    for folder, stem in ((several, "a"), (several / "draft", "b")):
        save_file(one_weight(stem, 3)[0], folder / SHARD, metadata={"format": "pt"})
    unlink, replace = os.unlink, os.replace

    def name_of(path):
        return Path(path).relative_to(out).as_posix()

    def log_unlink(path, *more, **options):
        events.extend([("removed", name_of(path))] * os.path.lexists(path))
        unlink(path, *more, **options)

    def log_replace(old, new):
        events.append(("replaced", name_of(new)))
        replace(old, new)

    monkeypatch.setattr(os, "unlink", log_unlink)
    monkeypatch.setattr(os, "replace", log_replace)
    main(several, out)
    events = [(what, name) for what, name in events if not name.endswith(".tmp")]
    configs = ["draft/config.json", "config.json"]
    assert {*events[:2]} == {("removed", name) for name in configs}
    assert {*events[2:4]} == {("replaced", SHARD), ("replaced", f"draft/{SHARD}")}
    assert events[4:] == [("replaced", name) for name in configs]


def test_shards_in_folders_are_safe_on_disk_before_a_config_says_that_all_is_there(
    several, monkeypatch
):
    out, events, fsync, replace = several.parent / "out", [], os.fsync, os.replace

    def log_fsync(number):
        events.append(("synced", Path(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    def log_replace(old, new):
        events.append(("replaced", Path(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    main(several, out)
    for name in (SHARD, f"draft/{SHARD}"):
        begin = events.index(("replaced", out / name))
        end = min(events.index(("replaced", out / config))
                  for config in ("config.json", "draft/config.json"))
        assert ("synced", (out / name).parent) in events[begin:end], name
    last = events.index(("replaced", out / "config.json"))
    assert ("synced", out / "draft") in events[events.index(
        ("replaced", out / "draft/config.json")):last]


def test_a_shard_in_a_folder_that_another_job_has_named_is_no_error(several, monkeypatch):
    out, replace = several.parent / "out", os.replace

    def twice(old, new):
        replace(old, new)
        if Path(new) == out / "draft" / SHARD:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(old))

    monkeypatch.setattr(os, "replace", twice)
    main(several, out)
    main(several, out, verify=True)


def test_a_foreign_shard_in_a_folder_of_the_output_is_refused(several, tmp_path):
    (tmp_path / "out/draft").mkdir(parents=True)
    save_file({"x": torch.ones(1)}, tmp_path / "out/draft/mine.safetensors")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"out: holds draft/mine\.safetensors"):
        main(several, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_folder_of_the_output_that_is_a_link_is_refused(several, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/draft").symlink_to("../elsewhere")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="draft: is a link out of the output"):
        main(several, tmp_path / "out")
    assert contents(tmp_path) == before



def test_stale_signs_of_quantization_are_removed_from_the_output(tmp_path):
    convert(tmp_path, {SHARD: {"x": torch.ones(1)}})
    (tmp_path / "out/hf_quant_config.json").write_text("{}")
    (tmp_path / "out/config.json").write_text("{}")
    convert(tmp_path, {SHARD: {"x": torch.ones(1)}})
    assert set(contents(tmp_path / "out")) == {"model.safetensors", INDEX}


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_shard_in_the_output_that_another_program_wrote_is_refused_by_name(tmp_path, kind):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}})
    there = tmp_path / "out/model.safetensors"
    there.parent.mkdir()
    if kind == "folder":
        (there / "mine").mkdir(parents=True)
    else:
        mine = there if kind == "file" else tmp_path / "mine.safetensors"
        save_file({"x": torch.ones(1)}, mine, metadata={"format": "pt"})
    if kind == "link":
        there.symlink_to("../mine.safetensors")
    (tmp_path / "out/config.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"out/model\.safetensors: was not written by this"):
        main(source, tmp_path / "out")
    assert contents(tmp_path) == before
    assert there.is_symlink() == (kind == "link")


def test_output_with_shards_of_another_checkpoint_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "out/other.safetensors")
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds other\.safetensors"):
        convert(tmp_path, {SHARD: {"x": torch.ones(1)}})
    assert contents(tmp_path / "out") == before


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


def test_a_folder_in_the_place_of_a_shard_is_an_error_with_its_name(source, capsys):
    (source.parent / "out" / ONE).mkdir(parents=True)
    assert cli(arguments(source)) == 1
    assert ONE in capsys.readouterr().err


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


def test_files_are_not_written_through_links_in_the_output(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}})
    (source / "a.json").write_text("a")
    (source / "deep").mkdir()
    (source / "deep/b.json").write_text("b")
    (tmp_path / "mine").write_text("mine")
    main(source, tmp_path / "out")
    (tmp_path / "out/a.json").unlink()
    (tmp_path / "out/a.json").symlink_to("../mine")
    main(source, tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "out/a.json").read_text() == "a"
    shutil.rmtree(tmp_path / "out/deep")
    (tmp_path / "out/deep").symlink_to("..")
    with pytest.raises(CheckpointError, match="is a link out of the output"):
        main(source, tmp_path / "out")
    assert not (tmp_path / "b.json").exists()


# --- the lock, permission and space ---


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--verify"]])
def test_a_complete_output_of_another_user_needs_nothing(folder, more):
    source = write_checkpoint(folder / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    main(source, folder / "out")
    before, old = contents(folder), stamps(folder / "out")
    done = as_nobody(folder, arguments(source, *more))
    assert done.returncode == 0, done.stderr
    if not more:
        assert done.stdout.endswith("Nothing to do: the output is complete\n")
    assert (contents(folder), stamps(folder / "out")) == (before, old)


def test_an_incomplete_output_of_another_user_is_refused(folder):
    source = write_checkpoint(folder / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    main(source, folder / "out")
    (folder / "out/config.json").unlink()
    before = contents(folder)
    done = as_nobody(folder, arguments(source))
    assert done.returncode == 1
    assert f"error: {folder / 'out'}: is not a writable directory" in done.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("more", [{}, {"dry_run": True}])
def test_a_complete_output_that_may_not_be_written_needs_nothing(
    source, out, monkeypatch, capsys, more
):
    access, before = os.access, stamps(out)
    monkeypatch.setattr(os, "access",
                        lambda path, mode: not mode & os.W_OK and access(path, mode))
    capsys.readouterr()
    main(source, out, **more)
    if not more:
        assert capsys.readouterr().out.endswith("Nothing to do: the output is complete\n")
    assert stamps(out) == before


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_does_not_sync_folders_is_no_failure(source, monkeypatch, number):
    real = os.fsync

    def refuse(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(number, os.strerror(number))
        real(file)

    monkeypatch.setattr(os, "fsync", refuse)
    main(source, source.parent / "out")
    main(source, source.parent / "out", verify=True)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_that_is_not_synced_is_a_failure(source, monkeypatch, capsys, number):
    real = os.fsync

    def refuse(file):
        if not os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(number, os.strerror(number))
        real(file)

    monkeypatch.setattr(os, "fsync", refuse)
    assert cli(arguments(source)) == 1
    assert os.strerror(number) in capsys.readouterr().err
    assert contents(source.parent / "out") == {}


def test_a_folder_that_the_disk_fails_to_sync_is_a_failure(source, monkeypatch, capsys):
    real = os.fsync

    def refuse(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(file)

    monkeypatch.setattr(os, "fsync", refuse)
    assert cli(arguments(source)) == 1
    assert os.strerror(errno.EIO) in capsys.readouterr().err
    assert not (source.parent / "out/config.json").exists()


def test_a_file_system_that_does_not_know_its_size_is_warned_about_and_used(
    source, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    main(source, source.parent / "out")
    assert "an unknown number of bytes free" in capsys.readouterr().out
    main(source, source.parent / "out", verify=True)



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


def test_a_folder_that_may_not_be_written_to_is_refused(source, monkeypatch, capsys):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and real(path, mode))
    assert cli(arguments(source, "--dry-run")) == 1
    assert f"{source.parent}: is not a writable directory" in capsys.readouterr().err


def test_too_little_space_is_said_before_anything_is_written(source, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 10**5))
    for more in ([], ["--dry-run"]):
        assert cli(arguments(source, *more)) == 1
        assert "not enough space" in capsys.readouterr().err
        assert not (source.parent / "out").exists()


def test_what_is_there_already_needs_no_space(source, out, monkeypatch):
    expected = contents(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 10**5))
    main(source, out)
    # Its space is free again with the leftover gone.
    (out / TWO).rename(out / f"{TWO}.{'0' * 16}.tmp")
    main(source, out)
    assert contents(out) == expected
    (out / TWO).unlink()
    with pytest.raises(CheckpointError, match=r"not enough space"):
        main(source, out)
