"""What is measured of a picture: by nano's judge, who knows, or by the paper's metrics.

Both are called with pictures (B, 3, H, W) in [-1, 1], the photos of their people, and their prompt, and give
a dict of name -> (B,).
"""
import torch
import torch.nn.functional as F

import clip
from files.encoders import load_clip, load_vit
from nano.judge import load_judge
from nano.people import PROMPTS, STYLES
from vit import encode_face

# The paper's prompts; a person's name is [V]
PAPERS = ("a [V] face", "an instagram selfie of a [V] face", "a pixar character of a [V] face",
          "a [V] face with bark skin", "a [V] face as a rock star", "a professional photo of a [V] face",
          "a [V] face in impressionist style", "a [V] face as a king", "a [V] face as an astronaut",
          "a [V] face at the beach")


class Judged:
    """nano: likeness, the cosine of identities (two photos of one person .95, strangers 0); style, 1 where
    the judge recognises the prompt's; and `both`, the likeness where the style is right and 0 elsewhere: of a
    copy of the photo, which is a likeness too, it leaves nothing but the plain prompt's."""
    names = "likeness", "style", "both"
    prompts = dict(zip(STYLES, PROMPTS))
    plain = "photo"

    def __init__(self, device):
        self.judge = load_judge(device)

    def __call__(self, pictures, photos, prompt):
        likeness = self.judge.likeness(pictures, photos)
        right = (self.judge(pictures)[1].argmax(1) == STYLES.index(prompt)).float()
        return {"likeness": likeness, "style": right, "both": likeness * right}


class Paper:
    """The paper's metrics: Face Rec., DINO and CLIP-I, cosines of features of picture and photo; CLIP-T, the
    cosine of picture and prompt, whose [V] is left out as it means nothing to CLIP. Face Rec. is measured
    where facenet-pytorch is installed."""
    prompts = {prompt: prompt for prompt in PAPERS}
    plain = PAPERS[0]

    def __init__(self, clip_source, dino_source, device):
        self.clip, self.tokenizer = load_clip(clip_source, device)
        self.dino, self.faces = load_vit(dino_source, device), facenet(device)
        self.names = (*(["Face Rec."] if self.faces else []), "DINO", "CLIP-I", "CLIP-T")

    @torch.no_grad()
    def __call__(self, pictures, photos, prompt):
        pictures, photos = (x.to(self.clip.logit_scale.device) for x in (pictures, photos))
        side = self.clip.vision_model.config.image_size
        words = self.tokenizer([" ".join(prompt.replace("[V]", "").split())])
        seen, known = (self.clip.image_features(clip.preprocess(x, side)) for x in (pictures, photos))
        said = self.clip.text_features(words.to(seen.device))
        features = {"DINO": [encode_face(self.dino, x)[:, 0] for x in (pictures, photos)],
                    "CLIP-I": [seen, known], "CLIP-T": [seen, said.expand_as(seen)]}
        if self.faces:
            features["Face Rec."] = [self.faces(x) for x in (pictures, photos)]
        return {name: F.cosine_similarity(*features[name]).cpu() for name in self.names}


def facenet(device):
    """Pictures (B, 3, H, W) in [-1, 1] -> face features (B, 512) of VGGFace2's Inception-ResNet, zeros where
    no face is found; None where facenet-pytorch is not installed."""
    try:
        from facenet_pytorch import MTCNN, InceptionResnetV1
    except ImportError:
        return None
    detect = MTCNN(image_size=160, device=device)
    network = InceptionResnetV1(pretrained="vggface2").eval().to(device)

    def features(pictures):
        bytes_ = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        crops = [detect(picture) for picture in bytes_]
        found = [i for i, crop in enumerate(crops) if crop is not None]
        out = torch.zeros(len(crops), 512)
        if found:
            out[found] = network(torch.stack([crops[i] for i in found]).to(device)).cpu()
        return out
    return features
