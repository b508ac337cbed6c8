"""Gaussian diffusion over vectors (Ho et al. 2020; Nichol & Dhariwal 2021; Song et al. 2021, DDIM; Dhariwal & Nichol 2021).

Shapes: ``n`` samples of ``d`` scalars; ``t`` (n,) int64 indexes the steps of the (respaced) process, 0 = least noise.
A model bound to its conditions is a function (x (n, d), t (n,)) -> (n, d), or (n, 2d) with a learned variance, or a
tuple (output, extra); it always receives the step of the *original* process.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_diffusion.diffusion.respacing import even_in_log_snr, respaced_betas, space_timesteps, step_count
from gpt_diffusion.diffusion.schedule import Schedule, named_betas

Denoise = Callable[[Tensor, Tensor], Any]
Guide = Callable[[Tensor, Tensor], Tensor]


class ModelMeanType(Enum):
    """What the model predicts."""

    PREVIOUS_X = auto()  # x_{t-1}; only as the target of a loss
    START_X = auto()  # x_0
    EPSILON = auto()  # the noise


class ModelVarType(Enum):
    """Variance of p(x_{t-1} | x_t)."""

    FIXED_SMALL = auto()  # that of the posterior q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = auto()  # beta_t
    LEARNED_RANGE = auto()  # between the two, by the second half of the output (Nichol & Dhariwal 2021, eq. 15)


class LossType(Enum):
    """Training objective."""

    MSE = auto()  # squared error, plus the variational term if the variance is learned
    RESCALED_MSE = auto()  # the same with the variational term times T/1000
    KL = auto()  # variational term
    RESCALED_KL = auto()  # variational term times T

    @property
    def is_variational(self) -> bool:
        """Whether the variational term is all of it."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class Gaussian(NamedTuple):
    """Mean, variance and log variance, (n, d) each."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) of a model."""

    mean: Tensor  # (n, d)
    variance: Tensor  # (n, d)
    log_variance: Tensor  # (n, d)
    pred_xstart: Tensor  # (n, d), the x_0 behind it
    extra: Any  # second element of a model's tuple, else None


class Step(NamedTuple):
    """One sampling step."""

    sample: Tensor  # (n, d)
    pred_xstart: Tensor  # (n, d)


class Losses(NamedTuple):
    """Training losses, one value per sample."""

    loss: Tensor  # (n,) what is minimized
    mse: Tensor | None  # (n,) squared error, mean over d; None for variational objectives
    vb: Tensor | None  # (n,) variational term as it enters the loss; None if it does not
    pred_xstart: Tensor  # (n, d) predicted x_0, differentiable


class Bound(NamedTuple):
    """Variational bound in bits per dimension; columns run from t = T - 1 down to 0."""

    total: Tensor  # (n,)
    prior: Tensor  # (n,)
    vb: Tensor  # (n, T)
    xstart_mse: Tensor  # (n, T)
    mse: Tensor  # (n, T), of the noise


class Diffusion:
    """A diffusion process: a noise schedule, the steps kept of it, and what the model's output means.

    Args:
        noise_schedule: ``linear`` or ``squaredcos_cap_v2``.
        steps: T of the original process.
        respacing: Steps to keep, see :func:`~gpt_diffusion.diffusion.space_timesteps`; all if empty. ``"snrN"``: N steps at
            equal distances in log(signal / noise).
        mean_type: What the model predicts.
        var_type: Variance of the reverse process.
        loss_type: Training objective.

    Raises:
        ValueError: Unknown schedule, too few steps, impossible respacing.
    """

    def __init__(
        self,
        noise_schedule: str = "linear",
        steps: int = 1000,
        *,
        respacing: str | Sequence[int] = "",
        mean_type: ModelMeanType = ModelMeanType.START_X,
        var_type: ModelVarType = ModelVarType.FIXED_LARGE,
        loss_type: LossType = LossType.MSE,
    ) -> None:
        """Compute the constants of the steps that are kept."""
        original = Schedule(named_betas(noise_schedule, steps))
        if isinstance(respacing, str) and respacing.startswith("snr"):
            count = step_count(respacing.removeprefix("snr"), respacing, steps)
            self.timestep_map = even_in_log_snr(original.alphas_cumprod, count)
        else:
            self.timestep_map = sorted(space_timesteps(steps, respacing or [steps]))
        self.schedule = Schedule(respaced_betas(original.alphas_cumprod, self.timestep_map))
        self.mean_type = mean_type
        self.var_type = var_type
        self.loss_type = loss_type
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """Steps T that are kept."""
        return len(self.timestep_map)

    def original_steps(self, t: Tensor) -> Tensor:
        """Steps of the original process, int64, for steps t of this one."""
        key = ("timestep_map", t.device)
        if key not in self._tables:
            self._tables[key] = torch.tensor(self.timestep_map, device=t.device)
        return self._tables[key][t]

    def _at(self, constant: str, t: Tensor, x: Tensor) -> Tensor:
        """A constant of the schedule at steps t, (n, 1): gathered in float64, then rounded to float32 unless x is float64."""
        key = (constant, t.device)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(getattr(self.schedule, constant)).to(t.device)
        return self._tables[key][t].to(torch.float64 if x.dtype == torch.float64 else torch.float32)[:, None]

    # The forward process q

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_0), Ho et al. 2020 eq. 4."""
        return Gaussian(
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start,
            self._at("one_minus_alphas_cumprod", t, x_start).expand_as(x_start),
            self._at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        signal, sigma = (self._at(f"sqrt_{name}alphas_cumprod", t, x_start) for name in ("", "one_minus_"))
        return signal * x_start + sigma * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0), Ho et al. 2020 eqs. 6 and 7."""
        return Gaussian(
            self._posterior_mean(x_start, x_t, t),
            self._at("posterior_variance", t, x_t).expand_as(x_t),
            self._at("posterior_log_variance_clipped", t, x_t).expand_as(x_t),
        )

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        c1, c2 = (self._at(f"posterior_mean_coef{i}", t, x_t) for i in (1, 2))
        return c1 * x_start + c2 * x_t

    def xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 that gives x_t with this noise."""
        a, b = self._at("sqrt_recip_alphas_cumprod", t, x_t), self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return a * x_t - b * eps

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Noise that gives x_t from this x_0."""
        a, b = self._at("sqrt_recip_alphas_cumprod", t, x_t), self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return (a * x_t - x_start) / b

    # The reverse process p

    def p_mean_variance(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Prediction:
        """p(x_{t-1} | x_t) of a model.

        Args:
            denoise: Model bound to its conditions.
            x: x_t (n, d).
            t: Steps (n,).
            clip_denoised: Clamp the predicted x_0 to [-1, 1] (images; never for checkpoints).
            denoised_fn: Applied to the predicted x_0 before that.

        Returns:
            The Gaussian, the predicted x_0 and the model's extra output.

        Raises:
            ValueError: The process predicts the previous x, or the output has a wrong shape.
        """
        output = denoise(x, self.original_steps(t))
        output, extra = output if isinstance(output, tuple) else (output, None)
        learned = self.var_type is ModelVarType.LEARNED_RANGE
        expected = (len(x), x.shape[1] * (2 if learned else 1))
        if output.shape != expected:
            raise ValueError(f"model output: expected {expected} for {self.var_type.name}, got {tuple(output.shape)}")
        if learned:
            output, v = output.chunk(2, dim=1)
            w = (v + 1) / 2
            low, high = self._at("posterior_log_variance_clipped", t, x), self._at("log_betas", t, x)
            log_variance = w * high + (1 - w) * low
            variance = log_variance.exp()
        elif self.var_type is ModelVarType.FIXED_LARGE:
            variance = self._at("large_variance", t, x).expand_as(x)
            log_variance = self._at("large_log_variance", t, x).expand_as(x)
        else:
            variance = self._at("posterior_variance", t, x).expand_as(x)
            log_variance = self._at("posterior_log_variance_clipped", t, x).expand_as(x)
        pred_xstart = self._xstart(output, x, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        return Prediction(self._posterior_mean(pred_xstart, x, t), variance, log_variance, pred_xstart, extra)

    def _xstart(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Predicted x_0 behind the mean part of a model's output."""
        if self.mean_type is ModelMeanType.PREVIOUS_X:
            raise ValueError("a model of the previous x has a loss, but no predicted x_0: use START_X or EPSILON")
        return output if self.mean_type is ModelMeanType.START_X else self.xstart_from_eps(x, t, output)

    def condition_mean(self, guide: Guide, p: Prediction, x: Tensor, t: Tensor) -> Prediction:
        """Guided mean: mean + variance * gradient (Dhariwal & Nichol 2021, algorithm 1)."""
        return p._replace(mean=p.mean + p.variance * guide(x, self.original_steps(t)))

    def condition_score(self, guide: Guide, p: Prediction, x: Tensor, t: Tensor) -> Prediction:
        """Guided noise: eps - sqrt(1 - abar_t) * gradient, then x_0 and mean again (their algorithm 2)."""
        gradient = guide(x, self.original_steps(t))
        sigma = self._at("sqrt_one_minus_alphas_cumprod", t, x)
        eps = self.eps_from_xstart(x, t, p.pred_xstart) - sigma * gradient
        pred_xstart = self.xstart_from_eps(x, t, eps)
        return p._replace(pred_xstart=pred_xstart, mean=self._posterior_mean(pred_xstart, x, t))

    def p_sample(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        guide: Guide | None = None,
    ) -> Step:
        """One ancestral step (Ho et al. 2020, algorithm 2): mean + [t > 0] exp(log variance / 2) noise.

        Args:
            denoise: Model bound to its conditions.
            x: x_t (n, d).
            t: Steps (n,).
            noise: Standard normal numbers (n, d).
            clip_denoised: See :meth:`p_mean_variance`.
            denoised_fn: See :meth:`p_mean_variance`.
            guide: (x, t) -> gradient of a log density to follow.

        Returns:
            x_{t-1} and the predicted x_0.
        """
        p = self.p_mean_variance(denoise, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        if guide is not None:
            p = self.condition_mean(guide, p, x, t)
        return Step(p.mean + (t > 0)[:, None] * (0.5 * p.log_variance).exp() * noise, p.pred_xstart)

    def ddim_sample(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        eta: float = 0.0,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        guide: Guide | None = None,
    ) -> Step:
        """One DDIM step (Song et al. 2021, eqs. 12 and 16); ``noise`` may be None for eta = 0, other arguments as above."""
        p = self.p_mean_variance(denoise, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        if guide is not None:
            p = self.condition_score(guide, p, x, t)
        eps = self.eps_from_xstart(x, t, p.pred_xstart)
        abar, previous = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = eta * ((1 - previous) / (1 - abar)).sqrt() * (1 - abar / previous).sqrt()
        sample = p.pred_xstart * previous.sqrt() + (1 - previous - sigma**2).sqrt() * eps
        if eta != 0:
            if noise is None:
                raise ValueError(f"DDIM with eta {eta} needs noise")
            sample = sample + sigma * noise  # sigma is 0 at t = 0, where abar_{t-1} = 1
        return Step(sample, p.pred_xstart)

    def dpm_sample(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Tensor,
        last: Tensor | None = None,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Step:
        """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): DDIM towards an x_0 extrapolated from the last step's.

        Args:
            denoise: See :meth:`p_sample`, like the other arguments.
            x: x_t (n, d).
            t: Steps (n,).
            last: Predicted x_0 of the step before, t + 1; without it the step is one of DDIM.
            clip_denoised: See :meth:`p_mean_variance`.
            denoised_fn: See :meth:`p_mean_variance`.

        Returns:
            x_{t-1} and the predicted x_0, not extrapolated.
        """
        x_start = self.p_mean_variance(denoise, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn).pred_xstart
        aim = x_start if last is None else x_start + self._at("extrapolation", t, x) * (x_start - last)
        previous = self._at("alphas_cumprod_prev", t, x)
        return Step(aim * previous.sqrt() + (1 - previous).sqrt() * self.eps_from_xstart(x, t, aim), x_start)

    def ddim_reverse_sample(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Step:
        """x_{t+1} by the deterministic DDIM equation run backwards (eta = 0); arguments as above."""
        p = self.p_mean_variance(denoise, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        following = self._at("alphas_cumprod_next", t, x)
        eps = self.eps_from_xstart(x, t, p.pred_xstart)
        return Step(p.pred_xstart * following.sqrt() + (1 - following).sqrt() * eps, p.pred_xstart)

    # Losses

    def training_losses(
        self,
        model: Callable[..., Any],
        x_start: Tensor,
        t: Tensor,
        *,
        loss_target: Tensor,
        loss_prev: Tensor,
        x_prev: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """Objective of a denoiser of checkpoints, per sample.

        Args:
            model: Called as ``model(x_t, t, loss_target, loss_prev=..., x_prev=...)``.
            x_start: Target checkpoints x_0 (n, d), normalised.
            t: Steps (n,).
            loss_target: Metric of ``x_start`` (n,), raw.
            loss_prev: Metric of ``x_prev`` (n,), raw.
            x_prev: Starting checkpoints (n, d), normalised.
            noise: Standard normal numbers (n, d); drawn if None.
            generator: Where they are drawn from.

        Returns:
            Loss, its terms, and the predicted x_0 (never clipped).
        """
        if noise is None:
            noise = torch.randn(x_start.shape, generator=generator, dtype=x_start.dtype, device=x_start.device)
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.original_steps(t), loss_target, loss_prev=loss_prev, x_prev=x_prev)
        output = output[0] if isinstance(output, tuple) else output
        mean_part = output[:, : x_start.shape[1]]
        mse = vb = None
        if self.loss_type.is_variational:
            vb, pred_xstart = self.vb_terms_bpd(lambda x, t: output, x_start, x_t, t, clip_denoised=False)
            loss = vb = vb * (self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1)
        else:
            target = {
                ModelMeanType.PREVIOUS_X: lambda: self._posterior_mean(x_start, x_t, t),
                ModelMeanType.START_X: lambda: x_start,
                ModelMeanType.EPSILON: lambda: noise,
            }[self.mean_type]()
            loss = mse = (target - mean_part).square().mean(dim=1)
            previous = self.mean_type is ModelMeanType.PREVIOUS_X
            pred_xstart = mean_part if previous else self._xstart(mean_part, x_t, t)
            if self.var_type is ModelVarType.LEARNED_RANGE:
                vb = self._variance_term(output, x_start, x_t, t)
                loss = mse + vb
        return Losses(loss, mse, vb, pred_xstart)

    def _variance_term(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Variational term that teaches the variance only (Nichol & Dhariwal 2021, L_vlb with a stopped mean)."""
        mean, v = output.chunk(2, dim=1)
        frozen = torch.cat([mean.detach(), v], dim=1)
        vb = self.vb_terms_bpd(lambda x, t: frozen, x_start, x_t, t, clip_denoised=False)[0]
        return vb * (self.num_timesteps / 1000) if self.loss_type is LossType.RESCALED_MSE else vb

    def vb_terms_bpd(
        self,
        denoise: Denoise,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        exact_nll: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One term of the variational bound (Ho et al. 2020, eq. 5), in bits per dimension.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) for t = 0. The published code leaves the
        log of the scale out of the latter; ``exact_nll`` adds it.

        Returns:
            The term (n,) and the predicted x_0 (n, d).
        """
        q = self.q_posterior(x_start, x_t, t)
        p = self.p_mean_variance(denoise, x_t, t, clip_denoised=clip_denoised)
        kl = normal_kl(q.mean, q.log_variance, p.mean, p.log_variance).mean(dim=1)
        nll = 0.5 * ((x_start - p.mean) * (-0.5 * p.log_variance).exp()).square() + 0.5 * math.log(2 * math.pi)
        if exact_nll:
            nll = nll + 0.5 * p.log_variance
        return torch.where(t == 0, nll.mean(dim=1), kl) / math.log(2), p.pred_xstart

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_{T-1} | x_0) || N(0, 1)) in bits per dimension, (n,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        q = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(x_start)
        return normal_kl(q.mean, q.log_variance, zero, zero).mean(dim=1) / math.log(2)

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        denoise: Denoise,
        x_start: Tensor,
        noise: Iterable[Tensor],
        *,
        clip_denoised: bool = True,
        exact_nll: bool = False,
    ) -> Bound:
        """The whole variational bound.

        Args:
            denoise: Model bound to its conditions.
            x_start: x_0 (n, d).
            noise: T draws of standard normal numbers (n, d), the first for t = T - 1.
            clip_denoised: See :meth:`p_mean_variance`.
            exact_nll: See :meth:`vb_terms_bpd`.

        Returns:
            The bound and its terms.
        """
        vb, xstart_mse, mse = [], [], []
        for step, eps in zip(reversed(range(self.num_timesteps)), noise, strict=False):
            t = torch.full((len(x_start),), step, device=x_start.device)
            x_t = self.q_sample(x_start, t, eps)
            term, pred_xstart = self.vb_terms_bpd(
                denoise, x_start, x_t, t, clip_denoised=clip_denoised, exact_nll=exact_nll
            )
            vb.append(term)
            xstart_mse.append((pred_xstart - x_start).square().mean(dim=1))
            mse.append((self.eps_from_xstart(x_t, t, pred_xstart) - eps).square().mean(dim=1))
        if len(vb) != self.num_timesteps:
            raise ValueError(f"{self.num_timesteps} steps need as many draws of noise, got {len(vb)}")
        prior = self.prior_bpd(x_start)
        terms = torch.stack(vb, dim=1)
        return Bound(terms.sum(dim=1) + prior, prior, terms, torch.stack(xstart_mse, dim=1), torch.stack(mse, dim=1))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of N(mean2, variance2) from N(mean1, variance1), elementwise, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    shift = (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + shift)


def create_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = True,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
) -> Diffusion:
    """A process by the published arguments; G.pt uses ``learn_sigma=False, predict_xstart=True`` and the other defaults.

    Args:
        steps: T of the original process.
        learn_sigma: Let the model output a variance too.
        sigma_small: Else: the posterior's variance instead of beta_t.
        noise_schedule: ``linear`` or ``squaredcos_cap_v2``.
        use_kl: Train on the variational term alone, times T.
        predict_xstart: The model predicts x_0, not the noise.
        rescale_learned_sigmas: Scale the variational term of a learned variance by T/1000.
        timestep_respacing: Steps to keep.

    Returns:
        The process.

    Raises:
        ValueError: See :class:`Diffusion`.
    """
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    mse = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return Diffusion(
        noise_schedule,
        steps,
        respacing=timestep_respacing,
        mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else mse,
    )
