"""Runs the openai client's own tests against our server: `python tests/openai_client.py`.

They come with the client's source, which pip fetches in the installed version. Those that
tests/serve/openai_exclusions.txt names must fail, or the list has become stale; all others must
pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent
EXCLUSIONS = TESTS / "serve" / "openai_exclusions.txt"
AREAS = [
    "chat/test_completions.py",
    "test_completions.py",
    "test_models.py",
    "test_embeddings.py",
    "test_responses.py",
    "responses",
]
KEY = "My API Key"
NAMES = ["gpt-6-astra", "gpt-3.5-turbo-instruct", "text-embedding-3-small"]
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"]


def exclusions() -> dict[str, str]:
    """Expressions for test ids and the reasons, from the file."""
    lines = [line.strip() for line in EXCLUSIONS.read_text().splitlines()]
    return dict(line.split("  ", 1) for line in lines if line and not line.startswith("#"))


def fetch(folder: Path) -> Path:
    """The source of the installed version, unpacked."""
    name = f"openai=={version('openai')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-binary", ":all:", "--dest", str(folder), name], check=True)
    with tarfile.open(next(folder.glob("openai-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("openai-*") if path.is_dir())


def checkpoint(folder: Path) -> Path:
    """A tiny model in the Hugging Face layout."""
    sys.path.insert(0, str(TESTS / "inference"))
    import tiny_models

    from qwen2.model.hub import save

    path = folder / "tiny"
    save(tiny_models.build(max_position_embeddings=1024), tiny_models.BYTES, path)
    return path


def serve(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Our server, and its address."""
    keys = folder / "keys"
    keys.write_text(KEY + "\n")
    command = [sys.executable, "-m", "qwen2.cli", "serve", str(checkpoint(folder)), "--port", "0"]
    command += ["--api-key-file", str(keys), "--threads", "1"]
    command += [word for name in NAMES for word in ("--served-name", name)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready = re.search(r"http://[\d.:]+", process.stdout.readline())
    assert ready, "the server did not start"
    return process, ready[0]


def test_ids(source: Path) -> list[str]:
    """The ids of all tests of the areas."""
    wanted = [f"tests/api_resources/{area}" for area in AREAS]
    command = [*PYTEST, "--collect-only", "-q", *wanted]
    found = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "::" in line]


def outcomes(source: Path, url: str, ids: list[str]) -> dict[str, bool]:
    """Whether each test passed."""
    (source / "ids.txt").write_text("\n".join(ids))
    command = [*PYTEST, "-q", "--tb=line", "-rA", "@ids.txt"]
    environment = {**os.environ, "TEST_API_BASE_URL": f"{url}/v1"}
    done = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    lines = re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if len(lines) != len(ids):
        sys.exit(f"{done.stdout}\n{done.stderr}\nonly {len(lines)} of {len(ids)} tests ran")
    return {id_: outcome == "PASSED" for outcome, id_ in lines}


def main() -> None:
    """Exit 0 when all is as the list of exclusions says."""
    reasons = exclusions()
    with tempfile.TemporaryDirectory() as name:
        source = fetch(Path(name))
        process, url = serve(Path(name))
        try:
            passed = outcomes(source, url, test_ids(source))
        finally:
            process.terminate()
            code = process.wait(60)
    problems = [f"the server ended with {code}"] if code else []
    excluded = 0
    for pattern in reasons:
        matching = [id_ for id_ in passed if re.search(pattern, id_)]
        excluded += len(matching)
        problems += [f"excluded, but it passes: {id_}" for id_ in matching if passed.pop(id_)]
        if not matching:
            problems.append(f"no test is called {pattern}")
    problems += [f"it fails: {id_}" for id_, good in passed.items() if not good]
    print(f"openai {version('openai')}: {len(passed)} tests pass, {excluded} are excluded")
    for pattern, reason in reasons.items():
        print(f"  {pattern}: {reason}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
