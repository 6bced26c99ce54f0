"""A GGUF file as a source: its config, its tensors under transformers' names, and transformers' own reading of it.

Transformers converts settings and tokenizer, and this module reads the settings that its conversion drops. Tensors are
dequantized here one by one, bit for bit as transformers does it for the whole file at once. The changes that the
converter of llama.cpp made to tensors are undone:

    Llama           rows of q and k in each head: pairs [d/2, 2] -> two halves [2, d/2]
    Gemma 2, 3      norm weights are stored plus one

Every setting and every tensor is converted by transformers, read here, known to change nothing, or refused by name.
llama.cpp is the reference for the meaning of a setting.
"""

import logging
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFValueType
from packaging.version import Version
from transformers import (
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from pipeline.importing.gguf_file import GgufError, GgufFile, Setting, find_parts
from pipeline.importing.source import ModelImportError, Source, check_complete, check_file, loading, make_block_config
from pipeline.models.architectures import UnsupportedModelError, find_architecture
from pipeline.models.layers import CausalModel

logger = logging.getLogger(__name__)

_READS_TOKENIZERS = Version("5.18")
COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = COMMON | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class _Family:
    """One of llama.cpp's architectures.

    Attributes:
        parts: name within a block -> transformers' name.
        permuted: whether rows of q and k are in llama.cpp's order.
        offset_norms: whether norm weights are stored plus one.
        large_blocks: (Gemma) the number of blocks of the one size whose scores are scaled by D / heads instead of d.
    """

    parts: dict[str, str] = field(default_factory=lambda: COMMON)
    permuted: bool = False
    offset_norms: bool = False
    large_blocks: int | None = None


_FAMILIES = {
    "llama": _Family(permuted=True),
    "qwen2": _Family(),
    "qwen3": _Family(COMMON | HEAD_NORMS),
    "gemma2": _Family(_GEMMA, offset_norms=True, large_blocks=46),
    "gemma3": _Family(_GEMMA | HEAD_NORMS, offset_norms=True, large_blocks=62),
    "phi3": _Family(_PHI3),
}
_CONVERTED = {  # by transformers
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "vocab_size",
}
_REQUIRED = _CONVERTED - {"attention.head_count_kv", "rope.freq_base", "vocab_size"}
# Settings that change nothing where they have this value.
_NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "nextn_predict_layers": 0,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "use_parallel_residual": False,
}
# Ways in which byte-level tokenizers split text: those that transformers knows, then those that split as GPT-2 does
# (smollm also splits off every digit, which changes nothing: no token of it holds two).
# fmt: off
_SPLITS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "dbrx",
    "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "qwen35", "gpt-4o", "llama4",
    "kanana2", "talkie", "minimax-m2",
    "gpt2", "gpt-2", "mpt", "olmo", "jais", "trillion", "smollm",
}
# fmt: on
# Settings about the history of a file, or that no current reader uses.
_UNUSED = ("rope.scaling.finetuned", "tensor_data_layout")
_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_NAMED_TEMPLATE = "tokenizer.chat_template."
_DEFAULT_IDS = {  # config's key -> the setting that says it
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_OLD_TABLE = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")  # llama.cpp skips it as well


class _Settings:
    """The settings under the name of the architecture (`llama.…`). A setting that is not taken is not understood."""

    def __init__(self, file: GgufFile) -> None:
        prefix = f"{file.architecture}."
        self._left = {
            name.removeprefix(prefix): setting.value
            for name, setting in file.settings.items()
            if name.startswith(prefix)
        }
        missing = sorted(_REQUIRED - self._left.keys())
        if missing:
            raise GgufError(f"the file lacks the settings {', '.join(missing)}. Take the original checkpoint.")
        for name in sorted(_CONVERTED & self._left.keys()):
            if isinstance(self._left[name], list):
                if len(set(self._left[name])) > 1:
                    raise GgufError(f"{prefix}{name} differs from block to block, which is not supported.")
                raise GgufError(f"{prefix}{name} is a list, which transformers does not convert.")

    def take(self, name: str, default: Any = None) -> Any:
        """Return the value of a setting, which counts as understood from now on."""
        return self._left.pop(name, default)

    def finish(self, architecture: str) -> None:
        """Raise GgufError if a setting was not understood."""
        if self._left.get("attention.causal") is False:
            raise GgufError(
                f"{architecture}.attention.causal=False: attention reads later positions, as in encoders and embedding "
                "models. Only causal language models are supported."
            )
        for name, value in _NEUTRAL.items():
            if self._left.get(name, value) == value:
                self.take(name)
        for name in _UNUSED:
            self.take(name)
        if self._left:
            listed = ", ".join(f"{architecture}.{name}={value}" for name, value in sorted(self._left.items()))
            raise GgufError(f"settings that are not known to this project: {listed}. Take the original checkpoint.")


def open_gguf(source: str, path: Path, stack: ExitStack) -> Source:
    """Return a GGUF file as a source, or a split set, named by any of its parts.

    The folder of its converted tokenizer lives as long as `stack`.

    Raises:
        ModelImportError: the file is damaged, incomplete, or has a setting or tensor that is not understood.
        UnsupportedModelError: its architecture is not supported.
    """
    check_file(source, path)
    with _explaining(source):
        file = GgufFile(path)
        if file.architecture not in _FAMILIES:
            supported = ", ".join(sorted(_FAMILIES))
            raise UnsupportedModelError(
                f"model.source={source!r}: GGUF architecture {file.architecture!r} is not supported. Supported are: "
                f"{supported}. Take the original checkpoint."
            )
        _check_token_ids(file)
        config = _read_config(file)
        file_names = _name_tensors(file)
    companions = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    with _explaining(source):
        _convert_tokenizer(file, config).save_pretrained(companions)
    GenerationConfig.from_model_config(config).save_pretrained(companions)

    def load_block(index: int, token_ids: torch.Tensor, dtype: torch.dtype) -> CausalModel:
        with _explaining(source), tempfile.TemporaryDirectory() as folder:
            return _load_block(
                source, file, folder=Path(folder), config=config, index=index, token_ids=token_ids, dtype=dtype
            )

    def read(name: str) -> torch.Tensor:
        with _explaining(source):
            return _read_tensor(file, file_names[name], config)

    return Source(config, set(file_names), read, companions, None, load_block)


def find_gguf(source: str, folder: Path) -> Path | None:
    """Return the GGUF file, or a part of the split set, in a folder without safetensors; None where there is none.

    Raises:
        ModelImportError: there are several.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if not files or any(folder.glob("*.safetensors")):
        return None
    with _explaining(source):
        if not set(files) <= set(find_parts(files[0])):
            listed = ", ".join(path.name for path in files)
            raise GgufError(f"that folder holds several GGUF files ({listed}). Name one.")
    return files[0]


@contextmanager
def _explaining(source: str) -> Iterator[None]:
    """Add the source's name to a GgufError, and turn errors of transformers into one line."""
    with loading(source, "this GGUF file"):
        try:
            yield
        except GgufError as error:
            raise ModelImportError(f"model.source={source!r}: {error}") from None


def _check_token_ids(file: GgufFile) -> None:
    """Raise GgufError for a special token beyond the vocabulary, on which transformers would fail."""
    tokens = file.settings.get("tokenizer.ggml.tokens")
    for name, setting in file.settings.items():
        is_id = name.startswith("tokenizer.ggml.") and name.endswith("_token_id") and isinstance(setting.value, int)
        if tokens is not None and is_id and setting.value >= tokens.value:
            raise GgufError(
                f"{name}={setting.value} is beyond the vocabulary of {tokens.value} tokens. Take the original model."
            )


def _convert_tokenizer(file: GgufFile, config: PreTrainedConfig) -> Any:
    """Return the tokenizer that the file holds, whatever tokenizer lies next to it.

    Its class is the one that AutoTokenizer would choose, which would read the whole vocabulary again for the config.

    Raises:
        GgufError: text is split in a way that transformers does not know, or this version of transformers ignores how.
            It would then split as GPT-2 does.
    """
    if Version(transformers.__version__) < _READS_TOKENIZERS:
        raise GgufError(
            f"transformers {transformers.__version__} reads GGUF tokenizers wrong (text is split in another way, "
            f"special tokens are missing). Install {_READS_TOKENIZERS} or newer, or take the original checkpoint."
        )
    kind, split, space = (
        getattr(file.settings.get(f"tokenizer.ggml.{name}"), "value", None)
        for name in ("model", "pre", "add_space_prefix")
    )
    if kind == "gpt2" and split not in _SPLITS:
        if split not in (None, "default"):
            raise GgufError(f"tokenizer.ggml.pre={split!r} is not known to transformers. Take the original checkpoint.")
        logger.warning("tokenizer.ggml.pre=%r does not say how text is split: it is split as GPT-2 does", split)
    if kind == "llama" and space is False and not config.model_type.startswith("gemma"):
        logger.warning("tokenizer.ggml.add_space_prefix=False is not converted: texts begin with a space")
    tokenizer_class: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(file.path.resolve())
        tokenizer = tokenizer_class.from_pretrained(folder, gguf_file=link.name)
    named = {
        name.removeprefix(_NAMED_TEMPLATE): str(setting.value)
        for name, setting in file.settings.items()
        if name.startswith(_NAMED_TEMPLATE)
    }
    if named:  # transformers converts the default alone
        default = {"default": tokenizer.chat_template} if tokenizer.chat_template else {}
        tokenizer.chat_template = default | named
    return tokenizer


def _name_tensors(file: GgufFile) -> dict[str, str]:
    """Return {transformers' name: the file's name} of all tensors.

    Raises:
        GgufError: names tensors that have no place in the model.
    """
    parts = _FAMILIES[file.architecture].parts
    file_names, unknown = {}, []
    for name in file.tensors:
        stem, _, suffix = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if suffix in ("weight", "bias") and match and match[2] in parts:
            file_names[f"model.layers.{match[1]}.{parts[match[2]]}.{suffix}"] = name
        elif suffix in ("weight", "bias") and stem in _OUTSIDE:
            file_names[f"{_OUTSIDE[stem]}.{suffix}"] = name
        elif name not in _ROPE_TENSORS and not _OLD_TABLE.fullmatch(name):
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise GgufError(
            f"tensors that do not belong to a {file.architecture} model: {', '.join(unknown[:3])}{more}. Take the "
            "original checkpoint."
        )
    return file_names


def _read_tensor(file: GgufFile, name: str, config: PreTrainedConfig) -> torch.Tensor:
    """Return a tensor as transformers has it, by its name in the file."""
    family, tensor = _FAMILIES[file.architecture], file.read(name)
    if family.permuted and ".attn_q." in name:
        return _unpermute(tensor, config.num_attention_heads)
    if family.permuted and ".attn_k." in name:
        return _unpermute(tensor, config.num_key_value_heads)
    return tensor.sub_(1) if family.offset_norms and "norm.weight" in name else tensor


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows [heads * d, …] with each head in two halves instead of pairs: the order in which RoPE pairs them.

    For a head with d = 4: rows 0 1 2 3 -> 0 2 1 3.
    """
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _read_config(file: GgufFile) -> Any:
    """Return the config as transformers converts it, completed by the settings that its conversion drops."""
    settings = _Settings(file)
    with tempfile.TemporaryDirectory() as folder:
        # Transformers would read every token of the vocabulary, and needs only their number.
        path = Path(folder) / "settings.gguf"
        names = [name for name in ("output_norm.weight", "output.weight") if name in file.tensors]
        file.write_excerpt(path, _excerpt_settings(file), dict(zip(names, names, strict=True)), rows=[0])
        config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    for name, setting in _DEFAULT_IDS.items():  # the family's defaults fit a larger vocabulary
        index = getattr(config, name)
        if setting not in file.settings and isinstance(index, int) and index >= config.vocab_size:
            setattr(config, name, None)
    for name in _CONVERTED:
        taken = settings.take(name)
        if name == "attention.head_count_kv" and taken is None:
            config.num_key_value_heads = config.num_attention_heads
        if name == "rope.freq_base" and taken is None:
            if "rope_theta" not in config.rope_parameters:  # one for each kind of layer
                raise GgufError("the file lacks the setting rope.freq_base. Take the original checkpoint.")
            config.rope_parameters["rope_theta"] = 10000.0  # llama.cpp's default
    _complete_heads_(config, settings)
    _complete_biases_(config, file)
    _complete_windows_(config, settings)
    _complete_caps_(config, settings, _FAMILIES[file.architecture])
    _complete_rope_(config, settings, file)
    settings.finish(file.architecture)
    return config


def _excerpt_settings(file: GgufFile) -> dict[str, Setting]:
    """Return the settings that transformers makes a config of: without lists, but with the size of the vocabulary."""
    prefix = f"{file.architecture}."
    settings = {
        name: setting
        for name, setting in file.settings.items()
        if name.startswith((prefix, "tokenizer.ggml.", "general.name")) and setting.kind != GGUFValueType.ARRAY
    }
    if getattr(settings.get("general.name"), "value", None) == "mistral":
        del settings["general.name"]  # transformers would look for tensors of an architecture that gguf does not know
    if f"{prefix}vocab_size" not in settings and "tokenizer.ggml.tokens" in file.settings:
        settings[f"{prefix}vocab_size"] = Setting(file.settings["tokenizer.ggml.tokens"].value, GGUFValueType.UINT32)
    return settings


def _complete_heads_(config: PreTrainedConfig, settings: _Settings) -> None:
    """Set head_dim.

    Raises:
        GgufError: queries, keys and values differ in size, or RoPE turns only a part of a head.
    """
    turned = settings.take("rope.dimension_count")
    default = config.hidden_size // config.num_attention_heads
    size = settings.take("attention.key_length", turned if config.model_type == "llama" and turned else default)
    values = settings.take("attention.value_length", size)
    if values != size:
        raise GgufError(f"attention.key_length={size} and attention.value_length={values} differ: not supported.")
    if turned not in (None, size):
        raise GgufError(f"rope.dimension_count={turned}: RoPE turns only a part of each head ({size}): not supported.")
    if getattr(config, "head_dim", None) not in (None, size):
        config.head_dim = size
    elif not hasattr(config, "head_dim") and size != default:
        raise GgufError(f"attention.key_length={size} is not hidden size / heads = {default}: not supported.")


def _complete_biases_(config: PreTrainedConfig, file: GgufFile) -> None:
    """Set the flags of biases that the file has."""
    for name, parts in (("attention_bias", ("attn_q", "attn_output")), ("mlp_bias", ("ffn_gate", "ffn_down"))):
        if hasattr(config, name) and any(f"blk.0.{part}.bias" in file.tensors for part in parts):
            setattr(config, name, True)


def _complete_windows_(config: PreTrainedConfig, settings: _Settings) -> None:
    """Set the length of sliding windows, and the layers that have one."""
    window = settings.take("attention.sliding_window")
    pattern = settings.take("attention.sliding_window_pattern")
    if config.model_type.startswith("gemma"):
        if window is None:
            raise GgufError("the file lacks the setting attention.sliding_window. Take the original checkpoint.")
        if isinstance(pattern, int):
            pattern = [bool((index + 1) % pattern) for index in range(config.num_hidden_layers)]
        if pattern is not None:
            config.layer_types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif config.model_type == "phi3" and pattern is None:
        config.sliding_window = window or None
    elif pattern is not None or (window and window < config.max_position_embeddings):
        raise GgufError(f"attention.sliding_window={window} in a {config.model_type} model is not supported.")


def _complete_caps_(config: PreTrainedConfig, settings: _Settings, family: _Family) -> None:
    """Set the factor of attention scores, and the soft caps of scores and logits."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = settings.take("attention.scale")
    if config.model_type.startswith("gemma"):
        # The file does not say it: llama.cpp tells it by the number of blocks.
        large = config.num_hidden_layers == family.large_blocks
        scalar = config.hidden_size // config.num_attention_heads if large else size
        config.query_pre_attn_scalar = scalar if scale is None else round(scale**-2)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            cap = settings.take(name)
            if cap is not None:
                setattr(config, name, cap or None)
    elif scale is not None and not math.isclose(scale, size**-0.5, rel_tol=1e-6):
        raise GgufError(f"attention.scale={scale} is not one over the root of the head's size {size}: not supported.")


def _complete_rope_(config: PreTrainedConfig, settings: _Settings, file: GgufFile) -> None:
    """Set the scaling of RoPE for long texts: none, linear, yarn, Llama 3's or LongRoPE."""
    kind = settings.take("rope.scaling.type")
    factor = settings.take("rope.scaling.factor") or settings.take("rope.scale_linear")
    original = settings.take("rope.scaling.original_context_length")
    tables = _ROPE_TENSORS & file.tensors.keys()
    if config.model_type.startswith("gemma"):
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        theta = settings.take("rope.freq_base_swa")
        if theta is not None and "sliding_attention" in config.rope_parameters:
            config.rope_parameters["sliding_attention"]["rope_theta"] = theta
    else:
        rope = config.rope_parameters
    if tables == {"rope_freqs.weight"} and kind in (None, "none"):
        rope |= _recognise_llama3(file.read("rope_freqs.weight"), rope["rope_theta"])
    elif tables == _ROPE_TENSORS - {"rope_freqs.weight"} and kind in (None, "none", "longrope"):
        short, long = (file.read(f"rope_factors_{name}.weight").tolist() for name in ("short", "long"))
        original = original or config.max_position_embeddings
        attention_factor = settings.take("rope.scaling.attn_factor", 1.0)
        _check_attention_factor(attention_factor, config.max_position_embeddings, original)
        config.original_max_position_embeddings = original
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope["original_max_position_embeddings"] = original
    elif tables:
        raise GgufError(f"{', '.join(sorted(tables))} with rope.scaling.type={kind!r} is not supported.")
    elif kind == "yarn" and factor and original:
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            value = settings.take(f"rope.scaling.yarn_{name}")
            if value is not None:
                rope[name] = value
    elif kind in (None, "linear") and factor not in (None, 0, 1):
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in (None, "none", "linear"):
        raise GgufError(f"rope.scaling.type={kind!r} with factor={factor} is not supported.")


def _check_attention_factor(factor: float, positions: int, original: int) -> None:
    """Raise GgufError unless `factor` is LongRoPE's: sqrt(1 + ln(s) / ln(original)), s = positions / original."""
    ratio = positions / original
    expected = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if not math.isclose(factor, expected, rel_tol=1e-5):
        raise GgufError(f"rope.scaling.attn_factor={factor} is not LongRoPE's {expected:.6g}: not supported.")


def _recognise_llama3(divisors: torch.Tensor, theta: float) -> dict[str, Any]:
    """Return the settings of Llama 3's RoPE whose frequencies are plain RoPE's over `divisors` [d/2]; {} if all are 1.

    The file holds only the result. The low and high factors are 1 and 4 in every Llama, and the original context is a
    power of two. The one that gives these divisors to 1e-5 is taken.

    Raises:
        GgufError: none does.
    """
    factor = divisors.max().item()
    if (divisors == 1).all():
        return {}
    wavelengths = 2 * math.pi * theta ** (torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    for exponent in range(5, 24):
        original = 2**exponent
        smooth = ((original / wavelengths - 1) / (4 - 1)).clamp(0, 1)
        if torch.allclose(1 / ((1 - smooth) / factor + smooth), divisors.double(), rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise GgufError("rope_freqs.weight does not scale RoPE as Llama 3 does. Take the original checkpoint.")


def _load_block(
    source: str,
    file: GgufFile,
    *,
    folder: Path,
    config: PreTrainedConfig,
    index: int,
    token_ids: torch.Tensor,
    dtype: torch.dtype,
) -> CausalModel:
    """Return a model of block `index` alone, which transformers loads from a file with that block, made in `folder`."""
    block = re.compile(rf"blk\.{index}\.")
    names = {block.sub("blk.0.", name): name for name in file.tensors if block.match(name)}
    names |= {name: name for name in file.tensors if not name.startswith("blk.") and name not in _ROPE_TENSORS}
    replaced = {f"{file.architecture}.block_count": 1, f"{file.architecture}.vocab_size": len(token_ids)}
    settings = _excerpt_settings(file) | {
        name: Setting(value, GGUFValueType.UINT32) for name, value in replaced.items()
    }
    path = folder / "block.gguf"
    file.write_excerpt(path, settings, names, token_ids.tolist())
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=path.name,
        config=make_block_config(config, index, len(token_ids)),
        dtype=dtype,
        attn_implementation=find_architecture(config).kernel,
        output_loading_info=True,
    )
    return check_complete(source, *loaded)
