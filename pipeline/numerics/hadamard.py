"""Orthogonal matrices for rotations, and the fast Hadamard transform.

A Hadamard matrix of order m has entries ±1 and orthogonal rows. Divided by sqrt(m) it is orthogonal, and it spreads a
single large coordinate evenly over all m coordinates. Three constructions reach the sizes of real models:

- Sylvester, order 2^k:           H_2n = [[H_n, H_n], [H_n, -H_n]]
- Paley I, order q + 1:           q a prime power, q mod 4 = 3;  I + S, with S the bordered Jacobsthal matrix
- Paley II, order 2(q + 1):       q a prime power, q mod 4 = 1

Kronecker products of Hadamard matrices are Hadamard matrices again. A width n = odd * 2^k takes the smallest odd * 2^j
that is a Paley order, and a Sylvester matrix for the rest: 11008 = 344 * 32 (344 = 7^3 + 1). Some widths (156, 172)
have no such order. Their transform is block-diagonal, with the largest Hadamard factor that divides n. No width fails.

All functions act on the last dimension and treat vectors as rows: transform(x) = x @ H.
"""

import contextlib
import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

try:
    from fast_hadamard_transform import hadamard_transform as _cuda_hadamard_transform
except ImportError:
    _cuda_hadamard_transform = None

CPU = torch.device("cpu")
# A power of two is applied as a few matrix products whose orders lie between these. On a CPU this is faster than
# butterflies. Products of only a few columns take up to fifty times as long. On a GPU each product is a pass through
# memory, so Paley's matrix takes the part above the largest order. Measured with `python -m benchmarks.speed.hadamard`.
_LEAST_ORDER, _LARGEST_ORDER, _LARGEST_PALEY = 16, 128, 1024


@dataclass(frozen=True)
class HadamardFactors:
    """The factors of a width: n = blocks * prod(paley) * power_of_two. Each block is transformed separately.

    Attributes:
        blocks: how many blocks there are.
        paley: orders of Paley matrices.
        power_of_two: order of Sylvester's matrix.
    """

    blocks: int
    paley: tuple[int, ...]
    power_of_two: int

    @property
    def order(self) -> int:
        """The order of the Hadamard matrix of each block."""
        return math.prod(self.paley) * self.power_of_two


@functools.cache
def factor_hadamard(n: int) -> HadamardFactors:
    """Factor a width: 11008 -> 1 block, paley (344,), power_of_two 32.

    There is more than one block only if no Hadamard matrix of order n can be built.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: a Hadamard transform needs a width of at least 1")
    for order in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True):
        paley = _find_paley_orders(order)
        if paley is not None:
            return HadamardFactors(n // order, paley, order // math.prod(paley))
    raise AssertionError("order 1 always exists")


def _find_paley_orders(n: int) -> tuple[int, ...] | None:
    """Return Paley orders whose product divides n and leaves a power of two, or None where there are none.

    The solution with the fewest orders is chosen, and then the smallest.
    """
    power = n & -n
    odd = n // power
    if odd == 1:
        return ()
    for count in range(1, power.bit_length()):
        for parts in _odd_factorizations(odd, count):
            for doublings in itertools.product(range(1, power.bit_length()), repeat=count):
                orders = tuple(part << j for part, j in zip(parts, doublings, strict=True))
                fits = sum(doublings) < power.bit_length()
                if fits and all(_paley_field(order) is not None for order in orders):
                    return orders
    return None


def _odd_factorizations(odd: int, count: int, least: int = 3) -> list[tuple[int, ...]]:
    """Return all products of `count` ascending factors >= 3 that give `odd`: (45, 2) -> (3, 15), (5, 9)."""
    if count == 1:
        return [(odd,)] if odd >= least else []
    return [
        (first, *rest)
        for first in range(least, math.isqrt(odd) + 1, 2)
        if odd % first == 0
        for rest in _odd_factorizations(odd // first, count - 1, first)
    ]


def _paley_field(order: int) -> int | None:
    """Return the q whose Paley matrix has this order (type I if both exist), or None."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _prime_power(half) else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, m) with q = p^m and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    m = 0
    while q % p == 0:
        q //= p
        m += 1
    return (p, m) if q == 1 else None


@functools.cache
def hadamard_matrix(n: int) -> torch.Tensor:
    """Return the matrix of `hadamard_transform` for width n: [n, n] float64, orthogonal, H @ H.T = I.

    It is block-diagonal where the width has no Hadamard matrix (see `factor_hadamard`). Do not change the returned
    tensor: it is cached.
    """
    factors = factor_hadamard(n)
    matrix = torch.eye(factors.blocks, dtype=torch.float64)
    for factor in (*map(paley_matrix, factors.paley), _sylvester_matrix(factors.power_of_two)):
        matrix = torch.kron(matrix, factor)
    return matrix / math.sqrt(factors.order)


def hadamard_transform(x: torch.Tensor, inverse: bool = False, block_size: int = -1) -> torch.Tensor:
    """Return x @ H, or x @ H.T if `inverse`, without forming H. H is normalised, so the length of x is preserved.

    Args:
        x: [..., n] of any width, floating point. The arithmetic is in x's dtype.
        inverse: apply the transpose, which undoes the transform.
        block_size: transform each block of this many consecutive values separately; -1: all n together.

    Returns:
        [..., n], same dtype and device. On CUDA the power-of-two factor goes through `fast_hadamard_transform` if that
        package is installed.
    """
    factors = factor_hadamard(x.shape[-1] if block_size == -1 else block_size)
    orders = list_matrix_orders(factors, x.is_cuda and not _has_kernel(x))
    matrices = [_build_matrix(paley, sylvester, x.dtype, x.device) for paley, sylvester in orders]
    # autocast would round the matrices: lengths would be preserved to 0.2 % only, and differently when it is off.
    narrowed = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if narrowed else contextlib.nullcontext():
        return _multiply_matrices(x, factors, matrices, inverse, _has_kernel(x))


@functools.cache
def find_single_matrix(n: int, inverse: bool = False) -> torch.Tensor | None:
    """Return the matrix [n, n], float32 on the CPU, of a transform that is one product; None if it is several."""
    factors = factor_hadamard(n)
    orders = list_matrix_orders(factors, False)
    if factors.order != n or len(orders) != 1:
        return None
    matrix = _build_matrix(*orders[0], torch.float32, CPU)
    return matrix.mT.contiguous() if factors.paley and inverse else matrix


class HadamardTransform(nn.Module):
    """`hadamard_transform` for one width, dtype and device.

    It holds its matrices, so that `torch.compile` can trace it. They are grouped in the way that is fast on the device.
    """

    def __init__(self, width: int, dtype: torch.dtype, block_size: int = -1, device: torch.device = CPU) -> None:
        super().__init__()
        self.factors = factor_hadamard(width if block_size == -1 else block_size)
        orders = list_matrix_orders(self.factors, device.type == "cuda")
        self.names = [f"matrix_{place}" for place in range(len(orders))]  # buffers, because two may be one tensor
        for name, (paley, sylvester) in zip(self.names, orders, strict=True):
            self.register_buffer(name, _build_matrix(paley, sylvester, dtype, device), persistent=False)

    def forward(self, x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        return _multiply_matrices(x, self.factors, [getattr(self, name) for name in self.names], inverse)


@functools.cache
def list_matrix_orders(factors: HadamardFactors, on_gpu: bool) -> tuple[tuple[int, int], ...]:
    """Return (p, s) of each matrix to multiply by; their Kronecker product, in this order, is the matrix of a block.

    Each is the Kronecker product of Paley's matrix of order p and Sylvester's of order s. Width 14,336 gives (28, 1),
    (1, 32), (1, 16) on a CPU, and (28, 4), (1, 128) on a GPU.
    """
    orders, rest = [(order, 1) for order in factors.paley], factors.power_of_two
    if orders:
        paley = orders[-1][0]
        taken = 1
        if rest < _LEAST_ORDER:
            taken = rest
        elif on_gpu:
            taken = max(1, rest // _LARGEST_ORDER)
        if paley * taken <= _LARGEST_PALEY:
            orders[-1], rest = (paley, taken), rest // taken
    doublings, largest = rest.bit_length() - 1, _LARGEST_ORDER.bit_length() - 1
    for left in range(math.ceil(doublings / largest), 0, -1):  # of similar orders, larger ones first
        exponent = math.ceil(doublings / left)
        orders.append((1, 2**exponent))
        doublings -= exponent
    return tuple(orders)


def _multiply_matrices(
    x: torch.Tensor, factors: HadamardFactors, matrices: list[torch.Tensor], inverse: bool, kernel: bool = False
) -> torch.Tensor:
    """Return x times the Kronecker product of `matrices`, each [order, order], Paley's first. Blocks are separate.

    If `kernel`, Sylvester's matrices are applied by `fast_hadamard_transform`.
    """
    after, y = factors.order, x
    for place, matrix in enumerate(matrices):
        if place == len(factors.paley) and kernel and _cuda_hadamard_transform is not None:
            y = _cuda_hadamard_transform(y.reshape(-1, after).contiguous(), 1 / math.sqrt(after))
            break
        order, paley = matrix.shape[0], place < len(factors.paley)
        after //= order
        if after == 1:  # Sylvester's matrices are symmetric
            y = y.reshape(-1, order) @ (matrix.mT if paley and inverse else matrix)
        else:  # columns of a row-vector transform: y[.., i, c] -> sum_i y[.., i, c] H[i, j]
            y = (matrix.mT if paley and not inverse else matrix) @ y.reshape(-1, order, after)
    return y.reshape(x.shape)


def _has_kernel(x: torch.Tensor) -> bool:
    return x.is_cuda and _cuda_hadamard_transform is not None and x.dtype != torch.float64


@functools.cache
def _build_matrix(paley: int, sylvester: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the normalised Kronecker product of Paley's matrix (order 1: none) and Sylvester's."""
    matrix = _sylvester_matrix(sylvester)
    matrix = torch.kron(paley_matrix(paley), matrix) if paley > 1 else matrix
    return (matrix / math.sqrt(len(matrix))).to(dtype=dtype, device=device)


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return a Haar-distributed orthogonal matrix [n, n], float64.

    It is Q of the QR factorization of a Gaussian matrix, with signs fixed (Mezzadri 2007, §5).
    """
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def random_signs(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return [n] random values ±1, float64."""
    return torch.randint(0, 2, (n,), generator=generator).to(torch.float64) * 2 - 1


@functools.cache
def _sylvester_matrix(n: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(step, matrix)
    return matrix


@functools.cache
def paley_matrix(order: int) -> torch.Tensor:
    """Return Paley's Hadamard matrix [order, order] with entries ±1, float64 (Paley 1933).

    Raises:
        ValueError: there is none of this order.
    """
    q = _paley_field(order)
    if q is None:
        raise ValueError(f"order={order} is not a Paley order")
    jacobsthal = _jacobsthal_matrix(q)
    # Border: skew-symmetric for q = 3 mod 4, symmetric for q = 1 mod 4.
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if q % 4 == 3 else 1
    conference[1:, 1:] = jacobsthal
    identity = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return identity + conference
    on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, on) + torch.kron(identity, off)


def _jacobsthal_matrix(q: int) -> torch.Tensor:
    """Return Q [q, q] with Q[a, b] = chi(a - b), where chi is the quadratic character of the field of q elements."""
    p, m = _prime_power(q) or (0, 0)
    elements = [_digits(index, p, m) for index in range(q)]
    modulus = _irreducible_polynomial(p, m)
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[0] = 0
    for element in elements[1:]:
        character[_index(_multiply(element, element, modulus, p), p)] = 1
    table = torch.tensor(elements)
    difference = (table[:, None, :] - table[None, :, :]) % p
    return character[(difference * p ** torch.arange(m)).sum(-1)]


def _digits(index: int, p: int, m: int) -> list[int]:
    """Return an element of the field as the coefficients of a polynomial of degree < m, lowest first."""
    return [index // p**power % p for power in range(m)]


def _index(element: list[int], p: int) -> int:
    """Undo `_digits`."""
    return sum(digit * p**power for power, digit in enumerate(element))


def _multiply(a: list[int], b: list[int], modulus: list[int], p: int) -> list[int]:
    """Return a * b modulo the monic polynomial `modulus` (its m low coefficients) over the integers mod p."""
    m = len(a)
    product = [0] * (2 * m - 1)
    for i, j in itertools.product(range(m), range(m)):
        product[i + j] = (product[i + j] + a[i] * b[j]) % p
    for power in range(2 * m - 2, m - 1, -1):
        lead = product[power]
        for i in range(m):
            product[power - m + i] = (product[power - m + i] - lead * modulus[i]) % p
    return product[:m]


def _irreducible_polynomial(p: int, m: int) -> list[int]:
    """Return the m low coefficients of a monic irreducible polynomial of degree m over the integers mod p."""
    for index in range(p**m):
        candidate = _digits(index, p, m)
        if not any(
            _divides([*_digits(i, p, degree), 1], [*candidate, 1], p)
            for degree in range(1, m // 2 + 1)
            for i in range(p**degree)
        ):
            return candidate
    raise AssertionError("every finite field has an irreducible polynomial of every degree")


def _divides(divisor: list[int], polynomial: list[int], p: int) -> bool:
    """Return whether a monic polynomial (coefficients, lowest first) divides another one modulo p."""
    rest = list(polynomial)
    while len(rest) >= len(divisor):
        lead = rest[-1]
        for offset, coefficient in enumerate(reversed(divisor)):
            rest[-1 - offset] = (rest[-1 - offset] - lead * coefficient) % p
        rest.pop()
    return not any(rest)
