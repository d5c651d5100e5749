"""The date that chat templates write: a fixed one, so that a prompt has the same tokens on every day.

Templates such as Llama 3.2's and SmolLM3's write today's date through `strftime_now`, a global of transformers. Data
given to a template cannot replace it (newer versions of transformers turn functions into text), but a macro can.
"""

from __future__ import annotations

from datetime import datetime

#: The date that Llama's own templates write where they cannot ask for today's; at midnight.
DATE = datetime(2024, 7, 26)
_PADDED = "dHIMSjmUWy"  # numbers with leading zeros, which "%-d" leaves out
_MACRO = """
{%- macro strftime_now(format) -%}
{%- set found = namespace(text=format) -%}
{%- for directive, value in lensteer_date -%}
{%- set found.text = found.text | replace(directive, value) -%}
{%- endfor -%}
{{- found.text -}}
{%- endmacro -%}
{{- '' }}"""


def with_fixed_date(template: str) -> str:
    """A template in which `strftime_now` formats `DATE`; it has to be rendered with `lensteer_date=directives()`."""
    return _MACRO.strip() + template if "strftime_now" in template else template


def directives() -> list[tuple[str, str]]:
    """What each directive of `strftime` stands for on `DATE`, to be replaced in this order."""
    values = {f"%{letter}": DATE.strftime(f"%{letter}") for letter in "aAbBcfGpuVwxXYzZ" + _PADDED}
    plain = {f"%-{letter}": values[f"%{letter}"].lstrip("0") or "0" for letter in _PADDED}
    composed = {"%D": DATE.strftime("%m/%d/%y"), "%F": DATE.strftime("%Y-%m-%d"), "%T": DATE.strftime("%H:%M:%S")}
    return [("%%", "\0"), *{**values, **plain, **composed, "%e": f"{DATE.day:2}"}.items(), ("\0", "%")]
