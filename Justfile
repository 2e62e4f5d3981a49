set positional-arguments

root := justfile_directory()
bin := root / ".venv/bin"
peers := root / ".venv-peers/bin"

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

# Several processes on this machine, joined as on a pod: `just processes 2 run digits --mesh data=-1`.
[no-cd]
[no-exit-message]
processes *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/processes.py" "$@"

# Write a run's networks as plain Keras files: `just export RUN`.
[no-cd]
[no-exit-message]
export *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/export.py" "$@"

# Write a page about a run: `just report RUN`; about several side by side: `just report RUN RUN ...`.
[no-cd]
[no-exit-message]
report *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/report.py" "$@"

# Keras' own tests of `fit` and its kin, with ours in their place: `just conformance`.
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

# A training step compiled for TPUs that are not here: `just plan digits --topology v5e:2x4 --mesh fsdp=8`; `just plan` tells more.
[no-cd]
[no-exit-message]
plan *args: _core _libtpu
    @exec "{{ bin }}/python" "{{ root }}/scripts/plan.py" "$@"

# Bring KerasHub, which `just run gemma` needs.
[no-exit-message]
hub: _hub

# How a step scales, from plans of it on ever more chips: `just scaling runs/8 runs/256 runs/2048`.
[no-cd]
[no-exit-message]
scaling *args: _core
    @exec "{{ bin }}/python" "{{ root }}/scripts/scaling.py" "$@"

# Everything that CI checks: format, lint, types, tests and doctests, then what needs TensorFlow and PyTorch.
[no-exit-message]
test *args: _dev _peers _libtpu _hub
    @"{{ bin }}/ruff" format --check
    @"{{ bin }}/ruff" check
    @"{{ bin }}/mypy"
    @"{{ bin }}/python" -m pytest -n 2 "$@"
    @[ "$#" -gt 0 ] || "{{ peers }}/python" -m pytest -n 2 --dist loadfile -W default tests/peers
    @[ "$#" -gt 0 ] || "{{ peers }}/python" "{{ root }}/scripts/conformance.py"

# The tests that take less than a minute together.
[no-exit-message]
test-fast *args: _dev _hub
    @exec "{{ bin }}/python" -m pytest -m "not slow" -n 2 "$@"

# Rewrite the sources in the project's format.
[no-exit-message]
format *args: _dev
    @"{{ bin }}/ruff" check --fix "$@"
    @exec "{{ bin }}/ruff" format "$@"

_core: (_install ".venv" "core" ".")

_dev: _core (_install ".venv" "dev" ".[dev]")

# TensorFlow, PyTorch and what else is compared with, 4 GB, apart from everything else.
_peers: (_install ".venv-peers" "peers" ".[dev,peers]")

# Brings the pinned packages into an environment (made where it is missing, never deleted) when their list has changed since.
[no-exit-message]
_install venv what target:
    #!/bin/sh
    set -eu
    venv="{{ root }}/{{ venv }}"
    wanted=$(cat "{{ root }}/constraints.txt" "{{ root }}/pyproject.toml" | cksum)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed-{{ what }}" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    echo "installing the pinned packages into $venv, a minute or a few ..." >&2
    cd "{{ root }}"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "{{ target }}"
    echo "$wanted" > "$venv/.installed-{{ what }}"

# The compiler for TPUs, in a folder that only `plan` looks into: beside JAX it would look for a TPU at every start.
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

# KerasHub without tensorflow-text, which brings TensorFlow and which no network needs.
[no-exit-message]
_hub: _core
    #!/bin/sh
    set -eu
    marker="{{ root }}/.venv/.installed-hub"
    wanted=$(grep '^keras-hub==' "{{ root }}/constraints.txt")
    if [ "$(cat "$marker" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    echo "installing $wanted, half a minute ..." >&2
    cd "{{ root }}"
    "{{ bin }}/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hub]"
    "{{ bin }}/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wanted"
    echo "$wanted" > "$marker"
