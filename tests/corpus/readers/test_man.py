"""Manual pages: the macros and escapes of man(7) and mdoc(7), and text of any kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus.readers.man import filled, man_text
from qwen2.corpus.readers.roff import arguments, glyphs

PAGE = r"""
.\" A comment, which no reader sees.
.TH CUT 1 "2020" "GNU" "Benutzerbefehle"
.ie \n(.g .ds Aq \(aq
.el       .ds Aq '
.de URL
\fI\\$2\fP <\\$1>
..
.SH BEZEICHNUNG
cut \- Abschnitte
aus Zeilen entfernen
.SH "DIE OPTIONEN"
.TP
\fB\-b\fP, \fB\-\-bytes\fP=\fILISTE\fP
Nur diese
Bytes.
.IP "\fB\-n\fR" 4
(ignoriert)
.PP
Es gilt
.BR cut (1),
nicht \*(Aqawk\*(Aq.
.if t .I never
.if n .I seen
.nf
$ cut \-c 1
  a\eb
.fi
"""


def test_reads_a_page_of_man_macros() -> None:
    assert man_text(PAGE) == (
        "BEZEICHNUNG\n\ncut - Abschnitte aus Zeilen entfernen\n\n"
        "DIE OPTIONEN\n\n"
        "-b, --bytes=LISTE\n    Nur diese Bytes.\n\n"
        "-n\n    (ignoriert)\n\n"
        "Es gilt cut(1), nicht 'awk'. seen\n\n"
        "$ cut -c 1\n  a\\b\n"
    )


def test_reads_a_page_of_mdoc() -> None:
    page = (
        ".Dd May 1\n.Dt CAT 1\n.Os\n.Sh NAME\n.Nm cat\n.Nd concatenate\n.Sh SYNOPSIS\n"
        ".Nm\n.Op Fl u\n.Op Ar file ...\n.Sh SEE\n.Bl -tag\n.It Fl n Ar count\nNumbers.\n.El\n"
        ".Xr sed 1 ,\n.Dq quoted\nand\n.Ar a Ns Ar b .\n"
    )
    assert man_text(page) == (
        "NAME\n\ncat concatenate\n\nSYNOPSIS\n\ncat [-u] [file ...]\n\nSEE\n\n"
        "-n count\n    Numbers.\n\nsed(1), “quoted” and ab.\n"
    )


def test_reads_the_rows_of_a_table() -> None:
    page = ".TS\ntab(;) box;\nl l.\nA;1\n_\nT{\nB\nT}\t2\n.TE\nAfter.\n"
    assert man_text(page) == "A;1\nB\n2\n\nAfter.\n"


def test_leaves_out_blocks_for_a_typesetter() -> None:
    page = ".if t \\{\\\n.sp\nno\n.if x \\{\nno\n.\\}\nno\n.\\}\nyes\n"
    assert man_text(page) == "yes\n"


def test_a_page_that_points_to_another_has_no_text() -> None:
    assert man_text(".so man1/ls.1\n") == ""


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (r"\fBbold\fR \f[CW]code\f[] \s-1SMALL\s+1", "bold code SMALL"),
        (r"\[u00E9]t\('e \[u0065_0301]", "été e\u0301"),
        (r"a\-b\ c\&d\|e \(bu \(lqx\(rq", "a-b c" + "de • “x”"),
        (r"C:\e\(rs \" comment", "C:\\\\ "),
        (r"\h'1m'\w'x'\v'2'y", "y"),
        (r"\[nothing]\(zz", ""),
    ],
)
def test_escapes(line: str, text: str) -> None:
    assert glyphs(line, {}) == text


def test_strings_of_the_page_may_name_themselves() -> None:
    assert glyphs(r"\*[a]b\*x", {"a": "A", "x": r"(\*x)"}).startswith("Ab((")


def test_arguments_are_quoted_or_parted_by_spaces() -> None:
    found = arguments(r'one "two three" "a ""b""" four\ five \" six', {})
    assert found == ["one", "two three", 'a "b"', "four five"]


def test_lines_join_without_a_space_where_the_script_has_none() -> None:
    assert filled(["日本", "語", "is", "日本"]) == "日本語 is 日本"
    assert filled(["한국", "어"]) == "한국 어"


@given(st.text(st.sampled_from(list(".\\\"' \nTSPHfB(*[]{}IdenoaÉ日")) | st.characters()))
def test_any_text_is_read_and_ends_in_one_line_feed(data: str) -> None:
    text = man_text(data)
    assert text == "" or (text.endswith("\n") and not text.startswith("\n"))


@given(st.lists(st.text(st.sampled_from("abcdé"), min_size=1), min_size=1))
def test_plain_words_stay(words: list[str]) -> None:
    assert man_text("\n".join(words)) == " ".join(words) + "\n"


def test_a_definition_with_a_comment_ends() -> None:
    definitions = '.de Sh \\" Subsection\n.PP\nhidden\n..\n.de Ip end\nhidden\n..\n.end\n'
    page = f'{definitions}.ig \\" -*- nroff -*-\nhidden\n..\n.SH NAME\nseen\n'
    assert man_text(page) == "NAME\n\nseen\n"
