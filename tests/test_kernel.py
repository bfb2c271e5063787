import itertools

import pytest
import torch

from checkpoints import (
    assert_same_bits,
    canonical,
    dequantized,
    every_code,
    finite_codes,
    fp4_values,
    special_counts,
)
from kernel import Grid, dequantize, weight_dequant, widen_scales

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("make", [every_code, finite_codes])
@pytest.mark.parametrize(
    "scale", [1.0, 0.3, 1e-38, 1e-45, 1e38, 3e38, 0.0, -0.0, -2.5, torch.inf, torch.nan]
)
def test_every_code_times_a_scale_is_the_float32_product_rounded_once(dtype, make, scale):
    codes = make(16, 16, dtype=dtype)
    scales = torch.full((1, 1), scale)
    assert_same_bits(weight_dequant(codes, scales), dequantized(codes, scales))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_widened_to_float32(scale_dtype):
    codes, scales = finite_codes(200, 300), torch.rand(2, 3).to(scale_dtype)
    assert_same_bits(weight_dequant(codes, scales), dequantized(codes, scales))


@pytest.mark.parametrize(
    "shape", [(1, 1), (128, 128), (127, 129), (576, 257), (3, 1000), (1000, 3), (300, 1)]
)
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (32, 32), (7, 100), (64, 256), (1, 1)])
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
    for part in scales, scales[:8], scales[:, :9]:  # all together, they are too large to be simple
        part, few = part.contiguous(), codes[: 16 * part.shape[0], : 16 * part.shape[1]]
        few = few.contiguous()
        assert_same_bits(weight_dequant(few, part, 16), dequantized(few, part, (16, 16)))


def test_random_scales_of_all_bit_patterns_keep_the_last_bit():
    bits = torch.randint(-(2**31), 2**31, (64, 64), generator=torch.Generator().manual_seed(1))
    scales = bits.to(torch.int32).view(torch.float32)
    codes = every_code(512, 512)
    assert_same_bits(weight_dequant(codes, scales, 8), dequantized(codes, scales, (8, 8)))


def test_uint8_holds_e4m3_codes_and_int8_integers():
    codes, scales = every_code(16, 16), torch.full((1, 1), 0.37)
    assert_same_bits(weight_dequant(codes.view(torch.uint8), scales), dequantized(codes, scales))
    integers = codes.view(torch.int8)
    assert_same_bits(weight_dequant(integers, scales), dequantized(integers, scales))


@pytest.mark.parametrize("make", [every_code, finite_codes])
@pytest.mark.parametrize("band", [700, 1 << 20])
@pytest.mark.parametrize(
    "block_rows, block_cols, part", [(128, 128, 300), (1, 32, 300), (7, 5, 20), (50, 70, 75)]
)
def test_a_range_cut_anywhere_holds_the_same_values_as_the_whole(
    make, band, block_rows, block_cols, part, monkeypatch
):
    monkeypatch.setattr("kernel.BAND", band)
    rows, cols = 300, 70
    grid = Grid(rows, cols, block_rows, block_cols, part)
    scales = torch.rand(grid.scale_shape)
    codes = make(rows, cols).view(torch.uint8).flatten()
    stacked = codes.view(torch.float8_e4m3fn).view(-1, part, cols)
    expected = dequantized(
        stacked, scales.view(len(stacked), -1, scales.shape[1]), (block_rows, block_cols)
    ).flatten()
    cuts = [0, 1, 69, 70, 71, 1000, 1400, 8191, 8960, 20999, 21000]
    for start, stop in itertools.combinations(cuts, 2):
        row, row_end, col, col_end = grid.scale_region(start, stop)
        out = torch.full((stop - start,), 7, dtype=torch.bfloat16)
        specials = dequantize(
            codes[start:stop],
            scales[row:row_end, col:col_end].contiguous(),
            out,
            "E4M3",
            grid,
            start,
        )
        assert_same_bits(out, expected[start:stop])
        assert specials.tolist() == special_counts(expected[start:stop])


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.int8])
@pytest.mark.parametrize("scale", [1.0, 5e33, 1e36, 2e36, 1e38, torch.inf, -torch.inf, torch.nan])
def test_nan_and_infinities_are_counted_wherever_they_come_from(dtype, scale):
    codes, scales = every_code(256, 4, dtype), torch.ones(2, 1)
    scales[1] = scale
    expected = dequantized(codes, scales)
    out = torch.empty(1024, dtype=torch.bfloat16)
    number_format = {torch.int8: "INT8", FLOAT8[0]: "E4M3", FLOAT8[1]: "E5M2"}[dtype]
    grid = Grid(256, 4, 128, 4, 256)
    counts = dequantize(codes.view(torch.uint8).flatten(), scales, out, number_format, grid)
    assert counts.tolist() == special_counts(expected)


@pytest.mark.parametrize("block", [(1, 32), (1, 16), (128, 128)])
def test_packed_fp4_is_cut_anywhere(block):
    rows, cols = 37, 130
    packed = (torch.arange(rows * cols // 2) * 37 % 256).to(torch.uint8).view(rows, -1)
    grid = Grid(rows, cols, *block, rows)
    scales = torch.rand(grid.scale_shape)
    scales[-1, -1] = torch.nan
    expected = dequantized(fp4_values(packed), scales, block).flatten()
    for start, stop in itertools.combinations([0, 1, 2, 33, 129, 130, 131, 999, 4809, 4810], 2):
        row, row_end, col, col_end = grid.scale_region(start, stop)
        out = torch.full((stop - start,), 7, dtype=torch.bfloat16)
        codes = packed.flatten()[start // 2 : (stop + 1) // 2]
        region = scales[row:row_end, col:col_end].contiguous()
        specials = dequantize(codes, region, out, "E2M1", grid, start)
        assert_same_bits(out, expected[start:stop])
        assert specials.tolist() == special_counts(expected[start:stop])


def test_scales_of_every_dtype_are_widened_exactly():
    raw = torch.arange(256).to(torch.uint8)
    for dtype in ("F8_E8M0", "U8"):
        wide = widen_scales(raw, dtype)
        assert_same_bits(wide[:255].double(), 2.0 ** (torch.arange(255).double() - 127))
        assert wide[255].isnan()
    assert_same_bits(
        widen_scales(raw, "F8_E4M3").nan_to_num(9e9), raw.view(FLOAT8[0]).float().nan_to_num(9e9)
    )
    for dtype, kind in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        assert_same_bits(
            widen_scales(raw, dtype).nan_to_num(9e9), raw.view(kind).float().nan_to_num(9e9)
        )


def test_a_long_row_is_worked_off_in_bands(monkeypatch):
    monkeypatch.setattr("kernel.BAND", 1000)
    codes, scales = finite_codes(3, 2500), torch.rand(3, 20)
    assert_same_bits(weight_dequant(codes, scales, (1, 128)), dequantized(codes, scales, (1, 128)))


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


def test_an_empty_weight_gives_an_empty_result():
    assert weight_dequant(torch.zeros(0, 128, dtype=torch.uint8), torch.ones(0, 1)).shape == (
        0,
        128,
    )


def test_the_oracle_itself_rounds_to_nearest_even():
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001], dtype=torch.int32).view(
        torch.float32
    )
    assert canonical(halves.bfloat16()).view(torch.int16).tolist() == [0x3F80, 0x3F82, 0x3F81]
