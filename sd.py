"""A Stable Diffusion 1.x from wherever it lies: the hub, a folder, a single file, or the miniature that comes with the project.

    model = load("nano")
    latent = model.encode(image)                                   # (B, 3, H, W) → (B, 4, H/8, W/8)
    noise = model.unet(latent, 500, model.context(["a face"]))     # one step's prediction
    image = model.decode(latent)

What is missing, surplus, misshapen or of another family is refused in one line; checkpoints.py does the reading.
"""
import os
import re
import warnings
from pathlib import Path

import huggingface_hub
import torch

import clip
import unet
import vae
from checkpoints import PICKLES, LoadError, configure, module, read, read_json, read_settings, refuse

HERE = Path(__file__).parent
HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WHOLE = "give a whole Stable Diffusion 1.x checkpoint"
ONLY = "only Stable Diffusion 1.x is implemented"


class StableDiffusion:
    """The parts `unet(x, t, context)`, `text(ids)`, `tokenizer(list_of_str)` and `vae`, and in `name` where they came from.

    The weights are frozen (requires_grad False) and the modules in eval mode, all on one device and of one dtype.
    """

    def __init__(self, name, unet, text, tokenizer, vae):
        self.name, self.unet, self.text, self.tokenizer, self.vae = name, unet, text, tokenizer, vae
        self.personal = None  # the lidb.Personal around the layers, once there is one
        for part in (unet, text, vae):
            part.eval().requires_grad_(False)

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    def encode(self, image, generator=None):
        """Image (B, 3, H, W) in [-1, 1], H and W divisible by 8, to the latent (B, 4, H/8, W/8) that the UNet sees.

        The mean of the encoder's distribution, or a sample of it where a CPU generator is given. ValueError for other sizes.
        """
        check_sides(*image.shape[-2:])
        z, logvar = self.vae.encode(image.to(self.device, self.dtype))
        if generator is not None:
            z = z + (logvar / 2).exp() * torch.randn(z.shape, generator=generator, device="cpu").to(z)
        return z * self.vae.config.scaling_factor

    def decode(self, latent):
        """Latent (B, 4, h, w) to image (B, 3, 8h, 8w), about [-1, 1] and not clamped."""
        return self.vae.decode(latent.to(self.device, self.dtype) / self.vae.config.scaling_factor)

    def context(self, texts):
        """A list of B strings to the text features (B, n, d) that the UNet attends to. What is too long is cut, with a warning."""
        return self.text(self.tokenizer(texts).to(self.device))


def check_sides(height, width):
    """ValueError unless a picture of this size, in pixels, has a latent."""
    if height % 8 or width % 8:
        raise ValueError(f"a picture's sides must be divisible by 8, not {height}×{width}")


def model_name(source):
    """`source`, for load(), or "nano" if it is another way to write the miniature's folder."""
    return "nano" if Path(source).resolve() == HERE / "nano" else source


def load(source=HUB, device=None, dtype=None):
    """The StableDiffusion at `source`, one of

    * "nano": the miniature in nano/;
    * a hub id "owner/name": what is needed is downloaded once, in the half-precision variant where dtype is half and there is one;
    * a folder in the hub's layout (unet/, vae/, text_encoder/, tokenizer/), its weights plain or .fp16, whole or in shards;
    * a .safetensors file in the original (CompVis) layout, with vocab.json and merges.txt beside it or else from the hub.

    device None: cuda, else mps, else cpu. dtype, a torch.dtype, None: bfloat16 on a GPU that has it, else float16; float32 on a CPU.
    The weights are copies, so the files may change afterwards. Raises LoadError, whose message is one line for the user.
    """
    device, dtype = place(device, dtype)
    name, path = str(source), Path(source)
    if name == "nano":
        return from_folder(name, HERE / "nano", device, dtype)
    if os.path.isdir(path):
        return from_folder(name, path, device, dtype)
    if os.path.exists(path):
        return from_file(name, path, device, dtype)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (*PICKLES, ".safetensors"):
        return from_folder(name, fetch(name, dtype), device, dtype)
    raise LoadError(f"{name}: no such file or folder, and not a hub id, which looks like {HUB}")


def place(device, dtype):
    """The torch.device and dtype to load to: what is asked for or, where that is None, what suits the machine."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # no such name, or nothing there
        raise LoadError(f"device {device}: not available here ({str(error).splitlines()[0][:150]})") from None
    if dtype is None:
        has_bf16 = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
                    "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0)}
        dtype = torch.float32 if device.type not in has_bf16 else torch.bfloat16 if has_bf16[device.type]() else torch.float16
    return device, dtype


# folder in the hub's layout: our file, module, configuration, name of the weights there; prefix in a single file
PARTS = {"vae": (vae, vae.VAE, vae.VAEConfig, "diffusion_pytorch_model", "first_stage_model."),
         "text_encoder": (clip, clip.TextTransformer, clip.TextConfig, "model", "cond_stage_model.transformer."),
         "unet": (unet, unet.UNet, unet.UNetConfig, "diffusion_pytorch_model", "model.diffusion_model.")}
PREFIXES = tuple(prefix for *_, prefix in PARTS.values())

# What official files have that we don't, or under another name. Everything else has to match.
FOLDER_NAMES = {  # from the key in a folder's file to ours; None: not needed
    "unet": lambda key: key,
    "text_encoder": clip.from_compvis,  # text_model. may be absent; position_ids count 0, 1, 2, ...
    "vae": lambda key: re.sub(r"(mid_block\.attentions\.0)\.(\w+)", lambda m: f"{m[1]}.{vae.OLD_ATTENTION.get(m[2], m[2])}", key)}
SINGLE_FILE_EXTRAS = re.compile(  # the noise schedule's tables, which follow from two numbers, the training's moving average, and
    r"(betas|alphas_cumprod(_prev)?|(sqrt|log_one_minus|posterior)_\w+)$|model_ema\."
    r"|cond_stage_model\.(logit_scale|text_projection)$")  # what ComfyUI keeps of CLIP's comparison with pictures

# ---------------------------------------------------------------------------------------------------------------------------------
# The hub's layout

def download(name, *patterns):
    """The folder of a hub repository's files that match `patterns`, from the hub or its cache."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's, the network's and the disk's errors have no base in common
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"{name}: neither a folder here nor to be had from the hub ({reason}); check the name and the network, or "
                        "download it elsewhere and give its folder") from None


def fetch(name, dtype):
    """Download what is needed of a hub repository, or find it in the hub's cache, and return its folder."""
    # the small files first, so that a wrong model is refused before its gigabytes are downloaded
    folder = download(name, "model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS),
                      "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json", "tokenizer/added_tokens.json")
    refuse_other_folders(folder)
    failure = None
    for variant in variants(dtype):
        stems = [f"{part}/{stem}{variant}" for part, (*_, stem, _) in PARTS.items()]
        try:
            folder = download(name, *(f"{stem}{end}.safetensors" for stem in stems for end in ("", "-*-of-*")))
        except LoadError as error:  # offline, it may be, with the other variant in the cache
            failure = error
        if all(weights(folder, part, [variant]) for part in PARTS):
            return folder
    if failure:
        raise failure
    return folder  # from_folder() says what it lacks


def variants(dtype):
    """The variants in a weight file's name, best first for this dtype."""
    return (".fp16", "") if dtype.itemsize == 2 else ("", ".fp16")


def weights(folder, part, variants):
    """The files with a part's weights, in the first variant that is there: one, or its shards, or [] if there is none."""
    stems = [PARTS[part][3] + variant for variant in variants]
    found = (sorted((folder / part).glob(f"{stem}{end}.safetensors")) for stem in stems for end in ("", "-*-of-*"))
    return next(filter(None, found), [])


def from_folder(name, folder, device, dtype):
    refuse_other_folders(folder)
    files = {part: weights(folder, part, variants(dtype)) for part in PARTS}
    missing = [f"{part}/config.json" for part in PARTS if not (folder / part / "config.json").is_file()]
    missing += [f"{part}/{PARTS[part][3]}.safetensors" for part in PARTS if not files[part]]
    if not vocabulary_in(folder / "tokenizer"):
        missing.append("tokenizer/vocab.json and merges.txt")
    if missing:
        pickles = any(file.suffix in PICKLES for part in PARTS for file in (folder / part).glob("*"))
        single = [file.name for file in folder.glob("*.safetensors")] if not any(files.values()) else []
        hint = ("; make it with nano/pretrain.py" if name == "nano" else f"; if {single[0]} is a whole model, give its path" if single else
                "; pickles (.bin) are not read" if pickles else "")
        raise LoadError(f"{folder}: not a complete Stable Diffusion, it lacks {', '.join(missing)}{hint}")
    modules = {}
    for part, (_, kind, config, *_) in PARTS.items():
        settings = read_settings(config, folder / part / "config.json")
        modules[part] = module(kind, settings, files[part], FOLDER_NAMES[part], device, dtype)
    return assemble(name, modules, vocabulary_in(folder / "tokenizer"))


# Settings that leave the tensors' names and shapes as they are but change the result: what our code does.
IMPLEMENTED = {
    "model_index.json": {},
    "scheduler/scheduler_config.json": {
        "prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "unet/config.json": {
        "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
        "downsample_padding": 1, "resnet_time_scale_shift": "default", "num_attention_heads": None},
    "vae/config.json": {"act_fn": "silu", "shift_factor": None, "latents_mean": None}}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": .00085, "beta_end": .012, "num_train_timesteps": 1000, "trained_betas": None}


def refuse_other_folders(folder):
    """Raise LoadError for a folder with another family of models, which it names, or with settings that we don't implement."""
    configs = {name: read_json(folder / name) if (folder / name).is_file() else {} for name in IMPLEMENTED}
    pipeline, settings = configs["model_index.json"], configs["unet/config.json"]
    width, channels = settings.get("cross_attention_dim"), settings.get("in_channels", 4)
    if "transformer" in pipeline:
        raise LoadError(f"{folder}: a diffusion transformer ({pipeline.get('_class_name')}); {ONLY}")
    if "text_encoder_2" in pipeline or settings.get("addition_embed_type") or width == 2048:
        raise LoadError(f"{folder}: an SDXL model; {ONLY}")
    if width == 1024 or isinstance(settings.get("attention_head_dim"), list):
        raise LoadError(f"{folder}: a Stable Diffusion 2.x model; {ONLY}")
    if channels != settings.get("out_channels", 4):
        raise LoadError(f"{folder}: a UNet with {channels} input channels, for inpainting or editing; give the text-to-image model")
    for name, config in configs.items():
        refuse(config, IMPLEMENTED[name], folder / name)
    schedule = configs["scheduler/scheduler_config.json"]
    if other := [f"{key} {schedule[key]!r}" for key, value in SCHEDULE.items() if schedule.get(key, value) != value]:
        warnings.warn(f"{folder}/scheduler: {', '.join(other)} is not Stable Diffusion 1.5's noise schedule, which is used here all the same")


def encoder_folder(source, *more):
    """The folder of an encoder of pictures: `source` itself, or a hub id's files, config.json, model.safetensors and these."""
    folder = Path(source) if os.path.isdir(source) else download(source, "config.json", "model.safetensors", *more)
    if not (folder / "model.safetensors").is_file():
        raise LoadError(f"{source}: has no model.safetensors; pickles (.bin) are not read")
    return folder


def load_clip(source="openai/clip-vit-large-patch14", device=None):
    """Both towers of CLIP, a clip.CLIP in float32, and its tokenizer: what CLIP-I and CLIP-T are measured with. source: a hub id or a
    folder with config.json, model.safetensors, vocab.json and merges.txt. Raises LoadError, as load() does."""
    folder = encoder_folder(source, "vocab.json", "merges.txt", "tokenizer.json")
    found = read_json(folder / "config.json")
    # files leave out what is as in ViT-B/32; the width of the space that both towers share stands outside
    text = configure(clip.VIT_B32_TEXT, found.get("text_config") or {}, folder)
    vision = configure(clip.VIT_B32, (found.get("vision_config") or {}) | {"projection_dim": found.get("projection_dim", 512)}, folder)

    def towers(configs):
        return clip.CLIP(*configs)
    model = module(towers, (text, vision), [folder / "model.safetensors"], lambda key: None if key in clip.KNOWN_EXTRAS else key,
                   *place(device, torch.float32))
    return model.eval().requires_grad_(False), read_tokenizer(vocabulary_in(folder), text, source)


# ---------------------------------------------------------------------------------------------------------------------------------
# The original single-file layout

OTHERS = {  # what a file without our prefixes is: the first pattern that one of its keys begins with
    r"conditioner\.embedders\.": f"an SDXL model; {ONLY}",
    r"cond_stage_model\.model\.": f"a Stable Diffusion 2.x model; {ONLY}",
    r"(model\.diffusion_model\.)?(double_blocks|joint_blocks)\.": f"a diffusion transformer (SD 3, Flux); {ONLY}",
    r"lora_|.*[._]lora[._]": f"a LoRA, which changes a model and isn't one; {WHOLE}",
    r"control_model\.|controlnet_|input_hint_block\.": f"a ControlNet, which steers a model and isn't one; {WHOLE}",
    r"emb_params$|string_to_param|<.*>$": f"a textual inversion, which is a token's embedding and not a model; {WHOLE}",
    r"(model\.diffusion_model\.)?(down_blocks|input_blocks)\.": f"a UNet alone; {WHOLE}",
    r"(first_stage_model\.)?decoder\.": f"a VAE alone; {WHOLE}",
    r"(cond_stage_model\.transformer\.)?(text_model\.)?encoder\.layers\.": f"a text encoder alone; {WHOLE}"}


def from_file(name, file, device, dtype):
    with read(file) as f:
        shapes = {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}
    refuse_other_files(file, shapes)
    vocabulary = vocabulary_in(file.parent) or vocabulary_in(file.parent / "tokenizer") or fetch_vocabulary(file)  # before gigabytes are read
    modules = {}
    for part, (ours, kind, *_, prefix) in PARTS.items():
        def rename(key):
            return ours.from_compvis(key.removeprefix(prefix)) if key.startswith(prefix) else None
        modules[part] = module(kind, ours.SD15, [file], rename, device, dtype)
    return assemble(name, modules, vocabulary)


def refuse_other_files(file, shapes):
    """Raise LoadError for a file with tensors {key: shape} of another kind, which it names, or with any that have no place here."""
    if not all(any(key.startswith(prefix) for key in shapes) for prefix in PREFIXES):
        kinds = (what for pattern, what in OTHERS.items() if any(re.match(pattern, key) for key in shapes))
        what = next(kinds, f"no model known here (a tensor of it: {next(iter(shapes), None)}); {WHOLE}")
        raise LoadError(f"{file}: {what}")
    channels = shapes.get("model.diffusion_model.input_blocks.0.0.weight", ())[1:2]
    if channels not in ((4,), ()):
        raise LoadError(f"{file}: a UNet with {channels[0]} input channels, for inpainting or editing; give the text-to-image model")
    for key, shape in shapes.items():
        if not key.startswith(PREFIXES) and not SINGLE_FILE_EXTRAS.match(key):
            raise LoadError(f"{file}: surplus tensor {key} of shape {shape}, expected none")


def fetch_vocabulary(file):
    """The vocabulary of all Stable Diffusion 1.x, from the hub's cache or, failing that, from the hub."""
    for offline in (True, False):
        try:
            for name in ("vocab.json", "merges.txt"):
                path = huggingface_hub.hf_hub_download(HUB, name, subfolder="tokenizer", local_files_only=offline)
            return vocabulary_in(Path(path).parent)
        except Exception:  # as in fetch()
            continue
    raise LoadError(f"{file}: the tokenizer's files are not here and the hub is out of reach; put vocab.json and merges.txt from "
                    f"https://huggingface.co/{HUB}/tree/main/tokenizer into {file.parent}")


# ---------------------------------------------------------------------------------------------------------------------------------
# The whole

def vocabulary_in(folder):
    """The files in `folder` that hold a tokenizer's vocabulary: a pair, or the one file that transformers 5 writes, or []."""
    for names in (["vocab.json", "merges.txt"], ["tokenizer.json"]):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    return []


def added_tokens(folder):
    """The tokens that a tokenizer's folder names beside the vocabulary's, as textual inversions do: a set of strings."""
    listed = read_json(folder / "tokenizer.json").get("added_tokens") or [] if (folder / "tokenizer.json").is_file() else []
    more = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    return {token["content"] for token in listed} | more.keys()


def assemble(name, modules, vocabulary):
    """The StableDiffusion of three filled modules and the files from vocabulary_in(), if they fit together."""
    text, width = modules["text_encoder"].config, modules["unet"].config.cross_attention_dim
    if text.hidden_size != width:
        raise LoadError(f"{name}: the text encoder makes features {text.hidden_size} wide, the UNet takes {width}")
    tokenizer = read_tokenizer(vocabulary, text, name)
    return StableDiffusion(name, modules["unet"], modules["text_encoder"], tokenizer, modules["vae"])


def read_tokenizer(vocabulary, text, name):
    """The tokenizer in the files from vocabulary_in(), for the text encoder's config `text`."""
    if not vocabulary:
        raise LoadError(f"{name}: has no vocab.json and merges.txt")
    try:
        if len(vocabulary) == 2:
            tokenizer = clip.Tokenizer.load(*vocabulary, max_length=text.max_position_embeddings)
        else:
            bpe = read_json(vocabulary[0])["model"]
            merges = [tuple(m.split() if isinstance(m, str) else m) for m in bpe["merges"]]
            tokenizer = clip.Tokenizer(bpe["vocab"], merges, text.max_position_embeddings)
        if not all(type(token) is int and token >= 0 for token in tokenizer.vocab.values()):
            raise ValueError("a token's number is none")
        tokens = max(tokenizer.vocab.values()) + 1
        added = [*added_tokens(vocabulary[0].parent) - tokenizer.vocab.keys()]
    except LoadError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{vocabulary[0]}: not a CLIP tokenizer ({error!r})") from None
    if added:
        raise LoadError(f"{vocabulary[0].parent}: tokens added to CLIP's ({', '.join(sorted(added))[:100]}) are not implemented")
    if tokens > text.vocab_size:
        raise LoadError(f"{vocabulary[0]}: {tokens} tokens, {name}'s text encoder has {text.vocab_size}")
    return tokenizer
