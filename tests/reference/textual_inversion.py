"""A learnt word in diffusers: python tests/reference/textual_inversion.py

    pip install diffusers==0.42.1 transformers==5.23.0   # here only, never by the tests

What methods/textual_inversion.py writes is loaded into a small pipeline. Its new rows are the vectors, and
its text features are ours under the adapter; the greatest difference relative to the greatest value is shown.
"""
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from make import SD15_SCHEDULER, their_text, their_unet, their_vae  # puts the modules below on the path
from rule import difference, draw, fill
from tiny import TEXT, UNET, VAE, tiny_model
from transformers import CLIPTokenizer

from clip import with_identifier
from methods.textual_inversion import TOKEN, adapters, identifier, save_embedding
from files.tokenizers import write_tokenizer
from hdb import PROMPT

for count in 1, 3:
    model, vectors = tiny_model(), draw((1, count, TEXT.hidden_size), "vectors")
    fill(model.text.text_model)  # transformers 5 has no text_model, and the rule goes by names
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(model.tokenizer, folder)
        save_embedding({"vectors": vectors}, Path(folder, "person.safetensors"))
        pipe = StableDiffusionPipeline(
            unet=their_unet(UNET), text_encoder=their_text(**asdict(TEXT)), vae=their_vae(VAE),
            tokenizer=CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT.max_position_embeddings),
            scheduler=DDIMScheduler.from_config(SD15_SCHEDULER), safety_checker=None, feature_extractor=None)
        pipe.load_textual_inversion(f"{folder}/person.safetensors")
    rows = pipe.text_encoder.get_input_embeddings().weight[-count:]
    assert torch.equal(rows, vectors[0]), "other rows than were written"

    with torch.no_grad(), model.adapted(adapters({"vectors": vectors}, model)):
        ours = model.context([with_identifier(PROMPT, identifier(count))])
        theirs, _ = pipe.encode_prompt(with_identifier(PROMPT, TOKEN), "cpu", 1, False)
    error = difference(ours, theirs)
    print(f"{count} vectors: rows equal, text features to {error:.1e}")
    assert error < 5e-6, "other text features"
