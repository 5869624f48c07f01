"""KL, mutual information and marginal KL of one latent or a group of latents, and their decomposition by coordinate."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.decompose.account import Account, LevelTerms, Scored
from pvae.analysis.decompose.codes import IMPOSSIBLE_NATS
from pvae.analysis.decompose.collapse import active_units, code_use
from pvae.analysis.decompose.result import Dimensions, LatentSurgery
from pvae.analysis.figures.estimate import Estimate, Kind, exact, exact_mean, over_draws
from pvae.distributions.exponential_codes import Codes
from pvae.pair.code_usage import Tally, entropy_of


def group_figures(account: Account, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the KL, mutual information and marginal KL of a group of latents, by name.

    They are bounds if the components of q_agg are a random subset of the rows; a term that is not defined is None.
    """
    terms = ("mutual_information", "mutual_information_lower", "marginal_kl", "marginal_kl_upper", "leave_one_out")
    out: dict[str, Any] = dict.fromkeys(terms)
    joint, scored, kl = account.joint_codes(names), account.scored.get(names), account.kl(names)
    out["kl"] = account.over(kl) if joint is None else exact_mean(joint.kl)
    if scored is not None:
        out |= _bounds(account, kl, out["kl"].value, scored)
    if points := [name for name in names if account.first.latents[name].point]:
        out["mutual_information"] = _distinct(account, points, names)
    if joint is not None:
        out["mutual_information"] = exact_mean(joint.information)
        out["marginal_kl"] = exact_mean(joint.kl - joint.information)
        out["mutual_information_lower"] = out["marginal_kl_upper"] = None
    if account.by_row.intersection(names):
        out["marginal_kl"] = out["marginal_kl_upper"] = None
    if account.pair.structure.bounds.intersection(names):  # log p(z) is a lower bound
        for term in ("kl", "marginal_kl", "marginal_kl_upper"):
            found = out[term]
            out[term] = found and replace(found, kind="estimate" if found.kind == "lower_bound" else "upper_bound")
    return out


def _distinct(account: Account, points: list[str], names: tuple[str, ...]) -> Estimate | None:
    """Return I_q[x, z] of deterministic codes: the entropy of the partition of rows by code, log n where all differ.

    None where rows share a code but differ in further latents, or where a deterministic code depends on a sampled
    latent.
    """
    if not account.guide_roots.issuperset(points):
        return None
    n = len(account.x)
    # Equal rows may get codes that differ in the last bit, from batches of other sizes.
    bits = account.x.reshape(n, -1).contiguous().view(torch.int64 if account.x.element_size() == 8 else torch.int32)
    same = bits.unique(dim=0, return_inverse=True)[1]
    first = torch.zeros(int(same.max()) + 1, dtype=torch.int64, device=same.device)
    first[same] = torch.arange(n, device=same.device)
    code = account.first.flat(points)[first].unique(dim=0, return_inverse=True)[1][same]
    shares = code.bincount().double() / n
    return None if len(shares) < n and len(points) < len(names) else exact(float(-(shares * shares.log()).sum()))


def _bounds(account: Account, kl: Tensor, mean_kl: float, scored: Scored) -> dict[str, Estimate | None]:
    above: Kind = "estimate" if scored.whole else "upper_bound"
    below: Kind = "estimate" if scored.whole else "lower_bound"

    def information(term: str, kind: Kind) -> Estimate:
        return scored.with_components(account.over(torch.stack(getattr(scored, term)), kind), term)

    out: dict[str, Estimate | None] = {"mutual_information": information("upper", above)}
    out["marginal_kl"] = _marginal(account, kl, mean_kl, scored, "upper", below)
    if bool((torch.stack(scored.leave_one_out).abs() < IMPOSSIBLE_NATS).all()):  # else a code that no other row has
        out["leave_one_out"] = information("leave_one_out", "upper_bound")
    if not scored.whole:
        out["mutual_information_lower"] = information("lower", below)
        out["marginal_kl_upper"] = _marginal(account, kl, mean_kl, scored, "lower", above)
    return out


def _marginal(account: Account, kl: Tensor, mean_kl: float, scored: Scored, term: str, kind: Kind) -> Estimate:
    """Return the marginal KL, kl - information.

    Its error is that of the differences by datum if every sample is scored, else that of two independent means.
    """
    information = torch.stack(getattr(scored, term))
    value = mean_kl - float(information.mean())
    if kl.shape == information.shape:
        found = replace(account.over(kl - information, kind), value=value)
        return scored.with_components(found, term, kl.mean(0))
    found = account.over(information)
    error = math.hypot(account.over(kl).standard_error, found.standard_error)
    return scored.with_components(Estimate(value, error, kind, None, found.note), term)


def latent_surgery(account: Account, name: str) -> LatentSurgery:
    """Return KL, mutual information, marginal KL, active units and code use of one latent."""
    latent, level, group = account.first.latents[name], account.levels[name], group_figures(account, (name,))
    first, prior_first = name in account.guide_roots, name in account.model_roots - account.by_row
    kl_exact = None
    if len(level.closed) == len(level.log_q) and name not in account.pair.structure.bounds:
        alone = first and name in account.model_roots
        kl_exact = exact_mean(level.closed[0]) if alone else account.over(torch.stack(level.closed))
    use = code_use(name, latent.tally) if first and latent.tally is not None else None
    shown = ("perplexity", "states", "tables", "pooled_perplexity", "used") if use else ()
    of_codes: dict[str, Any] = {name: getattr(use, name) for name in shown}
    if first and latent.certain and latent.tally is not None and latent.tally.count > 1:
        of_codes |= _by_code(latent.value, latent.tally, prior_first)
    information, marginal_kl = group["mutual_information"], group["marginal_kl"] if prior_first else None
    columns = tuple(torch.stack(level.kl_per_dimension).mean(0).tolist()) if level.kl_per_dimension else None
    figures = group["kl"], kl_exact, information, marginal_kl, columns
    return LatentSurgery(*figures, active_units(latent), _dimensions(account, name, information), **of_codes)


def _by_code(value: Tensor, found: Tally, prior_first: bool) -> dict[str, tuple[float, ...]]:
    """Return information and marginal KL of each of the codes of a vector, given those before it: the chain rule."""
    codes = value.long().reshape(found.n, -1, found.count)
    counts = [codes[..., :i].flatten(1).unique(dim=0, return_counts=True)[1] for i in range(1, found.count + 1)]
    joint = torch.stack([entropy_of(count.double() / found.n) for count in counts])
    information = joint.diff(prepend=joint.new_zeros(1))
    out = {"information_by_code": tuple(information.tolist())}
    if prior_first and found.prior is not None:
        kl = -(found.share * found.prior).sum(1).reshape(-1, found.count).sum(0)
        out["marginal_kl_by_code"] = tuple((kl - information).tolist())
    return out


def _dimensions(account: Account, name: str, information: Estimate | None) -> Dimensions | None:
    """Return the decomposition by coordinate of a normal latent, or by position of a discrete one; else None."""
    latent, level, scored = account.first.latents[name], account.levels[name], account.scored.get((name,))
    if scored is None or information is None:
        return None
    if level.aggregated:
        return _of_normals(level, scored)
    if latent.tally is not None and latent.tally.positions > 1:
        log_prior = latent.tally.prior if name in account.model_roots - account.by_row else None
        whole = isinstance(latent.q, Codes) and latent.q.positions != latent.tally.positions  # not a product of them
        joint = group_figures(account, (name,))["marginal_kl"] if whole else None
        return _of_codes(latent.tally, log_prior, information, joint)
    return None


def _of_normals(level: LevelTerms, scored: Scored) -> Dimensions:
    """Return the decomposition by coordinate of a latent with normal posteriors, from the samples of the surgery."""
    count = len(scored.upper)
    log_q, aggregated = torch.stack(level.log_q), torch.stack(level.aggregated)
    own, rest = log_q[:count, scored.rows], aggregated[:count, scored.rows]
    kind: Kind = "estimate" if scored.whole else "lower_bound"
    joint = over_draws(own - torch.stack(scored.upper) - rest, kind, len(log_q[0]))
    total = scored.with_components(joint, "upper", (own - rest).mean(0))
    information = tuple(torch.stack(level.information).mean(0).tolist())
    if not level.marginal:
        return Dimensions(information, None, total, None, level.grid_error or 0.0)
    marginal, alone = torch.stack(level.marginal).mean(0), over_draws(aggregated - torch.stack(level.log_p))
    return Dimensions(information, tuple(marginal.tolist()), total, alone, level.grid_error or 0.0)


def _of_codes(found: Tally, log_prior: Tensor | None, information: Estimate, joint: Estimate | None) -> Dimensions:
    """Return exact mutual information and marginal KL of every grid position, and the total correlation.

    If positions are independent under the posterior, the total correlation is the sum of their mutual informations
    minus the joint one. Else it is the `joint` marginal KL minus the sum of the positions' marginal KLs. The prior is
    given as `log_prior`, log p(c_p = k), `(P, K)`.
    """
    share, marginal = found.share, None
    by_position = entropy_of(share) - found.entropy / found.n
    if log_prior is not None:
        marginal = (share * (share.clamp(min=torch.finfo(share.dtype).tiny).log() - log_prior)).sum(-1)
    total = float(by_position.sum()) - information.value
    if joint is not None:
        total = math.nan if marginal is None else joint.value - float(marginal.sum())
    kind: Kind = "lower_bound" if information.kind == "upper_bound" else information.kind
    kind = kind if joint is None else joint.kind
    correlation = Estimate(total, information.standard_error, kind, None, information.note)
    known = (None, None) if marginal is None else (tuple(marginal.tolist()), exact(float(marginal.sum())))
    return Dimensions(tuple(by_position.tolist()), known[0], correlation, known[1], 0.0)
