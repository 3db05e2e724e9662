"""What the growing GAN's chapter does not show: bad input, growth by the step alone, weights through files and devices, determinism by seed."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from cxr_nb.core import seeded, torch_rng
from cxr_nb.data.images import write_set
from cxr_nb.data.sources import as_manifest
from cxr_nb.generators.conditions import Condition
from cxr_nb.generators.pggan import RECIPES, PGGAN, fit_directions, growth_schedule, load_generator, pixel_norm, train_pggan

SMALL = dict(latent=6, base=16, most=4)
TRAIN = SMALL | dict(fade=8, stable=8, extra=0, batch_size=4, lr=.001, ema=.9, seed=0, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    r, ids = np.random.default_rng(0), [f"i{i}" for i in range(12)]
    m = as_manifest(pd.DataFrame({"image_id": ids, "patient_id": ids, "Edema": np.arange(12) % 2., "Mass": 0.}), source="test", origin="simulated", split="train", width=8, height=8)
    return write_set(tmp_path_factory.mktemp("pggan")/"set", r.integers(0, 256, (12, 8, 8), dtype=np.uint8), m, made_by={})


def gan(**k):
    with seeded(0, "gan"): return PGGAN(8, findings=("Edema", "Mass"), **SMALL | k)


@pytest.mark.parametrize("k, match", [(dict(loss="hinge"), "loss is one of"), (dict(schedule=growth_schedule(16, 1, 1)), r"needs \[4, 8\]"), (dict(base=2), "nothing is left")])
def test_a_network_that_cannot_be_built_is_refused(k, match):
    with pytest.raises(ValueError, match=match): gan(**k)


def test_resolution_follows_from_the_step_whatever_was_trained_before():
    batch = {"image": torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)}
    def at(m, step, phase):
        with seeded(0, "noise"): return {k: v.item() for k, v in m.losses(batch, step, phase).items()}
    m = gan(schedule=growth_schedule(8, 4, 2))
    first = at(m, 3, "generator"); at(m, 0, "generator"); at(m, 99, "discriminator")
    assert at(m, 3, "generator") == first and m.grown == .5
    assert at(m, 99, "generator") != first and m.grown == 1


def test_layers_of_later_resolutions_wait_for_their_turn():
    m = gan(schedule=growth_schedule(8, 4, 2)); batch = {"image": torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)}
    m.losses(batch, 0, "generator")["adversarial"].backward()
    assert all(p.grad is None for p in m.generator.blocks.parameters()) and m.generator.to_image[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_same_seed_gives_the_same_weights(recipe, precision, data, tmp_path):
    a, b = (train_pggan(data, np.arange(12), tmp_path/str(i), recipe=RECIPES[recipe], precision=precision, **TRAIN)[0] for i in range(2))
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values()))
    assert a.grown == 1 and all(p.isfinite().all() for p in a.parameters())


def test_a_training_goes_on_from_the_middle_of_a_fade(data, tmp_path):
    whole, _ = train_pggan(data, np.arange(12), tmp_path/"whole", recipe=RECIPES["published"], **TRAIN | dict(fade=16))
    class Stop(Exception): pass
    class Cut:
        def __getattr__(self, name): return lambda *a: {}
        def after_step(self, s):
            if s.step == 4: raise Stop
    with pytest.raises(Stop): train_pggan(data, np.arange(12), tmp_path/"cut", recipe=RECIPES["published"], callbacks=(Cut(),), checkpoint_every=1, **TRAIN | dict(fade=16))
    again, h = train_pggan(data, np.arange(12), tmp_path/"cut", recipe=RECIPES["published"], **TRAIN | dict(fade=16))
    assert h.resumed == 4 and all(torch.equal(u, v) for u, v in zip(whole.state_dict().values(), again.state_dict().values()))


def test_a_condition_needs_a_direction_and_an_image_that_shows_it(data):
    m = fit_directions(gan(), data, np.arange(12), {"Edema": np.ones(6), "Mass": np.arange(6.)}, 2.)
    assert m.seen == {"Edema": {0., 1.}, "Mass": {0.}}
    with pytest.raises(ValueError, match="'Mass': 1.0"): m.sample([Condition(findings={"Mass": 1.})], torch_rng(0))
    z = [m.latents([c], torch_rng(0)) for c in (Condition(), Condition(findings={"Edema": 1.}), Condition(findings={"Edema": 0.}))]
    assert torch.allclose(z[1] - z[2], torch.full((1, 6), 2/6**.5), atol=1e-6) and torch.allclose(z[1] + z[2], 2*z[0], atol=1e-6)
    for bad, match in (({"Ghost": np.ones(6)}, "none of the generator's"), ({"Edema": np.ones(5)}, "6 finite numbers"), ({"Edema": np.zeros(6)}, "not all zero")):
        with pytest.raises(ValueError, match=match): fit_directions(gan(), data, np.arange(12), bad, 1.)


def test_state_dict_goes_through_a_file_and_another_precision_and_back(data, tmp_path):
    m = fit_directions(gan(), data, np.arange(12), {"Edema": np.ones(6)}, 2.)
    torch.save(m.to(torch.float64).state_dict(), tmp_path/"m.pt")
    n = load_generator(tmp_path/"m.pt", 8, findings=("Edema", "Mass"), **SMALL)
    ask = [Condition(findings={"Edema": 1.}), Condition()]
    assert n.seen == m.seen and torch.allclose(n.sample(ask, torch_rng(1)), m.sample(ask, torch_rng(1)).float(), atol=.05)
    with pytest.raises(ValueError, match="give the findings"): load_generator(tmp_path/"m.pt", 8, findings=("Edema",), **SMALL)
    assert load_generator(tmp_path/"m.pt", 8, **SMALL).seen == {}
    on_meta = gan().to("meta")
    assert on_meta.generator(torch.randn(2, 6, device="meta"), 1, .5).shape == (2, 1, 8, 8) and on_meta.discriminator(torch.randn(2, 1, 8, 8, device="meta"), 1, .5).shape == (2,)


@pytest.mark.parametrize("content, match", [(b"no weights", "cannot be read"), ({"a": 1}, "no state dict"), ({"generator.x": torch.zeros(1)}, "first is start.0.weight .missing")])
def test_a_file_that_holds_no_generator_is_refused_by_name(content, match, tmp_path):
    path = tmp_path/"w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"w.pt.*{match}"): load_generator(path, 8, **SMALL)


def test_a_generator_that_has_not_grown_up_is_refused(tmp_path):
    gan = PGGAN(16, 6, 32, 4)
    gan.grown.fill_(.5)
    torch.save(gan.state_dict(), tmp_path/"half.pt")
    with pytest.raises(ValueError, match="grown to level 0.5 of 2"): load_generator(tmp_path/"half.pt", 16, 6, 32, 4)
    with pytest.raises(ValueError, match="give size=16"): load_generator(tmp_path/"half.pt", 8, 6, 32, 4)


def test_a_generator_of_segals_code_gives_its_images(tmp_path):
    "Its forward pass is written out here: He's constant also before the biases, no pixel norm after the first layer."
    r, c = torch_rng(0, "segal"), (8, 8, 4)
    def layer(o, *i): return torch.randn(o, *i, generator=r), torch.randn(o, generator=r)
    layers = {"latent_linear.0": layer(16*8, 6), "init_conv.0": layer(8, 8, 3, 3)} | {f"toRGB.{s}": layer(3, i, 1, 1) for s, i in enumerate(c)}
    for s, (i, o) in enumerate(zip(c, c[1:])): layers |= {f"ScaleBlocks.{s}.convolv.0": layer(o, i, 3, 3), f"ScaleBlocks.{s}.convolv.3": layer(o, o, 3, 3)}
    def run(name, x):
        w, b = layers[name]
        return (2/w[0].numel())**.5*(F.linear(x, w, b) if w.ndim == 2 else F.conv2d(x, w, b, padding=w.shape[-1]//2))
    z = torch.randn(5, 6, generator=r)
    x = pixel_norm(F.leaky_relu(run("init_conv.0", F.leaky_relu(run("latent_linear.0", pixel_norm(z)), .2).view(-1, 8, 4, 4)), .2))
    for s in range(2):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        for i in (0, 3): x = pixel_norm(F.leaky_relu(run(f"ScaleBlocks.{s}.convolv.{i}", x), .2))
    image = run("toRGB.2", x)
    state = {f"{n}.module.{k}": v for n, wb in layers.items() for k, v in zip(("weight", "bias"), wb)} | {"alpha": torch.tensor(0), "current_size": torch.tensor(16)}
    torch.save({"state_dict": state, "settings": {"channel_depth": [8, 8, 4]}}, tmp_path/"g.pth")
    grey, colour = (load_generator(tmp_path/"g.pth", 16, 6, 32, 8, channels) for channels in (1, 3))
    torch.save(grey.state_dict(), tmp_path/"own.pt")
    with torch.no_grad():
        assert torch.allclose(colour.generate(z), image, atol=1e-5) and torch.allclose(grey.generate(z), image.mean(1, keepdim=True), atol=1e-5)
        assert torch.equal(load_generator(tmp_path/"own.pt", 16, 6, 32, 8).generate(z), grey.generate(z))
    torch.save({"state_dict": state | {"alpha": torch.tensor(.5)}}, tmp_path/"half.pth")
    with pytest.raises(ValueError, match="faded in"): load_generator(tmp_path/"half.pth", 16, 6, 32, 8)
    torch.save({k: v for k, v in state.items() if "ScaleBlocks.1.convolv.3" not in k}, tmp_path/"part.pth")
    with pytest.raises(ValueError, match="lack ScaleBlocks.1.convolv.3"): load_generator(tmp_path/"part.pth", 16, 6, 32, 8)
    with pytest.raises(ValueError, match="give size=16"): load_generator(tmp_path/"g.pth", 32, 6, 64, 8)
