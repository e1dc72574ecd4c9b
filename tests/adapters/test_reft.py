"""LoReFT against its formula in fp64, and where it acts: padding, training, generation, checkpointing."""

import copy
import io
import pickle
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, InjectionError, MergeError, TargetError
from lightsft_adapters.combined import Combined
from lightsft_adapters.prompt import Prompt
from lightsft_adapters.prompt_reader import PlacedPromptReader, PromptReader
from lightsft_adapters.reft import LoReFTSide, ReFT, Site, Subspace, ends_of
from tests.tiny_models import (
    EOS,
    PAD,
    batch,
    furthest,
    gradients_with_and_without_checkpointing,
    logits,
    off,
    randomise,
    tiny,
)
from tests.zoo.models_and_inputs import build, find, make_inputs
from tests.zoo.models_and_inputs import logits as zoo_logits

POSITIONS = ["f2+l3", "f4", "l1", "all"]


def inject(model, seed=0, **options):
    return ReFT(**{"rank": 3, "positions": "f2+l3", **options}).inject(Backbone(model), seed=seed)


def moved(model, **options):
    return randomise(inject(model, **options), scale=0.3)


def sides_of(model):
    return [(path.rpartition(".")[0], side) for path, side in model.named_modules() if isinstance(side, LoReFTSide)]


def ids(*rows):
    """Token ids and mask of rows of ids, in which 0 stands for padding."""
    tokens = torch.tensor(rows)
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}


# ---- the formula


def rotation_in_fp64(subspace):
    """The orthonormal rows, by Gram and Schmidt."""
    rows = []
    for column in subspace.basis.detach().double().T:
        for row in rows:
            column = column - (row @ column) * row
        rows.append(column / column.norm())
    return torch.stack(rows)


def edited_in_fp64(subspace, h):
    rotation, p = rotation_in_fp64(subspace), {k: v.detach().double() for k, v in subspace.named_parameters()}
    return h + (h @ p["weight"].T + p["bias"] - h @ rotation.T) @ rotation


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_the_rows_of_r_stay_orthonormal(scale):
    subspace = Subspace(5, 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        subspace.basis.add_(torch.randn(32, 5), alpha=scale)
    rotation = subspace.rotation()
    assert off(rotation @ rotation.T, torch.eye(5)) <= 1e-6
    assert off(rotation, rotation_in_fp64(subspace)) <= 1e-5


def by_hand(model, states, edits, prompt, ends):
    """What a block's output becomes, token by token; `prompt` holds the columns of each row's prompt."""
    expected = states.double().clone()
    for row, columns in enumerate(prompt):
        first, last = columns[: ends[0]], columns[max(0, len(columns) - ends[1]) :]
        middle = columns[(len(columns) + 1) // 2] if len(columns) > 1 else columns[-1] + 1
        for column in set(first) | set(last):
            nearer_last = column in last and (column not in first or column >= middle)
            expected[row, column] = edited_in_fp64(edits[-1 if nearer_last else 0], states[row, column].double())
    return expected


@contextmanager
def recorded(model, name):
    """What the block called `name` returns, without its edit and with it."""
    seen, block = {}, model.get_submodule(name)

    def keep(key):
        return lambda _, args, output: seen.update({key: output[0] if isinstance(output, tuple) else output})

    handles = [
        block.register_forward_hook(keep("raw"), prepend=True),
        block.register_forward_hook(keep("edited")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_block_with_an_edit_equals_the_formula_in_fp64(name, tied):
    model = tiny(name)
    moved(model, tied_weights=tied)
    block, side = sides_of(model)[1]
    assert len(side.edits) == 2 - tied
    with recorded(model, block) as seen:
        model(**ids([5, 6, 7, 8, 9, 10, EOS], [5, 6, 7, EOS, PAD, PAD, PAD], [PAD, PAD, 5, 6, 7, 8, EOS]))
    prompt = [list(range(7)), list(range(4)), list(range(2, 7))]
    expected = by_hand(model, seen["raw"], side.edits, prompt, (2, 3))
    assert off(seen["edited"], expected) <= 2e-6
    assert torch.equal(seen["edited"][1, 4:], seen["raw"][1, 4:])  # padding: the same bits
    assert not torch.equal(seen["edited"][1, :4], seen["raw"][1, :4])


def test_everywhere_means_everywhere():
    model = tiny("llama")
    moved(model, positions="all")
    block, side = sides_of(model)[1]
    with recorded(model, block) as seen:
        model(**ids([5, 6, 7, 8, 9, 10, EOS]))
    assert off(seen["edited"], edited_in_fp64(side.edits[0], seen["raw"].double())) <= 2e-6


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_start_has_no_effect(positions, tied, model):
    before = logits(model)
    inject(model, positions=positions, tied_weights=tied)
    assert torch.equal(before, logits(model))


# ---- positions


@pytest.mark.parametrize(
    ("prompt", "ends", "first", "last"),
    [
        ("11111111", (2, 3), "11000000", "00000111"),
        ("11111000", (2, 2), "11000000", "00011000"),
        ("00011111", (2, 2), "00011000", "00000011"),
        ("11111000", (1, 0), "10000000", "00000000"),
        ("00111100", (0, 3), "00000000", "00011100"),
        ("11111000", (7, 7), "11100000", "00011000"),  # short: each token belongs to the nearer end
        ("11110000", (7, 7), "11000000", "00110000"),
        ("11111000", (4, 2), "11100000", "00011000"),
        ("11111000", (1, 7), "10000000", "01111000"),
        ("00010000", (7, 7), "00010000", "00000000"),
        ("00000000", (7, 7), "00000000", "00000000"),
    ],
)
def test_ends_count_the_tokens_of_the_prompt(prompt, ends, first, last):
    def row(bits):
        return torch.tensor([[bit == "1" for bit in bits]])

    found = ends_of(row(prompt), *ends)
    assert torch.equal(found[0], row(first))
    assert torch.equal(found[1], row(last))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_padding_on_either_side_changes_nothing(positions, tied):
    model = tiny("llama")
    moved(model, positions=positions, tied_weights=tied)
    tokens = [5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        alone = model(**ids(tokens)).logits[0]
        padded = ids([*tokens, 0, 0, 0], [0, 0, 0, *tokens])
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
        together = model(**padded).logits
        unmasked = model(input_ids=padded["input_ids"]).logits
    assert off(together[0, :6], alone) <= 1e-5
    assert off(together[1, 3:], alone) <= 1e-5
    assert off(unmasked[1, 3:], alone) >= 1e-3


@pytest.mark.parametrize(
    ("mask", "length", "expected"),
    [("1110", 4, "1110"), ("1110", 6, "111000"), ("1111", 6, "111100"), ("11110000", 4, "1100"), ("0111", 2, "01")],
)
def test_a_sequence_of_another_length_than_the_mask(mask, length, expected):
    reader = PromptReader(causal=False)
    reader.enter(reader, {"attention_mask": torch.tensor([[int(bit) for bit in mask]])})
    found = reader.prompt(nn.Identity().eval(), torch.zeros(1, length, 2), 1, length)
    assert "".join(str(int(bit)) for bit in found[0]) == expected


def test_an_inner_mask_in_the_same_form_is_more_to_the_point_and_one_in_another_is_not():
    reader = PromptReader(causal=False)
    inner, rows, eager = nn.Identity(), torch.zeros(1, 4, 2), nn.Identity().eval()
    reader.enter(reader, {"attention_mask": torch.tensor([[1, 1, 1, 1]])})
    reader.enter(inner, {"attention_mask": torch.tensor([[0, 1, 1, 0]])})
    assert reader.prompt(eager, rows, 1, 4).tolist() == [[False, True, True, False]]
    reader.leave(inner)
    reader.enter(inner, {"attention_mask": torch.tensor([[0.0, -1e4, 0.0, 0.0]])})
    assert reader.prompt(eager, rows, 1, 4).all()


def test_a_mask_in_which_tokens_cannot_be_counted_is_refused():
    model = tiny("llama")
    inject(model)
    inputs = ids([5, 6, 7, 8])
    with pytest.raises(InjectionError, match=r"\(1, 1, 4, 4\)(?s:.*)positions='all'"):
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())


def test_a_call_that_is_interrupted_leaves_no_trace():
    model = tiny("llama")
    moved(model)
    before = logits(model)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**ids([0, 0, 0, 0, 0, 0, 0, 5, 6], [0, 0, 0, 0, 0, 0, 0, 5, 6]))
    handle.remove()
    assert torch.equal(logits(model), before)


# ---- training


def test_with_labels_the_prompt_is_what_leads_up_to_them():
    model = tiny("llama")
    moved(model, tied_weights=False)
    block, side = sides_of(model)[1]
    inputs = ids([5, 6, 7, 8, 9, 10, 11, EOS], [0, 0, 5, 6, 7, 8, 9, EOS], [5, 6, 7, EOS, 0, 0, 0, 0])
    labels = torch.tensor(
        [
            [-100] * 4 + [9, -100, 11, EOS],  # an answer, a question, an answer
            [-100] * 6 + [9, EOS],
            [5, 6, 7, EOS] + [-100] * 4,  # nothing leads up to it: all of it
        ]
    )
    prompt = [[0, 1, 2, 3], [2, 3, 4, 5], [0, 1, 2, 3]]
    with recorded(model, block) as seen:
        model(**inputs, labels=labels)
    expected = by_hand(model, seen["raw"], side.edits, prompt, (2, 3))
    assert off(seen["edited"], expected) <= 2e-6


def test_labels_that_are_kept_out_of_the_call_can_be_announced():
    model = tiny("llama")
    injection = moved(model)
    inputs, labels = ids([5, 6, 7, 8, 9, 10, 11, EOS]), torch.tensor([[-100] * 4 + [9, 10, 11, EOS]])
    reader = next(p for p in injection.primitives if isinstance(p, PlacedPromptReader))
    with torch.no_grad():
        expected, unaware = model(**inputs, labels=labels).logits, model(**inputs).logits
        reader.announce({**inputs, "labels": labels})
        announced, after = model(**inputs).logits, model(**inputs).logits
    assert torch.equal(announced, expected)
    assert torch.equal(after, unaware)
    assert not torch.equal(unaware, expected)


def test_labels_of_a_classifier_or_of_an_encoder_say_nothing_about_the_prompt():
    for name in ("bert", "t5", "bart"):
        model = tiny(name)
        moved(model)
        inputs = batch(model)
        with torch.no_grad():
            labelled = model(**inputs).logits
            inputs.pop("labels")
            if name == "t5":
                inputs["decoder_input_ids"] = model._shift_right(batch(model)["labels"])
            assert torch.equal(labelled, model(**inputs).logits)
    model = build(find("masked-lm", "bert"))
    moved(model)
    inputs = ids([25, 26, 27, 28, 29, 30, 31])
    labels = torch.where(torch.arange(7) < 4, -100, inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).logits, model(**inputs).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_gradient_checkpointing_changes_no_gradient(name, tied, use_reentrant):
    plain, checkpointed = gradients_with_and_without_checkpointing(
        moved(tiny(name), tied_weights=tied), use_reentrant=use_reentrant
    )
    assert furthest(checkpointed, plain) <= 1e-6


class Recomputed(nn.Module):
    """A block that is computed again in the backward pass, its hooks included, as transformers 5.0 does it."""

    def __init__(self, block, use_reentrant):
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, states, **kwargs):
        return checkpoint(partial(self.block, **kwargs), states, use_reentrant=self.use_reentrant)


def gradients_of_two_passes(use_reentrant=None):
    """Of the sum of two losses, whose rows have their prompts in different places."""
    model = tiny("llama", use_cache=False).train()
    injection = moved(model)
    names = {id(parameter): key for key, parameter in injection.named_parameters().items()}
    if use_reentrant is not None:
        model.model.layers = nn.ModuleList(Recomputed(block, use_reentrant) for block in model.model.layers)
        model.enable_input_require_grads()
    first = model(**ids([5, 6, 7, 8, 9, 10, 0, 0, 0])).logits.square().mean()
    second = model(**ids([0, 0, 0, 0, 5, 6, 7, 8, 9])).logits.square().mean()
    (first + second).backward()
    return {names[id(p)]: p.grad.clone() for p in model.parameters() if id(p) in names}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_blocks_that_are_computed_again_find_the_positions_of_their_own_pass(use_reentrant):
    assert furthest(gradients_of_two_passes(use_reentrant), gradients_of_two_passes()) <= 1e-6


def test_a_block_in_training_that_is_called_by_itself_is_refused():
    model = tiny("llama").train()
    inject(model)
    states = torch.zeros(1, 4, 32)
    positions = model.model.rotary_emb(states, torch.arange(4)[None])
    with pytest.raises(InjectionError, match="outside the model"):
        model.model.layers[0](states, position_embeddings=positions)


def test_training_lowers_the_loss():
    injection = inject(tiny("bert"), positions="f1", rank=8)
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = injection.model(**batch(injection.model)).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ---- generation

PROMPTS = ids([0, 0, 0, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17], [0, 0, 0, 0, 0, 0, 9])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_equals_generation_without(name, positions, beams):
    model = tiny(name, eos_token_id=None)
    injection = moved(model, positions=positions, tied_weights=False)
    with_cache = model.generate(**PROMPTS, **GREEDY, num_beams=beams)
    assert torch.equal(with_cache, model.generate(**PROMPTS, **GREEDY, num_beams=beams, use_cache=False))
    with injection.disabled():
        assert not torch.equal(with_cache, model.generate(**PROMPTS, **GREEDY, num_beams=beams))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # whose masks of four dimensions hold truths, and zeros
def test_generation_with_a_static_cache_equals_generation_with_one_that_grows(positions, attention):
    model = tiny("llama", eos_token_id=None, attn_implementation=attention)
    moved(model, positions=positions)
    expected = model.generate(**PROMPTS, **GREEDY)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(expected, model.generate(**PROMPTS, **GREEDY, **options))


@pytest.mark.parametrize("positions", POSITIONS)
def test_drafts_that_are_checked_together_with_the_prompt_are_not_part_of_it(positions):
    model = tiny("llama", eos_token_id=None)
    moved(model, positions=positions)
    tokens = torch.tensor([[5, 6, 7, 5, 6, 8, 5, 6]])  # it repeats itself, so there are drafts from the start
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(**prompt, **GREEDY)
    assert torch.equal(expected, model.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3))
    assert torch.equal(expected, model.generate(tokens, attention_mask=prompt["attention_mask"], **GREEDY))


def test_a_prompt_read_in_pieces_is_refused():
    model = tiny("llama")
    moved(model)
    with pytest.raises(InjectionError, match="prefill_chunk_size"):
        model.generate(**PROMPTS, **GREEDY, prefill_chunk_size=2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_edits_the_prompt_alone(use_cache):
    """Against a loop in which hooks of the test's own edit the prompt's columns of the plain model, in fp64."""
    model, plain = tiny("llama", eos_token_id=None), tiny("llama", eos_token_id=None).double()
    moved(model)
    tokens, mask = PROMPTS["input_ids"], PROMPTS["attention_mask"]
    prompt = [row.nonzero().flatten().tolist() for row in mask]
    for block, side in sides_of(model):

        def edit(module, args, output, side=side):
            return by_hand(plain, output, side.edits, prompt, (2, 3))

        plain.get_submodule(block).register_forward_hook(edit)
    for _ in range(8):
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            scores = plain(input_ids=tokens, attention_mask=mask, position_ids=positions).logits[:, -1]
        tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(model.generate(**PROMPTS, **GREEDY, use_cache=use_cache), tokens)


def test_a_cache_filled_by_hand_equals_generation():
    model = tiny("llama", eos_token_id=None)
    moved(model)
    tokens = PROMPTS["input_ids"][1:2]
    expected = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=True)
        for _ in range(8):
            new = output.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], dim=1)
            output = model(input_ids=new, past_key_values=output.past_key_values)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_an_encoder_decoder_generates_alike_with_and_without_a_cache(beams):
    model = tiny("t5", eos_token_id=None)
    injection = moved(model)
    with_cache = model.generate(**PROMPTS, **GREEDY, num_beams=beams)
    assert torch.equal(with_cache, model.generate(**PROMPTS, **GREEDY, num_beams=beams, use_cache=False))
    with injection.disabled():
        assert not torch.equal(with_cache, model.generate(**PROMPTS, **GREEDY, num_beams=beams))


def test_after_generation_a_forward_pass_counts_all_tokens_again():
    model = tiny("llama")
    moved(model)
    before = logits(model)
    model.generate(**PROMPTS, **GREEDY)
    assert torch.equal(logits(model), before)


# ---- beside virtual tokens


def changed_by_reft(model, given, tokens=3, **options):
    """(rows, columns) in which the last block's output changes with ReFT on it, virtual tokens included."""
    parts = [ReFT(rank=3, layers=[-1], **options), Prompt(tokens)]
    injection = randomise(Combined(parts).inject(Backbone(model)), scale=0.3)
    name, side = sides_of(model)[0]
    with torch.no_grad(), recorded(model, name) as seen:
        model(**given)
    assert seen["raw"].shape[1] == given["input_ids"].shape[1] + tokens
    assert side.enabled
    injection.eject()
    return (seen["raw"] != seen["edited"]).any(-1).nonzero().tolist()


@pytest.mark.parametrize(("positions", "columns"), [("f1", [0]), ("l1", [6]), ("f2+l1", [0, 1, 6])])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart"])
def test_positions_count_the_callers_tokens_beside_virtual_ones(name, positions, columns):
    """BERT has the virtual tokens after its first one, the others before it."""
    given = ids([11, 12, 13, 14, 15, 16, EOS])
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"]
    expected = [column if name == "bert" and column == 0 else column + 3 for column in columns]
    assert changed_by_reft(tiny(name), given, positions=positions) == [[0, column] for column in expected]


def test_padding_in_front_of_the_prompt_lies_between_it_and_the_virtual_tokens():
    given = ids([0, 0, 0, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17])
    changed = changed_by_reft(tiny("llama"), given, positions="f1+l2")
    assert changed == [[0, 6], [0, 8], [0, 9], [1, 3], [1, 8], [1, 9]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_with_virtual_tokens_edits_the_prompt_alone(use_cache):
    """A batch with padding on the left generates as each row does alone, with a cache as without one."""
    model = tiny("llama", eos_token_id=None)
    parts = [ReFT(rank=3, positions="f1+l2"), Prompt(3)]
    randomise(Combined(parts).inject(Backbone(model)), scale=0.3)
    together = model.generate(**PROMPTS, **GREEDY, use_cache=use_cache)
    for row, real in enumerate(PROMPTS["attention_mask"].bool()):
        alone = PROMPTS["input_ids"][row : row + 1, real]
        made = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **GREEDY)
        assert torch.equal(made[0, real.sum() :], together[row, 7:])


def test_blocks_that_are_computed_again_know_of_the_virtual_tokens():
    parts = [ReFT(rank=3, positions="f1+l2"), Prompt(3)]
    injection = randomise(Combined(parts).inject(Backbone(tiny("llama"))), scale=0.3)
    plain, checkpointed = gradients_with_and_without_checkpointing(injection)
    assert furthest(checkpointed, plain) <= 1e-6


# ---- placing, saving, removing


def test_in_an_encoder_decoder_the_encoder_is_edited_and_everywhere_the_decoder_too():
    def blocks(**options):
        return [name for name, _ in sides_of(inject(tiny("t5"), **options).model)]

    assert blocks() == ["encoder.block.0", "encoder.block.1"]
    assert blocks(positions="all") == [*blocks(), "decoder.block.0", "decoder.block.1"]


def test_layers_keep_only_their_blocks():
    assert [name for name, _ in sides_of(inject(tiny("llama"), layers=[-1]).model)] == ["model.layers.1"]
    with pytest.raises(TargetError, match="no layer 5"):
        inject(tiny("llama"), layers=[5])


@pytest.mark.parametrize(
    ("options", "edits"),
    [({}, 1), ({"tied_weights": False}, 2), ({"tied_weights": False, "positions": "f3"}, 1), ({"positions": "all"}, 1)],
)
def test_an_edit_has_two_matrices_and_a_vector(options, edits):
    assert inject(tiny("llama"), **options).trainable_parameters == 2 * edits * (3 * 32 + 3 * 32 + 3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_folder_loads_with_the_same_bits(positions, tmp_path):
    injection = moved(tiny("llama"), positions=positions, tied_weights=False)
    injection.save(tmp_path)
    loaded = lightsft.load(tmp_path, tiny("llama"))
    for key, tensor in loaded.tensors().items():
        assert torch.equal(tensor, injection.tensors()[key]), key
    assert torch.equal(logits(loaded.model), logits(injection.model))


def test_copies_and_pickles_compute_and_generate_by_themselves():
    model = tiny("llama", eos_token_id=None)
    injection = moved(model)
    expected, generated = logits(model), model.generate(**PROMPTS, **GREEDY)
    copied = copy.deepcopy(model)
    restored = pickle.load(io.BytesIO(pickle.dumps(model)))
    injection.eject()
    for other in (copied, restored):
        assert other.generate.model is other
        assert torch.equal(logits(other), expected)
        assert torch.equal(other.generate(**PROMPTS, **GREEDY, use_cache=False), generated)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_eject_leaves_nothing_behind(positions):
    model = tiny("llama")
    before = logits(model)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    moved(model, positions=positions).eject()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert model.generate.__func__ is type(model).generate
    assert torch.equal(logits(model), before)


def test_it_does_not_merge():
    with pytest.raises(MergeError, match="ReFT"):
        inject(tiny("bert")).merge()


def test_two_sets_of_edits_share_one_reader():
    model = tiny("llama")
    backbone = Backbone(model)
    from lightsft.injection import injecting

    with injecting(ReFT(), backbone, 0) as injection:
        ReFT(rank=2, layers=[0]).inject(backbone)
        ReFT(rank=3, layers=[1], positions="l1").inject(backbone)
    assert sum(isinstance(p, PlacedPromptReader) for p in injection.primitives) == 1
    assert len(sides_of(model)) == 2
    randomise(injection)
    with_edits = logits(model)
    injection.eject()
    assert not torch.equal(with_edits, logits(model))


def test_beside_bf16_weights_the_edits_are_fp32_and_the_output_stays_bf16():
    injection = moved(tiny("llama", dtype=torch.bfloat16), tied_weights=False)
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    assert logits(injection.model).dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    model = tiny("llama")
    moved(model, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("positions", ["", "f", "f0", "f0+l0", "7", "l3+f2", "f2l3", "+l3", "f2+", "every"])
def test_positions_that_mean_nothing_are_refused(positions):
    with pytest.raises(ConfigurationError, match=r"f7\+l7"):
        ReFT(positions=positions)


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        ReFT(**options)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ConfigurationError, match="at most 32"):
        inject(tiny("bert"), rank=33)


# ---- other layouts of the residual stream


@pytest.mark.parametrize(
    ("shape", "layers", "tokens", "found"),
    [
        ((1, 7, 64), [nn.Linear(64, 64)], 7, (64, -1, 0, 1)),
        ((7, 1, 64), [nn.Linear(64, 64)], 7, (64, -1, 1, 0)),  # tokens first
        ((5, 1, 64), [nn.Linear(64, 64)], 7, (64, -1, 1, 0)),  # a decoder's, of another length
        ((1, 4, 64), [nn.Linear(64, 64)], 7, (64, -1, 0, 1)),  # pooled
        ((4, 1, 7, 64), [nn.Linear(64, 64)], 7, (64, -1, 1, 2)),  # parallel streams before the batch
        ((1, 7, 2, 64), [nn.Linear(64, 64)], 7, (64, -1, 0, 1)),  # and after the tokens
        ((1, 16, 8, 8), [nn.Conv2d(16, 16, 1)], 0, (16, 1, 0, None)),
        ((1, 8, 8, 16), [nn.Linear(16, 16)], 0, (16, -1, 0, None)),
        ((1, 32, 40), [nn.Conv1d(32, 32, 1)], 0, (32, 1, 0, 1)),
        ((1, 32, 64), [nn.Conv1d(32, 32, 1), nn.Linear(32, 64)], 32, (64, -1, 0, 1)),
    ],
)
def test_the_layout_of_an_output_is_read_off_its_shape(shape, layers, tokens, found):
    site = Site.of("block", nn.Sequential(*layers), shape, tokens)
    assert (site.size, site.axis, site.batch, site.token) == found


@pytest.mark.parametrize(
    ("site", "shape"),
    [
        (Site("block", 8, -1, batch=0, token=1), (2, 5, 8)),
        (Site("block", 8, -1, batch=1, token=0), (5, 2, 8)),
        (Site("block", 8, -1, batch=1, token=2), (3, 2, 5, 8)),
        (Site("block", 8, -1, batch=0, token=1), (2, 5, 3, 8)),
    ],
)
def test_what_is_known_of_a_token_reaches_it_in_any_layout(site, shape):
    states, place = torch.zeros(shape), torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]) > 0
    assert site.count(states) == (2, 5)
    reached = (states + site.spread(place, states)).movedim(site.batch, 0)
    tokens = reached.movedim(site.token + (site.token < site.batch), 1).flatten(2)
    assert torch.equal(tokens, place[..., None].expand_as(tokens).float())


def test_an_image_is_read_row_by_row():
    site, states = Site("block", 8, 1, batch=0, token=None), torch.zeros(2, 3, 4, 8)
    assert site.count(states) == (2, 12)
    place = torch.arange(12)[None] < 5
    assert site.spread(place, states)[0, :, :, 0].flatten().tolist() == place[0].tolist()


@pytest.mark.parametrize(
    ("task", "model_type"),
    [("causal-lm", "xlnet"), ("causal-lm", "gemma3n_text"), ("image-cls", "convnextv2"), ("seq-cls", "funnel")],
)
def test_other_layouts_are_edited_and_put_back(task, model_type):
    entry = find(task, model_type)
    model = build(entry)
    inputs = make_inputs(entry, model)
    plain = zoo_logits(model, inputs)
    injection = moved(model, positions="f1", rank=2)
    assert torch.isfinite(zoo_logits(model, inputs)).all()
    assert not torch.equal(zoo_logits(model, inputs), plain)
    injection.eject()
    assert torch.equal(zoo_logits(model, inputs), plain)


def test_convolutions_that_read_sound_carry_no_residual_stream():
    edited = [name for name, _ in sides_of(inject(build(find("ctc", "wav2vec2")), positions="all").model)]
    assert edited == ["wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"]
