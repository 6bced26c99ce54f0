"""Training a prefix: the loss falls, the best epoch is kept, killed runs continue; candidates and their report."""

import math

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.prefix import training as prefix_training
from pipeline.prefix.frozen_model import FrozenModel
from pipeline.prefix.search import measure_outliers
from pipeline.prefix.training import (
    PrefixTrainer,
    PrefixTrainingError,
    cosine,
    discretise,
    initial_embeddings,
    make_candidates,
    train_prefix,
)
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.artifacts import make_header
from pipeline.training import trainer
from pipeline.training.place import HIDDEN_STATES, Keeping
from tests.blocks.test_walk import walked_logits
from tests.conftest import make_model, open_model
from tests.prefix.setup import make_place, setup, training
from tests.rotation.test_merging import rotate


def run(imported, windows, work_folder, place=None, **changes):
    """Train a prefix; return the result and the embeddings it started from."""
    checkpoint, runner, prefix, params = setup(imported, **changes)
    train, validation = windows
    trained = train_prefix(
        checkpoint,
        prefix,
        train=train,
        validation=validation,
        params=params,
        place=make_place(runner, work_folder, **(place or {})),
    )
    return trained, prefix


def describe_found(checkpoint, token_ids):
    """Return the tensors of prefix_search for these tokens."""
    token_ids = torch.tensor(token_ids, dtype=torch.int64)
    return {"token_ids": token_ids, "embeddings": checkpoint.embed(token_ids)}


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2", "var"])
def test_training_lowers_the_validation_loss(loss_type, imported, windows, tmp_path):
    easy = {"weights": {"kl": 0.0}, "learning_rate": 0.003}
    same = windows[0], windows[0]  # so few tokens of a random model say nothing about others
    trained, prefix = run(imported, same, tmp_path, loss_type=loss_type, epochs=8, early_stop=8, **easy)
    history = [row["validation"] for row in trained.history]
    assert history[trained.best_epoch] == min(history)
    assert trained.best_epoch > 0
    assert not torch.equal(trained.embeddings, prefix)


def test_zero_epochs_give_the_found_embeddings_exactly(imported, windows, tmp_path):
    trained, prefix = run(imported, windows, tmp_path, epochs=0)
    assert torch.equal(trained.embeddings, prefix)
    assert (trained.best_epoch, trained.epochs) == (0, 0)


def test_best_epoch_is_restored_after_a_late_divergence(imported, windows, tmp_path, monkeypatch):
    """After one good epoch, the learning rate ruins everything."""
    easy = {"loss_type": "l2", "weights": {"kl": 0.0}}
    good, _ = run(imported, windows, tmp_path / "a", epochs=1, **easy)
    rates = iter([cosine(0, 2), cosine(1, 2)] + [1e4] * 10)
    monkeypatch.setattr(prefix_training, "cosine", lambda step, steps: next(rates))
    trained, _ = run(imported, windows, tmp_path / "b", epochs=4, early_stop=9, **easy)
    assert trained.history[-1]["validation"] > 2 * trained.history[1]["validation"]
    assert trained.best_epoch == 1
    assert torch.equal(trained.embeddings, good.embeddings)


def test_training_stops_early_when_nothing_improves(imported, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_training, "cosine", lambda step, steps: 1e4)
    trained, prefix = run(imported, windows, tmp_path, epochs=9, early_stop=2)
    assert trained.epochs == 2
    assert "no lower validation loss for 2 epochs" in trained.stopped
    assert torch.equal(trained.embeddings, prefix)


def test_nan_loss_stops_in_the_best_state(imported, windows, tmp_path, monkeypatch, caplog):
    good, _ = run(imported, windows, tmp_path / "a", epochs=1)
    losses, calls = FrozenModel.losses, []

    def broken(self, *args):
        terms = losses(self, *args)
        calls.append(torch.is_grad_enabled())
        return {name: value * math.nan for name, value in terms.items()} if sum(calls) == 4 else terms

    monkeypatch.setattr(FrozenModel, "losses", broken)
    rates = iter([cosine(0, 2), cosine(1, 2)] + [1e-3] * 10)
    monkeypatch.setattr(prefix_training, "cosine", lambda step, steps: next(rates))
    trained, _ = run(imported, windows, tmp_path / "b", epochs=3)
    assert trained.stopped == "the loss was not finite in epoch 2, step 1"
    assert trained.stopped in caplog.text
    assert torch.equal(trained.embeddings, good.embeddings)


def test_nan_validation_loss_stops_in_the_best_state(imported, windows, tmp_path, monkeypatch):
    good, _ = run(imported, windows, tmp_path / "a", epochs=1)
    evaluate, calls = FrozenModel.evaluate, []

    def broken(self, *args):
        calls.append(1)
        return {"validation": math.nan} if len(calls) == 3 else evaluate(self, *args)

    monkeypatch.setattr(FrozenModel, "evaluate", broken)
    rates = iter([cosine(0, 2), cosine(1, 2)] + [1e-3] * 10)
    monkeypatch.setattr(prefix_training, "cosine", lambda step, steps: next(rates))
    trained, _ = run(imported, windows, tmp_path / "b", epochs=3)
    assert trained.stopped == "the validation loss was not finite after epoch 2"
    assert torch.equal(trained.embeddings, good.embeddings)


@pytest.mark.parametrize("keep_every", [1, 8])
@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_killed_training_continues_with_the_same_bytes(killed_in, keep_every, imported, windows, tmp_path, monkeypatch):
    """The kill comes in the second step of an epoch, whose first step is saved or not."""
    monkeypatch.setattr(trainer, "_KEEP_EVERY", keep_every)
    undisturbed, _ = run(imported, windows, tmp_path / "a")
    losses, calls = FrozenModel.losses, []

    def dies(self, *args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2 * killed_in:
            raise KeyboardInterrupt
        return losses(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenModel, "losses", dies)
        with pytest.raises(KeyboardInterrupt):
            run(imported, windows, tmp_path / "b")
    steps = []
    step = PrefixTrainer.step
    monkeypatch.setattr(PrefixTrainer, "step", lambda self, *args: (steps.append(args[2]), step(self, *args))[1])
    resumed, _ = run(imported, windows, tmp_path / "b")
    assert steps[0] == 2 * killed_in - (1 if keep_every == 1 else 2)
    assert torch.equal(resumed.embeddings, undisturbed.embeddings)
    assert resumed.history == undisturbed.history


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2"])
def test_kept_recomputed_and_streamed_blocks_train_the_same_prefix(loss_type, imported, windows, tmp_path):
    easy = {"weights": {"kl": float(loss_type == "quantization")}, "learning_rate": 0.003, "loss_type": loss_type}
    same = windows[0], windows[0]
    graphs, recomputed, streamed = (
        run(imported, same, tmp_path / str(number), {"keeping": keeping}, **easy)[0]
        for number, keeping in enumerate((Keeping(recompute=False), HIDDEN_STATES, Keeping(stream=True)))
    )
    assert graphs.best_epoch > 0
    for other in (recomputed, streamed):
        assert torch.equal(graphs.embeddings, other.embeddings)
        assert graphs.history == other.history


def test_unfinished_run_of_other_settings_is_not_continued(imported, windows, tmp_path, caplog):
    run(imported, windows, tmp_path)
    other = {"header": make_header("prefix_training", {"test": 2})}
    trained, _ = run(imported, windows, tmp_path, other, epochs=1)
    assert trained.epochs == 1
    assert "had other settings or inputs" in caplog.text


def test_learning_rate_falls_along_a_cosine():
    assert [round(cosine(step, 4), 4) for step in range(5)] == [1.0, 0.8536, 0.5, 0.1464, 0.0]


def test_without_a_found_prefix_rows_are_drawn_at_the_tables_scale():
    table = torch.randn(500, 16, generator=torch.Generator().manual_seed(5)) * 0.03
    rows = initial_embeddings(table[:0], table, 40, seed=3)
    assert rows.shape == (40, 16)
    assert rows.std().item() == pytest.approx(0.03, rel=0.1)
    assert torch.equal(rows, initial_embeddings(table[:0], table, 40, seed=3))


def test_discretised_tokens_are_the_nearest_by_cosine():
    table = torch.eye(4)[:, :3] + 0.01
    ids, similarities = discretise(torch.tensor([[5.0, 0.1, 0.0], [0.0, 0.0, -0.2]]), table)
    assert ids[0] == 0
    assert similarities[0].item() == pytest.approx(
        torch.cosine_similarity(table[0], torch.tensor([5.0, 0.1, 0.0]), dim=0).item()
    )


@torch.no_grad()
def test_continuous_prefix_gives_the_same_logits_in_the_rotated_model(imported, windows, tmp_path):
    """The embeddings are multiplied by R1. The KV equals transformers' own forward of `inputs_embeds`."""
    checkpoint, runner = open_model(imported["llama_tied"])
    prefix = torch.randn(3, 48, generator=torch.Generator().manual_seed(5))
    original = make_model("llama_tied")
    cache = original(inputs_embeds=prefix.unsqueeze(0), use_cache=True).past_key_values
    kv = compute_prefix_kv(checkpoint, prefix, runner)
    for index in range(3):
        assert torch.allclose(kv[index, 0], cache.layers[index].keys[0], atol=1e-5)
        assert torch.allclose(kv[index, 1], cache.layers[index].values[0], atol=1e-5)
    embedded = torch.cat((prefix.expand(4, -1, -1), original.model.embed_tokens(windows[0])), dim=1)
    expected = original(inputs_embeds=embedded).logits[:, 3:]
    rotated, rotated_runner, _ = rotate(imported["llama_tied"], tmp_path / "out")
    r1 = load_rotation(rotated.folder, "r1")
    rotated_kv = compute_prefix_kv(rotated, r1.apply(prefix.double()), rotated_runner)
    logits = walked_logits(rotated, rotated_runner, windows[0], rotated_kv)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_disabled_training_keeps_the_found_prefix(imported, windows, tmp_path):
    checkpoint, runner, _, _ = setup(imported)
    train, validation = windows
    for token_ids in ([7, 0], []):
        found_prefix = describe_found(checkpoint, token_ids)
        candidates = make_candidates(
            checkpoint,
            found_prefix,
            train=train,
            validation=validation,
            params=training(enabled=False),
            place=make_place(runner, tmp_path),
        )
        assert candidates.tensors.keys() == {"found.token_ids", "found.embeddings"}
        assert torch.equal(candidates.tensors["found.embeddings"], found_prefix["embeddings"])
        assert candidates.summary() == {"enabled": False, "prefix_tokens": len(token_ids), "full_precision_kl": {}}


@pytest.mark.parametrize(("found_ids", "expected"), [([7, 0], (0, None)), ([], (0, 0))])
def test_start_token_follows_a_trained_prefix_that_did_not_start_from_one(
    found_ids, expected, imported, windows, tmp_path, monkeypatch
):
    checkpoint, runner, _, params = setup(imported, length=3, epochs=1)
    options, measured_windows = {}, []

    def train_watched(*args, **keywords):
        options.update(keywords)
        return train_prefix(*args, **keywords)

    def measure_watched(checkpoint, token_ids, **keywords):
        measured_windows.append(token_ids)
        return measure_outliers(checkpoint, token_ids, **keywords)

    monkeypatch.setattr(prefix_training, "train_prefix", train_watched)
    monkeypatch.setattr(prefix_training, "measure_outliers", measure_watched)
    train, validation = windows
    candidates = make_candidates(
        checkpoint,
        describe_found(checkpoint, found_ids),
        train=train,
        validation=validation,
        params=params,
        place=make_place(runner, tmp_path),
        text_start_token_id=0,
    )
    assert (options["reference_start_token_id"], options["text_start_token_id"]) == expected
    none, found, trained, discretised = (token_ids.shape[1] - 12 for token_ids in measured_windows)
    assert (none, found, trained) == (1, int(not found_ids), int(not found_ids))
    assert discretised == (candidates.tensors["discretised.token_ids"][-1].item() != 0)


def test_report_covers_every_candidate(imported, windows, tmp_path):
    checkpoint, runner, _, params = setup(imported, length=3, epochs=1)
    train, validation = windows
    place = make_place(runner, tmp_path)
    options = {"train": train, "validation": validation, "place": place}
    candidates = make_candidates(checkpoint, describe_found(checkpoint, [7, 0]), params=params, **options)
    tensors = candidates.tensors
    assert tensors["trained.embeddings"].shape == (3, 48)
    assert tensors["trained.initial_token_ids"].tolist() == [0, 7, 0]
    assert torch.equal(tensors["discretised.embeddings"], checkpoint.embed(tensors["discretised.token_ids"]))
    assert tensors["discretised.token_ids"].tolist() == [0, 7, 0]  # one epoch moves the embeddings little
    assert candidates.report["outliers"].keys() == {"none", "found", "trained", "discretised"}
    assert all(len(layers) == 3 for layers in candidates.report["outliers"].values())
    summary = candidates.summary()
    assert summary["validation_loss"]["after"] <= summary["validation_loss"]["before"]
    with pytest.raises(PrefixTrainingError, match=r"prefix_training\.length=null: prefix_search found no prefix"):
        make_candidates(checkpoint, describe_found(checkpoint, []), params=training(length=None), **options)
