"""The Triton kernel: compiled for absent GPUs, interpreted, and run where there is a GPU."""

import functools
import inspect
import os
import subprocess
import sys

import pytest
import torch
from test_kernel import DTYPES, PACKED, any_bits, code_values, expected_values, piece_of

import fp8_cast_bf16
import kernel
from checkpoints import ROOT, assert_same_bits, every_code, special_counts
from make_checkpoint import make_layout

triton = pytest.importorskip("triton", reason="the Triton kernel needs triton")

GRIDS = [  # rows, columns, block, rows of a slab
    (130, 300, (128, 128), 130),
    (64, 100, (1, 32), 64),
    (60, 40, (16, 16), 20),
    (9, 7, (2, 3), 9),
    (33, 50, (33, 50), 33),
    (33, 50, (1, 50), 33),
    (12, 50, (12, 1), 12),
    (5, 2000, (1, 2000), 5),
]
PACKED_GRIDS = [
    (5, 96, (1, 32), 5),
    (140, 96, (1, 16), 140),
    (60, 2000, (1, 16), 20),
    (20, 300, (10, 128), 10),
    (7, 33, (1, 33), 7),
]
PADDING = 5  # Bytes of a row beyond the weight's columns.
CASES = [(*grid, number_format, 0) for grid in GRIDS for number_format in DTYPES]
CASES += [(*grid, number_format, 0) for grid in PACKED_GRIDS for number_format in PACKED]
CASES += [(*GRIDS[2], "E4M3", PADDING), (*GRIDS[3], "INT8", PADDING)]
CASES += [(*PACKED_GRIDS[3], number_format, PADDING) for number_format in PACKED]


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
    pointers["nonfinite_ptr"] = "*i64"
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
    "number_format, block_size_k",
    [("E4M3", 128), ("E4M3", 32), ("E2M1", 32), ("E2M1", 16), ("INT4", 128), ("UINT4B8", 32)],
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


def check_case(rows, cols, block, slab_rows, number_format, padding, device):
    """Hold the kernel's values against the oracle's, whole and cut inside rows."""
    grid = kernel.Grid(rows, cols, *block, slab_rows)
    width = kernel.ceil_div(cols, kernel.FORMATS[number_format].codes_per_byte) + padding
    every = finite = every_code(rows, width, torch.uint8)
    small = torch.rand(grid.scale_shape, generator=torch.Generator().manual_seed(0))
    combinations = [(every, small)]
    if number_format in ("E4M3", "E5M2"):
        finite = torch.where(code_values(every, number_format).isfinite(), every, 0)
        combinations.append((finite, small))
    for codes, scales in [*combinations, (finite, any_bits(*small.shape))]:
        expected = expected_values(codes, scales, number_format, grid)
        for start, stop in [(0, rows * cols), (cols - 3, rows * cols - 2), (1, 4)]:
            for piece in kernel.pieces(start, stop, cols, rows * cols):
                check_piece(codes, scales, expected, number_format, grid, piece, device)


def check_piece(codes, scales, expected, number_format, grid, piece, device):
    row, col, M, N = piece
    operands = (part.to(device) for part in piece_of(codes, scales, number_format, grid, piece))
    out = torch.full((M, N), 7, dtype=torch.bfloat16, device=device)
    counts = kernel._dequantize_triton(
        *operands, out, kernel.FORMATS[number_format], grid, row, col, divide=False
    )
    part = expected[row : row + M, col : col + N]
    assert_same_bits(out.cpu(), part)
    assert counts.tolist() == special_counts(part)


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


class Launches:
    """Stand in for the kernel: note what Triton would compile a variant for at each launch."""

    def __init__(self):
        self.parameters = kernel.weight_dequant_kernel().params
        self.variants, self.count, self.vectorized = set(), 0, 0

    def __getitem__(self, tiles):
        return self.launch

    def launch(self, *arguments, **constants):
        """A variant is the constants, and of an argument whether it is 1 or divisible by 16."""
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value
                  for value in arguments]
        special = [(value == 1, value % 16 == 0)
                   for value, parameter in zip(values, self.parameters, strict=False)
                   if not parameter.do_not_specialize]
        self.variants.add((*special, *constants.items()))
        self.count += 1
        self.vectorized += all(divisible for _, divisible in special)


@pytest.mark.parametrize("window", [fp8_cast_bf16.WINDOW, 1 << 20, 3 << 16])
def test_the_windows_of_a_shard_need_few_variants_of_the_kernel(window, tmp_path, monkeypatch):
    """A shard's data starts at a multiple of 64 bytes, so every window's at one of 32 elements."""
    shapes = [(576, 7168), (1536, 7168), (7168, 2048), (2048, 7168)]
    tensors = [("model.layers.0.input_layernorm.weight", "BF16", [7168])]
    for number, (rows, cols) in enumerate(shapes):
        name = f"model.layers.0.mlp.experts.{number}.up_proj.weight"
        blocks = [kernel.ceil_div(rows, 128), kernel.ceil_div(cols, 128)]
        tensors += [(name, "F8_E4M3", [rows, cols]), (f"{name}_scale_inv", "F32", blocks)]
    make_layout(tmp_path, tensors, 1)
    (shard,) = fp8_cast_bf16.make_plan(tmp_path).shards
    assert len(shard.header) % 64 == 0
    launches, fmt = Launches(), kernel.FORMATS["E4M3"]

    def dequantize(codes, scales, out, number_format, *place):
        return kernel._dequantize_triton(codes, scales, torch.empty_like(out), fmt, *place[:-1])

    monkeypatch.setattr(kernel, "weight_dequant_kernel", lambda: launches)
    monkeypatch.setattr(kernel, "dequantize", dequantize)
    monkeypatch.setattr(kernel, "MAX_PIECE", window // 2)  # as large as on a GPU
    worker = fp8_cast_bf16.Worker(torch.device("cpu"), window)
    for start in range(0, shard.size, window):
        stop = min(start + window, shard.size)
        fp8_cast_bf16.render(shard, shard.header, start, stop, worker)
    worker.close()
    assert launches.vectorized == launches.count > shard.size / window
    assert len(launches.variants) <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_equals_the_oracle(case):
    check_case(*case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (1, 7168), (2048, 7168)])
def test_gpu_and_cpu_give_the_same_bytes(block):
    scales = any_bits(-(-2048 // block[0]), -(-7168 // block[1]))
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
