"""Chat templates that write tools in the published forms, and tiny models that write what a test says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from serving_kit import CONFIG, SPECIALS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import chiasm
from chiasm.infer.answer import Writer
from chiasm.model_config import VLMConfig
from chiasm.types import Piece

HERMES = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Help.{% endif %}

<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}

</tools> as <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}

<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- elif message.tool_calls %}<|im_start|>assistant
{%- if message.content %}

{{ message.content }}{% endif %}
{%- for call in message.tool_calls %}

<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role != 'system' or not tools or not loop.first %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Tools stand in the first user message; a call is bare JSON; results are written as JSON.
LLAMA = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{% if message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}<|eot_id|>
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if tools and message.role == 'user' and loop.first %}Respond with JSON.

{% for tool in tools %}{{ tool | tojson(indent=4) }}

{% endfor %}{% endif %}{{ message.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

# Tools stand before the last question; calls are one list, with ids of nine characters.
MISTRAL = """{{- bos_token }}
{%- set asked = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}{% set asked.last = loop.index0 %}{% endfor %}
{%- set asked.count = 0 %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and asked.count == asked.last %}[AVAILABLE_TOOLS] [
{%- for tool in tools %}{"type": "function", "function": {
{%- for key, value in tool.function.items() if key != 'return' %}
{%- if value is string %}"{{ key }}": "{{ value }}"{% else %}"{{ key }}": {{ value | tojson }}{% endif %}
{%- if not loop.last %}, {% endif %}
{%- endfor %}}}{% if not loop.last %}, {% endif %}
{%- endfor %}][/AVAILABLE_TOOLS]
{%- endif %}[INST] {{ message.content }}[/INST]
{%- set asked.count = asked.count + 1 %}
{%- elif message.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{%- set out = call.function | tojson %}{{ out[:-1] }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}
{%- endfor %}]{{ eos_token }}
{%- elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}
{%- elif message.role == 'tool' %}[TOOL_RESULTS] {"content": {{ message.content | tojson }}, "call_id": "
{{- message.tool_call_id }}"}[/TOOL_RESULTS]
{%- endif %}
{%- endfor %}"""

# The name stands before the arguments.
NAMED = """{%- for message in messages %}
{%- if tools and loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}{{ eos_token }}
{%- elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}
{%- elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- else %}[INST]{{ message.content }}[/INST]
{%- endif %}
{%- endfor %}"""

TEMPLATES = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "named": NAMED}

# A tag for each argument (Qwen3-Coder).
IN_JSON = '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
TAGS = HERMES.replace(
    IN_JSON,
    """<function={{ call.function.name }}>
{% for key, value in call.function.arguments.items() %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>""",
)
# A tag for each key and each value (GLM-4.5).
PAIRS = HERMES.replace(
    "<tool_call>\n" + IN_JSON,
    """<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor %}""",
).replace("{% endfor %}\n</tool_call>", "{% endfor %}</tool_call>")
# JSON, and another form for tools that the model was trained with (Llama 3.1).
TRAINED = LLAMA.replace(
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}',
    """{% if builtin_tools is defined and call.name in builtin_tools %}<|python_tag|>{{ call.name }}.call(
{%- for key, value in call.arguments | items %}{{ key }}="{{ value }}"{% if not loop.last %}, {% endif %}
{%- endfor %}){% else %}{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{% endif %}""",
)
# A list of calls as Python writes them (Llama 3.2's small models, Llama 4).
PYTHON = LLAMA.replace(
    """{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}""",
    "",
).replace(
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}',
    """[{% for tool_call in message.tool_calls %}{{ tool_call.function.name }}(
{%- for key, value in tool_call.function.arguments | items %}{{ key }}={{ value | tojson }}
{%- if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]""",
)
OTHERS = {"tags": TAGS, "pairs": PAIRS, "trained": TRAINED, "python": PYTHON}
TURNS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]")
TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
TOOLS = (*TOOLS, "<|python_tag|>")
SEEN = ("<tool_call>", "</tool_call>")  # control tokens that are decoded, as in Qwen2.5

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The "weather" <|im_end|>[INST] of é\n',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Rome", "Oslo"]},
                "<tool_call>": {"type": "boolean", "description": "[TOOL_CALLS]"},
            },
            "required": ["city", "<tool_call>"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TIME = {"type": "function", "function": {"name": "time", "parameters": NOTHING}}
ARGUMENTS = '{"city": "Oslo", "<tool_call>": true}'


def tokenizer(folder: Path, template: str) -> Path:
    """Every byte, and the control tokens of all forms."""
    folder.mkdir(parents=True, exist_ok=True)
    controls = [*SPECIALS, *TURNS, *TOOLS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*controls, *SEEN, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in SEEN])
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def model(folder: Path, template: str) -> chiasm.VLM:
    """A random model with one of the templates."""
    made = tokenizer(folder, template)
    size = len(json.loads((made / "tokenizer.json").read_text())["model"]["vocab"])
    config = VLMConfig.parse(CONFIG).edit(
        **{"model.lm.vocab": size, "model.lm.max_positions": 2048, "processing.template": {"type": "jinja"}}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return chiasm.build(config, tokenizer=made).eval()


def script(monkeypatch: Any, vlm: chiasm.VLM, text: str, *, literal: bool = True) -> None:
    """Every answer that nothing constrains is ``text``; ``literal``: tokens that it spells outside arguments are it."""
    ids = [*tokens(vlm, text, literal), vlm.processor.stop_ids[0]]
    chosen = Writer.choose

    def choose(self: Writer, logits: Any) -> int:
        if self._state is not None:
            return chosen(self, logits)
        return ids[len(self.ids)]

    monkeypatch.setattr(Writer, "plain", property(lambda self: False))
    monkeypatch.setattr(Writer, "choose", choose)


def tokens(vlm: chiasm.VLM, text: str, literal: bool = True) -> list[int]:
    """The ids of an answer, its arguments spelled."""
    pieces = [
        Piece(part, literal=literal and part != ARGUMENTS) for part in re.split(f"({re.escape(ARGUMENTS)})", text)
    ]
    return vlm.tokenizer.encode_pieces(pieces).ids
