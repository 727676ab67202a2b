"""A Stable Diffusion 1.x's parts from wherever they lie: the hub, a folder in its layout, a single file in
the original (CompVis) layout, the miniature. What is something else is refused in one line that says what."""
import os
import re
import timeit
import warnings
from collections import namedtuple
from contextlib import suppress
from functools import partial
from pathlib import Path

import huggingface_hub
import torch

import clip
import unet
import vae
from files import compvis
from files.checkpoints import PICKLES, Tensors, build, configure, require_settings
from files.disk import LoadError, read_json, refusing
from files.tokenizers import FILES, read_tokenizer, vocabulary_in

HERE = Path(__file__).parents[1]
HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# config() is SD 1.5's; prefix: of the keys in a single file; stem: of the weight files in a folder; the last
# two, as build()'s rename, name the keys of folders and, less their prefix, of single files
Part = namedtuple("Part", "kind config prefix stem name_in_folder name_in_file")
PARTS = {
    "vae": Part(vae.VAE, vae.VAEConfig, "first_stage_model.", "diffusion_pytorch_model",
                compvis.folder_vae_name, compvis.vae_name),
    "text_encoder": Part(clip.TextTransformer, clip.TextConfig, "cond_stage_model.transformer.", "model",
                         compvis.text_name, compvis.text_name),
    "unet": Part(unet.UNet, unet.UNetConfig, "model.diffusion_model.", "diffusion_pytorch_model",
                 str, compvis.unet_name)}
# what single files have besides: the noise schedule's tables, which follow from two numbers, the training's
# moving average, and what ComfyUI keeps of CLIP's comparison with pictures
EXTRAS = re.compile(r"(betas|alphas_cumprod(_prev)?|(sqrt|log_one_minus|posterior)_\w+)$|model_ema\."
                    r"|cond_stage_model\.(logit_scale|text_projection)$|logvar$")

# settings that leave the tensors' names and shapes as they are but change the result: what our code does
IMPLEMENTED = {
    "model_index.json": {},
    "scheduler/scheduler_config.json": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "unet/config.json": {"act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True,
                         "freq_shift": 0, "mid_block_scale_factor": 1, "downsample_padding": 1,
                         "resnet_time_scale_shift": "default", "num_attention_heads": None,
                         "time_embedding_act_fn": None, "timestep_post_act": None},
    "vae/config.json": {"act_fn": "silu", "shift_factor": None, "latents_mean": None},
    "text_encoder/config.json": {}}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": .00085, "beta_end": .012,
            "num_train_timesteps": 1000, "trained_betas": None}

LARGE = 5e8  # bytes of a UNet's files
AVERAGE = "model_ema.diffusion_model"  # whose keys have no dots
ONLY = "only Stable Diffusion 1.x is implemented"
WHOLE = "give a whole Stable Diffusion 1.x checkpoint"
INPAINTING = "a UNet with {} input channels, for inpainting or editing; give the text-to-image model"
# What a single file is, by a pattern that one of its keys begins with: whatever else is in it
OTHERS = {
    r"conditioner\.embedders\.": f"an SDXL model; {ONLY}",
    r"cond_stage_model\.model\.": f"a Stable Diffusion 2.x model; {ONLY}",
    r"(model\.diffusion_model\.)?(double|joint)_blocks\.": f"a diffusion transformer (SD 3, Flux); {ONLY}",
    r"lora_|.*[._]lora[._]": f"a LoRA, which changes a model and isn't one; {WHOLE}",
    r"control_model\.|controlnet_|input_hint_block\.": f"a ControlNet, which steers a model; {WHOLE}",
    r"emb_params$|string_to_param|clip_[gl]$|<.*>$": f"an embedding of a token, not a model; {WHOLE}"}
ALONE = {  # and a file that lacks more than one part, if it is none of those
    r"(model\.diffusion_model\.)?(down|input)_blocks\.": f"a UNet alone; {WHOLE}",
    r"(first_stage_model\.)?decoder\.": f"a VAE alone; {WHOLE}",
    r"(cond_stage_model\.transformer\.)?(text_model\.)?encoder\.layers\.": f"a text encoder alone; {WHOLE}"}


def device_and_dtype(device, dtype):
    """The torch.device and dtype to load to; None is what suits the machine. LoadError for no such device."""
    with refusing(f"device {device}: not available here"):
        device = torch.empty(0, device=device or torch.accelerator.current_accelerator(True) or "cpu").device
        if device.type == "meta":
            raise ValueError("it holds no numbers")
    if dtype is None and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype is None and device.type == "mps":
        dtype = torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return device, dtype or torch.float32


def bfloat16_is_faster():
    """Whether this CPU multiplies two matrices, of a UNet's sizes, clearly faster in bfloat16 than in
    float32: some do, with instructions for it (avx512_bf16, AMX), and on others it is many times slower."""
    def seconds(dtype):
        matrices = {"a": torch.ones(512, 320, dtype=dtype), "b": torch.ones(320, 640, dtype=dtype)}
        return min(timeit.repeat("a @ b", globals=matrices, repeat=5, number=1))
    return 1.3 * seconds(torch.bfloat16) < seconds(torch.float32)


def model_name(source):
    """`source`, for load_parts(), or "nano" if it is another way to write the miniature's folder."""
    return "nano" if Path(source).resolve() == HERE / "nano" else source


def load_parts(source, device, dtype):
    """(UNet, TextTransformer, Tokenizer, VAE) at `source`, which sd.load() describes, or LoadError."""
    given, (device, dtype) = dtype, device_and_dtype(device, dtype)
    name = str(source)
    path = HERE / "nano" if name == "nano" else Path(source)
    if name == "nano" or os.path.isdir(path):
        plans, vocabulary = from_folder(path, dtype)
    elif os.path.exists(path):
        plans, vocabulary = from_file(path)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (*PICKLES, ".safetensors"):
        plans, vocabulary = from_hub(name, dtype)
    else:
        raise LoadError(f"{name}: no such file or folder, and not a hub id, which looks like {HUB}")
    # what is small goes first, so that a wrong model is refused before its gigabytes are read
    text, width = plans["text_encoder"][0], plans["unet"][0].cross_attention_dim
    if text.hidden_size != width:
        raise LoadError(f"{name}: the text encoder is {text.hidden_size} wide, the UNet takes {width}")
    tokenizer = read_tokenizer(vocabulary, text, name)
    bytes_there = sum(os.path.getsize(file) for file in plans["unet"][1])
    if given is None and device.type == "cpu" and bytes_there > LARGE and bfloat16_is_faster():
        dtype = torch.bfloat16
    modules = {key: build(part.kind, *plans[key], device, dtype) for key, part in PARTS.items()}
    return modules["unet"], modules["text_encoder"], tokenizer, modules["vae"]


def download(source, *patterns):
    """`source` if it is a folder, else that of the hub repository's files that match `patterns`."""
    if os.path.isdir(source):
        return Path(source)
    with refusing(f"{source}: neither a folder here nor to be had from the hub; check the name and the "
                  "network, or download it elsewhere and give its folder"):
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(patterns)))


def from_hub(name, dtype):
    """from_folder() of what is needed of a hub repository, from the hub or its cache."""
    # the small files first, so that a wrong model is refused before its gigabytes are downloaded
    folder = download(name, *IMPLEMENTED, *(f"tokenizer/{file}" for file in FILES))
    folder_settings(folder)
    failure = None
    for endings in (some for variant in variants(dtype) for some in kinds_of(variant)):
        try:
            download(name, *(f"{key}/{part.stem}{end}" for key, part in PARTS.items() for end in endings))
        except LoadError as error:  # offline, it may be, with the other variant in the cache
            failure = error
        if all(weights(folder, part, dtype) for part in PARTS):
            return from_folder(folder, dtype)
    if failure:
        raise failure
    return from_folder(folder, dtype)  # which says what it lacks


def variants(dtype):
    """What weight files' names have before their ending, the one that suits this dtype first."""
    return (".fp16", "") if dtype.itemsize == 2 else ("", ".fp16")


def kinds_of(variant):
    """How the names of a whole file end, and of shards and their index."""
    indices = f".safetensors.index{variant}.json", f"{variant}.safetensors.index.json"
    return [f"{variant}.safetensors"], [f"{variant}-*-of-?????.safetensors", *dict.fromkeys(indices)]


def weights(folder, part, dtype):
    """The files with a part's weights, of the first of variants() that is there, or []: the shards that an
    index names, or else a whole file, or whatever shards there are."""
    for variant in variants(dtype):
        stem = PARTS[part].stem
        whole, sharded = ([file for end in ends for file in sorted((folder / part).glob(stem + end))]
                          for ends in kinds_of(variant))
        index = [file for file in sharded if file.suffix == ".json"]
        if whole and sharded:
            used = f"the shards that {index[0].name} names" if index else whole[0].name
            warnings.warn(f"{folder / part}: has a whole file and shards; {used} are read", stacklevel=2)
        if index:
            with refusing(f"{index[0]}: no index of shards"):
                names = set(read_json(index[0])["weight_map"].values())
                whole = [index[0].with_name(name) for name in sorted(names)]
            if lost := [file.name for file in whole if not file.is_file()]:
                raise LoadError(f"{index[0]}: names {lost[0]}, which is not there")
        if whole or sharded:
            return whole or sharded
    return []


def from_folder(folder, dtype):
    """Part -> its config, files and rename for build(), and the vocabulary's files, in the hub's layout."""
    settings = folder_settings(folder)
    files = {part: weights(folder, part, dtype) for part in PARTS}
    vocabulary = vocabulary_in(folder / "tokenizer")
    missing = [file for file in (f"{part}/config.json" for part in PARTS) if file not in settings]
    for part in (part for part in PARTS if not files[part]):
        others = ", ".join(sorted(file.name for file in (folder / part).glob("*.safetensors")))
        missing.append(f"{part}/{PARTS[part].stem}.safetensors" + (f" (not {others})" if others else ""))
    missing += [] if vocabulary else ["tokenizer/vocab.json and merges.txt"]
    if missing:
        single = [] if any(files.values()) else [file.name for file in folder.glob("*.safetensors")]
        hint = ("; make it with nano/training/pretrain.py" if folder == HERE / "nano"
                else f"; if {single[0]} is a whole model, give its path" if single
                else "; pickles (.bin) are not read" if any(folder.glob("*/*.bin")) else "")
        raise LoadError(f"{folder}: not a complete Stable Diffusion, it lacks {', '.join(missing)}{hint}")
    plans = {}
    for key, part in PARTS.items():
        file = f"{key}/config.json"
        config = configure(part.config(), settings[file], folder / file)
        plans[key] = config, files[key], part.name_in_folder
    return plans, vocabulary


def folder_settings(folder):
    """IMPLEMENTED's files in a folder -> their settings. LoadError for another family, which it names."""
    settings = {name: read_json(folder / name) for name in IMPLEMENTED if (folder / name).is_file()}
    pipeline, network = settings.get("model_index.json", {}), settings.get("unet/config.json", {})
    width, heads = network.get("cross_attention_dim"), network.get("attention_head_dim")
    channels = network.get("in_channels", 4)
    parts = {name for name, kind in pipeline.items() if kind not in (None, [None, None])}
    xl = "text_encoder_2" in parts or network.get("addition_embed_type") or width == 2048
    for other, family in (
            ("transformer" in parts, f"a diffusion transformer ({pipeline.get('_class_name')}); {ONLY}"),
            (xl, f"an SDXL model; {ONLY}"),
            (width == 1024 or isinstance(heads, list), f"a Stable Diffusion 2.x model; {ONLY}"),
            (channels != network.get("out_channels", 4), INPAINTING.format(channels))):
        if other:
            raise LoadError(f"{folder}: {family}")
    for name, found in settings.items():
        require_settings(found, IMPLEMENTED[name], folder / name)
    schedule = settings.get("scheduler/scheduler_config.json", {})
    unusual = [f"{key} {value!r}" for key, value in schedule.items() if value != SCHEDULE.get(key, value)]
    if unusual:
        warnings.warn(f"{folder}/scheduler: {', '.join(unusual)} is not Stable Diffusion 1.5's noise "
                      "schedule, which is used here all the same", stacklevel=1)
    if (kind := schedule.get("_class_name")) in ("LCMScheduler", "TCDScheduler"):
        warnings.warn(f"{folder}: made for {kind}, to be sampled in few steps; give --sampler lcm",
                      stacklevel=1)
    return settings


def from_file(file):
    """As from_folder(), for a single file with the vocabulary beside it or from the hub. The UNet may be its
    moving average. LoadError for a file of another kind, which it names."""
    tensors = Tensors(file)
    note, shapes = tensors.note, tensors.shapes
    parts = dict(PARTS)
    if not any(key.startswith(PARTS["unet"].prefix) for key in shapes):
        parts["unet"] = PARTS["unet"]._replace(prefix=AVERAGE, name_in_file=compvis.averaged_name)
    prefixes = tuple(part.prefix for part in parts.values())
    lacking = [name for name, part in parts.items() if not any(key.startswith(part.prefix) for key in shapes)]
    kinds = OTHERS | (ALONE if len(lacking) > 1 else {})
    what = [what for pattern, what in kinds.items() if any(re.match(pattern, key) for key in shapes)]
    if len(lacking) == 1:
        what.append(f"a Stable Diffusion without its {lacking[0]} ({PARTS[lacking[0]].prefix}…); {WHOLE}")
    if lacking:
        what.append(f"no model known here (a tensor of it: {next(iter(shapes), None)}); {WHOLE}")
    if what:
        raise LoadError(f"{file}: {what[0]}")
    if predicts_v(file, note, shapes):
        raise LoadError(f"{file}: a model that predicts v; only one that predicts the noise is implemented")
    channels = shapes.get("model.diffusion_model.input_blocks.0.0.weight", ())[1:2]
    if channels not in ((4,), ()):
        raise LoadError(f"{file}: {INPAINTING.format(*channels)}")

    def rename(part, key):
        if key.startswith(part.prefix):
            return part.name_in_file(key.removeprefix(part.prefix))
        if not key.startswith(prefixes) and not EXTRAS.match(key):
            raise KeyError(key)
        return None
    plans = {key: (part.config(), [file], partial(rename, part)) for key, part in parts.items()}
    beside = vocabulary_in(file.parent) or vocabulary_in(file.parent / "tokenizer")
    return plans, beside or fetch_vocabulary(file)


def predicts_v(file, note, keys):
    """Whether a single file says that it predicts v: in its metadata, by a key, or in the .yaml beside it."""
    settings, said = file.with_suffix(".yaml"), ""
    if settings.is_file():
        with open(settings, "rb") as f:
            said = f.read(100_000).decode(errors="replace")
    return (note.get("modelspec.prediction_type", "") in ("v", "v_prediction") or "v_pred" in keys
            or re.search(r"parameterization:\s*[\"']?v\b", said) is not None)


def fetch_vocabulary(file):
    """The vocabulary of all Stable Diffusion 1.x, from the hub's cache or, failing that, from the hub."""
    for offline in (True, False):
        fetch = partial(huggingface_hub.hf_hub_download, HUB, subfolder="tokenizer", local_files_only=offline)
        with suppress(Exception):  # the hub's, the network's and the disk's have no base in common
            return [Path(fetch(name)) for name in ("vocab.json", "merges.txt")]
    address = f"https://huggingface.co/{HUB}/tree/main/tokenizer"
    raise LoadError(f"{file}: the tokenizer's files are not here and the hub is out of reach; "
                    f"put vocab.json and merges.txt from {address} into {file.parent}")
