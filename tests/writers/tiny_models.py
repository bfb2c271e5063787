"""Tiny models with random weights (normal, std 0.02) and ragged shapes, and each case's folder.

The scripts beside this file run in the tool's own environment: `python write_TOOL.py OUT`. Each
of them writes OUT/SCHEME-MODEL/checkpoint and OUT/SCHEME-MODEL/reference.safetensors (names of
models have no hyphen).
"""

import contextlib
import shutil
import traceback
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

SMALL = {
    "hidden_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SMALL |= {"max_position_embeddings": 64, "tie_word_embeddings": False}

# model -> (configuration class, its arguments). No size that a weight has is a multiple of 128 but
# 256.
CONFIGS = {
    "llama": ("LlamaConfig", SMALL | {"intermediate_size": 416, "head_dim": 48}),
    "qwen3": (
        "Qwen3Config",
        SMALL | {"hidden_size": 320, "intermediate_size": 416, "head_dim": 64},
    ),
    "mixtral": (
        "MixtralConfig",
        SMALL | {"intermediate_size": 416, "num_local_experts": 4, "head_dim": 48},
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        SMALL
        | {"intermediate_size": 416, "moe_intermediate_size": 160, "num_experts": 4, "head_dim": 48}
        | {"num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "deepseekv3": (
        "DeepseekV3Config",
        SMALL
        | {
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "intermediate_size": 416,
            "moe_intermediate_size": 160,
        }
        | {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        }
        | {
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        SMALL
        | {
            "intermediate_size": 160,
            "intermediate_size_mlp": 416,
            "num_local_experts": 4,
            "head_dim": 48,
        }
        | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    ),
    "gptoss": (
        "GptOssConfig",
        SMALL
        | {
            "intermediate_size": 160,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 48,
        },
    ),
}


def build(
    name: str, dtype: torch.dtype = torch.bfloat16, overrides: dict | None = None
) -> torch.nn.Module:
    """Return the model `name` in `dtype`: matrices normal with std 0.02, the rest as initialized.

    `overrides` replaces those of its configuration's arguments that it has.
    """
    kind, arguments = CONFIGS[name]
    arguments = arguments | {
        key: value for key, value in (overrides or {}).items() if key in arguments
    }
    config = getattr(transformers, kind)(
        **arguments, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    return model.eval()


def save_source(name: str, folder: Path, overrides: dict | None = None) -> Path:
    """Save the model `name` in BF16 to `folder`, where absent, for tools that quantize as they

    load.
    """
    if not (folder / "config.json").exists():
        build(name, overrides=overrides).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the *.safetensors files in `folder`."""
    return {
        name: t
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, t in load_file(path).items()
    }


@contextlib.contextmanager
def case(out: Path, scheme: str, model: str):
    """Yield (folder for the checkpoint, reference to fill in by name), then write the reference.

    What exists is skipped by the caller: `if not exists(out, scheme, model)`. An exception
    becomes failed.txt.
    """
    folder = Path(out) / f"{scheme}-{model}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoint").mkdir(parents=True)
    reference: dict[str, torch.Tensor] = {}
    try:
        yield folder / "checkpoint", reference
        assert reference, "no reference"
        save_file(
            {n: t.detach().cpu().contiguous().clone() for n, t in reference.items()},
            folder / "reference.safetensors",
        )
    except Exception as error:
        traceback.print_exc()
        (folder / "failed.txt").write_text(f"{type(error).__name__}: {error}"[:500])


def exists(out: Path, scheme: str, model: str) -> bool:
    folder = Path(out) / f"{scheme}-{model}"
    return (folder / "reference.safetensors").exists() or (folder / "failed.txt").exists()
