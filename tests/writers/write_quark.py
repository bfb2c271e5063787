"""AMD Quark: the schemes of its templates and the specs behind them, by export_safetensors.

Read back by its own import_model_from_safetensors, whose layers dequantize for the reference.
"""

import copy
import os
import sys
from pathlib import Path

import torch
from from_source import EIGHT_BITS, FOUR_BITS, check, load, source_weights
from quark.torch import (
    LLMTemplate,
    ModelQuantizer,
    export_safetensors,
    import_model_from_safetensors,
)
from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
from quark.torch.quantization.config import config as specs
from quark.torch.quantization.config.config import QConfig, QLayerConfig
from quark.torch.utils.llm.model_preparation import preprocess_for_quantization
from tiny_models import build, case, exists

TEMPLATES = {
    "llama": "llama",
    "qwen3": "qwen3",
    "mixtral": "mixtral",
    "qwen3moe": "qwen3_moe",
    "deepseekv3": "deepseek_v3",
    "llama4": "llama4",
    "gptoss": "gpt_oss",
}
DENSE = ["llama", "qwen3"]
ALL = list(TEMPLATES)

# scheme -> (scheme of LLMTemplate, further arguments, models)
SCHEMES = {
    "fp8": ("fp8", {}, ALL),
    "fp8_kv": ("fp8", {"kv_cache_scheme": "fp8"}, ["llama", "qwen3moe"]),
    "fp8_attention": ("fp8", {"kv_cache_scheme": "fp8", "attention_scheme": "fp8"}, ["llama"]),
    "ptpc_fp8": ("ptpc_fp8", {}, ALL),
    "mxfp4": ("mxfp4", {}, ALL),
    "mxfp4_weight_only": ("mxfp4_weight_only", {}, ["llama"]),
    "mxfp4_fp8": ("mxfp4_fp8", {}, ["llama"]),
    "mxfp6_e3m2": ("mxfp6_e3m2", {}, ["llama"]),
    "nvfp4": ("nvfp4", {}, ["llama", "qwen3moe"]),
    "amdfp4": ("amdfp4", {}, ["llama", "mixtral"]),
    "amdfp4_g32": ("amdfp4_g32", {}, ["llama"]),
    "amdfp4_global16": ("amdfp4_global16", {}, ["llama"]),
    "int8": ("int8", {}, DENSE),
    "int4_wo_32": ("int4_wo_32", {}, ["llama"]),
    "uint4_wo_32": ("uint4_wo_32", {}, ["llama"]),
    "int4_fp8": ("int4_fp8", {}, ["llama"]),
    "mixed_fp8_mxfp4": (
        "mxfp4",
        {"layer_config": {"*self_attn*": "ptpc_fp8"}},
        ["llama", "qwen3moe"],
    ),
    "mixed_fp8_int4": ("int4_wo_32", {"layer_config": {"*self_attn*": "ptpc_fp8"}}, ["llama"]),
}
GROUP = {"ch_axis": 1, "group_size": 32}
# scheme -> (spec of the weights, its arguments)
SPECS = {
    "fp8_e5m2": ("FP8E5M2PerTensorSpec", {}),
    "fp8_e5m2_channel": ("FP8E5M2PerChannelSpec", {"ch_axis": 0}),
    "fp8_e5m3": ("FP8E5M3PerTensorSpec", {}),
    "fp4_float_scale": ("FP4PerGroupSpec", {"ch_axis": -1, "group_size": 32, "is_dynamic": False}),
    "int8_group": ("Int8PerGroupSpec", GROUP),
    "int8_channel": ("Int8PerChannelSpec", {"ch_axis": 0}),
    "int8_channel_symmetric": ("Int8PerChannelSpec", {"ch_axis": 0, "symmetric": True}),
    "uint8_tensor": ("Uint8PerTensorSpec", {"symmetric": False}),
    "uint8_channel": ("Uint8PerChannelSpec", {"ch_axis": 0, "symmetric": False}),
    "uint8_group": ("Uint8PerGroupSpec", GROUP),
}
# What Quark does not read back: E5M3 has no sign, and two-stage E5M3 scales fail to load.
UNREAD = {"fp8_e5m3", "amdfp4_global16"}


def write(name: str, config: QConfig, checkpoint: Path):
    """Quantize the model `name` and export it as Quark's own example of language models does."""
    tokens = [torch.arange(n, n + 64)[None] % 256 for n in range(0, 256, 64)]
    model = build(name)
    model.config.architectures = [type(model).__name__]
    preprocess_for_quantization(model)
    quantizer = ModelQuantizer(config)
    model = quantizer.freeze(quantizer.quantize_model(model, tokens))
    with torch.no_grad():
        export_safetensors(model, checkpoint)


def read(scheme: str, model: str, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return what Quark itself reads from `checkpoint`, in float32, under its names."""
    if scheme in UNREAD:
        return source_weights(model)
    tensors, found = load(checkpoint), {}
    if (
        scheme == "fp8_attention"
    ):  # The reader misses self_attn.prob_output_scale, which the writer leaves out.
        return {
            n: t.float() * tensors[f"{n}_scale"].float()
            for n, t in tensors.items()
            if f"{n}_scale" in tensors
        }
    for path, module in import_model_from_safetensors(
        None, str(checkpoint), device="cpu"
    ).named_modules():
        if isinstance(module, QParamsLinear) and module.weight_quantizer is not None:
            found[f"{path}.weight"] = module.float()._get_qweight(module.weight).float()
    return found


def main(out: Path):
    torch.set_num_threads(1)
    cases = {}
    for scheme, (name, more, models) in SCHEMES.items():
        for model in models:
            template = LLMTemplate.get(TEMPLATES[model])
            cases[scheme, model] = lambda t=template, n=name, more=more: t.get_config(
                scheme=n, **copy.deepcopy(more)
            )
    for scheme, (spec, arguments) in SPECS.items():
        weight = getattr(specs, spec)(**arguments)
        cases[scheme, "llama"] = lambda w=weight: QConfig(
            global_quant_config=QLayerConfig(weight=w.to_quantization_spec()), exclude=["lm_head"]
        )
    for (scheme, model), config in cases.items():
        if not exists(out, scheme, model):
            with case(out, scheme, model) as (checkpoint, reference):
                write(model, config(), checkpoint)
                reference.update(read(scheme, model, checkpoint))
                four = any(word in scheme for word in ["fp4", "int4", "mxfp6", "e5m"])
                check(reference, model, FOUR_BITS if four else EIGHT_BITS)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    main(Path(sys.argv[1]))
