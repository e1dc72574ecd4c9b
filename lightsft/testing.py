"""The contract that every strategy keeps, ours or a third party's, as a function for tests.

    @pytest.mark.parametrize("model", TINY_MODELS)
    def test_my_strategy_keeps_the_contract(model):
        check_strategy(MyStrategy(rank=2), model)

A strategy trains its own tensors and nothing else, every one of them gets a gradient, and they change the output.
Disabled or ejected, it leaves the backbone as it was, bit for bit. What it saves is what it trained; a seed decides
its start; copies of the model carry it; and where it says that it merges, the merged model computes the same.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightsft.artifact import load
from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, predictions
from lightsft.errors import BackboneError, MergeError
from lightsft.injection import Injection, Strategy
from lightsft.seeding import generator

SEED, OTHER_SEED, NOISE = 7, 8, 0.1
OF_EFFECT, OF_OUTPUT = 1e-5, 1e-6  # how far a merged output may be off: of the change that it merges, of itself

Factory = Callable[[], PreTrainedModel]


class ContractError(AssertionError):
    """A strategy that does not keep the contract; the message names each point that fails."""


def check_strategy(
    strategy: Strategy, model: str | Factory = "decoder", inputs: Mapping[str, Any] | None = None
) -> None:
    """Raise ContractError unless `strategy` keeps the contract on a model.

    `model` is one of TINY_MODELS, or a function that makes an equal model each time it is called. `inputs` are the
    arguments of a forward pass; by default a few tokens, or what else the model takes. The strategy must be registered,
    since a saved one is found by its name. What it raises when it refuses the model (a LightsftError) is passed on.
    """
    make = _factory(model)
    failures = [f"{check.__name__.replace('_', ' ')}: {found}" for check, found in _failures(strategy, make, inputs)]
    if failures:
        raise ContractError(
            f"{type(strategy).__name__} does not keep the contract of a strategy on {type(make()).__name__}:\n  "
            + "\n  ".join(failures)
        )


def _factory(model: str | Factory) -> Factory:
    if callable(model):
        return model
    if model not in TINY_MODELS:
        raise BackboneError(
            f"no tiny model named {model!r}", expected=f"one of {', '.join(TINY_MODELS)}, or a function"
        )
    return TINY_MODELS[model]


# ---- tiny models


def _tiny(kind: str, configuration: str, **options: Any) -> Factory:
    def make() -> PreTrainedModel:
        config = getattr(transformers, configuration)(**options, vocab_size=100, pad_token_id=0, eos_token_id=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = getattr(transformers, kind)(config)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # where every bias is 0 and every norm 1, mistakes in them would hide
                    nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
        return model.eval()

    return make


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_WIDE = {
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}  # activations of order one: no tensor is without effect
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}

TINY_MODELS: Mapping[str, Factory] = {
    "decoder": _tiny("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **_SIZES, **_WIDE),
    "encoder": _tiny("BertForSequenceClassification", "BertConfig", num_labels=3, **_SIZES, **_WIDE),
    "encoder-decoder": _tiny("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **_T5),
}


# ---- the contract

Check = Callable[["_Trial"], Iterator[str]]


def _failures(strategy: Strategy, make: Factory, inputs: Mapping[str, Any] | None) -> Iterator[tuple[Check, str]]:
    """Each failed check with what was found."""
    trial = _Trial(strategy, make, inputs)
    for check in CHECKS:
        try:
            yield from ((check, found) for found in check(trial))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            yield check, f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"


class _Trial:
    """One strategy on one model, moved by noise away from its start, which often has no effect."""

    def __init__(self, strategy: Strategy, make: Factory, inputs: Mapping[str, Any] | None) -> None:
        self.strategy, self.make, self.example = strategy, make, inputs
        self.plain = make()
        self.backbone = self.another()
        self.inputs = dict(self.backbone.example or {})
        self.plain_outputs = self.run(self.plain)
        self.injection = strategy.inject(self.backbone, seed=SEED)
        self.start = _copies(self.injection.tensors())
        move(self.injection)
        self.outputs = self.run(self.injection.model)

    @property
    def own(self) -> list[str]:
        """What the strategy trains beside the task head, which every strategy trains; all of it if that is the head."""
        names = list(self.injection.named_parameters())
        return [name for name in names if name not in self.backbone.head] or names

    def run(self, model: nn.Module) -> list[Tensor]:
        """The outputs in evaluation mode, without a gradient."""
        with evaluating(model), torch.no_grad():
            return [output.clone() for output in predictions(model(**self.inputs))]

    def fresh(self, seed: int = SEED) -> Injection:
        """The strategy on another equal model."""
        return self.strategy.inject(self.another(), seed=seed)

    def another(self) -> Backbone:
        """An equal backbone without the strategy."""
        return Backbone(self.make(), example=self.example)


def move(injection: Injection, names: Iterable[str] | None = None, *, seed: int = 0, scale: float = NOISE) -> Injection:
    """Add seeded noise to the trained tensors called `names`, by default to all."""
    named = injection.named_parameters()
    with torch.no_grad():
        for name in named if names is None else names:
            parameter = named[name]
            parameter.add_(torch.randn(parameter.shape, generator=generator(seed, name)).to(parameter), alpha=scale)
    return injection


def only_its_own_tensors_are_trainable(trial: _Trial) -> Iterator[str]:
    """What requires a gradient is what the injection trains."""
    own = {id(parameter): name for name, parameter in trial.injection.named_parameters().items()}
    wanting = {id(p): name for name, p in trial.injection.model.named_parameters() if p.requires_grad}
    if not own:
        yield "it trains nothing; expected at least one tensor"
    for name in sorted(wanting[key] for key in wanting.keys() - own.keys()):
        yield f"{name} requires a gradient; expected only what injection.parameters() gives"
    for name in sorted(own[key] for key in own.keys() - wanting.keys()):
        yield f"{name} is among injection.parameters(); expected it in the model, requiring a gradient"


def every_tensor_gets_a_gradient(trial: _Trial) -> Iterator[str]:
    """One backward pass through the moved strategy reaches each tensor, and nothing else."""
    model = trial.injection.model
    model.zero_grad(set_to_none=True)
    with evaluating(model):
        loss = torch.stack([output.float().pow(2).mean() for output in predictions(model(**trial.inputs))]).sum()
        loss.backward()
    named = trial.injection.named_parameters()
    own = {id(parameter) for parameter in named.values()}
    for name, parameter in named.items():
        if parameter.grad is None:
            yield f"{name} gets none; expected one on every tensor that is trained"
        elif not torch.isfinite(parameter.grad).all():
            yield f"{name} gets one that is not finite"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and id(parameter) not in own:
            yield f"{name} gets one; expected none on what is not trained"
    model.zero_grad(set_to_none=True)


def it_changes_the_output(trial: _Trial) -> Iterator[str]:
    """The moved strategy, with the task head as it was in the backbone, has an effect."""
    named = trial.injection.named_parameters()
    with torch.no_grad():
        for name in named.keys() - set(trial.own):
            trial.plain.get_parameter(name).copy_(named[name])
    with_same_head = trial.run(trial.plain)
    if _differences(with_same_head, trial.outputs) == 0:
        yield f"{NOISE} of noise on its tensors changes nothing; expected another output"


def disabled_it_is_the_backbone(trial: _Trial) -> Iterator[str]:
    """Within disabled() the outputs are the backbone's, after it the strategy's, bit for bit."""
    with trial.injection.disabled() as model:
        disabled = trial.run(model)
    if not _equal(disabled, trial.plain_outputs):
        yield f"outputs are off by {_differences(disabled, trial.plain_outputs):.1e}; expected the backbone's own bits"
    again = trial.run(trial.injection.model)
    if not _equal(again, trial.outputs):
        yield f"after it, outputs are off by {_differences(again, trial.outputs):.1e}; expected the strategy's own bits"


def what_is_saved_loads(trial: _Trial) -> Iterator[str]:
    """A saved strategy, loaded onto another equal model, has the same tensors and outputs, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        trial.injection.save(folder)
        loaded = load(folder, trial.another())
    if loaded.strategy != trial.strategy:
        yield f"the options come back as {loaded.strategy}; expected {trial.strategy}"
    yield from _different_tensors(loaded.tensors(), trial.injection.tensors(), "those that were saved")
    outputs = trial.run(loaded.model)
    if not _equal(outputs, trial.outputs):
        yield f"outputs are off by {_differences(outputs, trial.outputs):.1e}; expected those of what was saved"


def copies_carry_it(trial: _Trial) -> Iterator[str]:
    """A deep copy and a pickled model compute the same; the copy is trained apart from the original."""
    twin = copy.deepcopy(trial.injection)
    unpickled = pickle.loads(pickle.dumps(trial.injection.model))
    for name, model in (("a deep copy", twin.model), ("an unpickled model", unpickled)):
        outputs = trial.run(model)
        if not _equal(outputs, trial.outputs):
            yield f"{name} is off by {_differences(outputs, trial.outputs):.1e}; expected the same outputs"
    move(twin, trial.own, seed=1)
    if not _equal(trial.run(trial.injection.model), trial.outputs):
        yield "training the deep copy changes the original; expected tensors of its own"
    if _equal(trial.run(twin.model), trial.outputs):
        yield "training the deep copy has no effect on it; expected another output"
    for difference in _left_behind(twin.eject().model, trial.make()):
        yield f"a deep copy that is ejected: {difference}"


def a_seed_decides_its_start(trial: _Trial) -> Iterator[str]:
    """The same seed gives the same tensors, whatever was drawn before; and nothing is drawn from the global state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(OTHER_SEED)
        trial.fresh(OTHER_SEED).eject()
        before = torch.get_rng_state()
        again = trial.fresh()
        if not torch.equal(before, torch.get_rng_state()):
            yield "inject draws from torch's global random state; expected it untouched"
    yield from _different_tensors(again.tensors(), trial.start, f"those of seed {SEED} before")


def merged_it_computes_the_same(trial: _Trial) -> Iterator[str]:
    """In double precision; one that does not merge says so with MergeError and stays."""
    injection = move(trial.fresh())
    if not injection.mergeable:
        try:
            injection.merge()
            yield "merge() of what is not mergeable succeeds; expected MergeError"
        except MergeError:
            if not _equal(trial.run(injection.model), trial.outputs):
                yield "merge() is refused and changes the model; expected it as it was"
        return
    expected = trial.run(injection.model.double())
    plain = trial.run(trial.make().double())
    merged = injection.merge().double()
    found = _differences(trial.run(merged), expected)
    limit = OF_EFFECT * _differences(plain, expected) + OF_OUTPUT * max(
        float(output.abs().max()) for output in expected
    )
    if not found <= limit:
        yield f"merged outputs are off by {found:.1e}; expected at most {limit:.1e}"
    yield from _traces(merged)


def ejected_it_leaves_no_trace(trial: _Trial) -> Iterator[str]:
    """Tensors, outputs and structure are those of the plain model, bit for bit."""
    model, plain = trial.injection.eject().model, trial.make()
    yield from _different_tensors(model.state_dict(), plain.state_dict(), "the backbone's own")
    outputs = trial.run(model)
    if not _equal(outputs, trial.plain_outputs):
        yield f"outputs are off by {_differences(outputs, trial.plain_outputs):.1e}; expected the backbone's own bits"
    yield from _left_behind(model, plain)


CHECKS: tuple[Check, ...] = (
    only_its_own_tensors_are_trainable,
    every_tensor_gets_a_gradient,
    it_changes_the_output,
    disabled_it_is_the_backbone,
    what_is_saved_loads,
    copies_carry_it,
    a_seed_decides_its_start,
    merged_it_computes_the_same,
    ejected_it_leaves_no_trace,
)


# ---- comparing


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _differences(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference; infinite where shapes differ."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))


def _different_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], whose: str) -> Iterator[str]:
    for name in sorted(found.keys() ^ expected.keys()):
        yield f"{name} is {'missing' if name in expected else 'there'}; expected the names of {whose}"
    for name in sorted(found.keys() & expected.keys()):
        if not torch.equal(found[name], expected[name]):
            yield f"{name} has other values; expected {whose}"


def _traces(model: nn.Module) -> Iterator[str]:
    """Modules, hooks and attributes of lightsft that are left on a model."""
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        left = [
            name
            for name in (*module._modules, *module._parameters, *module._buffers, *vars(module))
            if "lightsft" in name
        ]
        left += [type(part).__qualname__ for part in (module, *hooks) if "lightsft" in type(part).__module__]
        left += [hook.__qualname__ for hook in hooks if "lightsft" in str(getattr(hook, "__module__", ""))]
        for name in left:
            yield f"{path or 'the model'} still has {name}; expected nothing of lightsft"


def _left_behind(model: nn.Module, plain: nn.Module) -> Iterator[str]:
    """What an ejected model has that a plain one has not, beside values."""
    yield from _traces(model)
    found, expected = _structure(model), _structure(plain)
    for path in sorted(found.keys() ^ expected.keys()):
        yield f"{path} is {'missing' if path in expected else 'there'}; expected the modules of the backbone"
    for path in sorted(found.keys() & expected.keys()):
        for what in (what for what in expected[path] if found[path][what] != expected[path][what]):
            yield f"{path or 'the model'} has {what} {found[path][what]}; expected {expected[path][what]}"


def _structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What may be left behind beside tensors, by module."""
    return {
        path: {
            "class": type(module).__qualname__,
            "children": list(module._modules),
            "attributes": sorted(vars(module)),
            "hooks": len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
            "mode": "training" if module.training else "evaluation",
            "trainable parameters": [n for n, p in module._parameters.items() if p is not None and p.requires_grad],
            "parameter types": [str(p.dtype) for p in module._parameters.values() if p is not None],
            "gradients": [n for n, p in module._parameters.items() if p is not None and p.grad is not None],
            "attention implementation": getattr(getattr(module, "config", None), "_attn_implementation", None),
        }
        for path, module in model.named_modules()
    }
