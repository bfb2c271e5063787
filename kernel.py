"""Turn the codes of a quantized weight and its scales into BF16 values, on a GPU or on the CPU.

    out[i, j] = bfloat16(float32(decode(codes[i, j])) * float32(scale of the block of i, j))

The product (or quotient) is rounded to float32 and then once to BF16, both to nearest even.
The bits of a NaN depend on the device until `canonicalize` has made them 0x7FC0.
"""

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # The CPU path works without Triton.
    triton = None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class NumberFormat:
    """What a code means: a sign, an exponent and a mantissa; without exponent bits, an integer.

    meaning: the torch dtype of a byte, or the values of the 16 codes, of which a byte holds two,
    the first in its low half. flip: XOR with it turns a byte into integers in two's complement.
    """

    exponent_bits: int
    mantissa_bits: int
    meaning: torch.dtype | tuple[float, ...]
    flip: int = 0

    @property
    def codes_per_byte(self) -> int:
        return 1 if isinstance(self.meaning, torch.dtype) else 2

    @functools.cached_property
    def pairs(self) -> torch.Tensor:
        """What two codes mean, the first in the lower bits: 65,536 or 256 times two float32."""
        if self.codes_per_byte == 1:
            values = torch.arange(256, dtype=torch.uint8, device="cpu").view(self.meaning).float()
        else:
            values = torch.tensor(self.meaning, dtype=torch.float32, device="cpu")
        pairs = torch.stack([values.repeat(len(values)), values.repeat_interleave(len(values))], 1)
        return pairs.view(torch.int64).view(-1)


# OCP 8-bit Floating Point Specification: E4M3 (the FN variant: 0x7F is NaN, there is no infinity),
# E5M2. OCP Microscaling Formats Specification: E2M1, E8M0.
FORMATS = {
    "E4M3": NumberFormat(4, 3, torch.float8_e4m3fn),
    "E5M2": NumberFormat(5, 2, torch.float8_e5m2),
    "E2M1": NumberFormat(2, 1, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
                                -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)),
    "INT8": NumberFormat(0, 7, torch.int8),
    "INT4": NumberFormat(0, 3, (*map(float, range(8)), *map(float, range(-8, 0)))),
    "UINT4B8": NumberFormat(0, 3, (*map(float, range(-8, 8)),), flip=0x88),
}


@dataclass(frozen=True)
class Grid:
    """Which scale belongs to which element of a (rows, cols) weight.

    The scales are a matrix of scale_shape with one entry per block of block_rows x block_cols
    elements; blocks at the right and bottom edge may be cut off. Blocks start anew every slab_rows
    rows: a slab is one expert of a stacked weight or one tensor-parallel slice of a fused one, and
    all rows otherwise.
    """

    rows: int
    cols: int
    block_rows: int
    block_cols: int
    slab_rows: int

    @property
    def scale_shape(self) -> tuple[int, int]:
        slabs = ceil_div(self.rows, self.slab_rows)
        per_slab = ceil_div(self.slab_rows, self.block_rows)
        return slabs * per_slab, ceil_div(self.cols, self.block_cols)

    def scale_row(self, row: int) -> int:
        slab, row = divmod(row, self.slab_rows)
        return slab * ceil_div(self.slab_rows, self.block_rows) + row // self.block_rows

    def scale_region(self, row: int, col: int, M: int, N: int) -> tuple[int, int, int, int]:
        """Return first row, row end, first column, column end of the scales of (M, N) elements."""
        return (self.scale_row(row), self.scale_row(row + M - 1) + 1,
                col // self.block_cols, (col + N - 1) // self.block_cols + 1)

    def pieces(self, start: int, stop: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut the elements [start, stop) of the weight into pieces of at most `limit` elements.

        A piece (row, col, M, N) is M whole rows or a part of one. It ends where a slab cuts off a
        block: inside a piece, a new block begins every block_rows rows.
        """
        while start < stop:
            row, col = divmod(start, self.cols)
            room = min(limit, stop - start)
            if self.slab_rows % self.block_rows:
                room = min(room, (self.slab_rows - row % self.slab_rows) * self.cols - col)
            whole = not col and room >= self.cols
            M, N = (room // self.cols, self.cols) if whole else (1, min(self.cols - col, room))
            yield row, col, M, N
            start += M * N


SCRATCH = threading.local()


def _scratch(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory that later calls in this thread reuse: new pages take longer than the work."""
    memory = vars(SCRATCH).get(name)
    if memory is None or len(memory) < size:
        memory = vars(SCRATCH)[name] = torch.empty(size, dtype=dtype, device="cpu")
    return memory[:size]


def _decode_cpu(codes: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return what (M, bytes) codes mean, as (M, codes) float32 in scratch memory.

    There are few torch calls, here and below: each releases Python's lock, and with many cores the
    threads queue to get it back.
    """
    count = codes.numel() * fmt.codes_per_byte
    index = _scratch("index", ceil_div(count, 2), torch.int32)
    if fmt.codes_per_byte == 1:  # The copy is aligned and ends with a whole pair.
        aligned = _scratch("codes", 2 * len(index), torch.uint8)
        aligned[:count] = codes.view(-1)
        index.copy_(aligned.view(torch.uint16))
    else:
        index.copy_(codes.view(-1))
    values = _scratch("values", 2 * len(index), torch.float32)
    torch.index_select(fmt.pairs, 0, index, out=values.view(torch.int64))
    return values[:count].view(len(codes), -1)


def _dequantize_cpu(codes, scales, out, fmt, grid, row, col, divide) -> None:
    (M, N), width = out.shape, grid.block_cols
    values = _decode_cpu(codes, fmt)[:, col % fmt.codes_per_byte :][:, :N]
    if 1 < len(scales) < M:  # Give each row its row of scales.
        above = row % grid.slab_rows % grid.block_rows
        scales = scales[torch.arange(above, above + M, device="cpu") // grid.block_rows]
    apply = torch.Tensor.div_ if divide else torch.Tensor.mul_
    if scales.shape[1] > 1 and (left := col % width):  # A part of a row begins inside a block.
        apply(values, scales[:, torch.arange(left, left + N, device="cpu") // width])
    else:
        count = N // width  # Whole blocks; one that is cut off may follow.
        apply(values[:, : count * width].unflatten(1, (count, width)), scales[:, :count, None])
        apply(values[:, count * width :], scales[:, count:])
    out.copy_(values)


if triton:
    # Do not specialize on a piece's position, or Triton compiles a variant for each.
    @triton.jit(do_not_specialize=["M", "row", "stride_scales"])
    def weight_dequant_kernel(
        codes_ptr, scales_ptr, out_ptr, M, N, row, col, stride_codes, stride_scales,
        block_rows, block_cols, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr,
        MANTISSA_BITS: tl.constexpr, FLIP: tl.constexpr, DIVIDE: tl.constexpr,
        BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, VECTOR: tl.constexpr,
    ):
        """out[i, j] = bfloat16(decode(codes[i, j]) * scale of the block of (row + i, col + j))

        codes: (M, stride_codes) uint8, of BITS bits each; scales: float32; out: (M, N) bfloat16.
        Element (0, 0) is at (row, col) of its block. A program computes a tile of BLOCK_SIZE_M rows
        and BLOCK_SIZE_N columns, whose columns lie in one block. A thread loads and stores VECTOR
        neighbors; if it loaded more, they would pass through shared memory before the store.
        """
        pid, tiles_n = tl.program_id(0), tl.cdiv(col % BLOCK_SIZE_N + N, BLOCK_SIZE_N)
        offs_m = pid // tiles_n * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
        first = (col // BLOCK_SIZE_N + pid % tiles_n) * BLOCK_SIZE_N
        offs_n = tl.max_contiguous(first - col + tl.arange(0, BLOCK_SIZE_N), VECTOR)
        mask_m = offs_m < M
        mask = mask_m[:, None] & ((offs_n >= 0) & (offs_n < N))[None, :]

        offs_s = (row + offs_m) // block_rows * stride_scales + first // block_cols
        scale = tl.load(scales_ptr + offs_s, mask=mask_m, other=0.0)[:, None]
        if BITS == 8:
            offs_c = offs_m[:, None] * stride_codes + offs_n[None, :]
            code = tl.load(codes_ptr + offs_c, mask=mask, other=0)
        else:  # Two codes a byte; each is moved to the upper half of a byte of its own.
            offs_b = first // 2 - col // 2 + tl.arange(0, BLOCK_SIZE_N // 2)
            offs_b = tl.max_contiguous(offs_b, VECTOR // 2)
            mask_b = mask_m[:, None] & ((offs_b >= 0) & (offs_b < stride_codes))[None, :]
            offs_b = offs_m[:, None] * stride_codes + offs_b[None, :]
            pair = tl.load(codes_ptr + offs_b, mask=mask_b, other=0) ^ FLIP
            code = tl.interleave(pair << 4, pair)

        code = code.to(tl.int8, bitcast=True) >> (8 - BITS)  # This copies the sign downwards.
        if EXPONENT_BITS == 0:
            value = code.to(tl.float32)
        else:  # The bits, moved into the fields of a float16, are too small by a power of two.
            half = code.to(tl.int16) << (10 - MANTISSA_BITS)
            half &= (1 << (10 + EXPONENT_BITS)) - 0x8001  # Clears all copies of the sign but one.
            half = half.to(tl.int16).to(tl.float16, bitcast=True)
            value = half.to(tl.float32) * (1 << (16 - (1 << (EXPONENT_BITS - 1))))
        if EXPONENT_BITS == 4:  # E4M3: the largest code of either sign is NaN.
            value = tl.where(tl.abs(value) > 448, float("nan"), value)
        # Triton 3.3's div_rn flushes subnormals. A float64 quotient rounds to the same float32.
        value = (value.to(tl.float64) / scale).to(tl.float32) if DIVIDE else value * scale
        tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], value.to(tl.bfloat16), mask=mask)


LAUNCH = threading.Lock()  # The first thread compiles the kernel; the others then find it.


def _dequantize_triton(codes, scales, out, fmt, grid, row, col, divide) -> None:
    M, N = out.shape
    assert max(out.numel(), codes.numel()) < 1 << 31, "the Triton kernel counts in int32"
    whole = grid.block_cols >= grid.cols  # One block spans all columns and has no inner edge.
    assert whole or not grid.block_cols % fmt.codes_per_byte, "the codes of a byte share a scale"
    # A tile is as wide as the largest power of two that divides the block, so it lies inside one.
    block_size_n = 128 if whole else min(128, grid.block_cols & -grid.block_cols)
    block_size_m = 4096 // block_size_n
    row, col = row % grid.slab_rows % grid.block_rows, col % grid.block_cols
    tiles = ceil_div(M, block_size_m) * ceil_div(col % block_size_n + N, block_size_n)
    with LAUNCH, torch.cuda.device_of(out):
        weight_dequant_kernel[(tiles,)](
            codes, scales, out, M, N, row, col, codes.shape[1], scales.shape[1],
            grid.block_rows, grid.block_cols, BITS=8 // fmt.codes_per_byte,
            EXPONENT_BITS=fmt.exponent_bits, MANTISSA_BITS=fmt.mantissa_bits, FLIP=fmt.flip,
            DIVIDE=divide, BLOCK_SIZE_M=block_size_m, BLOCK_SIZE_N=block_size_n,
            VECTOR=min(8, block_size_n), enable_fp_fusion=False)


# Elements of a piece. A thread keeps 7 bytes of scratch for each on the CPU; Triton uses int32.
MAX_PIECE = {"cpu": 1 << 20, "cuda": 1 << 30}


@torch.inference_mode()
def dequantize(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, number_format: str,
               grid: Grid, row: int = 0, col: int = 0, divide: bool = False) -> None:
    """Dequantize a piece of a weight, one of those that grid.pieces names.

    out: (M, N) bfloat16, contiguous, filled with the elements from (row, col) on of the weight that
    `grid` describes. Its device does the work; codes and scales are copied there. A GPU does so on
    its current stream, which the caller waits for before it changes codes or scales.
    codes: (M, at least ceil(N / codes per byte)) uint8; a row begins with the byte of column `col`.
    scales: float32, the matrix of the piece's scales, which grid.scale_region names.
    number_format: a key of FORMATS. divide: by the scales, instead of multiplying.
    """
    if not out.numel():
        return
    if out.is_cuda and not triton:
        raise ImportError("no module named triton, which a GPU needs; install it")
    inside = row % grid.slab_rows + len(out) <= grid.slab_rows
    assert inside or not grid.slab_rows % grid.block_rows, "a piece goes on behind a cut-off block"
    assert out.is_contiguous(), "the rows of out are not adjacent"
    codes, scales = (t.to(out.device, non_blocking=True).contiguous() for t in (codes, scales))
    path = _dequantize_triton if out.is_cuda else _dequantize_cpu
    path(codes, scales, out, FORMATS[number_format], grid, row, col, divide)


@torch.inference_mode()
def canonicalize(values: torch.Tensor) -> bool:
    """Make every NaN among BF16 values 0x7FC0. Return whether any value is NaN or infinite."""
    if values.sum().isfinite():  # One that is not would spoil the sum, which costs a single pass.
        return False
    values.view(torch.int16)[values.isnan()] = 0x7FC0
    return not values.isfinite().all()


FORMAT_OF_DTYPE = {torch.float8_e4m3fn: "E4M3", torch.float8_e5m2: "E5M2", torch.uint8: "E4M3",
                   torch.int8: "INT8"}


def weight_dequant(
    x: torch.Tensor, s: torch.Tensor, block_size: int | tuple[int, int] = 128
) -> torch.Tensor:
    """Dequantize a weight with one scale per block, on the device where its tensors are.

    x: (M, N) codes, contiguous; float8_e4m3fn, float8_e5m2, uint8 (E4M3 codes) or int8 (integers).
    s: (ceil(M / block rows), ceil(N / block columns)) scales of any floating dtype.
    block_size: rows and columns of a block; one number for a square block.

    Returns (M, N) bfloat16, every NaN 0x7FC0. Raises ValueError for tensors that do not fit.
    """
    block = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if x.dtype not in FORMAT_OF_DTYPE:
        raise ValueError(f"codes are {x.dtype}; expected one of {[*FORMAT_OF_DTYPE]}")
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"codes of shape {tuple(x.shape)} are not a contiguous matrix")
    if x.device != s.device or x.device.type not in MAX_PIECE:
        raise ValueError(f"codes are on {x.device}, scales on {s.device}; expected CPU or CUDA")
    grid = Grid(*x.shape, *block, slab_rows=max(1, x.shape[0]))
    if tuple(s.shape) != grid.scale_shape:
        raise ValueError(f"scales are {tuple(s.shape)}; blocks of {block} over codes "
                         f"{tuple(x.shape)} need {grid.scale_shape}")
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    codes, scales = x.view(torch.uint8), s.float()
    for row, col, M, N in grid.pieces(0, x.numel(), MAX_PIECE[x.device.type]):
        place = slice(row, row + M), slice(col, col + N)
        top, bottom, left, right = grid.scale_region(row, col, M, N)
        dequantize(codes[place], scales[top:bottom, left:right], out[place],
                   FORMAT_OF_DTYPE[x.dtype], grid, row, col)
        canonicalize(out[place])
    return out


SCALE_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.float8_e8m0fnu,
}


def widen_scales(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return scales as float32. raw: uint8, their bytes.

    dtype: F32, BF16 or F16; F8_E4M3; F8_E8M0 or U8, which is 2 ** (byte - 127), and NaN for 255.
    """
    return raw.view(SCALE_DTYPES[dtype]).float()
