"""The site's formulas as MathML, made while it is built: browsers show it without scripts, and nothing is fetched."""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace the TeX that pymdownx.arithmatex has marked; mkdocs calls this for each page."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    mathml = convert(html.unescape(found[3]), display=display)
    mathml = re.sub('columnalign="([a-z]+)"', r'style="text-align: \1"', mathml)  # what today's browsers understand
    return f'<{found[1]} class="formula">{mathml}</{found[1]}>'
