"""Signed distances of shapes, negative inside, and colours, for faces.py."""
import math

import torch


def lerp(low, high, u):
    return low + (high - low) * u


def ellipse(x, y, rx, ry):
    """Approximate signed distance to an ellipse about the origin."""
    nx, ny = x / rx, y / ry
    r = (nx * nx + ny * ny).sqrt()
    return r * (r - 1) / ((nx / rx) ** 2 + (ny / ry) ** 2).sqrt().clamp(min=1e-4)


def box(x, y, half_width, half_height, corner):
    """Signed distance to a rounded rectangle about the origin."""
    qx, qy = x.abs() - half_width + corner, y.abs() - half_height + corner
    outside = (qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(qx, qy).clamp(max=0) - corner


def segment(x, y, ax, ay, bx, by):
    """Distance to the line from (ax, ay) to (bx, by)."""
    dx, dy = bx - ax, by - ay
    t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2).sqrt()


def flower(x, y, radius, petal):
    """A circle about the origin with five petals: its sign is right, its distance is not."""
    return (x * x + y * y).sqrt() - radius - petal * (5 * torch.atan2(x, -y)).cos()


def ramp(table, position):
    """Colours (B, 3, 1, 1) between the rows of a table (N, 3), at positions (B, 1, 1, 1) from 0 to 1."""
    position = position.flatten() * (len(table) - 1)
    low = position.long().clamp(max=len(table) - 2)
    return torch.lerp(table[low], table[low + 1], (position - low)[:, None])[:, :, None, None]


def palette(u, saturation, value):
    """Colours (B, 3, 1, 1) of the hues u (B, 1, 1, 1)."""
    waves = [(2 * math.pi * (u - shift)).cos() * .5 + .5 for shift in (0, 1 / 3, 2 / 3)]
    return value * torch.cat([1 - saturation + saturation * wave for wave in waves], 1)
