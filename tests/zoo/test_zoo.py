"""A stratified selection of the zoo: every task, and every way of building a model that a strategy can trip over.

`make zoo` runs all of it. Here the selection is swept once, in processes of its own, and each test reads one result.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.zoo import sweep
from tests.zoo.coverage_page import EXPERT_COVERAGE
from tests.zoo.models_and_inputs import AUTO_CLASSES

SELECTED = {
    "causal-lm/llama": "the common decoder",
    "causal-lm/gpt2": "Conv1D, queries, keys and values in one layer",
    "causal-lm/bart": "half of an encoder-decoder",
    "causal-lm/mixtral": "experts as one tensor",
    "causal-lm/gpt_oss": "experts transposed, with biases; attention sinks",
    "causal-lm/qwen2_moe": "a shared expert beside the routed ones",
    "causal-lm/phimoe": "a router that returns a tuple",
    "causal-lm/deepseek_v3": "latent attention, experts behind dense layers",
    "causal-lm/deepseek_v32": "an indexer that chooses keys and gets no gradient",
    "causal-lm/jamba": "attention, state space and experts in one stack",
    "causal-lm/mamba": "a state space alone, weights read directly",
    "causal-lm/rwkv": "a recurrence that rescales its weights to evaluate",
    "causal-lm/zamba": "one block used by several layers",
    "causal-lm/bloom": "attention off the registry, with a bias for distance",
    "causal-lm/gemma3n_text": "weights read directly, in train mode only",
    "causal-lm/got_ocr2": "a tower that text never enters",
    "masked-lm/ibert": "buffers that training moves",
    "masked-lm/fnet": "no attention",
    "masked-lm/longformer": "a window, and global tokens",
    "seq-cls/bart": "a classifier on an encoder-decoder",
    "seq-cls/deberta-v2": "disentangled attention off the registry",
    "seq-cls/reformer": "reversible layers, hashed attention",
    "token-cls/bros": "boxes beside tokens",
    "qa/lxmert": "two modalities that cross, and a head of its own",
    "qa/xlnet": "two streams, and a head that searches",
    "seq2seq/t5": "a position bias",
    "seq2seq/nllb-moe": "experts in an encoder-decoder",
    "image-cls/resnet": "convolutions and batch norms",
    "image-cls/swin": "windows of pixels, in stages",
    "audio-cls/wav2vec2": "weights of a convolution under weight norm",
    "ctc/wav2vec2-conformer": "convolutions between attention layers",
}

PREFIX_IS_REFUSED = {  # attention, but not as a softmax of scores that meets the values in one product
    "masked-lm/longformer": "scores are cut into overlapping chunks",
    "seq-cls/reformer": "queries and keys are hashed into buckets, and normalised by a logsumexp",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The selection's rows by (task/type, strategy)."""
    out = tmp_path_factory.mktemp("zoo") / "rows.jsonl"
    command = [sys.executable, "-m", "tests.zoo.sweep", "--pairs", ",".join(SELECTED), "--jobs", "1", "--out", str(out)]
    subprocess.run(command, cwd=sweep.ROOT, check=False, stdout=subprocess.DEVNULL, env=os.environ)
    found = map(json.loads, out.read_text().splitlines())
    return {(f"{row['task']}/{row['model_type']}", row["strategy"]): row for row in found}


def test_every_task_is_selected():
    assert {name.partition("/")[0] for name in SELECTED} == set(AUTO_CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sweep.STRATEGIES)
@pytest.mark.parametrize("architecture", SELECTED)
def test_everything_holds_for(rows, architecture, strategy):
    row, plain = rows[architecture, strategy], rows[architecture, sweep.PLAIN]
    said = f"{architecture}, {SELECTED[architecture]}: {row['status']} at {row.get('step')}, {row.get('reason')}"
    assert plain["status"] == "passed", plain
    if strategy == "prefix" and (not plain["attention"] or architecture in PREFIX_IS_REFUSED):
        assert row["status"] == "refused", said
        return
    assert row["status"] == "passed", said
    if strategy == "lora" and plain["experts"]:
        assert row["coverage"] >= EXPERT_COVERAGE, said
