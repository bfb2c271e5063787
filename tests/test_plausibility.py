"""Warnings about formats that were misread: values or scales that no trained weight has.

The weights are quantized here from normal random values as the tools do it, and then mislabeled.
"""

import re

import pytest
import torch

import checkpoints as c
from checkpoints import CONFIG, dequantized, fp4_values
from fp8_cast_bf16 import main
from make_checkpoint import quantize_per_block

ROWS, COLS = 128, 256  # at most 64 KB of codes, so that the sample is the whole weight
MODELOPT = c.method("modelopt", quant_algo="NVFP4")
CT = c.ct_config(num_bits=4, group_size=16)
INT8_ROWS = c.ct_config(num_bits=8, type="int", strategy="channel")


def normal(deviation, seed=0):
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed)) * deviation


def fp8_blocks(values, change=lambda scale: scale, name="l.q_proj"):
    """Return a weight in E4M3 with a scale per 128x128 block, which `change` falsifies."""
    codes, scale = quantize_per_block(values)
    return c.at(name, weight=codes, weight_scale_inv=change(scale))


def nvfp4(values):
    """Return packed E2M1 codes, E4M3 scales per 16 columns, and the factor of all scales."""
    second = values.abs().amax() / (6 * 448)
    blocks = values.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(2) / 6 / second).to(torch.float8_e4m3fn)
    ratio = (blocks / (scale.float() * second)[..., None]).flatten(1).clamp(-6, 6)
    codes = (ratio.abs()[..., None] - c.E2M1).abs().argmin(-1) + 8 * (ratio < 0)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), scale, second


def of_modelopt(codes, scale, second):
    return {"l.q.weight": codes, "l.q.weight_scale": scale, "l.q.weight_scale_2": second}


def of_compressed_tensors(codes, scale, divisor):
    return c.at("l.q", weight_packed=codes, weight_scale=scale, weight_global_scale=divisor.view(1))


def int8_rows(values, name="l.q"):
    scale = values.abs().amax(1, keepdim=True) / 127
    codes = (values / scale).round().to(torch.int8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


def warnings(tmp_path, capsys, tensors, config=None, **options):
    """Convert and return the warnings on stderr, which the report must repeat."""
    c.write_checkpoint(tmp_path / "in", {c.SHARD: tensors}, config)
    capsys.readouterr()
    main(tmp_path / "in", tmp_path / "out", report=tmp_path / "report.json", **options)
    lines = capsys.readouterr().err.splitlines()
    told = c.read_json(tmp_path / "report.json")["implausible"]
    told = [f"Warning: {text}" for text in told]
    others = ("skipping conversion", "has no config.json", "NaN or infinite values")
    assert [line for line in lines if line.startswith("Warning: ")
            and not any(other in line for other in others)] == told
    return told


def assert_figure(line, values):
    """Find the root mean square of the values among the numbers of a warning."""
    rms = values.double().square().mean().sqrt().item()
    numbers = [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", line.replace(",", ""))]
    assert any(abs(number - rms) <= 0.06 * rms for number in numbers), (line, rms)


@pytest.mark.parametrize("deviation", [1e-5, 0.02, 3])
def test_usual_layers_are_silent(tmp_path, capsys, deviation):
    values = normal(deviation)
    codes, scale, second = nvfp4(values)
    got = dequantized(fp4_values(codes), scale.float() * second, (1, 16)).float()
    assert torch.allclose(got, values, atol=0.7 * deviation)  # The quantizers here are right.
    cases = [(fp8_blocks(values), CONFIG), (of_modelopt(codes, scale, second), MODELOPT),
             (of_compressed_tensors(codes, scale, 1 / second), CT),
             (int8_rows(values), INT8_ROWS)]
    for number, (tensors, config) in enumerate(cases):
        assert warnings(tmp_path / str(number), capsys, tensors, config) == []


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 3])
@pytest.mark.parametrize("change", [
    lambda scale: 1 / scale, lambda scale: scale * 0 + 1,  # raw codes
    lambda scale: (scale.log2().round() + 127).clamp(0, 254),  # E8M0 bytes taken as factors
], ids=["inverse", "ones", "exponents"])
def test_misread_scales_of_fp8_blocks_are_announced(tmp_path, capsys, change, deviation):
    tensors = fp8_blocks(normal(deviation), change)
    (line,) = warnings(tmp_path, capsys, tensors, CONFIG)
    assert "l.q_proj.weight" in line
    if not tensors["l.q_proj.weight_scale_inv"].eq(1).all():  # Else the figure may be the scale.
        assert_figure(line, dequantized(*tensors.values()).float())


@pytest.mark.parametrize("deviation", [0.02, 3])
def test_misread_scales_of_whole_tensors_are_announced(tmp_path, capsys, deviation):
    values, one = normal(deviation), torch.tensor(1.0)
    (codes, scale, second), divisor = nvfp4(values), 448 / values.abs().amax()
    blocks = dequantized(fp4_values(codes), scale, (1, 16)).float()
    fp8 = (values * divisor).to(torch.float8_e4m3fn)
    cases = [  # factors that divide, a divisor that multiplies, and none
        ({"l.q.weight": fp8, "l.q.weight_scale": divisor}, None, fp8.float() * divisor),
        (of_modelopt(codes, scale, 1 / second), MODELOPT, blocks / second),
        (of_compressed_tensors(codes, scale, second), CT, blocks / second),
        (of_modelopt(codes, scale, one), MODELOPT, blocks)]
    for number, (tensors, config, expected) in enumerate(cases):
        (line,) = warnings(tmp_path / str(number), capsys, tensors, config)
        assert "l.q.weight" in line
        assert_figure(line, expected)


def test_scales_that_are_all_1_are_announced_though_the_values_are_plausible(tmp_path, capsys):
    fp8 = {"l.q.weight": normal(0.02).to(torch.float8_e4m3fn),
           "l.q.weight_scale_inv": torch.ones(1, 2)}
    codes, scale, _ = nvfp4(normal(0.02))
    fp4 = of_modelopt(codes, torch.ones(scale.shape).to(scale.dtype), torch.tensor(1.0))
    for number, (tensors, config) in enumerate(((fp8, CONFIG), (fp4, MODELOPT))):
        (line,) = warnings(tmp_path / str(number), capsys, tensors, config)
        assert "l.q.weight" in line


def test_one_line_is_printed_for_each_kind_that_is_implausible(tmp_path, capsys):
    tensors = {}
    for number in range(4):
        values = normal(0.02, seed=number)
        tensors |= fp8_blocks(values, lambda scale: 1 / scale, f"l.{number}")
    tensors |= int8_rows(normal(0.02), "m")
    row = normal(0.02).to(torch.float8_e4m3fn)  # a kind of its own: one scale a row, all of them 1
    tensors |= {"r.weight": row, "r.weight_scale": torch.ones(ROWS, 1)}
    lines = warnings(tmp_path, capsys, tensors, INT8_ROWS)
    assert len(lines) == 2
    assert sum("r.weight" in line for line in lines) == 1


@pytest.mark.parametrize("scale", [torch.ones(1, 2), torch.zeros(1, 2), torch.rand(1, 2)])
def test_kinds_that_are_all_zero_are_silent(tmp_path, capsys, scale):
    tensors = {"l.weight": torch.zeros(ROWS, COLS).to(torch.float8_e4m3fn)}
    tensors["l.weight_scale_inv"] = scale
    assert warnings(tmp_path, capsys, tensors, CONFIG) == []


@pytest.mark.parametrize("largest, silent", [(20, True), (440, False)])
def test_plain_casts_may_have_larger_values_and_need_no_scale(tmp_path, capsys, largest, silent):
    values = torch.linspace(-largest, largest, ROWS * COLS).view(ROWS, COLS)  # T5 reaches 20.
    tensors = {"shared.weight": values.to(torch.float8_e4m3fn)}
    assert warnings(tmp_path / "kept", capsys, tensors) == []  # It is not judged.
    assert len(warnings(tmp_path, capsys, tensors, missing_scale="cast")) == (not silent)


@pytest.mark.parametrize("name, limit", [
    *[(name, 32) for name in ("model.embed_tokens", "transformer.wte", "shared", "encoder.shared",
                              "layers.0.norm.linear", "l.embedding")],
    *[(name, 4) for name in ("l.shared_experts.up_proj", "l.shared_expert.up_proj", "l.q_proj")],
])
def test_embeddings_and_norms_may_have_larger_values_than_others(tmp_path, capsys, name, limit):
    for deviation in (3, 16, 64):
        tensors = fp8_blocks(normal(deviation), name=name)
        lines = warnings(tmp_path / str(deviation), capsys, tensors, CONFIG)
        assert (f"{name}.weight" in "".join(lines)) == (deviation > limit)


def test_each_weight_of_a_kind_is_judged_by_its_own_name(tmp_path, capsys):
    # Of one kind, the embedding may be large, but not the layers, whichever stands first.
    for first, others in (("a_embed", "q"), ("q", "z_embed")):
        tensors = fp8_blocks(normal(16), name=f"{first}.l")
        for number in range(4):
            tensors |= fp8_blocks(normal(16), name=f"{others}.{number}.{number}")
        lines = warnings(tmp_path / first, capsys, tensors, CONFIG)
        assert len(lines) == (others == "q")
        assert all("q.0.0.weight" in line for line in lines)


def test_dry_run_warns_and_writes_nothing(tmp_path, capsys):
    tensors = fp8_blocks(normal(0.02), lambda scale: 1 / scale)
    before = warnings(tmp_path, capsys, tensors, CONFIG, dry_run=True)
    assert len(before) == 1
    assert not (tmp_path / "out").exists()
    assert warnings(tmp_path, capsys, tensors, CONFIG) == before


def test_nan_is_announced_as_implausible_and_by_the_name_of_its_tensor(tmp_path, capsys):
    tensors = fp8_blocks(normal(0.02))
    tensors["l.q_proj.weight"].view(torch.uint8)[:, 5] = 0x7F
    (line,) = warnings(tmp_path, capsys, tensors, CONFIG)
    assert "l.q_proj.weight" in line
    assert "nan" in line.lower()
    told = c.read_json(tmp_path / "report.json")["nonfinite"]
    assert told == ["l.q_proj.weight"]
