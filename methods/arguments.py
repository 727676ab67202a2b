"""What may be asked of personalize.py and of the systems beside it: their options, and what cannot be
had, said before the work begins."""
import argparse
import os
import secrets
from contextlib import suppress
from pathlib import Path

from methods import textual_inversion
from adapters import LINEAR, LowRank
from program import console
from program.console import UserError
from files.layouts import model_name
from files.merged import free_folder
from files.person import OURS, is_person
from training.photos import photo_files
from nano import faces

PERSONAL = "person.safetensors", "person_tuned.safetensors"  # LiDB's part alone, and with the LoRA
# Numbers of all methods: usual on nano, elsewhere, the least, the most, what it is
COMMON = {"sample_steps": (15, 30, 1, 999, "of the sampler, DPM-Solver++(2M)"),
          "guidance": (2., 7.5, -100, 100, "classifier-free guidance scale"),
          "person_guidance": (1., 1., -100, 100, "of guidance, weight of the person; any but 1 takes longer"),
          "strength": (1., 1., 0, 1.5, "of the person"),
          "side_by_side": (8, 2, 1, 1024, "people in a batch, where there are several")}


def parsed(maker, method):
    """What the command line says; the options of the method, whose module is `maker`, stand beside those of
    all."""
    parser = console.model_parser(maker.__doc__, model_name)
    parser.set_defaults(hypernet=None, method=method, saw=None)
    parser.add_argument("photo", help="a picture of one face, a folder of such pictures of one person, or a "
                        "personal file (.safetensors)")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help='with [V] for the person: "[V] face as '
                        'a rock star"; further photos of the person, or personal files, may stand before')
    parser.add_argument("--each", action="store_true", help="every photo is another person; a bad photo is "
                        "reported and the rest go on")
    parser.add_argument("--crop", type=square, default="face", metavar="SQUARE",
                        help="of the photo: face, the largest; center; or X,Y,SIZE in pixels")
    parser.add_argument("--look", help='nano: corrects what is seen in a photo: "grey hair, no beard"')
    if hasattr(maker, "options"):
        maker.options(parser)
    numbers = maker.NUMBERS | COMMON
    console.add_numbers(parser, numbers)
    parser.add_argument("--negative", type=console.printable, default="", help="what to avoid")
    parser.add_argument("--lora", action="append", type=lora_and_strength, default=[], metavar="FILE[:SCALE]",
                        help="somebody else's LoRA beside the person; repeatable")
    parser.add_argument("--export", choices=["lora", "embedding"], help="also write lora.safetensors, with "
                        "--strength and --lora in it, or what textual inversion has learnt, "
                        "embedding.safetensors, for diffusers, ComfyUI and A1111")
    parser.add_argument("--merge", metavar="FOLDER", help="also write the model with the person merged in")
    parser.add_argument("--seed", type=int, help="drawn, and printed, if not given")
    parser.add_argument("--out", default="out", type=Path, help="folder of all that is written")
    args = parser.parse_args()

    # personal files, or photos, may be several, before the prompts
    personal, given = is_personal(args.photo), [args.photo]
    another = is_personal if personal else is_photo
    while len(args.prompts) > 1 and another(args.prompts[0]):
        given.append(args.prompts.pop(0))
    args.people, args.photos = (given, []) if personal else ([], given)
    args.prompts = [console.printable(prompt) for prompt in args.prompts]
    for prompt in args.prompts:
        if is_personal(prompt) or os.path.isfile(prompt):
            parser.error(f"{prompt} stands where a prompt is expected, after the photo or the personal files")
    args.seed = secrets.randbelow(2 ** 31) if args.seed is None else args.seed

    # the usual numbers; nothing is out of range, or would be written where it cannot or must not be
    if args.model != "nano" and method == OURS and not args.hypernet:
        vars(args).update(maker.ALONE | vars(args))
    console.complete_numbers(parser, args, numbers)
    console.check_ranges(parser, args, seed=(0, 2 ** 40))
    console.check_folder(parser, "--out", args.out)
    if args.merge is not None:
        free_folder(args.merge)
        console.check_folder(parser, "--merge", args.merge)
        if real(args.merge) in (real(args.out), *real(args.out).parents):
            parser.error("--merge and --out must be two folders, --out not in the other")
    if (args.each or len(args.people) > 1) and (args.export or args.merge):
        parser.error("--export and --merge take one person")
    if args.each:
        if args.people:
            parser.error("--each is for photos")
        args.side_by_side = args.side_by_side if method == OURS else 1
        args.photos = [str(file) for path in args.photos for file in photo_files(path)]
    if len(args.photos) > 1 and isinstance(args.crop, tuple):
        parser.error("several photos cannot have one --crop in pixels")
    if args.look is not None:
        if args.model != "nano" or args.people:
            parser.error("--look is for photos, on nano")
        args.look = faces.understood(args.look)

    people = len(args.photos if args.each else args.people) or 1
    outputs = ["sheet.png", *(f"{i}.png" for i in range(len(args.prompts) * people))]
    outputs += [f"{args.export}.safetensors"] if args.export else []
    outputs += [] if args.people else PERSONAL
    written = [real(args.out / name) for name in outputs]
    for path in (*args.photos, *args.people, *(lora for lora, _ in args.lora), args.hypernet):
        if path and real(path) in written:
            parser.error(f"{path} would be overwritten; give another folder with --out")
    return args


def check_kinds(args, kinds):
    """UserError if an option asks for what adapters of these kinds can't do."""
    for option, asked, possible in (
            ("--strength", args.strength != 1, LINEAR),
            ("--merge", args.merge, (LowRank,) if args.lora else LINEAR),
            ("--export lora", args.export == "lora", (LowRank,)),
            ("--export embedding", args.export == "embedding", (textual_inversion.Rows,))):
        if asked and not all(issubclass(kind, possible) for kind in kinds):
            able = " or ".join(kind.__name__ for kind in possible)
            raise UserError(f"{option} needs adapters that are {able}, this person's are "
                            f"{', '.join(sorted({kind.__name__ for kind in kinds}))}; see adapters.py")


def real(path):
    """`path` without links; with loops of them, which Path.resolve() doesn't take."""
    return Path(os.path.realpath(path))


def is_personal(text):
    return text.endswith(".safetensors") or is_person(text)


def is_photo(text):
    return os.path.exists(text) and not is_personal(text)


def square(text):
    if text in ("face", "center"):
        return text
    try:
        x, y, size = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not face, center or x,y,size in pixels") from None
    return x, y, size


def lora_and_strength(text):
    """"style.safetensors:0.8" -> its path and strength."""
    path, _, strength = text.rpartition(":")
    if Path(text).exists() or not Path(path).is_file():
        return text, 1.
    with suppress(ValueError):
        if abs(float(strength)) <= 100:
            return path, float(strength)
    raise argparse.ArgumentTypeError(f"{strength!r} is no strength")
