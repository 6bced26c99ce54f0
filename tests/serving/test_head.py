"""lm_head in 8 bits in vLLM computes the logits of the exported one, in every dtype, whole and split over processes."""

import pytest
import torch

from pipeline.models.lm_head import QuantizedHead, quantize_head

pytestmark = pytest.mark.serving
CPU = torch.device("cpu")
VOCABULARY, WIDTH, TOKENS = 41, 96, 5


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request):
    """Make the model's dtype the default one, as vLLM does while it loads."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("multiplies_integers", [False, True])
def test_served_head_equals_the_exported_one(dtype, rotate, multiplies_integers):
    from pipeline.serving.head import ServedHead
    from pipeline.serving.product import find_head_product

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float32)
    head = QuantizedHead(*quantize_head(weight, rotate), rotate)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float32).to(dtype)
    expected = head(hidden)
    product = find_head_product(CPU) if multiplies_integers else None
    parts = [
        ServedHead(head, dtype=dtype, make_product=product, device=CPU, first=first, count=24) for first in (0, 24)
    ]
    logits = torch.cat([part(hidden) for part in parts], dim=1)
    assert logits.dtype == dtype
    assert not logits[:, VOCABULARY:].any()  # rows that fill up the last process
    error = (logits[:, :VOCABULARY] - expected).abs().max() / expected.abs().max()
    # Scales are multiplied in another order; floats are rounded once more.
    assert error <= (1e-6 if dtype == torch.float32 else 2**-7)
