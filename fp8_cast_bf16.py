# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.7", "safetensors>=0.6.1", "tqdm", "triton>=3.3; sys_platform == 'linux'",
# ]
# ///
"""Convert an FP8 Hugging Face checkpoint into a BF16 one that loads as it is.

    python fp8_cast_bf16.py --input-fp8-hf-path IN --output-bf16-hf-path OUT

An output shard is a file that can be computed at any byte range from the input:

    headers -> formats -> plan -> render(shard, start, stop) -> windows on disk -> publish

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
import statistics
import sys
import threading
import time
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
with warnings.catch_warnings():  # torch warns when numpy is not installed; nothing here uses it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import kernel
from kernel import Grid, ceil_div, pieces


class CheckpointError(Exception):
    """Something about the checkpoint that its user can mend: names the file and the tensor."""


class UsageError(ValueError):
    """The arguments cannot be meant as they are given."""


def printable(text: str) -> str:
    """Return text that a terminal can show and that does not steer it, whatever a tensor's name."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    print(printable(text), flush=True)


@contextmanager
def naming(path: Path):
    """Add the path to an OSError from read or write, which do not know it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# --- checkpoint: where every tensor's bytes are ---

INDEX_NAME, INDEX_SUFFIX = "model.safetensors.index.json", ".safetensors.index.json"
CONFIG_NAME, PARAMS_NAME = "config.json", "params.json"  # The second is Mistral's own.
NVIDIA_CONFIG_NAME, SIDECAR_NAME = "hf_quant_config.json", "quantization_config.json"
SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")
TOOL_FOLDERS = [".git", ".cache"]
HEADER_LIMIT = 100_000_000  # Bytes, from safetensors; an index lists no more than headers do.
CONFIG_LIMIT, DEPTH_LIMIT = 10_000_000, 100  # Bytes and levels, far more than any model needs.


class Tensor(NamedTuple):
    """A tensor on disk: dtype as safetensors spells it, bytes [start, stop) of the file at path.

    path: for a tensor of the input, the input folder joined with the shard's name; for a planned
    output, the shard's name alone. leaf is the name after its last dot, module the name before it.
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
    index_name: str
    index: dict | None
    config: dict | None
    params: dict | None
    nvidia_config: dict | None
    sidecar: dict | None


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
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {twice} occurs twice")
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
        raise CheckpointError(f"{path}: is not a JSON object; download it again")
    return value


def read_json(path: Path) -> dict | None:
    """Return the JSON object in a file, None where there is no such file."""
    if not os.path.lexists(path):
        return None
    if not is_plain(path, path.parent):
        raise CheckpointError(f"{path}: is no file of the checkpoint itself: a link to nothing "
                              "or elsewhere, or a device; put the file there")
    limit = HEADER_LIMIT if path.name.endswith(INDEX_SUFFIX) else CONFIG_LIMIT
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
            # Once the header is accepted, torch maps the file, which can fail on a machine with
            # less memory than the file has bytes. Nothing here needs the mapping.
            if "mmap" not in str(error):
                raise
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(path, file.read(size))
    metadata = header.pop("__metadata__", None) or {}
    tensors = []
    for name, entry in header.items():
        # That parser takes lists for objects, too.
        if not (isinstance(entry, dict) and isinstance(entry["dtype"], str)):
            raise CheckpointError(f"{path}: {name} has an invalid header entry; download it again")
        module, _, leaf = name.rpartition(".")
        start, stop = entry["data_offsets"]
        tensors.append(Tensor(name, module, leaf, entry["dtype"], tuple(entry["shape"]), path,
                              8 + size + start, 8 + size + stop))
    return metadata, tensors


def find_index(root: Path) -> str:
    """Return the name of the index: that of a model, or the only one that another library wrote."""
    names = sorted(path.name for path in root.glob(f"*{INDEX_SUFFIX}"))
    others = [name for name in names if not name.startswith("consolidated")]
    if INDEX_NAME not in names and len(others) > 1:
        raise CheckpointError(f"{root}: holds {' and '.join(others)}; move all but one checkpoint "
                              "to folders of their own")
    return INDEX_NAME if INDEX_NAME in names or not others else others[0]


def find_shards(root: Path, index_name: str, index: dict | None) -> list[str]:
    """Return the file names that make up the checkpoint, sorted."""
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{root / index_name}: has no weight_map; download it again")
        for name, shard in weight_map.items():
            if not (isinstance(shard, str) and SHARD_NAME.fullmatch(shard)):
                where = f"{root / index_name}: puts {name} into {shard!r}"
                raise CheckpointError(f"{where}; expected a *.safetensors file beside it")
        return sorted(set(weight_map.values()))
    shards = sorted(path.name for path in root.glob("*.safetensors"))
    # Mistral's repositories hold the same weights a second time, under names of their own.
    shards = [name for name in shards if not name.startswith("consolidated")] or shards
    if not shards:
        raise CheckpointError(f"{root}: holds no *.safetensors; give the checkpoint's folder")
    return shards


def load_checkpoint(root: Path, consistent: bool = True) -> Checkpoint:
    """Read the index, the configs and all headers of a checkpoint, and check that they agree.

    The headers are authoritative. The index decides which shards belong to the checkpoint and, if
    two of them hold a tensor of the same name, which one counts. If `consistent` is false, all
    shards in the folder belong to it, and an index that lists missing tensors is not an error.
    """
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise CheckpointError(f"{root}: no such folder, or not to be read; give the checkpoint's")
    index_name = find_index(root)
    index = read_json(root / index_name)
    shards, tensors, holders = {}, {}, {}
    for shard in find_shards(root, index_name, index if consistent else None):
        shards[shard], members = read_header(root / shard)
        for tensor in members:
            if tensors.setdefault(tensor.name, tensor) is not tensor:
                holders.setdefault(tensor.name, [tensors[tensor.name]]).append(tensor)
    weight_map = (index or {}).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}  # find_shards refuses an input.
    for name, rivals in holders.items():
        meant = [tensor for tensor in rivals if tensor.path.name == weight_map.get(name)]
        if not meant:
            raise CheckpointError(f"{rivals[1].path}: {name} stands in {rivals[0].path.name} too "
                                  "and no index says which counts; remove the file that is not "
                                  "part of the checkpoint")
        tensors[name] = meant[0]
    for name, shard in weight_map.items():
        if name not in tensors and consistent:
            raise CheckpointError(f"{root / shard}: {name} is not there; {index_name} names it")
    names = [CONFIG_NAME, PARAMS_NAME, NVIDIA_CONFIG_NAME]
    names += [SIDECAR_NAME] if is_plain(root / SIDECAR_NAME, root) else []
    configs = [*map(read_json, (root / name for name in names)), None][:4]
    return Checkpoint(root, shards, tensors, index_name, index, *configs)


# --- formats: how weights are stored; a new format is a row here, and a test in test_formats.py ---

# Keys of a config, at any depth, or of a shard's metadata that mark the weights as quantized.
QUANTIZATION_KEYS = ["quantization_config", "compression_config", "_quantization_metadata",
                     "expert_dtype", "moe_quant_algo"]
BLOCK_SIZES_LIMIT = 64  # A config may name so many block sizes.
SMALL_LIMIT = 16 << 20  # Bytes of a tensor that planning reads: zero points, group indices, notes.
F8 = frozenset({"F8_E4M3", "F8_E5M2"})
FLOATS = frozenset({"F32", "BF16", "F16"})
EXPONENTS = frozenset({"F8_E8M0", "U8"})  # Bytes that are exponents of two, biased by 127.
SMALL_FLOATS = frozenset({"F8_E4M3"})
INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})  # I64, U64, BOOL never hold codes.
CODE_BYTES = {"I8": 1, "U8": 1, "I32": 4}  # Of an element that packs codes.
NUMBER_FORMATS = {"F8_E4M3": "E4M3", "F8_E5M2": "E5M2"}

# Tensors that belong to a quantized weight and are dropped with it. Zero points must be zero, and
# group indices must be in order.
SIDES = (
    "input_scale", "output_scale", "activation_scale", "act_scale", "input_scale_ub",  # activations
    "input_scale_2", "input_zero_point", "output_zero_point", "scale_input", "qscale_act",
    "comfy_quant", "{}_zero_point", "{}_zp", "{}_g_idx", "{}_act_scale",
    "{}_act_per_tensor_scale",
)
# May stand beside any weight and are copied; `scale` only if it is not the weight's own scale.
PARAMETERS = {"bias", "e_score_correction_bias", "correction_bias", "expert_bias", "scale",
              "tid2eid", "position_ids", "num_batches_tracked"}
COMPRESSED = ("format", frozenset({  # vllm-project/compressed-tensors config/base.py
    "dense", "naive-quantized", "float-quantized", "int-quantized", "mixed-precision",
    "pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized",
}))
SEMANTICS = "weight_scale_semantics"  # The only key that can say that an FP8 scale divides.

# amd/Quark 0.13: with other dtypes and formats of scales the same tensors mean something else.
QUARK = (("dtype", frozenset({"fp4", "fp8_e4m3", "fp8_e5m2"})),
         ("scale_format", frozenset({"e8m0", "float32"})))

# NVIDIA/Model-Optimizer torch/export: the second name is that of experts which the model fuses.
MODELOPT, MODELOPT_GLOBAL = "{}_scale {}_weight_scale", "{}_scale_2 {}_weight_scale_2"


def named(*words: str) -> frozenset[str]:
    return frozenset(words)


class Format(NamedTuple):
    """One way to store a weight. The first row whose names, dtypes and method match applies.

    Names are relative to the module. "{}" stands for the stem, the last part of the output's name:
    usually `weight`, or the name of a parameter without a module of its own, such as gate_up_proj.
    weight is a regular expression, and may match in modules below the one that holds the scale.

    - containers, scale_dtypes: dtypes as safetensors spells them.
    - number_format: a key of kernel.FORMATS; if empty, the dtype of the codes determines it.
    - methods: the values of quant_method whose loaders read the tensors so; "" where the config
      names none. FP8 has one meaning, so for it they only decide between two scales; bytes and
      integers are converted under these methods alone.
    - scale, global_scale: one name each, or the same number of alternatives, separated by spaces.
      The global scale multiplies the scales, or `divides` them. inverse: the scale divides, too.
    - groups: columns that share a scale, where the format fixes them.
    - stacked: the scales of all experts are one tensor, although the weights are not.
    - transposed: the weight is stored transposed, so that scales of rows apply to columns.
    - whole_rows: a scale covers whole rows (Quark stores INT8 groups transposed).
    - within_rows: a scale covers part of one row, or a block that the config names.
    - sides: what else is dropped with the weight.
    - requires, accepts: keys of the config that must have one of these values, or no other.
    """

    title: str
    weight: str
    scale: str
    containers: frozenset[str] = F8
    scale_dtypes: frozenset[str] = FLOATS | EXPONENTS
    number_format: str = ""
    methods: frozenset[str] = frozenset()
    groups: tuple[int, ...] = ()
    global_scale: str = ""
    divides: bool = False
    inverse: bool = False
    stacked: bool = False
    transposed: bool = False
    whole_rows: bool = False
    within_rows: bool = False
    sides: tuple[str, ...] = SIDES
    requires: tuple[tuple[str, frozenset[str]], ...] = ()
    accepts: tuple[tuple[str, frozenset[str]], ...] = ()


FORMATS = [
    # modelcloud/GPTQModel quantize_fp8_weight: the scale is 448 / absmax and divides.
    Format("GPTQModel", "{}", "{}_scale_inv", scale_dtypes=FLOATS, inverse=True,
           requires=((SEMANTICS, named("inverse")),)),
    # deepseek-ai/DeepSeek-V3 inference/kernel.py multiplies by it: it is the inverse of the
    # quantizer's factor. huggingface/transformers integrations/finegrained_fp8.py, before 5.0,
    # uses the plural for fused experts.
    Format("DeepSeek-V3, Kimi-K2, Qwen3, GLM-5, MiniMax, Mistral", "{}",
           "{}_scale_inv {}_scales_inv", methods=named("fp8", "mxfp8")),
    # huggingface/transformers modeling of Llama 4, FbgemmFp8Llama4TextExperts: the weight is
    # stored transposed, so that its scales of rows are scales of columns here.
    Format("Llama 4 (fbgemm)", "down_proj", "down_proj_scale", scale_dtypes=FLOATS, transposed=True,
           requires=(("quant_method", named("fbgemm_fp8")),)),
    Format("compressed-tensors, ModelOpt, fbgemm, Quark, auto-round, AutoFP8", "{}", MODELOPT,
           methods=named("compressed-tensors", "modelopt", "fbgemm_fp8", "quark", "auto-round")),
    # deepseek-ai/DeepSeek-V4 inference/model.py
    Format("DeepSeek-V4", "weight", "scale"),
    Format("Fish Audio", "{}", "{}.scale", scale_dtypes=FLOATS),
    # vllm-project/vllm models/llama.py, mistral_mapping
    Format("Mistral consolidated", "weight", "qscale_weight", scale_dtypes=FLOATS),
    # kohya-ss/musubi-tuner modules/fp8_optimization_utils.py; comfyanonymous/ComfyUI
    # comfy/utils.py, convert_old_quants
    Format("musubi-tuner", "weight", "scale_weight", scale_dtypes=FLOATS,
           global_scale="scale_weight_tensor"),
    Format("ComfyUI scaled", "weight", "scale_weight", scale_dtypes=FLOATS),
    # pytorch/ao prototype/safetensors
    Format("torchao", "_{}_qdata", "_{}_scale", scale_dtypes=FLOATS | {"F8_E8M0"},
           methods=named("torchao")),
    # vllm-project/vllm 53896: the shards of an embedding share the scale of the whole.
    Format("Qwen3.8 n-gram tables", r"shard_\d+\.weight", "weight_scale", scale_dtypes=FLOATS),
    # huggingface/transformers 5 integrations/finegrained: save_pretrained splits the experts
    # but not their scales, where the rows of up follow those of gate.
    Format("experts saved by transformers 5", r"\d{1,9}\.(?:gate_proj|up_proj|w1|w3)\.weight",
           "gate_up_proj_scale_inv", stacked=True),
    Format("experts saved by transformers 5", r"\d{1,9}\.(?:down_proj|w2)\.weight",
           "down_proj_scale_inv", stacked=True),
    # deepseek-ai/DeepSeek-V3 inference/kernel.py, run on tensors that were viewed as bytes.
    Format("FP8 as bytes", "{}", "{}_scale_inv", named("U8"), FLOATS, "E4M3", named("")),
    # comfyanonymous/ComfyUI comfy/quant_ops.py: a note beside the weight says what its bytes are.
    Format("ComfyUI, E4M3 by note", "weight", "weight_scale", named("U8"), FLOATS, "E4M3",
           named("ComfyUI's float8_e4m3fn")),
    Format("ComfyUI, E5M2 by note", "weight", "weight_scale", named("U8"), FLOATS, "E5M2",
           named("ComfyUI's float8_e5m2")),
    # sgl-project/sglang layers/quantization/blockwise_int8.py and w8a8_int8.py
    Format("INT8 in blocks", "{}", "{}_scale_inv", named("I8"), FLOATS, "INT8",
           named("blockwise_int8")),
    Format("INT8 per row or tensor", "{}", "{}_scale", named("I8"), FLOATS, "INT8",
           named("w8a8_int8", "quark", "modelopt"), whole_rows=True),
    Format("compressed-tensors INT8", "{}", "{}_scale", named("I8"), FLOATS, "INT8",
           named("compressed-tensors"), within_rows=True, accepts=(COMPRESSED,)),
    # InternLM/lmdeploy lite/apis/smooth_quant.py
    Format("INT8 of lmdeploy", "weight", "scale", named("I8"), FLOATS, "INT8",
           named("smooth_quant"), whole_rows=True),
    Format("INT8 of torchao", "_{}_qdata", "_{}_scale", named("I8"), FLOATS, "INT8",
           named("torchao"), within_rows=True),
    # pytorch/ao prototype/mx_formats; swizzled scales have another shape.
    Format("MXFP4 of torchao", "_{}_qdata", "_{}_scale", named("U8"), named("F8_E8M0"), "E2M1",
           named("torchao"), (32,)),
    Format("NVFP4 of torchao", "_{}_qdata", "_{}_scale", named("U8"), SMALL_FLOATS, "E2M1",
           named("torchao"), (16,), "_{}_per_tensor_scale"),
    # deepseek-ai/DeepSeek-V4 inference/convert.py: two codes a byte, the low half first.
    Format("experts of DeepSeek-V4 (MXFP4)", "weight", "scale", named("I8", "F4"),
           named("F8_E8M0"), "E2M1", named("fp8"), (32,)),
    # vllm-project/compressed-tensors compressors/mxfp4; intel/auto-round
    # export/export_to_llmcompressor
    Format("compressed-tensors MXFP4", "{}_packed", "{}_scale", named("U8"), EXPONENTS, "E2M1",
           named("compressed-tensors", "auto-round"), (32,),
           accepts=(COMPRESSED, ("data_type", named("mx_fp", "mx_fp4", "float")))),
    # vllm-project/vllm layers/quantization/quark/schemes/quark_ocp_mx.py; NVIDIA/Model-Optimizer
    # torch/quantization/qtensor/mxfp4_tensor.py
    Format("MXFP4 of Quark and ModelOpt", "{}", MODELOPT, named("U8"), EXPONENTS, "E2M1",
           named("quark", "modelopt"), (32,),
           accepts=QUARK),
    # vllm-project/compressed-tensors compressors/nvfp4: the global scale divides.
    Format("compressed-tensors NVFP4", "{}_packed", "{}_scale", named("U8"), SMALL_FLOATS, "E2M1",
           named("compressed-tensors", "auto-round"), (16,), "{}_global_scale", divides=True,
           sides=(*SIDES, "input_global_scale"),
           accepts=(COMPRESSED, ("data_type", named("nv_fp", "nv_fp4", "float")))),
    # NVIDIA/Model-Optimizer torch/quantization/qtensor/nvfp4_tensor.py. Fused experts may have one
    # global scale for gate and one for up.
    Format("ModelOpt W4A8_NVFP4_FP8", "{}", MODELOPT, named("U8"), SMALL_FLOATS, "E2M1",
           named("modelopt"), (32, 16), MODELOPT_GLOBAL,
           requires=(("quant_algo", named("W4A8_NVFP4_FP8")),)),
    Format("NVFP4 of ModelOpt and Quark", "{}", MODELOPT, named("U8"), SMALL_FLOATS, "E2M1",
           named("modelopt", "quark"), (16,), MODELOPT_GLOBAL, accepts=QUARK),
    # huggingface/transformers integrations/finegrained/nvfp4.py: here the global scale multiplies.
    Format("transformers NVFP4", "{}", "{}_scale_inv {}_scale_inv", named("U8"), SMALL_FLOATS,
           "E2M1", named("nvfp4"), (16,), "{}_global_scale {}_weight_global_scale",
           sides=(*SIDES, "input_global_scale")),
    # vllm-project/vllm models/inkling/nvidia
    Format("Inkling NVFP4", "{}", "{}.scale", named("U8"), SMALL_FLOATS, "E2M1", named("modelopt"),
           (16,), "{}.scale2", sides=(*SIDES, "{}.input_amax", "{}.original_shape")),
    # sgl-project/sglang layers/quantization/w4afp8.py: two's complement, the low half first.
    Format("W4AFP8", "{}", "{}_scale_inv", named("I8"), FLOATS, "INT4", named("w4afp8"), (128,)),
    # vllm-project/compressed-tensors compressors/pack_quantized: eight codes per int32, the
    # lowest bits first, each 8 more than its value. The config gives the group size.
    Format("Kimi-K2-Thinking, compressed-tensors INT4", "{}_packed", "{}_scale", named("I32"),
           FLOATS, "UINT4B8", named("compressed-tensors"), sides=(*SIDES, "{}_shape"),
           accepts=(COMPRESSED,)),
]
PLAIN_CAST = Format("plain FP8 cast", "{}", "")  # no scale: the policy of --missing-scale

KNOWN_METHODS = frozenset({"", "fp8", "mistral"}).union(*(row.methods for row in FORMATS))
CONTAINERS = frozenset().union(*(row.containers for row in FORMATS))
ALL_SIDES = frozenset(side.replace("{}", "weight") for row in FORMATS for side in row.sides)
STRANGE_DTYPES = {  # What is never copied: only a quantized weight has a use for it.
    "F4": "4-bit floats", "F6_E2M3": "a 6-bit float", "F6_E3M2": "a 6-bit float",
    "F8_E4M3FNUZ": "an FNUZ float, whose bits mean other values",
    "F8_E5M2FNUZ": "an FNUZ float, whose bits mean other values",
    "F8_E8M0": "an exponent that is the scale of no known weight",
}
# The name of a scale, whoever wrote it, consists of these words, with at least one of the first.
SCALE_WORDS = named("scale", "scales", "scaling", "absmax", "scb", "suh", "svh", "compressed",
                    "wscale", "wscales", "wcscales", "wtscale", "qscales", "lut")
OTHER_WORDS = named(
    "weight", "weights", "inv", "inverse", "reciprocal", "factor", "factors", "block", "blocks",
    "group", "channel", "global", "double", "quant", "quantized", "quantizer", "deq", "dequant",
    "fp8", "fp4", "fp", "int", "int8", "per", "tensor", "row", "col", "w", "zeros", "and", "table",
)
# Endings that a tensor of codes may add to the name of its weight.
CODES_ENDING = re.compile(
    r"(^|[._]+)((q?weights?|packed|q?data|blocks|quant|quantized|values|float8|fp8|bitmask|trellis|"
    r"W_q)([._]+|$))+$")
# Names of integers that are codes whatever the method, and where a method but fp8 is named.
CODES_NAME = re.compile(r"qweight|qzeros|W_q|.*(_packed|_qdata)", re.DOTALL)
CODES_OR_WEIGHT_NAME = re.compile(rf"weight|.*_proj|{CODES_NAME.pattern}", re.DOTALL)
TABLE_NAME = re.compile(r"(.*_)?(ids|index|idx|mask|table|tid2eid)", re.DOTALL)
# Endings of names that say, after a weight's name, that the tensor takes part in its quantization.
QUANTIZATION_ENDING = re.compile(
    r"(.*[._])?(scales?|scale_?(inv|\d)|scales_inv|zero_points?|zp|q?zeros|g_idx|offset|shape|amax|"
    r"absmax|rotation|trans|svd\w*|lora\w*|packed|qdata|codebook|blocks|bitmask|compressed|"
    r"quant\w*)",
    re.DOTALL,
)
ORPHAN_LEAF = re.compile(
    r"weight_scale|qscale_weight|scale_weight|.*(_scale_inv|_scales_inv|_weight_scale)", re.DOTALL)
DROPPED_ORPHANS = "_scale_inv", "_scales_inv"  # No model has a parameter of such a name.
# Scales of the key-value cache and of attention (vllm-project/vllm model_loader/weight_utils.py),
# of activations that layers share, and ComfyUI's mark.
CACHE_SCALE = re.compile("[kvq]_scale|kv_scale|prob_scale|prob_output_scale|qscale_act|scaled_fp8")
CACHE_OFFSET = {"k_bias": "k_scale", "v_bias": "v_scale"}  # ModelOpt's affine key-value cache.
ATTENTION_ZERO = re.compile("[kvq]_zero_point")  # vllm-project/llm-compressor, FP8 attention
# Quark's, auto-round's and SDNQ's keys; what they rotate offline (r1, r2) needs nothing.
ROTATIONS = {"rotation_config", "hadamard_config", "use_hadamard", "online_r1_rotation", "r3", "r4"}
UNKNOWN_METHODS = "quantization_bit", "quant_type", "dfloat11_config"  # keys of config.json itself
BLOCK_SIZES = (16, 32, 64, 128, 256, 1)  # Seen in formats, for one axis each.
COMFY = "ComfyUI's "  # Before the format that a note names, as if it were a method.
EXACT_BLOCKS = ((1, 32), (1, 16), (1, 128))  # May stand beside the blocks that a config names.
MAX_SLICES = 1024  # Tensor-parallel ranks that a fused weight may have been made for.


class Quantization(NamedTuple):
    """How a weight's codes become values.

    output: the name of the values; shape: theirs, in elements. scale: None for a weight that is
    cast as if its scale were 1. grid: which scale belongs to which element of the matrix in which
    the weight begins at row first_row. packed_cols: codes per row of the weight on disk.
    """

    row: Format
    number_format: str
    output: str
    shape: tuple[int, ...]
    scale: Tensor | None
    grid: Grid
    global_scale: Tensor | None = None
    first_row: int = 0
    packed_cols: int = 0


@dataclass(frozen=True)
class Evidence:
    """What the files beside the shards say of the quantization.

    methods: every quant_method, {""} where there is none. facts: the texts that stand under each
    key of a quantization config. block_sizes: rows and columns. int4_groups: group sizes of INT4, 0
    for whole rows. heads: numbers of attention heads. notes: ComfyUI's, a format by module.
    """

    methods: frozenset[str]
    facts: dict[str, set[str]]
    block_sizes: tuple[tuple[int, int], ...]
    int4_groups: tuple[int, ...]
    heads: frozenset[int]
    notes: dict[str, str]

    def __str__(self) -> str:
        methods = sorted(self.methods - {""})
        text = f"quant_method {', '.join(methods)}" if methods else "no quant_method"
        semantics = sorted(self.facts.get(SEMANTICS, ()))
        return text + "".join(f", {SEMANTICS} {value}" for value in semantics)


@functools.cache  # 100,000 tensors are called one of a few leaves.
def fully(pattern: re.Pattern, text: str) -> re.Match | None:
    return pattern.fullmatch(text)


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


def read_evidence(checkpoint: Checkpoint) -> Evidence:
    """Collect what configs and notes say. Raises CheckpointError for what nobody can undo."""
    config = checkpoint.config
    sections = [value for key, value in walk(config) if key in QUANTIZATION_KEYS]
    sections += [checkpoint.sidecar or {}, *read_metadata(checkpoint)]
    params = (checkpoint.params or {}).get("quantization") or {}
    nvidia = (checkpoint.nvidia_config or {}).get("quantization") or {}
    facts = {}
    for key, value in walk([*sections, params, nvidia]):
        if isinstance(value, str):
            facts.setdefault(key, set()).add(value)
        if (problem := contradiction(key, value)):
            raise CheckpointError(f"{checkpoint.root / CONFIG_NAME}: {problem}; dequantize this "
                                  "checkpoint with the tool that made it")
    methods = set(facts.get("quant_method", ()))
    methods |= {"modelopt"} if facts_of(nvidia, "quant_algo") else set()
    methods |= {"mistral"} if facts_of(params, "qformat_weight") else set()
    plain = {key: value for key, value in (config or {}).items() if key not in QUANTIZATION_KEYS}
    methods |= {key for key, value in walk(plain) if key in UNKNOWN_METHODS and value}
    counts = {key: {v for k, v in walk(config) if k == key and isinstance(v, int)}
              for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")}
    heads = counts["num_attention_heads"] | counts["num_key_value_heads"]
    sizes = counts["head_dim"] | {size // n for size in counts["hidden_size"]
                                  for n in counts["num_attention_heads"] if n}
    return Evidence(frozenset(methods) or named(""), facts, read_block_sizes(checkpoint, sections),
                    read_int4_groups(sections), frozenset(heads - sizes),
                    read_notes(checkpoint))


def read_metadata(checkpoint: Checkpoint) -> list:
    """Return what the metadata of shards says as configs do (nunchaku)."""
    found = []
    for entries in checkpoint.shards.values():
        for key in QUANTIZATION_KEYS[:2]:
            with suppress(ValueError, RecursionError):
                found.append(json.loads(entries.get(key, "null")))
    return found


def contradiction(key: str, value) -> str | None:
    """Return why weights mean something else than their names and dtypes say, from a config."""
    if not value:
        return None
    if key == "location" and not str(value).startswith("weight_"):
        return "transform_config changes activations at run time"
    if key == "sparsity_structure" and value not in ("dense", "unstructured", "0:0"):
        return "sparsity_config has weights stored without their zeros"
    if key == "swap_weight_nibbles":
        return "swap_weight_nibbles has the codes of a byte in the other order"
    if key in ROTATIONS:
        return f"{key} rotates weights or activations at run time"
    if key == "quant_method" and value == "sdnq":  # Disty0/sdnq src/sdnq/dequantizer.py
        return "sdnq stores weights regrouped, transposed or rotated"
    return None


def facts_of(section, name: str) -> list[str]:
    return [value for key, value in walk(section) if key == name and isinstance(value, str)]


def read_block_sizes(checkpoint: Checkpoint, sections: list) -> tuple[tuple[int, int], ...]:
    sizes = []
    for key, value in walk(sections):
        match key, value:
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
    return sizes


def read_int4_groups(sections: list) -> tuple[int, ...]:
    """Return the group sizes of packed integers, or () if any of them is not symmetric INT4.

    vllm-project/compressed-tensors: each group of layers may have its own format. W8A16 has the
    same tensors as INT4, and its scales have shapes that would fit INT4, too.
    """
    sizes = []
    for section in sections:
        groups = section.get("config_groups") if isinstance(section, dict) else None
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            packing = isinstance(group, dict) and (group.get("format") or section.get("format"))
            if not isinstance(weights, dict) or packing not in (None, "pack-quantized"):
                continue
            symmetric = weights.get("symmetric", True) is True  # as compressed-tensors takes it
            if weights.get("num_bits") != 4 or not symmetric or weights.get("type", "int") != "int":
                return ()
            sizes.append(weights.get("group_size") or 0)
    return tuple(size if isinstance(size, int) and size > 0 else 0 for size in sizes)


def read_notes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the formats that ComfyUI notes, by module.

    A note is JSON, in a tensor of bytes beside the weight or in the metadata of a shard. Raises
    CheckpointError for formats whose scales are stored in tiles or that need more than a scale.
    """
    notes, formats = {}, {}
    known = {method.removeprefix(COMFY) for row in FORMATS for method in row.methods
             if method.startswith(COMFY)}
    try:
        for shard, metadata in checkpoint.shards.items():
            where = checkpoint.root / shard
            layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
            notes |= {module: (where, note) for module, note in layers.items()}
        for tensor in checkpoint.tensors.values():
            if tensor.leaf == "comfy_quant":
                where = tensor.path
                notes[tensor.module] = where, json.loads(read_small(tensor))
        for module, (where, note) in notes.items():
            formats[module] = str(note["format"])
            if formats[module] not in known or note.get("convrot"):
                raise CheckpointError(f"{where}: {module} is in ComfyUI's format "
                                      f"{note['format']}; only {' and '.join(sorted(known))} can "
                                      "be undone with a scale")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: what ComfyUI notes there is not valid") from error
    return formats


def plain_cast(weight: Tensor) -> Quantization:
    """Return how an FP8 weight is read that has no scale: as if it were 1."""
    (grid,), _ = find_grids(weight.shape, (), ())
    return Quantization(PLAIN_CAST, NUMBER_FORMATS[weight.dtype], weight.name, weight.shape, None,
                        grid, packed_cols=grid.cols)


def read_small(tensor: Tensor) -> bytes:
    if (size := tensor.stop - tensor.start) > SMALL_LIMIT:
        raise CheckpointError(f"{tensor.path}: {tensor.name} has {size} bytes; expected at most "
                              f"{SMALL_LIMIT}")
    with naming(tensor.path), open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.stop - tensor.start)


# match: each candidate, its row, its scales


@functools.cache  # Thousands of weights share a few names.
def rows_for(dtype: str, tail: str) -> list[tuple[Format, str, str, str]]:
    """Return the rows that store a tensor of this dtype under a name that ends so.

    Each comes with the stem and the names of the scale and the global scale.
    """
    found = []
    for row in FORMATS:
        pattern = row.weight.replace("{}", r"(?P<stem>[^.]+)")
        if dtype in row.containers and (match := re.fullmatch(pattern, tail, re.DOTALL)):
            stem = match.groupdict().get("stem", "weight")
            names = itertools.zip_longest(row.scale.split(), row.global_scale.split(), fillvalue="")
            found += [(row, stem, scale.replace("{}", stem), factor.replace("{}", stem))
                      for scale, factor in names]
    return found


def counts(row: Format, evidence: Evidence, module: str) -> bool:
    """Return whether the configs let a row count for a weight of a module."""
    methods = evidence.methods | {COMFY + evidence.notes.get(module, "")}
    if evidence.facts.get(SEMANTICS, set()) != dict(row.requires).get(SEMANTICS, set()):
        return False
    return (
        (row.containers <= F8 or not row.methods.isdisjoint(methods))
        and all(not evidence.facts.get(key, set()).isdisjoint(values)
                for key, values in row.requires)
        and all(evidence.facts.get(key, set()) <= values for key, values in row.accepts)
    )


class Match(NamedTuple):
    """A row that fits a weight: what stands before the row's names, their stem, and the scales."""

    row: Format
    head: str
    stem: str
    scale: Tensor
    factor: Tensor | None


def find_matches(weight: Tensor, checkpoint: Checkpoint, evidence: Evidence) -> list[Match]:
    """Return the first row that fits a weight, then those that fit it with another scale."""
    tensors, found = checkpoint.tensors, {}
    head, tail = weight.name.removesuffix(weight.leaf), weight.leaf
    for _ in range(3 if weight.dtype in F8 else 1):
        for row, stem, scale_name, factor_name in rows_for(weight.dtype, tail):
            scale = tensors.get(head + scale_name)
            if scale is None or scale.dtype not in row.scale_dtypes or scale.name in found:
                continue
            factor = tensors.get(head + factor_name) if factor_name else None
            fits = not factor_name or (factor and factor.dtype in FLOATS)
            if fits and counts(row, evidence, weight.module):
                found[scale.name] = Match(row, head, stem, scale, factor)
        if found or not head:
            break
        above, dot, last = head[:-1].rpartition(".")
        head, tail = above + dot, f"{last}.{tail}"
    if len(found) < 2:
        return [*found.values()]
    meant = [match for match in found.values() if match.row.methods & evidence.methods]
    if len(meant) != 1:
        raise CheckpointError(f"{weight.path}: {weight.name} has two scales, "
                              f"{' and '.join(found)}, and {CONFIG_NAME} names no quant_method "
                              "that decides; remove the one that is not meant")
    return meant + [match for match in found.values() if match is not meant[0]]


def quantize(weight: Tensor, match: Match, checkpoint: Checkpoint,
             evidence: Evidence) -> Quantization:
    """Decide shape and grid of a weight. Raises CheckpointError where none or two grids fit."""
    row, head, stem, scale, factor = match
    number_format = row.number_format or NUMBER_FORMATS[weight.dtype]
    shape, packed_cols = shape_of(weight, match, number_format, checkpoint, evidence)
    matrix, first_row = place_in_stack(weight, scale) if row.stacked else (shape, 0)
    grids, problem = grids_of(weight, row, matrix, scale.shape, evidence)
    experts = grids[0].rows // grids[0].slab_rows if grids else 0
    stacked = factor is None or fits_stack(factor, row, experts, shape)
    if len(grids) != 1 or packed_cols % 2 or not stacked:
        named = [f"{tensor.name} {list(tensor.shape)}" for tensor in (scale, factor) if tensor]
        fit = ["no block size fits", "the grid fits, but not the rest", "two grids fit"]
        raise CheckpointError(f"{weight.path}: {weight.name} is {list(shape)} ({number_format}, "
                              f"{evidence}), scaled by {' and '.join(named)}: "
                              f"{fit[min(len(grids), 2)]}{problem}; expected one scale per tensor, "
                              "expert, row, column or block")
    output = head + stem if "{}" in row.weight else weight.name
    wrapped = output == f"{head}weight" != weight.name and head.endswith("_weight.")
    if wrapped and "experts." in head:
        output = head[:-1]  # A parameter that was wrapped in a module of its name (Inkling).
    return Quantization(row, number_format, output, shape, scale, grids[0], factor, first_row,
                        packed_cols or grids[0].cols)


def shape_of(weight: Tensor, match: Match, number_format: str, checkpoint: Checkpoint,
             evidence: Evidence) -> tuple[tuple[int, ...], int]:
    """Return the shape of a weight's values, and how many codes a row of a packed one has."""
    if kernel.FORMATS[number_format].codes_per_byte == 1:
        return weight.shape, 0
    if weight.dtype == "F4":
        return weight.shape, math.prod(weight.shape[-1:])
    packed_cols = 2 * CODE_BYTES[weight.dtype] * math.prod(weight.shape[-1:])
    if weight.dtype != "I32":
        return (*weight.shape[:-1], packed_cols), packed_cols
    if not evidence.int4_groups:
        raise CheckpointError(f"{weight.path}: {weight.name} is packed, and {CONFIG_NAME} does not "
                              "say that all such weights are symmetric with num_bits 4 (others "
                              "have zero points, or fit the same shapes)")
    stored = checkpoint.tensors.get(f"{match.head}{match.stem}_shape")
    return read_shape(weight, stored, packed_cols), packed_cols


def grids_of(weight: Tensor, row: Format, shape: tuple[int, ...], scale_shape: tuple[int, ...],
             evidence: Evidence) -> tuple[list[Grid], str]:
    """Return the grids that a row allows, of which one is right, and why there is none."""
    groups = evidence.int4_groups if weight.dtype == "I32" else row.groups
    if groups:
        grids, problem = find_group_grids(shape, scale_shape, groups, weight.dtype == "I32"), ""
    else:
        grids, problem = find_grids(shape, scale_shape, evidence.block_sizes, row.transposed,
                                    "qkv_proj" in weight.name)
    if row.whole_rows or row.within_rows:
        grids = [grid for grid in grids if grid.block_cols >= grid.cols or (row.within_rows and (
            grid.block_rows == 1 or (grid.block_rows, grid.block_cols) in evidence.block_sizes))]
    rows, cols = math.prod(shape[:-1]), math.prod(shape[-1:])
    tiles = {(32 * ceil_div(rows, 128), 16 * ceil_div(cols, 4 * group)) for group in (16, 32)}
    if not grids and scale_shape in tiles:  # pytorch/ao prototype/mx_formats
        problem = "; they are swizzled, in the order of the GPU's tiles"
    return grids, problem


def read_shape(weight: Tensor, stored: Tensor | None, packed_cols: int) -> tuple[int, ...]:
    """Return the shape of a weight whose rows fill whole int32, which is stored beside it."""
    kind = {"I32": "i", "I64": "q"}.get(stored.dtype) if stored else None
    if kind is None:
        raise CheckpointError(f"{weight.path}: {weight.name} has no weight_shape beside it")
    shape = (*memoryview(read_small(stored)).cast(kind),)
    if shape[:-1] != weight.shape[:-1] or not packed_cols - 8 < shape[-1] <= packed_cols:
        raise CheckpointError(f"{stored.path}: {stored.name} says {list(shape)}, but {weight.name} "
                              f"is {list(weight.shape)}, eight codes in each")
    return shape


def place_in_stack(weight: Tensor, scale: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the shape of the stack whose scales these are, and where in it the weight begins."""
    expert, projection, _ = weight.name.split(".")[-3:]
    parts = 1 if projection in ("down_proj", "w2") else 2
    experts, (rows, cols) = (*scale.shape, 0)[0], (*weight.shape, 0, 0)[:2]
    if int(expert) >= experts or len(weight.shape) != 2:
        raise CheckpointError(f"{weight.path}: {weight.name} is {list(weight.shape)}, and "
                              f"{scale.name} {list(scale.shape)} has no scales for it")
    first_row = (parts * int(expert) + (projection in ("up_proj", "w3"))) * rows
    return (experts, parts * rows, cols), first_row


def fits_stack(factor: Tensor, row: Format, experts: int, shape: tuple[int, ...]) -> bool:
    """Return whether global scales are one, one per expert, or ModelOpt's two, for gate and up."""
    halves = row.global_scale == MODELOPT_GLOBAL and experts > 1 and not shape[-2] % 2
    return math.prod(factor.shape) in (1, experts) or (halves and factor.shape == (experts, 2))


def find_group_grids(shape: tuple[int, ...], scale_shape: tuple[int, ...], groups: tuple[int, ...],
                     exact: bool) -> list[Grid]:
    """Return the grids of groups of columns, 0 for whole rows, that give the scales' shape."""
    *stack, rows, cols = (1, 1, *shape)
    experts, grids = math.prod(stack), []
    for group in dict.fromkeys(group or cols for group in groups):
        if scale_shape == (*shape[:-1], ceil_div(cols, group)) and not (exact and cols % group):
            grids.append(Grid(experts * rows, cols, 1, group, slab_rows=max(1, rows)))
    return grids


@functools.cache  # Thousands of experts have the same shapes.
def find_grids(
    weight_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    block_sizes: tuple[tuple[int, int], ...],
    transposed: bool = False,
    fused: bool = False,
) -> tuple[list[Grid], str]:
    """Return the grids by which scales of one shape may cover a weight of another; one is right.

    A weight is E experts of N rows and K columns; a matrix has E = 1. The first match counts: one
    scale for all; per expert, per row or per column; one of block_sizes; a block size out of
    BLOCK_SIZES on each axis. It is never computed from the shapes: 192 rows over 2 rows of scales
    are blocks of 128, the second cut off, not blocks of 96. Per-row scales of a `transposed` weight
    belong to its columns. The rows of a `fused` weight may consist of equal slices, one for
    each tensor-parallel rank, and blocks start anew in each. If block_sizes are given and none
    fits, only EXACT_BLOCKS are tried. The second result, for an error message, says what was
    expected.
    """
    if len(weight_shape) > 3:  # a convolution: its scales are per tensor or per row
        weight_shape = (weight_shape[0], math.prod(weight_shape[1:]))
    E, N, K = (1, 1, 1, *weight_shape)[-3:]
    if math.prod(scale_shape) == 1 or not E * N * K:
        return [Grid(E * N, K, max(E * N, 1), max(K, 1), slab_rows=max(E * N, 1))], ""
    scale = squeezed(scale_shape, E)
    if len(scale_shape) > 3:  # ModelOpt: [n, 1, k, 1], whose blocks are 128x128
        block_sizes += ((128, 128),)
    row, column, expert = (1, K), (N, 1), (N, K)
    shapes = [((N,), row), ((N, 1), row), ((1, K), column)]
    if E > 1:
        shapes = [((E,), expert), ((E, 1), expert), ((E, 1, 1), expert)]
        shapes += [((E, N), row), ((E, N, 1), row), ((E, K), column), ((E, 1, K), column)]
        if transposed:
            shapes = [((E, K, 1), column)]
    if blocks := {block for shape, block in shapes if shape == scale}:
        return [Grid(E * N, K, *block, slab_rows=N) for block in blocks], ""
    if E > 1:
        scale = scale[1:] if len(scale) == 3 and scale[0] == E else ()
    elif len(scale) == 1:  # a flattened grid of row groups, as auto-round writes it
        scale = (N, scale[0] // N) if not scale[0] % N else ()
    if blocks := fitting_blocks(block_sizes, N, K, scale):
        return [Grid(E * N, K, *block, slab_rows=N) for block in blocks], ""
    if fused and E == 1 and (grids := find_sliced_grids(N, K, scale, block_sizes or ((128, 128),))):
        return grids, ""
    sizes = itertools.product(BLOCK_SIZES, BLOCK_SIZES)
    problem = ""
    if block_sizes:
        sizes = [(rows, cols) for rows, cols in EXACT_BLOCKS if not K % cols]
        rows, cols = block_sizes[0]
        problem = (f"; the config names blocks of {rows}x{cols}, which need "
                   f"{[ceil_div(N, rows), ceil_div(K, cols)]}")
    blocks = fitting_blocks(sizes, N, K, scale)
    if not blocks and fitting_blocks([*block_sizes, (128, 128)], K, N, scale):
        problem += "; they fit the transposed weight"
    return [Grid(E * N, K, *block, slab_rows=N) for block in blocks], problem


def squeezed(shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """Return the shape of scales without the axes of length 1 that writers add."""
    if len(shape) in (4, 5) and shape[-3] == shape[-1] == 1:  # ModelOpt: [n, 1, k, 1]
        shape = (*shape[:-3], shape[-2])
    while len(shape) > 1 and shape[0] == 1 and len(shape) > (3 if experts > 1 else 2):
        shape = shape[1:]
    if experts == 1 and len(shape) == 3 and shape[-1] == 1:  # musubi-tuner: [rows, blocks, 1]
        shape = shape[:-1]
    return shape


def fitting_blocks(sizes: Iterable[tuple[int, int]], N: int, K: int,
                   scale: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the sizes that give this grid; those that differ only past its edges count once."""
    blocks = {}
    for rows, cols in sizes:
        if (ceil_div(N, rows), ceil_div(K, cols)) == scale:
            blocks.setdefault((min(rows, N), min(cols, K)), (rows, cols))
    return [*blocks.values()]


def find_sliced_grids(N: int, K: int, scale: tuple[int, ...],
                      block_sizes: tuple[tuple[int, int], ...]) -> list[Grid]:
    """Return the grids of a weight that was quantized in equal slices of rows (MiMo's qkv_proj)."""
    return [
        Grid(N, K, rows, cols, slab_rows=N // slices)
        for rows, cols in dict.fromkeys(block_sizes)
        for slices in range(2, min(N, MAX_SLICES) + 1)
        if not N % slices
        and (slices * ceil_div(N // slices, rows), ceil_div(K, cols)) == scale
    ]


# account: every tensor of a module whose weight is converted is known


@dataclass(frozen=True)
class Reading:
    """What the tensors of a checkpoint are, by the table of formats.

    weights: by the name of their codes. dropped: what does not reach the output; orphans: those of
    them that are scales of no weight. missing: FP8 weights that have no scale.
    """

    weights: dict[str, Quantization]
    dropped: dict[str, Tensor]
    orphans: list[Tensor]
    missing: list[Tensor]


def read_formats(checkpoint: Checkpoint) -> Reading:
    """Recognize every quantized weight. Raises CheckpointError where anything is not known.

    Of the data nothing is read but zero points, orders of groups, shapes of INT4 weights and
    ComfyUI's notes.
    """
    for name in checkpoint.shards:
        if re.fullmatch(r"model(\d+-mp\d+|-rank-\d+-part-\d+)\.safetensors", name):
            raise CheckpointError(f"{checkpoint.root / name}: one of the slices that "
                                  "tensor-parallel ranks load; convert the checkpoint that they "
                                  "were cut from")
    tensors, evidence = checkpoint.tensors, read_evidence(checkpoint)
    weights, dropped = match(checkpoint, evidence)
    modules = {}
    for tensor in tensors.values():
        modules.setdefault(tensor.module, []).append(tensor)
    if weights or evidence.methods != {""} or any(t.dtype in F8 for t in tensors.values()):
        drop_cache_scales(tensors, modules, evidence, dropped)
    for name, quantization in weights.items():
        account(tensors[name], quantization, modules, weights, dropped)
    outputs = set(tensors)
    for name, quantization in weights.items():
        if quantization.output != name and quantization.output in outputs:
            raise CheckpointError(f"{tensors[name].path}: {name} becomes {quantization.output}, "
                                  "which exists too")
        outputs.add(quantization.output)
    missing, orphans = judge_rest(checkpoint, evidence, weights, dropped)
    dropped |= {tensor.name: tensor for tensor in orphans}
    return Reading(weights, dropped, orphans, missing)


def match(checkpoint: Checkpoint,
          evidence: Evidence) -> tuple[dict[str, Quantization], dict[str, Tensor]]:
    """Return the weights that match a row, by name, and all their scales."""
    weights, scales = {}, {}
    for tensor in checkpoint.tensors.values():
        found = find_matches(tensor, checkpoint, evidence) if tensor.dtype in CONTAINERS else ()
        if found:
            first, *rivals = found
            weights[tensor.name] = quantize(tensor, first, checkpoint, evidence)
            used = [first.scale, first.factor]
            # A rival may be a parameter that is only called `scale`.
            used += [rival.scale for rival in rivals if "weight" in rival.scale.leaf]
            scales.update((scale.name, scale) for scale in used if scale)
    for name in weights.keys() & scales.keys():
        raise CheckpointError(f"{scales[name].path}: {name} is the scale of a weight and has a "
                              "scale itself; no known format stores them so")
    return weights, scales


def drop_cache_scales(tensors: dict[str, Tensor], modules: dict[str, list[Tensor]],
                      evidence: Evidence, dropped: dict[str, Tensor]) -> None:
    """Drop what serves a quantized key-value cache: one scale, or one for each head.

    A parameter may be called so, too (lucidrains/local-attention has a q_scale as long as a head).
    """
    offsets = []
    for tensor in tensors.values():
        if fully(CACHE_SCALE, tensor.leaf):
            count = math.prod(tensor.shape)
            if count in ({0, 1, 2} if tensor.leaf == "scaled_fp8" else {1} | evidence.heads):
                dropped[tensor.name] = tensor
        elif tensor.leaf in CACHE_OFFSET or fully(ATTENTION_ZERO, tensor.leaf):
            offsets.append(tensor)
    for tensor in offsets:
        if tensor.leaf in CACHE_OFFSET:
            beside = {other.leaf for other in modules[tensor.module] if other.name in dropped}
            if CACHE_OFFSET[tensor.leaf] in beside:
                dropped[tensor.name] = tensor
        else:
            require_zero(tensor, bytes(1))
            dropped[tensor.name] = tensor


def account(weight: Tensor, quantization: Quantization, modules: dict[str, list[Tensor]],
            weights: dict[str, Quantization], dropped: dict[str, Tensor]) -> None:
    """Drop the side tensors of a weight. Raises CheckpointError for what would have to be applied.

    If the module is the weight's own, every tensor in it must be known. If the weight is one of
    several parameters, only tensors named like it plus a quantization ending must be.
    """
    stem = quantization.output.removeprefix(weight.module).removeprefix(".")
    own = weight.leaf in ("weight", "weight_packed", "_weight_qdata") and weight.module
    stem = "weight" if own or weight.leaf == "weight" else stem
    sides = side_names(quantization.row, stem)
    beside = [(other, other.leaf) for other in modules[weight.module]]
    for inner in dict.fromkeys((weight.name, quantization.output)):
        beside += [(other, f"{inner[len(weight.module) :].lstrip('.')}.{other.leaf}")
                   for other in modules.get(inner, ()) if inner != weight.module]
    for other, place in beside:
        if other.name in dropped or other.name in weights:
            continue
        if place in sides:
            check_side(other, quantization)
            dropped[other.name] = other
        elif other.leaf in PARAMETERS or place == f"{stem}_bias":
            continue
        elif own or is_continued(place, stem):
            raise CheckpointError(f"{other.path}: {other.name} stands beside {weight.name} "
                                  f"({quantization.row.title}), and no known format has it; it "
                                  "would have to be applied; dequantize this checkpoint with the "
                                  "tool that made it")


@functools.cache
def side_names(row: Format, stem: str) -> frozenset[str]:
    """Return what the side tensors of a row are called beside a weight with this stem."""
    prefixes = {stem.removesuffix("weight") if stem.endswith("weight") else f"{stem}_"}
    prefixes |= {f"{stem}_"} if stem != "weight" else set()
    own = {side.replace("{}", stem) for side in row.sides if "{}" in side}
    own |= {prefix + side for prefix in prefixes for side in row.sides if "{}" not in side}
    return frozenset(own | {f"_{side}" for side in own})  # torchao begins its names so


def is_continued(name: str, stem: str) -> bool:
    """Return whether a name is a stem with an ending of quantization, as `up_proj_zero_point`."""
    name = name.removeprefix("_")
    rest = name[len(stem) + 1 :]
    return name.startswith((stem + "_", stem + ".")) and bool(fully(QUANTIZATION_ENDING, rest))


def check_side(side: Tensor, quantization: Quantization) -> None:
    """Raise CheckpointError for zero points that are not zero and groups that are not in order."""
    if side.leaf.endswith(("zero_point", "_zp")):
        packed = quantization.number_format == "UINT4B8" and side.dtype == "I32"
        require_zero(side, b"\x88" if packed else b"\0")  # packed as the codes are: 8 is zero
    elif side.leaf.endswith("g_idx"):
        kind = {"I32": "i", "I64": "q"}.get(side.dtype)
        groups = [*memoryview(read_small(side)).cast(kind)] if kind else [1, 0]
        in_order = [col // quantization.grid.block_cols for col in range(len(groups))]
        if groups not in (in_order, [-1] * len(groups)):
            raise CheckpointError(f"{side.path}: {side.name} reorders the groups of columns; that "
                                  "is not supported")


def require_zero(tensor: Tensor, zero: bytes) -> None:
    if read_small(tensor).strip(zero):
        raise CheckpointError(f"{tensor.path}: {tensor.name} is not all zero; asymmetric formats "
                              "are not supported")


def judge_rest(checkpoint: Checkpoint, evidence: Evidence, weights: dict[str, Quantization],
               dropped: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return FP8 weights without a scale and scales without a weight among what matched no row.

    Raises CheckpointError for whatever else looks quantized: it would be left half converted.
    """
    rest = [tensor for name, tensor in checkpoint.tensors.items()
            if name not in weights and name not in dropped]
    rest.sort(key=lambda tensor: is_scale(tensor.leaf))  # An error is to name the weight.
    names, missing = sorted(checkpoint.tensors), []
    strange = bool(evidence.methods - {"fp8", ""})
    unknown_method = bool(evidence.methods - KNOWN_METHODS)
    for tensor in rest:
        integers = tensor.dtype in INTEGERS and len(tensor.shape) > 1
        codes = tensor.dtype in F8 or integers or (
            tensor.dtype in INTEGERS and tensor.leaf == "weight")
        partner = find_partner(tensor, names, dropped) if codes else None
        name = CODES_OR_WEIGHT_NAME if strange else CODES_NAME
        like_codes = integers and tensor.dtype[1:] != "16" and bool(fully(name, tensor.leaf))
        unknown = integers and unknown_method and not fully(TABLE_NAME, tensor.leaf)
        noted = tensor.dtype == "U8" and tensor.module in evidence.notes and integers
        if partner or like_codes or unknown or noted:
            beside = f", beside {partner}" if partner else ""
            hint = "" if tensor.dtype in F8 else "only the config could tell what it means; "
            stored = f"; {partner} is {checkpoint.tensors[partner].dtype}" if partner else ""
            raise CheckpointError(f"{tensor.path}: {tensor.name} ({tensor.dtype}{beside}) looks "
                                  f"quantized, in no format known here ({evidence}){stored}; "
                                  f"{hint}dequantize this checkpoint with the tool that made it")
        if tensor.dtype in STRANGE_DTYPES:
            raise CheckpointError(f"{tensor.path}: {tensor.name} is {tensor.dtype}, "
                                  f"{STRANGE_DTYPES[tensor.dtype]}, in no format known here "
                                  f"({evidence}); dequantize this checkpoint with the tool that "
                                  "made it")
        if tensor.dtype in F8:
            if tensor.leaf in ALL_SIDES:
                raise CheckpointError(f"{tensor.path}: {tensor.name} is {tensor.dtype}, but named "
                                      "like what serves a quantized weight, and there is none")
            missing.append(tensor)
    return missing, find_orphans(rest, missing)


def find_orphans(rest: list[Tensor], missing: list[Tensor]) -> list[Tensor]:
    """Return the scales of no weight that no model has as a parameter.

    Raises CheckpointError for one in whose module FP8 weights have no scale: it must be theirs.
    """
    orphans, without = [], sorted(tensor.name for tensor in missing)
    for tensor in rest:
        if tensor.dtype in F8 or not fully(ORPHAN_LEAF, tensor.leaf):
            continue
        inside = tensor.module + "."
        at = bisect_left(without, inside)
        if tensor.module and at < len(without) and without[at].startswith(inside):
            raise CheckpointError(f"{tensor.path}: {tensor.name} is a scale of no weight, while "
                                  f"{without[at]} is FP8 and has none; no known format stores them "
                                  "so; dequantize this checkpoint with the tool that made it")
        if tensor.leaf.endswith(DROPPED_ORPHANS):
            orphans.append(tensor)
    return orphans


def find_partner(weight: Tensor, names: list[str], dropped: dict[str, Tensor]) -> str | None:
    """Return a tensor that is named like the scale of a weight, by whatever convention.

    Its name is the weight's, with or without the ending for codes, followed by words about scales
    only. One such word among others is not enough (`scale_shift_table`).
    """
    for base in dict.fromkeys((CODES_ENDING.sub("", weight.name), weight.name)):
        for start in (f"{base}.", f"{base}_") if base else ("",):
            for at in range(bisect_left(names, start), len(names)):
                if not names[at].startswith(start):
                    break
                rest = names[at].removeprefix(start)
                goes_on = f"{base}.{rest}".startswith(f"{weight.module}.weight.scale")
                known = names[at] in dropped or names[at] == weight.name
                if (goes_on or is_scale(rest)) and not known:
                    return names[at]
    return None


@functools.cache
def is_scale(text: str) -> bool:
    words = {*re.split(r"[._]+", text.lower().strip("._"))}
    known = SCALE_WORDS | OTHER_WORDS | {"2"}
    words = {word if word in known else word.rstrip("0123456789") for word in words}
    return not words.isdisjoint(SCALE_WORDS) and words <= known


# --- plan: what every byte of the output will be ---

# The order in which safetensors' own writer lays out tensors: larger elements first, so that every
# tensor is aligned to its element size. Within a dtype they stand by name.
DTYPE_NAMES = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 "
    "I8 U8 F6_E3M2 F6_E2M3 F4 BOOL"
)
DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_NAMES.split())}
DATA_ALIGNMENT = 64  # Bytes: GPUs load 16 at once where all tensors start at a multiple of that.
FINGERPRINT_KEY = "fp8_cast_bf16"
NO_FINGERPRINT = "0" * 16  # Stands in a planned header until the shard is written.
MISSING_SCALE = ["keep", "cast", "error"]


class Step(NamedTuple):
    """One tensor of an output shard: a copy of source, or its values if it is quantized."""

    output: Tensor
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
        return self.steps[-1].output.stop

    def sealed(self, fingerprint: str) -> bytes:
        """Return the header with a fingerprint."""
        entry = f'"{FINGERPRINT_KEY}":"{NO_FINGERPRINT}"'.encode()
        sealed = entry.replace(NO_FINGERPRINT.encode(), fingerprint.encode())
        return self.header.replace(entry, sealed)


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do: the shards to write, and what the input's tensors are."""

    checkpoint: Checkpoint
    shards: list[Shard]
    reading: Reading
    missing_scale: str

    @property
    def steps(self) -> Iterator[Step]:
        return (step for shard in self.shards for step in shard.steps)

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


def make_plan(checkpoint: Checkpoint, missing_scale: str = "keep") -> Plan:
    """Decide what becomes of every tensor.

    missing_scale: what to do with an FP8 weight without a scale: "keep" it as it is, "cast" it with
    scale 1, or raise an "error". Raises CheckpointError where the rules do not decide.
    """
    reading = read_formats(checkpoint)
    weights, missing = dict(reading.weights), reading.missing
    if missing and missing_scale == "error":
        raise CheckpointError(f"{missing[0].path}: {missing[0].name} has no scale, one of "
                              f"{len(missing)} weights; --missing-scale keep leaves them FP8, "
                              "cast takes their scale as 1")
    if missing_scale == "cast":
        weights |= {weight.name: plain_cast(weight) for weight in missing}
    kept = {name: [] for name in checkpoint.shards}
    for tensor in checkpoint.tensors.values():
        if tensor.name not in reading.dropped:
            kept[tensor.path.name].append(tensor)
    if not any(kept.values()):
        raise CheckpointError(f"{checkpoint.root}: holds no tensors; give the checkpoint's folder")
    shards = [plan_shard(name, checkpoint.shards[name], members, weights)
              for name, members in kept.items() if members]
    return Plan(checkpoint, shards, reading, missing_scale)


def plan_shard(name: str, metadata: dict[str, str], tensors: list[Tensor],
               weights: dict[str, Quantization]) -> Shard:
    """Lay out an output shard in the order in which safetensors.torch.save_file would."""
    steps = []
    for tensor in tensors:
        quantization, size = weights.get(tensor.name), tensor.stop - tensor.start
        output = tensor._replace(path=Path(name), start=0, stop=size)
        if quantization:
            module, _, leaf = quantization.output.rpartition(".")
            output = Tensor(quantization.output, module, leaf, "BF16", quantization.shape,
                            Path(name), 0, 2 * math.prod(quantization.shape))
        steps.append(Step(output, tensor, quantization))
    steps.sort(key=lambda step: (DTYPE_ORDER[step.output.dtype], step.output.name))
    offsets = [*itertools.accumulate((step.output.stop for step in steps), initial=0)]
    own = {"format": "pt", FINGERPRINT_KEY: NO_FINGERPRINT}
    header = {"__metadata__": dict(sorted({**plain_metadata(metadata), **own}.items()))}
    for step, place in zip(steps, pairwise(offsets), strict=True):
        header[step.output.name] = {"dtype": step.output.dtype, "shape": step.output.shape,
                                    "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    longest = max((size for step in steps for size in step.output.shape), default=0)
    if len(text) > HEADER_LIMIT or longest >= 1 << 63:
        raise CheckpointError(f"{tensors[0].path}: its header or a tensor would be longer in BF16 "
                              "than safetensors allows")
    text = len(text).to_bytes(8, "little") + text
    return Shard(name, text, [
        step._replace(output=step.output._replace(start=len(text) + start, stop=len(text) + stop))
        for step, (start, stop) in zip(steps, pairwise(offsets), strict=True)
    ])


def find_apart_experts(plan: Plan) -> str | None:
    """Return a weight of one expert where the architecture's own checkpoints have them in one."""
    kinds = {value for key, value in walk(plan.checkpoint.config) if key == "model_type"
             and isinstance(value, str)}
    apart = "" if kinds & {"gpt_oss", "llama4", "llama4_text"} else None
    apart = "w[123]" if "mixtral" in kinds else apart
    pattern = re.compile(rf".*experts\.\d+\.(?!({apart})\b).*\.weight" if apart else
                         r".*experts\.\d+\..*", re.DOTALL)
    names = (step.output.name for step in plan.steps) if apart is not None else ()
    return next((name for name in names if pattern.fullmatch(name)), None)


def plain_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Return a shard's metadata without what only a reader of quantized tensors needs.

    pytorch/ao prototype/safetensors describes each tensor by JSON with a _type.
    """
    return {key: text for key, text in metadata.items()
            if key not in [*QUANTIZATION_KEYS, "tensor_names"] and '"_type"' not in text}


class Ranks(NamedTuple):
    """Which of several processes this is, in all and on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def shards_of_rank(shards: list[Shard], rank: int, ranks: int) -> list[Shard]:
    """Return the shards that one of several ranks writes.

    Largest first, each goes to the rank that has the least so far. All planned shards are divided,
    whatever is there already, so that ranks which look at different times agree.
    """
    loads, mine = [0] * ranks, []
    for shard in sorted(shards, key=lambda shard: (-shard.size, shard.name)):
        least = loads.index(min(loads))
        loads[least] += shard.size
        if least == rank:
            mine.append(shard)
    return mine


# --- render: the bytes [start, stop) of one planned shard ---

PAGE = 4096  # The alignment that direct I/O asks of offsets, lengths and memory.
OPEN_FILES = 8  # A worker holds at most so many files open: its shard and those of scales.
NONFINITE = ["NaN", "infinite"]
PHASES = ["reading", "decoding", "writing", "syncing"]


def page_aligned(size: int, pinned: bool) -> torch.Tensor:
    """Return a uint8 tensor that starts on a page, in pinned memory if a GPU is to copy from it."""
    # Pinned memory is page-aligned already, and torch rounds its size up to a power of two: asking
    # for one more page could double it.
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


class Worker:
    """What one thread needs to render windows: buffers, open files, a GPU stream, and counts.

    nonfinite: how many values of a weight are of one of the kinds NONFINITE.
    """

    def __init__(self, device: torch.device, window: int):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.out = page_aligned(window, self.stream is not None)
        self.memory, self.files = {}, {}
        self.nonfinite = Counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def timed(self, phase: str):
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def scratch(self, name: str, size: int) -> torch.Tensor:
        """Return memory that is used again, since new memory costs more than filling it."""
        if len(self.memory.get(name, ())) < size:
            self.memory[name] = page_aligned(ceil_div(size, PAGE) * PAGE, self.stream is not None)
        return self.memory[name][:size]

    def read(self, path: Path, start: int, into: torch.Tensor) -> torch.Tensor:
        """Fill a uint8 tensor with the bytes of a file from `start` on, and return it."""
        with self.timed("reading"), naming(path):
            if path not in self.files:
                if len(self.files) >= OPEN_FILES:
                    self.close()
                self.files[path] = open_raw(path, "rb")
            file, view = self.files[path], as_bytes(into)
            file.seek(start)
            while view:
                size = file.readinto(view)
                if not size:
                    raise CheckpointError(f"{path}: ends at byte {path.stat().st_size}; it was cut")
                view = view[size:]
        return into

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


def run_workers(doing: str, pool: list[Worker], tasks: Iterable[tuple], work: Callable,
                total: int, quiet: bool = False) -> None:
    """Run every worker in a thread of its own until no task is left or one has failed.

    A task is the arguments of `work` after the worker, a shard first. `work` returns how many of
    the `total` bytes it has done. torch's own threads are off: they would wait for each other at
    the end of every operation, on cores that the reads and writes of other workers keep busy.
    """
    lock, stopped, tasks = threading.Lock(), threading.Event(), iter(tasks)
    threads = torch.get_num_threads()
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=quiet or None)

    def loop(worker: Worker) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        while True:
            with lock:
                task = None if stopped.is_set() else next(tasks, None)
            if task is None:
                break
            size = work(worker, *task)
            with lock:
                bar.set_description(printable(f"{doing} {task[0].name}"), refresh=False)
                bar.update(size)

    executor = ThreadPoolExecutor(len(pool))
    try:
        for future in as_completed([executor.submit(loop, worker) for worker in pool]):
            future.result()
    finally:
        stopped.set()
        executor.shutdown()
        bar.close()
        torch.set_num_threads(threads)
        for worker in pool:
            worker.close()


def steps_between(shard: Shard, start: int, stop: int) -> list[Step]:
    first = bisect_right(shard.steps, start, key=lambda step: step.output.stop)
    return shard.steps[first : bisect_left(shard.steps, stop, key=lambda step: step.output.start)]


def render(shard: Shard, header: bytes, start: int, stop: int, worker: Worker) -> torch.Tensor:
    """Return the bytes [start, stop) of a shard, uint8, in the worker's buffer."""
    out = worker.out[: stop - start]
    head = header[start:stop]
    as_bytes(out)[: len(head)] = head
    for step in steps_between(shard, start, stop):
        begin, end = max(step.output.start, start), min(step.output.stop, stop)
        into = out[begin - start : end - start]
        if step.quantization is None:
            worker.read(step.source.path, step.source.start + begin - step.output.start, into)
        else:
            begin, end = (begin - step.output.start) // 2, (end - step.output.start) // 2
            render_weight(step, begin, end, into.view(torch.bfloat16), worker)
    return out


def render_weight(step: Step, start: int, stop: int, out: torch.Tensor, worker: Worker) -> None:
    """Fill `out`, bfloat16, with the elements [start, stop) of a weight."""
    quantization = step.quantization
    grid, at, first_row = quantization.grid, 0, quantization.first_row
    limit = kernel.MAX_PIECE if worker.stream is None else len(worker.out) // 2
    for row, col, M, N in pieces(start, stop, grid.cols, limit):
        codes = read_codes(step, row, col, M, N, worker)
        region = grid.scale_region(first_row + row, col, M, N)
        scales = read_scales(quantization, region, worker)
        values = out[at : at + M * N].view(M, N)
        place = quantization.number_format, grid, first_row + row, col, quantization.row.inverse
        with worker.timed("decoding"):
            counts = decode(codes, scales, values, place, worker)
        for kind, count in zip(NONFINITE, counts, strict=True):
            if count:
                worker.nonfinite[step.output.name, kind] += count
        at += M * N


def decode(codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, place: tuple,
           worker: Worker) -> list[int]:
    """Dequantize a piece where the worker's device is; return the counts of NONFINITE."""
    *_, divide = place
    if worker.stream is None or divide:
        return kernel.dequantize(codes, scales, values, *place).tolist()
    with torch.cuda.stream(worker.stream):
        codes, scales = (t.to(worker.device, non_blocking=True) for t in (codes, scales))
        result = torch.empty_like(values, device=worker.device)
        counts = kernel.dequantize(codes, scales, result, *place)
        values.copy_(result, non_blocking=True)
        return counts.tolist()  # Waits for the stream, so the buffers are free again.


def read_codes(step: Step, row: int, col: int, M: int, N: int, worker: Worker) -> torch.Tensor:
    """Return the codes of a piece as kernel.dequantize takes them: (M, bytes) uint8."""
    per_byte = kernel.FORMATS[step.quantization.number_format].codes_per_byte
    row_bytes = step.quantization.packed_cols // per_byte
    first, last = col // per_byte, ceil_div(col + N, per_byte)
    width = last - first if M == 1 else row_bytes
    codes = worker.scratch("codes", M * width)
    return worker.read(step.source.path, step.source.start + row * row_bytes + first,
                       codes).view(M, width)


def read_scales(quantization: Quantization, region: tuple[int, int, int, int],
                worker: Worker) -> torch.Tensor:
    """Return a region of a weight's scales (Grid.scale_region), a float32 matrix on the CPU.

    Global scales are applied here, in float32, before the codes meet either: the order in which
    ModelOpt and compressed-tensors dequantize. Raises CheckpointError for negative scales of NVFP4.
    """
    scale, factor, grid = quantization.scale, quantization.global_scale, quantization.grid
    if scale is None:
        return torch.ones(1, 1)
    top, bottom, left, right = region
    rows, cols = grid.scale_shape
    count = (bottom - top) * (right - left)
    scales = read_elements(scale, top * cols + left, count, worker)
    if scale.dtype == "F8_E4M3" and (scales < 0).any():
        raise CheckpointError(f"{scale.path}: {scale.name} holds negative scales of groups; a "
                              "format that keeps something else in their sign is not known here")
    scales = scales.view(bottom - top, right - left)
    if factor is None:
        return scales
    count = math.prod(factor.shape)  # each for as many rows: all, an expert's, or half of those
    which = torch.arange(top, bottom) // (rows // count)
    factors = read_elements(factor, 0, count, worker)[which].view(-1, 1)
    return scales / factors if quantization.row.divides else scales * factors


def read_elements(scale: Tensor, first: int, count: int, worker: Worker) -> torch.Tensor:
    """Return `count` scales from the one numbered `first` on, as float32."""
    size = (scale.stop - scale.start) // math.prod(scale.shape)
    raw = torch.empty(count * size, dtype=torch.uint8)
    worker.read(scale.path, scale.start + first * size, raw)
    return kernel.widen_scales(raw, scale.dtype)


# --- write: windows under a temporary name, then the final one ---

WINDOW = 16 << 20
TEMPORARY_SUFFIX = ".tmp"
PROBE = "fp8_cast_bf16"  # A temporary file that finds out how to write.
NAME_LIMIT = 255  # Bytes, on most file systems.
DIRECT = getattr(os, "O_DIRECT", 0)
NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}  # File systems refuse it with these.


def temporary(path: Path, fingerprint: str = "") -> Path:
    """Return the name under which a file is written until it is whole."""
    name = f"{path.name}.{fingerprint}" if fingerprint else path.name
    if len(os.fsencode(name)) > NAME_LIMIT - len(TEMPORARY_SUFFIX):
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(name + TEMPORARY_SUFFIX)


def direct_flag(root: Path) -> int:
    """Return O_DIRECT where this folder's file system takes it, else 0.

    Direct writes skip the page cache; writing through it takes 2.5 to 4 times as long for files
    larger than the cache. Where they are refused (tmpfs, some network file systems), plain writes
    take their place.
    """
    probe = temporary(root / f"{PROBE}{os.getpid()}")
    try:
        with naming(probe), open_raw(probe, "r+b", DIRECT | os.O_CREAT) as file:
            file.write(as_bytes(page_aligned(PAGE, False)))
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
        return 0
    finally:
        probe.unlink(missing_ok=True)
    return DIRECT


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, where the system supports it."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            with naming(folder):
                os.fsync(number)
        finally:
            os.close(number)


class Output:
    """The shards being written, in windows that come in any order."""

    def __init__(self, shards: list[Shard], root: Path):
        self.shards, self.root, self.direct = shards, root, direct_flag(root)
        self.lock = threading.Lock()
        self.begun = {shard.name: threading.Lock() for shard in shards}
        self.left = {shard.name: ceil_div(shard.size, WINDOW) for shard in shards}
        self.headers, self.paths = {}, {}

    def windows(self) -> Iterator[tuple[Shard, int, int]]:
        for shard in sorted(self.shards, key=lambda shard: -shard.size):
            for start in range(0, shard.size, WINDOW):
                yield shard, start, min(start + WINDOW, shard.size)

    def begin(self, worker: Worker, shard: Shard) -> None:
        """Create the file of a shard, unless another worker has."""
        with self.begun[shard.name]:
            if shard.name not in self.paths:
                fingerprint = fingerprint_of(shard, worker)
                path = temporary(self.root / shard.name, fingerprint)
                with naming(path), open_raw(path, "r+b", os.O_CREAT) as file:
                    self.headers[shard.name] = shard.sealed(fingerprint)
                    self.paths[shard.name] = path
                    file.truncate(shard.size)

    def write(self, worker: Worker, shard: Shard, start: int, stop: int) -> int:
        """Render a window and write it."""
        self.begin(worker, shard)
        render(shard, self.headers[shard.name], start, stop, worker)
        view, path = as_bytes(worker.out)[: stop - start], self.paths[shard.name]
        # Direct writes are of whole pages, and a shard must never be longer than planned.
        direct = self.direct if len(view) % PAGE == 0 else 0
        with (worker.timed("writing"), self.overtaken(shard), naming(path),
              open_raw(path, "r+b", direct) as file):
            file.seek(start)
            while view:
                view = view[file.write(view) :]
        with self.lock:
            self.left[shard.name] -= 1
            whole = not self.left[shard.name]
        if whole:
            self.finish(worker, shard)
        return stop - start

    @contextmanager
    def overtaken(self, shard: Shard):
        """Ignore that a temporary file is gone if another job has already finished its shard."""
        try:
            yield
        except FileNotFoundError:
            if not has_header(self.root / shard.name, shard, self.headers[shard.name]):
                raise

    def finish(self, worker: Worker, shard: Shard) -> None:
        """Make a whole shard durable and give it its name.

        If its file is gone, another job with the same input has given it the name.
        """
        path, final = self.paths[shard.name], self.root / shard.name
        with self.overtaken(shard):
            with worker.timed("syncing"), naming(path), open_raw(path, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(path, final)
        del self.paths[shard.name]

    def discard(self) -> None:
        """Remove the shards that are not whole."""
        for path in self.paths.values():
            path.unlink(missing_ok=True)


def write_shards(shards: list[Shard], root: Path, pool: list[Worker], quiet: bool) -> None:
    """Write shards into the folder `root`, each under its name once it is whole."""
    output = Output(shards, root)
    try:
        size = sum(shard.size for shard in shards)
        run_workers("writing", pool, output.windows(), output.write, size, quiet)
    finally:
        if not quiet:  # Another job may be writing the same file for the same rank.
            output.discard()
    sync_folder(root)


# --- check: whether a shard is this input's, whether values are plausible, and --verify ---

READING_VERSION = 1  # Raise it when the same tensors and row give new values.
PLAUSIBLE = 1e-6, 4.0  # Root mean squares of weights.
PLAUSIBLE_CAST = 1e-6, 32.0  # Embeddings, norms, and plain casts, which hold both.
SAMPLED_WEIGHTS, SAMPLED_BYTES = 5, 64 << 10
REFERENCE_PIECE = 1 << 20  # Elements that a worker compares at once.
REFERENCE_DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "INT8": torch.int8}
REFERENCE_SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
                    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
                    "U8": torch.float8_e8m0fnu}
REFERENCE_NIBBLES = {  # What each of 16 codes means.
    "E2M1": [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
    "INT4": [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1],
    "UINT4B8": range(-8, 8),
}


def sources_of(step: Step) -> list[Tensor]:
    reading = step.quantization
    scales = [reading.scale, reading.global_scale] if reading else []
    return [tensor for tensor in (step.source, *scales) if tensor]


def describe(quantization: Quantization | None) -> tuple:
    """Return everything that decides how codes become values, but for the tensors themselves."""
    if quantization is None:
        return ()
    row, number_format, output, shape, scale, grid, factor, first_row, packed_cols = quantization
    operations = row.title, row.divides, row.inverse
    names = [tensor and (tensor.name, tensor.dtype, tensor.shape) for tensor in (scale, factor)]
    return (*operations, number_format, output, shape, grid, first_row, packed_cols, *names)


def fingerprint_of(shard: Shard, worker: Worker) -> str:
    """Return 16 hex digits that tell an input shard from others with the same header.

    They depend on how every tensor is read and on three whole pages of each that goes into the
    shard: first, middle and last. A fine-tune may leave 98% of the codes as they were.
    """
    digest, places = hashlib.sha256(f"{READING_VERSION}".encode()), set()
    for step in shard.steps:
        reading = step.quantization
        digest.update(repr((step.output, describe(reading))).encode())
        for tensor in sources_of(step):
            middle = (tensor.start + tensor.stop) // 2
            for start in (tensor.start, middle, tensor.stop - PAGE):
                start = max(start, tensor.start)
                if start < tensor.stop:
                    places.add((tensor.path, start, min(start + PAGE, tensor.stop)))
    for path, start, stop in sorted(places):
        page = worker.read(path, start, worker.scratch("page", stop - start))
        digest.update(as_bytes(page))
    return digest.hexdigest()[:16]


def has_header(path: Path, shard: Shard, header: bytes) -> bool:
    """Return whether a file has a shard's size and begins with a header."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.size:
        return False
    with naming(path), open(path, "rb") as file:
        return file.read(len(header)) == header


def is_ours(path: Path) -> bool:
    """Return whether a file carries a fingerprint: only such are ever replaced."""
    with naming(path), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, HEADER_LIMIT))
    return f'"{FINGERPRINT_KEY}":"'.encode() in text


def find_implausible(plan: Plan) -> list[str]:
    """Return a line for each kind of weight whose sampled values are not those of a weight.

    A misread format (an inverse scale that is multiplied, exponents read as numbers, a divisor used
    as a factor) is wrong by orders of magnitude, in every weight of its kind. What this cannot see:
    scales in tiles, the order of nibbles, and factors below a hundred.
    """
    kinds = {}
    for step in plan.steps:
        if step.quantization:
            kinds.setdefault(kind_of(step), []).append(step)
    worker, found = Worker(torch.device("cpu"), 0), []
    for kind, steps in kinds.items():
        leaves = {step.output.name.rpartition(".")[0].rpartition(".")[2]: step for step in steps}
        chosen = [*leaves.values(), *steps[:: max(1, len(steps) // SAMPLED_WEIGHTS)]]
        samples = [(step, *sample(step, worker)) for step in chosen[:SAMPLED_WEIGHTS]]
        samples = [entry for entry in samples if entry[1] != 0]
        if not samples:
            continue
        rms = statistics.median(entry[1] for entry in samples)
        if any(math.isnan(entry[1]) for entry in samples):
            rms = math.nan
        name = samples[0][0].source.name
        wide = steps[0].quantization.scale is None or re.search("embed|shared|wte|norm", name)
        low, high = PLAUSIBLE_CAST if wide else PLAUSIBLE
        hint = ("usually an inverse scale, raw codes or a missing second scale; --verify reads the "
                "format the same way and cannot see it")
        if not low <= rms <= high:
            found.append(f"{kind}: {name} and others have a root mean square of {rms:.3g}, "
                         f"expected {low:g} to {high:g}: {hint}")
        elif steps[0].quantization.scale and all(entry[2] for entry in samples):
            found.append(f"{kind}: the scales of {name} and others are all 1: {hint}")
    worker.close()
    return found


def sample(step: Step, worker: Worker) -> tuple[float, bool]:
    """Return the root mean square of values from the middle of a weight, and whether all their
    scales are 1.
    """
    reading = step.quantization
    total = math.prod(reading.shape)
    if not total:
        return 0.0, False
    cols = reading.grid.cols
    count = min(total, SAMPLED_BYTES * kernel.FORMATS[reading.number_format].codes_per_byte)
    start = (total - count) // 2
    start -= start % cols if cols <= count else 0  # so that the piece is of whole rows
    row, col, M, N = next(pieces(start, start + count, cols, count))
    region = reading.grid.scale_region(reading.first_row + row, col, M, N)
    scales = read_scales(reading, region, worker)
    out = torch.empty(M * N, dtype=torch.bfloat16)
    begin = row * reading.grid.cols + col
    render_weight(step, begin, begin + M * N, out, worker)
    return out.double().square().mean().sqrt().item(), bool((scales == 1).all())


def find_differences(plan: Plan, out: Path, texts: dict[str, str], workers: int,
                     ranks: Ranks) -> list[str]:
    """Return a line for each difference between an output, whoever made it, and the plan.

    How tensors are spread over shards is free, and so are the order and padding of headers, the
    fingerprint, and the payload of a NaN. Each rank looks at the values of its own shards, and
    rank 0 at the rest.
    """
    result = load_checkpoint(out, consistent=False)
    comparable, found = compare_headers(plan, result)
    if ranks.rank == 0:
        found += differing_texts(result, texts, plan.checkpoint.index_name)
    else:
        found = []
    mine = shards_of_rank(plan.shards, ranks.rank, ranks.count)
    first, lock = {}, threading.Lock()  # The first difference of each tensor.

    def compare(worker: Worker, shard: Shard, step: Step, piece: tuple[int, ...]) -> int:
        difference = compare_piece(step, comparable[step.output.name], piece, worker)
        if difference:
            with lock:
                name = step.output.name
                first[name] = min(first.get(name, difference), difference)
        return piece[2] * piece[3] * element_size(step.output)

    steps = [(shard, step) for shard in mine for step in shard.steps
             if step.output.name in comparable]
    tasks = ((shard, step, piece) for shard, step in steps for piece in
             pieces(0, math.prod(step.output.shape), cols_of(step), REFERENCE_PIECE))
    pool = [Worker(torch.device("cpu"), 0) for _ in range(workers)]
    size = sum(step.output.stop - step.output.start for _, step in steps)
    run_workers("verifying", pool, tasks, compare, size, ranks.rank > 0)
    for name, (element, got, expected) in sorted(first.items()):
        place = torch.unravel_index(torch.tensor(element), comparable[name].shape)
        found.append(f"{name}: element {[at.item() for at in place]} is {got}, expected {expected}")
    return found


def cols_of(step: Step) -> int:
    return step.quantization.grid.cols if step.quantization else math.prod(step.output.shape)


def element_size(tensor: Tensor) -> int:
    return (tensor.stop - tensor.start) // max(1, math.prod(tensor.shape)) or 1


def compare_headers(plan: Plan, result: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of an output that are of the planned dtype and shape, and what differs."""
    planned = {step.output.name: step.output for step in plan.steps}
    found = [f"{name}: is missing" for name in planned if name not in result.tensors]
    found += [f"{name}: is not expected, in {tensor.path.name}"
              for name, tensor in result.tensors.items() if name not in planned]
    comparable = {name: tensor for name, tensor in result.tensors.items() if name in planned}
    for name, tensor in list(comparable.items()):
        expected = planned[name]
        if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
            del comparable[name]
            found.append(f"{name}: is {tensor.dtype} {list(tensor.shape)}, expected "
                         f"{expected.dtype} {list(expected.shape)}")
    return comparable, found


def compare_piece(step: Step, tensor: Tensor, piece: tuple[int, ...],
                  worker: Worker) -> tuple[int, str, str] | None:
    """Return the first element that differs in a piece of a tensor, and how both read, or None."""
    row, col, M, N = piece
    start, size = row * cols_of(step) + col, element_size(tensor)
    got = worker.read(tensor.path, tensor.start + start * size,
                      worker.scratch("got", M * N * size)).view(-1, size)
    if step.quantization is None:
        expected = worker.read(step.source.path, step.source.start + start * size,
                               worker.scratch("expected", M * N * size)).view(-1, size)
        differs = (got != expected).any(1)
        read = lambda data: f"0x{bytes(data.tolist()[::-1]).hex()}"  # noqa: E731
    else:
        got = got.flatten().view(torch.bfloat16)
        expected = reference(step, row, col, M, N, worker).flatten()
        differs = got.view(torch.int16) != expected.view(torch.int16)
        differs &= ~(got.isnan() & expected.isnan())
        read = lambda value: str(value.item())  # noqa: E731
    if not differs.any():
        return None
    at = differs.nonzero()[0].item()
    return start + at, read(got[at]), read(expected[at])


def reference(step: Step, row: int, col: int, M: int, N: int, worker: Worker) -> torch.Tensor:
    """Return a piece of a weight by the definition of its format, (M, N) bfloat16.

    It is torch's own cast of the codes to float32, or a table of 16 values, times the scale of each
    element, rounded to BF16. Nothing of kernel.py is used but the numbers of the grid.
    """
    reading = step.quantization
    grid, name = reading.grid, reading.number_format
    per_byte = 2 if name in REFERENCE_NIBBLES else 1
    begin = row * reading.packed_cols + col
    end = (row + M - 1) * reading.packed_cols + col + N
    raw = worker.read(step.source.path, step.source.start + begin // per_byte,
                      worker.scratch("codes", ceil_div(end, per_byte) - begin // per_byte))
    if per_byte == 2:
        nibbles = torch.stack([raw & 15, raw >> 4], 1).flatten()[begin % 2 :][: end - begin]
        values = torch.tensor([*REFERENCE_NIBBLES[name]]).float()[nibbles.int()]
    else:
        values = raw.view(REFERENCE_DTYPES[name]).float()
    values = values.as_strided((M, N), (reading.packed_cols, 1))
    if reading.scale is None:
        return values.bfloat16()
    rows = torch.arange(row, row + M) + reading.first_row
    slabs = rows // grid.slab_rows
    rows = rows % grid.slab_rows // grid.block_rows
    rows += slabs * ceil_div(grid.slab_rows, grid.block_rows)
    cols = torch.arange(col, col + N) // grid.block_cols
    scales = reference_scales(reading, rows[0].item(), rows[-1].item() + 1, worker)
    scales = scales[rows - rows[0]].index_select(1, cols)
    return (values / scales if reading.row.inverse else values * scales).bfloat16()


def reference_scales(reading: Quantization, top: int, bottom: int, worker: Worker) -> torch.Tensor:
    """Return whole rows [top, bottom) of a weight's scales, float32."""

    def read(tensor: Tensor, first: int, count: int) -> torch.Tensor:
        size = element_size(tensor)
        raw = torch.empty(count * size, dtype=torch.uint8)
        worker.read(tensor.path, tensor.start + first * size, raw)
        return raw.view(REFERENCE_SCALES[tensor.dtype]).float()

    width = ceil_div(reading.grid.cols, reading.grid.block_cols)
    scales = read(reading.scale, top * width, (bottom - top) * width).view(-1, width)
    if reading.global_scale is None:
        return scales
    factors = read(reading.global_scale, 0, math.prod(reading.global_scale.shape))
    each = reading.grid.scale_shape[0] // len(factors)
    factors = factors[torch.arange(top, bottom) // each][:, None]
    return scales / factors if reading.row.divides else scales * factors


def differing_texts(result: Checkpoint, texts: dict[str, str], index_name: str) -> Iterator[str]:
    """Yield what is wrong with the index, the config and the parameters of an output."""
    for name, value in ((CONFIG_NAME, result.config), (PARAMS_NAME, result.params)):
        planned = json.loads(texts[name]) if name in texts else None
        for place, got, expected in differing_values(value, planned):
            yield f"{name}: {place or 'the file'} is {got}, expected {expected}"
    if result.index is None:
        if index_name in texts:
            yield f"{index_name}: is missing"
        return
    weight_map = result.index.get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    for name, tensor in result.tensors.items():
        if weight_map.get(name) != tensor.path.name:
            yield f"{result.index_name}: has {name} not in {tensor.path.name}, where it is"
    for name, shard in weight_map.items():
        if name not in result.tensors:
            yield f"{result.index_name}: has {name} in {shard}, where it is not"
    metadata = result.index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.stop - tensor.start for tensor in result.tensors.values())
    if total != size:
        yield f"{result.index_name}: total_size is {total}, expected {size}"


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


# --- publish: the files beside the shards; config and index last, which say that all is there ---

DTYPE_KEYS = ["torch_dtype", "dtype"]
# Files that only a quantized checkpoint needs; a loader would take the output for quantized.
QUANTIZATION_FILES = [NVIDIA_CONFIG_NAME, SIDECAR_NAME, "quant_cfg.json",
                      "quanto_qmap.json", "quant_model_description*.json"]
# Weights in other formats or of another set.
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.pth", "*.gguf",
                "*.h5", "*.msgpack", "*.tmp"]
RANKS_NAME = "fp8_cast_bf16.ranks"  # Holds the digest of the plan while ranks work.


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
    checkpoint, values = plan.checkpoint, {}
    if checkpoint.params is not None:
        unwanted = ["quantization", *QUANTIZATION_KEYS]
        values[PARAMS_NAME] = {k: v for k, v in checkpoint.params.items() if k not in unwanted}
    if checkpoint.config is not None:
        values[CONFIG_NAME] = config = bf16_config(checkpoint.config)
        empty = [key for key in DTYPE_KEYS if key in config and config[key] is None]
        config |= dict.fromkeys(empty[:1], "bfloat16")
    if checkpoint.index is not None:
        metadata = checkpoint.index.get("metadata")
        size = sum(step.output.stop - step.output.start for step in plan.steps)
        weight_map = {step.output.name: str(step.output.path) for step in plan.steps}
        values[checkpoint.index_name] = {
            **checkpoint.index,
            "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }
    return {name: json.dumps(value, indent=2) + "\n" for name, value in values.items()}


@dataclass(frozen=True)
class SideFiles:
    """What stands beside the shards, by path from the root: files to copy, to leave, to edit."""

    copied: list[str]
    left_out: list[str]
    texts: dict[str, str]


def find_side_files(plan: Plan) -> SideFiles:
    """Decide what becomes of the files beside the shards.

    Left out are weight files, unfinished files, and what is no plain file of the checkpoint.
    """
    copied, left_out, root = [], [], plan.checkpoint.root
    edited = [plan.checkpoint.index_name, CONFIG_NAME, PARAMS_NAME]
    for folder, folders, names in os.walk(root, onerror=raise_error):
        folders[:] = sorted(name for name in folders if name not in TOOL_FOLDERS)
        for name in sorted(names + folders):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            unwanted = any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES)
            taken = relative in edited or any(
                fnmatch.fnmatch(relative, pattern) for pattern in QUANTIZATION_FILES)
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
    return SideFiles(copied, left_out, bf16_texts(plan))


def raise_error(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class OutputState:
    """What an output folder holds, and what is to be done about it.

    done: shards that are as planned. replaced: those of an earlier run that are not. stale: files
    to remove, first those that mark an output as complete. needed, free: bytes.
    """

    done: set[str]
    replaced: list[str]
    stale: list[Path]
    complete: bool
    needed: int
    free: int


def inspect_output(plan: Plan, out: Path, side: SideFiles, workers: int) -> OutputState:
    """Look at an output folder. Raises CheckpointError where the output cannot be made there."""
    shards = {shard.name: shard for shard in plan.shards}
    foreign = sorted(path.name for path in out.glob("*.safetensors") if path.name not in shards)
    if foreign:
        raise CheckpointError(f"{out}: holds {', '.join(foreign)}, which this checkpoint does not "
                              "have; give another folder")
    there = [shards[name] for name in sorted(shards) if os.path.lexists(out / name)]
    check_ours(there, out)
    done = find_done(there, out, workers)
    names = [*side.texts, CONFIG_NAME, PARAMS_NAME, INDEX_NAME]
    stale = [out / name for name in dict.fromkeys(names) if os.path.lexists(out / name)]
    stale += [path for pattern in QUANTIZATION_FILES for path in sorted(out.glob(pattern))]
    stale += sorted(out.glob(f"*{TEMPORARY_SUFFIX}")) + sorted(out.glob(RANKS_NAME))
    stale += [path for name in side.copied if (path := temporary(out / name)).exists()]
    check_places(out, [*side.texts, *side.copied], stale)
    root = plan.checkpoint.root
    complete = (
        len(done) == len(shards)
        and {*stale} == {out / name for name in side.texts}
        and all((out / name).read_bytes() == text.encode() for name, text in side.texts.items())
        and all((out / name).is_file() and filecmp.cmp(root / name, out / name, shallow=False)
                for name in side.copied)
    )
    replaced = [shard.name for shard in there if shard.name not in done]
    sizes = [shard.size for shard in plan.shards if shard.name not in done]
    sizes += [(root / name).stat().st_size for name in side.copied]
    sizes += [len(text.encode()) for text in side.texts.values()]
    freed = 0
    for path in [*stale, *(out / name for name in replaced)]:
        with suppress(FileNotFoundError):  # Another rank may have given it its name.
            freed += getattr(path.lstat(), "st_blocks", 0) * 512
    needed = 0 if complete else sum(ceil_div(size, PAGE) * PAGE for size in sizes)
    return OutputState(done, replaced, [*dict.fromkeys(stale)], complete, needed,
                       shutil.disk_usage(existing(out)).free + freed)


def check_ours(shards: list[Shard], out: Path) -> None:
    """Raise CheckpointError for a file that is in the place of a shard and must not be replaced."""
    for path in (out / shard.name for shard in shards):
        if path.is_symlink() or not path.is_file() or not is_ours(path):
            raise CheckpointError(f"{path}: was not written by this version of this program; check "
                                  "it with --verify, and delete it to convert it anew")


def find_done(shards: list[Shard], out: Path, workers: int) -> set[str]:
    """Return the names of shards in the output whose size and header are the planned ones."""
    done = set()

    def check(worker: Worker, shard: Shard) -> int:
        if has_header(out / shard.name, shard, shard.sealed(fingerprint_of(shard, worker))):
            done.add(shard.name)
        return shard.size

    shards = [shard for shard in shards if (out / shard.name).stat().st_size == shard.size]
    if shards:
        pool = [Worker(torch.device("cpu"), 0) for _ in range(workers)]
        run_workers("checking", pool, ((shard,) for shard in shards), check,
                    sum(shard.size for shard in shards), quiet=True)
    return done


def existing(folder: Path) -> Path:
    """Return the nearest folder above that exists."""
    folder = folder.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def check_places(out: Path, names: list[str], stale: list[Path]) -> None:
    """Raise CheckpointError where something in the output is in the way of a file."""
    folder = existing(out)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder}: is not a writable directory; give another output")
    for path in [*stale, *(out / name for name in names)]:
        if path.is_dir() and not path.is_symlink():
            raise CheckpointError(f"{path}: is a folder; remove it or give another output")
        if not path.parent.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{path.parent}: is a link out of the output; remove it")
        above = next(p for p in path.parents if os.path.lexists(p))
        if not above.is_dir():
            raise CheckpointError(f"{above}: is where a folder has to be; remove it")


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
    except OSError:  # Some network file systems know no locks.
        pass
    try:
        yield
    finally:
        os.close(number)


def write_whole(path: Path, content: str | Path) -> None:
    """Replace a file atomically by a text or by the content of another file."""
    try:
        with naming(path), open(temporary(path), "wb") as file:
            if isinstance(content, Path):
                with naming(content), open(content, "rb") as original:
                    shutil.copyfileobj(original, file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary(path), path)  # Never into what a link at this name leads to.
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


def publish(root: Path, out: Path, side: SideFiles) -> None:
    """Complete the output around its shards: files of the input, then those that are edited."""
    folders = {out}
    for relative in side.copied:
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, root / relative)
        folders |= {folder for folder in target.parents if folder.is_relative_to(out)}
    for folder in sorted(folders):
        sync_folder(folder)
    for name, text in side.texts.items():
        write_whole(out / name, text)
    sync_folder(out)


# --- ranks: the processes of torchrun, which share nothing but the output folder ---

POLL = 0.5  # Seconds between looks at what other ranks do.
PATIENCE, STALLED = 60, 1800  # Seconds to wait for rank 0's plan, and for any sign of the others.


def find_ranks() -> Ranks:
    """Return which of torchrun's processes this is; a process that one of those started is none."""
    environment = os.environ
    with suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        if any(entry.startswith(b"TORCHELASTIC_RUN_ID=") for entry in parent):
            environment = {}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    numbers = [environment.get(name, "") for name in names]
    if "TORCHELASTIC_RUN_ID" not in environment or not all(map(str.isdecimal, numbers)):
        return Ranks()
    return Ranks(*map(int, numbers))


def digest_of(plan: Plan) -> str:
    """Return 16 hex digits that ranks have in common if their inputs and plans are the same.

    Headers alone would not do: DeepSeek-V3's and R1's are the same.
    """
    worker = Worker(torch.device("cpu"), 0)
    largest = max(plan.shards, key=lambda shard: shard.size)
    parts = [fingerprint_of(largest, worker)]
    worker.close()
    parts += [(shard.header, [describe(step.quantization) for step in shard.steps])
              for shard in plan.shards]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def await_plan(out: Path, digest: str, rank: int) -> None:
    """Return once rank 0 has prepared the output for the plan that this rank has, too."""
    began = told = time.monotonic()
    other = None
    while (found := read_digest(out)) != digest:
        now = time.monotonic()
        if found != other:
            began, other = now, found
        if other and now - began > PATIENCE:
            raise CheckpointError(f"{out}: rank {rank} has the plan {digest}, rank 0 has {other}; "
                                  "give all ranks the same input and the same version")
        if now - began > STALLED:
            raise CheckpointError(f"{out}: rank 0 has not prepared it; start the same command "
                                  "again")
        if now - told > 30:
            told = now
            say(f"Rank {rank} waits until rank 0 has prepared {out}")
        time.sleep(POLL)


def read_digest(out: Path) -> str | None:
    try:
        return (out / RANKS_NAME).read_text()
    except FileNotFoundError:
        return None


def await_shards(shards: list[Shard], out: Path) -> None:
    """Return once the shards of other ranks have their names and their planned headers."""
    worker, left = Worker(torch.device("cpu"), 0), list(shards)
    headers, told, sign, seen = {}, time.monotonic(), time.monotonic(), None
    while True:
        for shard in [*left]:
            path = out / shard.name
            if path.is_file() and path.stat().st_size == shard.size:
                if shard.name not in headers:
                    headers[shard.name] = shard.sealed(fingerprint_of(shard, worker))
                if has_header(path, shard, headers[shard.name]):
                    left.remove(shard)
        if not left:
            worker.close()
            return
        now, blocks = time.monotonic(), [(len(left))]
        for path in out.glob(f"*{TEMPORARY_SUFFIX}"):
            with suppress(FileNotFoundError):
                blocks.append((path.name, path.stat().st_mtime_ns))
        if blocks != seen:
            sign, seen = now, blocks
        if now - sign > STALLED:
            raise CheckpointError(f"{out}: {len(left)} shards of other ranks have stopped growing "
                                  f"({left[0].name}); start the same command again")
        if now - told > 30:
            told = now
            say(f"Waiting for {len(left)} shards of other ranks")
        time.sleep(POLL)


# --- command line ---


def formats_table() -> str:
    """Return the table of formats as --help and the README show it.

    X is the weight's name, N a number; what stands before them is the module's.
    """

    def shown(names: str) -> str:
        names = re.sub(r"\\d(\+|\{1,9\})", "N", names.replace("{}", "X"))
        names = re.sub(r"\(\?:(.*)\)", r"\1", names.replace("\\.", ".")).replace("|", "/")
        return " or ".join(f"`{name}`" for name in dict.fromkeys(names.split()))

    lines = [("format", "weight", "scales", "under quant_method"), ("---",) * 4]
    for row in [*FORMATS, PLAIN_CAST]:
        methods = "any" if row.containers <= F8 else ", ".join(sorted(row.methods)) or "none"
        for key, values in row.requires:
            methods = f"{key} {', '.join(sorted(values))}"
        lines.append((row.title, f"{'/'.join(sorted(row.containers))} {shown(row.weight)}",
                      ", ".join(filter(None, map(shown, (row.scale, row.global_scale)))), methods))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("F8_E4M3/F8_E5M2", "F8")


def sized(count: int) -> str:
    return tqdm.format_sizeof(count, "B")


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def pick_device(name: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return the device that an argument names, and why it is that one. Raises UsageError.

    Ranks on one machine share out its GPUs, unless the argument has a number.
    """
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    cpu, count = torch.device("cpu"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return cpu, "as asked"
    if name == "auto" and not count:
        return cpu, "torch sees no CUDA device"
    number = int(name[5:]) if name[5:] else local_rank % max(1, count)
    try:
        if number >= count:
            raise UsageError(f"torch sees {count} CUDA devices")
        device = torch.device("cuda", number)
        probe = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
        kernel.weight_dequant(*(tensor.to(device) for tensor in probe))
    except Exception as error:  # No Triton, no compiler for it, a GPU that it does not know, ...
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
                raise UsageError(f"{out}: the output must not lie in the input, nor the input in "
                                 "the output")
    if report is not None:
        folder = report.resolve().parent
        if report.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UsageError(f"--report {report}: cannot be written there")
        if any(folder.is_relative_to(place.resolve()) for place in (source, out)):
            raise UsageError(f"--report {report}: give a path outside of input and output")


@dataclass
class Report:
    """All that a run has found and done; --report writes it as JSON."""

    options: dict
    versions: dict[str, str] = field(default_factory=dict)
    input: dict[str, int] = field(default_factory=dict)
    output: dict[str, int] = field(default_factory=dict)
    dequantized: dict[str, int] = field(default_factory=dict)
    copied: int = 0
    dropped: int = 0
    dropped_scales_of_no_weight: list[str] = field(default_factory=list)
    kept_in_fp8: dict[str, str] = field(default_factory=dict)
    cast_with_scale_1: list[str] = field(default_factory=list)
    files_left_out: list[str] = field(default_factory=list)
    experts_apart: str | None = None
    implausible: list[str] = field(default_factory=list)
    shards_already_there: list[str] = field(default_factory=list)
    complete: bool = False
    bytes_written: int = 0
    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)
    differences: list[str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def describe(self, plan: Plan, side: SideFiles) -> None:
        steps, tensors = [*plan.steps], plan.checkpoint.tensors.values()
        missing = [tensor.name for tensor in plan.reading.missing]
        self.input = {"shards": len(plan.checkpoint.shards), "tensors": len(tensors),
                      "bytes": sum(tensor.stop - tensor.start for tensor in tensors)}
        self.output = {"shards": len(plan.shards), "tensors": len(steps), "bytes": plan.size}
        kinds = Counter(kind_of(step) for step in steps if step.quantization)
        self.dequantized = dict(kinds.most_common())
        self.copied = len(steps) - sum(kinds.values())
        self.dropped = len(plan.reading.dropped)
        self.dropped_scales_of_no_weight = [tensor.name for tensor in plan.reading.orphans]
        kept = missing if plan.missing_scale == "keep" else []
        self.kept_in_fp8 = dict.fromkeys(kept, "no scale")
        self.cast_with_scale_1 = missing if plan.missing_scale == "cast" else []
        self.files_left_out = side.left_out
        self.experts_apart = find_apart_experts(plan)

    def save(self, path: Path) -> None:
        record = {key: value for key, value in asdict(self).items() if value is not None}
        record |= record.pop("nonfinite")
        write_whole(path, json.dumps(record, indent=2) + "\n")


def kind_of(step: Step) -> str:
    """Return the format of a weight in words."""
    reading = step.quantization
    if reading.scale is None:
        return f"{reading.number_format} without a scale"
    grid = reading.grid
    block = f"{grid.block_rows}x{grid.block_cols} block"
    if grid.block_cols >= grid.cols and grid.block_rows >= grid.slab_rows:
        block = "tensor" if grid.slab_rows >= grid.rows else "expert"
    elif grid.block_cols >= grid.cols and grid.block_rows == 1:
        block = "row"
    elif grid.block_cols == 1 and grid.block_rows >= grid.slab_rows:
        block = "column"
    second = " and a global scale" if reading.global_scale else ""
    return f"{reading.number_format}, {reading.scale.dtype} scale per {block}{second}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("safetensors", "tqdm", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def main(fp8_path: str | Path, bf16_path: str | Path, **options) -> None:
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another."""
    convert(fp8_path, bf16_path, **options)


def convert(fp8_path: str | Path, bf16_path: str | Path, *, device: str = "auto",
            workers: int | None = None, missing_scale: str = "keep", dry_run: bool = False,
            verify: bool = False, report: str | Path | None = None,
            ranks: Ranks = Ranks()) -> None:  # noqa: B008 (frozen)
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another.

    device: "auto", "cpu", "cuda" or "cuda:N". workers: threads; by default two per core, 4 to 16.
    missing_scale: "keep", "cast" or "error", as in make_plan. dry_run: only print what would be
    done. verify: only compare an existing output with what it should be. report: a file for a JSON
    record of it all. ranks: which of several processes this is, each of which makes some shards.

    Raises CheckpointError for what is wrong with the checkpoint or a verified output, OSError for
    the disk, UsageError for the arguments. Until all is there, the output holds no index and no
    config.
    """
    began = time.perf_counter()
    source, out, report = Path(fp8_path), Path(bf16_path), Path(report) if report else None
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(16, max(4, 2 * (cores or 1) // ranks.local_count))
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected a positive number")
    if missing_scale not in MISSING_SCALE:
        raise UsageError(f"--missing-scale {missing_scale}: expected {', '.join(MISSING_SCALE)}")
    if dry_run and verify:
        raise UsageError("--dry-run and --verify: expected one of them")
    check_folders(source, out, report)
    chosen, why = pick_device(device, ranks.local_rank)
    if ranks.rank == 0:
        several = f", {ranks.count} ranks" if ranks.count > 1 else ""
        how = f"Verifying on the CPU: {workers} workers" if verify else (
            f"Device: {chosen} ({why}), {workers} workers")
        say(how + several)
    plan = make_plan(load_checkpoint(source), missing_scale)
    side = find_side_files(plan)
    record = Report({"input": str(source), "output": str(out), "device": str(chosen),
                     "workers": workers, "missing_scale": missing_scale, "dry_run": dry_run,
                     "verify": verify}, versions())
    record.describe(plan, side)
    record.implausible = find_implausible(plan)
    if ranks.rank == 0:
        tell_plan(record)
    if verify:
        record.differences = find_differences(plan, out, side.texts, workers, ranks)
    else:
        make_output(plan, out, side, chosen, workers, dry_run, ranks, record)
    record.seconds["total"] = time.perf_counter() - began
    if report is not None:
        name = f"{report.stem}.rank{ranks.rank}{report.suffix}" if ranks.rank else report.name
        record.save(report.with_name(name))
    if verify:
        tell_verified(record, out, ranks)
    elif not dry_run:
        tell_converted(record, ranks)


def make_output(plan: Plan, out: Path, side: SideFiles, device: torch.device, workers: int,
                dry_run: bool, ranks: Ranks, record: Report) -> None:
    """Make the output of a plan, or what is missing of it.

    Rank 0 looks after the folder: what is there, what must go, and what completes it. The others
    start when it has left their plan's digest there, and replace nothing but their own shards.
    """
    mine = shards_of_rank(plan.shards, ranks.rank, ranks.count)
    with ExitStack() as stack:
        if ranks.rank > 0:
            if dry_run:
                return
            there = [shard for shard in mine if os.path.lexists(out / shard.name)]
            check_ours(there, out)
            done = find_done(there, out, workers)
            if len(done) < len(mine):
                await_plan(out, digest_of(plan), ranks.rank)
        else:
            if ranks.count > 1 and not dry_run:
                (out / RANKS_NAME).unlink(missing_ok=True)  # of a job that was killed
            state = inspect_output(plan, out, side, workers)
            tell_state(state, plan, out, workers, record)
            done = state.done
            if dry_run or (state.complete and ranks.count == 1):
                return
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
            unfinished = {path for path in state.stale if path.suffix == TEMPORARY_SUFFIX}
            for path in state.stale if not state.complete else ():
                if ranks.count == 1 or path not in unfinished:  # Another rank may be writing it.
                    path.unlink(missing_ok=True)
            sync_folder(out)
            if ranks.count > 1:
                write_whole(out / RANKS_NAME, digest_of(plan))
        todo = [shard for shard in mine if shard.name not in done]
        pool = [Worker(device, WINDOW) for _ in range(workers)] if todo else []
        if todo:
            write_shards(todo, out, pool, ranks.rank > 0)
        if ranks.rank == 0:
            own = {shard.name for shard in mine}
            await_shards([shard for shard in plan.shards if shard.name not in own], out)
            for path in unfinished:
                path.unlink(missing_ok=True)
            if not record.complete:
                publish(plan.checkpoint.root, out, side)
            (out / RANKS_NAME).unlink(missing_ok=True)
    record.bytes_written = sum(shard.size for shard in todo)
    counts, seconds = Counter(), Counter(dict.fromkeys(PHASES, 0.0))
    for worker in pool:
        counts.update(worker.nonfinite)
        seconds.update(worker.seconds)
    record.seconds = dict(seconds)
    record.nonfinite = {kind: {name: n for (name, what), n in counts.items() if what == kind}
                        for kind in NONFINITE}


def tell_plan(record: Report) -> None:
    """Print what will be done."""
    for side, numbers in (("Input", record.input), ("Output", record.output)):
        shards, tensors = (counted(numbers[f"{noun}s"], noun) for noun in ("shard", "tensor"))
        say(f"{side}: {shards}, {tensors}, {sized(numbers['bytes'])}")
    for kind, count in record.dequantized.items():
        say(f"  {counted(count, 'weight')} to dequantize: {kind}")
    say(f"  {counted(record.copied, 'tensor')} to copy, {counted(record.dropped, 'scale')} to drop")
    for name in record.kept_in_fp8:
        say(f"Warning: Missing scale_inv tensor for {name}, skipping conversion")
    if record.files_left_out:
        say("Not copied (other weights, or not regular files): "
            f"{', '.join(record.files_left_out)}")
    if record.experts_apart:
        say(f"Experts stand by themselves ({record.experts_apart}), where models of this "
            "architecture have them in one tensor: loaders may not find them")
    for line in record.implausible:
        print(printable(f"Warning: {line}"), file=sys.stderr, flush=True)


def tell_state(state: OutputState, plan: Plan, out: Path, workers: int, record: Report) -> None:
    """Print what is there and what there is room for. Raises CheckpointError if too little."""
    record.shards_already_there, record.complete = sorted(state.done), state.complete
    if state.done:
        say(f"Already there: {len(state.done)} of {counted(len(plan.shards), 'shard')}")
    if state.replaced:
        say(f"To be replaced, of another input or another reading: {', '.join(state.replaced)}")
    newer = {path for shard in plan.shards if shard.name in state.done
             for path in {tensor.path for step in shard.steps for tensor in sources_of(step)}
             if path.stat().st_mtime_ns > (out / shard.name).stat().st_mtime_ns}
    if newer:
        say(f"Newer than the output made of it: {', '.join(sorted(p.name for p in newer))}; run "
            "--verify to be sure")
    say(f"Space: {sized(state.needed)} to write, {sized(state.free)} free; memory: {workers} "
        f"workers, at most {sized(2 * WINDOW)} each")
    if state.needed > state.free:
        raise CheckpointError(f"{out}: there is {sized(state.needed - state.free)} too little "
                              "space for it; free some or give another output")


def tell_converted(record: Report, ranks: Ranks) -> None:
    """Print what was done; the last line sums it up."""
    for kind in NONFINITE:
        if counts := record.nonfinite.get(kind):
            say(f"{counted(sum(counts.values()), kind + ' value')}, in {', '.join(counts)}")
    if ranks.rank > 0:
        return
    if record.complete:
        say("Nothing to do: the output is complete")
        return
    for fate, names in (("kept in FP8", record.kept_in_fp8),
                        ("cast with scale 1", record.cast_with_scale_1)):
        if names:
            say(f"FP8 weights without a scale, {fate}: {len(names)}")
            for name in names:
                say(f"  {name}")
    if orphans := record.dropped_scales_of_no_weight:
        say(f"Dropped scales of no weight: {', '.join(orphans)}")
    out, seconds = record.output, record.seconds
    limits = {**seconds, "writing": seconds["writing"] + seconds["syncing"]}
    limit = max(PHASES[:3], key=limits.get)
    say(f"Converted {counted(out['shards'], 'shard')}, {counted(out['tensors'], 'tensor')}: "
        f"{sum(record.dequantized.values()):,} dequantized, {record.copied:,} copied, "
        f"{counted(record.dropped, 'scale')} dropped; {sized(record.input['bytes'])} in, "
        f"{sized(out['bytes'])} out, {seconds['total']:.1f} s, "
        f"{record.bytes_written / seconds['total'] / 1e9:.2f} GB/s, limited by {limit}")


def tell_verified(record: Report, out: Path, ranks: Ranks) -> None:
    """Print how an output differs. Raises CheckpointError if it does."""
    differences, seconds = record.differences, record.seconds["total"]
    for difference in differences:
        say(difference)
    if differences:
        raise CheckpointError(f"{out}: is not what the input gives, in "
                              f"{counted(len(differences), 'place')}")
    if ranks.rank == 0:
        size = record.input["bytes"] + record.output["bytes"]
        say(f"Verified {counted(record.output['tensors'], 'tensor')}: all as they should be; "
            f"{sized(size)} read, {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status.

    That is 0 if converted or verified, 1 if impossible or different, 130 or 143 if interrupted.
    """
    parser = argparse.ArgumentParser(
        description="Convert an FP8 checkpoint into a BF16 one.",
        epilog=formats_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input-fp8-hf-path", required=True, metavar="IN", dest="fp8_path", help="the checkpoint")
    add("--output-bf16-hf-path", required=True, metavar="OUT", dest="bf16_path",
        help="a new folder, or that of an earlier run to continue")
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--workers", type=int, metavar="N", help="threads (default: 2 per core, 4 to 16)")
    add("--missing-scale", choices=MISSING_SCALE, default="keep",
        help="FP8 weights without a scale: keep them FP8 (default), cast with scale 1, or refuse")
    add("--dry-run", action="store_true", help="print the plan and the space it needs")
    add("--verify", action="store_true", help="compare an existing output with the input")
    add("--report", metavar="FILE", help="write a JSON record of it all")
    options = parser.parse_args(arguments)
    ranks = find_ranks()
    try:
        convert(**vars(options), ranks=ranks)
    except UsageError as error:
        parser.error(printable(str(error)))
    except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {printable(message_of(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        if ranks.rank == 0:
            what = "not everything was compared" if options.verify else "the output is not complete"
            print(f"interrupted: {what}", file=sys.stderr)
        return 128 + (interrupt.args or [signal.SIGINT])[0]
    return 0


MESSAGE_LIMIT = 2000  # Characters: a tensor's name may be as long as a book.


def message_of(error: Exception) -> str:
    """Return one line about an error, which names the file where there is one."""
    text = str(error) if isinstance(error, CheckpointError) else str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError | RecursionError):
        text = f"the memory does not suffice: {text or type(error).__name__}; try --workers 1"
    if len(text) > MESSAGE_LIMIT:
        text = f"{text[: MESSAGE_LIMIT // 2]} ... {text[-MESSAGE_LIMIT // 2 :]}"
    return text or type(error).__name__


def end(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    gc.set_threshold(200_000)  # A plan is many objects, and while it grows none of them is garbage.
    sys.exit(cli())
