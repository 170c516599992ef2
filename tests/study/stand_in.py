"""A stand-in for `fit` that leaves a run folder epoch by epoch, in a second instead of minutes."""

import json
import os
import sys
import time
import zipfile
from pathlib import Path

SECONDS = 0.15  # an epoch


def main(arguments: list[str]) -> int:
    """Trains nothing: `--fail` and `--terminated` end it after an epoch, `--refuse` before any."""
    given = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
    if "--refuse" in arguments:
        print("error: Expected `--refuse` to be [/unknown].")
        return 2
    resumed = "ckpt_path" in given
    folder = Path(given["ckpt_path"]).parent.parent if resumed else Path(given["folder"])
    folder.mkdir(parents=True, exist_ok=resumed)
    with (folder.parent / "journal").open("a") as journal:
        journal.write(f"{folder.name} {'goes on' if resumed else 'starts'}\n")
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    begin = time.monotonic()
    if not resumed:
        (folder / "config.yaml").write_text("trainer: {max_epochs: 4}\n")
        (folder / "metrics.csv").write_text("epoch\n")
        (folder / "checkpoints").mkdir()
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    for epoch in range(len(rows), 4):
        time.sleep(SECONDS)
        # A test that kills somebody wants to find the runs half-way.
        while epoch == 2 and (folder.parent / "hold").exists():
            time.sleep(SECONDS)
        with (folder / "metrics.csv").open("a") as table:
            table.write(f"{epoch}\n")
        with zipfile.ZipFile(folder / "checkpoints" / "last.ckpt", "w") as checkpoint:
            checkpoint.writestr("epoch", str(epoch))
        if "--fail" in arguments:
            raise RuntimeError("It broke.")
        if "--terminated" in arguments:
            print("To resume the run: …")
            return 143
    method, data, _ = folder.name.rsplit("-", 2)
    content = {"method": method, "data": data, "epochs": 4, "wall_time_seconds": 8.0}
    content |= {"settings": {}, "final": {}, "early_stopped": {}, "trajectory": []}
    (folder / "span").write_text(f"{begin} {time.monotonic()}")
    (folder / "results.json").write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
