"What chapter 33 does not show: bad input, weights through a file, determinism by seed, resume, low precision."
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from cxr_nb.core import seeded
from cxr_nb.data.images import write_set
from cxr_nb.data.sources import as_manifest
from cxr_nb.generators.conditions import Condition, sample_set
from cxr_nb.generators.lsgan import LSGAN, RECIPES, train_lsgan
from cxr_nb.train import evaluating

TINY = dict(channels=[2, 4, 8], latent=6, batch_size=4, lr=2e-4, ema=.9, checkpoint_seconds=1e9, progress=False)
both = pytest.mark.parametrize("recipe", RECIPES)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def tiny(recipe, seed=0):
    with seeded(seed, "tiny"): return LSGAN(32, 6, (2, 4, 8), recipe)
def weights(gan): return {k: v.clone() for k, v in gan.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32), dtype=np.uint8)
    manifest = as_manifest(pd.DataFrame(dict(image_id=[f"i{k}" for k in range(12)], patient_id=[f"p{k}" for k in range(12)], Edema=0.)), source="folder")
    return write_set(tmp_path_factory.mktemp("lsgan")/"set", images, manifest)


@pytest.mark.parametrize("settings, said", [
    (dict(size=100), "5 for 128"), (dict(size=128, channels=(8, 16, 32)), "with 3 channels"), (dict(size=16, channels=(4, 8)), "3 channels for 32 px"),
    (dict(size=0), "size 0"), (dict(recipe="wgan"), "published, modern")])
def test_a_network_that_does_not_fit_is_refused(settings, said):
    with pytest.raises(ValueError, match=said): LSGAN(**settings)


def test_other_sizes_drop_or_add_stages():
    for size, channels in {32: (2, 4, 8), 64: (2, 4, 8, 16), 256: (2, 2, 4, 4, 8, 8)}.items():
        gan = LSGAN(size, 5, channels)
        image = gan.sample([Condition()], gen())
        assert image.shape == (1, 1, size, size) and image.abs().max() <= 1 and gan.discriminator(image).shape == (1,)


@both
def test_weights_go_through_a_file(recipe, tmp_path):
    a, b = tiny(recipe).settle(gen()), tiny(recipe, 1)
    assert not torch.equal(a.sample([Condition()], gen()), b.sample([Condition()], gen()))
    save_model(a, tmp_path/"a.safetensors")
    load_model(b, tmp_path/"a.safetensors")
    assert same(weights(a), weights(b)) and torch.equal(a.sample([Condition()]*3, gen()), b.sample([Condition()]*3, gen()))


@both
def test_sampling_leaves_the_model_and_the_global_generator_alone(recipe):
    gan = tiny(recipe).train()
    before, state = weights(gan), torch.get_rng_state()
    x = gan.sample([Condition()]*3, gen())
    assert same(before, weights(gan)) and torch.equal(state, torch.get_rng_state()) and all(m.training for m in gan.modules()) and not x.requires_grad
    with evaluating(gan.generator) as g: assert torch.equal(x, g(torch.randn(3, 6, generator=gen())))


@both
def test_the_model_works_on_the_device_and_in_the_type_that_it_is_moved_to(recipe):
    gan = tiny(recipe).double()
    assert gan.settle(gen()).sample([Condition()], gen()).dtype == torch.float64
    assert all(v.dtype == torch.float64 for v in gan.losses({"image": torch.zeros(4, 1, 32, 32, dtype=torch.uint8)}).values())
    meta = tiny(recipe).to("meta")   # a device of another name: nothing may be left behind on the CPU
    for phase in ("discriminator", "generator"): assert all(v.device.type == "meta" for v in meta.losses({"image": torch.zeros(4, 1, 32, 32, dtype=torch.uint8, device="meta")}, 0, phase).values())


@both
def test_the_discriminator_s_phase_leaves_the_generator_no_gradient(recipe):
    gan, batch = tiny(recipe), {"image": torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8, generator=gen())}
    sum(v for v in gan.losses(batch, 0, "discriminator").values() if v.requires_grad).backward()
    assert all(p.grad is None for p in gan.generator.parameters()) and all(p.grad is not None for p in gan.discriminator.parameters())
    gan.losses(batch, 0, "generator")["fool"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in gan.generator if isinstance(m, nn.ConvTranspose2d) for p in m.parameters())


@both
def test_a_step_has_the_phases_of_its_recipe_and_the_result_is_the_recipe_s(recipe, data, tmp_path):
    gan, history = train_lsgan(data, np.arange(12), tmp_path, recipe=recipe, generator_steps=6, seed=0, **TINY)
    assert len(history.log) == {"published": 2, "modern": 6}[recipe] and (history.ema is not None) == RECIPES[recipe].average
    assert gan is (history.ema if recipe == "modern" else history.model)
    right = history.log[["discriminator/right_real", "discriminator/right_fake"]].mean(axis=1)
    assert np.allclose(history.log["discriminator/accuracy"], right) and np.allclose(history.log["discriminator/loss"], history.log[["discriminator/real", "discriminator/fake"]].sum(axis=1))


@both
def test_a_seed_gives_one_model_whether_it_was_cut_off_or_not(recipe, data, tmp_path):
    def go(name, steps, seed=0): return train_lsgan(data, np.arange(12), tmp_path/name, recipe=recipe, generator_steps=steps, seed=seed, **TINY)[0]
    whole = weights(go("whole", 12))
    go("cut", 6)
    assert same(whole, weights(go("cut", 12))) and same(whole, weights(go("cut", 12))) and not same(whole, weights(go("other", 12, 1)))


@both
def test_low_precision_trains_finite_weights_of_full_precision(recipe, data, tmp_path):
    gan, history = train_lsgan(data, np.arange(12), tmp_path, recipe=recipe, generator_steps=6, seed=0, precision="bf16", **TINY)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in gan.parameters()) and np.isfinite(history.log["generator/loss"]).all()


def test_generator_steps_that_make_no_whole_step_are_refused(data, tmp_path):
    for steps in (0, 7):
        with pytest.raises(ValueError, match="multiple of"): train_lsgan(data, np.arange(12), tmp_path, recipe="published", generator_steps=steps, seed=0, **TINY)


def test_a_set_of_samples_has_no_labels(data, tmp_path):
    gan = tiny("published")
    made = sample_set(gan, [Condition()]*5, tmp_path/"set", data.findings, "lsgan", 0)
    assert made.manifest["Edema"].isna().all() and len(made) == 5
    with pytest.raises(ValueError, match="findings"): sample_set(gan, [Condition(findings={"Edema": 1.})], tmp_path/"none", data.findings, "lsgan", 0)
