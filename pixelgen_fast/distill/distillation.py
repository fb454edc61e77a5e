"""One step of self-distillation: views of a batch, the losses, the student's update, and the teacher's average.

    student <- AdamW(views + patch_weight patches + spread_weight spread)       losses.py
    teacher <- m teacher + (1 - m) student                                      m rises to 1

Masked large views and small views go through the student, whole large views through the teacher.

Shapes: B images, S pixels a side, V views, the first G = 2 large, K prototypes, L patches, D width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast.distill.learner import Learner
from pixelgen_fast.distill.losses import momentum, patch_loss, sinkhorn, spread_loss, view_loss
from pixelgen_fast.distill.schema import TeacherConfig
from pixelgen_fast.distill.views import draw_masks, draw_views
from pixelgen_fast.engine.schedule import learning_rate

LOSSES = ("loss", "loss_views", "loss_patches", "loss_spread")
_LARGE = 2


class Distillation:
    """Student, teacher and optimizer on one device; all that is random is a function of run.seed.

    mean, std: of the images' channels, [3, 1, 1].
    """

    def __init__(self, config: TeacherConfig, mean: Tensor, std: Tensor, device: torch.device) -> None:
        self.config, self.mean, self.std = config, mean, std
        p = config.optimizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.student = Learner(config).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(_groups(self.student, p.weight_decay), lr=p.lr)
        self.schedule = cfg.Optimizer(lr=p.lr, warmup_images=p.warmup_images, schedule="cosine")
        self.source = torch.Generator(device).manual_seed(config.run.seed)

    def step(self, images: Tensor, nimg: int) -> Tensor:
        """Learn from images float [B, 3, S, S] in [0, 1], the batch that begins at `nimg`. Returns LOSSES, [4]."""
        total = self.config.train.images
        losses = self.losses(images)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.schedule, nimg, total)
        self.optimizer.zero_grad(set_to_none=True)
        losses[0].backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optimizer.clip)
        self.optimizer.step()
        m = momentum(self.config.objective.momentum, nimg, total)
        with torch.no_grad():
            for average, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.lerp_(value, 1 - m)
        return losses.detach()

    def losses(self, images: Tensor) -> Tensor:
        """LOSSES of one batch, [4]."""
        o, v, size = self.config.objective, self.config.views, self.config.data.image_size
        large = self._views(images, _LARGE, size, v.large_area)
        hidden = draw_masks(len(large), (size // self.config.network.patch_size) ** 2, v, self.source)
        with torch.no_grad():
            classes, tokens = self.teacher(large)
            p_views = sinkhorn(self.teacher.class_head(classes), o.teacher_temperature)
            p_patches = sinkhorn(self.teacher.patch_head(tokens[hidden]), o.teacher_temperature)
        classes, tokens = self.student(large, hidden)
        spread = torch.stack([spread_loss(f) for f in classes.chunk(_LARGE)]).mean()
        if v.small:
            classes = torch.cat([classes, self.student(self._views(images, v.small, v.small_size, v.small_area))[0]])
        logits_VBK, p_GBK = (x.unflatten(0, (-1, len(images))) for x in (self.student.class_head(classes), p_views))
        views = view_loss(logits_VBK, p_GBK, o.student_temperature)
        patches = patch_loss(self.student.patch_head(tokens[hidden]), p_patches, o.student_temperature)
        return torch.stack([views + o.patch_weight * patches + o.spread_weight * spread, views, patches, spread])

    def _views(self, images: Tensor, count: int, size: int, area: tuple[float, float]) -> Tensor:
        """`count` normalised views of each image, [count B, 3, s, s], one view of all images after the other."""
        drawn = [draw_views(images, size, area, self.config.views, self.source) for _ in range(count)]
        return (torch.cat(drawn) - self.mean) / self.std


def _groups(student: Learner, weight_decay: float) -> list[dict]:
    """Weight decay acts on matrices; vectors, tokens and scales have none."""
    matrices = [p for name, p in student.named_parameters() if p.squeeze().ndim > 1 and "token" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in student.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
