"""Languages that are easily taken for each other: which they are, and words that part some.

lid.176 takes most Malay for Indonesian, and short Cebuano for Tagalog. Their grammar is nearly
one, but some of the commonest words are of one only: text that has more of the other language's
is the other's. Text with none of them stays as the model has it, and may well be both.
"""

from __future__ import annotations

import re

RELATED = (
    {"hr", "sr", "bs", "sh", "sl"}, {"no", "da", "sv"}, {"id", "ms", "jv", "su", "min"},
    {"cs", "sk"}, {"es", "gl", "ca", "ast", "an", "pt"}, {"hi", "mr", "ne"},
    {"ru", "uk", "be", "bg", "mk"}, {"tr", "az"}, {"ar", "fa", "ur", "ps", "ckb"}, {"de", "lb"},
    {"nl", "af", "li"}, {"tl", "ceb", "ilo", "war", "pam"},
)  # fmt: skip
"""Those that short text can't part, or that a source may well call by one name."""
PAIRS = {"id": "ms", "ms": "id", "tl": "ceb", "ceb": "tl"}
WORDS = {
    "id": "bahwa karena bisa uang kantor mobil toko sore berbeda yaitu saja besok kemarin coba "
    "delapan setelah namun sedangkan merupakan perusahaan universitas provinsi nomor berbicara "
    "berkas tampilan sementara beberapa kalau lewat sebesar siang gratis",
    "ms": "bahawa kerana boleh wang pejabat kereta kedai petang berbeza iaitu sahaja esok semalam "
    "cuba lapan selepas ialah manakala beliau daripada syarikat universiti bercakap fail "
    "tetingkap pelbagai sekiranya hendaklah ketuhar awak mahu perkara baharu antaranya percuma",
    "tl": "ng ay at hindi ito isang nang kung na siya kanyang para ngunit dahil pagsapit",
    "ceb": "ug nga dili kini mao og apan kay alang unsa usa iyang kaniadto kanila diin",
}  # fmt: skip
SUFFIX = {"id": "nya", "ms": "nya"}  # "kedainya": her shop
SETS = {language: frozenset(words.split()) for language, words in WORDS.items()}
WORD = re.compile(r"[a-z]+")


def of_pair(language: str, text: str) -> str:
    """`language`, or the other one of its pair when `text` has more of the other's words."""
    other = PAIRS[language]
    suffix = SUFFIX.get(language, "")
    words = [word.removesuffix(suffix) for word in WORD.findall(text.lower())]
    own, others = (sum(word in SETS[one] for word in words) for one in (language, other))
    return other if others > own else language
