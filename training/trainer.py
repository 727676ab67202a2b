"""The long training loop: schedule, moving average, log, and a checkpoint to resume from."""
import json
import math
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from files.checkpoints import Tensors, finite, write
from files.disk import refusing
from program import distributed
from program.console import Stopped, UserError, advance, deferred_stop
from program.lock import locked
from program.memory import plan_memory
from training.fit import backward
from training.parts import differences


@contextmanager
def global_seed(seed):
    """Inside, the global CPU generator, which initialisers use, starts at this seed; then it is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def say_start(trainer, model, data, batch):
    """Plan the memory of a training, and print model, data, steps and plan."""
    plan, dtype = plan_memory(model, batch), str(model.dtype).removeprefix("torch.")
    if distributed.is_main():
        print(f"{model.name} on {model.device}, {dtype}; {data.told}; {trainer.steps:,} steps of {batch}")
        print(plan)


class Trainer:
    """AdamW with warm-up and cosine decay, a moving average, a log, and a checkpoint that later runs resume.

    Iterate over a Trainer for the numbers of the remaining steps, and call update(loss) once in each. In
    several processes (program/distributed.py) the mean loss counts.

    modules: name -> nn.Module, whose parameters that require gradients are trained. out: folder of log.jsonl
    and state.safetensors. deadline: when to stop, as time.time(). muon: train matrices, and kernels as
    matrices with a row per output, by Muon (Jordan et al., kellerjordan.github.io/posts/muon). depends_on:
    name -> what the run depends on. UserError if the state is damaged or of another run, naming the
    differences, and for a loss that is not finite. Stopped, with everything saved, after a signal."""

    def __init__(self, modules, out, steps, lr, warmup=100, ema=.999, weight_decay=.01,
                 deadline=math.inf, muon=False, depends_on=None):
        self.out, self.steps, self.lr, self.warmup, self.decay = Path(out), steps, lr, warmup, ema
        self.deadline = deadline
        self.depends_on = {name: str(value) for name, value in (depends_on or {}).items()}
        self.parameters = {f"{name}.{key}": p for name, module in modules.items()
                           for key, p in module.named_parameters() if p.requires_grad}
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.step, self.mean, self.signal = 0, {}, 0
        self.device = next(iter(self.parameters.values())).device

        # Views of kernels as matrices: a step of Muon on them changes the parameters
        self.matrices = {key: p.detach().view(len(p), -1) for key, p in self.parameters.items()
                         if muon and p.dim() in (2, 4)}
        others = {key: p for key, p in self.parameters.items() if key not in self.matrices}
        adam = torch.optim.AdamW(others.values(), lr, (.9, .99), weight_decay=weight_decay, fused=True)
        self.optimizers = {adam: others}
        if self.matrices:
            of_matrices = torch.optim.Muon(self.matrices.values(), lr, weight_decay,
                                           adjust_lr_fn="match_rms_adamw")
            self.optimizers[of_matrices] = self.matrices

        # Allocate the optimisers' state now, so that a checkpoint can be copied into it
        self.moments = {}
        for optimizer, trained in self.optimizers.items():
            names = ["momentum_buffer"] if trained is self.matrices else ["exp_avg", "exp_avg_sq"]
            for key, p in trained.items():
                optimizer.state[p] = {name: torch.zeros_like(p) for name in names}
                self.moments |= {f"{name}.{key}": t for name, t in optimizer.state[p].items()}
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / "state.safetensors").exists():
            self._resume(self.out / "state.safetensors")

    def __iter__(self):
        saved = time.time()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.out.name, mininterval=5,
                   disable=not distributed.is_main())
        with locked(self.out), bar, deferred_stop() as stop:
            while not self.done and not self.ended(stop):
                yield self.step
                advance(bar)
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.mean.items()}, refresh=False)
                if time.time() - saved > 120:
                    self.save()
                    saved = time.time()
            self.save()
        if self.signal:
            where = f"stopped at step {self.step} of {self.steps}"
            raise Stopped(self.signal, f"{where}; the same command resumes it")

    def ended(self, stop):
        """Whether the deadline has passed or a signal has come, in any process."""
        self.signal = int(distributed.greatest(stop[0] if stop else 0))
        return self.signal or distributed.greatest(time.time() >= self.deadline)

    @property
    def done(self):
        return self.step >= self.steps

    def update(self, loss, **numbers):
        """One step down the gradient of `loss`. It and `numbers` are shown and logged as running means."""
        backward(loss, self.parameters.values())
        shown = {name: torch.as_tensor(value, device=self.device).detach().float().clone()
                 for name, value in {"loss": loss, **numbers}.items()}
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        distributed.average([*shown.values(), *gradients])
        loss = shown["loss"]
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {self.step}: lower the learning rate of "
                            f"{self.lr:g}, or look for such numbers in the data")
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for key, matrix in self.matrices.items():
            matrix.grad = self.parameters[key].grad.flatten(1)

        # warm-up, and a cosine down to 0
        cosine = .5 + .5 * math.cos(math.pi * self.step / self.steps)
        lr = self.lr * min(1, (self.step + 1) / self.warmup) * cosine
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for p in self.parameters.values():
            p.grad = None

        # at first the average covers few steps, so that it forgets the initial weights
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_([*self.ema.values()], [p.detach() for p in self.parameters.values()], 1 - decay)

        self.step += 1
        for key, value in shown.items():
            value = value.item()
            before = self.mean.get(key, value)
            self.mean[key] = before + .02 * (value - before)
        if self.step % 50 == 0:
            self.log(lr=lr, **self.mean)

    def finish(self, save, name, write):
        """Put the moving average into the modules, and call write(path): `save`, if given and the training is
        done, else `name` in the run's folder. So an unfinished result replaces no other file."""
        self.average()
        file = Path(save) if save and self.done else self.out / name
        if distributed.is_main():
            write(file)
            print(f"{'finished' if self.done else 'stopped; the same command resumes it'}; {file}")

    def log(self, **numbers):
        """Add a line with these numbers to log.jsonl."""
        if not distributed.is_main():
            return
        line = {"step": self.step, "time": round(time.time()), **{k: round(v, 6) for k, v in numbers.items()}}
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def tensors(self):
        """name in state.safetensors -> tensor: weights, moving average, and the optimisers' moments."""
        now = {f"now.{key}": p.detach() for key, p in self.parameters.items()}
        return now | {f"ema.{key}": t for key, t in self.ema.items()} | self.moments

    def save(self):
        """Write state.safetensors."""
        if not distributed.is_main():
            return
        note = {"step": str(self.step), "of": json.dumps(self.depends_on)}
        write(self.tensors(), self.out / "state.safetensors", note)

    def _resume(self, file):
        with refusing(f"{file}: damaged; remove it to begin again"):
            state = Tensors(file)
            found, note = state.all(), state.note
            self.step, of = int(note["step"]), dict(json.loads(note["of"]))
            if self.step < 0:
                raise ValueError(f"at step {self.step}")
            if self.step > self.steps:
                raise UserError(f"{file}: at step {note['step'][:20]}, past --steps; give more, or train in "
                                "another folder")
            if bad := [key for key, t in found.items() if not finite(t)]:
                raise ValueError(f"{bad[0]} holds NaN or infinite numbers")

        # Is it the state of this run?
        ours = self.tensors()
        differ = differences(of, self.depends_on)
        kinds, expected = ({k: (t.shape, t.dtype) for k, t in some.items()} for some in (found, ours))
        if kinds != expected:
            differ.append("with other modules")
        if differ:
            raise UserError(f"{file}: of another run ({'; '.join(differ)}); remove it, or train in another "
                            "folder")

        # Then resume from it
        for key, t in ours.items():
            t.copy_(found[key])
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                state["step"].fill_(self.step)

    def average(self):
        """Replace the weights of the modules by the moving average."""
        torch._foreach_copy_([p.detach() for p in self.parameters.values()], [*self.ema.values()])

    @contextmanager
    def averaged(self):
        """Inside, the modules have the moving average as weights."""
        now = [p.detach().clone() for p in self.parameters.values()]
        self.average()
        yield
        torch._foreach_copy_([p.detach() for p in self.parameters.values()], now)


class Pool:
    """Rows of several tensors to draw training samples from, made on demand: make(n) -> the tensors of row n,
    which depend on n alone, so that a resumed training sees the same samples. There are `first` rows and
    `fresh` more after every step; samples come from the last `size`."""

    def __init__(self, make, first, fresh, size):
        self.first, self.fresh, self.size, self.row = first, fresh, size, lru_cache(size)(make)

    def draw(self, step, count, generator):
        """The numbers (count,) of random rows at this step."""
        end = self.first + step * self.fresh
        return torch.randint(max(0, end - self.size), end, (count,), generator=generator)

    def __getitem__(self, numbers):
        """A batch of each tensor, from the rows with these numbers."""
        return [torch.stack(column) for column in zip(*map(self.row, numbers.tolist()))]
