"""Checkpoints as quantization tools write them, compared with the tools' own dequantization.

FP8_WRITERS names a folder for one virtual environment per tool; without it everything here is
skipped. FP8_WRITERS_OUT (default: FP8_WRITERS with "-out" appended) keeps what the tools wrote,
one folder per tool with a folder per case in it: SCHEME-MODEL/checkpoint and
SCHEME-MODEL/reference.safetensors, or failed.txt where the tool itself failed. What exists is not
made again: delete OUT/TOOL or OUT/TOOL/CASE and OUT/TOOL/done to do so.

    FP8_WRITERS=/tmp/writers pytest tests/test_writers.py -m writers -s
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints as c
from fp8_cast_bf16 import CheckpointError, main

SCRIPTS = Path(__file__).parent / "writers"
WRITERS = os.environ.get("FP8_WRITERS")
OUT = Path(os.environ.get("FP8_WRITERS_OUT", f"{WRITERS}-out"))
CODES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8, torch.uint8,
         torch.int32}

pytestmark = [pytest.mark.writers, pytest.mark.skipif(
    not WRITERS, reason="needs FP8_WRITERS, a folder for the tools' virtual environments")]

# tool -> the arguments of one `pip install` after another. The last word of the last one is the
# distribution whose version the table shows. The tool's script is writers/write_TOOL.py, run as
# `python write_TOOL.py OUT/TOOL`.
TOOLS = {
    "transformers": ["torch==2.13.0", "numpy accelerate", "transformers"],
    "llmcompressor": [
        "torch==2.13.0",
        "numpy accelerate datasets loguru nvidia-ml-py pillow pyyaml requests tqdm",
        "transformers==5.17.0 compressed-tensors==0.19.0", "--no-deps llmcompressor==0.14.0.1"],
    "torchao": ["torch==2.13.0", "numpy accelerate", "transformers torchao"],
    "gptqmodel": [
        "torch==2.13.0",
        "numpy accelerate datasets dill ninja packaging pillow protobuf requests threadpoolctl",
        "torchao transformers", "defuser device-smi logbar pypcre tokenicer",
        "--no-deps gptqmodel"],
    "modelopt": ["torch==2.13.0", "numpy accelerate requests transformers<5.15", "nvidia-modelopt"],
    "quark": ["torch==2.13.0", "numpy accelerate transformers", "amd-quark"],
    "auto_round": ["torch==2.13.0", "numpy accelerate transformers compressed-tensors",
                   "auto-round"],
    "quanto": ["torch==2.13.0", "numpy accelerate transformers", "optimum-quanto"],
}

# tool -> {regular expression that matches the whole of SCHEME-MODEL: what the refusal says (a
# regular expression)}. The first match counts. What matches none must come out exact.
REFUSED: dict[str, dict[str, str]] = {
    "transformers": {},
    "llmcompressor": {r"(W4A16_.*_ASYM|W3A16_.*|W8A16_.*)-.*": "symmetric with num_bits 4"},
    "torchao": {
        r"int4_pre_scale-.*": "pre_scale",
        r"int4_plain-.*": r"_qdata|zero_point",
        r"(mxfp8|mxfp4|nvfp4_weight_only|nvfp4_dynamic)-.*": "swizzled",
    },
    "gptqmodel": {},
    "modelopt": {
        # Experts packed along the last dimension but one, and 128x128 grids of the transposed
        # weight.
        r"(nvfp4|nvfp4_experts_only|fp8_2d_block)-(llama4|gptoss)": r"experts\.",
        r"compress_.*": r"weight_quantizer",
        r"(nvfp4_awq_lite|int8_sq)-.*": "pre_quant_scale",
        r"(int4_awq|w4a8_awq)-.*": r"_proj\.weight \(U8",
        r"nvfp4_svdquant-.*": "pre_quant_scale|svdquant_lora",
    },
    "quark": {
        r"(amdfp4.*|fp8_e5m3|fp4_float_scale|mxfp6_.*)-.*": r"weight|e5m3|fp4|fp6",
        r"(int8_channel|int8_group|int4.*|uint.*|mixed_fp8_int4)-.*": r"zero_point|_proj\.weight",
    },
    "auto_round": {
        r"mxint4-.*": "mx_int|weight_packed",
        r"nvfp4_e5m3-.*": "nvfp4_v2|weight_packed",
        r"w[48]a16-.*": "qweight",
    },
    "quanto": {r".*": r"_data"},
}


def check(*command) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}"
    return done.stdout


def environment(tool: str) -> Path:
    """Make the tool's virtual environment where it is absent; return its interpreter."""
    folder = Path(WRITERS) / tool
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        check(sys.executable, "-m", "venv", folder)
        for arguments in TOOLS[tool]:
            check(python, "-m", "pip", "install", "-q", *arguments.split())
        (folder / "installed").touch()
    return python


def written_cases(tool: str, python: Path) -> list[Path]:
    folder = OUT / tool
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        check(python, SCRIPTS / f"write_{tool}.py", folder)
        (folder / "done").touch()
    return sorted(path for path in folder.iterdir() if path.is_dir())


def compare(case: Path, output: Path) -> str:
    """Say "exact", or what is wrong with the first tensor that differs and how many do."""
    reference, converted = load_file(case / "reference.safetensors"), c.load_checkpoint(output)
    wrong = [f"{name} is left {tensor.dtype}" for name, tensor in converted.items()
             if tensor.dtype in CODES and name not in reference]
    for name, tensor in reference.items():
        try:
            c.assert_same_bits(converted[name], c.canonical(tensor.bfloat16()))
        except (AssertionError, KeyError) as error:
            wrong.append(f"{name}: {str(error) or 'another dtype or shape'}")
    return f"WRONG: {wrong[0]} ({len(wrong)} of {len(reference)})" if wrong else "exact"


def verdict(case: Path, output: Path) -> str:
    if (case / "failed.txt").exists():
        return f"not written: {(case / 'failed.txt').read_text().strip()}"
    shutil.rmtree(output, ignore_errors=True)
    try:
        main(case / "checkpoint", output, workers=2)
    except CheckpointError as error:
        return f"WRONG: {output} was made" if output.exists() else f"refused: {error}"
    return compare(case, output)


def as_expected(found: str, tool: str, case: str) -> bool:
    message = next((text for cases, text in REFUSED[tool].items() if re.fullmatch(cases, case)), "")
    refused = bool(message) and found.startswith("refused: ") and re.search(message, found)
    return found.startswith("not written") or (bool(refused) if message else found == "exact")


@pytest.mark.parametrize("tool", TOOLS)
def test_what_the_tool_wrote_is_converted_exactly_or_refused_by_name(tool, tmp_path):
    python, failures = environment(tool), []
    name = TOOLS[tool][-1].split()[-1].split("=")[0]
    version = check(python, "-c", f"from importlib.metadata import version; "
                                  f"print(version('{name}'))").strip()
    print(f"\n| {'tool':12} | {'version':10} | {'scheme':28} | {'model':12} | verdict")
    for case in written_cases(tool, python):
        found = verdict(case, tmp_path / "output")
        scheme, model = case.name.rsplit("-", 1)
        good = as_expected(found, tool, case.name)
        print(f"| {tool:12} | {version:10} | {scheme:28} | {model:12} | {found}",
              "" if good else "  <- NOT AS EXPECTED")
        failures += [] if good else [f"{case.name}: {found}"]
    assert not failures, "\n".join(failures)
