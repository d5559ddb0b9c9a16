"""Pages that people look at: one self-contained HTML file, without outside resources.

Scripts are only in the page of what still goes on: it loads itself again (train/page.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root{--ink:#22262e;--paper:#fff;--soft:#667;--line:#dde;--box:#f6f7fa;color-scheme:light dark}
@media(prefers-color-scheme:dark){
:root{--ink:#e4e6ea;--paper:#16181d;--soft:#99a;--line:#333844;--box:#1e2129}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:52rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
p.sub{color:var(--soft);margin-top:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}td.best{font-weight:650}
pre{background:var(--box);padding:.7rem .9rem;border-radius:.4rem;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.85rem}pre b{color:#3f6fd8}
svg{width:100%;height:auto}code{background:var(--box);padding:.1rem .3rem;border-radius:.2rem}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem}
.tile{background:var(--box);border-radius:.5rem;padding:.6rem 1rem;flex:1 1 8rem}
.quiet{color:var(--soft);font-size:.85rem}.scroll{overflow-x:auto}
.scroll th,.scroll td{padding:.25rem .35rem}
.tile b{display:block;font-size:1.35rem}.tile span{color:var(--soft);font-size:.85rem}
"""


def html_page(title: str, body: Iterable[str], style: str = "") -> str:
    """A page in the style of all.

    Args:
        body: parts of HTML, in which all text from outside is escaped.
        style: rules of the page's own; they outweigh the common ones.
    """
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>"
        f"<body>{''.join(body)}</body></html>\n"
    )
