"""What the pages show is run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def printed(code: str, directory: Path) -> str:
    file = directory / "snippet.py"
    file.write_text(code)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_snippet_runs_and_learns(tmp_path: Path) -> None:
    (code,) = snippets("README.md")
    shown = printed(code + "\nprint(logs['loss'] < 0.5 * float(np.var(y)))", tmp_path)
    assert shown.endswith("True\n")


@pytest.mark.parametrize("number", range(len(snippets("DEVIATIONS.md")) - 1))
def test_every_deviation_shows_what_its_program_prints(number: int, tmp_path: Path) -> None:
    start, *programs = snippets("DEVIATIONS.md")
    told = [comment.strip() for comment in re.findall(r"^print.*#(.*)$", programs[number], re.MULTILINE)]
    assert printed(start + programs[number], tmp_path).splitlines() == told


def test_every_file_the_readme_names_is_there() -> None:
    page = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    named = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", page, re.MULTILINE)
    files = [name if "/" in name else f"research/{name}" for row in named for name in re.findall(r"`([\w/.]+)`", row)]
    files = [name.removeprefix("research/") if name == "research/DEVIATIONS.md" else name for name in files]
    assert len(files) > 8
    assert not [name for name in files if not (ROOT / name).exists()]
    missing = [p.name for p in (ROOT / "research").glob("[!_]*.py") if f"research/{p.name}" not in files]
    assert not missing


def test_the_picture_is_there() -> None:
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).stat().st_size > 10_000
