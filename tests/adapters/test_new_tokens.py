"""New tokens against PEFT's trainable tokens, and from a tokenizer without them to a merged checkpoint with them."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import lightsft
from lightsft import Backbone
from lightsft.artifact import load_base
from lightsft.errors import ArtifactError, ConfigurationError, TargetError
from lightsft.quantization import quantized_layers
from lightsft_adapters.new_tokens import NewTokens
from tests.checkpoints import LABELS, chat_tokenizer, save_bert, save_llama, wordpiece_tokenizer
from tests.test_injection import same, shape_of, step, values_of
from tests.tiny_models import VOCABULARY, batch, gradients, logits, off, randomise, tiny
from tests.zoo.models_and_inputs import build, find

ROWS = ".rows"


def llama(tokenizer=None, **options):
    """A tiny Llama as a backbone, its vocabulary that of the tokenizer."""
    sizes = {} if tokenizer is None else {"vocab_size": len(tokenizer)}
    return Backbone(tiny("llama", **sizes, **options), tokenizer=tokenizer)


def with_tokens(model, *tokens):
    """A batch that holds these tokens; without any, its own alone."""
    given = batch(model, labels=False)
    for place, token in enumerate(tokens):
        given["input_ids"][:, 2 + place] = token
    return given


def predict(model, *tokens):
    with torch.no_grad():
        return model(**with_tokens(model, *tokens)).logits


def rows_of(injection):
    return {name: tensor for name, tensor in injection.tensors().items() if name.endswith(ROWS)}


# ---- what it computes


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_those_of_pefts_trainable_tokens(tied):
    plain, ids = tiny("llama", tie_word_embeddings=tied), (50, 7, 12)
    injection = randomise(NewTokens(rows=ids).inject(Backbone(copy.deepcopy(plain))), scale=0.3)
    targets = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = peft.TrainableTokensConfig(token_indices=list(ids), target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging tied layers may go wrong: nothing is merged here
        reference = peft.get_peft_model(plain, config).eval()
    theirs = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    named = {
        name.removeprefix("base_model.model.").replace("trainable_tokens_delta.default", "weight.rows"): p
        for name, p in theirs.items()
    }
    assert named.keys() == injection.named_parameters().keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(injection.named_parameters()[name])
    given = with_tokens(injection.model, *ids)
    given["labels"] = given["input_ids"]
    ours, expected = injection.model(**given), reference(**given)
    assert off(ours.logits, expected.logits) <= 1e-6
    ours.loss.backward()
    expected.loss.backward()
    for name, parameter in injection.named_parameters().items():
        assert off(parameter.grad, named[name].grad) <= 1e-5, name


def test_only_the_rows_and_the_task_head_are_trained_and_saved(tmp_path, name, model):
    injection = NewTokens(count=2).inject(Backbone(model))
    trained = {key for key in injection.named_parameters() if not key.startswith("class")}
    assert all(key.endswith(ROWS) for key in trained)
    width = model.get_input_embeddings().weight.shape[1]
    assert injection.trainable_parameters - sum(
        p.numel() for key, p in injection.named_parameters().items() if key not in trained
    ) == 2 * width * len(trained)
    injection.save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        sizes = [file.get_tensor(key).shape for key in file.keys() if not key.startswith("base_model.model.class")]  # noqa: SIM118
    assert sorted(map(tuple, sizes)) == sorted([(2,), *[(2, width)] * len(trained)])


def test_disabled_and_ejected_the_backbone_is_as_it_was_bit_for_bit(model):
    before, values, shape, config = logits(model), values_of(model), shape_of(model), model.config.to_dict()
    injection = randomise(NewTokens(count=2).inject(Backbone(model)))
    assert model.config.vocab_size == VOCABULARY + 2
    step(injection)
    trained = predict(model, VOCABULARY)
    with injection.disabled():
        assert torch.equal(logits(model), before)
        assert not torch.equal(predict(model, VOCABULARY)[..., : before.shape[-1]], trained[..., : before.shape[-1]])
    assert torch.equal(predict(model, VOCABULARY), trained)
    injection.eject()
    assert torch.equal(logits(model), before)
    assert same(values_of(model), values)
    assert shape_of(model) == shape
    left = model.config.to_dict()
    assert {**left, "problem_type": None} == {**config, "problem_type": None}  # a loss sets it


def test_a_step_moves_the_rows_and_nothing_else():
    backbone = llama()
    injection = NewTokens(count=2).inject(backbone)
    values, rows = values_of(backbone.model), {key: row.clone() for key, row in rows_of(injection).items()}
    given = with_tokens(backbone.model, VOCABULARY, VOCABULARY + 1)
    given["labels"] = given["input_ids"]
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    backbone.model(**given).loss.backward()
    optimizer.step()
    after = values_of(backbone.model)
    assert all(torch.equal(after[key], value) for key, value in values.items() if "lightsft" not in key)
    assert all(not torch.equal(row, rows[key]) for key, row in rows_of(injection).items())


def test_the_probe_reaches_rows_that_no_known_token_would():
    """A classifier has no logits for tokens: only looking a new one up shows that it is alive."""
    injection = NewTokens(count=1).inject(Backbone(tiny("bert")))
    assert not injection.skipped
    found = gradients(injection.model, rows_and_parameters(injection))
    assert not any(gradient.any() for gradient in found.values())
    given = with_tokens(injection.model, VOCABULARY) | {"labels": torch.tensor([0, 1])}
    injection.model(**given).loss.backward()
    assert all(parameter.grad.any() for parameter in rows_and_parameters(injection).values())


def rows_and_parameters(injection):
    return {name: p for name, p in injection.named_parameters().items() if name.endswith(ROWS)}


# ---- what rows start at


def test_new_rows_start_at_the_mean_of_all():
    backbone = llama(tie_word_embeddings=False)
    rows = rows_of(NewTokens(count=2).inject(backbone))
    for table in (backbone.model.model.embed_tokens, backbone.model.lm_head):
        name = "model.embed_tokens" if isinstance(table, nn.Embedding) else "lm_head"
        mean = table.weight.detach().double().mean(0).expand(2, -1)
        assert off(rows[f"{name}.weight.rows"], mean) <= 1e-6


def test_a_new_bias_starts_at_the_mean_of_all():
    model = build(find("masked-lm", "bert"))
    nn.init.normal_(model.cls.predictions.bias)
    rows = rows_of(NewTokens(count=1).inject(Backbone(model)))
    assert off(rows["cls.predictions.bias.rows"], model.cls.predictions.bias.double().mean()[None]) <= 1e-6


def test_text_rows_start_at_the_mean_of_the_pieces_that_the_text_was_split_into():
    tokenizer = chat_tokenizer()
    backbone = llama(tokenizer, tie_word_embeddings=False)
    tokens = ("<ab>", "zz")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    assert [len(ids) for ids in pieces] == [4, 2]
    rows = rows_of(NewTokens(tokens=tokens, initialisation="text").inject(backbone))
    for name, table in (("model.embed_tokens", backbone.model.model.embed_tokens), ("lm_head", backbone.model.lm_head)):
        expected = torch.stack([table.weight[ids].double().mean(0) for ids in pieces])
        assert off(rows[f"{name}.weight.rows"], expected) <= 1e-6


@pytest.mark.parametrize("initialisation", ["mean", "text", "random"])
def test_a_tokenizer_that_has_the_tokens_already_gives_the_same_rows(initialisation):
    plain, extended, tokens = chat_tokenizer(), copy.deepcopy(chat_tokenizer()), ("<ab>", "zz")
    extended.add_tokens(list(tokens))
    strategy = NewTokens(tokens=tokens, initialisation=initialisation)
    model = tiny("llama", vocab_size=len(plain))
    before = logits(model)
    injection = strategy.inject(Backbone(model, tokenizer=extended))
    assert same(injection.tensors(), strategy.inject(llama(plain)).tensors())
    assert len(injection.backbone.tokenizer) == len(extended) == len(plain) + 2
    assert injection.backbone.model.config.vocab_size == len(extended)
    assert torch.equal(logits(injection.eject().model), before)


def test_a_saved_folder_loads_onto_the_base_with_the_saved_tokenizer(tmp_path):
    injection = randomise(NewTokens(tokens=("<ab>", "zz"), initialisation="text").inject(llama(chat_tokenizer())))
    injection.save(tmp_path)
    injection.backbone.tokenizer.save_pretrained(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded = lightsft.load(tmp_path, Backbone(tiny("llama", vocab_size=len(chat_tokenizer())), tokenizer=saved))
    assert same(loaded.tensors(), injection.tensors())
    given = {"input_ids": torch.tensor([saved("x<ab>yzz", add_special_tokens=False)["input_ids"]])}
    with torch.no_grad():
        assert torch.equal(loaded.model(**given).logits, injection.model(**given).logits)


def test_text_rows_load_without_a_tokenizer(tmp_path):
    injection = randomise(NewTokens(tokens=("<ab>",), initialisation="text").inject(llama(chat_tokenizer())))
    injection.save(tmp_path)
    loaded = lightsft.load(tmp_path, tiny("llama", vocab_size=len(chat_tokenizer())))
    assert loaded.strategy == injection.strategy
    assert same(loaded.tensors(), injection.tensors())
    assert not loaded.backbone.restoring
    loaded.eject()
    with pytest.raises(ConfigurationError, match="without a tokenizer"):
        loaded.strategy.inject(loaded.backbone)


def test_a_tokenizer_that_cannot_forget_a_token_is_refused():
    class Knows:
        """A tokenizer without a backend."""

        def __call__(self, text, **options):
            return {"input_ids": [VOCABULARY]}

        def __deepcopy__(self, memo):
            return self

        def add_tokens(self, tokens, **options):
            return 0

        def get_vocab(self):
            return {"<a>": VOCABULARY}

        def convert_tokens_to_ids(self, tokens):
            return [VOCABULARY]

    backbone = llama()
    backbone.tokenizer = Knows()
    with pytest.raises(ConfigurationError, match=f"the token {VOCABULARY} of '<a>', and the model has {VOCABULARY}"):
        NewTokens(tokens=("<a>",), initialisation="text").inject(backbone)


def test_random_rows_are_as_wide_as_the_others_and_depend_on_the_seed_alone():
    def start(seed, **options):
        return rows_of(NewTokens(initialisation="random", **options).inject(llama(), seed=seed))["lm_head.weight.rows"]

    rows = start(0, count=50)
    assert float(rows.std()) == pytest.approx(float(llama().model.lm_head.weight.detach().std()), rel=0.05)
    assert torch.equal(start(0, count=2), rows[:2])
    assert not torch.equal(start(1, count=2), rows[:2])


def test_rows_of_known_tokens_start_as_they_are_and_change_nothing():
    model = tiny("llama")
    before = logits(model)
    injection = NewTokens(rows=(7, 12)).inject(Backbone(model))
    assert off(logits(model), before) <= 1e-6
    assert torch.equal(rows_of(injection)["model.embed_tokens.weight.rows"], model.model.embed_tokens.weight[[7, 12]])
    assert model.config.vocab_size == VOCABULARY


def test_a_reserved_row_that_the_tokenizer_does_not_know_starts_anew():
    """A vocabulary is often padded: the row is there, but no token has it."""
    tokenizer = chat_tokenizer()
    backbone = Backbone(tiny("llama", vocab_size=len(tokenizer) + 8), tokenizer=tokenizer)
    known = tokenizer.convert_tokens_to_ids("<|user|>")
    rows = rows_of(NewTokens(tokens=("<a>", "<|user|>")).inject(backbone))["lm_head.weight.rows"]
    weight = backbone.model.lm_head.weight.detach()
    assert backbone.model.config.vocab_size == len(weight) == len(tokenizer) + 8
    assert off(rows[0], weight.mean(0)) <= 1e-6
    assert torch.equal(rows[1], weight[known])


# ---- the tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_the_tokenizer_knows_the_tokens_until_they_are_ejected(special):
    tokenizer = chat_tokenizer()
    backbone, size = llama(tokenizer), len(tokenizer)
    injection = NewTokens(tokens=("<a>", "<b>"), special=special).inject(backbone)
    ids = backbone.tokenizer("x<b>y<a>", add_special_tokens=False)["input_ids"]
    assert ids[1::2] == [size + 1, size]
    assert backbone.tokenizer.decode(ids, skip_special_tokens=True) == ("xy" if special else "x<b>y<a>")
    assert len(tokenizer) == size
    injection.eject()
    assert backbone.tokenizer is tokenizer
    assert len(tokenizer(" <a>", add_special_tokens=False)["input_ids"]) > 1


def test_a_tokenizer_ahead_of_its_model_is_refused():
    tokenizer = chat_tokenizer()
    backbone = Backbone(tiny("llama", vocab_size=len(tokenizer) - 3), tokenizer=tokenizer)
    with pytest.raises(TargetError, match="resize_token_embeddings") as caught:
        NewTokens(tokens=("<a>",)).inject(backbone)
    assert str(len(tokenizer)) in caught.value.found
    assert backbone.tokenizer is tokenizer
    assert not any("lightsft" in name for name, _ in backbone.model.named_modules())


# ---- saved, loaded, merged


@pytest.mark.parametrize(
    "strategy", [NewTokens(count=2), NewTokens(rows=(VOCABULARY, 7)), NewTokens(tokens=("a", "b"))]
)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_saved_folder_loads_onto_the_base_and_onto_the_base_resized(strategy, name, tmp_path):
    injection = randomise(strategy.inject(Backbone(tiny(name))))
    expected = predict(injection.model, VOCABULARY)
    injection.save(tmp_path)
    plain, resized = tiny(name), tiny(name)
    resized.resize_token_embeddings(injection.model.config.vocab_size)
    for model in (plain, resized):
        loaded = lightsft.load(tmp_path, model)
        assert same(loaded.tensors(), injection.tensors())
        assert model.config.vocab_size == injection.model.config.vocab_size
        assert off(predict(model, VOCABULARY), expected) <= 1e-6
    assert torch.equal(predict(plain, VOCABULARY), expected)


def test_what_was_trained_on_a_resized_model_loads_onto_the_base(tmp_path):
    resized = tiny("llama")
    resized.resize_token_embeddings(VOCABULARY + 2)
    injection = randomise(NewTokens(rows=(VOCABULARY, VOCABULARY + 1)).inject(Backbone(resized)))
    injection.save(tmp_path)
    loaded = lightsft.load(tmp_path, tiny("llama"))
    assert off(predict(loaded.model, VOCABULARY), predict(resized, VOCABULARY)) <= 1e-6


def test_tokens_find_their_rows_whatever_ids_a_tokenizer_gives_them(tmp_path):
    tokenizer = chat_tokenizer()
    trained = randomise(NewTokens(tokens=("<a>", "<b>")).inject(llama(tokenizer)))
    trained.save(tmp_path)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<b>"])
    model = tiny("llama", vocab_size=len(tokenizer))
    model.resize_token_embeddings(len(other))
    loaded = lightsft.load(tmp_path, Backbone(model, tokenizer=other))
    text = "x<a>y<b>"
    ours, theirs = (
        predict_text(injection.backbone, text, injection.backbone.tokenizer.convert_tokens_to_ids(["<a>", "<b>"]))
        for injection in (trained, loaded)
    )
    assert off(theirs, ours) <= 1e-6


def predict_text(backbone, text, tokens):
    """The logits of known tokens, then those of `tokens`."""
    with torch.no_grad():
        given = backbone.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        found = backbone.model(input_ids=given["input_ids"]).logits
    return torch.cat([found[..., : len(chat_tokenizer())], found[..., tokens]], dim=-1)


def test_another_backbone_is_recognised_though_its_vocabulary_has_another_size(tmp_path):
    NewTokens(count=2).inject(llama()).save(tmp_path)
    other = tiny("llama", seed=1)
    with pytest.raises(ArtifactError, match="another backbone"):
        lightsft.load(tmp_path, other)
    other.resize_token_embeddings(VOCABULARY + 2)
    with pytest.raises(ArtifactError, match="another backbone"):
        lightsft.load(tmp_path, other)


def test_a_folder_with_other_rows_is_refused_by_name(tmp_path):
    NewTokens(count=2).inject(llama()).save(tmp_path)
    settings = json.loads((tmp_path / "lightsft.json").read_text())
    settings["options"]["count"] = 3
    (tmp_path / "lightsft.json").write_text(json.dumps(settings))
    model = tiny("llama")
    with pytest.raises(ArtifactError, match=r"model.embed_tokens.weight.rows has shape \(2, 32\), not \(3, 32\)"):
        lightsft.load(tmp_path, model)
    assert model.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert"])
def test_a_merged_checkpoint_is_a_plain_resized_model_with_the_same_logits(name, tied, tmp_path):
    model = tiny(name, tie_word_embeddings=tied)
    injection = randomise(NewTokens(count=2).inject(Backbone(model)))
    expected = predict(model, VOCABULARY, VOCABULARY + 1)
    merged = injection.merge()
    assert off(predict(merged, VOCABULARY, VOCABULARY + 1), expected) <= 1e-6
    merged.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.config.vocab_size == VOCABULARY + 2
    assert torch.equal(predict(reloaded, VOCABULARY, VOCABULARY + 1), predict(merged, VOCABULARY, VOCABULARY + 1))


@pytest.mark.slow
def test_a_merged_classifier_comes_with_its_tokenizer(tmp_path):
    base = save_bert(tmp_path / "base")
    backbone = Backbone.load(base, labels=LABELS, dtype="float32", device="cpu")
    size = len(wordpiece_tokenizer())
    randomise(NewTokens(tokens=("<a>", "<b>")).inject(backbone)).save(tmp_path / "adapter")
    with torch.no_grad():
        expected = backbone.model(**backbone.tokenizer("the <b> film", return_tensors="pt")).logits
    out = lightsft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["passed"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    ids = tokenizer("the <b> film", return_tensors="pt")
    assert ids["input_ids"][0, 2] == size + 1
    assert model.config.vocab_size == size + 2
    with torch.no_grad():
        assert off(model(**ids).logits, expected) <= 1e-6


def test_a_language_model_predicts_and_reads_its_new_tokens_after_loading_by_itself(tmp_path):
    base = save_llama(tmp_path / "base")
    backbone = Backbone.load(base, task="chat", dtype="float32", device="cpu")
    injection = randomise(NewTokens(tokens=("<tool>",), special=True).inject(backbone))
    injection.save(tmp_path / "adapter")
    loaded = lightsft.load(tmp_path / "adapter", load_base(tmp_path / "adapter", dtype="float32", device="cpu"))
    ids = loaded.backbone.tokenizer("we <tool> said", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert int(ids.max()) == len(chat_tokenizer())
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, backbone.model(ids).logits)
    assert torch.equal(loaded.merge().lm_head.weight[-1], rows_of(injection)["lm_head.weight.rows"][0])


# ---- options


@pytest.mark.parametrize(
    "options",
    [{}, {"tokens": ("<a>",), "count": 1}, {"count": 1, "rows": (3,)}, {"tokens": ("<a>",), "rows": (3,)}],
    ids=str,
)
def test_tokens_count_and_rows_are_one_of_three(options):
    with pytest.raises(ConfigurationError, match=r"tokens=.*count=.*rows="):
        NewTokens(**options).inject(llama())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": "<a>"}, "tokens"),
        ({"tokens": ("<a>", "<a>")}, "tokens"),
        ({"tokens": ("",)}, "tokens"),
        ({"tokens": (5,)}, "tokens"),
        ({"rows": (5, 5)}, "rows"),
        ({"count": -1}, "count"),
        ({"count": 1, "initialisation": "zero"}, "initialisation"),
        ({"count": 1, "initialisation": "text"}, "initialisation"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(options, named):
    with pytest.raises(ConfigurationError, match=named):
        NewTokens(**options)


def test_text_without_a_tokenizer_is_refused_and_leaves_no_trace():
    backbone = llama()
    shape = shape_of(backbone.model)
    with pytest.raises(ConfigurationError, match="without a tokenizer"):
        NewTokens(tokens=("<a>",), initialisation="text").inject(backbone)
    assert shape_of(backbone.model) == shape


def test_a_model_that_cannot_have_more_tokens_says_why_and_trains_known_ones():
    model = build(find("masked-lm", "ibert"))
    with pytest.raises(TargetError, match="not supported for I-BERT"):
        NewTokens(count=1).inject(Backbone(model))
    assert NewTokens(rows=(30,)).inject(Backbone(model)).trainable_parameters == model.config.hidden_size + 1


def test_a_model_that_looks_tokens_up_elsewhere_too_is_refused():
    model = tiny("llama")
    model.second_table = nn.Embedding(VOCABULARY, 4)
    model.register_forward_pre_hook(look_up_twice, with_kwargs=True)
    shape = shape_of(model)
    with pytest.raises(TargetError, match=f"does not take the token {VOCABULARY}: IndexError"):
        NewTokens(count=1).inject(Backbone(model))
    assert shape_of(model) == shape
    assert NewTokens(rows=(7,)).inject(Backbone(model)).parameters()


def look_up_twice(model, args, kwargs):
    model.second_table(kwargs["input_ids"])


def test_a_head_that_is_about_to_grow_is_no_quantized_layer():
    model = tiny("llama")
    NewTokens(count=2).inject(Backbone(model))
    assert model.lm_head.out_features == len(model.lm_head.weight) + 2
    assert not quantized_layers(model)
