"""Load the parts of a Stable Diffusion 1.x from the hub, a folder in the hub's layout, a single file in the
original (CompVis) layout, or nano/. Anything else is refused in one line that names what it is."""
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
# config() is that of SD 1.5; prefix: of keys in a single file; stem: of weight files in a folder. The last
# two are build()'s rename: for keys in folders, and for keys in single files without their prefix
Part = namedtuple("Part", "kind config prefix stem name_in_folder name_in_file")
PARTS = {
    "vae": Part(vae.VAE, vae.VAEConfig, "first_stage_model.", "diffusion_pytorch_model",
                compvis.folder_vae_name, compvis.vae_name),
    "text_encoder": Part(clip.TextTransformer, clip.TextConfig, "cond_stage_model.transformer.", "model",
                         compvis.text_name, compvis.text_name),
    "unet": Part(unet.UNet, unet.UNetConfig, "model.diffusion_model.", "diffusion_pytorch_model",
                 str, compvis.unet_name)}
# Keys of single files that are not needed: tables of the noise schedule, the moving average of the training,
# and what ComfyUI keeps of CLIP
EXTRAS = re.compile(r"(betas|alphas_cumprod(_prev)?|(sqrt|log_one_minus|posterior)_\w+)$|model_ema\."
                    r"|cond_stage_model\.(logit_scale|text_projection)$|logvar$")

# Settings that change the result but no tensor's name or shape -> the only value that is implemented
IMPLEMENTED = {
    "model_index.json": {},
    "scheduler/scheduler_config.json": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "unet/config.json": {"act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True,
                         "freq_shift": 0, "mid_block_scale_factor": 1, "downsample_padding": 1,
                         "resnet_time_scale_shift": "default", "num_attention_heads": None,
                         "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
                         "time_embedding_act_fn": None, "timestep_post_act": None},
    "vae/config.json": {"act_fn": "silu", "shift_factor": None, "latents_mean": None},
    "text_encoder/config.json": {}}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": .00085, "beta_end": .012,
            "num_train_timesteps": 1000, "trained_betas": None}

LARGE = 5e8  # bytes of a UNet's files
ONLY = "only Stable Diffusion 1.x is implemented"
WHOLE = "give a whole Stable Diffusion 1.x checkpoint"
INPAINTING = "a UNet with {} input channels, for inpainting or editing; give the text-to-image model"
GUIDED = ("a UNet that takes the guidance scale as an input, as latent consistency models do; give the model "
          "that it was made from, with an LCM-LoRA (--lora FILE --sampler lcm)")
# Pattern at the start of a key -> what the single file is, whatever else it contains
OTHERS = {
    r"conditioner\.embedders\.": f"an SDXL model; {ONLY}",
    r"cond_stage_model\.model\.": f"a Stable Diffusion 2.x model; {ONLY}",
    r"(model\.diffusion_model\.)?(double|joint)_blocks\.": f"a diffusion transformer (SD 3, Flux); {ONLY}",
    r"lora_|.*[._]lora[._]": f"a LoRA, not a model; {WHOLE}",
    r"model\.diffusion_model\.time_embed\.cond_proj\.": GUIDED,
    r"control_model\.|controlnet_|input_hint_block\.": f"a ControlNet, not a model; {WHOLE}",
    r"emb_params$|string_to_param|clip_[gl]$|<.*>$": f"an embedding of a token, not a model; {WHOLE}"}
ALONE = {  # the same for a file that lacks more than one part
    r"(model\.diffusion_model\.)?(down|input)_blocks\.": f"a UNet alone; {WHOLE}",
    r"(first_stage_model\.)?decoder\.": f"a VAE alone; {WHOLE}",
    r"(cond_stage_model\.transformer\.)?(text_model\.)?encoder\.layers\.": f"a text encoder alone; {WHOLE}"}


def device_and_dtype(device, dtype):
    """The torch.device and dtype to load to. None: the accelerator, else the CPU, and a dtype that is fast on
    it. LoadError for a device that is not available."""
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
    """Whether this CPU multiplies matrices of a UNet's sizes clearly faster in bfloat16 than in float32. CPUs
    with instructions for it (avx512_bf16, AMX) do; on others bfloat16 is many times slower."""
    def seconds(dtype):
        matrices = {"a": torch.ones(512, 320, dtype=dtype), "b": torch.ones(320, 640, dtype=dtype)}
        return min(timeit.repeat("a @ b", globals=matrices, repeat=5, number=1))
    return 1.3 * seconds(torch.bfloat16) < seconds(torch.float32)


def model_name(source):
    """"nano" if `source` is a path of nano's folder, else `source`."""
    return "nano" if Path(source).resolve() == HERE / "nano" else source


def load_parts(source, device, dtype):
    """(UNet, TextTransformer, Tokenizer, VAE) from `source`, for which see sd.load(). LoadError."""
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
        raise LoadError(f"{name}: no such file or folder, and not a hub id such as {HUB}")
    # Small files are checked first, so that a wrong model is refused before its gigabytes are read
    text, width = plans["text_encoder"][0], plans["unet"][0].cross_attention_dim
    if text.hidden_size != width:
        raise LoadError(f"{name}: the text encoder is {text.hidden_size} wide, but the UNet takes {width}")
    tokenizer = read_tokenizer(vocabulary, text, name)
    size = sum(os.path.getsize(file) for file in plans["unet"][1])
    if given is None and device.type == "cpu" and size > LARGE and bfloat16_is_faster():
        dtype = torch.bfloat16
    layouts = dict.fromkeys(PARTS, torch.channels_last)
    if device.type == "cpu" and dtype == torch.float32 and size > LARGE:
        # over 512×512 channels-last pixels PyTorch's group norm is 4e-5 off, which half precision hides
        layouts["vae"] = torch.contiguous_format
    modules = {key: build(part.kind, *plans[key], device, dtype, layout=layouts[key])
               for key, part in PARTS.items()}
    return modules["unet"], modules["text_encoder"], tokenizer, modules["vae"]


def download(source, *patterns):
    """`source` if it is a folder; else the cache's folder with the files of that hub repository that match
    `patterns`. LoadError if they cannot be downloaded."""
    if os.path.isdir(source):
        return Path(source)
    with refusing(f"{source}: not a folder here, and the hub did not deliver it; check the name and the "
                  "network, or download it elsewhere and give its folder"):
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(patterns)))


def from_hub(name, dtype):
    """from_folder() of the needed files of a hub repository, downloaded or from the cache."""
    # Small files come first, so that a wrong model is refused before its gigabytes are downloaded
    folder = download(name, *IMPLEMENTED, *(f"tokenizer/{file}" for file in FILES))
    folder_settings(folder)
    failure = None
    for endings in (some for variant in variants(dtype) for some in kinds_of(variant)):
        try:
            download(name, *(f"{key}/{part.stem}{end}" for key, part in PARTS.items() for end in endings))
        except LoadError as error:  # offline, the cache may still hold the other variant
            failure = error
        if all(weights(folder, part, dtype) for part in PARTS):
            break
    else:
        if failure:
            raise failure
    return from_folder(folder, dtype)  # LoadError if files are missing


def variants(dtype):
    """Infixes of weight files, the one for this dtype first."""
    return (".fp16", "") if dtype.itemsize == 2 else ("", ".fp16")


def kinds_of(variant):
    """What follows the stem, as patterns: in a whole file's name; in those of shards and their index."""
    indices = f".safetensors.index{variant}.json", f"{variant}.safetensors.index.json"
    return [f"{variant}.safetensors"], [f"{variant}-*-of-?????.safetensors", *dict.fromkeys(indices)]


def weights(folder, part, dtype):
    """The weight files of a part, of the first variant there is: an index's, a whole file, or all shards."""
    for variant in variants(dtype):
        stem = PARTS[part].stem
        whole, sharded = ([file for end in ends for file in sorted((folder / part).glob(stem + end))]
                          for ends in kinds_of(variant))
        index = [file for file in sharded if file.suffix == ".json"]
        if whole and sharded:
            used = f"the shards that {index[0].name} names are" if index else f"{whole[0].name} is"
            warnings.warn(f"{folder / part}: has a whole file and shards; {used} read", stacklevel=2)
        if index:
            with refusing(f"{index[0]}: not an index of shards"):
                names = set(read_json(index[0])["weight_map"].values())
                whole = [index[0].with_name(name) for name in sorted(names)]
            if lost := [file.name for file in whole if not file.is_file()]:
                raise LoadError(f"{index[0]}: names {lost[0]}, which is missing; download it too")
        if whole or sharded:
            return whole or sharded
    return []


def from_folder(folder, dtype):
    """(plans, vocabulary) of a folder in the hub's layout. plans: part -> (config, files, rename) for
    build(); vocabulary: the tokenizer's files. LoadError if files are missing."""
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
    configs = {key: configure(part.config(), settings[f"{key}/config.json"], folder / key / "config.json")
               for key, part in PARTS.items()}
    return {key: (configs[key], files[key], part.name_in_folder) for key, part in PARTS.items()}, vocabulary


def folder_settings(folder):
    """File -> settings, for those files of IMPLEMENTED that the folder has. LoadError for a model of another
    family, which it names, and for a setting that is not implemented."""
    settings = {name: read_json(folder / name) for name in IMPLEMENTED if (folder / name).is_file()}

    # Another family?
    pipeline, network = settings.get("model_index.json", {}), settings.get("unet/config.json", {})
    width, heads = network.get("cross_attention_dim"), network.get("attention_head_dim")
    channels = network.get("in_channels", 4)
    parts = {name for name, kind in pipeline.items() if kind not in (None, [None, None])}
    xl = "text_encoder_2" in parts or network.get("addition_embed_type") or width == 2048
    for other, family in (
            ("transformer" in parts, f"a diffusion transformer ({pipeline.get('_class_name')}); {ONLY}"),
            (xl, f"an SDXL model; {ONLY}"),
            (network.get("time_cond_proj_dim"), GUIDED),
            (width == 1024 or isinstance(heads, list), f"a Stable Diffusion 2.x model; {ONLY}"),
            (channels != network.get("out_channels", 4), INPAINTING.format(channels))):
        if other:
            raise LoadError(f"{folder}: {family}")

    # Settings that are not implemented are errors; another schedule is a warning
    for name, found in settings.items():
        require_settings(found, IMPLEMENTED[name], folder / name)
    schedule = settings.get("scheduler/scheduler_config.json", {})
    unusual = [f"{key} {value!r}" for key, value in schedule.items() if value != SCHEDULE.get(key, value)]
    if unusual:
        warnings.warn(f"{folder}/scheduler: {', '.join(unusual)} is not Stable Diffusion 1.5's noise "
                      "schedule, but that one is used", stacklevel=1)
    if (kind := schedule.get("_class_name")) in ("LCMScheduler", "TCDScheduler"):
        warnings.warn(f"{folder}: made for {kind} and few steps, which is --sampler lcm here", stacklevel=1)
    return settings


def from_file(file):
    """(plans, vocabulary), as from_folder(), of a single file. The vocabulary is beside it or from the
    hub. LoadError for a file of another kind, which it names."""
    # Whole, and of a known kind?
    tensors = Tensors(file)
    note, shapes = tensors.note, tensors.shapes
    prefixes = tuple(part.prefix for part in PARTS.values())
    lacking = [name for name, part in PARTS.items() if not any(key.startswith(part.prefix) for key in shapes)]
    kinds = OTHERS | (ALONE if len(lacking) > 1 else {})
    what = [what for pattern, what in kinds.items() if any(re.match(pattern, key) for key in shapes)]
    if len(lacking) == 1:
        what.append(f"a Stable Diffusion without its {lacking[0]} ({PARTS[lacking[0]].prefix}…); {WHOLE}")
    if lacking:
        what.append(f"not a known model (its first tensor: {next(iter(shapes), None)}); {WHOLE}")
    if what:
        raise LoadError(f"{file}: {what[0]}")
    if predicts_v(file, note, shapes):
        raise LoadError(f"{file}: this model predicts v; only prediction of the noise is implemented")
    channels = shapes.get("model.diffusion_model.input_blocks.0.0.weight", ())[1:2]
    if channels not in ((4,), ()):
        raise LoadError(f"{file}: {INPAINTING.format(*channels)}")

    def rename(part, key):
        if key.startswith(part.prefix):
            return part.name_in_file(key.removeprefix(part.prefix))
        if not key.startswith(prefixes) and not EXTRAS.match(key):
            raise KeyError(key)
        return None
    plans = {key: (part.config(), [file], partial(rename, part)) for key, part in PARTS.items()}
    beside = vocabulary_in(file.parent) or vocabulary_in(file.parent / "tokenizer")
    return plans, beside or fetch_vocabulary(file)


def predicts_v(file, note, keys):
    """Whether a single file says that it predicts v: in its metadata, by a key, or in the .yaml beside it."""
    settings, text = file.with_suffix(".yaml"), ""
    if settings.is_file():
        with open(settings, "rb") as f:
            text = f.read(100_000).decode(errors="replace")
    return (note.get("modelspec.prediction_type", "") in ("v", "v_prediction") or "v_pred" in keys
            or re.search(r"parameterization:\s*[\"']?v\b", text) is not None)


def fetch_vocabulary(file):
    """The vocabulary that all Stable Diffusion 1.x share, from the hub or its cache. LoadError without it."""
    found, address = [], f"https://huggingface.co/{HUB}/tree/main/tokenizer"
    with suppress(LoadError):
        found = vocabulary_in(download(HUB, "tokenizer/vocab.json", "tokenizer/merges.txt") / "tokenizer")
    if not found:  # offline, the cache may hold other files alone
        raise LoadError(f"{file}: the tokenizer's files are not beside it, and the hub is out of reach; "
                        f"put vocab.json and merges.txt from {address} into {file.parent}")
    return found
