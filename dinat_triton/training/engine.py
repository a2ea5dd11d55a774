"""A step of training: loss, gradients, update, schedule and averages, on however many processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm.utils
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as whole

from dinat_triton.training.data import seed_from
from dinat_triton.training.model import shard
from dinat_triton.training.recipe import Recipe

# Whole tensors, wherever their parts are, so that any number of processes can load them.
WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)


def accelerator_for(recipe: Recipe, **options: Any) -> Accelerator:
    """The processes and the device that a recipe asks for, and its trackers."""
    available = [str(each) for each in get_available_trackers()]
    for name in recipe.log_with or []:
        if name not in available:  # accelerate would pass over it
            raise ValueError(f"--log-with {name} is not installed: there is {', '.join(available) or 'none'}")
    precision = {"bfloat16": "bf16", "float16": "fp16"}[recipe.amp_dtype] if recipe.amp else "no"
    # Loaders make the batches of all processes together: their number does not change which images meet in a step.
    loading = DataLoaderConfiguration(
        split_batches=True, use_seedable_sampler=True, data_seed=recipe.seed, non_blocking=True
    )
    accelerator = Accelerator(
        cpu=recipe.device == "cpu", mixed_precision=precision, dataloader_config=loading, log_with=recipe.log_with,
        **options,
    )  # fmt: skip
    if recipe.device not in (None, accelerator.device.type):
        raise ValueError(f"--device {recipe.device} cannot be used: what is here is {accelerator.device.type}")
    return accelerator


class Engine:
    """A model and what trains it.

    Args:
        recipe: How.
        model: From `build`.
        accelerator: From `accelerator_for`.
        batch: Images of a step, of all processes together.
        steps: In an epoch.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, accelerator: Accelerator, batch: int, steps: int):
        self.recipe, self.accelerator, self.model = recipe, accelerator, model.to(accelerator.device)
        self.done = 0  # steps
        self.averages = None
        if recipe.model_ema:
            self.averages = timm.utils.ModelEmaV3(
                model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup
            )
        if recipe.fsdp:
            shard(model)
        if recipe.fsdp and self.averages is not None:
            shard(self.averages.module)
        if recipe.torchcompile:
            model.compile()
        # accelerate knows no FSDP2 on CPUs, and would not let us test it.
        self.parallel = model if recipe.fsdp else accelerator.prepare_model(model)
        lr = recipe.lr if recipe.lr is not None else recipe.lr_base * batch / recipe.lr_base_size
        self.optimizer = create_optimizer_v2(
            model, recipe.opt, lr=lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
            **recipe.opt_kwargs,
        )  # fmt: skip
        self.updater = accelerator.prepare_optimizer(self.optimizer)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, recipe.sched, num_epochs=recipe.epochs, cooldown_epochs=recipe.cooldown_epochs,
            decay_rate=recipe.decay_rate, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
            warmup_epochs=recipe.warmup_epochs, step_on_epochs=False, updates_per_epoch=steps,
        )  # fmt: skip
        self.mixup = self._mixup(model.num_classes)
        self.criterion = create_classification_loss(smoothing=recipe.smoothing, soft_targets=self.mixup is not None)

    def _mixup(self, classes: Any) -> Mixup | None:
        recipe = self.recipe
        if not (recipe.mixup or recipe.cutmix):
            return None
        return Mixup(
            recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, switch_prob=recipe.mixup_switch_prob,
            label_smoothing=recipe.smoothing, num_classes=classes,
        )  # fmt: skip

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Trains on this process's share of a batch.

        Returns:
            Its mean loss.
        """
        # What is drawn in a step depends on nothing that a resume would have to bring back.
        timm.utils.random_seed(seed_from(self.recipe.seed, self.done, self.accelerator.process_index), rank=0)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        parts = self.recipe.grad_accum_steps
        loss = torch.zeros((), device=images.device)
        for i, (inputs, targets) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            with self._gradients_shared(i == parts - 1):
                with self.accelerator.autocast():
                    part = self.criterion(self.parallel(inputs), targets) * (len(inputs) / len(images))
                self.accelerator.backward(part)
            loss += part.detach()
        if self.recipe.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.updater.step()
        self.updater.zero_grad()
        self.done += 1
        if self.schedule is not None:
            self.schedule.step_update(self.done)
        if self.averages is not None:
            self.averages.update(self.model, step=self.done)
        return loss

    def _gradients_shared(self, last: bool) -> AbstractContextManager[Any]:
        """Lets processes exchange gradients after the last part of a batch only."""
        if self.recipe.fsdp:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.parallel)

    @property
    def lr(self) -> float:
        """The highest learning rate of the next step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def result(self) -> nn.Module:
        """The model that is validated and kept: the averages, if there are any."""
        return self.model if self.averages is None else self.averages.module

    def weights(self) -> dict[str, Any]:
        """Those of the result; nothing but in the first process, where they are sharded."""
        return whole.get_model_state_dict(self.result, options=WHOLE)

    def state(self) -> dict[str, Any]:
        """Everything that `load` needs. All processes have to call it; the first one has the answer."""
        state = {
            "done": self.done,
            "model": whole.get_model_state_dict(self.model, options=WHOLE),
            "optimizer": whole.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE),
        }
        if self.averages is not None:
            state["averages"] = whole.get_model_state_dict(self.averages.module, options=WHOLE)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.done = state["done"]
        whole.set_model_state_dict(self.model, state["model"], options=WHOLE)
        whole.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=WHOLE)
        if self.averages is not None:
            whole.set_model_state_dict(self.averages.module, state["averages"], options=WHOLE)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.schedule is not None:
            self.schedule.step_update(self.done)
