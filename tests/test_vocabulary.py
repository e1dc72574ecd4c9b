"""What grows with a vocabulary, compared with what transformers itself does when it resizes the model."""

import pytest
import torch
import transformers

from lightsft.errors import TargetError
from lightsft.vocabulary import find_vocabulary
from tests.tiny_models import VOCABULARY, logits, tiny
from tests.zoo.models_and_inputs import build, find

ZOO = [
    ("masked-lm", "bert"),  # a bias beside the head
    ("masked-lm", "mobilebert"),  # a table with its tokens along the second dimension
    ("seq2seq", "bart"),  # a bias that is a buffer
    ("causal-lm", "gemma3n_text"),  # a table for each layer
    ("causal-lm", "opt"),
]


def plainly_resized(model, size):
    model.resize_token_embeddings(size)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("key", [*ZOO, "llama", "gpt2", "t5", "roberta"], ids=str)
@pytest.mark.parametrize("more", [1, 3])
def test_a_grown_model_has_the_shapes_and_sizes_of_one_that_transformers_resized(key, more):
    def make():
        return build(find(*key)) if isinstance(key, tuple) else tiny(key)

    model, expected = make(), make()
    vocabulary = find_vocabulary(model)
    size = vocabulary.size + more
    shapes = plainly_resized(expected, size)
    vocabulary.grow(model, size)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.get_input_embeddings().num_embeddings == size


@pytest.mark.parametrize("tied", [True, False])
def test_growing_keeps_values_parameters_and_ties(tied):
    model = tiny("llama", tie_word_embeddings=tied)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    find_vocabulary(model).grow(model, VOCABULARY + 2)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter[:VOCABULARY], before[name][1])


def test_looking_changes_nothing(model):
    before, config, expected = logits(model), model.config.to_dict(), dict(vars(model))
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    find_vocabulary(model)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert vars(model).keys() == expected.keys()


def test_a_declared_size_is_seen_and_taken_back(model):
    vocabulary, config, attributes = find_vocabulary(model), model.config.to_dict(), set(vars(model))
    vocabulary.declare(VOCABULARY + 5)
    assert model.config.vocab_size == VOCABULARY + 5
    vocabulary.declare(VOCABULARY)
    assert model.config.to_dict() == config
    assert set(vars(model)) == attributes


def test_a_size_that_transformers_forgets_is_declared_too():
    """Marian's decoder has a size of its own in the configuration: without it a resized checkpoint does not load."""
    model = build(find("causal-lm", "marian"))
    size = model.config.decoder_vocab_size
    find_vocabulary(model).grow(model, size + 1)
    assert model.config.decoder_vocab_size == size + 1


def test_a_bias_that_transformers_forgets_grows_too(tmp_path):
    """Resized by transformers, Reformer loses the bias of its head, and the checkpoint lacks it."""
    model = build(find("causal-lm", "reformer"))
    find_vocabulary(model).grow(model, 162)
    assert model.lm_head.bias.shape == (162,)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(reloaded.lm_head.bias, model.lm_head.bias)


def test_a_model_that_looks_no_tokens_up_is_refused():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    with pytest.raises(TargetError, match="looks no tokens up"):
        find_vocabulary(transformers.ViTForImageClassification(config))


def test_a_model_that_transformers_cannot_resize_says_why_and_shows_its_ends():
    vocabulary = find_vocabulary(build(find("masked-lm", "ibert")))
    assert "not supported for I-BERT" in vocabulary.cannot_grow
    assert "ibert.embeddings.word_embeddings.weight" in {owner for table in vocabulary.tables for owner in table.owners}
