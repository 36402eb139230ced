"""From a prompt to embeddings: UMT5 encoder and its tokenizer, both from transformers.

# B batch, T text tokens, E text width
Source: Diffusers HeliosPipeline._get_t5_prompt_embeds.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from helios_engine.config import read_json
from helios_engine.model.weights import check_slots, load_slots, shapes_on_disk, weight_files


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
        folder = checkpoint / "text_encoder"
        model = cls.on_meta(folder).to(dtype).to_empty(device=device).eval().requires_grad_(False)
        model.set_input_embeddings(model.shared)
        load_slots(folder, cls.slots(model), rename=cls.slot_name(folder))
        return cls(_load_tokenizer(checkpoint / "tokenizer", model.config.vocab_size), model)

    @classmethod
    def check(cls, checkpoint: Path) -> None:
        """Raise ValueError where load would, reading headers and the tokenizer only."""
        folder = checkpoint / "text_encoder"
        model = cls.on_meta(folder)
        check_slots(folder, cls.slots(model), rename=cls.slot_name(folder))
        _load_tokenizer(checkpoint / "tokenizer", model.config.vocab_size)

    @staticmethod
    def on_meta(folder: Path):
        """The encoder without any memory behind it."""
        import transformers

        values = read_json(folder / "config.json")
        missing = [
            name for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads") if name not in values
        ]
        if missing:
            raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}")
        try:
            with torch.device("meta"):
                return transformers.UMT5EncoderModel(transformers.UMT5Config.from_dict(values))
        except (TypeError, ValueError, *_strict_errors()) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder / 'config.json'} describes no UMT5 encoder: {reason}") from None

    @staticmethod
    def slots(model: torch.nn.Module) -> dict[str, Tensor]:
        slots = {name: tensor.data for name, tensor in model.state_dict(keep_vars=True).items()}
        slots.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
        return slots

    @staticmethod
    def slot_name(folder: Path) -> Callable[[str], str | None]:
        """Files hold the tied embedding under either name, or under both."""
        has_shared = "shared.weight" in shapes_on_disk(weight_files(folder))

        def rename(name: str) -> str | None:
            if name == "encoder.embed_tokens.weight":
                return None if has_shared else "shared.weight"
            return name

        return rename

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


def _strict_errors() -> tuple[type[Exception], ...]:
    """What newer transformers raise for a config value of the wrong type."""
    from huggingface_hub import errors

    return tuple(getattr(errors, name) for name in ("StrictDataclassError",) if hasattr(errors, name))


def _load_tokenizer(folder: Path, vocab_size: int):
    import transformers

    # Without either file transformers makes up an almost empty vocabulary and says nothing.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ValueError(f"{folder} has neither tokenizer.json nor spiece.model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer)} pieces but the text encoder knows only {vocab_size}; they belong to "
            "different checkpoints"
        )
    return tokenizer
