"""What is run next depends on what is on record alone."""

from lightsft.comparison.plan import next_planned, total
from lightsft.config import RunConfig, build


def configured(**changes):
    values = {"model": "m", "data": "d", "out": "o", "strategies": "full,lora", "seeds": 2, "tune": 2}
    return build(RunConfig, values | changes)


def searched(label, trials):
    return {"strategy": label, "trials": [{}] * trials}


def order(config, results):
    """Everything that would be begun now, one after the other."""
    begun = []
    while (planned := next_planned(config, results, begun)) is not None:
        begun.append(planned)
    return [(planned.kind, planned.spec.label, planned.number, planned.shots) for planned in begun]


def test_searches_come_first_one_trial_of_each_at_a_time():
    results = {"search": [searched("full", 0), searched("lora", 1)], "trials": []}
    assert order(configured(), results) == [("searched", "full", 0, None), ("searched", "lora", 1, None)]


def test_a_strategy_whose_search_is_over_need_not_wait_for_the_others():
    results = {"search": [searched("full", 2), searched("lora", 1)], "trials": []}
    assert order(configured(), results) == [
        ("searched", "lora", 1, None), ("trial", "full", 0, None), ("trial", "full", 1, None)
    ]  # fmt: skip


def test_seed_comes_after_seed_so_that_every_strategy_has_one_soon():
    results = {"search": [], "trials": [{"strategy": "full", "seed": 0, "status": "finished"}]}
    assert order(configured(tune=0), results) == [
        ("trial", "lora", 0, None), ("trial", "full", 1, None), ("trial", "lora", 1, None)
    ]  # fmt: skip


def test_what_failed_before_is_tried_again_and_once():
    results = {"search": [], "trials": [{"strategy": "full", "seed": 0, "status": "failed"}]}
    assert order(configured(tune=0, strategies="full", seeds=1), results) == [("trial", "full", 0, None)]


def test_what_cannot_run_here_is_not_planned():
    results = {"search": [searched("lora", 2)], "trials": [], "skipped": [{"strategy": "full", "reason": "..."}]}
    assert {label for _, label, *_ in order(configured(), results)} == {"lora"}
    assert total(configured(), results) == 4


def test_fewer_examples_come_last():
    results = {"search": [], "trials": []}
    config = configured(tune=0, strategies="lora", seeds=1, few_shot_curve=(1, 4))
    assert order(config, results) == [
        ("trial", "lora", 0, None), ("trial", "lora", 0, 1), ("trial", "lora", 0, 4)
    ]  # fmt: skip


def test_folders_differ():
    config = configured(tune=0, strategies="lora", seeds=2, few_shot_curve=(1,))
    begun = []
    while (planned := next_planned(config, {"search": [], "trials": []}, begun)) is not None:
        begun.append(planned)
    assert len({planned.name for planned in begun}) == len(begun) == 4
