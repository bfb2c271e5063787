"""The arithmetic on the CPU: every code, every kind of scale, every cut, to the last bit."""

import itertools

import pytest
import torch

import kernel
from checkpoints import (
    assert_same_bits,
    canonical,
    dequantized,
    every_code,
    finite_codes,
    fp4_values,
    nibbles,
    special_counts,
)
from kernel import FORMATS, Grid, ceil_div, dequantize, pieces, weight_dequant, widen_scales

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "INT8": torch.int8}
PACKED = ["E2M1", "INT4", "UINT4B8"]


def code_values(codes, number_format):
    """Return what (rows, bytes) of codes mean, as float32: torch's own cast, or plain integers."""
    if number_format in DTYPES:
        return codes.view(DTYPES[number_format]).float()
    if number_format == "E2M1":
        return fp4_values(codes)
    halves = nibbles(codes)
    signed = halves - 16 * (halves > 7)
    return (signed if number_format == "INT4" else halves - 8).float()


def any_bits(*shape, seed=1):
    """Return float32 numbers of random bits: of every magnitude, negative, infinite and NaN."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator)
    return bits.to(torch.int32).view(torch.float32)


def expected_values(codes, scales, number_format, grid):
    """Return the oracle's values of a weight of which each slab has a matrix of scales."""
    values = code_values(codes, number_format)[:, : grid.cols].view(-1, grid.slab_rows, grid.cols)
    matrices = scales.view(len(values), -1, scales.shape[1])
    return dequantized(values, matrices, (grid.block_rows, grid.block_cols)).flatten(0, 1)


def piece_of(codes, scales, number_format, grid, piece):
    """Return the codes and the scales of a piece, and nothing beside them."""
    row, col, M, N = piece
    per_byte = FORMATS[number_format].codes_per_byte
    end = ceil_div(col + N, per_byte) if M == 1 else codes.shape[1]
    top, bottom, left, right = grid.scale_region(*piece)
    return (codes[row : row + M, col // per_byte : end].contiguous(),
            scales[top:bottom, left:right].contiguous())


def check_range(codes, scales, expected, number_format, grid, start, stop, limit, **options):
    """Hold elements [start, stop) of a weight, piece by piece, against what is expected of all."""
    for row, col, M, N in pieces(start, stop, grid.cols, limit):
        operands = piece_of(codes, scales, number_format, grid, (row, col, M, N))
        out = torch.full((M, N), 7, dtype=torch.bfloat16)
        counts = dequantize(*operands, out, number_format, grid, row, col, **options)
        part = expected[row : row + M, col : col + N]
        assert_same_bits(out, part)
        assert counts.tolist() == special_counts(part)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("make", [every_code, finite_codes])
@pytest.mark.parametrize(
    "scale", [1.0, 0.3, 1e-38, 1e-45, 1e38, 3e38, 0.0, -0.0, -2.5, torch.inf, torch.nan]
)
def test_every_code_times_a_scale_is_the_float32_product_rounded_once(dtype, make, scale):
    codes = make(16, 16, dtype=dtype)
    scales = torch.full((1, 1), scale)
    assert_same_bits(weight_dequant(codes, scales), dequantized(codes, scales))


@pytest.mark.parametrize("number_format", FORMATS)
def test_the_table_of_a_number_format_is_what_its_codes_mean(number_format):
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    expected = code_values(codes, number_format).nan_to_num(9e9)
    assert_same_bits(FORMATS[number_format].values.view(256, -1).nan_to_num(9e9), expected)


@pytest.mark.parametrize("number_format, first", [("INT4", 0), ("UINT4B8", -8)])
def test_four_bit_integers_are_in_order_and_the_low_half_comes_first(number_format, first):
    """16 codes count up from the first; after 7, in two's complement, follows -8."""
    codes = torch.tensor([[low + 1 << 4 | low for low in range(0, 16, 2)]], dtype=torch.uint8)
    integers = [first + code if first + code < 8 else code - 16 for code in range(16)]
    out = torch.empty(1, 16, dtype=torch.bfloat16)
    dequantize(codes, torch.tensor([[0.5]]), out, number_format, Grid(1, 16, 1, 16, 1))
    assert out.tolist() == [[0.5 * integer for integer in integers]]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_widened_to_float32(scale_dtype):
    codes, scales = finite_codes(200, 300), torch.rand(2, 3).to(scale_dtype)
    assert_same_bits(weight_dequant(codes, scales), dequantized(codes, scales))


@pytest.mark.parametrize(
    "shape", [(1, 1), (128, 128), (127, 129), (576, 257), (3, 1000), (1000, 3), (300, 1)]
)
@pytest.mark.parametrize(
    "block",
    [(128, 128), (1, 32), (32, 32), (7, 100), (64, 256), (1, 1), (2000, 1), (1, 2000), (999, 2000)],
)
def test_ragged_edges_take_the_scale_of_the_block_that_they_cut(shape, block):
    codes = finite_codes(*shape)
    scales = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    assert_same_bits(weight_dequant(codes, scales, block), dequantized(codes, scales, block))


def test_products_half_way_between_two_values_round_to_even():
    # 4 significant bits times 257, of 9: many products lie exactly between two BF16 values
    codes, scales = every_code(16, 16), torch.full((1, 1), 257.0)
    exact = codes.double() * 257
    lower = exact.float().view(torch.int32) & 0xFFFF
    assert (lower == 0x8000).sum() > 20
    assert_same_bits(weight_dequant(codes, scales), dequantized(codes, scales))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("make", [every_code, finite_codes])
def test_scales_of_every_magnitude_keep_the_last_bit(dtype, make):
    codes = make(256, 256, dtype=dtype)
    scales = torch.logspace(-38, 38, 256, dtype=torch.float64).float().view(16, 16)
    scales[:, ::3] *= -1
    for some in scales, scales[:8], scales[:, :9]:  # all together, they are too large to be simple
        few = codes[: 16 * some.shape[0], : 16 * some.shape[1]].contiguous()
        assert_same_bits(weight_dequant(few, some, 16), dequantized(few, some, (16, 16)))


def test_random_scales_of_all_bit_patterns_keep_the_last_bit():
    codes, scales = every_code(512, 512), any_bits(64, 64)
    assert_same_bits(weight_dequant(codes, scales, 8), dequantized(codes, scales, (8, 8)))


def test_uint8_holds_e4m3_codes_and_int8_integers():
    codes, scales = every_code(16, 16), torch.full((1, 1), 0.37)
    assert_same_bits(weight_dequant(codes.view(torch.uint8), scales), dequantized(codes, scales))
    integers = codes.view(torch.int8)
    assert_same_bits(weight_dequant(integers, scales), dequantized(integers, scales))


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("make_scales", [torch.ones, torch.rand, any_bits])
def test_zeros_have_the_sign_of_the_product(number_format, make_scales):
    """A zero of either sign, where the format has both, times scales of either sign."""
    scales = make_scales(64, 16)
    scales[::2] *= -1
    grid = Grid(64, 32, 1, 2, 64)
    fmt = FORMATS[number_format]
    zeros = (code_values(every_code(16, 16, torch.uint8), number_format) == 0).view(256, -1)
    numbers = every_code(16, 16, torch.uint8).flatten()[zeros.all(1)]
    codes = numbers[torch.arange(64 * 32 // fmt.codes_per_byte) % len(numbers)].view(64, -1)
    expected = expected_values(codes, scales, number_format, grid)
    assert expected.nan_to_num(0).any().item() is False
    check_range(codes, scales, expected, number_format, grid, 0, 64 * 32, 1 << 20)


@pytest.mark.parametrize("limit", [1, 69, 70, 700, 1 << 20])
def test_pieces_are_whole_rows_or_a_part_of_one_and_follow_each_other(limit):
    for start, stop in itertools.combinations_with_replacement([0, 1, 69, 70, 71, 1000, 2100], 2):
        at = start
        for row, col, M, N in pieces(start, stop, 70, limit):
            assert row * 70 + col == at
            assert 0 < M * N <= limit
            assert (col, N) == (0, 70) or (M == 1 and col + N <= 70)
            at += M * N
        assert at == stop


@pytest.mark.parametrize("make", [every_code, finite_codes])
@pytest.mark.parametrize("limit", [700, 1 << 20])
@pytest.mark.parametrize(
    "block, slab_rows",
    [((128, 128), 300), ((1, 32), 300), ((7, 5), 20), ((50, 70), 75), ((99, 1), 300), ((9, 1), 30)],
)
def test_a_weight_cut_anywhere_holds_the_same_values_as_the_whole(make, limit, block, slab_rows):
    grid = Grid(300, 70, *block, slab_rows)
    scales, codes = torch.rand(grid.scale_shape), make(300, 70).view(torch.uint8)
    expected = expected_values(codes, scales, "E4M3", grid)
    cuts = [0, 1, 69, 70, 71, 1000, 1400, 8191, 8960, 20999, 21000]
    for start, stop in itertools.combinations(cuts, 2):
        check_range(codes, scales, expected, "E4M3", grid, start, stop, limit)


@pytest.mark.parametrize("number_format", PACKED)
@pytest.mark.parametrize("block", [(1, 32), (1, 16), (128, 128), (37, 1)])
@pytest.mark.parametrize("cols, width", [(130, 65), (129, 65), (130, 80)])
def test_packed_codes_are_cut_anywhere_at_odd_elements_too(number_format, block, cols, width):
    """Two codes a byte, in rows of an odd length and in rows that are wider than the weight."""
    codes, grid = every_code(37, width, torch.uint8), Grid(37, cols, *block, 37)
    scales = torch.rand(grid.scale_shape)
    scales[-1, -1] = torch.nan
    expected = expected_values(codes, scales, number_format, grid)
    cuts = [0, 1, 2, 33, cols - 1, cols, cols + 1, 999, 37 * cols - 1, 37 * cols]
    for start, stop in itertools.combinations(cuts, 2):
        check_range(codes, scales, expected, number_format, grid, start, stop, 1 << 20)


@pytest.mark.parametrize("number_format", DTYPES)
def test_what_stands_beyond_the_columns_of_a_row_does_not_count(number_format):
    codes, scales = every_code(20, 50, torch.uint8), torch.rand(20, 1)
    codes[:, 30:] = 0x7F
    grid = Grid(20, 30, 1, 30, 20)
    expected = expected_values(codes, scales, number_format, grid)
    check_range(codes, scales, expected, number_format, grid, 0, 600, 1 << 20)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 5e33, 1e36, 2e36, 1e38, torch.inf, -torch.inf, torch.nan])
def test_nan_and_infinities_are_counted_wherever_they_come_from(number_format, scale):
    codes, grid = every_code(256, 4, torch.uint8), Grid(256, 4, 128, 4, 256)
    scales = torch.tensor([[1.0], [scale]])
    expected = expected_values(codes, scales, number_format, grid)
    check_range(codes, scales, expected, number_format, grid, 0, 1024, 1 << 20)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("make_scales", [torch.ones, torch.rand, torch.zeros, any_bits])
def test_division_by_the_scales_is_the_float32_quotient_rounded_once(number_format, make_scales):
    codes, grid = every_code(60, 64, torch.uint8), Grid(60, 64, 7, 16, 20)
    scales = make_scales(*grid.scale_shape)
    rows = torch.tensor([grid.scale_row(row) for row in range(60)])
    quotient = code_values(codes, number_format)[:, :64] / scales[rows].repeat_interleave(16, 1)
    expected = canonical(quotient.bfloat16())
    for start, stop in [(0, 3840), (1, 3840), (65, 1999), (3, 60)]:
        check_range(codes, scales, expected, number_format, grid, start, stop, 1 << 20, divide=True)


def test_scales_of_every_dtype_are_widened_exactly():
    raw = torch.arange(256).to(torch.uint8)
    for dtype in ("F8_E8M0", "U8"):
        wide = widen_scales(raw, dtype)
        assert_same_bits(wide[:255].double(), 2.0 ** (torch.arange(255).double() - 127))
        assert wide[255].isnan()
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for dtype, kind in {**kinds, "F8_E4M3": FLOAT8[0]}.items():
        expected = raw.view(kind).float().nan_to_num(9e9)
        assert_same_bits(widen_scales(raw, dtype).nan_to_num(9e9), expected)


def test_a_long_row_is_worked_off_in_pieces(monkeypatch):
    sizes = []

    def record(codes, scales, out, *more):
        sizes.append(out.numel())
        return dequantize(codes, scales, out, *more)

    monkeypatch.setattr(kernel, "MAX_PIECE", 1000)
    monkeypatch.setattr(kernel, "dequantize", record)
    codes, scales = finite_codes(3, 2500), torch.rand(3, 20)
    assert_same_bits(weight_dequant(codes, scales, (1, 128)), dequantized(codes, scales, (1, 128)))
    assert sizes == [1000, 1000, 500] * 3


@pytest.mark.parametrize("number_format", FORMATS)
def test_no_code_is_decoded_to_a_subnormal_number(number_format):
    """The product of a subnormal float32 takes an Intel core ten times as long as another."""
    with torch.inference_mode():
        values, _ = kernel._decode(every_code(16, 16, torch.uint8), FORMATS[number_format])
    assert not ((values != 0) & (values.abs() < 2.0**-126)).any()


def test_integers_times_infinity_and_nan_spoil_only_their_own_blocks():
    codes = torch.tensor([[1, -1, 0, 127]] * 3, dtype=torch.int8)
    scales = torch.tensor([[1.0], [torch.inf], [torch.nan]])
    assert_same_bits(weight_dequant(codes, scales, (1, 4)), dequantized(codes, scales, (1, 4)))


def test_every_nan_becomes_the_one_nan():
    codes = torch.tensor([[0x7F, 0xFF, 0x38]], dtype=torch.uint8)
    assert weight_dequant(codes, torch.ones(1, 1)).view(torch.int16).tolist() == [
        [0x7FC0, 0x7FC0, 0x3F80]
    ]
    negative_nan = torch.tensor([[-1]], dtype=torch.int32).view(torch.float32)
    assert weight_dequant(codes, negative_nan).view(torch.int16).tolist() == [[0x7FC0] * 3]


def test_subnormal_results_are_not_flushed_to_zero():
    codes, scales = every_code(16, 16), torch.full((1, 1), 2.0**-126)
    out = weight_dequant(codes, scales)
    assert ((out != 0) & (out.abs() < 2.0**-126)).sum() > 100
    assert_same_bits(out, dequantized(codes, scales))


@pytest.mark.parametrize(
    "x, s, block, complaint",
    [
        (torch.zeros(4, 4), torch.ones(1, 1), 128, "float32"),
        (torch.zeros(4, dtype=torch.uint8), torch.ones(1, 1), 128, "matrix"),
        (torch.zeros(4, 4, dtype=torch.uint8).T[:, :2], torch.ones(1, 1), 128, "contiguous"),
        (torch.zeros(300, 4, dtype=torch.uint8), torch.ones(1, 1), 128, r"need \(3, 1\)"),
        (torch.zeros(4, 4, dtype=torch.uint8), torch.ones(1), (2, 2), r"need \(2, 2\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x, s, block, complaint):
    with pytest.raises(ValueError, match=complaint):
        weight_dequant(x, s, block)


@pytest.mark.parametrize("rows, cols", [(0, 128), (128, 0), (0, 0)])
def test_an_empty_weight_gives_an_empty_result(rows, cols):
    codes = torch.zeros(rows, cols, dtype=torch.uint8)
    out = weight_dequant(codes, torch.ones(rows // 128, cols // 128))
    assert out.shape == (rows, cols)


def test_the_oracle_itself_rounds_to_nearest_even():
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001], dtype=torch.int32).view(
        torch.float32
    )
    assert canonical(halves.bfloat16()).view(torch.int16).tolist() == [0x3F80, 0x3F82, 0x3F81]
