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
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

with warnings.catch_warnings():  # torch regrets the absence of numpy, which nothing here needs
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from kernel import Grid, dequantize

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
DTYPE_KEYS = ("torch_dtype", "dtype")
# Files beside the shards: what only a quantized checkpoint needs, weights in other formats or of
# another set, and what tools keep for themselves is not copied; everything else is.
QUANTIZATION_FILES = ("hf_quant_config.json",)
WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*"),
    *("*.pth", "*.gguf", "*.h5", "*.msgpack"),
)
TOOL_FOLDERS = (".git", ".cache")

# The order in which safetensors' own writer lays out tensors: larger elements first, so that every
# tensor is aligned to its element size. Within a dtype they stand by name.
DTYPE_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8"),
    *("F6_E3M2", "F6_E2M3", "F4", "BOOL"),
)
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
# Number format of the codes of each dtype that can hold a weight. U8 and I8 do only beside a scale.
CODE_FORMATS = {"F8_E4M3": "E4M3", "F8_E5M2": "E5M2", "U8": "E4M3", "I8": "INT8"}
SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SCALE_SUFFIX = "_scale_inv"
# Scales of the activations: of no use once the weight beside them is BF16.
SIDE_SCALES = ("activation_scale",)
BLOCK_SIZES = (16, 32, 64, 128, 256, 1)
DEFAULT_BLOCK_SIZE = (128, 128)

PAGE = 4096  # the alignment that direct I/O asks of offsets, lengths and memory
WINDOW = 16 << 20
TEMPORARY_SUFFIX = ".tmp"
OPEN_FILES = 8  # that a worker holds open: its shard and those in which scales stand
PHASES = ("reading", "decoding", "writing")


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


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor on disk: dtype as safetensors spells it, bytes [start, stop) of the file at path."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """Shard names with their metadata, all tensors by name, and the two JSON files if present."""

    root: Path
    shards: dict[str, dict[str, str]]
    tensors: dict[str, Tensor]
    index: dict | None
    config: dict | None


def read_json(path: Path) -> dict | None:
    """Return the JSON object in a file, None where there is no such file."""
    if not path.exists():
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
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        tensors.append(Tensor(name, entry["dtype"], tuple(entry["shape"]), path, start, stop))
    return metadata, tensors


def find_shards(root: Path, index: dict | None) -> list[str]:
    """Return the file names that make up the checkpoint, sorted."""
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{root / INDEX_NAME}: has no weight_map; download it again")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or shard in ("", ".", "..") or set("/\\\0") & set(shard):
                raise CheckpointError(
                    f"{root / INDEX_NAME}: puts {name} into {shard!r}; expected a file beside it"
                )
        return sorted(set(weight_map.values()))
    if (root / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    shards = sorted(path.name for path in root.glob("*.safetensors"))
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
    shards, tensors = {}, {}
    names = find_shards(root, index)
    weight_map = index["weight_map"] if index else {}
    for shard in names:
        shards[shard], found = read_header(root / shard)
        for tensor in found:
            other = tensors.setdefault(tensor.name, tensor)
            if other is tensor:
                continue
            if weight_map.get(tensor.name) not in (shard, other.path.name):
                raise CheckpointError(
                    f"{tensor.path}: {tensor.name} stands in {other.path.name} too and no index "
                    "says which counts; remove the file that is not part of the checkpoint"
                )
            if weight_map[tensor.name] == shard:
                tensors[tensor.name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{root / shard}: {name} is not there; {INDEX_NAME} names it")
    return Checkpoint(root, shards, tensors, index, read_json(root / CONFIG_NAME))


# --- plan: what every byte of the output will be ---


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight's codes become values: a key of kernel.FORMATS, the scales, and their grid.

    scale is None for a weight that is cast as if its scale were 1.
    """

    codes: str
    scale: Tensor | None
    grid: Grid


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of an output shard: bytes [start, stop) of that file.

    They are source's bytes, or its values as BF16 where there is a quantization.
    """

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
    """All that a conversion will do. `dropped` are scales, `missing` FP8 weights that have none."""

    checkpoint: Checkpoint
    shards: list[Shard]
    dropped: list[Tensor]
    missing: list[Tensor]

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


def make_plan(checkpoint: Checkpoint, missing_scale: str = "keep") -> Plan:
    """Decide what becomes of every tensor. No tensor data is read.

    missing_scale: what to do with an FP8 weight without a scale: "keep" it as it is, "cast" it with
    scale 1, or raise an "error". Raises CheckpointError where the rules do not decide.
    """
    tensors = checkpoint.tensors
    block_sizes = config_block_sizes(checkpoint.config or {})
    quantizations, dropped, missing = {}, {}, []
    for tensor in tensors.values():
        if tensor.name.endswith(SCALE_SUFFIX):
            dropped[tensor.name] = tensor  # one without a weight too: no loader knows it
            continue
        scale = tensors.get(tensor.name + SCALE_SUFFIX)
        if tensor.dtype not in CODE_FORMATS or not (scale or tensor.dtype in FP8_DTYPES):
            continue
        if scale is None:
            missing.append(tensor)
            if missing_scale != "cast":
                continue
        quantizations[tensor.name] = quantize(tensor, scale, block_sizes)
        for name in side_scale_names(tensor.name):
            if name in tensors:
                dropped[name] = tensors[name]
    if missing and missing_scale == "error":
        raise CheckpointError(
            f"{missing[0].path}: {missing[0].name} has no scale, one of {len(missing)} weights; "
            "--missing-scale keep leaves them FP8, cast takes their scale as 1"
        )
    shards = []
    for name, metadata in checkpoint.shards.items():
        path = checkpoint.root / name
        kept = [t for t in tensors.values() if t.path == path and t.name not in dropped]
        if kept:
            shards.append(plan_shard(name, metadata, kept, quantizations))
    if not shards:
        raise CheckpointError(f"{checkpoint.root}: holds no tensors; give the checkpoint's folder")
    return Plan(checkpoint, shards, list(dropped.values()), missing)


def config_block_sizes(config: dict) -> list[tuple[int, int]]:
    """Return the block sizes that a config names, at any depth, and the usual one."""
    found = []
    for key, value in config.items():
        if key in QUANTIZATION_KEYS and isinstance(value, dict):
            match value.get("weight_block_size"):
                case [int(rows), int(cols)] if rows > 0 and cols > 0:
                    found.append((rows, cols))
        elif isinstance(value, dict):
            found += config_block_sizes(value)
    return [*found, DEFAULT_BLOCK_SIZE]


def side_scale_names(name: str) -> list[str]:
    """Return what the scales beside a weight may be called: P.x for P.weight, P_x for a bare P."""
    owner = name.removesuffix("weight") if name.endswith(".weight") else name + "_"
    return [owner + side for side in SIDE_SCALES]


def quantize(
    weight: Tensor, scale: Tensor | None, block_sizes: list[tuple[int, int]]
) -> Quantization:
    """Pair a weight with its scale. Raises CheckpointError where dtype or shape fit no rule."""
    if scale is not None and scale.dtype not in SCALE_DTYPES:
        expected = ", ".join(SCALE_DTYPES)
        raise CheckpointError(f"{scale.path}: {scale.name} is {scale.dtype}; expected {expected}")
    grid = find_grid(weight.shape, scale.shape if scale else (), block_sizes)
    if grid is None:
        raise CheckpointError(
            f"{weight.path}: {weight.name} is {list(weight.shape)}, its scale {scale.name} is "
            f"{list(scale.shape)}: no block size fits; expected one scale per tensor, row or block"
        )
    return Quantization(CODE_FORMATS[weight.dtype], scale, grid)


def find_grid(
    weight_shape: tuple[int, ...], scale_shape: tuple[int, ...], block_sizes: list[tuple[int, int]]
) -> Grid | None:
    """Return the grid by which scales of one shape cover a weight of another, None where none fits.

    A weight is E experts of N rows and K columns; a matrix has E = 1. The first match counts: one
    scale for all; per expert, per row or per column; a block size that the config names; a block
    size out of BLOCK_SIZES on each axis. It is never computed from the shapes: 192 rows over 2 rows
    of scales are blocks of 128, the second cut off, not blocks of 96.
    """
    *experts, N, K = (1, 1, *weight_shape)
    E = math.prod(experts)
    if math.prod(scale_shape) == 1 or not E * N * K:
        return Grid(E * N, K, max(E * N, 1), max(K, 1), part=max(E * N, 1))
    scale = scale_shape
    while len(scale) > (3 if E > 1 else 2) and scale[0] == 1:
        scale = scale[1:]
    whole = {(E,): (N, K), (E, 1): (N, K), (E, 1, 1): (N, K), (E, N, 1): (1, K), (E, 1, K): (N, 1)}
    if E == 1:
        whole = {(N,): (1, K), (N, 1): (1, K), (1, K): (N, 1)}
    elif scale[0] == E and len(scale) == 3 and scale not in whole:
        scale = scale[1:]
    sizes = [*block_sizes, *itertools.product(BLOCK_SIZES, BLOCK_SIZES)]
    fitting = (size for size in sizes if (-(-N // size[0]), -(-K // size[1])) == scale)
    blocks = whole.get(scale) or next(fitting, None)
    return Grid(E * N, K, *blocks, part=N) if blocks else None


def plan_shard(
    name: str,
    metadata: dict[str, str],
    tensors: list[Tensor],
    quantizations: dict[str, Quantization],
) -> Shard:
    """Lay out an output shard as safetensors.torch.save_file would, byte for byte."""
    entries = []
    for tensor in tensors:
        quantization = quantizations.get(tensor.name)
        dtype, size = tensor.dtype, tensor.stop - tensor.start
        if quantization:
            dtype, size = "BF16", 2 * math.prod(tensor.shape)
        entries.append((DTYPE_ORDER.index(dtype), tensor.name, dtype, size, tensor, quantization))
    entries.sort(key=lambda entry: entry[:2])
    header = {"__metadata__": dict(sorted({**metadata, "format": "pt"}.items()))}
    offset = 0
    for _, tensor_name, dtype, size, tensor, _ in entries:
        offsets = [offset, offset + size]
        header[tensor_name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": offsets}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    steps = []
    for _, _, _, size, tensor, quantization in entries:
        steps.append(Step(start, start + size, tensor, quantization))
        start += size
    return Shard(name, len(text).to_bytes(8, "little") + text, steps)


# --- render: the bytes [start, stop) of one planned shard ---


def page_aligned(size: int, pinned: bool) -> torch.Tensor:
    """Return a uint8 tensor that starts on a page, in pinned memory if a GPU is to copy from it."""
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
    codes = worker.codes[: stop - start]
    worker.read(step.source.path, step.source.start + start, codes)
    scales = read_scales(step.quantization, start, stop, worker)
    began = time.perf_counter()
    out = out.view(torch.bfloat16)
    with torch.cuda.stream(worker.stream):
        values = out if worker.stream is None else torch.empty_like(out, device=worker.device)
        nans = dequantize(
            codes.to(worker.device, non_blocking=True),
            scales.to(worker.device),
            values,
            step.quantization.codes,
            step.quantization.grid,
            start,
        )
        if values is not out:
            out.copy_(values, non_blocking=True)
        worker.nans += nans.item()  # waits for the stream, so the buffers are free again
    worker.seconds["decoding"] += time.perf_counter() - began


def read_scales(quantization: Quantization, start: int, stop: int, worker: Worker) -> torch.Tensor:
    """Return the scales of the elements [start, stop) of a weight as a float32 matrix."""
    scale, grid = quantization.scale, quantization.grid
    if scale is None:
        return torch.ones(1, 1)
    row, row_end, col, col_end = grid.scale_region(start, stop)
    raw = torch.empty(row_end - row, col_end - col, dtype=SCALE_DTYPES[scale.dtype])
    skipped = row * grid.scale_shape[1] + col
    worker.read(scale.path, scale.start + skipped * raw.element_size(), raw)
    return raw.float()


# --- write: windows under a temporary name, then the final one ---


def direct_flag(root: Path) -> int:
    """Return O_DIRECT where this folder's file system takes it, else 0.

    Direct writes skip the page cache, which a file larger than memory only slows down. Where they
    are refused (tmpfs, some network file systems, other than Linux), plain writes do the same.
    """
    flag = getattr(os, "O_DIRECT", 0)
    probe = root / f"probe{TEMPORARY_SUFFIX}"
    try:
        with open_output(probe, flag | os.O_CREAT) as file:
            file.write(as_bytes(page_aligned(PAGE, False)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        flag = 0
    finally:
        probe.unlink(missing_ok=True)
    return flag


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
            with open(self.temporary(shard), "wb") as file:
                file.truncate(shard.size)
            for start in starts:
                yield shard, start, min(start + window, shard.size)

    def temporary(self, shard: Shard) -> Path:
        return self.root / (shard.name + TEMPORARY_SUFFIX)

    def take(self) -> tuple[Shard, int, int] | None:
        """Return the next window that nobody has taken, None when there is none."""
        with self.lock:
            return None if self.stopped else next(self.windows, None)

    def write(self, shard: Shard, start: int, stop: int, buffer: torch.Tensor) -> None:
        """Write a window, the start of `buffer`. What fills its last page is cut off at the end."""
        view = as_bytes(buffer)[: -(-(stop - start) // PAGE) * PAGE]
        path = self.temporary(shard)
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
            (self.root / (name + TEMPORARY_SUFFIX)).unlink(missing_ok=True)


def write_shards(
    plan: Plan, root: Path, device: torch.device, workers: int, window: int
) -> list[Worker]:
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

    threads = torch.get_num_threads()
    try:
        with bar, ThreadPoolExecutor(workers) as executor:
            try:
                for done in as_completed([executor.submit(work, worker) for worker in pool]):
                    done.result()
            finally:
                output.stopped = True
    finally:
        output.discard()
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
    if root.resolve().parent.name == "snapshots":
        inside.append(root.resolve().parent.parent / "blobs")
    copied, left_out = [], []
    for folder, folders, names in os.walk(root):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = sorted(name for name in folders if name not in TOOL_FOLDERS)
        for name in sorted(names + linked):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            plain = path.is_file() and any(path.resolve().is_relative_to(place) for place in inside)
            if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES) or not plain:
                left_out.append(relative)
            elif relative not in (CONFIG_NAME, *QUANTIZATION_FILES):
                copied.append(relative)
    return copied, left_out


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


def bf16_index(plan: Plan) -> dict:
    """Return the input's index with the weight_map and the size of what was written."""
    index = dict(plan.checkpoint.index)
    weight_map = {step.source.name: shard.name for shard in plan.shards for step in shard.steps}
    size = sum(step.stop - step.start for shard in plan.shards for step in shard.steps)
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    index["weight_map"] = dict(sorted(weight_map.items()))
    return index


def write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def publish(plan: Plan, out: Path) -> list[str]:
    """Complete the output around its shards. Returns the names of the files that were left out."""
    checkpoint = plan.checkpoint
    copied, left_out = side_files(checkpoint.root)
    for relative in copied:
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.root / relative, out / relative)
    if checkpoint.config is not None:
        config = bf16_config(checkpoint.config)
        if not any(key in config for key in DTYPE_KEYS):
            config["torch_dtype"] = "bfloat16"
        write_json(out / CONFIG_NAME, config)
    if checkpoint.index is not None:
        write_json(out / INDEX_NAME, bf16_index(plan))
    ours = {INDEX_NAME, *checkpoint.shards}
    return [name for name in left_out if name not in ours]


# --- command line ---


class UsageError(ValueError):
    """The arguments cannot be meant as they are given."""


def printable(text: str) -> str:
    """Return text without control characters: a tensor's name must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    print(printable(text), flush=True)


def pick_device(name: str) -> tuple[torch.device, str]:
    """Return the device that an argument names, and why it is that one. Raises UsageError."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "cpu":
        return torch.device("cpu"), "as asked"
    if name == "auto" and not count:
        return torch.device("cpu"), "torch sees no CUDA device"
    if name == "auto" and not has_triton:
        return torch.device("cpu"), "there is a CUDA device, but triton is not installed"
    number = 0 if name in ("auto", "cuda") else int(name.removeprefix("cuda:"))
    if number >= count:
        raise UsageError(f"--device {name}: torch sees {count} CUDA devices; use --device cpu")
    if not has_triton:
        raise UsageError(f"--device {name}: needs triton; pip install triton, or use --device cpu")
    return torch.device("cuda", number), torch.cuda.get_device_name(number)


def check_folders(source: Path, out: Path) -> None:
    """Raise UsageError unless input and output are apart, links followed."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{out}: input and output must be two folders, neither inside the other")


def main(
    fp8_path: str | Path,
    bf16_path: str | Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    missing_scale: str = "keep",
) -> None:
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another.

    device: "auto", "cpu", "cuda" or "cuda:N". workers: threads, each with buffers of 1.5 windows;
    by default two per core, 4 to 16. missing_scale: "keep", "cast" or "error", as in make_plan.

    Raises CheckpointError for what is wrong with the checkpoint, OSError for the disk, UsageError
    for the arguments. Until it returns, the output holds no index and no config.
    """
    began = time.perf_counter()
    source, out = Path(fp8_path), Path(bf16_path)
    check_folders(source, out)
    chosen, why = pick_device(device)
    workers = workers or min(16, max(4, 2 * (os.cpu_count() or 1)))
    say(f"Device: {chosen} ({why}), {workers} workers")
    plan = make_plan(load_checkpoint(source), missing_scale)
    for tensor in plan.missing:
        if missing_scale == "keep":
            say(f"Warning: Missing scale_inv tensor for {tensor.name}, skipping conversion")
    out.mkdir(parents=True, exist_ok=True)
    for name in (INDEX_NAME, CONFIG_NAME):
        (out / name).unlink(missing_ok=True)
    pool = write_shards(plan, out, chosen, workers, WINDOW)
    left_out = publish(plan, out)
    report(plan, pool, left_out, missing_scale, time.perf_counter() - began)


def report(
    plan: Plan, pool: list[Worker], left_out: list[str], missing_scale: str, seconds: float
) -> None:
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
    if nans := sum(worker.nans for worker in pool):
        say(f"{nans} NaN values, from NaN codes or scales")
    spent = {phase: sum(worker.seconds[phase] for worker in pool) for phase in PHASES}
    read = sum(tensor.stop - tensor.start for tensor in plan.checkpoint.tensors.values())
    say(
        f"Converted {len(plan.shards)} shards, {len(steps)} tensors: {dequantized} dequantized, "
        f"{len(steps) - dequantized} copied, {len(plan.dropped)} scales dropped; "
        f"{tqdm.format_sizeof(read, 'B')} in, {tqdm.format_sizeof(plan.size, 'B')} out, "
        f"{seconds:.1f} s, {plan.size / seconds / 1e9:.2f} GB/s, "
        f"most of it {max(spent, key=spent.get)}"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def device_name(text: str) -> str:
    if text not in ("auto", "cpu", "cuda") and not re.fullmatch("cuda:[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text} is none of auto, cpu, cuda, cuda:N")
    return text


def fail(text: str) -> int:
    print(f"error: {printable(text)}", file=sys.stderr)
    return 1


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 converted, 1 impossible, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Convert an FP8 checkpoint into a BF16 one.")
    add = parser.add_argument
    add("--input-fp8-hf-path", type=Path, required=True, metavar="IN", help="checkpoint folder")
    add("--output-bf16-hf-path", type=Path, required=True, metavar="OUT", help="folder to write to")
    add("--device", type=device_name, default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--workers", type=positive, metavar="N", help="threads (default: 2 per core, 4 to 16)")
    add("--missing-scale", choices=("keep", "cast", "error"), default="keep",
        help="FP8 weights without a scale: keep them FP8 (default), cast with scale 1, or refuse")
    options = parser.parse_args(arguments)
    try:
        main(
            options.input_fp8_hf_path,
            options.output_bf16_hf_path,
            device=options.device,
            workers=options.workers,
            missing_scale=options.missing_scale,
        )
    except UsageError as error:
        parser.error(printable(str(error)))
    except CheckpointError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted: the output is not complete", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
