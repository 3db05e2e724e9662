"What chapter 38 does not show: published forms, damaged and foreign parts, exact resume, LoRA, what moves in which phase, prompts of real releases."
import json, shutil

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.utils import logging
from transformers import BertConfig, BertModel

from cxr_nb.core import seeded, torch_rng
from cxr_nb.data.images import write_set
from cxr_nb.data.phantom import open_dataset
from cxr_nb.data.sources import as_annotations, as_manifest
from cxr_nb.generators.conditions import Box, Condition, sample_set
from cxr_nb.generators.latents import small_autoencoder
from cxr_nb.generators.stable_diffusion import StableDiffusion, add_lora, base_key, finetune, load_diffusion, load_pipeline, prompt_of, prompt_tokenizer, prompts_of, tiny_pipeline
from cxr_nb.measures.text import train_tokenizer
from cxr_nb.train import Callback
from small import Cut, Stop, rows, same

logging.disable_progress_bar()
WORDS = ["ChestXRay Edema, Mass top left", "ChestXRay No Finding", "Mild left apical pneumothorax. The right lung appears relatively clear."]
ROENTGEN = "Mild left apical pneumothorax. The right lung appears relatively clear. No pneumothorax on the right side is seen."
TUNE = dict(style="label", steps=4, lr=1e-3, text_steps=2, text_lr=1e-3, batch_size=8, seed=0, ema=.9, checkpoint_seconds=1e9, progress=False)


@pytest.fixture(scope="module")
def data(): return open_dataset("phantom", 32, n=40, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A pipeline in Stable Diffusion's form (three channels, velocity), in a folder."
    there = tmp_path_factory.mktemp("tiny")
    with seeded(0, "tiny"): tiny_pipeline(small_autoencoder([4, 8, 8], image_channels=3), WORDS*5, widths=[8, 8], text_width=16).save_pretrained(there)
    return there


def draw(m, n=2, precision="no", **c): m.settings = dict(steps=2, guidance=2., precision=precision); return m.sample([Condition(**c or dict(findings={"No_Finding": 1.}))]*n, torch_rng(0, "x"))
class Watch(Callback):
    def __init__(self): self.seen = []
    def after_step(self, s): self.seen.append(tuple(torch.cat([p.detach().flatten() for p in net.parameters()]).clone() for net in (s.model.text, s.model.unet)))


# Pipelines

def edited(tiny, to, part, **changes):
    shutil.copytree(tiny, to); f = to/part; j = json.loads(f.read_text()); f.write_text(json.dumps(j | changes)); return to



def test_the_tokenizer_of_prompts_is_the_same_for_the_same_texts_and_spells_what_it_has_not_met():
    a, b = (prompt_tokenizer(WORDS, 300) for _ in range(2)); assert a.get_vocab() == b.get_vocab() and len(a) <= 300
    ids = a("quartz 93%").input_ids; assert a.decode(ids, skip_special_tokens=True).strip() == "quartz 9 3 %" and len(ids) > 4
    assert len(a(WORDS[0]).input_ids) < len(WORDS[0]) and prompt_tokenizer(WORDS[:1], 300).get_vocab() != a.get_vocab()


def test_pipelines_of_both_versions_and_with_another_sampler_train_and_draw(data, tiny, tmp_path):
    pipe = load_pipeline(str(tiny)); drawn = []
    for k, scheduler in enumerate([DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon"), PNDMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon", skip_prk_steps=True), DDIMScheduler.from_config(pipe.scheduler.config)]):
        pipe.scheduler = scheduler; pipe.save_pretrained(tmp_path/str(k)); m, h = finetune(data, rows(data), tmp_path/f"m{k}", pipeline=str(tmp_path/str(k)), **TUNE)
        assert np.isfinite(h.log["unet/error"].dropna()).all() and m.schedule.config.prediction_type == scheduler.config.prediction_type; drawn.append(draw(m))
    assert all(x.shape == (2, 1, 32, 32) and x.isfinite().all() for x in drawn) and not torch.equal(drawn[0], drawn[2])


def test_the_loss_is_that_of_the_schedule(tiny):
    pipe = load_pipeline(str(tiny)); m = StableDiffusion(pipe, 32).eval(); x = torch.randn(3, 4, 8, 8, generator=torch_rng(0, "z")); ids = torch.tensor(m.ids(WORDS))
    with torch.no_grad():
        torch.manual_seed(1); got = m.losses(dict(latent=x, ids=ids))["error"]
        torch.manual_seed(1); noise, t = torch.randn_like(x), torch.randint(1000, (3,)); a = m.schedule.alphas_cumprod[t][:, None, None, None]
        out = pipe.unet(a.sqrt()*x + (1 - a).sqrt()*noise, t, pipe.encode_prompt(WORDS, "cpu", 1, False)[0]).sample
    assert torch.allclose(got, ((out - (a.sqrt()*noise - (1 - a).sqrt()*x))**2).mean(), rtol=1e-4)


def test_weights_in_the_old_format_load_and_answer_a_report(tiny, tmp_path):
    pipe = load_pipeline(str(tiny)); pipe.save_pretrained(tmp_path/"old", safe_serialization=False); assert list((tmp_path/"old"/"unet").glob("*.bin"))
    a, b = (StableDiffusion(load_pipeline(str(p)), 32, "report").eval() for p in (tiny, tmp_path/"old"))
    assert same(a, b) and torch.equal(draw(a, text=ROENTGEN), draw(b, text=ROENTGEN)) and not torch.equal(draw(a, text=ROENTGEN), draw(a, text="Severe right effusion."))


def test_another_text_encoder_than_clips_loads_and_masks_as_it_says(tiny, tmp_path):
    there = tmp_path/"bert"; shutil.copytree(tiny, there); words = train_tokenizer(WORDS, 120); words.model_max_length = 20; shutil.rmtree(there/"tokenizer"); words.save_pretrained(there/"tokenizer"); shutil.rmtree(there/"text_encoder")
    with seeded(0, "bert"): net = BertModel(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, use_attention_mask=True))
    net.save_pretrained(there/"text_encoder"); index = there/"model_index.json"; index.write_text(json.dumps(json.loads(index.read_text()) | dict(text_encoder=["transformers", "BertModel"], tokenizer=["transformers", "PreTrainedTokenizerFast"])))
    m = StableDiffusion(load_pipeline(str(there)), 32, "report").eval()
    with torch.no_grad(): mine = m.states(torch.tensor(m.ids(WORDS[:1]))); theirs = m.pipeline().encode_prompt(WORDS[:1], "cpu", 1, False)[0]
    assert torch.allclose(mine, theirs, atol=1e-6) and draw(m, text=ROENTGEN).isfinite().all()


@pytest.mark.parametrize("part, changes, match", [("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "holds a StableDiffusionXLPipeline"), ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample'"),
                                                  ("vae/config.json", {"_class_name": "VQModel"}, "holds a VQModel")])
def test_other_pipelines_are_refused(tiny, tmp_path, part, changes, match):
    with pytest.raises(ValueError, match=match): StableDiffusion(load_pipeline(str(edited(tiny, tmp_path/"x", part, **changes))), 32)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_missing_tensors_are_an_error_and_not_drawn_at_random(tiny, tmp_path, part):
    import safetensors.torch as st
    shutil.copytree(tiny, tmp_path/"x"); file = next((tmp_path/"x"/part).glob("*.safetensors")); w = st.load_file(file); w.pop(sorted(w)[0]); st.save_file(w, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 tensors of {part} are missing"): load_pipeline(str(tmp_path/"x"))


def test_a_cut_off_file_is_named(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path/"x"); file = next((tmp_path/"x"/"unet").glob("*.safetensors")); file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="x cannot be read as Stable Diffusion"): load_pipeline(str(tmp_path/"x"))


def test_parts_of_different_models_are_refused(tiny, tmp_path):
    pipe = tiny_pipeline(small_autoencoder([4, 8, 8]), WORDS*5, widths=[8, 8], text_width=32); shutil.copytree(tiny, tmp_path/"x"); shutil.rmtree(tmp_path/"x"/"text_encoder"); pipe.text_encoder.save_pretrained(tmp_path/"x"/"text_encoder")
    with pytest.raises(ValueError, match="states of 16 numbers, and the text encoder gives 32"): load_pipeline(str(tmp_path/"x"))


def test_sides_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match="size 36"): StableDiffusion(load_pipeline(str(tiny)), 36)


# Prompts

def test_findings_without_boxes_are_named_without_places_and_healthy_images_alone_teach_none(data, tmp_path):
    m = as_manifest(pd.DataFrame(dict(image_id=list("abc"), patient_id=list("abc"), Edema=[1., 1., 0.], Mass=[0., 1., 0.], No_Finding=[0., 0., 1.], text=["x", None, "y"])), source="folder", split="train")
    a = as_annotations(pd.DataFrame([dict(image_id=i, kind="finding", finding=f, value=1., reader="r", x0=0., y0=.6, x1=.25, y1=.9) for i, f in (("a", "Edema"), ("b", "Mass"))]))
    few = write_set(tmp_path/"few", np.array(data.images[:3]), m, a)
    kept, words = prompts_of(few, np.arange(3), "position"); assert kept.tolist() == [0, 1, 2] and words == ["ChestXRay Edema bottom left", "ChestXRay Mass bottom left, Edema", "ChestXRay No Finding"]
    assert prompts_of(few, np.arange(3), "report")[1] == ["x", "y"] and prompts_of(few, np.arange(3), "label")[1][1] == "ChestXRay Edema, Mass"
    with pytest.raises(ValueError, match="none of 1 images has boxes"): prompts_of(few, np.array([2]), "position")
    with pytest.raises(ValueError, match="no style"): prompts_of(few, np.arange(3), "poem")


def test_a_long_prompt_is_cut_off_and_an_empty_one_is_the_unconditional(tiny):
    m = StableDiffusion(load_pipeline(str(tiny)), 32); assert m.ids([" ".join(WORDS*20), ""]).shape == (2, 77) and np.array_equal(m.ids([""])[0], m.empty.numpy())
    assert prompt_of(Condition(boxes=(Box("Mass", 0, 0, .3, .3),)), "position") == "ChestXRay Mass top left" and prompt_of(Condition(boxes=(Box("Mass", 0, 0, .3, .3),)), "label") == ""


def test_each_style_understands_its_own_conditions(tiny):
    for style, own in {"label": {"findings"}, "position": {"findings", "boxes"}, "report": {"findings", "text"}}.items(): assert StableDiffusion(load_pipeline(str(tiny)), 32, style).conditions == own
    with pytest.raises(ValueError, match="which no image that it was trained on"): StableDiffusion(load_pipeline(str(tiny)), 32).sample([Condition(findings={"Edema": 1.})], torch_rng(0, "x"))


# Training

@pytest.mark.parametrize("rank", [0, 2])
def test_it_is_resumed_exactly_and_draws_by_its_seed(data, tiny, tmp_path, rank):
    whole, h = finetune(data, rows(data), tmp_path/"a", pipeline=str(tiny), rank=rank, checkpoints=2, **TUNE)
    with pytest.raises(Stop): finetune(data, rows(data), tmp_path/"b", pipeline=str(tiny), rank=rank, checkpoints=2, callbacks=[Cut()], **TUNE | dict(checkpoint_every=2))
    again, g = finetune(data, rows(data), tmp_path/"b", pipeline=str(tiny), rank=rank, checkpoints=2, **TUNE); assert g.resumed == 2 and same(whole, again)
    kept = sorted(p.name for p in (tmp_path/"b"/"kept").iterdir()); assert kept == ["000004", "000006"]
    assert torch.equal(draw(load_diffusion(tmp_path/"b"/"kept"/"000006")), draw(whole)) and not torch.equal(draw(load_diffusion(tmp_path/"b"/"kept"/"000004")), draw(whole))


def test_the_text_encoder_is_trained_first_and_the_unet_after_it(data, tiny, tmp_path):
    w = Watch(); finetune(data, rows(data), tmp_path/"a", pipeline=str(tiny), callbacks=[w], **TUNE)
    moved = [tuple(not torch.equal(a, b) for a, b in zip(x, y)) for x, y in zip(w.seen, w.seen[1:])]; assert moved == [(True, False)] + [(False, True)]*4
    w = Watch(); finetune(data, rows(data), tmp_path/"b", pipeline=str(tiny), callbacks=[w], **TUNE | dict(text_steps=0)); assert torch.equal(w.seen[0][0], w.seen[-1][0])


def test_lora_changes_nothing_at_first_keeps_its_base_and_needs_it(data, tiny, tmp_path):
    m = StableDiffusion(load_pipeline(str(tiny)), 32, seen={"No_Finding": {1.}}).eval(); before, key = draw(m), base_key(m); add_lora(m, 2); assert torch.allclose(draw(m.eval()), before, atol=1e-6) and base_key(m) == key
    trained, _ = finetune(data, rows(data), tmp_path/"a", pipeline=str(tiny), rank=2, **TUNE); folder = tmp_path/"a"/"kept"/"000006"
    assert base_key(trained) == key and all("lora_" in k for k, p in trained.named_parameters() if p.requires_grad) and not list(folder.rglob("diffusion_pytorch_model*"))
    with seeded(1, "other"): tiny_pipeline(small_autoencoder([4, 8, 8]), WORDS*5, widths=[8, 8], text_width=16).save_pretrained(tmp_path/"other")
    with pytest.raises(ValueError, match="another pipeline"): load_diffusion(folder, base=str(tmp_path/"other"))
    file = folder/"diffusion.json"; file.write_text(json.dumps(json.loads(file.read_text()) | dict(base=str(tmp_path/"gone"))))
    with pytest.raises(FileNotFoundError, match="gone holds no pipeline"): load_diffusion(folder)
    assert torch.equal(draw(load_diffusion(folder, base=str(tiny))), draw(trained))


def test_a_model_whose_saving_was_killed_is_not_loaded(data, tiny, tmp_path):
    finetune(data, rows(data), tmp_path/"a", pipeline=str(tiny), **TUNE); folder = tmp_path/"a"/"kept"/"000006"; (folder/"diffusion.json").unlink()
    with pytest.raises(FileNotFoundError, match="no diffusion.json"): load_diffusion(folder)


def test_another_pipeline_or_style_is_another_fit(data, tiny, tmp_path):
    finetune(data, rows(data), tmp_path/"a", pipeline=str(tiny), **TUNE)
    for change in (dict(style="position"), dict(rank=2), dict(drop=.5)):
        with pytest.raises(ValueError, match="belongs to another fit"): finetune(data, rows(data), tmp_path/"a", pipeline=str(tiny), **TUNE | change)


def test_saving_memory_learns_the_same(data, tiny, tmp_path):
    a, b = (finetune(data, rows(data), tmp_path/str(k), pipeline=str(tiny), save_memory=k, **TUNE)[0] for k in (False, True)); assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.parameters(), b.parameters()))


def test_bf16_trains_and_half_weights_draw(data, tiny, tmp_path):
    m, h = finetune(data, rows(data), tmp_path/"a", pipeline=str(tiny), precision="bf16", **TUNE); assert np.isfinite(h.log["unet/error"].dropna()).all()
    wide, narrow = draw(m), draw(m, precision="bf16")
    assert wide.dtype == narrow.dtype == torch.float32 and 0 < (wide - narrow).abs().max() and (wide - narrow).abs().mean() < .05
    assert draw(StableDiffusion(load_pipeline(str(tiny), torch.bfloat16), 32, "report").eval(), text=ROENTGEN).isfinite().all()


def test_a_killed_sampling_is_taken_up_and_a_set_is_not_overwritten(data, tiny, tmp_path):
    m = StableDiffusion(load_pipeline(str(tiny)), 32, "position", data.findings, {f: {0., 1.} for f in data.findings}).eval(); m.settings = dict(steps=1, guidance=1.)
    asked = [Condition(findings={"Mass": 1.}, boxes=(Box("Mass", 0, 0, .3, .3),))]*5; whole = sample_set(m, asked, tmp_path/"a", data.findings, "sd", 0, batch_size=2)
    sample, calls = m.sample, []
    def cut(c, r):
        calls.append(len(c))
        if len(calls) == 2: raise Stop
        return sample(c, r)
    m.sample = cut
    with pytest.raises(Stop): sample_set(m, asked, tmp_path/"b", data.findings, "sd", 0, batch_size=2)
    made = sample_set(m, asked, tmp_path/"b", data.findings, "sd", 0, batch_size=2); assert calls == [2, 2, 2, 1] and np.array_equal(made.images, whole.images)
    assert sample_set(m, asked, tmp_path/"b", data.findings, "sd", 0, batch_size=2).sha256 == made.sha256 and len(calls) == 4    # made before: opened
    other = StableDiffusion(load_pipeline(str(tiny)), 32, "position", data.findings, m.seen).eval(); other.settings = dict(steps=2, guidance=1.)
    again = sample_set(other, asked, tmp_path/"c", data.findings, "sd", 0, batch_size=2, settings=dict(steps=1))     # settings for this set only
    assert np.array_equal(again.images, whole.images) and other.settings["steps"] == 2 and again.info["made_by"]["sampling"]["steps"] == 1
    m.settings["steps"] = 2
    with pytest.raises(FileExistsError, match="settings"): sample_set(m, asked, tmp_path/"b", data.findings, "sd", 0, batch_size=2)


def test_compiled_it_learns_the_same(tiny):
    a, b = (StableDiffusion(load_pipeline(str(tiny)), 32) for _ in range(2)); b.unet.compile(backend="aot_eager"); batch = dict(latent=torch.randn(2, 4, 8, 8, generator=torch_rng(0, "z")), ids=torch.tensor(a.ids(WORDS[:2])))
    for m in (a, b):
        with seeded(0, "noise"): sum(m.losses(batch).values()).backward()
    assert all(torch.allclose(p.grad, q.grad, atol=1e-5) for p, q in zip(a.unet.parameters(), b.unet.parameters()) if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_in_fp16_and_compiled(data, tiny, tmp_path):
    m, h = finetune(data, rows(data), tmp_path/"g", pipeline=str(tiny), precision="fp16", compile=True, **TUNE); assert np.isfinite(h.log["unet/error"].dropna()).all() and draw(m).device.type == "cuda"
