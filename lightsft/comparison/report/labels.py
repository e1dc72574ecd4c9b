"""Names beside points, placed so that they cover neither each other nor the marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightsft.comparison.report.drawing import HEIGHT, WIDTH

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Mark = tuple[float, float, float, float]  # x, y, top and bottom of its interval in pixels
Place = tuple[float, float, str]  # x and y of a text in pixels, and its alignment
LETTER_WIDTH, LINE_HEIGHT = 6.8, 14.0  # pixels of one letter at 12 px


def place_labels(
    names: Sequence[str], numbers: Sequence[str], marks: Sequence[Mark], taken: Iterable[Box]
) -> tuple[list[tuple[str, Place]], bool]:
    """A text and a place for each mark: its name, or its number where the names would collide.

    Returns also whether the names fitted.
    """
    boxes = [*taken]
    for x, y, top, bottom in marks:
        boxes += [(x - 5, y - 5, x + 5, y + 5), (x - 2, top, x + 2, bottom)]
    places, texts = _free_places(names, marks, boxes), names
    if None in places:
        places, texts = _free_places(numbers, marks, boxes), numbers
    chosen = [place or _candidates(mark)[0] for mark, place in zip(marks, places, strict=True)]
    return list(zip(texts, chosen, strict=True)), texts is names


def _candidates(mark: Mark) -> list[Place]:
    """Where a label may stand, the best place first: right, left, a little higher or lower, above, below."""
    x, y, top, bottom = mark
    beside = [(x + 9, "left"), (x - 9, "right")]
    outside = [top - 9, bottom + 9, top - 22, bottom + 22]
    return [(side, y + shift, align) for shift in (0, -10, 10) for side, align in beside] + [
        (x, height, align) for height in outside for align in ("center", "left", "right")
    ]


def _free_places(texts: Sequence[str], marks: Sequence[Mark], taken: Iterable[Box]) -> list[Place | None]:
    """For each text the first place by its mark that is free, None where there is none."""
    boxes = list(taken)
    places: list[Place | None] = []
    for text, mark in zip(texts, marks, strict=True):
        free = (place for place in _candidates(mark) if _is_free(label_box(text, place), boxes))
        places.append(next(free, None))
        boxes += [label_box(text, place) for place in places[-1:] if place is not None]
    return places


def label_box(text: str, place: Place) -> Box:
    """The pixels that a text takes."""
    x, y, align = place
    width = len(text) * LETTER_WIDTH
    left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[align] * width
    return left, y - LINE_HEIGHT / 2, left + width, y + LINE_HEIGHT / 2


def _is_free(box: Box, taken: Iterable[Box]) -> bool:
    left, top, right, bottom = box
    inside = left >= 0 and right <= WIDTH and top >= 0 and bottom <= HEIGHT
    return inside and all(
        right <= other[0] or left >= other[2] or bottom <= other[1] or top >= other[3] for other in taken
    )
