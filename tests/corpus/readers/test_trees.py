import gzip
from pathlib import Path

import pytest
from reading import read, source

from qwen2.corpus.readers.code import programming_language
from qwen2.corpus.readers.html import all_text, decode_page

SENTENCE = "The quick brown fox jumps over the lazy dog near the bank of the river. "


def put(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def test_text(tmp_path: Path) -> None:
    put(tmp_path, {
        "de/a.md": "# Eins\r\n", "de/b.txt.gz": gzip.compress(b"zwei"), "fr/c.rst": "\ufefftrois",
        "fr/d.adoc": "quatre", "fr/zero.txt": b"a\0b", "fr/latin.txt": b"caf\xe9",
        "fr/empty.md": "\n", "fr/long.txt": "x" * 200,
        "fr/cut.txt.gz": gzip.compress(b"long enough")[:-3],
    })  # fmt: skip
    documents, skipped = read(source("text", f"{tmp_path}/{{language}}", max_bytes=100))
    assert [(d.id, d.text, d.language) for d in documents] == [
        ("s/de/a.md", "# Eins\n", "de"),
        ("s/de/b.txt.gz", "zwei", "de"),
        ("s/fr/c.rst", "trois", "fr"),
    ]
    assert [(Path(s.source).name, s.reason) for s in skipped] == [
        ("cut.txt.gz", "gzip stream cut short"),
        ("empty.md", "empty text"),
        ("latin.txt, byte 3", "not UTF-8"),
        ("long.txt", "longer than 100 bytes"),
        ("zero.txt, byte 1", "text holds NUL"),
    ]
    documents, _ = read(source("text", tmp_path, suffixes=[".ADOC"]))
    assert [d.text for d in documents] == ["quatre"]


def test_a_file_of_many_texts(tmp_path: Path) -> None:
    put(tmp_path, {
        "de/a": "Eins\nzwei\n%\n%\nDrei % vier\n%%\n% \nfünf\n%\n",
        "de/b.gz": gzip.compress(b"x\n%\n"), "de/c": b"caf\xe9\n%\n",
        "de/d": "kurz\n%\n" + "x" * 45,
    })  # fmt: skip
    many = source("text", f"{tmp_path}/{{language}}/*", separator="%", max_bytes=50)
    documents, skipped = read(many)
    assert [(d.id, d.text, d.language) for d in documents] == [
        ("s/de/a#1", "Eins\nzwei\n", "de"),
        ("s/de/a#3", "Drei % vier\n%%\n", "de"),
        ("s/de/a#4", "fünf\n", "de"),
        ("s/de/b.gz#1", "x\n", "de"),
    ]
    assert [(Path(s.source).name, s.reason) for s in skipped] == [
        ("c, byte 3", "not UTF-8"),
        ("d", "longer than 50 bytes"),
    ]
    with pytest.raises(ValueError, match="separator"):
        source("text", tmp_path, separator=" ")


def test_manual_pages(tmp_path: Path) -> None:
    page = b".TH CUT 1\n.SH NAME\ncut \\- remove\nsections\n"
    put(tmp_path, {
        "de/man1/cut.1.gz": gzip.compress(page), "de/man3/SSL_read.3ssl": page,
        "pt_BR/man1/zwei.1.gz": gzip.compress(b".so man1/cut.1\n"), "de/man1/README": page,
        "de/man1/latin.1": b".SH NAME\ncaf\xe9", "de/man1/nothing.1": ".TH X 1\n", "man1/x.1": page,
    })  # fmt: skip
    documents, skipped = read(source("man", f"{tmp_path}/{{language}}"))
    assert [(d.id, d.text, d.language) for d in documents] == [
        ("s/de/man1/cut.1.gz", "NAME\n\ncut - remove sections\n", "de"),
        ("s/de/man3/SSL_read.3ssl", "NAME\n\ncut - remove sections\n", "de"),
    ]
    assert [(Path(s.source).name, s.reason) for s in skipped] == [
        ("latin.1, byte 12", "not UTF-8"),
        ("nothing.1", "empty text"),
        ("zwei.1.gz", "points to another page"),
    ]


def test_ids_do_not_mix_up_names_with_records(tmp_path: Path) -> None:
    put(tmp_path, {"a#1.txt": "x", "a%231.txt": "y"})
    documents, _ = read(source("text", tmp_path))
    assert [d.id for d in documents] == ["s/a%231.txt", "s/a%25231.txt"]


def test_code(tmp_path: Path) -> None:
    put(tmp_path, {
        "one/LICENSE": "MIT License\n\nPermission is hereby granted, free of charge",
        "one/a/b/x.py": "print(1)\n",
        "one/a/y.rs": "// SPDX-License-Identifier: MPL-2.0\nfn x() {}",
        "two/COPYING": "GNU GENERAL PUBLIC LICENSE", "two/Makefile": "all:\n", "two/data.csv": "1",
        "three/z.c": "int x;",
        "one/node_modules/m.js": "x", "two/.git/h.py": "x", "two/vendor/v.go": "x",
    })  # fmt: skip
    documents, skipped = read(source("code", f"{tmp_path}/{{group}}", licence="unknown"))
    assert not skipped
    assert [
        (d.id, d.metadata["programming_language"], d.licence, d.group, d.language)
        for d in documents
    ] == [
        ("s/one/a/b/x.py", "python", "MIT", "one", None),
        ("s/one/a/y.rs", "rust", "MPL-2.0", "one", None),
        ("s/three/z.c", "c", "unknown", "three", None),
        ("s/two/Makefile", "make", "GPL-2.0", "two", None),
    ]
    documents, _ = read(source("code", tmp_path, programming_languages=["c"]))
    assert [d.id for d in documents] == ["s/three/z.c"]
    assert programming_language("a/B.CPP.gz") == "c++"
    assert programming_language("a/python") is None


PAGE = f"""<!doctype html><html><head><title>All &amp;
 about foxes</title></head><body>
<nav class="menu"><ul><li><a href="/">Home page of menus</a></li></ul></nav>
<div class="sphinxsidebar">Sidebar words</div>
<main><h1>Foxes<a class="headerlink" href="#f">¶</a></h1><p>{SENTENCE * 3}</p>
<h2>Steps</h2><ol><li>First <b>step</b></li><li>Second step</li></ol><ul><li>Point</li></ul>
<pre>def fox():
    return 1</pre><p>{SENTENCE * 2}</p>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table></main>
<footer>Footer words</footer></body></html>"""
EMPTY = "<html><body><nav></nav><script>let words = 1</script></body></html>"


@pytest.mark.parametrize("favour", ["balanced", "precision", "recall", "everything"])
def test_html(tmp_path: Path, favour: str) -> None:
    put(tmp_path, {"a.html": PAGE, "b.html": EMPTY, "c.htm.gz": gzip.compress(PAGE.encode())})
    documents, skipped = read(source("html", tmp_path, favour=favour))
    assert [d.id for d in documents] == ["s/a.html", "s/c.htm.gz"]
    assert documents[0].metadata == {"title": "All & about foxes"}
    assert [(Path(s.source).name, s.reason) for s in skipped] == [
        ("b.html", "no main text in the page")
    ]
    text = documents[0].text
    for kept in (SENTENCE.strip(), "# Foxes\n", "## Steps", "    return 1", "```"):
        assert kept in text
    for gone in ("Home page of menus", "Footer words", "¶", "<"):
        assert gone not in text


def test_everything_of_a_page() -> None:
    three, two = (SENTENCE * 3).strip(), (SENTENCE * 2).strip()
    assert all_text(PAGE) == (
        f"# Foxes\n\n{three}\n\n## Steps\n\n1. First step\n\n2. Second step\n\n- Point\n\n"
        f"```\ndef fox():\n    return 1\n```\n\n{two}\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    )


@pytest.mark.parametrize(
    ("data", "charset", "text"),
    [
        ("größe".encode(), None, "größe"),
        ("größe".encode(), "iso-8859-1", "größe"),  # UTF-8 whatever is said
        ("größe €".encode("cp1252"), "ISO-8859-1", "größe €"),
        (b'<meta charset="koi8-r">' + "лес".encode("koi8-r"), None, '<meta charset="koi8-r">лес'),
        ("日本".encode("iso2022_jp"), "iso-2022-jp", "日本"),
        ("日本".encode("utf-16"), None, "日本"),
        ("\ufeffa".encode(), "no-such-name", "a"),
    ],
)
def test_encodings_of_pages(data: bytes, charset: str | None, text: str) -> None:
    assert decode_page(data, charset) == text
