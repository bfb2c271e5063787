"""What becomes of a checkpoint: each point of the behaviour that users rely on."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fp8_cast_bf16
from checkpoints import (
    FP8_CONFIG,
    INDEX,
    ONE,
    TWO,
    assert_same_bits,
    check_again,
    contents,
    dequantized,
    every_code,
    finite_codes,
    load_checkpoint,
    method,
    several_kinds,
    write_checkpoint,
)
from fp8_cast_bf16 import CheckpointError, UsageError, main


def convert(tmp_path, shards, config=None, index=True, **options):
    """Write a checkpoint, convert it, return the tensors that came out."""
    write_checkpoint(tmp_path / "in", shards, config, index)
    main(tmp_path / "in", tmp_path / "out", **options)
    check_again(tmp_path / "in", tmp_path / "out", **options)
    return load_checkpoint(tmp_path / "out")


def assert_laid_out_as(reference: Path, shard: Path) -> None:
    """Compare a shard with the reference writer's file in all but the fingerprint and padding."""
    texts, datas = [], []
    for path in (reference, shard):
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        texts.append(json.loads(content[8:end]))
        datas.append(content[end:])
    assert end % 64 == 0
    assert re.fullmatch("[0-9a-f]{16}", texts[1]["__metadata__"].pop("fp8_cast_bf16"))
    expected, got = (list(text.items()) for text in texts)
    assert got == expected  # In the same order, with the same dtypes, shapes and offsets.
    assert datas[1] == datas[0]


@pytest.mark.parametrize("window", [4096, 3 * 4096, 16 << 20])
@pytest.mark.parametrize("workers", [1, 5])
def test_shards_hold_byte_for_byte_what_the_reference_writer_writes(
    tmp_path, monkeypatch, window, workers
):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    shards, expected = several_kinds()
    convert(tmp_path, shards, workers=workers)
    for name, tensors in expected.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        assert_laid_out_as(tmp_path / name, tmp_path / "out" / name)


def test_tensors_of_every_dtype_are_laid_out_as_the_reference_writer_does(tmp_path):
    names = ["bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "float32"]
    names += ["float64", "int64", "uint32", "uint64"]
    tensors = {f"z{i}": torch.ones(3, dtype=getattr(torch, name)) for i, name in enumerate(names)}
    tensors["kept"] = finite_codes(3, 3)
    tensors["cast.weight"] = finite_codes(3, 3)
    expected = {**tensors, "cast.weight": dequantized(tensors["cast.weight"], torch.ones(1, 1))}
    tensors["cast.weight_scale_inv"] = torch.ones(())
    convert(tmp_path, {"model.safetensors": tensors}, index=False)
    save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
    assert_laid_out_as(tmp_path / "expected", tmp_path / "out/model.safetensors")


def test_tensors_may_begin_anywhere_on_a_page(tmp_path):
    shards, expected = several_kinds()
    expected[ONE]["odd"] = shards[ONE]["odd"] = torch.arange(5003, dtype=torch.uint8)
    expected[ONE]["true"] = shards[ONE]["true"] = torch.arange(7001) % 3 == 0
    got = convert(tmp_path, shards)
    for name, tensor in {**expected[ONE], **expected[TWO]}.items():
        assert_same_bits(got[name], tensor)


@pytest.mark.parametrize("after", ["make_plan", "find_implausible", "fingerprint_of"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path, monkeypatch, after):
    source = write_checkpoint(tmp_path / "in", several_kinds()[0], {"torch_dtype": "x"})
    whole, path = getattr(fp8_cast_bf16, after), source / ONE
    size = path.stat().st_size

    def cut(*operands):
        result = whole(*operands)
        os.truncate(path, size - 5001)
        return result

    monkeypatch.setattr(fp8_cast_bf16, after, cut)
    with pytest.raises(CheckpointError, match=f"{ONE}: ends at byte {size - 5001}"):
        main(source, tmp_path / "out")
    assert not {ONE, INDEX, "config.json"} & {*contents(tmp_path / "out")}


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


def test_index_decides_which_shards_count(tmp_path):
    shards, expected = several_kinds()
    write_checkpoint(tmp_path / "in", shards)
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "in/consolidated.safetensors")
    main(tmp_path / "in", tmp_path / "out")
    assert set(load_checkpoint(tmp_path / "out")) == {*expected[ONE], *expected[TWO]}
    assert not (tmp_path / "out/consolidated.safetensors").exists()


def test_without_index_the_single_file_counts(tmp_path):
    write_checkpoint(tmp_path / "in", {"model.safetensors": {"x": torch.ones(2)}}, index=False)
    save_file({"x": torch.zeros(3)}, tmp_path / "in/consolidated.safetensors")
    main(tmp_path / "in", tmp_path / "out")
    assert_same_bits(load_checkpoint(tmp_path / "out")["x"], torch.ones(2))
    assert not (tmp_path / "out" / INDEX).exists()


def test_without_index_all_files_count(tmp_path):
    shards, expected = several_kinds()
    shards = {"b.safetensors": shards[ONE], "a.safetensors": shards[TWO]}
    assert set(convert(tmp_path, shards, index=False)) == {*expected[ONE], *expected[TWO]}


def test_hub_cache_snapshot_of_links_is_ordinary_input(tmp_path):
    shards, _ = several_kinds()
    plain = write_checkpoint(tmp_path / "in", shards, {"torch_dtype": "float16"})
    (plain / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    main(plain, tmp_path / "out")
    main(snapshot, tmp_path / "from-cache")
    assert contents(tmp_path / "from-cache") == contents(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "from-cache").iterdir())


@pytest.mark.parametrize(
    "dtype, config",
    [
        (torch.float8_e4m3fn, None),
        (torch.float8_e5m2, None),
        (torch.uint8, None),
        (torch.int8, method("blockwise_int8")),
    ],
)
def test_one_byte_weights_with_a_scale_are_dequantized(tmp_path, dtype, config):
    codes, scale = every_code(140, 130, dtype), torch.rand(2, 2)
    got = convert(tmp_path, {"model.safetensors": {"w": codes, "w_scale_inv": scale}}, config)
    values = codes.view(torch.float8_e4m3fn) if dtype == torch.uint8 else codes
    assert_same_bits(got["w"], dequantized(values, scale))


@pytest.mark.parametrize(
    "dtype, config",
    [(torch.int8, None), (torch.int8, {"quantization_config": FP8_CONFIG}),
     (torch.uint8, {"quantization_config": FP8_CONFIG})],
)
def test_bytes_with_a_scale_that_the_config_does_not_explain_are_refused(tmp_path, dtype, config):
    tensors = {"w": every_code(140, 130, dtype), "w_scale_inv": torch.rand(2, 2)}
    with pytest.raises(CheckpointError, match=r"w \([IU]8, beside w_scale_inv.* looks quantized"):
        convert(tmp_path, {"model.safetensors": tensors}, config)
    assert not (tmp_path / "out").exists()


def test_one_byte_tensors_without_a_scale_are_data(tmp_path):
    tensors = {
        "packed": torch.arange(256).to(torch.uint8),
        "signed": torch.arange(-128, 128).to(torch.int8),
        "mask": torch.tensor([True, False]),
    }
    got = convert(tmp_path, {"model.safetensors": tensors})
    for name, tensor in tensors.items():
        assert_same_bits(got[name], tensor)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, scale_shape, block",
    [
        ((130, 300), (), (130, 300)),
        ((130, 300), (1,), (130, 300)),
        ((130, 300), (1, 1), (130, 300)),
        ((130, 300), (130,), (1, 300)),
        ((130, 300), (130, 1), (1, 300)),
        ((130, 300), (1, 300), (130, 1)),
        ((130, 300), (2, 3), (128, 128)),
        ((576, 256), (5, 2), (128, 128)),
        ((130, 300), (5, 10), (32, 32)),
        ((130, 300), (130, 10), (1, 32)),
        ((192, 128), (2, 1), (128, 128)),
        ((3, 140, 200), (3,), (140, 200)),
        ((3, 140, 200), (3, 1), (140, 200)),
        ((3, 140, 200), (3, 1, 1), (140, 200)),
        ((3, 140, 200), (3, 140, 1), (1, 200)),
        ((3, 140, 200), (3, 1, 200), (140, 1)),
        ((3, 140, 200), (3, 2, 2), (128, 128)),
        ((3, 140, 200), (1,), (140, 200)),
        ((1, 140, 200), (2, 2), (128, 128)),
        ((140, 200), (1, 2, 2), (128, 128)),
        ((300,), (1,), (1, 300)),
    ],
)
def test_shape_of_the_scales_decides_the_grid(tmp_path, shape, scale_shape, block, scale_dtype):
    codes = finite_codes(*shape)
    scale = (torch.rand(scale_shape) + 0.01).to(scale_dtype)
    rows = -(-codes.shape[-2] // block[0]) if codes.dim() > 1 else 1
    experts = scale.numel() // (rows * -(-codes.shape[-1] // block[1]))
    wide = scale.view(experts, rows, -1)
    expected = dequantized(codes.view(-1, *codes.shape[-2:]), wide, block).view(shape)
    got = convert(tmp_path, {"model.safetensors": {"w": codes, "w_scale_inv": scale}})
    assert_same_bits(got["w"], expected)


def test_block_size_of_the_config_is_used_at_any_depth(tmp_path):
    codes, scale = finite_codes(200, 300), torch.rand(3, 3)
    config = {"text_config": {"quantization_config": {"weight_block_size": [96, 100]}}}
    got = convert(tmp_path, {"model.safetensors": {"w": codes, "w_scale_inv": scale}}, config)
    assert_same_bits(got["w"], dequantized(codes, scale, (96, 100)))


@pytest.mark.parametrize("group", [16, 32, 128])
def test_groups_that_fit_exactly_may_stand_beside_the_blocks_of_the_config(tmp_path, group):
    codes, scale = finite_codes(200, 384), torch.rand(200, 384 // group)
    config = {"quantization_config": {"weight_block_size": [32, 32]}}
    got = convert(tmp_path, {"model.safetensors": {"w": codes, "w_scale_inv": scale}}, config)
    assert_same_bits(got["w"], dequantized(codes, scale, (1, group)))


@pytest.mark.parametrize(
    "scale_shape", [(200, 10), (2, 3)], ids=["1x32, cut off at the edge", "128x128"]
)
def test_a_grid_that_contradicts_the_config_is_an_error_with_both_grids(tmp_path, scale_shape):
    tensors = {"w": finite_codes(200, 300), "w_scale_inv": torch.rand(scale_shape)}
    config = {"quantization_config": {"weight_block_size": [32, 32]}}
    message = (rf"w is \[200, 300\].*scaled by w_scale_inv {re.escape(str([*scale_shape]))}.*"
               r"the config names blocks of 32x32, which need \[7, 10\]")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, {"model.safetensors": tensors}, config)
    assert not (tmp_path / "out").exists()


def test_scale_that_fits_no_grid_is_an_error_with_both_shapes(tmp_path):
    tensors = {"x.weight": finite_codes(300, 300), "x.weight_scale_inv": torch.rand(7, 5)}
    with pytest.raises(CheckpointError, match=r"x\.weight is \[300, 300\].*_scale_inv \[7, 5\]"):
        convert(tmp_path, {"model.safetensors": tensors})
    assert not (tmp_path / "out").exists()


def test_scale_of_an_unknown_dtype_is_an_error(tmp_path):
    tensors = {"w": finite_codes(3, 3), "w_scale_inv": torch.ones(1, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match="w_scale_inv is I64"):
        convert(tmp_path, {"model.safetensors": tensors})
    assert not (tmp_path / "out").exists()


def test_activation_scales_of_converted_weights_are_dropped(tmp_path):
    scales = ["q.weight_scale_inv", "q.activation_scale", "up_scale_inv", "up_activation_scale"]
    tensors = {name: torch.ones(1) for name in [*scales, "norm.activation_scale"]}
    tensors |= {"q.weight": finite_codes(4, 4), "up": finite_codes(4, 4)}
    got = convert(tmp_path, {"model.safetensors": tensors})
    assert set(got) == {"q.weight", "up", "norm.activation_scale"}


def test_weight_without_scale_stays_fp8_with_a_warning_twice(tmp_path, capsys):
    got = convert(tmp_path, {"model.safetensors": {"w": every_code(16, 16), "n": torch.ones(2)}})
    assert_same_bits(got["w"], every_code(16, 16))
    printed = capsys.readouterr().out
    assert "Warning: Missing scale_inv tensor for w, skipping conversion\n" in printed
    assert "FP8 weights without a scale, kept in FP8: 1\n  w\n" in printed


def test_weight_without_scale_can_be_cast(tmp_path):
    codes = every_code(16, 16, torch.float8_e5m2)
    got = convert(tmp_path, {"model.safetensors": {"w": codes}}, missing_scale="cast")
    assert_same_bits(got["w"], dequantized(codes, torch.ones(1, 1)))


def test_weight_without_scale_can_be_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w has no scale"):
        convert(tmp_path, {"model.safetensors": {"w": every_code(16, 16)}}, missing_scale="error")
    assert not (tmp_path / "out").exists()


def test_no_scale_inv_reaches_the_output_even_without_a_weight(tmp_path):
    tensors = {"w": torch.ones(3), "w_scale_inv": torch.ones(1), "gone_scale_inv": torch.ones(1)}
    assert set(convert(tmp_path, {"model.safetensors": tensors})) == {"w"}
    assert "_scale_inv" not in (tmp_path / "out" / INDEX).read_text()


def test_shard_that_holds_only_scales_is_not_written(tmp_path):
    shards = {ONE: {"w": finite_codes(4, 4)}, TWO: {"w_scale_inv": torch.ones(1)}}
    convert(tmp_path, shards)
    assert not (tmp_path / "out" / TWO).exists()
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == {"w": ONE}


def test_metadata_of_a_shard_is_kept_and_says_format_pt(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/model.safetensors"
    save_file({"x": torch.ones(1)}, path, metadata={"origin": "here", "format": "np"})
    main(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as shard:
        found = shard.metadata()
    assert re.fullmatch("[0-9a-f]{16}", found.pop("fp8_cast_bf16"))
    assert found == {"format": "pt", "origin": "here"}


def test_index_is_rebuilt_with_exact_size(tmp_path):
    shards, expected = several_kinds()
    write_checkpoint(tmp_path / "in", shards)
    index = json.loads((tmp_path / "in" / INDEX).read_text())
    index["metadata"] = {"total_size": 5, "mtp": "yes"}
    (tmp_path / "in" / INDEX).write_text(json.dumps(index))
    main(tmp_path / "in", tmp_path / "out")
    text = (tmp_path / "out" / INDEX).read_text()
    rebuilt = json.loads(text)
    sizes = [t.numel() * t.element_size() for ts in expected.values() for t in ts.values()]
    assert rebuilt["metadata"] == {"total_size": sum(sizes), "mtp": "yes"}
    assert rebuilt["weight_map"] == {name: shard for shard in expected for name in expected[shard]}
    assert text.startswith('{\n  "metadata": {\n    "')


def test_config_describes_plain_bf16_weights(tmp_path):
    config = {
        "torch_dtype": "float8_e4m3fn",
        "quantization_config": FP8_CONFIG,
        "hidden_size": 3,
        "text_config": {"dtype": "float16", "compression_config": {"format": "x"}, "n": [{"k": 1}]},
        "sub": [{"quantization_config": {}, "name": "é"}],
    }
    convert(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, config)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "torch_dtype": "bfloat16",
        "hidden_size": 3,
        "text_config": {"dtype": "bfloat16", "n": [{"k": 1}]},
        "sub": [{"name": "é"}],
    }


def test_config_without_a_dtype_gets_none(tmp_path):
    convert(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, {"hidden_size": 3})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"hidden_size": 3}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_with_an_empty_dtype_says_bfloat16(tmp_path, key):
    convert(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, {key: None, "hidden_size": 3})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {key: "bfloat16", "hidden_size": 3}


def test_other_files_are_copied_and_weight_files_are_not(tmp_path):
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": {"x": torch.ones(1)}})
    copied = ["tokenizer.json", "chat template.jinja", "modeling.py", "inference/deep/run.py", ".x"]
    left = ["pytorch_model.bin", "original/consolidated.pth", "q4.gguf", "quant_cfg.json"]
    left += [".git/config", ".cache/huggingface/download/x.lock", "inference/other.safetensors"]
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


def test_links_out_of_the_checkpoint_are_left_out_and_named(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": {"x": torch.ones(1)}})
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("secret")
    (source / "link.txt").symlink_to(tmp_path / "private/key")
    (source / "folder").symlink_to(tmp_path / "private")
    (source / "inside.json").symlink_to(INDEX)
    os.mkfifo(source / "pipe")
    main(source, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"model.safetensors", INDEX, "inside.json"}
    message = "Not copied (other weights, or not regular files): folder, link.txt, pipe\n"
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_shard_in_the_output_that_another_program_wrote_is_refused_by_name(tmp_path, kind):
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": {"x": torch.ones(1)}})
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
        convert(tmp_path, {"model.safetensors": {"x": torch.ones(1)}})
    assert contents(tmp_path / "out") == before


def test_files_are_not_written_through_links_in_the_output(tmp_path):
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": {"x": torch.ones(1)}})
    (source / "a.json").write_text("a")
    (source / "deep").mkdir()
    (source / "deep/b.json").write_text("b")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.json").symlink_to("../mine")
    main(source, tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "out/a.json").read_text() == "a"
    shutil.rmtree(tmp_path / "out/deep")
    (tmp_path / "out/deep").symlink_to("..")
    with pytest.raises(CheckpointError, match="is a link out of the output"):
        main(source, tmp_path / "out")
    assert not (tmp_path / "b.json").exists()


def test_stale_signs_of_quantization_are_removed_from_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/hf_quant_config.json").write_text("{}")
    (tmp_path / "out/config.json").write_text("{}")
    convert(tmp_path, {"model.safetensors": {"x": torch.ones(1)}})
    assert set(contents(tmp_path / "out")) == {"model.safetensors", INDEX}


def test_files_of_a_folder_inside_a_snapshot_are_copied(tmp_path):
    blobs, folder = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0/fp8"
    write_checkpoint(folder, {"model.safetensors": {"x": torch.ones(1)}})
    blobs.mkdir()
    (blobs / "1").write_text("t")
    (folder / "tokenizer.json").symlink_to("../../../blobs/1")
    main(folder, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "t"


def test_the_demo_of_the_ancestor_works(tmp_path):
    codes = torch.randint(0, 127, (10, 10), dtype=torch.uint8)
    scale, other = torch.tensor([0.5]).bfloat16(), torch.randn(5, 5).bfloat16()
    tensors = {"weight_1": codes, "weight_1_scale_inv": scale, "weight_2": other}
    got = convert(tmp_path, {"model-00001.safetensors": tensors})
    assert set(got) == {"weight_1", "weight_2"}
    expected = dequantized(codes.view(torch.float8_e4m3fn), scale.view(1, 1))
    assert_same_bits(got["weight_1"], expected)
    assert_same_bits(got["weight_2"], other)


def test_nan_codes_are_counted(tmp_path, capsys):
    codes = every_code(128, 256)
    convert(tmp_path, {"model.safetensors": {"w": codes, "w_scale_inv": torch.rand(1, 2)}})
    assert f"{codes.float().isnan().sum()} NaN values" in capsys.readouterr().out


def test_same_bytes_on_a_second_run(tmp_path):
    shards, _ = several_kinds()
    convert(tmp_path, shards, config={"quantization_config": FP8_CONFIG})
    first = contents(tmp_path / "out")
    main(tmp_path / "in", tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("out", ["in", "in/out", ".", "link", "link/deeper"])
def test_input_and_output_must_be_apart(tmp_path, out):
    write_checkpoint(tmp_path / "in", {"model.safetensors": {"x": torch.ones(1)}})
    (tmp_path / "link").symlink_to("in")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="the output must not lie in the input"):
        main(tmp_path / "in", tmp_path / out)
    assert contents(tmp_path) == before


def test_input_reached_by_another_name_is_still_the_input(tmp_path, monkeypatch):
    """As through a bind mount, or on a file system that does not tell upper from lower case."""
    write_checkpoint(tmp_path / "in", {"model.safetensors": {"x": torch.ones(1)}})
    write_checkpoint(tmp_path / "IN", {"model.safetensors": {"x": torch.ones(1)}})
    same = type(tmp_path).samefile
    names = {tmp_path / "in", tmp_path / "IN"}
    monkeypatch.setattr(
        type(tmp_path), "samefile", lambda a, b: {a, b} == names or same(a, b)
    )
    with pytest.raises(UsageError, match="the output must not lie in the input"):
        main(tmp_path / "in", tmp_path / "IN")


def test_empty_tensors_are_kept(tmp_path):
    tensors = {"e": torch.zeros(0, 4), "w": finite_codes(0, 8), "w_scale_inv": torch.zeros(0, 1)}
    tensors["z"] = torch.ones(2)
    got = convert(tmp_path, {"model.safetensors": tensors})
    assert (got["e"].shape, got["w"].shape, got["w"].dtype) == ((0, 4), (0, 8), torch.bfloat16)


def test_thousands_of_tiny_tensors(tmp_path):
    tensors = {f"t{i}": torch.full((3,), i, dtype=torch.int16) for i in range(5000)}
    got = convert(tmp_path, {"model.safetensors": tensors})
    assert len(got) == 5000
    assert all(got[f"t{i}"].tolist() == [i] * 3 for i in range(5000))
