"""From a prompt to embeddings: UMT5 encoder and its tokenizer, both from transformers.

# B batch, T text tokens, E text width
Source: Diffusers HeliosPipeline._get_t5_prompt_embeds.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import torch
from torch import Tensor

from helios_engine.config import read_json
from helios_engine.model.weights import load_slots


def clean(prompt: str) -> str:
    """The prompt as the model was trained on: mojibake mended, HTML entities resolved, white space folded."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """Tokenizer and encoder of one checkpoint."""

    def __init__(self, tokenizer, model) -> None:
        self._tokenizer = tokenizer
        self._model = model

    @classmethod
    def load(cls, checkpoint: Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """Read text_encoder/ and tokenizer/ of a checkpoint. Raises ValueError naming the file that is wrong."""
        import transformers

        folder = checkpoint / "text_encoder"
        config = transformers.UMT5Config.from_dict(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = transformers.UMT5EncoderModel(config)
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        model.set_input_embeddings(model.shared)
        slots = {name: tensor.data for name, tensor in model.state_dict(keep_vars=True).items()}
        slots.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
        load_slots(folder, slots, rename=cls._slot_name(folder))
        tokenizer = _load_tokenizer(checkpoint / "tokenizer")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{checkpoint / 'tokenizer'} has {len(tokenizer)} pieces but the text encoder knows only "
                f"{config.vocab_size}; they belong to different checkpoints"
            )
        return cls(tokenizer, model)

    @staticmethod
    def _slot_name(folder: Path):
        from helios_engine.model.weights import shapes_on_disk, weight_files

        names = shapes_on_disk(weight_files(folder)).keys()
        has_shared = "shared.weight" in names

        def rename(name: str) -> str | None:
            # Files hold the tied embedding under either name, or under both.
            if name == "encoder.embed_tokens.weight":
                return None if has_shared else "shared.weight"
            return name

        return rename

    @property
    def width(self) -> int:
        return self._model.config.d_model

    def encode(self, prompt: str, *, max_length: int) -> Tensor:
        """Embeddings [1, max_length, E]; rows past the prompt's end are zero. A longer prompt is cut."""
        tokens = self._tokenizer(
            [clean(prompt)],
            padding="max_length",
            max_length=max_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = self._model.device
        mask = tokens.attention_mask.to(device)
        hidden_BTE = self._model(tokens.input_ids.to(device), mask).last_hidden_state
        return hidden_BTE * mask.unsqueeze(-1)


def _load_tokenizer(folder: Path):
    import transformers

    # Without either file transformers makes up an almost empty vocabulary and says nothing.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ValueError(f"{folder} has neither tokenizer.json nor spiece.model")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
