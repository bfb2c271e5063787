"""The Triton kernel: compiled for absent GPUs, interpreted, and run where there is a GPU."""

import functools
import inspect
import itertools
import os

import pytest
import torch
from test_kernel import DTYPES, PACKED, any_bits, check_range

import kernel
from checkpoints import ROOT, assert_same_bits, every_code, python

triton = pytest.importorskip("triton", reason="the Triton kernel needs triton")

GRIDS = [  # rows, columns, block, rows of a slab
    (130, 300, (128, 128), 130), (64, 100, (1, 32), 64), (60, 40, (16, 16), 20), (9, 7, (2, 3), 9),
    (33, 50, (33, 50), 33), (33, 50, (1, 50), 33), (12, 20, (12, 1), 12), (5, 1000, (1, 1000), 5)]
PACKED_GRIDS = [(5, 96, (1, 32), 5), (140, 96, (1, 16), 140), (60, 200, (1, 16), 20),
                (20, 300, (10, 128), 10), (7, 33, (1, 33), 7)]
PADDING = 5  # Bytes of a row beyond the weight's columns.
CASES = [(*grid, number_format, 0) for grid in GRIDS for number_format in DTYPES]
CASES += [(*grid, number_format, 0) for grid in PACKED_GRIDS for number_format in PACKED]
CASES += [(*GRIDS[2], "E4M3", PADDING), (*GRIDS[3], "INT8", PADDING)]
CASES += [(*PACKED_GRIDS[3], number_format, PADDING) for number_format in PACKED]


@functools.cache
def compiled(backend: str, arch: int | str, number_format: str, block_size_n: int, divide=False):
    """Compile the kernel as it would be launched on 16-byte aligned operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, fmt = kernel.weight_dequant_kernel, kernel.FORMATS[number_format]
    constants = {"BITS": 8 // fmt.codes_per_byte, "EXPONENT_BITS": fmt.exponent_bits,
                 "MANTISSA_BITS": fmt.mantissa_bits, "FLIP": fmt.flip, "DIVIDE": divide,
                 "BLOCK_SIZE_M": 4096 // block_size_n, "BLOCK_SIZE_N": block_size_n,
                 "VECTOR": min(8, block_size_n)}
    pointers = {"codes_ptr": "*u8", "scales_ptr": "*fp32", "out_ptr": "*bf16"}
    names = list(inspect.signature(function.fn).parameters)
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]]
                  for n in [*pointers, "N", "col", "stride_codes"]}
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False})


@pytest.mark.parametrize("number_format", kernel.FORMATS)
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("divide", [False, True])
def test_kernel_compiles_for_nvidia_without_fp8_types_or_flushing(arch, number_format, divide):
    ptx = compiled("cuda", arch, number_format, 128, divide).asm["ptx"]
    assert "e4m3" not in ptx
    assert "e5m2" not in ptx
    assert ".ftz" not in ptx


@pytest.mark.parametrize("number_format, block_size_n", [
    ("E4M3", 128), ("E4M3", 32), ("E2M1", 32), ("E2M1", 16), ("INT4", 128), ("UINT4B8", 32)])
def test_kernel_stores_16_bytes_a_thread_side_by_side(number_format, block_size_n):
    """And 8 codes of a byte are loaded at once, by the thread that stores their values."""
    ptx = compiled("cuda", 90, number_format, block_size_n).asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert len(stores) == 4
    assert all(".v4.b32" in line for line in stores)
    if number_format == "E4M3":
        assert sum(".v2.b32" in line for line in loads) == 4
        assert block_size_n < 128 or "st.shared" not in ptx


def test_kernel_compiles_for_amd():
    try:
        assert compiled("hip", "gfx942", "E4M3", 128).asm["amdgcn"]
    except Exception as error:
        if "ld.lld" not in str(error):
            raise
        pytest.skip("this triton needs ROCm's linker to finish a kernel for AMD")


def check_case(rows, cols, block, slab_rows, number_format, padding, device, dequantize):
    """Hold the kernel's values against the oracle's, whole and cut inside rows."""
    grid = kernel.Grid(rows, cols, *block, slab_rows)
    width = kernel.ceil_div(cols, kernel.FORMATS[number_format].codes_per_byte) + padding
    codes = every_code(rows, width, torch.uint8)
    small = torch.rand(grid.scale_shape, generator=torch.Generator().manual_seed(0))
    ranges = [(0, rows * cols), (cols - 3, rows * cols - 2), (1, 4)]
    for cuts, scales in itertools.product(ranges, (small, any_bits(*small.shape))):
        check_range(codes, scales, number_format, grid, cuts, rows * cols,
                    dequantize=dequantize, device=device)
    check_range(codes, small, number_format, grid, ranges[0], rows * cols, True, dequantize, device)


def round_as_hardware_does(builder, source, dtype):
    """Stand in for the interpreter's cast to BF16, which truncates; NaN becomes the GPU's own."""
    from triton.runtime.interpreter import TensorHandle

    if dtype.scalar != triton.language.bfloat16:
        return TensorHandle(source.data.astype("float32"), dtype.scalar)
    values = torch.from_numpy(source.data)
    bits = torch.where(values.isnan(), 0x7FFF, values.bfloat16().view(torch.int16))
    return TensorHandle(bits.to(torch.int16).numpy().view("uint16"), dtype.scalar)


def dequantize_interpreted(codes, scales, out, number_format, *place):
    kernel._dequantize_triton(codes, scales, out, kernel.FORMATS[number_format], *place)


def run_interpreted() -> None:
    """Check every case under Triton's interpreter, which has to be asked for before the import."""
    triton.runtime.interpreter.InterpreterBuilder.create_fp_trunc = round_as_hardware_does
    for case in CASES:
        check_case(*case, "cpu", dequantize_interpreted)
    print(f"{len(CASES)} cases")


def test_interpreted_kernel_equals_the_oracle():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = python("-c", "import test_triton; test_triton.run_interpreted()", env=environment)
    assert done.stdout == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_equals_the_oracle(case):
    check_case(*case, "cuda", kernel.dequantize)


@pytest.mark.gpu
def test_gpu_reaches_elements_beyond_2_to_the_31():
    rows, cols = 2**21 + 3, 1024
    codes = torch.randint(0, 127, (rows, cols), dtype=torch.uint8, device="cuda")
    scales = torch.rand(-(-rows // 128), cols // 128, device="cuda")
    out = kernel.weight_dequant(codes, scales)
    tail = slice((rows - 1) // 128 * 128, rows)
    expected = kernel.weight_dequant(codes[tail].cpu(), scales[-1:].cpu())
    assert_same_bits(out[tail].cpu(), expected)


@pytest.mark.gpu
def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(kernel, "triton", None)
    with pytest.raises(ImportError, match="triton"):
        kernel.weight_dequant(torch.zeros(1, 1, dtype=torch.uint8).cuda(), torch.ones(1, 1).cuda())
