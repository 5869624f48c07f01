"""Page of the audit of an autoencoder that pvae did not fit: its figures, and pictures of latents and data."""

from collections.abc import Iterator

import numpy as np

from pvae.analysis.audits.audit import Audit
from pvae.analysis.pages.document import blocks, document, words
from pvae.analysis.pages.plots import base, pictures
from pvae.analysis.pages.plots.clouds import Cloud, plane
from pvae.analysis.samples.features import is_image


def page_of(found: Audit, name: str) -> document.Document:
    """Return the page of an audit; `name` names encoder and decoder."""
    sections = tuple(filter(None, [_audited(found)]))
    return document.Document("pvae audit", found.title, "", name, found.to_dict(), sections, words.text("page.nats"))


@words.section("audited")
def _audited(found: Audit) -> Iterator[blocks.Part]:
    """Yield remarks, all figures, and pictures."""
    yield from found.remarks
    yield words.table_of("audited", found)
    if "elements" in found.pictures:
        unit = (base.array(found.pictures["elements"]) - found["shift"].value) * found["scale"].value
        normal = np.random.default_rng(0).standard_normal((len(unit), 1))
        yield words.picture("audited.histogram", plane(Cloud("unit latents", unit[:, None], unit[:, None], normal)))
    if is_image(found.event):
        data, means = (base.array(found.pictures[key]) for key in ("data", "means"))
        shown = pictures.Rebuilt("", data, means, ((data - means) ** 2).reshape(len(data), -1).sum(1))
        yield words.picture("audited.reconstructions", pictures.reconstructions([shown], data.min(), data.max()))
