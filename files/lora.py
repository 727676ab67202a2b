"""LoRA files: a person for other programs, and other people's LoRAs for ours. Both are low-rank adapters, so
every conversion is a renaming and a transposition: nothing is approximated."""
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from torch import nn

from adapters import LowRank, require_low_rank
from files.checkpoints import Tensors, check_numbers, write
from files.compvis import unet_to_compvis
from files.disk import read_text, refusing
from program.console import UserError

# how names of convolutions end, by their kernel's side
KERNELS = {1: (".proj_in", ".proj_out", ".conv_shortcut"),
           3: (".conv", ".conv1", ".conv2", ".conv_in", ".conv_out")}
PREFIXES = {"unet": "unet", "text": "text_encoder"}         # diffusers' names of the two parts

# From a key as kohya's scripts, diffusers (its layers were once X.processor.to_q and self_attn.to_q) or PEFT
# write it, or our name, to layer:role, by these in order. transformers 5 has no text_model.
RENAMES = {
    r"\.alpha$": ":alpha", r"[._]lora(_linear_layer)?[._](down|up)\.weight$": r":\2",
    r"\.lora_A(\.[^.]+)?\.weight$": ":down", r"\.lora_B(\.[^.]+)?\.weight$": ":up", r"\.processor\.": ".",
    r"_orig_mod[._]": "",  # of a compiled module
    r"\.to_out:": ".to_out.0:", r"self_attn\.to_(q|k|v|out)(\.0)?:": r"self_attn.\1_proj:",
    # any number of wrappers around the two parts
    r"^((unet|text|text_encoders?|base_model|model|diffusion_model|clip_l|transformer)\.|"
    r"(lora_unet|lora_te1?|lycoris|unet|wrapped|0|transformer|text_encoder)_)*(text_model[._])?": "",
    r"\.": "_"}
FOREIGN = {  # what is not the sum of a model and a plain LoRA of SD 1.x's layers, by a pattern in its keys
    r"^lora_te2_|^text_encoder_2\.|label_emb|add_embedding|(1|s[._]\d)[._]transformer_blocks[._][1-9]":
        "a LoRA for SDXL",
    r"motion_modules|temporal_transformer": "an AnimateDiff motion LoRA, for videos",
    r"lora_unet_(double|single|joint)_|transformer\.(single_)?transformer_": "a diffusion transformer's LoRA",
    r"\.hada_|\.lokr_|\.oft_|\.(a1|b1|on_input)\b|\.boft_": "LoHa, LoKr, OFT or (IA)³, not LoRA",
    r"dora_scale|lora_magnitude_vector": "DoRA, not LoRA",
    r"\.lora_mid\.|\.diff$|\.diff_b$|\.[bw]_norm$": "LyCORIS with more than plain LoRA",
    r"^bundle_emb\.": "a LoRA with an embedding bundled in, which is not implemented",
    r"^string_to_param|^[^.]*$": "an embedding, which is given as the person, not a LoRA",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.(?!.*lora)": "a whole model, not a LoRA"}
# PEFT's settings of what is a plain LoRA on weights that are as they were: others change the base as well
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "bias": ("none",), **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), (False,)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "target_parameters", "arrow_config",
                     "trainable_token_indices", "alora_invocation_tokens"), (None, [], {}))}


def export_lora(adapters, path, metadata=None, dtype=torch.float32):
    """Write one person's adapters as a plain LoRA, with kohya's names, that diffusers, ComfyUI and A1111
    read. Nothing is lost: one fine-tuned at rank r becomes a LoRA of rank 1 + r. (float16 would change the
    UNet's output by a few 10⁻⁴.) Where layers differ in rank, zeros fill up: diffusers 0.35 to 0.42 takes one
    alpha for all. ValueError for several people's or other adapters, UserError for what dtype can't hold."""
    tensors, rank = {}, max((a.shape[2] for a, _ in require_low_rank(adapters, people=1).values()), default=0)
    for name, (a, b) in adapters.items():
        key = "lora_" + re.sub("^text", "te", name).replace(".", "_")
        side = next((side for side, ends in KERNELS.items() if name.endswith(ends)), None)
        kernel, one = ((side, side), (1, 1)) if side else ((), ())
        down = F.pad(a[0].T, (0, 0, 0, rank - a.shape[2]))    # (r, in), of convolutions (r, in, k, k)
        up = F.pad(b[0].T, (0, rank - b.shape[1]))            # (out, r), of convolutions (out, r, 1, 1)
        tensors[f"{key}.lora_down.weight"] = down.to(dtype).unflatten(1, (-1, *kernel))
        tensors[f"{key}.lora_up.weight"] = up.to(dtype).unflatten(1, (-1, *one))
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))   # readers multiply by alpha / r
    check_numbers(tensors, path, "nothing to write, the person has no personal weights")
    note = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank,
            "ss_base_model_version": "sd_v1"} | (metadata or {})
    write(tensors, path, {key: str(value) for key, value in note.items()})


def load_lora(path, model, strength=1.0):
    """Somebody's LoRA for SD 1.x, by kohya's scripts, diffusers or PEFT -> layer -> LowRank, float32, on the
    device of `model`: strength · alpha / r · up · down, alpha = r where none is given. UserError for keys
    that aren't understood or don't fit: they would otherwise be dropped without a word."""
    file = Tensors(path)
    found = keys_of_layers(path, file.outlines(), model)
    tensors, adapters = file.all(), {}  # only now is read what may be large
    ranks = {name: len(tensors[keys["down"]]) for name, keys in found.items()}
    scales = peft_scales(path, file.note, tensors, ranks)
    for name, keys in found.items():
        a, b = (tensors[keys[role]].float().flatten(1).T[None].to(model.device) for role in ("down", "up"))
        if "alpha" in keys:
            scales[name] = tensors[keys["alpha"]].item() / ranks[name]
        adapters[name] = LowRank(a, b * (strength * scales[name]))
    numbers = {key: t.float() if key.endswith(".alpha") else t for key, t in tensors.items()}
    check_numbers(numbers | {f"{name}, scaled,": b for name, (_, b) in adapters.items()}, path, "empty")
    return adapters


def keys_of_layers(path, tensors, model):
    """Layer -> role -> key of each of these tensors, without numbers: a layer's matrices "down" and "up", and
    its "alpha". UserError where they are something else, or don't fit the layers."""
    for pattern, what in FOREIGN.items():
        report_problems(path, {what: [key for key in tensors if re.search(pattern, key)]})
    layers, roles = adaptable_layers(model.unet, model.text), ("down", "up", "alpha")
    known = [name for name, m in model.layers.items() if hasattr(m, "weight")]
    places = {normalised(f"{called}:{role}"): (name, role) for name in known for role in roles
              for called in (name, unet_to_compvis(name.removeprefix("unet.")))}  # or as in single files
    problems, found = defaultdict(list), defaultdict(dict)  # what -> keys, layer -> role -> key
    for key, t in tensors.items():
        name, role = places.get(normalised(key), (None, None))
        if name is None:
            problems["layers that this model doesn't have, or no LoRA"].append(key)
        elif name not in layers:
            problems["neither linear nor convolutions"].append(key)
        elif role in found[name]:
            problems["the same layer twice"].append(key)
        elif role == "alpha" and t.numel() != 1:
            problems["an alpha that is no number"].append(key)
        else:
            found[name][role] = key

    # the matrices fit one another and the layer
    for name, keys in found.items():
        if not {"down", "up"} <= keys.keys():
            problems["one matrix without the other"] += keys.values()
            continue
        down, up = tensors[keys["down"]], tensors[keys["up"]]
        n_out, n_in, *kernel = layers[name].weight.shape
        rank = max([1, *down.shape[:1]])
        if [matrix(down.shape), matrix(up.shape)] != [matrix((rank, n_in, *kernel)), (n_out, rank)]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)} for a layer {n_in} → {n_out}"
            problems["made for other widths"].append(f"{keys['down']} and up, {shapes}")
    report_problems(path, problems)
    return found


def matrix(shape):
    """The shape without the sides of a 1×1 kernel, which some write of linear layers and some leave out."""
    return tuple(shape[:2] if set(shape[2:]) == {1} else shape)


def adaptable_layers(unet, text):
    """Every layer that can take a low-rank adapter: name -> nn.Linear or nn.Conv2d."""
    return {f"{part}.{name}": layer for part, network in (("unet", unet), ("text", text))
            for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def report_problems(path, problems):
    """UserError that lists `problems`, a dict of what -> keys, if there are any."""
    listed = [f"{what}: {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if keys[5:] else "")
              for what, keys in problems.items() if keys]
    if listed:
        raise UserError(f"{path}: {'; '.join(listed)}")


def normalised(key):
    """A key of any program's as layer:role; if it is none of a LoRA, as something that no layer is called."""
    for pattern, ours in RENAMES.items():
        key = re.sub(pattern, ours, key)
    return key


def peft_scales(path, note, tensors, ranks):
    """Layer -> its residual's scale by PEFT's LoraConfig, alpha / r or, rank-stabilised, alpha / √r; else 1.
    diffusers has it in the metadata, its keys after "unet." or "text_encoder." if a pipeline wrote it,
    PEFT in adapter_config.json, without which its files can't be read: alpha is in no tensor."""
    file, kept, scales = Path(path).with_name("adapter_config.json"), note.get("lora_adapter_metadata"), {}
    with refusing(f"{path}: PEFT's settings make no sense or are not readable, in its metadata or in "
                  f"{file.name} beside it"):
        if kept is None and any(key.startswith("base_model.model.") for key in tensors):
            kept = read_text(file)
        config = {} if kept is None else dict(json.loads(kept))
        for part in {name.split(".")[0] for name in ranks}:
            check_plain(config, PREFIXES[part])
            patterns, usual, stabilised = (config.get(f"{PREFIXES[part]}.{key}", config.get(key))
                                           for key in ("alpha_pattern", "lora_alpha", "use_rslora"))
            special = compiled(patterns or {})
            for name, rank in ((name, rank) for name, rank in ranks.items() if name.startswith(part)):
                layer = name.removeprefix(f"{part}.")
                names = layer, layer.removeprefix("text_model.")  # which transformers 5 leaves out
                alpha = next((v for pattern, v in special if any(map(pattern.fullmatch, names))), usual)
                scales[name] = 1. if alpha is None else float(alpha / (rank ** .5 if stabilised else rank))
    return scales


def check_plain(config, prefix):
    """ValueError for a setting in PEFT's `config`, where it may have a prefix, of what is not in PLAIN."""
    for key, plain_ones in PLAIN.items():
        value = config.get(f"{prefix}.{key}", config.get(key, plain_ones[0]))
        if not any(value == one and type(value) is type(one) for one in plain_ones):
            raise ValueError(f"{key} is {value!r}, so it is more than a plain LoRA, or its base was changed")


def compiled(patterns):
    """PEFT's patterns, a dict of regular expressions -> value, that mean all of a layer's name or its end
    after a dot: pairs of the same, compiled. ValueError for what is more than a name with numbers left open:
    only what has no choice to take back is matched in no time."""
    if len(patterns) > 1000:
        raise ValueError(f"{len(patterns)} patterns are too many")
    for pattern in patterns:
        if not re.fullmatch(r"\^?([\w.-]|\\[.d-]|\\d\+(?!\\d)|\[0-9\])*\$?", pattern) or len(pattern) > 200:
            raise ValueError(f"the pattern {pattern[:50]!r} is too involved")
    return [(re.compile(rf"(.*\.)?({pattern})"), value) for pattern, value in patterns.items()]
