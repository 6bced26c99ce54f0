"""Makes transformers load exported folders: `import pipeline.hf`, then `AutoModelForCausalLM.from_pretrained(folder)`.

config.json of an exported folder has a `quantization_config` with `quant_method: prefixquant`; this module registers
what transformers then asks for, through its public registry. The model's own class is built, its linears are replaced
by packed ones, quantizers and prefix are put in, and the tensors are loaded by transformers.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pipeline.blocks.quantized import QuantizedLinear, add_quantizers_, find_settings, find_site_quantizers
from pipeline.export.packed_block import pack_block_
from pipeline.export.prefixed_model import prefix_model_
from pipeline.models.architectures import find_architecture
from pipeline.runtime.errors import PipelineError

METHOD = "prefixquant"
FORMAT_VERSION = 2


class ExportError(PipelineError):
    """An exported folder is damaged, incomplete, foreign, or of a newer format."""


def check_format(where: object, version: object) -> None:
    """Raises ExportError unless `version` is the layout this project reads and writes."""
    if version != FORMAT_VERSION:
        raise ExportError(
            f"{where}: format_version={version!r}; this version of the project reads {FORMAT_VERSION}: update it, or "
            "export the model again"
        )


@register_quantization_config(METHOD)
class PrefixQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of an exported folder.

    Attributes:
        blocks: settings of every block, as `blocks.quantized.describe_blocks` writes them: the quantizer of each site
            and which online rotations the weights count on.
        prefix: {"tokens": P, "token_ids": [P] or [] for a continuous one, "start_token_id": the start token that the
            prefix makes superfluous, or None}.
        format_version: of the layout of tensors.
        text_start_token_id: the start token that belongs in front of every text, or None.
    """

    def __init__(
        self,
        blocks: dict[str, Any],
        prefix: dict[str, Any],
        format_version: int,
        text_start_token_id: int | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        check_format("quantization_config", format_version)
        if unknown:
            raise ExportError(f"quantization_config has unknown keys: {', '.join(sorted(unknown))}")
        self.quant_method = METHOD
        self.format_version = format_version
        self.blocks = blocks
        self.prefix = prefix
        self.text_start_token_id = text_start_token_id


@register_quantizer(METHOD)
class PrefixQuantizer(HfQuantizer):
    """What transformers calls around loading."""

    requires_calibration = True
    quantization_config: PrefixQuantConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        build_packed_(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        tensors = model.state_dict(keep_vars=True)
        # transformers marks what it has loaded, and only warns of what it has not.
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            raise ExportError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}; get a complete copy")
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def build_packed_(model: PreTrainedModel, config: PrefixQuantConfig) -> None:
    """Turn a plain model on the meta device into the exported one, its tensors still to be loaded."""
    architecture = find_architecture(model.config)
    heads = model.config.num_key_value_heads
    with torch.device("meta"):
        for index, block in enumerate(model.model.layers):
            settings = find_settings(config.blocks, index)
            add_quantizers_(block, architecture, settings, heads)
            for module in list(block.modules()):
                if isinstance(module, QuantizedLinear):
                    module.declare_quantized_()
            pack_block_(block, architecture)
            for quantizer in find_site_quantizers(block, architecture).values():
                quantizer.calibrated = quantizer.spec.enabled
        tokens = config.prefix["tokens"]
        shape = (len(model.model.layers), 2, heads, tokens, model.model.layers[0].self_attn.head_dim)
        prefix_kv = torch.empty(shape, dtype=torch.float32) if tokens else None
    prefix_model_(model, prefix_kv, config.prefix["start_token_id"], config.text_start_token_id)
