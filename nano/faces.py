"""The miniature world's people: a batched renderer of cartoon portraits whose identity is known exactly.

A person is a vector of `len(IDENTITY)` numbers in [0, 1]; a photo adds a vector of nuisances (pose, expression, light, framing, background,
clothes) and one of `STYLES`. Every shape is a signed distance (negative inside, in head units: 1 = half the picture's height) turned into an
anti-aliased mask, and the portrait is painted back to front. See a contact sheet:  python nano/faces.py sheet.png
"""
import math
import sys
from pathlib import Path

import torch

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
import images  # noqa: E402

IDENTITY = ("skin", "undertone", "face_width", "face_length", "jaw", "chin", "hair_style", "hair_colour", "hair_shade", "hair_volume",
            "eye_size", "eye_spacing", "eye_colour", "eye_tilt", "brow_thickness", "brow_angle", "brow_height", "nose_width", "nose_length",
            "mouth_width", "lip_fullness", "lip_colour", "beard", "glasses", "glasses_colour", "freckles", "ear_size")
NUISANCE = ("yaw", "roll", "zoom", "x", "y", "smile", "open", "brow_raise", "squint", "gaze", "light", "light_side", "background",
            "background_2", "split", "clothes", "neckline")
STYLES = {  # name: caption, {} being what stands before "face". The first is the plain photo; five are the paper's prompts.
    "photo": "a {} face",
    "selfie": "an instagram selfie of a {} face",
    "pixar": "a pixar character of a {} face",
    "bark": "a {} face with bark skin",
    "rock star": "a {} face as a rock star",
    "professional": "a professional photo of a {} face",
    "pop art": "a pop art poster of a {} face",
    "zombie": "a {} face as a zombie",
    "king": "a {} face as a king",
    "astronaut": "a {} face as an astronaut",
    "beach": "a {} face at the beach",
}
RARE = "sks zwx ohwx qvj xjy vbk wqz kfj pzx jqk dvx gzq hxw bqj lzk mxq tvz yqk rjx nqz".split()  # the first stays unseen in training: [V]

SKIN = torch.tensor([[.99, .86, .77], [.95, .76, .62], [.83, .60, .43], [.61, .40, .27], [.37, .23, .17]])
SKIN_WORDS = ("pale", "light", "tan", "brown", "dark")
HAIR = torch.tensor([[.10, .09, .11], [.38, .22, .12], [.93, .77, .38], [.78, .30, .10], [.66, .67, .70], [.25, .38, .80]])
HAIR_WORDS = ("black", "brown", "blond", "red", "grey", "blue")
EYES = torch.tensor([[.36, .20, .10], [.20, .45, .80], [.20, .55, .30], [.45, .50, .55]])
FRAMES = torch.tensor([[.08, .08, .10], [.80, .12, .16], [.85, .62, .15], [.12, .25, .70]])
BEARD_WORDS = ("", "", "", "a moustache", "a goatee", "a full beard")
GLASSES_WORDS = ("", "", "round glasses", "square glasses")
# Hair is one formula; a style is a row of it. Behind the head: a rounded box (half width beyond the face, top, bottom, corner radius) with
# `curl` scallops, and an ellipse on top (height of its centre, radii). In front: all of the scalp above y = line + slope·x + arch·|x| + bow·x².
HAIR_STYLES = {
    #               extra   top  bottom corner  curl  knot_y knot_x knot_h  line  slope  arch   bow
    "bald":        (-.30, -.30,   .00,   .10,  .00,   .00,  -.10,  -.10, -2.0,  .00,   .00,   .00),
    "short hair":  ( .03, -.75,  -.02,   .45,  .00,   .00,  -.10,  -.10, -.40,  .00,   .00,   .30),
    "parted hair": ( .06, -.80,   .10,   .45,  .00,   .00,  -.10,  -.10, -.42,  .38,   .00,   .10),
    "long hair":   ( .13, -.78,   .95,   .42,  .00,   .00,  -.10,  -.10, -.58,  .00,   .62,   .40),
    "curly hair":  ( .24, -.92,   .22,   .60,  .055,  .00,  -.10,  -.10, -.38,  .00,  -.05,   .10),
    "a bun":       ( .02, -.74,  -.05,   .45,  .00,  -.86,   .24,   .21, -.52,  .00,   .10,   .80),
    "a bob":       ( .15, -.78,   .42,   .36,  .00,   .00,  -.10,  -.10, -.27,  .00,   .00,   .05),
    "a mohawk":    (-.30, -.30,   .00,   .10,  .00,  -.60,   .15,   .36, -.50,  .00,  -1.6,   .00),
}
HAIR_ROWS = torch.tensor(list(HAIR_STYLES.values()))
ATTRIBUTES = {"skin": len(SKIN_WORDS), "hair_colour": len(HAIR_WORDS), "hair_style": len(HAIR_STYLES), "glasses": 3, "beard": 4}


SEEDS = 8  # the greatest seed of a training whose step n draws people with 1,000,003 · seed + n: far from those of identities() for tests


def identities(seeds):
    """The people of these integer seeds: (B, 27) numbers in [0, 1]. Training uses seeds from 0, tests from 10,000,000 on."""
    return torch.stack([torch.rand(len(IDENTITY), generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def nuisances(count, generator):
    """Random circumstances of `count` photos: (count, 17) numbers in [0, 1]."""
    return torch.rand(count, len(NUISANCE), generator=generator)


def choice(u, n):
    """The category of n that a uniform number falls in."""
    return (u * n).long().clamp(max=n - 1)


def attributes(identity):
    """What can be said of people in words: a dict of category indices, each (B,)."""
    column = dict(zip(IDENTITY, identity.unbind(1)))
    return {"skin": choice(column["skin"], len(SKIN_WORDS)), "hair_colour": choice(column["hair_colour"], len(HAIR_WORDS)),
            "hair_style": choice(column["hair_style"], len(HAIR_STYLES)),
            "glasses": (choice(column["glasses"], len(GLASSES_WORDS)) - 1).clamp(min=0),  # none, round, square
            "beard": (choice(column["beard"], len(BEARD_WORDS)) - 2).clamp(min=0)}        # none, moustache, goatee, full


def describe(identity):
    """Attribute words of every person: a list of phrases each, such as ["tan skin", "long red hair", "round glasses"]."""
    phrases = []
    for skin, colour, style, glasses, beard in zip(*(v.tolist() for v in attributes(identity).values())):
        name, colour = list(HAIR_STYLES)[style], HAIR_WORDS[colour]
        hair = name if name == "bald" else f"a {colour} {name[2:]}" if name.startswith("a ") else name.replace(" ", f" {colour} ")
        phrases.append([SKIN_WORDS[skin] + " skin", hair] + [w for w in (GLASSES_WORDS[glasses + 1], BEARD_WORDS[beard + 2]) if w])
    return phrases


def captions(identity, style, generator, words=.6, rare=.5, drop=.1):
    """Training captions: style words always, attribute words in a share `words`, a rare word before "face" in a share `rare` (so that an
    unseen identifier does no harm), and nothing at all in a share `drop` (for classifier-free guidance)."""
    templates, result = list(STYLES.values()), []
    coin = torch.rand(len(identity), 3, generator=generator).tolist()
    pick = torch.randint(1, len(RARE), (len(identity),), generator=generator).tolist()
    for phrases, s, p, (a, b, c) in zip(describe(identity), style.tolist(), pick, coin):
        text = templates[s].replace("{}", RARE[p] if b < rare else "").replace("  ", " ")
        if a < words:
            text += (" and " if " with " in text else " with ") + " ".join(phrases)
        result.append("" if c < drop else text)
    return result


def lerp(low, high, u):
    return low + (high - low) * u


def ellipse(x, y, rx, ry):
    """Approximate signed distance to an ellipse about the origin; nothing where a radius is not positive."""
    nx, ny = x / rx, y / ry
    r = (nx * nx + ny * ny).sqrt()
    d = r * (r - 1) / ((nx / rx) ** 2 + (ny / ry) ** 2).sqrt().clamp(min=1e-4)
    return torch.where((rx > 0) & (ry > 0), d, torch.ones_like(d)) if torch.is_tensor(rx) else d


def box(x, y, half_width, half_height, corner):
    """Signed distance to a rounded rectangle about the origin."""
    qx, qy = x.abs() - half_width + corner, y.abs() - half_height + corner
    return (qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2).sqrt() + torch.maximum(qx, qy).clamp(max=0) - corner


def segment(x, y, ax, ay, bx, by):
    """Distance to the line from (ax, ay) to (bx, by)."""
    dx, dy = bx - ax, by - ay
    t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2).sqrt()


def render(identity, nuisance, style, size=128):
    """Portraits (B, 3, size, size) in [-1, 1] of people `identity` (B, 27) under `nuisance` (B, 17) in `style` (B,), an index of STYLES."""
    few = 4 if identity.device.type == "cpu" else 512  # what fits a core's cache, or fills a GPU
    return torch.cat([_render(*part, size) for part in zip(identity.split(few), nuisance.split(few), style.split(few))])


def _render(identity, nuisance, style, size):
    device, names = identity.device, list(STYLES)
    p = {k: v[:, None, None] for k, v in zip(IDENTITY, identity.unbind(1))}
    n = {k: v[:, None, None] for k, v in zip(NUISANCE, nuisance.unbind(1))}
    hair_row = HAIR_ROWS.to(device)[choice(identity[:, 6], len(HAIR_STYLES))]
    extra, top, bottom, corner, curl, knot_y, knot_x, knot_h, line, slope, arch, bow = (c[:, None, None] for c in hair_row.unbind(1))
    is_style = lambda *which: torch.stack([style == names.index(w) for w in which]).any(0).float()[:, None, None]
    pixar, bark, zombie, astronaut = (is_style(w) for w in ("pixar", "bark", "zombie", "astronaut"))

    # Camera: pixel -> head coordinates (x right, y down), origin at the middle of the face.
    axis = (torch.arange(size, device=device) + .5) * (2 / size) - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    u, v = u[None], v[None]
    scale = lerp(1.02, 1.16, n["zoom"]) * (1 - .20 * astronaut) * (1 + .05 * is_style("selfie")) * (1 - .12 * is_style("king"))
    angle = lerp(-.13, .13, n["roll"]) + .10 * is_style("selfie")
    cx, cy = lerp(-.06, .06, n["x"]), lerp(.00, .10, n["y"]) + .08 * is_style("king")
    x = ((u - cx) * angle.cos() + (v - cy) * angle.sin()) / scale
    y = ((v - cy) * angle.cos() - (u - cx) * angle.sin()) / scale
    fx = x - lerp(-.09, .09, n["yaw"]) * (1 - .5 * y * y).clamp(min=0)  # features slide over the head as it turns
    side, fa = torch.where(fx > 0, 1., -1.), fx.abs()
    sharp = scale * size / 2

    def mask(distance):
        return (.5 - distance * sharp).clamp(0, 1)

    # Colours.
    def ramp(table, position):
        position = position.flatten() * (len(table) - 1)
        low = position.long().clamp(max=len(table) - 2)
        return torch.lerp(table.to(device)[low], table.to(device)[low + 1], (position - low)[:, None])[:, :, None, None]

    rgb = lambda r, g, b: torch.tensor([r, g, b], device=device)[None, :, None, None]
    mix = lambda a, b, w: a + (b - a) * w
    wide = lambda t: t[:, None]  # (B, 1, 1) -> (B, 1, 1, 1), to weigh colours
    skin = ramp(SKIN, p["skin"]) * (1 + (wide(p["undertone"]) - .5) * rgb(.06, .0, -.16))
    skin = mix(skin, mix(rgb(.45, .28, .14), skin, .25), wide(bark))
    skin = mix(skin, mix(rgb(.48, .70, .38), skin, .35), wide(zombie))
    hair = HAIR.to(device)[choice(identity[:, 7], len(HAIR))][:, :, None, None] * lerp(.85, 1.15, wide(p["hair_shade"]))
    iris = EYES.to(device)[choice(identity[:, 12], len(EYES))][:, :, None, None]
    frame = FRAMES.to(device)[choice(identity[:, 24], len(FRAMES))][:, :, None, None]
    shade = skin * .80
    lips = mix(skin * rgb(.88, .62, .60), rgb(.78, .16, .22), .25 + .5 * wide(p["lip_colour"]))
    clothes = palette(n["clothes"], .55, .72)
    for name, colour in (("rock star", (.10, .10, .12)), ("professional", (.16, .20, .32)), ("astronaut", (.90, .91, .94)), ("king", (.55, .08, .16)),
                         ("zombie", (.36, .36, .30))):
        clothes = mix(clothes, rgb(*colour), wide(is_style(name)))

    image = background(n, style, u, v, device)

    def paint(m, colour):
        nonlocal image
        image = torch.addcmul(image, colour - image, m[:, None])

    # Head shape, shared by skin, beard and front hair.
    w, h = lerp(.42, .54, p["face_width"]), lerp(.56, .66, p["face_length"])
    power = torch.where(y > 0, lerp(2.0, 3.2, p["jaw"]), torch.full_like(w, 2.2))
    taper = 1 - lerp(.05, .30, p["chin"]) * (y / h).clamp(0, 1) ** 2
    head = (((x / (w * taper)).abs() ** power + (y / h).abs() ** power + 1e-6) ** (1 / power) - 1) * w
    wave = lambda f: (f * torch.atan2(x, -y)).cos()

    # Behind the face: hair, shoulders, neck, ears.
    volume = lerp(.6, 1.4, p["hair_volume"])
    top = torch.where(top < -.5, -h + (top + .62) * volume, top)
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    back = box(x, y - middle, w + extra * volume, half, torch.minimum(corner, half)) - curl * wave(11)
    back = torch.minimum(back, ellipse(x, y - knot_y * h / .62, knot_x * volume, knot_h * volume))
    body = box(x, y - 1.44, torch.full_like(w, .98), torch.full_like(w, .72), .45)
    paint(mask(back), hair * .86)
    paint(mask(box(x, y - .72, w * .52, torch.full_like(w, .40), .10)), shade)
    paint(mask(body), clothes)
    v_neck = (fa * .9 + (y - 1.02)) * .74
    round_neck = ellipse(x, y - .72, torch.full_like(w, .30), torch.full_like(w, .20))
    paint(mask(torch.maximum(torch.where(n["neckline"] > .5, v_neck, round_neck), body)), shade)
    suit(paint, mask, is_style, rgb, fa, x, y, body)
    ear = lerp(.07, .15, p["ear_size"])
    paint(mask(ellipse(x.abs() - w * .98, y - .02, ear * .75, ear * 1.15)), skin * .90)

    # Face, lit from one side.
    paint(mask(head), skin * (1 + wide(.22 * (n["light_side"] - .5)) * (x / w)[:, None]))
    paint(mask(ellipse(fa - .27, y - .17, .10, .07)) * (.35 + .45 * is_style("selfie")), mix(skin, rgb(.95, .42, .42), .35))
    dots = torch.stack([ellipse(fa - a, y - b, .024, .024) for a, b in ((.16, .10), (.25, .16), (.33, .09))]).amin(0)
    paint(mask(dots) * (p["freckles"] > .7), skin * rgb(.72, .60, .55))
    if bark.any():
        paint(mask(head) * (torch.sin(x * 16 + 1.5 * torch.sin(y * 5)) > .45) * bark, skin * .66)
    eye_y, eye_x = -.06, lerp(.17, .25, p["eye_spacing"])
    paint(mask(ellipse(fa - eye_x, y - eye_y - .02, .15, .13)) * is_style("rock star", "zombie"), mix(skin, rgb(.15, .08, .22), .6))

    # Beard, mouth, nose.
    smile, opened = lerp(-.35, .9, n["smile"]), (n["open"] - .55).clamp(min=0) * .16
    mouth_y, mouth_w = .35, lerp(.11, .21, p["mouth_width"])
    curve = y - mouth_y + smile * (fx * fx - .4 * mouth_w * mouth_w)
    kind = choice(p["beard"], len(BEARD_WORDS)) - 2
    full = torch.maximum(head, -(curve + .115 - .45 * fx * fx).clamp(min=-1) * 1.0)
    goatee = torch.maximum(head, ellipse(fx, y - .52, .17, .20))
    moustache = ellipse(fx, curve + .085, mouth_w * 1.15, .055)
    full = torch.where(kind == 3, torch.minimum(full, moustache), torch.where(kind == 2, goatee, torch.where(kind == 1, moustache, torch.ones_like(x))))
    paint(mask(full), hair * .92)
    lip = lerp(.030, .062, p["lip_fullness"])
    paint(mask(ellipse(fx, curve, mouth_w, lip + opened)), lips)
    paint(mask(ellipse(fx, curve, mouth_w * .80, opened * 1.1 + .008)), mix(rgb(.30, .07, .09), rgb(.98, .97, .95), wide((opened > .012).float()) * .9))
    nose_y, nose_w = lerp(.10, .20, p["nose_length"]), lerp(.055, .115, p["nose_width"])
    paint(mask(ellipse(fx, y - nose_y / 2, nose_w * .5, nose_y * .5 + .08)), skin * 1.06)
    paint(mask(ellipse(fx, y - nose_y, nose_w, nose_w * .62)), shade)

    # Eyes and brows.
    tilt = lerp(-.35, .35, p["eye_tilt"])
    size_e = lerp(.100, .145, p["eye_size"]) * (1 + .35 * pixar)
    ex, ey = fa - eye_x - .04 * pixar, y - eye_y
    ey = ey + tilt * ex
    lid = size_e * lerp(.58, .80, n["squint"]) * (1 + .2 * pixar)
    white = ellipse(ex, ey, size_e, lid)
    paint(mask(ellipse(ex, ey + .016, size_e * 1.12, lid * 1.08)), shade * .45)
    paint(mask(white), rgb(.98, .98, .97))
    look = fx - side * (eye_x + .04 * pixar) - lerp(-.03, .03, n["gaze"])
    r = size_e * .60
    paint(mask(torch.maximum(white, ellipse(look, ey, r, r))), iris)
    paint(mask(torch.maximum(white, ellipse(look, ey, r * .5, r * .5))), rgb(.05, .04, .05))
    paint(mask(ellipse(look + r * .35, ey + r * .4, r * .28, r * .28)), rgb(1., 1., 1.))
    brow_y = eye_y - lerp(.15, .21, p["brow_height"]) - .05 * n["brow_raise"] - .05 * pixar
    lift = lerp(-.05, .06, p["brow_angle"])
    brow = segment(fa, y, eye_x - .10, brow_y + lift, eye_x + .11, brow_y - lift * .4) - lerp(.018, .048, p["brow_thickness"])
    paint(mask(brow), hair * .62)

    # Front hair, glasses, and what the style adds.
    front = torch.maximum(head - .015, y - (line + slope * x + arch * x.abs() + bow * x * x) * h / .62)
    paint(mask(front), hair * (1 + wide(.30 * (n["light_side"] - .5)) * x[:, None]))
    shape = choice(p["glasses"], len(GLASSES_WORDS))
    lens = torch.where(shape == 3, box(fa - eye_x - .01, y - eye_y, torch.full_like(w, .155), torch.full_like(w, .115), .03),
                       ellipse(fa - eye_x - .01, y - eye_y, .150, .150))
    rim = torch.minimum(lens.abs() - .020, torch.maximum(segment(fa, y, 0., -.09, .07, -.07), lens * -1) - .020)
    paint(mask(torch.maximum(rim, -fa - 1)) * (shape > 1), frame)
    props(paint, mask, is_style, rgb, fx, x, y, w, h, eye_x, eye_y)

    image = image * lerp(.90, 1.08, wide(n["light"]))
    grey = image.mean(1, keepdim=True)
    image = mix(image, mix(grey, image, 1.35), wide(pixar))
    return image.clamp(0, 1) * 2 - 1


def palette(u, saturation, value):
    """Colour (B, 3, 1, 1) of hue u (B, 1, 1)."""
    channels = [1 - saturation + saturation * ((2 * math.pi * (u - shift)).cos() * .5 + .5) for shift in (0, 1 / 3, 2 / 3)]
    return value * torch.stack(channels, 1)


def background(n, style, u, v, device):
    """Plain, two-tone or graded backgrounds (B, 3, H, W); a style that has a scene of its own brings it."""
    names, wide = list(STYLES), lambda t: t[:, None]
    first, second = palette(n["background"], .30, .90), palette(n["background_2"], .30, .82)
    image = first + (second - first) * wide((n["split"] > .6) * ((v + u * (n["split"] - .8) * 4) * 30).clamp(0, 1))
    colour = lambda r, g, b: torch.tensor([r, g, b], device=device)[:, None, None]
    down = (v + 1) / 2
    beam = ((u.abs() - .18 * (v + 1.5)).abs() < .16).float()
    ray = (torch.atan2(u, -v - .2) * 6).cos().mul(6).clamp(0, 1)
    scenes = {
        "selfie": colour(.98, .62, .42) + (colour(.93, .40, .66) - colour(.98, .62, .42)) * down,
        "pixar": colour(.45, .80, .95) + (colour(.80, .95, .98) - colour(.45, .80, .95)) * down,
        "rock star": colour(.20, .07, .32) + colour(.42, .12, .40) * beam,
        "professional": colour(.80, .84, .88) - colour(.22, .20, .16) * down,
        "pop art": colour(1., .84, .10) + (colour(.95, .25, .30) - colour(1., .84, .10)) * ray,
        "zombie": colour(.22, .26, .30) + colour(.10, .16, .10) * down,
        "king": colour(.50, .10, .14) + colour(.16, .02, .02) * ((u * 9).sin() * 4).clamp(0, 1),
        "astronaut": colour(.06, .08, .22) + colour(.10, .06, .16) * down,
        "beach": torch.where(v < .25, colour(.52, .80, .96), torch.where(v < .55, colour(.16, .55, .76), colour(.94, .84, .60))),
    }
    plain = torch.stack([torch.tensor(name not in scenes) for name in names]).to(device)
    own = torch.stack([scenes[name].expand(1, 3, *u.shape[-2:])[0] if name in scenes else torch.zeros_like(image[0]) for name in names])
    return torch.where(plain[style][:, None, None, None], image, own[style])


def suit(paint, mask, is_style, rgb, fa, x, y, body):
    """Clothes of the styles that dictate them, over the shoulders."""
    oval = lambda middle, rx, ry: ellipse(x, y - middle, torch.full_like(x, rx), torch.full_like(x, ry))
    if (on := is_style("professional")).any():
        paint(mask(torch.maximum((fa * 1.25 + (y - 1.12)) * .62, body)) * on, rgb(.96, .96, .97))
        paint(mask(torch.maximum(fa - .075, body)) * on, rgb(.70, .12, .16))
    if (on := is_style("rock star")).any():
        paint(mask(((fa - (1.15 - y) * .55).abs() - .045).maximum(body)) * on, rgb(.75, .76, .80))
    if (on := is_style("king")).any():
        paint(mask(torch.maximum(oval(.80, .50, .17), body - .05)) * on, rgb(.97, .95, .90))
    if (on := is_style("astronaut")).any():
        paint(mask(oval(.86, .52, .18).abs() - .05) * on, rgb(.60, .64, .72))


def props(paint, mask, is_style, rgb, fx, x, y, w, h, eye_x, eye_y):
    """What a style puts in front of the face: a star painted round an eye, a crown, a helmet, stitches, a flower."""
    flower = lambda a, b, radius, wave: (a * a + b * b).sqrt() - radius - wave * (5 * torch.atan2(a, -b)).cos()
    if (on := is_style("rock star")).any():
        a, b = fx + eye_x, y - eye_y
        paint(mask(torch.maximum(flower(a, b, .19, .055), -ellipse(a, b, .13, .10))) * on, rgb(.92, .18, .48))  # the eye stays free
    if (on := is_style("king")).any():
        teeth = -h - .14 - .16 * (1 - ((x / w * 2.5) % 1 * 2 - 1).abs())
        paint(mask(torch.maximum(torch.maximum(teeth - y, y + h * .78), x.abs() - w * .98) * .6) * on, rgb(.98, .80, .20))
        paint(mask(ellipse(x, y + h * .93, .07, .07)) * on, rgb(.85, .12, .20))
    if (on := is_style("astronaut")).any():
        paint(mask(ellipse(x, y + .06, torch.full_like(x, 1.02), torch.full_like(x, 1.04)).abs() - .075) * on, rgb(.93, .94, .97))
    if (on := is_style("zombie")).any():
        stitch = torch.minimum(segment(fx, y, .14, -.36, .34, -.28) - .018,
                               torch.minimum(segment(fx, y, .19, -.40, .17, -.28), segment(fx, y, .30, -.36, .28, -.24)) - .016)
        paint(mask(stitch) * on, rgb(.30, .08, .12))
    if (on := is_style("beach")).any():
        a, b = x - w * .95, y + .40
        paint(mask(flower(a, b, .13, -.035)) * on, rgb(.98, .35, .45))
        paint(mask(ellipse(a, b, .05, .05)) * on, rgb(1., .88, .30))


if __name__ == "__main__":  # ten people: four photos each, then every style
    people = identities(range(10)).repeat_interleave(4 + len(STYLES), 0)
    styles = torch.tensor([0, 0, 0] + list(range(len(STYLES))) + [0]).repeat(10)
    images.save(images.sheet(render(people, nuisances(len(people), torch.Generator().manual_seed(0)), styles), 4 + len(STYLES)), sys.argv[1])
