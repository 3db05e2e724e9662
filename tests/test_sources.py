"Bad releases: each gives one clear error that names file, row, column and remedy. The good forms are in the notebook."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_nb.core import repo_root
from cxr_nb.data.labels import NIH14, VOCABULARIES
from cxr_nb.data.sources import BOX, SOURCES, check_patients, findings_of, read_metadata, read_source, split_by_patient, validate

SAMPLE = repo_root().parent/"shared"/"data"
needs_sample = pytest.mark.skipif(not (SAMPLE/"nih-sample").is_dir(), reason="the real NIH sample is not beside this checkout")


def put(root: Path, files: dict) -> Path:
    for name, content in files.items():
        (p := root/name).parent.mkdir(parents=True, exist_ok=True)
        if content is None: Image.new("L", (8, 8)).save(p)
        elif isinstance(content, bytes): p.write_bytes(content)
        else: p.write_text(content)
    return root


NIH = {
    "Data_Entry_2017_v2020.csv": "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
                                 "a.png,Mass,0,1,58,M,PA,2682,2749,0.143,0.143\nb.png,No Finding,1,1,59,M,AP,2500,2048,0.168,0.168\nc.png,Effusion|Nodule,0,2,33,F,PA,2500,2048,0.168,0.168\n",
    "BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,\na.png,Mass,100.5,200,50,60,,,\n",
    "train_val_list.txt": "a.png\nb.png\n", "test_list.txt": "c.png\n", "images/a.png": None, "images/b.png": None, "images/c.png": None}
CHEXPERT = {
    "train.csv": "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(VOCABULARIES["chexpert"]) + "\nCheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0" + ","*13 + "\n",
    "train/patient00001/study1/view1_frontal.jpg": None}
MIMIC = {
    "mimic-cxr-2.0.0-metadata.csv": "dicom_id,subject_id,study_id,ViewPosition,Rows,Columns\nd1,10000032,50414267,PA,3056,2544\n", "mimic-cxr-2.0.0-split.csv": "dicom_id,study_id,subject_id,split\nd1,50414267,10000032,train\n",
    "mimic-cxr-2.0.0-chexpert.csv": "subject_id,study_id," + ",".join(VOCABULARIES["mimic"]) + "\n10000032,50414267,1.0" + ","*13 + "\n", "files/p10/p10000032/s50414267/d1.jpg": None}
VINDR = {"train.csv": "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max,width,height\na1,Cardiomegaly,3,R10,12,16,36,48,100,80\nb2,No finding,14,R1,,,,,90,90\n", "train/a1.png": None, "train/b2.png": None}
PADCHEST = {"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv": ",ImageID,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection,Rows_DICOM,Columns_DICOM,Report,Labels\n"
            "0,1.png,20140915,s,p,1930.0,F,PA,1728,1872,normal,['normal']\n", "0/1.png": None}
SIIM = {"train-rle.csv": "ImageId, EncodedPixels\nu1, -1\nu2, 100 5 1019 5\n", "png/u1.png": None, "png/u2.png": None}
RSNA = {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\nu1,,,,,0\nu2,256,512,128,256,1\n", "stage_2_detailed_class_info.csv": "patientId,class\nu1,Normal\nu2,Lung Opacity\n", "images/u1.png": None, "images/u2.png": None}
OPENI = {"ecgen-radiology/1.xml": '<eCitation><uId id="CXR1"/><MeSH><major>normal</major></MeSH><parentImage id="CXR1_1"/></eCitation>', "png/CXR1_1.png": None}
FOLDER = {"labels.csv": "image,patient_id,age,view,Mass\n1.png,p,40,PA,1\n2.png,q,50,AP,0\n", "1.png": None, "2.png": None}
GOOD = dict(nih=NIH, chexpert=CHEXPERT, mimic=MIMIC, vindr=VINDR, padchest=PADCHEST, siim=SIIM, rsna=RSNA, openi=OPENI, folder=FOLDER)


@pytest.mark.parametrize("source", GOOD)
def test_the_good_release_is_read_and_its_paths_exist(source, tmp_path):
    r = read_source(source, put(tmp_path, GOOD[source]))
    assert len(r.manifest) and all((r.root/p).is_file() for p in r.manifest.path)
    validate(r.manifest, r.annotations)


N, B, C, V, S, R = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv", "train.csv", "train.csv", "train-rle.csv", "stage_2_train_labels.csv"
P = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
BAD = {  # fact: (source, file, what it holds instead | (old, new) | None for no file, the words of the error)
    "a column is missing": ("nih", N, ("Finding Labels", "Labels"), [N, "no column `Finding Labels`", "nearest is `Labels`"]),
    "a label is unknown": ("nih", N, ("Effusion|Nodule", "Effusion|Nodul"), [N, "row 3 (c.png)", "`Finding Labels`", "nearest is 'Nodule'"]),
    "a label is blank": ("nih", N, ("Mass,0", ",0"), ["row 1 (a.png)", "`Finding Labels`", "'blank' is no label"]),
    "No Finding stands beside a finding": ("nih", N, ("No Finding", "No Finding|Mass"), ["row 2 (b.png)", "says No Finding and a finding"]),
    "an image has two rows": ("nih", N, ("b.png", "a.png"), [N, "row 2 (a.png)", "`image_id`", "occurs more than once"]),
    "an image file is missing": ("nih", "images/b.png", None, ["1 of the 3 images", "the first: b.png", "Unpack all twelve", 'missing="drop"']),
    "an image file is there twice": ("nih", "images_001/a.png", b"x", ["a.png is there twice", "remove one"]),
    "the table is missing": ("nih", N, None, ["no Data_Entry_2017_v2020.csv or Data_Entry_2017.csv", "download page"]),
    "an age is text": ("nih", N, (",58,", ",fifty,"), ["row 1 (a.png)", "`Patient Age`", "'fifty' is not an age"]),
    "an age is negative": ("nih", N, (",58,", ",-4,"), ["row 1 (a.png)", "`Patient Age`", "'-4' is not an age"]),
    "a sex is unknown": ("nih", N, (",58,M", ",58,X"), ["row 1 (a.png)", "`Patient Gender`", "'X' is no sex"]),
    "a view is unknown": ("nih", N, (",AP,", ",OBLIQUE,"), ["row 2 (b.png)", "`View Position`", "'OBLIQUE' is no view"]),
    "a size is no number": ("nih", N, (",2749", ",tall"), ["row 1 (a.png)", "`Height]`", "'tall' is not a number"]),
    "a follow-up is blank": ("nih", N, ("Nodule,0", "Nodule,"), ["row 3 (c.png)", "`Follow-up #`", "is not a number"]),
    "a box is outside the image": ("nih", B, ("100.5,200,50", "1000,200,50"), [B, "row 1 (a.png)", "`w`", "outside the image"]),
    "a box starts before the image": ("nih", B, ("100.5", "-3"), [B, "row 1 (a.png)", "`x`", "outside the image"]),
    "a box has no width": ("nih", B, (",50,60", ",0,60"), [B, "`w`", "no width"]),
    "a box has a negative height": ("nih", B, (",50,60", ",50,-60"), [B, "`h`", "no height"]),
    "a box is no number": ("nih", B, ("100.5", "left"), [B, "row 1 (a.png)", "`x`", "'left' is not a number; correct the row"]),
    "a box has three numbers": ("nih", B, (",50,60", ",50,"), [B, "`h`", "incomplete"]),
    "a box is of an image that is not listed": ("nih", B, ("\na.png", "\nz.png"), [B, "row 1 (z.png)", "no row in the Data_Entry table"]),
    "a box is of an unknown finding": ("nih", B, (",Mass", ",Masses"), [B, "`Finding Label`", "'Masses' is no label of NIH"]),
    "a patient is in both official lists": ("nih", "test_list.txt", "b.png\nc.png\n", ["test_list.txt", "b.png is in both official lists"]),
    "a patient's images are in different lists": ("nih", "train_val_list.txt,test_list.txt", ["a.png\n", "b.png\nc.png\n"], [N, "patient 1 is in test and train"]),
    "an image is in no official list": ("nih", "test_list.txt", "", [N, "row 3 (c.png)", "in neither"]),
    "one official list is missing": ("nih", "test_list.txt", None, ["train_val_list.txt is there but not the other"]),
    "the table is empty": ("nih", N, "", [N, "is empty", "download it again"]),
    "the table has only a header": ("nih", N, NIH[N].split("\n")[0] + "\n", [N, "a header but no rows"]),
    "the table is not UTF-8": ("nih", N, NIH[N].replace("Mass", "Mäss").encode("latin-1"), [N, "not UTF-8"]),
    "a compressed table is cut off": ("nih", N + ",Data_Entry_2017_v2020.csv.gz", [None, b"\x1f\x8b\x08\x00cut"], [N, "cannot be read", "download it again"]),
    "CheXpert: a label is 2": ("chexpert", C, ("AP,1.0", "AP,2.0"), [C, "row 1", "`No Finding`", "'2.0' is none of 1, 0, -1"]),
    "CheXpert: a label is text": ("chexpert", C, ("AP,1.0", "AP,yes"), [C, "`No Finding`", "'yes' is not a number"]),
    "CheXpert: a path is no path": ("chexpert", C, ("patient00001", "p1"), [C, "row 1", "`Path`", "is no path of CheXpert"]),
    "MIMIC: an image has no split": ("mimic", "mimic-cxr-2.0.0-split.csv", ("d1", "d2"), ["metadata.csv", "row 1 (d1)", "is not in mimic-cxr-2.0.0-split.csv"]),
    "MIMIC: a split is unknown": ("mimic", "mimic-cxr-2.0.0-split.csv", (",train", ",tune"), ["split.csv", "'tune' is none of train, validate, test"]),
    "VinDr: a label is unknown": ("vindr", V, ("Cardiomegaly", "Big heart"), [V, "row 1 (a1)", "`class_name`", "'Big heart' is no label"]),
    "VinDr: the corners are swapped": ("vindr", V, ("12,16,36,48", "36,16,12,48"), [V, "row 1 (a1)", "`x_max`", "no width"]),
    "VinDr: a box is larger than the image": ("vindr", V, (",100,80", ",30,80"), [V, "row 1 (a1)", "`x_max`", "outside the image"]),
    "PadChest: labels are no list": ("padchest", P, ("['normal']", "normal"), [P, "row 1 (1.png)", "`Labels`", "not a Python list"]),
    "SIIM: a run passes the end": ("siim", S, ("100 5", "1048570 10"), [S, "row 2 (u2)", "`EncodedPixels`", "past the 1048576 pixels"]),
    "SIIM: a run length is odd": ("siim", S, ("1019 5", "1019"), [S, "row 2 (u2)", "pairs of gap and length", "3 numbers"]),
    "SIIM: a run length is no number": ("siim", S, ("1019 5", "1019 x"), [S, "row 2 (u2)", "whole numbers"]),
    "SIIM: an image has a mask and none": ("siim", S, ("u1, -1", "u2, -1"), [S, "row 1 (u2)", "no mask, but another row"]),
    "RSNA: the target has no box": ("rsna", R, ("u1,,,,,0", "u1,,,,,1"), [R, "row 1 (u1)", "`Target`", "does not agree with the box"]),
    "RSNA: a DICOM file is none": ("rsna", "images/u1.png,images/u2.png,images/u1.dcm,images/u2.dcm", [None, None, b"x"*200, b"x"*200], ["u1.dcm", "is not a DICOM file", "download it again"]),
    "RSNA: an image has no class": ("rsna", "stage_2_detailed_class_info.csv", ("u2", "u9"), [R, "row 2 (u2)", "is not in stage_2_detailed_class_info.csv"]),
    "OpenI: a report is cut off": ("openi", "ecgen-radiology/1.xml", "<eCitation><uId", ["1.xml", "not XML", "download it again"]),
    "a folder's finding is a half": ("folder", "labels.csv", ("PA,1", "PA,0.5"), ["labels.csv", "row 1 (1.png)", "`Mass`", "is no value of a finding"]),
    "a folder's view is unknown": ("folder", "labels.csv", ("PA", "front"), ["labels.csv", "row 1 (1.png)", "`view`", "'front' is no view"]),
    "a folder's rows name no image": ("folder", "labels.csv", ("2.png", ""), ["labels.csv", "row 2", "`image`", "'blank' is no path"]),
}


@pytest.mark.parametrize("fact", BAD)
def test_a_bad_release_gives_one_clear_error(fact, tmp_path):
    source, names, change, words = BAD[fact]
    files = dict(GOOD[source])
    names = names.split(",")
    for name, new in zip(names, change if isinstance(change, list) else [change]):
        if isinstance(new, tuple):
            assert new[0] in files[name], f"the case changes nothing: {new[0]!r} is not in {name}"
            files[name] = files[name].replace(*new, 1)
        elif new is None: files.pop(name)
        else: files[name] = new
    with pytest.raises((ValueError, FileNotFoundError)) as e: read_source(source, put(tmp_path, files))
    said = str(e.value)
    assert type(e.value) in (ValueError, FileNotFoundError) and "\n" not in said
    for w in words: assert w in said, f"{w!r} is not in: {said}"


def test_sizes_and_boxes_of_nih_are_in_the_frame_of_the_original_whatever_lies_on_disk(tmp_path):
    r = read_source("nih", put(tmp_path, NIH))
    np.testing.assert_allclose(r.annotations[BOX].to_numpy(float)[0], np.array([100.5, 200, 150.5, 260])/1024)
    assert r.manifest.width.tolist() == [2682, 2500, 2500]


def test_every_spelling_of_the_nih_header_is_read(tmp_path):
    other = NIH[N].replace("Patient Gender", "Patient Sex").replace("OriginalImage[Width,Height]", "OriginalImageWidth,OriginalImageHeight").replace("[x,y]\n", "[x,y],\n").replace("0.143\n", "0.143,\n").replace("0.168\n", "0.168,\n")
    new, old = read_source("nih", put(tmp_path/"new", NIH | {N: other})).manifest, read_source("nih", put(tmp_path/"old", NIH)).manifest
    pd.testing.assert_frame_equal(new, old)


def test_images_that_are_dropped_take_their_boxes_with_them(tmp_path):
    files = {k: v for k, v in NIH.items() if k != "images/a.png"}
    r = read_source("nih", put(tmp_path, files), missing="drop")
    assert r.manifest.image_id.tolist() == ["b.png", "c.png"] and len(r.annotations) == 0


def test_a_vindr_finding_that_nobody_marked_is_absent_and_one_that_is_not_published_is_no_column(tmp_path):
    m = read_source("vindr", put(tmp_path, VINDR)).manifest
    assert m.Pneumothorax.tolist() == [0, 0] and "Rib_Fracture" not in m and len(findings_of(m)) == 15


def test_all_sources_give_the_same_columns_and_types(tmp_path):
    types = [read_source(s, put(tmp_path/s, GOOD[s])).manifest.iloc[:, :18].dtypes for s in GOOD]
    assert all(t.equals(types[0]) for t in types) and set(GOOD) <= set(SOURCES)


def test_a_manifest_survives_parquet(tmp_path):
    r = read_source("nih", put(tmp_path, NIH))
    r.manifest.to_parquet(tmp_path/"m.parquet"); r.annotations.to_parquet(tmp_path/"a.parquet")
    m, a = pd.read_parquet(tmp_path/"m.parquet"), pd.read_parquet(tmp_path/"a.parquet")
    validate(m, a)
    pd.testing.assert_frame_equal(m, r.manifest); pd.testing.assert_frame_equal(a, r.annotations)


@pytest.fixture(scope="module")
def published_nih(): return read_metadata("nih").manifest


def test_official_splits_are_kept_and_val_is_taken_from_whole_training_patients(published_nih):
    m = published_nih.assign(split=np.where(published_nih.patient_id.astype(int) % 5 == 0, "test", "train"))
    done = split_by_patient(m, val_of_train=.1)
    check_patients(done)
    assert (done.split[m.split == "test"] == "test").all()
    share = done.drop_duplicates("patient_id").split.value_counts(normalize=True)
    assert abs(share["val"] - .08) < .001


def test_a_changed_copy_of_the_published_table_changes_the_manifest(tmp_path):
    m = read_metadata("nih", put(tmp_path, {N: NIH[N].replace("No Finding", "Hernia")})).manifest
    assert m.Hernia.sum() == 1 and m.No_Finding.sum() == 0


def test_no_finding_of_nih_means_none_of_its_fourteen(published_nih):
    y = published_nih
    assert ((y[list(NIH14)].sum(axis=1) == 0) == (y.No_Finding == 1)).all()


@needs_sample
def test_the_real_nih_sample_is_read_as_it_lies(published_nih):
    r = read_source("nih", SAMPLE/"nih-sample")
    assert len(r.manifest) == 721 and r.manifest.No_Finding.sum() == 364 and r.manifest.split.isna().all() and len(r.annotations) == len((SAMPLE/"nih-sample"/B).read_text().splitlines()) - 1
    whole = published_nih.set_index("image_id").loc[r.manifest.image_id]
    assert (whole[list(NIH14)].to_numpy() == r.manifest[list(NIH14)].to_numpy()).all()


@needs_sample
def test_the_real_images_as_released_are_read():
    r = read_source("nih", SAMPLE/"nih-1024")
    assert len(r.manifest) == 48 and all((r.root/p).is_file() for p in r.manifest.path)
