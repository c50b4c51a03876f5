"""One picture through both checkpoints: what is left, what it is compared with, and what is refused."""
from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cluster.contract import RunDir, read_json_lines
from configs.errors import ConfigError
from configs.load import load_run, load_stage
from configs.phase2 import Generator
from configs.phase3 import Phase3Run
from configs.reconstruct import Fit, ReconstructRun, Reconstructor, Turntable
from jobs import reconstruct
from jobs.data.multiview import read_pixels
from jobs.data.samples import read_sample
from jobs.data.toy import make_mouse, render_rgba, write_sample
from jobs.fitting import fitted
from jobs.mv_generator import load_generator
from jobs.reconstructor import load_reconstructor, rendered
from jobs.runtime import JobError, StopFlag
from jobs.turntable import save_turntable
from jobs.world import World
from models.cameras import mv6, orbit
from models.gaussians import load_ply
from tests.jobs.small_chain import make_generator, make_reconstructor

WHITE = (1.0, 1.0, 1.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """phase1/, phase3/, and sample/: an object's true views."""
    root = tmp_path_factory.mktemp("chain")
    make_generator(root / "phase1")
    make_reconstructor(root / "phase3", mv6(16).fingerprint)
    write_sample(root / "sample", make_mouse(torch.Generator().manual_seed(3)), mv6(32))
    return root


def config_of(chain: Path, **changes: Any) -> dict[str, Any]:
    return {"input_image": str(chain / "sample/images/cam_000.png"),
            "generator": {"checkpoint": str(chain / "phase1"), "steps": 2, "guidance": 1, "precision": "fp32"},
            "reconstructor": {"checkpoint": str(chain / "phase3"), "precision": "fp32"},
            "turntable": {"frames": 3, "fps": 10}, **changes}


def run_here(run: Path, config: dict[str, Any], stop: StopFlag | None = None) -> RunDir:
    given = argparse.Namespace(run_dir=str(run), resume=None)
    reconstruct._reconstruct(msgspec.convert(config, ReconstructRun), given, World(0, 1, CPU), stop or StopFlag())
    return RunDir(run)


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


# --- what it leaves ---------------------------------------------------------------------------------------------------

def test_views_gaussians_renders_turntable_and_metrics(
        chain: Path, tmp_path: Path, no_encoder: None, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.txt").write_text(f"{chain / 'sample'}\n")
    run = run_here(tmp_path / "run", config_of(chain, truth=str(chain / "sample"), mean_of=str(tmp_path / "train.txt")))
    names = [f"{number:02d}_{name}.png" for number, name in enumerate(mv6(16).names)]
    for folder in ("views", "renders"):
        assert sorted(path.name for path in (run.artifacts / folder).iterdir()) == names
    scene = load_ply(run.artifacts / "gaussians.ply")
    assert scene.means.shape == (1, 2 + 6 * 16 * 16, 3)
    front = Image.open(run.artifacts / "renders" / names[0])
    again = rendered(scene, mv6(16).c2w[:1], mv6(16).fxfycxcy[:1], 16, WHITE)[0]
    assert np.abs(np.asarray(front).astype(float) / 255 - again.permute(1, 2, 0).numpy()).max() < 0.02
    with Image.open(run.artifacts / "turntable.gif") as film:
        assert (film.n_frames, film.size, film.info["duration"]) == (3, (16, 16), 100)
    found = json.loads((run.artifacts / "metrics.json").read_bytes())
    assert found["views"] == 5 and set(found["psnr"]) == {"chain", "generated", "copy", "white", "untrained", "mean"}
    assert found["psnr"]["mean"] > 40  # of this very sample
    assert [bar["beaten"] for bar in found["bars"]] == [bar["psnr"] > bar["bar"] for bar in found["bars"]]
    lines = list(read_json_lines(run.attempt(0).metrics))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4] and lines[-1]["event"] == "done"
    assert lines[3]["val/psnr_chain"] == found["psnr"]["chain"]
    assert "above the white picture" in capsys.readouterr().out


def test_it_is_compared_over_the_views_that_were_not_put_in() -> None:
    truth = torch.full((6, 3, 16, 16), 0.5)
    guess = truth + 0.1
    guess[2] = 0.0  # the view that was put in
    guesses = {"chain": guess, "copy": truth + 0.2, "white": torch.ones_like(truth), "untrained": truth + 0.05}
    found = reconstruct.compared(truth, 2, guesses)
    assert found["views"] == 5 and found["psnr"]["chain"] == pytest.approx(20, abs=1e-3)
    assert found["psnr"]["copy"] == pytest.approx(-20 * math.log10(0.2), abs=1e-3)
    assert [bar["beaten"] for bar in found["bars"]] == [True, True, False]


def test_without_the_truth_there_are_no_metrics(chain: Path, tmp_path: Path) -> None:
    run = run_here(tmp_path / "run", config_of(chain, turntable={"frames": 0}))
    assert sorted(path.name for path in run.artifacts.iterdir()) == ["gaussians.ply", "input.png", "renders", "views"]


def test_the_averaged_weights_are_taken(chain: Path, tmp_path: Path) -> None:
    run = run_here(tmp_path / "run", config_of(chain, turntable={"frames": 0}))
    how = msgspec.convert(config_of(chain)["generator"], Generator)
    generator = load_generator(how, World(0, 1, CPU))
    picture, _ = fitted(chain / "sample/images/cam_000.png", 16, WHITE, Fit())
    expected = generator.views(picture[None], [0])[0, 3]
    shown = np.asarray(Image.open(run.artifacts / "views/03_back.png")).astype(float) / 255
    assert np.abs(shown - expected.permute(1, 2, 0).numpy()).max() < 0.01


def test_asked_to_stop_it_ends_and_says_so(chain: Path, tmp_path: Path) -> None:
    stop = StopFlag()
    stop.asked = True
    run = run_here(tmp_path / "run", config_of(chain), stop)
    assert [line["event"] for line in read_json_lines(run.attempt(0).metrics)] == ["stopped"]


def test_an_encoder_on_the_path_makes_an_mp4(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is told size and rate, and gets every frame; one that fails leaves a GIF, and why."""
    fake = tmp_path / "bin" / "ffmpeg"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" > "$0.args"\nfor last; do :; done\ncat > "$last"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    model = load_reconstructor(Reconstructor(checkpoint=str(chain / "phase3"), precision="fp32"), CPU)
    scene = model.gaussians(torch.rand(6, 3, 16, 16), mv6(16))
    config = msgspec.convert({"frames": 4, "fps": 15}, Turntable)
    path, why = save_turntable(scene, config, 8, WHITE, tmp_path)
    assert path.name == "turntable.mp4" and why == "" and path.stat().st_size == 4 * 8 * 8 * 3
    assert "-s 8x8 -r 15" in Path(f"{fake}.args").read_text()
    fake.write_text('#!/bin/sh\ncat > /dev/null\necho "Unknown encoder libx264" >&2\nexit 1\n')
    path, why = save_turntable(scene, config, 8, WHITE, tmp_path)
    assert path.name == "turntable.gif" and why.endswith("Unknown encoder libx264")
    assert not (tmp_path / "turntable.mp4").exists()


# --- what is refused --------------------------------------------------------------------------------------------------

def test_checkpoints_of_different_rigs_are_refused_with_both(chain: Path, tmp_path: Path) -> None:
    other = make_reconstructor(tmp_path / "phase3", "cd" * 32)
    config = config_of(chain, reconstructor={"checkpoint": str(other)})
    with pytest.raises(JobError, match=r"makes mv6: 6 views.*29527fe7f191.*trained on some rig \(cdcdcdcdcdcd\)"):
        run_here(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_truth_of_another_rig_is_refused_with_both(chain: Path, tmp_path: Path) -> None:
    lab = replace(mv6(16), c2w=orbit([-90, -140, 170, 80, 10, -50], 20.0, 3.1).float())
    write_sample(tmp_path / "lab", make_mouse(torch.Generator().manual_seed(0)), lab)
    with pytest.raises(JobError, match=r"truth: .*the generator has mv6.*has 6 views .*distance 3.10"):
        run_here(tmp_path / "run", config_of(chain, truth=str(tmp_path / "lab")))


def test_the_sizes_come_from_the_checkpoint_its_run_or_the_run_file(chain: Path, tmp_path: Path) -> None:
    sizes = json.loads((chain / "phase3/gslrm.json").read_bytes())["model"]
    silent = make_reconstructor(tmp_path / "run/checkpoints/step-00000008-a000", mv6(16).fingerprint, about=False)
    with pytest.raises(JobError, match="does not say the sizes of its network"):
        load_reconstructor(Reconstructor(checkpoint=str(silent)), CPU)
    given = msgspec.convert({"checkpoint": str(silent), "model": sizes}, Reconstructor)
    assert load_reconstructor(given, CPU).model.config.scale_bias == -2.5
    paths = {"dataset": {"path": "a"}, "validation": {"path": "b"}, "max_steps": 8}
    run = msgspec.convert({"training": paths, "model": sizes}, Phase3Run)
    (tmp_path / "run/config.yaml").write_bytes(msgspec.json.encode(run))
    found = load_reconstructor(Reconstructor(checkpoint=str(silent)), CPU)
    assert found.model.config.scale_bias == -2.5 and found.size == 16


def test_a_public_file_and_one_that_does_not_fit(chain: Path, tmp_path: Path) -> None:
    whole = load_reconstructor(Reconstructor(checkpoint=str(chain / "phase3")), CPU)
    torch.save({"model": {f"module.{name}": tensor for name, tensor in whole.model.state_dict().items()}},
               tmp_path / "ckpt_0000000000000008.pt")
    sizes = json.loads((chain / "phase3/gslrm.json").read_bytes())["model"]
    given = {"checkpoint": str(tmp_path / "ckpt_0000000000000008.pt"), "model": sizes}
    found = load_reconstructor(msgspec.convert(given, Reconstructor), CPU)
    views = torch.rand(6, 3, 16, 16)
    assert found.rig == ""
    assert torch.equal(found.gaussians(views, mv6(16)).means, whole.gaussians(views, mv6(16)).means)
    with pytest.raises(JobError, match="of another shape|do not fit"):
        load_reconstructor(msgspec.convert({**given, "model": {**sizes, "d": 64}}, Reconstructor), CPU)


def test_views_of_another_size_are_resized_with_their_cameras(chain: Path) -> None:
    model = load_reconstructor(Reconstructor(checkpoint=str(chain / "phase3"), precision="fp32"), CPU)
    plain = torch.full((6, 3, 32, 32), 0.4)
    large, small = model.gaussians(plain, mv6(32)), model.gaussians(plain[..., :16, :16], mv6(16))
    assert (large.means - small.means).abs().max() < 1e-4


# --- the picture ------------------------------------------------------------------------------------------------------

def rgba(size: int = 64) -> Tensor:
    return torch.from_numpy(render_rgba(make_mouse(torch.Generator().manual_seed(4)), mv6(size))[1])


def save(path: Path, picture: Tensor) -> Path:
    Image.fromarray(picture.numpy()).save(path)
    return path


def test_a_square_picture_is_what_the_generator_was_trained_on(chain: Path) -> None:
    sample = read_sample("sample", chain / "sample")
    picture, _ = fitted(chain / "sample/images/cam_000.png", 16, WHITE, Fit())
    assert torch.equal((picture * 255).round().byte(), read_pixels(sample, 16, WHITE)[0, :3])


def test_the_silhouette_is_put_on_white_before_it_is_resized(tmp_path: Path) -> None:
    """RGB is 0 where alpha is 0: resized straight it would darken the edge."""
    picture = torch.zeros(64, 64, 4, dtype=torch.uint8)
    picture[16:48, 16:48] = 255  # a white object
    found, _ = fitted(save(tmp_path / "white.png", picture), 13, WHITE, Fit())
    assert found.min() == 1


def test_a_picture_that_is_not_square_is_cut_around_the_object(tmp_path: Path) -> None:
    picture = torch.zeros(60, 200, 4, dtype=torch.uint8)
    picture[40:60, 150:190] = torch.tensor([200, 0, 0, 255], dtype=torch.uint8)  # at the lower right edge
    found, how = fitted(save(tmp_path / "wide.png", picture), 80, WHITE, Fit(fill=0.5))
    red = found[1] < 0.5
    rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 49, 20, 59)
    assert "200 x 60 px" in how and "cut to 80 px" in how
    with pytest.raises(JobError, match="200 x 60 px, not square"):
        fitted(tmp_path / "wide.png", 80, WHITE, Fit(crop="never"))


def test_a_picture_with_its_background_is_refused(tmp_path: Path) -> None:
    mouse = rgba()
    alpha = mouse[..., 3:].float() / 255
    room, white = (((mouse[..., :3] * alpha) + back * (1 - alpha)).round().byte() for back in (120, 255))
    with pytest.raises(JobError, match="what is behind the object is not plain"):
        fitted(save(tmp_path / "room.png", room), 32, WHITE, Fit())
    fitted(tmp_path / "room.png", 32, WHITE, Fit(keep_background=True))
    cut, with_alpha = (fitted(save(tmp_path / f"{name}.png", picture), 32, WHITE, Fit(crop="always"))[0]
                       for name, picture in (("plain", white), ("alpha", mouse)))
    assert (cut - with_alpha).abs().mean() < 0.04


@pytest.mark.parametrize(("name", "said"), [("gone.png", "cannot be read"), ("empty.png", "nothing in it")])
def test_a_picture_that_says_nothing_is_refused(tmp_path: Path, name: str, said: str) -> None:
    save(tmp_path / "empty.png", torch.zeros(32, 32, 4, dtype=torch.uint8))
    with pytest.raises(JobError, match=said):
        fitted(tmp_path / name, 16, WHITE, Fit())


def test_a_picture_is_turned_the_way_its_camera_says(tmp_path: Path) -> None:
    picture = Image.fromarray(rgba(32).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    turned, upright = (fitted(tmp_path / f"{name}.png", 32, WHITE, Fit())[0] for name in ("turned", "upright"))
    assert torch.equal(turned, upright)


# --- run files --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["demo", "mouse"])
def test_a_run_file_is_whole(name: str) -> None:
    run = load_run(load_stage("reconstruct", Path.cwd()), name, ["input_image=mouse.png"], Path.cwd())
    assert "input_image" in run.set_path_keys


def test_a_mean_without_the_truth_is_refused() -> None:
    with pytest.raises(ConfigError, match="only beside `truth`"):
        load_run(load_stage("reconstruct", Path.cwd()), "mouse", ["mean_of=list.txt"], Path.cwd())
