"""Export a person as a LoRA for other programs, and load LoRAs of others. Both sides are low-rank adapters,
so a conversion renames and transposes tensors and approximates nothing."""
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

# side of a convolution's kernel -> how its name ends
KERNELS = {1: (".proj_in", ".proj_out", ".conv_shortcut"),
           3: (".conv", ".conv1", ".conv2", ".conv_in", ".conv_out")}
PREFIXES = {"unet": "unet", "text": "text_encoder"}         # our and diffusers' names of the two parts

# In this order, these turn a key of kohya's scripts, diffusers (whose layers were once X.processor.to_q and
# self_attn.to_q) or PEFT, or our name, into layer:role. transformers 5 has no text_model.
RENAMES = {
    r"\.alpha$": ":alpha", r"[._]lora(_linear_layer)?[._](down|up)\.weight$": r":\2",
    r"\.lora_A(\.[^.]+)?\.weight$": ":down", r"\.lora_B(\.[^.]+)?\.weight$": ":up", r"\.processor\.": ".",
    r"_orig_mod[._]": "",  # from torch.compile
    r"\.to_out:": ".to_out.0:", r"self_attn\.to_(q|k|v|out)(\.0)?:": r"self_attn.\1_proj:",
    # any number of wrappers around the two parts
    r"^((unet|text|text_encoders?|base_model|model|diffusion_model|clip_l|transformer)\.|"
    r"(lora_unet|lora_te1?|lycoris|unet|wrapped|0|transformer|text_encoder)_)*(text_model[._])?": "",
    r"\.": "_"}
FOREIGN = {  # pattern in a key -> what the file is, if not a plain LoRA of SD 1.x's layers
    r"^lora_te2_|^text_encoder_2\.|label_emb|add_embedding|(1|s[._]\d)[._]transformer_blocks[._][1-9]":
        "a LoRA for SDXL",
    r"motion_modules|temporal_transformer": "an AnimateDiff motion LoRA, for videos",
    r"lora_unet_(double|single|joint)_|transformer\.(single_)?transformer_": "a diffusion transformer's LoRA",
    r"\.hada_|\.lokr_|\.oft_|\.(a1|b1|on_input)\b|\.boft_": "LoHa, LoKr, OFT or (IA)³, not LoRA",
    r"dora_scale|lora_magnitude_vector": "DoRA, not LoRA",
    r"\.lora_mid\.|\.diff$|\.diff_b$|\.[bw]_norm$": "LyCORIS with more than plain LoRA",
    r"^bundle_emb\.": "a LoRA with an embedding bundled in, which is not implemented",
    r"^string_to_param|^[^.]*$": "an embedding, not a LoRA; give it as the person",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.(?!.*lora)": "a whole model, not a LoRA"}
# PEFT's settings of a plain LoRA -> the values that leave the base weights as they were
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "bias": ("none",), **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), (False,)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "target_parameters", "arrow_config",
                     "trainable_token_indices", "alora_invocation_tokens"), (None, [], {}))}


def export_lora(adapters, path, metadata=None):
    """Write one person's low-rank adapters as a plain LoRA in float32, with kohya's names, for diffusers,
    ComfyUI and A1111. Nothing is lost: a prediction and a LoRA of rank r become a LoRA of rank 1 + r. Layers
    of lower rank are padded with zeros, because diffusers 0.35 to 0.42 takes one alpha for all layers.
    ValueError for adapters of several people or another kind, UserError for none and for NaN or infinity."""
    tensors, rank = {}, max((a.shape[2] for a, _ in require_low_rank(adapters, people=1).values()), default=0)
    for name, (a, b) in adapters.items():
        key = "lora_" + re.sub("^text", "te", name).replace(".", "_")
        side = next((side for side, ends in KERNELS.items() if name.endswith(ends)), None)
        kernel, one = ((side, side), (1, 1)) if side else ((), ())
        down = F.pad(a[0].T, (0, 0, 0, rank - a.shape[2]))    # (r, in), of convolutions (r, in, k, k)
        up = F.pad(b[0].T, (0, rank - b.shape[1]))            # (out, r), of convolutions (out, r, 1, 1)
        tensors[f"{key}.lora_down.weight"] = down.float().unflatten(1, (-1, *kernel))
        tensors[f"{key}.lora_up.weight"] = up.float().unflatten(1, (-1, *one))
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))   # readers multiply by alpha / r
    check_numbers(tensors, path, "nothing to write, the person has no personal weights")
    note = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank,
            "ss_base_model_version": "sd_v1"} | (metadata or {})
    write(tensors, path, {key: str(value) for key, value in note.items()})


def load_lora(path, model, strength=1.0):
    """A LoRA for SD 1.x by kohya's scripts, diffusers or PEFT, as layer -> LowRank, in float32 on the device
    of `model`: ΔW = strength · alpha / r · up · down, with alpha = r if none is given. UserError for keys
    that are unknown or do not fit; none is dropped silently."""
    file = Tensors(path)
    found = keys_of_layers(path, file.outlines(), model)
    tensors, adapters = file.all(), {}  # large tensors are read only now, after the checks
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
    """Layer -> role -> key, for the matrices "down" and "up" and the "alpha" of a LoRA whose `tensors` may be
    on the meta device. UserError for keys of something else and for shapes that do not fit the layers."""
    for pattern, what in FOREIGN.items():
        report_problems(path, {what: [key for key in tensors if re.search(pattern, key)]})
    layers, roles = adaptable_layers(model), ("down", "up", "alpha")
    known = [name for name, m in model.layers.items() if hasattr(m, "weight")]
    places = {normalised(f"{called}:{role}"): (name, role) for name in known for role in roles
              for called in (name, unet_to_compvis(name.removeprefix("unet.")))}  # in both layouts
    problems, found = defaultdict(list), defaultdict(dict)  # problem -> keys, layer -> role -> key
    for key, t in tensors.items():
        name, role = places.get(normalised(key), (None, None))
        if name is None:
            problems["not LoRA weights of a layer that this model has"].append(key)
        elif name not in layers:
            problems["neither linear layers nor convolutions"].append(key)
        elif role in found[name]:
            problems["the same layer twice"].append(key)
        elif role == "alpha" and t.numel() != 1:
            problems["an alpha that is no number"].append(key)
        else:
            found[name][role] = key

    # Do the two matrices fit each other and the layer?
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
    """The shape without a 1×1 kernel, which some programs write for linear layers and others leave out."""
    return tuple(shape[:2] if set(shape[2:]) == {1} else shape)


def adaptable_layers(model):
    """Every layer that can take a low-rank adapter: name -> nn.Linear or nn.Conv2d."""
    return {name: layer for name, layer in model.layers.items() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def report_problems(path, problems):
    """UserError that lists `problems`, a dict problem -> keys, if there are any."""
    listed = [f"{what}: {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if keys[5:] else "")
              for what, keys in problems.items() if keys]
    if listed:
        raise UserError(f"{path}: {'; '.join(listed)}")


def normalised(key):
    """A key of any program as layer:role; if it belongs to no LoRA, as a name that no layer has."""
    for pattern, ours in RENAMES.items():
        key = re.sub(pattern, ours, key)
    return key


def peft_scales(path, note, tensors, ranks):
    """Layer -> scale of its ΔW by PEFT's LoraConfig: alpha / r or, rank-stabilised, alpha / √r; without a
    config 1. diffusers keeps the config in the metadata; if a pipeline wrote it, its keys begin with "unet."
    or "text_encoder.". PEFT keeps it in adapter_config.json, which its files need: no tensor has alpha."""
    file, kept, scales = Path(path).with_name("adapter_config.json"), note.get("lora_adapter_metadata"), {}
    with refusing(f"{path}: PEFT's settings, in its metadata or in {file.name} beside it, cannot be used"):
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
                names = layer, layer.removeprefix("text_model.")  # transformers 5 leaves it out
                alpha = next((v for pattern, v in special if any(map(pattern.fullmatch, names))), usual)
                scales[name] = 1. if alpha is None else float(alpha / (rank ** .5 if stabilised else rank))
    return scales


def check_plain(config, prefix):
    """ValueError for a setting in PEFT's `config`, with or without the prefix, that is not in PLAIN."""
    for key, plain_ones in PLAIN.items():
        value = config.get(f"{prefix}.{key}", config.get(key, plain_ones[0]))
        if not any(value == one and type(value) is type(one) for one in plain_ones):
            raise ValueError(f"{key} is {value!r}: more than a plain LoRA, or its base model was changed")


def compiled(patterns):
    """[(compiled pattern, value)] from PEFT's dict of regular expressions, which match a layer's whole name
    or its end after a dot. ValueError unless a pattern is a name in which digits may be left open: such a
    pattern needs no backtracking, so it cannot run for ever."""
    if len(patterns) > 1000:
        raise ValueError(f"{len(patterns)} patterns are too many; at most 1000")
    for pattern in patterns:
        if not re.fullmatch(r"\^?([\w.-]|\\[.d-]|\\d\+(?!\\d)|\[0-9\])*\$?", pattern) or len(pattern) > 200:
            raise ValueError(f"the pattern {pattern[:50]!r} is too involved")
    return [(re.compile(rf"(.*\.)?({pattern})"), value) for pattern, value in patterns.items()]
