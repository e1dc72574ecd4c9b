"""Batches: every row once per epoch, of similar length, in an order that (seed, epoch) alone decides."""

import itertools
import random

import pytest
import torch

from lightsft.data.batching import IGNORED, SimilarLengths, TokenBudget, pad, pad_features

LENGTHS = random.Random(0).choices(range(1, 61), k=997)


def order(seed=0, epoch=0, lengths=LENGTHS, batch_size=8):
    sampler = SimilarLengths(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 256, 257, 997])
def test_every_row_comes_once_per_epoch(count):
    found = order(lengths=LENGTHS[:count])
    assert sorted(found) == list(range(count))
    assert len(SimilarLengths(LENGTHS[:count], 8, 0)) == count


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    assert order() == order()
    assert order(epoch=3) == order(epoch=3)
    assert order(seed=1) != order()
    assert order(epoch=1) != order()
    torch.manual_seed(99)
    random.seed(99)
    assert order() == order()


def test_an_epoch_s_order_does_not_depend_on_the_epochs_before():
    sampler = SimilarLengths(LENGTHS, 8, 0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = list(sampler)
    assert found == order(epoch=2)


def test_neighbouring_seeds_share_no_epoch():
    orders = [tuple(order(seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_a_batch_holds_rows_of_similar_length():
    found = order()
    batches = [[LENGTHS[index] for index in found[i : i + 8]] for i in range(0, len(found), 8)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    shuffled = random.Random(1).sample(LENGTHS, len(LENGTHS))
    unsorted = sum(max(shuffled[i : i + 8]) * len(shuffled[i : i + 8]) for i in range(0, len(shuffled), 8))
    assert padded < 1.1 * sum(LENGTHS)
    assert unsorted > 1.5 * sum(LENGTHS)


def test_the_batches_are_not_sorted_by_length():
    found = order()
    longest = [max(LENGTHS[index] for index in found[i : i + 8]) for i in range(0, 256, 8)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_an_incomplete_batch_comes_last():
    found = order(lengths=[5] * 10 + [50] * 3, batch_size=4)
    assert len(found) == 13
    batches = [found[i : i + 4] for i in range(0, 13, 4)]
    assert [len(batch) for batch in batches] == [4, 4, 4, 1]


@pytest.mark.parametrize(("left", "expected"), [(False, [1, 2, 3, 9, 9, 9, 9, 9]), (True, [9, 9, 9, 9, 9, 1, 2, 3])])
def test_rows_are_padded_to_a_multiple_of_eight(left, expected):
    padded = pad([[1, 2, 3], [1] * 8], 9, left=left)
    assert padded.shape == (2, 8)
    assert padded[0].tolist() == expected
    assert pad([[1] * 9], 0).shape == (1, 16)


def test_each_feature_is_padded_with_what_means_nothing():
    features = [
        {"input_ids": [5], "attention_mask": [1], "token_type_ids": [1], "labels": [5]},
        {"input_ids": [6, 7], "attention_mask": [1, 1], "token_type_ids": [0, 1], "labels": [IGNORED, 7]},
    ]
    batch = pad_features(features, 3)
    assert batch["input_ids"][0].tolist() == [5] + [3] * 7
    assert batch["attention_mask"][0].tolist() == [1] + [0] * 7
    assert batch["token_type_ids"][0].tolist() == [1] + [0] * 7
    assert batch["labels"][1].tolist() == [IGNORED, 7] + [IGNORED] * 6
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_a_label_per_row_is_not_padded():
    batch = pad_features([{"input_ids": [1], "labels": 0}, {"input_ids": [1, 2], "labels": 2}], 0)
    assert batch["labels"].tolist() == [0, 2]


# ---- batches by tokens


@pytest.mark.parametrize("budget", [64, 200, 1000])
def test_batches_by_tokens_stay_within_the_budget_and_hold_every_row_once(budget):
    lengths = torch.randint(1, 60, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(TokenBudget(lengths, budget, seed=0))
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    for batch in batches:
        padded = -(-max(lengths[index] for index in batch) // 8) * 8
        assert len(batch) * padded <= budget or len(batch) == 1


def test_batches_by_tokens_are_as_many_in_every_epoch_and_in_another_order():
    lengths = torch.randint(1, 60, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler, seen = TokenBudget(lengths, 200, seed=0), []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
    assert {len(batches) for batches in seen} == {len(sampler)}
    assert all(one != other for one, other in itertools.pairwise(seen))
    assert list(sampler) == seen[-1]
