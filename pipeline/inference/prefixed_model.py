"""A whole model with its prefix in front of whatever it reads: quantized or not, an ordinary transformers model.

    checkpoint = Checkpoint(Path("artifacts/finetuning"), "finetuning")
    model = assemble_model(checkpoint, load_prefix_kv(checkpoint.folder, checkpoint.stage))
    model.generate(**checkpoint.tokenizer(["Once upon"], return_tensors="pt"))

It is the model's own class, with quantizers in its blocks, and a `forward` that prepares three things before the
class's own: a cache that begins with the prefix, a mask that lets everybody see it, positions that start behind it.
Callers pass what they would pass without a prefix: token ids, a mask over them, the cache of an earlier call.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from pipeline.blocks.kv_cache import CACHE, PrefixCache, make_layer
from pipeline.blocks.quantized import load_block
from pipeline.blocks.sliding import make_sliding_mask
from pipeline.inspection.saturation import SaturationProbe
from pipeline.models.architectures import check_rope, find_architecture, find_sliding_window
from pipeline.models.checkpoint import Checkpoint, build_skeleton

logger = logging.getLogger(__name__)


class PrefixedModel(PreTrainedModel):
    """Goes in front of a causal language model's class; made by `prefix_model_`.

    Attributes:
        prefix_kv: [L, 2, kv_heads, P, d], keys (behind RoPE) and values of the prefix, or None.
        start_token_id: what must not stand at the beginning of a text, as the prefix has it already, or None.
        text_start_token_id: what belongs at the beginning of every text, or None.
    """

    prefix_kv: torch.Tensor | None
    start_token_id: int | None
    text_start_token_id: int | None
    supports_gradient_checkpointing = False  # see `forward`

    def __reduce__(self) -> tuple[Any, ...]:
        """Its class has no name to be found by: pickles hold the one behind it."""
        return _new_prefixed, (type(self).__mro__[2],), self.__dict__

    def make_cache(self) -> PrefixCache:
        """An empty cache, to be passed as `past_key_values` (`cache`): the prefix, and quantizers for what follows."""
        blocks = self.base_model.layers
        own: Any = [None] * len(blocks) if self.prefix_kv is None else self.prefix_kv
        windows = [find_sliding_window(self.config, block) for block in blocks]
        return PrefixCache([make_layer(*each) for each in zip(blocks, own, windows, strict=True)])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's own. Nothing of the prefix is passed.

        Args:
            attention_mask: [B, past + T], 0 for padding on either side. Without `position_ids`, positions count what it
                does not mask.
            past_key_values, cache: None, or what an earlier call returned, or `make_cache()`. One argument of two
                names, of which transformers has the second since 5.24.

        Raises:
            ValueError: a cache of another kind or under both names, a mask that is not [B, past + T], attention kernels
                that cannot keep the prefix in sight where blocks slide, or gradient checkpointing.
            UnsupportedModelError: a text so long that RoPE would turn what is in the cache in another way.
        """
        if self.training and any(getattr(block, "gradient_checkpointing", False) for block in self.base_model.layers):
            raise ValueError(
                "gradient checkpointing takes the cache away from blocks, and with it the prefix and the quantizers of "
                "keys and values; switch it off"
            )
        given = _choose_cache(past_key_values, cache)
        cache = self.make_cache() if given is None else given
        if not isinstance(cache, PrefixCache):
            raise ValueError(
                f"{CACHE} is a {type(cache).__name__}, which holds no prefix and quantizes nothing; pass None, "
                "or model.make_cache()"
            )
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        past, prefix = cache.get_seq_length(), cache.prefix_tokens
        if prefix + past:  # a text that is read in one go, without a prefix, has no keys that were turned before
            check_rope(self.config, prefix + past + length)
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] != past + length:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}; pass [batch, {past + length}], a 1 for "
                    "every token read so far that is no padding, without the prefix"
                )
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        if past == 0 and input_ids is not None:
            self._warn_of_second_start(input_ids, attention_mask)
        cache.expect_(past + length, attention_mask)
        if position_ids is not None:
            position_ids = position_ids + prefix
        with cache.counting_prefix():
            shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            attention_mask = self._make_mask(shape, attention_mask, cache)
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        if use_cache is False and CACHE in output:
            output[CACHE] = None  # it was there for the prefix alone
        return output

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """As the model's own; the cache is one that begins with the prefix.

        A `cache_implementation` that came with the model, as Gemma's does, is left out of account.

        Raises:
            ValueError: one is asked for that is not "dynamic".
        """
        config, kind = generation_config or self.generation_config, kwargs.get("cache_implementation")
        if kind is None and config.cache_implementation != self.generation_config.cache_implementation:
            kind = config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r} holds no prefix and quantizes nothing; leave it out")
        if kind is not None or config.cache_implementation is not None:
            kwargs["cache_implementation"] = None
        given = _choose_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if given is None and kwargs.get("use_cache", config.use_cache) is not False:
            given = self.make_cache()
        if given is not None:
            kwargs[CACHE] = given
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: transformers' continuous batching has a cache of its own, in pages."""
        raise ValueError(
            "continuous batching (generate_batch) keeps keys and values in pages of its own, which hold no prefix and "
            "quantize nothing; call generate with a padded batch and its attention_mask"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As the model's own; an exported model's folder is complete: its manifest is written anew, and sent along."""
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr", "private") if key in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if (quantizer := getattr(self, "hf_quantizer", None)) is not None:
            quantizer.complete_folder(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    def _make_mask(
        self, shape: tuple[int, int], text_mask: torch.Tensor | None, cache: PrefixCache
    ) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """The mask over prefix and text that the class's own forward takes for [B, T] new tokens.

        Where blocks slide it is ready-made: its own would let the prefix slide out of sight.
        """
        prefix, whole = cache.prefix_tokens, text_mask
        if text_mask is not None:
            whole = torch.cat((text_mask.new_ones(len(text_mask), prefix), text_mask), dim=1)
        if not prefix or not any(cache.is_sliding):
            return whole
        like, past = self.get_input_embeddings().weight.new_empty(*shape, 0), cache.get_seq_length()
        window = self.config.sliding_window
        sliding = make_sliding_mask(self.config, window, like, prefix, past, cache.dropped, text_mask)
        if find_architecture(self.config).slides_throughout:
            return sliding
        return {"full_attention": create_causal_mask(self.config, like, whole, cache), "sliding_attention": sliding}

    def _warn_of_second_start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if self.start_token_id is None or input_ids.shape[1] == 0:
            return
        first = input_ids[:, :1] if attention_mask is None else input_ids.gather(1, attention_mask.argmax(1, True))
        if (first == self.start_token_id).any():
            logger.warning(
                "a text begins with the start token (id %d), which the prefix has already: a second one can bring the "
                "outliers back; leave it out (add_special_tokens=False, or strip_start_token)",
                self.start_token_id,
            )


def _choose_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; pass one of them")
    return cache if past_key_values is None else past_key_values


def _new_prefixed(model_class: type) -> PrefixedModel:
    model = _prefixed_class(model_class).__new__(_prefixed_class(model_class))
    nn.Module.__init__(model)
    return model


@functools.cache
def _prefixed_class(model_class: type) -> type:
    return type(model_class.__name__, (PrefixedModel, model_class), {})


def prefix_model_(
    model: PreTrainedModel,
    prefix_kv: torch.Tensor | None,
    start_token_id: int | None = None,
    text_start_token_id: int | None = None,
) -> PreTrainedModel:
    """Put a prefix [L, 2, kv_heads, P, d] (None: an empty one) in front of whatever `model` reads, and return it."""
    model.__class__ = _prefixed_class(type(model))
    model.register_buffer("prefix_kv", prefix_kv)
    model.start_token_id = None if prefix_kv is None or text_start_token_id is not None else start_token_id
    model.text_start_token_id = text_start_token_id
    return model


def strip_start_token(token_ids: list[int], model: PreTrainedModel) -> list[int]:
    """Token ids of one text without the start token, where the prefix has it already."""
    start = getattr(model, "start_token_id", None)
    return token_ids[1:] if start is not None and token_ids[:1] == [start] else token_ids


def assemble_model(
    checkpoint: Checkpoint,
    prefix_kv: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    text_start_token_id: int | None = None,
) -> PreTrainedModel:
    """The whole model of a checkpoint, plain, rotated or quantized, on `device`, ready to run.

    Args:
        prefix_kv: [L, 2, kv_heads, P, d] in the checkpoint's basis.
        text_start_token_id: the start token between the prefix and every text, or None.
    """
    architecture = checkpoint.architecture
    model = build_skeleton(checkpoint.config)
    for index in range(checkpoint.block_count):
        block = load_block(checkpoint, index, device)
        block.self_attn.layer_idx = index
        model.model.layers[index] = block
    table = checkpoint.load_tensor(architecture.embedding).to(device, checkpoint.dtype)
    model.model.embed_tokens = checkpoint.build_embedding(table)
    model.lm_head.weight = nn.Parameter(checkpoint.load_lm_head().weight.to(device), requires_grad=False)
    model.model.norm = checkpoint.load_final_norm().requires_grad_(False).to(device)
    model.model.rotary_emb = checkpoint.build_rotary_embedding().to(device)
    model.tie_weights()
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    if prefix_kv is None and not checkpoint.settings:
        return model.eval()
    prefix_kv = None if prefix_kv is None else prefix_kv.to(device, checkpoint.dtype)
    return prefix_model_(model.eval(), prefix_kv, checkpoint.tokenizer.bos_token_id, text_start_token_id)


@contextmanager
def probe_saturation(model: PreTrainedModel) -> Iterator[list[SaturationProbe]]:
    """Counts, as long as it is entered, what of everything `model` does (decoding included) lies beyond static ranges.

    Yields a probe per block: `[probe.report() for probe in probes]`.
    """
    architecture = find_architecture(model.config)
    with ExitStack() as stack:
        yield [stack.enter_context(SaturationProbe(block, architecture)) for block in model.base_model.layers]
