"""Measure a training on photos, without a judge, by photos that it never sees."""
import torch
from tqdm import tqdm

from adapters import LowRank
from diffusion import denoising_loss, generators
from files import images

NOISES = 4  # of each picture, the same every time
STEPS = 15  # of the sampler


class WatchedPhotos:
    """People whose photos are not trained on: `features` (P, n, d), `latents` (P, 4, h, w) and the prompt."""

    def __init__(self, features, latents, prompt):
        self.features, self.latents, self.prompt = features, latents, prompt

    def losses(self, model, adapters):
        """name -> mean denoising loss of these photos, on the same noise: "own", under the low-rank
        `adapters` of P people; "another", under those of the next person; "nobody", without. "gap" is another
        − own: what the adapters know of the person, not of faces."""
        another = {name: LowRank(*(t.roll(1, 0) for t in pair)) for name, pair in adapters.items()}
        found, prompts = {}, [self.prompt] * len(self.latents)
        for name, applied in ("own", adapters), ("another", another), ("nobody", {}):
            (generator,) = generators([0])
            with torch.no_grad(), model.adapted(applied):
                drawn = [denoising_loss(model, self.latents, prompts, generator) for _ in range(NOISES)]
            found[name] = torch.cat(drawn).mean().item()
        return found | {"gap": found["another"] - found["own"]}

    def watch(self, model, estimates, trainer):
        """Log the losses() of the last estimate's adapters, and draw each person below the photo."""
        numbers, pictures = self.losses(model, estimates[-1]), []
        with tqdm(total=STEPS * len(self.latents), desc="watched", leave=False) as bar, torch.no_grad():
            for i, latent in enumerate(self.latents):
                one = {name: LowRank(*(t[i:i + 1] for t in pair)) for name, pair in estimates[-1].items()}
                drawn = model.sample([self.prompt], [i], STEPS, adapters=one,
                                     callback=lambda *step: bar.update())
                pictures += [model.decode(latent[None]).float().clamp(-1, 1).cpu(), drawn.cpu()]
        trainer.log(**numbers)
        sheet = images.sheet(torch.cat(pictures[::2] + pictures[1::2]), len(self.latents))
        images.save(sheet, trainer.out / f"step_{trainer.step:06d}.png", **numbers)
