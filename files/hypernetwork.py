"""Save and load a hypernetwork: its weights in fp16, its configuration, and the LiDB basis of its θ."""
import json
import warnings
from dataclasses import asdict, replace

import torch

from files.checkpoints import Tensors, alike, build, checksum, configure, write
from files.disk import LoadError, refusing
from files.encoders import vit_of
from hypernet import HyperConfig, HyperNetwork
from lidb import LiDB, personal_layers
from vit import ViTConfig


def save_hypernet(hypernet, model, path):
    """Write a hypernetwork trained for `model`. Of an official encoder (config.encoder) only its name."""
    config = asdict(hypernet.config)
    seed, encoder = config.pop("basis_seed"), config.pop("encoder")
    basis = LiDB(personal_layers(model.unet, model.text), seed=seed, device=model.device).checksum
    note = {"config": json.dumps(config), "basis_seed": str(seed), "basis_checksum": str(basis),
            "model": model.name} | model.checksums
    if encoder:
        note |= {"encoder": encoder, "encoder_checksum": checksum(hypernet.vit)}
    kept = {key: t for key, t in hypernet.state_dict().items() if not encoder or not key.startswith("vit.")}
    write({key: t.half() for key, t in kept.items()}, path, note)


def load_hypernet(path, model, encoder=None):
    """The HyperNetwork in a file of save_hypernet, in float32 on the model's device. An official encoder's
    weights stay in its file: hdb.HyperDreamBooth.predict() reads them, or files.encoders.loaded(). encoder:
    its source, if neither beside `path` nor where it was. LoadError for another kind of file, another basis,
    layers that the model lacks, another encoder, NaN or infinity; a warning if only the model's weights
    differ."""
    with refusing(f"{path}: not a hypernetwork that train.py wrote"):
        note = Tensors(path).note
        found = json.loads(note["config"])
        seed, basis = int(note["basis_seed"]), int(note["basis_checksum"])
        HyperConfig(**found)  # TypeError for an unknown field
        vit = configure(ViTConfig(), found.pop("vit"), path)
        config = configure(HyperConfig(1, 1, vit=vit), found, path)
        config = replace(config, basis_seed=seed, encoder=note.get("encoder", ""))
        lidb = LiDB(personal_layers(model.unet, model.text), seed=seed, device=model.device)
        if (config.layers, config.size) != lidb.shape or basis != lidb.checksum:
            raise LoadError(f"{path}: trained for other layers or another basis than {model.name}'s; give "
                            "the model that it was trained for with --model")
    warn_of_other_weights(path, note, model)
    if encoder and not config.encoder:
        raise LoadError(f"{path}: contains its encoder of photos, so --encoder cannot be chosen")
    vit = torch.nn.Identity() if config.encoder else None
    built = build(HyperNetwork, config, [path], str, model.device, torch.float32, vit)  # str: our names
    if config.encoder:
        built.vit = vit_of(path, config.encoder, note.get("encoder_checksum"), encoder)
        if built.vit.config != config.vit:
            raise LoadError(f"{path}: trained with another encoder than {config.encoder} is now")
    return built


def warn_of_other_weights(path, note, model):
    """Warn if the file with the metadata `note` was trained for other weights than those of `model`."""
    ours = model.checksums
    if differ := [part for part in ("unet", "text") if not alike(note.get(part, ours[part]), ours[part])]:
        warnings.warn(f"{path}: trained for {note.get('model')}, whose {' and '.join(differ)} weights differ "
                      f"from {model.name}'s; the likeness may be lost", stacklevel=3)
