"""Turn the codes of a quantized weight and its scales into BF16 values, on a GPU or on the CPU.

    out[i, j] = bfloat16(float32(decode(codes[i, j])) * float32(scale of the block of i, j))

The product is rounded to float32 and then once to BF16, both to nearest even, on either device.
Every NaN becomes 0x7FC0, so the bytes do not depend on where they were computed.

Both paths take the codes as plain bytes. The bits of a small float, moved into the fields of a
larger one, are a number that is too small by a constant power of two, exactly, even if subnormal;
that power is folded into the scale. So no FP8 type reaches Triton, which refuses them on GPUs older
than sm_89, nor torch's own float8 cast, which takes six times as long as the whole CPU path.
"""

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BF16_NAN = 0x7FC0
# Elements of a piece on the CPU; a thread keeps 8 bytes of scratch for each.
MAX_PIECE = 1 << 20
MAX_SCALE = 2.0**100  # On the CPU no product with a smaller scale overflows.
SCRATCH = threading.local()
NONE_COUNTED = torch.zeros(2, dtype=torch.int64)  # No NaN and no infinities.
LAUNCH = threading.Lock()  # One thread compiles the kernel; others find it compiled.


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class NumberFormat:
    """What the bits of a code mean: a sign, then an exponent and a mantissa.

    exponent_bits is 0 for integers, which are two's complement where offset is 0 and `offset` more
    than their value otherwise. nonfinite is the smallest magnitude (the code without its sign) that
    is not finite, or NEVER if all are. meaning: the torch dtype of a byte, or the values of the 16
    codes, of which a byte holds two, the first in its low half.
    """

    exponent_bits: int
    mantissa_bits: int
    nonfinite: int
    meaning: torch.dtype | tuple[float, ...]
    offset: int = 0

    @property
    def codes_per_byte(self) -> int:
        return 1 if isinstance(self.meaning, torch.dtype) else 2

    def too_small(self, exponent_bits: int) -> float:
        """Return by what factor a code's bits are too small in a float with these exponent bits."""
        return 2.0 ** (2 ** (exponent_bits - 1) - 2 ** (self.exponent_bits - 1))

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """What each byte means: (256, codes per byte) float32."""
        codes = torch.arange(256, dtype=torch.uint8)
        if self.codes_per_byte == 1:
            return codes.view(self.meaning).float()[:, None]
        meaning = torch.tensor(self.meaning, dtype=torch.float32)
        return meaning[torch.stack([codes & 15, codes >> 4], 1).int()]

    @functools.cached_property
    def constants(self) -> dict[str, int | float]:
        """What the Triton kernel, which decodes to float32 bits, has to know about a format."""
        bits = self.exponent_bits + self.mantissa_bits
        # A code is in the upper bits of its byte, which is sign-extended to int32.
        shift = 8 + 8 // self.codes_per_byte + 7 - self.mantissa_bits
        mask = ((1 << bits) - 1 << 23 - self.mantissa_bits) - (1 << 31)
        # A scale below LIMIT can be multiplied by RESCALE, or by any value, without overflow.
        largest = 2.0 ** (2 ** (self.exponent_bits - 1) + 1) if self.exponent_bits else 128.0
        rescale = self.too_small(8) if self.exponent_bits else 1.0
        limit = torch.tensor(2.0**127 / max(rescale, largest), dtype=torch.float32)
        return {"EXPONENT_BITS": self.exponent_bits, "CODES_PER_BYTE": self.codes_per_byte,
                "SHIFT": shift, "MASK": mask, "NONFINITE": self.nonfinite,
                "LIMIT": limit.view(torch.int32).item(), "RESCALE": rescale,
                "FLIP": self.offset * 0x11}  # Flipping the top bit subtracts 8.


NEVER = 0x80
# OCP 8-bit Floating Point Specification: E4M3 (the FN variant: 0x7F is NaN, there is no infinity),
# E5M2 (0x7C is infinity). OCP Microscaling Formats Specification: E2M1, E8M0.
FORMATS = {
    "E4M3": NumberFormat(4, 3, 0x7F, torch.float8_e4m3fn),
    "E5M2": NumberFormat(5, 2, 0x7C, torch.float8_e5m2),
    "E2M1": NumberFormat(2, 1, NEVER, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
                                       -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)),
    "INT8": NumberFormat(0, 7, NEVER, torch.int8),
    "INT4": NumberFormat(0, 3, NEVER, (*map(float, range(8)), *map(float, range(-8, 0)))),
    "UINT4B8": NumberFormat(0, 3, NEVER, (*map(float, range(-8, 8)),), offset=8),
}
FORMAT_OF_DTYPE = {torch.float8_e4m3fn: "E4M3", torch.float8_e5m2: "E5M2", torch.uint8: "E4M3",
                   torch.int8: "INT8"}
SCALE_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.float8_e8m0fnu,
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
        return slabs * self.scale_rows_per_slab, ceil_div(self.cols, self.block_cols)

    @property
    def scale_rows_per_slab(self) -> int:
        return ceil_div(self.slab_rows, self.block_rows)

    def scale_row(self, row: int) -> int:
        slab, row = divmod(row, self.slab_rows)
        return slab * self.scale_rows_per_slab + row // self.block_rows

    def scale_region(self, row: int, col: int, M: int, N: int) -> tuple[int, int, int, int]:
        """Return first row, row end, first column, column end of a piece's scales."""
        return (self.scale_row(row), self.scale_row(row + M - 1) + 1,
                col // self.block_cols, (col + N - 1) // self.block_cols + 1)


def pieces(start: int, stop: int, cols: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut the elements [start, stop) of a row-major matrix into pieces of at most `limit` elements.

    A piece (row, col, M, N) is M whole rows or a part of one.
    """
    while start < stop:
        row, col = divmod(start, cols)
        room = min(limit, stop - start)
        M, N = (1, min(cols - col, room)) if col or room < cols else (room // cols, cols)
        yield row, col, M, N
        start += M * N


def _scratch(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory that later calls in this thread reuse: the system takes longer to provide new
    pages than the arithmetic takes to fill them.
    """
    memory = vars(SCRATCH).get((name, dtype))
    if memory is None or len(memory) < size:
        memory = vars(SCRATCH)[name, dtype] = torch.empty(size, dtype=dtype)
    return memory[:size]


def _decode(codes: torch.Tensor, fmt: NumberFormat) -> tuple[torch.Tensor, float]:
    """Return (M, bytes) codes as (M, codes) float32 in scratch, and the factor they lack.

    Floats become float16 bits, which widen to float32 exactly and equally fast for all values. As
    float32 or BF16 bits, subnormal codes would be subnormal numbers, whose product with a scale
    takes an Intel core ten times as long. E4M3's NaN becomes a finite number. The two codes of a
    byte are looked up at once, as 8 bytes.

    Each torch call releases Python's lock, and with many cores the threads queue to get it back. So
    there are few calls.
    """
    M, size = len(codes), codes.numel()
    values = _scratch("values", size * fmt.codes_per_byte, torch.float32)
    if fmt.codes_per_byte == 2:
        index = _scratch("index", size, torch.int32).copy_(codes.view(-1))
        pairs = fmt.values.view(torch.int64).view(-1)
        torch.index_select(pairs, 0, index, out=values.view(torch.int64))
        return values.view(M, -1), 1.0
    if not fmt.exponent_bits:
        return values.copy_(codes.view(-1).view(torch.int8)).view(M, -1), 1.0
    # Widening int8 extends its sign to the top bit; * is faster than torch's <<.
    bits = _scratch("bits", size, torch.int16).copy_(codes.view(-1).view(torch.int8))
    bits *= 1 << 10 - fmt.mantissa_bits
    if fmt.exponent_bits < 5:
        bits &= -0x4001  # Clear a copy of the sign in bit 14, which is the exponent's.
    return values.copy_(bits.view(torch.float16)).view(M, -1), fmt.too_small(5)


def _largest_magnitude(codes: torch.Tensor) -> int:
    """Return the largest code without its sign bit, in two reductions that allocate nothing."""
    return max(codes.view(torch.int8).max().item(), codes.max().item() - 0x80)


def _apply_scales(values, scales, grid, row, col, operation) -> None:
    """Multiply or divide (M, N) float32 values in place by the scales of their blocks."""
    M, N = values.shape
    slab_row = row % grid.slab_rows
    if len(scales) in (1, M):
        pass
    elif slab_row + M <= grid.slab_rows:  # one row of scales for each row, within a slab
        above = slab_row % grid.block_rows
        scales = scales.repeat_interleave(grid.block_rows, 0)[above : above + M]
    else:
        rows = torch.arange(row, row + M)
        slabs = rows.div(grid.slab_rows, rounding_mode="floor")
        rows = (rows - slabs * grid.slab_rows).div_(grid.block_rows, rounding_mode="floor")
        rows += slabs * grid.scale_rows_per_slab
        scales = scales[rows - rows[0]]
    width = grid.block_cols
    if scales.shape[1] == 1:
        operation(values, scales)
        return
    first = min(-col % width, N)
    last = max(first, N - (col + N) % width)
    whole = scales[:, 1:] if first else scales
    count = (last - first) // width
    if first:
        operation(values[:, :first], scales[:, :1])
    if count:
        operation(values[:, first:last].unflatten(1, (count, width)), whole[:, :count, None])
    if last < N:
        operation(values[:, last:], scales[:, -1:])


def _dequantize_cpu(codes, scales, out, fmt, grid, row, col, divide) -> torch.Tensor:
    # NaN fails these comparisons. Scales may absorb the power of two only if all is finite.
    finite = not divide and all(abs(end.item()) < MAX_SCALE for end in scales.aminmax())
    finite = finite and (fmt.nonfinite == NEVER or _largest_magnitude(codes) < fmt.nonfinite)
    values, rescale = _decode(codes, fmt)
    if finite:
        scales = scales * rescale
    else:
        values *= rescale
        if fmt.nonfinite == 0x7F:
            values.masked_fill_((codes & 0x7F) == 0x7F, torch.nan)
    if values.shape != out.shape:
        skipped = col % fmt.codes_per_byte
        values = values[:, skipped : skipped + out.shape[1]]
    operation = torch.Tensor.div_ if divide else torch.Tensor.mul_
    _apply_scales(values, scales, grid, row, col, operation)
    out.copy_(values)
    if finite:
        return NONE_COUNTED
    out.view(torch.int16)[out.isnan()] = BF16_NAN
    return torch.stack([out.isnan().sum(), out.isinf().sum()])


@functools.cache
def weight_dequant_kernel():
    """Return the Triton kernel, which is nested so that the CPU path works without Triton."""
    global tl  # Triton looks names of the kernel's body up among globals.
    import triton
    import triton.language as tl

    # Do not specialize on a window's position, or Triton compiles a variant for each.
    anywhere = ["M", "row", "slab_rows", "scale_rows_per_slab", "first_scale_row", "block_rows"]

    @triton.jit(do_not_specialize=[*anywhere, "stride_scale"])
    def kernel(
        codes_ptr, scales_ptr, out_ptr, nonfinite_ptr,
        M, N, row, col, stride_codes, col_codes,
        slab_rows, scale_rows_per_slab, first_scale_row, block_rows, stride_scale,
        EXPONENT_BITS: tl.constexpr, CODES_PER_BYTE: tl.constexpr, SHIFT: tl.constexpr,
        MASK: tl.constexpr, RESCALE: tl.constexpr, NONFINITE: tl.constexpr, LIMIT: tl.constexpr,
        FLIP: tl.constexpr, STACKED: tl.constexpr, GROUPS_PER_BLOCK: tl.constexpr,
        BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_G: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
        VECTOR: tl.constexpr,
    ):
        """out[i, j] = bfloat16(decode(codes[i, j]) * scales[scale_row(i), (col + j) // block_cols])

        codes: (M, stride_codes) uint8, out: (M, N) bfloat16 as int16, both row-major: the piece at
        (row, col) of its slab of the weight, col_codes bytes into a row. scales: float32, the
        matrix from that piece's first scale on. nonfinite: the numbers of NaN and infinities in out
        are added to these two. Grid: one program per tile of BLOCK_SIZE_M rows and BLOCK_SIZE_G
        groups of BLOCK_SIZE_K columns, of which GROUPS_PER_BLOCK lie in one block and have one
        scale. VECTOR neighbors go to one thread, so that it stores 16 bytes at once.
        """
        offs_m = tl.program_id(0) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
        weight_row, block_rows = (row + offs_m).to(tl.uint32), block_rows.to(tl.uint32)
        scale_row = weight_row // block_rows - first_scale_row.to(tl.uint32)
        if STACKED:  # The rows are of more than one slab.
            slab = weight_row // slab_rows.to(tl.uint32)
            scale_row = (weight_row - slab * slab_rows) // block_rows + slab * scale_rows_per_slab
            scale_row -= first_scale_row

        first_group = col // BLOCK_SIZE_K
        group = first_group + tl.program_id(1) * BLOCK_SIZE_G + tl.arange(0, BLOCK_SIZE_G)
        scale_col = group // GROUPS_PER_BLOCK - first_group // GROUPS_PER_BLOCK
        offs_g = group * BLOCK_SIZE_K - col
        offs_n = offs_g[:, None] + tl.arange(0, BLOCK_SIZE_K)[None, :]

        mask_m = (offs_m < M)[:, None, None]
        mask = mask_m & ((offs_n >= 0) & (offs_n < N))[None, :, :]
        mask_s = mask_m & ((offs_g > -BLOCK_SIZE_K) & (offs_g < N))[None, :, None]
        offs = offs_m[:, None, None] * N + offs_n[None, :, :]
        offs = tl.max_contiguous(offs, (1, 1, VECTOR))
        offs_s = scale_row[:, None, None] * stride_scale + scale_col[None, :, None]
        scale = tl.load(scales_ptr + offs_s, mask=mask_s, other=0.0)
        if CODES_PER_BYTE == 1:
            offs_c = offs_m[:, None, None] * stride_codes + offs_n[None, :, :]
            offs_c = tl.max_contiguous(offs_c, (1, 1, VECTOR))
            code = tl.load(codes_ptr + offs_c, mask=mask, other=0)
        else:
            offs_b = (group * (BLOCK_SIZE_K // 2) - col_codes)[:, None]
            offs_b += tl.arange(0, BLOCK_SIZE_K // 2)[None, :]
            mask_b = mask_m & ((offs_b >= 0) & (offs_b < stride_codes))[None, :, :]
            offs_b = offs_m[:, None, None] * stride_codes + offs_b[None, :, :]
            offs_b = tl.max_contiguous(offs_b, (1, 1, VECTOR // 2))
            pair = tl.load(codes_ptr + offs_b, mask=mask_b, other=0) ^ FLIP
            code = tl.join(pair << 4, pair)
            code = tl.reshape(code, (BLOCK_SIZE_M, BLOCK_SIZE_G, BLOCK_SIZE_K))

        code = code.to(tl.int8, bitcast=True)
        if EXPONENT_BITS == 0:
            value = (code >> 8 - 8 // CODES_PER_BYTE).to(tl.float32)
        else:
            value = ((code.to(tl.int32) << SHIFT) & MASK).to(tl.float32, bitcast=True)

        rare = tl.max(scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= LIMIT
        if NONFINITE < 0x80:
            rare |= tl.max(tl.abs(value)).to(tl.int32, bitcast=True) >= NONFINITE << SHIFT
        if rare:  # There may be NaN or infinities; keep RESCALE out of the scales.
            if NONFINITE < 0x80:
                wide = value.to(tl.int32, bitcast=True)
                special = tl.where((wide & 0x7FFFFF) == 0, float("inf"), float("nan"))
                value *= tl.where((wide & 0x7FFFFFFF) < NONFINITE << SHIFT, 1.0, special)
            value = value * RESCALE * scale
            out = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
            out = tl.where(value == value, out, 0x7FC0).to(tl.int16)  # Hardware makes other NaN.
            tl.store(out_ptr + offs, out, mask=mask)
            magnitude = out & 0x7FFF
            count = tl.where(magnitude > 0x7F80, 1, tl.where(magnitude == 0x7F80, 0x10000, 0))
            count = tl.sum(tl.where(mask, count, 0))
            tl.atomic_add(nonfinite_ptr, count & 0xFFFF)
            tl.atomic_add(nonfinite_ptr + 1, count >> 16)
        else:
            out = (value * (scale * RESCALE)).to(tl.bfloat16).to(tl.int16, bitcast=True)
            tl.store(out_ptr + offs, out, mask=mask)

    return kernel


def _dequantize_triton(codes, scales, out, fmt, grid, row, col, divide) -> torch.Tensor:
    assert not divide, "the Triton kernel multiplies"
    assert max(out.numel(), codes.numel()) < 1 << 31, "the Triton kernel counts in int32"
    M, N = out.shape
    nonfinite = torch.zeros(2, dtype=torch.int64, device=out.device)
    # A group of columns lies inside one block: the largest power of two that divides the block. One
    # block that spans all columns has no inner edge.
    block_cols, groups_per_block, block_size_k = grid.block_cols, 1 << 30, 128
    if block_cols < grid.cols:
        assert block_cols % fmt.codes_per_byte == 0, "the codes of a byte share a scale"
        block_size_k = min(128, block_cols & -block_cols)
        groups_per_block = block_cols // block_size_k
    block_size_g = min(1024 // block_size_k, 1 << (ceil_div(N, block_size_k) - 1).bit_length())
    block_size_m = 4096 // (block_size_k * block_size_g)
    tiles_n = ceil_div(col % block_size_k + N, block_size_g * block_size_k)
    row %= grid.slab_rows
    with LAUNCH, torch.cuda.device_of(codes):
        weight_dequant_kernel()[ceil_div(M, block_size_m), tiles_n](
            codes, scales, out.view(torch.int16), nonfinite,
            M, N, row, col, codes.shape[1], col // fmt.codes_per_byte,
            grid.slab_rows, grid.scale_rows_per_slab, row // grid.block_rows, grid.block_rows,
            scales.stride(0), **fmt.constants, STACKED=row + M > grid.slab_rows,
            GROUPS_PER_BLOCK=groups_per_block, BLOCK_SIZE_M=block_size_m,
            BLOCK_SIZE_G=block_size_g, BLOCK_SIZE_K=block_size_k, VECTOR=min(8, block_size_k),
            enable_fp_fusion=False,
        )
    return nonfinite


@torch.inference_mode()
def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    number_format: str,
    grid: Grid,
    row: int = 0,
    col: int = 0,
    divide: bool = False,
    stream=None,
) -> torch.Tensor:
    """Dequantize a piece of a weight: whole rows, or a part of one.

    out: (M, N) bfloat16, contiguous, filled with the elements from (row, col) on of the weight that
    `grid` describes.
    codes: (M, at least ceil(N / codes per byte)) uint8, of which each row begins with the byte that
    holds the code of column `col`; contiguous.
    scales: float32, the matrix of the piece's scales, which grid.scale_region names.
    All three on one device, where the work is done; or on the CPU, with a torch.cuda.Stream whose
    device does it. number_format: a key of FORMATS. divide: by the scales; on the CPU only.

    Returns the numbers of NaN and of infinities in out: two integers in a tensor on that device,
    whose computation may not have finished; with a stream it has, and everything is on the CPU.
    """
    if not out.numel():
        return torch.zeros(2, dtype=torch.int64, device=out.device)
    rest = FORMATS[number_format], grid, row, col
    if stream is None or divide:
        path = _dequantize_triton if codes.is_cuda else _dequantize_cpu
        return path(codes, scales, out, *rest, divide)
    with torch.cuda.stream(stream):
        codes, scales = (t.to(stream.device, non_blocking=True) for t in (codes, scales))
        result = torch.empty_like(out, device=stream.device)
        nonfinite = _dequantize_triton(codes, scales, result, *rest, divide)
        out.copy_(result, non_blocking=True)
        return nonfinite.cpu()  # Waits for the stream, so all buffers are free again.


def weight_dequant(
    x: torch.Tensor, s: torch.Tensor, block_size: int | tuple[int, int] = 128
) -> torch.Tensor:
    """Dequantize a weight with one scale per block, on the device where its tensors are.

    x: (M, N) codes, contiguous; float8_e4m3fn, float8_e5m2, uint8 (E4M3 codes) or int8 (integers).
    s: (ceil(M / block rows), ceil(N / block columns)) scales of any floating dtype.
    block_size: rows and columns of a block; one number for a square block.

    Returns (M, N) bfloat16. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    block = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if x.dtype not in FORMAT_OF_DTYPE:
        raise ValueError(f"codes are {x.dtype}; expected one of {[*FORMAT_OF_DTYPE]}")
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"codes of shape {tuple(x.shape)} are not a contiguous matrix")
    if x.device != s.device:
        raise ValueError(f"codes are on {x.device}, scales on {s.device}")
    grid = Grid(*x.shape, *block, slab_rows=max(1, x.shape[0]))
    if tuple(s.shape) != grid.scale_shape:
        raise ValueError(f"scales are {tuple(s.shape)}; blocks of {block} over codes "
                         f"{tuple(x.shape)} need {grid.scale_shape}")
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    codes, scales = x.view(torch.uint8), s.float().contiguous()
    limit = 1 << 30 if x.is_cuda else MAX_PIECE  # The Triton kernel counts in int32.
    for row, col, M, N in pieces(0, x.numel(), x.shape[1] or 1, limit):
        place = slice(row, row + M), slice(col, col + N)
        top, bottom, left, right = grid.scale_region(row, col, M, N)
        dequantize(codes[place], scales[top:bottom, left:right], out[place],
                   FORMAT_OF_DTYPE[x.dtype], grid, row, col)
    return out


def widen_scales(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return scales as float32. raw: uint8, their bytes.

    dtype: F32, BF16 or F16; F8_E4M3; F8_E8M0 or U8, which is 2 ** (byte - 127), and NaN for 255.
    """
    return raw.view(SCALE_DTYPES[dtype]).float()
