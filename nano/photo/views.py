"""Training pictures for the reader of photos: portraits and drawings moved, turned and relit, and pictures of
no face or of several."""
import torch
import torch.nn.functional as F

from nano.photo.reader import view

GREY = .06  # the share of looks in black and white


def photographed(x, generator, strength):
    """Pictures (B, 3, H, W) in other light: gain, contrast, a colour cast, a lamp at one side, blur, noise
    and a covered patch, each at `strength` (B,) times its usual size."""
    device = generator.device

    def draw(*shape):
        uniform = torch.rand(len(x), *shape, generator=generator, device=device) * 2 - 1
        return uniform * strength.view(-1, *[1] * len(shape))
    axis = torch.linspace(-1, 1, x.shape[-1], device=device)
    lamp = draw(1, 1, 1) * axis.view(1, 1, 1, -1) + draw(1, 1, 1) * axis.view(1, 1, -1, 1)
    light = 1 + .25 * draw(1, 1, 1) + .08 * draw(3, 1, 1) + .2 * lamp
    x = ((x + 1) / 2).clamp(0, 1) ** (.3 * draw(1, 1, 1)).exp() * light * 2 - 1

    # Blur for half of them, grain, a coloured patch over a third
    blurred = F.interpolate(F.avg_pool2d(x, 3, 2, 1), x.shape[-2:], mode="bilinear")
    x = x.lerp(blurred, draw(1, 1, 1).clamp(min=0))
    grain = torch.randn(x.shape, generator=generator, device=device) * .08 * draw(1, 1, 1).abs()
    coarse = torch.randn(len(x), 3, 12, 12, generator=generator, device=device)
    coarse = coarse * .15 * draw(1, 1, 1).clamp(min=0)
    x = x + grain + F.interpolate(coarse, x.shape[-2:], mode="bilinear")
    cx, cy, rx, ry = draw(4).split(1, 1)
    inside = ((axis - cx).abs()[:, None, :] < rx.abs()[:, None] * .4) & (
        (axis - cy).abs()[:, :, None] < ry.abs()[:, None] * .4)
    covered = inside[:, None] & (draw(1, 1, 1) > .4)
    return torch.where(covered, draw(3, 1, 1), x).clamp(-1, 1)


def looks(pictures, generator, strength):
    """Random views (B, 3, 128, 128) of byte portraits (B, 3, H, W), `photographed`, some of them grey; and
    the position (B, 3) of the whole portrait in each view, as Reader's "frame"."""
    x = pictures.float() / 127.5 - 1
    chance = torch.rand(len(x), 7, generator=generator, device=generator.device)
    x = torch.where(chance[:, 0].view(-1, 1, 1, 1) < .5, x, x.flip(3))

    # Most views are near the frame, like the second looks of reader.read
    far = chance[:, 1] > .6
    spread = torch.where(far, 1., .4) * torch.tensor([.22, .22, .4, .25])[:, None]
    dx, dy, log, angle = spread * (2 * chance[:, 2:6] - 1).T
    zoom = (torch.where(far & (log > 0), 1.5 * log, log) + .04).exp()
    c, s = angle.cos(), angle.sin()
    frame = torch.stack([-(c * dx + s * dy) / zoom, -(-s * dx + c * dy) / zoom, -zoom.log()], 1)

    shown = photographed(view(x, dx, dy, zoom, angle), generator, strength)
    grey = (chance[:, 6] < GREY).view(-1, 1, 1, 1)
    return torch.where(grey, shown.mean(1, keepdim=True), shown), frame


def faceless(pictures, generator):
    """Byte portraits (B, 3, H, W) made faceless: a corner, the parts shuffled, or blots of colour."""
    count, side = len(pictures), pictures.shape[-1]
    x = pictures.float() / 127.5 - 1
    chance = torch.rand(count, 5, generator=generator, device=generator.device)
    sx, sy = torch.where(chance[:, :2] < .5, -.85, .85).unbind(1)
    corner = view(x, sx, sy, .1 + .15 * chance[:, 2])
    corner = F.interpolate(corner, (side, side), mode="bilinear")

    parts = x.unfold(2, side // 6, side // 6).unfold(3, side // 6, side // 6).flatten(2, 3)
    order = torch.randperm(36, generator=generator, device=generator.device)
    parts = parts[:, :, order].unflatten(2, (6, 6)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    shuffled = F.interpolate(parts, (side, side), mode="bilinear")

    grid = (4, 16, 48)[int(3 * chance[0, 3])]
    blots = torch.randn(count, 3, grid, grid, generator=generator, device=generator.device) * .4
    blots = F.interpolate(blots, (side, side), mode="bilinear") + 2 * chance[:, :3, None, None] - 1
    kind = chance[:, 4].view(-1, 1, 1, 1)
    made = torch.where(kind < .5, corner, torch.where(kind < .75, shuffled, blots.clamp(-1, 1)))
    return ((made + 1) * 127.5).round().byte()


def together(pictures, generator):
    """Byte pictures (B, 3, H, W) of several of 4·B portraits: two halves, two small ones, or four."""
    side, quarter = pictures.shape[-1], pictures.shape[-1] // 4
    a, b, c, d = (pictures.float() / 127.5 - 1).chunk(4)
    middles = torch.cat([a[..., quarter:3 * quarter], b[..., quarter:3 * quarter]], 3)
    small = [F.interpolate(x, (side // 2, side // 2), mode="area") for x in (a, b, c, d)]
    four = torch.cat([torch.cat(small[:2], 3), torch.cat(small[2:], 3)], 2)
    two = F.pad(four[:, :, :side // 2], (0, 0, quarter, quarter), mode="reflect")
    kind = torch.rand(len(a), 1, 1, 1, generator=generator, device=generator.device)
    made = torch.where(kind < 1 / 3, middles, torch.where(kind < 2 / 3, four, two))
    return ((made + 1) * 127.5).round().byte()
