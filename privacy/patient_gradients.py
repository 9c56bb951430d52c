"""One gradient per patient, made where Opacus would make one per image.

Opacus' hooks see, at every layer, what went in and what the loss sends back. Where an image is one row, the gradient of
a patient for a linear layer is not formed (:mod:`clinifed.privacy.patient_means`); where it is a sequence of tokens, it
is formed by one product over all tokens of all images of the patient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.gsm_base import OPACUS_PARAM_MONKEYPATCH_ATTRS
from torch import Tensor, nn

from clinifed.errors import PrivacyError
from clinifed.privacy.patient_means import Formed, Groups, Outer, PatientGradient

__all__ = ["Parameters", "PatientGradients"]

_Place = tuple[int, torch.Size, tuple[int, ...]]
Parameters = tuple[Any, ...]  # nn.Parameter, on which Opacus keeps what is summed


class PatientGradients(GradSampleHooks):
    """Opacus' hooks on a module, which leave a gradient per patient instead of one per image.

    Set :attr:`groups` before each pass, then call :meth:`backward` with its losses, and :meth:`take` after it. Which
    modules are watched, and how the ones that are not linear make their gradients, is Opacus'.

    Guarantees:
        - What :meth:`take` returns for a patient is the mean over the patient's images of Opacus' gradient per image.
        - A parameter that took part in another way than once for each image is refused.
    """

    groups: Groups  # of the current physical batch

    def __init__(self, module: nn.Module) -> None:
        self._found: dict[Tensor, PatientGradient | None] = {}  # None: of a layer in `_layers`
        self._room: dict[Tensor, Tensor] = {}  # for what is formed
        self._wrong: dict[Tensor, str] = {}
        self._outputs: list[Tensor] = []
        # Linear layers of one row per image, by what they are sent, and whether a bias trains.
        self._layers: dict[tuple[_Place, bool], list[tuple[nn.Linear, Tensor, Tensor]]] = {}
        super().__init__(module, loss_reduction="sum")

    def add_hooks(self, **_options: Any) -> None:
        """Watch every module that trains: what goes in on the way forward, what comes to its output on the way back."""
        watched = self.iterate_submodules(self._module)
        self.autograd_grad_sample_hooks = [module.register_forward_hook(self._passed) for module in watched]
        self._module.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks
        self.enable_hooks()

    def cleanup(self) -> None:
        """Leave the module as it was. Opacus' own walks it six times, for what these hooks never put there."""
        self.disable_hooks()
        for handle in self.autograd_grad_sample_hooks:
            handle.remove()
        del self._module.autograd_grad_sample_hooks
        for parameter in self._module.parameters():
            for name in OPACUS_PARAM_MONKEYPATCH_ATTRS:
                vars(parameter).pop(name, None)

    def backward(self, losses: Tensor, *, checkpointing: bool = False) -> None:
        """The pass back from ``losses`` (R,), one for each row.

        Args:
            checkpointing: some modules are computed again, so that their outputs are not in this graph.
        """
        outputs, self._outputs = self._outputs, []
        if checkpointing:
            losses.sum().backward()
        elif outputs:
            # What autograd would add up for the parameters over the whole batch is not asked for: nobody needs it.
            torch.autograd.grad(losses.sum(), outputs, allow_unused=True)

    def take(self, trained: Mapping[str, nn.Parameter]) -> list[tuple[Parameters, PatientGradient]]:
        """The gradients of the last pass, each with the parameters it is of; the next pass writes over them.

        Raises:
            PrivacyError: a parameter has none, or was used more than once; all of them at once.
        """
        found, wrong, layers = self._found, self._wrong, self._layers
        self._found, self._wrong, self._layers = {}, {}, {}
        for parameter in trained.values():
            if parameter not in found:
                wrong.setdefault(parameter, "no gradient per image; it does not take part in the loss")
        if wrong:
            raise PrivacyError(*(f"{name}: {wrong[p]}, so freeze it" for name, p in trained.items() if p in wrong))
        taken: list[tuple[Parameters, PatientGradient]] = []
        for (_, bias), several in layers.items():
            modules, sent, backs = zip(*several, strict=True)
            back = backs[0] if len(backs) == 1 else torch.cat(backs, dim=1)
            outer = Outer(back, sent[0].float(), self.groups, tuple(m.out_features for m in modules), bias)
            taken.append(((*(m.weight for m in modules), *(m.bias for m in modules if bias)), outer))
        return [*taken, *(((p,), one) for p in trained.values() if (one := found[p]) is not None)]

    def _passed(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Called by torch after ``module`` has computed ``output`` (R, …) of its one input."""
        if not (self.hooks_enabled and torch.is_grad_enabled() and output.requires_grad):
            return
        sent = inputs[0].detach()
        output.register_hook(lambda back: self._returned(module, sent, back.detach()))
        self._outputs.append(output)

    def _returned(self, module: nn.Module, sent: Tensor, back: Tensor) -> None:
        """Called by torch when ``back``, the gradient of the losses with respect to ``module``'s output, is there."""
        if type(module) is nn.Linear:
            self._linear(module, sent, back)
            return
        sampler: Callable[..., Mapping[nn.Parameter, Tensor]] = self.GRAD_SAMPLERS[type(module)]
        for parameter, rows in sampler(module, [sent], back).items():
            if self._once(parameter, len(rows)):
                self._found[parameter] = self._mean(rows)

    def _linear(self, module: nn.Linear, sent: Tensor, back: Tensor) -> None:
        weight: Tensor = module.weight
        bias: Tensor | None = module.bias
        trains = weight.requires_grad and self._once(weight, len(sent))
        shifts = bias is not None and bias.requires_grad and self._once(bias, len(sent))
        if trains and back.dim() == 2:
            self._layers.setdefault((_place(sent), shifts), []).append((module, sent, back.float()))
            self._found |= {weight: None, **({bias: None} if bias is not None and shifts else {})}
            return
        if trains:
            self._found[weight] = self._formed(weight, sent.flatten(1, -2), back.flatten(1, -2))
        if bias is not None and shifts:
            self._found[bias] = self._mean(back if back.dim() == 2 else back.flatten(1, -2).sum(dim=1))

    def _once(self, parameter: Tensor, gradients: int) -> bool:
        """Whether ``parameter`` takes part for the first time in this pass, with one gradient for each image."""
        if gradients != (images := len(self.groups.patient)):
            counts = f"{gradients} gradients for {images} images"
            self._wrong[parameter] = f"{counts}; it is used in a way that has no gradient per image"
        elif parameter in self._found:
            self._wrong[parameter] = "used more than once in one pass, so that its gradients per image do not add up"
        return parameter not in self._wrong

    def _formed(self, weight: Tensor, sent: Tensor, back: Tensor) -> Formed:
        """Of tokens (R, T, in) and what comes back to them (R, T, out): one product per patient.

        It is written where that of the last pass was: for new room the system takes as long as for the product.
        """
        patients = len(self.groups.images)
        room = self._room.get(weight)
        if room is None or len(room) < patients:
            room = self._room[weight] = back.new_empty(patients, *weight.shape, dtype=torch.float32)
        means = room[:patients]
        several = zip(self.groups.by_size, self.groups.split(sent), self.groups.split(back), strict=True)
        for (which, _), a, g in several:
            a, g = a.flatten(1, 2).to(g.dtype), (g / g.shape[1]).flatten(1, 2)
            if not isinstance(which, slice):
                means[which] = (g.mT @ a).float()
            elif g.dtype == means.dtype:
                torch.bmm(g.mT, a, out=means)
            else:
                means.copy_(g.mT @ a)  # to float32 on the way
        return Formed(means)

    def _mean(self, rows: Tensor) -> Formed:
        return Formed(self.groups.mean(rows.flatten(1)).view(-1, *rows.shape[1:]))


def _place(tensor: Tensor) -> _Place:
    """Where a tensor lies in memory, and how: the same for the same rows."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()
