import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.analysis import plots
from pvae.analysis.collapse import Collapse, LatentCollapse, alert, collapse
from pvae.analysis.estimate import exact
from pvae.analysis.generate import mean_of
from pvae.analysis.report import _on_prior, finite, report, shown, some, surgery_csv
from pvae.analysis.surgery import surgery
from pvae.analysis.table import cell
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError
from pvae.pair import Pair
from pvae.run import Run
from pvae.spec import Experiment
from pvae.svi import fit

HOSTILE = ("<script>alert(1)</script>", r"$\foo$", "=cmd|' /C calc'!A0", "[red]", "\x1b[31m", "\u202e")
TINY = ("train.epochs=3", "encoder.network.hidden=[8]", "decoder.network.hidden=[8]", "train.engine=eager")
brief = partial(report, samples=2, evidence_samples=5)


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class HandWritten(nn.Module):
    """Two latents of one number each over vectors, with names that mean harm; no labels, no images."""

    names = ("<b>z</b>", "=1+1")

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.encode = nn.Linear(dim, 2)
        self.decode = nn.Linear(2, dim)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = [pyro.sample(name, dist.Normal(torch.zeros(1), 1.0).to_event(1)) for name in self.names]
            pyro.sample("x", dist.Normal(self.decode(torch.cat(z, -1)), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name, loc in zip(self.names, self.encode(x).unbind(-1), strict=True):
                pyro.sample(name, dist.Normal(loc[:, None], 0.7).to_event(1))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    root = tmp_path_factory.mktemp("runs")
    runs: dict[str, Run] = {}

    def run(name: str, *overrides: str) -> Run:
        if name not in runs:
            runs[name] = fit(name, *TINY, *overrides, run_dir=root, progress=False)
        return runs[name]

    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose name, description and labels all mean harm."""
    x = torch.rand(60, 2, 4).round()
    data = Dataset.from_tensors(x, torch.arange(60) % len(HOSTILE), label_names=HOSTILE)
    raw = {"name": " ".join(HOSTILE[:4]), "description": HOSTILE[0] + HOSTILE[1], "latents": {"z": {"dim": 2}}}
    experiment = Experiment.from_dict(raw).with_overrides(*TINY)
    return fit(experiment, data=data, run_dir=tmp_path_factory.mktemp("hostile"), progress=False)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Run:
    module = HandWritten()
    data = Dataset.from_tensors(torch.randn(80, 3))
    pair = Pair(model=module.model, guide=module.guide)
    return fit(pair, "train.epochs=2", data=data, run_dir=tmp_path_factory.mktemp("hand"), progress=False)


def numbers_of(run: Run) -> dict:
    return json.loads((run.path / "report" / "report.json").read_text())


def assert_harmless(path: Path) -> Page:
    """One file that loads nothing, runs nothing, and describes every picture."""
    page = Page(path)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    known = {"html", "head", "meta", "title", "style", "body", "header", "p", "h1", "h2", "h3", "nav", "ul", "li", "a"}
    known |= {"main", "section", "dl", "div", "dt", "dd", "figure", "img", "figcaption", "table", "caption", "thead"}
    known |= {"tbody", "tr", "th", "td", "sub", "span", "code", "pre", "details", "summary", "footer", "b"}
    assert {tag for tag, _ in page.tags} <= known
    assert all((image["src"] or "").startswith("data:image/png;base64,") and image["alt"] for image in page.all("img"))
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert all((link["href"] or "")[1:] in anchors for link in page.all("a"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    raw = path.read_text(encoding="utf-8")
    assert "<script" not in raw
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*https?:|url\(|@import", raw)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", raw)
    return page


def test_report_holds_every_number_and_loads_nothing(make):
    run = make("vae")
    path = brief(run)
    page = assert_harmless(path)
    assert path == run.path / "report" / "index.html"
    assert len(page.all("img")) == 6
    found = numbers_of(run)
    assert found["surgery"]["test"]["figures"] == surgery(run.pair, run.data.test.x, samples=2).to_dict()["figures"]
    for split in ("train", "test"):
        value = {term: e["value"] for term, e in found["surgery"][split]["figures"].items() if e}
        assert value["elbo"] == pytest.approx(value["reconstruction"] - value["kl"], abs=1e-9)
        assert value["kl"] == pytest.approx(value["mutual_information"] + value["marginal_kl"], abs=1e-9)
        shown_elbo = plots.nats(value["elbo"], 3)
        assert shown_elbo in page.text
    assert found["evidence"]["samples"] == 5
    assert len(found["collapse"]["latents"]["z"]["activity"]) == 16
    assert found["metrics"] == run.files.metrics_rows()
    assert found["environment"]["data fingerprint"] == run.data.fingerprint


def test_verdict_comes_first_and_gives_the_knob(make):
    run = make("vae")
    page = Page(brief(run))
    headings = re.findall(r'<h2 id="(\w+)"', (run.path / "report" / "index.html").read_text())
    assert headings[:4] == ["verdict", "training", "surgery", "latents"]
    assert all(sentence["text"] in page.text for sentence in numbers_of(run)["verdict"])
    said = " ".join(s["text"] for s in numbers_of(run)["verdict"])
    for words in ("ELBO is", "a better guide would win", "the most a better prior can win", "test"):
        assert words in said
    assert 3 <= len(numbers_of(run)["verdict"]) <= 7


def test_two_reports_are_byte_identical_and_move_nothing(make):
    run = make("vae")
    before = {name: value.clone() for name, value in run.pair.state_dict().items()}
    state, settings = torch.get_rng_state(), dict(matplotlib.rcParams)
    first = {p.name: p.read_bytes() for p in brief(run).parent.iterdir()}
    again = Run.load(run.path)
    second = {p.name: p.read_bytes() for p in brief(again).parent.iterdir()}
    assert set(first) == {"index.html", "report.json", "surgery.csv"}
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert dict(matplotlib.rcParams) == settings
    assert all(torch.equal(before[name], value) for name, value in run.pair.state_dict().items())


@pytest.mark.parametrize(("name", "images"), [("hvae", 8), ("vae_normal", 6)], ids=["two levels", "normal likelihood"])
def test_zoo(make, name, images):
    overrides = ["latents.z1.prior.network.hidden=[8]"] if name == "hvae" else []
    run = make(name, *overrides)
    page = assert_harmless(brief(run))
    assert len(page.all("img")) == images
    assert all(latent in page.text for latent in run.experiment.latents)


def test_split_train_has_no_gap(make):
    run = make("vae")
    brief(run, split="train")
    assert list(numbers_of(run)["surgery"]) == ["train"]
    assert numbers_of(run)["train_gap"] is None
    with pytest.raises(DeclarationError, match="Expected a split"):
        brief(run, split="tset")


def test_hostile_text_comes_out_as_text(hostile):
    """FAULTS 38."""
    page = assert_harmless(brief(hostile))
    for text in HOSTILE[:4]:
        assert text in page.text
    assert hostile.name in page.text


def test_hand_written_pair_with_vectors_and_no_labels(by_hand):
    page = assert_harmless(brief(by_hand))
    assert "hand-written pair" in page.text
    assert "<b>z</b>" in page.text
    assert len(page.all("img")) == 8
    rows = list(csv.DictReader((by_hand.path / "report" / "surgery.csv").read_text().splitlines()))
    assert all(not row["term"].startswith(("=", "+", "-", "@")) for row in rows)
    assert any(row["term"].startswith("'=1+1") for row in rows)
    values = {(row["split"], row["term"]): float(row["nats_per_datum"]) for row in rows}
    assert values["test", "elbo"] == pytest.approx(values["test", "reconstruction"] - values["test", "kl"], abs=1e-9)


def test_pair_that_cannot_be_sampled_loses_a_section_only(by_hand, monkeypatch):
    def refuse(self: Pair, x: Tensor) -> None:
        raise NotImplementedError("no <i>way</i>")

    monkeypatch.setattr(Pair, "simulate", refuse)
    page = assert_harmless(brief(by_hand))
    assert "Not available: no <i>way</i>" in page.text
    assert numbers_of(by_hand)["missing"] == {"samples": "no <i>way</i>"}


def test_progress_and_interruption_leave_the_old_report(make, monkeypatch):
    """FAULTS 44."""
    run = make("vae")
    told: list[tuple[int, int, str]] = []
    path = brief(run, on_progress=lambda *step: told.append(step))
    assert [done for done, _, _ in told] == [0, 1, 2, 3, 4, 5]
    old = path.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "waterfall", interrupt)
    with pytest.raises(KeyboardInterrupt):
        brief(run)
    assert path.read_bytes() == old
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "report.json", "surgery.csv"}


# ---------------------------------------------------------------------- collapse


def half_asleep() -> Iterator[Pair]:
    class Asleep(HandWritten):
        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample(self.names[0], dist.Normal(self.encode(x)[:, :1], 0.7).to_event(1))
                pyro.sample(self.names[1], dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))

    module = Asleep()
    yield Pair(model=module.model, guide=module.guide)


def test_collapse_finds_the_sleeping_latent():
    pair = next(half_asleep())
    x = torch.randn(200, 3)
    with torch.no_grad():
        pair.adopt(x)
    found = collapse(pair, x)
    awake, asleep = (found.latents[name] for name in HandWritten.names)
    assert isinstance(found, Collapse)
    assert (awake.active, asleep.active, asleep.idle) == (1, 0, 1)
    assert asleep.kl_per_dimension == (0.0,)
    assert asleep.activity == (0.0,)
    (text,) = found.alerts
    assert "=1+1 has collapsed" in text
    assert "objective.beta" in text
    assert json.loads(json.dumps(found.to_dict()))["latents"]["<b>z</b>"]["active"] == 1
    assert "0 of 1" in str(found)
    counts = [count for _, count in awake.curve]
    assert counts == sorted(counts, reverse=True)
    with pytest.raises(DataError, match="at least one row"):
        collapse(pair, x[:0])


@pytest.mark.parametrize(
    ("idle", "words"),
    [(0, None), (1, "dim = 3 would do"), (3, "shrink latents.z.dim to 1"), (4, "z has collapsed: all 4 units")],
)
def test_alert_says_how_many_and_what_to_turn(idle, words):
    text = alert("z", LatentCollapse(4, (1.0,) * 4, None, 4 - idle, idle, ()))
    assert text is None if words is None else words in str(text)


# ---------------------------------------------------------------------- parts


def test_cells_that_are_formulas_are_quoted_and_numbers_are_not():
    """FAULTS 39."""
    for text in ("=1", "+1", "-1", "@x", "\t=1"):
        assert cell(text) == f"'{text}"
    assert [cell(value) for value in (-1.5, None, "z", "a=b")] == [-1.5, None, "z", "a=b"]


def test_json_and_text_are_cleaned():
    """FAULTS 38."""
    assert finite({"a": [float("nan"), float("inf"), 1.5, None, Path("x")]}) == {"a": [None, None, 1.5, None, "x"]}
    assert shown("a\x1b[31m\u202eb\nc") == "a\ufffd[31m\ufffdb\nc"


def test_subset_is_seeded_and_says_so():
    x = torch.arange(100.0)[:, None]
    one, two = some(x, 10, 3), some(x, 10, 3)
    assert torch.equal(one.x, two.x)
    assert one.note == "10 of 100 rows, drawn at random"
    assert some(x, 100, 3).note == "100 rows"


def test_mean_of_every_kind_of_observation():
    logits = torch.tensor([[[0.0, 0.0, 0.0]]])
    assert mean_of(dist.Categorical(logits=logits).to_event(1)).item() == pytest.approx(1.0)
    assert mean_of(dist.Bernoulli(torch.tensor([[0.3]])).to_event(1)).item() == pytest.approx(0.3)
    with pytest.raises(NotImplementedError, match="no mean"):
        mean_of(dist.Cauchy(torch.zeros(2, 1), 1.0).to_event(1))


def test_verdict_warns_when_information_stands_at_its_ceiling(make):
    run = make("vae")
    taken = surgery(run.pair, run.data.test.x)
    (free,) = _on_prior(taken)
    (full,) = _on_prior(replace(taken, mutual_information=exact(taken.log_n.value)))
    assert "ceiling" not in free.text
    assert "stands at its ceiling log 447 = 6.10" in full.text
    (unknown,) = _on_prior(replace(taken, mutual_information=None, marginal_kl=None))
    assert "not known" in unknown.text


def test_csv_of_a_surgery_reads_back(make):
    run = make("vae")
    taken = surgery(run.pair, run.data.test.x)
    rows = list(csv.DictReader(surgery_csv({"test": taken}).splitlines()))
    assert float(rows[0]["nats_per_datum"]) == taken.elbo.value


EVENTS = {"image": (1, 6, 4), "colour": (3, 4, 4), "matrix": (5, 4), "vector": (7,), "plane": (2,), "number": (1,)}


@pytest.mark.parametrize("shape", EVENTS.values(), ids=list(EVENTS))
def test_every_event_can_be_shown(shape):
    x = np.random.default_rng(0).random((5, *shape))
    rebuilt = plots.Rebuilt(r"$\foo$", x, x, np.linspace(-3, -1, 5))
    for made in (plots.reconstructions([rebuilt], 0, 1), plots.samples(x, x, 0, 1)):
        assert plots.png(made).startswith(b"\x89PNG")


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("exact", [True, False], ids=["normal prior", "sampled prior"])
def test_every_latent_can_be_shown(dim, exact):
    """FAULTS 38."""
    draws = np.random.default_rng(0).normal(size=(50, dim))
    normal = (np.zeros(dim), np.ones(dim)) if exact else None
    cloud = plots.Cloud(r"$\foo$ [red] 潜", draws, draws, draws, normal)
    for labels in (None, np.arange(50) % 3, np.arange(50)):
        assert plots.png(plots.plane(cloud, labels, HOSTILE)).startswith(b"\x89PNG")


def test_figures_carry_no_date_and_no_program():
    rows = [{"epoch": 1, "split": "train", "elbo": -1.0, "kl/z": None, "beta": 1.0}]
    one, two = (plots.png(plots.training(rows, ["z"])) for _ in range(2))
    assert one == two
    assert b"Software" not in one
    assert b"tIME" not in one


def test_leading_directions_are_those_of_the_covariance():
    means = np.random.default_rng(0).normal(size=(400, 3)) * [1.0, 5.0, 2.0]
    _, directions, shares = plots.leading(means)
    assert np.abs(directions).argmax(0).tolist() == [1, 2]
    assert (directions[np.abs(directions).argmax(0), range(2)] > 0).all()
    assert shares.sum() == pytest.approx(29 / 30, abs=0.02)
