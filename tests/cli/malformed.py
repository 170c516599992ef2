"""Malformed inputs of the command line, each with what its refusal must name."""

from typing import NamedTuple


class Malformed(NamedTuple):
    """One input.

    Attributes:
        label: What is wrong.
        arguments: Of `main`.
        names: A part of the sentence that refuses it.
        files: Content of files in the current folder, by name.
    """

    label: str
    arguments: list[str]
    names: str
    files: dict[str, str | bytes] = {}


def _options(subcommand: str, *inputs: tuple[str, str]) -> list[Malformed]:
    """One option each, which is what the refusal names."""
    return [
        Malformed(
            f"{option}={value}"[:60], [subcommand, f"--{option}={value}"], f"`--{option.strip('+')}"
        )
        for option, value in inputs
    ]


def _files(*inputs: tuple[str, str | bytes, str]) -> list[Malformed]:
    """One file each."""
    return [
        Malformed(f"file: {label}", ["fit", "--config=mine.yaml"], names, {"mine.yaml": content})
        for label, content, names in inputs
    ]


MODEL = _options(
    "fit",
    *[
        ("model.eps", value)
        for value in ("nan", "8//255", "abc", "１/255", "²", "0x10", "true", "1e400", "8/255/1")
    ],
    *[("model.steps", value) for value in ("1.5", "abc", "9" * 20)],
    ("model.keep", "x"),
    ("model.tau", "-1"),
    ("model.fast", "maybe"),
    ("model.num_classes", "5"),
    ("model.network.dropout", "2"),
    ("model.network.width", "abc"),
    ("model.network", "os.system"),
    ("model.network", "nowhere.Net"),
    ("model.optimizer", "torch.nn.Linear"),
    ("model.optimizer.lr", "abc"),
    ("model.optimizer.lr", "1e400"),
    ("model.lr_scheduler.milestones", "abc"),
    ("model", ""),
    ("model", "{class_path: AT}"),
    ("model", "torch.nn.Linear"),
    ("model", "nowhere.Net"),
)

DATA = _options(
    "fit",
    ("data", "null"),
    ("data.batch_size", "abc"),
    ("data.val_from", "nowhere"),
    ("data.unlabeled_share", "nan"),
    ("data.num_workers", "-1"),
)

RUN = _options(
    "fit",
    *[("seed_everything", value) for value in ("-1", "99999999999", "abc")],
    *[("trainer.max_epochs", value) for value in ("0", "null")],
    *[("trainer.max_steps", value) for value in ("0",)],
    *[("trainer.limit_train_batches", value) for value in ("0", "0.0")],
    ("trainer.accumulate_grad_batches", "0"),
    ("trainer.check_val_every_n_epoch", "0"),
    ("trainer.gradient_clip_val", "-1"),
    ("trainer.logger", "foo"),
    ("trainer.callbacks+", "nowhere.Callback"),
    # These take a trainer to be refused.
    ("trainer.devices", "-1"),
    ("trainer.max_time", "foo"),
    ("name", ""),
    ("name", "a/b"),
    ("name", "a\x00b"),
    ("project", "a/b"),
    ("log_checkpoints", "maybe"),
    ("without", "[foo]"),
    ("epochs_share", "nan"),
    ("eps", "abc"),
    ("eps", "-0.1"),
    ("norm", "l1"),
    ("best_checkpoint.filename", "a/b"),
    ("best_checkpoint.mode", "foo"),
    ("ckpt_path", "nowhere.ckpt"),
    ("ckpt_path", ""),
)

MEASURES = _options(
    "fit",
    ("flatness.eps", "inf"),
    ("flatness.xi", "nan"),
    ("flatness.num_perturbations", "0"),
    ("final.extras", "[foo]"),
    ("final.splits", "[]"),
    ("final.splits", "[foo]"),
    ("autoattack.norm", "l1"),
    ("weight_averaging.decay", "nan"),
)

# Whole sentences, or their ends.
SENTENCES = [
    Malformed(" ".join(arguments)[:60], ["fit", *arguments], sentence)
    for arguments, sentence in [
        (["--model", "ATAPW"], "`--model` to be one of AT, ATAWP, ATEntropySGD, ATSelfSupervision"),
        (["--model.network=SmallResNt"], "`--model.network` to be one of Res"),
        (["--model.optimizer=SDG"], "`--model.optimizer` to be one of ASGD"),
        (["--trainer.callbacks+=Flatnes"], "`--trainer.callbacks+` to be one of"),
        (["--data", "Digit"], "`--data` to be one of CIFAR10, CIFAR100, Digits, ImageFolder"),
        (
            ["--weight_clipping.w_max=-1"],
            "error: Expected `--weight_clipping.w_max` to be >= 0 but got -1.0.",
        ),
        (
            ["--model.label_noise=2"],
            "error: Expected `--model.label_noise` to be in [0, 1] but got 2.0.",
        ),
        (
            ["--config=table1/at_awp.yaml", "--config=table1/trades.yaml"],
            "error: Expected an option of TRADES but got `--model.awp_steps`",
        ),
        (["--without=[autoatack]"], "`--without` to name some of evaluation"),
        (["--data.num_test=2000"], "num_test"),
        (["--data", "ImageFolder", "--data.root=nowhere"], "nowhere"),
        (["--trainer.max_epoch=1"], "`--trainer.max_epoch`"),
        (["--trainer.max_epochs=0"], "to be >= 1, or -1 for no end, but got 0."),
        (["--evaluation.step_size=-0.1"], "step_size` to be >= 0 but got -0.1"),
        (["--landscape={step_size: -1}"], "step_size` to be >= 0 but got -1"),
        (["--trainer.barebones=true"], "`--trainer.barebones` to be false"),
        (["--trainer.default_root_dir=/dev/null/x"], "/dev/null/x/AT-Digits-s0"),
        (["--last_checkpoint.filename=a\0"], "`--last_checkpoint.filename` to be a file's name"),
        (["--last_checkpoint.filename=best"], "to differ but got 'best' for both"),
        (["--best_checkpoint.monitor=foo"], "but got foo."),
        (["--best_checkpoint.monitor=val/robust_loss_correct"], "got val/robust_loss_correct."),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=a"], "but got a."),
        (["--name=" + "x" * 300], "File name too long"),
        (["--folder="], "`--folder` to be a printable name but got ''"),
        (["--folder=a\0b"], "`--folder` to be a printable name"),
        (["--project="], "`--project` to be a printable name but got ''"),
        (["--group="], "`--group` to be a printable name but got ''"),
    ]
]

MISSPELT = [
    Malformed(f"misspelt {typed}", ["fit", f"--{typed}=1"], f"did you mean `--{meant}`")
    for typed, meant in {
        "modle.eps": "model.eps",
        "model.epss": "model.eps",
        "model.network.widht": "model.network.width",
        "model.optimizer.momentm": "model.optimizer.momentum",
        "data.batchsize": "data.batch_size",
        "trainer.maxepochs": "trainer.max_epochs",
        "flatness.every_epochs": "flatness.every_n_epochs",
        "weight_averaging.dcay": "weight_averaging.decay",
        "nme": "name",
    }.items()
]

COMMANDS = [
    Malformed("an option that is none", ["fit", "--trainer.foo=1"], "`--trainer.foo`"),
    Malformed("an option of another class", ["fit", "--model.xi=1"], "`--model.xi`"),
    Malformed("a single dash", ["fit", "-x"], "`-x`"),
    Malformed("a stray word", ["fit", "hello"], "hello"),
    Malformed("the command twice", ["fit", "fit"], "fit"),
    Malformed("no value", ["fit", "--name"], "`--name`"),
    Malformed("the last of two values", ["fit", "--model.eps=0.1", "--model.eps=x"], "--model.eps"),
    Malformed("an option alone", ["fit", "--batch_size=1"], "did you mean `--data.batch_size`"),
    Malformed("a space", ["fit", "--model.eps =1"], "`--model.eps `"),
    Malformed(
        "a batch for three processes",
        ["fit", "--trainer.devices=3", "--trainer.accelerator=cpu", "--data.batch_size=32"],
        "`--data.batch_size` to be a multiple of the number of processes 3 but got 32",
    ),
    Malformed("no root", ["fit", "--data=ImageFolder"], "`--data.root`"),
    Malformed("no step size", ["fit", "--model.lr_scheduler=StepLR"], "lr_scheduler.step_size`"),
    Malformed("a misspelt preset", ["fit", "--config=table1/at_apw.yaml"], "table1/at_awp.yaml"),
    Malformed("an unknown preset", ["fit", "--config=zzz"], "`--config`"),
    Malformed("a misspelt command", ["ft"], "fit, test, study"),
    Malformed("a test of nothing", ["test"], "`--ckpt_path`"),
    Malformed("training what is only measured", ["fit", "--model=External"], "External"),
    Malformed("study: a value", ["study", "--rows=at", "--jobs=x"], "`--jobs`"),
    Malformed("study: misspelt", ["study", "--row=at"], "did you mean `--rows`"),
    Malformed("study: an unknown row", ["study", "--rows=att"], "`--rows`"),
    Malformed("study: a stray word", ["study", "at"], "got at"),
    Malformed("study: a switch", ["study", "--rows=at", "--dry_run", "maybe"], "`--dry_run`"),
    Malformed("study: slurm", ["study", "--rows=at", "--slurm=x"], "`--slurm`"),
    *[
        Malformed(f"study: seeds {seeds}", ["study", "--rows=at", f"--seeds={seeds}"], "`--seeds`")
        for seeds in ("x", "0", "-1", "99999999999", "[-1]", "[99999999999]")
    ],
    Malformed("report: nothing", ["report"], "`runs`"),
    Malformed("report: no folder", ["report", "nowhere"], "`runs`"),
    Malformed("report: two", ["report", "x", "y"], "y"),
    Malformed("dashboard: an option", ["dashboard", "--foo=1"], "`--foo`"),
    Malformed(
        "study: YAML in a sweep",
        ["study", "--sweep=mine.yaml"],
        "`--model.eps`",
        {
            "mine.yaml": "method: grid\ncommand: [fit, '${args}']\n"
            "parameters: {model.eps: {values: ['[']}}\n"
        },
    ),
]

FILES = _files(
    ("not YAML", "model: [}", "`--config`"),
    ("binary", b"\xfe\xff\x00", "`--config`"),
    ("a list", "[1]", "`--config`"),
    ("a key twice", "name: a\nname: b\n", "`name` comes twice"),
    ("a recursive alias", "name: &a {b: *a}", "aliases"),
    (
        "many aliases",
        "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)).replace("*a0", "1"),
        "aliases",
    ),
    ("20,000 unknown keys", "".join(f"foo{i}: 1\n" for i in range(20_000)), "4000 values"),
    (
        "1,500 unknown keys",
        "model:\n  init_args:\n" + "".join(f"    foo{i}: 1\n" for i in range(1500)),
        "`--model.foo",
    ),
    ("deep", "a: " + "[" * 5000 + "]" * 5000, "`--config`"),
    ("an unknown key", "foo: 1", "`--foo`"),
    ("a misspelt key", "flatness: {epss: 1}", "did you mean `--flatness.eps`"),
    ("a number as key", "1: 2", "`1`"),
    ("a file in a file", "config: x.yaml", "`config`"),
    ("the command as key", "fit: {model: AT}", "`--fit.model`"),
    ("model: 3", "model: 3", "`--model`"),
    ("a list as model", "model: [AT]", "`--model`"),
    ("null as model", "model: null", "`--model`"),
    ("null as data", "data: null", "`--data`"),
    ("a number as class", "model: {class_path: 3}", "`--model`"),
    ("init_args: 3", "data: {init_args: 3}", "`--data.init_args`"),
    ("trainer: 3", "trainer: 3", "`--trainer`"),
    ("null as trainer", "trainer: null", "`--trainer`"),
    ("null as epochs", "trainer: {max_epochs: null}", "`--trainer.max_epochs`"),
    ("null as epochs of a share", "trainer: {max_epochs: null}\nepochs_share: 0.5", "max_epochs`"),
    ("flatness: 3", "flatness: 3", "`--flatness`"),
    ("a switch as name", "name: yes", "`--name`"),
    ("a fraction as seed", "seed_everything: 1.5", "`--seed_everything`"),
    ("abc as radius", "model: {init_args: {eps: abc}}", "`--model.eps` to be a number or a frac"),
    ("true as radius", "data: {init_args: {eps: true}}", "`--data.eps`"),
    ("inf as radius", "flatness: {eps: .inf}", "`--flatness.eps`"),
    ("nan as ξ", "flatness: {xi: .nan}", "`--flatness.xi`"),
    (
        "a network's argument",
        "model: {init_args: {network: {init_args: {width: a}}}}",
        "`--model.network.width` to be an integer but got a.",
    ),
    (
        "a network's wrong argument",
        "model: {init_args: {network: {init_args: {dropout: 2}}}}",
        "`--model.network.dropout`",
    ),
    (
        "a callback's option",
        "trainer: {callbacks: [{class_path: LearningRateMonitor, init_args: {foo: 1}}]}",
        "`--trainer.callbacks.foo`",
    ),
    ("classes of other data", "model: {init_args: {num_classes: 5}}", "`--model.num_classes`"),
)

# For the suite, and more of the same kinds.
INPUTS: list[Malformed] = [
    *(*MODEL, *DATA, *RUN, *MEASURES),
    *(*SENTENCES, *MISSPELT, *COMMANDS, *FILES),
]
MORE = _options(
    "fit",
    *[
        ("model.eps", value)
        for value in ("inf", "8/0", "-0.1", "1_0", "1e999999999", "[0.1]", "{}", "", " ", "8/", "٣")
    ],
    *[("model.steps", value) for value in ("nan", "1e3", "-1", "[7]")],
    ("model.start", "x"),
    ("model.norm", "l1"),
    ("model.step_size", "nan"),
    ("model.eps_scale", "nan"),
    ("model.smoothing_spread", "x"),
    ("model.mean", "3"),
    ("model.network.activation", "tanh"),
    ("model", "os.system"),
    ("data", "torch.nn.Linear"),
    ("data.batch_size", "1.5"),
    ("data.eps", "abc"),
    ("data.seed", "abc"),
    ("data.augment", "mixup"),
    ("seed_everything", "1.5"),
    *[("trainer.max_epochs", value) for value in ("-2", "abc")],
    *[("trainer.limit_train_batches", value) for value in ("-1", "abc")],
    ("trainer.max_steps", "-5"),
    ("trainer.val_check_interval", "0"),
    ("trainer.precision", "foo"),
    ("trainer.barebones", "true"),
    ("trainer.strategy", "foo"),
    ("trainer.devices", "abc"),
    ("folder", "\x00"),
    ("group", ""),
    ("flatness.norm", "l1"),
    ("flatness.seed", "abc"),
    ("flatness.step_size", "nan"),
    ("final.steps", "abc"),
    ("final.extras", "foo"),
    ("landscape.directions", "[foo]"),
    ("weight_averaging", "3"),
)
