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
import filecmp
import fnmatch
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
with warnings.catch_warnings():  # torch regrets the absence of numpy, which nothing here needs
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import kernel
from kernel import CODECS, FLOATS, Grid

INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")
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
WEIGHT_FILES += ["*.h5", "*.msgpack", "*.tmp"]
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
SCALE_LEAF = re.compile("(?s).*(_scale_inv|_scales_inv|_scale|qscale_weight|scale_weight)|scale")
# Of two scales that could both be meant, the one that the loader for a quant_method reads.
SCALE_OF_METHOD = {
    **dict.fromkeys(["fp8", "mxfp8"], "_scale_inv"),
    **dict.fromkeys(["compressed-tensors", "modelopt", "fbgemm_fp8", "quark"], "weight_scale"),
}
# What is of no use once the weight beside it is BF16.
SIDE_TENSOR = re.compile(
    r"(?s)(.*_)?(input_scale|activation_scale|qscale_act|scale_input|input_scale_ub|global_scale|"
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
REFUSED_NAME = re.compile("|".join(f"({pattern})" for pattern in REFUSED), re.DOTALL)

MISSING_SCALE = ["keep", "cast", "error"]
HEADER_LIMIT = 100_000_000  # bytes, from safetensors; the index lists no more than headers do
CONFIG_LIMIT, DEPTH_LIMIT = 10_000_000, 100  # bytes and levels, far more than any model needs
BLOCK_SIZES_LIMIT = 64  # that a config may name
SMALL_LIMIT = 16 << 20  # bytes of tensors that are read to plan: zero points, orders, notes
SPAN = 16  # windows that follow each other, of which a rank takes care
SCALES = 1 << 20  # that a worker holds at most
POLL = 0.5  # seconds between looks at what other ranks do
PAGE = 4096  # the alignment that direct I/O asks of offsets, lengths and memory
DIRECT = getattr(os, "O_DIRECT", 0)
DIRECT_READ = 256 << 10  # bytes from which on a read may be direct: smaller ones take longer so
LOOKS = 16  # at a file, to tell whether it is cached
WINDOW = 16 << 20
COPY = 4 << 20  # bytes that are copied at once
SMALL = 1 << 20  # bytes of output; tensors smaller than that on average are taken together
# Bytes: the window, its codes, what was fetched ahead, and what the CPU's decoding takes.
WORKER_MEMORY = 5 * WINDOW // 2 + 2 * COPY
TEMPORARY_SUFFIX = ".tmp"
PROBE = "fp8_cast_bf16"  # a temporary file that finds out how to write
MESSAGE_LIMIT = 2000  # characters
NAME_LIMIT = 255  # bytes, on most file systems
OPEN_FILES = 8  # that a worker holds open: its shard and those in which scales stand
SAMPLE, SAMPLES = 16, 4  # elements around a place, and places that a resumed run looks at
PHASES = ["reading", "decoding", "writing", "syncing"]
SPECIALS = ["NaN", "infinite"]


class CheckpointError(Exception):
    """Something about the checkpoint that its user can mend: names the file and the tensor."""


def printable(text: str) -> str:
    """Return text that a terminal can show and that does not steer it, whatever a tensor's name."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def naming(path: Path):
    """Put the file's name into an OSError: reads and writes raise them without."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@functools.cache  # 100,000 tensors stand in a few shards and are called one of a few leaves
def matches(pattern: re.Pattern, text: str) -> re.Match | None:
    return pattern.fullmatch(text)


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


def is_plain(path: Path, root: Path) -> bool:
    """Return whether a path is a file of the checkpoint, not a pipe or a link out of it.

    A link may lead to a private file, which must not end up in an output that gets published. A
    Hugging Face cache keeps the files of a snapshot as links into its own `blobs`: those count.
    """
    root, target = root.resolve(), path.resolve()
    inside = [root, *(p.parent / "blobs" for p in root.parents
                      if p.name == "snapshots" and p.parent.name.startswith("models--"))]
    tool = target.is_relative_to(root) and {*TOOL_FOLDERS} & {*target.relative_to(root).parts}
    return path.is_file() and not tool and any(target.is_relative_to(place) for place in inside)


def parse_json(path: Path, text: bytes) -> dict:
    """Return the JSON object that is the text of a file, or of a part of it."""

    def unique(pairs):
        value = dict(pairs)
        if len(value) != len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"{twice} stands there twice")
        return value

    def finite(text):
        if math.isinf(value := float(text)):
            raise ValueError(f"{text} is too large a number")
        return value

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download it again")
    return value


def read_json(path: Path) -> dict | None:
    """Return the JSON object in a file, None where there is no such file."""
    if not os.path.lexists(path):
        return None
    if not is_plain(path, path.parent):
        raise CheckpointError(f"{path}: is no file of the checkpoint itself: a link to nothing "
                              "or elsewhere, or a device; put the file there")
    limit = HEADER_LIMIT if path.name == INDEX_NAME else CONFIG_LIMIT
    if (size := path.stat().st_size) > limit:
        raise CheckpointError(f"{path}: has {size} bytes; expected at most {limit}")
    value = parse_json(path, path.read_bytes())
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [item for part in level if isinstance(part, dict | list)
                 for item in (part.values() if isinstance(part, dict) else part)]
    if level:
        raise CheckpointError(f"{path}: is nested too deep; expected at most {DEPTH_LIMIT} levels")
    return value


def read_header(path: Path) -> tuple[dict[str, str], list[Tensor]]:
    """Return a shard's metadata and its tensors. safetensors' own parser judges the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the download is incomplete")
    with naming(path), open(path, "rb") as file:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
        except RuntimeError as error:
            # With the header accepted, torch maps the data, which a machine with less memory than
            # the file may refuse. Nothing here needs that map.
            if "mmap" not in str(error):
                raise
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(path, file.read(size))
    metadata = header.pop("__metadata__", None) or {}
    tensors = []
    for name, entry in header.items():
        # that parser takes lists for objects, too
        if not (isinstance(entry, dict) and isinstance(entry["dtype"], str)):
            raise CheckpointError(f"{path}: {name} is described in no known way; download it again")
        module, _, leaf = name.rpartition(".")
        start, stop = entry["data_offsets"]
        tensors.append(Tensor(name, module, leaf, entry["dtype"], tuple(entry["shape"]), path,
                              8 + size + start, 8 + size + stop))
    return metadata, tensors


def find_shards(root: Path, index: dict | None) -> list[str]:
    """Return the file names that make up the checkpoint, sorted."""
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{root / INDEX_NAME}: has no weight_map; download it again")
        for name, shard in weight_map.items():
            if not (isinstance(shard, str) and matches(SHARD_NAME, shard)):
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
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise CheckpointError(f"{root}: no such folder, or not to be read; give the checkpoint's")
    index = read_json(root / INDEX_NAME)
    shards, tensors, holders = {}, {}, {}
    for shard in find_shards(root, index):
        shards[shard], members = read_header(root / shard)
        for tensor in members:
            if tensors.setdefault(tensor.name, tensor) is not tensor:
                holders.setdefault(tensor.name, [tensors[tensor.name]]).append(tensor)
    weight_map = index["weight_map"] if index else {}
    for name, rivals in holders.items():
        meant = [tensor for tensor in rivals if tensor.path.name == weight_map.get(name)]
        if not meant:
            raise CheckpointError(f"{rivals[1].path}: {name} stands in {rivals[0].path.name} too "
                                  "and no index says which counts; remove the file that is not "
                                  "part of the checkpoint")
        tensors[name] = meant[0]
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
    unknown = tensors.values() if hints.methods and not quantizations else ()
    if integers := [t for t in unknown if t.dtype in INTEGERS and t.shape[1:]]:
        raise CheckpointError(f"{checkpoint.root / CONFIG_NAME}: names the quant_method "
                              f"{', '.join(sorted(hints.methods))}, but no weight is in a format "
                              f"known here, as {integers[0].name} ({integers[0].dtype}); "
                              "dequantize it with the tool that made it")
    missing = settle_missing(quantizations, tensors, missing_scale)
    settled = {*quantizations, *(tensor.name for tensor in missing)}
    modules = {tensors[name].module: entry for name, entry in quantizations.items()}
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
    scales = sorted(t.name for t in tensors.values() if "scale" in t.leaf) if missing else []
    for weight in missing:
        if missing_scale == "keep":
            del quantizations[weight.name]
        elif missing_scale == "error":
            raise CheckpointError(f"{weight.path}: {weight.name} has no scale, one of "
                                  f"{len(missing)} weights; --missing-scale keep leaves them FP8, "
                                  "cast takes their scale as 1")
        else:
            name = weight.name
            for own in name + "_", name + ".", name.removesuffix("weight") + "scales":
                beside = "".join(scales[(at := bisect_left(scales, own)) : at + 1])
                if beside.startswith(own):
                    raise CheckpointError(f"{weight.path}: {weight.name} cannot be cast, for "
                                          f"{beside} seems to be its scale, of no known format")
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
    sizes = tuple(dict.fromkeys(s for s in sizes if min(s) > 0 and max(s) < 1 << 31))
    if len(sizes) > BLOCK_SIZES_LIMIT:
        raise CheckpointError(f"{checkpoint.root / CONFIG_NAME}: names {len(sizes)} block sizes; "
                              f"expected at most {BLOCK_SIZES_LIMIT}")
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
            layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
            notes |= {module: (where, note) for module, note in layers.items()}
        for tensor in checkpoint.tensors.values():
            if tensor.name.endswith(".comfy_quant"):
                where = tensor.path
                notes[tensor.module] = where, json.loads(read_small(tensor))
        for module, (where, note) in notes.items():
            codes[module] = COMFY_FORMATS.get(str(note["format"]))
            if codes[module] is None or note.get("convrot"):
                raise CheckpointError(f"{where}: {module} is in ComfyUI's format "
                                      f"{note['format']}; only {' and '.join(COMFY_FORMATS)} can "
                                      "be undone with a scale")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: what ComfyUI notes there is not valid") from error
    return codes


def read_small(tensor: Tensor) -> bytes:
    if (size := tensor.stop - tensor.start) > SMALL_LIMIT:
        raise CheckpointError(f"{tensor.path}: {tensor.name} has {size} bytes; expected at most "
                              f"{SMALL_LIMIT}")
    with naming(tensor.path), open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.stop - tensor.start)


def pair(tensors: dict[str, Tensor], hints: Hints) -> tuple[dict[str, Quantization], set[str]]:
    """Return the quantization of every quantized weight, and the names of all their scales."""
    quantizations, consumed, outputs = {}, set(), set(tensors)
    candidates = [t for t in tensors.values() if t.dtype in kernel.WEIGHT_DTYPES]
    leaves = {tensor.leaf for tensor in tensors.values()}
    kinds = {kind: [end for end in ends if any(s.endswith(end.split(".")[-1]) for s in leaves)]
             for kind, ends in SCALE_NAMES.items()}
    seconds = any(leaf.endswith(("_scale_2", "global_scale")) for leaf in leaves)
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
        second = None
        if scale is not None:
            if seconds or scale.dtype == "F8_E4M3":
                second = find_second(weight, scale, tensors)
            consumed.update(used.name for used in (scale, second, *others) if used)
        quantizations[weight.name] = quantize(weight, scale, second, hints)
        if name != weight.name and name in outputs:
            raise CheckpointError(f"{weight.path}: {weight.name} becomes {name}, which exists too")
        outputs.add(name)
    return quantizations, consumed


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
            read = tuple(end for method, end in SCALE_OF_METHOD.items() if method in hints.methods)
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


def find_second(weight: Tensor, scale: Tensor, tensors: dict[str, Tensor]) -> Tensor | None:
    """Return the scale of an NVFP4 weight's scales: ModelOpt's factor or the other's divisor."""
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


def is_side_tensor(tensor: Tensor, modules: dict[str, Quantization]) -> bool:
    """Return whether a tensor only serves quantization in a module whose weight becomes BF16."""
    match = matches(SIDE_TENSOR, tensor.leaf) if tensor.module in modules else None
    if match and match["zero_point"] and any(read_small(tensor)):
        raise CheckpointError(f"{tensor.path}: {tensor.name} is not all zero; asymmetric formats "
                              "are not supported")
    if match and match["order"]:
        kind = {"I32": "i", "I64": "q"}.get(tensor.dtype)
        groups = [*memoryview(read_small(tensor)).cast(kind)] if kind else [1, 0]
        in_order = [col // modules[tensor.module].grid.block_cols for col in range(len(groups))]
        if groups not in (in_order, [-1] * len(groups)):
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
    longest = max((size for output in outputs for size in output[2]), default=0)
    if len(text) > HEADER_LIMIT or longest >= 1 << 63:
        raise CheckpointError(f"{tensors[0].path}: its header or a tensor would be longer in BF16 "
                              "than safetensors allows")
    text = len(text).to_bytes(8, "little") + text
    steps = [Step(output[1], len(text) + start, len(text) + stop, *output[4:])
             for output, (start, stop) in zip(outputs, pairwise(offsets), strict=True)]
    return Shard(name, text, steps)


# --- job: the ranks that share the work, of which there is one without torchrun ---


class Job:
    """The ranks that torchrun has started, and the store of the launcher through which they speak.

    A process of its own is rank 0 of 1, and counts by itself.
    """

    def __init__(self):
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.lock, self.counts, self.store = threading.Lock(), Counter(), None
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_torchelastic_launched():
            store, self.rank, self.size = next(iter(distributed.rendezvous("env://")))
            self.local_rank = int(os.environ["LOCAL_RANK"])
            self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
            self.store = distributed.PrefixStore(self.meet(store), store)

    def meet(self, store) -> str:
        """Return a new name that all ranks agree upon.

        After a restart the launcher's store may still hold what earlier ranks have left there: old
        counts would make a shard look whole. So each rank says a word of its own, and goes by the
        name that rank 0 has answered to that word.
        """
        word = os.urandom(8).hex()
        if self.rank > 0:
            store.set(f"word/{self.rank}", word)
            while not store.check([f"answer/{word}"]):
                time.sleep(POLL / 10)
            name = store.get(f"answer/{word}").decode()
            store.set(f"heard/{name}/{self.rank}", "")
            return name
        others = set(range(1, self.size))
        while others:
            for rank in [rank for rank in others if store.check([f"word/{rank}"])]:
                store.set(f"answer/{store.get(f'word/{rank}').decode()}", word)
                if store.check([f"heard/{word}/{rank}"]):
                    others.discard(rank)
            time.sleep(POLL / 10)
        return word

    def add(self, key: str, count: int) -> int:
        """Add to what all ranks have counted under a key, and return the sum."""
        if self.store is not None:
            return self.store.add(key, count)
        with self.lock:
            self.counts[key] += count
            return self.counts[key]

    def claimed(self, key: str, tasks: Iterable) -> Iterator:
        """Yield those of the tasks, the same on all ranks, that no other rank has got."""
        mine = None
        for number, task in enumerate(tasks):
            mine = self.add(key, 1) - 1 if mine is None else mine
            if number == mine:
                yield task
                mine = None

    def tell(self, key: str, value) -> None:
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def hear(self, key: str):
        """Return what a rank tells under a key, once it does."""
        while not self.store.check([key]):  # wait() would keep signals from us
            time.sleep(POLL)
        return json.loads(self.store.get(key))

    def share(self, key: str, value):
        """Return what rank 0 gives."""
        if self.rank == 0:
            self.tell(key, value)
            return value
        return self.hear(key)

    def gather(self, key: str, value) -> list:
        """Return what every rank gives, in their order, to rank 0; its own to any other."""
        self.tell(f"{key}/{self.rank}", value)
        others = range(1, self.size) if self.rank == 0 else ()
        return [value, *(self.hear(f"{key}/{rank}") for rank in others)]

    def agree(self, plan: Plan) -> None:
        """Raise CheckpointError unless all ranks have the same plan."""
        if self.size == 1:
            return
        parts = [(shard.name, shard.header) for shard in plan.shards]
        for step in (step for shard in plan.shards for step in shard.steps):
            codes, _, scale, grid, _ = step.quantization or [None] * 5
            source = step.source.path.name, step.source.start
            parts.append((source, codes, scale and scale.start, grid))
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        first, *others = self.share("plans", self.gather("plan", digest))
        for rank, other in enumerate(others, 1):
            if other != first:
                raise CheckpointError(f"{plan.checkpoint.root}: rank {rank} finds a checkpoint "
                                      f"there with the plan {other}, rank 0 one with {first}; give "
                                      "all the same input")


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
    """Return the memory of a contiguous CPU tensor."""
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    memory.owner = tensor  # lives as long as the view
    return memoryview(memory).cast("B")


def open_raw(path: Path, mode: str, flags: int = 0):
    """Open a file without a buffer of Python's, with flags of the system."""
    return open(path, mode, 0, opener=lambda name, own: os.open(name, own | flags, 0o666))


def is_cached(file) -> bool:
    """Return whether a file is in memory already, by LOOKS at it; yes where the system can't tell.

    One decision for the whole file: to read its cached parts through the cache has the system read
    on ahead, so that all would soon be found cached.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    size = os.fstat(file.fileno()).st_size
    try:
        return all(os.preadv(file.fileno(), [bytearray(1)], size * i // LOOKS, os.RWF_NOWAIT)
                   for i in range(LOOKS - 1, 0, -1))
    except OSError as error:
        return error.errno != errno.EAGAIN


class Worker:
    """What one thread needs to render windows: buffers, open files, a GPU stream, and counts.

    specials: how many values of a weight are of one of the kinds SPECIALS.
    """

    def __init__(self, device: torch.device, window: int):
        pinned = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if pinned else None
        self.out = page_aligned(window, pinned)
        self.memory = {"codes": page_aligned(window // 2 + 2 * PAGE, pinned)}
        self.ahead = None, 0, ()
        self.files = {}
        self.specials = Counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def timed(self, phase: str):
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def scratch(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory that is used again, for to get it anew costs more than to fill it."""
        size = count * dtype.itemsize
        if len(self.memory.get(name, ())) < size:
            self.memory[name] = page_aligned(size, False)
        return self.memory[name][:size].view(dtype)

    def open(self, path: Path, large: bool = False):
        """Return a file that stays open; for large reads one past the page cache, if that pays."""
        if (path, large) not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.close()
            file = open_raw(path, "rb")
            if large and DIRECT and not is_cached(file):
                try:
                    direct = open_raw(path, "rb", DIRECT)
                    direct.readinto(as_bytes(page_aligned(PAGE, False)))
                    file = direct
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            self.files[path, large] = file
        return self.files[path, large]

    def read(self, path: Path, start: int, count: int, name: str = "codes") -> torch.Tensor:
        """Return the bytes [start, start + count) of a file, uint8.

        They stand in memory that the next read with this name uses again. Whole pages are read, as
        direct reads require. Those take a fifth of the processor time that the page cache takes.
        """
        fetched, first, data = self.ahead
        if path == fetched and first <= start and start + count <= first + len(data):
            return data[start - first :][:count]
        at = begin = start // PAGE * PAGE
        stop = start + count
        buffer = self.scratch(name, -(-stop // PAGE) * PAGE - begin, torch.uint8)
        with self.timed("reading"), naming(path):
            file = self.open(path, large=count >= DIRECT_READ)
            file.seek(begin)
            while at < stop:
                size = file.readinto(as_bytes(buffer[at - begin :]))
                if not size:
                    raise CheckpointError(f"{path}: ends at byte {at}; it was cut")
                at += size
        return buffer[start - begin : stop - begin]

    def fetch(self, path: Path, start: int, stop: int) -> None:
        """Read what the next reads of small parts take from memory."""
        self.ahead = None, 0, ()
        self.ahead = path, start, self.read(path, start, stop - start, "ahead")

    def read_bytes(self, path: Path, start: int, count: int) -> bytes:
        """Return a few bytes of a file."""
        with naming(path):
            file = self.open(path)
            file.seek(start)
            data = file.read(count)
        if len(data) < count:
            raise CheckpointError(f"{path}: ends at byte {file.tell()}; it was cut")
        return data

    def read_scale(self, scale: Tensor, first: int, count: int) -> torch.Tensor:
        """Return `count` scales from the one numbered `first` on, uint8, as they are stored."""
        size = (scale.stop - scale.start) // math.prod(scale.shape)
        return self.read(scale.path, scale.start + first * size, count * size, "scales").clone()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


def run_workers(job: Job, doing: str, pool: list[Worker], tasks: Iterator[tuple], work: Callable,
                total: int) -> None:
    """Let every worker, a thread each, take tasks until there are none or one of them has failed.

    A task is a shard and what `work` takes after the worker and the shard; work returns how many
    of `total` bytes are done. Rank 0 returns when all ranks together have done those.
    """
    lock, stopped = threading.Lock(), threading.Event()
    done = pending = told = 0
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=job.rank > 0 or None)

    def count(size: int, at_once: bool) -> None:
        nonlocal done, pending, told
        pending, now = pending + size, time.monotonic()
        if at_once or now - told > POLL:  # or the store would hear of every window
            done, pending, told = job.add(doing, pending), 0, now
            bar.update(done - bar.n)

    def loop(worker: Worker) -> None:
        torch.set_num_threads(1)  # the workers are the threads
        torch.set_flush_denormal(False)
        while True:
            with lock:
                task = None if stopped.is_set() else next(tasks, None)
            if task is None:
                break
            size = work(worker, *task)
            with lock:
                bar.set_description(printable(f"{doing} {task[0].name}"), refresh=False)
                count(size, job.size == 1)

    threads, executor = torch.get_num_threads(), ThreadPoolExecutor(len(pool))
    try:
        for future in as_completed([executor.submit(loop, worker) for worker in pool]):
            future.result()
        count(0, True)
        while job.rank == 0 and done < total:
            time.sleep(POLL)
            count(0, True)
    finally:
        stopped.set()
        executor.shutdown()
        bar.close()
        torch.set_num_threads(threads)
        for worker in pool:
            worker.close()


# Short operations go twice as fast if threads do not take turns at Python's own lock with each.
ALONE = threading.Lock()


def render(shard: Shard, start: int, stop: int, worker: Worker) -> torch.Tensor:
    """Return the bytes [start, stop) of a shard, uint8, in the worker's buffer."""
    out = worker.out[: stop - start]
    head = shard.header[start:stop]
    as_bytes(out)[: len(head)] = head
    first = bisect_right(shard.steps, start, key=lambda step: step.stop)
    steps = shard.steps[first : bisect_left(shard.steps, stop, key=lambda step: step.start)]
    small = len(steps) * SMALL > stop - start
    if small:
        fetch_ahead(steps, start, stop, worker)
    with ALONE if small else nullcontext():
        for step in steps:
            begin, end = max(step.start, start), min(step.stop, stop)
            into = out[begin - start : end - start]
            if step.quantization is None:
                for at in range(begin, end, COPY):
                    place = step.source.start + at - step.start
                    part = worker.read(step.source.path, place, min(COPY, end - at))
                    into[at - begin :][: len(part)] = part
            elif begin < end:
                begin, end = (begin - step.start) // 2, (end - step.start) // 2
                render_weight(step, begin, end, into, worker)
    return out


def fetch_ahead(steps: list[Step], start: int, stop: int, worker: Worker) -> None:
    """Read in one go what small tensors of a window are made of, if it stands close together."""
    paths = {step.source.path for step in steps}
    places = [step.source.start for step in steps] + [step.source.stop for step in steps]
    if len(paths) == 1 and max(places) - min(places) <= stop - start + COPY:
        worker.fetch(*paths, min(places), max(places))


def render_weight(step: Step, start: int, stop: int, out: torch.Tensor, worker: Worker) -> None:
    """Fill `out`, uint8, with the elements [start, stop) of a weight as BF16."""
    quantization = step.quantization
    grid = quantization.grid
    row, row_end, col, col_end = region = grid.scale_region(start, stop)
    if (row_end - row) * (col_end - col) > SCALES:  # of long rows, or tiny blocks
        rows = start // grid.cols, (stop - 1) // grid.cols
        middle = (start + stop) // 4 * 2 if rows[0] == rows[1] else sum(rows, 1) // 2 * grid.cols
        render_weight(step, start, middle, out[: 2 * (middle - start)], worker)
        render_weight(step, middle, stop, out[2 * (middle - start) :], worker)
        return
    per_byte = kernel.FORMATS[quantization.codes].codes_per_byte
    first_byte, last_byte = start // per_byte, -(-stop // per_byte)
    place = step.source.start + first_byte
    codes = worker.read(step.source.path, place, last_byte - first_byte)
    out = out.view(torch.bfloat16)
    with torch.cuda.stream(worker.stream):
        scales = read_scales(quantization, region, worker)
        with worker.timed("decoding"):
            codes = codes.to(worker.device, non_blocking=True)
            values = out if worker.stream is None else torch.empty_like(out, device=worker.device)
            codec = quantization.codes, grid, start
            counts = kernel.dequantize(codes, scales, values, *codec)
            if values is not out:
                out.copy_(values, non_blocking=True)
            counts = counts.tolist()  # waits for the stream, so the buffers are free again
    for kind, count in zip(SPECIALS, counts, strict=True):
        if count:
            worker.specials[step.name, kind] += count


def read_scales(quantization: Quantization, region: tuple[int, int, int, int],
                worker: Worker) -> torch.Tensor:
    """Return a region of a weight's scales (Grid.scale_region), a float32 matrix on the device.

    Scales of scales are applied here, in float32, before the codes meet either: the order in which
    ModelOpt and compressed-tensors dequantize.
    """
    if quantization.scale is None:
        return torch.ones(1, 1, device=worker.device)
    grid, second = quantization.grid, quantization.second
    row, row_end, col, col_end = region
    count = (row_end - row) * (col_end - col)

    def load(scale: Tensor, first: int, count: int) -> torch.Tensor:
        raw = worker.read_scale(scale, first, count).to(worker.device)
        return kernel.widen_scales(raw, scale.dtype)

    scales = load(quantization.scale, row * grid.scale_shape[1] + col, count)
    scales = scales.view(row_end - row, col_end - col)
    if second is None:
        return scales
    part, per_part = 0, grid.scale_rows_per_part
    parts = torch.zeros(row_end - row, dtype=torch.int64, device=worker.device)
    if math.prod(second.shape) > 1:
        part = row // per_part
        parts = torch.arange(row, row_end, device=worker.device) // per_part - part
    factors = load(second, part, parts[-1].item() + 1)[parts].view(-1, 1)
    return scales / factors if is_divisor(second) else scales * factors


def is_divisor(second: Tensor) -> bool:
    """compressed-tensors divides by its second scale, ModelOpt multiplies by it."""
    return second.name.endswith("global_scale")


# --- write: windows under a temporary name, then the final one ---


def direct_flag(root: Path, rank: int) -> int:
    """Return O_DIRECT where this folder's file system takes it, else 0.

    Direct writes skip the page cache, which a file larger than memory only slows down. Where they
    are refused (tmpfs, some network file systems, other than Linux), plain writes do the same.
    """
    flag, probe = DIRECT, temporary(root / f"{PROBE}{rank}")
    try:
        with naming(probe), open_raw(probe, "r+b", flag | os.O_CREAT) as file:
            file.write(as_bytes(page_aligned(PAGE, False)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        flag = 0
    finally:
        probe.unlink(missing_ok=True)
    return flag


def temporary(path: Path) -> Path:
    """Return the name under which a file is written until it is whole."""
    name = path.name
    if len(os.fsencode(name)) > NAME_LIMIT - len(TEMPORARY_SUFFIX):
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(name + TEMPORARY_SUFFIX)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            with naming(folder):
                os.fsync(number)
        finally:
            os.close(number)


class Output:
    """The shards being written, in windows that come in any order and from any rank.

    Ranks share out spans, some windows that follow each other. A rank syncs a shard after each of
    its spans. With the last span of all, the shard is whole and gets its name.
    """

    def __init__(self, job: Job, shards: list[Shard], root: Path, window: int):
        self.job, self.root = job, root
        self.direct = direct_flag(root, job.rank)
        self.lock = threading.Lock()
        self.left = {}  # windows that are not written, by shard and start of the span
        self.begun = set()
        self.windows = self._windows(shards, window)

    def _windows(self, shards: list[Shard], window: int) -> Iterator[tuple[Shard, int, int, int]]:
        spans = ((shard, start) for shard in sorted(shards, key=lambda shard: -shard.size)
                 for start in range(0, shard.size, SPAN * window))
        for shard, span in self.job.claimed("span", spans):
            starts = range(span, min(span + SPAN * window, shard.size), window)
            self.left[shard.name, span] = len(starts)
            if shard.name not in self.begun:
                self.begun.add(shard.name)
                path = temporary(self.root / shard.name)
                with naming(path), open_raw(path, "r+b", os.O_CREAT) as file:
                    file.truncate(shard.size)
            for start in starts:
                yield shard, span, start, min(start + window, shard.size)

    def write(self, worker: Worker, shard: Shard, span: int, start: int, stop: int) -> int:
        """Render a window and write it. What fills its last page is cut off at the end."""
        render(shard, start, stop, worker)
        view = as_bytes(worker.out)[: -(-(stop - start) // PAGE) * PAGE]
        path = temporary(self.root / shard.name)
        with worker.timed("writing"), naming(path), open_raw(path, "r+b", self.direct) as file:
            file.seek(start)
            while view:
                view = view[file.write(view) :]
        with self.lock:
            self.left[shard.name, span] -= 1
            written = not self.left[shard.name, span]
        if written:
            size = min(SPAN * len(worker.out), shard.size - span)
            self.finish(worker, shard, size)
        return stop - start

    def finish(self, worker: Worker, shard: Shard, size: int) -> None:
        """Make `size` more bytes of a shard durable, and give it its name if those are the last."""
        path = temporary(self.root / shard.name)
        with worker.timed("syncing"), naming(path), open_raw(path, "r+b") as file:
            os.fsync(file.fileno())
            if self.job.add(f"synced {shard.name}", size) < shard.size:
                return
            file.truncate(shard.size)
            os.fsync(file.fileno())
        os.replace(path, self.root / shard.name)
        self.begun.discard(shard.name)

    def discard(self) -> None:
        """Remove the shards that are not whole, unless other ranks may still be writing them."""
        for name in self.begun if self.job.size == 1 else ():
            temporary(self.root / name).unlink(missing_ok=True)


def write_shards(job: Job, shards: list[Shard], root: Path, pool: list[Worker],
                 window: int) -> None:
    """Write shards into the folder `root`, each under its name once it is whole."""
    output = Output(job, shards, root, window)
    try:
        size = sum(shard.size for shard in shards)
        run_workers(job, "writing", pool, output.windows, output.write, size)
    finally:
        output.discard()
    sync_folder(root)


# --- resume: the shards of an earlier run that can stay ---


def find_done(job: Job, plan: Plan, out: Path, workers: int) -> set[str]:
    """Return the names of shards in the output that are as planned.

    Their header must be the planned one, and SAMPLES pieces of every tensor, with its first and its
    last element, what they should be: checkpoints of one model have the same headers.
    """
    found = [shard for shard in plan.shards if has_header(out / shard.name, shard)]
    done = {shard.name for shard in found}
    if not found:
        return done

    def check(worker: Worker, shard: Shard, steps: list[Step]) -> int:
        if shard.name in done and not has_samples(out / shard.name, steps, worker):
            done.discard(shard.name)
        return sum(step.stop - step.start for step in steps)

    tasks = ((shard, shard.steps[at : at + 100]) for shard in found
             for at in range(0, len(shard.steps), 100))
    pool = [Worker(torch.device("cpu"), 0) for _ in range(workers)]
    size = sum(shard.size - len(shard.header) for shard in found)
    run_workers(job, "checking", pool, tasks, check, size)
    return done


def has_header(path: Path, shard: Shard) -> bool:
    """Return whether a file has a shard's size and begins with its header."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.size:
        return False
    with naming(path), open(path, "rb") as file:
        return file.read(len(shard.header)) == shard.header


@functools.cache  # thousands of experts have the same
def samples(grid: Grid, per_byte: int) -> list[tuple[int, int, int, int]]:
    """Return pieces of a weight that have one scale each, those at its ends among them.

    A piece: its first element, the number of elements, the number of its scale and of its part.
    """
    pieces, last = [], grid.rows * grid.cols - 1
    places = {last * i // (SAMPLES - 1) // per_byte * per_byte for i in range(SAMPLES)}
    for place in sorted(places) if last >= 0 else ():
        row, col = divmod(place, grid.cols)
        block = col // grid.block_cols
        begin = max(block * grid.block_cols, col - SAMPLE)
        end = min((block + 1) * grid.block_cols, grid.cols, col + SAMPLE)
        scale = grid.scale_row(row) * grid.scale_shape[1] + block
        pieces.append((row * grid.cols + begin, end - begin, scale, row // grid.part))
    return pieces


def has_samples(path: Path, steps: list[Step], worker: Worker) -> bool:
    """Return whether a file holds what it should for some pieces of each of its tensors."""
    groups = {}  # pieces that are decoded in one go: call by call, large models would take minutes
    for step in steps:
        source, quantization = step.source, step.quantization
        if quantization is None:
            bytewise = Grid(1, step.stop - step.start, 1, step.stop - step.start, 1)
            for first, count, _, _ in samples(bytewise, 1):
                copied = worker.read_bytes(source.path, source.start + first, count)
                if worker.read_bytes(path, step.start + first, count) != copied:
                    return False
            continue
        codes, _, scale, grid, second = quantization
        per_byte = kernel.FORMATS[codes].codes_per_byte
        divides = second is not None and is_divisor(second)
        kind = codes, scale and scale.dtype, second and second.dtype, divides
        pieces = groups.setdefault(kind, [])
        for first, count, number, part in samples(grid, per_byte):
            pieces.append((
                count // per_byte,
                worker.read_bytes(source.path, source.start + first // per_byte, count // per_byte),
                read_element(scale, number, worker),
                read_element(second, part, worker),
                worker.read_bytes(path, step.start + 2 * first, 2 * count),
            ))
    return all(map(are_as_rendered, groups, groups.values()))


def read_element(tensor: Tensor | None, number: int, worker: Worker) -> bytes:
    """Return the bytes of one element, that numbered `number` if the tensor has more than one."""
    if tensor is None:
        return b""
    size = (tensor.stop - tensor.start) // (count := math.prod(tensor.shape))
    return worker.read_bytes(tensor.path, tensor.start + size * (number if count > 1 else 0), size)


def are_as_rendered(kind: tuple, pieces: list[tuple]) -> bool:
    """Return whether pieces of one format have been decoded rightly: their last items are."""
    codes, scale_dtype, second_dtype, divides = kind
    if not pieces:
        return True
    counts, raw, scales, factors, written = zip(*pieces, strict=True)
    raw, written = (torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
                    for parts in (raw, written))
    scales = widened(scales, scale_dtype) if scale_dtype else torch.ones(len(pieces))
    if second_dtype:
        factors = widened(factors, second_dtype)
        scales = scales / factors if divides else scales * factors
    scales = scales.repeat_interleave(torch.tensor(counts)).view(-1, 1)
    out, width = torch.empty(len(written) // 2, dtype=torch.bfloat16), len(written) // 2 // len(raw)
    kernel.dequantize(raw, scales, out, codes, Grid(len(raw), width, 1, width, len(raw)))
    return torch.equal(out.view(torch.int16), written.view(torch.int16))


def widened(parts: Iterable[bytes], dtype: str) -> torch.Tensor:
    """Return scales, stored as bytes of a dtype, as float32."""
    raw = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
    return kernel.widen_scales(raw, dtype)


# --- publish: the files beside the shards; config and index last, which say that all is there ---


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


@dataclass(frozen=True)
class Extras:
    """What stands beside the shards: files of the input to copy or to leave out, edited texts."""

    copied: list[str]
    left_out: list[str]
    texts: dict[str, str]


def find_extras(plan: Plan) -> Extras:
    """Decide what becomes of the files beside the shards, which are named relative to the root.

    Left out are weight files, unfinished files, and what is no plain file of the checkpoint.
    """
    copied, left_out, root = [], [], plan.checkpoint.root
    for folder, folders, names in os.walk(root, onerror=raise_error):
        folders[:] = sorted(name for name in folders if name not in TOOL_FOLDERS)
        for name in sorted(names + folders):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            unwanted = any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES)
            taken = relative in EDITED_FILES + QUANTIZATION_FILES
            if name in folders:
                if unwanted or taken or path.is_symlink():
                    folders.remove(name)
                    left_out.append(relative)
            elif taken or relative in plan.checkpoint.shards:
                continue
            elif unwanted or not is_plain(path, root):
                left_out.append(relative)
            elif not os.access(path, os.R_OK):
                raise CheckpointError(f"{path}: may not be read; it would be missing in the output")
            else:
                copied.append(relative)
    return Extras(copied, left_out, bf16_texts(plan))


def raise_error(error: OSError) -> None:
    raise error


def find_stale(plan: Plan, out: Path, done: set[str], extras: Extras) -> list[Path]:
    """Return what must go from an output folder, what makes loaders take it for complete first.

    That is index and configs, shards that are not as planned, and what a killed run has left.
    """
    shards = [shard.name for shard in plan.shards]
    names = EDITED_FILES + QUANTIZATION_FILES + [name for name in shards if name not in done]
    paths = [out / name for name in names]
    paths += [temporary(out / name) for name in [*EDITED_FILES, *shards, *extras.copied]]
    paths += sorted(out.glob(f"{PROBE}*{TEMPORARY_SUFFIX}"))
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            raise CheckpointError(f"{path}: is a folder; remove it or give another output")
    return [path for path in paths if os.path.lexists(path)]


def is_complete(plan: Plan, out: Path, done: set[str], stale: list[Path], extras: Extras) -> bool:
    """Return whether an output has all that it should have, and nothing that must go."""
    root, texts = plan.checkpoint.root, extras.texts
    return (
        len(done) == len(plan.shards)
        and {*stale} == {out / name for name in texts}
        and all((out / name).read_bytes() == text.encode() for name, text in texts.items())
        and all((out / name).is_file() and filecmp.cmp(root / name, out / name, shallow=False)
                for name in extras.copied)
    )


def measure_space(plan: Plan, out: Path, done: set[str], stale: list[Path],
                  extras: Extras) -> tuple[int, int]:
    """Return the bytes that are still to be written, and those free for them.

    Raises CheckpointError where the output cannot be made, whatever its size.
    """
    ours = {shard.name for shard in plan.shards}
    if others := sorted(path.name for path in out.glob("*.safetensors") if path.name not in ours):
        raise CheckpointError(f"{out}: holds {', '.join(others)}, which this checkpoint has not; "
                              "give another folder")
    folder = out.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder}: is no folder that may be written to; give another output")
    sizes = [shard.size for shard in plan.shards if shard.name not in done]
    sizes += [(plan.checkpoint.root / name).stat().st_size for name in extras.copied]
    sizes += [len(text.encode()) for text in extras.texts.values()]
    freed = sum(getattr(path.lstat(), "st_blocks", 0) * 512 for path in stale)
    needed = sum(-(-size // PAGE) * PAGE for size in sizes)
    return needed, shutil.disk_usage(folder).free + freed


@contextmanager
def locked(folder: Path):
    """Keep other runs out of a folder, where the system and the file system know locks."""
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(number)
        raise CheckpointError(f"{folder}: another run is writing there; let it end") from error
    except OSError:  # some network file systems know no locks
        pass
    try:
        yield
    finally:
        os.close(number)


def write_whole(path: Path, content: str | Path) -> None:
    """Give a file new content, a text or that of another file, at once or not at all."""
    try:
        with naming(path), open(temporary(path), "wb") as file:
            if isinstance(content, Path):
                with naming(content), open(content, "rb") as original:
                    shutil.copyfileobj(original, file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary(path), path)  # never into what a link at this name leads to
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


def publish(root: Path, out: Path, extras: Extras) -> None:
    """Complete the output around its shards: files of the input, then those that are edited."""
    folders = {out}
    for relative in extras.copied:
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{target.parent}: is a link out of the output; remove it")
        write_whole(target, root / relative)
        folders |= {folder for folder in target.parents if folder.is_relative_to(out)}
    for folder in sorted(folders):
        sync_folder(folder)
    for name, text in extras.texts.items():
        write_whole(out / name, text)
    sync_folder(out)


# --- verify: an output against its input, by torch's own casts and nothing of the kernel ---

REFERENCE_CHUNK = 1 << 21  # elements that a worker compares at once
REFERENCE_DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "INT8": torch.int8}
REFERENCE_SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
                    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
                    "U8": torch.float8_e8m0fnu}


@functools.cache
def reference_pairs(codes: str) -> torch.Tensor:
    """Return the values of two codes, two float32 in an int64 each.

    FP4 pairs stand in the order of their byte, others in that of the int16 that they make. They
    come from torch's cast, which is several times slower than to look its results up.
    """
    if codes != "E2M1":
        both = torch.arange(-0x8000, 0x8000).to(torch.int16)
        return both.view(REFERENCE_DTYPES[codes]).float().view(torch.int64)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values, byte = torch.cat([values, -values]), torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], 1).view(torch.int64).flatten()


def chunks(step: Step) -> Iterator[tuple[int, int, int, int]]:
    """Cut a tensor into (row, col, M, N) rectangles: whole rows, or a part of one.

    Elements of a weight that was quantized, bytes of others, which count as a single row.
    """
    rows, cols = 1, step.stop - step.start
    if step.quantization:
        rows, cols = step.quantization.grid.rows, step.quantization.grid.cols
    if rows * cols == 0:
        return
    height, width = max(1, REFERENCE_CHUNK // cols), min(cols, REFERENCE_CHUNK)
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            yield row, col, min(height, rows - row), min(width, cols - col)


def batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: [*itertools.islice(items, size)], [])


def reference(step: Step, row: int, col: int, M: int, N: int, worker: Worker) -> torch.Tensor:
    """Return a rectangle of a dequantized weight, (M, N) bfloat16."""
    codes, _, scale, grid, _ = step.quantization
    start, per_byte = row * grid.cols + col, 2 if codes == "E2M1" else 1
    place = step.source.start + start // per_byte
    raw = worker.read(step.source.path, place, M * N // per_byte)
    if codes != "E2M1":  # by pairs, which stand at even places
        uneven = place % 2 or len(raw) % 2
        raw = (torch.cat([raw, raw[: len(raw) % 2]]) if uneven else raw).view(torch.int16)
    index = worker.scratch("index", len(raw), torch.int32).copy_(raw)
    index += 0 if codes == "E2M1" else 0x8000
    pairs = worker.scratch("pairs", len(index), torch.int64)
    torch.index_select(reference_pairs(codes), 0, index, out=pairs)
    values = pairs.view(torch.float32)[: M * N]
    if scale is not None:
        scales = reference_scales(step.quantization, row, col, M, N, worker)
        values.view(M, scales.shape[1], -1).mul_(scales[:, :, None])
    return worker.scratch("expected", M * N, torch.bfloat16).copy_(values).view(M, N)


def reference_scales(quantization: Quantization, row: int, col: int, M: int, N: int,
                     worker: Worker) -> torch.Tensor:
    """Return (M, k) float32, the scales of N / k elements each in the rows of a rectangle."""
    _, _, scale, grid, second = quantization

    def read(tensor: Tensor, first: int, count: int) -> torch.Tensor:
        return worker.read_scale(tensor, first, count).view(REFERENCE_SCALES[tensor.dtype]).float()

    together = math.gcd(N, col, grid.block_cols) if grid.block_cols < grid.cols else N
    rows, cols = torch.arange(row, row + M), torch.arange(col, col + N, together) // grid.block_cols
    part, per_part = rows // grid.part, -(-grid.part // grid.block_rows)
    rows = part * per_part + rows % grid.part // grid.block_rows
    width = -(-grid.cols // grid.block_cols)
    first_row, first_col = rows[0].item(), cols[0].item()
    height, taken = rows[-1].item() + 1 - first_row, cols[-1].item() + 1 - first_col
    scales = read(scale, first_row * width + first_col, height * taken).view(height, taken)
    if second is not None:
        parts = torch.zeros(height, dtype=torch.int64)
        if math.prod(second.shape) > 1:
            parts = torch.arange(first_row, first_row + height) // per_part
        first_part = parts[0].item()
        factors = read(second, first_part, parts[-1].item() + 1 - first_part)
        factors = factors[parts - first_part].view(-1, 1)
        scales = scales / factors if is_divisor(second) else scales * factors
    return scales[rows - first_row][:, cols - first_col]


def find_differences(job: Job, plan: Plan, out: Path, texts: dict[str, str],
                     workers: int) -> list[str]:
    """Return in what an output, whoever made it, is not the plan's: a line for each difference.

    Ranks share the reading, and rank 0 gets all that they find.
    How tensors are spread over shards is free, and so are the order and padding of headers and the
    payload of a NaN.
    """
    result = load_checkpoint(out)
    comparable, found = compare_headers(plan, result)
    found += differing_texts(result, texts)
    steps = [(shard, step) for shard in plan.shards for step in shard.steps
             if step.name in comparable]
    first, lock = {}, threading.Lock()  # the first difference of each tensor

    def compare(worker: Worker, shard: Shard, step: Step, rectangle: tuple[int, ...]) -> int:
        row, col, M, N = rectangle
        earlier = step.name in first and first[step.name][0] < row * N + col
        difference = None
        if not earlier:
            difference = compare_chunk(step, comparable[step.name], rectangle, worker)
        if difference:
            with lock:
                first[step.name] = min(first.get(step.name, difference), difference)
        return M * N * (2 if step.quantization else 1)

    tasks = job.claimed("rectangles", ((*place, rectangles) for place in steps
                                       for rectangles in batches(chunks(place[1]), SPAN)))
    tasks = ((shard, step, one) for shard, step, rectangles in tasks for one in rectangles)
    pool = [Worker(torch.device("cpu"), 0) for _ in range(workers)]
    size = sum(step.stop - step.start for _, step in steps)
    run_workers(job, "verifying", pool, tasks, compare, size)
    firsts = {}
    for part in job.gather("differences", first):
        for name, difference in part.items():
            firsts[name] = min(firsts.get(name, (*difference,)), (*difference,))
    for name, (element, got, expected) in sorted(firsts.items()):
        place = []
        for size in reversed(comparable[name].shape):
            element, at = divmod(element, size)
            place.insert(0, at)
        found.append(f"{name}: element {place} is {got}, expected {expected}")
    return found


def compare_headers(plan: Plan, result: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of an output that are of the planned dtype and shape, and what differs."""
    planned = {step.name: step for shard in plan.shards for step in shard.steps}
    found = [f"{name}: is missing" for name in planned if name not in result.tensors]
    found += [f"{name}: is not expected, in {tensor.path.name}"
              for name, tensor in result.tensors.items() if name not in planned]
    comparable = {name: tensor for name, tensor in result.tensors.items() if name in planned}
    for name, tensor in list(comparable.items()):
        source, quantization = planned[name].source, planned[name].quantization
        expected = ("BF16", quantization.shape) if quantization else (source.dtype, source.shape)
        if (tensor.dtype, tensor.shape) != expected:
            del comparable[name]
            found.append(f"{name}: is {tensor.dtype} {list(tensor.shape)}, expected "
                         f"{expected[0]} {list(expected[1])}")
    return comparable, found


def compare_chunk(step: Step, tensor: Tensor, rectangle: tuple[int, ...],
                  worker: Worker) -> tuple[int, str, str] | None:
    """Return the first element that differs in a part of a tensor, and how both read, or None."""
    row, col, M, N = rectangle
    if step.quantization is None:
        size = step.stop - step.start
        element = size // max(1, math.prod(tensor.shape)) or 1
        got = worker.read(tensor.path, tensor.start + col, N, "got")
        expected = worker.read(step.source.path, step.source.start + col, N)
        if torch.equal(*in_words(got, expected)):
            return None
        at = (got != expected).nonzero()[0].item() // element * element
        values = (bytes(data[at : at + element].tolist()[::-1]).hex() for data in (got, expected))
        return (col + at) // element, *(f"0x{value}" for value in values)
    start = row * step.quantization.grid.cols + col
    got = worker.read(tensor.path, tensor.start + 2 * start, 2 * M * N, "got")
    expected = reference(step, row, col, M, N, worker).flatten()
    if torch.equal(*in_words(got, expected.view(torch.uint8))):
        return None
    got = got.clone().view(torch.bfloat16)
    differs = got.view(torch.int16) != expected.view(torch.int16)
    places = (differs & ~(got.isnan() & expected.isnan())).nonzero()
    if not len(places):
        return None
    at = places[0].item()
    return start + at, str(got[at].item()), str(expected[at].item())


def in_words(*parts: torch.Tensor) -> Iterable[torch.Tensor]:
    """Return bytes as int64, if all fill those, which compare faster."""
    uneven = any(len(part) % 8 or part.storage_offset() % 8 for part in parts)
    return parts if uneven else (part.view(torch.int64) for part in parts)


def differing_texts(result: Checkpoint, texts: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with the index, the config and the parameters of an output."""
    for name, value in ((CONFIG_NAME, result.config), (PARAMS_NAME, result.params)):
        planned = json.loads(texts[name]) if name in texts else None
        for place, got, expected in differing_values(value, planned):
            yield f"{name}: {place or 'the file'} is {got}, expected {expected}"
    if result.index is None and INDEX_NAME in texts:
        yield f"{INDEX_NAME}: is missing"
    if result.index is not None:
        weight_map = result.index["weight_map"]
        for name, tensor in result.tensors.items():
            if weight_map.get(name) != tensor.path.name:
                yield f"{INDEX_NAME}: has {name} not in {tensor.path.name}, where it is"
        metadata = result.index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        size = sum(tensor.stop - tensor.start for tensor in result.tensors.values())
        if total != size:
            yield f"{INDEX_NAME}: total_size is {total}, expected {size}"


def differing_values(got, expected, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield where two configs differ, and both values as JSON.

    The dtype may go by either name, and which transformers wrote the config does not matter.
    """
    if isinstance(got, dict) and isinstance(expected, dict):
        got, expected = ({DTYPE_KEYS[-1] if key in DTYPE_KEYS else key: value
                          for key, value in config.items() if key != "transformers_version"}
                         for config in (got, expected))
        for key in dict.fromkeys([*expected, *got]):
            inner = f"{place}.{key}" if place else key
            yield from differing_values(got.get(key), expected.get(key), inner)
    else:
        got, expected = (json.dumps(value, sort_keys=True) for value in (got, expected))
        if got != expected:
            yield place, got[:200], expected[:200]


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


def say(text: str) -> None:
    print(printable(text), flush=True)


def sized(count: int) -> str:
    return tqdm.format_sizeof(count, "B")


def pick_device(name: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return the device that an argument names, and why it is that one. Raises UsageError.

    Ranks on one machine share out its GPUs, unless the argument has a number.
    """
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    cpu, count = torch.device("cpu"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return cpu, "as asked"
    if name == "auto" and not count:
        return cpu, "torch sees no CUDA device"
    number = int(name[5:]) if name[5:] else local_rank % max(1, count)
    device = torch.device("cuda", number)
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


def check_folders(source: Path, out: Path, report: Path | None) -> None:
    """Raise UsageError unless input, output and report are apart, by whatever paths they go."""
    for inner, outer in ((source, out), (out, source)):
        for folder in (inner.resolve(), *inner.resolve().parents):
            if folder == outer.resolve() or (
                folder.exists() and outer.exists() and folder.samefile(outer)
            ):
                raise UsageError(f"{out}: input and output must lie apart, neither in the other")
    if report is not None:
        folder = report.resolve().parent
        if report.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UsageError(f"--report {report}: cannot be written there")
        if any(folder.is_relative_to(place.resolve()) for place in (source, out)):
            raise UsageError(f"--report {report}: give a path outside of input and output")


def main(fp8_path: str | Path, bf16_path: str | Path, *, device: str = "auto",
         workers: int | None = None, missing_scale: str = "keep", dry_run: bool = False,
         verify: bool = False, report: str | Path | None = None) -> None:
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another.

    device: "auto", "cpu", "cuda" or "cuda:N". workers: threads, each with buffers of 1.5 windows;
    by default two per core, 4 to 16. missing_scale: "keep", "cast" or "error", as in make_plan.
    dry_run: only print what would be done. verify: only compare an existing output with what it
    should be. report: a file for a JSON record of it all.

    Raises CheckpointError for what is wrong with the checkpoint or a verified output, OSError for
    the disk, UsageError for the arguments. Until all is there, the output holds no index and no
    config.
    """
    began = time.perf_counter()
    source, out, report = Path(fp8_path), Path(bf16_path), Path(report) if report else None
    job = Job()
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(16, max(4, 2 * (cores or 1) // job.local_size))
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected a positive number")
    if missing_scale not in MISSING_SCALE:
        raise UsageError(f"--missing-scale {missing_scale}: expected {', '.join(MISSING_SCALE)}")
    if dry_run and verify:
        raise UsageError("--dry-run and --verify: expected one of them")
    check_folders(source, out, report)
    chosen, why = pick_device("cpu" if verify else device, job.local_rank)
    if job.rank == 0:
        ranks = f", {job.size} ranks" if job.size > 1 else ""
        say(f"Device: {chosen} ({why}), {workers} workers{ranks}")
    plan = make_plan(load_checkpoint(source), missing_scale)
    job.agree(plan)
    extras = find_extras(plan)
    record = describe(plan, extras, missing_scale)
    if job.rank == 0:
        tell_plan(record)
    if verify:
        record["differences"] = find_differences(job, plan, out, extras.texts, workers)
        record["seconds"] = {}
    else:
        record |= convert(job, plan, out, extras, chosen, workers, dry_run)
    if job.rank > 0:
        return
    record["seconds"]["total"] = time.perf_counter() - began
    if report is not None:
        options = {"input": str(source), "output": str(out), "device": str(chosen),
                   "workers": workers, "missing_scale": missing_scale, "dry_run": dry_run,
                   "verify": verify}
        record = {"options": options, "versions": versions(), **record}
        write_whole(report, json.dumps(record, indent=2) + "\n")
    if verify:
        tell_verified(record, out)
    elif not dry_run:
        tell_converted(record)


def convert(job: Job, plan: Plan, out: Path, extras: Extras, device: torch.device, workers: int,
            dry_run: bool) -> dict:
    """Make the output of a plan, or what is missing of it; return a record of what was done.

    Rank 0 looks after the folder: what is there, what must go, and what completes it.
    """
    with ExitStack() as stack:
        todo, known = None, {}
        if job.rank == 0:
            done, complete = preflight(job, plan, out, extras, workers)
            known = {"shards_already_there": sorted(done), "complete": complete}
            if not (complete or dry_run):
                todo = [shard.name for shard in plan.shards if shard.name not in done]
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(out))
                for path in find_stale(plan, out, done, extras):
                    path.unlink(missing_ok=True)
                sync_folder(out)
        todo = job.share("todo", todo)
        shards = [shard for shard in plan.shards if shard.name in (todo or ())]
        pool = [Worker(device, WINDOW) for _ in range(workers)] if shards else []
        if shards:
            write_shards(job, shards, out, pool, WINDOW)
        if job.rank == 0 and todo is not None:
            publish(plan.checkpoint.root, out, extras)
    specials, seconds = Counter(), Counter(dict.fromkeys(PHASES, 0.0))
    for worker in pool:
        specials.update(worker.specials)
        seconds.update(worker.seconds)
    counts = {kind: {name: n for (name, what), n in specials.items() if what == kind}
              for kind in SPECIALS}
    for other_counts, other_seconds in job.gather("counts", (counts, seconds))[1:]:
        seconds.update(other_seconds)
        for kind in SPECIALS:
            counts[kind] = Counter(counts[kind]) + Counter(other_counts[kind])
    written = sum(shard.size for shard in shards)
    return {**known, "bytes_written": written, **counts, "seconds": dict(seconds)}


def preflight(job: Job, plan: Plan, out: Path, extras: Extras, workers: int) -> tuple[set, bool]:
    """Return which shards are there already, and whether everything is.

    Prints what is missing and what there is room for. Raises CheckpointError if it does not fit.
    """
    done = find_done(job, plan, out, workers)
    stale = find_stale(plan, out, done, extras)
    needed, free = measure_space(plan, out, done, stale, extras)
    complete = is_complete(plan, out, done, stale, extras)
    if done:
        say(f"Already there: {len(done)} of {len(plan.shards)} shards")
    say(f"Space: {sized(0 if complete else needed)} to write, {sized(free)} free; memory: {workers}"
        f" workers, at most {sized(WORKER_MEMORY)} each")
    if needed > free and not complete:
        raise CheckpointError(f"{out}: there is {sized(needed - free)} too little space for it; "
                              "free some or give another output")
    return done, complete


def describe(plan: Plan, extras: Extras, missing_scale: str) -> dict:
    """Return what a plan does, as a record that JSON can hold."""
    steps = [step for shard in plan.shards for step in shard.steps]
    dequantized = [step.quantization for step in steps if step.quantization]
    tensors = plan.checkpoint.tensors.values()
    missing = [tensor.name for tensor in plan.missing]
    return {
        "input": {"shards": len(plan.checkpoint.shards), "tensors": len(tensors),
                  "bytes": sum(tensor.stop - tensor.start for tensor in tensors)},
        "output": {"shards": len(plan.shards), "tensors": len(steps), "bytes": plan.size},
        "dequantized": dict(Counter(map(kind_of, dequantized)).most_common()),
        "copied": len(steps) - len(dequantized),
        "dropped": len(plan.dropped),
        "dropped_scales_of_no_weight": [tensor.name for tensor in plan.orphans],
        "kept_in_fp8": dict.fromkeys(missing, "no scale") if missing_scale == "keep" else {},
        "cast_with_scale_1": missing if missing_scale == "cast" else [],
        "files_left_out": extras.left_out,
    }


def kind_of(quantization: Quantization) -> str:
    """Return the format of a weight in words."""
    codes, _, scale, grid, second = quantization
    if scale is None:
        return f"{codes} without a scale"
    block = f"{grid.block_rows}x{grid.block_cols} block"
    if grid.block_cols >= grid.cols and grid.block_rows >= grid.part:
        block = "tensor" if grid.part >= grid.rows else "expert"
    elif grid.block_cols >= grid.cols and grid.block_rows == 1:
        block = "row"
    elif grid.block_cols == 1 and grid.block_rows >= grid.part:
        block = "column"
    return f"{codes}, {scale.dtype} scale per {block}{' and a second' if second else ''}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("safetensors", "tqdm", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def tell_plan(record: dict) -> None:
    """Print what will be done."""
    for side in ("input", "output"):
        say(f"{side.capitalize()}: {record[side]['shards']} shards, {record[side]['tensors']} "
            f"tensors, {sized(record[side]['bytes'])}")
    for kind, count in record["dequantized"].items():
        say(f"  {count} weights to dequantize: {kind}")
    say(f"  {record['copied']} tensors to copy, {record['dropped']} scales to drop")
    for name in record["kept_in_fp8"]:
        say(f"Warning: Missing scale_inv tensor for {name}, skipping conversion")
    if record["files_left_out"]:
        say("Left out, for they are other weights or no plain files: "
            f"{', '.join(record['files_left_out'])}")


def tell_converted(record: dict) -> None:
    """Print what was done; the last line sums it up."""
    if record["complete"]:
        say("Nothing to do: the output is complete")
        return
    for fate, names in (("kept in FP8", record["kept_in_fp8"]),
                        ("cast with scale 1", record["cast_with_scale_1"])):
        if names:
            say(f"{len(names)} FP8 weights without a scale were {fate}:")
            for name in names:
                say(f"  {name}")
    if orphans := record["dropped_scales_of_no_weight"]:
        say(f"Dropped scales of no weight: {', '.join(orphans)}")
    for kind in SPECIALS:
        if counts := record[kind]:
            say(f"{sum(counts.values())} {kind} values, in {', '.join(counts)}")
    out, seconds = record["output"], record["seconds"]
    limits = {**seconds, "writing": seconds["writing"] + seconds["syncing"]}
    limit = max(PHASES[:3], key=limits.get)
    say(f"Converted {out['shards']} shards, {out['tensors']} tensors: "
        f"{sum(record['dequantized'].values())} dequantized, {record['copied']} copied, "
        f"{record['dropped']} scales dropped; {sized(record['input']['bytes'])} in, "
        f"{sized(out['bytes'])} out, {seconds['total']:.1f} s, "
        f"{record['bytes_written'] / seconds['total'] / 1e9:.2f} GB/s, limited by {limit}")


def tell_verified(record: dict, out: Path) -> None:
    """Print how an output differs. Raises CheckpointError if it does."""
    differences, seconds = record["differences"], record["seconds"]["total"]
    for difference in differences:
        say(difference)
    if differences:
        raise CheckpointError(f"{out}: is not what the input gives, in {len(differences)} places")
    size = record["input"]["bytes"] + record["output"]["bytes"]
    say(f"Verified {record['output']['tensors']} tensors: all as they should be; "
        f"{sized(size)} read, {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status.

    That is 0 if converted or verified, 1 if impossible or different, 130 or 143 if interrupted.
    """
    parser = argparse.ArgumentParser(
        description="Convert an FP8 checkpoint into a BF16 one.",
        epilog=FORMATS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input-fp8-hf-path", required=True, metavar="IN", dest="fp8_path", help="the checkpoint")
    add("--output-bf16-hf-path", required=True, metavar="OUT", dest="bf16_path",
        help="a new folder, or one of an earlier run, which goes on")
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--workers", type=int, metavar="N", help="threads (default: 2 per core, 4 to 16)")
    add("--missing-scale", choices=MISSING_SCALE, default="keep",
        help="FP8 weights without a scale: keep them FP8 (default), cast with scale 1, or refuse")
    add("--dry-run", action="store_true", help="print what would be done and what it takes")
    add("--verify", action="store_true", help="compare an existing output with the input")
    add("--report", metavar="FILE", help="write a JSON record of it all")
    options = parser.parse_args(arguments)
    try:
        main(**vars(options))
    except UsageError as error:
        parser.error(printable(str(error)))
    except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
        text = str(error) if isinstance(error, CheckpointError) else str(error).partition("\n")[0]
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        if isinstance(error, RecursionError):
            text = f"{options.fp8_path}: is nested too deep"
        if len(text) > MESSAGE_LIMIT:  # of a name that is as long as a book
            text = f"{text[: MESSAGE_LIMIT // 2]} ... {text[-MESSAGE_LIMIT // 2 :]}"
        print(f"error: {printable(text)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted: the output is not complete", file=sys.stderr)
        return 128 + (interrupt.args or [signal.SIGINT])[0]
    return 0


def end(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    gc.set_threshold(200_000)  # a plan is many objects, and while it grows none of them is garbage
    sys.exit(cli())
