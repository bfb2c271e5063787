"""Intel AutoRound: rounding to nearest (iters=0) by its presets, in three of its formats.

For the reference its own inference layers dequantize where it has some
(auto_round.experimental.qmodules); FP8 is code x scale, as in WeightFP8ActFP8StaticQuantLinear.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from auto_round import AutoRound
from auto_round.experimental import qmodules
from auto_round.schemes import PRESET_SCHEMES
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from from_source import EIGHT_BITS, FOUR_BITS, check, load, source_weights
from tiny_models import CONFIGS, build, case, exists
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DENSE = ["llama", "qwen3"]
ALL = list(CONFIGS)
MANY = ["llama", "mixtral", "qwen3moe"]
W8 = {"bits": 8, "act_bits": 16, "data_type": "fp"}

# scheme -> (preset or what AutoRound takes in its place, its format, models)
SCHEMES = {
    "fp8_tensor": (
        W8 | {"group_size": 0},
        "auto_round",
        [*DENSE, "mixtral", "qwen3moe", "deepseekv3"],
    ),
    "fp8_channel": (W8 | {"group_size": -1}, "auto_round", ALL),
    "fp8_group": (W8 | {"group_size": 32}, "auto_round", DENSE),
    "fp8_block": ("FP8_BLOCK", "auto_round", ALL),
    "fp8_static": ("FP8_STATIC", "auto_round", [*DENSE, "mixtral"]),
    "mxfp4": ("MXFP4", "auto_round", ALL),
    "mxfp8": ("MXFP8", "auto_round", ALL),
    "nvfp4": ("NVFP4", "auto_round", MANY),
    "nvfp4_e5m3": ("NVFP4_E5M3", "auto_round", ["llama"]),
    "mxint4": ("MXINT4", "auto_round", MANY),
    "w4a16": ("W4A16", "auto_round", ["llama", "mixtral"]),
    "w8a16": ("W8A16", "auto_round", ["llama"]),
    "fp8_block_plain": ("FP8_BLOCK", "fp8", ALL),
    "ct_fp8_block": ("FP8_BLOCK", "llm_compressor", MANY),
    "ct_fp8_static": ("FP8_STATIC", "llm_compressor", ["llama"]),
    "ct_mxfp4": ("MXFP4", "llm_compressor", MANY),
    "ct_mxfp8": ("MXFP8", "llm_compressor", ["llama"]),
    "ct_nvfp4": ("NVFP4", "llm_compressor", MANY),
    "ct_w4a16": ("W4A16G32", "llm_compressor", ["llama", "qwen3moe"]),
    "ct_int8": ("INT8", "llm_compressor", ["llama"]),
}
LAYERS = {
    "mxfp4": qmodules.MXFP4QuantLinear,
    "mxint4": qmodules.MXINT4QuantLinear,
    "nvfp4": qmodules.NVFP4QuantLinear,
    "mxfp8": qmodules.MXFP8QuantLinear,
}


def write(name: str, scheme, kind: str, checkpoint: Path):
    words = Tokenizer(models.WordLevel({str(n): n for n in range(256)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    model = build(name)
    model.config.architectures = [type(model).__name__]
    arguments = {"scheme": scheme} if isinstance(scheme, str) else scheme
    data = [{"input_ids": torch.arange(n, n + 64)[None] % 256} for n in range(0, 256, 64)]
    rounded = AutoRound(
        model,
        tokenizer=tokenizer,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
        dataset=data,
        seqlen=64,
        nsamples=4,
        batch_size=1,
        low_cpu_mem_usage=False,
        **arguments,
    )
    rounded._get_export_dir = lambda folder, kind: (
        folder
    )  # Not in a folder that it names after the scheme.
    rounded.quantize_and_save(output_dir=str(checkpoint), format=kind)


def dequantize(scheme: str, tensors: dict, module: str) -> torch.Tensor:
    mine = {
        name.removeprefix(f"{module}."): t
        for name, t in tensors.items()
        if name.startswith(f"{module}.weight")
    }
    layer = LAYERS.get(scheme.removeprefix("ct_"))
    if layer is not None:
        codes = mine.get("weight_packed", mine.get("weight"))
        columns = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
        linear = layer(
            columns,
            codes.shape[0],
            PRESET_SCHEMES[scheme.removeprefix("ct_").upper()],
            dtype=torch.float32,
        )
        if (
            "weight_global_scale" in mine
        ):  # Rounded in the order of compressed-tensors, whose format this is.
            mine["weight_scale"] = mine["weight_scale"].float() / mine["weight_global_scale"]
            mine["weight_global_scale"] = torch.ones(1)
        for name, tensor in mine.items():
            setattr(linear, name, tensor)
        return linear.dequant_weight_online().float()
    if scheme == "ct_w4a16":
        shape = torch.Size(mine["weight_shape"].tolist())
        mine["weight"] = unpack_from_int32(mine["weight_packed"], 4, shape)
    codes, scale = (
        mine["weight"].float(),
        mine.get("weight_scale", mine.get("weight_scale_inv")).float(),
    )
    rows, columns = codes.shape
    if "block" in scheme:
        scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    elif scale.numel() > 1:  # One per row, or flattened groups of a row.
        scale = scale.reshape(rows, -1).repeat_interleave(columns // (scale.numel() // rows), 1)
    return codes * scale


def main(out: Path):
    torch.set_num_threads(2)
    for scheme, (preset, kind, names) in SCHEMES.items():
        for model in names:
            if not exists(out, scheme, model):
                with case(out, scheme, model) as (checkpoint, reference):
                    write(model, preset, kind, checkpoint)
                    tensors = load(checkpoint)
                    if scheme in {"w4a16", "w8a16", "nvfp4_e5m3"}:
                        reference.update(source_weights(model))
                        continue
                    modules = {
                        name.rpartition(".")[0] for name in tensors if ".weight_scale" in name
                    }
                    reference.update(
                        {f"{m}.weight": dequantize(scheme, tensors, m) for m in modules}
                    )
                    check(reference, model, FOUR_BITS if "4" in scheme else EIGHT_BITS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
