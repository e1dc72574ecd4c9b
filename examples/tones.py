"""Sounds: sine, square, sawtooth or noise, heard by a Wav2Vec2 of 0.1 million parameters made from nothing.

    pip install 'lightsft[audio]'
    python examples/tones.py

The sounds are made here, so the truth is known: a quarter of a second at a pitch between 150 and 600 Hz, at any phase
and loudness, under noise, at 8, 16 or 22.05 kHz. No set of recordings ships in a package.

Measured with seed 0, 600 rows: accuracy 0.230 before, 0.995 after, 0.250 for always the same; macro_f1 0.136 before,
0.995 after, 0.100 for always the same.
"""

from __future__ import annotations

import numpy as np
import transformers
from common import Scores, fine_tune, show, start

import lightsft
from lightsft import Backbone
from lightsft.data.parts import Row
from lightsft_adapters import Full

SHAPES = ("noise", "sawtooth", "sine", "square")


def sounds(number: int, seed: int) -> list[Row]:
    """{audio, label} of so many sounds, as many of each shape."""
    chance, rows = np.random.default_rng(seed), []
    for index in range(number):
        rate, shape = int(chance.choice([8000, 16000, 22050])), SHAPES[index % len(SHAPES)]
        turns = (chance.uniform(150, 600) * np.arange(rate // 4) / rate + chance.random()) % 1
        sine = np.sin(2 * np.pi * turns)
        wave = {
            "noise": chance.normal(size=len(turns)),
            "sawtooth": 2 * turns - 1,
            "sine": sine,
            "square": np.sign(sine),
        }
        array = chance.uniform(0.1, 0.9) * (wave[shape] + chance.normal(size=len(turns)) * 0.2)
        rows.append({"audio": {"array": array.astype("float32"), "sampling_rate": rate}, "label": shape})
    return rows


def main(rows: int, epochs: float, seed: int) -> Scores:
    """Accuracy on sounds that are not trained on."""
    task = lightsft.task("audio-classification", labels=SHAPES)
    train, test = sounds(rows, seed=1), sounds(200, seed=2)
    transformers.set_seed(seed)
    config = transformers.Wav2Vec2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, conv_dim=(32, 32, 32),
        conv_kernel=(16, 8, 4), conv_stride=(8, 4, 4), num_feat_extract_layers=3, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, feat_extract_norm="layer", classifier_proj_size=32, num_labels=len(SHAPES),
        apply_spec_augment=False, vocab_size=32,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    backbone = Backbone(model, tokenizer=extractor, task=task.name)
    before, after = fine_tune(
        task, backbone, Full(), train, test, epochs=epochs, seed=seed, batch_size=16, learning_rate=1e-3
    )
    return show(before, after, ["accuracy", "macro_f1"], task.baseline(train, test))


if __name__ == "__main__":
    start(main, __doc__, rows=600, epochs=10)
