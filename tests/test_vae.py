"What chapter 31 does not show: bad input, weights through a file, determinism by seed, resume, low precision, evaluation mode."
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from cxr_nb.core import torch_rng
from cxr_nb.data.images import write_set
from cxr_nb.data.sources import as_manifest
from cxr_nb.generators.conditions import Condition
from cxr_nb.generators.vae import MODERN, VAE, encode_set, fit_prior, train_vae
from cxr_nb.measures.collapse import active_units, complaints

TINY = dict(channels=[2, 4], latent=3, batch_size=4, lr=1e-3, seed=0, checkpoint_seconds=1e9, progress=False)
RECIPES = {"published": dict(beta=.5, reconstruction="mean"), "modern": MODERN}
both = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    ids = [f"i{i}" for i in range(12)]
    m = pd.DataFrame({"image_id": ids, "patient_id": ids, "Mass": np.resize([0., 1.], 12), "Edema": np.resize([0., np.nan], 12)})
    return write_set(tmp_path_factory.mktemp("vae")/"set", np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8), as_manifest(m, source="made"))


def train(data, out, steps=6, **other): return train_vae(data, np.arange(12), out, steps=steps, **TINY | other)[0]
def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@both
def test_a_seed_gives_one_model_whether_it_was_cut_off_or_not(recipe, data, tmp_path):
    whole = train(data, tmp_path/"whole", **recipe)
    train(data, tmp_path/"cut", 3, **recipe)
    assert same(whole, train(data, tmp_path/"cut", **recipe)) and not same(whole, train(data, tmp_path/"other", **recipe | dict(seed=1)))


def test_another_recipe_does_not_go_on_in_the_folder(data, tmp_path):
    train(data, tmp_path, 3, **RECIPES["published"])
    with pytest.raises(ValueError, match="free_bits"): train(data, tmp_path, **RECIPES["published"] | dict(free_bits=.1))


def test_weights_and_prior_go_through_a_file(data, tmp_path):
    vae = train(data, tmp_path/"run", **MODERN)
    save_file(vae.state_dict(), tmp_path/"a.safetensors")
    again = VAE(16, 3, (2, 4), findings=("Mass", "Edema"))
    again.load_state_dict(load_file(tmp_path/"a.safetensors"))
    asked = [Condition(findings={"Mass": 1.}), Condition()]
    assert again.seen == vae.seen == {"Mass": {0., 1.}, "Edema": {0.}} and torch.equal(again.sample(asked, torch_rng(0, "s")), vae.sample(asked, torch_rng(0, "s")))


def test_a_finding_that_is_not_named_counts_by_its_share(data):
    vae = fit_prior(VAE(16, 3, (2, 4), findings=("Mass", "Edema")), data, np.arange(12)).eval()
    vae.prior_factor.zero_()      # no noise: a sample is the decoded mean
    def code(mass): return vae.prior_mean[0] + mass*vae.prior_mean[1]
    made = vae.sample([Condition(findings={"Edema": 0.}), Condition(findings={"Mass": 1.})], torch_rng(0, "s"))
    assert vae.share.tolist() == [.5, 0] and torch.allclose(made, vae.decoder(torch.stack([code(.5), code(1)])), atol=1e-6) and not torch.allclose(code(.5), code(0))


def test_a_vae_that_is_pressed_to_its_prior_collapses_and_the_guard_says_so(data, tmp_path):
    pressed, free = (train(data, tmp_path/str(b), 150, beta=b, reconstruction="mean", lr=1e-2) for b in (1e3, 1e-6))
    active = [active_units(*encode_set(m, data, np.arange(12))) for m in (pressed, free)]
    assert active == [0, 3] and [len(complaints(a)) for a in active] == [1, 0]


def test_images_do_not_depend_on_their_neighbours_nor_change_the_model(data):
    vae = VAE(16, 3, (2, 4)).train()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    x = torch.rand(4, 1, 16, 16, generator=torch_rng(0, "x"))*2 - 1
    assert torch.allclose(vae.reconstruct(x)[:1], vae.reconstruct(x[:1]), atol=1e-6) and vae.training
    vae.sample([Condition()]*3, torch_rng(0, "s"))
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())


@both
def test_low_precision_trains_finite_weights_of_full_precision(recipe, data, tmp_path):
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in train(data, tmp_path, precision="bf16", **recipe).parameters())


@pytest.mark.parametrize("settings, said", [(dict(size=30), "multiple of 4"), (dict(size=0), "multiple of 4"), (dict(reconstruction="max"), "`sum` or `mean`")])
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said): VAE(**dict(size=16, latent=3, channels=(2, 4)) | settings)


def test_a_prior_needs_images(data):
    with pytest.raises(ValueError, match="too few for a prior"): fit_prior(VAE(16, 3, (2, 4), findings=("Mass", "Edema")), data, np.arange(3))
