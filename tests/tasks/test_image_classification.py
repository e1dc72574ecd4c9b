"""Images: every form that a cell may have gives the same pixels, and what is no image is found before training."""

from io import BytesIO

import numpy as np
import pytest
import torch
import transformers

import lightsft
from lightsft.tasks.image_classification import ImageClassification
from tests.checkpoints import LABELS

Image = pytest.importorskip("PIL.Image")
TASK = lightsft.task("image-classification", labels=LABELS)


@pytest.fixture(scope="module")
def processor():
    """Resizes to 16 x 16 and normalises."""
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    return kind(size={"height": 16, "width": 16})


@pytest.fixture
def picture():
    """24 x 20 pixels in colour."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))


def as_bytes(image, kind="PNG", **options):
    """The image as a file's content."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(cell, processor):
    """(channels, height, width) of one image."""
    return TASK.collate(TASK.encode([{"image": cell, "label": "pos"}], processor), processor)["pixel_values"][0]


def test_every_form_of_an_image_gives_the_same_pixels(picture, processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(as_bytes(picture))
    forms = [picture, str(path), path, {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    expected = processor([picture], return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (3, 16, 16)
    for form in forms:
        row = {"image": form, "label": "pos"}
        assert not list(TASK.problems(row))
        torch.testing.assert_close(pixels_of(form, processor), expected)
    assert len({TASK.key({"image": form}) for form in (picture, forms[1], forms[3])}) == 3
    assert TASK.key({"image": picture}) == TASK.key({"image": picture.copy()})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_images_of_every_mode_have_three_channels(picture, processor, mode):
    converted = picture.convert(mode)
    expected = processor([converted.convert("RGB")], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels_of(converted, processor), expected)
    if mode == "L":
        assert torch.equal(*pixels_of(converted, processor)[:2])


def test_a_photograph_is_turned_as_it_was_held(picture, processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    cell = {"bytes": as_bytes(turned, "PNG", exif=exif)}
    torch.testing.assert_close(pixels_of(cell, processor), pixels_of(picture, processor))


def test_a_batch_has_the_labels_beside_the_pixels(picture, processor):
    rows = [{"image": picture, "label": "pos"}, {"image": picture.resize((9, 30)), "label": "neg"}]
    features = TASK.encode(rows, processor)
    batch = TASK.collate(features, processor)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [1, 0]
    assert [TASK.length(feature) for feature in features] == [1, 1]


def test_the_loss_is_transformers_own(picture, processor):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=2)
    model = transformers.ViTForImageClassification(config).eval()
    batch = TASK.collate(TASK.encode([{"image": picture, "label": label} for label in LABELS], processor), processor)
    inputs = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        outputs = TASK.forward(model, inputs, batch["labels"])
        torch.testing.assert_close(TASK.loss(outputs, batch["labels"]), model(**batch).loss)
    outcomes = TASK.outcomes(outputs, batch["labels"])
    assert outcomes.shape == (2, 3)
    assert TASK.metrics(outcomes.numpy())["accuracy"] == 0.5  # the same image with both labels


def planted(picture, folder):
    """What is no image, each in its own way."""
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(as_bytes(picture.resize((200, 200)), "JPEG")[:1500])
    (folder / "cut.png").write_bytes(as_bytes(picture)[:200])
    return {
        "no file": str(folder / "absent.png"),
        "a folder": str(folder),
        "a text": str(folder / "text.png"),
        "an empty file": str(folder / "empty.png"),
        "a jpeg that is cut": str(folder / "cut.jpg"),
        "a png that is cut": str(folder / "cut.png"),
        "bytes of nothing": {"bytes": b"no image", "path": None},
        "neither bytes nor path": {"url": "x"},
        "a number": 3.5,
        "nothing": None,
    }


@pytest.mark.parametrize(
    "kind",
    ["no file", "a folder", "a text", "an empty file", "a jpeg that is cut", "a png that is cut", "bytes of nothing",
     "neither bytes nor path", "a number", "nothing"],
)  # fmt: skip
def test_what_is_no_image_is_a_problem(kind, picture, tmp_path):
    row = {"image": planted(picture, tmp_path)[kind], "label": "pos"}
    (problem,) = TASK.problems(row)
    assert (problem.code, problem.severity) == ("broken_file", "error")
    assert "'image'" in problem.found


@pytest.mark.parametrize(
    ("label", "code"), [(None, "empty_cell"), ("meh", "unknown_label"), (["pos", "neg"], "several_labels")]
)
def test_each_problem_of_a_label_has_its_name(picture, label, code):
    assert [problem.code for problem in TASK.problems({"image": picture, "label": label})] == [code]


def test_columns_and_labels_are_found(picture, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(as_bytes(picture))
    rows = [{"img": str(path), "class": name} for name in ("cat", "dog", "cat", "dog")]
    task = ImageClassification.for_rows(rows, "folder")
    assert (task.image, task.label, task.labels) == ("img", "class", ("cat", "dog"))
    assert lightsft.task(**task.describe()) == task


def test_the_preview_names_the_image_and_its_size(picture, processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(as_bytes(picture))
    assert TASK.preview({"image": str(path), "label": "neg"}, processor) == [(f"{path} 24 x 20", False), ("neg", True)]
