"""Fetching Debian's texts, with an apt-get and a dpkg-deb of ours: an archive is a tar here."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe
from qwen2.corpus.debian import Manifest, PackageSet, fetch

APT = """
import pathlib, shutil, sys
packages, store = sys.argv[3:], pathlib.Path({store!r})
with (store / "calls").open("a") as calls:
    print(*packages, file=calls)
if (store / "offline").exists():
    sys.exit("Err:1 some place\\nE: Failed to fetch it  Could not connect")
for package in packages:
    if not (store / f"{{package}}.tar").exists():
        sys.exit(f"E: Unable to locate package {{package}}")
for package in packages:
    shutil.copy(store / f"{{package}}.tar", f"{{package}}_1.0-1_all.deb")
"""
DPKG = """
import pathlib, sys
if sys.argv[1] == "--field":
    print("1.0-1")
else:
    sys.stdout.buffer.write(pathlib.Path(sys.argv[2]).read_bytes())
"""
MANUALS = PackageSet(
    name="manuals",
    packages=("manual-de", "manual-fr"),
    licence="MIT",
    kind="manual",
    format="html",
    paths=("usr/share/help/{language}/**/*.html",),
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives, and the two tools in front of the others."""
    place, tools = tmp_path / "store", tmp_path / "tools"
    place.mkdir()
    tools.mkdir()
    for name, code in (("apt-get", APT.format(store=str(place))), ("dpkg-deb", DPKG)):
        tool = tools / name
        tool.write_text(f"#!{sys.executable}{code}")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for language in ("de", "fr"):
        pack(
            place / f"manual-{language}.tar",
            {
                f"usr/share/help/{language}/a.html": b"<p>one",
                f"usr/share/help/{language}/part/b.html": b"<p>two",
                f"usr/share/help/{language}/picture.png": b"\x89PNG",
                "usr/share/help/empty/c.html": b"",
            },
        )
    return place


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("./usr/share/help/de/link.html")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.is_file()}


def calls(store: Path) -> list[str]:
    return (store / "calls").read_text().splitlines()


def test_keeps_the_files_of_the_manifest_and_says_what_they_are(
    store: Path, tmp_path: Path
) -> None:
    fetched, absent = fetch(Manifest(sets=(MANUALS,)), tmp_path / "out")
    assert not absent
    assert names(tmp_path / "out") == {
        "packages.json",
        *(
            f"manual-{code}/{name}"
            for code in ("de", "fr")
            for name in (
                "manifest.json",
                "package.json",
                f"usr/share/help/{code}/a.html",
                f"usr/share/help/{code}/part/b.html",
            )
        ),
    }
    listed = json.loads((tmp_path / "out/packages.json").read_text())["packages"]
    assert [(one["package"], one["version"], one["files"], one["bytes"]) for one in listed] == [
        ("manual-de", "1.0-1", 2, 12),
        ("manual-fr", "1.0-1", 2, 12),
    ]
    assert [one.package for one in fetched] == ["manual-de", "manual-fr"]


def test_goes_on_where_it_stopped_and_mends_what_is_damaged(store: Path, tmp_path: Path) -> None:
    out, manifest = tmp_path / "out", Manifest(sets=(MANUALS,))
    (store / "manual-fr.tar").rename(store / "later")
    _, absent = fetch(manifest, out)
    assert absent == ["manual-fr"]
    (store / "later").rename(store / "manual-fr.tar")
    fetch(manifest, out)
    assert calls(store) == ["manual-de manual-fr", "manual-de", "manual-fr"]
    (out / "manual-de/usr/share/help/de/a.html").write_text("<p>bad")
    fetch(manifest, out)
    assert calls(store)[3:] == ["manual-de"]
    assert (out / "manual-de/usr/share/help/de/a.html").read_text() == "<p>one"


def test_no_network_is_one_line_and_leaves_what_was_fetched(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = MANUALS.model_copy(update={"packages": ("manual-de",)})
    fetch(Manifest(sets=(one,)), out)
    (store / "offline").touch()
    with pytest.raises(UserError, match=r"manual-fr .*: Failed to fetch it .*; look at the net"):
        fetch(Manifest(sets=(MANUALS,)), out)
    assert (out / "manual-de/package.json").exists()
    assert {path.name for path in out.iterdir()} == {"manual-de", "packages.json"}


def test_without_apt_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no apt-get on this machine; run it on Debian"):
        fetch(Manifest(sets=(MANUALS,)), tmp_path / "out")


def test_a_release_that_knows_nothing_is_an_error(store: Path, tmp_path: Path) -> None:
    one = MANUALS.model_copy(update={"packages": ("nothing",)})
    with pytest.raises(UserError, match=r"apt knows none of the 1 packages; run apt-get update"):
        fetch(Manifest(sets=(one,)), tmp_path / "out")


def test_a_package_without_the_files_is_an_error(store: Path, tmp_path: Path) -> None:
    one = MANUALS.model_copy(update={"paths": ("usr/{language}/*.txt",)})
    with pytest.raises(UserError, match=r"no file is like usr/\{language\}/\*\.txt; correct"):
        fetch(Manifest(sets=(one,)), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_path_cannot_leave_the_folder(store: Path, tmp_path: Path) -> None:
    pack(store / "manual-de.tar", {"usr/share/help/de/../../../../../../x.html": b"out"})
    one = MANUALS.model_copy(update={"packages": ("manual-de",)})
    with pytest.raises((UserError, tarfile.FilterError)):
        fetch(Manifest(sets=(one,)), tmp_path / "out")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("a/{language}/**/*.html", "a/pt_BR/x.html", True),
        ("a/{language}/**/*.html", "a/zh-CN/b/c/x.html", True),
        ("a/{language}/**/*.html", "a/x/b.html", False),
        ("a/{language}/*.html", "a/de/b/c.html", False),
        ("*.{language}.html", "index.de.html", True),
        ("*.{language}.html", "index.html", False),
    ],
)
def test_patterns(pattern: str, path: str, wanted: bool) -> None:
    assert MANUALS.model_copy(update={"paths": (pattern,)}).wants(path) == wanted


def test_what_is_left_out_is_told_by_its_name() -> None:
    one = MANUALS.model_copy(update={"paths": ("a/*",), "left_out": ("*.dat",)})
    assert one.wants("a/zitate")
    assert not one.wants("a/zitate.dat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ["a/*.html"]}, "give {language} in the path, or language; not both"),
        ({"language": "de"}, "give {language} in the path, or language; not both"),
        ({"packages": ["manual-de", "manual-de"]}, "named twice: manual-de"),
    ],
)
def test_a_wrong_manifest_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Manifest.parse({"sets": [MANUALS.model_dump(mode="json") | change]})


def test_the_manifest_that_is_shipped_has_twenty_languages_and_more() -> None:
    manifest = Manifest.load(find_recipe("debian_packages"))
    packages = [name for one in manifest.sets for name in one.packages]
    assert len(packages) > 100
    codes = {name.removeprefix("libreoffice-help-")[:2] for name in packages if "help-" in name}
    assert len(codes) >= 20
    assert {one.format for one in manifest.sets} == {"html", "xml", "text", "man"}
