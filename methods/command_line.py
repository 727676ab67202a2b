"""The command line of personalize.py: every method's options, and what is refused before any loading."""
import argparse
import os
import secrets
from contextlib import suppress
from pathlib import Path

from adapters import Change, LowRank
from diffusion import SAMPLERS
from files.checkpoints import Tensors
from files.layouts import model_name
from files.merged import free_folder
from files.person import OURS, is_person
from methods import textual_inversion
from methods.sitting import free_name
from methods.table import METHODS
from nano import wording
from program.console import Parser, UserError, printable
from program.options import SEED, Option, add, early, model_rows, new_folder, number, refused, same
from training.photos import known_by, photo_files, photos_of

PERSONAL = "person.safetensors", "person_tuned.safetensors"  # the prediction alone, and with the LoRA


def sampling_rows(sampler):
    """How pictures are drawn. lcm is for a model, or with a LoRA, that has learnt few steps and guidance."""
    most, steps, guidance = (50, (4, 4), (1., 1.)) if sampler == "lcm" else (999, (15, 30), (2., 7.5))
    return [
        same("sampler", str, "dpmpp_2m", "DPM-Solver++(2M), DDIM, or latent consistency sampling, for a "
             "model or with a LoRA made for it", choices=list(SAMPLERS)),
        Option("sample_steps", number(int, 1, most), *steps, "of the sampler"),
        Option("guidance", number(float, -100, 100), *guidance, "classifier-free guidance scale"),
        same("person_guidance", number(float, -100, 100), 1., "how strongly guidance leads to the "
             "person; any other than 1 takes half as long again"),
        same("strength", number(float, 0, 1.5), 1., "of the person's weights; 0: nobody"),
        Option("side_by_side", number(int, 1, 1024), 8, 2, "of several people, how many are made and "
               "drawn in one batch"),
        same("negative", printable, "", "prompt of what to avoid; if not given, nothing")]


def lora_and_strength(text):
    """"style.safetensors:0.8" -> its path and strength."""
    path, _, strength = text.rpartition(":")
    if Path(text).exists() or not Path(path).is_file():
        return text, 1.
    with suppress(ValueError):
        if abs(float(strength)) <= 100:
            return path, float(strength)
    raise argparse.ArgumentTypeError(f"{strength!r} is no strength")


def square(text):
    """"face", "center" or "x,y,size"."""
    if text in ("face", "center"):
        return text
    try:
        x, y, size = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not face, center or x,y,size in pixels") from None
    return x, y, size


OUTPUTS = [
    same("lora", lora_and_strength, [], "another LoRA beside the person; repeatable", action="append",
         metavar="FILE[:SCALE]"),
    same("export", str, None, "also write, for diffusers, ComfyUI and A1111, lora.safetensors, with "
         "--strength and --lora in it, or embedding.safetensors, what textual inversion has learnt",
         choices=["lora", "embedding"]),
    same("merge", str, None, "also write a whole model, with the person in its weights", metavar="FOLDER"),
    SEED._replace(nano=None, elsewhere=None, help="of all that is drawn at random; if not given, a "
                  "new one, which is printed"),
    same("out", new_folder, Path("out"), "folder of all that is written")]


def arguments(description):
    """The parsed options, and `people`, the personal files given, or `photos`, the photos given."""
    said = early("model", "method", "hypernet", "sampler")
    model, method = model_name(said.model or "nano"), METHODS.get(said.method, METHODS[OURS])
    parser = Parser(description, allow_abbrev=False)
    parser.add_argument("photo", help="a picture of one face, a folder of such pictures of one person, or a "
                        "personal file (.safetensors)")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help='with [V] for the person: "a [V] face '
                        'as a rock star"; further photos of the person, or personal files, may stand before')
    parser.add_argument("--method", choices=METHODS, default=OURS, help="; ".join(
        f"{name}: {one.what}" for name, one in METHODS.items()))
    parser.add_argument("--each", action="store_true", help="every photo is another person; a bad photo is "
                        "reported and the rest go on")
    look = wording.understood if model == "nano" else refused("--look is for photos, on nano")
    photos = [same("crop", square, "face", "of the photo: face, the largest; center; or X,Y,SIZE in pixels",
                   metavar="SQUARE"),
              same("look", look, None, 'nano: correct what was seen in the photo: "grey hair, no beard"')]
    add(parser, model_rows(model_name), model)
    parser.add_argument_group(method.name)
    add(parser, [*photos, *method.options(model, said.hypernet)], model)
    add(parser, [*sampling_rows(said.sampler), *OUTPUTS], model)
    args = parser.parse_args()
    args.prompts, args.people, args.photos = split_given(args)
    args.seed = secrets.randbelow(2 ** 31) if args.seed is None else args.seed
    if args.each:
        args.photos = [str(file) for path in args.photos for file in photo_files(path)]
    for wrong, why in refusals(args, method):
        if wrong:
            parser.error(why)
    check_kinds(args, method.kinds(args) if args.photos else None)
    return args


def split_given(args):
    """(prompts, personal files, photos): personal files, or photos, may be several, before the prompts."""
    given, prompts = [args.photo], list(args.prompts)
    personal = is_personal(args.photo)
    while len(prompts) > 1 and (is_personal if personal else is_photo)(prompts[0]):
        given.append(prompts.pop(0))
    return [printable(prompt) for prompt in prompts], given if personal else [], [] if personal else given


def refusals(args, method):
    """Options that exclude each other, as pairs: whether they are given, and what is wrong with that."""
    several = args.each or len(args.people) > 1
    merge, out = real(args.merge or "."), real(args.out)
    for prompt in args.prompts:
        file = is_personal(prompt) or os.path.isfile(prompt)
        yield file, f"{prompt} stands where a prompt is expected, after the photo or the personal files"
    yield several and (args.export or args.merge), "--export and --merge take one person"
    yield args.each and args.people, "--each is for photos"
    yield args.look is not None and args.people, "--look is for photos, on nano"
    cropped = len(args.photos) > 1 and isinstance(args.crop, tuple)
    yield cropped, "several photos cannot have one --crop in pixels"
    folders = any(map(os.path.isdir, args.photos))
    yield (not method.several and not args.each and (len(args.photos) > 1 or folders),
           f"{method.name} takes one photo")
    nested = args.merge and merge in (out, *out.parents)
    yield nested, "--merge and --out must be two folders, --out not in the other"
    people = len(args.photos if args.each else args.people) or 1
    outputs = ["sheet.png", *(f"{i}.png" for i in range(len(args.prompts) * people))]
    outputs += [f"{args.export}.safetensors"] * bool(args.export)
    outputs += [*PERSONAL] * bool(args.photos and not args.each)
    written = [real(args.out / name) for name in outputs]
    photos = [file for path in args.photos for file in (photo_files(path) if os.path.isdir(path) else [path])]
    more = *(lora for lora, _ in args.lora), getattr(args, "hypernet", None), getattr(args, "beside", None)
    for path in (*photos, *args.people, *more):
        yield path and real(path) in written, f"{path} would be overwritten; give another folder with --out"
    for path in args.people:  # what is no person is said here, by its header
        Tensors(path)
    if replaces_another(written, args):
        yield True, (f"--out {args.out} holds another person's files; give this one a folder, such as "
                     f"--out {unused_folder(args)}")
    if args.merge:
        free_folder(args.merge)
        new_folder(args.merge)


def replaces_another(written, args):
    """Whether one of the files that are `written` is there and was made of none of these people's photos."""
    held = [photos for photos in map(photos_of, filter(Path.is_file, written)) if photos]
    own = held and set().union(*map(photos_of, args.people)) | known_by(args.photos)
    return any(own.isdisjoint(photos) for photos in held)


def unused_folder(args):
    """A folder beside --out that isn't there, of the photo's name."""
    stem = Path(os.path.abspath(args.photo)).stem
    return args.out.parent / free_name(stem, os.listdir(args.out.parent))


def check_kinds(args, kinds):
    """UserError if an option asks for what adapters of these kinds can't do; kinds None: not known yet."""
    for option, asked, possible in (
            ("--strength", args.strength != 1, (LowRank, Change)),
            ("--merge", args.merge, (LowRank,) if args.lora else (LowRank, Change)),
            ("--export lora", args.export == "lora", (LowRank,)),
            ("--export embedding", args.export == "embedding", (textual_inversion.Rows,))):
        if asked and not all(issubclass(kind, possible) for kind in kinds or ()):
            able = " or ".join(kind.__name__ for kind in possible)
            raise UserError(f"{option} needs adapters that are {able}, this person's are "
                            f"{', '.join(sorted({kind.__name__ for kind in kinds}))}; see adapters.py")


def real(path):
    """`path` without links. Links may form a loop, which Path.resolve() refuses."""
    return Path(os.path.realpath(path))


def is_personal(text):
    return text.endswith(".safetensors") or is_person(text)


def is_photo(text):
    return os.path.exists(text) and not is_personal(text)
