"""NVIDIA Model Optimizer: export_hf_checkpoint with its presets, and mtq.compress.

A smoothed weight (AWQ, SVDQuant) has no BF16 form of its own; its reference is the source.
"""

import copy
import sys
import warnings
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from from_source import EIGHT_BITS, FOUR_BITS, check, load, source_weights
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import (
    FP8QTensor,
    MXFP4QTensor,
    MXFP8QTensor,
    NVFP4QTensor,
    nvfp4_tensor,
)
from tiny_models import CONFIGS, build, case, exists

# Fused experts whose halves end inside a 128x128 block, and INT4 groups cut short, are beyond the
# exporter.
EVEN = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 384, "head_dim": 64}
for name in ["llama", "mixtral", "qwen3moe", "deepseekv3"]:
    kind, arguments = CONFIGS[name]
    changed = EVEN if name != "deepseekv3" else {n: v for n, v in EVEN.items() if n != "head_dim"}
    CONFIGS[f"{name}_even"] = kind, arguments | {n: v for n, v in changed.items() if n in arguments}

DENSE = ["llama", "qwen3"]
ALL = [*DENSE, "mixtral", "qwen3moe", "deepseekv3", "llama4", "gptoss"]

# scheme -> (presets of modelopt.torch.quantization, models)
PRESETS = {
    "fp8": (["FP8_DEFAULT_CFG"], ALL),
    "fp8_pc_pt": (["FP8_PER_CHANNEL_PER_TOKEN_CFG"], ALL),
    "fp8_2d_block": (
        ["FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"],
        [*DENSE, "mixtral_even", "qwen3moe_even", "deepseekv3_even", "llama4", "gptoss"],
    ),
    "nvfp4": (["NVFP4_DEFAULT_CFG"], ALL),
    "nvfp4_w4a16": (["W4A16_NVFP4_CFG"], ["llama", "qwen3moe"]),
    "nvfp4_mlp_only": (["NVFP4_MLP_ONLY_CFG"], ["llama", "mixtral"]),
    "nvfp4_experts_only": (["NVFP4_EXPERTS_ONLY_CFG"], ["qwen3moe", "llama4"]),
    "nvfp4_four_over_six": (["NVFP4_FOUR_OVER_SIX_CFG"], ["llama"]),
    "nvfp4_mse": (["NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"], ["llama"]),
    "nvfp4_awq_lite": (["NVFP4_AWQ_LITE_CFG"], ["llama"]),
    "nvfp4_svdquant": (["NVFP4_SVDQUANT_DEFAULT_CFG"], ["llama"]),
    "w4a8_nvfp4_fp8": (["W4A8_NVFP4_FP8_CFG"], ["llama", "qwen3", "mixtral", "qwen3moe", "llama4"]),
    "mxfp8": (["MXFP8_DEFAULT_CFG"], ALL),
    "mxfp4": (["MXFP4_DEFAULT_CFG"], ALL),
    "w4a8_mxfp4_fp8": (["W4A8_MXFP4_FP8_CFG"], ["llama", "qwen3moe"]),
    "int8_wo": (["INT8_WEIGHT_ONLY_CFG"], ["llama", "mixtral"]),
    "int8_sq": (["INT8_SMOOTHQUANT_CFG"], ["llama"]),
    "int4_awq": (["INT4_AWQ_CFG"], ["llama_even"]),
    "w4a8_awq": (["W4A8_AWQ_BETA_CFG"], ["llama_even"]),
    "fp8_kv": (["FP8_DEFAULT_CFG", "FP8_KV_CFG"], ["llama", "qwen3moe"]),
    "fp8_affine_kv": (["FP8_DEFAULT_CFG", "FP8_AFFINE_KV_CFG"], ["llama", "mixtral"]),
    "nvfp4_kv": (["NVFP4_DEFAULT_CFG", "NVFP4_KV_CFG"], ["llama"]),
    "nvfp4_affine_kv": (["NVFP4_DEFAULT_CFG", "NVFP4_AFFINE_KV_CFG"], ["llama", "qwen3"]),
}
COMPRESSED = {
    "compress_fp8": "FP8_DEFAULT_CFG",
    "compress_fp8_2d_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "compress_nvfp4": "NVFP4_DEFAULT_CFG",
    "compress_mxfp8": "MXFP8_DEFAULT_CFG",
}
SMOOTHED = {"nvfp4_awq_lite", "nvfp4_svdquant", "int8_sq", "int4_awq", "w4a8_awq"}


# The table has 0 for the code of -0, by which bits alone would differ.
nvfp4_tensor.e2m1_values[8] = -0.0


def fake_quantize(ctx, inputs, amax, *rest):
    """Stand in for the kernel, which needs a GPU, where calibration looks for the best scales."""
    scale = amax.float().reshape(-1, 1) / 6
    blocks = inputs.float().reshape(len(scale), -1) / scale
    codes = NVFP4QTensor._cast_fp4(blocks)
    return (
        (NVFP4QTensor.get_e2m1_values(inputs.device)[codes.long()] * scale)
        .reshape(inputs.shape)
        .to(inputs.dtype)
    )


tensor_quant.StaticBlockwiseFP4FakeQuantFunction.forward = fake_quantize
tensor_quant.DynamicBlockQuantizationFunction.forward = lambda ctx, inputs, *rest: inputs.clone()


def quantize(name: str, presets: list[str]) -> torch.nn.Module:
    model = build(name)
    model.config.architectures = [
        type(model).__name__
    ]  # As a model that was loaded has it; the exporter asks.
    config = copy.deepcopy(getattr(mtq, presets[0]))
    for more in presets[1:]:
        config["quant_cfg"] += copy.deepcopy(getattr(mtq, more))["quant_cfg"]
    tokens = torch.arange(4 * 64).reshape(4, 64) % 256
    return mtq.quantize(model, config, lambda model: model(tokens))


def dequantize(codes, scale, second, shape):
    """Dequantize a matrix by ModelOpt's own classes, in float32."""
    if codes.dtype == torch.uint8:
        width = {-1: shape[-1] // scale.shape[-1]}
        if scale.dtype == torch.uint8:
            return MXFP4QTensor(shape, torch.float32, codes).dequantize(
                scale=scale, block_sizes=width
            )
        return NVFP4QTensor(shape, torch.float32, codes).dequantize(
            scale=scale, double_scale=second, block_sizes=width
        )
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(shape, torch.float32, codes).dequantize(scale=scale)
    if (
        codes.dtype == torch.int8
    ):  # As from_quantized_weight in modelopt/torch/export/quant_utils.py.
        return codes.float() * scale.float()[:, None]
    blocks = None
    if scale.numel() > 1 and scale.ndim > 1:  # [rows/128, 1, columns/128, 1], and without the ones.
        # For Llama 4 and gpt-oss the exporter computes this grid for the transposed weight, then
        # quantizes by the same numbers reshaped (FP8QTensor.quantize): so the codes mean those.
        blocks, scale = {-1: 128, -2: 128}, scale.reshape([-(-n // 128) for n in shape])
    elif scale.numel() > 1:
        scale = scale[:, None]
    return FP8QTensor(shape, torch.float32, codes).dequantize(scale=scale, block_sizes=blocks)


def references(checkpoint: Path, source: dict) -> dict[str, torch.Tensor]:
    """Dequantize each weight of `checkpoint` that has a scale, experts one by one."""
    tensors, found = load(checkpoint), {}
    for name, codes in tensors.items():
        prefix = name if name.endswith("weight") else f"{name}_weight"
        scale = tensors.get(f"{prefix}_scale", tensors.get(f"{prefix}_quantizer._scale"))
        if scale is None or codes.element_size() > 1:
            continue
        second = tensors.get(f"{prefix}_scale_2", tensors.get(f"{prefix}_quantizer._double_scale"))
        shape = list(source[name].shape if name in source else codes.shape)
        if codes.ndim == 2:
            found[name] = dequantize(codes, scale, second, shape)
            continue
        scales = [scale] * len(codes) if scale.numel() == 1 else scale
        if (
            codes.dtype == torch.uint8 and codes.shape[1] < shape[1]
        ):  # Packed along the last dimension but one.
            parts = [
                dequantize(c.T, s.T, second, shape[:0:-1]).T
                for c, s in zip(codes, scales, strict=True)
            ]
        else:
            parts = [
                dequantize(c, s, second, shape[1:]) for c, s in zip(codes, scales, strict=True)
            ]
        found[name] = torch.stack(parts)
    return found


def main(out: Path):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for scheme, (presets, models) in PRESETS.items():
        for model in models:
            if not exists(out, scheme, model):
                with case(out, scheme, model) as (checkpoint, reference):
                    export_hf_checkpoint(quantize(model, presets), export_dir=checkpoint)
                    source = source_weights(model)
                    if scheme in SMOOTHED:
                        reference.update(source)
                    else:
                        reference.update(references(checkpoint, source))
                        check(reference, model, FOUR_BITS if "fp4" in scheme else EIGHT_BITS)
    mto.enable_huggingface_checkpointing()
    for scheme, preset in COMPRESSED.items():
        for model in ["llama", "qwen3"]:
            if not exists(out, scheme, model):
                with case(out, scheme, model) as (checkpoint, reference):
                    quantized = quantize(model, [preset])
                    mtq.compress(quantized)
                    quantized.save_pretrained(checkpoint)
                    reference.update(references(checkpoint, source_weights(model)))
                    check(reference, model, FOUR_BITS if "fp4" in scheme else EIGHT_BITS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
