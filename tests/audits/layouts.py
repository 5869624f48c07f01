"""Small autoencoders with the class layouts of four libraries, trained for a moment, and the adapters of `audit`."""

from types import SimpleNamespace

import torch
import torch.distributions as td
from sklearn.datasets import load_digits
from torch import Tensor, nn

DIGITS = torch.tensor(load_digits().images).float()[:, None] / 16
COUNTS = (DIGITS.flatten(1)[:, 10:40] * 16).round()


class AutoencoderKL(nn.Module):
    """As in diffusers: `encode(x).latent_dist` with `mean` and `logvar`, `decode(z).sample`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 4, 4, 2, 1)
        self.decoder = nn.Sequential(nn.Dropout(0.5), nn.ConvTranspose2d(2, 1, 4, 2, 1))

    def encode(self, x: Tensor) -> SimpleNamespace:
        mean, logvar = self.encoder(x).chunk(2, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=logvar - 2))

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(z))


class PythaeVAE(nn.Module):
    """As in pythae: `encoder(x).embedding`, `.log_covariance`, `decoder(z).reconstruction`."""

    def __init__(self) -> None:
        super().__init__()

        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(64, 10)

            def forward(self, x: Tensor) -> SimpleNamespace:
                embedding, log_covariance = self.layer(x.flatten(1)).chunk(2, 1)
                return SimpleNamespace(embedding=embedding, log_covariance=log_covariance - 2)

        class Decoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(5, 64)

            def forward(self, z: Tensor) -> SimpleNamespace:
                return SimpleNamespace(reconstruction=self.layer(z).sigmoid().reshape(-1, 1, 8, 8))

        self.encoder, self.decoder = Encoder(), Decoder()


class SCVI(nn.Module):
    """As in scvi-tools: `inference` with the library and batch gives `qz`, `generative` gives `px`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.p = nn.Linear(30 + 1, 8), nn.Linear(4 + 1, 30)

    def inference(self, x: Tensor, batch_index: Tensor, cont_covs: Tensor | None = None) -> dict:
        loc, log_scale = self.q(torch.cat([x.log1p(), batch_index], 1)).chunk(2, 1)
        return {"qz": td.Normal(loc, (log_scale - 1).exp()), "library": x.sum(1, keepdim=True).log()}

    def generative(self, z: Tensor, library: Tensor, batch_index: Tensor) -> dict:
        share = self.p(torch.cat([z, batch_index], 1)).softmax(1)
        return {"px": td.Poisson(library.exp() * share + 1e-4)}


class VectorQuantize(nn.Module):
    """As in vector-quantize-pytorch: `vq(x)` with the channels last gives quantised, indices and loss."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, dim) * 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.cdist(x.flatten(0, -2), self.codebook).argmin(1).reshape(x.shape[:-1])
        quantised = self.codebook[index]
        return x + (quantised - x).detach(), index, (quantised - x).square().mean()


class VQVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 3, 2, 2), nn.ConvTranspose2d(3, 1, 2, 2)
        self.vq = VectorQuantize(12, 3)

    def tokens(self, x: Tensor) -> Tensor:
        """Positions as tokens, `(n, 16, 3)`."""
        return self.encoder(x).flatten(2).mT

    def image(self, quantised: Tensor) -> Tensor:
        return self.decoder(quantised.mT.reshape(-1, 3, 4, 4))


def trained(module: nn.Module, loss, steps: int = 150) -> nn.Module:
    """Return the module after some steps of Adam; left in training mode."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(1000, (100,))).backward()
        optimizer.step()
    return module


def diffusers_like():
    """The module, its adapters, and its data."""
    torch.manual_seed(0)
    vae = AutoencoderKL()

    def encode(x):
        found = vae.encode(x).latent_dist
        return found.mean, found.logvar

    def decode(z):
        return vae.decode(z).sample

    def loss(rows):
        mean, logvar = encode(DIGITS[rows])
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        return (decode(z) - DIGITS[rows]).square().mean()

    return trained(vae, loss), encode, decode, DIGITS


def pythae_like():
    torch.manual_seed(0)
    model = PythaeVAE()

    def encode(x):
        found = model.encoder(x)
        return found.embedding, found.log_covariance

    def decode(z):
        return model.decoder(z).reconstruction

    def loss(rows):
        mean, logvar = encode(DIGITS[rows])
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        return (decode(z) - DIGITS[rows]).square().sum((1, 2, 3)).mean() + 0.1 * mean.square().sum(1).mean()

    return trained(model, loss), encode, decode, DIGITS


def scvi_like():
    torch.manual_seed(0)
    module = SCVI()

    def encode(x):
        return module.inference(x, torch.zeros(len(x), 1))["qz"]

    def decode(z):
        library, batch = torch.full((len(z), 1), 5.0), torch.zeros(len(z), 1)
        return module.generative(z, library, batch)["px"].mean

    def loss(rows):
        q = encode(COUNTS[rows])
        library = COUNTS[rows].sum(1, keepdim=True).log()
        px = module.generative(q.rsample(), library, torch.zeros(len(rows), 1))["px"]
        return -px.log_prob(COUNTS[rows]).sum(1).mean() + td.kl_divergence(q, td.Normal(0.0, 1.0)).sum(1).mean()

    return trained(module, loss), encode, decode, COUNTS


def vq_like():
    torch.manual_seed(0)
    model = VQVAE()

    def encode(x):
        return model.vq(model.tokens(x))

    def decode(quantised):
        return model.image(quantised)

    def loss(rows):
        quantised, _, commit = encode(DIGITS[rows])
        return (decode(quantised) - DIGITS[rows]).square().mean() + 0.1 * commit

    trained(model, loss)
    book = model.vq.codebook.data
    book[7], book[3] = 1e3, book[2]  # one code is never nearest; two have the same vector
    book[3, 0] += 1e-5
    return model, encode, decode, DIGITS


LAYOUTS = {"diffusers": diffusers_like, "pythae": pythae_like, "scvi": scvi_like, "vector-quantize-pytorch": vq_like}
