"""One fit of scvi-tools to counts of cells, for `cells.py --peer`: run by an interpreter that has scvi-tools.

    PYTHON tests/bench/cells_peer.py counts.npz KIND SEED EPOCHS [WARMUP [DROPOUT]]

The archive holds the counts `x` and the rows `train`, `validation` and `test`. KIND is `nb` or `zinb`, WARMUP the
number of epochs until the KL has its whole weight, DROPOUT the rate in both networks (the defaults of scvi-tools are
400 and 0.1). Printed, on the last line, is a JSON object: the seconds of the fit (of the processor, and of the clock);
its ELBO (one sample) and importance-weighted bound (1000 samples) by the functions of scvi-tools; and the same two
computed here in float64, from the encoder and the decoder of the fitted module, as the mean over 1000 samples of
log p(x, z | l) - log q(z | x) and its log-mean-exp. All are nats per test cell given l, the sum of its counts, with
every constant.
"""

import json
import os
import sys
import time
from typing import Any

import anndata
import numpy as np
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal

SAMPLES, AT_ONCE = 1000, 100


def log_counts(x: Tensor, mean: Tensor, theta: Tensor, zero_logits: Tensor | None) -> Tensor:
    """Return log p of counts under (zero-inflated) negative binomials of these means and inverse dispersions."""
    log_p = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    log_p = log_p + theta * (theta / (theta + mean)).log() + torch.xlogy(x, mean / (theta + mean))
    if zero_logits is None:
        return log_p
    off, on = (torch.nn.functional.logsigmoid(sign * zero_logits) for sign in (1, -1))
    return torch.where(x == 0, torch.logaddexp(off, on + log_p), on + log_p)


@torch.no_grad()
def by_hand(module: Any, x: Tensor) -> tuple[float, float]:
    """Return ELBO and importance-weighted bound of a fitted module on counts `(n, genes)`, in float64."""
    module.double().eval()
    x, total = x.double(), x.double().sum(1, keepdim=True)
    batch = torch.zeros(len(x), 1)
    q, _ = module.z_encoder(x.log1p(), batch)
    weights = []
    for _ in range(0, SAMPLES, AT_ONCE):
        z = q.sample((AT_ONCE,))
        scale, _, rate, zero_logits = module.decoder("gene", z, total.log().expand(AT_ONCE, -1, -1), batch)
        assert torch.allclose(rate.sum(-1), total.squeeze(1).expand(AT_ONCE, -1)), "means add up to the sum of x"
        assert torch.allclose(scale.sum(-1), torch.ones(()).double())
        theta = module.px_r.exp()
        plain = log_counts(x, rate, theta, None)[0]
        other = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + rate[0]))
        assert np.allclose(plain, other, atol=1e-8), "the density with all its constants"
        log_p = log_counts(x, rate, theta, zero_logits if module.gene_likelihood == "zinb" else None)
        weights.append(log_p.sum(-1) + Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1))
    weight = torch.cat(weights)
    return float(weight.mean()), float((weight.logsumexp(0) - np.log(len(weight))).mean())


def main() -> None:
    import scvi  # type: ignore[import-not-found]  # here, because the interpreter of the tests has none

    path, kind, seed, epochs, *changed = sys.argv[1:]
    torch.set_num_threads(1)
    scvi.settings.seed, scvi.settings.verbosity = int(seed), 40
    with np.load(path) as archive:
        x, indices = archive["x"], [archive[name] for name in ("train", "validation", "test")]
    adata = anndata.AnnData(x)
    scvi.model.SCVI.setup_anndata(adata)
    plan = {"n_epochs_kl_warmup": int(changed[0])} if changed else {}
    network: Any = {"dropout_rate": float(changed[1])} if changed[1:] else {}
    model = scvi.model.SCVI(adata, n_latent=10, n_layers=1, n_hidden=128, gene_likelihood=kind, **network)
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    model.train(
        int(epochs), accelerator="cpu", batch_size=128, plan_kwargs=plan, enable_progress_bar=False, logger=None,
        datasplitter_kwargs={"external_indexing": indices},
    )  # fmt: skip
    found = {"seconds": sum(os.times()[:4]) - cpu, "wall": time.perf_counter() - wall}
    found["peer_elbo"] = float(model.get_elbo(indices=indices[2]))
    found["peer_iwae"] = float(
        model.get_marginal_ll(indices=indices[2], n_mc_samples=SAMPLES, n_mc_samples_per_pass=AT_ONCE)
    )
    found["elbo"], found["iwae"] = by_hand(model.module, torch.as_tensor(x[indices[2]]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
