"""The validation record as an HTML page: one file that loads nothing else."""

from collections.abc import Mapping
from typing import Any, Final

import jinja2


def render_page(record: Mapping[str, Any]) -> str:
    """HTML of a record written by `tasks.expectations.validate`; broken expectations come first."""
    return _PAGE.render(record)


_PAGE: Final = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Curated prompts: {{ "fit" if success else "not fit" }}</title>
<style>
  :root { color-scheme: light dark; --ink: #1c2024; --muted: #60666c; --line: #d9dce0; --paper: #fff }
  :root { --held: #1f7a4d; --broken: #b3392f }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e8eaec; --muted: #9aa1a8; --line: #3a3f45; --paper: #16181b; --held: #5cc48f; --broken: #ec8077 }
  }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
  body { color: var(--ink); background: var(--paper) }
  table { border-collapse: collapse; width: 100% } td, li, p { overflow-wrap: anywhere }
  th, td { text-align: left; vertical-align: top; padding: .35em .7em; border-bottom: 1px solid var(--line) }
  th { color: var(--muted) } td:nth-child(1), td:nth-child(3) { white-space: nowrap }
  .held { color: var(--held) } .broken { color: var(--broken); font-weight: 600 }
  code { font-size: .85em; color: var(--muted) } ul { margin: .3em 0; padding-left: 1.2em }
  /* On a narrow page each expectation is a block. */
  @media (max-width: 700px) {
    tr:first-child { display: none } tr { display: block; border-bottom: 1px solid var(--line); padding: .6em 0 }
    td { display: block; border: 0; padding: .1em 0 } td:first-child { color: var(--muted) }
  }
</style>
<h1>Curated prompts:
<span class="{{ 'held' if success else 'broken' }}">{{ "fit" if success else "not fit" }}</span></h1>
{% if problem %}
<p class="broken">{{ problem }}</p>
{% else %}
<p>{{ expectations.met }} of {{ expectations.of }} expectations hold (Great Expectations {{ great_expectations }}).
{% if not success %}Nothing is trained on these tables.{% endif %}</p>
<table>
<tr><th>Table<th>Expectation<th>Verdict<th>Found
{% for check in checks|sort(attribute="holds") %}
<tr><td>{{ check.table }}<td>{{ check.meaning }}<br><code>{{ check.expectation }} {{ check.column or "" }}</code>
<td class="{{ 'held' if check.holds else 'broken' }}">{{ "holds" if check.holds else "broken" }}
<td>{% if check.unexpected %}{{ check.unexpected }} rows{% endif %} {{ check.observed or "" }}
{% if check.examples %}<ul>{% for example in check.examples %}<li>{{ example }}{% endfor %}</ul>{% endif %}

{% endfor %}
</table>
{% endif %}
</html>
""")
