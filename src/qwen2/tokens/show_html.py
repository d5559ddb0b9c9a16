"""A batch as one self-contained HTML page, without scripts or outside resources."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qwen2.common.html import html_page
from qwen2.tokens.packing import NOTHING
from qwen2.tokens.show import ShownPiece, visible

STYLE = """
:root{--light:93%;--edge:45%}
@media(prefers-color-scheme:dark){:root{--light:17%;--edge:60%}}
body{font-size:15px;line-height:1.5;max-width:70rem}
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:2rem 0 .4rem}
p{color:var(--soft);margin:.2rem 0}
.bar{display:flex;height:1.1rem;border-radius:.3rem;overflow:hidden;gap:1px;margin-bottom:.5rem}
.bar i{background:hsl(var(--hue) 60% var(--edge));min-width:1px}
.bar i.padding,.key i.padding{background:repeating-linear-gradient(45deg,var(--line) 0 4px,
transparent 4px 8px)}
article{background:hsl(var(--hue) 55% var(--light));
border-left:5px solid hsl(var(--hue) 60% var(--edge));
margin:.35rem 0;padding:.35rem .8rem;border-radius:.2rem}
article.cut-start{border-top:2px dashed hsl(var(--hue) 60% var(--edge))}
article.cut-end{border-bottom:2px dashed hsl(var(--hue) 60% var(--edge))}
article.padding{background:none;border-left-color:var(--line)}
header{font-size:.82rem;color:var(--soft);overflow-wrap:anywhere}header b{color:var(--ink)}
pre{background:none;padding:0;margin:.3rem 0 0;font-size:.8rem;max-height:28rem;overflow-y:auto}
pre b{background:var(--ink);color:var(--paper);border-radius:.2rem;padding:0 .3rem;font-weight:500}
.key span{margin-right:1.2rem}.key i{display:inline-block;width:.8rem;height:.8rem;
border-radius:.2rem;background:hsl(var(--hue) 60% var(--edge));margin-right:.35rem}
"""


def batch_page(title: str, rows: Sequence[Sequence[ShownPiece]], kinds: Sequence[str]) -> str:
    """The page of some rows; each piece of a document is a block in the colour of its kind."""
    pieces = [piece for row in rows for piece in row]
    tokens = sum(piece.tokens for piece in pieces)
    keys = []
    for kind in kinds:
        share = sum(piece.tokens for piece in pieces if piece.kind == kind) / tokens
        if share:
            hue = _hue(kind, kinds)
            keys.append(f'<span style="{hue}"><i></i>{escape(kind)} {share:.1%}</span>')
    if padding := sum(piece.tokens for piece in pieces if piece.document == NOTHING):
        keys.append(f'<span><i class="padding"></i>padding {padding / tokens:.2%}</span>')
    body = [
        f"<h1>{escape(title)}</h1>",
        "<p>Each block is a piece of a document, which attention does not look beyond; a dashed "
        "edge is a cut.</p>",
        f'<p class="key">{"".join(keys)}</p>',
    ]
    for number, row in enumerate(rows):
        body += [
            f"<h2>Row {number}</h2>",
            f'<div class="bar">{"".join(_bar(piece, kinds) for piece in row)}</div>',
            *(_block(piece, kinds) for piece in row),
        ]
    return html_page(title, body, STYLE)


def _hue(kind: str, kinds: Sequence[str]) -> str:
    """Hues are as far apart as so many kinds allow."""
    return f"--hue:{round(210 + 360 * kinds.index(kind) / len(kinds)) % 360}"


def _bar(piece: ShownPiece, kinds: Sequence[str]) -> str:
    title = escape(piece.title, quote=True)
    if piece.document == NOTHING:
        return f'<i class="padding" style="flex:{piece.tokens}" title="{title}"></i>'
    return f'<i style="flex:{piece.tokens};{_hue(piece.kind, kinds)}" title="{title}"></i>'


def _block(piece: ShownPiece, kinds: Sequence[str]) -> str:
    if piece.document == NOTHING:
        return f'<article class="padding"><header>{escape(piece.title)}</header></article>'
    cuts = [
        name
        for name, cut in (("cut-start", piece.start > 0), ("cut-end", piece.stop < piece.length))
        if cut
    ]
    where = escape(visible(piece.where_from))
    text = "".join(
        f"<b>{escape(visible(text))}</b>" if special else escape(visible(text))
        for text, special in piece.segments
    )
    return (
        f'<article class="{" ".join(cuts)}" style="{_hue(piece.kind, kinds)}">'
        f"<header><b>{escape(piece.title)}</b>{f'<br>{where}' if where else ''}</header>"
        f'<pre dir="auto">{text}</pre></article>'
    )
