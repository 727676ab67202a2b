"""Make the stored reference outputs with diffusers and transformers: python tests/reference/make.py [part …]

    pip install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 pytest   # here only, never by the tests

Each function below builds a small model of the reference library, fills it by tests/reference/rule.py and
returns the tensors to keep; they land in tests/reference/<part>.safetensors. Inputs are drawn by the same
rule, so only outputs are stored.
"""
import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]  # this, tests/ and the root
from rule import draw, fill, generator  # noqa: E402

PARTS = {}


def part(function):
    PARTS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------------------
# Models of the reference libraries at the sizes of our configs, filled

def their_unet(config):
    from diffusers import UNet2DConditionModel
    up = [kind.replace("Down", "Up") for kind in reversed(config.down_block_types)]
    return fill(UNet2DConditionModel(**asdict(config), up_block_types=up))


def their_vae(config):
    from diffusers import AutoencoderKL
    levels = len(config.block_out_channels)
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    return fill(AutoencoderKL(**asdict(config), down_block_types=down, up_block_types=up))


def their_text(**settings):
    from transformers import CLIPTextConfig, CLIPTextModel
    model = CLIPTextModel(CLIPTextConfig(**settings))
    fill(getattr(model, "text_model", model))  # the wrapper is gone since transformers 5.6
    return model


# ---------------------------------------------------------------------------------------------------------
# The parts

@part
def clip_text():
    model = their_text(vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                       num_attention_heads=4)
    ids = torch.randint(300, (2, 77), generator=generator("clip_text"))
    return {"full": model(ids).last_hidden_state, "short": model(ids[:, :9]).last_hidden_state}


@part
def clip_model():
    import numpy as np
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    text = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "bos_token_id": 298}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    ids = torch.randint(298, (3, 20), generator=generator("clip_model"))
    for row, end in zip(ids, (4, 11, 19)):
        row[end:] = 299

    out = {}
    # 2 stands in the official files, and makes transformers take the greatest id as end of text
    for eos in 2, 299:
        config = CLIPConfig(text_config=text | {"eos_token_id": eos}, vision_config=vision, projection_dim=40)
        model = fill(CLIPModel(config))
        features = model.get_text_features(ids)
        out[f"text_{eos}"] = getattr(features, "pooler_output", features)  # a tensor until transformers 5
    features = model.get_image_features(draw((2, 3, 32, 32), "clip_model"))
    out["image"] = getattr(features, "pooler_output", features)

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for h, w in (67, 50), (20, 31):
        image = (draw((h, w, 3), "photo") * 25 + 128).byte()  # so weak that nothing is clipped
        pixels = processor(Image.fromarray(image.numpy()))["pixel_values"][0]
        out[f"pixels_{h}_{w}"] = torch.as_tensor(np.asarray(pixels))
    return out


@part
def tokenizer():
    from transformers import CLIPTokenizer

    from clip import Tokenizer, learn_bpe
    from files.tokenizers import write_tokenizer
    data = json.loads(Path(__file__).with_name("hard_texts.json").read_text(encoding="utf-8"))
    known, merges = learn_bpe(data["words"])
    # without ð, with which most emoji begin
    unknown = {token: i for i, token in enumerate(t for t in known if t not in ("#", "#</w>", "ð"))}
    out = {}
    for name, vocab in ("known", known), ("unknown", unknown):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Tokenizer(vocab, merges), Path(folder))
            reference = CLIPTokenizer.from_pretrained(folder)
        options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        out[name] = reference(data["texts"], **options).input_ids.to(torch.int16)
    return out


@part
def unet():
    from test_unet import CONFIGS, inputs
    outputs = {}
    for kind, size in ("small", (16, 16)), ("small", (9, 13)), ("nano", (16, 16)), ("nano", (7, 10)):
        case = f"{kind} {size[0]}x{size[1]}"
        config = CONFIGS[kind]
        x, t, context = inputs(case, (2, config.in_channels, *size))
        outputs[case] = their_unet(config)(x, t, context).sample
    return outputs


@part
def vae():
    from test_vae import CONFIGS
    outputs = {}
    for kind, config in CONFIGS.items():
        model = their_vae(config)
        for h, w in (64, 64), (40, 56):
            case = f"{kind} {h}x{w}"
            latent = model.encode(draw((1, 3, h, w), f"{case}:image")).latent_dist
            image = model.decode(draw((1, 4, h // 8, w // 8), f"{case}:z")).sample
            outputs |= {f"{case} mean": latent.mean, f"{case} logvar": latent.logvar, f"{case} image": image}
    return outputs


# scheduler/scheduler_config.json of SD 1.5, the file diffusers makes every scheduler from; its class is the
# pipeline's default
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None}


@part
def sampling():
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    from test_diffusion import SHAPE, STEPS, toy
    ddim = DDIMScheduler.from_config(SD15_SCHEDULER)
    dpmpp_2m = DPMSolverMultistepScheduler.from_config(SD15_SCHEDULER)
    out = {"alphas_cumprod": ddim.alphas_cumprod}
    for name, scheduler in ("leading", ddim), ("linspace", dpmpp_2m):
        times = []
        for n in (*range(1, 61), 100, 333, 500, 999):
            scheduler.set_timesteps(n)
            times.append(scheduler.timesteps)
        out[f"times {name}"] = torch.cat(times).to(torch.int16)

    for n in STEPS:
        for kind, scheduler in ("ddim eta 0", ddim), ("ddim eta 1", ddim), ("dpmpp_2m", dpmpp_2m):
            name = f"{kind} {n}"
            scheduler.set_timesteps(n)
            options = {"eta": 1., "generator": generator(f"{name}:steps")} if kind == "ddim eta 1" else {}
            x, way = draw(SHAPE, f"{name}:x"), []
            for t in scheduler.timesteps:
                x = scheduler.step(toy(x, t), t, x, **options).prev_sample
                way.append(x)
            out[name] = torch.stack(way)

    x = draw((3, *SHAPE[1:]), "add_noise:x")
    out["add_noise"] = ddim.add_noise(x, draw(x.shape, "add_noise:noise"), torch.tensor([0, 500, 999]))
    return out


@part
def pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from test_diffusion import TEXT, UNET, VAE, pipeline_inputs
    text, autoencoder = their_text(**asdict(TEXT)), their_vae(VAE)
    x, prompts, negatives = pipeline_inputs()
    pipe = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text, tokenizer=None, unet=their_unet(UNET),
        scheduler=DDIMScheduler.from_config(SD15_SCHEDULER), safety_checker=None, feature_extractor=None)
    way = []

    def keep(pipe, i, t, tensors):
        way.append(tensors["latents"])
        return tensors

    height, width = 8 * x.shape[2], 8 * x.shape[3]
    pipe(latents=x, height=height, width=width, prompt_embeds=text(prompts).last_hidden_state,
         negative_prompt_embeds=text(negatives).last_hidden_state, num_inference_steps=4, guidance_scale=7.5,
         output_type="latent", callback_on_step_end=keep)
    image = autoencoder.decode(way[-1] / VAE.scaling_factor).sample
    return {"latents": torch.stack(way), "images": image}


@part
def lora():
    """LoRAs as others write them, all their keys and numbers ("<naming>|<key>"), and what diffusers or PEFT
    makes of them."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open

    from personal import TEXT, UNET, lora_inputs
    some = r"(down_blocks\.0|mid_block|up_blocks\.1)\..*"
    every = (r"(to_[qkv]|to_out\.0|ff\.net\.(0\.proj|2)|proj_in|proj_out|time_emb_proj|conv_shortcut)"
             r"|time_embedding\.linear_1")
    attention = LoraConfig(r=2, lora_alpha=2, target_modules=some + r"attn\d\.to_(q|k|v|out\.0)")
    everything = LoraConfig(
        r=2, lora_alpha=3, alpha_pattern={"proj_in": 5, "mid_block.attentions.0.proj_out": 1},
        rank_pattern={"to_k": 3}, target_modules=some + every)
    words = LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])

    def models():
        return their_unet(UNET), their_text(**asdict(TEXT))

    def adapted(module, config, naming):
        module.add_adapter(config)
        state = get_peft_model_state_dict(module)
        return {key: draw(p.shape, f"{naming}:{key}") / p.shape[1] ** .5 for key, p in state.items()}

    def outputs(unet, text):
        x, t, ids = lora_inputs()
        context = text(ids).last_hidden_state
        return {"context": context, "noise": unet(x, t, context).sample}

    def old(key):  # as diffusers 0.14 to 0.20 wrote the attention processors
        def older(match):
            return f"processor.to_{match[1]}_lora.{'down' if match[3] == 'A' else 'up'}"
        return re.sub(r"to_(\w+?)(\.0)?\.lora_([AB])", older, key)

    def kohyas(state, words_state):
        whole = {f"unet.{k}": v for k, v in state.items()}
        whole |= {f"text_encoder.{k}": v for k, v in words_state.items()}
        tensors = {}
        for key, t in convert_state_dict_to_kohya(whole).items():
            key = key.replace("lora_te1_encoder", "lora_te_text_model_encoder")
            if key.endswith("alpha"):
                t = torch.tensor(3.)  # diffusers 0.42 drops alphas that differ
            if re.search("proj_(in|out).lora|shortcut.lora", key) and t.dim() == 2:
                t = t[:, :, None, None]
            tensors[key] = t.contiguous()
        return tensors

    def jsonable(config):
        return {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}

    def as_bytes(note):
        return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)

    out = {}
    for naming in "diffusers peft", "diffusers lora.down", "diffusers processor", "kohya":
        unet, text = models()
        config = everything if naming in ("diffusers peft", "kohya") else attention
        state, words_state = adapted(unet, config, naming), adapted(text, words, naming)
        options = {}
        if naming == "diffusers peft":
            options = {"unet_lora_adapter_metadata": jsonable(everything),
                       "text_encoder_lora_adapter_metadata": jsonable(words)}
        if naming == "diffusers lora.down":
            state, words_state = (convert_state_dict_to_diffusers(d) for d in (state, words_state))
        if naming == "diffusers processor":
            state = {old(k): v for k, v in state.items()}
            words_state = convert_state_dict_to_diffusers(words_state)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pytorch_lora_weights.safetensors")
            if naming == "kohya":
                save_file(kohyas(state, words_state), file)
            else:
                StableDiffusionPipeline.save_lora_weights(folder, state, words_state, **options)
            unet, text = models()
            pipe = StableDiffusionPipeline(
                vae=None, text_encoder=text, tokenizer=None, unet=unet, scheduler=None, safety_checker=None,
                feature_extractor=None, requires_safety_checker=False)
            pipe.load_lora_weights(folder, weight_name=file.name)
            with safe_open(file, "pt") as f:
                note = {k: v for k, v in (f.metadata() or {}).items() if k != "format"}
            out |= {f"{naming}|{k}": v for k, v in load_file(file).items()}
            out[f"{naming}:metadata"] = as_bytes(note)
            out |= {f"{naming}:{k}": v for k, v in outputs(unet, text).items()}

    unet, text = models()
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["to_q", "to_v"])
    whole = get_peft_model(unet, config)
    for key, p in whole.named_parameters():
        if "lora_" in key:
            p.copy_(draw(p.shape, f"peft:{key}") / p.shape[1] ** .5)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        note = json.loads(Path(folder, "adapter_config.json").read_text())
        out |= {f"peft|{k}": v for k, v in load_file(Path(folder, "adapter_model.safetensors")).items()}
    out["peft:metadata"] = as_bytes(note)
    return out | {f"peft:{k}": v for k, v in outputs(whole, text).items()}


@part
def lcm():
    """The scheduler alone, and a pipeline with a LoRA of LCM-LoRA's layers: latents at every step."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    from test_diffusion import LCM_STEPS, SHAPE, toy
    from test_lora import lcm_lora
    from personal import TEXT, UNET, lora_inputs
    scheduler, out, times = LCMScheduler.from_config(SD15_SCHEDULER), {}, []
    for n in range(1, 51):
        scheduler.set_timesteps(n)
        times.append(scheduler.timesteps)
    out["times"] = torch.cat(times).to(torch.int16)
    for n in LCM_STEPS:
        scheduler.set_timesteps(n)
        x, way, noise = draw(SHAPE, f"lcm {n}:x"), [], generator(f"lcm {n}:steps")
        for t in scheduler.timesteps:
            x = scheduler.step(toy(x, t), t, x, generator=noise).prev_sample
            way.append(x)
        out[f"lcm {n}"] = torch.stack(way)

    text = their_text(**asdict(TEXT))
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=text, tokenizer=None, unet=their_unet(UNET), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with tempfile.TemporaryDirectory() as folder:
        save_file(lcm_lora(pipe.unet), f"{folder}/lcm.safetensors")
        pipe.load_lora_weights(folder, weight_name="lcm.safetensors")
    x, _, ids = lora_inputs()
    context, way = text(ids).last_hidden_state, []
    noise = [generator(f"lcm:{i}") for i in range(2)]
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, context).sample, t, x, generator=noise).prev_sample
        way.append(x)
    return out | {"latents": torch.stack(way)}


@part
def vit():
    """A small ViTModel read by transformers from a file with our names, at its own size and at another."""
    from transformers import ViTModel

    from test_vit import SMALL
    from vit import ViT
    settings = {"model_type": "vit", "architectures": ["ViTModel"], "hidden_act": "gelu"} | asdict(SMALL)
    with tempfile.TemporaryDirectory() as folder:
        save_file(fill(ViT(SMALL)).state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps(settings))
        theirs = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    own = theirs(draw((2, 3, 32, 32), "vit:own"))
    other = theirs(draw((1, 3, 48, 24), "vit:other"), interpolate_pos_encoding=True)
    return {"own": own.last_hidden_state, "other": other.last_hidden_state}


if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        with torch.no_grad():
            tensors = PARTS[name]()
        tensors = {key: t.contiguous() for key, t in tensors.items()}
        save_file(tensors, Path(__file__).with_name(f"{name}.safetensors"))
        print(name, {key: tuple(t.shape) for key, t in tensors.items()})
