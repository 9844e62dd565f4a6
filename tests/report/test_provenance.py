from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from instseg.report import provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit of one file; the code believes to lie in it."""
    monkeypatch.delenv("INSTSEG_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "provenance.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message=m")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_the_repositorys(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert provenance.commit() == head
    (repository / "provenance.py").write_text("changed")
    assert provenance.commit() == f"{head}-dirty"


@pytest.mark.parametrize(
    ("given", "recorded"), [(f"{COMMIT}-dirty", f"{COMMIT}-dirty"), ("release\n  1.2 \t", "release 1.2")]
)
def test_the_submitters_word_goes_first(
    repository: Path, monkeypatch: pytest.MonkeyPatch, given: str, recorded: str
) -> None:
    monkeypatch.setenv("INSTSEG_COMMIT", given)
    assert provenance.commit() == recorded
    assert provenance.provenance({}, "digest")["commit"] == recorded


def test_a_blank_word_is_none(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTSEG_COMMIT", " ")
    assert provenance.commit() == git(repository, "rev-parse", "HEAD")


@pytest.mark.usefixtures("repository")
def test_without_git_the_commit_is_unknown_unless_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None
    monkeypatch.setenv("INSTSEG_COMMIT", COMMIT)
    assert provenance.commit() == COMMIT
