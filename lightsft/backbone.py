"""Backbone: a transformers model for a task, with its tokenizer, its anatomy and a sketch of its weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lightsft.anatomy import Anatomy, find_blocks, head_parameters, is_linear, read_anatomy
from lightsft.device import choose_device, choose_dtype
from lightsft.dry_run import candidate_inputs, find_moving_buffers, tiny_inputs
from lightsft.errors import BackboneError, first_line
from lightsft.loading_memory import given_back
from lightsft.meta import weightless
from lightsft.plain_layers import plain_copy
from lightsft.quantization import Quantization, dequantized, describe, is_plain, keep_codes, quantized_layers
from lightsft.quantizing import quantizable, quantize, reading_codes, require_kernels, trainable_kernels
from lightsft.quiet import quiet
from lightsft.sketch import same_values, sketched
from lightsft.trace import Trace, meta_copy, trace

if TYPE_CHECKING:
    from lightsft.injection import Injection

logger = logging.getLogger(__name__)

AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "chat": "AutoModelForCausalLM",
    "language-modeling": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
FIXED_LABELS = {"regression": ("value",)}  # of tasks whose rows do not name any
PROBLEM_TYPES = {"regression": "regression", "multi-label": "multi_label_classification"}
PROCESSORS = {"image-classification": "AutoImageProcessor", "audio-classification": "AutoFeatureExtractor"}
SKETCH_TENSORS = 24
LARGE = 100_000_000  # parameters


class Backbone:
    """A pretrained model that strategies are injected into.

    `model` is the transformers model itself, `tokenizer` may be None, `source` is where the weights came from.
    `compute_dtype` is the type it computes in; its weights may be wider (float32 masters for full tuning), in which
    case the trainer runs it under autocast. `example` holds keyword arguments for one small forward pass, for models
    that take something else than token ids, pixels or sound in the usual form.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: Any | None = None,
        task: str | None = None,
        source: str | None = None,
        fresh: Sequence[str] = (),
        compute_dtype: torch.dtype | None = None,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise BackboneError(
                f"a {type(model).__name__} was given as backbone",
                expected="a transformers PreTrainedModel, or use Backbone.load(path_or_id, task=...)",
                todo="unwrap it first, for example `model.get_base_model()` for a PEFT model",
            )
        keep_codes(model)
        self.model = model
        self.tokenizer: Any = tokenizer
        self.task = task
        self.source = source or str(getattr(model, "name_or_path", "") or "") or None
        self.fresh = frozenset(fresh)
        self.compute_dtype = compute_dtype or model.dtype
        self.stored_dtype = model.dtype  # of the weights as loaded; masters of trained ones may be wider
        self.carries: str | None = None  # the strategy that is injected, if any
        self.open_injection: Injection | None = None  # while a strategy is being placed
        self.restoring = False  # while what is being placed gets its values from a folder
        self._example = example

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        task: str | None = "classification",
        kind: type[PreTrainedModel] | None = None,
        labels: Sequence[str] | None = None,
        dtype: str | torch.dtype = "auto",
        weight_dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        double_quantization: bool = False,
        device: str = "auto",
        seed: int = 0,
    ) -> Backbone:
        """Load a folder, a hub id or a GGUF file for `task` (a key of AUTO_CLASSES), or as a model of `kind`.

        `labels` names the classes in order and sizes the head. `dtype` is what it computes in ("auto": what is fast
        and safe on the device), `weight_dtype` what its weights are kept in (default: the same; "checkpoint": as
        stored). `quantization` ("int8", "nf4", "fp4") stores the blocks' linear layers in 8 or 4 bits while they are
        loaded, `double_quantization` the scales of 4-bit blocks too. A head the checkpoint does not hold is initialised
        from `seed`. A model of `kind` needs no tokenizer.
        Raises BackboneError when nothing can be loaded from there.
        """
        labels = labels or FIXED_LABELS.get(task or "")
        place = choose_device(device)
        compute = choose_dtype(dtype, place) if dtype != "checkpoint" else None
        if weight_dtype is None:
            weights = compute if compute is not None else "auto"
        else:
            weights = "auto" if weight_dtype == "checkpoint" else choose_dtype(weight_dtype, place)
        folder, gguf = locate(path_or_id)
        options: dict[str, Any] = {"dtype": weights, **_gguf_options(gguf)}
        options |= label_options(labels, task)
        if labels is not None:
            options["ignore_mismatched_sizes"] = True
        how = Quantization(quantization, double_quantization) if quantization is not None else None
        maker = kind or auto_class(task, str(path_or_id))
        if how is not None:
            require_kernels(how, place)
        codes: Mapping[str, Any] = {}
        with loading(str(path_or_id)), _seeded(seed):
            tokenizer = read_tokenizer(folder, gguf, required=kind is None, task=task)
            if how is not None and gguf is None:
                options |= quantized_loading(
                    folder, maker, how, compute, place, None if labels is None else len(labels)
                )
            elif gguf is None:
                codes = PreTrainedConfig.get_config_dict(folder)[0].get("quantization_config") or {}
                options |= trainable_kernels(codes)
            with given_back(folder) if how is not None else reading_codes(str(path_or_id), codes):
                model, info = maker.from_pretrained(folder, output_loading_info=True, **options)
        fresh = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        give_padding(model, tokenizer)
        if compute is None:
            compute = model.dtype
        if describe(model) is None:
            model = model.to(place)
            if how is not None:  # what cannot be quantized while it is loaded
                quantize(model, quantizable(model, cls(model, fresh=fresh).anatomy), how, compute)
        return cls(
            model,
            tokenizer=tokenizer,
            task=task,
            source=str(path_or_id),
            fresh=[name for name in fresh if name in dict(model.named_parameters())],
            compute_dtype=compute,
        )

    def renew(self, seed: int) -> None:
        """Initialise again what the checkpoint does not hold, as `load` with this seed does."""
        fresh = {id(tensor) for name, tensor in _tensors(self.model) if name in self.fresh}
        for _, tensor in _tensors(self.model):
            tensor._is_hf_initialized = id(tensor) not in fresh  # type: ignore[attr-defined]
        for module in self.model.modules():
            module._is_hf_initialized = not any(id(tensor) in fresh for _, tensor in _tensors(module))
        with _seeded(seed):
            self.model.initialize_weights()

    @cached_property
    def quantization(self) -> str | None:
        """How the model is quantized ("nf4", "int8", ...), or None."""
        return describe(self.model)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The roles of the model's modules; see `lightsft.anatomy`."""
        return read_anatomy(self.model, self.fresh, self._dry_run[1])

    @property
    def example(self) -> Mapping[str, Any] | None:
        """Keyword arguments for one tiny forward pass, or None where none of those that were tried runs."""
        return self._dry_run[0]

    def examples_of(self, tokens: int, start: int = 0) -> Iterator[Mapping[str, Any]]:
        """Examples to try in turn: so many tokens, where the model takes token ids, then the usual one's first row.

        Another choice of tokens for each `start`. The usual one whole is the last: some models read rows together.
        """
        example = self.example or {}
        if self._example is None and "input_ids" in example and example.keys() == tiny_inputs(self.model).keys():
            yield tiny_inputs(self.model, tokens=tokens, decoder_tokens=tokens, start=start)
        yield {
            name: value[:1] if isinstance(value, Tensor) and value.dim() else value for name, value in example.items()
        }
        yield example

    @property
    def is_large(self) -> bool:
        """Whether reading all weights takes long enough to be noticed."""
        return bool(self.model.num_parameters() > LARGE)

    @cached_property
    def moving_buffers(self) -> list[str]:
        """The saved buffers that a forward pass in training mode changes: running statistics."""
        return find_moving_buffers(self.model, self.example)

    @cached_property
    def _dry_run(self) -> tuple[Mapping[str, Any] | None, Trace | None]:
        """The first example that runs, with what was seen."""
        blocks = tuple(block for stack in find_blocks(self.model) for block in stack)
        if self._example is not None:
            return self._example, trace(self.model, self._example, blocks)
        problems = []
        for inputs in candidate_inputs(self.model):
            try:
                return inputs, self._traced_when_settled(inputs, blocks)
            except Exception as error:  # whatever a model's code raises on inputs that it does not take
                problems.append(f"{type(error).__name__}: {error}")
        logger.warning(
            "no example input runs on %s (%s): its structure alone is used, and strategies are not probed; "
            "give one with Backbone(model, example={...})",
            type(self.model).__name__,
            problems[0] if problems else "none could be made",
        )
        return None, None

    @property
    def head(self) -> frozenset[str]:
        """Parameter names of the task head, which every strategy trains and saves whole."""
        return head_parameters(self.model) | self.fresh

    def _traced_when_settled(self, inputs: Mapping[str, Any], blocks: tuple[str, ...]) -> Trace:
        """The trace of a pass that leaves the modules as they were: some models replace a few on their first input."""
        before = list(self.model.modules())
        seen = self._traced(inputs, blocks)
        return seen if list(self.model.modules()) == before else self._traced(inputs, blocks)

    def _traced(self, inputs: Mapping[str, Any], blocks: tuple[str, ...]) -> Trace:
        """The trace, on a copy without weights where a pass through them takes long and they do not decide anything."""
        if self.is_large:
            with contextlib.suppress(Exception), weightless():  # control flow may depend on what weights hold
                return trace(meta_copy(self.model), _on_cpu(inputs), blocks)
        with self.watchable(inputs) as (model, given):
            return trace(model, given, blocks)

    @contextlib.contextmanager
    def watchable(self, inputs: Mapping[str, Any]) -> Iterator[tuple[PreTrainedModel, Mapping[str, Any]]]:
        """A model to watch a forward pass of, and its inputs: this one; of a quantized one the plain one it stands for.

        Codes have no gradient, and kernels hide what they do. A large one's plain copy has no weights.
        """
        if self.quantization is None:
            yield self.model, inputs
        elif self.is_large:
            with weightless():
                yield meta_copy(self.model), _on_cpu(inputs)
        else:
            yield plain_copy(self.model), inputs

    def module(self, name: str) -> nn.Module:
        """The module with this dotted name."""
        module: nn.Module = self.model.get_submodule(name)
        return module

    @torch.no_grad()
    def cast(self, dtype: torch.dtype) -> None:
        """Keep what is in floating point in this type. Quantized layers stay, with the type that they compute in."""
        layers = set(quantized_layers(self.model).values())
        for module in self.model.modules():
            buffers = () if module in layers else module.buffers(recurse=False)
            for tensor in (*module.parameters(recurse=False), *buffers):
                if is_plain(tensor):
                    tensor.data = tensor.data.to(dtype)
        self.model.config.dtype = dtype
        self.stored_dtype = dtype
        self.compute_dtype = self.compute_dtype if layers else dtype

    def sketch(self) -> dict[str, list[float]]:
        """A few values of a few weights, to tell one backbone from another whatever type it is loaded in.

        Some values of SKETCH_TENSORS matrices, spread evenly over the model, without the head. A model
        without values, on the meta device, has an empty one.
        """
        if self.model.device.type == "meta":
            return {}
        matrices = dict(self._matrices())
        names = [name for name in matrices if name not in self.head and "lightsft" not in name]
        step = max(1, len(names) // SKETCH_TENSORS)
        return {name: _some_values(matrices[name]) for name in names[::step][:SKETCH_TENSORS]}

    def _matrices(self) -> Iterator[tuple[str, Tensor | nn.Module]]:
        """The matrices in the model's order: floating-point parameters, and the quantized layers that hold others."""
        layers = quantized_layers(self.model)
        for name, parameter in self.model.named_parameters():
            if name.rpartition(".")[0] not in layers and parameter.ndim >= 2 and parameter.is_floating_point():
                yield name, parameter
        yield from ((f"{name}.weight", layer) for name, layer in layers.items())

    def differences(self, sketch: dict[str, list[float]]) -> list[str]:
        """How this backbone differs from the one that `sketch` was taken of; empty when it is the same."""
        parameters = dict(self._matrices())
        missing = [f"no weight named {name}" for name in sketch if name not in parameters]
        return missing + [
            f"{name} holds other values"
            for name, expected in sketch.items()
            if name in parameters
            and not same_values(torch.tensor(_some_values(parameters[name])), torch.tensor(expected))
        ]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _on_cpu(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _some_values(held: Tensor | nn.Module) -> list[float]:
    """Of a matrix, or of the one that a quantized layer stands for."""
    flat = (dequantized(held) if isinstance(held, nn.Module) else held.detach()).flatten()
    positions = sketched(flat.numel())
    picked = flat[positions.start : positions.stop : positions.step]
    return [float(value) for value in picked.float().cpu()]


def quantized_loading(
    folder: str, maker: Any, how: Quantization, compute: torch.dtype | None, place: torch.device, labels: int | None
) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize layer by layer while loading; what stays is found on a model without
    weights."""
    config = AutoConfig.from_pretrained(folder, **({} if labels is None else {"num_labels": labels}))
    if getattr(config, "quantization_config", None) is not None:
        raise BackboneError(
            f"{folder} is quantized already ({config.quantization_config.get('quant_method', 'by an unnamed method')})",
            expected=f"a checkpoint in floating point to quantize to {how}",
            todo="leave the quantization out, or load the model that it was made of",
        )
    with weightless():
        model = maker.from_config(config) if hasattr(maker, "from_config") else maker(config)
        chosen = set(quantizable(model, Backbone(model).anatomy))
    kept = [name for name, module in model.named_modules() if is_linear(module) and name not in chosen]
    logger.info("%s: %d linear layers; kept as they are: %s", how, len(chosen), ", ".join(kept) or "none")
    dtype = compute or getattr(config, "dtype", None) or torch.float32
    return {"quantization_config": how.settings(dtype, kept), "device_map": {"": place}}


def locate(path_or_id: str | Path) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name or None) of what was asked for."""
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"no file {path}", expected="a GGUF file, a folder or a hub id")
        return str(path.parent), path.name
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if not (path / "config.json").exists():
            if len(files) == 1:
                return str(path), files[0]
            raise BackboneError(
                f"{path} holds no config.json" + (f" and {len(files)} GGUF files" if files else ""),
                expected="a transformers checkpoint folder, or one GGUF file",
                todo=f"name one: {path / files[0]}" if files else "check the path",
            )
        return str(path), None
    if str(path_or_id).startswith((".", "/", "~")) or str(path_or_id).count("/") > 1:
        raise BackboneError(
            f"no folder {path_or_id}", expected="a folder, a GGUF file or a hub id", todo="check the path"
        )
    return str(path_or_id), None


def _gguf_options(gguf: str | None) -> dict[str, Any]:
    if gguf is None:
        return {}
    options: dict[str, Any] = {"gguf_file": gguf}
    config = getattr(transformers, "GgufConfig", None)
    if config is not None:
        options["quantization_config"] = config(dequantize=True)
    return options


def label_options(labels: Sequence[str] | None, task: str | None = None) -> dict[str, Any]:
    """What a configuration is to say of a head's classes, and of what they mean."""
    labels = labels or FIXED_LABELS.get(task or "")
    if labels is None:
        return {}
    ids = {label: index for index, label in enumerate(labels)}
    meaning = {"problem_type": PROBLEM_TYPES[task]} if task in PROBLEM_TYPES else {}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": ids, **meaning}


def auto_class(task: str | None, folder: str | None = None, *, both_ways: bool | None = None) -> Any:
    """The auto class of transformers that makes models for a task.

    For text to text a decoder alone serves as well, and for vectors an encoder alone is enough; which it is, is read
    from the checkpoint's `folder`, unless `both_ways` says whether it is an encoder with a decoder.
    """
    if task not in AUTO_CLASSES:
        raise BackboneError(f"no task named {task!r}", expected=f"one of {', '.join(AUTO_CLASSES)}")
    name = AUTO_CLASSES[task]
    if name in ("AutoModel", "AutoModelForSeq2SeqLM"):
        both = reads_both_ways(folder) if both_ways is None and folder is not None else both_ways
        if both and name == "AutoModel":
            name = "AutoModelForTextEncoding"
        if both is False and name == "AutoModelForSeq2SeqLM":
            name = "AutoModelForCausalLM"
    return getattr(transformers, name)


def reads_both_ways(path_or_id: str) -> bool:
    """Whether a checkpoint is an encoder with a decoder."""
    folder, gguf = locate(path_or_id)
    if gguf is not None:
        return False
    with loading(path_or_id):
        return bool(AutoConfig.from_pretrained(folder).is_encoder_decoder)


def read_tokenizer(folder: str, gguf: str | None, *, required: bool, task: str | None = None) -> Any:
    """The tokenizer of a checkpoint, or what takes its place for images and sounds; None where there is none and it
    is not `required`."""
    reader = getattr(transformers, PROCESSORS.get(task or "", "AutoTokenizer"))
    try:
        return reader.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except (OSError, ValueError, KeyError):
        if required:
            raise
        return None


def give_padding(model: PreTrainedModel, tokenizer: Any) -> None:
    """A tokenizer without a padding token pads with its end token, and the model is told: batches need one."""
    if tokenizer is None or not hasattr(tokenizer, "pad_token_id"):
        return
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def loading(path_or_id: str) -> Iterator[None]:
    """Quiet loading (missing heads are expected, and reported by us), with transformers' errors made readable."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BackboneError(
            f"cannot load a model from {path_or_id!r}: {first_line(error)}",
            expected="a transformers checkpoint folder, a GGUF file, or a hub id that can be reached",
            todo="check the path; a hub id needs a network connection or a filled cache",
        ) from error


def load_tokenizer(path_or_id: str, task: str | None = None) -> Any:
    """The tokenizer of a checkpoint, or what takes its place for images and sounds, without its weights."""
    folder, gguf = locate(path_or_id)
    with loading(path_or_id):
        return read_tokenizer(folder, gguf, required=True, task=task)
