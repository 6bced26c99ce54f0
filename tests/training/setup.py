"""A tiny quantized model with a prefix of two tokens, and short ways to fine-tune it."""

import pytest
import torch
import yaml

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.blocks.quantized import find_site_quantizers, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.rotation.matrices import compute_rotated_prefix_kv
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.streams import Offload
from pipeline.training.block_wise import BlockData, BlockTrainer, Models, finetune_blocks
from pipeline.training.end_to_end import EndToEndTrainer, ModelData
from pipeline.training.finetuning import FinetuningWindows, finetune
from pipeline.training.params import FinetuningParams
from pipeline.training.place import HIDDEN_STATES, Keeping, Place
from pipeline.training.reference import run_original
from pipeline.training.trainables import unfreeze_
from tests.conftest import ROOT, open_model
from tests.rotation.test_merging import rotate

HEADER = make_header("finetuning", {"test": 1})
MEASURED = {"enabled": False}  # blocks that are measured and not trained
PREFIX = torch.tensor([7, 0])
KEEPINGS = {"graphs": Keeping(recompute=False), "hidden states": HIDDEN_STATES, "streamed": Keeping(stream=True)}
ALL_MOVE = {"enabled": True, "epochs": 2, "quant_lr": 0.01, "norm_lr": 0.01, "prefix_lr": 0.01}


def settings(blocks=None, end_to_end=None, **changes):
    """Return the params of three epochs for each block, with changes in either phase or in what both share."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["finetuning"] | changes
    values["blocks"] |= {"enabled": True, "epochs": 3, "batch_size": 2, "early_stop": 9}
    values["blocks"] |= {"quant_lr": 0.005, "weight_lr": 0.001} | (blocks or {})
    values["end_to_end"] |= {"enabled": False, "epochs": 2, "batch_size": 2, "early_stop": 9} | (end_to_end or {})
    return FinetuningParams.model_validate(values)


@pytest.fixture(scope="module")
def quantized(imported, tmp_path_factory):
    """Return a tiny model, rotated and quantized with a prefix of two tokens, four train and two validation windows."""
    root = tmp_path_factory.mktemp("finetuning")
    rotated, runner, _ = rotate(imported["llama_tied"], root / "rotated", r1="online", online_signs=True)
    token_ids = torch.randint(0, 320, (6, 16), generator=torch.Generator().manual_seed(1))
    init = yaml.safe_load((ROOT / "params.yaml").read_text())["quantizer_init"]
    init = QuantizerInitParams.model_validate(init | {"mse_samples": 2, "keep_unrounded": True})
    original, _ = open_model(imported["llama_tied"])
    init_quantizers(
        rotated,
        root / "quantized",
        params=init,
        prefix_token_ids=PREFIX,
        prefix_embeddings=original.embed(PREFIX),
        token_ids=token_ids[:4],
        runner=runner,
        work_folder=root / "work",
        header=make_header("quantizer_init", {"test": 1}),
    )
    initial = Checkpoint(root / "quantized", "quantizer_init")
    return Models(original, rotated, initial), token_ids[:4], token_ids[4:]


def make_place(models, work_folder, **changes):
    """Return a place with the runner of the rotated model; hidden states stay in memory."""
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    values = {"runner": runner, "offload": Offload(None), "work_folder": work_folder, "header": HEADER}
    return Place(**values | changes)


def run_blocks(quantized, work_folder, ranks=None, offload=None, **changes):
    """Run the block-wise phase and return its report."""
    models, train, validation = quantized
    with Offload(offload) as streams:
        place = make_place(models, work_folder, offload=streams, ranks=ranks or Ranks())
        return finetune_blocks(models, train, validation, settings(**changes), place)


def run_whole(quantized, folder, keeping=HIDDEN_STATES, offload=None, together=None, **changes):
    """Run fine-tuning and return its metrics and checkpoint.

    Args:
        together: windows to train all blocks on; None: the train windows.
    """
    models, train, validation = quantized
    with Offload(offload) as streams:
        place = make_place(models, folder / "work", offload=streams, keeping=keeping)
        windows = FinetuningWindows(train, train if together is None else together, validation)
        metrics = finetune(models, windows, settings(**changes), place, folder / "out")
    return metrics, Checkpoint(folder / "out", "finetuning")


def make_block_trainer(quantized, blocks=None, index=1):
    """Return the trainer of a block, the block's trainables, and data with random inputs."""
    models, _, _ = quantized
    params = settings(blocks)
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    prefix_kv = load_prefix_kv(models.initial.folder, "quantizer_init")[index]
    reference = load_block(models.rotated, index)
    with torch.no_grad():
        original_kv = compute_rotated_prefix_kv(models.rotated, models.original.embed(PREFIX), runner)
        inputs = models.rotated.embed(torch.randint(0, 320, (4, 16), generator=torch.Generator().manual_seed(4)))
        for before in range(index):
            runner.advance_(load_block(models.rotated, before), inputs, original_kv[before])
        target = runner.run(reference, inputs, original_kv[index])
    block = load_block(models.initial, index)
    for quantizer in find_site_quantizers(block, models.initial.architecture).values():
        quantizer.scale *= 1.3  # so that there is something to improve
    linears = models.initial.architecture.linears
    weights = {name: block.get_submodule(name).dense_weight(torch.float32) for name in linears}
    trainables = unfreeze_(block, models.initial.architecture, weights=weights)
    trainer = BlockTrainer(block, trainables, prefix_kv=prefix_kv, runner=runner, params=params, ranks=Ranks())
    return trainer, trainables, BlockData(inputs, [target], 4)


def make_end_to_end_trainer(quantized, work_folder, params, **place):
    """Return the trainer of the finished blocks in a work folder, and the train windows as its data."""
    models, train, _ = quantized
    trainer = EndToEndTrainer(
        models.initial,
        models.original,
        prefix_kv=load_prefix_kv(models.initial.folder, "quantizer_init"),
        params=params,
        autocast="none",
        place=make_place(models, work_folder, **place),
    )
    return trainer, ModelData(models.initial.embed(train), run_original(models.original, train, trainer.runner), 4)


def read_bytes(folder):
    """Return file name -> content of the files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
