"""Checkpoints for the tests, what must come out of them, and how a test converts them.

The oracle is torch's own float8 cast to float32, times the scale, cast to BF16. It shares no code
with the converter, of which only the last section knows.
"""

import json
import math
import os
import re
import socket
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fp8_cast_bf16 import CheckpointError, bf16_tensors, main

ROOT = Path(__file__).parent.parent
PACKED, E8M0 = torch.uint8, torch.float8_e8m0fnu
INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
SHARD = "model.safetensors"
EXTRA = "model-extra.safetensors"
KEY = "fp8_cast_bf16"  # Of the fingerprint, in the metadata of an output shard.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
CONFIG = {"quantization_config": FP8_CONFIG}
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U8": 8, "I8": 8, "BF16": 16, "F32": 32}


# --- codes, scales, and what they mean ---


def every_code(rows: int, cols: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Return a (rows, cols) tensor that runs through all 256 codes again and again."""
    return (torch.arange(rows * cols) * 37 % 256).to(torch.uint8).view(dtype).view(rows, cols)


def packed(*shape, dtype=PACKED):
    return every_code(*shape, PACKED).view(dtype)


def finite_codes(
    *shape: int, dtype: torch.dtype = torch.float8_e4m3fn, seed: int = 0
) -> torch.Tensor:
    """Return random codes of an FP8 dtype without NaN and infinities."""
    end = 0x7F if dtype == torch.float8_e4m3fn else 0x7C
    codes = torch.randint(
        0, end, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return (codes + 128 * (codes % 3 == 0)).to(torch.uint8).view(dtype)


def positive(codes):
    """Return FP8 codes without their sign bit."""
    return (codes.view(torch.uint8) & 0x7F).view(codes.dtype)


def exponents(*shape, dtype=PACKED):
    """Return E8M0 bytes that run through their whole range, 0 (2^-127) and 255 (NaN) included."""
    values = torch.arange(torch.Size(shape).numel()) * 3 % 256
    return values.to(torch.uint8).view(dtype).view(shape)


def powers(raw):
    """Return what E8M0 bytes mean, in float32."""
    raw = raw.view(torch.uint8).double()
    return torch.where(raw == 255, torch.nan, 2.0 ** (raw - 127)).float()


def rand(*shape, dtype=torch.float32):
    return (torch.rand(shape) + 0.01).to(dtype)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return the two halves of every byte as integers from 0 to 15, the low half first."""
    raw = codes.view(PACKED)
    return torch.stack([raw & 0xF, raw >> 4], -1).flatten(-2).int()


def fp4_values(packed: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of bytes that hold two E2M1 codes each, the low half first."""
    codes = nibbles(packed).long()
    return torch.where(codes < 8, E2M1[codes % 8], -E2M1[codes % 8])


def canonical(values: torch.Tensor) -> torch.Tensor:
    """Return BF16 values in which every NaN is 0x7FC0."""
    return torch.where(
        values.isnan(), torch.tensor(0x7FC0, dtype=torch.int16), values.view(torch.int16)
    ).view(torch.bfloat16)


def dequantized(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> torch.Tensor:
    """Return the BF16 values of 2-D or stacked codes whose scale (as many axes) covers blocks."""
    wide = scale.float()
    for axis, size in zip((-2, -1), block, strict=True):
        wide = wide.repeat_interleave(size, axis)
    product = codes.float() * wide[..., : codes.shape[-2], : codes.shape[-1]]
    return canonical(product.bfloat16())


def nvfp4(second, divide):
    """Return packed codes, their E4M3 scales, and the BF16 values under a second scale."""
    codes, scale = packed(30, 40), positive(finite_codes(30, 5))
    wide = scale.float() / second if divide else scale.float() * second
    return codes, scale, dequantized(fp4_values(codes), wide, (1, 16))


def special_counts(values: torch.Tensor) -> list[int]:
    """Return how many values are NaN and how many infinite."""
    return [values.isnan().sum().item(), values.isinf().sum().item()]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    try:
        assert_same_bits(one, other)
    except AssertionError:
        return False
    return True


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


# --- files ---


def method(name, **more):
    """Return a config that names a quant_method."""
    return {"quantization_config": {"quant_method": name, **more}}


def ct_config(**weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def several_kinds(seed: int = 0) -> tuple[dict, dict]:
    """Return two shards with ragged FP8 weights, scales in either and others, and what comes out.

    The seed changes values only, no name and no shape.
    """
    torch.manual_seed(seed)
    wide, tall = finite_codes(130, 300, seed=seed), finite_codes(300, 130, seed=seed)
    stacked = finite_codes(3, 140, 200, seed=seed)
    one = {
        "a.weight": wide,
        "b.weight_scale_inv": torch.rand(3, 2) / 1000,
        "norm.weight": torch.randn(77).bfloat16(),
        "bias": torch.randn(3),
    }
    two = {
        "b.weight": tall,
        "a.weight_scale_inv": torch.rand(2, 3) / 1000,
        "experts.up_proj": stacked,
        "experts.up_proj_scale_inv": torch.rand(3, 2, 2) / 1000,
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


def one_weight(stem: str = "w", seed: int = 0) -> tuple[dict, dict]:
    """Return a ragged FP8 weight with its scale and a tensor beside it, and what comes out."""
    codes, scale = finite_codes(130, 40, seed=seed), torch.full((2, 1), 0.001 * (seed + 1))
    plain = {f"norm.{stem}": torch.full((3,), float(seed))}
    return (
        {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scale, **plain},
        {f"{stem}.weight": dequantized(codes, scale), **plain},
    )


def assert_holds(shard: Path, expected: dict[str, torch.Tensor]) -> None:
    """See that a shard holds these tensors, to the last bit, and no others."""
    got = load_file(shard)
    assert {*got} == {*expected}
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor)


def write_independent(folder: Path, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Write two shards that need each other, one that needs none and one in a folder of its own.

    Returns what comes out, by shard.
    """
    given, expected = several_kinds(seed)
    given[EXTRA], expected[EXTRA] = one_weight("c", seed)
    draft, expected[f"draft/{SHARD}"] = one_weight("d", seed + 2)
    write_checkpoint(folder, given, CONFIG)
    write_checkpoint(folder / "draft", {SHARD: draft}, CONFIG, index=False)
    (folder / "tokenizer.json").write_text("{}" * 3000)
    return expected


def readable(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each shard below a folder; nothing of one that safetensors refuses."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            found[path.relative_to(folder).as_posix()] = load_file(path)
        except SafetensorError:
            assert is_emptied(path), f"{path} is neither whole nor emptied"
    return found


def is_emptied(path: Path) -> bool:
    """Return whether a shard ends behind its header, which says that there is more."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    entries.pop("__metadata__", None)
    named = max(entry["data_offsets"][1] for entry in entries.values())
    return len(content) == 8 + size and named > 0


def computed(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what comes of a tensor of these that are left of a checkpoint, if it can be told."""
    tensor, scale = given.get(name), given.get(f"{name}_scale_inv")
    if tensor is None or tensor.dtype != torch.float8_e4m3fn:
        return tensor
    return None if scale is None else dequantized(tensor, scale)


def assert_recoverable(
    source: Path, outs: list[Path], expected: dict[str, dict[str, torch.Tensor]], where: str = ""
) -> None:
    """See that every tensor that a conversion makes is in one of the outputs, under its final name
    and to the last bit, or can be computed from what is left of the input.
    """
    left, made = readable(source), [readable(out) for out in outs]
    for shard, tensors in expected.items():
        folder, given = Path(shard).parent, {}
        for path, found in left.items():
            given |= found if Path(path).parent == folder else {}
        for name, tensor in tensors.items():
            found = [computed(name, given), *(shards.get(shard, {}).get(name) for shards in made)]
            assert any(same_bits(value, tensor) for value in found if value is not None), (
                f"{where}: {name} of {shard} is lost")


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def edit_json(path: Path, change: Callable) -> None:
    """Let `change` edit what a JSON file holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard_of(header: bytes, size: int = 0, length: int | None = None) -> bytes:
    """Return a shard of a header that may be nonsense and of so many zeros; the length may lie."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(size)


def write_raw(path: Path, tensors: dict[str, tuple]) -> None:
    """Write a shard of dtypes that torch or its writer may not know.

    tensors: for each name the dtype, the shape, and the data or nothing, which is zeros that take
    no room on the disk.
    """
    header, offset = {}, 0
    for name, (dtype, shape, *_) in tensors.items():
        end = offset + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(shard_of(text))
        file.truncate(8 + len(text) + offset)
        for name, (_, _, *data) in tensors.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            for raw in data:
                file.write(bytes(raw.flatten().view(torch.uint8).tolist()))


SPECIAL = ["pipe", "socket", "device", "link", "relative link"]


def special_file(path: Path, kind: str, secret: Path) -> None:
    """Make something that is no regular file, or a link to the secret."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(secret if kind == "link" else os.path.relpath(secret, path.parent))


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


def metadata_of(path: Path) -> dict[str, str]:
    """Return a shard's metadata."""
    with safe_open(path, "pt") as shard:
        return shard.metadata()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a file is written anew."""
    stats = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def assert_laid_out_as(reference: Path, shard: Path) -> None:
    """Compare a shard with the reference writer's file in all but the fingerprint and padding."""
    texts, datas = [], []
    for path in (reference, shard):
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        texts.append(json.loads(content[8:end]))
        datas.append(content[end:])
    assert end % 64 == 0
    assert re.fullmatch("[0-9a-f]{16}", texts[1]["__metadata__"].pop(KEY))
    expected, got = (list(text.items()) for text in texts)
    assert got == expected  # In the same order, with the same dtypes, shapes and offsets.
    assert datas[1] == datas[0]


TENSORS = {  # Plausible weights, about which nothing is warned.
    "w.weight": finite_codes(130, 40),
    "w.weight_scale_inv": torch.full((2, 1), 0.001),
    "v.weight": finite_codes(9, 64),
    "v.weight_scale": torch.full((9, 1), 0.001),
    "norm": torch.ones(3),
}

Usage = namedtuple("Usage", "total used free")  # What shutil.disk_usage returns.

# --- the converter ---

# Defines peak() in a process: the most memory that it has taken so far, in kilobytes. Not
# ru_maxrss, which begins with the memory of the process that started this one.
PEAK = "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); "


def arguments(source: Path, *more: str, out: Path | None = None) -> list[str]:
    """Return the command line of a conversion into a folder beside the source."""
    folders = ["--input-fp8-hf-path", str(source)]
    return [*folders, "--output-bf16-hf-path", str(out or source.parent / "out"), *more]


def convert(
    tmp_path: Path,
    given: dict,
    expected: dict[str, torch.Tensor] | None = None,
    config: dict | None = None,
    name: str = SHARD,
    index: bool | None = None,
    **options,
) -> dict[str, torch.Tensor]:
    """Convert a checkpoint; return all tensors, having compared them with what is expected.

    given: shards by name, with an index beside them unless it is False; or the tensors of a single
    shard, without an index.
    """
    shards = given if isinstance(next(iter(given.values())), dict) else {name: given}
    index = shards is given if index is None else index
    write_checkpoint(tmp_path / "in", shards, config, index)
    main(tmp_path / "in", tmp_path / "out", **options)
    missing_scale = options.get("missing_scale", "keep")
    assert_yields(tmp_path / "in", tmp_path / "out", missing_scale=missing_scale, workers=1)
    check_again(tmp_path / "in", tmp_path / "out", **options)
    got = load_checkpoint(tmp_path / "out")
    if expected is not None:
        assert set(got) == set(expected)
        for tensor_name, tensor in expected.items():
            assert_same_bits(got[tensor_name], tensor)
    return got


def stored(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a folder's shards in the order in which they stand there."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        data, tensors = path.read_bytes(), load_file(path)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found += [(name, tensors[name]) for name in header if name != "__metadata__"]
    return found


def assert_yields(source: Path, out: Path, **options) -> None:
    """See that bf16_tensors yields what the conversion has written, in the same order."""
    with warnings.catch_warnings(action="ignore"):
        got = [*bf16_tensors(source, **options)]
    expected = stored(out)
    assert [name for name, _ in got] == [name for name, _ in expected]
    for (_, tensor), (_, other) in zip(got, expected, strict=True):
        assert_same_bits(tensor, other)


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


def assert_folder_refused(source: Path, *complaints: str, **options) -> str:
    """See that a checkpoint is refused before anything is written; return the message."""
    out = source.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        main(source, out, **options)
    for complaint in complaints:
        assert complaint in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def assert_refused(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    *complaints: str,
    config: dict | None = None,
    name: str = SHARD,
    **options,
) -> str:
    """See that a checkpoint of one shard is refused; return the message."""
    source = write_checkpoint(tmp_path / "in", {name: tensors}, config, index=False)
    return assert_folder_refused(source, *complaints, **options)


def peak_memory(source: Path, *options: str) -> tuple[int, int]:
    """Convert in a process of its own; return its peak memory in bytes, before and after."""
    code = (
        f"import sys, fp8_cast_bf16; {PEAK}before = peak(); "
        "assert fp8_cast_bf16.cli(sys.argv[1:]) == 0; print(before, peak())"
    )
    command = [sys.executable, "-c", code, *arguments(source, "--device", "cpu", *options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    before, after = (int(kilobytes) * 1024 for kilobytes in done.stdout.split()[-2:])
    return before, after
