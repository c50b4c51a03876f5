"""`python -m jobs.data prompts`: embeddings of a checkpoint's own text encoder, and the wrong one refused."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs.data.prompts import alike_pairs, check_embeddings, check_rig, cosines
from jobs.runtime import JobError
from models.cameras import mv6, orbit32
from models.rigs import prompts
from tests.jobs.test_data_check import tool

WIDTH, TOKENS = 32, 77


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a tiny random text encoder and a tokenizer of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("checkpoint")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "bos_token": "<|startoftext|>",
         "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1)).save_pretrained(folder / "text_encoder")
    (folder / "unet").mkdir()
    (folder / "unet/config.json").write_text(json.dumps({"cross_attention_dim": WIDTH}))
    return folder


def test_they_are_what_the_text_encoder_makes_of_the_views_names(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    done = tool("prompts", checkpoint, tmp_path / "clr_embeds.pt", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["shape"] == [6, TOKENS, WIDTH] and report["rig"] == mv6(64).fingerprint
    embeds = torch.load(tmp_path / "clr_embeds.pt", weights_only=True)
    assert embeds.dtype == torch.float16 and embeds.shape == (6, TOKENS, WIDTH)
    tokens = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")(
        prompts(mv6(64)), padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        golden = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()(tokens.input_ids)[0]
    torch.testing.assert_close(embeds.float(), golden, atol=2e-3, rtol=0)
    assert not torch.equal(embeds[0], embeds[1])


def test_they_carry_their_rig(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "clr_embeds.pt"
    assert tool("prompts", checkpoint, out).returncode == 0
    check_rig(out, mv6(512))
    with pytest.raises(JobError, match="the embeddings' rig has mv6: 6 views .* the data has orbit32: 32 views"):
        check_rig(out, orbit32(64))
    check_rig(tmp_path / "public.pt", orbit32(64))  # one without a record beside it: nothing to compare


def test_names_that_are_alike_are_warned_about(checkpoint: Path, tmp_path: Path) -> None:
    done = tool("prompts", checkpoint, tmp_path / "a.pt", "--names", "a,b,c,d,e,f")
    assert done.returncode == 0 and "warning" in done.stdout and "cosine 0.9" in done.stdout
    assert "'a rendering image of 3D models, a view, color map.'" in done.stdout


@pytest.mark.parametrize(("arguments", "said"), [
    (["--names", "a,b"], "2 different names for a rig of 6 views"),
    (["--names", "a,a,b,c,d,e"], "5 different names"),
    (["--template", "a mouse"], "no {view}"),
    (["--rig", "mv7"], "no such rig"),
])
def test_a_mistake_is_told(checkpoint: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = tool("prompts", checkpoint, tmp_path / "out.pt", *arguments)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out.pt").exists()


def folder_with(tmp_path: Path, hidden_size: int, cross_attention_dim: object) -> Path:
    for part, content in (("text_encoder", {"hidden_size": hidden_size}), ("unet", {"cross_attention_dim": cross_attention_dim})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    return tmp_path


def test_the_text_encoder_of_another_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    done = tool("prompts", folder_with(tmp_path, 768, 1024), tmp_path / "out.pt")
    assert done.returncode == 2
    assert "768 wide, the UNet's cross-attention takes 1024" in done.stderr
    assert "768 is CLIP ViT-L, the encoder of Stable Diffusion 1" in done.stderr


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    done = tool("prompts", tmp_path, tmp_path / "out.pt")
    assert done.returncode == 2 and "unet/config.json: No such file" in done.stderr
    done = tool("prompts", folder_with(tmp_path, 32, [32, 64]), tmp_path / "out.pt")
    assert done.returncode == 2 and "cross_attention_dim is [32, 64]" in done.stderr
    (tmp_path / "unet/config.json").write_text('{"cross_attention_dim": 32}')
    done = tool("prompts", tmp_path, tmp_path / "out.pt")
    assert done.returncode == 2 and "cannot be loaded" in done.stderr


def test_the_forks_file_is_refused_and_the_public_one_is_known_to_be_alike(shared: Path) -> None:
    public = torch.load(shared / "data/prompt_embeds_human_6x77x1024.pt", weights_only=True)
    check_embeddings(public, 6, 1024, "the public file")
    assert [(a, b) for a, b, _ in alike_pairs(public)] == [(1, 5), (2, 4)]
    assert 0.87 < cosines(public).min() and alike_pairs(public)[0][2] == pytest.approx(0.995, abs=1e-3)
    with pytest.raises(JobError, match="768 wide.*takes 1024: made with the wrong text encoder"):
        check_embeddings(torch.zeros(6, 77, 768), 6, 1024, "the fork's file")
    with pytest.raises(JobError, match=r"\[32, 77, 1024\], not \[6 views"):
        check_embeddings(torch.zeros(32, 77, 1024), 6, 1024, "it")
    with pytest.raises(JobError, match="finite"):
        check_embeddings(torch.full((6, 77, 1024), float("nan")), 6, 1024, "it")
