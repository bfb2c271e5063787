"""What a tool's own dequantization is held against: the weights that the tool was given."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import build


def source_weights(model: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the tiny model `model` under the names that its BF16 checkpoint has."""
    with tempfile.TemporaryDirectory() as folder:
        build(model).save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        n: t
        for path in sorted(checkpoint.glob("*.safetensors"))
        for n, t in load_file(path).items()
    }


# More than rounding takes a weight away: 0.027 for E4M3, 0.1 to 0.16 for 4 bits.
EIGHT_BITS, FOUR_BITS = 0.04, 0.2


def check(reference: dict[str, torch.Tensor], model: str, limit: float):
    """Raise if a weight of `reference` is further from the source than `limit` times its norm.

    Without this a misread layout would only show that two readings agree. Names that the source
    does not have (tools that split fused experts) are printed.
    """
    source = source_weights(model)
    for name, weight in reference.items():
        if name not in source:
            print(f"{name} is not a name of the BF16 checkpoint")
            continue
        expected = source[name].float()
        assert weight.shape == expected.shape, (
            f"{name} is {list(weight.shape)}, not {list(expected.shape)}"
        )
        error = ((weight.float() - expected).norm() / expected.norm()).item()
        assert error < limit, f"{name} differs from the source by {error:.3f}"
