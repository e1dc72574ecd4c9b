"""What codes stand for, by rows: the values of the whole layer, to the last bit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lightsft.export.recoding import Recoding
from lightsft.low_rank import tiles
from lightsft.quantization import Quantization, dequantized
from lightsft.quantizing import quantized_layer

WAYS = [Quantization("int8"), *(Quantization(scheme, double) for scheme in ("nf4", "fp4") for double in (False, True))]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("columns", "transposed"), [(192, False), (100, False), (192, True)])
def test_rows_are_those_of_the_whole_layer(how, dtype, columns, transposed):
    stored = (0.1 * torch.randn(3000, columns, generator=torch.Generator().manual_seed(0))).to(dtype)
    matrix = stored.T if transposed else stored
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    expected = dequantized(quantized_layer(layer, how, dtype, weight=matrix))
    expected = expected.T if transposed else expected
    rows = Recoding(how, transposed).by_rows(*stored.shape, lambda part: stored[part])
    found = torch.cat([rows(stored[part], part).float() for part in tiles(*stored.shape)])
    assert torch.equal(found, expected)
    assert torch.equal(Recoding(how, transposed).whole(stored).float(), expected)
    assert not torch.equal(found, stored.float())


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_only_what_depends_on_other_rows_is_read_before(how):
    stored = torch.randn(64, 128)
    read = []
    Recoding(how).by_rows(64, 128, lambda part: read.append(part) or stored[part])
    assert bool(read) == how.double


def test_rows_that_are_coded_in_another_thread_are_the_same():
    """The mean of the scales is summed with as many threads as where the model is loaded."""
    how = Quantization("nf4", True)
    stored = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    recoding = Recoding(how)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.submit(recoding.whole, stored).result()
    layer = nn.Linear(2048, 4096, bias=False)
    assert torch.equal(found.float(), dequantized(quantized_layer(layer, how, torch.bfloat16, weight=stored)))
