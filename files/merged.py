"""Write a whole model with a person merged into its weights, for other programs."""
import copy
import json
import os
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from adapters import merge
from clip import END, START
from files.checkpoints import LoadError, alike, check_numbers, checksum, write
from files.disk import read_json, whole_files, write_text
from files.layouts import IMPLEMENTED, PARTS, SCHEDULE, load_parts
from files.tokenizers import write_tokenizer
from program.console import UserError


def free_folder(out):
    """The Path of a new or empty folder to write; UserError if it has contents."""
    out = Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; give a new or an empty folder")
    return out


def merge_to_folder(model, adapters, source, out, few_steps=False):
    """Write a model folder in the hub's layout with one person's adapters merged into the weights of `model`,
    which is not changed. source: the folder with the model's settings, or None for our own. out: new or
    empty. few_steps: whether the result is for LCM's scheduler. A model in bfloat16 is read from its files
    again and written in float16, because 8 bits would lose the person. UserError if `out` has contents,
    ValueError for adapters of several people."""
    out, parts = free_folder(out), exact_parts(model)
    layers = {f"{part}.{name}": layer for part, network in parts.items()
              for name, layer in network.named_modules()}
    copies = {name: copy.deepcopy(layers[name]).float() for name in adapters}
    merge(copies, adapters)
    dtype = torch.float16 if model.dtype == torch.bfloat16 else model.dtype
    merged = {f"{name}.{key}": p.to(dtype) for name, layer in copies.items()
              for key, p in layer.named_parameters(recurse=False)}
    check_numbers(merged, out)

    with whole_files(out) as (new,):
        for folder, part in ("vae", "vae"), ("text_encoder", "text"), ("unet", "unet"):
            weights = parts[part].state_dict()
            weights = {key: merged.get(f"{part}.{key}", t).to(dtype) for key, t in weights.items()}
            write(weights, new / folder / f"{PARTS[folder].stem}.safetensors", {"format": "pt"})
        for file, config in config_files(model, source, few_steps).items():
            write_text(json.dumps(config, indent=2) + "\n", new / file)
        write_tokenizer(model.tokenizer, new / "tokenizer")


def exact_parts(model):
    """Part -> module of the model; of one in bfloat16 read again in float16, with a warning if that fails."""
    parts = {"unet": model.unet, "text": model.text, "vae": model.vae}
    if model.dtype != torch.bfloat16:
        return parts
    with suppress(LoadError):
        network, text, _, autoencoder = load_parts(model.name, "cpu", torch.float16)
        exact = {"unet": network, "text": text, "vae": autoencoder}
        if all(alike(checksum(exact[part]), checksum(parts[part])) for part in parts):
            return exact
    warnings.warn(f"{model.name}: cannot be read again, so its weights are rounded to bfloat16; give "
                  "--dtype float32 to avoid that", stacklevel=3)
    return parts


def config_files(model, source=None, few_steps=False):
    """Path -> dict of every settings file for other programs: of `source` or, but for sizes, of SD 1.5."""
    unet, vae, text = (asdict(part.config) for part in (model.unet, model.vae, model.text))
    unet |= {key: value for key, value in IMPLEMENTED["unet/config.json"].items() if value is not None}
    unet["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(unet["down_block_types"])]
    for way, kind in ("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D"):
        vae[f"{way}_block_types"] = [kind] * len(vae["block_out_channels"])
    text |= {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
             "projection_dim": text["hidden_size"], "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text["max_position_embeddings"],
                 "bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END,
                 "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    schedule = SCHEDULE | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
                           "steps_offset": 1}

    # By file, and the source's own values before ours
    diffusers = {"_diffusers_version": "0.27.0", "_class_name": "StableDiffusionPipeline"}
    configs = {"unet/config.json": diffusers | unet | {"_class_name": "UNet2DConditionModel"},
               "vae/config.json": diffusers | vae | {"_class_name": "AutoencoderKL", "act_fn": "silu"},
               "scheduler/scheduler_config.json": diffusers | schedule | {"_class_name": "PNDMScheduler"},
               "text_encoder/config.json": text, "tokenizer/tokenizer_config.json": tokenizer}
    for file, config in configs.items():
        if source and Path(source, file).is_file():
            config |= read_json(Path(source, file))
    if few_steps:
        configs["scheduler/scheduler_config.json"]["_class_name"] = "LCMScheduler"
    scheduler = configs["scheduler/scheduler_config.json"]["_class_name"]
    return configs | {"model_index.json": diffusers | {
        "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
        "scheduler": ("diffusers", scheduler), "requires_safety_checker": False,
        "safety_checker": (None, None), "feature_extractor": (None, None)}}
