"""One sentence out of what jsonargparse, Lightning or a class says of a bad argument."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from robust_flatness.command_line.options import Option
from robust_flatness.command_line.suggestions import nearest, options_of

_LONGEST = 600
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "Eps": "a number or a fraction such as 8/255",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "dot": "a class path",
    "Path": "a path",
    "NoneType": "null",
}
_KEY = re.compile(r'Parser key "([^"]+)"(?:\[\d+\])?:?')
_TYPE = re.compile(
    r"(?:Expected an? |Not of type |Not a valid )"
    r"(<class '[^']+'>|typing\.Literal\[[^\]]*\]|dot|subclass|[A-Z]\w*)"
)


def one_sentence(
    message: str,
    typed: Sequence[Option] = (),
    names: Callable[[], Iterable[str]] = list,
    settings: Mapping[str, Any] | None = None,
) -> str:
    r"""The sentence that says what is wrong, out of an account of all that a parser tried.

    Args:
        message: The message of a parser, or of an exception.
        typed: The options as they were typed.
        names: Lists the known options, from which the nearest of a misspelt one are suggested.
        settings: The configuration that files make.

    Returns:
        One line of the form "Expected `option` to be X but got Y."

    Example:
        >>> one_sentence('Parser key "final.steps":\n  Expected a <class \'int\'>. Got value: abc')
        'Expected `--final.steps` to be an integer but got abc.'
        >>> known = lambda: ["model.eps", "data.eps"]
        >>> one_sentence("unrecognized arguments: --modle.eps=1", names=known)
        'Expected an option that exists but got `--modle.eps`; did you mean `--model.eps`?'
        >>> one_sentence("Expected `w_max` to be > 0 but got -1.", [Option("c.w_max", "-1", ())])
        'Expected `--c.w_max` to be > 0 but got -1.'
    """
    ours = re.findall(
        r"^\s*(?:- )?((?:[\w.-]+: )?Expected (?:`|.* but got ).*)$", message, re.MULTILINE
    )
    told = ours[-1] if ours else _of_arguments(message, typed, names)
    told = told or _of_account(message, typed, settings or {})
    if "`-" not in told:
        leaves = _leaves(settings or {})
        trainer = [leaf for leaf in leaves if leaf.name.startswith("trainer.")]
        told = (
            _named(told, typed)
            or _named(told, leaves, exact=True)
            # Lightning does not always say what came.
            or _named(told, trainer)
            or told
        )
    if "Expected " not in told:
        told = f"Expected arguments that work but got an error: {told}"
    return _short(told, _LONGEST)


def _of_arguments(
    message: str, typed: Sequence[Option], names: Callable[[], Iterable[str]]
) -> str | None:
    """What argparse says of arguments as such."""
    unknown = re.search(r"unrecognized arguments: (.*)", message, re.DOTALL)
    if unknown:
        words = unknown[1].split()
        options = [word for word in words if re.match(r"-+[^\d.]", word)]
        if options:
            name = options[0].partition("=")[0]
            return f"Expected an option that exists but got `{name}`" + nearest(
                name.lstrip("-"), list(names())
            )
        switch = [option.name for option in typed if option.value == words[0]]
        if switch:
            return f"Expected `--{switch[0]}` to take no value but got {words[0]}."
        return f"Expected options such as `--name=value` but got {words[0]} without an option."
    key = re.search(r"does not accept option '([^']+)'", message)
    if key:
        return f"Expected an option that exists but got `--{key[1]}`" + nearest(
            key[1], list(names())
        )
    alone = re.search(r"argument (?:--)?([^\s/:,]+).*: expected .*argument", message)
    if alone:
        return f"Expected `--{alone[1]}` to have a value but got none."
    switched = re.search(
        r"argument (?:-h/)?--([^\s/:,]+).*: ignored explicit argument '(.*)'", message
    )
    if switched:
        return f"Expected `--{switched[1]}` to take no value but got {switched[2]}."
    ambiguous = re.search(r"ambiguous option: (\S+) could match (.*)", message)
    if ambiguous:
        return f"Expected one of {ambiguous[2]} but got `{ambiguous[1]}`."
    return None


def _of_account(message: str, typed: Sequence[Option], settings: Mapping[str, Any]) -> str:
    """What jsonargparse says of the value of an option, which may be inside of classes."""
    path, said = _innermost(message)
    unaccepted = re.search(r"Option '([^']+)' is not accepted(.*)", said)
    before = message.partition("Given value: ")[0]
    if unaccepted:
        before = message[: message.index(unaccepted[0])]
    classes = re.findall(r"class_path '([^']+)'", before)
    if unaccepted:
        classes += re.findall(r"Namespace\(class_path='([^']+)'", unaccepted[2])[:1]
        name = f"{path}.{unaccepted[1]}".lstrip(".").replace(".init_args", "")
        known = [f"{path}.{option}" for option in options_of(classes[-1])] if classes else []
        owner = f" of {classes[-1].rsplit('.', 1)[-1]}" if classes else ""
        return f"Expected an option{owner} but got `--{name}`" + nearest(name, known)
    missing = re.search(r"the following arguments are required: ([\w.]+\w)(.*)", said)
    if missing:
        classes += re.findall(r"Namespace\(class_path='([^']+)'", missing[2])[:1]
        owner = f", which {classes[-1].rsplit('.', 1)[-1]} requires," if classes else ""
        name = f"`--{path}.{missing[1]}`" if path else f"`{missing[1]}`"
        return f"Expected {name}{owner} to be set but got nothing."
    value = _value(path, typed, settings) or _value_said(message, said)
    expected = _expected(said)
    if path and expected:
        return f"Expected `--{path}` to be {expected} but got {value}."
    reason = re.sub(r"Does not validate.*?Errors:|Given value.*", "", said, flags=re.DOTALL)
    reason = re.sub(r"Problem with given class_path '[^']+':|- Expected a <class.*", "", reason)
    reason = " ".join(re.sub(r"\. Got value: .*", "", reason).split()).lstrip("- ").rstrip(".")
    if path:
        return f"Expected `--{path}` to be valid but got {value}: {reason}."
    return reason + "."


def _innermost(message: str) -> tuple[str, str]:
    """The innermost option that an account is about, and what it says of that option."""
    message = re.sub(r"^\s*- Expected a path but .*\n", "", message, flags=re.MULTILINE)
    keys: list[str] = []
    indent, said = -1, message
    for match in _KEY.finditer(message):
        begin = message.rfind("\n", 0, match.start()) + 1
        line = message[begin:]
        depth = len(line) - len(line.lstrip(" -"))
        if depth <= indent:
            break
        indent, said = depth, message[match.end() :]
        keys += [match[1]] if match[1] not in keys[-1:] else []
    first, *lines = said.splitlines() or [""]
    inside = []
    for line in lines:
        if line.strip() and keys and len(line) - len(line.lstrip()) <= indent:
            break
        inside.append(line)
    nested = re.search(r"NestedArg\(key='([^']+)'", message)
    if nested and len(keys) == 1 and "is not accepted" not in said:
        keys.append(nested[1])
    path = ".".join(keys).removeprefix("fit.").removeprefix("test.")
    return path, "\n".join([first, *inside])


def _expected(said: str) -> str:
    """What an option must be, in words, out of what the parser tried."""
    subclass = re.search(r"(?:subclass of|that returns) (?:Union\[|<class ')?(\w+)", said)
    if subclass:
        return f"{_article(subclass[1])}, by name or class path,"
    if "Unexpected import path" in said:
        return "a class path"
    module = re.search(r"No module named '([^']+)'", said)
    if module:
        return f"a class path of a module that exists, which {module[1]} does not,"
    words: list[str] = []
    for kind in _TYPE.findall(said.split("Given value")[0]):
        if kind.startswith("typing.Literal"):
            choices = re.findall(r"'([^']*)'|(\w+)(?=[,\]])", kind)
            word = f"one of {', '.join(a or b for a, b in choices)}"
        else:
            name = kind.removeprefix("<class '").removesuffix("'>").rsplit(".", 1)[-1]
            word = _WORDS.get("dot" if name == "subclass" else name, _article(name))
        if word not in words:
            words.append(word)
    if "null" in words:
        words = [*(word for word in words if word != "null"), "null"]
    return " or ".join(words)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _value(path: str, typed: Sequence[Option], settings: Mapping[str, Any]) -> str | None:
    """What an option was set to, on the command line or in a file."""
    names = [option.name.replace(".init_args", "").rstrip("+") for option in typed]
    if path in names:
        last = typed[len(names) - 1 - names[::-1].index(path)].value
        return "nothing" if not last else _short(last, 80)
    part: Any = settings
    for key in path.split("."):
        if isinstance(part, Mapping) and key not in part:
            part = part.get("init_args")
        part = part.get(key) if isinstance(part, Mapping) else None
    if isinstance(part, Mapping):
        part = part.get("class_path", part)
    return None if part is None else _short(str(part), 80)


def _value_said(message: str, said: str) -> str:
    """What an option was set to, as the account says it."""
    found = re.search(r"(?:Got value: |Given value: |load config )(.*)", said)
    found = found or re.search(r"Given value: (.*)", message)
    return (_short(found[1], 80) if found else "") or "nothing"


def _named(sentence: str, options: Sequence[Option], *, exact: bool = False) -> str | None:
    """The sentence with the name of the one option that it is about, if there is one.

    With `exact`, an option must have the value that the sentence mentions.
    """
    subject = re.match(r"Expected `([\w.]+)`", sentence)
    near = _mentioned(options, sentence if subject is None else subject[1], sentence, exact=exact)
    if not near and subject is None and not exact:
        near = [o for o in options if o.value and _mentions_value(sentence, o.value)]
        near = near or [option for option in options if option.value == ""]
    if not near and subject is not None:
        # It may be about a part, such as a network, that could not be built with an argument.
        subject, near = None, _mentioned(options, sentence, sentence, exact=True)
    if len({option.name for option in near}) != 1:
        return None
    if subject is not None:
        return sentence.replace(f"`{subject[1]}`", f"`--{near[-1].name}`", 1)
    value = _short(near[-1].value or "", 80) or "nothing"
    return f"Expected `--{near[-1].name}` to be valid but got {value}: {sentence}"


def _mentioned(options: Sequence[Option], text: str, sentence: str, *, exact: bool) -> list[Option]:
    """Options whose names a text mentions, if possible those whose values the sentence does."""
    near = [o for o in options if o.value and _mentions(text, o.name.rsplit(".", 1)[-1])]
    valued = [option for option in near if _mentions_value(sentence, option.value or "")]
    return valued if exact or valued else near


def _leaves(settings: Any, name: str = "") -> list[Option]:
    """The values of files as options."""
    if not isinstance(settings, Mapping):
        return [Option(name, str(settings), ())]
    return [
        leaf
        for key, part in settings.items()
        for leaf in _leaves(part, name if key == "init_args" else f"{name}.{key}".lstrip("."))
    ]


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", text, re.I) is not None


def _mentions_value(text: str, value: str) -> bool:
    # As a whole: 1 is not in -1.0.
    if value and re.search(rf"(?<![\w.-]){re.escape(value)}(?!\w|\.\d)", text):
        return True
    with suppress(ValueError):
        numbers = re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)
        return any(float(number) == float(value) for number in numbers)
    return False


def _short(text: str, longest: int) -> str:
    """Text in one line, without control characters, cut where it is too long."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
