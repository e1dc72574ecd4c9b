"""The runner: limits, shards, going on after an interruption, and what the page says."""

import json
import subprocess
import sys

import pytest

from tests.zoo import sweep
from tests.zoo.coverage_page import missed_targets, page

FORKED = """
import json, sys, time
from tests.zoo import sweep
sweep.SECONDS, sweep.WAITING_SECONDS, sweep.BYTES = 0.3, 6, 2**28
pairs = [({"task": "t", "model_type": name}, "lora") for name in ("sleeps", "computes", "grows", "works")]

def compute(pair):
    if pair[0]["model_type"] == "sleeps":
        time.sleep(60)
    while pair[0]["model_type"] == "computes":
        pass
    if pair[0]["model_type"] == "grows":
        bytearray(2**30)
    return {"status": "passed"}

json.dump({row["model_type"]: row for row in sweep.forked(pairs, compute, jobs=2)}, sys.stdout)
"""


@pytest.fixture(scope="module")
def forked():
    """Rows of four pairs; computed elsewhere, since forking a test process is asking for trouble."""
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=sweep.ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_process_over_its_time_is_a_failure(forked):
    assert forked["sleeps"]["status"] == forked["computes"]["status"] == "failed"
    assert forked["sleeps"]["reason"] == "killed after 6 s"
    assert forked["computes"]["reason"] == "killed after 0.3 s of processor time"


def test_a_process_over_its_memory_is_a_failure(forked):
    assert forked["grows"]["status"] == "failed"
    assert "no answer" in forked["grows"]["reason"]


def test_the_others_go_on(forked):
    assert forked["works"]["status"] == "passed"
    assert forked["works"]["peak_bytes"] > 0


def pairs_of(*arguments):
    return [sweep._name(pair) for pair in sweep._pairs(sweep._options(list(arguments)))]


def test_shards_hold_every_pair_once():
    whole = pairs_of()
    parts = [pairs_of("--shard", f"{index}/3") for index in (1, 2, 3)]
    assert sorted(whole) == sorted(pair for part in parts for pair in part)
    assert len(whole) == len(set(whole)) == 5 * (533 + 108)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran = []

    def run(pairs, *, jobs):
        for pair in pairs[: 3 if not ran else None]:
            ran.append(sweep._name(pair))
            yield row(*ran[-1])

    monkeypatch.setattr(sweep, "run", run)
    arguments = ["--types", "llama,bert", "--out", str(tmp_path / "rows.jsonl")]
    sweep.main(arguments)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"cut off')
    sweep.main(arguments)
    assert sorted(ran) == sorted(pairs_of("--types", "llama,bert"))


def test_rows_of_other_sources_are_computed_again(tmp_path, monkeypatch):
    ran = []

    def run(pairs, *, jobs):
        ran.append(len(pairs))
        yield from (row(*sweep._name(pair)) for pair in pairs)

    monkeypatch.setattr(sweep, "run", run)
    arguments = ["--types", "llama", "--out", str(tmp_path / "rows.jsonl")]
    sweep.main(arguments)
    monkeypatch.setattr(sweep, "fingerprint", lambda: "edited")
    sweep.main(arguments)
    assert ran[0] == ran[1] > 0


# ---- the page


def row(task, model_type, strategy, status="passed", **facts):
    kind = {"attention": True, "experts": False} if strategy == "plain" else {"coverage": 1.0}
    cost = {"process_seconds": 1.0, "reason": "", "step": "attach", "source": "here"}
    return {"task": task, "model_type": model_type, "strategy": strategy, "status": status} | kind | cost | facts


def rows_of(number, strategy, **facts):
    """`number` architectures, the first of which is told more about."""
    plain = [row("causal-lm", f"type{index}", "plain") for index in range(number)]
    tried = [row("causal-lm", f"type{index}", strategy) for index in range(number)]
    return [*plain, tried[0] | facts, *tried[1:]]


@pytest.mark.parametrize(
    ("number", "strategy", "missed"),
    [(50, "full", 1), (50, "lora", 1), (50, "adapter", 0), (49, "adapter", 1), (20, "prefix", 0), (19, "prefix", 1)],
)
def test_one_failure_in_so_many_meets_or_misses_the_target(number, strategy, missed):
    assert not missed_targets(rows_of(number, strategy))
    for status in ("failed", "refused"):
        assert len(missed_targets(rows_of(number, strategy, status=status))) == missed


def test_models_without_attention_do_not_count_against_prefix():
    rows = rows_of(2, "prefix", status="refused")
    assert missed_targets(rows)
    rows[0]["attention"] = False
    assert not missed_targets(rows)


def test_low_coverage_counts_where_there_are_experts():
    rows = rows_of(2, "lora", coverage=0.89)
    assert not missed_targets(rows)
    rows[0]["experts"] = True
    assert "type0 (causal-lm) 89%" in "".join(missed_targets(rows))


def test_the_page_gives_every_reason_once_with_its_architectures():
    rows = rows_of(3, "lora", status="failed", step="merge", reason="off by 2 | 3\nExpected: less")
    rows[4] |= {"status": "failed", "step": "merge", "reason": "off by 2 | 4\nExpected: another"}
    assert "| lora | failed | merge | off by 2 \\| 3 | type0 (causal-lm), type1 (causal-lm) |" in page(rows)
    assert "| causal-lm | 3 | 1 / 0 / 2 |" in page(rows)
