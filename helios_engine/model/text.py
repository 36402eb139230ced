"""From a prompt to embeddings: UMT5 encoder and its tokenizer, both from transformers.

# B batch, T text tokens, E text width
Source: Diffusers HeliosPipeline._get_t5_prompt_embeds.
"""

from __future__ import annotations

import functools
import html
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_engine.config import read_json
from helios_engine.model.offload import Copier, Share, WeightRing, layer_sources
from helios_engine.model.weights import check_slots, load_slots, mapped_tensors, shapes_on_disk, weight_files
from helios_engine.optional import require

logger = logging.getLogger(__name__)


def clean(prompt: str) -> str:
    """The prompt as the model was trained on: mojibake mended, HTML entities resolved, white space folded."""
    text = html.unescape(html.unescape(_mend(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def _mend(prompt: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        _say_that_nothing_is_mended(str(error))
        return prompt
    return ftfy.fix_text(prompt)


@functools.cache
def _say_that_nothing_is_mended(reason: str) -> None:
    logger.warning("prompts with characters broken by a wrong encoding stay as they are: %s; pip install ftfy", reason)


class TextEncoder:
    """Tokenizer and encoder of one checkpoint."""

    def __init__(self, tokenizer, model, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self.model = model
        self._device = device
        self._ring: WeightRing | None = None

    @classmethod
    def load(cls, checkpoint: Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """Read text_encoder/ and tokenizer/ of a checkpoint. Raises ValueError naming the file that is wrong."""
        encoder = cls.empty(checkpoint, device=device, dtype=dtype)
        encoder.model.to_empty(device=device)
        encoder.fill(checkpoint / "text_encoder")
        return encoder

    @classmethod
    def empty(cls, checkpoint: Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """The encoder without memory for its weights, which will lie on the device."""
        model = cls.on_meta(checkpoint / "text_encoder").to(dtype).eval().requires_grad_(False)
        return cls(_load_tokenizer(checkpoint / "tokenizer", model.config.vocab_size), model, device)

    def fill(self, folder: Path) -> None:
        """Read the weights into parameters that have memory."""
        self.model.set_input_embeddings(self.model.shared)
        load_slots(folder, self.slots(self.model), rename=self.slot_name(folder))

    @classmethod
    def load_streamed(
        cls, checkpoint: Path, *, device: torch.device, dtype: torch.dtype, copier: Copier, num_slots: int
    ) -> TextEncoder:
        """The same encoder with its layers taking turns on the device and its embedding left in the mapped file."""
        folder = checkpoint / "text_encoder"
        model = cls.on_meta(folder).to(dtype).eval().requires_grad_(False)
        rename = cls.slot_name(folder)
        named = {rename(name): tensor for name, tensor in mapped_tensors(folder).items()}
        model.set_input_embeddings(_HostEmbedding(named["shared.weight"], device, dtype))
        model.encoder.final_layer_norm.to_empty(device=device)
        layers = model.encoder.block
        wanted = dict(layers[0].named_parameters())
        shares = [
            Share(layer, tuple(wanted), targets=functools.partial(_own_tensors, layer), sources=found)
            for layer, found in zip(
                layers, layer_sources(folder, "encoder.block", len(layers), wanted, rename), strict=True
            )
        ]
        ring = WeightRing(shares, device=device, copier=copier, num_slots=num_slots)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, index=index: ring.use(index))
        slots = {name: tensor for name, tensor in cls.slots(model).items() if not tensor.is_meta}
        for name, slot in slots.items():
            if name in named:
                slot.copy_(named[name])
        encoder = cls(_load_tokenizer(checkpoint / "tokenizer", model.config.vocab_size), model, device)
        encoder._ring = ring
        return encoder

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
        transformers = require("transformers", "encoding prompts")

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

    def close(self) -> None:
        """Let go of what streams the layers; nothing can be encoded afterwards."""
        if self._ring is not None:
            self._ring.close()

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
        mask = tokens.attention_mask.to(self._device)
        try:
            hidden_BTE = self.model(tokens.input_ids.to(self._device), mask).last_hidden_state
        finally:
            if self._ring is not None:
                self._ring.rest()
        return hidden_BTE * mask.unsqueeze(-1)


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in layer.named_parameters()}


class _HostEmbedding(nn.Module):
    """Rows looked up in a table that stays in the mapped file: 512 of 256384, so 4 MB of 2 GB."""

    def __init__(self, table: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._table, self._device, self._dtype = table, device, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.cpu(), self._table).to(self._device, self._dtype)


def _strict_errors() -> tuple[type[Exception], ...]:
    """What newer transformers raise for a config value of the wrong type."""
    from huggingface_hub import errors

    return tuple(getattr(errors, name) for name in ("StrictDataclassError",) if hasattr(errors, name))


def _load_tokenizer(folder: Path, vocab_size: int):
    transformers = require("transformers", "encoding prompts")

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
