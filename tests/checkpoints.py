"""Small checkpoints for the tests, and what must come out of them.

The oracle is torch's own float8 cast to float32, times the scale, cast to BF16. It shares no code
with the converter.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8_cast_bf16 import CheckpointError, main

PACKED, E8M0 = torch.uint8, torch.float8_e8m0fnu
INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
CONFIG = {"quantization_config": FP8_CONFIG}


def every_code(rows: int, cols: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Return a (rows, cols) tensor that runs through all 256 codes again and again."""
    return (torch.arange(rows * cols) * 37 % 256).to(torch.uint8).view(dtype).view(rows, cols)


def finite_codes(
    *shape: int, dtype: torch.dtype = torch.float8_e4m3fn, seed: int = 0
) -> torch.Tensor:
    """Return random codes of an FP8 dtype without NaN and infinities."""
    end = 0x7F if dtype == torch.float8_e4m3fn else 0x7C
    codes = torch.randint(
        0, end, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return (codes + 128 * (codes % 3 == 0)).to(torch.uint8).view(dtype)


def fp4_values(packed):
    """Return the float32 values of bytes that hold two E2M1 codes each, the low half first."""
    codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).long()
    return torch.where(codes < 8, E2M1[codes % 8], -E2M1[codes % 8])


def dequantized(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> torch.Tensor:
    """Return the BF16 values of 2-D or stacked codes whose scale (as many axes) covers blocks."""
    wide = scale.float()
    for axis, size in zip((-2, -1), block, strict=True):
        wide = wide.repeat_interleave(size, axis)
    product = codes.float() * wide[..., : codes.shape[-2], : codes.shape[-1]]
    return canonical(product.bfloat16())


def canonical(values: torch.Tensor) -> torch.Tensor:
    """Return BF16 values in which every NaN is 0x7FC0."""
    return torch.where(
        values.isnan(), torch.tensor(0x7FC0, dtype=torch.int16), values.view(torch.int16)
    ).view(torch.bfloat16)


def special_counts(values: torch.Tensor) -> list[int]:
    """Return how many values are NaN and how many infinite."""
    return [values.isnan().sum().item(), values.isinf().sum().item()]


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare dtype, shape and every bit; name the first element that differs."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    differs = (
        got.contiguous().flatten().view(torch.uint8)
        != expected.contiguous().flatten().view(torch.uint8)
    ).nonzero()
    if len(differs):
        at = differs[0].item() // got.element_size()
        raise AssertionError(
            f"element {at}: {got.flatten()[at].item()} != {expected.flatten()[at].item()}"
        )


def several_kinds(seed: int = 0) -> tuple[dict, dict]:
    """Return two shards with ragged FP8 weights, scales in either and others, and what comes out.

    The seed changes values only, no name and no shape.
    """
    torch.manual_seed(seed)
    wide, tall = finite_codes(130, 300, seed=seed), finite_codes(300, 130, seed=seed)
    stacked = finite_codes(3, 140, 200, seed=seed)
    one = {
        "a.weight": wide,
        "b.weight_scale_inv": torch.rand(3, 2),
        "norm.weight": torch.randn(77).bfloat16(),
        "bias": torch.randn(3),
    }
    two = {
        "b.weight": tall,
        "a.weight_scale_inv": torch.rand(2, 3),
        "experts.up_proj": stacked,
        "experts.up_proj_scale_inv": torch.rand(3, 2, 2),
        "table": torch.arange(9) * 2**40,
    }
    expected_one = {
        "a.weight": dequantized(wide, two["a.weight_scale_inv"]),
        "norm.weight": one["norm.weight"],
        "bias": one["bias"],
    }
    expected_two = {
        "b.weight": dequantized(tall, one["b.weight_scale_inv"]),
        "experts.up_proj": dequantized(stacked, two["experts.up_proj_scale_inv"]),
        "table": two["table"],
    }
    return {ONE: one, TWO: two}, {ONE: expected_one, TWO: expected_two}


def write_checkpoint(
    folder: Path, shards: dict[str, dict], config: dict | None = None, index: bool = True
) -> Path:
    """Write shards with the reference writer, and an index and config beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if index:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint's shards."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_again(source: Path, out: Path, **options) -> None:
    """Verify an output; see that a second run takes it for complete and a missing shard is made."""
    main(source, out, **options, verify=True)
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    main(source, out, **options)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    next(out.glob("*.safetensors")).unlink()
    main(source, out, **options)
    assert contents(out) == before


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], torch.Tensor]]) -> None:
    """Write a shard of dtypes that torch or its writer may not know, from their bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        chunk = bytes(raw.flatten().view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(chunk)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += chunk
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rand(*shape, dtype=torch.float32):
    return (torch.rand(shape) + 0.01).to(dtype)


def exponents(*shape, dtype=PACKED):
    """Return E8M0 bytes that run through their whole range, 0 (2^-127) and 255 (NaN) included."""
    values = torch.arange(torch.Size(shape).numel()) * 3 % 256
    return values.to(torch.uint8).view(dtype).view(shape)


def powers(raw):
    """Return what E8M0 bytes mean, in float32."""
    raw = raw.view(torch.uint8).double()
    return torch.where(raw == 255, torch.nan, 2.0 ** (raw - 127)).float()


def packed(*shape, dtype=PACKED):
    return every_code(*shape, PACKED).view(dtype)


def convert(tmp_path, tensors, expected, config=None, name="model.safetensors", **options):
    """Convert one shard and hold every tensor that comes out against what is expected."""
    write_checkpoint(tmp_path / "in", {name: tensors}, config, index=False)
    main(tmp_path / "in", tmp_path / "out", **options)
    check_again(tmp_path / "in", tmp_path / "out", **options)
    got = load_checkpoint(tmp_path / "out")
    assert set(got) == set(expected)
    for tensor_name, tensor in expected.items():
        assert_same_bits(got[tensor_name], tensor)


def method(name, **more):
    """Return a config that names a quant_method."""
    return {"quantization_config": {"quant_method": name, **more}}


def ct_config(**weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def positive(codes):
    """Return FP8 codes without their sign bit."""
    return (codes.view(torch.uint8) & 0x7F).view(codes.dtype)


def nvfp4(second, divide):
    """Return packed codes, their E4M3 scales, and the BF16 values under a second scale."""
    codes, scale = packed(30, 40), positive(finite_codes(30, 5))
    wide = scale.float() / second if divide else scale.float() * second
    return codes, scale, dequantized(fp4_values(codes), wide, (1, 16))


def assert_refused(tmp_path, tensors, *complaints, config=None, name="model.safetensors"):
    write_checkpoint(tmp_path / "in", {name: tensors}, config, index=False)
    with pytest.raises(CheckpointError) as caught:
        main(tmp_path / "in", tmp_path / "out")
    for complaint in complaints:
        assert complaint in str(caught.value)
    assert not (tmp_path / "out").exists()
