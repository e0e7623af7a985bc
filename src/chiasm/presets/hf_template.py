"""A declarative template as a Jinja chat template, so that an exported model is prompted by others as it was trained.

The result is not trusted: both render the probe conversations of the fingerprint, and the token ids must agree.
"""

from __future__ import annotations

import json
from typing import Any

from chiasm.errors import CheckpointError, ChiasmError
from chiasm.processing.fingerprint import probes
from chiasm.processing.jinja import JinjaConfig
from chiasm.processing.processor import Processor
from chiasm.processing.template import TurnsConfig, TurnsTemplate

BODY = """
{%- macro body(content) -%}
{%- if content is string -%}{{ TEXT(content) }}
{%- else -%}
{%- set media = content | selectattr('type', 'ne', 'text') | list -%}
{%- if FRONT -%}
{%- for c in media -%}{{ OPEN }}{{ PLACES[c['type']] }}{{ CLOSE }}{{ SUFFIX }}{%- endfor -%}
{%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') STRIPPED | join('') -%}
{{ text | trim if media else text }}
{%- else -%}
{%- set seen = namespace(leading=true) -%}
{%- for c in content -%}
{%- if c['type'] != 'text' -%}{{ OPEN }}{{ PLACES[c['type']] }}{{ CLOSE }}
{%- set follows = content[loop.index]['text'] if not loop.last and content[loop.index]['type'] == 'text' else '' -%}
{%- if seen.leading and not follows.startswith(SUFFIX) -%}{{ SUFFIX }}{%- endif -%}
{%- else -%}{{ TEXT(c['text']) }}
{%- if c['text'] | trim -%}{%- set seen.leading = false -%}{%- endif -%}
{%- endif -%}{%- endfor -%}
{%- endif -%}{%- endif -%}
{%- endmacro -%}
"""
TURNS = """
{%- set own = messages[0]['role'] == 'system' -%}
{%- set system = body(messages[0]['content']) if own else SYSTEM -%}
{%- set opening = S_PREFIX + system + S_SUFFIX if system else '' -%}
{{- BOS }}{{ OUTSIDE }}
{%- for message in (messages[1:] if own else messages) -%}
{%- if message['role'] == 'assistant' -%}{{ A_PROMPT + A_LEAD }}{{ body(message['content']) }}{{ A_END + A_AFTER }}
{%- else -%}
{%- if not loop.first -%}{{ BETWEEN }}{%- endif -%}{{ U_PREFIX }}
{%- if loop.first -%}{{ INSIDE }}{%- endif -%}{{ body(message['content']) }}{{ U_SUFFIX }}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ A_PROMPT }}{%- endif -%}
"""


def chat_template(processor: Processor) -> str:
    """The Jinja source of the processor's template. Raises CheckpointError where none renders the same."""
    template = processor.config.template
    if isinstance(template, JinjaConfig):
        return template.source or ""
    if not isinstance(template, TurnsConfig) or not isinstance(processor.template, TurnsTemplate):
        raise CheckpointError(f"export: template {template.type!r} has no counterpart; transformers reads Jinja only")
    source = _source(template, processor.template)
    config = processor.config.model_copy(update={"template": JinjaConfig(source=source)})
    try:
        other = Processor(config, processor.tokenizer, processor.counter)
        for name, messages in probes(processor).items():
            ours, theirs = (p(messages, id=name, add_generation_prompt=True) for p in (processor, other))
            if ours.input_ids.tolist() != theirs.input_ids.tolist():
                raise CheckpointError(f"export: as a chat template, this template gives other ids for probe {name!r}")
    except ChiasmError as error:
        raise CheckpointError(f"export: this template cannot be written as a chat template: {error}") from None
    return source


def _source(config: TurnsConfig, template: TurnsTemplate) -> str:
    """The Jinja text, with the tokenizer's own tokens written out."""
    if not config.user_text:
        raise CheckpointError(
            "export: a template that leaves out the user's text (user_text=False) is none to chat with"
        )
    if config.wraps:
        raise CheckpointError("export: a chat template of transformers writes one text around all media, not wraps")

    def text(value: str) -> str:
        return json.dumps(template._fill(value), ensure_ascii=False)

    front = {"front": "true", "inline": "not media", "front_if_single": "media | length <= 1"}[config.media_at]
    opened, answer = config.system_in_user, config.answer
    values: dict[str, Any] = {
        "FRONT": front,
        "STRIPPED": "| map('trim')" if config.strip else "",
        "OPEN": text(config.media_wrap[0]),
        "CLOSE": text(config.media_wrap[1]),
        "SUFFIX": text(config.media_suffix),
        "PLACES": json.dumps(template.placeholders, ensure_ascii=False),
        "SYSTEM": text((config.system or "").strip() if config.strip else config.system or ""),
        "S_PREFIX": text(config.system_turn.prefix),
        "S_SUFFIX": text(config.system_turn.suffix),
        "U_PREFIX": text(config.user_turn.prefix),
        "U_SUFFIX": text(config.user_turn.suffix),
        "A_PROMPT": text(answer.prompt),
        "A_LEAD": text(answer.lead),
        "A_END": text(answer.end),
        "A_AFTER": text(answer.after),
        "BETWEEN": text(config.between),
        "BOS": text(config.bos),
        "OUTSIDE": '""' if opened else "opening",
        "INSIDE": "opening" if opened else '""',
    }
    named = ["OPEN", "CLOSE", "SUFFIX", "PLACES", "SYSTEM", "BETWEEN", "BOS"]
    named += [f"{who}_{what}" for who in "SU" for what in ("PREFIX", "SUFFIX")]
    named += [f"A_{what}" for what in ("PROMPT", "LEAD", "END", "AFTER")]
    head = "".join("{%- set " + name + " = " + values[name] + " -%}\n" for name in named)
    body = BODY.replace("FRONT", values["FRONT"]).replace(" STRIPPED", " " + values["STRIPPED"])
    trim = "({} | trim)" if config.strip else "{}"
    for argument in ("content", "c['text']"):
        body = body.replace(f"TEXT({argument})", trim.format(argument))
    turns = TURNS.replace("OUTSIDE", values["OUTSIDE"]).replace("INSIDE", values["INSIDE"])
    return head + body.strip() + turns.rstrip("\n")
