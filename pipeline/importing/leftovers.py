"""Tensors of a checkpoint that the model class has no place for: those that may be dropped, and those that may not.

Dropped, and reported by name of the part:

- tensors that the class of transformers ignores by its own list (`_keys_to_ignore_on_load_unexpected`)
- heads for multi-token prediction: `mtp.…`, or layers after the last one, as many as the config announces
- tables of RoPE that very old Llama files hold in each layer

All others are refused, although transformers would load the rest and log them. A LoRA adapter, a misspelt name or the
tensors of another class change the output, so without them the import would be another model without an error.
"""

import re

from torch import nn
from transformers import PreTrainedConfig

_MTP = "multi-token prediction"
_MTP_NAMES = re.compile(r"^(model\.)?(mtp|mtp_layers|mtp_block)\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_ROPE = "tables of RoPE"
_ROPE_NAMES = re.compile(r"rotary_emb\.inv_freq$")
_CLASS = "ignored by the model class"


def find_ignored(names: set[str], config: PreTrainedConfig, skeleton: nn.Module) -> dict[str, str]:
    """Return the left-over tensors that may be dropped: name -> the part it belongs to."""
    patterns = [re.compile(pattern) for pattern in getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()]
    extra = max((getattr(config, key, None) or 0 for key in _MTP_COUNTS), default=0)
    ignored = {}
    for name in sorted(names):
        layer = _LAYER.match(name)
        beyond = layer is not None and 0 <= int(layer.group(1)) - config.num_hidden_layers < extra
        if beyond or _MTP_NAMES.match(name):
            ignored[name] = _MTP
        elif _ROPE_NAMES.search(name):
            ignored[name] = _ROPE
        elif any(pattern.search(name) for pattern in patterns):
            ignored[name] = _CLASS
    return ignored


def name_remedy(unexpected: set[str]) -> str:
    """Return a sentence on how to get a checkpoint without some unexpected tensors."""
    if any("lora_" in name for name in unexpected):
        return "LoRA adapters must be merged first: with peft, merge_and_unload, then save_pretrained"
    if any(re.search(r"scale|zero|packed|qweight|absmax", name.rpartition(".")[2]) for name in unexpected):
        return (
            "They look like scales of quantized weights, which its config does not announce. Start from the original "
            "model, or get the config.json that belongs to these files"
        )
    return (
        "The model class has no place for the unexpected ones (layers for multi-token prediction are dropped only "
        "where the config states num_nextn_predict_layers). If they are not needed, import a copy without them: "
        "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(COPY), and the same with AutoTokenizer"
    )
