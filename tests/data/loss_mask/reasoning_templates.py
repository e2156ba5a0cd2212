"""Chat templates that treat reasoning and tools as published ones do, with the special tokens of SmolLM2.

They are short forms of the behaviour, not copies of the templates:

  qwen3     reasoning is written behind the last user's message only, and an empty block into a last turn without any
  thinking  Qwen3-Thinking: the generation prompt opens the block
  r1        DeepSeek-R1: the generation prompt opens the block, and the template drops reasoning from every turn;
            without thinking, the prompt has an empty block that the template does not write
  smollm3   reasoning stays in the content; without thinking, every turn has an empty block
  harmony   gpt-oss: reasoning of the last answer, or of calls that no answer follows; another end for the last turn
  mistral   the system message stands in the last user's turn, so later turns move it
  chatml    reasoning_content is never written
"""

_TURN = "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
_LAST_USER = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"""
_CALLS = """{%- for call in message.tool_calls or [] %}
        {{- '\n' if content or not loop.first else '' }}
        {{- '<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
        {{- '\n</tool_call>' }}
    {%- endfor %}"""
_TOOLS = "{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
_SPLIT = """{%- set content = message.content or '' %}
    {%- set reasoning = message.reasoning_content or '' %}
    {%- if not reasoning and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}"""

QWEN3 = f"""{_TOOLS}{_LAST_USER}
{{%- for message in messages %}}
{{%- if message.role != 'assistant' %}}{_TURN}{{% else %}}
    {_SPLIT}
    {{{{- '<|im_start|>assistant\n' }}}}
    {{%- if loop.index0 > ns.last and (loop.last or reasoning) %}}
        {{{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}}}
    {{%- endif %}}
    {{{{- content.lstrip('\n') if loop.index0 > ns.last else content }}}}
    {_CALLS}
    {{{{- '<|im_end|>\n' }}}}
{{%- endif %}}{{% endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- '<|im_start|>assistant\n' }}}}
    {{%- if enable_thinking is defined and enable_thinking is false %}}{{{{ '<think>\n\n</think>\n\n' }}}}{{% endif %}}
{{%- endif %}}"""
THINKING = QWEN3.replace("(loop.last or reasoning)", "true").replace(
    "    {%- if enable_thinking", "    {{- '<think>\n' }}{% if enable_thinking"
)
R1 = """{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<file_sep>' + message.content }}
{%- elif message.role == 'system' %}{{ message.content }}{% else %}
    {{- '<filename>' + message.content.split('</think>')[-1] + '<|im_end|>' }}
{%- endif %}{% endfor %}
{%- set block = '<think></think>' if enable_thinking is false else '<think>\n' %}
{%- if add_generation_prompt %}{{ '<filename>' + block }}{% endif %}"""
SMOLLM3 = f"""{{%- if enable_thinking is not defined %}}{{% set enable_thinking = true %}}{{% endif %}}
{{%- set block = '' if enable_thinking else '<think>\n\n</think>\n' %}}
{{%- for message in messages %}}
{{%- if message.role != 'assistant' %}}{_TURN}{{% else %}}
    {{{{- '<|im_start|>assistant\n' + block + message.content.lstrip('\n') + '<|im_end|>\n' }}}}
{{%- endif %}}{{% endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' + block }}}}{{% endif %}}"""
HARMONY = """{%- for message in messages %}
{%- if message.role != 'assistant' %}{{ '<|im_start|>' + message.role + '<file_sep>' + message.content + '<filename>' }}
{%- elif message.tool_calls %}
    {%- set later = namespace(answer=false) %}
    {%- for other in messages[loop.index:] %}
        {%- if other.role == 'assistant' and not other.tool_calls %}{% set later.answer = true %}{% endif %}
    {%- endfor %}
    {%- if message.thinking and not later.answer %}
        {{- '<|im_start|>assistant<gh_stars>analysis<file_sep>' + message.thinking + '<filename>' }}
    {%- endif %}
    {%- for call in message.tool_calls %}
        {{- '<|im_start|>assistant to=' + call.function.name + '<gh_stars>commentary<file_sep>' }}
        {{- (call.function.arguments | tojson) + '<repo_name>' }}
    {%- endfor %}
{%- elif loop.last and not add_generation_prompt %}
    {%- if message.thinking %}
        {{- '<|im_start|>assistant<gh_stars>analysis<file_sep>' + message.thinking + '<filename>' }}
    {%- endif %}
    {{- '<|im_start|>assistant<gh_stars>final<file_sep>' + message.content + '<|im_end|>' }}
{%- else %}{{ '<|im_start|>assistant<gh_stars>final<file_sep>' + message.content + '<filename>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""
MISTRAL = """{{- bos_token }}{% set ns = namespace(last=-1, system='') %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
    {{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}{% endif %}{% endfor %}"""
CHATML = f"""{{%- for message in messages %}}{_TURN}{{% endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"""

REASONING_TEMPLATES = {
    "qwen3": QWEN3,
    "thinking": THINKING,
    "r1": R1,
    "smollm3": SMOLLM3,
    "harmony": HARMONY,
    "mistral": MISTRAL,
    "chatml": CHATML,
}
