"""The explorer in headless Chromium, with the mouse, at two widths: hover, lasso, sliders, colours."""

import csv
import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from playwright.sync_api import Browser, Page
from torch import nn

import pvae
from pvae.analysis import explore
from pvae.analysis.pages import explorer
from pvae.analysis.pages.explorer import Display, _axes
from pvae.analysis.samples.encode import encode
from pvae.analysis.samples.traversal import decode, traverse
from pvae.errors import DataError, DeclarationError
from pvae.runs.run import Run
from pvae.training.fit import kept_as_it_is
from tests.browser import WATCH, WIDTHS, opened
from tests.cli_runner import run_cli_json
from tests.zoo_runs import FOLDER, tiny_run

LABELS = ("<b>old</b>", "</script><script>alert(1)</script>", "=1+1")
NORMAL, COLUMNS = {"kind": "normal"}, {"kind": "columns"}
ONCE = {"epochs": 1, "engine": "eager"}
VENDOR = Path(explorer.__file__).parent / "document" / "templates" / "vendor" / "echarts"


@cache
def images() -> Path:
    """The explorer of a VAE of digits."""
    return explore(tiny_run("vae"), samples=5)


@cache
def people() -> Run:
    """A run of a table with a covariate, whose words and names mean harm."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 200)
    table = pandas.DataFrame(
        {
            "age <i>": 20 + 15 * kind + rng.normal(0, 4, 200),
            "visits": rng.poisson(1 + kind),
            "town": np.array(["Bern", "<u>Rome</u>", "@Oslo"])[kind],
            "group": np.array(LABELS)[kind],
            "plate": np.where(rng.random(200) < 0.5, "a", "b"),
        }
    )
    declared = {
        "name": "people",
        "latents": {"z": {"dim": 2}},
        "data": {
            "source": "frame",
            "label": "group",
            "columns": {
                "age <i>": {"type": "continuous"},
                "visits": {"type": "count"},
                "town": {"type": "categorical", "levels": sorted({*table["town"]})},
            },
        },
        "covariates": {"batch": {"levels": ["a", "b"], "of": "plate"}},
        "encoder": {"network": {"kind": "mlp", "hidden": [8]}},
        "decoder": {
            "network": {"kind": "mlp", "hidden": [8]},
            "given": ["z", "batch"],
            "likelihood": {"kind": "columns"},
        },
        "train": {"epochs": 2, "batch_size": 50, "engine": "eager"},
    }
    plan = pvae.Experiment.from_dict(declared)
    return pvae.fit(plan, data=table, run_dir=FOLDER.name, device="cpu", progress=False)


def told(page: Path) -> dict[str, Any]:
    """Return the data that a page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    held: dict[str, Any] = json.loads(found[1])
    return held


@contextmanager
def visited(chromium: Browser, path: Path, width: str = "desktop") -> Iterator[Page]:
    """A page whose map is drawn; it must log no error, break no rule of its policy, and request nothing."""
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    context, faults = chromium.new_context(viewport=size), list[str]()  # type: ignore[arg-type]
    try:
        page = context.new_page()
        page.add_init_script(WATCH)
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: faults.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(path.resolve().as_uri(), timeout=90_000)
        page.wait_for_selector("body[data-drawn]", timeout=90_000)
        yield page
        assert [*faults, *page.evaluate("window.violations || []")] == []
    finally:
        context.close()


def on_map(page: Page, point: Any) -> tuple[float, float]:
    """Return the position of a point of the map on the screen."""
    page.locator("#map").scroll_into_view_if_needed()
    find = "echarts.getInstanceByDom(document.getElementById('map')).convertToPixel({xAxisIndex: 0, yAxisIndex: 0}, p)"
    x, y = page.evaluate(f"(p) => {find}", [float(v) for v in point])
    box = page.locator("#map").bounding_box()
    assert box is not None
    return box["x"] + x, box["y"] + y


def hover(page: Page, point: Any) -> dict[str, str]:
    """Move the mouse to a point; what the page then says of its row."""
    x, y = on_map(page, point)
    page.mouse.move(x - 40, y - 40)
    page.mouse.move(x, y, steps=4)
    page.wait_for_selector("#row dl")
    names, values = (page.locator(f"#row {tag}").all_text_contents() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def lasso(page: Page, low: Any, high: Any) -> None:
    """Draw a rectangle around the points from `low` to `high`."""
    (left, bottom), (right, top) = on_map(page, low), on_map(page, high)
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top + 1)]
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*corner, steps=8)
    page.mouse.up()
    page.wait_for_selector("#listed table")


def pixels(page: Page, canvas: str) -> np.ndarray:
    """The grey values of a canvas, once its picture is drawn."""
    read = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
    page.wait_for_timeout(50)
    width, *values = page.locator(canvas).evaluate(f"(c) => [c.width, ...{read}.filter((_, i) => i % 4 === 0)]")
    return np.array(values).reshape(-1, width)


def lonely(points: np.ndarray) -> int:
    """The number of the point that lies farthest from all others."""
    apart = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(len(points))
    return int(apart.min(1).argmax())


def gap(values: np.ndarray, at: float) -> float:
    """The middle of the widest gap between values near the quantile `at`."""
    ordered = np.sort(values)
    near = ordered[int((at - 0.15) * len(values)) : int((at + 0.15) * len(values))]
    k = int(np.diff(near).argmax())
    return float(near[k : k + 2].mean())


def mapped(run: Run) -> np.ndarray:
    """The first two axes of the map of the test rows."""
    z = encode(run, run.data.test.rows, mean=True)["z"].numpy()
    return np.stack([*_axes("z", z)[1].values()][:2], 1)


@pytest.mark.parametrize("kind", ["images", "table"])
def test_a_page_has_no_fault_in_any_view(chromium: Browser, kind: str) -> None:
    page = images() if kind == "images" else explore(people(), samples=5)
    assert opened(chromium, page).faults == ()


@pytest.mark.parametrize("width", WIDTHS)
def test_images_under_the_mouse_in_a_lasso_and_decoded(chromium: Browser, tmp_path: Path, width: str) -> None:
    run = tiny_run("vae")
    points, test = mapped(run), run.data.test
    i = lonely(points)
    with visited(chromium, images(), width) as page:
        assert page.locator("#legend").text_content() == "0123456789"
        said = hover(page, points[i])
        assert test.words is not None
        assert (said["row"], said["label"]) == (str(test.numbers[i]), test.words[i])
        assert "−" in said["log p(x)"]
        assert ((pixels(page, "#row canvas") > 127) == (test.x[i, 0].numpy() > 0.5)).mean() > 0.95

        low, high = (np.array([gap(axis, at) for axis in points.T]) for at in (0.3, 0.8))
        lasso(page, low, high)
        inside = ((points > low) & (points < high)).all(1)
        assert page.locator("#selected").text_content() == f"{inside.sum()} of {len(test)} rows."
        assert page.locator("#gallery canvas").count() == inside.sum()
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save as CSV").click()
        saved.value.save_as(tmp_path / "rows.csv")
        rows = [*csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())]
        assert [int(row["row"]) for row in rows] == test.numbers[inside].tolist()
        assert np.allclose([float(row["direction 1"]) for row in rows], points[inside, 0], atol=1e-5)

        before, slider = pixels(page, "#decoded canvas"), page.get_by_role("slider").nth(1)
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
        assert slider.input_value() == "14"
        z = encode(run, test.rows, mean=True)["z"].numpy()
        means = decode(run, "z", torch.from_numpy(_axes("z", z)[2]["z"]).float())
        after = pixels(page, "#decoded canvas")
        assert np.abs(after - before).max() > 5
        assert np.abs(after / 255 - means[7 * 15 + 14, 0].numpy()).mean() < 0.03


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_a_table_and_colours(chromium: Browser, tmp_path: Path, width: str) -> None:
    run = people()
    path, points = explore(run, samples=5, out=tmp_path / "people.html"), mapped(run)
    assert all(text not in path.read_text() for text in (*LABELS[:2], "<u>Rome", "<i>"))
    i, test = lonely(points), run.data.test
    with visited(chromium, path, width) as page:
        assert test.words is not None
        said, row = hover(page, points[i]), run.transforms.to_frame(test.data).iloc[i]
        assert {said[name] for name in ("label", "town")} == {test.words[i], row["town"]}
        assert float(said["age <i>"]) == pytest.approx(row["age <i>"], rel=1e-3)
        assert said["batch"] in ("a", "b")
        legend = page.locator("#legend")
        assert sorted(legend.locator("span").all_text_contents()) == sorted({*test.words})
        page.locator("#colour").select_option(label="age <i>")
        low, high = (float(end) for end in legend.locator("span:not(.scale)").all_text_contents())
        ages = np.sort(run.transforms.to_frame(test.data)["age <i>"])
        ends = [ages[round(q * (len(ages) - 1))] for q in (0.01, 0.99)]
        assert (low, high) == pytest.approx(ends, rel=1e-2)
        page.locator("#colour").select_option(label="batch")
        assert legend.locator("span").all_text_contents() == ["a", "b"]
        page.locator("#across").select_option(label="log p(x)")
        assert page.locator("#selected").text_content() == "None: draw a line around some points of the map."
        page.get_by_role("slider").first.press("End")
        assert page.locator("#decoded dd").count() == 3
        page.get_by_role("button", name="Move", exact=True).click()
        assert page.locator("#pan").get_attribute("aria-pressed") == "true"


SENT = {
    "discrete": "vq_vae",
    "hierarchy": "hvae",
    "conditional": "conditional",
    "flow": "flow",
    "mixture": "em_mixture",
}


@pytest.mark.parametrize("kind", SENT)
def test_what_is_decoded_of_every_kind_of_latent(kind: str, tmp_path: Path) -> None:
    held = told(explore(tiny_run(SENT[kind]), samples=2, rows=20, out=tmp_path / "page.html"))
    names = [column["name"] for column in held["columns"] if column["group"] == "coordinates"]
    assert held["count"] == 20
    assert [slider["name"] for slider in held["sliders"]] == names
    if kind in ("discrete", "mixture"):
        assert "decoded" not in held
        assert "is discrete" in held["why"]
    else:
        assert "why" not in held
        assert len(held["decoded"]["columns"]) == len(names)


def test_axes_decode_both_together_and_the_others_alone() -> None:
    z = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 3.0, 2.0] + [5.0, 0.0, 0.0]
    sliders, places, points = _axes("z", z)
    assert [slider["name"] for slider in sliders] == ["direction 1", "direction 2", "z[0]", "z[1]", "z[2]"]
    assert points["z"].shape == (15 * 15 + 3 * 15, 3)
    joint = np.stack([points["direction 1"], points["direction 2"]], 1)[:225].reshape(15, 15, 2)
    assert np.allclose(joint[4, 9], [sliders[0]["values"][4], sliders[1]["values"][9]])
    alone = points["z"][225 + 15 : 225 + 30]
    assert np.allclose(alone[:, 1], sliders[3]["values"])
    assert np.allclose(alone[:, [0, 2]], z.mean(0)[[0, 2]])
    assert np.allclose(places["z[2]"], z[:, 2])
    assert np.allclose(places["direction 1"].mean(), 0)


@pytest.mark.parametrize("dim", [1, 2])
def test_axes_of_few_coordinates_are_these(dim: int) -> None:
    z = np.random.default_rng(0).normal(size=(50, dim))
    sliders, places, points = _axes("z", z)
    assert [*places] == [slider["name"] for slider in sliders] == ["z[0]", "z[1]"][:dim]
    assert points["z"].shape == (15**dim, dim)


def test_decoded_means_are_those_of_a_traversal() -> None:
    run = tiny_run("vae")
    found = traverse(run, None, "z", dims=[3], steps=5)
    z = torch.zeros(5, found.values.shape[1] and 16)
    z[:, 3] = found.values[0]
    assert torch.allclose(decode(run, "z", z), found.x[0], atol=1e-6)


def test_thumbnails_shrink_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("vae")
    display = Display(run, run.data.test, torch.arange(60))
    noise = torch.rand(60, 3, 96, 48)
    thumbnails = display.of(noise)
    assert thumbnails.shape == (60, 3, 48, 24)
    whole = display.told(thumbnails)
    assert (whole["height"], whole["width"], len(whole["sheets"])) == (48, 24, 1)
    monkeypatch.setattr(explorer, "PICTURE_BYTES", 5000)
    small = display.told(thumbnails)
    assert small["height"] < 40
    assert sum(map(len, small["sheets"])) < 5000 * 4 / 3 + 50


def test_wide_codes_and_wide_data_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(explorer, "NUMBERS", 20 * 16)
    assert told(explore(tiny_run("vae"), samples=2, out=tmp_path / "page.html"))["count"] == 20
    run = tiny_run("flow")
    monkeypatch.setattr(explorer, "CELLS", 100)
    assert Display(run, run.data.test, torch.arange(20)).kept == [0, 1]
    monkeypatch.setattr(explorer, "CELLS", 20)
    assert len(Display(run, run.data.test, torch.arange(20)).kept) == 1


def test_a_signal_is_drawn_as_a_line(chromium: Browser, tmp_path: Path) -> None:
    x = torch.randn(80, 60).cumsum(1)
    plan = pvae.Experiment.from_dict(
        {
            "latents": {"z": {"dim": 1}},
            "decoder": {"likelihood": {"kind": "normal"}},
            "train": {"epochs": 1, "engine": "eager"},
        }
    )
    run = pvae.fit(plan, data=x, run_dir=tmp_path, device="cpu", progress=False)
    held = told(page := explore(run, split="all", samples=2))
    assert [column["name"] for column in held["data"]["columns"]] == [f"x[{i}]" for i in range(60)]
    with visited(chromium, page) as shown:
        assert shown.locator("#up option:checked").text_content() == "log p(x)"
        drawn = pixels(shown, "#decoded canvas")
        assert drawn.shape == (120, 320)
        assert (drawn > 0).any(0).mean() > 0.95


class Sorted(nn.Module):
    """A hand-written pair of one code."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.read = nn.Parameter(torch.zeros(2)), nn.Linear(2, 2)

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(c[:, None].float(), 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.read(x)))


def test_what_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    both = Sorted()
    run = kept_as_it_is(pvae.Pair(model=both.model, guide=both.guide), torch.randn(40, 2), tmp_path)
    with pytest.raises(DataError, match="codes c of a hand-written pair"):
        explore(run)
    with pytest.raises(DataError, match="without a likelihood"):
        explore(tiny_run("gan"))
    with pytest.raises(DeclarationError, match="expected one of z; got 'y'"):
        explore(tiny_run("vae"), latent="y")


def test_the_library_is_that_of_its_package() -> None:
    script = (VENDOR / "echarts.min.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() in (VENDOR / "README.md").read_text()
    assert {path.name for path in VENDOR.iterdir()} == {
        "LICENSE",
        "LICENSE-d3",
        "NOTICE",
        "README.md",
        "echarts.min.js",
    }


def test_new_rows_of_a_file_are_mapped(tmp_path: Path) -> None:
    run, new = people(), tmp_path / "new.csv"
    pandas.DataFrame(
        {
            "age <i>": [20.0, 50.0, 35.5],
            "visits": [1, 3, 2],
            "town": ["Bern", "@Oslo", "Bern"],
            "plate": ["a", "b", "b"],
        }
    ).to_csv(new, index=False)
    asked = ["explore", str(run.path), "--data", str(new), "--samples", "2"]
    page = Path(run_cli_json(*asked)["file"])
    assert page == run.files.analysis / "explorer-new.html"
    held = told(page)
    ages = next(column for column in held["data"]["columns"] if column["name"] == "age <i>")
    np.testing.assert_allclose(np.frombuffer(b64decode(ages["values"]), np.float32), [20.0, 50.0, 35.5], rtol=1e-6)
    first = next(column for column in held["columns"] if column["name"] == "z[0]")
    z = encode(run.pair, run.rows(new).rows, mean=True)["z"][:, 0]
    np.testing.assert_allclose(np.frombuffer(b64decode(first["values"]), np.float32), z, rtol=1e-5)


def test_progress_is_told_and_the_seed_decides(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run = tiny_run("vae")
    first = explore(run, rows=20, samples=2, out=tmp_path / "a.html", on_progress=lambda *at: seen.append(at))
    assert seen == [(20, 20)]
    assert explore(run, rows=20, samples=2, out=tmp_path / "b.html").read_bytes() == first.read_bytes()
    assert explore(run, rows=20, samples=2, seed=1, out=tmp_path / "c.html").read_bytes() != first.read_bytes()


@pytest.mark.slow
def test_20_000_images_are_a_small_page_that_opens_fast(chromium: Browser, tmp_path: Path) -> None:
    corner = torch.rand(20_000, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = (corner + 0.2 * torch.rand(20_000, 1, 28, 28)).clamp(0, 1)
    declared = {"latents": {"z": {"dim": 8}}, "decoder": {"likelihood": NORMAL}, "train": ONCE}
    plan = pvae.Experiment.from_dict(declared)
    run = pvae.fit(plan, data=(x, torch.arange(20_000) % 10), run_dir=tmp_path, device="cpu", progress=False)
    page = explore(run, split="all", samples=1)
    assert told(page)["count"] == 20_000
    assert page.stat().st_size < 15e6
    seconds = []
    for _ in range(2):
        with visited(chromium, page) as shown:
            asked = shown.context.new_cdp_session(shown)
            asked.send("Performance.enable")
            found = {metric["name"]: metric["value"] for metric in asked.send("Performance.getMetrics")["metrics"]}
            seconds.append(found["ProcessTime"])
    assert min(seconds) < 3, "seconds of a processor until the map is drawn, whatever else the machine does"
