"""CONTRIBUTING says what is there: the Pyro script of a VAE, and a line for every room."""

import re
from pathlib import Path

from pvae import Experiment

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
                line = re.search(rf"^{name.rpartition('/')[0]}/.*", drawn, re.M)
                assert line is not None, name
                assert f"{folder.name}/" in line[0], name
