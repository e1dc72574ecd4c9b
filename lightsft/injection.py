"""Strategy (a protocol of one method) and Injection: what a strategy placed on a backbone, whichever strategy it was.

A strategy writes

    with injecting(self, backbone, seed) as injection:
        for name in ...:
            injection.add_side(name, MySide(...))
    return injection

and gets for free: everything else frozen, the task head trained, the probe, `disabled`, `eject`, `merge`, saving.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightsft.anatomy import Weight
from lightsft.backbone import Backbone
from lightsft.dry_run import forget_derived, input_embeddings
from lightsft.errors import ArtifactError, InjectionError, MergeError
from lightsft.plain_layers import make_model_plain
from lightsft.primitives import (
    AttentionPrefix,
    BufferState,
    InputGradient,
    MixedPrefix,
    PlacedDelta,
    PlacedPrefix,
    PlacedSide,
    Primitive,
    Side,
    Unfreezing,
    WeightDelta,
)
from lightsft.primitives.attention_prefix import AttentionCall
from lightsft.quantization import matrix_size, quantized_layers

logger = logging.getLogger(__name__)
LITTLE_COVERAGE = 0.9


@runtime_checkable
class Strategy(Protocol):
    """A frozen dataclass whose fields are the user's options.

    Optional, read where they are there: `learning_rate`, a class-level default; `trains_weights`, whether it trains
    weights of the backbone in place, which are then loaded in fp32; `positions_taken`, how many tokens it puts beside
    the input's.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Place the strategy on `backbone`; new tensors are initialised from (seed, module name)."""
        ...


@runtime_checkable
class ActsBetweenSteps(Protocol):
    """A strategy that does something between the steps of a training (AdaLoRA reallocates ranks)."""

    def callbacks(self, injection: Injection) -> list[Any]:
        """Callbacks for transformers' trainers."""
        ...


@runtime_checkable
class Rehearses(Protocol):
    """A primitive that an ordinary input does not reach: rows for tokens that the model does not know yet."""

    def rehearsing(self) -> AbstractContextManager[None]:
        """Within it, any input reaches what it trains."""
        ...


class Injection:
    """The primitives that one strategy placed on one backbone. Only their parameters are trainable."""

    def __init__(self, backbone: Backbone, strategy: Strategy, seed: int) -> None:
        if backbone.carries is not None or any("lightsft" in name for name, _ in backbone.model.named_modules()):
            raise InjectionError(
                f"the backbone already carries {backbone.carries or 'a strategy'}",
                expected="a backbone without a strategy",
                todo="call eject() or merge() on that injection first, or load the backbone again",
            )
        self.backbone, self.strategy, self.seed = backbone, strategy, seed
        self.primitives: list[Primitive] = []
        self._enabled = True
        self.skipped: list[str] = []
        self.unreachable: set[str] = set()  # weights of the backbone that no gradient can reach
        self._rates: dict[str, float] = {}  # trainable tensor -> its learning rate over the strategy's
        self.sketch = backbone.sketch()
        self._trained_before = {name: p.requires_grad for name, p in backbone.model.named_parameters()}
        backbone.carries = type(strategy).__name__
        backbone.model.requires_grad_(False)
        backbone.model.zero_grad(set_to_none=True)

    # ---- placing

    def place(self, primitive: Primitive) -> None:
        """Take on a primitive that has been placed on the model."""
        self.primitives.append(primitive)

    def skip(self, names: Iterable[str]) -> None:
        """Note what a strategy leaves out since a forward pass never uses it."""
        self.skipped.extend(names)

    def add_delta(self, weight: Weight, delta: WeightDelta) -> None:
        """Put `delta` on a weight that is read without calling a layer."""
        self._require_free(weight)
        self.place(PlacedDelta(self.model, weight, delta))

    def add_side(self, name: str, side: Side, *, reads: str | None = None) -> None:
        """Put `side` on the module `name`; with `reads`, it sees the input of that other module."""
        self.place(PlacedSide(self.model, name, side, reads))

    def add_prefix(self, call: AttentionCall, prefix: AttentionPrefix) -> None:
        """Put trained keys and values on the attention module that made `call`."""
        config = getattr(self.backbone.module(call.name), "config", None)
        implementation = str(getattr(config, "_attn_implementation", None))
        written_out = not call.registered or implementation in ("eager", "sdpa", "None")
        prefix.registered = call.registered
        self.place((MixedPrefix if written_out else PlacedPrefix)(self.model, call.name, prefix))

    def _require_free(self, weight: Weight) -> None:
        if any(isinstance(primitive, PlacedDelta) and primitive.name == weight.name for primitive in self.primitives):
            raise InjectionError(
                f"two strategies would change {weight.name}, which is read without calling its layer",
                expected="at most one of them on such a weight",
                todo="give one of them other targets or layers",
            )

    def require_input_gradient(self) -> None:
        """Let gradients pass through layers that only compute them when their input wants one."""
        embeddings = input_embeddings(self.model)
        name = next((name for name, module in self.model.named_modules() if module is embeddings), None)
        if name is not None and not any(isinstance(primitive, InputGradient) for primitive in self.primitives):
            self.place(InputGradient(self.model, name))

    def unfreeze(self, names: Iterable[str]) -> None:
        """Train the backbone's parameters `names` in place, with those named before: there is one unfreezing.

        What strategies have placed on the model meanwhile is none of its parameters.
        """
        chosen = {name for name in names if "lightsft" not in name}
        for earlier in [primitive for primitive in self.primitives if isinstance(primitive, Unfreezing)]:
            earlier.remove()
            self.primitives.remove(earlier)
            chosen |= set(earlier.names)
        if chosen:
            self.place(Unfreezing(self.model, sorted(chosen), keep_outputs=self.backbone.head))

    # ---- looking

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, with the strategy on it."""
        return self.backbone.model

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name, in a fixed order."""
        named = {name: p for primitive in self.primitives for name, p in primitive.trainable().items()}
        return dict(sorted(named.items()))

    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors; nothing else requires a gradient."""
        return list(self.named_parameters().values())

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def total_parameters(self) -> int:
        """How many numbers the backbone holds, with what was placed on it."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def arrived_fixed(self) -> frozenset[str]:
        """The backbone's parameters that did not want a gradient before anything was placed."""
        return frozenset(name for name, trained in self._trained_before.items() if not trained)

    @property
    def coverage(self) -> float:
        """Share of the blocks' matrix weights that carry a primitive, by size, 0 to 1.

        Matrix weights have two dimensions or more, and are neither looked up (embedding tables) nor unused.
        """
        covered = {name for primitive in self.primitives for name in primitive.covers()}
        unused = self.backbone.anatomy.idle | self.unreachable
        inside = {name: size for name, size in self._matrices() if name in covered or name not in unused}
        share: float = sum(size for name, size in inside.items() if name in covered) / max(1, sum(inside.values()))
        return share

    def _matrices(self) -> Iterator[tuple[str, int]]:
        anatomy = self.backbone.anatomy
        added = {id(parameter) for parameter in self._added()}
        tables = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        layers = quantized_layers(self.model)
        quantized = {f"{name}.weight": matrix_size(layer) for name, layer in layers.items()}
        codes = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
        left = added | tables | codes
        listed = {n: p.numel() for n, p in self.model.named_parameters() if p.ndim >= 2 and id(p) not in left}
        for name, size in {**listed, **quantized}.items():
            if "lightsft" not in name and anatomy.in_blocks(name) and name not in anatomy.head:
                yield name, size

    def _added(self) -> Iterator[nn.Parameter]:
        for primitive in self.primitives:
            if not isinstance(primitive, Unfreezing):
                yield from primitive.trainable().values()

    def report_coverage(self) -> None:
        """Say how much of the blocks is served, as a warning where it is little for a strategy that serves them all."""
        share, skipped = self.coverage, len(self.skipped)
        left = f"; {skipped} modules are left out, since no output depends on them" if skipped else ""
        level = logging.INFO if share >= LITTLE_COVERAGE else logging.WARNING
        kind = type(self.strategy).__name__
        logger.log(level, "%s serves %.1f %% of the matrix weights in the blocks%s", kind, 100 * share, left)

    @property
    def mergeable(self) -> bool:
        """Whether `merge()` can fold all of it into the backbone's weights."""
        return all(primitive.mergeable for primitive in self.primitives)

    @property
    def trains_backbone_weights(self) -> bool:
        """Whether weights outside the task head are trained in place, so that they are worth fp32 masters."""
        head = self.backbone.head
        return any(isinstance(p, Unfreezing) and not set(p.names) <= head for p in self.primitives)

    def learning_rate_ratio(self, name: str) -> float:
        """By how much the learning rate of the trainable tensor `name` is multiplied."""
        owner = next(primitive for primitive in self.primitives if name in primitive.trainable())
        return owner.learning_rate_ratio(name) * self._rates.get(name, 1.0)

    def multiply_learning_rate(self, names: Iterable[str], ratio: float) -> None:
        """Train these tensors `ratio` times as fast: a part of a combination that has a default of its own."""
        self._rates |= {name: ratio * self._rates.get(name, 1.0) for name in names}

    # ---- using

    @contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Within it, the backbone computes as it did before, bit for bit."""
        before = self._enabled
        self._enable(False)
        try:
            yield self.model
        finally:
            self._enable(before)

    def _enable(self, enabled: bool) -> None:
        self._enabled = enabled
        for primitive in self.primitives:
            primitive.enable(enabled)
        forget_derived(self.model)

    def eject(self) -> Backbone:
        """Remove everything: the backbone as it was, bit for bit. What was trained is lost unless saved."""
        for primitive in reversed(self.primitives):
            primitive.remove()
        return self._release()

    def merge(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Fold everything into the backbone's weights (fp32, one rounding): a plain transformers model.

        All of it is stored as `dtype`, by default as the type of the weights that are not quantized. A quantized
        backbone becomes a plain one: what was trained is W + delta with the dequantized W, and another rounding to
        codes would lose most of the delta.
        Raises MergeError, leaving all in place, if some primitive is not linear.
        """
        if not self.mergeable:
            kind = type(self.strategy).__name__
            raise MergeError(
                f"{kind} computes something that no weight of the backbone can express, so it cannot be merged",
                expected="a strategy that changes weights (full, lora)",
                todo="ship the saved adapter folder and load it with lightsft.load, or train one that merges",
            )
        with self.disabled():
            quantized = quantized_layers(self.model)  # those that a strategy made plain among them
        self._enable(True)
        if dtype is not None:
            self._store_as(dtype)
        for primitive in self.primitives:
            primitive.merge()
        self._release()
        if quantized:
            make_model_plain(self.model, quantized.values(), self.backbone.stored_dtype)
            self.backbone.__dict__.pop("quantization", None)
        return self.model

    def _store_as(self, dtype: torch.dtype) -> None:
        trained = {id(parameter): parameter.data for parameter in self.parameters()}
        self.backbone.cast(dtype)
        for parameter in self.parameters():
            parameter.data = trained[id(parameter)]  # masters are rounded by the merge alone
        for primitive in self.primitives:
            primitive.store_as(dtype)

    def _release(self) -> Backbone:
        self.primitives = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before.get(name, True))  # an untied copy is new
            parameter.grad = None
        forget_derived(self.model)
        self.backbone.carries = None
        return self.backbone

    # ---- saving

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by name, sorted."""
        named = {name: tensor for primitive in self.primitives for name, tensor in primitive.tensors().items()}
        return dict(sorted(named.items()))

    def load_tensors(self, tensors: dict[str, Tensor], origin: str = "the given tensors") -> None:
        """Take back what `tensors()` gave. Strict: everything missing, extra or misshapen is reported at once."""
        wanted = {name: shapes for primitive in self.primitives for name, shapes in primitive.shapes().items()}
        wrong = [f"missing {name}" for name in sorted(set(wanted) - set(tensors))]
        wrong += [f"unexpected {name}" for name in sorted(set(tensors) - set(wanted))]
        wrong += [
            f"{name} has shape {tuple(tensors[name].shape)}, not {' or '.join(map(str, shapes))}"
            for name, shapes in sorted(wanted.items())
            if name in tensors and tuple(tensors[name].shape) not in shapes
        ]
        if wrong:
            shown = "\n  ".join(wrong[:12]) + (f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else "")
            raise ArtifactError(
                f"{origin} does not fit this backbone:\n  {shown}",
                expected=f"exactly the {len(wanted)} tensors of {type(self.strategy).__name__} on this model",
                todo="load it onto the model it was trained on",
            )
        for primitive in self.primitives:
            primitive.load({name: tensors[name] for name in primitive.shapes()})
        forget_derived(self.model)

    def save(self, directory: str | Path) -> Path:
        """Write the adapter folder that `lightsft.load` reads; same tensors, same bytes."""
        from lightsft.artifact import save

        return save(self, Path(directory))


@contextmanager
def injecting(strategy: Strategy, backbone: Backbone, seed: int) -> Iterator[Injection]:
    """Open an injection; on leaving, train the task head, probe it all; on an error, put the backbone back.

    Within another strategy's `injecting` (a combination) it is that injection that is yielded, and left open.
    """
    from lightsft.probe import probe, require_training_mode

    if backbone.open_injection is not None:
        yield backbone.open_injection
        return
    require_training_mode(backbone)
    backbone.anatomy  # noqa: B018 - read from the bare model, before anything is placed
    moving = backbone.moving_buffers
    injection = Injection(backbone, strategy, seed)
    backbone.open_injection = injection
    try:
        with torch.random.fork_rng(devices=[]), _default_type(torch.float32):
            yield injection  # new layers draw before they are initialised from the seed
        injection.unfreeze(backbone.head)
        if moving:
            injection.place(BufferState(backbone.model, moving))
        _check_placed(injection)
        with ExitStack() as stack:
            for primitive in injection.primitives:
                if isinstance(primitive, Rehearses):
                    stack.enter_context(primitive.rehearsing())
            probe(injection)
    except BaseException:
        injection.eject()
        raise
    finally:
        backbone.open_injection = None


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """What is trained is fp32, whatever type new tensors get elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_placed(injection: Injection) -> None:
    names = [name for primitive in injection.primitives for name in primitive.trainable()]
    kind = type(injection.strategy).__name__
    if not names:
        raise InjectionError(
            f"{kind} placed nothing on {type(injection.model).__name__}",
            expected="at least one trainable tensor",
            todo="check its targets and layers",
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise InjectionError(
            f"{kind} would train two tensors named {twice[0]}",
            expected="strategies of different kinds, or on different modules",
            todo="give one of them other targets",
        )
