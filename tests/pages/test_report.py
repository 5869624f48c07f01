from __future__ import annotations

import csv
import json
import re
import shutil
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import matplotlib
import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.analysis.bounds.calibration import Calibration
from pvae.analysis.bounds.ranks import rank_tests
from pvae.analysis.decompose.collapse import Collapse, LatentCollapse, alert, collapse
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import exact
from pvae.analysis.pages.document.blocks import Picture
from pvae.analysis.pages.document.document import Document, Stages, explained
from pvae.analysis.pages.document.words import WORDS
from pvae.analysis.pages.plots import bars, base, clouds, columns, curves, pictures
from pvae.analysis.pages.plots.bars import calibrated
from pvae.analysis.pages.sections import SECTIONS
from pvae.analysis.pages.sections.examination import Examination, some
from pvae.analysis.pages.sections.fit import on_prior
from pvae.analysis.pages.sections.latents import HOLE, holes
from pvae.analysis.pages.sections.samples import on_copies
from pvae.analysis.samples.copying import data_copying
from pvae.analysis.samples.running import distribution_mean
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.runs.run import Run
from pvae.training.fit import fit
from tests.decompose.test_new_data import SATURATED
from tests.zoo_runs import brief, tiny_report, tiny_run

HOSTILE = ("<script>alert(1)</script>", r"$\foo$", "=cmd|' /C calc'!A0", "[red]", "\x1b[31m", "\u202e")
TINY = ("train.epochs=3", "encoder.network.hidden=[8]", "decoder.network.hidden=[8]", "train.engine=eager")


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
    """Two latents of one number each over vectors, with names that mean harm; no labels, no images.

    The posterior of the second latent is its prior if the module is `half_asleep`.
    """

    names = ("<b>z</b>", "=1+1")

    def __init__(self, *, half_asleep: bool = False) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 2), nn.Linear(2, 3)
        self.awake = torch.tensor([1.0, 1.0 - half_asleep])
        self.scales = (0.7, 1.0 if half_asleep else 0.7)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = [pyro.sample(name, dist.Normal(torch.zeros(1), 1.0).to_event(1)) for name in self.names]
            pyro.sample("x", dist.Normal(self.decode(torch.cat(z, -1)), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            locs = (self.encode(x) * self.awake).unbind(-1)
            for name, loc, scale in zip(self.names, locs, self.scales, strict=True):
                pyro.sample(name, dist.Normal(loc[:, None], scale).to_event(1))


def pair_of(module: HandWritten | Shifted) -> Pair:
    return Pair(model=module.model, guide=module.guide)


def fitted(data: Dataset, folder: Path, **declared: Any) -> Run:
    """A run of a small VAE with two latent coordinates."""
    experiment = Experiment.from_dict({"latents": {"z": {"dim": 2}}, **declared}).with_overrides(*TINY)
    return fit(experiment, data=data, run_dir=folder, progress=False)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose name, description and labels all mean harm."""
    x = torch.rand(60, 2, 4).round()
    data = Dataset.from_tensors(x, torch.arange(60) % len(HOSTILE), label_names=HOSTILE)
    named = {"name": " ".join(HOSTILE[:4]), "description": HOSTILE[0] + HOSTILE[1]}
    return fitted(data, tmp_path_factory.mktemp("hostile"), **named)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Run:
    data, folder = Dataset.from_tensors(torch.randn(80, 3)), tmp_path_factory.mktemp("hand")
    return fit(pair_of(HandWritten()), "train.epochs=2", data=data, run_dir=folder, progress=False)


def numbers_of(run: Run) -> dict:
    return json.loads((run.path / "report" / "report.json").read_text())


def assert_harmless(path: Path) -> Page:
    """One file that loads nothing, runs nothing, and describes every picture."""
    page = Page(path)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    known = "html head meta title style body header p h1 h2 h3 nav ul li a main section dl div dt dd figure img b span "
    known += "figcaption table caption thead tbody tr th td pre details summary footer"
    assert {tag for tag, _ in page.tags} <= set(known.split())
    assert all((image["src"] or "").startswith("data:image/png;base64,") and image["alt"] for image in page.all("img"))
    anchors = {f"#{attributes.get('id')}" for _, attributes in page.tags}
    assert all(link["href"] in anchors for link in page.all("a"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    raw = path.read_text(encoding="utf-8")
    assert "<script" not in raw
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*https?:|url\(|@import", raw)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", raw)
    return page


def written(run: Run) -> dict[str, bytes]:
    folder = run.path / "report"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def headings(run: Run) -> list[str]:
    return re.findall(r'<h2 id="(\w+)"', (run.path / "report" / "index.html").read_text())


def test_report_holds_every_number_and_loads_nothing():
    run, path = tiny_run("vae"), tiny_report("vae")
    page = assert_harmless(path)
    assert path == run.path / "report" / "index.html"
    assert len(page.all("img")) == len(re.findall("data:image/png", path.read_text())) > 10
    assert len(list((path.parent / "tables").glob("*.csv"))) == len(page.all("table"))
    assert not (path.parent / "figures").exists()
    found = numbers_of(run)
    expected = surgery(run.pair, run.data.test.x, samples=2, train=run.data.train.x, labels=run.data.test.y)
    assert found["surgery"]["test"]["figures"] == expected.to_dict()["figures"]
    for split in ("train", "test"):
        value = {term: e["value"] for term, e in found["surgery"][split]["figures"].items() if e}
        assert value["elbo"] == pytest.approx(value["reconstruction"] - value["kl"], abs=1e-9)
        assert value["kl"] == pytest.approx(value["mutual_information"] + value["marginal_kl"], abs=1e-9)
        assert base.nats(value["elbo"], 3) in page.text
    assert found["evidence"]["samples"] == 30
    assert len(found["collapse"]["latents"]["z"]["activity"]) == 16
    assert found["metrics"] == run.files.metrics_rows()
    assert found["environment"]["data fingerprint"] == run.data.fingerprint
    for key in ("gap", "holes", "calibration", "copying", "sample_quality", "probe", "reconstructions"):
        assert found[key], key
    assert found["missing"] == {}


def test_calibration_is_told_with_its_picture_and_its_table():
    page, found = Page(tiny_report("vae")), numbers_of(tiny_run("vae"))["calibration"]
    assert (found["n"], found["importance"], len(found["guide"]), len(found["weighted"])) == (500, 4, 17, 17)
    assert all(sum(test["counts"]) == 500 for test in (*found["guide"], *found["weighted"]))
    assert all(text in page.text for text in found["said"])
    assert any(str(image["alt"]).startswith("Histograms of the ranks of 5 coordinates") for image in page.all("img"))
    rows = list(csv.DictReader((tiny_report("vae").parent / "tables" / "calibration.csv").read_text().splitlines()))
    worst = min(found["guide"][:-1], key=lambda test: test["p"])
    assert [row["term"] for row in rows if row["term"].startswith("z[")][0] == worst["name"]


@pytest.mark.parametrize("samples", [2, 19, 99])
def test_ranks_can_be_shown(samples):
    ranks = np.random.default_rng(0).integers(0, samples + 1, (300, 2))
    tests = rank_tests(ranks, samples, ["<b>$z", "all jointly"])
    for weighted in ((), tests):
        made = calibrated(Calibration(300, samples, 0, tests, weighted))
        assert base.png(made).startswith(b"\x89PNG")
        histogram, coverage = made.axes[:2]
        drawn: Any = histogram.patches[-1]
        bars = drawn.get_data()
        assert (bars.values * np.diff(bars.edges)).sum() == pytest.approx(1)
        assert len(bars.values) == min(samples + 1, 10)
        assert len(coverage.lines) == 2 + bool(weighted)


def test_verdict_comes_first_one_claim_a_sentence():
    page, run = Page(tiny_report("vae")), tiny_run("vae")
    assert headings(run)[:5] == ["glance", "training", "fit", "surgery", "latents"]
    said = numbers_of(run)["verdict"]
    assert all(sentence["text"] in page.text for sentence in said)
    assert [s["alert"] for s in said] == sorted((s["alert"] for s in said), reverse=True)
    text = " ".join(s["text"] for s in said)
    for words in (
        "The test ELBO is", "log p(x) is at least", "A better guide would raise the ELBO by at least",
        "On new data a better prior wins at least", "On these 60 rows alone", "prior samples lie in holes",
        "% of samples", "classifier two-sample test accuracy", "(precision)", "accuracy",
    ):  # fmt: skip
        assert words in text
    assert not re.search(r"(?<![\d.,])[−-]?0\.00(?![\d])", text)


def test_the_first_screen_answers_three_questions():
    page, numbers = tiny_report("vae").read_text(), numbers_of(tiny_run("vae"))
    first = page[: page.index("<nav")]
    questions = re.findall("<h3>(.*?)</h3>", first)
    assert questions == ["What was fitted, and how well?", "What do the latents look like?", "What to do next?"]
    assert first.count("<img") == 2  # the map, and samples beside data
    total = numbers["surgery"]["test"]["figures"]["elbo"]["value"]
    assert f"{total:.2f}".replace("-", "−") in first
    alerts = [s["text"] for s in numbers["verdict"] if s["alert"]]
    assert first.split("<details>")[0].count('class="alert"') == min(3, len(alerts))


def test_terms_are_explained_at_first_use():
    page = tiny_report("vae").read_text()
    used = re.findall('<a class="term" href="#(term-[0-9]+)"', page)
    assert len(used) == len(set(used)) > 8
    assert set(used) <= set(re.findall('<div id="(term-[0-9]+)">', page))
    told = explained("<p>ELBO, the ELBO</p><h2>KL</h2></main>", {"ELBO": 'a "bound"', "KL": "b"}, "Words")
    assert told.startswith('<p><a class="term" href="#term-1" title="a &quot;bound&quot;">ELBO</a>, the ELBO</p>')
    assert re.findall("<dt>(.*)</dt><dd>(.*)</dd>", told) == [("ELBO", "a &#34;bound&#34;")]
    assert explained("<p>MARGINAL-ELBOW KL(q)</p>", {"ELBO": "a"}, "") == "<p>MARGINAL-ELBOW KL(q)</p>"


def test_a_table_is_shown_column_by_column_in_its_units(tmp_path):
    """A column whose likelihood is wrong comes first; the least probable cell is the one that was put there."""
    r = np.random.default_rng(0)
    size = 150 + 10 * r.standard_normal(300)
    kind = np.where(size > 150, "large", "small")
    odd = np.sign(size - 150) * 5 + 20 + 0.01 * r.standard_normal(300)
    twice = 2 * size
    size[0] = 400.0
    frame = pandas.DataFrame({"size": size, "<b>twice</b>": twice, "kind": kind, "odd": odd})
    frame["name"] = [f"<i>{i}</i>" for i in range(300)]
    frame["day"] = [f"2020-01-{1 + i % 28:02}" for i in range(300)]
    frame.to_csv(path := tmp_path / "table.csv", index=False)
    columns_of: dict[str, Any] = dict.fromkeys(("size", "<b>twice</b>", "odd"), {"type": "continuous"})
    columns_of |= {"kind": {"type": "categorical", "levels": ["large", "small"]}}
    columns_of["day"] = {"type": "continuous", "time": "days"}
    splits = {"train": [0, 240], "validation": [240, 270], "test": [270, 300]}
    declared = {"source": "csv", "path": str(path), "columns": columns_of, "splits": splits, "id": "name"}
    plan = Experiment.from_dict(
        {"latents": {"z": {"dim": 2}}, "decoder": {"likelihood": {"kind": "columns"}}, "data": declared}
    ).with_overrides("train.epochs=2")
    run = fit(plan, run_dir=tmp_path, progress=False)
    exam = Examination(run, "train")
    values = exam.in_units(exam.observed)
    assert values["kind"].isin(["large", "small"]).all()
    assert 100 < values["size"].median() < 200
    assert values["day [days]"].between(18_261.9, 18_289.1).all()  # 2020-01-01 is day 18 262 since 1970
    page = assert_harmless(brief(run, split="train"))
    found, cells = page.text, numbers_of(run)["cells"]
    assert "all 5 columns" in found
    assert "<b>twice</b>" in found
    assert (cells[0]["row"], cells[0]["column"]) == ("<i>0</i>", "size")
    assert float(cells[0]["value"]) == pytest.approx(400, abs=1)
    tiles = columns.beside(values, values.assign(odd=20.0))
    assert tiles.axes[0].get_title(loc="left") == "odd"


def test_counts_are_shown_by_mean_variance_and_zeros(tmp_path):
    x = torch.poisson(torch.rand(80, 6) * 4)
    run = fitted(Dataset.from_tensors(x), tmp_path, decoder={"likelihood": {"kind": "poisson"}})
    page = assert_harmless(brief(run))
    assert any("proportion of zeros" in str(image["alt"]) for image in page.all("img"))
    made = columns.counts(base.array(x), base.array(x))
    data = made.axes[0].collections[0].get_offsets()
    assert np.allclose(np.asarray(data), np.stack([x.mean(0), x.var(0, correction=0)], 1), atol=1e-5)


def test_two_reports_are_byte_identical_and_move_nothing(monkeypatch):
    """FAULTS 44: progress never falls, and an interrupted report leaves the old one whole.

    A report of small data runs with one thread, so that its numbers do not depend on the number of threads.
    """
    chosen = Mock()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", chosen)
    tiny_report("vae")
    run = Run.load(tiny_run("vae").path)
    first = written(run)
    before = {name: value.clone() for name, value in run.pair.state_dict().items()}
    state, settings = torch.get_rng_state(), dict(matplotlib.rcParams)
    told: list[tuple[int, int, str]] = []
    brief(run, on_progress=lambda *step: told.append(step))
    assert {"index.html", "report.json", "tables/surgery.csv"} < set(first)
    assert first == written(run)
    assert torch.equal(state, torch.get_rng_state())
    assert dict(matplotlib.rcParams) == settings
    assert all(torch.equal(before[name], value) for name, value in run.pair.state_dict().items())
    done = [step[0] for step in told]
    assert done == sorted(done)
    assert told[-1] == (told[0][1], told[0][1], "written")
    assert [call.args for call in chosen.call_args_list[-2:]] == [(1,), (2,)]
    stages = {what for _, _, what in told}
    assert set(SECTIONS) < stages
    assert {"fit: importance sampling", "fit: inference gap", "sample quality: sample quality"} < stages


def test_progress_and_interruption_leave_the_old_report(monkeypatch):
    """FAULTS 44."""
    tiny_report("vae")
    run = tiny_run("vae")
    old = written(run)
    monkeypatch.setattr(bars, "waterfall", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        brief(run)
    assert written(run) == old


THERE = {
    "hvae": "surgery guide calibration samples traversals quality probe",
    "vae_normal": "surgery guide calibration samples traversals quality probe",
    "vq_vae": "surgery codes calibration samples quality probe",
    "gan": "training samples quality",
}


@pytest.mark.parametrize("name", THERE)
def test_sections_appear_where_they_mean_something(name):
    page, run = assert_harmless(tiny_report(name)), tiny_run(name)
    found, numbers = headings(run), numbers_of(run)
    assert set(THERE[name].split()) < set(found)
    assert name == "gan" or all(latent in page.text for latent in run.experiment.latents)
    if name == "vq_vae":
        assert "interpolations" not in found
        assert "interpolated" in numbers["missing"]["interpolations"]
        assert any("grid of codes of c" in str(image["alt"]) for image in page.all("img"))
    if name == "gan":
        assert found[:4] == ["glance", "training", "samples", "quality"]
        assert "ELBO" not in "".join(s["text"] for s in numbers["verdict"])
        assert {"two_sample", "fidelity", "distances"} < set(numbers["sample_quality"]["draws"])
        assert "surgery" not in numbers


def test_hostile_text_comes_out_as_text(hostile):
    """FAULTS 38."""
    page = assert_harmless(brief(hostile, figures=True))
    for text in HOSTILE[:4]:
        assert text in page.text
    assert hostile.name in page.text
    for path in (hostile.path / "report").rglob("*"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+", path.name)
        if path.suffix == ".csv":
            for line in csv.reader(path.read_text().splitlines()):
                assert not [c for c in line if c.startswith(("=", "+", "@")) or re.match(r"-[^0-9]", c)]


def test_hand_written_pair_with_vectors_and_no_labels(by_hand):
    page = assert_harmless(brief(by_hand))
    assert all(text in page.text for text in ("hand-written pair", "<b>z</b>"))
    assert not {"traversals", "interpolations", "probe"} & set(headings(by_hand))
    rows = list(csv.DictReader((by_hand.path / "report" / "tables" / "surgery.csv").read_text().splitlines()))
    assert all(not row["term"].startswith(("=", "+", "-", "@")) for row in rows)
    assert any(row["term"].startswith("'=1+1") for row in rows)
    values = {row["term"]: float(row["test"]) for row in rows}
    assert values["elbo"] == pytest.approx(values["reconstruction"] - values["kl"], abs=1e-9)


def test_pair_that_cannot_be_sampled_loses_sections_only(by_hand, monkeypatch):
    monkeypatch.setattr(Pair, "simulate", Mock(side_effect=NotImplementedError("no <i>way</i>")))
    assert "no <i>way</i>" in assert_harmless(brief(by_hand)).text
    assert numbers_of(by_hand)["missing"]["samples"] == "no <i>way</i>"
    assert {"surgery", "samples"} & set(headings(by_hand)) == {"surgery"}


def test_the_skeleton_of_a_section_is_a_whole_section(monkeypatch):
    """The code and words of CONTRIBUTING, as they stand there, make a section with a sentence, a table and numbers."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().split("## Adding a report section")[1]
    said = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    monkeypatch.setitem(WORDS.entries, "hardest", said["hardest"])
    found: dict[str, Any] = {"__name__": "example"}
    exec(compile(text.split("```python\n")[1].split("```")[0], "CONTRIBUTING.md", "exec"), found)  # noqa: S102 - our own
    exam = Examination(tiny_run("vae"))
    page = Document("", "", "", "", {}, Stages().sections({"hardest data": found["hardest"]}, exam), "")
    ((name, least), *_) = page.to_dict()["hardest"]
    assert least == pytest.approx(float(exam.drawn.reconstruction.min()))
    assert exam.drawn.reconstruction[int(name)] == pytest.approx(least)
    assert f"The hardest datum of test has a log p(x | z) of {base.nats(least)} nats." in page.to_html()
    assert found["hardest"](Examination(tiny_run("gan"))) is None


# ---------------------------------------------------------------------- alerts


def test_a_report_of_train_of_a_run_that_was_stopped(tmp_path):
    """Skipped steps and a stopped run are alerts; train has no overfitting gap to itself."""
    shutil.copytree(tiny_run("vae").path, tmp_path / "vae" / "stopped")
    run = Run.load(tmp_path / "vae" / "stopped")
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps({**status, "skipped": 7, "state": "interrupted"}))
    brief(run, split="train")
    found = numbers_of(run)
    alerts = " ".join(s["text"] for s in found["verdict"] if s["alert"])
    assert "7 steps with a NaN or infinite loss were skipped. Lower train.optimizer.lr" in alerts
    assert "Continue it with pvae resume" in alerts
    assert list(found["surgery"]) == ["train"]
    assert found["train_gap"] is None
    with pytest.raises(DeclarationError, match="Expected a split"):
        brief(run, split="tset")


def test_copies_among_good_samples_are_told():
    """A tenth of the samples are training rows: most of the others are as far away as held-out data."""
    generator = torch.Generator().manual_seed(0)
    train, held, fresh = torch.randn(3, 800, 6, generator=generator)
    fresh[:80] = train[:80]
    for drawn, memorised in ((fresh, True), (torch.randn(800, 6, generator=generator), False)):
        assert on_copies({"draws": data_copying(train, held, drawn)}).is_alert == memorised


def test_labels_that_are_numbers_of_rows_are_no_classes(tmp_path):
    x = torch.rand(300, 6, generator=torch.Generator().manual_seed(0)).round()
    run = fitted(Dataset.from_tensors(x, 10**11 + torch.arange(300)), tmp_path, name="ids")
    assert_harmless(brief(run))
    found = numbers_of(run)
    assert "expected 2 to 50 labels" in found["missing"]["probe"]
    assert "principal components" in str(found["sample_quality"])
    assert "label" not in " ".join(s["text"] for s in found["verdict"])


class Shifted(nn.Module):
    """One latent whose codes are all at 0, under a prior somewhere else: it has nothing but holes at `loc` = 9."""

    def __init__(self, loc: float) -> None:
        super().__init__()
        self.loc, self.weight = loc, nn.Parameter(torch.ones(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((2,), self.loc), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.weight * z, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.6).to_event(1))


@pytest.mark.fast("elsewhere")
@pytest.mark.parametrize(("loc", "low", "high"), [(9.0, 0.99, 1.0), (0.0, 0.0, 0.06)], ids=["elsewhere", "the same"])
def test_holes_are_where_the_prior_has_mass_and_codes_have_none(loc, low, high, tmp_path):
    """x ~ N(0, 1) and q(z | x) = N(.8 x, .36) make q_agg = N(0, 1): the prior itself at `loc` = 0: 1 % in holes."""
    data = Dataset.from_tensors(torch.randn(3000, 2, generator=torch.Generator().manual_seed(0)))
    still = "train.epochs=1", "train.optimizer.lr=1e-9"
    run = fit(pair_of(Shifted(loc)), *still, data=data, run_dir=tmp_path, progress=False)
    with pytest.raises(DataError, match="not made of"):
        holes(Examination(run, "train"))
    found = holes(Examination(run))
    assert low <= found.share <= high
    assert found.expected == HOLE


# ---------------------------------------------------------------------- collapse


def test_collapse_finds_the_sleeping_latent():
    pair, x = pair_of(HandWritten(half_asleep=True)), torch.randn(200, 3)
    with torch.no_grad():
        pair.adopt(x)
    found = collapse(pair, x)
    awake, asleep = (found.latents[name] for name in HandWritten.names)
    assert isinstance(found, Collapse)
    assert (awake.active, asleep.active, asleep.idle) == (1, 0, 1)
    assert (asleep.kl_per_dimension, asleep.activity) == ((0.0,), (0.0,))
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


def test_subset_is_seeded_and_says_so():
    x = torch.arange(100.0)[:, None]
    one, two = some(x, 10, 3), some(x, 10, 3)
    assert torch.equal(one.x, two.x)
    assert one.note == "10 of 100 rows, drawn at random"
    assert some(x, 100, 3).note == "100 rows"


def test_mean_of_every_kind_of_observation():
    logits = torch.tensor([[[0.0, 0.0, 0.0]]])
    assert distribution_mean(dist.Categorical(logits=logits).to_event(1)).item() == pytest.approx(1.0)
    assert distribution_mean(dist.Bernoulli(torch.tensor([[0.3]])).to_event(1)).item() == pytest.approx(0.3)
    with pytest.raises(NotImplementedError, match="no mean"):
        distribution_mean(dist.Cauchy(torch.zeros(2, 1), 1.0).to_event(1))


def test_verdict_warns_when_information_stands_at_its_ceiling():
    run = tiny_run("vae")
    taken = surgery(run.pair, run.data.test.x, population=None)
    half, whole = (replace(taken, mutual_information=exact(part * taken.log_n.value)) for part in (0.5, 1.0))
    assert "ceiling" not in " ".join(on_prior(half))
    assert "is close to its ceiling log 60 = 4.09" in " ".join(on_prior(whole))
    assert "not defined" in " ".join(on_prior(replace(taken, mutual_information=None, marginal_kl=None)))


def test_an_interval_is_the_headline_and_without_one_nothing_is_said_of_new_data():
    exam = Examination(tiny_run("vae"), evidence_samples=5)
    shown = {True: SATURATED, False: None}
    for known, population in shown.items():
        held = replace(exam.surgeries["test"], population=population)
        exam.surgeries["test"] = replace(held, mutual_information=exact(4.0))
        page = Document("", "", "", "", {}, Stages().sections({"surgery": SECTIONS["surgery"]}, exam), "")
        text = " ".join(sentence.text for sentence in page.verdict)
        (tile,) = [tile for tile in page.tiles if tile.what in ("better prior, new data", "marginal KL")]
        pictures = {part.id: part.alt for part in page.sections[0].of(Picture)}
        assert ("On new data a better prior wins at least 2.04 ± 0.03 nats" in text) == known
        assert ("below KL − 2 log n" in text) == ("cannot tell the information of new data" in text) == known
        assert ("The marginal KL on these 60 rows is" in text) == (not known)
        assert tile.figure == ("1.98–4.10" if known else base.nats(float(held.marginal_kl or 0)))
        assert (
            ("law_in_n" in pictures) == ("+ a better prior, new data +1.98 to +4.10" in pictures["waterfall"]) == known
        )
        assert page.to_dict()["surgery"]["test"]["population"] == (SATURATED.to_dict() if known else None)
        assert not re.search(r"the most (that )?a better prior|promis", text)


def flat() -> Surgery:
    """A surgery with an ELBO of -8 nats: reconstruction -5, information 2, marginal KL 1."""
    return Surgery(
        n=20, samples=1, latents={}, kl_exact=None, mutual_information_lower=None, marginal_kl_upper=None,
        leave_one_out=None, label_information=None, train_gain=None, elbo=exact(-8.0), reconstruction=exact(-5.0),
        kl=exact(3.0), log_n=exact(3.0), mutual_information=exact(2.0), marginal_kl=exact(1.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "figure", "ends"),
    [
        ({}, "+1.98 to +4.10", [-8.0, -3.9]),
        ({"gain_upper": None}, "+1.98 or more", [-8.0, -6.02]),
        ({"gain": replace(SATURATED.gain, value=-0.3)}, "+0.00 to +4.10", [-8.0, -3.9]),
    ],
    ids=["both ends", "no upper end", "no gain"],
)
def test_a_waterfall_ends_in_what_new_data_win(changes, figure, ends):
    told = replace(flat(), population=replace(SATURATED, **changes))
    (steps,) = bars.waterfall_steps(told)
    assert (steps[-1].figure, steps[-2].label) == (figure, "ELBO")
    made = bars.waterfall([steps])
    low, high = made.axes[0].get_xlim()
    assert all(low < end < high for end in ends)
    assert made.axes[0].get_title("left") == "from reconstruction to the ELBO"


def test_the_law_in_n_stays_in_sight():
    """Leave-one-out of hundreds of nats is left out; ceilings and the last sizes are shown."""
    wild = replace(SATURATED.sizes[0], leave_one_out=exact(630.0))
    axes = curves.law_in_n(replace(SATURATED, sizes=(wild, *SATURATED.sizes[1:]))).axes[0]
    assert axes.get_ylim()[1] < 25
    assert [t.get_text() for t in axes.get_xticklabels()] == ["100", "1000"]


EVENTS = {"image": (1, 6, 4), "colour": (3, 4, 4), "matrix": (5, 4), "vector": (7,), "plane": (2,), "number": (1,)}


@pytest.mark.parametrize("shape", EVENTS.values(), ids=list(EVENTS))
def test_every_event_can_be_shown(shape):
    x = np.random.default_rng(0).random((5, *shape))
    rebuilt = pictures.Rebuilt(r"$\foo$", x, x, np.linspace(-3, -1, 5))
    for made in (pictures.reconstructions([rebuilt], 0, 1), pictures.samples(x, x, 0, 1)):
        assert base.png(made).startswith(b"\x89PNG")


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("exact", [True, False], ids=["normal prior", "sampled prior"])
def test_every_latent_can_be_shown(dim, exact):
    """FAULTS 38."""
    draws = np.random.default_rng(0).normal(size=(50, dim))
    normal = (np.zeros(dim), np.ones(dim)) if exact else None
    cloud = clouds.Cloud(r"$\foo$ [red] 潜", draws, draws, draws, normal)
    for labels in (None, np.arange(50) % 3, np.arange(50)):
        assert base.png(clouds.plane(cloud, labels, HOSTILE)).startswith(b"\x89PNG")


def test_figures_carry_no_date_and_no_program():
    rows = [{"epoch": 1, "split": "train", "elbo": -1.0, "kl/z": None, "beta": 1.0}]
    one, two = (base.png(curves.training(rows, ["z"])) for _ in range(2))
    assert one == two
    assert b"Software" not in one
    assert b"tIME" not in one


def test_leading_directions_are_those_of_the_covariance():
    means = np.random.default_rng(0).normal(size=(400, 3)) * [1.0, 5.0, 2.0]
    _, directions, shares = clouds.leading(means)
    assert np.abs(directions).argmax(0).tolist() == [1, 2]
    assert (directions[np.abs(directions).argmax(0), range(2)] > 0).all()
    assert shares.sum() == pytest.approx(29 / 30, abs=0.02)
