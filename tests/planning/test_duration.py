"""Plans of time: tokens and passes by hand, and the measured forward pass of a tiny model."""

import pytest
import torch

from benchmarks.workspace import override, read_params
from pipeline.explain import plan_times
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import parse_params
from pipeline.planning import duration
from pipeline.planning.duration import StageTokens, measure_token, plan_seconds
from pipeline.planning.sizes import Sizes

SIZES = Sizes(hidden=64, inner=128, mlps=(128,), keys=16, queries=64, vocabulary=100, blocks=2, weights=1, itemsize=4)
TOKENS = StageTokens(
    search=1000,
    train=500,
    end_to_end=3000,
    validation=200,
    evaluation=400,
    pictures=100,
    block_epochs=0,
    end_to_end_epochs=2,
    benefit=True,
    task_items=10,
)


def test_time_is_passes_times_tokens():
    seconds = plan_seconds(SIZES, TOKENS, token_seconds=0.001)
    assert seconds == pytest.approx(
        {
            "rotation": 0.256,  # 4 x 64 tokens
            "prefix_search": 2.3,
            "quantizer_init": 3.8 * 0.5 + 1.45 * 8,
            "finetuning": 4.0 * (2 * 3.0 + 0.2),
            "evaluation": (2 * 0.9 + 3 * 1.6) * (0.4 + 1.3),
            "activation_plots": 4 * 1.05 * 0.1,
        }
    )


def test_the_packaged_model_took_about_as_long_as_its_plan():
    """Seconds of the default run in metrics/runtime/ of 2026-11-30, on two cores with 2.06 ms a token."""
    sizes = Sizes(576, 1536, (1536,), 192, 576, 49152, 30, 3_540_096, 4)
    tokens = StageTokens(16384, 8192, 49152, 2048, 8192, 8192, 0, 1, benefit=True, task_items=112)
    measured = {"rotation": 4.6, "prefix_search": 76.5, "quantizer_init": 135.1, "finetuning": 404.6}
    measured |= {"evaluation": 305.8, "activation_plots": 72.1}
    planned = plan_seconds(sizes, tokens, token_seconds=2.06e-3)
    assert {stage: planned[stage] / measured[stage] for stage in measured} == pytest.approx(
        dict.fromkeys(measured, 1.0), abs=0.1
    )


def test_the_forward_pass_of_a_tiny_model_is_measured(imported, monkeypatch):
    monkeypatch.setattr(duration, "_ENOUGH_SECONDS", 0.0)
    assert measure_token(Checkpoint(imported["llama_tied"], "model"), torch.device("cpu")) > 1e-8


def test_a_model_of_few_positions_is_measured_within_them(imported, monkeypatch):
    monkeypatch.setattr(duration, "_ENOUGH_SECONDS", 0.0)
    checkpoint, lengths = Checkpoint(imported["llama_tied"], "model"), []
    checkpoint.config.max_position_embeddings = 20  # fewer than _FEW_TOKENS
    run = duration.BlockRunner.run
    monkeypatch.setattr(
        duration.BlockRunner, "run", lambda *arguments: lengths.append(arguments[2].shape[1]) or run(*arguments)
    )
    assert measure_token(checkpoint, torch.device("cpu")) > 1e-8
    assert set(lengths) == {20}


def test_a_model_whose_block_does_not_fit_has_no_plan_of_time(imported):
    checkpoint = Checkpoint(imported["llama_tied"], "model")
    params = override(read_params(), {"runtime.max_memory": "0.001MiB", "runtime.device": "cpu"})
    assert plan_times(checkpoint.config, parse_params(params)) == {}
