"""The Triton kernel: compiled for absent GPUs, interpreted, and run where there is a GPU."""

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernel
from checkpoints import assert_same_bits, dequantized, every_code

ROOT = Path(__file__).parent.parent
triton = pytest.importorskip("triton", reason="the Triton kernel needs triton")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# rows, columns, block, rows of a part
CASES = [
    (130, 300, (128, 128), 130),
    (64, 100, (1, 32), 64),
    (60, 40, (16, 16), 20),
    (9, 7, (2, 3), 9),
    (33, 50, (33, 50), 33),
    (33, 50, (1, 50), 33),
    (12, 50, (12, 1), 12),
    (5, 2000, (1, 2000), 5),
]


@functools.cache
def compiled(backend: str, arch: int | str, number_format: str, block_size_k: int):
    """Compile the kernel as it would be launched on 16-byte aligned operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.weight_dequant_kernel()
    fmt = kernel.FORMATS[number_format]
    constants = {
        "EXPONENT_BITS": fmt.exponent_bits,
        "SHIFT": fmt.shift,
        "MASK": fmt.mask,
        "RESCALE": fmt.rescale,
        "SPECIAL": fmt.special,
        "BLOCK_SIZE_M": 4,
        "BLOCK_SIZE_G": 1024 // block_size_k,
        "BLOCK_SIZE_K": block_size_k,
    }
    pointers = {"codes_ptr": "*u8", "scales_ptr": "*fp32", "out_ptr": "*i16"}
    names = list(inspect.signature(function.fn).parameters)
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = [*pointers, "M", "N", "row", "col", "block_rows", "block_cols"]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    return triton.compile(ASTSource(function, signature, constants, attributes), target=target)


@pytest.mark.parametrize("number_format", kernel.FORMATS)
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_kernel_compiles_for_nvidia_without_fp8_types_or_flushing(arch, number_format):
    ptx = compiled("cuda", arch, number_format, 128).asm["ptx"]
    assert "e4m3" not in ptx
    assert "e5m2" not in ptx
    assert ".ftz" not in ptx


@pytest.mark.parametrize("block_size_k", [128, 32])
def test_kernel_reads_and_writes_16_bytes_at_a_time(block_size_k):
    ptx = compiled("cuda", 90, "E4M3", block_size_k).asm["ptx"]
    memory = [line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line]
    wide = [line for line in memory if ".v4.b32" in line]
    assert len(wide) >= 6
    assert all("ld.global.b32" in line for line in memory if line not in wide)  # scales


def test_kernel_compiles_for_amd():
    try:
        assert compiled("hip", "gfx942", "E4M3", 128).asm["amdgcn"]
    except Exception as error:
        if "ld.lld" not in str(error):
            raise
        pytest.skip("this triton needs ROCm's linker to finish a kernel for AMD")


def launched_case(rows, cols, block, part, dtype, device):
    """Return the kernel's values and the oracle's for one case, whole and cut inside a row."""
    grid = kernel.Grid(rows, cols, *block, part)
    scales = torch.rand(grid.scale_shape, generator=torch.Generator().manual_seed(0)) * 10
    codes = every_code(rows, cols, dtype)
    stacked = codes.view(-1, part, cols)
    expected = dequantized(stacked, scales.view(len(stacked), -1, scales.shape[1]), block).flatten()
    codes = codes.view(torch.uint8).flatten()
    number_format = kernel.FORMAT_OF_DTYPE[dtype]
    for start, stop in [(0, rows * cols), (cols - 1, rows * cols - 1), (1, 3)]:
        row, row_end, col, col_end = grid.scale_region(start, stop)
        out = torch.full((stop - start,), 7, dtype=torch.bfloat16, device=device)
        nans = kernel._dequantize_triton(
            codes[start:stop].to(device),
            scales[row:row_end, col:col_end].contiguous().to(device),
            out,
            kernel.FORMATS[number_format],
            grid,
            start,
            stop,
        )
        assert_same_bits(out.cpu(), expected[start:stop])
        assert nans.item() == expected[start:stop].isnan().sum()


def run_interpreted() -> None:
    """Check every case under Triton's interpreter, which has to be asked for before the import."""
    for case in CASES:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
            launched_case(*case, dtype, "cpu")
    print(f"{len(CASES)} cases")


def test_interpreted_kernel_equals_the_oracle():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", "import test_triton; test_triton.run_interpreted()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("case", CASES)
def test_gpu_equals_the_oracle(case, dtype):
    launched_case(*case, dtype, "cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (1, 7168), (2048, 7168)])
def test_gpu_and_cpu_give_the_same_bytes(block):
    bits = torch.randint(-(2**31), 2**31, (-(-2048 // block[0]), -(-7168 // block[1])))
    scales = bits.to(torch.int32).view(torch.float32)
    codes = every_code(2048, 7168)
    on_gpu = kernel.weight_dequant(codes.cuda(), scales.cuda(), block).cpu()
    assert_same_bits(on_gpu, kernel.weight_dequant(codes, scales, block))


@pytest.mark.gpu
@gpu
def test_gpu_reaches_elements_beyond_2_to_the_31():
    rows, cols = 2**21 + 3, 1024
    codes = torch.randint(0, 127, (rows, cols), dtype=torch.uint8, device="cuda")
    scales = torch.rand(-(-rows // 128), cols // 128, device="cuda")
    out = kernel.weight_dequant(codes, scales)
    tail = slice((rows - 1) // 128 * 128, rows)
    expected = kernel.weight_dequant(codes[tail].cpu(), scales[-1:].cpu())
    assert_same_bits(out[tail].cpu(), expected)
