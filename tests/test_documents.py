"""CONTRIBUTING says what is there: the Pyro script of a VAE, a line for every room, a row for every family."""

import re
from pathlib import Path

from pvae import Experiment
from tests.drawn import families
from tests.test_package import arrows

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_pyro_script_is_the_one_that_pvae_prints():
    assert f"```python\n{Experiment.load('vae').to_pyro().strip()}\n```" in CONTRIBUTING


def test_every_room_is_drawn():
    drawn = CONTRIBUTING.split("## The rooms")[1].split("```")[1]
    for top in (ROOT / "pvae", ROOT / "models", ROOT / "guides", ROOT / "analysis"):
        for folder in (path.parent for path in top.rglob("__init__.py") if not path.parent.is_symlink()):
            name = folder.relative_to(ROOT).as_posix()
            if folder.parent in (ROOT, ROOT / "pvae"):
                assert re.search(rf"^{name}[/, ]", drawn, re.M), name
            elif folder.parent.parent == ROOT or folder.parent.parent == ROOT / "pvae":
                part = re.search(rf"^{name.rpartition('/')[0]}/.*(\n  .*)*", drawn, re.M)
                assert part is not None, name
                assert f"{folder.name}/" in part[0], name


def test_rooms_import_from_those_drawn_above_them():
    drawn = CONTRIBUTING.split("## The rooms")[1].split("```")[1]
    order = [name.removesuffix(".py") for name in re.findall(r"^(?:pvae/)?(\w+(?:\.py)?)", drawn, re.M)]
    for room, others in arrows().items():
        for other in others:
            below, above = room.split(".")[1], other.split(".")[1]
            assert order.index(above) <= order.index(below), f"{room} imports from {other}, which is drawn below it"


def test_the_empirical_marginal_kl_is_called_no_promise():
    """An interval says what a better prior wins on new data; KL - I_n on n rows does not."""
    folders = [ROOT / name for name in ("pvae", "models", "guides", "analysis")]
    texts = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.*"))]
    texts = [path for path in texts if path.suffix in (".py", ".md", ".toml", ".j2")]
    assert len(texts) > 300
    for path in texts:
        text = " ".join(path.read_text().split())
        found = re.search(r"(?i)\bmost (that )?a better prior|marginal KL\W+(had )?promise|beside promise", text)
        assert found is None, f"{path.relative_to(ROOT)}: {text[max(found.start() - 40, 0) : found.end() + 40]}"


def test_every_family_of_members_has_a_row_that_names_what_is_there():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", CONTRIBUTING.split("## Adding a member")[1], re.M))
    shipped = {family.__name__: family for family in families() if family.__module__.startswith("pvae.")}
    assert rows.keys() == shipped.keys()
    for name, row in rows.items():
        where, methods, table = row.split(" | ")
        place = where.strip("`")
        source = place if place.startswith("pvae/") else f"pvae/{place}"
        members = shipped[name].members.values()
        assert any(m.__module__.replace(".", "/").startswith(source.removesuffix(".py")) for m in members), name
        assert all(hasattr(member, method) for member in members for method in re.findall(r"`(\w+)`", methods)), name
        for path in re.findall(r"`([\w/]+(?:/|\.py))`", table):
            assert (ROOT / path).exists(), path
        for constant, path in re.findall(r"`(\w+)` in `([\w/.]+)`", table):
            assert re.search(rf"^{constant}\b.* = ", (ROOT / path).read_text(), re.M), f"{constant} in {path}"
