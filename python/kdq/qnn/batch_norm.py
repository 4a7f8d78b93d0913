"""Shift-based batch normalization: no multiplication but by powers of two."""

from __future__ import annotations

from torch import Tensor, nn

from kdq.qnn.power_of_two import power_of_two


class ShiftBatchNorm1d(nn.BatchNorm1d):
    """Batch norm of `[batch, features]` whose factors are powers of two (Hubara et al., "Quantized Neural Networks",
    2016, shift-based batch normalization).

    With c = x - mean and AP2 the nearest power of two (`power_of_two`): variance `mean(c * AP2(c))`, result
    `c * AP2(1 / sqrt(variance + eps)) * AP2(weight) + bias`. Gradients go straight through AP2. Parameters, running
    statistics and arguments are those of nn.BatchNorm1d, but for the running variance, which is the one above, of n
    elements and not n - 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x: expected [batch, {self.num_features}], got {list(x.shape)}")
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self._affine(x - self.running_mean, self.running_var)
        if len(x) < 2:
            raise ValueError(f"x: expected more than one row in training, got {list(x.shape)}")
        mean = x.mean(0)
        centred = x - mean
        variance = (centred * power_of_two(centred)).mean(0)
        if self.training:
            self._track(mean.detach(), variance.detach())
        return self._affine(centred, variance)

    def _affine(self, centred: Tensor, variance: Tensor) -> Tensor:
        y = centred * power_of_two((variance + self.eps).rsqrt())
        return y if self.weight is None else y * power_of_two(self.weight) + self.bias

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
