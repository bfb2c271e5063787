# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.7", "safetensors>=0.6.1", "tqdm", "triton>=3.3; sys_platform == 'linux'",
# ]
# ///
"""Convert an FP8 Hugging Face checkpoint into a BF16 one that loads as it is.

    python fp8_cast_bf16.py --input-fp8-hf-path IN --output-bf16-hf-path OUT

An output shard is a file that can be computed at any byte range from the input:

    headers -> formats -> plan -> render(shard, start, stop) -> write, compare or yield

Planning reads headers and a few small tensors, so whatever is wrong with a checkpoint is reported
before the first byte is written. Workers then render windows, aligned byte ranges of a shard, in
any order. A window depends on no other, so the same bytes come out of one worker or many, a GPU or
none, and memory is bounded by the windows in flight, however large a tensor is.

A file that stands in OUT under its final name is whole, and is never replaced: a run keeps what is
right, makes what is missing, and refuses anything else by name.
"""

from __future__ import annotations

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
import queue
import re
import shutil
import sys
import threading
import time
import uuid
import warnings
from bisect import bisect_left, bisect_right
from collections import ChainMap, Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # Nothing here uses it.

import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from tqdm import tqdm  # noqa: E402

if [*map(int, re.findall(r"\d+", torch.__version__)[:2])] < [2, 7]:
    raise ImportError(f"torch is {torch.__version__}; this needs 2.7 or newer: pip install -r "
                      "requirements.txt")
sys.path.insert(0, str(Path(__file__).parent))  # Python's option -P leaves it out.
try:
    import kernel
    from kernel import Grid, ceil_div
except ImportError as error:
    raise ImportError(f"{error}; fp8_cast_bf16.py needs its own kernel.py beside it: keep the two "
                      "files in a folder of their own") from error
finally:
    del sys.path[0]

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind.
    fcntl = None

VERSION = "3.0"


class CheckpointError(Exception):
    """A problem of the checkpoint that its user can fix; the message names file and tensor."""


class UsageError(ValueError):
    """The arguments contradict each other, or the device that they name does not work."""


GONE = OSError, ValueError, AttributeError  # Of streams that are full, closed, or None.


class Steady:
    """A standard stream of which errors are ignored: a message may be lost, the work goes on.

    The stream may be full, closed, absent (a service has none), or a terminal that has gone.
    """

    def __init__(self, stream):
        self.stream = stream.stream if isinstance(stream, Steady) else stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(*GONE):
            self.stream.write(text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        with suppress(*GONE):
            self.stream.flush()

    def isatty(self) -> bool:
        with suppress(*GONE):
            return self.stream.isatty()
        return False


class Log(Steady):
    """A stream that is no terminal; each update of a progress bar becomes a line."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return super().write(line + "\n" * bool(line))


def printable(text: str) -> str:
    """Return text that a terminal can show and that cannot control it, whatever a tensor's name."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    Steady(sys.stdout).write(printable(text) + "\n")


def warn(text: str) -> None:
    Steady(sys.stderr).write(printable(text) + "\n")


@contextmanager
def naming(path: Path):
    """Add the path to an OSError from read or write, which do not know it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sized(count: int) -> str:
    return tqdm.format_sizeof(count, "B")


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# --- checkpoint: where every tensor's bytes are ---

INDEX_NAME, INDEX_PATTERN = "model.safetensors.index.json", "*.safetensors.index*.json"
CONFIG_NAME, CONFIG_PATTERN = "config.json", "config*.json"
PARAMS_NAME = "params.json"  # Mistral's own.
NVIDIA_CONFIG_NAME, SIDECAR_NAME = "hf_quant_config.json", "quantization_config.json"
ADAPTER = "adapter_model*"  # PEFT saves adapters so, also beside a model.
# Mistral's and Meta's repositories hold the same weights a second time, under these names.
OTHER_SETS = ["consolidated*", "original", "lost+found"]
NUMBERED = re.compile(r"(.*)-\d{5,6}-of-(\d{5,6})(.*)\.safetensors", re.DOTALL)
HUB_BLOB = re.compile(r"/blobs/[0-9a-f]{40}([0-9a-f]{24})?\Z")  # huggingface_hub's cache
HEADER_LIMIT = 100_000_000  # Bytes, as in safetensors.
NAME_LIMIT = 2000  # Characters; longer names would take long to judge, and fill the screen.
SMALL_LIMIT = 16 << 20  # Bytes of a tensor that planning may read.
PROGRAM = "fp8_cast_bf16"  # The key of this program's entry in the metadata of shards.
# Bits of an element, in the order in which safetensors' own writer lays out tensors: larger
# elements first, so that every tensor is aligned to its element size.
DTYPE_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16,
    "F16": 16, "U16": 16, "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}


class Tensor(NamedTuple):
    """A tensor on disk: dtype as safetensors spells it, bytes [start, stop) of the file at path.

    emptied: --delete-source has left only the header of the file, so the bytes are gone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int
    emptied: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {[*self.shape]}"

    @property
    def signature(self) -> tuple[str, str, tuple[int, ...]]:
        return self.name, self.dtype, self.shape

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def element_size(self) -> int:
        return self.size // (math.prod(self.shape) or 1)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.name} {problem}")


@dataclass(frozen=True)
class Checkpoint:
    """What one folder holds. files: the index and the configs. metadata: that of each shard, by its
    path from the folder. stamps: size and time of each shard. twice: tensors that do not count,
    because another shard has one of the same name.
    """

    root: Path
    index_name: str
    files: dict[str, dict]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)
    twice: list[Tensor] = field(default_factory=list)


def is_like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def walk(value, skip: Callable = lambda key, value: False) -> Iterator[tuple[str, object]]:
    """Yield the entries of all objects in a JSON value, except those to skip and all below them."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            entries = [entry for entry in value.items() if not skip(*entry)]
            yield from entries
            left += [item for _, item in entries]


def is_there(path: Path) -> bool:
    """Return whether a name stands for anything. os.path.lexists takes any error for absence."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_regular(path: Path, remedy: str = "") -> None:
    """Raise CheckpointError for a folder, or a pipe, from which no byte may ever come."""
    if is_there(path) and not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file{remedy}")


def check_link(path: Path, root: Path) -> None:
    """Raise CheckpointError if a path is a link that leads out of the checkpoint.

    It may lead to a private file, which must not end up in an output that gets published. The
    Hugging Face cache keeps the files of a snapshot as links to blobs/HASH, which are followed.
    """
    if path.is_symlink():
        # Path.resolve raises RuntimeError for a loop of links, before Python 3.13.
        target, root = Path(os.path.realpath(path)), root.resolve()
        inside = target.is_relative_to(root) and not any(
            part.startswith(".") for part in target.relative_to(root).parts)
        if not path.exists() or not (inside or HUB_BLOB.search(target.as_posix())):
            raise CheckpointError(f"{path}: is a link to {os.readlink(path)}, which is missing or "
                                  "outside of the checkpoint; put the file itself there (cp -L)")


def in_full(transfer: Callable[[memoryview], int | None], view: memoryview) -> memoryview:
    """Read into a view, or write from it, by calls that may stop early. Returns what is left of it
    at the end of a file.
    """
    while view and (size := transfer(view)) != 0:
        if size is None:  # Some network file systems do this.
            raise BlockingIOError(errno.EAGAIN, "the file system is not ready")
        view = view[size:]
    return view


def read_bytes(path: Path, start: int = 0, count: int = -1) -> bytes:
    """Return bytes of a file. Raises CheckpointError for a stand-in of git-lfs."""
    with naming(path), open(path, "rb") as file:
        file.seek(start)
        if (data := file.read(count)) is None:
            raise BlockingIOError(errno.EAGAIN, "the file system is not ready")
    if start == 0 and data.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull`")
    return data


def parse_object(text: bytes) -> dict:
    """Return a JSON object. Raises ValueError, or RecursionError, if the text is none."""
    if not isinstance(value := json.loads(text.decode()), dict):
        raise ValueError("it is not an object")
    return value


def read_files(root: Path, index_name: str, top: Path) -> dict[str, dict]:
    """Return the objects in the JSON files of a checkpoint, by name. A file like config_list.json
    may hold another value; then it is no config.
    """
    names = [index_name, PARAMS_NAME, NVIDIA_CONFIG_NAME, SIDECAR_NAME]
    names += sorted(path.name for path in root.glob(CONFIG_PATTERN))
    files = {}
    for path in [root / name for name in names if is_there(root / name)]:
        check_link(path, top)
        check_regular(path, "; put the file itself there")
        if (size := path.stat().st_size) > HEADER_LIMIT:
            raise CheckpointError(f"{path}: has {size} bytes; expected at most {HEADER_LIMIT}")
        try:
            value = json.loads(read_bytes(path).decode())
            if isinstance(value, dict):
                files[path.name] = value
            elif path.name == CONFIG_NAME or not is_like(path.name, [CONFIG_PATTERN]):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    return files


def read_entries(path: Path, header: dict, begin: int, end: int) -> list[Tensor]:
    """Return the tensors of a header. Raises ValueError unless they fill the bytes [begin, end), or
    the file ends with its header: then --delete-source has emptied it.
    """
    tensors, last = [], begin
    for name, entry in header.items():
        if len(name) > NAME_LIMIT:
            raise ValueError(f"a tensor's name has {len(name)} characters")
        (start, stop), shape = entry["data_offsets"], (*entry["shape"],)
        if not all(type(n) is int and 0 <= n < 1 << 64 for n in (start, stop, *shape)):
            raise ValueError(f"{name} has an invalid header entry")
        if math.prod(shape) * DTYPE_BITS[entry["dtype"]] != 8 * (stop - start):
            raise ValueError(f"{name} has {stop - start} bytes for {entry['dtype']} {[*shape]}")
        start, stop = begin + start, begin + stop
        tensors.append(Tensor(name, entry["dtype"], shape, path, start, stop, emptied=stop > end))
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != last:
            raise ValueError(f"{tensor.name} begins at byte {tensor.start}, expected {last}")
        last = tensor.stop
    if end not in (begin, last):
        raise ValueError(f"it has {end} bytes, expected {last}")
    return tensors


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(read_bytes(path, 0, 64)[:8], "little")


def read_header(path: Path, remedy: str = "download it again"
                ) -> tuple[dict[str, str], list[Tensor]]:
    """Return a shard's metadata and tensors, by the rules of huggingface/safetensors,
    safetensors/src/tensor.rs.
    """
    size, end = header_size(path), path.stat().st_size
    try:
        if size > min(end, 8 + HEADER_LIMIT):
            raise ValueError("it has no header of its size")
        text = read_bytes(path, 8, size - 8)
        if not text.startswith(b"{"):
            raise ValueError("its header does not begin with {")
        header = parse_object(text)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata is not text")
        "".join([*header, *metadata, *metadata.values()]).encode()  # No half of a surrogate pair.
        return metadata, read_entries(path, header, size, end)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {remedy}"
                              ) from error


def find_index(root: Path) -> str:
    """Return the name of the model's index, or of the only one under another name."""
    names = sorted(path.name for path in root.glob(INDEX_PATTERN)
                   if path.name[0] != "." and not is_like(path.name, OTHER_SETS))
    if INDEX_NAME in names or not names:
        return INDEX_NAME
    if len(names) > 1:
        raise CheckpointError(f"{root}: holds {' and '.join(names)}; move all but one checkpoint "
                              "to folders of their own")
    return names[0]


def read_weight_map(path: Path, index: dict) -> dict[str, str]:
    """Return in which shard an index finds each tensor: a path from its folder."""
    stored, weight_map = index.get("weight_map"), {}
    if not isinstance(stored, dict) or not stored:
        raise CheckpointError(f"{path}: has no weight_map; download it again")
    for name, shard in stored.items():
        weight_map[name] = os.path.normpath(shard) if isinstance(shard, str) else ""
        if not re.fullmatch(r"(?!/|\.\./)[^\\\0]+\.safetensors", weight_map[name]):
            raise CheckpointError(f"{path}: puts {name} into {shard!r:.200}; expected a "
                                  "*.safetensors file beside it or below")
    return weight_map


def shards_beside(root: Path) -> tuple[list[str], str]:
    """Return the shards in a folder without an index, and what theirs would be called. Numbers tell
    if one is missing.
    """
    names = sorted(path.name for path in root.glob("*.safetensors") if path.name[0] != ".")
    # An adapter must not get into an index: llama.cpp would load it as part of the model.
    names = [name for name in names if not is_like(name, [*OTHER_SETS, ADAPTER])] or names
    series = Counter(found.group(1, 2, 3) for found in map(NUMBERED.fullmatch, names) if found)
    for (start, total, rest), count in series.items():
        if count < int(total):
            raise CheckpointError(f"{root}: has {count} of {int(total)} shards {start}-*-of-{total}"
                                  f"{rest}.safetensors; the download is incomplete")
    indexes = {f"{start}.safetensors.index{rest}.json" for start, _, rest in series}
    return names, indexes.pop() if len(indexes) == 1 else INDEX_NAME


def stamp(path: Path) -> tuple[int, int]:
    at = path.stat()
    return at.st_size, at.st_mtime_ns


class Changed(CheckpointError):
    """An input shard is not what it was when the conversion was planned."""

    def __init__(self, path: Path):
        super().__init__(f"{path}: has changed while it was read; run the command again once it "
                         "is whole")
        self.path = path


def find_changed(stamps: dict[Path, tuple[int, int]]) -> list[Path]:
    return [path for path, was in stamps.items() if not path.exists() or stamp(path) != was]


def check_unchanged(stamps: dict[Path, tuple[int, int]]) -> None:
    for path in find_changed(stamps):
        raise Changed(path)


def read_small(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor that has to be read to plan the conversion."""
    if tensor.emptied:
        raise tensor.error("has to be read to plan a conversion, and an emptied shard lacks it")
    if tensor.size > SMALL_LIMIT:
        raise tensor.error(f"has {tensor.size} bytes; expected at most {SMALL_LIMIT}")
    return read_bytes(tensor.path, tensor.start, tensor.size)


def check_download(path: Path) -> None:
    if os.path.exists(mark := f"{path}.aria2"):  # aria2 gives a file its full size at once.
        raise CheckpointError(f"{path}: its download is not finished, as {mark} tells; finish it, "
                              "or remove that file if it is stale")


def add_shard(checkpoint: Checkpoint, name: str, weight_map: dict[str, str]) -> None:
    """Add a shard's tensors to a checkpoint. Of two with one name, that of the index counts."""
    path = checkpoint.root / name
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the download is incomplete")
    if re.search("[\ud800-\udfff]", name):  # Python's spelling of bytes that are not UTF-8
        raise CheckpointError(f"{path}: its name is not UTF-8, and safetensors cannot open it; "
                              "rename it")
    check_download(path)
    checkpoint.stamps[path] = stamp(path)
    checkpoint.metadata[name], tensors = read_header(path)
    for tensor in tensors:
        elsewhere = weight_map.get(tensor.name, name) != name
        if elsewhere or checkpoint.tensors.setdefault(tensor.name, tensor) is not tensor:
            checkpoint.twice.append(tensor)


def load_checkpoint(root: Path, top: Path) -> Checkpoint:
    """Read the index, the configs and all headers of a checkpoint, and check that they agree.

    top: the folder that no link may leave.
    """
    index_name = find_index(root)
    files = read_files(root, index_name, top)
    if index_name in files:
        weight_map = read_weight_map(root / index_name, files[index_name])
        shards = sorted({*weight_map.values()})
    else:
        weight_map = {}
        shards, index_name = shards_beside(root)
    checkpoint = Checkpoint(root, index_name, files)
    for shard in shards:
        add_shard(checkpoint, shard, weight_map)
    for name, shard in weight_map.items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{root / shard}: {name} is not there; {index_name} names it")
    return checkpoint


def walk_folders(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder with the names of the folders in it, which may be removed from the walk,
    and of the files. What cannot be read is an error: it would be missing in the output.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        yield Path(folder), folders, names
        folders[:] = sorted(
            name for name in folders if name[0] != "." and not is_like(name, OTHER_SETS))


def find_checkpoints(root: Path) -> list[Checkpoint]:
    """Return the checkpoints in a folder and below it, its own last.

    A draft model or the parts of a pipeline have folders of their own; each folder with shards is a
    checkpoint, unless an index above it names them. That of a pipeline itself holds no tensors.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give the checkpoint's (from the hub: "
                              "hf download ID --local-dir IN)")
    if root.name.startswith("models--") and (root / "snapshots").is_dir():
        raise CheckpointError(f"{root}: is the cache of a repository; give its snapshots/HASH")
    found, taken = [], set()
    for folder, _, names in walk_folders(root):
        shards = {folder / name for name in names if name[0] != "."
                  and is_like(name, ["*.safetensors", INDEX_PATTERN])}
        if folder == root or (shards and not shards & taken):
            found.append(load_checkpoint(folder, root))
            taken |= found[-1].stamps.keys()
    if not any(checkpoint.tensors for checkpoint in found):
        raise CheckpointError(f"{root}: holds no *.safetensors with tensors; give the checkpoint's "
                              "folder")
    return found[::-1]


# --- formats: how weights are stored; a new format is a row here, and a test in test_formats.py ---


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


F8, I8, U8 = words("F8_E4M3 F8_E5M2"), words("I8"), words("U8")
FLOATS, EXPONENTS = words("F32 BF16 F16"), words("F8_E8M0 U8")  # U8 is 2 ** (byte - 127), too.
# What formats of several writers have in common.
INT8 = {"containers": I8, "scale_dtypes": FLOATS, "number_format": "INT8"}
FP4 = {"containers": U8, "number_format": "E2M1"}
MXFP4 = FP4 | {"scale_dtypes": EXPONENTS, "groups": (32,)}
NVFP4 = FP4 | {"scale_dtypes": words("F8_E4M3"), "groups": (16,)}
SEMANTICS = "weight_scale_semantics"  # The only key that can say that an FP8 scale divides.
# NVIDIA/Model-Optimizer torch/export: fused experts have the second name.
MODELOPT, MODELOPT_GLOBAL = "{}_scale {}_weight_scale", "{}_scale_2 {}_weight_scale_2"
# Tensors that are dropped with the quantized weight beside which they stand, by their names there:
# scales of activations, notes, zero points (which must be zero), group indices (in order).
SIDES = words("input_scale output_scale activation_scale act_scale input_scale_ub input_scale_2 "
              "scale_input act_per_tensor_scale qscale_act comfy_quant input_zero_point "
              "output_zero_point zero_point zp g_idx")


class Format(NamedTuple):
    """One way to store a weight. The first whose names, dtypes and method match applies.

    Names are relative to the module. "{}" stands for the stem, the last part of the output's name:
    usually `weight`, or a parameter such as gate_up_proj. The weight may be in modules below the
    one that holds the scale; "*" in its name is a number.

    - weight, scale, global_scale: a name, or alternatives separated by spaces; those of the two
      scales are pairs. The global scale multiplies the scales, or `divides` them; for FP8 it is
      optional. inverse: the scale divides the codes.
    - containers, scale_dtypes: dtypes as safetensors spells them.
    - number_format: a key of kernel.FORMATS; if empty, the dtype of the codes determines it.
    - groups: how many columns may share a scale, if the format fixes that; 0 for whole rows.
    - methods: the values of quant_method that mean this format, "" for none. FP8 has one meaning,
      so they are asked only where it has two scales; anything else needs one of them.
    - stacked: the scales of all experts are one tensor, although the weights are not.
    - transposed: the weight is stored transposed, so that scales of rows apply to columns.
    - sides: what else is dropped with the weight, besides SIDES.
    - requires: a key of the config, and the value that it must have.
    """

    title: str
    weight: str
    scale: str
    containers: frozenset[str] = F8
    scale_dtypes: frozenset[str] = FLOATS | EXPONENTS
    number_format: str = ""
    groups: tuple[int, ...] = ()
    methods: frozenset[str] = frozenset()
    global_scale: str = ""
    divides: bool = False
    inverse: bool = False
    stacked: bool = False
    transposed: bool = False
    sides: frozenset[str] = frozenset()
    requires: tuple[str, str] | None = None


FORMATS = [
    # modelcloud/GPTQModel quantize_fp8_weight: the scale is 448 / absmax and divides.
    Format("GPTQModel", "{}", "{}_scale_inv", F8, FLOATS, inverse=True,
           requires=(SEMANTICS, "inverse")),
    # deepseek-ai/DeepSeek-V3 inference/kernel.py multiplies by it. huggingface/transformers before
    # 5.0, integrations/finegrained_fp8.py, has the plural for fused experts.
    Format("DeepSeek-V3, Kimi-K2, Qwen3, GLM-5, MiniMax, Mistral", "{}",
           "{}_scale_inv {}_scales_inv", methods=words("fp8 mxfp8")),
    # huggingface/transformers modeling of Llama 4, FbgemmFp8Llama4TextExperts
    Format("Llama 4 (fbgemm)", "down_proj", "down_proj_scale", F8, FLOATS, transposed=True,
           requires=("quant_method", "fbgemm_fp8")),
    Format("compressed-tensors, ModelOpt, fbgemm, Quark, auto-round, AutoFP8", "{}", MODELOPT,
           methods=words("compressed-tensors modelopt fbgemm_fp8 quark auto-round")),
    # deepseek-ai/DeepSeek-V4 inference/model.py
    Format("DeepSeek-V4", "weight", "scale"),
    Format("Fish Audio", "{}", "{}.scale", F8, FLOATS),
    # vllm-project/vllm models/llama.py, mistral_mapping
    Format("Mistral consolidated", "weight", "qscale_weight", F8, FLOATS),
    # comfyanonymous/ComfyUI comfy/utils.py, convert_old_quants; kohya-ss/musubi-tuner
    # modules/fp8_optimization_utils.py, which may add a global scale
    Format("ComfyUI scaled, musubi-tuner", "weight", "scale_weight", F8, FLOATS,
           global_scale="scale_weight_tensor"),
    # pytorch/ao prototype/safetensors
    Format("torchao", "_{}_qdata", "_{}_scale", F8, FLOATS | {"F8_E8M0"},
           methods=words("torchao")),
    # vllm-project/vllm 53896: the shards of an embedding share the scale of the whole.
    Format("Qwen3.8 n-gram tables", "shard_*.weight", "weight_scale", F8, FLOATS),
    # huggingface/transformers 5 integrations/finegrained: save_pretrained splits the experts
    # but not their scales, where the rows of up follow those of gate.
    Format("experts saved by transformers 5",
           "*.gate_proj.weight *.up_proj.weight *.w1.weight *.w3.weight",
           "gate_up_proj_scale_inv", stacked=True),
    Format("experts saved by transformers 5", "*.down_proj.weight *.w2.weight",
           "down_proj_scale_inv", stacked=True),
    # deepseek-ai/DeepSeek-V3 inference/kernel.py, run on tensors that were viewed as bytes.
    Format("FP8 as bytes", "{}", "{}_scale_inv", U8, FLOATS, "E4M3", methods=frozenset([""])),
    # comfyanonymous/ComfyUI comfy/quant_ops.py: a note says what the bytes of weights are.
    Format("ComfyUI, E4M3 by note", "weight", "weight_scale", U8, FLOATS, "E4M3",
           methods=words("float8_e4m3fn")),
    Format("ComfyUI, E5M2 by note", "weight", "weight_scale", U8, FLOATS, "E5M2",
           methods=words("float8_e5m2")),
    # sgl-project/sglang layers/quantization/blockwise_int8.py and w8a8_int8.py
    Format("INT8 in blocks", "{}", "{}_scale_inv", **INT8, methods=words("blockwise_int8")),
    Format("INT8 of compressed-tensors, w8a8, Quark, ModelOpt", "{}", "{}_scale", **INT8,
           methods=words("compressed-tensors w8a8_int8 quark modelopt")),
    # InternLM/lmdeploy lite/apis/smooth_quant.py
    Format("INT8 of lmdeploy", "weight", "scale", **INT8, groups=(0,),
           methods=words("smooth_quant")),
    Format("INT8 of torchao", "_{}_qdata", "_{}_scale", **INT8, methods=words("torchao")),
    # pytorch/ao prototype/mx_formats; swizzled scales have another shape.
    Format("MXFP4 of torchao", "_{}_qdata", "_{}_scale",
           **MXFP4 | {"scale_dtypes": words("F8_E8M0")}, methods=words("torchao")),
    Format("NVFP4 of torchao", "_{}_qdata", "_{}_scale", **NVFP4, methods=words("torchao"),
           global_scale="_{}_per_tensor_scale"),
    # deepseek-ai/DeepSeek-V4 inference/convert.py: two codes a byte, the low half first.
    Format("experts of DeepSeek-V4 (MXFP4)", "weight", "scale", words("I8 F4"), words("F8_E8M0"),
           "E2M1", groups=(32,), methods=words("fp8")),
    # vllm-project/compressed-tensors compressors/mxfp4; intel/auto-round
    # export/export_to_llmcompressor
    Format("compressed-tensors MXFP4", "{}_packed", "{}_scale", **MXFP4,
           methods=words("compressed-tensors auto-round")),
    # radixark/miles tools/convert_mimo_v2_to_bf16.py: the method is fp8, whatever the experts are.
    Format("experts of MiMo-V2.5 and V2.6 (MXFP4)", "weight", "weight_scale", U8, U8, "E2M1",
           groups=(32,), methods=words("fp8"), requires=("store_dtype", "mxfp4")),
    # vllm-project/vllm layers/quantization/quark/schemes/quark_ocp_mx.py; NVIDIA/Model-Optimizer
    # torch/quantization/qtensor/mxfp4_tensor.py
    Format("MXFP4 of Quark and ModelOpt", "{}", MODELOPT, **MXFP4,
           methods=words("quark modelopt")),
    # vllm-project/compressed-tensors compressors/nvfp4: the global scale divides.
    Format("compressed-tensors NVFP4", "{}_packed", "{}_scale", **NVFP4,
           methods=words("compressed-tensors auto-round"), global_scale="{}_global_scale",
           divides=True, sides=words("input_global_scale")),
    # NVIDIA/Model-Optimizer torch/quantization/qtensor/nvfp4_tensor.py. Fused experts may have one
    # global scale for gate and one for up.
    Format("ModelOpt W4A8_NVFP4_FP8", "{}", MODELOPT, **NVFP4 | {"groups": (32, 16)},
           methods=words("modelopt"), global_scale=MODELOPT_GLOBAL,
           requires=("quant_algo", "W4A8_NVFP4_FP8")),
    Format("NVFP4 of ModelOpt and Quark", "{}", MODELOPT, **NVFP4, methods=words("modelopt quark"),
           global_scale=MODELOPT_GLOBAL),
    # huggingface/transformers integrations/finegrained/nvfp4.py: here the global scale multiplies.
    Format("transformers NVFP4", "{}", "{}_scale_inv {}_scale_inv", **NVFP4, methods=words("nvfp4"),
           global_scale="{}_global_scale {}_weight_global_scale",
           sides=words("input_global_scale")),
    # vllm-project/vllm models/inkling/nvidia
    Format("Inkling NVFP4", "{}", "{}.scale", **NVFP4, methods=words("modelopt"),
           global_scale="{}.scale2", sides=words("input_amax original_shape")),
    # sgl-project/sglang layers/quantization/w4afp8.py: two's complement, the low half first.
    Format("W4AFP8", "{}", "{}_scale_inv", I8, FLOATS, "INT4", groups=(128,),
           methods=words("w4afp8")),
    # vllm-project/compressed-tensors compressors/pack_quantized: eight codes per int32, the
    # lowest bits first, each 8 more than its value. The config gives the group size.
    Format("Kimi-K2-Thinking, compressed-tensors INT4", "{}_packed", "{}_scale", words("I32"),
           FLOATS, "UINT4B8", methods=words("compressed-tensors"), sides=words("shape")),
]
PLAIN_CAST = Format("plain FP8 cast", "{}", "")  # Has no scale; see --missing-scale.
KNOWN_METHODS = words("fp8 mistral").union([""], *(row.methods for row in FORMATS))
CONTAINERS = frozenset().union(*(row.containers for row in FORMATS))
# What other keys of a config may say under a method, for bytes and integers. With other values the
# same tensors mean something else: vllm-project/compressed-tensors config/base.py; amd/Quark 0.13;
# intel/auto-round 0.16.
ACCEPTED = {
    "compressed-tensors": {"format": words(
        "dense naive-quantized float-quantized int-quantized mixed-precision pack-quantized "
        "mxfp4-pack-quantized mxfp8-quantized nvfp4-pack-quantized")},
    "auto-round": {"data_type": words("mx_fp mx_fp4 nv_fp nv_fp4 float")},
    "quark": {"dtype": words("fp4 fp8_e4m3 fp8_e5m2 int8"), "scale_format": words("e8m0 float32")},
}

OTHER_TOOL = "dequantize this checkpoint with the tool that made it"

# evidence: what the files beside the shards say of the quantization

# Keys of a config, at any depth, that mark the weights as quantized. What stands under the first
# ones, in the metadata of shards, too, are objects.
QUANTIZATION_SECTIONS = ["quantization_config", "compression_config", "_quantization_metadata"]
QUANTIZATION_KEYS = [*QUANTIZATION_SECTIONS, "expert_dtype", "moe_quant_algo"]
METHOD_KEYS = "quantization_bit", "quant_type", "dfloat11_config"  # They count as methods.
# Quark's, auto-round's, SDNQ's and ComfyUI's keys; what Quark rotates offline (r1, r2) needs
# nothing.
ROTATIONS = words("rotation_config hadamard_config use_hadamard online_r1_rotation r3 r4 convrot")
# Sections of a config that say nothing of weights: Quark's, and those of compressed-tensors.
NOT_OF_WEIGHTS = re.compile("input_tensors|output_tensors|.*activations|.*cache.*", re.DOTALL)
BLOCK_SIZES_LIMIT = 64  # Any more that a config names are ignored.


@dataclass(frozen=True)
class Evidence:
    """What the files beside the shards say of the quantization.

    methods: every quant_method, {""} where there is none. facts: the texts that stand under each
    key of a quantization config. block_sizes: rows and columns. int4_groups: group sizes of INT4, 0
    for whole rows. cache_sizes: how many elements a scale of the key-value cache may have; empty if
    no config names a quantized cache.
    """

    methods: frozenset[str]
    facts: dict[str, set[str]]
    block_sizes: tuple[tuple[int, int], ...]
    int4_groups: tuple[int, ...]
    cache_sizes: frozenset[int]

    def __str__(self) -> str:
        methods = sorted(self.methods - {""})
        text = f"quant_method {', '.join(methods)}" if methods else "no quant_method"
        semantics = sorted(self.facts.get(SEMANTICS, ()))
        return text + "".join(f", {SEMANTICS} {value}" for value in semantics)


def contradiction(key: str, value) -> str | None:
    """Return why weights are not what names and dtypes say, from an entry of a config, or None."""
    match key, value:
        case "location", str() if not value.startswith("weight_"):
            return "transform_config changes activations at run time"
        case "sparsity_structure", str() if value not in ("dense", "unstructured", "0:0"):
            return "sparsity_config has weights stored without their zeros"
        # intel/neural-compressor fp8_quant/_quant_common/helper_modules.py
        case "fp8_config", _ if value:
            return "Intel Neural Compressor stores the weights of some layers transposed"
        case "quant_method", "sdnq":  # Disty0/sdnq src/sdnq/dequantizer.py
            return "sdnq stores weights regrouped, transposed or rotated"
        case "swap_weight_nibbles", _ if value:
            return "swap_weight_nibbles has the codes of a byte in the other order"
        case _ if key in ROTATIONS and value:
            return f"{key} rotates weights or activations at run time"
    return None


def read_notes(checkpoint: Checkpoint) -> Iterator[dict]:
    """Yield what shards say as configs do: in their metadata (ComfyUI, nunchaku), or in tensors of
    bytes beside the weights (ComfyUI, whose formats count as methods).
    """
    texts = [(checkpoint.root / shard, metadata[key].encode(errors="replace"))
             for key in QUANTIZATION_SECTIONS
             for shard, metadata in checkpoint.metadata.items() if key in metadata]
    texts += [(tensor.path, b'{"layers": {"": %b}}' % read_small(tensor))
              for tensor in checkpoint.tensors.values() if tensor.leaf == "comfy_quant"]
    for path, text in texts:
        try:
            value = parse_object(text)
            formats = {note["format"] for note in value.get("layers", {}).values()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: what ComfyUI notes there is not valid") from error
        if unknown := formats - {"float8_e4m3fn", "float8_e5m2"}:
            raise CheckpointError(f"{path}: is in ComfyUI's format {', '.join(map(str, unknown))}; "
                                  "only float8_e4m3fn and float8_e5m2 can be undone with a scale")
        yield value
        yield from ({"quant_method": name} for name in formats)


def says_nothing(key: str, value) -> bool:
    """Return whether an entry of a config, and all below it, is not about quantized weights."""
    # intel/auto-round export: extra_config names layers that stay as they are, with 16 bits.
    return bool(NOT_OF_WEIGHTS.fullmatch(key)) or (
        isinstance(value, dict) and value.get("bits") == 16)


def read_block_sizes(entries: list[tuple[str, object]]) -> tuple[tuple[int, int], ...]:
    sizes = []
    for key, value in entries:
        match key, value:
            case "weight_block_size" | "block_structure" | "block_size", [int(rows), int(cols)]:
                sizes.append((rows, cols))
            case "block_structure", str() if m := re.fullmatch(r"(\d{1,9})x(\d{1,9})", value):
                sizes.append((int(m[1]), int(m[2])))
            case "group_size", int():
                sizes.append((1, value))
    known = dict.fromkeys(size for size in sizes if min(size) > 0 and max(size) < 1 << 31)
    return tuple(known)[:BLOCK_SIZES_LIMIT]


def read_int4_groups(entries: list[tuple[str, object]]) -> tuple[int, ...]:
    """Return the group sizes of packed integers, or () if any of them is not symmetric INT4.

    vllm-project/compressed-tensors: each group of layers may have its own format. W8A16 has the
    same tensors as INT4, and its scales have shapes that would fit INT4, too.
    """
    sizes = []
    for _, group in entries:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int" or group.get(
                "format") not in (None, "pack-quantized"):
            continue
        if weights.get("num_bits") != 4 or weights.get("symmetric", True) is not True:
            return ()
        size = weights.get("group_size")
        sizes.append(size if isinstance(size, int) and size > 0 else 0)
    return tuple(sizes)


def read_cache_sizes(config: dict) -> frozenset[int]:
    """Return how many elements a scale of a cache may have: one, or one for each head. (Parameters
    of the same names have as many as a head has dimensions.)
    """
    numbers = [(key, value) for key, value in walk(config) if isinstance(value, int)]
    heads, kv_heads, head_dims, widths = (
        {value for key, value in numbers if key == name}
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"))
    head_dims |= {width // count for width in widths for count in heads if count}
    return frozenset({1} | (heads | kv_heads) - head_dims)


def read_evidence(checkpoint: Checkpoint) -> Evidence:
    """Collect what configs and notes say. Raises CheckpointError for what cannot be undone."""
    config = checkpoint.files.get(CONFIG_NAME, {})
    said = {CONFIG_NAME: [value for key, value in walk(config) if key in QUANTIZATION_KEYS],
            SIDECAR_NAME: checkpoint.files.get(SIDECAR_NAME), "": [*read_notes(checkpoint)]}
    entries = [*walk([*said.values()], says_nothing)]
    said |= {name: checkpoint.files.get(name, {}).get("quantization")
             for name in (PARAMS_NAME, NVIDIA_CONFIG_NAME)}
    for name, section in said.items():
        for key, value in walk(section):
            if problem := contradiction(key, value):
                raise CheckpointError(f"{checkpoint.root / name}: {problem}; {OTHER_TOOL}")
    facts, sections = {}, [*said.values()]
    for key, value in walk(sections, says_nothing):
        if isinstance(value, str):
            facts.setdefault(key, set()).add(value)
    methods = {*facts.get("quant_method", ())}
    methods |= {"modelopt"} if "quant_algo" in dict(walk(said[NVIDIA_CONFIG_NAME])) else set()
    methods |= {"mistral"} if "qformat_weight" in dict(walk(said[PARAMS_NAME])) else set()
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    methods |= {key for key, value in walk(plain) if key in METHOD_KEYS and value}
    cached = any((key.startswith("kv_cache") and value) or value == "attn_head"
                 for key, value in walk(sections))
    return Evidence(frozenset(methods or [""]), facts, read_block_sizes(entries),
                    read_int4_groups(entries), read_cache_sizes(config) if cached else frozenset())


def read_integers(tensor: Tensor) -> list[int]:
    kind = {"I32": "i", "I64": "q"}.get(tensor.dtype)
    if kind is None:
        raise tensor.error(f"is {tensor.dtype}; expected I32 or I64")
    return memoryview(read_small(tensor)).cast(kind).tolist()


# grids: which scale belongs to which element

BLOCK_SIZES = (16, 32, 64, 128, 256, 1)  # Seen in formats, for one axis each.
EXACT_BLOCKS = ((1, 32), (1, 16), (1, 128))  # May occur besides the blocks that a config names.
MAX_SLICES = 1024  # Tensor-parallel ranks that a fused weight may have been made for.


def spellings(E: int, n: int, k: int, rows: int, cols: int) -> set[tuple[int, ...]]:
    """Return the shapes in which writers store (n, k) scales of blocks for each of E experts."""
    shapes = {(E, n, k), (E, n, 1, k, 1)}  # ModelOpt has the axes of length 1.
    if E == 1:
        shapes |= {(n, k), (n, 1, k, 1), (n, k, 1)}  # The last is musubi-tuner's.
        return shapes | ({(n * k,)} if rows == 1 else set())  # auto-round: flattened
    shapes |= {(E, n)} if k == rows == 1 else set()
    shapes |= {(E, k)} if n == cols == 1 else set()
    return shapes | ({(E,), (E, 1)} if n == k == 1 else set())


@functools.cache  # Thousands of experts have the same shapes.
def find_grids(shape: tuple[int, ...], scale_shape: tuple[int, ...],
               block_sizes: tuple[tuple[int, int], ...] = (), groups: tuple[int, ...] = (),
               transposed: bool = False, fused: bool = False) -> list[Grid]:
    """Return the grids by which scales of one shape can cover a weight of another shape.

    A weight is E experts of N rows and K columns; a matrix has E = 1. The first tier that fits
    counts: one scale for all; per row, column or expert; one of block_sizes; a block size out of
    BLOCK_SIZES on each axis. It is never computed from the shapes: 192 rows over 2 rows of scales
    are blocks of 128, the second cut off, not blocks of 96. Per-row scales of a `transposed` weight
    belong to its columns. The rows of a `fused` weight may consist of equal slices, one for each
    tensor-parallel rank, and blocks start anew in each. If block_sizes are given and none fits,
    only EXACT_BLOCKS are tried. With `groups` of columns, 0 for whole rows, only these are tried.
    """
    if len(shape) > 3:  # a convolution: its scales are per tensor or per row
        shape = (shape[0], math.prod(shape[1:]))
    E, N, K = (1, 1, 1, *shape)[-3:]
    if not E * N * K or (math.prod(scale_shape) == 1 and not groups):
        return [Grid(E * N, K, max(E * N, 1), max(K, 1), slab_rows=max(E * N, 1))]
    if transposed and E > 1:
        scale_shape = (*scale_shape[:-2], *scale_shape[:-3:-1])
    if len(scale_shape) > 3:  # ModelOpt: [n, 1, k, 1], whose blocks are 128x128
        block_sizes += ((128, 128),)
    sliced = [(N // count, *block) for block in block_sizes or [(128, 128)] if fused
              for count in range(2, min(N, MAX_SLICES) + 1) if N % count == 0]
    rest = [block for block in EXACT_BLOCKS if K % block[1] == 0]
    rest = rest if block_sizes else itertools.product(BLOCK_SIZES, BLOCK_SIZES)
    tiers = [[(N, 1, K), (N, N, 1), (N, N, K)], [(N, *block) for block in block_sizes],
             sliced, [(N, *block) for block in rest]]
    for tier in [[(N, 1, g or K) for g in groups if not g or K % g == 0]] if groups else tiers:
        grids = {}
        for slab, rows, cols in tier:
            n, k = N // slab * ceil_div(slab, rows), ceil_div(K, cols)
            if scale_shape in spellings(E, n, k, rows, cols):
                # Sizes that differ only past the edges are the same blocks.
                seen = slab, min(rows, slab), min(cols, K)
                grids.setdefault(seen, Grid(E * N, K, rows, cols, slab))
        if grids:
            return [*grids.values()]
    return []


# match: each weight, its row, its scales


class Quantization(NamedTuple):
    """How a weight's codes become values.

    output: the name of the values; shape: theirs, in elements. scale: None for a weight that is
    cast as if its scale were 1. grid: which scale belongs to which element of the matrix in which
    the weight begins at row first_row. packed_cols: codes per row of the weight on disk.
    """

    format: Format
    number_format: str
    output: str
    shape: tuple[int, ...]
    scale: Tensor | None
    grid: Grid
    global_scale: Tensor | None = None
    first_row: int = 0
    packed_cols: int = 0


class Match(NamedTuple):
    """A format that fits a weight, the name of the values, and the scales."""

    format: Format
    output: str
    scale: Tensor
    global_scale: Tensor | None


def plain_cast(weight: Tensor) -> Quantization:
    """Return how an FP8 weight without a scale is read: as if its scale were 1."""
    (grid,) = find_grids(weight.shape, ())
    return Quantization(PLAIN_CAST, weight.dtype.removeprefix("F8_"), weight.name, weight.shape,
                        None, grid, packed_cols=grid.cols)


@functools.lru_cache(4096)  # Weights of all layers share the endings of their names.
def formats_for(dtype: str, ending: str) -> list[tuple[Format, str, list[str]]]:
    """Return the formats that store a tensor of this dtype under a name with this ending, each with
    the endings of the output's name and of those of the scale and the global scale, if it has one.
    """
    found = []
    for format in FORMATS:
        pattern = re.escape(format.weight).replace(r"\ ", "|").replace(r"\*", r"\d{1,9}")
        pattern = pattern.replace(r"\{\}", r"(?P<stem>[^.]+)")
        matched = re.search(rf"(?:^|\.)({pattern})\Z", ending)
        if dtype in format.containers and matched:
            head, stem = ending[: matched.start(1)], matched.groupdict().get("stem", "weight")
            output = head + stem if "{}" in format.weight else ending
            for names in itertools.zip_longest(format.scale.split(), format.global_scale.split()):
                scales = [head + name.replace("{}", stem) for name in names if name]
                found.append((format, output, scales))
    return found


def applies(format: Format, evidence: Evidence) -> bool:
    """Return whether what the configs say lets a format apply."""
    facts = evidence.facts
    if format.requires and format.requires[1] not in facts.get(format.requires[0], ()):
        return False
    if SEMANTICS in facts and (facts[SEMANTICS] != {"inverse"} or not format.inverse):
        return False
    methods = format.methods & evidence.methods
    return format.containers <= F8 or (bool(methods) and all(
        facts.get(key, set()) <= values
        for method in methods for key, values in ACCEPTED.get(method, {}).items()))


def find_matches(weight: Tensor, tensors: dict[str, Tensor], evidence: Evidence) -> list[Match]:
    """Return the first match of a weight, then those with other scales."""
    found, ending = {}, ".".join(weight.name.split(".")[-3:])
    head = weight.name.removesuffix(ending)
    for format, output, names in formats_for(weight.dtype, ending):
        scale = tensors.get(head + names[0])
        global_scale = tensors.get(head + names[1]) if len(names) > 1 else None
        if not scale or scale.name in found or not applies(format, evidence):
            continue
        optional = weight.dtype in F8 or len(names) == 1
        if scale.dtype in format.scale_dtypes and (
                global_scale.dtype in FLOATS if global_scale else optional):
            found[scale.name] = Match(format, head + output, scale, global_scale)
    meant = [match for match in found.values() if match.format.methods & evidence.methods]
    if len(found) > 1 and len(meant) != 1:
        raise weight.error(f"has two scales, {' and '.join(found)}, and {CONFIG_NAME} names no "
                           "quant_method that decides; remove the one that is not meant")
    return sorted(found.values(), key=lambda match: match not in meant)


def shape_of(weight: Tensor, number_format: str, tensors: dict[str, Tensor],
             evidence: Evidence) -> tuple[tuple[int, ...], int]:
    """Return the shape of a weight's values, and how many codes a row of a packed one has."""
    if kernel.FORMATS[number_format].codes_per_byte == 1:
        return weight.shape, 0
    # safetensors gives the shape of F4 in elements.
    packed_cols = {"F4": 1, "I32": 8}.get(weight.dtype, 2) * math.prod(weight.shape[-1:])
    if weight.dtype != "I32":
        return (*weight.shape[:-1], packed_cols), packed_cols
    if not evidence.int4_groups:
        raise weight.error(f"is packed, and {CONFIG_NAME} does not say that all such weights are "
                           "symmetric with num_bits 4 (others have zero points, or fit the same "
                           "shapes)")
    # Rows are padded to whole int32; a tensor beside the weight holds the true shape.
    stored = tensors.get(f"{weight.name.removesuffix('packed')}shape")
    if stored is None:
        raise weight.error("has no weight_shape beside it")
    shape = (*read_integers(stored),)
    if shape[:-1] != weight.shape[:-1] or not packed_cols - 8 < shape[-1] <= packed_cols:
        raise stored.error(f"says {[*shape]}, but {weight.name} is {[*weight.shape]}, eight codes "
                           "in each")
    return shape, packed_cols


def place_in_stack(weight: Tensor, scale: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the shape of the stack whose scales these are, and where in it the weight begins."""
    expert, projection, _ = weight.name.split(".")[-3:]
    if len(weight.shape) != 2 or not scale.shape or int(expert) >= scale.shape[0]:
        raise weight.error(f"is {[*weight.shape]}, and {scale.name} {[*scale.shape]} has no scales "
                           "for it")
    rows, cols = weight.shape
    parts = 1 if projection in ("down_proj", "w2") else 2
    first_row = (parts * int(expert) + (projection in ("up_proj", "w3"))) * rows
    return (scale.shape[0], parts * rows, cols), first_row


def misfit(shape: tuple[int, ...], packed_cols: int, grids: list[Grid], match: Match,
           evidence: Evidence) -> str | None:
    """Return in what a weight of this shape and its scales do not fit together, or None."""
    if len(grids) > 1:
        return "two grids fit"
    if not grids:
        named = [f"; the config names blocks of {rows}x{cols}, which need "
                 f"{[*map(ceil_div, (1, 1, *shape)[-2:], (rows, cols))]}"
                 for rows, cols in evidence.block_sizes[:1]]
        return "".join(["no block size fits", *named])
    scale, experts = match.global_scale, grids[0].rows // grids[0].slab_rows
    # There is one global scale, one for each expert, or ModelOpt's two, for gate and up.
    halves = match.format.global_scale == MODELOPT_GLOBAL and experts > 1 and shape[-2] % 2 == 0
    fits = scale is None or math.prod(scale.shape) in (1, experts) or (
        halves and scale.shape == (experts, 2))
    return None if fits and packed_cols % 2 == 0 else "the grid fits, but not the rest"


def quantize(weight: Tensor, match: Match, tensors: dict[str, Tensor],
             evidence: Evidence) -> Quantization:
    """Decide shape and grid of a weight. Raises CheckpointError where none or two grids fit."""
    format, output, scale, global_scale = match
    number_format = format.number_format or weight.dtype.removeprefix("F8_")
    shape, packed_cols = shape_of(weight, number_format, tensors, evidence)
    stack, first_row = place_in_stack(weight, scale) if format.stacked else (shape, 0)
    groups = evidence.int4_groups if number_format == "UINT4B8" else format.groups
    grids = find_grids(stack, scale.shape, evidence.block_sizes, groups, format.transposed,
                       "qkv_proj" in weight.name)
    if number_format == "INT8":  # Quark stores groups transposed, so that they span rows.
        grids = [grid for grid in grids if grid.block_cols > 1 or grid.block_rows == 1]
    if problem := misfit(stack, packed_cols, grids, match, evidence):
        scales = [f"{tensor.name} {[*tensor.shape]}" for tensor in (scale, global_scale) if tensor]
        raise weight.error(f"is {[*shape]} ({number_format}, {evidence}), scaled by "
                           f"{' and '.join(scales)}: {problem}; expected one scale per tensor, "
                           "expert, row, column or block, neither swizzled nor transposed")
    if re.search(r"experts\..*_weight\.weight_packed\Z", weight.name):
        output = weight.name.removesuffix(".weight_packed")  # The module has the parameter's name.
    return Quantization(format, number_format, output, shape, scale, grids[0], global_scale,
                        first_row, packed_cols or grids[0].cols)


def match_weights(tensors: dict[str, Tensor],
                  evidence: Evidence) -> tuple[dict[str, Quantization], dict[str, Tensor]]:
    """Return the weights that match a format, by name, and all their scales."""
    weights, scales, outputs = {}, {}, set(tensors)
    for weight in tensors.values():
        found = find_matches(weight, tensors, evidence) if weight.dtype in CONTAINERS else ()
        if not found:
            continue
        weights[weight.name] = quantize(weight, found[0], tensors, evidence)
        output = weights[weight.name].output
        if output != weight.name and output in outputs:
            raise weight.error(f"becomes {output}, which exists too")
        outputs.add(output)
        used = [found[0].scale, found[0].global_scale]
        # The scale of another match may be a parameter that is only called `scale`.
        used += [match.scale for match in found[1:] if "weight" in match.scale.leaf]
        scales.update((scale.name, scale) for scale in used if scale)
    for name in weights.keys() & scales.keys():
        raise scales[name].error("is the scale of a weight and has a scale itself; no known format "
                                 "stores them so")
    return weights, scales


# account: every tensor that takes part in a quantization is known, by its place

INTEGERS = words("I8 U8 I16 U16 I32 U32")  # I64, U64 and BOOL never hold codes.
# Never copied: only quantized weights have these dtypes. FNUZ bits mean other values.
STRANGE_DTYPES = words("F4 F6_E2M3 F6_E3M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0")
# May stand beside any weight and are copied; `scale` only if it is not the weight's own scale.
PARAMETERS = words("bias e_score_correction_bias correction_bias expert_bias scale tid2eid "
                   "position_ids num_batches_tracked")
# Whoever wrote it, the name of a scale continues that of its codes with one of SCALE_WORDS, and
# with no words but these and BESIDE_SCALE. Before that, CODE_WORDS may be left out.
SCALE_WORDS = words("scale scales qscale qscales wscale wscales wcscale wcscales wtscale wtscales "
                    "scaling absmax scb suh svh compressed lut")
BESIDE_SCALE = words(
    "weight weights inv inverse reciprocal factor factors block blocks group channel global double "
    "quant quantized quantizer deq dequant fp int per tensor row col w zeros and table")
CODE_WORDS = words("weight weights qweight qweights packed data qdata blocks quant quantized "
                   "values float fp bitmask trellis")
CODE_ENDINGS = "qweight", "qzeros", "W_q", "_packed", "_qdata"  # Codes under any method or none.
TABLES = words("ids index idx mask table tid2eid")  # Last words of tables of integers.
ORPHAN_ENDINGS = "weight_scale", "scale_weight", "_scale_inv", "_scales_inv"
# Scales of the key-value cache and of attention (vllm-project/vllm model_loader/weight_utils.py),
# and of activations that layers share.
CACHE_SCALES = words("q_scale k_scale v_scale kv_scale prob_scale prob_output_scale qscale_act")
# These serve only a cache, whatever their shape: Tencent/AngelSlim compressor/quant/core/save.py;
# vllm-project/vllm-ascend quantization/methods/kv_c8.py
CACHE_NAME = re.compile(r"(.*\.)?(([kv]_cache|fa_[qkv])\.|kv_cache_)(scale|offset)", re.DOTALL)
ONES = {"F32": b"\0\0\x80\x3f", "BF16": b"\x80\x3f", "F16": b"\0\x3c"}  # Little-endian.


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


def require_zero(tensor: Tensor, zero: bytes = b"\0") -> None:
    if read_small(tensor).strip(zero):
        raise tensor.error("is not all zero; asymmetric formats are not supported")


def serves_no_weight(tensor: Tensor, tensors: dict[str, Tensor], evidence: Evidence) -> bool:
    """Return whether a tensor of a quantized checkpoint is dropped wherever it stands.

    Parameters may be called like scales of the key-value cache (lucidrains/local-attention has a
    q_scale as long as a head), so a q_scale needs a config that names such a cache, or both k_scale
    and v_scale beside it.
    """
    leaf, module = tensor.leaf, tensor.name.removesuffix(tensor.leaf)
    weight, scale = tensors.get(f"{module}weight"), tensors.get(f"{module}scale_weight")
    match leaf:
        case "scaled_fp8":  # ComfyUI's mark
            return math.prod(tensor.shape) <= 2
        case "scale_weight" | "scale_input" if scale and weight and weight.dtype in FLOATS:
            # ComfyUI's older files give plain weights a scale, too.
            if scale.dtype not in ONES or read_small(scale) != ONES[scale.dtype]:
                raise scale.error(f"is not 1, and {weight.name} is {weight.dtype}; no known format "
                                  f"has it; it would have to be applied; {OTHER_TOOL}")
            return True
        case "q_zero_point" | "k_zero_point" | "v_zero_point":  # vllm-project/llm-compressor
            require_zero(tensor)
            return True
        case "k_bias" | "v_bias":  # ModelOpt's affine cache
            scale = tensors.get(module + leaf.replace("bias", "scale"))
            return scale is not None and serves_no_weight(scale, tensors, evidence)
        case "q_scale" if not evidence.cache_sizes and (
                not {f"{module}k_scale", f"{module}v_scale"} <= tensors.keys()):
            return False
    if leaf in CACHE_SCALES:
        return math.prod(tensor.shape) in (evidence.cache_sizes or {1})
    return bool(CACHE_NAME.fullmatch(tensor.name))


def splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield a name as a place, which is empty or ends with . or _, and the part that continues it.

    The longest place comes first. A _ that begins a name (torchao, quanto) does not count.
    """
    name = re.sub(r"(?<![^.])_+", "", name)
    ends = [found.end() for found in re.finditer("[._]", name)]
    yield from ((name[:end], name[end:]) for end in [*reversed(ends), 0])


def check_side(side: Tensor, quantization: Quantization) -> None:
    """Raise CheckpointError for zero points that are not zero and groups that are not in order."""
    if side.leaf.endswith(("zero_point", "zp")):
        packed = quantization.number_format == "UINT4B8" and side.dtype == "I32"
        require_zero(side, b"\x88" if packed else b"\0")  # packed as the codes are: 8 is zero
    elif side.leaf.endswith("g_idx"):
        groups = read_integers(side)
        in_order = [col // quantization.grid.block_cols for col in range(len(groups))]
        if groups not in (in_order, [-1] * len(groups)):
            raise side.error("reorders the groups of columns; that is not supported")


def may_stay(tensor: Tensor, place: str, part: str, output: str) -> bool:
    """Return whether a tensor at a place of a weight is a parameter: by its name, as a sibling (w_2
    is not a part of w), or because it shares no more than w13_ with w13_weight.
    """
    shared = output == f"{place}weight" and not place.endswith(".")
    sibling = part.isdigit() and output.rpartition(".")[2] != "weight"
    return shared or sibling or part == "bias" or tensor.leaf in PARAMETERS


def find_sides(tensors: list[Tensor], weights: dict[str, Quantization]) -> dict[str, Tensor]:
    """Return the tensors that are dropped with the weights where they stand. Parameters may stand
    there, too; anything else would have to be applied, so it is an error.
    """
    places, sides = {}, {}
    for name, quantization in weights.items():
        output = quantization.output  # Its module is a place of l.weight, and w13_ of w13_weight.
        ends = name.removesuffix("packed"), output.removesuffix("weight")
        for place in (f"{name}.", f"{name}_", f"{output}.", f"{output}_", *ends):
            places[place] = quantization
    for tensor in tensors if weights else ():
        if tensor.name.endswith("_rot"):  # vllm-project/vllm-ascend: indexer.q_rot
            raise tensor.error(f"is a rotation, which would have to be applied; {OTHER_TOOL}")
        place, part = next((split for split in splits(tensor.name) if split[0] in places), ("", ""))
        if not part or "." in part:
            continue
        quantization = places[place]
        if part in SIDES | quantization.format.sides:
            check_side(tensor, quantization)
            sides[tensor.name] = tensor
        elif not may_stay(tensor, place, part, quantization.output):
            raise tensor.error(f"stands beside {quantization.output} ({quantization.format.title}),"
                               " and no known format has it; it would have to be applied; "
                               f"{OTHER_TOOL}")
    return sides


def words_of(part: str) -> frozenset[str]:
    """Return the words of a part of a name in lower case, without the digits that end them."""
    return frozenset(word.rstrip("0123456789") for word in re.split("[._]", part.lower())) - {""}


def find_codes(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Return what may be codes by all names that a scale of them may continue: l.w_packed by its
    own, by l.w and, if w were a word of CODE_WORDS, by l.
    """
    codes = {}
    for tensor in tensors:
        integers = tensor.dtype in INTEGERS and (len(tensor.shape) > 1 or tensor.leaf == "weight")
        if tensor.dtype in F8 or integers:
            codes |= {place[:-1]: tensor for place, part in splits(f"{tensor.name}.")
                      if words_of(part) <= CODE_WORDS}
    return codes


def names_scale(part: str) -> bool:
    """Return whether a part that continues the name of codes is the name of their scale."""
    named = words_of(part)
    return not named.isdisjoint(SCALE_WORDS) and named <= SCALE_WORDS | BESIDE_SCALE


def looks_quantized(tensor: Tensor, evidence: Evidence) -> bool:
    """Return whether a tensor can only be codes, by its dtype, or its name and the methods."""
    leaf = tensor.leaf.lstrip("_")
    if tensor.dtype in F8:  # Zero points and scales of activations are no weights.
        return leaf.removeprefix("weight_") in SIDES
    if tensor.dtype not in INTEGERS or len(tensor.shape) < 2:
        return tensor.dtype in STRANGE_DTYPES
    if evidence.methods - KNOWN_METHODS and leaf.rpartition("_")[2] not in TABLES:
        return True
    named = leaf.endswith(("weight", "_proj")) and bool(evidence.methods - {"fp8", ""})
    return tensor.dtype not in ("I16", "U16") and (named or leaf.endswith(CODE_ENDINGS))


def find_orphans(rest: list[Tensor], evidence: Evidence) -> list[Tensor]:
    """Return the scales of no weight among the tensors that no format has.

    Raises CheckpointError if any of these looks quantized: it would be left half converted. A scale
    of no weight may be that of any FP8 weight below it.
    """
    codes, orphans = find_codes(rest), []
    below = {place: tensor for tensor in rest if tensor.dtype in F8
             for place, _ in splits(tensor.name) if place}
    for tensor in rest:
        weight = next((codes[place[:-1]] for place, part in splits(tensor.name)
                       if place[:-1] in codes and names_scale(part)), None)
        if tensor.dtype not in F8 and tensor.leaf.endswith(ORPHAN_ENDINGS):
            weight = weight or below.get(tensor.name.removesuffix(tensor.leaf))
        if weight or looks_quantized(tensor, evidence):
            weight, beside = weight or tensor, f", beside {tensor.name}" if weight else ""
            hint = "" if weight.dtype in F8 else "; only the config could tell what it means"
            raise weight.error(f"({weight.dtype}{beside}) looks quantized, in no format known here "
                               f"({evidence}){hint}; {OTHER_TOOL}")
        if tensor.dtype not in F8 and tensor.leaf.endswith(("_scale_inv", "_scales_inv")):
            orphans.append(tensor)  # No parameter is called so.
    return orphans


def check_twice(checkpoint: Checkpoint, dropped: dict[str, Tensor]) -> None:
    """Raise CheckpointError if no index says which of two tensors of one name counts, unless they
    are copies of what is dropped.
    """
    weight_map = checkpoint.files.get(checkpoint.index_name, {}).get("weight_map", {})
    for tensor in checkpoint.twice:
        first = checkpoint.tensors[tensor.name]
        if tensor.name not in weight_map and not (
                tensor.name in dropped and tensor.signature == first.signature
                and read_small(first) == read_small(tensor)):
            raise tensor.error(f"stands in {first.path.name} too and no index says which counts; "
                               "remove the file that is not part of the checkpoint")


def read_formats(checkpoint: Checkpoint) -> Reading:
    """Recognize every quantized weight. Raises CheckpointError where anything is not known.

    The only data it reads are zero points, orders of groups, shapes of INT4 weights, ComfyUI's
    notes and dummy scales, and scales that stand in several shards.
    """
    for name in checkpoint.metadata:
        if re.fullmatch(r"model(\d+-mp\d+|-rank-\d+-part-\d+)\.safetensors", name):
            raise CheckpointError(f"{checkpoint.root / name}: one of the slices that "
                                  "tensor-parallel ranks load; convert the checkpoint that they "
                                  "were cut from")
    tensors, evidence = checkpoint.tensors, read_evidence(checkpoint)
    weights, dropped = match_weights(tensors, evidence)
    if weights or evidence.methods != {""} or any(t.dtype in F8 for t in tensors.values()):
        dropped |= {name: tensor for name, tensor in tensors.items()
                    if name not in weights and serves_no_weight(tensor, tensors, evidence)}
    others = [tensor for name, tensor in tensors.items()
              if name not in weights and name not in dropped]
    dropped |= find_sides(others, weights)
    rest = [tensor for tensor in others if tensor.name not in dropped]
    orphans = find_orphans(rest, evidence)
    dropped |= {tensor.name: tensor for tensor in orphans}
    check_twice(checkpoint, dropped)
    return Reading(weights, dropped, orphans, [t for t in rest if t.dtype in F8])


# --- plan: what every byte of the output will be ---

WINDOW = 16 << 20  # Bytes that a worker renders, writes or compares at once.
PAGE = 4096  # The alignment that direct I/O asks of offsets, lengths and memory.
DATA_ALIGNMENT = 64  # Bytes: GPUs load 16 at once where all tensors start at a multiple of that.
NO_FINGERPRINT = "0" * 16  # Stands in planned headers.
FINGERPRINT = re.compile(rf'(?<="{PROGRAM}":")[0-9a-f]{{16}}(?=")'.encode())
MISSING_SCALE = ["keep", "cast", "error"]


class Step(NamedTuple):
    """One tensor of an output shard: a copy of its source, or its values if that is quantized."""

    output: Tensor
    source: Tensor
    quantization: Quantization | None

    @property
    def sources(self) -> list[Tensor]:
        quantization = self.quantization
        scales = [quantization.scale, quantization.global_scale] if quantization else []
        return [tensor for tensor in (self.source, *scales) if tensor]

    @property
    def lost(self) -> list[Path]:
        """The input shards that it needs and that have been emptied."""
        return [tensor.path for tensor in self.sources if tensor.emptied and tensor.size]


class Proof(NamedTuple):
    """What an emptied input shard says of an output shard that took from it (section empty).

    fingerprint: None, which no file has, if it names other shards only. digest: a hash over those
    of the windows, of so many bytes, of the proven file. stamps: of the input shards that were
    still whole.
    """

    fingerprint: str | None
    digest: str
    window: int
    stamps: dict[Path, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Shard:
    """An output shard.

    stamps: size and time of each input shard that it takes data from, unless that has been emptied.
    proofs: what an emptied one says of it, or None if version 2.0 emptied it and recorded nothing.
    """

    path: Path
    header: bytes
    steps: list[Step]
    stamps: dict[Path, tuple[int, int]]
    proofs: dict[Path, Proof | None]

    @property
    def size(self) -> int:
        return self.steps[-1].output.stop

    @property
    def window(self) -> int:
        """The size of the windows by which it is hashed."""
        return next((proof.window for proof in self.proofs.values() if proof), WINDOW)

    def whole_sources(self, step: Step) -> set[Path]:
        return {tensor.path for tensor in step.sources} & self.stamps.keys()

    def sealed(self, fingerprint: str) -> bytes:
        return FINGERPRINT.sub(fingerprint.encode(), self.header, count=1)


@dataclass(frozen=True)
class Plan:
    """What becomes of the checkpoint in one folder, in the folder `out`.

    files: what stands beside the shards, by name: a text to write, or the path of a file to copy;
    index and config, which say that all is there, come last. left_out: files that are not copied.
    """

    checkpoint: Checkpoint
    reading: Reading
    out: Path
    shards: list[Shard]
    files: dict[str, str | Path]
    left_out: list[str]

    @property
    def last_names(self) -> list[str]:
        return [self.checkpoint.index_name, PARAMS_NAME, CONFIG_NAME]


def shards_of(plans: list[Plan]) -> list[Shard]:
    return [shard for plan in plans for shard in plan.shards]


def steps_of(shards: Iterable[Shard]) -> list[Step]:
    return [step for shard in shards for step in shard.steps]


def header_bytes(header: dict) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def find_proofs(checkpoint: Checkpoint, name: str, steps: list[Step]) -> dict[Path, Proof | None]:
    """Return what the emptied sources of an output shard say of it."""
    proofs = {}
    for path in sorted({path for step in steps for path in step.lost}):
        text = checkpoint.metadata[path.relative_to(checkpoint.root).as_posix()].get(PROGRAM, "")
        if re.fullmatch("([0-9a-f]{16})?", text):
            proofs[path] = None
            continue
        try:
            fields = json.loads(text)["takers"].get(name, [None, "", WINDOW, {}])
            fingerprint, digest, window, stamps = fields
            if not isinstance(fingerprint, str | None) or (
                    [type(digest), type(window)] != [str, int]):
                raise ValueError("its fields are not text, text, a number and an object")
            if window % PAGE or not 0 < window <= 1 << 30:
                raise ValueError("the size of its windows is wrong")
            stamps = {checkpoint.root / source: (*was,) for source, was in stamps.items()}
            proofs[path] = Proof(fingerprint, digest, window, stamps)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: its record of the shards that took from it cannot be "
                                  f"read ({error}); download it again") from error
    return proofs


def plan_shard(checkpoint: Checkpoint, name: str, tensors: list[Tensor],
               weights: dict[str, Quantization], out: Path) -> Shard:
    """Lay out an output shard as safetensors.torch.save_file would."""
    steps, path, order = [], out / name, [*DTYPE_BITS]
    for tensor in tensors:
        quantization, output = weights.get(tensor.name), tensor
        if quantization:
            shape = quantization.shape
            output = Tensor(quantization.output, "BF16", shape, path, 0, 2 * math.prod(shape))
        steps.append(Step(output, tensor, quantization))
    steps.sort(key=lambda step: (order.index(step.output.dtype), step.output.name))
    # pytorch/ao prototype/safetensors describes each quantized tensor by JSON with a _type.
    kept = {key: text for key, text in checkpoint.metadata[name].items()
            if key not in [*QUANTIZATION_KEYS, "tensor_names"] and '"_type"' not in text}
    kept |= {"format": "pt", PROGRAM: NO_FINGERPRINT}
    header, stop = {"__metadata__": dict(sorted(kept.items()))}, 0
    for output, _, _ in steps:
        start, stop = stop, stop + output.size
        header[output.name] = {"dtype": output.dtype, "shape": output.shape,
                               "data_offsets": (start, stop)}
    text = header_bytes(header)
    # The reader of headers says where the tensors are in the file, and checks this one.
    placed = read_entries(path, {step.output.name: header[step.output.name] for step in steps},
                          len(text), len(text) + stop)
    steps = [step._replace(output=output) for step, output in zip(steps, placed, strict=True)]
    proofs = find_proofs(checkpoint, name, steps)
    sources = {tensor.path for step in steps for tensor in step.sources if tensor.size}
    stamps = {path: checkpoint.stamps[path] for path in sorted(sources - proofs.keys())}
    return Shard(path, text, steps, stamps, proofs)


def plan_shards(checkpoint: Checkpoint, reading: Reading, out: Path,
                missing_scale: str) -> list[Shard]:
    weights, kept = dict(reading.weights), {}
    if missing_scale == "cast":
        weights |= {weight.name: plain_cast(weight) for weight in reading.missing}
    for tensor in checkpoint.tensors.values():
        if tensor.name not in reading.dropped:
            kept.setdefault(tensor.path, []).append(tensor)
    return [plan_shard(checkpoint, name, kept[checkpoint.root / name], weights, out)
            for name in checkpoint.metadata if checkpoint.root / name in kept]


def refuse_missing(missing: list[Tensor]) -> None:
    if missing:
        raise missing[0].error(f"has no scale, one of {len(missing)} weights; --missing-scale "
                               "keep leaves them FP8, cast takes their scale as 1")


# the files beside the shards

# Files that only a quantized checkpoint needs; a loader would take the output for quantized.
QUANTIZATION_FILES = [NVIDIA_CONFIG_NAME, SIDECAR_NAME, "quant_cfg.json", "quant_config.json",
                      "quantize_config.json", "quanto_qmap.json", "quant_model_description*.json"]
# Not copied: weights in other formats, indexes, and unfinished files.
UNWANTED = [*QUANTIZATION_FILES, *OTHER_SETS, "*.index.json", INDEX_PATTERN, "*.bin", "*.pt",
            "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.tmp", "*.aria2"]
DTYPE_KEYS = ["torch_dtype", "dtype"]
# The parts of a config that describe a language model, in configs of several models.
TEXT_CONFIGS = words("text_config llm_config language_config thinker_config talker_config")
QUANTIZED_DTYPE = re.compile(r"(torch\.)?((nv|mx)?fp[48]|float[48]|u?int[48])", re.IGNORECASE)


def check_beside(path: Path, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a file of weights that no index names cannot be copied."""
    metadata, members = read_header(path)
    tensors = {tensor.name: tensor for tensor in members}
    alone = replace(checkpoint, metadata={path.name: metadata}, tensors=tensors, twice=[])
    reading = read_formats(alone)
    same = tensors.keys() & checkpoint.tensors.keys()
    if same or reading.weights or reading.dropped or reading.missing:
        what = f"repeats {min(same)}" if same else "holds quantized weights"
        raise CheckpointError(f"{path}: is not named by {checkpoint.index_name} and {what}; move "
                              "it elsewhere")


def find_side_files(checkpoint: Checkpoint, top: Path,
                    parts: set[Path]) -> tuple[list[str], list[str]]:
    """Return what to copy beside the shards, and what not; hidden files are in neither list.

    top: the folder that no link may leave; parts: the folders of other checkpoints.
    """
    copied, left_out = [], []
    for folder, folders, names in walk_folders(checkpoint.root):
        folders[:] = [name for name in folders if folder / name not in parts]
        names += [name for name in folders
                  if (folder / name).is_symlink() or is_like(name, OTHER_SETS)]
        for name in sorted(names):
            path = folder / name
            relative = path.relative_to(checkpoint.root).as_posix()
            # git-lfs needs .gitattributes. Shards may be links to anywhere.
            if (name[0] == "." and name != ".gitattributes") or path in checkpoint.stamps or (
                    relative == checkpoint.index_name):
                continue
            check_link(path, top)
            if not path.is_file() or is_like(name, UNWANTED):
                left_out.append(relative)
                continue
            check_download(path)
            read_bytes(path, 0, 64)  # It must be readable, and no stand-in.
            if path.suffix == ".safetensors":
                check_beside(path, checkpoint)
            copied.append(relative)
    return copied, left_out


def complete_index(index: dict, tensors: Iterable[Tensor], folder: Path) -> dict:
    """Return an index of these tensors: their paths from a folder and their total size."""
    meta, tensors = index.get("metadata"), sorted(tensors, key=lambda tensor: tensor.name)
    shards = {path: path.relative_to(folder).as_posix() for path in {t.path for t in tensors}}
    return index | {
        "metadata": {**(meta if isinstance(meta, dict) else {}),
                     "total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": {tensor.name: shards[tensor.path] for tensor in tensors}}


def bf16_config(value, of_text: bool = True):
    """Return a config, or a part of one, that describes plain weights.

    of_text: the part describes the language model, so its dtype becomes bfloat16; other parts keep
    theirs, unless a quantized one is named: their weights may all be copied.
    """
    if isinstance(value, list):
        return [bf16_config(item, False) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: "bfloat16" if key in DTYPE_KEYS and isinstance(item, str)
            and (of_text or QUANTIZED_DTYPE.match(item))
            else bf16_config(item, of_text and key in TEXT_CONFIGS)
            for key, item in value.items() if key not in QUANTIZATION_KEYS}


def edited_files(checkpoint: Checkpoint, shards: list[Shard], out: Path,
                 reading: Reading) -> dict[str, str]:
    """Return the text of the index, and those of configs that differ in the output."""
    values, files = {}, checkpoint.files
    index = files.get(checkpoint.index_name, {} if len(checkpoint.metadata) > 1 else None)
    if index is not None and shards:
        outputs = [step.output for step in steps_of(shards)]
        values[checkpoint.index_name] = complete_index(index, outputs, out)
    if PARAMS_NAME in files:
        values[PARAMS_NAME] = {key: value for key, value in files[PARAMS_NAME].items()
                               if key not in ["quantization", *QUANTIZATION_KEYS]}
    plain = checkpoint.tensors and not reading.weights and not reading.missing
    for name in fnmatch.filter(files, CONFIG_PATTERN):
        if plain and not dict(walk(files[name])).keys() & {*QUANTIZATION_KEYS}:
            continue
        try:
            values[name] = config = bf16_config(files[name])
        except RecursionError as error:
            raise CheckpointError(f"{checkpoint.root / name}: is nested too deeply") from error
        empty = [key for key in DTYPE_KEYS if key in config and config[key] is None]
        config |= dict.fromkeys(empty[:1], "bfloat16")
    return {name: json.dumps(value, indent=2) + "\n" for name, value in values.items()
            if name == checkpoint.index_name or value != files.get(name)}


def make_plans(root: Path, out: Path, missing_scale: str) -> list[Plan]:
    """Plan every checkpoint in a folder and below; that of the folder itself comes last.

    missing_scale: what to do with an FP8 weight without a scale: "keep" it as it is, "cast" it with
    scale 1, or raise an "error". Raises CheckpointError where the rules do not decide.
    """
    checkpoints, plans = find_checkpoints(root), []
    for checkpoint in checkpoints:
        reading, folder = read_formats(checkpoint), out / checkpoint.root.relative_to(root)
        if missing_scale == "error":
            refuse_missing(reading.missing)
        shards = plan_shards(checkpoint, reading, folder, missing_scale)
        copied, left_out = find_side_files(checkpoint, root, {part.root for part in checkpoints})
        files = {name: checkpoint.root / name for name in copied}
        files |= edited_files(checkpoint, shards, folder, reading)
        plan = Plan(checkpoint, reading, folder, shards, files, left_out)
        files |= {name: files.pop(name) for name in plan.last_names if name in files}
        plans.append(plan)
    if not any(plan.shards for plan in plans):
        raise CheckpointError(f"{root}: holds scales only; download the weights, too")
    return plans


# --- render: the bytes [start, stop) of one planned shard ---

OPEN_FILES = 8  # A worker holds at most so many files open: its shard and those of scales.


def in_pages(size: int) -> int:
    return ceil_div(size, PAGE) * PAGE


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # Keeps the tensor alive as long as the view.
    return memoryview(memory).cast("B")


def on_stream(stream: torch.cuda.Stream | None):
    """Return a context for work on a CUDA stream. Without one, CUDA, which may be broken, is left
    alone: torch.cuda.stream(None) would initialize it.
    """
    return torch.cuda.stream(stream) if stream else nullcontext()


class Worker:
    """What one thread needs to render windows: memory, open files, and a GPU stream.

    nonfinite: the output tensors in which it has found NaN or infinite values.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(device) if self.device.type == "cuda" else None
        self.memory, self.files, self.nonfinite = {}, {}, set()

    def scratch(self, name: str, size: int) -> torch.Tensor:
        """Return memory that is reused, because getting new memory costs more than filling it.

        It starts on a page, for direct I/O. Pinned memory, which a GPU copies from, does anyway.
        """
        if len(self.memory.get(name, ())) < size:
            pinned = self.stream is not None
            buffer = torch.empty(in_pages(size) + (0 if pinned else PAGE), dtype=torch.uint8,
                                 pin_memory=pinned)
            start = -buffer.data_ptr() % PAGE
            self.memory[name] = buffer[start : start + in_pages(size)]
        return self.memory[name][:size]

    def read(self, path: Path, start: int, into: torch.Tensor) -> torch.Tensor:
        """Fill a uint8 tensor on the CPU with the bytes of a file, and return it."""
        if path not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.close()
            try:
                self.files[path] = open(path, "rb", 0)
            except FileNotFoundError as error:
                raise Changed(path) from error  # It was there when it was planned.
        with naming(path):
            self.files[path].seek(start)
            if in_full(self.files[path].readinto, as_bytes(into)):
                raise Changed(path)  # It was longer when it was planned.
        return into

    def elements(self, name: str, tensor: Tensor, first: int, count: int) -> torch.Tensor:
        """Return the bytes of `count` elements of a tensor from `first` on, in scratch memory."""
        memory = self.scratch(name, count * tensor.element_size)
        return self.read(tensor.path, tensor.start + first * tensor.element_size, memory)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


def begin_thread(begun: threading.Semaphore) -> None:
    """Make torch compute in the calling thread alone, with subnormal numbers: the workers keep all
    cores busy, and threads of torch would wait for each other after every operation.
    """
    torch.get_num_threads()  # At its first use in a thread, torch sets it to that of the process.
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    begun.release()


def start_threads(count: int) -> ThreadPoolExecutor:
    """Return a pool with so many threads running, or fewer if the system allows no more."""
    threads, begun, gate = torch.get_num_threads(), threading.Semaphore(0), threading.Event()
    executor = ThreadPoolExecutor(count, initializer=begin_thread, initargs=(begun,))
    running = 0
    try:
        while running < count:  # Each call needs a new thread, because it holds it.
            executor.submit(gate.wait)
            running += 1
    except RuntimeError:
        if not running:
            raise
        executor._max_workers = running  # Else every call would try to start another thread.
    finally:
        gate.set()
        for _ in range(running):
            begun.acquire()
        torch.set_num_threads(threads)  # begin_thread sets it for new threads of the process, too.
    return executor


def progress(doing: str, total: int, disable: bool = False) -> tqdm:
    """Return a bar; where there is no terminal, a log gets a line of it every 30 seconds."""
    terminal = Steady(sys.stderr).isatty()
    stream = Steady(sys.stderr) if terminal else Log(sys.stderr)
    return tqdm(desc=doing, total=total, unit="B", unit_scale=True, disable=disable, file=stream,
                dynamic_ncols=terminal, mininterval=0.1 if terminal else 30)


def run_workers(pool: list[Worker], tasks: Iterable[tuple], work: Callable, bar: tqdm) -> None:
    """Call work(worker, *task) in a thread for each worker until no task is left or one has failed.
    It returns how many bytes it has done.
    """
    lock, stopped, tasks = threading.Lock(), threading.Event(), iter(tasks)

    def loop(worker: Worker) -> None:
        while not stopped.is_set():
            with lock:
                task = next(tasks, None)
            if task is None:
                break
            size = work(worker, *task)
            with lock:
                bar.update(size)

    executor = start_threads(len(pool))
    try:
        for future in as_completed([executor.submit(loop, worker) for worker in pool]):
            future.result()
    finally:
        stopped.set()
        executor.shutdown()
        for worker in pool:
            worker.close()


def read_codes(step: Step, row: int, col: int, M: int, N: int, worker: Worker) -> torch.Tensor:
    """Return the codes of a piece as kernel.dequantize takes them: (M, bytes) uint8."""
    per_byte = kernel.FORMATS[step.quantization.number_format].codes_per_byte
    row_bytes = step.quantization.packed_cols // per_byte
    first, last = col // per_byte, ceil_div(col + N, per_byte)
    width = last - first if M == 1 else row_bytes
    start = step.source.start + row * row_bytes + first
    return worker.read(step.source.path, start, worker.scratch("codes", M * width)).view(M, width)


def read_scales(quantization: Quantization, row: int, col: int, M: int, N: int,
                worker: Worker) -> torch.Tensor:
    """Return the scales of a piece, a float32 matrix on the CPU.

    Global scales are applied first, in float32, as ModelOpt and compressed-tensors do.
    """
    scale, global_scale = quantization.scale, quantization.global_scale
    if scale is None:
        return torch.ones(1, 1, dtype=torch.float32)
    top, bottom, left, right = quantization.grid.scale_region(row, col, M, N)
    rows, cols = quantization.grid.scale_shape
    raw = worker.elements("scales", scale, top * cols + left, (bottom - top) * (right - left))
    scales = kernel.widen_scales(raw, scale.dtype)
    if scale.dtype == "F8_E4M3" and (scales < 0).any():
        raise scale.error("holds negative scales of groups; a format that keeps something else in "
                          "their sign is not known here")
    scales = scales.view(bottom - top, right - left)
    if global_scale is None:
        return scales
    count = math.prod(global_scale.shape)  # each for as many rows: all, an expert's, or half
    which = torch.arange(top, bottom) // (rows // count)
    raw = worker.elements("factors", global_scale, 0, count)
    factors = kernel.widen_scales(raw, global_scale.dtype)[which].view(-1, 1)
    return scales / factors if quantization.format.divides else scales * factors


def render_weight(step: Step, start: int, stop: int, out: torch.Tensor, worker: Worker) -> None:
    """Fill `out`, bfloat16 on the CPU or the worker's GPU, with elements of a weight."""
    quantization, at = step.quantization, 0
    grid, inverse = quantization.grid, quantization.format.inverse
    skipped = quantization.first_row * grid.cols
    limit = min(WINDOW // 2, kernel.MAX_PIECE[worker.device.type])
    for row, col, M, N in grid.pieces(skipped + start, skipped + stop, limit):
        codes = read_codes(step, row - quantization.first_row, col, M, N, worker)
        scales = read_scales(quantization, row, col, M, N, worker)
        values = out[at : at + M * N].view(M, N)
        with on_stream(worker.stream):
            result = values if values.device.type == worker.device.type else torch.empty_like(
                values, device=worker.device)
            kernel.dequantize(codes, scales, result, quantization.number_format, grid, row, col,
                              inverse)
            if kernel.canonicalize(result):
                worker.nonfinite.add(step.output)
            values.copy_(result)  # Does nothing if they are the same.
        at += M * N


def render_step(step: Step, start: int, stop: int, out: torch.Tensor, worker: Worker) -> None:
    """Fill `out`, uint8, with the bytes [start, stop) of an output tensor."""
    if step.quantization:
        render_weight(step, start // 2, stop // 2, out.view(torch.bfloat16), worker)
        return
    data = worker.scratch("copied", len(out)) if out.is_cuda else out
    worker.read(step.source.path, step.source.start + start, data)
    with on_stream(worker.stream):
        out.copy_(data)  # Does nothing if they are the same.


def render(shard: Shard, header: bytes, start: int, stop: int, worker: Worker) -> torch.Tensor:
    """Return the bytes [start, stop) of a shard, uint8, in the worker's memory."""
    out, head = worker.scratch("window", WINDOW)[: stop - start], header[start:stop]
    as_bytes(out)[: len(head)] = head
    first = bisect_right(shard.steps, start, key=lambda step: step.output.stop)
    last = bisect_left(shard.steps, stop, key=lambda step: step.output.start)
    for step in shard.steps[first:last]:
        base = step.output.start
        begin, end = max(base, start), min(step.output.stop, stop)
        render_step(step, begin - base, end - base, out[begin - start : end - start], worker)
    return out


def windows_of(size: int, window: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + window, size)) for start in range(0, size, window))


# --- write: windows under a temporary name, then the final one ---

READING_VERSION = 3  # Raise it when the same tensors and row give new values.
TEMPORARY = re.compile(r".*\.[0-9a-f]{16}\.[0-9a-f]{8}\.tmp", re.DOTALL)
DIRECT = getattr(os, "O_DIRECT", 0)
NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}  # File systems refuse it with these.
NOT_SYNCED = {*NOT_DIRECT, errno.ENOSYS}  # FUSE and some NFS refuse to sync a folder.


def temporary(path: Path, fingerprint: str = NO_FINGERPRINT) -> Path:
    """Return a new name for a file until it is whole; no other run has the same."""
    return path.with_name(f"{path.name[:40]}.{fingerprint}.{uuid.uuid4().hex[:8]}.tmp")


def find_temporary(folders: Iterable[Path]) -> list[Path]:
    """Return the unfinished files of this program in some folders."""
    return [path for folder in sorted({*folders}) for path in sorted(folder.glob("*.tmp"))
            if TEMPORARY.fullmatch(path.name)]


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, where the system supports it."""
    if path.is_dir() and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(number)
    except OSError as error:
        if not path.is_dir() or error.errno not in NOT_SYNCED:
            raise
    finally:
        os.close(number)


def facts_of(step: Step) -> list:
    """Return everything but data that decides the bytes of an output tensor."""
    facts = [tensor.signature for tensor in step.sources]
    if quantization := step.quantization:
        grid, row = quantization.grid, quantization.format
        facts += [quantization.number_format, row.divides, row.inverse, quantization.first_row,
                  quantization.packed_cols, grid.rows, grid.cols, grid.block_rows,
                  grid.block_cols, grid.slab_rows]
    return [step.output.name, step.output.shape, *facts]


def fingerprint_of(shard: Shard) -> str:
    """Return 16 hex digits that tell from what data an output shard is made, and how.

    The middle page of a quantized weight tells it from another; copied tensors are often the same,
    except at their ends.
    """
    facts = [READING_VERSION, [facts_of(step) for step in shard.steps]]
    digest, pages = hashlib.sha256(json.dumps(facts).encode()), set()
    for step in shard.steps:
        for tensor in (tensor for tensor in step.sources if tensor.size):
            start, last = tensor.start, max(tensor.start, tensor.stop - PAGE)
            middle = max(start, (start + tensor.stop - PAGE) // 2)
            pages |= {(tensor.path, at, min(at + PAGE, tensor.stop))
                      for at in ([middle] if step.quantization else [start, middle, last])}
    for path, group in itertools.groupby(sorted(pages), key=lambda page: page[0]):
        with naming(path), open(path, "rb", PAGE) as file:
            for _, start, stop in group:
                file.seek(start)
                digest.update(file.read(stop - start))
    return digest.hexdigest()[:16]


def check_loadable(path: Path) -> None:
    """Raise CheckpointError if safetensors, which loaders use, refuses a shard."""
    try:
        with suppress(OSError, RuntimeError), safe_open(path, framework="pt"):
            pass  # If the file cannot be mapped here, that says nothing of it.
    except SafetensorError as error:
        raise CheckpointError(f"{path}: safetensors cannot load it ({error})") from error


def give_name(path: Path, final: Path) -> None:
    """Give a whole file its final name, which must still be free."""
    if is_there(final):
        raise CheckpointError(f"{final}: has appeared while this run was writing it; run the "
                              "command again")
    os.rename(path, final)


class Output:
    """A shard being written, in windows that come in any order."""

    def __init__(self, shard: Shard):
        self.shard, fingerprint = shard, fingerprint_of(shard)
        self.path, self.header = temporary(shard.path, fingerprint), shard.sealed(fingerprint)
        self.lock, self.left = threading.Lock(), ceil_div(shard.size, WINDOW)

    def write(self, view: memoryview, start: int, flags: int) -> None:
        with naming(self.path), open(self.path, "r+b", 0, opener=lambda path, own: os.open(
                path, own | flags)) as file:
            file.seek(start)
            in_full(file.write, view)

    def add(self, worker: Worker, start: int, stop: int) -> int:
        """Render a window and write it; give the shard its name if it was the last.

        Direct writes skip the page cache; writing through it takes 2.5 to 4 times as long for files
        larger than the cache. They are of whole pages, and some file systems refuse them.
        """
        view = as_bytes(render(self.shard, self.header, start, stop, worker))
        direct = 0 if len(view) % PAGE else DIRECT
        try:
            self.write(view, start, direct)
        except OSError as error:
            if not direct or error.errno not in NOT_DIRECT:
                raise
            self.write(view, start, 0)
        with self.lock:
            self.left -= 1
            whole = not self.left
        if whole:
            sync(self.path)
            check_loadable(self.path)
            check_unchanged(self.shard.stamps)
            give_name(self.path, self.shard.path)
        return stop - start


def write_shards(shards: list[Shard], pool: list[Worker], bar: tqdm) -> None:
    """Write shards. Raises Changed if an input shard is not as its stamp says."""
    outputs = []

    def windows() -> Iterator[tuple[Output, int, int]]:
        for shard in sorted(shards, key=lambda shard: -shard.size):
            outputs.append(Output(shard))
            path = outputs[-1].path
            with naming(path), open(path, "xb") as file:
                file.truncate(shard.size)
            yield from ((outputs[-1], *window) for window in windows_of(shard.size, WINDOW))

    try:
        run_workers(pool, windows(), lambda worker, output, *window: output.add(worker, *window),
                    bar)
    finally:
        for output in outputs:
            output.path.unlink(missing_ok=True)
    for folder in {shard.path.parent for shard in shards}:
        sync(folder)


@contextmanager
def new_file(path: Path, put: Callable[[Path, Path], None] = give_name) -> Iterator[BinaryIO]:
    """Yield a file to write under a temporary name; `put` then gives it the final one."""
    unfinished = temporary(path)
    try:
        with naming(unfinished), open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def write_file(path: Path, content: str | Path) -> None:
    """Write a text, or a copy of another file."""
    with new_file(path) as file:
        if isinstance(content, Path):
            with naming(content), open(content, "rb") as original:
                shutil.copyfileobj(original, file)
                if file.tell() != content.stat().st_size:  # Some file systems end early.
                    raise CheckpointError(f"{content}: was read only in part; try again")
        else:
            file.write(content.encode())


# --- check: whether values are plausible, and whether an output is right ---

PLAUSIBLE = 1e-6, 4.0  # Root mean squares of weights.
PLAUSIBLE_CAST = 1e-6, 32.0  # Embeddings, norms, and plain casts, which hold both.
WIDE_NAME = re.compile(r"embed|norm|wte|(^|\.)shared(\.|$)")  # T5 calls its embeddings `shared`.
SAMPLED_WEIGHTS, SAMPLED_ELEMENTS = 5, 64 << 10  # Of each kind, and of each of these.


def kind_of(step: Step) -> str:
    """Return the format of a weight in words."""
    quantization = step.quantization
    if quantization.scale is None:
        return f"{quantization.number_format} without a scale"
    grid = quantization.grid
    block = f"{grid.block_rows}x{grid.block_cols} block"
    if grid.block_cols >= grid.cols and grid.block_rows >= grid.slab_rows:
        block = "tensor" if grid.slab_rows >= grid.rows else "expert"
    elif grid.block_cols >= grid.cols and grid.block_rows == 1:
        block = "row"
    elif grid.block_cols == 1 and grid.block_rows >= grid.slab_rows:
        block = "column"
    second = " and a global scale" if quantization.global_scale else ""
    return f"{quantization.number_format}, {quantization.scale.dtype} scale per {block}{second}"


def sample(step: Step, worker: Worker) -> float:
    """Return the root mean square of values from the middle of a weight."""
    size, cols = step.output.size // 2, step.quantization.grid.cols
    count = min(size, SAMPLED_ELEMENTS)
    start = (size - count) // 2
    start -= start % cols if cols <= count else 0  # Whole rows are read at once.
    out = torch.empty(count, dtype=torch.bfloat16)
    render_weight(step, start, start + count, out, worker)
    return out.double().square().mean().sqrt().item()


def has_unit_scales(step: Step, worker: Worker) -> bool:
    scale = step.quantization.scale
    size = scale.size // scale.element_size if scale else 0
    raw = worker.elements("scales", scale, 0, min(size, SAMPLED_ELEMENTS)) if size else None
    return bool(size) and bool((kernel.widen_scales(raw, scale.dtype) == 1).all())


def judge(members: list[Step], worker: Worker) -> tuple[list[str], int]:
    """Return what is wrong with some weights of one kind, and how many have been judged."""
    wrong, judged = [], 0
    for step in members[:: ceil_div(len(members), SAMPLED_WEIGHTS)]:
        name, rms = step.source.name, sample(step, worker)
        wide = not step.quantization.scale or WIDE_NAME.search(name)
        low, high = PLAUSIBLE_CAST if wide else PLAUSIBLE
        if rms == 0:  # An unused expert may be all zero.
            continue
        judged += 1
        if not low <= rms <= high:
            wrong.append(f"{name} has a root mean square of {rms:.3g}, expected {low:g} to "
                         f"{high:g}")
        elif has_unit_scales(step, worker):
            wrong.append(f"the scales of {name} are all 1")
    return wrong, judged


def find_implausible(steps: Iterable[Step]) -> list[str]:
    """Return a line for each kind of weight most of whose sampled values are implausible.

    A misread format (an inverse scale that is multiplied, exponents read as numbers, a divisor used
    as a factor) is wrong by orders of magnitude, in every weight of its kind. What this cannot see:
    scales in tiles, the order of nibbles, and factors below a hundred.
    """
    kinds, worker, found = {}, Worker(), []
    for step in steps:
        if step.quantization and not step.lost and step.output.size:
            kinds.setdefault(kind_of(step), []).append(step)
    with start_threads(1) as thread:  # In the caller's thread, torch might start helpers.
        for kind, members in kinds.items():
            wrong, judged = thread.submit(judge, members, worker).result()
            if wrong and 2 * len(wrong) >= judged:
                found.append(f"{kind}: {wrong[0]} ({len(wrong)} of {judged} sampled weights are "
                             "implausible): usually an inverse scale, raw codes or a missing "
                             "second scale; --verify reads the format the same way and cannot see "
                             "it")
    worker.close()
    return found


# values: the tensors of an output against what the input gives


class Difference(NamedTuple):
    """A file of an output, and a line that begins with it and says how it differs."""

    path: Path
    line: str


def first_difference(tensor: Tensor, step: Step, start: int, got: torch.Tensor,
                     expected: torch.Tensor) -> tuple[int, str] | None:
    """Return the first element in which the bytes of a window, from `start` on, differ, and a line
    about it. NaN are equal to each other.
    """
    size = tensor.element_size
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    got, expected = got.view(bits), expected.view(bits)
    differs, as_text = got != expected, lambda value: f"{value % (1 << 8 * size):#x}"
    if step.quantization:
        got, expected, as_text = got.view(torch.bfloat16), expected.view(torch.bfloat16), str
        differs &= ~(got.isnan() & expected.isnan())
    for at in differs.nonzero()[:1, 0].tolist():
        place = torch.unravel_index(torch.tensor(start // size + at), tensor.shape)
        return start // size + at, (
            f"{tensor.path}: {tensor.name}: element {[axis.item() for axis in place]} is "
            f"{as_text(got[at].item())}, expected {as_text(expected[at].item())}")
    return None


def find_pairs(steps: list[Step], there: dict[str, Tensor]) -> list[tuple[Tensor, Step]]:
    """Return the tensors that are there as they were planned, but for their place and their values,
    with their steps.
    """
    return [(there[step.output.name], step) for step in steps if step.output.name in there
            and there[step.output.name].signature == step.output.signature]


def compare_values(pairs: list[tuple[Tensor, Step]], windows: dict[Path, int], pool: list[Worker],
                   bar: tqdm) -> tuple[list[Difference], dict[Path, str]]:
    """Compare tensors with what their steps give, unless the source has been emptied.

    Returns the first difference in each, and a digest of every file of which `windows` gives the
    size of its windows: a hash over the hashes of its header and windows, in their order.
    """
    first, hashes = {}, {path: {} for path in windows}

    def compare(worker: Worker, tensor: Tensor, step: Step, start: int, stop: int) -> int:
        got = worker.read(tensor.path, tensor.start + start, worker.scratch("got", stop - start))
        if tensor.path in windows:
            digest = hashlib.sha256(as_bytes(got)).digest()
            hashes[tensor.path][tensor.start + start] = digest
        if not step.lost:
            expected = worker.scratch("window", stop - start)
            render_step(step, start, stop, expected, worker)
            found = None if torch.equal(got, expected) else first_difference(
                tensor, step, start, got, expected)
            if found:
                first[tensor] = min(found, first.get(tensor, found))
        return stop - start

    run_workers(pool, ((tensor, step, *window) for tensor, step in pairs for window in windows_of(
        tensor.size, windows.get(tensor.path, WINDOW))), compare, bar)
    digests = {}
    for path, parts in hashes.items():
        header = hashlib.sha256(read_bytes(path, 0, header_size(path))).digest()
        whole = b"".join([header, *(parts[start] for start in sorted(parts))])
        digests[path] = hashlib.sha256(whole).hexdigest()
    return sorted(Difference(tensor.path, line) for tensor, (_, line) in first.items()), digests


# verify: an output, whoever made it, against the plans


def flattened(value, place: str = "") -> dict[str, str]:
    """Return the values in a config as JSON texts, by their dotted paths.

    The dtype may have either name; the version of transformers is left out.
    """
    if not isinstance(value, dict):
        return {place: json.dumps(value, sort_keys=True)}
    found = {}
    for key, item in value.items():
        if key != "transformers_version":
            key = DTYPE_KEYS[-1] if key in DTYPE_KEYS else key
            found |= flattened(item, f"{place}.{key}" if place else key)
    return found


def differences(got: dict[str, str], expected: dict[str, str],
                where: Callable[[str], Path]) -> Iterator[Difference]:
    """Yield the keys whose values differ between two mappings; where: the file of a key."""
    for key in dict.fromkeys([*expected, *got]):
        if got.get(key) != expected.get(key):
            yield Difference(path := where(key), f"{path}: {key} is "
                             f"{got.get(key, 'missing')[:200]}, expected "
                             f"{expected.get(key, 'none')[:200]}")


def differing_files(plan: Plan, tensors: Iterable[Tensor]) -> Iterator[Difference]:
    """Yield what differs in the index, by the tensors that are there, and in the JSON files, and
    each file that only a quantized checkpoint has.
    """
    index_name, known = plan.checkpoint.index_name, plan.checkpoint.files
    expected = {name: json.loads(text) if isinstance(text, str) else known[name]
                for name, text in plan.files.items() if isinstance(text, str) or name in known}
    if index_name in expected or (plan.out / index_name).exists():
        index = expected.get(index_name, {})
        expected[index_name] = complete_index(index, tensors, plan.out)
    for path, value in ((plan.out / name, value) for name, value in expected.items()):
        try:
            check_regular(path)
            got = parse_object(read_bytes(path))
            yield from differences(flattened(got), flattened(value), lambda _, path=path: path)
        except FileNotFoundError:
            yield Difference(path, f"{path}: is missing")
        except CheckpointError as error:
            yield Difference(path, str(error))
        except (ValueError, RecursionError) as error:
            yield Difference(path, f"{path}: is not valid JSON ({error})")
    for path in sorted(plan.out.glob("*")):
        if is_like(path.name, QUANTIZATION_FILES):
            yield Difference(path, f"{path}: only a quantized checkpoint has this")


def compare_headers(plan: Plan) -> tuple[list[Difference], list[tuple[Tensor, Step]]]:
    """Return what differs in names, dtypes, shapes and JSON files, and the tensors that do not
    differ in these, in whatever shard they are, with their steps.
    """
    paths = {shard.path for shard in plan.shards}
    if not all(path.exists() for path in paths):  # Another program may name its shards otherwise.
        paths |= {path for path in plan.out.glob("*.safetensors") if path.name[0] != "."}
    found, there = [], {}
    for path in sorted(paths - {plan.out / name for name in plan.files}):
        if not is_there(path):
            continue
        try:
            check_regular(path)
            tensors = read_header(path, remedy="delete it")[1]
            check_loadable(path)
        except CheckpointError as error:
            found.append(Difference(path, str(error)))
            continue
        for tensor in tensors:
            if (first := there.setdefault(tensor.name, tensor)) is not tensor:
                found.append(Difference(path, f"{path}: {tensor.name} stands in {first.path} too"))
    steps = steps_of(plan.shards)
    outputs = {step.output.name: step.output for step in steps}
    found += differences({name: str(tensor) for name, tensor in there.items()},
                         {name: str(tensor) for name, tensor in outputs.items()},
                         lambda name: (there.get(name) or outputs[name]).path)
    found += differing_files(plan, there.values())
    return found, find_pairs(steps, there)


def find_differences(plans: list[Plan], mine: list[Shard], pool: list[Worker],
                     disable_bar: bool) -> tuple[list[Difference], list[Difference]]:
    """Compare an output, whoever made it, with the plans: return how names, dtypes, shapes and JSON
    files differ, and how the values of the shards in `mine` do.

    How tensors are spread over shards is free, and so are the order and padding of headers, the
    fingerprint, and the payload of a NaN. A shard with an emptied source is held against the
    digest that was recorded when it was proven.
    """
    found, pairs = [], []
    wanted = {*map(id, steps_of(mine))}
    for plan in plans:
        if not plan.out.is_dir():
            raise CheckpointError(f"{plan.out}: no such folder; give the output of a conversion")
        differing, alike = compare_headers(plan)
        found += differing
        pairs += [(tensor, step) for tensor, step in alike if id(step) in wanted]
    proven = [shard for shard in mine if shard.proofs]
    lost = [shard for shard in proven if shard.path.is_file()]
    with progress("verifying", sum(tensor.size for tensor, _ in pairs), disable_bar) as bar:
        differing, digests = compare_values(
            pairs, {shard.path: shard.window for shard in lost}, pool, bar)
    for path in (shard.path for shard in proven if shard not in lost):
        differing.append(Difference(path, f"{path}: is missing, and its input was emptied, so its "
                                          "values cannot be checked in other files"))
    for path, source, proof in ((shard.path, *item) for shard in lost
                                for item in shard.proofs.items()):
        if proof is None:
            differing.append(Difference(path, f"{path}: cannot be checked, because {source} was "
                                              "emptied by a version without digests"))
        elif proof.digest != digests[path]:
            differing.append(Difference(path, f"{path}: is not as it was proven when {source} was "
                                              "emptied"))
    return found, differing


# --- publish: what OUT holds, and the files beside the shards, which say that all is there ---

LOCK_NAME = ".fp8_cast_bf16.lock"
RANKS_NAME = "fp8_cast_bf16.ranks"  # Holds the digest of the plan while ranks work.


def refusal(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: is not what this input gives with these options; give another "
                           "folder, or delete it, if it is not an only copy that --delete-source "
                           "has left")


def was_proven(shard: Shard) -> bool:
    """Return whether a file can be the shard that was proven before some of its input was emptied:
    it has the same tensors, and the fingerprint that was recorded, if any was. What fingerprint
    it should have cannot be computed any more.
    """
    try:
        metadata, tensors = read_header(shard.path)
    except CheckpointError:
        return False
    fingerprints = {proof.fingerprint for proof in shard.proofs.values() if proof}
    planned = {step.output.signature for step in shard.steps}
    return {tensor.signature for tensor in tensors} == planned and (
        fingerprints <= {metadata.get(PROGRAM, "")})


def is_planned(shard: Shard) -> bool:
    """Return whether the file that has a shard's name has its planned size and header."""
    path = shard.path
    if path.is_symlink() or not path.is_file():
        return False
    if shard.proofs:
        return was_proven(shard)
    return path.stat().st_size == shard.size and (
        read_bytes(path, 0, len(shard.header)) == shard.sealed(fingerprint_of(shard)))


def same_file(path: Path, content: str | Path) -> bool:
    """Return whether a file has the bytes of another, or the values of a JSON text."""
    if not path.is_file() or path.is_symlink():
        return False
    if isinstance(content, Path):
        with naming(content):
            return filecmp.cmp(path, content, shallow=False)
    with suppress(ValueError, RecursionError):
        text = read_bytes(path).decode()
        return content == text or json.loads(content) == json.loads(text)
    return False


def check_shards(shards: list[Shard], workers: int) -> list[Shard]:
    """Return the shards that are still to be made.

    Raises CheckpointError for files that have their names and are not they, and names every shard
    that cannot be made again because its input has been emptied.
    """
    there = [shard for shard in shards if is_there(shard.path)]
    with start_threads(workers) as executor:
        planned = [*executor.map(is_planned, there)]
    wrong = [shard for shard, right in zip(there, planned, strict=True) if not right]
    todo = [shard for shard in shards if shard not in there]
    if lost := [shard for shard in todo + wrong if shard.proofs]:
        lines = [f"{shard.path} (to make it, download "
                 f"{', '.join(map(str, shard.proofs))})" for shard in lost]
        raise CheckpointError(f"missing, or not what was made of this input before it was emptied: "
                              f"{'; '.join(lines)}. If you have moved a file, moving it back is "
                              "enough")
    for shard in wrong:
        raise refusal(shard.path)
    return todo


def find_strangers(folders: set[Path], known: set[Path]) -> list[Path]:
    """Return the files in some folders of the output that are neither planned nor hidden nor left
    by a run of this program. Raises CheckpointError for configs that loaders would obey.
    """
    strangers = [path for folder in folders if folder.is_dir() for path in folder.iterdir()
                 if path.name[0] != "." and path not in known and not path.is_dir()
                 and not TEMPORARY.fullmatch(path.name) and path.name != RANKS_NAME]
    for path in sorted(strangers):
        if is_like(path.name, QUANTIZATION_FILES):
            raise refusal(path)
    return sorted(strangers)


def existing(folder: Path) -> Path:
    """Return the folder itself if it exists, or else the nearest one above that does."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents)
                if is_there(place))


def inspect_output(plans: list[Plan], out: Path, workers: int,
                   reports: Iterable[Path]) -> tuple[list[Shard], dict[Path, str | Path]]:
    """Return what is still to be made: shards, and files beside them.

    Raises CheckpointError for whatever stands in the way: nothing under a final name is replaced.
    """
    shards = shards_of(plans)
    files = {plan.out / name: content for plan in plans for name, content in plan.files.items()}
    todo = check_shards(shards, workers)
    absent = {path: content for path, content in files.items() if not is_there(path)}
    for path, content in files.items():
        if path not in absent and not same_file(path, content):
            raise refusal(path)
    planned = {*files, *(shard.path for shard in shards)}
    folders = {path.parent for path in planned}
    strangers = find_strangers(folders, planned.union(reports))
    if not todo and not absent:
        return todo, absent
    for path in strangers:
        if path.suffix == ".safetensors":  # A loader might take it for a part of the output.
            raise refusal(path)
    if strangers and len(todo) + len(absent) == len(shards) + len(files):
        raise CheckpointError(f"{strangers[0]}: {out} is not empty and holds no part of this "
                              "conversion; give another folder")
    return todo, absent


def lock(folder: Path, stack: ExitStack) -> bool:
    """Keep other runs out of a folder until the stack ends; return whether the system can.

    Raises CheckpointError if another run holds the lock.
    """
    if not fcntl:
        return False
    path = folder / LOCK_NAME
    file = stack.enter_context(open(path, "a"))  # NFS locks only what is open for writing.
    busy = CheckpointError(f"{folder}: another run is writing there; let it end. Started several "
                           "times? Start it once, or with torchrun")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    except OSError:  # Some network file systems have no locks.
        path.unlink(missing_ok=True)
        return False
    # The run that held the lock has removed the file: then nobody else sees this lock.
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        raise busy
    stack.callback(path.unlink, missing_ok=True)
    return True


def clear(plans: list[Plan], out: Path, todo: list[Shard], several: bool) -> None:
    """Make the folders, and remove unfinished files and what would say that all is there.

    several: other ranks may be writing files, or have written them.
    """
    taken = [shard.path for shard in todo if is_there(shard.path)]
    if taken and not several:
        raise CheckpointError(f"{taken[0]}: another run has just written it; start again")
    folders = {out, *(shard.path.parent for shard in shards_of(plans)),
               *((plan.out / name).parent for plan in plans for name in plan.files)}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for path in () if several else find_temporary(folders):
        path.unlink()
    for plan in plans:
        for name in plan.last_names:
            if name in plan.files:
                (plan.out / name).unlink(missing_ok=True)
    for folder in folders:
        sync(folder)


def publish(plans: list[Plan]) -> None:
    """Complete an output around its shards; what says that all is there comes last, the root's last
    of all.
    """
    for path in find_temporary(shard.path.parent for shard in shards_of(plans)):
        path.unlink(missing_ok=True)  # Nobody writes shards any more; a rank has been killed.
    for plan in plans:
        for name, content in plan.files.items():
            if not (plan.out / name).exists():
                write_file(plan.out / name, content)


# --- ranks: the processes of torchrun, which share nothing but the output folder ---

POLL = 0.5  # Seconds between looks at what other ranks do.
PATIENCE, STALLED = 60, 1800  # Seconds to wait for rank 0's plan, and for any sign of the others.


class Ranks(NamedTuple):
    """Which of how many processes this is, in all and on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    def share(self, shards: list[Shard]) -> list[Shard]:
        """Return the shards that this rank makes: largest first, they are dealt out in turn.

        All planned shards are dealt, whatever is there already, so that ranks which look at
        different times agree.
        """
        ordered = sorted(shards, key=lambda shard: (-shard.size, shard.path))
        return ordered[self.rank :: self.count]


ALONE = Ranks()


def find_ranks() -> Ranks:
    """Return which of torchrun's processes this is.

    A process whose parent is a rank, a Python process with torchrun's variables, is none; torchrun
    may start ranks by way of a shell, which has its variables, too.
    """
    numbers = [os.environ.get(name, "")
               for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    launched = "TORCHELASTIC_RUN_ID" in os.environ and all(map(str.isdecimal, numbers))
    with suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}")
        variables = (parent / "environ").read_bytes().split(b"\0")
        ranked = any(entry.startswith(b"TORCHELASTIC_RUN_ID=") for entry in variables)
        launched &= not (ranked and "python" in Path(os.readlink(parent / "exe")).name)
    return Ranks(*map(int, numbers)) if launched else ALONE


def digest_of(plans: list[Plan]) -> str:
    """Return 16 hex digits that ranks have in common if their inputs and plans are the same.

    Headers alone would not do: DeepSeek-V3's and R1's are the same.
    """
    shards = shards_of(plans)
    facts = json.dumps([*map(facts_of, steps_of(shards))])
    facts += fingerprint_of(max(shards, key=lambda shard: shard.size))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def watch(look: Callable[[], object]) -> Iterator[tuple[object, float]]:
    """Yield what `look` returns, again and again, and for how many seconds it has been the same."""
    last, since = None, time.monotonic()
    while True:
        seen, now = look(), time.monotonic()
        if seen != last:
            last, since = seen, now
        yield seen, now - since
        time.sleep(POLL)


def await_plan(out: Path, digest: str, rank: int) -> None:
    """Return once rank 0 has prepared the output for the plan that this rank has, too."""

    def look() -> str | None:
        with suppress(FileNotFoundError):
            return (out / RANKS_NAME).read_text()

    for found, age in watch(look):
        if found == digest:
            return
        if found and age > PATIENCE:
            raise CheckpointError(f"{out}: rank {rank} has the plan {digest}, rank 0 has {found}; "
                                  "give all ranks the same input and the same version")
        if age > STALLED:
            raise CheckpointError(f"{out}: rank 0 has not prepared it; start the same command "
                                  "again")


def await_shards(shards: list[Shard]) -> None:
    """Return once the shards of other ranks have their names and their planned headers."""
    left = list(shards)

    def look() -> list:
        left[:] = [shard for shard in left if not is_planned(shard)]
        growing = []
        for path in find_temporary({shard.path.parent for shard in left}):
            with suppress(FileNotFoundError):
                growing.append((path, path.stat().st_mtime_ns))
        return [len(left), growing]

    if shards:
        say(f"Waiting for {counted(len(shards), 'shard')} of other ranks")
    for (count, _), age in watch(look):
        if not count:
            return
        if age > STALLED:
            raise CheckpointError(f"{left[0].path}: one of {count} shards of other ranks that have "
                                  "stopped growing; start the same command again")


# --- empty: input shards give way to their output once that is proven (--delete-source) ---


def find_takers(shards: list[Shard]) -> dict[Path, list[Shard]]:
    """Return the input shards that have data, each with the output shards that take any of it."""
    takers = {}
    for shard in shards:
        for path in shard.stamps:
            takers.setdefault(path, []).append(shard)
    return takers


def data_on_disk(path: Path) -> int:
    """Return how many bytes of the disk become free when only the header of a shard is left."""
    return max(0, getattr(path.stat(), "st_blocks", 0) * 512 - in_pages(header_size(path)))


def find_unproven(shard: Shard) -> Iterator[str]:
    """Yield what cannot be known of an output shard of which some input has been emptied."""
    for source, proof in shard.proofs.items():
        if not proof:
            yield (f"{shard.path}: cannot be checked further, because {source} was emptied by a "
                   "version without digests")
            continue
        for path, was in shard.stamps.items():
            if proof.stamps.get(path) != was:
                yield (f"{shard.path}: was made when {path} had another time or size; if it is "
                       "another revision now, download all shards of one revision")


def peak_space(plans: list[Plan], todo: list[Shard]) -> int:
    """Return how many bytes more than now the shards take at the peak of a run."""
    now = peak = 0
    for plan in plans:
        takers = find_takers(plan.shards)
        for shard in plan.shards:
            now += in_pages(shard.size) if shard in todo else 0
            peak = max(peak, now)
            now -= sum(data_on_disk(path) for path, those in takers.items() if those[-1] is shard)
    return peak


def find_doubts(plans: list[Plan], out: Path, implausible: list[str]) -> Iterator[str]:
    """Yield why the only copy of the input must not be touched."""
    yield from implausible
    outputs = [shard.path.stat() for shard in shards_of(plans) if shard.path.exists()]
    names = {(at.st_dev, at.st_ino) for at in outputs}
    for plan in plans:
        yield from (f"{tensor.name} is FP8 and has no scale" for tensor in plan.reading.missing)
        yield from (f"{tensor.name} is a scale of no weight" for tensor in plan.reading.orphans)
        yield from (f"{tensor.name} stands in two shards" for tensor in plan.checkpoint.twice)
        emptied = {name: tensor._replace(emptied=True)
                   for name, tensor in plan.checkpoint.tensors.items()}
        try:  # An interrupted run must be able to plan again.
            read_formats(replace(plan.checkpoint, tensors=emptied))
        except CheckpointError as error:
            yield str(error)
        root = plan.checkpoint.root
        for path in find_takers(plan.shards):
            at, device = path.stat(), existing(out).stat().st_dev
            if (at.st_dev, at.st_ino) in names:
                yield f"{path} is a file of {out}, too, and would be proven by itself"
            if path.resolve() != root.resolve() / path.relative_to(root) or at.st_nlink > 1:
                yield f"{path} is a link or has a second name, so that others may need it"
            elif not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK | os.X_OK):
                yield f"{path} is not writable"
            elif at.st_dev != device:
                yield f"{path} and {out} are on different file systems"


def prove(shard: Shard, pool: list[Worker], bar: tqdm) -> Proof:
    """Return what a shard's sources will say of it, once it has been read back from the disk.

    Raises CheckpointError unless it is what the input gives. Tensors whose input has been emptied
    were proven before that; the digest tells whether they are the same.
    """
    sync(shard.path)
    sync(shard.path.parent)
    if hasattr(os, "posix_fadvise"):  # What is read must not come from the page cache.
        with naming(shard.path), open(shard.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    check_loadable(shard.path)
    metadata, tensors = read_header(shard.path, remedy="its input has been left as it is")
    there = {tensor.name: tensor for tensor in tensors}
    pairs = find_pairs(shard.steps, there)
    found, digests = compare_values(pairs, {shard.path: shard.window}, pool, bar)
    digest, header = digests[shard.path], read_bytes(shard.path, 0, len(shard.header))
    differs = bool(found) or not len(pairs) == len(shard.steps) == len(there)
    if not shard.proofs:
        differs |= FINGERPRINT.sub(NO_FINGERPRINT.encode(), header, count=1) != shard.header
    if differs or any(proof and proof.digest != digest for proof in shard.proofs.values()):
        lost = ", ".join(map(str, shard.proofs))
        remedy = f"keep it until {lost}, which is emptied, has been downloaded again" if lost else (
            "delete it and run the same command again")
        what = found[0].line if found else f"{shard.path}: is not as it was written"
        raise CheckpointError(f"{what}; its input has been left as it is; {remedy}")
    return Proof(metadata.get(PROGRAM, ""), digest, shard.window, {**shard.stamps})


def find_doubted(shards: list[Shard]) -> dict[Path, str]:
    """Return the input shards of which it is not known whether a tensor that cannot be computed any
    more was made of them, each with the name of such a tensor.
    """
    doubted = {}
    for shard in shards:
        for step in shard.steps:
            for earlier in (shard.proofs[lost] for lost in step.lost):
                for path in shard.whole_sources(step):
                    if not earlier or earlier.stamps.get(path) != shard.stamps[path]:
                        doubted[path] = step.output.name
    return doubted


def find_kept(shard: Shard, nonfinite: set[Tensor],
              doubted: dict[Path, str]) -> Iterator[tuple[Path, str]]:
    """Yield the sources of a shard that must stay as they are although it is proven, and why."""
    for step in shard.steps:
        sources = shard.whole_sources(step)
        for path in sources:
            if step.output in nonfinite:
                yield path, f"{step.output.name} has NaN or infinite values"
            for other in sources & doubted.keys():  # This step may mix two revisions.
                which = "it" if other == path else f"{other}, which it goes with,"
                yield path, f"{which} is not known to be what {doubted[other]} was made of"


def empty(path: Path, plan: Plan, proofs: dict[Shard, Proof]) -> None:
    """Replace an input shard by its header, which a later run needs to plan again.

    The header also says what was proven of its takers, in which a proof then stands in place of its
    stamp. At every moment the name stands for the whole shard or for the complete new header.
    """
    header = parse_object(read_bytes(path, 8, header_size(path) - 8))
    metadata = header.pop("__metadata__", None) or {}
    root, stamps, takers = plan.checkpoint.root, plan.checkpoint.stamps, {}
    for shard, proof in proofs.items():
        named = {source.relative_to(root).as_posix(): at for source, at in proof.stamps.items()}
        takers[shard.path.relative_to(plan.out).as_posix()] = proof._replace(stamps=named)
    metadata[PROGRAM] = json.dumps({"takers": takers})

    def put(unfinished: Path, path: Path) -> None:
        shutil.copymode(path, unfinished)
        check_unchanged({path: stamps[path]})
        os.replace(unfinished, path)

    with new_file(path, put) as file:
        file.write(header_bytes({"__metadata__": metadata, **header}))
    stamps[path] = stamp(path)
    for shard, proof in proofs.items():
        shard.proofs[path] = proof
        del shard.stamps[path]


def write_and_empty(plans: list[Plan], todo: list[Shard], pool: list[Worker], bar: tqdm,
                    emptied: list[Path]) -> dict[Path, str]:
    """Write shards one by one, prove each, and empty the input shards of which nothing is needed
    any more. Adds those to `emptied`; returns those that had to stay, and why.
    """
    kept, proofs, made, provers = {}, {}, {}, [Worker() for _ in pool]
    for folder in plans[-1].out.absolute().parents:  # This run may have made some of them.
        with suppress(PermissionError):
            sync(folder)
    for plan in plans:
        takers, doubted = find_takers(plan.shards), find_doubted(plan.shards)
        for path in find_temporary({path.parent for path in takers}):
            path.unlink()
        for shard in plan.shards:
            if shard in todo:
                write_shards([shard], pool, bar)
            if not shard.stamps:
                continue
            made[shard] = stamp(shard.path)
            proofs[shard] = prove(shard, provers, bar)
            nonfinite = set().union(*(worker.nonfinite for worker in provers))
            kept |= find_kept(shard, nonfinite, doubted)
            for path, those in takers.items():
                if those[-1] is shard and path not in kept:  # No other shard needs it any more.
                    for taker in those:
                        check_unchanged(taker.stamps | {taker.path: made[taker]})
                    empty(path, plan, {taker: proofs[taker] for taker in those})
                    emptied.append(path)
    return kept


# --- bf16_tensors: the values without the files ---

# The names in torch of the dtypes that outputs may have.
TORCH_NAMES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32",
    "U32": "uint32", "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16",
    "I16": "int16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8",
    "U8": "uint8", "BOOL": "bool"}
MAX_WORKERS = 1000  # More would only wait for each other.


def check_options(device: str, workers: int | None, missing_scale: str) -> None:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise UsageError(f"device {device}: expected auto, cpu, cuda or cuda:N")
    if workers is not None and not 0 < workers <= MAX_WORKERS:
        raise UsageError(f"workers {workers}: expected a positive number, at most {MAX_WORKERS}")
    if missing_scale not in MISSING_SCALE:
        raise UsageError(f"missing_scale {missing_scale}: expected {', '.join(MISSING_SCALE)}")


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that an argument names. For "auto" it may be the CPU; a warning says why if
    there is a GPU. Raises UsageError for one that does not work.

    Ranks on one machine share out its GPUs, unless the argument has a number.
    """
    if name == "cpu":
        return torch.device(name)
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        if device.index is None:
            device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        probe = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
        kernel.weight_dequant(*(tensor.to(device) for tensor in probe))
        return device
    except Exception as error:  # No GPU, no Triton, no compiler for it, a GPU unknown to it, ...
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        if name != "auto":
            raise UsageError(f"--device {name}: {problem}; use --device cpu") from error
        warn(f"Warning: the CUDA device does not work, so the CPU does its work: {problem}")
        return torch.device("cpu")


def default_workers(ranks: Ranks = ALONE) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(4, 2 * (cores or 1) // ranks.local_count))


def fill(free: queue.SimpleQueue, stream: torch.cuda.Stream | None, step: Step, data: torch.Tensor,
         start: int, stop: int) -> None:
    """Fill a part of a tensor whose memory was taken on a stream, which may have used it before."""
    worker = free.get()
    try:
        if stream:
            worker.stream.wait_stream(stream)
        render_step(step, start, stop, data[start:stop], worker)
    finally:
        free.put(worker)


def read_ahead(steps: list[Step], pool: list[Worker],
               stamps: dict[Path, tuple[int, int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors in their order, by name, each in memory of its own on the workers' device, into
    which threads render about as many windows ahead as there are workers.
    """
    free, ahead, left = queue.SimpleQueue(), deque(), iter(steps)
    home, device = os.getpid(), pool[0].device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for worker in pool:
        free.put(worker)
    executor = start_threads(len(pool))
    try:
        while True:
            if os.getpid() != home:
                raise RuntimeError("bf16_tensors cannot go on in a forked process, which lacks its "
                                   "threads; call it there")
            while sum(1 + len(jobs) for *_, jobs in ahead) <= len(pool) and (
                    step := next(left, None)):
                # A tensor of the caller's inference mode could not be filled in other threads.
                with on_stream(stream), torch.inference_mode(False):
                    data = torch.empty(step.output.size, dtype=torch.uint8, device=device)
                ahead.append((step, data, [executor.submit(fill, free, stream, step, data, *window)
                                           for window in windows_of(len(data), WINDOW)]))
            if not ahead:
                return
            step, data, jobs = ahead.popleft()
            for job in jobs:
                job.result()
            check_unchanged({tensor.path: stamps[tensor.path] for tensor in step.sources})
            if stream:  # The caller's stream may use the memory after the caller has let it go.
                data.record_stream(torch.cuda.current_stream(device))
            name, dtype, shape, *_ = step.output
            whole = [data.view(getattr(torch, TORCH_NAMES[dtype])).view(shape)]
            del data, jobs
            yield name, whole.pop()  # Nothing is kept here that the caller lets go.
    finally:
        if os.getpid() == home:
            executor.shutdown(cancel_futures=True)
            for worker in pool:
                worker.close()


def find_wanted(steps: Iterable[Step], root: Path,
                names: Iterable[str] | Callable[[str], bool] | None) -> list[Step]:
    """Return the tensors that are wanted, in their order."""
    known = {step.output.name: step for step in steps}
    names = [names] if isinstance(names, str) else names
    wanted = {*known} if names is None else {*(filter(names, known) if callable(names) else names)}
    if unknown := sorted(wanted - known.keys()):
        raise KeyError(f"{root}: holds no tensor {unknown[0]}")
    chosen = [step for name, step in known.items() if name in wanted]
    for step in chosen:
        for path in step.lost:
            raise CheckpointError(f"{path}: has been emptied by --delete-source; read "
                                  f"{step.output.name} from {step.output.path.name} of its output")
    return chosen


def names_of(pool: list[Worker]) -> list[str]:
    """Return the names of the tensors in which workers have found NaN or infinite values."""
    return sorted({tensor.name for worker in pool for tensor in worker.nonfinite})


def bf16_tensors(fp8_path: str | Path, device: str | torch.device = "cpu", *,
                 names: Iterable[str] | Callable[[str], bool] | None = None,
                 missing_scale: str = "error",
                 workers: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the checkpoint in a folder, with the names, dtypes, shapes and bytes
    that they would have after a conversion, in the order of the shards.

    device: where the tensors are placed; a CUDA device dequantizes, too. names: those that are
    wanted, or a function that tells whether one is. missing_scale: as in make_plans, for these.
    workers: threads that read ahead, a window of 16 MiB each. Every tensor owns its memory, and
    none is kept here. Folders below hold checkpoints of their own, which are not yielded.

    Raises CheckpointError, at the first step, as the conversion does, or for an emptied shard, and
    later for one that changes; KeyError for a name that the checkpoint lacks; UsageError for CUDA
    that does not work.
    """
    check_options("cpu", workers, missing_scale)
    root = Path(fp8_path).expanduser()
    with torch.device("cpu"):  # whatever device the caller has set
        target = torch.device(device)
        if target.type == "cuda":
            current = torch.cuda.current_device() if torch.cuda.is_available() else 0
            target = pick_device(str(target), current)
        elif target.type != "cpu":
            raise UsageError(f"device {device}: expected cpu or cuda")
        *parts, checkpoint = find_checkpoints(root)
        if not checkpoint.tensors:
            raise CheckpointError(f"{root}: holds tensors in folders only; give one of them, such "
                                  f"as {parts[0].root}")
        reading = read_formats(checkpoint)
        shards = plan_shards(checkpoint, reading, root, missing_scale)
        chosen = find_wanted(steps_of(shards), root, names)
        if missing_scale == "error":
            refuse_missing([step.source for step in chosen if step.source in reading.missing])
        for line in find_implausible(chosen):
            warnings.warn(line, stacklevel=2)
        pool = [Worker(target) for _ in range(workers or default_workers())]
    yield from read_ahead(chosen, pool, checkpoint.stamps)
    if found := names_of(pool):
        warnings.warn(f"NaN or infinite values in {', '.join(found)}", stacklevel=2)


# --- command line ---


@dataclass
class Job:
    """What a run is asked to do: the options of the command line. Raises UsageError for options or
    paths that are invalid or contradict each other.
    """

    fp8_path: Path
    bf16_path: Path
    device: str = "auto"
    workers: int | None = None
    missing_scale: str = "keep"
    dry_run: bool = False
    verify: bool = False
    delete_source: bool = False
    report: Path | None = None
    ranks: Ranks = ALONE
    reports: Iterable[Path] = ()  # of all ranks

    def __post_init__(self) -> None:
        check_options(self.device, self.workers, self.missing_scale)
        if not (self.fp8_path and self.bf16_path):
            raise UsageError("the path of the input or of the output is empty")
        self.fp8_path, self.bf16_path = root, out = [
            Path(path).expanduser() for path in (self.fp8_path, self.bf16_path)]
        self.workers = self.workers or default_workers(self.ranks)
        if self.dry_run and self.verify:
            raise UsageError("--dry-run and --verify: expected one of them")
        if self.delete_source and (self.verify or self.ranks.count > 1):
            raise UsageError("--delete-source: not with --verify, and not under torchrun")
        inner, outer = root.resolve(), out.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UsageError(f"{out}: the output must not lie in the input, nor the input in it")
        if self.report:
            path = Path(self.report).expanduser()
            place, planned = path.resolve(), is_like(path.name, ["*.safetensors", INDEX_PATTERN])
            if place.is_relative_to(inner) or (place.is_relative_to(outer) and (
                    planned or (inner / place.relative_to(outer)).exists())):
                raise UsageError(f"--report {path}: the input or the output has its files there; "
                                 "give another path")
            if place.is_relative_to(outer):  # One spelling, so that it is no stranger there.
                path = out / place.relative_to(outer)
            self.reports = [path, *(path.with_stem(f"{path.stem}.rank{rank}")
                                    for rank in range(1, self.ranks.count))]
            self.report = self.reports[self.ranks.rank]


def describe(plans: list[Plan], job: Job) -> dict:
    """Print what will be done, and return it as the report has it."""
    shards, steps = shards_of(plans), steps_of(shards_of(plans))
    tensors = [tensor for plan in plans for tensor in plan.checkpoint.tensors.values()]
    kinds = Counter(kind_of(step) for step in steps if step.quantization)
    dropped = Counter(tensor.leaf for plan in plans for tensor in plan.reading.dropped.values())
    missing = [tensor.name for plan in plans for tensor in plan.reading.missing]
    orphans = [tensor.name for plan in plans for tensor in plan.reading.orphans]
    left_out = [(plan.checkpoint.root / name).relative_to(job.fp8_path).as_posix()
                for plan in plans for name in plan.left_out]
    facts = {
        "input": {"shards": sum(len(plan.checkpoint.metadata) for plan in plans),
                  "tensors": len(tensors), "bytes": sum(tensor.size for tensor in tensors)},
        "output": {"shards": len(shards), "tensors": len(steps),
                   "bytes": sum(shard.size for shard in shards)},
        "dequantized": dict(kinds.most_common()), "copied": len(steps) - kinds.total(),
        "dropped": dict(dropped.most_common()), "dropped_scales_of_no_weight": orphans,
        "kept_in_fp8": missing if job.missing_scale == "keep" else [],
        "cast_with_scale_1": missing if job.missing_scale == "cast" else [],
        "files_left_out": left_out, "implausible": find_implausible(steps)}
    for title in ("input", "output"):
        shards, number = (counted(facts[title][f"{noun}s"], noun) for noun in ("shard", "tensor"))
        say(f"{title.capitalize()}: {shards}, {number}, {sized(facts[title]['bytes'])}")
    for kind, count in kinds.most_common():
        say(f"  {counted(count, 'weight')} to dequantize: {kind}")
    say(f"  {counted(facts['copied'], 'tensor')} to copy")
    for title, names in (
            ("Dropped", [f"{count:,} {leaf}" for leaf, count in dropped.most_common()]),
            ("Dropped scales of no weight", orphans), ("Not copied", left_out),
            ("FP8 weights without a scale, cast with scale 1", facts["cast_with_scale_1"])):
        if names:
            say(f"{title}: {', '.join(names)}")
    for line in [*(f"Missing scale_inv tensor for {name}, skipping conversion"
                   for name in facts["kept_in_fp8"]), *facts["implausible"]]:
        if job.ranks.rank == 0:  # All ranks find the same.
            warn(f"Warning: {line}")
    return facts


def check_space(plans: list[Plan], todo: list[Shard], absent: dict[Path, str | Path],
                job: Job) -> None:
    """Print how much space a run takes. Raises CheckpointError if there is too little."""
    sides = sum(in_pages(content.stat().st_size if isinstance(content, Path) else len(content))
                for content in absent.values())
    total = sides + sum(in_pages(shard.size) for shard in todo)
    needed = sides + peak_space(plans, todo) if job.delete_source else total
    usage = shutil.disk_usage(existing(job.bf16_path))
    free = usage.free
    if job.ranks.count == 1:  # It removes unfinished files; ranks cannot tell whose they are.
        free += sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in find_temporary(
            shard.path.parent for shard in shards_of(plans)))
    known = usage.total > 0  # Some network file systems do not say.
    at_once = f", at most {sized(needed)} more than now at any time" if job.delete_source else ""
    say(f"Space: {sized(total)} to write{at_once}, "
        f"{sized(free) if known else 'an unknown number of bytes'} free")
    if known and needed > free:
        raise CheckpointError(f"{job.bf16_path}: {sized(needed - free)} of space are missing; free "
                              "some or give another output")
    if not known and job.delete_source:
        raise CheckpointError(f"--delete-source: {job.bf16_path} does not tell its free space")


def survey(plans: list[Plan], job: Job) -> tuple[list[Shard], dict[Path, str | Path]]:
    """Look at the output, and say what is there. Returns what is missing: shards, other files."""
    out = job.bf16_path
    if job.ranks.count > 1 and not job.dry_run and (out / RANKS_NAME).exists():
        with ExitStack() as stack:  # The job that wrote it was killed, or holds the lock.
            lock(out, stack)
            (out / RANKS_NAME).unlink()
    todo, absent = inspect_output(plans, out, job.workers, job.reports)
    shards = shards_of(plans)
    if len(todo) < len(shards):
        say(f"Already there: {len(shards) - len(todo)} of {counted(len(shards), 'shard')}")
    for line in (line for shard in shards for line in find_unproven(shard)):
        warn(f"Warning: {line}")
    check_space(plans, todo, absent, job)
    return todo, absent


def write_output(plans: list[Plan], todo: list[Shard], device: torch.device, job: Job,
                 facts: dict) -> None:
    """Write the shards that are to do, and say what was found in them."""
    say(f"Device: {device}, {counted(job.workers, 'worker')}")
    pool, began, kept = [Worker(device) for _ in range(job.workers)], time.perf_counter(), {}
    size = facts["bytes_written"] = sum(shard.size for shard in todo)
    # With --delete-source, what is written and what is there already is read back, too.
    total = size + job.delete_source * facts["output"]["bytes"]
    with progress("writing", total, disable=job.ranks.rank > 0) as bar:
        if job.delete_source:
            kept = write_and_empty(plans, todo, pool, bar, facts["emptied_shards"])
        else:
            write_shards(todo, pool, bar)
    seconds, facts["nonfinite"] = time.perf_counter() - began, names_of(pool)
    if facts["nonfinite"]:
        warn(f"Warning: NaN or infinite values in {', '.join(facts['nonfinite'])}")
    if todo:
        say(f"Wrote {counted(len(todo), 'shard')}, {sized(size)} in {seconds:.1f} s, "
            f"{size / seconds / 1e9:.2f} GB/s")
    for path, why in kept.items():
        warn(f"Warning: {path} has been left as it is: {why}")


def remove_mixed(shards: list[Shard], changed: set[Path]) -> None:
    """Remove shards that this run has made of input shards that have changed since.

    Of an input shard that somebody has removed, or that has been emptied, they may be the only
    copy.
    """
    changed = {path for path in changed if path.exists()}
    for shard in shards:
        if changed & shard.stamps.keys() and not shard.proofs:
            shard.path.unlink(missing_ok=True)


def say_caveats(out: Path, facts: dict) -> None:
    """Say what the user of a complete output must know."""
    if names := facts["kept_in_fp8"]:
        say(f"{counted(len(names), 'weight')} {'is' if len(names) == 1 else 'are'} still FP8: the "
            "output will not load correctly; see --missing-scale")
    if emptied := facts["emptied_shards"]:
        say(f"{counted(len(emptied), 'input shard')} emptied: {out} is the only copy now")


def make_output(plans: list[Plan], job: Job, facts: dict) -> None:
    """Make what is missing of an output, each rank its share of the shards. Rank 0 also looks after
    the folder: what is in the way, what must go, and what completes it.
    """
    out, ranks, facts["emptied_shards"] = job.bf16_path, job.ranks, []
    stamps = ChainMap(*(plan.checkpoint.stamps for plan in plans))
    with ExitStack() as stack:
        todo, absent = survey(plans, job) if ranks.rank == 0 else (
            check_shards(ranks.share(shards_of(plans)), job.workers), {})
        if job.dry_run:
            return
        mine = [shard for shard in ranks.share(shards_of(plans)) if shard in todo]
        writing = bool(mine) or job.delete_source
        completing = ranks.rank == 0 and bool(todo or absent)
        if writing:
            device = pick_device(job.device, ranks.local_rank)  # An error leaves all as it is.
        if ranks.rank > 0 and mine:
            await_plan(out, digest_of(plans), ranks.rank)
        elif completing or job.delete_source:
            out.mkdir(parents=True, exist_ok=True)
            lock(out, stack)
        if completing:
            clear(plans, out, todo, several=ranks.count > 1)
            if ranks.count > 1:
                write_file(out / RANKS_NAME, digest_of(plans))
        try:
            if writing:
                write_output(plans, mine, device, job, facts)
            if completing:
                await_shards([shard for shard in todo if shard not in mine])
                check_unchanged(stamps)
                publish(plans)
                (out / RANKS_NAME).unlink(missing_ok=True)
        except Changed as error:
            remove_mixed(todo, {error.path, *find_changed(stamps)})
            raise
    say("Converted: the output is complete" if todo or absent or facts["emptied_shards"] else
        "Nothing to do: the output is complete")
    say_caveats(out, facts)


def verify_output(plans: list[Plan], job: Job, facts: dict) -> None:
    """Say how an output differs. Raises CheckpointError if it does."""
    mine = job.ranks.share(shards_of(plans))
    found, differing = find_differences(
        plans, mine, [Worker() for _ in range(job.workers)], job.ranks.rank > 0)
    found = differing if job.ranks.rank else found + differing  # Rank 0 tells what all find.
    facts["differences"] = [line for _, line in found]
    for line in facts["differences"]:
        warn(line)
    if found:
        lost = {shard.path: ", ".join(map(str, shard.proofs)) for shard in mine if shard.proofs}
        paths = sorted({path for path, _ in found})
        there = [path for path in paths if is_there(path)]
        remedies = [f"move {path} back, or download {lost[path]} again" for path in paths
                    if path in lost and path not in there]
        remedies += [f"keep {path} until {lost[path]} has been downloaded again" if path in lost
                     else f"delete {path}" for path in there]
        advice = [", ".join(remedies)] * bool(remedies) + ["run the same command without --verify"]
        raise CheckpointError(f"{job.bf16_path}: differs from what the input gives in "
                              f"{counted(len(found), 'place')}; {' and '.join(advice)}")
    steps = steps_of(mine)
    digested = sum(bool(step.lost) for step in steps)
    by_digest = f", {digested:,} of them by the digest of the conversion" if digested else ""
    by_rank = ", the share of rank 0" if job.ranks.count > 1 else ""
    say(f"Verified {counted(len(steps), 'tensor')}{by_rank}{by_digest}: no differences")


def message_of(error: Exception) -> str:
    """Return one line about an error, which names the file where there is one."""
    text = str(error) if isinstance(error, CheckpointError) else str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        text = f"out of memory{text and ': ' + text}; try --workers 1"
    if "start new thread" in text:
        text += "; try --workers 1"
    return text or type(error).__name__


def write_report(file: TextIO, facts: dict) -> None:
    with naming(Path(file.name)), file:
        json.dump(facts, file, indent=2, default=str)


def run(job: Job) -> None:
    """Do what is asked for; the report tells how it ended, whatever happens."""
    facts = {"version": VERSION, "torch": torch.__version__, "status": "failed",
             "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
             "options": {key: str(value) for key, value in vars(job).items()}}
    began, root = time.perf_counter(), job.fp8_path
    with ExitStack() as stack, torch.device("cpu"):  # whatever device the caller has set
        if job.report:
            job.report.parent.mkdir(parents=True, exist_ok=True)
            # Appending keeps what goes to the same file, if the report is /dev/stdout.
            file = open(job.report, "w", opener=lambda path, flags: os.open(
                path, flags | os.O_APPEND, 0o666))
            stack.callback(write_report, file, facts)
        try:
            if job.delete_source and not job.dry_run and root.is_dir() and not lock(root, stack):
                raise CheckpointError(f"--delete-source: {root}: cannot be locked")
            plans = make_plans(root, job.bf16_path, job.missing_scale)
            facts |= describe(plans, job)
            if job.delete_source:
                for doubt in find_doubts(plans, job.bf16_path, facts["implausible"]):
                    raise CheckpointError(f"--delete-source: {doubt}; nothing has been emptied by "
                                          "this run")
            (verify_output if job.verify else make_output)(plans, job, facts)
            facts["status"] = "planned" if job.dry_run else (
                "verified" if job.verify else "complete")
        except Exception as error:
            facts["error"] = message_of(error)
            raise
        finally:
            facts["seconds"] = time.perf_counter() - began


def convert(fp8_path: str | Path, bf16_path: str | Path, **options) -> None:
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another.

    options: device="auto", workers=None, missing_scale="keep", dry_run=False, verify=False,
    delete_source=False, report=None, with the meanings and defaults of the command line.

    Raises CheckpointError for what is wrong with the checkpoint or a verified output, OSError for
    the disk, UsageError for the arguments. Until all is there, the output holds no index, no
    params.json and no config.json.
    """
    run(Job(fp8_path, bf16_path, **options))


main = convert


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert an FP8 checkpoint into a BF16 one.")
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
    add("--delete-source", action="store_true",
        help="empty each input shard once its output is verified, if the disk cannot hold both")
    add("--report", metavar="FILE", help="write a JSON record of it all")
    add("--version", action="version", version=VERSION)
    return parser


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status.

    0: converted or verified; 1: impossible or different; 2: wrong usage; 130: interrupted.
    """
    parser = make_parser()
    options, ranks = parser.parse_args(arguments), find_ranks()
    with ExitStack() as stack:
        if ranks.rank > 0:  # Rank 0 speaks for all; what is wrong goes to stderr.
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            run(Job(**vars(options), ranks=ranks))
        except UsageError as error:
            parser.error(printable(str(error)))
        except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
            warn(f"error: {message_of(error)}")
            return 1
        except KeyboardInterrupt:
            warn("interrupted; the same command continues")
            return 130
    return 0


if __name__ == "__main__":
    gc.set_threshold(200_000)  # A plan is many objects, and while it grows none of them is garbage.
    while os.open(os.devnull, os.O_RDWR) < 3:  # A closed standard stream would become a shard's.
        pass
    sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)
    sys.exit(cli())
