"""The trainable prefix: every loss term by hand, nothing but the embeddings moves, the best epoch is kept."""

import math

import pytest
import torch
import yaml

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.prefix import training as prefix_training
from pipeline.prefix.candidates import resize_rows
from pipeline.prefix.frozen_model import FrozenModel
from pipeline.prefix.losses import AttentionMeasure, OutlierMeasure, QuantizationMeasure, diversity, magnitude
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.prefix.training import cosine, discretise, initial_embeddings, make_candidates, train_prefix
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.streams import Offload
from pipeline.text.windows import prepend_start_token
from pipeline.training.place import HIDDEN_STATES, Keeping, Place
from tests.blocks.test_walk import walked_logits
from tests.conftest import ROOT, SLIDING, WINDOW, make_model, open_model
from tests.rotation.test_merging import rotate

GENERATOR = torch.Generator().manual_seed(5)
HEADER = make_header("prefix_training", {"test": 1})


def training(**changes):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["prefix_training"]
    values |= {"enabled": True, "epochs": 3, "batch_size": 2, "learning_rate": 0.01}
    weights = changes.pop("weights", {})
    return PrefixTrainingParams.model_validate(values | changes | {"weights": values["weights"] | weights})


@pytest.fixture
def windows():
    ids = torch.randint(0, 320, (6, 12), generator=torch.Generator().manual_seed(1))
    return ids[:4], ids[4:]


def setup(imported, family="llama_tied", count=2, **changes):
    checkpoint, runner = open_model(imported[family])
    prefix = checkpoint.embed(torch.tensor([7, 0][-count:]))
    return checkpoint, runner, prefix, training(**changes)


# --- Loss terms ------------------------------------------------------------------------------------------------------


def test_outlier_terms_of_a_hand_computed_case():
    measure = OutlierMeasure(None, training(outlier_threshold=5.0))
    ratios = torch.tensor([[1.0, 1.0, 9.0, 1.0]])
    found = measure.terms(ratios)
    excess = 4 / 4
    smooth_maximum = math.log(3 * math.e + math.e**9)
    assert found[0].item() == pytest.approx(excess + smooth_maximum + 9.0, rel=1e-6)
    assert found[1].item() == pytest.approx((0 + 8 + 8) / 3, rel=1e-6)
    # From activations: token maxima 2, 2, 18, 2 have median 2.
    x = torch.tensor([[[2.0, 1.0], [-2.0, 0.0], [3.0, -18.0], [2.0, 2.0]]])
    seen, terms = measure.see(0, "mlp_hidden", x)
    assert torch.allclose(terms, found)
    assert seen is x


def test_attention_terms_of_a_hand_computed_case():
    x = torch.tensor([[[1.0, 3.0], [3.0, -1.0]]])  # [1, 2, 2]: over tokens means 2, 1, deviations 1, 2
    for loss_type, expected in (("l2", 20 / 4), ("var", (1 + 4) / 2)):
        seen, terms = AttentionMeasure(None, training(loss_type=loss_type)).see(0, "o_proj", x)
        assert terms.item() == pytest.approx(expected)
        assert seen is x


def test_diversity_and_magnitude_of_hand_computed_cases():
    assert diversity(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item() == 0
    assert diversity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).item() == pytest.approx(1)
    assert diversity(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])).item() == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert diversity(torch.ones(1, 4)).item() == 0
    assert magnitude(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 4.0).item() == pytest.approx((5 / 4 - 1) / 2)


def test_quantization_error_is_that_of_the_best_static_scale(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    measure = QuantizationMeasure(checkpoint, training(bits=3))
    x = torch.randn(2, 6, 8, generator=GENERATOR) + 4
    centered = x - x.mean((0, 1))
    errors = []
    for factor in torch.linspace(0.1, 1, 200):
        scale = centered.abs().max() * factor / 3
        errors.append(((centered / scale).round().clamp(-4, 3) * scale - centered).square().sum())
    expected = (min(errors) / centered.square().sum()).item()
    mean, varying, quantized = measure.quantizers.quantize(x)
    assert torch.equal(varying, x - mean)
    quantized, error = quantized + mean, (quantized - varying).square().sum() / varying.square().sum()
    assert error.item() == pytest.approx(expected, rel=0.1)
    assert error.item() >= expected * 0.999
    assert ((quantized - x).square().sum() / centered.square().sum()).item() == pytest.approx(error.item(), rel=1e-4)
    # Per head: two heads of very different size cost no more than each by itself.
    heads = torch.stack((x.squeeze(), x.squeeze() * 1000), dim=1)
    _, varying, quantized = measure.quantizers.quantize(heads)
    found = (quantized - varying).square().sum() / varying.square().sum()
    assert found.item() == pytest.approx(error.item(), rel=1e-3)


def test_a_scale_serves_a_whole_batch_and_no_other(imported):
    """What a block is run with again in the backward pass is what it was run with."""
    checkpoint, _ = open_model(imported["llama_tied"])
    measure = QuantizationMeasure(checkpoint, training())
    x = torch.randn(2, 6, 96, generator=GENERATOR)
    first, _ = measure.see(0, "mlp_hidden", x)
    scale = measure.quantizers._fixed[0, "mlp_hidden"][1].clone()
    measure.see(1, "mlp_hidden", x * 2)
    measure.see(0, "mlp_hidden", x * 5)
    assert torch.equal(measure.quantizers._fixed[0, "mlp_hidden"][1], scale)
    assert torch.equal(measure.see(0, "mlp_hidden", x)[0], first)
    measure.begin_batch()
    measure.see(0, "mlp_hidden", x * 5)
    assert torch.allclose(measure.quantizers._fixed[0, "mlp_hidden"][1], scale * 5)


def test_only_values_beyond_the_range_get_a_gradient_from_quantization(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    x = torch.randn(1, 200, 8, generator=GENERATOR)
    x[0, 0, 0] = 20.0
    x.requires_grad_()
    measure = QuantizationMeasure(checkpoint, training(bits=4, weights={"quantization": 1.0}))
    _, varying, quantized = measure.quantizers.quantize(x)
    (quantized - varying).square().sum().backward()
    moved = x.grad.abs() > 1e-5 * x.grad.abs().max()
    assert moved[0, 0, 0]
    assert x.grad[0, 0, 0] > 0  # smaller is better
    assert moved.float().mean() < 0.2


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2", "var"])
def test_losses_look_behind_the_prefix_only_and_equal_the_models_own_activations(loss_type, imported, windows):
    """Terms measured through the walk are those of transformers' forward over prefix and tokens."""
    checkpoint, runner, prefix, params = setup(imported, loss_type=loss_type, target_layers=[1], simulate=False)
    model = FrozenModel(checkpoint, runner, params)
    found = model.losses(prefix, windows[0], None)
    original = make_model("llama_tied")
    seen = {}
    layer = original.model.layers[1]
    split = lambda keys: keys.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.__setitem__("mlp_hidden", a[0][:, 2:]))
    layer.self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.__setitem__("o_proj", o[:, 2:]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.__setitem__("attention_output", a[0][:, 2:]))
    layer.input_layernorm.register_forward_hook(lambda m, a, o: seen.__setitem__("attention_input", o[:, 2:]))
    layer.post_attention_layernorm.register_forward_hook(lambda m, a, o: seen.__setitem__("mlp_input", o[:, 2:]))
    layer.self_attn.k_proj.register_forward_hook(lambda m, a, o: seen.__setitem__("key", split(o[:, 2:])))
    embedded = torch.cat((prefix.expand(4, -1, -1), original.model.embed_tokens(windows[0])), dim=1)
    with torch.no_grad():
        cache = original(inputs_embeds=embedded, use_cache=True).past_key_values
    seen["value"] = cache.layers[1].values[:, :, 2:]
    model.measure.begin_batch()
    terms = torch.stack([model.measure.see(1, site, seen[site])[1] for site in model.measure.sites]).mean(0)
    for name, value in zip(model.measure.names, terms, strict=True):
        assert found[name].item() == pytest.approx(value.item(), rel=1e-3), name


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "llama_odd_sizes", "gemma2", "olmo2"])
@torch.no_grad()
def test_simulated_quantizers_of_many_bits_change_nothing(family, imported, windows):
    """Rotated and back at every site: 8 bits leave 1e-3 of the divergence that 3 bits cause."""
    checkpoint, runner, prefix, _ = setup(imported, family)
    reference, prefix_kv = checkpoint.embed(windows[0]), compute_prefix_kv(checkpoint, prefix, runner)
    for index in range(checkpoint.block_count):
        runner.advance_(load_block(checkpoint, index), reference, prefix_kv[index])
    found = {}
    for bits in (3, 8):
        model = FrozenModel(checkpoint, runner, training(bits=bits, simulate=True, weights={"kl": 1.0}))
        found[bits] = model.losses(prefix, windows[0], reference)["kl"]
    assert found[3] > 0.01
    assert 0 < found[8] < 0.005 * found[3]


def test_with_the_seed_of_rotation_the_simulated_r1_is_the_one_the_model_gets(imported, tmp_path):
    checkpoint, _ = open_model(imported["llama_tied"])
    for seed in (0, 5):
        rotated, _, _ = rotate(imported["llama_tied"], tmp_path / str(seed), seed=seed)
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        measure = QuantizationMeasure(checkpoint, training(seed=seed))
        expected = load_rotation(rotated.folder, "r1").apply(x)
        assert torch.allclose(hadamard_transform(x * measure.quantizers.signs), expected)


@torch.no_grad()
def test_simulation_replaces_what_goes_on_behind_the_prefix_only(imported, windows):
    checkpoint, runner, prefix, params = setup(imported, simulate=True, bits=2, target_layers=[0])
    model = FrozenModel(checkpoint, runner, params)
    inputs = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.losses(prefix, windows[0], None)
    model.run_original(windows[0])
    plain = FrozenModel(checkpoint, runner, training(simulate=False, target_layers=[0]))
    plain.blocks[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    plain.losses(prefix, windows[0], None)
    assert torch.equal(inputs[0][:, :2], inputs[-1][:, :2])
    assert not torch.allclose(inputs[0][:, 2:], inputs[-1][:, 2:], rtol=0.01)


def test_kl_is_the_divergence_from_the_original_without_a_prefix(imported, windows):
    checkpoint, runner, prefix, params = setup(imported, weights={"kl": 1.0}, simulate=False)
    model = FrozenModel(checkpoint, runner, params)
    found = model.losses(prefix, windows[0], model.run_original(windows[0]))["kl"]
    original = make_model("llama_tied")
    with torch.no_grad():
        reference = original(windows[0]).logits.log_softmax(-1)
        embedded = torch.cat((prefix.expand(4, -1, -1), original.model.embed_tokens(windows[0])), dim=1)
        ours = original(inputs_embeds=embedded).logits[:, 2:].log_softmax(-1)
    assert found.item() == pytest.approx((reference.exp() * (reference - ours)).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("behind", [None, 0])
def test_kl_compares_content_with_the_original_reading_a_start_token(behind, imported, windows):
    """A prefix that is the start token computes the same; with a second one behind it, it does not."""
    checkpoint, runner, prefix, params = setup(imported, count=1, weights={"kl": 1.0}, simulate=False)
    model = FrozenModel(checkpoint, runner, params)
    reference = model.run_original(windows[0], start_token=0)
    assert reference.shape == (4, 12, 48)
    found = model.losses(prefix, prepend_start_token(windows[0], behind), reference)["kl"].item()
    original = make_model("llama_tied")
    with torch.no_grad():
        p = original(prepend_start_token(windows[0], 0)).logits[:, 1:].log_softmax(-1)
        doubled = prepend_start_token(prepend_start_token(windows[0], 0), behind)
        q = original(doubled).logits[:, -12:].log_softmax(-1)
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    assert (found > 1e-3) == (behind == 0)


@pytest.mark.parametrize("family", SLIDING)
def test_the_trainable_prefix_slides_out_of_sight_where_blocks_slide(family, imported):
    checkpoint, runner, prefix, params = setup(imported, family, weights={"kl": 1.0}, simulate=False)
    windows = torch.randint(0, 320, (2, 2 * WINDOW), generator=torch.Generator().manual_seed(1))
    model = FrozenModel(checkpoint, runner, params)
    found = model.losses(prefix, windows, model.run_original(windows))["kl"]
    original, embedded = make_model(family), checkpoint.embed(windows)
    whole = torch.cat((prefix.expand(2, -1, -1), embedded), dim=1)
    with torch.no_grad():
        reference = original(windows).logits.log_softmax(-1)
        ours = original(inputs_embeds=whole).logits[:, 2:].log_softmax(-1)
    assert found.item() == pytest.approx((reference.exp() * (reference - ours)).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2", "var"])
def test_terms_that_do_not_count_are_measured_all_the_same_and_nothing_is_kept_for_them(loss_type, imported, windows):
    checkpoint, runner, prefix, params = setup(imported, loss_type=loss_type)
    names = FrozenModel(checkpoint, runner, params).measure.names
    found = []
    for weight in (1.0, 0.0):
        params = training(loss_type=loss_type, weights=dict.fromkeys(names, weight))
        model = FrozenModel(checkpoint, runner, params)
        original = model.run_original(windows[0])
        found.append(model.losses(prefix.clone().requires_grad_(), windows[0], original))
    counted, reported = found
    assert all(reported[name].item() == counted[name].item() > 0 for name in names)
    assert all(counted[name].requires_grad and not reported[name].requires_grad for name in names)
    assert reported["kl"].requires_grad


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2", "var"])
def test_gradients_reach_nothing_but_the_embeddings_and_all_of_them(loss_type, imported, windows):
    checkpoint, runner, prefix, params = setup(imported, loss_type=loss_type, weights={"kl": 0.5})
    model = FrozenModel(checkpoint, runner, params)
    prefix = torch.nn.Parameter(prefix)
    model.weigh(model.losses(prefix, windows[0], model.run_original(windows[0]))).backward()
    assert (prefix.grad.abs().sum(-1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for block in model.blocks for p in block.parameters())


def run(imported, windows, work, keeping=HIDDEN_STATES, **changes):
    checkpoint, runner, prefix, params = setup(imported, **changes)
    return train_prefix(
        checkpoint, prefix, *windows, params, Place(runner, Offload(None), work, HEADER, keeping=keeping)
    ), prefix


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


def test_the_best_epoch_is_restored_after_a_late_divergence(imported, windows, tmp_path, monkeypatch):
    """One good epoch, then a learning rate that ruins everything: what is kept is the state after the good one."""
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


def test_nan_stops_with_the_best_state_and_says_so(imported, windows, tmp_path, monkeypatch, caplog):
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


def test_a_nan_in_validation_stops_with_the_best_state(imported, windows, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_a_killed_training_continues_with_the_same_bytes(killed_in, imported, windows, tmp_path, monkeypatch):
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
    resumed, _ = run(imported, windows, tmp_path / "b")
    assert torch.equal(resumed.embeddings, undisturbed.embeddings)
    assert [row["validation"] for row in resumed.history] == [row["validation"] for row in undisturbed.history]


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2"])
def test_kept_recomputed_and_streamed_blocks_train_the_same_prefix(loss_type, imported, windows, tmp_path):
    easy = {"weights": {"kl": float(loss_type == "quantization")}, "learning_rate": 0.003, "loss_type": loss_type}
    same = windows[0], windows[0]
    kept, again, streamed = (
        run(imported, same, tmp_path / str(number), keeping, **easy)[0]
        for number, keeping in enumerate((Keeping(recompute=False), HIDDEN_STATES, Keeping(stream=True)))
    )
    assert kept.best_epoch > 0
    for other in (again, streamed):
        assert torch.equal(kept.embeddings, other.embeddings)
        assert kept.history == other.history


def test_an_unfinished_run_of_other_settings_is_not_continued(imported, windows, tmp_path, caplog):
    run(imported, windows, tmp_path)
    checkpoint, runner, prefix, params = setup(imported, epochs=1)
    other = make_header("prefix_training", {"test": 2})
    trained = train_prefix(checkpoint, prefix, *windows, params, Place(runner, Offload(None), tmp_path, other))
    assert trained.epochs == 1
    assert "had other settings or inputs" in caplog.text


def test_learning_rate_falls_along_a_cosine():
    assert [round(cosine(step, 4), 4) for step in range(5)] == [1.0, 0.8536, 0.5, 0.1464, 0.0]


# --- What comes of it ------------------------------------------------------------------------------------------------


def test_rows_are_cut_and_repeated_so_that_the_last_stays_last():
    rows = torch.tensor([1, 2, 3])
    assert resize_rows(rows, 2).tolist() == [2, 3]
    assert resize_rows(rows, 5).tolist() == [2, 3, 1, 2, 3]
    assert resize_rows(rows, None).tolist() == [1, 2, 3]
    assert resize_rows(rows[:0], 4).tolist() == []


def test_without_a_found_prefix_rows_are_drawn_at_the_tables_scale():
    table = torch.randn(500, 16, generator=GENERATOR) * 0.03
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
def test_a_continuous_prefix_gives_the_same_logits_in_the_rotated_model(imported, windows, tmp_path):
    """Embeddings in the original basis times R1, and KV as transformers computes it from inputs_embeds."""
    checkpoint, runner = open_model(imported["llama_tied"])
    prefix = torch.randn(3, 48, generator=GENERATOR)
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
    found = walked_logits(rotated, rotated_runner, windows[0], rotated_kv)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_disabled_training_passes_the_found_prefix_on(imported, windows, tmp_path):
    checkpoint, runner, _, _ = setup(imported)
    for ids in (torch.tensor([7, 0]), torch.zeros(0, dtype=torch.int64)):
        found = {"token_ids": ids, "embeddings": checkpoint.embed(ids)}
        params = training(enabled=False)
        candidates = make_candidates(
            checkpoint, found, *windows, params, Place(runner, Offload(None), tmp_path, HEADER)
        )
        assert candidates.tensors.keys() == {"found.token_ids", "found.embeddings"}
        assert torch.equal(candidates.tensors["found.embeddings"], found["embeddings"])
        assert candidates.summary() == {"enabled": False, "prefix_tokens": len(ids)}


@pytest.mark.parametrize(("found", "expected"), [([7, 0], [0, None]), ([], [0, 0])])
def test_windows_behind_the_trained_prefix_have_a_start_token_where_it_was_not_begun_from_one(
    found, expected, imported, windows, tmp_path, monkeypatch
):
    checkpoint, runner, _, params = setup(imported, length=3, epochs=1)
    starts, read = [], []
    train, measure = prefix_training.train_prefix, prefix_training.measure_outliers
    monkeypatch.setattr(prefix_training, "train_prefix", lambda *a: (starts.extend(a[-2:]), train(*a))[1])
    monkeypatch.setattr(prefix_training, "measure_outliers", lambda *a: (read.append(a[1]), measure(*a))[1])
    ids = torch.tensor(found, dtype=torch.int64)
    place = Place(runner, Offload(None), tmp_path, HEADER)
    tensors = {"token_ids": ids, "embeddings": checkpoint.embed(ids)}
    candidates = make_candidates(checkpoint, tensors, *windows, params, place, 0)
    assert starts == expected
    none, own, trained, discretised = (len(ids[0]) - 12 for ids in read)
    assert (none, own, trained) == (1, int(not found), int(not found))
    assert discretised == (candidates.tensors["discretised.token_ids"][-1].item() != 0)


def test_candidates_and_their_report(imported, windows, tmp_path):
    checkpoint, runner, _, params = setup(imported, length=3, epochs=1)
    ids = torch.tensor([7, 0])
    found = {"token_ids": ids, "embeddings": checkpoint.embed(ids)}
    candidates = make_candidates(checkpoint, found, *windows, params, Place(runner, Offload(None), tmp_path, HEADER))
    tensors = candidates.tensors
    assert tensors["trained.embeddings"].shape == (3, 48)
    assert tensors["trained.initial_token_ids"].tolist() == [0, 7, 0]
    assert torch.equal(tensors["discretised.embeddings"], checkpoint.embed(tensors["discretised.token_ids"]))
    assert tensors["discretised.token_ids"].tolist() == [0, 7, 0]  # one epoch moves them little
    assert candidates.report["outliers"].keys() == {"none", "found", "trained", "discretised"}
    assert all(len(layers) == 3 for layers in candidates.report["outliers"].values())
    summary = candidates.summary()
    assert summary["validation_loss"]["after"] <= summary["validation_loss"]["before"]
    empty = {"token_ids": ids[:0], "embeddings": checkpoint.embed(ids[:0])}
    with pytest.raises(prefix_training.PrefixTrainingError, match=r"set prefix_training\.length"):
        make_candidates(
            checkpoint, empty, *windows, training(length=None), Place(runner, Offload(None), tmp_path / "b", HEADER)
        )
