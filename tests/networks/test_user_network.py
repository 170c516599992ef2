"""Networks of the user's own, by what their constructors take."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from robust_flatness.networks import ResNet18, UserNetwork, build_network


class Recorded(nn.Module):
    """Keeps what it was built with."""

    def keep(self, **arguments):
        super().__init__()
        self.arguments = arguments


class Both(Recorded):
    def __init__(self, num_classes, in_channels, width=4):
        self.keep(classes=num_classes, channels=in_channels, width=width)


class Reversed(Recorded):
    def __init__(self, in_channels, num_classes, width=4):
        self.keep(classes=num_classes, channels=in_channels, width=width)


class Unnamed(Recorded):
    def __init__(self, k, c, width=4):
        self.keep(classes=k, channels=c, width=width)


class Defaults(Recorded):
    def __init__(self, width=4, in_chans=3, n_classes=1000):
        self.keep(classes=n_classes, channels=in_chans, width=width)


class KeywordsOnly(Recorded):
    def __init__(self, *, width=4, num_classes, in_channels):
        self.keep(classes=num_classes, channels=in_channels, width=width)


class PositionsOnly(Recorded):
    def __init__(self, k, c, /):
        self.keep(classes=k, channels=c, width=4)


class Any(Recorded):
    def __init__(self, *args, width=4):
        self.keep(classes=args[0], channels=args[1], width=width)


@pytest.mark.parametrize(
    "network", [Both, Reversed, Unnamed, Defaults, KeywordsOnly, PositionsOnly, Any]
)
def test_both_numbers_are_passed_under_any_name(network):
    expected = {"classes": 7, "channels": 2, "width": 4}
    assert build_network(network, 7, 2).arguments == expected
    if network is not PositionsOnly:
        wide = build_network(partial(network, width=9), 7, 2).arguments
        assert wide == {**expected, "width": 9}


class One(Recorded):
    def __init__(self, num_classes, width=4, depth=2):
        self.keep(classes=num_classes, width=width, depth=depth)


class Wide(Recorded):
    def __init__(self, num_classes=1000, channels=64):
        self.keep(classes=num_classes, channels=channels)


class Nothing(Recorded):
    def __init__(self, width=4, depth=2):
        self.keep(width=width, depth=depth)


def through_keywords(*, weights=None, progress=True, **kwargs):
    return One(**kwargs)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (One, {"classes": 7, "width": 4, "depth": 2}),
        (lambda k: One(k), {"classes": 7, "width": 4, "depth": 2}),
        (Wide, {"classes": 7, "channels": 64}),
        (Nothing, {"width": 4, "depth": 2}),
        (lambda: Nothing(), {"width": 4, "depth": 2}),
        (through_keywords, {"classes": 7, "width": 4, "depth": 2}),
        (partial(Both, num_classes=5), {"classes": 5, "channels": 2, "width": 4}),
    ],
)
def test_no_number_is_taken_for_something_else(network, expected):
    assert build_network(network, 7, 2).arguments == expected


def test_a_module_is_used_as_it_is():
    network = nn.Linear(2, 2)
    assert build_network(network, 7, 2) is network


def test_networks_of_torchvision_are_built_without_a_download(monkeypatch):
    import torchvision

    def refuse(*args, **kwargs):
        raise AssertionError("download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    for name in ("mobilenet_v3_small", "squeezenet1_1"):
        network = build_network(getattr(torchvision.models, name), 7, 3).eval()
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 7)


class Plain:
    """No module."""


def failing(num_classes):
    raise KeyError("weights")


class Deep(Recorded):
    def __init__(self, depth, num_classes, width=1):
        self.keep()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Plain, "a class of them, or a function that builds one, but got Plain, a class of ano"),
        (None, "but got None, a NoneType"),
        ("text", "but got 'text', a str"),
        (lambda k, c: 3, "<lambda> to build a torch.nn.Module but it returns a int"),
        (lambda k, c, d: 3, "of classes and of channels but .*<lambda> requires k, c, d as well"),
        (Deep, "of classes and of channels but Deep requires depth as well"),
        (failing, r"built by failing\(num_classes=7\) but it raises KeyError: 'weights'"),
        (partial(Both, widht=3), r"built by Both\(7, 2\) but it raises TypeError: .*'widht'"),
        (partial(ResNet18, width=0), "^Expected `width` to be"),
    ],
)
def test_what_cannot_be_built_is_named(network, message):
    with pytest.raises(ValueError, match=message):
        build_network(network, 7, 2)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of modules that may be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_path_builds_what_it_names(project):
    (project / "own_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, num_classes, width=3): super().__init__(width, num_classes)\n"
        "def make(num_classes, width): return Net(num_classes, width)\n"
        "class Outer:\n"
        "    ready = Net(2)\n"
    )
    assert UserNetwork(7, 2, path="own_nets.Net").weight.shape == (7, 3)
    wide = UserNetwork(7, 2, path="own_nets.make", arguments={"width": 5})
    assert wide.weight.shape == (7, 5)
    assert type(wide).__name__ == "Net"
    assert UserNetwork(7, 2, path="own_nets.Outer.ready").weight.shape == (2, 3)
    assert UserNetwork(path="own_nets.Net", arguments={"num_classes": 4}).weight.shape == (4, 3)
    with pytest.raises(ValueError, match="built already, but got width"):
        UserNetwork(path="own_nets.Outer.ready", arguments={"width": 3})
    with pytest.raises(ValueError, match=r"by Net\(\) but it raises TypeError: .*'num_classes'"):
        UserNetwork(path="own_nets.Net")


def test_an_attribute_comes_before_a_submodule_of_its_name(project):
    (project / "zoo").mkdir()
    (project / "zoo" / "__init__.py").write_text(
        "from torch import nn\ndef net(num_classes): return nn.Linear(3, num_classes)\n"
    )
    (project / "zoo" / "net.py").write_text("from torch import nn\nready = nn.Linear(3, 2)\n")
    assert UserNetwork(7, 2, path="zoo.net").weight.shape == (7, 3)


def test_importing_a_network_can_be_interrupted(project):
    (project / "slow.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        UserNetwork(7, 2, path="slow.Net")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing_import.Net", "missing_import raises ModuleNotFoundError: .*'not_there'"),
        ("package.part.Net", "package.part raises ModuleNotFoundError: .*'package.absent'"),
        ("own_error.Net", "own_error raises ImportError: cannot import name 'absent'"),
        ("wrong_syntax.Net", "wrong_syntax raises SyntaxError: .*line 1"),
        ("fails.Net", "fails raises RuntimeError: no GPU"),
        ("leaves.Net", "leaves raises SystemExit: 3"),
        ("empty.Net", "but got empty.Net: empty has no Net"),
        ("package.absent.Net", "but got package.absent.Net: package has no absent"),
        ("empty.Net.inner", "empty has no Net"),
        ("nowhere.Net", "there is no module named nowhere"),
        ("collections.OrderedDict", "but got collections.OrderedDict, a class of another kind"),
        ("os.path", "but got os.path, a module"),
        ("a.b-c", "a path such as package.Class but got a.b-c"),
        ("nets", "a path such as package.Class but got nets"),
    ],
)
def test_a_path_that_leads_nowhere_shows_why(path, message, project):
    files = {
        "missing_import.py": "import not_there",
        "package/__init__.py": "",
        "package/part.py": "import package.absent",
        "own_error.py": "from own_error import absent",
        "wrong_syntax.py": "def f(:",
        "fails.py": "raise RuntimeError('no GPU')",
        "leaves.py": "raise SystemExit(3)",
        "empty.py": "",
    }
    (project / "package").mkdir()
    for name, text in files.items():
        (project / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        UserNetwork(7, 2, path=path)
