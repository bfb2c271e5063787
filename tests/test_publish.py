"""The files beside the shards: config, index, what is copied; and the folder they go to."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import (
    CONFIG,
    FP8_CONFIG,
    INDEX,
    ONE,
    SHARD,
    SPECIAL,
    TENSORS,
    TWO,
    Usage,
    arguments,
    assert_same_bits,
    contents,
    convert,
    dequantized,
    edit_json,
    finite_codes,
    load_checkpoint,
    rand,
    several_kinds,
    special_file,
    stamps,
    write_checkpoint,
    write_json,
)
from fp8_cast_bf16 import CheckpointError, cli, main

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
    convert(tmp_path, {SHARD: {"x": torch.ones(1)}}, config={key: None, "hidden_size": 3})
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
    (out / TWO).rename(out / f"{TWO}.tmp")  # its space is free again with the leftover gone
    main(source, out)
    assert contents(out) == expected
    (out / TWO).unlink()
    with pytest.raises(CheckpointError, match=r"not enough space"):
        main(source, out)
