"""Methods together: which pair a step draws, which terms it adds, and the text that says so."""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError, nearest_name
from eqvae.images.sizes import ImageSize
from eqvae.methods.protocol import Batch, Drawn, Method, Pair, Term, show
from eqvae.methods.registry import find_method, parameter_types, read_value


@dataclass(frozen=True, kw_only=True)
class Part:
    """One method of a mixture."""

    method: Method

    number: float | None
    """A pair's share of the steps, or a term's weight; None: an equal part of the shares left, or the term's own."""

    named: frozenset[str] = frozenset()
    """Parameters that the text gives."""

    def __str__(self) -> str:
        """As the text gives it, without what it leaves to defaults."""
        values = self.method.parameters()
        given = ", ".join(f"{name}={show(values[name])}" for name in values if name in self.named)
        text = f"{show(self.method.name)}({given})" if given else show(self.method.name)
        return text if self.number is None else f"{text}:{show(self.number)}"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a mixture drew for one step."""

    pair: Drawn
    terms: tuple[Drawn, ...]

    named: Drawn
    """What the journal tells of: the pair, or where there is none the first term that drew something."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One pair is drawn for each step (and micro-batch); all terms are added to it."""

    pairs: tuple[tuple[float, Pair], ...] = ()
    """With their shares of the steps; the rest is Equation 1."""

    terms: tuple[tuple[float, Term], ...] = ()
    """With their weights."""

    @classmethod
    def of(cls, parts: tuple[Part, ...]) -> "Mixture":
        """Share out the steps, and weigh the terms."""
        pairs = [part for part in parts if isinstance(part.method, Pair)]
        given = sum(part.number or 0.0 for part in pairs)
        num_open = sum(part.number is None for part in pairs)
        if given > 1.0 + 1e-9 or (num_open and given >= 1.0):
            raise UserError(
                f"--method gives its pairs {given:g} of the steps", "Their shares, `:0.5` say, add up to at most 1"
            )
        rest = (1.0 - given) / max(num_open, 1)
        shares, terms = [], []
        for part in parts:
            if isinstance(part.method, Pair):
                shares.append((rest if part.number is None else part.number, part.method))
            elif isinstance(part.method, Term):
                terms.append((part.method.default_weight if part.number is None else part.number, part.method))
        return cls(pairs=tuple(shares), terms=tuple(terms))

    def __str__(self) -> str:
        """The mixture with all parameters, as `--method` reads it."""
        is_single = len(self.pairs) == 1 and self.pairs[0][0] == 1.0
        pairs = [f"{pair}" if is_single else f"{pair}:{show(share)}" for share, pair in self.pairs]
        return " + ".join([*pairs, *(f"{term}:{show(weight)}" for weight, term in self.terms)]) or "plain"

    def methods(self) -> Iterator[tuple[str, Method]]:
        """All methods, each with a key for what it learns."""
        for index, method in enumerate([*(pair for _, pair in self.pairs), *(term for _, term in self.terms)]):
            yield f"{index}-{re.sub(r'[^a-z0-9_-]+', '-', method.name.lower())}", method

    def files(self) -> dict[str, str]:
        """Digests of the files that hold methods of one's own: another content is another run."""
        paths = {method.name.rsplit(":", 1)[0] for _, method in self.methods() if ":" in method.name}
        return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in sorted(paths)}

    @property
    def is_adaptive(self) -> bool:
        """Whether any term's weight follows gradients."""
        return any(term.adaptive for _, term in self.terms)

    def keyed_terms(self) -> Iterator[tuple[str, float, Term]]:
        """The terms, with their keys and weights."""
        keys = [key for key, _ in self.methods()][len(self.pairs) :]
        for key, (weight, term) in zip(keys, self.terms, strict=True):
            yield key, weight, term

    def check(
        self,
        autoencoder: Autoencoder,
        *,
        named: Collection[str],
        image_size: ImageSize,
        num_images: int,
        freeze_encoder: bool,
    ) -> None:
        """Refuse what does not go together; what is not named is there by default, and does no harm."""
        for _, method in self.methods():
            if method.name in named:
                method.check(autoencoder, image_size=image_size, num_images=num_images)
        for _, term in self.terms:
            if freeze_encoder and not term.trains_decoder:
                raise UserError(
                    f"--method {term.name} shapes the encoder, which --freeze-encoder leaves as it is",
                    "Leave out one of them",
                )

    def build(self, autoencoder: Autoencoder, *, image_size_px: int) -> dict[str, nn.Module]:
        """Make what the methods learn and look through."""
        built = {key: each.build(autoencoder, image_size_px=image_size_px) for key, each in self.methods()}
        return {key: part for key, part in built.items() if part is not None}

    def draw(self, batch: Batch, parts: Mapping[str, nn.Module]) -> Chosen:
        """Draw one pair, then what terms need; without a share to decide about, no number is drawn for it."""
        keyed = dict(zip((key for key, _ in self.methods()), self.pairs, strict=False))
        place = batch.rand() if self.pairs and not (len(self.pairs) == 1 and self.pairs[0][0] == 1.0) else 0.0
        drawn = Drawn()
        for key, (share, pair) in keyed.items():
            if place < share:
                drawn = pair.draw(replace(batch, part=parts.get(key)))
                break
            place -= share
        batch = replace(batch, x=drawn.before(batch.x))
        terms = tuple(term.draw(replace(batch, part=parts.get(key))) for key, _, term in self.keyed_terms())
        told = (each for each in terms if each.branch != "plain" or each.name != "identity")
        return Chosen(pair=drawn, terms=terms, named=drawn if self.pairs else next(told, drawn))

    def smallest_side(self, latent_side: int) -> int:
        """How few cells a side of the decoded latent can have."""
        return min([latent_side, *(pair.smallest_side(latent_side) for _, pair in self.pairs)])


_NAME = re.compile(r"\s*(?:\"(?P<quoted>[^\"]+)\"|(?P<plain>[^\s()+,\"]+\.py:\w+|[\w.-]+))")
_PARAMETERS = re.compile(r"\s*\(((?:[^()\[\]\"]|\[[^\]]*\]|\"[^\"]*\")*)\)")
_ASSIGNMENTS = re.compile(r"(?:[^,\[\"]|\[[^\]]*\]|\"[^\"]*\")+")
_NUMBER = re.compile(r"\s*:\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)")
_PLUS = re.compile(r"\s*(?:(\+)|$)")


def parse_method(text: str) -> tuple[Part, ...]:
    """Read a mixture of methods.

    Args:
        text: `NAME(parameter=value, ...):NUMBER`, joined by `+`; a pair's number is its share of the steps, a term's
            its weight. A name is a registered one or `FILE.py:CLASS`; what holds blanks or commas stands in double
            quotes.

    Returns:
        The methods in the text's order.

    Raises:
        UserError: If a name or a parameter is not known, a value is no such value, or the text breaks somewhere.
    """
    parts: list[Part] = []
    place = 0
    while True:
        name = _NAME.match(text, place)
        if name is None:
            raise _broken(text, place, "a method's name")
        parameters = _PARAMETERS.match(text, name.end())
        place = (parameters or name).end()
        number = _NUMBER.match(text, place)
        place = (number or parameters or name).end()
        parts.append(
            _read_part(
                name["quoted"] or name["plain"], parameters[1] if parameters else "", number[1] if number else None
            )
        )
        plus = _PLUS.match(text, place)
        if plus is None:
            raise _broken(text, place, "' + ' and another method, '(parameter=value)' or ':number'")
        if plus[1] is None:
            break
        place = plus.end()
    names = [part.method.name for part in parts if isinstance(part.method, Term)]
    for name_twice in {each for each in names if names.count(each) > 1}:
        raise UserError(f"--method adds '{name_twice}' twice", "Give it once, with the weight that it should have")
    return tuple(parts)


def normal_form(text: str) -> str:
    """Write a mixture of methods as runs write it down: two texts with the same parameters become one."""
    return " + ".join(map(str, parse_method(text)))


def _broken(text: str, place: int, wanted: str) -> UserError:
    rest = text[place:].strip()
    where = f"at '{rest}'" if rest else "at its end"
    return UserError(f"--method '{text}' breaks {where}", f"There should be {wanted}")


def _read_part(name: str, parameters: str, number: str | None) -> Part:
    """Make one method."""
    kind = find_method(name)
    types = parameter_types(kind)
    values: dict[str, Any] = {}
    for assignment in _ASSIGNMENTS.findall(parameters):
        key, equals, value = (each.strip() for each in assignment.partition("="))
        if not equals:
            raise UserError(f"--method {name}({assignment.strip()}) has no value", "Write parameter=value")
        key = key.replace("-", "_")
        if key not in types:
            mend = nearest_name(key, types) if types else "It has no parameters"
            raise UserError(f"--method {name} has no parameter '{key}'", mend)
        if key in values:
            raise UserError(f"--method {name} gives '{key}' twice", "Give it once")
        try:
            values[key] = read_value(types[key], value.strip('"'))
        except ValueError as error:
            raise UserError(f"--method {name}({key}={value}) is not what it should be", f"Give {error}") from None
    share = None if number is None else float(number)
    if share is not None and issubclass(kind, Pair) and share > 1.0:
        raise UserError(f"--method {name}:{share:g} is a pair, and its number a share of the steps", "Give at most 1")
    try:
        method = kind(**values)
    except TypeError as error:  # of a class of one's own: a parameter without a default, or nothing to act
        raise UserError(f"--method {name} can't be made ({error})", "Mend its class, or give what it needs") from None
    return Part(method=method, number=share, named=frozenset(values))
