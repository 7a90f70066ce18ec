"""Conversations as TRL, OpenAI and ShareGPT write them: what is learned, turn for turn, and the true reason of a refusal."""

import json
import random

import pytest
from chats import (
    BLOCKS,
    CONFIG,
    DEAF,
    DEFAULT_SYSTEM,
    ENDS,
    FIRST_TOKEN,
    JSON_CALLS,
    NEEDS_CONTENT,
    NO_CALLS,
    NO_PROMPT,
    OPENS_THOUGHT,
    STRICT,
    THINKING,
    TOOLS,
    TURNS,
    assistant,
    call,
    chat_tokenizer,
    learned,
    system,
    tool,
    user,
)
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from world import make_world, write_rows

from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import DataSection
from lora_null.recipes.data.conversations import prompt_text
from lora_null.recipes.data.examples import read_examples, tokenize, training_data
from lora_null.recipes.job import inputs_beside_the_base, inspect_recipe
from lora_null.utils.chat import common_prefix, conversation_text, render_chat, turn_spans
from lora_null.utils.errors import UserError

TOOL = {"type": "function", "function": {"name": "add", "description": "sums", "parameters": {"type": "object"}}}


def read(tmp_path, rows, tokenizer, *, preferences=False, max_length=None, **options):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    section = DataSection(path=str(path), **{"template": "chat", **options})
    return training_data(section, tokenizer, preferences=preferences, max_length=max_length)


def spans(tmp_path, messages, chat=TOOLS, **options):
    tokenizer, row = chat_tokenizer(chat), {"messages": messages, **options.pop("row", {})}
    data = read(tmp_path, [row], tokenizer, messages="messages", **options)
    (tokens,) = tokenize(data.examples, options.get("template", "chat"), tokenizer)
    return learned(tokens, tokenizer), tokenizer.decode(tokens.ids)


def refusal(tmp_path, rows, chat=TOOLS, **options):
    with pytest.raises(UserError) as raised:
        read(tmp_path, rows, chat_tokenizer(chat), **options)
    assert "\n" not in str(raised.value) and "row 1)" in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("names", [("User", "Assistant"), ("Human", "GPT"), ("prompter", "bot"), ("USER", "CHATBOT"), ("human", "ai")])  # fmt: skip
def test_roles_by_other_names(tmp_path, names):
    messages = [{"role": name, "content": text} for name, text in zip((*names, names[0]), ("1+1?", "2", "thanks"))]
    assert spans(tmp_path, messages) == spans(tmp_path, [user("1+1?"), assistant("2"), user("thanks")])
    odd = [{"role": "Critic", "content": "hm"}, user("1+1?"), assistant("2")]
    assert spans(tmp_path, odd)[1].startswith("<Critic>hm")  # a role of its own


@pytest.mark.parametrize("names", [("function_call", "function_response"), ("tool_call", "tool_response"), ("function_call", "observation")])  # fmt: skip
def test_calls_by_role(tmp_path, names):
    asks, answers = ({"role": name, "content": text} for name, text in zip(names, ('{"name": "add", "arguments": {"a": 1}}', "2")))  # fmt: skip
    found = spans(tmp_path, [user("1+1?"), asks, answers, assistant("2")])
    assert found == spans(tmp_path, [user("1+1?"), call(), tool("2"), assistant("2")])


CHAT = [system("Be brief."), user("1+1?"), assistant("2"), user("and 1?"), assistant("3")]


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, FIRST_TOKEN, NO_PROMPT])
@pytest.mark.parametrize("later", [[], [user("a"), assistant("b")]], ids=["alone", "goes on"])
def test_what_stands_before_a_first_turn_of_the_assistant_is_not_learned(tmp_path, template, later):
    end = "</s>" if template == NO_PROMPT else "</s>\n"
    found, text = spans(tmp_path, [assistant("Hello!"), *later], template)
    assert [said.strip(" ") for said in found] == ["Hello!" + end, "b" + end][: len(found)]
    assert len(found) == 1 + bool(later) and text.startswith(("<system>Be good.\n<assistant>Hello!", "<s>"))


VICUNA = (
    "{% if messages[0].role != 'system' %}A chat of USER: and ASSISTANT: x. {% endif %}{% for m in messages %}"
    "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] }}{{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
NEEDS_PROMPT = "{% if messages[-1].role == 'user' and not add_generation_prompt %}{{ raise_exception('') }}{% endif %}"
NAMES_ITSELF = DEFAULT_SYSTEM.replace("Be good.", "You answer after <assistant>")
EMPTY_THOUGHT = THINKING.replace("<assistant>{% endif %}", "<assistant><think></think>{% endif %}")


@pytest.mark.parametrize("template, before", [
    (VICUNA, "A chat of USER: and ASSISTANT: x. ASSISTANT: "),
    (VICUNA.replace("x. ", "Hello!</s> "), "A chat of USER: and ASSISTANT: Hello!</s> ASSISTANT: "),
    (NAMES_ITSELF, "<system>You answer after <assistant>\n<assistant>"),
    (NAMES_ITSELF.replace("<assistant>\n", "<assistant>Hello!\n"), "<system>You answer after <assistant>Hello!\n<assistant>"),
    (EMPTY_THOUGHT, "<assistant>"),
    (THINKING, "<assistant>"),
])  # fmt: skip
@pytest.mark.parametrize("refuses", ["", NEEDS_PROMPT])
@pytest.mark.parametrize("later", [[], [user("a"), assistant("Hello!")]], ids=["alone", "goes on"])
def test_a_first_turn_begins_behind_its_own_head(template, before, later, refuses):
    tokenizer, messages = chat_tokenizer(refuses + template), [assistant("Hello!"), *later]
    chat = render_chat(messages, tokenizer, {})
    first, *others = turn_spans(chat, range(0, len(messages), 2), tokenizer, {})
    alone = "<think></think>" if "think" in template and not later else ""
    assert chat.text.startswith(before + alone + "Hello!</s>")
    assert first[0] == len(before + (alone if template == EMPTY_THOUGHT else "")) and len(others) == len(later) // 2
    assert all(chat.text[start:end].strip().endswith("Hello!</s>") for start, end in (first, *others))


@pytest.mark.parametrize("chat", [TOOLS, DEFAULT_SYSTEM, DEFAULT_SYSTEM + "{# developer #}"])
def test_the_developer_is_the_system_unless_the_template_knows_it(tmp_path, chat):
    tokenizer, said = chat_tokenizer(chat), [{"role": "developer", "content": "Be brief."}, user("a")]
    known = "developer" in chat
    head = "<system>Be good.\n<developer>Be brief.\n" if known else "<system>Be brief.\n"
    text = f"{head}<user>a\n<assistant>"
    assert spans(tmp_path, [*said, assistant("b")], chat) == (["b</s>\n"], f"{text}b</s>\n")
    assert prompt_text("chat", said, tokenizer) == text
    assert conversation_text([*said, assistant("b")], {}, tokenizer) == f"{text}b</s>\n"
    pair = {"prompt": said, "chosen": [assistant("b")], "rejected": [assistant("c")]}
    rows = read(tmp_path, [pair], tokenizer, preferences=True, response="chosen").rows
    assert rows[0]["prompt"][0]["role"] == ("developer" if known else "system")  # which TRL renders itself


@pytest.mark.parametrize("end", ["</s>", "</s>\n", " </s></s>"])
@pytest.mark.parametrize("template", ["chat", "qa"])
def test_an_end_token_behind_an_answer_is_not_written_twice(tmp_path, template, end, capsys):
    messages = [user("a"), assistant("b" + end), user("c"), assistant("d" + end)]
    wanted = spans(tmp_path, [user("a"), assistant("b"), user("c"), assistant("d")], template=template)
    assert spans(tmp_path, messages, template=template) == wanted
    pair = {"prompt": "a", "chosen": "b" + end, "rejected": "c" + end}
    rows = read(tmp_path, [pair], chat_tokenizer(), preferences=True, response="chosen", template=template).rows
    assert rows[0]["chosen"] == ([assistant("b")] if template == "chat" else " b</s>")
    assert conversation_text(messages, {}, chat_tokenizer()).count("</s>") == 2
    assert "special" not in capsys.readouterr().out


def test_an_end_token_that_the_template_does_not_write_stays(tmp_path):
    chat = TOOLS.replace("{{ eos_token }}", "")
    assert spans(tmp_path, [user("a"), assistant("b</s>")], chat)[0] == ["b</s>"]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CLOSED = CHATML.replace("}}<|im_end|>", "}}{% if m.tool_calls %}<call>{{ m.tool_calls }}</call>{% endif %}<|im_end|>")
HARMONY = TURNS.replace("ANSWER", "{{ m.content }}{% if loop.last %}<return>{% else %}<end>{% endif %}")


@pytest.mark.parametrize("template, closed, ended", [
    (CLOSED, ["<call>f(1)</call>", "<think>b</think>", 'say "b"'], ["<|im_end|>", "<|im_end|>\n"]),
    (CHATML + "{# in a tokenizer without these tokens #}", ["f(1)</call>"], ["<|im_end|>"]),
    (HARMONY, ["f(1)</call>", "b<user>"], ["<return>", "<end>", "<end>\n"]),
    (TURNS.replace("ANSWER", '"{{ m.content }}"\n'), ['say "b"'], []),
    (ENDS, ["f(1)</call>"], ["</s>"]),
])  # fmt: skip
def test_only_what_the_template_writes_behind_an_answer_is_its_end(template, closed, ended):
    tokenizer = chat_tokenizer(template)
    known = [] if "without" in template else ["<|im_start|>", "<|im_end|>", "<return>", "<end>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*known, "</call>", "</think>"]})
    kept = lambda text: render_chat([user("a"), assistant(text), user("c"), assistant(text)], tokenizer, {}).text  # noqa: E731
    assert all(kept(said).count(said) == 2 for said in closed)
    assert all(kept(said + end) == kept(said) for end in ended for said in closed)


@pytest.mark.parametrize("template", ["chat", "qa"])
@pytest.mark.parametrize("unknown", ["<unk>", "</s>", "<s>"])
def test_special_tokens_within_texts_are_counted(tmp_path, template, unknown, capsys):
    texts = [("a", "b"), ("a</s>\n<assistant>c", "b"), ("a <unk>", "b</s>"), ("a", "b <s> c")]
    rows = [{"messages": [user(asked), assistant(said)]} for asked, said in texts]
    tokenizer = chat_tokenizer()
    tokenizer.unk_token = unknown  # GPT-2's is its end token
    data = read(tmp_path, rows, tokenizer, messages="messages", template=template)
    assert all(example.written.text.rstrip().count("</s>") == 1 + (example.row == 2) for example in data.examples)
    told = "2 of 4 training rows hold special tokens within their texts (the first '</s>' in row 2); the model reads"
    assert capsys.readouterr().out.count(told) == 1


WORDS = [
    "héllo",
    "<a>",
    "\n\n",
    " ",
    "  x",
    "😀",
    "don't",
    "def f():\n    return 1",
    "1,0.5",
    "中文",
    "</s>",
    "<s>",
    "e\u0301",
    "\t",
]


def random_rows(count, turns=4):
    draw = random.Random(0)
    text = lambda: "a" + "".join(draw.choices(WORDS, k=draw.randint(1, 8)))  # noqa: E731
    return [{"messages": [say(text()) for _ in range(draw.randint(1, turns)) for say in (user, assistant)]} for _ in range(count)]  # fmt: skip


def trained_tokenizer(kind):
    """A tokenizer as SmolLM2's (bytes), as Llama 2's (one space before all) or as T5's, which ends each text itself."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "bytes" else pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "first" else "always")  # fmt: skip
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    texts = [
        message["content"] + "<user><assistant>\nQuestion: Answer:"
        for row in random_rows(200)
        for message in row["messages"]
    ]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=[*special.values()], show_progress=False)
    )
    ends = " </s>" if kind == "ends" else ""
    made.post_processor = processors.TemplateProcessing(f"<s> $A{ends}", special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    made.chat_template = TOOLS
    return made


@pytest.mark.parametrize("template", ["chat", "qa", "plain"])
@pytest.mark.parametrize("kind", ["bytes", "first", "always", "ends"])
def test_labels_are_those_of_tokenizing_all_that_comes_before(tmp_path, kind, template):
    tokenizer = trained_tokenizer(kind)
    data = read(tmp_path, random_rows(150), tokenizer, messages="messages", template=template)
    ids_of = lambda text: tokenizer(text, add_special_tokens=template != "chat")["input_ids"]  # noqa: E731
    for example, row in zip(data.examples, data.rows):
        text, ids = example.written.text, ids_of(example.written.text)
        labels = [-100] * len(ids)
        for span in example.written.spans:
            start, end = (common_prefix(ids_of(text[:at]), ids) for at in span)
            labels[start:end] = ids[start:end]
        assert (row["input_ids"], row["labels"]) == (ids, labels)


def test_a_long_conversation_is_tokenized_in_linear_time(tmp_path, monkeypatch):
    tokenizer, seen = trained_tokenizer("bytes"), []
    rows = [{"messages": [user("what " * 40), assistant("that " * 40)] * 50}]
    (example,) = read(tmp_path, rows, tokenizer, messages="messages").examples
    call = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda self, texts, **how: seen.append(sum(map(len, texts))) or call(self, texts, **how))  # fmt: skip
    tokenize([example], "chat", tokenizer)
    assert sum(seen) < 3 * len(example.written.text)


@pytest.mark.parametrize("template", [TOOLS, BLOCKS])
class TestWhatIsLearned:
    def test_every_turn_of_the_assistant(self, tmp_path, template):
        found, text = spans(tmp_path, CHAT, template)
        assert found == ["2</s>\n", "3</s>\n"]
        assert text == "<system>Be brief.\n<user>1+1?\n<assistant>2</s>\n<user>and 1?\n<assistant>3</s>\n"

    @pytest.mark.parametrize("unlearned", [{"weight": 0}, {"loss": False}, {"train": False}])
    def test_weights(self, tmp_path, template, unlearned):
        messages = [*CHAT[:2], assistant("2", **unlearned), *CHAT[3:4], assistant("3", weight=1)]
        assert spans(tmp_path, messages, template)[0] == ["3</s>\n"]

    def test_tools(self, tmp_path, template):
        messages = [user("1+1?"), call(), tool("2", tool_call_id="x"), assistant("It is 2.")]
        found, text = spans(tmp_path, messages, template, row={"tools": [TOOL]})
        assert found == ['[add {"a": 1}]</s>\n', "It is 2.</s>\n"]
        assert text.startswith('<tools>[{"type": "function"') and "<tool>2\n" in text
        assert spans(tmp_path, messages, template, row={"tools": json.dumps([TOOL])}) == (found, text)

    def test_several_turns_in_a_row_and_a_last_question(self, tmp_path, template):
        messages = [user("a"), assistant("b"), assistant("c"), user("d")]
        assert spans(tmp_path, messages, template)[0] == ["b</s>\n", "c</s>\n"]

    def test_a_conversation_that_begins_with_the_assistant(self, tmp_path, template):
        assert spans(tmp_path, [assistant("Hello!"), user("a"), assistant("b")], template)[0] == [
            "Hello!</s>\n",
            "b</s>\n",
        ]

    def test_content_in_parts(self, tmp_path, template):
        parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
        assert spans(tmp_path, [user(parts), assistant(parts)], template)[0] == ["one two</s>\n"]

    def test_prompt_and_completion_as_messages(self, tmp_path, template):
        tokenizer = chat_tokenizer(template)
        rows = [
            {"prompt": CHAT[:4], "completion": CHAT[4:]},  # what was said before is not learned
            {"prompt": CHAT[:2], "completion": CHAT[2:]},
            {"prompt": "1+1?", "completion": [assistant("2")]},
            {"prompt": [user("1+1?")], "completion": "2"},
        ]
        data = read(tmp_path, rows, tokenizer, response="completion")
        found = [learned(tokens, tokenizer) for tokens in tokenize(data.examples, "chat", tokenizer)]
        assert found == [["3</s>\n"], ["2</s>\n", "3</s>\n"], ["2</s>\n"], ["2</s>\n"]]


class TestTheTemplateDecides:
    @pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
    @pytest.mark.parametrize("template", [TOOLS, JSON_CALLS, NEEDS_CONTENT])
    def test_arguments_in_the_form_that_it_wants(self, tmp_path, template, arguments):
        found, text = spans(tmp_path, [user("1+1?"), call("add", arguments), tool("2"), assistant("2")], template)
        assert found[0] == '[add {"a": 1}]</s>\n' and "None" not in text

    def test_thoughts_that_it_drops_from_earlier_turns(self, tmp_path):
        found, text = spans(tmp_path, CHAT, THINKING)
        assert found == ["2</s>\n", "<think></think>3</s>\n"] and text.count("think>") == 2
        found, _ = spans(tmp_path, [user("1+1?"), call(), tool("2"), assistant("2")], THINKING)
        assert found == ['[add {"a": 1}]</s>\n', "<think></think>2</s>\n"]

    @pytest.mark.parametrize("template", [TOOLS, EMPTY_THOUGHT, OPENS_THOUGHT])
    def test_a_refusal_of_a_question_without_the_generation_prompt(self, tmp_path, template):
        assert spans(tmp_path, CHAT, NEEDS_PROMPT + template) == spans(tmp_path, CHAT, template)

    def test_an_end_token_of_the_whole_conversation(self, tmp_path):
        assert spans(tmp_path, CHAT, ENDS)[0] == ["2\n", "3\n</s>"]

    def test_a_thought_in_an_earlier_turn(self, tmp_path):
        thought = [user("1+1?"), assistant("<think>hm</think>2"), user("and 1?"), assistant("3")]
        reason = refusal(tmp_path, [{"messages": thought}], THINKING, messages="messages")
        assert "leaves out a part of turn 2, such as its reasoning" in reason
        thought[1]["weight"] = 0
        assert spans(tmp_path, thought, THINKING)[0] == ["<think></think>3</s>\n"]

    def test_calls_that_are_dropped_beside_tools_that_are_shown(self, tmp_path):
        row = {"messages": [user("1+1?"), call(), tool("2"), assistant("2")], "tools": [TOOL]}
        reason = refusal(tmp_path, [row], NO_CALLS, messages="messages")
        assert "leaves out the tool calls of turn 2" in reason

    def test_a_generation_prompt_that_opens_a_thought(self, tmp_path):
        assert spans(tmp_path, CHAT, OPENS_THOUGHT)[0] == ["2</s>\n", "3</s>\n"]

    def test_its_own_words_where_it_refuses(self, tmp_path):
        own = "the chat template refuses it: Conversation roles must alternate user/assistant/user/assistant/..."
        for messages in (CHAT, [user("a"), user("b"), assistant("c")], [user("a"), assistant("b"), assistant("c")]):
            assert own in refusal(tmp_path, [{"messages": messages}], STRICT, messages="messages")
        assert spans(tmp_path, CHAT[1:], STRICT)[0] == [" 2</s>", " 3</s>"]

    @pytest.mark.parametrize(
        "messages, left_out",
        [
            (CHAT, "turn 1, of the system"),
            ([user("a"), call(), tool("2"), assistant("b")], "the tool calls of turn 2"),
            (
                [user("a"), assistant("ok"), {"role": "critic", "content": "k"}, assistant("b")],
                "turn 3, of the critic",
            ),
            ([user("a"), assistant("b", reasoning_content="because")], "the last turn's reasoning"),
        ],
    )
    def test_nothing_is_left_out_in_silence(self, tmp_path, messages, left_out):
        assert f"the chat template leaves out {left_out}" in refusal(
            tmp_path, [{"messages": messages}], DEAF, messages="messages"
        )

    def test_tools_that_it_leaves_out(self, tmp_path):
        row = {"messages": CHAT[1:], "tools": [TOOL]}
        assert "the chat template leaves out the tools" in refusal(tmp_path, [row], DEAF, messages="messages")

    def test_template_kwargs_of_a_row(self, tmp_path):
        template = "{{ mood or '' }}" + TOOLS
        _, text = spans(tmp_path, CHAT[1:3], template, row={"chat_template_kwargs": {"mood": "calm:"}})
        assert text.startswith("calm:<user>")

    def test_a_template_that_changes_what_was_said(self, tmp_path):
        counts = "{{ messages | length }}" + TOOLS
        reason = refusal(tmp_path, [{"messages": CHAT}], counts, messages="messages")
        assert "renders otherwise once the conversation goes on" in reason

    def test_the_same_tokens_as_trls_assistant_only_loss(self, tmp_path):
        rows = [{"messages": CHAT}, {"messages": [user("1+1?"), assistant("2")]}]
        data = read(tmp_path, rows, chat_tokenizer(BLOCKS), messages="messages", max_length=99)
        trainer = SFTTrainer(
            model=tiny_model(),
            args=SFTConfig(output_dir=str(tmp_path), max_length=99, assistant_only_loss=True, **CONFIG),
            train_dataset=Dataset.from_list(rows),
            processing_class=chat_tokenizer(BLOCKS),
        )
        for key in ("input_ids", "labels"):
            assert data.rows[key] == trainer.train_dataset[key]


REFUSED = {  # reason → messages
    "a conversation without turns": [],
    "a conversation that is a str, not a list of messages": "user: a",
    "a conversation with a str among its messages": ["a", "b"],
    "a message without role": [{"content": "a"}, assistant("b")],
    "an empty turn of the user": [user(" "), assistant("b")],
    "a turn of the tool without content (its keys: role, output)": [
        user("a"),
        {"role": "tool", "output": "42"},
        assistant("b"),
    ],
    "a turn of the Alice without content (its keys: from, text)": [{"from": "Alice", "text": "a"}, assistant("b")],
    "an empty turn of the assistant": [user("a"), assistant(None)],
    "a turn of the user whose content is NaN, not text": [user(float("nan")), assistant("b")],
    "a turn of the user whose content is a dict, not text": [user({"a": 1}), assistant("b")],
    "with a part of type 'image_url'; only text can be learned": [
        user([{"type": "image_url", "image_url": {"url": "x"}}]),
        assistant("b"),
    ],
    "a turn of the user with 'files' beside its content; only text can be learned": [
        user("a", images=[], audio=None, files=[{"type": "image", "url": "data:image/png;base64,"}]),
        assistant("b"),
    ],
    "a turn of the user with a part that is a int": [user([1]), assistant("b")],
    "tool_calls without the name of a function": [user("a"), assistant(None, tool_calls=[{"x": 1}]), assistant("b")],
    "a tool call whose arguments are no JSON object": [user("a"), call("f", "[1"), tool("1"), assistant("b")],
    "a weight of 0.5": [user("a"), assistant("b", weight=0.5)],
    "a weight of 1 on a turn of the user": [user("a", weight=1), assistant("b")],
    "a train of True on a turn of the user": [user("a", train=True), assistant("b")],
    "(all weights are 0)": [user("a"), assistant("b", weight=0)],
    "without a turn of the assistant to learn": [user("a"), user("b")],
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("template", ["chat", "qa"])
def test_refused_by_row_and_reason(tmp_path, reason, template):
    assert reason in refusal(tmp_path, [{"messages": REFUSED[reason]}], messages="messages", template=template)


class TestUnderATextTemplate:
    def test_a_system_text_comes_first(self, tmp_path):
        found, text = spans(tmp_path, CHAT, template="qa")
        assert found == [": 2</s>", ": 3</s>"]
        assert text == "Be brief.\n\nQuestion: 1+1?\nAnswer: 2</s>\n\nQuestion: and 1?\nAnswer: 3</s>"

    def test_weights(self, tmp_path):
        assert spans(tmp_path, [*CHAT[:2], assistant("2", weight=0), *CHAT[3:]], template="qa")[0] == [": 3</s>"]

    @pytest.mark.parametrize(
        "messages, reason",
        [
            (
                [user("a"), call(), tool("2"), assistant("b")],
                "tools, which only data.template=chat may have a place for",
            ),
            ([user("a"), system("b"), assistant("c")], "a turn of the system in the midst"),
            ([user("a"), assistant("b"), assistant("c")], "turns that do not alternate between user and assistant"),
            ([assistant("a"), user("b"), assistant("c")], "turns that do not alternate"),
            ([user("a"), assistant("b"), user("c")], "does not end with an assistant's turn"),
            ([user("a"), assistant("b", reasoning_content="c")], "reasoning beside the content"),
        ],
    )
    def test_what_has_no_place_is_refused_and_chat_named(self, tmp_path, messages, reason):
        line = refusal(tmp_path, [{"messages": messages}], messages="messages", template="qa")
        assert reason in line and "data.template=chat" in line


PAIR = {"chosen": assistant("3"), "rejected": assistant("4")}
PREFERENCES = {  # the same pair over several turns, in every way that it is written
    "explicit prompt": {"prompt": CHAT[:4], **{side: [end] for side, end in PAIR.items()}},
    "whole conversations and their prompt": {"prompt": CHAT[:2], **{s: [*CHAT[:4], end] for s, end in PAIR.items()}},
    "whole conversations and the last question": {"prompt": "and 1?", **{s: [*CHAT[:4], e] for s, e in PAIR.items()}},
    "implicit prompt": {side: [*CHAT[:4], end] for side, end in PAIR.items()},
    "texts after a prompt of messages": {"prompt": CHAT[:4], "chosen": "3", "rejected": "4"},
    "a prompt of messages in a dict": {
        "prompt": {"messages": CHAT[:4]},
        **{side: [end] for side, end in PAIR.items()},
    },
}


class TestPreferences:
    @pytest.mark.parametrize("template", ["chat", "qa"])
    @pytest.mark.parametrize("kind", PREFERENCES)
    def test_nothing_is_cut_and_the_tokens_are_trls(self, tmp_path, kind, template):
        tokenizer, row = chat_tokenizer(), PREFERENCES[kind]
        data = read(tmp_path, [row, row], tokenizer, preferences=True, response="chosen", template=template)
        trainer = DPOTrainer(
            model=tiny_model(),
            ref_model=tiny_model(),
            args=DPOConfig(output_dir=str(tmp_path), max_length=None, **CONFIG),
            train_dataset=data.rows,
            processing_class=tokenizer,
        )
        for side, answer in (("chosen", "3"), ("rejected", "4")):
            tokens = tokenize(data.examples, template, tokenizer, rejected=side == "rejected")[0]
            row = trainer.train_dataset[0]
            assert list(tokens.ids) == row["prompt_ids"] + row[f"{side}_ids"]
            assert list(tokens.labels) == [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
            assert learned(tokens, tokenizer) == [{"chat": f"{answer}</s>\n", "qa": f": {answer}</s>"}[template]]
            text = tokenizer.decode(tokens.ids)
            assert [text.count(said) for said in ("Be brief.", "1+1?", "2</s>", "and 1?")] == [1] * 4

    def test_calls_of_tools(self, tmp_path):
        tokenizer = chat_tokenizer()
        row = {"prompt": [user("1+1?")], "chosen": [call()], "rejected": [call("mul", '{"b": "x"}')], "tools": [TOOL]}
        row["tools"] = [TOOL, {"type": "function", "function": {"name": "mul"}}]
        data = read(
            tmp_path,
            [row, {**row, "tools": None, "chosen": [assistant("2")]}],
            tokenizer,
            preferences=True,
            response="chosen",
        )
        trainer = DPOTrainer(
            model=tiny_model(),
            ref_model=tiny_model(),
            args=DPOConfig(output_dir=str(tmp_path), max_length=None, **CONFIG),
            train_dataset=data.rows,
            processing_class=tokenizer,
        )
        for side in ("chosen", "rejected"):
            ours = tokenize(data.examples, "chat", tokenizer, rejected=side == "rejected")
            theirs = [row["prompt_ids"] + row[f"{side}_ids"] for row in trainer.train_dataset]
            assert [list(tokens.ids) for tokens in ours] == theirs
        assert learned(ours[0], tokenizer) == ['[mul {"b": "x"}]</s>\n']

    @pytest.mark.parametrize(
        "row, reason",
        [
            (
                {"chosen": CHAT, "rejected": [*CHAT[:2], assistant("9"), *CHAT[3:]]},
                "before turns that are not learned",
            ),
            ({"chosen": CHAT, "rejected": CHAT}, "chosen equal to rejected"),
            ({"chosen": CHAT, "rejected": CHAT[:3]}, "one of chosen and rejected is the beginning of the other"),
            ({"chosen": CHAT, "rejected": [user("else"), assistant("3")]}, "without a common prompt"),
            ({"chosen": CHAT[:4], "rejected": [*CHAT[:3], user("b")]}, "before turns that are not learned"),
            ({"chosen": CHAT, "rejected": [*CHAT[:4], assistant("4", weight=0)]}, "before turns that are not learned"),
            ({"chosen": CHAT, "rejected": "4"}, "'rejected' is text, and without data.prompt"),
            (
                {"prompt": "else", "chosen": CHAT, "rejected": CHAT},
                "'chosen' is a conversation that does not hold 'prompt'",
            ),
        ],
    )
    def test_refused(self, tmp_path, row, reason):
        assert reason in refusal(tmp_path, [row], preferences=True, response="chosen")


BESIDE = [
    user("1+1?"),
    assistant("2", reasoning_content="hm"),
    user("and 1?"),
    assistant("3", reasoning_content="so"),
]
INSIDE = [user("1+1?"), assistant("<think>hm</think>2"), user("and 1?"), assistant("<think>so</think>3")]
OPENED = [
    user("1+1?"),
    assistant("hm</think>2"),
    user("and 1?"),
    assistant("so</think>\n3"),
]  # by the template's prompt
SHOWS = TOOLS.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' %}{% if m.thinking %}({{ m.thinking }}){% endif %}")  # fmt: skip


class TestThoughts:
    """Reasoning beside the content or in it, kept or dropped by a key."""

    @pytest.mark.parametrize("messages", [BESIDE, INSIDE, OPENED])
    @pytest.mark.parametrize("template", [TOOLS, BLOCKS, SHOWS, THINKING, DEAF])
    def test_dropped(self, tmp_path, messages, template):
        found, text = spans(tmp_path, messages, template, thinking="drop")
        assert [said.replace("<think></think>", "") for said in found] == ["2</s>\n", "3</s>\n"]
        assert "hm" not in text and "so" not in text

    @pytest.mark.parametrize("template", ["qa", "chat"])
    def test_dropped_under_every_template(self, tmp_path, template):
        assert "hm" not in spans(tmp_path, BESIDE, thinking="drop", template=template)[1]

    def test_kept_under_the_name_that_the_template_knows(self, tmp_path):
        for thinking in ("keep", None):
            found, _ = spans(tmp_path, BESIDE, SHOWS, thinking=thinking)
            assert found == ["(hm)2</s>\n", "(so)3</s>\n"]

    @pytest.mark.parametrize("template", [TOOLS, BLOCKS])
    def test_kept_in_the_content_where_the_template_knows_none(self, tmp_path, template):
        found, _ = spans(tmp_path, BESIDE, template, thinking="keep")
        assert found == ["<think>\nhm\n</think>\n\n2</s>\n", "<think>\nso\n</think>\n\n3</s>\n"]
        assert spans(tmp_path, INSIDE, template, thinking="keep")[0][0] == "<think>hm</think>2</s>\n"

    def test_kept_is_refused_where_the_template_drops_them(self, tmp_path):
        for messages in (BESIDE, INSIDE):
            refusal(tmp_path, [{"messages": messages}], THINKING, messages="messages", thinking="keep")
        reason = refusal(tmp_path, [{"messages": BESIDE}], THINKING, messages="messages", thinking="keep")
        assert "leaves out thoughts of turns that are learned; data.thinking=drop leaves out all" in reason

    def test_parts_that_are_thoughts(self, tmp_path):
        parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "2"}]
        assert spans(tmp_path, [user("1+1?"), assistant(parts)], SHOWS)[0] == ["(hm)2</s>\n"]
        assert spans(tmp_path, [user("1+1?"), assistant(parts)], thinking="drop")[0] == ["2</s>\n"]

    def test_nothing_but_thoughts(self, tmp_path):
        row = {"messages": [user("a"), assistant("<think>hm</think>")]}
        assert "turn 2, of the assistant, is nothing but thoughts" in refusal(
            tmp_path, [row], messages="messages", thinking="drop"
        )

    @pytest.mark.parametrize("thinking, said", [("drop", "3</s>\n"), ("keep", "<think>\nso\n</think>\n\n3</s>\n")])
    def test_of_pairs(self, tmp_path, thinking, said):
        row = {"prompt": CHAT[:4], "chosen": BESIDE[3:], "rejected": [assistant("4", reasoning_content="no")]}
        tokenizer = chat_tokenizer()
        data = read(tmp_path, [row], tokenizer, preferences=True, response="chosen", thinking=thinking)
        assert learned(tokenize(data.examples, "chat", tokenizer)[0], tokenizer) == [said]
        (rejected,) = tokenize(data.examples, "chat", tokenizer, rejected=True)
        assert learned(rejected, tokenizer) == [said.replace("so", "no").replace("3", "4")]


class TestSystemColumn:
    @pytest.mark.parametrize("row", [{"prompt": "1+1?", "response": "2"}, {"m": CHAT[1:3]}])
    @pytest.mark.parametrize("template", ["chat", "qa"])
    def test_put_before_the_conversation(self, tmp_path, row, template):
        keys = {"messages": "m"} if "m" in row else {}
        data = read(tmp_path, [{**row, "system": "Be brief."}, {**row, "system": None}], chat_tokenizer(), system="system", template=template, **keys)  # fmt: skip
        first, second = (example.written.text for example in data.examples)
        assert first.replace("<system>", "").strip().startswith("Be brief.") and second in first and first != second

    def test_of_pairs(self, tmp_path):
        row = {**PREFERENCES["explicit prompt"], "prompt": CHAT[1:4], "system": "Be brief."}
        same = read(tmp_path, [PREFERENCES["explicit prompt"]], chat_tokenizer(), preferences=True, response="chosen")
        ours = read(tmp_path, [row], chat_tokenizer(), preferences=True, response="chosen", system="system")
        assert ours.rows[0] == same.rows[0]

    def test_beside_a_system_turn(self, tmp_path):
        reason = refusal(tmp_path, [{"messages": CHAT, "system": "S"}], messages="messages", system="system")
        assert "'system' beside a conversation that has a system text of its own" in reason

    def test_no_such_field(self, tmp_path):
        with pytest.raises(
            UserError, match=r"data\.system: the data has no field 'sytem' \(did you mean 'system'\?\)"
        ):
            read(
                tmp_path,
                [{"messages": CHAT[1:3], "system": "S"}],
                chat_tokenizer(),
                messages="messages",
                system="sytem",
            )
        pairs = write_rows(tmp_path / "pairs.jsonl", [PREFERENCES["explicit prompt"]])
        section = DataSection(path=str(pairs), response="chosen", system="system")
        with pytest.raises(UserError, match=r"data\.system, also in eval\.task: the data has no field 'system'"):
            read_examples(section, chat_tokenizer(), preferences=True, where="eval.task")


class TestPlainText:
    def test_all_of_it_is_learned_with_an_end(self, tmp_path):
        tokenizer = tiny_tokenizer()
        data = read(tmp_path, [{"text": "the mill"}, {"text": " a town \n"}], tokenizer, text="text", template="plain", max_length=9)  # fmt: skip
        assert [tokenizer.decode(row) for row in data.rows["input_ids"]] == ["the mill</s>", "a town</s>"]
        assert data.rows["labels"] == data.rows["input_ids"]

    def test_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"1 empty 'text' \(row 2\)"):
            read(tmp_path, [{"text": "a"}, {"text": ""}], tiny_tokenizer(), text="text", template="plain")
        for other in ({"messages": "m"}, {"system": "s"}, {"template": "chat"}):
            with pytest.raises(ValueError, match=r"data\.text is learned as it stands, without"):
                DataSection(path="x", text="text", **other)


def test_a_changed_weight_is_other_content(tmp_path):
    """For --resume: the texts are the same, what is learned of them is not."""
    recipe, found = make_world(tmp_path), []
    for weight in (1, 0):
        talk = [user("a"), assistant("b") | {"weight": weight}, user("c"), assistant("d")]
        path = write_rows(tmp_path / "chats.jsonl", [{"messages": talk}] * 40)
        found.append(
            inputs_beside_the_base(
                inspect_recipe(load_recipe(str(recipe), [f"data.path={path}", "data.messages=messages"]))
            )
        )
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["data.path"]
