"""What PEFT's tuners that move their ranks do between the steps of a training.

In a file of its own, since transformers' callbacks take seconds to import, and only a training needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from lightsft.errors import ConfigurationError
from lightsft_adapters.peft_tuner import ADAPTER, UNKNOWN_STEPS, PlacedTuner


class AllocatesRanks(TrainerCallback):  # type: ignore[misc]
    """What AdaLoRA (2303.10512) and AdaMSS do in a training loop, beside their layers.

    Before each step of the optimizer the gradient of orth_reg_weight * mean(||A A^T - I||, ||B^T B - I||) is added
    (section 3.1), after it the tuner moves its budget to the ranks that matter (section 3.2). A training that is
    continued from a checkpoint estimates anew which ranks matter.
    """

    def __init__(self, placed: PlacedTuner) -> None:
        self.placed = placed

    @property
    def config(self) -> Any:
        """The tuner's live configuration."""
        return self.placed.tuner.peft_config[ADAPTER]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The budget's schedule ends with the training, unless the user said otherwise."""
        if getattr(self.config, "total_step", None) == UNKNOWN_STEPS:
            steps = self.config.total_step = self.placed.config.total_step = state.max_steps
            if self.config.tinit + self.config.tfinal >= steps:
                raise ConfigurationError(
                    f"tinit={self.config.tinit} and tfinal={self.config.tfinal} in a training of {steps} steps",
                    expected="steps between them, in which ranks are allocated",
                    todo="lower them, or train longer",
                )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient to the gradients."""
        weight = getattr(self.config, "orth_reg_weight", 0.0)
        factors = [(name, p) for name, p in self.placed.trainable().items() if p.ndim == 2 and p.grad is not None]
        rows = [p if name.endswith("lora_A") else p.T for name, p in factors if name.endswith(("lora_A", "lora_B"))]
        if weight and rows:
            distances = [torch.linalg.norm(r @ r.T - torch.eye(len(r), device=r.device)) for r in rows]
            (weight * torch.stack(distances).mean()).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Allocate the ranks; called while the gradients are still there."""
        self.placed.tuner.update_and_allocate(state.global_step)
