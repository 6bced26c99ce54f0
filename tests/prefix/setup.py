"""A tiny model with a found prefix, and params of a short prefix training."""

import pytest
import torch
import yaml

from pipeline.prefix.params import PrefixSearchParams, PrefixTrainingParams
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.streams import Offload
from pipeline.training.place import Place
from tests.conftest import ROOT, open_model

HEADER = make_header("prefix_training", {"test": 1})


def training(**changes):
    """Return the params of an enabled training of three epochs, with changes."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["prefix_training"]
    values |= {"enabled": True, "epochs": 3, "batch_size": 2, "learning_rate": 0.01}
    weights = changes.pop("weights", {})
    return PrefixTrainingParams.model_validate(values | changes | {"weights": values["weights"] | weights})


@pytest.fixture
def windows():
    """Four windows to train on and two to validate on."""
    token_ids = torch.randint(0, 320, (6, 12), generator=torch.Generator().manual_seed(1))
    return token_ids[:4], token_ids[4:]


def searching(**changes):
    """Return the params of a search by the paper's rule, with changes."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["prefix_search"]
    return PrefixSearchParams.model_validate(values | {"choose": "threshold"} | changes)


def make_place(runner, work_folder, **changes):
    """Return a place with hidden states in memory."""
    values = {"runner": runner, "offload": Offload(None), "work_folder": work_folder, "header": HEADER}
    return Place(**values | changes)


def setup(imported, family="llama_tied", count=2, **changes):
    """Return a model, its runner, the embeddings of a prefix of `count` tokens, and training params with changes."""
    checkpoint, runner = open_model(imported[family])
    prefix = checkpoint.embed(torch.tensor([7, 0][-count:]))
    return checkpoint, runner, prefix, training(**changes)
