"""Warnings about formats that were misread: values or scales that no trained weight has.

The weights are quantized here from normal random values as the tools do it, and then mislabeled.
"""

import json
import re

import pytest
import torch

from checkpoints import CONFIG, E2M1, contents, dequantized, fp4_values, write_checkpoint
from fp8_cast_bf16 import main
from make_checkpoint import quantize_per_block

ROWS, COLS = 128, 256  # at most 64 KB of codes, so that the sample is the whole weight
MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
CT = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}},
    }
}


def normal(deviation, seed=0):
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed)) * deviation


def fp8_blocks(values, change=lambda scale: scale, name="l.q_proj"):
    """Return a weight in E4M3 with a scale per 128x128 block, which `change` falsifies."""
    codes, scale = quantize_per_block(values)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": change(scale)}


def nvfp4(values):
    """Return packed E2M1 codes, E4M3 scales per 16 columns, and the factor of all scales."""
    second = values.abs().amax() / (6 * 448)
    blocks = values.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(2) / 6 / second).to(torch.float8_e4m3fn)
    ratio = (blocks / (scale.float() * second)[..., None]).flatten(1).clamp(-6, 6)
    codes = (ratio.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (ratio < 0)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), scale, second


def of_modelopt(codes, scale, second):
    return {"l.q.weight": codes, "l.q.weight_scale": scale, "l.q.weight_scale_2": second}


def of_compressed_tensors(codes, scale, divisor):
    names = "weight_packed", "weight_scale", "weight_global_scale"
    tensors = codes, scale, divisor.view(1)
    return {f"l.q.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}


def int8_rows(values):
    scale = values.abs().amax(1, keepdim=True) / 127
    codes = (values / scale).round().to(torch.int8)
    config = {"num_bits": 8, "type": "int", "strategy": "channel"}
    config = {"config_groups": {"group_0": {"weights": config}}, "format": "int-quantized"}
    config = {"quantization_config": {"quant_method": "compressed-tensors", **config}}
    return {"l.q.weight": codes, "l.q.weight_scale": scale}, config


def warnings(tmp_path, capsys, tensors, config=None, **options):
    """Convert and return the warnings on stderr, which the report must repeat."""
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    capsys.readouterr()
    main(tmp_path / "in", tmp_path / "out", report=tmp_path / "report.json", **options)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Warning: ")
             and not x.endswith("skipping conversion") and "has no config.json" not in x]
    told = json.loads((tmp_path / "report.json").read_text())["implausible"]
    assert [f"Warning: {text}" for text in told] == lines
    return lines


def assert_figure(line, values):
    """Find the root mean square of the values among the numbers of a warning."""
    rms = values.double().square().mean().sqrt().item()
    numbers = [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", line.replace(",", ""))]
    assert any(abs(number - rms) <= 0.06 * rms for number in numbers), (line, rms)


@pytest.mark.parametrize("deviation", [1e-5, 0.02, 3])
def test_usual_layers_are_silent(tmp_path, capsys, deviation):
    values = normal(deviation)
    codes, scale, second = nvfp4(values)
    assert torch.allclose(  # the quantizers of this file are right
        dequantized(fp4_values(codes), scale.float() * second, (1, 16)).float(),
        values,
        atol=0.7 * deviation,
    )
    cases = [
        (fp8_blocks(values), CONFIG),
        (of_modelopt(codes, scale, second), MODELOPT),
        (of_compressed_tensors(codes, scale, 1 / second), CT),
        int8_rows(values),
    ]
    for number, (tensors, config) in enumerate(cases):
        assert warnings(tmp_path / str(number), capsys, tensors, config) == []


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda scale: 1 / scale,
        lambda scale: scale * 0 + 1,  # raw codes
        lambda scale: (scale.log2().round() + 127).clamp(0, 254),  # E8M0 bytes taken as factors
    ],
    ids=["inverse", "ones", "exponents"],
)
def test_misread_scales_of_fp8_blocks_are_announced(tmp_path, capsys, change, deviation):
    tensors = fp8_blocks(normal(deviation), change)
    (line,) = warnings(tmp_path, capsys, tensors, CONFIG)
    assert "l.q_proj.weight" in line
    assert "--verify" in line
    if not tensors["l.q_proj.weight_scale_inv"].eq(1).all():  # else the figure may be the scale
        assert_figure(line, dequantized(*tensors.values()).float())


def test_factor_of_fp8_codes_per_tensor_that_is_a_divisor_is_announced(tmp_path, capsys):
    values = normal(0.02)
    divisor = 448 / values.abs().amax()
    codes = (values * divisor).to(torch.float8_e4m3fn)
    (line,) = warnings(tmp_path, capsys, {"l.weight": codes, "l.weight_scale": divisor})
    assert "l.weight" in line
    assert_figure(line, codes.float() * divisor)


@pytest.mark.parametrize("deviation", [0.02, 3])
def test_misread_second_scales_of_nvfp4_are_announced(tmp_path, capsys, deviation):
    codes, scale, second = nvfp4(normal(deviation))
    one = torch.tensor(1.0)
    cases = {
        "factor that divides": (of_modelopt(codes, scale, 1 / second), MODELOPT, 1 / second),
        "divisor that multiplies": (of_compressed_tensors(codes, scale, second), CT, 1 / second),
        "no second scale": (of_modelopt(codes, scale, one), MODELOPT, one),
    }
    for name, (tensors, config, factor) in cases.items():
        (line,) = warnings(tmp_path / name, capsys, tensors, config)
        assert "l.q.weight" in line
        wide = scale.float().repeat_interleave(16, 1) * factor
        assert_figure(line, fp4_values(codes) * wide)


def test_scales_that_are_all_1_are_announced_though_the_values_are_plausible(tmp_path, capsys):
    values = normal(0.02).to(torch.float8_e4m3fn)
    tensors = {"l.weight": values, "l.weight_scale_inv": torch.ones(1, 2)}
    (line,) = warnings(tmp_path / "fp8", capsys, tensors, CONFIG)
    assert "l.weight" in line
    codes, scale, _ = nvfp4(normal(0.02))
    raw = of_modelopt(codes, torch.ones_like(scale.float()).to(scale.dtype), torch.tensor(1.0))
    (line,) = warnings(tmp_path / "nvfp4", capsys, raw, MODELOPT)
    assert "l.q.weight" in line


def test_one_line_is_printed_for_each_kind_that_is_implausible(tmp_path, capsys):
    tensors = {}
    for number, leaf in enumerate(["q_proj", "k_proj", "v_proj", "o_proj"]):
        values = normal(0.02, seed=number)
        tensors |= fp8_blocks(values, lambda scale: 1 / scale, f"l.{leaf}")
    tensors |= {f"m.{name}": tensor for name, tensor in int8_rows(normal(0.02))[0].items()}
    row = normal(0.02).to(torch.float8_e4m3fn)  # a kind of its own: one scale a row, all of them 1
    tensors |= {"r.weight": row, "r.weight_scale": torch.ones(ROWS, 1)}
    lines = warnings(tmp_path, capsys, tensors, int8_rows(normal(1))[1])
    assert len(lines) == 2
    assert sum("r.weight" in line for line in lines) == 1


@pytest.mark.parametrize("scale", [torch.ones(1, 2), torch.zeros(1, 2), torch.rand(1, 2)])
def test_kinds_that_are_all_zero_are_silent(tmp_path, capsys, scale):
    tensors = {"l.weight": torch.zeros(ROWS, COLS).to(torch.float8_e4m3fn)}
    tensors["l.weight_scale_inv"] = scale
    assert warnings(tmp_path, capsys, tensors, CONFIG) == []


@pytest.mark.parametrize("largest, silent", [(20, True), (440, False)])
def test_plain_casts_may_have_larger_values_and_need_no_scale(tmp_path, capsys, largest, silent):
    # The embeddings of T5 reach 20 and more.
    values = torch.linspace(-largest, largest, ROWS * COLS).view(ROWS, COLS)
    tensors = {"shared.weight": values.to(torch.float8_e4m3fn)}
    lines = warnings(tmp_path, capsys, tensors, missing_scale="cast")
    assert len(lines) == (0 if silent else 1)


LIMITS = {  # How large a root mean square may be, by the name of the weight.
    "model.embed_tokens": 32, "transformer.wte": 32, "shared": 32, "encoder.shared": 32,
    "layers.0.norm.linear": 32, "l.embedding": 32,
    "layers.3.mlp.shared_experts.up_proj": 4, "l.mlp.shared_expert.up_proj": 4, "l.q_proj": 4,
}


@pytest.mark.parametrize("name", LIMITS)
def test_embeddings_and_norms_may_have_larger_values_than_other_weights(tmp_path, capsys, name):
    for deviation in (3, 16, 64):
        tensors = fp8_blocks(normal(deviation), name=name)
        lines = warnings(tmp_path / str(deviation), capsys, tensors, CONFIG)
        assert (f"{name}.weight" in "".join(lines)) == (deviation > LIMITS[name])


def test_each_weight_of_a_kind_is_judged_by_its_own_name(tmp_path, capsys):
    # Of one kind, the embedding may be large, but not the layers, whichever stands first.
    for first, others in (("a_embed", "q"), ("q", "z_embed")):
        tensors = fp8_blocks(normal(16), name=f"{first}.l")
        for number in range(4):
            tensors |= fp8_blocks(normal(16), name=f"{others}.{number}.{number}")
        lines = warnings(tmp_path / first, capsys, tensors, CONFIG)
        assert len(lines) == (others == "q")
        assert all("q.0.0.weight" in line for line in lines)


def test_weights_that_are_kept_in_fp8_are_not_judged(tmp_path, capsys):
    tensors = {"l.weight": torch.full((ROWS, COLS), 440.0).to(torch.float8_e4m3fn)}
    assert warnings(tmp_path, capsys, tensors) == []


def test_dry_run_warns_and_writes_nothing(tmp_path, capsys):
    tensors = fp8_blocks(normal(0.02), lambda scale: 1 / scale)
    before = warnings(tmp_path, capsys, tensors, CONFIG, dry_run=True)
    assert len(before) == 1
    assert not (tmp_path / "out").exists()
    assert warnings(tmp_path, capsys, tensors, CONFIG) == before
    assert {"model.safetensors", "config.json"} <= set(contents(tmp_path / "out"))


def test_nan_is_announced(tmp_path, capsys):
    tensors = fp8_blocks(normal(0.02))
    tensors["l.q_proj.weight"].view(torch.uint8)[:, 5] = 0x7F
    (line,) = warnings(tmp_path, capsys, tensors, CONFIG)
    assert "l.q_proj.weight" in line
    assert "nan" in line.lower()
