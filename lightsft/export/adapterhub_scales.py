"""AdapterHub's (IA)^3: y = l (W x + b), a LoRA that is composed by "scale" and has no A.

l (out) is `alpha lora_B`. It is kept as PEFT's, which serves any layer: lightsft's own has the paper's places, where
AdapterHub's does not scale what enters the end of a feed-forward, but what leaves its beginning, before the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightsft import registry
from lightsft.anatomy import linear_shape
from lightsft.backbone import Backbone
from lightsft.export.adapterhub_folder import AdapterHubFolder
from lightsft.export.adapterhub_options import lora_options
from lightsft.export.adapterhub_places import own_name
from lightsft.injection import Injection, Strategy


class Scales:
    """y = l (W x + b). Of a fused layer for queries, keys and values, l has the thirds that are served."""

    def __init__(self, folder: AdapterHubFolder) -> None:
        self.folder, self.options = folder, lora_options(folder)

    def strategy(self, backbone: Backbone) -> Strategy:
        """`peft/ia3` on exactly the layers that carry a vector, on their outputs."""
        return registry.strategy(
            "peft/ia3", target_modules=tuple(sorted(self._vectors(backbone))), feedforward_modules=()
        )

    def tensors(self, injection: Injection) -> dict[str, Tensor]:
        """L (out, 1) of every layer."""
        vectors, model = self._vectors(injection.backbone), injection.backbone.model
        return {
            f"{module}.ia3_l": self.options["alpha"] * self._whole(vector, _outputs(model.get_submodule(module)))
            for module, vector in vectors.items()
        }

    def _vectors(self, backbone: Backbone) -> dict[str, Tensor]:
        """By the backbone's name of the module, (n, 1)."""
        found = {}
        for place, part, tensor in self.folder.parts("loras"):
            if part != "lora_B" or tensor.ndim != 2 or tensor.shape[1] != 1:
                raise self.folder.wrong(f"holds {place}.{part} of {tuple(tensor.shape)}", expected="lora_B of (n, 1)")
            found[own_name(self.folder, backbone, place)] = tensor
        return found

    def _whole(self, vector: Tensor, outputs: int) -> Tensor:
        """With 1 for those of q, k, v that are not served."""
        if len(vector) == outputs:
            return vector
        served = [index for index, name in enumerate("qkv") if name in self.options["attn_matrices"]]
        if not served or 3 * len(vector) != outputs * len(served):
            raise self.folder.wrong(
                f"holds {len(vector)} factors for {outputs} features",
                expected=f"those of attn_matrices={self.options['attn_matrices']}",
            )
        thirds = list(torch.ones(outputs, 1).chunk(3))
        for index, block in zip(served, vector.chunk(len(served)), strict=True):
            thirds[index] = block
        return torch.cat(thirds)


def _outputs(module: torch.nn.Module) -> int:
    """Features of the layer's output; PEFT's layer holds the one that it serves."""
    return linear_shape(getattr(module, "base_layer", module))[0]
