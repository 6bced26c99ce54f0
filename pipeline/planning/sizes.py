"""What matters of a model's shape to a plan of memory: widths, counts, and what a batch takes on its way.

Counts of floats a token or a weight are measured on Llama-shaped models.
"""

from dataclasses import dataclass

from pipeline.models.checkpoint import Checkpoint

_POSITIONS = 128  # of training/divergence.py and evaluation/perplexity.py, whose logits exist at a time


@dataclass(frozen=True)
class Sizes:
    """What matters of a model's shape.

    Attributes:
        hidden, inner, keys, queries: widths of the residual stream, the MLP, all keys' heads, all queries' heads.
        vocabulary, blocks: how many.
        numbers: parameters of a block.
        item: bytes of one of them in the checkpoint.
    """

    hidden: int
    inner: int
    keys: int
    queries: int
    vocabulary: int
    blocks: int
    numbers: int
    item: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Sizes":
        config, block = checkpoint.config, checkpoint.build_block(0)
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_key_value_heads * block.self_attn.head_dim,
            config.num_attention_heads * block.self_attn.head_dim,
            config.vocab_size,
            checkpoint.block_count,
            sum(parameter.numel() for parameter in block.parameters()),
            checkpoint.dtype.itemsize,
        )

    @property
    def table(self) -> int:
        """Bytes of the embedding, or of lm_head."""
        return self.vocabulary * self.hidden * self.item

    @property
    def ahead(self) -> int:
        """Bytes of the block that is fetched while the one before it computes."""
        return self.numbers * self.item if self.blocks > 1 else 0

    @property
    def tables_passing(self) -> float:
        """Of embedding and lm_head, what is on a GPU's host at a time while one walks (measured on an H200)."""
        return 1.65 * self.table

    @property
    def logits(self) -> int:
        return _POSITIONS * self.vocabulary * 4

    def stream(self, tokens: int) -> int:
        return tokens * self.hidden * self.item

    def forward(self, tokens: int) -> int:
        """What a batch takes on its way through a block, without gradients."""
        return tokens * 4 * (6 * self.hidden + 4 * self.inner)

    def graph(self, tokens: int) -> float:
        """What autograd keeps of a batch in a quantized block."""
        return tokens * 4.6 * (28 * self.hidden + 10 * self.inner + 8 * self.keys)

    def kept_graphs(self, tokens: int) -> float:
        """The same of all blocks at once."""
        return self.blocks * tokens * 2.8 * (28 * self.hidden + 10 * self.inner + 8 * self.keys)
