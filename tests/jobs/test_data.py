from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.data.multiview import Found, MultiView, ViewChoice, find_samples, read_pixels
from jobs.data.rigs import rigs_of
from jobs.data.samples import read_list, read_sample
from jobs.data.toy import make
from jobs.loader import Draw
from jobs.runtime import AgreedError, JobError
from jobs.world import World
from models.cameras import mv6, orbit32

WHITE = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    make(out, 3, 1, 16, 0)
    return out


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A data set of three samples to be damaged; sample_000001 is the one that tests touch."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def cameras(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(sample: Path) -> None:
        path = sample / "opencv_cameras.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))
    return damage


def picture(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def damage(sample: Path) -> None:
        path = sample / "images" / "cam_002.png"
        with Image.open(path) as image:
            changed = change(image.copy())
        changed.save(path)
    return damage


def cut_to(share: float) -> Callable[[Path], None]:
    def damage(sample: Path) -> None:
        path = sample / "images" / "cam_002.png"
        raw = path.read_bytes()
        path.write_bytes(raw[:int(len(raw) * share)])
    return damage


def corrupt_middle(sample: Path) -> None:
    path = sample / "images" / "cam_002.png"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def short_header(sample: Path) -> None:
    path = sample / "images" / "cam_002.png"
    raw = bytearray(path.read_bytes())
    raw[11] = 5  # bytes of IHDR, which needs 13
    path.write_bytes(raw)


def mirror(raw: dict) -> None:
    w2c = raw["frames"][2]["w2c"]
    w2c[0] = [-value for value in w2c[0]]


def push(raw: dict) -> None:
    raw["frames"][0]["w2c"][2][3] += 0.3


def behind(raw: dict) -> None:
    raw["frames"][2]["w2c"][2][3] *= -1


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing directory": (shutil.rmtree, "directory: does not exist"),
    "missing json": (lambda s: (s / "opencv_cameras.json").unlink(), "opencv_cameras.json: No such file"),
    "json that is not json": (lambda s: (s / "opencv_cameras.json").write_text("{,"), "is not JSON"),
    "no frames": (cameras(lambda raw: raw.pop("frames")), "has no list `frames`"),
    "lacks a key": (cameras(lambda raw: raw["frames"][2].pop("fx")), "frame 2: lacks fx"),
    "infinite width": (cameras(lambda raw: raw["frames"][2].update(w=float("inf"))), "is no number"),
    "word for a number": (cameras(lambda raw: raw["frames"][2].update(fx="wide")), "is no number"),
    "NaN camera": (cameras(lambda raw: raw["frames"][2].update(fx=float("nan"))), "frame 2 (images/cam_002.png): non-finite"),
    "mirrored": (cameras(mirror), "det(R) = -1"),
    "behind": (cameras(behind), "behind-camera"),
    "wrong view count": (cameras(lambda raw: (raw["frames"].pop(), raw.pop("rig"))), "has 5 views, the others have 6"),
    "fewer views than its rig": (cameras(lambda raw: raw["frames"].pop()), "has 5 frames, its rig 6 views"),
    "cameras moved after the rig was written": (cameras(push), "view front: camera poses differ by 0.3"),
    "frames in another order than its rig": (cameras(lambda raw: raw["frames"].reverse()), "not those of the rig it carries"),
    "edited rig": (cameras(lambda raw: raw["rig"]["views"].reverse()), "it was edited"),
    "half a rig": (cameras(lambda raw: raw["rig"].pop("c2w")), "a rig's record is incomplete"),
    "missing png": (lambda s: (s / "images" / "cam_002.png").unlink(), "cam_002.png: the image does not exist"),
    "truncated png": (cut_to(0.6), "cam_002.png: is a truncated PNG"),
    "empty png": (cut_to(0), "cam_002.png: is not a PNG"),
    "broken png": (corrupt_middle, "cam_002.png: cannot be decoded"),
    "broken header": (short_header, "cam_002.png: cannot be decoded"),
    "non-square": (picture(lambda im: im.crop((0, 0, 16, 12))), "cam_002.png: is not square: 16 x 12"),
    "other size than its camera": (picture(lambda im: im.resize((8, 8))), "is 8 x 8 px, its camera is for 16 x 16"),
    "no alpha": (picture(lambda im: im.convert("RGB")), "has no 8-bit alpha channel"),
    "fully transparent": (picture(lambda im: Image.new("RGBA", im.size)), "cam_002.png: is fully transparent"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_bad_sample_is_named_with_its_defect_and_a_remedy(data: Path, alone: World, name: str) -> None:
    damage, said = DEFECTS[name]
    damage(data / "sample_000001")
    with pytest.raises(AgreedError) as caught:
        find_samples(data / "data_train.txt", "error", alone)
    first, remedy = str(caught.value).split("\n")[:2]
    assert first.startswith("sample_000001: ") and said in first
    assert remedy.strip()
    assert caught.value.error.exit_code == 2


@pytest.mark.parametrize("name", DEFECTS)
def test_skip_counts_and_lists_it_instead(data: Path, alone: World, name: str) -> None:
    DEFECTS[name][0](data / "sample_000001")
    found = find_samples(data / "data_train.txt", "skip", alone)
    assert [sample.name for sample in found.samples] == ["sample_000000", "sample_000002"]
    assert [defect.sample for defect in found.skipped] == ["sample_000001"]


def test_a_list_file_from_windows_is_understood(data: Path, alone: World) -> None:
    lines = (data / "data_train.txt").read_text()
    (data / "data_train.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", " \r\n").encode())
    assert [sample.name for sample in find_samples(data / "data_train.txt", "error", alone).samples] == lines.split()


def test_skip_with_no_good_sample_left_is_an_error(data: Path, alone: World) -> None:
    (data / "data_train.txt").write_text("gone\naway\n")
    with pytest.raises(AgreedError, match="2 bad samples"):
        find_samples(data / "data_train.txt", "skip", alone)


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("\n \n", "it names no sample"),
                                               (b"\xff\xfe\x00", "not a text file")])
def test_a_list_file_that_is_none(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JobError, match=said) as caught:
        read_list(path)
    assert str(path) in str(caught.value)


def test_lines_are_absolute_or_relative_to_the_list_or_to_here(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("lists/a b", "here/쥐", "far/c", "here/a b"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    listing = tmp_path / "lists" / "list.txt"
    listing.write_text(f"a b\n\n쥐\n{tmp_path}/far/c\n", encoding="utf-8")
    found, said = read_list(listing)
    assert [directory for _, directory in found] == [
        tmp_path / "lists/a b", tmp_path / "here/쥐", tmp_path / "far/c"]
    assert said == "1 relative to the list file, 1 relative to the current directory, 1 absolute"


def test_images_may_lie_straight_in_the_sample(data: Path) -> None:
    sample = data / "sample_000001"
    for image in (sample / "images").iterdir():
        image.rename(sample / image.name)
    assert read_sample("s", sample).frames[2].image == sample / "cam_002.png"


def test_it_is_composited_before_it_is_resized(data: Path) -> None:
    sample = data / "sample_000001"
    half = np.zeros((16, 16, 4), np.uint8)
    half[:, :7] = (200, 100, 50, 255)  # an edge inside a 2 px cell; RGB is 0 where alpha is 0
    for image in (sample / "images").iterdir():
        Image.fromarray(half, "RGBA").save(image)
    pixels = read_pixels(read_sample("s", sample), 8, WHITE)
    assert pixels.shape == (6, 4, 8, 8) and pixels.dtype == torch.uint8
    red = pixels[0, 0, 4].tolist()
    assert red[0] == 200 and red[7] == 255
    assert min(red) >= 195  # never darker than the object: black from outside did not leak in
    assert pixels[0, 3, 4, 0] == 255 and pixels[0, 3, 4, 7] == 0


def test_intrinsics_follow_the_resize_and_cameras_are_inverted(data: Path) -> None:
    sample = read_sample("s", data / "sample_000001")
    rig = mv6(16)
    assert torch.allclose(sample.fxfycxcy(8), rig.fxfycxcy / 2)
    assert torch.allclose(sample.c2w(), rig.c2w, atol=1e-5)


def test_the_rig_is_recognised_whatever_the_resolution(data: Path, shared: Path) -> None:
    def rig(path: Path) -> str:
        return next(iter(rigs_of([read_sample("s", path)])))

    assert rig(data / "sample_000001") == mv6(512).fingerprint
    assert rig(shared / "data/mouse_mvrig/sample_000000") == mv6(512).fingerprint
    assert rig(shared / "data/mouse_orbit32/sample_000000") == orbit32(512).fingerprint
    assert rig(shared / "data/mouse_lab/sample_000000") not in (mv6(512).fingerprint, orbit32(512).fingerprint)


def test_every_shared_data_set_is_sound(shared: Path, alone: World) -> None:
    for name in ("mouse_lab", "mouse_orbit32", "human_orbit32", "human_mvrig"):
        assert find_samples(shared / "data" / name / "data_train.txt", "error", alone).samples, name


def choose(step: int, index: int, inputs: int = 5, seed: int = 0, views: int = 6) -> list[int]:
    rig = mv6(16) if views == 6 else orbit32(16)
    return ViewChoice(inputs, "heldout", False).choose(seed, Draw(step, index), rig.c2w)


def test_views_are_a_function_of_seed_step_and_sample() -> None:
    assert choose(3, 4) == choose(3, 4)
    different = {tuple(choose(step, index, seed=seed)) for step in (3, 4) for index in (4, 5) for seed in (0, 1)}
    assert len(different) > 1


def test_inputs_are_drawn_without_replacement_and_any_view_is_held_out_equally_often() -> None:
    draws = [choose(step, index) for step in range(100) for index in range(12)]
    assert all(sorted(views) == [0, 1, 2, 3, 4, 5] for views in draws)
    counts = Counter(views[-1] for views in draws)
    assert set(counts) == set(range(6))
    assert all(150 <= count <= 250 for count in counts.values()), counts


def test_overlap_takes_only_views_near_an_input() -> None:
    c2w = orbit32(16).c2w
    choice = ViewChoice(2, "all", True)
    for step in range(20):
        views = choice.choose(0, Draw(step, 0), c2w)
        forward = c2w[:, :3, 2]
        cosines = (forward[views[2:]] @ forward[views[:2]].T).amax(1)
        assert len(views) > 2 and bool((cosines >= 0.5 - 1e-5).all())


@pytest.mark.parametrize(("inputs", "targets", "said"), [
    (6, "heldout", "all 6 views would be inputs"), (7, "all", "have only 6 views")])
def test_impossible_choices_of_views_are_config_errors(inputs: int, targets: str, said: str) -> None:
    with pytest.raises(JobError, match=said):
        ViewChoice(inputs, targets, False).check(6)  # type: ignore[arg-type]
    ViewChoice(6, "all", False).check(6)


def test_a_batch_puts_the_inputs_first(data: Path, alone: World) -> None:
    samples = find_samples(data / "data_train.txt", "error", alone).samples
    source = MultiView(samples, 16, WHITE, ViewChoice(5, "heldout", False), 0, 1)
    batch = source.batch([Draw(2, 0), Draw(2, 2)])
    assert batch.images.shape == (2, 6, 3, 16, 16) and batch.masks.shape == (2, 6, 1, 16, 16)
    assert batch.names == ["sample_000000", "sample_000002"]
    view = int(batch.views[1, 5])
    assert torch.equal(batch.pixels[1, 5], source.views(2).pixels[view])
    assert torch.equal(batch.c2w[1, 5], samples[2].c2w()[view])


def test_fewer_samples_are_spread_over_the_list() -> None:
    found = Found(list(range(10)), [], "relative")  # type: ignore[arg-type]
    assert found.at_most(4).samples == [0, 2, 5, 7]
    assert found.at_most(None) is found and found.at_most(10) is found
