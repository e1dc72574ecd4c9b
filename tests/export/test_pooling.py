"""An embedding model that sentence-transformers reads gives the vectors that were trained."""

import numpy as np
import pytest
import sentence_transformers
import torch

from lightsft.config import SingleConfig, build
from lightsft.export.merge import merge_folder
from lightsft.predict import Predictor
from lightsft.training.single import train
from tests.checkpoints import write_jsonl

TEXTS = ["good film", "a really bad day", "the film was good", "not a good day", "bad"]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("check", ["tiles", "load"])
def test_sentence_transformers_gives_the_vectors_that_were_trained(bert, tmp_path, pooling, check):
    rows = [{"anchor": f"{TEXTS[n % 5]} {n}", "positive": f"{TEXTS[n % 3]} {n}"} for n in range(60)]
    values = {"model": str(bert), "data": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "out": tmp_path / "out"}
    values |= {"task": f"embedding(pooling={pooling})", "epochs": 1, "dtype": "float32", "learning_rate": 0.01}
    train(build(SingleConfig, values), say=lambda line: None)
    merge_folder(tmp_path / "out", tmp_path / "merged", check=check)
    with torch.no_grad():
        found = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(TEXTS)
    wanted = [row["embedding"] for row in Predictor(tmp_path / "out").predict(TEXTS)]
    np.testing.assert_allclose(found, np.array(wanted), atol=1e-5)
