"""Once this is imported, persons whom the compared systems have made are read and sampled as any other."""
from methods import dreambooth, e4t, perfusion, textual_inversion
from files.person import MAKERS

MAKERS |= {"dreambooth": dreambooth, "textual_inversion": textual_inversion, "perfusion": perfusion,
           "e4t": e4t}
