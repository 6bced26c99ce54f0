"""Sizes of a model that plans count with: widths, weights, and bytes of a batch on its way through a block."""

from dataclasses import dataclass

from torch import nn

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import RoutedExperts
from pipeline.models.layers import read_input_width
from pipeline.planning.constants import (
    FORWARD_HIDDEN,
    FORWARD_INNER,
    GRAPH_BYTES,
    GRAPH_HIDDEN,
    GRAPH_INNER,
    GRAPH_KEYS,
    KEPT_GRAPH_BYTES,
    TABLES_THROUGH_HOST,
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, counted on its largest block. The other blocks are taken to have the same sizes.

    Attributes:
        hidden, inner, keys, queries: widths of the residual stream, the MLP, all keys, and all queries. With experts,
            `inner` is the sum over the MLPs that a token passes.
        mlps: the width of each MLP of a block: one, or all experts and the shared expert.
        vocabulary: rows of the embedding.
        blocks: number of blocks.
        weights: number of parameters of a block.
        itemsize: bytes of a parameter in the checkpoint.
    """

    hidden: int
    inner: int
    mlps: tuple[int, ...]
    keys: int
    queries: int
    vocabulary: int
    blocks: int
    weights: int
    itemsize: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Sizes":
        """Return the sizes of a checkpoint."""
        config = checkpoint.config
        count = checkpoint.block_count if checkpoint.architecture.experts is not None else 1  # others are all equal
        block = max(map(checkpoint.build_block, range(count)), key=_count_weights)
        architecture = checkpoint.architecture.of_block(block)
        head_dim = block.self_attn.head_dim
        mlps = tuple(read_input_width(block, down) for _, _, down in architecture.mlps.values())
        inner = config.intermediate_size
        if architecture.experts is not None:
            experts = block.get_submodule(architecture.experts)
            assert isinstance(experts, RoutedExperts)
            inner = config.num_experts_per_tok * mlps[0] + sum(mlps[len(experts) :])
        return cls(
            hidden=config.hidden_size,
            inner=inner,
            mlps=mlps,
            keys=config.num_key_value_heads * head_dim,
            queries=config.num_attention_heads * head_dim,
            vocabulary=config.vocab_size,
            blocks=checkpoint.block_count,
            weights=_count_weights(block),
            itemsize=checkpoint.dtype.itemsize,
        )

    @property
    def block(self) -> int:
        """Return the bytes of a block."""
        return self.weights * self.itemsize

    @property
    def next_block(self) -> int:
        """Return the bytes of the block that a GPU fetches while the one before it computes."""
        return self.block if self.blocks > 1 else 0

    @property
    def table_entries(self) -> int:
        """Return the number of entries of the embedding, or of lm_head."""
        return self.vocabulary * self.hidden

    @property
    def table(self) -> int:
        """Return the bytes of the embedding, or of lm_head."""
        return self.table_entries * self.itemsize

    @property
    def tables_through_host(self) -> float:
        """Return the bytes of embedding and lm_head that a GPU's host holds at the same time during a walk."""
        return TABLES_THROUGH_HOST * self.table

    def logits(self, positions: int) -> int:
        """Return the bytes of float32 logits of some positions."""
        return positions * self.vocabulary * 4

    def hidden_states(self, tokens: int) -> int:
        """Return the bytes of the hidden states of some tokens between two blocks."""
        return tokens * self.hidden * self.itemsize

    def forward(self, tokens: int) -> int:
        """Return the bytes that a batch takes on its way through a block, without gradients."""
        return tokens * 4 * (FORWARD_HIDDEN * self.hidden + FORWARD_INNER * self.inner)

    def graph(self, tokens: int) -> float:
        """Return the bytes that autograd keeps of a batch in a quantized block."""
        return tokens * GRAPH_BYTES * self._graph_values

    def kept_graphs(self, tokens: int) -> float:
        """Return the bytes that autograd keeps of a batch in all blocks."""
        return self.blocks * tokens * KEPT_GRAPH_BYTES * self._graph_values

    @property
    def _graph_values(self) -> int:
        return GRAPH_HIDDEN * self.hidden + GRAPH_INNER * self.inner + GRAPH_KEYS * self.keys


def _count_weights(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())
