"""An editor that masks personal data and secrets: each find becomes a tag, `<EMAIL>` and so on.

Found by form: e-mail addresses, public IPv4 and IPv6 addresses, numbers that look like telephone
numbers, card numbers (by issuer and Luhn's check), keys and tokens that their issuers gave a
recognisable form, private keys in PEM, passwords inside URLs. Names and postal addresses are not:
that takes a model of the language. Kept: addresses of documentation (example.com, private
networks), numbers with other signs around them, such as versions and dates.

A tag holds nothing that would be found again, so masking twice is masking once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qwen2.common.config import Config


class PII(Config):
    """What is masked."""

    emails: bool = True
    addresses: bool = True
    """Public IP addresses."""
    phones: bool = True
    cards: bool = True
    secrets: bool = True


EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9](?:[\w.+-]{0,62}[\w+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)"
    r"{1,8}[A-Za-z]{2,24}(?![\w@-])",
    re.ASCII,
)
DOCUMENTATION = re.compile(
    r"(?i)@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|[\w-]+\.(?:example|test|invalid))\Z"
)
IPV4 = re.compile(r"(?<![\w.:-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)", re.ASCII)
# With a country code, or an area code in brackets, or North America's three groups.
PHONE = re.compile(
    r"(?<![\w.+/=-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?"
    r"\d{1,4}(?:[ .-]?\d{2,5}){1,4}(?:-\d{1,4})?"
    r"|\(\d{2,5}\)[ .-]?\d{2,5}(?:[ .-]\d{2,5}){1,2}"
    r"|[2-9]\d{2}([-.])[2-9]\d{2}\1\d{4})(?![\w/=+-]|\.\d)",
    re.ASCII,
)
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)", re.ASCII)
SECRETS = re.compile(
    r"""(?x)
    -----BEGIN\ (?:[A-Z0-9]+\ ){0,3}PRIVATE\ KEY(?:\ BLOCK)?-----
        (?:[^-]|-(?!----)){16,16000}-----END\ (?:[A-Z0-9]+\ ){0,3}PRIVATE\ KEY(?:\ BLOCK)?-----
    | \b(?: (?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}              # Amazon
      | gh[pousr]_[A-Za-z0-9]{36,255} | github_pat_\w{22,255}  # GitHub
      | glpat-[\w-]{20,64}                                      # GitLab
      | xox[abeoprs]-[A-Za-z0-9-]{10,250}                       # Slack
      | AIza[\w-]{35}                                           # Google
      | sk-(?:ant-api\d\d-|proj-|svcacct-)[\w-]{20,200} | sk-[A-Za-z0-9]{32,64}  # models
      | (?:sk|rk|pk)_live_[A-Za-z0-9]{16,128}                   # Stripe
      | hf_[A-Za-z0-9]{30,64} | npm_[A-Za-z0-9]{36} | pypi-[\w-]{50,250}
      | SG\.[\w-]{16,32}\.[\w-]{32,64}                          # SendGrid
      | eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000}    # JSON Web Token
      )(?![\w-])
    """,
    re.ASCII,
)
URL_PASSWORD = re.compile(
    r"(?<=://)([\w.+-]{1,64}):(?!<SECRET>|(?:\w*pass(?:w(?:or)?d)?|secret)@)"
    r"[^\s:/@'\"<>]{3,128}(?=@)",
    re.ASCII,
)
SECRET_HINTS = (
    "PRIVATE KEY", "AKIA", "ASIA", "AROA", "AIDA", "gh", "glpat-", "xox", "AIza", "sk-", "_live_",
    "hf_", "npm_", "pypi-", "SG.", "eyJ",
)  # fmt: skip


class Find(NamedTuple):
    """What was masked: the kind, and where it stood in the text before its kind was masked."""

    kind: str
    start: int
    end: int


def mask(text: str, config: PII = PII()) -> str:  # noqa: B008 (it is frozen)
    """`text` with a tag for each find."""
    return mask_and_find(text, config)[0]


def find(text: str, config: PII = PII()) -> list[Find]:  # noqa: B008
    """What `mask` would replace, kind after kind."""
    return mask_and_find(text, config)[1]


def mask_and_find(text: str, config: PII) -> tuple[str, list[Find]]:
    """`mask` and `find` in one go."""
    found: list[Find] = []
    for _, edit in _editors(text, config):
        text = edit(text, found)
    return text, found


Editor = Callable[[str, list[Find]], str]


def _editors(text: str, config: PII) -> Iterator[tuple[str, Editor]]:
    """The editors that may have something to do; secrets go first, since they may hold the rest."""
    if config.secrets:
        if any(hint in text for hint in SECRET_HINTS):
            yield "secret", _editor("secret", SECRETS, "<SECRET>", lambda _: True)
        if "://" in text and "@" in text:
            yield "secret", _editor("secret", URL_PASSWORD, r"\1:<SECRET>", lambda _: True)
    if config.emails and "@" in text:
        yield "email", _editor("email", EMAIL, "<EMAIL>", _is_private)
    if not DIGITS.search(text):
        return
    if config.cards:
        yield "card", _editor("card", CARD, "<CARD>", _is_card)
    if config.addresses:
        yield "address", _editor("address", IPV4, "<IP>", _is_public)
        if ":" in text:
            yield "address", _editor("address", IPV6, "<IP>", _is_public)
    if config.phones:
        yield "phone", _editor("phone", PHONE, "<PHONE>", _is_phone)


DIGITS = re.compile(r"\d")


def _editor(kind: str, pattern: re.Pattern[str], tag: str, check: Callable[[str], bool]) -> Editor:
    def edit(text: str, found: list[Find]) -> str:
        def replace(match: re.Match[str]) -> str:
            if not check(match[0]):
                return match[0]
            found.append(Find(kind, match.start(), match.end()))
            return match.expand(tag)

        return pattern.sub(replace, text)

    return edit


def _is_private(address: str) -> bool:
    return DOCUMENTATION.search(address) is None


def _is_public(address: str) -> bool:
    """Whether an address is of somebody, and no version, section or slice that looks like one.

    1.2.3.4 is far more often a version, and of all addresses only 2 % have no number of three
    digits. `x[::2]` is a slice; public IPv6 begins with 2000 ... 3fff.
    """
    if ":" in address:
        groups = [group for group in address.split(":") if group]
        if len(groups) < 3 or len(groups[0]) != 4 or groups[0][0] not in "23":
            return False
    elif all(len(number) < 3 for number in address.split(".")):
        return False
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_phone(number: str) -> bool:
    return 8 <= sum(map(str.isdigit, number)) <= 15


def _is_card(number: str) -> bool:
    """Luhn's check, and an issuer's first digits and length."""
    plain = "".join(c for c in number if c.isdigit())
    if not ISSUERS.fullmatch(plain):
        return False
    digits = [int(c) for c in plain]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


ISSUERS = re.compile(
    r"4\d{12}(?:\d{3})?(?:\d{3})?"  # Visa
    r"|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"  # Mastercard
    r"|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"  # American Express, Diners Club
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}",  # others
    re.ASCII,
)
