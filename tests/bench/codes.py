"""Cost of vector quantisation: pvae's codebook against vector-quantize-pytorch, a whole step against PyTorch by hand.

The first table is one step of a codebook alone (lookup, straight-through gradient, commitment, backward, moving
averages, restart of dead codes), the second one of every quantiser as a pair uses it, beside the peer's (posterior,
gradient to the vectors, penalties, averages), the third one of a VQ-VAE on 28 x 28 images, Adam included.
Variants take turns in one process on the same batches; a figure is the median over rounds of the ratio to the first
variant of the same round, by the clock and in seconds of the processor, of all threads: on a busy machine read the
latter, with one thread. K = 512, E = 64, grid 8 x 8, batch 128, decay .99. Where vector-quantize-pytorch is installed,
both codebooks are first shown to give the same codes and rows (restarts, which are drawn at random, left out).

    python tests/bench/codes.py [--rounds 40] [--codes 512] [--threads 2]
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding, pad

from pvae import Experiment
from pvae.graph.lifecycle import Moving
from pvae.nn.codebook import NearestCodebook
from pvae.objectives.base import Loss
from pvae.training.step import Step
from pvae.util.seeds import set_noise

WIDTH, SIDE, BATCH, DECAY, DEAD, COMMITMENT = 64, 8, 128, 0.99, 1.0, 0.25
Variant = Callable[[Tensor], object]
PEER = "vector_quantize_pytorch"


def share(codes: int) -> float:
    """The share of an even use that is `DEAD` vectors of a batch."""
    return DEAD * codes / (BATCH * SIDE * SIDE)


def ours(book: NearestCodebook) -> Variant:
    """The codebook as a pair uses it."""

    def step(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        index = book.nearest(z.movedim(1, -1))
        row = embedding(index, book.table).movedim(-1, 1)
        through = row.detach() + (z - z.detach())
        commitment = COMMITMENT * (z - row.detach()).square().mean()
        (through.square().mean() + commitment).backward()
        book.after_step()
        return index

    return step


def peer(rows: Tensor, dead: float) -> tuple[Variant, Any]:
    """vector-quantize-pytorch with the same settings and rows."""
    from vector_quantize_pytorch import VectorQuantize

    settings = {"decay": DECAY, "commitment_weight": COMMITMENT, "threshold_ema_dead_code": dead}
    module = VectorQuantize(WIDTH, len(rows), accept_image_fmap=True, **settings)
    codebook = module._codebook
    codebook.embed.copy_(rows[None])
    codebook.embed_avg.copy_(rows[None])

    def step(z: Tensor) -> Tensor:
        through, index, commitment = module(z.detach().requires_grad_())
        (through.square().mean() + commitment.sum()).backward()
        return index

    return step, codebook


def book_at(rows: Tensor, dead: float) -> NearestCodebook:
    """pvae's codebook with these rows."""
    book = NearestCodebook(len(rows), WIDTH, DECAY, dead, unit=False)
    book.weight.copy_(rows)
    book.sums.copy_(rows)
    return book


def codebooks(codes: int, batches: Tensor) -> dict[str, Variant]:
    """Both codebooks, started at the same vectors of the data."""
    rows = batches[0].movedim(1, -1).reshape(-1, WIDTH)[:codes]
    variants = {"pvae": ours(book_at(rows, share(codes)))}
    if find_spec(PEER):
        variants = {"vector-quantize-pytorch": peer(rows, DEAD)[0], **variants}
        book, (step, theirs) = book_at(rows, 0.0), peer(rows, 0.0)
        for z in batches[:3]:
            same = float((ours(book)(z) == step(z)).float().mean())  # type: ignore[attr-defined]
            gap = float((book.weight - theirs.embed[0]).abs().max())
            print(f"same codes {same:.4f}   largest difference of a row {gap:.1e}")
    return variants


# ---------------------------------------------------------------------- every quantiser


class Given(nn.Module):
    """Network whose output is its input."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The vectors as they are."""
        return inputs["z"]


def quantiser(posterior: dict[str, Any], codes: int, width: int) -> Variant:
    """A posterior of pvae whose vectors are given."""
    latent = {"codes": codes, "grid": [SIDE, SIDE], "embedding": width, "prior": "uniform", "posterior": posterior}
    decoder = {"network": NETWORK, "likelihood": {"kind": "bernoulli"}}
    pair = Experiment.from_dict({"latents": {"c": latent}, "decoder": decoder}).build((1, 28, 28))
    guide: Any = pair.guide
    module = guide.posteriors["c"]
    module.network, model = Given(), module.link.model
    moving = [part for part in model.codebooks.modules() if isinstance(part, Moving)]

    def step(z: Tensor) -> Tensor:
        found = module({"z": z.detach().requires_grad_()}, {})
        row = model.see(model.sites[0], found.index, z)
        penalties = module.penalties(found, row).values()
        (module.through(found, row).square().mean() + sum(value.mean() for value in penalties)).backward()
        for part in moving:
            part.after_step()
        return found.index

    return step


def theirs(module: Any, rows: bool) -> Variant:
    """A quantiser of vector-quantize-pytorch; its stacks read rows of vectors."""

    def step(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        through, index, *loss = module(z.flatten(2).mT if rows else z)
        (through.square().mean() + sum(part.sum() for part in loss)).backward()
        return index

    return step


def quantisers(codes: int) -> dict[str, tuple[int, Callable[[], Any], dict[str, Any]]]:
    """Width of a vector, the peer's module and pvae's posterior of every quantiser."""
    from vector_quantize_pytorch import FSQ, LFQ, GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize

    bits, image = codes.bit_length() - 1, {"accept_image_fmap": True}
    settings = {**image, "decay": DECAY, "commitment_weight": COMMITMENT, "threshold_ema_dead_code": DEAD}
    straight = {**settings, "rotation_trick": False}
    of_rows = {**straight, "accept_image_fmap": False}
    nearest = {"kind": "nearest_code", "decay": DECAY, "restart": share(codes)}

    def one(**more: Any) -> Callable[[], Any]:
        return lambda: VectorQuantize(WIDTH, codes, **{**straight, **more})

    def several(**more: Any) -> Callable[[], Any]:
        return lambda: ResidualVQ(dim=WIDTH, num_quantizers=4, codebook_size=codes, **{**of_rows, **more})

    def grouped() -> Any:
        return GroupedResidualVQ(dim=WIDTH, groups=4, num_quantizers=1, codebook_size=codes, **of_rows)

    stack, levels = {**nearest, "kind": "residual", "depth": 4}, [8, 8, codes // 64]
    return {
        "nearest_code": (WIDTH, one(), nearest),
        "nearest_code, rotation": (WIDTH, one(rotation_trick=True), {**nearest, "passes": "rotation"}),
        "nearest_code, cosine": (WIDTH, one(use_cosine_sim=True), {**nearest, "unit": True}),
        "finite_scalar": (3, lambda: FSQ(levels), {"kind": "finite_scalar", "levels": levels}),
        "lookup_free": (bits, lambda: LFQ(dim=bits, commitment_loss_weight=COMMITMENT), {"kind": "lookup_free"}),
        "simvq": (
            WIDTH, lambda: SimVQ(WIDTH, codes, channel_first=True, rotation_trick=False), {"kind": "simvq"}
        ),
        "residual": (WIDTH, several(), stack),
        "residual, shared": (WIDTH, several(shared_codebook=True), {**stack, "shared": True}),
        "residual, dropout": (WIDTH, several(quantize_dropout=True), {**stack, "dropout": 1.0}),
        "grouped": (WIDTH, grouped, {**nearest, "kind": "grouped", "groups": 4}),
    }  # fmt: skip


# ---------------------------------------------------------------------- a whole step

NETWORK = {"kind": "resnet", "channels": 32}


def declared(codes: int) -> Experiment:
    """A VQ-VAE with residual networks."""
    posterior = {"kind": "nearest_code", "decay": DECAY, "restart": share(codes), "start": "random"}
    latent = {"codes": codes, "grid": [SIDE, SIDE], "embedding": WIDTH, "prior": "uniform", "posterior": posterior}
    decoder = {"network": NETWORK, "likelihood": {"kind": "bernoulli"}}
    return Experiment.from_dict({"latents": {"c": latent}, "encoder": {"network": NETWORK}, "decoder": decoder})


def fitted(codes: int, x: Tensor) -> Variant:
    """pvae's eager step, as `fit` takes it."""
    experiment = declared(codes)
    pair = experiment.build((1, 28, 28))
    optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)
    stepper = Step(Loss(experiment.objective, pair), optimizer, "eager", x)
    count = 0

    def step(x: Tensor) -> None:
        nonlocal count
        set_noise(count, x.device)
        stepper(x)
        count += 1

    return step


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )

    def forward(self, h: Tensor) -> Tensor:
        """`(b, C, H, W)` to the same."""
        return h + self.layers(h)


def hand_written(codes: int) -> Variant:
    """The same networks, codebook and loss in plain PyTorch, the averages by one-hot products."""
    c = 32
    encoder = nn.Sequential(
        nn.Conv2d(1, c // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(c // 2, c, 4, 2, 1), Block(c), Block(c), nn.ReLU(),
        nn.Conv2d(c, c, 1), nn.Conv2d(c, WIDTH, 1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv2d(WIDTH, c, 3, padding=1), Block(c), Block(c), nn.ReLU(),
        nn.ConvTranspose2d(c, c // 2, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(c // 2, 1, 4, 2, 1),
    )  # fmt: skip
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    table = torch.empty(codes, WIDTH).uniform_(-1, 1) / codes
    counts, sums = torch.ones(codes), table.clone()

    def step(x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        z = encoder(pad(x, (2, 2, 2, 2))).movedim(1, -1)
        flat = z.reshape(-1, WIDTH).detach()
        index = (flat.square().sum(1, keepdim=True) - 2 * flat @ table.T + table.square().sum(1)).argmin(1)
        e = table[index].reshape(z.shape)
        logits = decoder((z + (e - z).detach()).movedim(-1, 1))[..., 2:30, 2:30]
        cross = binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3)).mean()
        (cross + COMMITMENT * (z - e).square().sum((1, 2, 3)).mean()).backward()
        optimizer.step()
        hit = nn.functional.one_hot(index, codes).to(flat)
        counts.lerp_(hit.sum(0), 1 - DECAY)
        sums.lerp_(hit.T @ flat, 1 - DECAY)
        table.copy_(sums / counts[:, None].clamp(min=1e-5))
        unused = counts < DEAD
        if unused.any():
            found = flat[torch.randint(len(flat), (int(unused.sum()),))]
            table[unused], sums[unused], counts[unused] = found, found * DEAD, DEAD

    return step


# ---------------------------------------------------------------------- turns


def interleave(variants: dict[str, Variant], batches: Tensor, rounds: int) -> None:
    """Print median milliseconds of clock and processor, and the median ratios to the first variant."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for i in range(rounds + 5):
        for name, step in variants.items():
            start = time.perf_counter(), time.process_time()
            step(batches[i % len(batches)])
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    base = next(iter(times.values()))[5:]
    for name, values in times.items():
        told = []
        for which in (0, 1):
            taken = [(own[which], other[which]) for own, other in zip(values[5:], base, strict=True)]
            told += [1e3 * statistics.median(own for own, _ in taken), statistics.median(a / b for a, b in taken)]
        print("{:28s} {:8.2f} ms   {:.3f}   processor {:8.2f} ms   {:.3f}".format(name, *told), flush=True)


def main() -> None:
    """Run and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    with pyro.validation_enabled(False):
        vectors = torch.randn(5, BATCH, WIDTH, SIDE, SIDE)
        print("a codebook")
        interleave(codebooks(a.codes, vectors), vectors, a.rounds)
        for name, (width, peer_of, posterior) in quantisers(a.codes).items() if find_spec(PEER) else ():
            print(name)
            given = torch.randn(5, BATCH, width, SIDE, SIDE)
            variants = {
                "vector-quantize-pytorch": theirs(peer_of(), "depth" in posterior or "groups" in posterior),
                "pvae": quantiser(posterior, a.codes, width),
            }
            interleave(variants, given, a.rounds)
        images = (torch.rand(5, BATCH, 1, 28, 28) > 0.5).float()
        print("a training step of a VQ-VAE")
        interleave({"hand-written": hand_written(a.codes), "pvae eager": fitted(a.codes, images[0])}, images, a.rounds)


if __name__ == "__main__":
    main()
