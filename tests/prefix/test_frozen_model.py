"""The frozen model with a prefix: its terms and its divergence equal transformers' own forward."""

import pytest
import torch

from benchmarks.tiny_models import MOE_FAMILIES
from pipeline.models.architectures import UnsupportedModelError
from pipeline.prefix.frozen_model import FrozenModel
from pipeline.text.windows import prepend_start_token
from tests.conftest import SLIDING, WINDOW, make_model
from tests.prefix.setup import setup, training


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2", "var"])
def test_terms_are_computed_from_the_models_own_activations_after_the_prefix(loss_type, imported, windows):
    """The activations are recorded in transformers' own forward over prefix and tokens."""
    checkpoint, runner, prefix, params = setup(imported, loss_type=loss_type, target_layers=[1], simulate=False)
    model = FrozenModel(checkpoint, runner, params)
    losses = model.losses(prefix, windows[0], None)
    original = make_model("llama_tied")
    recorded = {}
    layer = original.model.layers[1]
    split = lambda keys: keys.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: recorded.__setitem__("mlp_hidden", a[0][:, 2:]))
    layer.self_attn.o_proj.register_forward_hook(lambda m, a, o: recorded.__setitem__("o_proj", o[:, 2:]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: recorded.__setitem__("attention_output", a[0][:, 2:]))
    layer.input_layernorm.register_forward_hook(lambda m, a, o: recorded.__setitem__("attention_input", o[:, 2:]))
    layer.post_attention_layernorm.register_forward_hook(lambda m, a, o: recorded.__setitem__("mlp_input", o[:, 2:]))
    layer.self_attn.k_proj.register_forward_hook(lambda m, a, o: recorded.__setitem__("key", split(o[:, 2:])))
    embedded = torch.cat((prefix.expand(4, -1, -1), original.model.embed_tokens(windows[0])), dim=1)
    with torch.no_grad():
        cache = original(inputs_embeds=embedded, use_cache=True).past_key_values
    recorded["value"] = cache.layers[1].values[:, :, 2:]
    model.measure.begin_batch()
    terms = torch.stack([model.measure.measure(1, site, recorded[site])[1] for site in model.measure.sites]).mean(0)
    for name, value in zip(model.measure.names, terms, strict=True):
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-3), name


@torch.no_grad()
def test_simulation_replaces_values_after_the_prefix_only(imported, windows):
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
    kl = model.losses(prefix, windows[0], model.run_original(windows[0]))["kl"]
    original = make_model("llama_tied")
    with torch.no_grad():
        reference = original(windows[0]).logits.log_softmax(-1)
        embedded = torch.cat((prefix.expand(4, -1, -1), original.model.embed_tokens(windows[0])), dim=1)
        prefixed = original(inputs_embeds=embedded).logits[:, 2:].log_softmax(-1)
    assert kl.item() == pytest.approx((reference.exp() * (reference - prefixed)).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("text_start_token_id", [None, 0])
def test_kl_compares_content_with_the_original_reading_a_start_token(text_start_token_id, imported, windows):
    """The start token as prefix computes the same as before the text; a second one after it does not."""
    checkpoint, runner, prefix, params = setup(imported, count=1, weights={"kl": 1.0}, simulate=False)
    model = FrozenModel(checkpoint, runner, params)
    reference = model.run_original(windows[0], text_start_token_id=0)
    assert reference.shape == (4, 12, 48)
    kl = model.losses(prefix, prepend_start_token(windows[0], text_start_token_id), reference)["kl"].item()
    original = make_model("llama_tied")
    with torch.no_grad():
        p = original(prepend_start_token(windows[0], 0)).logits[:, 1:].log_softmax(-1)
        doubled = prepend_start_token(prepend_start_token(windows[0], 0), text_start_token_id)
        q = original(doubled).logits[:, -12:].log_softmax(-1)
    assert kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    assert (kl > 1e-3) == (text_start_token_id == 0)


@pytest.mark.parametrize("family", [family for family in SLIDING if family not in MOE_FAMILIES])
def test_prefix_slides_out_of_the_window_where_blocks_slide(family, imported):
    checkpoint, runner, prefix, params = setup(imported, family, weights={"kl": 1.0}, simulate=False)
    windows = torch.randint(0, 320, (2, 2 * WINDOW), generator=torch.Generator().manual_seed(1))
    model = FrozenModel(checkpoint, runner, params)
    kl = model.losses(prefix, windows, model.run_original(windows))["kl"]
    original, embedded = make_model(family), checkpoint.embed(windows)
    whole = torch.cat((prefix.expand(2, -1, -1), embedded), dim=1)
    with torch.no_grad():
        reference = original(windows).logits.log_softmax(-1)
        prefixed = original(inputs_embeds=whole).logits[:, 2:].log_softmax(-1)
    assert kl.item() == pytest.approx((reference.exp() * (reference - prefixed)).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2", "var"])
def test_terms_without_weight_are_measured_without_gradients(loss_type, imported, windows):
    checkpoint, runner, prefix, params = setup(imported, loss_type=loss_type)
    names = FrozenModel(checkpoint, runner, params).measure.names
    losses = []
    for weight in (1.0, 0.0):
        params = training(loss_type=loss_type, weights=dict.fromkeys(names, weight))
        model = FrozenModel(checkpoint, runner, params)
        reference = model.run_original(windows[0])
        losses.append(model.losses(prefix.clone().requires_grad_(), windows[0], reference))
    counted, reported = losses
    assert all(reported[name].item() == counted[name].item() > 0 for name in names)
    assert all(counted[name].requires_grad and not reported[name].requires_grad for name in names)
    assert reported["kl"].requires_grad


@pytest.mark.parametrize("loss_type", ["quantization", "outlier", "l2", "var"])
def test_gradients_reach_all_embeddings_and_nothing_else(loss_type, imported, windows):
    checkpoint, runner, prefix, params = setup(imported, loss_type=loss_type, weights={"kl": 0.5})
    model = FrozenModel(checkpoint, runner, params)
    prefix = torch.nn.Parameter(prefix)
    model.weigh(model.losses(prefix, windows[0], model.run_original(windows[0]))).backward()
    assert (prefix.grad.abs().sum(-1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for block in model.blocks for p in block.parameters())


def test_a_model_with_experts_is_refused_by_name(imported):
    checkpoint, runner, _, params = setup(imported, "mixtral")
    with pytest.raises(UnsupportedModelError, match=r"prefix_training\.enabled=true: model_type='mixtral' has experts"):
        FrozenModel(checkpoint, runner, params)
