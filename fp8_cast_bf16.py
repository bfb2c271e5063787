# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "safetensors>=0.6", "tqdm", "triton>=3.3; sys_platform == 'linux'"]
# ///
"""Convert an FP8 Hugging Face checkpoint into a BF16 one that loads as it is.

    python fp8_cast_bf16.py --input-fp8-hf-path IN --output-bf16-hf-path OUT

An output shard is a file that can be computed at any byte range from the input:

    headers -> plan -> render(shard, start, stop) -> windows on disk -> publish

Planning reads headers only, so whatever is wrong with a checkpoint is said before the first byte is
written. Workers then render windows, aligned byte ranges of a shard, in any order. A window depends
on no other, so the same bytes come out of one worker or many, a GPU or none, and memory is bounded
by the windows in flight, however large a tensor is.
"""

import argparse
import ctypes
import errno
import fnmatch
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

with warnings.catch_warnings():  # torch regrets the absence of numpy, which nothing here needs
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import kernel
from kernel import CODECS, FLOATS, Grid

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME, PARAMS_NAME = "config.json", "params.json"  # the second is Mistral's own
# What says in a config, at any depth, or in a shard's metadata that the weights are quantized.
QUANTIZATION_KEYS = ["quantization_config", "compression_config", "_quantization_metadata"]
QUANTIZATION_KEYS += ["expert_dtype", "moe_quant_algo"]
DTYPE_KEYS = ["torch_dtype", "dtype"]
# Files beside the shards: what only a quantized checkpoint needs, weights in other formats or of
# another set, and what tools keep for themselves is not copied; everything else is.
QUANTIZATION_FILES = ["hf_quant_config.json", "quantization_config.json"]
EDITED_FILES = [INDEX_NAME, CONFIG_NAME, PARAMS_NAME]
INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32"}  # in which other formats pack weights
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.pth", "*.gguf"]
WEIGHT_FILES += ["*.h5", "*.msgpack"]
TOOL_FOLDERS = [".git", ".cache"]
# The order in which safetensors' own writer lays out tensors: larger elements first, so that every
# tensor is aligned to its element size. Within a dtype they stand by name.
DTYPE_NAMES = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 "
    "I8 U8 F6_E3M2 F6_E2M3 F4 BOOL"
)
DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_NAMES.split())}

# What the scale of a weight is called: the weight's name without what its kind ends in, and one of
# these endings. The first kind counts that has one. Shards of a table share their parent's.
SCALE_NAMES = {
    r"(.*\.|)weight": "weight_scale_inv weight_scale scale qscale_weight scale_weight weight.scale",
    r"(.*\.|)weight_packed": "weight_scale",
    r"(.*\.|)_weight_qdata": "_weight_scale",
    r"(.*\.|)shard_\d+\.weight": "weight_scale",
    r"(.*)": "_scale_inv _scales_inv _weight_scale _scale .scale",
}
SCALE_NAMES = {re.compile(kind, re.DOTALL): ends.split() for kind, ends in SCALE_NAMES.items()}
# The patterns below are of leaves, the last parts of names, but for the refused: of dtype and leaf.
ORPHAN_ENDINGS = "_scale_inv", "_scales_inv"  # dropped even without a weight: no loader knows them
RENAMED = re.compile("weight_packed|_weight_qdata")  # to weight
SCALE_LEAF = re.compile(".*(_scale_inv|_scales_inv|_scale|qscale_weight|scale_weight)|scale")
# Of two scales that could both be meant, the one that the loader for a quant_method reads.
SCALE_OF_METHOD = {
    **dict.fromkeys(["fp8", "mxfp8"], "_scale_inv"),
    **dict.fromkeys(["compressed-tensors", "modelopt", "fbgemm_fp8", "quark"], "weight_scale"),
}
# What is of no use once the weight beside it is BF16.
SIDE_TENSOR = re.compile(
    r"(.*_)?(input_scale|activation_scale|qscale_act|scale_input|input_scale_ub|global_scale|"
    r"output_scale|weight_shape|comfy_quant|(?P<zero_point>zero_point|zp)|(?P<order>g_idx))"
)
# Scales of the key-value cache and of activations that layers share, and ComfyUI's mark.
CACHE_SCALE = re.compile("[kvq]_scale|kv_scale|prob_scale|scaled_fp8|qscale_act")
COMFY_FORMATS = {"float8_e4m3fn": "E4M3", "float8_e5m2": "E5M2"}
# Tensors that no scale alone turns into weights.
REFUSED = {
    r"\w+ (?:.*_)?pre_quant_scale": "an AWQ factor that belongs to the activations",
    r"\w+ (?:.*_)?svdquant_lora_.*": "the low-rank part of an SVDQuant weight",
    r"\w+ (?:.*_)?input_rotation": "a rotation that the loader applies at run time",
    r"\w+ (?:qweight|qzeros)": "part of a GPTQ or AWQ weight",
    r"I32 .*weight_packed": "a weight of packed integers (INT4)",
    r"(?:[IU](?:16|32|64)|U8) _weight_qdata": "a torchao weight of packed integers (INT4)",
    r"U32 weight": "an MLX weight of packed integers",
    r"\w+ (?:absmax|SCB|bitsandbytes__.*)": "part of a bitsandbytes weight",
    r"\w+ (?:trellis|suh|svh)": "part of an EXL3 weight",
    r"\w+ (?:W_q|quantized_weight_values)": "part of an HQQ or fouroversix weight",
    r"\w+ bitmask": "part of a sparse weight (2:4)",
    r"U8 .*_blocks": "a transposed MXFP4 weight, as in gpt-oss",
    r"F6_\w+ .*": "a 6-bit float",
    r"F8_\w+FNUZ .*": "an FNUZ float, whose bits mean other values",
}
# Refused only beside a tensor that is named with the second word in place of the first.
REFUSED_WITH = {"bitmask": "compressed", "_blocks": "_scales"}
REFUSED_NAME = re.compile("|".join(f"({pattern})" for pattern in REFUSED))

MISSING_SCALE = ["keep", "cast", "error"]
PAGE = 4096  # the alignment that direct I/O asks of offsets, lengths and memory
WINDOW = 16 << 20
TEMPORARY_SUFFIX = ".tmp"
OPEN_FILES = 8  # that a worker holds open: its shard and those in which scales stand
PHASES = ["reading", "decoding", "writing"]


class CheckpointError(Exception):
    """Something about the checkpoint that its user can mend: names the file and the tensor."""


@contextmanager
def naming(path: Path):
    """Put the file's name into an OSError: reads and writes raise them without."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# --- checkpoint: where every tensor's bytes are ---


class Tensor(NamedTuple):
    """A tensor on disk: dtype as safetensors spells it, bytes [start, stop) of the file at path.

    leaf is the name's last part, module what stands before its last dot.
    """

    name: str
    module: str
    leaf: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """Shard names with their metadata, all tensors by name, and the JSON files if present."""

    root: Path
    shards: dict[str, dict[str, str]]
    tensors: dict[str, Tensor]
    index: dict | None
    config: dict | None
    params: dict | None


def read_json(path: Path) -> dict | None:
    """Return the JSON object in a file, None where there is no such file."""
    if not os.path.lexists(path):
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download it again")
    return value


def read_header(path: Path) -> tuple[dict[str, str], list[Tensor]]:
    """Return a shard's metadata and its tensors. safetensors' own parser judges the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the download is incomplete")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    except RuntimeError as error:
        # With the header accepted, torch maps the data, which a machine with less memory than the
        # file may refuse. Nothing here needs that map.
        if "mmap" not in str(error):
            raise
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", None) or {}
    tensors = []
    for name, entry in header.items():
        module, _, leaf = name.rpartition(".")
        start, stop = entry["data_offsets"]
        span = 8 + size + start, 8 + size + stop
        tensors.append(Tensor(name, module, leaf, entry["dtype"], tuple(entry["shape"]), path, *span))
    return metadata, tensors


def find_shards(root: Path, index: dict | None) -> list[str]:
    """Return the file names that make up the checkpoint, sorted."""
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{root / INDEX_NAME}: has no weight_map; download it again")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
                where = f"{root / INDEX_NAME}: puts {name} into {shard!r}"
                raise CheckpointError(f"{where}; expected a *.safetensors file beside it")
        return sorted(set(weight_map.values()))
    shards = sorted(path.name for path in root.glob("*.safetensors"))
    # Mistral's repositories hold the same weights a second time, under names of their own.
    shards = [name for name in shards if not name.startswith("consolidated")] or shards
    if not shards:
        raise CheckpointError(f"{root}: holds no *.safetensors; give the checkpoint's folder")
    return shards


def load_checkpoint(root: Path) -> Checkpoint:
    """Read index, config and all headers of a checkpoint, and hold them against each other.

    The headers are the truth. The index decides which shards count and, where two of them hold a
    tensor of the same name, which one does. Raises CheckpointError.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give the checkpoint's folder")
    index = read_json(root / INDEX_NAME)
    shards, found = {}, {}
    for shard in find_shards(root, index):
        shards[shard], members = read_header(root / shard)
        for tensor in members:
            found.setdefault(tensor.name, []).append(tensor)
    weight_map = index["weight_map"] if index else {}
    for name, holders in found.items():
        if len(holders) > 1:
            holders[:] = [t for t in holders if t.path.name == weight_map.get(name)] or holders
        if len(holders) > 1:
            raise CheckpointError(f"{holders[1].path}: {name} stands in {holders[0].path.name} too "
                                  "and no index says which counts; remove the file that is not "
                                  "part of the checkpoint")
    tensors = {name: holders[0] for name, holders in found.items()}
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{root / shard}: {name} is not there; {INDEX_NAME} names it")
    configs = read_json(root / CONFIG_NAME), read_json(root / PARAMS_NAME)
    return Checkpoint(root, shards, tensors, index, *configs)


# --- plan: what every byte of the output will be ---


class Quantization(NamedTuple):
    """How a weight's codes become values: a key of kernel.FORMATS, the scales, and their grid.

    shape is the weight's in elements. scale is None for a weight that is cast as if its scale were
    1. second holds scales of the scales: a factor, or a divisor where its name ends in
    global_scale.
    """

    codes: str
    shape: tuple[int, ...]
    scale: Tensor | None
    grid: Grid
    second: Tensor | None = None


class Step(NamedTuple):
    """One tensor of an output shard: its name, and bytes [start, stop) of that file.

    They are source's bytes, or its values as BF16 where there is a quantization.
    """

    name: str
    start: int
    stop: int
    source: Tensor
    quantization: Quantization | None


@dataclass(frozen=True)
class Shard:
    """An output shard: its name, the bytes before the first tensor, its tensors in file order."""

    name: str
    header: bytes
    steps: list[Step]

    @property
    def size(self) -> int:
        return self.steps[-1].stop


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do.

    dropped: tensors that do not reach the output; orphans: those of them that are scales of no
    weight. missing: FP8 weights that have no scale.
    """

    checkpoint: Checkpoint
    shards: list[Shard]
    dropped: list[Tensor]
    orphans: list[Tensor]
    missing: list[Tensor]

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class Hints:
    """What a checkpoint says of its quantization beside dtypes and shapes; they only break ties.

    methods: every quant_method; block_sizes: rows and columns; codes: keys of kernel.FORMATS that
    ComfyUI notes, by module.
    """

    methods: set[str]
    block_sizes: tuple[tuple[int, int], ...]
    codes: dict[str, str]


def make_plan(checkpoint: Checkpoint, missing_scale: str = "keep") -> Plan:
    """Decide what becomes of every tensor.

    missing_scale: what to do with an FP8 weight without a scale: "keep" it as it is, "cast" it with
    scale 1, or raise an "error". Raises CheckpointError where the rules do not decide. Of the data
    nothing is read but zero points, orders of groups and ComfyUI's notes.
    """
    refuse(checkpoint)
    tensors, hints = checkpoint.tensors, read_hints(checkpoint)
    quantizations, consumed = pair(tensors, hints)
    integers = [t for t in tensors.values() if t.dtype in INTEGERS and t.shape[1:]]
    if hints.methods and integers and not quantizations:
        raise CheckpointError(f"{checkpoint.root / CONFIG_NAME}: names the quant_method "
                              f"{', '.join(sorted(hints.methods))}, but no weight is in a format "
                              f"known here, as {integers[0].name} ({integers[0].dtype}); "
                              "dequantize it with the tool that made it")
    missing = settle_missing(quantizations, tensors, missing_scale)
    settled = {*quantizations, *(tensor.name for tensor in missing)}
    modules = {tensors[name].module for name in quantizations}
    dropped, orphans, kept = [], [], {name: [] for name in checkpoint.shards}
    for tensor in tensors.values():
        if tensor.name in consumed or is_side_tensor(tensor, modules):
            dropped.append(tensor)
        elif tensor.name.endswith(ORPHAN_ENDINGS) or tensor.dtype == "F8_E8M0":
            weight = tensors.get(re.sub("_scales?_inv$", "", tensor.name), tensor)
            if weight is not tensor and weight.dtype not in FLOATS:
                what = f"{weight.path}: {weight.name} is {weight.dtype} and has a scale"
                raise CheckpointError(f"{what}, {tensor.name}: no known format stores them so")
            orphans.append(tensor)
        else:
            kept[tensor.path.name].append(tensor)
            if (tensor.dtype, None) in CODECS and tensor.name not in settled:
                raise CheckpointError(f"{tensor.path}: {tensor.name} is {tensor.dtype}, but named "
                                      "like what serves a quantized weight, and there is none")
    if not any(kept.values()):
        raise CheckpointError(f"{checkpoint.root}: holds no tensors; give the checkpoint's folder")
    shards = [plan_shard(name, checkpoint.shards[name], members, quantizations)
              for name, members in kept.items() if members]
    return Plan(checkpoint, shards, dropped + orphans, orphans, missing)


def settle_missing(quantizations: dict[str, Quantization], tensors: dict[str, Tensor],
                   missing_scale: str) -> list[Tensor]:
    """Return the FP8 weights without a scale, and strike out those that are kept as they are."""
    missing = [tensors[name] for name, entry in quantizations.items() if entry.scale is None]
    scales = [t.name for t in tensors.values() if "scale" in t.leaf] if missing else []
    for weight in missing:
        if missing_scale == "keep":
            del quantizations[weight.name]
        elif missing_scale == "error":
            raise CheckpointError(f"{weight.path}: {weight.name} has no scale, one of "
                                  f"{len(missing)} weights; --missing-scale keep leaves them FP8, "
                                  "cast takes their scale as 1")
        else:
            name = weight.name
            own = name + "_", name + ".", name.removesuffix("weight") + "scales"
            if beside := [scale for scale in scales if scale.startswith(own)]:
                raise CheckpointError(f"{weight.path}: {weight.name} cannot be cast, for "
                                      f"{beside[0]} seems to be its scale, of no known format")
    return missing


def refuse(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for what would come out wrong however its scales were applied."""
    found = [(checkpoint.root / name, "one of the slices that tensor-parallel ranks load")
             for name in checkpoint.shards if re.fullmatch(r"model\d+-mp\d+\.safetensors", name)]
    for tensor in checkpoint.tensors.values():
        match = matches(REFUSED_NAME, f"{tensor.dtype} {tensor.leaf}")
        if match and all(tensor.name.removesuffix(ending) + other in checkpoint.tensors
                         for ending, other in REFUSED_WITH.items() if tensor.leaf.endswith(ending)):
            what = list(REFUSED.values())[match.lastindex - 1]
            found.append((tensor.path, f"{tensor.name} ({tensor.dtype}) is {what}"))
    for key, value in quantization_entries(checkpoint.config):
        if key == "location" and not str(value).startswith("weight_"):
            what = "transform_config changes activations at run time"
        elif key == "sparsity_structure" and value not in (None, "dense", "unstructured", "0:0"):
            what = "sparsity_config has weights stored without their zeros"
        else:
            continue
        found.append((checkpoint.root / CONFIG_NAME, what))
    for path, problem in found:
        raise CheckpointError(f"{path}: {problem}; dequantize this checkpoint with the tool that "
                              "made it")


def walk(value) -> Iterator[tuple[str, object]]:
    """Yield every key of a JSON value with what stands there, at any depth."""
    queue = [value]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            yield from value.items()
            queue += value.values()
        elif isinstance(value, list):
            queue += value


def quantization_entries(config: dict | None) -> Iterator[tuple[str, object]]:
    """Yield every key and value of what a config says of quantization, at any depth."""
    return walk([value for key, value in walk(config) if key in QUANTIZATION_KEYS])


def read_hints(checkpoint: Checkpoint) -> Hints:
    methods, sizes = set(), []
    for key, value in quantization_entries(checkpoint.config):
        match key, value:
            case "quant_method", str():
                methods.add(value)
            case "weight_block_size" | "block_structure", [int(rows), int(cols)]:
                sizes.append((rows, cols))
            case "block_structure", str() if m := re.fullmatch(r"(\d{1,9})x(\d{1,9})", value):
                sizes.append((int(m[1]), int(m[2])))
            case "group_size", int():
                sizes.append((1, value))
    sizes = tuple(size for size in sizes if min(size) > 0 and max(size) < 1 << 31)
    return Hints(methods, sizes, comfy_codes(checkpoint))


def comfy_codes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the number formats that ComfyUI notes, by module: a key of kernel.FORMATS each.

    A note is JSON, in a tensor of bytes beside the weight or in the metadata of a shard. Raises
    CheckpointError for formats whose scales are stored in tiles or that need more than a scale.
    """
    notes, codes = {}, {}
    try:
        for shard, metadata in checkpoint.shards.items():
            where = checkpoint.root / shard
            notes |= json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for tensor in checkpoint.tensors.values():
            if tensor.name.endswith(".comfy_quant"):
                where = tensor.path
                notes[tensor.module] = json.loads(read_small(tensor))
        for module, note in notes.items():
            codes[module] = COMFY_FORMATS.get(str(note["format"]))
            if codes[module] is None or note.get("convrot"):
                raise CheckpointError(f"{checkpoint.root}: {module} is in ComfyUI's format "
                                      f"{note['format']}; only {' and '.join(COMFY_FORMATS)} can "
                                      "be undone with a scale")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: what ComfyUI notes there is not valid") from error
    return codes


def read_small(tensor: Tensor) -> bytes:
    with naming(tensor.path), open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.stop - tensor.start)


def pair(tensors: dict[str, Tensor], hints: Hints) -> tuple[dict[str, Quantization], set[str]]:
    """Return the quantization of every quantized weight, and the names of all their scales."""
    quantizations, consumed, outputs = {}, set(), set(tensors)
    candidates = [t for t in tensors.values() if t.dtype in kernel.WEIGHT_DTYPES]
    leaves = {tensor.leaf for tensor in tensors.values()}
    kinds = {kind: [end for end in ends if any(leaf.endswith(end.split(".")[-1]) for leaf in leaves)]
             for kind, ends in SCALE_NAMES.items()}
    # What is named like a scale comes last: it is a weight only if no weight has used it.
    for weight in sorted(candidates, key=lambda t: bool(matches(SCALE_LEAF, t.leaf))):
        leaf = weight.leaf
        if (weight.name in consumed or leaf.endswith(ORPHAN_ENDINGS)
                or matches(SIDE_TENSOR, leaf) or matches(CACHE_SCALE, leaf)):
            continue
        scale, *others = find_scales(weight, tensors, hints, kinds) or [None]
        name = output_name(weight)
        if scale is None and (weight.dtype, None) not in CODECS:
            if name != weight.name or (weight.dtype == "U8" and weight.module in hints.codes):
                raise CheckpointError(f"{weight.path}: {weight.name} ({weight.dtype}) has no scale")
            continue
        second = find_second(weight, scale, tensors)
        quantizations[weight.name] = quantize(weight, scale, second, hints)
        consumed |= {used.name for used in (scale, second, *others) if used}
        if name != weight.name and name in outputs:
            raise CheckpointError(f"{weight.path}: {weight.name} becomes {name}, which exists too")
        outputs.add(name)
    return quantizations, consumed


@functools.cache  # of 100,000 tensors nearly all are called one of a few leaves
def matches(pattern: re.Pattern, leaf: str) -> re.Match | None:
    return pattern.fullmatch(leaf)


def output_name(weight: Tensor) -> str:
    leaf = weight.leaf
    return weight.name.removesuffix(leaf) + "weight" if matches(RENAMED, leaf) else weight.name


def find_scales(weight: Tensor, tensors: dict[str, Tensor], hints: Hints,
                kinds: dict[re.Pattern, list[str]]) -> list[Tensor]:
    """Return the scale of a weight, then other scales of it that another loader would take.

    kinds: of SCALE_NAMES the endings that the checkpoint has at all.
    """
    for pattern, endings in kinds.items():
        match = pattern.fullmatch(weight.name)
        names = [match[1] + ending for ending in endings] if match else []
        found = [tensors[name] for name in names if name in tensors]
        if len(found) > 1:
            read = tuple(SCALE_OF_METHOD[m] for m in hints.methods if m in SCALE_OF_METHOD)
            meant = [scale for scale in found if scale.name.endswith(read)]
            if len(meant) != 1:
                raise CheckpointError(f"{weight.path}: {weight.name} has two scales, "
                                      f"{' and '.join(scale.name for scale in found)}, and "
                                      f"{CONFIG_NAME} names no quant_method that decides; remove "
                                      "the one that is not meant")
            # a bare `scale` may be a parameter after all
            others = [scale for scale in found if scale not in meant]
            return meant + [scale for scale in others if "weight" in scale.leaf]
        if found:
            return found
    return []


def find_second(weight: Tensor, scale: Tensor | None, tensors: dict[str, Tensor]) -> Tensor | None:
    """Return the scale of an NVFP4 weight's scales: ModelOpt's factor or the other's divisor."""
    if scale is None:
        return None
    names, wanted = {scale.name + "_2", weight.name + "_scale_2"}, scale.dtype == "F8_E4M3"
    if wanted:
        names.add(re.sub("scale(_inv)?$", "global_scale", scale.name))
    found = [tensors[name] for name in names if name in tensors]
    if not wanted and not found:
        return None
    if not wanted or len(found) != 1 or found[0].dtype not in FLOATS:
        raise CheckpointError(f"{scale.path}: {weight.name} is {weight.dtype}, its scale "
                              f"{scale.name} {scale.dtype}, with {len(found)} second scales; "
                              "expected one of float for NVFP4, none for others")
    return found[0]


def quantize(weight: Tensor, scale: Tensor | None, second: Tensor | None,
             hints: Hints) -> Quantization:
    """Decide codec and grid of a weight. Raises CheckpointError where dtypes or shapes fit none."""
    codec = CODECS.get((weight.dtype, scale.dtype if scale else None))
    if codec is None:
        raise CheckpointError(f"{scale.path}: {scale.name} is {scale.dtype}, its weight "
                              f"{weight.name} is {weight.dtype}: no known format stores them so")
    codes, group = codec
    shape = weight.shape
    if codes == "E2M1" and weight.dtype != "F4":
        shape = (*shape[:-1], 2 * math.prod(shape[-1:]))
    elif weight.dtype == "U8":
        codes = hints.codes.get(weight.module, codes)
    # Llama 4's experts are stored transposed, but for the scales of one kind
    transposed = "fbgemm_fp8" in hints.methods and weight.name.endswith("down_proj")
    fused, scale_shape = "qkv_proj" in weight.name, scale.shape if scale else ()
    if group is None:
        grids = kernel.find_grids(shape, scale_shape, hints.block_sizes, transposed, fused)
    elif scale_shape == (*shape[:-1], -(-shape[-1] // group)):
        grids = kernel.find_grids(shape, scale_shape, ((1, group),))
    else:
        grids = []
    experts = grids[0].rows // grids[0].part if grids else 0
    if (
        len(grids) != 1
        or (second and math.prod(second.shape) not in (1, experts))
        or (codes == "E2M1" and shape[-1] % 2)
    ):
        named = f"its scale {scale.name} is {list(scale.shape)}" if scale else "it has no scale"
        raise CheckpointError(f"{weight.path}: {weight.name} is {list(shape)} ({codes}), {named}: "
                              f"{'two grids fit' if len(grids) > 1 else 'no block size fits'}; "
                              "expected one scale per tensor, expert, row, column or block")
    return Quantization(codes, shape, scale, grids[0], second)


def is_side_tensor(tensor: Tensor, modules: set[str]) -> bool:
    """Return whether a tensor only serves quantization in a module whose weight becomes BF16."""
    match = matches(SIDE_TENSOR, tensor.leaf) if tensor.module in modules else None
    if match and match["zero_point"] and any(read_small(tensor)):
        raise CheckpointError(f"{tensor.path}: {tensor.name} is not all zero; asymmetric formats "
                              "are not supported")
    if match and match["order"]:
        kind = {"I32": "i", "I64": "q"}.get(tensor.dtype)
        groups = [*memoryview(read_small(tensor)).cast(kind)] if kind else [1, 0]
        if groups != sorted(groups):
            raise CheckpointError(f"{tensor.path}: {tensor.name} reorders the groups of columns; "
                                  "that is not supported")
    return bool(match or matches(CACHE_SCALE, tensor.leaf))


def plan_shard(name: str, metadata: dict[str, str], tensors: list[Tensor],
               quantizations: dict[str, Quantization]) -> Shard:
    """Lay out an output shard as safetensors.torch.save_file would, byte for byte."""
    outputs = []
    for tensor in tensors:
        output = tensor.dtype, tensor.name, tensor.shape, tensor.stop - tensor.start, tensor, None
        if quantization := quantizations.get(tensor.name):
            shape = quantization.shape
            size = 2 * math.prod(shape)
            output = "BF16", output_name(tensor), shape, size, tensor, quantization
        outputs.append(output)
    outputs.sort(key=lambda output: (DTYPE_ORDER[output[0]], output[1]))
    metadata = {key: text for key, text in metadata.items() if key not in QUANTIZATION_KEYS}
    header = {"__metadata__": dict(sorted({**metadata, "format": "pt"}.items()))}
    offsets = list(itertools.accumulate((output[3] for output in outputs), initial=0))
    for (dtype, tensor_name, shape, *_), span in zip(outputs, pairwise(offsets), strict=True):
        header[tensor_name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    steps = [Step(output[1], len(text) + start, len(text) + stop, *output[4:])
             for output, (start, stop) in zip(outputs, pairwise(offsets), strict=True)]
    return Shard(name, text, steps)


# --- render: the bytes [start, stop) of one planned shard ---


def page_aligned(size: int, pinned: bool) -> torch.Tensor:
    """Return a uint8 tensor that starts on a page, in pinned memory if a GPU is to copy from it."""
    # Pinned memory comes in pages, and a size over a power of two would be rounded up to the next.
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    if start := -buffer.data_ptr() % PAGE:
        buffer = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=pinned)
        start = -buffer.data_ptr() % PAGE
    return buffer[start : start + size]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, which the caller keeps alive."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


class Worker:
    """What one thread needs to render windows: buffers, open files, a GPU stream, and counts."""

    def __init__(self, device: torch.device, window: int):
        pinned = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if pinned else None
        self.codes = page_aligned(window // 2, pinned)
        self.out = page_aligned(window, pinned)
        self.files = {}
        self.nans = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def read(self, path: Path, start: int, into: torch.Tensor) -> None:
        """Fill a CPU tensor with the bytes of a file from `start` on."""
        began, view = time.perf_counter(), as_bytes(into)
        with naming(path):
            if path not in self.files:
                if len(self.files) == OPEN_FILES:
                    self.close()
                self.files[path] = open(path, "rb", buffering=0)
            file = self.files[path]
            file.seek(start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{path}: ends at byte {file.tell()}; it was cut")
                view = view[count:]
        self.seconds["reading"] += time.perf_counter() - began

    def read_scale(self, scale: Tensor, first: int, count: int) -> torch.Tensor:
        """Return `count` scales from the one numbered `first` on, float32, on the device."""
        size = (scale.stop - scale.start) // math.prod(scale.shape)
        raw = torch.empty(count * size, dtype=torch.uint8)
        self.read(scale.path, scale.start + first * size, raw)
        return kernel.widen_scales(raw.to(self.device), scale.dtype)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


def render(shard: Shard, start: int, stop: int, worker: Worker) -> torch.Tensor:
    """Return the bytes [start, stop) of a shard, uint8, in the worker's buffer."""
    out = worker.out[: stop - start]
    head = shard.header[start:stop]
    as_bytes(out)[: len(head)] = head
    first = bisect_right(shard.steps, start, key=lambda step: step.stop)
    for step in itertools.islice(shard.steps, first, None):
        if step.start >= stop:
            break
        begin, end = max(step.start, start), min(step.stop, stop)
        into = out[begin - start : end - start]
        if step.quantization is None:
            worker.read(step.source.path, step.source.start + begin - step.start, into)
        elif begin < end:
            render_weight(step, (begin - step.start) // 2, (end - step.start) // 2, into, worker)
    return out


def render_weight(step: Step, start: int, stop: int, out: torch.Tensor, worker: Worker) -> None:
    """Fill `out`, uint8, with the elements [start, stop) of a weight as BF16."""
    quantization = step.quantization
    per_byte = kernel.FORMATS[quantization.codes].codes_per_byte
    first_byte, last_byte = start // per_byte, -(-stop // per_byte)
    codes = worker.codes[: last_byte - first_byte]
    worker.read(step.source.path, step.source.start + first_byte, codes)
    out = out.view(torch.bfloat16)
    with torch.cuda.stream(worker.stream):
        scales = read_scales(quantization, start, stop, worker)
        began = time.perf_counter()
        codes = codes.to(worker.device, non_blocking=True)
        values = out if worker.stream is None else torch.empty_like(out, device=worker.device)
        codec = quantization.codes, quantization.grid, start
        nans = kernel.dequantize(codes, scales, values, *codec)
        if values is not out:
            out.copy_(values, non_blocking=True)
        worker.nans += nans.item()  # waits for the stream, so the buffers are free again
    worker.seconds["decoding"] += time.perf_counter() - began


def read_scales(quantization: Quantization, start: int, stop: int, worker: Worker) -> torch.Tensor:
    """Return the scales of the elements [start, stop) of a weight, a float32 matrix on the device.

    Scales of scales are applied here, in float32, before the codes meet either: the order in which
    ModelOpt and compressed-tensors dequantize.
    """
    if quantization.scale is None:
        return torch.ones(1, 1, device=worker.device)
    grid, second = quantization.grid, quantization.second
    row, row_end, col, col_end = grid.scale_region(start, stop)
    count = (row_end - row) * (col_end - col)
    scales = worker.read_scale(quantization.scale, row * grid.scale_shape[1] + col, count)
    scales = scales.view(row_end - row, col_end - col)
    if second is None:
        return scales
    factors = worker.read_scale(second, 0, math.prod(second.shape))
    if len(factors) > 1:
        rows = torch.arange(row, row_end, device=worker.device)
        factors = factors[rows // grid.scale_rows_per_part]
    factors = factors.view(-1, 1)
    return scales / factors if second.name.endswith("global_scale") else scales * factors


# --- write: windows under a temporary name, then the final one ---


def direct_flag(root: Path) -> int:
    """Return O_DIRECT where this folder's file system takes it, else 0.

    Direct writes skip the page cache, which a file larger than memory only slows down. Where they
    are refused (tmpfs, some network file systems, other than Linux), plain writes do the same.
    """
    flag = getattr(os, "O_DIRECT", 0)
    number, probe = tempfile.mkstemp(dir=root, suffix=TEMPORARY_SUFFIX)
    os.close(number)
    try:
        with naming(root), open_output(Path(probe), flag) as file:
            file.write(as_bytes(page_aligned(PAGE, False)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        flag = 0
    finally:
        os.unlink(probe)
    return flag


def temporary(path: Path) -> Path:
    """Return the name under which a file is written until it is whole."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def open_output(path: Path, flags: int = 0):
    return open(path, "r+b", 0, opener=lambda name, mode: os.open(name, mode | flags, 0o666))


class Output:
    """The shards being written. Windows come in any order; a shard gets its name with the last."""

    def __init__(self, plan: Plan, root: Path, window: int):
        self.root = root
        self.direct = direct_flag(root)
        self.lock = threading.Lock()
        self.stopped = False
        self.unwritten = {}  # windows left of each shard that has been begun
        self.windows = self._windows(plan, window)

    def _windows(self, plan: Plan, window: int) -> Iterator[tuple[Shard, int, int]]:
        for shard in plan.shards:
            starts = range(0, shard.size, window)
            self.unwritten[shard.name] = len(starts)
            path = temporary(self.root / shard.name)
            with naming(path), open(path, "wb") as file:
                file.truncate(shard.size)
            for start in starts:
                yield shard, start, min(start + window, shard.size)

    def take(self) -> tuple[Shard, int, int] | None:
        """Return the next window that nobody has taken, None when there is none."""
        with self.lock:
            return None if self.stopped else next(self.windows, None)

    def write(self, shard: Shard, start: int, stop: int, buffer: torch.Tensor) -> None:
        """Write a window, the start of `buffer`. What fills its last page is cut off at the end."""
        view = as_bytes(buffer)[: -(-(stop - start) // PAGE) * PAGE]
        path = temporary(self.root / shard.name)
        with naming(path), open_output(path, self.direct) as file:
            file.seek(start)
            while view:
                view = view[file.write(view) :]
        with self.lock:
            self.unwritten[shard.name] -= 1
            whole = not self.unwritten[shard.name]
        if whole:
            with naming(path), open_output(path) as file:
                file.truncate(shard.size)
                os.fsync(file.fileno())
            os.replace(path, self.root / shard.name)
            del self.unwritten[shard.name]

    def discard(self) -> None:
        """Remove the shards that are not whole."""
        for name in self.unwritten:
            temporary(self.root / name).unlink(missing_ok=True)


def write_shards(plan: Plan, root: Path, device: torch.device, workers: int,
                 window: int) -> list[Worker]:
    """Write every shard of a plan into the folder `root`; return the workers for their counts."""
    output = Output(plan, root, window)
    bar = tqdm(total=plan.size, unit="B", unit_scale=True, disable=None)
    pool = [Worker(device, window) for _ in range(workers)]

    def work(worker: Worker) -> None:
        torch.set_num_threads(1)  # the workers are the threads
        torch.set_flush_denormal(False)
        while taken := output.take():
            shard, start, stop = taken
            render(shard, start, stop, worker)
            began = time.perf_counter()
            output.write(shard, start, stop, worker.out)
            worker.seconds["writing"] += time.perf_counter() - began
            with output.lock:
                bar.set_description(shard.name, refresh=False)
                bar.update(stop - start)

    threads, executor = torch.get_num_threads(), ThreadPoolExecutor(workers)
    try:
        for done in as_completed([executor.submit(work, worker) for worker in pool]):
            done.result()
    finally:
        output.stopped = True
        executor.shutdown()
        output.discard()
        bar.close()
        torch.set_num_threads(threads)
        for worker in pool:
            worker.close()
    return pool


# --- publish: the files beside the shards; config and index last, which say that all is there ---


def side_files(root: Path) -> tuple[list[str], list[str]]:
    """Return the files beside the shards, relative to root: those to copy and those to leave out.

    Left out are weight files and whatever is no plain file inside the checkpoint. A Hugging Face
    cache keeps the files of a snapshot as links into its own `blobs`, which count as inside.
    """
    inside = [root.resolve()]
    inside += [p.parent / "blobs" for p in root.resolve().parents if p.name == "snapshots"]
    copied, left_out = [], []
    for folder, folders, names in os.walk(root, onerror=raise_error):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = sorted(name for name in folders if name not in TOOL_FOLDERS)
        for name in sorted(names + linked):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if relative in EDITED_FILES + QUANTIZATION_FILES:
                continue
            plain = path.is_file() and any(path.resolve().is_relative_to(place) for place in inside)
            if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES) or not plain:
                left_out.append(relative)
            elif not os.access(path, os.R_OK):
                raise CheckpointError(f"{path}: may not be read; it would be missing in the output")
            else:
                copied.append(relative)
    return copied, left_out


def raise_error(error: OSError) -> None:
    raise error


def bf16_config(value):
    """Return a config, or a part of one, that describes plain BF16 weights."""
    if isinstance(value, list):
        return [bf16_config(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: "bfloat16" if key in DTYPE_KEYS and isinstance(item, str) else bf16_config(item)
        for key, item in value.items()
        if key not in QUANTIZATION_KEYS
    }


def bf16_texts(plan: Plan) -> dict[str, str]:
    """Return the JSON files of the output by name, the index last, where the input has them."""
    values = {}
    params, config, index = plan.checkpoint.params, plan.checkpoint.config, plan.checkpoint.index
    if params is not None:
        unwanted = ["quantization", *QUANTIZATION_KEYS]
        values[PARAMS_NAME] = {key: v for key, v in params.items() if key not in unwanted}
    try:
        if config is not None:
            values[CONFIG_NAME] = bf16_config(config)
            if not any(config.get(key) for key in DTYPE_KEYS):
                values[CONFIG_NAME]["torch_dtype"] = "bfloat16"
        if index is not None:
            steps = [(step, shard.name) for shard in plan.shards for step in shard.steps]
            metadata = index["metadata"] if isinstance(index.get("metadata"), dict) else {}
            size = sum(step.stop - step.start for step, _ in steps)
            weight_map = {step.name: name for step, name in steps}
            values[INDEX_NAME] = {
                **index,
                "metadata": {**metadata, "total_size": size},
                "weight_map": dict(sorted(weight_map.items())),
            }
        return {name: json.dumps(value, indent=2) + "\n" for name, value in values.items()}
    except RecursionError as error:
        raise CheckpointError(f"{plan.checkpoint.root}: a JSON file there is too deep") from error


def prepare(plan: Plan, out: Path) -> None:
    """Make the output folder, and clear it of what would make loaders take it for complete."""
    out.mkdir(parents=True, exist_ok=True)
    ours = {shard.name for shard in plan.shards}
    if others := sorted(path.name for path in out.glob("*.safetensors") if path.name not in ours):
        raise CheckpointError(f"{out}: holds {', '.join(others)}, which this checkpoint has not; "
                              "give another folder")
    for name in EDITED_FILES + QUANTIZATION_FILES:
        (out / name).unlink(missing_ok=True)


def publish(root: Path, out: Path, copied: list[str], texts: dict[str, str]) -> None:
    """Complete the output around its shards: files of the input, then those that are edited."""
    for relative in copied:
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{target.parent}: is a link out of the output; remove it")
        shutil.copyfile(root / relative, temporary(target))  # never into what target links to
        os.replace(temporary(target), target)
    for name, text in texts.items():
        path = temporary(out / name)
        with naming(path), open(path, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, out / name)


# --- command line ---


FORMATS_HELP = """
| format                                  | weight and scale             | tested with torch and   |
|-----------------------------------------|------------------------------|-------------------------|
| DeepSeek-V3, Kimi-K2, Qwen3, Mistral    | F8, `_scale_inv`             | transformers 5.23       |
| AutoFP8, ModelOpt, fbgemm, auto-round   | F8, `weight_scale`, `_scale` |                         |
| compressed-tensors FP8                  | F8, `weight_scale`           | compressed-tensors 0.20 |
| torchao                                 | F8 in `_weight_qdata`        |                         |
| ComfyUI scaled, Mistral consolidated    | `scale_weight`, `qscale_...` |                         |
| MXFP8                                   | F8, E8M0 (or U8) per 32      | compressed-tensors 0.20 |
| DeepSeek-V4 experts, MXFP4              | FP4 pairs, E8M0 per 32       | transformers 5.23       |
| NVFP4                                   | FP4 pairs, F8 per 16, F32    | compressed-tensors 0.20 |
| INT8                                    | I8, floats                   |                         |
| plain FP8 cast                          | F8, none                     |                         |
"""


class UsageError(ValueError):
    """The arguments cannot be meant as they are given."""


def printable(text: str) -> str:
    """Return text that a terminal can show and that does not steer it, whatever a tensor's name."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    print(printable(text), flush=True)


def pick_device(name: str) -> tuple[torch.device, str]:
    """Return the device that an argument names, and why it is that one. Raises UsageError."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    cpu, count = torch.device("cpu"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return cpu, "as asked"
    if name == "auto" and not count:
        return cpu, "torch sees no CUDA device"
    device = torch.device("cuda", int(name[5:] or 0) if name != "auto" else 0)
    try:
        if device.index >= count:
            raise UsageError(f"torch sees {count} CUDA devices")
        probe = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
        kernel.weight_dequant(*(tensor.to(device) for tensor in probe))
    except Exception as error:  # no Triton, no compiler for it, a GPU that it does not know, ...
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        if name == "auto":
            return cpu, f"the CUDA device does not work: {problem}"
        raise UsageError(f"--device {name}: {problem}; use --device cpu") from error
    return device, torch.cuda.get_device_name(device)


def check_folders(source: Path, out: Path) -> None:
    """Raise UsageError unless input and output are apart, by whatever paths they are reached."""
    for inner, outer in ((source, out), (out, source)):
        for folder in (inner.resolve(), *inner.resolve().parents):
            if folder == outer.resolve() or (
                folder.exists() and outer.exists() and folder.samefile(outer)
            ):
                raise UsageError(f"{out}: input and output must lie apart, neither in the other")


def main(fp8_path: str | Path, bf16_path: str | Path, *, device: str = "auto",
         workers: int | None = None, missing_scale: str = "keep") -> None:
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another.

    device: "auto", "cpu", "cuda" or "cuda:N". workers: threads, each with buffers of 1.5 windows;
    by default two per core, 4 to 16. missing_scale: "keep", "cast" or "error", as in make_plan.

    Raises CheckpointError for what is wrong with the checkpoint, OSError for the disk, UsageError
    for the arguments. Until it returns, the output holds no index and no config.
    """
    began = time.perf_counter()
    source, out = Path(fp8_path), Path(bf16_path)
    workers = min(16, max(4, 2 * (os.cpu_count() or 1))) if workers is None else workers
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected a positive number")
    if missing_scale not in MISSING_SCALE:
        raise UsageError(f"--missing-scale {missing_scale}: expected {', '.join(MISSING_SCALE)}")
    check_folders(source, out)
    chosen, why = pick_device(device)
    say(f"Device: {chosen} ({why}), {workers} workers")
    plan = make_plan(load_checkpoint(source), missing_scale)
    copied, left_out = side_files(source)
    texts = bf16_texts(plan)
    for tensor in plan.missing if missing_scale == "keep" else ():
        say(f"Warning: Missing scale_inv tensor for {tensor.name}, skipping conversion")
    prepare(plan, out)
    pool = write_shards(plan, out, chosen, workers, WINDOW)
    publish(source, out, copied, texts)
    left_out = [name for name in left_out if name not in plan.checkpoint.shards]
    report(plan, pool, left_out, missing_scale, time.perf_counter() - began)


def report(plan: Plan, pool: list[Worker], left_out: list[str], missing_scale: str,
           seconds: float) -> None:
    """Print what was done; the last line sums it up."""
    steps = [step for shard in plan.shards for step in shard.steps]
    dequantized = sum(step.quantization is not None for step in steps)
    if left_out:
        say(f"Left out, for they are other weights or no plain files: {', '.join(left_out)}")
    if plan.missing:
        fate = "kept in FP8" if missing_scale == "keep" else "cast with scale 1"
        say(f"{len(plan.missing)} FP8 weights without a scale were {fate}:")
        for tensor in plan.missing:
            say(f"  {tensor.name}")
    if plan.orphans:
        say(f"Dropped scales of no weight: {', '.join(t.name for t in plan.orphans)}")
    if nans := sum(worker.nans for worker in pool):
        say(f"{nans} NaN values, from NaN codes or scales")
    spent = {phase: sum(worker.seconds[phase] for worker in pool) for phase in PHASES}
    read = sum(tensor.stop - tensor.start for tensor in plan.checkpoint.tensors.values())
    say(f"Converted {len(plan.shards)} shards, {len(steps)} tensors: {dequantized} dequantized, "
        f"{len(steps) - dequantized} copied, {len(plan.dropped)} scales dropped; "
        f"{tqdm.format_sizeof(read, 'B')} in, {tqdm.format_sizeof(plan.size, 'B')} out, "
        f"{seconds:.1f} s, {plan.size / seconds / 1e9:.2f} GB/s, most of it "
        f"{max(spent, key=spent.get)}")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 converted, 1 impossible, 130 interrupted."""
    parser = argparse.ArgumentParser(
        description="Convert an FP8 checkpoint into a BF16 one.",
        epilog=FORMATS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input-fp8-hf-path", required=True, metavar="IN", dest="fp8_path", help="the checkpoint")
    add("--output-bf16-hf-path", required=True, metavar="OUT", dest="bf16_path", help="new folder")
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--workers", type=int, metavar="N", help="threads (default: 2 per core, 4 to 16)")
    add("--missing-scale", choices=MISSING_SCALE, default="keep",
        help="FP8 weights without a scale: keep them FP8 (default), cast with scale 1, or refuse")
    options = parser.parse_args(arguments)
    try:
        main(**vars(options))
    except UsageError as error:
        parser.error(printable(str(error)))
    except (CheckpointError, OSError, RuntimeError) as error:  # the last is torch's, of a GPU
        text = str(error).splitlines()[0]
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        print(f"error: {printable(text)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the output is not complete", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
