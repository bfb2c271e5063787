"""optimum-quanto: QuantizedModelForCausalLM.save_pretrained, `weight._data` and `weight._scale`."""

import sys
from pathlib import Path

import torch
from from_source import EIGHT_BITS, FOUR_BITS, check
from optimum.quanto import (
    QTensor,
    QuantizedModelForCausalLM,
    qfloat8_e4m3fn,
    qfloat8_e5m2,
    qint4,
    qint8,
)
from tiny_models import build, case, exists

# scheme -> (type of the weights, models)
SCHEMES = {
    "qfloat8": (qfloat8_e4m3fn, ["llama", "qwen3", "mixtral", "deepseekv3"]),
    "qfloat8_e5m2": (qfloat8_e5m2, ["llama"]),
    "qint8": (qint8, ["llama", "qwen3moe"]),
    "qint4": (qint4, ["llama"]),
}


def main(out: Path):
    torch.set_num_threads(1)
    for scheme, (kind, models) in SCHEMES.items():
        for model in models:
            if not exists(out, scheme, model):
                with case(out, scheme, model) as (checkpoint, reference):
                    quantized = QuantizedModelForCausalLM.quantize(
                        build(model), weights=kind, exclude="lm_head"
                    )
                    quantized.save_pretrained(checkpoint)
                    for path, module in quantized._wrapped.named_modules():
                        if isinstance(getattr(module, "weight", None), QTensor):
                            reference[f"{path}.weight"] = module.weight.dequantize()
                    check(
                        reference,
                        model,
                        EIGHT_BITS if kind in (qfloat8_e4m3fn, qint8) else FOUR_BITS,
                    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
