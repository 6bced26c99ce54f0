"""vLLM's kernel for integers: the same product as PyTorch's, and no more rounding."""

import pytest
import torch

from pipeline.kernels.integer_product import IntegerProduct
from pipeline.kernels.operands import IntegerOperands

pytestmark = pytest.mark.serving


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [0, 7, 15])
def test_product_is_that_of_pytorch(bits, zero_point):
    from pipeline.serving.product import ServedProduct

    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (24, 36), generator=generator, dtype=torch.int8)
    weight_scale, constant = torch.rand(24, generator=generator), 1000 * torch.randn(24, generator=generator)
    operands = IntegerOperands(integers, weight_scale, 0.3, zero_point << (bits - 4), constant)
    for tokens in (1, 5):
        codes = torch.randint(0, 1 << bits, (tokens, 36), generator=generator, dtype=torch.uint8)
        exact = IntegerProduct(operands, torch.float32)(codes)
        found = ServedProduct(operands, torch.float32)(codes)
        assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
        rounded = ServedProduct(operands, torch.bfloat16)(codes)
        product = (exact - constant).abs() + exact.abs()  # of these two, once each, and nothing of the constant
        assert ((rounded.float() - exact).abs() <= 2**-8 * product).all()


def test_a_kernel_that_is_not_exact_is_left_out(monkeypatch):
    from pipeline.serving import product

    assert product.find_product() is product.ServedProduct
    exact = product.ServedProduct.forward
    monkeypatch.setattr(product.ServedProduct, "forward", lambda self, codes: exact(self, codes) + 1)
    assert product.find_product.__wrapped__() is None
