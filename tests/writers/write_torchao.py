"""torchao through transformers' TorchAoConfig, saved to safetensors.

Reference: the tensor subclass's dequantize.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from tiny_models import CONFIGS, case, exists, save_source, stored
from torchao.float8 import inference
from torchao.prototype.mx_formats import (
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
    inference_workflow,
)
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    quant_api,
)
from torchao.quantization.quantize_.workflows.int4 import int4_tensor
from transformers import AutoModelForCausalLM, TorchAoConfig

EXPERTS = r"re:.*experts\.(gate_up_proj|down_proj)"
SCHEMES = {
    "float8_weight_only": lambda: Float8WeightOnlyConfig(),
    "float8_dynamic_row": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "float8_dynamic_tensor": lambda: Float8DynamicActivationFloat8WeightConfig(
        granularity=PerTensor()
    ),
    "float8_experts": lambda: FqnToConfig(
        {EXPERTS: Float8WeightOnlyConfig(), "_default": Float8WeightOnlyConfig()}
    ),
    "int8_weight_only": lambda: Int8WeightOnlyConfig(),
    "int8_weight_only_group": lambda: Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int8_dynamic": lambda: Int8DynamicActivationInt8WeightConfig(),
    "int8_dynamic_intx": lambda: Int8DynamicActivationIntxWeightConfig(
        weight_granularity=PerGroup(32)
    ),
    "intx_int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int4_plain": lambda: Int4WeightOnlyConfig(group_size=32, int4_packing_format="plain"),
    "int4_pre_scale": lambda: Int4WeightOnlyConfig(group_size=32, int4_packing_format="plain"),
    "intx_embeddings": lambda: FqnToConfig(
        {
            "model.embed_tokens": IntxWeightOnlyConfig(
                weight_dtype=torch.int8, granularity=PerGroup(32)
            ),
            "_default": Float8WeightOnlyConfig(),
        }
    ),
    "float8_block": lambda: Float8DynamicActivationFloat8WeightConfig(
        granularity=(PerBlock([1, 128]), PerBlock([128, 128]))
    ),
    "mxfp8": lambda: MXDynamicActivationMXWeightConfig(),
    "mxfp4": lambda: MXDynamicActivationMXWeightConfig(
        activation_dtype=torch.float4_e2m1fn_x2, weight_dtype=torch.float4_e2m1fn_x2
    ),
    "mxfp8_plain": lambda: MXDynamicActivationMXWeightConfig(),
    "mxfp4_plain": lambda: MXDynamicActivationMXWeightConfig(
        activation_dtype=torch.float4_e2m1fn_x2, weight_dtype=torch.float4_e2m1fn_x2
    ),
    "nvfp4_plain": lambda: NVFP4WeightOnlyConfig(),
    "nvfp4_weight_only": lambda: NVFP4WeightOnlyConfig(),
    "nvfp4_dynamic": lambda: NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False),
}
EVERYWHERE = ["float8_weight_only", "float8_dynamic_row", "float8_experts"]
# torchao refuses blocks that do not divide a weight.
OVERRIDES = {
    "float8_block": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "head_dim": 64,
    }
}


def allow_without_gpu() -> None:
    """Let pass the checks for a GPU that only the forward pass needs, and stand in for mslk's

    INT4 packing.
    """
    for module in (quant_api, inference):
        module.is_MI350 = lambda: True
        module.is_sm_at_least_89 = lambda: True
    inference_workflow.is_sm_at_least_100 = lambda: True

    def quantize_rows(w: torch.Tensor, group: int):
        groups = w.float().unflatten(-1, (-1, group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale, zero = (high - low) / 15, (high + low) / 2
        codes = ((groups - zero) / scale).round().clamp(-8, 7).to(torch.int8)
        return codes.flatten(-2), scale[..., 0].t().contiguous(), zero[..., 0].t().contiguous()

    int4_tensor.int4_row_quantize_zp = quantize_rows
    int4_tensor.pack_int4 = lambda x: ((x[:, 1::2] << 4) | (x[:, ::2] & 15)).contiguous()


@contextlib.contextmanager
def plain_scales(wanted: bool):
    """Have the MX and NVFP4 workflows store row-major scales where `wanted`.

    they swizzle them on their own.
    """
    to_mx, to_nvfp4 = MXTensor.to_mx, NVFP4Tensor.to_nvfp4
    if wanted:
        MXTensor.to_mx = lambda *args, **kwargs: to_mx(
            *args, **kwargs | {"is_swizzled_scales": False}
        )
        NVFP4Tensor.to_nvfp4 = lambda *args, **kwargs: to_nvfp4(
            *args, **kwargs | {"is_swizzled_scales": False}
        )
    yield
    MXTensor.to_mx, NVFP4Tensor.to_nvfp4 = to_mx, to_nvfp4


def dequantize(tensor: torch.Tensor) -> torch.Tensor:
    # Int4Tensor has no dequantize: its zeros stand in, since these must be refused.
    return (
        torch.zeros(tensor.shape)
        if isinstance(tensor, int4_tensor.Int4Tensor)
        else tensor.dequantize()
    )


def main(out: Path) -> None:
    allow_without_gpu()
    sources = Path(tempfile.mkdtemp())
    for scheme, make in SCHEMES.items():
        for model in CONFIGS if scheme in EVERYWHERE else ["llama", "qwen3moe"]:
            if exists(out, scheme, model):
                continue
            with (
                case(out, scheme, model) as (folder, reference),
                plain_scales(scheme.endswith("plain")),
            ):
                embeddings = scheme == "intx_embeddings"
                config = TorchAoConfig(
                    make(),
                    modules_to_not_convert=["gate", "router"] + ([] if embeddings else ["lm_head"]),
                    include_input_output_embeddings=embeddings,
                    untie_embedding_weights=embeddings,
                )
                overrides = OVERRIDES.get(scheme)
                quantized = AutoModelForCausalLM.from_pretrained(
                    save_source(model, sources / f"{model}-{bool(overrides)}", overrides),
                    quantization_config=config,
                    dtype=torch.bfloat16,
                    device_map={"": "cpu"},
                )
                if scheme == "int4_pre_scale":  # As torchao's AWQ and SmoothQuant leave it.
                    for weight in quantized.parameters():
                        if isinstance(weight, int4_tensor.Int4Tensor):
                            weight.act_pre_scale = torch.rand(weight.shape[1]) + 0.5
                quantized.save_pretrained(folder)
                names = " ".join(stored(folder))
                for name, weight in quantized.state_dict().items():
                    if type(weight).__name__ in ALLOWED_TENSORS_SUBCLASSES:
                        if (
                            model == "mixtral" and "block_sparse_moe" in names
                        ):  # What transformers calls mlp in memory.
                            name = name.replace(".mlp.", ".block_sparse_moe.")
                        reference[name] = dequantize(weight)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
