"""CLAP2Diffusion as a stage of the shared trainer: what trains, its loss, its validation and what it leaves."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from configs.clap import Training
from jobs.clap_components import PARTS, PROJECTOR, Loaded
from jobs.clap_validation import Grid, Refused, has_learned, in_words
from jobs.data.clips import ClipBatch, Clips
from jobs.memory import Memory
from jobs.metrics import Metrics
from jobs.runtime import AgreedError
from jobs.stage import Learning, Stage
from jobs.world import World, mixed_seed
from models.audio_attention import gates, set_trained
from models.mv_conditioning import training_target

VERDICT, LORA = "validation.json", "lora"
TRAINED = {  # stage -> words in the names of what trains
    "clap1": (PROJECTOR, "processor."),
    "clap2": (PROJECTOR, "processor.", "lora_"),
    "clap3": ("processor.gate",),
}


class ClapStage(Stage):
    """Noise is predicted from a noisy picture and its sound. Every random number of a sample is a function of (seed,
    pass, sample), so ranks that share a batch draw what one rank would have drawn."""

    best_metric = "val/score"
    watches_gradients = True

    def __init__(self, name: str, training: Training, loaded: Loaded, train: Clips, grid: Grid, world: World,
                 metrics: Metrics, identity: dict[str, str], provenance: dict[str, str], attachments: Path) -> None:
        self.name, self.source, self.identity, self.provenance = name, train, identity, provenance
        self.attachments, self._metrics, self._training = attachments, metrics, training
        self._loaded, self._grid, self._device = loaded, grid, world.device
        self.modules = {PROJECTOR: loaded.projector, PARTS: loaded.parts}
        self.frozen = loaded.frozen.networks
        for module, owner in self.modules.items():
            set_trained(((f"{module}.{key}", value) for key, value in owner.named_parameters()), TRAINED[name])
            owner.train()
        if training.gradient_checkpointing:
            loaded.frozen.unet.enable_gradient_checkpointing()
        self._seen = Remembered(loaded, world)
        self._target_gate: tuple[float, float] | None = None
        self._must_listen = False
        self._found: dict[str, float] = {}

    def starts_from(self, another: bool, force: bool) -> None:
        """`another`: its weights are another stage's, which must have learned to listen, unless `force`."""
        self._must_listen = another and not force

    def ends_within(self, target_gate: tuple[float, float] | None) -> None:
        """Stage 3 is done when the mean tanh(gate) lies there."""
        self._target_gate = target_gate

    def names(self, batch: ClipBatch) -> list[str]:
        return batch.names

    def learning(self, name: str, parameter: nn.Parameter) -> Learning:
        if name.endswith(".gate"):
            return Learning(self._training.optimizer.gate_lr, 0.0)
        return super().learning(name, parameter)

    def loss(self, batch: ClipBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loaded, training = self._loaded, self._training
        conditioning, scheduler = loaded.conditioning, loaded.frozen.scheduler
        chances = [Chances(training.seed, draw.step, draw.index, loaded.latent_shape,
                           scheduler.config.num_train_timesteps) for draw in batch.draws]
        embeddings, moments = self._seen.of(batch)
        with torch.autocast(self._device.type, enabled=False):
            latents = loaded.codec.draw(moments, self._stacked([chance.spread for chance in chances]))
            noise = self._stacked([chance.noise for chance in chances])
            t = torch.tensor([chance.t for chance in chances], device=self._device)
            noisy, target = scheduler.add_noise(latents, noise, t), training_target(scheduler, latents, noise, t)
        hears = torch.tensor([float(chance.hears >= training.audio_dropout) for chance in chances],
                             device=self._device)
        texts = [clip.text if training.prompt == "text" else "" for clip in batch.clips]
        arguments = conditioning.arguments(conditioning.prompts(texts), conditioning.tokens(embeddings), hears)
        predicted = loaded.frozen.unet(noisy, t, **arguments).sample
        return (predicted.float() - target).square().mean(), {}

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(self._device)

    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        found = self._grid.evaluate(stop_asked)
        if found is None:
            return None
        if step == 0 and self._must_listen and found["val/gap_low"] <= 0:
            raise AgreedError(Refused(
                f"{self._loaded.folder} has not learned to listen: on this validation shuffled - matched is "
                f"{found['val/gap']:.5f} with a 5 % bound of {found['val/gap_low']:.5f}, not above 0",
                "train the stage before it longer, or insist: --force, or --set force=true"))
        self._found = found
        return found

    def finished(self, found: dict[str, float]) -> str | None:
        if self._target_gate is None or not self._target_gate[0] <= found["val/gate"] <= self._target_gate[1]:
            return None
        return (f"the mean tanh(gate) is {found['val/gate']:.3f}, within target_gate (a value that was wished for, no "
                "proof that it is the best)")

    def artifacts(self, directory: Path) -> None:
        """The verdict of the last validation, the gates, and the LoRA as plain diffusers reads it."""
        verdict = {"learned": has_learned(self._found), "metrics": self._found,
                   "gates": gates(self._loaded.frozen.unet)}
        (directory / VERDICT).write_text(json.dumps(verdict, indent=1))
        if self._loaded.about.lora:
            save_lora(self._loaded.frozen.unet, directory / LORA)
        for line in in_words(self._found):
            self._metrics.say(line)


def save_lora(unet: UNet2DConditionModel, directory: Path) -> None:
    """pytorch_lora_weights.safetensors, as `pipeline.load_lora_weights(directory)` of plain diffusers reads it. Rank
    and alpha stand in its metadata: without alpha the LoRA would be as strong as alpha = rank."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft import get_peft_model_state_dict

    StableDiffusionLoraLoaderMixin.save_lora_weights(
        directory, unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())


class Chances:
    """The random numbers of one sample in one pass."""

    def __init__(self, seed: int, step: int, index: int, shape: tuple[int, ...], timesteps: int) -> None:
        generator = torch.Generator().manual_seed(mixed_seed("sample", seed, step, index))
        self.noise = torch.randn(shape, generator=generator)
        self.spread = torch.randn(shape, generator=generator)  # of the autoencoder's posterior
        self.t = int(torch.randint(timesteps, (), generator=generator))
        self.hears = float(torch.rand((), generator=generator))


class Remembered:
    """What the frozen networks say about a pair, kept while it fits into memory; each is encoded alone, so that the
    numbers depend neither on what stands beside it nor on what is kept."""

    def __init__(self, loaded: Loaded, world: World) -> None:
        self._loaded, self._device = loaded, world.device
        self._memory = Memory.of_machine(world.size)

    def of(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, E] and the moments of the latents [B, …]."""
        embeddings = [self._embedding(batch, row) for row in range(len(batch.draws))]
        moments = [self._moment(batch, row) for row in range(len(batch.draws))]
        return torch.stack(embeddings).to(self._device), torch.stack(moments).to(self._device)

    def _embedding(self, batch: ClipBatch, row: int) -> Tensor:
        def embed() -> Tensor:
            return self._loaded.conditioning.embed(batch.features[row:row + 1])[0].cpu()

        return self._memory.get_or_make(("sound", batch.draws[row].index), embed) if batch.whole[row] else embed()

    def _moment(self, batch: ClipBatch, row: int) -> Tensor:
        def encode() -> Tensor:
            return self._loaded.codec.moments(batch.pixels[row:row + 1].to(self._device))[0].cpu()

        return self._memory.get_or_make(("picture", batch.draws[row].index), encode)
