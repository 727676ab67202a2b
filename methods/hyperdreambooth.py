"""HyperDreamBooth (hdb.py) as one of the methods, for the command line and a person's file."""
import warnings
from dataclasses import replace

from adapters import LowRank, join, scale
from files.person import OURS, Person, lora_shapes
from methods.protocol import Method
from program.console import UserError
from program.options import number, old_file, refused, same
from training.views import crops, face_weights

# Steps, rank and learning rate. For nano, the best of several on validation people. On other models a
# prediction is fine-tuned at the usual rate of LoRAs on one image. Without a hypernetwork the LoRA has to
# learn everything; these are the settings published for such LoRAs.
USUAL = {"nano": (40, 4, 3e-3), "predicted": (40, 4, 5e-4), "alone": (200, 16, 2e-4)}
LARGE = 5e-4  # higher rates suit only nano
# The share of the fine-tuned LoRA that is added to nano's predictions. All of it lowered the likeness in
# styles from .872 to .854 on 12 validation people; .6 and .8 raised it a little (docs/choices.md)
KEPT = .7


def options(model, hypernet):
    """The rows of this method. Defaults depend on whether there is a hypernetwork."""
    steps, rank, lr = USUAL["nano" if model == "nano" else "predicted" if hypernet else "alone"]
    return [same("steps", number(int, 0, 100_000), steps, "fine-tuning steps; 0: the prediction alone"),
            same("rank", number(int, 1, 320), rank, "rank of the LoRA that is fine-tuned"),
            same("lr", number(float, 0, 1), lr, "learning rate of fine-tuning"),
            same("batch", number(int, 1, 1024), 4, "noises of the photo in each step of fine-tuning"),
            same("views", number(int, 1, 64), 8 if model == "nano" else 1, "crops of a single photo to train "
                 "on, with less weight around the face, so that less is copied; 1: the photo as it is"),
            same("hypernet", old_file, None, "file of train.py, to predict with; default: nano's own; on "
                 "other models fine-tuning alone"),
            same("encoder", str if hypernet else refused("--encoder is for --hypernet"), None,
                 "the ViT that --hypernet was trained with; default: where it was then",
                 dest="face_encoder", metavar="ENCODER")]


def make(engine, photos, generators, args, stage):
    """Photos (P, N, 3, H, W) to the Person of P people: predict, then fine-tune; UserError for neither."""
    theta, lora = None, {}
    if engine.hypernet:
        theta = engine.predict(photos)
        stage(f"predicted {theta.numel():,} personal weights")
    elif not args.steps:
        raise UserError("neither a hypernetwork nor fine-tuning steps: nothing would be personal; give "
                        "--hypernet or --steps")
    else:
        print(f"         no hypernetwork for {args.model}: fine-tuning alone, {args.steps} steps at rank "
              f"{args.rank}; 40 steps would be few")
    if args.model != "nano" and args.lr > LARGE:
        warnings.warn(f"--lr {args.lr:g} is large for this model; 2e-4 to 5e-4 are usual", stacklevel=1)
    if args.steps:
        with stage.progress(args.steps) as show:
            settings = args.steps, args.rank, args.lr, args.batch
            lora = tune(engine, photos, theta, generators, args.views, *settings, callback=show)
        stage(f"fine-tuned {args.steps} steps at rank {args.rank}, learning rate {args.lr:g}")
    return person(theta, lora, base=args.model, basis_seed=engine.basis_seed)


def tune(engine, photos, theta, generators, views, *settings, callback=None):
    """The LoRA's adapters by engine.fine_tune with these settings, on photos (P, N, 3, H, W). A single photo
    is replaced by `views` crops of it (training/views.py)."""
    places = 1.
    if views > 1 and photos.shape[1] == 1:
        places = face_weights(*(length // 8 for length in photos.shape[-2:]), photos.device)
        photos = crops(photos[:, 0], views, generators)
    lora = engine.fine_tune(photos, theta, *settings, generator=generators, callback=callback, places=places)
    if engine.model.name == "nano" and theta is not None:
        return scale(lora, KEPT)
    return lora


def person(theta=None, lora=None, basis_seed=0, **about):
    """The Person with θ (P, layers, size), a LoRA's adapters, or both."""
    tensors = {} if theta is None else {"theta": theta}
    for name, pair in (lora or {}).items():
        tensors |= {f"{name}.A": pair.a, f"{name}.B": pair.b}
    return Person(METHOD, tensors, basis_seed=None if theta is None else basis_seed, **about)


def prediction(person):
    """The same person without the LoRA: the hypernetwork's prediction."""
    return replace(person, tensors={key: t for key, t in person.tensors.items() if key == "theta"})


def parts(person):
    """The files of a person: the prediction, a few KB, and that with the LoRA. Either may be missing."""
    alone = prediction(person)
    tuned = {"person_tuned": person} if len(person.tensors) > len(alone.tensors) else {}
    return ({"person": alone} if alone.tensors else {}) | tuned


def adapters(tensors, engine):
    """The adapters of the prediction and of the LoRA, joined."""
    predicted = engine.lidb.adapters(tensors["theta"]) if "theta" in tensors else {}
    tuned = [name for name in engine.layers if f"{name}.A" in tensors]
    return join(predicted, {name: LowRank(tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in tuned})


def shapes(tensors, engine):
    """name -> shape of one person's tensors. A LoRA may have any layers and ranks."""
    expected = {"theta": (1, *engine.lidb.shape)} if "theta" in tensors else {}
    return expected | lora_shapes(engine.layers, tensors)


def note(tensors, engine):
    """The basis that θ belongs to. On SD 1.5, making it takes a second."""
    if "theta" not in tensors:
        return {}
    lidb = engine.lidb
    return {"a": lidb.a, "b": lidb.b, "r": lidb.rank, "basis_seed": lidb.seed,
            "basis_checksum": lidb.checksum}


METHOD = Method(OURS, "a hypernetwork predicts the person, then 40 steps of a LoRA", options,
                make, adapters, shapes, lambda args: [LowRank], parts=parts, note=note,
                scalable=True, several=True)
