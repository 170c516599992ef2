"""Generators of malformed options, configuration files, environments and commands."""

from collections.abc import Iterator, Sequence

from malformed_files import Case, checkpoints, data_folders, writing

NEGATIVE_OR_NO_NUMBERS = [
    *("nan", "inf", "-1", "abc", "8//255", "8/0", "[]", "{}", "[0.1]", "1,5", "1e400", "1/nan"),
    *("0.1.2", "--0.1"),
]
NO_COUNTS = ["nan", "-1", "abc", "1.5", "[]", "{}", "1,000", "1e400", "0x", "two", "-3/2"]
NO_CLASSES = [
    "Foo",
    "os.system",
    "3",
    "[]",
    "AT.AT",
    "builtins.int",
    "robust_flatness.none.AT",
    ".",
]
FLOATS = ("model.eps", "flatness.xi", "evaluation.step_size", "model.optimizer.lr", "data.eps")
COUNTS = (
    *("model.steps", "trainer.max_epochs", "data.batch_size", "flatness.num_examples"),
    *("final.restarts", "early_stopping.every_n_epochs", "autoattack.num_examples"),
)
CHOICES = ("model.norm", "model.keep", "model.start", "flatness.protocol", "evaluation.split")
CLASSES = ("model", "data", "model.network", "model.optimizer", "model.lr_scheduler")
SWITCHES = ("model.fast", "trajectory.figures", "data.in_memory")


def all_cases() -> list[Case]:
    """All cases, each label once."""
    parts = (options, yaml_files, checkpoints, data_folders, environments, commands)
    cases = [case for part in parts for case in part()]
    assert len({case.label for case in cases}) == len(cases)
    return cases


def options() -> Iterator[Case]:
    """Values of the wrong kind, out of range, or misspelt names, for each kind of option."""
    chosen: list[tuple[Sequence[str], Sequence[str]]] = [
        (FLOATS, NEGATIVE_OR_NO_NUMBERS),
        (COUNTS, NO_COUNTS),
        (CHOICES, ["foo", "3", "[]", "LINF", "", "nan"]),
        (CLASSES, NO_CLASSES),
        (SWITCHES, ["maybe", "2", "[]", "nan"]),
    ]
    for names, values in chosen:
        for name in names:
            for value in values:
                typed = f"--{name}={value}"
                short = name.rsplit(".", 1)[-1]
                # Typing a class of its own replaces the network whose width the short run sets.
                alone = name in CLASSES
                yield Case("option", typed, ["fit", typed], [name, short], alone=alone)
    for typed in ("--model.epss=1", "--trainer.max_epoch=1", "--modell=AT", "--flatnes.xi=1", "--"):
        yield Case("option", f"misspelt {typed}", ["fit", typed], [typed.strip("-").split("=")[0]])
    for typed in (
        "--seed_everything=-1",
        "--seed_everything=x",
        "--name=a/b",
        "--name=",
        "--folder=",
    ):
        yield Case("option", typed, ["fit", typed], [typed.strip("-").split("=")[0]])


def yaml_files() -> Iterator[Case]:
    """Files that are no configuration."""
    texts: dict[str, str | bytes] = {
        "unclosed": "model: {class_path: AT",
        "tabs": "model:\n\tclass_path: AT\n",
        "scalar": "3",
        "list": "- model\n- data\n",
        "binary": bytes(range(256)),
        "utf-16": "model: AT".encode("utf-16"),
        "recursive": "a: &a {b: *a}\nmodel: *a\n",
        "doubling": "a0: &a0 [x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
        "python object": "model: !!python/object/apply:os.system ['echo ran']\n",
        "many unknown keys": "".join(f"key{i}: {i}\n" for i in range(20_000)),
        "two documents": "model: AT\n---\nmodel: TRADES\n",
    }
    sections = {"model": "3", "data": "[1]", "trainer": "x", "flatness": "7", "on_data": "3"}
    sections |= {"model.class_path": "3", "model.init_args": "3", "model.init_args.eps": "{a: 1}"}
    sections |= {"model.init_args.network": "[]", "trainer.callbacks": "3", "epochs_share": "x"}
    sections |= {"seed_everything": "[]", "trainer.max_epochs": "one", "unknown": "1"}
    sections |= {"data.init_args.batch_size": "many", "data.class_path": "{}", "without": "{}"}
    for name, value in sections.items():
        *outer, last = name.split(".")
        text = f"{last}: {value}"
        for key in reversed(outer):
            text = f"{key}: {{{text}}}"
        texts[text] = text
    for label, text in texts.items():
        prepare = writing("mine.yaml", text, "--config=mine.yaml")
        words = [
            label.split(":")[0].strip(),
            "mine.yaml",
            "config",
            *label.replace(":", " ").split(),
        ]
        # Options that make a run short would win over the file's.
        yield Case("yaml", f"a file, {label[:60]}", ["fit"], words, prepare, alone=True)
    for label, path in {
        "a folder": "/",
        "no file": "none.yaml",
        "empty": "",
        "/dev/null/x": "/dev/null/x",
    }.items():
        yield Case("yaml", f"--config is {label}", ["fit", f"--config={path}"], ["config"])


def environments() -> Iterator[Case]:
    """Environments that are unusual; a run may work or be refused, but must not crash."""
    for name, values in {
        "WANDB_DATA_DIR": ["/proc/none"],
        "WANDB_DIR": ["/proc/none"],
        "WANDB_MODE": ["foo"],
        "PL_GLOBAL_SEED": ["abc", "-1"],
        "COLUMNS": ["1", "x"],
        "HOME": ["/none"],
        "TMPDIR": ["/none"],
        "LC_ALL": ["C"],
        "MPLCONFIGDIR": ["/proc/none"],
    }.items():
        for value in values:
            names = [name, value.strip("/"), "folder", "directory", "W&B"]
            yield Case("environment", f"{name}={value}", ["fit"], names, None, {name: value}, True)


def commands() -> Iterator[Case]:
    """Commands that are unknown, or lack what they need."""
    lines = {
        "": "fit, test, study",
        "fitt": "fitt",
        "report": "runs",
        "report none": "none",
        "report /dev/null": "/dev/null",
        "study": "rows",
        "study --rows=foo": "rows",
        "study --rows=at --seeds=x": "seeds",
        "study --rows=at --seeds=[]": "seeds",
        "study --rows=at --jobs=0": "jobs",
        "study --rows=at --root=/dev/null": "root",
        "study --rows=at --only=x": "only",
        "study --configs=none.yaml": "none.yaml",
        "study --sweep=none": "none",
        "study --rows=at -- --model.epss=1": "epss",
        "study --rows=at -- --seed_everything=1": "seed_everything",
        "test": "ckpt_path",
        "test --model=External": "network",
        "fit --model=External": "test",
    }
    for line, name in lines.items():
        yield Case("command", f"command `{line}`", line.split(), [name], alone=True)
