"""Memory and time of the streamed stages on the shapes of large models, against the limits that they promise.

    python -m benchmarks.speed.scaling              # 8 blocks of Llama-2-7B, one of Llama-3-70B; 30 GB of disk
    python -m benchmarks.speed.scaling --models llama-2-7b --json scaling.json
    python -m benchmarks.speed.scaling --models qwen3-30b-a3b gpt-oss-20b    # one block of each, with experts
    python -m benchmarks.speed.scaling --whole      # no run: the needs of whole models on one GPU and on eight

A synthetic checkpoint (random bfloat16 weights, a shard per block, a tokenizer of bytes) goes through the stages, each
in a process of its own, on 8 x 512 tokens. Columns:

- the peak of resident memory
- its limit: 0.6 GiB + hidden states + k blocks in float32
- the value of `--plan`
- seconds, and the same in plain forwards of these tokens through these blocks (the original model's, timed in the same
  run)

The weights that `export` packs were rounded to nearest. A model's folder is deleted after its rows.

--whole prints the memory and disk of `--plan`, and counts operations from shapes: 2 per parameter, token and pass; two
streams for statistics, targets and reference; 3 x 1.6 passes for each of 20 epochs (`python -m
benchmarks.speed.finetuning`); for GPTQ a Gram matrix for each kind of input, a cubic factorization and an update. GPUs
share the windows, but each of them factorizes. Minutes assume that --tflops is reached throughout. Two things are not
counted: the search of clip factors, which depends on params, and reading the checkpoint, which overlaps.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from benchmarks.workspace import Workspace, append_row, make_parser, override, read_params, read_rows
from pipeline.blocks.quantized import describe_blocks, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import find_architecture
from pipeline.models.checkpoint import CONFIG, Checkpoint, build_skeleton
from pipeline.models.experts import route_experts_
from pipeline.params import parse_params
from pipeline.pictures.tables import format_markdown
from pipeline.planning.disk import OtherFiles, count_tables
from pipeline.planning.evaluation import plan_evaluation
from pipeline.planning.export import plan_export
from pipeline.planning.finetuning import plan_finetuning
from pipeline.planning.prefix_search import plan_prefix_search
from pipeline.planning.quantizer_init import plan_quantizer_init
from pipeline.planning.rotation import plan_rotation
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload
from pipeline.quantization.quantizer_init import resolve_settings
from pipeline.runtime.errors import run_main
from pipeline.runtime.memory import GIB
from pipeline.runtime.progress import select_device
from pipeline.text.windows import load_windows

SHAPES = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "num_hidden_layers": 8,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "num_hidden_layers": 1,
        "rope_theta": 500000.0,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_hidden_layers": 1,
    },
    # The widths of gpt-oss-20b; its sinks and its gate are not supported.
    "gpt-oss-20b": {
        "model_type": "mixtral",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_hidden_layers": 1,
    },
}
DENSE = ("llama-2-7b", "llama-3-70b")


@dataclass(frozen=True)
class Row:
    """A stage, its limit in blocks in float32, and changes to params."""

    stage: str
    blocks: int
    params: dict[str, Any] = field(default_factory=dict)


# For stages whose time and memory do not depend on how weights were rounded and ranges were searched.
QUICK = {
    "quantizer_init.weights.rounding": "rtn",
    "quantizer_init.weights.range": "max",
    "quantizer_init.activations.range": "max",
    "quantizer_init.keys.range": "max",
    "quantizer_init.values.range": "max",
    "quantizer_init.equalize": [],
    "finetuning.start": "quantizer_init",
    "finetuning.blocks.weight_lr": 0.0,
    "finetuning.blocks.enabled": False,
}
END_TO_END = QUICK | {"finetuning.end_to_end.enabled": True, "finetuning.end_to_end.batch_size": 1}
ROWS = {
    "rotation": Row("rotation", 3),
    "prefix_search": Row("prefix_search", 3),
    "quantizer_init": Row("quantizer_init", 4),
    "evaluation@original": Row("evaluation@original", 3),
    "evaluation@quantizer_init": Row("evaluation@quantizer_init", 3),
    "finetuning": Row("finetuning", 7),
    "evaluation@finetuning": Row("evaluation@finetuning", 3),
    "finetuning, end to end, streamed": Row("finetuning", 3, END_TO_END | {"runtime.max_memory": "1MiB"}),
    "export": Row("export", 3, QUICK),
}
FIXED = 0.6  # GiB
WINDOWS, LENGTH = 8, 512
PARAMS = {
    "model.dtype": "bfloat16",
    "rotation.dtype": "bfloat16",
    "calibration.search.windows": WINDOWS,
    "calibration.search.length": LENGTH,
    "calibration.train.windows": WINDOWS,
    "calibration.train.length": LENGTH,
    "calibration.end_to_end": None,
    "calibration.validation.windows": 1,
    "calibration.validation.length": LENGTH,
    "calibration.evaluation.windows": WINDOWS // 2,  # of each of two corpora
    "calibration.evaluation.length": LENGTH,
    "evaluation.tasks": {},
    # range: layer multiplies by the Gram matrix for each clip factor, whatever the number of tokens. At these widths
    # that takes as long as 30 forwards of 8 windows.
    "quantizer_init.weights.range": "tensor",
    "finetuning.start": "full_precision",
    "finetuning.blocks.enabled": True,
    "finetuning.blocks.epochs": 1,
    "finetuning.blocks.weight_lr": 5e-6,
    "finetuning.end_to_end.enabled": False,
    "runtime.batch_size": 1,
    "finetuning.blocks.batch_size": 1,
}

# Those of the official command line: 512 x 1024 tokens, 20 epochs.
WHOLE = {
    "calibration.train.windows": 512,
    "calibration.train.length": 1024,
    "calibration.validation.windows": 64,
    "calibration.validation.length": 1024,
    "quantizer_init.weights.range": "tensor",
    "finetuning.start": "full_precision",
    "finetuning.blocks.enabled": True,
    "finetuning.blocks.epochs": 20,
    "finetuning.blocks.weight_lr": 5e-6,
    "finetuning.end_to_end.enabled": False,
    "rotation.dtype": "bfloat16",
    "runtime.offload": "always",
}


def main() -> None:
    parser = make_parser(__doc__, ROWS)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(DENSE))
    parser.add_argument("--whole", action="store_true", help="print the needs of whole models, and stop")
    parser.add_argument("--tflops", type=float, default=200.0, help="for --whole: 10^12 operations per second of a GPU")
    arguments = parser.parse_args()
    if arguments.whole:
        print(plan_whole_models(arguments.tflops))
        return
    rows = read_rows(arguments.json)
    for name in arguments.models:
        names = [row for row in arguments.rows if f"{name}/{row}" not in rows and has_room(name, row)]
        if not names:
            continue
        workspace = Workspace(arguments.work / name)
        source = make_model(workspace.folder / "source", SHAPES[name])
        params = override(read_params(), PARAMS | {"model.source": str(source)})
        for row in names:
            append_row(arguments.json, rows, f"{name}/{row}", measure(workspace, ROWS[row], params))
        shutil.rmtree(workspace.folder)
    print(format_table(rows))


def has_room(model: str, row: str) -> bool:
    """Return whether the memory suffices for a row. Print a message if not; it only matters for training weights."""
    if row not in ("finetuning", "evaluation@finetuning") or torch.cuda.is_available():
        return True
    blocks, size = ROWS["finetuning"].blocks, Sizes.of(Shape(SHAPES[model], False)).weights * 4
    if blocks * size + FIXED * GIB < psutil.virtual_memory().available:
        return True
    print(f"{model}/{row}: left out. {blocks} blocks in float32 do not fit into this machine's memory.")
    return False


def make_model(folder: Path, shapes: dict[str, Any]) -> Path:
    """Write a checkpoint as from the hub (config, a shard per block, a tokenizer of bytes), and return its folder."""
    if (folder / CONFIG).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(shapes, max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="bfloat16")
    names: dict[str, list[str]] = {}
    parameters = dict(build_skeleton(config).named_parameters())
    for name in parameters:
        shard = f"block-{name.split('.')[2]}" if name.startswith("model.layers.") else "rest"
        names.setdefault(f"{shard}.safetensors", []).append(name)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    for shard, listed in names.items():
        tensors = {name: make_tensor(parameters[name].shape, generator) for name in listed}
        save_file(tensors, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, listed in names.items() for name in listed}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    core = Tokenizer(models.BPE({**_byte_ids(), "<s>": 256, "</s>": 257}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def make_config(shapes: dict[str, Any], **changes: Any) -> Any:
    """Return the config of a shape: of Llama, or of the family that it names."""
    values = shapes | changes
    return CONFIG_MAPPING[values.pop("model_type", "llama")](**values)


def make_tensor(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return ones for a norm, and small random values for everything else, drawn on the device of `generator`."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return drawn.normal_(0, 0.02, generator=generator).cpu()


def _byte_ids() -> dict[str, int]:
    return {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def measure(workspace: Workspace, row: Row, params: dict[str, Any]) -> dict[str, float]:
    """Return a stage's peak memory in GiB, its limit and plan, and its time in plain forwards."""
    params = override(params, row.params)
    model = Checkpoint(workspace.run("model", params) / "artifacts/model", "model")
    windows = load_windows(workspace.run("calibration", params) / "artifacts/calibration/train.safetensors").token_ids
    metrics = workspace.metrics(row.stage, params)
    forward = model.block_count * time_block(model, windows, select_device(parse_params(params).runtime))
    need = workspace.need(row.stage, params)
    block = Sizes.of(model).weights * 4 / GIB
    return {
        "peak_rss_gib": metrics["peak_rss_gib"],
        "peak_gpu_gib": metrics.get("peak_gpu_gib", 0.0),
        "limit_gib": FIXED + need["hidden states"] + row.blocks * block,
        "planned_gib": need["memory"],
        "planned_gpu_gib": need["GPU"],
        "hidden_gib": need["hidden states"],
        "disk_gib": need["disk"],
        "block_gib": block,
        "seconds": metrics["seconds"],
        "forward_seconds": forward,
    }


@torch.no_grad()
def time_block(model: Checkpoint, windows: torch.Tensor, device: torch.device) -> float:
    """Seconds of one block over all windows, on `device`."""
    block = load_block(model, 0, device)
    runner, hidden = BlockRunner(model, device, 1), model.embed(windows)
    runner.advance_(block, hidden[:1].clone())
    start = time.perf_counter()
    runner.advance_(block, hidden)  # returns when the results are on the CPU
    return time.perf_counter() - start


class Shape:
    """A checkpoint without tensors, for plans: config, settings, and blocks on the meta device."""

    dtype = torch.bfloat16
    folder = Path("no files")
    widest_window: int | None = None

    def __init__(self, shapes: dict[str, Any], quantized: bool) -> None:
        self.config = make_config(shapes, tie_word_embeddings=False, dtype="bfloat16")
        self.block_count = self.config.num_hidden_layers
        self.architecture = find_architecture(self.config)
        self._block = build_skeleton(make_config(shapes | {"num_hidden_layers": 1})).model.layers[0]
        if self.architecture.experts is not None:
            route_experts_(self._block, self.architecture.experts)
        self.settings: dict[str, Any] = {}
        if quantized:
            settings, _ = resolve_settings(parse_params(read_params()).quantizer_init, self, 0)
            self.settings = describe_blocks([settings])

    def build_block(self, index: int) -> nn.Module:
        return self._block


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a stage: `shared` by all GPUs, and `repeated` on each of them."""

    shared: float = 0.0
    repeated: float = 0.0

    def minutes(self, gpus: int, tflops: float) -> float:
        """Return the minutes that it takes at 10^12 `tflops` operations per second and GPU."""
        return (self.shared / gpus + self.repeated) / (tflops * 1e12) / 60


def count_pass(sizes: Sizes, tokens: int, length: int) -> float:
    """Return the operations of a pass through all blocks: 2 per parameter and token, and attention's."""
    return sizes.blocks * tokens * (2 * sizes.weights + 2 * length * sizes.queries)


def count_gptq(sizes: Sizes, tokens: int) -> Work:
    """Return the operations of Gram matrices [n, n], their factorized inverses (n³), and updates of m rows (m n²)."""
    linears = [(sizes.hidden, sizes.queries + 2 * sizes.keys), (sizes.queries, sizes.hidden)]
    linears += [(sizes.hidden, 2 * sizes.inner), (sizes.inner, sizes.hidden)]
    grams = sum(2 * n**2 * tokens for n, _ in linears)
    solved = sum(n**3 + m * n**2 for n, m in linears)
    return Work(sizes.blocks * grams, sizes.blocks * solved)


def plan_whole_models(tflops: float) -> str:
    """Return a Markdown table: memory, disk and time of whole models with the official numbers of windows."""
    params = parse_params(override(read_params(), WHOLE))
    runtime, train, tuning = params.runtime, params.calibration.train, params.finetuning
    tokens, windows = train.windows * train.length, train.windows + params.calibration.validation.windows
    calibration = Workload.of([train.windows], train.length, runtime, True)
    trained = Workload.of([windows], train.length, runtime, True)
    held_out = Workload.of([64, 64], 2048, runtime, True)
    lines = [
        "| model | stage | host, GiB | GPU, GiB | disk, GiB | 10¹⁵ operations | minutes, 1 GPU | minutes, 8 GPUs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, blocks in (("llama-2-7b", 32), ("llama-3-70b", 80)):
        plain, quantized = (Shape(SHAPES[name] | {"num_hidden_layers": blocks}, kind) for kind in (False, True))
        sizes = Sizes.of(plain)
        tables = count_tables(sizes, torch.bfloat16)
        needs = {
            "rotation": plan_rotation(plain, params.rotation, True),
            "prefix_search": plan_prefix_search(plain, Workload.of([64], 512, runtime, True), params.prefix_search),
            "quantizer_init": plan_quantizer_init(plain, calibration, params.quantizer_init),
            "finetuning": plan_finetuning(
                plain,
                blocks=trained,
                end_to_end=trained,
                params=tuning,
                quantizer_init=params.quantizer_init,
                runtime=runtime,
            ),
            "evaluation": plan_evaluation(quantized, held_out, compared=True, in_memory=False, task_items=0),
            "export": plan_export(quantized, OtherFiles(tables, tables, 0, 0), params.export),
        }
        gptq, once = count_gptq(sizes, tokens), count_pass(sizes, windows * train.length, train.length)
        work = {
            "prefix_search": Work(count_pass(sizes, 64 * 512, 512)),
            "quantizer_init": Work(2 * count_pass(sizes, tokens, train.length) + gptq.shared, gptq.repeated),
            "finetuning": Work(2 * once + tuning.blocks.epochs * 3 * 1.6 * count_pass(sizes, tokens, train.length)),
            "evaluation": Work(2 * count_pass(sizes, held_out.tokens, 2048)),
        }
        for stage, need in needs.items():
            host, gpu, disk = (size / GIB for size in (need.memory, need.gpu, need.disk))
            cells = [f"{name}, {blocks} blocks", stage, f"{host:.1f}", f"{gpu:.1f}", f"{disk:.0f}"]
            if counted := work.get(stage):
                minutes = [counted.minutes(gpus, tflops) for gpus in (1, 8)]
                cells += [f"{value:.1f}" for value in ((counted.shared + counted.repeated) / 1e15, *minutes)]
            else:
                cells += ["", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_table(rows: dict[str, Any]) -> str:
    """Return a Markdown table with a line per model and stage, and the GPU's memory if one was used."""
    head = ["model", "stage", "peak RSS, GiB", "limit, GiB", "k", "--plan, GiB", "seconds", "in plain forwards"]
    on_gpu = any(row["peak_gpu_gib"] for row in rows.values())
    lines = []
    for key, row in rows.items():
        model, _, name = key.partition("/")
        count = SHAPES[model]["num_hidden_layers"]
        sizes = [row["peak_rss_gib"], row["limit_gib"], row["planned_gib"]]
        cells = [f"{size:.2f}" for size in sizes]
        cells.insert(2, f"{ROWS[name].blocks}")
        cells += [f"{row['seconds']:.0f}", f"{row['seconds'] / row['forward_seconds']:.1f}"]
        if on_gpu:
            cells += [f"{row['peak_gpu_gib']:.2f}", f"{row['planned_gpu_gib']:.2f}"]
        blocks = f"{count} block{'s' if count > 1 else ''} of {row['block_gib']:.2f} GiB"
        lines.append([f"{model}, {blocks}", name, *cells])
    if on_gpu:
        head += ["peak on the GPU, GiB", "--plan, GPU, GiB"]
    return format_markdown(head, lines, titles=2)


if __name__ == "__main__":
    run_main(main)
