"""Checkpoints for the tests, what must come out of them, and how a test converts them.

The oracle is torch's own float8 cast to float32, times the scale, cast to BF16. It shares no code
with the converter, of which only the last section knows.
"""

import contextlib
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fp8_cast_bf16 import CheckpointError, bf16_tensors, cli, main

ROOT = Path(__file__).parent.parent
PACKED, E8M0 = torch.uint8, torch.float8_e8m0fnu
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
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


def finite_codes(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn, seed: int = 0):
    """Return random codes of an FP8 dtype without NaN and infinities."""
    end = 0x7F if dtype == torch.float8_e4m3fn else 0x7C
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, end, shape, dtype=torch.uint8, generator=generator)
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
    bits = values.view(torch.int16).clone()
    bits[values.isnan()] = 0x7FC0
    return bits.view(torch.bfloat16)


def dequantized(codes: torch.Tensor, scale: torch.Tensor, block=(128, 128)) -> torch.Tensor:
    """Return the BF16 values of 2-D or stacked codes whose scale (as many axes) covers blocks."""
    wide = scale.float()
    for axis, size in zip((-2, -1), block, strict=True):
        wide = wide.repeat_interleave(size, axis)
    product = codes.float() * wide[..., : codes.shape[-2], : codes.shape[-1]]
    return canonical(product.bfloat16())


def fp4(codes: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """Return the BF16 values of packed E2M1 codes, so many of which in a row share a scale."""
    return dequantized(fp4_values(codes), scale, (1, group))


def nvfp4(second, divide: bool = False, rows: tuple[int, ...] = (30,), group: int = 16) -> tuple:
    """Return packed codes, E4M3 scales, and the values under second scales of (*rows, 1)."""
    codes = packed(math.prod(rows), 5 * group // 2).view(*rows, -1)
    scale = positive(finite_codes(*rows, 5))
    wide = scale.float() / second if divide else scale.float() * second
    return codes, scale, fp4(codes, wide, group)


def int4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 words of eight codes each, and the integers in their first columns."""
    codes = packed(rows, 4 * -(-columns // 8))
    return codes.view(torch.int32), nibbles(codes)[:, :columns] - 8


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    with contextlib.suppress(AssertionError):
        assert_same_bits(one, other)
        return True
    return False


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare dtype, shape and every bit; name the first element that differs."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    raw, wanted = (t.contiguous().flatten().view(torch.uint8) for t in (got, expected))
    for byte in (raw != wanted).nonzero()[:1]:
        at = byte.item() // got.element_size()
        one, other = (t.flatten()[at].item() for t in (got, expected))
        raise AssertionError(f"element {at}: {one} != {other}")


def assert_same_tensors(got: dict, expected: dict) -> None:
    """Compare the names, and every tensor to the last bit."""
    assert {*got} == {*expected}
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor)


# --- files ---


def method(name, **more):
    """Return a config that names a quant_method."""
    return {"quantization_config": {"quant_method": name, **more}}


def ct_config(**weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def note(**entries) -> torch.Tensor:
    """Return what ComfyUI notes beside a weight: JSON in a tensor of bytes."""
    return torch.tensor([*json.dumps(entries).encode()], dtype=torch.uint8)


def at(module: str, **leaves: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a module under their names."""
    return {f"{module}.{leaf}": tensor for leaf, tensor in leaves.items() if tensor is not None}


def fresh(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies, because the reference writer refuses tensors that share their memory."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def several_kinds(seed: int = 0) -> tuple[dict, dict]:
    """Return two shards with ragged FP8 weights, scales in either, and what comes out."""
    torch.manual_seed(seed)
    wide, tall = finite_codes(130, 300, seed=seed), finite_codes(300, 130, seed=seed)
    stacked = finite_codes(3, 140, 200, seed=seed)
    of_b, norm, bias = torch.rand(3, 2) / 1000, torch.randn(77).bfloat16(), torch.randn(3)
    of_a, of_experts = torch.rand(2, 3) / 1000, torch.rand(3, 2, 2) / 1000
    table = torch.arange(9) * 2**40
    plain = {"norm.weight": norm, "bias": bias}
    one = {"a.weight": wide, "b.weight_scale_inv": of_b, **plain}
    two = {"b.weight": tall, "a.weight_scale_inv": of_a, "table": table,
           "experts.up_proj": stacked, "experts.up_proj_scale_inv": of_experts}
    return {ONE: one, TWO: two}, {
        ONE: {"a.weight": dequantized(wide, of_a), **plain},
        TWO: {"b.weight": dequantized(tall, of_b), "table": table,
              "experts.up_proj": dequantized(stacked, of_experts)}}


def write_checkpoint(folder: Path, shards: dict[str, dict], config: dict | None = None,
                     index: bool = True) -> Path:
    """Write shards with the reference writer, and an index and config beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if index:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


def one_weight(stem: str = "w", seed: int = 0) -> tuple[dict, dict]:
    """Return a ragged FP8 weight with its scale and a tensor beside it, and what comes out."""
    codes, scale = finite_codes(130, 40, seed=seed), torch.full((2, 1), 0.001 * (seed + 1))
    plain = {f"norm.{stem}": torch.full((3,), float(seed))}
    given = {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scale, **plain}
    return given, {f"{stem}.weight": dequantized(codes, scale), **plain}


def assert_holds(shard: Path, expected: dict[str, torch.Tensor]) -> None:
    """See that a shard holds these tensors, to the last bit, and no others."""
    assert_same_tensors(load_file(shard), expected)


def write_independent(folder: Path, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Write two shards that need each other, one that needs none and one in a folder of its own;
    return what comes out, by shard.
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


def split(path: Path) -> tuple[bytes, bytes]:
    """Return a shard's header, with its length before it, and the data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:end], content[end:]


def header_of(path: Path) -> dict:
    return json.loads(split(path)[0][8:])


def is_emptied(path: Path) -> bool:
    """Return whether a shard ends behind its header, which says that there is more."""
    header = header_of(path)
    header.pop("__metadata__", None)
    return not split(path)[1] and any(entry["data_offsets"][1] for entry in header.values())


def computed(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what comes of a tensor of these that are left of a checkpoint, if it can be told."""
    tensor, scale = given.get(name), given.get(f"{name}_scale_inv")
    if tensor is None or tensor.dtype != torch.float8_e4m3fn:
        return tensor
    return None if scale is None else dequantized(tensor, scale)


def assert_recoverable(source: Path, outs: list[Path],
                       expected: dict[str, dict[str, torch.Tensor]], where: str = "") -> None:
    """See that every tensor that a conversion makes is in one of the outputs, under its final name
    and to the last bit, or can be computed from what is left of the input.
    """
    left, made = readable(source), [readable(out) for out in outs]
    for shard, tensors in expected.items():
        folder, given = Path(shard).parent, {}
        for path, found in left.items():
            given |= found if Path(path).parent == folder else {}
        for name, tensor in tensors.items():
            found = [shards.get(shard, {}).get(name) for shards in made] + [computed(name, given)]
            held = any(value is not None and same_bits(value, tensor) for value in found)
            assert held, f"{where}: {name} of {shard} is lost"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def edit_json(path: Path, change: Callable) -> None:
    """Let `change` edit what a JSON file holds."""
    value = read_json(path)
    change(value)
    write_json(path, value)


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def spoil(path: Path, how: str) -> None:
    """Put something else, or nothing, in the place of a file that a conversion has made."""
    whole = path.read_bytes() if path.exists() else b""
    spoilt = {"empty": b"", "text": b"mine", "other values": b'{"mine": 1}', "cut": whole[:-3],
              "longer": whole + b"x", "zeros": bytes(len(whole)), "huge header": b"\xff" * 99,
              "a bit": whole[:-1] + bytes(byte ^ 1 for byte in whole[-1:]),
              "header": whole.replace(b'"pt"', b'"np"'),
              # Python takes this for JSON and safetensors does not.
              "refused": whole.replace(b'"format":"pt"', b'"x":"\\udc00" ')}
    if how in spoilt:
        assert spoilt[how] != whole
        path.write_bytes(spoilt[how])
    elif how == "values":
        edit_json(path, lambda value: value.update(weight_map={}, dtype="float16"))
    elif how in ("names", "dtypes", "shapes", "fewer", "no fingerprint"):
        spoil_tensors(path, how)
    else:
        path.unlink()
    if how == "folder":
        (path / "mine").mkdir(parents=True)
    elif how == "link":
        (path.parent.parent / "elsewhere").write_bytes(whole)
        path.symlink_to("../elsewhere")
    elif how == "link to nothing":
        path.symlink_to("gone")


def spoil_tensors(path: Path, how: str) -> None:
    """Write a shard anew with another smallest tensor, or without the fingerprint."""
    tensors, metadata = load_file(path), metadata_of(path)
    name = min(tensors, key=lambda name: tensors[name].nbytes)
    tensor = tensors.pop(name)
    tensors |= {"names": {name[:-1]: tensor}, "dtypes": {name: tensor.view(torch.int32)},
                "shapes": {name: tensor[None]}, "fewer": {}}.get(how, {name: tensor})
    save_file(tensors, path, {"format": "pt"} if how == "no fingerprint" else metadata)


def shard_of(header: bytes, size: int = 0, length: int | None = None) -> bytes:
    """Return a shard of a header that may be nonsense and of so many zeros; the length may lie."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(size)


def write_raw(path: Path, tensors: dict[str, tuple]) -> None:
    """Write a shard of dtypes that torch or its writer may not know: for each name the dtype, the
    shape, and the data or nothing, which is zeros that take no room on the disk.
    """
    header, offset = {}, 0
    for name, (dtype, shape, *_) in tensors.items():
        begin, offset = offset, offset + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, offset]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(shard_of(text))
        for name, (_, _, *data) in tensors.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.writelines(bytes(raw.flatten().view(torch.uint8).tolist()) for raw in data)
        file.truncate(8 + len(text) + offset)


def special_file(path: Path, kind: str) -> None:
    """Make something that is no regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


def stored(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a folder's shards in the order in which they stand there."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        found += [(name, tensors[name]) for name in header_of(path) if name != "__metadata__"]
    return found


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint's shards."""
    return dict(stored(folder))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def metadata_of(path: Path) -> dict[str, str] | None:
    return header_of(path).get("__metadata__")


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a file is written anew."""
    stats = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def snapshot(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Return all that is in a folder and below, itself included, and whether any is touched."""
    stats = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


def assert_laid_out_as(reference: Path, shard: Path) -> None:
    """Compare a shard with the reference writer's file in all but the fingerprint and padding."""
    (_, values), (start, data) = split(reference), split(shard)
    expected, got = header_of(reference), header_of(shard)
    assert len(start) % 64 == 0
    assert re.fullmatch("[0-9a-f]{16}", got["__metadata__"].pop(KEY))
    assert [*got.items()] == [*expected.items()]  # In the same order.
    assert data == values


TENSORS = {  # Plausible weights, about which nothing is warned.
    "w.weight": finite_codes(130, 40), "w.weight_scale_inv": torch.full((2, 1), 0.001),
    "v.weight": finite_codes(9, 64), "v.weight_scale": torch.full((9, 1), 0.001),
    "norm": torch.ones(3)}
Usage = namedtuple("Usage", "total used free")  # What shutil.disk_usage returns.

# --- the converter ---

NOTHING = "Nothing to do: the output is complete\n"
NOT_PLANNED = ": is not what this input gives with these options; give another folder, or delete it"

# Defines peak() in a process: the most memory that it has taken so far, in kilobytes. Not
# ru_maxrss, which begins with the memory of the process that started this one.
PEAK = "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); "


def arguments(source: Path, *more: str, out: Path | None = None) -> list[str]:
    """Return the command line of a conversion into a folder beside the source."""
    folders = ["--input-fp8-hf-path", str(source)]
    return [*folders, "--output-bf16-hf-path", str(out or source.parent / "out"), *more]


def convert(tmp_path: Path, given: dict, expected: dict[str, torch.Tensor] | None = None,
            config: dict | None = None, name: str = SHARD, index: bool | None = None,
            **options) -> dict[str, torch.Tensor]:
    """Convert a checkpoint; return all tensors, having compared them with what is expected.

    given: shards by name, with an index unless it is False; or the tensors of one shard, without.
    """
    shards = given if isinstance(next(iter(given.values())), dict) else {name: given}
    index = shards is given if index is None else index
    write_checkpoint(tmp_path / "in", shards, config, index)
    main(tmp_path / "in", tmp_path / "out", **options)
    assert_yields(tmp_path / "in", tmp_path / "out", workers=1,
                  missing_scale=options.get("missing_scale", "keep"))
    check_again(tmp_path / "in", tmp_path / "out", **options)
    got = load_checkpoint(tmp_path / "out")
    assert_same_tensors(got, got if expected is None else expected)
    return got


def assert_yields(source: Path, out: Path, **options) -> None:
    """See that bf16_tensors yields what the conversion has written, in the same order."""
    with warnings.catch_warnings(action="ignore"):
        got = dict(bf16_tensors(source, **options))
    expected = dict(stored(out))
    assert [*got] == [*expected]
    assert_same_tensors(got, expected)


def check_again(source: Path, out: Path, **options) -> None:
    """Verify an output; see that a second run takes it for complete and a missing shard is made."""
    main(source, out, **options, verify=True)
    before = contents(out), stamps(out)
    main(source, out, **options)
    assert stamps(out) == before[1]
    next(out.glob("*.safetensors")).unlink()
    main(source, out, **options)
    assert contents(out) == before[0]


def watch(patch, name: str, act: Callable, after: bool = False) -> None:
    """Let `act` have the operands of each call to a function of os, before it or after."""
    real = getattr(os, name)

    def call(*given, **more):
        if not after:
            act(*given)
        result = real(*given, **more)
        if after:
            act(*given)
        return result

    patch.setattr(os, name, call)


def file_of(number: int) -> Path:
    """Return the path of an open file."""
    return Path(os.readlink(f"/proc/self/fd/{number}"))


def is_kept(source: Path, out: Path, capsys) -> bool:
    """Return whether an output is taken for complete; if it is refused, see that it is by name."""
    before = snapshot(out)
    capsys.readouterr()
    status, printed = cli(arguments(source, out=out)), capsys.readouterr()
    assert snapshot(out) == before
    assert printed.out.endswith(NOTHING) if status == 0 else NOT_PLANNED in printed.err
    return status == 0


def fails(capsys, source: Path, *more: str, out: Path | None = None) -> str:
    """See that a command exits with 1; return the last line on stderr, the error."""
    assert cli(arguments(source, *more, out=out)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def assert_folder_refused(source: Path, *complaints: str, **options) -> str:
    """See that a checkpoint is refused before anything is written; return the message."""
    out = source.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        main(source, out, **options)
    for complaint in complaints:
        assert complaint in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def assert_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], *complaints: str,
                   config: dict | None = None, name: str = SHARD, **options) -> str:
    """See that a checkpoint of one shard is refused; return the message."""
    source = write_checkpoint(tmp_path / "in", {name: tensors}, config, index=False)
    return assert_folder_refused(source, *complaints, **options)


def python(*command, **options) -> subprocess.CompletedProcess:
    """Run Python with these arguments, which must succeed, beside the script if not elsewhere."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, **options}
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 0, done.stderr
    return done


def peak_memory(source: Path, *options: str) -> tuple[int, int]:
    """Convert in a process of its own; return its peak memory in bytes, before and after."""
    code = (f"import sys, fp8_cast_bf16; {PEAK}before = peak(); "
            "assert fp8_cast_bf16.cli(sys.argv[1:]) == 0; print(before, peak())")
    done = python("-c", code, *arguments(source, "--device", "cpu", *options))
    return tuple(int(kilobytes) * 1024 for kilobytes in done.stdout.split()[-2:])
