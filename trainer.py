"""The training loop that everything here shares: optimiser, schedule, moving average, log, and a checkpoint to resume from."""
import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoints import write
from console import UserError

SCALE = 2 ** 10


def backward(loss, parameters):
    """The gradients of `loss` in `parameters`, as loss.backward() makes them in float32. In between they are SCALE times as large, since
    float16, which ends at 6e-8, would round most of a picture's mean error away; the scale is a power of two, so nothing else changes."""
    (loss * SCALE).backward()
    torch._foreach_div_([p.grad for p in parameters if p.grad is not None], SCALE)


@contextmanager
def seeded(seed):
    """Modules built inside start from this seed. Their initialisers draw from the global CPU generator, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Trainer:
    """AdamW with warm-up and cosine decay, an exponential moving average, a log and a checkpoint that any later call resumes from.

    modules: dict of name -> nn.Module; parameters that require no gradient are left out. out: folder of log.jsonl and state.safetensors.
    muon: matrices and convolutions' kernels, as matrices of a row per output, by Muon (Jordan et al., kellerjordan.github.io/posts/muon).
    of: what tells this run from others beside its modules' shapes.
    Iterate over it for the step numbers that remain; call `update(loss)` once in each. UserError if the state is another run's or the loss
    is no number any more.
    """

    def __init__(self, modules, out, steps, lr, warmup=100, ema=.999, betas=(.9, .99), weight_decay=.01, minutes=math.inf, muon=False, of=""):
        self.parameters = {f"{n}.{k}": p for n, m in modules.items() for k, p in m.named_parameters() if p.requires_grad}
        self.out, self.steps, self.lr, self.warmup, self.decay, self.minutes, self.of = Path(out), steps, lr, warmup, ema, minutes, of
        self.out.mkdir(parents=True, exist_ok=True)
        self.matrices = {k: p.detach().view(len(p), -1) for k, p in self.parameters.items() if muon and p.dim() in (2, 4)}  # in the parameters' memory
        others = {k: p for k, p in self.parameters.items() if k not in self.matrices}
        self.optimizers = {torch.optim.AdamW(others.values(), lr, betas, weight_decay=weight_decay, fused=True): others}
        if self.matrices:
            self.optimizers[torch.optim.Muon(self.matrices.values(), lr, weight_decay, adjust_lr_fn="match_rms_adamw")] = self.matrices
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.step, self.mean = 0, {}
        if (self.out / "state.safetensors").exists():
            self._resume()

    def __iter__(self):
        start = saved = time.time()
        with tqdm(total=self.steps, initial=self.step, desc=self.out.name, mininterval=5, dynamic_ncols=True) as bar:
            while not self.done and time.time() - start < 60 * self.minutes:
                yield self.step
                bar.update()
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.mean.items()}, refresh=False)
                if time.time() - saved > 120:
                    self.save()
                    saved = time.time()
        self.save()

    @property
    def done(self):
        return self.step >= self.steps

    def update(self, loss, **numbers):
        """One step down the gradient of `loss`; `numbers` are shown and logged with it, as running means."""
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {self.step}: the learning rate {self.lr:g} is too high, or the data or the start "
                            "hold such numbers")
        progress = self.step / self.steps
        lr = self.lr * min(1, (self.step + 1) / self.warmup) * (.5 + .5 * math.cos(math.pi * progress))
        backward(loss, self.parameters.values())
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for k, m in self.matrices.items():
            m.grad = self.parameters[k].grad.flatten(1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for p in self.parameters.values():
            p.grad = None
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        self.step += 1
        for k, v in {"loss": loss, **numbers}.items():
            v = float(v.detach() if torch.is_tensor(v) else v)
            self.mean[k] = self.mean.get(k, v) + .02 * (v - self.mean.get(k, v))
        if self.step % 50 == 0:
            self.log(lr=lr, **self.mean)

    def log(self, **numbers):
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": self.step, "time": round(time.time()), **{k: round(v, 6) for k, v in numbers.items()}}) + "\n")

    def save(self):
        tensors = {f"now.{k}": p.detach() for k, p in self.parameters.items()} | {f"ema.{k}": p for k, p in self.ema.items()}
        for optimizer, trained in self.optimizers.items():
            tensors |= {f"{m}.{k}": t for k, p in trained.items() for m, t in optimizer.state[p].items() if m != "step"}
        write(tensors, self.out / "state.safetensors", {"step": str(self.step), "of": self.of})

    def _resume(self):
        file = self.out / "state.safetensors"
        try:
            with safe_open(file, "pt") as f:
                note, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
            self.step, of = int(note["step"]), note.get("of", "")
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error}); remove it to begin again") from None
        ours = {f"{kind}.{k}": p.shape for k, p in self.parameters.items() for kind in ("now", "ema")}
        if of != self.of or ours != {k: t.shape for k, t in tensors.items() if k.startswith(("now.", "ema."))}:
            raise UserError(f"{file}: of another run ({of or 'with other modules'}); remove it, or train in another folder")
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(tensors[f"now.{k}"])
                self.ema[k].copy_(tensors[f"ema.{k}"])
        for optimizer, trained in self.optimizers.items():
            for k, p in trained.items():
                moments = {m: tensors[f"{m}.{k}"].to(p.device) for m in ("exp_avg", "exp_avg_sq", "momentum_buffer") if f"{m}.{k}" in tensors}
                if any(m.shape != p.shape for m in moments.values()):
                    raise UserError(f"{file}: damaged (the moments of {k} have another shape); remove it to begin again")
                optimizer.state[p] = moments and {"step": torch.tensor(float(self.step), device=p.device), **moments}

    def average(self):
        """Put the moving average into the modules in place of the current weights."""
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(self.ema[k])


class Ring:
    """The `size` rows that were added last, of several tensors side by side: a pool to draw training samples from."""

    def __init__(self, size):
        self.size, self.count, self.columns = size, 0, []

    def __len__(self):
        return min(self.count, self.size)

    def add(self, *tensors):
        """Rows to put in place of the oldest; the first call fixes shapes, dtypes and devices."""
        if not self.columns:
            self.columns = [t.new_empty(self.size, *t.shape[1:]) for t in tensors]
        at = (torch.arange(len(tensors[0])) + self.count) % self.size
        for column, t in zip(self.columns, tensors):
            column[at.to(column.device)] = t
        self.count += len(at)

    def __getitem__(self, rows):
        """The rows with these indices (CPU), a slice of each tensor."""
        return [column[rows.to(column.device)] for column in self.columns]
