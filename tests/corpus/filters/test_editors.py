"""Editors of personal data, Unicode and licences: what they change, what they leave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus.filters import (
    PII,
    Find,
    find,
    licence,
    mask,
    measure_code,
    repair,
    without_licence_header,
)

ANY = st.text(st.characters(exclude_categories=()), max_size=80)
HOSTILE = st.lists(
    st.sampled_from(
        [
            "\ud800",
            "\udfff",
            "\x00",
            "\u202e",
            "\u200f",
            "\u0301",
            "\ufeff",
            "👩\u200d👩\u200d👧",
            "🇩🇪",
            "Ã©",
            "â€™",
            "\r",
            "\x85",
            "\u2028",
            "ก็",
            "ﷺ",
            "\U0010ffff",
            "é",
            "a@b.org",
            "1.2.3.4",
            "::",
            "[1]",
            "{",
            ". ",
            "\n",
        ]
    ),
    max_size=12,
).map("".join)
"""Surrogates alone, NUL, direction marks, marks without letters, joined emoji, mojibake."""
PERSONAL = st.text("ab@.com1234567890+-() :/fF<>PHONE", max_size=60)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.acme.co.uk, please.", "Write to <EMAIL>, please."),
        ("<joe@acme.org>", "<<EMAIL>>"),
        ("at 93.184.216.34 or 2001:4860:4860::8888.", "at <IP> or <IP>."),
        ("call +49 30 1234567 or (030) 123 4567", "call <PHONE> or <PHONE>"),
        ("call 212-555-0187!", "call <PHONE>!"),
        ("card 4111 1111 1111 1111.", "card <CARD>."),
        ("AKIAIOSFODNN7EXAMPLE", "<SECRET>"),
        ("ghp_" + "a1B2" * 9, "<SECRET>"),
        ("token=hf_" + "aB3" * 12 + ";", "token=<SECRET>;"),
        ("https://bob:hunter22@host.org/x", "https://bob:<SECRET>@host.org/x"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIB" * 20 + "\n-----END RSA PRIVATE KEY-----",
            "<SECRET>",
        ),
    ],
)
def test_masks(text: str, masked: str) -> None:
    assert mask(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com and root@localhost",
        "127.0.0.1 192.168.1.1 10.0.0.1 fe80::1 ::1 12:30:45",
        "version 1.2.3.4.5, 999.1.1.1, 3.141592653589793",
        "on 2024-01-31 12:00, pages 100-200, 1 000 000 people",
        "4111 1111 1111 1112 and 0000 0000 0000 0000",
        "std::vector<int>::iterator a::b",
        "isbn 978-3-16-148410-0",
        "@decorator and me@work",
        "sk-learn is not a secret",
        # Taken for personal data once: from changelogs, manuals and code.
        "Standards-Version 3.7.2.0, XFree86 4.3.0.1, sqlite (3.8.11.1), section 12.1.2.3",
        "x[..., 1::2] = -x[..., ::2]; data[0::2], 6 Jun 2006::",
        "llvm-toolchain (1:10~++20200121023453+de4b) and pd.Series([635554097106142143])",
        "[+0.58989127, 0.7890047]",
        "http://user:pass@host, smb://user:password@server/printer",
        "sk-ecdsa-sha2-nistp256-cert-v01@openssh.com"[:31],
    ],
)
def test_leaves_what_is_not_personal(text: str) -> None:
    assert mask(text) == text
    assert find(text) == []


def test_finds_with_places_and_obeys_its_switches() -> None:
    text = "a@acme.org 93.184.216.34"
    assert find(text) == [Find("email", 0, 10), Find("address", 8, 21)]
    assert mask(text, PII(emails=False)) == "a@acme.org <IP>"
    assert mask(text, PII(addresses=False)) == "<EMAIL> 93.184.216.34"


PLANTED = {
    "<EMAIL>": ["anna.schmidt@firma.de", "li.wei@qq.com", "ivan+news@yandex.ru"],
    "<IP>": ["93.184.216.34", "2a02:6b8:0:1::feed"],
    "<PHONE>": ["+49 30 901820-0", "+86 10 6512 3456", "+7 (495) 123-45-67", "(03) 5555 1234"],
    "<CARD>": ["5555 5555 5555 4444", "378282246310005", "6011-1111-1111-1117"],
    "<SECRET>": ["ghp_" + "a1B2" * 9, "sk-proj-" + "a1B2_" * 8],
}
SENTENCES = {
    "en": "Write to {} today, please.",
    "de": "Bitte heute noch an {} wenden!",
    "fr": "Merci de noter ceci : {}, c’est important.",
    "ru": "Пишите сюда: {}, мы ответим.",
    "zh": "请记下： {} ，谢谢。",
    "ja": "連絡先は「{}」です。",
    "ko": "여기로 연락하세요: {} (담당자)",
    "ar": "يرجى الاتصال على {} اليوم.",
    "th": "ติดต่อได้ที่ {} ทุกวัน",
    "hi": "कृपया {} पर लिखें।",
}


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("tag", PLANTED)
def test_finds_what_is_planted_in_any_language(tag: str, language: str) -> None:
    for planted in PLANTED[tag]:
        assert mask(SENTENCES[language].format(planted)) == SENTENCES[language].format(tag)


@given(ANY | PERSONAL | HOSTILE)
def test_masking_twice_is_masking_once(text: str) -> None:
    once = mask(text)
    assert mask(once) == once
    assert (once == text) == (find(text) == [])


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("plain ascii\n", "plain ascii\n"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\x00b\x07c\x1bd\x7f", "abcd"),
        ("\x1b[1;36mblue\x1b[;m\x1b[K and [1m", "blue and [1m"),
        ("\ufeffstart", "start"),
        ("\ud83d\ude00 and \ud800 alone", "😀 and  alone"),
        ("schÃ¶n und grÃ¼n", "schön und grün"),
        ("Itâ€™s a cafÃ©", "It’s a café"),
        ("Ã\x83Â©tÃ\x83Â©", "été"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
        ("naïve “quotes” ﬁ ＡＢ Â", "naïve “quotes” ﬁ ＡＢ Â"),
        ("İstanbul Ångström Ã la carte".replace("Ã", "À"), "İstanbul Ångström À la carte"),
    ],
)
def test_repairs(text: str, mended: str) -> None:
    assert repair(text) == mended


@given(ANY | HOSTILE | st.text("Ãâ€©\xa0é\x80\x99\r\n\x85a", max_size=30))
def test_repaired_text_is_valid_and_stays(text: str) -> None:
    once = repair(text)
    once.encode()
    assert repair(once) == once
    assert not set(once) & set(map(chr, [*range(9), *range(14, 32), *range(127, 160), 13]))


@given(st.text("abc äöü ß é 漢字 мир\n", max_size=60))
def test_good_text_is_left_alone(text: str) -> None:
    assert repair(text) == text


GPL = "This program is free software under the terms of the GNU General Public License."
APACHE = "Licensed under the Apache License, Version 2.0"


@pytest.mark.parametrize(
    ("text", "name", "restrictive"),
    [
        ("// SPDX-License-Identifier: MIT\nint x;", "MIT", 0),
        ("# SPDX-License-Identifier: GPL-2.0-only\nx", "GPL-2.0-only", 1),
        ("/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */", "GPL-2.0 OR BSD-3-Clause", 0),
        (f"/*\n * Copyright 2020\n * {GPL}\n */", "GPL-2.0", 1),
        ("# Copyright 2020\n# GNU Lesser General\n# Public License", "LGPL-2.1", 1),
        (f"# Copyright 2020\n# {APACHE}\n", "Apache-2.0", 0),
        ("x = 1\n", None, 0),
    ],
)
def test_reads_licences(text: str, name: str | None, restrictive: int) -> None:
    assert licence(text) == name
    assert measure_code([text])["restrictive_licence"][0] == restrictive


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"/* Copyright 2020\n   {APACHE} */\n\nint x;\n", "int x;\n"),
        (f"#!/bin/sh\n# Copyright 2020\n# {APACHE}\necho\n", "#!/bin/sh\necho\n"),
        ("# -*- coding: utf-8 -*-\n# (c) 2020 me\nx = 1\n", "# -*- coding: utf-8 -*-\nx = 1\n"),
        ("<!-- All rights reserved. -->\n<p>", "<p>"),
        ("# a comment\nx = 1  # Copyright 2020\n", "# a comment\nx = 1  # Copyright 2020\n"),
        ("x = 1\n", "x = 1\n"),
        ("", ""),
    ],
)
def test_takes_licence_headers_out(text: str, left: str) -> None:
    assert without_licence_header(text) == left


@given(ANY | HOSTILE | st.text("#/*-; \nCopyright©", max_size=60))
def test_a_header_is_all_that_goes(text: str) -> None:
    left = without_licence_header(text)
    rest = iter(text)
    assert all(character in rest for character in left)  # a subsequence of the text
