"""The arithmetic on the CPU: every code, every kind of scale, every cut, to the last bit."""

import itertools

import pytest
import torch

import checkpoints
import kernel
from checkpoints import assert_same_bits, dequantized, every_code, finite_codes
from kernel import FORMATS, Grid, ceil_div, dequantize, weight_dequant

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "INT8": torch.int8}
PACKED = ["E2M1", "INT4", "UINT4B8"]


def code_values(codes, number_format):
    """Return what (rows, bytes) of codes mean, as float32: torch's own cast, or plain integers."""
    if number_format in DTYPES:
        return codes.view(DTYPES[number_format]).float()
    if number_format == "E2M1":
        return checkpoints.fp4_values(codes)
    halves = checkpoints.nibbles(codes)
    signed = halves - 16 * (halves > 7)
    return (signed if number_format == "INT4" else halves - 8).float()


def any_bits(*shape, seed=1):
    """Return float32 numbers of random bits: of every magnitude, negative, infinite and NaN."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator)
    return bits.to(torch.int32).view(torch.float32)


def expected_values(codes, scales, number_format, grid, divide=False):
    """Return the oracle's values of a weight of which each slab has a matrix of scales."""
    values = code_values(codes, number_format)[:, : grid.cols].view(-1, grid.slab_rows, grid.cols)
    wide = scales.view(len(values), -1, scales.shape[1])
    wide = wide.repeat_interleave(grid.block_rows, 1).repeat_interleave(grid.block_cols, 2)
    wide = wide[:, : grid.slab_rows, : grid.cols]
    values = values / wide if divide else values * wide
    return checkpoints.canonical(values.bfloat16()).flatten(0, 1)


def piece_of(codes, scales, number_format, grid, piece):
    """Return the codes and the scales of a piece, and nothing beside them."""
    row, col, M, N = piece
    per_byte = FORMATS[number_format].codes_per_byte
    end = ceil_div(col + N, per_byte) if M == 1 else codes.shape[1]
    top, bottom, left, right = grid.scale_region(*piece)
    return (codes[row : row + M, col // per_byte : end].contiguous(),
            scales[top:bottom, left:right].contiguous())


def check_range(codes, scales, number_format, grid, cuts, limit=1 << 20, divide=False,
                dequantize=dequantize, device="cpu"):
    """Hold the elements between any two cuts, piece by piece, against the oracle's.

    Pieces follow each other. Each has at most `limit` elements, in whole rows or in one, and does
    not go on behind a block that a slab cuts off.
    """
    expected = expected_values(codes, scales, number_format, grid, divide)
    for start, stop in itertools.combinations(cuts, 2):
        at = start
        for row, col, M, N in grid.pieces(start, stop, limit):
            assert row * grid.cols + col == at
            assert 0 < M * N <= limit
            assert (col, N) == (0, grid.cols) or (M == 1 and col + N <= grid.cols)
            assert grid.slab_rows % grid.block_rows == 0 or (
                row // grid.slab_rows == (row + M - 1) // grid.slab_rows)
            at += M * N
            operands = piece_of(codes, scales, number_format, grid, (row, col, M, N))
            out = torch.full((M, N), 7, dtype=torch.bfloat16, device=device)
            dequantize(*operands, out, number_format, grid, row, col, divide)
            nonfinite, part = kernel.canonicalize(out), expected[row : row + M, col : col + N]
            assert_same_bits(out.cpu(), part)
            assert nonfinite == (not part.isfinite().all())
        assert at == stop


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("make", [every_code, finite_codes])
@pytest.mark.parametrize("scale", [
    1.0, 0.3, 1e-38, 1e-45, 1e38, 3e38, 0.0, -0.0, -2.5, torch.inf, torch.nan,
    257.0,  # Of 9 significant bits: many products lie exactly between two BF16 values.
    2.0**-126])  # Many products are subnormal.
def test_every_code_times_a_scale_is_the_float32_product_rounded_once(dtype, make, scale):
    codes = make(16, 16, dtype=dtype)
    scales = torch.full((1, 1), scale)
    assert_same_bits(weight_dequant(codes, scales), dequantized(codes, scales))


@pytest.mark.parametrize("number_format, first", [("INT4", 0), ("UINT4B8", -8)])
def test_four_bit_integers_are_in_order_and_the_low_half_comes_first(number_format, first):
    """16 codes count up from the first; after 7, in two's complement, follows -8."""
    codes = torch.tensor([[low + 1 << 4 | low for low in range(0, 16, 2)]], dtype=torch.uint8)
    integers = [first + code if first + code < 8 else code - 16 for code in range(16)]
    out = torch.empty(1, 16, dtype=torch.bfloat16)
    dequantize(codes, torch.tensor([[0.5]]), out, number_format, Grid(1, 16, 1, 16, 1))
    assert out.tolist() == [[0.5 * integer for integer in integers]]


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.uint8, torch.int8])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_of_every_dtype_are_taken(dtype, scale_dtype):
    codes, scales = every_code(200, 300, dtype), torch.rand(2, 3).to(scale_dtype)
    meaning = codes.view(FLOAT8[0]) if dtype == torch.uint8 else codes
    assert_same_bits(weight_dequant(codes, scales), dequantized(meaning, scales))


@pytest.mark.parametrize(
    "shape", [(1, 1), (128, 128), (127, 129), (576, 257), (3, 1000), (1000, 3), (300, 1)])
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (32, 32), (7, 100), (64, 256), (1, 1),
                                   (2000, 1), (1, 2000), (999, 2000)])
def test_ragged_edges_take_the_scale_of_the_block_that_they_cut(shape, block):
    codes = finite_codes(*shape)
    scales = torch.rand(ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1]))
    assert_same_bits(weight_dequant(codes, scales, block), dequantized(codes, scales, block))


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("make_scales", [torch.ones, torch.rand, torch.zeros, any_bits])
def test_every_number_format_is_multiplied_or_divided_by_scales_of_every_kind(
        number_format, divide, make_scales):
    """Zeros keep the sign of the product; NaN and infinity spoil only their own blocks, and what
    stands beyond the columns of a row does not count.
    """
    grid = Grid(60, 64, 7, 16, 20)
    codes = every_code(60, 64 // FORMATS[number_format].codes_per_byte + 5, torch.uint8)
    scales = make_scales(*grid.scale_shape)
    scales[::2] *= -1
    cuts = [0, 1, 3, 65, 1999, 3840]
    check_range(codes, scales, number_format, grid, cuts, divide=divide)


@pytest.mark.parametrize("limit", [1, 69, 70, 700, 1 << 20])
@pytest.mark.parametrize("block, slab_rows", [
    ((128, 128), 300), ((1, 32), 300), ((7, 5), 20), ((50, 70), 75), ((99, 1), 300), ((9, 1), 30)])
def test_a_weight_cut_anywhere_holds_the_same_values_as_the_whole(limit, block, slab_rows):
    grid = Grid(300, 70, *block, slab_rows)
    codes, scales = every_code(300, 70, torch.uint8), torch.rand(grid.scale_shape)
    cuts = [0, 1, 69, 70, 71, 300]
    cuts += [1000, 1400, 8191, 8960, 20999, 21000] if limit > 70 else []
    check_range(codes, scales, "E4M3", grid, cuts, limit)


@pytest.mark.parametrize("number_format", PACKED)
@pytest.mark.parametrize("block", [(1, 32), (1, 16), (128, 128), (37, 1), (2, 7)])
@pytest.mark.parametrize("cols, width", [(130, 65), (129, 65), (130, 80)])
def test_packed_codes_are_cut_anywhere_at_odd_elements_too(number_format, block, cols, width):
    """Two codes a byte, in rows of an odd length and in rows that are wider than the weight."""
    codes, grid = every_code(37, width, torch.uint8), Grid(37, cols, *block, 37)
    scales = torch.rand(grid.scale_shape)
    scales[-1, -1] = torch.nan
    cuts = [0, 1, 2, 33, cols - 1, cols, cols + 1, 999, 37 * cols - 1, 37 * cols]
    check_range(codes, scales, number_format, grid, cuts)


@pytest.mark.parametrize("negative", [False, True])
def test_every_nan_becomes_the_one_nan(negative):
    codes = torch.tensor([[0x7F, 0xFF, 0x38]], dtype=torch.uint8)
    nan = torch.tensor([[-1 if negative else 0x7F800001]], dtype=torch.int32).view(torch.float32)
    for scale, last in ((torch.ones(1, 1), 0x3F80), (nan, 0x7FC0)):
        bits = weight_dequant(codes, scale).view(torch.int16)
        assert bits.tolist() == [[0x7FC0, 0x7FC0, last]]


@pytest.mark.parametrize("bits, found", [
    ([0x3F80], False), ([0x7F80], True), ([-0x80], True), ([-1], True), ([0x7F80, -0x80], True),
    ([0x7F7F] * 9, False), ([], False)])
def test_canonicalizing_tells_whether_there_are_nan_or_infinities(bits, found):
    """Finite values whose sum is infinite are no such values."""
    assert kernel.canonicalize(torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)) is found


def test_a_weight_longer_than_a_piece_holds_the_same_values():
    codes, scales = finite_codes(3, 1_100_001), torch.rand(3, 8594)
    assert_same_bits(weight_dequant(codes, scales, (1, 128)), dequantized(codes, scales, (1, 128)))


BYTES, SCALE = torch.zeros(4, 4, dtype=torch.uint8), torch.ones(1, 1)


@pytest.mark.parametrize("x, s, block, complaint", [
    (torch.zeros(4, 4), SCALE, 128, "float32"), (BYTES[0], SCALE, 128, "matrix"),
    (BYTES.T[:, :2], SCALE, 128, "contiguous"),
    (BYTES.repeat(75, 1), SCALE, 128, r"need \(3, 1\)"), (BYTES, SCALE[0], 2, r"need \(2, 2\)"),
    (BYTES, SCALE.to("meta"), 128, "scales on meta"),
    (BYTES.to("meta"), SCALE.to("meta"), 128, "codes are on meta")])
def test_operands_that_do_not_fit_are_refused(x, s, block, complaint):
    with pytest.raises(ValueError, match=complaint):
        weight_dequant(x, s, block)


@pytest.mark.parametrize("rows, cols", [(0, 128), (128, 0), (0, 0)])
def test_an_empty_weight_gives_an_empty_result(rows, cols):
    codes = torch.zeros(rows, cols, dtype=torch.uint8)
    out = weight_dequant(codes, torch.ones(rows // 128, cols // 128))
    assert out.shape == (rows, cols)
