"""Kinds of pairs that are fitted, read and compiled: zoo entries with overrides."""

KINDS: dict[str, tuple[str, list[str]]] = {
    "iwae on two levels": ("hvae", ["objective.kind=iwae"]),
    "iwae of scored bits": ("bernoulli_vae", ["objective={kind='iwae'}", "latents.b.posterior.baseline=none"]),
    "mean field with free bits": ("hvae", ["objective.kind=trace_mean_field_elbo", "objective.free_bits=0.5"]),
    "convolutions": ("vae", ["encoder.network.kind=conv", "decoder.network.kind=conv"]),
    "counts": ("vae", ["data.binarize=none", "data.scale=raw", "decoder.likelihood.kind=poisson"]),
    "levels": ("vae", ["data.binarize=none", "data.scale=raw", 'decoder.likelihood={kind="categorical", levels=17}']),
    "grey values": ("vae", ["data.binarize=none", 'decoder.likelihood={kind="discretized_logistic", levels=17}']),
    "predicted scale": ("vae_normal", ["decoder.likelihood.scale=per_datum"]),
    "fixed scale, several draws": ("vae_normal", ["decoder.likelihood.scale=fixed", "objective.particles=3"]),
    "mixture prior": ("mixture_prior", []),
    "pseudo-inputs": ("vamp", []),
    "real nvp": ("realnvp_prior", ["latents.z.dim=4"]),
    "autoregressive density": ("maf_prior", ["latents.z.dim=4"]),
    "autoregressive draws": ("maf_prior", ["latents.z.dim=4", "latents.z.prior.kind=iaf"]),
    "splines": ("spline_prior", ["latents.z.dim=4"]),
    "autoregressive splines": ("spline_prior", ["latents.z.dim=4", "latents.z.prior.kind=spline_autoregressive"]),
    "full rank": ("vae", ["latents.z.dim=5", "latents.z.posterior.kind=full_rank_normal"]),
    "pseudo-inputs of full rank": ("vamp", ["latents.z.dim=4", "latents.z.posterior.kind=full_rank_normal"]),
    "cyclical beta": ("vae", ["data.binarize=static", "objective.beta.kind=cyclical"]),
}
SMALL = ["train.epochs=2", "train.engine=eager", "encoder.network.hidden=[16]", "decoder.network.hidden=[16]"]
