"""All methods, by the name that --method and a person's file give them."""
from methods import dreambooth, e4t, hyperdreambooth, perfusion, textual_inversion

METHODS = {module.METHOD.name: module.METHOD
           for module in (hyperdreambooth, dreambooth, textual_inversion, perfusion, e4t)}
