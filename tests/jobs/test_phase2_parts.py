"""The parts of phase 2: the generator and what it refuses, alpha, and the quality gate."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.load import load_run, load_stage
from configs.phase2 import Generator, Phase2Run, Quality
from jobs.data.toy import make_mouse, render_rgba
from jobs.matting import rgba_of
from jobs.mv_components import PROMPTS
from jobs.mv_generator import Interrupted, ViewGenerator, load_generator
from jobs.quality import judge
from jobs.runtime import AgreedError
from jobs.world import World
from models.cameras import Rig, mv6
from models.mv_unet import load_unet
from tests.jobs.small_chain import make_generator, sign

WHITE = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_generator(tmp_path_factory.mktemp("phase1") / "step-00000008-a000")


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def load(folder: Path, **how: Any) -> ViewGenerator:
    config = msgspec.convert({"checkpoint": str(folder), "steps": 2, "precision": "fp32", **how}, Generator)
    return load_generator(config, World(0, 1, torch.device("cpu")))


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


# --- the generator ----------------------------------------------------------------------------------------------------

def test_what_an_object_gets_does_not_depend_on_its_batch(checkpoint: Path) -> None:
    generator = load(checkpoint)
    three = generator.views(pictures(3), [7, 8, 9])
    for index, seed in enumerate([7, 8, 9]):
        alone = generator.views(pictures(3)[index:index + 1], [seed])[0]
        assert (three[index] - alone).abs().max() < 1e-4
    assert not torch.allclose(generator.views(pictures(1), [8])[0], three[0], atol=1e-2)


def test_the_averaged_weights_are_taken_and_nothing_in_their_place(checkpoint: Path, copied: Path) -> None:
    average = load_unet(checkpoint / "unet_ema").state_dict()
    assert all(torch.equal(average[name], tensor) for name, tensor in load(checkpoint).pipeline.unet.state_dict().items())
    assert not torch.equal(load(checkpoint, weights="unet").pipeline.unet.conv_in.weight, average["conv_in.weight"])
    shutil.rmtree(copied / "unet_ema")
    with pytest.raises(AgreedError, match=r"has no unet_ema/: weights = ema is not in it"):
        load(copied)


def test_views_come_in_the_order_of_the_rig(checkpoint: Path, tmp_path: Path) -> None:
    """A generator trained with view 2 put in has it in its first slot."""
    other = load(make_generator(tmp_path / "step-00000008-a000", reference=2))
    first = load(checkpoint)
    assert other.reference == 2 and other.order.tolist() == [2, 0, 1, 3, 4, 5]
    assert torch.equal(other.prompts, first.prompts[other.order])
    own = replace(first, prompts=first.prompts[other.order])  # the same slots, read as if they were the rig's order
    slotted = own.views(pictures(1), [3])[0]
    assert torch.equal(other.views(pictures(1), [3])[0][other.order], slotted)


def test_it_gives_up_within_a_step_when_asked_to_stop(checkpoint: Path) -> None:
    generator, calls = load(checkpoint, steps=20), []
    generator.stop_when(lambda: calls.append(1) is None and len(calls) > 3)
    with pytest.raises(Interrupted):
        generator.views(pictures(1), [0])
    assert len(calls) == 4


def edit(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    path = folder / name
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    sign(folder, 8)


def test_a_rig_that_disagrees_is_refused_with_both_sides(copied: Path) -> None:
    with pytest.raises(AgreedError, match=r"the checkpoint has mv6: 6 views.*generator\.rig has orbit32: 32 views"):
        load(copied, rig="orbit32")
    edit(copied, "mvdiffusion.json", lambda about: about.update(rig="ab" * 32))
    with pytest.raises(AgreedError, match=r"has the rig 29527fe7f191.*says it was trained on abababababab"):
        load(copied)


def test_cameras_that_were_edited_are_refused(copied: Path) -> None:
    edit(copied, "opencv_cameras.json", lambda raw: raw["frames"][1]["w2c"][2].__setitem__(3, 3.5))
    with pytest.raises(AgreedError, match="not those of the rig it carries: view front_right"):
        load(copied)


def test_a_public_folder_must_be_told_its_rig(copied: Path) -> None:
    for name in ("opencv_cameras.json", "mvdiffusion.json", "manifest.json"):
        (copied / name).unlink()
    with pytest.raises(AgreedError, match="does not say which rig it was trained on.*\n.*generator.rig: mv6"):
        load(copied)
    found = load(copied, rig="mv6")
    assert found.rig.fingerprint == mv6(16).fingerprint and found.size == 16
    with pytest.raises(AgreedError, match="its UNet makes 6 views, its rig has 32"):
        load(copied, rig="orbit32")


def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(copied: Path) -> None:
    with pytest.raises(AgreedError, match="there is no folder"):
        load(copied.with_name("gone"))
    with open(copied / "unet_ema" / "diffusion_pytorch_model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(AgreedError, match="does not verify.*unet_ema"):
        load(copied)


def test_prompts_of_another_text_encoder_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(torch.zeros(6, 77, 768), tmp_path / PROMPTS)
    with pytest.raises(AgreedError, match="768 wide, the UNet's cross-attention takes 16: made with the wrong text encoder"):
        load(checkpoint, prompt_embeds=str(tmp_path / PROMPTS))


# --- alpha ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mouse() -> Tensor:
    """uint8 [6, 64, 64, 4] straight, of the mv6 rig."""
    return torch.from_numpy(render_rgba(make_mouse(torch.Generator().manual_seed(2)), mv6(64)))


def on_white(rgba: Tensor) -> Tensor:
    unit = rgba.permute(0, 3, 1, 2).float() / 255
    return unit[:, :3] * unit[:, 3:] + 1 - unit[:, 3:]


def test_alpha_is_found_again_and_the_picture_stays(mouse: Tensor) -> None:
    views = on_white(mouse)
    found = rgba_of(views, WHITE, 0.04, 0.12)
    inside, outside = mouse[..., 3] > 250, mouse[..., 3] == 0
    assert (found[..., 3][inside] == 255).float().mean() > 0.999 and found[..., 3][outside].max() == 0
    assert found[..., :3][found[..., 3] == 0].max() == 0
    assert (on_white(found) - views).abs().max() < 0.13 and (on_white(found) - views).square().mean() < 1e-4


@pytest.mark.parametrize("background", [WHITE, (0.0, 0.0, 0.0), (0.2, 0.6, 0.4)])
def test_what_the_object_encloses_is_the_object(background: tuple[float, float, float]) -> None:
    behind = torch.tensor(background).view(1, 3, 1, 1)
    views = behind.expand(1, 3, 20, 20).clone()
    views[..., 5:15, 5:15] = 0.9 - behind * 0.8
    views[..., 8:12, 8:12] = behind[0]  # fur of the background's colour
    alpha = rgba_of(views, background, 0.04, 0.12)[0, ..., 3]
    assert (alpha[5:15, 5:15] == 255).all() and alpha.sum() == 100 * 255


# --- the gate ---------------------------------------------------------------------------------------------------------

def kinds(rgba: Tensor, views: Tensor | None = None, rig: Rig | None = None) -> list[str]:
    verdict = judge(on_white(rgba) if views is None else views, rgba, rig or mv6(64), Quality())
    return [kind for kind, _ in verdict.reasons]


def test_a_good_sample_passes(mouse: Tensor) -> None:
    verdict = judge(on_white(mouse), mouse, mv6(64), Quality())
    assert verdict.reasons == () and min(verdict.explained) > 0.99


def test_shuffled_views_fail_by_their_silhouettes(mouse: Tensor) -> None:
    assert kinds(mouse[[2, 1, 0, 3, 4, 5]]) == ["silhouettes"]


def test_a_view_without_object_fails_by_its_alpha(mouse: Tensor) -> None:
    empty = mouse.clone()
    empty[3] = 0
    assert kinds(empty) == ["alpha"]
    full = mouse.clone()
    full[3] = 255
    assert kinds(full)[0] == "alpha"


def test_views_that_are_alike_fail(mouse: Tensor) -> None:
    assert "views alike" in kinds(mouse[[0, 0, 2, 3, 4, 5]])
    assert kinds(mouse[[0, 0, 0, 0, 0, 0]])[0] == "views alike"


def test_values_that_are_not_finite_fail(mouse: Tensor) -> None:
    views = on_white(mouse)
    views[2, 0, 5, 5] = float("nan")
    assert kinds(mouse, views) == ["not finite"]


# --- run files --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["demo", "mouse", "mouse_test"])
def test_a_run_file_is_whole(name: str) -> None:
    run = load_run(load_stage("phase2", Path.cwd()), name, ["generator.checkpoint=${phase1.checkpoints.best}"], Path.cwd())
    assert run.path_keys == ("sources.path",)


def test_test_mode_shortens_what_is_asked_for() -> None:
    def typed(*sets: str) -> Phase2Run:
        run = load_run(load_stage("phase2", Path.cwd()), "mouse", list(sets), Path.cwd()).typed
        assert isinstance(run, Phase2Run)
        return run

    assert (typed().sources.limit, typed().generator.steps) == (None, 50)
    short, own = typed("mode=test"), typed("mode=test", "sources.limit=5", "generator.steps=3")
    assert (short.sources.limit, short.generator.steps) == (600, 25)
    assert (own.sources.limit, own.generator.steps) == (5, 3)


@pytest.mark.parametrize(("change", "said"), [
    ("matte.low=0.5", "must be above low"), ("val_share=1", "both lists need samples"), ("generator.stepz=1", "stepz")])
def test_a_mistake_in_a_run_file_is_told(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_run(load_stage("phase2", Path.cwd()), "demo", [change], Path.cwd())
