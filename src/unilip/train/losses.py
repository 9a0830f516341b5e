"""Losses that need more than a line: contrast, perceptual distances, and the adversary of the tokenizer stages.

In:  pictures (B,3,H,W) in [0,1] unless said otherwise, in [-1,1] for the discriminator. Out: scalars.
"""

import os
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.errors import ConfigError
from unilip.method.encoder import Encoder
from unilip.method.qwen2 import Layers
from unilip.pictures import normalise

LECAM_DECAY = 0.999  # of the running mean scores


def contrastive_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric cross entropy between unit embeddings (B,D), and the share of pictures whose best text is right."""
    with torch.autocast(image.device.type, enabled=False):  # in float32
        scores = image.float() @ text.float().T * scale.float()  # B B
        target = same / same.sum(-1, keepdim=True)  # captions that say the same (1) share the right answer equally
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    return loss, (same.gather(1, scores.argmax(1, keepdim=True)) > 0).float().mean()


class TeacherPerceptual(nn.Module):
    """Distance of a frozen encoder's patch states, layer by layer, each normalised over channels (as LPIPS does)."""

    def __init__(self, teacher: Encoder) -> None:
        super().__init__()
        self.teacher = [teacher]  # in a list: its weights belong to the objective, not to this module

    def states(self, pixels: Tensor) -> list[Tensor]:
        tower = self.teacher[0].vision_tower
        hidden = tower.embeddings(normalise(pixels))
        found = []
        for layer in cast(Layers, tower.encoder["layer"]):
            hidden = layer(hidden)
            found.append(F.normalize(hidden[:, 1:].float(), dim=-1))
        return found

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.states(target)
        pairs = zip(self.states(output), wanted, strict=True)
        return torch.stack([(a - b).square().sum(-1).mean() for a, b in pairs]).mean()


class LPIPSConvNeXt(nn.Module):
    """The paper's loss: (1.0 LPIPS-VGG16 + 0.1 MSE of ConvNeXt-S logits at 224 px) / 1.1."""

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips
            from transformers import ConvNextForImageClassification
        except ImportError as error:
            raise ConfigError(
                f"objective.perceptual_source=lpips needs the package lpips ({error}); install it, or use teacher."
            ) from error
        folder = os.environ.get("UNILIP_CONVNEXT", "facebook/convnext-small-224")
        try:
            logits: Any = ConvNextForImageClassification.from_pretrained(folder, local_files_only=Path(folder).exists())
        except OSError as error:
            raise ConfigError(f"ConvNeXt-S cannot be loaded from {folder}; set UNILIP_CONVNEXT to it.") from error
        self.logits = logits
        self.lpips = lpips.LPIPS(net="vgg")
        self.requires_grad_(False).eval()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        at_224 = [F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True) for x in (output, target)]
        a, b = (self.logits(normalise(x)).logits.float() for x in at_224)
        return (self.lpips(output * 2 - 1, target * 2 - 1).mean() + 0.1 * F.mse_loss(a, b)) / 1.1


class BlurDown(nn.Module):
    """Halve the resolution after a [1,3,3,1] blur, so that the discriminator sees no aliasing."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = row[:, None] * row[None]
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,C,H/2,W/2)."""
        channels = x.shape[1]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel.to(x).expand(channels, 1, 4, 4), stride=2, groups=channels)


class PatchDiscriminator(nn.Module):
    """Three blurred stages and a score per patch: (B,3,H,W) -> (B,1,H/8,W/8); `means` (2,) are LeCam's mean scores."""

    means: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for _ in range(3):
            wider = min(channels * 2, 4 * width)
            layers += [nn.Conv2d(channels, wider, 3, padding=1), BlurDown(), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 3, padding=1))
        self.net = nn.Sequential(*layers)
        self.register_buffer("means", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return patch scores; real pictures should score above 1, drawn ones below -1."""
        return self.net(x)

    @torch.no_grad()
    def remember(self, real: Tensor, fake: Tensor) -> None:
        self.means.lerp_(torch.stack([real.mean(), fake.mean()]).to(self.means), 1 - LECAM_DECAY)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def lecam_penalty(real: Tensor, fake: Tensor, means: Tensor) -> Tensor:
    """LeCam regularisation: scores stay near the other side's running mean; `means` is (2,): real, fake."""
    real_mean, fake_mean = means.to(real)
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()
