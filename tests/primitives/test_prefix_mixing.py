"""Attention written out in every way that is in use, with a prefix mixed in: held against attention over longer keys.

Everything is in fp64, where values and gradients must agree to the last few bits. All sizes differ, so that no two
dimensions can be taken for each other.
"""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightsft.primitives import AttentionPrefix, MixedPrefix
from lightsft.primitives.prefix_mixing import PrefixMixing, _running

ROWS, HEADS, QUERIES, KEYS, SIZE, WIDTH, TOKENS = 3, 2, 5, 7, 4, 6, 8
SCALE = 0.7
SEEN = torch.tensor([7, 5, 6])[:, None] > torch.arange(KEYS)  # (rows, keys): what is no padding
SEEN = SEEN[:, None, None] & (torch.arange(KEYS) < torch.arange(3, 3 + QUERIES)[:, None])  # and not in the future


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def activations(rows=ROWS, width=WIDTH):
    """Queries, keys, values, and the prefix's keys and values, as leaves."""
    shapes = [(rows, HEADS, QUERIES, SIZE), (rows, HEADS, KEYS, SIZE), (rows, HEADS, KEYS, width)]
    shapes += [(HEADS, TOKENS, SIZE), (HEADS, TOKENS, width)]
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def attention(q, k, v, more_keys, more_values, scale=SCALE, bias=0.0, seen=None):
    """softmax([c Q P^T; c Q K^T + bias]) [P_v; V] with the matrices put together; masked scores are -inf."""
    before, after = (q @ keys.mT * scale for keys in (more_keys.expand(len(k), -1, -1, -1), k))
    after = after + bias
    if seen is not None:
        after = after.masked_fill(~seen, float("-inf"))
    weights = torch.cat([before, after], -1).softmax(-1)
    return weights @ torch.cat([more_values.expand(len(v), -1, -1, -1), v], -2)


def plain(q, k, v, **options):
    """The same without a prefix."""
    return attention(
        q, k, v, k.new_zeros(k.shape[1], 0, k.shape[-1]), v.new_zeros(v.shape[1], 0, v.shape[-1]), **options
    )


def mixed(attend, q, k, v, more_keys, more_values, **options):
    with PrefixMixing(lambda: (more_keys, more_values), **options):
        return attend(q, k, v)


def recorded(attend, *given):
    calls = []
    with PrefixMixing(record=lambda *call: calls.append(call)):
        attend(*given)
    return calls


def assert_alike(attend, expect, width=WIDTH, **options):
    """`attend(q, k, v)` under a prefix is `expect(q, k, v, more keys, more values)`, and so are all gradients."""
    results = []
    for compute in (lambda *given: mixed(attend, *given, **options), expect):
        given = activations(width=width)
        result = compute(*given)
        result.backward(draw(*result.shape, seed=9))
        results.append([result.detach(), *(tensor.grad for tensor in given)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---- how the two products are written


def by_matmul(q, k, v):
    return torch.matmul((torch.matmul(q, k.transpose(-1, -2)) * SCALE).softmax(-1), v)


def by_operator(q, k, v):
    return ((q * SCALE) @ k.mT).softmax(dim=-1) @ v


def by_bmm(q, k, v):
    q, k, v = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (q, k, v))
    weights = nn.functional.softmax(torch.bmm(q, k.transpose(1, 2)) / (1 / SCALE), dim=-1)
    return torch.bmm(weights, v).view(-1, HEADS, QUERIES, WIDTH)


def by_bmm_with_weights_in_heads(q, k, v):
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    scores = torch.bmm(q, k.mT).view(-1, HEADS, QUERIES, KEYS) * SCALE
    return torch.bmm(scores.softmax(-1).view(-1, QUERIES, KEYS), v).view(-1, HEADS, QUERIES, WIDTH)


def by_baddbmm(q, k, v):
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(len(q), QUERIES, KEYS), batch1=q, batch2=k.mT, beta=1.0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).view(-1, HEADS, QUERIES, WIDTH)


def by_einsum_btnh(q, k, v):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    weights = (torch.einsum("btnh, bsnh -> bnts", q, k) * SCALE).softmax(-1)
    return torch.einsum("bnts,bsnh->btnh", weights, v).transpose(1, 2)


def by_einsum_lbnd(q, k, v):
    q, k, v = (tensor.permute(2, 0, 1, 3) for tensor in (q, k, v))
    weights = (torch.einsum("ibnd,jbnd->bnij", q, k) * SCALE).softmax(3)
    return torch.einsum("bnij,jbnd->ibnd", [weights, v]).permute(1, 2, 0, 3)


def by_einsum_with_dots(q, k, v):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    weights = (torch.einsum("...qhd,...khd->...hqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("...hqk,...khd->...qhd", weights, v).transpose(1, 2)


def in_parts(q, k, v):
    """Weights on near keys and on far ones multiply their values apart."""
    weights = (torch.cat([q @ k[:, :, :2].mT, q @ k[:, :, 2:].mT], -1) * SCALE).softmax(-1)
    near, far = weights.split([2, KEYS - 2], dim=-1)
    return near @ v[:, :, :2] + torch.einsum("bhij,bhjd->bhid", far, v[:, :, 2:])


PRODUCTS = [
    by_matmul,
    by_operator,
    by_bmm,
    by_bmm_with_weights_in_heads,
    by_baddbmm,
    by_einsum_btnh,
    by_einsum_lbnd,
    by_einsum_with_dots,
    in_parts,
]
named = pytest.mark.parametrize("attend", PRODUCTS, ids=lambda function: function.__name__)


@named
def test_both_products_written_out_equal_attention_over_longer_keys_and_values(attend):
    assert_alike(attend, attention)


@named
def test_without_a_prefix_every_bit_is_as_before(attend):
    q, k, v, *_ = activations()
    with PrefixMixing():
        under = attend(q, k, v)
    assert torch.equal(under, attend(q, k, v))


@named
def test_a_prefix_recorded_on_one_example_serves_other_batches(attend):
    """Keys and values of one example, as they are reported, become the prefix of three others."""
    q, k, v, *_ = activations()
    calls = recorded(attend, q[:1], k[:1], v[:1])
    if attend is in_parts:  # each part reports its own values
        assert [call[1].shape[1] for call in calls] == [2, KEYS - 2]
        return
    ((keys, values, query_length, key_bias),) = calls
    assert torch.equal(keys, k[0])
    assert torch.equal(values, v[0])
    assert query_length == QUERIES
    assert not key_bias
    torch.testing.assert_close(
        mixed(attend, q, k, v, keys, values), attention(q, k, v, k[0], v[0]), rtol=1e-12, atol=1e-12
    )


def test_the_gradient_is_that_of_finite_differences():
    given = activations(rows=1)
    assert torch.autograd.gradcheck(lambda *tensors: mixed(by_matmul, *tensors), given)


def test_blocks_of_queries_and_keys_each_see_the_prefix():
    """(rows, heads, blocks, length, size): three blocks, each an attention of its own."""

    def blocks(tensor):
        return torch.stack([tensor, tensor.flip(-1) * 0.5, tensor.flip(-2)], dim=2)

    def blockwise(q, k, v):
        q, k, v = map(blocks, (q, k, v))
        scores = torch.einsum("bhnqd,bhnkd->bhnqk", q, k) * SCALE
        return torch.einsum("bhnqk,bhnkd->bhnqd", scores.softmax(-1), v)

    def expected(q, k, v, *prefix):
        each = zip(*(blocks(tensor).unbind(2) for tensor in (q, k, v)), strict=True)
        return torch.stack([attention(*block, *prefix) for block in each], dim=2)

    assert_alike(blockwise, expected)


def test_one_head_of_keys_serves_all_queries():
    """Multi-query attention multiplies all heads of queries with one of keys: the prefix has a head for each."""

    def expected(q, k, v, *prefix):
        return attention(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), *prefix)

    assert_alike(lambda q, k, v: by_matmul(q, k[:, :1], v[:, :1]), expected)


def test_a_prefix_of_fewer_heads_is_repeated_as_the_keys_were():
    """Grouped queries: the module repeats its two heads of keys for six of queries."""
    times = 3

    def grouped(q, k, v):
        return by_matmul(q.repeat_interleave(times, 1), k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))

    def expected(q, k, v, *prefix):
        return attention(q, k, v, *prefix).repeat_interleave(times, 1)

    assert_alike(grouped, expected)


def test_keys_that_are_scaled_have_a_prefix_beside_them_as_they_are():
    def expected(q, k, v, *prefix):
        return attention(q, k * SCALE, v, *prefix, scale=1.0)

    assert_alike(lambda q, k, v: (q @ (k * SCALE).mT).softmax(-1) @ v, expected)


# ---- how scores become weights

BIAS = draw(HEADS, QUERIES, KEYS, seed=20)
PER_HEAD = torch.tensor([0.3, 1.1], dtype=torch.float64)[:, None, None]
LOWEST = torch.finfo(torch.float64).min


def scaled_in_place(scores):
    scores *= SCALE
    scores += BIAS
    return scores.masked_fill_(~SEEN, float("-inf")).softmax(-1)


def scaled_before_and_after(scores):
    return ((scores * 2 + BIAS * 2 / SCALE) / 2 * SCALE).masked_fill(~SEEN, LOWEST).softmax(-1)


def where_seen(scores):
    return torch.where(SEEN, SCALE * scores + BIAS, LOWEST).softmax(-1)


def with_an_additive_mask(scores):
    mask = torch.zeros(SEEN.shape, dtype=torch.float64).masked_fill(~SEEN, LOWEST)
    scores = torch.add(torch.mul(scores, SCALE), BIAS) + mask
    return functional.softmax(torch.max(scores, torch.tensor(LOWEST)), dim=-1)


def bias_first(scores):
    return nn.Softmax(dim=-1)((BIAS + scores * SCALE).masked_fill(~SEEN, LOWEST))


def content_and_position(scores):
    """The bias is a product of two activations itself, as in relative attention."""
    position = torch.matmul(torch.eye(QUERIES, dtype=torch.float64).expand(HEADS, -1, -1), BIAS)
    return (scores * SCALE + position).masked_fill(~SEEN, LOWEST).softmax(-1)


def flattened(scores):
    scores = (scores * torch.tensor(SCALE, dtype=torch.float64) + BIAS).masked_fill(~SEEN, LOWEST)
    return scores.flatten(0, 1).softmax(-1).unflatten(0, (ROWS, HEADS))


def without_the_largest(scores):
    scores = (scores * SCALE + BIAS).masked_fill(~SEEN, LOWEST)
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1)


def without_the_largest_of_scaled_ones(scores):
    """2105.13290, section 2.4: scores are made small before the largest is subtracted, then large again."""
    scores = (scores * SCALE + BIAS).masked_fill(~SEEN, -1e30) / 32
    return ((scores - scores.amax(dim=-1).unsqueeze(-1).detach()) * 32).softmax(-1)


def by_keywords(scores):
    scores = torch.where(input=SCALE * scores + BIAS, condition=SEEN, other=LOWEST)
    return functional.dropout(torch.softmax(input=scores, dim=-1), p=0.5, training=False)


def in_another_type(scores):
    weights = functional.softmax((scores * SCALE + BIAS).masked_fill(~SEEN, LOWEST), dim=-1, dtype=torch.float64)
    return weights.to(scores.dtype).contiguous().clone()


TO_WEIGHTS = [
    scaled_in_place,
    scaled_before_and_after,
    where_seen,
    with_an_additive_mask,
    bias_first,
    content_and_position,
    flattened,
    without_the_largest,
    without_the_largest_of_scaled_ones,
    by_keywords,
    in_another_type,
]


@pytest.mark.parametrize("weigh", TO_WEIGHTS, ids=lambda function: function.__name__)
def test_scale_bias_and_mask_are_followed_from_scores_to_weights(weigh):
    assert_alike(lambda q, k, v: weigh(q @ k.mT) @ v, lambda *given: attention(*given, bias=BIAS, seen=SEEN))


def test_a_scale_for_each_head_also_holds_for_the_prefix():
    def expected(*given):
        return attention(*given, scale=PER_HEAD)

    assert_alike(lambda q, k, v: (q @ k.mT * PER_HEAD).softmax(-1) @ v, expected)


def test_a_scale_for_each_head_survives_other_views_of_the_scores():
    def attend(q, k, v):
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        scores = torch.bmm(q, k.mT) * PER_HEAD.repeat(ROWS, 1, 1)
        scores = scores.view(ROWS, HEADS, QUERIES, KEYS) / PER_HEAD * SCALE
        return torch.bmm(scores.flatten(0, 1).softmax(-1), v).view(ROWS, HEADS, QUERIES, WIDTH)

    assert_alike(attend, attention)


def by_tanh(scores):
    return 2 * torch.tanh(scores * SCALE / 2)


def by_clamping(scores):
    scores = scores * SCALE
    return scores.clamp_(min=-1.0, max=1.5)


@pytest.mark.parametrize("cap", [by_tanh, by_clamping], ids=lambda function: function.__name__)
def test_a_cap_on_scores_also_holds_for_the_prefix(cap):
    def expected(q, k, v, more_keys, more_values):
        keys = torch.cat([more_keys.expand(ROWS, -1, -1, -1), k], 2)
        bias = torch.cat([torch.zeros(HEADS, QUERIES, TOKENS, dtype=torch.float64), BIAS], -1)
        values = torch.cat([more_values.expand(ROWS, -1, -1, -1), v], 2)
        return (cap(q @ keys.mT) + bias).softmax(-1) @ values

    assert_alike(lambda q, k, v: (cap(q @ k.mT) + BIAS).softmax(-1) @ v, expected)


class MaskedSoftmax(torch.autograd.Function):
    """As in DeBERTa: a softmax over what is seen, with a backward pass of its own."""

    @staticmethod
    def forward(context, scores, seen):
        weights = torch.softmax(scores.masked_fill(~seen, LOWEST), -1)
        weights.masked_fill_(~seen, 0)
        context.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(context, gradient):
        (weights,) = context.saved_tensors
        return torch._softmax_backward_data(gradient, weights, -1, weights.dtype), None


def softmax_of_its_own(q, k, v):
    return MaskedSoftmax.apply(q @ k.mT * SCALE + BIAS, SEEN) @ v


def test_a_softmax_with_a_backward_pass_of_its_own_has_all_gradients():
    assert_alike(softmax_of_its_own, lambda *given: attention(*given, bias=BIAS, seen=SEEN))


def test_no_graph_is_made_where_none_is_wanted():
    with torch.no_grad():
        assert not mixed(softmax_of_its_own, *activations()).requires_grad


def test_of_two_attentions_that_share_their_scores_the_prefix_is_for_the_one_it_fits():
    """As in LiLT: each of two streams adds the other's scores to its own."""

    def both(q, k, v):
        text, layout = q @ k.mT * SCALE, q[..., :2] @ k[..., :2].mT * SCALE
        return (text + layout).softmax(-1) @ v, (layout + text).softmax(-1) @ v[..., :3]

    def expected(q, k, v, *prefix):
        return attention(q, k, v, *prefix, bias=q[..., :2] @ k[..., :2].mT * SCALE)

    assert_alike(lambda *given: both(*given)[0], expected)
    given = activations()
    assert torch.equal(mixed(both, *given)[1], both(*given[:3])[1])


# ---- a bias for keys alone

DISTANCES = torch.arange(1.0 - KEYS, 1, dtype=torch.float64) * torch.tensor([[[0.5]], [[0.25]]], dtype=torch.float64)
CAUSAL = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)  # the last query sees all keys


def added_afterwards(q, k, v, bias):
    scores = (q @ k.mT * SCALE + bias).masked_fill(~CAUSAL, LOWEST)
    return scores.softmax(-1) @ v


def added_before_scaling(q, k, v, bias):
    scores = (bias / SCALE + q @ k.mT) * SCALE
    return scores.masked_fill(~CAUSAL, LOWEST).softmax(-1) @ v


def added_in_the_product(q, k, v, bias):
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    scores = (2 * bias).repeat(ROWS, 1, 1).baddbmm(batch1=q, batch2=k.mT, beta=0.5, alpha=SCALE)
    weights = scores.view(ROWS, HEADS, QUERIES, KEYS).masked_fill(~CAUSAL, LOWEST).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), v).view(ROWS, HEADS, QUERIES, WIDTH)


ADDED = [added_afterwards, added_before_scaling, added_in_the_product]
added = pytest.mark.parametrize("attend", ADDED, ids=lambda function: function.__name__)


@added
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_the_prefix_is_as_near_as_the_query_whatever_constant_is_in_the_bias(attend, constant):
    """Key j has the bias m (j - i) relative to query i: 0 at its own place, and for the prefix."""
    places = torch.arange(KEYS - QUERIES, KEYS)
    relative = DISTANCES - DISTANCES[..., places].mT

    def expected(*given):
        return attention(*given, bias=relative, seen=CAUSAL)

    assert_alike(lambda *given: attend(*given, DISTANCES + constant), expected, key_bias=True)


@added
def test_without_word_of_a_key_bias_the_prefix_gets_none(attend):
    assert_alike(
        lambda *given: attend(*given, DISTANCES), lambda *given: attention(*given, bias=DISTANCES, seen=CAUSAL)
    )


@added
def test_a_key_bias_that_is_not_counted_from_the_first_key_is_reported(attend):
    def biases(bias):
        return [call[-1] for call in recorded(attend, *activations()[:3], bias)]

    assert biases(DISTANCES) == [True]
    assert biases(torch.zeros(HEADS, 1, KEYS, dtype=torch.float64)) == [False]
    assert biases(DISTANCES - DISTANCES[..., :1]) == [False]  # counted from the first key
    mask = torch.zeros_like(DISTANCES).masked_fill(torch.arange(KEYS) > 4, -1e9)
    assert biases(mask) == [False]
    assert biases(DISTANCES.expand(HEADS, QUERIES, KEYS)) == [False]  # for each query one of its own


def scores_turned_and_back(q, k, v):
    """Longformer's way: entries of some queries are overwritten with the heads after the queries."""
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(ROWS, HEADS, QUERIES, KEYS)
    scores = scores.transpose(1, 2) * PER_HEAD.view(1, 1, HEADS, 1)
    scores[0, 1:2, :, 3:] = LOWEST
    return scores.transpose(1, 2).flatten(0, 1).softmax(-1).unflatten(0, (ROWS, HEADS)) @ v


def scores_turned(q, k, v):
    weights = ((q @ k.mT).permute(2, 1, 0, 3) * PER_HEAD).softmax(-1)
    return weights.permute(2, 1, 0, 3) @ v


def scores_turned_in_part(q, k, v):
    weights = ((q @ k.mT * PER_HEAD).transpose(0, 1).flatten(1, 2)).softmax(-1)
    return (weights.unflatten(1, (ROWS, QUERIES)).swapaxes(0, 1)) @ v


def weights_turned(q, k, v):
    weights = (q @ k.mT * PER_HEAD).softmax(-1).movedim(0, 1)
    return (weights @ v.movedim(0, 1)).movedim(0, 1)


TURNED = [scores_turned_and_back, scores_turned, scores_turned_in_part, weights_turned]


@pytest.mark.parametrize("attend", TURNED, ids=lambda function: function.__name__)
def test_rows_that_change_places_keep_their_own_prefix(attend):
    def expected(*given):
        seen = torch.ones(ROWS, HEADS, QUERIES, KEYS, dtype=torch.bool)
        if attend is scores_turned_and_back:
            seen[0, :, 1, 3:] = False
        return attention(*given, scale=PER_HEAD, seen=seen)

    assert_alike(attend, expected)


# ---- sinks, gates, and other things done to weights

SINK = torch.tensor([0.4, -0.8], dtype=torch.float64)[:, None, None]


def sink_as_a_key(q, k, v):
    scores = torch.cat([q @ k.mT * SCALE, SINK.expand(ROWS, -1, QUERIES, -1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def sink_as_a_factor(q, k, v):
    scores = q @ k.mT * SCALE
    kept = (torch.logsumexp(scores, dim=-1) - SINK[..., 0]).sigmoid()
    return torch.matmul(scores.softmax(-1), v) * kept.unsqueeze(-1)


@pytest.mark.parametrize("attend", [sink_as_a_key, sink_as_a_factor], ids=lambda function: function.__name__)
def test_an_attention_sink_takes_from_prefix_and_keys_alike(attend):
    def expected(q, k, v, more_keys, more_values):
        scores = torch.cat([q @ more_keys.expand(ROWS, -1, -1, -1).mT, q @ k.mT], -1) * SCALE
        weights = torch.cat([scores, SINK.expand(ROWS, -1, QUERIES, -1)], -1).softmax(-1)[..., :-1]
        return weights @ torch.cat([more_values.expand(ROWS, -1, -1, -1), v], -2)

    assert_alike(attend, expected)


def test_values_by_distance_share_the_weights_of_the_others():
    """Relative values (1803.02155, equation 3): a second product with the same weights, which has no prefix."""
    distances = draw(QUERIES, KEYS, WIDTH, seed=30)

    def attend(q, k, v):
        weights = (q @ k.mT * SCALE).softmax(-1)
        return torch.einsum("bhij,ijd->bhid", weights, distances) + weights @ v

    def expected(q, k, v, *prefix):
        per_query = [
            attention(q[:, :, i : i + 1], k, v + distances[i], *prefix) for i in range(QUERIES)
        ]  # each query has values of its own
        return torch.cat(per_query, dim=2)

    assert_alike(attend, expected)


def test_a_query_that_sees_no_key_sees_the_prefix_alone():
    q, k, v, more_keys, more_values = activations()

    def attend(q, k, v):
        return (q @ k.mT * SCALE).masked_fill(torch.ones(1, dtype=torch.bool), LOWEST).softmax(-1) @ v

    alone = plain(q, more_keys.expand(ROWS, -1, -1, -1), more_values.expand(ROWS, -1, -1, -1))
    torch.testing.assert_close(mixed(attend, q, k, v, more_keys, more_values), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_own_rounding(dtype):
    narrow = [tensor.detach().to(dtype) for tensor in activations()]

    def attend(q, k, v):
        return (q @ k.mT * SCALE).softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    actual, reference = mixed(attend, *narrow), attention(*(tensor.double() for tensor in narrow))
    assert actual.dtype == dtype
    assert (actual.double() - reference).abs().max() <= 4 * torch.finfo(dtype).eps * reference.abs().max()


# ---- fused attention


def fused(q, k, v, **options):
    return functional.scaled_dot_product_attention(q, k, v, scale=SCALE, **options)


FUSED = {
    "no mask": ({}, {}),
    "mask of booleans": ({"attn_mask": SEEN}, {"seen": SEEN}),
    "mask of numbers": ({"attn_mask": BIAS.masked_fill(~SEEN, float("-inf"))}, {"bias": BIAS, "seen": SEEN}),
    "mask of one column": ({"attn_mask": torch.ones(ROWS, 1, QUERIES, 1, dtype=torch.bool)}, {}),
    "causal": ({"is_causal": True}, {"seen": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()}),
}


@pytest.mark.parametrize("case", FUSED)
def test_a_fused_attention_sees_longer_keys_and_values(case):
    options, reference = FUSED[case]
    assert_alike(lambda q, k, v: fused(q, k, v, **options), lambda *given: attention(*given, **reference))


def test_a_fused_attention_with_flattened_heads_sees_longer_keys_and_values():
    def flat(q, k, v):
        return fused(*(tensor.flatten(0, 1) for tensor in (q, k, v))).unflatten(0, (ROWS, HEADS))

    assert_alike(flat, attention)


def test_a_fused_attention_in_blocks_gives_each_head_its_own_prefix():
    def blocks(q, k, v):
        return fused(*(tensor.unsqueeze(2).expand(-1, -1, 4, -1, -1) for tensor in (q, k, v)))

    assert_alike(blocks, lambda *given: attention(*given).unsqueeze(2).expand(-1, -1, 4, -1, -1))


def test_a_fused_attention_of_grouped_queries_takes_one_prefix_for_each_group():
    def grouped(q, k, v):
        return fused(q.repeat_interleave(3, 1), k, v, enable_gqa=True)

    assert_alike(grouped, lambda *given: attention(*given).repeat_interleave(3, 1))


def test_a_fused_attention_with_one_head_of_keys_is_given_all_of_them():
    def expected(q, k, v, *prefix):
        return attention(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), *prefix)

    assert_alike(lambda q, k, v: fused(q, k[:, :1], v[:, :1]), expected)


def test_a_fused_attention_without_a_prefix_is_left_alone():
    q, k, v, *_ = activations()
    with PrefixMixing():
        assert torch.equal(
            fused(q, k, v, attn_mask=SEEN),
            functional.scaled_dot_product_attention(q, k, v, attn_mask=SEEN, scale=SCALE),
        )


# ---- torch's multi-head attention

EMBEDDED = HEADS * SIZE
PADDED = torch.arange(KEYS) >= torch.tensor([7, 5, 6])[:, None]
APART = {
    "in_proj_weight": None,
    "use_separate_proj_weight": True,
    **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), torch.eye(EMBEDDED, dtype=torch.float64)),
}
TOGETHER = {"in_proj_weight": torch.eye(EMBEDDED, dtype=torch.float64).repeat(3, 1)}
MASKS = {
    "no mask": ({}, {}),
    "bias": ({"attn_mask": BIAS.repeat(ROWS, 1, 1)}, {"bias": BIAS}),
    "padding": ({"key_padding_mask": PADDED}, {"seen": ~PADDED[:, None, None]}),
}


def multi_head(q, k, v, **options):
    """With projections that change nothing: (rows, heads, length, size) is (length, rows, embedded) on the outside."""
    q, k, v = (tensor.permute(2, 0, 1, 3).flatten(2) for tensor in (q, k, v))
    nothing = {"in_proj_bias": None, "bias_k": None, "bias_v": None, "add_zero_attn": False, "out_proj_bias": None}
    out, _ = functional.multi_head_attention_forward(
        q, k, v, EMBEDDED, HEADS, dropout_p=0.0, out_proj_weight=torch.eye(EMBEDDED).double(), **nothing, **options
    )
    return out.unflatten(-1, (HEADS, SIZE)).permute(1, 2, 0, 3)


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("weights", [APART, TOGETHER], ids=["apart", "together"])
def test_the_steps_of_torchs_multi_head_attention_are_seen(weights, need_weights, case):
    options, reference = MASKS[case]

    def attend(q, k, v):
        return multi_head(q, k, v, need_weights=need_weights, **weights, **options)

    assert_alike(attend, lambda *given: attention(*given, scale=SIZE**-0.5, **reference), width=SIZE)


def test_torchs_multi_head_attention_without_a_prefix_has_every_bit_as_before():
    q, k, v, *_ = activations(width=SIZE)
    for need_weights in (True, False):
        with PrefixMixing():
            under = multi_head(q, k, v, need_weights=need_weights, **APART)
        assert torch.equal(under, multi_head(q, k, v, need_weights=need_weights, **APART))


def test_a_disabled_prefix_leaves_torchs_fast_path_open():
    """torch computes this module in one function of its own, with other last bits, unless a mode is running."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    x = draw(2, 5, 8).float()
    before = attention(x, x, x, need_weights=False)[0]
    placed = MixedPrefix(nn.Sequential(attention), "0", Fixed(draw(2, 3, 4).float(), draw(2, 3, 4, seed=1).float()))
    with torch.profiler.profile() as profile:
        tuned = attention(x, x, x, need_weights=False)[0]
        placed.enable(False)
        disabled = attention(x, x, x, need_weights=False)[0]
    assert [event.name for event in profile.events()].count("aten::_native_multi_head_attention") == 1
    assert torch.equal(disabled, before)
    placed.enable(True)
    assert torch.equal(attention(x, x, x, need_weights=False)[0], tuned)
    placed.remove()
    assert torch.equal(attention(x, x, x, need_weights=False)[0], before)
    assert not torch.allclose(tuned, before)


class Fixed(AttentionPrefix):
    """These keys and values."""

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def keys_and_values(self):
        return self.keys, self.values


# ---- what is no attention, or another one


def weights_of_a_router(q, k, v):
    """A softmax over the product with a weight; the weighted sum mixes experts, not positions."""
    router = nn.Parameter(draw(ROWS, HEADS, SIZE, KEYS, seed=40))
    return torch.matmul(torch.matmul(q, router).softmax(-1), v)


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def softmax_of_something_else(q, k, v):
    return (q.sum(-1, keepdim=True) * k.sum(-1)[:, :, None]).softmax(-1) @ v


def keys_before_queries(q, k, v):
    """Weights (..., keys, queries): what is left of them multiplies as many queries as keys."""
    return (q @ k.mT).softmax(-1).mT @ v[:, :, :QUERIES]


def another_size(q, k, v):
    return by_matmul(q[..., :3], k[..., :3], v)


def another_size_fused(q, k, v):
    return fused(q[..., :3], k[..., :3], v)


def another_number_of_heads(q, k, v):
    return by_matmul(q[0, :1, None], k[0, :1, None], v[0, :1, None])


UNTOUCHED = [
    weights_of_a_router,
    softmax_over_queries,
    softmax_of_something_else,
    keys_before_queries,
    another_size,
    another_size_fused,
    another_number_of_heads,
]


@pytest.mark.parametrize("compute", UNTOUCHED, ids=lambda function: function.__name__)
def test_what_the_prefix_does_not_fit_is_left_as_it_is(compute):
    q, k, v, *prefix = activations()
    assert torch.equal(mixed(compute, q, k, v, *prefix), compute(q, k, v))


def test_a_product_of_several_weight_matrices_is_no_attention_of_its_own():
    """Nystrom attention (2102.03902): the prefix joins where values are read, not in the products of the kernels."""

    def attend(q, k, v):
        landmarks_q, landmarks_k = q[:, :, :3], k[:, :, :3]
        first, middle = (q @ landmarks_k.mT).softmax(-1), (landmarks_q @ landmarks_k.mT).softmax(-1)
        last = (landmarks_q @ k.mT * SCALE).softmax(-1)
        middle = middle.mT @ (2 * torch.eye(3, dtype=torch.float64) - middle @ middle.mT)
        return (first @ middle) @ (last @ v)

    def expected(q, k, v, *prefix):
        landmarks_q, landmarks_k = q[:, :, :3], k[:, :, :3]
        first, middle = (q @ landmarks_k.mT).softmax(-1), (landmarks_q @ landmarks_k.mT).softmax(-1)
        middle = middle.mT @ (2 * torch.eye(3, dtype=torch.float64) - middle @ middle.mT)
        return (first @ middle) @ attention(landmarks_q, k, v, *prefix)

    assert_alike(attend, expected)


# ---- modes around modes


def test_only_the_innermost_mode_mixes():
    """An attention inside the module that another attention runs in: each has its own prefix."""
    q, k, v, *prefix = activations()
    other = [tensor.detach() * 0.5 for tensor in prefix]
    with PrefixMixing(lambda: tuple(prefix)):
        before = by_matmul(q, k, v)
        with PrefixMixing(lambda: tuple(other)):
            inside = by_matmul(q, k, v)
        after = by_matmul(q, k, v)
    torch.testing.assert_close(inside, attention(q, k, v, *other), rtol=1e-12, atol=1e-12)
    for outside in (before, after):
        torch.testing.assert_close(outside, attention(q, k, v, *prefix), rtol=1e-12, atol=1e-12)


def test_an_error_closes_the_mode():
    q, k, v, *prefix = activations()
    with pytest.raises(RuntimeError, match="stop"), PrefixMixing(lambda: tuple(prefix)):
        raise RuntimeError("stop")
    assert _running.modes == []
    assert torch.equal(by_matmul(q, k, v), by_matmul(q, k, v))


def test_other_threads_are_not_affected():
    q, k, v, *prefix = activations()
    before, found = by_matmul(q, k, v), []
    with PrefixMixing(lambda: tuple(prefix)):
        thread = threading.Thread(target=lambda: found.append(by_matmul(q, k, v)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], before)


def test_the_prefix_is_made_once_for_each_call_of_the_module():
    """Its dropout draws once, though scores, logsumexp and a second attention all ask for it."""
    q, k, v, *prefix = activations()
    made = []

    def make():
        made.append(1)
        return tuple(prefix)

    with PrefixMixing(make):
        sink_as_a_factor(q, k, v)
        by_matmul(q, k, v)
    assert len(made) == 1
