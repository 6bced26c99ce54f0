"""The invariance gate: a rotated model must give the outputs of the original model, or nothing is written.

Hidden states of the same windows go through the original and the rotated blocks in **float64**, where rounding makes a
difference of 1e-12 and an error a much larger one. In float32 the two cannot be told apart, because massive activations
alone make logits differ by 3e-4. The deviations that float32 and a narrower dtype add are only reported:
`float32_logit_deviation` of the rotated model, next to `float32_original_deviation` of the original model from itself.

transformers computes norms in float32 whatever their input, and also softmax where scores are capped and in the routers
of experts, and RoPE of neighbouring channels. Here all are computed by their definition, in the dtype of the input.
"""

import functools
import inspect
import math
import types

import torch
from torch import nn
from transformers import AttentionInterface

from pipeline.blocks.kv_cache import turn_keys
from pipeline.blocks.quantized import BlockSettings, fill_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import UnsupportedModelError, check_attention_arguments, find_architecture
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import DecoderLayer, Norm, as_norm
from pipeline.models.routing import ExpertScores, choose_experts, find_correction_bias, weigh_experts
from pipeline.rotation.matrices import Rotation, count_rows
from pipeline.runtime.errors import PipelineError

GATE_TOLERANCE = 1e-9
_WINDOWS, _LENGTH = 2, 64
_EAGER = "prefixquant_exact_eager"
_ROPE = "apply_rotary_pos_emb"
_ROUTERS = ("topkrouter", "hunyuanmoev1gate")  # endings of names of transformers' classes


class RotationError(PipelineError):
    """The outputs of the rotated model differ from the original model's."""


class InvarianceGate:
    """Streams of the same random windows through the original and the rotated model, block by block.

    Two streams in float64 are judged. Others are measured: the original in float32, the rotated model in float32, and
    the rotated model in the dtype it is written in, if that is narrower.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        settings: BlockSettings,
        r1: Rotation,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.checkpoint, self.settings, self.dtype = checkpoint, settings, dtype
        self.runners = {kind: BlockRunner(checkpoint, device, _WINDOWS) for kind in (torch.float64, torch.float32)}
        token_ids = torch.randint(0, checkpoint.config.vocab_size, (_WINDOWS, _LENGTH), generator=generator)
        self.original = checkpoint.embed(token_ids).double()
        self.rotated = r1.apply(self.original.clone())
        self.rounded = {"original": self.original.float(), "float32": self.rotated.float()}
        if dtype != torch.float32:
            self.rounded["dtype"] = self.rotated.to(dtype).float()

    def advance_original_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Move the original model's streams, in float64 and float32, through block `index`."""
        self._advance_(index, tensors, self.original, None)
        self._advance_(index, tensors, self.rounded["original"], None)

    def advance_rotated_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Move the rotated model's float64 stream through the rotated block's float64 `tensors`."""
        self._advance_(index, tensors, self.rotated, self.settings)

    def advance_rounded_(self, index: int, single: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
        """Move the other streams through the rotated block's tensors, in float32 and in the dtype of the artifact."""
        self._advance_(index, single, self.rounded["float32"], self.settings)
        if "dtype" in self.rounded:
            self._advance_(index, written, self.rounded["dtype"], self.settings)

    def _advance_(
        self, index: int, tensors: dict[str, torch.Tensor], hidden: torch.Tensor, settings: BlockSettings | None
    ) -> None:
        runner = self.runners[hidden.dtype]
        block = fill_block(self.checkpoint, index, tensors, settings, device=runner.device, dtype=hidden.dtype)
        if hidden.dtype == torch.float64:
            compute_exactly_(block)
        runner.advance_(block, hidden)

    @torch.no_grad()
    def judge(self, r1: Rotation, folded: torch.Tensor | None) -> dict[str, float]:
        """Compare the logits of all streams, a slice of the vocabulary at a time.

        Args:
            folded: the final norm's gain [D] float64 (its weight + `norm_offset`) if it is folded into lm_head,
                otherwise None.

        Returns:
            Metrics, all relative to the largest logit: see `merging.rotate_model`.

        Raises:
            RotationError: the rotated model's logits differ from the original's.
        """
        head = self.checkpoint.load_lm_head()
        gain = find_gain(self.checkpoint.load_final_norm(), self.checkpoint.architecture.norm_offset)
        rotated_gain = gain if folded is None else torch.ones_like(gain)
        eps = find_eps(self.checkpoint.load_final_norm())
        original = normalise(self.original, gain, eps).flatten(0, 1)
        streams = {"float64": normalise(self.rotated, rotated_gain, eps).flatten(0, 1)}
        for name, hidden in self.rounded.items():
            stream_gain = gain if name == "original" else rotated_gain
            streams[name] = normalise(hidden, stream_gain.float(), eps).flatten(0, 1)
        largest, deviations = 0.0, dict.fromkeys(streams, 0.0)
        count = count_rows(head.weight)
        for start in range(0, len(head.weight), count):
            rows = head.weight[start : start + count].double()
            rotated_rows = r1.apply(rows if folded is None else rows * folded)
            reference = multiply(original, rows, head.cap)
            largest = max(largest, reference.abs().max().item())
            for name, hidden in streams.items():
                stream_rows = rows if name == "original" else rotated_rows
                if name == "dtype":
                    stream_rows = stream_rows.to(self.dtype)
                logits = multiply(hidden, stream_rows.to(hidden.dtype), head.cap)
                # max(a, nan) is a: logits that are not finite must not pass.
                deviation = torch.nan_to_num((logits - reference).abs(), nan=math.inf).max().item()
                deviations[name] = max(deviations[name], deviation)
        relative = {name: deviation / largest for name, deviation in deviations.items()}
        if not relative["float64"] <= GATE_TOLERANCE:
            raise RotationError(
                f"the rotated model is not the original: logits differ by {relative['float64']:.2e} of max |logit| "
                f"({largest:.4g}) in float64, and at most {GATE_TOLERANCE:.0e} is allowed. Nothing was written. Set "
                "rotation.r1 to r5: identity, and then one after the other as before, to find the rotation at fault."
            )
        metrics = {
            "max_logit_deviation": relative["float64"],
            "float32_logit_deviation": relative["float32"],
            "float32_original_deviation": relative["original"],
        }
        return metrics | ({"dtype_logit_deviation": relative["dtype"]} if "dtype" in relative else {})


def compute_exactly_(block: DecoderLayer) -> None:
    """Make a float64 block compute in float64 throughout: norms, RoPE, attention and routers in place of float32.

    Raises:
        UnsupportedModelError: a norm is not that of the family's entry in `ARCHITECTURES`.
    """
    config = block.self_attn.config
    architecture = find_architecture(config)
    for module in block.modules():
        if type(module).__name__.lower().endswith(_ROUTERS):
            module.register_forward_hook(functools.partial(_route_exactly, architecture.expert_scores))
    offset = architecture.norm_offset
    for module in block.modules():
        if type(module).__name__.endswith("RMSNorm"):
            if not isinstance(getattr(module, "weight", None), torch.Tensor):
                raise UnsupportedModelError(
                    f"model_type={config.model_type!r}: a {type(module).__name__} has no weight, which is not supported"
                )
            module.forward = functools.partial(
                normalise, gain=find_gain(as_norm(module), offset), eps=find_eps(as_norm(module))
            )
    if config._attn_implementation == "eager":
        config._attn_implementation = _EAGER
    if architecture.rope_neighbours:
        _turn_exactly_(block.self_attn)


def _turn_exactly_(attention: nn.Module) -> None:
    """Make attention turn neighbouring channels in the dtype of queries and keys. Its forward is transformers' own."""
    forward = inspect.unwrap(type(attention).forward)
    assert _ROPE in forward.__globals__, f"{type(attention).__name__} does not turn keys by {_ROPE}"
    exact = types.FunctionType(
        forward.__code__,
        forward.__globals__ | {_ROPE: _turn_neighbours},
        argdefs=forward.__defaults__,
        closure=forward.__closure__,
    )
    attention.forward = types.MethodType(exact, attention)


def _turn_neighbours(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return turn_keys(query, cos, sin, neighbours=True), turn_keys(key, cos, sin, neighbours=True)


def _route_exactly(
    kind: ExpertScores,
    router: nn.Module,
    args: tuple[torch.Tensor, ...],
    output: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose experts in float64; return logits [n, E], weights and indices [n, k]."""
    _, rounded, chosen = output
    weight = getattr(router, "wg", router).weight
    assert isinstance(weight, torch.Tensor)
    logits = nn.functional.linear(args[0].reshape(-1, weight.shape[1]), weight, getattr(router, "bias", None))
    bias = find_correction_bias(router, args)
    error = (weigh_experts(router, kind, logits, chosen) - rounded).abs().max()
    assert error < 1e-5, f"{type(router).__name__} does not weigh experts by a {kind} of logits"  # float32
    indices = choose_experts(router, kind, logits, bias)
    return logits, weigh_experts(router, kind, logits, indices), indices


def normalise(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute RMSNorm over the last dimension in x's own dtype: x / sqrt(mean of squares + eps) · gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def find_gain(norm: Norm, offset: float) -> torch.Tensor:
    """Return the factor of an RMSNorm in float64: its weight plus the family's `norm_offset`.

    Raises:
        UnsupportedModelError: the norm computes something else.
    """
    gain = norm.weight.detach().double() + offset
    x = torch.linspace(1, 2, len(gain), device=gain.device)
    expected = type(norm).forward(norm, x.to(norm.weight.dtype)).double()
    error = (normalise(x.double(), gain, find_eps(norm)) - expected).abs().max() / expected.abs().max()
    if not error < 0.02:  # bfloat16 at worst
        raise UnsupportedModelError(
            f"{type(norm).__name__} does not compute weight + {offset} times RMSNorm. Correct norm_offset of this "
            "family in ARCHITECTURES (docs/new_family.md)"
        )
    return gain


def find_eps(norm: Norm) -> float:
    """Return the eps of an RMSNorm, which has two names in transformers' families."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def multiply(hidden: torch.Tensor, rows: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Compute logits [T, V'] from hidden states [T, D] and rows [V', D] of lm_head, capped if the family caps them."""
    logits = hidden @ rows.T
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention with softly capped scores or with sinks in the queries' dtype; returns [B, T, heads, d].

    transformers calls this function and passes its own arguments.

    Args:
        s_aux: attention sinks [heads], a score of each head that has no value.

    Raises:
        UnsupportedModelError: an argument that is not computed here.
    """
    check_attention_arguments(others)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    return (scores.softmax(-1)[..., : key.shape[-2]] @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_EAGER, _attend)  # without a mask function: the runner makes eager's masks
