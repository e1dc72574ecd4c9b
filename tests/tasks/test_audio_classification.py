"""Sounds: every form of a cell, channels, rates and lengths; what is no sound is found before training."""

import numpy as np
import pytest
import torch
import transformers

import lightsft
from lightsft.tasks.audio_classification import SHORTEST, AudioClassification, resampled, samples_of
from tests.checkpoints import LABELS

soundfile = pytest.importorskip("soundfile")
TASK = lightsft.task("audio-classification", labels=LABELS)
RATE = 16000


def tone(hertz, rate, seconds=0.5):
    """A sine of half the loudness."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def loudest(samples, rate):
    """The frequency with the most energy, in Hz, to the width of a bin."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.fft.rfftfreq(len(samples), 1 / rate)[spectrum.argmax()]


@pytest.fixture(scope="module")
def extractor():
    """Of a Wav2Vec2: samples as they are, padded on demand."""
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)


def heard(cell, extractor, task=TASK):
    """(samples,) that the model gets of one sound alone."""
    return task.collate(task.encode([{"audio": cell, "label": "pos"}], extractor), extractor)["input_values"][0]


# ---- forms


def test_every_form_of_a_sound_gives_the_same_samples(extractor, tmp_path):
    sound, path = tone(440, RATE), tmp_path / "a.wav"
    soundfile.write(path, sound, RATE, subtype="FLOAT")
    forms = [
        str(path),
        path,
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
        {"array": sound, "sampling_rate": RATE},
        {"array": sound.tolist(), "sampling_rate": RATE, "path": "x"},
    ]
    for form in forms:
        assert not list(TASK.problems({"audio": form, "label": "pos"}))
        torch.testing.assert_close(heard(form, extractor), torch.tensor(sound))
        assert TASK.key({"audio": form})


def test_channels_are_averaged(extractor, tmp_path):
    left, right = tone(440, RATE), tone(1000, RATE)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    expected = torch.tensor((left + right) / 2)
    torch.testing.assert_close(heard(str(tmp_path / "a.wav"), extractor), expected)
    torch.testing.assert_close(heard({"array": np.stack([left, right]), "sampling_rate": RATE}, extractor), expected)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_whole_numbers_are_brought_to_the_range_of_files(dtype):
    sound = tone(440, RATE)
    whole = (sound.astype(float) * np.iinfo(dtype).max).astype(dtype)
    samples, _ = samples_of({"array": whole, "sampling_rate": RATE})
    np.testing.assert_allclose(samples, sound, atol=1e-4)


# ---- rates and lengths


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
@pytest.mark.parametrize("hertz", [300, 1234, 3000])
def test_a_sine_keeps_its_frequency_and_loudness_at_another_rate(rate, hertz):
    sound = resampled(tone(hertz, rate), rate, RATE)
    assert len(sound) == pytest.approx(RATE / 2, abs=2)
    assert loudest(sound, RATE) == pytest.approx(hertz, abs=2.1)
    middle = sound[1000:-1000]
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, rel=0.02)


def test_what_the_new_rate_cannot_hold_is_filtered_out():
    sound = resampled(tone(10000, 48000), 48000, RATE)  # folded back, it would be heard at 6000 Hz
    assert np.abs(sound[500:-500]).max() < 0.01


def test_a_sound_is_cut_to_its_longest_at_any_rate(extractor):
    task = lightsft.task("audio-classification", labels=LABELS, max_seconds=0.25)
    for rate in (8000, RATE, 44100):
        assert len(heard({"array": tone(440, rate), "sampling_rate": rate}, extractor, task)) == RATE // 4


def test_a_short_sound_is_followed_by_silence(extractor):
    sound = heard({"array": tone(440, RATE, 0.01), "sampling_rate": RATE}, extractor)
    assert len(sound) == SHORTEST * RATE
    torch.testing.assert_close(sound[:160], torch.tensor(tone(440, RATE, 0.01)))
    assert not sound[160:].any()


def test_a_batch_is_padded_with_its_labels_beside_it(extractor):
    cells = [{"array": tone(440, RATE, seconds), "sampling_rate": RATE} for seconds in (0.5, 0.2)]
    rows = [{"audio": cell, "label": label} for cell, label in zip(cells, LABELS, strict=True)]
    features = TASK.encode(rows, extractor)
    batch = TASK.collate(features, extractor)
    assert batch["input_values"].shape == (2, 8000)
    assert batch["attention_mask"].sum(1).tolist() == [8000, 3200]
    assert batch["labels"].tolist() == [0, 1]
    assert [TASK.length(feature) for feature in features] == [1, 1]


# ---- models


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def wav2vec2():
    """Reads samples; its first layers want 400 of them at once."""
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        classifier_proj_size=8, num_labels=2, vocab_size=32, apply_spec_augment=False,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config), transformers.Wav2Vec2FeatureExtractor(
        return_attention_mask=True
    )


def whisper():
    """Reads spectrograms of a fixed length."""
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, decoder_layers=1, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=80, max_source_positions=100, num_labels=2,
        classifier_proj_size=8, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForAudioClassification(config), transformers.WhisperFeatureExtractor(chunk_length=2)


def ast():
    """Reads spectrograms as images."""
    config = transformers.ASTConfig(**SIZES, max_length=64, num_mel_bins=32, num_labels=2, patch_size=16)
    return transformers.ASTForAudioClassification(config), transformers.ASTFeatureExtractor(
        max_length=64, num_mel_bins=32
    )


@pytest.mark.parametrize("maker", [wav2vec2, whisper, ast], ids=lambda maker: maker.__name__)
def test_sounds_of_any_length_reach_every_kind_of_model(maker):
    torch.manual_seed(0)
    model, extractor = maker()
    rows = [
        {"audio": {"array": tone(440, rate, seconds), "sampling_rate": rate}, "label": label}
        for (rate, seconds), label in zip(((RATE, 0.5), (8000, 0.003)), LABELS, strict=True)
    ]
    batch = TASK.collate(TASK.encode(rows, extractor), extractor)
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = TASK.forward(model.eval(), batch, labels)
        expected = model(**batch, labels=labels).loss
    assert outputs.logits.isfinite().all()
    torch.testing.assert_close(TASK.loss(outputs, labels), expected)
    assert TASK.outcomes(outputs, labels).shape == (2, 3)


# ---- rows


@pytest.mark.parametrize(
    "kind", ["no file", "a text", "an empty file", "no samples", "no rate", "bytes of nothing", "a number", "nothing"]
)
def test_what_is_no_sound_is_a_problem(kind, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0, dtype=np.float32), RATE)
    cell = {
        "no file": str(tmp_path / "absent.wav"),
        "a text": str(tmp_path / "text.wav"),
        "an empty file": str(tmp_path / "empty.wav"),
        "no samples": str(tmp_path / "silent.wav"),
        "no rate": {"array": [0.0, 0.1]},
        "bytes of nothing": {"bytes": b"no sound", "path": None},
        "a number": 3.5,
        "nothing": None,
    }[kind]
    (problem,) = TASK.problems({"audio": cell, "label": "pos"})
    assert (problem.code, problem.severity) == ("broken_file", "error")


@pytest.mark.parametrize(
    ("label", "code"), [(None, "empty_cell"), ("meh", "unknown_label"), (["pos", "neg"], "several_labels")]
)
def test_each_problem_of_a_label_has_its_name(label, code):
    row = {"audio": {"array": tone(440, RATE), "sampling_rate": RATE}, "label": label}
    assert [problem.code for problem in TASK.problems(row)] == [code]


def test_columns_and_labels_are_found(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(440, RATE), RATE)
    rows = [{"sound": str(tmp_path / "a.wav"), "class": name} for name in ("cat", "dog", "cat", "dog")]
    task = AudioClassification.for_rows(rows, "folder", max_seconds=2)
    assert (task.audio, task.label, task.labels, task.max_seconds) == ("sound", "class", ("cat", "dog"), 2)
    assert lightsft.task(**task.describe()) == task


def test_the_preview_names_the_sound_and_its_length(extractor, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(440, 8000), 8000)
    pieces = TASK.preview({"audio": str(path), "label": "neg"}, extractor)
    assert pieces == [(f"{path} 0.50 s at 8000 Hz", False), ("neg", True)]
