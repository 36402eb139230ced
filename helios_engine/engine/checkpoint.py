"""A checkpoint in the Diffusers layout, local or from a hub: which files, which variant, which shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from helios_engine.config import ModelConfig, Recipe, SchedulerConfig, VaeConfig, read_json
from helios_engine.model.text import TextEncoder
from helios_engine.model.transformer import Transformer
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.model.weights import check_slots, load_slots, transformer_name
from helios_engine.optional import require

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_CLASSES = {
    "transformer": ("HeliosTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
    "scheduler": ("HeliosScheduler", "HeliosDMDScheduler"),
}
_OPTIONAL = ("text_encoder", "tokenizer")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a checkpoint's JSON says; no weights are read yet."""

    name: str
    folder: Path
    model: ModelConfig
    vae: VaeConfig
    scheduler: SchedulerConfig
    recipe: Recipe
    has_text_encoder: bool

    @classmethod
    def open(cls, path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
        """Find a checkpoint and read its configuration. Raises ValueError naming the file that is wrong or missing."""
        folder = _locate(str(path_or_id), revision)
        index_path = folder / "model_index.json"
        index = read_json(index_path)
        present = {name: _is_present(index, name, index_path) for name in COMPONENTS}
        if missing := [name for name in COMPONENTS if not present[name] and name not in _OPTIONAL]:
            raise ValueError(f"{index_path}: {', '.join(missing)} is null; Helios needs it")
        if present["text_encoder"] != present["tokenizer"]:
            raise ValueError(f"{index_path}: text_encoder and tokenizer go together, one of them is null")
        scheduler = SchedulerConfig.from_json(folder / "scheduler" / "scheduler_config.json")
        model = ModelConfig.from_json(folder / "transformer" / "config.json")
        vae = VaeConfig.from_json(folder / "vae" / "config.json")
        if vae.z_dim != model.in_channels:
            raise ValueError(f"{folder}: the VAE has {vae.z_dim} latent channels, the transformer {model.in_channels}")
        return cls(
            name=str(path_or_id),
            folder=folder,
            model=model,
            vae=vae,
            scheduler=scheduler,
            recipe=Recipe.for_checkpoint(index, scheduler, str(index_path)),
            has_text_encoder=present["text_encoder"],
        )

    def problems(self) -> list[str]:
        """What is wrong with the files, component by component; reads headers and the tokenizer only."""
        with torch.device("meta"):
            transformer, vae = Transformer(self.model, torch.bfloat16), VideoAutoencoder(self.vae)
        checks: list[Callable[[], object]] = [
            lambda: check_slots(self.folder / "transformer", transformer.checkpoint_slots(), rename=transformer_name),
            lambda: check_slots(self.folder / "vae", vae.checkpoint_slots()),
        ]
        if self.has_text_encoder:
            checks.append(lambda: TextEncoder.check(self.folder))
        found = []
        for check in checks:
            try:
                check()
            except ValueError as error:
                found.append(str(error))
        return found

    def check(self) -> None:
        """Raise ValueError naming everything that is wrong with the files."""
        if found := self.problems():
            raise ValueError("; ".join(found))

    def load_transformer(self, device: torch.device, dtype: torch.dtype) -> Transformer:
        transformer = make_transformer(self.model, device, dtype)
        self.fill_transformer(transformer)
        return transformer

    def fill_transformer(self, transformer: Transformer) -> None:
        """Read the weights into parameters that have memory."""
        load_slots(self.folder / "transformer", transformer.checkpoint_slots(), rename=transformer_name)

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> VideoAutoencoder:
        vae = self.make_vae(device, dtype)
        self.fill_vae(vae)
        return vae

    def make_vae(self, device: torch.device, dtype: torch.dtype) -> VideoAutoencoder:
        """An autoencoder without weights on the device, or without memory on the meta device."""
        with torch.device("meta"):
            vae = VideoAutoencoder(self.vae).to(dtype)
        return vae.to_empty(device=device).requires_grad_(False)

    def fill_vae(self, vae: VideoAutoencoder) -> None:
        """Read the weights into parameters that have memory, channels last."""
        vae.channels_last_()
        device = vae.quant_conv.weight.device
        statistics = torch.tensor([self.vae.latents_mean, self.vae.latents_std], dtype=torch.float32, device=device)
        vae.statistics = statistics.view(2, 1, -1, 1, 1, 1)
        load_slots(self.folder / "vae", vae.checkpoint_slots())

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> TextEncoder | None:
        if not self.has_text_encoder:
            return None
        return TextEncoder.load(self.folder, device=device, dtype=dtype)


def make_transformer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """An empty transformer on the device; fp32-kept parts stay float32 whatever dtype is."""
    with torch.device("meta"):
        transformer = Transformer(config, dtype)
    return transformer.to_empty(device=device).requires_grad_(False)


def _locate(path_or_id: str, revision: str | None) -> Path:
    try:
        path = Path(path_or_id).expanduser()
    except RuntimeError:  # ~name of nobody
        path = Path(path_or_id)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision} has no effect on the local folder {path}; leave it out")
        return path
    parts = path_or_id.split("/")
    if len(parts) != 2 or not all(parts) or path_or_id.startswith((".", "~")):
        raise ValueError(f"model {path_or_id} is no folder here and no hub id of the form owner/name")
    return _download(path_or_id, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    """Fetch the inference components alone: the training folders would double the size."""
    huggingface_hub = require("huggingface_hub", f"fetching {hub_id} from the hub")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["model_index.json", *(f"{component}/*" for component in COMPONENTS)]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    # The bases are OSError and the HTTP client's own error, whichever client this release of the hub uses.
    except (HFValidationError, OSError, *HfHubHTTPError.__bases__) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {hub_id} is no folder here and cannot be fetched from the hub: {reason}") from None


def _is_present(index: dict[str, object], name: str, path: Path) -> bool:
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2:
        if entry is None and name in _OPTIONAL:
            return False
        raise ValueError(f"{path}: {name} must be a [library, class] pair, got {entry!r}")
    class_name = entry[1]
    if class_name is None:
        return False
    if class_name not in _CLASSES.get(name, (class_name,)):
        raise ValueError(f"{path}: {name} must be {' or '.join(_CLASSES[name])}, got {class_name}")
    return True
