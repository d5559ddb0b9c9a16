from pathlib import Path

import fsspec
import pytest

from qwen2.common.errors import UserError
from qwen2.corpus.readers.places import find_places


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


def names(*paths: object, left_out: tuple[str, ...] = ()) -> list[str]:
    places = find_places([str(path) for path in paths], lambda n: n.endswith(".txt"), left_out)
    return [place.name for place in places]


def test_folders_files_and_patterns(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "a/x.txt",
        "a/b/y.txt",
        "a/b/z.md",
        "a/.h/t.txt",
        "c/x1.txt",
        "c/x2.txt",
        "v/t.txt",
    )
    assert names(tmp_path / "a") == ["b/y.txt", "x.txt"]
    assert names(f"{tmp_path}/a/") == ["b/y.txt", "x.txt"]
    assert names(tmp_path / "a/b/z.md") == ["z.md"]  # a name that is given is taken
    assert names(tmp_path / "c/x[!1].txt") == ["x2.txt"]
    assert names(tmp_path / "c/x?.txt") == ["x1.txt", "x2.txt"]
    assert names(tmp_path / "**/z.*") == ["a/b/z.md"]
    assert names(tmp_path / "**/x*.txt") == ["a/x.txt", "c/x1.txt", "c/x2.txt"]
    assert names(tmp_path / "a/*") == ["b/y.txt", "x.txt"]
    assert names(tmp_path / "a/.h/*") == ["t.txt"]
    assert names(tmp_path, left_out=("v", "a")) == ["c/x1.txt", "c/x2.txt"]
    assert names(tmp_path / "a", tmp_path / "a/x.txt") == ["b/y.txt", "x.txt"]  # each file once


def test_relative_paths_and_the_place_of_the_tree_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("one", "two/deeper"):
        tree(tmp_path / place, "t/b.txt", "t/a/c.txt")
        monkeypatch.chdir(tmp_path / place)
        assert names("t") == names("./t/**/*.txt") == names(tmp_path / place / "t")


def test_language_and_group_come_from_the_path(tmp_path: Path) -> None:
    tree(
        tmp_path, "h/de/guide/a.txt", "h/zh_CN/guide/b/a.txt", "h/man1/guide/x.txt", "l/p.pt-BR.txt"
    )
    found = find_places([f"{tmp_path}/h/{{language}}/{{group}}"], lambda n: True)
    assert [(p.name, p.language, p.group) for p in found] == [
        ("de/guide/a.txt", "de", "guide"),
        ("zh_CN/guide/b/a.txt", "zh_CN", "guide"),
    ]
    (place,) = find_places([f"{tmp_path}/l/*.{{language}}.txt"], lambda n: True)
    assert (place.name, place.language) == ("p.pt-BR.txt", "pt-BR")


def test_links(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.txt", "store/blob")
    (tmp_path / "a/file.txt").symlink_to(tmp_path / "store/blob")
    (tmp_path / "a/circle").symlink_to(tmp_path / "a")
    (tmp_path / "a/gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "alias").symlink_to(tmp_path / "a")
    assert names(tmp_path / "a") == ["file.txt", "gone.txt", "x.txt"]  # reading says what is gone
    assert names(tmp_path / "alias") == ["file.txt", "gone.txt", "x.txt"]


def test_urls() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("b.txt", "a/de/c.txt", "a/fr/d.md"):
        fs.pipe(f"/places/{name}", b"xyz")
    found = find_places(["memory://places"], lambda n: n.endswith(".txt"))
    assert [(p.name, p.url, p.size) for p in found] == [
        ("a/de/c.txt", "memory:///places/a/de/c.txt", 3),
        ("b.txt", "memory:///places/b.txt", 3),
    ]
    assert names("memory://places/a/{language}/*.*") == ["de/c.txt", "fr/d.md"]


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.txt", "b/x.txt")
    for path, message in (
        (f"{tmp_path}/none", "none: no such file or folder"),
        (f"{tmp_path}/none/*.txt", "no such file or folder"),
        (f"{tmp_path}/*.jsonl", r"\*\.jsonl: no file of this format"),
        ("nosuch://bucket/x", "nosuch"),
        (f"{tmp_path}/{{language}}-{{language}}", "write each name once"),
    ):
        with pytest.raises(UserError, match=message):
            find_places([path], lambda n: True)
    with pytest.raises(UserError, match=r"both be called 'x\.txt'; name their common folder"):
        find_places([f"{tmp_path}/a", f"{tmp_path}/b"], lambda n: True)


def test_a_name_that_is_no_text_can_be_written_down(tmp_path: Path) -> None:
    bad = bytes(tmp_path) + b"/caf\xe9.txt"
    with open(bad, "wb") as file:  # noqa: PTH123
        file.write(b"x")
    assert names(tmp_path) == ["caf\\xe9.txt"]
