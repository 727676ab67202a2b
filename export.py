"""A person in other programs, and other people's LoRAs in ours: LoRA files out and in, and a model folder with the person merged in.

    export_lora(person.factors(method.lidb), "lora.safetensors")                # for diffusers, ComfyUI, A1111
    style = load_lora("style.safetensors", model)                               # factors, to be joined with a person's
    merge_to_folder(method, person.factors(method.lidb), None, "merged_model")

Everything is in *factors* (see lidb.py), so every conversion here is a renaming and a transposition: nothing is fitted or approximated.
"""
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

import checkpoints
import clip
import sd
from checkpoints import write
from lidb import adaptable_layers, merge
from person import PersonError, check_numbers, read

# ---------------------------------------------------------------------------------------------------------------------------------
# LoRA, ours for other programs and others' for ours

def export_lora(factors, path, metadata=None, dtype=torch.float32):
    """Write one person's factors as a plain LoRA that diffusers, ComfyUI and A1111 read: kohya's names, an .alpha for every layer.

    The factors are written as they are, so a person fine-tuned at rank r becomes a LoRA of rank 1 + r, without loss; float16 would
    halve the file and change the UNet's output by a few 10⁻⁴ (LiDB's small numbers are exact in it, its products with the basis are not).
    Where layers differ in rank, zeros fill up, since diffusers 0.35 to 0.42 takes one layer's alpha for all.
    PersonError for several people or numbers that dtype can't hold.
    """
    tensors, rank = {}, max((a.shape[2] for a, _ in factors.values()), default=0)
    for name, (a, b) in factors.items():
        if len(a) != 1:
            raise PersonError(f"{path}: a LoRA is one person's, not {len(a)} people's")
        a, b = F.pad(a, (0, rank - a.shape[2])), F.pad(b, (0, 0, 0, rank - b.shape[1]))
        key, end = kohya(name), (1, 1) if name.endswith(CONVOLUTIONS) else ()
        tensors[f"{key}.lora_down.weight"] = a[0].T.to(dtype).unflatten(1, (-1, *end))  # (r, in), of convolutions (r, in, 1, 1)
        tensors[f"{key}.lora_up.weight"] = b[0].T.to(dtype).unflatten(1, (-1, *end))    # (out, r)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))                             # readers multiply by alpha / r
    if not tensors:
        raise PersonError(f"{path}: nothing to write, the person has no personal weights")
    check_numbers(tensors, path)
    note = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank), "ss_base_model_version": "sd_v1"}
    write(tensors, path, note | {key: str(value) for key, value in (metadata or {}).items()})


CONVOLUTIONS = (".proj_in", ".proj_out", ".conv_shortcut")  # 1×1, which LoRAs of others may change


def kohya(name):
    part, inner = name.split(".", 1)
    return f"lora_{'te' if part == 'text' else part}_{inner.replace('.', '_')}"


# A key of somebody's LoRA: which layer, and which of its two matrices. kohya writes X.lora_down.weight, diffusers has written
# X_lora.down.weight, X.lora.down.weight and X.lora_linear_layer.down.weight, PEFT writes X.lora_A.weight, or X.lora_A.default.weight.
KEY = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up)|\.lora_([AB])(?:\.\w+)?)\.weight|(.+)\.(alpha)")
ROLES = {"A": "down", "B": "up"}
FOREIGN = {  # what is not the sum of a model and a plain LoRA of SD 1.x's layers, by a pattern in its keys
    r"^lora_te2_|^text_encoder_2\.|_input_blocks_|_output_blocks_|label_emb|add_embedding": "a LoRA for SDXL",
    r"lora_unet_(double|single|joint)_|transformer\.(single_)?transformer_blocks": "a LoRA for a diffusion transformer",
    r"\.hada_|\.lokr_|\.oft_|\.(a1|b1|on_input)\b|\.boft_": "LoHa, LoKr, OFT or (IA)³, not LoRA",
    r"dora_scale|lora_magnitude_vector": "DoRA, not LoRA",
    r"\.lora_mid\.|\.diff$|\.diff_b$|\.[bw]_norm$": "LyCORIS with more than plain LoRA",
    r"^bundle_emb\.": "a LoRA with an embedding bundled in, which is not implemented",
    r"^emb_params$|^string_to_param": "a textual inversion, not a LoRA",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.": "a whole model, not a LoRA"}


def load_lora(path, model, strength=1.0):
    """Somebody else's LoRA for SD 1.x -> factors, name -> (A (1, in, r), B (1, r, out)), float32, on the device of `model`.

    Linear layers and 1×1 convolutions of the UNet and the text encoder, wherever lidb.adaptable_layers finds them; names as kohya's
    scripts, diffusers and PEFT write them. The residual is strength · alpha / r · up · down; alpha is r where the file doesn't say.
    PersonError if the file has a key that isn't understood or doesn't fit: it would otherwise be dropped without a word.
    """
    tensors, note = read(path)
    problems = {}  # what -> keys
    for key in tensors:
        for pattern, what in FOREIGN.items():
            if re.search(pattern, key):
                problems.setdefault(what, []).append(key)
                break
    refuse(path, problems)
    layers, names, found = adaptable_layers(model.unet, model.text), spellings(model), {}
    for key, t in tensors.items():
        match = KEY.fullmatch(key)
        name = match and names.get(plain(match[1] or match[4]))
        role = match and (match[2] or ROLES.get(match[3], match[5]))
        if name is None:
            problems.setdefault("layers that this model doesn't have, or no LoRA", []).append(key)
        elif name not in layers:
            problems.setdefault("convolutions larger than 1×1 (LoCon), which are not implemented", []).append(key)
        elif role in found.setdefault(name, {}):
            problems.setdefault("the same layer twice", []).append(key)
        elif role == "alpha" and t.numel() != 1:
            problems.setdefault("an alpha that is no number", []).append(key)
        else:
            found[name][role] = key
    config = peft_config(path, note, tensors)
    factors = {}
    for name, keys in found.items():
        if not {"down", "up"} <= keys.keys():
            problems.setdefault("one matrix without the other", []).extend(keys.values())
            continue
        down, up = (tensors[keys[role]] for role in ("down", "up"))
        (n_out, n_in), rank = layers[name].weight.shape[:2], max(1, *down.shape[:1], 0)
        if any((*t.shape[:2], t.shape[2:].numel()) != (*want, 1) for t, want in ((down, (rank, n_in)), (up, (n_out, rank)))):
            problems.setdefault("made for other widths", []).append(
                f"{keys['down']} and up, {tuple(down.shape)} and {tuple(up.shape)} for a layer {n_in} → {n_out}")
            continue
        alpha = tensors[keys["alpha"]].item() if "alpha" in keys else None
        try:
            factor = strength * float(peft_scale(config, name, rank) if alpha is None else alpha / rank)
        except (TypeError, AttributeError, ValueError, OverflowError, re.error) as error:
            raise PersonError(f"{path}: PEFT's settings make no sense ({error})") from None
        factors[name] = tuple(t.to(model.device) for t in (down.float().flatten(1).T[None], up.float().flatten(1).T[None] * factor))
    refuse(path, problems)
    check_numbers({key: t.float() if key.endswith(".alpha") else t for key, t in tensors.items()}, path)
    check_numbers({f"{name}, scaled,": b for name, (_, b) in factors.items()}, path)
    if not factors:
        raise PersonError(f"{path}: empty")
    return factors


def refuse(path, problems):
    """PersonError that lists `problems`, a dict of what -> keys, if there are any."""
    if problems:
        raise PersonError(f"{path}: " + "; ".join(f"{what}: {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if keys[5:] else "")
                                                  for what, keys in problems.items()))


PREFIXES = {"unet": "unet", "text": "text_encoder"}  # diffusers' names of the two parts


def spellings(model):
    """Every way to write a layer in a LoRA, after plain() -> our name. Large convolutions as well, so that the error can name them."""
    names = {}
    for part, theirs in PREFIXES.items():
        for inner, m in getattr(model, part).named_modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                name = f"{part}.{inner}"
                for short in {inner, inner.removeprefix("text_model.")}:  # transformers 5 has no text_model
                    names |= dict.fromkeys([f"{theirs}.{short}", f"base_model.model.{short}", short, kohya(f"{part}.{short}")], name)
                    names[kohya(f"{part}.{short}").replace("lora_te_", "lora_te1_")] = name  # what diffusers makes of its own for kohya
    return names


def plain(layer):
    """A layer's name in diffusers' older LoRAs, attn1.processor.to_q or self_attn.to_q -> in its newer: attn1.to_q, self_attn.q_proj."""
    layer = re.sub(r"\.to_out$", ".to_out.0", layer.replace(".processor.", "."))
    return re.sub(r"self_attn\.to_(q|k|v|out)(\.0)?$", r"self_attn.\1_proj", layer)


def peft_config(path, note, tensors):
    """PEFT's LoraConfig, as a dict with "unet." or "text_encoder." before its keys as diffusers' pipelines keep it in the metadata, or {}.

    A model's own save_lora_adapter() writes it there without them. PEFT by itself keeps it in adapter_config.json; a file of its own is
    not readable without, for alpha is in no tensor.
    """
    file = Path(path).with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in note:
            settings = dict(json.loads(note["lora_adapter_metadata"]))
        elif any(key.startswith("base_model.model.") for key in tensors):
            settings = dict(json.loads(file.read_text(encoding="utf-8")))
        else:
            return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise PersonError(f"{path}: PEFT's settings, its metadata or {file.name} beside it, are not readable ({error})") from None
    if any(key.startswith(tuple(f"{part}." for part in PREFIXES.values())) for key in settings):
        return settings
    return {f"{part}.{key}": value for key, value in settings.items() for part in PREFIXES.values()}


def peft_scale(config, name, rank):
    """What a layer's residual is multiplied by under PEFT's settings: alpha / r, or alpha / √r with rank-stabilised LoRA; 1 without."""
    part, inner = name.split(".", 1)
    get = lambda key: config.get(f"{PREFIXES[part]}.{key}")
    special = [alpha for key, alpha in (get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?({key})", inner)]
    alpha = special[0] if special else get("lora_alpha")
    return 1. if alpha is None else alpha / (rank ** .5 if get("use_rslora") else rank)


# ---------------------------------------------------------------------------------------------------------------------------------
# A model folder with the person in it

def free(out):
    """The Path of a folder to write that doesn't exist yet or is empty; PersonError if it is taken."""
    out = Path(out).resolve()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise PersonError(f"{out}: exists already; give a new or an empty folder")
    except OSError as error:
        raise PersonError(f"{out}: {error.strerror}") from None
    return out


def merge_to_folder(method, factors, source, out):
    """Write a model folder in the hub's layout with one person's factors merged into its weights, for diffusers and for sd.load.

    source: the folder that method.model was loaded from, for its settings, or None: written from our own. out: a folder that doesn't
    exist yet or is empty. The loaded model stays as it is; of a model in bfloat16, float16 is written, for a person would hardly survive
    rounding to 8 bits. PersonError if out is taken or the factors are several people's.
    """
    out, model = free(out), method.model
    if any(len(a) != 1 for a, _ in factors.values()):
        raise PersonError(f"{out}: only one person can be merged into a model")
    layers = adaptable_layers(model.unet, model.text)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for part, module, name in ("vae", model.vae, None), ("text_encoder", model.text, "text"), ("unet", model.unet, "unet"):
            mine = {k: f for k, f in factors.items() if k.split(".", 1)[0] == name}
            copies = {k: SimpleNamespace(weight=layers[k].weight.detach().to(torch.float32, copy=True)) for k in mine}
            merge(copies, mine)
            weights = module.state_dict() | {f"{k.split('.', 1)[1]}.weight": copy.weight for k, copy in copies.items()}
            weights = {k: t.to(torch.float16 if model.dtype == torch.bfloat16 else model.dtype) for k, t in weights.items()}
            check_numbers({k: weights[f"{k.split('.', 1)[1]}.weight"] for k in mine}, out)
            write(weights, temporary / part / f"{sd.PARTS[part][3]}.safetensors", {"format": "pt"})
        written = settings(model)
        for file, ours in written.items():
            if source and file != "model_index.json" and Path(source, file).is_file():
                ours |= checkpoints.read_json(Path(source, file))
        written["model_index.json"]["scheduler"] = "diffusers", written["scheduler/scheduler_config.json"]["_class_name"]
        for file, ours in written.items():
            (temporary / file).parent.mkdir(exist_ok=True)
            (temporary / file).write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        model.tokenizer.save(temporary / "tokenizer")
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        raise PersonError(f"{out}: not written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settings(model):
    """Path -> dict of every settings file that diffusers and transformers want, as they are for SD 1.5 but for the sizes."""
    unet, levels, text = model.unet.config, len(model.vae.config.block_out_channels), model.text.config
    diffusers = lambda name: {"_class_name": name, "_diffusers_version": "0.27.0"}
    return {
        "model_index.json": diffusers("StableDiffusionPipeline") | {
            "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
            "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
            "safety_checker": (None, None), "feature_extractor": (None, None), "requires_safety_checker": False},
        "unet/config.json": diffusers("UNet2DConditionModel") | asdict(unet) | {
            k: v for k, v in sd.IMPLEMENTED["unet/config.json"].items() if v is not None} | {
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(unet.down_block_types)]},
        "vae/config.json": diffusers("AutoencoderKL") | asdict(model.vae.config) | {
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels, "act_fn": "silu"},
        "text_encoder/config.json": asdict(text) | {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "projection_dim": text.hidden_size,
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": text.max_position_embeddings, "bos_token": clip.START,
            "eos_token": clip.END, "pad_token": clip.END, "unk_token": clip.END, "add_prefix_space": False, "do_lower_case": True,
            "errors": "replace"},
        "scheduler/scheduler_config.json": diffusers("PNDMScheduler") | {
            "beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "clip_sample": False, "num_train_timesteps": 1000,
            "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}}
