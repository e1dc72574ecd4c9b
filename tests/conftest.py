import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of transformers: no test may look for a network

import pytest
import torch

from tests.tiny_models import NAMES, tiny


def pytest_configure(config):
    """Warnings are errors here, but for those that other libraries raise at each other."""
    # transformers 5.23 renamed these; PEFT 0.21 uses the old names, and so do we, since all of 5.x knows them.
    old = "(`is_gradient_checkpointing`|`gradient_checkpointing_enable`|`gradient_checkpointing_disable`)"
    config.addinivalue_line("filterwarnings", f"ignore:{old} is deprecated:FutureWarning")
    torch.set_num_threads(1)  # tiny models are fastest in one thread


@pytest.fixture(params=NAMES)
def name(request):
    """Each tiny model's name in turn."""
    return request.param


@pytest.fixture
def model(name):
    """Each tiny model in turn, fresh and in eval mode."""
    return tiny(name)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
