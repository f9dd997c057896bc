"""What docstrings promise, and the test that holds each promise.

A promise is a sentence with "never", "always", "exactly" or "strictly". An entry is the owner
(module, or module and name), words of the sentence, and the test.
"""

HELD = (
    (
        "adversarial.objectives:nwj",
        "never above Donsker-Varadhan",
        "adversarial/test_objectives.py::test_nwj_is_never_above_donsker_varadhan",
    ),
    (
        "alignment.log_probs",
        "Masked places never matter",
        "test_promises.py::test_masked_places_never_matter",
    ),
    (
        "alignment.rewards:kl_estimate",
        "k3 is never negative",
        "test_promises.py::test_k3_is_never_negative_and_unbiased",
    ),
    (
        "data.scaling:Scaling.dequantise",
        "strictly inside its bin",
        "data/test_scaling.py::test_every_y_lies_strictly_inside_its_bin",
    ),
    ("data.synthetic", "normalised exactly", "data/test_synthetic.py::test_integrates_to_one"),
    (
        "data.text:Tokeniser.decode",
        "exactly what was encoded",
        "data/test_text.py::test_bytes_and_bpe_go_there_and_back",
    ),
    (
        "data.text:tokeniser",
        "there and back exactly",
        "data/test_text.py::test_bytes_and_bpe_go_there_and_back",
    ),
    (
        "diffusion.masked:masked_cross_entropy",
        "never counted",
        "diffusion/test_masked.py::test_padding_and_rows",
    ),
    (
        "diffusion.multistep",
        "probability flow is exactly",
        "diffusion/test_multistep.py::test_a_mean_that_is_a_polynomial_is_integrated_exactly",
    ),
    (
        "diffusion.schedules",
        "never by a second formula",
        "diffusion/test_schedules.py::test_marginals_drift_and_diffusion_are_song_et_als",
    ),
    (
        "diffusion.unmasking:unmask_step",
        "sample the law",
        "diffusion/test_masked.py::test_one_token_at_a_time_samples_the_law",
    ),
    (
        "diffusion.unmasking:sample_masked",
        "sampled exactly",
        "diffusion/test_masked.py::test_one_token_at_a_time_samples_the_law",
    ),
    (
        "divergences",
        'always means "from P"',
        "test_divergences.py::test_activation_increases_onto_the_domain_and_inverts_the_slope",
    ),
    (
        "divergences:_jensen_shannon_of_log",
        "never negative",
        "test_divergences.py::test_samples_of_q_are_never_below_the_least_value",
    ),
    (
        "flows.bijections.base:check_tree",
        "maps exactly the names",
        "flows/test_bijections.py::test_bad_input_is_named",
    ),
    (
        "flows.bijections.base:rescale",
        "never leaves the other",
        "flows/test_bijections.py::test_a_rescaled_interval_never_leaves_the_new_one",
    ),
    (
        "flows.bijections.spline:rational_quadratic",
        "never leaves it by rounding",
        "flows/test_bijections.py::test_a_spline_on_a_closed_interval_never_leaves_it",
    ),
    (
        "flows.bijections.spline:rational_quadratic",
        "never NaN",
        "flows/test_bijections.py::test_spline_is_the_identity_outside_and_at_zero_with_finite_gradients",
    ),
    (
        "flows.mean_flow",
        "exactly, for any two times",
        "flows/test_mean_flow.py::test_any_number_of_exact_steps_ends_where_one_does",
    ),
    (
        "flows.mean_flow:mean_flow_times",
        "never touch",
        "flows/test_mean_flow.py::test_drawn_times_are_in_order_and_reach_the_ends",
    ),
    (
        "metrics._pairs:pair_distances",
        "never missed",
        "metrics/test_fidelity.py::test_ties_and_duplicates_lie_inside",
    ),
    (
        "metrics.distances:frechet_distance",
        "Never negative",
        "metrics/test_distances.py::test_frechet_is_never_negative_and_zero_for_equal_sets",
    ),
    (
        "networks.r3gan:doublings",
        "it never does",
        "networks/test_r3gan.py::test_sizes_that_do_not_fit_are_refused_by_name",
    ),
    (
        "networks.tarflow:CausalConditioner",
        "always gets 0",
        "networks/test_tarflow.py::test_a_block_is_causal_and_keeps_its_first_patch",
    ),
    (
        "networks.unet:UNet",
        "middle always has it",
        "test_promises.py::test_the_middle_of_a_unet_always_has_attention",
    ),
    (
        "numerics:exp_excess",
        "never negative",
        "test_numerics.py::test_exp_excess_is_never_negative_and_keeps_its_digits",
    ),
    (
        "numerics:squared_distances",
        "never negative",
        "test_promises.py::test_squared_distances_are_never_negative",
    ),
    (
        "numerics:squared_distances",
        "always as a product",
        "test_promises.py::test_squared_distances_are_never_negative",
    ),
    ("ode:divergence", "exactly or by probes", "test_ode.py::test_traces_against_the_jacobian"),
    (
        "training.checkpoint:Checkpoints",
        "never the best",
        "training/test_checkpoint.py::test_no_best_where_every_score_is_nan",
    ),
    ("training.export:export_npz", "widened exactly", "training/test_export.py::test_round_trip"),
    (
        "training.loop:fit",
        "always saved",
        "training/test_loop.py::test_the_last_state_is_always_saved",
    ),
    (
        "training.loop:_Training.reached",
        "never where that is 0",
        "test_promises.py::test_no_call_reaches_a_multiple_of_0",
    ),
    (
        "training.record",
        "metrics.jsonl always",
        "training/test_loop.py::test_metrics_are_those_of_the_steps",
    ),
    (
        "training.saddle:SaddleState",
        "key is never advanced",
        "test_promises.py::test_the_key_of_a_state_is_never_advanced",
    ),
    (
        "training.skipping:skip_above_median",
        "left out always",
        "training/test_skipping.py::test_the_optimiser_sees_what_is_taken_and_nothing_else",
    ),
    (
        "training.state:TrainState",
        "never advanced",
        "test_promises.py::test_the_key_of_a_state_is_never_advanced",
    ),
    (
        "transport.costs:squared_euclidean",
        "never negative",
        "test_promises.py::test_squared_distances_are_never_negative",
    ),
    (
        "transport.gaussian:gaussian_wasserstein",
        "never negative",
        "transport/test_gaussian.py::test_never_negative_and_zero_for_equal_covariances",
    ),
    (
        "transport.reading:_relative",
        "never negative",
        "test_promises.py::test_the_integrand_of_the_plans_divergence_is_never_negative",
    ),
    (
        "transport.sinkhorn:sinkhorn",
        "never the matrix",
        "transport/test_streaming.py::test_memory_at_16384_points",
    ),
    (
        "variational.elbo:elbo",
        "always with a prior",
        "variational/test_prior.py::test_the_standard_normal_as_a_prior_changes_nothing_but_the_noise",
    ),
    (
        "variational.hierarchical:hierarchical_elbo",
        "aux always has",
        "variational/test_hierarchical.py::test_training_options_leave_the_bounds_parts_alone",
    ),
    (
        "variational.quantize:kmeans",
        "never raises the mean",
        "test_promises.py::test_a_round_of_kmeans_never_raises_the_error",
    ),
    (
        "variational.quantize:straight_through",
        "The code, exactly",
        "test_promises.py::test_straight_through_is_exactly_the_code",
    ),
)
# Sentences with such a word that promise nothing.
NO_PROMISE = (("alignment.advantages:group_advantages", "nearly always or nearly never"),)
