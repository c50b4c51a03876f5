"""A film of a scene turning once: mp4 by the ffmpeg on the PATH, else a GIF."""
from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from configs.reconstruct import Turntable
from jobs.reconstructor import rendered
from models.cameras import turntable
from models.gaussians import Gaussians

NAME = "turntable"
_ENCODER_S = 600.0


def save_turntable(gaussians: Gaussians, config: Turntable, size: int, background: tuple[float, float, float],
                   directory: Path) -> tuple[Path, str]:
    """Render and write it; the file, and why it is no mp4 if it is none."""
    c2w, fxfycxcy = turntable(config.frames, size, size, config.elevation_deg)
    frames = list(_frames(gaussians, c2w, fxfycxcy, size, background))
    encoder = shutil.which("ffmpeg")
    why = "no ffmpeg on the PATH"
    if encoder:
        path = directory / f"{NAME}.mp4"
        why = _encode(encoder, frames, config.fps, path)
        if not why:
            return path, ""
        path.unlink(missing_ok=True)
    path = directory / f"{NAME}.gif"
    pictures = [Image.fromarray(frame) for frame in frames]
    step_ms = max(20, round(100 / config.fps) * 10)  # GIF counts in hundredths of a second; viewers slow down below 2
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=step_ms, loop=0)
    return path, why


def _frames(gaussians: Gaussians, c2w: object, fxfycxcy: object, size: int,
            background: tuple[float, float, float]) -> Iterator[np.ndarray]:
    """uint8 [size, size, 3] each."""
    for pose, pinhole in zip(c2w, fxfycxcy):  # type: ignore[call-overload]
        picture = rendered(gaussians, pose[None], pinhole[None], size, background)[0]
        yield (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _encode(encoder: str, frames: list[np.ndarray], fps: float, path: Path) -> str:
    """H.264; what went wrong, or nothing. Players want even sides."""
    height, width = frames[0].shape[:2]
    argv = [encoder, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
            "-r", f"{fps:g}", "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-c:v", "libx264",
            "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    try:
        done = subprocess.run(argv, input=b"".join(frame.tobytes() for frame in frames), capture_output=True,
                              timeout=_ENCODER_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{encoder}: {error}"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return "" if done.returncode == 0 else f"{encoder}: {said[-1] if said else f'exit code {done.returncode}'}"
