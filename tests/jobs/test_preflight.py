"""What is found before the ranks of a run start, without loading torch; and with it, where that was asked for."""
from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.yaml12 import dump
from jobs import preflight, preflight_env
from configs.face_voice import Source
from jobs.data import identities, sounds, toy
from jobs.preflight import Found, look
from jobs.preflight_data import look_at_clips, look_at_people
from jobs.runtime import JobError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "toy"
    toy.make(out, samples=3, val=1, size=16, seed=0)
    return out


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Callable[..., Path]:
    """run(a=…) -> a phase 3 run file with these keys of `training`, over three toy samples."""
    shutil.copytree(made, tmp_path / "toy")

    def write(**training: object) -> Path:
        data = {"training": {"dataset": {"path": str(tmp_path / "toy/data_train.txt")},
                             "validation": {"path": str(tmp_path / "toy/data_val.txt")}, "max_steps": 40,
                             "schedule": {"warmup": 2}, **training},
                "model": {"d": 32, "d_head": 16, "n_layer": 1, "patch_size": 4, "image_size": 16}}
        (tmp_path / "run.yaml").write_text(dump(data))
        return tmp_path / "run.yaml"

    return write


def only(found: list[Found]) -> Found:
    [one] = found
    return one


def test_a_sound_run_costs_no_torch_and_half_a_second(run: Callable[..., Path]) -> None:
    code = ("import sys, json\nfrom pathlib import Path\nfrom jobs.preflight import look\n"
            "report = look('phase3', Path(sys.argv[1]))\n"
            "print(json.dumps([len(report.found), 'torch' in sys.modules, report.seconds]))")
    done = subprocess.run([sys.executable, "-c", code, str(run())], cwd=ROOT, capture_output=True, text=True, timeout=60)
    found, torch, seconds = json.loads(done.stdout)
    assert (found, torch) == (0, False) and seconds < 2, done


def missing_picture(sample: Path) -> str:
    next(sample.glob("**/*.png")).unlink()
    return "No such file"


def truncated_picture(sample: Path) -> str:
    picture = next(sample.glob("**/*.png"))
    picture.write_bytes(picture.read_bytes()[:60])
    return picture.name


def git_lfs(sample: Path) -> str:
    next(sample.glob("**/*.png")).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return "git lfs pull"


def no_cameras(sample: Path) -> str:
    (sample / "opencv_cameras.json").unlink()
    return "opencv_cameras.json"


def cameras_without_frames(sample: Path) -> str:
    (sample / "opencv_cameras.json").write_text('{"id": 1}')
    return "cannot be understood"


HARMS = [missing_picture, truncated_picture, git_lfs, no_cameras, cameras_without_frames]


@pytest.mark.parametrize(("harm", "imports"), [*((harm, False) for harm in HARMS), (truncated_picture, True)])
def test_a_bad_sample_is_named(run: Callable[..., Path], tmp_path: Path, harm: Callable[[Path], str],
                               imports: bool) -> None:
    names = (tmp_path / "toy/data_train.txt").read_text().split() if (config := run()) else []
    said = harm(tmp_path / "toy" / names[-1])
    one = only(look("phase3", config, imports=imports).found)
    assert (one.check, one.severity, one.where) == ("samples", "error", "training.dataset.path")
    assert names[-1] in one.what and one.fix and (imports or said in one.what)


def test_where_bad_samples_are_skipped_one_is_a_warning(run: Callable[..., Path], tmp_path: Path) -> None:
    train = tmp_path / "toy/data_train.txt"
    train.write_text(train.read_text() + "nowhere\n")
    config = run(dataset={"path": str(train), "on_bad": "skip"})
    assert only(look("phase3", config).found).severity == "warning"


def test_a_warm_up_longer_than_the_run(run: Callable[..., Path]) -> None:
    one = only(look("phase3", run(schedule={"warmup": 40})).found)
    assert (one.check, one.severity) == ("updates", "warning") and "40 updates" in one.what


def test_a_checkpoint_beyond_the_end(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"progress": {"step": 41}}')
    one = only(look("phase3", run(), resume=tmp_path).found)
    assert one.check == "resume" and "at step 41 and the run ends at step 40" in one.what
    (tmp_path / "state.json").write_text('{"progress": {"step": 40}}')  # its last evaluation may be missing
    assert look("phase3", run(), resume=tmp_path).found == []
    gone = only(look("phase3", run(), resume=tmp_path / "none", imports=True).found)  # told once
    assert gone.check == "resume" and "No such file" in gone.what


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training: 3\n")
    assert only(look("phase3", tmp_path / "run.yaml").found).check == "config"


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    one = only(list(preflight_env.missing_packages(("json", "no_such_package"))))
    assert "no_such_package" in one.what and "pip install no_such_package" in one.fix
    assert list(preflight_env.torchvision(load=True)) == []  # there is none here, and that is well
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch (==2.1.0)"])
    assert "torchvision was built for torch 2.1.0" in only(list(preflight_env.torchvision(load=False))).what
    monkeypatch.setattr(preflight_env, "_version", lambda name: "2.1.0+cu121")
    assert list(preflight_env.torchvision(load=False)) == []
    assert "cannot be imported" in only(list(preflight_env.torchvision(load=True))).what


def test_a_module_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seconds: dict[str, float] = {}
    one = only(list(preflight_env.load(("json", "broken_one", "never_reached"), seconds)))
    assert "nms does not exist" in one.what and list(seconds) == ["json"]


def test_torch_and_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight_env, "_cuda_of_torch", lambda: None)
    assert "built for the CPU" in only(list(preflight_env.cuda(1, False))).what
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    monkeypatch.setattr(preflight_env, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(preflight_env, "_cuda_of_torch", lambda: 12)
    assert "needs driver 525 or newer; here is 470" in only(list(preflight_env.cuda(1, False))).what
    monkeypatch.setattr(preflight_env, "_cuda_of_torch", lambda: 11)
    assert list(preflight_env.cuda(1, False)) == []


@pytest.mark.parametrize(("built", "capability", "runs"), [
    (["sm_80", "sm_90"], (9, 0), True), (["sm_80"], (8, 6), True), (["sm_86"], (8, 0), False),
    (["sm_80"], (9, 0), False), (["sm_80", "compute_80"], (12, 0), True), (["sm_90a", "sm_120"], (12, 0), True)])
def test_which_kernels_serve_which_gpu(built: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert preflight_env.runs_on(built, *capability) is runs


def test_clips(tmp_path: Path) -> None:
    sounds.make(tmp_path / "set", {"train": 2, "val": 1}, 16, 8000, 0.2, 0)
    assert look_at_clips(tmp_path / "set") == []
    rows = json.loads((tmp_path / "set/train_metadata.json").read_bytes())
    (tmp_path / "set" / rows[1]["audio_path"]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "set" / rows[0]["image_path"]).unlink()
    picture, sound = look_at_clips(tmp_path / "set")
    assert rows[0]["image_path"] in picture.what and "git lfs pull" in sound.what
    with pytest.raises(JobError, match="train_metadata.json"):
        look_at_clips(tmp_path)


def test_people(tmp_path: Path) -> None:
    identities.make(tmp_path, 4, 2, 16, 8000, 0)
    assert look_at_people(Source(voxceleb=str(tmp_path))) == []
    face = sorted(tmp_path.glob("*/faces/*"))[0]
    face.write_bytes(b"nothing")
    [defect] = look_at_people(Source(voxceleb=str(tmp_path)))
    assert str(face) in defect.what


def test_by_hand(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["preflight", "phase3", str(run())])
    assert preflight.main() == 0 and "0 findings" in capsys.readouterr().out
    (tmp_path / "toy/data_val.txt").write_text("\n")
    monkeypatch.setattr(sys, "argv", ["preflight", "phase3", str(run()), "--json"])
    assert preflight.main() == 1
    assert "names no sample" in json.loads(capsys.readouterr().out)["found"][0]["what"]
