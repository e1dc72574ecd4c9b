"""What is seen of a model without asking lightsft: attention, experts, the weights a loss reaches, what hangs on it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.zoo.models_and_inputs import forward, loss_of

aten = torch.ops.aten
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
_PRODUCTS = {aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default}


class _AttentionWatch(TorchDispatchMode):
    """Notes a fused attention, or a softmax whose result multiplies another activation as a matrix.

    The result is followed through operations that keep its number of elements (a cast, dropout, a mask) or pad it. A
    router's softmax is not followed far: it is cut to the chosen experts. The product of a weight with it is no mixing.
    """

    def __init__(self, model):
        super().__init__()
        self.found = False
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.probabilities = []  # kept alive, so that no storage is used twice

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        followed = [tensor for tensor in tensors if self._follows(tensor)]
        if "attention" in operation.__name__:
            self.found = True
        elif operation in _PRODUCTS:
            factors = tensors[-2:]
            others = [tensor for tensor in factors if not self._follows(tensor)]
            self.found |= len(others) == 1 and others[0].untyped_storage().data_ptr() not in self.weights
        elif operation in _SOFTMAX or self._goes_on(operation, output, followed):
            self.probabilities.append(output)
        return output

    def _goes_on(self, operation, output, followed):
        if operation is aten.constant_pad_nd.default:
            return bool(followed)
        return any(_same_size(output, tensor) for tensor in followed)

    def _follows(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        return any(place == known.untyped_storage().data_ptr() for known in self.probabilities)


def _same_size(output, tensor):
    return isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel() == tensor.numel()


def mixes_by_softmax(model, inputs):
    """Whether a forward pass mixes positions with weights from a softmax, seen from the operations it runs."""
    watch = _AttentionWatch(model)
    with torch.no_grad(), watch:
        forward(model.eval(), inputs)
    return watch.found


def declares_heads(config):
    """Whether the configuration speaks of attention heads: some attentions have a softmax that is not seen as one."""
    return any(getattr(place, "num_attention_heads", None) for place in (config, config.get_text_config()))


def has_experts(config):
    """Whether some number of experts in the configuration, or in one nested in it, is more than one."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    counts = [v for name, v in values.items() if "expert" in str(name) and isinstance(v, int)]
    return any(count > 1 for count in counts) or any(has_experts(v) for v in values.values() if isinstance(v, dict))


def reached(model, inputs):
    """Names of the weights that the training loss of the plain model reaches; the model is left with gradients."""
    model.requires_grad_(True).train()
    loss_of(forward(model, inputs)).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def state_of(model):
    """A copy of everything in the state dict, and of the buffers that are not saved."""
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def structure_of(model):
    """Everything an injection could leave behind but tensors: classes, hooks, replaced methods, implementations.

    Classes by name: torch makes one of its own for every module with a parametrization.
    """
    return {
        name: (
            [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__],
            [len(getattr(module, hooks)) for hooks in _HOOKS],
            sorted(key for key, value in vars(module).items() if callable(value)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


def trainable_of(model):
    """Which parameters require a gradient."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def differences(one, other):
    """Names whose values differ in any bit, or are in one of the two alone."""
    changed = [name for name in one.keys() & other.keys() if not _same(one[name], other[name])]
    return sorted(changed + list(one.keys() ^ other.keys()))


def _same(one, other):
    if not isinstance(one, torch.Tensor):
        return one == other
    return one.dtype == other.dtype and torch.equal(one, other)


def changed_share(before, after, model):
    """Share of the matrix weights that differ, 0 to 1, embeddings and output layer aside.

    Measured on a merged model, where what carried nothing is as before, it is what the reported coverage is held
    against.
    """
    outside = {id(weight) for weight in _embedding_weights(model)}
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in outside}
    return sum(n for name, n in sizes.items() if not _same(before[name], after[name])) / max(1, sum(sizes.values()))


def _embedding_weights(model):
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return [module.weight for module in [*modules, model.get_output_embeddings()] if hasattr(module, "weight")]
