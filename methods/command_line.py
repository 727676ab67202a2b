"""The command line of personalize.py: the options of all methods, and checks before anything is loaded."""
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
from training.photos import check_outside, known_by, photo_files, photos_of

PERSONAL = "person.safetensors", "person_tuned.safetensors"  # the prediction alone; with the LoRA


def sampling_rows(sampler):
    """The rows of sampling. lcm needs a model, or a LoRA, trained for few steps and no guidance."""
    most, steps, guidance = (50, (4, 4), (1., 1.)) if sampler == "lcm" else (999, (15, 30), (2., 7.5))
    return [
        same("sampler", str, "dpmpp_2m", "DPM-Solver++(2M), DDIM, or latent consistency sampling, for a "
             "model or LoRA made for it", choices=list(SAMPLERS)),
        Option("sample_steps", number(int, 1, most), *steps, "steps of the sampler"),
        Option("guidance", number(float, -100, 100), *guidance, "classifier-free guidance scale"),
        same("person_guidance", number(float, -100, 100), 1., "guidance scale towards the person; any value "
             "but 1 takes half as long again"),
        same("strength", number(float, 0, 1.5), 1., "strength of the person's weights; 0: nobody"),
        Option("side_by_side", number(int, 1, 1024), 8, 2, "how many people are made and drawn in one batch"),
        same("negative", printable, "", "negative prompt: what to avoid; default: empty")]


def lora_and_strength(text):
    """(path, strength) from "style.safetensors:0.8" or a path alone."""
    path, _, strength = text.rpartition(":")
    if Path(text).exists() or not Path(path).is_file():
        return text, 1.
    with suppress(ValueError):
        if abs(float(strength)) <= 100:
            return path, float(strength)
    raise UserError(f"{strength!r} is not a strength from -100 to 100")


def square(text):
    """"face", "center", or (x, y, size) from "x,y,size"."""
    if text in ("face", "center"):
        return text
    try:
        x, y, size = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not face, center or x,y,size in pixels") from None
    return x, y, size


OUTPUTS = [
    same("lora", lora_and_strength, [], "a LoRA to use with the person, such as a style; repeatable",
         action="append", metavar="FILE[:SCALE]"),
    same("export", str, None, "also write for diffusers, ComfyUI and A1111: lora.safetensors, which includes "
         "--strength and --lora; or embedding.safetensors, a learnt word", choices=["lora", "embedding"]),
    same("merge", str, None, "also write a whole model with the person merged in", metavar="FOLDER"),
    SEED._replace(nano=None, elsewhere=None, help="random seed; default: a new one, which is printed"),
    same("out", new_folder, Path("out"), "folder of all output")]


def arguments(description):
    """The parsed options. `people` are the given personal files, or `photos` the given photos."""
    # The rows depend on these four
    said = early("model", "method", "hypernet", "sampler")
    model, method = model_name(said.model or "nano"), METHODS.get(said.method, METHODS[OURS])
    parser = Parser(description, allow_abbrev=False)
    parser.add_argument("photo", help="a picture of one face, a folder of such pictures of one person, or a "
                        "personal file (.safetensors)")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help='with [V] for the person: "a [V] face '
                        'as a rock star"; more photos, or more personal files, may precede the prompts')
    parser.add_argument("--method", choices=METHODS, default=OURS, help="; ".join(
        f"{name}: {one.what}" for name, one in METHODS.items()))
    parser.add_argument("--each", action="store_true", help="every photo is another person; a bad photo is "
                        "reported, and the others are made")
    look = wording.understood if model == "nano" else refused("--look is for photos, on nano")
    photos = [same("crop", square, "face", "square of the photo: face (the largest), center, or X,Y,SIZE in "
                   "pixels", metavar="SQUARE"),
              same("look", look, None, 'nano: correct what it saw in the photo: "grey hair, no beard"')]
    add(parser, model_rows(model_name), model)
    add(parser, [*photos, *method.options(model, said.hypernet)], model)
    add(parser, [*sampling_rows(said.sampler), *OUTPUTS], model)

    # What was given, and whether it can be done
    args = parser.parse_args()
    args.prompts, args.people, args.photos = split_given(args)
    args.seed = secrets.randbelow(2 ** 31) if args.seed is None else args.seed
    for path in filter(os.path.isdir, args.photos):
        check_outside(args.out, path)
    if args.each:
        args.photos = [str(file) for path in args.photos for file in photo_files(path)]
    for wrong, why in refusals(args, method):
        if wrong:
            parser.error(why)
    check_kinds(args, method.kinds(args) if args.photos else None)
    return args


def split_given(args):
    """(prompts, personal files, photos). Several personal files or photos may precede the prompts."""
    given, prompts = [args.photo], list(args.prompts)
    personal = is_personal(args.photo)
    while len(prompts) > 1 and (is_personal if personal else is_photo)(prompts[0]):
        given.append(prompts.pop(0))
    return [printable(prompt) for prompt in prompts], given if personal else [], [] if personal else given


def refusals(args, method):
    """Yields (whether the options are wrong, the error), also for output that would overwrite other files.
    UserError for a file that is no person, and for a --merge that has contents."""
    # Options that contradict each other
    several = args.each or len(args.people) > 1
    merge, out = real(args.merge or "."), real(args.out)
    for prompt in args.prompts:
        file = is_personal(prompt) or os.path.isfile(prompt)
        yield file, f"{prompt} names a file; only prompts may follow the photos or the personal files"
    yield several and (args.export or args.merge), "--export and --merge take one person"
    yield args.each and args.people, "--each is for photos"
    yield args.look is not None and args.people, "--look is for photos, on nano"
    cropped = len(args.photos) > 1 and isinstance(args.crop, tuple)
    yield cropped, "several photos cannot have one --crop in pixels"
    folders = any(map(os.path.isdir, args.photos))
    yield (not method.several and not args.each and (len(args.photos) > 1 or folders),
           f"{method.name} takes one photo")
    nested = args.merge and merge in (out, *out.parents)
    yield nested, "--merge and --out must be two folders, and --out must not be inside --merge"

    # Files that would be overwritten: what the run reads, and another person's
    people = len(args.photos if args.each else args.people) or 1
    outputs = ["sheet.png", *(f"{i}.png" for i in range(len(args.prompts) * people))]
    outputs += [f"{args.export}.safetensors"] * bool(args.export)
    outputs += [*PERSONAL] * bool(args.photos and not args.each)
    written = [real(args.out / name) for name in outputs]
    more = *(lora for lora, _ in args.lora), getattr(args, "hypernet", None), getattr(args, "beside", None)
    for path in (*args.photos, *args.people, *more):
        yield path and real(path) in written, f"{path} would be overwritten; give another folder with --out"
    for path in args.people:  # reads the header
        Tensors(path)
    if replaces_another(written, args):
        free = free_name(Path(os.path.abspath(args.photo)).stem, os.listdir(args.out.parent))
        yield True, (f"--out {args.out} holds another person's files; give this one a folder, such as "
                     f"--out {args.out.parent / free}")
    if args.merge:
        new_folder(free_folder(args.merge).parent)  # where it is written before it takes its name


def replaces_another(written, args):
    """Whether one of the files to be `written` exists and was made from none of these people's photos."""
    held = [photos for photos in map(photos_of, filter(Path.is_file, written)) if photos]
    own = held and set().union(*map(photos_of, args.people)) | known_by(args.photos)
    return any(own.isdisjoint(photos) for photos in held)


def check_kinds(args, kinds):
    """UserError if an option asks what adapters of these kinds cannot do; None: the kinds are unknown yet."""
    for option, asked, possible in (
            ("--strength", args.strength != 1, (LowRank, Change)),
            ("--merge", args.merge, (LowRank,) if args.lora else (LowRank, Change)),
            ("--export lora", args.export == "lora", (LowRank,)),
            ("--export embedding", args.export == "embedding", (textual_inversion.Rows,))):
        if asked and not all(issubclass(kind, possible) for kind in kinds or ()):
            able, found = ([kind.__name__ for kind in some] for some in (possible, kinds))
            raise UserError(f"{option} needs adapters that are {' or '.join(able)}, this person's are "
                            f"{', '.join(sorted(set(found)))}; see adapters.py")


def real(path):
    """`path` without links. Path.resolve() refuses loops of links."""
    return Path(os.path.realpath(path))


def is_personal(text):
    return text.endswith(".safetensors") or is_person(text)


def is_photo(text):
    return os.path.exists(text) and not is_personal(text)
