"""Speed against diffusers and PEFT: same weights, same process, alternating runs.

    python -m evaluation.bench                       # nano
    python -m evaluation.bench --model random        # Stable Diffusion 1.5 at full size, its weights random
    python -m evaluation.bench --rows a b d --repeats 9

The comparisons need diffusers and peft; it says so without. It prints a table, and writes it with every
number to --out: medians and ranges of seconds, ours and theirs; the share of the time that the same
multiplications would take at the rate of one large matrix product (possible); on a GPU, the peak memory above
the model's. Rows f and g compare people side by side with the same people one by one.
"""
import json
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from program import console
from clip import IDENTIFIER

import torch
import torch.nn.functional as F

import clip
import hdb
import unet
import vae
from methods import hyperdreambooth
from diffusion import STEPS, noised
from adapters import join
from evaluation.timing import Row, matmul_rate, measured, table
from files.disk import write_text
from files.layouts import HERE, device_and_dtype
from files.merged import config_files
from files.person import save_person
from hypernet import HyperConfig, HyperNetwork
from lidb import unet_layers
from program.options import DEVICE, DTYPE, Option, early, new_folder, number, parser_of, same
from sd import StableDiffusion
from training.trainer import global_seed
from vit import NANO_VIT

PROMPT, RANK = "a [V] face", 4
SETTINGS = [Option("sample_steps", number(int, 1, 999), 15, 30, "sampling steps of the guided picture"),
            same("batch", number(int, 1, 64), 4, "batch of fine-tuning"),
            Option("people", number(int, 1, 256), 16, 4, "people side by side in rows f and g")]


def full_size(device, dtype):
    """Stable Diffusion 1.5 with random weights and a vocabulary of a few words."""
    words = clip.learn_bpe(["a", "face", "as", "rock", "star", IDENTIFIER])
    with global_seed(0), torch.device(device):
        parts = unet.UNet(unet.SD15), clip.TextTransformer(clip.SD15), vae.VAE(vae.SD15)
    network, text, autoencoder = (part.to(dtype, memory_format=torch.channels_last) for part in parts)
    return StableDiffusion("random", network, text, clip.Tokenizer(*words), autoencoder)


def main(args):
    device, dtype = device_and_dtype(args.device, args.dtype and getattr(torch, args.dtype))
    nano = args.model == "nano"
    model = hdb.load("nano", device, dtype) if nano else full_size(device, dtype)
    method = hdb.HyperDreamBooth(model)
    if nano:
        method.hypernet = hdb.load_hypernet(HERE / "nano/hypernet.safetensors", model)
    else:
        with global_seed(0):
            network = HyperNetwork(HyperConfig(*method.lidb.shape, vit=NANO_VIT))
        method.hypernet = network.to(device).eval().requires_grad_(False)

    # Each row is printed and written as soon as it is measured
    lines, rate = [], matmul_rate(device, dtype)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{args.model}, {dtype}, {name}, matrices at {rate / 1e9:,.0f} GFLOP/s")
    print(table([]))
    about = {"model": args.model, "device": name, "dtype": str(dtype), "torch": torch.__version__,
             "matrices, FLOP/s": rate, "settings": {row.name: getattr(args, row.name) for row in SETTINGS}}
    file = args.out / f"bench_{args.model}_{device.type}.json"
    for row in rows(method, others(model), args):
        if args.rows is None or row.key in args.rows:
            lines.append(measured(row, args.repeats, rate, device))
            print(table(lines[-1:]).splitlines()[-1], flush=True)
            write_text(json.dumps(about | {"rows": lines}, indent=2) + "\n", file)
    print(file)


def rows(method, their, args):
    """All rows, one by one, so that one row's preparation does not occupy another's memory."""
    model, device, config = method.model, method.model.device, method.model.unet.config
    side, batch = 8 * config.sample_size, args.batch
    photos = torch.randn(args.people, 3, side, side, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    photos = photos.to(device)
    photo, theta = photos[:1], method.predict(photos[:1])
    x = torch.randn(2, 4, config.sample_size, config.sample_size, device=device, dtype=model.dtype)
    context = model.context([PROMPT, ""]).detach()

    def forward():
        with torch.no_grad():
            model.unet(x, 500, context)
    yield Row("a", "UNet, a guidance batch", forward, their and partial(their.forward, x, context), True)

    def tuned(steps, **settings):
        return method.fine_tune(photo, theta, steps, RANK, batch=batch, **settings)
    yield Row("b", f"fine-tuning, a step of {batch}, rank {RANK}", tuned,
              their and partial(their.tune, batch=batch), True, 12 if device.type == "cuda" else 3)
    yield Row("c", "photo to saved person, 40 steps", partial(person, method, photo, batch))

    def picture(adapters):
        return method.sample([PROMPT], adapters, [0], steps=args.sample_steps, guidance=2.)
    theirs = their and partial(their.picture, context, args.sample_steps)
    yield Row("d", f"guided picture, {args.sample_steps} steps", partial(picture, {}), theirs, True)
    adapters = join(method.lidb.adapters(theta), tuned(1))
    with their.adapted() if their else nullcontext():
        yield Row("d", "the same of a person", partial(picture, adapters), theirs)
    yield Row("e", "the hypernetwork's prediction", partial(method.predict, photo), None, True)
    yield from side_by_side(method, photos)


def person(method, photo, batch):
    """From a photo to the file of the person."""
    theta = method.predict(photo)
    lora = method.fine_tune(photo, theta, batch=batch)
    with TemporaryDirectory() as folder:
        save_person(hyperdreambooth.person(theta, lora), method, Path(folder, "person"))


def side_by_side(method, photos):
    """The rows that compare people side by side with the same people one by one."""
    model, theta, everybody = method.model, method.predict(photos), slice(0, len(photos))
    latents, generator = model.encode(photos).detach(), torch.Generator().manual_seed(0)
    features = hdb.encode_face(method.hypernet.vit, photos).float()

    def learn(who):
        method.hypernet.requires_grad_(True)
        found = method.hypernet.refine(features[who])
        with model.adapted(method.lidb.adapters(found)):
            noisy = noised(latents[who], generator)
            hdb.hyper_loss(model, [PROMPT] * len(found), noisy, found)[0].backward()
        method.hypernet.zero_grad()
        method.hypernet.requires_grad_(False)

    def tune(who):
        method.fine_tune(photos[who], theta[who], 6, RANK, batch=1)

    def each(work):
        for i in range(len(photos)):
            work(slice(i, i + 1))
    yield Row("f", f"hypernetwork's training, a step of {len(photos)} people", partial(learn, everybody),
              partial(each, learn))
    yield Row("g", f"fine-tuning {len(photos)} people, 6 steps of 1", partial(tune, everybody),
              partial(each, tune))


def others(model):
    """diffusers' model with the same weights; None, with a message, if it is not installed."""
    try:
        return Theirs(model)
    except ImportError as error:
        print(f"no comparison with diffusers and peft: {error}")
        return None


class Theirs:
    """The same weights in diffusers' modules."""

    def __init__(self, model):
        from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
        from peft import LoraConfig
        configs = config_files(model)
        with torch.device("meta"):
            network = UNet2DConditionModel.from_config(configs["unet/config.json"])
            self.vae = AutoencoderKL.from_config(configs["vae/config.json"])
        # diffusers' memory layout
        weights = {name: p.contiguous() for name, p in model.unet.state_dict().items()}
        network.load_state_dict(weights, assign=True)
        self.vae.load_state_dict(model.vae.state_dict(), assign=True)
        self.unet = network.requires_grad_(False).eval()
        if model.unet.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        schedule = configs["scheduler/scheduler_config.json"]
        self.noise = DDPMScheduler.from_config(schedule)
        self.solver = DPMSolverMultistepScheduler.from_config(schedule)
        layers = unet_layers(hdb.HyperDreamBooth(model).layers)
        self.lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian",
                               target_modules=[name.removeprefix("unet.") for name in layers])
        self.model = model

    @contextmanager
    def adapted(self):
        """Inside, the UNet has a LoRA of the same rank on the same layers."""
        self.unet.add_adapter(self.lora)
        try:
            yield
        finally:
            self.unet.delete_adapters("default")

    @torch.no_grad()
    def forward(self, x, context):
        return self.unet(x, 500, context).sample

    def tune(self, steps, batch, callback):
        """Fine-tune a LoRA, for ticks()."""
        model, size = self.model, self.model.unet.config.sample_size
        latent = torch.randn(batch, 4, size, size, device=model.device, dtype=model.dtype)
        context = model.context([PROMPT]).detach().expand(batch, -1, -1)
        with self.adapted():
            self.unet.train()
            trained = [p for p in self.unet.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, 3e-3, fused=True)
            for step in range(steps):
                noise, t = torch.randn_like(latent), torch.randint(STEPS, (batch,), device=model.device)
                found = self.unet(self.noise.add_noise(latent, noise, t), t, context).sample
                loss = F.mse_loss(found.float(), noise.float())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                callback(step, loss.item())
        self.unet.eval()

    @torch.no_grad()
    def picture(self, context, steps):
        """Draw a guided picture."""
        self.solver.set_timesteps(steps)
        size = self.model.unet.config.sample_size
        x = torch.randn(1, 4, size, size, device=self.model.device, dtype=self.model.dtype)
        for t in self.solver.timesteps:
            prompt, negative = self.unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = self.solver.step(negative + 2. * (prompt - negative), t, x).prev_sample
        self.vae.decode(x / self.vae.config.scaling_factor)


def arguments():
    model = early("model").model or "nano"
    return parser_of(__doc__, [
        same("model", str, "nano", "nano, or random: SD 1.5 at full size with random weights",
             choices=["nano", "random"]),
        DEVICE, DTYPE, *SETTINGS,
        same("rows", str, None, "rows to measure; default: all", nargs="+", choices=list("abcdefg")),
        same("repeats", number(int, 1, 1000), 5, "runs of every row"),
        same("out", new_folder, Path("results"), "folder of the table")], model).parse_args()


if __name__ == "__main__":
    console.run(main, arguments)
