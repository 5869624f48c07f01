"""Declarations drawn from the schema itself: every field, every family and its members, whole graphs of latents.

A new kind or field is drawn without a word here: its type and bounds say what it may hold. `sound` draws are steered to
what builds, by what the kinds say of themselves; `wild` ones are sound ones, damaged.
"""

import copy
import math
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from pvae.component import Component, Shape
from pvae.data.rows.columns import Column
from pvae.data.rows.prepare import Binarize
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment, Refit
from pvae.experiment.plan import Latent, Train, Watch
from pvae.graph.site import Link, Site, Space
from pvae.guides.graph import Encoder
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.codes import RelaxedPosterior
from pvae.models.likelihoods.base import Likelihood
from pvae.models.priors.base import Prior
from pvae.nn.network import Network
from pvae.objectives.base import Objective

Raw = dict[str, Any]
NUMBERS = (0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0, 1.5, 2.0, -1.0, 10.0, 100.0)
SHAPES: tuple[Shape, ...] = ((1,), (2,), (5,), (3, 2), (1, 4, 4), (2, 5, 3))
SPREAD = 4
"""How far above its least value a drawn size goes."""
WIDE = 20
"""A layer as wide as any drawn latent or datum."""
DEPTH = 2
"""Tables within tables, beyond which only plain members are drawn."""


@dataclass(frozen=True)
class Drawn:
    """A declaration as nested tables, with data for it.

    Arguments:
        raw: what a TOML file would hold.
        shape: event shape of a datum.
        rows: number of data.
        seed: of the data.
        fitting: whether the data are what the likelihood can score.
    """

    raw: Raw
    shape: Shape
    rows: int
    seed: int
    fitting: bool


def families() -> list[type[Component]]:
    """Every family of kinds that a declaration is made of."""
    return [family for family in Component.__subclasses__() if family.__module__.startswith("pvae.")]


# ---------------------------------------------------------------------- values by type and bounds


def bounds_of(metadata: Iterable[Any]) -> dict[str, Any]:
    """Bounds by name: ge, gt, le, lt, min_length, max_length."""
    found: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            found |= bounds_of(item.metadata)
        elif isinstance(item, annotated_types.GroupedMetadata):
            found |= bounds_of(iter(item))
        else:
            found |= {
                k: getattr(item, k) for k in ("ge", "gt", "le", "lt", "min_length", "max_length") if hasattr(item, k)
            }
    return found


def values(annotation: Any, bounds: dict[str, Any], depth: int = 0) -> SearchStrategy[Any]:
    """Small values of a type that lie within its bounds."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(args[0], {**bounds, **bounds_of(args[1:])}, depth)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of([values(arg, bounds, depth) for arg in args if arg is not type(None)])
    if origin is tuple:
        return _tuples(args, bounds, depth)
    if origin is dict:
        return st.dictionaries(st.sampled_from("ab"), values(args[1], {}, depth), min_size=1, max_size=1)
    if issubclass(annotation, Component):
        return members(annotation, depth)
    if issubclass(annotation, BaseModel):
        return tables(annotation, depth)
    plain = {bool: st.booleans, int: lambda: _integers(bounds), float: lambda: _floats(bounds), str: _names}
    return plain[annotation]()


def _tuples(args: tuple[Any, ...], bounds: dict[str, Any], depth: int) -> SearchStrategy[Any]:
    if args[-1] is Ellipsis:
        least = bounds.get("min_length", 0)
        most = min(bounds.get("max_length", 2), least + 2)
        item = values(args[0], {}, depth)
        wide = _unwrapped(args[0]) is int and bounds.get("max_length", WIDE) >= WIDE  # layers, no sides of a grid
        return st.lists(st.one_of(item, st.just(WIDE)) if wide else item, min_size=least, max_size=most)
    return st.tuples(*(values(arg, {"ge": -10.0}, depth) for arg in args)).map(lambda found: sorted(found))


def _unwrapped(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _integers(bounds: dict[str, Any]) -> SearchStrategy[int]:
    least = bounds.get("ge", bounds.get("gt", -1) + 1)
    return st.integers(least, min(least + SPREAD, bounds.get("le", math.inf), bounds.get("lt", math.inf) - 1))


def _floats(bounds: dict[str, Any]) -> SearchStrategy[float]:
    low, high = bounds.get("ge", 0.0), bounds.get("le", math.inf)
    above, below = bounds.get("gt", -math.inf), bounds.get("lt", math.inf)
    return st.sampled_from([x for x in NUMBERS if low <= x <= high and above < x < below])


def _names() -> SearchStrategy[str]:
    return st.sampled_from(["x", "y", "a", "moons"])


# ---------------------------------------------------------------------- tables and members


def is_size(field: FieldInfo) -> bool:
    """Whether a field's default is a size or holds some, too large for a test: it is then always drawn."""
    default = field.default
    sizes = default if isinstance(default, tuple) else (default,)
    return isinstance(default, Component) or any(isinstance(n, int) and n > SPREAD for n in sizes)


@st.composite
def tables(draw: DrawFn, kind: type[BaseModel], depth: int = 0, without: tuple[str, ...] = ()) -> Raw:
    """A table of a class: what must be there, sizes, and some of the rest."""
    tag = kind.tag if issubclass(kind, Component) else None
    found: Raw = {} if tag is None else {tag: kind.model_fields[tag].default}
    for name, field in kind.model_fields.items():
        if (
            name != tag
            and name not in without
            and (field.is_required() or is_size(field) or draw(st.integers(0, 3)) == 3)
        ):
            found[name] = draw(values(field.annotation, bounds_of(field.metadata), depth))
    return found


def nests(kind: type[BaseModel]) -> bool:
    """Whether a class has a field that is a family of kinds."""
    return any(_is_family(field.annotation) for field in kind.model_fields.values())


def _is_family(annotation: Any) -> bool:
    if get_args(annotation):
        return any(_is_family(arg) for arg in get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, Component)


def members(
    family: type[Component], depth: int = 0, among: Callable[[Any], bool] = bool, without: tuple[str, ...] = ()
) -> SearchStrategy[Raw]:
    """A table of any member of a family, of those that `among` takes, which the member itself accepts."""
    kinds = [kind for kind in family.members.values() if among(kind) and not (depth >= DEPTH and nests(kind))]
    drawn = st.sampled_from(kinds).flatmap(lambda kind: tables(kind, depth + 1, without))
    return drawn.filter(lambda table: accepts(family, table))


def accepts(family: type[Component], table: Raw) -> bool:
    """Whether a table is one of a member of a family."""
    try:
        family.parse(table)
    except (ValidationError, PydanticCustomError):
        return False
    return True


def networks(inputs: dict[str, Shape], output: Shape | None) -> SearchStrategy[Raw]:
    """Networks that can be built from such inputs to such an output."""
    return members(Network).filter(lambda table: builds(lambda: Network.parse(table).build(inputs, output)))


def builds(make: Callable[[], Any]) -> bool:
    """Whether a part is made without a word of refusal; what else may go wrong is not for the draw to judge."""
    try:
        make()
    except DeclarationError:
        return False
    except Exception:
        return True
    return True


# ---------------------------------------------------------------------- whole declarations

VECTOR: Shape = (3,)
RECIPES = ("scored", "scored", "scored", "scored", "flow", "drawn", "mixture", "table")
"""Systems whose parts must fit each other: a likelihood, a bijection, nothing but draws, an exact mixture, columns."""


@st.composite
def sound(draw: DrawFn) -> Drawn:
    """A declaration that is steered to build, with data that fit it."""
    recipe = draw(st.sampled_from(RECIPES))
    columns = draw(st.lists(members(Column, without=("text",)), min_size=1, max_size=3)) if recipe == "table" else []
    shape = (len(columns),) if columns else draw(st.sampled_from(SHAPES))
    latents = draw(LATENTS[recipe](shape))
    raw: Raw = {"latents": latents, "data": {"source": "tensor"}, "seed": draw(st.integers(0, 2**32 - 1))}
    raw["objective"] = draw(_objectives(recipe))
    raw["train"] = draw(_trains(raw["objective"]))
    conditioned = recipe == "scored" and draw(st.integers(0, 3)) == 3
    raw["decoder"] = draw(_decoders(recipe, shape, latents, conditioned))
    raw["encoder"] = draw(_encoders(shape))
    support = Likelihood.parse(raw["decoder"]["likelihood"]).support
    if columns:
        raw["data"] = {"source": "frame", "columns": {f"column_{i}": column for i, column in enumerate(columns)}}
    elif bool(support.check(torch.tensor([0.0, 1.0])).all()) and draw(st.integers(0, 3)) == 3:
        raw["data"]["binarize"] = draw(st.sampled_from(get_args(Binarize)))
    heedless = any(Prior.members[z["prior"]["kind"]].ignores_parents for z in latents.values())
    if len(latents) > 1 and (heedless or draw(st.booleans())):
        raw["decoder"]["given"] = list(latents)
    if conditioned:
        _condition(raw, draw(tables_of_covariates()))
    if draw(st.integers(0, 5)) == 5:
        raw["analysis"] = draw(tables(Watch))
    if recipe == "scored" and draw(st.integers(0, 5)) == 5:
        raw["refit"] = draw(_refits(latents))
    return Drawn(raw, shape, draw(st.integers(20, 40)), draw(st.integers(0, 99)), draw(st.integers(0, 19)) < 19)


def tables_of_covariates() -> SearchStrategy[Raw]:
    """A label, as a number or in words."""
    words = st.sampled_from([["boot", "ankle boot"], ["a 1", "b 2", "a b"]])
    return st.one_of(st.integers(2, 4).map(lambda k: {"codes": k}), words.map(lambda w: {"words": w}))


def _condition(raw: Raw, covariate: Raw) -> None:
    """Let the decoder read a covariate beside the latents it reads anyway."""
    raw["covariates"] = {"y": covariate}
    parents = {parent for latent in raw["latents"].values() for parent in latent.get("given", ())}
    read = raw["decoder"].get("given") or [name for name in raw["latents"] if name not in parents]
    raw["decoder"]["given"] = [*read, "y"]


SIZES: tuple[SearchStrategy[Raw], ...] = (
    st.integers(1, 5).map(lambda n: {"dim": n}),
    st.integers(1, 4).map(lambda n: {"bits": n}),
    st.tuples(st.integers(2, 5), st.sampled_from([None, [2], [3, 2], [2, 2]]), st.sampled_from([None, 1, 3])).map(
        lambda n: {k: v for k, v in zip(("codes", "grid", "embedding"), n, strict=True) if v is not None}
    ),
)


@st.composite
def _scored(draw: DrawFn, _shape: Shape) -> Raw:
    """One to three latents, each given some before it, the guide in either order."""
    names = ["z", "c", "b"][: draw(st.integers(1, 3))]
    downward = draw(st.booleans())
    found: Raw = {}
    for i, name in enumerate(names):
        size = draw(st.one_of(SIZES[0], st.one_of(SIZES)))
        given = [above for above in names[:i] if draw(st.booleans())]
        beside = names[:i] if downward else names[i + 1 :]
        found[name] = draw(_latents(size, given, [other for other in beside if draw(st.booleans())]))
    return _as_read(found)


def _as_read(latents: Raw) -> Raw:
    """A guide is given no latent that the model sums out, and a prior made of a posterior leaves that x alone."""
    summed = {name for name, z in latents.items() if Posterior.members[z["posterior"]["kind"]].summed}
    for z in latents.values():
        given = [name for name in z["posterior"].get("given", ["x"]) if name not in summed]
        alone = Prior.members[z["prior"]["kind"]].reads_guide
        z["posterior"] = {**z["posterior"], "given": ["x"] if alone else given}
    return latents


def suits(posterior: Posterior, space: Space) -> bool:
    """Return True if a space of codes has the sizes that a posterior asks for."""
    try:
        posterior.sampled(space)
    except ValueError:
        return False
    return True


@st.composite
def _latents(draw: DrawFn, size: Raw, given: list[str], guide_given: list[str]) -> Raw:
    wanted = "real" if "dim" in size else "binary" if "bits" in size else "index"
    space = Space.codes(size.get("codes", 2), embedding=size.get("embedding"))

    def infers(kind: Any) -> bool:
        return (
            kind.values == wanted
            and kind.infers
            and kind.determines is None
            and (not kind.carries or suits(kind(), space))
        )

    site = Site("z", Space.bits(size["bits"]) if "bits" in size else Space.real(size.get("dim", 1)))
    fits = members(Posterior, among=infers, without=("given",)).filter(
        lambda table: wanted == "index" or builds(lambda: Posterior.parse(table).build(site, {"x": VECTOR}, Link()))
    )
    posterior = draw(fits)
    relaxed = issubclass(Posterior.members[posterior["kind"]], RelaxedPosterior)
    prior = draw(priors_of("relaxed" if relaxed else wanted, bool(given), size.get("dim", 3)))
    raw: Raw = {**size, "prior": prior, "posterior": {**posterior, "given": ["x", *guide_given]}}
    if given:
        raw["given"] = given
    if relaxed and draw(st.booleans()):
        raw["temperature"] = draw(st.sampled_from([0.3, 1.0, {"kind": "exponential"}]))
    return raw


def priors_of(wanted: str, parents: bool, dim: int = 3) -> SearchStrategy[Raw]:
    """Priors of a latent of such values, with parents or without, of `dim` coordinates."""
    site, given = Site("z", Space.real(dim)), {"above": VECTOR} if parents else {}

    def fits(kind: Any) -> bool:
        return wanted in kind.values and (kind.reads_parents if parents else not kind.needs_parents)

    return members(Prior, among=fits).filter(
        lambda table: builds(lambda: Prior.parse(table).build(site, given, Link()))
    )


@st.composite
def _flow(draw: DrawFn, shape: Shape) -> Raw:
    """One latent of as many coordinates as x has elements, inferred by going back."""
    posterior = draw(members(Posterior, among=lambda kind: kind.determines is not None, without=("given",)))
    dim = math.prod(shape)
    return {"z": {"dim": dim, "prior": draw(priors_of("real", parents=False, dim=dim)), "posterior": posterior}}


@st.composite
def _never_inferred(draw: DrawFn, _shape: Shape) -> Raw:
    posterior = draw(members(Posterior, among=lambda kind: not kind.infers, without=("given",)))
    dim = draw(st.integers(1, 5))
    return {"z": {"dim": dim, "prior": draw(priors_of("real", parents=False, dim=dim)), "posterior": posterior}}


@st.composite
def _mixture(draw: DrawFn, _shape: Shape) -> Raw:
    posterior = draw(members(Posterior, among=lambda kind: kind.summed, without=("given",)))
    return {
        "c": {
            "codes": draw(st.integers(2, 4)),
            "prior": draw(priors_of("index", parents=False)),
            "posterior": posterior,
        }
    }


LATENTS: dict[str, Callable[[Shape], SearchStrategy[Raw]]] = {
    "scored": _scored,
    "flow": _flow,
    "drawn": _never_inferred,
    "mixture": _mixture,
    "table": _scored,
}


def _objectives(recipe: str) -> SearchStrategy[Raw]:
    def fits(kind: Any) -> bool:
        if recipe == "drawn":
            return not kind.scores
        return kind.scores and (recipe == "mixture" or kind.engine is None)

    own = members(Objective, among=lambda kind: kind.scores and kind.engine is not None)
    return st.one_of(own, members(Objective, among=fits)) if recipe == "mixture" else members(Objective, among=fits)


@st.composite
def _trains(draw: DrawFn, objective: Raw) -> Raw:
    refused = Objective.members[objective["kind"]].refuses
    train = draw(tables(Train, without=("engine", "epochs", "batch_size", "shards", *refused)))
    batch = draw(st.sampled_from([1, 7, 16, 100]))
    shards = draw(st.sampled_from([n for n in (1, 1, 2, 4) if n <= batch]))
    return {**train, "epochs": draw(st.integers(1, 2)), "batch_size": batch, "shards": shards}


OWNERS = {"size": ("library", "learned"), "dispersion": ("feature", "shared", "decoder")}
"""Fields of likelihoods of counts that take one of these words, or the name of a covariate."""


@st.composite
def _decoders(draw: DrawFn, recipe: str, shape: Shape, latents: Raw, conditioned: bool) -> Raw:
    determines = {Posterior.members[z["posterior"]["kind"]].determines for z in latents.values()} - {None}
    if recipe == "flow":
        way_back = members(Network, among=lambda kind: "flow" in kind.model_fields)
        going = way_back.filter(lambda n: builds(lambda: Network.parse(n).build({"z": (math.prod(shape),)}, shape)))
        return {"network": draw(going), "likelihood": {"kind": determines.pop()}}
    if recipe == "table":
        many = {f"z{i}": VECTOR for i in range(len(latents))}
        tabular = members(Likelihood, among=lambda kind: kind.of_tables)
        return {"network": draw(networks(many, shape)), "likelihood": draw(tabular)}
    if recipe == "drawn":
        return {"network": draw(networks({"z": VECTOR}, shape)), "likelihood": {"kind": "determined"}}
    likelihood = draw(members(Likelihood, among=lambda kind: recipe != "mixture" or kind.closed_form).filter(_scores))
    if recipe == "mixture":
        likelihood.pop("size", None)
    likelihood |= {field: draw(st.sampled_from(words)) for field, words in OWNERS.items() if field in likelihood}
    many = {f"z{i}": VECTOR for i in range(len(latents) + conditioned)}
    network = st.just({"kind": "table"}) if recipe == "mixture" else networks(many, shape)
    return {"network": draw(network), "likelihood": likelihood}


def _scores(table: Raw) -> bool:
    likelihood = Likelihood.parse(table)
    return not likelihood.is_point and not likelihood.of_tables


def _encoders(shape: Shape) -> SearchStrategy[Raw]:
    return st.tuples(members(Encoder), networks({"x": shape}, None), networks({"features": VECTOR}, None)).map(
        lambda found: {
            **found[0],
            "network": found[1],
            **({"levels": found[2]} if "levels" in Encoder.members[found[0]["kind"]].model_fields else {}),
        }
    )


@st.composite
def _refits(draw: DrawFn, latents: Raw) -> Raw:
    name = draw(st.sampled_from(sorted(latents)))
    latent = Latent.model_validate(latents[name])
    train = {**draw(tables(Train, without=("engine", "alternate", "shards"))), "epochs": 1}
    others = priors_of(latent.sampled.values, bool(latent.given), latent.dim or 3)
    table = {"priors": {name: draw(others.filter(lambda prior: Prior.parse(prior) != latent.prior))}, "train": train}
    Refit.model_validate(table)
    return table


# ---------------------------------------------------------------------- damage

JUNK: tuple[Any, ...] = (
    True, None, "3", "", "x", "é", "\x00", "a.b", 0, -1, 1, 2, 7, 1.5, -0.5, 1e-300, 1e300, math.inf, math.nan, 2000,
    10**9, 2**31, 2**63, 10**400, [], {}, [[]], [0], [1, 2, 3, 4], ["x"], ["z", "c"],
    ["nobody"], {"kind": "nobody"}, {"_target_": "os.system"}, [1] * 2000, [10**9], "mlp", "normal", "uniform",
)  # fmt: skip
"""What may stand anywhere: of a wrong type, out of range, absurd."""


DAMAGE = ("junk", "alike", "alike", "alike", "drop", "rename", "add", "swap", "member", "member")


@st.composite
def wild(draw: DrawFn) -> Drawn:
    """A sound declaration with up to three values put in, taken away, renamed or swapped."""
    drawn = draw(sound())
    raw = damaged(draw, drawn.raw) if draw(st.integers(0, 4)) else drawn.raw  # some train whatever else is drawn
    return Drawn(raw, drawn.shape, drawn.rows, drawn.seed, drawn.fitting)


def damaged(draw: DrawFn, table: Raw) -> Raw:
    """Nested tables with one to three places damaged."""
    raw = copy.deepcopy(table)
    for _ in range(draw(st.integers(1, 3))):
        if places(raw):
            _damage(draw, raw)
    return raw


def _damage(draw: DrawFn, raw: Raw) -> None:
    """Something else at one place: anything, a value of the same type, another kind, what stands elsewhere, nothing."""
    table, key = draw(st.sampled_from(places(raw)))
    way = draw(st.sampled_from(DAMAGE))
    if way == "drop":
        del table[key]
    elif way == "rename" and isinstance(table, dict):
        table[f"{key}s"] = table.pop(key)
    else:
        name = f"{draw(st.sampled_from(places(raw)))[1]}" if way == "add" and isinstance(table, dict) else key
        table[name] = copy.deepcopy(draw(_other(raw, table[key], way)))


def _other(raw: Raw, value: Any, way: str) -> SearchStrategy[Any]:
    if way == "junk":
        return st.sampled_from(JUNK)
    if way == "alike":
        return st.sampled_from([junk for junk in JUNK if type(junk) is type(value)] or JUNK)
    if way == "member" and isinstance(value, dict):
        same = [family for family in families() if value.get(family.tag) in family.members]
        return members(same[0]) if same else st.sampled_from(JUNK)
    return st.sampled_from([table[key] for table, key in places(raw)])


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every table or list with each of its keys, the deepest first."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys[:50] for place in (*places(value[key]), (value, key))]


def kinds_in(experiment: Experiment) -> set[tuple[str, str]]:
    """Family and kind of every part of a declaration."""

    def walk(part: Any) -> Iterable[tuple[str, str]]:
        if isinstance(part, Component):
            family = next(base for base in type(part).__mro__ if base in families())
            yield family.__name__, getattr(part, part.tag)
        if isinstance(part, BaseModel):
            for name in type(part).model_fields:
                yield from walk(getattr(part, name))
        elif isinstance(part, dict):
            for value in part.values():
                yield from walk(value)

    return set(walk(experiment))
