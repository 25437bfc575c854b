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
<title>Curated prompts: {{ "fit" if success else "not fit" }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
  table { border-collapse: collapse; width: 100% }
  th, td { text-align: left; vertical-align: top; padding: .35em .7em; border-bottom: 1px solid #ddd }
  .held { color: #17692b } .broken { color: #a3160e; font-weight: 600 }
  code { font-size: .85em; color: #555 } li { overflow-wrap: anywhere }
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
