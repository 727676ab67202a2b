"""The people of nano's world: a batched renderer of cartoon portraits with exactly known identity.

A person is a vector of `len(IDENTITY)` numbers in [0, 1]. A photo adds a vector of its CIRCUMSTANCES (pose,
light, …) and one of `STYLES`. Each shape is a signed distance (negative inside, in head units: 1 = half the
picture's height). The renderer turns it into an anti-aliased mask, and paints from back to front. Numbers of
a person or photo are (B, 1, 1, 1), masks (B, 1, H, W), colours (B, 3, 1, 1).
"""
import torch

from nano.shapes import box, ellipse, flower, lerp, palette, ramp, segment

IDENTITY = ("skin", "undertone", "face_width", "face_length", "jaw", "chin", "hair_style", "hair_colour",
            "hair_shade", "hair_volume", "eye_size", "eye_spacing", "eye_colour", "eye_tilt",
            "brow_thickness", "brow_angle", "brow_height", "nose_width", "nose_length", "mouth_width",
            "lip_fullness", "lip_colour", "beard", "glasses", "glasses_colour", "freckles", "ear_size")
CIRCUMSTANCES = ("yaw", "roll", "zoom", "x", "y", "smile", "open", "brow_raise", "squint", "gaze", "light",
                 "light_side", "background", "background_2", "split", "clothes", "neckline")
# Name: caption; {} is what precedes "face". The first style is plain, five are the paper's prompts.
STYLES = {"photo": "a {} face", "selfie": "an instagram selfie of a {} face",
          "pixar": "a pixar character of a {} face", "bark": "a {} face with bark skin",
          "rock star": "a {} face as a rock star", "professional": "a professional photo of a {} face",
          "pop art": "a pop art poster of a {} face", "zombie": "a {} face as a zombie",
          "king": "a {} face as a king", "astronaut": "a {} face as an astronaut",
          "beach": "a {} face at the beach"}

SKIN = torch.tensor([[.99, .86, .77], [.95, .76, .62], [.83, .60, .43], [.61, .40, .27], [.37, .23, .17]])
SKIN_WORDS = ("pale", "light", "tan", "brown", "dark")
HAIR = torch.tensor([[.10, .09, .11], [.38, .22, .12], [.93, .77, .38], [.78, .30, .10], [.66, .67, .70],
                     [.25, .38, .80]])
HAIR_WORDS = ("black", "brown", "blond", "red", "grey", "blue")
EYES = torch.tensor([[.36, .20, .10], [.20, .45, .80], [.20, .55, .30], [.45, .50, .55]])
FRAMES = torch.tensor([[.08, .08, .10], [.80, .12, .16], [.85, .62, .15], [.12, .25, .70]])
BEARD_WORDS = ("", "", "", "a moustache", "a goatee", "a full beard")
GLASSES_WORDS = ("", "", "round glasses", "square glasses")
CLOTHES = {"rock star": (.10, .10, .12), "professional": (.16, .20, .32), "astronaut": (.90, .91, .94),
           "king": (.55, .08, .16), "zombie": (.36, .36, .30)}
# One formula draws hair; each style is a row of its numbers. Behind the head: a rounded box (half width
# beyond the face, top, bottom, corner radius) with `curl` scallops, and an ellipse on top (height of its
# centre, radii; none if negative). In front: the scalp above y = line + slope·x + arch·|x| + bow·x².
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
# Words for looks; the first categories of beard and glasses count as one, "nothing to mention"
WORDS = {"skin": SKIN_WORDS, "hair_colour": HAIR_WORDS, "hair_style": tuple(HAIR_STYLES),
         "glasses": GLASSES_WORDS, "beard": BEARD_WORDS}
ATTRIBUTES = {name: len(set(words)) for name, words in WORDS.items()}


def identities(seeds):
    """The people of these integer seeds (nano/seeds.py): (B, 27) numbers in [0, 1]."""
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
    return torch.stack([torch.rand(len(IDENTITY), generator=g) for g in generators])


def random_circumstances(count, generator):
    """Random circumstances of `count` photos: (count, 17) numbers in [0, 1]."""
    return torch.rand(count, len(CIRCUMSTANCES), generator=generator)


def choice(u, n):
    """The category, of n, of each number u in [0, 1]."""
    return (u * n).long().clamp(max=n - 1)


def attributes(identity):
    """The categories of people's looks that have words: name -> indices (B,)."""
    kinds = {name: choice(identity[:, IDENTITY.index(name)], len(words)) for name, words in WORDS.items()}
    return {name: (kind - len(WORDS[name]) + ATTRIBUTES[name]).clamp(min=0) for name, kind in kinds.items()}


def number(name, kind):
    """The number in [0, 1] in the middle of a category's range: the inverse of attributes()."""
    among = len(WORDS[name])
    return (kind + among - ATTRIBUTES[name] + .5) / among


def photos(identity, generator, device, style=None):
    """Portraits (B, 3, 128, 128) in random circumstances, in a style (B,) or plain, on this device."""
    style = torch.zeros(len(identity), dtype=torch.long) if style is None else style
    return render(*(t.to(device) for t in (identity, random_circumstances(len(identity), generator), style)))


def render(identity, circumstances, style, size=128):
    """Portraits (B, 3, size, size) in [-1, 1] of identities (B, 27), circumstances (B, 17), styles (B,)."""
    few = 4 if identity.device.type == "cpu" else 512  # fits a core's cache, or fills a GPU
    if len(identity) > few:
        parts = zip(identity.split(few), circumstances.split(few), style.split(few))
        return torch.cat([render(*part, size) for part in parts])
    device = identity.device
    p = dict(zip(IDENTITY, identity[:, :, None, None, None].unbind(1)))
    n = dict(zip(CIRCUMSTANCES, circumstances[:, :, None, None, None].unbind(1)))
    on = {name: (style == i).float()[:, None, None, None] for i, name in enumerate(STYLES)}
    axis = (torch.arange(size, device=device) + .5) * (2 / size) - 1
    u, v = axis.view(1, 1, 1, -1), axis.view(1, 1, -1, 1)

    def pick(table, name):
        return table.to(device)[choice(p[name].flatten(), len(table))][:, :, None, None]

    def rgb(*colour):
        return torch.tensor(colour, device=device).view(1, 3, 1, 1)

    def paint(distance, colour, weight=1.):
        nonlocal image
        mask = (.5 - distance * sharp).clamp(0, 1) * weight
        colour = rgb(*colour) if isinstance(colour, tuple) else colour
        image = torch.addcmul(image, colour - image, mask)

    # Camera: some styles are shown from farther away or closer
    scale = lerp(1.02, 1.16, n["zoom"])
    scale = scale * (1 - .20 * on["astronaut"]) * (1 + .05 * on["selfie"]) * (1 - .12 * on["king"])
    sharp = scale * size / 2
    angle = lerp(-.13, .13, n["roll"]) + .10 * on["selfie"]
    cx, cy = lerp(-.06, .06, n["x"]), lerp(.00, .10, n["y"]) + .08 * on["king"]

    # Pixel -> head coordinates (x right, y down), origin at the middle of the face
    x = ((u - cx) * angle.cos() + (v - cy) * angle.sin()) / scale
    y = ((v - cy) * angle.cos() - (u - cx) * angle.sin()) / scale
    fx = x - lerp(-.09, .09, n["yaw"]) * (1 - .5 * y * y).clamp(min=0)  # features slide as the head turns
    side, fa = torch.where(fx > 0, 1., -1.), fx.abs()

    # Colours
    skin = ramp(SKIN.to(device), p["skin"]) * (1 + (p["undertone"] - .5) * rgb(.06, .0, -.16))
    skin = lerp(skin, lerp(rgb(.45, .28, .14), skin, .25), on["bark"])
    skin = lerp(skin, lerp(rgb(.48, .70, .38), skin, .35), on["zombie"])
    shade = skin * .80
    hair = pick(HAIR, "hair_colour") * lerp(.85, 1.15, p["hair_shade"])
    lips = lerp(skin * rgb(.88, .62, .60), rgb(.78, .16, .22), .25 + .5 * p["lip_colour"])
    clothes = palette(n["clothes"], .55, .72)
    for name, colour in CLOTHES.items():
        clothes = lerp(clothes, rgb(*colour), on[name])
    image = background(n, on, u, v, rgb)

    # Head shape, shared by skin, beard and front hair
    w, h = lerp(.42, .54, p["face_width"]), lerp(.56, .66, p["face_length"])
    power = torch.where(y > 0, lerp(2.0, 3.2, p["jaw"]), 2.2)
    taper = 1 - lerp(.05, .30, p["chin"]) * (y / h).clamp(0, 1) ** 2
    head = (((x / (w * taper)).abs() ** power + (y / h).abs() ** power + 1e-6) ** (1 / power) - 1) * w

    # Behind the face: hair, neck, shoulders, ears
    row = pick(HAIR_ROWS, "hair_style").split(1, 1)
    extra, top, bottom, corner, curl, knot_y, knot_x, knot_h, line, slope, arch, bow = row
    volume = lerp(.6, 1.4, p["hair_volume"])
    top = torch.where(top < -.5, -h + (top + .62) * volume, top)
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    scallops = curl * (11 * torch.atan2(x, -y)).cos()
    back = box(x, y - middle, w + extra * volume, half, torch.minimum(corner, half)) - scallops
    knot = ellipse(x, y - knot_y * h / .62, knot_x * volume, knot_h * volume)
    paint(torch.minimum(back, torch.where(knot_x > 0, knot, 1.)), hair * .86)
    body = box(x, y - 1.44, .98, .72, .45)
    paint(box(x, y - .72, w * .52, .40, .10), shade)
    paint(body, clothes)
    v_neck = (fa * .9 + (y - 1.02)) * .74
    neckline = torch.where(n["neckline"] > .5, v_neck, ellipse(x, y - .72, .30, .20))
    paint(torch.maximum(neckline, body), shade)
    suit(paint, on, fa, x, y, body)
    ear = lerp(.07, .15, p["ear_size"])
    paint(ellipse(x.abs() - w * .98, y - .02, ear * .75, ear * 1.15), skin * .90)

    # Face, lit from one side: cheeks, freckles, bark, make-up
    eye_y, eye_x = -.06, lerp(.17, .25, p["eye_spacing"])
    paint(head, skin * (1 + .22 * (n["light_side"] - .5) * (x / w)))
    paint(ellipse(fa - .27, y - .17, .10, .07), lerp(skin, rgb(.95, .42, .42), .35), .35 + .45 * on["selfie"])
    dots = [ellipse(fa - a, y - b, .024, .024) for a, b in ((.16, .10), (.25, .16), (.33, .09))]
    paint(torch.stack(dots).amin(0), skin * rgb(.72, .60, .55), p["freckles"] > .7)
    if on["bark"].any():
        grain = torch.sin(x * 16 + 1.5 * torch.sin(y * 5)) > .45
        paint(head, skin * .66, grain * on["bark"])
    make_up = lerp(skin, rgb(.15, .08, .22), .6)
    paint(ellipse(fa - eye_x, y - eye_y - .02, .15, .13), make_up, on["rock star"] + on["zombie"])

    # Beard
    smile, opened = lerp(-.35, .9, n["smile"]), (n["open"] - .55).clamp(min=0) * .16
    mouth_y, mouth_w = .35, lerp(.11, .21, p["mouth_width"])
    curve = y - mouth_y + smile * (fx * fx - .4 * mouth_w * mouth_w)
    moustache = ellipse(fx, curve + .085, mouth_w * 1.15, .055)
    goatee = torch.maximum(head, ellipse(fx, y - .52, .17, .20))
    full = torch.maximum(head, -(curve + .115 - .45 * fx * fx))
    for i, shape in enumerate((moustache, goatee, torch.minimum(full, moustache)), 3):
        paint(shape, hair * .92, choice(p["beard"], len(BEARD_WORDS)) == i)

    # Mouth and nose
    paint(ellipse(fx, curve, mouth_w, lerp(.030, .062, p["lip_fullness"]) + opened), lips)
    teeth = lerp(rgb(.30, .07, .09), rgb(.98, .97, .95), (opened > .012).float() * .9)
    paint(ellipse(fx, curve, mouth_w * .80, opened * 1.1 + .008), teeth)
    nose_y, nose_w = lerp(.10, .20, p["nose_length"]), lerp(.055, .115, p["nose_width"])
    paint(ellipse(fx, y - nose_y / 2, nose_w * .5, nose_y * .5 + .08), skin * 1.06)
    paint(ellipse(fx, y - nose_y, nose_w, nose_w * .62), shade)

    # Eyes: shadow, white, iris, pupil, glint
    pixar = on["pixar"]
    size_e = lerp(.100, .145, p["eye_size"]) * (1 + .35 * pixar)
    lid = size_e * lerp(.58, .80, n["squint"]) * (1 + .2 * pixar)
    ex = fa - eye_x - .04 * pixar
    ey = y - eye_y + lerp(-.35, .35, p["eye_tilt"]) * ex
    white = ellipse(ex, ey, size_e, lid)
    paint(ellipse(ex, ey + .016, size_e * 1.12, lid * 1.08), shade * .45)
    paint(white, (.98, .98, .97))
    look = fx - side * (eye_x + .04 * pixar) - lerp(-.03, .03, n["gaze"])
    r = size_e * .60
    paint(torch.maximum(white, ellipse(look, ey, r, r)), pick(EYES, "eye_colour"))
    paint(torch.maximum(white, ellipse(look, ey, r * .5, r * .5)), (.05, .04, .05))
    paint(ellipse(look + r * .35, ey + r * .4, r * .28, r * .28), (1., 1., 1.))

    # Brows
    brow_y = eye_y - lerp(.15, .21, p["brow_height"]) - .05 * n["brow_raise"] - .05 * pixar
    lift = lerp(-.05, .06, p["brow_angle"])
    brow = segment(fa, y, eye_x - .10, brow_y + lift, eye_x + .11, brow_y - lift * .4)
    paint(brow - lerp(.018, .048, p["brow_thickness"]), hair * .62)

    # Front hair, glasses, and the style's props
    line = (line + slope * x + arch * x.abs() + bow * x * x) * h / .62
    paint(torch.maximum(head - .015, y - line), hair * (1 + .30 * (n["light_side"] - .5) * x))
    shape = choice(p["glasses"], len(GLASSES_WORDS))
    a, b = fa - eye_x - .01, y - eye_y
    lens = torch.where(shape == 3, box(a, b, .155, .115, .03), ellipse(a, b, .150, .150))
    bridge = torch.maximum(segment(fa, y, 0., -.09, .07, -.07), -lens)
    paint(torch.minimum(lens.abs(), bridge) - .020, pick(FRAMES, "glasses_colour"), shape > 1)
    props(paint, on, fx, x, y, w, h, eye_x, eye_y)

    # Light, and Pixar's stronger colours
    image = image * lerp(.90, 1.08, n["light"])
    image = lerp(image, lerp(image.mean(1, keepdim=True), image, 1.35), pixar)
    return image.clamp(0, 1) * 2 - 1


def background(n, on, u, v, rgb):
    """Plain, two-tone or graded backgrounds (B, 3, H, W), or the scene of the style."""
    first, second = palette(n["background"], .30, .90), palette(n["background_2"], .30, .82)
    edge = ((v + u * (n["split"] - .8) * 4) * 30).clamp(0, 1)
    image = lerp(first, second, (n["split"] > .6) * edge)
    down = (v + 1) / 2
    ray = (torch.atan2(u, -v - .2) * 6).cos().mul(6).clamp(0, 1)
    sea = torch.where(v < .55, rgb(.16, .55, .76), rgb(.94, .84, .60))
    scenes = {
        "selfie": lerp(rgb(.98, .62, .42), rgb(.93, .40, .66), down),
        "pixar": lerp(rgb(.45, .80, .95), rgb(.80, .95, .98), down),
        "rock star": rgb(.20, .07, .32) + rgb(.42, .12, .40) * ((u.abs() - .18 * (v + 1.5)).abs() < .16),
        "professional": rgb(.80, .84, .88) - rgb(.22, .20, .16) * down,
        "pop art": lerp(rgb(1., .84, .10), rgb(.95, .25, .30), ray),
        "zombie": rgb(.22, .26, .30) + rgb(.10, .16, .10) * down,
        "king": rgb(.50, .10, .14) + rgb(.16, .02, .02) * ((u * 9).sin() * 4).clamp(0, 1),
        "astronaut": rgb(.06, .08, .22) + rgb(.10, .06, .16) * down,
        "beach": torch.where(v < .25, rgb(.52, .80, .96), sea),
    }
    for name, scene in scenes.items():
        image = torch.where(on[name] > 0, scene, image)
    return image


def suit(paint, on, fa, x, y, body):
    """Clothes of some styles: shirt and tie, lapels, a fur, the collar of a space suit."""
    if on["professional"].any():
        paint(torch.maximum((fa * 1.25 + (y - 1.12)) * .62, body), (.96, .96, .97), on["professional"])
        paint(torch.maximum(fa - .075, body), (.70, .12, .16), on["professional"])
    if on["rock star"].any():
        paint(torch.maximum((fa - (1.15 - y) * .55).abs() - .045, body), (.75, .76, .80), on["rock star"])
    if on["king"].any():
        paint(torch.maximum(ellipse(x, y - .80, .50, .17), body - .05), (.97, .95, .90), on["king"])
    if on["astronaut"].any():
        paint(ellipse(x, y - .86, .52, .18).abs() - .05, (.60, .64, .72), on["astronaut"])


def props(paint, on, fx, x, y, w, h, eye_x, eye_y):
    """Things that a style adds: a star round an eye, a crown, a helmet, stitches, a flower."""
    if on["rock star"].any():
        a, b = fx + eye_x, y - eye_y
        star = torch.maximum(flower(a, b, .19, .055), -ellipse(a, b, .13, .10))  # the eye stays free
        paint(star, (.92, .18, .48), on["rock star"])
    if on["king"].any():
        points = -h - .14 - .16 * (1 - ((x / w * 2.5) % 1 * 2 - 1).abs())
        band = torch.maximum(points - y, y + h * .78)
        paint(torch.maximum(band, x.abs() - w * .98) * .6, (.98, .80, .20), on["king"])
        paint(ellipse(x, y + h * .93, .07, .07), (.85, .12, .20), on["king"])
    if on["astronaut"].any():
        paint(ellipse(x, y + .06, 1.02, 1.04).abs() - .075, (.93, .94, .97), on["astronaut"])
    if on["zombie"].any():
        cut = segment(fx, y, .14, -.36, .34, -.28) - .018
        thread, other = segment(fx, y, .19, -.40, .17, -.28), segment(fx, y, .30, -.36, .28, -.24)
        paint(torch.minimum(cut, torch.minimum(thread, other) - .016), (.30, .08, .12), on["zombie"])
    if on["beach"].any():
        a, b = x - w * .95, y + .40
        paint(flower(a, b, .13, -.035), (.98, .35, .45), on["beach"])
        paint(ellipse(a, b, .05, .05), (1., .88, .30), on["beach"])
