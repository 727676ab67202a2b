"""A Stable Diffusion of SD 1.5's structure, but narrow, with the rule's weights: as modules and as files."""
import json
from dataclasses import asdict
from functools import cache

from rule import fill
from safetensors.torch import save_file

import clip
import unet
import vae
from files.tokenizers import write_tokenizer

VOCAB, MERGES = clip.learn_bpe(["a", "face", "as", "rock", "star"])
SMALL = {
    "unet": unet.UNetConfig(block_out_channels=(16, 16, 32, 32), cross_attention_dim=32, attention_head_dim=4,
                            norm_num_groups=8),
    "vae": vae.VAEConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4),
    "text_encoder": clip.TextConfig(vocab_size=len(VOCAB), hidden_size=32, intermediate_size=64,
                                    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24)}
KIND = {"unet": unet.UNet, "vae": vae.VAE, "text_encoder": clip.TextTransformer}
FILE = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SCHEDULER = {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
             "beta_end": 0.012}


@cache
def parts():
    return {part: fill(KIND[part](SMALL[part])) for part in SMALL}


def state(part):
    return dict(parts()[part].state_dict())


def write_folder(folder):
    """All of it in the hub's layout, its config.json with fields that diffusers writes and we don't know."""
    for part in SMALL:
        (folder / part).mkdir(parents=True)
        config = asdict(SMALL[part]) | {"_class_name": "Something", "sample_size": 64}
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(state(part), folder / part / f"{FILE[part]}.safetensors")
    (folder / "tokenizer").mkdir()
    write_tokenizer(clip.Tokenizer(VOCAB, MERGES), folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder
