"""GPTQModel's FP8 packer, put into a checkpoint by hand. Reference: its own dequantize_weight.

Its whole pipeline needs a newer torch; the packer, its configuration and its dequantization are
what a checkpoint is.
"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.fp8 import TorchFP8Linear
from gptqmodel.quantization.config import FP8Config
from safetensors.torch import save_file
from tiny_models import build, case, exists

SCHEMES = {
    "row": {"weight_scale_method": "row"},
    "tensor": {"weight_scale_method": "tensor"},
    "block32": {"weight_scale_method": "block", "weight_block_size": (32, 32)},
    "row_e5m2": {"weight_scale_method": "row", "format": "float8_e5m2"},
}


def main(out: Path) -> None:
    for scheme, arguments in SCHEMES.items():
        for name in ["llama", "qwen3"]:
            if exists(out, scheme, name):
                continue
            with case(out, scheme, name) as (folder, reference):
                model = build(name)
                config = FP8Config(**arguments)
                tensors = dict(model.state_dict())
                for module_name, module in model.named_modules():
                    if not isinstance(module, torch.nn.Linear) or module_name == "lm_head":
                        continue
                    shape = {"in_features": module.in_features, "out_features": module.out_features}
                    packer = TorchFP8Linear(
                        bits=8,
                        group_size=-1,
                        sym=True,
                        desc_act=False,
                        **shape,
                        **config.quant_linear_init_kwargs(),
                    )
                    packer.pack_original(module, None, None)
                    weight = packer.dequantize_weight(dtype=torch.float32)  # (in, out)
                    reference[f"{module_name}.weight"] = weight.t()
                    tensors |= {
                        f"{module_name}.{key}": value for key, value in packer.state_dict().items()
                    }
                save_file(tensors, folder / "model.safetensors", {"format": "pt"})
                quantization = {
                    key: value for key, value in config.to_dict().items() if key != "meta"
                }
                document = model.config.to_dict() | {"quantization_config": quantization}
                (folder / "config.json").write_text(json.dumps(document, indent=2, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
