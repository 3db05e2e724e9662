"The bench's numbers are those of the libraries that others publish with, on the same features."
import numpy as np
import pytest
import torch
import torch_fidelity.metric_fid as tf_fid
import torch_fidelity.metric_kid as tf_kid
import torch_fidelity.metric_prc as tf_prc
from cleanfid.fid import fid_from_feats, kernel_distance as clean_kid
from prdc import compute_prdc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.kid import poly_mmd

from cxr_nb.core import rng
from cxr_nb.data.images import RadiographData, open_set
from cxr_nb.data.phantom import make_phantom_set
from cxr_nb.measures.features import Extractor, extractor, features
from cxr_nb.measures.classifier import fit_classifier
from cxr_nb.measures.fidelity import by_halves, fidelity, frechet, kernel_distance, neighbourhoods, subset_distances
from cxr_nb.measures.oracles import NAMES, PLACES, agreement, statements
from cxr_nb.measures.privacy import PLANTED, detector


def clouds(n, m, d, seed=0):
    r = rng(seed, "clouds"); mix = r.normal(0, 1, (d, d))/np.sqrt(d)
    return (np.abs(r.normal(.2, 1, (n, d)) @ mix).astype(np.float32), np.abs(r.normal(.3, 1.2, (m, d)) @ mix).astype(np.float32))


@pytest.mark.parametrize("n, m, d", [(400, 300, 64), (120, 150, 256)], ids=["more images than dimensions", "fewer"])
def test_frechet_distance_is_torch_fidelitys(n, m, d):
    a, b = clouds(n, m, d)
    theirs = tf_fid.fid_statistics_to_metric(*(tf_fid.fid_features_to_statistics(torch.from_numpy(f.astype(np.float64))) for f in (a, b)), False)["frechet_inception_distance"]
    assert abs(frechet(a, b) - theirs) < 1e-3*max(1, theirs)
    if n > d: assert abs(frechet(a, b) - np.real(fid_from_feats(a.astype(float), b.astype(float)))) < 1e-3*max(1, theirs)


def test_kernel_distance_is_torch_fidelitys_and_torchmetrics():
    a, b = clouds(200, 200, 64)
    theirs = tf_kid.kid_features_to_metric(*map(torch.from_numpy, (a, b)), kid_subsets=1, kid_subset_size=200, verbose=False)["kernel_inception_distance_mean"]
    assert abs(kernel_distance(a, b) - theirs) < 1e-3*abs(theirs)
    assert abs(kernel_distance(a, b) - clean_kid(a, b, 1, 200)) < 1e-3*abs(theirs)
    assert abs(kernel_distance(a, b) - poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item()) < 1e-3*abs(theirs)


def test_subset_distances_are_those_of_the_libraries_up_to_the_draw():
    a, b = clouds(600, 500, 32)
    ours = subset_distances(a, b, rng(0), 60, 200); error = ours.std()/np.sqrt(60)
    theirs = tf_kid.kid_features_to_metric(*map(torch.from_numpy, (a, b)), kid_subsets=60, kid_subset_size=200, verbose=False)
    assert abs(ours.mean() - theirs["kernel_inception_distance_mean"]) < 5*error and .6 < ours.std()/theirs["kernel_inception_distance_std"] < 1.6
    np.random.seed(0)  # noqa: NPY002 (clean-fid draws from the global state)
    assert abs(ours.mean() - clean_kid(a, b, 60, 200)) < 5*error


@pytest.mark.parametrize("k", [3, 5])
def test_neighbourhoods_are_prdcs_and_torch_fidelitys(k):
    a, b = clouds(200, 180, 32); ours = neighbourhoods(a, b, k); theirs = compute_prdc(a, b, k)
    assert all(abs(ours[m] - theirs[m]) < 1e-3 for m in ours)
    prc = tf_prc.prc_features_to_metric(torch.from_numpy(b), torch.from_numpy(a), prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    assert abs(ours["precision"] - prc["precision"]) < 1e-3 and abs(ours["recall"] - prc["recall"]) < 1e-3


def test_images_without_features_of_their_own_are_refused():
    x = np.zeros((9, 32, 32), np.uint8)
    with pytest.raises(ValueError, match="each image needs its own"): fidelity((np.zeros((9, 4)), x), (np.zeros((8, 4)), x), np.arange(9), rng(0), np.zeros((9, 4)))


def test_inception_reads_torch_fidelitys_weights_and_a_run_its_classifier(phantoms, tmp_path, monkeypatch):
    with monkeypatch.context() as m:      # a network of that form without the download
        m.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {}); m.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(net.state_dict(), tmp_path/"inception.pth")
    found = features(phantoms.images[:2], extractor(f"inception:{tmp_path/'inception.pth'}"))
    assert found.shape == (2, 2048) and np.allclose(found, net(torch.from_numpy(phantoms.images[:2])[:, None].expand(-1, 3, -1, -1))[0].numpy(), rtol=1e-3, atol=1e-4)
    rows = np.arange(24); model, _ = fit_classifier(RadiographData(phantoms, rows, phantoms.findings), phantoms, rows, tmp_path/"run"/"fit", architecture="small", weights="", epochs=1, batch_size=8, lr=1e-3, seed=0, progress=False)
    assert np.allclose(features(phantoms.images[:2], extractor(f"classifier:{tmp_path/'run'}")), features(phantoms.images[:2], Extractor("own", model.net[:-1], 0, (.5,), (.5,))), atol=1e-5)


def test_intervals_need_something_to_halve():
    with pytest.raises(ValueError, match="cannot be halved"): by_halves(lambda s, t: {}, np.zeros(9), np.arange(9), rng(0))
    x = np.zeros((12, 32, 32), np.uint8)
    with pytest.raises(ValueError, match="give at least 16"): fidelity((np.zeros((12, 4)), x), (np.zeros((12, 4)), x), np.arange(12), rng(0), np.zeros((9, 4)))


def test_images_of_one_patient_widen_an_interval():
    z = rng(0).normal(0, 1, 60); x = np.repeat(z, 4)      # each patient four times
    def mean(s, t): return dict(m=x[s].mean() - x[t].mean())
    alone, together = (by_halves(mean, u, u, rng(1), 60)["m"] for u in (np.arange(240), np.arange(240)//4))
    assert 1.6 < (together.hi - together.lo)/(alone.hi - alone.lo) < 2.4


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory): return make_phantom_set(tmp_path_factory.mktemp("measures")/"set", 24, 32, images_per_patient=1., prevalence=dict.fromkeys(("Mass", "Effusion"), .5))


class Grey(torch.nn.Module):
    calls = 0
    def forward(self, x): Grey.calls += 1; return x.mean((2, 3))


def test_features_are_taken_once_a_set_and_a_damaged_cache_is_named(phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_NB_CACHE", str(tmp_path)); e = Extractor("grey", Grey(), 0, (0.,), (1.,)); Grey.calls = 0
    first = features(phantoms, e); again = features(open_set(phantoms.path), e, np.array([2, 0]))
    assert Grey.calls == 1 and np.array_equal(first[[2, 0]], again)
    kept = next((tmp_path/"features").glob("*.npy")); kept.write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"{kept.name} is damaged"): features(phantoms, e)


def test_features_that_are_not_finite_are_refused(phantoms):
    class Bad(torch.nn.Module):
        def forward(self, x): return x.mean((2, 3))/0
    with pytest.raises(ValueError, match="bad gave features .* not finite"): features(phantoms.images[:3], Extractor("bad", Bad(), 0, (0.,), (1.,)))


def test_statements_of_a_set_that_says_nothing_beyond_labels(phantoms):
    silent = open_set(phantoms.path); silent.annotations = silent.annotations.iloc[:0]; said = statements(silent, np.arange(4), 16)
    assert (said.place == -1).all() and np.isnan(said.boxes).all() and not said.masks.any() and set(np.unique(said.present[:, NAMES.index("Mass")])) <= {0., 1.}
    full = statements(phantoms, np.arange(24), 16); j = NAMES.index("Effusion"); ill = full.present[:, j] == 1
    assert (full.place[ill, j] >= 0).all() and {PLACES["Effusion"][p][1] for p in full.place[ill, j]} == {"basal"}


def test_shuffled_requests_agree_by_chance(phantoms):
    truth = statements(phantoms, None, 16); ideal = truth.take(np.random.default_rng(1).permutation(24)); ideal.severity = np.nan_to_num(ideal.severity); ideal.boxes = np.nan_to_num(ideal.boxes)
    found = agreement(truth, ideal, np.arange(24), rng(0), 60)
    assert found["pearson"][1].lo < 0 < found["pearson"][1].hi
    own = truth.take(np.arange(24)); own.severity, own.boxes = np.nan_to_num(own.severity), np.nan_to_num(own.boxes)
    assert agreement(truth, own, np.arange(24), rng(0), 60)["pearson"][1].lo > .5
    with pytest.raises(ValueError, match="give one for each"): agreement(truth, own, np.arange(23), rng(0))


@pytest.mark.parametrize("kind", PLANTED)
def test_every_planted_copy_of_a_few_is_found(kind, phantoms):
    find = detector(phantoms.images[:16], phantoms.images[16:], .12)
    distance, which = find.search(PLANTED[kind](phantoms.images[:16], rng(0, kind)))
    assert (which == np.arange(16)).mean() > .8 and np.median(distance) < find.threshold
