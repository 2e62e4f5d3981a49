"""Goes on with a run that was stopped: `resume.py RUN`, a run directory or an experiment's name for its latest.

just resume digits
just resume runs/clothes --mesh data=8    # on other devices than before; `--mesh one` for a single one
"""

import dataclasses

import run as runner


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = runner.Parser("just resume", __doc__)
    parser.add_argument("run", help="a run directory, or an experiment's name for its latest run")
    parser.add_argument("--mesh", help="other devices than before, as in `just run`; one: a single device")
    parser.add_argument("--layout", choices=("data", "fsdp", "tensor"), help="where weights lie on them")
    parser.add_argument("--coordinator", help="as in `just run`, where this is one of several processes")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this one is")
    parser.add_argument("--join-timeout", type=int, default=300, help="seconds to wait for the others")
    try:
        asked = parser.parse_args(arguments)
    except runner.Wrong as wrong:
        known = "one run directory, or an experiment's name for its latest run."
        return runner.refuse(f"just resume RUN: {known}" if not arguments else f"just resume RUN: {wrong}; RUN is {known}", 2)
    from research import Refused

    try:
        found = runner.recorded(asked.run)
        joining = {name: getattr(asked, name) for name in ("coordinator", "processes", "process", "join_timeout")}
        options = runner.Options(run_dir=found.directory, **joining, **found.options)
        if asked.mesh is not None:
            mesh = None if asked.mesh == "one" else asked.mesh
            options = dataclasses.replace(options, mesh=mesh, layout=asked.layout)
        elif asked.layout is not None:
            options = dataclasses.replace(options, layout=asked.layout)
        return runner.run(found.experiment, found.module, found.config, options)
    except Refused as refusal:
        return runner.failed(refusal)


if __name__ == "__main__":
    runner.as_program(main)
