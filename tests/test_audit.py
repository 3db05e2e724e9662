"Each claim of the ledger rests on rows or printed numbers: change them, and the recomputed value changes; past the tolerance, so does the verdict."
import copy, io, tarfile, zipfile

import cv2
import numpy as np
import pandas as pd
import pytest

from cxr_nb.core import repo_root
from cxr_nb.data import audit as A

META = A.Metadata()  # the wheel's CSVs, each parsed once
COLUMNS = {"nih": ("Finding Labels", "Patient ID", "Patient Gender", "View Position"), "nih_boxes": ("Image Index", "Finding Label"),
    "vindr": ("image_id", "class_name", "rad_id"), "google": ("Image Index",),
           "chexpert": ("Path", "Frontal/Lateral"), "padchest": ("ImageID",), "rsna": ("patientId", "Target"), "siim": ("ImageId", "EncodedPixels")}
_base = {}

def base(id):
    "The outcome on the wheel's metadata."
    if id not in _base: _base[id] = A.check(A.CLAIMS[id], META)
    return _base[id]

def in_folder(id, folder, name, edit, **kw):
    "The outcome on a folder that holds one edited table."
    t = edit(META.table(name, *COLUMNS[name]).copy())
    t.to_csv(folder/A.FILES[name].removesuffix(".gz"), index=False)
    return A.check(A.CLAIMS[id], A.Metadata(folder, **kw))

def drop_first(t): return t.iloc[1:]
def drop_class(name): return lambda t: t.drop(index=t.index[t.class_name == name][0])
def own_image(t): return t.assign(image_id=[f"i{k}" for k in range(len(t))])
def relabel(t, old, new): return t.assign(**{"Finding Labels": t["Finding Labels"].where(np.arange(len(t)) != np.flatnonzero(t["Finding Labels"] == old)[0], new)})
def table_a1_as_nih(t):
    labels = [sorted(A._IN_NIH.get(c, {c}))[0] for c, n in A.TABLE_A1.items() for _ in range(n)]
    return pd.DataFrame({"Finding Labels": labels, "Patient ID": range(len(labels))})
def three_quarters(t):
    no = t["Finding Labels"] == "No Finding"
    return pd.concat([t[no], t[~no].iloc[:no.sum()//3]])
def lateral(t): return t.assign(**{"View Position": ["LL", *t["View Position"].iloc[1:]]})
def more_boxes(t): return pd.concat([t, t.iloc[:20].assign(**{"Image Index": [f"{k:08d}_000.png" for k in range(90000000, 90000020)]})])

# claim -> (table, edit that flips the verdict)
EDITS = {
    "a1-nih": ("nih", table_a1_as_nih),
    "a1-vindr-rows": ("vindr", drop_class("Pneumothorax")),
    "a1-vindr-images": ("vindr", own_image),
    "a1-size": ("vindr", own_image),
    "vae-table1": ("nih", lambda t: relabel(t, "Hernia", "No Finding")),
    "vae-lateral": ("nih", lateral),
    "pggan-no-finding": ("nih", three_quarters),
    "pggan-boxes": ("nih_boxes", more_boxes),
    "chexgen-padchest": ("padchest", lambda t: pd.concat([t, t.iloc[:166737 - len(t)]])),
    "accuracy": ("vindr", lambda t: t[t.class_name != "No finding"]),
    "accuracy-augmented": ("vindr", lambda t: t[t.class_name != "No finding"]),
    "share-rows": ("vindr", lambda t: t.iloc[:15000]),
    "share-images": ("vindr", own_image),
    "nih": ("nih", drop_first),
    "nih-boxes": ("nih_boxes", drop_first),
    "google": ("google", drop_first),
    "vindr": ("vindr", drop_first),
    "chexpert": ("chexpert", drop_first),
    "siim": ("siim", lambda t: t[t.ImageId != t.ImageId[0]]),
    "rsna": ("rsna", drop_first),
    "padchest": ("padchest", drop_first)}

def printed(set, disease, measures):
    t = copy.deepcopy(A.MEASURES); t[set][disease] = measures
    return {"printed": t}

def measured_on(sizes):
    "Table 2 as it would print for sets of these sizes: a third of the other images called positive, 70 % of the positives found."
    t = copy.deepcopy(A.MEASURES)
    for s, n in sizes.items():
        for d, p in ((d, A.TEST_SETS[s][d]) for d in t[s]):
            tp, fp = round(.7*p), (n - p)//3
            t[s][d] = (0, round(100*(tp + n - p - fp)/n, 2), round(100*tp/(tp + fp), 2))
    return {"printed": t}

def matched(points):
    "Table 2 with MIMIC's pneumothorax this many points above the synthetic one."
    return printed("MIMIC", "Pneumothorax", (71.39 + points, 57.71 + points, 28.13))

one_cloud = {"separations": ((1, 0.),)}
# claim -> other printed numbers that flip the verdict
GIVEN = {
    "t2-sizes": measured_on(A.TEST_TOTALS),
    "t2-diseases": measured_on({"Synthetic": 600}),
    "t2-tables": printed("Synthetic", "Pneumothorax", (71.39, 57.72, 36.03)),
    "t2-higher": matched(0),
    "t1-chexpert": {"groups": A.TEST_SETS["CheXpert"] | {"Pneumothorax": 11}},
    "t1-synthetic": {"groups": A.TEST_SETS["Synthetic"] | {"Pneumothorax": 119}},
    "t1-mimic": {"groups": {"all but no findings": 88, "No Findings": 19}},
    "vae-224": {"parameters": A.vae_parameters(224) | A.gan_parameters(7)},
    "gmvae-normalisation": {"Table 4": A.CLAIMS["gmvae-normalisation"].given["Table 4"] | {"V8": False}},
    "densenet-map": {"px": 512},
    "densenet-outputs": {"weights": "nih"},
    "silhouette-space": one_cloud,
    "silhouette-alike": one_cloud}

VERDICTS = {A.REPRODUCED: {"a1-vindr-rows", "vae-table1", "pggan-boxes", "share-rows", "t2-diseases", "t2-tables", "t1-chexpert", "t1-synthetic", "nih",
    "nih-boxes", "google", "vindr", "chexpert", "siim", "rsna", "padchest", "openi", "v7"},
            A.UNTESTED: {"vae-long-tail"}}

def flipped(before, after):
    assert after.recomputed != before.recomputed
    assert {before.verdict, after.verdict} == {A.REPRODUCED, A.CONTRADICTED}

@pytest.mark.parametrize("id", EDITS)
def test_changing_the_rows_a_claim_rests_on_flips_its_verdict(id, tmp_path): flipped(base(id), in_folder(id, tmp_path, *EDITS[id]))

@pytest.mark.parametrize("id", GIVEN)
def test_changing_the_printed_numbers_a_claim_rests_on_flips_its_verdict(id): flipped(base(id), A.check(A.CLAIMS[id], META, given=GIVEN[id]))

def test_every_claim_has_a_test_of_its_rows(): assert {*EDITS, *GIVEN, "vae-long-tail", "openi", "v7"} == set(A.CLAIMS)

@pytest.mark.parametrize("id", [k for k in A.CLAIMS if k != "vae-long-tail"])
def test_the_wheels_metadata_give_the_known_verdict(id):
    assert base(id).verdict == (A.REPRODUCED if id in VERDICTS[A.REPRODUCED] else A.CONTRADICTED), base(id)

def test_a_published_number_that_agrees_flips_a_contradiction():
    o = base("t1-mimic")
    assert A.check(o.claim, META, published=o.recomputed).verdict == A.REPRODUCED

@pytest.mark.parametrize("id, name, edit", [("pggan-no-finding", "nih", drop_first), ("share-rows", "vindr", lambda t: t.iloc[1000:]),
    ("pggan-boxes", "nih_boxes", drop_first), ("accuracy", "vindr", lambda t: t.iloc[1000:])])
def test_a_change_within_the_tolerance_changes_the_value_and_not_the_verdict(id, name, edit, tmp_path):
    o = in_folder(id, tmp_path, name, edit)
    assert o.recomputed != base(id).recomputed and o.verdict == base(id).verdict

def test_similar_means_within_two_points():
    assert [A.check(A.CLAIMS["t2-higher"], META, given=matched(d)).verdict for d in (1.9, 2.1)] == [A.REPRODUCED, A.CONTRADICTED]

def test_the_archives_files_are_counted(tmp_path):
    with tarfile.open(tmp_path/A.FILES["openi"], "w:gz") as t:
        for k in range(2): t.addfile(tarfile.TarInfo(f"reports/{k}.xml"), io.BytesIO())
    with zipfile.ZipFile(tmp_path/A.FILES["v7"], "w") as z:
        z.mkdir("masks"); z.writestr("masks/a.png", b"")
    data = A.Metadata(tmp_path)
    for id, k in (("openi", 2), ("v7", 1)):
        o = A.check(A.CLAIMS[id], data)
        flipped(base(id), o); assert [*o.recomputed.values()] == [k]

def test_the_long_tail_claim_waits_for_its_csv_and_is_tested_when_it_is_given(tmp_path):
    claim, own = A.CLAIMS["vae-long-tail"], base("vae-long-tail")
    assert own.verdict == A.UNTESTED and "`lt_csv`" in own.note and [*own.recomputed.values()] == [60361, 955, 0]
    fewer = in_folder("vae-long-tail", tmp_path, "nih", lambda t: relabel(t, "No Finding", "Hernia"))
    assert [*fewer.recomputed.values()] == [60360, 954, 0]
    n = max(claim.published.values())
    t = pd.DataFrame({"id": range(n), **{k: (np.arange(n) < v).astype(int) for k, v in claim.published.items()}})
    halves = [tmp_path/"train.csv", tmp_path/"test.csv"]
    for p, part in zip(halves, (t[::2], t[1::2])): part.to_csv(p, index=False)
    assert A.check(claim, A.Metadata(lt_csv=",".join(map(str, halves)))).verdict == A.REPRODUCED
    assert A.check(claim, A.Metadata(lt_csv=str(halves[0]))).verdict == A.CONTRADICTED
    assert "correct the path" in A.check(claim, A.Metadata(lt_csv=str(tmp_path/"absent.csv"))).note
    t.drop(columns="Tortuous Aorta").to_csv(halves[0], index=False)
    with pytest.raises(ValueError, match="no column for 'Tortuous Aorta'"): A.check(claim, A.Metadata(lt_csv=str(halves[0])))

def test_without_its_file_a_claim_is_not_testable_and_names_the_file(tmp_path):
    rows = A.ledger(outcomes=[A.check(A.CLAIMS[k], A.Metadata(tmp_path)) for k in {*EDITS, "openi", "v7"}])
    assert set(rows.verdict) == {A.UNTESTED}
    assert all(any(f in note for f in A.FILES.values()) for note in rows.note)

def test_a_size_without_a_matching_release_is_not_testable(tmp_path):
    A_1 = {"counts": A.TABLE_A1 | {"ILD": 1}}
    assert A.check(A.CLAIMS["a1-size"], META, given=A_1).verdict == A.UNTESTED
    assert A.check(A.CLAIMS["a1-size"], META, given={"counts": A.VAE_TABLE1}).recomputed == {"images": 112120, "patients": 30805}

def test_constant_answers_score_what_they_are_known_to_score():
    assert [round(v, 3) for v in base("accuracy").recomputed.values()] == [.933, .929, .962, .885, .912, .927]

def test_the_search_finds_the_known_confusion_tables_and_no_other_size():
    t = A.confusion_tables().set_index(["set", "disease"])
    assert t.loc[("Synthetic", "Pneumothorax"), ["N", "TP", "FP", "FN", "TN"]].tolist() == ["480", "107", "190", "13", "170"]
    assert {s: t.loc[s].N.unique().tolist() for s in A.TEST_TOTALS} == {"CheXpert": ["309"], "Synthetic": ["480"], "MIMIC": ["88"]}
    assert t.loc[("MIMIC", "Atelectasis"), ["solutions", "TP", "FP"]].tolist() == [38, "1-38",
        "1-38"] and (t.drop(index=("MIMIC", "Atelectasis")).solutions == 1).all()

def test_a_number_rests_on_the_rows_of_its_own_unit():
    assert {k: n for k, n in base("accuracy").n.items() if k.startswith("all absent")} == {"all absent, rows": 67914, "all absent, images": 15000}
    assert base("t2-sizes").n == dict.fromkeys(A.TEST_SETS, 4)

def test_claims_of_the_papers_our_explanations_and_facts_about_the_releases_are_counted_apart():
    kinds = A.ledger(outcomes=[base(k) for k in ("vae-table1", "a1-vindr-rows", "t2-diseases", "nih", "siim")]).kind
    assert kinds.tolist() == ["claims of the papers", "our explanations", "our explanations", "facts about the releases", "facts about the releases"]

def test_only_what_the_paper_prints_for_the_same_quantity_counts_as_printed():
    whole = {k for k, c in A.CLAIMS.items() if c.paper != "the releases" and all(map(c.prints, c.published))}
    assert {"a1-vindr-rows", "vae-table1", "t1-mimic", "densenet-map", "vae-224"} <= whole
    assert not whole & {"silhouette-space", "silhouette-alike", "vae-lateral", "t2-higher", "t2-diseases", "t2-tables", "accuracy", "gmvae-normalisation"}
    assert all(set(c.printed or ()) <= c.published.keys() for c in A.CLAIMS.values())
    row = A.readable(A.ledger(outcomes=[base("pggan-boxes")])).iloc[0]
    assert row.published == "boxes: (1,000); images with a box: 1,000" and row.n == "984"

def test_the_files_behind_the_ledger_are_known():
    data = A.Metadata(); A.check(A.CLAIMS["pggan-boxes"], data)
    assert [p.name for p in data.read] == [A.FILES["nih_boxes"]]

def test_no_lateral_radiograph_counts_as_inverted():
    ramp = np.tile(np.uint8(255*abs(np.linspace(-1, 1, 64))), (2, 64, 1))  # dark in the middle, as an inverted chest
    m = pd.DataFrame({"view": ["PA", "LATERAL"], "width": 64, "height": 64})
    assert A.image_quality(ramp, m).inverted.tolist() == [True, False]

def test_the_pages_text_is_escaped():
    o = A.check(A.Claim("x", "p", "t", "a < b & c", {"k": 1}, lambda *a: A.Recomputed({"k": 1}, 1), "by <b>hand</b>"), META)
    page = A.ledger_html(A.ledger(outcomes=[o]))
    assert "a &lt; b &amp; c" in page and "<b>hand" not in page and "overflow-x:auto" in page

@pytest.fixture(scope="module")
def real():
    root = repo_root().parent/"shared"/"data"/"nih-sample"
    if not root.exists(): pytest.skip("no real radiographs beside the checkout (shared/data/nih-sample)")
    rows = pd.read_csv(root/"Data_Entry_2017_v2020.csv")
    full = [cv2.imread(str(root/"images"/f), cv2.IMREAD_GRAYSCALE) for f in rows["Image Index"]]
    return rows, full, np.stack([cv2.resize(x, (64, 64), interpolation=cv2.INTER_AREA) for x in full])

def test_no_real_radiograph_counts_as_inverted_and_every_inverted_one_does(real):
    assert (A.uprightness(real[2]) > 0).all() and (A.uprightness(255 - real[2]) < 0).all()

def test_copies_of_real_radiographs_are_found_and_strangers_are_not(real):
    rows, full, x = real
    near, patient = A.near_duplicates(x), rows["Patient ID"].to_numpy()
    assert (patient[near.i] == patient[near.j]).all() and len(near) < 5
    again = [cv2.imdecode(cv2.imencode(".jpg", (255*(y/255.)**1.3).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 0) for y in full[:100]]
    both = np.concatenate([x, [cv2.resize(y, (64, 64), interpolation=cv2.INTER_AREA) for y in again]])
    found = A.near_duplicates(both)
    assert {(i, len(x) + i) for i in range(100)} <= {*zip(found.i, found.j)}
