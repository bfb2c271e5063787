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
from checkpoints import assert_same_bits, dequantized, every_code, fp4_values, special_counts

ROOT = Path(__file__).parent.parent
triton = pytest.importorskip("triton", reason="the Triton kernel needs triton")

DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "INT8": torch.int8}
GRIDS = [  # rows, columns, block, rows of a part
    (130, 300, (128, 128), 130),
    (64, 100, (1, 32), 64),
    (60, 40, (16, 16), 20),
    (9, 7, (2, 3), 9),
    (33, 50, (33, 50), 33),
    (33, 50, (1, 50), 33),
    (12, 50, (12, 1), 12),
    (5, 2000, (1, 2000), 5),
]
CASES = [(*grid, number_format) for grid in GRIDS for number_format in DTYPES]
CASES += [(rows, 96, block, rows, "E2M1") for rows in (5, 140) for block in [(1, 32), (1, 16)]]
CASES += [(60, 2000, (1, 16), 20, "E2M1")]


@functools.cache
def compiled(backend: str, arch: int | str, number_format: str, block_size_k: int):
    """Compile the kernel as it would be launched on 16-byte aligned operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.weight_dequant_kernel()
    constants = {
        **kernel.FORMATS[number_format].constants,
        "STACKED": False,
        "GROUPS_PER_BLOCK": 1,
        "BLOCK_SIZE_M": 4,
        "BLOCK_SIZE_G": 1024 // block_size_k,
        "BLOCK_SIZE_K": block_size_k,
        "VECTOR": 8,
    }
    pointers = {"codes_ptr": "*u8", "scales_ptr": "*fp32", "out_ptr": "*i16"}
    pointers["specials_ptr"] = "*i64"
    names = list(inspect.signature(function.fn).parameters)
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = [*pointers, "N", "col", "stride_codes", "col_codes"]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False})


@pytest.mark.parametrize("number_format", kernel.FORMATS)
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_kernel_compiles_for_nvidia_without_fp8_types_or_flushing(arch, number_format):
    ptx = compiled("cuda", arch, number_format, 128).asm["ptx"]
    assert "e4m3" not in ptx
    assert "e5m2" not in ptx
    assert ".ftz" not in ptx


@pytest.mark.parametrize(
    "number_format, block_size_k", [("E4M3", 128), ("E4M3", 32), ("E2M1", 32), ("E2M1", 16)]
)
def test_kernel_stores_16_bytes_a_thread_side_by_side(number_format, block_size_k):
    """Both branches do, and 8 codes are loaded at once where each is stored as it was loaded."""
    ptx = compiled("cuda", 90, number_format, block_size_k).asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert len(stores) == 8
    assert all(".v4.b32" in line for line in stores)
    if number_format == "E4M3":
        assert sum(".v2.b32" in line for line in loads) == 4


def test_kernel_compiles_for_amd():
    try:
        assert compiled("hip", "gfx942", "E4M3", 128).asm["amdgcn"]
    except Exception as error:
        if "ld.lld" not in str(error):
            raise
        pytest.skip("this triton needs ROCm's linker to finish a kernel for AMD")


def check_case(rows, cols, block, part, number_format, device):
    """Hold the kernel's values against the oracle's, whole and cut inside a row."""
    grid = kernel.Grid(rows, cols, *block, part)
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(grid.scale_shape, generator=generator)
    bits = torch.randint(-(2**31), 2**31, grid.scale_shape, generator=generator)
    packed = number_format == "E2M1"
    dtype = torch.uint8 if packed else DTYPES[number_format]
    every = every_code(rows, cols // (1 + packed), dtype)
    finite = torch.where(every.float().isfinite(), every.view(torch.uint8), 0).view(dtype)
    any_bits = bits.to(torch.int32).view(torch.float32)
    for codes, scales in [(finite, small), (every, small), (finite, any_bits)]:
        values = fp4_values(codes) if packed else codes
        stacked = values.view(-1, part, cols)
        matrices = scales.view(len(stacked), -1, scales.shape[1])
        expected = dequantized(stacked, matrices, block).flatten()
        check_ranges(codes, scales, expected, grid, number_format, device)


def check_ranges(codes, scales, expected, grid, number_format, device):
    """Hold some ranges of elements of a weight against what is expected of all."""
    rows, cols = grid.rows, grid.cols
    codes = codes.view(torch.uint8).flatten()
    per_byte = kernel.FORMATS[number_format].codes_per_byte
    for start, stop in [(0, rows * cols), (cols - 2, rows * cols - 2), (2, 4)]:
        row, row_end, col, col_end = grid.scale_region(start, stop)
        out = torch.full((stop - start,), 7, dtype=torch.bfloat16, device=device)
        specials = kernel._dequantize_triton(
            codes[start // per_byte : stop // per_byte].to(device),
            scales[row:row_end, col:col_end].contiguous().to(device),
            out,
            kernel.FORMATS[number_format],
            grid,
            start,
            stop,
        )
        assert_same_bits(out.cpu(), expected[start:stop])
        assert specials.tolist() == special_counts(expected[start:stop])


def round_as_hardware_does(builder, source, dtype):
    """Stand in for the interpreter's cast to BF16, which truncates; NaN becomes the GPU's own."""
    from triton.runtime.interpreter import TensorHandle

    assert dtype.scalar == triton.language.bfloat16
    values = torch.from_numpy(source.data)
    bits = torch.where(values.isnan(), 0x7FFF, values.bfloat16().view(torch.int16))
    return TensorHandle(bits.to(torch.int16).numpy().view("uint16"), dtype.scalar)


def run_interpreted() -> None:
    """Check every case under Triton's interpreter, which has to be asked for before the import."""
    triton.runtime.interpreter.InterpreterBuilder.create_fp_trunc = round_as_hardware_does
    for case in CASES:
        check_case(*case, "cpu")
    print(f"{len(CASES)} cases")


def test_interpreted_kernel_equals_the_oracle():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", "import test_triton; test_triton.run_interpreted()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_equals_the_oracle(case):
    check_case(*case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (1, 7168), (2048, 7168)])
def test_gpu_and_cpu_give_the_same_bytes(block):
    bits = torch.randint(-(2**31), 2**31, (-(-2048 // block[0]), -(-7168 // block[1])))
    scales = bits.to(torch.int32).view(torch.float32)
    codes = every_code(2048, 7168)
    on_gpu = kernel.weight_dequant(codes.cuda(), scales.cuda(), block).cpu()
    assert_same_bits(on_gpu, kernel.weight_dequant(codes, scales, block))


@pytest.mark.gpu
def test_gpu_reaches_elements_beyond_2_to_the_31():
    rows, cols = 2**21 + 3, 1024
    codes = torch.randint(0, 127, (rows, cols), dtype=torch.uint8, device="cuda")
    scales = torch.rand(-(-rows // 128), cols // 128, device="cuda")
    out = kernel.weight_dequant(codes, scales)
    tail = slice((rows - 1) // 128 * 128, rows)
    expected = kernel.weight_dequant(codes[tail].cpu(), scales[-1:].cpu())
    assert_same_bits(out[tail].cpu(), expected)
