"""The quantized model as an ONNX graph: `torch.onnx.export` of the model's own class, with QDQ pairs in its blocks.

A QDQ pair is QuantizeLinear followed by DequantizeLinear. ONNX has no other way to say "this tensor is an integer":
runtimes look for the pairs, and multiply integers where a linear has them on both sides. So the graph has

    input of a linear     QuantizeLinear, DequantizeLinear    with the static scale and zero point of the site
    weight of a linear    an int8 or int4 initializer [in, out], DequantizeLinear by output channel or group
    new keys and values   QuantizeLinear, DequantizeLinear    by head, before they are appended to the past

and standard operators of opset 21 in between. All of it computes in float32.

The inputs are those that ONNX runtimes give to a decoder. The prefix is not in the graph: it is the past of the first
call.

    input_ids, position_ids    int64 [B, T]; positions begin at P, the length of the prefix
    attention_mask             int64 [B, past + T]; 0 for padding, 1 for the prefix too
    past_key_values.N.key      [B, kv heads, past, d]; present.N.key has past + T positions
    prefix.N.key               float32 [1, kv heads, P, d], only where the past holds integers

Two operators of this module represent the pair in torch. The exporter translates them (`TRANSLATIONS`). Everything
else, R3 and the mean of keys for example, is traced through the code that was evaluated.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21
from torch import nn

from pipeline.blocks.kv_cache import CACHE, as_quantized_attention
from pipeline.blocks.quantized import QuantizedLinear, find_input_module, find_quantized_linear
from pipeline.inference.packed_block import find_rotation
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.onnx_layout import name_inputs, name_outputs
from pipeline.models.architectures import find_architecture, find_sliding_window
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import Body, DecoderLayer, list_layers
from pipeline.models.sites import RESIDUAL_SITES
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec
from pipeline.runtime.errors import PipelineError

OPSET = 21
PER_TENSOR = -1
_HEAD_AXIS = 1  # of keys and values [B, heads, T, d]
_NARROW = 4  # weights of up to 4 bits are int4 initializers


@torch.library.custom_op("prefixquant::quantize_linear", mutates_args=())
def quantize_linear(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    """Return clip(round(x / scale) + zero_point) in the dtype of `zero_point`.

    Args:
        scale, zero_point: [], or [n] for one of each index of dimension `axis`.
    """
    limits = torch.iinfo(zero_point.dtype)
    codes = (x / _along(scale, x.dim(), axis)).round_().add_(_along(zero_point.float(), x.dim(), axis))
    return codes.clamp_(limits.min, limits.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("prefixquant::dequantize_linear", mutates_args=())
def dequantize_linear(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, block_size: int
) -> torch.Tensor:
    """Return (codes - zero_point) * scale, float32.

    Args:
        scale, zero_point: [], [n] for dimension `axis`, or, with a `block_size` above 0, one for as many consecutive
            indices of it: codes [8, 3], axis 0, block_size 4 -> scale [2, 3].
    """
    if block_size:
        scale, zero_point = (tensor.repeat_interleave(block_size, axis) for tensor in (scale, zero_point))
    else:
        scale, zero_point = (_along(tensor, codes.dim(), axis) for tensor in (scale, zero_point))
    return (codes.float() - zero_point.float()) * scale


@dequantize_linear.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, block_size: int) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _along(tensor: torch.Tensor, dimensions: int, axis: int) -> torch.Tensor:
    """Return a tensor [n] as [1, n, 1, …], n at `axis`; [] as it is."""
    return tensor.reshape([-1 if index == axis else 1 for index in range(dimensions)]) if tensor.dim() else tensor


def _translate_quantize(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    return opset21.QuantizeLinear(x, scale, zero_point, axis=max(axis, 0))


def _translate_dequantize(codes: Any, scale: Any, zero_point: Any, axis: int, block_size: int) -> Any:
    return opset21.DequantizeLinear(codes, scale, zero_point, axis=max(axis, 0), block_size=block_size)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.prefixquant.quantize_linear.default: _translate_quantize,
    torch.ops.prefixquant.dequantize_linear.default: _translate_dequantize,
}


class GraphMismatchError(PipelineError):
    """A checkpoint has other tensors than a graph."""


@dataclass(frozen=True)
class GraphShapes:
    """Fixed sizes of a graph, which reads one text per call.

    Attributes:
        sequence: tokens of a call, T.
        past: positions of the past, used or not.
    """

    sequence: int
    past: int


class GraphQuantizer(nn.Module):
    """A static quantizer as a QDQ pair: `ActivationQuantizer` for the exporter. It may apply a rotation first.

    Attributes:
        spec: as of the quantizer whose place it takes.
        axis: the dimension with one scale per index, or PER_TENSOR.
        rotation: float32 [C, C], by which its input is multiplied, or None.
        codes_only: whether it returns integers, for a cache of integers.
        adds_shift: whether it adds the mean back, which readers may have in their biases.
        one_pass: itself. The attribute by which blocks find a quantizer that rotates.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    shift: torch.Tensor | None
    rotation: torch.Tensor | None
    calibrated = True

    def __init__(
        self, source: ActivationQuantizer, rotation: torch.Tensor | None = None, *, adds_shift: bool = True
    ) -> None:
        """Take the place of `source`, which is static and has one scale, or one per head."""
        super().__init__()
        self.spec, self.adds_shift, self.codes_only = source.spec, adds_shift, False
        self.register_buffer("rotation", rotation)
        if not self.spec.enabled:
            return
        has_heads = source.scale.dim() > 1
        self.axis = _HEAD_AXIS if has_heads else PER_TENSOR
        shape = (-1,) if has_heads else ()
        dtype = find_code_dtype(self.spec)
        self.register_buffer("scale", source.scale.reshape(shape))
        zero_point = torch.zeros_like(source.scale) if self.spec.symmetric else source.zero_point
        self.register_buffer("zero_point", zero_point.reshape(shape).to(dtype))
        self.register_buffer("shift", source.shift if self.spec.centered else None)

    @property
    def one_pass(self) -> "GraphQuantizer":
        return self

    def takes(self, x: torch.Tensor) -> bool:
        """Return True: it accepts every input."""
        return True

    def count_(self) -> None:
        """Count nothing: a graph is traced once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rotation is not None:
            x = x @ self.rotation
        if not self.spec.enabled:
            return x
        codes = torch.ops.prefixquant.quantize_linear(
            x if self.shift is None else x - self.shift, self.scale, self.zero_point, self.axis
        )
        return codes if self.codes_only else self.dequantize(codes)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the float32 values of codes."""
        values = torch.ops.prefixquant.dequantize_linear(codes, self.scale, self.zero_point, self.axis, 0)
        return values if self.shift is None or not self.adds_shift else values + self.shift


class GraphLinear(QuantizedLinear):
    """A linear whose weight is an initializer [in, out] of integers.

    Attributes:
        codes_int8, codes_uint8, codes_int4, codes_uint4: the integers [in, out], int8 or uint8, under the name of the
            dtype that the initializer gets; likewise `zero_point_…`, [out] or [G, out].
        weight_scale: float32 [out] or [G, out].
    """

    def __init__(self, source: QuantizedLinear, shift: torch.Tensor | None) -> None:
        """Take the place of `source`.

        Args:
            shift: float32 [in], the mean of the input, which its quantizer leaves out; None: it leaves out nothing.
        """
        nn.Module.__init__(self)
        for name in ("in_features", "out_features", "spec", "rotate_input", "rotation_block_size", "input_quantizer"):
            setattr(self, name, getattr(source, name))
        self._forward_hooks.update(source._forward_hooks)  # quantizes keys before RoPE
        bias = None if source.bias is None else source.bias.float()
        if shift is not None:
            constant = (source.dense_weight(torch.float32).double() @ shift.double()).float()
            bias = constant if bias is None else bias + constant
        self.register_buffer("bias", bias)
        self.codes_name = self.zero_point_name = ""
        if source.weight_scale is None:
            self.register_buffer("weight", source.weight.float().T.contiguous())
            return
        groups = self.spec.count_groups(self.in_features)
        self.axis, self.block_size = (1, 0) if groups == 1 else (0, self.in_features // groups)
        scale = source.weight_scale.T.contiguous()
        zero_point = torch.zeros_like(scale) if source.weight_zero_point is None else source.weight_zero_point.T
        kind = ("int" if self.spec.symmetric else "uint") + ("4" if self.spec.bits <= _NARROW else "8")
        self.codes_name, self.zero_point_name = f"codes_{kind}", f"zero_point_{kind}"
        dtype = source.weight.dtype
        self.register_buffer(self.codes_name, source.weight.T.contiguous())
        self.register_buffer("weight_scale", scale[0] if groups == 1 else scale)
        zero_point = zero_point.to(dtype).contiguous()
        self.register_buffer(self.zero_point_name, zero_point[0] if groups == 1 else zero_point)

    def _dequantize(self) -> torch.Tensor:
        """Return the weight [in, out]."""
        if not self.codes_name:
            return self.weight
        codes, zero_point = self.get_buffer(self.codes_name), self.get_buffer(self.zero_point_name)
        return torch.ops.prefixquant.dequantize_linear(codes, self.weight_scale, zero_point, self.axis, self.block_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = self.prepare_input(input) @ self._dequantize()
        return product if self.bias is None else product + self.bias


def find_code_dtype(spec: QuantizerSpec) -> torch.dtype:
    """Return the dtype of a static quantizer's codes: 8 bits symmetric -> int8, 16 bits asymmetric -> uint16."""
    if spec.bits <= 8:
        return torch.int8 if spec.symmetric else torch.uint8
    return torch.int16 if spec.symmetric else torch.uint16


class GraphCache:
    """The cache of one call of a graph: appends to the past that the caller passed.

    Attributes:
        present: keys and values of each block with the new ones appended, as the graph returns them.
        layers: empty; a `PrefixCache` has its layers of codes here.
    """

    layers: tuple[()] = ()

    def __init__(
        self,
        past: Sequence[torch.Tensor],
        prefix: Sequence[torch.Tensor] = (),
        quantizers: Sequence[GraphQuantizer] = (),
    ) -> None:
        """Begin a call.

        Args:
            past: keys and values [B, heads, past, d] of block 0, then of block 1, …
            prefix: the same of the prefix, [1, heads, P, d], where the past holds integers.
            quantizers: their quantizers, in the same order.
        """
        self.past, self.prefix, self.quantizers = past, prefix, quantizers
        self.present: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, or their codes, [B, heads, T, d], and return all that attention reads, float32."""
        return self._append(key_states, 2 * layer_idx), self._append(value_states, 2 * layer_idx + 1)

    def _append(self, states: torch.Tensor, index: int) -> torch.Tensor:
        whole = torch.cat((self.past[index], states), dim=-2)
        self.present.append(whole)
        if not self.quantizers:
            return whole
        values = self.quantizers[index].dequantize(whole)
        prefix = self.prefix[index].expand(values.shape[0], -1, -1, -1)
        return torch.cat((prefix, values), dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions were read, the prefix among them."""
        length = self.past[2 * layer_idx].shape[-2]
        return length + self.prefix[2 * layer_idx].shape[-2] if self.prefix else length


class GraphDecoder(nn.Module):
    """The model as a function of token ids, mask, positions and past."""

    def __init__(self, checkpoint: Checkpoint, integer_cache: bool = False) -> None:
        """Build the decoder of a quantized checkpoint. `integer_cache`: keys and values of the past are integers."""
        super().__init__()
        model = assemble_model(checkpoint).float()
        model.config._attn_implementation = "eager"  # matrix products and a softmax, which every runtime has
        self.architecture = find_architecture(model.config)
        self.body, self.lm_head = cast(Body, model.base_model), model.lm_head
        self.blocks = blocks = list_layers(model)
        self.windows = [find_sliding_window(model.config, block) for block in blocks]
        self.cache_quantizers: list[GraphQuantizer] = []
        for block in blocks:
            key, value = self._replace_modules_(block)
            if integer_cache:
                key.codes_only = value.codes_only = True
                self.cache_quantizers += [key, value]

    def _replace_modules_(self, block: DecoderLayer) -> tuple[GraphQuantizer, GraphQuantizer]:
        """Replace quantizers and linears of a block, and return the quantizers of keys and values."""
        architecture = self.architecture.of_block(block)
        # Attributes get a module that acts as a quantizer and is not one.
        attention: Any = as_quantized_attention(block.self_attn)
        for site, readers in architecture.site_readers.items():
            rotates, block_size = find_rotation(block, architecture, site)
            linears = {name: find_quantized_linear(block, name) for name in readers}
            first = next(iter(linears.values()))
            holder: Any = find_input_module(block, architecture, site) if site in RESIDUAL_SITES else None
            source = first.input_quantizer if holder is None else holder.quantizer
            assert isinstance(source, ActivationQuantizer), f"{site} has a quantizer, calibrated or not"
            rotation = make_rotation(first.in_features, block_size) if rotates else None
            quantizer = GraphQuantizer(source, rotation, adds_shift=False)
            if holder is not None:
                holder.quantizer = quantizer
            for name, linear in linears.items():
                graph_linear: Any = GraphLinear(linear, quantizer.shift if source.spec.enabled else None)
                if holder is None:
                    graph_linear.input_quantizer = quantizer
                block.set_submodule(name, graph_linear)
        turning = attention.key_quantizer
        key, value = GraphQuantizer(turning.quantizer), GraphQuantizer(attention.value_quantizer)
        if turning.rotate:
            turning.transform = _Turn(make_rotation(turning.head_dim))
        turning.quantizer, attention.value_quantizer = key, value
        return key, value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
        prefix: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Return logits [B, T, V], then present keys and values; see the module's inputs."""
        cache = GraphCache(past, prefix, self.cache_quantizers)
        hidden = self.body(
            input_ids=input_ids,
            attention_mask=self.make_mask(attention_mask, input_ids.shape[1], cache.get_seq_length()),
            position_ids=position_ids,
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state
        return (self.lm_head(hidden), *cache.present)

    def make_mask(self, mask: torch.Tensor, length: int, past: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the values that are added to attention scores, float32 [B, 1, T, past + T]: 0, or the lowest number.

        Args:
            mask: [B, past + T], 0 for padding.
        """
        keys = torch.arange(past + length)
        visible = (keys <= keys[past:, None]) & (mask[:, None] != 0)
        windows = {window for window in self.windows if window is not None}
        if not windows:
            return _as_bias(visible)
        (window,) = windows
        places = mask.cumsum(-1)  # padding takes no place in a window
        sliding = _as_bias(visible & (places[:, past:, None] - places[:, None] < window))
        if None not in self.windows:
            return sliding
        return {"full_attention": _as_bias(visible), "sliding_attention": sliding}


class _Turn(nn.Module):
    """R3 as a matrix, in the place of `KeyQuantizer.transform`."""

    matrix: torch.Tensor

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        return x @ (self.matrix.T if inverse else self.matrix)


def _as_bias(visible: torch.Tensor) -> torch.Tensor:
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


def make_rotation(width: int, block_size: int = -1) -> torch.Tensor:
    """Return the matrix [C, C] of an online rotation: x @ matrix is the rotated x [..., C]."""
    return hadamard_transform(torch.eye(width), block_size=block_size)


@torch.no_grad()
def build_graph(
    checkpoint: Checkpoint,
    *,
    integer_cache: bool = False,
    shapes: GraphShapes | None = None,
    prefix_tokens: int = 0,
    optimize: bool = True,
) -> ir.Model:
    """Return the graph of a quantized checkpoint. Tracing takes about 4 seconds for each block.

    Args:
        integer_cache: keys and values of the past are integers, and the prefix has inputs of its own.
        shapes: sizes for runtimes that need static ones, with one text per call; None: all of them are free.
        prefix_tokens: P, for a graph with an integer cache and static sizes.
        optimize: True: fold constants, and keep one of several equal tensors | False: keep every tensor under its name,
            so that `fill_graph_` can replace it. Runtimes compute the same.
    """
    decoder = GraphDecoder(checkpoint, integer_cache).eval()
    count = checkpoint.block_count
    # Free sizes are traced with examples that differ and are neither 0 nor 1, so that no two are taken for one.
    batch, length, past = (1, shapes.sequence, shapes.past) if shapes else (2, 3, 5)
    prefix = 0 if not integer_cache else prefix_tokens if shapes else 4
    inputs = _make_inputs(decoder, batch, length, past, prefix)
    with warnings.catch_warnings(), _quiet_loggers():
        # It names each size once, and warns of every other input that has it.
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        program = torch.onnx.export(
            decoder,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=name_inputs(count, integer_cache),
            output_names=name_outputs(count),
            dynamic_shapes=None if shapes else _name_sizes(*(len(tensors) for tensors in inputs[3:])),
            custom_translation_table=dict(TRANSLATIONS),
            optimize=optimize,
            verbose=False,
        )
    assert program is not None, "without a file name the exporter returns the graph"
    _narrow_(program.model)
    return program.model


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Keep the exporter from logging each node that it changes, and each operator of packages that are not there."""
    levels = {"torch.onnx": logging.ERROR, "onnx_ir": logging.WARNING, "onnxscript": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _make_inputs(decoder: GraphDecoder, batch: int, length: int, past: int, prefix: int) -> tuple[Any, ...]:
    """Return the arguments of `GraphDecoder.forward` in the given sizes, all zero but for mask and positions."""
    attentions = [as_quantized_attention(block.self_attn) for block in decoder.blocks]
    sizes = [(attention.key_quantizer.heads, attention.head_dim) for attention in attentions for _ in range(2)]
    dtypes = [quantizer.zero_point.dtype for quantizer in decoder.cache_quantizers] or [torch.float32] * len(sizes)
    keys = [
        torch.zeros(batch, heads, past, width, dtype=dtype) for (heads, width), dtype in zip(sizes, dtypes, strict=True)
    ]
    prefixes = [torch.zeros(1, heads, prefix, width) for heads, width in sizes]
    token_ids = torch.zeros(batch, length, dtype=torch.int64)
    mask = torch.ones(batch, prefix + past + length, dtype=torch.int64)
    positions = (torch.arange(length) + prefix + past).expand(batch, length).clone()
    return (token_ids, mask, positions, keys, *([prefixes] if decoder.cache_quantizers else []))


def _name_sizes(past_tensors: int, prefix_tensors: int = 0) -> tuple[Any, ...]:
    """Return the names of the free dimensions of each input, as the exporter takes them."""
    return (
        {0: "batch", 1: "sequence"},
        {0: "batch", 1: "total"},
        {0: "batch", 1: "sequence"},
        [{0: "batch", 2: "past"}] * past_tensors,
        *([[{2: "prefix"}] * prefix_tensors] if prefix_tensors else []),
    )


def _narrow_(model: ir.Model) -> None:
    """Turn the initializers that `GraphLinear` marks as int4 or uint4 into tensors of that dtype."""
    dtypes = {"int4": ir.DataType.INT4, "uint4": ir.DataType.UINT4}
    for name, value in model.graph.initializers.items():
        dtype = dtypes.get(name.rpartition("_")[2])
        if dtype is None or value.const_value is None:
            continue
        integers = value.const_value.numpy().astype(dtype.numpy())
        value.const_value = ir.tensor(integers, dtype=dtype, name=name)
        value.dtype = dtype


@torch.no_grad()
def fill_graph_(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Replace the tensors of a graph by those of another checkpoint with the same sizes and settings.

    Only the bits of weights may differ.

    Args:
        model: as `build_graph` returns it with `optimize=False` and a float32 cache.

    Raises:
        GraphMismatchError: a tensor is missing, or has another shape or dtype.
    """
    initializers = model.graph.initializers
    names = {_split_name(name)[0]: name for name in initializers}
    state = GraphDecoder(checkpoint).state_dict()
    for name, tensor in state.items():
        base, marked = _split_name(name)
        value = initializers[names[base]].const_value if base in names else None
        if (
            value is None
            or tuple(value.shape) != tuple(tensor.shape)
            or (not marked and value.numpy().dtype != tensor.numpy().dtype)
        ):
            raise GraphMismatchError(
                f"{name}: the graph has no tensor of this name, shape {list(tensor.shape)} and dtype {tensor.dtype}. "
                "Build the graph of this checkpoint."
            )
    for name, tensor in state.items():
        value = initializers[names[_split_name(name)[0]]]
        value.name = name
        value.const_value = ir.tensor(tensor.numpy(), name=name)
        value.dtype = value.const_value.dtype
    _narrow_(model)


def _split_name(name: str) -> tuple[str, bool]:
    """Return the name of a tensor without the dtype that `GraphLinear` marks it with, and whether it has one."""
    base = re.sub("_u?int[48]$", "", name)
    return base, base != name


def save_graph(model: ir.Model, path: Path, weights: str, prefix_tokens: int) -> None:
    """Write a graph, with its tensors in a file named `weights` next to it, and check it.

    Args:
        prefix_tokens: P, for the graph's metadata, which say that it holds no prefix.

    Raises:
        onnx.checker.ValidationError: the graph is not valid.
    """
    model.metadata_props["prefixquant.prefix"] = (
        f"not in this file; {prefix_tokens} positions, the past of the first call" if prefix_tokens else "none"
    )
    ir.save(model, path, external_data=weights)
    onnx.checker.check_model(str(path), full_check=True)
