"""The labels: absent, rare, lopsided, spelled in several ways, or unknown to the training rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from lightsft.doctor.collect import Collector, Seen, Tally
from lightsft.doctor.findings import Finding, percent, plural
from lightsft.doctor.samples import excerpt

RARE = 8  # rows: fewer are neither learned from nor scored on
MOST_LABELS = 10_000
RATIO, MAJORITY = 20.0, 0.9  # largest class to smallest, share of the largest: beyond, the data is lopsided
NOTABLE_RATIO = 5.0
TRAIN = "train"
Group = dict[str, dict[str, Tally]]  # spelling -> split -> rows


class Labels(Collector):
    """Counts each label in each split. Rows that the task refuses count for the spelling, which may be why."""

    def __init__(self) -> None:
        self._labels: Group = {}
        self._refused: Group = {}
        self._splits: dict[str, None] = {}
        self._none = Tally()
        self._too_many = False

    def see(self, row: Seen) -> None:
        """A row without labels that the task takes has none of them."""
        self._splits.setdefault(row.split)
        if not row.classes and row.usable:
            self._none.add(row.split, row.number, excerpt(row.text))
        labels = self._labels if row.usable else self._refused
        for label in dict.fromkeys(row.classes):
            by_split = labels.get(label)
            if by_split is None:
                if len(labels) >= MOST_LABELS:
                    self._too_many = True
                    continue
                by_split = labels[label] = {}
            tally = by_split.get(row.split)
            if tally is None:
                tally = by_split[row.split] = Tally()
            tally.add(row.split, row.number)

    def findings(self) -> Iterator[Finding]:
        """What is wrong with one label is said once: a rare one is not also called lopsided."""
        if not self._labels:
            return
        if self._none.count:
            action = "takes them as examples of none of the labels"
            title = f"{plural(self._none.count, 'row')} without a label"
            yield self._none.finding("no_label", "note", title, action=action, fix="label them, unless that is meant")
        if self._too_many:
            title = f"more than {MOST_LABELS:,} different labels; only the first {MOST_LABELS:,} were looked at"
            yield Finding("too_many_labels", "warning", title, MOST_LABELS, fix="name the right column with --label")
        yield from self._alike(_groups([*self._labels.items(), *self._refused.items()]))
        groups = _groups(self._labels.items())
        unseen = [g for g in groups.values() if TRAIN in self._splits and not any(TRAIN in s for s in g.values())]
        seen = [group for group in groups.values() if group not in unseen]
        rare = [group for group in seen if _count(group) < RARE]
        usual = [group for group in seen if _count(group) >= RARE]
        yield from self._unseen(unseen)
        yield from self._rare(rare)
        yield from self._absent(usual)
        yield from self._lopsided(usual)

    def figures(self) -> dict[str, Any]:
        """Rows of each label, largest first; the first 100 labels."""
        counts = {label: sum(tally.count for tally in by_split.values()) for label, by_split in self._labels.items()}
        largest = sorted(counts, key=lambda label: (-counts[label], label))
        return {"rows_by_label": {label: counts[label] for label in largest[:100]}} if counts else {}

    def _alike(self, groups: dict[str, Group]) -> Iterator[Finding]:
        together, spellings = Tally(), []
        for group in groups.values():
            if len(group) > 1:
                most, *others = sorted(group, key=lambda label: -_count({label: group[label]}))
                spellings.append(" = ".join(repr(label) for label in (most, *others)))
                for label in others:
                    together.merge(_rows({label: group[label]}))
        if spellings:
            together.sample = excerpt("; ".join(spellings))
            title = (
                f"{plural(len(spellings), 'label')} spelled in several ways that differ in case or spacing alone; "
                f"{plural(together.count, 'row')} with the rarer spellings"
            )
            action = "takes each spelling for a class of its own"
            yield together.finding("label_spellings", "warning", title, action=action, fix="spell them alike")

    def _unseen(self, groups: list[Group]) -> Iterator[Finding]:
        if groups:
            rows = _rows(*groups)
            title = f"{plural(len(groups), 'label')} in {' and '.join(rows.rows)} alone, in {plural(rows.count, 'row')}"
            yield rows.finding(
                "label_not_in_train",
                "warning",
                title,
                action="cannot learn what it never sees; these rows are scored as wrong",
                fix="add such rows to the training data, or take these out",
            )

    def _rare(self, groups: list[Group]) -> Iterator[Finding]:
        if groups:
            rows = _rows(*groups)
            title = (
                f"{plural(len(groups), 'label')} with fewer than {RARE} rows each, {plural(rows.count, 'row')} together"
            )
            fix = "add rows, or merge these labels with others"
            yield rows.finding("rare_label", "warning", title, fix=fix)

    def _absent(self, groups: list[Group]) -> Iterator[Finding]:
        absent = {}
        for split in self._splits:
            there = [any(split in by_split for by_split in group.values()) for group in groups]
            if any(there) and not all(there):  # a split without any labels is no matter of one label
                absent[split] = [next(iter(group)) for group, known in zip(groups, there, strict=True) if not known]
        if absent:
            count = len({label for labels in absent.values() for label in labels})
            where = "; ".join(f"{split}: {', '.join(map(repr, labels[:5]))}" for split, labels in absent.items())
            title = f"{plural(count, 'label')} missing from {' and '.join(absent)}"
            action = "scores that split without these labels"
            fix = "split by label (stratified), or add rows"
            yield Finding("label_not_in_split", "warning", title, count, {}, excerpt(where), action, fix)

    def _lopsided(self, groups: list[Group]) -> Iterator[Finding]:
        counts = sorted(((_count(group), next(iter(group))) for group in groups), reverse=True)
        if len(counts) < 2:
            return
        (most, largest), (fewest, smallest) = counts[0], counts[-1]
        share = most / sum(count for count, _ in counts)
        grave = most > RATIO * fewest or share > MAJORITY
        if grave or most > NOTABLE_RATIO * fewest:
            title = (
                f"the label {largest!r} has {most / fewest:.0f} times the rows of {smallest!r} ({most:,} and "
                f"{fewest:,}); it makes up {percent(share, 1)}"
            )
            action = "accuracy will mostly say how often it is right about the largest class"
            fix = "watch macro F1; weight the classes, or add rows of the small ones"
            yield Finding("imbalance", "warning" if grave else "note", title, len(counts), {}, "", action, fix)


def _groups(labels: Iterable[tuple[str, dict[str, Tally]]]) -> dict[str, Group]:
    """Labels that are the same but for case, spacing and form, by their normal form. Tallies are not changed."""
    groups: dict[str, Group] = {}
    for label, by_split in labels:
        spelling = groups.setdefault(_normal(label), {}).setdefault(label, {})
        for split, tally in by_split.items():
            spelling[split] = _merged(tally, spelling.get(split))
    return groups


def _merged(one: Tally, other: Tally | None) -> Tally:
    both = Tally()
    for tally in (one, other):
        if tally is not None:
            both.merge(tally)
    return both


def _normal(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _count(group: Group) -> int:
    return sum(tally.count for by_split in group.values() for tally in by_split.values())


def _rows(*groups: Group) -> Tally:
    """The rows of all labels in the groups; the labels and their counts as the sample."""
    rows = Tally()
    for group in groups:
        for by_split in group.values():
            for tally in by_split.values():
                rows.merge(tally)
    rows.sample = excerpt(", ".join(f"{next(iter(group))!r} ({_count(group)})" for group in groups[:10]))
    return rows
