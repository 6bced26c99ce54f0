"""The original's hidden states for training: kept in a file part by part, or computed next to the student."""

import pytest
import torch

from pipeline.blocks.walk import BlockRunner
from pipeline.runtime.artifacts import make_header
from pipeline.text.windows import Windows, open_token_ids, save_windows
from pipeline.training import reference as module
from pipeline.training.end_to_end import EmbeddedWindows
from pipeline.training.reference import AlongsideReference, CachedReference, run_original
from tests.conftest import make_model
from tests.training.setup import ALL_MOVE, HEADER, MEASURED, read_bytes, run_whole

WINDOW_BYTES = 16 * 48 * 4  # of hidden states


@pytest.fixture
def runner(quantized):
    return BlockRunner(quantized[0].rotated, torch.device("cpu"), 2)


def draw(count):
    return torch.randint(0, 320, (count, 16), generator=torch.Generator().manual_seed(5))


def compute(models, runner, token_ids, folder):
    options = {"text_start_token_id": None, "path": folder / "reference", "header": HEADER}
    return CachedReference.compute(models.original, token_ids, runner, **options)


def test_both_kinds_are_the_hidden_states_of_transformers_own_model(quantized, runner, tmp_path):
    models, token_ids = quantized[0], draw(6)
    with torch.no_grad():
        expected = make_model("llama_tied").model(token_ids).last_hidden_state
    rows = torch.tensor([4, 1])
    for reference in (
        compute(models, runner, token_ids, tmp_path),
        AlongsideReference(models.original, token_ids, runner, None),
    ):
        assert len(reference) == 6
        # Largest difference measured: 4e-6.
        torch.testing.assert_close(reference[rows], expected[rows], atol=2e-5, rtol=1e-5)


def test_a_start_token_is_read_and_its_state_left_out(quantized, runner):
    models, token_ids = quantized[0], draw(2)
    alongside = AlongsideReference(models.original, token_ids, runner, 3)[slice(0, 2)]
    assert alongside.shape == (2, 16, 48)
    torch.testing.assert_close(alongside, run_original(models.original, token_ids, runner, 3), atol=2e-5, rtol=1e-5)


def test_parts_give_the_same_bytes_and_bound_the_windows_in_memory(quantized, runner, tmp_path, monkeypatch):
    models, token_ids = quantized[0], draw(9)
    whole = run_original(models.original, token_ids, runner)
    walked = []

    def count(original, part, *others):
        walked.append(len(part))
        return run_original(original, part, *others)

    monkeypatch.setattr(module, "run_original", count)
    monkeypatch.setattr(module, "PART_BYTES", 5 * WINDOW_BYTES)  # rounded down to whole batches of two
    assert torch.equal(compute(models, runner, token_ids, tmp_path)[slice(0, 9)], whole)
    assert walked == [4, 4, 1]


def test_a_killed_run_computes_only_the_parts_that_are_missing(quantized, runner, tmp_path, monkeypatch):
    models, token_ids = quantized[0], draw(8)
    whole = run_original(models.original, token_ids, runner)
    walked = []

    def fail_once(original, part, *others):
        walked.append(len(part))
        if len(walked) == 3:
            raise KeyboardInterrupt
        return run_original(original, part, *others)

    monkeypatch.setattr(module, "run_original", fail_once)
    monkeypatch.setattr(module, "PART_BYTES", 2 * WINDOW_BYTES)
    with pytest.raises(KeyboardInterrupt):
        compute(models, runner, token_ids, tmp_path)
    assert torch.equal(compute(models, runner, token_ids, tmp_path)[slice(0, 8)], whole)
    assert walked == [2, 2, 2, 2, 2]  # two parts, the third in vain, then the third and the fourth


def test_memory_does_not_grow_with_the_number_of_windows(quantized, runner, tmp_path, monkeypatch):
    """The tokens of a batch are read from their file when it is trained on, and nothing else of it is kept."""
    models = quantized[0]
    read = []
    for count in (4, 40):
        path = tmp_path / f"{count}.safetensors"
        save_windows(path, Windows(draw(count), make_header("calibration", {"count": count})))
        stored = open_token_ids(path)
        assert stored.shape == (count, 16)
        inputs = EmbeddedWindows(models.initial, stored, None)
        monkeypatch.setattr(module, "PART_BYTES", 4 * WINDOW_BYTES)
        folder = tmp_path / str(count)
        folder.mkdir()
        reference = compute(models, runner, stored, folder)
        held = [value for part in (inputs, reference, stored) for value in vars(part).values()]
        tensors = [value for value in held if isinstance(value, torch.Tensor)]
        read.append(sum(tensor.numel() for tensor in tensors))
        assert torch.equal(inputs[torch.tensor([3, 0])], models.initial.embed(draw(count)[[3, 0]]))
    assert read[0] == read[1] == models.initial.load_tensor(models.initial.architecture.embedding).numel()


def test_windows_in_a_file_train_to_the_same_bytes_as_windows_in_memory(quantized, tmp_path):
    token_ids = draw(6)
    save_windows(tmp_path / "w.safetensors", Windows(token_ids, make_header("calibration", {})))
    options = {"blocks": MEASURED, "end_to_end": ALL_MOVE | {"epochs": 1}}
    run_whole(quantized, tmp_path / "memory", together=token_ids, **options)
    run_whole(quantized, tmp_path / "file", together=open_token_ids(tmp_path / "w.safetensors"), **options)
    assert read_bytes(tmp_path / "memory/out") == read_bytes(tmp_path / "file/out")


def test_the_teacher_alongside_trains_to_the_same_losses(quantized, tmp_path):
    losses = {}
    for kind in ("cached", "alongside"):
        end = ALL_MOVE | {"epochs": 1, "reference": kind}
        metrics, _ = run_whole(quantized, tmp_path / kind, blocks=MEASURED, end_to_end=end)
        losses[kind] = metrics["end_to_end"]["kl_after"]
        assert not (tmp_path / kind / "work").exists()
    assert losses["alongside"] == pytest.approx(losses["cached"], rel=1e-3)
