"""--verify: what it accepts, what it finds, and that it shares no decoding with the converter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fp8_cast_bf16
import kernel
from checkpoints import (
    FP8_CONFIG,
    INDEX,
    ONE,
    TWO,
    contents,
    every_code,
    load_checkpoint,
    several_kinds,
    write_checkpoint,
)
from fp8_cast_bf16 import CheckpointError, cli, main


@pytest.fixture
def folders(tmp_path):
    """An FP8 checkpoint and its converted output."""
    shards = several_kinds()[0]
    shards[ONE] |= {"nan.weight": every_code(40, 40), "nan.weight_scale_inv": torch.ones(1, 1)}
    config = {"torch_dtype": "bfloat16", "hidden_size": 7, "quantization_config": FP8_CONFIG}
    write_checkpoint(tmp_path / "in", shards, config)
    main(tmp_path / "in", tmp_path / "out")
    return tmp_path / "in", tmp_path / "out"


def differences(folders, capsys):
    """Verify; return the lines that name differences, having checked the exit status."""
    source, out = folders
    before = contents(source.parent)
    capsys.readouterr()
    options = ["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(out)]
    status = cli([*options, "--verify"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith("to drop")) + 1
    assert contents(source.parent) == before
    if status == 0:
        assert lines[at].startswith("Verified 7 tensors: all as they should be; ")
        return []
    assert status == 1
    assert printed.err == (
        f"error: {out}: is not what the input gives, in {len(lines) - at} places\n"
    )
    return lines[at:]


def rewrite(out, change, name=ONE):
    """Let `change` edit the tensors of an output shard."""
    tensors = load_file(out / name)
    change(tensors)
    save_file(tensors, out / name, metadata={"format": "pt"})


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_an_output_of_ours_is_as_it_should_be(folders, capsys):
    assert differences(folders, capsys) == []


@pytest.mark.parametrize("place", [0, 129 * 300 + 255, 130 * 300 - 1])
def test_one_wrong_bit_in_a_weight_is_found_and_both_values_are_named(folders, capsys, place):
    def flip(tensors):
        tensors["a.weight"].view(torch.int16).view(-1)[place] ^= 1

    right = load_file(folders[1] / ONE)["a.weight"].flatten()[place].item()
    rewrite(folders[1], flip)
    wrong = load_file(folders[1] / ONE)["a.weight"].flatten()[place].item()
    assert differences(folders, capsys) == [
        f"a.weight: element [{place // 300}, {place % 300}] is {wrong}, expected {right}"
    ]


def test_the_first_of_many_differences_is_named(folders, capsys, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "REFERENCE_CHUNK", 500)

    def negate(tensors):
        tensors["experts.up_proj"][1:, 7:, 9:] = 7

    rewrite(folders[1], negate, TWO)
    (line,) = differences(folders, capsys)
    assert line.startswith("experts.up_proj: element [1, 7, 9] is 7.0, expected ")


def test_one_wrong_bit_in_a_copied_tensor_is_found(folders, capsys):
    rewrite(folders[1], lambda tensors: tensors["table"].add_(2**33), TWO)
    assert differences(folders, capsys) == [
        "table: element [0] is 0x0000000200000000, expected 0x0000000000000000"
    ]


def test_order_padding_payloads_and_sharding_are_free(folders, capsys):
    out = folders[1]
    tensors = load_checkpoint(out)
    nan = tensors["nan.weight"].isnan()
    assert nan.any()
    tensors["nan.weight"].view(torch.int16)[nan] = -0x003F  # 0xFFC1, another NaN
    for path in out.glob("*.safetensors"):
        path.unlink()
    names = sorted(tensors, reverse=True)
    shards = {f"s{i}.safetensors": {name: tensors[name]} for i, name in enumerate(names)}
    write_checkpoint(out, shards)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    edit(out / INDEX, lambda index: index.update(metadata={"total_size": size, "more": 1}))
    edit(out / "config.json", lambda config: config.update(dtype=config.pop("torch_dtype")))
    header = (out / "s0.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    padded = header[8 : 8 + length] + b" " * 512 + header[8 + length :]
    (out / "s0.safetensors").write_bytes((length + 512).to_bytes(8, "little") + padded)
    assert differences(folders, capsys) == []


def test_nan_in_the_place_of_a_number_is_a_difference(folders, capsys):
    rewrite(folders[1], lambda tensors: tensors["a.weight"][5:, 6:].fill_(torch.nan))
    (line,) = differences(folders, capsys)
    assert line.startswith("a.weight: element [5, 6] is nan, expected ")


def test_missing_extra_and_changed_tensors_are_named(folders, capsys):
    def change(tensors):
        tensors["a.weight"] = tensors["a.weight"].float()
        tensors["b.weight_scale_inv"] = torch.ones(3, 2)
        tensors["bias"] = tensors["bias"].view(3, 1).clone()
        del tensors["norm.weight"]

    rewrite(folders[1], change)
    edit(folders[1] / INDEX, lambda index: index["weight_map"].pop("norm.weight"))
    assert differences(folders, capsys) == [
        "norm.weight: is missing",
        f"b.weight_scale_inv: is not expected, in {ONE}",
        "a.weight: is F32 [130, 300], expected BF16 [130, 300]",
        "bias: is F32 [3, 1], expected F32 [3]",
        f"{INDEX}: has b.weight_scale_inv not in {ONE}, where it is",
        "{}: total_size is {}, expected {}".format(INDEX, *total(folders[1])),
    ]


def total(out):
    """Return the size that the index states and the one that is true."""
    size = sum(t.numel() * t.element_size() for t in load_checkpoint(out).values())
    return json.loads((out / INDEX).read_text())["metadata"]["total_size"], size


def test_what_is_wrong_with_index_and_config_is_named(folders, capsys):
    out = folders[1]

    def change_index(index):
        index["metadata"]["total_size"] = 1
        index["weight_map"]["bias"] = TWO

    def change_config(config):
        config["quantization_config"] = {"quant_method": "fp8"}
        config["torch_dtype"] = "float16"
        del config["hidden_size"]

    edit(out / INDEX, change_index)
    edit(out / "config.json", change_config)
    assert differences(folders, capsys) == [
        'config.json: dtype is "float16", expected "bfloat16"',
        "config.json: hidden_size is null, expected 7",
        'config.json: quantization_config is {"quant_method": "fp8"}, expected null',
        f"{INDEX}: has bias not in {ONE}, where it is",
        f"{INDEX}: total_size is 1, expected {total(out)[1]}",
    ]
    (out / INDEX).unlink()
    (out / "config.json").unlink()
    lines = differences(folders, capsys)
    assert lines[0].startswith("config.json: the file is null, expected {")
    assert lines[1] == f"{INDEX}: is missing"


def test_an_output_that_is_not_there_or_broken_is_an_error_with_its_name(folders, capsys):
    source, out = folders
    with pytest.raises(CheckpointError, match=f"{source.parent / 'none'}: no such folder"):
        main(source, source.parent / "none", verify=True)
    (out / TWO).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{TWO}: not a whole safetensors file"):
        main(source, out, verify=True)


def test_verifying_shares_no_decoding_with_converting(folders, capsys, monkeypatch):
    def fail(*operands):
        raise AssertionError("the fast path was used")

    for name in ("dequantize", "widen_scales", "_decode", "_scale", "_pieces"):
        monkeypatch.setattr(kernel, name, fail)
    assert differences(folders, capsys) == []


@pytest.mark.parametrize("broken", ["shift", "mask", "rescale", "values"])
def test_an_error_in_the_kernel_would_be_found(folders, capsys, monkeypatch, broken):
    source, codes = folders[0], kernel.FORMATS["E4M3"]
    shift, mask, rescale = codes.placement
    wrong = {
        "shift": (shift - 1, mask, rescale),
        "mask": (shift, mask & ~0x10, rescale),
        "rescale": (shift, mask, rescale * 2),
    }
    with monkeypatch.context() as patch:
        wrong["values"] = codes.values * 2
        name = "values" if broken == "values" else "placement"
        patch.setitem(vars(codes), name, wrong[broken])
        main(source, source.parent / "wrong")
    found = differences((source, source.parent / "wrong"), capsys)
    with_nan = [line for line in found if line.startswith("nan.weight: ")]
    assert (len(found), len(with_nan)) == ((1, 1) if broken == "values" else (3, 0))


def test_the_ancestors_output_differs_in_its_config_and_index_only(folders, capsys):
    """Its script loads whole shards, casts, pops the scales and copies the config as it is."""
    source = folders[0]
    theirs = source.parent / "theirs"
    scales = {name: t for name, t in load_checkpoint(source).items() if "scale" in name}
    shards = {}
    for shard in (ONE, TWO):
        shards[shard] = {}
        for name, tensor in load_file(source / shard).items():
            scale = scales.get(name + "_scale_inv", scales.get(name.replace(".", "_") + "_scale"))
            if scale is not None:
                wide = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
                wide = wide[..., : tensor.shape[-2], : tensor.shape[-1]]
                shards[shard][name] = (tensor.float() * wide).bfloat16()
            elif name not in scales:
                shards[shard][name] = tensor
    write_checkpoint(theirs, shards, json.loads((source / "config.json").read_text()))
    lines = differences((source, theirs), capsys)
    assert [line.partition(" is ")[0] for line in lines] == [
        "config.json: quantization_config",
        f"{INDEX}: total_size",
    ]


def test_differences_stand_in_the_report(folders, tmp_path):
    source, out = folders
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    with pytest.raises(CheckpointError, match="in 1 places"):
        main(source, out, verify=True, report=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["differences"]) == 1
    assert report["differences"][0].startswith("bias: element [0] is 0x00000000, expected 0x")
