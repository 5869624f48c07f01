"""Hand-written pairs on the command line, `FILE.py:PAIR`: what is said is what Python says, and errors are in words."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from pvae import analysis
from pvae.cli.handwritten import load_pair
from tests.cli_runner import run_cli

PROGRAM = """
    import pyro, torch, pvae
    import pyro.distributions as dist
    from helper import SCALE

    def model(x{more}):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0] + z[:, 1]{shift}, SCALE), obs=x)

    def guide(x{more}):
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x[:, None].expand(-1, 2), 0.75).to_event(1))

    pair = pvae.Pair(model, guide)
    other = 3
"""
ONE = {"more": "", "shift": ""}
SEVERAL = {"more": ", label", "shift": " + 0.5 * label"}
SHORT = ("--samples", "20")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with two programs, their helper, and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("SCALE = 1.0\n")
    for name, parts in {"one": ONE, "several": SEVERAL}.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(PROGRAM.format(**parts)))
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).numpy()
    np.save("x.npy", x)
    np.savez("x.npz", x=x)
    np.savez("both.npz", x=x, label=np.arange(40) % 2)
    np.savez_compressed("squeezed.npz", x=x)
    whole, squeezed = bytearray(Path("x.npz").read_bytes()), bytearray(Path("squeezed.npz").read_bytes())
    middle = len(squeezed) // 3
    squeezed[middle : middle + 40] = b"\xff" * 40
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    Path("flipped.npz").write_bytes(squeezed)
    Path("header.npy").write_bytes(b"\x93NUMPY\x01\x00\x02\x00{(" + bytes(160))
    yield tmp_path
    pyro.clear_param_store()


def figure_in(text: str, name: str) -> float:
    """A figure of the table that a command prints."""
    return float(re.search(rf"{name}[^-\d]+(-?\d+\.\d+)", text)[1])


@pytest.mark.parametrize("data", ["x.npy", "x.npz"])
def test_surgery_of_a_file(files, data):
    out, _ = run_cli("surgery", "one.py:pair", "--data", data, "--samples", "3")
    want = analysis.surgery(load_pair("one.py:pair"), torch.from_numpy(np.load("x.npy")), samples=3).elbo.value
    assert figure_in(out, "elbo") == pytest.approx(want, abs=2e-4)


def test_evidence_of_a_file_of_several_arguments(files):
    out, _ = run_cli("evidence", "several.py:pair", "--data", "both.npz", "--samples", "50")
    arrays = np.load("both.npz")
    data = {"x": torch.from_numpy(arrays["x"]), "label": torch.from_numpy(arrays["label"])}
    want = analysis.evidence(load_pair("several.py:pair"), data, samples=50).iwae.value
    assert figure_in(out, "iwae_50") == pytest.approx(want, abs=2e-4)


def test_a_fitted_file_says_how_to_load_it_and_is_analysed_by_its_run(files):
    run_cli("fit", "one.py:pair", "train.epochs=2", "--data", "x.npy")
    out, err = run_cli("surgery", "latest", "--samples", "2", code=65)
    assert "--pair one.py:pair --data x.npy" in out + err
    run_cli("surgery", "latest", "--pair", "one.py:pair", "--data", "x.npy", "--samples", "2")


@pytest.mark.parametrize(
    ("command", "words", "code"),
    [
        (("surgery", "one.py:other", "--data", "x.npy"), "pvae.Pair", 2),
        (("surgery", "one.py:missing", "--data", "x.npy"), "pvae.Pair", 2),
        (("surgery", "absent.py:pair", "--data", "x.npy"), "absent.py", 2),
        (("surgery", "one.py:pair", "--data", "absent.npy"), "absent.npy", 65),
        (("surgery", "one.py:pair"), "data", 65),
        (("evidence", "several.py:pair", "--data", "x.npy"), "label", 2),
        (("evidence", "one.py:pair", "--data", "both.npz"), "label", 65),
        (("surgery", "one.py:pair", "--data", "cut.npz"), "cut.npz: expected arrays of numbers", 65),
        (("surgery", "one.py:pair", "--data", "flipped.npz"), "flipped.npz: expected arrays of numbers", 65),
        (("surgery", "one.py:pair", "--data", "header.npy"), "header.npy: expected arrays of numbers", 65),
    ],
    ids=[
        "no pair", "no name", "no file", "no data file", "no data", "one argument too few", "one too many", "cut",
        "flipped bytes", "broken header",
    ],
)  # fmt: skip
def test_errors_are_in_words(files, command, words, code):
    out, err = run_cli(*command, code=code)
    assert words in out + err
    assert "Traceback" not in out + err


def test_an_error_in_the_file_names_its_line(files):
    (files / "broken.py").write_text("import pyro\nraise_here = undefined\n")
    out, err = run_cli("surgery", "broken.py:pair", "--data", "x.npy", code=2)
    assert "broken.py:2" in out + err
    assert "'undefined'" in out + err
