"""All methods: name, as in --method and in a person's file -> Method."""
from methods import dreambooth, e4t, hyperdreambooth, perfusion, textual_inversion

METHODS = {module.METHOD.name: module.METHOD
           for module in (hyperdreambooth, dreambooth, textual_inversion, perfusion, e4t)}
