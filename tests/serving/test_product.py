"""vLLM's kernels for integers compute the same product as PyTorch's, without further rounding.

vLLM for CPUs has no kernel for GPUs. It is declared here as vLLM declares it, with an implementation for CPUs.
"""

import pytest
import torch

from pipeline.kernels.integer_product import IntegerProduct
from pipeline.kernels.operands import IntegerOperands
from tests.gpu_double import CUDA, GpuDouble

pytestmark = pytest.mark.serving
CPU = torch.device("cpu")


@pytest.fixture
def cutlass(monkeypatch):
    """Compute out = scale_a scale_b (a b - azp_adj), as documented. csrc/torch_bindings.cpp of vLLM has the schema."""
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cutlass_scaled_mm_azp(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor azp_adj, "
        "Tensor? azp, Tensor? bias) -> ()"
    )

    def multiply(out, a, b, a_scales, b_scales, azp_adj, azp, bias):
        assert (a.dtype, b.dtype, azp_adj.dtype) == (torch.int8, torch.int8, torch.int32)
        assert (azp, bias) == (None, None)
        assert all(tensor.is_contiguous() for tensor in (a, b.T, a_scales, b_scales, azp_adj))
        assert (a_scales.numel(), b_scales.numel(), azp_adj.numel()) == (1, b.shape[1], b.shape[1])
        sums = a.long() @ b.long() - azp_adj.flatten()
        out.copy_(a_scales * b_scales.flatten() * sums)

    monkeypatch.setattr("pipeline.serving.product.find_capability", lambda: 90)
    library.impl("cutlass_scaled_mm_azp", multiply, "CPU")
    torch.library.register_fake("_C::cutlass_scaled_mm_azp", lambda *operands: None, lib=library)
    forget_kernels()
    yield library
    library._destroy()
    forget_kernels()


def forget_kernels():
    from pipeline.serving import product

    product.is_exact.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [0, 7, 15])
def test_product_equals_pytorch(bits, zero_point):
    from pipeline.serving.product import ServedProduct

    operands, codes_of = make_operands(bits, zero_point, out=24, width=36)
    for codes in codes_of:
        exact = IntegerProduct(operands, torch.float32)(codes)
        product = ServedProduct(operands, torch.float32)(codes)
        assert (product - exact).abs().max() <= 1e-6 * exact.abs().max()
        rounded = ServedProduct(operands, torch.bfloat16)(codes)
        check_rounded(rounded, exact, operands.constant)  # the kernel takes it in bfloat16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [0, 7, 15])
def test_product_on_a_gpu_equals_pytorch(cutlass, bits, zero_point):
    """Its tensors are on the GPU, the host never waits, and vLLM can compile it."""
    from pipeline.serving.product import CutlassProduct

    operands, codes_of = make_operands(bits, zero_point, out=48, width=32)
    product = CutlassProduct(operands, torch.bfloat16)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    for codes in codes_of:
        output = product(codes)
        exact = IntegerProduct(operands, torch.float32)(codes)
        check_rounded(output, exact, exact - operands.constant)  # the product is rounded before the constant is added
        assert torch.equal(compiled(codes), output)
        with GpuDouble() as gpu:
            product_on_gpu, codes_on_gpu = CutlassProduct(operands, torch.bfloat16).to(CUDA), codes.to(CUDA)
            output_on_gpu = product_on_gpu(codes_on_gpu)
            assert not gpu.waits
            assert output_on_gpu.device == CUDA
            assert torch.equal(output_on_gpu.cpu(), output)


def make_operands(bits, zero_point, out, width):
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (out, width), generator=generator, dtype=torch.int8)
    weight_scale, constant = torch.rand(out, generator=generator), 1000 * torch.randn(out, generator=generator)
    operands = IntegerOperands(integers, weight_scale, 0.3, zero_point << (bits - 4), constant, (1 << bits) - 1)
    shapes = (1, width), (5, width)
    return operands, [torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8) for shape in shapes]


def check_rounded(rounded, exact, term):
    """Allow one rounding of a term to bfloat16, and one of the sum."""
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - exact).abs() <= 2**-8 * (term.abs() + exact.abs())).all()


def test_an_inexact_kernel_is_not_used(monkeypatch):
    from pipeline.serving import product

    forget_kernels()
    assert product.find_product(torch.bfloat16, CPU, [3]) is product.ServedProduct
    exact = product.ServedProduct.forward
    monkeypatch.setattr(product.ServedProduct, "forward", lambda self, codes: exact(self, codes) + 1)
    forget_kernels()
    assert product.find_product(torch.bfloat16, CPU, [3]) is None
    forget_kernels()


def test_a_gpu_multiplies_integers_where_its_kernel_is_exact(cutlass, monkeypatch):
    from pipeline.serving import product

    with GpuDouble():
        assert product.find_product(torch.bfloat16, CUDA, [32, 48]) is product.CutlassProduct
        assert product.find_product(torch.float32, CUDA, [32, 48]) is None
        assert product.find_product(torch.bfloat16, CUDA, [32, 24]) is None
        for capability in (75, 100, 120, 0):
            forget_kernels()
            monkeypatch.setattr(product, "find_capability", lambda capability=capability: capability)
            assert product.find_product(torch.bfloat16, CUDA, [32, 48]) is None
        monkeypatch.setattr(product, "find_capability", lambda: 89)
        exact = product.kernels.cutlass_scaled_mm_azp
        for wrong in (lambda signed, *rest: exact(signed, *rest) * (1 + (len(signed) > 64)), refuse):
            forget_kernels()
            monkeypatch.setattr(product.kernels, "cutlass_scaled_mm_azp", wrong)
            assert product.find_product(torch.bfloat16, CUDA, [32, 48]) is None
        forget_kernels()


def refuse(*operands):
    raise RuntimeError("Error Internal")


def test_without_the_kernel_of_a_gpu_weights_are_dequantized(monkeypatch):
    from pipeline.serving import product

    monkeypatch.setattr(product, "find_capability", lambda: 90)  # vLLM for CPUs has no such kernel
    forget_kernels()
    with GpuDouble():
        assert product.find_product(torch.bfloat16, CUDA, [32, 48]) is None
    forget_kernels()
