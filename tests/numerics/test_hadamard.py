"""Hadamard transforms are orthogonal for every width, and equal however they are computed."""

import math

import pytest
import torch

from pipeline.numerics.hadamard import (
    HadamardTransform,
    _build_matrix,
    _multiply_matrices,
    factor_hadamard,
    hadamard_matrix,
    hadamard_transform,
    list_matrix_orders,
    random_orthogonal,
    random_signs,
)
from tests.gpu_double import CUDA, GpuDouble

ORDERS = [1, 2, 4, 12, 20, 28, 36, 40, 52, 60, 64, 108, 140, 156, 172, 344, 576, 1536]
LARGE = [4864, 9728, 11008, 13696, 14336, 18944, 25600, 28672, 29568]


@pytest.mark.parametrize("n", ORDERS)
def test_matrix_is_orthogonal_and_the_transform_multiplies_by_it(n):
    matrix = hadamard_matrix(n)
    assert (matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13  # measured: 6e-15
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert (hadamard_transform(x) - x @ matrix).abs().max() < 1e-13  # measured: 5e-15
    assert (hadamard_transform(x, inverse=True) - x @ matrix.T).abs().max() < 1e-13


@pytest.mark.parametrize("n", ORDERS)
def test_entries_are_plus_minus_one_within_blocks(n):
    factors = factor_hadamard(n)
    block = hadamard_matrix(n)[: factors.order, : factors.order] * math.sqrt(factors.order)
    assert torch.allclose(block.abs(), torch.ones_like(block))
    assert factors.blocks * factors.order == n


@pytest.mark.parametrize("n", LARGE)
def test_large_transforms_are_undone_by_their_inverse_and_preserve_lengths(n):
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    y = hadamard_transform(x)
    assert (hadamard_transform(y, inverse=True) - x).abs().max() < 1e-12  # measured: 8e-15
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "blocks", "paley", "power"),
    [
        (576, 1, (36,), 16),  # 2 (17 + 1)
        (1536, 1, (12,), 128),  # 11 + 1
        (11008, 1, (344,), 32),  # 7^3 + 1
        (29568, 1, (924,), 32),  # 2 (461 + 1)
        (4864, 1, (76,), 64),  # 2 (37 + 1)
        (156, 3, (52,), 1),  # neither 155 nor 77 is a prime power; 52 = 2 (5^2 + 1)
        (172, 43, (), 4),
        (13696, 107, (), 128),
        (13, 13, (), 1),
    ],
)
def test_a_width_takes_the_smallest_paley_order_and_falls_back_to_blocks(n, blocks, paley, power):
    factors = factor_hadamard(n)
    assert (factors.blocks, factors.paley, factors.power_of_two) == (blocks, paley, power)


def test_two_paley_orders_are_used_where_no_single_one_fits():
    factors = factor_hadamard(1904)
    assert (factors.blocks, factors.paley, factors.power_of_two) == (1, (28, 68), 1)
    matrix = hadamard_matrix(1904)
    assert (matrix @ matrix.T - torch.eye(1904, dtype=torch.float64)).abs().max() < 1e-12
    x = torch.randn(2, 1904, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(hadamard_transform(x), x @ matrix)


def test_every_width_up_to_300_is_orthogonal():
    for n in range(1, 301):
        matrix = hadamard_matrix(n)
        assert (matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13, n


def test_sylvesters_matrix_of_order_four_is_that_written_by_hand():
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    assert torch.equal(hadamard_matrix(4), expected)


def test_random_orthogonal_is_orthogonal_and_repeats_with_its_seed():
    first = random_orthogonal(17, torch.Generator().manual_seed(3))
    again = random_orthogonal(17, torch.Generator().manual_seed(3))
    other = random_orthogonal(17, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.allclose(first @ first.T, torch.eye(17, dtype=torch.float64), atol=1e-13)
    assert set(random_signs(100, torch.Generator().manual_seed(0)).tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    ("n", "block_size"), [(36, -1), (576, -1), (172, -1), (48, 16), (1, -1), (256, -1), (4096, -1), (14336, -1)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_the_module_equals_the_function_and_compiles_without_building_matrices(n, block_size, inverse):
    transform = HadamardTransform(n, torch.float32, block_size)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(transform(x, inverse), hadamard_transform(x, inverse, block_size))
    assert transform.state_dict() == {}
    graph, _ = torch._dynamo.export(transform)(x, inverse)
    called = {node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method")}
    assert not called & {torch.kron, torch.ones, torch.zeros, torch.eye, torch.tensor}


@pytest.mark.parametrize("n", [64, 576, 172, 4096])
def test_the_cuda_package_applies_the_power_of_two_of_the_function_and_never_of_the_module(monkeypatch, n):
    """As documented, `fast_hadamard_transform(x, scale)` is F.linear(x, H) * scale, for any power of two."""
    calls = []

    def transform(x, scale):
        assert x.is_contiguous()
        calls.append(x.shape)
        return x @ _build_matrix(1, x.shape[-1], x.dtype, x.device) * math.sqrt(x.shape[-1]) * scale

    monkeypatch.setattr("pipeline.numerics.hadamard._cuda_hadamard_transform", transform)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    with GpuDouble():
        for inverse in (False, True):
            expected = hadamard_transform(x, inverse)
            assert torch.allclose(hadamard_transform(x.to(CUDA), inverse).cpu(), expected, atol=1e-5)
            assert len(calls) == 1 + inverse
            module = HadamardTransform(n, torch.float32, device=CUDA)
            assert torch.allclose(module(x.to(CUDA), inverse).cpu(), expected, atol=1e-5)
            assert len(calls) == 1 + inverse


def test_width_zero_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        factor_hadamard(0)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 576, 1536, 14336])
def test_cuda_transform_equals_the_cpu_one(n):
    x = torch.randn(5, n)
    assert torch.allclose(hadamard_transform(x.cuda()).cpu(), hadamard_transform(x), atol=1e-4)
    assert torch.allclose(
        hadamard_transform(x.cuda(), inverse=True).cpu(), hadamard_transform(x, inverse=True), atol=1e-4
    )


@pytest.mark.parametrize("n", [12, 36, 256, 576, 1024, 1536, 1904, 5120, 11008, 28672])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_grouping_the_matrices_does_not_change_the_product(n, on_gpu):
    factors = factor_hadamard(n)
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def build(paley, sylvester):
        return _build_matrix(paley, sylvester, torch.float64, torch.device("cpu"))

    grouped = [build(paley, sylvester) for paley, sylvester in list_matrix_orders(factors, on_gpu)]
    plain = [*(build(order, 1) for order in factors.paley), build(1, factors.power_of_two)]
    for inverse in (False, True):
        product, expected = (_multiply_matrices(x, factors, matrices, inverse) for matrices in (grouped, plain))
        assert (product - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("n", "on_gpu", "orders"),
    [
        (64, False, (64,)),
        (256, False, (16, 16)),  # not 128 * 2
        (4096, True, (64, 64)),
        (32768, False, (32, 32, 32)),
        (576, False, (36, 16)),
        (1536, True, (12, 128)),
        (144, False, (144,)),  # not 36 * 4
        (14336, False, (28, 32, 16)),
        (14336, True, (112, 128)),
        (28672, True, (224, 128)),
        (5120, False, (20, 16, 16)),
    ],
)
def test_matrix_orders_are_those_that_are_fast(n, on_gpu, orders):
    assert tuple(paley * power for paley, power in list_matrix_orders(factor_hadamard(n), on_gpu)) == orders


def test_autocast_does_not_change_the_transform():
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        transformed = hadamard_transform(x)
    assert torch.equal(transformed, hadamard_transform(x))
