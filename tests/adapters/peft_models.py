"""The same LoRA in PEFT: configuration, tensors, gradients."""

import copy

import torch
from peft import LoraConfig, TaskType, get_peft_model, set_peft_model_state_dict

from lightsft.adapter_files import KEY_PREFIX

TASK_TYPES = {"bert": TaskType.SEQ_CLS, "llama": TaskType.CAUSAL_LM, "gpt2": TaskType.CAUSAL_LM}


def in_peft(injection, name, plain, **options):
    """A PEFT model on a copy of the `plain` model with the tensors of `injection`; `options` go to LoraConfig."""
    config = LoraConfig(
        task_type=TASK_TYPES[name],
        target_modules=[primitive.name for primitive in sides(injection)],
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    peft = get_peft_model(copy.deepcopy(plain), config).eval()
    bare = {KEY_PREFIX + key: parameter.detach() for key, parameter in injection.named_parameters().items()}
    result = set_peft_model_state_dict(peft, bare)
    assert not result.unexpected_keys
    return peft


def sides(injection):
    return [primitive for primitive in injection.primitives if hasattr(primitive, "served")]


def parameters_of(peft, injection):
    """PEFT's parameters under lightsft's names, for the tensors that `injection` trains."""
    renamed = {}
    for key, parameter in peft.named_parameters():
        if parameter.requires_grad:
            key = key.removeprefix(KEY_PREFIX).replace(".modules_to_save.default", "").replace(".default", "")
            renamed[key.replace("magnitude_vector.weight", "magnitude_vector")] = parameter
    assert set(renamed) == set(injection.named_parameters())
    return {key: renamed[key] for key in injection.named_parameters()}


def merged_state(peft):
    with torch.no_grad():
        return peft.merge_and_unload().state_dict()
