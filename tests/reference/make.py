"""Make the stored reference outputs with diffusers and transformers:  python tests/reference/make.py [part ...]

    pip install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 pytest   # needed here only, never by the tests

Each function below builds a small model of the reference library, fills it by tests/reference/rule.py and returns the tensors to
keep; they land in tests/reference/<part>.safetensors. Inputs are drawn by the same rule, so only outputs are stored.
"""
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from rule import draw, fill, generator  # noqa: E402

PARTS = {}


def part(function):
    PARTS[function.__name__] = function
    return function


@part
def clip_text():
    from transformers import CLIPTextConfig, CLIPTextModel
    config = CLIPTextConfig(vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    model = CLIPTextModel(config)
    fill(getattr(model, "text_model", model))  # the wrapper is gone since transformers 5.6
    ids = torch.randint(300, (2, 77), generator=generator("clip_text"))
    return {"full": model(ids).last_hidden_state, "short": model(ids[:, :9]).last_hidden_state}


@part
def clip_model():
    import numpy as np
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    text = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, bos_token_id=298)
    vision = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
                  hidden_act="gelu")
    ids = torch.randint(298, (3, 20), generator=generator("clip_model"))
    for row, end in zip(ids, (4, 11, 19)):
        row[end:] = 299
    out = {}
    for eos in 2, 299:  # 2 stands in the official files, and makes transformers take the greatest id as end of text
        model = fill(CLIPModel(CLIPConfig(text_config=text | dict(eos_token_id=eos), vision_config=vision, projection_dim=40)))
        features = model.get_text_features(ids)
        out[f"text_{eos}"] = getattr(features, "pooler_output", features)  # no longer a tensor since transformers 5
    features = model.get_image_features(draw((2, 3, 32, 32), "clip_model"))
    out["image"] = getattr(features, "pooler_output", features)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for h, w in (67, 50), (20, 31):
        image = (draw((h, w, 3), "photo") * 25 + 128).byte()  # so weak that nothing is clipped
        out[f"pixels_{h}_{w}"] = torch.as_tensor(np.asarray(processor(Image.fromarray(image.numpy()))["pixel_values"][0]))
    return out


@part
def tokenizer():
    import json
    import tempfile

    from transformers import CLIPTokenizer

    from clip import Tokenizer, learn_bpe
    data = json.loads(Path(__file__).with_name("hard_texts.json").read_text(encoding="utf-8"))
    vocab, merges = learn_bpe(data["words"])
    fewer = {token: i for i, token in enumerate(t for t in vocab if t not in ("#", "#</w>", "ð"))}  # ð begins most emoji
    out = {}
    for name, vocab in ("known", vocab), ("unknown", fewer):
        with tempfile.TemporaryDirectory() as folder:
            Tokenizer(vocab, merges).save(folder)
            reference = CLIPTokenizer.from_pretrained(folder)
        ids = reference(data["texts"], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        out[name] = ids.to(torch.int16)
    return out


@part
def unet():
    from diffusers import UNet2DConditionModel
    from tests.test_unet import CONFIGS, inputs
    outputs = {}
    for case, size in [("small 16x16", (16, 16)), ("small 9x13", (9, 13)), ("nano 16x16", (16, 16)), ("nano 7x10", (7, 10))]:
        config = CONFIGS[case.split()[0]]
        up = [kind.replace("Down", "Up") for kind in reversed(config.down_block_types)]
        x, t, context = inputs(case, (2, config.in_channels, *size))
        outputs[case] = fill(UNet2DConditionModel(**asdict(config), up_block_types=up))(x, t, context).sample
    return outputs


@part
def vae():
    from diffusers import AutoencoderKL
    from tests.test_vae import CONFIGS
    outputs = {}
    for kind, config in CONFIGS.items():
        n = len(config.block_out_channels)
        model = fill(AutoencoderKL(**asdict(config), down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n))
        for h, w in [(64, 64), (40, 56)]:
            case = f"{kind} {h}x{w}"
            latent = model.encode(draw((1, 3, h, w), f"{case}:image")).latent_dist
            image = model.decode(draw((1, 4, h // 8, w // 8), f"{case}:z")).sample
            outputs |= {f"{case} mean": latent.mean, f"{case} logvar": latent.logvar, f"{case} image": image}
    return outputs


# scheduler/scheduler_config.json of SD 1.5, the file diffusers makes every scheduler from; its class is the pipeline's default
SD15_SCHEDULER = dict(_class_name="PNDMScheduler", beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                      num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None)


@part
def sampling():
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    from tests.test_sampling import SHAPE, STEPS, toy
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
        for name, scheduler in (f"ddim eta 0 {n}", ddim), (f"ddim eta 1 {n}", ddim), (f"dpmpp_2m {n}", dpmpp_2m):
            scheduler.set_timesteps(n)
            options = dict(eta=1., generator=generator(f"{name}:steps")) if "eta 1" in name else {}
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
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tests.test_sampling import TEXT, UNET, VAE, pipeline_inputs
    from transformers import CLIPTextConfig, CLIPTextModel
    up = [kind.replace("Down", "Up") for kind in reversed(UNET.down_block_types)]
    denoiser = fill(UNet2DConditionModel(**asdict(UNET), up_block_types=up))
    n = len(VAE.block_out_channels)
    autoencoder = fill(AutoencoderKL(**asdict(VAE), down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n))
    text = CLIPTextModel(CLIPTextConfig(**asdict(TEXT)))
    fill(getattr(text, "text_model", text))
    x, prompts, negatives = pipeline_inputs()
    pipe = StableDiffusionPipeline(vae=autoencoder, text_encoder=text, tokenizer=None, unet=denoiser,
                                   scheduler=DDIMScheduler.from_config(SD15_SCHEDULER), safety_checker=None, feature_extractor=None)
    way = []

    def keep(pipe, i, t, tensors):
        way.append(tensors["latents"])
        return tensors

    pipe(prompt_embeds=text(prompts).last_hidden_state, negative_prompt_embeds=text(negatives).last_hidden_state, latents=x,
         height=8 * x.shape[2], width=8 * x.shape[3], num_inference_steps=4, guidance_scale=7.5, output_type="latent",
         callback_on_step_end=keep)
    return {"latents": torch.stack(way), "images": autoencoder.decode(way[-1] / VAE.scaling_factor).sample}


@part
def lora():
    """LoRAs as others write them, all their keys and numbers ("<naming>|<key>"), and what diffusers or PEFT makes of them."""
    import json
    import re
    import tempfile

    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import load_file
    from tests.test_person import TEXT, UNET, lora_inputs
    from transformers import CLIPTextConfig, CLIPTextModel
    some = r"(down_blocks\.0|mid_block|up_blocks\.1)\..*"
    attention = LoraConfig(r=2, lora_alpha=2, target_modules=some + r"attn\d\.to_(q|k|v|out\.0)")
    everything = LoraConfig(r=2, lora_alpha=3, alpha_pattern={"proj_in": 5, "mid_block.attentions.0.proj_out": 1}, rank_pattern={"to_k": 3},
                            target_modules=some + r"(to_[qkv]|to_out\.0|ff\.net\.(0\.proj|2)|proj_in|proj_out|time_emb_proj|conv_shortcut)"
                            r"|time_embedding\.linear_1")
    words = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])

    def models():
        up = [kind.replace("Down", "Up") for kind in reversed(UNET.down_block_types)]
        text = CLIPTextModel(CLIPTextConfig(**asdict(TEXT)))
        fill(getattr(text, "text_model", text))
        return fill(UNet2DConditionModel(**asdict(UNET), up_block_types=up)), text

    def adapted(module, config, naming):
        module.add_adapter(config)
        state = get_peft_model_state_dict(module)
        return {key: draw(p.shape, f"{naming}:{key}") / p.shape[1] ** .5 for key, p in state.items()}

    def outputs(unet, text):
        x, t, ids = lora_inputs()
        context = text(ids).last_hidden_state
        return {"context": context, "noise": unet(x, t, context).sample}

    def old(key):  # as diffusers 0.14 to 0.20 wrote the attention processors
        return re.sub(r"to_(\w+?)(\.0)?\.lora_([AB])", lambda m: f"processor.to_{m[1]}_lora.{'down' if m[3] == 'A' else 'up'}", key)

    out = {}
    for naming in "diffusers peft", "diffusers lora.down", "diffusers processor", "kohya":
        unet, text = models()
        config = everything if naming in ("diffusers peft", "kohya") else attention
        state, words_state = adapted(unet, config, naming), adapted(text, words, naming)
        options = {}
        if naming == "diffusers peft":
            options = {"unet_lora_adapter_metadata": everything.to_dict(), "text_encoder_lora_adapter_metadata": words.to_dict()}
            options = {k: {n: sorted(v) if isinstance(v, set) else v for n, v in d.items()} for k, d in options.items()}
        if naming == "diffusers lora.down":
            state, words_state = (convert_state_dict_to_diffusers(d) for d in (state, words_state))
        if naming == "diffusers processor":
            state, words_state = {old(k): v for k, v in state.items()}, convert_state_dict_to_diffusers(words_state)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pytorch_lora_weights.safetensors")
            if naming == "kohya":
                whole = {f"unet.{k}": v for k, v in state.items()} | {f"text_encoder.{k}": v for k, v in words_state.items()}
                kohya = convert_state_dict_to_kohya(whole)
                kohya = {k.replace("lora_te1_encoder", "lora_te_text_model_encoder"): v for k, v in kohya.items()}
                kohya |= {k: torch.tensor(3.) for k in kohya if k.endswith("alpha")}  # diffusers 0.42 drops alphas that differ
                kohya = {k: v[:, :, None, None] if re.search("proj_(in|out).lora|shortcut.lora", k) and v.dim() == 2 else v
                         for k, v in kohya.items()}
                save_file({k: v.contiguous() for k, v in kohya.items()}, file)
            else:
                StableDiffusionPipeline.save_lora_weights(folder, state, words_state, **options)
            unet, text = models()
            pipe = StableDiffusionPipeline(vae=None, text_encoder=text, tokenizer=None, unet=unet, scheduler=None, safety_checker=None,
                                           feature_extractor=None, requires_safety_checker=False)
            pipe.load_lora_weights(folder, weight_name=file.name)
            with safe_open(file, "pt") as f:
                note = json.dumps({k: v for k, v in (f.metadata() or {}).items() if k != "format"})
            out |= {f"{naming}|{k}": v for k, v in load_file(file).items()}
            out |= {f"{naming}:metadata": torch.tensor(list(note.encode()), dtype=torch.uint8)}
            out |= {f"{naming}:{k}": v for k, v in outputs(unet, text).items()}
    unet, text = models()
    whole = get_peft_model(unet, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["to_q", "to_v"]))
    with tempfile.TemporaryDirectory() as folder:
        for key, p in whole.named_parameters():
            if "lora_" in key:
                p.copy_(draw(p.shape, f"peft:{key}") / p.shape[1] ** .5)
        whole.save_pretrained(folder)
        note = json.dumps(json.loads(Path(folder, "adapter_config.json").read_text()))
        out |= {f"peft|{k}": v for k, v in load_file(Path(folder, "adapter_model.safetensors")).items()}
    return out | {"peft:metadata": torch.tensor(list(note.encode()), dtype=torch.uint8)} | {
        f"peft:{k}": v for k, v in outputs(whole, text).items()}


@part
def vit():
    """A small ViTModel read by transformers from a file with our names, at its own size and at another."""
    import json
    import tempfile
    from dataclasses import asdict
    from transformers import ViTModel
    import hypernet
    from tests.test_hypernet import SMALL_VIT
    ours = fill(hypernet.ViT(SMALL_VIT))
    with tempfile.TemporaryDirectory() as folder:
        save_file(ours.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"], "hidden_act": "gelu", **asdict(SMALL_VIT)}))
        theirs = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return {"own": theirs(draw((2, 3, 32, 32), "vit:own")).last_hidden_state,
            "other": theirs(draw((1, 3, 48, 24), "vit:other"), interpolate_pos_encoding=True).last_hidden_state}


if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        with torch.no_grad():
            tensors = PARTS[name]()
        save_file({k: v.contiguous() for k, v in tensors.items()}, Path(__file__).with_name(f"{name}.safetensors"))
        print(name, {k: tuple(v.shape) for k, v in tensors.items()})
