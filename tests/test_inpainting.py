"Attention, registration and inpainting: what no single notebook shows."
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest
import SimpleITK as sitk
import torch

from cxr_nb.core import repo_root, rng, torch_rng
from cxr_nb.data.findings import FINDINGS
from cxr_nb.data.images import open_set, write_set
from cxr_nb.data.phantom import open_dataset
from cxr_nb.inpainting.demons import FORCES, carry, compose, jacobian, register, smooth, warp
from cxr_nb.inpainting.glori import Attending, GLoRI, attention, grad_cam, part_by_patient, load_glori, localised, regions_of, rollout, train_glori
from cxr_nb.inpainting.inpaint import CENTRAL, Holes, Inpainter, carried_maps, fill, known_places, load_inpainter, plan_edits, refill, soft_masks, train_inpainter
from cxr_nb.measures.classifier import predict
from small import Cut, Stop, rows, same

NAMES = list(FINDINGS)
SETTINGS = dict(spec="small", head_width=32, steps=6, batch_size=8, lr=1e-3, seed=0, network=dict(width=32))
SHAPE = dict(coupling="hole", widths=(8, 16), fold=2, steps=6, batch_size=8, lr=1e-3, ema=.9, seed=0)


@pytest.fixture(scope="module")
def data(): return open_dataset("phantom", 32, n=84)


@pytest.fixture(scope="module")
def bent():
    x = torch.from_numpy(np.array(open_dataset("phantom", 64, n=48).images[:3]))[:, None].float()/255
    w = smooth(torch.randn(3, 2, 64, 64, generator=torch_rng(0, "w")), 8.); return x, 2*w/w.square().sum(1, keepdim=True).mean((2, 3), keepdim=True).sqrt()


# attention

def test_glori_heeds_the_order_of_patches_only_through_its_map():
    head = GLoRI(8, 3, 16, 2, 32).eval(); x, order = torch.randn(1, 8, 4, 4), torch.randperm(16)
    a, seen = head(x, x.mean((2, 3))); b, turned = head(x.flatten(2)[..., order].view_as(x), x.mean((2, 3)))
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(seen.flatten(3)[..., order], turned.flatten(3), atol=1e-6)


def test_queries_are_not_trained_and_the_published_network_is_left_alone(data, tmp_path):
    model, _ = train_glori(data, rows(data), ["Effusion", "Mass"], tmp_path, **SETTINGS)
    again, _ = train_glori(data, rows(data), ["Effusion", "Mass"], tmp_path/"b", **SETTINGS | dict(steps=1))
    assert torch.equal(model.head.query, again.head.query) and not torch.equal(model.head.key.weight, again.head.key.weight)
    import timm
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path/"vit.pth")
    spec = f"timm:vit_tiny_patch16_224@{tmp_path/'vit.pth'}"; kept, _ = train_glori(data, rows(data), ["Effusion"], tmp_path/"c", **SETTINGS | dict(spec=spec, network={}, steps=2))
    weights = torch.load(tmp_path/"vit.pth", weights_only=True)
    assert all(torch.equal(v, weights[k]) for k, v in kept.tokens.net.state_dict().items())
    assert attention(kept, data.images[:2], [0, 0]).shape == (2, 32, 32) and grad_cam(kept, kept.tokens.grid, data.images[:2], np.array([0, 0])).max() > 0


def test_a_training_of_glori_that_was_killed_ends_with_the_same_weights(data, tmp_path):
    whole, _ = train_glori(data, rows(data), ["Effusion", "Mass"], tmp_path/"whole", **SETTINGS)
    with pytest.raises(Stop): train_glori(data, rows(data), ["Effusion", "Mass"], tmp_path/"cut", callbacks=[Cut()], checkpoint_every=2, **SETTINGS)
    taken, history = train_glori(data, rows(data), ["Effusion", "Mass"], tmp_path/"cut", checkpoint_every=2, **SETTINGS)
    assert history.resumed == 2 and same(whole, taken)
    with pytest.raises(ValueError, match="belongs to another fit: data is"): train_glori(data, np.flatnonzero(data.manifest.split != "train")[:1].tolist() + rows(data)[1:].tolist(), ["Effusion", "Mass"], tmp_path/"whole", **SETTINGS)     # as many images, one of them another
    with pytest.raises(ValueError, match="no finding to learn"): train_glori(data, rows(data), [], tmp_path/"none", **SETTINGS)


def test_transformers_of_the_form_of_dinov3_have_tokens_and_rollout(data, tmp_path):
    import timm
    torch.save(timm.create_model("vit_small_patch16_dinov3", num_classes=0).state_dict(), tmp_path/"v3.pth")
    model = Attending(f"timm:vit_small_patch16_dinov3@{tmp_path/'v3.pth'}", 32, ["Effusion", "Mass"], head_width=32); patches, cls = model.tokens(torch.from_numpy(np.array(data.images[:2]))[:, None])
    assert patches.shape == (2, 4*384, 16, 16) and cls.shape == (2, 4*384) and (through := rollout(model, data.images[:2])).shape == (2, 32, 32) and np.allclose(through.sum((1, 2)), 4, rtol=.05)     # 16 x 16 patches of 2 x 2 pixels


def test_rollout_multiplies_the_attention_of_the_blocks():
    from cxr_nb.inpainting.glori import _rolled
    a, b = (torch.softmax(torch.randn(1, 2, 5, 5, generator=torch_rng(k, "a")), -1) for k in (0, 1)); tokens = SimpleNamespace(net=SimpleNamespace(num_prefix_tokens=1), blocks=1)
    by_hand = (b.mean(1) + torch.eye(5))/2 @ ((a.mean(1) + torch.eye(5))/2); by_hand = by_hand[:, 1:, 1:]/by_hand[:, 1:, 1:].sum(-1, keepdim=True)
    assert torch.allclose(_rolled({"0": a, "1": b}, tokens), by_hand, atol=1e-6)


def test_what_is_loaded_is_what_was_trained_and_knows_its_patients(data, tmp_path):
    some, others = part_by_patient(data, rows(data), .6); model, _ = train_glori(data, some, ["Effusion", "Mass"], tmp_path/"fit-0", **SETTINGS); loaded = load_glori(tmp_path)
    assert same(model, loaded) and loaded.patients == set(data.manifest.patient_id.iloc[some]) and not loaded.patients & set(data.manifest.patient_id.iloc[others])
    assert np.allclose(attention(model, data.images[:3], [0, 1, 1]), attention(loaded, data.images[:3], [0, 1, 1])) and np.allclose(predict(model, data, np.arange(3)), predict(loaded, data, np.arange(3)))
    with pytest.raises(FileNotFoundError, match="run 40_glori with out="): load_glori(tmp_path/"nothing")
    with pytest.raises(ValueError, match="leaves one part without any"): part_by_patient(data, some[:1], .5)


def test_a_map_that_is_the_region_wins_and_chance_scores_the_regions_area(data):
    about, regions = regions_of(data, np.arange(len(data)), ["Effusion", "Mass", "Cardiomegaly"])
    assert (localised(regions.astype(float), regions) == 1).all()
    noise = rng(0, "noise").random(regions.shape); s = localised(noise, regions).mean(0); area = regions.mean()
    assert abs(s[1] - area) < .02 and s[0] < area + .2
    assert not about.duplicated().any() and all(data.manifest[f].iloc[i] == 1 for i, f in zip(about.row, about.finding))


def test_regions_come_from_boxes_where_there_are_no_masks(data, tmp_path):
    notes = data.annotations.assign(mask=pd.NA); bare = write_set(tmp_path/"boxes", np.array(data.images), data.manifest, notes, window=data.window)
    about, regions = regions_of(bare, np.arange(len(bare)), ["Mass"]); same_about, masks = regions_of(data, np.arange(len(data)), ["Mass"])
    assert (about.row.to_numpy() == same_about.row.to_numpy()).all() and (regions | masks == regions).all() and regions.sum() >= masks.sum()


# registration

@pytest.mark.parametrize("force", FORCES)
def test_known_maps_are_undone_without_folding(bent, force):
    x, w = bent; u = register(warp(x, w), x, force=force); body = (x[:, 0] > .1) & torch.nn.functional.pad(torch.ones(56, 56, dtype=torch.bool), (4, 4, 4, 4))
    assert compose(w, u).square().sum(1).sqrt()[body].mean() < .6*w.square().sum(1).sqrt()[body].mean() and (jacobian(u) > 0).all()


def test_a_pair_is_registered_alike_alone_and_in_a_batch(bent):
    x, w = bent; moving = warp(x, w); whole = register(moving, x, block=8)
    assert torch.allclose(whole[1:2], register(moving[1:2], x[1:2]), atol=1e-3) and torch.allclose(whole, register(moving, x, block=1), atol=1e-3)


def test_simpleitk_finds_the_same_map(bent):
    x, w = bent; moving = warp(x, w); ours = register(moving[:1], x[:1], rounds=(60,), levels="as they are")
    d = sitk.DiffeomorphicDemonsRegistrationFilter(); d.SetNumberOfIterations(60); d.SetMaximumRMSError(0.); d.SetSmoothDisplacementField(True); d.SetSmoothUpdateField(True); d.SetMaximumUpdateStepLength(1.)
    theirs = torch.from_numpy(np.moveaxis(sitk.GetArrayFromImage(d.Execute(*(sitk.GetImageFromArray(v[0, 0].numpy()) for v in (x, moving)))), -1, 0))[None].float()
    body = (x[:1, 0] > .1); between, far = ((a - b).square().sum(1).sqrt()[body].mean() for a, b in ((ours, theirs), (ours, ours*0)))
    assert between < .4*far


def test_what_is_mirrored_goes_to_the_other_side():
    data = open_dataset("phantom", 64, n=48); x = torch.from_numpy(np.array(data.images[:2]))[:, None].float(); marked = torch.zeros_like(x); marked[..., 20:40, 5:25] = 1
    same_side, _ = carry(marked, x, x.flip(0)); other, seen = carry(marked, x, x.flip(0), mirrored=True)
    assert same_side[..., :32].sum() > 5*same_side[..., 32:].sum() and other[..., 32:].sum() > 5*other[..., :32].sum() and seen.shape == x.shape


def test_images_that_are_not_finite_are_refused(bent):
    x, _ = bent; bad = x.clone(); bad[0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"): register(bad, x)


# inpainting

@pytest.fixture(scope="module")
def holes(data):
    about, regions = regions_of(data, rows(data), NAMES); m = data.manifest
    return Holes(data, about, regions, rows(data)[m.No_Finding.to_numpy()[rows(data)] == 1], NAMES, 0)


def test_holes_of_healthy_images_have_the_shapes_of_the_ill(data, holes):
    many = [holes.__getitems__(list(range(k, k + 8))) for k in range(0, len(holes) - 8, 4)]; area, asked = torch.cat([b["mask"].mean((1, 2, 3)) for b in many]), torch.cat([b["findings"].sum(1) for b in many])
    ill, well = area[asked == 1], area[asked == 0]
    assert len(ill) > 20 and len(well) > 20 and abs(ill.mean() - well.mean()) < 4*(ill.var()/len(ill) + well.var()/len(well)).sqrt()
    with pytest.raises(ValueError, match="both are needed"): Holes(data, pd.DataFrame(columns=["row", "finding"]), np.zeros((0, 32, 32), bool), np.arange(3), ["Mass"], 0)


def test_a_killed_inpainting_ends_with_the_same_weights_and_is_loaded(data, holes, tmp_path):
    whole, _ = train_inpainter(data, holes, NAMES, tmp_path/"whole", settings=dict(steps=7, guidance=3.), **SHAPE)
    with pytest.raises(Stop): train_inpainter(data, holes, NAMES, tmp_path/"cut", callbacks=[Cut()], checkpoint_every=2, **SHAPE)
    taken, history = train_inpainter(data, holes, NAMES, tmp_path/"cut", checkpoint_every=2, **SHAPE)
    assert history.resumed == 2 and same(whole, taken) and same(whole, load_inpainter(tmp_path/"cut"))
    assert load_inpainter(tmp_path/"whole").settings == whole.settings == taken.settings | dict(steps=7, guidance=3.) != taken.settings
    with pytest.raises(FileNotFoundError, match="inpainter.json"): load_inpainter(tmp_path)
    told = json.loads((tmp_path/"cut/inpainter.json").read_text()); del told["settings"]; (tmp_path/"cut/inpainter.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="no settings of sampling"): load_inpainter(tmp_path/"cut")
    about = pd.DataFrame(dict(row=holes.rows, finding=[NAMES[k] for k in holes.kind])); softer = Holes(data, about, holes.regions, holes.healthy, NAMES, 0, soft=2.)
    with pytest.raises(ValueError, match="another fit"): train_inpainter(data, softer, NAMES, tmp_path/"whole", **SHAPE)


@pytest.mark.parametrize("coupling", ["hole", "noise", "alone"])
def test_what_is_asked_for_is_drawn_and_guidance_drives_it_further(tmp_path, coupling):
    n, g = 64, rng(0, "toy"); images = g.normal(100, 6, (3*n, 32, 32)); regions = np.zeros((2*n, 32, 32), bool)
    for k, (y, x) in enumerate(g.integers(4, 18, (2*n, 2))): regions[k, y:y + 10, x:x + 10] = True; images[k][regions[k]] += 60 if k < n else -60     # A is bright, B is dark
    toy = SimpleNamespace(images=images.round().astype(np.uint8), path="toy", size=32, sha256="toy"); about = pd.DataFrame(dict(row=range(2*n), finding=["A"]*n + ["B"]*n))
    model, _ = train_inpainter(toy, Holes(toy, about, regions, np.arange(2*n, 3*n), ["A", "B"], 0, 2.), ["A", "B"], tmp_path, **SHAPE | dict(coupling=coupling, widths=(8, 16), steps=120, batch_size=16, lr=5e-3, ema=.95))
    hosts, masks, level = toy.images[-8:], soft_masks(regions[:8], 1., 2.), {}
    for guidance in (1., 2.):
        model.settings |= dict(steps=10, guidance=guidance)
        for name, f in (("A", [1, 0]), ("none", [0, 0]), ("B", [0, 1])): level[guidance, name] = (refill if coupling == "alone" else fill)(model, hosts, masks, np.tile(f, (8, 1)).astype(float), torch_rng(0, "f"))[masks == 1].mean()
    apart = 3 if coupling == "alone" else 20      # without surroundings the square is drawn anywhere
    assert level[1., "A"] > level[1., "none"] + apart and level[1., "B"] < level[1., "none"] - apart, level
    assert level[2., "A"] > level[1., "A"] + apart/4 and level[2., "B"] < level[1., "B"] - apart/4 and level[2., "none"] == level[1., "none"], level


class Exact(Inpainter):
    "The speed of a flow from noise to images whose pixels are independent, of mean 0 and deviation 0.3."
    def forward(self, x, t, around, mask, findings): t = t.view(-1, 1, 1, 1); return (.09*t - (1 - t))/(.09*t**2 + (1 - t)**2)*x


def test_re_noising_keeps_the_spread_of_what_is_drawn():
    model = Exact(32, ["A"], "alone", (8, 16)); model.settings |= dict(steps=60, guidance=1.); masks = np.zeros((16, 32, 32), np.float32); masks[:, 8:24, 8:24] = 1
    for again in (1, 3): assert abs(refill(model, np.full((16, 32, 32), 100, np.uint8), masks, np.ones((16, 1)), torch_rng(0, "r"), again)[masks == 1].std()/127.5/.3 - 1) < .06, again


class Wrong(Inpainter):
    "Adds what is wrong everywhere but in the hole."
    def forward(self, x, t, around, mask, findings): return super().forward(x, t, around, mask, findings) + 1e3*(mask == 0)


@pytest.mark.parametrize(("coupling", "heeds"), [("hole", False), ("noise", True)])
def test_only_the_coupling_with_noise_everywhere_learns_outside_the_hole(holes, coupling, heeds):
    b, losses = holes.__getitems__([0, 1, 2, 3]), []
    for kind in (Inpainter, Wrong): torch.manual_seed(0); losses.append(float(kind(32, NAMES, coupling, widths=(8, 16)).losses(b)["flow"].detach()))
    assert (losses[1] > 10*losses[0]) == heeds and (losses[0] == losses[1]) != heeds


def test_a_model_without_surroundings_learns_from_the_whole_image_whatever_the_hole(holes):
    b, losses = holes.__getitems__([0, 1, 2, 3]), []
    for mask in (b["mask"], b["mask"].flip(0)): torch.manual_seed(0); losses.append([float(Inpainter(32, NAMES, c, widths=(8, 16)).losses(b | dict(mask=mask))["flow"].detach()) for c in ("alone", "noise")])
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_a_hole_is_filled_from_nothing_but_its_surroundings(data):
    model = Inpainter(32, ["Effusion"], widths=(8, 16)).eval(); torch.nn.init.normal_(model.net.conv_out.weight, std=.1); masks = np.zeros((2, 32, 32), np.float32); masks[:, 8:20, 8:20] = 1
    a = np.array(data.images[:2]); b = a.copy(); b[:, 8:20, 8:20] = 255 - b[:, 8:20, 8:20]; f = np.ones((2, 1))
    for guidance in (1., 3.):
        model.settings |= dict(steps=4, guidance=guidance); one, two = (fill(model, x, masks, f, torch_rng(0, "f")) for x in (a, b)); assert (one[:, 8:20, 8:20] == two[:, 8:20, 8:20]).all() and (one[masks == 0] == a[masks == 0]).all()


def test_plans_take_lenders_with_the_finding_in_the_hosts_view(data):
    m = data.manifest; well = np.flatnonzero(m.No_Finding == 1); plan = plan_edits(data, well, rows(data), ["Effusion", "Cardiomegaly"], 24, rng(0, "plan"), opposite=1.)
    assert all(m[f].iloc[i] == 1 for f, i in zip(plan.finding, plan.lender)) and (m["view"].iloc[plan.host].to_numpy() == m["view"].iloc[plan.lender].to_numpy()).mean() > .8
    assert set(plan.finding[~plan.mirrored]) == {"Cardiomegaly"} <= set(CENTRAL) and plan.host.isin(well).all()
    maps = np.stack([np.ones((len(plan), 32, 32)), np.zeros((len(plan), 32, 32))], 1).astype(np.float32); laid, seen = carried_maps(data, plan, maps, rounds=(4, 4)); assert np.allclose(laid, maps, atol=1e-4) and seen.shape == (len(plan), 32, 32)
    assert (m.patient_id.to_numpy()[plan.host] != m.patient_id.to_numpy()[plan.lender]).all()
    only = np.flatnonzero(m.Effusion == 1)[:1]; own = m.copy(); own.loc[own.index[well[:1]], "patient_id"] = m.patient_id.iloc[only[0]]
    with pytest.raises(ValueError, match="no image of another patient with Effusion"): plan_edits(SimpleNamespace(manifest=own, images=data.images, path="it"), well[:1], only, ["Effusion"], 1, rng(0, "p"))
    with pytest.raises(ValueError, match="no healthy image"): plan_edits(data, well[:0], rows(data), ["Effusion"], 2, rng(0, "p"))
    with pytest.raises(ValueError, match="leave it out of the findings"): plan_edits(data, well, well, ["Effusion"], 2, rng(0, "p"))


def test_places_are_the_masks_or_what_attention_holds(data, tmp_path):
    about, regions = regions_of(data, rows(data), ["Effusion", "Mass"]); back = np.arange(len(about))[::-1]; none = pd.DataFrame(dict(row=[int(np.flatnonzero(data.manifest.Effusion == 0)[0])], finding=["Effusion"]))
    told, places = known_places(data, pd.concat([about.iloc[back], none]), None); assert (told.to_numpy() == about.iloc[back].to_numpy()).all() and (places == regions[back]).all()
    model, _ = train_glori(data, rows(data), ["Effusion", "Mass"], tmp_path, **SETTINGS); told, places = known_places(data, about, model, .3)
    for k in (0, len(about) - 1):
        a = attention(model, data.images[[about.row[k]]], [model.findings.index(about.finding[k])])[0]; assert len(told) == len(about) and .3 <= a[places[k]].sum()/a.sum() < .45 and a[places[k]].min() >= a[~places[k]].max()


def test_masks_are_one_inside_and_zero_outside():
    r = np.zeros((1, 24, 24), bool); r[0, 10:14, 10:14] = True; m = soft_masks(r, 2., 4.)[0]
    assert (m[r[0]] == 1).all() and m[12, 4] == 0 and (np.diff(m[12, :12]) >= 0).all() and 0 < m[12, 6] < 1


def test_the_chapters_run_on_a_set_that_says_nothing_of_places(tmp_path, monkeypatch):
    monkeypatch.chdir(repo_root()); data = open_dataset("phantom", 32, n=84)
    write_set(tmp_path/"bare", np.array(data.images), data.manifest.assign(origin="real", source="bare"), None)
    common = dict(dataset=str(tmp_path/"bare"), size=32, batch_size=8, resamples=40)
    for name, given in (("40_glori", dict(steps=4, width=32, head_width=32, seeds=[0], control_n=0, share=.6, stride=4)), ("42_inpaint", dict(glori=str(tmp_path/"40_glori"), steps=4, judge_steps=4, widths=[8, 16], n_tried=16, halves=8, least=-1., edits=5, sampling_steps=2, rounds=[4, 4]))):
        papermill.execute_notebook(f"nbs/{name}.ipynb", tmp_path/f"{name}.ipynb", parameters=common | given | dict(out=str(tmp_path/name)), cwd="nbs", progress_bar=False, kernel_name="python3")
    made, record = open_set(tmp_path/"42_inpaint"/"set"), json.loads((tmp_path/"42_inpaint"/"run.json").read_text())
    assert len(made) == 5 and made.manifest.parent.isin(data.manifest.image_id).all() and set(made.manifest.patient_id) <= set(data.manifest.patient_id)
    split = data.manifest.set_index("image_id").split; assert (split.loc[made.manifest.parent] == "train").all()
    assert {t["name"] for t in record["tables"]} == {"networks", "judged", "kept", "filter", "places", "simulated", "realism"}     # nothing that needs a simulator, and no oracle, for what is no phantom
    parents = np.array(data.images)[pd.Index(data.manifest.image_id).get_indexer(made.manifest.parent)]
    assert (made.images == parents)[made.masks == 0].all() and all((x != y)[m > 0].mean() > .5 for x, y, m in zip(made.images, parents, made.masks))


@pytest.mark.parametrize(("given", "said"), [(dict(), "trained on another set than"), (dict(glori="", regions="everywhere"), "it is .{0,3}attention.{0,3} or"), (dict(held=1.2), "held is 1.2"), (dict(hosts="validation"), "no image of the split .{0,3}validation.{0,3} .hosts.; it has test, train, val")])
def test_inpainting_says_what_does_not_fit(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(repo_root()); data = open_dataset("phantom", 32, n=84); other = open_dataset("phantom", 32, n=84, seed=7)
    train_glori(other, rows(other), ["Effusion", "Mass"], tmp_path/"glori"/"fit-0", **SETTINGS)
    with pytest.raises(papermill.PapermillExecutionError, match=said):
        papermill.execute_notebook("nbs/42_inpaint.ipynb", tmp_path/"42.ipynb", parameters=dict(dataset=str(data.path), size=32, glori=str(tmp_path/"glori"), steps=2, batch_size=8, widths=[8, 16], out=str(tmp_path/"42")) | given, cwd="nbs", progress_bar=False, kernel_name="python3")


def test_attention_says_that_a_split_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(repo_root()); data = open_dataset("phantom", 32, n=84)
    with pytest.raises(papermill.PapermillExecutionError, match="no image of the split .{0,3}tset.{0,3}; it has test, train, val"):
        papermill.execute_notebook("nbs/40_glori.ipynb", tmp_path/"40.ipynb", parameters=dict(dataset=str(data.path), size=32, split="tset", out=str(tmp_path/"40")), cwd="nbs", progress_bar=False, kernel_name="python3")


def test_edits_of_unseen_hosts_at_true_places_keep_their_split(tmp_path, monkeypatch):
    monkeypatch.chdir(repo_root()); data = open_dataset("phantom", 32, n=120)
    given = dict(dataset=str(data.path), size=32, regions="truth", steps=4, judge_steps=4, batch_size=8, widths=[8, 16], n_tried=16, n_pairs=1, halves=8, least=-1., edits=5, hosts="test", sampling_steps=2, rounds=[4, 4], resamples=40, out=str(tmp_path/"42"))
    papermill.execute_notebook("nbs/42_inpaint.ipynb", tmp_path/"42.ipynb", parameters=given, cwd="nbs", progress_bar=False, kernel_name="python3")
    realism, where = pd.read_csv(tmp_path/"42"/"tables"/"realism.csv").set_index("method"), pd.read_csv(tmp_path/"42"/"tables"/"places.csv").set_index(["finding", "place"]).value; made = open_set(tmp_path/"42"/"set").manifest
    assert len(made) == 5 and (made.split == "test").all() and (data.manifest.set_index("image_id").split.loc[made.parent] == "test").all() and (realism.change_outside.dropna() == 0).all() and "flow" in realism.index
    assert abs(where["all", "attention, carried"] - where["all", "true region, carried"]) < .05 and where["all", "attention, carried"] > where["all", "the whole image"]     # the places are the true ones


def test_a_judge_does_not_learn_from_patients_of_the_edits(tmp_path, monkeypatch):
    monkeypatch.chdir(repo_root()); data = open_dataset("phantom", 32, n=84)
    with pytest.raises(papermill.PapermillExecutionError, match="shares .* patients .* a judge learns from other patients"):
        papermill.execute_notebook("nbs/42_inpaint.ipynb", tmp_path/"42.ipynb", parameters=dict(dataset=str(data.path), size=32, judge_set=str(data.path), steps=2, batch_size=8, widths=[8, 16], out=str(tmp_path/"42")), cwd="nbs", progress_bar=False, kernel_name="python3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_registration_on_a_gpu_is_that_of_the_cpu(bent):
    x, w = bent; moving = warp(x, w)
    assert torch.allclose(register(moving.cuda(), x.cuda()).cpu(), register(moving, x), atol=.05)
