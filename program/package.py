"""The build backend of `pip install git+…` (PEP 517): install all modules as one package, hyperdreambooth.

    pip install git+https://…/hdb
    from hyperdreambooth import hdb, lidb, adapters

In the repository, files are flat, and names such as clip, vae and unet are those of other packages too. So
the wheel has them in one package, with their imports changed to match. It needs only Python."""
import base64
import hashlib
import re
import zipfile
from pathlib import Path

NAME, VERSION = "hyperdreambooth", "0.1"
ROOT = Path(__file__).parents[1]
FOLDERS = "docs", "evaluation", "files", "methods", "nano", "program", "training"
DATA = ".safetensors", ".json", ".txt", ".csv"
WHEEL = "Wheel-Version: 1.0\nGenerator: hdb\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def ours():
    """The top-level names that our files import."""
    return sorted({*FOLDERS, *(file.stem for file in ROOT.glob("*.py"))})


def within(text, names):
    """Python source with imports of `names` changed to imports from the package."""
    any_of = "|".join(names)
    text = re.sub(rf"(?m)^(\s*)from ({any_of})(?=[.\s])", rf"\1from {NAME}.\2", text)
    return re.sub(rf"(?m)^(\s*)import ({any_of})$", rf"\1from {NAME} import \2", text)


def contents():
    """Yields (path in the wheel, bytes), for everything but the record."""
    names = ours()
    yield f"{NAME}/__init__.py", b""
    files = [*ROOT.glob("*.py"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*"))]
    for file in sorted(files):
        path = f"{NAME}/{file.relative_to(ROOT).as_posix()}"
        if file.suffix == ".py":
            yield path, within(file.read_text(encoding="utf-8"), names).encode()
        elif file.suffix in DATA:
            yield path, file.read_bytes()
    requires = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires if line and not line.startswith("pytest"))
    about = f"{NAME}-{VERSION}.dist-info"
    yield f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n{needs}".encode()
    yield f"{about}/WHEEL", WHEEL.encode()
    for name in "LICENSE", "NOTICE":
        yield f"{about}/{name}", (ROOT / name).read_bytes()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Write the wheel into this folder, and return its name; called by pip."""
    file, record = f"{NAME}-{VERSION}-py3-none-any.whl", []
    with zipfile.ZipFile(Path(wheel_directory) / file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, data in contents():
            wheel.writestr(path, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(data)}\n")
        path = f"{NAME}-{VERSION}.dist-info/RECORD"
        wheel.writestr(path, "".join(record) + f"{path},,\n")
    return file
