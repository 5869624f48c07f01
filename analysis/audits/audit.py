"""Audit of an autoencoder that pvae did not fit, from its encoder, its decoder and rows of data."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from pvae.analysis.audits.foreign import Encoded, Foreign, LikelihoodName
from pvae.analysis.decompose.codes import duplicates
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate, Figures, Row, exact, misdeclared, over_rows, refuse, text
from pvae.analysis.samples.features import affordable
from pvae.component import Shape
from pvae.data.sources.python import as_array
from pvae.pair import SILENT, Pair, in_use, quiet
from pvae.util import seeds

FEWEST, ROWS = 40, 10_000
"""Smallest number of rows that are examined, and largest one unless another is asked for."""
JOINT_STATES, WIDE_ROWS = 2**22, 500
"""Largest number of codes times positions whose information is computed; number of rows for that of latents of more
than 512 coordinates or positions, which tell all rows apart."""
PICTURED, SHOWN = 100_000, 8
"""Largest numbers of elements of latents, and of reconstructions, in pictures."""
CHANNELS = 64
"""Largest number of channels that have figures of their own."""
COORDINATES = 512
"""Largest number of coordinates whose moments and correlations are computed: of more, evenly spaced ones."""
NEIGHBOUR_ROWS, NEIGHBOUR_WORK = 5000, 2e10
"""Largest number of rows among which neighbours are sought, and of multiplications that this may take."""
SHARED_NEIGHBOURS = 1.3
"""Factor of the error of an intrinsic dimension, as rows share their neighbours: 1.15 to 1.35 in 1 to 5 dimensions."""


class Audit(Figures):
    """Figures of an autoencoder that pvae did not fit, by name: `found["scale"]` is an `Estimate`, None if unknown.

    Where posteriors are normals, figures of coordinates are those of one sample for every row:

    - `shift`, `scale`: samples of the latents are unit after (z - shift) * scale; `shift.c`, `scale.c`: of channel c
      where there are at most 64
    - `active`: coordinates whose mean has a variance above 0.01 (of points: above 1 % of the average one)
    - `dimension`, `data_dimension`: intrinsic dimension of the means, and of the data (`intrinsic_dimension`)
    - `skewness`, `kurtosis`, `distance`: means over coordinates of |skewness|, excess kurtosis, and the distance of
      Kolmogorov and Smirnov to a normal, which is about 0.6 / sqrt(n) for a normal itself
    - `gaussian_correlation`: total correlation of a normal of their covariance, nats, and the largest `correlation`;
      all of these of at most 512 coordinates, evenly spaced
    - `codes`, `used`, `dead`, `duplicates`: numbers of codes; duplicates have nearly the vector of another one
    - `mse`, `mse.c`: mean squared error of an element of the reconstruction, by channel c of images
    - the rows of the surgery: information and marginal KL in nats, the interval on new data, perplexity, and under the
      likelihood the ELBO and bits per dimension (of a density for a normal one)
    - `log_likelihood`: log p(x | z), nats, of points without noise, which bounds nothing
    """

    n: int
    """Number of rows examined."""
    shape: Shape
    """Shape of the latents, or of the grid of codes."""
    event: Shape
    """Shape of a row of data."""
    likelihood: str
    scale: float | None
    """Scale of the likelihood, given or fitted."""
    pair: Pair
    """Encoder and decoder as a pair, for other analyses: `pvae.analysis.evidence(found.pair, x)`."""
    found: Sequence[Row]
    """Figures of latents, codes and reconstructions."""
    surgery: Surgery | None
    """Information and marginal KL, and the ELBO; None for points, and for too many codes."""
    coordinates: Mapping[str, Sequence[float]]
    """Figures by coordinate, channels first: variance of the mean (KL: `surgery.latents["z"].kl_per_dimension`); of
    varying coordinates (at most 512, evenly spaced) skewness, kurtosis and distance to a normal. Of codes, their
    proportions, `share`."""
    pictures: Mapping[str, Tensor]
    """Elements of the latents, data and reconstructions."""

    def __getitem__(self, name: str) -> Any:
        return next((figure for term, figure, _ in self.rows() if term == name), None)

    def rows(self) -> Iterator[Row]:
        yield from self.found
        yield from () if self.surgery is None else self.surgery.rows()

    @property
    def remarks(self) -> tuple[str, ...]:
        return (text("audit.no_nats"),) if self.surgery is None else self.surgery.remarks

    def to_dict(self) -> dict[str, Any]:
        """Return counts, figures, figures by coordinate, and remarks as plain values for JSON."""
        return self.nested(coordinates=self.coordinates, remarks=self.remarks)


def audit(
    encode: Callable[[Tensor], Any], decode: Callable[[Tensor], Tensor], data: Any, *, noise: float | None = None,
    likelihood: LikelihoodName = "normal", scale: float | None = None, levels: int = 256,
    codes: int | Tensor | None = None, rows: int | None = None, seed: int = 0,
) -> Audit:  # fmt: skip
    """Return figures of an autoencoder that pvae did not fit.

    `encode` maps a batch `(m, *event)` to points `(m, *shape)`, to a normal distribution of torch, to a tuple (mean,
    log-variance), or to integer codes `(m, *grid)`, alone or in a tuple with the quantised vectors. `decode` maps
    latents (quantised vectors, where there are some) to the means of x. Modules behind the two functions are in
    evaluation mode meanwhile and stay on their device. The axis of channels is the first of latents (C, H, W), the last
    of (T, C) and (C,).

    Information and marginal KL are those of an N(0, I) prior, or of a uniform one over codes. Points have none unless
    `noise` declares their deviation. Latents of more than 512 coordinates (or positions) tell all rows apart: their
    surgery is that of 500 rows, without an interval on new data. The rows should be ones that the autoencoder was not
    fitted on: the interval on new data assumes it.

    The adapters of some layouts of classes:

        # diffusers, AutoencoderKL
        def encode(x):
            found = vae.encode(x).latent_dist
            return found.mean, found.logvar
        def decode(z): return vae.decode(z).sample

        # pythae, VAE
        def encode(x):
            found = model.encoder(x)
            return found.embedding, found.log_covariance
        def decode(z): return model.decoder(z).reconstruction

        # scvi-tools, module of a fitted SCVI; one batch of cells, expected counts at the library size of the batch 0
        def encode(x): return module.inference(x, torch.zeros(len(x), 1), None)["qz"]
        def decode(z):
            library, batch = torch.full((len(z), 1), 8.0), torch.zeros(len(z), 1)
            return module.generative(z, library, batch)["px"].mean

        # vector-quantize-pytorch, between an encoder and a decoder
        def encode(x): return vq(encoder(x))
        def decode(quantised): return decoder(quantised)

    Arguments:
        encode: the encoder.
        decode: the decoder.
        data: rows `(n, *event)`, a tensor or an array (also one in a file, `numpy.load(..., mmap_mode="r")`).
        noise: standard deviation of the latents around points, in their own unit.
        likelihood: distribution of x around the decoder's mean: "normal", "bernoulli" or "discretized_logistic".
        scale: standard deviation of the normal, or scale of the logistic; default: that of the errors of
            reconstructions of sampled latents, on half of the rows.
        levels: number of grey values k / (levels - 1) in [0, 1] of a discretized logistic.
        codes: number K of codes, or the codebook `(K, d)`; default: the largest code found, plus one.
        rows: number of rows, chosen at random; default: all, at most 10 000 and as many as memory allows.
        seed: seed of the choice of rows and of all samples.

    Returns:
        Audit, whose rows are figures with their kind and error: `found["scale"]`.

    Raises:
        DataError: there are fewer than 40 rows, or encoder or decoder give something else than is expected.
        DeclarationError: `encode` or `decode` is no function.

    Example:
        >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> found = audit(lambda x: 4 * x, lambda z: z / 4, x)
        >>> abs(found["scale"].value * 4 * float(x.std()) - 1) < 1e-3
        True
    """
    misdeclared(not callable(encode) or not callable(decode), "refused.functions", encode=encode, decode=decode)
    array = as_array(data, "data")
    refuse(not array.shape or array.shape[0] < FEWEST, "refused.few_audited", array=array, least=FEWEST)
    chosen = seeds.subset(array.shape[0], rows or affordable(ROWS, tuple(array.shape[1:])), seed)
    x = torch.as_tensor(array[chosen.numpy()])[seeds.permutation(len(chosen), seed, 0)].float()
    event, found = tuple(x.shape[1:]), list[Row]()
    program = Foreign(encode, decode, noise, likelihood, scale, levels)
    pair, coordinates, pictures = Pair(program.model, program.guide), dict[str, Tensor](), dict[str, Tensor]()
    with quiet(pair, x):
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS), x.device)
        encoded = program.encoded(x)
        if encoded.loc.is_floating_point():
            found += _of_latents(encoded, coordinates, pictures)
        if encoded.index is not None:
            found += _of_codes(program, encoded, codes, coordinates)
        found += _of_reconstruction(program, encoded, x, pictures)
    found.append(("data_dimension", intrinsic_dimension(x.flatten(1)), "intrinsic dimension of the data"))
    program.shape, split = tuple((encoded.loc if encoded.index is None else encoded.index).shape[1:]), None
    if encoded.scale is not None or 0 < program.codes * math.prod(program.shape) <= JOINT_STATES:
        few = math.prod(program.shape) <= COORDINATES
        split = surgery(pair, x if few else x[:WIDE_ROWS], seed=seed, population="rows" if few else None)
        split = replace(split, elements=math.prod(event))
    given = {name: values.tolist() for name, values in coordinates.items()}
    return Audit(len(x), program.shape, event, likelihood, program.scale, pair, found, split, given, pictures)


def _of_latents(encoded: Encoded, coordinates: dict[str, Tensor], pictures: dict[str, Tensor]) -> Iterator[Row]:
    """Yield the figures of the latents: as a whole, by channel and by coordinate."""
    spread = torch.zeros_like(encoded.loc) if encoded.scale is None else encoded.scale**2
    channels = [by_channel(part) for part in (encoded.loc, spread, encoded.sample())]
    yield from units(*channels[:2])
    mean, _, z = (part.flatten(1) for part in channels)
    variance = coordinates["variance"] = mean.var(0)
    level = SILENT.variance * (float(variance.mean()) if encoded.scale is None else 1.0)
    yield "active", exact(float((variance > level).sum())), f"coordinates whose mean has a variance above {level:.3g}"
    if encoded.index is None:
        yield "dimension", intrinsic_dimension(mean), "intrinsic dimension of the means (TwoNN)"
    yield from moments(z, coordinates)
    pictures["elements"] = z.flatten()[:PICTURED]


def _of_codes(program: Foreign, encoded: Encoded, codes: int | Tensor | None, out: dict[str, Tensor]) -> Iterator[Row]:
    """Yield the numbers of K codes that are used, dead, and in use with nearly equal vectors."""
    index, table = encoded.loc if encoded.index is None else encoded.index, codes
    k = program.codes = int(index.max()) + 1 if codes is None else len(codes) if isinstance(codes, Tensor) else codes
    refuse(int(index.min()) < 0 or int(index.max()) >= k, "refused.codes_beyond", index=index, last=k - 1)
    if not isinstance(table, Tensor):
        table = vectors_of(index, encoded.loc, k)
    out["share"] = index.flatten().bincount(minlength=k).double() / index.numel()
    used = in_use(out["share"])
    same = None if table is None else exact(float(len(duplicates(table.detach().cpu()[used]))))
    yield "codes", exact(float(k)), "number of codes K"
    yield "used", exact(float(used.sum())), "codes in use: a proportion of at least 0.001 / K"
    yield "dead", exact(float((~used).sum())), "codes that are not in use"
    yield "duplicates", same, "codes in use with nearly the vector of another one"


def _of_reconstruction(program: Foreign, encoded: Encoded, x: Tensor, pictures: dict[str, Tensor]) -> Iterator[Row]:
    """Yield the errors of reconstructions of points or means, and log p(x | z) of points."""
    support: Any = program.law(x).support
    refuse(not bool(support.check(x).all()), f"likelihood: expected data in {support} for {program.likelihood}.")
    half, mean = len(x) // 2, program.decoded(encoded.loc, x)
    if program.scale is None and program.likelihood != "bernoulli":
        rmse = (program.decoded(encoded.sample()[:half], x[:half]) - x[:half]).square().mean().sqrt().clamp(min=1e-6)
        program.scale = float(rmse) * (1 if program.likelihood == "normal" else math.sqrt(3) / math.pi)
    errors = (mean - x).square().reshape(len(x), x.shape[1] if x.dim() == 4 else 1, -1).double().mean(2)
    yield "mse", over_rows(errors.mean(1)), "mean squared error of an element of x"
    for i, column in enumerate(errors.T if len(errors.T) > 1 else ()):
        yield f"mse.{i}", over_rows(column), f"of channel {i} of x"
    if encoded.scale is None and encoded.index is None:
        yield "log_likelihood", over_rows(program.law(mean).log_prob(x).double()), "log p(x | z), which bounds nothing"
    pictures |= {"data": x[:SHOWN], "means": mean[:SHOWN]}


# ---------------------------------------------------------------------- figures of latents


def by_channel(z: Tensor) -> Tensor:
    """Return latents `(n, C, H, W)`, `(n, T, C)` or `(n, C)` as `(n, C, R)`, float64."""
    axis = 1 if z.dim() == 4 else -1
    return z.movedim(axis, 1).reshape(len(z), z.shape[axis], -1).double()


def units(mean: Tensor, variance: Tensor) -> Iterator[Row]:
    """Yield the shift and scale that make latents unit, (z - shift) * scale: of all elements, and of up to 64 channels.

    Given are means and variances of the posteriors, `(n, C, R)`; errors are those of the mean and of the variance.
    """
    for c in range(-1, mean.shape[1] * (mean.shape[1] <= CHANNELS)):
        m, v = (part if c < 0 else part[:, c : c + 1] for part in (mean, variance))
        end, whose = ("", "all elements") if c < 0 else (f".{c}", f"channel {c}")
        shift, square = over_rows(m.mean((1, 2))), over_rows(((m - m.mean()) ** 2 + v).mean((1, 2)))
        error = 0.5 * square.standard_error * square.value**-1.5
        yield f"shift{end}", shift, f"mean of {whose} of the latents: subtract it"
        yield f"scale{end}", Estimate(square.value**-0.5, error), f"1 / standard deviation of {whose}: multiply by it"


def moments(z: Tensor, coordinates: dict[str, Tensor]) -> Iterator[Row]:
    """Yield means over coordinates that vary, `(n, d)`, of |skewness|, excess kurtosis and distance to a normal.

    And the total correlation of a normal of their covariance, -1/2 log det R, unbiased for normal coordinates, and the
    largest correlation. Errors are those of influence functions, that of the distance (Kolmogorov-Smirnov, to the
    normal of the same mean and variance) is a bound. Figures of each coordinate are added to `coordinates`.

    References:
        An Introduction to Multivariate Statistical Analysis (Anderson, 2003), theorem 7.5.3
    """
    chosen = (z.std(0) > 1e-9 * z.std()).nonzero()[:, 0]
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), COORDINATES)).long()]
    u, n, d = (z - z.mean(0))[:, chosen] / z[:, chosen].std(0, correction=0), len(z), len(chosen)
    normal, steps, r = torch.special.ndtr(u.sort(0).values), torch.arange(n)[:, None] / n, u.T @ u / n
    skewness, fourth = (u**3).mean(0), (u**4).mean(0)
    distance = torch.maximum(normal - steps, steps + 1 / n - normal).amax(0)
    coordinates |= {"skewness": skewness, "kurtosis": fourth - 3, "distance": distance}
    signed = (u**3 - 3 * u - 1.5 * skewness * (u**2 - 1)) * skewness.sign()
    yield "skewness", over_rows(signed.mean(1)), "mean |skewness| of a coordinate"
    tails = u**4 - 4 * skewness * u - 2 * fourth * (u**2 - 1) - 3
    yield "kurtosis", over_rows(tails.mean(1)), "mean excess kurtosis of a coordinate"
    said = f"mean KS distance of a coordinate to a normal, about {0.6 / math.sqrt(n):.3f} for a normal one"
    yield "distance", Estimate(float(distance.mean()), 0.5 / math.sqrt(n)), said
    if n >= 2 * d:
        free = (n - torch.arange(1, d + 1).double()) / 2
        total = 0.5 * ((torch.digamma(free) - torch.digamma(free[0])).sum() - torch.linalg.slogdet(r).logabsdet)
        terms = total + 0.5 * ((u**2).sum(1) - (u * torch.linalg.lstsq(r, u.T).solution.T).sum(1))
        yield "gaussian_correlation", over_rows(terms), "total correlation of a normal of their covariance, nats"
    i, j = divmod(int(r.fill_diagonal_(0).abs().argmax()), d)
    largest = Estimate(float(r[i, j].abs()), (1 - float(r[i, j]) ** 2) / math.sqrt(n))
    yield "correlation", largest, f"largest |correlation|: coordinates {int(chosen[i])} and {int(chosen[j])}"


def intrinsic_dimension(x: Tensor) -> Estimate | None:
    """Return the dimension of the manifold near which values `(n, D)` lie, by the ratios of two neighbours' distances.

    The ratio of the distances to the second and to the first neighbour is Pareto with exponent d (TwoNN); the estimate
    is that of most likelihood. Curvature and boundaries make it too small in many dimensions: by 7 % for a sphere of 10
    and by 20 % for a normal of 20 dimensions with 2000 rows. None where fewer than 40 values are distinct.

    References:
        Estimating the intrinsic dimension of datasets by a minimal neighborhood information (Facco et al., 2017),
        https://doi.org/10.1038/s41598-017-11873-y

    Example:
        >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 3)
        >>> 0.9 < intrinsic_dimension(line).value < 1.1
        True
    """
    rows = x[: min(NEIGHBOUR_ROWS, math.isqrt(int(NEIGHBOUR_WORK / x.shape[1])))].double().unique(dim=0)
    if len(rows) < 40:
        return None
    distance = NearestNeighbors(n_neighbors=2).fit(rows.numpy()).kneighbors()[0]
    value = (len(rows) - 1) / float(torch.from_numpy(distance[:, 1] / distance[:, 0]).log().sum())
    return Estimate(value, SHARED_NEIGHBOURS * value / math.sqrt(len(rows)))


def vectors_of(index: Tensor, vectors: Tensor, states: int) -> Tensor | None:
    """Return the vector of every code, `(K, d)`, 0 for codes that do not occur; None where shapes do not fit.

    Codes are `(n, *grid)`, quantised vectors `(n, d, *grid)` or `(n, *grid, d)`, as `by_channel` reads them.
    """
    index = index.reshape(len(index), -1)
    if not vectors.is_floating_point() or (found := by_channel(vectors).mT).shape[:-1] != index.shape:
        return None
    table = found.new_zeros(states, found.shape[-1])
    table[index] = found
    return table
