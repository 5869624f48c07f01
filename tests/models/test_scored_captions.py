"""Captions that are scored: p(caption) p(codes | caption) of one transformer, enumerated, sampled, and in an ELBO."""

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import scipy.stats
import torch
from pyro.infer import Trace_ELBO

import pvae
from pvae import Experiment, Run
from pvae.analysis import evidence, sample, surgery
from pvae.analysis.aggregate.entry import simulated
from pvae.analysis.bounds.rate_distortion import require_alike
from pvae.errors import DataError, DeclarationError
from pvae.experiment.readback import formulas
from pvae.graph.site import Link, Site, Space, one_hot
from pvae.models.priors.autoregressive import TransformerPrior
from tests.data.test_captions import CAPTION, experiment, said, x
from tests.laws import require_trainable, shake

V, L, K = 4, 3, 3
SCORED = {"caption": {**CAPTION, "scored": True}}
TEXTS = [
    text for text in itertools.product(range(V), repeat=L) if not any(b and not a for a, b in itertools.pairwise(text))
]
"""All captions of at most L words: behind a padding word (0) there is nothing else."""


def built(length: int = L, beside: bool = True) -> Any:
    torch.manual_seed(0)
    link = Link()
    link.scored = {"t": "c"}
    given: Any = {"t": (V, length), **({"y": (2,)} if beside else {})}
    site = Site("c", Space.codes(K, (2,)), tuple(given))
    module = TransformerPrior(width=8, layers=2, heads=2).build(site, given, link)
    shake(module, 0.5)
    return module.double().eval()


def features(tokens: Any) -> torch.Tensor:
    return one_hot(torch.as_tensor(tokens), V, torch.zeros((), dtype=torch.float64)).mT


@pytest.mark.parametrize("beside", [True, False])
def test_probabilities_of_all_captions_sum_to_one(beside):
    module = built(beside=beside)
    p = module.captions["t"]({"y": torch.eye(2, dtype=torch.float64)} if beside else {})
    assert p.batch_shape == ((2,) if beside else ())
    states = p.enumerate_support(expand=False)
    probability = p.log_prob(states).exp()
    assert len(states) == V**L
    torch.testing.assert_close(probability.sum(0), torch.ones_like(probability[0]), rtol=0, atol=1e-12)
    legal = torch.tensor([tuple(state) in TEXTS for state in states.reshape(-1, L).tolist()])
    assert torch.equal(probability.reshape(len(states), -1).gt(0).all(1), legal)


def test_caption_and_codes_are_one_sequence():
    """The blocks read begin, words, start, codes once: its logits are those of both distributions."""
    module = built(beside=False)
    words, text, codes = module.captions["t"], torch.tensor([[2, 1, 0]]), torch.tensor([[1, 2]])
    starts = [words.start[None, None], module.start[None, None]]
    tokens = [words.table[text] + words.places(), module.table[codes[:, :1]] + module.places()[:1]]
    h = torch.cat([starts[0], tokens[0], starts[1], tokens[1]], 1)
    for block in module.blocks:
        h = block(h)
    # the padding word is the third: no word before it ends the caption
    want = words.head(h[:, :L]).log_softmax(-1)[0, range(L), text[0]].sum()
    torch.testing.assert_close(words({}).log_prob(text), want[None], rtol=0, atol=1e-10)
    want = module.head(h[:, L + 1 :]).log_softmax(-1)[0, range(2), codes[0]].sum()
    torch.testing.assert_close(module({"t": features(text)}).log_prob(codes), want[None], rtol=0, atol=1e-10)
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert not any("captions" in name and "blocks" in name for name in names)
    assert copy.deepcopy(module).captions["t"].blocks is not module.blocks


def test_captions_are_sampled_as_they_are_scored():
    """A chi-squared test of 20 000 samples; it fails once in 10 000 seeds."""
    p = built(beside=False).captions["t"]({})
    torch.manual_seed(1)
    counts = Counter(map(tuple, p.sample((20_000,)).tolist()))
    assert counts.keys() <= {*TEXTS}
    expected = 20_000 * p.log_prob(torch.tensor(TEXTS)).exp()
    rare = expected < 5
    both = [[counts[text] for text in TEXTS], expected.tolist()]
    observed, wanted = ([*torch.tensor(n)[~rare].tolist(), float(torch.tensor(n)[rare].sum())] for n in both)
    assert scipy.stats.chisquare(observed, [n + 1e-9 for n in wanted], sum_check=False).pvalue > 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    train = {"epochs": 30, "batch_size": 20, "optimizer": {"kind": "adam", "lr": 0.01}}
    declared = experiment({"source": "tensor"}, covariates=SCORED, train=train)
    folder = tmp_path_factory.mktemp("scored")
    return pvae.fit(declared, data=x, covariates={"said": said()}, run_dir=folder, progress=False)


def test_the_elbo_has_the_words_as_a_term(run: Run):
    pair: Any = copy.deepcopy(run.pair).double()
    rows = run.data.test.x.double()
    terms = pair.terms(rows)
    image, seen = pair.frame.split(rows)
    tokens = pair.frame.columns(rows)["caption"].long()
    guide: Any = pair.guide_trace(rows).nodes
    code = guide["c"]["value"]
    log_words = pair.model.captions["caption"]({}).log_prob(tokens)
    log_codes = pair.model.prior("c", seen).log_prob(code)
    log_x = pair.model.decoder({"c": pair.model.see(pair.model.sites[0], code, rows)}).log_prob(image)
    torch.testing.assert_close(terms.reconstruction, log_x + log_words, rtol=0, atol=1e-9)
    torch.testing.assert_close(terms.kl["c"], -log_codes, rtol=0, atol=1e-9)
    with pair.own_store():
        loss = Trace_ELBO().loss(pair.model, pair.guide, rows)
    total = (log_words + log_x + log_codes).detach()
    assert loss == pytest.approx(-float(total.sum()), abs=1e-6)
    found = surgery(run.pair, run.data.test.x)
    assert found.elbo.value == pytest.approx(float(total.mean()), abs=1e-3)
    assert evidence(run.pair, run.data.test.x, samples=10).iwae.value == pytest.approx(float(total.mean()), abs=1e-3)
    require_trainable(copy.deepcopy(run.pair), run.data.test.x)


def test_shuffled_words_cost_nats(run: Run):
    rows, frame = run.data.train.x, run.pair.frame
    image, words = frame.split(rows)[0], frame.columns(rows)["caption"]
    order = torch.tensor([1, 0, 2])  # the first two words, where there are two
    turned = torch.where(words[:, 1:2] > 0, words[:, order], words)
    other = frame.assemble(image, {"caption": turned})
    with torch.no_grad():
        assert float(run.pair(rows).mean()) > float(run.pair(other).mean()) + 1.0


def test_samples_have_captions_of_the_model_unless_given(run: Run):
    found = sample(run, 400)
    texts = {tuple(text) for text in found.covariates["caption"].tolist()}
    assert len(texts) > 3
    assert not any(b and not a for text in texts for a, b in itertools.pairwise(text))
    given = sample(run, 5, given={"caption": "red circle"}).covariates["caption"]
    assert given.tolist() == [[3, 2, 0]] * 5
    assert sample(run.pair, 4).covariates["caption"].shape == (4, 3)
    rows = run.data.test.x
    made, values = simulated(run.pair, rows, "test")
    assert torch.equal(run.pair.frame.columns(made)["caption"], run.pair.frame.columns(rows)["caption"])


def test_the_pyro_script_observes_the_caption(run: Run):
    plan: Any = run.plan
    script = plan.to_pyro((2, 2))
    assert 'pyro.sample("caption", pair.model.captions["caption"](seen), obs=' in script
    assert formulas(plan)["model"] == "p(x, caption, c) = p(caption) p(c | caption) p(x | c)"


def test_a_second_stage_may_score(tmp_path):
    code = {"codes": 4, "grid": [2], "embedding": 3, "given": ["caption"], "prior": {"kind": "categorical"}}
    latents = {"c": {**code, "posterior": {"kind": "nearest_code"}}}
    refit = {"priors": {"c": {"kind": "transformer", "width": 8, "layers": 1, "heads": 2}}, "train": {"epochs": 1}}
    declared = experiment({"source": "tensor"}, covariates=SCORED, latents=latents, refit=refit)
    second = pvae.fit(declared, data=x, covariates={"said": said()}, run_dir=tmp_path, progress=False)
    first = pvae.Run.load(second.files.manifest["parent"]["run"], data=second.data, root=tmp_path)
    assert (first.pair.layout.observed, second.pair.layout.observed) == (("x",), ("caption", "x"))
    with pytest.raises(DataError, match="of x, caption"):
        require_alike(first, second)


@pytest.mark.parametrize(
    ("latent", "covariate"),
    [
        ({"prior": {"kind": "categorical"}}, {}),
        ({"prior": {"kind": "pixelcnn"}}, {}),
        ({"given": ["caption", "z"]}, {}),
        ({}, {"length": 1}),
    ],
)
def test_a_caption_that_no_prior_can_score_is_refused(latent, covariate):
    code = {"codes": 4, "grid": [2], "embedding": 3, "given": ["caption"], "posterior": {"kind": "nearest_code"}}
    prior = {"kind": "transformer", "width": 8, "layers": 1, "heads": 2}
    latents = {"c": {"prior": prior, **code, **latent}, "z": {"dim": 2}}
    with pytest.raises(
        DeclarationError, match=r"covariates\.caption\.scored: expected a caption of at least two words"
    ):
        experiment({"source": "tensor"}, covariates={"caption": {**SCORED["caption"], **covariate}}, latents=latents)
    with pytest.raises(DeclarationError, match="scored with text = true alone"):
        Experiment.from_dict({"latents": {"z": {"dim": 2}}, "covariates": {"y": {"codes": 3, "scored": True}}})
