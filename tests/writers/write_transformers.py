"""transformers: FineGrainedFP8Config on load, saved again. Reference: its own Fp8Dequantize."""

import re
import sys
import tempfile
from pathlib import Path

import torch
from tiny_models import CONFIGS, case, exists, save_source, stored
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

# Sizes that the block does not divide are left unquantized by transformers, so the ragged models
# need small blocks.
SCHEMES = {
    "block32": {"weight_block_size": (32, 32)},
    "block16x64": {"weight_block_size": (16, 64)},
    "block128": {"weight_block_size": (128, 128)},
    "block32_ue8m0": {"weight_block_size": (32, 32), "scale_fmt": "ue8m0"},
    "mxfp8": {"weight_block_size": (1, 32), "scale_fmt": "ue8m0"},
    "tensor": {"weight_block_size": None},
}
DIVISIBLE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "head_dim": 64,
    "intermediate_size_mlp": 384,
}


PARTS = {
    "gate_proj": 0,
    "w1": 0,
    "up_proj": 1,
    "w3": 1,
    "down_proj": None,
    "w2": None,
}  # of the fused expert weights


def dequantize(quantizer, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dequantize what is FP8; a scale beside a weight left BF16 (ragged size) means nothing.

    transformers 5.24 saves each expert's weights but their scales fused,
    experts.gate_up_proj_scale_inv [E, n, k].
    """
    result = {}
    for name, tensor in weights.items():
        if tensor.dtype != torch.float8_e4m3fn:
            continue
        scale = weights.get(f"{name}_scale_inv")
        if scale is None:
            experts, index, part = re.fullmatch(
                r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name
            ).groups()
            half = PARTS[part]
            scale = weights[
                f"{experts}.{'down_proj' if half is None else 'gate_up_proj'}_scale_inv"
            ][int(index)]
            if half is not None and scale.shape[0] > 1:
                scale = scale.chunk(2)[half]
        operation = finegrained_fp8.Fp8Dequantize(quantizer)
        result[name] = operation._dequantize_one(tensor, scale, output_dtype=torch.float32)
    return result


def main(out: Path) -> None:
    # Quantizing needs a GPU for the forward pass only, which does not run here.
    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None
    sources = Path(tempfile.mkdtemp())
    for scheme, arguments in SCHEMES.items():
        for model in CONFIGS:
            if exists(out, scheme, model):
                continue
            with case(out, scheme, model) as (folder, reference):
                overrides = DIVISIBLE if scheme == "block128" else {}
                source = save_source(model, sources / f"{model}-{bool(overrides)}", overrides)
                config = FineGrainedFP8Config(
                    modules_to_not_convert=["lm_head", "gate", "router"], **arguments
                )
                quantized = AutoModelForCausalLM.from_pretrained(
                    source, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
                )
                quantized.save_pretrained(folder)
                reference |= dequantize(quantized.hf_quantizer, stored(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
