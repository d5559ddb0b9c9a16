"""Fetch the text that a Debian machine can install: whole books and manuals in many languages.

apt's own client downloads (`apt-get download`) and checks each package against the signed index; of
the archive only the files that a manifest names are kept. Nothing is installed, no root is needed.
Each package becomes one durable folder DIR/PACKAGE, with sizes and sha256 of its files in
`manifest.json`; so a run that was stopped goes on, and a damaged folder is fetched again.
`DIR/packages.json` says what there is: versions, licences, sha256 of the archives.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.files import (
    durable_folder,
    durable_write,
    remove_leftovers,
    sha256_of,
    verify_folder,
)
from qwen2.common.progress import say

ABOUT = "package.json"
TOOLS = ("apt-get", "dpkg-deb")
BATCH = 16  # packages of one call: apt reads its whole index each time
# What apt says (in the C locale) of a name that its index doesn't have.
NO_SUCH = re.compile(
    r"(?:Unable to locate package|candidate version from package) (\S+?)(?: as it .*)?$",
    re.MULTILINE,
)
SIGNS = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]", "{language}": "[A-Za-z]{2,3}[-_@\\w]*"}


class PackageSet(Config):
    """Packages of one layout: where their texts are, and what these are."""

    name: str
    packages: tuple[str, ...] = Field(min_length=1)
    licence: str
    """SPDX where it has a name for it."""
    kind: str
    """Domain of the documents."""
    format: str
    """Of the reader that reads them."""
    language: str | None = None
    """Of all its texts; None where `{language}` in a path says it."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Patterns of the files that are kept: `*` within a name, `**` over folders, `{language}`."""
    left_out: tuple[str, ...] = ()
    """Patterns of the names of files that are not."""

    @model_validator(mode="after")
    def _labelled(self) -> PackageSet:
        for path in self.paths:
            if (self.language is None) != ("{language}" in path):
                raise ValueError(f"{path}: give {{language}} in the path, or language; not both")
        return self

    def wants(self, path: str) -> bool:
        """Whether a file of the archive is kept."""
        name = path.rpartition("/")[2]
        if any(_regex(pattern).fullmatch(name) for pattern in self.left_out):
            return False
        return any(_regex(pattern).fullmatch(path) for pattern in self.paths)


class Manifest(Config):
    """What is fetched."""

    sets: tuple[PackageSet, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _once(self) -> Manifest:
        names = [name for one in self.sets for name in one.packages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"named twice: {', '.join(sorted(twice))}")
        return self


@dataclass(frozen=True)
class Fetched:
    """One package in its folder."""

    package: str
    version: str
    set: str
    licence: str
    archive_sha256: str
    files: int
    bytes: int
    """Of the files as they are stored, packed ones packed."""


def fetch(manifest: Manifest, out: Path) -> tuple[list[Fetched], list[str]]:
    """Fetch what is missing in `out`: what is there then, and names that this release lacks.

    Raises:
        UserError: no apt, no network, a full disk, a package without any of the files.
    """
    _find_tools()
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    set_of = {package: one for one in manifest.sets for package in one.packages}
    there = {package: _there(out / package) for package in set_of}
    wanted = [package for package, found in there.items() if found is None]
    for start in range(0, len(wanted), BATCH):
        batch = wanted[start : start + BATCH]
        say(f"{start} of {len(wanted)} packages; now {batch[0]} ... {batch[-1]}")
        # A killed run leaves it, and `remove_leftovers` knows it by its name.
        with tempfile.TemporaryDirectory(".partial", ".archives.", out) as place:
            for package, archive in _download(batch, Path(place)).items():
                there[package] = _keep(set_of[package], package, archive, out / package)
    fetched = [found for found in there.values() if found]
    absent = [package for package, found in there.items() if not found]
    if not fetched:
        raise UserError(
            f"apt knows none of the {len(absent)} packages; run apt-get update as root first"
        )
    listing = {"packages": [asdict(one) for one in fetched], "absent": absent}
    durable_write(out / "packages.json", json.dumps(listing, indent=1).encode())
    return fetched, absent


def _find_tools() -> None:
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise UserError(
                f"no {tool} on this machine; run it on Debian (a container will do) "
                "and copy the folder"
            )


def _there(folder: Path) -> Fetched | None:
    """What an earlier run fetched; None when it is not there, or not whole."""
    if not folder.exists():
        return None
    if wrong := verify_folder(folder):
        say(f"{wrong}; it is fetched again")
        return None
    return Fetched(**json.loads((folder / ABOUT).read_text()))


def _keep(one: PackageSet, package: str, archive: Path, folder: Path) -> Fetched:
    """Make the package's folder of what is wanted of its archive."""
    with durable_folder(folder, overwrite=True) as inside:
        count, size = _unpack(archive, one, inside)
        if not count:
            raise UserError(
                f"{archive.name}: no file is like {', '.join(one.paths)}; "
                f"correct the paths of {one.name!r} in the manifest"
            )
        version = _output(["dpkg-deb", "--field", str(archive), "Version"]).strip()
        about = Fetched(package, version, one.name, one.licence, sha256_of(archive), count, size)
        (inside / ABOUT).write_text(json.dumps(asdict(about), indent=1))
    return about


def _download(packages: Sequence[str], place: Path) -> dict[str, Path]:
    """The archives of those packages that apt knows."""
    wanted = list(packages)
    while wanted:
        done = subprocess.run(
            ["apt-get", "--quiet", "download", *wanted],
            cwd=place,
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode == 0:
            break
        unknown = set(NO_SUCH.findall(done.stderr)) & set(wanted)
        if not unknown:
            raise UserError(
                f"apt-get download {wanted[0]} ...: {_last_error(done.stderr)}; "
                "look at the network and /etc/apt, then run it again: what was fetched stays"
            )
        wanted = [package for package in wanted if package not in unknown]
    # Names are PACKAGE_VERSION_ARCHITECTURE.deb, and no package's has an underscore.
    found = {path.name.partition("_")[0]: path for path in place.glob("*.deb")}
    return {package: found[package] for package in wanted}


def _unpack(archive: Path, one: PackageSet, folder: Path) -> tuple[int, int]:
    """Write the files that are wanted: their number and bytes.

    The archive is read as a stream, so what is not wanted (pictures, mostly) never meets the disk.
    Links are left out: what they point to is in the archive itself.
    """
    count = size = 0
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as members:
        for member in members:
            name = member.name.removeprefix("./")
            if member.isreg() and member.size and one.wants(name):
                members.extract(member, folder, filter="data")
                count += 1
                size += member.size
    if process.returncode:
        raise UserError(f"{archive.name}: dpkg-deb cannot unpack it; run it again")
    return count, size


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _last_error(text: str) -> str:
    """The last line that apt marks as an error, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")]
    return (marked or lines or ["it failed without a word"])[-1]


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern of paths, as the readers have it, as a regular expression."""
    parts = re.split(r"(\*\*/|\*|\?|\{language\}|\[[^]]+\])", pattern)
    return re.compile(
        "".join(
            SIGNS.get(part, part if index % 2 else re.escape(part))
            for index, part in enumerate(parts)
        )
    )
