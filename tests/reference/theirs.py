"""diffusers' and PEFT's way through a journey of journeys.py, by itself, so that its memory is its own:

    python tests/reference/theirs.py MODEL DTYPE STEPS PHOTO OUT         # a LoRA of rank 4, and a picture
    python tests/reference/theirs.py MODEL DTYPE SAMPLE_STEPS LORA OUT   # a picture of that LoRA
"""
import sys
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

model, dtype, steps, given, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype), safety_checker=None)
schedule = DDPMScheduler.from_config(pipe.scheduler.config)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
torch.manual_seed(0)
Path(out).mkdir(parents=True)


def tune(photo):
    """As in diffusers' examples/dreambooth/train_dreambooth_lora.py."""
    for part in pipe.unet, pipe.vae, pipe.text_encoder:
        part.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian",
                                     target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    pipe.unet.train()
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, 5e-4)
    pixels = torch.from_numpy(numpy.array(Image.open(photo).convert("RGB"))).permute(2, 0, 1)[None]
    with torch.no_grad():
        pixels = pixels.to(pipe.unet.dtype) / 127.5 - 1
        latent = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
        text, _ = pipe.encode_prompt("a sks face", "cpu", 1, False)
    for _ in range(int(steps)):
        noise, t = torch.randn_like(latent), torch.randint(1000, (1,))
        found = pipe.unet(schedule.add_noise(latent, noise, t), t, text).sample
        F.mse_loss(found.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.)
        optimizer.step()
        optimizer.zero_grad()
    pipe.unet.eval()
    found = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(out, unet_lora_layers=found)


if given.endswith(".png"):
    tune(given)
else:
    pipe.load_lora_weights(given)
sampled = 1 if given.endswith(".png") else int(steps)
picture = pipe("a sks face as a rock star", num_inference_steps=sampled, guidance_scale=7.5).images[0]
picture.save(Path(out, "0.png"))
