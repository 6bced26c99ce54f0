"""Quantized experts, against naive loops over tokens and experts."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from pipeline.blocks.quantized import count_fired_quantizers, fill_block, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.importing.import_model import import_model
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.quantizer import dequantize_weight
from pipeline.quantization import expert_statistics
from pipeline.quantization.equalization import Equalizer, choose_scales
from pipeline.quantization.expert_statistics import ExpertUse
from pipeline.quantization.quantizer_init import init_blocks, resolve_settings
from pipeline.quantization.statistics import record_block
from pipeline.rotation.gate import compute_exactly_
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.artifacts import load_tensors, make_header
from pipeline.runtime.ranks import ALONE, Ranks
from tests.conftest import init_params
from tests.quantization.test_statistics import MAX
from tests.rotation.test_merging import rotate

LOPSIDED = 3 + torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["mixtral", "qwen2_moe", "ernie4_5_moe", "hunyuan_v1_moe"])
def sparse(request, imported, tmp_path):
    """Return a rotated checkpoint, its runner, and the index of a block with experts."""
    return *rotate(imported[request.param], tmp_path / "rotation", r1="online")[:2], 1


@pytest.fixture
def starved(model_folders, tmp_path):
    """Return a mixtral whose router sends no token to expert 3, rotated, with its runner."""
    source = tmp_path / "source"
    source.mkdir()
    for path in model_folders["mixtral"].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]:
        tensors[name][3] = -1  # LOPSIDED has positive means
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    import_model(str(source), None, torch.float32, tmp_path / "model")
    return rotate(tmp_path / "model", tmp_path / "rotation", r1="online")[:2]


def record(checkpoint, runner, index, mse_samples=5, hidden=HIDDEN):
    settings, _ = resolve_settings(init_params(MAX), checkpoint, index)
    block = fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings)
    architecture = checkpoint.architecture
    return block, record_block(block, architecture, hidden, None, runner=runner, mse_samples=mse_samples)


def find_mlp_input(block, runner, hidden):
    """Return the output of the norm before the experts, [n, D]."""
    outputs = []
    handle = block.post_attention_layernorm.register_forward_hook(lambda m, args, output: outputs.append(output))
    runner.run(block, hidden)
    handle.remove()
    return outputs[0].flatten(0, 1)


def router_weight(block):
    return getattr(block.mlp.gate, "wg", block.mlp.gate).weight


def route(block, x):
    """Return the chosen experts and their weights of tokens x [n, D], from the router's matrix and its bias, if any."""
    p = (x @ router_weight(block).T).softmax(-1)
    statics = getattr(block.mlp.gate, "moe_statics", None)
    chosen = (p if statics is None else p + statics.e_score_correction_bias).topk(2, dim=-1).indices
    weights = p.gather(1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True)


def quantize(quantizer, x):
    """Round to a grid of integers with one static scale, written out."""
    if quantizer is None or not quantizer.calibrated:
        return x
    low, high = -(2 ** (quantizer.spec.bits - 1)), 2 ** (quantizer.spec.bits - 1) - 1
    return (x / quantizer.scale).round().clamp(low, high) * quantizer.scale


def dense(linear):
    if linear.weight_scale is None:
        return linear.weight
    return dequantize_weight(linear.weight, linear.weight_scale, linear.weight_zero_point, linear.spec.grid)


def run_mlp(mlp, x):
    """Return the output of one gated MLP for one token x [D], which was rotated and quantized."""
    inner = silu(dense(mlp.gate_proj) @ x) * (dense(mlp.up_proj) @ x)
    return dense(mlp.down_proj) @ quantize(mlp.down_proj.input_quantizer, hadamard_transform(inner))


@torch.no_grad()
def test_quantized_experts_equal_a_loop_over_tokens(sparse, tmp_path):
    checkpoint, runner, index = sparse
    params = init_params(MAX | {"activations.symmetric": True})
    init_blocks(
        checkpoint,
        HIDDEN.clone(),
        None,
        params=params,
        runner=runner,
        work_folder=tmp_path / "work",
        header=make_header("q", {}),
    )
    stored = load_tensors(tmp_path / f"work/block-{index:05d}.safetensors", "q")[0]
    tensors = {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in stored.items()}
    experts = 4
    assert tensors["mlp.experts.down_proj.input_quantizer.scale"].shape == (experts, 1)
    assert tensors["mlp.experts.gate_proj.weight"].dtype == torch.int8
    assert tensors["mlp.experts.gate_proj.weight"].dim() == tensors["mlp.experts.up_proj.weight_scale"].dim() == 3
    assert all(tensors[f"{name}.weight"].dtype == torch.float32 for name in checkpoint.architecture.routers[:1])
    block = fill_block(checkpoint, index, tensors, resolve_settings(params, checkpoint, index)[0])
    x = find_mlp_input(block, runner, HIDDEN)
    chosen, weights = route(block, x)
    rotated = quantize(block.mlp.experts.quantizer, hadamard_transform(x))
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            expected[token] += weight * run_mlp(block.mlp.experts.expert(expert), rotated[token])
        if hasattr(block.mlp, "shared_expert"):
            gate = torch.sigmoid(block.mlp.shared_expert_gate.weight @ x[token])
            expected[token] += gate * run_mlp(block.mlp.shared_expert, rotated[token])
        for name in ("shared_experts", "shared_mlp"):
            if hasattr(block.mlp, name):
                expected[token] += run_mlp(block.mlp.get_submodule(name), rotated[token])
    computed = block.mlp(x[None])[0]
    assert torch.allclose(computed, expected, atol=1e-5 * expected.abs().max())
    fired = count_fired_quantizers(block, checkpoint.architecture)
    assert fired == {"weights": 7, "activations": 4, "keys": 1, "values": 1}


@torch.no_grad()
def test_the_router_reads_unquantized_values(sparse):
    """Where the input of the experts is rounded to zero, the router still chooses as in full precision."""
    checkpoint, runner, index = sparse
    block, _ = record(checkpoint, runner, index)
    x = find_mlp_input(block, runner, HIDDEN)
    block.mlp.experts.quantizer.calibrate_(scale=torch.tensor([1e3]))  # rounds everything to zero
    choices = []
    block.mlp.gate.register_forward_hook(lambda m, args, output: choices.append((args[0], output[2])))
    block.mlp(x[None])
    assert torch.equal(choices[0][0], x)
    assert torch.equal(choices[0][1], route(block, x)[0])


@torch.no_grad()
def test_statistics_of_an_expert_are_of_its_tokens(sparse, monkeypatch):
    checkpoint, runner, index = sparse
    monkeypatch.setattr(expert_statistics, "FLOOR", 0)
    _, statistics = record(checkpoint, runner, index)
    plain = load_block(checkpoint, index)
    x = find_mlp_input(plain, runner, HIDDEN)
    chosen, _ = route(plain, x)
    for expert in range(4):
        tokens = (chosen == expert).any(-1).nonzero().squeeze(1)
        inner = plain.mlp.experts.compute_inner(expert, hadamard_transform(x[tokens]))
        values = hadamard_transform(inner)
        recorded = statistics.sites[f"mlp_hidden.experts.{expert}"]
        assert recorded.channels.count == len(tokens) == statistics.uses[expert].tokens
        assert statistics.uses[expert].added == 0
        assert torch.allclose(recorded.channels.high, values.amax(0), atol=1e-5)
        assert torch.allclose(recorded.take_hessian(), values.T @ values / len(tokens), atol=1e-4)
    shared = statistics.sites["mlp_input"]
    rotated = hadamard_transform(x)
    assert shared.channels.count == len(x)  # once for each token, whoever reads it
    assert torch.allclose(shared.take_hessian(), rotated.T @ rotated / len(x), atol=1e-4)


@torch.no_grad()
def test_an_expert_without_tokens_gets_the_next_best_ones(starved, monkeypatch, caplog, tmp_path):
    checkpoint, runner = starved
    monkeypatch.setattr(expert_statistics, "FLOOR", 8)
    _, statistics = record(checkpoint, runner, 1, hidden=LOPSIDED)
    assert statistics.uses[3] == ExpertUse(tokens=0, added=8)
    plain = load_block(checkpoint, 1)
    x = find_mlp_input(plain, runner, LOPSIDED)
    logits = x @ plain.mlp.gate.weight.T
    distance = logits[:, 3] - logits.topk(2, dim=-1).values[:, 1]
    expected = distance.topk(8).indices
    values = hadamard_transform(plain.mlp.experts.compute_inner(3, hadamard_transform(x[expected])))
    recorded = statistics.sites["mlp_hidden.experts.3"]
    assert torch.allclose(recorded.channels.high, values.amax(0), atol=1e-5)
    assert torch.allclose(recorded.take_hessian(), values.T @ values / 8, atol=1e-4)
    # Forced tokens must not reach the hidden states.
    assert torch.allclose(statistics.outputs, runner.run(plain, LOPSIDED), atol=1e-5)
    with caplog.at_level(logging.WARNING):
        report = init_blocks(
            checkpoint,
            LOPSIDED.clone(),
            None,
            params=init_params(),
            runner=runner,
            work_folder=tmp_path / "work",
            header=make_header("q", {}),
        )
    assert "block 1: experts with few tokens, topped up with the next best ones: " in caplog.text
    assert any(row["expert"] == 3 for row in report[1]["experts"]["starved"])
    for index in range(3):
        stored = load_tensors(tmp_path / f"work/block-{index:05d}.safetensors", "q")[0]
        for name, tensor in stored.items():
            assert torch.isfinite(tensor.float()).all(), name
            if name.endswith("scale"):
                assert (tensor > 0).all(), name


@torch.no_grad()
def test_no_weight_of_an_expert_is_skipped_or_rounded_to_nearest(sparse, tmp_path):
    checkpoint, runner, index = sparse
    report = init_blocks(
        checkpoint,
        HIDDEN.clone(),
        None,
        params=init_params(),
        runner=runner,
        work_folder=tmp_path / "work",
        header=make_header("q", {}),
    )
    block = checkpoint.build_block(index)
    names = checkpoint.architecture.of_block(block).linear_names
    sites = report[index]["sites"]
    assert set(names) <= set(sites)
    assert all(sites[name]["damping"] < 1 for name in names)
    stored = load_tensors(tmp_path / f"work/block-{index:05d}.safetensors", "q")[0]
    integers = sum(
        t.numel() for name, t in stored.items() if name.endswith("_proj.weight") and t.dtype != torch.float32
    )
    weights = sum(block.get_submodule(name).weight.numel() for name in names.values())
    assert integers == weights


class ThreadRanks(Ranks):
    """Ranks that are threads of one process; `board` has a place for the tensor of each."""

    def __init__(self, rank, board, barrier):
        super().__init__(rank, len(board))
        self.board, self.barrier = board, barrier

    def exchange(self, tensor):
        self.board[self.rank] = tensor.clone()
        self.barrier.wait()
        parts = list(self.board)
        self.barrier.wait()
        return parts

    def _reduce_(self, operation, tensors):
        reduce = {"SUM": torch.sum, "MIN": torch.amin, "MAX": torch.amax}[operation]
        for tensor in tensors:
            tensor.copy_(reduce(torch.stack(self.exchange(tensor)), dim=0))

    def broadcast_(self, *tensors):
        for tensor in tensors:
            tensor.copy_(self.exchange(tensor)[0])

    def join(self, local):
        return torch.cat(self.exchange(local))

    def wait(self):
        self.barrier.wait()


@torch.no_grad()
def test_two_ranks_quantize_experts_as_one_does(starved, monkeypatch, tmp_path):
    checkpoint, _ = starved
    monkeypatch.setattr(expert_statistics, "FLOOR", 8)
    params = init_params({"equalize": ["mlp_input", "mlp_hidden"]})

    def quantize_all(ranks, folder):
        own = Checkpoint(checkpoint.folder, checkpoint.stage)
        return init_blocks(
            own,
            LOPSIDED[ranks.slice_windows(len(LOPSIDED))].clone(),
            None,
            params=params,
            runner=BlockRunner(own, torch.device("cpu"), 2),
            work_folder=folder,
            header=make_header("q", {}),
            ranks=ranks,
        )

    expected = quantize_all(ALONE, tmp_path / "one")
    board, barrier = [torch.empty(0)] * 2, threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        every = [pool.submit(quantize_all, ThreadRanks(rank, board, barrier), tmp_path / "two") for rank in range(2)]
        reports = [future.result() for future in every]
    assert [block["experts"] for block in reports[0]] == [block["experts"] for block in expected]
    assert any(row["expert"] == 3 and row["added"] == 8 for row in expected[1]["experts"]["starved"])
    for index in range(checkpoint.block_count):
        one, two = (load_tensors(tmp_path / name / f"block-{index:05d}.safetensors", "q")[0] for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            same = torch.isclose(tensor.float(), two[name].float(), rtol=1e-3, atol=1e-4)
            # Sums in another order may move a value across the middle between two integers. Measured: at least 0.99.
            assert same.double().mean() > 0.95, name


@torch.no_grad()
def test_samples_and_choices_do_not_depend_on_the_batch_size(sparse):
    checkpoint, runner, index = sparse
    _, one = record(checkpoint, runner, index, mse_samples=2)
    runner.batch_size = 5
    _, other = record(checkpoint, runner, index, mse_samples=2)
    for site, statistics in one.sites.items():
        assert torch.allclose(statistics.sample, other.sites[site].sample, atol=1e-5), site
        assert torch.allclose(statistics.channels.high, other.sites[site].channels.high, atol=1e-5), site
    assert one.uses == other.uses


@torch.no_grad()
def test_equalization_is_exact_in_blocks_with_experts(sparse):
    checkpoint, runner, index = sparse
    settings, _ = resolve_settings(init_params(), checkpoint, index)
    blocks = [
        fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings, dtype=torch.float64)
        for _ in range(2)
    ]
    equalizer = Equalizer(blocks[1], checkpoint.architecture, settings, load_rotation(checkpoint.folder, "r2"))
    assert "mlp_hidden.experts.3" in equalizer.sites
    generator = torch.Generator().manual_seed(1)
    channels = {
        site: torch.rand(sums.shape, generator=generator, dtype=torch.float64) * torch.tensor([[0.0], [1], [1]])
        for site, sums in equalizer.make_sums().items()
    }
    scales = equalizer.choose(channels, runner)
    assert scales["mlp_hidden.experts.0"].shape == (blocks[0].mlp.experts.expert(0).down_proj.in_features,)
    equalizer.scale_(scales)
    for block in blocks:
        compute_exactly_(block)
    expected, scaled = (runner.run(block, HIDDEN.double()) for block in blocks)
    assert torch.allclose(scaled, expected, rtol=0, atol=1e-12 * expected.abs().max())
    assert not torch.allclose(*map(router_weight, blocks))


def test_experts_with_few_tokens_are_not_scaled():
    scales = choose_scales(torch.zeros(4), torch.zeros(4))
    assert torch.equal(scales, torch.ones(4))


def test_percentiles_of_experts_are_refused_by_name(sparse):
    checkpoint, _, index = sparse
    with pytest.raises(UnsupportedModelError, match=r"quantizer_init\.activations\.range='percentile': model_type="):
        resolve_settings(init_params({"activations.range": "percentile"}), checkpoint, index)
