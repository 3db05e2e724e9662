"""What the cells of 17_release do not show: bytes that depend on the seed alone, bad settings, a killed writer, a full disk, identifiers, and readers other than our own."""
import csv, errno, json, os, signal, subprocess, sys, time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from pydicom import dcmread

from cxr_nb.core import repo_root, rng, sha256
from cxr_nb.data import phantom, release
from cxr_nb.data.body import SOURCE, draw_patient, draw_pose
from cxr_nb.data.findings import FINDINGS
from cxr_nb.data.phantom import combinations, make_phantom_set, simulate
from cxr_nb.data.release import DETECTOR, Shot, dicom, structured, write_dicom, write_nih
from cxr_nb.data.sources import metadata_folder, read_source

WRITERS = {"nih": write_nih, "dicom": write_dicom}
both = pytest.mark.parametrize("form", WRITERS)
SAMPLE = repo_root().parent/"shared"/"data"/"nih-sample"
MUCH = dict(prevalence=dict.fromkeys(FINDINGS, .3), together="independent")


def bytes_of(path): return {str(p.relative_to(path)): sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
def shot(view, size=32, seed=0, **k):
    image, row, _, _ = simulate(0, 0, 0, size, seed, combinations({}, "independent"), {view: 1.}, **k)
    return Shot(image, row, draw_pose(rng(seed, "image", 0), draw_patient(rng(seed, "patient", 0)), {view: 1.}), 0, 0, 0)


@both
def test_the_same_seed_gives_the_same_bytes_for_any_number_of_threads_and_another_seed_others(form, tmp_path):
    a, b, c = (WRITERS[form](tmp_path/k, 4, 32, seed, workers) and bytes_of(tmp_path/k) for k, seed, workers in (("a", 3, 1), ("b", 3, 3), ("c", 4, 2)))
    assert a == b and not {v for k, v in a.items() if k.endswith((".png", ".dcm"))} & set(c.values())


@both
def test_a_longer_release_begins_with_the_images_of_the_shorter(form, tmp_path):
    WRITERS[form](tmp_path/"a", 3, 32); WRITERS[form](tmp_path/"b", 5, 32)
    a, b = bytes_of(tmp_path/"a"), bytes_of(tmp_path/"b")
    assert {k: v for k, v in a.items() if k.endswith((".png", ".dcm", ".npz"))}.items() <= b.items()


@both
def test_it_holds_what_the_set_of_the_same_settings_holds(form, tmp_path):
    truth, made = WRITERS[form](tmp_path/"release", 6, 32, 5, **MUCH), make_phantom_set(tmp_path/"set", 6, 32, seed=5, **MUCH)
    same = ["view", "sex", "age", "followup", "split", "text", *FINDINGS]
    pd.testing.assert_frame_equal(truth.manifest[same], made.manifest[same])
    columns = [c for c in truth.annotations if c not in ("image_id", "mask")]
    pd.testing.assert_frame_equal(truth.annotations[columns], made.annotations[columns])
    masks = np.concatenate([np.load(tmp_path/"release"/json.loads(line)["masks"])["masks"] for line in (tmp_path/"release"/"reports.jsonl").read_text().splitlines()])
    assert np.array_equal(masks, made.masks)


def test_the_pose_is_the_one_that_the_image_was_taken_in(tmp_path, monkeypatch):
    taken, written, draw, spacing = {}, {}, phantom.draw_pose, Shot.spacing.fget
    def watch(r, patient, views):
        pose = draw(r, patient, views); taken[pose.fov] = pose.view
        return pose
    monkeypatch.setattr(phantom, "draw_pose", watch)
    monkeypatch.setattr(Shot, "spacing", property(lambda s: written.update({s.pose.fov: s.row["view"]}) or spacing(s)))
    write_nih(tmp_path/"a", 4, 32)
    assert taken == written and len(taken) == 4


# NIH

def test_the_tables_have_the_headers_of_the_published_ones(tmp_path):
    write_nih(tmp_path/"a", 4, 32, **MUCH)
    def first(p): return pd.read_csv(p, nrows=0, header=0).columns.tolist()
    assert first(tmp_path/"a"/"Data_Entry_2017_v2020.csv") == first(metadata_folder()/"Data_Entry_2017_v2020.csv.gz")
    assert first(tmp_path/"a"/"BBox_List_2017.csv") == first(next(metadata_folder().glob("BBox_List_2017.csv*")))
    if SAMPLE.exists(): assert (SAMPLE/"Data_Entry_2017_v2020.csv").read_text().splitlines()[0] == (tmp_path/"a"/"Data_Entry_2017_v2020.csv").read_text().splitlines()[0]


def test_boxes_are_counted_in_the_frame_of_1024_and_only_of_what_nih_has_boxes_of(tmp_path):
    truth = write_nih(tmp_path/"a", 6, 64, **MUCH)
    with open(tmp_path/"a"/"BBox_List_2017.csv") as f: rows = list(csv.reader(f))[1:]
    known = {"Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"}
    a = truth.annotations[truth.annotations.finding.isin(known) & truth.annotations.x0.notna()]
    assert {r[1] for r in rows} <= (known - {"Infiltration"}) | {"Infiltrate"} and len(rows) == len(a) > 5
    assert np.allclose([[float(v) for v in r[2:6]] for r in rows], np.c_[a.x0, a.y0, a.x1 - a.x0, a.y1 - a.y0]*1024)


def test_the_png_files_are_grey_with_8_bits_and_the_lists_divide_the_patients(tmp_path):
    truth = write_nih(tmp_path/"a", 8, 32, images_per_patient=1.5)
    for p in (tmp_path/"a"/"images").iterdir():
        assert p.read_bytes()[24:26] == b"\x08\x00" and cv2.imread(str(p), cv2.IMREAD_UNCHANGED).shape == (32, 32)
    lists = [(tmp_path/"a"/f"{k}_list.txt").read_text().split() for k in ("train_val", "test")]
    assert sorted(sum(lists, [])) == sorted(truth.manifest.image_id) and not {i[:8] for i in lists[0]} & {i[:8] for i in lists[1]}


def test_a_release_of_one_image_without_a_finding_is_read(tmp_path):
    write_nih(tmp_path/"a", 1, 32, prevalence={})
    back = read_source("nih", tmp_path/"a")
    assert back.manifest.No_Finding.tolist() == [1] and back.notes == ["BBox_List_2017.csv is not there: no boxes"]


def test_nih_has_no_lateral_images(tmp_path):
    with pytest.raises(ValueError, match="no lateral images.*write_dicom"): write_nih(tmp_path/"a", 2, 32, views={"PA": .5, "LATERAL": .5})
    assert list(tmp_path.iterdir()) == []


# DICOM

@pytest.mark.parametrize("view", SOURCE)
def test_another_reader_sees_the_same_pixels_and_the_size_of_a_pixel_at_the_detector(view, tmp_path):
    s = shot(view, levels=4096); ds = dicom(s, 4096); ds.save_as(tmp_path/"a.dcm", enforce_file_format=True)
    x = sitk.ReadImage(str(tmp_path/"a.dcm"))
    assert np.array_equal(sitk.GetArrayFromImage(x)[0], s.image)
    assert np.isclose(x.GetSpacing()[0], s.pose.fov/32*DETECTOR[view]/SOURCE[view], atol=1e-5)
    assert ds.PatientOrientation == (["P", "F"] if view == "LATERAL" else ["L", "F"]) and ds.ViewPosition == {"LATERAL": "LL"}.get(view, view)


def test_no_name_no_birth_date_and_the_comment_says_what_it_is(tmp_path):
    ds = dicom(shot("PA", levels=4096), 4096)
    assert ds.PatientName == ds.PatientBirthDate == ds.AccessionNumber == "" and "not a patient" in ds.ImageComments and ds.SyntheticData == "YES" and ds.ImageType[0] == "DERIVED"


def test_a_size_or_a_finding_more_changes_every_identifier_and_the_studies_of_a_patient_differ(tmp_path):
    a, b, c = ([dcmread(p) for p in sorted(tmp_path.glob(f"{k}/*/*.dcm")) if write] for k, write in
               (("a", write_dicom(tmp_path/"a", 3, 32)), ("b", write_dicom(tmp_path/"b", 3, 48)), ("c", write_dicom(tmp_path/"c", 3, 32, prevalence={}))))
    uids = [[u for d in x for u in (d.SOPInstanceUID, d.SeriesInstanceUID, d.StudyInstanceUID)] for x in (a, b, c)]
    assert len({*sum(uids, [])}) == 27 and all(u.is_valid for u in sum(uids, []))
    assert [d.file_meta.MediaStorageSOPInstanceUID for d in a] == [d.SOPInstanceUID for d in a]


@pytest.mark.parametrize("share", [0, 1])
def test_the_share_of_inverted_files_is_kept_at_its_ends_and_dates_can_be_fixed(share, tmp_path):
    write_dicom(tmp_path/"a", 3, 32, inverted=share, dates="fixed")
    heads = [dcmread(p) for p in tmp_path.glob("a/*/*.dcm")]
    assert {h.PhotometricInterpretation for h in heads} == {f"MONOCHROME{2 - share}"} and {h.PresentationLUTShape for h in heads} == {["IDENTITY", "INVERSE"][share]} and {h.StudyDate for h in heads} == {"20000101"}


# bad settings, killed, full

BAD = {"no image": dict(n=0), "an icon": dict(size=8), "an unknown finding": dict(prevalence={"Fracture": .1}), "an unknown view": dict(views={"OBLIQUE": 1.}), "a severity above one": dict(severity=2.), "no thread": dict(workers=0)}

@both
@pytest.mark.parametrize("what", BAD)
def test_a_wrong_setting_is_refused_and_leaves_nothing(form, what, tmp_path):
    with pytest.raises(ValueError): WRITERS[form](tmp_path/"a", **dict(n=2, size=32) | BAD[what])
    assert [p.name for p in tmp_path.iterdir() if p.name != ".a.lock"] == []


def test_wrong_options_of_dicom_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="inverted is 1.5"): write_dicom(tmp_path/"a", 2, 32, inverted=1.5)
    with pytest.raises(ValueError, match="dates is 'yesterday'; it is one of followup, fixed"): write_dicom(tmp_path/"a", 2, 32, dates="yesterday")
    with pytest.raises(ValueError, match="no setting 'prevalances'"): write_dicom(tmp_path/"a", 2, 32, prevalances={})


@both
def test_nothing_that_exists_is_overwritten(form, tmp_path):
    (tmp_path/"a").mkdir(); (tmp_path/"a"/"thesis.tex").write_text("x")
    for path in (tmp_path/"a", tmp_path/"a"/"thesis.tex", tmp_path/"a"/".."/"a"):
        with pytest.raises(FileExistsError, match="never overwritten"): WRITERS[form](path, 2, 32)
    assert (tmp_path/"a"/"thesis.tex").read_text() == "x"


def test_a_killed_writer_leaves_no_release_and_the_next_one_writes_a_whole_one(tmp_path):
    code = f"""
import time
from concurrent.futures import ThreadPoolExecutor
from cxr_nb.data import release
make = release.simulate
release.simulate = lambda *a: (time.sleep(.2), make(*a))[1]
with ThreadPoolExecutor() as pool: print([*pool.map(lambda form: getattr(release, "write_" + form)({str(tmp_path)!r} + "/" + form, 60, 32, 1), {list(WRITERS)})])
"""
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 120
    while min(len(list(tmp_path.glob(f".{form}.new/masks/[!.]*"))) for form in WRITERS) < 2 and time.time() < end and p.poll() is None: time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert p.returncode == -signal.SIGKILL
    for form, write in WRITERS.items():
        assert not (tmp_path/form).exists() and (tmp_path/f".{form}.new").exists()
        write(tmp_path/form, 4, 32, 1); write(tmp_path/"whole"/form, 4, 32, 1)
        assert bytes_of(tmp_path/form) == bytes_of(tmp_path/"whole"/form) and not (tmp_path/f".{form}.new").exists()


@both
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(form, tmp_path, monkeypatch):
    calls, fsync = [], os.fsync
    def full(f):
        calls.append(f)
        if len(calls) > 4: raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(f)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full while writing"): WRITERS[form](tmp_path/"a", 6, 32)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".a.lock"] == []
    monkeypatch.setattr(release.shutil, "disk_usage", lambda p: type("U", (), dict(free=10)))
    with pytest.raises(OSError, match="needs up to .* GB are free"): WRITERS[form](tmp_path/"a", 6, 32)


def test_an_image_that_cannot_be_simulated_ends_the_writer_and_leaves_nothing(tmp_path, monkeypatch):
    make = release.simulate
    def fails(i, *a):
        if i == 3: raise RuntimeError("image 3")
        return make(i, *a)
    monkeypatch.setattr(release, "simulate", fails)
    with pytest.raises(RuntimeError, match="image 3"): write_nih(tmp_path/"a", 8, 32)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".a.lock"] == []


# the structured report

def test_a_sham_has_its_label_and_nothing_to_see(tmp_path):
    write_nih(tmp_path/"a", 2, 32, severity=0., prevalence={"Mass": 1., "Effusion": 1.}, together="independent")
    for line in (tmp_path/"a"/"reports.jsonl").read_text().splitlines():
        found = {k: f for k, f in json.loads(line)["findings"].items() if f["present"]}
        assert list(found) == ["Mass", "Effusion"] and all(f["box"] is None and f["contrast"] == 0 and not f["visible"] for f in found.values())
    assert read_source("nih", tmp_path/"a").manifest.Mass.tolist() == [1, 1]


def test_the_structured_report_of_an_image_of_a_set(tmp_path):
    made = make_phantom_set(tmp_path/"set", 3, 48, views={"LATERAL": 1.}, **MUCH)
    for r in made.manifest.to_dict("records"):
        said = structured(r, made.annotations[made.annotations.image_id == r["image_id"]])
        assert {k for k, f in said["findings"].items() if f["present"]} == {k for k in FINDINGS if r[k] == 1} and said["heart"]["ratio"] is None, "no such ratio from the side"
        for k, f in said["findings"].items():
            if f["present"] and f["box"]: assert np.allclose(phantom.box(made.masks[f["mask"]]), f["box"], atol=1e-6), k
        json.dumps(said, allow_nan=False)
    assert Path(made.path).exists()
