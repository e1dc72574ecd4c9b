"""What must hold for one strategy on one architecture, step by step, through lightsft's public names alone.

    check(find("causal-lm", "llama"), "lora") -> {"status": "passed", "coverage": 1.0, ...}

attach          the strategy goes onto the plain model
train           the loss is finite, a gradient reaches every trainable tensor that this batch uses, and nothing else
effect          the trained strategy changes the logits; disabled, they are the plain model's bit for bit
save and load   tensors and logits are the same bits on a freshly built model
merge           logits within 1e-4, and within 1e-5 of the effect; nothing of lightsft is left
export          the merged checkpoint gives the same logits in plain transformers, in a process without lightsft
eject           tensors, logits and structure of the plain model are back, bit for bit

A step is a function that raises where something does not hold; its name is the failed step. What the strategy trains
is moved by seeded noise first, since an untrained LoRA has no effect to lose. A LightsftError at attach is a refusal.

The merge is judged by max|merged - tuned| <= 1e-4 and <= 1e-5 max|tuned - plain|, in fp32. (With 1e-4 of the effect, a
thousandth more of one B in fourteen goes by unseen.) Where fp32's own rounding is larger than the second limit, the
same folder is merged once more in fp64, where it has to hold; the tuned logits there tell what fp32 rounds away, and
the difference in fp32 may be four times that.
"""

import tempfile
import time
from pathlib import Path

import torch

import lightsft
from lightsft.anatomy import is_within
from lightsft.errors import LightsftError
from tests.zoo.models_and_inputs import AUTO_CLASSES, build, forward, logits, loss_of, make_inputs
from tests.zoo.observations import (
    changed_share,
    declares_heads,
    differences,
    has_experts,
    mixes_by_softmax,
    reached,
    state_of,
    structure_of,
    trainable_of,
)

MERGE_LIMIT, EFFECT_LIMIT = 1e-4, 1e-5  # of the largest difference: absolute, and as a share of the effect
ROUNDINGS = 4  # two sets of logits, each with errors of about the one that is measured
LONGEST_REASON = 1500
ADAPTER = "adapter"


class Subject:
    """One architecture with one strategy, on its way through the steps; `facts` is what is reported."""

    def __init__(self, entry, strategy, folder, *, plain_logits, tamper):
        self.entry, self.strategy, self.folder = entry, strategy, folder
        self.plain_logits, self.tamper = plain_logits, tamper
        self.facts = {}
        self.model = build(entry)
        self.inputs = make_inputs(entry, self.model)
        self.state, self.trainable = state_of(self.model), trainable_of(self.model)
        self.base = logits(self.model, self.inputs)
        self.structure = structure_of(self.model)  # once it has run: some choose their attention on the first call
        self.used = reached(build(entry), self.inputs)


def check(entry, strategy, *, plain_logits=None, tamper=lambda stage, subject: None):
    """The outcome of every step as a dictionary of plain values.

    `strategy` is a registered name or a strategy. `plain_logits(folder, auto class, inputs)` loads a checkpoint
    elsewhere; without it the export is not checked. `tamper(stage, subject)` may damage what was just made: it is
    called when that is "saved" (`subject.folder / ADAPTER`), "loaded" (`subject.loaded`), "merged" (`subject.merged`).
    """
    started = time.perf_counter()
    strategy = lightsft.strategy(strategy) if isinstance(strategy, str) else strategy
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(entry, strategy, Path(folder), plain_logits=plain_logits, tamper=tamper)
        outcome = _outcome(subject)
    return outcome | subject.facts | {"seconds": round(time.perf_counter() - started, 3)}


def look(entry):
    """What is seen of the plain model: attention, experts, size, and that it trains."""
    model = build(entry)
    inputs = make_inputs(entry, model)
    facts = {
        "attention": mixes_by_softmax(model, inputs) or declares_heads(model.config),
        "experts": has_experts(model.config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if not reached(model, inputs):
        return facts | {"status": "failed", "step": "train", "reason": "no gradient reaches any weight"}
    return facts | {"status": "passed"}


def _outcome(subject):
    for step in STEPS:
        try:
            step(subject)
        except Exception as error:
            name = step.__name__.replace("_", " ")
            status = "refused" if step is attach and isinstance(error, LightsftError) else "failed"
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            return {"status": status, "step": name, "reason": (kind + str(error))[:LONGEST_REASON]}
    return {"status": "passed"}


# ---- the steps


def attach(subject):
    """Place the strategy."""
    subject.injection = subject.strategy.inject(lightsft.Backbone(subject.model))
    subject.facts["coverage"] = round(subject.injection.coverage, 4)
    subject.facts["trainable"] = subject.injection.trainable_parameters
    subject.facts["skipped"] = len(subject.injection.skipped)


def train(subject):
    """A loss and its gradients in train mode, on tensors that have left their start."""
    nudge(subject.injection)
    subject.model.train()
    loss = loss_of(forward(subject.model, subject.inputs))
    assert torch.isfinite(loss), f"the loss is {float(loss)}"
    loss.backward()
    problems = gradient_problems(subject)
    assert not problems, "; ".join(problems[:6]) + (f"; {len(problems)} in all" if len(problems) > 6 else "")


def effect(subject):
    """What was trained shows in the logits, and goes away when disabled."""
    subject.tuned = logits(subject.model, subject.inputs)
    assert torch.isfinite(subject.tuned).all(), "the tuned logits are not finite"
    frozen = _frozen_alike(subject)
    subject.effect = distance(subject.tuned, frozen)
    assert subject.effect > 0, "the tuned logits are the plain model's"
    with subject.injection.disabled():
        disabled = logits(subject.model, subject.inputs)
    assert torch.equal(disabled, frozen), f"disabled, logits are off by {distance(disabled, frozen):.2g}"
    assert torch.equal(logits(subject.model, subject.inputs), subject.tuned), "enabled again, logits are not as before"


def _frozen_alike(subject):
    """The plain model's logits with the same weights frozen.

    torch chooses between two ways to multiply by `weight.requires_grad`, even without a gradient: other last bits.
    """
    twin, flags = build(subject.entry), trainable_of(subject.model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(flags.get(name, False))
    return logits(twin, subject.inputs)


def save_and_load(subject):
    """The saved folder gives the same tensors and logits on a fresh model."""
    saved = subject.injection.tensors()
    subject.injection.save(subject.folder / ADAPTER)
    subject.tamper("saved", subject)
    subject.loaded = lightsft.load(subject.folder / ADAPTER, lightsft.Backbone(build(subject.entry)))
    off = differences(saved, subject.loaded.tensors())
    assert not off, f"{len(off)} loaded tensors differ, {off[0]} for one"
    found = logits(subject.loaded.model, subject.inputs)
    assert torch.equal(found, subject.tuned), f"loaded, logits are off by {distance(found, subject.tuned):.2g}"


def merge(subject):
    """Merged weights compute what the strategy did, in a model that shows no trace of it."""
    subject.facts["merges"] = subject.loaded.mergeable
    if not subject.loaded.mergeable:
        return
    subject.tamper("loaded", subject)
    subject.merged = subject.loaded.merge()
    subject.tamper("merged", subject)
    subject.merged_logits = logits(subject.merged, subject.inputs)
    error = distance(subject.merged_logits, subject.tuned)
    subject.facts |= {"effect": subject.effect, "merge_error": error}
    assert error <= MERGE_LIMIT, f"merged, logits are off by {error:.2g} at an effect of {subject.effect:.2g}"
    if error > EFFECT_LIMIT * subject.effect:
        _blame_rounding(subject, error)
    state = state_of(subject.merged)
    subject.facts["changed"] = round(changed_share(subject.state, state, subject.merged), 4)
    _assert_plain(subject, subject.merged, state.keys() ^ subject.state.keys())


def _blame_rounding(subject, error):
    """The difference is fp32's own: no larger than what fp32 costs the tuned logits, and gone in fp64.

    Of a model that cannot compute in fp64, fp32 costs one unit in the last place of the largest logit.
    """
    found = f"merged, logits are off by {error:.2g} at an effect of {subject.effect:.2g}"
    inputs = {name: double(value) for name, value in subject.inputs.items()}
    plain = _plain_float64(subject, inputs)
    if plain is None:
        rounding = torch.finfo(torch.float32).eps * float(subject.tuned.abs().max())
    else:
        injection = lightsft.load(subject.folder / ADAPTER, lightsft.Backbone(build(subject.entry, **_PLAIN_KERNELS)))
        tuned = logits(injection.model.double(), inputs)
        rounding, effect = distance(tuned, subject.tuned), distance(tuned, plain)
        wide_error = distance(logits(injection.merge().double(), inputs), tuned)
        subject.facts |= {"merge_error_float64": wide_error, "effect_float64": effect}
        assert wide_error <= EFFECT_LIMIT * effect, f"{found}; in fp64 by {wide_error:.2g} at an effect of {effect:.2g}"
    subject.facts["rounding"] = rounding
    assert error <= ROUNDINGS * rounding, f"{found}; fp32 costs {rounding:.2g}"


def _plain_float64(subject, inputs):
    """The plain model's logits in fp64, None where some of its own code is written for fp32."""
    try:
        found = logits(build(subject.entry, **_PLAIN_KERNELS).double(), inputs)
    except RuntimeError:
        return None
    return found if torch.isfinite(found).all() else None


def export(subject):
    """The merged checkpoint, reloaded where lightsft cannot be imported, gives the same bits."""
    if not subject.facts["merges"] or subject.plain_logits is None:
        return
    found = _reloaded(subject, subject.merged, "merged")
    if torch.equal(found, subject.merged_logits):
        return
    twin = build(subject.entry)
    twin.load_state_dict(subject.merged.state_dict())
    theirs = distance(_reloaded(subject, twin, "twin"), logits(twin, subject.inputs))
    off = distance(found, subject.merged_logits)
    raise AssertionError(
        f"reloaded, logits are off by {off:.2g}; those of a plain model with these values by {theirs:.2g}"
    )


def _reloaded(subject, model, name):
    model.save_pretrained(subject.folder / name)
    return subject.plain_logits(subject.folder / name, AUTO_CLASSES[subject.entry["task"]], subject.inputs)


def eject(subject):
    """The plain model is back."""
    subject.injection.eject()
    off = differences(subject.state, state_of(subject.model))
    assert not off, f"{len(off)} tensors differ, {off[0]} for one"
    _assert_plain(subject, subject.model, ())
    found = logits(subject.model, subject.inputs)
    assert torch.equal(found, subject.base), f"ejected, logits are off by {distance(found, subject.base):.2g}"


STEPS = (attach, train, effect, save_and_load, merge, export, eject)
_PLAIN_KERNELS = {"experts_implementation": "eager"}  # the grouped matrix product exists in fp32 and narrower only


# ---- what they share


def nudge(injection):
    """Move every trainable tensor by noise of a tenth of its own deviation, 0.02 at least."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in injection.parameters():
            deviation = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=max(0.02, 0.1 * deviation))


def gradient_problems(subject):
    """Trainable tensors without a finite gradient though the batch uses what they serve, and gradients elsewhere."""
    trained = subject.injection.named_parameters()
    own = {id(parameter) for parameter in trained.values()}
    found = [
        f"no gradient reaches {name}"
        for name, parameter in trained.items()
        if parameter.grad is None and _uses(subject, name)
    ]
    found += [f"{n} does not require a gradient" for n, p in trained.items() if not p.requires_grad]
    found += [
        f"the gradient of {name} is not finite"
        for name, parameter in trained.items()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    return found + [
        f"{name} is trained though the strategy does not say so"
        for name, parameter in subject.model.named_parameters()
        if id(parameter) not in own and (parameter.requires_grad or parameter.grad is not None)
    ]


def _uses(subject, name):
    """Whether the plain model's loss reaches what this trainable tensor serves.

    It serves the weight or the module of the plain model with the longest name that its own name starts with.
    """
    while name and name not in subject.trainable and name not in subject.structure:
        name = name.rpartition(".")[0]
    return any(is_within(weight, name) for weight in subject.used)


def _assert_plain(subject, model, unmatched_keys):
    assert not unmatched_keys, f"its state dict has other keys: {sorted(unmatched_keys)[:4]}"
    structure = structure_of(model)
    off = differences(subject.structure, structure)
    assert not off, f"{off[0]!r} is left different: {_changes(subject.structure.get(off[0]), structure.get(off[0]))}"
    off = differences(subject.trainable, trainable_of(model))
    assert not off, f"requires_grad differs: {off[:4]}"


def _changes(before, after):
    """The parts of two descriptions of a module that differ, as (before, after)."""
    if before is None or after is None:
        return "added" if before is None else "removed"
    return [parts for parts in zip(before, after, strict=True) if parts[0] != parts[1]]


def distance(one, other):
    """The largest difference, inf if the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).abs().max())


def double(value):
    """Floating-point tensors in fp64."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
