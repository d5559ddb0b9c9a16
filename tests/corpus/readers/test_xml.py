from pathlib import Path

import pytest
from reading import read, source

MALLARD = """<?xml version="1.0" encoding="utf-8"?>
<page xmlns="http://projectmallard.org/1.0/" type="topic" id="x" xml:lang="de">
  <info><link type="guide" xref="y"/><credit><name>A. N. Author</name></credit>
    <desc>Left out.</desc></info>
  <title>Kontrast   anpassen</title>
  <!-- a comment -->
  <p>Sie können den <em>Kontrast</em>
     anpassen mit <gui>Knopf</gui> <cmd>ls</cmd>.</p>
  <steps>
    <item><p>Öffnen Sie <guiseq><gui>Datei</gui><gui>Neu</gui></guiseq>.</p></item>
    <item><p>Drücken Sie <keyseq><key>Strg</key><key>A</key></keyseq>.</p><p>Warten.</p></item>
  </steps>
  <section id="s"><title>Mehr</title><list><item><p>Punkt</p></item></list>
    <code>if x:
      y</code>
    <note><title>Tipp</title><p>Kurz.</p></note></section>
</page>"""
DOCBOOK = """<?xml version="1.0"?><!DOCTYPE chapter SYSTEM "gui.dtd" [<!ENTITY own "Own">]>
<chapter lang="en"><chapterinfo><title>Basics of &app;</title><author>Nobody</author></chapterinfo>
<para>See &own; &hellip; &unknown; &lt;b&gt;<indexterm><primary>gone</primary></indexterm>
<itemizedlist><listitem><para>one<footnote><para>note</para></footnote></para></listitem></itemizedlist>
after</para><programlisting><![CDATA[  a &app; b]]></programlisting>
<table><title>T</title><tgroup><tbody><row><entry>1</entry><entry><para>2|3</para></entry></row></tbody>
</tgroup></table></chapter>"""


def test_mallard(tmp_path: Path) -> None:
    (tmp_path / "a.page").write_text(MALLARD)
    (document,), _ = read(source("xml", tmp_path))
    assert document.language == "de"
    assert document.text == (
        "# Kontrast anpassen\n\nSie können den Kontrast anpassen mit Knopf `ls`.\n\n"
        "1. Öffnen Sie Datei > Neu.\n\n2. Drücken Sie Strg+A.\n\n   Warten.\n\n"
        "## Mehr\n\n- Punkt\n\n```\nif x:\n      y\n```\n\n**Tipp**\n\nKurz.\n"
    )


def test_docbook_with_entities_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "gui.dtd").write_text(
        '<!ENTITY name "GnuCash">\n<!ENTITY app "<application>&name;</application>">'
        '<!ENTITY app "second">'
    )
    (tmp_path / "a.docbook").write_text(DOCBOOK)
    (document,), _ = read(source("xml", tmp_path))
    assert document.text == (
        "# Basics of GnuCash\n\nSee Own … &unknown; <b>\n\n- one ( note )\n\nafter\n\n"
        "```\na &app; b\n```\n\n**T**\n\n| 1 | 2\\|3 |\n| --- | --- |\n"
    ).replace("( note )", "(note)")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<a><p>text</a>", "not well-formed XML"),
        (b"", "not well-formed XML"),
        (b"<a><info>x</info></a>", "empty text"),
        (b"<?xml version='1.0' encoding='ascii'?><p>\xc3\xa4</p>", "not in the encoding"),
    ],
)
def test_what_is_no_text_is_skipped(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.xml").write_bytes(data)
    documents, (skipped,) = read(source("xml", tmp_path))
    assert not documents
    assert skipped.reason.startswith(reason)


def test_nothing_else_is_opened_and_entities_cannot_explode(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret words")
    external = f'<!DOCTYPE p [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]><p>see &x;</p>'
    (tmp_path / "a.xml").write_text(external)
    levels = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE p [<!ENTITY l0 "{"x" * 100}">{levels}]><p>&l11;</p>'
    (tmp_path / "b.xml").write_text(bomb)
    (document,), (skipped,) = read(source("xml", tmp_path, max_bytes=1 << 20))
    assert document.text == "see &x;\n"
    assert skipped.source.endswith("b.xml")
