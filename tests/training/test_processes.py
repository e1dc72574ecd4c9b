"""Two processes train as one does on the batches of both."""

import subprocess
import sys

import pytest
import torch

from lightsft.data.batching import SimilarLengths, TokenBudget
from lightsft.data.shares import Shares
from tests.run_fixtures import flags, single
from tests.training.in_processes import launched, trained

LENGTHS = [3, 9, 17, 30, 4, 8, 25, 12, 40, 5, 6, 31]


def rows_of(share):
    """Rows of each step; those that stand in for none are left out."""
    return [[row for row in batch if row >= 0] for batch in share]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_shares_of_a_step_are_the_batch_of_one_process(processes):
    whole = SimilarLengths(LENGTHS, 2 * processes, seed=3)
    steps = [list(whole)[first : first + 2 * processes] for first in range(0, len(LENGTHS), 2 * processes)]
    shares = [Shares(SimilarLengths(LENGTHS, 2 * processes, seed=3), rank, processes) for rank in range(processes)]
    assert {len(list(share)) for share in shares} == {len(steps)} == {len(share) for share in shares}
    for step, parts in zip(steps, zip(*map(rows_of, shares), strict=True), strict=True):
        assert sorted(row for part in parts for row in part) == sorted(step)


def test_batches_by_tokens_are_dealt_out_and_none_is_lost_or_read_twice():
    whole = TokenBudget(LENGTHS, 40, seed=3)
    shares = [Shares(TokenBudget(LENGTHS, 40, seed=3), rank, 2) for rank in range(2)]
    for share in (whole, *shares):
        share.set_epoch(1)
    batches = list(whole)
    assert len(batches) % 2 == 1
    dealt = [batch for parts in zip(*map(rows_of, shares), strict=True) for batch in parts]
    assert dealt == [*batches, []]


def test_every_process_has_a_row_to_read_in_every_step():
    for share in (Shares(SimilarLengths([1] * 5, 4, seed=0), 3, 4), Shares(TokenBudget([9] * 3, 9, seed=0), 1, 2)):
        assert all(batch for batch in share)


# ---- in processes


@pytest.fixture(scope="module")
def cases(bert, llama):
    """(two processes, one process) that train the same."""

    def case(name, strategy, model=bert, task="classification", rows=39, **more):
        arguments = {"per_device_train_batch_size": 4, **more.pop("arguments", {})}
        return {"name": name, "strategy": strategy, "model": str(model), "task": task, "rows": rows}, arguments, more

    made = {}
    strategies = ("full", "lora", "adapter", "prefix", "prompt", "ia3", "bitfit", "vera", "reft", "norm", "compacter")
    described = [case(name, name) for name in strategies]
    described += [
        case("odd", "lora", rows=41),  # the last step has one row for two processes
        case("chat", "lora", model=llama, task="chat"),
        case("tokens", "lora", rows=41, tokens_per_batch=48),
        case("accumulated", "full", rows=39, arguments={"gradient_accumulation_steps": 2}),
        case("stopping", "lora", patience=1, arguments={"num_train_epochs": 6, "learning_rate": 1e-12}),
    ]
    for common, arguments, more in described:
        two = {**common, **more, "arguments": arguments}
        doubled = "gradient_accumulation_steps" if "tokens_per_batch" in more else "per_device_train_batch_size"
        one = {**two, "arguments": {**arguments, doubled: 2 * arguments.get(doubled, 1)}}
        made[common["name"]] = two, one
    return made


@pytest.mark.slow
def test_two_processes_train_like_one_with_their_batches_together(cases, tmp_path):
    found = launched([two for two, _ in cases.values()], tmp_path / "two")
    for name, (_, one) in cases.items():
        alone = trained(one, tmp_path / "one")
        for process in found[name]:
            same(process, alone, name)
        first, second = found[name]
        assert all(torch.equal(tensor, second["tensors"][key]) for key, tensor in first["tensors"].items()), name
        assert first["seconds"] == second["seconds"]
    assert found["stopping"][0]["steps"] < 6 * 5


@pytest.mark.slow
def test_train_runs_under_torchrun(bert, rows_csv, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    values = single(bert, rows_csv, tmp_path / "run") | {"device": "cpu"}
    ended = subprocess.run([*command, "-m", "lightsft", "train", *flags(**values)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("test accuracy") == 1
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-1"  # 32 rows, 16 for each process


def same(found, expected, name):
    """The same steps, losses, scores and tensors, to the error of floats."""
    assert found["steps"] == expected["steps"], name
    assert found["tokens"] == expected["tokens"], name
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4), name
    assert found["validation"] == [pytest.approx(one, rel=1e-4) for one in expected["validation"]], name
    for what in ("best", "test_loss", "alone"):
        assert found[what] == pytest.approx(expected[what], rel=1e-4), (name, what)
    torch.testing.assert_close(found["outcomes"], expected["outcomes"], rtol=1e-3, atol=1e-5, msg=name)
    for key, tensor in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
