"""What `fit --help` prints: the usual options on one screen, and how to see all of them."""

import re
from argparse import ArgumentParser
from textwrap import wrap
from typing import Any

USUAL = {
    "what to train": {
        "--model NAME": "AT, ATAWP, TRADES, …: see --model.help",
        "--data NAME": "Digits, CIFAR10, ImageFolder, …: --data.help",
        "--config FILE": "preset, such as table1/at_awp.yaml, or your file",
        "--model.network NAME": "architecture, also a class path of yours",
        "--seed_everything N": "seed",
    },
    "how": {
        "--eps 8/255 --norm linf": "threat model of training and of all measures",
        "--trainer.max_epochs N": "epochs; --epochs_share scales the preset's",
        "--data.batch_size N": "batch size",
        "--model.steps N": "steps of the attack in training",
        "--trainer.devices N": "processes; --trainer.accelerator cpu or gpu",
    },
    "measures": {
        "--flatness.every_n_epochs N": "the same for evaluation, early_stopping, …",
        "--final.num_examples N": "images of the final measures; --final.restarts N",
        "--without=[autoattack,wandb]": "disable measures, files or W&B",
    },
    "the run": {
        "--name NAME": "name of the run; --folder FOLDER for its place",
        "--ckpt_path FILE": "resume a run (fit) or measure a checkpoint (test)",
        "--print_config": "print all settings and exit",
    },
}
# Groups that `--help GROUP` shows, with what is in them.
TOPICS = {
    "options": "files, seed, names, optional callbacks",
    "trainer": "Lightning's trainer",
    "model": "training method",
    "data": "data",
    "evaluation": "RLoss and RErr in training (also train_evaluation)",
    "flatness": "flatness in training (also train_flatness)",
    "early_stopping": "early stopping",
    "trajectory": "figures",
    "final": "measures at the end",
    "autoattack": "AutoAttack",
    "best_checkpoint": "checkpoints (also last_checkpoint)",
}


def overview(program: str, command: str, purpose: str) -> str:
    """The usual options, and how to see the others, in at most 50 lines of 80 columns."""
    lines = [f"usage: {program} {command} [--model NAME] [--config FILE] [options]", "", purpose]
    for title, options in USUAL.items():
        lines += ["", f"{title}:", *(f"  {name:<29}{text}" for name, text in options.items())]
    lines += [
        "",
        "all options: --help all; those of a group: --help GROUP, with one of",
    ]
    lines += [f"  {name:<16}{text}" for name, text in TOPICS.items()]
    lines += [f"arguments of one class: {program} {command} --model.help ATAWP"]
    return "\n".join(lines)


def group_help(parser: ArgumentParser, title: str, prefix: str) -> str:
    """Help of one group of a parser, with the first sentence on each argument.

    Args:
        parser: The parser.
        title: Title of the group.
        prefix: How the command begins, for the last line.
    """
    group: Any = next(g for g in parser._action_groups if g.title == title)
    lines = []
    for action in group._group_actions:
        names = [name for name in action.option_strings if not name.startswith("--no_")]
        if not names or names[-1].endswith((".help", "-h")):
            continue
        default = "" if action.default in (None, "==SUPPRESS==") else f" [{action.default}]"
        text = re.split(r"(?<=[.!])\s", " ".join((action.help or "").split()))[0]
        text = re.sub(r"\s*\((type|default|required).*", "", text)
        wrapped = wrap(f"{text}{default}", 46) or [""]
        head = f"  {names[-1]}"
        lines += [head] if len(head) > 32 else []
        first = " " * 34 if len(head) > 32 else f"{head:<34}"
        lines += [f"{first}{wrapped[0]}", *(" " * 34 + rest for rest in wrapped[1:2])]
    return "\n".join([f"{title}:", *lines, "", f"with all details: {prefix} --help all"])
