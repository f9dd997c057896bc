"""Score-based diffusion: processes, denoising, samplers, likelihood, guidance, inverse problems."""

from genjax.diffusion.bound import discretised_gaussian as discretised_gaussian
from genjax.diffusion.bound import hybrid_loss as hybrid_loss
from genjax.diffusion.bound import variational_bound as variational_bound
from genjax.diffusion.consistency import consistency_function as consistency_function
from genjax.diffusion.consistency import consistency_levels as consistency_levels
from genjax.diffusion.consistency import consistency_loss as consistency_loss
from genjax.diffusion.consistency import consistency_sample as consistency_sample
from genjax.diffusion.consistency import level_probabilities as level_probabilities
from genjax.diffusion.consistency import num_levels_at as num_levels_at
from genjax.diffusion.consistency import trig_consistency_loss as trig_consistency_loss
from genjax.diffusion.consistency import trig_function as trig_function
from genjax.diffusion.denoising import PREDICTIONS as PREDICTIONS
from genjax.diffusion.denoising import convert as convert
from genjax.diffusion.denoising import denoiser as denoiser
from genjax.diffusion.denoising import denoising_score_matching as denoising_score_matching
from genjax.diffusion.denoising import flow_denoiser as flow_denoiser
from genjax.diffusion.denoising import loss_weight as loss_weight
from genjax.diffusion.denoising import min_snr as min_snr
from genjax.diffusion.discrete import DiscreteTime as DiscreteTime
from genjax.diffusion.discrete import ddpm_betas as ddpm_betas
from genjax.diffusion.discrete import discrete as discrete
from genjax.diffusion.discrete import posterior as posterior
from genjax.diffusion.distillation import ddim_move as ddim_move
from genjax.diffusion.distillation import (
    distribution_matching_loss as distribution_matching_loss,
)
from genjax.diffusion.distillation import (
    progressive_distillation_loss as progressive_distillation_loss,
)
from genjax.diffusion.distillation import progressive_target as progressive_target
from genjax.diffusion.grids import time_grid as time_grid
from genjax.diffusion.guidance import classifier_free_guidance as classifier_free_guidance
from genjax.diffusion.guidance import classifier_guidance as classifier_guidance
from genjax.diffusion.guidance import clipped as clipped
from genjax.diffusion.guidance import dynamic_thresholding as dynamic_thresholding
from genjax.diffusion.inpainting import inpaint as inpaint
from genjax.diffusion.inverse import posterior_sampling as posterior_sampling
from genjax.diffusion.inverse import pseudoinverse_guidance as pseudoinverse_guidance
from genjax.diffusion.inverse import replacement as replacement
from genjax.diffusion.likelihood import log_likelihood as log_likelihood
from genjax.diffusion.masked import MASKING_SCHEDULES as MASKING_SCHEDULES
from genjax.diffusion.masked import masked_bound as masked_bound
from genjax.diffusion.masked import masked_cross_entropy as masked_cross_entropy
from genjax.diffusion.masked import order_bound as order_bound
from genjax.diffusion.masked import score_entropy as score_entropy
from genjax.diffusion.masked import step_bound as step_bound
from genjax.diffusion.mixture import GaussianMixture as GaussianMixture
from genjax.diffusion.mixture import mixture_denoiser as mixture_denoiser
from genjax.diffusion.mixture import mixture_log_prob as mixture_log_prob
from genjax.diffusion.multistep import dpm_solver_step as dpm_solver_step
from genjax.diffusion.multistep import unipc_step as unipc_step
from genjax.diffusion.samplers import initial_noise as initial_noise
from genjax.diffusion.samplers import sample as sample
from genjax.diffusion.samplers import sample_adaptive as sample_adaptive
from genjax.diffusion.samplers import scan_steps as scan_steps
from genjax.diffusion.samplers import trajectory as trajectory
from genjax.diffusion.schedules import EDM as EDM
from genjax.diffusion.schedules import Cosine as Cosine
from genjax.diffusion.schedules import Process as Process
from genjax.diffusion.schedules import RectifiedFlow as RectifiedFlow
from genjax.diffusion.schedules import SubVariancePreserving as SubVariancePreserving
from genjax.diffusion.schedules import VarianceExploding as VarianceExploding
from genjax.diffusion.schedules import VariancePreserving as VariancePreserving
from genjax.diffusion.steps import Move as Move
from genjax.diffusion.steps import StepFn as StepFn
from genjax.diffusion.steps import ancestral_step as ancestral_step
from genjax.diffusion.steps import ddim_step as ddim_step
from genjax.diffusion.steps import ddpm_step as ddpm_step
from genjax.diffusion.steps import euler_maruyama_step as euler_maruyama_step
from genjax.diffusion.steps import euler_step as euler_step
from genjax.diffusion.steps import heun_step as heun_step
from genjax.diffusion.steps import predictor_corrector_step as predictor_corrector_step
from genjax.diffusion.times import discrete_times as discrete_times
from genjax.diffusion.times import edm_times as edm_times
from genjax.diffusion.times import logit_normal_times as logit_normal_times
from genjax.diffusion.times import uniform_times as uniform_times
from genjax.diffusion.unmasking import sample_masked as sample_masked
from genjax.diffusion.unmasking import unmask_step as unmask_step
from genjax.randomness import indexed_normal as indexed_normal
from genjax.randomness import low_discrepancy as low_discrepancy
