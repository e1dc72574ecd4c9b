"""A toy that translates: Swedish questions about building to English, by a small T5 made from nothing.

    pip install --no-deps zaragoza-construction-faq
    python examples/translation.py

No translation model ships in a package, and some 400 pairs do not make one: it learns the phrases of these questions
("Vad kostar ...?") and gets the subject wrong. What it shows is the whole way of an encoder with a decoder: vocabulary,
training, beam search, scores. Beside the scores stand those of the Swedish question left as it is.

Measured with seed 0, 400 rows: bleu 0.000 before, 9.019 after, 1.496 for the Swedish left as it is; chrf 2.395
before, 22.111 after, 16.694 for the Swedish left as it is.
"""

from __future__ import annotations

import transformers
from common import Scores, fine_tune, show, start
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import lightsft
from lightsft import Backbone
from lightsft.data.shipped import questions
from lightsft.data.splits import at_most, split_rows
from lightsft.metrics.generation import text_scores, text_statistics
from lightsft_adapters import Full


def tokenizer_of(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level vocabulary of both languages, learned from the training texts."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", model_max_length=128
    )


def main(rows: int, epochs: float, seed: int, num_beams: int = 4) -> Scores:
    """chrF and BLEU of questions that are not trained on."""
    task = lightsft.task(
        "seq2seq", source="question_sv", target="question_en", max_length=64, max_target_length=64,
        generate=40, num_beams=num_beams, label_smoothing=0.1,
    )  # fmt: skip
    splits = split_rows(questions(), task.key, validation=0.0, test=0.2)
    train = at_most(splits.train, rows, task.key)
    tokenizer = tokenizer_of([text for row in train for text in (row["question_sv"], row["question_en"])])
    transformers.set_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.2,
    )  # fmt: skip
    backbone = Backbone(transformers.T5ForConditionalGeneration(config), tokenizer=tokenizer, task=task.name)
    left = [row["question_sv"] for row in splits.test]
    copied = text_scores(text_statistics(left, [row["question_en"] for row in splits.test]))
    before, after = fine_tune(task, backbone, Full(), train, splits.test, epochs=epochs, seed=seed, learning_rate=2e-3)
    print(f"loss per token: {before['loss']:.3f} -> {after['loss']:.3f}")
    return show(before, after, ["bleu", "chrf"], copied)


if __name__ == "__main__":
    start(main, __doc__, rows=400, epochs=40)
