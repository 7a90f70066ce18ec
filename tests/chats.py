"""Small chat templates as models have them, for a tokenizer made here."""

from tiny import tiny_tokenizer

CALLS = (
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
)
ANSWER = "{{ m.content }}" + CALLS + "{{ eos_token }}\n"
TURNS = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}ANSWER{% else %}{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = TURNS.replace("ANSWER", ANSWER)  # knows system, tool and tool_calls
BLOCKS = TURNS.replace(
    "ANSWER", "{% generation %}" + ANSWER + "{% endgeneration %}"
)  # the same, and says what is learned
JSON_CALLS = TOOLS.replace("arguments | tojson", "arguments + ''")  # wants the arguments as JSON
NEEDS_CONTENT = TOOLS.replace("{{ m.content }}[", "{{ m.content + '' }}[")
# Qwen3's and DeepSeek-R1's way: thoughts of earlier turns are dropped, the last turn gets an empty one.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% if loop.last %}<think></think>{% endif %}{{ m.content.split('</think>')[-1] }}"
    + CALLS
    + "{{ eos_token }}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS_THOUGHT = TOOLS.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
# Mistral's and Gemma's way: refuses what it does not know, in its own words.
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}{{ ' ' + m.content | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)
# LFM2's way: shows the tools and drops the calls. Phi-3's: a token of its own ends the whole conversation.
NO_CALLS = TOOLS.replace(CALLS, "")
ENDS = TOOLS.replace("{{ eos_token }}\n", "{{ '\n' }}").replace(
    "<assistant>{% endif %}", "<assistant>{% else %}{{ eos_token }}{% endif %}"
)
# Leaves out, without a word, what it does not know.
DEAF = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# SmolLM2's way: a system text of its own before the first message. Llama 3's: the first token there. Llama 2's: no prompt.
DEFAULT_SYSTEM = TOOLS.replace(
    "messages %}", "messages %}{% if loop.first and m.role != 'system' %}<system>Be good.\n{% endif %}", 1
)
FIRST_TOKEN = TOOLS.replace("messages %}", "messages %}{% if loop.first %}{{ bos_token }}{% endif %}", 1)
NO_PROMPT = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
CONFIG = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False)


def chat_tokenizer(template=TOOLS):
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


def call(name="add", arguments='{"a": 1}', text=None, **more):
    function = {"name": name, "arguments": arguments}
    return assistant(text, tool_calls=[{"type": "function", "function": function}], **more)


def learned(tokens, tokenizer):
    """The text of each learned span."""
    spans, last = [], None
    for token, label in zip(tokens.ids, tokens.labels):
        assert label in (-100, token)
        if label != -100:
            spans = spans if last else [*spans, []]
            spans[-1].append(token)
        last = label != -100
    return [tokenizer.decode(span) for span in spans]
