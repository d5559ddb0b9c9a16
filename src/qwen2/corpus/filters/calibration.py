"""Limits for each language, from measured numbers: a rule drops the share that it does in English.

Published limits were chosen for English. In another language the same statistic lies elsewhere
(German has more commas, Russian longer words), so that one number drops more good text there, or
less bad. The limit that means the same is found by matching quantiles: when a rule's limit drops a
share p of the reference documents, the limit of a language is the p-quantile of its own.

Shares can be compared only where documents can. Best are translations: name the text that each
document renders, and a language is compared with the English of the same texts. Without names
all documents of the reference count, and differences between sources pass for ones of language:
then calibrate on sources of one kind alone.

How far a limit may go:
- Fewer than `least_documents` in a language, or in its reference: no limit of its own.
- The published limit stays unless its share differs for sure from the reference's: Newcombe's
  interval (1998, method 10) of the difference must leave out nought.
- No limit is more than `factor` times as loose, or as strict, as the published one.
- Where even the loosest such limit drops more than the reference's share for sure, the rule tells
  nothing of the language (Thai ends no sentence with a mark) and has no limit there (`fits`).
- Between two documents, the looser value; rounded to three digits, outwards. So no more than the
  reference's share is dropped.

What comes out is `Rules.languages`, and the evidence of each decision, also of those to change
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.corpus.filters.rules import Limits, Rule, Rules

Numbers = NDArray[np.floating]
# A greatest limit of values is a least limit of their negatives.
ENDS = {"least": 1.0, "greatest": -1.0}


class CalibrationConfig(Config):
    """With what a language is compared, and how sure a difference must be."""

    reference: str = "en"
    """The language whose limits are taken as right."""
    least_documents: PositiveInt = 60
    """Fewest documents of a language, and of its reference."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals. Of many limits that are tried some move by chance: a little, for they move
    to the language's own quantile."""
    factor: float = Field(default=2.0, gt=1)
    """How far a limit may be from the published one, either way."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a limit of a language is what it is."""

    language: str
    rule: str
    end: str
    """`least` or `greatest`."""
    documents: int
    reference_documents: int
    published: float
    limit: float | None
    """The same as `published` where nothing changes; None: the rule doesn't fit the language."""
    low: float
    high: float
    """The limits that would drop the shares at both ends of the reference share's interval."""
    reference_share: float
    """Share of the reference documents that the published limit drops."""
    before: float
    """Share of the language's documents that the published limit drops."""
    after: float
    """And that `limit` drops."""

    @property
    def fits(self) -> bool:
        """Whether the rule says something in the language."""
        return self.limit is not None

    @property
    def changed(self) -> bool:
        """Whether the language needs a limit of its own."""
        return self.limit != self.published


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Limits by language and rule, where they differ from the reference's, and the evidence."""

    languages: dict[str, dict[str, Limits]] = field(default_factory=dict)
    evidence: tuple[Evidence, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    """Languages with too few documents -> how many."""


def calibrate(
    rules: Rules,
    columns: Mapping[str, Numbers],
    languages: Sequence[str],
    texts: Sequence[str] | None = None,
    config: CalibrationConfig = CalibrationConfig(),  # noqa: B008 (it is frozen)
) -> Calibrated:
    """Limits of each language that drop the same share as those of the reference language.

    Args:
        rules: their limits for `config.reference` are taken as right, those of other languages
            aren't looked at.
        columns: each statistic of `rules`, (documents,).
        languages: of the documents.
        texts: a name of what each document is a rendering of. A language is compared with those
            documents of the reference that have a name in common with it.

    Raises:
        UserError: a statistic is missing, lengths differ, or there are too few documents of the
            reference language.
    """
    _check(rules, columns, languages, texts)
    language_of = np.asarray(languages, np.str_)
    rows = {str(one): np.flatnonzero(language_of == one) for one in np.unique(language_of)}
    reference = rows.pop(config.reference, np.zeros(0, np.int64))
    if len(reference) < config.least_documents:
        raise UserError(
            f"calibration: {len(reference)} documents in {config.reference!r}, the reference; "
            f"it needs {config.least_documents} (least_documents)"
        )
    names = None if texts is None else np.asarray(texts, np.str_)
    found: dict[str, dict[str, Limits]] = {}
    evidence: list[Evidence] = []
    skipped: dict[str, int] = {}
    for language, own in rows.items():
        other = reference
        if names is not None:
            other = reference[np.isin(names[reference], names[own])]
            own = own[np.isin(names[own], names[other])]
        if min(len(own), len(other)) < config.least_documents:
            skipped[language] = min(len(own), len(other))
            continue
        for rule in rules.rules:
            values = columns[rule.statistic]
            published = rules.limits(rule, config.reference)
            tried = _limits(language, rule, published, values[own], values[other], config)
            evidence += tried
            if any(one.changed for one in tried):
                ends = {one.end: one.limit for one in tried}
                found.setdefault(language, {})[rule.name] = Limits(**ends)
    return Calibrated(found, tuple(evidence), skipped)


def with_limits(rules: Rules, languages: Mapping[str, Mapping[str, Limits]]) -> Rules:
    """`rules` with the limits of `languages` before its own: language by language, rule by rule."""
    merged = {
        language: {**rules.languages.get(language, {}), **languages.get(language, {})}
        for language in sorted({*rules.languages, *languages})
    }
    return Rules(rules=rules.rules, languages=merged)


def wilson(count: int, total: int, confidence: float) -> tuple[float, float]:
    """Interval of a share of which `count` of `total` were seen (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, zz = count / total, z * z / total
    middle = share + zz / 2
    reach = math.sqrt(zz * (share * (1 - share) + zz / 4))
    low, high = (middle - reach) / (1 + zz), (middle + reach) / (1 + zz)
    # Rounding must not part the ends from what was seen.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def differ(one: tuple[int, int], other: tuple[int, int], confidence: float) -> bool:
    """Whether two shares, (count, total) each, are different for sure: Newcombe's interval of their
    difference leaves out nought."""
    (p, q) = (one[0] / one[1], other[0] / other[1])
    (p_low, p_high), (q_low, q_high) = wilson(*one, confidence), wilson(*other, confidence)
    below = p - q - math.hypot(p - p_low, q_high - q)
    above = p - q + math.hypot(p_high - p, q - q_low)
    return below > 0 or above < 0


def _limits(
    language: str,
    rule: Rule,
    published: Limits,
    own: Numbers,
    other: Numbers,
    config: CalibrationConfig,
) -> list[Evidence]:
    """The evidence for each end of a rule that has a limit."""
    found = []
    for end, sign in ENDS.items():
        limit = getattr(published, end)
        if limit is None:
            continue
        mine = np.sort(sign * own)
        dropped, expected = _below(mine, sign * limit), _below(sign * other, sign * limit)
        share = expected / len(other)
        new: float | None = limit
        if differ((dropped, len(own)), (expected, len(other)), config.confidence):
            exact = _rounded(sign * _quantile(mine, share), up=end == "greatest")
            least, greatest = sorted((limit / config.factor, limit * config.factor))
            new = min(max(exact, least), greatest)
            left = (_below(mine, sign * new), len(own))
            if left[0] > expected / len(other) * len(own) and differ(
                left, (expected, len(other)), config.confidence
            ):
                new = None
        bounds = wilson(expected, len(other), config.confidence)
        low, high = sorted(sign * _quantile(mine, bound) for bound in bounds)
        after = 0.0 if new is None else _below(mine, sign * new) / len(own)
        counts = (len(own), len(other))
        shares = (share, dropped / len(own), after)
        found.append(Evidence(language, rule.name, end, *counts, limit, new, low, high, *shares))
    return found


def _below(values: Numbers, limit: float) -> int:
    return int(np.count_nonzero(values < limit))


def _quantile(values: Numbers, share: float) -> float:
    """The greatest value with no more than `share` of the ascending `values` below it."""
    return float(values[min(int(share * len(values) + 1e-9), len(values) - 1)])


def _rounded(value: float, up: bool) -> float:
    """To three digits, upwards or downwards."""
    near = float(f"{value:.3g}")
    if near == value or (near > value) == up:
        return near
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    return float(f"{near + (step if up else -step):.3g}")


def _check(
    rules: Rules,
    columns: Mapping[str, Numbers],
    languages: Sequence[str],
    texts: Sequence[str] | None,
) -> None:
    for name in sorted(rules.statistics):
        if name not in columns:
            raise UserError(f"calibration: no statistic {name!r} among the measured numbers")
        if len(columns[name]) != len(languages):
            raise UserError(
                f"calibration: {len(columns[name])} values of {name!r} for "
                f"{len(languages)} documents"
            )
    if texts is not None and len(texts) != len(languages):
        raise UserError(f"calibration: {len(texts)} names of texts for {len(languages)} documents")
