set positional-arguments

root := justfile_directory()
bin := root / ".venv/bin"

# The experiments, a line each.
[no-exit-message]
default: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/run.py"

# Run an experiment: `just run digits --epochs 5`; `just run digits --help` lists its options, `just run` the experiments.
[no-cd]
[no-exit-message]
run *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/run.py" "$@"

# Go on with a run that was stopped: `just resume RUN`, a run directory or an experiment's name for its latest.
[no-cd]
[no-exit-message]
resume *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/resume.py" "$@"

# Write a run's networks as plain Keras files: `just export RUN`.
[no-cd]
[no-exit-message]
export *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/export.py" "$@"

# Everything that CI checks: format, lint, types, tests and doctests.
[no-exit-message]
test *args: _dev
    @"{{ bin }}/ruff" format --check
    @"{{ bin }}/ruff" check
    @"{{ bin }}/mypy"
    @exec "{{ bin }}/python" -m pytest -n 2 "$@"

# The tests that take less than a minute together.
[no-exit-message]
test-fast *args: _dev
    @exec "{{ bin }}/python" -m pytest -m "not slow" -n 2 "$@"

# Rewrite the sources in the project's format.
[no-exit-message]
format *args: _dev
    @"{{ bin }}/ruff" check --fix "$@"
    @exec "{{ bin }}/ruff" format "$@"

_core: (_install "core" ".")

_dev: _core (_install "dev" ".[dev]")

# Brings the pinned packages into .venv (made where it is missing, never deleted) when their list has changed since.
[no-exit-message]
_install what target:
    #!/bin/sh
    set -eu
    stamp="{{ root }}/.venv/.installed-{{ what }}"
    wanted=$(cat "{{ root }}/constraints.txt" "{{ root }}/pyproject.toml" | cksum)
    if [ -x "{{ bin }}/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    [ -x "{{ bin }}/python" ] || python3 -m venv "{{ root }}/.venv"
    echo "installing the pinned packages into {{ root }}/.venv, about a minute ..." >&2
    cd "{{ root }}"
    "{{ bin }}/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "{{ target }}"
    echo "$wanted" > "$stamp"
