"""The programs on the pages run and print what the pages state; the files that the README names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

# For each program of the README, an expression that is true if it has learned something.
LEARNED = {
    "In your own code": "logs['loss'] < 0.5 * float(np.var(y))",
    "From a loss to a learner": "logs['loss'] < 0.8 * research.evaluate(vae, data, vae.init())['loss']",
}


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def section(title: str) -> str:
    return (ROOT / "README.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def output(code: str, directory: Path) -> str:
    file = directory / "program.py"
    file.write_text(code)
    process = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, cwd=directory, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("title", LEARNED)
def test_each_program_of_the_readme_runs_and_learns(title: str, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)
    assert output(f"{code}\nprint({LEARNED[title]})", tmp_path).endswith("True\n")


def test_every_program_of_the_readme_is_tested() -> None:
    assert len(programs("README.md")) == len(LEARNED)


@pytest.mark.parametrize("number", range(len(programs("DEVIATIONS.md")) - 1))
def test_each_program_of_the_deviations_prints_what_its_comments_state(number: int, tmp_path: Path) -> None:
    imports, *code = programs("DEVIATIONS.md")
    stated = [comment.strip() for comment in re.findall(r"^print.*#(.*)$", code[number], re.MULTILINE)]
    assert output(imports + code[number], tmp_path).splitlines() == stated


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_programs_of_the_other_pages_run(page: str, tmp_path: Path) -> None:
    for code in programs(f"docs/{page}"):
        output(code, tmp_path)


def test_the_readme_names_every_package_and_only_files_that_exist() -> None:
    rows = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \| (.*?) \|", section("Where things are"), re.MULTILINE)
    paths = [path for names, _ in rows for path in re.findall(r"`([\w/.]+)`", names)]
    packages = {f"research/{file.parent.name}/" for file in (ROOT / "research").glob("*/__init__.py")}
    modules = [
        f"{path}{module}.py"
        for names, files in rows
        if (path := names.strip("`")) in packages
        for module in re.findall(r"\w+", files)
    ]
    assert packages <= set(paths)
    assert not [path for path in (*paths, *modules) if not (ROOT / path).exists()]


def test_the_pictures_exist() -> None:
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).stat().st_size > 10_000
