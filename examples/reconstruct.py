"""Encode a picture and draw it again: what is lost is what the encoder does not know.

python examples/reconstruct.py [MODEL]
"""

import sys

from unilip import UniLIP
from unilip.demo import FOLDER, examples
from unilip.pictures import fit_square, load_image, picture_psnr

tokenizer = ("encoder", "latent_head", "pixel_decoder")  # no language model, no diffusion transformer
model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None, parts=tokenizer)
source = fit_square(load_image(FOLDER / examples()["pictures"][0]["file"]), model.config.image_size)
again = model.reconstruct(source).images[0]
again.save("again.png")
latent = model.reconstruct(source, output_type="latent").images
print(f"again.png, {picture_psnr(source, again):.1f} dB through a latent of {tuple(latent.shape)}")
