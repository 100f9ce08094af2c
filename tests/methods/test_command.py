"""`eqvae finetune --method`: what it reads, what it refuses in one line, and what it leaves for others."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqvae.artifacts.files import read_json
from eqvae.errors import UserError
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.methods import METHODS, Mixture, parse_method, table
from eqvae.methods.protocol import show
from eqvae.methods.registry import read_value, summary
from eqvae.runtime.run_folder import flat, from_flat
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import build_state
from eqvae.training.autoencoder_step import train_step


def resolve(method: str = "eq", **flags) -> AutoencoderTraining:
    return from_flat(AutoencoderTraining, method=method, **flags).resolved()


def mixture(method: str = "eq", **flags) -> str:
    """The mixture without the parameters of eq and explicit."""
    return re.sub(r"(eq|explicit)\([^)]*\)", r"\1", str(resolve(method, **flags).mixture()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eq", "eq + kl:1e-06"),
        ("plain", "plain + kl:1e-06"),
        ("kl:0", "plain"),
        ("eq + kl:0.5", "eq + kl:0.5"),
        (" detok ( gamma = 1.5 ) : 0.25+eq ", "detok(gamma=1.5, max_t=1):0.25 + eq:0.75 + kl:1e-06"),
        ("eq:0.2 + detok:0.3", "eq:0.2 + detok(gamma=3, max_t=1):0.3 + kl:1e-06"),
        ("explicit", "kl:1e-06 + explicit:0.1"),
        ("explicit:3e-1 + eq", "eq + kl:1e-06 + explicit:0.3"),
        ("se(k=[2, 4])", "se(k=[2, 4], weight=0.25, interpolation=bilinear) + kl:1e-06"),
    ],
)
def test_a_text_becomes_a_mixture_whose_text_is_the_same_mixture(text, expected):
    assert mixture(text) == expected
    found = str(resolve(text).mixture())
    assert str(Mixture.of(parse_method(found))) == found
    once = resolve(text)
    assert once.resolved() == once


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("deotk", "Did you mean 'detok'?"),
        ("detok(gama=1)", "detok has no parameter 'gama'. Did you mean 'gamma'?"),
        ("detok(gamma=much)", r"detok\(gamma=much\) is not what it should be. Give a number"),
        ("detok(gamma=inf)", "a finite number"),
        ("detok(gamma=-1)", r"detok\(gamma=-1\). It must lie in \[0"),
        ("detok(p=2)", r"It must lie in \[0, 1\]"),
        ("detok(gamma)", "has no value"),
        ("detok(gamma=1, gamma=2)", "gives 'gamma' twice"),
        ("se(interpolation=cubic)", "one of bicubic, bilinear"),
        ("eq +", "breaks at its end"),
        ("", "breaks at its end"),
        ("eq kl", "breaks at 'kl'"),
        ("eq(", r"breaks at '\('"),
        ("eq:", "breaks at ':'"),
        ("eq:-1", "breaks at ':-1'"),
        ("eq:2", "share of the steps"),
        ("eq:0.7 + detok:0.7", "1.4 of the steps"),
        ("eq:1 + detok", "1 of the steps"),
        ("kl + kl", "adds 'kl' twice"),
        ("eq(transforms=rotations)", "Did you mean 'rotation'?"),
        ("nowhere.py:Mine", "'nowhere.py' is no file"),
        ("uae(low=9, high=8)", "leaves nothing between"),
        ("blend(low=0.9, high=0.1)", "leaves nothing between"),
        ('viewpoint(views="a b)', r"breaks at '\(views="),
    ],
)
def test_a_mistake_is_one_line(text, line):
    with pytest.raises(UserError, match=line) as caught:
        resolve(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "flags", "line"),
    [
        ("se", {"transforms": "paper"}, "--transforms is a parameter of eq and explicit"),
        ("se", {"min_scale": 0.5}, "--min-scale is a parameter"),
        ("eq(min_scale=0.3)", {"min_scale": 0.5}, r"--min-scale 0.5 contradicts --method 'eq\(min_scale=0.3\)'"),
        ("se", {"objective": "explicit"}, "--objective explicit contradicts --method 'se'"),
        ("eq + kl:0.1", {"kl_weight": 1e-6}, "--kl-weight 1e-06 contradicts --method 'kl:0.1'"),
        ("explicit:1", {"explicit_weight": 0.1}, "--explicit-weight 0.1 contradicts"),
        ("eq + explicit", {"freeze_encoder": True}, "--method explicit shapes the encoder"),
    ],
)
def test_flags_that_contradict_the_method_are_one_line(method, flags, line, small_autoencoder):
    with pytest.raises(UserError, match=line):
        resolve(method, **flags).check_autoencoder(small_autoencoder)


def test_flags_mean_what_they_meant():
    assert flat(resolve()) | {"transforms": "paper"} == flat(resolve(transforms="paper"))
    assert str(resolve(transforms="rotation").mixture()) == str(resolve("eq(transforms=rotation)").mixture())
    assert str(resolve(min_scale=0.5).mixture()) == str(resolve("eq(min_scale=0.5)").mixture())
    assert (
        mixture(objective="explicit", explicit_weight=0.3)
        == mixture("explicit:0.3")
        == mixture("explicit", explicit_weight=0.3)
    )
    assert "stop_gradient=true" in str(resolve(objective="explicit-stop-gradient").mixture())
    assert mixture(kl_weight=0.01) == mixture("eq + kl:0.01") == "eq + kl:0.01"


@pytest.mark.parametrize(
    "text", ["detok(gamma=0.123456789)", 'viewpoint(views="two views, (near) + far")', "eq:0.3333333333333333",
             "lmr(ratios=[0.1, 0.25])", "vf(adaptive=false, teacher=vit_tiny.lvd142m):0.30000000000000004"]
)  # fmt: skip
def test_values_are_kept_to_the_last_digit(text):
    (part,) = parse_method(text)
    (again,) = parse_method(resolve(text).method)
    assert (again.method, again.number) == (part.method, part.number)
    assert str(part) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='eqkl-vfse()[]:+=,."0123456789 pn', max_size=24))
def test_no_text_is_anything_but_a_mixture_or_one_line(text):
    try:
        parts = parse_method(text)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert " + ".join(map(str, parse_method(" + ".join(map(str, parts))))) == " + ".join(map(str, parts))


def test_the_help_names_every_method(capsys):
    from eqvae.cli import run

    with pytest.raises(SystemExit):
        run(["finetune", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert [name for name in METHODS if not re.search(rf"[\s:]{name}[,;\s]", said)] == []


MINE = '''
from eqvae import Batch, Drawn, Pair, method


@method("upside-down")
class Mine(Pair):
    """`L(x upside down, D(z upside down))`."""

    p: float = 0.5

    def act(self, batch: Batch) -> Drawn:
        return Drawn(image=lambda x: x.flip(-2), latent=lambda z: z.flip(-2), name="upside down")


class NotMine:
    pass
'''


def test_a_method_of_ones_own(tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE)
    text = f"{tmp_path}/mine.py:Mine(p=1):0.5 + eq"
    assert str(resolve(text).mixture()).startswith(f"{tmp_path}/mine.py:Mine(p=1):0.5 + eq(")
    assert "upside-down" not in METHODS
    with pytest.raises(UserError, match="has no method 'NotMine'"):
        resolve(f"{tmp_path}/mine.py:NotMine")
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(UserError, match=r"can't be imported \(ModuleNotFoundError"):
        resolve(f"{tmp_path}/broken.py:Mine")


def test_the_readme_and_the_pages_list_the_same_methods():
    root = Path(__file__).resolve().parents[2]
    assert table(is_whole=False) in (root / "README.md").read_text()
    assert "<!-- methods -->" in (root / "docs" / "methods.md").read_text()
    for name, kind in METHODS.items():
        assert f"| `{name}` |" in table()
        assert summary(kind).endswith("."), name
        lines = Path(sys.modules[kind.__module__].__file__).read_text().splitlines()
        assert len(lines) <= 60, name


def test_the_mixture_stands_in_the_config_the_card_and_the_report(photographs, small_autoencoder, tmp_path):
    from eqvae.runs.finetune import FinetuneConfig, finetune
    from eqvae.runs.report import ReportConfig, report

    config = from_flat(
        FinetuneConfig, autoencoder="small", data=str(photographs), validation_data=str(photographs),
        out=tmp_path / "run", method="eq + tv:0.5", max_steps=2, image_size=64, batch_size=2, adversarial_weight=0.0,
        perceptual="none", precision="fp32", num_workers=0, log_every=1, num_validation_images=2,
        num_statistics_images=2,
    )  # fmt: skip
    finetune(config, small_autoencoder)
    said = str(config.training.resolved().mixture())
    assert said.endswith("antialias=false) + kl:1e-06 + tv(adaptive=true):0.5")
    assert read_json(tmp_path / "run" / "config.json")["mixture"] == said
    assert read_json(tmp_path / "run" / "autoencoder" / "eqvae.json")["recipe"]["mixture"] == said
    report(ReportConfig(folders=(tmp_path / "run",), out=tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert f"<code>{said}</code>" in page
    assert "Term tv" in page


def test_a_run_with_a_method_of_ones_own_goes_on_only_with_the_same_file(photographs, small_autoencoder, tmp_path):
    from eqvae.runs.finetune import FinetuneConfig, finetune

    def start(max_steps: int):
        return finetune(
            from_flat(
                FinetuneConfig, autoencoder="small", data=str(photographs), validation_data=str(photographs),
                out=tmp_path / "run", method=f"{tmp_path}/mine.py:Mine", max_steps=max_steps, image_size=64,
                batch_size=2, adversarial_weight=0.0, perceptual="none", precision="fp32", num_workers=0,
                num_validation_images=1, num_statistics_images=2,
            ),
            type(small_autoencoder)(),
        )  # fmt: skip

    (tmp_path / "mine.py").write_text(MINE)
    figures = start(2)
    assert start(2) == figures
    (tmp_path / "mine.py").write_text(MINE.replace("x.flip(-2)", "x.flip(-1)"))
    with pytest.raises(UserError, match="whose methods were another in"):
        start(2)


SEVERAL = """
from eqvae import Drawn, Pair, Term, method


@method("weightless")
class Weightless(Term):
    def value(self, encoded):
        return encoded.x.flatten(1).mean(1)


@method("idle")
class Idle(Pair):
    pass


@method("needy")
class Needy(Pair):
    need: int

    def act(self, batch):
        return Drawn()


@method("crooked")
class Crooked(Pair):
    def act(self, batch):
        return Drawn(image=lambda x: x[..., :32], name="half")
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [("Weightless", "has no weight"), ("Idle", "can't be made .*abstract"), ("Needy", "can't be made .*need"),
     ("Needy(need=1)", None)],
)  # fmt: skip
def test_classes_that_are_no_whole_methods_are_one_line(tmp_path, text, line):
    (tmp_path / "my methods.py").write_text(SEVERAL)
    name, *rest = text.split("(")
    text = f'"{tmp_path}/my methods.py:{name}"' + "".join(f"({each}" for each in rest)
    if line is None:
        assert str(resolve(text).mixture()).startswith(text)
        return
    with pytest.raises(UserError, match=line):
        resolve(text)


def test_a_pair_whose_sizes_do_not_meet_is_one_line(tmp_path, small_autoencoder):
    (tmp_path / "several.py").write_text(SEVERAL)
    config = resolve(
        f"{tmp_path}/several.py:Crooked", adversarial_weight=0.0, perceptual="none", precision="fp32", batch_size=2
    )
    state = build_state(small_autoencoder, config, torch.device("cpu"))
    x = torch.zeros(2, 3, 64, 64)
    with pytest.raises(UserError, match=r"'half' .* makes \(2, 3, 64, 32\) of the image and \(2, 3, 64, 64\)"):
        train_step(state, x, config, ReconstructionLoss("none", 1.0), config.mixture())


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (tuple[int, ...], "[1, 2]", (1, 2)), (list[int], "[1, 2]", [1, 2]), (Sequence[float], "[1, 2]", (1.0, 2.0)),
        (tuple[int, float], "[1, 2]", (1, 2.0)),
    ],
)  # fmt: skip
def test_lists_of_ones_own_method(annotation, text, value):
    found = read_value(annotation, text)
    assert found == value and list(map(type, found)) == list(map(type, value))
    assert read_value(annotation, show(found)) == value


def test_types_that_no_text_has():
    with pytest.raises(ValueError, match="2 values"):
        read_value(tuple[int, float], "[1, 2, 3]")
    with pytest.raises(UserError, match="no text is a .*Mapping.*. Use bool, int"):
        read_value(Mapping[str, int], "a")


@pytest.mark.parametrize("name", METHODS)
def test_what_is_recorded_of_a_method_reads_back_as_itself(name):
    method = METHODS[name]()
    (part,) = parse_method(str(method))
    assert part.method == method
