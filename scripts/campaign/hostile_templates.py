"""Pieces of chat templates, sound and hostile, from which the campaign builds damaged templates."""

import re

TOKEN = re.compile(r"\{[{%#]-?|-?[}%#]\}|[A-Za-z_]\w*|'[^']*'|\d+|\s+|.", re.DOTALL)

# Pieces for the middle of a template.
SNIPPETS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(9000000000) %}x{% endfor %}",
    "{{ 'a' * 9000000000 }}",
    "{{ [0] * 9000000000 }}",
    "{{ '%09000000000d' % 1 }}",
    "{{ '%-9000000000s' | format('a') }}",
    "{{ '{:>9000000000}'.format(1) }}",
    "{{ 'a'.ljust(9000000000) }}{{ 'a'.rjust(9000000000) }}{{ 'a'.zfill(9000000000) }}",
    "{{ 'a' | center(9000000000) }}",
    "{{ 'a'.center(9000000000) }}",
    "{{ lipsum(n=99999999) }}",
    "{{ [1, 2] | batch(9000000000, 'x') | list }}",
    "{{ messages | tojson(indent=9000000000) }}",
    "{{ messages | tojson(indent='a' * 900000000) }}",
    "{{ 'a\\nb' | indent(9000000000) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(n=3) %}{% for i in range(64) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 1 << 9000000000 }}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('a,' * 999999).split(',') | join('b' * 99999) }}",
    "{{ range(99999999) | list | length }}",
    "{{ range(99999999) | sum }}",
    "{{ 'x' | wordwrap(0) }}",
    "{{ ('a ' * 999999) | wordwrap(1) | title | upper | urlize }}",
    "{{ messages | map('string') | join | list | sort | unique | list | groupby(0) }}",
    "{{ cycler('a').next() }}{{ joiner('x')() }}",
    "{{ dict(a=1).update({}) }}",
    "{{ messages.append(messages) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ self }}{{ caller() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__ }}",
    "{{ (messages | attr('__class__')) }}",
    "{% include '/etc/passwd' %}{% import 'x' as y %}{% extends 'z' %}",
    "{{ raise_exception('\\x1b[31mred\\x1b[0m') }}",
    "{{ strftime_now('%Y' * 999999) }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{% set x = x %}{{ x.y.z }}",
    "{{ bos_token * 3 }}",
    "{{ messages[99].content }}",
    "{{ 1 / 0 }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "not " * 3000 + "1 }}",
    "{{ " + "1 + " * 5000 + "1 }}",
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{{ [" * 200 + "]" * 200 + " }}",
    "{#",
    "{% raw %}",
    "\x00",
    "\u202e",
)


def tokens_of(template: str) -> list[str]:
    """Splits a template into delimiters, names, texts and other characters."""
    return TOKEN.findall(template)
