"""Chat templates that run without end, or fill the memory. Each is a few characters long, or easily made."""

# Names and sources of templates that have to reach a limit.
ENDLESS = {
    "nested range": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "repeated text": "{{ 'a' * 9000000000 }}",
    "repeated text, not constant": "{{ 'a' * (messages | length) * 9000000000 }}",
    "printf width": "{{ '%09000000000d' % 1 }}",
    "format width": "{{ '{:9000000000}'.format(1) }}",
    "doubled text": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
    ),
    "doubled list": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
    ),
    "lipsum": "{{ lipsum(n=100000000) }}",
    "long lipsum": "{{ lipsum(n=1, min=90000000, max=90000001) }}",
    "tojson indent": "{{ messages | tojson(indent=900000000) }}",
    "ljust": "{{ 'a'.ljust(9000000000) }}",
    "rjust": "{{ 'a'.rjust(9000000000) }}",
    "zfill": "{{ 'a'.zfill(9000000000) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(2000000) }}",
    "center": "{{ 'a'.center(9000000000) }}",
    "center filter": "{{ 'a' | center(9000000000) }}",
    "batch": "{{ [1] | batch(9000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(900000000) | list }}",
    "indent": "{{ 'a\nb' | indent(900000000) }}",
    "wordwrap": "{{ ('a' * 9999999) | wordwrap(1) }}",
    "join": "{{ range(99999) | join('a' * 99999) }}",
    "method join": "{{ 'a'.join(['b' * 99999] * 99999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace of nothing": "{{ 'abc'.replace('', 'x' * 9999999) }}",
    "map": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "sum of lists": "{{ ([[1] * 9999] * 99999) | sum(start=[]) | length }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "output beyond the limit": "{{ 'a' * 20000000 }}",
    "recursive macro": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"),
    "recursive loop": (
        "{% for x in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}"
    ),
    "power": "{{ 7 ** 999999999 }}",
    "power, not constant": "{{ (6 + messages | length) ** 999999999 }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "text of nested lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
    ),
    "JSON of nested lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}"
    ),
    "comparison of nested lists": (
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
    ),
    "loop over text": "{% for c in 'a' * 99999999 %}{% endfor %}",
    "much to compile": "{{ x }}" * 140_000,
}
# Names and sources of templates that are refused before, with the message.
REFUSED = {
    "long": ("a" * (2 << 20), "too long for a chat template"),
    "nested brackets": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "does not parse|took more than"),
    "nested lists": ("{{ " + "[" * 5_000 + "]" * 5_000 + " }}", "does not parse|took more than"),
    "nested conditions": ("{% if 1 %}" * 5_000 + "{% endif %}" * 5_000, "does not parse|took more than"),
    "long sum": ("{{ 1" + "+ x" * 50_000 + " }}", "does not parse|took more than"),
    "endless recursion": (
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "rejects a conversation",
    ),
    "long error": ("{{ raise_exception('a' * 999999) }}", "rejects a conversation.*aaa"),
    "another file": ("{% include '/etc/passwd' %}", "rejects a conversation"),
    "nested text of an error": (
        "{% set n = namespace(x=[1]) %}{% for i in range(18) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
        "{{ raise_exception(n.x | string) }}",
        "rejects a conversation.*1",
    ),
}
