"""Images: handwritten digits of 8 x 8 pixels, read by a vision transformer of 0.1 million parameters made from nothing.

    pip install scikit-learn 'lightsft[images]'
    python examples/digits.py

The images are real (1,797 of them, in scikit-learn). No vision transformer ships in a package, so all weights are
trained.

Measured with seed 0, 1443 rows: accuracy 0.113 before, 0.975 after, 0.085 for the most frequent digit; macro_f1 0.060
before, 0.976 after, 0.016 for the most frequent digit.
"""

from __future__ import annotations

import transformers
from common import Scores, fine_tune, show, start
from PIL import Image
from sklearn.datasets import load_digits

import lightsft
from lightsft import Backbone
from lightsft.data.splits import at_most, split_rows
from lightsft_adapters import Full


def main(rows: int, epochs: float, seed: int) -> Scores:
    """Accuracy on digits that are not trained on."""
    digits = load_digits()
    images = (digits.images / 16 * 255).astype("uint8")
    data = [{"image": Image.fromarray(i), "label": int(label)} for i, label in zip(images, digits.target, strict=True)]
    task = lightsft.task("image-classification", labels=range(10))
    splits = split_rows(data, task.key, validation=0.0, test=0.2)
    train = at_most(splits.train, rows, task.key)
    transformers.set_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_labels=10,
    )  # fmt: skip
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    model = transformers.ViTForImageClassification(config)
    backbone = Backbone(model, tokenizer=processor, task=task.name)
    before, after = fine_tune(
        task, backbone, Full(), train, splits.test, epochs=epochs, seed=seed, batch_size=32, learning_rate=1e-3
    )
    return show(before, after, ["accuracy", "macro_f1"], task.baseline(train, splits.test))


if __name__ == "__main__":
    start(main, __doc__, rows=1500, epochs=15)
