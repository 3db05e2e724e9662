"What the cells of 12_images do not show: every bad input, every transfer syntax, privacy, a build killed at random moments, and real radiographs."
import io, os, struct, subprocess, sys, zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import HTJ2KLossless, JPEG2000Lossless, JPEGLSLossless, RLELossless

from cxr_nb.core import repo_root, rng, sha256, write_json as original_json
from cxr_nb.data.images import box_in_set, build_set, open_set, preprocess, read_image, write_set
from cxr_nb.generators.conditions import conditions_of, write_samples
from cxr_nb.data.sources import BOX, Release, as_annotations, as_manifest, encode_rle

NIH = repo_root().parent/"shared"/"data"
real = pytest.mark.skipif(not (NIH/"nih-1024").is_dir(), reason="the real NIH sample does not lie beside the checkout (shared/data/nih-1024)")
RG1 = Path(get_testdata_file("RG1_UNCR.dcm", download=False))

def sample(name): return pydicom.dcmread(get_testdata_file(name, download=False))

def saved(ds, path):
    ds.save_as(path)
    return path

def small(n=64):
    "A MONOCHROME2 DICOM of n x n px: a ramp of 12 bits, without a window."
    ds = sample("RG1_UNCR.dcm")
    ramp = np.tile(np.linspace(0, 4095, n).round().astype(np.uint16), (n, 1))
    ds.Rows = ds.Columns = n; ds.BitsStored, ds.HighBit, ds.PhotometricInterpretation, ds.PixelData = 12, 11, "MONOCHROME2", ramp.tobytes()
    del ds.WindowCenter, ds.WindowWidth
    return ds, ramp

def picture(seed=0, n=64, kind="PNG"):
    f = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(rng(seed, "picture").integers(0, 256, (n, n), dtype=np.uint8), (0, 0), 2)).save(f, kind)
    return f.getvalue()

def release(root, names, **columns):
    return Release(as_manifest(pd.DataFrame(dict(image_id=[f"i{k}" for k in range(len(names))], patient_id=[f"p{k//2}" for k in range(len(names))], path=names, Edema=1.) | columns), source="folder"), as_annotations(), Path(root), "folder")

# bad inputs

def _huge():
    b = bytearray(picture())
    b[16:24] = struct.pack(">II", 30000, 30000); b[29:33] = struct.pack(">I", zlib.crc32(bytes(b[12:29])))
    return bytes(b)

def _flipped():
    b = bytearray(picture()); b[len(b)//2] ^= 255
    return bytes(b)

def _dicom(change, cut=None):
    ds, _ = small()
    change(ds)
    f = io.BytesIO(); ds.save_as(f)
    return f.getvalue()[:cut]

def _compressed(ds): ds.compress(RLELossless)
def _unsupported(ds):
    ds.PixelData = encapsulate([b"\0"*32]); ds.file_meta.TransferSyntaxUID = HTJ2KLossless; ds["PixelData"].is_undefined_length = True

def _rgb(): return Path(get_testdata_file("SC_rgb.dcm", download=False)).read_bytes()

BAD = {
    "an empty file": (lambda: b"", "is empty"),
    "a PNG cut off": (lambda: picture()[:-400], "PNG is cut off"),
    "a PNG without its last byte": (lambda: picture()[:-1], "PNG is cut off"),
    "a PNG with a flipped byte": (_flipped, "PNG is damaged"),
    "a PNG whose header lies": (_huge, "claims"),
    "the signature of a PNG alone": (lambda: picture()[:8], "PNG is cut off"),
    "a JPEG cut off": (lambda: picture(kind="JPEG")[:-200], "JPEG is cut off"),
    "the start of a JPEG alone": (lambda: b"\xff\xd8\xff\xe0", "JPEG is cut off"),
    "text": (lambda: b"patient 17, see the other folder", "neither PNG, JPEG nor DICOM"),
    "a BMP": (lambda: picture(kind="BMP"), "neither PNG, JPEG nor DICOM"),
    "an icon": (lambda: picture(n=12), "12 x 12 px; a radiograph has at least 16"),
    "a DICOM without pixels": (lambda: _dicom(lambda ds: ds.__delitem__("PixelData")), "no pixel data"),
    "a DICOM cut off in its header": (lambda: _dicom(lambda ds: None, 900), "no pixel data|cannot be parsed"),
    "a DICOM cut off in its pixels": (lambda: _dicom(lambda ds: None, -3000), "cannot be decoded|no pixel data"),
    "a compressed DICOM cut off": (lambda: _dicom(_compressed, -600), "no pixel data|cannot be decoded"),
    "a DICOM of two frames": (lambda: Path(get_testdata_file("eCT_Supplemental.dcm", download=False)).read_bytes(), "holds 2 frames"),
    "a DICOM in colour": (_rgb, "pixels are RGB"),
    "a DICOM in an unsupported transfer syntax": (lambda: _dicom(_unsupported), "cannot be decoded"),
    "a DICOM with a window of no width": (lambda: _dicom(lambda ds: (setattr(ds, "WindowCenter", 1), setattr(ds, "WindowWidth", 0))), "Window Width"),
    "a DICOM whose size is missing": (lambda: _dicom(lambda ds: ds.__delitem__("Rows")), "64 x 0 px"),
    "a DICOM of 32 bits": (lambda: _dicom(lambda ds: setattr(ds, "BitsStored", 32)), "stores 32 bits"),
    "DICOM's mark and nothing else": (lambda: b"\0"*128 + b"DICM", "no pixel data|cannot be parsed"),
}

@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_clear_error_that_names_it(tmp_path, what):
    make, words = BAD[what]
    file = tmp_path/"image.png"
    file.write_bytes(make())
    with pytest.raises(ValueError, match=words) as e: read_image(file)
    assert str(e.value).startswith(f"{file}: ") and "\n" not in str(e.value) and len(str(e.value)) < 400

@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_bad_file_is_a_row_of_the_rejects_and_no_good_one_is_lost(tmp_path):
    names = []
    for k, (make, _) in enumerate(BAD.values()): (tmp_path/f"bad{k}").write_bytes(make()); (tmp_path/f"good{k}.png").write_bytes(picture(k)); names += [f"bad{k}", f"good{k}.png"]
    (tmp_path/"folder.png").mkdir()
    names += ["missing.png", "folder.png", None]
    made = build_set(release(tmp_path, names), tmp_path/"set", 32, max_rejects=.7)
    rejects = pd.read_csv(made.path/"rejects.csv")
    assert sorted([*made.manifest.image_id, *rejects.image_id]) == sorted(f"i{k}" for k in range(len(names)))
    assert made.manifest.path.tolist() == [n for n in names if n and n.startswith("good")]
    assert rejects.reason.notna().all() and not rejects.reason.str.contains(str(tmp_path), regex=False).any()
    assert rejects.reason.tolist()[-3:] == ["No such file or directory", "Is a directory", "the manifest names no file"]
    for i, name in enumerate(made.manifest.path): assert (made.images[i] == preprocess(read_image(tmp_path/name), 32)).all()

def test_a_file_without_read_permission_is_rejected(tmp_path, monkeypatch):
    for k in range(2): (tmp_path/f"{k}.png").write_bytes(picture(k))
    (tmp_path/"0.png").chmod(0)
    if os.access(tmp_path/"0.png", os.R_OK):    # root may read everything
        whole = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda p: whole(p) if p.name != "0.png" else (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(p))))
    made = build_set(release(tmp_path, ["0.png", "1.png"]), tmp_path/"set", 32, max_rejects=.5)
    assert pd.read_csv(made.path/"rejects.csv").reason.tolist() == ["Permission denied"] and len(made) == 1

def test_a_blank_image_is_kept_for_the_audit_to_judge(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path/"blank.png")
    made = build_set(release(tmp_path, ["blank.png"]), tmp_path/"set", 32, equalise=True)
    assert len(made) == 1 and made.images.max() == 0

# DICOM

def regions(x):
    h, w = x.shape
    def mean(y0, y1, x0, x1): return x[int(y0*h):int(y1*h), int(x0*w):int(x1*w)].mean()
    return dict(lungs=(mean(.15, .35, .15, .35) + mean(.15, .35, .65, .85))/2, middle=mean(.2, .5, .46, .56), abdomen=mean(.9, 1, .2, .8), apex=mean(.08, .2, .25, .4))

def test_a_monochrome1_radiograph_has_dark_lungs_and_stands_upright():
    seen, stored = regions(read_image(RG1)), regions(pydicom.dcmread(RG1).pixel_array)
    assert seen["lungs"] + 30 < seen["middle"] and seen["apex"] + 20 < seen["abdomen"]
    assert stored["lungs"] > stored["middle"] and stored["apex"] > stored["abdomen"]     # as stored it is the other way round

def test_monochrome2_is_not_inverted_and_spans_its_own_range_without_a_window(tmp_path):
    ds, ramp = small()
    x = read_image(saved(ds, tmp_path/"a.dcm"))
    assert x.min() == 0 and x.max() == 255 and abs(x - ramp*(255/4095)).max() <= .51
    ds.PhotometricInterpretation = "MONOCHROME1"
    assert (read_image(saved(ds, tmp_path/"b.dcm")) == 255 - x).all()

def test_window_and_level_after_the_rescale(tmp_path):
    ds, ramp = small()
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 2, -1000, [3000, 1], [2001, 5]   # the first window counts
    lo, hi = 2999.5 - 1000, 2999.5 + 1000
    want = (np.clip((ramp*2. - 1000 - lo)/(hi - lo), 0, 1)*255).round()
    assert abs(read_image(saved(ds, tmp_path/"a.dcm")) - want).max() <= 1

@pytest.mark.parametrize("depth", [8, 16])
def test_a_voi_table_replaces_the_window(tmp_path, depth):
    ds, ramp = small()
    item = pydicom.Dataset()
    table = (np.sqrt(np.arange(4096)/4095)*(2**depth - 1)).round().astype(np.uint16)
    item.add_new("LUTDescriptor", "US", [4096, 0, depth]); item.add_new("LUTData", "US", table.tolist())
    ds.VOILUTSequence, ds.WindowCenter, ds.WindowWidth = [item], 1, 1
    assert abs(read_image(saved(ds, tmp_path/"a.dcm")) - np.sqrt(ramp/4095)*255).max() <= 1

@pytest.mark.parametrize("name", ["vlut_04.dcm", "mlut_18.dcm", "693_UNCR.dcm"])
def test_stored_tables_and_signed_pixels_are_read(name):
    x = read_image(get_testdata_file(name, download=False))
    assert x.shape == (512, 512) and x.std() > 10

@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless], ids=["JPEG 2000", "RLE"])
def test_lossless_compression_changes_no_pixel(tmp_path, syntax):
    ds = pydicom.dcmread(RG1)
    ds.Rows, ds.PixelData = 400, ds.pixel_array[:400].tobytes()
    plain = read_image(saved(ds, tmp_path/"plain.dcm"))
    ds.compress(syntax)
    assert ds.file_meta.TransferSyntaxUID == syntax and (read_image(saved(ds, tmp_path/"packed.dcm")) == plain).all()

def test_compressed_radiographs_of_other_makers_agree_with_their_uncompressed_twins():
    assert (read_image(get_testdata_file("RG3_J2KR.dcm", download=False)) == read_image(get_testdata_file("RG3_UNCR.dcm", download=False))).all()

def test_jpeg_lossless_and_jpeg_ls_are_read(tmp_path):
    assert read_image(get_testdata_file("JPGLosslessP14SV1_1s_1f_8b.dcm", download=False)).shape == (768, 1024)
    ds, plain = sample("emri_small_jpeg_ls_lossless.dcm"), sample("emri_small.dcm")
    assert ds.file_meta.TransferSyntaxUID == JPEGLSLossless
    ds.PixelData, ds.NumberOfFrames = encapsulate([next(generate_frames(ds.PixelData, number_of_frames=10))]), 1
    plain.PixelData, plain.NumberOfFrames = plain.pixel_array[0].tobytes(), 1
    assert (read_image(saved(ds, tmp_path/"ls.dcm")) == read_image(saved(plain, tmp_path/"plain.dcm"))).all()

@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_that_identifies_a_person_leaves_a_dicom(tmp_path, capfd):
    secret = "ZZTOPSECRET"
    for k in range(3):
        ds, _ = small()
        ds.PatientName, ds.PatientID, ds.OtherPatientIDs, ds.InstitutionName, ds.ImageComments = (f"{secret}^{k}",)*5
        ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyDescription = (f"{secret}{k}",)*3
        ds.PatientBirthDate, ds.StudyDate = "19400305", "19950926"
        b = io.BytesIO(); ds.save_as(b)
        raw = b.getvalue().replace(b"19400305", b"ZZTOPSEC")        # an invalid date, which a parser would quote
        (tmp_path/f"{k}.dcm").write_bytes(raw if k < 2 else raw[:-1000])
    made = build_set(release(tmp_path, [f"{k}.dcm" for k in range(3)]), tmp_path/"set", 32, max_rejects=.5)
    log = "".join(capfd.readouterr())
    with pytest.raises(ValueError) as e: read_image(tmp_path/"2.dcm")
    tables = made.manifest.to_csv() + made.annotations.to_csv() + (made.path/"rejects.csv").read_text() + (made.path/"set.json").read_text()
    for words in (secret, "ZZTOPSEC", "1940", "199509"):
        assert words not in log + tables + str(e.value) + repr(e.value.__cause__)
        assert not any(words.encode() in f.read_bytes() for f in made.path.iterdir())
    assert len(made) == 2

# the build

def many(root, n=60):
    root.mkdir()
    for k in range(n): (root/f"{k}.png").write_bytes(picture(k, 100) if k % 20 != 7 else picture(k)[:100])
    return release(root, [f"{k}.png" for k in range(n)])

def contents(path): return {f.name: sha256(f) for f in sorted(path.iterdir()) if f.name != ".lock"}

def test_a_build_killed_at_random_moments_ends_in_the_same_bytes(tmp_path):
    r = many(tmp_path/"release")
    whole = build_set(r, tmp_path/"whole", 32, max_rejects=.1, workers=1)
    r.manifest.to_pickle(tmp_path/"manifest.pickle")
    code = f"""
import os, random, signal, time, numpy as np, pandas as pd, cxr_nb.data.images as images
from pathlib import Path
from cxr_nb.data.sources import Release, as_annotations
all_rows, read = images._read_all, images.read_image
images._read_all = lambda *a: all_rows(*a, chunk=4)
images.read_image = lambda *a: (time.sleep(.02), read(*a))[1]
release = Release(pd.read_pickle({str(tmp_path/'manifest.pickle')!r}), as_annotations(), Path({str(r.root)!r}), "folder")
def rows_read(): return np.count_nonzero(np.fromfile(sizes, "<i4"))//2 if sizes.exists() else 0
sizes, moments, killed = Path({str(tmp_path/'killed'/'sizes.part')!r}), random.Random(0), 0
for _ in range(6):
    goal = rows_read() + moments.randint(0, 8)
    if not (pid := os.fork()):
        images.build_set(release, {str(tmp_path/'killed')!r}, 32, max_rejects=.1)
        os._exit(0)
    while rows_read() < goal: time.sleep(.002)
    time.sleep(moments.uniform(0, .04))
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
print(killed)
"""
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(p.stdout) == 6 and not (tmp_path/"killed"/"set.json").exists() and 0 < np.count_nonzero(np.fromfile(tmp_path/"killed"/"sizes.part", "<i4")) < 2*54
    with pytest.raises(FileNotFoundError, match="interrupted"): open_set(tmp_path/"killed")
    build_set(r, tmp_path/"killed", 32, max_rejects=.1)
    assert contents(tmp_path/"killed") == contents(whole.path)

@pytest.mark.parametrize("after", ["manifest.parquet", "images.npy", "set.json"])
def test_a_build_stopped_while_it_finishes_ends_in_the_same_bytes(tmp_path, monkeypatch, after):
    import cxr_nb.data.images as images
    r = many(tmp_path/"release", 12)
    whole = build_set(r, tmp_path/"whole", 32, max_rejects=.1)
    original = images.atomic
    def stops(path):
        if Path(path).name == after: raise KeyboardInterrupt
        return original(path)
    monkeypatch.setattr(images, "atomic", stops)
    monkeypatch.setattr(images, "write_json", lambda p, o: (_ for _ in ()).throw(KeyboardInterrupt) if p.name == after else original_json(p, o))
    with pytest.raises(KeyboardInterrupt): build_set(r, tmp_path/"stopped", 32, max_rejects=.1)
    monkeypatch.undo()
    build_set(r, tmp_path/"stopped", 32, max_rejects=.1)
    assert contents(tmp_path/"stopped") == contents(whole.path)

def test_files_mended_after_a_failed_build_are_read_and_the_others_are_not_read_again(tmp_path, monkeypatch):
    import cxr_nb.data.images as images
    r = many(tmp_path/"release", 20)
    with pytest.raises(ValueError, match="7.png: the PNG is cut off.*mend the files or raise max_rejects"): build_set(r, tmp_path/"set", 32, max_rejects=0)
    assert pd.read_csv(tmp_path/"set"/"rejects.csv").image_id.tolist() == ["i7"]
    (r.root/"7.png").write_bytes(picture(7, 100))
    read, original = [], images.read_image
    monkeypatch.setattr(images, "read_image", lambda p, bits: (read.append(p.name), original(p, bits))[1])
    made = build_set(r, tmp_path/"set", 32, max_rejects=0)
    assert read == ["7.png"] and len(made) == 20 and pd.read_csv(made.path/"rejects.csv").empty and not list(made.path.glob("*.part"))

def test_the_number_of_threads_changes_no_byte(tmp_path):
    r = many(tmp_path/"release", 20)
    assert build_set(r, tmp_path/"a", 32, workers=1, max_rejects=.1).sha256 == build_set(r, tmp_path/"b", 32, workers=4, max_rejects=.1).sha256

def test_the_original_size_is_filled_in_where_the_manifest_lacks_it_and_kept_where_not(tmp_path):
    for k in range(2): Image.fromarray(np.full((40, 60), k, np.uint8)).save(tmp_path/f"{k}.png")
    made = build_set(release(tmp_path, ["0.png", "1.png"], width=[2500, None], height=[2048, None]), tmp_path/"set", 32)
    assert made.manifest.width.tolist() == [2500, 60] and made.manifest.height.tolist() == [2048, 40]
    assert np.allclose(made.window, [1/6, 0, 5/6, 1], atol=.02)          # of the file that was read, not of the size in the table

def test_a_full_disk_is_one_clear_error_and_keeps_what_was_read(tmp_path, monkeypatch):
    import cxr_nb.data.images as images
    r = many(tmp_path/"release", 20)
    (tmp_path/"set").mkdir(); (tmp_path/"set"/"images.part").symlink_to("/dev/full")
    if not Path("/dev/full").exists(): pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="disk is full while building"): build_set(r, tmp_path/"set", 32, max_rejects=.1)
    monkeypatch.setattr(images.shutil, "disk_usage", lambda p: type("U", (), dict(free=10)))
    with pytest.raises(OSError, match="the set needs .* GB are free"): build_set(r, tmp_path/"set2", 32, max_rejects=.1)

def test_a_release_without_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no image files"): build_set(release(tmp_path, [None, None]), tmp_path/"set", 32)
    with pytest.raises(ValueError, match="names no image files"): build_set(release(tmp_path, []), tmp_path/"set", 32)

# the set

@pytest.fixture
def four(tmp_path):
    return write_set(tmp_path/"four", np.arange(4*16*16, dtype=np.uint8).reshape(4, 16, 16), release(tmp_path, [None]*4).manifest, masks=np.ones((2, 16, 16), np.uint8), made_by={"by": "test"})

def test_the_same_parts_have_the_same_hash_and_another_part_another(tmp_path, four):
    again = write_set(tmp_path/"again", np.asarray(four.images), four.manifest, masks=four.masks)
    other = write_set(tmp_path/"other", np.asarray(four.images), four.manifest, masks=four.masks*0)
    assert again.sha256 == four.sha256 != other.sha256

DAMAGE = {
    "no folder": (lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir(), FileNotFoundError, "no set at"),
    "no set.json": (lambda p: (p/"set.json").unlink(), FileNotFoundError, "interrupted"),
    "half a set.json": (lambda p: (p/"set.json").write_text("{"), ValueError, "not JSON"),
    "another schema": (lambda p: (p/"set.json").write_text('{"schema": 99}'), ValueError, "schema 99"),
    "a missing part": (lambda p: (p/"masks.npz").unlink(), FileNotFoundError, "masks.npz is missing"),
    "an unreadable manifest": (lambda p: (p/"manifest.parquet").write_bytes(b"x"*100), ValueError, "manifest.parquet cannot be read"),
    "an empty table of annotations": (lambda p: (p/"annotations.parquet").write_bytes(b""), ValueError, "annotations.parquet cannot be read"),
    "an array cut off": (lambda p: os.truncate(p/"images.npy", 700), ValueError, "images.npy is damaged"),
    "an empty array": (lambda p: os.truncate(p/"images.npy", 0), ValueError, "images.npy is damaged"),
    "an array of another size": (lambda p: np.save(p/"images.npy", np.zeros((3, 16, 16), np.uint8)), ValueError, "set.json says 4 images of 16 px"),
    "a manifest of another length": (lambda p: pd.read_parquet(p/"manifest.parquet").iloc[:2].to_parquet(p/"manifest.parquet"), ValueError, "the manifest has 2 rows"),
}

@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_set_is_one_clear_error(four, what):
    damage, kind, words = DAMAGE[what]
    damage(four.path)
    with pytest.raises(kind, match=words): open_set(four.path)

@pytest.mark.parametrize("name", ["manifest.parquet", "annotations.parquet", "images.npy", "masks.npz"])
def test_verification_notices_one_changed_byte_in_any_part(four, name):
    b = bytearray((four.path/name).read_bytes()); b[-1] ^= 1
    open_set(four.path, verify=True)
    (four.path/name).write_bytes(bytes(b))
    with pytest.raises(ValueError, match=f"{name}.*SHA-256 differs"): open_set(four.path, verify=True)

def test_a_set_whose_parts_do_not_fit_is_not_written(tmp_path, four):
    x, m = np.asarray(four.images), four.manifest
    about = as_annotations(pd.DataFrame(dict(image_id=["i0"], finding="Edema", mask=[2])))
    for args, words in [((x[:3], m), "3 images, but 4 rows"), ((x.astype(float), m), "uint8"), ((x[:, :8], m), "uint8"), ((x, m, about, four.masks), "mask 2, but there are 2"), ((x, m, None, four.masks*2), "masks are"),
                        ((x, m.assign(Edema=.5)), "Edema"), ((x[:0], m[:0]), "n > 0")]:
        with pytest.raises(ValueError, match=words): write_set(tmp_path/"no", *args)
        assert not (tmp_path/"no").exists()
    (tmp_path/"home").mkdir(); (tmp_path/"home"/"thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="other files .thesis.tex"): write_set(tmp_path/"home", x, m)

def test_a_box_is_cut_at_the_crop_and_follows_each_image(tmp_path):
    for k, shape in enumerate([(64, 128), (128, 64), (64, 64)]): Image.fromarray(np.full(shape, 99, np.uint8)).save(tmp_path/f"{k}.png")
    r = release(tmp_path, ["0.png", "1.png", "2.png"])
    r.annotations = as_annotations(pd.DataFrame(dict(image_id=["i0", "i1", "i2", "i0"], finding="Mass", x0=[.0, .5, .5, .0], y0=[.5, .0, .5, .0], x1=[.5, 1, 1, .2], y1=[1, .5, 1, 1.])))
    data = build_set(r, tmp_path/"set", 32); boxes = data.boxes()
    asked = conditions_of(data, np.arange(3), ("boxes",)); asked[1] = replace(asked[1], parent=None)      # two of a parent's, one by hand
    made = write_samples(tmp_path/"made", data.images, asked, data.findings, "echo", 0, source=data)
    assert made.boxes()[BOX].to_numpy().tolist() == boxes[BOX].to_numpy().tolist()                        # asked for where they were seen
    assert boxes.row.tolist() == [0, 1, 2] and boxes[BOX].to_numpy().tolist() == [[0, 16, 16, 32], [16, 0, 32, 16], [16, 16, 32, 32]]   # the fourth lies in what was cut away

def test_run_length_masks_are_resized_and_cut_as_their_images_and_renumbered(tmp_path):
    mask = np.zeros((1024, 1024), np.uint8); mask[256:768, 128:640] = 1
    for k in range(3): Image.fromarray(cv2.resize(mask*200, (1024, 512))).save(tmp_path/f"{k}.png")
    (tmp_path/"0.png").write_bytes(b"")
    r = release(tmp_path, ["0.png", "1.png", "2.png"])
    r.masks = (encode_rle(1 - mask), encode_rle(1 - mask), encode_rle(mask))
    r.annotations = as_annotations(pd.DataFrame(dict(image_id=["i0", "i2"], finding="Pneumothorax", mask=[1, 2])))
    made = build_set(r, tmp_path/"set", 64, max_rejects=.4)
    assert made.annotations["mask"].tolist() == [0] and made.masks.shape == (1, 64, 64)
    assert (made.masks[0] == (made.images[1] > 100)).mean() > .99 and made.masks.mean() > .3     # the image shows its own mask

# real radiographs

@real
def test_nihs_rgba_files_are_grey_with_an_alpha_that_says_nothing():
    rgba = [f for f in sorted((NIH/"nih-1024"/"images").iterdir()) if f.read_bytes()[25] == 6]
    assert rgba
    for f in rgba:
        x = cv2.imread(str(f), cv2.IMREAD_UNCHANGED)
        assert x.shape[2] == 4 and (x[..., 3] == 255).all() and (read_image(f) == x[..., 0]).all() and (x[..., :1] == x[..., :3]).all()

def cut(x, box):
    x0, y0, x1, y1 = np.round(box).astype(int)
    return cv2.resize(x[y0:y1, x0:x1], (24, 24), interpolation=cv2.INTER_AREA).ravel().astype(float)

@real
def test_a_box_covers_the_same_content_in_the_cached_image_as_in_the_1024_px_file():
    table = pd.read_csv(NIH/"nih-sample"/"BBox_List_2017.csv", header=0, names=["image", "finding", "x", "y", "w", "h", "a", "b", "c"])
    boxes = {(r.image, (r.x, r.y, r.x + r.w, r.y + r.h)) for r in table.itertuples()}
    files, g = sorted(f.name for f in (NIH/"nih-1024"/"images").iterdir()), rng(0, "boxes")
    boxes |= {(f, (x, y, x + 160, y + 160)) for f in files for x, y in [g.integers(100, 700, 2).tolist()]}   # few of these files have a box: one more at random in each
    same, moved = [], []
    for name, box in sorted(b for b in boxes if b[0] in files):
        large, cached = read_image(NIH/"nih-1024"/"images"/name), preprocess(read_image(NIH/"nih-sample"/"images"/name), 256)
        there = cut(large, box)
        placed = box_in_set(np.array(box)/1024, 256, 256, 256)
        same.append(np.corrcoef(there, cut(cached, placed))[0, 1])
        moved.append(np.corrcoef(there, cut(cached, np.clip(placed + 12, 0, 256)))[0, 1])
    assert len(same) > len(files) and np.median(same) > .99 and min(same) > .9 and np.mean(np.array(same) > moved) > .95, (np.median(same), min(same), np.median(moved))
