"""llm-compressor.

oneshot with each scheme, saved compressed. Reference: compressed-tensors' own decompress.
"""

import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import CONFIGS, case, exists, save_source, stored
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast

IGNORE = ["lm_head", "re:.*gate$", "re:.*router.*"]
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


def weights(**arguments) -> dict:
    """Return a group of all linear layers with weights as `arguments` say and activations as

    they are.
    """
    return {
        "group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    }


def integer(bits: int, group: int | None, symmetric: bool = True) -> dict:
    strategy = "group" if group else "channel"
    return weights(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )


def attention(name: str, strategy: str) -> dict:
    """Return FP8 weights per row, and attention (queries, keys, values) in FP8."""
    activations = QuantizationArgs(**FP8, strategy=strategy, dynamic=False)
    return {
        "attention": QuantizationScheme(targets=[name], input_activations=activations),
        "group_0": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
    }


CACHE = QuantizationArgs(**FP8, strategy="tensor", dynamic=False)
PRESETS = [
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "MXFP8",
    "NVFP4",
    "NVFP4A16",
    "MXFP4",
    "MXFP4A16",
    "W8A8",
]
SCHEMES = {name: {"scheme": name, "targets": ["Linear"]} for name in PRESETS} | {
    "FP8_TENSOR_W": {"config_groups": weights(**FP8, strategy="tensor")},
    "FP8_GROUP32": {"config_groups": weights(**FP8, strategy="group", group_size=32)},
    "W4A16_G32": {"config_groups": integer(4, 32)},
    "W4A16_G128": {"config_groups": integer(4, 128)},
    "W4A16_CHANNEL": {"config_groups": integer(4, None)},
    "W4A16_G32_ASYM": {"config_groups": integer(4, 32, symmetric=False)},
    "W4A16_CHANNEL_ASYM": {"config_groups": integer(4, None, symmetric=False)},
    "W8A16_G32": {"config_groups": integer(8, 32)},
    "W8A16_CHANNEL": {"config_groups": integer(8, None)},
    "W8A16_CHANNEL_ASYM": {"config_groups": integer(8, None, symmetric=False)},
    "W3A16_G32": {"config_groups": integer(3, 32)},
    "W4AFP8_G32": {
        "config_groups": {
            "group_0": QuantizationScheme(
                targets=["Linear"],
                weights=QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32),
                input_activations=QuantizationArgs(**FP8, strategy="token", dynamic=True),
            )
        }
    },
    "FP8_KV": {"scheme": "FP8_DYNAMIC", "targets": ["Linear"], "kv_cache_scheme": CACHE},
    "FP8_ATTENTION": {"config_groups": attention("re:.*self_attn$", "tensor")},
    "FP8_ATTENTION_HEAD": {"config_groups": attention("re:.*self_attn$", "attn_head")},
    "MIXED": {
        "config_groups": {
            "group_0": preset_name_to_scheme("FP8_DYNAMIC", ["re:.*self_attn.*_proj$"]),
            "group_1": preset_name_to_scheme(
                "NVFP4A16", [r"re:.*(mlp|feed_forward|experts|moe).*(_proj|w\d)$"]
            ),
        }
    },
}
EVERYWHERE = [
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4A16",
    "MXFP4A16",
    "W4A16_G32",
    "W4A16_CHANNEL",
    "MIXED",
]
# Groups of 128 must divide the rows' length; packed rows of 420 do not fill their last int32.
OVERRIDES = {
    "W4A16_G128": {
        "hidden_size": 384,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "head_dim": 64,
    },
    "W4A16_CHANNEL": {"intermediate_size": 420, "moe_intermediate_size": 164},
    "W4A16_CHANNEL_ASYM": {"intermediate_size": 420, "moe_intermediate_size": 164},
}


def dequantize(
    schemes: list[QuantizationScheme], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    result = {}
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        local = {
            key[len(module) + 1 :]: t
            for key, t in tensors.items()
            if key.rpartition(".")[0] == module
        }
        packed = "weight_global_scale" in local if len(schemes) > 1 else None
        scheme = next(s for s in schemes if packed is None or packed == ("nvfp4" in s.format.value))
        compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
        result[f"{module}.weight"] = compressor.decompress(local, scheme)["weight"]
    return result


def main(out: Path) -> None:
    # Patching the experts' classes looks into every module of transformers; these aliases would
    # import torchvision.
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and getattr(module, "__file__", "") is None:
            del sys.modules[name]
    Llama4TextConfig.text_config = property(
        lambda self: self
    )  # Expected of the experts' configuration.
    sources = Path(tempfile.mkdtemp())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0})), pad_token="a"
    )
    tokens = torch.arange(3, 35)[None]
    data = DataLoader(
        [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}] * 2, batch_size=None
    )
    for scheme, arguments in SCHEMES.items():
        for model in CONFIGS if scheme in EVERYWHERE else ["llama", "qwen3moe"]:
            if exists(out, scheme, model):
                continue
            with case(out, scheme, model) as (folder, reference):
                overrides = OVERRIDES.get(scheme)
                source = save_source(
                    model, sources / f"{model}-{scheme if overrides else ''}", overrides
                )
                with load_quantizable_moe():
                    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
                recipe = QuantizationModifier(ignore=IGNORE, **arguments)
                oneshot(
                    model=loaded,
                    dataset=data,
                    recipe=recipe,
                    processor=tokenizer,
                    num_calibration_samples=2,
                )
                loaded.save_pretrained(folder, save_compressed=True)
                found = [
                    getattr(module, "quantization_scheme", None) for module in loaded.modules()
                ]
                found = {s.format: s for s in found if s is not None and s.weights is not None}
                reference |= dequantize(list(found.values()), stored(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
