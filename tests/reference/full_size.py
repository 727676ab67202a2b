"""SD 1.5 at full size, ours against diffusers': python tests/reference/full_size.py [--folder DIR]

    pip install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2   # here only, never by the tests

Random numbers are saved as a model, as diffusers does it and as a single file; we load both and compute what
diffusers computes. A person is then exported as a LoRA and merged into a folder, for diffusers to load. The
table shows the greatest difference in each output, relative to its greatest value; exit status 1 where one is
over its bar. Needs Linux, 14 GB of memory, 9 GB of disk for a while and a quarter of an hour on two cores.
"""
import argparse
import itertools
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from make import SD15_SCHEDULER, their_text, their_unet, their_vae  # puts the modules below on the path
from rule import difference, draw, generator
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import clip
from clip import with_identifier
import sd
import unet
import vae
from diffusion import ddim, seeded_noise
from adapters import LowRank, fresh_lora, join
from files.compvis import unet_to_compvis, vae_to_compvis
from files.lora import export_lora
from files.merged import merge_to_folder
from files.tokenizers import write_tokenizer
from hdb import HyperDreamBooth

PROMPT, NEGATIVE = "a [V] face as a rock star", "a tree"
IDS = torch.randint(49408, (1, 77), generator=generator("ids"))
CONTEXT = draw((1, 77, 768), "context")
SQUARE, OBLONG = draw((1, 4, 64, 64), "square"), draw((1, 4, 48, 72), "oblong")
PHOTO, LATENT = draw((1, 3, 256, 384), "photo"), draw((1, 4, 32, 48), "latent")
BARS = {"text": 5e-6, "UNet 64×64": 5e-6, "UNet 48×72": 5e-6, "encoded": 5e-6, "decoded": 5e-6,
        "sample": 1e-5, "its picture": 3e-5}  # rounding, with room for other processors
MEMORY_BARS = {"float32": (1, 1.02), "bfloat16": (.5, 1.1)}  # share of the file's bytes, bar
ROOT = Path(__file__).parents[2]


def make(folder, single):
    """Save a pipeline with random weights as diffusers does, and the weights in one file as CompVis did."""
    # a vocabulary of these prompts' words is enough: IDS shows what the other tokens do
    vocab, merges = clip.learn_bpe(f"{with_identifier(PROMPT)} {NEGATIVE}".split())
    write_tokenizer(clip.Tokenizer(vocab, merges), folder.parent)
    pipe = StableDiffusionPipeline(
        unet=their_unet(unet.SD15), text_encoder=their_text(**asdict(clip.SD15)), vae=their_vae(vae.SD15),
        tokenizer=CLIPTokenizer.from_pretrained(folder.parent, model_max_length=77),
        scheduler=DDIMScheduler.from_config(SD15_SCHEDULER), safety_checker=None, feature_extractor=None)
    pipe.save_pretrained(folder)

    tensors = {f"model.diffusion_model.{unet_to_compvis(k)}": t for k, t in pipe.unet.state_dict().items()}
    for name, t in pipe.vae.state_dict().items():
        convolution = ".attentions.0.to_" in name and name.endswith("weight")
        tensors[f"first_stage_model.{vae_to_compvis(name)}"] = t[:, :, None, None] if convolution else t
    for name, t in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = t
    save_file(tensors, single)


def someone(model):
    """Random adapters like a person's: LiDB's and a LoRA of rank 4 beside them."""
    method = HyperDreamBooth(model)
    theta = .3 * draw((1, *method.lidb.shape), "theta")
    lora = fresh_lora(method.layers, 4, generator("lora"))
    lora = {name: LowRank(a.detach(), .2 * draw(b.shape, name)) for name, (a, b) in lora.items()}
    return join(method.lidb.adapters(theta), lora)


def theirs(pipe):
    """The outputs of diffusers, in the order of BARS."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scale = pipe.vae.config.scaling_factor
    sample = pipe(with_identifier(PROMPT), negative_prompt=NEGATIVE,
                  latents=seeded_noise((1, 4, 64, 64), [0]),
                  num_inference_steps=4, guidance_scale=7.5, output_type="latent").images
    return [pipe.text_encoder(IDS).last_hidden_state, pipe.unet(SQUARE, 500, CONTEXT).sample,
            pipe.unet(OBLONG, 500, CONTEXT).sample, pipe.vae.encode(PHOTO).latent_dist.mean * scale,
            pipe.vae.decode(LATENT / scale).sample, sample,
            pipe.vae.decode(sample / scale).sample.clamp(-1, 1)]


def ours(model):
    """The same of ours."""
    way = []
    picture = model.sample([PROMPT], seeds=[0], steps=4, guidance=7.5, negative=NEGATIVE, sampler=ddim,
                           callback=lambda i, t, x, x0: way.append(x))
    return [model.text(IDS), model.unet(SQUARE, 500, CONTEXT), model.unet(OBLONG, 500, CONTEXT),
            model.encode(PHOTO), model.decode(LATENT), way[-1], picture]


def compare(name, reference, mine):
    """Print a line of the table; return whether all of it is below the bars."""
    found = [difference(x, y) for x, y in zip(mine, reference, strict=True)]
    print(f"{name:18}", *(f"{x:11.1e}" if x else "      equal" for x in found), flush=True)
    return all(x < bar for x, bar in zip(found, BARS.values(), strict=True))


MEASURE = r"""
import re, sys, sd, torch
def memory(kind):
    return 1024 * int(re.search(kind + r":\s+(\d+) kB", open("/proc/self/status").read())[1])
before = memory("VmRSS")
model = sd.load(sys.argv[1], "cpu", getattr(torch, sys.argv[2]))
print(memory("VmHWM") - before)
"""


def check(folder):
    """Make everything in this empty folder and print what is found; return whether all is below the bars."""
    hub, single, lora = folder / "hub", folder / "hub/single.safetensors", folder / "lora.safetensors"
    make(hub, single)
    fine = []
    for source, (dtype, (share, bar)) in itertools.product((hub, single), MEMORY_BARS.items()):
        output = subprocess.check_output([sys.executable, "-c", MEASURE, source, dtype], cwd=ROOT)
        held = int(output) / single.stat().st_size / share
        print(f"loading {source.name} as {dtype} holds {held:.3f} × its weights, bar {bar}")
        fine.append(held < bar)

    print(" " * 18, *(f"{output:>11}" for output in BARS))
    print(f"{'bar':18}", *(f"{bar:11.0e}" for bar in BARS.values()))
    reference = theirs(StableDiffusionPipeline.from_pretrained(hub))
    for source in single, hub:
        model = sd.load(source, "cpu", torch.float32)
        plain = ours(model)
        fine.append(compare(source.name, reference, plain))

    adapters = someone(model)
    with model.adapted(adapters):
        personal = ours(model)
    compare("(person or not)", plain, personal)
    # from the single file, which shows that it is one to diffusers too
    pipe = StableDiffusionPipeline.from_single_file(single, config=str(hub), local_files_only=True)
    single.unlink()
    export_lora(adapters, lora)
    pipe.load_lora_weights(folder, weight_name=lora.name)
    fine.append(compare("person as a LoRA", theirs(pipe), personal))
    merge_to_folder(model, adapters, hub, folder / "merged")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "merged")
    fine.append(compare("person merged", theirs(pipe), personal))
    return all(fine)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare SD 1.5 at full size with diffusers.")
    parser.add_argument("--folder", help="where to put the files, which are removed at the end")
    options = parser.parse_args()
    for library in diffusers, transformers:
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, torch.no_grad():
        sys.exit(not check(Path(folder)))
