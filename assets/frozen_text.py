"""A frozen text model of `transformers`, which encodes captions: `train_dit.py --text NAME`.

It needs `pip install transformers`. NAME: a model of the Hugging Face hub, such as Qwen/Qwen3-0.6B, or its folder.
"""
import warnings
from pathlib import Path

import torch

from rae import UserError, absolute_path


class FrozenText:
    """Captions -> last hidden states (B,L,E) of a pretrained text model, zeros where padded; name: a
    model of the Hugging Face hub, or its folder. Errors: no transformers, no such model."""
    def __init__(self, name, length, device):
        try:
            from transformers import AutoModel, AutoTokenizer
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModel.from_pretrained(name)
        except Exception as error:  # not installed, no network, no such model: each has its own kind
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"--text {name}: no text model of the hub or folder ({said:.120}): pip install"
                            " transformers, name the folder of a model that was brought, or take"
                            " --text words") from None
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        model = getattr(model, "text_model", model)  # CLIP has an image model, too
        weights = sum(p.double().abs().sum() for p in model.parameters())  # a fingerprint
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = model.eval().requires_grad_(False).to(device, dtype)
        name = absolute_path(name) if Path(name).is_dir() else name  # a folder, or the hub's
        self.source = dict(model=name, length=length, weights=f"{weights:.8g}")
        self.config = dict(dim=model.config.hidden_size)  # for DiT
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    @torch.no_grad()
    def __call__(self, captions):
        length = self.source["length"]
        empty = self.tokenizer.eos_token or ""  # some tokenizers make no token of an empty caption
        captions = [caption.strip() or empty for caption in captions]
        if max(map(len, self.tokenizer(captions).input_ids)) > length:
            warnings.warn(f"captions of more than {length} tokens are cut: see --text-length")
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=length,
                                return_tensors="pt").to(self.model.device)
        states = self.model(**tokens).last_hidden_state.float()  # (B, L, E)
        return states * tokens.attention_mask[..., None]
