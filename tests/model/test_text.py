"""Prompt to embeddings against Diffusers' text path."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from diffusers import HeliosPipeline
from safetensors.torch import load_file, save_file

from helios_engine.model.text import TextEncoder, clean
from tests.helpers import oracle

PROMPTS = [
    "A red fox runs through fresh snow.",
    "",
    "  tabs\tand\n\nlines   folded ",
    "&amp;lt;b&amp;gt; twice escaped &quot;quotes&quot;",
    "mojibake: cafÃ© and schÃ¶n, emoji 🦊, Chinese 红狐",
    "very long " * 200,
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    pipe = oracle.pipeline(oracle.random_case("base", "t2v", 0))
    folder = oracle.save(pipe, tmp_path_factory.mktemp("text"))
    return pipe, TextEncoder.load(folder, device=torch.device("cpu"), dtype=torch.float32), folder


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@pytest.mark.parametrize("length", [1, 17, 64])
def test_embeddings_equal_diffusers(both, prompt: str, length: int) -> None:
    pipe, ours, _ = both
    expected, _ = HeliosPipeline._get_t5_prompt_embeds(pipe, prompt, max_sequence_length=length, device="cpu")
    actual = ours.encode(prompt, max_length=length)
    assert actual.shape == (1, length, 32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert expected.abs().max() > 0.1


def test_cleaning() -> None:
    assert clean("  a &amp;amp; b\n c ") == "a & b c"
    assert clean("schÃ¶n") == "schön"


@pytest.mark.parametrize("names", ["shared", "embed_tokens", "both"])
def test_tied_embedding_loads_under_either_name(both, tmp_path, names: str) -> None:
    _, ours, folder = both
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / name, tmp_path / name)
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    table = tensors.pop("shared.weight")
    if names != "embed_tokens":
        tensors["shared.weight"] = table
    if names != "shared":
        tensors["encoder.embed_tokens.weight"] = table.clone()
    save_file(tensors, path)
    other = TextEncoder.load(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(other.encode("A fox", max_length=8), ours.encode("A fox", max_length=8))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'}, "neither tokenizer.json nor spiece.model"),
        ({"tokenizer.json": "{ not json"}, "tokenizer cannot be loaded"),
    ],
    ids=["no-vocabulary", "garbage"],
)
def test_a_broken_tokenizer_is_named(both, tmp_path, files: dict[str, str], message: str) -> None:
    _, _, folder = both
    shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for name, content in files.items():
        (tmp_path / "tokenizer" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        TextEncoder.load(tmp_path, device=torch.device("cpu"), dtype=torch.float32)


def test_a_foreign_tokenizer_is_refused(both, tmp_path) -> None:
    _, _, folder = both
    shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    transformers.T5Tokenizer(extra_ids=900).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="belong to different checkpoints"):
        TextEncoder.load(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
