"""Attention that reads keys and values as packed codes, and never holds more than 32 positions of them dequantized.

    value = level scale + offset                  of each code, by channel; `level` is the code, or an entry of a table
    score = scale (q turn) · value + q · RoPE(mean)

Queries are turned into the basis of the codes, once per call, so that no key is turned out of it. The mean of keys was
taken out before RoPE. It turns with the position of the key, so its score is a product with a row of cosines and sines.
The scales of keys go into the queries. Positions 0 to P - 1 are the prefix, in full precision.

Codes lie in pages, as in a cache of vLLM. Everything is computed in float32, in blocks of 32 positions with a running
maximum (arXiv:2205.14135). A single query reads its text in parts of 512 positions, on all threads. The result does not
depend on the number of threads, on the other texts of a call, or on the pages.
"""

from dataclasses import dataclass

import torch

from pipeline.kernels.compiler import DTYPES, find_kernels
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.packing import packed_width
from pipeline.numerics.quantizer import ActivationQuantizer, integer_range

_LANES = 16  # as in kernels.cpp


@dataclass(frozen=True)
class CodeFormat:
    """The codes of the keys or values of all heads.

    Attributes:
        bits: 2 to 8.
        scale, offset: float32 [heads, d].
        levels: float32 [2^bits], the levels of all codes; None if each is the code itself.
    """

    bits: int
    scale: torch.Tensor
    offset: torch.Tensor
    levels: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """The bytes of one head's codes of a position."""
        return packed_width(self.scale.shape[1], self.bits)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of codes uint8 [..., heads, d], not packed: float32."""
        levels = codes.float() if self.levels is None else self.levels[codes.long()]
        return levels * self.scale + self.offset


def describe_codes(quantizer: ActivationQuantizer, heads: int, width: int) -> CodeFormat:
    """Return the format of the codes that `ActivationQuantizer.encode` makes of states [B, heads, T, width].

    Call it only if the quantizer `stores_codes`.
    """
    spec = quantizer.spec
    grid = spec.stored_grid
    scale = spread(quantizer.scale, heads, width)
    offset = torch.zeros_like(scale) if spec.symmetric else -spread(quantizer.zero_point, heads, width)
    codes = torch.arange(1 << spec.bits, device=scale.device)
    lowest, _ = integer_range(spec.bits, grid.signed)
    levels = grid.decode((codes + lowest).to(torch.int8) if grid.signed else codes.to(torch.uint8))
    is_plain = torch.equal(levels, levels[0] + codes)
    if is_plain:
        offset = offset + levels[0]
    offset = offset * scale
    if spec.centered:
        offset = offset + quantizer.shift.reshape(-1, width)
    return CodeFormat(spec.bits, scale, offset, None if is_plain else levels)


def spread(values: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """Return values [heads, 1, G] of the groups of all heads as float32 [heads, width]."""
    groups = values.reshape(heads, -1)
    return groups.repeat_interleave(width // groups.shape[1], dim=1).float().contiguous()


def make_turn(width: int) -> torch.Tensor:
    """Return the matrix [width, width], float32, that turns queries as R3 turns keys: q · (x R3^-1) = (q turn) · x."""
    return hadamard_transform(torch.eye(width, dtype=torch.float64), True).T.float().contiguous()


def make_table(turns: torch.Tensor) -> torch.Tensor:
    """Return cosines and then sines of all positions, [positions, d], as `CodeAttention` takes them.

    Returns:
        float32 [ceil(positions / 16), d, 16]: the columns of 16 positions, one after the other.
    """
    rows = -len(turns) % _LANES
    padded = torch.nn.functional.pad(turns.float(), (0, 0, 0, rows))
    return padded.unflatten(0, (-1, _LANES)).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class CodeAttention:
    """The attention of one layer over codes.

    Attributes:
        keys, values: the formats of codes.
        scale: the factor of the scores.
        turn: float32 [d, d], from `make_turn`; None if keys are not rotated.
        mean: float32 [kv_heads, d], of keys before RoPE, if it is taken out. It needs `table`, from `make_table`.
        prefix: float32 [2, kv_heads, P, d], keys after RoPE and values.
        sinks: float32 [heads], a score of each head that has no value.
        window: positions that a position attends to, itself included; 0 for all before it.
    """

    keys: CodeFormat
    values: CodeFormat
    scale: float
    turn: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    table: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    window: int = 0

    def attend_(
        self,
        out: torch.Tensor,
        queries: torch.Tensor,
        *,
        key_codes: torch.Tensor,
        value_codes: torch.Tensor,
        pages: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """Write the attention of queries [T, heads, d], float32 or bfloat16, to `out`, of the same shape and dtype.

        Args:
            key_codes, value_codes: uint8 [pages, kv_heads, page size, bytes], the codes of the queries' own positions
                among them; `bytes` lie one after the other.
            pages: int32 [texts, most pages], the pages of each text in order.
            starts: int32 [texts + 1], the first query of each text.
            lengths: int32 [texts], positions of each text. Its queries are the last ones.

        Raises:
            RuntimeError: an operand does not fit, or a page does not exist.
        """
        torch.ops.prefixquant.attend_codes(
            out,
            queries,
            key_codes,
            value_codes,
            pages,
            starts,
            lengths,
            self.keys.bits,
            self.keys.scale,
            self.keys.offset,
            self.keys.levels,
            self.values.bits,
            self.values.scale,
            self.values.offset,
            self.values.levels,
            self.turn,
            self.mean,
            self.table,
            self.prefix,
            self.sinks,
            self.scale,
            self.window,
        )


def fits_attention(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `CodeAttention` can be computed here, for heads of this width."""
    return width % _LANES == 0 and dtype in DTYPES and device.type == "cpu" and find_kernels()
