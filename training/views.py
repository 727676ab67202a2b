"""Several views of a single photo, so that fine-tuning learns the face and copies less of the picture.

A LoRA trained on one photo learns its pose, light and background with the face. Two measures help: random
crops of the photo take turns with it, and the surroundings of the face weigh less in the loss. On nano, .59
instead of .87 of them then comes back in "a [V] face" (docs/choices.md, "Views")."""
import torch
import torch.nn.functional as F

ZOOM, ANGLE, SHIFT = .10, .12, .10  # greatest difference of a crop: a share, radians, half sides


def crops(photo, count, generators):
    """Photos (P, 3, H, W) -> (P, count, 3, H, W): the photo itself, then crops that are zoomed, turned and
    shifted at random by the person's CPU generator, with mirrored borders."""
    each = []
    for own, generator in zip(photo, generators):
        zoom, angle, x, y = (2 * torch.rand(count - 1, 4, generator=generator) - 1).unbind(1)
        scale = 1 + ZOOM * zoom
        c, s = scale * (ANGLE * angle).cos(), scale * (ANGLE * angle).sin()
        rows = torch.stack([torch.stack([c, -s, SHIFT * x], 1), torch.stack([s, c, SHIFT * y], 1)], 1)
        many = own.expand(count - 1, -1, -1, -1)
        grid = F.affine_grid(rows.to(own), many.shape, align_corners=False)
        others = F.grid_sample(many, grid, padding_mode="reflection", align_corners=False)
        each.append(torch.cat([own[None], others]))
    return torch.stack(each)


def face_weights(height, width, device=None):
    """Weights (h, w) for a latent, 1 on average: a soft ellipse where photos have the face."""
    y = ((torch.arange(height, device=device) + .5) * 2 / height - 1)[:, None]
    x = ((torch.arange(width, device=device) + .5) * 2 / width - 1)[None]
    inside = torch.sigmoid(6 * (1 - (x / .62) ** 2 - ((y - .03) / .85) ** 2))
    return inside / inside.mean()
