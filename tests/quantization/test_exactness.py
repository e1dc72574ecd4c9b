"""One function in training and in evaluation, and no casts that it would need."""

import copy

import peft
import pytest
import torch

from lightsft import Backbone
from lightsft.quantization import plain_copy, quantized_layers
from lightsft_adapters import LoRA
from tests.quantization.conftest import WAYS, batch, logits, quantized
from tests.tiny_models import randomise

