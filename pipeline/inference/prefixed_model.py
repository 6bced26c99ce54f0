"""A whole model with its prefix before every text it reads: quantized or not, an ordinary transformers model.

    checkpoint = Checkpoint(Path("artifacts/finetuning"), "finetuning")
    model = assemble_model(checkpoint, load_prefix_kv(checkpoint.folder, checkpoint.stage))
    model.generate(**checkpoint.tokenizer(["Once upon"], return_tensors="pt"))

It is the model's own class, with quantizers in its blocks and a `forward` of its own. That `forward` prepares a cache
that begins with the prefix, positions that start after it, and, where transformers' own mask would not do, a mask. Then
it calls the class's `forward`. Callers pass the same arguments as without a prefix: token ids, a mask over them, the
cache of an earlier call.

The model equals the original reading prefix + text, at every length, in layers of every kind.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import ModelOutput

from pipeline.blocks.kv_cache import CACHE, CountingCache, PrefixCache, SlidingLayer, make_layer
from pipeline.blocks.packed_layers import has_codes, make_packed_layer
from pipeline.blocks.quantized import load_block
from pipeline.blocks.sliding import count_places, make_mask
from pipeline.inference.packed_block import keep_unpacked_
from pipeline.inspection.saturation import SaturationProbe
from pipeline.models.architectures import check_rope, find_architecture, find_sliding_window
from pipeline.models.checkpoint import LM_HEAD, Checkpoint, build_skeleton
from pipeline.models.layers import Body, Generates, Movable, list_layers

logger = logging.getLogger(__name__)


class OffloadHook(Protocol):
    """The part of accelerate's hook that is used here: the tensors of a module that is not in memory."""

    weights_map: Mapping[str, torch.Tensor]


class PrefixedModel(PreTrainedModel):
    """Comes before a causal language model's class in its bases; made by `prefix_model_`.

    Attributes:
        prefix_kv: [L, 2, kv_heads, P, d], keys (after RoPE) and values of the prefix, or None.
        start_token_id: the start token that a text must not begin with, because the prefix ends in it, or None.
        text_start_token_id: the start token that belongs at the beginning of every text, or None.
        unpacked: whether the weights of an exported model are kept unpacked; None for a choice by free memory.
        packs_cache: whether new caches store keys and values with static ranges as codes (`packed_layers.py`).
    """

    model: Body
    lm_head: nn.Linear
    _hf_hook: OffloadHook
    unpacked: bool | None = None
    packs_cache: bool = False
    prefix_kv: torch.Tensor | None
    start_token_id: int | None
    text_start_token_id: int | None
    supports_gradient_checkpointing = False  # see `forward`

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the class it was made from: its own has no name to be found by."""
        return _new_prefixed, (type(self).__mro__[2],), self.__dict__

    @property
    def _body(self) -> Body:
        return cast(Body, self.base_model)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Cast or move the model. Frequencies of RoPE and the float32 tensors of routers keep their dtype.

        The prefix was turned by exact frequencies, and small steps of these tensors decide between experts.
        """
        rotary = self._body.rotary_emb
        exact = dict(rotary.named_buffers())
        decisive = self._list_float32()
        super()._apply(fn, recurse)
        for name, buffer in rotary.named_buffers():
            if buffer.dtype != exact[name].dtype:
                setattr(rotary, name, exact[name].to(buffer.device))
        for (module, name), tensor in decisive.items():
            changed = getattr(module, name)
            if changed.dtype != tensor.dtype:
                changed.data = tensor.to(changed.device)
        return self.keep_unpacked_(self.unpacked)

    def _list_float32(self) -> dict[tuple[nn.Module, str], torch.Tensor]:
        """Return (module, name in it) -> a tensor that is float32 in models of every dtype, without a copy."""
        architecture = find_architecture(self.config)
        return {
            (module, name): tensor.detach()
            for path, module in self._body.named_modules()
            for name, tensor in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))
            if architecture.keeps_float32(f"{path}.{name}")
        }

    def keep_unpacked_(self, keep: bool | None) -> Self:
        """Keep the weights of an exported model unpacked between calls, or drop them after each layer.

        The result is the same. Unpacked weights are added to the packed ones, take the model's full size, and make
        calls faster. They are unpacked when they are first needed.

        Args:
            keep: None for a choice by free memory, as after loading (`packed_block.keep_unpacked_`).
        """
        self.unpacked = keep
        keep_unpacked_(self, keep, self.dtype)
        return self

    def half(self, *args: object) -> Self:
        """Cast to float16, which transformers refuses for quantized models. Quantizers keep their dtype."""
        cast(Movable, self).to(torch.float16)
        return self

    def float(self, *args: object) -> Self:
        """Cast to float32, which transformers refuses for quantized models. Quantizers keep their dtype."""
        cast(Movable, self).to(torch.float32)
        return self

    def make_cache(self, packed: bool | None = None) -> PrefixCache:
        """Return an empty cache, to be passed as `past_key_values` (`cache`). It begins with the prefix.

        Args:
            packed: whether keys and values with static ranges are stored as codes; None: as `packs_cache` says.
        """
        blocks, prefix_kv = list_layers(self), self._read_prefix()
        prefixes = [None] * len(blocks) if prefix_kv is None else prefix_kv.clone()
        packed = self.packs_cache if packed is None else packed
        layers = []
        for block, prefix in zip(blocks, prefixes, strict=True):
            make = make_packed_layer if packed and has_codes(block.self_attn) else make_layer
            layers.append(make(prefix, find_sliding_window(self.config, block)))
        return PrefixCache(layers)

    def _read_prefix(self) -> torch.Tensor | None:
        """Return `prefix_kv`, also from where accelerate holds it between calls when it offloads the whole model."""
        offloaded = self.prefix_kv is not None and self.prefix_kv.is_meta
        return self._hf_hook.weights_map["prefix_kv"] if offloaded else self.prefix_kv

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
        """Compute like the model's own forward. Callers pass nothing for the prefix.

        Args:
            attention_mask: [B, past + T], 0 for padding on either side. Without `position_ids`, positions count what it
                does not mask.
            position_ids: [B or 1, T], without the prefix. They may begin later than at 0 or leave gaps: the result is
                that of the original with the prefix at 0 to P - 1 and the text at P + `position_ids`. If they restart
                at 0 within a row, several texts are packed in it. Each is read with the prefix and without the others.
                That needs `use_cache=False` and no mask. Gaps in such a call are refused.
            past_key_values, cache: None, the cache returned by an earlier call, or `make_cache()`. Two names of one
                argument; transformers uses the second since 5.24.

        Raises:
            ValueError: neither `input_ids` nor `inputs_embeds`, or empty ones, a cache of another kind or under both
                names, a mask that is not [B, past + T], positions that are not [B or 1, T] or are negative, packed
                texts with a cache, with a mask or for kernels that take no mask, or gradient checkpointing.
            UnsupportedModelError: a text so long that RoPE would turn the keys in the cache in another way.
        """
        if self.training and any(getattr(block, "gradient_checkpointing", False) for block in self._body.layers):
            raise ValueError(
                "gradient checkpointing takes the cache away from blocks, and with it the prefix and the quantizers of "
                "keys and values. Switch it off."
            )
        passed = _choose_cache(past_key_values, cache)
        keeps_cache = passed is not None or (self.config.use_cache if use_cache is None else use_cache)
        cache = self.make_cache(None if keeps_cache else False) if passed is None else passed
        if not isinstance(cache, PrefixCache):
            raise ValueError(
                f"{CACHE} is a {type(cache).__name__}, which holds no prefix and quantizes nothing. Pass None, "
                "or model.make_cache()."
            )
        self._check_cache(cache)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("there is nothing to read. Pass input_ids or inputs_embeds.")
        shape, past, prefix = tokens.shape[:2], cache.get_seq_length(), cache.prefix_tokens
        length = shape[1]
        if shape[0] == 0 or length == 0:
            raise ValueError(
                f"the input has shape {list(tokens.shape)}: there is nothing to read. Pass at least one text with at "
                "least one token."
            )
        if position_ids is not None and position_ids.dim() != 2:
            raise ValueError(
                f"position_ids has shape {list(position_ids.shape)}. Pass [batch, {length}] or [1, {length}], counted "
                "without the prefix."
            )
        if prefix + past:  # a text that is read in one go, without a prefix, has no keys that were turned before
            check_rope(self.config, prefix + past + length)
        whole_mask = None
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor):
                raise ValueError(
                    f"attention_mask is a {type(attention_mask).__name__}. Pass a tensor [batch, {past + length}]: the "
                    "masks of single layers are made here, because they depend on the prefix."
                )
            if attention_mask.dim() == 2 and attention_mask.shape[0] == 1:  # one for all texts
                attention_mask = attention_mask.expand(shape[0], -1)
            sizes = attention_mask.shape  # compared one by one: torch.export would fix a whole shape
            if len(sizes) != 2 or sizes[0] != shape[0] or sizes[1] != past + length:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}. Pass [batch, {past + length}], a 1 for "
                    "every token read so far that is no padding, without the prefix."
                )
            whole_mask = torch.nn.functional.pad(attention_mask, (prefix, 0), value=1)
        texts = None
        if position_ids is not None and length > 1:
            new_mask = None if attention_mask is None else attention_mask[:, -length:]
            texts = _number_texts(position_ids.expand(shape), new_mask, keeps_cache)
        if texts is None and kwargs.get("cu_seq_lens_q") is not None and len(kwargs["cu_seq_lens_q"]) > 2:
            raise ValueError(
                "cu_seq_lens_q marks several texts in a row, and position_ids do not restart with them. Pass "
                "position_ids that begin at 0 in each text, use_cache=False and no attention_mask."
            )
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        if past == 0 and input_ids is not None:
            self._warn_of_second_start(input_ids, attention_mask)
        if position_ids is not None:
            position_ids = position_ids + prefix
        cache.begin_call_(None if whole_mask is None else whole_mask[:, : prefix + past])
        positions = position_ids
        if positions is None:
            positions = torch.arange(prefix + past, prefix + past + length, device=tokens.device).unsqueeze(0)
        counting = cache.count_prefix(positions)
        mask = self._make_mask(shape, whole_mask, texts, cache=counting, prefix=prefix, device=tokens.device)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: counting},
            **kwargs,
        )
        if keeps_cache:
            cache.end_call_(whole_mask)
        return _replace_cache(output, counting, None if use_cache is False or not keeps_cache else cache)

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Generate like the model's own method, with a cache that begins with the prefix.

        A `cache_implementation` that came with the model, as Gemma's does, is ignored.

        Raises:
            ValueError: the caller asks for a `cache_implementation` that is not "dynamic".
        """
        config, kind = generation_config or self.generation_config, kwargs.get("cache_implementation")
        if kind is None and config.cache_implementation != self.generation_config.cache_implementation:
            kind = config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r} holds no prefix and quantizes nothing. Leave it out.")
        if kind is not None or config.cache_implementation is not None:
            kwargs["cache_implementation"] = None
        cache = _choose_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is None and kwargs.get("use_cache", config.use_cache) is not False:
            cache = self.make_cache()
            if getattr(config, "is_assistant", False):  # tokens that it guessed wrongly are taken back
                cache.activate_past_recording()
        if cache is not None:
            kwargs[CACHE] = cache
        return cast(Generates, super()).generate(inputs, generation_config=generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError: transformers' continuous batching has a cache of its own, in pages."""
        raise ValueError(
            "continuous batching (generate_batch) keeps keys and values in pages of its own, which hold no prefix and "
            "quantize nothing. Call generate with a padded batch and its attention_mask."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Raise ValueError: there is no unquantized model to go back to."""
        raise ValueError(
            "dequantize() has no unquantized model to return: weights are rotated and rounded, and activations, keys "
            "and values are quantized around them. Load the original model instead."
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save like the model's method. The folder of an exported model gets a new manifest, which is pushed too."""
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr", "private") if key in kwargs}
        super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        if (quantizer := getattr(self, "hf_quantizer", None)) is not None:
            quantizer.complete_folder(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    def _check_cache(self, cache: PrefixCache) -> None:
        """Raise ValueError if a model of another shape made `cache`."""
        blocks, prefix_kv = self._body.layers, self._read_prefix()
        prefixes = [getattr(layer, "prefix_kv", None) for layer in cache.layers]
        expected = None if prefix_kv is None else prefix_kv.shape[1:]
        if len(prefixes) != len(blocks) or any((None if x is None else x.shape) != expected for x in prefixes):
            shape = None if prefixes[0] is None else list(prefixes[0].shape)
            raise ValueError(
                f"{CACHE} holds {len(prefixes)} layers and a prefix of shape {shape}. This model has {len(blocks)} "
                f"layers and a prefix of shape {expected and list(expected)}. Pass None, or a cache that it made."
            )

    def _make_mask(
        self,
        shape: torch.Size,
        mask: torch.Tensor | None,
        texts: torch.Tensor | None,
        *,
        cache: Cache,
        prefix: int,
        device: torch.device,
    ) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """Return the mask that the class's own forward takes for [B, T] new tokens after prefix and text.

        Args:
            mask: [B, P + past + T], 0 for padding, or None.
            texts: [B, T], the numbers of packed texts, or None.
            cache: one that counts the prefix.
            device: device of the tokens.
        """
        slides = any(cache.is_sliding)
        takes_mask = "flash" not in (self.config._attn_implementation or "")
        if texts is None and not (mask is not None and prefix and slides and takes_mask):
            return mask  # the class's own mask is right, as flash kernels are: they read texts without their padding
        if not takes_mask:
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} takes no mask that keeps packed texts apart "
                "(position_ids restart). Use sdpa or eager, or one text per row."
            )
        table = self.get_input_embeddings().weight
        assert isinstance(table, torch.Tensor)
        hidden = torch.empty(*shape, 0, dtype=table.dtype, device=device)
        past = cache.get_seq_length()
        places = None
        if texts is not None:
            places = torch.nn.functional.pad(_count_within(texts), (prefix, 0))
            places[:, :prefix] = torch.arange(-prefix, 0, device=places.device)
            texts = torch.nn.functional.pad(texts, (prefix, 0), value=-1)
        elif mask is not None:
            places = count_places(mask)
        options = {"past": past, "places": places, "mask": mask, "texts": texts}
        full = sliding = None
        if slides:
            layer = cache.layers[cache.is_sliding.index(True)]
            assert isinstance(layer, SlidingLayer)
            sliding = make_mask(self.config, hidden, window=layer.window, dropped=layer.dropped, **options)
        if not all(cache.is_sliding):
            if texts is None:
                full = create_causal_mask(self.config, hidden, mask, cache)
            else:
                full = make_mask(self.config, hidden, **options)
        if sliding is None or find_architecture(self.config).slides_throughout:
            return full if sliding is None else sliding
        return {"full_attention": full, "sliding_attention": sliding}

    def _warn_of_second_start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if self.start_token_id is None or input_ids.shape[1] == 0 or torch.compiler.is_compiling():
            return
        first = input_ids[:, :1]
        if attention_mask is not None:
            first = input_ids.gather(1, attention_mask.long().argmax(1, True))
        if (first == self.start_token_id).any():
            logger.warning(
                "a text begins with the start token (id %d), which the prefix has already: a second one can bring the "
                "outliers back. Leave it out (add_special_tokens=False, or strip_start_token).",
                self.start_token_id,
            )


def _require_prefix(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError if the body of a model is called by itself: it would read a text without the prefix."""
    if not isinstance(kwargs.get(CACHE), CountingCache):
        raise ValueError(
            f"{type(body).__name__} is a part of a model with a prefix, and reads none by itself. Call the model, with "
            "output_hidden_states=True for hidden states, or load the folder with AutoModel."
        )


def _choose_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument. Pass one of them.")
    return cache if past_key_values is None else past_key_values


def _number_texts(position_ids: torch.Tensor, mask: torch.Tensor | None, keeps_cache: bool) -> torch.Tensor | None:
    """Return the number of the text that each token [B, T] belongs to, or None if each row is one text.

    As in transformers, a new text begins where a position does not follow the one before it.

    Args:
        mask: [B, T], 0 for padding, or None.
        keeps_cache: whether the call has a cache.

    Raises:
        ValueError: positions restart, and the call has a mask, or a cache, which holds one text; a packed text does not
            begin at 0; or positions are negative.
    """
    steps = position_ids.diff(dim=-1)
    numbers = torch.nn.functional.pad(steps != 1, (1, 0)).cumsum(-1)
    if torch.compiler.is_compiling():  # no branch on data
        return numbers if mask is None and not keeps_cache else None
    negative = position_ids < 0
    if mask is not None:
        negative = negative & mask.bool()  # positions of padding mean nothing
    if negative.any():
        raise ValueError(
            f"position_ids has {position_ids.min()}: negative positions are those of the prefix. Count from 0, without "
            "the prefix."
        )
    if mask is None and not keeps_cache:
        jumps = (steps != 1) & (position_ids[:, 1:] != 0)
        if jumps.any():
            row, place = jumps.nonzero()[0].tolist()
            before, after = position_ids[row, place : place + 2].tolist()
            raise ValueError(
                f"position_ids jump from {before} to {after} in row {row}. With use_cache=False and no attention_mask, "
                "that would begin another text, and the prefix would not come right before it. Pass an attention_mask "
                "of ones to read one text with a gap, or positions that begin at 0 in each packed text."
            )
        return numbers if (numbers > 0).any() else None
    restarts = steps <= 0
    if mask is not None:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    if restarts.any():
        raise ValueError(
            "position_ids restart within a row: several texts are packed in it. Pass use_cache=False and no "
            "attention_mask to read each text with the prefix and without the others, or pass one text per row."
        )
    return None


def _count_within(texts: torch.Tensor) -> torch.Tensor:
    """Return the place of each token in its own text [B, T]: texts 0 0 1 1 1 -> 0 1 0 1 2."""
    steps = torch.arange(texts.shape[1], device=texts.device).expand(texts.shape)
    begins = torch.nn.functional.pad(texts.diff(dim=-1), (1, 0), value=1) != 0
    return steps - torch.where(begins, steps, 0).cummax(-1).values


def _replace_cache(output: Any, counting: Cache, cache: PrefixCache | None) -> Any:
    """Return a model's output with `cache` in the place of the one that counts the prefix; None leaves it out."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: cache if value is counting else value for name, value in output.items()})
    values = (cache if value is counting else value for value in output)
    return tuple(value for value in values if value is not None)


def _new_prefixed(model_class: type[PreTrainedModel]) -> PrefixedModel:
    prefixed_class = _prefixed_class(model_class)
    model = prefixed_class.__new__(prefixed_class)
    nn.Module.__init__(model)
    return model


@functools.cache
def _prefixed_class(model_class: type[PreTrainedModel]) -> type[PrefixedModel]:
    return cast(type[PrefixedModel], type(model_class.__name__, (PrefixedModel, model_class), {}))


def prefix_model_(
    model: PreTrainedModel,
    prefix_kv: torch.Tensor | None,
    start_token_id: int | None = None,
    text_start_token_id: int | None = None,
) -> PrefixedModel:
    """Put a prefix [L, 2, kv_heads, P, d] before every text that `model` reads, and return the model.

    Args:
        prefix_kv: None for an empty prefix.
        start_token_id: see `PrefixedModel`; ignored if the prefix is empty or texts have a start token of their own.
        text_start_token_id: see `PrefixedModel`.
    """
    model.__class__ = _prefixed_class(type(model))
    prefixed = cast(PrefixedModel, model)
    prefixed.register_buffer("prefix_kv", prefix_kv)
    if prefix_kv is not None and model.base_model is not model:
        model.base_model.register_forward_pre_hook(_require_prefix, with_kwargs=True)
    prefixed.start_token_id = None if prefix_kv is None or text_start_token_id is not None else start_token_id
    prefixed.text_start_token_id = text_start_token_id
    return prefixed


def strip_start_token(token_ids: list[int], model: PreTrainedModel) -> list[int]:
    """Return the token ids of one text without the start token, if the prefix has it already."""
    start = getattr(model, "start_token_id", None)
    return token_ids[1:] if start is not None and token_ids[:1] == [start] else token_ids


def assemble_model(
    checkpoint: Checkpoint,
    prefix_kv: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    text_start_token_id: int | None = None,
) -> PreTrainedModel:
    """Return the whole model of a checkpoint, plain, rotated or quantized, on `device`, ready to run.

    Args:
        prefix_kv: [L, 2, kv_heads, P, d] in the checkpoint's basis.
        text_start_token_id: the start token between the prefix and every text, or None.
    """
    architecture = checkpoint.architecture
    model = build_skeleton(checkpoint.config)
    for index in range(checkpoint.block_count):
        block = load_block(checkpoint, index, device)
        block.self_attn.layer_idx = index
        for module in block.modules():
            if hasattr(module, "config"):  # one for all, so that `set_attn_implementation` reaches every block
                setattr(module, "config", model.config)  # noqa: B010 (nn.Module types attributes as tensors)
        model.model.layers[index] = block
    table = checkpoint.load_tensor(architecture.embedding).to(device, checkpoint.dtype)
    model.model.embed_tokens = checkpoint.build_embedding(table)
    quantized_head = checkpoint.load_quantized_head()
    if quantized_head is not None:
        model.set_submodule(LM_HEAD, quantized_head.to(device))
    else:
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
    """Count the values beyond static ranges in all that `model` computes inside the context, decoding included.

    Yields:
        A probe per block: `[probe.report() for probe in probes]`.
    """
    architecture = find_architecture(model.config)
    with ExitStack() as stack:
        yield [stack.enter_context(SaturationProbe(block, architecture)) for block in list_layers(model)]
