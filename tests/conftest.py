"""Tiny random models of each supported family, in transformers' own classes, with a tokenizer, saved as folders."""

import copy
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.blocks.walk import BlockRunner
from pipeline.importing.import_model import import_model
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.params import QuantizerInitParams

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models are tiny: threads only get in each other's way
VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ROPE_SCALING = {  # as Llama 3's
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = 28  # of families that slide
SLIDING = ("mistral", "qwen2", "phi3", "gemma2", "gemma3_text")
POST_NORMS = ("gemma2", "gemma3_text", "olmo2")  # no R1
FAMILIES = {
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_untied_biases": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama_odd_sizes": LlamaConfig(**SIZES | {"hidden_size": 52, "intermediate_size": 78}, head_dim=13 * 2),
    "mistral": MistralConfig(**SIZES, head_dim=20, sliding_window=WINDOW),
    "qwen2": Qwen2Config(
        **SIZES,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "llama_long_rope": LlamaConfig(**SIZES, rope_parameters=ROPE_SCALING),
    "phi3": Phi3Config(**SIZES, tie_word_embeddings=False, sliding_window=WINDOW),
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=WINDOW, sliding_window_pattern=2),
    "olmo2": Olmo2Config(**SIZES),
}
PROSE = (ROOT / "tests" / "prose.txt").read_text(encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few paragraphs; adds no special tokens by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def randomize_(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases are random too: folding them wrongly must show."""
    model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.15)
    return model


def make_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model of one of the families."""
    torch.manual_seed(seed)
    config = copy.deepcopy(FAMILIES[family])
    capped = getattr(config, "attn_logit_softcapping", None)  # which sdpa leaves out, and older versions take
    return randomize_(AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Behind `pytest -m families`: a table of families and what was checked on each."""
    if config.option.markexpr != "families":
        return
    table: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            check, _, family = report.nodeid.rpartition("::test_")[2].removesuffix("]").partition("[")
            table.setdefault(family, {})[check.replace("_", " ")] = outcome
    checks = sorted({check for own in table.values() for check in own})
    terminalreporter.section("families")
    for number, check in enumerate(checks, start=1):
        terminalreporter.line(f"({number}) {check}")
    for family, own in sorted(table.items()):
        cells = "  ".join(f"({number}) {own.get(check, '-'):7}" for number, check in enumerate(checks, start=1))
        terminalreporter.line(f"{family:24}{cells}".rstrip())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: several workers then end together."""
    items.sort(key=lambda item: item.path.name not in ("test_stages.py", "test_repro.py"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("serving") and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make serve-test")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """family -> a folder as a user would have it: config.json, model.safetensors, tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for family in FAMILIES:
        make_model(family).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def imported(model_folders, tmp_path_factory) -> dict[str, Path]:
    """family -> the folder the model stage makes of it."""
    root = tmp_path_factory.mktemp("imported")
    for family, folder in model_folders.items():
        import_model(str(folder), None, torch.float32, root / family)
    return {family: root / family for family in model_folders}


@pytest.fixture(scope="session")
def lm_eval_read_once():
    """lm-eval's own tasks, 14,000 files, are parsed once in a test run, not with every command."""
    from lm_eval.tasks import _index

    root, load = Path(_index.__file__).parent, _index.load_yaml
    kept = functools.cache(functools.partial(load, resolve_func=False, recursive=True))

    def load_once(path: Path, **options: bool) -> dict:
        own = root in path.parents and options == {"resolve_func": False, "recursive": True}
        return copy.deepcopy(kept(path)) if own else load(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index, "load_yaml", load_once)
        yield


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(7))


def open_model(folder: Path, batch_size: int = 2) -> tuple[Checkpoint, BlockRunner]:
    checkpoint = Checkpoint(folder, "model")
    return checkpoint, BlockRunner(checkpoint, torch.device("cpu"), batch_size)


def tiny_params(source: Path, corpus: Path) -> dict:
    """The project's params.yaml, shrunk to a tiny model and a local corpus."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["source"] = str(source)
    params["corpora"] = {"prose": {"source": str(corpus)}}
    params["prefix_search"]["choose"] = "threshold"  # tiny random models have no tokens that stand out
    for name in ("search", "train", "end_to_end", "validation"):
        params["calibration"][name] |= {"corpora": ["prose"], "windows": 3, "length": 32}
    params["calibration"]["validation"]["windows"] = 1
    params["calibration"]["evaluation"] = {"corpora": ["prose"], "windows": 2, "length": 48}
    params["calibration"]["start_token"] = "never"  # `auto` measures, and random models have no habits
    params["quantizer_init"]["mse_samples"] = 2
    params["finetuning"]["blocks"] |= {"enabled": True, "epochs": 1}  # so that both phases run
    params["evaluation"]["tasks"] = {}
    params["activation_plots"] |= {"windows": 2, "surface_blocks": [0]}
    params["runtime"] |= {"batch_size": 2, "threads": 1, "device": "cpu"}
    return params


@pytest.fixture
def project(tmp_path, model_folders, monkeypatch) -> Path:
    """A working folder with a params.yaml for the tiny tied Llama, as current directory."""
    corpus = tmp_path / "prose.txt"
    shutil.copyfile(ROOT / "tests" / "prose.txt", corpus)
    write_params(tmp_path, tiny_params(model_folders["llama_tied"], corpus))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init_params(changes: dict | None = None) -> QuantizerInitParams:
    """The project's `quantizer_init` params with dotted keys changed ("weights.bits": 3) and two sampled windows."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["quantizer_init"] | {"mse_samples": 2}
    for dotted, value in (changes or {}).items():
        *path, last = dotted.split(".")
        group = values
        for key in path:
            group = group[key]
        group[last] = value
    return QuantizerInitParams.model_validate(values)


def write_params(folder: Path, params: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
