"""Turn the codes of a quantized weight and its scales into BF16 values, on a GPU or on the CPU.

Both paths take the codes as plain bytes and decode them with integer operations. The bits of a
small float, moved to where a larger one has its own, are a number that is too small by a constant
power of two, exactly, subnormals included. So no FP8 type reaches Triton, which refuses them on
GPUs older than sm_89, nor torch's own float8 cast, which alone takes ten times as long as all that
the CPU path does.

    out[i, j] = bfloat16(float32(decode(codes[i, j])) * float32(scale of the block of i, j))

The product is rounded to float32 and then once to BF16, both to nearest even, on either device.
Every NaN becomes 0x7FC0, so the bytes do not depend on where they were computed.
"""

import functools
import itertools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BF16_INFINITY, BF16_NAN = 0x7F80, 0x7FC0
# Elements of CPU scratch, 2 bytes each: large enough that dispatching ten torch operations costs
# little, small enough for a core's caches. Half is slower, double is not faster.
BAND = 1 << 20
MAX_PARTS = 1024  # tensor-parallel ranks that a fused weight may have been made for
BLOCK_SIZES = (16, 32, 64, 128, 256, 1)  # seen in formats, for one axis each
LAUNCH_SIZE = 1 << 27  # elements, so that 32 bits number them and few tiles lie side by side
LAUNCH = threading.Lock()  # so that of several threads one compiles the kernel and the rest find it


@dataclass(frozen=True)
class NumberFormat:
    """What the bits of a code mean: a sign, then an exponent and a mantissa.

    exponent_bits is 0 for two's complement integers. special is the smallest magnitude (the code
    without its sign) that is no finite number, NONE where all are. Sources: OCP 8-bit Floating
    Point Specification (E4M3, E5M2) and OCP Microscaling Formats Specification (E2M1, E8M0).
    """

    exponent_bits: int
    mantissa_bits: int
    special: int

    @property
    def codes_per_byte(self) -> int:
        """1, or 2 with the first code in the low half."""
        return 8 // (1 + self.exponent_bits + self.mantissa_bits)

    @functools.cached_property
    def placement(self) -> tuple[int, int, float]:
        """What makes a code a BF16 number, or the upper half of a float32.

        That is a left shift of the code, after its sign was extended; the bits, as int16, that it
        may then set; and the power of two by which it is too small, the difference of the biases.
        """
        shift = 7 - self.mantissa_bits
        magnitude = (1 << self.exponent_bits + self.mantissa_bits) - 1
        rescale = 2.0 ** (128 - 2 ** (self.exponent_bits - 1)) if self.exponent_bits else 1.0
        return shift, (magnitude << shift) - 0x8000, rescale

    @functools.cached_property
    def limit(self) -> int:
        """The bits of a float32, a scale. A smaller one can be multiplied with the power of two of
        placement, and with any finite value, and will not overflow.
        """
        largest = 2.0 ** (2 ** (self.exponent_bits - 1) + 1) if self.exponent_bits else 128.0
        return torch.tensor(2.0**127 / max(self.placement[2], largest)).view(torch.int32).item()

    @functools.cached_property
    def constants(self) -> dict[str, int | float]:
        """What the Triton kernel, which decodes to float32, has to know of a format."""
        shift, mask, rescale = self.placement
        shift += 8 + 8 // self.codes_per_byte  # a code stands in the upper bits of its byte
        return {"EXPONENT_BITS": self.exponent_bits, "CODES_PER_BYTE": self.codes_per_byte,
                "SHIFT": shift, "MASK": mask << 16, "RESCALE": rescale, "SPECIAL": self.special,
                "LIMIT": self.limit}

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """What each byte means: (256,) float32, or (256, 2) where it holds two codes."""
        if self.codes_per_byte == 1:
            return torch.tensor([self._value(code) for code in range(256)])
        return torch.tensor([[self._value(b & 15), self._value(b >> 4)] for b in range(256)])

    def _value(self, code: int) -> float:
        bits = self.exponent_bits + self.mantissa_bits
        sign, magnitude = code >> bits, code & (1 << bits) - 1
        if not self.exponent_bits:
            return float(magnitude - (sign << bits))
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude % (1 << self.mantissa_bits)
        if magnitude >= self.special:
            value = math.nan if mantissa else math.inf
        else:
            hidden = (exponent > 0) << self.mantissa_bits
            bias = 2 ** (self.exponent_bits - 1) - 1
            value = math.ldexp(hidden + mantissa, max(exponent, 1) - bias - self.mantissa_bits)
        return -value if sign else value


NONE = 0x80
FORMATS = {
    "E4M3": NumberFormat(4, 3, special=0x7F),  # the FN variant: 0x7F is NaN, there is no infinity
    "E5M2": NumberFormat(5, 2, special=0x7C),  # 0x7C is infinity
    "E2M1": NumberFormat(2, 1, special=NONE),
    "INT8": NumberFormat(0, 7, special=NONE),
}
FORMAT_OF_DTYPE = {
    torch.float8_e4m3fn: "E4M3",
    torch.float8_e5m2: "E5M2",
    torch.uint8: "E4M3",
    torch.int8: "INT8",
}
# What a scale's dtype means, as safetensors spells it: floats, powers of two, small floats.
SCALE_FORMATS = {
    **{"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{"F8_E8M0": "E8M0", "U8": "E8M0", "F8_E4M3": "E4M3"},
}
FLOATS, EXPONENTS = ["F32", "BF16", "F16"], ["F8_E8M0", "U8"]
# What the dtypes of a weight and of its scale (None: it has none) say together: a key of FORMATS,
# and the columns per scale where they are fixed. I8 and U8 with exponents (MXFP4), and U8 with
# small floats (NVFP4), hold two FP4 codes a byte.
CODECS = {
    **{("F8_E4M3", scale): ("E4M3", None) for scale in [*FLOATS, *EXPONENTS, None]},
    **{("F8_E5M2", scale): ("E5M2", None) for scale in [*FLOATS, *EXPONENTS, None]},
    **{("U8", scale): ("E4M3", None) for scale in FLOATS},
    **{("I8", scale): ("INT8", None) for scale in FLOATS},
    **{(weight, scale): ("E2M1", 32) for weight in ["I8", "U8", "F4"] for scale in EXPONENTS},
    **{(weight, "F8_E4M3"): ("E2M1", 16) for weight in ["U8", "F4"]},
    ("F4", None): ("E2M1", None),
}
WEIGHT_DTYPES = {weight for weight, _ in CODECS}


@dataclass(frozen=True)
class Grid:
    """Which scale belongs to which element of a (rows, cols) weight.

    The scales are a matrix of scale_shape with one entry per block of block_rows x block_cols
    elements; blocks at the right and bottom edge may be cut off. Blocks start anew every `part`
    rows: the rows of one expert in a stacked weight, all rows otherwise.
    """

    rows: int
    cols: int
    block_rows: int
    block_cols: int
    part: int

    @property
    def scale_shape(self) -> tuple[int, int]:
        parts = -(-self.rows // self.part)
        return parts * self.scale_rows_per_part, -(-self.cols // self.block_cols)

    @property
    def scale_rows_per_part(self) -> int:
        return -(-self.part // self.block_rows)

    def scale_row(self, row: int) -> int:
        part, row = divmod(row, self.part)
        return part * self.scale_rows_per_part + row // self.block_rows

    def scale_region(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """Return first row, row end, first column, column end of the scales of a range.

        start, stop: elements of the row-major weight. The region is one contiguous run of scales:
        either all columns or a single row.
        """
        row, last_row = start // self.cols, (stop - 1) // self.cols
        rows = self.scale_row(row), self.scale_row(last_row) + 1
        if row != last_row:
            return *rows, 0, self.scale_shape[1]
        first, last = start % self.cols, (stop - 1) % self.cols
        return *rows, first // self.block_cols, last // self.block_cols + 1


@functools.cache  # thousands of experts have the same shapes
def find_grids(
    weight_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    block_sizes: tuple[tuple[int, int], ...],
    transposed: bool = False,
    fused: bool = False,
) -> list[Grid]:
    """Return the grids by which scales of one shape may cover a weight of another; one is right.

    A weight is E experts of N rows and K columns; a matrix has E = 1. The first match counts: one
    scale for all; per expert, per row or per column; one of block_sizes; a block size out of
    BLOCK_SIZES on each axis. It is never computed from the shapes: 192 rows over 2 rows of scales
    are blocks of 128, the second cut off, not blocks of 96. Per-row scales of a `transposed` weight
    belong to its columns. The rows of a `fused` weight may consist of equal parts, one of each
    tensor-parallel rank, in which blocks start anew.
    """
    if len(weight_shape) > 3:  # a convolution: its scales are per tensor or per row
        weight_shape = (weight_shape[0], math.prod(weight_shape[1:]))
    E, N, K = (1, 1, 1, *weight_shape)[-3:]
    if math.prod(scale_shape) == 1 or not E * N * K:
        return [Grid(E * N, K, max(E * N, 1), max(K, 1), part=max(E * N, 1))]
    scale = scale_shape
    if len(scale) == 4 and scale[1] == scale[3] == 1:
        scale = (scale[0], scale[2])
    while len(scale) > 1 and scale[0] == 1 and len(scale) > (3 if E > 1 else 2):
        scale = scale[1:]
    row, column, expert = (1, K), (N, 1), (N, K)
    shapes = [((N,), row), ((N, 1), row), ((1, K), column)]
    if E > 1:
        shapes = [((E,), expert), ((E, 1), expert), ((E, 1, 1), expert)]
        shapes += [((E, N), row), ((E, N, 1), row), ((E, K), column), ((E, 1, K), column)]
        if transposed:
            shapes = [((E, K, 1), column)]
    if blocks := {block for shape, block in shapes if shape == scale}:
        return [Grid(E * N, K, *block, part=N) for block in blocks]
    if E > 1:
        scale = scale[1:] if len(scale) == 3 and scale[0] == E else ()
    elif len(scale) == 1:  # a flattened grid of row groups, as auto-round writes it
        scale = (N, scale[0] // N) if not scale[0] % N else ()
    for sizes in block_sizes, itertools.product(BLOCK_SIZES, BLOCK_SIZES):
        blocks = {}  # those that differ on this weight: what lies beyond its edges does not matter
        for rows, cols in sizes:
            if (-(-N // rows), -(-K // cols)) == scale:
                blocks.setdefault((min(rows, N), min(cols, K)), (rows, cols))
        if blocks:
            return [Grid(E * N, K, *block, part=N) for block in blocks.values()]
    return _fused_grids(N, K, scale, block_sizes or ((128, 128),)) if fused and E == 1 else []


def _fused_grids(N, K, scale, block_sizes) -> list[Grid]:
    return [
        Grid(N, K, rows, cols, part=N // parts)
        for rows, cols in dict.fromkeys(block_sizes)
        for parts in range(2, min(N, MAX_PARTS) + 1)
        if not N % parts and (parts * -(-N // parts // rows), -(-K // cols)) == scale
    ]


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
    grid = Grid(*x.shape, *block, part=max(1, x.shape[0]))
    if tuple(s.shape) != grid.scale_shape:
        raise ValueError(f"scales are {tuple(s.shape)}; blocks of {block} over codes "
                         f"{tuple(x.shape)} need {grid.scale_shape}")
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    codes, scales = x.view(torch.uint8).flatten(), s.float().contiguous()
    dequantize(codes, scales, out.flatten(), FORMAT_OF_DTYPE[x.dtype], grid)
    return out


@torch.inference_mode()
def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    number_format: str,
    grid: Grid,
    start: int = 0,
) -> torch.Tensor:
    """Dequantize a range of a weight's elements, which may begin and end inside a row.

    out: (n,) bfloat16, filled with the elements [start, start + n) of the row-major weight that
    `grid` describes.
    codes: uint8, the bytes that hold those elements, of which packed ones may share the outermost
    with others; packed weights have an even number of columns.
    scales: float32, contiguous, the part of the scale matrix that grid.scale_region names.
    All three on one device, where the work is done. number_format: a key of FORMATS.

    Returns the numbers of NaN and of infinities in out: two integers in a tensor on that device,
    which need not be done yet.
    """
    fmt, stop = FORMATS[number_format], start + out.numel()
    if start == stop:
        return torch.zeros(2, dtype=torch.int64)
    path = _dequantize_triton if codes.is_cuda else _dequantize_cpu
    before, after = -start % fmt.codes_per_byte, -stop % fmt.codes_per_byte
    if not (before or after):
        return path(codes, scales, out, fmt, grid, start, stop)
    whole = torch.empty(before + out.numel() + after, dtype=out.dtype, device=out.device)
    path(codes, scales, whole, fmt, grid, start - before, stop + after)
    out.copy_(whole[before : before + out.numel()])
    return _count_specials(out)


def _count_specials(out: torch.Tensor) -> torch.Tensor:
    """Return the numbers of NaN and of infinities among BF16 values."""
    magnitude = out.view(torch.int16) & 0x7FFF
    return torch.stack([(magnitude > BF16_INFINITY).sum(), (magnitude == BF16_INFINITY).sum()])


def _pieces(
    start: int, stop: int, cols: int, limit: int, block: tuple[int, int] = (1, 1)
) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range of elements into (row, col, M, N) rectangles of at most `limit` elements.

    A rectangle is whole rows, up to the edge of a block where one is near, or a part of one row: of
    one block, or of whole ones.
    """
    while start < stop:
        row, col = divmod(start, cols)
        room, cut = min(limit, stop - start), col % block[1]
        if col or room < cols:
            M, N = 1, min(cols - col, room)
            if cut:
                N = min(N, block[1] - cut)
            elif block[1] < N:
                N -= N % block[1]
        else:
            M, N = room // cols, cols
            over = (row + M) % block[0]
            M -= over if over < M else 0
        yield row, col, M, N
        start += M * N


def _dequantize_cpu(codes, scales, out, fmt, grid, start, stop) -> torch.Tensor:
    # As integers -0.0 is below and NaN above ordinary scales.
    low, high = scales.view(torch.int32).aminmax()
    ordinary = low.item() >= 0 and high.item() < fmt.limit
    rescaled = scales * fmt.placement[2] if fmt.special != NONE else scales  # as _decode expects
    band = torch.empty(min(BAND, stop - start), dtype=torch.bfloat16)
    specials = torch.zeros(2, dtype=torch.int64)
    first_row, _, first_col, _ = grid.scale_region(start, stop)
    at, block = 0, (grid.block_rows, grid.block_cols)
    for row, col, M, N in _pieces(start, stop, grid.cols, BAND, block):
        n = M * N
        piece = codes[at // fmt.codes_per_byte : (at + n) // fmt.codes_per_byte]
        piece_out = out[at : at + n]
        simple = ordinary and (fmt.special == NONE or _largest_magnitude(piece) < fmt.special)
        s = rescaled if simple else scales
        s = s[grid.scale_row(row) - first_row :, col // grid.block_cols - first_col :]
        s, width = _scales_of_piece(s, grid, row, col, M, N)
        if simple:
            _decode(piece, band[:n], fmt)
            _scale(band[:n].view(-1, len(s), width), s, piece_out.view(-1, len(s), width))
        else:  # where a NaN, an infinity or a sign of zero may come up, plainly
            values = fmt.values.index_select(0, piece.int()).view(-1, len(s), width)
            piece_out.copy_(values.mul_(s.view(-1, 1)).flatten())
            piece_out.view(torch.int16)[piece_out.isnan()] = BF16_NAN
            specials += _count_specials(piece_out)
        at += n
    return specials


def _largest_magnitude(codes: torch.Tensor) -> int:
    """Return the largest code without its sign bit, in two reductions that allocate nothing."""
    return max(codes.view(torch.int8).max().item(), codes.max().item() - 0x80)


def _decode(codes, out, fmt) -> None:
    """Fill BF16 `out` with the codes' values: of FP8, too small by the power of two of placement.

    FP4 is looked up, for as many of its numbers would become subnormal, some CPUs would take long.
    """
    if fmt.codes_per_byte == 2:
        pairs = fmt.values.bfloat16().view(torch.int32).flatten()
        torch.index_select(pairs, 0, codes.int(), out=out.view(torch.int32))
    elif not fmt.exponent_bits:
        out.copy_(codes.view(torch.int8))
    else:  # int8 widens with its sign, which so arrives at the top; * is faster than torch's <<
        shift, mask, _ = fmt.placement
        out.view(torch.int16).copy_(codes.view(torch.int8)).mul_(1 << shift).bitwise_and_(mask)


def _scale(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` with values times scales: (P, C, width) BF16 by (C,) float32, not negative.

    Batch normalization is the one operation of torch's that multiplies BF16 by float32 and rounds
    to BF16 in one go. It calculates values * (scale / sqrt(1 + 0)) + (-0.0 - 0.0 * scale), which
    adds -0.0, the number that changes none.
    """
    unused, constants = (torch.empty(0), torch.empty(0)), _constants(len(scales))
    torch.native_batch_norm(values, scales, *constants, False, 0.0, 0.0, out=(out, *unused))


@functools.lru_cache(maxsize=16)
def _constants(channels: int) -> torch.Tensor:
    """Return the bias, mean and variance with which batch normalization only multiplies."""
    return torch.tensor([[-0.0], [0.0], [1.0]]).expand(3, channels).contiguous()


def _scales_of_piece(scales, grid, row, col, M, N) -> tuple[torch.Tensor, int]:
    """Return (C,) scales of which each holds for as many elements in a row as the second result.

    scales: the matrix from the piece's first scale on. Where all rows of a piece have the same, C
    scales fill one row, else the piece.
    """
    height = grid.scale_row(row + M - 1) - grid.scale_row(row) + 1
    if height in (1, M):
        scales = scales[:height]
    else:
        rows = torch.arange(row, row + M)
        parts = rows.div(grid.part, rounding_mode="floor")
        rows = rows.sub_(parts * grid.part).div_(grid.block_rows, rounding_mode="floor")
        rows.add_(parts * grid.scale_rows_per_part)
        scales = scales[rows.sub_(rows[0].item())]
    blocks = (col + N - 1) // grid.block_cols - col // grid.block_cols + 1
    if blocks == 1:
        return scales[:, 0], N
    width = math.gcd(N, grid.block_cols)  # less than a block only where the last one is cut off
    if width < grid.block_cols:
        return scales[:, torch.arange(0, N, width) // grid.block_cols].flatten(), width
    return scales[:, :blocks].flatten(), width


def widen_scales(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return scales as float32. raw: uint8, their bytes; dtype: a key of SCALE_FORMATS."""
    kind = SCALE_FORMATS[dtype]
    if isinstance(kind, torch.dtype):
        return raw.view(kind).float()
    if kind == "E8M0":
        exponents = raw.int()  # the exponent field of a float32, but for both ends of its range
        bits = torch.where(exponents == 0, 1 << 22, exponents << 23)
        return torch.where(exponents == 0xFF, torch.nan, bits.view(torch.float32))
    return FORMATS[kind].values.to(raw.device)[raw.int()]


@functools.cache
def weight_dequant_kernel():
    """Return the Triton kernel. Triton is imported here, so that the CPU path can do without."""
    global tl  # where the kernel's body, compiled from its source, looks for the name
    import triton
    import triton.language as tl

    # What only says where a window lies would otherwise have the kernel compiled again and again.
    anywhere = ["M", "row", "part", "scale_rows_per_part", "first_scale_row", "block_rows"]

    @triton.jit(do_not_specialize=[*anywhere, "stride_scale"])
    def kernel(
        codes_ptr, scales_ptr, out_ptr, specials_ptr,
        M, N, row, col, stride_codes, col_codes,
        part, scale_rows_per_part, first_scale_row, block_rows, stride_scale,
        EXPONENT_BITS: tl.constexpr, CODES_PER_BYTE: tl.constexpr, SHIFT: tl.constexpr,
        MASK: tl.constexpr, RESCALE: tl.constexpr, SPECIAL: tl.constexpr, LIMIT: tl.constexpr,
        STACKED: tl.constexpr, GROUPS_PER_BLOCK: tl.constexpr,
        BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_G: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
        VECTOR: tl.constexpr,
    ):
        """out[i, j] = bfloat16(decode(codes[i, j]) * scales[scale_row(i), (col + j) // block_cols])

        codes: (M, stride_codes) uint8, out: (M, N) bfloat16 as int16, both row-major: the rectangle
        at (row, col) of its part of the weight, col_codes bytes into a row. scales: float32, the
        matrix from that rectangle's first scale on. specials: the numbers of NaN and infinities in
        out are added to these two. Grid: one program per tile of BLOCK_SIZE_M rows and BLOCK_SIZE_G
        groups of BLOCK_SIZE_K columns, of which GROUPS_PER_BLOCK lie in one block and have one
        scale. VECTOR elements that follow each other go to one thread, so that each thread stores
        16 bytes beside those of the next.
        """
        offs_m = tl.program_id(0) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
        weight_row, block_rows = (row + offs_m).to(tl.uint32), block_rows.to(tl.uint32)
        scale_row = weight_row // block_rows - first_scale_row.to(tl.uint32)
        if STACKED:  # rows of more than one part
            experts = weight_row // part.to(tl.uint32)
            scale_row = (weight_row - experts * part) // block_rows + experts * scale_rows_per_part
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
            code = tl.load(codes_ptr + offs, mask=mask, other=0)
        else:
            offs_b = (group * (BLOCK_SIZE_K // 2) - col_codes)[:, None]
            offs_b += tl.arange(0, BLOCK_SIZE_K // 2)[None, :]
            mask_b = mask_m & ((offs_b >= 0) & (offs_b < stride_codes))[None, :, :]
            offs_b = offs_m[:, None, None] * stride_codes + offs_b[None, :, :]
            offs_b = tl.max_contiguous(offs_b, (1, 1, VECTOR // 2))
            pair = tl.load(codes_ptr + offs_b, mask=mask_b, other=0)
            code = tl.join(pair << 4, pair)
            code = tl.reshape(code, (BLOCK_SIZE_M, BLOCK_SIZE_G, BLOCK_SIZE_K))

        code = code.to(tl.int8, bitcast=True)
        if EXPONENT_BITS == 0:
            value = code.to(tl.float32)
        else:
            value = ((code.to(tl.int32) << SHIFT) & MASK).to(tl.float32, bitcast=True)

        rare = tl.max(scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= LIMIT
        if SPECIAL < 0x80:
            rare |= tl.max(tl.abs(value)).to(tl.int32, bitcast=True) >= SPECIAL << SHIFT
        if rare:  # a NaN or an infinity may come up, and the scales cannot take over RESCALE
            if SPECIAL < 0x80:
                wide = value.to(tl.int32, bitcast=True)
                special = tl.where((wide & 0x7FFFFF) == 0, float("inf"), float("nan"))
                value *= tl.where((wide & 0x7FFFFFFF) < SPECIAL << SHIFT, 1.0, special)
            value = value * RESCALE * scale
            out = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
            out = tl.where(value == value, out, 0x7FC0).to(tl.int16)  # hardware makes other NaN
            tl.store(out_ptr + offs, out, mask=mask)
            magnitude = out & 0x7FFF
            count = tl.where(magnitude > 0x7F80, 1, tl.where(magnitude == 0x7F80, 0x10000, 0))
            count = tl.sum(tl.where(mask, count, 0))
            tl.atomic_add(specials_ptr, count & 0xFFFF)
            tl.atomic_add(specials_ptr + 1, count >> 16)
        else:
            out = (value * (scale * RESCALE)).to(tl.bfloat16).to(tl.int16, bitcast=True)
            tl.store(out_ptr + offs, out, mask=mask)

    return kernel


def _dequantize_triton(codes, scales, out, fmt, grid, start, stop) -> torch.Tensor:
    bits, specials = out.view(torch.int16), torch.zeros(2, dtype=torch.int64, device=out.device)
    first_row, _, first_col, _ = grid.scale_region(start, stop)
    # A group of columns lies inside one block: the largest power of two that divides the block. One
    # block that spans all columns has no inner edge.
    block_cols, groups_per_block, block_size_k = grid.block_cols, 1 << 30, 128
    if block_cols < grid.cols:
        block_size_k = min(128, block_cols & -block_cols)
        groups_per_block = block_cols // block_size_k
    at = 0
    for row, col, M, N in _pieces(start, stop, grid.cols, LAUNCH_SIZE):
        block_size_g = min(1024 // block_size_k, 1 << (-(-N // block_size_k) - 1).bit_length())
        block_size_m = 4096 // (block_size_k * block_size_g)
        tiles_n = -(-(col % block_size_k + N) // (block_size_g * block_size_k))
        s = scales[grid.scale_row(row) - first_row :, col // block_cols - first_col :]
        row %= grid.part
        with LAUNCH, torch.cuda.device_of(codes):
            weight_dequant_kernel()[-(-M // block_size_m), tiles_n](
                codes[at // fmt.codes_per_byte :], s, bits[at:], specials,
                M, N, row, col, N // fmt.codes_per_byte, col // fmt.codes_per_byte,
                grid.part, grid.scale_rows_per_part, row // grid.block_rows, grid.block_rows,
                scales.stride(0), **fmt.constants, STACKED=row + M > grid.part,
                GROUPS_PER_BLOCK=groups_per_block, BLOCK_SIZE_M=block_size_m,
                BLOCK_SIZE_G=block_size_g, BLOCK_SIZE_K=block_size_k, VECTOR=min(8, block_size_k),
                enable_fp_fusion=False,
            )
        at += M * N
    return specials
