"""The sites of a decoder block: where activations, keys and values are quantized.

params.yaml is checked with these names, so this module does not import torch.
"""

from enum import StrEnum
from typing import Literal

QuantizerGroup = Literal["weights", "activations", "keys", "values"]  # of params.yaml


class Site(StrEnum):
    """A site of a block; the members are in the order in which data flows.

    | site             | values                     | width | rotation before it   | static scales | dynamic scales |
    | ---------------- | -------------------------- | ----- | -------------------- | ------------- | -------------- |
    | attention_input  | input of q/k/v_proj        | D     | R1, merged or online | tensor, group | token, group   |
    | key              | keys after RoPE, or before | d     | R3 online            | head, group   | token and head |
    | value            | output of v_proj           | d     | R2 merged            | head, group   | token and head |
    | attention_output | input of o_proj            | H · d | R2 merged, R5 online | tensor, group | token, group   |
    | mlp_input        | input of gate/up_proj      | D     | R1, merged or online | tensor, group | token, group   |
    | mlp_hidden       | input of down_proj         | F     | R4 online            | tensor, group | token, group   |

    D is the hidden size, F the intermediate size, H the number of query heads and d the size of a head. The width is
    the size of the last dimension, which a group size must divide. The last two columns say what shares a scale; a
    group is `group_size` consecutive channels of it.
    """

    ATTENTION_INPUT = "attention_input"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention_output"
    MLP_INPUT = "mlp_input"
    MLP_HIDDEN = "mlp_hidden"

    def __repr__(self) -> str:
        """Return the quoted name, as messages show it."""
        return repr(self.value)


RESIDUAL_SITES = (Site.ATTENTION_INPUT, Site.MLP_INPUT)  # where attention and the MLP read the residual stream
CACHE_SITES = (Site.KEY, Site.VALUE)  # quantized by the KV cache
INPUT_SITES = tuple(site for site in Site if site not in CACHE_SITES)  # inputs of linears

# One quantizer of each group, for settings that a whole group shares.
REPRESENTATIVES: dict[QuantizerGroup, str] = {
    "weights": "q_proj",
    "activations": Site.ATTENTION_INPUT,
    "keys": Site.KEY,
    "values": Site.VALUE,
}


def site_group(site: str) -> QuantizerGroup:
    """Return the group of params a site or linear belongs to: q_proj -> weights, mlp_input -> activations."""
    if site.endswith("_proj"):
        return "weights"
    return "keys" if site == Site.KEY else "values" if site == Site.VALUE else "activations"


def base_site(site: str) -> str:
    """Return the name that params have for a site or linear of a block with experts.

    experts.3.down_proj -> down_proj, mlp_hidden.experts.3 -> mlp_hidden. Other names are returned unchanged.
    """
    return site.rpartition(".")[2] if site.endswith("_proj") else site.partition(".")[0]
