"""What PEFT's casts to fp32 change: python benchmarks/upcasts.py

`prepare_model_for_kbit_training` casts what is not quantized (embeddings, norms, head) to fp32; here it stays in the
backbone's type. SmolLM2-135M, nf4 computing in bf16, the same LoRA (rank 8, random A and B, from one folder) on the
same small talk: losses, gradients and bytes of weights of both, and of the dequantized model in fp32 as the reference.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from quantization import data, plain_checkpoint

ROWS = 32
Found = tuple[float, dict[str, torch.Tensor], int]


def main() -> None:
    import peft

    with tempfile.TemporaryDirectory() as place:
        checkpoint = plain_checkpoint("chat", Path(place) / "base")
        adapter = Path(place) / "adapter"
        random_adapter(checkpoint, adapter)
        reference, ours, theirs = (make(checkpoint, adapter) for make in (dequantized, here, there))
    print(f"torch {torch.__version__}, peft {peft.__version__}, {ROWS} rows")
    print("| | loss | off the reference | gradients: cosine with the reference | relative error | weights |")
    print("|---|---|---|---|---|---|")
    for name, found in (("fp32, dequantized", reference), ("lightsft", ours), ("PEFT, cast to fp32", theirs)):
        print(row(name, found, reference))
    apart = abs(ours[0] - theirs[0])
    print(f"lightsft and PEFT: losses {apart:.1e} apart, gradients' cosine {cosine(ours, theirs):.6f}")


def row(name: str, found: Found, reference: Found) -> str:
    loss, _, size = found
    cells = [f"{loss:.5f}", f"{loss - reference[0]:+.1e}", f"{cosine(found, reference):.6f}"]
    return "| " + " | ".join([name, *cells, f"{error(found, reference):.4f}", f"{size / 1e6:.0f} MB"]) + " |"


def flat(found: Found) -> torch.Tensor:
    return torch.cat([found[1][name].flatten().double() for name in sorted(found[1])])


def cosine(one: Found, other: Found) -> float:
    return float(torch.nn.functional.cosine_similarity(flat(one), flat(other), dim=0))


def error(one: Found, other: Found) -> float:
    return float((flat(one) - flat(other)).norm() / flat(other).norm())


def random_adapter(checkpoint: str, folder: Path) -> None:
    """A PEFT folder with a LoRA on every linear layer of the blocks."""
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    wrapped.save_pretrained(folder)


def settings() -> Any:
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def there(checkpoint: str, adapter: Path) -> Found:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=settings()
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return step(peft.PeftModel.from_pretrained(model, adapter, is_trainable=True), checkpoint)


def here(checkpoint: str, adapter: Path) -> Found:
    import lightsft
    from lightsft import Backbone

    backbone = Backbone.load(checkpoint, task="chat", dtype="bfloat16", quantization="nf4")
    injection = lightsft.load(adapter, backbone, other_quantization=True)
    for parameter in injection.parameters():
        parameter.requires_grad_(True)
    return step(backbone.model, checkpoint)


def dequantized(checkpoint: str, adapter: Path) -> Found:
    import peft

    from lightsft import Backbone
    from lightsft.plain_layers import forget_quantization, unquantize
    from lightsft.quantization import quantized_layers

    model = Backbone.load(checkpoint, task="chat", dtype="bfloat16", quantization="nf4").model
    for layer in quantized_layers(model).values():
        unquantize(layer)
    forget_quantization(model)
    model = model.float()
    return step(peft.PeftModel.from_pretrained(model, adapter, is_trainable=True), checkpoint)


def step(model: Any, checkpoint: str) -> Found:
    """(loss, gradients of A and B by place, bytes of all weights) in training mode."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    task, rows, _ = data("chat")
    model.train()
    features = task.encode(rows[:ROWS], tokenizer)
    count = sum(label != -100 for one in features for label in one["labels"])
    total = 0.0
    for start in range(0, ROWS, 8):
        batch = task.collate(features[start : start + 8], tokenizer)
        labels = batch.pop("labels")
        loss = task.loss(model(**batch), labels, count)
        loss.backward()
        total += loss.item()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in trained)
    found = total, {place(name): gradient.float() for name, gradient in trained.items()}, size
    del model
    gc.collect()
    return found


def place(name: str) -> str:
    """`model.layers.0.mlp.up_proj A` of both libraries' names."""
    module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
    if not matrix:
        module, _, matrix = name.rpartition(".")
        return f"{module.partition('.lightsft')[0]} {matrix[-1].upper()}"
    return f"{module} {matrix[0]}"


if __name__ == "__main__":
    main()
