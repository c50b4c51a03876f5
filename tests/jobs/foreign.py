"""Programs that know nothing of launch, as labs have them: what they say is a line per step. Numbers only, no torch."""
from __future__ import annotations

# Fits a line by gradient descent. LR is an expression of `step` and STEPS; AT is done before each step.
FITS = """
import math, random, resource, sys
draw = random.Random(0)
STEPS, weight, kept = 60, 0.0, []
for step in range(1, STEPS + 1):
    AT
    rate = LR
    x = draw.uniform(-1, 1)
    error = weight * x - 3 * x - draw.gauss(0, 0.1)
    weight -= rate * 2 * error * x
    print(f"step {step}/{STEPS} loss {error * error:.6f} lr {rate:.4e}", flush=True)
"""


def fits(rate: str = "0.1", at: str = "pass") -> str:
    return FITS.replace("LR", rate).replace("AT", at)


WARM = "training:\n  lr: 0.1\n  warmup: 10\n  decay: cosine\n"
NEVER_STEPPED = fits()
STEPPED_FOR_TWICE = fits("0.1 * min(step / 10, 0.5 + 0.5 * math.cos(math.pi * step / (2 * STEPS)))")
AS_PLANNED = fits("0.1 * min(step / 10, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))")
A_KEY_IS_MISSING = fits(at="{'x': 1}['y'] if step == 40 else None")
# Keeps the history of its losses with everything that hangs on them, below a limit as a scheduler sets it.
KEEPS_ALL = fits(at="resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)); kept.append(bytearray(20 << 20))")

# Twenty noisy samples, twenty random features: with enough steps every sample is known by heart.
BY_HEART = """
import numpy as np
draw = np.random.default_rng(0)
basis = draw.normal(size=(8, 20))


def samples(count):
    inputs = draw.normal(size=(count, 8))
    return np.tanh(inputs @ basis), inputs[:, 0] + 0.5 * draw.normal(size=count)


(x, y), (x_val, y_val) = samples(20), samples(200)
weights = np.zeros(20)
for step in range(1, 20001):
    error = x @ weights - y
    weights -= 0.01 * x.T @ error
    if step % 1000 == 0 or step in (20, 50, 100, 200, 500):
        validation = np.mean((x_val @ weights - y_val) ** 2)
        print(f"step {step}/20000 loss {np.mean(error ** 2):.6f} validation {validation:.6f}", flush=True)
"""

# Goes on from its own checkpoint, however far that is.
GOES_ON = """
from pathlib import Path
saved = Path("saved")
first = int(saved.read_text()) if saved.exists() else 0
print(f"starting at {first}", flush=True)
for step in range(first + 1, 31):
    print(f"step {step}/30 loss {1 / step:.4f}", flush=True)
    saved.write_text(str(step))
print("finished", flush=True)
"""
