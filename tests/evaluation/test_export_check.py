"""The export must compute the fine-tuned model."""

import pytest
import torch

from pipeline.evaluation.export_check import AMPLIFIED, ExportDifferenceError, check_export
from pipeline.runtime.artifacts import ArtifactError, make_header, save_tensors

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CHECKPOINT = make_header("finetuning", {"seed": 0})
EXPORT = make_header("export", {}, {"finetuning": CHECKPOINT})


def save_evaluation(folder, dtype=torch.float32, checkpoint=CHECKPOINT):
    """Return the tensors of an evaluation, and the artifact that has them."""
    torch.manual_seed(0)
    tensors = {
        "hidden.prose": torch.randn(3, 16, 8).to(dtype),
        "token_ids.prose": torch.randint(0, 50, (3, 16)),
        "loss.prose": torch.rand(3, dtype=torch.float64),
    }
    path = folder / "finetuning.safetensors"
    save_tensors(path, tensors, make_header("evaluation", {"variant": "finetuning"}, {"checkpoint": checkpoint}))
    return tensors, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_allowed_and_a_perturbed_export_is_not(dtype, tmp_path):
    tensors, path = save_evaluation(tmp_path, dtype)
    assert check_export(tensors, path, EXPORT, CPU) == 0
    hidden = tensors["hidden.prose"]
    ulp = hidden.float() * (1 + torch.finfo(dtype).eps * torch.randn(hidden.shape))
    difference = check_export(tensors | {"hidden.prose": ulp.to(dtype)}, path, EXPORT, CPU)
    assert 0 < difference < 4 * torch.finfo(dtype).eps
    perturbed = hidden.clone()
    perturbed[1] *= 1.1
    name = str(dtype).removeprefix("torch.")
    message = rf"^evaluation@export, {name}: .* window 1 of prose .* by 0\.1 of their norm; at most .* rerun export"
    with pytest.raises(ExportDifferenceError, match=message):
        check_export(tensors | {"hidden.prose": perturbed}, path, EXPORT, CPU)


def test_gpus_may_amplify_rounding_and_no_more(tmp_path, caplog):
    tensors, path = save_evaluation(tmp_path)
    near, far = tensors["hidden.prose"] * 1.2, tensors["hidden.prose"] * (1.1 + AMPLIFIED)
    assert check_export(tensors | {"hidden.prose": near}, path, EXPORT, GPU) == pytest.approx(0.2)
    assert "differs from evaluation@finetuning by 0.2 of the norm" in caplog.text
    for hidden in (far, far * torch.nan):
        with pytest.raises(ExportDifferenceError, match=r"window 0 of prose"):
            check_export(tensors | {"hidden.prose": hidden}, path, EXPORT, GPU)


def test_an_evaluation_of_something_else_is_refused(tmp_path):
    tensors, path = save_evaluation(tmp_path)
    with pytest.raises(ArtifactError, match="other windows of prose"):
        check_export(tensors | {"token_ids.prose": tensors["token_ids.prose"].flip(0)}, path, EXPORT, CPU)
    _, path = save_evaluation(tmp_path, checkpoint=make_header("finetuning", {"seed": 1}))
    with pytest.raises(ArtifactError, match=r"of another fine-tuned model.* Rerun: .*evaluation@finetuning"):
        check_export(tensors, path, EXPORT, CPU)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        check_export(tensors, path, EXPORT, CPU)
