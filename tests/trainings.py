"""What tests of whole trainings share: how they are run, how they are stopped, what they leave."""

import json

import torch

HOW = dict(backend="eager", device="cpu", dtype="float32", log=None)
TIMES = ("train_seconds", "evaluation_seconds", "setup_seconds")


def untimed(values):
    return {name: value for name, value in values.items() if not name.startswith("train_seconds") and name not in TIMES}


def contents(folder, *left_out):
    """Everything in ``folder`` that does not depend on the clock."""
    rows = [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = untimed(json.loads((folder / "summary.json").read_text()))
    summary["runs"] = [untimed(run) for run in summary["runs"]]
    summary["settings"] = {name: value for name, value in summary["settings"].items() if name not in left_out}
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["state_dict"] = {name: tensor.tolist() for name, tensor in saved["state_dict"].items()}
    return sorted(path.name for path in folder.iterdir()), rows, summary, saved


def stop_after(*told):
    """A log that ends a training at each of ``told``, run and epoch, after its row and before its checkpoint."""
    left = list(told)

    def log(line):
        if line.startswith("run "):
            log.run = int(line.split()[1]) - 1
        if left and line.startswith("epoch") and (log.run, int(line.split()[1])) == left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    log.run = 0
    return log
