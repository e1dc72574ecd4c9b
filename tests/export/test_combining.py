"""Several adapters as one change: PEFT's values, whatever the order of tiles, and the same from fp64."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

from lightsft.errors import ArtifactError, ConfigurationError
from lightsft.export.checkpoint_files import read_checkpoint
from lightsft.export.combining import combine
from lightsft.export.combining_checks import DENSITY, METHODS
from lightsft.export.layout import entries, plan
from lightsft.export.sparse_deltas import kth_largest
from lightsft.export.streaming import write
from lightsft.export.tile_check import check_tiles
from lightsft.low_rank import LowRank, tiles

ROWS, COLUMNS = 500, 300  # three tiles, the last one shorter
WEIGHTS = [0.7, 1.5, -0.4]
EPS = torch.finfo(torch.float32).eps


def low_rank(seed, rows=ROWS, columns=COLUMNS, rank=4, dora=False, experts=()):
    drawn = torch.Generator().manual_seed(seed)
    b = torch.randn(*experts, rows, rank, generator=drawn) / 16
    a = torch.randn(*experts, rank, columns, generator=drawn) / 16
    return LowRank(b, a, torch.rand(*experts, rows, generator=drawn) + 8 if dora else None)


def adapters_of(count=3, name="w", **options):
    return [{name: low_rank(seed, **options)} for seed in range(count)]


def stored_weight(rows=ROWS, columns=COLUMNS, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(99)).div_(2).to(dtype)


def changed(change, weight, order=None):
    """W' in fp32, made tile by tile."""
    result = torch.full(weight.shape, float("nan"))
    for rows in order or tiles(*weight.shape):
        result[rows] = change.change(weight[rows], rows)
    return result


def delta_of(change, shape=(ROWS, COLUMNS)):
    return changed(change, torch.zeros(shape))


def delta_alone(adapters, number, method, **options):
    """What one of them changes, as that number."""
    others = [adapter if place == number else {} for place, adapter in enumerate(adapters)]
    return delta_of(combine(others, [1.0] * len(adapters), method, **options)["w"])


def whole(adapters):
    return [delta_of(adapter["w"]) for adapter in adapters]


# ---- PEFT's values


def test_linear_is_pefts_task_arithmetic():
    adapters = adapters_of()
    expected = merge_utils.task_arithmetic(whole(adapters), torch.tensor(WEIGHTS))
    torch.testing.assert_close(delta_of(combine(adapters, WEIGHTS)["w"]), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.77])
def test_ties_is_pefts(density, majority):
    adapters = adapters_of()
    expected = merge_utils.ties(whole(adapters), torch.tensor(WEIGHTS), density, majority)
    found = delta_of(combine(adapters, WEIGHTS, "ties", density=density, majority=majority)["w"])
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_of_everything_keeps_every_value(majority):
    adapters, weights = adapters_of(), torch.tensor(WEIGHTS)
    deltas = torch.stack(whole(adapters))
    mask = merge_utils.calculate_majority_sign_mask(deltas, majority)
    expected = merge_utils.disjoint_merge(deltas * weights[:, None, None], mask)
    found = delta_of(combine(adapters, WEIGHTS, "ties", density=1.0, majority=majority)["w"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_an_adapter_that_lacks_a_tensor_has_no_sign_and_is_not_counted():
    """As for PEFT given zeros; the weights of the others stay."""
    adapters = adapters_of()
    deltas = whole(adapters)
    adapters[1] = {"other": adapters[1]["w"]}
    deltas[1].zero_()
    found = combine(adapters, WEIGHTS, "ties", density=0.3)
    assert list(found) == ["w", "other"]
    expected = merge_utils.ties(deltas, torch.tensor(WEIGHTS), 0.3)
    torch.testing.assert_close(delta_of(found["w"]), expected, rtol=1e-6, atol=1e-8)
    expected = merge_utils.task_arithmetic(deltas, torch.tensor(WEIGHTS))
    torch.testing.assert_close(delta_of(combine(adapters, WEIGHTS)["w"]), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_dare_is_pefts_of_the_values_that_are_left(majority):
    adapters, weights = adapters_of(), torch.tensor(WEIGHTS)
    left = [delta_alone(adapters, number, "dare_linear", density=0.4) for number in range(3)]
    expected = merge_utils.task_arithmetic(left, weights)
    found = delta_of(combine(adapters, WEIGHTS, "dare_linear", density=0.4)["w"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    mask = merge_utils.calculate_majority_sign_mask(torch.stack(left), majority)
    expected = merge_utils.disjoint_merge(torch.stack(left) * weights[:, None, None], mask)
    found = delta_of(combine(adapters, WEIGHTS, "dare_ties", density=0.4, majority=majority)["w"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_without_a_density_it_is_the_methods_own(method):
    adapters = adapters_of()
    one, other = (combine(adapters, WEIGHTS, method, density=given)["w"] for given in (None, DENSITY[method]))
    assert torch.equal(delta_of(one), delta_of(other))


# ---- what DARE drops


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_share_and_divides_by_it(density):
    adapter = low_rank(0, rows=2000)
    found = delta_of(combine([{"w": adapter}], [1.0], "dare_linear", density=density)["w"], (2000, COLUMNS))
    delta, kept = delta_of(adapter, (2000, COLUMNS)), found != 0
    torch.testing.assert_close(found[kept], delta[kept] / density, rtol=1e-6, atol=0)
    deviation = (density * (1 - density) / kept.numel()) ** 0.5
    assert abs(kept.float().mean() - density) < 5 * deviation
    assert (kept.float().mean(1) - density).abs().max() < 5 * deviation * 2000**0.5  # of each row
    noise = (delta.square().sum() * (1 / density - 1)).sqrt()
    assert abs(found.sum() - delta.sum()) < 5 * noise


def test_what_dare_drops_depends_on_seed_name_adapter_tile_and_expert():
    adapter = LowRank(torch.ones(ROWS, 1), torch.ones(1, COLUMNS))
    stack = LowRank(torch.ones(2, ROWS, 1), torch.ones(2, 1, COLUMNS))

    def kept(adapters, seed=0, place=0, name="w"):
        changes = combine(adapters, [1.0] * len(adapters), "dare_linear", seed=seed)
        return delta_of(changes[name].matrices()[place]) != 0

    first = kept([{"w": adapter}])
    assert torch.equal(first, kept([{"w": adapter, "v": adapter}, {"v": adapter}]))
    others = [
        kept([{"w": adapter}], seed=1),
        kept([{"v": adapter}], name="v"),
        kept([{}, {"w": adapter}]),
        kept([{"w": stack}], place=1),
        torch.cat([first[218:436], first[:218], first[436:]]),
    ]
    assert all(0.45 < (first != other).float().mean() < 0.55 for other in others[:-1])
    assert (first != others[-1])[:436].float().mean() > 0.45


# ---- what TIES keeps


@pytest.mark.parametrize("k", [1, 2, 777, 75_000, 149_999, 150_000])
def test_the_kth_largest_is_torchs(k):
    adapter = low_rank(0)
    parts = [torch.mm(adapter.b[rows], adapter.a) for rows in tiles(ROWS, COLUMNS)]
    flat = torch.cat(parts).abs().flatten()
    assert kth_largest(lambda: iter(parts), k) == torch.kthvalue(flat, flat.numel() + 1 - k).values


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1.0, 1e30])
def test_the_kth_largest_is_exact_among_equals_zeros_and_extremes(scale):
    values = torch.tensor([0.0, -0.0, 3.0, -3.0, 3.0, 1.0, -2.0, 2.0]) * scale
    expected = values.abs().sort(descending=True).values
    assert [kth_largest(lambda: iter(values.split(3)), k) for k in range(1, 9)] == expected.tolist()


def test_all_values_that_equal_the_threshold_are_kept():
    same = LowRank(torch.ones(ROWS, 1), torch.ones(1, COLUMNS))
    found = delta_of(combine([{"w": same}], [2.0], "ties", density=0.001)["w"])
    assert torch.equal(found, torch.full_like(found, 2.0))


def test_at_least_one_value_is_kept():
    adapter = low_rank(0)
    found = delta_of(combine([{"w": adapter}], [1.0], "ties", density=1e-9)["w"])
    assert found.abs().max() == delta_of(adapter).abs().max()
    assert (found != 0).sum() == 1


def test_the_threshold_is_found_once_and_only_when_it_is_needed(monkeypatch):
    passes = []

    def counted(parts, k):
        passes.append(k)
        return kth_largest(parts, k)

    monkeypatch.setattr("lightsft.export.sparse_deltas.kth_largest", counted)
    change = combine(adapters_of(2), [1, 1], "ties", density=0.2)["w"]
    assert passes == []
    weight = stored_weight()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda rows: change.change(weight[rows], rows), [*tiles(ROWS, COLUMNS)] * 4))
    change.exact(weight[:9], slice(0, 9))
    assert passes == [30_000, 30_000]


def test_a_number_that_is_none_is_not_dropped():
    adapter = low_rank(0)
    adapter.b[7, 0] = float("nan")
    for method in METHODS:
        density = None if method == "linear" else 1.0 if method.startswith("dare") else 0.2
        found = delta_of(combine([{"w": adapter}, {"w": low_rank(1)}], [1, 1], method, density=density)["w"])
        assert found.isnan()[7].all(), method
        assert found.isnan().sum() == COLUMNS, method


# ---- tiles and threads


@pytest.mark.parametrize("method", METHODS)
def test_neither_the_order_of_tiles_nor_threads_change_a_bit(method):
    adapters, weight = adapters_of(), stored_weight(dtype=torch.bfloat16)
    first = changed(combine(adapters, WEIGHTS, method)["w"], weight)
    order = [*tiles(*weight.shape)]
    assert torch.equal(changed(combine(adapters, WEIGHTS, method)["w"], weight, order[::-1]), first)
    change, together = combine(adapters, WEIGHTS, method)["w"], torch.empty(weight.shape)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda rows: (rows, change.change(weight[rows], rows)), order * 3)
        for rows, values in found:
            together[rows] = values
            assert torch.equal(values, first[rows])
    assert torch.equal(together, first)


@pytest.mark.parametrize("method", METHODS)
def test_a_change_neither_writes_the_weight_nor_the_factors(method):
    adapters, weight = adapters_of(2), stored_weight()
    before = [weight.clone(), *(factor.clone() for adapter in adapters for factor in (adapter["w"].b, adapter["w"].a))]
    changed(combine(adapters, [1, 2], method)["w"], weight)
    after = [weight, *(factor for adapter in adapters for factor in (adapter["w"].b, adapter["w"].a))]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# ---- the same in fp64


CASES = [
    ("linear", "total", False),
    ("linear", "total", True),
    ("dare_linear", "total", False),
    ("dare_linear", "total", True),
    ("ties", "total", False),
    ("ties", "frequency", False),
    ("dare_ties", "total", False),
    ("dare_ties", "frequency", False),
    ("dare_ties", "total", True),
    ("dare_ties", "frequency", True),
]


@pytest.mark.parametrize(("method", "majority", "dora"), CASES)
def test_in_fp64_the_same_values_are_kept_and_the_same_signs_elected(method, majority, dora):
    adapters, weight = adapters_of(dora=dora), stored_weight()
    change = combine(adapters, WEIGHTS, method, majority=majority)["w"]
    found, undecided = changed(change, weight), 0
    for rows in (slice(0, 1), slice(1, 217), slice(217, 219), slice(219, 499), slice(499, 500)):
        exact, reach = change.exact(weight[rows], rows)
        assert exact.dtype == reach.dtype == torch.float64
        assert ((found[rows] - exact).abs() <= 8 * EPS * reach).all()
        undecided += int((reach > 1e3).sum())
    assert undecided <= 9


def test_what_dare_divides_by_a_small_density_is_as_much_less_exact():
    adapters, weight = adapters_of(1, dora=True), stored_weight()
    change = combine(adapters, [1.0], "dare_linear", density=0.002)["w"]
    exact, reach = change.exact(weight, slice(0, ROWS))
    off = (changed(change, weight) - exact).abs()
    assert (off <= 8 * EPS * reach).all()
    assert (off > 8 * EPS * 3 * weight.abs()).any()


def test_in_fp64_it_is_pefts_formula():
    adapters, weight = adapters_of(), stored_weight(dtype=torch.float64)
    change, rows = combine(adapters, WEIGHTS, "ties", density=0.3)["w"], slice(100, 400)
    exact, reach = change.exact(weight[rows], rows)
    deltas = [adapter["w"].b.double() @ adapter["w"].a.double() for adapter in adapters]
    expected = weight + merge_utils.ties(deltas, torch.tensor(WEIGHTS, dtype=torch.float64), 0.3)
    decided = reach < 1e3
    assert decided.float().mean() > 0.9999
    torch.testing.assert_close(exact[decided], expected[rows][decided], rtol=0, atol=1e-13)


def test_where_either_sign_may_be_elected_either_result_is_right():
    """D_1 + D_2 is 0 but for roundings: +3 as well as -3 may be what fp32 finds."""
    one = LowRank(torch.tensor([[0.1, 0.2]]), torch.tensor([[10.0], [10.0]]))
    other = LowRank(torch.tensor([[-0.3]]), torch.tensor([[10.0]]))
    change = combine([{"w": one}, {"w": other}], [1, 1], "ties", density=1.0)["w"]
    exact, reach = change.exact(torch.zeros(1, 1), slice(0, 1))
    assert abs(abs(exact.item()) - 3) < 1e-6
    assert 8 * EPS * reach.item() >= 6


# ---- DoRA and experts


@pytest.mark.parametrize("method", ["linear", "dare_linear", "dare_ties"])
def test_dora_is_combined_by_what_it_makes_of_the_stored_weight(method):
    adapters, weight = [{"w": low_rank(0, dora=True)}, {"w": low_rank(1)}], stored_weight(dtype=torch.bfloat16)
    options = {} if method == "linear" else {"density": 1.0}
    found = changed(combine(adapters, [0.7, 0.5], method, **options)["w"], weight)
    before = weight.double()
    v = before + adapters[0]["w"].b.double() @ adapters[0]["w"].a.double()
    dora = adapters[0]["w"].magnitude.double()[:, None] * v / v.norm(dim=1, keepdim=True) - before
    deltas, weights = [dora, adapters[1]["w"].b.double() @ adapters[1]["w"].a.double()], torch.tensor([0.7, 0.5])
    if method == "dare_ties":
        mask = merge_utils.calculate_majority_sign_mask(torch.stack(deltas))
        expected = merge_utils.disjoint_merge(torch.stack(deltas) * weights[:, None, None].double(), mask)
    else:
        expected = merge_utils.task_arithmetic(deltas, weights.double())
    off = (found - (before + expected)).abs() > 1e-5
    assert off.sum() <= (3 if method == "dare_ties" else 0)  # signs that rounding decides


def test_ties_refuses_dora_and_says_what_can_be_used():
    adapters = [{"w": low_rank(0)}, {"w": low_rank(1, dora=True)}]
    with pytest.raises(ConfigurationError, match=r"adapter 2 with DoRA for method='ties'[\s\S]*'dare_linear'"):
        combine(adapters, [1, 1], "ties")


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_combined_as_tensors_of_their_own(method):
    stacks = [{"w": low_rank(seed, experts=(3,))} for seed in range(2)]
    change = combine(stacks, [0.5, 2.0], method)["w"]
    assert change.shape == (3, ROWS, COLUMNS)
    assert len(change.matrices()) == 3
    for place, matrix in enumerate(change.matrices()):
        assert matrix.shape == (ROWS, COLUMNS)
        assert matrix.matrices() == (matrix,)
        if method in ("linear", "ties"):
            alone = [{"w": LowRank(stack["w"].b[place], stack["w"].a[place])} for stack in stacks]
            assert torch.equal(delta_of(matrix), delta_of(combine(alone, [0.5, 2.0], method)["w"]))
    with pytest.raises(TypeError, match="matrices"):
        change.change(torch.zeros(3, ROWS, COLUMNS), slice(0, ROWS))


# ---- from disk to disk


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_written_with_the_formula(method, tmp_path):
    names = ["a.weight", "b.weight", "experts"]
    before = {
        "a.weight": stored_weight(1500, 300, torch.bfloat16),
        "b.weight": stored_weight(40, 24, torch.bfloat16),
        "experts": stored_weight(80, 16, torch.bfloat16).view(2, 40, 16),
        "norm": torch.ones(24),
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    save_file(before, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    first = dict(zip(names, [low_rank(1, 1500), low_rank(2, 40, 24), low_rank(3, 40, 16, experts=(2,))], strict=True))
    second = {"b.weight": low_rank(4, 40, 24, rank=2), "experts": low_rank(5, 40, 16, experts=(2,))}

    checkpoint = read_checkpoint(tmp_path / "base")
    changes = combine([first, second], [0.7, 0.3], method)
    files = plan(checkpoint, entries(checkpoint, changes))
    write(checkpoint, files, tmp_path / "out")

    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after.pop("norm"), before["norm"])
    for name, tensor in after.items():
        stack = tensor if tensor.ndim == 3 else tensor[None]
        weights = before[name] if tensor.ndim == 3 else before[name][None]
        for matrix, weight, own in zip(stack, weights, changes[name].matrices(), strict=True):
            exact, reach = own.exact(weight, slice(0, len(weight)))
            assert torch.equal(matrix, changed(own, weight).bfloat16())
            assert ((matrix - exact).abs() <= 2**-8 * exact.abs() + 8 * EPS * reach).all()
            assert not torch.equal(matrix, weight)
    written = SimpleNamespace(entries=entries(checkpoint, changes), files=files)
    assert check_tiles(written, tmp_path / "out")["passed"]
    written.entries = entries(checkpoint, combine([first, second], [0.3, 0.7], method))
    assert not check_tiles(written, tmp_path / "out")["passed"]


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": [], "weights": []}, "no adapters"),
        ({"weights": [1.0]}, r"1 weights for 3 adapters[\s\S]*1,1,1"),
        ({"weights": [1.0, float("nan"), 1.0]}, "finite"),
        ({"weights": [1.0, float("inf"), 1.0]}, "finite"),
        ({"method": "dare_tie"}, r"method='dare_tie'[\s\S]*did you mean 'dare_ties'"),
        ({"method": "slerp"}, r"method='slerp'[\s\S]*linear, ties, dare_linear, dare_ties"),
        ({"method": "ties", "majority": "totl"}, "did you mean 'total'"),
        ({"method": "dare_linear", "majority": "frequency"}, "elects no signs"),
        ({"method": "linear", "density": 0.5}, r"density=0.5 for method='linear'"),
        ({"method": "ties", "density": 0.0}, r"density=0\n[\s\S]*at most 1[\s\S]*0.2"),
        ({"method": "dare_ties", "density": 1.1}, r"density=1.1\n[\s\S]*0.5"),
        ({"method": "ties", "density": float("nan")}, "density=nan"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    given = {"adapters": adapters_of(), "weights": WEIGHTS} | options
    with pytest.raises(ConfigurationError, match=message):
        combine(given.pop("adapters"), given.pop("weights"), **given)


def test_all_tensors_of_different_shapes_are_named_at_once():
    one = {"a": low_rank(0, 8, 4), "b": low_rank(0, 8, 4), "c": low_rank(0, 8, 4)}
    two = {"a": low_rank(0, 8, 6), "b": low_rank(0, 8, 4, experts=(2,)), "c": low_rank(0, 8, 4, rank=1)}
    with pytest.raises(ArtifactError) as raised:
        combine([one, one, two], [1, 1, 1])
    assert raised.value.found.splitlines()[1:] == [
        "  a: 8 x 4 in adapters 1, 2, 8 x 6 in adapter 3",
        "  b: 8 x 4 in adapters 1, 2, 2 x 8 x 4 in adapter 3",
    ]
