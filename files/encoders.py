"""Load encoders of pictures from the hub or a folder: the ViT that sees faces, and CLIP, which measures
likeness. They are in float32, frozen and in eval mode. LoadError, as in sd.load()."""
import os
from pathlib import Path

import torch

import clip
from files.checkpoints import alike, build, checksum, configure, require_settings
from files.compvis import KNOWN_EXTRAS
from files.disk import LoadError, read_json
from files.layouts import download, device_and_dtype
from files.tokenizers import read_tokenizer, vocabulary_in
from vit import ViT, ViTConfig

FACE_ENCODER = "google/vit-huge-patch14-224-in21k"  # of the paper
VIT_SETTINGS = {"config.json": {"hidden_act": "gelu"},
                "preprocessor_config.json": {"do_normalize": True, "do_rescale": True}}


def load_vit(source, device):
    """The ViT at `source`: a hub id (FACE_ENCODER, facebook/dino-vits16) or a folder with config.json,
    model.safetensors and, if pictures are normalised in another way, preprocessor_config.json. device "meta":
    only its configuration and checksum; its attribute `source` says where to load the weights from."""
    folder = download(source, "model.safetensors", *VIT_SETTINGS)
    config = ViTConfig()
    for name, implemented in VIT_SETTINGS.items():
        file = folder / name
        if name == "config.json" or file.is_file():
            found = read_json(file)
            require_settings(found, implemented, file)
            config = configure(config, found, file)

    # Classifiers have the ViT under a prefix. Their head and the pooler are not needed
    def rename(key):
        key = key.removeprefix("vit.")
        return None if key.startswith(("pooler.", "classifier.")) else key
    vit = build_encoder(ViT, config, folder, rename, device)
    vit.source = os.path.abspath(source) if os.path.isdir(source) else source
    return vit


def loaded(vit, device):
    """The ViT with its weights: `vit` itself or, if that is on the meta device, a copy read from its source
    to `device`. So an official ViT takes memory, 2.5 GB for ViT-H, only while the copy is used. LoadError if
    its file has changed since `vit` was loaded."""
    if not vit.layernorm.weight.is_meta:
        return vit
    found = load_vit(vit.source, device)
    if not alike(checksum(found), checksum(vit)):
        raise LoadError(f"{vit.source}: this encoder of photos has changed since the start; start again")
    return found


def vit_of(path, source, noted, instead=None):
    """The ViT, on the meta device, that the file at `path` was trained with: `instead`, a folder of its name
    beside the file, or `source`. LoadError if it is missing or its checksum is not `noted`, unless None."""
    beside, hint = Path(path).parent / Path(source).name, f"put its folder, {Path(source).name}, beside it"
    source = instead or (str(beside) if os.path.isdir(beside) else source)
    if os.path.isabs(source) and not os.path.isdir(source):
        raise LoadError(f"{path}: trained with the encoder of photos {source}, which is missing; {hint}")
    vit = load_vit(source, "meta")
    if noted is not None and not alike(checksum(vit), noted):
        raise LoadError(f"{path}: trained with another encoder of photos than {source} is now; {hint}")
    return vit


def load_clip(source, device):
    """(clip.CLIP, its Tokenizer) from a hub id or a folder, to measure CLIP-I and CLIP-T."""
    words = ("vocab.json", "merges.txt", "tokenizer.json")
    folder = download(source, "model.safetensors", "config.json", *words)
    found = read_json(folder / "config.json")
    # Files leave out values of ViT-B/32. The width of the space that both towers share is at the top
    shared = {"projection_dim": found.get("projection_dim", 512)}
    text = configure(clip.VIT_B32_TEXT, found.get("text_config") or {}, folder)
    vision = configure(clip.VIT_B32, (found.get("vision_config") or {}) | shared, folder)

    extras = dict.fromkeys(KNOWN_EXTRAS)
    model = build_encoder(clip.CLIP, text, folder, lambda key: extras.get(key, key), device, vision)
    return model, read_tokenizer(vocabulary_in(folder), text, source)


def build_encoder(kind, config, folder, rename, device, *more):
    """build() from model.safetensors in `folder`, on `device`, in float32."""
    file, meta = folder / "model.safetensors", torch.device("meta")
    if not file.is_file():
        raise LoadError(f"{folder}: has no model.safetensors; pickles (.bin) are not read")
    device = meta if device == "meta" else device_and_dtype(device, torch.float32)[0]
    return build(kind, config, [file], rename, device, torch.float32, *more)
