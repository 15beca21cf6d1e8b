"""Chat templates with the behaviour of well-known families: thoughts, tool calls, a system prompt that moves."""

# the last answer begins with thoughts, empty ones too; earlier answers lose theirs
QWEN3_LIKE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set thoughts = '' %}"
    "{% if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1] %}{% endif %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "<think>\n{{ thoughts.strip('\n') }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for t in m.tool_calls or [] %}\n<tool_call>\n{{ t.function | tojson }}\n</tool_call>{% endfor %}"
    "{% else %}{{ content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# decoding begins with opened thoughts; no answer of the past has any
R1_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<Assistant>{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)

# a model that does not think: decoding begins behind empty thoughts, which the past does not show
SKIPS_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n\n</think>\n\n{% endif %}"
)

# empty thoughts of an answer are closed where decoding begins a line
CLOSES_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>"
    "{% if m.reasoning_content %}\n{{ m.reasoning_content }}\n{% endif %}</think>{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

# thoughts are shown where there are some, but decoding skips them
SHOWS_AND_SKIPS_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n\n</think>\n\n{% endif %}"
)

# thoughts are messages in front of an answer, and go when there is a later one
HARMONY_LIKE = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.reasoning_content and loop.index0 == ns.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}<|start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# calls of tools from a field of their own; null contents and names are shown as they are
HERMES_LIKE = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>\n{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.name %}[{{ m.name }} {{ m.tool_call_id }}] {% endif %}"
    "{{ m.content }}{% for t in m.tool_calls or [] %}call {{ t.id }} {{ t.function.name }}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# the system prompt goes to a last turn of the user's, and is not there once that is answered
MISTRAL_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)

# contents are lists of parts, or text
TAKES_PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'thinking' %}[{{ p.thinking }}]{% else %}{{ p.text }}+{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# BOS and a system message with dates stand in front of everything; contents lose their space
LLAMA3_LIKE = (
    "{{ bos_token }}{% set ns = namespace(first=0) %}<|start|>system<|end_header|>\n\nToday Date: 26 Jul 2024\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set ns.first = 1 %}{% endif %}<|eot|>"
    "{% for m in messages[ns.first:] %}<|start|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end_header|>\n\n{% endif %}"
)

# a system message says how to reason, and without thinking every answer stands behind empty thoughts
SMOLLM3_LIKE = (
    "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
    "<|im_start|>system\n## Metadata\n\nReasoning Mode: {{ mode }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content.rstrip() }}{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{{ m.content.lstrip('\n') }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{% endif %}"
)

# the system prompt stands in the first turn of the user's; turns must alternate, the model has another name
GEMMA3_LIKE = (
    "{{ bos_token }}{% set ns = namespace(front='', rest=messages) %}{% if messages[0].role == 'system' %}"
    "{% set ns.front = messages[0].content + '\n\n' %}{% set ns.rest = messages[1:] %}{% endif %}"
    "{% for m in ns.rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ ns.front if loop.first else '' }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# what is not to be continued ends with EOS
PHI4_LIKE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
