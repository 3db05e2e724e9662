"What chapters 28, 35 and 37 do not show: damaged caches, determinism, exact resume, low precision, compiling, the published autoencoder's form, data without boxes."
import json, shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from cxr_nb.core import seeded, torch_rng
from cxr_nb.data.images import write_set
from cxr_nb.data.phantom import open_dataset
from cxr_nb.data.sources import as_manifest
from cxr_nb.generators.conditions import Box, Condition, sample_set
from cxr_nb.generators.dit import Control, DiT, load_dit, train_control, train_dit
from cxr_nb.generators.latents import latents_of, load_autoencoder, small_autoencoder, train_autoencoder
from cxr_nb.measures.text import embed, text_encoder, train_tokenizer
from small import Cut, Stop, rows, same

QUICK = dict(checkpoint_seconds=1e9, progress=False)
NET = dict(heads=2, head_width=8, depth=2, patch_size=2)
TRAIN = dict(objective="flow", network=NET, steps=6, batch_size=8, lr=1e-3, ema=.9, seed=0, **QUICK)


@pytest.fixture(scope="module")
def data(): return open_dataset("phantom", 32, n=40, seed=5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "A small autoencoder of the published form (three channels) and a small BERT, in folders, as specs."
    there = tmp_path_factory.mktemp("parts")
    with seeded(0, "auto"): small_autoencoder([4, 8, 8], image_channels=3).kl.save_pretrained(there/"sd"/"vae")
    words = train_tokenizer(["Mild left pleural effusion. The heart is of normal size. PA chest radiograph of a 63-year-old woman."], 120); words.save_pretrained(there/"bert")
    with seeded(0, "bert"): BertModel(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(there/"bert")
    return dict(autoencoder=str(there/"sd"), encoder=f"radbert:{there/'bert'}")


# Caches

def test_a_damaged_cache_of_latents_or_texts_is_named(data, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_NB_CACHE", str(tmp_path)); auto, words = load_autoencoder(parts["autoencoder"]), text_encoder(parts["encoder"])
    for folder, make in (("latents", lambda: latents_of(data, auto)), ("texts", lambda: embed(["left", "right effusion"], words))):
        first = make(); file = next(f for f in (tmp_path/folder).iterdir() if f.suffix in (".npy", ".f16") and ".start" not in f.name)
        del first; file.write_bytes(b"no array")
        with pytest.raises(ValueError, match=f"{file.name} is damaged .* delete it"): make()
        file.unlink(); make()


def test_another_scale_or_length_is_another_cache(data, parts):
    auto = load_autoencoder(parts["autoencoder"]); one = latents_of(data, auto)
    auto.kl.register_to_config(scaling_factor=2.); assert np.allclose(latents_of(data, auto), 2*one.astype(float), rtol=.01, atol=.01)
    assert text_encoder(parts["encoder"]).key == text_encoder(parts["encoder"]).key
    short = text_encoder(parts["encoder"], 3); assert embed(["left pleural effusion mild"], short).start[-1] == 3 < embed(["left pleural effusion mild"], text_encoder(parts["encoder"])).start[-1]


def test_latents_that_half_precision_cannot_hold_are_refused(data, parts):
    auto = load_autoencoder(parts["autoencoder"]); auto.kl.register_to_config(scaling_factor=1e9)
    with pytest.raises(ValueError, match="scaling_factor"): latents_of(data, auto)


def test_weights_that_are_missing_are_an_error_and_not_drawn_at_random(parts, tmp_path):
    from safetensors.torch import load_file, save_file
    for spec, file in ((parts["autoencoder"] + "/vae", "diffusion_pytorch_model.safetensors"), (parts["encoder"].split(":")[1], "model.safetensors")):
        there = tmp_path/file; shutil.copytree(spec, there); w = load_file(there/file); w.pop(next(k for k in w if "weight" in k)); save_file(w, there/file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be read as an AutoencoderKL"): load_autoencoder(str(tmp_path/"diffusion_pytorch_model.safetensors"))
    with pytest.raises(ValueError, match="1 tensors are missing"): text_encoder(f"radbert:{tmp_path/'model.safetensors'}")


def test_t5_is_read_with_the_tokenizer_of_its_release(tmp_path):
    "A sentencepiece model, as the published T5 encoders have it, and no tokenizer.json."
    import io, sentencepiece
    from transformers import T5Config, T5EncoderModel
    made = io.BytesIO(); sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["Mild left pleural effusion.", "No effusion. The lungs are clear."]*5), model_writer=made, vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    (tmp_path/"spiece.model").write_bytes(made.getvalue()); (tmp_path/"tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="T5Tokenizer", extra_ids=0)))
    T5EncoderModel(T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path); e = text_encoder(f"t5:{tmp_path}")
    states, mask = e(["Mild left effusion.", "No"]); assert states.shape[2] == 24 == e.width and mask[0].sum() > mask[1].sum() and e.length == 120


# Training

def test_an_autoencoder_is_resumed_exactly_and_its_scale_is_that_of_its_latents(data, tmp_path):
    given = dict(channels=[4, 8], latent=2, kl=1e-6, spectral=.01, steps=6, batch_size=8, lr=1e-3, seed=0, **QUICK)
    whole, _ = train_autoencoder(data, rows(data), tmp_path/"whole", **given)
    with pytest.raises(Stop): train_autoencoder(data, rows(data), tmp_path/"cut", callbacks=[Cut()], checkpoint_every=1, **given)
    again, h = train_autoencoder(data, rows(data), tmp_path/"cut", **given)
    assert h.resumed == 3 and same(whole, again) and whole.key == again.key and abs(latents_of(data, whole)[rows(data)].astype(float).std() - 1) < .02


@pytest.mark.parametrize("objective", ["flow", "noise"])
def test_a_transformer_on_the_published_form_is_resumed_exactly_and_draws_by_its_seed(data, parts, tmp_path, objective):
    given = TRAIN | parts | dict(objective=objective)
    whole, _ = train_dit(data, rows(data), tmp_path/"whole", **given)
    with pytest.raises(Stop): train_dit(data, rows(data), tmp_path/"cut", callbacks=[Cut()], checkpoint_every=1, **given)
    again, h = train_dit(data, rows(data), tmp_path/"cut", **given); assert h.resumed == 3 and same(whole, again)
    whole.settings |= dict(steps=3); c = [Condition(text="Mild left pleural effusion."), Condition(view="PA", age=50.), Condition()]
    a, b, other = (whole.sample(c, torch_rng(s, "draw")) for s in (0, 0, 1))
    assert a.shape == (3, 1, 32, 32) and torch.equal(a, b) and not torch.equal(a, other) and a.abs().max() <= 1
    state = torch.get_rng_state(); whole.sample(c, torch_rng(0, "draw")); assert torch.equal(state, torch.get_rng_state())


def test_captions_move_what_a_model_that_heeds_them_draws(parts):
    dit = opened(parts); dit.settings |= dict(steps=2)
    a, b = dit.sample([Condition(text="Mild left pleural effusion."), Condition(text="normal heart")], torch_rng(0, "x")), dit.sample([Condition(text="Mild left pleural effusion.")]*2, torch_rng(0, "x"))
    assert torch.allclose(a[0], b[0], atol=1e-4) and not torch.allclose(a[1], b[1], atol=1e-3)


def opened(parts):   # a transformer whose closed layers have been opened, so that words matter
    with seeded(0, "heed"): dit = DiT((4, 8, 8), 16, drop=0., **NET).eval()
    for p in (*dit.net.proj_out.parameters(), *dit.places[2].parameters(), *(q for b in dit.net.transformer_blocks for q in b.attn2.to_out[0].parameters())): nn.init.normal_(p, std=.2, generator=torch_rng(0, "open"))
    return dit.attach(load_autoencoder(parts["autoencoder"]), text_encoder(parts["encoder"]))


def test_an_image_of_which_nothing_is_known_teaches_what_nothing_means(parts):
    dit = opened(parts); x, a, b = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16), torch.randn(2, 3, 16); mask = torch.ones(2, 3, dtype=torch.bool)
    def loss(states, silent):
        with seeded(0, "noise"): return dit.losses(dict(latent=x, states=states, mask=mask, silent=torch.tensor(silent)))["flow"].item()
    assert loss(a, [True, True]) == loss(b, [True, True]) and loss(a, [False, True]) != loss(b, [False, True]) and loss(a, [True, True]) != loss(a, [False, False])


def test_without_words_guidance_changes_nothing(parts):
    dit = opened(parts); draw = lambda w, c: (dit.settings.update(steps=2, guidance=w), dit.sample(c, torch_rng(0, "x")))[1]
    assert torch.allclose(draw(1., [Condition()]), draw(4., [Condition()]), atol=1e-4) and not torch.allclose(draw(1., [Condition(text="left")]), draw(4., [Condition(text="left")]), atol=1e-3)


def test_in_half_precision_it_draws_nearly_the_same(parts):
    dit = opened(parts); c = [Condition(text="Mild left pleural effusion.")]; drawn = {}
    for precision in ("no", "bf16"): dit.settings |= dict(steps=4, guidance=2., precision=precision); drawn[precision] = dit.sample(c, torch_rng(0, "x"))
    apart = (drawn["no"] - drawn["bf16"]).abs().max(); assert 0 < apart < .1 and drawn["bf16"].dtype == torch.float32


def test_a_control_keeps_the_base_and_is_resumed_exactly(data, parts, tmp_path):
    base, _ = train_dit(data, rows(data), tmp_path/"base", **TRAIN | parts)
    given = dict(base=tmp_path/"base", blocks=1, steps=6, batch_size=8, lr=1e-3, ema=.9, seed=0, **QUICK)
    whole, _ = train_control(data, rows(data), tmp_path/"whole", **given)
    with pytest.raises(Stop): train_control(data, rows(data), tmp_path/"cut", callbacks=[Cut()], checkpoint_every=1, **given)
    again, h = train_control(data, rows(data), tmp_path/"cut", **given)
    assert h.resumed == 3 and same(whole, again) and base.control is None and all(torch.equal(v, whole.state_dict()[k]) for k, v in base.state_dict().items())
    loaded = load_dit(tmp_path/"whole"); asked = [Condition(boxes=(Box("Mass", .1, .1, .6, .6),)), Condition(text="left")]
    for m in (whole, loaded): m.settings = dict(steps=2, guidance=2., method="heun")
    assert torch.allclose(whole.sample(asked, torch_rng(0, "x")), loaded.sample(asked, torch_rng(0, "x")), atol=1e-5)


def test_a_control_for_images_of_another_size_is_refused(data, parts, tmp_path):
    train_dit(data, rows(data), tmp_path/"base", **TRAIN | parts); small = open_dataset(str(data.path), 16)
    with pytest.raises(ValueError, match="16 px.*open the set at 32 px"): train_control(small, rows(small), tmp_path/"c", base=tmp_path/"base", blocks=1, steps=2, batch_size=8, lr=1e-3, ema=.9, seed=0, **QUICK)


def test_a_second_stage_begins_with_the_weights_of_the_first_on_larger_images(data, parts, tmp_path):
    where = dict(autoencoder=parts["autoencoder"], encoder=parts["encoder"], batch_size=4, seed=0, ema=.5, progress=False)
    first, _ = train_dit(data, rows(data), tmp_path/"first", objective="flow", network=NET | dict(places=0), steps=3, lr=1e-3, **where)
    larger = open_dataset("phantom", 64, n=12, seed=5)
    second, _ = train_dit(larger, rows(larger), tmp_path/"second", objective="flow", network=NET | dict(places=0), steps=1, lr=0., start=tmp_path/"first", **where)   # a rate of zero: the start is kept
    assert second.shape[1] == 2*first.shape[1] and same(first, second) and second.sample([Condition(text="left")], torch_rng(0, "x")).shape[-1] == 64
    for changes, match in ((dict(objective="noise"), "another objective, flow"), (dict(network=NET | dict(places=4)), "cannot be begun with")):
        with pytest.raises(ValueError, match=match): train_dit(larger, rows(larger), tmp_path/"no", **dict(objective="flow", network=NET | dict(places=0)) | changes, steps=1, lr=0., start=tmp_path/"first", **where)

def test_what_no_training_image_tells_of_a_patient_cannot_be_asked_for(data, parts, tmp_path):
    m, _ = train_dit(data, rows(data), tmp_path/"who", objective="flow", network=NET, steps=1, lr=1e-3, batch_size=4, seed=0, ema=.5, progress=False, autoencoder=parts["autoencoder"], encoder=parts["encoder"])
    assert data.manifest.race.isna().all() and {"view", "sex", "age"} <= m.conditions and load_dit(tmp_path/"who").conditions == m.conditions
    with pytest.raises(ValueError, match="race"): m.sample([Condition(race="Asian")], torch_rng(0, "x"))


def test_the_same_texts_make_the_same_pieces():
    texts = ["Mild left pleural effusion.", "The heart is of normal size.", "A 43 mm mass; a 47 mm mass."]
    assert train_tokenizer(texts, 60).get_vocab() == train_tokenizer(texts, 60).get_vocab()


def test_a_control_needs_boxes_or_masks(data, parts, tmp_path):
    bare = write_set(tmp_path/"bare", np.array(data.images), data.manifest)
    train_dit(bare, rows(bare), tmp_path/"base", **TRAIN | parts)
    with pytest.raises(ValueError, match="neither boxes nor masks"): train_control(bare, rows(bare), tmp_path/"c", base=tmp_path/"base", blocks=1, steps=2, batch_size=8, lr=1e-3, ema=.9, seed=0, **QUICK)


def test_parts_that_have_moved_are_named_and_can_be_given_anew(data, parts, tmp_path):
    train_dit(data, rows(data), tmp_path/"m", **TRAIN | parts); file = tmp_path/"m"/"dit.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(autoencoder=str(tmp_path/"gone"))))
    with pytest.raises(FileNotFoundError, match="gone holds no autoencoder"): load_dit(tmp_path/"m")
    load_dit(tmp_path/"m", autoencoder=parts["autoencoder"])
    with seeded(1, "other"): small_autoencoder([4, 8, 8], image_channels=3).kl.save_pretrained(tmp_path/"other"/"vae")
    with pytest.raises(ValueError, match="trained with an autoencoder other than what .*other holds: give that as `autoencoder`"): load_dit(tmp_path/"m", autoencoder=str(tmp_path/"other"))
    dit = load_dit(tmp_path/"m", autoencoder=parts["autoencoder"]); before = dit.key
    sample_set(dit, [Condition(text="left")], tmp_path/"set", data.findings, "dit", 0, settings=dict(steps=1)); dit.attach(load_autoencoder(str(tmp_path/"other")), dit.frozen[1])
    assert dit.key != before
    with pytest.raises(FileExistsError, match="other weights"): sample_set(dit, [Condition(text="left")], tmp_path/"set", data.findings, "dit", 0, settings=dict(steps=1))   # what decodes is another


def test_labels_that_no_training_image_has_cannot_be_asked_for(data, parts, tmp_path):
    m = as_manifest(pd.DataFrame(dict(image_id=[f"i{k}" for k in range(16)], patient_id=[f"p{k}" for k in range(16)], Edema=0.)), source="folder", split="train")
    few = write_set(tmp_path/"few", np.array(data.images[:16]), m); dit, _ = train_dit(few, np.arange(16), tmp_path/"m", **TRAIN | parts)
    with pytest.raises(ValueError, match="Edema"): sample_set(dit, [Condition(findings={"Edema": 1.})], tmp_path/"set", few.findings, "dit", 0)


# Precision and compiling

def test_bf16_trains_and_is_another_fit(data, parts, tmp_path):
    a, h = train_dit(data, rows(data), tmp_path/"a", precision="bf16", **TRAIN | parts); assert np.isfinite(h.log.loss).all()
    with pytest.raises(ValueError, match="precision is 'bf16' there"): train_dit(data, rows(data), tmp_path/"a", **TRAIN | parts)


def test_compiled_it_learns_the_same():
    def build():
        with seeded(0, "compile"): return DiT((4, 4, 4), 8, drop=0., **NET)
    a, b = build(), build(); b.compile(backend="aot_eager"); g = torch_rng(0, "batch")
    batch = dict(latent=torch.randn(4, 4, 4, 4, generator=g), states=torch.randn(4, 3, 8, generator=g), mask=torch.ones(4, 3, dtype=torch.bool))
    for m in (a, b):
        with seeded(0, "noise"): sum(m.losses(batch).values()).backward()
    for (k, p), q in zip(a.named_parameters(), b.parameters()): assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-5)), k


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_by_inductor_it_trains(data, parts, tmp_path):
    _, h = train_dit(data, rows(data), tmp_path/"c", compile=True, **TRAIN | parts); assert np.isfinite(h.log.loss).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("objective", ["flow", "noise"])
def test_on_a_gpu_in_bf16_and_compiled(data, parts, tmp_path, objective):
    dit, h = train_dit(data, rows(data), tmp_path/"g", precision="bf16", compile=True, **TRAIN | parts | dict(objective=objective)); dit.settings |= dict(steps=2, precision="bf16")
    assert np.isfinite(h.log.loss).all() and dit.sample([Condition(text="left")], torch_rng(0, "x")).device.type == "cuda"
    control, h = train_control(data, rows(data), tmp_path/"c", base=tmp_path/"g", blocks=1, steps=2, batch_size=8, lr=1e-3, ema=.9, seed=0, precision="bf16", compile=True, **QUICK); control.settings |= dict(steps=2, precision="bf16")
    assert np.isfinite(h.log.loss).all() and control.sample([Condition(boxes=(Box("Mass", .1, .1, .6, .6),))], torch_rng(0, "x")).device.type == "cuda"


def test_a_control_has_the_shape_of_its_base():
    with seeded(0, "c"): dit = DiT((4, 4, 4), 8, **NET)
    c = Control(dit.net, 1); assert len(c.blocks) == len(c.out) == 1 and not any(p is q for p in c.parameters() for q in dit.parameters())
