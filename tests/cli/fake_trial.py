"""Stands in for `research run` in tests of sweeps: logs a loss that its options give, in a moment.

The loss of epoch e is (x - 0.3)^2 + 1 / (e + 1), where x is the learning rate. What else it does depends on its options: seed 1
fails, seed 2 diverges, seed 4 logs no loss of validation data, seed 5 waits after its first epoch until a file `go` is beside its
directory, or it is stopped; seed 7 does not stop. The batch size is the time of an epoch in milliseconds.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("name")
    parser.add_argument("--learning-rate", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--population", type=int)
    parser.add_argument("--vary")
    parser.add_argument("--run-dir", type=Path)
    return parser.parse_known_args()[0]


def loss(rate: float, epoch: int) -> float:
    return (rate - 0.3) ** 2 + 1 / (epoch + 1)


def log(directory: Path, epoch: int, values: dict[str, Any], split: str = "val") -> None:
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10 * (epoch + 1), "epoch": epoch, "split": split, "values": values}) + "\n")


def main(options: argparse.Namespace) -> None:
    directory = options.run_dir
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "starts").open("a") as starts:
        starts.write(".")
    if options.seed == 1:
        sys.exit("error: there is no room for it")
    if options.seed == 2:
        (directory / "failures").mkdir(exist_ok=True)
        sys.exit("error: step 3: the loss is nan")
    if options.seed in (5, 7):
        signal.signal(signal.SIGTERM, signal.SIG_IGN if options.seed == 7 else lambda *_: sys.exit(75))
        log(directory, 0, {"loss": 9.0})
        while not (directory.parent / "go").exists():
            time.sleep(0.01)
    for epoch in range(options.epochs):
        if options.population:
            rates = options.vary.split("learning_rate=")[1].split(",")[0].split("|")
            losses = [loss(float(rate), epoch) for rate in rates]
            log(directory, epoch, {"loss": sum(losses) / len(losses), "loss_of_members": losses})
        else:
            log(directory, epoch, {"loss": loss(options.learning_rate, epoch)}, "train" if options.seed == 4 else "val")
        time.sleep(options.batch_size / 1000)
    metrics = {"loss": 0.5} if options.seed == 4 else {"val_loss": 0.1, "score": options.learning_rate}
    (directory / "summary.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))


if __name__ == "__main__":
    main(parse())
