"""Small documents that each filter has something to say about, made from our own prose.

The same in any Python: `random.Random` with a seed gives the same numbers in all versions. Run
`make_decisions.py` after a change, in an environment that has datatrove.
"""

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
PROSE = json.loads((HERE / "prose.json").read_text(encoding="utf-8"))
SENTENCES = (
    *re.split(r"(?<=\.) ", PROSE["en"]),
    "A well-known e-mail list (with 1,200 members) can't agree on anything.",
    "The river runs past the mill and under the old bridge.",
    '"Don\'t touch it!" she said, and he put the cup back.',
    "Is there a train to the coast on Sundays?",
    "They've sold their house for $250,000 or so, i.e. 10% less than in 2019.",
    "You'll find the key under the third stone to the left of the door.",
    "See https://example.org/a/b?c=d for the details of the 3.5-hour walk.",
    "Nobody knew who had written the letter, or why it was never sent.",
    "The U.S. team came second, and it was their best result of the year.",
    "All the boats stay in the harbour until the wind has turned to the west.",
)
EXTRA = (
    "lorem ipsum dolor sit amet.",
    "Please turn Javascript on to see this page.",
    "This page uses cookies and has a privacy policy.",
    "if (a) { return b; }",
    "Home | About | Contact",
    "x = [1, 2, 3]; y = {4: 5}",
    "# # # Heading # # #",
    "12 345 67 89 0.5 1e9 77 88 99",
    "buy now buy now buy now buy now",
    "a" * 1200 + " is a long word.",
    "And so on...",
    "It went on and on …",
    "[1] The mill is old.[citation needed] It stands by the river.[12]",
)


def documents(count: int = 300) -> list[str]:
    """The documents, by seed 0 ... `count` - 1."""
    return [_document(random.Random(seed)) for seed in range(count)]


def _document(rng: random.Random) -> str:
    size = rng.choice([1, 3, 8, 12, 20, 30])
    pool = rng.sample(SENTENCES, min(rng.choice([2, 5, 16]), len(SENTENCES)))
    lines = [rng.choice(pool) for _ in range(size)]
    for _ in range(rng.choice([0, 0, 1, 3])):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(EXTRA))
    change = rng.choice(["", "", "", "bullets", "ellipses", "bare", "words", "short", "numbers"])
    if change == "bullets":
        lines = [f"{rng.choice('-•')} {line}" if rng.random() < 0.95 else line for line in lines]
    elif change == "ellipses":
        lines = [f"{line[:-1]}..." if rng.random() < 0.4 else line for line in lines]
    elif change == "bare":
        lines = [line.rstrip('.!?"') for line in lines]
    elif change == "words":
        lines = [" ".join(rng.sample(line.split(), len(line.split()))) for line in lines]
    elif change == "short":
        lines = [line[: rng.randrange(10, 50)] for line in lines]
    elif change == "numbers":
        lines = [f"{line} {rng.randrange(10**6)} / {rng.random():.3f}" for line in lines]
    joiners = rng.choice([[" "], ["\n"], ["\n\n"], [" ", "\n"], ["\n", "\n\n", "\n\n\n"]])
    text = "".join(line + rng.choice(joiners) for line in lines)
    return text if rng.random() < 0.3 else text.strip()
