"""Tiny models of every architecture in the configuration files beside, and inputs that fit them; without lightsft.

    entry = entries()[0]
    model = build(entry)
    loss_of(model(**make_inputs(entry, model))).backward()

An entry is a (task, model type) pair with the configuration's arguments and the shapes of its inputs. What some
types ask for beyond token ids, pixels or sound is a function of their own below: inputs are data, so they may be
chosen by name.
"""

import json
import random
from pathlib import Path

import numpy
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CONFIGURATIONS = [Path(__file__).with_name(name) for name in ("tiny_configs.json", "more_configs.json")]
LENGTH, ROWS, VOCABULARY, LABELS, IMAGE_SIZE = 16, 2, 160, 3, 32
FRAMES, SAMPLES = 64, 3200
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq-cls": "AutoModelForSequenceClassification",
    "token-cls": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-cls": "AutoModelForImageClassification",
    "audio-cls": "AutoModelForAudioClassification",
    "ctc": "AutoModelForCTC",
}


def entries():
    """Every architecture of the zoo: dictionaries with task, model_type, model_class, config, inputs, n_params."""
    return [entry for file in CONFIGURATIONS for entry in json.loads(file.read_text())["models"]]


def find(task, model_type):
    """One entry."""
    return next(entry for entry in entries() if (entry["task"], entry["model_type"]) == (task, model_type))


def auto_class(entry):
    """The transformers auto class of an entry's task."""
    return getattr(transformers, AUTO_CLASSES[entry["task"]])


def build(entry, **options):
    """The model in fp32 and eval mode; the same bits each time."""
    config = CONFIG_MAPPING[entry["model_type"]](**json.loads(json.dumps(entry["config"])))
    seed_everything()
    model = auto_class(entry).from_config(config, dtype=torch.float32, **options).float().eval()
    _fill_zero_matrices(model)
    return model


def _fill_zero_matrices(model):
    """Some projections start at zero, so that untrained blocks pass their input on; no checkpoint's stay so."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)


def seed_everything():
    """Dropout draws from torch, SpecAugment from numpy, big bird's random attention from random."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def forward(model, inputs):
    """One forward pass on a copy of the inputs, with the same random numbers each time."""
    seed_everything()
    copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return model(**copies)


def logits(model, inputs):
    """What the model predicts, in eval mode and without a gradient."""
    model.eval()
    with torch.no_grad():
        return logits_of(forward(model, inputs))


def logits_of(output):
    """The tensor a model predicts with; of question answering, start and end."""
    if "start_logits" in output and "end_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]]).detach()
    for name in ("logits", "question_answering_score", "start_top_log_probs", "probabilities", "prediction_logits"):
        if isinstance(output.get(name), torch.Tensor):
            return output[name].detach()
    raise ValueError(f"no logits among {', '.join(output)}")


def loss_of(output):
    """The loss as one number; a safety classifier without one is trained on the size of its logits."""
    if output.get("loss") is None and "probabilities" in output:
        return output.logits.pow(2).mean()
    return output.loss.mean()


def make_inputs(entry, model):
    """Keyword arguments for one forward pass with labels, the same each time."""
    task, kind, config, draw = entry["task"], entry["model_type"], model.config, _Draw()
    if task == "image-cls":
        return _image_inputs(kind, config, draw)
    if task in ("audio-cls", "ctc"):
        labels = draw.integers(0, LABELS, ROWS) if task == "audio-cls" else draw.integers(3, 20, ROWS, 4)
        return _audio_inputs(kind, config, draw, model.main_input_name) | {"labels": labels}
    if kind in ("musicgen", "musicgen_melody"):
        return _codebook_inputs(config, draw)
    return _text_inputs(task, kind, config, draw)


class _Draw:
    """Seeded random tensors."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1234)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator)


# ---- images


def _image_inputs(kind, config, draw):
    if kind == "imagegpt":
        return {"input_ids": draw.integers(0, 100, ROWS, LENGTH), "labels": draw.integers(0, LABELS, ROWS)}
    if kind == "siglip2":
        return _patch_inputs(draw)
    if kind == "shieldgemma2":
        return _ids_and_mask(draw.integers(20, VOCABULARY, ROWS, LENGTH))
    pixels = draw.normal(ROWS, _number(config, "num_channels") or 3, *_image_size(config))
    return {_pixels_name(kind): pixels, "labels": draw.integers(0, LABELS, ROWS)}


def _pixels_name(kind):
    return "inputs" if kind == "perceiver" else "pixel_values"


def _image_size(config):
    """(height, width), of the model or of its vision tower."""
    for place in (config, getattr(config, "vision_config", config)):
        size = getattr(place, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple):
            return tuple(size)
    return IMAGE_SIZE, IMAGE_SIZE


def _patch_inputs(draw):
    """16 patches of 8 by 8 pixels, with the grid they come from."""
    return {
        "pixel_values": draw.normal(ROWS, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
        "labels": draw.integers(0, LABELS, ROWS),
    }


# ---- sound


def _audio_inputs(kind, config, draw, main_input):
    """Waveforms (rows, samples) or spectrograms (rows, frames, bins), whichever the model reads."""
    if kind == "audio-spectrogram-transformer":
        return {"input_values": draw.normal(ROWS, config.max_length, config.num_mel_bins)}
    if main_input != "input_features":
        return {"input_values": draw.normal(ROWS, SAMPLES)}
    if kind == "whisper":
        return {"input_features": draw.normal(ROWS, config.num_mel_bins, 2 * config.max_source_positions)}
    bins = 64 if kind == "granite_speech5_ctc" else _spectrogram_bins(config)
    inputs = {"input_features": draw.normal(ROWS, FRAMES, bins)}
    if kind.endswith("_ctc"):
        inputs["attention_mask"] = torch.ones(ROWS, FRAMES, dtype=torch.long)
    return inputs


def _spectrogram_bins(config):
    encoder = getattr(config, "encoder_config", config)
    found = [_number(config, "feature_projection_input_dim")]
    found += [_number(place, name) for place in (config, encoder) for name in ("num_mel_bins", "input_dim")]
    return next((bins for bins in found if bins is not None), 16)


# ---- text


def _text_inputs(task, kind, config, draw):
    vocabulary, length = _vocabulary(kind, config), _length(kind, config)
    inputs = _ids_and_mask(draw.integers(20 if vocabulary > 40 else 1, vocabulary, ROWS, length))
    if task == "seq-cls" and _number(config, "eos_token_id") is not None and config.is_encoder_decoder:
        inputs["input_ids"][:, -1] = config.eos_token_id  # these classifiers read the state at the one end token
    if kind in _MORE:
        inputs = _MORE[kind](task, config, inputs, draw)
    if "labels" in inputs:
        return inputs
    return inputs | _text_labels(task, kind, config, inputs["input_ids"], vocabulary, draw)


def _ids_and_mask(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _text_labels(task, kind, config, ids, vocabulary, draw):
    rows, length = ids.shape
    if task == "seq-cls":
        return {"labels": draw.integers(0, LABELS, rows)}
    if task == "token-cls":
        return {"labels": draw.integers(0, LABELS, rows, length)}
    if task == "qa":
        start, end = draw.integers(0, length // 2, rows), draw.integers(length // 2, length, rows)
        return {"start_positions": start, "end_positions": end}
    if task == "seq2seq" and config.is_encoder_decoder:
        return {"labels": draw.integers(20, vocabulary, rows, length)}
    return {"labels": ids.clone()}


def _vocabulary(kind, config):
    if kind == "fsmt":
        return min(config.src_vocab_size, config.tgt_vocab_size)
    return _number(config.get_text_config(), "vocab_size") or _number(config, "vocab_size") or VOCABULARY


def _length(kind, config):
    return config.max_position_embeddings if kind == "perceiver" else LENGTH


def _codebook_inputs(config, draw):
    """Music: one row of codes per codebook, (rows * codebooks, length)."""
    decoder = getattr(config, "decoder", config)
    vocabulary, books = _vocabulary(config.model_type, decoder), decoder.num_codebooks
    return {
        "input_ids": draw.integers(0, vocabulary, ROWS * books, LENGTH),
        "labels": draw.integers(0, vocabulary, ROWS, LENGTH, books),
    }


def _number(config, name):
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---- what some types take beside, or instead of, the usual ids


def _bytes(task, config, inputs, draw):
    """Code points or bytes rather than a vocabulary."""
    return inputs | {"input_ids": draw.integers(20, 1000, *inputs["input_ids"].shape)}


def _byte_patches(task, config, inputs, draw):
    return inputs | {"input_ids": draw.integers(20, 150, *inputs["input_ids"].shape), "use_cache": False}


def _no_cache(task, config, inputs, draw):
    return inputs | {"use_cache": False}


def _no_mask(task, config, inputs, draw):
    return {"input_ids": inputs["input_ids"]}


def _visual_objects(task, config, inputs, draw):
    """Five objects with features and boxes, and an answer among the configured ones."""
    return inputs | {
        "visual_feats": draw.normal(ROWS, 5, config.visual_feat_dim),
        "visual_pos": draw.uniform(ROWS, 5, config.visual_pos_dim),
        "labels": draw.integers(0, config.num_qa_labels, ROWS),
    }


def _boxes(task, config, inputs, draw):
    """The same box on the page for every token."""
    box = torch.tensor([1, 2, 5, 9])
    return inputs | {"bbox": box.expand(*inputs["input_ids"].shape, 4).clone()}


def _float_boxes(task, config, inputs, draw):
    boxed = _boxes(task, config, inputs, draw)
    return boxed | {"bbox": boxed["bbox"] / 10}


def _boxes_and_image(task, config, inputs, draw):
    return _boxes(task, config, inputs, draw) | {"image": draw.integers(0, 255, ROWS, 3, 32, 32).float()}


def _boxes_and_pixels(task, config, inputs, draw):
    return _boxes(task, config, inputs, draw) | {"pixel_values": draw.normal(ROWS, 3, 32, 32)}


def _question_mark(task, config, inputs, draw):
    inputs["input_ids"][:, 3] = config.question_token_id
    return inputs


def _separated_question(task, config, inputs, draw):
    """A question, three separators, a text: global attention goes to the question."""
    if task == "qa":
        inputs["input_ids"][:, [4, 10, 11]] = config.sep_token_id
        inputs["input_ids"][:, 5:7] = 30
    return inputs


def _answerable(task, config, inputs, draw):
    if task != "qa":
        return inputs
    return inputs | {"is_impossible": torch.zeros(ROWS), "cls_index": torch.zeros(ROWS, dtype=torch.long)}


def _spectrogram_frames(task, config, inputs, draw):
    """Eight frames of sound per token."""
    frames = inputs["input_ids"].shape[1] * 8
    return inputs | {"input_features": draw.normal(ROWS, config.audio_config.num_mel_bins, frames)}


def _tower_pixels(task, config, inputs, draw):
    """A picture: this loss slices off the positions of one."""
    size = config.vision_config.image_size
    return inputs | {"pixel_values": draw.normal(ROWS, 3, size, size)}


_MORE = {
    "blt": _byte_patches,
    "bros": _float_boxes,
    "canine": _bytes,
    "cpmant": _no_mask,
    "git": _tower_pixels,
    "layoutlm": _boxes,
    "layoutlmv2": _boxes_and_image,
    "layoutlmv3": _boxes_and_pixels,
    "lilt": _boxes,
    "longformer": _separated_question,
    "lxmert": _visual_objects,
    "splinter": _question_mark,
    "voxtral_realtime": _spectrogram_frames,
    "xlnet": _answerable,
    "xlstm": _no_cache,
}
