"""Options, as they are typed and as classes take them, and one sentence on what is wrong."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from traceback import extract_tb
from typing import Any, NamedTuple, NoReturn, get_type_hints

from jsonargparse import ArgumentParser

# Types in sentences.
_WORDS = {
    **{"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"},
    **dict.fromkeys(("Sequence", "Iterable", "list"), "a list"),
    **{"dict": "a mapping", "dot": "a class path", "subclass": "a class path", "NoneType": "null"},
    "Eps": "a number or a fraction such as 8/255",
}
# Variables that Lightning reads as integers, and Weights & Biases as one of some words.
_INTEGERS = (
    *("RANK", "LOCAL_RANK", "GLOBAL_RANK", "GROUP_RANK", "NODE_RANK", "JSM_NAMESPACE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
)
_CHOICES = {
    "JSONARGPARSE_DEBUG": ("true", "false"),
    "WANDB_MODE": ("online", "offline", "disabled", "dryrun", "run", "shared"),
}


def program() -> str:
    """How this process was called, such as `cli.py` and `robust-flatness`."""
    return Path(sys.argv[0]).name or "cli.py"


def check_environment() -> None:
    """Ends with status 2 if Lightning or W&B cannot read a variable, which some are on import."""
    for name, value in os.environ.items():
        choices = ("", *_CHOICES[name]) if name in _CHOICES else ()
        expected = f"one of {', '.join(choices[1:])}" if choices else "an integer >= 0"
        is_integer = value.isascii() and value.isdigit()
        if (name in _INTEGERS and not is_integer) or (choices and value.lower() not in choices):
            sentence = f"Expected the environment's {name} to be {expected} but got {value!r}."
            sys.stderr.write(f"error: {sentence}\n")
            raise SystemExit(2)


class Option(NamedTuple):
    """One option, without dashes and `init_args`, such as `model.eps`; a switch has no value."""

    name: str
    value: str | None
    arguments: tuple[str, ...] = ()


def read_options(arguments: Sequence[str]) -> list[Option]:
    """Puts options and their values together: `--a b` and `--a=b` are one each.

    Example:
        >>> [option[:2] for option in read_options(["--a=1", "--b", "-2", "--c"])]
        [('a', '1'), ('b', '-2'), ('c', None)]
    """
    pairs: list[list[str]] = []
    for argument in arguments:
        is_name = argument.startswith("-") and not re.match(r"-[\d.]", argument)
        if not is_name and pairs and len(pairs[-1]) == 1 and re.match("-[^=]*$", pairs[-1][0]):
            pairs[-1].append(argument)
        else:
            pairs.append([argument])
    options = []
    for pair in pairs:
        name, equals, value = pair[0].partition("=")
        name = name.lstrip("-").replace(".init_args", "")
        options.append(Option(name, value if equals else (*pair, None)[1], tuple(pair)))
    return options


def leaves(part: Any, name: str = "") -> Iterator[Option]:
    """The values of a mapping as options.

    Example:
        >>> [o[:2] for o in leaves({"model": {"class_path": "AT", "init_args": {"eps": 0.1}}})]
        [('model', 'AT'), ('model.eps', '0.1')]
    """
    if isinstance(part, list) and any(isinstance(item, Mapping) for item in part):
        for item in part:
            yield from leaves(item, name)
    elif isinstance(part, Mapping):
        for key, value in part.items():
            inner = key not in ("init_args", "class_path")
            yield from leaves(value, f"{name}.{key}".lstrip(".") if inner else name)
    else:
        yield Option(name, str(part))


@cache
def options_of(class_path: str) -> dict[str, Any]:
    """The options that a class takes, with their defaults; empty if it is no class.

    Example:
        >>> options_of("lightning.pytorch.callbacks.LearningRateMonitor")["log_momentum"]
        False
    """
    parser = ArgumentParser()
    try:
        parser.add_class_arguments(resolve_name(class_path), fail_untyped=False)
    except Exception:
        # The class is at fault, which the parser says.
        return {}
    options = parser.get_defaults().items()
    return {k.replace("init_args.", "").removesuffix(".class_path"): v for k, v in options}


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence that suggests known options near a misspelt one.

    Example:
        >>> nearest("trainer.maxepochs", ["trainer.max_epochs", "trainer.devices", "name"])
        '; did you mean `--trainer.max_epochs`?'
        >>> nearest("trainer.foo", ["trainer.max_epochs"])
        '.'
    """
    name, end = name.lower().replace("-", "_"), name.lower().rsplit(".", 1)[-1]
    # A long beginning that is right does not make the ends alike.
    ends = get_close_matches(end, {known.rsplit(".", 1)[-1] for known in names}, cutoff=0.6)
    alike = [known for known in names if known.rsplit(".", 1)[-1] in ends]
    close = get_close_matches(name, alike, n=2, cutoff=0.6)
    return f"; did you mean `--{'` or `--'.join(close)}`?" if close else "."


class OneSentenceParser(ArgumentParser):
    """Says what is wrong without usage before it and without all that it tried behind it.

    Attributes:
        typed: The options as they were typed.
        written: The values of files.
        known: Lists the options that there are, from which the nearest of a misspelt one are named.
    """

    typed: Sequence[Option] = ()
    written: Sequence[Option] = ()
    known: Callable[[], Iterable[str]] | None = None

    def print_usage(self, file: Any = None) -> None:
        """Prints the usage if it was asked for, and not in front of an error."""
        if file is not sys.stderr:
            super().print_usage(file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with status 2 and one sentence."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            # A parser inside of another one, whose error is a part of the account.
            super().error(message, ex)
        known = self.known or self.get_defaults().keys
        self.refuse(one_sentence(message, self.typed, self.written, known))

    def refuse(self, sentence: str) -> NoReturn:
        """Ends with status 2."""
        self.exit(2, f"error: {sentence}\n")
        raise SystemExit(2)


def reason_of(error: Exception) -> str:
    """What an exception says, with its type and line if it was not raised for the user to read.

    Example:
        >>> reason_of(RecursionError("too deep")), reason_of(ValueError("Expected a but got b."))
        ('RecursionError: too deep.', 'Expected a but got b.')
    """
    cause: BaseException = error
    while "Does not validate" in str(cause) and cause.__cause__ is not None:
        cause = cause.__cause__
    name = type(cause).__name__
    if isinstance(cause, (ValueError, OSError)) or name == "MisconfigurationException":
        return str(error)
    frames = extract_tb(cause.__traceback__)[-1:]
    places = [f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in frames]
    return f"{name}: {cause}".rstrip(". ") + "".join(places) + "."


def run_function(function: Callable[..., Any], arguments: Sequence[str], **passed: Any) -> None:
    """Calls a function with typed arguments; errors are one sentence, as those of `fit`.

    Args:
        function: With types and a docstring, which is its `--help`.
        arguments: As typed, beginning with the command's name. What follows `--` are its `options`.
        passed: Arguments of the function that are not typed.
    """
    name, *typed = arguments
    if "--" in typed:
        index = typed.index("--")
        typed, passed = typed[:index], {**passed, "options": typed[index + 1 :]}
    description = (function.__doc__ or "").split("\n\n")[0]
    parser = OneSentenceParser(
        prog=f"{program()} {name}", allow_abbrev=False, description=description
    )
    parser.typed = read_options(typed)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*passed})
    # A switch may stand alone, as in `fit`.
    switches = [f"--{key}" for key, kind in get_type_hints(function).items() if kind is bool]
    typed = [
        f"{argument}=true" if argument in switches and after not in ("true", "false") else argument
        for argument, after in zip(typed, [*typed[1:], ""])
    ]
    parsed = parser.parse_args(typed)
    try:
        function(**passed, **parsed.as_dict())
    except (ValueError, OSError) as error:
        parser.error(str(error))


def one_sentence(
    message: str,
    typed: Sequence[Option] = (),
    written: Sequence[Option] = (),
    known: Callable[[], Iterable[str]] = list,
) -> str:
    r"""The sentence that says what is wrong, out of an account of all that a parser tried.

    Example:
        >>> one_sentence('Parser key "final.steps":\n  Expected a <class \'int\'>. Got value: abc')
        'Expected `--final.steps` to be an integer but got abc.'
        >>> known = lambda: ["model.eps", "data.eps"]
        >>> one_sentence("unrecognized arguments: --modle.eps=1", known=known)
        'Expected an option that exists but got `--modle.eps`; did you mean `--model.eps`?'
        >>> one_sentence("Expected `w_max` to be > 0 but got -1.", [Option("c.w_max", "-1")])
        'Expected `--c.w_max` to be > 0 but got -1.'
    """
    own = re.findall(r"^\s*(?:- )?((?:[\w.-]+: )?Expected (?:`|.* but got ).*)$", message, re.M)
    sentence = own[-1] if own else _of_argparse(message, typed, known)
    sentence = sentence or _of_value(message, [*written, *typed])
    if "`-" not in sentence:
        sentence = _with_option(sentence, typed, written)
    if "Expected " not in sentence:
        sentence = f"Expected arguments that work but got an error: {sentence}"
    return _short(sentence, 600)


def _of_argparse(
    message: str, typed: Sequence[Option], known: Callable[[], Iterable[str]]
) -> str | None:
    """What argparse says of arguments as such."""
    if unaccepted := re.search(r"accept option '([^']+)'", message):
        message = f"unrecognized arguments: --{unaccepted[1]}"
    if unknown := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        word = unknown[1]
        if re.match(r"-+[^\d.]", word):
            close = nearest(word.lstrip("-"), list(known()))
            return f"Expected an option that exists but got `{word}`{close}"
        for option in typed:
            if option.value == word:
                return f"Expected `--{option.name}` to take no value but got {word}."
        return f"Expected options such as `--name=value` but got {word} without an option."
    if alone := re.search(r"argument (?:--)?([^\s/:,]+).*: expected .*argument", message):
        return f"Expected `--{alone[1]}` to have a value but got none."
    if switch := re.search(r"argument --([^\s/:,]+).*: ignored explicit argument '(.*)'", message):
        return f"Expected `--{switch[1]}` to take no value but got {switch[2]}."
    return None


def _of_value(message: str, options: Sequence[Option]) -> str:
    """What jsonargparse says of the value of an option, which may be inside of classes."""
    path, said = _innermost(message)
    if match := re.search(r"(?:Option '|arguments are required: )([\w.]*\w)(.*)", said):
        before = message.partition("Given value: ")[0].partition(match[0])[0]
        classes = re.findall(r"class_path '([^']+)'", before)
        classes += re.findall(r"Namespace\(class_path='([^']+)'", match[2])[:1]
        owner = classes[-1].rsplit(".", 1)[-1] if classes else ""
        name = f"--{path}.{match[1]}".replace(".init_args", "") if path else match[1]
        if "required" in match[0]:
            owner = f", which {owner} requires," if owner else ""
            return f"Expected `{name}`{owner} to be set but got nothing."
        known = [f"{path}.{option}" for option in options_of(classes[-1])] if classes else []
        close = nearest(name.lstrip("-"), known)
        return f"Expected an option{' of ' if owner else ''}{owner} but got `{name}`{close}"
    values = [option.value for option in options if option.name.rstrip("+") == path]
    values = values or re.findall(r"(?:Got value: |Given value: |load config )(.*)", said)[:1]
    value = _short((values and values[-1]) or "nothing", 80)
    if path and (expected := _expected(said)):
        return f"Expected `--{path}` to be {expected} but got {value}."
    reason = re.sub(r"Does not validate.*?Errors:|Given value.*", "", said, flags=re.S)
    reason = re.sub(r"Problem with given class_path '[^']+':|- Expected a <class.*", "", reason)
    reason = " ".join(re.sub(r"\. Got value: .*", "", reason).split()).lstrip("- ").rstrip(".")
    return f"Expected `--{path}` to be valid but got {value}: {reason}." if path else f"{reason}."


def _innermost(message: str) -> tuple[str, str]:
    """The innermost option that an account is about, and what it says of that option."""
    message = re.sub(r"^\s*- Expected a path but .*\n", "", message, flags=re.M)
    keys: list[str] = []
    indent, said = -1, message
    for match in re.finditer(r'Parser key "([^"]+)"(?:\[\d+\])?:?', message):
        line = message[message.rfind("\n", 0, match.start()) + 1 :]
        depth = len(line) - len(line.lstrip(" -"))
        if depth <= indent:
            break
        indent, said = depth, message[match.end() :]
        keys += [match[1]] if match[1] not in keys[-1:] else []
    # What follows at a lower indent is about the options around it.
    said = re.split(rf"\n {{0,{indent}}}(?=\S)", said)[0] if keys else said
    nested = re.search(r"NestedArg\(key='([^']+)'", message)
    if nested and len(keys) == 1 and "is not accepted" not in said:
        keys.append(nested[1])
    return re.sub(r"^(fit|test)\.", "", ".".join(keys)), said


def _expected(said: str) -> str:
    """What an option must be, in words, out of what the parser tried."""
    if subclass := re.search(r"(?:subclass of|that returns) (?:Union\[|<class ')?(\w+)", said):
        return f"a class path of {subclass[1]}"
    if module := re.search(r"No module named '([^']+)'", said):
        return f"a class path of a module that exists, which {module[1]} does not,"
    if "Unexpected import path" in said:
        return "a class path"
    kinds = re.findall(
        r"(?:Expected an? |Not of type |Not a valid )"
        r"(?:typing\.Literal\[(.*?)\]|<class '(?:\w+\.)*(\w+)'>|(dot|subclass|[A-Z]\w*))",
        said.split("Given value")[0],
    )
    words = [
        f"one of {choices}".replace("'", "") if choices else _WORDS.get(kind or name, kind or name)
        for choices, kind, name in kinds
    ]
    return " or ".join(sorted(dict.fromkeys(words), key="null".__eq__))


def _with_option(sentence: str, typed: Sequence[Option], written: Sequence[Option]) -> str:
    """The sentence with the name of the one option that it is about, if there is one."""
    subject = re.match(r"Expected `([\w.]+)`", sentence)
    trainer = [option for option in written if option.name.startswith("trainer.")]
    # A file's option must have the value; Lightning does not always say what came.
    for options, is_exact in ((typed, False), (written, True), (trainer, False)):
        named = [o for o in options if o.value and _mentions(sentence, o.name.rsplit(".", 1)[-1])]
        valued = [o for o in named if _mentions(sentence, o.value or "")]
        about = [o for o in named if subject and o.name.rsplit(".", 1)[-1] == subject[1]]
        about = [o for o in about if o in valued] or ([] if is_exact else about)
        # It may be about a part, such as a network, that could not be built with an argument.
        near = about or valued
        if not near and not subject and not is_exact:
            near = named or [o for o in options if o.value and _mentions(sentence, o.value)]
            near = near or [option for option in options if option.value == ""]
        if len({option.name for option in near}) == 1:
            name, value = near[-1].name, _short(near[-1].value or "nothing", 80)
            if about and subject:
                return sentence.replace(f"`{subject[1]}`", f"`--{name}`", 1)
            return f"Expected `--{name}` to be valid but got {value}: {sentence}"
    return sentence


def _mentions(text: str, word: str) -> bool:
    """Whether a text has a word, or a number in any notation, as a whole."""
    if re.search(rf"(?<![\w.-]){re.escape(word)}(?!\w|\.\d)", text, re.I):
        return True
    with suppress(ValueError):
        number = float(word)
        return number in map(float, re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text))
    return False


def _short(text: str, longest: int) -> str:
    """Text in one line, without control characters, cut if it is too long."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
