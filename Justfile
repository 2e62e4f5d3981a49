set positional-arguments

# Commands of the package run as `python -P -m research`: -P, so that a folder named research where the user stands is not imported.
root := justfile_directory()
bin := root / ".venv/bin"
peers := root / ".venv-peers/bin"
newest := root / ".venv-newest/bin"

# List the experiments.
[no-exit-message]
default: _core
    @exec "{{ bin }}/python" -P -m research run

# Run an experiment: `just run digits --epochs 5`, or `just run path/to/mine.py`; `just run digits --help` lists the options.
[no-cd]
[no-exit-message]
run *args: _core
    @exec "{{ bin }}/python" -P -m research run "$@"

# Continue a run that was stopped: `just resume RUN`, a run directory or an experiment's name for its latest.
[no-cd]
[no-exit-message]
resume *args: _core
    @exec "{{ bin }}/python" -P -m research resume "$@"

# Run a step of a run again, bit for bit, and show what happens inside it: `just replay RUN --step 37`.
[no-cd]
[no-exit-message]
replay *args: _core
    @exec "{{ bin }}/python" -P -m research replay "$@"

# Several processes on this machine, joined as on a pod: `just processes 2 run digits --mesh data=-1`.
[no-cd]
[no-exit-message]
processes *args: _core
    @exec "{{ bin }}/python" -P -m research processes "$@"

# Search for good values of options: `just sweep digits --trials 40 --vary learning_rate=log:1e-4:1e-1,dropout=0:0.5`.
[no-cd]
[no-exit-message]
sweep *args: _core (_install ".venv" "sweep" ".[sweep]")
    @exec "{{ bin }}/python" -P -m research sweep "$@"

# Write the models of a run as Keras files: `just export RUN`.
[no-cd]
[no-exit-message]
export *args: _core
    @exec "{{ bin }}/python" -P -m research export "$@"

# Write a page about a run: `just report RUN`; about several side by side: `just report RUN RUN ...`.
[no-cd]
[no-exit-message]
report *args: _core
    @exec "{{ bin }}/python" -P -m research report "$@"

# Compare an experiment's training with Keras' own `fit`, and look for the traps of hand-written steps: `just check digits`.
[no-cd]
[no-exit-message]
check *args: _core
    @exec "{{ bin }}/python" -P -m research check "$@"

# Keras' own tests of `fit`, `evaluate` and `predict`, run on this library's functions: `just conformance`.
[no-exit-message]
conformance *args: _peers
    @exec "{{ peers }}/python" "{{ root }}/scripts/conformance.py" "$@"

# The same training step in TensorFlow, in PyTorch and here, side by side: `just backends --epochs 5`.
[no-cd]
[no-exit-message]
backends *args: _peers
    @exec "{{ peers }}/python" "{{ root }}/scripts/backends.py" "$@"

# Our speed beside JAX by hand, Keras on three backends, PyTorch and Flax: `just bench`, or `just bench digits-mlp-32 ...`.
[no-cd]
[no-exit-message]
bench *args: _core _peers
    @exec "{{ peers }}/python" "{{ root }}/scripts/bench.py" "$@"

# A training step compiled for TPUs that are not here: `just plan digits --topology v5e:2x4 --mesh fsdp=8`; `just plan --help` lists the options.
[no-cd]
[no-exit-message]
plan *args: _core _libtpu
    @exec "{{ bin }}/python" -P -m research plan "$@"

# Install KerasHub, which `just run gemma` and `just run lora` need.
[no-exit-message]
hub: _hub

# How a step scales, from plans of it on ever more chips: `just scaling runs/8 runs/256 runs/2048`.
[no-cd]
[no-exit-message]
scaling *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/scaling.py" "$@"

# Kills runs, cuts their power and more, resumes them and compares the results: `just torture --trials 3`.
[no-cd]
[no-exit-message]
torture *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/torture.py" "$@"

# Everything that CI checks: format, lint, types, imports, tests and doctests, then what needs TensorFlow and PyTorch.
[no-exit-message]
test *args: _dev _peers _libtpu _hub _series
    @"{{ bin }}/ruff" format --check
    @"{{ bin }}/ruff" check
    @"{{ bin }}/mypy"
    @"{{ bin }}/lint-imports" --no-logo --no-cache
    @"{{ bin }}/python" -m pytest -n 3 "$@"
    @[ "$#" -gt 0 ] || "{{ peers }}/python" -m pytest -n 2 --dist loadfile -W default tests/peers
    @[ "$#" -gt 0 ] || "{{ peers }}/python" "{{ root }}/scripts/conformance.py"
    @[ "$#" -gt 0 ] || "{{ just_executable() }}" --justfile "{{ justfile() }}" test-newest --every 3

# The fast tests: about a minute together.
[no-exit-message]
test-fast *args: _dev _hub
    @exec "{{ bin }}/python" -m pytest -m "not slow" -n 2 "$@"

# The fast tests with newer JAX and Keras than the pinned ones, see constraints-newest.txt; skipped where no Python runs them.
[no-exit-message]
test-newest *args: _newest
    @[ ! -x "{{ newest }}/python" ] || exec "{{ newest }}/python" -m pytest -m "not slow" -n 2 "$@"

# Rewrite constraints-newest.txt with the newest versions that install; then run `just test-newest`.
[no-exit-message]
update-newest: _newest
    "{{ newest }}/python" -m pip install --quiet --upgrade --upgrade-strategy eager -e "{{ root }}[dev,hub]"
    "{{ newest }}/python" -m pip install --quiet --upgrade --no-deps keras-hub
    "{{ newest }}/python" -m pip freeze --exclude-editable > "{{ root }}/constraints-newest.txt"

# Rewrite the sources in the project's format.
[no-exit-message]
format *args: _dev
    @"{{ bin }}/ruff" check --fix "$@"
    @exec "{{ bin }}/ruff" format "$@"

_core: (_install ".venv" "core" ".")

_dev: _core (_install ".venv" "dev" ".[dev]")

# TensorFlow, PyTorch and other packages to compare with, 4 GB, in an environment of their own.
_peers: (_install ".venv-peers" "peers" ".[dev,peers]")

# JAX and Keras newer than the pinned ones, 1 GB, in an environment of their own; none where no Python is new enough for them.
[no-exit-message]
_newest:
    #!/bin/sh
    set -eu
    for version in 3.13 3.12; do
        for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
            if "$candidate" -c "" 2>/dev/null; then python=$candidate; break 2; fi
        done
    done
    if [ -z "${python:-}" ]; then
        echo "no Python 3.12 or 3.13 here, which $(grep '^jax==' "{{ root }}/constraints-newest.txt") needs: not tested with it" >&2
        exit 0
    fi
    just() { "{{ just_executable() }}" --justfile "{{ justfile() }}" "$@"; }
    just _install .venv-newest newest ".[dev,hub]" constraints-newest.txt "$python"
    just _without_dependencies keras-hub .venv-newest constraints-newest.txt

# Installs the pinned packages into an environment (created if missing, never deleted) if their list has changed.
[no-exit-message]
_install venv what target constraints="constraints.txt" python="python3":
    #!/bin/sh
    set -eu
    venv="{{ root }}/{{ venv }}"
    wanted=$(cat "{{ root }}/{{ constraints }}" "{{ root }}/pyproject.toml" | cksum)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed-{{ what }}" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    [ -x "$venv/bin/python" ] || "{{ python }}" -m venv "$venv"
    echo "installing the pinned packages into $venv, a minute or a few ..." >&2
    cd "{{ root }}"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "{{ constraints }}" -e "{{ target }}"
    echo "$wanted" > "$venv/.installed-{{ what }}"

# The TPU compiler, in a folder that only `plan` uses: installed beside JAX it would look for a TPU at every start.
[no-exit-message]
_libtpu: _core
    #!/bin/sh
    set -eu
    folder="{{ root }}/.venv/libtpu"
    wanted=$(grep '^libtpu==' "{{ root }}/constraints.txt")
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    echo "installing $wanted into $folder, half a minute ..." >&2
    rm -rf "$folder"
    "{{ bin }}/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$wanted"
    echo "$wanted" > "$folder/.installed"

# The time series of `just run series`: the package that has the files, without what its code depends on.
[no-exit-message]
_series: _core (_without_dependencies "aeon")

# KerasHub without tensorflow-text, which would install TensorFlow and which no network needs.
[no-exit-message]
_hub: _core (_install ".venv" "hub" ".[hub]") (_without_dependencies "keras-hub")

# Installs a pinned package without what it depends on.
[no-exit-message]
_without_dependencies package venv=".venv" constraints="constraints.txt":
    #!/bin/sh
    set -eu
    venv="{{ root }}/{{ venv }}"
    wanted=$(grep '^{{ package }}==' "{{ root }}/{{ constraints }}")
    if [ "$(cat "$venv/.installed-{{ package }}" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wanted"
    echo "$wanted" > "$venv/.installed-{{ package }}"
