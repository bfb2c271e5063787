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

Planning reads headers only, so whatever is wrong with a checkpoint is reported before the first
byte is written. Workers then render windows, aligned byte ranges of a shard, in any order. A window
depends on no other, so the same bytes come out of one worker or many, a GPU or none, and memory is
bounded by the windows in flight, however large a tensor is.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import errno
import filecmp
import fnmatch
import functools
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = "2.0"
NEEDED = "needs torch>=2.7, safetensors>=0.6.1, tqdm: pip install -r requirements.txt"


class CheckpointError(Exception):
    """A problem of the checkpoint that its user can fix; the message names file and tensor."""


class UsageError(ValueError):
    """The arguments are invalid or contradict each other."""


def import_torch() -> None:
    """Import torch, which takes seconds, and what needs it, once the arguments are known."""
    global torch, tqdm, SafetensorError, safe_open, kernel, Grid, ceil_div, pieces
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out.
    try:
        with warnings.catch_warnings():  # torch warns without numpy; nothing here uses it.
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
            import torch
        import safetensors
        from safetensors import SafetensorError, safe_open
        from tqdm import tqdm
        for package, least in ((torch, [2, 7]), (safetensors, [0, 6, 1])):
            if [*map(int, re.findall(r"\d+", package.__version__)[:3])] < least:
                raise ImportError(f"{package.__name__} is {package.__version__}")
        import kernel
        from kernel import Grid, ceil_div, pieces
    except ImportError as error:
        raise UsageError(f"{error}; {NEEDED}") from error
    finally:
        del sys.path[0]


def printable(text: str) -> str:
    """Return text that a terminal can show and that cannot control it, whatever a tensor's name."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, file=None) -> None:
    try:
        print(printable(text), file=file, flush=True)
    except BrokenPipeError:  # The reader, such as `head`, has exited; the work goes on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


@contextmanager
def naming(path: Path):
    """Add the path to an OSError from read or write, which do not know it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_bytes(path: Path, start: int = 0, count: int = -1) -> bytes:
    """Return bytes of a file. Raises OSError if a network file system does not have them yet."""
    with naming(path), open(path, "rb") as file:
        if start:
            file.seek(start)
        data = file.read(count)
    if data is None:
        raise BlockingIOError(errno.EAGAIN, "the file system has no data yet", str(path))
    return data


def sized(count: int) -> str:
    return tqdm.format_sizeof(count, "B")


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


if __name__ != "__main__":
    import_torch()


# --- checkpoint: where every tensor's bytes are ---

INDEX_NAME, INDEX_PATTERN = "model.safetensors.index.json", "*.safetensors.index*.json"
CONFIG_NAME, CONFIG_PATTERN = "config.json", "config*.json"
PARAMS_NAME = "params.json"  # Mistral's own.
NVIDIA_CONFIG_NAME, SIDECAR_NAME = "hf_quant_config.json", "quantization_config.json"
TOOL_FOLDERS = {".git", ".cache", "lost+found"}
ADAPTER = "adapter_model*"  # PEFT saves adapters so, also beside a model.
OTHER_SETS = ["consolidated*", "original"]  # The same weights a second time, under other names.
# Suffixes of unfinished downloads, or of files beside them (aria2, browsers, curl, hub clients).
UNFINISHED = [".aria2", ".part", ".crdownload", ".incomplete"]
NUMBERED = re.compile(r"(.*)-(\d{5,6})-of-(\d{5,6})(.*)\.safetensors", re.DOTALL)
HEADER_LIMIT = 100_000_000  # Bytes, as in safetensors; no index needs more.
CONFIG_LIMIT = 10_000_000  # Bytes, far more than any model needs.
# Bits of an element, in the order in which safetensors' own writer lays out tensors: larger
# elements first, so that every tensor is aligned to its element size.
DTYPE_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16,
    "F16": 16, "U16": 16, "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}


class Tensor(NamedTuple):
    """A tensor on disk: dtype as safetensors spells it, bytes [start, stop) of the file at path.

    For a planned output, path is relative to the output. emptied: --delete-source has truncated the
    file to its header, so the bytes are gone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int
    emptied: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

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
    """What one folder holds: the metadata of each shard, by its path from there; all tensors, by
    name; and the JSON files, by name.

    rivals: tensors of one name, dtype and shape of which no index says which counts. They may be
    copies of a scale; read_formats refuses all others.
    """

    root: Path
    shards: dict[str, dict[str, str]]
    tensors: dict[str, Tensor]
    index_name: str
    files: dict[str, dict]
    rivals: dict[str, list[Tensor]] = field(default_factory=dict)


def is_regular(path: Path, root: Path) -> bool:
    """Return whether a path is a regular file of the checkpoint, not a link out of it.

    A link may lead to a private file, which must not end up in an output that gets published. The
    Hugging Face cache keeps the files of a snapshot as links to `blobs/HASH`, wherever that is
    mounted; such links are accepted.
    """
    root, target = root.resolve(), path.resolve()
    blobs = [p.parent / "blobs" for p in root.parents
             if p.name == "snapshots" and p.parent.name.startswith("models--")]
    if target.parent in blobs or re.search(r"/blobs/[0-9a-f]{40}([0-9a-f]{24})?\Z", str(target)):
        return path.is_file()
    tool = target.is_relative_to(root) and TOOL_FOLDERS & {*target.relative_to(root).parts}
    return path.is_file() and target.is_relative_to(root) and not tool


def is_like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def walk(value, skip: Callable = lambda key, value: False) -> Iterator[tuple[str, object]]:
    """Yield every key of the objects in a JSON value with its value, at any depth, except entries
    to skip and whatever is below them.
    """
    queue = [value]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            entries = [entry for entry in value.items() if not skip(*entry)]
            yield from entries
            queue += [item for _, item in entries]
        elif isinstance(value, list):
            queue += value


def refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull`")


def parse_json(path: Path, text: bytes):
    """Parse text from a file as JSON. Raises CheckpointError if it is not valid."""

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

    refuse_pointer(path, text)
    try:
        return json.loads(text.decode(), object_pairs_hook=unique, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error


def read_json(path: Path, root: Path) -> dict | None:
    """Return the JSON object in a file of a checkpoint, or None if there is no such file.

    A list called config_list.json is not a config: it is copied as any file is.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):  # No other error means that it is absent.
        return None
    if not is_regular(path, root):
        where = "a link to nothing" if path.is_symlink() and not path.exists() else (
            "a link elsewhere, or a device")
        raise CheckpointError(f"{path}: is not a regular file of the checkpoint, but {where}; put "
                              "the file itself there (cp -L)")
    limit = HEADER_LIMIT if fnmatch.fnmatchcase(path.name, INDEX_PATTERN) else CONFIG_LIMIT
    if (size := path.stat().st_size) > limit:
        raise CheckpointError(f"{path}: has {size} bytes; expected at most {limit}")
    value = parse_json(path, read_bytes(path))
    if isinstance(value, dict):
        return value
    if path.name != CONFIG_NAME and fnmatch.fnmatchcase(path.name, CONFIG_PATTERN):
        return None
    raise CheckpointError(f"{path}: is not a JSON object; download it again")


def read_entries(path: Path, header: dict, begin: int, end: int,
                 source: bool) -> tuple[dict[str, str], list[Tensor]]:
    """Return a header's metadata and tensors. Raises an error unless they fill [begin, end)."""
    metadata = header.pop("__metadata__", None)
    metadata, emptied = {} if metadata is None else metadata, source and begin == end
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not text")
    tensors = []
    for name, entry in header.items():
        (start, stop), shape = entry["data_offsets"], (*entry["shape"],)
        if not all(type(n) is int and 0 <= n < 1 << 64 for n in (start, stop, *shape)):
            raise ValueError(f"{name} has an invalid header entry")
        if math.prod(shape) * DTYPE_BITS[entry["dtype"]] != 8 * (stop - start):
            raise ValueError(f"{name} has {stop - start} bytes for {entry['dtype']} {[*shape]}")
        tensors.append(Tensor(name, entry["dtype"], shape, path, begin + start, begin + stop))
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != begin:
            raise ValueError(f"{tensor.name} begins at byte {tensor.start}, expected {begin}")
        begin = tensor.stop
    if emptied and begin > end:
        return metadata, [tensor._replace(emptied=True) for tensor in tensors]
    if begin != end:
        raise ValueError(f"it has {end} bytes, expected {begin}")
    return metadata, tensors


def read_header(path: Path, source: bool = False) -> tuple[dict[str, str], list[Tensor]]:
    """Return a shard's metadata and its tensors, by the rules of huggingface/safetensors,
    safetensors/src/tensor.rs. The data is neither read nor mapped. That of a `source` may be gone:
    --delete-source removes it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the download is incomplete")
    start, length = read_bytes(path, 0, 64), path.stat().st_size
    refuse_pointer(path, start)
    size = int.from_bytes(start[:8], "little")
    whole = size <= min(length - 8, HEADER_LIMIT)
    text = read_bytes(path, 8, size) if whole else b""
    try:
        if not text.startswith(b"{"):
            raise ValueError("it has no header of its size")
        header = parse_json(path, text)
        return read_entries(path, header, 8 + size, length, source)
    except (ValueError, TypeError, KeyError, AttributeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); download it "
                              "again") from error


def find_index(root: Path) -> str:
    """Return the name of the model's index, or of the only one under another name."""
    names = sorted(path.name for path in root.glob(INDEX_PATTERN) if path.name[0] != ".")
    others = [name for name in names if not is_like(name, OTHER_SETS)]
    if INDEX_NAME not in names and len(others) > 1:
        raise CheckpointError(f"{root}: holds {' and '.join(others)}; move all but one checkpoint "
                              "to folders of their own")
    return INDEX_NAME if INDEX_NAME in names or not others else others[0]


def find_shards(root: Path, index_name: str, index: dict | None) -> list[str]:
    """Return the file names that make up the checkpoint, sorted."""
    if index is None:
        shards = sorted(path.name for path in root.glob("*.safetensors") if path.name[0] != ".")
        # Mistral's repositories hold the same weights a second time, under names of their own.
        # An adapter must not get into an index: llama.cpp would load it as part of the model.
        shards = [name for name in shards if not is_like(name, [*OTHER_SETS, ADAPTER])] or shards
        if strange := [name for name in shards if not name.isprintable()]:
            raise CheckpointError(f"{root}: holds a shard called {strange[0]!r}; rename it")
        return shards
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / index_name}: has no weight_map; download it again")
    for name, shard in weight_map.items():
        named = isinstance(shard, str) and re.fullmatch(r"[^\\\0]+\.safetensors", shard)
        if not named or {"", ".", ".."} & {*shard.split("/")}:
            raise CheckpointError(f"{root / index_name}: puts {name} into {shard!r}; expected "
                                  "a *.safetensors file beside it or below")
    return sorted(set(weight_map.values()))


def check_whole(root: Path, shards: list[str], numbered: bool = False) -> None:
    """Raise CheckpointError if a shard is missing or a download is unfinished.

    numbered: without an index, the numbers in the names of shards tell how many there must be. The
    hub's client keeps unfinished files in .cache/huggingface/download (huggingface_hub
    _local_folder.py), under their names or hashes of those.
    """
    series = {}
    for name in shards:
        if numbered and (found := NUMBERED.fullmatch(name)):
            place = found[1], len(found[2]), found[3], found[4]
            series.setdefault(place, set()).add(int(found[2]))
        path = root / name
        marks = [path.with_name(path.name + ending) for ending in UNFINISHED]
        hidden = base64.urlsafe_b64encode(hashlib.sha1(f"{path.name}.metadata".encode()).digest())
        download = (root / ".cache/huggingface/download" / name).parent
        marks += [mark for stem in (path.name, hidden.decode())
                  for mark in download.glob(f"{glob.escape(stem)}.*.incomplete")]
        for mark in marks:
            if os.path.exists(mark):
                raise CheckpointError(f"{path}: its download is not finished, as {mark} tells; "
                                      "finish it, or remove that file if it is stale")
    expected = [shards]
    for (start, width, total, rest), numbers in series.items():
        wanted = range(int(0 not in numbers), int(total) + int(0 not in numbers))
        expected.append([f"{start}-{number:0{width}}-of-{total}{rest}.safetensors"
                         for number in wanted])
    for names in expected:
        if missing := [name for name in names if not os.path.lexists(root / name)]:
            raise CheckpointError(f"{root / missing[0]}: {len(missing)} of "
                                  f"{counted(len(names), 'shard')} "
                                  f"{'is' if len(missing) == 1 else 'are'} missing, among them "
                                  f"{', '.join(missing[:5])}; the download is "
                                  "incomplete")


def refuse_rivals(rivals: list[Tensor]) -> NoReturn:
    raise rivals[1].error(f"stands in {rivals[0].path.name} too and no index says which counts; "
                          "remove the file that is not part of the checkpoint")


def load_checkpoint(root: Path, planned: list[str] | None = None,
                    copied: Iterable[str] = (), top: Path | None = None) -> Checkpoint:
    """Read the index, the configs and all headers of a checkpoint, and check that they agree.

    The headers are authoritative. The index decides which shards belong to the checkpoint and, if
    two of them hold a tensor of the same name, which one counts. To an output belong all shards in
    the folder but the files that are `copied`, and those `planned` in folders below; its index may
    list missing tensors. top: the folder that no link may leave.
    """
    index_name = find_index(root)
    names = [index_name, PARAMS_NAME, NVIDIA_CONFIG_NAME]
    names += sorted(path.name for path in root.glob(CONFIG_PATTERN))
    names += [SIDECAR_NAME] if is_regular(root / SIDECAR_NAME, root) else []
    files = {name: value for name in names
             if (value := read_json(root / name, top or root)) is not None}
    index = files.get(index_name)
    shards, holders = {}, {}
    if planned is None:
        names = find_shards(root, index_name, index)
        series = {(found[1], found[4]) for name in names if (found := NUMBERED.fullmatch(name))}
        if index is None and len(series) == 1:
            index_name = "{}.safetensors.index{}.json".format(*series.pop())
        check_whole(top or root, [
            (root.relative_to(top or root) / name).as_posix() for name in names], index is None)
    else:
        names = {path.name for path in root.glob("*.safetensors") if path.name[0] != "."}
        names = sorted(names - {Path(name).name for name in copied}
                       | {name for name in planned if (root / name).exists()})
    for shard in names:
        shards[shard], members = read_header(root / shard, source=planned is None)
        for tensor in members:
            holders.setdefault(tensor.name, []).append(tensor)
    weight_map = (index or {}).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}  # find_shards refuses an input.
    tensors, rivals = {}, {}
    for name, found in holders.items():
        meant = root / str(weight_map.get(name))
        tensors[name] = next((tensor for tensor in found if tensor.path == meant), found[0])
        if len(found) > 1 and tensors[name].path != meant:
            rivals[name] = found
            if planned is not None or len({(tensor.dtype, tensor.shape) for tensor in found}) > 1:
                refuse_rivals(found)
    for name, shard in weight_map.items():
        if name not in tensors and planned is None:
            raise CheckpointError(f"{root / shard}: {name} is not there; {index_name} names it")
    return Checkpoint(root, shards, tensors, index_name, files, rivals)


@contextmanager
def advising_move(root: Path, folder: Path):
    """Add to a CheckpointError about a folder below the root that moving it out helps, too."""
    try:
        yield
    except CheckpointError as error:
        inside = f"; or move {folder} out of {root}" if folder != Path() else ""
        raise CheckpointError(f"{error}{inside}") from error


def skip_unreadable(error: OSError) -> None:
    """Let os.walk skip a folder that may not be read; raise any other error."""
    if not isinstance(error, PermissionError):
        raise error


def find_checkpoints(root: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints in a folder and below it, its own first, and the folders left out.

    A draft model or the parts of a pipeline have folders of their own; each folder with shards is a
    checkpoint. Folders named like another set of the same weights are left out.
    """
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        hint = "give the checkpoint's"
        if not root.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)):
            hint = f"download it first: hf download {root} --local-dir IN"
        raise CheckpointError(f"{root}: no such folder, or it is not readable; {hint}")
    if root.name.startswith("models--") and (root / "snapshots").is_dir():
        raise CheckpointError(f"{root}: is the cache of a repository; give its snapshots/HASH")
    found, others, taken = [], [], set()
    for folder, folders, names in os.walk(root, onerror=skip_unreadable):
        folders[:] = sorted(name for name in folders if name not in TOOL_FOLDERS)
        place = Path(folder).relative_to(root)
        if is_like(place.name, OTHER_SETS):
            others.append(place.as_posix())
            folders.clear()
            continue
        shards = {str(place / name) for name in names if name[0] != "."
                  and (name.endswith(".safetensors") or fnmatch.fnmatchcase(name, INDEX_PATTERN))}
        if place != Path() and (not shards or shards & taken):
            continue  # is_adapter judges shards there that no index names.
        with advising_move(root, place):
            checkpoint = load_checkpoint(root / place, top=root)
        taken |= {str(place / name) for name in checkpoint.shards}
        found.append(checkpoint)
    if not any(checkpoint.shards for checkpoint in found):
        raise CheckpointError(f"{root}: holds no *.safetensors; give the checkpoint's folder")
    return found, others


# --- formats: how weights are stored; a new format is a row here, and a test in test_formats.py ---


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


F8, SMALL_FLOATS = words("F8_E4M3 F8_E5M2"), words("F8_E4M3")
FLOATS, EXPONENTS = words("F32 BF16 F16"), words("F8_E8M0 U8")  # U8 is 2 ** (byte - 127), too.
SEMANTICS = "weight_scale_semantics"  # The only key that can say that an FP8 scale divides.
# NVIDIA/Model-Optimizer torch/export: fused experts have the second name.
MODELOPT, MODELOPT_GLOBAL = "{}_scale {}_weight_scale", "{}_scale_2 {}_weight_scale_2"
# Tensors that are dropped with the quantized weight beside which they stand: scales of activations,
# notes, zero points (which must be zero), and group indices (which must be in order).
SIDES = words(
    "input_scale output_scale activation_scale act_scale input_scale_ub input_scale_2 scale_input "
    "input_zero_point output_zero_point qscale_act comfy_quant "
    "{}_zero_point {}_zp {}_g_idx {}_act_scale {}_act_per_tensor_scale")


class Format(NamedTuple):
    """One way to store a weight. The first row whose names, dtypes and method match applies.

    Names are relative to the module. "{}" stands for the stem, the last part of the output's name:
    usually `weight`, or the name of a parameter without a module of its own, such as gate_up_proj.
    The weight may be in modules below the one that holds the scale; "*" in its name is a number.

    - containers, scale_dtypes: dtypes as safetensors spells them.
    - number_format: a key of kernel.FORMATS; if empty, the dtype of the codes determines it.
    - methods: the values of quant_method whose loaders read the tensors this way; "" if the config
      names none. FP8 has one meaning, so for it they only decide between two scales; bytes and
      integers are converted under these methods only.
    - weight, scale, global_scale: a name, or alternatives separated by spaces; those of the two
      scales are pairs.
      The global scale multiplies the scales, or `divides` them; for FP8 it is optional. inverse:
      the scale divides the codes.
    - groups: how many columns may share a scale, if the format fixes that; 0 for whole rows.
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
    methods: frozenset[str] = frozenset()
    groups: tuple[int, ...] = ()
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
    # deepseek-ai/DeepSeek-V3 inference/kernel.py multiplies by it: it is the inverse of the
    # quantizer's factor. huggingface/transformers integrations/finegrained_fp8.py, before 5.0,
    # uses the plural for fused experts.
    Format("DeepSeek-V3, Kimi-K2, Qwen3, GLM-5, MiniMax, Mistral", "{}",
           "{}_scale_inv {}_scales_inv", methods=words("fp8 mxfp8")),
    # huggingface/transformers modeling of Llama 4, FbgemmFp8Llama4TextExperts: the weight is
    # stored transposed, so that its scales of rows are scales of columns here.
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
    Format("FP8 as bytes", "{}", "{}_scale_inv", words("U8"), FLOATS, "E4M3", frozenset([""])),
    # comfyanonymous/ComfyUI comfy/quant_ops.py: a note says what the bytes of weights are.
    Format("ComfyUI, E4M3 by note", "weight", "weight_scale", words("U8"), FLOATS, "E4M3",
           words("float8_e4m3fn")),
    Format("ComfyUI, E5M2 by note", "weight", "weight_scale", words("U8"), FLOATS, "E5M2",
           words("float8_e5m2")),
    # sgl-project/sglang layers/quantization/blockwise_int8.py and w8a8_int8.py
    Format("INT8 in blocks", "{}", "{}_scale_inv", words("I8"), FLOATS, "INT8",
           words("blockwise_int8")),
    Format("INT8 of compressed-tensors, w8a8, Quark, ModelOpt", "{}", "{}_scale", words("I8"),
           FLOATS, "INT8", words("compressed-tensors w8a8_int8 quark modelopt")),
    # InternLM/lmdeploy lite/apis/smooth_quant.py
    Format("INT8 of lmdeploy", "weight", "scale", words("I8"), FLOATS, "INT8",
           words("smooth_quant"), (0,)),
    Format("INT8 of torchao", "_{}_qdata", "_{}_scale", words("I8"), FLOATS, "INT8",
           words("torchao")),
    # pytorch/ao prototype/mx_formats; swizzled scales have another shape.
    Format("MXFP4 of torchao", "_{}_qdata", "_{}_scale", words("U8"), words("F8_E8M0"), "E2M1",
           words("torchao"), (32,)),
    Format("NVFP4 of torchao", "_{}_qdata", "_{}_scale", words("U8"), SMALL_FLOATS, "E2M1",
           words("torchao"), (16,), "_{}_per_tensor_scale"),
    # deepseek-ai/DeepSeek-V4 inference/convert.py: two codes a byte, the low half first.
    Format("experts of DeepSeek-V4 (MXFP4)", "weight", "scale", words("I8 F4"), words("F8_E8M0"),
           "E2M1", words("fp8"), (32,)),
    # vllm-project/compressed-tensors compressors/mxfp4; intel/auto-round
    # export/export_to_llmcompressor
    Format("compressed-tensors MXFP4", "{}_packed", "{}_scale", words("U8"), EXPONENTS, "E2M1",
           words("compressed-tensors auto-round"), (32,)),
    # radixark/miles tools/convert_mimo_v2_to_bf16.py: the method is fp8, whatever the experts are.
    Format("experts of MiMo-V2.5 and V2.6 (MXFP4)", "weight", "weight_scale", words("U8"),
           words("U8"), "E2M1", words("fp8"), (32,), requires=("store_dtype", "mxfp4")),
    # vllm-project/vllm layers/quantization/quark/schemes/quark_ocp_mx.py; NVIDIA/Model-Optimizer
    # torch/quantization/qtensor/mxfp4_tensor.py
    Format("MXFP4 of Quark and ModelOpt", "{}", MODELOPT, words("U8"), EXPONENTS, "E2M1",
           words("quark modelopt"), (32,)),
    # vllm-project/compressed-tensors compressors/nvfp4: the global scale divides.
    Format("compressed-tensors NVFP4", "{}_packed", "{}_scale", words("U8"), SMALL_FLOATS, "E2M1",
           words("compressed-tensors auto-round"), (16,), "{}_global_scale", divides=True,
           sides=words("input_global_scale")),
    # NVIDIA/Model-Optimizer torch/quantization/qtensor/nvfp4_tensor.py. Fused experts may have one
    # global scale for gate and one for up.
    Format("ModelOpt W4A8_NVFP4_FP8", "{}", MODELOPT, words("U8"), SMALL_FLOATS, "E2M1",
           words("modelopt"), (32, 16), MODELOPT_GLOBAL, requires=("quant_algo", "W4A8_NVFP4_FP8")),
    Format("NVFP4 of ModelOpt and Quark", "{}", MODELOPT, words("U8"), SMALL_FLOATS, "E2M1",
           words("modelopt quark"), (16,), MODELOPT_GLOBAL),
    # huggingface/transformers integrations/finegrained/nvfp4.py: here the global scale multiplies.
    Format("transformers NVFP4", "{}", "{}_scale_inv {}_scale_inv", words("U8"), SMALL_FLOATS,
           "E2M1", words("nvfp4"), (16,), "{}_global_scale {}_weight_global_scale",
           sides=words("input_global_scale")),
    # vllm-project/vllm models/inkling/nvidia
    Format("Inkling NVFP4", "{}", "{}.scale", words("U8"), SMALL_FLOATS, "E2M1", words("modelopt"),
           (16,), "{}.scale2", sides=words("{}.input_amax {}.original_shape")),
    # sgl-project/sglang layers/quantization/w4afp8.py: two's complement, the low half first.
    Format("W4AFP8", "{}", "{}_scale_inv", words("I8"), FLOATS, "INT4", words("w4afp8"), (128,)),
    # vllm-project/compressed-tensors compressors/pack_quantized: eight codes per int32, the
    # lowest bits first, each 8 more than its value. The config gives the group size.
    Format("Kimi-K2-Thinking, compressed-tensors INT4", "{}_packed", "{}_scale", words("I32"),
           FLOATS, "UINT4B8", words("compressed-tensors"), sides=words("{}_shape")),
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

# Keys of a config, at any depth, or of a shard's metadata that mark the weights as quantized.
QUANTIZATION_KEYS = ["quantization_config", "compression_config", "_quantization_metadata",
                     "expert_dtype", "moe_quant_algo"]
UNKNOWN_METHODS = "quantization_bit", "quant_type", "dfloat11_config"  # Keys of config.json.
# Quark's, auto-round's, SDNQ's and ComfyUI's keys; what Quark rotates offline (r1, r2) needs
# nothing.
ROTATIONS = words("rotation_config hadamard_config use_hadamard online_r1_rotation r3 r4 convrot")
# Sections of a config that say nothing of weights: Quark's, and those of compressed-tensors.
NOT_OF_WEIGHTS = re.compile("input_tensors|output_tensors|.*activations|.*cache.*", re.DOTALL)
BLOCK_SIZES_LIMIT = 64  # Any more that a config names are ignored.
SMALL_LIMIT = 16 << 20  # Bytes of a tensor that planning reads; read_formats says which.


@dataclass(frozen=True)
class Evidence:
    """What the files beside the shards say of the quantization.

    methods: every quant_method, {""} where there is none. facts: the texts that stand under each
    key of a quantization config. block_sizes: rows and columns. int4_groups: group sizes of INT4, 0
    for whole rows. heads: numbers of attention heads, if the config names a quantized cache.
    """

    methods: frozenset[str]
    facts: dict[str, set[str]]
    block_sizes: tuple[tuple[int, int], ...]
    int4_groups: tuple[int, ...]
    heads: frozenset[int] | None

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


def read_small(tensor: Tensor) -> bytes:
    if tensor.emptied:
        raise tensor.error("has to be read to plan a conversion, and an emptied shard lacks it")
    if tensor.size > SMALL_LIMIT:
        raise tensor.error(f"has {tensor.size} bytes; expected at most {SMALL_LIMIT}")
    return read_bytes(tensor.path, tensor.start, tensor.size)


def read_notes(checkpoint: Checkpoint) -> Iterator:
    """Yield what shards say as configs do: in their metadata (ComfyUI, nunchaku), or in tensors of
    bytes beside the weights (ComfyUI). The format that ComfyUI notes counts as a method.
    """
    texts = [(checkpoint.root / shard, metadata[key]) for key in QUANTIZATION_KEYS[:3]
             for shard, metadata in checkpoint.shards.items() if key in metadata]
    texts += [(tensor.path, read_small(tensor)) for tensor in checkpoint.tensors.values()
              if tensor.leaf == "comfy_quant"]
    for path, text in texts:
        try:
            value = json.loads(text)
            notes = [*value.get("layers", {}).values(), *[value] * isinstance(text, bytes)]
            formats = {str(note["format"]) for note in notes}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: what ComfyUI notes there is not valid") from error
        yield value
        for name in formats:
            if name not in ("float8_e4m3fn", "float8_e5m2"):
                raise CheckpointError(f"{path}: is in ComfyUI's format {name}; only float8_e4m3fn "
                                      "and float8_e5m2 can be undone with a scale")
            yield {"comfy_format": name}


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


def count_heads(config: dict) -> frozenset[int]:
    """Return the numbers of attention heads in a config that are no head's dimension, too."""
    numbers = {}
    for key, value in walk(config):
        if isinstance(value, int):
            numbers.setdefault(key, set()).add(value)
    heads, kv_heads, head_dims, widths = (numbers.get(key, set()) for key in (
        "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"))
    head_dims |= {width // count for width in widths for count in heads if count}
    return frozenset((heads | kv_heads) - head_dims)


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
    methods = facts.get("quant_method", set()) | facts.get("comfy_format", set())
    methods |= {"modelopt"} if "quant_algo" in dict(walk(said[NVIDIA_CONFIG_NAME])) else set()
    methods |= {"mistral"} if "qformat_weight" in dict(walk(said[PARAMS_NAME])) else set()
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    methods |= {key for key, value in walk(plain) if key in UNKNOWN_METHODS and value}
    cached = any((key.startswith("kv_cache") and value) or value == "attn_head"
                 for key, value in walk(sections))
    return Evidence(frozenset(methods or [""]), facts, read_block_sizes(entries),
                    read_int4_groups(entries), count_heads(config) if cached else None)


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


def explain_misfit(shape: tuple[int, ...], scale_shape: tuple[int, ...],
                   block_sizes: tuple[tuple[int, int], ...]) -> str:
    """Return what may explain that scales fit no grid of a weight, for an error message."""
    rows, cols, text = math.prod(shape[:-1]), math.prod(shape[-1:]), ""
    if block_sizes:
        blocks, wanted = block_sizes[0], [*map(ceil_div, (1, 1, *shape)[-2:], block_sizes[0])]
        text = f"; the config names blocks of {blocks[0]}x{blocks[1]}, which need {wanted}"
    swapped = find_grids((*shape[:-2], *shape[:-3:-1]), scale_shape, (*block_sizes, (128, 128)))
    if any(grid.block_cols < grid.cols for grid in swapped):
        text += "; they fit the transposed weight"
    tiles = {(32 * ceil_div(rows, 128), 16 * ceil_div(cols, 4 * group)) for group in (16, 32)}
    if scale_shape in tiles:  # pytorch/ao prototype/mx_formats
        text += "; they are swizzled, in the order of the GPU's tiles"
    return text


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
    """A row that fits a weight: what stands before the row's names, their stem, and the scales."""

    format: Format
    head: str
    stem: str
    scale: Tensor
    global_scale: Tensor | None


def plain_cast(weight: Tensor) -> Quantization:
    """Return how an FP8 weight without a scale is read: as if its scale were 1."""
    (grid,) = find_grids(weight.shape, ())
    return Quantization(PLAIN_CAST, weight.dtype.removeprefix("F8_"), weight.name, weight.shape,
                        None, grid, packed_cols=grid.cols)


@functools.cache  # Thousands of weights share a few endings of names.
def rows_for(dtype: str, ending: str) -> list[tuple[Format, int, str, str, str]]:
    """Return the rows that store a tensor of this dtype under a name with this ending.

    Each comes with the length of the row's own part of the name, the stem, and the names of the
    scale and the global scale.
    """
    found = []
    for row in FORMATS:
        pattern = re.escape(row.weight).replace(r"\ ", "|").replace(r"\*", r"\d{1,9}")
        pattern = pattern.replace(r"\{\}", r"(?P<stem>[^.]+)")
        matched = re.search(rf"(?:^|\.)({pattern})\Z", ending)
        if dtype in row.containers and matched:
            stem = matched.groupdict().get("stem", "weight")
            names = itertools.zip_longest(row.scale.split(), row.global_scale.split(), fillvalue="")
            found += [(row, len(matched[1]), stem, *(name.replace("{}", stem) for name in pair))
                      for pair in names]
    return found


def applies(row: Format, evidence: Evidence) -> bool:
    """Return whether what the configs say lets a row apply."""
    facts = evidence.facts
    if row.requires and row.requires[1] not in facts.get(row.requires[0], ()):
        return False
    if SEMANTICS in facts and (facts[SEMANTICS] != {"inverse"} or not row.inverse):
        return False
    methods = row.methods & evidence.methods
    return row.containers <= F8 or (bool(methods) and all(
        facts.get(key, set()) <= values
        for method in methods for key, values in ACCEPTED.get(method, {}).items()))


def find_matches(weight: Tensor, checkpoint: Checkpoint, evidence: Evidence) -> list[Match]:
    """Return the first row that fits a weight, then those that fit it with another scale."""
    tensors, found = checkpoint.tensors, {}
    for row, size, stem, name, second in rows_for(weight.dtype,
                                                  ".".join(weight.name.split(".")[-3:])):
        head = weight.name[: len(weight.name) - size]
        scale = tensors.get(head + name)
        if scale is None or scale.dtype not in row.scale_dtypes or scale.name in found:
            continue
        global_scale = tensors.get(head + second) if second else None
        if second and not global_scale and weight.dtype not in F8:
            continue
        if applies(row, evidence) and not (global_scale and global_scale.dtype not in FLOATS):
            found[scale.name] = Match(row, head, stem, scale, global_scale)
    if len(found) < 2:
        return [*found.values()]
    meant = [match for match in found.values() if match.format.methods & evidence.methods]
    if len(meant) != 1:
        raise weight.error(f"has two scales, {' and '.join(found)}, and {CONFIG_NAME} names no "
                           "quant_method that decides; remove the one that is not meant")
    return meant + [match for match in found.values() if match is not meant[0]]


def shape_of(weight: Tensor, match: Match, number_format: str, checkpoint: Checkpoint,
             evidence: Evidence) -> tuple[tuple[int, ...], int]:
    """Return the shape of a weight's values, and how many codes a row of a packed one has."""
    if kernel.FORMATS[number_format].codes_per_byte == 1:
        return weight.shape, 0
    if weight.dtype == "F4":  # safetensors gives its shape in elements.
        return weight.shape, math.prod(weight.shape[-1:])
    packed_cols = (8 if weight.dtype == "I32" else 2) * math.prod(weight.shape[-1:])
    if weight.dtype != "I32":
        return (*weight.shape[:-1], packed_cols), packed_cols
    if not evidence.int4_groups:
        raise weight.error(f"is packed, and {CONFIG_NAME} does not say that all such weights are "
                           "symmetric with num_bits 4 (others have zero points, or fit the same "
                           "shapes)")
    # Rows are padded to whole int32; a tensor beside the weight holds the true shape.
    stored = checkpoint.tensors.get(f"{match.head}{match.stem}_shape")
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
    parts = 1 if projection in ("down_proj", "w2") else 2
    experts, (rows, cols) = (*scale.shape, 0)[0], (*weight.shape, 0, 0)[:2]
    if int(expert) >= experts or len(weight.shape) != 2:
        raise weight.error(f"is {[*weight.shape]}, and {scale.name} {[*scale.shape]} has no scales "
                           "for it")
    first_row = (parts * int(expert) + (projection in ("up_proj", "w3"))) * rows
    return (experts, parts * rows, cols), first_row


def fits_stack(scale: Tensor | None, row: Format, grid: Grid, shape: tuple[int, ...]) -> bool:
    """Return whether there is one global scale, one per expert, or ModelOpt's two (gate and up)."""
    experts = grid.rows // grid.slab_rows
    halves = row.global_scale == MODELOPT_GLOBAL and experts > 1 and shape[-2] % 2 == 0
    return scale is None or math.prod(scale.shape) in (1, experts) or (
        halves and scale.shape == (experts, 2))


def quantize(weight: Tensor, match: Match, checkpoint: Checkpoint,
             evidence: Evidence) -> Quantization:
    """Decide shape and grid of a weight. Raises CheckpointError where none or two grids fit."""
    row, head, stem, scale, global_scale = match
    number_format = row.number_format or weight.dtype.removeprefix("F8_")
    shape, packed_cols = shape_of(weight, match, number_format, checkpoint, evidence)
    matrix, first_row = place_in_stack(weight, scale) if row.stacked else (shape, 0)
    groups = evidence.int4_groups if number_format == "UINT4B8" else row.groups
    grids = find_grids(matrix, scale.shape, evidence.block_sizes, groups, row.transposed,
                       "qkv_proj" in weight.name)
    if number_format == "INT8":  # Quark stores groups transposed, so that they span rows.
        grids = [grid for grid in grids if grid.block_cols > 1 or grid.block_rows == 1]
    fit = "the grid fits, but not the rest" if len(grids) == 1 else "two grids fit"
    if not grids:
        fit = "no block size fits" + explain_misfit(shape, scale.shape, evidence.block_sizes)
    if len(grids) != 1 or packed_cols % 2 or not fits_stack(global_scale, row, grids[0], shape):
        scales = [f"{tensor.name} {[*tensor.shape]}" for tensor in (scale, global_scale) if tensor]
        raise weight.error(f"is {[*shape]} ({number_format}, {evidence}), scaled by "
                           f"{' and '.join(scales)}: {fit}; expected one scale per tensor, expert, "
                           "row, column or block")
    output = head + stem if "{}" in row.weight else weight.name
    if weight.leaf == "weight_packed" and re.search(r"experts\..*_weight\.\Z", head):
        output = head[:-1]  # A parameter that was wrapped in a module of its name (Inkling).
    return Quantization(row, number_format, output, shape, scale, grids[0], global_scale, first_row,
                        packed_cols or grids[0].cols)


# account: every tensor that takes part in a quantization is known

ONES = {"F32": b"\0\0\x80\x3f", "BF16": b"\x80\x3f", "F16": b"\0\x3c"}  # Little-endian.
INTEGERS = words("I8 U8 I16 U16 I32 U32")  # I64, U64 and BOOL never hold codes.
# Never copied: only quantized weights have these dtypes. FNUZ bits mean other values.
STRANGE_DTYPES = words("F4 F6_E2M3 F6_E3M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0")
# May stand beside any weight and are copied; `scale` only if it is not the weight's own scale.
PARAMETERS = words("bias e_score_correction_bias correction_bias expert_bias scale tid2eid "
                   "position_ids num_batches_tracked")
# The name of a scale, whoever wrote it, is its weight's name and words of these two sets, with at
# least one of the first.
SCALE_WORDS = words("scale scales scaling absmax scb suh svh compressed wscale wscales wcscales "
                    "wtscale qscale qscales lut")
FILL_WORDS = words(
    "weight weights inv inverse reciprocal factor factors block blocks group channel global double "
    "quant quantized quantizer deq dequant fp fp8 fp4 int per tensor row col w zeros and table")
# Words by which other tensors that take part in a quantization continue their weight's name, and
# those that tensors of codes add to it.
PART_WORDS = words("zero zp zeros qzeros idx offset shape amax rotation trans svd lora packed "
                   "qdata codebook blocks bitmask quant quantized quantizer")
CODE_WORDS = words("weight weights qweight qweights packed data qdata blocks quant quantized "
                   "values float fp bitmask trellis")
CODE_LEAF = re.compile(r"qweight|qzeros|W_q|.*(_packed|_qdata)", re.DOTALL)
TABLE_LEAF = re.compile(r"(.*_)?(ids|index|idx|mask|table|tid2eid)", re.DOTALL)
ORPHAN_LEAF = re.compile(
    r"weight_scale|qscale_weight|scale_weight|.*(_scale_inv|_scales_inv|_weight_scale)", re.DOTALL)
# Scales of the key-value cache and of attention (vllm-project/vllm model_loader/weight_utils.py),
# of activations that layers share, and ComfyUI's mark.
CACHE_SCALES = words("q_scale k_scale v_scale kv_scale prob_scale prob_output_scale qscale_act "
                     "scaled_fp8")
# These serve only a cache, whatever their shape: Tencent/AngelSlim compressor/quant/core/save.py;
# vllm-project/vllm-ascend quantization/methods/kv_c8.py
CACHE_NAME = re.compile(r"(.*\.)?(([kv]_cache|fa_[qkv])\.|kv_cache_)(scale|offset)", re.DOTALL)
CACHE_OFFSETS = {"k_scale": "k_bias", "v_scale": "v_bias"}  # ModelOpt's affine key-value cache.
ATTENTION_ZEROS = words("q_zero_point k_zero_point v_zero_point")  # vllm-project/llm-compressor


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


def match_weights(checkpoint: Checkpoint,
                  evidence: Evidence) -> tuple[dict[str, Quantization], dict[str, Tensor]]:
    """Return the weights that match a row, by name, and all their scales."""
    weights, scales = {}, {}
    for tensor in checkpoint.tensors.values():
        found = find_matches(tensor, checkpoint, evidence) if tensor.dtype in CONTAINERS else ()
        if not found:
            continue
        weights[tensor.name] = quantize(tensor, found[0], checkpoint, evidence)
        used = [found[0].scale, found[0].global_scale]
        # A rival may be a parameter that is only called `scale`.
        used += [rival.scale for rival in found[1:] if "weight" in rival.scale.leaf]
        scales.update((scale.name, scale) for scale in used if scale)
    for name in weights.keys() & scales.keys():
        raise scales[name].error("is the scale of a weight and has a scale itself; no known format "
                                 "stores them so")
    return weights, scales


def require_zero(tensor: Tensor, zero: bytes) -> None:
    if read_small(tensor).strip(zero):
        raise tensor.error("is not all zero; asymmetric formats are not supported")


def find_cache_scales(tensors: dict[str, Tensor], evidence: Evidence) -> dict[str, Tensor]:
    """Return what serves a quantized key-value cache: one scale, or one for each head if a config
    names such a cache.

    Parameters may be called so, too (lucidrains/local-attention has a q_scale as long as a head),
    so a q_scale needs such a config, or the scales of keys and values beside it.
    """
    found, heads = {}, evidence.heads
    for name, tensor in tensors.items():
        module = name.removesuffix(tensor.leaf)
        alone = heads is None and not {f"{module}k_scale", f"{module}v_scale"} <= tensors.keys()
        sizes = {0, 1, 2} if tensor.leaf == "scaled_fp8" else {1} | (heads or set())
        if tensor.leaf in ATTENTION_ZEROS:
            require_zero(tensor, b"\0")
        elif not CACHE_NAME.fullmatch(name) and (
                tensor.leaf not in CACHE_SCALES or math.prod(tensor.shape) not in sizes
                or (tensor.leaf == "q_scale" and alone)):
            continue
        offset = module + CACHE_OFFSETS.get(tensor.leaf, tensor.leaf)
        found |= {key: tensors[key] for key in (name, offset) if key in tensors}
    return found


@functools.cache
def side_names(row: Format, stem: str) -> frozenset[str]:
    """Return what the side tensors of a row are called beside a weight with this stem."""
    prefixes = {stem.removesuffix("weight") if stem.endswith("weight") else f"{stem}_"}
    prefixes |= {f"{stem}_"} if stem != "weight" else set()
    sides = SIDES | row.sides
    own = {side.replace("{}", stem) for side in sides if "{}" in side}
    own |= {prefix + side for prefix in prefixes for side in sides if "{}" not in side}
    return frozenset(own | {f"_{side}" for side in own})  # torchao's names begin with _.


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case, without the numbers at their ends."""
    found = re.split(r"[._]+", name.lower().strip("._"))
    return [word.rstrip("0123456789") for word in found]


def words_after(base: str, name: str) -> frozenset[str]:
    """Return the words by which a name continues another."""
    name = name.removeprefix("_")
    if not name.startswith((f"{base}.", f"{base}_")):
        return frozenset()
    return frozenset(words_of(name[len(base) :]))


def check_side(side: Tensor, quantization: Quantization) -> None:
    """Raise CheckpointError for zero points that are not zero and groups that are not in order."""
    if side.leaf.endswith(("zero_point", "_zp")):
        packed = quantization.number_format == "UINT4B8" and side.dtype == "I32"
        require_zero(side, b"\x88" if packed else b"\0")  # packed as the codes are: 8 is zero
    elif side.leaf.endswith("g_idx"):
        groups = read_integers(side)
        in_order = [col // quantization.grid.block_cols for col in range(len(groups))]
        if groups not in (in_order, [-1] * len(groups)):
            raise side.error("reorders the groups of columns; that is not supported")


def is_side(tensor: Tensor, weight: Tensor, quantization: Quantization) -> bool:
    """Return whether a tensor near a weight is dropped with it.

    Raises CheckpointError for what would have to be applied. If the module is the weight's own,
    every tensor in it must be known. If the weight is one of several parameters, only tensors
    named like it plus words of quantization must be.
    """
    own = weight.leaf in ("weight", "weight_packed", "_weight_qdata") and weight.module
    stem = quantization.output.removeprefix(weight.module).removeprefix(".")
    stem = "weight" if own or weight.leaf == "weight" else stem
    place = tensor.name.removeprefix(weight.name.removesuffix(weight.leaf))
    if place in side_names(quantization.format, stem):
        check_side(tensor, quantization)
        return True
    if tensor.leaf not in PARAMETERS and place != f"{stem}_bias" and (
            own or not words_after(stem, place).isdisjoint(SCALE_WORDS | PART_WORDS)):
        raise tensor.error(f"stands beside {weight.name} ({quantization.format.title}), and no "
                           f"known format has it; it would have to be applied; {OTHER_TOOL}")
    return False


def is_dummy(tensor: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Return whether a tensor is a scale that ComfyUI's older files give a plain weight, or beside
    one. Raises CheckpointError if that scale is not 1.
    """
    module = tensor.name.removesuffix(tensor.leaf)
    weight, scale = tensors.get(f"{module}weight"), tensors.get(f"{module}scale_weight")
    if tensor.leaf not in ("scale_weight", "scale_input") or not weight or not scale or (
            weight.dtype not in FLOATS):
        return False
    if scale.dtype not in ONES or read_small(scale) != ONES[scale.dtype]:
        raise scale.error(f"is not 1, and {weight.name} is {weight.dtype}; no known format has it; "
                          f"it would have to be applied; {OTHER_TOOL}")
    return True


def bases_of(name: str, known: frozenset[str], needed: frozenset[str]) -> Iterator[str]:
    """Yield a name without the last few words, all of them known and one of them needed."""
    found = False
    while name:
        name = name.rstrip("._")
        at = max(name.rfind("."), name.rfind("_"))
        (word,) = words_of(name[at + 1 :])
        if word not in known:
            return
        found, name = found or word in needed, name[: max(at, 0)].rstrip("._")
        if found:
            yield name


def like_codes(tensor: Tensor, evidence: Evidence) -> bool:
    """Return whether a tensor can only be codes, by its dtype, or its name and the methods."""
    if tensor.dtype not in INTEGERS or len(tensor.shape) < 2:
        return tensor.dtype in STRANGE_DTYPES
    if evidence.methods - KNOWN_METHODS and not TABLE_LEAF.fullmatch(tensor.leaf):
        return True
    weight = tensor.leaf == "weight" or tensor.leaf.endswith("_proj")
    return "16" not in tensor.dtype and bool(
        CODE_LEAF.fullmatch(tensor.leaf) or (weight and evidence.methods - {"fp8", ""}))


def judge_rest(rest: list[Tensor], evidence: Evidence) -> tuple[list[Tensor], list[Tensor]]:
    """Return FP8 weights without a scale, and scales of no weight, among what matched no row.

    Raises CheckpointError for whatever else looks quantized: it would be left half converted.
    """
    codes, missing, orphans = {}, [], []  # codes: by all names that their scale may continue
    for tensor in rest:
        if tensor.dtype in F8 or (tensor.dtype in INTEGERS and (
                len(tensor.shape) > 1 or tensor.leaf == "weight")):
            bases = bases_of(tensor.name, CODE_WORDS, CODE_WORDS)
            codes |= dict.fromkeys([tensor.name, *bases], tensor)
        if tensor.dtype in F8:
            missing.append(tensor)
    for tensor in rest:
        bases = bases_of(tensor.name, SCALE_WORDS | FILL_WORDS | {""}, SCALE_WORDS)
        weight = next((codes[base] for base in bases if base in codes), tensor)
        side = tensor.dtype in F8 and tensor.leaf in side_names(PLAIN_CAST, "weight")
        if weight is not tensor or side or like_codes(tensor, evidence):
            beside = f", beside {tensor.name}" if weight is not tensor else ""
            hint = "" if weight.dtype in F8 else "; only the config could tell what it means"
            raise weight.error(f"({weight.dtype}{beside}) looks quantized, in no format known here "
                               f"({evidence}){hint}; {OTHER_TOOL}")
    without = sorted(tensor.name for tensor in missing)
    for tensor in rest:
        if tensor.dtype in F8 or not ORPHAN_LEAF.fullmatch(tensor.leaf):
            continue
        inside = tensor.module + "."
        at = bisect_left(without, inside)
        if tensor.module and at < len(without) and without[at].startswith(inside):
            raise tensor.error(f"is a scale of no weight, while {without[at]} is FP8 and has none; "
                               f"no known format stores them so; {OTHER_TOOL}")
        if tensor.leaf.endswith(("_scale_inv", "_scales_inv")):  # No parameter is called so.
            orphans.append(tensor)
    return missing, orphans


def read_formats(checkpoint: Checkpoint) -> Reading:
    """Recognize every quantized weight. Raises CheckpointError where anything is not known.

    The only data it reads are zero points, orders of groups, shapes of INT4 weights, ComfyUI's
    notes and dummy scales, and scales that stand in several shards.
    """
    for name in checkpoint.shards:
        if re.fullmatch(r"model(\d+-mp\d+|-rank-\d+-part-\d+)\.safetensors", name):
            raise CheckpointError(f"{checkpoint.root / name}: one of the slices that "
                                  "tensor-parallel ranks load; convert the checkpoint that they "
                                  "were cut from")
    tensors, evidence = checkpoint.tensors, read_evidence(checkpoint)
    weights, dropped = match_weights(checkpoint, evidence)
    if weights or evidence.methods != {""} or any(t.dtype in F8 for t in tensors.values()):
        dropped |= find_cache_scales(tensors, evidence)
    beside, outputs, rest = {}, set(tensors), []
    for name, quantization in weights.items():
        if quantization.output != name and quantization.output in outputs:
            raise tensors[name].error(f"becomes {quantization.output}, which exists too")
        outputs.add(quantization.output)
        for module in {tensors[name].module, name, quantization.output}:
            beside.setdefault(module, []).append((tensors[name], quantization))
    for name, tensor in tensors.items():
        if name in weights or name in dropped:
            continue
        if sum(is_side(tensor, *weight) for weight in beside.get(tensor.module, ())) or (
                weights and is_dummy(tensor, tensors)):
            dropped[name] = tensor
        elif weights and name.endswith("_rot"):  # vllm-project/vllm-ascend: indexer.q_rot
            raise tensor.error(f"is a rotation, which would have to be applied; {OTHER_TOOL}")
        else:
            rest.append(tensor)
    missing, orphans = judge_rest(rest, evidence)
    dropped |= {tensor.name: tensor for tensor in orphans}
    for name, rivals in checkpoint.rivals.items():
        if name not in dropped or rivals[0].size > SMALL_LIMIT or (
                len({*map(read_small, [tensors[name], *rivals])}) > 1):
            refuse_rivals(rivals)
    return Reading(weights, dropped, orphans, missing)


# --- plan: what every byte of the output will be ---

DTYPE_ORDER = [*DTYPE_BITS]
DATA_ALIGNMENT = 64  # Bytes: GPUs load 16 at once where all tensors start at a multiple of that.
FINGERPRINT_KEY, NO_FINGERPRINT = "fp8_cast_bf16", "0" * 16  # The zeros stand in planned headers.
MISSING_SCALE = ["keep", "cast", "error"]


class Step(NamedTuple):
    """One tensor of an output shard: a copy of source, or its values if it is quantized."""

    output: Tensor
    source: Tensor
    quantization: Quantization | None

    @property
    def sources(self) -> list[Tensor]:
        quantization = self.quantization
        scales = [quantization.scale, quantization.global_scale] if quantization else []
        return [tensor for tensor in (self.source, *scales) if tensor]

    @property
    def emptied(self) -> list[Path]:
        """The input shards that it needs and that cannot be read any more."""
        return [tensor.path for tensor in self.sources if tensor.emptied]


@dataclass(frozen=True)
class Shard:
    """An output shard: its path from the output, the bytes before the first tensor, its tensors."""

    name: str
    header: bytes
    steps: list[Step]

    @property
    def size(self) -> int:
        return self.steps[-1].output.stop

    @functools.cached_property
    def emptied(self) -> list[Path]:
        return sorted({path for step in self.steps for path in step.emptied})

    def sealed(self, fingerprint: str) -> bytes:
        """Return the header with a fingerprint."""
        before, after = (f'"{FINGERPRINT_KEY}":"{text}"'.encode()
                         for text in (NO_FINGERPRINT, fingerprint))
        return self.header.replace(before, after)


class Part(NamedTuple):
    """What becomes of the checkpoint in a folder: its shards, by their path from the root."""

    folder: Path
    checkpoint: Checkpoint
    reading: Reading
    shards: list[Shard]


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do, and what the folders hold that is no part of it."""

    root: Path
    parts: list[Part]
    others: list[str]

    @property
    def shards(self) -> list[Shard]:
        return [shard for part in self.parts for shard in part.shards]

    @property
    def steps(self) -> Iterator[Step]:
        return (step for shard in self.shards for step in shard.steps)

    @property
    def missing(self) -> list[str]:
        return [(part.folder / tensor.name).as_posix() if part.folder != Path() else tensor.name
                for part in self.parts for tensor in part.reading.missing]


def plan_shard(name: str, metadata: dict[str, str], tensors: list[Tensor],
               weights: dict[str, Quantization]) -> Shard:
    """Lay out an output shard in the order in which safetensors.torch.save_file would."""
    steps, path = [], Path(name)
    for tensor in tensors:
        quantization, output = weights.get(tensor.name), tensor._replace(path=path)
        if quantization:
            output = Tensor(quantization.output, "BF16", quantization.shape, path, 0,
                            2 * math.prod(quantization.shape))
        steps.append(Step(output, tensor, quantization))
    steps.sort(key=lambda step: (DTYPE_ORDER.index(step.output.dtype), step.output.name))
    # Without what only a reader of quantized tensors needs: pytorch/ao prototype/safetensors
    # describes each tensor by JSON with a _type.
    kept = {key: text for key, text in metadata.items()
            if key not in [*QUANTIZATION_KEYS, "tensor_names"] and '"_type"' not in text}
    kept |= {"format": "pt", FINGERPRINT_KEY: NO_FINGERPRINT}
    header, end = {"__metadata__": dict(sorted(kept.items()))}, 0
    for step in steps:
        start, end = end, end + step.output.size
        header[step.output.name] = {"dtype": step.output.dtype, "shape": step.output.shape,
                                    "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    longest = max((size for step in steps for size in step.output.shape), default=0)
    if len(text) > HEADER_LIMIT or longest >= 1 << 63:
        raise CheckpointError(f"{tensors[0].path}: its header or a tensor would be longer in BF16 "
                              "than safetensors allows")
    text = len(text).to_bytes(8, "little") + text
    placed = []
    for step in steps:
        start, stop = (len(text) + offset for offset in header[step.output.name]["data_offsets"])
        placed.append(step._replace(output=step.output._replace(start=start, stop=stop)))
    return Shard(name, text, placed)


def make_plan(root: Path, missing_scale: str = "keep") -> Plan:
    """Decide what becomes of every tensor in a folder and below.

    missing_scale: what to do with an FP8 weight without a scale: "keep" it as it is, "cast" it with
    scale 1, or raise an "error". Raises CheckpointError where the rules do not decide.
    """
    checkpoints, others = find_checkpoints(root)
    parts, whole = [], set()  # whole: the tensors of the root itself
    for checkpoint in checkpoints:
        folder = checkpoint.root.relative_to(root)
        if any(folder.is_relative_to(other) for other in others):
            continue
        with advising_move(root, folder):
            reading = read_formats(checkpoint)
        missing = reading.missing
        if missing and missing_scale == "error":
            raise missing[0].error(f"has no scale, one of {len(missing)} weights; --missing-scale "
                                   "keep leaves them FP8, cast takes their scale as 1")
        casts = {weight.name: plain_cast(weight) for weight in missing if missing_scale == "cast"}
        kept = {}
        for tensor in checkpoint.tensors.values():
            if tensor.name not in reading.dropped:
                kept.setdefault(tensor.path, []).append(tensor)
        shards = [plan_shard((folder / name).as_posix(), metadata, kept[checkpoint.root / name],
                             reading.weights | casts)
                  for name, metadata in checkpoint.shards.items() if checkpoint.root / name in kept]
        found = {(step.output.name, step.output.shape) for shard in shards for step in shard.steps}
        whole = whole if parts else found
        if parts and whole and 10 * len(whole - found) <= len(whole):
            others.append(folder.as_posix())  # the same weights in another format
        else:
            parts.append(Part(folder, checkpoint, reading, shards))
    if not any(part.shards for part in parts):
        raise CheckpointError(f"{root}: holds no tensors; give the checkpoint's folder")
    return Plan(root, parts, others)


class Ranks(NamedTuple):
    """Which of how many processes this is, in all and on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


ALONE = Ranks()


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

WINDOW = 16 << 20  # Bytes.
PAGE = 4096  # The alignment that direct I/O asks of offsets, lengths and memory.
OPEN_FILES = 8  # A worker holds at most so many files open: its shard and those of scales.
NONFINITE = ["NaN", "infinite"]
PHASES = ["reading", "decoding", "writing", "syncing"]
TELL = 30  # Seconds between lines of progress, where there is no bar.

# The names in torch of dtypes that outputs and scales may have.
TORCH_NAMES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32",
    "U32": "uint32", "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16",
    "I16": "int16", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


def in_pages(size: int) -> int:
    return ceil_div(size, PAGE) * PAGE


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
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # Keeps the tensor alive as long as the view.
    return memoryview(memory).cast("B")


def open_raw(path: Path, mode: str, flags: int = 0):
    """Open a file without Python's buffering, with more flags for os.open."""
    return open(path, mode, 0, opener=lambda name, own: os.open(name, own | flags, 0o666))


class Worker:
    """What one thread needs to render windows: buffers, open files, a GPU stream, and counts.

    nonfinite: how many values of a weight are of one of the kinds NONFINITE. direct: O_DIRECT, for
    reads that the page cache must not answer.
    """

    def __init__(self, device: str | torch.device = "cpu", window: int = 0, direct: int = 0):
        self.direct = direct
        self.stream = torch.cuda.Stream(device) if str(device).startswith("cuda") else None
        self.out = page_aligned(window, self.stream is not None)
        self.memory, self.files = {}, {}
        self.nonfinite, self.seconds = Counter(), Counter()

    @contextmanager
    def timed(self, phase: str):
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def scratch(self, name: str, size: int) -> torch.Tensor:
        """Return memory that is reused, because getting new memory costs more than filling it."""
        if len(self.memory.get(name, ())) < size:
            self.memory[name] = page_aligned(in_pages(size), self.stream is not None)
        return self.memory[name][:size]

    def read(self, path: Path, start: int, into: torch.Tensor) -> torch.Tensor:
        """Fill a uint8 tensor with the bytes of a file from `start` on, and return it."""
        with self.timed("reading"), naming(path):
            if path not in self.files:
                if len(self.files) >= OPEN_FILES:
                    self.close()
                self.files[path] = open_raw(path, "rb", self.direct)
            file, before = self.files[path], start % PAGE if self.direct else 0
            done, end, memory = 0, before + len(into), into
            if self.direct:  # Whole pages; the last may reach past the end of the file.
                memory = self.scratch("pages", in_pages(end))
            view = as_bytes(memory)
            file.seek(start - before)
            while done < end:
                size = file.readinto(view[done:])
                if size is None:  # Some network file systems do this.
                    raise BlockingIOError(errno.EAGAIN, "the file system has no data yet")
                if not size:
                    raise CheckpointError(f"{path}: ends at byte {path.stat().st_size}; it was cut")
                done += size
            if self.direct:
                into.copy_(memory[before:end])
        return into

    def elements(self, name: str, tensor: Tensor, first: int, count: int) -> torch.Tensor:
        """Return the bytes of `count` elements of a tensor from `first` on, in scratch memory."""
        memory = self.scratch(name, count * tensor.element_size)
        return self.read(tensor.path, tensor.start + first * tensor.element_size, memory)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


class Progress:
    """A bar on a terminal; elsewhere, a line every TELL seconds, so that a log shows life."""

    def __init__(self, doing: str, total: int, quiet: bool, note: Callable[[], str]):
        self.bar = tqdm(desc=doing, total=total, unit="B", unit_scale=True, disable=quiet or None)
        self.doing, self.total, self.quiet, self.note = doing, total, quiet, note
        self.done, self.lock = 0, threading.Lock()
        self.began = self.told = time.monotonic()

    def add(self, size: int) -> None:
        with self.lock:
            self.done, now = self.done + size, time.monotonic()
            self.bar.set_postfix_str(self.note(), refresh=False)
            self.bar.update(size)
            if self.bar.disable and not self.quiet and now - self.told > TELL:
                self.told = now
                say(f"{self.doing}: {self.done / self.total:.0%} of {sized(self.total)} in "
                    f"{now - self.began:.0f} s{', ' * bool(self.note())}{self.note()}")


def count_nonfinite(pool: list[Worker]) -> dict[str, dict[str, int]]:
    """Return how many values of each kind NONFINITE workers have found, by the weights' names."""
    counts = sum((worker.nonfinite for worker in pool), Counter())
    return {kind: {name: count for (what, name), count in counts.items() if what == kind}
            for kind in NONFINITE}


def begin_thread() -> None:
    """Make torch compute in the calling thread alone, with subnormal numbers.

    Its own threads would wait for each other at the end of every operation, on cores that the reads
    and writes of other workers keep busy.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


def run_workers(doing: str, pool: list[Worker], tasks: Iterable[tuple], work: Callable,
                total: int, quiet: bool = False, note: Callable[[], str] = str) -> None:
    """Run every worker in a thread of its own until no task is left or one has failed.

    A task is the arguments of `work` after the worker. `work` returns how many of the `total` bytes
    it has done; `note` returns what the progress bar says besides.
    """
    lock, stopped, tasks = threading.Lock(), threading.Event(), iter(tasks)
    threads, progress = torch.get_num_threads(), Progress(doing, total, quiet, note)

    def loop(worker: Worker) -> None:
        begin_thread()
        while True:
            with lock:
                task = None if stopped.is_set() else next(tasks, None)
            if task is None:
                break
            progress.add(work(worker, *task))

    executor = ThreadPoolExecutor(len(pool))
    try:
        futures = [executor.submit(loop, pool[0])]
        with suppress(RuntimeError):  # The system may not allow as many threads.
            futures += (executor.submit(loop, worker) for worker in pool[1:])
        for future in as_completed(futures):
            future.result()
    finally:
        stopped.set()
        executor.shutdown()
        progress.bar.close()
        torch.set_num_threads(threads)
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


def read_scales(quantization: Quantization, region: tuple[int, int, int, int],
                worker: Worker) -> torch.Tensor:
    """Return a region of a weight's scales (Grid.scale_region), a float32 matrix on the CPU.

    Global scales are applied here, in float32, before the codes meet either: the order in which
    ModelOpt and compressed-tensors dequantize. Raises CheckpointError for negative scales of NVFP4.
    """
    scale, global_scale = quantization.scale, quantization.global_scale
    if scale is None:
        return torch.ones(1, 1, dtype=torch.float32)
    top, bottom, left, right = region
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
    factors = kernel.widen_scales(raw, global_scale.dtype)
    factors = factors[which].view(-1, 1)
    return scales / factors if quantization.format.divides else scales * factors


def render_weight(step: Step, start: int, stop: int, out: torch.Tensor, worker: Worker) -> None:
    """Fill `out`, bfloat16, with the elements [start, stop) of a weight."""
    quantization = step.quantization
    grid, at = quantization.grid, 0
    limit = kernel.MAX_PIECE if worker.stream is None else len(worker.out) // 2
    for row, col, M, N in pieces(start, stop, grid.cols, limit):
        codes = read_codes(step, row, col, M, N, worker)
        row += quantization.first_row
        scales = read_scales(quantization, grid.scale_region(row, col, M, N), worker)
        values = out[at : at + M * N].view(M, N)
        with worker.timed("decoding"):
            found = kernel.dequantize(codes, scales, values, quantization.number_format, grid, row,
                                      col, quantization.format.inverse, worker.stream)
        for kind, count in zip(NONFINITE, found.tolist(), strict=True):
            if count:
                worker.nonfinite[kind, step.output.name] += count
        at += M * N


def render(shard: Shard, header: bytes, start: int, stop: int, worker: Worker) -> torch.Tensor:
    """Return the bytes [start, stop) of a shard, uint8, in the worker's buffer."""
    out, head = worker.out[: stop - start], header[start:stop]
    as_bytes(out)[: len(head)] = head
    first = bisect_right(shard.steps, start, key=lambda step: step.output.stop)
    last = bisect_left(shard.steps, stop, key=lambda step: step.output.start)
    for step in shard.steps[first:last]:
        begin, end = max(step.output.start, start), min(step.output.stop, stop)
        into, begin, end = out[begin - start : end - start], *(
            place - step.output.start for place in (begin, end))
        if step.quantization is None:
            worker.read(step.source.path, step.source.start + begin, into)
        else:
            render_weight(step, begin // 2, end // 2, into.view(torch.bfloat16), worker)
    return out


def windows_of(chosen: list[tuple[Shard, Step]]) -> Iterator[tuple[Shard, int, int]]:
    """Yield windows that cover the given tensors, in their order, and nothing else."""
    runs = []  # Tensors that follow each other in a shard share windows.
    for shard, step in chosen:
        if runs and runs[-1][0] is shard and runs[-1][2] == step.output.start:
            runs[-1][2] = step.output.stop
        else:
            runs.append([shard, step.output.start, step.output.stop])
    return ((shard, at, min(at + WINDOW, stop)) for shard, start, stop in runs
            for at in range(start, stop, WINDOW))


def read_ahead(chosen: list[tuple[Shard, Step]], pool: list[Worker],
               device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors in their order, by name, each in memory of its own on a device.

    Every worker renders a window ahead, which stays in its buffer until it has been copied.
    """
    threads, windows, pending = torch.get_num_threads(), windows_of(chosen), deque()
    executor = ThreadPoolExecutor(len(pool), initializer=begin_thread)

    def submit(worker: Worker) -> None:
        for shard, start, stop in itertools.islice(windows, 1):
            future = executor.submit(render, shard, b"", start, stop, worker)
            pending.append((future, start, worker))

    try:
        for worker in pool:
            submit(worker)
        for _, step in chosen:
            output, at = step.output, step.output.start
            data = torch.empty(output.size, dtype=torch.uint8, device=device)
            while at < output.stop:
                future, start, worker = pending[0]
                window = future.result()
                part = window[at - start : output.stop - start]
                data[at - output.start :][: len(part)] = part
                at += len(part)
                if at == start + len(window):
                    pending.popleft()
                    submit(worker)
            dtype = getattr(torch, TORCH_NAMES[output.dtype])
            torch.set_num_threads(threads)  # begin_thread has set it for new threads, too.
            yield output.name, data.view(dtype).view(output.shape)
            del data  # Frees the memory before the next takes any, if the caller has let go.
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        for worker in pool:
            worker.close()


# --- write: windows under a temporary name, then the final one ---

TEMPORARY_SUFFIX = ".tmp"
OWN_TEMPORARY = re.compile(r"(.*\.)?([0-9a-f]{16}|fp8_cast_bf16|[0-9a-f]{64})\.tmp", re.DOTALL)
NAME_LIMIT = 255  # Bytes, on most file systems.
DIRECT = getattr(os, "O_DIRECT", 0)
NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}  # File systems refuse it with these.
NOT_SYNCED = {*NOT_DIRECT, errno.ENOSYS}  # FUSE and some NFS refuse to sync a folder.
READING_VERSION = 2  # Raise it when the same tensors and row give new values.


def temporary(path: Path, fingerprint: str = FINGERPRINT_KEY) -> Path:
    """Return the name under which a file is written until it is whole."""
    name = f"{path.name}.{fingerprint}"
    if len(os.fsencode(name)) > NAME_LIMIT - len(TEMPORARY_SUFFIX):
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(name + TEMPORARY_SUFFIX)


def find_temporary(root: Path, shards: Iterable[Shard]) -> list[Path]:
    """Return the unfinished files in the folders of an output that this program has left there."""
    folders = {root, *((root / shard.name).parent for shard in shards)}
    return [path for folder in sorted(folders)
            for path in sorted(folder.glob(f"*{TEMPORARY_SUFFIX}"))
            if OWN_TEMPORARY.fullmatch(path.name)]


def direct_flag(root: Path) -> int:
    """Return O_DIRECT where this folder's file system takes it, else 0.

    Direct writes skip the page cache; writing through it takes 2.5 to 4 times as long for files
    larger than the cache. Where they are refused (tmpfs, some network file systems), plain writes
    take their place.
    """
    probe = temporary(root / f"probe{os.getpid()}")
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


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, where the system supports it."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(number)
    except OSError as error:
        if not folder or error.errno not in NOT_SYNCED:
            raise
    finally:
        os.close(number)


def describe(quantization: Quantization | None) -> tuple:
    """Return everything that decides how codes become values, but for the tensors themselves."""
    if quantization is None:
        return ()
    row, *numbers = quantization
    return row.title, row.divides, row.inverse, *(
        (value.name, value.dtype, value.shape) if isinstance(value, Tensor) else value
        for value in numbers)


def fingerprint_of(shard: Shard, worker: Worker) -> str:
    """Return 16 hex digits that tell from what data an output shard is made, and how.

    They depend on how every tensor is read and on three whole pages of each that goes into the
    shard: first, middle and last. A fine-tune may leave 98% of the codes as they were.
    """
    digest, places = hashlib.sha256(f"{READING_VERSION}".encode()), set()
    for step in shard.steps:
        digest.update(repr((step.output, describe(step.quantization))).encode())
        for tensor in (tensor for tensor in step.sources if not tensor.emptied):
            for start in (tensor.start, (tensor.start + tensor.stop) // 2, tensor.stop - PAGE):
                start = max(start, tensor.start)
                if start < tensor.stop:
                    places.add((tensor.path, start, min(start + PAGE, tensor.stop)))
    for path, start, stop in sorted(places):
        digest.update(as_bytes(worker.read(path, start, worker.scratch("page", stop - start))))
    return digest.hexdigest()[:16]


def holds(shard: Shard, path: Path) -> bool:
    """Return whether a file is whole and has a shard's tensors, by names, dtypes and shapes."""
    with suppress(CheckpointError):
        _, tensors = read_header(path)
        return {tensor[:3] for tensor in tensors} == {step.output[:3] for step in shard.steps}
    return False


def is_done(shard: Shard, root: Path, worker: Worker) -> bool:
    """Return whether a folder holds a shard with the planned size and header and its fingerprint.

    If an input shard of it has been emptied, it was proven before that, and the same tensors are
    enough, whatever version wrote them.
    """
    path = root / shard.name
    if shard.emptied:
        return not path.is_symlink() and holds(shard, path)
    if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.size:
        return False
    header = shard.sealed(fingerprint_of(shard, worker))
    return read_bytes(path, 0, len(header)) == header


class Output:
    """A shard being written, in windows that come in any order."""

    def __init__(self, shard: Shard, root: Path, direct: int):
        self.shard, self.direct, self.root = shard, direct, root
        self.final = root / shard.name
        self.path, self.header = None, b""
        self.lock, self.left = threading.Lock(), ceil_div(shard.size, WINDOW)

    def begin(self, worker: Worker) -> None:
        """Create the file, unless another worker has."""
        with self.lock:
            if not self.header:
                fingerprint = fingerprint_of(self.shard, worker)
                self.path = temporary(self.final, fingerprint)
                with naming(self.path), open_raw(self.path, "r+b", os.O_CREAT) as file:
                    file.truncate(self.shard.size)
                self.header = self.shard.sealed(fingerprint)

    def write(self, worker: Worker, start: int, stop: int) -> int:
        """Render a window and write it; give the shard its name if it was the last."""
        self.begin(worker)
        render(self.shard, self.header, start, stop, worker)
        view = as_bytes(worker.out)[: stop - start]
        # Direct writes are of whole pages, and a shard must never be longer than planned.
        direct = self.direct if len(view) % PAGE == 0 else 0
        try:
            with (worker.timed("writing"), naming(self.path),
                  open_raw(self.path, "r+b", direct) as file):
                file.seek(start)
                while view:
                    if (size := file.write(view)) is None:
                        raise BlockingIOError(errno.EAGAIN, "the file system takes no data now")
                    view = view[size:]
            with self.lock:
                self.left -= 1
                whole = not self.left
            if whole:
                with worker.timed("syncing"):
                    sync(self.path)
                os.replace(self.path, self.final)
        except FileNotFoundError:  # Has another job with the same input finished it?
            if not is_done(self.shard, self.root, worker):
                raise
        return stop - start

    def discard(self) -> None:
        """Remove the file of a shard that is not whole."""
        if self.path:
            self.path.unlink(missing_ok=True)


def write_shards(shards: list[Shard], root: Path, pool: list[Worker], quiet: bool) -> None:
    """Write shards into the folder `root`, each under its name once it is whole."""
    direct = direct_flag(root)
    outputs = [Output(shard, root, direct) for shard in sorted(shards, key=lambda s: -s.size)]
    windows = ((output, start, min(start + WINDOW, output.shard.size)) for output in outputs
               for start in range(0, output.shard.size, WINDOW))
    try:
        size = sum(shard.size for shard in shards)
        run_workers("writing", pool, windows,
                    lambda worker, output, *window: output.write(worker, *window), size, quiet,
                    lambda: f"{sum(not output.left for output in outputs)}/{len(outputs)} shards")
    finally:
        for output in outputs if not quiet else ():  # Another job may be writing a rank's files.
            output.discard()
    for folder in {root, *(output.final.parent for output in outputs)}:
        sync(folder)


# --- check: whether values are plausible, and whether an output is right ---

PLAUSIBLE = 1e-6, 4.0  # Root mean squares of weights.
PLAUSIBLE_CAST = 1e-6, 32.0  # Embeddings, norms, and plain casts, which hold both.
WIDE_NAME = re.compile(r"embed|norm|wte|(^|\.)shared(\.|$)")  # T5 calls its embeddings `shared`.
SAMPLED_WEIGHTS, SAMPLED_BYTES = 5, 64 << 10
REFERENCE_PIECE = 1 << 18  # Elements that a worker compares at once.
CASTS = TORCH_NAMES | {  # Of number formats, too. Scales of U8 are exponents.
    "E4M3": "float8_e4m3fn", "E5M2": "float8_e5m2", "INT8": "int8", "U8": "float8_e8m0fnu"}
NIBBLES = {  # What each of 16 codes means.
    "E2M1": [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
    "INT4": [*range(8), *range(-8, 0)], "UINT4B8": range(-8, 8)}
DTYPE_KEYS = ["torch_dtype", "dtype"]


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


def sample(step: Step, worker: Worker) -> tuple[float, bool]:
    """Return the root mean square of values from the middle of a weight, and whether all their
    scales are 1.
    """
    quantization = step.quantization
    total, cols = math.prod(quantization.shape), quantization.grid.cols
    if not total:
        return 0.0, False
    count = min(total, SAMPLED_BYTES * kernel.FORMATS[quantization.number_format].codes_per_byte)
    start = (total - count) // 2
    start -= start % cols if cols <= count else 0  # The piece is whole rows.
    row, col, M, N = next(pieces(start, start + count, cols, count))
    region = quantization.grid.scale_region(quantization.first_row + row, col, M, N)
    out = torch.empty(M * N, dtype=torch.bfloat16)
    render_weight(step, row * cols + col, row * cols + col + M * N, out, worker)
    ones = bool((read_scales(quantization, region, worker) == 1).all())
    return out.double().square().mean().sqrt().item(), ones


def find_implausible(planned: Iterable[Step]) -> list[str]:
    """Return a line for each kind of weight whose sampled values are implausible.

    A misread format (an inverse scale that is multiplied, exponents read as numbers, a divisor used
    as a factor) is wrong by orders of magnitude, in every weight of its kind. What this cannot see:
    scales in tiles, the order of nibbles, and factors below a hundred.
    """
    kinds, worker, found = {}, Worker(), []
    for step in planned:
        if step.quantization and not step.emptied:
            kinds.setdefault(kind_of(step), []).append(step)
    for kind, steps in kinds.items():
        leaves = {step.output.module.rpartition(".")[2]: step for step in steps}
        chosen = [*leaves.values(), *steps[:: max(1, len(steps) // SAMPLED_WEIGHTS)]]
        samples = [(step, *sample(step, worker)) for step in chosen[:SAMPLED_WEIGHTS]]
        samples = [entry for entry in samples if entry[1] != 0]
        if not samples:
            continue
        scale, outside = steps[0].quantization.scale, []
        for step, rms, _ in samples:
            wide = scale is None or WIDE_NAME.search(step.source.name)
            low, high = PLAUSIBLE_CAST if wide else PLAUSIBLE
            if not low <= rms <= high:
                outside.append(f"{step.source.name} and others have a root mean square of "
                               f"{rms:.3g}, expected {low:g} to {high:g}")
        # A single odd weight is no misread format, but NaN is nowhere right.
        if 2 * len(outside) >= len(samples) or any(math.isnan(rms) for _, rms, _ in samples):
            what = outside[0]
        elif scale and all(ones for _, _, ones in samples):
            what = f"the scales of {samples[0][0].source.name} and others are all 1"
        else:
            continue
        found.append(f"{kind}: {what}: usually an inverse scale, raw codes or a missing second "
                     "scale; --verify reads the format the same way and cannot see it")
    worker.close()
    return found


def differences(got: dict[str, str], expected: dict[str, str], where: str = "") -> Iterator[str]:
    """Yield a line for each key whose values differ between two mappings."""
    for key in dict.fromkeys([*expected, *got]):
        if got.get(key) != expected.get(key):
            yield (f"{where}{key} is {got.get(key, 'missing')[:200]}, expected "
                   f"{expected.get(key, 'none')[:200]}")


def complete_index(index: dict, tensors: Iterable[Tensor], folder: Path) -> dict:
    """Return an index of these tensors: their paths from a folder and their total size."""
    meta, tensors = index.get("metadata"), sorted(tensors, key=lambda tensor: tensor.name)
    return index | {
        "metadata": {**(meta if isinstance(meta, dict) else {}),
                     "total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": {tensor.name: tensor.path.relative_to(folder).as_posix()
                       for tensor in tensors}}


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


def differing_texts(result: Checkpoint, part: Part, side: SideFiles) -> Iterator[str]:
    """Yield what is wrong with the index and the configs of a folder of the output."""
    planned = {Path(path).name: text for path, text in side.texts.items()
               if Path(path).parent == part.folder}
    index_name = result.index_name
    others = [name for name in result.files if not fnmatch.fnmatchcase(name, CONFIG_PATTERN)
              or name == CONFIG_NAME]
    for name in dict.fromkeys([*planned, *others]):
        if name not in result.files:
            yield f"{name} is missing"
        elif name != index_name:
            expected = json.loads(planned.get(name, "{}"))
            yield from differences(flattened(result.files[name]), flattened(expected), f"{name}: ")
    if index := result.files.get(index_name):
        expected = complete_index(index, result.tensors.values(), result.root)
        yield from differences(flattened(index), flattened(expected), f"{index_name}: ")


def compare_headers(part: Part, out: Path,
                    side: SideFiles) -> tuple[list[str], list[tuple[Shard, Step, Tensor]]]:
    """Return what differs in names, dtypes, shapes and texts of a folder, and the planned tensors
    that do not differ, each with its shard and the tensor that is there.
    """
    names = [Path(shard.name).relative_to(part.folder).as_posix() for shard in part.shards]
    folder, broken, lines = out / part.folder, [], []
    others = [name for name in side.copied if Path(name).parent == part.folder]
    for name in [name for name in names if os.path.lexists(folder / name)]:
        try:
            read_header(folder / name)
        except CheckpointError as error:
            broken.append(name)
            lines.append(str(error).replace(f"{folder}/", "").replace("; download it again", ""))
    try:
        result = load_checkpoint(folder, [name for name in names if name not in broken],
                                 [*others, *broken])
    except CheckpointError as error:
        remedy = "delete it and run the same command without --verify"
        raise CheckpointError(str(error).replace("download it again", remedy)) from error
    got = {name: f"{tensor.dtype} {[*tensor.shape]}" for name, tensor in result.tensors.items()}
    steps = [(shard, step) for shard in part.shards for step in shard.steps]
    expected = {step.output.name: f"{step.output.dtype} {[*step.output.shape]}"
                for _, step in steps}
    where = "" if part.folder == Path() else f"{part.folder.as_posix()}/"
    lines += [*differences(got, expected), *differing_texts(result, part, side)]
    same = [(shard, step, result.tensors[name]) for shard, step in steps
            if got.get(name := step.output.name) == expected[name]]
    return [where + line for line in lines], same


def cols_of(step: Step) -> int:
    return step.quantization.grid.cols if step.quantization else math.prod(step.output.shape)


@functools.cache
def meaning(number_format: str) -> torch.Tensor:
    """Return what each of 256 codes means, by torch's own cast, or each of 16; float32."""
    if number_format in NIBBLES:
        return torch.tensor([*NIBBLES[number_format]]).float()
    return torch.arange(256, dtype=torch.uint8).view(getattr(torch, CASTS[number_format])).float()


def reference_scales(quantization: Quantization, top: int, bottom: int,
                     worker: Worker) -> torch.Tensor:
    """Return whole rows [top, bottom) of a weight's scales, float32."""
    scale, second = quantization.scale, quantization.global_scale
    width = ceil_div(quantization.grid.cols, quantization.grid.block_cols)
    raw = worker.elements("scales", scale, top * width, (bottom - top) * width)
    scales = raw.view(getattr(torch, CASTS[scale.dtype])).float().view(-1, width)
    if second is None:
        return scales
    raw = worker.elements("factors", second, 0, math.prod(second.shape))
    factors = raw.view(getattr(torch, CASTS[second.dtype])).float()
    each = math.prod(scale.shape) // width // len(factors)
    factors = factors[torch.arange(top, bottom) // each][:, None]
    return scales / factors if quantization.format.divides else scales * factors


def reference(step: Step, row: int, col: int, M: int, N: int, worker: Worker) -> torch.Tensor:
    """Return a piece of a weight by the definition of its format, (M, N) bfloat16.

    It is what each code means, times the scale of each element, rounded to BF16. Nothing of
    kernel.py is used but the numbers of the grid.
    """
    quantization, grid = step.quantization, step.quantization.grid
    table = meaning(quantization.number_format)
    begin, per_byte = row * quantization.packed_cols + col, 1 if len(table) == 256 else 2
    end = begin + (M - 1) * quantization.packed_cols + N
    raw = worker.read(step.source.path, step.source.start + begin // per_byte,
                      worker.scratch("codes", ceil_div(end, per_byte) - begin // per_byte))
    codes = raw if per_byte == 1 else torch.stack([raw & 15, raw >> 4], 1).flatten()
    index = worker.scratch("index", 4 * len(codes)).view(torch.int32).copy_(codes)
    values = worker.scratch("values", 4 * len(codes)).view(torch.float32)
    torch.index_select(table, 0, index, out=values)
    values = values[begin % per_byte :].as_strided((M, N), (quantization.packed_cols, 1))
    if quantization.scale is None:
        return values.bfloat16()
    rows, cols = torch.arange(row, row + M) + quantization.first_row, torch.arange(col, col + N)
    slabs, rows = rows // grid.slab_rows, rows % grid.slab_rows
    rows = slabs * ceil_div(grid.slab_rows, grid.block_rows) + rows // grid.block_rows
    top, bottom = rows[0].item(), rows[-1].item() + 1
    scales = reference_scales(quantization, top, bottom, worker)
    scales = scales.index_select(1, cols // grid.block_cols).index_select(0, rows - top)
    return (values.div_(scales) if quantization.format.inverse else values.mul_(scales)).bfloat16()


def compare_piece(step: Step, tensor: Tensor, row: int, col: int, M: int, N: int,
                  worker: Worker) -> tuple[int, str, str] | None:
    """Return the first element that differs in a piece of a tensor, and how both read, or None."""
    start, size = row * cols_of(step) + col, tensor.element_size
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    got = worker.elements("got", tensor, start, M * N).view(bits)
    if step.quantization:
        expected = reference(step, row, col, M, N, worker).view(bits).flatten()
    else:
        expected = worker.elements("expected", step.source, start, M * N).view(bits)
    if step.quantization and ((got & 0x7F80) == 0x7F80).any():
        values = got.view(torch.bfloat16)
        for kind, found in zip(NONFINITE, (values.isnan(), values.isinf()), strict=True):
            worker.nonfinite[kind, step.output.name] += found.sum().item()
    if torch.equal(got, expected):
        return None
    differs = got != expected
    if step.quantization:
        got, expected = got.view(torch.bfloat16), expected.view(torch.bfloat16)
        differs &= ~(got.isnan() & expected.isnan())
    if not differs.any():
        return None
    at = differs.nonzero()[0].item()
    shown = [data[at].item() for data in (got, expected)]
    if not step.quantization:
        shown = [f"0x{value % (1 << 8 * size):0{2 * size}x}" for value in shown]
    return start + at, *map(str, shown)


def compare_values(steps: list[tuple[Shard, Step, Tensor]], out: Path, pool: list[Worker],
                   quiet: bool) -> dict[tuple[str, Tensor], tuple[int, str, str]]:
    """Return the first difference in each tensor that has one, by shard name and tensor."""
    first, lock = {}, threading.Lock()

    def compare(worker: Worker, shard: Shard, step: Step, tensor: Tensor, *piece: int) -> int:
        if difference := compare_piece(step, tensor, *piece, worker):
            with lock:
                place = tensor.path.relative_to(out).as_posix(), tensor
                first[place] = min(first.get(place, difference), difference)
        return piece[2] * piece[3] * step.output.element_size

    tasks = ((*task, *piece) for task in steps for piece in pieces(
        0, math.prod(task[1].output.shape), cols_of(task[1]), REFERENCE_PIECE))
    size = sum(step.output.size for _, step, _ in steps)
    run_workers("verifying", pool, tasks, compare, size, quiet)
    return first


def check_loadable(path: Path) -> None:
    """Open a shard as loaders do. Raises CheckpointError if safetensors refuses it."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: safetensors cannot load it ({error})") from error
    except (OSError, RuntimeError):  # It is missing, or the system does not let it be mapped.
        pass


def find_differences(plan: Plan, out: Path, side: SideFiles, workers: int,
                     ranks: Ranks) -> tuple[list[str], list[str]]:
    """Compare an output, whoever made it, with the plan: a line for each difference, and the files
    to delete before a run that mends them.

    How tensors are spread over shards is free, and so are the order and padding of headers, the
    fingerprint, and the payload of a NaN. Each rank looks at the values of its own shards, and
    rank 0 at the rest.
    """
    if not out.is_dir():
        raise CheckpointError(f"{out}: no such folder; give the output of a conversion")
    lines, damaged, steps = [], {}, []  # damaged: a dict, which keeps the order
    mine = {shard.name for shard in shards_of_rank(plan.shards, ranks.rank, ranks.count)}
    for part in plan.parts:
        differing, same = compare_headers(part, out, side)
        lines += differing if ranks.rank == 0 else []
        steps += [task for task in same if task[0].name in mine and not task[1].emptied]
        right = {step.output.name for _, step, _ in same}
        damaged |= {shard.name: None for shard in part.shards
                    if shard.name in mine and not shard.emptied and (out / shard.name).exists()
                    and any(step.output.name not in right for step in shard.steps)}
    for name in sorted(mine - {*damaged}):
        check_loadable(out / name)
    first = compare_values(steps, out, [Worker() for _ in range(workers)], ranks.rank > 0)
    emptied = {shard.name: shard.emptied for shard in plan.shards}
    for (shard, tensor), (element, value, wanted) in sorted(first.items()):
        place = torch.unravel_index(torch.tensor(element), tensor.shape)
        lines.append(f"{shard}: {tensor.name}: element {[at.item() for at in place]} is {value}, "
                     f"expected {wanted}")
        if emptied.get(shard):
            lines[-1] += f"; keep the file until {emptied[shard][0]} is downloaded again"
        else:
            damaged[shard] = None
    if damaged:  # Without them, files that differ would be taken for somebody else's.
        damaged |= {name: None for name, text in side.texts.items() if (out / name).is_file()
                    and (out / name).read_bytes() != text.encode()}
    return lines, [*damaged]


# --- publish: the files beside the shards; config and index last, which say that all is there ---

# Files that only a quantized checkpoint needs; a loader would take the output for quantized.
QUANTIZATION_FILES = [NVIDIA_CONFIG_NAME, SIDECAR_NAME, "quant_cfg.json", "quant_config.json",
                      "quantize_config.json",
                      "quanto_qmap.json", "quant_model_description*.json"]
# Not copied: weights in other formats or of another set, states of training, and what editors,
# downloads and crashes leave.
UNWANTED = ["*.safetensors", INDEX_PATTERN, "pytorch_model*", "*.pth", "*.pt", "*.bin", "*.ckpt",
            "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "global_step*", "core", "core.[0-9]*", "*~",
            "*.tmp", ".*.sw?", "#*#", ".#*", ".*.safetensors.??????",
            ".*.json.??????", *OTHER_SETS, *(f"*{ending}" for ending in UNFINISHED)]
IGNORED = ["._*", ".DS_Store"]  # macOS leaves these everywhere.
RANKS_NAME = "fp8_cast_bf16.ranks"  # Holds the digest of the plan while ranks work.
# They describe a whole or another output, so a run that has work to do removes them first.
SIGNS = [CONFIG_NAME, PARAMS_NAME, INDEX_NAME, RANKS_NAME, *QUANTIZATION_FILES]


# The parts of a config that describe a language model, in configs of several models.
TEXT_CONFIGS = words("text_config llm_config language_config thinker_config talker_config")
QUANTIZED_DTYPE = re.compile(r"(torch\.)?((nv|mx)?fp[48]|float[48]|u?int[48])", re.IGNORECASE)


@dataclass(frozen=True)
class SideFiles:
    """The files beside the shards, by path from the root: to copy, to leave out, to write anew."""

    copied: list[str]
    left_out: list[str]
    texts: dict[str, str]


def is_adapter(path: Path, plan: Plan) -> bool:
    """Return whether a file beside indexed shards holds other, plain weights.

    Raises CheckpointError if it repeats one of their tensors or holds quantized ones.
    """
    beside = [part for part in plan.parts if plan.root / part.folder == path.parent
              or any((plan.root / shard.name).parent == path.parent for shard in part.shards)]
    if path.suffix.lower() != ".safetensors" or is_like(path.name, OTHER_SETS) or not beside:
        return False
    check_whole(plan.root, [path.relative_to(plan.root).as_posix()])
    metadata, members = read_header(path)
    tensors = {tensor.name: tensor for tensor in members}
    reading = read_formats(replace(beside[0].checkpoint, shards={path.name: metadata},
                                   tensors=tensors, rivals={}))
    same = tensors.keys() & beside[0].checkpoint.tensors.keys()
    if same or reading.weights or reading.dropped or reading.missing:
        what = f"repeats {min(same)}" if same else "holds quantized weights"
        raise CheckpointError(f"{path}: is not named by {beside[0].checkpoint.index_name} and "
                              f"{what}; move it out of {plan.root}")
    return True


def belongs(path: Path, plan: Plan) -> bool:
    """Return whether a file beside the shards is to be copied.

    Raises CheckpointError for one that would silently be missing in the output.
    """
    if path.is_symlink() and not is_regular(path, plan.root) and not path.name.startswith(".#"):
        raise CheckpointError(f"{path}: is a link to {os.readlink(path)}, "
                              f"{'outside' if path.exists() else 'not there, or outside'} of the "
                              "checkpoint; put the file itself there (cp -L)")
    if not path.is_file() or (is_like(path.name, UNWANTED) and not is_adapter(path, plan)):
        return False
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: is not readable; it would be missing in the output")
    refuse_pointer(path, read_bytes(path, 0, 64))
    return True


def bf16_config(value, of_text: bool = True, plain: bool = False):
    """Return a config, or a part of one, that describes plain weights.

    of_text: the part describes the language model, so its dtype becomes bfloat16; other parts keep
    theirs, unless a quantized one is named: their weights may all be copied. plain: no dtype
    changes, because all weights are copied.
    """
    if isinstance(value, list):
        return [bf16_config(item, False, plain) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: "bfloat16" if key in DTYPE_KEYS and isinstance(item, str) and not plain
            and (of_text or QUANTIZED_DTYPE.match(item))
            else bf16_config(item, of_text and key in TEXT_CONFIGS, plain)
            for key, item in value.items() if key not in QUANTIZATION_KEYS}


def bf16_texts(part: Part) -> dict[str, str]:
    """Return the JSON files of a folder of the output by path, config.json last.

    They are those of the input, byte for byte where nothing has to change, and an index where there
    is more than one shard.
    """
    checkpoint, values = part.checkpoint, {}
    outputs = [step.output for shard in part.shards for step in shard.steps]
    index = checkpoint.files.get(checkpoint.index_name, {} if len(checkpoint.shards) > 1 else None)
    if index is not None:
        values[checkpoint.index_name] = complete_index(index, outputs, part.folder)
    if PARAMS_NAME in checkpoint.files:
        values[PARAMS_NAME] = {key: value for key, value in checkpoint.files[PARAMS_NAME].items()
                               if key not in ["quantization", *QUANTIZATION_KEYS]}
    plain = checkpoint.tensors and not part.reading.weights and not part.reading.missing
    configs = fnmatch.filter(checkpoint.files, CONFIG_PATTERN)
    for name in sorted(configs, key=lambda name: (name == CONFIG_NAME, name)):
        try:
            # Plain weights stay as they are, and so does the dtype that they are loaded in.
            quantized = {key for key, _ in walk(checkpoint.files[name])} & {*QUANTIZATION_KEYS}
            kept = plain and not quantized
            values[name] = config = bf16_config(checkpoint.files[name], plain=kept)
        except RecursionError as error:
            raise CheckpointError(f"{checkpoint.root / name}: nested too deep") from error
        empty = [key for key in DTYPE_KEYS if key in config and config[key] is None and not kept]
        config |= dict.fromkeys(empty[:1], "bfloat16")
    return {(part.folder / name).as_posix():
            read_bytes(checkpoint.root / name).decode() if value == checkpoint.files.get(name)
            else json.dumps(value, indent=2) + "\n" for name, value in values.items()}


def find_side_files(plan: Plan) -> SideFiles:
    """Decide what becomes of the files beside the shards.

    Raises CheckpointError for links out of the checkpoint, which would be missing in the output,
    and for a file of weights of which nothing says whether it is part of the checkpoint.
    """
    texts = {name: text for part in plan.parts[::-1] for name, text in bf16_texts(part).items()}
    known, copied, left_out = {*texts}, [], [*plan.others]
    for part in plan.parts:
        known |= {(part.folder / name).as_posix() for name in part.checkpoint.shards}
        known |= {(part.folder / path.name).as_posix() for pattern in QUANTIZATION_FILES
                  for path in part.checkpoint.root.glob(pattern)}

    def skip(error: OSError) -> None:
        skip_unreadable(error)
        left_out.append(Path(error.filename).relative_to(plan.root).as_posix())

    for folder, folders, names in os.walk(plan.root, onerror=skip):
        left_out += [Path(folder, name).relative_to(plan.root).as_posix() for name in folders
                     if name == "lost+found"]
        folders[:] = sorted({*folders} - TOOL_FOLDERS)
        for name in sorted(names + folders):
            path = Path(folder, name)
            relative = path.relative_to(plan.root).as_posix()
            if name in folders:
                unwanted = is_like(name, UNWANTED) and name != "core"
                if unwanted or path.is_symlink() or relative in [*known, *left_out]:
                    folders.remove(name)
                    if relative not in left_out:
                        left_out.append(relative)
            elif relative not in known and not is_like(name, IGNORED):
                size = f" ({sized(path.stat().st_size)})" if path.is_file() else ""
                if belongs(path, plan):
                    copied.append(relative)
                else:
                    left_out.append(relative + size * is_like(name, UNWANTED))
    return SideFiles(copied, left_out, texts)


@dataclass(frozen=True)
class OutputState:
    """What an output folder holds, and what is to be done about it.

    done: shards that are as planned. replaced: those of an earlier run that are not, and files
    that someone has edited. files: what stands beside the shards and is not as it should be. stale:
    what must go. needed: bytes; free: bytes, None where the file system does not say.
    """

    done: set[str]
    replaced: list[str]
    files: list[str]
    stale: list[Path]
    needed: int
    free: int | None

    @property
    def complete(self) -> bool:
        return not (self.needed or self.files or self.stale)


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(read_bytes(path, 0, 8), "little")


def is_ours(path: Path) -> bool:
    """Return whether a file carries a fingerprint."""
    header = read_bytes(path, 0, min(header_size(path), HEADER_LIMIT))
    return f'"{FINGERPRINT_KEY}":"'.encode() in header


def find_done(shards: list[Shard], out: Path, workers: int) -> set[str]:
    """Return the names of those shards in the output whose size and header are the planned ones.

    Raises CheckpointError for files that must not be replaced: those without a fingerprint, and
    those that are read-only.
    """
    done = set()

    def check(worker: Worker, shard: Shard) -> int:
        if is_done(shard, out, worker):
            done.add(shard.name)
        return shard.size

    for path in (out / shard.name for shard in shards if not shard.emptied):
        if path.is_symlink() or not path.is_file() or not is_ours(path):
            raise CheckpointError(f"{path}: was not written by this version of this program; check "
                                  "it with --verify, and delete it to convert it anew")
    if shards:
        pool = [Worker() for _ in range(min(workers, len(shards)))]
        run_workers("checking", pool, ((shard,) for shard in shards), check, 0, quiet=True)
    for path in (out / shard.name for shard in shards
                 if shard.name not in done and not shard.emptied):
        if not path.stat().st_mode & stat.S_IWUSR:
            raise CheckpointError(f"{path}: is not what this input gives, and read-only: it may be "
                                  "the only copy of an input that --delete-source has emptied; "
                                  "give another output, or delete it")
    return done


def existing(folder: Path) -> Path:
    """Return the path itself if it exists, or else the nearest folder above that does."""
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
        if not (above := existing(path.parent)).is_dir():
            raise CheckpointError(f"{above}: is where a folder has to be; remove it")


def find_stale(plan: Plan, out: Path, side: SideFiles) -> list[Path]:
    """Return what tells of another state of the output, and files that were left unfinished."""
    planned = [*side.copied, *side.texts]
    folders = {(out / name).parent for name in [*(s.name for s in plan.shards), *side.texts]}
    stale = [path for folder in sorted(folders | {out}) for pattern in SIGNS
             for path in sorted(folder.glob(pattern))
             if path.relative_to(out).as_posix() not in planned]
    stale += find_temporary(out, plan.shards)
    stale += [path for name in planned if (path := temporary(out / name)).exists()]
    return [*dict.fromkeys(stale)]


def inspect_output(plan: Plan, out: Path, side: SideFiles, workers: int) -> OutputState:
    """Look at an output folder. Raises CheckpointError where the output cannot be made there."""
    shards = {shard.name: shard for shard in plan.shards}
    foreign = [name for path in sorted(out.rglob("*.safetensors")) if path.name[0] != "."
               and (name := path.relative_to(out).as_posix()) not in {*shards, *side.copied}]
    if foreign:
        raise CheckpointError(f"{out}: holds {', '.join(foreign)}, which this checkpoint does not "
                              "have; give another folder")
    stale = find_stale(plan, out, side)
    there = [name for name in sorted(shards) if os.path.lexists(out / name)]
    done = find_done([shards[name] for name in there], out, workers)
    for shard in plan.shards:
        if shard.emptied and shard.name not in done:
            raise CheckpointError(f"{out / shard.name}: is missing or not whole, and its input has "
                                  f"been emptied by --delete-source; download {shard.emptied[0]} "
                                  "again, and whatever else this program then names")
    files = [name for name, text in side.texts.items()
             if not (out / name).is_file() or (out / name).read_bytes() != text.encode()]
    files += [name for name in side.copied if not (out / name).is_file()
              or not filecmp.cmp(plan.root / name, out / name, shallow=False)]
    edited = [name for name in files if os.path.lexists(out / name) and not (out / name).is_dir()]
    theirs = edited + [path.name for path in stale if path.is_file() and path.name != RANKS_NAME
                       and path.suffix != TEMPORARY_SUFFIX]
    if theirs and not there:
        raise CheckpointError(f"{out}: holds {', '.join(theirs)}, which this program has not "
                              "written; give another folder")
    sizes = [shard.size for shard in plan.shards if shard.name not in done]
    sizes += [len(side.texts[name]) if name in side.texts else (plan.root / name).stat().st_size
              for name in files]
    freed, usage = 0, shutil.disk_usage(existing(out))
    for path in [*stale, *(out / name for name in edited)]:  # Shards stay until others are whole.
        with suppress(FileNotFoundError):  # Another rank may have given it its name.
            freed += getattr(path.lstat(), "st_blocks", 0) * 512
    replaced = [name for name in there if name not in done] + edited
    state = OutputState(done, replaced, files, stale, sum(map(in_pages, sizes)),
                        usage.free + freed if usage.total else None)
    if not state.complete:
        check_places(out, [*shards, *side.texts, *side.copied], stale)
    return state


def lock(folder: Path, stack: ExitStack, must: bool = False) -> None:
    """Keep other runs out of a folder until the stack ends, where the system has locks.

    Raises CheckpointError if another run holds the lock, or if it cannot be had but `must` be.
    """
    if fcntl:
        number = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, number)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            raise CheckpointError(f"{folder}: another run is writing there; let it end. Started "
                                  "several times? Start it once, or with torchrun") from error
        except OSError:  # Some network file systems have no locks.
            pass
    if must:
        raise CheckpointError(f"--delete-source: {folder}: cannot be locked")


def write_whole(path: Path, content: str | Path) -> None:
    """Replace a file atomically by a text or by the content of another file."""
    try:
        temporary(path).unlink(missing_ok=True)
        with naming(path), open(temporary(path), "xb") as file:
            if isinstance(content, Path):
                with naming(content), open(content, "rb") as original:
                    shutil.copyfileobj(original, file)
                    if file.tell() != content.stat().st_size:  # Some file systems end early.
                        raise CheckpointError(f"{content}: was read only in part; try again")
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
        sync(folder)
    for name, text in side.texts.items():
        write_whole(out / name, text)
        sync((out / name).parent)
    sync(out)


# --- ranks: the processes of torchrun, which share nothing but the output folder ---

POLL = 0.5  # Seconds between looks at what other ranks do.
PATIENCE, STALLED = 60, 1800  # Seconds to wait for rank 0's plan, and for any sign of the others.


def find_ranks() -> Ranks:
    """Return which of torchrun's processes this is; a process started by one of them is not one."""
    numbers = [os.environ.get(name, "")
               for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    launched = "TORCHELASTIC_RUN_ID" in os.environ and all(map(str.isdecimal, numbers))
    with suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        launched &= not any(entry.startswith(b"TORCHELASTIC_RUN_ID=") for entry in parent)
    return Ranks(*map(int, numbers)) if launched else ALONE


def digest_of(plan: Plan) -> str:
    """Return 16 hex digits that ranks have in common if their inputs and plans are the same.

    Headers alone would not do: DeepSeek-V3's and R1's are the same.
    """
    worker = Worker()
    parts = [fingerprint_of(max(plan.shards, key=lambda shard: shard.size), worker)]
    worker.close()
    parts += [(shard.header, [describe(step.quantization) for step in shard.steps])
              for shard in plan.shards]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def watch(look: Callable[[], object],
          waiting: Callable[[], str]) -> Iterator[tuple[object, float]]:
    """Yield what `look` returns, again and again, and for how many seconds it has been the same."""
    told = since = time.monotonic()
    last = None
    while True:
        seen, now = look(), time.monotonic()
        if seen != last:
            last, since = seen, now
        yield seen, now - since
        if now - told > TELL:
            told = now
            say(waiting())
        time.sleep(POLL)


def await_plan(out: Path, digest: str, rank: int) -> None:
    """Return once rank 0 has prepared the output for the plan that this rank has, too."""

    def look() -> str | None:
        with suppress(FileNotFoundError):
            return (out / RANKS_NAME).read_text()

    for found, age in watch(look, lambda: f"Rank {rank} waits until rank 0 has prepared {out}"):
        if found == digest:
            return
        if found and age > PATIENCE:
            raise CheckpointError(f"{out}: rank {rank} has the plan {digest}, rank 0 has {found}; "
                                  "give all ranks the same input and the same version")
        if age > STALLED:
            raise CheckpointError(f"{out}: rank 0 has not prepared it; start the same command "
                                  "again")


def await_shards(shards: list[Shard], out: Path) -> None:
    """Return once the shards of other ranks have their names and their planned headers."""
    worker, left = Worker(), list(shards)

    def look() -> list:
        left[:] = [shard for shard in left if not is_done(shard, out, worker)]
        times = []
        for path in find_temporary(out, shards):
            with suppress(FileNotFoundError):
                times.append((path.name, path.stat().st_mtime_ns))
        return [len(left), times]

    for (count, _), age in watch(look, lambda: f"Waiting for {len(left)} shards of other ranks"):
        if not count:
            worker.close()
            return
        if age > STALLED:
            raise CheckpointError(f"{out}: {count} shards of other ranks have stopped growing "
                                  f"({left[0].name}); start the same command again")


# --- empty: input shards give way to their output once that is proven (--delete-source) ---

WATCHED = WINDOW  # Bytes: less would not show in the free space of a busy disk.


def find_takers(plan: Plan) -> dict[Path, set[str]]:
    """Return the input shards that have data, each with the output shards that take any of it."""
    takers = {}
    for shard in plan.shards:
        for tensor in (tensor for step in shard.steps for tensor in step.sources):
            if tensor.size and not tensor.emptied:
                takers.setdefault(tensor.path, set()).add(shard.name)
    return takers


def emptying_order(plan: Plan, done: set[str]) -> list[tuple[Shard, list[Path]]]:
    """Return the output shards in the order that frees space soonest.

    Each comes with the input shards that nothing needs after it.
    """
    shards, left = {shard.name: shard for shard in plan.shards}, find_takers(plan)
    rest = shards.keys() - set().union(*left.values()) - done
    order = [(shards[name], []) for name in sorted(rest)]
    while left:
        soonest = min(left, key=lambda path: (
            sum(shards[name].size for name in left[path] - done), path))
        for name in sorted(left[soonest]):
            for names in left.values():
                names.discard(name)
            order.append((shards[name], [path for path, names in left.items() if not names]))
            left = {path: names for path, names in left.items() if names}
    return order


def data_on_disk(path: Path) -> int:
    """Return how many bytes of the disk become free when a shard is truncated to its header."""
    return max(0, getattr(path.stat(), "st_blocks", 0) * 512 - in_pages(header_size(path)))


def peak_space(order: list[tuple[Shard, list[Path]]], state: OutputState) -> int:
    """Return how many bytes more than now a run takes at its peak."""
    now = peak = 0
    sides = state.needed
    for shard, paths in order:
        if shard.name not in state.done:
            now, sides = now + in_pages(shard.size), sides - in_pages(shard.size)
        peak = max(peak, now)
        now -= sum(map(data_on_disk, paths))
    return max(peak, now + sides)


def stamp(at: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is replaced, linked to, or written."""
    return at.st_dev, at.st_ino, at.st_nlink, at.st_size, at.st_mtime_ns


def find_doubts(plan: Plan, record: Report) -> Iterator[str]:
    """Yield why values may not be read rightly, or why an interrupted run could not plan again."""
    yield from record.implausible
    yield from (f"{name} is FP8 and has no scale" for name in plan.missing)
    yield from (f"{name} is a scale of no weight" for name in record.dropped_scales_of_no_weight)
    for part in plan.parts:
        emptied = {name: tensor._replace(emptied=True)
                   for name, tensor in part.checkpoint.tensors.items()}
        try:
            read_formats(replace(part.checkpoint, tensors=emptied))
        except CheckpointError as error:
            yield str(error)


def check_source(plan: Plan, options: Options, record: Report) -> dict[Path, tuple[int, ...]]:
    """Return the stamps of the shards that will be emptied.

    Raises CheckpointError where there are doubts, and where emptying the shards would hit others,
    free nothing, or lose what is not in the output.
    """
    doubts = [*find_doubts(plan, record)]
    stamps = {path: stamp(path.lstat()) for path in find_takers(plan)}
    known = {tensor for part in plan.parts for tensor in part.checkpoint.tensors.values()}
    outputs = [options.output / shard.name for shard in plan.shards]
    made = {stamp(path.stat())[:2] for path in outputs if path.exists()}
    root, device = plan.root.resolve(), existing(options.output).stat().st_dev
    for path, (where, number, names, *_) in stamps.items():
        if names > 1 or path.resolve() != root / path.relative_to(plan.root):
            doubts.append(f"{path} is a link or has a second name, so that others may need it")
        elif not os.access(path, os.W_OK):
            doubts.append(f"{path} is not writable")
        elif where != device:
            doubts.append(f"{path} and {options.output} are on different file systems")
        elif (where, number) in made:
            doubts.append(f"{path} is reached through a link in {options.output}, too")
        elif not known.issuperset(read_header(path)[1]):  # Read again, now that it has a stamp.
            doubts.append(f"{path} has changed since it was planned, or has a tensor that the "
                          "index finds in another file")
    if doubts:
        raise CheckpointError(f"--delete-source: {doubts[0]}; nothing has been emptied by this run")
    return stamps


def prove(shard: Shard, out: Path, pool: list[Worker]) -> None:
    """Raise CheckpointError unless an output shard reads back from the disk as the input gives it.

    Tensors whose input has been emptied were proven before that. The others are compared even if
    they were, too: another output with the same headers may have taken this one's place. Workers
    that read directly see what is on the disk; others do once the page cache has dropped the file.
    """
    path = out / shard.name
    for source in {source for step in shard.steps if step.emptied for source in step.sources}:
        if not source.emptied and source.path.stat().st_mtime > path.stat().st_mtime:
            raise CheckpointError(f"{source.path}: is newer than {path}, which cannot be proven "
                                  f"while {shard.emptied[0]} is emptied; download that again, too")
    for place in (path, *path.parents[: len(Path(shard.name).parents) + 1]):
        if os.access(place, os.R_OK):  # The folder that holds the output may not be readable.
            sync(place)
    if hasattr(os, "posix_fadvise"):
        with open_raw(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    check_loadable(path)
    differs = not holds(shard, path)
    if not differs:
        there = {tensor.name: tensor for tensor in read_header(path)[1]}
        differs = compare_values([(shard, step, there[step.output.name]) for step in shard.steps
                                  if not step.emptied], out, pool, False)
    if differs:
        remedy = "Delete it and run the same command again"
        if shard.emptied:
            remedy = f"Keep it until {shard.emptied[0]}, which is emptied, is downloaded again"
        raise CheckpointError(f"{path}: does not read back as what the input gives; its input has "
                              f"been left as it is. {remedy}")
    for name in itertools.chain(*count_nonfinite(pool).values()):
        raise CheckpointError(f"{path}: {name} has NaN or infinite values, so its input has been "
                              "left as it is; go on without --delete-source if they are right")


def empty(path: Path, before: tuple[int, ...]) -> None:
    """Truncate an input shard to its header, which a later run needs to plan again."""
    with naming(path), open_raw(path, "r+b") as file:
        if not stamp(path.lstat()) == stamp(os.fstat(file.fileno())) == before:
            raise CheckpointError(f"{path}: has been changed since the run began; it is left as it "
                                  "is")
        header = read_bytes(path, 0, header_size(path))
        file.truncate(len(header))
        # btrfs keeps the whole of an extent, up to 128 MiB, while its first page is in use.
        file.write(header)
        os.fsync(file.fileno())


def protect(path: Path) -> None:
    """Make a shard read-only: a run with another input must not replace the only copy of this."""
    with suppress(OSError):  # Some file systems have no such mode.
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def await_space(path: Path, out: Path, wanted: int) -> None:
    """Return once so many bytes are free. Raises CheckpointError if they never are."""
    began = time.monotonic()
    while shutil.disk_usage(out).free < wanted:
        if time.monotonic() - began > PATIENCE:
            raise CheckpointError(f"{path}: emptying it has not freed its space (a snapshot may "
                                  "hold it, or a copy that shares its blocks); no more shards will "
                                  "be emptied: go on without --delete-source")
        time.sleep(POLL)


def write_and_empty(order: list[tuple[Shard, list[Path]]], done: set[str], pool: list[Worker],
                    stamps: dict[Path, tuple[int, ...]], record: Report) -> None:
    """Write shards one by one, and empty each input shard once all that it gives is proven.

    Raises CheckpointError if emptying does not free space.
    """
    out, watched = record.options.output, False
    provers = [Worker(direct=direct_flag(out)) for _ in pool]
    for number, (shard, paths) in enumerate(order, 1):
        if shard.name not in done:
            write_shards([shard], out, pool, False)
        prove(shard, out, provers)
        protect(out / shard.name)
        for path in paths:
            size, free = data_on_disk(path), shutil.disk_usage(out).free
            empty(path, stamps[path])
            record.emptied_shards.append(path.relative_to(record.options.input).as_posix())
            say(f"Emptied {record.emptied_shards[-1]} ({sized(size)}); {number} of "
                f"{counted(len(order), 'output shard')} proven")
            if size >= WATCHED and not watched:
                await_space(path, out, free + size // 2)
                watched = True


# --- command line ---

MESSAGE_LIMIT = 2000  # Characters: a tensor's name may be as long as a book.
LINES_LIMIT = 12  # Differences that are printed.


def formats_table() -> str:
    """Return the table of formats as --help and the README show it.

    X is the weight's name, N a number; what stands before them is the module's.
    """

    def shown(names: str) -> str:
        names = names.replace("{}", "X").replace("*", "N").split()
        return " or ".join(f"`{name}`" for name in dict.fromkeys(names))

    lines = [("format", "weight", "scales", "under quant_method"), ("---",) * 4]
    for row in [*FORMATS, PLAIN_CAST]:
        methods = "any" if row.containers <= F8 else ", ".join(sorted(row.methods)) or "none"
        methods = " ".join(row.requires) if row.requires else methods
        lines.append((row.title, f"{'/'.join(sorted(row.containers))} {shown(row.weight)}",
                      ", ".join(filter(None, map(shown, (row.scale, row.global_scale)))), methods))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("F8_E4M3/F8_E5M2", "F8")


def pick_device(name: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return the device that an argument names, and why it is that one. Raises UsageError.

    Ranks on one machine share out its GPUs, unless the argument has a number.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return torch.device("cpu"), "as asked"
    if name == "auto" and not count:
        return torch.device("cpu"), "torch sees no CUDA device"
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
            return torch.device("cpu"), f"the CUDA device does not work: {problem}"
        raise UsageError(f"--device {name}: {problem}; use --device cpu") from error
    return device, torch.cuda.get_device_name(device)


@dataclass(frozen=True)
class Options:
    """What a run is asked to do. Raises UsageError for invalid options.

    device: "auto", "cpu", "cuda" or "cuda:N". workers: threads; by default two per core, 4 to 16.
    missing_scale: "keep", "cast" or "error", as in make_plan. dry_run: only print what would be
    done. verify: only compare an existing output with what it should be. delete_source: empty each
    input shard once its output is verified. report: a file for a JSON record of the run. ranks:
    which of several processes this is, each of which makes some shards.
    """

    input: Path
    output: Path
    device: str = "auto"
    workers: int | None = None
    missing_scale: str = "keep"
    dry_run: bool = False
    verify: bool = False
    delete_source: bool = False
    report: Path | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,4})?", str(self.device)):
            raise UsageError(f"--device {self.device}: expected auto, cpu, cuda or cuda:N")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers}: expected a positive number")
        if self.missing_scale not in MISSING_SCALE:
            raise UsageError(f"--missing-scale {self.missing_scale}: expected "
                             f"{', '.join(MISSING_SCALE)}")
        if self.dry_run and self.verify:
            raise UsageError("--dry-run and --verify: expected one of them")
        if self.delete_source and (self.verify or self.ranks.count > 1):
            raise UsageError("--delete-source: not with --verify, and not under torchrun")
        for inner, outer in ((self.input, self.output), (self.output, self.input)):
            for folder in (inner.resolve(), *inner.resolve().parents):
                if folder == outer.resolve() or (
                        folder.exists() and outer.exists() and folder.samefile(outer)):
                    raise UsageError(f"{self.output}: the output must not lie in the input, nor "
                                     "the input in the output")
        if self.report is not None:
            folder = self.report.resolve().parent
            if self.report.is_dir() or not (
                    self.report.exists() or os.access(folder, os.W_OK | os.X_OK)):
                raise UsageError(f"--report {self.report}: cannot be written there")
            if any(folder.is_relative_to(place.resolve()) for place in (self.input, self.output)):
                raise UsageError(f"--report {self.report}: give a path outside of input and output")


def find_apart_experts(plan: Plan) -> str | None:
    """Return a weight of a single expert, if the architecture's own checkpoints stack them."""
    for part in plan.parts:
        kinds = {str(value) for key, value in walk(part.checkpoint.files.get(CONFIG_NAME))
                 if key == "model_type"}
        if kinds & {"mixtral", "gpt_oss", "llama4", "llama4_text"}:
            other = r"(?!w[123]\b).*\.weight" if "mixtral" in kinds else ".*"
            for step in (step for shard in part.shards for step in shard.steps):
                if re.fullmatch(rf".*experts\.\d+\.{other}", step.output.name, re.DOTALL):
                    return step.output.name
    return None


@functools.cache
def versions() -> dict[str, str]:
    found = {"fp8_cast_bf16": VERSION, "python": platform.python_version(),
             "torch": torch.__version__}
    for package in ("safetensors", "tqdm", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@dataclass
class Report:
    """All that a run has found and done; --report writes it as JSON.

    status: planned, complete (nothing was to do), converted, verified, or different.
    """

    options: Options
    input: dict[str, int]
    output: dict[str, int]
    dequantized: dict[str, int]
    copied: int
    dropped: dict[str, int]
    dropped_scales_of_no_weight: list[str]
    kept_in_fp8: dict[str, str]
    cast_with_scale_1: list[str]
    files_left_out: list[str]
    experts_apart: str | None
    implausible: list[str]
    warnings: list[str]
    status: str = "planned"
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    versions: dict[str, str] = field(default_factory=versions)
    shards_already_there: list[str] = field(default_factory=list)
    bytes_written: int = 0
    emptied_shards: list[str] = field(default_factory=list)
    NaN: dict[str, int] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)
    differences: list[str] | None = None
    not_compared: int = 0
    damaged_shards: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def tell_plan(report: Report) -> None:
    """Print the plan and its warnings."""
    for title, numbers in (("Input", report.input), ("Output", report.output)):
        shards, tensors = (counted(numbers[f"{noun}s"], noun) for noun in ("shard", "tensor"))
        say(f"{title}: {shards}, {tensors}, {sized(numbers['bytes'])}")
    for kind, count in report.dequantized.items():
        say(f"  {counted(count, 'weight')} to dequantize: {kind}")
    if not report.dequantized and not report.kept_in_fp8:
        say("No quantized weights: this is a plain copy")
    say(f"  {counted(report.copied, 'tensor')} to copy")
    if report.dropped:
        kinds = (f"{count:,} {leaf}" for leaf, count in report.dropped.items())
        say(f"Dropped: {', '.join(kinds)}")
    for name in report.kept_in_fp8:
        say(f"Warning: Missing scale_inv tensor for {name}, skipping conversion", sys.stderr)
    if report.files_left_out:
        say(f"Not copied: {', '.join(report.files_left_out)}")
    if report.experts_apart:
        say(f"Experts are stored one by one ({report.experts_apart}), while models of this "
            "architecture have them in one tensor: loaders may not find them")
    for line in report.warnings + report.implausible:
        say(f"Warning: {line}", sys.stderr)


def report_plan(plan: Plan, side: SideFiles, options: Options) -> Report:
    """Say what will be done, and return the record of it."""
    steps = [*plan.steps]
    tensors = [tensor for part in plan.parts for tensor in part.checkpoint.tensors.values()]
    kinds = Counter(kind_of(step) for step in steps if step.quantization)
    dropped = Counter(tensor.leaf for part in plan.parts
                      for tensor in part.reading.dropped.values())
    kept, cast = (plan.missing if options.missing_scale == policy else []
                  for policy in ("keep", "cast"))
    warnings = [f"{part.checkpoint.root}: has no {CONFIG_NAME}, so nothing can load the output"
                 for part in plan.parts if not {CONFIG_NAME, PARAMS_NAME} & {*part.checkpoint.files}
                 and any(Path(shard.name).name.startswith("model") for shard in part.shards)]
    unfinished = [*(plan.root / ".cache/huggingface/download").rglob("*.incomplete")][:1]
    warnings += [f"{plan.root}: a download is not finished, as {mark} tells" for mark in unfinished]
    report = Report(
        options,
        {"shards": sum(len(part.checkpoint.shards) for part in plan.parts),
         "tensors": len(tensors), "bytes": sum(tensor.size for tensor in tensors)},
        {"shards": len(plan.shards), "tensors": len(steps),
         "bytes": sum(shard.size for shard in plan.shards)},
        dict(kinds.most_common()), len(steps) - kinds.total(),
        dict(dropped.most_common()),
        [tensor.name for part in plan.parts for tensor in part.reading.orphans],
        dict.fromkeys(kept, "no scale"), cast, side.left_out,
        find_apart_experts(plan), find_implausible(steps), warnings)
    if options.ranks.rank == 0:
        tell_plan(report)
    return report


def tell_state(state: OutputState, plan: Plan, options: Options, record: Report) -> None:
    """Print what is there and what there is room for. Raises CheckpointError if too little."""
    out = options.output
    record.shards_already_there = sorted(state.done)
    record.status = "complete" if state.complete else "planned"
    if state.done:
        say(f"Already there: {len(state.done)} of {counted(len(plan.shards), 'shard')}")
    if state.replaced:
        say("To be replaced (made from another input, or read differently): "
            f"{', '.join(state.replaced)}")
    newer = {path.name for shard in plan.shards if shard.name in state.done
             for path in {t.path for step in shard.steps for t in step.sources if not t.emptied}
             if path.stat().st_mtime_ns > (out / shard.name).stat().st_mtime_ns}
    if newer:
        say(f"Input files newer than their output: {', '.join(sorted(newer))}; run --verify to be "
            "sure")
    free = "an unknown number of bytes" if state.free is None else sized(state.free)
    needed, at_once = state.needed, ""
    if options.delete_source:
        needed = peak_space(emptying_order(plan, state.done), state)
        at_once = f", at most {sized(needed)} more than now at any time"
    say(f"Space: {sized(state.needed)} to write{at_once}, {free} free; memory: "
        f"{counted(options.workers, 'worker')}, at most {sized(2 * WINDOW)} each")
    if state.free is not None and needed > state.free:
        raise CheckpointError(f"{out}: not enough space: {sized(needed - state.free)} short; free "
                              "some or give another output")
    if state.free is None and options.delete_source:
        raise CheckpointError(f"--delete-source: {out} does not say how much space is free")


def prepare(plan: Plan, side: SideFiles, options: Options, record: Report,
            stack: ExitStack, emptying: bool) -> set[str]:
    """Look at the output, say what is there, lock it, and remove what must go.

    Returns the names of the shards that are done. stack: holds the lock. emptying: there is work
    even if the output is complete.
    """
    out, several = options.output, options.ranks.count > 1
    if several and not options.dry_run:
        (out / RANKS_NAME).unlink(missing_ok=True)  # of a job that was killed
    state = inspect_output(plan, out, side, options.workers)
    tell_state(state, plan, options, record)
    if options.dry_run or (record.status == "complete" and not several and not emptying):
        return state.done
    for name in [*side.texts, *(shard.name for shard in plan.shards)]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    lock(out, stack)
    for path in [*(out / name for name in side.texts), *state.stale]:
        # Another rank may be writing a temporary file.
        if record.status != "complete" and not (several and path.suffix == TEMPORARY_SUFFIX):
            path.unlink(missing_ok=True)
    sync(out)
    if several:
        write_whole(out / RANKS_NAME, digest_of(plan))
    return state.done


def make_output(plan: Plan, side: SideFiles, options: Options, record: Report) -> None:
    """Make the output of a plan, or what is missing of it.

    Rank 0 looks after the folder: what is there, what must go, and what completes it. The others
    start when it has left their plan's digest there, and replace nothing but their own shards.
    """
    out, ranks = options.output, options.ranks
    mine, pool = shards_of_rank(plan.shards, ranks.rank, ranks.count), []
    stamps = check_source(plan, options, record) if options.delete_source else {}
    with ExitStack() as stack:
        for folder in sorted({path.parent for path in stamps} - {plan.root}):
            if not options.dry_run:
                lock(folder, stack, must=True)
        if ranks.rank == 0:
            done = prepare(plan, side, options, record, stack, bool(stamps))
        else:
            there = [shard for shard in mine if os.path.lexists(out / shard.name)]
            done = find_done(there, out, options.workers)
            if len(done) < len(mine) and not options.dry_run:
                await_plan(out, digest_of(plan), ranks.rank)
        if options.dry_run or (record.status == "complete" and ranks.count == 1 and not stamps):
            return
        todo = [shard for shard in mine if shard.name not in done]
        if todo or stamps:
            pool = [Worker(options.device, WINDOW) for _ in range(options.workers)]
        if options.delete_source:
            write_and_empty(emptying_order(plan, done), done, pool, stamps, record)
        elif todo:
            write_shards(todo, out, pool, ranks.rank > 0)
        if ranks.rank == 0:
            await_shards([shard for shard in plan.shards if shard not in mine], out)
            for path in find_temporary(out, plan.shards):
                path.unlink(missing_ok=True)
            if record.status != "complete":
                publish(plan.root, out, side)
            (out / RANKS_NAME).unlink(missing_ok=True)
    record.bytes_written = sum(shard.size for shard in todo)
    record.status = "converted" if record.status == "planned" else record.status
    record.seconds = dict(sum((worker.seconds for worker in pool), Counter()))
    record.NaN, record.infinite = map(count_nonfinite(pool).get, NONFINITE)


def tell_converted(record: Report, ranks: Ranks) -> None:
    """Say what was done; the last lines sum it up."""
    for kind in NONFINITE:
        if found := getattr(record, kind):
            say(f"{counted(sum(found.values()), kind + ' value')}, in {', '.join(found)}")
    if ranks.rank > 0:
        return
    for fate, names in (("kept in FP8", record.kept_in_fp8),
                        ("cast with scale 1", record.cast_with_scale_1)):
        if names:
            say(f"FP8 weights without a scale, {fate}: {len(names)}")
            for name in names:
                say(f"  {name}")
    if record.dropped_scales_of_no_weight:
        say(f"Dropped scales of no weight: {', '.join(record.dropped_scales_of_no_weight)}")
    out, seconds, there = record.output, Counter(record.seconds), len(record.shards_already_there)
    if record.status == "complete":
        say("Nothing to do: the output is complete")
    else:
        seconds["writing"] += seconds["syncing"]
        already = f" ({there} {'was' if there == 1 else 'were'} there already)" if there else ""
        limit = max(PHASES[:3], key=lambda phase: seconds[phase])
        say(f"Converted {counted(out['shards'], 'shard')}{already}, "
            f"{counted(out['tensors'], 'tensor')}: {sum(record.dequantized.values()):,} "
            f"dequantized, {record.copied:,} copied, {sum(record.dropped.values()):,} dropped; "
            f"{sized(record.bytes_written)} written in {seconds['total']:.1f} s, "
            f"{record.bytes_written / seconds['total'] / 1e9:.2f} GB/s"
            + f", limited by {limit}" * (record.bytes_written > 0))
    if names := record.kept_in_fp8:
        say(f"{counted(len(names), 'weight')} {'is' if len(names) == 1 else 'are'} still FP8: the "
            "output will not load correctly; see --missing-scale")
    if record.options.delete_source:
        say(f"{record.options.input} now holds headers and side files only")


def tell_verified(record: Report, options: Options) -> None:
    """Say how an output differs. Raises CheckpointError if it does."""
    lines = record.differences
    for line in lines[:LINES_LIMIT]:
        say(line)
    if len(lines) > LINES_LIMIT:
        say(f"... and {len(lines) - LINES_LIMIT:,} more; --report FILE has them all")
    if lines:
        remedy = "run the same command without --verify"
        if record.damaged_shards:
            remedy = f"delete {', '.join(record.damaged_shards)} and {remedy}"
        elif record.not_compared:
            remedy = "keep it, and download the emptied input shards again"
        raise CheckpointError(f"{options.output}: differs from what the input gives in "
                              f"{counted(len(lines), 'place')}; {remedy}")
    size, seconds = record.input["bytes"] + record.output["bytes"], record.seconds["total"]
    count = record.output["tensors"]
    if record.not_compared:
        say(f"Verified {count - record.not_compared:,} of {counted(count, 'tensor')}: no "
            "differences; the input of the others has been emptied")
    elif options.ranks.rank == 0:
        say(f"Verified {counted(count, 'tensor')}: no differences; {sized(size)} read, "
            f"{seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")


def make_options(fp8_path, bf16_path, report=None, **options) -> Options:
    """Return options; the paths may be given as strings."""
    if not (fp8_path and bf16_path):
        raise UsageError("the path of the input or of the output is empty")
    paths = [Path(path).expanduser() if path else None for path in (fp8_path, bf16_path, report)]
    return Options(*paths[:2], report=paths[2], **options)


def report_path(options: Options) -> Path:
    path, rank = options.report.resolve(), options.ranks.rank
    return path.with_stem(f"{path.stem}.rank{rank}") if rank else path


def open_report(options: Options):
    """Open a report that is no regular file, such as a pipe, which must not be replaced by one.

    A regular file is removed, so that no earlier report remains if this run fails.
    """
    path = options.report
    standard = {"/dev/stdout": "/dev/fd/1", "/dev/stderr": "/dev/fd/2"}.get(str(path), str(path))
    if found := re.fullmatch(r"/dev/fd/(\d{1,6})", standard):
        return open(os.dup(int(found[1])), "w")
    if path and path.exists() and not path.is_file():
        return open(path, "w")
    if path:
        report_path(options).unlink(missing_ok=True)
    return None


def write_report(record: Report, file) -> None:
    """Write a record into the file that open_report has opened, or into one of its own."""
    text = json.dumps(asdict(record), indent=2, default=str) + "\n"
    if file:
        with file:
            file.write(text)
    elif record.options.report:
        write_whole(report_path(record.options), text)


def default_workers(ranks: Ranks) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(4, 2 * (cores or 1) // ranks.local_count))


def resolved(options: Options) -> Options:
    """Return options with the device and the number of workers that will be used, and say them."""
    ranks, workers = options.ranks, options.workers or default_workers(options.ranks)
    device, why = pick_device(options.device, ranks.local_rank)
    if options.delete_source:
        say("Input shards will be emptied as their output is verified")
    if ranks.rank == 0:
        where = "Verifying on the CPU" if options.verify else f"Device: {device} ({why})"
        several = f", {ranks.count} ranks" if ranks.count > 1 else ""
        say(f"{where}, {counted(workers, 'worker')}{several}")
    return replace(options, device=str(device), workers=workers)


def convert(fp8_path: str | Path, bf16_path: str | Path, *, report: str | Path | None = None,
            **options) -> None:
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another.

    The options are those of the command line; see Options. Raises CheckpointError for what is wrong
    with the checkpoint or a verified output, OSError for the disk, UsageError for the arguments.
    Until all is there, the output holds no index and no config.
    """
    began = time.perf_counter()
    options = make_options(fp8_path, bf16_path, report, **options)
    file = open_report(options)
    options, ranks = resolved(options), options.ranks
    with torch.device("cpu"), ExitStack() as stack:  # whatever device the caller has set
        if options.delete_source and not options.dry_run and options.input.is_dir():
            lock(options.input, stack, must=True)
        plan = make_plan(options.input, options.missing_scale)
        side = find_side_files(plan)
        record = report_plan(plan, side, options)
        if options.verify:
            record.differences, record.damaged_shards = find_differences(
                plan, options.output, side, options.workers, ranks)
            record.status = "different" if record.differences else "verified"
            record.not_compared = sum(1 for step in plan.steps if step.emptied)
        else:
            make_output(plan, side, options, record)
    record.seconds["total"] = time.perf_counter() - began
    write_report(record, file)
    if options.verify:
        tell_verified(record, options)
    elif not options.dry_run:
        tell_converted(record, ranks)


def find_wanted(plan: Plan, names: Iterable[str] | Callable[[str], bool] | None
                ) -> list[tuple[Shard, Step]]:
    """Return the tensors of the root that are wanted, each with its shard, in their order there."""
    steps = {step.output.name: (shard, step) for part in plan.parts if part.folder == Path()
             for shard in part.shards for step in shard.steps}
    if not steps:
        folders = ", ".join(part.folder.as_posix() for part in plan.parts if part.shards)
        raise CheckpointError(f"{plan.root}: holds tensors in folders only; give one of them: "
                              f"{folders}")
    names = [names] if isinstance(names, str) else names
    wanted = {*steps} if names is None else {*(filter(names, steps) if callable(names) else names)}
    if unknown := sorted(wanted - steps.keys()):
        raise KeyError(f"{plan.root}: holds no tensor {unknown[0]}")
    chosen = [entry for name, entry in steps.items() if name in wanted]
    for shard, step in chosen:
        for path in step.emptied:
            raise CheckpointError(f"{path}: has been emptied by --delete-source; read "
                                  f"{step.output.name} from {shard.name} of its output")
    return chosen


def bf16_tensors(fp8_path: str | Path, device: str | torch.device = "cpu", *,
                 names: Iterable[str] | Callable[[str], bool] | None = None,
                 missing_scale: str = "error",
                 workers: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the checkpoint in a folder, with the names, dtypes, shapes and bytes
    that they would have after a conversion, in the order of the shards.

    device: where the tensors are placed; a CUDA device dequantizes, too. names: those that are
    wanted, or a function that tells whether one is. missing_scale: as in make_plan. workers:
    threads that read ahead, a window of 16 MiB each. Every tensor owns its memory, and none is kept
    here. A folder below holds another checkpoint: give that folder.

    Raises CheckpointError as the conversion does, before anything is read, or for an emptied shard;
    KeyError for a name that the checkpoint lacks; UsageError for CUDA that does not work.
    """
    # There is no output; this checks the other options.
    options = make_options(fp8_path, os.devnull, workers=workers, missing_scale=missing_scale)
    with torch.device("cpu"):  # whatever device the caller has set
        target = torch.device(device)
        if target.type == "cuda":
            current = torch.cuda.current_device() if torch.cuda.is_available() else 0
            target, _ = pick_device(str(target), current)
        chosen = find_wanted(make_plan(options.input, missing_scale), names)
        for line in find_implausible(step for _, step in chosen):
            warnings.warn(line, stacklevel=2)
        pool = [Worker(target, WINDOW) for _ in range(workers or default_workers(ALONE))]
    yield from read_ahead(chosen, pool, target)
    for kind, found in count_nonfinite(pool).items():
        if found:
            warnings.warn(f"{kind} values in {', '.join(found)}", stacklevel=2)


def main(fp8_path: str | Path, bf16_path: str | Path, **options) -> None:
    """Convert the FP8 checkpoint in one folder into a BF16 checkpoint in another."""
    convert(fp8_path, bf16_path, **options)


def message_of(error: Exception) -> str:
    """Return one line about an error, which names the file where there is one."""
    text = str(error) if isinstance(error, CheckpointError) else str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        text = f"out of memory{text and ': ' + text}; try --workers 1"
    if "start new thread" in text:
        text += "; try --workers 1"
    if len(text) > MESSAGE_LIMIT:
        text = f"{text[: MESSAGE_LIMIT // 2]} ... {text[-MESSAGE_LIMIT // 2 :]}"
    return text or type(error).__name__


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert an FP8 checkpoint into a BF16 one.", epilog=formats_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
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

    0: converted or verified; 1: impossible or different; 2: wrong usage; 128 + N: signal N came.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    ranks = find_ranks()
    try:
        make_options(**vars(options))
        if "torch" not in globals():
            if ranks.rank == 0:
                say(f"fp8_cast_bf16 {VERSION}")
            import_torch()
        convert(**vars(options), ranks=ranks)
    except UsageError as error:
        parser.error(printable(str(error)))
    except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
        say(f"error: {message_of(error)}", sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        what = "not everything was compared" if options.verify else "the output is not complete"
        if ranks.rank == 0:
            say(f"interrupted: {what}", sys.stderr)
        return 128 + (interrupt.args or [signal.SIGINT])[0]
    return 0


def end(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)
    os.write(2, b"stopping; the same command continues\n")  # print may be what was interrupted
    raise KeyboardInterrupt(number)


def open_streams() -> None:
    """Open the null device for closed standard streams, or shards would get their descriptors."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


if __name__ == "__main__":
    open_streams()
    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)
    gc.set_threshold(200_000)  # A plan is many objects, and while it grows none of them is garbage.
    sys.exit(cli())
