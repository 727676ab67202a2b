"""The systems that the paper compares with, each in a file of its own. A person whom one of them has made is
read and sampled as any other, once this is imported."""
from baselines import dreambooth, e4t, perfusion, textual_inversion
from files.person import MAKERS

MAKERS |= {"dreambooth": dreambooth, "textual_inversion": textual_inversion, "perfusion": perfusion,
           "e4t": e4t}
