"""Make an FP8 checkpoint with DeepSeek-V3's names and shape relations, for a demo or a measurement.

    python tests/make_checkpoint.py OUT [--size BYTES] [--shards N]

Weights are float8_e4m3fn with one float32 scale per 128x128 block, ragged at both edges as in
kv_a_proj_with_mqa (576 rows, a multiple of 64 only); norms, embedding and router bias are not
quantized. Uses torch alone: safetensors' own writer would ask for numpy.
"""

import argparse
import ctypes
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

with warnings.catch_warnings():  # torch warns when numpy is not installed; nothing here uses it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9}


def quantize_per_block(weight: torch.Tensor, block: int = 128) -> tuple:
    """Return the float8_e4m3fn codes of a float32 matrix and its float32 scales, one a block."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % block, 0, -rows % block))
    blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :cols]
    return codes.contiguous().to(torch.float8_e4m3fn), scales


def layer_tensors(layer: int, hidden: int, generator: torch.Generator) -> Iterator[tuple]:
    """Yield one decoder layer: attention with ragged shapes, a router, and two experts."""
    prefix = f"model.layers.{layer}."
    intermediate = hidden * 2 // 7
    up, down = (intermediate, hidden), (hidden, intermediate)
    shapes = {
        "self_attn.q_a_proj": (1536 * hidden // 7168, hidden),
        "self_attn.kv_a_proj_with_mqa": (576 * hidden // 7168 + 3, hidden),
        "mlp.shared_experts.up_proj": up, "mlp.shared_experts.down_proj": down}
    for expert in range(2):
        shapes |= {f"mlp.experts.{expert}.{name}": up for name in ("gate_proj", "up_proj")}
        shapes[f"mlp.experts.{expert}.down_proj"] = down
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.02
        codes, scales = quantize_per_block(weight)
        yield f"{prefix}{name}.weight", codes
        yield f"{prefix}{name}.weight_scale_inv", scales
    yield f"{prefix}input_layernorm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield f"{prefix}mlp.gate.weight", torch.randn(2, hidden, generator=generator).bfloat16()
    yield f"{prefix}mlp.gate.e_score_correction_bias", torch.randn(2, generator=generator)


def header_bytes(tensors: list[tuple[str, str, list[int]]]) -> tuple[bytes, int]:
    """Return what a safetensors file of such names, dtypes and shapes begins with (the header's
    length and the header), and how many bytes follow.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        end = offset + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, _ = header_bytes([(name, DTYPES[t.dtype], list(t.shape)) for name, t in ordered])
    with open(path, "wb") as file:
        file.write(header)
        for _, tensor in ordered:
            file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def make_checkpoint(out: Path, size: int, shards: int) -> None:
    """Write a checkpoint of about `size` bytes in `shards` files with index and config."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    hidden = 7168 if size >= 10**9 else 1024
    weight_map, total = {}, 0
    embedding = torch.randn(64, hidden, generator=generator).bfloat16()
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors, held = ({"model.embed_tokens.weight": embedding} if not shard else {}), 0
        for layer in range(shard, 10**9, shards):
            if held >= size / shards:
                break
            made = dict(layer_tensors(layer, hidden, generator))
            held += sum(tensor.nbytes for tensor in made.values())
            tensors |= made
        save_file(tensors, out / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                    "weight_block_size": [128, 128]}
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
              "hidden_size": hidden, "quantization_config": quantization, "torch_dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{out}: {shards} shards, {len(weight_map)} tensors, {total} bytes")


def deepseek_v3_tensors() -> Iterator[tuple[str, str, list[int]]]:
    """Yield name, dtype and shape of every tensor of DeepSeek-V3, its 62nd layer (MTP) included."""
    hidden = 7168
    attention = {"q_a_proj": (1536, hidden), "q_b_proj": (24576, 1536), "o_proj": (hidden, 16384)}
    attention |= {"kv_a_proj_with_mqa": (576, hidden), "kv_b_proj": (32768, 512)}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    yield "model.embed_tokens.weight", "BF16", [129280, hidden]
    for layer in range(62):
        prefix = f"model.layers.{layer}."
        weights = {f"self_attn.{name}": shape for name, shape in attention.items()}
        parts = {"mlp.": 18432}
        if layer >= 3:
            parts = {f"mlp.experts.{expert}.": 2048 for expert in range(256)}
            parts["mlp.shared_experts."] = 2048
            yield prefix + "mlp.gate.weight", "BF16", [256, hidden]
            yield prefix + "mlp.gate.e_score_correction_bias", "F32", [256]
        for part, size in parts.items():
            weights |= {part + name: (size, hidden) for name in ("gate_proj", "up_proj")}
            weights[part + "down_proj"] = (hidden, size)
        for name, (rows, cols) in weights.items():
            yield f"{prefix}{name}.weight", "F8_E4M3", [rows, cols]
            yield f"{prefix}{name}.weight_scale_inv", "F32", [-(-rows // 128), -(-cols // 128)]
        for name, size in norms.items():
            yield f"{prefix}{name}.weight", "BF16", [size]
    prefix = "model.layers.61."
    yield prefix + "eh_proj.weight", "BF16", [hidden, 2 * hidden]
    for name in ("embed_tokens", "shared_head.head"):
        yield f"{prefix}{name}.weight", "BF16", [129280, hidden]
    for name in (prefix + "enorm", prefix + "hnorm", prefix + "shared_head.norm", "model.norm"):
        yield name + ".weight", "BF16", [hidden]
    yield "lm_head.weight", "BF16", [129280, hidden]


def make_layout(out: Path, tensors: list[tuple[str, str, list[int]]], shards: int) -> None:
    """Write shards of the given tensors as sparse files, which hold zeros and take no room."""
    out.mkdir(parents=True, exist_ok=True)
    weight_map, each = {}, -(-len(tensors) // shards)
    for shard in range(shards):
        some = tensors[shard * each : (shard + 1) * each]
        header, size = header_bytes(some)
        file_name = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        weight_map |= dict.fromkeys((name for name, *_ in some), file_name)
        with open(out / file_name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def byte_count(text: str) -> int:
    return int(float(text.rstrip("KMG")) * SUFFIXES.get(text[-1], 1))


if __name__ == "__main__":
    description = "Make an FP8 checkpoint with DeepSeek-V3's names and shapes."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--size", type=byte_count, default=8 * 10**6,
                        help="bytes, as 8M or 2.8G (default 8M)")
    parser.add_argument("--shards", type=int, default=2, help="number of files (default 2)")
    options = parser.parse_args()
    make_checkpoint(options.out, options.size, options.shards)
